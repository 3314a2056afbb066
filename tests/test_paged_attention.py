import random
import re
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from far_apart import far_apart
from fresh_memory import nan_in_fresh_memory

import kernels
import kernels.paged_attention as paged
from labkit import args, kv_memory, splits, trace
from labkit import paged_attention as ref
from labkit.attention import decode_attention
from labkit.check import BF16, DECODE_CASES, F16, F32, DecodeCase, assert_matches, randn
from labkit.paged_attention import BlockPool, OutOfPages

# ---- the pool


class Model:
    """What BlockPool promises, as plainly as it goes: lists and dictionaries, and no hashes.

    A token's keys and values depend on all tokens up to it. `prefix` numbers every such prefix, so a number stands
    for the keys and values of one token. `memory` stands for the GPU's: slot -> number; it is written through the
    tables and copied as the pool says.
    """

    def __init__(self, num_pages, page_size):
        self.size, self.free = page_size, list(range(num_pages))
        self.prefix = {}  # (number of the prefix before, token) -> number
        self.kv, self.tables = {}, {}  # sequence -> number of each token; pages
        self.cached = {}  # page -> number of its last token
        self.memory = {}

    def number(self, before, tokens):
        kv = before[:]
        for token in tokens:
            kv.append(self.prefix.setdefault((kv[-1] if kv else None, token), len(self.prefix)))
        return kv

    def held(self):
        return {page for table in self.tables.values() for page in table}

    def take(self):
        page = self.free.pop(0)
        self.cached.pop(page, None)
        return page

    def write(self, seq_id, start):
        """Compute the keys and values of tokens [start, ...), and cache the pages that they fill."""
        kv, table, size = self.kv[seq_id], self.tables[seq_id], self.size
        for i in range(start, len(kv)):
            self.memory[table[i // size] * size + i % size] = kv[i]
            if i % size == size - 1 and kv[i] not in self.cached.values():
                self.cached[table[i // size]] = kv[i]

    def allocate(self, seq_id, tokens):
        kv, hits = self.number([], tokens), []
        for end in range(self.size, len(kv), self.size):  # below len: the last token is computed
            page = next((p for p, last in self.cached.items() if last == kv[end - 1]), None)
            if page is None:
                break
            hits.append(page)
        missing = -(-len(kv) // self.size) - len(hits)
        if missing + len(set(hits) - self.held()) > len(self.free):
            return OutOfPages
        self.free = [page for page in self.free if page not in hits]
        self.kv[seq_id], self.tables[seq_id] = kv, hits + [self.take() for _ in range(missing)]
        self.write(seq_id, len(hits) * self.size)
        return len(hits) * self.size

    def append(self, seq_id, token):
        table, copies, used = self.tables[seq_id], [], len(self.kv[seq_id]) % self.size
        others = {page for other, pages in self.tables.items() if other != seq_id for page in pages}
        if used == 0 or table[-1] in others:
            if not self.free:
                return OutOfPages
            page = self.take()
            if used == 0:
                table.append(page)
            else:
                copies = [(table[-1], page)]
                for i in range(used):
                    self.memory[page * self.size + i] = self.memory[table[-1] * self.size + i]
                table[-1] = page
        self.kv[seq_id] = self.number(self.kv[seq_id], [token])
        self.write(seq_id, len(self.kv[seq_id]) - 1)
        return copies

    def fork(self, parent_id, child_id):
        self.kv[child_id], self.tables[child_id] = self.kv[parent_id][:], self.tables[parent_id][:]

    def free_sequence(self, seq_id):
        table = self.tables.pop(seq_id)
        del self.kv[seq_id]
        self.free += [page for page in reversed(table) if page not in self.held()]


@pytest.mark.parametrize("seed", range(6))
def test_pool_against_the_model(seed):
    """30,000 random operations, few pages and few different tokens, so that everything is shared, full and evicted."""
    rng = random.Random(seed)
    num_pages, page_size = [(7, 1), (12, 3), (16, 4), (9, 8), (30, 2), (20, 4)][seed]
    pool, model, prompts, counts = BlockPool(num_pages, page_size), Model(num_pages, page_size), {}, Counter()
    full = False
    for step in range(5000):
        live = list(model.tables)
        operation = (
            rng.choice(["allocate", "fork" if len(live) < 6 else "free"] + 5 * ["append"]) if live else "allocate"
        )
        if live and full and rng.random() < 0.7:
            operation = "free"
        seq_id = rng.choice(live) if live else None
        if operation == "allocate":
            known = rng.choice(list(prompts.values())) if prompts else []  # a prompt that ended may still be cached
            tokens = known[: rng.randrange(len(known) + 1)] + rng.choices(range(2), k=rng.randrange(2 * page_size))
            prompts[step % 4] = tokens
            got, want = outcome(pool.allocate, step, tokens), model.allocate(step, tokens)
        elif operation == "append":
            token = rng.randrange(2)
            got, want = outcome(pool.append, seq_id, token), model.append(seq_id, token)
        elif operation == "fork":
            got, want = outcome(pool.fork, seq_id, step), model.fork(seq_id, step)
        else:
            got, want = outcome(pool.free, seq_id), model.free_sequence(seq_id)
        full = got is OutOfPages
        counts[operation, "full" if full else bool(got)] += 1
        assert got == want
        assert pool.free_queue == model.free
        assert {seq_id: pool.table(seq_id) for seq_id in pool.seq_ids} == model.tables
        if step % 4 == 0:
            pool.check()
            for seq_id, kv in model.kv.items():
                assert [model.memory[slot] for slot in pool.slots(seq_id)] == kv  # what attention would read
    often = [("allocate", True), ("allocate", "full"), ("append", "full")]
    often += [("append", True)] if page_size > 1 else []  # a page of one token is never half full: no copies
    assert min(counts[key] for key in often) > 20, counts


def outcome(function, *args):
    try:
        return function(*args)
    except OutOfPages:
        return OutOfPages


def pool_with_queue(*pages, num_pages=9, page_size=4):
    """A pool whose free queue begins with these pages."""
    pool = BlockPool(num_pages, page_size)
    for page in range(num_pages):
        pool.allocate(page, [page])
    for page in (*pages, *(set(range(num_pages)) - set(pages))):
        pool.free(page)
    return pool


FOUR_SCORE = list(range(7))  # "Four score and seven years ago our"


def test_block_table_of_the_paper():
    """Figure 6: logical blocks 0, 1, 2 in physical blocks 7, 1, 3; block 1 is filled from 3 to 4, then 3 is taken."""
    pool = pool_with_queue(7, 1, 3)
    assert pool.allocate("A", FOUR_SCORE) == 0
    assert pool.table("A") == [7, 1]
    assert pool.append("A", 100) == []  # "fathers"
    assert pool.table("A") == [7, 1]
    assert pool.append("A", 101) == []  # "brought"
    assert pool.table("A") == [7, 1, 3]
    assert pool.slots("A") == [28, 29, 30, 31, 4, 5, 6, 7, 12]


def test_parallel_sampling_of_the_paper():
    """Figure 8: two samples share blocks 7 and 1; the first to write copies block 1 to 3, the last writes in place."""
    pool = pool_with_queue(7, 1, 3)
    pool.allocate("A1", FOUR_SCORE)
    free = pool.num_free
    pool.fork("A1", "A2")
    assert pool.num_free == free
    assert [pool.ref_counts[page] for page in (7, 1)] == [2, 2]
    assert pool.append("A1", 100) == [(1, 3)]  # "fathers"
    assert [pool.ref_counts[page] for page in (7, 1, 3)] == [2, 1, 1]
    assert pool.append("A2", 200) == []  # "mothers"
    assert (pool.table("A1"), pool.table("A2")) == ([7, 3], [7, 1])
    pool.check()


def test_prefix_caching_of_the_vllm_guide():
    """The example of vLLM's design document, "Automatic prefix caching": 10 blocks of 4 tokens."""
    pool = BlockPool(10, 4)
    first = list(range(15))
    assert pool.allocate(0, first) == 0  # time 1
    assert pool.table(0) == [0, 1, 2, 3]
    pool.append(0, 15)
    pool.append(0, 16)
    assert pool.table(0) == [0, 1, 2, 3, 4]  # time 3
    assert pool.allocate(1, [*first[:10], 50, 51, 52, 53]) == 8  # time 4: 10 tokens are equal, two whole pages
    assert pool.table(1) == [0, 1, 5, 6]
    pool.free(0)
    assert pool.free_queue == [7, 8, 9, 4, 3, 2]  # time 5
    pool.free(1)
    assert pool.free_queue == [7, 8, 9, 4, 3, 2, 6, 5, 1, 0]  # time 6
    assert pool.num_free == 10
    assert pool.allocate(2, [*first[:12], *range(60, 77)]) == 12  # time 7
    assert pool.table(2) == [0, 1, 2, 7, 8, 9, 4, 3]
    assert pool.free_queue == [6, 5]
    assert pool.cached_pages == {0, 1, 2, 5, 7, 8, 9, 4}  # page 3 lost what it held, and 29 tokens leave it half full
    pool.check()


def test_a_page_with_the_same_tokens_stays_private():
    """The same guide, "Duplicated blocks": a table never changes, even if another page turns out to hold the same."""
    pool = BlockPool(10, 4)
    tables = []
    for seq_id in "ab":
        pool.allocate(seq_id, list(b"ABCDEF"))
        for token in b"GH" if seq_id == "b" else b"GHI":
            pool.append(seq_id, token)
        tables.append(pool.table(seq_id))
    assert tables == [[0, 1, 2], [0, 3]]
    assert pool.cached_pages == {0, 1}
    pool.check()


def test_a_prompt_that_is_cached_whole_recomputes_its_last_page():
    pool = BlockPool(8, 4)
    pool.allocate("a", range(8))
    assert pool.allocate("b", range(8)) == 4  # not 8: the last token's output is needed
    assert pool.allocate("c", range(9)) == 8
    assert pool.allocate("d", []) == 0
    assert pool.table("d") == []
    pool.append("d", 0)
    assert pool.num_tokens("d") == len(pool.table("d")) == 1


def test_a_hash_covers_the_whole_beginning():
    """The second page holds the same four tokens in all of these, but after another first page."""
    pool = BlockPool(20, 4)
    pool.allocate("a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert pool.allocate("b", [0, 2, 3, 4, 5, 6, 7, 8, 9]) == 0
    assert pool.allocate("c", [5, 6, 7, 8, 5, 6, 7, 8, 9]) == 0
    assert pool.allocate("d", [1, 2, 3, 4, 5, 6, 7, 8, 0]) == 8


def test_pages_are_found_only_once_they_are_published():
    """A prompt computed in chunks: its later pages hold nothing yet."""
    pool = BlockPool(20, 4)
    pool.allocate("a", range(12), publish=False)
    assert pool.allocate("b", range(12), publish=False) == 0
    pool.publish("a", 7)
    assert pool.allocate("c", range(12), publish=False) == 4
    pool.append("a", 99)  # there is no next token before the whole prompt is computed
    assert pool.allocate("d", range(13), publish=False) == 12
    pool.publish("b", 12)
    pool.check()


def test_what_is_forgotten_is_not_found():
    """Who holds the pages goes on; a prompt that comes later is computed, and found in its turn."""
    pool = BlockPool(12, 4)
    pool.allocate("a", range(9))
    pool.forget_prefixes()
    assert pool.cached_pages == set()
    pool.check()
    assert pool.allocate("b", range(9)) == 0
    for token in range(9, 13):
        pool.append("a", token)  # a third page is full, after two that nobody finds
    pool.free("a")
    pool.check()
    assert pool.allocate("c", range(13)) == 12


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(8, 4, prefix_caching=False)
    pool.allocate("a", range(8))
    assert pool.allocate("b", range(12)) == 0
    assert pool.cached_pages == set()
    pool.check()


def test_watermark_holds_pages_back_from_prompts_only():
    pool = BlockPool(10, 1, watermark=0.25)
    with pytest.raises(OutOfPages, match="of which 2 are kept"):
        pool.allocate("a", range(9))
    pool.allocate("a", range(8))
    pool.append("a", 8)
    pool.append("a", 9)
    assert pool.num_free == 0


def state(pool):
    tables = {seq_id: (pool.table(seq_id), pool.num_tokens(seq_id)) for seq_id in pool.seq_ids}
    return tables, pool.free_queue, pool.ref_counts, pool.cached_pages


MISUSE = {
    "unknown: append": ("seq_id", lambda pool: pool.append("x", 1)),
    "unknown: fork": ("parent_id", lambda pool: pool.fork("x", "y")),
    "unknown: free": ("seq_id", lambda pool: pool.free("x")),
    "unknown: table": ("seq_id", lambda pool: pool.table("x")),
    "unknown: publish": ("seq_id", lambda pool: pool.publish("x", 1)),
    "freed twice": ("seq_id", lambda pool: pool.free("gone")),
    "repeated: allocate": ("seq_id", lambda pool: pool.allocate("a", [1])),
    "repeated: fork": ("child_id", lambda pool: pool.fork("a", "b")),
    "fork onto itself": ("child_id", lambda pool: pool.fork("a", "a")),
    "tokens: text": ("token_ids", lambda pool: pool.allocate("c", "abc")),
    "tokens: one number": ("token_ids", lambda pool: pool.allocate("c", 7)),
    "tokens: a float among them": ("token_ids", lambda pool: pool.allocate("c", [1, 2.5])),
    "token: None": ("token_id", lambda pool: pool.append("a", None)),
    "token: too large": ("token_id", lambda pool: pool.append("a", 2**63)),
    "publish: too many": ("num_tokens", lambda pool: pool.publish("a", 7)),
    "publish: negative": ("num_tokens", lambda pool: pool.publish("a", -1)),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_named_and_changes_nothing(case):
    pool = BlockPool(4, 4)
    pool.allocate("a", range(6))
    pool.fork("a", "b")
    pool.allocate("gone", [9])
    pool.free("gone")
    before, (name, misuse) = state(pool), MISUSE[case]
    with pytest.raises(ValueError, match=f"^{name}: got .* expected "):
        misuse(pool)
    assert state(pool) == before
    pool.check()


def test_out_of_pages_changes_nothing():
    pool = BlockPool(4, 4)
    pool.allocate("old", range(100, 108))
    pool.free("old")  # two cached pages in the queue: a hit takes them out of it
    pool.allocate("a", range(6))
    pool.fork("a", "b")
    before = state(pool)
    for tokens in (range(10, 19), [*range(100, 108), 1, 2, 3, 4, 5], [*range(4), *range(4, 17)]):
        with pytest.raises(OutOfPages, match=r"allocate\('c'\): needs \d free pages, there are 2"):
            pool.allocate("c", tokens)
        assert state(pool) == before
    pool.allocate("c", range(50, 58))
    before = state(pool)
    with pytest.raises(OutOfPages, match="append"):
        pool.append("a", 1)  # needs a copy
    with pytest.raises(OutOfPages, match="append"):
        pool.append("c", 1)  # needs a new page
    assert state(pool) == before
    pool.free("b")
    assert pool.append("a", 1) == []  # the last holder needs neither
    pool.check()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("num_pages", (0, 4)), ("num_pages", (2.0, 4)), ("page_size", (4, 0)), ("page_size", (4, "16"))],
)
def test_a_pool_needs_pages(name, arguments):
    with pytest.raises(ValueError, match=f"^{name}: got .* expected "):
        BlockPool(*arguments)
    with pytest.raises(ValueError, match=r"^watermark: got .* expected "):
        BlockPool(4, 4, watermark=1.0)


BREAK = {
    "a reference lost": lambda pool: pool._refs.__setitem__(0, 1),
    "a page lost": lambda pool: pool._free.pop(3),
    "a page held and free": lambda pool: pool._free.__setitem__(0, None),
    "a page too many": lambda pool: pool._sequences["a"].table.append(3),
    "a page twice": lambda pool: pool._sequences["a"].table.__setitem__(1, 0),
    "a page that is not there": lambda pool: pool._free.__setitem__(9, None),
    "other tokens on a shared page": lambda pool: pool._sequences["b"].tokens.__setitem__(5, 9),
    "a stale hash": lambda pool: pool._sequences["a"].tokens.__setitem__(0, 9),
    "a hash for another page": lambda pool: pool._page_of.__setitem__(pool._hash_of[0], 2),
    "a hash without a page": lambda pool: pool._page_of.__setitem__(b"", 2),
}


@pytest.mark.parametrize("case", BREAK)
def test_check_finds_what_is_broken(case):
    pool = BlockPool(4, 4)
    pool.allocate("a", range(6))
    pool.fork("a", "b")
    pool.check()
    BREAK[case](pool)
    with pytest.raises(RuntimeError, match="BlockPool is broken: "):
        pool.check()


# ---- the kernels

GARBAGE = (-1, 2**31 - 1, -(2**31))


def paged_inputs(case: DecodeCase, page_size: int, device, seed=1):
    """The case's keys and values in pages of a larger pool, in random order; all other slots are NaN, and what stands
    in the table beyond kv_len is garbage. `strided` also leaves gaps between pages, heads and table entries."""
    q, k, v, kv_lens = case.tensors(device)
    rng = np.random.default_rng(seed)
    order = rng.permutation(sum(-(-n // page_size) for n in case.kv_lens) + 3)
    k_pages, v_pages, used = ref.to_pages(k, v, kv_lens, page_size, order)
    block_table = torch.tensor(
        rng.choice(GARBAGE, (used.shape[0], used.shape[1] + 2)), dtype=torch.int32, device=device
    )
    block_table[:, : used.shape[1]] = torch.where(used < 0, block_table[:, : used.shape[1]], used)
    if case.strided:
        num_pages, _, num_kv_heads, dim = k_pages.shape
        wide = [torch.full((num_pages, num_kv_heads, page_size + 1, 2 * dim), float("nan")).to(k) for _ in "kv"]
        wide = [x[:, :, :page_size, ::2].transpose(1, 2) for x in wide]
        k_pages, v_pages = wide[0].copy_(k_pages), wide[1].copy_(v_pages)
        block_table = torch.stack([block_table, torch.full_like(block_table, -5)], 2).flatten(1)[:, ::2]
    return q, k_pages, v_pages, block_table, kv_lens


# Every decode case with another page size: powers of two and others, below, equal to and above the tile of 32 or 64.
SIZES = (16, 1, 64, 256, 3, 32, 128, 100, 8, 2, 192)
PAGED_CASES = [(case, SIZES[i % len(SIZES)]) for i, case in enumerate(DECODE_CASES)]
PAGED_CASES += [
    (DecodeCase("a tile is one page", (129, 64), dtype=F16, num_splits=2), 64),
    (DecodeCase("a tile is part of a page", (300, 1), dtype=BF16, num_splits=2), 256),
    (DecodeCase("a page is a tile and a half", (190,), 2, 1, dtype=F16, num_splits=1), 96),
    (DecodeCase("a tile spans four pages", (129, 70), dtype=BF16, num_splits=1), 16),
    (DecodeCase("strided, small pages", (70, 3), dtype=F16, strided=True, num_splits=2), 5),
    (DecodeCase("fp32, group 64, wide heads", (33,), 128, 2, head_dim=80, dtype=F32, num_splits=2), 16),
    (DecodeCase("strided, large pages", (130, 128), dtype=F32, strided=True, num_splits=2), 32),
]


@pytest.mark.parametrize(("case", "page_size"), PAGED_CASES, ids=lambda x: getattr(x, "name", x))
def test_kernel(case, page_size, device, monkeypatch):
    inputs = paged_inputs(case, page_size, device)
    nan_in_fresh_memory(monkeypatch)
    got = paged.paged_decoding(*inputs, num_splits=case.num_splits, sm_scale=case.sm_scale)
    assert_matches(got, ref.paged_decoding, *inputs, sm_scale=case.sm_scale)


@pytest.mark.parametrize("name, dim", [("k_pages", 1), ("v_pages", 3), ("block_table", 1), ("q", 2)])
def test_offsets_of_64_bits(name, dim, device):
    """Tokens of a page that lie far apart, a large stride inside the head, and a table of more than 2^31 entries."""
    inputs = paged_inputs(DecodeCase("", (70, 70), dtype=F16), 16, device)
    names = ("q", "k_pages", "v_pages", "block_table", "kv_lens")
    spread = [far_apart(x, dim) if n == name else x for n, x in zip(names, inputs)]
    assert_matches(paged.paged_decoding(*spread, num_splits=2), ref.paged_decoding, *inputs)


PIECES = DecodeCase("", (500, 128, 129, 0, 1, 700), dtype=BF16)


def test_pieces_have_a_least_length(device, four_pieces, monkeypatch):
    inputs = paged_inputs(PIECES, 16, device)
    nan_in_fresh_memory(monkeypatch)
    assert_matches(paged.paged_decoding(*inputs), ref.paged_decoding, *inputs)


@pytest.mark.skipif(not kernels.INTERPRETED, reason="watched in the interpreter of this process")
def test_only_long_sequences_are_cut_further(four_pieces):
    """Which pieces have work, by the keys that programs walked: 64 a turn."""
    names = ("q", "k_pages", "v_pages", "block_table", "kv_lens")
    arguments = dict(zip(names, paged_inputs(PIECES, 16, "cpu")))
    _, walk = trace.watch("kernels.paged_attention", "attend_tile", "paged_decoding", arguments)
    turns = Counter(step.program[::2] for step in walk if step.program[1] == 0)  # (piece, sequence), of a KV head
    found = [[turns[piece, sequence] for piece in range(4)] for sequence in range(6)]
    second = {1: [2, 0, 0, 0], 2: [1, 1, 0, 0]}[four_pieces]
    assert found == [[2, 2, 2, 2], second, [2, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [3, 3, 3, 2]]


def test_what_empty_pieces_cost(four_pieces, device, monkeypatch):
    """They leave o as it was, and the merge does not look at it: NaN there stays NaN, and does no harm."""
    kept, empty = [], torch.empty

    def watched(*shape, **options):
        kept.append(empty(*shape, **options).fill_(float("nan")))
        return kept[-1]

    monkeypatch.setattr(torch, "empty", watched)
    inputs = paged_inputs(PIECES, 16, device)
    got = paged.paged_decoding(*inputs)
    monkeypatch.undo()
    assert_matches(got, ref.paged_decoding, *inputs)
    (part_o,) = (x for x in kept if x.shape == (6, 4, 4, 64))
    (part_lse,) = (x for x in kept if x.shape == (6, 4, 4))
    assert part_o[:, :, 1:].isnan().all(-1).equal(part_lse[:, :, 1:] == float("-inf"))
    assert not part_o[:, :, 0].isnan().any()


def test_pieces_that_are_offered():
    """By the longest sequence that the table holds; never fewer than each is cut into; all of them in the L2 cache."""
    found = {kv_len: splits.offered(1, kv_len, 2**20) for kv_len in (0, 1, 4096, 4097, 16384, 10**6)}
    assert found == {0: 1, 1: 1, 4096: 1, 4097: 2, 16384: 4, 10**6: 8}
    assert [splits.offered(even, 16384, 2**20) for even in (1, 3, 4, 5, 29)] == [4, 4, 4, 5, 29]
    assert [splits.offered(2, 10**6, 2**20 * mb) for mb in (4, 5, 8, 9, 16, 17, 33)] == [8, 6, 4, 3, 2, 2, 2]
    assert splits.offered(1, 100, 0) == 1


@pytest.mark.parametrize("page_size", [16, 64])
def test_kernel_without_reading_ahead(page_size, device):
    inputs = paged_inputs(DecodeCase("", (129, 0), 2, 1, dtype=F16), page_size, device)
    got = paged.paged_decoding(*inputs, num_splits=1, read_ahead=False)
    assert_matches(got, ref.paged_decoding, *inputs)


@pytest.mark.parametrize(("case", "page_size"), PAGED_CASES, ids=lambda x: getattr(x, "name", x))
def test_reference_equals_contiguous_attention(case, page_size):
    """Pages in the table's order are the contiguous cache: the same numbers, bit for bit up to the sum's order."""
    got = ref.paged_decoding(*paged_inputs(case, page_size, "cpu"), sm_scale=case.sm_scale)
    assert_matches(got, decode_attention, *case.tensors(), sm_scale=case.sm_scale)


@pytest.mark.parametrize("page_size", [16, 64])
def test_pages_that_do_not_exist_are_absent(page_size, device, monkeypatch):
    """As on a GPU, where values are not looked at: kernel and reference leave their tokens out, and clamp kv_lens."""
    case = DecodeCase("", (150, 64, 129), dtype=F32)
    q, k_pages, v_pages, block_table, kv_lens = paged_inputs(case, page_size, device)
    _, k, v, _ = case.tensors(device)
    block_table[0, 1], block_table[1, :2] = 10**6, -3
    block_table[2, -2:] = block_table[2, 0]
    monkeypatch.setattr(args, "checks_values", lambda x: False)
    kv_lens[1] = page_size  # its only page is missing
    inputs = (q, k_pages, v_pages, block_table, kv_lens)
    got = paged.paged_decoding(*inputs, num_splits=2)
    assert_matches(got, ref.paged_decoding, *inputs)
    k, v = (torch.cat([x[:1, :page_size], x[:1, 2 * page_size : 150]], 1) for x in (k, v))
    rest = torch.tensor([150 - page_size], dtype=torch.int32, device=device)
    assert_matches([x[:1] for x in got], decode_attention, q[:1], k, v, rest)
    assert (got[0][1] == 0).all()
    assert (got[1][1] == float("-inf")).all()
    low = torch.tensor([-5, 0, 0], dtype=torch.int32, device=device)
    assert (paged.paged_decoding(q, k_pages, v_pages, block_table, low)[0] == 0).all()


def test_kv_lens_are_clamped_to_the_table(device, monkeypatch):
    monkeypatch.setattr(args, "checks_values", lambda x: False)
    q, k_pages, v_pages, _, kv_lens = paged_inputs(DecodeCase("", (64, 32)), 16, device)
    table = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32, device=device)
    k_pages, v_pages = k_pages.nan_to_num(0.5), v_pages.nan_to_num(0.5)
    got = paged.paged_decoding(q, k_pages, v_pages, table[:2], kv_lens + 1000, num_splits=2)
    assert_matches(got, ref.paged_decoding, q, k_pages, v_pages, table[:2], torch.full_like(kv_lens, 32))
    assert_matches(got, ref.paged_decoding, q, k_pages, v_pages, table[:2], kv_lens + 1000)


@pytest.mark.parametrize("num_kv_heads", [1, 12, 40])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_write_kv(dtype, num_kv_heads, device):
    rng = np.random.default_rng(num_kv_heads)
    num_pages, page_size, dim = 5, 3, 80
    k, v = (randn(rng, 6, num_kv_heads, 2 * dim, dtype=dtype, device=device)[..., ::2] for _ in "kv")
    slots = torch.tensor([14, -1, 3, 0, 7, -(10**10)], device=device)
    shape = (num_pages, num_kv_heads, page_size, dim)
    k_pages, v_pages = (randn(rng, *shape, dtype=dtype, device=device).transpose(1, 2) for _ in "kv")
    want = [k_pages.clone(), v_pages.clone()]
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want[0][slot // page_size, slot % page_size] = k[i]
            want[1][slot // page_size, slot % page_size] = v[i]
    for write_kv in (ref.write_kv, paged.write_kv):
        pages = [k_pages.clone(memory_format=torch.preserve_format), v_pages.clone()]
        assert write_kv(k, v, *pages, slots) is None
        assert all(map(torch.equal, pages, want))


def test_write_kv_beyond_the_last_page(device, monkeypatch):
    """Skipped where values are not looked at; nothing to write is no error."""
    monkeypatch.setattr(args, "checks_values", lambda x: False)
    for write_kv in (ref.write_kv, paged.write_kv):
        k_pages, v_pages = torch.zeros(2, 4, 3, 2, 64, device=device)  # slot 6 would be the next page's first
        k, slots = torch.ones(2, 2, 64, device=device), torch.tensor([6, 2**40], device=device)
        write_kv(k, k, k_pages[:2], v_pages[:2], slots)
        write_kv(k[:0], k[:0], k_pages, v_pages, slots[:0])
        assert k_pages.abs().sum() == v_pages.abs().sum() == 0


def test_a_decode_loop_over_a_pool(device):
    """Pool, write_kv, page copies and paged_decoding together, with a fork: the same as contiguous caches."""
    rng, page_size = np.random.default_rng(5), 4
    pool, pages = (
        BlockPool(12, page_size),
        [torch.full((12, page_size, 2, 64), float("nan"), device=device) for _ in "kv"],
    )
    caches = {}

    def store(seq_id, start):
        slots = torch.tensor(pool.slots(seq_id, start), device=device)
        paged.write_kv(caches[seq_id][0][start:], caches[seq_id][1][start:], *pages, slots)

    caches["a"] = [randn(rng, 6, 2, 64, device=device) for _ in "kv"]
    pool.allocate("a", range(6))
    store("a", 0)
    pool.fork("a", "b")
    caches["b"] = list(caches["a"])
    for step in range(5):
        for seq_id in "ab":
            for src, dst in pool.append(seq_id, step):
                assert step == 0
                for x in pages:
                    x[dst] = x[src]
            caches[seq_id] = [torch.cat([x, randn(rng, 1, 2, 64, device=device)]) for x in caches[seq_id]]
            store(seq_id, len(caches[seq_id][0]) - 1)
    kv_lens = torch.tensor([11, 11], dtype=torch.int32, device=device)
    k, v = (torch.stack([caches[seq_id][i] for seq_id in "ab"]) for i in (0, 1))
    q = randn(rng, 2, 4, 64, device=device)
    got = paged.paged_decoding(q, *pages, ref.pad_tables([pool.table("a"), pool.table("b")], device), kv_lens)
    assert_matches(got, decode_attention, q, k, v, kv_lens)


def test_page_walk_is_attention():
    q, k_pages, v_pages, block_table, kv_lens = paged_inputs(DecodeCase("", (30,), 1, 1), 4, "cpu")
    steps = list(ref.page_walk(q[0, 0], k_pages[:, :, 0], v_pages[:, :, 0], block_table[0].tolist(), 30))
    assert [step[:2] for step in steps] == [(page, 4) for page in block_table[0, :7].tolist()] + [
        (block_table[0, 7], 2)
    ]
    *_, (_, _, _, m, l, acc) = steps
    o, lse = ref.paged_decoding(q, k_pages, v_pages, block_table, kv_lens)
    torch.testing.assert_close(acc / l, o[0, 0])
    torch.testing.assert_close(m + l.log(), lse[0, 0])


TABLE = torch.tensor([[4, 0], [2, -1]], dtype=torch.int32)
GOOD = dict(
    q=(2, 4, 64), k_pages=(5, 16, 2, 64), v_pages=(5, 16, 2, 64), block_table=TABLE,
    kv_lens=torch.tensor([17, 16], dtype=torch.int32),
)  # fmt: skip
BAD = {
    "q: two dimensions": ("q", dict(q=(4, 64))),
    "q: integers": ("q", dict(q=torch.zeros(2, 4, 64, dtype=torch.int32))),
    "heads do not divide": ("q", dict(q=(2, 5, 64))),
    "head_dim too large": ("q", dict(q=(2, 4, 257), k_pages=(5, 16, 2, 257), v_pages=(5, 16, 2, 257))),
    "k_pages: other head_dim": ("k_pages", dict(k_pages=(5, 16, 2, 32))),
    "k_pages: three dimensions": ("k_pages", dict(k_pages=(5, 16, 64))),
    "k_pages: other dtype": ("k_pages", dict(k_pages=torch.zeros(5, 16, 2, 64, dtype=F16))),
    "k_pages: other device": ("k_pages", dict(k_pages=torch.zeros(5, 16, 2, 64, device="meta"))),
    "k_pages: pages of nothing": ("k_pages", dict(k_pages=(5, 0, 2, 64), v_pages=(5, 0, 2, 64))),
    "v_pages: other page size": ("v_pages", dict(v_pages=(5, 8, 2, 64))),
    "block_table: int64": ("block_table", dict(block_table=TABLE.long())),
    "block_table: other batch": ("block_table", dict(block_table=TABLE[:1])),
    "block_table: a page too high": ("block_table", dict(block_table=TABLE + 1)),
    "block_table: a page is missing": ("block_table", dict(block_table=-TABLE)),
    "kv_lens: int64": ("kv_lens", dict(kv_lens=torch.tensor([17, 16]))),
    "kv_lens: longer than the table": ("kv_lens", dict(kv_lens=torch.tensor([17, 33], dtype=torch.int32))),
    "kv_lens: negative": ("kv_lens", dict(kv_lens=torch.tensor([-1, 16], dtype=torch.int32))),
    "num_splits: zero": ("num_splits", dict(num_splits=0)),
}
GOOD_WRITE = dict(
    k=(3, 2, 64), v=(3, 2, 64), k_pages=(5, 16, 2, 64), v_pages=(5, 16, 2, 64), slots=torch.tensor([79, -1, 0])
)
BAD_WRITE = {
    "k: two dimensions": ("k", dict(k=(3, 64))),
    "k: integers": ("k", dict(k=torch.zeros(3, 2, 64, dtype=torch.int32))),
    "v: other heads": ("v", dict(v=(3, 1, 64))),
    "k_pages: other heads": ("k_pages", dict(k_pages=(5, 16, 1, 64), v_pages=(5, 16, 1, 64))),
    "k_pages: other dtype": ("k_pages", dict(k_pages=torch.zeros(5, 16, 2, 64, dtype=F16))),
    "v_pages: other shape": ("v_pages", dict(v_pages=(4, 16, 2, 64))),
    "slots: int32": ("slots", dict(slots=torch.tensor([1, 2, 3], dtype=torch.int32))),
    "slots: other length": ("slots", dict(slots=torch.tensor([1, 2]))),
    "slots: beyond the last page": ("slots", dict(slots=torch.tensor([80, 1, 2]))),
}
CALLS = [("paged_decoding", case, GOOD, *BAD[case]) for case in BAD]
CALLS += [("write_kv", case, GOOD_WRITE, *BAD_WRITE[case]) for case in BAD_WRITE]


@pytest.mark.parametrize("module", [paged, ref], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("function", "case", "good", "name", "changed"), CALLS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_input_is_named(function, case, good, name, changed, module, device, monkeypatch):
    monkeypatch.setenv("LAB_CHECK", "1")  # look at values also where they live on a GPU
    given = {n: torch.zeros(x) if isinstance(x, tuple) else x for n, x in (good | changed).items()}
    given = {n: x.to(device) if getattr(x, "device", None) == torch.device("cpu") else x for n, x in given.items()}
    with pytest.raises(ValueError, match=f"^{name}\\b.*got .* expected "):
        getattr(module, function)(**given)


def test_to_pages_needs_enough_pages():
    _, k, v, kv_lens = DecodeCase("", (40, 3)).tensors()
    with pytest.raises(ValueError, match=r"^order: got 3 pages, expected at least 4"):
        ref.to_pages(k, v, kv_lens, 16, range(3))


# ---- the waste study


@pytest.mark.parametrize("num_slots", [15_700, 1, 64, 100])
def test_buddy_against_a_dictionary(num_slots):
    rng, buddy, taken = random.Random(num_slots), kv_memory.Buddy(num_slots), {}
    whole = {size: sorted(offsets) for size, offsets in buddy.free_pieces.items()}
    for _ in range(3000):
        if taken and rng.random() < 0.5:
            offset = rng.choice(list(taken))
            buddy.free(offset)
            del taken[offset]
        else:
            size = rng.randrange(1, max(2, num_slots // 4))
            offset, rounded = buddy.allocate(size), 1 << (size - 1).bit_length()
            if offset is None:
                assert not any(free for piece, free in buddy.free_pieces.items() if piece >= rounded)
            else:
                assert buddy.taken[offset] == rounded
                assert offset % rounded == 0
                taken[offset] = rounded
        pieces = [(o, s) for s, offsets in buddy.free_pieces.items() for o in offsets] + list(taken.items())
        pieces.sort()
        assert [o for o, _ in pieces] == [
            sum(s for _, s in pieces[:i]) for i in range(len(pieces))
        ]  # no gap, no overlap
        assert sum(s for _, s in pieces) == num_slots
    for offset in taken:
        buddy.free(offset)
    assert {size: sorted(offsets) for size, offsets in buddy.free_pieces.items() if offsets} == whole  # halves rejoined
    with pytest.raises(ValueError, match=r"^offset: got .* expected one that was allocated"):
        buddy.free(0)


def test_max_has_room_for_seven():
    """Figure 13: 7.00 requests, whatever their length, since seven pieces of 2048 fit into 15.7K slots."""
    shares, batch = kv_memory.waste("max", steps=200, warmup=0)
    assert batch == 7
    assert shares["external"] == pytest.approx(100 * (15_700 - 7 * 2048) / 15_700)


def test_memory_of_one_request_by_hand():
    """5 prompt tokens and 6 of 11 output tokens stored."""
    want = {
        "max": (11, 5, 2048 - 16, 0), "pow2": (11, 5, 21 - 16, 0), "oracle": (11, 5, 0, 0), "paged": (11, 1, 0, 0)
    }  # fmt: skip
    for policy, (stored, later, never, _) in want.items():
        memory, request = kv_memory.memory(policy, 4096, page_size=4), kv_memory.Request(0, 5, 11, 5)
        assert memory.admit(request)
        for _ in range(6):
            assert memory.grow(request)
            request.stored += 1
        counts = kv_memory.count_slots(memory, [request])
        assert (counts["token state"], counts["reservation"], counts["internal"]) == (stored, later, never)
        assert sum(counts.values()) == 4096
        memory.leave(request)
        assert kv_memory.count_slots(memory, []) == {
            "external": 4096,
            "token state": 0,
            "reservation": 0,
            "internal": 0,
        }


@pytest.mark.parametrize("policy", kv_memory.POLICIES)
def test_memory_runs(policy):
    """A small memory that overflows all the time: every request gets all its tokens, and no slot is used twice."""
    memory = kv_memory.memory(policy, 300, page_size=8, max_len=64)
    queue = kv_memory.requests((9, 20), seed=3, max_len=64)
    seen, preempted, before = {}, 0, []
    for running in islice(kv_memory.run(memory, queue), 400):
        ids = [request.id for request in running]
        assert ids == sorted(ids)  # first come, first served
        used = sorted((a, b) for request in running for a, b, _ in memory.slots(request) if a < b)
        assert all(b <= c for (_, b), (c, _) in pairwise(used))
        assert not used or used[-1][1] <= 300
        for request in running:
            assert request.stored == seen.get(request.id, request.prompt_len) + 1
            seen[request.id] = request.stored
        preempted += any(request not in running and request.stored < request.total for request in before)
        before = list(running)
        if policy == "paged":
            memory.pool.check()
    assert max(seen) > 50
    assert (preempted > 0) == (policy == "paged")


def test_waste_is_the_papers():
    """Figure 2 in shape: each guess wastes less than the one before, and pages next to nothing."""
    tokens = [kv_memory.waste(policy, steps=1500)[0]["token state"] for policy in kv_memory.POLICIES]
    assert tokens == sorted(tokens)
    assert tokens[0] < 30 < tokens[2] < 60 < 95 < tokens[3]


def test_a_request_that_can_never_run_is_named():
    with pytest.raises(ValueError, match=r"^queue: request .* does not fit"):
        next(kv_memory.run(kv_memory.memory("max", 100, max_len=200), kv_memory.requests((9, 20))))
    with pytest.raises(ValueError, match=r"^policy: got best"):
        kv_memory.memory("best")


def test_parallel_sampling_shares_the_prompt():
    """Prompt of 2 1/2 pages, three samples of 6 tokens: the two full pages are stored once."""
    pool, rng = BlockPool(30, 4), np.random.default_rng(0)
    used = [30 - pool.num_free for _ in kv_memory.parallel_sampling(pool, 10, 6, 3, rng)]
    assert used == [2 + 3, 2 + 3, 2 + 6, 2 + 6, 2 + 6, 2 + 6]
    pool.check()


def test_beam_search_keeps_the_best_and_frees_the_rest():
    pool, rng = BlockPool(60, 4), np.random.default_rng(0)
    for step, _ in enumerate(kv_memory.beam_search(pool, 9, 30, 3, rng)):
        assert len(pool.seq_ids) == 3
        assert {pool.num_tokens(seq_id) for seq_id in pool.seq_ids} == {10 + step}
        pool.check()
    shared = [page for page, refs in enumerate(pool.ref_counts) if refs == 3]
    assert len(shared) > 2  # more than the prompt: the beams of today have common ancestors


def test_sharing_is_a_share():
    """One sequence shares nothing; with more there is more to share."""
    assert kv_memory.sharing("parallel", "Alpaca", 1, count=3) == 0
    saved = [kv_memory.sharing(kind, "Alpaca", width, count=5) for kind in ("parallel", "beam") for width in (2, 4)]
    assert 0 < saved[0] < saved[1] < saved[2] < saved[3] < 75
    with pytest.raises(ValueError, match=r"^kind: got tree"):
        kv_memory.sharing("tree", "Alpaca", 2)


def test_players_show_what_ran():
    html = kv_memory.memory_player(steps=2)._repr_html_()
    assert "paged, step 4" in html
    assert "reservation" in html
    text = kv_memory.try_pages(16, 1.0)
    assert text.startswith("pages of 16, sigma 1.0: ")
    assert "token state 9" in text


def test_pool_players_words_lie_where_its_tables_say(monkeypatch):
    """Frame by frame: what a sequence reads through its table, who holds a page, and what was just written."""
    monkeypatch.setattr(ref.player, "Stepper", lambda title, panels, steps, **kwargs: steps)
    prompt = "Four score and seven years ago our fathers".split()
    a, b, c = [*prompt, "brought", "forth"], [*prompt, "brought", "into"], [*prompt, "brought"]
    frames = [  # how many words of A, B and C, which are new; C's first four are found
        (7, 0, 0, prompt[:7]), (8, 0, 0, ["fathers"]), (9, 0, 0, ["brought"]), (9, 9, 0, []), (10, 9, 0, ["forth"]),
        (10, 10, 0, ["into"]), (0, 10, 0, []), (0, 0, 0, []), (0, 0, 8, prompt[4:]), (0, 0, 9, ["brought"]),
    ]  # fmt: skip
    for (*lengths, new), step in zip(frames, ref.pool_player(), strict=True):
        memory, *held = step["memory"], *(step["tables"][name] for name in "ABC")
        tables = [[int(n) for n in re.findall(r"\d+", table)] for table in held]
        for text, length, table in zip((a, b, c), lengths, tables):
            words = [word for page in table for _, word in memory[page]]
            assert words[:length] == text[:length]
            assert len(table) == -(-length // 4)
        assert [word for row in memory for color, word in row if color == "orange"] == new
        holders = Counter(page for table in tables for page in table)
        for page, row in enumerate(memory):
            free = "sky" if page < 2 else "muted"  # the first two are full when their last holder goes
            assert {color for color, _ in row} <= {"orange", (free, "blue", "purple")[holders[page]]}


def test_walk_players_colours(monkeypatch):
    monkeypatch.setattr(ref.player, "Stepper", lambda title, panels, steps, **kwargs: steps)
    inputs = ref.traced_problem()
    (o, _), walk = trace.watch("kernels.paged_attention", "attend_tile", "paged_decoding", inputs | {"num_splits": 2})
    read, table = set(), inputs["block_table"][0].tolist()
    mine = {page * 16 + i for place, page in enumerate(table) for i in range(min(16, 90 - 16 * place))}
    *steps, last = ref.walk_player(inputs, o, walk)
    for step in [*steps, last]:
        colors = dict(enumerate(color for row in step["pages"] for color in row))
        now = {slot for slot, color in colors.items() if color == "orange"}
        assert {page for color, page in step["table"]["page"] if color} == {str(slot // 16) for slot in now}
        assert not now & read
        assert {slot for slot, color in colors.items() if color == "blue"} == read
        assert {slot for slot, color in colors.items() if color == "sky"} == mine - read - now
        assert f"reads {len(now)} keys" in step["text"] or step is last
        read |= now
    assert read == mine


def test_walk_player_shows_the_kernels_run():
    inputs = ref.traced_problem()
    (o, _), walk = trace.watch("kernels.paged_attention", "attend_tile", "paged_decoding", inputs | {"num_splits": 2})
    html = ref.walk_player(inputs, o, walk)._repr_html_()
    pages = inputs["block_table"][0].tolist()
    assert f"Program 0 reads 32 keys, which lie in pages {pages[0]} and {pages[1]}." in html
    assert f"page {pages[-1]}: keys 80–89" in html
    assert "6 of the tile's 32 rows" in html.replace("&#x27;", "'")
    shown = float(re.search(r"o\[1\] is (-?[\d.]+):", html)[1])
    assert shown == pytest.approx(float(ref.paged_decoding(**inputs)[0][0, 0, 1]), abs=1e-4)
    assert "4 tokens are cached" in ref.pool_player()._repr_html_()


# fmt: off
PLANTED_BUGS = [
    ("kernels/paged_attention.py", "num_splits) * BLOCK_N, PIECE)", "num_splits) * BLOCK_N, 0)"),
    ("kernels/paged_attention.py", "tl.cdiv(tiles, even) * BLOCK_N, tl.max", "tiles * BLOCK_N, tl.max"),
    ("kernels/paged_attention.py", "(pid_s == 0) | (start < end)", "True"),
    ("kernels/paged_attention.py", "(pid_s == 0) | (start < end)", "start < end"),
    ("labkit/splits.py", "return max(even, pieces)", "return pieces"),
    ("labkit/splits.py", "math.ceil(max_kv_len / PIECE)", "max_kv_len // PIECE"),
    ("labkit/splits.py", "SCRATCH // max(1, piece_bytes)", "SCRATCH"),
    ("labkit/block_pool.py", "shared = not full and self._refs[sequence.table[-1]] > 1", "shared = False"),
    ("labkit/block_pool.py", "shared = not full and self._refs[sequence.table[-1]] > 1", "shared = not full"),
    ("labkit/block_pool.py", "            self._refs[src] -= 1\n", ""),
    ("labkit/block_pool.py", "leaving = missing + sum(self._refs[page] == 0 for page in hits)", "leaving = missing"),
    ("labkit/block_pool.py", "if (full or shared) and not self._free:", "if full and not self._free:"),
    ("labkit/block_pool.py", "tokens[:-1]", "tokens"),
    ("labkit/block_pool.py", "for page in reversed(sequence.table):", "for page in sequence.table:"),
    ("labkit/block_pool.py", "self._page_of.pop(self._hash_of.pop(page, None), None)", "pass"),
    ("labkit/block_pool.py", "hashlib.sha256(last + tokens[start", "hashlib.sha256(tokens[start"),
    ("labkit/block_pool.py", "            if digest not in self._page_of:  # a second", "            if True:  # a second"),
    ("labkit/block_pool.py", "        self._free.pop(page, None)\n", ""),
    ("labkit/block_pool.py", "popitem(last=False)", "popitem(last=True)"),
    ("labkit/block_pool.py", "            if self._refs[page] == 0:\n", "            if self._refs[page] <= 1:\n"),
    ("labkit/block_pool.py", "self.tokens[:], self.table[:],", "self.tokens[:], self.table,"),
    ("labkit/block_pool.py", "self.num_free - self.reserve", "self.num_free"),
    ("labkit/block_pool.py", "        if publish:\n", "        if True:\n"),
    ("labkit/block_pool.py", "pages.append(self._page_of[digest])", "pages.insert(0, self._page_of[digest])"),
    ("labkit/block_pool.py", "        self._hash_of.clear()\n", ""),
    ("labkit/paged_attention.py", '"blue" if refs == 1 else "purple"', '"blue"'),
    ("labkit/paged_attention.py", 'memory.get(src * page_size + i, "") for', '"" for'),
    ("labkit/paged_attention.py", '    pool.free("A")\n', ""),
    ("labkit/paged_attention.py", '"sky" if slot in mine else "muted"', '"sky"'),
    ("labkit/paged_attention.py", '"orange" if page in pages else ""', '"orange"'),
    ("kernels/paged_attention.py", "key < tl.where((page >= 0)", "key < key + tl.where((page >= 0)"),
    ("kernels/paged_attention.py", "(page >= 0) & (page < num_pages)", "page < num_pages"),
    ("kernels/paged_attention.py", "(page >= 0) & (page < num_pages)", "page >= 0"),
    ("kernels/paged_attention.py", "next_page = pages_of_tile(table_ptr, stride_tp, first + BLOCK_N, end", "next_page = pages_of_tile(table_ptr, stride_tp, first, end"),
    ("kernels/paged_attention.py", "    if PAGE_SIZE % BLOCK_N == 0:", "    if PAGE_SIZE >= BLOCK_N:"),
    ("kernels/paged_attention.py", "(key % PAGE_SIZE).to(tl.int64)", "(offs_n % PAGE_SIZE).to(tl.int64)"),
    ("kernels/paged_attention.py", "(key // PAGE_SIZE).to(tl.int64) * stride_tp", "(key // PAGE_SIZE)"),
    ("kernels/paged_attention.py", "table_ptr += pid_b * stride_tb", "table_ptr += 0"),
    ("kernels/paged_attention.py", "pid_h // TILES * stride_vh", "pid_h * stride_vh"),
    ("kernels/paged_attention.py", "page * stride_vp + offset * stride_vn\n", "page * stride_kp + offset * stride_vn + 1\n"),
    ("kernels/paged_attention.py", "row * stride_kn, row * stride_vn", "row * stride_kn, row * stride_vn + 1"),
    ("kernels/paged_attention.py", "x.stride(0) == page_size * x.stride(1)", "True"),
    ("kernels/paged_attention.py", "tl.load(kv_lens_ptr + pid_b), 0), max_kv_len)", "tl.load(kv_lens_ptr + pid_b), 0), max_kv_len + 1000)"),
    ("kernels/paged_attention.py", "mask_n[None, :], m, l, acc, qk_scale, True)", "mask_n[None, :], m, l, acc, qk_scale, False)"),
    ("kernels/paged_attention.py", "mask & (slot >= 0) & (slot < num_slots)", "mask & (slot >= 0)"),
    ("kernels/paged_attention.py", "mask & (slot >= 0) & (slot < num_slots)", "mask & (slot < num_slots)"),
    ("kernels/paged_attention.py", "offs_h = (tl.program_id(1) * BLOCK_H + ", "offs_h = ("),
    ("kernels/paged_attention.py", "tl.store(v_ptrs, v, mask=mask)", "tl.store(v_ptrs, k, mask=mask)"),
    ("labkit/paged_attention.py", "position % page_size)[(page >= 0)", "position)[(page >= 0)"),
    ("labkit/paged_attention.py", "kept = (slots >= 0) &", "kept ="),
    ("labkit/args.py", "block_table[used], 0, num_pages - 1", "block_table[used], 0, num_pages"),
    ("labkit/args.py", "expect(top < num_slots", "expect(top <= num_slots"),
    ("labkit/kv_memory.py", "(num_slots - 1).bit_length()", "num_slots.bit_length()"),
    ("labkit/kv_memory.py", "offset ^ size in", "offset + size in"),
    ("labkit/kv_memory.py", "offset & ~size, 2 * size", "offset, 2 * size"),
    ("labkit/kv_memory.py", "self.buddy.free(self.offsets.pop(request))", "self.offsets.pop(request)"),
    ("labkit/kv_memory.py", "waiting.appendleft(newest)", "waiting.append(newest)"),
    ("labkit/kv_memory.py", "newest = running.pop()", "newest = running.pop(0)"),
    ("labkit/kv_memory.py", "[:width]", "[: width - 1]"),
    ("labkit/kv_memory.py", "            pool.free(beam)", "            pass"),
    ("labkit/kv_memory.py", "held += sum(len(pool.table(seq_id)) for", "held += sum(1 for"),
]
