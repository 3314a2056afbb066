"""The graph pass of chapter 03: what it finds under which spelling, what it must leave alone, and what it counts."""

import copy
import logging
import warnings
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import fusion
from labkit import fusion as ref
from labkit import fx_graph
from labkit.check import BF16, F32, assert_matches, randn
from labkit.fuse import _Pass
from labkit.fuse import fuse as labkit_fuse
from labkit.model import Config, Llama, causal

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

WIDTH, HEADS, DIM, LEN = 32, 4, 8, 6

# (old text, new text) of these files; tests/planted_bugs.py plants them one at a time.
PLANTED_BUGS = [
    ("labkit/fx_graph.py", "            if elsewhere:\n", "            if False:\n"),
    ("labkit/fx_graph.py", 'if first <= i <= last and node.meta["writes"]:', "if False:"),
    ("labkit/fx_graph.py", "if not node.users or node.meta[\"writes\"]}", "if not node.users}"),
    ("labkit/fx_graph.py", "if storages & seen.written]", "]"),
    ("labkit/fx_graph.py", "if x.alias_info is not None and x.alias_info.is_write]", "]"),
    ("labkit/fx_graph.py", "                if view in user.meta[\"writes\"]:\n", "                if False:\n"),
    ("labkit/fx_graph.py", "or name_of(user) in VIEW_OR_COPY", ""),
    ("labkit/fx_graph.py", "for view in self.views(old)[1:]:", "for view in old.users:"),
    ("labkit/fx_graph.py", "return _hooked(module) or ", "return "),
    ("labkit/fx_graph.py", "    if _hooked(module):\n", "    if False:\n"),
    ("labkit/fx_graph.py", "if any(map(_hooked, module.modules())):", "if False:"),
    ("labkit/fx_graph.py", "fx.PH if isinstance(leaf, torch.Tensor) else leaf", "leaf"),
    ("labkit/fx_graph.py", "            node.args = ()  # and", "            pass  # and"),
    ("labkit/fx_graph.py", "torch.export.export(module, _clone(inputs))", "torch.export.export(module, inputs)"),
    ("labkit/fx_graph.py", "    bound.apply_defaults()\n", ""),
    ("labkit/fx_graph.py", "if 1 not in shape(a) or a is b or self.pinned:", "if True:"),
    ("labkit/fx_graph.py", "if b.numel() and error.max() > 1e-6", "if False and 1e-6"),
    ("labkit/fx_graph.py", "        if a.shape != b.shape:\n", "        if False:\n"),
    ("labkit/fx_graph.py", "        with _Wide():\n", "        with contextlib.nullcontext():\n"),
    ("labkit/fx_graph.py", "if len(got) == len(want) and all(map(_same, got, want)):", "if True:"),
    ("labkit/fx_graph.py", 'arg(node, None, "alpha", default=1), ', "1, "),
    ("labkit/fx_graph.py", 'arg(node, None, "rounding_mode")', "None"),
    ("labkit/fx_graph.py", "            if got != want:\n", "            if False:\n"),
    ("labkit/fx_graph.py", "                x.copy_(before)", "                pass"),
    ("labkit/fx_graph.py", "not func._schema.is_mutable and ", ""),
    ("labkit/fx_graph.py", "(not node.is_impure() or is_transparent(node))", "not node.is_impure()"),
    ("labkit/fx_graph.py", "(top or len(bare.users) == 1)", "True"),
    ("labkit/fx_graph.py", "return left + [(f, sign * s) for f, s in right]", "return left + right"),
    ("labkit/fuse.py", "dims[0] % len(size) != len(size) - 1", "False"),
    ("labkit/fuse.py", "if width is not None and width != size[-1]:", "if False:"),
    ("labkit/fuse.py", "if sign_a == sign_w == 1 and ", "if "),
    ("labkit/fuse.py", "shape(w) != shape(x)[-1:] or w.meta", "w.meta"),
    ("labkit/fuse.py", ' or w.meta["dtype"] != x.meta["dtype"]:', ":"),
    ("labkit/fuse.py", "        if not same:\n", "        if False:\n"),
    ("labkit/fuse.py", "if self.order()[w] > self.order()[s]:", "if False:"),
    ("labkit/fx_graph.py", "if row.node in step.removed]", "]"),
    ("labkit/fuse.py", "torch.cat(values)", "torch.cat(values[::-1])"),
    ("labkit/fuse.py", "some.new_zeros", "some.new_ones"),
    ("labkit/fx_graph.py", 'view.target = "reshape"', "pass"),
    ("labkit/fuse.py", "        self.unwritten(group + attributes)\n", ""),
    ("labkit/fuse.py", "and not any(node in user.meta[\"writes\"] for user in node.users)", ""),
    ("labkit/fuse.py", ".requires_grad for n in stack if is_node(n)}) > 1", ".requires_grad for n in stack if is_node(n)}) > 9"),
    ("labkit/fuse.py", "if not is_number(number) or not is_plain(node):", "if not is_number(number):"),
    ("labkit/fuse.py", "    if wrong:\n", "    if False:\n"),
    ("labkit/fuse_attention.py", "if is_node(p) and is_plain(p) else", "if is_node(p) else"),
    ("labkit/fuse_attention.py", "        if shape(x) != size:\n", "        if False:\n"),
    ("labkit/fuse_attention.py", "if len(size) == 3 and size[0] == 1:", "if len(size) == 3 and size[0] == 1 and size[:2] != shape(x)[:-2]:"),
    ("labkit/fuse_attention.py", "        self.unwritten([q_out, k_out])\n", ""),
    ("labkit/fuse_attention.py", "        self.unwritten([root])\n", ""),
    ("labkit/fuse_attention.py", "if t > length or not bool((drop == ~keep).all())", "if t > length"),
    ("labkit/fuse_attention.py", ".tril(length - t)", ".tril()"),
    ("labkit/fuse_attention.py", "scale *= number**sign", "scale *= number"),
    ("labkit/fuse_attention.py", "isinstance(attribute(self.gm, n.target), nn.Parameter)", "False"),
    ("labkit/fuse_attention.py", 'if any(view in user.meta["writes"] for view in self.views(n) for user in view.users):', "if False:"),
    ("labkit/fuse_attention.py", "if is_number(number) and (number or sign == 1):", "if is_number(number):"),
    ("labkit/fx_graph.py", "            if any(made & ", "            if False and any(made & "),
    ("labkit/fx_graph.py", "if n is not node)", "if False)"),
    ("labkit/fx_graph.py", "any(nodes & set(node.users) for node in added)", "False"),
    ("labkit/fx_graph.py", "            delattr(self.gm, name)\n", "            pass\n"),
    ("labkit/fx_graph.py", "                self.pinned = pinned  # whatever", "                pass  # whatever"),
    ("labkit/fx_graph.py", "zip(got, want, strict=True)", "zip(got, want)"),
    ("labkit/fx_graph.py", "key=query.stride, reverse=True)", "key=query.stride)"),
    ("labkit/fx_graph.py", "        logging.disable(disabled)\n", "        logging.disable(logging.NOTSET)\n"),
    ("labkit/fuse.py", 'if len(shape(arg(n, 1, "weight"))) == 2', "if True"),
    ("labkit/fuse_attention.py", "        self.pinned = True  # it was looked at", "        pass  # it was looked at"),
    ("labkit/fuse_attention.py", "if [r[1:] for r in read[2:]] in (second, second[::-1]) else None", ""),
    ("labkit/fuse_attention.py", "return is_number(x) and x <= VERY_LOW", "return is_number(x)"),
    ("labkit/fuse_attention.py", 'key=lambda n: abs(order[n] - order[root])', "key=lambda n: order[n]"),
]  # fmt: skip


