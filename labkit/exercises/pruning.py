"""Exercises of chapter 04. The docstrings are the tasks."""

import torch

from labkit import masks, sparse24
from labkit.exercises import device, exercise, expect, kernel_exercise
from labkit.sparsegpt import sparsegpt


def _normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise(
    hints=[
        "Who is compared with whom? The weights of one row, or all of them.",
        "View the weights as one row for the layer; then both are the same sort.",
        "order = rows.argsort(dim=-1, stable=True); the first int(n * sparsity) columns of order go.",
    ],
    bugs=[
        ("rows = w.abs() if per_row else w.abs().view(1, -1)", "rows = w.abs()", "always per row"),
        ("rows = w.abs() if per_row else w.abs().view(1, -1)", "rows = w.abs().view(1, -1)", "always per layer"),
        ("int(rows.shape[1] * sparsity)", "int(w.shape[1] * sparsity)", "counts a row even for the layer"),
        ("keep.scatter_(1, gone, False)", "keep.scatter_(1, gone, True)", "removes nothing"),
        ("rows = w.abs() if", "rows = w if", "forgets the sign"),
        ("int(rows.shape[1] * sparsity)", "round(rows.shape[1] * sparsity)", "rounds up where n * sparsity is 1.75"),
        (
            "rows.argsort(dim=-1, stable=True)[:, : int(rows.shape[1] * sparsity)]",
            "rows.topk(int(rows.shape[1] * sparsity), largest=False).indices",
            "any of equal ones goes",
        ),
        ("torch.ones_like(rows, dtype=torch.bool)", "torch.ones_like(rows)", "numbers instead of bools"),
    ],
)
def magnitude(w, sparsity, per_row):
    """Which weights stay, by magnitude: exactly int(n * sparsity) of n go.

    n is a row's weights or all of the layer's. w [N, K]; of equal ones the first goes.
    Returns [N, K] bool, True where kept.
    """
    # >>> your code
    rows = w.abs() if per_row else w.abs().view(1, -1)
    gone = rows.argsort(dim=-1, stable=True)[:, : int(rows.shape[1] * sparsity)]
    keep = torch.ones_like(rows, dtype=torch.bool)
    keep.scatter_(1, gone, False)
    # <<< your code
    return keep.view(w.shape)


@magnitude.case("rows of one size")
def _(fn):
    w = _normal(0, 6, 10)
    for per_row in (True, False):
        want = masks.magnitude_mask(w, 0.5, per="row" if per_row else "layer")
        got = fn(w, 0.5, per_row)
        expect(got, want, f"per_row {per_row}")
        expect(got.dtype, torch.bool, "the dtype of the mask")


@magnitude.case("one row is ten times as small: the layer empties it, the row does not")
def _(fn):
    w = _normal(1, 4, 8)
    w[2] /= 1000
    expect(fn(w, 0.25, False)[2].sum().item(), 0, "kept in the small row, per layer")
    expect(fn(w, 0.25, True)[2].sum().item(), 6, "kept in the small row, per row")


@magnitude.case("ties, and a share that does not come out even")
def _(fn):
    expect(fn(torch.ones(2, 5), 0.35, True).tolist(), [[False, True, True, True, True]] * 2, "kept at 0.35")
    expect(fn(torch.ones(1, 99), 0.5, False).tolist(), [[False] * 49 + [True] * 50], "kept of 99 equal ones")
    expect(fn(torch.ones(2, 5), 0.5, True).tolist(), [[False, False, True, True, True]] * 2, "kept")


@exercise(
    hints=[
        "How many scores are at or below the one at index int(n * sparsity)?",
        "The value at index i has i values before it, and is itself removed.",
        "Values that equal the threshold all go: count them, do not assume them different.",
    ],
    bugs=[
        ("score <= threshold", "score < threshold", "the mask of a paper, not of the code"),
        ("[int(len(score) * sparsity)]", "[int(len(score) * sparsity) - 1]", "the threshold one too low"),
        ("(score <= threshold).sum()", "int(len(score) * sparsity) + 1", "forgets that equal scores all go"),
    ],
)
def removed_by_threshold(score, sparsity):
    """How many of the scores [n] SparseGPT's official code removes (an int).

    So does its code for magnitude pruning: with threshold = sort(score)[int(n * sparsity)],
    what is <= threshold goes.
    """
    # >>> your code
    threshold = score.sort().values[int(len(score) * sparsity)]
    count = (score <= threshold).sum()
    # <<< your code
    return int(count)


@removed_by_threshold.case("different scores: one more than the share")
def _(fn):
    for sparsity in (0.0, 0.29, 0.5):
        expect(fn(_normal(2, 100), sparsity), int(100 * sparsity) + 1, f"removed at {sparsity}")


