import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fresh_memory import nan_in_fresh_memory

from kernels import distillation as kd
from labkit import distillation as ref
from labkit.check import assert_matches, randn

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def logits(*shape, dtype=F32, teacher=None, seed=0, device="cpu", spread=2.0):
    rng = np.random.default_rng(seed)
    z, t = (spread * randn(rng, *shape, device=device) for _ in "zt")
    return z.to(dtype), t.to(teacher or dtype)


# name: (shape, dtype, teacher's dtype, labels, options). Pairwise over kind, dtype, vocabulary, temperature and labels.
CASES = {
    "one token": ((1, 1), F32, None, None, {}),
    "two tokens, bf16": ((3, 2), BF16, None, [0, 1, -100], dict(ce_weight=0.5)),
    "127, reverse, T=2": ((4, 127), F16, None, None, dict(kind="reverse_kl", temperature=2.0)),
    "128, jsd": ((3, 128), BF16, F32, [5, -100, 127], dict(kind="jsd", ce_weight=1.0, beta=0.3)),
    "129, mixed dtypes": ((3, 129), F32, BF16, [128, 0, 3], dict(temperature=4.0, ce_weight=0.1)),
    "258, our bytes": ((2, 5, 258), BF16, None, None, dict(temperature=2.0)),
    "three pieces, jsd": ((2, 4097), F32, None, None, dict(kind="jsd", temperature=1.5, beta=0.9)),
    # rows that can be loaded 16 bytes at a time
    "two pieces, reverse": ((2, 5008), BF16, None, [5007, -100], dict(kind="reverse_kl", ce_weight=2.0)),
    "three pieces, forward": ((2, 8208), F16, None, [8200, 4095], dict(ce_weight=0.5, temperature=0.5)),
    "two pieces, jsd, mixed": ((2, 8192), BF16, F32, None, dict(kind="jsd", beta=0.2)),
    "jsd's forward end": ((3, 70), F32, None, None, dict(kind="jsd", beta=0.0)),
    "jsd's reverse end": ((3, 70), F32, None, None, dict(kind="jsd", beta=1.0)),
    "all rows left out": ((2, 33), F32, None, [-100, -100], dict(ce_weight=1.0)),
    "no rows": ((0, 33), BF16, None, None, {}),
    "sum": ((3, 50), F32, None, [1, -100, 2], dict(reduction="sum")),
    "each row": ((3, 50), BF16, None, [1, -100, 2], dict(reduction="none", ce_weight=0.3)),
}


def problem(name, device="cpu"):
    shape, dtype, teacher, labels, options = CASES[name]
    z, t = logits(*shape, dtype=dtype, teacher=teacher, device=device)
    labels = None if labels is None else torch.tensor(labels, device=device).view(shape[:-1])
    return (z, t, labels), options


@pytest.mark.parametrize("name", CASES)
def test_kernel(name, device, monkeypatch):
    inputs, options = problem(name, device)
    nan_in_fresh_memory(monkeypatch)
    assert_matches(kd.kd_loss_and_grad(*inputs, **options), ref.kd_loss_and_grad, *inputs, **options)


@pytest.mark.parametrize("name", ["each row", "three pieces, jsd", "129, mixed dtypes"])
def test_autograd(name, device):
    """The loss's own backward, with a gradient from above that is not 1."""
    (z, t, labels), options = problem(name, device)

    def step(z, t, labels, room):
        z = z.detach().requires_grad_()
        loss = room.kd_loss(z, t.detach().requires_grad_(), labels, **options)
        up = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=z.device).view(loss.shape)
        return loss.detach(), torch.autograd.grad(loss, z, up)[0]

    assert_matches(step(z, t, labels, kd), lambda *a: step(*a, ref), z, t, labels)


def test_teacher_is_a_constant(device):
    for room in (ref, kd):
        z, t = (x.requires_grad_() for x in logits(2, 9, device=device))
        room.kd_loss(z, t).backward()
        assert z.grad is not None
        assert t.grad is None