def normal(*shape, dtype=F32, seed=0):
    return randn(np.random.default_rng(seed), *shape, dtype=dtype)


def initialised(module, dtype=F32):
    """Weights large enough that a wrong block shows beside the residual."""
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(randn(rng, *p.shape) * 0.3 + (p.ndim == 1))
    return module.to(dtype).eval()


def fuse(module, inputs, ops=ref):
    return ref.fuse(module, inputs, ops=ops, verbose=False)


def rules(fused):
    return dict(Counter(step.rule for step in fused.report.steps))


def assert_same(fused, module, *inputs):
    """By the lab's rule: the module itself, in fp64 and in its own dtype, is the reference."""

    def reference(*args):
        dtype = next(x.dtype for x in args if isinstance(x, torch.Tensor) and x.is_floating_point())
        return copy.deepcopy(module).to(dtype)(*args)

    with torch.no_grad():
        assert_matches(fused(*inputs), reference, *inputs)


def llama(dtype, **options):
    config = Config(64, WIDTH, 48, 2, HEADS, 2, DIM, **options)
    return initialised(Llama(config), dtype)


# ---- real models

BLOCK = {"rmsnorm": 2, "add_rmsnorm": 1, "swiglu": 1, "rope": 1, "one product": 2}


@pytest.mark.parametrize("ops", [ref, fusion], ids=lambda ops: ops.__name__)
@pytest.mark.parametrize("options", [dict(dtype=F32), dict(dtype=BF16), dict(dtype=BF16, qkv_bias=True, qk_norm=True)], ids=str)
def test_our_block(options, ops):
    model = llama(**options)
    cos, sin = model.angles(torch.arange(LEN))
    inputs = (normal(2, LEN, WIDTH, dtype=options["dtype"]), cos, sin, partial(causal, 0))
    fused = fuse(model.layers[0], inputs, ops)
    assert rules(fused) == BLOCK | {"rmsnorm": 4 if "qk_norm" in options else 2}
    assert_same(fused, model.layers[0], *inputs)


def test_our_whole_model():
    """Its checks of `ids` are branches, which torch.fx cannot trace: torch.export can."""
    model, ids = llama(F32), torch.from_numpy(np.random.default_rng(0).integers(0, 64, (2, LEN)))
    fused = fuse(model, (ids,))
    assert rules(fused) == {"rmsnorm": 5, "add_rmsnorm": 4, "swiglu": 2, "rope": 2, "one product": 4}
    with torch.no_grad():
        torch.testing.assert_close(fused(ids), model(ids), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"^input 0: got .*\[3, 4\].*expected .*\[2, 6\].* it was fused for"):
        fused(ids.view(3, 4))


class TransformersBlock(nn.Module):
    def __init__(self, attention):
        super().__init__()
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=1, num_attention_heads=HEADS,
            num_key_value_heads=2, attn_implementation=attention,
        )  # fmt: skip
        model = transformers.LlamaModel(config)
        self.block, self.rotary = model.layers[0], [model.rotary_emb]  # in a list: no part of this module

    def forward(self, x, cos, sin, mask=None):
        return self.block(x, position_embeddings=(cos, sin), attention_mask=mask)


@pytest.mark.parametrize("attention, dtype, ops", [("eager", BF16, ref), ("eager", F32, fusion), ("sdpa", BF16, fusion)],
                         ids=["eager-bf16-labkit", "eager-fp32-kernels", "sdpa-bf16-kernels"])  # fmt: skip
def test_a_block_of_transformers(attention, dtype, ops):
    module = initialised(TransformersBlock(attention), dtype)
    x = normal(2, LEN, WIDTH, dtype=dtype)
    inputs = (x, *module.rotary[0](x, torch.arange(LEN)[None]))
    fused = fuse(module, inputs, ops)
    assert rules(fused) == BLOCK | ({"attention": 1} if attention == "eager" else {})
    assert sum(row.launches for row in fused.report.after) == 10
    assert_same(fused, module, *inputs)
    mask = torch.zeros(1, 1, LEN, LEN, dtype=dtype).masked_fill(torch.ones(LEN, LEN).triu(1).bool(), float("-inf"))
    fused = fuse(module, (*inputs, mask), ref)
    assert rules(fused) == BLOCK, "a mask that is an input need not be causal"
    assert_same(fused, module, *inputs, mask)
    assert_same(fused, module, *inputs, torch.zeros_like(mask))


# ---- spellings


class Module(nn.Module):
    """A module of one function of (module, *inputs), with some weights."""

    def __init__(self, function, **weights):
        super().__init__()
        self.function = function
        for name, shape in weights.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x, y=None):
        return self.function(self, x, y)


EPS = 1e-3
NORMS = {
    "pow, mean, rsqrt": lambda m, x, _: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
    "x * x, sqrt, /": lambda m, x, _: x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * m.w,
    "square, ** -0.5": lambda m, x, _: m.w * x * (EPS + torch.square(x).mean(dim=-1, keepdim=True)) ** -0.5,
    "sum / width": lambda m, x, _: x * m.w * torch.rsqrt((x**2).sum(-1, keepdim=True) / WIDTH + EPS),
    "reciprocal of sqrt": lambda m, x, _: x * m.w * (x.pow(2).mean(-1, True) + EPS).sqrt().reciprocal(),
    "in fp32, cast before the weight": lambda m, x, _: m.w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype),
    "in fp32, cast after the weight": lambda m, x, _: (m.w.float() * x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).type_as(x),
    "F.rms_norm": lambda m, x, _: F.rms_norm(x, (WIDTH,), m.w, EPS),
    "scaled afterwards": lambda m, x, _: 3.0 * (m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))),
    "of a product": lambda m, x, _: (lambda h: m.w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)))(x * x),
    "1 + w": lambda m, x, _: (1.0 + m.w) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_spellings_of_rmsnorm(name):
    for dtype in (F32, BF16):
        module, x = initialised(Module(NORMS[name], w=WIDTH), dtype), normal(2, 3, WIDTH, dtype=dtype)
        fused = fuse(module, (x,))
        assert rules(fused) == {"rmsnorm": 1}
        assert_same(fused, module, x)
        assert_same(fused, module, normal(1, 5, WIDTH, dtype=dtype, seed=3)), "other shapes are fine too"
        plain = sum(row.launches for row in fused.report.before)
        assert sum(row.launches for row in fused.report.after) < plain or name == "F.rms_norm"


