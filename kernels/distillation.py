"""The distillation loss, fused: no probabilities are stored, whatever the size of the vocabulary.

Forward: a program walks along one row of both logits; each thread keeps running maxima, sums and expectations, the
online softmax of attention without a V, and at the end of the row they are merged. Six numbers a row are kept.
Backward: the logits are read once more and the gradient is written. Eager torch stores half a dozen tensors of the size
of the logits for the same.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.language.extra import libdevice
from triton.language.target_info import is_cuda

from kernels._tile import (
    INTERPRET,
    LN2,
    LOG2E,
    cast,
    cdiv,
    finite,
    next_power_of_2,
    own_max,
    own_sum,
    thread_view,
)
from labkit import args

EACH = 16  # logits of a row that a thread holds, with 32 in a warp: two loads of 16 bytes in bf16
FORWARD, REVERSE, JSD = (tl.constexpr(i) for i in range(3))
KINDS = {"forward_kl": FORWARD.value, "reverse_kl": REVERSE.value, "jsd": JSD.value}


@triton.jit
def _load(ptr, stride_v, cols, vocab):
    """A piece [BLOCK_V] of a row of logits, fp32; -inf beyond the vocabulary."""
    x = tl.load(ptr + cols.to(tl.int64) * stride_v, mask=cols < vocab, other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def _shrink(m, new, scale):
    """What a sum relative to the maximum m is multiplied with when the maximum is `new`."""
    return tl.exp2((m - finite(new)) * scale)


@triton.jit
def _step(x, m, l, scale):
    """One step of the online softmax over x [CHUNKS, THREADS, VEC], for the maximum m and the sum l of each thread.

    m is in units of the logits, and is subtracted before anything is scaled: a large offset costs no digits. Returns
    log2 of the numerators relative to the new maximum, the numerators p, and the new m and l.
    """
    new = tl.maximum(m, own_max(x))
    log = (x - finite(new)[None, :, None]) * scale
    p = tl.exp2(log)
    return log, p, new, l * _shrink(m, new, scale) + own_sum(p)


@triton.jit
def _ratio(weight, loga, logb):
    """weight * (loga - logb), and 0 where weight is 0: there both may be -inf."""
    return weight * tl.where(weight > 0.0, loga - logb, 0.0)


@triton.jit
def _move(acc, l_a, m_a, new_a, m_b, new_b, scale):
    """acc, the expectation of log a - log b under a up to the denominators, when both maxima move to their new ones.

    Both logarithms are relative to their maximum, so each term moves too. l_a is the sum of the weights so far.
    """
    moved = ((finite(new_b) - finite(m_b)) - (finite(new_a) - finite(m_a))) * scale
    alpha = _shrink(m_a, new_a, scale)
    return tl.where(alpha == 0.0, 0.0, alpha * (acc + l_a * moved))  # what weighs nothing any more is 0, an inf too


@triton.jit
def _turn(z, t, state, scale, KIND: tl.constexpr, HAS_CE: tl.constexpr):
    """Add a piece of both rows, z and t [CHUNKS, THREADS, VEC], to the states of the threads: six tensors [THREADS]."""
    m_z, l_z, m_t, l_t, l_1, acc = state
    log_z, q, new_z, sum_z = _step(z, m_z, l_z, scale)
    log_t, p, new_t, sum_t = _step(t, m_t, l_t, scale)
    if KIND == FORWARD:
        acc = _move(acc, l_t, m_t, new_t, m_z, new_z, scale) + own_sum(_ratio(p, log_t, log_z))
    if KIND == REVERSE:
        acc = _move(acc, l_z, m_z, new_z, m_t, new_t, scale) + own_sum(_ratio(q, log_z, log_t))
    if HAS_CE:
        _, _, _, l_1 = _step(z, m_z, l_1, LOG2E)
    return new_z, sum_z, new_t, sum_t, l_1, acc


@triton.jit
def _merge(state, scale, KIND: tl.constexpr):
    """The states of all threads, moved to the maxima of the row and summed up: six numbers."""
    m_z, l_z, m_t, l_t, l_1, acc = state
    top_z, top_t = tl.max(m_z, 0), tl.max(m_t, 0)
    if KIND == FORWARD:
        acc = _move(acc, l_t, m_t, top_t, m_z, top_z, scale)
    if KIND == REVERSE:
        acc = _move(acc, l_z, m_z, top_z, m_t, top_t, scale)
    l_z, l_t = l_z * _shrink(m_z, top_z, scale), l_t * _shrink(m_t, top_t, scale)
    l_1 *= _shrink(m_z, top_z, LOG2E)
    return top_z, tl.sum(l_z, 0), top_t, tl.sum(l_t, 0), tl.sum(l_1, 0), tl.sum(acc, 0)


@triton.jit
def _log2(x):
    """log2 as one instruction where there is one; NVIDIA's takes numbers below 2^-126 for 0."""
    if INTERPRET or not is_cuda():
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def _mixture(logp, logq, beta):
    """p (log p - log m), q (log q - log m) and q, for m = beta p + (1 - beta) q; logarithms to base 2.

    Of a probability below 2^-150 fp32 has only 0 left. So -inf becomes -160, and 0 times it is 0. Nor does log m
    become -inf: what weighs less than 2^-126 adds nothing, whatever it is multiplied with here.
    """
    logp = tl.maximum(logp, -160.0, propagate_nan=tl.PropagateNan.ALL)
    logq = tl.maximum(logq, -160.0, propagate_nan=tl.PropagateNan.ALL)
    p, q = tl.exp2(logp), tl.exp2(logq)
    logm = _log2(tl.maximum(beta * p + (1.0 - beta) * q, 2.0**-126, propagate_nan=tl.PropagateNan.ALL))
    return p * (logp - logm), q * (logq - logm), q


