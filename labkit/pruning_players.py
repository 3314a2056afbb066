"""What the chapter on pruning steps through. Every number comes from a real run of the function it shows."""

import numpy as np
import torch

from labkit import player
from labkit.check import randn
from labkit.masks import magnitude_mask, wanda_mask, wanda_score
from labkit.sparse24 import indices_24, pack_24
from labkit.sparsegpt import Hessian, inverse_factor, sparsegpt


def small_layer(rows=4, columns=8, seed=3):
    """w [rows, columns] and inputs x [200, columns], every feature 0.8 of its neighbour and something new."""
    rng = np.random.default_rng(seed)
    w, x = randn(rng, rows, columns), randn(rng, 200, columns)
    for j in range(1, columns):
        x[:, j] = 0.8 * x[:, j - 1] + 0.6 * x[:, j]
    return w, x


def _number(value):
    return f"{value:.2f}" if value else "0"


# ---- SparseGPT


def sweep(sparsity=0.5, **layer):
    """A run of SparseGPT, watched: (w [N, K], [(weights [N, K], keep [N, K], lost)] after each column).

    lost: the share of the output's energy, if one stopped there.
    """
    w, x = small_layer(**layer)
    hessian, seen = Hessian(w.shape[1]), []
    hessian.add(x)

    def observe(column, weights, keep, errors):
        now = weights.t().clone()
        seen.append((now, keep.t().clone(), ((x @ (w - now).T).square().sum() / (x @ w.T).square().sum()).item()))

    sparsegpt(w, hessian.value, sparsity=sparsity, block_size=w.shape[1], observe=observe)
    return w, seen


def sweep_player(sparsity=0.5):
    """SparseGPT column by column: a weight goes, and those to its right in the same row make up for it."""
    w, seen = sweep(sparsity)
    rows, columns = w.shape
    keep = seen[0][1]  # chosen once for the block

    def frame(text, j, before, now, lost):
        def cell(r, c):
            if c <= j:
                return ("blue" if keep[r, c] else "muted", _number(now[r, c]))
            still = "" if keep[r, c] else "outline"
            return ("orange" if now[r, c] != before[r, c] else still, _number(now[r, c]))

        grid = [[cell(r, c) for c in range(columns)] for r in range(rows)]
        return {"text": text, "weights": grid, "state": {"share of the output lost": f"{lost:.4f}"}}

    chosen = "The dense weights. Outlined: what the threshold has chosen, once for the whole block."
    steps, before = [frame(chosen, -1, w, w, 0.0)], w
    for j, (now, _, lost) in enumerate(seen):
        gone = [str(r) for r in range(rows) if not keep[r, j]]
        where = "row " + gone[0] if len(gone) == 1 else f"rows {', '.join(gone[:-1])} and {gone[-1]}" if gone else ""
        then = "the rest of the row moves" if j + 1 < columns else "nothing is left to the right to make up for it"
        text = f"Column {j} goes in {where}; {then}." if gone else f"Column {j} stays everywhere."
        steps.append(frame(text, j, before, now, lost))
        before = now
    panels = {
        "weights": player.Grid(rows, columns, col_labels=range(columns), row_labels=[f"row {r}" for r in range(rows)]),
        "state": player.Values(["share of the output lost"]),
    }
    legend = {"muted": "removed", "blue": "kept, final", "orange": "changed by this column", "outline": "will go"}
    caption = "A run of SparseGPT on a layer with correlated inputs, half of the block removed."
    return player.Stepper("The error is pushed to the right", panels, steps, legend=legend, caption=caption)


# ---- Wanda


RULES = ("magnitude, per layer", "magnitude, per row", "Wanda")


def choose(w, x_norm, rule, sparsity=0.5):
    """The mask [N, K] of one of RULES."""
    if rule == "Wanda":
        return wanda_mask(w, x_norm, sparsity=sparsity)
    return magnitude_mask(w, sparsity, per=rule.rsplit(" ", 1)[1])


def uneven_rows():
    """w [4, 8]; its first row is small, its last one large: per layer and per row differ."""
    return small_layer(4, 8, seed=1)[0] * torch.tensor([0.1, 1.0, 1.0, 2.0])[:, None]


