"""Operators fused: between two matrix products a tensor is read once and written once, whatever is done to it.

Everything here is limited by memory. So each kernel loads a tile, computes in fp32, and stores what the next product
needs; intermediates stay in registers. Backward kernels compute again what they need instead of loading it.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from kernels import attention as prefill
from kernels._tile import (
    LOG2E,
    cast,
    cdiv,
    device_properties,
    finite,
    next_power_of_2,
    own_max,
    own_sum,
    thread_view,
)
from kernels.flash_decoding import flash_decoding
from kernels.flash_decoding_pp import gemv_config
from kernels.rope import forward_only, fresh, rope, rope_write_kv, wants_grad  # noqa: F401
from labkit import args

# Elements of a row that fit in registers; longer rows are read twice. The backward pass holds five rows at a time.
WHOLE_ROW, WHOLE_ROW_BACKWARD = 16_384, 8192


# ---- a row at a time: residual add, RMSNorm, softmax


@triton.jit
def _load(ptr, stride_m, stride_n, rows, cols, mask, other=0.0):
    """A tile [BLOCK_M, BLOCK_N] in fp32; `other` where the mask is False."""
    at = rows[:, None] * stride_m + cols[None, :].to(tl.int64) * stride_n
    return tl.load(ptr + at, mask=mask, other=other).to(tl.float32)


@triton.jit
def _store(ptr, stride_m, stride_n, rows, cols, mask, x):
    at = rows[:, None] * stride_m + cols[None, :].to(tl.int64) * stride_n
    tl.store(ptr + at, cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _residual_tile(
    x_ptr, stride_xm, stride_xn, r_ptr, stride_rm, stride_rn, rows, cols, mask, HAS_RESIDUAL: tl.constexpr
):  # fmt: skip
    """x, or x + residual as it will be stored: rounded, so that y is the norm of the residual that is returned."""
    s = _load(x_ptr, stride_xm, stride_xn, rows, cols, mask)
    if HAS_RESIDUAL:
        s += _load(r_ptr, stride_rm, stride_rn, rows, cols, mask)
        s = cast(s, x_ptr.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def _rmsnorm_kernel(
    x_ptr, stride_xm, stride_xn,  # [M, N]
    r_ptr, stride_rm, stride_rn,  # [M, N], read if HAS_RESIDUAL
    w_ptr, stride_wn,  # [N]
    y_ptr, s_ptr, stride_m,  # two [M, N] out; s = x + residual is written if HAS_RESIDUAL
    m, n, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    if WHOLE:
        mask = (rows < m)[:, None] & (cols < n)[None, :]
        # Asked for before the sum, at whose barriers all wait: one latency of memory instead of two.
        w = tl.load(w_ptr + cols.to(tl.int64) * stride_wn, mask=cols < n, other=0.0).to(tl.float32)
        s = _residual_tile(x_ptr, stride_xm, stride_xn, r_ptr, stride_rm, stride_rn, rows, cols, mask, HAS_RESIDUAL)
        rstd = tl.rsqrt(tl.sum(s * s, 1) / n + eps)
        if HAS_RESIDUAL:
            _store(s_ptr, stride_m, 1, rows, cols, mask, s)
        _store(y_ptr, stride_m, 1, rows, cols, mask, s * rstd[:, None] * w[None, :])
    else:
        square = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, n, BLOCK_N):
            mask = (rows < m)[:, None] & (first + cols < n)[None, :]
            s = _residual_tile(
                x_ptr, stride_xm, stride_xn, r_ptr, stride_rm, stride_rn, rows, first + cols, mask, HAS_RESIDUAL
            )  # fmt: skip
            square += s * s
        rstd = tl.rsqrt(tl.sum(square, 1) / n + eps)
        for first in range(0, n, BLOCK_N):
            mask = (rows < m)[:, None] & (first + cols < n)[None, :]
            s = _residual_tile(
                x_ptr, stride_xm, stride_xn, r_ptr, stride_rm, stride_rn, rows, first + cols, mask, HAS_RESIDUAL
            )  # fmt: skip
            if HAS_RESIDUAL:
                _store(s_ptr, stride_m, 1, rows, first + cols, mask, s)
            w = tl.load(w_ptr + (first + cols).to(tl.int64) * stride_wn, mask=first + cols < n, other=0.0)
            _store(y_ptr, stride_m, 1, rows, first + cols, mask, s * rstd[:, None] * w.to(tl.float32)[None, :])


@triton.jit
def _rmsnorm_backward_kernel(
    dy_ptr, stride_dym, stride_dyn,  # [M, N]
    ds_ptr, stride_dsm, stride_dsn,  # [M, N], read if HAS_RESIDUAL
    s_ptr, stride_sm, stride_sn,  # [M, N], what was normalised
    w_ptr, stride_wn,  # [N]
    dx_ptr, stride_m,  # [M, N] out
    dw_ptr,  # [programs, N] fp32 out, zero before
    m, n, eps,
    BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """With h = s * rstd and g = dy * w:  dx = rstd * (g - h * mean(g * h)) + ds  and  dw = sum over rows of dy * h.

    A program takes every num_programs-th row and keeps its own dw: no atomics, so the same sum in every run.
    """
    cols = tl.arange(0, BLOCK_N)
    dw_ptr += tl.program_id(0).to(tl.int64) * n
    if WHOLE:
        dw = tl.zeros([1, BLOCK_N], tl.float32)
        mask = (cols < n)[None, :]
        w = tl.load(w_ptr + cols.to(tl.int64) * stride_wn, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    for i in range(tl.program_id(0), m, tl.num_programs(0)):
        rows = (i + tl.arange(0, 1)).to(tl.int64)
        if WHOLE:
            s = _load(s_ptr, stride_sm, stride_sn, rows, cols, mask)
            dy = _load(dy_ptr, stride_dym, stride_dyn, rows, cols, mask)
            rstd = tl.rsqrt(tl.sum(s * s, 1) / n + eps)[:, None]
            h, g = s * rstd, dy * w
            dx = rstd * (g - h * (tl.sum(g * h, 1) / n)[:, None])
            if HAS_RESIDUAL:
                dx += _load(ds_ptr, stride_dsm, stride_dsn, rows, cols, mask)
            _store(dx_ptr, stride_m, 1, rows, cols, mask, dx)
            dw += dy * h
        else:
            square = tl.zeros([1, BLOCK_N], tl.float32)
            product = tl.zeros([1, BLOCK_N], tl.float32)
            for first in range(0, n, BLOCK_N):
                mask = (first + cols < n)[None, :]
                w = _load(w_ptr, 0, stride_wn, rows, first + cols, mask)
                s = _load(s_ptr, stride_sm, stride_sn, rows, first + cols, mask)
                square += s * s
                product += s * w * _load(dy_ptr, stride_dym, stride_dyn, rows, first + cols, mask)
            rstd = tl.rsqrt(tl.sum(square, 1) / n + eps)[:, None]
            mean = tl.sum(product, 1)[:, None] * rstd / n
            for first in range(0, n, BLOCK_N):
                mask = (first + cols < n)[None, :]
                w = _load(w_ptr, 0, stride_wn, rows, first + cols, mask)
                h = _load(s_ptr, stride_sm, stride_sn, rows, first + cols, mask) * rstd
                dy = _load(dy_ptr, stride_dym, stride_dyn, rows, first + cols, mask)
                dx = rstd * (dy * w - h * mean)
                if HAS_RESIDUAL:
                    dx += _load(ds_ptr, stride_dsm, stride_dsn, rows, first + cols, mask)
                _store(dx_ptr, stride_m, 1, rows, first + cols, mask, dx)
                # dw of this program: each thread adds to the elements that it wrote itself
                dw = _load(dw_ptr, 0, 1, rows, first + cols, mask) + dy * h
                _store(dw_ptr, 0, 1, rows, first + cols, mask, dw)
    if WHOLE:
        tl.store(dw_ptr + cols[None, :], dw, mask=(cols < n)[None, :])


@triton.jit
def _softmax_kernel(
    x_ptr, stride_xm, stride_xn,  # [M, N]
    y_ptr, stride_ym,  # [M, N] out
    m, n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    if WHOLE:
        mask = (rows < m)[:, None] & (cols < n)[None, :]
        x = _load(x_ptr, stride_xm, stride_xn, rows, cols, mask, float("-inf"))
        p = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2E)
        _store(y_ptr, stride_ym, 1, rows, cols, mask, p * (1.0 / tl.sum(p, 1))[:, None])
    else:
        # Online (Milakov & Gimelshein 2018): a maximum and a sum for each thread, merged at the end of the row.
        top, total = tl.full([THREADS], float("-inf"), tl.float32), tl.zeros([THREADS], tl.float32)
        for first in range(0, n, BLOCK_N):
            mask = (first + cols < n)[None, :]
            x = _load(x_ptr, stride_xm, stride_xn, rows, first + cols, mask, float("-inf"))
            x = x.reshape(BLOCK_N // (THREADS * VEC), THREADS, VEC)
            new = tl.maximum(top, own_max(x))
            p = tl.exp2((x - finite(new)[None, :, None]) * LOG2E)
            total = total * tl.exp2((top - finite(new)) * LOG2E) + own_sum(p)
            top = new
        row_top = tl.max(top, 0)
        inverse = 1.0 / tl.sum(total * tl.exp2((top - row_top) * LOG2E), 0)
        last = (n - 1) // BLOCK_N * BLOCK_N
        for first in range(0, n, BLOCK_N):  # back: the end of the row was read last, and may still be in the cache
            mask = (last - first + cols < n)[None, :]
            x = _load(x_ptr, stride_xm, stride_xn, rows, last - first + cols, mask, float("-inf"))
            p = tl.exp2((x - row_top) * LOG2E) * inverse
            _store(y_ptr, stride_ym, 1, rows, last - first + cols, mask, p)


# ---- elementwise: SwiGLU, bias + GELU


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), with the exponential that the GPU has: `tl.exp` takes three instructions more."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def _swiglu_kernel(
    gate_ptr, stride_gm, stride_gn, up_ptr, stride_um, stride_un,  # two [M, N]
    y_ptr, stride_m,  # [M, N] out
    m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    gate = _load(gate_ptr, stride_gm, stride_gn, rows, cols, mask)
    up = _load(up_ptr, stride_um, stride_un, rows, cols, mask)
    _store(y_ptr, stride_m, 1, rows, cols, mask, gate * sigmoid(gate) * up)


@triton.jit
def _swiglu_backward_kernel(
    dy_ptr, stride_dm, stride_dn, gate_ptr, stride_gm, stride_gn, up_ptr, stride_um, stride_un,  # three [M, N]
    dgate_ptr, dup_ptr, stride_m,  # two [M, N] out
    m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    dy = _load(dy_ptr, stride_dm, stride_dn, rows, cols, mask)
    gate = _load(gate_ptr, stride_gm, stride_gn, rows, cols, mask)
    up = _load(up_ptr, stride_um, stride_un, rows, cols, mask)
    share = sigmoid(gate)
    _store(dgate_ptr, stride_m, 1, rows, cols, mask, dy * up * share * (1.0 + gate * (1.0 - share)))
    _store(dup_ptr, stride_m, 1, rows, cols, mask, dy * gate * share)


@triton.jit
def _bias_gelu_kernel(
    x_ptr, stride_xm, stride_xn,  # [M, N]
    bias_ptr, stride_bn,  # [N]
    y_ptr, stride_m,  # [M, N] out
    m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    bias = tl.load(bias_ptr + cols.to(tl.int64) * stride_bn, mask=cols < n, other=0.0).to(tl.float32)
    x = _load(x_ptr, stride_xm, stride_xn, rows, cols, mask) + bias[None, :]
    if TANH:  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        share = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    _store(y_ptr, stride_m, 1, rows, cols, mask, x * share)


# ---- across a matrix product: what a compiler does not do by itself


@triton.jit
def _gate_up_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K]
    gate_ptr, stride_gn, stride_gk, up_ptr, stride_un, stride_uk,  # two [N, K]
    norm_ptr, stride_nk,  # [K], read if NORMED
    y_ptr, stride_ym,  # [M, N] out
    m, n, k, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """y = silu(h gate^T) * (h up^T) for BLOCK_N columns of BLOCK_M tokens, h = rmsnorm(x) if NORMED.

    rstd is one number a row, so it comes out of the sum: both products and the sum of squares run over x together.
    """
    # Programs that read the same weights are neighbours: all but the first find them in the L2 cache.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_m = (offs_n < n)[None, :, None], (offs_m < m)[:, None, None]
    gate_ptr += offs_n[None, :, None] * stride_gn
    up_ptr += offs_n[None, :, None] * stride_un
    x_ptr += offs_m[:, None, None] * stride_xm
    gate_acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    up_acc = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], tl.float32)
    square = tl.zeros([BLOCK_M, 1, BLOCK_K], tl.float32)
    for first in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        mask_k = (offs_k < k - first)[None, None, :]
        cols = (first + offs_k).to(tl.int64)[None, None, :]
        gate = tl.load(gate_ptr + cols * stride_gk, mask=mask_n & mask_k, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + cols * stride_uk, mask=mask_n & mask_k, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + cols * stride_xk, mask=mask_m & mask_k, other=0.0).to(tl.float32)
        if NORMED:
            square += x * x
            x *= tl.load(norm_ptr + cols * stride_nk, mask=mask_k, other=0.0).to(tl.float32)
        gate_acc += x * gate
        up_acc += x * up
    gate, up = tl.sum(gate_acc, 2), tl.sum(up_acc, 2)  # [BLOCK_M, BLOCK_N]
    if NORMED:
        rstd = tl.rsqrt(tl.sum(square, 2) / tl.maximum(k, 1) + eps)  # k 0: the sums are 0, not NaN
        gate, up = gate * rstd, up * rstd
    y_ptrs, mask = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], (offs_m < m)[:, None] & (offs_n < n)[None, :]
    tl.store(y_ptrs, cast(gate * sigmoid(gate) * up, y_ptr.dtype.element_ty), mask=mask)


# ---- launches


def _rows(x):
    """x [..., N] as [M, N]: a view wherever the strides allow one."""
    return x.reshape(-1, x.shape[-1])


def row_config(n: int, whole_row: int = WHOLE_ROW) -> dict:
    """Tile and warps for rows of n elements: whole rows up to whole_row, several at a time if they are short."""
    block_n = next_power_of_2(n)
    whole = block_n <= whole_row
    block_n = block_n if whole else 4096
    block_m = max(1, 2048 // block_n) if whole else 1
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, WHOLE=whole, num_warps=min(16, max(4, block_n // 512)))


def softmax_config(n: int) -> dict:
    """As `row_config`; a row that is walked in pieces has 32 elements a thread, 64 bytes in bf16, on their way."""
    config = row_config(n)
    return config if config["WHOLE"] else config | dict(BLOCK_N=8192, num_warps=8)


def _elementwise_config(m: int, n: int) -> tuple[tuple, dict]:
    """Grid and tile of 2048 elements: 8 a thread, which are 16 bytes of a 16-bit type, even where a warp has 64."""
    block_n = min(2048, next_power_of_2(n))
    block_m = 2048 // block_n
    return (cdiv(m, block_m), cdiv(n, block_n)), dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4)


def _rmsnorm(x, residual, weight, eps):
    """y, and x + residual (x itself if residual is None)."""
    y, s = fresh(x), x if residual is None else fresh(x)
    if y.numel():
        x2 = _rows(x)
        r2 = x2 if residual is None else _rows(residual)
        config = row_config(x2.shape[1])
        _rmsnorm_kernel[(cdiv(len(x2), config["BLOCK_M"]),)](
            x2, *x2.stride(), r2, *r2.stride(), weight, *weight.stride(), y, s, x2.shape[1], *x2.shape, eps,
            HAS_RESIDUAL=residual is not None, **config,
        )  # fmt: skip
    return y, s


def _rmsnorm_backward(dy, ds, s, weight, eps):
    """dx and dweight, given what was normalised; ds: the gradient that reaches s from elsewhere, or None."""
    dx = fresh(s)
    if not s.numel():
        return dx, torch.zeros_like(weight)
    dy2, s2 = _rows(dy), _rows(s)
    ds2 = s2 if ds is None else _rows(ds)
    rows, n = s2.shape
    programs = min(rows, 2 * device_properties()["multiprocessor_count"])
    parts = torch.zeros(programs, n, dtype=torch.float32, device=s.device)
    config = row_config(n, WHOLE_ROW_BACKWARD)
    del config["BLOCK_M"]
    _rmsnorm_backward_kernel[(programs,)](
        dy2, *dy2.stride(), ds2, *ds2.stride(), s2, *s2.stride(), weight, *weight.stride(), dx, n, parts,
        rows, n, eps, HAS_RESIDUAL=ds is not None, **config,
    )  # fmt: skip
    return dx, parts.sum(0).to(weight.dtype)


def _swiglu(gate, up):
    y = fresh(gate)
    if y.numel():
        gate, up = _rows(gate), _rows(up)
        grid, config = _elementwise_config(*gate.shape)
        _swiglu_kernel[grid](gate, *gate.stride(), up, *up.stride(), y, gate.shape[1], *gate.shape, **config)
    return y


def _swiglu_backward(dy, gate, up):
    dgate, dup = fresh(gate), fresh(gate)
    if dy.numel():
        dy, gate, up = _rows(dy), _rows(gate), _rows(up)
        grid, config = _elementwise_config(*gate.shape)
        _swiglu_backward_kernel[grid](
            dy, *dy.stride(), gate, *gate.stride(), up, *up.stride(), dgate, dup, gate.shape[1], *gate.shape, **config
        )
    return dgate, dup


# ---- gradients


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        y, s = _rmsnorm(x, residual, weight, eps)
        ctx.save_for_backward(s, weight)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.has_residual = eps, residual is not None
        return (y, s) if ctx.has_residual else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds=None):
        if dy is None:  # only x + residual was used
            return ds, ds, None, None
        dx, dw = _rmsnorm_backward(dy, ds, *ctx.saved_tensors, ctx.eps)
        return dx, dx if ctx.has_residual else None, dw, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _swiglu_backward(dy, *ctx.saved_tensors)


# ---- the public functions


def rmsnorm(x, weight, *, eps=1e-6):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension: one read, one write. With gradient.

    x [..., N], any strides; weight [N], same dtype; fp16, bf16 or fp32, computed in fp32. Returns y like x.
    Raises ValueError naming the argument. Source: Zhang & Sennrich 2019, Eq. 4.
    """
    args.norm(x, None, weight)
    if wants_grad(x, weight):
        return _RMSNorm.apply(x, None, weight, eps)
    return _rmsnorm(x, None, weight, eps)[0]


