"""Rotary positions (RoPE) for q and k in one launch, and everything from the QKV product to the cache in one launch."""

import math

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels._tile import cast, cdiv, next_power_of_2
from labkit import args


@triton.jit
def _rotate_heads(
    x_ptr, stride_xh, stride_xd, bias_ptr, y_ptr, stride_yh, stride_yd, cos_a, sin_a, cos_b, sin_b, head, num_heads,
    stored, HALF: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """y = rotated (x + bias) for some heads [BLOCK_H] of one token: pairs (d, d + D/2); angles [BLOCK_D].

    stored: whether y is written; only the stores wait for it.
    """
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    head = head[:, None]
    mask = (head < num_heads) & (offs_d < HALF)
    half = tl.full((), HALF, tl.int64)
    at = head.to(tl.int64) * stride_xh + offs_d * stride_xd
    a = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + half * stride_xd, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        a += tl.load(bias_ptr + head * (2 * HALF) + offs_d, mask=mask, other=0.0).to(tl.float32)
        b += tl.load(bias_ptr + head * (2 * HALF) + offs_d + HALF, mask=mask, other=0.0).to(tl.float32)
    if ROTATE:
        a, b = a * cos_a[None, :] - b * sin_a[None, :], b * cos_b[None, :] + a * sin_b[None, :]
    at = head.to(tl.int64) * stride_yh + offs_d * stride_yd
    mask = mask & stored
    tl.store(y_ptr + at, cast(a, y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + at + half * stride_yd, cast(b, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr, stride_qb, stride_qt, stride_qh, stride_qd,  # [B, T, Hq, D]
    k_ptr, stride_kb, stride_kt, stride_kh, stride_kd,  # [B, T, Hkv, D]
    cos_ptr, stride_cb, stride_ct, stride_cd,  # [B, T, D/2], or [B, T, D] if FULL
    sin_ptr, stride_sb, stride_st, stride_sd,  # likewise
    q_out_ptr, stride_qob, stride_qot, stride_qoh, stride_qod,  # [B, T, Hq, D] out; may be q
    k_out_ptr, stride_kob, stride_kot, stride_koh, stride_kod,  # [B, T, Hkv, D] out; may be k
    length, num_q_heads, num_kv_heads, sign,
    HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One token and BLOCK_H heads: first the blocks of query heads, then those of key heads."""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // length, token % length
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    cos_ptrs = cos_ptr + b * stride_cb + t * stride_ct + offs_d * stride_cd
    sin_ptrs = sin_ptr + b * stride_sb + t * stride_st + offs_d * stride_sd
    cos = tl.load(cos_ptrs, mask=offs_d < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptrs, mask=offs_d < HALF, other=0.0).to(tl.float32) * sign
    if FULL:
        half = tl.full((), HALF, tl.int64)
        cos_b = tl.load(cos_ptrs + half * stride_cd, mask=offs_d < HALF, other=0.0).to(tl.float32)
        sin_b = tl.load(sin_ptrs + half * stride_sd, mask=offs_d < HALF, other=0.0).to(tl.float32) * sign
    else:
        cos_b, sin_b = cos, sin
    block, q_blocks = tl.program_id(1), tl.cdiv(num_q_heads, BLOCK_H)
    if block < q_blocks:
        _rotate_heads(
            q_ptr + b * stride_qb + t * stride_qt, stride_qh, stride_qd, q_ptr,
            q_out_ptr + b * stride_qob + t * stride_qot, stride_qoh, stride_qod,
            cos, sin, cos_b, sin_b, block * BLOCK_H + tl.arange(0, BLOCK_H), num_q_heads,
            True, HALF, BLOCK_D, False, True,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr + b * stride_kb + t * stride_kt, stride_kh, stride_kd, k_ptr,
            k_out_ptr + b * stride_kob + t * stride_kot, stride_koh, stride_kod,
            cos, sin, cos_b, sin_b, (block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H), num_kv_heads,
            True, HALF, BLOCK_D, False, True,
        )  # fmt: skip


@triton.jit
def _rope_write_kv_kernel(
    qkv_ptr, stride_xn, stride_xd,  # [N, (Hq + 2 Hkv) D]
    bias_ptr,  # [(Hq + 2 Hkv) D], read if HAS_BIAS
    cos_ptr, stride_cn, stride_cd, sin_ptr, stride_sn, stride_sd,  # two [N, D/2]
    q_ptr, stride_qn, stride_qh,  # [N, Hq, D] out
    k_pages_ptr, stride_kpp, stride_kpn, stride_kph, stride_kpd,  # [P, page_size, Hkv, D] out
    v_pages_ptr, stride_vpp, stride_vpn, stride_vph, stride_vpd,  # [P, page_size, Hkv, D] out
    slots_ptr,  # [N]
    num_slots, num_q_heads, num_kv_heads,
    PAGE_SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One token and BLOCK_H heads: blocks of query heads, then of keys, then of values."""
    token = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    cos = tl.load(cos_ptr + token * stride_cn + offs_d * stride_cd, mask=offs_d < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * stride_sn + offs_d * stride_sd, mask=offs_d < HALF, other=0.0).to(tl.float32)
    slot = tl.load(slots_ptr + token)
    page, offset, there = slot // PAGE_SIZE, slot % PAGE_SIZE, (slot >= 0) & (slot < num_slots)
    block, q_blocks, kv_blocks = tl.program_id(1), tl.cdiv(num_q_heads, BLOCK_H), tl.cdiv(num_kv_heads, BLOCK_H)
    stride_h = tl.full((), 2 * HALF, tl.int64) * stride_xd
    x_ptr = qkv_ptr + token * stride_xn
    if block < q_blocks:
        _rotate_heads(
            x_ptr, stride_h, stride_xd, bias_ptr, q_ptr + token * stride_qn, stride_qh, 1,
            cos, sin, cos, sin, block * BLOCK_H + tl.arange(0, BLOCK_H), num_q_heads,
            True, HALF, BLOCK_D, HAS_BIAS, True,
        )  # fmt: skip
    elif block < q_blocks + kv_blocks:
        _rotate_heads(
            x_ptr + num_q_heads * stride_h, stride_h, stride_xd, bias_ptr + num_q_heads * 2 * HALF,
            k_pages_ptr + page * stride_kpp + offset * stride_kpn, stride_kph, stride_kpd,
            cos, sin, cos, sin, (block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H), num_kv_heads,
            there, HALF, BLOCK_D, HAS_BIAS, True,
        )  # fmt: skip
    else:
        before = num_q_heads + num_kv_heads
        _rotate_heads(
            x_ptr + before * stride_h, stride_h, stride_xd, bias_ptr + before * 2 * HALF,
            v_pages_ptr + page * stride_vpp + offset * stride_vpn, stride_vph, stride_vpd,
            cos, sin, cos, sin, (block - q_blocks - kv_blocks) * BLOCK_H + tl.arange(0, BLOCK_H), num_kv_heads,
            there, HALF, BLOCK_D, HAS_BIAS, False,
        )  # fmt: skip


def fresh(x):
    """An output as large as x, contiguous, not yet written."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _ForwardOnly(torch.autograd.Function):
    """So that a missing backward is an error, not a gradient that is silently missing."""

    @staticmethod
    def forward(ctx, name, function, *inputs):
        ctx.name = name
        return function(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(f"{ctx.name} has no backward kernel: use it under torch.no_grad()")


def wants_grad(*tensors):
    """True if autograd will ask for the gradient of one of the tensors (None: no tensor)."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def forward_only(name, function, *inputs):
    """function(*inputs); a backward pass through it raises an error that names `name`."""
    return _ForwardOnly.apply(name, function, *inputs) if wants_grad(*inputs) else function(*inputs)


def _one_batch(x):
    """x [..., T, H, D] as [B, T, H, D]: a view wherever the strides allow one."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _turn(q, k, cos, sin, sign, q_out, k_out):
    """Rotate by sign times the angles. All q and k [..., len, H, D]; the leading dimensions are seen as one batch."""
    length, heads, dim = q.shape[-3], (q.shape[-2], k.shape[-2]), q.shape[-1]
    if q.numel() + k.numel():
        inputs = []
        for x in (q, k, cos, sin, q_out, k_out):
            if x is cos or x is sin:
                x = x.expand(*q.shape[:-2], x.shape[-1]).reshape(math.prod(q.shape[:-3]), length, x.shape[-1])
            else:
                x = _one_batch(x)
            inputs += [x, *x.stride()]
        block_d = next_power_of_2(dim // 2)
        block_h = min(next_power_of_2(max(heads)), max(1, 2048 // block_d))
        tokens = (q.numel() + k.numel()) // (sum(heads) * dim)
        _rope_kernel[(tokens, sum(cdiv(h, block_h) for h in heads))](
            *inputs, length, *heads, sign,
            HALF=dim // 2, BLOCK_D=block_d, BLOCK_H=block_h, FULL=cos.shape[-1] == dim, num_warps=4,
        )  # fmt: skip
    return q_out, k_out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(q, k, cos, sin, 1.0, fresh(q), fresh(k))

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        if cos.shape[-1] == dq.shape[-1]:  # the transpose exchanges the two halves' sines
            sin = sin.roll(sin.shape[-1] // 2, -1)
        return *_turn(dq, dk, cos, sin, -1.0, fresh(dq), fresh(dk)), None, None


def rope(q, k, cos, sin, *, inplace=False):
    """Turn the pairs (d, d + D/2) of q and k by their position's angles, both in one launch. With gradient.

    q [..., len, Hq, D], k [..., len, Hkv, D], any strides, D even; cos, sin [len, D/2] or [..., len, D/2], fp32 or q's
    dtype; or D wide, as Hugging Face has them: each half is then turned by its own columns. inplace: write over q and
    k, which then must not require gradients. Returns (q, k).
    Raises ValueError naming the argument. Source: Su et al. 2021, section 3.4.2, paired as Hugging Face's Llama.
    """
    args.rope(q, k, cos, sin)
    if inplace:
        for name, x in {"q": q, "k": k}.items():
            shared = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape))
            viewable = _one_batch(x).data_ptr() == x.data_ptr()
            args.expect(viewable and not shared, f"{name} (strides)", x.stride(), "strides that can be written through")
            args.expect(not wants_grad(x), name, "a tensor that requires gradients", "none with inplace=True")
        return _turn(q, k, cos, sin, 1.0, q, k)
    if wants_grad(q, k):
        return _Rope.apply(q, k, cos, sin)
    return _turn(q, k, cos, sin, 1.0, fresh(q), fresh(k))


def rope_write_kv(qkv, bias, cos, sin, k_pages, v_pages, slots):
    """All that stands between the QKV product and attention, in one launch: split, bias, rotation, and the cache write.

    qkv [N, (Hq + 2 Hkv) D], any strides; bias as wide, or None; cos, sin [N, D/2] of the tokens' positions; k_pages,
    v_pages [P, page_size, Hkv, D], written in place; slots [N] int64 = page * page_size + offset. A negative slot is
    skipped, as in `write_kv`; so is one beyond the last page where values are not looked at.

    Returns q [N, Hq, D], rotated. Raises ValueError naming the argument.
    """
    num_tokens, num_q_heads, num_kv_heads, dim = args.rope_write_kv(qkv, bias, cos, sin, k_pages, v_pages, slots)

    def launch(qkv, bias):
        q = torch.empty(num_tokens, num_q_heads, dim, dtype=qkv.dtype, device=qkv.device)
        block_d = next_power_of_2(dim // 2)
        block_h = min(next_power_of_2(num_q_heads), max(1, 2048 // block_d))
        blocks = cdiv(num_q_heads, block_h) + 2 * cdiv(num_kv_heads, block_h)
        if num_tokens:
            _rope_write_kv_kernel[(num_tokens, blocks)](
                qkv, *qkv.stride(), qkv if bias is None else bias.contiguous(), cos, *cos.stride(), sin, *sin.stride(),
                q, *q.stride()[:2], k_pages, *k_pages.stride(), v_pages, *v_pages.stride(), slots.contiguous(),
                k_pages.shape[0] * k_pages.shape[1], num_q_heads, num_kv_heads,
                PAGE_SIZE=k_pages.shape[1], HALF=dim // 2, BLOCK_D=block_d, BLOCK_H=block_h,
                HAS_BIAS=bias is not None, num_warps=4,
            )  # fmt: skip
        return q

    return forward_only("rope_write_kv", launch, qkv, bias)
