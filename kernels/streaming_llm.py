"""StreamingLLM's decode step: attention over the sinks and the window, which lie in a ring of slots.

The ring holds keys before rotation. A token's position is its place in the cache, and that changes with every step, so
the kernel rotates each tile of keys on its way to the dot product. Nothing is moved and nothing written back: a step
reads num_sinks + window keys and values, however long the stream is.
"""

import torch
import triton
import triton.language as tl

from kernels._tile import block_dim, cast, device_properties, dot, finish, qk_scale, softmax_step, splits_or_default
from kernels.flash_decoding import (  # flash_decoding: timed beside sink_decoding, under this topic's name
    flash_decoding,  # noqa: F401
    split_config,
    split_outputs,
    store_split,
    tiles_per_group,
)
from labkit import args


@triton.jit
def _slot_of(position, seen, num_sinks, window):
    """The slot of the token at each position of the cache. Sinks stay; the window begins at its oldest token."""
    oldest = tl.where(seen > num_sinks + window, (seen - num_sinks) % window, 0)
    place = position - num_sinks + oldest
    place -= tl.where(place >= window, window, 0)
    return tl.where(position < num_sinks, position, num_sinks + place)


@triton.jit
def _load_rotated(
    x_ptrs, stride_xd,  # [N, BLOCK_R] pointers to the first half of each row
    cos, sin,  # [N, BLOCK_R] or [1, BLOCK_R]
    mask,
    HALF: tl.constexpr,
):  # fmt: skip
    """Rows of heads, rotated by their angles: both halves [N, BLOCK_R], in the dtype of x."""
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    a = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptrs + tl.full((), HALF, tl.int64) * stride_xd, mask=mask, other=0.0).to(tl.float32)
    return cast(a * cos - b * sin, dtype), cast(b * cos + a * sin, dtype)


