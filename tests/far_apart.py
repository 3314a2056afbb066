"""Shared by the kernels' tests: strides with which an index times a stride needs more than 32 bits."""

import fcntl
import mmap
import os
import tempfile
from pathlib import Path

import pytest
import torch

REACH = 2**31  # elements: the first offset that 32 bits do not hold
_turn = []  # on a GPU: the file whose lock is this process's turn


def far_apart(x, dim):
    """The values of x [..., n, ...], n > 2, with such a stride in `dim` that half of the rows lie beyond 2^31 elements.

    Every stride fits into 32 bits. An offset that wraps around points into the memory before, which is zero. Without a
    GPU only the pages that are touched take memory.
    """
    x = x.movedim(dim, 0)
    n, row = x.shape[0], x[0].numel()
    stride = 2 * REACH // (n - 1) // 16 * 16 + 16
    size = (REACH + (n - 1) * stride + row) * x.element_size()
    if x.is_cuda:
        if not _turn:
            _turn.append(open(Path(tempfile.gettempdir(), f"far_apart-{os.getuid()}.lock"), "w"))
        fcntl.flock(_turn[0], fcntl.LOCK_EX)  # tests beside it wait: there is memory for one
        if size > torch.cuda.mem_get_info()[0]:
            pytest.skip(f"needs {size / 1e9:.0f} GB of GPU memory")
        memory = torch.zeros(size, dtype=torch.uint8, device=x.device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
        memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)
    strides = (stride, *x[0].contiguous().stride())
    return memory.view(x.dtype).as_strided(x.shape, strides, REACH).copy_(x).movedim(0, dim)


def end_turn():
    """After a test: give its memory back, let the next one begin."""
    if _turn:
        torch.cuda.empty_cache()
        fcntl.flock(_turn[0], fcntl.LOCK_UN)
