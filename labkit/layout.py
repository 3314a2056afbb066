"""Who works on what: the programs of a decode kernel over the keys of a sequence, and the tile that one of them holds.

Drawn from the numbers that the kernel is launched with, so that the picture is that of the launch.
"""

from matplotlib.patches import Rectangle

from labkit import plot, splits

PICKED, OTHER, PADDING, SOON = plot.COLORS["orange"], ("#cfe5f7", "#9fc9ec"), "#e4e7eb", "#ffdcc2"


def draw(kv_len, num_kv_heads, group, num_splits, config, head_dim, *, page_size=None, picked=(2, 1)):
    """A figure of two: the grid of programs over one sequence, and one of them (`picked`: its KV head and split).

    config: BLOCK_H, BLOCK_N and num_stages of the launch. page_size: keys a page, if tiles are gathered from pages.
    """
    fig, (grid, program) = plot.figure(1, 2, width=9.0, height=3.6, width_ratios=(1, 1.2))
    pieces = splits.bounds(kv_len, num_splits, config["BLOCK_N"])
    _grid(grid, kv_len, num_kv_heads, pieces, picked)
    start, end = pieces[picked[1]]
    _program(program, group, -(-(end - start) // config["BLOCK_N"]), config, head_dim, page_size)
    return fig


def _box(ax, x, y, width, height, color, edge="#555555"):
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=edge, lw=0.8))


def _grid(ax, kv_len, num_kv_heads, pieces, picked):
    for head in range(num_kv_heads):
        for split, (start, end) in enumerate(pieces):
            color = PICKED if (head, split) == picked else OTHER[split % 2]
            _box(ax, start, head - 0.4, end - start, 0.8, color, "white")
    ax.set(xlim=(0, kv_len), ylim=(num_kv_heads - 0.4, -0.6), xlabel="keys of one sequence", ylabel="KV head")
    ax.set(yticks=range(num_kv_heads), title=f"{num_kv_heads} x {len(pieces)} programs a sequence")
    ax.grid(False)


def _program(ax, group, turns, config, head_dim, page_size):
    rows, keys, shown = config["BLOCK_H"], config["BLOCK_N"], min(turns, 6)
    words = f"{group} head{'s' * (group > 1)}" + (f",\n{rows - group} rows of\npadding" if rows > group else "")
    ax.text(0, 8.2, f"q [{rows}, {head_dim}]", fontsize=9)
    ax.text(0, 3.5, words, fontsize=9, va="top")
    for row in range(rows):  # the group's heads on top
        _box(ax, 0, 7.8 - (row + 1) * 4 / rows, 2.4, 4 / rows, OTHER[1] if row < group else PADDING)
    for name, y in (("k", 5.6), ("v", 2.4)):
        ax.text(3.6, y + 2.4, f"{name} [{keys}, {head_dim}], {turns} tiles" + " ..." * (turns > shown), fontsize=9)
        for x, tile in ((3.6 + 1.5 * tile, tile) for tile in range(shown)):
            _box(ax, x, y, 1.3, 2.0, PICKED if tile == 0 else SOON if tile < config["num_stages"] else "white")
            for key in range(page_size or keys, keys, page_size or keys):  # where a page ends inside the tile
                ax.plot([x, x + 1.3], [y + 2.0 * key / keys] * 2, color="#555555", lw=0.8, marker="", ls="-")
    for x, color, meaning in ((3.6, PICKED, "in use"), (6.4, SOON, "on its way")):
        _box(ax, x, 1.1, 0.5, 0.6, color)
        ax.text(x + 0.7, 1.4, meaning, fontsize=9, va="center")
    ax.text(0, 0.0, f"in registers: s and p [{rows}, {keys}], o [{rows}, {head_dim}], m and l [{rows}]", fontsize=9)
    ax.set(xlim=(-0.2, 12.8), ylim=(-0.4, 8.8), title="one program: q stays, tiles of keys pass")
    ax.axis("off")