@pytest.mark.parametrize("kind", kd.KINDS)
def test_strides(kind, device):
    """Logits without their last token, and every second column, are read in place."""
    z, t = logits(3, 6, 140, device=device)
    for view in (lambda x: x[:, :-1], lambda x: x[..., ::2], lambda x: x.transpose(0, 1), lambda x: x[None, :, 2:]):
        inputs = view(z), view(t)
        assert_matches(kd.kd_loss_and_grad(*inputs, kind=kind), ref.kd_loss_and_grad, *inputs, kind=kind)
    assert kd._as_rows(z[:, :-1]).data_ptr() == z.data_ptr()


@pytest.mark.parametrize("kind", kd.KINDS)
def test_offsets_cancel(kind, device):
    """Logits are known up to a constant; two large and different ones change nothing."""
    z, t = logits(2, 4200, device=device)
    z[:, 4100], t[:, 4101] = z.amax(-1) + 2.0, t.amax(-1) + 1.0  # both maxima come late, and move by different amounts
    z, t = z + 3000.0, t - 2000.0
    assert_matches(kd.kd_loss_and_grad(z, t, kind=kind), ref.kd_loss_and_grad, z, t, kind=kind)


@pytest.mark.parametrize("vocab", [4300, 4304])
@pytest.mark.parametrize("kind", kd.KINDS)
def test_tokens_that_cannot_be(kind, vocab, device):
    """-inf in both, over a whole piece too: probability 0, no part in the loss, gradient 0. Some threads see no other."""
    z, t = logits(2, vocab, device=device)
    z[:, :4096] = t[:, :4096] = -math.inf
    z[0, 4200] = t[0, 4200] = -math.inf
    got = kd.kd_loss_and_grad(z, t, kind=kind, temperature=2.0)
    assert_matches(got, ref.kd_loss_and_grad, z, t, kind=kind, temperature=2.0)
    assert got[0].isfinite()
    assert not got[1][:, :4096].any()
    few = kd.kd_loss_and_grad(z[1:, 4096:], t[1:, 4096:], kind=kind, temperature=2.0)
    all_ = kd.kd_loss_and_grad(z[1:], t[1:], kind=kind, temperature=2.0)
    torch.testing.assert_close(few[0], all_[0])


@pytest.mark.parametrize("tokens", [slice(3, 4), slice(4, 8)])  # one of a thread's, and all of a thread's
def test_only_one_rules_a_token_out(tokens, device):
    """p = 0 where q > 0: the forward KL is finite, the reverse one is not; and the other way round."""
    z, t = logits(1, 48, device=device)
    out = t.index_fill(1, torch.arange(48, device=device)[tokens], -math.inf)
    for room in (ref, kd):
        assert room.kd_loss(z, out, kind="reverse_kl") == math.inf
        assert room.kd_loss(out, z) == math.inf
    for kind in ("forward_kl", "jsd"):
        assert_matches(kd.kd_loss_and_grad(z, out, kind=kind), ref.kd_loss_and_grad, z, out, kind=kind)
    for kind in ("reverse_kl", "jsd"):
        assert_matches(kd.kd_loss_and_grad(out, z, kind=kind), ref.kd_loss_and_grad, out, z, kind=kind)


@pytest.mark.parametrize("kind", kd.KINDS)
def test_minus_a_billion_is_as_good_as_inf(kind, device):
    """Where one says -inf and the other -1e9: no probability either way, though some threads see nothing larger."""
    z, t = logits(2, 4304, device=device)
    z[:, :4096] = t[:, :4096] = -math.inf
    want = kd.kd_loss_and_grad(z, t, kind=kind)
    (z if kind == "reverse_kl" else t)[:, :4096] = -1e9
    for got, expected in zip(kd.kd_loss_and_grad(z, t, kind=kind), want):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", kd.KINDS)