def add_rmsnorm(x, residual, weight, *, eps=1e-6):
    """s = x + residual and y = rmsnorm(s) in one kernel: two reads and two writes. Unfused it is three and two.

    x, residual [..., N], any strides; weight [N], same dtype; fp16, bf16 or fp32. Returns y and s; s is rounded to the
    dtype first, and y is the norm of what is returned. With gradient. Raises ValueError naming the argument.
    """
    args.norm(x, residual, weight)
    if wants_grad(x, residual, weight):
        return _RMSNorm.apply(x, residual, weight, eps)
    return _rmsnorm(x, residual, weight, eps)


def swiglu(gate, up):
    """silu(gate) * up: two reads and one write, unfused three and two. gate, up [..., N], any strides. With gradient.

    Raises ValueError naming the argument. Source: Shazeer 2020, Eq. 6.
    """
    args.row_tensor("gate", gate)
    args.tensor("up", up, tuple(gate.shape), like=gate, dtype=gate.dtype)
    return _SwiGLU.apply(gate, up) if wants_grad(gate, up) else _swiglu(gate, up)


def softmax(x):
    """Softmax over the last dimension: x [..., N] of any width and strides; computed in fp32.

    Up to WHOLE_ROW elements a row is read once; a longer one twice, with the online maximum (Milakov & Gimelshein
    2018). A row that is all -inf gives NaN, as torch.softmax does. Raises ValueError naming the argument.
    """
    rows, n = args.row_tensor("x", x)

    def launch(x):
        y = fresh(x)
        if y.numel():
            x2, config = _rows(x), softmax_config(n)
            grid = (cdiv(rows, config["BLOCK_M"]),)
            view = thread_view(config["num_warps"], x2)
            _softmax_kernel[grid](x2, *x2.stride(), y, n, rows, n, **config, **view)
        return y

    return forward_only("softmax", launch, x)


