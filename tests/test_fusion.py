import numpy as np
import pytest
import torch
from far_apart import far_apart
from fresh_memory import nan_in_fresh_memory

from kernels import fusion
from labkit import fusion as ref
from labkit.check import BF16, F16, F32, assert_matches, randn

# (old text, new text) of these files; tests/planted_bugs.py plants them one at a time.
PLANTED_BUGS = [
    ("kernels/fusion.py", "        s = cast(s, x_ptr.dtype.element_ty).to(tl.float32)\n", ""),
    ("kernels/fusion.py", "tl.sum(s * s, 1) / n + eps)\n        if", "tl.sum(s * s, 1) / BLOCK_N + eps)\n        if"),
    ("kernels/fusion.py", "dw += dy * h", "dw = dy * h"),
    ("kernels/fusion.py", "g - h * (tl.sum(g * h, 1) / n)[:, None]", "g"),
    ("kernels/fusion.py", "mean = tl.sum(product, 1)[:, None] * rstd / n", "mean = tl.sum(product, 1)[:, None] / n"),
    ("kernels/fusion.py", "dw = _load(dw_ptr, 0, 1, rows, first + cols, mask) + dy * h", "dw = dy * h"),
    ("kernels/fusion.py", "if dy is None:", "if False:"),
    ("kernels/_tile.py", 'return tl.where(m == float("-inf"), 0.0, m)', "return m"),
    ("kernels/_tile.py", "return tl.max(tl.max(x, 2), 0)", "return tl.max(tl.min(x, 2), 0)"),
    ("kernels/fusion.py", "total = total * tl.exp2((top - finite(new)) * LOG2E) +", "total = total +"),
    ("kernels/fusion.py", "tl.sum(total * tl.exp2((top - row_top) * LOG2E), 0)", "tl.sum(total, 0)"),
    ("kernels/fusion.py", "row_top = tl.max(top, 0)", "row_top = tl.sum(tl.where(tl.arange(0, THREADS) == 0, top, 0.0), 0)"),
    ("kernels/fusion.py", "last = (n - 1) // BLOCK_N * BLOCK_N", "last = n // BLOCK_N * BLOCK_N"),
    ("kernels/fusion.py", "mask = (last - first + cols < n)[None, :]", "mask = (first + cols < n)[None, :]"),
    ("kernels/fusion.py", "share * (1.0 + gate * (1.0 - share))", "share"),
    ("kernels/fusion.py", "0.044715 * x * x * x", "0.044715 * x * x"),
    ("kernels/fusion.py", "0.5 * (1.0 + tl.erf", "0.5 * (1.01 + tl.erf"),
    ("kernels/fusion.py", "gate, up = gate * rstd, up * rstd", "gate, up = gate * rstd, up"),
    ("kernels/fusion.py", "square += x * x", "square = x * x"),
    ("kernels/fusion.py", "mask_k = (offs_k < k - first)[None, None, :]", "mask_k = (offs_k < k)[None, None, :]"),
    ("kernels/fusion.py", "h, x = add_rmsnorm(x, o", "h, _ = add_rmsnorm(x, o"),
    ("kernels/rope.py", "b * cos_b[None, :] + a * sin_b[None, :]", "b * cos_b[None, :] - a * sin_b[None, :]"),
    ("kernels/rope.py", "cos_b = tl.load(cos_ptrs + half * stride_cd", "cos_b = tl.load(cos_ptrs"),
    ("kernels/rope.py", "sin = sin.roll(sin.shape[-1] // 2, -1)", "pass"),
    ("kernels/rope.py", "+ offs_d + HALF, mask", "+ offs_d, mask"),
    ("kernels/rope.py", "(slot >= 0) & (slot < num_slots)", "slot < num_slots"),
    ("kernels/rope.py", "mask = mask & stored", "pass"),
    ("kernels/rope.py", "bias_ptr + num_q_heads * 2 * HALF", "bias_ptr"),
    ("kernels/rope.py", "b, t = token // length, token % length", "b, t = token // length, token // length"),
    ("kernels/rope.py", "if wants_grad(*inputs) else function(*inputs)", "if False else function(*inputs)"),
    ("labkit/args.py", "tensor(name, x, (*shape, dim // 2), like=q", "tensor(name, x, (*shape, 'half'), like=q"),
]  # fmt: skip