@removed_by_threshold.case("a block as SparseGPT's: 64 rows of 128 columns")
def _(fn):
    w = _normal(3, 64, 128)
    _, keep = sparsegpt(w, torch.eye(128), sparsity=0.5)
    expect(fn((w**2).flatten(), 0.5), int((~keep).sum()), "removed")


@removed_by_threshold.case("equal scores all go")
def _(fn):
    expect(fn(torch.tensor([1.0, 2, 2, 2, 2, 3]), 0.5), 5, "removed")


@exercise(
    hints=[
        "In which of the two does 1:4 remove 75 %?",
        "NVIDIA's n:m and this lab's: n of m weights are not zero. --prunen n --prunem m: n of m become zero.",
        "The official arguments are m - n zeros in m.",
    ],
    bugs=[
        ("return m - n, m", "return n, m", "passes the kept ones on as zeros"),
        ("return m - n, m", "return m, m - n", "the two swapped"),
        ("return m - n, m", "return m // 2, m", "right for 2:4 and 4:8 only"),
    ],
)
def official_arguments(n, m):
    """(prunen, prunem) for SparseGPT's and Wanda's code, so that n of every m weights are KEPT."""
    # >>> your code
    return m - n, m
    # <<< your code


def _zeros(prunen, prunem):
    """Weights a group that the official loop sets to zero: topk(prunen, largest=False) of every prunem columns."""
    assert 0 <= prunen <= prunem, f"got prunen {prunen}, prunem {prunem}: it would remove {prunen} of {prunem}"
    w = _normal(4, 3, 24).abs()
    return [len(group.topk(prunen, largest=False).indices) for group in w[0].split(prunem)]


