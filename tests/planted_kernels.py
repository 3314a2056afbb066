"""Kernels with one planted fault each, for the codegen gate to find; `sound` has none."""

import kernels  # noqa: F401, I001  sets the interpreter switch before Triton is imported
import torch
import triton
import triton.language as tl


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, o_ptr, stride_k, num_keys,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    """o [M, D] = sum over tiles of (q @ k^T) @ k; q [M, D], k [num_keys, D]."""
    offs_m, offs_n, offs_d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    q = tl.load(q_ptr + offs_m[:, None] * D + offs_d[None, :])
    acc = tl.zeros([M, D], tl.float32)
    for start in range(0, num_keys, N):
        k = tl.load(k_ptr + (start + offs_n[:, None]) * D + offs_d[None, :] * stride_k)
        if FAULT == "no dot":
            s = tl.sum(q[:, None, :].to(tl.float32) * k[None, :, :].to(tl.float32), 2)
            acc += tl.sum(s[:, :, None] * k[None, :, :].to(tl.float32), 1)
        else:
            s = tl.dot(q, tl.trans(k), input_precision="tf32" if FAULT == "tf32" else "ieee")
            acc = tl.dot(s.to(k.dtype), k, acc, input_precision="tf32" if FAULT == "tf32" else "ieee")
    tl.store(o_ptr + offs_m[:, None] * D + offs_d[None, :], acc)


def _launch(q, k, block_n=32, num_warps=4, num_stages=2, fault="", **options):
    o = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    _scores_kernel[(1,)](
        q, k, o, k.stride(1), k.shape[0], M=q.shape[0], N=block_n, D=q.shape[1], FAULT=fault,
        num_warps=num_warps, num_stages=num_stages, **options,
    )  # fmt: skip
    return o


def sound(q, k):
    return _launch(q, k)


def spills(q, k):
    return _launch(q, k, num_warps=1)


def too_much_shared_memory(q, k):
    """Two tiles of 128 keys in flight and the scores: more than the 64 KB of an AMD GPU."""
    return _launch(q, k, block_n=128, num_warps=8, num_stages=3)


def scalar_loads(q, k):
    return _launch(q, k.t().contiguous().t())


def no_dot(q, k):
    return _launch(q[:2], k, block_n=16, num_stages=1, fault="no dot")


def tf32(q, k):
    return _launch(q, k, num_stages=1, fault="tf32")


def no_wgmma(q, k):
    """64 rows but two warps, fewer than the four that a warp group has."""
    return _launch(q, k, num_warps=2)


def serialised(q, k):
    """Too few registers for the accumulators of matrix instructions that are still under way."""
    return _launch(q, k, maxnreg=96)


def launches_nothing(q, k):
    return q


def raises(q, k):
    raise ValueError("q: planted")