# A GPU overflows in silence; numpy, under the interpreter, warns.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    nan_in_fresh_memory(monkeypatch)


def tensors(device, dtype, *shapes, strided=False, scale=1.0):
    """Normal values, scaled; strided: every second row and column of a buffer that is NaN elsewhere."""
    rng = np.random.default_rng(0)
    made = [randn(rng, *shape, dtype=dtype, device=device) * scale for shape in shapes]
    if not strided:
        return made
    wide = [torch.full([2 * n for n in shape], float("nan"), dtype=dtype, device=device) for shape in shapes]
    return [w[tuple(slice(1, None, 2) for _ in w.shape)].copy_(x) for w, x in zip(wide, made)]


# rows, width, dtype, strided: around the blocks' edges, one element, nothing at all, and wider than a tile
ROWS = (
    ((3, 127), BF16, False), ((2, 2, 128), F16, False), ((5, 129), F32, True), ((1,), BF16, False),
    ((0, 16), F32, False), ((3, 0), F32, False), ((9, 33), BF16, True), ((2, 4097), F16, False),
    ((2, 17_001), BF16, False),
)  # fmt: skip
rows = pytest.mark.parametrize("shape, dtype, strided", ROWS, ids=str)


@rows
def test_add_rmsnorm(shape, dtype, strided, device):
    x, r, w = tensors(device, dtype, shape, shape, shape[-1:], strided=strided)
    got = fusion.add_rmsnorm(x, r, w)
    assert_matches(got, ref.add_rmsnorm, x, r, w)
    if shape == (3, 127):
        assert_matches(fusion.add_rmsnorm(x, r, w, eps=0.5), ref.add_rmsnorm, x, r, w, eps=0.5)
        assert torch.equal(got[0], fusion.rmsnorm(got[1], w)), "y is the norm of the residual that is returned"


@pytest.mark.parametrize("shape, dtype, strided", ROWS[1:3], ids=str)
def test_rmsnorm(shape, dtype, strided, device):
    x, w = tensors(device, dtype, shape, shape[-1:], strided=strided)
    assert_matches(fusion.rmsnorm(x, w, eps=1e-5), ref.rmsnorm, x, w, eps=1e-5)


# Rows in pieces: of ROWS[-1] the second begins between two words; these can be loaded 16 bytes at a time.
PIECES = ((2, 16_400), BF16, False), ((2, 24_576), F32, False)


@pytest.mark.parametrize("shape, dtype, strided", ROWS[::2] + ROWS[5:6] + PIECES, ids=str)
def test_softmax(shape, dtype, strided, device):
    (x,) = tensors(device, dtype, shape, strided=strided, scale=4.0)
    if x.numel() > 3:
        x[..., ::3] = float("-inf")
    assert_matches(fusion.softmax(x), ref.softmax, x)


@pytest.mark.parametrize("width", [17_001, 17_008])
def test_softmax_of_threads_that_differ(width, device):
    """Most threads see nothing but -inf at first, and some all the time. The maximum comes late, far above the rest."""
    x = randn(np.random.default_rng(0), 2, width, device=device)
    x[0, :16_500] = float("-inf")
    x[0, -5], x[1, -700] = 6.0, 30.0
    x[1] -= 5000.0
    assert_matches(fusion.softmax(x), ref.softmax, x)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("width", [5, 17_001, 17_008])
def test_softmax_of_what_is_no_number(width, device):
    """As torch: a row of -inf, with a +inf or with a NaN is NaN; its neighbours are not."""
    x = torch.zeros(4, width, device=device)
    x[0] = float("-inf")
    x[1, 1], x[2, 2] = float("inf"), float("nan")
    with np.errstate(invalid="ignore"):
        y = fusion.softmax(x)
    assert y[:3].isnan().any(1).all()
    assert torch.equal(y.isnan(), x.softmax(-1).isnan())


