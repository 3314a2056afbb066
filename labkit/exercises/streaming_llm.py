"""Exercises of chapter 06. The docstrings are the tasks."""

import torch

from labkit.exercises import device, exercise, expect, kernel_exercise
from labkit.model import rotate as turn


@exercise(
    hints=[
        "Number the tokens of the text from 0; the current one is seen - 1, and it counts as the window's last.",
        "A token stays if it is one of the first num_sinks, or one of the last `window`.",
        "The oldest one in a window of 3 after ten tokens is number 7: the window holds 7, 8 and 9.",
    ],
    bugs=[
        ("i >= seen - window", "i > seen - window", "a window that is one too small"),
        ("i >= seen - window", "i >= seen - window - 1", "the current token is not counted: one too many"),
        ("i < num_sinks", "i <= num_sinks", "one sink too many"),
        ("i < num_sinks or ", "", "no sinks: window attention"),
        ("for i in range(seen)", "for i in range(seen - 1)", "the current token does not see itself"),
        (
            "[i for i in range(seen) if i < num_sinks or i >= seen - window]",
            "[*range(min(seen, num_sinks)), *range(max(0, seen - window), seen)]",
            "a sink in the window counts twice",
        ),
        (
            "[i for i in range(seen) if i < num_sinks or i >= seen - window]",
            "[*range(num_sinks), *range(max(num_sinks, seen - window), seen)]",
            "sinks that have not come yet",
        ),
    ],
)
def visible(seen, num_sinks, window):
    """Which tokens of the text are in the cache when the last of `seen` tokens is decoded.

    window counts the last tokens that are kept, the current one included.
    Returns their numbers in order, as a list.
    """
    # >>> your code
    tokens = [i for i in range(seen) if i < num_sinks or i >= seen - window]
    # <<< your code
    return tokens


@visible.case("the paper's figure 4: four sinks, token 9 is decoded")
def _(fn):
    expect(fn(10, 4, 4), [0, 1, 2, 3, 6, 7, 8, 9], "tokens")


@visible.case("nothing has to go yet, and then the first one does")
def _(fn):
    expect(fn(1, 2, 3), [0], "tokens of 1 seen")
    expect(fn(4, 2, 3), [0, 1, 2, 3], "tokens of 4 seen")
    expect(fn(5, 2, 3), [0, 1, 2, 3, 4], "tokens")
    expect(fn(6, 2, 3), [0, 1, 3, 4, 5], "tokens")


@visible.case("no sinks; a window of one")
def _(fn):
    expect(fn(6, 0, 3), [3, 4, 5], "tokens")
    expect(fn(6, 1, 1), [0, 5], "tokens")


@exercise(
    hints=[
        "A sink has a slot for good: token i < num_sinks is in slot i.",
        "The others share `window` slots, one after the other, and begin again: count them from num_sinks.",
        "Slot num_sinks + (i - num_sinks) % window. With i % window a new token would land on a sink.",
    ],
    bugs=[
        ("num_sinks + (i - num_sinks) % window", "i % (num_sinks + window)", "the ring runs over the sinks"),
        ("num_sinks + (i - num_sinks) % window", "num_sinks + i % window", "counted from the text's beginning"),
        ("num_sinks + (i - num_sinks) % window", "(i - num_sinks) % window", "the ring begins at slot 0"),
        ("(i - num_sinks) % window", "(i - num_sinks) % (window + 1)", "one slot too many"),
    ],
)
def slots_of(tokens, num_sinks, window):
    """The slot of each token of the list, in a ring that never loses a sink.

    It has num_sinks + window slots, those of the sinks first. Another token takes the slot
    that the oldest one of the window had.
    """
    slots = []
    for i in tokens:
        # >>> your code
        slot = i if i < num_sinks else num_sinks + (i - num_sinks) % window
        # <<< your code
        slots.append(slot)
    return slots


@slots_of.case("the paper's figure 4: tokens 0, 1, 2, 3, 6, 7, 8, 9")
def _(fn):
    expect(fn([0, 1, 2, 3, 6, 7, 8, 9], 4, 4), [0, 1, 2, 3, 6, 7, 4, 5], "slots")


