"""Operator fusion in plain torch: each fused kernel as the chain of operations that it replaces, and their bill.

A chain computes in at least fp32 inside an operation and rounds where a tensor is handed on. Gradients are torch's own.
"""

import sys

import torch
import torch.nn.functional as F

from labkit import args, bench, codegen
from labkit import fuse as _fuse
from labkit.attention import attention as _attention
from labkit.attention import decode_attention, softmax_dtype
from labkit.paged_attention import write_kv

# ---- what the kernels compute


def rmsnorm(x, weight, *, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, Eq. 4).

    x [..., N]; weight [N]; fp16, bf16, fp32 or fp64. Returns y like x. Raises ValueError naming the argument.
    """
    args.norm(x, None, weight, dtypes=args.REFERENCE_FLOATS)
    wide = x.to(softmax_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def add_rmsnorm(x, residual, weight, *, eps=1e-6):
    """s = x + residual and y = rmsnorm(s): a block's residual connection and the norm after it.

    x, residual [..., N]; weight [N]. Returns y and s in x.dtype. Raises ValueError naming the argument.
    """
    args.norm(x, residual, weight, dtypes=args.REFERENCE_FLOATS)
    s = x + residual
    return rmsnorm(s, weight, eps=eps), s


def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020, Eq. 6): gate, up [..., N]. Raises ValueError naming the argument."""
    args.row_tensor("gate", gate, dtypes=args.REFERENCE_FLOATS)
    args.tensor("up", up, tuple(gate.shape), like=gate, dtype=gate.dtype)
    dtype = softmax_dtype(gate.dtype)
    return (F.silu(gate.to(dtype)) * up).to(gate.dtype)


def softmax(x):
    """Softmax over the last dimension, x [..., N]. Raises ValueError naming the argument."""
    args.row_tensor("x", x, dtypes=args.REFERENCE_FLOATS)
    return x.to(softmax_dtype(x.dtype)).softmax(-1).to(x.dtype)


def bias_gelu(x, bias, *, approximate="none"):
    """gelu(x + bias): x [..., N]; bias [N]; approximate "none" or "tanh". Raises ValueError naming the argument."""
    _, n = args.row_tensor("x", x, dtypes=args.REFERENCE_FLOATS)
    args.tensor("bias", bias, (n,), like=x, dtype=x.dtype)
    args.expect(approximate in ("none", "tanh"), "approximate", approximate, "'none' or 'tanh'")
    return F.gelu(x.to(softmax_dtype(x.dtype)) + bias, approximate=approximate).to(x.dtype)


def rope(q, k, cos, sin, *, inplace=False):
    """Turn the pairs (d, d + D/2) of q and k by their position's angles (Su et al. 2021, paired as in HF's Llama).

    q [..., len, Hq, D], k [..., len, Hkv, D]; cos, sin [len, D/2] or [..., len, D/2]; or D wide: each half has its
    own columns. inplace: write over q and k.
    Returns (q, k). Raises ValueError naming the argument.
    """
    args.rope(q, k, cos, sin, dtypes=args.REFERENCE_FLOATS)
    if cos.shape[-1] < q.shape[-1]:
        cos, sin = (torch.cat((x, x), -1) for x in (cos, sin))
    cos, sin = (x.to(softmax_dtype(q.dtype)).unsqueeze(-2) for x in (cos, sin))  # the same for all heads

    def turn(x):
        wide = x.to(cos.dtype)
        a, b = wide.chunk(2, -1)
        turned = (wide * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)
        return x.copy_(turned) if inplace else turned

    return turn(q), turn(k)


def rope_write_kv(qkv, bias, cos, sin, k_pages, v_pages, slots):
    """Split, bias, rotation and cache write: qkv [N, (Hq + 2 Hkv) D]; bias as wide or None; cos, sin [N, D/2];
    k_pages, v_pages [P, page_size, Hkv, D], written in place; slots [N] int64, negative: skipped.

    Returns q [N, Hq, D], rotated. Raises ValueError naming the argument.
    """
    sizes = args.rope_write_kv(qkv, bias, cos, sin, k_pages, v_pages, slots, dtypes=args.REFERENCE_FLOATS)
    _, num_q_heads, num_kv_heads, dim = sizes
    if bias is not None:
        qkv = qkv + bias
    q, k, v = qkv.unflatten(1, (-1, dim)).split((num_q_heads, num_kv_heads, num_kv_heads), 1)
    q, k = rope(q, k, cos, sin)
    write_kv(k, v, k_pages, v_pages, slots)
    return q


def gate_up_swiglu(x, gate_weight, up_weight, *, norm_weight=None, eps=1e-6):
    """swiglu(h gate_weight^T, h up_weight^T), h = x, or rmsnorm(x, norm_weight) if that is given.

    x [..., K]; gate_weight, up_weight [N, K] as in `nn.Linear`; norm_weight [K]. Returns [..., N].
    Raises ValueError naming the argument.
    """
    args.gate_up(x, gate_weight, up_weight, norm_weight, dtypes=args.REFERENCE_FLOATS)
    h = x if norm_weight is None else rmsnorm(x, norm_weight, eps=eps)
    return swiglu(F.linear(h, gate_weight), F.linear(h, up_weight))


def attention(q, k, v, *, causal=True, sm_scale=None):
    """Scale, mask, softmax and the product with v: q [B, T, Hq, D]; k, v [B, L, Hkv, D]; causal: aligned bottom-right.

    Returns o like q. Raises ValueError naming the argument.
    """
    return _attention(q, k, v, causal=causal, sm_scale=sm_scale)