GATES = {
    "F.silu": lambda m, x, y: F.silu(x) * y,
    "the other way round": lambda m, x, y: y * F.silu(x),
    "sigmoid": lambda m, x, y: x * torch.sigmoid(x) * y,
    "sigmoid, mixed": lambda m, x, y: (y * x) * x.sigmoid(),
    "in fp32": lambda m, x, y: F.silu(x.float()).to(x.dtype) * y,
    "module": lambda m, x, y: nn.SiLU()(x).mul(y),
    "two products": lambda m, x, y: F.silu(F.linear(x, m.a)) * F.linear(x, m.b),
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_spellings_of_swiglu(name):
    for dtype in (F32, BF16):
        x, y = normal(2, 3, WIDTH, dtype=dtype), normal(2, 3, WIDTH, dtype=dtype, seed=1)
        module = initialised(Module(GATES[name], a=(5, WIDTH), b=(5, WIDTH)), dtype)
        fused = fuse(module, (x, y))
        assert rules(fused) == {"swiglu": 1} | ({"one product": 1} if name == "two products" else {})
        assert_same(fused, module, x, y)


def heads(m, x):
    """q, k, v [B, H, T, D] of x."""
    return (F.linear(x, w).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for w in (m.q, m.k, m.v))


def scored(softmax_of):
    def run(m, x, _):
        q, k, v = heads(m, x)
        return softmax_of(q, k, v, m)

    return run


def keep():
    return torch.ones(LEN, LEN, dtype=torch.bool).tril()


def bmm(q, k, v, m):
    q, k, v = (x.reshape(-1, LEN, DIM) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * DIM**-0.5, -1), v)


ATTENTIONS = {
    "no mask": lambda q, k, v, m: torch.softmax(q @ k.transpose(-1, -2) / DIM**0.5, -1) @ v,
    "q scaled first": lambda q, k, v, m: ((q * DIM**-0.5) @ k.mT).softmax(-1) @ v,
    "added -inf": lambda q, k, v, m: F.softmax(q @ k.mT * 0.2 + q.new_zeros(LEN, LEN).masked_fill(~keep(), float("-inf")), -1) @ v,
    "masked_fill": lambda q, k, v, m: F.softmax((q @ k.mT * 0.2).masked_fill(~keep(), -1e9), dim=-1) @ v,
    "where": lambda q, k, v, m: F.softmax(torch.where(keep(), 0.2 * (q @ k.mT), float("-inf")), dim=-1) @ v,
    "in fp32, dropout that is off": lambda q, k, v, m: F.dropout(F.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype), 0.1, m.training) @ v,
    "einsum": lambda q, k, v, m: torch.einsum("bhts,bhsd->bthd", torch.einsum("bhtd,bhsd->bhts", q, k).mul(0.2).softmax(-1), v),
    "bmm": bmm,
    "fewer queries than keys": lambda q, k, v, m: F.softmax((q[:, :, -3:] @ k.mT).masked_fill(~keep()[-3:], float("-inf")), -1) @ v,
    "scaled by its size": lambda q, k, v, m: torch.softmax(q @ k.mT * q.size(-1) ** -0.5, -1) @ v,
    "repeated heads": lambda q, k, v, m: torch.softmax(q @ k[:, :2].repeat_interleave(2, 1).mT, -1) @ v[:, :2].repeat_interleave(2, dim=1),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTIONS)
def test_spellings_of_attention(name):
    module = Module(scored(ATTENTIONS[name]), **dict.fromkeys("qkv", (HEADS * DIM, WIDTH)))
    for dtype, ops in ((F32, ref), (BF16, fusion)):
        initialised(module, dtype)
        x = normal(2, LEN, WIDTH, dtype=dtype)
        fused = fuse(module, (x,), ops)
        assert rules(fused) == {"attention": 1, "one product": 1}
        assert_same(fused, module, x)
        assert not any(row.what == "softmax" for row in fused.report.after)
    if name in ("masked_fill", "added -inf", "where", "scaled by its size"):
        with pytest.raises(ValueError, match=r"^input 0: got .* expected .*\[2, 6, 32\]"):
            fused(x[:, :4])


def test_a_random_scale_is_no_constant():
    """Drawn anew in every call: it must not be taken from the first one, wherever it stands."""
    random = scored(lambda q, k, v, m: torch.softmax(q @ k.mT * (DIM**-0.5 * torch.rand(())), -1) @ v)
    module = initialised(Module(random, **dict.fromkeys("qkv", (HEADS * DIM, WIDTH))), F32)
    x = normal(2, LEN, WIDTH)
    fused = fuse(module, (x,))
    assert "attention" not in rules(fused)
    for seed in (1, 2):
        torch.manual_seed(seed)
        want = module(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(fused(x), want)


# ---- what must stay


def used_twice(m, x, y):
    unit = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return m.w * unit + unit


def variance_used(m, x, y):
    var = x.pow(2).mean(-1, keepdim=True)
    return m.w * (x * torch.rsqrt(var + EPS)) + var


def written_between(m, x, y):
    x = x + 0
    a = F.silu(x)
    y = y.clone()
    b = torch.add(y, 0)
    y.add_(1)
    return a * b


def weights_written(m, x, y):
    """The first norm reads x before it is changed, the second after."""
    x = x * 1
    square = x.pow(2)
    x.mul_(2)
    return m.w * (x * torch.rsqrt(square.mean(-1, keepdim=True) + EPS))


NOT = {
    "another dimension": (lambda m, x, y: m.w * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + EPS)), "rmsnorm"),
    "another tensor's norm": (lambda m, x, y: m.w * (x * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)), "rmsnorm"),
    "eps outside the root": (lambda m, x, y: m.w * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS)), "rmsnorm"),
    "cubes": (lambda m, x, y: m.w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 99)), "rmsnorm"),
    "sum without width": (lambda m, x, y: m.w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)), "rmsnorm"),
    "divided by the weight": (lambda m, x, y: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) / m.w, "rmsnorm"),
    "a matrix of weights": (lambda m, x, y: y * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)), "rmsnorm"),
    "the unit vector is used": (used_twice, "rmsnorm"),
    "the variance is used": (variance_used, "rmsnorm"),
    "x changed in between": (weights_written, "rmsnorm"),
    "broadcast gate": (lambda m, x, y: F.silu(x[:, :1]) * y, "swiglu"),
    "another sigmoid": (lambda m, x, y: x * torch.sigmoid(y + x) * y, "swiglu"),
    "silu is used": (lambda m, x, y: (lambda s: s * y + s)(F.silu(x)), "swiglu"),
    "silu in place": (lambda m, x, y: F.silu(x.clone(), inplace=True) * y, "swiglu"),
    "written in between": (written_between, "swiglu"),
    "a scaled add": (lambda m, x, y: NORMS["pow, mean, rsqrt"](m, torch.add(x, y, alpha=2), None), "add_rmsnorm"),
    "a broadcast add": (lambda m, x, y: NORMS["pow, mean, rsqrt"](m, x + y[:, :1], None), "add_rmsnorm"),
    "sum over another width": (lambda m, x, y: m.w * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 7 + EPS), "rmsnorm"),
    "gelu of a sum of two": (lambda m, x, y: F.gelu(x + y), "bias_gelu"),
    "gelu of a scaled bias": (lambda m, x, y: F.gelu(torch.add(x, m.w, alpha=2)), "bias_gelu"),
    "a rounded mean": (lambda m, x, y: m.w * x * torch.rsqrt(torch.div(x.pow(2).sum(-1, keepdim=True), WIDTH, rounding_mode="floor") + 1), "rmsnorm"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT)