@official_arguments.case("2:4 hides the difference, 1:4 does not")
def _(fn):
    for n, m in ((2, 4), (1, 4), (3, 4), (4, 8)):
        zeros = _zeros(*fn(n, m))
        expect(zeros, [m - n] * (24 // m), f"zeros in every group for {n}:{m}")


@exercise(
    hints=[
        "Shift two bits at a time: byte >> 0, >> 2, >> 4, >> 6, each & 3.",
        "Kept weight j of a row comes from column 4 * (j // 2) + index.",
        "Build the columns of all kept weights first; then one scatter.",
    ],
    bugs=[
        ("byte >> 2 * i & 3", "byte >> 6 - 2 * i & 3", "reads the highest bits first"),
        ("4 * (j // 2) + index[j]", "2 * (j // 2) + index[j]", "groups of two"),
        ("4 * (j // 2) + index[j]", "4 * j + index[j]", "one kept weight a group"),
    ],
)
def unpack_row(values, meta):
    """The dense row of a 2:4 weight, a list of K numbers.

    values: a list of K/2 numbers; meta: a list of K/8 bytes (ints).
    """
    dense = [0.0] * (2 * len(values))
    # >>> your code
    index = [byte >> 2 * i & 3 for byte in meta for i in range(4)]
    for j, value in enumerate(values):
        dense[4 * (j // 2) + index[j]] = value
    # <<< your code
    return dense


@unpack_row.case("two groups, by hand")
def _(fn):
    expect(fn([1.0, 4.0, 6.0, 7.0], [0b10_01_11_00]), [1.0, 0.0, 0.0, 4.0, 0.0, 6.0, 7.0, 0.0], "row")


@unpack_row.case("a random row of 64")
def _(fn):
    w = _normal(5, 1, 64)
    keep = masks.nm_mask(w.abs(), 2, 4)
    values, meta = sparse24.pack_24(w, keep)
    expect(fn(values[0].tolist(), meta[0].tolist()), (w * keep)[0].tolist(), "row")


@exercise(
    hints=[
        "Removing w_j changes the output by -w_j x_j. What must the others add up to?",
        "The correction of column c > j is -(w_j / U[j, j]) * U[j, c].",
        "row[j + 1 :] -= row[j] / u[j, j] * u[j, j + 1 :], and then row[j] = 0.",
    ],
    bugs=[
        ("row[j] / u[j, j]", "row[j]", "not divided by the diagonal"),
        ("row[j] / u[j, j]", "row[j] / u[j, j] ** 2", "divided by the score's denominator"),
        ("u[j, j + 1 :]", "u[j + 1 :, j]", "the column of U: zeros, nothing moves"),
        ("row[j + 1 :] -=", "row[j + 1 :] +=", "the error is doubled, not made up for"),
    ],
)
def remove_weight(row, u, j):
    """SparseGPT's step for one row: weight j goes, the weights to its right make up for it.

    row [K], u [K, K] upper triangular with U^T U the inverse of the Hessian. Returns the new row.
    """
    row = row.clone()
    # >>> your code
    row[j + 1 :] -= row[j] / u[j, j] * u[j, j + 1 :]
    row[j] = 0.0
    # <<< your code
    return row


@remove_weight.case("the best that is left: least squares on the columns to the right")
def _(fn):
    x = _normal(6, 200, 6) @ _normal(7, 6, 6)
    u = torch.linalg.cholesky(torch.linalg.inv(x.T @ x), upper=True)
    row = _normal(8, 6)
    for j in (0, 2, 4):
        best = torch.linalg.lstsq(x[:, j + 1 :], x[:, j] * row[j]).solution
        expect(fn(row, u, j)[j + 1 :], row[j + 1 :] + best, f"right of {j}", atol=1e-3, rtol=1e-3)
        expect(fn(row, u, j)[: j + 1], torch.cat((row[:j], torch.zeros(1))), f"up to {j}")


@remove_weight.case("the last column has nobody to its right")
def _(fn):
    expect(fn(torch.tensor([1.0, 2.0]), torch.eye(2), 1), torch.tensor([1.0, 0.0]), "row")


@kernel_exercise(
    hints=[
        "Two kept weights share a group of four columns, four share a byte of indices.",
        "Kept weight j multiplies column 4 * (j // 2) + index of x; its index is two bits of byte j // 4.",
        "Mask every load with j < k // 2, the one of x as well: what is multiplied by 0 is read all the same.",
        "Several programs add to y[row]. A load and a store are two steps, tl.atomic_add is one.",
    ],
    bugs=[
        ("tl.load(x_ptr + 4 * (j // 2) + index, mask=mask, other=0)", "tl.load(x_ptr + 4 * (j // 2) + index)",
         "reads x behind its end: only compiled code tells"),
        ("meta_ptr + row * (k // 8) + j // 4, mask=mask, other=0)", "meta_ptr + row * (k // 8) + j // 4)",
         "reads indices behind the last row: only compiled code tells"),
        ("tl.atomic_add(y_ptr + row, total)", "tl.store(y_ptr + row, tl.load(y_ptr + row) + total)",
         "a race of two programs: only compiled code tells"),
        ("tl.atomic_add(y_ptr + row, total)", "tl.store(y_ptr + row, total)", "the last piece wins"),
        ("4 * (j // 2) + index", "2 * (j // 2) + index", "groups of two"),
        ("2 * (j % 4)", "6 - 2 * (j % 4)", "reads the highest bits first"),
        ("row * (k // 8) + j // 4", "row * (k // 8) + j // 8", "eight indices a byte"),
    ],
)  # fmt: skip
def dot_24(values_ptr, meta_ptr, x_ptr, y_ptr, k, BLOCK: "tl.constexpr"):
    """Add a piece of a packed row times x to y[row]: its BLOCK kept weights from piece * BLOCK on.

    values [N, k/2], x [k], y [N], 0 at first: int32, as in a quantised layer; meta [N, k/8] bytes.
    One program per row and piece; the last piece may be shorter than BLOCK.
    """
    row, piece = tl.program_id(0), tl.program_id(1)
    j = piece * BLOCK + tl.arange(0, BLOCK)  # the row's kept weights, in order
    # >>> your code
    mask = j < k // 2
    value = tl.load(values_ptr + row * (k // 2) + j, mask=mask, other=0)
    byte = tl.load(meta_ptr + row * (k // 8) + j // 4, mask=mask, other=0)
    index = (byte >> 2 * (j % 4)) & 3
    x = tl.load(x_ptr + 4 * (j // 2) + index, mask=mask, other=0)
    total = tl.sum(value * x, 0)
    tl.atomic_add(y_ptr + row, total)
    # <<< your code


def _dot_24(fn, n, k, block):
    w, x = (10 * _normal(9, n, k)).round(), (10 * _normal(10, k)).round()
    values, meta = sparse24.pack_24(w, masks.nm_mask(w.abs(), 2, 4))
    want = (sparse24.unpack_24(values, meta) @ x).int()
    values, x, y = (part.int().to(device()) for part in (values, x, 0 * want))
    fn[(n, -(-k // 2 // block))](values, meta.to(device()), x, y, k, BLOCK=block)
    expect(y.cpu(), want, "y")


@dot_24.case("three rows of one piece")
def _(fn):
    _dot_24(fn, 3, 64, 32)


@dot_24.case("one row of 40 columns: the third piece is shorter than the others")
def _(fn):
    _dot_24(fn, 1, 40, 8)
