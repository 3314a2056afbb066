"""Causal attention over a chunk of queries (prefill): FlashAttention-2's forward pass, with sinks, window and lengths.

A program owns a tile of queries of one head and walks the keys that any of them may see. Keys left of the window and
right of the diagonal are never loaded; tiles that every query sees whole need no mask.
"""

import torch
import triton
import triton.language as tl

from kernels._tile import attend_tile, block_dim, cast, cdiv, device_properties, finish, has_tma, qk_scale
from labkit import args


@triton.jit
def _load_tile(
    source, stride_n, stride_d, first, end,  # one head's rows [L, D]
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + BLOCK_N): [BLOCK_N, BLOCK_D], and zeros beyond the head's columns and beyond the keys.

    source: with TMA a descriptor, which knows bounds and strides of all keys. Else a pointer; from `end` on nothing is
    read if MASKED, and without it `end` is not reached.
    """
    if TMA:
        tile = source.load([first, 0])
    else:
        offs_n = tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
        mask_d = (offs_d < HEAD_DIM)[None, :]
        rows = (first + offs_n).to(tl.int64)[:, None]
        ptrs = source + rows * stride_n + offs_d[None, :] * stride_d
        if MASKED:
            tile = tl.load(ptrs, mask=(rows < end) & mask_d, other=0.0)
        elif BLOCK_D == HEAD_DIM:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=mask_d, other=0.0)
    return tile


@triton.jit
def _walk(
    q, k, stride_kn, stride_kd, v, stride_vn, stride_vd,  # [BLOCK_M, D]; [L, D] of one head, as for _load_tile
    start, end, position, window, num_sinks, m, l, acc, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Attend to the keys [start, end); start is a multiple of BLOCK_N. Without MASKED every query sees all of them."""
    for first in range(start, end, BLOCK_N):
        key = (first + tl.arange(0, BLOCK_N))[None, :]
        keep = key < end  # end <= kv_len
        if MASKED and CAUSAL:
            keep = keep & (key <= position[:, None])
        if MASKED and WINDOW:
            keep = keep & ((key > position[:, None] - window) | (key < num_sinks))
        k_tile = _load_tile(k, stride_kn, stride_kd, first, end, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED, TMA)
        v_tile = _load_tile(v, stride_vn, stride_vd, first, end, HEAD_DIM, BLOCK_D, BLOCK_N, MASKED, TMA)
        m, l, acc = attend_tile(q, k_tile, v_tile, keep, m, l, acc, qk_scale, MASKED)
    return m, l, acc


