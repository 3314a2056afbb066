"""One style for all figures: PNG on white.

In the book's dark theme the style sheet inverts them and turns the hues back, so one image reads well in both. The
colours follow Okabe and Ito's palette, safe for colour-blind readers; lines differ in marker and dash too.
"""

import io

import matplotlib
from cycler import cycler

matplotlib.use("agg")  # no window, the same pixels everywhere

from matplotlib import pyplot as plt
from matplotlib.text import Text

COLORS = {
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "purple": "#a8568c",
    "sky": "#4a9fd8",
    "black": "#333333",
}
MIDDLE = "#7b7b7b"  # can be read on white and on the dark theme
PHONE, LEGIBLE = 400, 7.9  # pixels: a phone's width, and text that can be read there
CMAP = "cividis"  # for heat maps: even in luminance, safe for colour-blind readers

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=list(COLORS.values()))
    + cycler(marker=["o", "s", "^", "D", "v", "P"])
    + cycler(linestyle=["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "grid.color": "#dddddd",
    "image.cmap": CMAP,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


class Figure:
    """A drawn figure with its caption and alt text. The book numbers it and takes {numref}`name`."""

    def __init__(self, png, name, caption, alt, width, classes=()):
        self.png, self.name, self.caption, self.alt, self.width, self.classes = png, name, caption, alt, width, classes

    def __repr__(self):
        return f"Figure {self.name}: {self.alt}"

    def _repr_mimebundle_(self, include=None, exclude=None):
        image = {"alt": self.alt} | ({"classes": " ".join(self.classes)} if self.classes else {})
        figure = {"figure": {"name": self.name, "caption": self.caption}, "image": image}
        # needs_background: JupyterLab's dark theme. The width undoes the double resolution.
        meta = {"needs_background": "light", "lab_figure": figure, "image/png": {"width": self.width}}
        return {"image/png": self.png, "text/plain": repr(self)}, meta


def figure(rows=1, cols=1, *, width=7.0, height=3.2, **kwargs):
    """(fig, axes) in the lab's style; width and height in inches; the rest goes to matplotlib's `subplots`."""
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(rows, cols, figsize=(width, height), **kwargs)
    if cols > 1:  # a label on the left of a panel stays clear of its neighbour
        fig.get_layout_engine().set(wspace=0.08)
    return fig, axes


def bare(ax):
    """No frame, no ticks, no grid: a drawing, whose axes mean nothing. Tick labels stay."""
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.grid(False)


def dumbbells(groups, *, width=7.0):
    """A figure of what changes: {group: rows of (name, what, unit, without, with)}, an arrow from one to the other.

    A row has a scale of its own, from 0 to the larger of its two numbers, since units differ.
    """
    count = sum(len(rows) for rows in groups.values()) + 1.1 * len(groups)
    fig, ax = figure(width=width, height=0.52 * count + 0.3)
    y = 0
    for group, rows in groups.items():
        ax.text(-0.1, y - 0.2, group, weight="bold", va="center", fontsize=12)
        y += 1
        for name, what, unit, *pair in rows:
            x0, x1 = (x / max(pair) for x in pair)
            said0, said1 = (f"{x:,.1f}".removesuffix(".0") + f" {unit}" * bool(unit) for x in pair)
            ax.text(0, y - 0.43, f"{name}: {what}", va="center", color="#333333")
            ax.plot([0, 1], [y, y], color="#dddddd", lw=0.8, ls="-", marker="", zorder=0)
            if x0 == x1:
                ax.text(0.96, y - 0.04, "nothing to do", va="bottom", ha="right", color="#555555")
            else:
                ax.annotate("", (x1, y), (x0, y), arrowprops={"arrowstyle": "->", "color": "#555555", "shrinkB": 5})
                _beside(ax, x0, y, said0, right=x0 > x1)
            _beside(ax, x1, y, said1, right=x1 >= x0, color=COLORS["blue"], weight="bold")
            ax.plot(x0, y, color="#999999", marker="o", ls="", ms=8)
            ax.plot(x1, y, color=COLORS["blue"], marker="o", ls="", ms=8)
            y += 1
        y += 0.1
    ax.plot([], [], color="#999999", marker="o", ls="", ms=8, label="without")
    ax.plot([], [], color=COLORS["blue"], marker="o", ls="", ms=8, label="with")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 0.965), ncols=2, frameon=False)
    ax.set(xlim=(-0.13, 1.16), ylim=(y - 0.4, -0.5))
    ax.axis("off")
    return fig


def _beside(ax, x, y, words, *, right, **kwargs):
    side = {"ha": "left" if right else "right", "va": "center", "textcoords": "offset points"}
    ax.annotate(words, (x, y), (7 if right else -7, 0), **side, **kwargs)


def fits(fig):
    """Whether the smallest text of a drawn figure can be read where the figure is as wide as a phone."""
    texts = (text for text in fig.findobj(Text) if text.get_visible() and text.get_text().strip())
    smallest = min((text.get_fontsize() for text in texts), default=STYLE["font.size"])  # points
    inches = max(fig.get_figwidth(), PHONE / fig.dpi)
    return bool(smallest / 72 * PHONE / inches >= LEGIBLE)


def show(fig, *, name, caption, alt, keep=False):
    """Close `fig` and return it as a `Figure`, the last expression of its cell.

    name: unique in the book, e.g. "fig-waves". caption: MyST Markdown, what to see in it. alt: for those who cannot
    see it: the kind of plot, the axes, and what it shows; not a repetition of the caption. keep: the dark theme leaves
    the figure as it is, for a heat map, where bright means much; its words are grey, on no background.
    On a phone a figure that `fits` is as wide as the screen; others keep their size and scroll.
    Raises ValueError when one is missing or the alt text is too short to say anything.
    """
    if not name.startswith("fig-"):
        raise ValueError(f"name: got {name!r}, expected it to start with 'fig-'")
    if not caption.strip():
        raise ValueError("caption: got an empty text, expected what to see in the figure")
    if len(alt.split()) < 5 or "\n" in alt:
        raise ValueError(f"alt: got {alt!r}, expected one line of at least five words")
    if keep:
        for text in fig.findobj(Text):
            text.set_color(MIDDLE)
    buffer = io.BytesIO()
    with plt.rc_context(STYLE):
        fig.savefig(buffer, format="png", dpi=2 * fig.dpi, transparent=keep, metadata={"Software": None})
    width = round(fig.get_figwidth() * fig.dpi)
    classes = ["lab-keep"] * keep + ["lab-fits"] * fits(fig)
    plt.close(fig)
    return Figure(buffer.getvalue(), name, " ".join(caption.split()), alt.strip(), width, classes)
