"""Real Triton kernels, one file a topic. Importing this package decides how they run.

With a usable GPU (compute capability 8.0 or higher, or an AMD GPU) they are compiled. Without one they run in
Triton's interpreter on the CPU: slow, but the same code. `TRITON_INTERPRET=0` or `1` in the environment overrides
the choice. Import this package before anything that imports Triton (`torch.compile` does).

`INTERPRETED` says which of the two it is, `DEVICE` where tensors have to live: "cpu" or "cuda".

This file never raises: `transformers` probes for a package of this name.
"""

import os


def _has_usable_gpu() -> bool:
    try:
        import torch

        if not torch.cuda.is_available():
            return False
        return torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)
    except Exception:  # no torch, or a broken driver: then there is no GPU to use
        return False


if "TRITON_INTERPRET" not in os.environ and not _has_usable_gpu():
    os.environ["TRITON_INTERPRET"] = "1"

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
DEVICE = "cpu" if INTERPRETED else "cuda"