@pytest.mark.parametrize("shape, dtype, strided", [c for c in ROWS if c[0][-1] < 17_000], ids=str)
def test_swiglu_and_bias_gelu(shape, dtype, strided, device):
    gate, up, bias = tensors(device, dtype, shape, shape, shape[-1:], strided=strided, scale=3.0)
    assert_matches(fusion.swiglu(gate, up), ref.swiglu, gate, up)
    approximate = "none" if len(shape) % 2 else "tanh"
    got = fusion.bias_gelu(up, bias, approximate=approximate)
    assert_matches(got, ref.bias_gelu, up, bias, approximate=approximate)
    other = ref.bias_gelu(up, bias, approximate="tanh" if approximate == "none" else "none")
    if dtype == F32 and up.numel() > 1:
        assert (got - other).abs().max() > 1e-4, "the two kinds of GELU are not the same"


def test_pieces_of_one_product(device):
    """gate and up as a fused product leaves them: two halves of one tensor."""
    (both,) = tensors(device, BF16, (3, 5, 260))
    gate, up = both.chunk(2, -1)
    assert_matches(fusion.swiglu(gate, up), ref.swiglu, gate, up)
    assert_matches(fusion.swiglu(gate.expand(2, 3, 5, 130), up.expand(2, 3, 5, 130)), ref.swiglu, gate.expand(2, 3, 5, 130), up.expand(2, 3, 5, 130))


@pytest.fixture(autouse=True)
def a_small_gpu(monkeypatch):
    """The weight's gradient is added up over rows by two programs an SM: with two SMs, several rows for each."""
    monkeypatch.setattr(fusion, "device_properties", lambda: {"multiprocessor_count": 2})


def gradients(function, count):
    """The function that returns the gradients of function's first `count` arguments; the rest are what reaches its outputs."""

    def of(*tensors, **options):
        inputs = [x.detach().clone().requires_grad_() for x in tensors[:count]]
        outputs = function(*inputs, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, inputs, tensors[count:])

    return of


GRADIENT_ROWS = (
    ((3, 127), BF16, False), ((5, 130), F32, True), ((9, 2, 8), F16, False), ((5, 8200), F32, False),
    ((0, 4), F32, False),
)  # fmt: skip
gradient_rows = pytest.mark.parametrize("shape, dtype, strided", GRADIENT_ROWS, ids=str)


@gradient_rows
def test_add_rmsnorm_gradient(shape, dtype, strided, device):
    inputs = tensors(device, dtype, shape, shape, shape[-1:], shape, shape, strided=strided)
    assert_matches(gradients(fusion.add_rmsnorm, 3)(*inputs), gradients(ref.add_rmsnorm, 3), *inputs)


@pytest.mark.parametrize("shape, dtype, strided", GRADIENT_ROWS[1:2], ids=str)
def test_rmsnorm_gradient(shape, dtype, strided, device):
    inputs = tensors(device, dtype, shape, shape[-1:], shape, strided=strided)
    assert_matches(gradients(fusion.rmsnorm, 2)(*inputs), gradients(ref.rmsnorm, 2), *inputs)


@pytest.mark.parametrize("shape, dtype, strided", GRADIENT_ROWS[1:3] + GRADIENT_ROWS[4:], ids=str)
def test_swiglu_gradient(shape, dtype, strided, device):
    inputs = tensors(device, dtype, shape, shape, shape, strided=strided)
    assert_matches(gradients(fusion.swiglu, 2)(*inputs), gradients(ref.swiglu, 2), *inputs)


def test_one_output_may_be_unused(device):
    x, r, w, d = tensors(device, F32, (3, 20), (3, 20), (20,), (3, 20))
    for i in (0, 1):
        pick = lambda ops, i=i: lambda *a: ops.add_rmsnorm(*a)[i]  # noqa: E731
        count = 3 if i == 0 else 2  # the sum does not depend on the weight
        if count == 2:
            pick = lambda ops: lambda x, r: ops.add_rmsnorm(x, r, w.to(x.dtype))[1]  # noqa: E731
        inputs = (x, r, w, d) if count == 3 else (x, r, d)
        assert_matches(gradients(pick(fusion), count)(*inputs), gradients(pick(ref), count), *inputs)


