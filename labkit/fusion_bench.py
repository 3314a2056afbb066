"""What is timed for chapter 03: each kernel beside what a user would pick, and a whole block three ways."""

import functools

import torch
import torch.nn.functional as F

from labkit import bench, fusion, peers

HIDDEN, FFN, HEADS, KV_HEADS, DIM = 4096, 14336, 32, 8, 128  # Llama-3-8B
KEYS = 256  # of every sequence, in the block
ROWS, MLP = "Between the products: one kernel, Llama-3-8B's widths, bf16", "Into the product: norm, gate, up and SwiGLU"
CACHE = "From the QKV product to the cache"
STEP = f"A decode step of a block, {KEYS} keys a sequence"
PYTHON, GRAPH = f"{STEP}, launched from Python", f"{STEP}, in a CUDA graph"


# ---- peers


def eager(name):
    """The reference as it is: a kernel for each operation."""
    return lambda **inputs: functools.partial(getattr(fusion, name), **inputs)


def compiled(name, mode=None):
    """torch.compile of the reference, for one set of shapes."""

    def prepare(**inputs):
        tensors = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
        shapes = (tuple(x.shape) for x in tensors)
        function = peers.compiled(getattr(fusion, name), tensors[0].device.type, *shapes, mode=mode)
        if mode == "reduce-overhead":  # its own graph would copy every input, the weights too, before each replay
            for x in tensors:
                torch._dynamo.mark_static_address(x)
        return functools.partial(function, **inputs)

    return prepare


def native_norm(x, residual, weight):
    """The add, and torch's own fused norm."""

    def call():
        s = x + residual
        return F.rms_norm(s, weight.shape, weight, 1e-6), s

    return call


def liger_norm(x, residual, weight):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda: LigerFusedAddRMSNormFunction.apply(x, residual, weight, 1e-6)


def liger_swiglu(gate, up):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda: LigerSiLUMulFunction.apply(gate, up)


def liger_rope(q, k, cos, sin):
    """It turns q and k in place, so it gets its own; every call turns them further, which costs the same."""
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k = (x.clone().unsqueeze(0).transpose(1, 2) for x in (q, k))  # [1, H, T, D]
    cos, sin = (torch.cat((x, x), -1).unsqueeze(0) for x in (cos, sin))

    def call():
        return tuple(x[0].transpose(0, 1) for x in LigerRopeFunction.apply(q, k, cos, sin)[:2])

    return call


def indexed_cache(qkv, bias, cos, sin, k_pages, v_pages, slots):
    """The same in torch where no slot is to be skipped: nothing waits for the GPU, so it fits into a graph."""
    kv_heads, dim = k_pages.shape[2:]
    heads = qkv.shape[1] // dim - 2 * kv_heads

    def call():
        q, k, v = (qkv + bias).unflatten(1, (-1, dim)).split((heads, kv_heads, kv_heads), 1)
        q, k = fusion.rope(q, k, cos, sin)
        k_pages.view(-1, kv_heads, dim).index_copy_(0, slots, k)
        v_pages.view(-1, kv_heads, dim).index_copy_(0, slots, v)
        return q

    return call


def stacked_mlp(x, gate_weight, up_weight, norm_weight):
    """F.rms_norm, one cuBLAS product with both weights, SwiGLU: what an engine does without the deeper fusion."""
    weight = torch.cat((gate_weight, up_weight))

    def call():
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, 1e-6), weight).chunk(2, -1)
        return F.silu(gate) * up

    return call


# ---- cases


def _case(name, op, shapes, *, moved, section=ROWS, extra=None, scale=None, peers=None, flops=0, **options):
    """shapes: {argument: shape}, bf16 normal values. moved: bytes. extra(device) -> arguments that are not random."""
    scale = scale or {}

    def make(generator, device):
        def randn(name, shape):
            x = torch.randn(shape, generator=generator, device=device) * scale.get(name, 1.0)
            return x.bfloat16()

        return {name: randn(name, shape) for name, shape in shapes.items()} | (extra(device) if extra else {})

    known = {"eager": eager(op), "torch.compile": compiled(op)}
    return bench.Case(name, op, make, bytes=moved, flops=flops, section=section, peers=known | (peers or {}), **options)