@triton.jit
def _attention_kernel(
    q_ptr, stride_qb, stride_qt, stride_qh, stride_qd,  # [B, T, Hq, D]
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,  # [B, L, Hkv, D]
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,  # [B, L, Hkv, D]
    kv_lens_ptr,  # [B], read if HAS_LENS
    o_ptr, stride_ob, stride_ot, stride_oh, stride_od,  # [B, T, Hq, D] out
    q_len, max_kv_len, group, window, num_sinks, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_LENS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    # The last tiles see the most keys under a causal mask: start them first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    kv_len = max_kv_len
    if HAS_LENS:
        kv_len = tl.minimum(tl.maximum(tl.load(kv_lens_ptr + pid_b), 0), max_kv_len)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_q = (row < q_len)[:, None] & (offs_d < HEAD_DIM)[None, :]
    rows = row.to(tl.int64)[:, None]
    q_ptrs = q_ptr + pid_b * stride_qb + rows * stride_qt + head * stride_qh + offs_d[None, :] * stride_qd
    q = tl.load(q_ptrs, mask=mask_q, other=0.0)
    k = k_ptr + pid_b * stride_kb + head // group * stride_kh
    v = v_ptr + pid_b * stride_vb + head // group * stride_vh
    if TMA:  # rows from kv_len on and columns from HEAD_DIM on are read as 0; a tensor without rows is none
        shape = [tl.maximum(kv_len, 1), HEAD_DIM]
        k = tl.make_tensor_descriptor(k, shape, [stride_kn, 1], [BLOCK_N, BLOCK_D])
        v = tl.make_tensor_descriptor(v, shape, [stride_vn, 1], [BLOCK_N, BLOCK_D])

    offset = kv_len - q_len  # bottom-right: query i sits at key i + offset; below 0 it sees nothing
    position = row + offset
    first_position = tile * BLOCK_M + offset
    start, end, full_end = 0, kv_len, kv_len // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.maximum(tl.minimum(kv_len, first_position + BLOCK_M), 0)
        full_end = tl.minimum(tl.maximum(first_position + 1, 0) // BLOCK_N * BLOCK_N, full_end)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW:
        start = tl.minimum(tl.maximum(first_position - window + 1, 0), end) // BLOCK_N * BLOCK_N
        full_end = start
        m, l, acc = _walk(
            q, k, stride_kn, stride_kd, v, stride_vn, stride_vd, 0, tl.minimum(num_sinks, start),
            position, window, num_sinks, m, l, acc, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, True, True, TMA,
        )  # fmt: skip
    else:
        m, l, acc = _walk(
            q, k, stride_kn, stride_kd, v, stride_vn, stride_vd, 0, full_end,
            position, window, num_sinks, m, l, acc, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, False, False, TMA,
        )  # fmt: skip
    m, l, acc = _walk(
        q, k, stride_kn, stride_kd, v, stride_vn, stride_vd, full_end, end,
        position, window, num_sinks, m, l, acc, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, True, TMA,
    )  # fmt: skip
    o, _ = finish(m, l, acc)
    o_ptrs = o_ptr + pid_b * stride_ob + rows * stride_ot + head * stride_oh + offs_d[None, :] * stride_od
    tl.store(o_ptrs, cast(o, o_ptr.dtype.element_ty), mask=mask_q)


def attention_config(dtype: torch.dtype, head_dim: int) -> dict:
    """Tile sizes and launch options. 128 queries a tile where registers and shared memory allow it."""
    block_d = block_dim(head_dim)
    room = device_properties()["max_shared_mem"]
    if dtype == torch.float32:
        block_m, num_warps, num_stages = 32 if block_d <= 64 else 16, 4, 2 if block_d <= 128 else 1
        block_n = block_m
    elif room < 128 * 1024:
        block_m, block_n, num_warps, num_stages = 64, 32, 8 if block_d >= 128 else 4, 2
    elif block_d <= 128:
        block_m, block_n, num_warps, num_stages = 128, 64 if block_d <= 64 or room > 200_000 else 32, 8, 3
    else:
        block_m, block_n, num_warps, num_stages = 64, 64, 8, 2
    return dict(BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)


def prefill_config(dtype: torch.dtype, head_dim: int, readable: bool) -> dict:
    """`attention_config`, and larger tiles where the TMA fetches K and V. readable: `tma_can_read` both.

    Nobody computes addresses then, and the registers that held them hold scores.
    """
    config = attention_config(dtype, head_dim) | {"TMA": False}
    if readable and dtype != torch.float32 and has_tma() and device_properties()["max_shared_mem"] > 200_000:
        config["TMA"] = True
        if config["BLOCK_D"] == 128:
            config |= {"BLOCK_N": 128, "num_stages": 3}
        elif config["BLOCK_D"] == 256 and head_dim % 16 == 0:  # else q is loaded piece by piece, which takes registers
            config |= {"BLOCK_M": 128, "num_stages": 2}
    return config


def tma_can_read(x) -> bool:
    """Whether x [B, L, H, D] suits the TMA: D contiguous, every row at a multiple of 16 bytes, and rows apart."""
    *outer, inner = x.stride()
    places = [x.data_ptr(), *(stride * x.element_size() for stride in outer)]
    return inner == 1 and outer[1] > 0 and all(place % 16 == 0 for place in places)


def _scratch(size: int, alignment: int, stream: int | None):
    """Memory on the device for a launch's descriptors, which its programs write themselves.

    Triton has one allocator for all kernels of a thread: a launch puts this one in the place of whatever was set.
    """
    return torch.empty(size, dtype=torch.int8, device="cuda")


def attention(q, k, v, *, causal=True, window=None, num_sinks=0, sm_scale=None, kv_lens=None):
    """Attention of a chunk of queries, as in prefill. As `labkit.attention.attention`.

    q [B, T, Hq, D]; k, v [B, L, Hkv, D], any strides; fp16, bf16 or fp32; D up to 256. kv_lens [B] int32 on q's
    device, all L keys if None. The mask is aligned bottom-right: query i sits at position kv_lens - T + i. window
    (only with causal) keeps the last `window` keys, the token itself included, and the first num_sinks. A query that
    sees nothing gets 0. sm_scale > 0 defaults to D ** -0.5. On an H100, H200 or B200 the TMA fetches k and v, if it
    can read them. Returns o [B, T, Hq, D] in q.dtype. Raises ValueError naming the argument.
    Source: Dao 2023, FlashAttention-2, Algorithm 1 (with the rescaling factor e^(m_old - m_new), not its inverse).
    """
    batch, q_len, num_q_heads, num_kv_heads, max_kv_len, head_dim = args.prefill(
        q, k, v, kv_lens, causal, window, num_sinks
    )
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    if o.numel() == 0:
        return o
    config = prefill_config(q.dtype, head_dim, tma_can_read(k) and tma_can_read(v))
    if config["TMA"]:
        triton.set_allocator(_scratch)
    _attention_kernel[(cdiv(q_len, config["BLOCK_M"]), num_q_heads, batch)](
        q, *q.stride(), k, *k.stride(), v, *v.stride(), q if kv_lens is None else kv_lens.contiguous(), o, *o.stride(),
        q_len, max_kv_len, num_q_heads // num_kv_heads, window or 0, num_sinks,
        qk_scale(sm_scale, head_dim), HEAD_DIM=head_dim, CAUSAL=causal, WINDOW=window is not None,
        HAS_LENS=kv_lens is not None, **config,
    )  # fmt: skip
    return o
