"""One step of the engine as a ring: what happens, who calls whom, and which chapter made it."""

from matplotlib.patches import FancyBboxPatch

from labkit import plot

# What happens, and the functions that do it, each with its chapter. The first of a part calls the others.
STEP = {
    "admit": (("Scheduler.step", 9), ("BlockPool.allocate, append", 8)),
    "pack rows": (("Engine._forward", 10), ("BlockPool.table", 8)),
    "run the model": (
        ("Engine._hidden", 10), ("add_rmsnorm, rope, swiglu", 3), ("write_kv, paged_decoding", 8),
        ("ragged_attention", 9),
    ),
    "sample": (("Engine._draw", 10), ("sample", 10)),
    "free": (("Scheduler.stop", 9), ("BlockPool.free", 8)),
}  # fmt: skip
FILL = {3: "#cdeee2", 8: "#cfe5f7", 9: "#ffdcc2", 10: "#e4e7eb"}
WIDTH, LINE = 3.4, 0.42
AT = ((4.3, 0.0), (6.8, 2.0), (6.8, 4.2), (1.8, 4.2), (1.8, 2.0))  # middle and top of each part, clockwise
ARROWS = (
    ((6.15, 0.75), (7.0, 1.9)), ((6.8, 3.6), (6.8, 4.1)), ((5.0, 4.95), (3.6, 4.95)), ((1.8, 4.1), (1.8, 3.6)),
    ((1.6, 1.9), (2.45, 0.75)),
)  # fmt: skip


def draw():
    """A figure of the ring, and in its middle what lasts from step to step."""
    fig, ax = plot.figure(width=6.8, height=5.0)
    for number, ((middle, y), (what, calls)) in enumerate(zip(AT, STEP.items()), 1):
        left, right = middle - WIDTH / 2, middle + WIDTH / 2
        _box(ax, left, y, WIDTH, LINE * (1.6 + len(calls)), "white")
        y += 0.75 * LINE
        ax.text(left + 0.15, y, f"{number}  {what}", va="center", weight="bold")
        for i, (names, chapter) in enumerate(calls):
            y += LINE
            ax.text(left + 0.15 + 0.2 * (i > 0), y, names, va="center", fontsize=9)
            _box(ax, right - 0.72, y - 0.15, 0.6, 0.3, FILL[chapter])
            ax.text(right - 0.42, y, f"ch. {chapter}", va="center", ha="center", fontsize=8)
    for start, end in ARROWS:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#555555", "lw": 2})
    lasts = "what lasts\nof a request:\nits tokens,\nits pages,\nhow many keys"
    ax.text(4.3, 2.75, lasts, ha="center", va="center", fontsize=9)
    ax.set(xlim=(0.0, 8.6), ylim=(6.65, -0.1))
    ax.axis("off")
    return fig


def _box(ax, x, y, width, height, color):
    style = "round,pad=0,rounding_size=0.1"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor="#555555"))
