"""PagedAttention in plain torch (Kwon et al., SOSP 2023): attention over keys and values that lie in pages.

A sequence's token at position i is in page block_table[i // page_size], at offset i % page_size. Where a page lies does
not matter to attention: gathered in the table's order, the pages are the contiguous cache again.
"""

import dataclasses
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit import args, bench, codegen, flash_decoding
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


# --- what the compiler makes of it


def codegen_cases():
    """Pages smaller than the tile, as large and larger; every dtype, head_dim and group at its corners."""

    def decode(name, page_size, dtype="bfloat16", head_dim=128, group=4, **options):
        pages = codegen.Tensor((64, page_size, 8, head_dim), dtype)
        tensors = dict(q=codegen.Tensor((4, 8 * group, head_dim), dtype), k_pages=pages, v_pages=pages)
        tensors["block_table"] = codegen.Tensor((4, 16), "int32", 1)
        tensors["kv_lens"] = codegen.Tensor((4,), "int32", 16 * page_size)
        kernels = ("_paged_split_kernel",)
        return codegen.Case(
            "kernels.paged_attention:paged_decoding", name, tensors | {"num_splits": 4} | options, matrix=kernels
        )

    kv, pages = codegen.Tensor((4, 8, 128), "bfloat16"), codegen.Tensor((64, 16, 8, 128), "bfloat16")
    new_tokens = dict(k=kv, v=kv, k_pages=pages, v_pages=pages, slots=codegen.Tensor((4,), "int64", [5, 6, -1, 70]))
    return [
        decode("bf16, page 16", 16),
        decode("bf16, page 16, id read in place", 16, read_ahead=False),
        decode("bf16, page 64", 64),
        decode("bf16, page 64, id read in place", 64, read_ahead=False),
        decode("bf16, page 1", 1),
        decode("fp16, page 100, group 8", 100, "float16", group=8),
        decode("bf16, page 16, head_dim 64, group 1", 16, head_dim=64, group=1),
        decode("bf16, page 256, head_dim 256, group 8", 256, head_dim=256, group=8),
        decode("bf16, page 16, group 64", 16, group=64),
        decode("fp32, page 32", 32, "float32"),
        codegen.Case("kernels.paged_attention:write_kv", "bf16, page 16", new_tokens),
    ]


# --- benchmark cases

PRICE, RAGGED = (
    "The price of paging: Llama-3-8B, bf16, pages in random order",
    "64 sequences of different lengths, bf16",
)
VARIANTS = {"id read in place": {"read_ahead": False}}


def gathered_sdpa(q, k_pages, v_pages, block_table, kv_lens):
    """Copy the pages into a contiguous cache, then torch's FlashAttention: what one does without a paged kernel."""
    table = block_table.long()
    length, shortest = int(kv_lens.max()), int(kv_lens.min())
    if length != shortest:  # a mask would cost SDPA its fast backend
        raise ValueError(f"kv_lens: got {shortest} to {length}, expected one length")
    query = q.unsqueeze(2)

    def call():
        # [P, page_size, Hkv, D] -> [B, max_pages * page_size, Hkv, D] -> [B, Hkv, L, D]
        k, v = (x[table].flatten(1, 2)[:, :length].transpose(1, 2) for x in (k_pages, v_pages))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, k, v, enable_gqa=True).squeeze(2)

    return call