@slots_of.case("a sink is never evicted")
def _(fn):
    expect(min(fn(range(3, 200), 3, 5)), 3, "the lowest slot of tokens 3 to 199")
    expect(sorted(fn([0, 1, 2, *range(195, 200)], 3, 5)), list(range(8)), "slots of all that is held")


@slots_of.case("the first token after one sink")
def _(fn):
    expect(fn([0, 1, 2, 3], 1, 2), [0, 1, 2, 1], "slots")


@exercise(
    hints=[
        "Row j of k is the j-th token of the cache. Its position is j, wherever it was in the text.",
        "So is the query's: it is the last token of the cache.",
        "rotate(k, positions) wants one position for each row: torch.arange(len(k)).",
    ],
    bugs=[
        ("rotate(k, torch.arange(n))", "k", "the re-rotation is forgotten: keys without positions"),
        ("rotate(k, torch.arange(n))", "rotate(k, torch.tensor(tokens))", "keys keep the positions of the text"),
        ("torch.tensor([n - 1])", "tokens[-1:]", "the query keeps the position of the text"),
        ("torch.tensor([n - 1])", "torch.tensor([n])", "the query one further than its own key"),
    ],
)
def scores(q, k, tokens, rotate):
    """The scores of one query with the keys of a cache, before scaling and softmax.

    q [D] and k [n, D], neither rotated yet; k in the order of the text, the current token last.
    tokens: the numbers that the n tokens have in the text.
    rotate(x [m, D], positions [m]) -> x rotated. Returns s [n], with StreamingLLM's positions.
    """
    n = len(tokens)
    # >>> your code
    turned = rotate(k, torch.arange(n))
    s = turned @ rotate(q[None], torch.tensor([n - 1]))[0]
    # <<< your code
    return s


def _rotate(x, positions):
    angle = torch.as_tensor(positions)[:, None] * torch.tensor([1.0, 0.1])
    return turn(x[:, None], angle.cos(), angle.sin())[:, 0]


def _scores(fn, tokens):
    torch.manual_seed(0)
    q, k = torch.randn(4), torch.randn(len(tokens), 4)
    places = torch.arange(len(tokens))
    query = _rotate(q.expand(len(tokens), 4), places * 0 + len(tokens) - 1)
    expect(fn(q, k, tokens, _rotate), (_rotate(k, places) * query).sum(1), "s")


@scores.case("the paper's figure 4")
def _(fn):
    _scores(fn, [0, 1, 2, 3, 6, 7, 8, 9])


@scores.case("nothing evicted: positions of the text and of the cache are the same")
def _(fn):
    _scores(fn, [0, 1, 2])


@scores.case("a long text, one sink")
def _(fn):
    _scores(fn, [0, 998, 999, 1000])


@exercise(
    hints=[
        "The cache may hold num_sinks + window tokens, the new ones included.",
        "Never a sink goes; of the others the oldest go first, and only as many as must.",
        "Count what is too much: len(held) + n - num_sinks - window. It may be negative.",
    ],
    bugs=[
        ("+ n - num_sinks - window", "- num_sinks - window", "no room is made"),
        ("max(0, len(held)", "abs(len(held)", "something goes though there is room"),
        ("held[:num_sinks] + held[num_sinks + excess :]", "held[excess:]", "the sinks go first"),
        ("held[num_sinks + excess :]", "held[len(held) - window + n + 1 :]", "one more than needed goes"),
    ],
)
def make_room(held, n, num_sinks, window):
    """What stays in the cache when a prompt of n tokens is about to come, all of which must fit.

    held: the numbers of the tokens in the cache, in order, the sinks first. n is at most `window`.
    Returns the list of those that stay.
    """
    # >>> your code
    excess = max(0, len(held) + n - num_sinks - window)
    kept = held[:num_sinks] + held[num_sinks + excess :]
    # <<< your code
    return kept


