"""Exercises of the page "A first kernel": each is a Triton kernel. The docstrings are the tasks."""

import torch

from labkit.exercises import device, expect, kernel_exercise


def _numbers(*shape, seed=0, dtype=torch.float32):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device=device(), dtype=dtype)


# ---- 1. the mask


@kernel_exercise(
    hints=[
        "The program's number times BLOCK is where its elements begin; tl.arange(0, BLOCK) counts on from there.",
        "The last program has lanes without an element. A mask is True where there is one.",
        "mask = offs < n, and all three accesses need it: two loads and the store.",
    ],
    bugs=[
        ("tl.load(x_ptr + offs, mask=mask)", "tl.load(x_ptr + offs)",
         "x is read past its end: only the compiled run sees it"),
        ("a * x + y, mask=mask)", "a * x + y)", "the store has no mask"),
        ("tl.program_id(0) * BLOCK + ", "", "every program takes the first elements"),
        ("mask = offs < n", "mask = offs <= n", "one element too many"),
        ("a * x + y", "x + y", "a is forgotten"),
    ],
)  # fmt: skip
def masked_axpy(a, x_ptr, y_ptr, out_ptr, n, BLOCK: "tl.constexpr"):
    """out = a x + y for n numbers, BLOCK of them by each program; everything is contiguous.

    n need not be a multiple of BLOCK, and nothing outside of the n numbers may be read or written.
    """
    # >>> your code
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, a * x + y, mask=mask)
    # <<< your code