def test_probabilities_too_small_for_fp32(kind, device):
    """Logits hundreds apart: most probabilities are 0 in fp32, and their logarithms are not."""
    z, t = logits(4, 144, spread=100.0, device=device)
    assert_matches(kd.kd_loss_and_grad(z, t, kind=kind), ref.kd_loss_and_grad, z, t, kind=kind)


@pytest.mark.parametrize("kind", kd.KINDS)
def test_nan_stays(kind, device):
    """A NaN in either of the two is not lost, not even in a thread whose other logits weigh nothing."""
    for which in range(2):
        pair = logits(1, 4304, device=device)
        pair[which][0, 5] = math.nan
        pair[which][0, 4000] = 500.0
        assert kd.kd_loss(*pair, kind=kind).isnan()


# ---- the reference against others' formulas


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("rows", [1, 3, 7, 256])
def test_reference_in_parts(kind, rows):
    """The same loss and gradient; the last part may be a smaller one."""
    student, teacher = (torch.randn(7, 50, generator=torch.Generator().manual_seed(i)).double() for i in range(2))
    options = dict(kind=kind, temperature=2.0)
    got = ref.kd_loss_and_grad_in_parts(student, teacher, rows=rows, **options)
    torch.testing.assert_close(got, ref.kd_loss_and_grad(student, teacher, **options), rtol=1e-12, atol=1e-15)


def test_reference_equals_torch():
    """kl_div with batchmean, T^2 and cross_entropy: the recipe of Hinton et al. in torch's words."""
    z, t = (x.double() for x in logits(7, 30))
    labels = torch.tensor([3, -100, 0, 29, 5, 6, -100])
    for temperature in (1.0, 2.0, 5.0):
        a, b = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
        want = temperature**2 * F.kl_div(a, b, reduction="batchmean", log_target=True)
        torch.testing.assert_close(ref.kd_loss(z, t, temperature=temperature), want)
        want = temperature**2 * F.kl_div(b, a, reduction="batchmean", log_target=True)
        torch.testing.assert_close(ref.kd_loss(z, t, temperature=temperature, kind="reverse_kl"), want)
    keep = labels != -100
    want = ref.kd_loss(z[keep], t[keep]) + 0.4 * F.cross_entropy(z, labels)
    torch.testing.assert_close(ref.kd_loss(z, t, labels, ce_weight=0.4), want)


def test_jsd_by_its_definition():
    z, t = (x.double() for x in logits(5, 12))
    p, q = t.softmax(-1), z.softmax(-1)
    for beta in (0.1, 0.5, 0.8):
        m = beta * p + (1 - beta) * q
        want = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
        torch.testing.assert_close(ref.kd_loss(z, t, kind="jsd", beta=beta, reduction="none"), want)


