"""Watch a Triton kernel at work: every call of one of its jit helpers, in Triton's interpreter.

This is where the players get their data from: a real run of the real kernel, tile by tile, not a second computation.
"""

import importlib
import os
import pickle
from dataclasses import dataclass
from queue import Empty

import torch.multiprocessing as mp


@dataclass(frozen=True)
class Step:
    """One call of the helper: by which program (grid coordinates), with what, and what it returned (numpy arrays)."""

    program: tuple[int, int, int]
    inputs: tuple
    outputs: tuple


def _plain(x):
    """Interpreter tensors as numpy arrays, inside tuples too; all else unchanged."""
    if isinstance(x, tuple):
        return tuple(_plain(item) for item in x)
    handle = getattr(x, "handle", None)
    return x if handle is None else handle.data.copy()


def _watch(module: str, helper: str, function: str, arguments: dict):
    from triton.runtime import interpreter

    room = importlib.import_module(module)
    real, steps = getattr(room, helper), []

    def watched(*inputs, **kwargs):
        outputs = real(*inputs, **kwargs)
        steps.append(Step(tuple(interpreter.interpreter_builder.grid_idx), _plain(inputs), _plain(tuple(outputs))))
        return outputs

    setattr(room, helper, watched)
    home, _, name = function.rpartition(":")
    try:
        result = getattr(importlib.import_module(home or module), name)(**arguments)
    finally:
        setattr(room, helper, real)
    return result, steps


def _child(queue, *job) -> None:
    queue.put(pickle.dumps(_watch(*job)))  # bytes: tensors would be handed over in memory that ends with this process


def interpreted() -> bool:
    """Whether Triton interprets here: TRITON_INTERPRET as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def watch(module: str, helper: str, function: str, arguments: dict):
    """Call module.function(**arguments) (CPU tensors) and record every call of the jit function `module`.helper.

    function: a name in `module`, or "other.module:name" where another file launches this one's kernels.

    Returns (what the function returned, list of Step in the order of execution: the interpreter runs one program
    after the other). Where kernels are compiled, this runs in a process of its own in which they are interpreted.
    Example: watch("kernels.flash_decoding", "attend_tile", "flash_decoding", dict(q=q, k=k, v=v, kv_lens=kv_lens)).
    """
    if interpreted():
        return _watch(module, helper, function, arguments)
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # inherited by the new process
    try:
        context = mp.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=_child, args=(queue, module, helper, function, arguments))
        process.start()
        while True:
            try:
                result = pickle.loads(queue.get(timeout=1))
                break
            except Empty:
                if not process.is_alive():
                    raise RuntimeError(f"the process that interprets {function} ended: {process.exitcode}") from None
        process.join()
        return result
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