def test_a_missing_gradient_is_an_error(device):
    """Never a gradient that is silently absent, nor one of second order that is silently wrong."""
    x, b = (t.requires_grad_() for t in tensors(device, F32, (2, 8), (8,)))
    for y in (fusion.softmax(x), fusion.bias_gelu(x, b), fusion.attention(*[x.view(1, 2, 1, 8)] * 3)):
        with pytest.raises(NotImplementedError, match=r"has no backward kernel: use it under torch.no_grad"):
            y.sum().backward()
    (g,) = torch.autograd.grad(fusion.swiglu(x, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# lead, length, q heads, kv heads, head_dim, dtype of q and k, of cos and sin, angles for each batch element, strided
ROPE = (
    ((2,), 3, 4, 2, 64, BF16, F32, False, False), ((), 5, 3, 1, 20, F32, F32, False, False), ((1, 2), 2, 2, 2, 6, F16, F16, True, False),
    ((2,), 3, 6, 2, 80, BF16, F32, True, True), ((3,), 1, 70, 33, 128, BF16, BF16, False, False), ((0,), 4, 2, 1, 8, F32, F32, False, False),
)  # fmt: skip


def rope_inputs(device, lead, length, hq, hk, dim, dtype, angle_dtype, own_angles, strided):
    q, k = tensors(device, dtype, (*lead, length, hq, dim), (*lead, length, hk, dim), strided=strided)
    rng = np.random.default_rng(1)
    angle = randn(rng, *(lead if own_angles else ()), length, dim // 2, device=device) * 9
    return q, k, angle.cos().to(angle_dtype), angle.sin().to(angle_dtype)


@pytest.mark.parametrize("case", ROPE, ids=str)
def test_rope(case, device):
    q, k, cos, sin = rope_inputs(device, *case)
    if case in ROPE[2:4]:  # D wide, and the halves differ
        cos, sin = torch.cat((cos, -sin), -1), torch.cat((sin, 2 * cos), -1)
    want = [x.clone() for x in (q, k)]
    got = fusion.rope(q, k, cos, sin)
    assert_matches(got, ref.rope, q, k, cos, sin)
    assert all(map(torch.equal, (q, k), want)), "the inputs are as they were"
    mine = fusion.rope(q, k, cos, sin, inplace=True)
    assert mine[0] is q
    assert mine[1] is k
    assert all(map(torch.equal, mine, got)), "in place gives the same"


@pytest.mark.parametrize("wide", [False, True])
def test_rope_gradient(wide, device):
    q, k, cos, sin = rope_inputs(device, *ROPE[0])
    if wide:
        cos, sin = torch.cat((cos, -sin), -1), torch.cat((sin, 2 * cos), -1)

    def fixed(ops):
        return lambda q, k: ops.rope(q, k, *(x.double() if q.dtype == torch.float64 else x for x in (cos, sin)))

    inputs = (q, k, *(torch.ones_like(x) for x in (q, k)))
    assert_matches(gradients(fixed(fusion), 2)(*inputs), gradients(fixed(ref), 2), *inputs)


# tokens, q heads, kv heads, head_dim, page_size, dtype, bias, strided
WRITES = (
    (5, 4, 2, 64, 4, BF16, True, False), (3, 3, 1, 10, 1, F32, False, True), (4, 40, 20, 128, 16, F16, True, False),
    (0, 2, 1, 8, 4, F32, True, False),
)  # fmt: skip


@pytest.mark.parametrize("case", WRITES, ids=str)
def test_rope_write_kv(case, device):
    n, hq, hk, dim, page_size, dtype, has_bias, strided = case
    width = (hq + 2 * hk) * dim
    qkv, bias = tensors(device, dtype, (n, width), (width,), strided=strided)
    angle = randn(np.random.default_rng(1), n, dim // 2, device=device) * 9
    k_pages, v_pages = tensors(device, dtype, (8, page_size, hk, dim), (8, page_size, hk, dim), strided=strided)
    slots = torch.tensor([7 * page_size, 0, -1, 2 * page_size - 1, 3 * page_size][:n], dtype=torch.int64, device=device)
    caches = [x.clone() for x in (k_pages, v_pages)]

    def run(function):
        def call(qkv, bias, cos, sin, k_pages, v_pages):
            k_pages, v_pages = k_pages.clone(), v_pages.clone()
            q = function(qkv, bias, cos, sin, k_pages, v_pages, slots)
            return q, k_pages, v_pages

        return call

    inputs = (qkv, bias if has_bias else None, angle.cos(), angle.sin(), *caches)
    q = fusion.rope_write_kv(qkv, inputs[1], angle.cos(), angle.sin(), k_pages, v_pages, slots)
    assert_matches((q, k_pages, v_pages), run(ref.rope_write_kv), *inputs)
    untouched = [i for i in range(8 * page_size) if i not in slots.tolist()]
    for now, before in zip((k_pages, v_pages), caches):
        assert torch.equal(now.flatten(0, 1)[untouched], before.flatten(0, 1)[untouched])


@pytest.mark.parametrize("m, n, k, dtype, normed, strided", [
    ((1,), 7, 130, BF16, True, False), ((2, 3), 5, 64, F16, False, False), ((5,), 3, 2100, F32, True, True), ((4,), 4, 33, BF16, True, True),
    ((1,), 1, 1, F32, True, False), ((0,), 4, 8, F32, True, False), ((2,), 0, 8, F32, False, False), ((2,), 3, 0, F32, True, False),
], ids=str)  # fmt: skip
def test_gate_up_swiglu(m, n, k, dtype, normed, strided, device):
    x, gate, up, norm = tensors(device, dtype, (*m, k), (n, k), (n, k), (k,), strided=strided)
    norm = norm if normed else None
    got = fusion.gate_up_swiglu(x, gate, up, norm_weight=norm)
    assert_matches(got, ref.gate_up_swiglu, x, gate, up, norm_weight=norm)


@pytest.mark.parametrize("far", [0, 1, 2, 3], ids=["x", "gate", "up", "norm"])
def test_offsets_of_64_bits(far, device):
    """Transposed weights: their columns lie far apart."""
    given = tensors(device, F16, (2, 1500), (3, 1500), (3, 1500), (1500,))
    *inputs, norm = (far_apart(x, -1) if i == far else x for i, x in enumerate(given))
    got = fusion.gate_up_swiglu(*inputs, norm_weight=norm)
    assert_matches(got, ref.gate_up_swiglu, *given[:3], norm_weight=given[3])


def test_rope_of_a_transposed_product(device):
    """Heads and their halves lie far apart: as a view of [N, (Hq + 2 Hkv) D] stored column by column."""
    qkv, k_pages, v_pages = tensors(device, F16, (3, 4 * 64), (2, 4, 1, 64), (2, 4, 1, 64))
    angle = randn(np.random.default_rng(1), 3, 32, device=device)
    slots = torch.tensor([0, 5, 7], device=device)
    written = [k_pages.clone(), v_pages.clone()]
    want = fusion.rope_write_kv(qkv, None, angle.cos(), angle.sin(), k_pages, v_pages, slots)
    got = fusion.rope_write_kv(far_apart(qkv, 1), None, angle.cos(), angle.sin(), *written, slots)
    assert all(map(torch.equal, (got, *written), (want, k_pages, v_pages)))
    heads = qkv.view(3, 4, 64)
    want = fusion.rope(heads, heads[:, :1], angle.cos(), angle.sin())
    got = fusion.rope(far_apart(heads, 2), heads[:, :1], angle.cos(), angle.sin())
    assert all(map(torch.equal, got, want))


def test_bad_input_is_named(device, monkeypatch):
    monkeypatch.setenv("LAB_CHECK", "1")  # look at values also where they live on a GPU
    x, w = torch.zeros(2, 8, device=device), torch.zeros(8, device=device)
    q, a = torch.zeros(3, 2, 8, device=device), torch.zeros(3, 4, device=device)
    pages, slots = torch.zeros(2, 4, 1, 8, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    qkv = torch.ones(3, 32, device=device)  # written by mistake, it would show in the pages
    for ops in (fusion, ref):
        for call, given, name in (
            (ops.rmsnorm, (x, w[:4]), "weight"), (ops.rmsnorm, (x.int(), w), "x"), (ops.add_rmsnorm, (x, x[:1], w), "residual"),
            (ops.add_rmsnorm, (x, x.half(), w), "residual"), (ops.swiglu, (x, x[:, :4]), "up"), (ops.swiglu, (x, x.to("meta")), "up"),
            (ops.softmax, (x.sum(),), "x"), (ops.softmax, ([1.0],), "x"), (ops.bias_gelu, (x, w.half()), "bias"),
            (ops.rope, (q[..., :7], q, a, a), "q"), (ops.rope, (q, q[..., :4], a, a), "k"), (ops.rope, (q, q, a[:2], a), "cos"),
            (ops.rope, (q, q, a[:, :3], a[:, :3]), "cos"), (ops.rope, (q, q, a, a[None, :, :2]), "sin"), (ops.rope_write_kv, (qkv, w, a, a, pages, pages, slots), "bias"),
            (ops.rope_write_kv, (qkv[:, :15], None, a, a, pages, pages, slots), "qkv"),
            (ops.rope_write_kv, (qkv, None, a, a, pages, pages, slots + 8), "slots"),
            (ops.gate_up_swiglu, (x, torch.zeros(3, 8, device=device), torch.zeros(2, 8, device=device)), "up_weight"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"^{name} ?.*got .* expected "):
                call(*given)
        with pytest.raises(ValueError, match=r"^approximate: got sigmoid"):
            ops.bias_gelu(x, w, approximate="sigmoid")
    assert not pages.any()
    with pytest.raises(ValueError, match=r"^q .strides.: got"):
        fusion.rope(q[:, :1].expand(3, 2, 8), q, a + 1, a, inplace=True)
    assert not q.any()


@pytest.mark.parametrize("batch, dtype", [(2, BF16), (5, F16)], ids=str)
def test_decode_block(batch, dtype, device):
    """Both forms of the MLP. The reference is the block as it is usually written."""
    hq, hk, dim, keys, width, ffn = 4, 2, 16, 9, 40, 24
    shapes = ((batch, width), (batch, keys, hk, dim), (batch, keys, hk, dim), ((hq + 2 * hk) * dim, width), (width, hq * dim), (2 * ffn, width), (width, ffn))
    x, k, v, qkv, o, gate_up, down = tensors(device, dtype, *shapes)
    qkv, o, gate_up, down = (w * 0.2 for w in (qkv, o, gate_up, down))
    norm, mlp_norm = tensors(device, dtype, (width,), (width,))
    angle = randn(np.random.default_rng(1), batch, dim // 2, device=device)
    kv_lens = torch.arange(batch, dtype=torch.int32, device=device) + 3
    inputs = (x, angle.cos(), angle.sin(), k, v, kv_lens, norm, qkv, o, mlp_norm, gate_up, down)
    assert_matches(fusion.decode_block(*inputs), ref.decode_block, *inputs)
    names = {1: "cos", 2: "sin", 6: "norm", 7: "qkv_weight", 8: "o_weight", 9: "mlp_norm", 10: "gate_up_weight", 11: "down_weight"}
    wrong = [(i, inputs[i][..., :7], name) for i, name in names.items()]
    wrong += [(7, qkv[:-1], "qkv_weight"), (10, gate_up[:-1], "gate_up_weight")]
    for bad, tensor, name in wrong:
        given = [tensor if i == bad else x for i, x in enumerate(inputs)]
        for ops in (fusion, ref):
            with pytest.raises(ValueError, match=f"^{name} .*got .* expected "):
                ops.decode_block(*given)


def test_every_benchmark_case_is_right(device):
    """One of each operation, tiny: the inputs that are timed are inputs that the kernel gets right."""
    assert [case.name for case in ref.cases(tiny=True)] == [case.name for case in ref.cases()]
    for case in {case.op: case for case in ref.cases(tiny=True)}.values():
        inputs = case.make(torch.Generator(device).manual_seed(0), device)
        assert_matches(getattr(fusion, case.op)(**inputs), getattr(ref, case.op), **inputs)
