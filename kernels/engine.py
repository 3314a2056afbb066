"""What an engine runs on a GPU, as one namespace: `labkit.engine.Engine(model, ..., ops=kernels.engine)`.

Steps that only decode take the kernel that splits the keys; mixed steps the ragged one. Nothing new is defined here.
"""

from kernels.batching import ragged_attention  # noqa: F401
from kernels.fusion import add_rmsnorm, rope, swiglu  # noqa: F401
from kernels.paged_attention import paged_decoding, write_kv  # noqa: F401