def _axpy(fn, n, block):
    x, y = _numbers(n), _numbers(n, seed=1)
    out = torch.full((n,), -1.0, device=device())
    fn[(-(-n // block),)](2.5, x, y, out, n, BLOCK=block)
    expect(out, 2.5 * x + y, "out")


@masked_axpy.case("256 numbers, two full programs")
def _(fn):
    _axpy(fn, 256, 128)


@masked_axpy.case("300 numbers: the last program is masked")
def _(fn):
    _axpy(fn, 300, 128)


# ---- 2. two passes over the tiles of a row


@kernel_exercise(
    hints=[
        "First pass: keep [BLOCK] sums of squares over the tiles, and reduce them once, after the loop.",
        "A masked lane must add nothing: give the load other=0.0.",
        "Second pass: load the tile again, multiply with rsqrt(sum / n + eps), and store it under the same mask.",
    ],
    bugs=[
        ("square += x * x", "square = x * x", "only the last tile is summed"),
        ("tl.sum(square, 0) / n", "tl.sum(square, 0) / BLOCK", "the mean over a tile instead of the row"),
        ("cols < n, other=0.0)", "cols < n + 1, other=0.0)", "the neighbour's first number is summed as well"),
        ("cols < n, other=0.0)", "cols < n)", "masked lanes hold anything, and are summed"),
        ("x = tl.load(x_ptr + cols, mask=cols < n)", "x = tl.load(x_ptr + cols)",
         "the second pass reads past the end: only the compiled run sees it"),
        ("x_ptr += row * stride", "x_ptr += row * n", "the stride is taken for the width"),
    ],
)  # fmt: skip
def row_rmsnorm(x_ptr, stride, out_ptr, n, eps, BLOCK: "tl.constexpr"):
    """out = x / sqrt(mean(x^2) + eps) of each row: x, out [rows, n], one program per row.

    Two passes over tiles of BLOCK. stride: elements from one row of x to the next; out is contiguous.
    """
    row = tl.program_id(0)
    # >>> your code
    x_ptr += row * stride
    out_ptr += row * n
    square = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < n, other=0.0)
        square += x * x
    rstd = tl.rsqrt(tl.sum(square, 0) / n + eps)
    for first in range(0, n, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < n)
        tl.store(out_ptr + cols, x * rstd, mask=cols < n)
    # <<< your code


def _rmsnorm(fn, rows, n, width):
    x = _numbers(rows, width)[:, :n]
    out = torch.full((rows, n), -1.0, device=device())
    fn[(rows,)](x, x.stride(0), out, n, 0.25, BLOCK=64)
    expect(out, x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.25), "out", atol=1e-4)


@row_rmsnorm.case("rows of two tiles")
def _(fn):
    _rmsnorm(fn, 2, 128, 128)


@row_rmsnorm.case("rows of 100 numbers that lie 150 apart")
def _(fn):
    _rmsnorm(fn, 3, 100, 150)


# ---- 3. strides


@kernel_exercise(
    hints=[
        "Element (i, j) of x lies at i * stride_m + j * stride_n.",
        "Rows [BLOCK, 1] and columns [1, BLOCK] together make the addresses of a tile [BLOCK, BLOCK].",
        "out is contiguous and [n, m]: its element (j, i) lies at j * m + i. The mask is that of x.",
    ],
    bugs=[
        ("cols[None, :] * m + rows[:, None]", "rows[:, None] * n + cols[None, :]", "it copies instead of transposing"),
        ("rows[:, None] * stride_m + cols[None, :] * stride_n", "rows[:, None] * stride_n + cols[None, :] * stride_m",
         "the strides are swapped"),
        ("cols[None, :] * stride_n", "cols[None, :]", "columns are taken for neighbours"),
        ("tl.load(x_ptr + at, mask=mask)", "tl.load(x_ptr + at)",
         "x is read past its end: only the compiled run sees it"),
        ("(rows < m)[:, None] & (cols < n)[None, :]", "(rows < n)[:, None] & (cols < m)[None, :]",
         "the sizes are swapped"),
    ],
)  # fmt: skip
def transposed_copy(x_ptr, stride_m, stride_n, out_ptr, m, n, BLOCK: "tl.constexpr"):
    """out = x^T: x [m, n] with any strides, out [n, m] contiguous.

    Program (i, j) copies one tile [BLOCK, BLOCK] of x.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # >>> your code
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    at = rows[:, None] * stride_m + cols[None, :] * stride_n
    tile = tl.load(x_ptr + at, mask=mask)
    tl.store(out_ptr + cols[None, :] * m + rows[:, None], tile, mask=mask)
    # <<< your code


def _transpose(fn, x):
    m, n = x.shape
    out = torch.full((n, m), -1.0, device=device())
    fn[(-(-m // 16), -(-n // 16))](x, *x.stride(), out, m, n, BLOCK=16)
    expect(out, x.T, "out")


@transposed_copy.case("a contiguous matrix [20, 33]")
def _(fn):
    _transpose(fn, _numbers(20, 33))


@transposed_copy.case("every second column of a matrix")
def _(fn):
    _transpose(fn, _numbers(16, 48)[:, ::2])


# ---- 4. a race


@kernel_exercise(
    hints=[
        "A tile [BLOCK_T, BLOCK_E] of routed, summed over its tokens, is one number per expert: tl.sum(tile, 0).",
        "Several programs add to the same numbers. In the interpreter they take turns; on a GPU they do not.",
        "tl.atomic_add(counts_ptr + experts, part, mask=...) adds as one step that no other program comes between.",
    ],
    bugs=[
        ("tl.atomic_add(counts_ptr + experts, part, mask=experts < num_experts)",
         "tl.store(counts_ptr + experts, tl.load(counts_ptr + experts, mask=experts < num_experts) + part, "
         "mask=experts < num_experts)", "programs overwrite each other's sums: only the compiled run sees it"),
        ("tl.atomic_add(", "tl.store(", "the last program overwrites all others"),
        ("part, mask=experts < num_experts)", "part)", "a 0 is added past the end: only the compiled run sees it"),
        ("(tokens < num_tokens)[:, None]", "(tokens < num_tokens + 1)[:, None]", "routed is read past its end"),
    ],
)  # fmt: skip
def expert_counts(routed_ptr, counts_ptr, num_tokens, num_experts, BLOCK_T: "tl.constexpr", BLOCK_E: "tl.constexpr"):
    """Counts the tokens of each expert: routed [num_tokens, num_experts] int32, 1 or 0.

    counts [num_experts] int32 starts at 0. Program i adds what its BLOCK_T tokens bring to all
    experts; BLOCK_E >= num_experts.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    # >>> your code
    mask = (tokens < num_tokens)[:, None] & (experts < num_experts)[None, :]
    tile = tl.load(routed_ptr + tokens[:, None] * num_experts + experts[None, :], mask=mask, other=0)
    part = tl.sum(tile, 0)
    tl.atomic_add(counts_ptr + experts, part, mask=experts < num_experts)
    # <<< your code


def _count(fn, num_tokens, num_experts, block_e):
    routed = (_numbers(num_tokens, num_experts) > 0.5).int()
    counts = torch.zeros(num_experts, dtype=torch.int32, device=device())
    fn[(-(-num_tokens // 16),)](routed, counts, num_tokens, num_experts, BLOCK_T=16, BLOCK_E=block_e)
    expect(counts, routed.sum(0).int(), "counts")


@expert_counts.case("64 tokens, 8 experts")
def _(fn):
    _count(fn, 64, 8, 8)


@expert_counts.case("50 tokens, 6 experts: both ends are masked")
def _(fn):
    _count(fn, 50, 6, 8)
