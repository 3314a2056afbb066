"""Which weights to keep: masks from magnitudes and from Wanda's score, unstructured or n of m. True means kept.

Weights are [N, K], out by in features, as in `nn.Linear`. Of equal scores the one at the lower index is removed.
"""

import torch

from labkit import args


def _largest(score, num_removed):
    """True except at the num_removed smallest scores of every row [N, K]; ties: the lower index goes.

    No sort: the num_removed-th smallest score of a row parts it, but for those that equal it.
    """
    if num_removed == 0:
        return torch.ones_like(score, dtype=torch.bool)
    limit = score.kthvalue(num_removed, dim=-1, keepdim=True).values  # [N, 1]
    keep = score > limit
    missing = score.shape[1] - num_removed - keep.sum(-1)  # how many of the equal ones stay, from the right
    rows = missing.nonzero()[:, 0]
    if len(rows):
        equal = score[rows] == limit[rows]
        keep[rows] |= equal & (equal.cumsum(-1) > (equal.sum(-1) - missing[rows])[:, None])
    return keep


def magnitude_mask(w, sparsity, *, per="row"):
    """Remove the smallest weights: exactly floor(n * sparsity) of the n weights of a row, or of the whole layer.

    w [N, K]; per "row" | "layer"; ties: the lower index goes. Returns [N, K] bool.
    The official code of SparseGPT and Wanda compares per layer and removes one weight more, see `labkit.sparsegpt`.
    Raises ValueError naming the argument.
    """
    args.tensor("w", w, ("n", "k"), dtypes=args.REFERENCE_FLOATS)
    args.share("sparsity", sparsity)
    args.expect(per in ("row", "layer"), "per", repr(per), "'row' or 'layer'")
    rows = w.abs() if per == "row" else w.abs().reshape(1, -1)
    return _largest(rows, int(rows.shape[1] * sparsity)).view(w.shape)


def nm_mask(score, n, m):
    """Keep the n largest of every m neighbouring scores of a row: score [N, K], K a multiple of m -> [N, K] bool.

    n:m counts what is KEPT, as NVIDIA's 2:4 does. The official codes of SparseGPT and Wanda count zeros instead, which
    only an unequal pattern such as 1:4 shows. Raises ValueError naming the argument.
    """
    args.tensor("score", score, ("n", "k"), dtypes=args.REFERENCE_FLOATS)
    args.n_of_m(n, m, score.shape[1])
    lanes = score.unflatten(1, (-1, m)).unbind(-1)  # m times [N, K/m]
    keep = torch.empty_like(score, dtype=torch.bool).unflatten(1, (-1, m))
    for i, mine in enumerate(lanes):
        # How many of the group go before this one: the smaller, and the equal to the left of it.
        rank = sum(((other <= mine) if j < i else (other < mine)).byte() for j, other in enumerate(lanes) if j != i)
        keep[..., i] = rank >= m - n if m > 1 else True
    return keep.view(score.shape)


def wanda_score(w, x_norm):
    """|w| * x_norm, at least fp32: w [N, K], x_norm [K] the norm of each input feature -> [N, K]."""
    args.wanda(w, x_norm, 0.0, None, None, dtypes=args.REFERENCE_FLOATS)
    return w.abs().to(torch.promote_types(w.dtype, torch.float32)) * x_norm


def wanda_mask(w, x_norm, *, sparsity=None, n=None, m=None):
    """Wanda (Sun et al. 2024, section 3): compare |w| * x_norm within each output row, or n of m.

    w [N, K]; x_norm [K], as `InputNorm` collects it. Removes exactly floor(K * sparsity) weights a row, or keeps n of
    every m neighbours. The kept weights stay as they are. Returns [N, K] bool. Raises ValueError naming the argument.
    """
    args.wanda(w, x_norm, sparsity, n, m, dtypes=args.REFERENCE_FLOATS)
    score = wanda_score(w, x_norm)
    return nm_mask(score, n, m) if sparsity is None else _largest(score, int(w.shape[1] * sparsity))


class InputNorm:
    """The norm of every input feature of a layer, over calibration sequences: add(x) as they come, then `value` [K].

    A running mean over sequences of the squared norms, so that its square root has the scale of one sequence.
    """

    def __init__(self, columns, device="cpu"):
        self.mean_square, self.count = torch.zeros(columns, device=device), 0

    def add(self, x):
        """x [B, T, K], or [T, K] for one sequence."""
        x = x.unsqueeze(0) if x.dim() == 2 else x
        self.count += len(x)
        share = len(x) / self.count
        squares = x.float().square().sum((0, 1)) / len(x)
        self.mean_square += share * (squares - self.mean_square)

    @property
    def value(self):
        return self.mean_square.sqrt()