def _angles(tokens, dim=DIM):
    def make(device):
        angle = torch.arange(tokens, device=device)[:, None] * 10000.0 ** -torch.linspace(0, 1, dim // 2, device=device)
        return {"cos": angle.cos(), "sin": angle.sin()}

    return make


def _row_cases(tiny):
    n, ffn, heads, kv_heads = (64, 96, 4, 2) if tiny else (HIDDEN, FFN, HEADS, KV_HEADS)
    result = []
    for rows in (1, 64, 2048):
        m = min(rows, 4) if tiny else rows
        shapes = {"x": (m, n), "residual": (m, n), "weight": (n,)}
        moved, peers = 2 * (4 * m * n + n), {"add, F.rms_norm": native_norm, "Liger": liger_norm}
        result.append(_case(f"add_rmsnorm [{rows}, {HIDDEN}]", "add_rmsnorm", shapes, moved=moved, peers=peers))
        shapes, peers = {"gate": (m, ffn), "up": (m, ffn)}, {"Liger": liger_swiglu}
        result.append(_case(f"swiglu [{rows}, {FFN}]", "swiglu", shapes, moved=6 * m * ffn, peers=peers))
        shapes = {"q": (m, heads, DIM), "k": (m, kv_heads, DIM)}
        moved, peers = 4 * m * (heads + kv_heads) * DIM + 4 * m * DIM, {"Liger": liger_rope}
        result.append(_case(f"rope, {rows} tokens", "rope", shapes, moved=moved, extra=_angles(m), peers=peers))
        shapes = {"x": (m, ffn), "bias": (ffn,)}
        result.append(_case(f"bias_gelu [{rows}, {FFN}]", "bias_gelu", shapes, moved=2 * (2 * m * ffn + ffn)))
    for rows, width in ((64, 4096), (2048, 32_000), (256, 131_072)):
        m, w = (2, 100) if tiny else (rows, width)
        result.append(_case(f"softmax [{rows}, {width}]", "softmax", {"x": (m, w)}, moved=4 * m * w))
    return result


def _mlp_cases(tiny):
    n, ffn = (64, 24) if tiny else (HIDDEN, FFN)
    result = []
    for m in (1, 2, 4, 16):
        shapes = {"x": (m, n), "gate_weight": (ffn, n), "up_weight": (ffn, n), "norm_weight": (n,)}
        scale = {"gate_weight": n**-0.5, "up_weight": n**-0.5}
        moved = 2 * (2 * ffn * n + m * (n + ffn) + n)
        options = dict(section=MLP, scale=scale, peers={"stacked cuBLAS": stacked_mlp}, flops=4 * m * n * ffn)
        result.append(_case(f"norm, gate, up, SwiGLU, M={m}", "gate_up_swiglu", shapes, moved=moved, **options))
    return result


def _cache_cases(tiny):
    """Every call writes the same keys and values into the same slots, so the inputs stay what they are."""
    heads, kv_heads, dim = (4, 2, 16) if tiny else (HEADS, KV_HEADS, DIM)
    result = []
    for tokens in (1, 64, 2048):
        t = min(tokens, 3) if tiny else tokens
        width = (heads + 2 * kv_heads) * dim

        def extra(device, t=t, dim=dim):
            return _angles(t, dim)(device) | {"slots": torch.arange(t, device=device)}

        pages = ((t + 15) // 16, 16, kv_heads, dim)
        shapes = {"qkv": (t, width), "bias": (width,), "k_pages": pages, "v_pages": pages}
        moved = 2 * (2 * t * width + width) + 4 * t * dim + 8 * t
        why = "the reference waits for the GPU to skip slots; see the one that indexes"
        options = dict(section=CACHE, extra=extra, without={"torch.compile": why, "eager": why})
        options["peers"] = {"eager, index_copy_": indexed_cache}
        result.append(_case(f"rope_write_kv, {tokens} tokens", "rope_write_kv", shapes, moved=moved, **options))
    return result


def _block_cases(tiny):
    """Alone and combined: eager, torch.compile and our kernels, each launched one by one and as a CUDA graph."""
    n, ffn, heads, kv_heads, dim, keys = (32, 48, 4, 2, 16, 9) if tiny else (HIDDEN, FFN, HEADS, KV_HEADS, DIM, KEYS)
    result = []
    for batch in (1, 8, 64, 512):
        b = min(batch, 5) if tiny else batch
        weights = {
            "norm": (n,), "qkv_weight": ((heads + 2 * kv_heads) * dim, n), "o_weight": (n, heads * dim),
            "mlp_norm": (n,), "gate_up_weight": (2 * ffn, n), "down_weight": (n, ffn),
        }  # fmt: skip
        cache = (b, keys, kv_heads, dim)
        size = sum(torch.Size(s).numel() for s in (*weights.values(), cache, cache)) + 2 * b * n
        flops = 2 * b * sum(torch.Size(s).numel() for s in weights.values())
        scale = {name: shape[1] ** -0.5 for name, shape in weights.items() if len(shape) == 2}

        def extra(device, b=b, dim=dim, keys=keys):
            return _angles(b, dim)(device) | {"kv_lens": torch.full((b,), keys, dtype=torch.int32, device=device)}

        for section in (PYTHON, GRAPH):
            own_graphs = {"torch.compile, own graphs": compiled("decode_block", "reduce-overhead")}
            peers = own_graphs if section == PYTHON else {}
            options = dict(section=section, extra=extra, scale=scale, peers=peers, graph=section == GRAPH, flops=flops)
            shapes = {"x": (b, n), "k": cache, "v": cache} | weights
            where = "one by one" if section == PYTHON else "graph"
            result.append(_case(f"block B={batch}, {where}", "decode_block", shapes, moved=2 * size, **options))
    return result


def cases(tiny=False) -> list[bench.Case]:
    return _row_cases(tiny) + _mlp_cases(tiny) + _cache_cases(tiny) + _block_cases(tiny)