def test_left_alone(name):
    function, rule = NOT[name]
    module = initialised(Module(function, w=WIDTH))
    x, y = normal(2, 3, WIDTH), normal(2, 3, WIDTH, seed=1)
    fused = fuse(module, (x, y))
    assert rule not in rules(fused)
    assert_same(fused, module, x, y)


WRITES = {
    "to the gate": (lambda m, x, y: (lambda a, b: a * y + b)(F.silu(x), m.act(x)), {}),
    "to the sum": (lambda m, x, y: (lambda s: NORMS["F.rms_norm"](m, s, (m.act(s), None)[1]))(x + y), {"rmsnorm": 1}),
    "past autograd": (lambda m, x, y: (lambda a, _: a * x)(F.silu(x), x.data.mul_(2)), {}),
    "out": (lambda m, x, y: (lambda a, _: a * x)(F.silu(x), torch.mul(x, 2, out=x)), {}),
    "earlier, and its result was only wanted for its type": (
        lambda m, x, y: (lambda b: ((F.silu(y.float()) * y.float()).type_as(b), x))(m.act(x)), {"swiglu": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_writing_in_place(name):
    """Also inside of a module that is not traced through. What is left of the inputs is compared too."""
    function, want = WRITES[name]
    module = initialised(Module(lambda m, x, y: (lambda x: (function(m, x, y), x))(x * 1), w=WIDTH), BF16)
    module.act = nn.ReLU(inplace=True)
    x, y = normal(2, 3, WIDTH, dtype=BF16), normal(2, 3, WIDTH, dtype=BF16, seed=1)
    fused = fuse(module, (x, y))
    assert rules(fused) == want
    with torch.no_grad():
        assert all(map(torch.equal, fx_graph.tree_leaves(fused(x, y)), fx_graph.tree_leaves(module(x, y))))


def both(write):
    return lambda m, x, y: (lambda a, b: (write(a), a + b)[1])(F.linear(x, m.a), F.linear(x, m.b))


VIEWS = {  # of a linear layer's output, beside another; what they are afterwards
    "view": (both(lambda a: a.view(-1).mul_(2)), False), "reshape": (both(lambda a: a.reshape(6, -1).mul_(2)), False),
    "contiguous": (both(lambda a: a.contiguous().add_(1)), False), "cast": (both(lambda a: a.float().view(-1).mul_(2)), False),
    "itself": (both(lambda a: a.mul_(2)), False), "element": (both(lambda a: a.__setitem__(0, 1.0)), False),
    "weight": (lambda m, x, y: (m.a.mul_(1), F.linear(x, m.a) + F.linear(x, m.b))[1], False),
    "read only": (lambda m, x, y: (lambda b, a: (x * 1).add_(a.view(2, 3, -1, 1).view(-1).view(2, 3, -1)) + b)(F.linear(x, m.b), F.linear(x, m.a)), True),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_writing_to_a_view(name):
    """A piece of a product is strided: where a view was, reshape may copy."""
    function, fuses = VIEWS[name]
    module = initialised(Module(function, a=(WIDTH, WIDTH), b=(WIDTH, WIDTH)))
    x = normal(2, 3, WIDTH)
    fused = fuse(module, (x,))
    assert rules(fused) == ({"one product": 1} if fuses else {})
    assert_same(fused, module, x)


def written_copy(o):
    """Where o is contiguous this is a copy; where o is a transposed view it is o itself."""
    copied = o.transpose(1, 2).contiguous()
    copied.float().mul_(2)  # of fp32: no cast
    return o + copied.transpose(1, 2)


def test_writing_to_a_copy_that_might_become_a_view():
    module = Module(scored(lambda q, k, v, m: written_copy(torch.softmax(q @ k.mT, -1) @ v)), **dict.fromkeys("qkv", (HEADS * DIM, WIDTH)))
    x = normal(2, LEN, WIDTH)
    fused = fuse(initialised(module), (x,))
    assert rules(fused) == {"one product": 1}
    assert_same(fused, module, x)

    def rotated(m, x, y):
        cos, sin = (f(m.w).unsqueeze(-3) for f in (torch.cos, torch.sin))
        x, y = turned(x, cos, sin, 1), turned(y, cos, sin, 1)
        return written_copy(x), y

    module, x, y = initialised(Module(rotated, w=(3, DIM // 2))), normal(2, 4, 3, DIM), normal(2, 2, 3, DIM, seed=1)
    fused = fuse(module, (x, y))
    assert rules(fused) == {}
    assert_same(fused, module, x, y)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_both_graphs_are_compared(dtype):
    """With functions that are wrong, as a rule might be. Rounding, dropout and indices are no reason to refuse."""

    def with_reference(function, module):
        reference = SimpleNamespace(swiglu=function)
        return labkit_fuse(module, (x, y), ops=reference, reference=reference, verbose=False)

    def changes(gate, up):
        up.mul_(2)
        return ref.swiglu(gate, up / 2)

    x, y = normal(2, 3, WIDTH, dtype=dtype), normal(2, 3, WIDTH, dtype=dtype, seed=1)
    module = initialised(Module(lambda m, x, y: (x, (F.silu(F.linear(x, m.a)) * y).bfloat16()), a=(WIDTH, WIDTH)), dtype)
    for wrong, message in (
        (lambda gate, up: ref.swiglu(gate, up) * 1.001, "output 1 differs by up to 0.0"), (lambda gate, up: gate[0], r"output 1 has shape \[3, 32\]"),
        (changes, "input 1 afterwards differs by up to "),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^module: got Module, which swiglu would change: {message}"):
            with_reference(wrong, module)
    noisy = nn.Sequential(llama(dtype).layers[0].mlp, nn.Dropout(0.5), nn.BatchNorm1d(3, dtype=dtype)).train()
    assert rules(fuse(noisy, (x,))) == {"swiglu": 1, "one product": 1}
    module.function = lambda m, x, y: (lambda h: (h.topk(3), h.double().sum().to(h.dtype), h.isnan()))(F.silu(F.linear(x, m.a)) * y)
    assert rules(with_reference(ref.swiglu, module)) == {"swiglu": 1}


def test_the_report_says_what_was_not_compared():
    """Where only the fused graph, or not even the traced one, can be run in fp64."""

    def narrow(gate, up):
        if gate.dtype == torch.float64:
            raise TypeError("no fp64")
        return ref.swiglu(gate, up)

    x, y = normal(2, WIDTH), normal(2, WIDTH, seed=1)
    module, reference = Module(GATES["F.silu"]), SimpleNamespace(swiglu=narrow)
    report = labkit_fuse(module, (x, y), ops=reference, reference=reference, verbose=False).report
    assert report.unchecked == "TypeError: no fp64"
    assert str(report).endswith("\nnot checked in fp64: TypeError: no fp64")
    assert "fp64" not in str(fuse(module, (x, y)).report)
    module.function = lambda m, x, y: F.silu(x) * y + x.abs().view(torch.int32).view(2, WIDTH)
    assert "not checked in fp64: " in str(fuse(module, (x, y)).report)
    with pytest.raises(ValueError, match="zip"):
        fx_graph.differences([], [x], 0)


def test_weights_of_another_dtype():
    """bf16 times an fp32 weight is fp32, which the kernel does not give."""
    module = initialised(Module(NORMS["F.rms_norm"], w=WIDTH))
    module.function = lambda m, x, y: m.w * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    fused = fuse(module, (normal(2, WIDTH, dtype=BF16),))
    assert rules(fused) == {}
    assert any("the weight is not one row in the input's dtype" in reason for reason in fused.report.left)


def test_a_weight_that_is_computed_after_the_sum():
    """As Gemma's 1 + w: the norm is one kernel, the sum before it stays, since the weight is not yet known there."""

    def function(m, x, y):
        total = x + y
        return total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS) * (1 + m.w), total

    module, inputs = initialised(Module(function, w=WIDTH)), (normal(2, WIDTH), normal(2, WIDTH, seed=2))
    fused = fuse(module, inputs)
    assert rules(fused) == {"rmsnorm": 1}
    assert any("the weight is computed after the add" in reason for reason in fused.report.left)
    assert_same(fused, module, *inputs)


def turned(x, cos, sin, sign):
    a, b = x.chunk(2, -1)
    second = {1: lambda: b * cos + a * sin, -1: lambda: b * cos - a * sin, 0: lambda: b * sin + a * cos}
    return torch.cat((a * cos - b * sin, second[sign]()), -1)


def turned_whole(x, cos, sin, sign):
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return x * torch.cat((cos, cos), -1) + torch.cat((-b, a) if sign > 0 else (b, -a), -1) * torch.cat((sin, sin), -1)


@pytest.mark.parametrize("spelling", [turned, turned_whole])
def test_rotations(spelling):
    """q and k by the same angles; not if the pair is turned the other way, nor if only one is turned."""

    def run(sign, both):
        def forward(m, x, y):
            cos, sin = (f(m.w).unsqueeze(-2) for f in (torch.cos, torch.sin))
            return spelling(x, cos, sin, sign), spelling(y, cos, sin, sign) if both else y

        module = initialised(Module(forward, w=(3, DIM // 2)))
        x, y = normal(2, 3, 4, DIM), normal(2, 3, 2, DIM, seed=1)
        fused = fuse(module, (x, y))
        assert_same(fused, module, x, y)
        return rules(fused).get("rope", 0)

    # spelled with whole angles, these are made after the head axis: no rule knows where the heads are
    assert run(1, True) == (spelling is turned)
    assert run(-1, True) == run(0, True) == run(1, False) == 0


def test_rotations_that_are_none():
    """A difference that is scaled; and angles that give the result another dimension."""

    def scaled(m, x, y):
        cos, sin = (f(m.w).unsqueeze(-2) for f in (torch.cos, torch.sin))
        pairs = (x.chunk(2, -1), y.chunk(2, -1))
        return [torch.cat((torch.sub(a * cos, b * sin, alpha=2), b * cos + a * sin), -1) for a, b in pairs]

    def wider(m, x, y):
        cos, sin = (f(m.w[None]).unsqueeze(-2) for f in (torch.cos, torch.sin))
        return turned(x[0], cos, sin, 1), turned(y[0], cos, sin, 1)

    x, y = normal(2, 3, 4, DIM), normal(2, 3, 2, DIM, seed=1)
    for function in (scaled, wider):
        module = initialised(Module(function, w=(3, DIM // 2)))
        fused = fuse(module, (x, y))
        assert rules(fused) == {}
        assert_same(fused, module, x, y)


def test_stacked_layers_with_and_without_bias():
    """And pieces whose dimensions a view would have to merge."""
    module = Module(lambda m, x, y: (F.linear(x, m.a).view(-1), F.linear(x, m.b, m.c), F.linear(x, m.a).view(6, -1)), a=(5, WIDTH), b=(4, WIDTH), c=(4,))
    fused = fuse(initialised(module), (normal(2, 3, WIDTH),))
    assert rules(fused) == {"one product": 1}
    assert_same(fused, module, normal(2, 3, WIDTH))


class Beside(nn.Module):
    """Two layers of one input; something is done to the first one's output."""

    def __init__(self, after):
        super().__init__()
        self.after, self.a, self.b = after, nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.after(self.a(x)), self.b(x)


def test_a_view_by_keyword():
    module, x = initialised(Beside(lambda a: a.view(dtype=torch.int32))), normal(2, WIDTH)
    fused = fuse(module, (x,))
    assert rules(fused) == {"one product": 1}
    for a, b in zip(fused(x), module(x)):
        torch.testing.assert_close(a.view(F32), b.view(F32))


def test_a_rule_that_fails_midway(monkeypatch):
    """What it added goes again; if it had taken something away by then, the error is not hidden."""
    module, x, replace = initialised(Beside(torch.relu)), normal(2, WIDTH), _Pass.replace

    def fails(*args):
        raise IndexError

    monkeypatch.setattr(_Pass, "replace", fails)
    fused = fuse(module, (x,))
    assert fused.report.left == ["siblings at linear_1: an unknown form (IndexError)", "siblings at linear: an unknown form (IndexError)"]
    assert [n.name for n in fused.graph.nodes if fx_graph.name_of(n) in ("linear", "split")] == ["linear", "linear_1"]
    assert {n for n, _ in fused.named_parameters()} == {n for n, _ in module.named_parameters()}
    assert fused.report.after == fused.report.before

    def half(work, rule, new, pairs):
        pairs[0][0].replace_all_uses_with(pairs[0][1])

    for change in (replace, half):
        monkeypatch.setattr(_Pass, "replace", lambda *args, change=change: (change(*args), fails()))
        with pytest.raises(IndexError):
            fuse(module, (x,))


def test_weights_that_are_one_row():
    module = initialised(Module(lambda m, x, y: (F.linear(x, m.a), F.linear(x, m.b)), a=WIDTH, b=WIDTH))
    fused = fuse(module, (normal(2, 3, WIDTH),))
    assert rules(fused) == {}
    module.function = lambda m, x, y: (F.linear(x, m.a), F.linear(x, m.c), F.linear(x, m.d))
    module.c, module.d = (nn.Parameter(normal(5, WIDTH, seed=i)) for i in (1, 2))
    fused = fuse(module, (normal(2, 3, WIDTH),))
    assert rules(fused) == {"one product": 1}
    assert_same(fused, module, normal(2, 3, WIDTH))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_layers_are_not_stacked_with_others(frozen):
    module = initialised(Module(lambda m, x, y: m.a(x) + m.b(x)))
    module.a, module.b = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)
    getattr(module.b, frozen).requires_grad_(False)
    fused = fuse(module, (normal(2, WIDTH),))
    assert rules(fused) == {}
    assert [n for n, p in fused.named_parameters() if not p.requires_grad] == [f"b.{frozen}"]
    getattr(module.a, frozen).requires_grad_(False)
    fused = fuse(module, (normal(2, WIDTH),))
    assert [n for n, p in fused.named_parameters() if not p.requires_grad] == [f"stacked_a_{frozen}"]


def test_hooks():
    calls, x = [], normal(2, WIDTH)
    module = initialised(Module(lambda m, x, y: m.a(x) + m.b(x) * m.c(x)))
    module.a, module.b, module.c = (nn.Linear(WIDTH, 3) for _ in range(3))
    hook = module.a.register_forward_hook(lambda m, args, out: calls.append(args[0]))
    fused = fuse(module, (x,))
    assert rules(fused) == {"one product": 1}, "of the other two"
    calls.clear()
    fused(x)
    assert calls[0] is x
    with pytest.raises(ValueError, match=r"torch.export: ValueError: hooks would be lost"):
        fuse(Sized(module), (x, x))
    hook.remove()
    module.register_full_backward_hook(print)
    with pytest.raises(ValueError, match=r"torch.fx: ValueError: its hooks would be lost"):
        fuse(module, (x,))


class Sized(nn.Module):
    """torch.fx cannot trace its branch, torch.export can."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, y):
        return self.inner(x, y) if len(x) else x


def test_a_tensor_given_twice():
    """torch.export would make one input of it."""
    module, x, y = Sized(Module(GATES["F.silu"])), normal(2, WIDTH), normal(2, WIDTH, seed=1)
    fused = fuse(module, (x, x))
    assert rules(fused) == {"swiglu": 1}
    assert_same(fused, module, x, y)


def test_the_level_of_logging_stays():
    before = logging.root.manager.disable
    try:
        for level in (logging.NOTSET, logging.INFO, logging.CRITICAL):
            logging.disable(level)
            fuse(Sized(Module(GATES["F.silu"])), (normal(2, WIDTH), normal(2, WIDTH)))
            assert logging.root.manager.disable == level
    finally:
        logging.disable(before)


def test_a_reason_is_given():
    module = initialised(Module(variance_used, w=WIDTH))
    fused = fuse(module, (normal(2, WIDTH),))
    assert any("is used elsewhere too" in reason for reason in fused.report.left)
    assert "left alone: rmsnorm at" in str(fused.report)


NOT_CAUSAL = {
    "window": lambda q, k, v, m: F.softmax((q @ k.mT).masked_fill(~(keep() & ~keep().tril(-3)), float("-inf")), -1) @ v,
    "upside down": lambda q, k, v, m: F.softmax((q @ k.mT).masked_fill(keep().tril(-1), float("-inf")), -1) @ v,
    "a bias, not a mask": lambda q, k, v, m: F.softmax(q @ k.mT + torch.arange(LEN), -1) @ v,
    "a mask too mild": lambda q, k, v, m: F.softmax((q @ k.mT).masked_fill(~keep(), -9.0), -1) @ v,
    "a parameter": lambda q, k, v, m: F.softmax(q @ k.mT + (m.p * 0).masked_fill(~keep(), float("-inf")), -1) @ v,
    "over the queries": lambda q, k, v, m: F.softmax(q @ k.mT, -2) @ v,
    "the weights are used": lambda q, k, v, m: (lambda p: p @ v + p.sum())(F.softmax(q @ k.mT, -1)),
    "scaled by less than nothing": lambda q, k, v, m: F.softmax(q @ k.mT * -0.1, -1) @ v,
    "scaled for each head": lambda q, k, v, m: F.softmax(q @ k.mT * m.s, -1) @ v,
    "divided by nothing": lambda q, k, v, m: F.softmax(q @ k.mT / 0.0, -1) @ v,
    "dropout": lambda q, k, v, m: F.dropout(F.softmax(q @ k.mT, -1), 0.5, True) @ v,
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_attention_left_alone(name):
    weights = dict.fromkeys("qkv", (HEADS * DIM, WIDTH)) | {"p": (LEN, LEN), "s": (HEADS, 1, 1)}
    module, x = initialised(Module(scored(NOT_CAUSAL[name]), **weights)), normal(2, LEN, WIDTH)
    fused = fuse(module, (x,))
    assert rules(fused) == {"one product": 1}
    if name not in ("dropout", "divided by nothing"):
        assert_same(fused, module, x)
        assert_same(fused, module, normal(1, LEN, WIDTH)), "nothing came of looking at sizes"
    assert name != "divided by nothing" or any("0.0 is not a number that scales" in reason for reason in fused.report.left)


def filled(mask, drop):
    mask.masked_fill_(drop, float("-inf"))
    return mask


def copied(m, drop):
    m.mask.copy_(torch.zeros(LEN, LEN).masked_fill(drop, float("-inf")))
    return m.mask


FILLED = {
    "made anew": lambda m, x, drop: filled(torch.zeros(LEN, LEN), drop),
    "made like an input": lambda m, x, drop: filled(x.new_zeros(LEN, LEN), drop),
    "through a view": lambda m, x, drop: (lambda mask: (filled(mask[0], drop), mask[0])[1])(x.new_zeros(1, LEN, LEN)),
    "a buffer": lambda m, x, drop: copied(m, drop),
}


@pytest.mark.parametrize("name", FILLED)
def test_a_mask_that_is_filled_from_an_input(name):
    """It was causal in the example; the next call has another."""

    def forward(m, x, drop):
        mask = FILLED[name](m, x, drop)
        q, k, v = heads(m, x)
        return F.softmax(q @ k.mT * 0.25 + mask, -1) @ v

    module = initialised(Module(forward, **dict.fromkeys("qkv", (HEADS * DIM, WIDTH))))
    module.register_buffer("mask", torch.zeros(LEN, LEN))
    x = normal(2, LEN, WIDTH)
    fused = fuse(module, (x, ~keep()))
    assert rules(fused) == {"one product": 1}
    for drop in (~keep(), ~keep().T, torch.zeros_like(keep())):
        assert_same(fused, module, x, drop)


def aliased(m, x, y):
    h = x
    h += y  # torch.fx traces this as a new tensor; but it is x that changes
    return h + x


def test_a_trace_that_lost_an_alias_is_not_used():
    module = Module(aliased)
    x, y = normal(2, 3), normal(2, 3, seed=1)
    fused = fuse(module, (x, y))
    mine, theirs = x.clone(), x.clone()
    assert torch.equal(fused(mine, y), module(theirs, y))
    assert torch.equal(mine, theirs)
    assert torch.equal(theirs, x + y)


def test_cannot_be_traced():
    module = Module(lambda m, x, y: x.sum().item() * (x if x.sum() > 0 else -x))
    with pytest.raises(ValueError, match=r"^module: got Module, which cannot be traced \(torch.fx: .*; torch.export: "):
        fuse(module, (normal(2),))
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()  # takes another path when it is not traced
    with pytest.raises(ValueError, match=r"torch.export: what it traced computes something else than the module"):
        fuse(layer, (normal(2, 3, 32),))
    for given, name in (((lambda x: x, (normal(2),)), "module"), ((Module(aliased), normal(2)), "example_inputs")):
        with pytest.raises(ValueError, match=f"^{name}: got .* expected "):
            fuse(*given)


def test_inputs_are_held_to_what_was_assumed():
    module = initialised(Module(NORMS["F.rms_norm"], w=WIDTH))
    fused = fuse(module, (normal(2, WIDTH), None))
    fused(normal(7, WIDTH))
    for given in ((normal(2, WIDTH, dtype=BF16),), (normal(2, WIDTH), 3), (normal(2, WIDTH), None, None)):
        with pytest.raises(ValueError, match=r"^input"):
            fused(*given)
    with pytest.raises(ValueError, match=r"^inputs: got x by name"):
        fused(x=normal(2, WIDTH))


class Packed(nn.Module):
    def forward(this, x, angles, options=None, twice=False):  # whatever self is called
        cos, sin = angles["cos, sin"]
        return {"out": (F.silu(x) * cos + sin, 1 if twice else 2)}


def test_tensors_in_containers():
    """Such as (cos, sin), as Hugging Face's layers take them."""
    x, y, z = (normal(2, WIDTH, seed=i) for i in range(3))
    module, angles = Packed(), {"cos, sin": (y, z)}
    fused = fuse(module, (x, angles))
    assert rules(fused) == {"swiglu": 1}
    for given in ((x, angles), (z, {"cos, sin": (x, y)}, None), (x[:1], {"cos, sin": (z[:1], y[:1])}, None, False)):
        torch.testing.assert_close(fused(*given), module(*given))
    for given, message in (
        ((x,), "inputs: got 1, missing a required argument: 'angles'"), ((x, angles, None, True), "input 3: got True, expected False"),
        ((x, {"cos, sin": (y, None)}), "input 1: got "), ((x, {"cos, sin": [y, z]}), "input 1: got "), ((x, (y, z)), "input 1: got "),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}"):
            fused(*given)
    with pytest.raises(ValueError, match=r"^example_inputs: got 1, missing a required argument: 'angles'"):
        fuse(module, (x,))


def test_an_argument_that_was_given():
    """Or left out: the other way is another graph."""
    module, x = Module(lambda m, x, y: x if y is None else x + y), normal(2, WIDTH)
    with pytest.raises(ValueError, match=r"^input 1: got None, expected \['torch.float32', 'cpu'\], which it was fused"):
        fuse(module, (x, x))(x)
    with pytest.raises(ValueError, match=r"^input 1: got \['torch.float32', 'cpu'\], expected None, which it was fused"):
        fuse(module, (x,))(x, x)


@pytest.mark.parametrize("ops", [ref, fusion], ids=lambda ops: ops.__name__)
def test_a_batch_of_one_in_the_example(ops):
    """What has one shape there need not in another call."""

    def forward(m, x, y):
        cos, sin = (f(y[..., : DIM // 2]).unsqueeze(-2) for f in (torch.cos, torch.sin))
        q, k = (turned(h.unflatten(-1, (-1, DIM)), cos, sin, 1) for h in (x, x[..., :DIM]))
        return F.silu(x) * y, q, k, NORMS["F.rms_norm"](m, y + x, None)

    module = initialised(Module(forward, w=WIDTH))
    fused = fuse(module, (normal(1, 3, WIDTH), normal(1, 3, WIDTH)), ops)
    assert rules(fused) == {"swiglu": 1, "rope": 1, "rmsnorm": 1, "add_rmsnorm": 1}
    for batch in (1, 2):
        assert_same(fused, module, normal(2, 3, WIDTH), normal(batch, 3, WIDTH, seed=1))


def test_the_module_stays_as_it_is():
    model = llama(F32)
    block = nn.Sequential(model.layers[0].mlp, nn.BatchNorm1d(LEN)).train()
    before = {name: x.clone() for name, x in block.state_dict().items()}
    state, x = torch.get_rng_state(), normal(2, LEN, WIDTH)
    fused = fuse(block, (x,))
    assert all(torch.equal(x, before[name]) for name, x in block.state_dict().items())
    assert block.training
    assert torch.equal(torch.get_rng_state(), state)
    assert fused.get_parameter("0.down_proj.weight") is block[0].down_proj.weight, "shared"
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in block.parameters()), "nothing twice"


def test_ops_may_lack_a_function():
    """And be any callables. Without rmsnorm, only norms of a sum are replaced."""
    model, calls = llama(F32), []

    def counted(name, *args, **kwargs):
        calls.append(name)
        return getattr(ref, name)(*args, **kwargs)

    names = ("add_rmsnorm", "swiglu", "rope", "softmax")
    ops = SimpleNamespace(**{name: partial(counted, name) for name in names})
    cos, sin = model.angles(torch.arange(LEN))
    inputs = (normal(2, LEN, WIDTH), cos, sin, partial(causal, 0))
    fused = fuse(model.layers[0], inputs, ops)
    assert rules(fused) == {"add_rmsnorm": 1, "swiglu": 1, "rope": 1, "one product": 2}
    assert calls == [], "nothing is called while fusing"
    assert_same(fused, model.layers[0], *inputs)
    assert sorted(calls) == ["add_rmsnorm", "rope", "swiglu"]


def test_bias_gelu():
    module, x = initialised(Module(lambda m, x, y: F.gelu(x + m.b, approximate="tanh"), b=WIDTH)), normal(2, 3, WIDTH)
    fused = fuse(module, (x,), fusion)
    assert rules(fused) == {"bias_gelu": 1}
    assert_same(fused, module, x)


@pytest.mark.parametrize("module, shape", [
    (nn.MultiheadAttention(32, 4, batch_first=True), (2, 3, 32)),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU()), (1, 3, 8, 8)), (nn.LSTM(8, 8), (3, 2, 8)), (nn.GroupNorm(2, 4), (2, 4, 5)),
    (Module(lambda m, x, y: torch.cat([x.sin(), x.cos()], -1).split(1, 0)[0]), (2, 4)), (Module(lambda m, x, y: (x.max(), {"a": x.topk(2)})), (5,)),
    (Module(lambda m, x, y: x.new_zeros(x.shape[0]) + x[:, 0] + x.size(1)), (2, 3)),
], ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "")  # fmt: skip
def test_what_it_does_not_know_stays(module, shape):
    """Either the same bits, or a clear refusal."""
    module, x = module.eval(), normal(*shape)
    inputs = (x, x.clone(), x.clone()) if isinstance(module, nn.MultiheadAttention) else (x,)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        fused = fuse(module, inputs)
        got, want = fx_graph.tree_leaves(fused(*inputs)), fx_graph.tree_leaves(module(*inputs))
    assert len(got) == len(want)
    assert all(map(torch.equal, got, want))


# ---- the bill


def test_counts_by_hand():
    """x + y, then a norm in fp32: every operation reads and writes its tensors once."""
    rows = 5
    module = initialised(Module(lambda m, x, y: (lambda s: (NORMS["pow, mean, rsqrt"](m, s, None), s))(x + y), w=WIDTH))
    x, y = normal(rows, WIDTH), normal(rows, WIDTH, seed=1)
    fused = fuse(module, (x, y))
    n, r, w = 4 * rows * WIDTH, 4 * rows, 4 * WIDTH
    want = {
        "add": (2, 3 * n + 2 * r), "pow": (1, 2 * n), "mean": (1, n + r), "rsqrt": (1, 2 * r), "mul": (2, 2 * n + r + 2 * n + w),
    }  # fmt: skip
    got = {}
    for row in fused.report.before:
        launches, size = got.get(row.what, (0, 0))
        got[row.what] = (launches + row.launches, size + row.bytes)
    assert got == want
    assert [(row.what, row.launches, row.bytes) for row in fused.report.after] == [("add_rmsnorm", 1, 4 * n + w)]
    assert str(fused.report).startswith("before: 7 launches, ")


def test_views_and_allocations_are_free():
    module = Module(lambda m, x, y: x.new_empty(3).fill_(1) + x.t().view(3, 2).expand(4, 3, 2)[0].permute(1, 0).contiguous().sum(0))
    rows = fx_graph.trace(module, (normal(3, 2).t(),))[0]
    counts = {n.name: n.meta["launches"] for n in rows.graph.nodes if n.op.startswith("call") and n.meta["launches"]}
    assert counts == {"fill_": 1, "contiguous": 1, "sum_1": 1, "add": 1}


def test_states_lead_from_before_to_after():
    model = llama(BF16)
    cos, sin = model.angles(torch.arange(LEN))
    inputs = (normal(2, LEN, WIDTH, dtype=BF16), cos, sin, partial(causal, 0))
    report = fuse(model.layers[0], inputs).report
    states = report.states()
    assert states[0][1] == report.before
    assert states[-1][1] == report.after
    assert [rule for rule, _ in states] == ["as traced", *(step.rule for step in report.steps)]
    what = [row.what for row in states[-2][1]]  # what is new stands where the old ones were
    assert what == (
        "rmsnorm linear linear linear rope scaled_dot_product_attention linear add_rmsnorm linear swiglu linear add"
    ).split()
    launches = [report.total(rows)[0] for _, rows in states]
    assert launches == sorted(launches, reverse=True)
    final = {row.node: row for row in report.after}
    assert final["linear_3"].reads == ("scaled_dot_product_attention",), "through a transpose and a flatten"
    assert final["swiglu"].reads == ("linear_7",), "two pieces of one product"
    assert "x" in final["add_rmsnorm"].reads


def test_without_memory():
    """On the meta device: the bill of a model of any size. Attention counts as one kernel there as well."""
    with torch.device("meta"):
        model = Llama(Config(64, 4096, 14336, 1, 32, 8, 128)).to(BF16).eval()
        cos, sin = (torch.empty(5, 64) for _ in range(2))
        fused = fuse(model.layers[0], (torch.empty(1, 5, 4096, dtype=BF16), cos, sin, partial(causal, 0)))
    assert rules(fused) == BLOCK
    assert sum(row.launches for row in fused.report.after) == 10
    weights = sum(p.numel() for p in model.layers[0].parameters())
    moved = sum(row.bytes for row in fused.report.after)
    assert 2 * weights < moved < 2.02 * weights


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("named", [0, 1, 3], ids="{} by name".format)
def test_torchs_attention_by_keyword(named, device):
    """Traced by torch.fx, so for any shapes; and its output is as wide as v."""
    names = ("query", "key", "value")

    def forward(m, x, y):
        qkv = (x.transpose(1, 2), x.transpose(1, 2), y.transpose(1, 2))
        given = 3 - named
        return F.scaled_dot_product_attention(*qkv[:given], **dict(zip(names[given:], qkv[given:])))

    x, y = (torch.zeros(2, LEN, HEADS, d, device=device) for d in (DIM, DIM + 3))
    fused = fuse(Module(forward), (x, y))
    out = next(n for n in fused.graph.nodes if fx_graph.name_of(n) == "scaled_dot_product_attention")
    assert out.meta["shape"] == (2, HEADS, LEN, DIM + 3)
    if device == "meta":
        assert [row.launches for row in fused.report.before] == [1]
    assert fused(x[:1], y[:1]).shape == (1, HEADS, LEN, DIM + 3)


def test_attention_without_memory_is_laid_out_like_q():
    q, v = (torch.empty(2, LEN, HEADS, d, device="meta").transpose(1, 2) for d in (DIM, DIM + 3))
    assert fx_graph._empty_attention(q, q, q).stride() == torch.empty_like(q).stride()
    assert fx_graph._empty_attention(q, q, v).stride() == v.stride()
