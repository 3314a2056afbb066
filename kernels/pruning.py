"""Pruning on a GPU: the product with 2:4 weights that are stored compressed, and Wanda's mask in one pass.

`matmul_24` reads values and two-bit indices, 0.5625 of the dense bytes in bf16, and expands them in registers. In
decoding memory is the limit, so this pays without sparse matrix units: `_gemv_24_kernel` picks x for every kept weight,
`_matmul_24_kernel` builds the dense tile and multiplies it on the matrix unit.

`wanda_mask` reads the weights once, scores them, and selects n of m, or the largest of each row.

A model pruned in width (`labkit.llm_pruner`) needs no kernel of its own: its weights are dense, `gemv` and `flat_gemm`
multiply them.
"""

import torch
import triton
import triton.language as tl

from kernels._tile import cast, dot
from kernels.flash_decoding_pp import cut_k, flat_gemm, gemv, launch_tiles, store_share
from labkit import args

__all__ = ["flat_gemm", "gemv", "matmul_24", "wanda_mask"]

# ---- 2:4


@triton.jit
def pick(x0, x1, x2, x3, index):
    """The one of four tiles that index (0..3) names, element by element."""
    low = (index & 1) == 0
    return tl.where((index & 2) == 0, tl.where(low, x0, x1), tl.where(low, x2, x3))


@triton.jit
def group_indices(meta, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """Both indices of every group, two [BLOCK_N, GROUPS], from meta [BLOCK_N, GROUPS / 2]: two groups a byte."""
    four_bits = tl.reshape(tl.join(meta & 15, meta >> 4), [BLOCK_N, GROUPS])
    return four_bits & 3, four_bits >> 2


@triton.jit
def expand(values, meta, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """The dense tile [BLOCK_N, 4 * GROUPS] of values [BLOCK_N, 2 * GROUPS] and meta [BLOCK_N, GROUPS / 2].

    Only moves bits: nothing is rounded.
    """
    first, second = tl.split(tl.reshape(values, [BLOCK_N, GROUPS, 2]))
    i, j = group_indices(meta, BLOCK_N, GROUPS)
    w0 = tl.where(i == 0, first, 0.0)  # the indices of a group rise: the second is never 0
    w1 = tl.where(i == 1, first, tl.where(j == 1, second, 0.0))
    w2 = tl.where(i == 2, first, tl.where(j == 2, second, 0.0))
    w3 = tl.where(j == 3, second, 0.0)  # nor the first 3
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK_N, 4 * GROUPS])


