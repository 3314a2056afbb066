"""Attention of one step over a ragged batch: chunks of prompts and decodes in one launch, over keys in pages.

Padded to the longest chunk, a step of one prompt of 512 tokens and 63 decodes is 64 x 512 rows, of which 575 are real.
Here the queries of all sequences lie one after the other. A program owns a tile of queries of one sequence, times the
query heads that share a KV head, and finds out by itself which sequence that is. Where a step has few tiles, or some
sequences are much longer than others, keys are spread over several programs, as in Flash-Decoding.
"""

import functools

import torch
import triton
import triton.language as tl

from kernels._tile import attend_tile, cast, cdiv, device_properties, finish, next_power_of_2, qk_scale
from kernels.attention import attention_config
from kernels.flash_decoding import split_config, split_outputs, tiles_per_group
from kernels.paged_attention import length_of_pieces, pages_of_tile
from labkit import args, splits


@triton.jit
def _find_sequence(q_starts_ptr, tile, batch, steps, BLOCK_Q: tl.constexpr):
    """Which sequence the tile belongs to, and which of its tiles it is.

    Sequence b gets the tiles from q_starts[b] // BLOCK_Q + b on. That leaves room for every partial tile, grows with b,
    and needs no table: the sequence is found by halving [low, high) `steps` times. A tile that is left over comes
    after the last query of its sequence. As `find_seq_idx` of vLLM's Triton unified attention.
    """
    low, high = 0, batch
    for _ in range(steps):
        middle = (low + high) // 2
        first = tl.load(q_starts_ptr + middle) // BLOCK_Q + middle
        low = tl.where(first <= tile, middle, low)
        high = tl.where(first <= tile, high, middle)
    return low, tile - (tl.load(q_starts_ptr + low) // BLOCK_Q + low)


# What changes from step to step must not make Triton compile anew, as it does for a number that is 1 or divides by 16.
@triton.jit(do_not_specialize=[
    "stride_tb", "stride_lt", "stride_lh", "num_tokens", "batch", "steps", "max_kv_len", "num_splits", "even",
])  # fmt: skip
def _ragged_kernel(
    q_ptr, stride_qt, stride_qh, stride_qd,  # [N, Hq, D]
    k_ptr, stride_kp, stride_kn, stride_kh, stride_kd,  # [P, page_size, Hkv, D]
    v_ptr, stride_vp, stride_vn, stride_vh, stride_vd,  # [P, page_size, Hkv, D]
    table_ptr, stride_tb, stride_tp,  # [B, max_pages]
    q_starts_ptr, kv_lens_ptr,  # [B + 1], [B]
    o_ptr, stride_ot, stride_oh, stride_os, stride_od,  # [N, Hq, S, D] out
    lse_ptr, stride_lt, stride_lh, stride_ls,  # [N, Hq, S] out
    num_tokens, batch, steps, num_pages, max_kv_len, num_splits, even, num_heads, group, qk_scale,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    # The last tiles of a chunk see the most keys, and chunks come after decodes: start them first, for all heads.
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    tile, pid_h, pid_s = number // num_heads, (number % num_heads).to(tl.int64), tl.program_id(1)
    pid_b, tile = _find_sequence(q_starts_ptr, tile, batch, steps, BLOCK_Q)
    q_start = tl.load(q_starts_ptr + pid_b)
    q_len = tl.minimum(tl.load(q_starts_ptr + pid_b + 1), num_tokens) - q_start
    if tile * BLOCK_Q >= q_len:
        return
    kv_len = tl.minimum(tl.maximum(tl.load(kv_lens_ptr + pid_b), 0), max_kv_len)
    # Rows of the tile: BLOCK_Q queries times the heads of a group, GROUP being the next power of two.
    offs_m = tl.arange(0, BLOCK_Q * GROUP)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    query = tile * BLOCK_Q + offs_m // GROUP
    head = pid_h * group + offs_m % GROUP
    mask_d = offs_d < HEAD_DIM
    mask_m = (query < q_len) & (offs_m % GROUP < group)
    mask_q = mask_m[:, None] & mask_d[None, :]
    rows = (q_start + query).to(tl.int64)
    q_ptrs = q_ptr + (rows * stride_qt + head * stride_qh)[:, None] + offs_d[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=mask_q, other=0.0)

    position = query + kv_len - q_len  # bottom-right: the last query sits on the last key
    last = tl.minimum(tile * BLOCK_Q + BLOCK_Q, q_len) + kv_len - q_len
    end = tl.maximum(last, 0)  # no query of this tile sees a key from here on
    # Each tile is cut by the keys that it sees; late splits may be empty. Of those the merge reads nothing but lse.
    split_len = length_of_pieces(end, num_splits, even, PIECE, BLOCK_N)
    start = tl.minimum(pid_s * split_len, end)
    end = tl.minimum(start + split_len, end)
    table_ptr += pid_b.to(tl.int64) * stride_tb
    k_ptrs = k_ptr + pid_h // TILES * stride_kh + offs_d[None, :] * stride_kd
    v_ptrs = v_ptr + pid_h // TILES * stride_vh + offs_d[None, :] * stride_vd
    m = tl.full([BLOCK_Q * GROUP], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q * GROUP], tl.float32)
    acc = tl.zeros([BLOCK_Q * GROUP, BLOCK_D], tl.float32)
    next_page = pages_of_tile(table_ptr, stride_tp, start, end, PAGE_SIZE, BLOCK_N)
    for first in range(start, end, BLOCK_N):
        page = next_page
        next_page = pages_of_tile(table_ptr, stride_tp, first + BLOCK_N, end, PAGE_SIZE, BLOCK_N)
        key = first + offs_n
        mask_n = key < tl.where((page >= 0) & (page < num_pages), end, 0)  # one page may stand for all keys
        mask_kv = mask_n[:, None] & mask_d[None, :]
        page, offset = page.to(tl.int64), (key % PAGE_SIZE).to(tl.int64)  # a cache may hold more than 2^31 elements
        k = tl.load(k_ptrs + (offset * stride_kn + page * stride_kp)[:, None], mask=mask_kv, other=0.0)
        v = tl.load(v_ptrs + (offset * stride_vn + page * stride_vp)[:, None], mask=mask_kv, other=0.0)
        keep = mask_n[None, :] & (key[None, :] <= position[:, None])
        m, l, acc = attend_tile(q, k, v, keep, m, l, acc, qk_scale, True)
    o, lse = finish(m, l, acc)
    o_ptrs = o_ptr + (rows * stride_ot + head * stride_oh + pid_s * stride_os)[:, None] + offs_d[None, :] * stride_od
    tl.store(o_ptrs, cast(o, o_ptr.dtype.element_ty), mask=mask_q & ((pid_s == 0) | (start < end)))
    tl.store(lse_ptr + rows * stride_lt + head * stride_lh + pid_s * stride_ls, lse, mask=mask_m)


def ragged_config(dtype: torch.dtype, head_dim: int, group: int, only_decodes: bool) -> dict:
    """Tile sizes and launch options: those of prefill, or of decoding if no chunk is longer than one token.

    group: query heads of a KV head in one tile.
    """
    if only_decodes:
        config = split_config(dtype, head_dim, group)
        rows = config.pop("BLOCK_H")
    else:
        config = attention_config(dtype, head_dim)
        rows = config.pop("BLOCK_M")
        if config["BLOCK_D"] > 128:
            config["num_warps"] = 8
    group = next_power_of_2(group)
    return config | {"GROUP": group, "BLOCK_Q": max(1, rows // group)}


@functools.lru_cache(maxsize=4096)
def even_splits(num_programs: int, num_sms: int, max_kv_len: int, head_dim: int, only_decodes: bool) -> int:
    """Pieces of the keys that a step needs, at least, to fill a GPU. num_programs: with work, if nothing is cut.

    Decodes follow the rule of chapter 1. A tile of prefill has an SM for itself, and products enough to pay for the
    merge of its rows only with SPLIT_KEYS keys a piece or more.
    """
    if only_decodes:
        return splits.choose(num_programs, num_sms, max_kv_len, head_dim)
    return splits.num_splits_heuristic(num_programs, num_sms, cdiv(max_kv_len, SPLIT_KEYS))


SPLIT_KEYS = 512


def ragged_attention(q, k_pages, v_pages, block_table, q_starts, kv_lens, *, num_splits=None, sm_scale=None):
    """Causal attention of chunks of different lengths, one a sequence, over keys and values that lie in pages.

    q [N, Hq, D]: the queries of all sequences, one after the other; sequence b has those from q_starts[b] to
    q_starts[b + 1], perhaps none. k_pages, v_pages [P, page_size, Hkv, D], Hq a multiple of Hkv; any strides; fp16,
    bf16 or fp32; D up to 256; any page size. block_table [B, max_pages], q_starts [B + 1] and kv_lens [B] int32 on q's
    device. kv_lens count the chunk, whose keys are in their pages already. The mask is aligned bottom-right: a
    sequence's last query sits on its last key. A query that sees no key gets 0. sm_scale > 0 defaults to D ** -0.5.
    num_splits: pieces that the keys of every tile are cut into; None leaves it to `even_splits` for sequences that fill
    the table, and to `labkit.splits.offered` for some that are longer than the others.

    Page ids beyond kv_len are never read. Within it an id must lie in [0, P), and q_starts must rise from 0 to N:
    elsewhere it is an error on the CPU and under LAB_CHECK=1; where values are not looked at, a page that does not
    exist is as if its tokens were absent.

    Returns o [N, Hq, D] in q.dtype. Raises ValueError naming the argument. Source: selective batching (Yu et al., OSDI
    2022, section 3.2) over pages (Kwon et al., SOSP 2023), with the split over the keys of Flash-Decoding.
    """
    batch, num_q_heads, num_kv_heads, max_pages, head_dim = args.ragged(
        q, k_pages, v_pages, block_table, q_starts, kv_lens
    )
    args.num_splits(num_splits)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    if batch == 0 or o.numel() == 0:
        return o
    num_tokens, group, page_size = len(q), num_q_heads // num_kv_heads, k_pages.shape[1]
    only_decodes, max_kv_len = num_tokens <= batch, max_pages * page_size
    tiles = tiles_per_group(q.dtype, head_dim, group)
    group //= tiles
    config = ragged_config(q.dtype, head_dim, group, only_decodes)
    # No tile count is needed from the device: partial tiles are at most one a sequence.
    num_tiles, num_heads = num_tokens // config["BLOCK_Q"] + batch, num_kv_heads * tiles
    even = num_splits
    if num_splits is None:
        least = max(cdiv(num_tokens, config["BLOCK_Q"]), min(batch, num_tokens))  # tiles that have work
        num_sms = device_properties()["multiprocessor_count"]
        even = even_splits(least * num_heads, num_sms, max_kv_len, head_dim, only_decodes)
        num_splits = splits.offered(even, max_kv_len, 4 * o.numel())
    lse = torch.empty(num_tokens, num_q_heads, dtype=torch.float32, device=q.device)
    outputs, merge_splits = split_outputs(o, lse, num_splits, num_splits > even)
    _ragged_kernel[(num_tiles * num_heads, num_splits)](
        q, *q.stride(), k_pages, *k_pages.stride(), v_pages, *v_pages.stride(), block_table, *block_table.stride(),
        q_starts.contiguous(), kv_lens.contiguous(), *outputs,
        num_tokens, batch, batch.bit_length(), len(k_pages), max_kv_len, num_splits, even,
        num_heads, group, qk_scale(sm_scale, head_dim),
        PAGE_SIZE=page_size, HEAD_DIM=head_dim, TILES=tiles, PIECE=splits.PIECE, **config,
    )  # fmt: skip
    merge_splits()
    return o
