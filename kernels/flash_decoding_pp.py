"""FlashDecoding++: attention with one maximum for all, and matrix products with few rows.

`unified_decoding` is the twin of `flash_decoding`: the same split over the keys, but exp(x - phi) with a constant phi
instead of a running maximum. Its loop has no reduction and no rescaling; partial results add. A split whose scores
leave the bounds is walked again with the synchronised softmax, so the result is exact for every input.

`gemv` and `flat_gemm` compute y = x w^T for a few tokens. Every weight is read once and used for M of them, so memory
is the limit: `gemv` leaves the matrix unit out, `flat_gemm` uses it with as little padding as it allows.
"""

import torch
import triton
import triton.language as tl

from kernels import INTERPRETED
from kernels._tile import (
    LOG2E,
    cast,
    cdiv,
    device_properties,
    dot,
    next_power_of_2,
    positive_scale,
    splits_or_default,
)
from kernels.flash_decoding import arrival_counters, attend_split, merge_config, split_config, tiles_per_group
from labkit import args


@triton.jit
def _unified_tile(
    q, k, v, valid, l, acc, low, high, sm_scale, phi, P_FP32: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Add one tile of keys. Twin of `_tile.attend_tile`: nothing is reduced over the keys before the loop has ended.

    q [M, D]; k, v [N, D]; valid [1, N] (read only if MASKED); l, low, high [M, N]: one sum, smallest and largest
    x - phi for every column of the tile; acc [M, D].
    """
    e = dot(q, tl.trans(k)) * sm_scale - phi
    if MASKED:
        low = tl.minimum(low, tl.where(valid, e, float("inf")))
        e = tl.where(valid, e, float("-inf"))
    else:
        low = tl.minimum(low, e)
    high = tl.maximum(high, e)
    p = tl.exp2(e * LOG2E)
    if P_FP32:  # the bounds allow a p that fp16 cannot hold
        v = v.to(tl.float32)
    p = cast(p, v.dtype)
    acc += dot(p, v)
    return l + p.to(tl.float32), acc, low, high  # the rounded p on both sides: a single key gives v exactly


@triton.jit
def _unified_walk(
    q_ptr, stride_qb, stride_qh, stride_qd,  # [B, Hq, D]
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,  # [B, L, Hkv, D]
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,  # [B, L, Hkv, D]
    kv_lens_ptr, max_kv_len,  # [B]
    pid_b, pid_h, pid_s, num_splits, group, sm_scale, phi,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    P_FP32: tl.constexpr,
):  # fmt: skip
    """One tile of heads over one split: numerator [BLOCK_H, BLOCK_D]; denominator, least and largest x - phi [BLOCK_H].

    Twin of `flash_decoding.attend_split`; q, the cut into splits and the two kinds of tiles are the same.
    """
    offs_h = tl.arange(0, BLOCK_H)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < HEAD_DIM
    mask_q = (offs_h[:, None] < group) & mask_d[None, :]
    q_ptrs = q_ptr + pid_b * stride_qb + (pid_h * group + offs_h[:, None]) * stride_qh + offs_d[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=mask_q, other=0.0)

    kv_len = tl.minimum(tl.maximum(tl.load(kv_lens_ptr + pid_b), 0), max_kv_len)
    split_len = tl.cdiv(tl.cdiv(kv_len, BLOCK_N), num_splits) * BLOCK_N
    start = tl.minimum(pid_s * split_len, kv_len)
    end = tl.minimum(start + split_len, kv_len)
    full_end = start + (end - start) // BLOCK_N * BLOCK_N

    k_ptr += pid_b * stride_kb + pid_h // TILES * stride_kh
    v_ptr += pid_b * stride_vb + pid_h // TILES * stride_vh
    l = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    low = tl.full([BLOCK_H, BLOCK_N], float("inf"), tl.float32)
    high = tl.full([BLOCK_H, BLOCK_N], float("-inf"), tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for first in range(start, full_end, BLOCK_N):
        rows = (first + offs_n).to(tl.int64)[:, None]
        k_ptrs = k_ptr + rows * stride_kn + offs_d[None, :] * stride_kd
        v_ptrs = v_ptr + rows * stride_vn + offs_d[None, :] * stride_vd
        if BLOCK_D == HEAD_DIM:
            k, v = tl.load(k_ptrs), tl.load(v_ptrs)
        else:
            k = tl.load(k_ptrs, mask=mask_d[None, :], other=0.0)
            v = tl.load(v_ptrs, mask=mask_d[None, :], other=0.0)
        l, acc, low, high = _unified_tile(q, k, v, mask_q, l, acc, low, high, sm_scale, phi, P_FP32, False)
    for first in range(full_end, end, BLOCK_N):  # at most once
        rows = (first + offs_n).to(tl.int64)[:, None]
        mask_n = first + offs_n < end
        mask_kv = mask_n[:, None] & mask_d[None, :]
        k = tl.load(k_ptr + rows * stride_kn + offs_d[None, :] * stride_kd, mask=mask_kv, other=0.0)
        v = tl.load(v_ptr + rows * stride_vn + offs_d[None, :] * stride_vd, mask=mask_kv, other=0.0)
        l, acc, low, high = _unified_tile(q, k, v, mask_n[None, :], l, acc, low, high, sm_scale, phi, P_FP32, True)
    return acc, tl.sum(l, 1), tl.min(low, 1), tl.max(high, 1)


@triton.jit
def _store_part(
    num_ptr, stride_nb, stride_nh, stride_ns, stride_nd, den_ptr, base_ptr, stride_db, stride_dh, stride_ds,
    num, den, base, rows, pid_b, pid_h, pid_s, group,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, ONE_SPLIT: tl.constexpr,
):  # fmt: skip
    """Store the partial result of some rows [BLOCK_H] of a group; base may be one number for all of them."""
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    head = pid_h * group + tl.arange(0, BLOCK_H)
    if ONE_SPLIT:  # nothing to merge: num is the output
        num = num / tl.where(den == 0.0, 1.0, den)[:, None]
    else:
        at = pid_b * stride_db + head * stride_dh + pid_s * stride_ds
        tl.store(den_ptr + at, den, mask=rows)
        tl.store(base_ptr + at, base, mask=rows)
    num_ptrs = num_ptr + pid_b * stride_nb + head[:, None] * stride_nh + pid_s * stride_ns + offs_d[None, :] * stride_nd
    tl.store(num_ptrs, cast(num, num_ptr.dtype.element_ty), mask=rows[:, None] & (offs_d < HEAD_DIM)[None, :])


@triton.jit
def _unified_split_kernel(
    q_ptr, stride_qb, stride_qh, stride_qd,  # [B, Hq, D]
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,  # [B, L, Hkv, D]
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,  # [B, L, Hkv, D]
    kv_lens_ptr,  # [B]
    num_ptr, stride_nb, stride_nh, stride_ns, stride_nd,  # [B, Hq, S, D] out; the attention itself if ONE_SPLIT
    den_ptr, base_ptr, stride_db, stride_dh, stride_ds,  # two [B, Hq, S] out; not written if ONE_SPLIT
    tripped_ptr, stride_tb, stride_th, stride_ts,  # [B, Hq, S] out
    max_kv_len, num_splits, group, sm_scale, phi, bound_a, bound_b,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    P_FP32: tl.constexpr, SYNCHRONISED: tl.constexpr, ONE_SPLIT: tl.constexpr,
):  # fmt: skip
    """Partial results of one tile of heads and split: num and den are relative to exp(base). base is phi for all
    splits, or a split's own log-sum-exp where it was done again. SYNCHRONISED: all the second way, for comparison."""
    pid_s = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    mask_h = tl.arange(0, BLOCK_H) < group
    if SYNCHRONISED:
        again = mask_h
    else:
        num, den, low, high = _unified_walk(
            q_ptr, stride_qb, stride_qh, stride_qd, k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
            v_ptr, stride_vb, stride_vn, stride_vh, stride_vd, kv_lens_ptr, max_kv_len,
            pid_b, pid_h, pid_s, num_splits, group, sm_scale, phi, HEAD_DIM, BLOCK_D, BLOCK_H, BLOCK_N, TILES, P_FP32,
        )  # fmt: skip
        again = mask_h & ((low <= bound_a) | (high >= bound_b))
        _store_part(
            num_ptr, stride_nb, stride_nh, stride_ns, stride_nd, den_ptr, base_ptr, stride_db, stride_dh, stride_ds,
            num, den, phi, mask_h & ~again, pid_b, pid_h, pid_s, group, HEAD_DIM, BLOCK_D, BLOCK_H, ONE_SPLIT,
        )  # fmt: skip
    if SYNCHRONISED or tl.max(again.to(tl.int32), 0) > 0:
        o, lse = attend_split(
            q_ptr, stride_qb, stride_qh, stride_qd, k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
            v_ptr, stride_vb, stride_vn, stride_vh, stride_vd, kv_lens_ptr, max_kv_len,
            pid_b, pid_h, pid_s, num_splits, group, sm_scale * LOG2E, HEAD_DIM, BLOCK_D, BLOCK_H, BLOCK_N, TILES,
        )  # fmt: skip
        _store_part(
            num_ptr, stride_nb, stride_nh, stride_ns, stride_nd, den_ptr, base_ptr, stride_db, stride_dh, stride_ds,
            o, tl.where(lse == float("-inf"), 0.0, 1.0), lse, again,
            pid_b, pid_h, pid_s, group, HEAD_DIM, BLOCK_D, BLOCK_H, ONE_SPLIT,
        )  # fmt: skip
    if SYNCHRONISED:
        again = mask_h & False
    head = pid_h * group + tl.arange(0, BLOCK_H)
    tl.store(tripped_ptr + pid_b * stride_tb + head * stride_th + pid_s * stride_ts, again, mask=mask_h)


@triton.jit
def _sum_splits(
    num_ptr, stride_ns, stride_nd, den_ptr, base_ptr, stride_ds, tripped_ptr, stride_ts,  # [S, D], three [S]: one head
    num_splits, top,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """num [BLOCK_D], den of all splits, and whether one tripped. With one phi for all they simply add; WEIGHTED: by
    exp(base - top)."""
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    num = tl.zeros([BLOCK_D], tl.float32)
    den = 0.0
    tripped = 0
    for s in range(0, num_splits, BLOCK_S):
        mask_s = s + offs_s < num_splits
        flags = tl.load(tripped_ptr + (s + offs_s) * stride_ts, mask=mask_s, other=0)
        num_ptrs = num_ptr + (s + offs_s[:, None]) * stride_ns + offs_d[None, :] * stride_nd
        part = tl.load(num_ptrs, mask=mask_s[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        part_den = tl.load(den_ptr + (s + offs_s) * stride_ds, mask=mask_s, other=0.0)
        if WEIGHTED:
            base = tl.load(base_ptr + (s + offs_s) * stride_ds, mask=mask_s, other=float("-inf"))
            weight = tl.where(part_den == 0.0, 0.0, tl.exp2((base - top) * LOG2E))
            part, part_den = part * weight[:, None], part_den * weight
        num += tl.sum(part, 0)
        den += tl.sum(part_den, 0)
        tripped = tl.maximum(tripped, tl.max(flags.to(tl.int32), 0))
    return num, den, tripped


@triton.jit
def _unified_merge_kernel(
    num_ptr, stride_nb, stride_nh, stride_ns, stride_nd,  # [B, Hq, S, D] fp32
    den_ptr, base_ptr, stride_db, stride_dh, stride_ds,  # two [B, Hq, S] fp32
    tripped_ptr, stride_tb, stride_th, stride_ts,  # [B, Hq, S]
    o_ptr, stride_ob, stride_oh, stride_od,  # [B, Hq, D] out
    recomputed_ptr, stride_rb, stride_rh,  # [B, Hq] out
    num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SYNCHRONISED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    pid_b = tl.program_id(1).to(tl.int64)
    num_ptr += pid_b * stride_nb + head * stride_nh
    den_ptr += pid_b * stride_db + head * stride_dh
    base_ptr += pid_b * stride_db + head * stride_dh
    tripped_ptr += pid_b * stride_tb + head * stride_th
    offs_s = tl.arange(0, BLOCK_S)
    tripped = 0
    if not SYNCHRONISED:
        # Asked for beside the flags, not after them: one latency of memory, not two. A row that tripped reads again.
        num, den, tripped = _sum_splits(
            num_ptr, stride_ns, stride_nd, den_ptr, base_ptr, stride_ds, tripped_ptr, stride_ts, num_splits, 0.0,
            HEAD_DIM, BLOCK_D, BLOCK_S, False,
        )  # fmt: skip
    if SYNCHRONISED or tripped > 0:  # the splits have different bases
        top = float("-inf")
        for s in range(0, num_splits, BLOCK_S):
            mask_s = s + offs_s < num_splits
            part = tl.load(den_ptr + (s + offs_s) * stride_ds, mask=mask_s, other=0.0)
            base = tl.load(base_ptr + (s + offs_s) * stride_ds, mask=mask_s, other=float("-inf"))
            top = tl.maximum(top, tl.max(tl.where(part == 0.0, float("-inf"), base), 0))
        num, den, _ = _sum_splits(
            num_ptr, stride_ns, stride_nd, den_ptr, base_ptr, stride_ds, tripped_ptr, stride_ts, num_splits, top,
            HEAD_DIM, BLOCK_D, BLOCK_S, True,
        )  # fmt: skip
    o = num / tl.where(den == 0.0, 1.0, den)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    o_ptrs = o_ptr + pid_b * stride_ob + head * stride_oh + offs_d * stride_od
    tl.store(o_ptrs, cast(o, o_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
    tl.store(recomputed_ptr + pid_b * stride_rb + head * stride_rh, tripped > 0)


def unified_config(dtype: torch.dtype, head_dim: int, group: int) -> dict:
    """As `split_config`, but with the number of warps that spills no registers with two walks in one kernel."""
    config = split_config(dtype, head_dim, group)
    return config | {"num_warps": 8 if config["BLOCK_H"] * config["BLOCK_D"] > 32 * 128 else 4}


def unified_decoding(
    q, k, v, kv_lens, *, phi, bounds, num_splits=None, sm_scale=None, synchronised=False
):  # fmt: skip
    """Attention of one new token a sequence, every split with the same constant phi instead of its own maximum.

    q [B, Hq, D]; k, v [B, L, Hkv, D], any strides; fp16, bf16 or fp32; D up to 256; kv_lens [B] int32; sm_scale > 0;
    as `flash_decoding`. bounds = (a, b): a row that has a valid key with x - phi <= a or >= b, x = sm_scale * q.k in
    natural-log units, is computed again with the synchronised softmax where it left the bounds. So the result is exact
    for every input, whatever phi. Bounds wider than (-80, 60), the exponents fp32 can hold, are narrowed to that; in
    fp16, bounds wider than (-9, 11) cost a product in fp32.
    synchronised: the same kernel with the running maximum and no phi, to see what that costs; nothing is recomputed.

    Returns o [B, Hq, D] in q.dtype and recomputed [B, Hq] bool; a sequence without keys gives 0 and False.
    Raises ValueError naming the argument. Source: Hong et al. 2024, FlashDecoding++, section 3.
    """
    batch, num_q_heads, num_kv_heads, max_kv_len, head_dim = args.decode(q, k, v, kv_lens)
    args.num_splits(num_splits)
    bound_a, bound_b = args.unified(phi, bounds)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    recomputed = torch.empty(batch, num_q_heads, dtype=torch.bool, device=q.device)
    if batch == 0:
        return o, recomputed
    num_splits = splits_or_default(num_splits, batch * num_kv_heads, max_kv_len, head_dim)
    low, high = args.EXP_LIMITS[torch.float16]
    p_fp32 = q.dtype == torch.float16 and not synchronised and (bound_a < low or bound_b > high)
    group = num_q_heads // num_kv_heads
    dtype = torch.float32 if p_fp32 else q.dtype
    tiles = tiles_per_group(dtype, head_dim, group, most=32)
    group //= tiles
    config = unified_config(dtype, head_dim, group) | {"TILES": tiles}
    options = dict(HEAD_DIM=head_dim, P_FP32=p_fp32, SYNCHRONISED=synchronised, ONE_SPLIT=num_splits == 1)
    inputs = (q, *q.stride(), k, *k.stride(), v, *v.stride(), kv_lens.contiguous())
    sizes = (max_kv_len, num_splits, group, positive_scale(sm_scale, head_dim), float(phi), bound_a, bound_b)
    grid = (num_splits, num_kv_heads * tiles, batch)
    if num_splits == 1:
        _unified_split_kernel[grid](
            *inputs, o, o.stride(0), o.stride(1), 0, o.stride(2), o, o, 0, 0, 0, recomputed, *recomputed.stride(), 0,
            *sizes, **options, **config,
        )  # fmt: skip
        return o, recomputed
    num = torch.empty(batch, num_q_heads, num_splits, head_dim, dtype=torch.float32, device=q.device)
    den, base = torch.empty(2, batch, num_q_heads, num_splits, dtype=torch.float32, device=q.device)
    tripped = torch.empty(batch, num_q_heads, num_splits, dtype=torch.bool, device=q.device)
    parts = (num, *num.stride(), den, base, *den.stride(), tripped, *tripped.stride())
    _unified_split_kernel[grid](*inputs, *parts, *sizes, **options, **config)
    _unified_merge_kernel[(num_q_heads, batch)](
        *parts, o, *o.stride(), recomputed, *recomputed.stride(), num_splits,
        HEAD_DIM=head_dim, SYNCHRONISED=synchronised, **merge_config(head_dim),
    )  # fmt: skip
    return o, recomputed


@triton.jit
def _gemv_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K]
    w_ptr, stride_wn, stride_wk,  # [N, K]
    y_ptr, stride_ym, stride_yn,  # [M, N] out
    m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of BLOCK_M tokens, multiplied and added in fp32 without the matrix unit."""
    # Programs that read the same rows of w are neighbours: all but the first find them in the L2 cache.
    pid, tiles_m = tl.program_id(0), tl.cdiv(m, BLOCK_M)
    offs_n = (pid // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = (pid % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    # Three dimensions from the start: so a thread multiplies the neighbours that it loaded, 16 bytes at a time.
    mask_n, mask_m = (offs_n < n)[None, :, None], (offs_m < m)[:, None, None]
    w_ptr += offs_n[None, :, None] * stride_wn
    x_ptr += offs_m[:, None, None] * stride_xm
    acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)  # summed over k once, after the loop
    # A loop without a dot is pipelined only by tl.range: STAGES - 1 tiles of w are on their way.
    for first in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        mask_k = (offs_k < k - first)[None, None, :]
        cols = (first + offs_k).to(tl.int64)[None, None, :]  # a transposed w has its columns N elements apart
        w = tl.load(w_ptr + cols * stride_wk, mask=mask_n & mask_k, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + cols * stride_xk, mask=mask_m & mask_k, other=0.0).to(tl.float32)
        acc += x * w
    y = tl.sum(acc, 2)  # [BLOCK_M, BLOCK_N]
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, cast(y, y_ptr.dtype.element_ty), mask=(offs_m < m)[:, None] & (offs_n < n)[None, :])


def gemv_config(dtype: torch.dtype, m: int, k: int) -> dict:
    """Tile sizes and launch options for x [m, k]: up to four tokens, four rows of w, and 2048 bytes of each."""
    block_k = min(2048 // dtype.itemsize, max(32, next_power_of_2(k)))
    return dict(BLOCK_M=min(4, next_power_of_2(m)), BLOCK_N=4, BLOCK_K=block_k, STAGES=4, num_warps=4)


def gemv(x, w):
    """y = x w^T with fp32 multiply-adds and no matrix unit: x [M, K], w [N, K], any strides; fp16, bf16 or fp32.

    Four tokens share one reading of w; with more it is read again. Returns y [M, N] in x.dtype.
    Raises ValueError naming the argument. Source: Hong et al. 2024, FlashDecoding++, section 5 (FastGEMV, ImplA).
    """
    m, n, k = args.linear(x, w)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel():
        config = gemv_config(x.dtype, m, k)
        grid = (cdiv(n, config["BLOCK_N"]) * cdiv(m, config["BLOCK_M"]),)
        _gemv_kernel[grid](x, *x.stride(), w, *w.stride(), y, *y.stride(), m, n, k, **config)
    return y


@triton.jit
def store_share(
    acc, y_ptrs, mask_y, part_ptr, stride_pp, stride_pn, arrived_ptr, pid_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Store a tile of y; of a tile that SPLIT_K programs share, the one that arrives last adds up all their sums.

    acc [BLOCK_N, BLOCK_M]: this program's sum over its piece of K; part_ptr, arrived_ptr: the tile's own scratch.
    """
    if SPLIT_K == 1:
        tl.store(y_ptrs, cast(acc, y_ptrs.dtype.element_ty), mask=mask_y)
    else:
        at = tl.arange(0, BLOCK_N)[:, None] * stride_pn + tl.arange(0, BLOCK_M)[None, :]
        tl.store(part_ptr + pid_k * stride_pp + at, acc)
        # All threads must have stored before one of them announces it (Triton 3.6 adds no barrier here).
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1:
            acc = tl.load(part_ptr + at, cache_modifier=".cg")
            for s in range(1, SPLIT_K):  # always in this order: the same sum in every run, which atomics would not give
                acc += tl.load(part_ptr + s * stride_pp + at, cache_modifier=".cg")
            tl.store(y_ptrs, cast(acc, y_ptrs.dtype.element_ty), mask=mask_y)
            tl.store(arrived_ptr, 0)


def cut_k(tiles: int, num_blocks: int, per_sm: int = 2) -> int:
    """How many programs share a tile: as many as run at the same time, per_sm an SM, and none for a second wave; unless
    a program would then have fewer than four blocks."""
    split_k = min(max(1, per_sm * device_properties()["multiprocessor_count"] // tiles), max(1, num_blocks // 4))
    return max(1, cdiv(num_blocks, max(1, cdiv(num_blocks, split_k))))  # none of them empty


def launch_tiles(kernel, inputs, y, k, config, **constants) -> None:
    """Launch a kernel that ends with `store_share`, one program a tile of y [M, N] and piece of K, with its scratch."""
    m, n = y.shape
    block_m, block_n, block_k, split_k = (config[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    k_per_split = cdiv(cdiv(k, block_k), split_k) * block_k
    grid = (split_k, cdiv(n, block_n), cdiv(m, block_m))
    part = arrived = y
    if split_k > 1:
        num_tiles = grid[1] * grid[2]
        part = torch.empty(num_tiles * split_k, block_n, block_m, dtype=torch.float32, device=y.device)
        arrived = arrival_counters(y, num_tiles)
    kernel[grid](
        *inputs, y, *y.stride(), part, part.stride(0), part.stride(1), arrived, m, n, k, k_per_split,
        **constants, **config,
    )  # fmt: skip


@triton.jit
def _flat_gemm_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K]
    w_ptr, stride_wn, stride_wk,  # [N, K]
    y_ptr, stride_ym, stride_yn,  # [M, N] out
    part_ptr, stride_pp, stride_pn,  # [programs, BLOCK_N, BLOCK_M] fp32, scratch if SPLIT_K > 1
    arrived_ptr,  # [tiles] int32, zero before and after
    m, n, k, k_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One tile of y^T = w x^T. The tokens are columns: that side of the matrix unit takes as few as 8."""
    pid_k = tl.program_id(0)
    tile = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * k_per_split + tl.arange(0, BLOCK_K)
    mask_n, mask_m = (offs_n < n)[:, None], (offs_m < m)[:, None]
    w_ptrs = w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    end = tl.minimum(k - pid_k * k_per_split, k_per_split)
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(0, end, BLOCK_K):
        if EVEN_K:
            w = tl.load(w_ptrs, mask=mask_n, other=0.0)
            x = tl.load(x_ptrs, mask=mask_m, other=0.0)
        else:
            mask_k = (tl.arange(0, BLOCK_K) < end - first)[None, :]
            w = tl.load(w_ptrs, mask=mask_n & mask_k, other=0.0)
            x = tl.load(x_ptrs, mask=mask_m & mask_k, other=0.0)
        acc += dot(w, tl.trans(x))
        w_ptrs += step * stride_wk
        x_ptrs += step * stride_xk
    y_ptrs = y_ptr + offs_m[None, :] * stride_ym + offs_n[:, None] * stride_yn
    mask_y = mask_n & (offs_m < m)[None, :]
    part_ptr += tile.to(tl.int64) * SPLIT_K * stride_pp
    store_share(
        acc, y_ptrs, mask_y, part_ptr, stride_pp, stride_pn, arrived_ptr + tile, pid_k, BLOCK_M, BLOCK_N, SPLIT_K
    )


def flat_config(dtype: torch.dtype, m: int, n: int, k: int, pad: int | None = None) -> dict:
    """Tile sizes, launch options and how often K is cut, for x [m, k] and w [n, k].

    pad: tokens a tile. Default: as few as hold m, from 8 (16 where 8 does not pay, see `_least_pad`) to 64.
    """
    if pad is None:
        pad = min(64, max(_least_pad(), next_power_of_2(m)))
    # 64 rows of w are one wgmma, and 256 bytes of each. fp32 has no matrix unit: registers are the limit there.
    block_n, block_k = (32, 64) if dtype == torch.float32 else (64, 128)
    # The double buffer, and more where shared memory has room.
    room = device_properties()["max_shared_mem"] // ((block_n + pad) * block_k * dtype.itemsize)
    num_stages = max(1, min(3, room), min(4, room // 2))  # four only where two programs fit into an SM with them
    tiles = cdiv(n, block_n) * cdiv(m, pad)
    split_k = cut_k(tiles, cdiv(k, block_k))
    return dict(
        BLOCK_M=pad, BLOCK_N=block_n, BLOCK_K=block_k, SPLIT_K=split_k, num_warps=4, num_stages=num_stages
    )  # fmt: skip


def _least_pad() -> int:
    """8 where a product with 8 columns is compiled well: Triton 3.6 gives up Hopper's wgmma and the pipeline for it."""
    if INTERPRETED:
        return 8
    target = triton.runtime.driver.active.get_current_target()
    is_old_hopper = target.arch == 90 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    return 16 if is_old_hopper or target.backend == "hip" else 8


def flat_gemm(x, w, *, pad=None):
    """y = x w^T for few tokens on the matrix unit: x [M, K], w [N, K], any strides; fp16, bf16 or fp32.

    Computed as y^T = w x^T, so the tokens are padded to 8 and not to the 16 or 64 of the unit's other side. pad: 8, 16
    or 64 tokens a tile, to compare; default as few as hold M, in tiles of at most 64. Where N gives too few programs,
    K is cut as well, and the partial sums are added in a fixed order.

    Returns y [M, N] in x.dtype. Raises ValueError naming the argument.
    Source: Hong et al. 2024, FlashDecoding++, section 4; its double buffer is num_stages.
    """
    m, n, k = args.linear(x, w)
    args.expect(pad in (None, 8, 16, 64), "pad", pad, "None, 8, 16 or 64")
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    config = flat_config(x.dtype, m, n, k, pad)
    inputs = (x, *x.stride(), w, *w.stride())
    launch_tiles(_flat_gemm_kernel, inputs, y, k, config, EVEN_K=k % config["BLOCK_K"] == 0)
    return y
