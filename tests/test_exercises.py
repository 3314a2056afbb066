"""Every exercise both ways: its stub fails politely, its solution passes, every planted bug is caught by its cases."""

import importlib
import pkgutil
import re

import pytest
import torch

import kernels
import labkit.exercises
from labkit import ptx
from labkit.exercises import Exercise, exercise, expect, kernel_exercise
from labkit.notebooks import CHAPTERS, MAX_LINES, read

TOPICS = [module.name for module in pkgutil.iter_modules(labkit.exercises.__path__)]


def exercises(topic):
    module = importlib.import_module(f"labkit.exercises.{topic}")
    return [value for value in vars(module).values() if isinstance(value, Exercise)]


ALL = [pytest.param(e, id=f"{topic}-{e.name}") for topic in TOPICS for e in exercises(topic)]


@pytest.mark.parametrize("topic", TOPICS)
def test_enough(topic):
    assert len(exercises(topic)) >= 3


@pytest.mark.parametrize("ex", ALL)
def test_both_ways(ex, capsys):
    assert ex.failures(ex.compiled(ex.solution.code)) == {}
    ex.check(ex.compiled(ex.solution.code))
    passed = "its case passes" if len(ex.cases) == 1 else f"all {len(ex.cases)} cases pass"
    assert capsys.readouterr().out == f"{ex.name}: {passed}.\n"
    ex.check(ex.compiled(ex.stub))
    out = capsys.readouterr().out
    waiting = "1 case is" if len(ex.cases) == 1 else f"{len(ex.cases)} cases are"
    assert out.startswith(f"{ex.name}: not written yet. {waiting} waiting.\nHint 1: ")
    assert out.count("Hint") == 1, "the next one when the reader has begun"
    assert len(ex.bugs) >= 3
    assert len(ex.hints) >= 2
    assert ex.fn.__doc__


@pytest.mark.parametrize("ex", ALL)
def test_planted_bugs_are_caught(ex):
    known = [bug for bug in ex.bugs if ex.runs_compiled or "compiled" not in bug[2]]  # elsewhere some can't be seen
    missed = [why for old, new, why in known if not ex.failures(ex.edited(old, new))]
    assert not missed, f"{ex.name}: not caught: {missed}"


@pytest.mark.parametrize("ex", ALL)
def test_no_case_is_idle(ex):
    """Every case fails for at least one bug or for a function that returns its first argument."""
    caught = set(ex.failures(lambda *args: args[0]))
    for old, new, _ in ex.bugs:
        caught |= set(ex.failures(ex.edited(old, new)))
    assert caught == set(ex.cases)


@pytest.mark.parametrize("topic", TOPICS)
def test_notebook_has_the_stub_and_the_solution(topic):
    """The chapter's cells tagged `exercise` are the stubs with their check, each with its solution behind a fold."""
    paths = [path for path in CHAPTERS.glob(f"*{topic}.ipynb") if path.stem.lstrip("0123456789_") == topic]
    assert paths, f"labkit/exercises/{topic}.py without a chapters/*{topic}.ipynb"
    code = [cell for cell in read(paths[0]).cells if cell.cell_type == "code"]
    cells = [cell.source for cell in code if "exercise" in cell.metadata.get("tags", [])]
    assert cells == [e.cell for e in exercises(topic)], f"{paths[0].name}: `labkit.notebooks draft`, then `new`, fills them in"
    folded = [cell.source for cell in code if "hide-cell" in cell.metadata.get("tags", [])]
    assert [f"exercises.{e.name}.solution" for e in exercises(topic)] == [s for s in folded if s.endswith(".solution")]
    assert all(cell.count("\n") < MAX_LINES for cell in cells)


# ---- the tool itself


@exercise(hints=["Add one."], bugs=[("y = x + 1", "y = x + 2", "adds two")])
def successor(x):
    """x + 1"""
    # >>> your code
    y = x + 1
    # <<< your code
    return y


@successor.case("of one")
def _of_one(fn):
    expect(fn(1), 2, "successor")


def test_report(capsys):
    assert successor.stub == (
        'def successor(x):\n    """x + 1"""\n    # >>> your code\n    raise NotImplementedError\n    # <<< your code\n    return y'
    )
    assert successor.solution.code == 'def successor(x):\n    """x + 1"""\n    y = x + 1\n    return y'
    successor.check(lambda x: x)
    assert capsys.readouterr().out == "FAIL  of one: successor: got 1, expected 2; called with 1\nHint 1: Add one.\n"
    successor.check(lambda x: x / 0)
    assert "ZeroDivisionError: division by zero, in the line `successor.check(lambda x" in capsys.readouterr().out
    assert successor.failures(successor.edited(*successor.bugs[0][:2])) == {
        "of one": "successor: got 3, expected 2; called with 1"
    }
    with pytest.raises(ValueError, match="occurs 0 times"):
        successor.edited("x + 3", "")
    with pytest.raises(ValueError, match="two cases"):
        successor.case("of one")(None)


