"""Three small kernels to begin with: a line of numbers, a sum over a row, a matrix times a vector.

Each is a step from PyTorch towards the kernels of the chapters: a grid of programs and masks, then a loop over tiles,
then tiles of two dimensions that are fetched ahead.
"""

import numbers

import torch
import triton
import triton.language as tl

from kernels._tile import cast
from labkit import args


@triton.jit
def own_elements(n, BLOCK: tl.constexpr):
    """The numbers [BLOCK] of this program's elements, and whether there are such elements of n."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offs, offs < n


@triton.jit
def _axpy_kernel(a, x_ptr, stride_x, y_ptr, stride_y, out_ptr, n, BLOCK: tl.constexpr):
    offs, mask = own_elements(n, BLOCK)
    x = tl.load(x_ptr + offs * stride_x, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offs * stride_y, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, cast(a * x + y, out_ptr.dtype.element_ty), mask=mask)


def axpy(a, x, y, *, block=2048):
    """a * x + y, computed in fp32: a a number; x, y [n], any strides; fp16, bf16 or fp32.

    block: elements per program, a power of two; the result does not depend on it.
    Returns [n] in x.dtype. Raises ValueError naming the argument.
    """
    args.expect(isinstance(a, numbers.Real), "a", type(a).__name__, "a number")
    args.tensor("x", x, ("n",), dtypes=args.FLOATS)
    args.tensor("y", y, tuple(x.shape), like=x, dtype=x.dtype)
    ok = isinstance(block, int) and 1 <= block <= 2**16 and block & (block - 1) == 0
    args.expect(ok, "block", block, "a power of two up to 65536")
    n = len(x)
    out = torch.empty(n, dtype=x.dtype, device=x.device)
    if n:
        grid = (triton.cdiv(n, block),)
        _axpy_kernel[grid](float(a), x, x.stride(0), y, y.stride(0), out, n, BLOCK=block)
    return out


@triton.jit
def _row_sum_kernel(x_ptr, stride_m, stride_n, out_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_m
    acc = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols.to(tl.int64) * stride_n, mask=cols < n, other=0.0)
        acc += x.to(tl.float32)
    total = tl.sum(acc, 0)  # the threads meet once, after the loop
    tl.store(out_ptr + row, cast(total, out_ptr.dtype.element_ty))


def row_sum(x):
    """The sum of each row, added up in fp32: x [rows, n], any strides; fp16, bf16 or fp32.

    Returns [rows] in x.dtype; 0 where n is 0. Raises ValueError naming the argument.
    """
    args.tensor("x", x, ("rows", "n"), dtypes=args.FLOATS)
    rows, n = x.shape
    out = torch.empty(rows, dtype=x.dtype, device=x.device)
    if rows:
        block = min(2048, triton.next_power_of_2(max(1, n)))
        _row_sum_kernel[(rows,)](x, *x.stride(), out, n, BLOCK=block)
    return out


@triton.jit
def _matvec_kernel(
    x_ptr, stride_xk,  # [K]
    w_ptr, stride_wn, stride_wk,  # [N, K]
    y_ptr,  # [N] out
    n, k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows, mask_n = own_elements(n, BLOCK_N)
    w_ptr += rows[:, None] * stride_wn
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in tl.range(0, k, BLOCK_K, num_stages=STAGES):  # STAGES - 1 tiles are on their way
        cols = first + tl.arange(0, BLOCK_K)
        mask_k = cols < k
        cols = cols.to(tl.int64)
        mask = mask_n[:, None] & mask_k[None, :]
        x = tl.load(x_ptr + cols * stride_xk, mask=mask_k, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + cols[None, :] * stride_wk, mask=mask, other=0.0).to(tl.float32)
        acc += x[None, :] * w
    tl.store(y_ptr + rows, cast(tl.sum(acc, 1), y_ptr.dtype.element_ty), mask=mask_n)


def matvec_config(dtype: torch.dtype, k: int) -> dict:
    """Tile sizes and launch options: four rows of w, 2048 bytes of each."""
    block_k = min(2048 // dtype.itemsize, max(32, triton.next_power_of_2(k)))
    return dict(BLOCK_N=4, BLOCK_K=block_k, STAGES=4, num_warps=4)


def matvec(x, w):
    """y = w x, multiplied and added in fp32: x [K], w [N, K], any strides; fp16, bf16 or fp32.

    Returns y [N] in x.dtype; 0 where K is 0. Raises ValueError naming the argument.
    """
    args.tensor("x", x, ("k",), dtypes=args.FLOATS)
    args.tensor("w", w, ("n", len(x)), like=x, dtype=x.dtype)
    n, k = w.shape
    y = torch.empty(n, dtype=x.dtype, device=x.device)
    if n:
        config = matvec_config(x.dtype, k)
        grid = (triton.cdiv(n, config["BLOCK_N"]),)
        _matvec_kernel[grid](x, x.stride(0), w, *w.stride(), y, n, k, **config)
    return y
