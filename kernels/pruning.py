"""Pruning on a GPU: the product with 2:4 weights that are stored compressed, and Wanda's mask in one pass.

`matmul_24` reads values and two-bit indices, 0.5625 of the dense bytes in bf16, and expands them in registers. In
decoding memory is the limit, so this pays without sparse matrix units, as long as the expansion costs little: a few
instructions a byte are all that a GPU has time for.

`wanda_mask` reads the weights once, scores them, and selects n of m, or the largest of each row.

A model pruned in width (`labkit.llm_pruner`) needs no kernel of its own: its weights are dense, `gemv` and `flat_gemm`
multiply them.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import INTERPRETED
from kernels._tile import cast, cdiv, dot, next_power_of_2
from kernels.flash_decoding_pp import cut_k, flat_gemm, gemv, launch_tiles, store_share
from labkit import args

__all__ = ["flat_gemm", "gemv", "matmul_24", "wanda_mask"]

# ---- 2:4


@triton.jit
def spread(bits, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """bits [ROWS, 4 * GROUPS / WIDTH], WIDTH bits in a word -> [ROWS, GROUPS], the four bits of each group lowest."""
    if WIDTH == 32:
        bits = tl.join(bits, bits >> 16)
    bits = tl.join(bits, bits >> 8)
    return tl.reshape(tl.join(bits, bits >> 4), [ROWS, GROUPS])


@triton.jit
def halves(words, dtype: tl.constexpr):
    """Both values of every word, the one in the lower half first."""
    half: tl.constexpr = tl.uint16 if dtype.primitive_bitwidth == 16 else tl.uint32
    upper = words >> dtype.primitive_bitwidth
    return words.to(half).to(dtype, bitcast=True), upper.to(half).to(dtype, bitcast=True)


@triton.jit
def columns(x, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """x [ROWS, 4 * GROUPS] -> the four columns of every group, each [ROWS, GROUPS]."""
    even, odd = tl.split(tl.reshape(x, [ROWS, GROUPS, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def expand(words, meta, dtype: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The four dense columns of every group, each [ROWS, GROUPS]. Only moves bits: nothing is rounded.

    words [ROWS, GROUPS]: both kept values of a group, the first in the lower half; meta: their indices i and j, as many
    bits in a word as a value has.

    The first stands i places from its end of the group, the second 3 - j from the other. At 0 a value stays in its half
    of `outer`, columns 0 and 3. At 1 or 2 it goes to `inner`, columns 1 and 2: at 1 to its half, at 2 to the other.
    """
    HALF: tl.constexpr = dtype.primitive_bitwidth
    EACH: tl.constexpr = ((1 << HALF) - 1) // 15  # a one for every group, four bits apart
    far = meta.to(words.dtype) ^ (12 * EACH)  # i, and 3 - j for j, of all groups of a word at once
    leaves, turns = (far | (far >> 1)) & (5 * EACH), (far | (far >> 2)) & (2 * EACH)
    bits = leaves | turns  # the first leaves, one of them turns, the second leaves
    bits = spread(bits | (bits << (HALF - 2)), ROWS, GROUPS, HALF)  # "the second leaves" also at bit HALF
    inner = words & ((bits & (1 | (1 << HALF))) * ((1 << HALF) - 1))  # a bit becomes the mask of its half
    outer = words ^ inner
    turn = (bits & 2) * (HALF // 2)
    inner = (inner << turn) | (inner >> ((2 * HALF - turn) & (2 * HALF - 1)))  # rotated by 0 or HALF
    w0, w3 = halves(outer, dtype)
    w1, w2 = halves(inner, dtype)
    return w0, w1, w2, w3


@triton.jit
def operand(c0, c1, c2, c3, ROWS: tl.constexpr, GROUPS: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """The four columns of every group as one tile [ROWS, 4 * GROUPS], in the order that moves least.

    A sum over K has no order, if both sides agree. In the matrix unit four threads share a row and take NEIGHBOURS
    columns each in turn. Laid out like this each thread gets a quarter of the groups, whole: it loads their words,
    expands them and multiplies what it has, and no weight passes through shared memory again.
    """
    pairs = tl.join(tl.join(c0, c1), tl.join(c3, c2))  # [ROWS, GROUPS, 2, 2]: (0, 3) is outer, (1, 2) inner
    pairs = tl.permute(tl.reshape(pairs, [ROWS, 4, GROUPS // NEIGHBOURS, NEIGHBOURS]), (0, 2, 1, 3))
    return tl.reshape(pairs, [ROWS, 4 * GROUPS])


@triton.jit
def load_words(
    words_ptr, meta_ptr, mask_n, block, k,
    GROUPS: tl.constexpr, PER_WORD: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """words [ROWS, GROUPS] and meta [ROWS, GROUPS / PER_WORD] of one block of K; the pointers are those of the rows."""
    cols_w = block * GROUPS + tl.arange(0, GROUPS)
    cols_b = block * (GROUPS // PER_WORD) + tl.arange(0, GROUPS // PER_WORD)
    mask_w = mask_n if EVEN_K else mask_n & (cols_w < k // 4)[None, :]
    mask_b = mask_n if EVEN_K else mask_n & (cols_b < tl.cdiv(k, 4 * PER_WORD))[None, :]
    words = tl.load(words_ptr + cols_w[None, :], mask=mask_w, other=0)
    return words, tl.load(meta_ptr + cols_b[None, :], mask=mask_b, other=0)


@triton.jit
def _gemv_24_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K]
    words_ptr, stride_wn,  # [N, K/4], two values a word
    meta_ptr, stride_bn,  # [N, K/4/PER_WORD]
    y_ptr, stride_ym, stride_yn,  # [M, N] out
    n, k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PER_WORD: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one token, without the matrix unit: every kept weight picks its one of three inputs."""
    GROUPS: tl.constexpr = BLOCK_K // 4
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = (offs_n < n)[:, None]
    x_ptr += tl.program_id(1).to(tl.int64) * stride_xm
    words_ptr += offs_n[:, None] * stride_wn
    meta_ptr += offs_n[:, None] * stride_bn
    acc = tl.zeros([BLOCK_N, GROUPS], tl.float32)
    for block in tl.range(0, tl.cdiv(k, BLOCK_K), num_stages=STAGES):
        words, meta = load_words(words_ptr, meta_ptr, mask_n, block, k, GROUPS, PER_WORD, EVEN_K)
        cols_k = block * BLOCK_K + offs_k
        x = tl.load(x_ptr + cols_k.to(tl.int64) * stride_xk, mask=cols_k < k, other=0.0)
        x0, x1, x2, x3 = columns(x.to(tl.float32)[None, :], 1, GROUPS)
        first, second = halves(words, x.dtype)
        index = spread(meta.to(tl.uint32), BLOCK_N, GROUPS, 4 * PER_WORD)  # i in its lowest two bits, then j
        acc += first.to(tl.float32) * tl.where((index & 1) != 0, x1, tl.where((index & 2) != 0, x2, x0))
        acc += second.to(tl.float32) * tl.where((index & 8) == 0, x1, tl.where((index & 4) == 0, x2, x3))
    y_ptrs = y_ptr + tl.program_id(1).to(tl.int64) * stride_ym + offs_n * stride_yn
    tl.store(y_ptrs, cast(tl.sum(acc, 1), y_ptr.dtype.element_ty), mask=offs_n < n)


@triton.jit
def _matmul_24_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K]
    words_ptr, stride_wn,  # [N, K/4], two values a word
    meta_ptr, stride_bn,  # [N, K/4/PER_WORD]
    y_ptr, stride_ym, stride_yn,  # [M, N] out
    part_ptr, stride_pp, stride_pn,  # [programs, BLOCK_N, BLOCK_M] fp32, scratch if SPLIT_K > 1
    arrived_ptr,  # [tiles] int32, zero before and after
    m, n, k, k_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    NEIGHBOURS: tl.constexpr, PER_WORD: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One tile of y^T = w x^T: chapter 02's flat GEMM, with w expanded on its way to the matrix unit."""
    GROUPS: tl.constexpr = BLOCK_K // 4
    pid_k = tl.program_id(0)
    tile = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_m = (offs_n < n)[:, None], (offs_m < m)[:, None]
    x_ptr += offs_m[:, None] * stride_xm
    words_ptr += offs_n[:, None] * stride_wn
    meta_ptr += offs_n[:, None] * stride_bn
    start = pid_k * (k_per_split // BLOCK_K)
    end = tl.minimum(start + k_per_split // BLOCK_K, tl.cdiv(k, BLOCK_K))
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(start, end):
        words, meta = load_words(words_ptr, meta_ptr, mask_n, block, k, GROUPS, PER_WORD, EVEN_K)
        cols_k = block * BLOCK_K + offs_k
        mask_x = mask_m if EVEN_K else mask_m & (cols_k < k)[None, :]
        x = tl.load(x_ptr + cols_k.to(tl.int64)[None, :] * stride_xk, mask=mask_x, other=0.0)
        w0, w1, w2, w3 = expand(words, meta, x.dtype, BLOCK_N, GROUPS)
        x0, x1, x2, x3 = columns(x, BLOCK_M, GROUPS)
        w = operand(w0, w1, w2, w3, BLOCK_N, GROUPS, NEIGHBOURS)
        acc += dot(w, tl.trans(operand(x0, x1, x2, x3, BLOCK_M, GROUPS, NEIGHBOURS)))
    y_ptrs = y_ptr + offs_m[None, :] * stride_ym + offs_n[:, None] * stride_yn
    mask_y = mask_n & (offs_m < m)[None, :]
    part_ptr += tile.to(tl.int64) * SPLIT_K * stride_pp
    store_share(
        acc, y_ptrs, mask_y, part_ptr, stride_pp, stride_pn, arrived_ptr + tile, pid_k, BLOCK_M, BLOCK_N, SPLIT_K
    )


def config_24(dtype: torch.dtype, m: int, n: int, k: int) -> dict:
    """Tile sizes, launch options and how often K is cut, for x [m, k] and a compressed w [n, k]."""
    block_m = min(64, max(16, next_power_of_2(m)))
    # 64 rows of w are one wgmma. From fp32 Triton would make TF32 of them on a B200, whatever the precision asked for.
    block_n, block_k = 32 if dtype == torch.float32 else 64, 128
    tiles = cdiv(n, block_n) * cdiv(m, block_m)
    split_k = cut_k(tiles, cdiv(k, block_k), 4 if block_m < 64 else 3)
    return dict(
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, SPLIT_K=split_k, NEIGHBOURS=_neighbours(),
        num_warps=4, num_stages=3,
    )  # fmt: skip


def _neighbours() -> int:
    """Columns that a thread takes in turn: 2 in Hopper's wgmma, 4 where Triton lays out what was computed otherwise."""
    if INTERPRETED:
        return 2
    target = triton.runtime.driver.active.get_current_target()
    return 2 if target.backend == "cuda" and target.arch == 90 else 4


def as_words(t, dtype):
    """t [rows, columns] with neighbours taken as one of a wider dtype: a view, or a padded copy where none can be."""
    count = dtype.itemsize // t.element_size()
    places = t.storage_offset(), t.stride(0), t.shape[1], t.data_ptr() // t.element_size()
    if t.stride(1) != 1 or any(place % count for place in places):
        t = F.pad(t, (0, -t.shape[1] % count)).contiguous()
    return t.view(dtype)


def matmul_24(x, values, meta):
    """y = x w^T with a 2:4 sparse w compressed by `labkit.pruning.pack_24`: x [M, K], values [N, K/2] in x's dtype,
    meta [N, K/8] uint8, any strides; fp16, bf16 or fp32; K a multiple of 8.

    On the matrix unit, tokens padded to 16; one token in fp32 goes without. values and meta are read as words: they are
    copied where their rows are not contiguous, and meta where K is no multiple of 16 (fp32: 32).

    Returns y [M, N] in x.dtype. Raises ValueError naming the argument.
    Source of the format: Mishra et al. 2021, section 3.
    """
    m, n, k = args.sparse_24(x, values, meta)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0 or k == 0:
        return y.zero_()
    single, double = (torch.uint16, torch.uint32) if x.element_size() == 2 else (torch.uint32, torch.uint64)
    words, meta = as_words(values, double), as_words(meta, single)
    inputs = (x, *x.stride(), words, words.stride(0), meta, meta.stride(0))
    per_word = 2 * x.element_size()  # groups in a word of meta
    if m == 1 and x.dtype == torch.float32:
        block_k = min(1024, max(32, next_power_of_2(k)))
        _gemv_24_kernel[(cdiv(n, 4), m)](
            *inputs, y, *y.stride(), n, k,
            BLOCK_N=4, BLOCK_K=block_k, PER_WORD=per_word, EVEN_K=k % block_k == 0, STAGES=3, num_warps=4,
        )  # fmt: skip
        return y
    config = config_24(x.dtype, m, n, k)
    launch_tiles(_matmul_24_kernel, inputs, y, k, config, PER_WORD=per_word, EVEN_K=k % config["BLOCK_K"] == 0)
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
        block_k = max(16, next_power_of_2(k))
        num_warps = min(32, max(4, block_k // 512))
        _row_mask_kernel[(rows,)](*inputs, k, int(k * sparsity), BLOCK_K=block_k, num_warps=num_warps)
        return keep
    args.expect(m <= MAX_M, "m", m, f"at most {MAX_M}")
    block_m = next_power_of_2(m)
    groups, block_n = 256 // block_m, min(8, 64 // block_m)  # 128 comparisons a thread at most: more would spill
    _nm_mask_kernel[(cdiv(rows, block_n), cdiv(k // m, groups))](
        *inputs, rows, k // m, m - n, M=m, BLOCK_M=block_m, BLOCK_N=block_n, GROUPS=groups, num_warps=4,
    )  # fmt: skip
    return keep