@kernel_exercise(hints=["Stop at n."], bugs=[("2 * x, mask=offs < n", "2 * x, mask=offs < n + 1", "one too many")])
def twice(x_ptr, n, BLOCK: "tl.constexpr"):
    """x = 2 x, for n numbers."""
    offs = tl.arange(0, BLOCK)
    # >>> your code
    x = tl.load(x_ptr + offs, mask=offs < n + 1)
    tl.store(x_ptr + offs, 2 * x, mask=offs < n)
    # <<< your code


@twice.case("four numbers")
def _four(fn):
    x = torch.arange(5.0, device=kernels.DEVICE)
    fn[(1,)](x, 4, BLOCK=8)
    expect(x, torch.tensor([0.0, 2.0, 4.0, 6.0, 4.0]), "x")


def test_kernel_exercise(capsys, monkeypatch):
    monkeypatch.setattr(ptx, "compiler", lambda: None)  # the exercises of the chapters run compiled
    assert twice.stub.startswith("@triton.jit\ndef twice(x_ptr, n, BLOCK: tl.constexpr):")
    twice.check(twice.compiled(twice.stub))
    assert capsys.readouterr().out.startswith("twice: not written yet. 1 case is waiting.")
    assert twice.failures(twice.compiled(twice.solution.code)) == {}
    assert "got 8, expected 4" in twice.failures(twice.edited(*twice.bugs[0][:2]))["four numbers"]


def test_a_stray_write_of_a_kernel_is_seen_and_does_no_harm(monkeypatch):
    monkeypatch.setattr(ptx, "compiler", lambda: None)
    far = twice.edited("tl.store(x_ptr + offs, 2 * x, mask=offs < n)", "tl.store(x_ptr + 900 + offs, 2 * x)")
    assert twice.failures(far) == {"four numbers": "numbers outside of x were written: 8"}


def test_a_kernel_that_raises_is_told_its_line(monkeypatch):
    monkeypatch.setattr(ptx, "compiler", lambda: None)
    line = "tl.store(x_ptr + offs, 2 * y, mask=offs < n)"
    found = twice.failures(twice.edited("tl.store(x_ptr + offs, 2 * x, mask=offs < n)", line))
    assert found == {"four numbers": f"NameError: name 'y' is not defined, in the line `{line}`"}


@pytest.mark.skipif(not exercises("first_kernel")[1].runs_compiled, reason="needs the interpreter and a C++ compiler")
def test_right_answers_with_other_instructions_pass():
    """No solution uses tl.sqrt; the engine does not know the code of tl.sqrt_rn: no fault of the reader's."""
    rmsnorm = exercises("first_kernel")[1]
    mean = "tl.rsqrt(tl.sum(square, 0) / n + eps)"
    assert rmsnorm.failures(rmsnorm.edited(mean, "1 / tl.sqrt(tl.sum(square, 0) / n + eps)")) == {}
    assert rmsnorm.failures(rmsnorm.edited(mean, "1 / tl.sqrt_rn(tl.sum(square, 0) / n + eps)")) == {}


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        (1.5, 1.0, "got 1.5, expected 1"),
        (float("nan"), 1.0, "got nan"),
        (None, 1.0, "got None"),
        ("a", "b", "got 'a', expected 'b'"),
        ((1, 2), (1, 2, 3), re.escape("got 2 values, expected 3: (1, 2) instead of (1, 2, 3)")),
        (1, (1,), "got int, expected 1 values"),
        ((1, 2), (1, 3), re.escape("r[1]: got 2, expected 3")),
        (1.0, torch.zeros(2), "got float, expected a tensor"),
        (torch.zeros(2), torch.zeros(3), "got shape"),
        (torch.tensor([0.0, 1.0]), torch.zeros(2), "1 of 2 values differ; at .1. got 1, expected 0"),
        (torch.tensor(float("nan")), torch.tensor(float("nan")), "1 of 1 values differ"),
    ],
)
def test_expect(got, want, message):
    expect(want if message != "1 of 1 values differ" else 0, want if message != "1 of 1 values differ" else 0)
    with pytest.raises(AssertionError, match=message):
        expect(got, want, "r")
