"""Real Triton kernels, one file a topic. Importing this package decides how they run.

With a usable GPU (compute capability 8.0 or higher, or an AMD GPU) they are compiled. Without one they run in
Triton's interpreter on the CPU: slow, but the same code. `TRITON_INTERPRET=0` or `1` in the environment overrides
the choice. Import this package before anything that imports Triton (`torch.compile` does).
`LAB_PTX=sm_90` (an H200) or `sm_80` (an A100) is the third way, for tests: kernels are compiled for that GPU, and
their PTX runs on the CPU (`labkit/ptx.py`).

`INTERPRETED` and `EMULATED` say which it is, `DEVICE` where tensors have to live: "cpu", or "cuda" where things can be
timed.

Without LAB_PTX this file never raises: `transformers` probes for a package of this name.
"""

import os

LEAST_CAPABILITY = (8, 0)  # of an NVIDIA GPU, that Triton supports


def _has_usable_gpu() -> bool:
    try:
        import torch

        if not torch.cuda.is_available():
            return False
        return torch.version.hip is not None or torch.cuda.get_device_capability() >= LEAST_CAPABILITY
    except Exception:  # no torch, or a broken driver: then there is no GPU to use
        return False


EMULATED = os.environ.get("LAB_PTX", "")  # the GPU whose code runs on the CPU, "" for none
if "TRITON_INTERPRET" not in os.environ and not EMULATED and not _has_usable_gpu():
    os.environ["TRITON_INTERPRET"] = "1"

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
EMULATED = "" if INTERPRETED else EMULATED
DEVICE = "cpu" if INTERPRETED or EMULATED else "cuda"


def where() -> str:
    """How kernels run here and why, in a sentence or two: for the first cell of a notebook."""
    try:
        import torch

        version = torch.__version__
        found = torch.cuda.is_available()
        name = torch.cuda.get_device_name() if found else ""
        major, minor = torch.cuda.get_device_capability() if found else (0, 0)
        amd = torch.version.hip is not None
    except Exception as error:  # a missing torch or a broken driver: say so, and raise nothing
        return f"torch cannot be used here ({type(error).__name__}: {error}). Install the lab first: pip install -e ."
    if EMULATED:
        return f"Kernels are compiled for {EMULATED}, and their PTX runs on the CPU: right or wrong, and never timed."
    gpu = f"{name} (compute capability {major}.{minor})" if name and not amd else name
    if not INTERPRETED:
        return f"Kernels are compiled for {gpu or 'a GPU that torch does not see'}, torch {version}."
    slow = "Kernels run in Triton's interpreter on the CPU: right, on small sizes, and never timed."
    if not name:
        return f"No GPU that torch {version} can use.\n{slow}"
    if not amd and (major, minor) < LEAST_CAPABILITY:
        return f"{gpu} is here, but Triton supports 8.0 (A100, RTX 30) and later.\n{slow}"
    return f"{gpu} is here, but TRITON_INTERPRET=1 is set.\n{slow}"


if EMULATED:
    from labkit import ptx

    ptx.emulate(EMULATED)
