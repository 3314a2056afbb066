"""2:4 sparsity in memory: at most two of four neighbouring weights, and two bits for each that say where it stood.

bf16 takes 2 * 2 + 0.5 bytes for four weights instead of 8: 0.5625 of the dense bytes.
"""

import torch
import torch.nn.functional as F

from labkit import args


def pack_24(w, mask):
    """Compress w [N, K] to the weights that mask [N, K] keeps: values [N, K/2] and meta [N, K/8] uint8.

    Kept weight j of a row comes from column 4 * (j // 2) + index, and its two-bit index stands in byte j // 4, the
    first in the lowest bits. Of a group that keeps fewer than two, zeros fill up. In a group the indices rise.
    Raises ValueError naming the argument, also for a group of four that keeps more than two. K is a multiple of 8.
    """
    args.tensor("w", w, ("n", "k"), dtypes=args.REFERENCE_FLOATS)
    args.tensor("mask", mask, tuple(w.shape), like=w, dtype=torch.bool)
    args.expect(w.shape[1] % 8 == 0, "w (columns)", w.shape[1], "a multiple of 8")
    groups = mask.unflatten(1, (-1, 4))
    most = int(groups.sum(-1).max()) if mask.numel() else 0
    args.expect(most <= 2, "mask", f"a group of four that keeps {most}", "at most two")
    index = (~groups).byte().argsort(dim=-1, stable=True)[..., :2].sort(dim=-1).values  # kept ones first, then in order
    values = w.masked_fill(~mask, 0).unflatten(1, (-1, 4)).gather(2, index).flatten(1)
    bits = index.flatten(1).unflatten(1, (-1, 4)) << torch.tensor([0, 2, 4, 6], device=w.device)
    return values, bits.sum(-1).to(torch.uint8)


def indices_24(meta):
    """meta [N, K/8] -> the position of every kept weight within its group of four, [N, K/2] int64."""
    shifts = torch.tensor([0, 2, 4, 6], device=meta.device)
    return (meta.long()[..., None] >> shifts & 3).flatten(1)


def unpack_24(values, meta):
    """The dense weight [N, K] again, zeros where nothing was kept: values [N, K/2], meta [N, K/8] uint8."""
    groups = values.unflatten(1, (-1, 2))
    dense = torch.zeros(*groups.shape[:2], 4, dtype=values.dtype, device=values.device)
    return dense.scatter_add_(2, indices_24(meta).view(groups.shape), groups).flatten(1)


def matmul_24(x, values, meta):
    """y = x w^T with w compressed by `pack_24`: x [M, K], values [N, K/2] and meta [N, K/8] -> y [M, N] in x.dtype.

    Raises ValueError naming the argument.
    """
    args.sparse_24(x, values, meta, dtypes=args.REFERENCE_FLOATS)
    return F.linear(x, unpack_24(values, meta))
