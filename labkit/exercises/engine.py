"""Exercises of chapter 10. The docstrings are the tasks."""

import numpy as np
import torch

from labkit.decode_graphs import DecodeGraphs
from labkit.engine import sample
from labkit.exercises import exercise, expect


@exercise(
    hints=[
        "The tokens of all sequences lie one after the other; keep a running count of the rows so far.",
        "The last row of a sequence is the count after its tokens, minus one.",
        "A chunk that does not reach the end of what is known yields no token: nobody needs its logits.",
    ],
    bugs=[
        ("if start + n == known:", "if True:", "draws a token in the middle of a prompt"),
        ("rows.append(end - 1)", "rows.append(end)", "the first row of the next sequence"),
        ("end += n", "end += known", "counts tokens that are not in this step"),
    ],
)
def rows_to_draw(chunks):
    """Which rows of a step's hidden states [N, hidden] go through lm_head.

    chunks: (start, n, known) of every sequence, in order: the step computes its tokens [start,
    start + n), and `known` of its tokens are known in all. A sequence gets a new token from its
    last known one. Returns the list of rows.
    """
    # >>> your code
    rows, end = [], 0
    for start, n, known in chunks:
        end += n
        if start + n == known:
            rows.append(end - 1)
    # <<< your code
    return rows


@rows_to_draw.case("two decodes")
def _(fn):
    expect(fn([(9, 1, 10), (4, 1, 5)]), [0, 1], "rows")


@rows_to_draw.case("a prompt that ends, one that does not, and a decode")
def _(fn):
    expect(fn([(0, 5, 5), (8, 7, 40), (30, 1, 31)]), [4, 12], "rows")


@exercise(
    hints=[
        "Sort the tokens, the most likely first.",
        "A token stays if the ones before it have not yet reached top_p together.",
        "So the first always stays, and the one that crosses top_p stays too.",
    ],
    bugs=[
        ("if reached >= top_p:", "if reached + p[i] > top_p:", "drops the token that crosses"),
        ("if reached >= top_p:", "if reached > top_p:", "one too many where top_p is just reached"),
        ("key=lambda i: -p[i]", "key=lambda i: p[i]", "the least likely first"),
        ("reached += p[i]", "reached += 1 / len(p)", "counts tokens, not probability"),
        (
            "for i in sorted(range(len(p)), key=lambda i: -p[i]):\n        if reached >= top_p:\n            break\n",
            "while reached < top_p:\n        i = sorted(range(len(p)), key=lambda i: -p[i])[len(kept)]\n",
            "looks for more tokens than there are when rounding keeps the sum below top_p",
        ),
    ],
)
def nucleus(p, top_p):
    """Top-p (Holtzman et al. 2020): the set of the fewest likeliest tokens that reach top_p.

    p: list of probabilities that sum to 1, no two equal. Returns the set of the ids that stay.
    """
    # >>> your code
    kept, reached = set(), 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if reached >= top_p:
            break
        kept.add(i)
        reached += p[i]
    # <<< your code
    return kept


@nucleus.case("the token that crosses stays")
def _(fn):
    expect(fn([0.125, 0.5, 0.0625, 0.3125], 0.75), {1, 3}, "tokens")
    expect(fn([0.125, 0.5, 0.0625, 0.3125], 0.8125), {1, 3}, "tokens that just reach 0.8125")


@nucleus.case("one that is likelier than top_p is alone")
def _(fn):
    expect(fn([0.1, 0.7, 0.2], 0.3), {1}, "tokens")
    expect(fn([0.1, 0.7, 0.2], 1.0), {0, 1, 2}, "tokens at top_p 1, though 0.7 + 0.2 + 0.1 is a little less in floats")


@nucleus.case("the engine draws from the same set")
def _(fn):
    logits = torch.tensor([[0.0, 1.0, 2.5, 0.3, -1.0]])
    u = (torch.arange(999, dtype=torch.float64) + 0.5) / 999
    ones = torch.ones(999, dtype=torch.float64)
    drawn = sample(logits.expand(999, -1), ones, 5 * ones, 0.8 * ones, u)
    expect(fn(logits[0].softmax(0).tolist(), 0.8), set(drawn.tolist()), "tokens")