def decode_block(
    x, cos, sin, k, v, kv_lens, norm, qkv_weight, o_weight, mlp_norm, gate_up_weight, down_weight, *, eps=1e-5
):  # fmt: skip
    """One decode step of a Llama block, operation by operation, as it is usually written: seven linear layers.

    x [B, K]; cos, sin [B, D/2]; k, v [B, L, Hkv, D], a cache that the new token is not added to; kv_lens [B] int32;
    norm, mlp_norm [K]; qkv_weight [(Hq + 2 Hkv) D, K]; o_weight [K, Hq D]; gate_up_weight [2 F, K], gate first;
    down_weight [K, F]. Returns x [B, K] after the block. Raises ValueError naming the argument.
    """
    weights = (norm, qkv_weight, o_weight, mlp_norm, gate_up_weight, down_weight)
    num_q_heads, num_kv_heads, dim = args.decode_block(x, cos, sin, k, *weights, dtypes=args.REFERENCE_FLOATS)

    def normed(x, weight):
        wide = x.to(softmax_dtype(x.dtype))
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def turned(x):
        a, b = x.unflatten(1, (-1, dim)).chunk(2, -1)
        c, s = (angle.to(x.dtype).unsqueeze(1) for angle in (cos, sin))
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    h = normed(x, norm)
    sizes = [n * dim for n in (num_q_heads, num_kv_heads, num_kv_heads)]
    q, new_k, _ = (F.linear(h, w) for w in qkv_weight.split(sizes))
    q, _ = turned(q), turned(new_k)
    o, _ = decode_attention(q, k, v, kv_lens)
    x = x + F.linear(o.flatten(1), o_weight)
    h = normed(x, mlp_norm)
    gate, up = (F.linear(h, w) for w in gate_up_weight.chunk(2))
    return x + F.linear(F.silu(gate) * up, down_weight)


# ---- found by itself

def fuse(module, example_inputs, *, ops=None, verbose=True):
    """`labkit.fuse.fuse` with the functions of this module; ops=kernels.fusion puts the kernels in their place."""
    here = sys.modules[__name__]
    return _fuse.fuse(module, example_inputs, ops=ops or here, reference=here, verbose=verbose)


# ---- what is compiled, timed and tried


def codegen_cases() -> list[codegen.Case]:
    """Each kernel at the sizes of Llama-3-8B, and the corners: narrow rows, the widest whole row, rows read twice."""

    def case(function, name, dtype="bfloat16", **arguments):
        """Tuples are shapes of tensors."""
        arguments = {k: codegen.Tensor(v, dtype) if isinstance(v, tuple) else v for k, v in arguments.items()}
        return codegen.Case(f"kernels.fusion:{function}", f"{dtype}, {name}", arguments)

    def row(function, m, n, dtype="bfloat16", **options):
        shapes = {"softmax": {"x": (m, n)}, "add_rmsnorm": {"x": (m, n), "residual": (m, n), "weight": (n,)}}
        shapes["_rmsnorm_backward"] = {"dy": (m, n), "ds": (m, n), "s": (m, n), "weight": (n,)}
        return case(function, f"[{m}, {n}]", dtype, **shapes[function], **options)

    def rotation(name, dtype, head_dim):
        q, k, angles = (64, 32, head_dim), (64, 8, head_dim), codegen.Tensor((64, head_dim // 2), "float32")
        return case("rope", name, dtype, q=q, k=k, cos=angles, sin=angles)

    def mlp(m, dtype="bfloat16"):
        weight = (14336, 4096)
        shapes = dict(x=(m, 4096), gate_weight=weight, up_weight=weight, norm_weight=(4096,))
        return case("gate_up_swiglu", f"M={m} [14336, 4096], norm", dtype, **shapes)

    angles, pages = codegen.Tensor((64, 64), "float32"), (128, 16, 8, 128)
    cache = dict(k_pages=pages, v_pages=pages, slots=codegen.Tensor((64,), "int64"), cos=angles, sin=angles)
    ffn = (64, 14336)
    return [
        row("add_rmsnorm", 64, 4096), row("add_rmsnorm", 64, 128), row("add_rmsnorm", 64, 16384, "float32"),
        row("add_rmsnorm", 64, 20480), row("_rmsnorm_backward", 512, 4096, eps=1e-6),
        row("_rmsnorm_backward", 512, 8192, "float32", eps=1e-6), row("_rmsnorm_backward", 512, 20480, eps=1e-6),
        row("softmax", 64, 4096), row("softmax", 64, 16384, "float32"), row("softmax", 64, 131072),
        case("swiglu", "[64, 14336]", gate=ffn, up=ffn),
        case("_swiglu_backward", "[64, 14336]", dy=ffn, gate=ffn, up=ffn),
        case("bias_gelu", "[64, 14336]", x=ffn, bias=(14336,)),
        case("bias_gelu", "[64, 14336], tanh", "float16", x=ffn, bias=(14336,), approximate="tanh"),
        rotation("32 and 8 heads of 128", "bfloat16", 128), rotation("32 and 8 heads of 64", "float32", 64),
        case("rope_write_kv", "32 and 8 heads of 128, bias", qkv=(64, 6144), bias=(6144,), **cache),
        mlp(1), mlp(4), mlp(4, "float32"),
    ]  # fmt: skip


def cases(tiny=False) -> list[bench.Case]:
    """See `labkit.fusion_bench`."""
    from labkit import fusion_bench  # it needs this module

    return fusion_bench.cases(tiny)


def experiments() -> dict:
    """See `labkit.fusion_study`."""
    from labkit import fusion_study

    return fusion_study.experiments()
