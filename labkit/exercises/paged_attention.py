"""Exercises of chapter 08. The docstrings are the tasks."""

import hashlib

import torch

from labkit.exercises import device, exercise, expect, kernel_exercise


@exercise(
    hints=[
        "Token i is on the sequence's page number i // page_size. The table says where that page lies.",
        "Inside the page it keeps its place: the offset is i % page_size.",
        "There are kv_len tokens; what stands in the table after their pages is not yours.",
    ],
    bugs=[
        ("table[i // page_size] * page_size", "(i // page_size) * page_size", "the table is not looked up"),
        ("+ i % page_size", "+ i", "the position, not the offset in the page"),
        ("range(kv_len)", "range(len(table) * page_size)", "reads the whole table, past kv_len"),
        ("* page_size + i", "+ i", "a page is taken for a slot"),
    ],
)
def slots_of(table, kv_len, page_size):
    """Where the tokens of a sequence lie.

    table: list of page ids, possibly longer than needed, with garbage at the end. Returns a list
    of kv_len slot numbers; slot = page * page_size + offset.
    """
    # >>> your code
    slots = [table[i // page_size] * page_size + i % page_size for i in range(kv_len)]
    # <<< your code
    return slots


@slots_of.case("the paper's figure 6: seven tokens in blocks 7 and 1")
def _(fn):
    expect(fn([7, 1], 7, 4), [28, 29, 30, 31, 4, 5, 6], "slots")


@slots_of.case("garbage after the last page")
def _(fn):
    expect(fn([2, 0, -1, 10**9], 5, 3), [6, 7, 8, 0, 1], "slots")


@slots_of.case("one token a page, and no token at all")
def _(fn):
    expect(fn([5, 3, 4], 3, 1), [5, 3, 4], "slots")
    expect(fn([5, 3], 0, 16), [], "slots")


@exercise(
    hints=[
        "There are three cases: the last page is full (or there is none), it is shared, or it is yours alone.",
        "Full: take a page and add it to the table. Nothing is copied, whoever else holds the full one.",
        "Shared and not full: take a page, drop a reference to the old one, put the new one in the table.",
    ],
    bugs=[
        ("num_tokens % page_size == 0", "num_tokens % page_size == page_size - 1", "off by one: a page too early"),
        ("elif refs[table[-1]] > 1:", "elif refs[table[-1]] > 0:", "the last holder copies too"),
        ("elif refs[table[-1]] > 1:", "elif False:", "writes into a page that others read"),
        ("        refs[table[-1]] -= 1\n", "", "the old page keeps a reference and is never free again"),
        ("copies = [(table[-1], page)]", "copies = [(page, table[-1])]", "copies the wrong way round"),
        ("        refs[page] = 1\n        table[-1]", "        table[-1]", "the new page has no holder"),
    ],
)
def make_room(table, num_tokens, page_size, refs, take):
    """Make room for one more token of a sequence: copy-on-write.

    table: its pages, changed in place. num_tokens: how many it has. refs: {page: number of
    holders}, changed in place. take() returns a free page. Returns the list of page copies (src,
    dst) to be made before the token is written.
    """
    copies = []
    # >>> your code
    if num_tokens % page_size == 0:
        page = take()
        refs[page] = 1
        table.append(page)
    elif refs[table[-1]] > 1:
        page = take()
        refs[table[-1]] -= 1
        copies = [(table[-1], page)]
        refs[page] = 1
        table[-1] = page
    # <<< your code
    return copies


def _room(fn, table, num_tokens, refs, free):
    """(copies, table, refs, what is left of free) after the call, with pages of 4."""
    table, refs, free = list(table), dict(refs), list(free)

    def take():
        assert free, f"a page was taken for token {num_tokens} of table {table}, and none is needed"
        return free.pop(0)

    copies = fn(table, num_tokens, 4, refs, take)
    return copies, table, refs, free


@make_room.case("room on a page of its own: nothing happens")
def _(fn):
    expect(_room(fn, [7, 1], 7, {7: 1, 1: 1}, [3]), ([], [7, 1], {7: 1, 1: 1}, [3]), "(copies, table, refs, free)")


@make_room.case("a full page, and no page at all: one more")
def _(fn):
    expect(
        _room(fn, [7, 1], 8, {7: 1, 1: 1}, [3]), ([], [7, 1, 3], {7: 1, 1: 1, 3: 1}, []), "(copies, table, refs, free)"
    )
    expect(_room(fn, [], 0, {}, [3]), ([], [3], {3: 1}, []), "(copies, table, refs, free)")


@make_room.case("a full page that is shared is not copied")
def _(fn):
    expect(_room(fn, [7], 4, {7: 2}, [3]), ([], [7, 3], {7: 2, 3: 1}, []), "(copies, table, refs, free)")


@make_room.case("the paper's figure 8: block 1 has two holders, then one")
def _(fn):
    copied = _room(fn, [7, 1], 7, {7: 2, 1: 2}, [3])
    expect(copied, ([(1, 3)], [7, 3], {7: 2, 1: 1, 3: 1}, []), "the first to write")
    expect(_room(fn, [7, 1], 7, copied[2], []), ([], [7, 1], {7: 2, 1: 1, 3: 1}, []), "the last holder")


def _digest(parent, tokens):
    return hashlib.sha256(f"{parent}|{list(tokens)}".encode()).hexdigest()


def _published(tokens, page_size):
    """The chain of hashes of the full pages of tokens."""
    chain, last = [], ""
    for start in range(0, len(tokens) - page_size + 1, page_size):
        last = _digest(last, tokens[start : start + page_size])
        chain.append(last)
    return chain


@exercise(
    hints=[
        "Walk the prompt page by page and hash each with the hash of the page before it.",
        "Stop at the first page that is not cached: what comes after it depends on it.",
        "Only full pages count, and never the page of the last token: its output is needed, so it must be computed.",
    ],
    bugs=[
        ("(len(tokens) - 1) // page_size", "len(tokens) // page_size", "the last token is not computed"),
        ("digest(last, tokens", 'digest("", tokens', "the page is found after any beginning"),
        ("break", "continue", "goes on after a page that is missing"),
        (
            "last = digest(last, tokens[page * page_size : (page + 1) * page_size])\n        if last not in cached:\n"
            "            break\n",
            "page = digest(last, tokens[page * page_size : (page + 1) * page_size])\n        if page not in cached:\n"
            "            continue\n        last = page\n",
            "steps over a page that is missing",
        ),
        ("cached_tokens += page_size", "cached_tokens += 1", "counts pages, not tokens"),
    ],
)
def cached_prefix(tokens, page_size, cached, digest):
    """How many of a prompt's first tokens need not be computed, because they lie in cached pages.

    tokens: list of ids. cached: set of hashes of full pages. digest(parent, tokens) is the hash of
    a page: parent is the hash of the page before it, "" for the first. At least one token must be
    left to compute.
    """
    cached_tokens, last = 0, ""
    # >>> your code
    for page in range((len(tokens) - 1) // page_size):
        last = digest(last, tokens[page * page_size : (page + 1) * page_size])
        if last not in cached:
            break
        cached_tokens += page_size
    # <<< your code
    return cached_tokens


@cached_prefix.case("14 tokens, ten of them known, pages of four: two pages")
def _(fn):
    known = _published(list(range(15)), 4)
    expect(fn([*range(10), 90, 91, 92, 93], 4, set(known), _digest), 8, "cached tokens")


@cached_prefix.case("a prompt that is cached whole")
def _(fn):
    known = set(_published(list(range(8)), 4))
    expect(fn(list(range(8)), 4, known, _digest), 4, "cached tokens of 8")
    expect(fn(list(range(9)), 4, known, _digest), 8, "cached tokens of 9")


@cached_prefix.case("the same page after another beginning is another page")
def _(fn):
    known = set(_published([5, 6, 7, 8, 0, 0, 0, 0], 4))
    expect(fn([5, 6, 7, 8, 5, 6, 7, 8, 1], 4, known, _digest), 4, "cached tokens")
    expect(fn([5, 6, 7, 8, 9, 9, 9, 9, 0, 0, 0, 0, 1], 4, known, _digest), 4, "cached tokens, a new page between")


@cached_prefix.case("the first page was evicted")
def _(fn):
    known = _published(list(range(12)), 4)
    expect(fn(list(range(13)), 4, set(known[1:]), _digest), 0, "cached tokens")
    expect(fn(list(range(13)), 4, {known[0], known[2]}, _digest), 4, "cached tokens")


@exercise(
    hints=[
        "max does not look at the request; pow2 rounds the output only; oracle knows it.",
        "No sequence is longer than max_len, so no reservation is.",
        "The buddy allocator then rounds the whole reservation up to a power of two.",
    ],
    bugs=[
        ("prompt_len + power(output_len)", "power(prompt_len + output_len)", "rounds the prompt too"),
        (
            "min(prompt_len + power(output_len), max_len)",
            "prompt_len + power(output_len)",
            "longer than the model can be",
        ),
        ("piece = power(reserved)", "piece = reserved", "no buddy allocator"),
        ("n - 1).bit_length()", "n).bit_length()", "a power of two is doubled"),
    ],
)
def reservation(policy, prompt_len, output_len, max_len):
    """What a request costs before paging. policy: "max" | "pow2" | "oracle".

    Returns (slots reserved, slots of the buddy allocator's piece).
    """

    # >>> your code
    def power(n):
        return 1 << (n - 1).bit_length()

    if policy == "max":
        reserved = max_len
    elif policy == "pow2":
        reserved = min(prompt_len + power(output_len), max_len)
    else:
        reserved = prompt_len + output_len
    piece = power(reserved)
    # <<< your code
    return reserved, piece


@reservation.case("a prompt of 100 and an output of 300 tokens, at most 2048")
def _(fn):
    expect(fn("max", 100, 300, 2048), (2048, 2048), "max")
    expect(fn("pow2", 100, 300, 2048), (612, 1024), "pow2")
    expect(fn("oracle", 100, 300, 2048), (400, 512), "oracle")


@reservation.case("powers of two stay what they are")
def _(fn):
    expect(fn("pow2", 256, 256, 2048), (512, 512), "pow2")
    expect(fn("oracle", 24, 40, 2048), (64, 64), "oracle")


@reservation.case("no reservation is longer than a sequence can be")
def _(fn):
    expect(fn("pow2", 900, 1100, 2048), (2048, 2048), "pow2")


@kernel_exercise(
    hints=[
        "Key i lies in the page that stands in column i // PAGE of the sequence's row, at place i % PAGE.",
        "Every key of a tile looks its page up: tl.load of BLOCK ids, of which neighbours are mostly equal.",
        "Mask both loads. What stands in the table behind the last page is no address, and the table ends somewhere.",
    ],
    bugs=[
        ("table_ptr + key // PAGE, mask", "table_ptr + first // PAGE + 0 * key, mask", "one page for the whole tile"),
        ("page * PAGE + key % PAGE", "page * PAGE + key - first", "the place in the tile, not in the page"),
        ("key // PAGE, mask=used)", "key // PAGE)", "ids are read past the end of the table: only compiled code tells"),
        (
            "mask=used)\n        slot = page * PAGE + key % PAGE\n        v = "
            "tl.load(v_ptr + slot[:, None] * 16 + d, mask=used[:, None], other=0.0)",
            "mask=key < width * PAGE)\n        slot = page * PAGE + key % PAGE\n        v = "
            "tl.where(used[:, None], tl.load(v_ptr + slot[:, None] * 16 + d), 0.0)",
            "what is no page id becomes an address, and what was read is thrown away: only compiled code tells",
        ),
    ],
)
def paged_sum(v_ptr, table_ptr, lens_ptr, o_ptr, width, PAGE: "tl.constexpr", BLOCK: "tl.constexpr"):
    """o[b] = the sum of the values of sequence b, found through its row of the block table.

    v [P, PAGE, 16] fp32; empty slots are NaN. table [B, width] int32: what stands behind the
    pages of a sequence is no page id. lens [B]: keys of each. o [B, 16]. One program per sequence.
    """
    b, d = tl.program_id(0), tl.arange(0, 16)
    kv_len, total = tl.load(lens_ptr + b), tl.zeros([16], tl.float32)
    table_ptr += b * width
    for first in range(0, kv_len, BLOCK):
        key = first + tl.arange(0, BLOCK)
        # >>> your code
        used = key < kv_len
        page = tl.load(table_ptr + key // PAGE, mask=used)
        slot = page * PAGE + key % PAGE
        v = tl.load(v_ptr + slot[:, None] * 16 + d, mask=used[:, None], other=0.0)
        total += tl.sum(v, 0)
        # <<< your code
    tl.store(o_ptr + b * 16 + d, total)


def _sums(fn, kv_lens, page_size, block):
    """Pages in random order, one of them nobody's. The last row of the table is full: behind it is no memory of it."""
    gen, counts = torch.Generator().manual_seed(0), [-(-n // page_size) for n in kv_lens]
    order = torch.randperm(sum(counts) + 1, generator=gen).tolist()
    pages = torch.full((len(order), page_size, 16), float("nan"))
    table = torch.full((len(kv_lens), max(counts)), len(order), dtype=torch.int32)  # there is no such page
    want = torch.zeros(len(kv_lens), 16)
    for b, kv_len in enumerate(kv_lens):
        values = torch.randn(kv_len, 16, generator=gen)
        want[b] = values.sum(0)
        for i in range(counts[b]):
            part, table[b, i] = values[i * page_size : (i + 1) * page_size], order.pop()
            pages[table[b, i], : len(part)] = part
    lens, o = torch.tensor(kv_lens, dtype=torch.int32), torch.full_like(want, float("nan"))
    pages, table, lens, o = (x.to(device()) for x in (pages, table, lens, o))
    fn[(len(kv_lens),)](pages, table, lens, o, max(counts), PAGE=page_size, BLOCK=block)
    expect(o.cpu(), want, "o", atol=1e-4)


@paged_sum.case("pages of 16 in tiles of 32: 5, 0 and 40 keys")
def _(fn):
    _sums(fn, (5, 0, 40), 16, 32)


@paged_sum.case("pages of 4 in tiles of 16: 30 and 33 keys")
def _(fn):
    _sums(fn, (30, 33), 4, 16)