def test_jsd_vanishes_towards_its_ends():
    """JSD / beta goes to the forward KL, so the formula itself is 0 at beta 0, where the loss puts the KL."""
    z, t = (x.double() for x in logits(5, 12))
    forward, reverse = (ref.kd_loss(z, t, kind=kind) for kind in ("forward_kl", "reverse_kl"))
    small = 1e-6
    torch.testing.assert_close(ref.kd_loss(z, t, kind="jsd", beta=small) / small, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(ref.kd_loss(z, t, kind="jsd", beta=1 - small) / small, reverse, rtol=1e-4, atol=0)
    assert torch.equal(ref.kd_loss(z, t, kind="jsd", beta=0.0), forward)
    assert torch.equal(ref.kd_loss(z, t, kind="jsd", beta=1.0), reverse)


@pytest.mark.parametrize("kind", kd.KINDS)
def test_gradient_by_differences(kind):
    z, t = (x.double() for x in logits(3, 6))
    labels = torch.tensor([1, -100, 5])
    loss = lambda z: ref.kd_loss(z, t, labels, temperature=1.7, ce_weight=0.3, kind=kind, beta=0.3)  # noqa: E731
    assert torch.autograd.gradcheck(loss, z.requires_grad_())


@pytest.mark.parametrize("view", [
    lambda x: x[:, ::3][:, :2], lambda x: x[:, -2:], lambda x: x[:1, :1].expand(4, 2), lambda x: x[:, :2].t().reshape(2, 4).t(),
])  # fmt: skip
def test_labels_lie_anyhow(view, device):
    """Views: some apart, the last of each row, one for all, transposed."""
    labels = torch.tensor(np.random.default_rng(0).choice([-100, 3, 40], (4, 9)), device=device)
    z, t = logits(4, 2, 50, device=device)
    want = ref.kd_loss_and_grad(z, t, view(labels).contiguous(), ce_weight=0.5)
    torch.testing.assert_close(kd.kd_loss_and_grad(z, t, view(labels), ce_weight=0.5), want)


@pytest.mark.parametrize("room", [ref, kd])
@pytest.mark.parametrize("kind", kd.KINDS)
def test_a_row_left_out_reaches_nothing(kind, room):
    """A padding row may hold anything; the other rows' loss and gradient are what they are without it."""
    z, t = logits(4, 9)
    labels = torch.tensor([3, -100, -100, -100])
    want = room.kd_loss_and_grad(z[:1], t[:1], labels[:1], kind=kind, ce_weight=0.5)
    z[1], z[2], t[2], z[3], t[3] = math.nan, -math.inf, -math.inf, math.inf, math.nan
    loss, grad = room.kd_loss_and_grad(z, t, labels, kind=kind, ce_weight=0.5)
    torch.testing.assert_close((loss, grad[:1]), want)
    assert not grad[1:].any(), "0, and not NaN"


BAD = {
    "vocabularies differ": (dict(teacher_logits=torch.zeros(2, 6)), "teacher_logits"),
    "rows differ": (dict(teacher_logits=torch.zeros(3, 5)), "teacher_logits"),
    "integers": (dict(student_logits=torch.zeros(2, 5, dtype=torch.int64)), "student_logits"),
    "no vocabulary": (dict(student_logits=torch.zeros(2, 0), teacher_logits=torch.zeros(2, 0)), "student_logits"),
    "temperature 0": (dict(temperature=0.0), "temperature"),
    "temperature below 0": (dict(temperature=-1.0), "temperature"),
    "temperature NaN": (dict(temperature=math.nan), "temperature"),
    "temperature in words": (dict(temperature="2"), "temperature"),
    "no weight": (dict(ce_weight=None), "ce_weight"),
    "no beta": (dict(beta=None), "beta"),
    "unknown kind": (dict(kind="kl"), "kind"),
    "weight without labels": (dict(ce_weight=0.5), "labels"),
    "negative weight": (dict(ce_weight=-0.5, labels=torch.tensor([0, 1])), "ce_weight"),
    "beta above 1": (dict(kind="jsd", beta=1.5), "beta"),
    "unknown reduction": (dict(reduction="batchmean"), "reduction"),
    "labels' shape": (dict(labels=torch.tensor([0])), "labels"),
    "labels' dtype": (dict(labels=torch.tensor([0.0, 1.0])), "labels"),
    "label too large": (dict(labels=torch.tensor([0, 5])), "labels"),
    "label below 0": (dict(labels=torch.tensor([0, -1])), "labels"),
}


@pytest.mark.parametrize("room", [ref, kd])
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, room):
    change, argument = BAD[name]
    arguments = dict(student_logits=torch.zeros(2, 5), teacher_logits=torch.zeros(2, 5)) | change
    with pytest.raises(ValueError, match=rf"^{argument}\b.*: got .*expected"):
        room.kd_loss(**arguments)


