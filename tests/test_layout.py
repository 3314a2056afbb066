"""The picture of a launch has as many cells as the launch has programs, rows, tiles and pages."""

from collections import Counter
from itertools import pairwise

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from labkit import layout, plot, waiting

CONFIG = {"BLOCK_H": 16, "BLOCK_N": 64, "num_stages": 3}


def boxes(ax):
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def colors(ax):
    return Counter(to_hex(box.get_facecolor()) for box in boxes(ax))


def words(ax):
    return " ".join(text.get_text() for text in ax.texts)


def test_a_launch():
    """1,000 keys in four splits of four tiles, the last one of 232 keys; five query heads a KV head."""
    fig = layout.draw(1000, 8, 5, 4, CONFIG, 128, picked=(2, 3))
    grid, program = fig.axes
    assert len(boxes(grid)) == 8 * 4
    (picked,) = (box for box in boxes(grid) if to_hex(box.get_facecolor()) == layout.PICKED)
    assert picked.get_x() == 768
    assert picked.get_width() == 232
    assert picked.get_y() < 2 < picked.get_y() + picked.get_height()
    found = colors(program)
    assert found[layout.OTHER[1]] == 5, "heads"
    assert found[layout.PADDING] == 11
    assert found[layout.PICKED] == 2 + 1, "of k and of v, and in the legend"
    assert found[layout.SOON] == 4 + 1, "two stages ahead"
    assert found["#ffffff"] == 2, "the fourth tile"
    assert "k [64, 128], 4 tiles" in words(program)
    assert "11 rows of\npadding" in words(program)
    assert not program.lines
    plot.plt.close(fig)


@pytest.mark.parametrize("page_size, cuts", [(16, 3), (64, 0), (256, 0), (32, 1)])
def test_pages_cut_a_tile(page_size, cuts):
    fig = layout.draw(640, 1, 16, 1, CONFIG, 64, page_size=page_size, picked=(0, 0))
    program = fig.axes[1]
    assert len(program.lines) == 2 * 6 * cuts, "six of ten tiles are drawn"
    assert "10 tiles ..." in words(program)
    assert "padding" not in words(program)
    plot.plt.close(fig)


def test_who_waits_for_whom():
    """Under a running maximum every tile waits for the one before it; under one phi for none."""
    slow, fast = waiting.running(), waiting.unified()
    for before, lane in pairwise(slow):
        assert lane[1][1] >= before[1][2], "the maximum needs the one before"
        assert lane[3][1] >= before[4][2], "the accumulator holds all that was added before"
    assert all(start == end for lane in fast for (_, _, end), (_, start, _) in pairwise(lane))
    lanes, tiles = waiting.draw().axes
    assert words(lanes).count("q·k") == 2 * waiting.TILES
    assert "padding\n87.5 %" in words(tiles)
    assert "padding\n0 %" in words(tiles)


PLANTED_BUGS = [
    ("labkit/layout.py", "if (head, split) == picked", "if (split, head) == picked"),
    ("labkit/layout.py", "-(-(end - start) // config[\"BLOCK_N\"])", "(end - start) // config[\"BLOCK_N\"]"),
    ("labkit/layout.py", "if row < group else PADDING", "if row <= group else PADDING"),
    ("labkit/layout.py", "tile < config[\"num_stages\"]", "tile <= config[\"num_stages\"]"),
    ("labkit/layout.py", "min(turns, 6)", "turns"),
    ("labkit/layout.py", "range(page_size or keys, keys, page_size or keys)", "range(0, keys, page_size or keys)"),
]
