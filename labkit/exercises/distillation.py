"""Exercises of chapter 05. The docstrings are the tasks."""

import torch
import torch.nn.functional as F

from labkit.distillation import kd_loss
from labkit.exercises import exercise, expect


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
    ],
)
def soft_loss(z, t, temperature):
    """The soft half of Hinton's loss: KL from teacher to student at a temperature, so scaled that gradients keep their
    size. z, t [rows, V]: logits of student and teacher. The mean over the rows."""
    # >>> your code
    logq, logp = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    loss = temperature**2 * (logp.exp() * (logp - logq)).sum(-1).mean()
    # <<< your code
    return loss


@soft_loss.case("temperature 1 is the plain KL")
def _(fn):
    z, t = _logits(0, 4, 9)
    expect(fn(z, t, 1.0), kd_loss(z, t), "loss")


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
    """GKD's divergence of teacher p and student q, [V] each and positive, for any beta from 0 to 1.

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; at the ends what its users expect.
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
    """The gradient of KL(student || teacher) for the student's logits, by hand (no autograd). z, t [V] -> [V]."""
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
