"""Exercises of chapter 05. The docstrings are the tasks."""

import numpy as np
import torch
import torch.nn.functional as F

from labkit.distillation import kd_loss
from labkit.exercises import device, exercise, expect, kernel_exercise


def _logits(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in "zt"]


@exercise(
    hints=[
        "What happens to the size of the gradient as the temperature grows?",
        "The gradient of KL(softmax(t / T), softmax(z / T)) for z is (q - p) / T, and q - p shrinks like 1 / T too.",
        "Multiply the divergence by T ** 2, so that the size of the gradient does not depend on T.",
    ],
    bugs=[
        ("temperature**2 *", "", "the T^2 is missing"),
        ("temperature**2 *", "temperature *", "only one of the two factors"),
        ("(z / temperature).log_softmax(-1)", "z.log_softmax(-1)", "the student's temperature is forgotten"),
        ("(t / temperature).log_softmax(-1)", "t.log_softmax(-1)", "the teacher's temperature is forgotten"),
        ("(logp.exp() * (logp - logq))", "(logq.exp() * (logq - logp))", "the reverse KL"),
        (".sum(-1).mean()", ".mean()", "divides by the vocabulary too"),
        ("(z / temperature).log_softmax(-1)", "(z / temperature).softmax(-1).log()", "-inf for unlikely tokens"),
    ],
)
def soft_loss(z, t, temperature):
    """The soft half of Hinton's loss: KL from teacher to student at a temperature.

    So scaled that gradients keep their size. z, t [rows, V]: logits of student and teacher.
    The mean over the rows.
    """
    # >>> your code
    logq, logp = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    loss = temperature**2 * (logp.exp() * (logp - logq)).sum(-1).mean()
    # <<< your code
    return loss


@soft_loss.case("temperature 1 is the plain KL")
def _(fn):
    z, t = _logits(0, 4, 9)
    expect(fn(z, t, 1.0), kd_loss(z, t), "loss")
    expect(fn(1000 * z, 1000 * t, 1.0), kd_loss(1000 * z, 1000 * t), "loss of logits in the thousands")


@soft_loss.case("temperatures 2 and 5")
def _(fn):
    z, t = _logits(1, 4, 9)
    for temperature in (2.0, 5.0):
        expect(fn(z, t, temperature), kd_loss(z, t, temperature=temperature), f"loss at {temperature}")


