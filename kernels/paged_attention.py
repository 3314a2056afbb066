"""PagedAttention: Flash-Decoding over keys and values that lie in pages, and the store of new ones into their slots.

The tile of keys that a program works on is apart from the page: a tile may span many pages or be a part of one. Which
page comes next is read one tile ahead, so that the address of a load never waits for another load; otherwise the
compiler can keep only one tile in flight.
"""

import torch
import triton
import triton.language as tl

from kernels._tile import attend_tile, block_dim, cdiv, finish, next_power_of_2, qk_scale, splits_or_default
from kernels.flash_decoding import (  # flash_decoding: timed beside paged_decoding, under this topic's name
    flash_decoding,  # noqa: F401
    split_config,
    split_outputs,
    store_split,
    tiles_per_group,
)
from labkit import args, splits


@triton.jit
def pages_of_tile(table_ptr, stride_tp, first, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page of every key of the tile that begins at `first` [BLOCK_N], or one number if it lies in one page.

    -1 from `end` on: what stands in the table there is not read.
    """
    if PAGE_SIZE % BLOCK_N == 0:
        key = first
    else:
        key = first + tl.arange(0, BLOCK_N)
    return tl.load(table_ptr + (key // PAGE_SIZE).to(tl.int64) * stride_tp, mask=key < end, other=-1)


@triton.jit
def length_of_pieces(kv_len, num_splits, even, PIECE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys of a piece, in whole tiles: PIECE, but in no fewer pieces than `even` and in no more than num_splits."""
    tiles = tl.cdiv(kv_len, BLOCK_N)
    return tl.minimum(tl.cdiv(tiles, even) * BLOCK_N, tl.maximum(tl.cdiv(tiles, num_splits) * BLOCK_N, PIECE))


# What changes while an engine runs must not make Triton compile anew.
@triton.jit(do_not_specialize=["stride_tb", "stride_lb", "stride_lh", "max_kv_len", "num_splits", "even"])
def _paged_split_kernel(
    q_ptr, stride_qb, stride_qh, stride_qd,  # [B, Hq, D]
    k_ptr, stride_kp, stride_kn, stride_kh, stride_kd,  # [P, page_size, Hkv, D]
    v_ptr, stride_vp, stride_vn, stride_vh, stride_vd,  # [P, page_size, Hkv, D]
    table_ptr, stride_tb, stride_tp,  # [B, max_pages]
    kv_lens_ptr,  # [B]
    o_ptr, stride_ob, stride_oh, stride_os, stride_od,  # [B, Hq, S, D] out
    lse_ptr, stride_lb, stride_lh, stride_ls,  # [B, Hq, S] out
    num_pages, max_kv_len, num_splits, even, group, qk_scale,
    PAGE_SIZE: tl.constexpr, DENSE: tl.constexpr, READ_AHEAD: tl.constexpr, PIECE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """DENSE: one page follows the other, as in a pool. A token's row is then one number for both K and V."""
    pid_s = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_h = offs_h < group
    mask_d = offs_d < HEAD_DIM
    head = pid_h * group + offs_h
    q_ptrs = q_ptr + pid_b * stride_qb + head[:, None] * stride_qh + offs_d[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=mask_h[:, None] & mask_d[None, :], other=0.0)

    # Each sequence is cut by its own length; late splits may be empty. Of those the merge reads nothing but lse.
    kv_len = tl.minimum(tl.maximum(tl.load(kv_lens_ptr + pid_b), 0), max_kv_len)
    split_len = length_of_pieces(kv_len, num_splits, even, PIECE, BLOCK_N)
    start = tl.minimum(pid_s * split_len, kv_len)
    end = tl.minimum(start + split_len, kv_len)

    table_ptr += pid_b * stride_tb
    k_ptrs = k_ptr + pid_h // TILES * stride_kh + offs_d[None, :] * stride_kd
    v_ptrs = v_ptr + pid_h // TILES * stride_vh + offs_d[None, :] * stride_vd
    m = tl.full([BLOCK_H], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    next_page = pages_of_tile(table_ptr, stride_tp, start, end, PAGE_SIZE, BLOCK_N)
    for first in range(start, end, BLOCK_N):
        if READ_AHEAD:
            page = next_page
            next_page = pages_of_tile(table_ptr, stride_tp, first + BLOCK_N, end, PAGE_SIZE, BLOCK_N)
        else:
            page = pages_of_tile(table_ptr, stride_tp, first, end, PAGE_SIZE, BLOCK_N)
        key = first + offs_n
        mask_n = key < tl.where((page >= 0) & (page < num_pages), end, 0)  # one page may stand for all keys
        mask_kv = mask_n[:, None] & mask_d[None, :]
        page, offset = page.to(tl.int64), (key % PAGE_SIZE).to(tl.int64)  # a cache may hold more than 2^31 elements
        if DENSE:
            row = page * PAGE_SIZE + offset
            k_at, v_at = row * stride_kn, row * stride_vn
        else:
            k_at, v_at = page * stride_kp + offset * stride_kn, page * stride_vp + offset * stride_vn
        k = tl.load(k_ptrs + k_at[:, None], mask=mask_kv, other=0.0)
        v = tl.load(v_ptrs + v_at[:, None], mask=mask_kv, other=0.0)
        m, l, acc = attend_tile(q, k, v, mask_n[None, :], m, l, acc, qk_scale, True)
    o, lse = finish(m, l, acc)

    store_split(
        o, lse, o_ptr, stride_ob, stride_oh, stride_os, stride_od, lse_ptr, stride_lb, stride_lh, stride_ls,
        pid_b, pid_h, pid_s, group, HEAD_DIM, BLOCK_D, BLOCK_H, (pid_s == 0) | (start < end),
    )  # fmt: skip


@triton.jit
def _write_kv_kernel(
    k_ptr, stride_kn, stride_kh, stride_kd,  # [N, Hkv, D]
    v_ptr, stride_vn, stride_vh, stride_vd,  # [N, Hkv, D]
    k_pages_ptr, stride_kpp, stride_kpn, stride_kph, stride_kpd,  # [P, page_size, Hkv, D] out
    v_pages_ptr, stride_vpp, stride_vpn, stride_vph, stride_vpd,  # [P, page_size, Hkv, D] out
    slots_ptr,  # [N]
    num_slots, num_kv_heads,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    offs_h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]  # heads may lie far apart
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    mask = (offs_h < num_kv_heads) & (offs_d < HEAD_DIM)
    # Only the stores depend on the slot: the loads do not wait for it.
    k = tl.load(k_ptr + token * stride_kn + offs_h * stride_kh + offs_d * stride_kd, mask=mask)
    v = tl.load(v_ptr + token * stride_vn + offs_h * stride_vh + offs_d * stride_vd, mask=mask)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    k_ptrs = k_pages_ptr + page * stride_kpp + offset * stride_kpn + offs_h * stride_kph + offs_d * stride_kpd
    v_ptrs = v_pages_ptr + page * stride_vpp + offset * stride_vpn + offs_h * stride_vph + offs_d * stride_vpd
    mask = mask & (slot >= 0) & (slot < num_slots)
    tl.store(k_ptrs, k, mask=mask)
    tl.store(v_ptrs, v, mask=mask)


def paged_decoding(
    q, k_pages, v_pages, block_table, kv_lens, *, num_splits=None, sm_scale=None, read_ahead=True
):  # fmt: skip
    """Attention of one new token a sequence over keys and values that lie in pages, cut into num_splits pieces.

    q [B, Hq, D]; k_pages, v_pages [P, page_size, Hkv, D], Hq a multiple of Hkv, any strides; fp16, bf16 or fp32; D up
    to 256; any page size. block_table [B, max_pages] int32: page of each page_size tokens of a sequence. kv_lens [B]
    int32 on q's device. sm_scale > 0 defaults to D ** -0.5; num_splits None leaves it to `labkit.splits`: `choose` for
    sequences that fill the table, and `offered` for some that are longer than the others. read_ahead=False reads a
    page's id right before the page, for comparison.

    Page ids beyond kv_len are never read. Within it an id must lie in [0, P): elsewhere it is an error on the CPU and
    under LAB_CHECK=1; where values are not looked at, the tokens of such a page are as if they were absent, and kv_lens
    are clamped to [0, max_pages * page_size].

    Returns o [B, Hq, D] in q.dtype and lse [B, Hq] fp32 (natural log); a sequence without keys gives 0 and -inf.
    Raises ValueError naming the argument. Source: Kwon et al., SOSP 2023, sections 4.1 and 5.1, with the split over
    the keys of Flash-Decoding.
    """
    batch, num_q_heads, num_kv_heads, max_pages, head_dim = args.paged(q, k_pages, v_pages, block_table, kv_lens)
    args.num_splits(num_splits)
    num_pages, page_size = k_pages.shape[:2]
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_q_heads, dtype=torch.float32, device=q.device)
    if batch == 0:
        return o, lse
    max_kv_len = max_pages * page_size
    even = splits_or_default(num_splits, batch * num_kv_heads, max_kv_len, head_dim)
    if num_splits is None:
        num_splits = splits.offered(even, max_kv_len, 4 * o.numel())
    group = num_q_heads // num_kv_heads
    tiles = tiles_per_group(q.dtype, head_dim, group)
    group //= tiles
    outputs, merge_splits = split_outputs(o, lse, num_splits, num_splits > even)
    _paged_split_kernel[(num_splits, num_kv_heads * tiles, batch)](
        q, *q.stride(), k_pages, *k_pages.stride(), v_pages, *v_pages.stride(), block_table, *block_table.stride(),
        kv_lens.contiguous(), *outputs,
        num_pages, max_kv_len, num_splits, even, group, qk_scale(sm_scale, head_dim),
        PAGE_SIZE=page_size, DENSE=all(x.stride(0) == page_size * x.stride(1) for x in (k_pages, v_pages)),
        READ_AHEAD=read_ahead, PIECE=splits.PIECE, HEAD_DIM=head_dim, TILES=tiles,
        **split_config(q.dtype, head_dim, group),
    )  # fmt: skip
    merge_splits()
    return o, lse


def write_kv(k, v, k_pages, v_pages, slots):
    """Store new keys and values in their pages, in place: one read and one write of each.

    k, v [N, Hkv, D]; k_pages, v_pages [P, page_size, Hkv, D], same dtype, any strides; slots [N] int64 =
    page * page_size + offset. A negative slot is skipped (padding); so is one beyond the last page where values are not
    looked at, elsewhere it is an error. Two tokens must not share a slot. Raises ValueError naming the argument.
    """
    args.write_kv(k, v, k_pages, v_pages, slots)
    num_tokens, num_kv_heads, head_dim = k.shape
    num_pages, page_size = k_pages.shape[:2]
    if k.numel() == 0:
        return
    block_d = block_dim(head_dim)
    block_h = min(next_power_of_2(num_kv_heads), max(1, 1024 // block_d))  # 16 bytes a thread, or more
    _write_kv_kernel[(num_tokens, cdiv(num_kv_heads, block_h))](
        k, *k.stride(), v, *v.stride(), k_pages, *k_pages.stride(), v_pages, *v_pages.stride(), slots.contiguous(),
        num_pages * page_size, num_kv_heads,
        PAGE_SIZE=page_size, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_H=block_h, num_warps=2,
    )  # fmt: skip
