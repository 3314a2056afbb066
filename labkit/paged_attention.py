"""PagedAttention in plain torch (Kwon et al., SOSP 2023): attention over keys and values that lie in pages.

A sequence's token at position i is in page block_table[i // page_size], at offset i % page_size. Where a page lies does
not matter to attention: gathered in the table's order, the pages are the contiguous cache again.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit import args, bench, codegen, peers, player
from labkit.attention import decode_attention
from labkit.block_pool import BlockPool, OutOfPages  # noqa: F401  (part of this topic's public names)
from labkit.flash_decoding import decode_case, flash_decoding  # noqa: F401  (timed beside paged_decoding)


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
    """Attention of one head over one sequence, a page at a time: equation 4 of the paper with an online softmax.

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


# --- players


def traced_problem(kv_len=90, page_size=16, num_pages=12):
    """A decode step of one head over one sequence for `walk_player`: v_pages[..., 0] holds the slot's number + 1."""
    rng = np.random.default_rng(4)
    k = torch.from_numpy(rng.standard_normal((1, kv_len, 1, 8), dtype=np.float32))
    k_pages, v_pages, block_table = to_pages(k, k, [kv_len], page_size, rng.permutation(num_pages))
    numbers = torch.arange(1.0, num_pages * page_size + 1).view(num_pages, page_size)
    v_pages[..., 0, 0] = torch.where(v_pages[..., 0, 0].isnan(), v_pages[..., 0, 0], numbers)
    kv_lens = torch.tensor([kv_len], dtype=torch.int32)
    return dict(q=k[:, 0], k_pages=k_pages, v_pages=v_pages, block_table=block_table, kv_lens=kv_lens)