@triton.jit
def _gemv_24_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K]
    values_ptr, stride_vn, stride_vk,  # [N, K/2]
    meta_ptr, stride_bn, stride_bk,  # [N, K/8] uint8
    y_ptr, stride_ym, stride_yn,  # [M, N] out
    n, k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one token, multiplied and added in fp32 without the matrix unit."""
    GROUPS: tl.constexpr = BLOCK_K // 4
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tl.arange(0, 2 * GROUPS)
    offs_b = tl.arange(0, GROUPS // 2)
    mask_n = (offs_n < n)[:, None]
    x_ptr += tl.program_id(1).to(tl.int64) * stride_xm
    values_ptr += offs_n[:, None] * stride_vn
    meta_ptr += offs_n[:, None] * stride_bn
    acc = tl.zeros([BLOCK_N, GROUPS], tl.float32)
    for first in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        values = tl.load(
            values_ptr + (first // 2 + offs_v).to(tl.int64)[None, :] * stride_vk,
            mask=mask_n & (offs_v < (k - first) // 2)[None, :], other=0.0,
        )  # fmt: skip
        meta = tl.load(
            meta_ptr + (first // 8 + offs_b).to(tl.int64)[None, :] * stride_bk,
            mask=mask_n & (offs_b < (k - first) // 8)[None, :], other=0,
        )  # fmt: skip
        x = tl.load(x_ptr + (first + offs_k).to(tl.int64) * stride_xk, mask=offs_k < k - first, other=0.0)
        even, odd = tl.split(tl.reshape(x.to(tl.float32), [GROUPS, 2, 2]))  # columns 0 and 2, 1 and 3 of each group
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        a, b = tl.split(tl.reshape(values.to(tl.float32), [BLOCK_N, GROUPS, 2]))
        i, j = group_indices(meta, BLOCK_N, GROUPS)
        acc += a * pick(x0[None, :], x1[None, :], x2[None, :], x3[None, :], i)
        acc += b * pick(x0[None, :], x1[None, :], x2[None, :], x3[None, :], j)
    y_ptrs = y_ptr + tl.program_id(1).to(tl.int64) * stride_ym + offs_n * stride_yn
    tl.store(y_ptrs, cast(tl.sum(acc, 1), y_ptr.dtype.element_ty), mask=offs_n < n)


@triton.jit
def _matmul_24_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K]
    values_ptr, stride_vn, stride_vk,  # [N, K/2]
    meta_ptr, stride_bn, stride_bk,  # [N, K/8] uint8
    y_ptr, stride_ym, stride_yn,  # [M, N] out
    part_ptr, stride_pp, stride_pn,  # [programs, BLOCK_N, BLOCK_M] fp32, scratch if SPLIT_K > 1
    arrived_ptr,  # [tiles] int32, zero before and after
    m, n, k, k_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """One tile of y^T = w x^T: chapter 02's flat GEMM, with w expanded on its way to the matrix unit."""
    GROUPS: tl.constexpr = BLOCK_K // 4
    pid_k = tl.program_id(0)
    tile = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tl.arange(0, 2 * GROUPS)
    offs_b = tl.arange(0, GROUPS // 2)
    mask_n, mask_m = (offs_n < n)[:, None], (offs_m < m)[:, None]
    start = pid_k * k_per_split
    end = tl.minimum(start + k_per_split, k)
    x_ptr += offs_m[:, None] * stride_xm
    values_ptr += offs_n[:, None] * stride_vn
    meta_ptr += offs_n[:, None] * stride_bn
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(start, end, BLOCK_K):
        values = tl.load(
            values_ptr + (first // 2 + offs_v).to(tl.int64)[None, :] * stride_vk,
            mask=mask_n & (offs_v < (end - first) // 2)[None, :], other=0.0,
        )  # fmt: skip
        meta = tl.load(
            meta_ptr + (first // 8 + offs_b).to(tl.int64)[None, :] * stride_bk,
            mask=mask_n & (offs_b < (end - first) // 8)[None, :], other=0,
        )  # fmt: skip
        x = tl.load(
            x_ptr + (first + offs_k).to(tl.int64)[None, :] * stride_xk,
            mask=mask_m & (offs_k < end - first)[None, :], other=0.0,
        )  # fmt: skip
        acc += dot(expand(values, meta, BLOCK_N, GROUPS), tl.trans(x))
    y_ptrs = y_ptr + offs_m[None, :] * stride_ym + offs_n[:, None] * stride_yn
    mask_y = mask_n & (offs_m < m)[None, :]
    part_ptr += tile.to(tl.int64) * SPLIT_K * stride_pp
    store_share(
        acc, y_ptrs, mask_y, part_ptr, stride_pp, stride_pn, arrived_ptr + tile, pid_k, BLOCK_M, BLOCK_N, SPLIT_K
    )


def config_24(dtype: torch.dtype, m: int, n: int, k: int) -> dict:
    """Tile sizes, launch options and how often K is cut, for x [m, k] and a compressed w [n, k]; m > 1."""
    block_m = min(64, max(16, triton.next_power_of_2(m)))
    block_n, block_k = (32, 64) if dtype == torch.float32 else (64, 128)
    tiles = triton.cdiv(n, block_n) * triton.cdiv(m, block_m)
    split_k = cut_k(tiles, triton.cdiv(k, block_k))
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, SPLIT_K=split_k, num_warps=4, num_stages=3)


def matmul_24(x, values, meta):
    """y = x w^T with a 2:4 sparse w compressed by `labkit.pruning.pack_24`: x [M, K], values [N, K/2] in x's dtype,
    meta [N, K/8] uint8, any strides; fp16, bf16 or fp32; K a multiple of 8.

    One token goes without the matrix unit, more go with it, padded to 16. Returns y [M, N] in x.dtype.
    Raises ValueError naming the argument. Source of the format: Mishra et al. 2021, section 3.
    """
    m, n, k = args.sparse_24(x, values, meta)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    inputs = (x, *x.stride(), values, *values.stride(), meta, *meta.stride())
    if m == 1:
        block_k = min(4096 // x.element_size(), max(16, triton.next_power_of_2(k)))
        _gemv_24_kernel[(triton.cdiv(n, 4), m)](
            *inputs, y, *y.stride(), n, k, BLOCK_N=4, BLOCK_K=block_k, STAGES=3, num_warps=4,
        )  # fmt: skip
        return y
    launch_tiles(_matmul_24_kernel, inputs, y, k, config_24(x.dtype, m, n, k))
    return y


# ---- Wanda


@triton.jit
def _nm_mask_kernel(
    w_ptr, stride_wn, stride_wk, x_norm_ptr, stride_xk, keep_ptr, stride_kn, stride_kk,  # [N, K], [K], [N, K] out
    num_rows, num_groups, removed,
    M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Keep all but the `removed` least of every M neighbours, in one tile of rows and groups."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, GROUPS * BLOCK_M)
    first = tl.program_id(1).to(tl.int64) * GROUPS
    if M == BLOCK_M:  # columns follow each other: said so, they are loaded 16 bytes at a time
        offs_k = first * M + offs_c
        mask_k = offs_k < num_groups * M
    else:
        offs_k = (first + offs_c // BLOCK_M) * M + offs_c % BLOCK_M
        mask_k = (first + offs_c // BLOCK_M < num_groups) & (offs_c % BLOCK_M < M)
    mask = (offs_n < num_rows)[:, None] & mask_k[None, :]
    w = tl.load(w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk, mask=mask, other=0.0)
    x_norm = tl.load(x_norm_ptr + offs_k * stride_xk, mask=mask_k, other=0.0)
    score = tl.abs(w.to(tl.float32)) * x_norm.to(tl.float32)[None, :]
    score = tl.where(mask_k[None, :], score, float("inf"))  # beyond M: behind all others
    score = tl.reshape(score, [BLOCK_N, GROUPS, BLOCK_M])
    mine, other = score[:, :, :, None], score[:, :, None, :]
    i, j = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_M)[None, :]
    before = (other < mine) | ((other == mine) & (j < i)[None, None, :, :])
    rank = tl.sum(before.to(tl.int32), 3)  # how many of the group go first
    keep = tl.reshape(rank >= removed, [BLOCK_N, GROUPS * BLOCK_M])
    tl.store(keep_ptr + offs_n[:, None] * stride_kn + offs_k[None, :] * stride_kk, keep, mask=mask)


@triton.jit
def _row_mask_kernel(
    w_ptr, stride_wn, stride_wk, x_norm_ptr, stride_xk, keep_ptr, stride_kn, stride_kk,  # [N, K], [K], [N, K] out
    k, removed,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Keep all but the `removed` least of a row, which stays in registers.

    No sort: the bits of non-negative floats rise with them, so the least bound that `removed` scores do not exceed is
    found one bit at a time, from the top.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < k
    w = tl.load(w_ptr + row * stride_wn + offs_k.to(tl.int64) * stride_wk, mask=mask, other=0.0)
    x_norm = tl.load(x_norm_ptr + offs_k.to(tl.int64) * stride_xk, mask=mask, other=0.0)
    bits = (tl.abs(w.to(tl.float32)) * x_norm.to(tl.float32)).to(tl.int32, bitcast=True)
    bits = tl.where(mask, bits, 0x7FFFFFFF)  # behind all others
    bound = 0  # the largest number that at most `removed` scores are less than
    for b in range(31):
        higher = bound | (1 << (30 - b))
        bound = tl.where(tl.sum((bits < higher).to(tl.int32), 0) <= removed, higher, bound)
    ties_removed = removed - tl.sum((bits < bound).to(tl.int32), 0)
    cut = 0  # the same for the columns of those that equal it: which of them go
    for b in range(17):
        higher = cut | (1 << (16 - b))
        cut = tl.where(tl.sum(((bits == bound) & (offs_k < higher)).to(tl.int32), 0) <= ties_removed, higher, cut)
    keep = (bits > bound) | ((bits == bound) & (offs_k >= cut))
    tl.store(keep_ptr + row * stride_kn + offs_k.to(tl.int64) * stride_kk, keep, mask=mask)


MAX_COLUMNS = 65536  # of the row selection: a row in the registers of one program
MAX_M = 32  # of n of m: every weight is compared with all of its group at once


def wanda_mask(w, x_norm, *, sparsity=None, n=None, m=None):
    """Which weights stay by |w| * x_norm: w [N, K], x_norm [K], any strides; fp16, bf16 or fp32.

    sparsity: exactly floor(K * sparsity) of each row go; K up to 65,536, but above 16,384 the row does not fit into
    registers on every GPU and spills. Or n of m neighbours are kept, m up to 32. Of equal scores the one at the lower
    index goes.

    Returns [N, K] bool, True where kept. Raises ValueError naming the argument.
    Source: Sun et al. 2024, Wanda, section 3.
    """
    rows, k = args.wanda(w, x_norm, sparsity, n, m)
    keep = torch.empty(rows, k, dtype=torch.bool, device=w.device)
    if keep.numel() == 0:
        return keep
    inputs = (w, *w.stride(), x_norm, *x_norm.stride(), keep, *keep.stride())
    if sparsity is not None:
        args.expect(k <= MAX_COLUMNS, "w (columns)", k, f"at most {MAX_COLUMNS} with sparsity")
        block_k = max(16, triton.next_power_of_2(k))
        num_warps = min(32, max(4, block_k // 512))
        _row_mask_kernel[(rows,)](*inputs, k, int(k * sparsity), BLOCK_K=block_k, num_warps=num_warps)
        return keep
    args.expect(m <= MAX_M, "m", m, f"at most {MAX_M}")
    block_m = triton.next_power_of_2(m)
    groups = max(1, 256 // block_m)
    _nm_mask_kernel[(triton.cdiv(rows, 8), triton.cdiv(k // m, groups))](
        *inputs, rows, k // m, m - n, M=m, BLOCK_M=block_m, BLOCK_N=8, GROUPS=groups, num_warps=4,
    )  # fmt: skip
    return keep
