"""Attention over pages out of torch's own operations: what the engine runs on where there are no kernels of ours.

The reference of chapter 9 takes one sequence after the other and computes in fp32: right, and slow. Here sequences of
about the same length are gathered together and handed to torch's fused attention. What depends on the lengths only is
worked out once a step (`plan`) and used by every layer.
"""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from labkit import args

GROUP = 8  # sequences a call: their keys should still lie in the cache when they are used, and calls cost time too


def plan(block_table, q_starts, kv_lens, slots, page_size):
    """Prepare one step for all layers; the arguments are those of `ragged_attention` and `write_kv`.

    Returns layer(q, k, v, k_pages, v_pages) -> o [N, Hq, D], which stores k and v [N, Hkv, D] and then attends.
    """
    attend = _attention(block_table, q_starts, kv_lens, page_size)

    def layer(q, k, v, k_pages, v_pages):
        for new, pages in ((k, k_pages), (v, v_pages)):
            pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, new)
        return attend(q, k_pages, v_pages)

    return layer


def _attention(block_table, q_starts, kv_lens, page_size, sm_scale=None):
    """attend(q, k_pages, v_pages) -> o for these lengths. Sequences are grouped; each group is one call of SDPA."""
    device, starts, lens = block_table.device, q_starts.tolist(), kv_lens.tolist()
    table = block_table.cpu().numpy()
    q_lens = [end - start for start, end in pairwise(starts)]
    order = sorted((b for b in range(len(lens)) if q_lens[b]), key=lambda b: (q_lens[b], lens[b]))
    rows = np.concatenate([np.arange(starts[b], starts[b + 1]) for b in order] or [np.zeros(0, int)])
    in_order = bool((rows == np.arange(starts[-1])).all())
    rows = torch.from_numpy(rows).to(device)
    groups = []
    while order:
        q_len, size = q_lens[order[0]], 1
        if q_len == 1:  # decodes are grouped, a chunk of a prompt is a group of its own
            size = next((i for i, b in enumerate(order[:GROUP]) if q_lens[b] > 1), min(GROUP, len(order)))
        members, order = order[:size], order[size:]
        own = np.array([lens[b] for b in members])
        width = -(-own.max() // page_size)
        used = np.arange(width) < -(-own[:, None] // page_size)
        pages = np.where(used, table[members, :width], 0)  # beyond its end: any page, it is masked
        position = own[:, None] - q_len + np.arange(q_len)  # bottom-right: the last query sits on the last key
        hidden = np.arange(width * page_size) > position[:, :, None]  # [size, q_len, keys]
        mask = torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), float("-inf"))
        groups.append((q_len, torch.from_numpy(pages.ravel().astype(np.int64)).to(device), mask.to(device)))
    prepared = []

    def prepare(q, num_kv_heads):
        """Room for the gathered keys and values, as the gather and as SDPA want to see it: once for all layers."""
        group, dim, start = q.shape[1] // num_kv_heads, q.shape[2], 0
        most = max((len(pages) for _, pages, _ in groups), default=0)
        room = q.new_empty(2, num_kv_heads * most * page_size * dim)
        for q_len, pages, mask in groups:
            size = len(mask)
            flat = room[:, : num_kv_heads * len(pages) * page_size * dim]
            into = flat.view(2, num_kv_heads, len(pages), page_size, dim).unbind()
            seen = flat.view(2, num_kv_heads, size, -1, dim).transpose(1, 2).unbind()  # [size, Hkv, keys, D]
            bias = mask.to(q.dtype)[:, None, None].expand(-1, 1, group, -1, -1).flatten(2, 3)
            shape = (size, q_len, num_kv_heads, group, dim)
            prepared.append((slice(start, start + size * q_len), shape, pages, bias, *into, *seen))
            start += size * q_len

    def attend(q, k_pages, v_pages):
        # Memory is fastest as [Hkv, P, page_size, D], where a head's keys lie together; any strides will do.
        k_pages, v_pages = k_pages.permute(2, 0, 1, 3), v_pages.permute(2, 0, 1, 3)
        if groups and not prepared:
            prepare(q, len(k_pages))
        q = q if in_order else q[rows]
        o, scale = torch.empty_like(q), args.scale(sm_scale, q.shape[2])
        for here, shape, pages, bias, k_into, v_into, k, v in prepared:
            torch.index_select(k_pages, 1, pages, out=k_into)
            torch.index_select(v_pages, 1, pages, out=v_into)
            # Query heads that share a KV head become rows of one matrix: [size, Hkv, group * q_len, D].
            x = q[here].view(shape).permute(0, 2, 3, 1, 4).flatten(2, 3)
            x = F.scaled_dot_product_attention(x, k, v, attn_mask=bias, scale=scale)
            o[here].view(shape).copy_(x.unflatten(2, (shape[3], shape[1])).permute(0, 3, 1, 2, 4))
        if in_order:
            return o
        back = torch.zeros_like(o)
        back[rows] = o
        return back

    return attend


def write_kv(k, v, k_pages, v_pages, slots):
    """The same as `labkit.paged_attention.write_kv`; the pages must be viewable as [slots, Hkv, D]."""
    args.write_kv(k, v, k_pages, v_pages, slots, dtypes=args.REFERENCE_FLOATS)
    if bool((slots < 0).any()):
        k, v, slots = k[slots >= 0], v[slots >= 0], slots[slots >= 0]
    for new, pages in ((k, k_pages), (v, v_pages)):
        pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, new)


def ragged_attention(q, k_pages, v_pages, block_table, q_starts, kv_lens, *, sm_scale=None):
    """The same as `labkit.batching.ragged_attention`, whose arguments and errors it has.

    A chunk must not be longer than its keys, and pages must hold finite numbers: slots that a mask hides are still
    multiplied, by 0.
    """
    args.ragged(q, k_pages, v_pages, block_table, q_starts, kv_lens, dtypes=args.REFERENCE_FLOATS)
    ok = bool((q_starts.diff() <= kv_lens).all())
    args.expect(ok, "kv_lens", "fewer keys than queries of a sequence", "at least as many")
    return _attention(block_table, q_starts, kv_lens, k_pages.shape[1], sm_scale)(q, k_pages, v_pages)