def walk_player(inputs, o, walk):
    """Step through a recorded launch (`labkit.trace.watch` of `attend_tile` on `traced_problem`).

    Which slots a program read is seen in the values that it loaded; a slot that it masked shows as zero there.
    """
    num_pages, size = inputs["k_pages"].shape[:2]
    table = inputs["block_table"][0].tolist()
    mine = set(sequence_slots(inputs["block_table"][0], inputs["kv_lens"][0], size, num_pages).tolist())
    colors = ["sky" if slot in mine else "muted" for slot in range(num_pages * size)]
    steps = []
    for step in walk:
        program, numbers = step.program[0], step.inputs[2][:, 0]
        slots = [int(n) - 1 for n in numbers if n > 0]
        pages = list(dict.fromkeys(slot // size for slot in slots))
        for slot in slots:
            colors[slot] = "orange"
        text = f"Program {program} reads {len(slots)} keys, which lie in pages {' and '.join(map(str, pages))}."
        masked = len(numbers) - len(slots)
        text += f" {masked} of the tile's {len(numbers)} rows are past the last key: not read." if masked else ""
        entries = [("orange" if page in pages else "", str(page)) for page in table]
        rows = [colors[i : i + size] for i in range(0, len(colors), size)]
        steps.append({"text": text, "pages": rows, "table": {"page": entries}})
        colors = ["blue" if color == "orange" else color for color in colors]
    text = (
        f"All keys were read once and nothing else was touched. Merged, o[1] is {o[0, 0, 1]:.4f}: the kernel's output."
    )
    rows = [colors[i : i + size] for i in range(0, len(colors), size)]
    steps.append({"text": text, "pages": rows, "table": {"page": [("", str(page)) for page in table]}})
    cuts = [f"{start}–{min(start + size, len(mine)) - 1}" for start in range(0, len(mine), size)]
    labels = [f"page {i}" + (f": keys {cuts[table.index(i)]}" if i in table else "") for i in range(num_pages)]
    panels = {
        "pages": player.Grid(num_pages, size, row_labels=labels, name="the cache"),
        "table": player.Values(["page"], cuts, corner="keys", name="block table"),
    }
    legend = {"orange": "being read", "blue": "read", "sky": "of this sequence", "muted": "of nobody, or past its end"}
    caption = "A run of the kernel in the interpreter: 90 keys, pages of 16, tiles of 32 keys, two splits."
    return player.Stepper("The walk through the page table", panels, steps, legend=legend, caption=caption)


def pool_player(num_pages=8, page_size=4):
    """Step through the paper's figures 6 and 8 and a prefix hit, on a real pool and a memory of words."""
    pool, memory = BlockPool(num_pages, page_size), {}
    words, steps = {}, []

    def say(text, changed=()):
        held = {page: "blue" if refs == 1 else "purple" for page, refs in enumerate(pool.ref_counts) if refs}
        held |= dict.fromkeys(pool.cached_pages - set(held), "sky")
        colors = [held.get(slot // page_size, "muted") for slot in range(num_pages * page_size)]
        cells = [("orange" if slot in changed else color, memory.get(slot, "")) for slot, color in enumerate(colors)]
        rows = [cells[i : i + page_size] for i in range(0, len(cells), page_size)]
        tables = {seq_id: str(pool.table(seq_id)) if seq_id in pool.seq_ids else "-" for seq_id in "ABC"}
        queue = {"free queue": " ".join(map(str, pool.free_queue))}
        steps.append({"text": text, "memory": rows, "tables": tables | queue})

    def write(seq_id, start, tokens):
        slots = pool.slots(seq_id, start)
        memory.update(zip(slots, tokens))
        return slots

    def number(token):
        return words.setdefault(token, len(words))

    def append(seq_id, token, text):
        for src, dst in pool.append(seq_id, number(token)):
            memory.update({dst * page_size + i: memory.get(src * page_size + i, "") for i in range(page_size)})
        say(text, write(seq_id, pool.num_tokens(seq_id) - 1, [token]))

    def allocate(seq_id, text, say_text):
        tokens = text.split()
        cached = pool.allocate(seq_id, [number(token) for token in tokens])
        say(say_text.format(cached=cached), write(seq_id, cached, tokens[cached:]))

    prompt = "Four score and seven years ago our"
    allocate("A", prompt, "A's prompt has seven words: two pages of four, and one slot is left over.")
    append("A", "fathers", "The eighth word takes that slot. No page is needed.")
    append("A", "brought", "The ninth word needs a page; one is taken, wherever it lies.")
    pool.fork("A", "B")
    say("B is forked from A. Only the table is copied: each page now has two holders.")
    append("A", "forth", "A writes. Its last page is shared, so it is copied first, and A writes to the copy.")
    append("B", "into", "B writes. It is the last holder of the old page now, and writes in place.")
    pool.free("A")
    say("A ends. Pages that B also holds stay; the other goes to the end of the queue.")
    pool.free("B")
    say("B ends. All pages are free, yet the two full ones keep what they hold, and can be found.")
    text = "C's prompt is the same eight words: {cached} tokens are cached. The last page is computed again: "
    allocate("C", f"{prompt} fathers", text + "C needs its output.")
    append("C", "brought", "C goes on.")
    panels = {
        "memory": player.Grid(num_pages, page_size, row_labels=[f"page {i}" for i in range(num_pages)], name="memory"),
        "tables": player.Values(["A", "B", "C", "free queue"], name="block tables"),
    }
    legend = {
        "orange": "just written", "blue": "held by one", "purple": "held by two", "sky": "free, but cached",
        "muted": "free",
    }  # fmt: skip
    caption = "A run of the lab's BlockPool. The words are the example of the paper's figures 6 and 8."
    return player.Stepper(
        "Fork, copy on write, and a prefix found again", panels, steps, legend=legend, caption=caption
    )


# --- what the compiler makes of it


def codegen_cases():
    """Pages smaller than the tile, as large and larger; dtypes, head_dims and groups one at a time; fp32 with a group
    of 64."""

    def decode(name, page_size, dtype="bfloat16", head_dim=128, group=4, **options):
        pages = codegen.Tensor((64, page_size, 8, head_dim), dtype)
        tensors = dict(q=codegen.Tensor((4, 8 * group, head_dim), dtype), k_pages=pages, v_pages=pages)
        tensors["block_table"] = codegen.Tensor((4, 16), "int32", 1)
        tensors["kv_lens"] = codegen.Tensor((4,), "int32", 16 * page_size)
        kernels, arguments = ("_paged_split_kernel",), tensors | {"num_splits": 4} | options
        narrow = kernels if page_size % 64 else ()  # every row of a tile that spans pages reads a page id of 4 bytes
        return codegen.Case("kernels.paged_attention:paged_decoding", name, arguments, matrix=kernels, narrow=narrow)

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
        decode("fp32, page 16, head_dim 64, group 64", 16, "float32", head_dim=64, group=64),
        decode("fp32, page 16, group 64", 16, "float32", group=64),
        decode("fp32, page 16, head_dim 256, group 64", 16, "float32", head_dim=256, group=64),
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


PEERS = {"gathered SDPA": gathered_sdpa, "FlashInfer": peers.flashinfer_paged, "torch varlen": peers.varlen}


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
        contiguous = decode_case(f"{name} contiguous", batch, kv_len, 32, 8, torch.bfloat16, **options)
        kept = {peer: contiguous.peers[peer] for peer in ("SDPA flash", "FlashInfer")}
        result.append(dataclasses.replace(contiguous, peers=kept, reference="flash_decoding"))
        result += [
            paged_case(f"{name} page {size}", [kv_len] * batch, size, section=PRICE, tiny=tiny) for size in sizes
        ]
    ragged = [paged_case(f"page {size}", ragged_lens(), size, section=RAGGED, tiny=tiny) for size in (16, 64)]
    cut = VARIANTS | {"not split": {"num_splits": 1}}
    return result + [dataclasses.replace(case, variants=cut) for case in ragged]