def bias_gelu(x, bias, *, approximate="none"):
    """gelu(x + bias): x [..., N], any strides; bias [N], same dtype. approximate: "none" (erf) or "tanh".

    Raises ValueError naming the argument. Source: Hendrycks & Gimpel 2016, section 2.
    """
    rows, n = args.row_tensor("x", x)
    args.tensor("bias", bias, (n,), like=x, dtype=x.dtype)
    args.expect(approximate in ("none", "tanh"), "approximate", approximate, "'none' or 'tanh'")

    def launch(x, bias):
        y = fresh(x)
        if y.numel():
            x2 = _rows(x)
            grid, config = _elementwise_config(rows, n)
            _bias_gelu_kernel[grid](
                x2, *x2.stride(), bias, *bias.stride(), y, n, rows, n, TANH=approximate == "tanh", **config
            )  # fmt: skip
        return y

    return forward_only("bias_gelu", launch, x, bias)


def gate_up_config(dtype: torch.dtype, m: int, k: int) -> dict:
    """As `gemv_config`, with two rows of each of the two weights."""
    return gemv_config(dtype, m, k) | {"BLOCK_N": 2, "STAGES": 3}


def gate_up_swiglu(x, gate_weight, up_weight, *, norm_weight=None, eps=1e-6):
    """silu(h gate^T) * (h up^T) in one launch, for decoding; h = rmsnorm(x, norm_weight, eps) if norm_weight is given.

    x [..., K]; gate_weight, up_weight [N, K] as in `nn.Linear`; norm_weight [K]; any strides. fp32 multiply-adds and no
    matrix unit, as `gemv`: four tokens share one reading of the weights, so it is for few tokens.

    Returns [..., N] in x.dtype. Raises ValueError naming the argument.
    """
    m, n, k = args.gate_up(x, gate_weight, up_weight, norm_weight)

    def launch(x, gate_weight, up_weight, norm_weight):
        y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
        if y.numel():
            x2 = x.reshape(m, k)
            normed = norm_weight is not None
            norm_weight = norm_weight if normed else x2[0]
            config = gate_up_config(x.dtype, m, k)
            _gate_up_kernel[(cdiv(m, config["BLOCK_M"]), cdiv(n, config["BLOCK_N"]))](
                x2, *x2.stride(), gate_weight, *gate_weight.stride(), up_weight, *up_weight.stride(),
                norm_weight, *norm_weight.stride(), y, n, m, n, k, eps, NORMED=normed, **config,
            )  # fmt: skip
        return y

    return forward_only("gate_up_swiglu", launch, x, gate_weight, up_weight, norm_weight)