@exercise(
    hints=[
        "The graph's batch is the smallest recorded size that is not below the batch.",
        "A row that is added must write nowhere: its slot is -1.",
        "It must read nothing: its kv_len is 0.",
    ],
    bugs=[
        ("if n >= len(slots)", "if n > len(slots)", "a batch that just fits takes the next size"),
        ("[-1] * extra", "[0] * extra", "rows that nobody owns overwrite slot 0"),
        ("[0] * extra", "[1] * extra", "they read a key of somebody's page"),
        ("min(n for", "max(n for", "always the largest graph"),
    ],
)
def pad_for_graph(sizes, slots, kv_lens):
    """Fit a decode step into a recorded CUDA graph.

    sizes: batch sizes that were recorded. slots, kv_lens: lists with a number for each of the
    step's sequences, which mean what `write_kv` and `paged_decoding` read in them. Returns (slots,
    kv_lens) with rows added at the end up to the smallest size that holds them all.
    """
    # >>> your code
    extra = min(n for n in sizes if n >= len(slots)) - len(slots)
    slots = slots + [-1] * extra
    kv_lens = kv_lens + [0] * extra
    # <<< your code
    return slots, kv_lens


@pad_for_graph.case("three rows in a graph of four")
def _(fn):
    expect(fn([1, 2, 4, 8], [40, 7, 99], [41, 8, 3]), ([40, 7, 99, -1], [41, 8, 3, 0]), "(slots, kv_lens)")


@pad_for_graph.case("a batch that just fits")
def _(fn):
    expect(fn([8, 2, 4], [5, 6], [6, 7]), ([5, 6], [6, 7]), "(slots, kv_lens)")


@pad_for_graph.case("the engine's graphs see the same")
def _(fn):
    seen = []

    def run(numbers, table, kv_lens):
        seen.append((numbers[2].tolist(), kv_lens.tolist()))
        return torch.zeros(len(kv_lens), 1)

    graphs = DecodeGraphs(run, 20, 4, "cpu", capture=lambda fn: (lambda: None, fn()))
    for batch in (3, 9, 17):
        slots, kv_lens = list(range(batch)), list(range(1, batch + 1))
        numbers = torch.tensor([slots, slots, slots])
        graphs(numbers, torch.zeros(batch, 2, dtype=torch.int32), torch.tensor(kv_lens, dtype=torch.int32))
        expect(fn(graphs.sizes, slots, kv_lens), seen[-1], f"(slots, kv_lens) of {batch}")


@exercise(
    hints=[
        "A byte below 0x80 is a character of its own; 0xC0 and above begins one of 2, 3 or 4 bytes.",
        "Bytes of the form 10xxxxxx, 0x80 to 0xBF, continue a character.",
        "Look back from the end, at most three bytes, for one that begins a character which is not complete.",
    ],
    bugs=[
        ("if byte >= 0xC0:", "if byte >= 0x80:", "takes every byte of a character for its beginning"),
        ("if length > back:", "if length >= back:", "holds back a character that is complete"),
        ("range(1, 4)", "range(1, 2)", "looks at the last byte only"),
        ("byte < 0xE0", "byte <= 0xE0", "0xE0 begins three bytes"),
    ],
)
def bytes_to_send(data):
    """Streaming text: how many of these bytes can be sent now.

    Tokens may be pieces of a character: in UTF-8 one takes 1 to 4 bytes, and its first byte says
    how many (0xC0 to 0xDF two, to 0xEF three, from 0xF0 four). data: the bytes that wait, of which
    at most the last character is incomplete. Returns how many of them make whole characters.
    """
    # >>> your code
    count = len(data)
    for back in range(1, 4):
        if back > len(data):
            break
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            if length > back:
                count = len(data) - back
            break
    # <<< your code
    return count


@bytes_to_send.case("plain text goes at once")
def _(fn):
    expect(fn(b"return"), 6, "count")
    expect(fn(b""), 0, "count")


@bytes_to_send.case("half of an umlaut waits, a whole one goes")
def _(fn):
    expect(fn(b"gr\xc3"), 2, "count")
    expect(fn(b"gr\xc3\xbc"), 4, "count")


@bytes_to_send.case("every beginning of a text with characters of all lengths")
def _(fn):
    text = "a\u00e9\u07ff\u0800\u20ac\U0001f600b"  # first bytes: 61 C3 DF E0 E2 F0 62
    data = text.encode()
    ends = np.cumsum([0, *(len(c.encode()) for c in text)])
    for n in range(len(data) + 1):
        expect(fn(data[:n]), int(ends[ends <= n].max()), f"count of {n} bytes")