@functools.lru_cache(maxsize=1)
def _flashinfer_wrapper(lengths, table, page_size, num_q_heads, num_kv_heads, head_dim, dtype, device):
    """A planned wrapper; table: the block table's bytes, so that all copies of the inputs share one plan."""
    import flashinfer

    workspace = torch.zeros(256 * 2**20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")
    rows = torch.frombuffer(bytearray(table), dtype=torch.int32).view(len(lengths), -1)
    counts = [-(-n // page_size) for n in lengths]
    first = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ids = torch.cat([row[:count] for row, count in zip(rows, counts)])
    last = torch.tensor([n - (count - 1) * page_size for n, count in zip(lengths, counts)], dtype=torch.int32)
    wrapper.plan(
        first, ids.to(device), last, num_q_heads, num_kv_heads, head_dim, page_size,
        q_data_type=dtype, kv_data_type=dtype,
    )  # fmt: skip
    return wrapper


def flashinfer(q, k_pages, v_pages, block_table, kv_lens):
    """FlashInfer's batch decode on tensor cores, planned once, over the same pages."""
    _, page_size, num_kv_heads, head_dim = k_pages.shape
    table = block_table.cpu().contiguous().numpy().tobytes()
    wrapper = _flashinfer_wrapper(
        tuple(kv_lens.tolist()), table, page_size, q.shape[1], num_kv_heads, head_dim, q.dtype, str(q.device)
    )
    return lambda: wrapper.run(q, (k_pages, v_pages))


def varlen(q, k_pages, v_pages, block_table, kv_lens):
    """torch's own variable-length FlashAttention with a block table."""
    from torch.nn.attention.varlen import varlen_attn

    first = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    options = dict(seqused_k=kv_lens, block_table=block_table, enable_gqa=True)
    longest = block_table.shape[1] * k_pages.shape[1]
    return lambda: varlen_attn(q, k_pages, v_pages, first, None, 1, longest, **options)


PEERS = {"gathered SDPA": gathered_sdpa, "FlashInfer": flashinfer, "torch varlen": varlen}


def paged_case(name, kv_lens, page_size, *, section, tiny=False, num_q_heads=32, num_kv_heads=8, head_dim=128):
    """One decode step over pages in random order. tiny: the same case, small enough for the interpreter."""
    if tiny:
        kv_lens, head_dim, num_q_heads, num_kv_heads = [min(n, 70) for n in kv_lens[:2]], 64, 4, 1
    counts = [-(-n // page_size) for n in kv_lens]
    order = np.random.default_rng(0).permutation(sum(counts))  # the same for every copy of the inputs
    starts = np.cumsum([0, *counts])
    tables = [order[start : start + count].tolist() for start, count in zip(starts, counts)]

    def make(generator, device):
        def randn(*shape):
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

        return {
            "q": randn(len(kv_lens), num_q_heads, head_dim),
            "k_pages": randn(len(order), page_size, num_kv_heads, head_dim),
            "v_pages": randn(len(order), page_size, num_kv_heads, head_dim),
            "block_table": pad_tables(tables, device).clamp(min=0),
            "kv_lens": torch.tensor(kv_lens, dtype=torch.int32, device=device),
        }

    elements = 2 * head_dim * (sum(kv_lens) * num_kv_heads + len(kv_lens) * num_q_heads)  # k, v, q and o
    return bench.Case(
        name, "paged_decoding", make, bytes=2 * elements + 4 * len(order), section=section, peers=PEERS,
        flops=4 * sum(kv_lens) * num_q_heads * head_dim, variants=VARIANTS,
    )  # fmt: skip


def ragged_lens(batch=64, mean=2048, longest=16384) -> list[int]:
    """Lognormal lengths, for one ragged batch."""
    sample = np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1.0, batch)
    return [int(n) for n in sample.clip(1, longest)]


def cases(tiny=False) -> list[bench.Case]:
    """The same keys contiguous and in pages of several sizes; one long sequence; a ragged batch."""
    result = []
    for batch, kv_len, sizes in ((8, 8192, (1, 16, 64, 256)), (1, 32768, (16, 64)), (64, 2048, (16, 64))):
        name = f"B={batch} L={kv_len}"
        options = dict(op="flash_decoding", section=PRICE, tiny=tiny)
        contiguous = flash_decoding.decode_case(f"{name} contiguous", batch, kv_len, 32, 8, torch.bfloat16, **options)
        kept = {peer: contiguous.peers[peer] for peer in ("SDPA flash", "FlashInfer")}
        result.append(dataclasses.replace(contiguous, peers=kept, reference="flash_decoding"))
        result += [
            paged_case(f"{name} page {size}", [kv_len] * batch, size, section=PRICE, tiny=tiny) for size in sizes
        ]
    return result + [paged_case(f"page {size}", ragged_lens(), size, section=RAGGED, tiny=tiny) for size in (16, 64)]
