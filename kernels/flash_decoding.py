"""Flash-Decoding: the keys of one sequence are spread over many programs, and their partial results merged.

A decode step reads every key and value once and computes almost nothing, so it is as fast as memory is read. With
one program per KV head, batch 1 occupies 8 of 132 SMs. A split over the keys fills the rest.

The query heads of a group share a KV head; they are the rows of one tile, so K and V are read once a group.
"""

import torch
import triton
import triton.language as tl

from kernels._tile import (
    LN2,
    LOG2E,
    attend_tile,
    block_dim,
    cast,
    device_properties,
    finish,
    next_power_of_2,
    qk_scale,
    splits_or_default,
)
from labkit import args


@triton.jit
def attend_split(
    q_ptr, stride_qb, stride_qh, stride_qd,  # [B, Hq, D]
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,  # [B, L, Hkv, D]
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,  # [B, L, Hkv, D]
    kv_lens_ptr, max_kv_len,  # [B]
    pid_b, pid_h, pid_s, num_splits, group, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr = 1,
):  # fmt: skip
    """Attention of a tile of query heads over one split of the keys: o [BLOCK_H, BLOCK_D], lse [BLOCK_H].

    Tile pid_h holds `group` query heads; TILES of them share a KV head.
    """
    offs_h = tl.arange(0, BLOCK_H)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < HEAD_DIM
    mask_q = (offs_h[:, None] < group) & mask_d[None, :]
    q_ptrs = q_ptr + pid_b * stride_qb + (pid_h * group + offs_h[:, None]) * stride_qh + offs_d[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=mask_q, other=0.0)

    # Each sequence is cut by its own length, not by the capacity of its buffer: whole blocks, late splits may be empty.
    kv_len = tl.minimum(tl.maximum(tl.load(kv_lens_ptr + pid_b), 0), max_kv_len)
    split_len = tl.cdiv(tl.cdiv(kv_len, BLOCK_N), num_splits) * BLOCK_N
    start = tl.minimum(pid_s * split_len, kv_len)
    end = tl.minimum(start + split_len, kv_len)
    full_end = start + (end - start) // BLOCK_N * BLOCK_N

    kv_head = pid_h // TILES
    k_ptr += pid_b * stride_kb + kv_head * stride_kh
    v_ptr += pid_b * stride_vb + kv_head * stride_vh

    m = tl.full([BLOCK_H], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    # Pointers are made anew for every tile: carried along, they would fill half of the registers.
    for first in range(start, full_end, BLOCK_N):  # full tiles need no mask over keys
        rows = (first + offs_n).to(tl.int64)[:, None]  # a cache may hold more than 2^31 elements
        k_ptrs = k_ptr + rows * stride_kn + offs_d[None, :] * stride_kd
        v_ptrs = v_ptr + rows * stride_vn + offs_d[None, :] * stride_vd
        if BLOCK_D == HEAD_DIM:
            k, v = tl.load(k_ptrs), tl.load(v_ptrs)
        else:
            k = tl.load(k_ptrs, mask=mask_d[None, :], other=0.0)
            v = tl.load(v_ptrs, mask=mask_d[None, :], other=0.0)
        m, l, acc = attend_tile(q, k, v, mask_q, m, l, acc, qk_scale, False)
    for first in range(full_end, end, BLOCK_N):  # at most once; outside a loop its loads would be held in registers
        rows = (first + offs_n).to(tl.int64)[:, None]
        mask_n = first + offs_n < end
        mask_kv = mask_n[:, None] & mask_d[None, :]
        k = tl.load(k_ptr + rows * stride_kn + offs_d[None, :] * stride_kd, mask=mask_kv, other=0.0)
        v = tl.load(v_ptr + rows * stride_vn + offs_d[None, :] * stride_vd, mask=mask_kv, other=0.0)
        m, l, acc = attend_tile(q, k, v, mask_n[None, :], m, l, acc, qk_scale, True)
    return finish(m, l, acc)


@triton.jit
def store_split(
    o, lse,  # [BLOCK_H, BLOCK_D], [BLOCK_H]
    o_ptr, stride_ob, stride_oh, stride_os, stride_od,  # [B, Hq, S, D] out
    lse_ptr, stride_lb, stride_lh, stride_ls,  # [B, Hq, S] out
    pid_b, pid_h, pid_s, group,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, with_o=True,
):  # fmt: skip
    """Store what one split made of a tile of `group` query heads; without o, only its lse."""
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_h = offs_h < group
    head = pid_h * group + offs_h
    o_ptrs = o_ptr + pid_b * stride_ob + head[:, None] * stride_oh + pid_s * stride_os + offs_d[None, :] * stride_od
    mask_o = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :] & with_o
    tl.store(o_ptrs, cast(o, o_ptr.dtype.element_ty), mask=mask_o)
    tl.store(lse_ptr + pid_b * stride_lb + head * stride_lh + pid_s * stride_ls, lse, mask=mask_h)


