"""Flash-Decoding in plain torch, step by step as its authors tell it (Dao, Haziza, Massa, Sizov 2023).

1. Cut the keys and values of every sequence into splits. No data moves: a split is a view.
2. Attend to each split on its own. Besides the partial output keep one number a row, the log-sum-exp of its scores.
3. Merge: a partial output weighs exp(lse_split - lse_total).
"""

import torch

from labkit import args, splits
from labkit.attention import decode_attention, softmax_dtype
from labkit.splits import num_splits_heuristic  # noqa: F401  (part of this topic's public names)

BLOCK_KEYS = 64  # a split is a whole number of these


def online_softmax(scores, values):
    """Softmax(scores) @ values in one pass, a key at a time (Milakov & Gimelshein 2018, Algorithm 3).

    scores [L], values [L, D]. Yields (m, l, acc) after every key: running maximum, denominator and unnormalised
    output [D]. The result is acc / l after the last one.
    """
    m, l, acc = float("-inf"), 0.0, torch.zeros_like(values[0])
    for score, value in zip(scores.tolist(), values):
        m_new = max(m, score)
        alpha = torch.tensor(m - m_new).exp().item()  # what was summed so far was relative to the old maximum
        p = torch.tensor(score - m_new).exp().item()
        m, l, acc = m_new, l * alpha + p, acc * alpha + p * value
        yield m, l, acc


def split_attention(q, k, v, kv_lens, *, num_splits, sm_scale=None):
    """Steps 1 and 2. Returns part_o [B, Hq, S, D] and part_lse [B, Hq, S], at least fp32; empty splits: 0 and -inf.

    Partial outputs are not rounded to fp16 or bf16: the merge would add those errors up.
    """
    q, k, v = (x.to(softmax_dtype(q.dtype)) for x in (q, k, v))
    parts = []
    for s in range(num_splits):
        cuts = [splits.bounds(n, num_splits, BLOCK_KEYS)[s] for n in kv_lens.tolist()]
        o, lse = [], []
        for b, (start, end) in enumerate(cuts):
            view = slice(b, b + 1)
            length = torch.tensor([end - start], dtype=torch.int32, device=q.device)
            o_b, lse_b = decode_attention(q[view], k[view, start:end], v[view, start:end], length, sm_scale=sm_scale)
            o.append(o_b)
            lse.append(lse_b)
        parts.append((torch.cat(o), torch.cat(lse)))
    part_o, part_lse = (torch.stack(x, 2) for x in zip(*parts))
    return part_o, part_lse


def merge(part_o, part_lse):
    """Step 3: combine partial attentions over disjoint sets of keys, exactly.

    part_o [B, Hq, S, D], part_lse [B, Hq, S], fp32 (or fp64). Returns o [B, Hq, D] and lse [B, Hq] in that dtype.
    A split without keys has lse -inf and no weight; if all are empty, o is 0 and lse -inf.
    Raises ValueError naming the argument.
    """
    args.merge(part_o, part_lse, dtypes=(torch.float32, torch.float64))
    lse = torch.logsumexp(part_lse, -1)
    weight = torch.exp(part_lse - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    return (weight.unsqueeze(-1) * part_o).sum(2), lse


def flash_decoding(q, k, v, kv_lens, *, num_splits=None, sm_scale=None):
    """Decode attention with the keys cut into num_splits pieces; same arguments and result as `decode_attention`.

    num_splits None: `labkit.splits.choose` for an H200. Whatever it is, the result is the same up to rounding.
    """
    batch, _, num_kv_heads, max_kv_len, dim = args.decode(q, k, v, kv_lens, dtypes=args.REFERENCE_FLOATS)
    args.num_splits(num_splits)
    if batch == 0:
        return decode_attention(q, k, v, kv_lens, sm_scale=sm_scale)
    num_splits = num_splits or splits.choose(batch * num_kv_heads, 132, max_kv_len, dim)
    part_o, part_lse = split_attention(q, k, v, kv_lens, num_splits=num_splits, sm_scale=sm_scale)
    o, lse = merge(part_o, part_lse)
    return o.to(q.dtype), lse