@triton.jit
def _load_angles(ptr, stride_n, stride_d, first, end, HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows first to end of cos or sin, as [BLOCK_N, BLOCK_R] fp32.

    A tile of the shape of K's would be loaded as K is, 8 columns a thread: in fp32 these are 32 bytes, and every access
    would fetch sectors of which it takes one half. As a tile of another shape a thread takes 16 bytes beside its
    neighbour's.
    """
    half_rows, offs_r = tl.arange(0, 2 * BLOCK_N), tl.arange(0, BLOCK_R // 2).to(tl.int64)
    rows, skipped = first + half_rows // 2, half_rows % 2 * (BLOCK_R // 2)
    row_ptrs = ptr + rows.to(tl.int64) * stride_n + skipped.to(tl.int64) * stride_d
    mask = (rows < end)[:, None] & (offs_r[None, :] < (HALF - skipped)[:, None])
    x = tl.load(row_ptrs[:, None] + offs_r[None, :] * stride_d, mask=mask, other=0.0)
    return tl.reshape(x, [BLOCK_N, BLOCK_R])


@triton.jit
def _sink_split_kernel(
    q_ptr, stride_qb, stride_qh, stride_qd,  # [B, Hq, D]
    k_ptr, stride_kb, stride_kn, stride_kh, stride_kd,  # [B, num_sinks + window, Hkv, D]
    v_ptr, stride_vb, stride_vn, stride_vh, stride_vd,  # [B, num_sinks + window, Hkv, D]
    seen_ptr,  # [B]
    cos_ptr, stride_cn, stride_cd,  # [num_sinks + window, D / 2] fp32
    sin_ptr, stride_sn, stride_sd,  # [num_sinks + window, D / 2] fp32
    o_ptr, stride_ob, stride_oh, stride_os, stride_od,  # [B, Hq, S, D] out
    lse_ptr, stride_lb, stride_lh, stride_ls,  # [B, Hq, S] out
    num_sinks, window, num_splits, group, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    pid_s = tl.program_id(0)
    pid_h = tl.program_id(1).to(tl.int64)
    pid_b = tl.program_id(2).to(tl.int64)
    HALF: tl.constexpr = HEAD_DIM // 2
    offs_h = tl.arange(0, BLOCK_H)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_h = offs_h < group
    mask_d = offs_d < HEAD_DIM
    mask_r = (offs_r < HALF)[None, :]
    head = pid_h * group + offs_h

    seen = tl.maximum(tl.load(seen_ptr + pid_b), 0)
    held = tl.minimum(seen, num_sinks + window)
    last = tl.maximum(held - 1, 0).to(tl.int64)  # the current token's position
    q_ptrs = q_ptr + pid_b * stride_qb + head[:, None] * stride_qh + offs_r[None, :] * stride_qd
    q_cos = tl.load(cos_ptr + last * stride_cn + offs_r * stride_cd, mask=offs_r < HALF, other=0.0)[None, :]
    q_sin = tl.load(sin_ptr + last * stride_sn + offs_r * stride_sd, mask=offs_r < HALF, other=0.0)[None, :]
    q_a, q_b = _load_rotated(q_ptrs, stride_qd, q_cos, q_sin, mask_h[:, None] & mask_r, HALF)

    # The keys are walked, and cut into splits, in the order of their positions.
    split_len = tl.cdiv(tl.cdiv(held, BLOCK_N), num_splits) * BLOCK_N
    start = tl.minimum(pid_s * split_len, held)
    end = tl.minimum(start + split_len, held)
    k_ptr += pid_b * stride_kb + pid_h // TILES * stride_kh
    v_ptr += pid_b * stride_vb + pid_h // TILES * stride_vh
    m = tl.full([BLOCK_H], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_N):
        position = first + offs_n
        mask_n = position < end
        slot = _slot_of(position, seen, num_sinks, window).to(tl.int64)[:, None]
        k_cos = _load_angles(cos_ptr, stride_cn, stride_cd, first, end, HALF, BLOCK_N, BLOCK_R)
        k_sin = _load_angles(sin_ptr, stride_sn, stride_sd, first, end, HALF, BLOCK_N, BLOCK_R)
        mask_k = mask_n[:, None] & mask_r
        k_ptrs = k_ptr + slot * stride_kn + offs_r[None, :] * stride_kd
        k_a, k_b = _load_rotated(k_ptrs, stride_kd, k_cos, k_sin, mask_k, HALF)
        v_ptrs = v_ptr + slot * stride_vn + offs_d[None, :] * stride_vd
        v = tl.load(v_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        s = dot(q_a, tl.trans(k_a)) + dot(q_b, tl.trans(k_b))
        p, alpha, m, l = softmax_step(tl.where(mask_n[None, :], s, float("-inf")), m, l, qk_scale)
        acc = acc * alpha[:, None] + dot(cast(p, v.dtype), v)
    o, lse = finish(m, l, acc)

    store_split(
        o, lse, o_ptr, stride_ob, stride_oh, stride_os, stride_od, lse_ptr, stride_lb, stride_lh, stride_ls,
        pid_b, pid_h, pid_s, group, HEAD_DIM, BLOCK_D, BLOCK_H,
    )  # fmt: skip


def sink_config(dtype: torch.dtype, head_dim: int, group: int) -> dict:
    """Tile sizes and launch options: as for `flash_decoding`, with room for the angles beside K and V."""
    config = split_config(dtype, head_dim, group)
    block_d = config["BLOCK_D"]
    if dtype == torch.float32:  # exact fp32 products are made without the matrix unit and need many registers
        config["BLOCK_N"] = 32 if block_d <= 64 else 16
    else:
        room = device_properties()["max_shared_mem"] // 2  # two programs an SM
        key_bytes = 2 * block_d * dtype.itemsize + block_d * 4
        sizes = ((n, s) for n, s in ((64, 3), (32, 3), (32, 2)) if (s - 1) * n * key_bytes <= room)
        config["BLOCK_N"], config["num_stages"] = next(sizes, (16, 2))
    return config | {"BLOCK_R": block_dim(head_dim // 2)}


def sink_decoding(
    q, k_ring, v_ring, seen, *, num_sinks, window, cos, sin, sm_scale=None, num_splits=None
):  # fmt: skip
    """One new token a sequence attends to its sinks and its window. As `labkit.streaming_llm.sink_decoding`.

    q [B, Hq, D] before rotation; k_ring, v_ring [B, num_sinks + window, Hkv, D], keys before rotation, Hq a multiple of
    Hkv, any strides; fp16, bf16 or fp32; D even, up to 256. Token i of a sequence lies in slot i if i < num_sinks, else
    in num_sinks + (i - num_sinks) % window. seen [B] int32 on q's device: tokens so far, the current one included,
    which is already in the ring (where values are not looked at, a negative one counts as 0). cos, sin
    [num_sinks + window or more, D / 2] fp32. num_splits None leaves the split over the keys to `labkit.splits.choose`.
    sm_scale > 0 defaults to D ** -0.5.

    Returns o [B, Hq, D] in q.dtype and lse [B, Hq] fp32 (natural log); a sequence that has seen nothing gives 0 and
    -inf. Raises ValueError naming the argument. Source: Xiao et al., "Efficient streaming language models with
    attention sinks" (ICLR 2024), section 3.2.
    """
    batch, num_q_heads, num_kv_heads, head_dim = args.ring(q, k_ring, v_ring, seen, num_sinks, window, cos, sin)
    args.num_splits(num_splits)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_q_heads, dtype=torch.float32, device=q.device)
    if batch == 0:
        return o, lse
    num_splits = splits_or_default(num_splits, batch * num_kv_heads, num_sinks + window, head_dim)
    group = num_q_heads // num_kv_heads
    tiles = tiles_per_group(q.dtype, head_dim, group)
    group //= tiles
    outputs, merge_splits = split_outputs(o, lse, num_splits)
    _sink_split_kernel[(num_splits, num_kv_heads * tiles, batch)](
        q, *q.stride(), k_ring, *k_ring.stride(), v_ring, *v_ring.stride(), seen.contiguous(),
        cos, *cos.stride(), sin, *sin.stride(), *outputs,
        num_sinks, window, num_splits, group, qk_scale(sm_scale, head_dim),
        HEAD_DIM=head_dim, TILES=tiles, **sink_config(q.dtype, head_dim, group),
    )  # fmt: skip
    merge_splits()
    return o, lse
