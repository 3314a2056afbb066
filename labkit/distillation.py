"""Knowledge distillation: the loss that teaches a student another model's distribution, and what it is made of.

    loss = T^2 * D(teacher_T, student_T) + ce_weight * CE(labels, student)

where softmax(z / T) is taken of both at the temperature T, and D is a divergence. Hinton, Vinyals and Dean 2015
(section 2) for the loss and T^2; Agarwal et al. 2024 (GKD, section 3) for the generalised Jensen-Shannon divergence.
"""

import math

import torch
import torch.nn.functional as F

from labkit import args, bench, codegen, peers

IGNORED = -100  # the label of a row that takes no part, as in torch's cross_entropy


def expected_difference(logp, logq):
    """Sum over the last dimension of p (log p - log q): KL(p || q). Where p is 0 a term is 0, whatever q is."""
    there = logp > -math.inf
    difference = torch.where(there, logp - logq, 0.0)
    return (torch.where(there, logp.exp(), 0.0) * difference).sum(-1)


def divergence(logp, logq, kind="forward_kl", beta=0.5):
    """D between the teacher's log-probabilities logp and the student's logq, [..., V] -> [...], in nats.

    "forward_kl" is KL(p || q), "reverse_kl" KL(q || p), and "jsd" is beta KL(p || m) + (1 - beta) KL(q || m) with
    m = beta p + (1 - beta) q. That formula is 0 at both ends of beta; like TRL, `kd_loss` puts the two KLs there.
    """
    if kind == "forward_kl":
        return expected_difference(logp, logq)
    if kind == "reverse_kl":
        return expected_difference(logq, logp)
    there = (logp > -math.inf) | (logq > -math.inf)  # elsewhere logaddexp has no gradient, and no weight is put on m
    p, q = (torch.where(there, x, 0.0) for x in (logp, logq))
    logm = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * expected_difference(logp, logm) + (1 - beta) * expected_difference(logq, logm)


def kd_loss(
    student_logits, teacher_logits, labels=None, *,
    temperature=1.0, ce_weight=0.0, kind="forward_kl", beta=0.5, reduction="mean",
):  # fmt: skip
    """The distillation loss, with its gradient for the student; the teacher is a constant.

    student_logits, teacher_logits [..., V] fp16, bf16, fp32 (fp64: the reference only), dtypes may differ; -inf is a
    token that cannot be. labels [...] int32 or int64; a row labelled -100 leaves both terms. kind: "forward_kl",
    "reverse_kl", or "jsd" with beta, whose ends 0 and 1 are the forward and the reverse KL. T^2 (temperature) is
    included, the cross-entropy is taken at temperature 1. reduction: "mean" over the rows that take part (none: 0),
    "sum", or "none": [...] with 0 for the rows left out.

    Returns the loss in fp32. Raises ValueError naming the argument: shapes that differ, temperature <= 0, a negative
    ce_weight or one without labels, an unknown kind, labels out of range.
    """
    _, vocab, kind = args.distillation(
        student_logits, teacher_logits, labels, temperature, ce_weight, kind, beta, reduction, args.REFERENCE_FLOATS
    )
    z, t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student_logits, teacher_logits.detach()))
    keep = z.new_ones(z.shape[:-1], dtype=torch.bool) if labels is None else labels != IGNORED
    if labels is not None:  # whatever stands in a row left out: a weight of 0 would not keep its NaN from the gradient
        z, t = (torch.where(keep.unsqueeze(-1), x, 0.0) for x in (z, t))
    logp, logq = (t / temperature).log_softmax(-1), (z / temperature).log_softmax(-1)
    rows = temperature**2 * divergence(logp, logq, kind, beta)
    if ce_weight:
        hard = F.cross_entropy(z.reshape(-1, vocab), labels.reshape(-1).long(), reduction="none", ignore_index=IGNORED)
        rows = rows + ce_weight * hard.view(rows.shape)
    return reduce(torch.where(keep, rows, 0.0), keep, reduction)


def reduce(rows, keep, reduction):
    """rows [...] with 0 where keep is False -> their "mean" over the kept ones (none kept: 0), "sum", or rows."""
    if reduction == "none":
        return rows
    return rows.sum() / keep.sum().clamp(min=1) if reduction == "mean" else rows.sum()


def kd_loss_and_grad(student_logits, teacher_logits, labels=None, **options):
    """(loss, gradient for the student's logits, in their dtype): one training step's share of the loss.

    Arguments as in `kd_loss`; with reduction "none" the gradient is that of the sum.
    """
    z = student_logits.detach().requires_grad_()
    loss = kd_loss(z, teacher_logits, labels, **options)
    (grad,) = torch.autograd.grad(loss.sum(), z) if loss.requires_grad else (torch.zeros_like(z),)
    return loss.detach(), grad


