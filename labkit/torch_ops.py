"""Attention over pages out of torch's own operations: what the engine runs on where there are no kernels of ours.

The reference of chapter 9 takes one sequence after the other and computes in fp32: right, and slow. Here all decodes of
a step are three sparse operations over the pages as they lie (on a CPU, in fp32 or fp64), and everything else is one
call of torch's fused attention a sequence, over gathered pages. What depends on the lengths only is worked out once a
step (`plan`), for every layer.
"""

import warnings
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from labkit import args


def plan(block_table, q_starts, kv_lens, slots, page_size):
    """Prepare one step for all layers; the arguments are those of `ragged_attention` and `write_kv`, all slots >= 0.

    Returns layer(q, k, v, k_pages, v_pages) -> o [N, Hq, D], which stores k and v [N, Hkv, D] and then attends.
    Layers may differ in their numbers of heads. For inference only: no gradients.
    """
    attend = _attention(block_table, q_starts, kv_lens, page_size)

    def layer(q, k, v, k_pages, v_pages):
        for new, pages in ((k, k_pages), (v, v_pages)):
            pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, new)
        return attend(q, k_pages, v_pages)

    return layer


def _attention(block_table, q_starts, kv_lens, page_size, sm_scale=None):
    """attend(q, k_pages, v_pages) -> o for these lengths: decodes in one call if they can be, chunks in one each."""
    starts, lens, table = q_starts.tolist(), kv_lens.tolist(), block_table.cpu().numpy()
    chunks = [(slice(*ends), b) for b, ends in enumerate(pairwise(starts)) if ends[0] < ends[1]]
    known = {}  # (query heads, KV heads) -> calls: the layers of a pruned model differ

    def prepare(q, k_pages, heads):
        """[(rows of q, function)]"""
        calls, scale, decodes, left = [], args.scale(sm_scale, q.shape[2]), [], chunks
        if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64):  # what sampled_addmm takes
            decodes = [(rows.start, b) for rows, b in chunks if rows.stop - rows.start == 1]
            left = [(rows, b) for rows, b in chunks if rows.stop - rows.start > 1]
        if decodes:
            rows, members = map(list, zip(*decodes))
            own = np.array([lens[b] for b in members])
            in_order = rows == list(range(rows[0], rows[0] + len(rows)))  # then a view of q, not a copy
            rows = slice(rows[0], rows[0] + len(rows)) if in_order else torch.tensor(rows)
            calls.append((rows, _decode(table[members], own, page_size, k_pages.shape[0], *heads, scale, q.dtype)))
        for rows, b in left:
            pages = torch.from_numpy(table[b, : -(-lens[b] // page_size)].astype(np.int64)).to(q.device)
            calls.append((rows, _chunk(pages, lens[b], rows.stop - rows.start, *heads, scale, q.device)))
        return calls

    def attend(q, k_pages, v_pages):
        heads = q.shape[1], k_pages.shape[2]
        if heads not in known:
            known[heads] = prepare(q, k_pages, heads)
        o = torch.empty_like(q)
        for rows, call in known[heads]:
            o[rows] = call(q[rows], k_pages, v_pages)
        return o

    return attend


def _decode(table, lens, page_size, num_pages, num_heads, num_kv_heads, scale, dtype):
    """call(q [B, Hq, D], k_pages, v_pages) -> o: one query a sequence over its pages, which stay where they are.

    A block table is the pattern of a sparse matrix: a row for each sequence and query head, a column for each place in
    the pool and KV head. Scores are a product that is computed at the pattern only (`sampled_addmm`), and the output
    is, for every row, a weighted sum of the values that its columns name (`embedding_bag`).
    """
    seq = np.repeat(np.arange(len(lens)), lens)  # of every key
    token = np.arange(len(seq)) - np.repeat(np.cumsum(lens) - lens, lens)
    slot = table[seq, token // page_size].astype(np.int64) * page_size + token % page_size
    pool = num_pages * page_size
    kv_head = np.arange(num_heads) // (num_heads // num_kv_heads)
    columns = [kv_head[:, None] * pool + own for own in np.split(slot, np.cumsum(lens)[:-1])]  # [Hq, kv_len] each
    columns = torch.from_numpy(np.concatenate(columns, axis=None))
    ends = torch.from_numpy(np.cumsum([0, *np.repeat(lens, num_heads)]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        scores = torch.sparse_csr_tensor(
            ends, columns, torch.zeros(len(columns), dtype=dtype), (len(ends) - 1, num_kv_heads * pool),
            check_invariants=False,
        )  # fmt: skip
    values = scores.values()  # a view: [Hq * kv_len] of one sequence after the other
    softmaxes = [x.view(num_heads, -1) for x in values.split((lens * num_heads).tolist())]

    def call(q, k_pages, v_pages):
        # Memory is expected as [Hkv, P, page_size, D], where a head's keys lie together; other strides are copied.
        k, v = (x.permute(2, 0, 1, 3).reshape(-1, x.shape[3]) for x in (k_pages, v_pages))
        torch.sparse.sampled_addmm(scores, q.flatten(0, 1), k.T, beta=0.0, alpha=scale, out=scores)
        for x in softmaxes:
            torch.softmax(x, dim=-1, out=x)
        return F.embedding_bag(columns, v, ends[:-1], mode="sum", per_sample_weights=values).view_as(q)

    return call


def _chunk(pages, kv_len, q_len, num_heads, num_kv_heads, scale, device):
    """call(q [q_len, Hq, D], k_pages, v_pages) -> o: a sequence's newest q_len tokens over its pages [.] int64."""
    shared = num_heads != num_kv_heads
    position = torch.arange(kv_len - q_len, kv_len, device=device)  # the last query sits on the last key
    keep = torch.arange(kv_len, device=device) <= position[:, None]

    def call(q, k_pages, v_pages):
        k, v = (x[pages].flatten(0, 1)[:kv_len].transpose(0, 1) for x in (k_pages, v_pages))  # [Hkv, kv_len, D]
        q = q.transpose(0, 1)[None]
        o = F.scaled_dot_product_attention(q, k[None], v[None], keep, scale=scale, enable_gqa=shared)
        return o[0].transpose(0, 1)

    return call


def write_kv(k, v, k_pages, v_pages, slots):
    """The same as `labkit.paged_attention.write_kv`; the pages must be viewable as [slots, Hkv, D]."""
    args.write_kv(k, v, k_pages, v_pages, slots, dtypes=args.REFERENCE_FLOATS)
    if bool((slots < 0).any()):
        k, v, slots = k[slots >= 0], v[slots >= 0], slots[slots >= 0]
    flat = []
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        ok = pages.stride(0) == pages.shape[1] * pages.stride(1) or 1 in pages.shape[:2]
        args.expect(ok, f"{name} (strides)", pages.stride(), "pages that lie one after the other")
        flat.append(pages.view(-1, *pages.shape[2:]))
    for new, slots_of in zip((k, v), flat):
        slots_of.index_copy_(0, slots, new)


def ragged_attention(q, k_pages, v_pages, block_table, q_starts, kv_lens, *, sm_scale=None):
    """The same as `labkit.batching.ragged_attention`, whose arguments and errors it has.

    A chunk must not be longer than its keys. For inference only: no gradients.
    """
    args.ragged(q, k_pages, v_pages, block_table, q_starts, kv_lens, dtypes=args.REFERENCE_FLOATS)
    ok = bool((q_starts.diff() <= kv_lens).all())
    args.expect(ok, "kv_lens", "fewer keys than queries of a sequence", "at least as many")
    return _attention(block_table, q_starts, kv_lens, k_pages.shape[1], sm_scale)(q, k_pages, v_pages)