@triton.jit
def _merge_heads(
    part_o_ptr, stride_pb, stride_ph, stride_ps, stride_pd,  # [B, Hq, S, D]
    part_lse_ptr, stride_plb, stride_plh, stride_pls,  # [B, Hq, S]
    o_ptr, stride_ob, stride_oh, stride_od,  # [B, Hq, D] out
    lse_ptr, stride_lb, stride_lh,  # [B, Hq] out
    pid_b, head, mask_h,  # head, mask_h [HEADS]
    num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, MANY_EMPTY: tl.constexpr = False,
):  # fmt: skip
    """Merge the splits of some heads and store o and lse. BLOCK_S splits at a time, an online softmax over splits.

    MANY_EMPTY: what empty splits hold is not read, for which the other loads wait for lse.
    """
    offs_s = tl.arange(0, BLOCK_S).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = offs_d < HEAD_DIM
    lse_ptrs = part_lse_ptr + pid_b * stride_plb + head[None, :] * stride_plh
    part_ptrs = part_o_ptr + pid_b * stride_pb + (head[:, None] * stride_ph + offs_d[None, :] * stride_pd)[None, :, :]
    m = tl.full(head.shape, float("-inf"), tl.float32)
    l = tl.zeros(head.shape, tl.float32)
    acc = tl.zeros([head.shape[0], BLOCK_D], tl.float32)
    for s in range(0, num_splits, BLOCK_S):
        mask = (s + offs_s < num_splits)[:, None] & mask_h[None, :]
        # .cg: read from L2, where the other programs' stores are seen
        lse_at = (s + offs_s[:, None]) * stride_pls
        part_lse = tl.load(lse_ptrs + lse_at, mask=mask, other=float("-inf"), cache_modifier=".cg")  # [BLOCK_S, HEADS]
        holds = part_lse > float("-inf")
        mask_part = (mask & holds if MANY_EMPTY else mask)[:, :, None] & mask_d[None, None, :]
        part_at = (s + offs_s[:, None, None]) * stride_ps
        part = tl.load(part_ptrs + part_at, mask=mask_part, other=0.0, cache_modifier=".cg")  # [.., HEADS, BLOCK_D]
        part = tl.where(holds[:, :, None], part, 0.0)  # what an empty split holds does not count
        m_new = tl.maximum(m, tl.max(part_lse, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2((part_lse - m_safe[None, :]) * LOG2E)
        alpha = tl.exp2((m - m_safe) * LOG2E)
        l = l * alpha + tl.sum(weight, 0)
        acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * part, 0)
        m = m_new
    l = tl.where(l == 0.0, 1.0, l)  # m is -inf there, and stays it
    o_ptrs = o_ptr + pid_b * stride_ob + head[:, None] * stride_oh + offs_d[None, :] * stride_od
    tl.store(o_ptrs, cast(acc / l[:, None], o_ptr.dtype.element_ty), mask=mask_h[:, None] & mask_d[None, :])
    tl.store(lse_ptr + pid_b * stride_lb + head * stride_lh, m + tl.log2(l) * LN2, mask=mask_h)


@triton.jit(do_not_specialize=["stride_lb", "stride_lh", "num_splits"])  # one kernel for every number of splits
def split_kernel(
    q_ptr, stride_qb, stride_qh, stride_qd,  # [B, Hq, D]
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,  # [B, L, Hkv, D]
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,  # [B, L, Hkv, D]
    kv_lens_ptr,  # [B]
    o_ptr, stride_ob, stride_oh, stride_os, stride_od,  # [B, Hq, S, D] out
    lse_ptr, stride_lb, stride_lh, stride_ls,  # [B, Hq, S] out
    max_kv_len, num_splits, group, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    pid_s = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    o, lse = attend_split(
        q_ptr, stride_qb, stride_qh, stride_qd, k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
        v_ptr, stride_vb, stride_vn, stride_vh, stride_vd, kv_lens_ptr, max_kv_len,
        pid_b, pid_h, pid_s, num_splits, group, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_H, BLOCK_N, TILES,
    )  # fmt: skip
    store_split(
        o, lse, o_ptr, stride_ob, stride_oh, stride_os, stride_od, lse_ptr, stride_lb, stride_lh, stride_ls,
        pid_b, pid_h, pid_s, group, HEAD_DIM, BLOCK_D, BLOCK_H,
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride_plb", "stride_plh", "num_splits"])
def _merge_kernel(
    part_o_ptr, stride_pb, stride_ph, stride_ps, stride_pd,  # [B, Hq, S, D] fp32
    part_lse_ptr, stride_plb, stride_plh, stride_pls,  # [B, Hq, S] fp32
    o_ptr, stride_ob, stride_oh, stride_od,  # [B, Hq, D] out
    lse_ptr, stride_lb, stride_lh,  # [B, Hq] out
    num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, MANY_EMPTY: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    head += tl.arange(0, 1)
    _merge_heads(
        part_o_ptr, stride_pb, stride_ph, stride_ps, stride_pd, part_lse_ptr, stride_plb, stride_plh, stride_pls,
        o_ptr, stride_ob, stride_oh, stride_od, lse_ptr, stride_lb, stride_lh, pid_b, head, head >= 0, num_splits,
        HEAD_DIM, BLOCK_D, BLOCK_S, MANY_EMPTY,
    )  # fmt: skip


@triton.jit
def _one_launch_kernel(
    q_ptr, stride_qb, stride_qh, stride_qd,  # [B, Hq, D]
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,  # [B, L, Hkv, D]
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,  # [B, L, Hkv, D]
    kv_lens_ptr,  # [B]
    part_o_ptr, stride_pb, stride_ph, stride_ps, stride_pd,  # [B, Hq, S, D] fp32, scratch
    part_lse_ptr, stride_plb, stride_plh, stride_pls,  # [B, Hq, S] fp32, scratch
    o_ptr, stride_ob, stride_oh, stride_od,  # [B, Hq, D] out
    lse_ptr, stride_lb, stride_lh,  # [B, Hq] out
    arrived_ptr,  # [B * Hkv * TILES] int32, zero before and after
    max_kv_len, num_splits, group, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    BLOCK_S: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Split and merge in one launch: of the programs of a tile of heads, the one that arrives last merges for all."""
    pid_s = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    o, lse = attend_split(
        q_ptr, stride_qb, stride_qh, stride_qd, k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,
        v_ptr, stride_vb, stride_vn, stride_vh, stride_vd, kv_lens_ptr, max_kv_len,
        pid_b, pid_h, pid_s, num_splits, group, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_H, BLOCK_N, TILES,
    )  # fmt: skip
    store_split(
        o, lse, part_o_ptr, stride_pb, stride_ph, stride_ps, stride_pd,
        part_lse_ptr, stride_plb, stride_plh, stride_pls, pid_b, pid_h, pid_s, group, HEAD_DIM, BLOCK_D, BLOCK_H,
    )  # fmt: skip

    # All threads of this program must have stored before one of them announces it (Triton 3.6 adds no barrier here).
    tl.debug_barrier()
    arrived = arrived_ptr + pid_b * tl.num_programs(1) + pid_h
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == num_splits - 1:
        for first in range(0, group, HEADS):  # some heads at once: their loads are on their way together
            offs_h = first + tl.arange(0, HEADS)
            _merge_heads(
                part_o_ptr, stride_pb, stride_ph, stride_ps, stride_pd,
                part_lse_ptr, stride_plb, stride_plh, stride_pls,
                o_ptr, stride_ob, stride_oh, stride_od, lse_ptr, stride_lb, stride_lh,
                pid_b, pid_h * group + offs_h, offs_h < group, num_splits, HEAD_DIM, BLOCK_D, BLOCK_S,
            )  # fmt: skip
        tl.store(arrived, 0)  # ready for the next launch, also inside a replayed graph


def split_config(dtype: torch.dtype, head_dim: int, group: int) -> dict:
    """Tile sizes and launch options of the split kernel, such that nothing spills and shared memory suffices."""
    block_d, block_h = block_dim(head_dim), max(16, next_power_of_2(group))
    block_n, num_stages, num_warps = 16 if block_d > 64 else 32, 2, 8
    if dtype != torch.float32:  # exact fp32 products are made without the matrix unit and need many registers
        # Two programs an SM, each with num_stages - 1 tiles of K and V on their way.
        room = device_properties()["max_shared_mem"] // 2
        key_bytes = 2 * block_d * dtype.itemsize
        block_n, num_stages = next((n, s) for n, s in ((64, 3), (32, 3), (32, 2)) if (s - 1) * n * key_bytes <= room)
        num_warps = 8 if block_h * block_d >= 64 * 128 else 4
    return dict(BLOCK_D=block_d, BLOCK_H=block_h, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)


def tiles_per_group(dtype: torch.dtype, head_dim: int, group: int, most: int = 128) -> int:
    """Into how many tiles of equally many heads, `most` or fewer, a group is cut, so that nothing spills.

    Exact fp32 products are made without the matrix unit and leave registers for 16 heads, wide heads for 32.
    """
    most = 16 if dtype == torch.float32 else min(most, 32) if head_dim > 128 else most
    return next(t for t in range(1, group + 1) if group % t == 0 and group // t <= most)


def merge_config(head_dim: int) -> dict:
    """Tile size and warps of a merge.

    A lane loads 4 columns, a warp 128. With a warp for every 128 columns a lane has its columns of all splits and adds
    them up alone; with more warps the splits would meet in shared memory, 16 lanes to a bank.
    """
    block_d = block_dim(head_dim)
    return dict(BLOCK_D=block_d, BLOCK_S=MERGE_BLOCK, num_warps=max(1, block_d // 128))


MERGE_BLOCK = 16  # splits merged at a time
_arrived: dict[tuple, torch.Tensor] = {}


def arrival_counters(like: torch.Tensor, count: int) -> torch.Tensor:
    """Zeroed int32 counters [count or more] on like's device, for programs that share a tile: the last one finishes it.

    Kept per device and stream, since every launch leaves them at zero. A captured graph remembers their address: those
    of one size are never freed, a larger call gets others. So two graphs that were captured on one stream must not be
    replayed on two at the same time.
    """
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    size = max(1024, next_power_of_2(count))
    counters = _arrived.get((like.device, stream, size))
    if counters is None:
        counters = torch.zeros(size, dtype=torch.int32, device=like.device)
        if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph's memory must not outlive it
            _arrived[like.device, stream, size] = counters
    return counters


def split_outputs(o, lse, num_splits, many_empty=False):
    """Where a split kernel writes, as its arguments, and what to call after it.

    A single split writes o [B, Hq, D] and lse [B, Hq] itself; several write partial results, which are then merged.
    many_empty: most splits of a sequence may be empty; of those only lse is read.
    """
    if num_splits == 1:
        return (o, o.stride(0), o.stride(1), 0, o.stride(2), lse, *lse.stride(), 0), lambda: None
    batch, num_q_heads, head_dim = o.shape
    part_o = torch.empty(batch, num_q_heads, num_splits, head_dim, dtype=torch.float32, device=o.device)
    part_lse = torch.empty(batch, num_q_heads, num_splits, dtype=torch.float32, device=o.device)
    outputs = (part_o, *part_o.stride(), part_lse, *part_lse.stride())
    return outputs, lambda: _launch_merge(part_o, part_lse, o, lse, many_empty)


def _launch_merge(part_o, part_lse, o, lse, many_empty=False) -> None:
    batch, num_q_heads, num_splits, head_dim = part_o.shape
    _merge_kernel[(batch, num_q_heads)](
        part_o, *part_o.stride(), part_lse, *part_lse.stride(), o, *o.stride(), lse, *lse.stride(), num_splits,
        HEAD_DIM=head_dim, MANY_EMPTY=many_empty, **merge_config(head_dim),
    )  # fmt: skip


def merge(part_o, part_lse):
    """Combine partial attentions over disjoint sets of keys, exactly. As `labkit.flash_decoding.merge`, fp32 only.

    part_o [B, Hq, S, D], part_lse [B, Hq, S] fp32. Returns o [B, Hq, D], lse [B, Hq] fp32; all splits empty: 0, -inf.
    """
    batch, num_q_heads, _, head_dim = args.merge(part_o, part_lse)
    o, lse = part_o.new_empty(batch, num_q_heads, head_dim), part_lse.new_empty(batch, num_q_heads)
    if lse.numel():
        _launch_merge(part_o, part_lse, o, lse)
    return o, lse


def flash_decoding(q, k, v, kv_lens, *, num_splits=None, sm_scale=None, one_launch=False):
    """Attention of one new token a sequence, with the keys of every sequence cut into num_splits pieces.

    q [B, Hq, D]; k, v [B, L, Hkv, D], Hq a multiple of Hkv, any strides; fp16, bf16 or fp32; D up to 256.
    kv_lens [B] int32 on q's device: sequence b reads keys [0, kv_lens[b]). sm_scale > 0 defaults to D ** -0.5.
    Scaled scores have to stay below 2^24 in size, as in all kernels of the lab: beyond, fp32 has no fractions left.
    num_splits 1 is FlashAttention-2's decoding (one program a KV head); None leaves it to `labkit.splits.choose`.
    one_launch: the last program to arrive merges, instead of a second kernel.

    Returns o [B, Hq, D] in q.dtype and lse [B, Hq] fp32 (natural log); a sequence without keys gives 0 and -inf.
    Raises ValueError naming the argument. Source: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context
    inference" (2023); FlashAttention-2's flash_fwd_splitkv kernels.
    """
    batch, num_q_heads, num_kv_heads, max_kv_len, head_dim = args.decode(q, k, v, kv_lens)
    args.num_splits(num_splits)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_q_heads, dtype=torch.float32, device=q.device)
    if batch == 0:
        return o, lse
    num_splits = splits_or_default(num_splits, batch * num_kv_heads, max_kv_len, head_dim)
    group = num_q_heads // num_kv_heads
    tiles = tiles_per_group(q.dtype, head_dim, group)
    group //= tiles
    config = split_config(q.dtype, head_dim, group) | {"TILES": tiles}
    inputs = (q, *q.stride(), k, *k.stride(), v, *v.stride(), kv_lens.contiguous())
    sizes = (max_kv_len, num_splits, group, qk_scale(sm_scale, head_dim))
    grid = (num_splits, num_kv_heads * tiles, batch)
    outputs, merge_splits = split_outputs(o, lse, num_splits)
    if one_launch and num_splits > 1:
        _one_launch_kernel[grid](
            *inputs, *outputs, o, *o.stride(), lse, *lse.stride(),
            arrival_counters(q, batch * num_kv_heads * tiles), *sizes,
            HEAD_DIM=head_dim, BLOCK_S=MERGE_BLOCK, HEADS=min(2, next_power_of_2(group)), **config,
        )  # fmt: skip
    else:
        split_kernel[grid](*inputs, *outputs, *sizes, HEAD_DIM=head_dim, **config)
        merge_splits()
    return o, lse
