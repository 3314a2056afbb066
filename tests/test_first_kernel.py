"""The first kernels: sizes around the blocks' edges, strides, three dtypes, memory that must not be touched, errors."""

import numpy as np
import pytest
import torch
from far_apart import far_apart
from fresh_memory import nan_in_fresh_memory

from kernels import first_kernel as fk
from labkit import first_kernel as ref
from labkit import trace
from labkit.check import BF16, F16, F32, assert_matches, randn

# (old text, new text) of these files; tests/planted_bugs.py plants them one at a time.
PLANTED_BUGS = [
    ("kernels/first_kernel.py", "return offs, offs < n", "return offs, offs <= n"),
    ("kernels/first_kernel.py", "tl.program_id(0).to(tl.int64) * BLOCK", "tl.program_id(0) * BLOCK"),
    ("kernels/first_kernel.py", "x_ptr + offs * stride_x", "x_ptr + offs"),
    ("kernels/first_kernel.py", "cast(a * x + y, out_ptr.dtype.element_ty)", "(a * x + y).to(out_ptr.dtype.element_ty)"),
    ("kernels/first_kernel.py", "float(a), x, x.stride(0)", "int(a), x, x.stride(0)"),
    ("kernels/first_kernel.py", "x_ptr += row * stride_m", "x_ptr += row * n"),
    ("kernels/first_kernel.py", "acc += x.to(tl.float32)", "acc = cast(acc + x.to(tl.float32), x.dtype).to(tl.float32)"),
    ("kernels/first_kernel.py", "x_ptr + cols.to(tl.int64) * stride_n", "x_ptr + cols * stride_n"),
    ("kernels/first_kernel.py", "mask=cols < n, other", "mask=cols <= n, other"),
    ("kernels/first_kernel.py", "acc += x.to(tl.float32)", "acc = x.to(tl.float32)"),
    ("kernels/first_kernel.py", "mask_k = cols < k", "mask_k = cols < BLOCK_K"),
    ("kernels/first_kernel.py", "        cols = cols.to(tl.int64)\n", ""),
    ("kernels/first_kernel.py", "mask = mask_n[:, None] & mask_k[None, :]", "mask = mask_n[:, None]"),
    ("kernels/first_kernel.py", "acc += x[None, :]", "acc = x[None, :]"),
    ("kernels/first_kernel.py", "x_ptr + cols * stride_xk", "x_ptr + cols"),
    ("kernels/first_kernel.py", "if rows:", "if x.numel():"),
    ("kernels/first_kernel.py", 'args.tensor("w", w, ("n", len(x)), like=x, dtype=x.dtype)', 'args.tensor("w", w, ("n", len(x)))'),
    ("labkit/first_kernel.py", "x.sum(-1, dtype=softmax_dtype(x.dtype)).to(x.dtype)", "x.sum(-1, dtype=softmax_dtype(x.dtype))"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    nan_in_fresh_memory(monkeypatch)


def tensors(device, dtype, *shapes, strided=False):
    """Normal values in the middle of memory that is NaN. strided: every second row and column of it."""
    rng, made = np.random.default_rng(0), []
    for shape in shapes:
        step = 2 if strided else 1
        whole = torch.full([step * size + 2 for size in shape], float("nan"), dtype=dtype, device=device)
        part = whole[tuple(slice(1, 1 + step * size, step) for size in shape)]
        made.append(part.copy_(randn(rng, *shape, dtype=dtype, device=device)))
    return made


AXPY = (
    (0, F32, False, 2048), (1, BF16, False, 2048), (127, F16, False, 128), (128, BF16, False, 128), (129, F32, True, 128),
    (1001, BF16, True, 256), (2048, F16, False, 2048), (2049, BF16, False, 2048), (5, F32, False, 1),
)  # fmt: skip


@pytest.mark.parametrize("n, dtype, strided, block", AXPY, ids=str)
def test_axpy(n, dtype, strided, block, device):
    x, y = tensors(device, dtype, (n,), (n,), strided=strided)
    assert_matches(fk.axpy(-2.7, x, y, block=block), ref.axpy, -2.7, x, y)


def test_axpy_of_views_of_one_number_and_whole_factors(device):
    """A stride of 0; and 1 and 0, which Triton would compile in as constants of another kind."""
    (x,) = tensors(device, BF16, (1,))
    y = torch.arange(300, dtype=BF16, device=device)
    for a in (1, 0, 1.0, -3):
        assert_matches(fk.axpy(a, x.expand(300), y), ref.axpy, a, x.expand(300), y)


ROWS = (
    ((0, 5), F32, False), ((3, 0), BF16, False), ((1, 1), F16, False), ((3, 127), BF16, False), ((2, 128), F32, True),
    ((5, 129), F16, True), ((2, 2048), BF16, False), ((3, 4099), BF16, False), ((2, 5000), F16, False),
)  # fmt: skip


@pytest.mark.parametrize("shape, dtype, strided", ROWS, ids=str)
def test_row_sum(shape, dtype, strided, device):
    (x,) = tensors(device, dtype, shape, strided=strided)
    assert_matches(fk.row_sum(x), ref.row_sum, x)
    x = x.T.contiguous().T  # columns are neighbours
    assert_matches(fk.row_sum(x), ref.row_sum, x)


def test_row_sum_of_more_than_16_bits_can_count(device):
    """In fp16 a sum of ones ends at 2048, in bf16 at 256; both results are numbers of their dtype."""
    for dtype, n in ((F16, 4096), (BF16, 1024)):
        assert fk.row_sum(torch.ones(1, n, dtype=dtype, device=device)).tolist() == [n]
    x = torch.ones(1, 2048 * 260, dtype=BF16, device=device)  # 260 tiles: an element of the accumulator passes 256, too
    assert fk.row_sum(x).tolist() == [2048 * 260]


MATVEC = (
    (0, 8, F32, False), (3, 0, BF16, False), (1, 1, F16, False), (4, 127, BF16, False), (5, 128, F32, True), (6, 129, F16, True),
    (9, 1025, BF16, False), (3, 2100, F32, False), (7, 2049, F16, False),
)  # fmt: skip


@pytest.mark.parametrize("n, k, dtype, strided", MATVEC, ids=str)
def test_matvec(n, k, dtype, strided, device):
    x, w = tensors(device, dtype, (k,), (n, k), strided=strided)
    assert_matches(fk.matvec(x, w), ref.matvec, x, w)
    wt = w.T.contiguous().T  # columns are neighbours
    assert_matches(fk.matvec(x, wt), ref.matvec, x, wt)


@pytest.mark.parametrize("dim", [0, 1])
def test_offsets_beyond_32_bits(dim, device):
    rng = np.random.default_rng(0)
    w, x = randn(rng, 4, 4, dtype=BF16, device=device), randn(rng, 4, dtype=BF16, device=device)
    far = far_apart(w, dim)
    assert_matches(fk.row_sum(far), ref.row_sum, w)
    assert_matches(fk.matvec(x, far), ref.matvec, x, w)
    line = far_apart(x, 0)
    assert_matches(fk.axpy(2.0, line, x), ref.axpy, 2.0, x, x)
    assert_matches(fk.matvec(line, w), ref.matvec, x, w)


X, W = torch.zeros(4), torch.zeros(3, 4)
ERRORS = (
    (lambda ops: ops.axpy("2", X, X), "a: got str, expected a number"),
    (lambda ops: ops.axpy(2.0, [1.0], X), "x: got list, expected a tensor"),
    (lambda ops: ops.axpy(2.0, W, W), r"x \(shape\): got \(3, 4\), expected \[n\]"),
    (lambda ops: ops.axpy(2.0, X.int(), X), r"x \(dtype\): got torch.int32, expected torch.float16 or"),
    (lambda ops: ops.axpy(2.0, X, X[:3]), r"y \(shape\): got \(3,\), expected \[4\]"),
    (lambda ops: ops.axpy(2.0, X, X.half()), r"y \(dtype\): got torch.float16, expected torch.float32"),
    (lambda ops: ops.axpy(2.0, X, X.to("meta")), r"y \(device\): got meta, expected cpu"),
    (lambda ops: ops.row_sum(X), r"x \(shape\): got \(4,\), expected \[rows, n\]"),
    (lambda ops: ops.row_sum(W.long()), r"x \(dtype\): got torch.int64, expected torch.float16 or"),
    (lambda ops: ops.matvec(W, W), r"x \(shape\): got \(3, 4\), expected \[k\]"),
    (lambda ops: ops.matvec(X, W.T), r"w \(shape\): got \(4, 3\), expected \[n, 4\]"),
    (lambda ops: ops.matvec(X, W.half()), r"w \(dtype\): got torch.float16, expected torch.float32"),
    (lambda ops: ops.matvec(X, W.to("meta")), r"w \(device\): got meta, expected cpu"),
)  # fmt: skip


@pytest.mark.parametrize("ops", [fk, ref], ids=["kernel", "reference"])
@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_errors_name_the_argument(number, ops):
    call, message = ERRORS[number]
    with pytest.raises(ValueError, match=message):
        call(ops)


@pytest.mark.parametrize("block", [0, 3, 2**17, 128.0])
def test_block_is_a_power_of_two(block):
    with pytest.raises(ValueError, match=r"block: got .* expected a power of two"):
        fk.axpy(2.0, X, X, block=block)


def test_the_player_shows_the_run():
    x = torch.arange(22.0)
    out, walk = trace.watch("kernels.first_kernel", "own_elements", "axpy", dict(a=2.0, x=x, y=x, block=8))
    assert [step.program[0] for step in walk] == [0, 1, 2]
    shown = ref.launch_player(out, walk, 8)
    assert "3 frames" in repr(shown)
    assert "Program 2 of 3 owns the elements 16 to 21. 2 of its 8 lanes are masked" in repr(shown)
    assert ">63<" in shown.html, "out[21] = 3 * 21"


def test_the_machine():
    """By hand: 64 K registers and 228 KiB of shared memory an SM, and 128 bytes of it a clock."""
    levels = ref.machine()
    assert levels["registers"][:2] == (262_144, 132)
    assert levels["shared memory"][0] == 228 * 1024
    assert levels["shared memory"][2] == pytest.approx(128 * 132 * 1.98e9, rel=0.01)
    assert levels["HBM"] == (141 * 10**9, 1, 4.8e12)
    assert "132 SMs" in ref.machine_figure().alt
