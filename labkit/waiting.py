"""Who waits for whom: the tiles of one row under a running maximum and under one phi, and what padding a tile carries.

A sketch of what depends on what. Lengths are no times.
"""

from itertools import pairwise

from matplotlib.patches import Rectangle

from labkit import plot
from labkit.flash_decoding_pp import utilisation

TILES = 3
LENGTHS = {"q·k": 2.0, "max": 1.2, "exp": 1.4, "rescale acc": 2.4, "exp(x-φ)": 2.0, "p·v": 1.5}
FILL = {"max": "#ffdcc2", "rescale acc": "#ffdcc2"}  # what only the running maximum needs
RED, GREY, BLUE = "#c0202a", "#e4e7eb", "#cfe5f7"


def running():
    """[lane of (what, start, end)]: a maximum needs the one before it, and the accumulator all that was added to it."""
    lanes, top, added = [], 0.0, 0.0
    for _ in range(TILES):
        lane, now = [], 0.0
        for what, after in (("q·k", 0.0), ("max", top), ("exp", 0.0), ("rescale acc", added), ("p·v", 0.0)):
            start = max(now, after)
            now = start + LENGTHS[what]
            lane.append((what, start, now))
        top, added = lane[1][2], now
        lanes.append(lane)
    return lanes


def unified():
    """The same under one phi: no lane needs another one."""
    lane, now = [], 0.0
    for what in ("q·k", "exp(x-φ)", "p·v"):
        lane.append((what, now, now + LENGTHS[what]))
        now += LENGTHS[what]
    return [lane] * TILES


def draw(tokens=8, rows=(64, 8)):
    """A figure of two: the lanes of both, and `tokens` in tiles of so many rows."""
    fig, (lanes, tiles) = plot.figure(1, 2, width=9.0, height=4.4, width_ratios=(3, 1))
    slow, fast, below = running(), unified(), TILES + 1.4
    for top, title, timeline in ((0, "running maximum", slow), (below, "one phi for all", fast)):
        lanes.text(0, top - 0.75, title, weight="bold")
        for i, lane in enumerate(timeline):
            lanes.text(-0.2, top + i, f"tile {i}", ha="right", va="center", fontsize=9)
            _lane(lanes, lane, top + i)
    for above, lane in pairwise(slow):
        i = slow.index(lane)
        for (_, _, end), (_, start, _) in ((above[1], lane[1]), (above[4], lane[3])):
            arrow = {"arrowstyle": "->", "color": plot.COLORS["orange"], "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
            lanes.annotate("", (start + 0.15, i - 0.35), (end - 0.15, i - 0.65), arrowprops=arrow)
    end = fast[0][-1][2]
    _box(lanes, end + 0.3, below - 0.35, 0.7, TILES - 0.3, "white", "+")
    _, start, stop = fast[-1][1]  # the guard of the last tile trips
    y = below + TILES - 1
    lanes.add_patch(Rectangle((start, y - 0.35), stop - start, 0.7, fill=False, edgecolor=RED, lw=2.2))
    lanes.text((start + stop) / 2, y + 0.68, "x-φ ≥ b", color=RED, ha="center", va="center", weight="bold")
    _box(lanes, end + 2.2, y + 0.33, 5.6, 0.7, "white", "this row again, the slow way", edge=RED)
    dashed = {"arrowstyle": "->", "color": RED, "ls": "--", "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
    lanes.annotate("", (end + 2.2, y + 0.68), (stop + 0.1, y + 0.68), arrowprops=dashed)
    lanes.set(xlim=(-1.6, slow[-1][-1][2] + 0.2), ylim=(below + TILES + 0.3, -1.1))
    for i, height in enumerate(rows):
        _tile(tiles, 1.6 * i, tokens, height, max(rows))
    tiles.set(xlim=(-0.1, 2.7), ylim=(-9, max(rows) + 9), title=f"{tokens} tokens in a tile")
    for ax in (lanes, tiles):
        ax.axis("off")
    return fig


def _box(ax, x, y, width, height, color, words="", edge="#555555", **kwargs):
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=edge, lw=1.0, **kwargs))
    ax.text(x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=9)


def _lane(ax, lane, y):
    for (_, _, before), (_, start, _) in pairwise(lane):
        if start > before:
            _box(ax, before, y - 0.12, start - before, 0.24, GREY, "waits" if start - before > 2 else "", edge=GREY)
    for what, start, end in lane:
        _box(ax, start, y - 0.35, end - start, 0.7, FILL.get(what, BLUE), what)


def _tile(ax, x, tokens, rows, top):
    padding = 100 * (1 - utilisation(tokens, rows))
    _box(ax, x, top - tokens, 1, tokens, BLUE, "tokens")
    if rows > tokens:
        _box(ax, x, top - rows, 1, rows - tokens, GREY, hatch="///")
    ax.text(x + 0.5, top + 2, f"{rows} rows", ha="center", va="bottom", fontsize=9)
    ax.text(x + 0.5, top - rows - 2, f"padding\n{padding:g} %", ha="center", va="top", fontsize=9)