PLANTED_BUGS = [
    ("kernels/distillation.py", "alpha * (acc + l_a * moved)", "alpha * acc"),
    ("kernels/distillation.py", "moved = ((finite(new_b) - finite(m_b)) - (", "moved = ((finite(new_b) - finite(m_b)) + ("),
    ("kernels/distillation.py", "return tl.where(alpha == 0.0, 0.0, alpha * (acc + l_a * moved))", "return alpha * (acc + l_a * moved)"),
    ("kernels/distillation.py", "return tl.exp2((m - finite(new)) * scale)", "return tl.exp2((m - new) * scale)"),
    ("kernels/distillation.py", "log = (x - finite(new)[None, :, None]) * scale", "log = (x - new[None, :, None]) * scale"),
    ("kernels/distillation.py", "acc = _move(acc, l_t, m_t, top_t, m_z, top_z, scale)", "acc *= _shrink(m_t, top_t, scale)"),
    ("kernels/distillation.py", "acc = _move(acc, l_z, m_z, top_z, m_t, top_t, scale)", "acc *= _shrink(m_z, top_z, scale)"),
    ("kernels/distillation.py", "l_1 *= _shrink(m_z, top_z, LOG2E)", "l_1 *= _shrink(m_z, top_z, scale)"),
    ("kernels/distillation.py", "l_z, l_t = l_z * _shrink(m_z, top_z, scale), l_t * _shrink(m_t, top_t, scale)", "pass"),
    ("kernels/distillation.py", "logp = tl.maximum(logp, -160.0, propagate_nan=tl.PropagateNan.ALL)", "pass"),
    ("kernels/distillation.py", "logq = tl.maximum(logq, -160.0, propagate_nan=tl.PropagateNan.ALL)", "pass"),
    ("kernels/distillation.py", "last = (vocab - 1) // BLOCK_V * BLOCK_V", "last = vocab // BLOCK_V * BLOCK_V"),
    ("kernels/distillation.py", "kl_p += own_sum(of_p)", "kl_p = own_sum(of_p)"),
    ("kernels/distillation.py", "d = acc / l_t - log_lt + log_lz", "d = acc / l_t - log_lt"),
    ("kernels/distillation.py", "weight * tl.where(weight > 0.0, loga - logb, 0.0)", "weight * (loga - logb)"),
    ("kernels/distillation.py", "beta * p + (1.0 - beta) * q,", "(1.0 - beta) * p + beta * q,"),
    ("kernels/distillation.py", "(row // inner) * stride_a + (row % inner) * stride_b", "row * stride_b"),
    ("kernels/distillation.py", "        d = beta * kl_p + (1.0 - beta) * kl_q\n        expected = kl_q", "        d = beta * kl_p + (1.0 - beta) * kl_q\n        expected = d"),
    ("kernels/distillation.py", "    grad *= temperature\n", ""),
    ("kernels/distillation.py", "loss = square * LN2 * d", "loss = LN2 * d"),
    ("kernels/distillation.py", "grad *= tl.load(weight_ptr + row * stride_w)", "grad *= tl.load(weight_ptr)"),
    ("kernels/distillation.py", "loss += ce_weight * (LN2 * log_l1 + m_z - right)", "loss += ce_weight * (LN2 * log_lz + m_z - right)"),
    ("kernels/distillation.py", "mask=cols < vocab, other=float(\"-inf\"))", "mask=cols < vocab, other=0.0)"),
    ("labkit/distillation.py", "rows = temperature**2 * divergence", "rows = temperature * divergence"),
    ("labkit/distillation.py", "        return expected_difference(logp, logq)\n    if", "        return expected_difference(logq, logp)\n    if"),
    ("labkit/distillation.py", "torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))", "torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))"),
    ("labkit/distillation.py", "there = logp > -math.inf\n", "there = logp > math.inf\n"),
    ("labkit/distillation.py", "rows.sum() / keep.sum().clamp(min=1)", "rows.mean()"),
    ("labkit/distillation.py", "teacher_logits.detach()", "teacher_logits"),
    ("kernels/distillation.py", "labels.reshape(-1).contiguous()", "labels.reshape(-1)"),
    ("labkit/distillation.py", "torch.where(keep.unsqueeze(-1), x, 0.0)", "x"),
]