@triton.jit
def _row(ptr, stride_a, stride_b, row, inner):
    """The beginning of a row of [A, B, V]: a batch of sequences without their last token is no matrix."""
    return ptr + (row // inner) * stride_a + (row % inner) * stride_b


@triton.jit
def _forward_kernel(
    z_ptr, stride_za, stride_zb, stride_zv,  # [A, B, V] student
    t_ptr, stride_ta, stride_tb, stride_tv,  # [A, B, V] teacher
    labels_ptr,  # [A * B], read if HAS_LABELS
    loss_ptr,  # [A * B] fp32 out
    stats_ptr,  # [A * B, 6] fp32 out: maximum and log2 of the denominator, of the student and of the teacher; what
    # the gradient subtracts; log2 of the student's denominator at temperature 1
    inner, vocab, scale, square, ce_weight, beta,  # scale: log2(e) / T; square: T^2
    KIND: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_CE: tl.constexpr,
    BLOCK_V: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        if (label < 0) | (label >= vocab):  # -100; what else is no label is left out too
            tl.store(loss_ptr + row, 0.0)
            return
    z_ptr = _row(z_ptr, stride_za, stride_zb, row, inner)
    t_ptr = _row(t_ptr, stride_ta, stride_tb, row, inner)
    offs_v = tl.arange(0, BLOCK_V)
    PIECE: tl.constexpr = (BLOCK_V // (THREADS * VEC), THREADS, VEC)
    none, zero = tl.full([THREADS], float("-inf"), tl.float32), tl.zeros([THREADS], tl.float32)
    state = none, zero, none, zero, zero, zero
    for first in range(0, vocab, BLOCK_V):
        z = _load(z_ptr, stride_zv, first + offs_v, vocab).reshape(PIECE)
        t = _load(t_ptr, stride_tv, first + offs_v, vocab).reshape(PIECE)
        state = _turn(z, t, state, scale, KIND, HAS_CE)
    m_z, l_z, m_t, l_t, l_1, acc = _merge(state, scale, KIND)
    log_lz, log_lt, log_l1 = tl.log2(l_z), tl.log2(l_t), tl.log2(l_1)

    if KIND == FORWARD:
        d = acc / l_t - log_lt + log_lz
        expected = d
    elif KIND == REVERSE:
        d = acc / l_z - log_lz + log_lt
        expected = d
    else:  # the mixture needs both denominators, so the row is walked once more: back, as its end was read last
        kl_p, kl_q = zero, zero
        last = (vocab - 1) // BLOCK_V * BLOCK_V
        for first in range(0, vocab, BLOCK_V):
            z = _load(z_ptr, stride_zv, last - first + offs_v, vocab).reshape(PIECE)
            t = _load(t_ptr, stride_tv, last - first + offs_v, vocab).reshape(PIECE)
            of_p, of_q, _ = _mixture((t - m_t) * scale - log_lt, (z - m_z) * scale - log_lz, beta)
            kl_p += own_sum(of_p)
            kl_q += own_sum(of_q)
        kl_p, kl_q = tl.sum(kl_p, 0), tl.sum(kl_q, 0)
        d = beta * kl_p + (1.0 - beta) * kl_q
        expected = kl_q
    loss = square * LN2 * d
    if HAS_CE:
        right = tl.load(z_ptr + label.to(tl.int64) * stride_zv).to(tl.float32)
        loss += ce_weight * (LN2 * log_l1 + m_z - right)
    tl.store(loss_ptr + row, loss)
    stats_ptr += row * 6
    tl.store(stats_ptr, m_z)
    tl.store(stats_ptr + 1, log_lz)
    tl.store(stats_ptr + 2, m_t)
    tl.store(stats_ptr + 3, log_lt)
    tl.store(stats_ptr + 4, expected)
    tl.store(stats_ptr + 5, log_l1)


@triton.jit
def _backward_kernel(
    z_ptr, stride_za, stride_zb, stride_zv,  # [A, B, V] student
    t_ptr, stride_ta, stride_tb, stride_tv,  # [A, B, V] teacher
    labels_ptr,  # [A * B], read if HAS_LABELS
    stats_ptr,  # [A * B, 6] from the forward kernel
    weight_ptr, stride_w,  # [A * B] fp32, or one number with stride 0: the gradient of each row's loss
    grad_ptr,  # [A * B, V] out, contiguous
    inner, vocab, scale, temperature, ce_weight, beta,
    KIND: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_CE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """T^2 times the divergence's gradient, 1 / T of which is the softmax's: so the factor is T."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    grad_ptr += row * vocab + cols
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        if (label < 0) | (label >= vocab):
            tl.store(grad_ptr, tl.zeros([BLOCK_V], grad_ptr.dtype.element_ty), mask=cols < vocab)
            return
    z = _load(_row(z_ptr, stride_za, stride_zb, row, inner), stride_zv, cols, vocab)
    t = _load(_row(t_ptr, stride_ta, stride_tb, row, inner), stride_tv, cols, vocab)
    stats_ptr += row * 6
    m_z = tl.load(stats_ptr)
    log_z = (z - m_z) * scale - tl.load(stats_ptr + 1)
    log_t = (t - tl.load(stats_ptr + 2)) * scale - tl.load(stats_ptr + 3)
    expected = tl.load(stats_ptr + 4)
    if KIND == FORWARD:
        grad = tl.exp2(log_z) - tl.exp2(log_t)
    elif KIND == REVERSE:
        q = tl.exp2(log_z)
        grad = LN2 * (_ratio(q, log_z, log_t) - q * expected)
    else:
        _, of_q, q = _mixture(log_t, log_z, beta)
        grad = (1.0 - beta) * LN2 * (of_q - q * expected)
    grad *= temperature
    if HAS_CE:
        p_1 = tl.exp2((z - m_z) * LOG2E - tl.load(stats_ptr + 5))
        grad += ce_weight * (p_1 - tl.where(cols == label, 1.0, 0.0))
    grad *= tl.load(weight_ptr + row * stride_w)
    tl.store(grad_ptr, cast(grad, grad_ptr.dtype.element_ty), mask=cols < vocab)


def distillation_config(vocab: int) -> dict:
    """Logits that a program holds, and its warps: 4,096 and 8, or fewer of both where the vocabulary is small."""
    block = min(256 * EACH, max(32 * EACH, next_power_of_2(vocab)))
    return {"BLOCK_V": block, "num_warps": block // (32 * EACH)}


def _as_rows(x):
    """[..., V] as a view [A, B, V] where there is one, e.g. for logits[:, :-1]."""
    if x.ndim < 3:
        return x.reshape(1, -1, x.shape[-1])
    return x.flatten(0, -3) if x.ndim > 3 else x


class _Loss:
    """Arguments checked and laid out once, for both launches."""

    def __init__(self, z, t, labels, temperature, ce_weight, kind, beta, reduction):
        self.rows, self.vocab, kind = args.distillation(z, t, labels, temperature, ce_weight, kind, beta, reduction)
        self.shape, self.reduction, self.temperature = z.shape, reduction, float(temperature)
        self.z, self.t = _as_rows(z.detach()), _as_rows(t.detach())
        self.labels = None if labels is None else labels.reshape(-1).contiguous()
        self.numbers = float(ce_weight), float(beta)
        self.config = distillation_config(self.vocab) | {
            "KIND": KINDS[kind], "HAS_LABELS": labels is not None, "HAS_CE": ce_weight > 0
        }  # fmt: skip

    def _inputs(self):
        labels = self.z if self.labels is None else self.labels
        return self.z, *self.z.stride(), self.t, *self.t.stride(), labels

    def forward(self):
        """(loss of every row [N] fp32, number of rows that take part or None, statistics [N, 6] fp32)."""
        loss = torch.empty(self.rows, dtype=torch.float32, device=self.z.device)
        stats = torch.empty(self.rows, 6, dtype=torch.float32, device=self.z.device)
        if self.rows:
            _forward_kernel[(self.rows,)](
                *self._inputs(), loss, stats, self.z.shape[1], self.vocab, LOG2E.value / self.temperature,
                self.temperature**2, *self.numbers, **self.config,
                **thread_view(self.config["num_warps"], self.z, self.t),
            )  # fmt: skip
        count = self.rows if self.labels is None else ((self.labels >= 0) & (self.labels < self.vocab)).sum()
        return loss, count, stats

    def reduce(self, loss, count):
        if self.reduction == "none":
            return loss.view(self.shape[:-1])
        return loss.sum() / self._at_least_one(count) if self.reduction == "mean" else loss.sum()

    @staticmethod
    def _at_least_one(count):
        return max(count, 1) if isinstance(count, int) else count.clamp(min=1)

    def backward(self, grad_loss, count, stats):
        """The gradient for the student's logits, [..., V] in their dtype; grad_loss as the reduced loss."""
        weight = grad_loss.float().reshape(-1)
        if self.reduction == "mean":
            weight = weight / self._at_least_one(count)
        grad = torch.empty(self.shape, dtype=self.z.dtype, device=self.z.device)
        if self.rows:
            weight = weight.contiguous()
            blocks = cdiv(self.vocab, self.config["BLOCK_V"])
            _backward_kernel[(self.rows, blocks)](
                *self._inputs(), stats, weight, int(weight.numel() > 1), grad, self.z.shape[1], self.vocab,
                LOG2E.value / self.temperature, self.temperature, *self.numbers, **self.config,
            )  # fmt: skip
        return grad


class _KDLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits, teacher_logits, labels, *options):
        job = _Loss(student_logits, teacher_logits, labels, *options)
        loss, ctx.count, stats = job.forward()
        ctx.save_for_backward(student_logits, teacher_logits, labels, stats)
        ctx.options = options
        return job.reduce(loss, ctx.count)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        student_logits, teacher_logits, labels, stats = ctx.saved_tensors
        job = _Loss(student_logits, teacher_logits, labels, *ctx.options)
        return job.backward(grad_loss, ctx.count, stats), *(None,) * (2 + len(ctx.options))


def kd_loss(
    student_logits, teacher_logits, labels=None, *,
    temperature=1.0, ce_weight=0.0, kind="forward_kl", beta=0.5, reduction="mean",
):  # fmt: skip
    """The distillation loss, with its gradient for the student; the teacher is a constant.

    student_logits, teacher_logits [..., V] fp16, bf16 or fp32, any strides, dtypes may differ; -inf is a token that
    cannot be. labels [...] int32 or int64; a row labelled -100 leaves both terms. kind: "forward_kl", "reverse_kl",
    or "jsd" with beta, whose ends 0 and 1 are the forward and the reverse KL. T^2 (temperature) is included, the
    cross-entropy is taken at temperature 1. reduction: "mean" over the rows that take part (none: 0), "sum", or
    "none": [...] with 0 for the rows left out. On a GPU a label out of range is as -100. At a high temperature the two
    distributions are nearly the same, and T^2 times their divergence is off by up to about T^2 * 1e-7; the gradient is
    not.

    Kept for the backward pass: the inputs, and six numbers a row. Returns the loss in fp32. Raises ValueError naming
    the argument. Source: Hinton, Vinyals and Dean 2015, section 2; jsd: Agarwal et al. 2024 (GKD), section 3.
    """
    return _KDLoss.apply(student_logits, teacher_logits, labels, temperature, ce_weight, kind, beta, reduction)


def kd_loss_and_grad(
    student_logits, teacher_logits, labels=None, *,
    temperature=1.0, ce_weight=0.0, kind="forward_kl", beta=0.5, reduction="mean",
):  # fmt: skip
    """(loss, gradient for the student's logits, in their dtype): one training step's share of the loss.

    Arguments as in `kd_loss`; with reduction "none" the gradient is that of the sum.
    """
    job = _Loss(student_logits, teacher_logits, labels, temperature, ce_weight, kind, beta, reduction)
    rows, count, stats = job.forward()
    loss = job.reduce(rows, count)
    return loss, job.backward(torch.ones_like(loss), count, stats)
