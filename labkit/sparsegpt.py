"""SparseGPT (Frantar & Alistarh, ICML 2023, arXiv 2301.00774): remove a weight, and let those to its right make up.

For a layer y = w x the Hessian of the squared output error is H = 2 X X^T, the same for every row of w. Columns are
treated from left to right. Removing w_j costs w_j^2 / U_jj^2, and what it leaves undone is best repaired by adding
-(w_j / U_jj) U[j, j+1:] to the columns not yet treated, with U upper triangular and U^T U = H^-1.
"""

import torch

from labkit import args
from labkit.masks import nm_mask


class Hessian:
    """H = 2 X X^T of a layer, a running mean over calibration sequences: add(x) as they come, then `value` [K, K]."""

    def __init__(self, columns, device="cpu"):
        self.value, self.count = torch.zeros(columns, columns, device=device), 0

    def add(self, x):
        """x [B, T, K], or [T, K] for one sequence."""
        batch = 1 if x.dim() == 2 else len(x)
        x = x.reshape(-1, x.shape[-1])
        self.value *= self.count / (self.count + batch)
        self.count += batch
        x = (2 / self.count) ** 0.5 * x.float()
        self.value += x.t() @ x


def inverse_factor(hessian, damp, overwrite=False):
    """U [K, K], upper triangular, U^T U the inverse of H + damp * mean(diag H) * I.

    A feature that was never seen gets a 1 on the diagonal first. overwrite: U takes the place of hessian, which is
    otherwise left as it is. Raises ValueError where H is not positive definite.
    """
    h = hessian if overwrite else hessian.clone()
    h = h.t()  # the same matrix in LAPACK's layout: it works in place, nothing is copied
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    args.expect(bool(diagonal.isfinite().all()), "hessian", "values that are not finite", "a finite matrix")
    for upper in (False, True):
        info = torch.linalg.cholesky_ex(h, upper=upper, out=(h, torch.empty((), dtype=torch.int32, device=h.device)))[1]
        what = f"a matrix that is not positive definite (Cholesky stops at row {int(info)} of {len(h)})"
        args.expect(int(info) == 0, "hessian", what, f"more calibration text, or a damp above {damp:g}")
        if not upper:
            torch.cholesky_inverse(h, out=h)
    return h


def sweep(wt, u, *, sparsity, n, m, block_size, observe):
    """Remove and make up, column by column: wt [K, N], the weight transposed, is changed in place. Returns keep [K, N].

    u [K, K] from `inverse_factor`; the rest as in `sparsegpt`.
    """
    mask = torch.ones_like(wt, dtype=torch.bool)
    update = torch.empty_like(wt[:block_size])
    for start in range(0, len(wt), block_size):
        block, keep = wt[start : start + block_size], mask[start : start + block_size]
        stop = start + len(block)
        u_block = u[start:stop, start:stop]
        scale = u_block.diagonal()[:, None]
        errors = torch.empty_like(block)
        if sparsity is not None and block.numel():
            score = block**2 / scale**2
            keep[:] = score > score.flatten().kthvalue(int(score.numel() * sparsity) + 1).values
        for j, column in enumerate(block):
            if n is not None and j % m == 0:
                score = block[j : j + m] ** 2 / scale[j : j + m] ** 2
                keep[j : j + m] = nm_mask(score.t(), n, m).t()
            torch.div(column * ~keep[j], scale[j], out=errors[j])
            column.masked_fill_(~keep[j], 0)
            rest = block[j + 1 :]
            rest -= torch.mul(u_block[j, j + 1 :, None], errors[j], out=update[: len(rest)])
            if observe:
                observe(start + j, wt, mask, errors[j])
        # Columns beyond the block get all its corrections at once: one matrix product instead of many updates.
        wt[stop:].addmm_(u[start:stop, stop:].t(), errors, alpha=-1)
    return mask


@torch.no_grad()
def sparsegpt(
    w, hessian, *, sparsity=None, n=None, m=None, block_size=128, damp=0.01, overwrite=False, observe=None
):  # fmt: skip
    """Prune w [N, K] and adjust the weights that stay. hessian [K, K]: `Hessian.value` of the layer's inputs.

    sparsity: the share of every block of `block_size` columns that is removed, by one threshold for all its rows; as
    in the official code all scores <= the threshold go, floor(count * sparsity) + 1 weights. Or n of m neighbours of a
    row, chosen when their turn comes. Columns that were never seen (zeros in H) become 0. damp: share of the mean
    diagonal that is added to it. overwrite: hessian may be used as workspace, else neither argument is changed.
    Computed in fp32 (fp64 for fp64 weights).
    observe(column, weights [K, N], keep [K, N], errors [N]): called after every column, for those who want to watch.

    Returns (w_new [N, K] in w.dtype, mask [N, K] bool, True where kept). Raises ValueError naming the argument, also
    where the Hessian is not positive definite. Source: the paper's Algorithm 1, with the official code's details.
    """
    args.tensor("w", w, ("n", "k"), dtypes=args.REFERENCE_FLOATS)
    columns, dtype = w.shape[1], torch.promote_types(w.dtype, torch.float32)
    args.tensor("hessian", hessian, (columns, columns), like=w, dtypes=(torch.float32, torch.float64))
    args.sparsity_pattern(sparsity, n, m, columns, below_one=True)
    ok = isinstance(block_size, int) and block_size >= 1 and (m is None or block_size % m == 0)
    args.expect(ok, "block_size", block_size, "an int >= 1" + (f", a multiple of m = {m}" if m else ""))
    args.expect(damp >= 0, "damp", damp, "a number >= 0")
    unseen = hessian.diagonal() == 0
    u = inverse_factor(hessian.to(dtype), damp, overwrite)
    wt = w.to(dtype).t().clone(memory_format=torch.contiguous_format)  # a column of w is a row here; never w itself
    wt[unseen] = 0
    mask = sweep(wt, u, sparsity=sparsity, n=n, m=m, block_size=block_size, observe=observe)
    del u  # before the results are copied
    return wt.t().to(w.dtype, memory_format=torch.contiguous_format), mask.t().contiguous()