def wanda_player(norms=(1, 2, 4, 8, 16), feature=2):
    """Whom Wanda keeps in each row as one input feature grows, against magnitude, which does not look."""
    w = uneven_rows()

    def frame(rule, norm):
        x_norm = torch.ones(w.shape[1])
        x_norm[feature] = norm
        keep = choose(w, x_norm, rule)
        score = wanda_score(w, x_norm)
        shown = score if rule == "Wanda" else w.abs()
        cells = zip(keep.flatten().tolist(), shown.flatten().tolist())
        flat = [("blue" if k else "muted", f"{s:.2f}") for k, s in cells]
        grid = [flat[r : r + w.shape[1]] for r in range(0, len(flat), w.shape[1])]
        in_feature = int(keep[:, feature].sum())
        gone = (w * ~keep * x_norm).square().sum() / (w * x_norm).square().sum()
        text = (
            f"{rule}: {in_feature} of {len(w)} weights of feature {feature} stay; "
            f"kept a row: {', '.join(str(int(n)) for n in keep.sum(1))}."
        )
        return {"text": text, "score": grid, "state": {"output energy lost, inputs independent": f"{gone:.3f}"}}

    names = dict(col_labels=[f"x{c}" for c in range(w.shape[1])], row_labels=[f"row {r}" for r in range(len(w))])
    panels = {
        "score": player.Grid(*w.shape, **names),
        "state": player.Values(["output energy lost, inputs independent"]),
    }
    controls = {"rule": list(RULES), f"norm of x{feature}": list(norms)}
    legend = {"blue": "kept", "muted": "removed"}
    caption = "The numbers are what the rule compares: |w|, or |w| times the norm of the input."
    choice = dict(start=("Wanda", norms[0]), key=("Wanda", norms[-1]))
    return player.Explorer("Which weights stay?", controls, panels, frame, legend=legend, caption=caption, **choice)


# ---- 2:4


def pack_player(kernel, device="cpu"):
    """The way of a row of eight weights into the compressed format, and out of it again.

    kernel: `matmul_24`. Multiplied with the identity, it gives back the row that it builds in registers.
    """
    w = torch.tensor([[0.9, -0.1, 0.4, -1.2, 0.2, 1.5, -0.7, 0.3]])
    values, meta = pack_24(w, wanda_mask(w, torch.ones(8), n=2, m=4))
    index, back = indices_24(meta)[0].tolist(), kernel(*(x.to(device) for x in (torch.eye(8), values, meta))).t().cpu()
    colors = ("blue", "orange", "green", "purple")
    at = {4 * (j // 2) + i: color for (j, i), color in zip(enumerate(index), colors)}  # column of each kept weight
    plain = [[("", _number(x)) for x in w[0]]]
    marked = [[(at.get(c, "muted"), _number(x)) for c, x in enumerate(w[0])]]
    rebuilt = [[(at.get(c, "muted"), _number(x)) for c, x in enumerate(back[0])]]
    packed = [[(color, _number(x)) for color, x in zip(colors, values[0])]]
    bits = [[(color, f"{i:02b}") for color, i in zip(colors, index)]]
    byte, empty = f"{int(meta[0, 0]):08b} = {int(meta[0, 0])}", [["outline"] * 4]
    steps = [
        ("Eight weights: two groups of four.", plain, empty, empty, ""),
        ("The two largest of each group stay.", marked, empty, empty, ""),
        ("They move together: half the values.", marked, packed, empty, ""),
        ("Two bits each say where in its group a weight stood.", marked, packed, bits, ""),
        ("Four of them are a byte, the first one in the lowest bits.", marked, packed, bits, byte),
        ("The kernel builds the row again, in registers.", rebuilt, packed, bits, byte),
    ]  # fmt: skip
    panels = {
        "w": player.Grid(1, 8, col_labels=range(8), name="a row of w"),
        "values": player.Grid(1, 4, name="values"),
        "bits": player.Grid(1, 4, name="indices"),
        "meta": player.Values(["byte"]),
    }
    frames = [dict(text=t, w=r, values=v, bits=b, meta={"byte": m or ("outline", "")}) for t, r, v, b, m in steps]
    caption = "bf16: 16 bytes become 8 bytes of values and one byte of indices."
    return player.Stepper("2:4 packing", panels, frames, caption=caption)


# ---- the live cell


def try_pattern(kernel, sparsity, outlier, device="cpu"):
    """Prune a planted layer by magnitude and by Wanda's kernel, and say what is lost. For the live cell."""
    rng = np.random.default_rng(0)
    w, x = randn(rng, 16, 128, device=device), randn(rng, 512, 128, device=device)
    x[:, :4] *= outlier
    norm = x.square().sum(0).sqrt()
    masks = {"magnitude": magnitude_mask(w, sparsity), "Wanda": kernel(w, norm, sparsity=sparsity)}
    energy = (x @ w.T).square().sum()
    lost = {name: ((x @ (w * ~keep).T).square().sum() / energy).item() for name, keep in masks.items()}
    return f"{sparsity:.0%} removed, four features {outlier} times as large: " + ", ".join(
        f"{name} loses {share:.2%} of the output" for name, share in lost.items()
    )


def factor_error(columns, tokens, damp, seed=0):
    """Smallest diagonal entry of the factor U for few tokens, or the error's text: what too little calibration does."""
    x = randn(np.random.default_rng(seed), tokens, columns)
    hessian = Hessian(columns)
    hessian.add(x)
    try:
        return f"smallest U_jj {inverse_factor(hessian.value, damp).diagonal().min():.3g}"
    except ValueError as error:
        return f"refused: {error}"