def kd_loss_and_grad_in_parts(student_logits, teacher_logits, *, rows=256, **options):
    """`kd_loss_and_grad` of logits [N, V], some rows at a time: of large vocabularies all at once would not fit.

    Without labels, and with the mean over all rows.
    """
    parts = zip(student_logits.split(rows), teacher_logits.split(rows))
    losses, grads = zip(*(kd_loss_and_grad(*part, reduction="sum", **options) for part in parts))
    return sum(losses) / len(student_logits), torch.cat(grads) / len(student_logits)


# ---- what a loss keeps in memory


def saved_bytes(loss, student_logits, teacher_logits, **options):
    """Bytes that loss(...) keeps for its backward pass, apart from the logits themselves (counted, exact)."""
    z = student_logits.detach().requires_grad_()
    own, kept = {x.untyped_storage().data_ptr() for x in (z, teacher_logits)}, {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = loss(z, teacher_logits, **options)
    assert result.requires_grad
    return sum(n for where, n in kept.items() if where not in own)


def peak_bytes(loss, student_logits, teacher_logits, **options):
    """The most memory of the GPU that one forward and backward pass takes beyond the logits."""
    z = student_logits.detach().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(z, teacher_logits, **options).backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---- what is timed


VOCABULARIES, TOKENS = (4096, 32_000, 128_256, 262_144), 2048
OPTIONS = {"forward KL": dict(kind="forward_kl", temperature=2.0), "JSD": dict(kind="jsd", beta=0.5)}


def _with_gradient(loss_of, student_logits):
    """A call that returns (loss, gradient), as `kd_loss_and_grad` does."""
    z = student_logits.detach().requires_grad_()

    def call():
        loss = loss_of(z)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    return call


def eager(student_logits, teacher_logits, **options):
    """Loss and gradient by the reference, operation by operation: a peer."""
    return _with_gradient(lambda z: kd_loss(z, teacher_logits, **options), student_logits)


def compiled(student_logits, teacher_logits, **options):
    """The same through torch.compile, compiled once per shape."""
    loss = peers.compiled(kd_loss, student_logits.device.type, *student_logits.shape, *options.values())
    return _with_gradient(lambda z: loss(z, teacher_logits, **options), student_logits)


def liger(student_logits, teacher_logits, *, kind, temperature=1.0, beta=0.5):
    """Liger takes log-probabilities, so the softmax is torch's; in fp32, or its result would fail the check."""
    from liger_kernel.ops.jsd import LigerJSDFunction
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    def loss(z):
        logq, logp = ((x.float() / temperature).log_softmax(-1) for x in (z, teacher_logits))
        if kind == "jsd":
            return LigerJSDFunction.apply(logq, logp, None, beta)
        return temperature**2 * LigerKLDivLossFunction.apply(logq, logp, "batchmean", True)

    return _with_gradient(loss, student_logits)


def cases(tiny=False):
    """Loss and gradient of 2,048 tokens over vocabularies from 4k to 256k, bf16 logits."""
    result = []
    for name, options in OPTIONS.items():
        for vocab in VOCABULARIES:
            tokens, width = (2, vocab // 64) if tiny else (TOKENS, vocab)

            def make(generator, device, tokens=tokens, width=width, options=options):
                draw = lambda: 2 * torch.randn(tokens, width, generator=generator, device=device)  # noqa: E731
                return dict(student_logits=draw().bfloat16(), teacher_logits=draw().bfloat16()) | options

            result.append(
                bench.Case(
                    f"{name}, vocabulary {vocab:,}", "kd_loss_and_grad", make, bytes=3 * 2 * tokens * width,
                    section=name, reference="kd_loss_and_grad_in_parts",
                    peers={"eager torch": eager, "torch.compile": compiled, "Liger": liger},
                    graph=False,  # Liger's backward waits for the GPU, which a graph cannot hold
                )
            )
    return result


def codegen_cases():
    """Each kind, with and without labels; a vocabulary that is not a multiple of 16 bytes cannot be read in them."""

    def case(name, dtype="bfloat16", vocab=32_000, labels=None, narrow=(), **options):
        logits = codegen.Tensor((4, vocab), dtype)
        inputs = dict(student_logits=logits, teacher_logits=logits) | options
        if labels:
            inputs |= dict(labels=codegen.Tensor((4,), "int64", 1), ce_weight=0.5)
        return codegen.Case("kernels.distillation:kd_loss_and_grad", name, inputs, narrow=narrow)

    return [
        case("bf16, forward KL, with labels", labels=True, temperature=2.0),
        case("bf16, reverse KL", kind="reverse_kl"),
        case("bf16, JSD", kind="jsd"),
        case("fp32, JSD, with labels", "float32", kind="jsd", labels=True),
        case("fp16, forward KL, 50,257 tokens", "float16", 50_257, narrow=("_forward_kernel", "_backward_kernel")),
    ]


# ---- long experiments


def experiments():
    from labkit import distillation_study

    return distillation_study.experiments()
