"""PagedAttention in plain torch (Kwon et al., SOSP 2023): attention over keys and values that lie in pages.

A sequence's token at position i is in page block_table[i // page_size], at offset i % page_size. Where a page lies does
not matter to attention: gathered in the table's order, the pages are the contiguous cache again.
"""

import torch

from labkit import args
from labkit.attention import decode_attention
from labkit.block_pool import BlockPool, OutOfPages  # noqa: F401  (part of this topic's public names)


def sequence_slots(block_table, kv_len, page_size, num_pages):
    """Where the tokens of one sequence lie: slot = page * page_size + offset, [kv_len] or fewer.

    block_table [max_pages]. A page that does not exist has no slots: its tokens are as if they were absent.
    """
    position = torch.arange(min(max(int(kv_len), 0), len(block_table) * page_size), device=block_table.device)
    page = block_table[position // page_size].long()
    return (page * page_size + position % page_size)[(page >= 0) & (page < num_pages)]


def paged_decoding(q, k_pages, v_pages, block_table, kv_lens, *, num_splits=None, sm_scale=None):
    """One new token a sequence attends to its keys, which lie in pages.

    q [B, Hq, D]; k_pages, v_pages [P, page_size, Hkv, D], Hq a multiple of Hkv; fp16, bf16, fp32 or fp64.
    block_table [B, max_pages] int32: page of each page_size tokens of a sequence. kv_lens [B] int32. num_splits does
    not change the result. sm_scale defaults to D ** -0.5.

    Page ids beyond kv_len are never looked at. An id within it must lie in [0, P): elsewhere it is an error on the CPU
    and under LAB_CHECK=1; where values are not looked at, the tokens of such a page are as if they were absent.

    Returns o [B, Hq, D] in q.dtype and lse [B, Hq] fp32 (fp64 for fp64); a sequence without keys gives 0 and -inf.
    Raises ValueError naming the argument. Source: Kwon et al., section 4.1, equation 4.
    """
    args.paged(q, k_pages, v_pages, block_table, kv_lens, dtypes=args.REFERENCE_FLOATS)
    args.num_splits(num_splits)
    num_pages, page_size = k_pages.shape[:2]
    parts = []
    for b in range(len(q)):
        slots = sequence_slots(block_table[b], kv_lens[b], page_size, num_pages)
        k, v = (x.flatten(0, 1)[slots][None] for x in (k_pages, v_pages))  # [1, kv_len, Hkv, D]
        length = torch.tensor([len(slots)], dtype=torch.int32, device=q.device)
        parts.append(decode_attention(q[b : b + 1], k, v, length, sm_scale=sm_scale))
    if not parts:
        return q.clone(), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    o, lse = zip(*parts)
    return torch.cat(o), torch.cat(lse)


def write_kv(k, v, k_pages, v_pages, slots):
    """Store new keys and values in their pages, in place.

    k, v [N, Hkv, D]; k_pages, v_pages [P, page_size, Hkv, D], same dtype; slots [N] int64 = page * page_size + offset.
    A negative slot is skipped (padding); so is one beyond the last page where values are not looked at, elsewhere it is
    an error. Two tokens must not share a slot. Raises ValueError naming the argument.
    """
    args.write_kv(k, v, k_pages, v_pages, slots, dtypes=args.REFERENCE_FLOATS)
    num_pages, page_size = k_pages.shape[:2]
    kept = (slots >= 0) & (slots < num_pages * page_size)
    page, offset = slots[kept] // page_size, slots[kept] % page_size
    k_pages[page, offset] = k[kept]
    v_pages[page, offset] = v[kept]


def pad_tables(tables, device="cpu"):
    """Lists of page ids as one block_table [B, max_pages] int32; -1 where a sequence has no page."""
    block_table = torch.full((len(tables), max(map(len, tables), default=0)), -1, dtype=torch.int32)
    for row, table in zip(block_table, tables):
        row[: len(table)] = torch.tensor(table, dtype=torch.int32)
    return block_table.to(device)


def to_pages(k, v, kv_lens, page_size, order=None):
    """Cut contiguous caches k, v [B, L, Hkv, D] into pages. Returns k_pages, v_pages, block_table.

    order: which pages to take, a permutation of at least as many as are needed; default: in order. Slots that no token
    uses are NaN.
    """
    counts = [-(-int(n) // page_size) for n in kv_lens]
    order = list(range(sum(counts))) if order is None else [int(page) for page in order]
    args.expect(len(order) >= sum(counts), "order", f"{len(order)} pages", f"at least {sum(counts)}")
    starts = [sum(counts[:b]) for b in range(len(counts))]
    block_table = pad_tables([order[start : start + count] for start, count in zip(starts, counts)], k.device)
    shape = (len(order), page_size, *k.shape[2:])
    k_pages, v_pages = (torch.full(shape, float("nan"), dtype=x.dtype, device=x.device) for x in (k, v))
    for b, n in enumerate(kv_lens):
        slots = sequence_slots(block_table[b], n, page_size, len(order))
        write_kv(k[b, : int(n)], v[b, : int(n)], k_pages, v_pages, slots)
    return k_pages, v_pages, block_table


def page_walk(q, k_pages, v_pages, table, kv_len, *, sm_scale=None):
    """Attention of one head over one sequence, a page at a time, as equation 4 of the paper has it.

    q [D]; k_pages, v_pages [P, page_size, D]; table: list of page ids. Yields (page, used, p, m, l, acc) after every
    page: its id, how many of its slots are read, their unnormalised weights, and the running maximum, denominator and
    output [D] of the online softmax. The result is acc / l after the last.
    """
    page_size, scale = k_pages.shape[1], args.scale(sm_scale, len(q))
    m, l, acc = torch.tensor(float("-inf")), torch.tensor(0.0), torch.zeros_like(q)
    for start in range(0, kv_len, page_size):
        page, used = table[start // page_size], min(page_size, kv_len - start)
        scores = k_pages[page, :used] @ q * scale
        m_new = torch.maximum(m, scores.max())
        p, alpha = torch.exp(scores - m_new), torch.exp(m - m_new)
        m, l, acc = m_new, l * alpha + p.sum(), acc * alpha + p @ v_pages[page, :used]
        yield page, used, p, m, l, acc