@soft_loss.case("at temperature 1000 it is half the squared distance of the centred logits, over V")
def _(fn):
    z, t = _logits(2, 3, 6)
    d = (z - z.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    expect(fn(z, t, 1000.0), d.square().sum(-1).mean() / (2 * 6), "loss", rtol=1e-2)


@exercise(
    hints=[
        "kl_div takes the STUDENT's logarithms first: it computes KL(target || input).",
        "reduction='mean' divides by every element, the vocabulary too; 'batchmean' by the first dimension only.",
        "Flatten [B, T, V] to [B * T, V], and say log_target=True, since both are logarithms.",
    ],
    bugs=[
        ("F.kl_div(logq, logp,", "F.kl_div(logp, logq,", "the arguments in the order of the formula"),
        ('"batchmean"', '"mean"', "divides by the vocabulary too"),
        ("logq, logp = logq.flatten(0, 1), logp.flatten(0, 1)\n", "pass\n", "batchmean divides by B alone"),
        ("log_target=True", "log_target=False", "takes the logarithms for probabilities"),
    ],
)
def by_torch(logq, logp):
    """KL(teacher || student) with torch.nn.functional.kl_div, the mean over all tokens.

    logq, logp [B, T, V]: log-probabilities of the student and of the teacher.
    """
    # >>> your code
    logq, logp = logq.flatten(0, 1), logp.flatten(0, 1)
    loss = F.kl_div(logq, logp, reduction="batchmean", log_target=True)
    # <<< your code
    return loss


@by_torch.case("two sequences of three tokens")
def _(fn):
    z, t = _logits(3, 2, 3, 7)
    expect(fn(z.log_softmax(-1), t.log_softmax(-1)), kd_loss(z, t), "loss")


@by_torch.case("a teacher who is sure: the cross-entropy of its token")
def _(fn):
    z, _ = _logits(4, 1, 2, 5)
    logp = torch.full_like(z, -1e4)
    logp[..., 2] = 0.0
    expect(fn(z.log_softmax(-1), logp), -z.log_softmax(-1)[..., 2].mean(), "loss")


@exercise(
    hints=[
        "What is the mixture m at beta = 0, and what is then left of the formula?",
        "At beta 0 the formula is KL(q || q) = 0: nothing to learn from. GKD means the forward KL there.",
        "Return KL(p || q) for beta 0 and KL(q || p) for beta 1, before you compute m.",
    ],
    bugs=[
        ("if beta == 0:\n        return kl(p, q)", "if False:\n        pass", "0 at beta 0"),
        ("if beta == 1:\n        return kl(q, p)", "if False:\n        pass", "0 at beta 1"),
        ("return kl(p, q)\n", "return kl(q, p)\n", "the wrong KL at beta 0"),
        ("m = beta * p + (1 - beta) * q", "m = (p + q) / 2", "the mixture forgets beta"),
        ("m = beta * p + (1 - beta) * q", "m = (1 - beta) * p + beta * q", "the mixture turned round"),
        ("beta * kl(p, m) + (1 - beta) * kl(q, m)", "(1 - beta) * kl(p, m) + beta * kl(q, m)", "the weights turned"),
    ],
)
def gkd_divergence(p, q, beta):
    """GKD's divergence of teacher p and student q, [V] each and positive; beta from 0 to 1.

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.
    At the ends what its users expect.
    """

    def kl(a, b):
        return (a * (a / b).log()).sum()

    # >>> your code
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    # <<< your code
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


@gkd_divergence.case("inside, against the lab's loss")
def _(fn):
    z, t = _logits(5, 6)
    for beta in (0.1, 0.5, 0.9):
        want = kd_loss(z[None], t[None], kind="jsd", beta=beta)
        expect(fn(t.softmax(-1), z.softmax(-1), beta), want, f"beta {beta}")


@gkd_divergence.case("at the ends: the two KLs, and not 0")
def _(fn):
    z, t = _logits(6, 6)
    for beta, kind in ((0, "forward_kl"), (1, "reverse_kl")):
        want = kd_loss(z[None], t[None], kind=kind)
        expect(fn(t.softmax(-1), z.softmax(-1), beta), want, f"beta {beta}")


@exercise(
    hints=[
        "The loss is sum q_j f_j, f = log q - log p; dq_j / dz_i = q_j (1[i = j] - q_i).",
        "The change of the logarithm sums to nothing; what is left is q_i f_i minus q_i times the sum of q_j f_j.",
        "grad = q * (f - (q * f).sum()): each token's own difference against the expected one.",
    ],
    bugs=[
        ("(f - (q * f).sum())", "f", "forgets that the others lose what one gains"),
        ("q * (f -", "p * (f -", "weighted by the teacher"),
        ("f = q.log() - p.log()", "f = p.log() - q.log()", "walks uphill"),
        ("return grad", "return q - p", "that is the forward KL's"),
    ],
)
def reverse_kl_gradient(z, t):
    """The gradient of KL(student || teacher) for the student's logits, by hand: no autograd.

    z, t [V]: logits of student and teacher. Returns [V].
    """
    q, p = z.softmax(-1), t.softmax(-1)
    # >>> your code
    f = q.log() - p.log()
    grad = q * (f - (q * f).sum())
    # <<< your code
    return grad


@reverse_kl_gradient.case("against autograd")
def _(fn):
    for seed in (7, 8):
        z, t = _logits(seed, 8)
        z.requires_grad_()
        kd_loss(z[None], t[None], kind="reverse_kl").backward()
        expect(fn(z.detach(), t), z.grad, f"gradient, seed {seed}")


@reverse_kl_gradient.case("it sums to 0: logits are known up to a constant")
def _(fn):
    z, t = _logits(9, 8)
    expect(float(fn(z, t).sum()), 0.0, "sum of the gradient")
    expect(float(fn(z, t).abs().max() > 1e-3), 1.0, "there is a gradient")


@kernel_exercise(
    hints=[
        "Two online softmaxes side by side. KL = sum p (log2 p - log2 q), with log2 q = z - m_z - log2 l_z.",
        "Carry the sum of exp2(t - m_t) * (t - z) too. When m_t moves, it shrinks by the same factor as l_t.",
        "Behind the row's end z and t have to be -inf: exp2(0 - m) is not 0. But -inf - -inf is NaN: tl.where.",
        "KL = total / l_t + m_z + log2 l_z - m_t - log2 l_t; that in bits, so times ln 2 = 0.6931472, and T^2.",
    ],
    bugs=[
        ("z = tl.load(z_ptr + offs, mask=mask, other=-INF)", "z = tl.load(z_ptr + offs, mask=mask, other=0.0)",
         "tokens behind the row's end take part, with logits of 0"),
        ("z = tl.load(z_ptr + offs, mask=mask, other=-INF)", "z = tl.where(mask, tl.load(z_ptr + offs), -INF)",
         "reads behind the row's end and throws it away: only compiled code tells"),
        ("T * T * 0.6931472 * kl", "0.6931472 * kl", "the T^2 is missing"),
        ("total = total * shrink +", "total = total +", "the sum so far belongs to an older maximum"),
        ("tl.where(mask, weight * (t - z), 0.0)", "weight * (t - z)", "NaN behind the row's end"),
        ("tl.sum(tl.exp2(z - new_z), 0)", "tl.sum(tl.exp2(z - new_t), 0)", "the teacher's maximum, the student's sum"),
    ],
)  # fmt: skip
def row_kl(z_ptr, t_ptr, out_ptr, vocab, T, BLOCK: "tl.constexpr", INF: "tl.constexpr"):
    """out[row] = T^2 KL(teacher || student) of a row, at temperature T, in one walk along the row.

    z (student), t (teacher) [rows, vocab], fp32; BLOCK logits per step, one program per row.
    As kernels do, count in powers of two: logits times scale, then tl.exp2 and tl.log2.
    INF is infinity; a maximum is -INF where nothing was seen.
    """
    scale = 1.4426950408889634 / T  # log2(e) / T
    z_ptr, t_ptr = z_ptr + tl.program_id(0) * vocab, t_ptr + tl.program_id(0) * vocab
    m_z, m_t, l_z, l_t, total = -INF, -INF, 0.0, 0.0, 0.0  # total: of weight * (t - z)
    # >>> your code
    for start in range(0, vocab, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < vocab
        z = tl.load(z_ptr + offs, mask=mask, other=-INF) * scale
        t = tl.load(t_ptr + offs, mask=mask, other=-INF) * scale
        new_z, new_t = tl.maximum(m_z, tl.max(z, 0)), tl.maximum(m_t, tl.max(t, 0))
        weight, shrink = tl.exp2(t - new_t), tl.exp2(m_t - new_t)
        l_z = l_z * tl.exp2(m_z - new_z) + tl.sum(tl.exp2(z - new_z), 0)
        l_t = l_t * shrink + tl.sum(weight, 0)
        total = total * shrink + tl.sum(tl.where(mask, weight * (t - z), 0.0), 0)
        m_z, m_t = new_z, new_t
    kl = total / l_t + m_z + tl.log2(l_z) - m_t - tl.log2(l_t)
    tl.store(out_ptr + tl.program_id(0), T * T * 0.6931472 * kl)
    # <<< your code


def _row_kl(fn, rows, vocab, temperature, ascending=False):
    z, t = (x.float() for x in _logits(10, rows, vocab))
    if ascending:
        z, t = z.sort(dim=-1).values, t.sort(dim=-1).values
    out = torch.zeros(rows, device=device())
    with np.errstate(invalid="ignore"):  # -INF - -INF behind the row's end: NaN, and numpy would warn
        fn[(rows,)](z.to(device()), t.to(device()), out, vocab, temperature, BLOCK=32, INF=float("inf"))
    want = [kd_loss(z[i : i + 1], t[i : i + 1], temperature=temperature) for i in range(rows)]
    expect(out.cpu(), torch.stack(want), "out", atol=1e-4, rtol=1e-4)


@row_kl.case("one tile, full, at temperature 1")
def _(fn):
    _row_kl(fn, 2, 32, 1.0)


@row_kl.case("two rows of 77 tokens at temperature 2: the last tile is not full")
def _(fn):
    _row_kl(fn, 2, 77, 2.0)


@row_kl.case("ascending logits: both maxima move with every tile")
def _(fn):
    _row_kl(fn, 1, 96, 1.0, ascending=True)