def attention(q, k, v, *, causal=True, sm_scale=None):
    """Scale, mask, softmax and the product with v in one launch: `kernels.attention.attention`.

    q [B, T, Hq, D]; k, v [B, L, Hkv, D], Hq a multiple of Hkv; causal: aligned bottom-right. Returns o like q.
    """

    def launch(q, k, v):
        return prefill.attention(q, k, v, causal=causal, sm_scale=sm_scale)

    return forward_only("attention", launch, q, k, v)


def decode_block(
    x, cos, sin, k, v, kv_lens, norm, qkv_weight, o_weight, mlp_norm, gate_up_weight, down_weight, *, eps=1e-5
):  # fmt: skip
    """One decode step of a Llama block, fused by hand; for up to 4 tokens the MLP up to SwiGLU is one kernel.

    x [B, K], the residual stream; cos, sin [B, D/2]; k, v [B, L, Hkv, D], a cache that the new token is not added to;
    kv_lens [B] int32; norm, mlp_norm [K]; qkv_weight [(Hq + 2 Hkv) D, K]; o_weight [K, Hq D]; gate_up_weight [2 F, K],
    gate first; down_weight [K, F]. Returns x [B, K] after the block. Raises ValueError naming the argument.
    """
    num_q_heads, num_kv_heads, dim = args.decode_block(
        x, cos, sin, k, norm, qkv_weight, o_weight, mlp_norm, gate_up_weight, down_weight
    )
    qkv = linear(rmsnorm(x, norm, eps=eps), qkv_weight).unflatten(1, (-1, dim))
    q, new_k, _ = qkv.split((num_q_heads, num_kv_heads, num_kv_heads), 1)
    q, _ = rope(q.unsqueeze(1), new_k.unsqueeze(1), cos.unsqueeze(1), sin.unsqueeze(1))
    o, _ = flash_decoding(q.squeeze(1), k, v, kv_lens)
    o = linear(o.flatten(1), o_weight)
    if len(x) <= 4:
        x = x + o
        gate_weight, up_weight = gate_up_weight.chunk(2)
        h = gate_up_swiglu(x, gate_weight, up_weight, norm_weight=mlp_norm, eps=eps)
    else:
        h, x = add_rmsnorm(x, o, mlp_norm, eps=eps)
        h = swiglu(*linear(h, gate_up_weight).chunk(2, 1))
    return torch.addmm(x, h, down_weight.t())
