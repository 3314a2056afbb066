"""Exercises of chapter 01. The docstrings are the tasks."""

import math

import torch

from labkit.attention import decode_attention
from labkit.exercises import device, exercise, expect, kernel_exercise


def _scores(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise(
    hints=[
        "What was summed so far was measured against the old maximum.",
        "FlashAttention-2's Algorithm 1, line 10, prints exp(m_old - m_new) with an exponent -1. Should it be there?",
        "Both l and acc are multiplied by exp(m - m_new) before the new block is added.",
    ],
    bugs=[
        ("torch.exp(m - m_new)", "torch.exp(m_new - m)", "the misprint in the paper: the factor upside down"),
        ("l = alpha * l + p.sum()", "l = l + p.sum()", "the denominator is not rescaled"),
        ("acc = alpha * acc + p @ v", "acc = acc + p @ v", "the output is not rescaled"),
        ("p = torch.exp(scores - m_new)", "p = torch.exp(scores - m)", "the block is measured against the old maximum"),
        ("torch.maximum(m, scores.max())", "scores.max()", "the maximum forgets the earlier blocks"),
    ],
)
def online_softmax_step(m, l, acc, scores, v):
    """One block of the online softmax.

    m, l: running maximum and denominator, scalars; acc [D]: unnormalised output;
    scores [N]: the block's scores; v [N, D]: its values. Returns the new (m, l, acc).
    """
    # >>> your code
    m_new = torch.maximum(m, scores.max())
    alpha = torch.exp(m - m_new)
    p = torch.exp(scores - m_new)
    l = alpha * l + p.sum()
    acc = alpha * acc + p @ v
    m = m_new
    # <<< your code
    return m, l, acc


def _walk(step, scores, v, size):
    m, l, acc = torch.tensor(-math.inf), torch.tensor(0.0), torch.zeros(v.shape[1])
    for block, values in zip(scores.split(size), v.split(size), strict=True):
        m, l, acc = step(m, l, acc, block, values)
    return m, l, acc


@online_softmax_step.case("one block is a plain softmax")
def _(fn):
    scores, v = _scores(0, 8), _scores(1, 8, 4)
    m, l, acc = _walk(fn, scores, v, 8)
    expect(m, scores.max(), "m")
    expect(acc / l, scores.softmax(0) @ v, "acc / l")


@online_softmax_step.case("four blocks, the maximum rising and falling")
def _(fn):
    scores, v = _scores(2, 16) * 5, _scores(3, 16, 4)
    m, l, acc = _walk(fn, scores, v, 4)
    expect(m, scores.max(), "m")
    expect(l, torch.exp(scores - scores.max()).sum(), "l")
    expect(acc / l, scores.softmax(0) @ v, "acc / l")


@online_softmax_step.case("scores around 1000 do not overflow")
def _(fn):
    scores, v = 1000 + 10 * torch.arange(8.0), _scores(4, 8, 4)
    _, l, acc = _walk(fn, scores, v, 2)
    expect(acc / l, scores.softmax(0) @ v, "acc / l")


@exercise(
    hints=[
        "A half with a larger lse holds more of the softmax's mass.",
        "The total is lse = log(exp(lse_a) + exp(lse_b)); torch.logaddexp computes it without overflow.",
        "A half weighs exp(lse_half - lse). When both are empty, -inf - (-inf) is NaN: replace that lse by 0.",
    ],
    bugs=[
        ("torch.logaddexp(lse_a, lse_b)", "torch.maximum(lse_a, lse_b)", "the maximum is not the sum"),
        ("torch.logaddexp(lse_a, lse_b)", "torch.log(lse_a.exp() + lse_b.exp())", "overflows"),
        ("lse_a - safe", "lse_b - safe", "the weights are swapped"),
        ("lse.masked_fill(lse == -math.inf, 0.0)", "lse", "NaN when both halves are empty"),
        ("weight_a * o_a + weight_b * o_b", "(o_a + o_b) / 2", "the mean of the halves"),
    ],
)
def merge_two(o_a, lse_a, o_b, lse_b):
    """Merge the attention over two disjoint sets of keys.

    o_a, o_b [B, Hq, D]; lse_a, lse_b [B, Hq]; an empty half has o 0 and lse -inf.
    Returns (o, lse) over both; if both are empty, o is 0 and lse -inf.
    """
    # >>> your code
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse == -math.inf, 0.0)
    weight_a = torch.exp(lse_a - safe).unsqueeze(-1)
    weight_b = torch.exp(lse_b - safe).unsqueeze(-1)
    o = weight_a * o_a + weight_b * o_b
    # <<< your code
    return o, lse


