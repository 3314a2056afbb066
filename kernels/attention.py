"""Causal attention over a chunk of queries (prefill): FlashAttention-2's forward pass, with sinks, window and lengths.

A program owns a tile of queries of one head and walks the keys that any of them may see. Keys left of the window and
right of the diagonal are never loaded; tiles that every query sees whole need no mask.
"""

import torch
import triton
import triton.language as tl

from kernels._tile import LOG2E, attend_tile, block_dim, cast, device_properties, finish
from labkit import args


@triton.jit
def _walk(
    q, k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd,  # [BLOCK_M, D]; [L, D] of one head
    start, end, position, window, num_sinks, m, l, acc, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to the keys [start, end); start is a multiple of BLOCK_N. Without MASKED every query sees all of them."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = (offs_d < HEAD_DIM)[None, :]
    for first in range(start, end, BLOCK_N):
        key = first + offs_n
        rows = key.to(tl.int64)[:, None]
        k_ptrs = k_ptr + rows * stride_kn + offs_d[None, :] * stride_kd
        v_ptrs = v_ptr + rows * stride_vn + offs_d[None, :] * stride_vd
        keep = (key < end)[None, :]  # end <= kv_len
        if MASKED:
            mask_kv = (key < end)[:, None] & mask_d
            k = tl.load(k_ptrs, mask=mask_kv, other=0.0)
            v = tl.load(v_ptrs, mask=mask_kv, other=0.0)
            if CAUSAL:
                keep = keep & (key[None, :] <= position[:, None])
            if WINDOW:
                keep = keep & ((key[None, :] > position[:, None] - window) | (key < num_sinks)[None, :])
        elif BLOCK_D == HEAD_DIM:
            k, v = tl.load(k_ptrs), tl.load(v_ptrs)
        else:
            k = tl.load(k_ptrs, mask=mask_d, other=0.0)
            v = tl.load(v_ptrs, mask=mask_d, other=0.0)
        m, l, acc = attend_tile(q, k, v, keep, m, l, acc, qk_scale, MASKED)
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
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_LENS: tl.constexpr,
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
    k_ptr += pid_b * stride_kb + head // group * stride_kh
    v_ptr += pid_b * stride_vb + head // group * stride_vh

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
            q, k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd, 0, tl.minimum(num_sinks, start),
            position, window, num_sinks, m, l, acc, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, True, True,
        )  # fmt: skip
    else:
        m, l, acc = _walk(
            q, k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd, 0, full_end,
            position, window, num_sinks, m, l, acc, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, False, False,
        )  # fmt: skip
    m, l, acc = _walk(
        q, k_ptr, stride_kn, stride_kd, v_ptr, stride_vn, stride_vd, full_end, end,
        position, window, num_sinks, m, l, acc, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, WINDOW, True,
    )  # fmt: skip
    o, _ = finish(m, l, acc)
    o_ptrs = o_ptr + pid_b * stride_ob + rows * stride_ot + head * stride_oh + offs_d[None, :] * stride_od
    tl.store(o_ptrs, cast(o, o_ptr.dtype.element_ty), mask=mask_q)


def attention_config(dtype: torch.dtype, head_dim: int) -> dict:
    """Tile sizes and launch options. 128 queries a tile where registers and shared memory allow it."""
    block_d = block_dim(head_dim)
    room = device_properties()["max_shared_mem"]
    if dtype == torch.float32:
        block_m, block_n, num_warps, num_stages = (32, 32, 4, 2) if block_d <= 64 else (16, 16, 4, 2)
    elif room < 128 * 1024:
        block_m, block_n, num_warps, num_stages = 64, 32, 8 if block_d == 128 else 4, 2
    elif block_d <= 128:
        block_m, block_n, num_warps, num_stages = 128, 64 if block_d <= 64 or room > 200_000 else 32, 8, 3
    else:
        block_m, block_n, num_warps, num_stages = 64, 64, 8, 2
    return dict(BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages)


def attention(q, k, v, *, causal=True, window=None, num_sinks=0, sm_scale=None, kv_lens=None):
    """Attention of a chunk of queries, as in prefill. As `labkit.attention.attention`.

    q [B, T, Hq, D]; k, v [B, L, Hkv, D], any strides; fp16, bf16 or fp32; D up to 256. kv_lens [B] int32 on q's
    device, all L keys if None. The mask is aligned bottom-right: query i sits at position kv_lens - T + i. window
    (only with causal) keeps the last `window` keys, the token itself included, and the first num_sinks. A query that
    sees nothing gets 0. Returns o [B, T, Hq, D] in q.dtype. Raises ValueError naming the argument.
    Source: Dao 2023, FlashAttention-2, Algorithm 1 (with the rescaling factor e^(m_old - m_new), not its inverse).
    """
    batch, q_len, num_q_heads, num_kv_heads, max_kv_len, head_dim = args.prefill(
        q, k, v, kv_lens, causal, window, num_sinks
    )
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    if o.numel() == 0:
        return o
    config = attention_config(q.dtype, head_dim)
    _attention_kernel[(triton.cdiv(q_len, config["BLOCK_M"]), num_q_heads, batch)](
        q, *q.stride(), k, *k.stride(), v, *v.stride(), q if kv_lens is None else kv_lens.contiguous(), o, *o.stride(),
        q_len, max_kv_len, num_q_heads // num_kv_heads, window or 0, num_sinks,
        args.scale(sm_scale, head_dim) * LOG2E.value, HEAD_DIM=head_dim, CAUSAL=causal, WINDOW=window is not None,
        HAS_LENS=kv_lens is not None, **config,
    )  # fmt: skip
    return o
