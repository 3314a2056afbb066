"""The rule of correctness itself: what passes, and above all what does not."""

import math

import pytest
import torch

from labkit.check import assert_matches, compare

X = torch.tensor([1.0, 2.0, 3.0])


def third(x):
    return x / 3


def verdict(got, reference=third, x=X):
    (only,) = compare(got, reference, x)
    return only


def test_the_limit_is_twice_the_yardstick_and_a_little():
    """A reference that is off by a half in fp32: a kernel may be off by one."""

    def off(x):
        return x if x.dtype == torch.float64 else x + 0.5

    v = verdict(X, off)
    assert (v.error, v.yardstick, v.limit) == (0.0, 0.5, 1.00001)
    for error, right in ((0.99, True), (-0.99, True), (1.0, True), (1.01, False), (-1.01, False)):
        assert verdict(X + error, off).ok == right


@pytest.mark.parametrize("number, step", [(150.0, 2.0**-16), (-150.0, 2.0**-16), (63.0, 2.0**-18), (1.0, 4.8e-6)])
def test_beyond_64_two_digits_of_fp32_count(number, step):
    """step: of 150 fp32's last digit, and so of 63; two steps of the last pair are nearly 1e-5."""

    def constant(x):
        return torch.stack((torch.full_like(x, number), torch.full_like(x, -math.inf)))

    for steps in (1, 2, 3):
        got = constant(X)
        got[0] += steps * step
        assert verdict(got, constant).ok == (steps <= 2)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_wrong(wrong):
    got = third(X)
    got[1] = wrong
    assert not verdict(got).ok
    with pytest.raises(AssertionError, match="third: output 0: WRONG"):
        assert_matches(got, third, X)


def test_infinities_have_to_be_the_same():
    def some_inf(x):
        return torch.where(x > 2, -math.inf, x)

    assert verdict(some_inf(X), some_inf).ok
    assert not verdict(-some_inf(X), some_inf).ok
    assert not verdict(X, some_inf).ok


@pytest.mark.parametrize("where", ["truth and yardstick", "yardstick"])
def test_a_reference_with_nan_lets_nothing_pass(where):
    def broken(x):
        return x * math.nan if where != "yardstick" or x.dtype == torch.float32 else x

    for got in (X, X * math.nan):
        assert "the reference has NaN" in str(verdict(got, broken))
        assert not verdict(got, broken).ok


def test_shape_dtype_and_kind():
    assert "shape (2,), expected (3,)" in str(verdict(third(X)[:2]))
    assert "shape (1, 3), expected (3,)" in str(verdict(third(X)[None]))
    assert "shape list, expected (3,)" in str(verdict([third(X).tolist()]))
    assert "dtype torch.float64, expected torch.float32" in str(verdict(third(X).double()))


def test_flags_have_to_be_equal():
    def flags(x):
        return x > 1

    assert verdict(X > 1, flags).ok
    assert not verdict(X > 2, flags).ok
    assert "dtype torch.uint8, expected torch.bool" in str(verdict((X > 1).byte(), flags))


def test_a_reference_that_overflows_lets_nothing_pass():
    """An infinite yardstick would make anything right, NaN too."""

    def square(x):
        return x * x

    x = torch.tensor([300.0, 1.0]).half()
    for got in (x * math.nan, square(x), torch.ones_like(x)):
        assert "overflows" in str(verdict(got, square, x))
        assert not verdict(got, square, x).ok


def test_every_output_counts():
    def two(x):
        return x / 3, x / 7

    assert [v.ok for v in compare((X / 3, X / 7), two, X)] == [True, True]
    assert [v.ok for v in compare((X / 3, X / 6), two, X)] == [True, False]
    with pytest.raises(AssertionError, match="1 outputs, the reference has 2"):
        compare(X / 3, two, X)


def test_nothing_is_right_about_nothing():
    """An empty output agrees with an empty one, and only with that."""
    assert verdict(torch.empty(0), lambda x: x[:0]).ok
    assert not verdict(torch.empty(0)).ok


PLANTED_BUGS = [
    ("labkit/check.py", "2 * self.yardstick + max", "3 * self.yardstick + max"),
    ("labkit/check.py", "2 * self.yardstick + max", "1.5 * self.yardstick + max"),
    ("labkit/check.py", "max(1e-5, 2 * float", "max(1e-5, 3 * float"),
    ("labkit/check.py", "max(1e-5, 2 * float(np.spacing(np.float32(self.size))))", "1e-5"),
    ("labkit/check.py", "truth[truth.isfinite()].abs()", "truth.abs()"),
    ("labkit/check.py", 'nan_to_num(nan=float("inf")', "nan_to_num(nan=0.0"),
    ("labkit/check.py", ', posinf=float("inf")', ""),
    ("labkit/check.py", "if yardstick == inf:", "if False:"),
    ("labkit/check.py", "got.shape != truth.shape", "got.numel() != truth.numel()"),
    ("labkit/check.py", "torch.where(x == truth, 0.0, (x - truth).abs())", "(x - truth).abs()"),
    ("labkit/check.py", "if truth.isnan().any() or plain.isnan().any():", "if truth.isnan().any():"),
    ("labkit/check.py", "if truth.isnan().any() or plain.isnan().any():", "if False:"),
    ("labkit/check.py", "        if got.dtype != plain.dtype:", "        if False:"),
    ("labkit/check.py", "has NaN\")\n    if got.dtype != plain.dtype:", "has NaN\")\n    if False:"),
    ("labkit/check.py", "same = bool((got == truth).all())", "same = True"),
    ("labkit/check.py", "if len(got) != len(truth):", "if False:"),
    ("labkit/check.py", "yardstick = _max_error(plain, truth)", "yardstick = _max_error(got, truth)"),
]