def _halves(len_a, len_b, scale=1.0):
    """Attention over the first len_a keys, over the next len_b, and over all of them."""
    q, k, v = (_scores(seed, *shape) for seed, shape in enumerate([(2, 4, 16), *[(2, len_a + len_b, 2, 16)] * 2]))
    q, k = scale * q, scale * k

    def attend(start, stop):
        lens = torch.full((2,), stop - start, dtype=torch.int32)
        return decode_attention(q, k[:, start:stop], v[:, start:stop], lens)

    return attend(0, len_a), attend(len_a, len_a + len_b), attend(0, len_a + len_b)


@merge_two.case("halves of 5 and 11 keys")
def _(fn):
    a, b, (o, lse) = _halves(5, 11)
    got_o, got_lse = fn(*a, *b)
    expect(got_lse, lse, "lse")
    expect(got_o, o, "o")


@merge_two.case("an empty half changes nothing")
def _(fn):
    (o, lse), _, _ = _halves(5, 11)
    empty = torch.zeros_like(o), torch.full_like(lse, -math.inf)
    for name, got in (("second half empty", fn(o, lse, *empty)), ("first half empty", fn(*empty, o, lse))):
        expect(got, (o, lse), name)


@merge_two.case("two empty halves stay empty, without NaN")
def _(fn):
    empty = torch.zeros(2, 4, 16), torch.full((2, 4), -math.inf)
    expect(fn(*empty, *empty), empty, "(o, lse)")


@merge_two.case("large scores do not overflow")
def _(fn):
    a, b, (o, lse) = _halves(5, 11, scale=20.0)
    expect(fn(*a, *b), (o, lse), "(o, lse)", atol=1e-3)