@make_room.case("a full cache: two sinks and a window of five, a prompt of three")
def _(fn):
    expect(fn([0, 1, 15, 16, 17, 18, 19], 3, 2, 5), [0, 1, 18, 19], "kept")


@make_room.case("a prompt as long as the window leaves the sinks")
def _(fn):
    expect(fn([0, 7, 8, 9], 3, 1, 3), [0], "kept")


@make_room.case("there is room already")
def _(fn):
    expect(fn([0, 1, 2], 2, 2, 5), [0, 1, 2], "kept")
    expect(fn([0, 1, 2, 3], 3, 2, 5), [0, 1, 2, 3], "kept")


@kernel_exercise(
    hints=[
        "The cache holds min(seen, num_sinks + window) tokens. Which slot is the oldest of the window in?",
        "That is token seen - window, once something has left; before, it is token num_sinks.",
        "From there on one slot per position; behind the ring's last slot goes on the window's first.",
        "Positions that hold nothing must be masked in the load too: their slots may lie outside of the ring.",
    ],
    bugs=[
        ("tl.load(k_ptr + slot * D + d, mask=held)", "tl.load(k_ptr + slot * D + d)",
         "reads behind the ring what is never stored: only compiled code tells"),
        ("slot >= num_sinks + window", "slot > num_sinks + window", "one slot behind the ring before it begins again"),
        ("slot - window", "slot - window - num_sinks", "the seam runs over the sinks"),
        ("(oldest - num_sinks) % window", "oldest % window", "counted from the text's beginning"),
        ("tl.maximum(seen - window, num_sinks)", "seen - window", "before the first eviction there is no such token"),
        ("tl.where(position < num_sinks, position, slot)", "slot", "the sinks are not where they are"),
        ("position < tl.minimum(seen, num_sinks + window)", "position < num_sinks + window",
         "positions that hold nothing yet"),
    ],
)  # fmt: skip
def in_order(k_ptr, out_ptr, seen, num_sinks, window, D: "tl.constexpr", BLOCK: "tl.constexpr"):
    """Copy the keys of a ring in the order of their positions; a program per BLOCK positions.

    k and out [num_sinks + window, D]. Token i lies in slot i if i < num_sinks, else in
    num_sinks + (i - num_sinks) % window. seen tokens have come; rows of out without one stay.
    """
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, D)[None, :]
    # >>> your code
    held = position < tl.minimum(seen, num_sinks + window)
    oldest = tl.maximum(seen - window, num_sinks)
    slot = position + (oldest - num_sinks) % window
    slot = tl.where(slot >= num_sinks + window, slot - window, slot)
    slot = tl.where(position < num_sinks, position, slot)
    k = tl.load(k_ptr + slot * D + d, mask=held)
    tl.store(out_ptr + position * D + d, k, mask=held)
    # <<< your code


def _in_order(fn, seen, num_sinks, window):
    size, k = num_sinks + window, torch.full((num_sinks + window, 4), float("nan"))
    tokens = [i for i in range(seen) if i < num_sinks or i >= seen - window]
    for i in tokens:
        k[i if i < num_sinks else num_sinks + (i - num_sinks) % window] = torch.arange(4.0) + 10 * i
    out = torch.full((size, 4), -1.0, device=device())
    fn[(-(-size // 8),)](k.to(device()), out, seen, num_sinks, window, D=4, BLOCK=8)
    expect(out[: len(tokens), 0].cpu(), torch.tensor(tokens) * 10.0, "column 0 of what is held")
    expect(out[:, 3].cpu()[len(tokens) :], torch.full((size - len(tokens),), -1.0), "column 3 of the empty positions")


@in_order.case("the paper's figure 4: four sinks, a window of four, ten tokens")
def _(fn):
    _in_order(fn, 10, 4, 4)


@in_order.case("twelve slots, two programs: a tile is not full")
def _(fn):
    _in_order(fn, 29, 2, 10)


@in_order.case("five tokens so far, nothing has left")
def _(fn):
    _in_order(fn, 5, 2, 8)
