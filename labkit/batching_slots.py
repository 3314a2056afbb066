"""Slots over time: which request has which place of the batch in every step. From a scheduler's run."""

from matplotlib.patches import Rectangle

from labkit import plot

# Okabe and Ito's, all light enough for a black letter.
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00")


def slots(seen, places):
    """[place][step]: (id, "prefill" or "decode"), or None where a place is empty. seen: of `batching_study.watch`.

    A request keeps its place until it leaves; one that enters takes the first place that is free.
    """
    grid, holds = [[None] * len(seen) for _ in range(places)], [None] * places
    for i, step in enumerate(seen):
        batch = step["batch"]
        doing = dict.fromkeys(batch.decode, "decode") | {id: "prefill" for id, _, _ in batch.prefill}
        holds = [id if id in doing else None for id in holds]
        for id in doing:
            if id not in holds:
                holds[holds.index(None)] = id
        for place, id in enumerate(holds):
            grid[place][i] = id and (id, doing[id])
    return grid


def draw(runs, places):
    """A figure of a panel a run, {name: what `watch` saw}: places of the batch over steps."""
    longest = max(map(len, runs.values()))
    fig, axes = plot.figure(len(runs), 1, width=8.0, height=1.7 * len(runs) + 0.3, sharex=True)
    for ax, (name, seen) in zip(axes, runs.items()):
        grid = slots(seen, places)
        ids = sorted({cell[0] for row in grid for cell in row if cell})
        for place, row in enumerate(grid, 1):
            for i, cell in enumerate(row):
                _cell(ax, i, place, cell, COLORS[ids.index(cell[0])] if cell else "white")
        # Everybody in the batch prefills: a whole batch enters.
        for i, step in enumerate(seen[1:], 1):
            if step["batch"].prefill and not step["batch"].decode:
                ax.axvline(i, color="#333333", lw=2, ls="-", marker="")
                ax.text(i, 0.42, "the next batch enters", ha="center", va="bottom", fontsize=9)
        idle = sum(cell is None for row in grid for cell in row)
        ax.text(longest + 0.4, (places + 1) / 2, f"{len(seen)} steps\n{idle} idle cells", va="center")
        ax.set(xlim=(0, longest), ylim=(places + 0.5, 0.5), yticks=range(1, places + 1), ylabel="place")
        ax.set_title(name, pad=14, loc="left")
        ax.grid(False)
    axes[-1].set(xticks=[i + 0.5 for i in range(longest)], xticklabels=range(1, longest + 1), xlabel="step")
    return fig


def _cell(ax, i, place, cell, color):
    hatch = "////" if cell and cell[1] == "prefill" else None
    edge = "#ffffff" if cell else "#bbbbbb"
    ax.add_patch(Rectangle((i, place - 0.45), 1, 0.9, facecolor=color, edgecolor=edge, lw=1.0, hatch=hatch))
    if cell:
        ax.text(i + 0.5, place, cell[0], ha="center", va="center", weight="bold")
    else:
        ax.plot([i, i + 1], [place + 0.45, place - 0.45], color="#999999", lw=1, ls="-", marker="")
        ax.text(i + 0.5, place, "idle", ha="center", va="center", fontsize=8, color="#555555")