@exercise(
    hints=[
        "Cut whole blocks, not keys: first count the blocks, rounding up.",
        "Each split takes ceil(num_blocks / num_splits) blocks; the last ones may get fewer, or none.",
        "An empty split is (kv_len, kv_len): both ends are clamped to kv_len.",
    ],
    bugs=[
        ("num_blocks = -(-kv_len // block)", "num_blocks = kv_len // block", "the last, partial block is lost"),
        ("per_split = -(-num_blocks // num_splits)", "per_split = num_blocks // num_splits", "the remainder is lost"),
        ("min((s + 1) * per_split * block, kv_len)", "(s + 1) * per_split * block", "reads past the last key"),
        ("min(s * per_split * block, kv_len)", "s * per_split * block", "an empty split starts past the last key"),
    ],
)
def split_bounds(kv_len, num_splits, block):
    """Cut [0, kv_len) into num_splits ranges of whole blocks, the last block possibly partial.

    Returns a list of num_splits pairs (start, stop). The ranges follow each other, cover every key
    once, hold ceil(num_blocks / num_splits) blocks each until the keys run out, and are
    (kv_len, kv_len) when empty.
    """
    # >>> your code
    num_blocks = -(-kv_len // block)
    per_split = -(-num_blocks // num_splits)
    bounds = [
        (min(s * per_split * block, kv_len), min((s + 1) * per_split * block, kv_len))
        for s in range(num_splits)
    ]
    # <<< your code
    return bounds


@split_bounds.case("256 keys, 4 splits, blocks of 64")
def _(fn):
    expect(fn(256, 4, 64), [(0, 64), (64, 128), (128, 192), (192, 256)], "bounds")


@split_bounds.case("a partial last block")
def _(fn):
    expect(fn(129, 2, 64), [(0, 128), (128, 129)], "bounds")


@split_bounds.case("blocks that do not divide evenly")
def _(fn):
    expect(fn(5 * 64, 2, 64), [(0, 192), (192, 320)], "bounds")


@split_bounds.case("more splits than blocks, and no keys at all")
def _(fn):
    expect(fn(70, 4, 64), [(0, 64), (64, 70), (70, 70), (70, 70)], "bounds")
    expect(fn(0, 2, 64), [(0, 0), (0, 0)], "bounds")


@exercise(
    hints=[
        "Count bytes, not operations: each key and each value is read once.",
        "Per token and KV head: head_dim numbers of K and head_dim of V. The query heads share them.",
        "Seconds are bytes / bandwidth; a GB is 1e9 bytes.",
    ],
    bugs=[
        ("2 * batch", "batch", "V is forgotten"),
        ("* num_kv_heads", "", "the KV heads are forgotten"),
        ("/ (gb_per_s * 1e9)", "/ (gb_per_s * 2**30)", "a GB taken as 2**30 bytes"),
        ("* 1e6", "* 1e3", "milliseconds"),
    ],
)
def floor_us(batch, kv_len, num_kv_heads, head_dim, bytes_per_number, gb_per_s):
    """The least microseconds of one decode step's attention in one layer, if memory is the limit.

    gb_per_s: memory bandwidth in 1e9 bytes per second. Queries and outputs are too small to count.
    """
    # >>> your code
    kv_bytes = 2 * batch * kv_len * num_kv_heads * head_dim * bytes_per_number
    us = kv_bytes / (gb_per_s * 1e9) * 1e6
    # <<< your code
    return us


@floor_us.case("the blog's shape, 65,536 keys at 2,039 GB/s")
def _(fn):
    expect(fn(1, 65536, 2, 128, 2, 2039), 32.912643, "us")


@floor_us.case("it grows with the batch")
def _(fn):
    expect(fn(8, 4096, 8, 128, 2, 4800), 27.962027, "us")


@kernel_exercise(
    hints=[
        "Key n of head h begins at k_ptr + (n * H + h) * D. The last tile reaches past kv_len: mask both loads.",
        "A masked key has the score -inf, and so no weight; a score of 0 would have some.",
        "s = tl.where(mask, tl.sum(q[None, :] * k, 1), float('-inf')), then the step of exercise 1 in powers of two.",
    ],
    bugs=[
        ("k_ptr + at, mask=mask[:, None], other=0.0", "k_ptr + at", "K has no mask: only compiled code tells"),
        ("v_ptr + at, mask=mask[:, None], other=0.0", "v_ptr + at", "V has no mask"),
        ("v_ptr + at, mask=mask[:, None], other=0.0", "v_ptr + at, mask=mask[:, None]",
         "a masked row of V holds anything, and 0 times anything may be NaN"),
        ('tl.where(mask, tl.sum(q[None, :] * k, 1), float("-inf"))', "tl.sum(q[None, :] * k, 1)", "masked keys count"),
        ("tl.exp2(m - m_new)", "tl.exp2(m_new - m)", "the factor upside down"),
        ("acc = acc * alpha + ", "acc += ", "the output is not rescaled"),
        ("l = l * alpha + ", "l += ", "the denominator is not rescaled"),
        ("* H + tl.program_id(0)) * D", "* H) * D", "every program reads the first head"),
    ],
)
def attend_keys(
    q_ptr, k_ptr, v_ptr, o_ptr, kv_len,
    H: "tl.constexpr", D: "tl.constexpr", BLOCK: "tl.constexpr",
):
    """Attention of one token: program h walks the keys of head h once, BLOCK at a time.

    q [H, D], times log2(e) / sqrt(D): use tl.exp2; k, v [kv_len, H, D]; o [H, D] out. All fp32.
    """
    offs_n, offs_d = tl.arange(0, BLOCK), tl.arange(0, D)
    q = tl.load(q_ptr + tl.program_id(0) * D + offs_d)
    m, l, acc = float("-inf"), 0.0, tl.zeros([D], tl.float32)
    for first in range(0, kv_len, BLOCK):
        # >>> your code
        mask = first + offs_n < kv_len
        at = ((first + offs_n[:, None]) * H + tl.program_id(0)) * D + offs_d[None, :]
        k = tl.load(k_ptr + at, mask=mask[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=mask[:, None], other=0.0)
        s = tl.where(mask, tl.sum(q[None, :] * k, 1), float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 0))
        alpha, p = tl.exp2(m - m_new), tl.exp2(s - m_new)
        l = l * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(p[:, None] * v, 0)
        m = m_new
        # <<< your code
    tl.store(o_ptr + tl.program_id(0) * D + offs_d, acc / l)


def _attend(fn, kv_len, heads, block, scale):
    """Run the reader's kernel beside plain attention. The tensors end where the last key does."""
    dim = 16
    q = scale * _scores(kv_len, heads, dim)
    k, v = _scores(kv_len + 1, kv_len, heads, dim), _scores(kv_len + 2, kv_len, heads, dim)
    want = torch.einsum("hl,lhd->hd", torch.einsum("hd,lhd->hl", q, k).softmax(-1), v)
    q, k, v = (x.to(device()) for x in (q * math.log2(math.e), k, v))
    o = torch.full_like(q, math.nan)
    fn[(heads,)](q, k, v, o, kv_len, H=heads, D=dim, BLOCK=block)
    expect(o.cpu(), want, "o", atol=1e-4)


@attend_keys.case("one head, 64 keys in four full tiles")
def _(fn):
    _attend(fn, 64, 1, 16, 0.25)


@attend_keys.case("three heads, 50 keys: the last tile has two")
def _(fn):
    _attend(fn, 50, 3, 16, 0.25)


@attend_keys.case("large scores, one key in the last tile")
def _(fn):
    _attend(fn, 33, 2, 16, 5.0)
