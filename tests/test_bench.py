"""The bench is driven by a machine with a planned clock: what it has to report is then known."""

import contextlib
import itertools
import json
import re
import signal
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import kernels.__main__ as program
import kernels.flash_decoding_pp
from labkit import bench, check, peers, provenance, ptx, record, timing, what_runs
from labkit import flash_decoding as decoding
from labkit import flash_decoding_pp as unified
from labkit.attention import attention, decode_attention
from labkit.comparison import Comparison

NOW = dict(device="Test GPU", driver="1", torch="2", triton="3", date="2026-01-01 00:00:00", commit="abc")
SCHEMA = "topic case provider ran us bytes error verdict mode device driver torch triton date commit source_hash"


# A topic called "doubling": one kernel, right or wrong, and peers of every temper.


def double(x):
    return x + x


def wrong_double(x):
    return 2.5 * x


def half_written(x):
    out = torch.empty_like(x)
    out[:32] = x[:32] + x[:32]
    return out


def spy(x):
    out = torch.empty_like(x)
    spy.poisoned = bool(out.isnan().all())
    return torch.add(x, x, out=out)


def make(generator, device):
    return {"x": torch.randn(64, generator=generator, device=device)}


def doubling_cases(tiny=False):
    def missing(x):
        import no_such_library  # noqa: F401

    def refusing(x):
        raise RuntimeError("head_dim 64 is not supported\nand a long trace")

    libraries = {
        "peer": lambda x: lambda: x * 2,
        "wrong peer": lambda x: lambda: x * 3,
        "missing": missing,
        "refusing": refusing,
        "left out": lambda x: lambda: x * 2,
    }
    common = dict(op="double", make=make, bytes=100_000_000, peers=libraries, without={"left out": "too slow"})
    return [bench.Case(f"case {i}", section=s, **common) for i, s in enumerate(["first", "first", "second"])]


class Clock:
    """A timer that gives the planned microseconds to one provider after another, and logs who was timed when."""

    def __init__(self, *plan):
        self.plan, self.count, self.copies, self.log = itertools.cycle(plan), 0, [], []

    def __call__(self, calls, graph=True):
        index, us = self.count, next(self.plan)
        self.count += 1
        self.copies.append(len(calls))

        def sample():
            self.log.append(index)
            return [us - 0.1, us, us + 0.1]

        return sample, "graph" if graph else "eager"


@pytest.fixture
def topic(monkeypatch, tmp_path):
    """The topic as labkit.doubling and kernels.doubling, no GPU, an empty results folder; returns kernels.doubling."""
    ops = types.SimpleNamespace(double=double)
    lab = types.SimpleNamespace(double=double, cases=doubling_cases)
    monkeypatch.setitem(sys.modules, "labkit.doubling", lab)
    monkeypatch.setitem(sys.modules, "kernels.doubling", ops)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "this_gpu", lambda: None)
    monkeypatch.setattr(program, "compile_ahead", lambda jobs, seconds: None)  # other processes know no such topic
    small = {"copy": ([lambda: None], 1_000_000), "matmul": ([lambda: None], 0)}
    monkeypatch.setattr(timing, "ceiling_calls", lambda device: small)
    return ops


def machine(*plan, **changes):
    return bench.Machine("cpu", NOW | changes, Clock(*plan))


def measured(ops, *plan):
    """Rows of the first case with the kernel and one peer taking the planned microseconds."""
    return bench.measure("doubling", doubling_cases()[0], ops, machine(*plan))


def compared(rows, ops=None):
    hashes = bench.hashes(doubling_cases(), ops) if ops else {}
    return Comparison("doubling", doubling_cases(), rows, hashes)


# --- measuring


def test_only_what_is_right_is_timed_and_the_rest_says_why(topic):
    m = machine(10.0, 20.0)
    rows = {row.provider: row for row in bench.measure("doubling", doubling_cases()[0], topic, m)}
    assert [name for name, row in rows.items() if row.ran] == ["double", "peer"]
    assert rows["double"].us == [9.9, 10.0, 10.1] * 3
    assert rows["peer"].us == [19.9, 20.0, 20.1] * 3
    assert rows["wrong peer"].verdict.startswith("wrong: error ")
    assert rows["missing"].verdict == "not run: ModuleNotFoundError: No module named 'no_such_library'"
    assert rows["refusing"].verdict == "not run: RuntimeError: head_dim 64 is not supported"
    assert rows["left out"].verdict == "not run: too slow"
    for name in ("wrong peer", "missing", "refusing", "left out"):
        assert not rows[name].ran
        assert rows[name].us == []
    assert m.timer.log == [0, 1] * 3  # in turn, not one after the other
    assert m.timer.copies == [2, 2]  # 100 MB each: two copies keep the L2 cold
    assert rows["double"].source_hash == provenance.source_hash(double, extra={})
    assert rows["peer"].source_hash == ""


@pytest.mark.parametrize("kernel", [wrong_double, half_written])
def test_a_wrong_kernel_is_never_timed(topic, kernel):
    topic.double = kernel
    m = machine(10.0)
    rows = {row.provider: row for row in bench.measure("doubling", doubling_cases()[0], topic, m)}
    assert rows["double"].verdict.startswith("wrong")
    assert not rows["double"].ran
    assert m.timer.count == 1  # the peer alone


def test_kernels_are_poisoned_and_peers_are_not(topic):
    modes = []

    def peer(x):
        return lambda: modes.append(torch.get_deterministic_debug_mode()) or x * 2

    topic.double = spy
    bench.measure("doubling", replace(doubling_cases()[0], peers={"peer": peer}), topic, machine(1.0))
    assert spy.poisoned
    assert modes == [0]


def test_only_a_peer_may_leave_outputs_out(topic, monkeypatch):
    monkeypatch.setattr(sys.modules["labkit.doubling"], "double", lambda x: (x + x, x))
    rows = {row.provider: row for row in measured(topic, 1.0)}
    assert rows["peer"].ran
    assert rows["double"].verdict == "not run: AssertionError: 1 outputs, the reference has 2"


def test_one_wrong_output_is_enough():
    """The first output may be off by much, since the reference is; the second is off by less, and wrong."""

    def two(x):
        return x if x.dtype == torch.float64 else x + 0.5, x

    x = torch.zeros(3)
    for second, word in ((x, "ok: error 0.9,"), (x + 0.1, "wrong: error 0.1,")):
        error, verdict = bench.judge((x + 0.9, second), two, {"x": x})
        assert error == pytest.approx(0.9)
        assert verdict.startswith(word)


def test_out_of_memory_is_a_reason(topic):
    def too_large(generator, device):
        raise torch.OutOfMemoryError("tried to allocate 5 TiB")

    rows = bench.measure("doubling", replace(doubling_cases()[0], make=too_large), topic, machine(1.0))
    assert rows[0].verdict == "not run: OutOfMemoryError: tried to allocate 5 TiB"
    assert not any(row.ran for row in rows)


def test_a_raising_kernel_is_reported(topic):
    topic.double = refuse
    rows = {row.provider: row for row in measured(topic, 10.0)}
    assert rows["double"].verdict == "not run: ValueError: x: got one"
    assert rows["peer"].ran


def refuse(x):
    raise ValueError("x: got one")


def test_an_error_while_timing_belongs_to_its_provider(topic):
    """A graph may fail at its tenth replay: the others are timed, and the run goes on."""

    def timer(calls, graph=True):
        fails = not timer.calls

        def sample():
            if fails:
                raise RuntimeError("CUDA error: an illegal memory access")
            return [1.0]

        timer.calls += 1
        return sample, "graph"

    timer.calls = 0
    rows = bench.measure("doubling", doubling_cases()[0], topic, bench.Machine("cpu", NOW, timer))
    by = {row.provider: row for row in rows}
    assert (by["double"].ran, by["double"].us) == (False, [])
    assert by["double"].verdict == "not run: RuntimeError: CUDA error: an illegal memory access"
    assert by["peer"].us == [1.0] * bench.ROUNDS


def test_variants_and_eager_cases(topic):
    case = replace(doubling_cases()[0], op="scale", reference="double", graph=False)
    case = replace(case, variants={"by three": {"factor": 3}})
    topic.scale = scale
    rows = {row.provider: row for row in bench.measure("doubling", case, topic, machine(10.0))}
    assert rows["scale"].ran
    assert rows["scale"].mode == "eager"
    assert rows["by three"].verdict.startswith("wrong")
    assert rows["by three"].source_hash != rows["scale"].source_hash


def scale(x, factor=2):
    return x * factor


def test_interpreter_is_never_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert bench.this_gpu() is None


def test_poison_reaches_new_memory_and_is_undone():
    with bench.poisoned():
        assert torch.empty(8).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_names_and_sections_are_checked(topic, monkeypatch):
    with pytest.raises(ValueError, match=r"section: got 'third', expected one of \['first', 'second'\]"):
        bench.bench("doubling", topic, section="third")
    twice = doubling_cases()[:1] * 2
    monkeypatch.setattr(sys.modules["labkit.doubling"], "cases", lambda: twice)
    with pytest.raises(ValueError, match="'case 0' twice"):
        bench.bench("doubling", topic)


# --- figures


@pytest.mark.parametrize(
    ("ours", "theirs", "tie"),
    [
        ([100.0] * 5, [101.9] * 5, True),  # below 2 %
        ([100.0] * 5, [102.1] * 5, False),
        ([90.0, 95.0, 100.0, 105.0, 110.0], [108.0] * 5, True),  # below the spread of ours: 94 to 106
        ([100.0] * 5, [98.0, 103.0, 108.0, 113.0, 118.0], True),  # below the spread of theirs: 102 to 114
        ([95.0, 99.0, 100.0, 101.0, 105.0], [110.0] * 5, False),
    ],
)
def test_ties(topic, ours, theirs, tie):
    rows = [replace(row, us=us) for row, us in zip(measured(topic, 1.0), (ours, theirs))]
    both = compared(rows)
    assert both.is_tie("case 0", "peer") is tie
    assert both.result("case 0").startswith("tie with peer") is tie


def test_launches_are_not_compared_with_graphs(topic):
    """A peer that could not be captured is timed with its launches: its time is shown, and no ratio made of it."""
    rows = measured(topic, 10.0, 20.0)
    mixed = [replace(row, mode="eager") if row.provider == "peer" else row for row in rows]
    c = compared(mixed)
    assert (compared(rows).ratio("case 0", "peer"), c.ratio("case 0", "peer")) == (2.0, None)
    assert c.us("case 0", "peer") == 20.0
    assert (c.best_peer("case 0"), c.result("case 0")) == (None, None)


def test_figures(topic, monkeypatch):
    m = machine(0.5, 1000.0, 100.0, 80.0, 100.0, 150.0, 100.0, 101.0)  # copy, matmul, then kernel and peer of each case
    monkeypatch.setattr(bench, "this_gpu", lambda: m)
    live = bench.bench("doubling", topic)
    assert live.us("case 0") == pytest.approx(100.0)
    assert live.spread("case 0") == pytest.approx((99.9, 100.1))
    assert live.gbs("case 0") == pytest.approx(1000.0)  # 100 MB in 100 us
    assert live.floor("case 0") == pytest.approx(50.0)  # the copy moves 1 MB in 0.5 us
    assert live.share("case 0") == pytest.approx(0.5)
    assert live.ratio("case 0", "peer") == pytest.approx(0.8)
    assert live.best_peer("case 0") == "peer"
    assert [live.result(c) for c in live.cases] == ["1.25x slower than peer", "1.50x faster than peer", "tie with peer"]
    assert live.summary("first") == (
        "Time of the best peer / ours: geometric mean 1.10, worst 0.80 (case 0). "
        "Faster in 1 of 2, a tie in 0, slower in 1."
    )
    for text in (repr(live), live._repr_html_()):
        assert "1.25x slower than peer" in text
        assert "wrong peer: wrong: error" in text
        assert "missing: not run: ModuleNotFoundError: No module named" in text
        assert "Measured now on Test GPU: 2026-01-01 00:00:00 UTC, commit abc, driver 1, torch 2, triton 3." in text
        assert "copy 2000 GB/s" in text
    head, first, _ = live.table("first")
    assert dict(zip(head, first)) == {
        "case": "case 0",
        "MB": "100",
        "limit us": "50.0",
        "double us [p20-p80]": "100.0 [99.9-100.1]",
        "GB/s": "1000",
        "of limit": "50%",
        "peer": "80.0 (0.80)",
        "against the best peer": "1.25x slower than peer",
    }
    assert live.row("case 0", "wrong peer").ran is False
    assert live.us("case 0", "wrong peer") is None
    assert live.ratio("case 0", "wrong peer") is None


def test_the_best_peer_is_the_fastest(topic):
    case = replace(doubling_cases()[0], peers={name: lambda x: lambda: x * 2 for name in "abc"})
    rows = bench.measure("doubling", case, topic, machine(10.0, 30.0, 20.0, 25.0))
    both = Comparison("doubling", [case], rows, {})
    assert both.best_peer("case 0") == "b"
    assert both.result("case 0") == "2.00x faster than b"


def test_floor_counts_operations_where_they_take_longer(topic):
    case = replace(doubling_cases()[0], flops=timing.MATMUL_FLOPS)
    rows = bench.measure_ceilings("doubling", machine(0.5, 1000.0)) + measured(topic, 2000.0)
    both = Comparison("doubling", [case], rows, {})
    assert both.floor("case 0") == pytest.approx(1000.0)
    assert both.share("case 0") == pytest.approx(0.5)


def test_a_floor_is_that_of_the_cases_own_run(topic):
    """Two runs with copies of 0.5 and 2 us: each case keeps the limit of its own."""
    old = [replace(row, date="2026-01-01 00:00:00") for row in bench.measure_ceilings("doubling", machine(2.0, 1000.0)) + measured(topic, 2000.0)]
    new = [replace(row, case="case 1", date="2026-02-01 00:00:00") if row.case == "case 0" else replace(row, date="2026-02-01 00:00:00")
           for row in bench.measure_ceilings("doubling", machine(0.5, 1000.0)) + measured(topic, 2000.0)]  # fmt: skip
    one = doubling_cases()[0]
    both = Comparison("doubling", [one, replace(one, name="case 1")], old + new, {})
    assert both.floor("case 0") == pytest.approx(4 * both.floor("case 1"))


def test_time_budget_of_a_live_bench(topic, monkeypatch):
    monkeypatch.setattr(bench, "this_gpu", lambda: machine(1.0))
    live = bench.bench("doubling", topic, seconds=0)
    assert live.us("case 0") is None
    assert "Nothing was measured for doubling" in repr(live)


# --- the record


def test_schema():
    assert " ".join(record.Row.__dataclass_fields__) == SCHEMA


def test_nothing_recorded(topic):
    nothing = bench.bench("doubling", topic)
    sentence = "No GPU has measured this yet; `make record` does. The floors are arithmetic: bytes over bandwidth, or "
    assert sentence in repr(nothing)
    assert sentence.replace("`make record`", "<code>make record</code>") in nothing._repr_html_()
    assert nothing.plan("first")[1] == ["case 0", "100", "-", "49.0", "20.8", "12.5"]  # 2.039, 4.8 and 8 TB/s
    heavy = Comparison("doubling", [replace(case, flops=989_000_000_000) for case in doubling_cases()], [], {})
    assert heavy.plan("first")[1][2:] == ["9890.0", "3169.9", "1000.0", "439.6"]  # 312, 989 and 2250 TFLOP/s
    assert "To be timed: double; beside it peer, wrong peer, missing, refusing, left out." in repr(nothing)
    assert repr(nothing).count("case 0") == 1
    empty = Comparison("doubling", doubling_cases(), [], {}, live=True)
    assert repr(empty) == "Nothing was measured for doubling: the time was spent before its first case."
    for figure in (nothing.us, nothing.spread, nothing.gbs, nothing.share, nothing.floor, nothing.result):
        assert figure("case 0") is None
    assert nothing.ratio("case 0", "peer") is None


def test_recorded_and_fresh_then_changed(topic, tmp_path):
    record.save(measured(topic, 10.0, 20.0), tmp_path / "test-gpu" / "doubling.json")
    shown = bench.bench("doubling", topic)
    assert shown.us("case 0", "peer") == 20.0
    assert "Recorded on Test GPU: 2026-01-01 00:00:00 UTC, commit abc" in repr(shown)
    assert repr(shown).endswith("The kernels are unchanged since.")
    assert "not measured (case 1)" in repr(shown)
    assert shown.source() == shown.provenance()[0]
    topic.double = wrong_double
    changed = bench.bench("doubling", topic)
    assert changed.changed == ["double"]
    assert repr(changed).endswith("so the figures are of older code: double.")
    assert "unchanged" not in repr(changed)
    assert changed.source().startswith(shown.source())
    assert changed.source().endswith("so the figures are of older code: double.")


def test_the_latest_gpu_is_shown_or_the_one_asked_for(topic, tmp_path):
    rows = measured(topic, 10.0, 20.0)
    record.save(rows, tmp_path / "test-gpu" / "doubling.json")
    newer = [replace(row, device="Other", date="2026-02-01 00:00:00") for row in rows]
    record.save(newer, tmp_path / "other" / "doubling.json")
    assert bench.bench("doubling", topic).rows[0].device == "Other"
    assert bench.bench("doubling", topic, gpu="Test GPU").rows[0].device == "Test GPU"


def test_rows_survive_the_file(topic, tmp_path):
    topic.double = half_written  # its error is not finite, which JSON cannot hold
    rows = measured(topic, 10.0)
    path = tmp_path / "a.json"
    record.save(rows, path)
    assert record.load(path) == rows
    assert [set(row) for row in json.loads(path.read_text())] == [set(SCHEMA.split())] * len(rows)
    path.write_text('[{"topic": "doubling"}]')
    with pytest.raises(ValueError, match=r"a\.json: not a list of rows"):
        record.load(path)


def test_update_replaces_a_case_and_keeps_the_limits_in_use(topic):
    def run(date, *names):
        m = machine(1.0, date=date)
        cases = [case for case in doubling_cases() if case.name in names]
        return bench.measure_ceilings("doubling", m) + [
            row for case in cases for row in bench.measure("doubling", case, topic, m)
        ]

    def dates(rows):
        return sorted({(row.case, row.date) for row in rows})

    old, new = run("day 1", "case 0", "case 1"), run("day 2", "case 0")
    both = record.update(old, new)
    assert dates(both) == [("case 0", "day 2"), ("case 1", "day 1"), ("ceiling", "day 1"), ("ceiling", "day 2")]
    assert record.update(both, new) == record.update(record.update(both, new), new)
    assert dates(record.update(both, run("day 3", "case 1"))) == [
        ("case 0", "day 2"), ("case 1", "day 3"), ("ceiling", "day 2"), ("ceiling", "day 3")
    ]  # fmt: skip


# --- python -m kernels


def test_record_needs_a_gpu(topic, tmp_path, capsys):
    assert program.record_topics(["doubling"]) == 1
    assert "No usable GPU here: nothing was measured." in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_record(topic, monkeypatch, tmp_path, capsys):
    m = machine(0.5, 1000.0, *[100.0, 80.0] * 3, 0.6)
    monkeypatch.setattr(bench, "this_gpu", lambda: m)
    assert program.record_topics(["doubling"]) == 0
    rows = record.load(tmp_path / "test-gpu" / "doubling.json")
    assert {row.case for row in rows} == {"ceiling", "case 0", "case 1", "case 2"}
    assert [row.provider for row in rows if row.case == "ceiling"] == ["copy", "matmul", "copy again"]
    assert {row.topic for row in rows} == {"doubling"}
    assert "copy 2000 GB/s, matmul 1100 TFLOP/s, copy again 1667 GB/s" in capsys.readouterr().out


def test_an_interrupted_record_keeps_what_was_measured(topic, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "this_gpu", lambda: machine(1.0))
    measure = bench.measure

    def second_case_never_ends(topic, case, *rest):
        if case.name == "case 1":
            signal_handler()
        return measure(topic, case, *rest)

    monkeypatch.setattr(bench, "measure", second_case_never_ends)
    with contextlib.ExitStack() as stack:
        handlers = []
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(
            program.signal, "signal", lambda number, handler: handlers.append(handler)
        )

        def signal_handler():
            handlers[0]()

        assert program.record_topics(["doubling"]) == 0
    rows = record.load(tmp_path / "test-gpu" / "doubling.json")
    assert {row.case for row in rows} == {"ceiling", "case 0"}
    assert "STOPPED" in capsys.readouterr().out


def overtaken(x):
    """A kernel in the middle of which the alarm goes off; it notes how many seconds were left."""
    overtaken.left = signal.getitimer(signal.ITIMER_REAL)[0]
    signal.raise_signal(signal.SIGALRM)


def test_a_record_stops_itself(topic, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "this_gpu", lambda: machine(1.0))
    topic.double = overtaken
    assert program.record_topics(["doubling"], seconds=470.0) == 0
    assert 0 < overtaken.left <= 470
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert "STOPPED" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []  # not even a row that blames the kernel


def test_a_run_that_loses_its_gpu_goes_on_in_a_new_process(topic, monkeypatch, tmp_path, capsys):
    """After an illegal access: what was measured is kept, and the cases behind it are left to another process."""
    monkeypatch.setattr(bench, "this_gpu", lambda: machine(1.0))
    begun = []
    monkeypatch.setattr(program.os, "execv", lambda python, command: begun.append(command))
    monkeypatch.setattr(bench, "lost", lambda machine: "illegal memory access" if not begun else "")
    program.record_topics(["doubling"], seconds=100.0)
    (command,) = begun
    assert command[1:5] == ["-m", "kernels", "record", "doubling"]
    assert command[5] == "--seconds" and 50 < float(command[6]) <= 100  # noqa: PT018
    assert command[7:] == ["--skip", "1"]
    assert "LOST the GPU: doubling: case 0: illegal memory access" in capsys.readouterr().out
    path = tmp_path / "test-gpu" / "doubling.json"
    assert {row.case for row in record.load(path)} == {"ceiling", "case 0"}
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    program.record_topics(command[4:5], float(command[6]), int(command[8]))
    assert {row.case for row in record.load(path)} == {"ceiling", "case 0", "case 1", "case 2"}
    assert "2 of 2 cases measured on Test GPU" in capsys.readouterr().out


def test_only_what_is_missing_is_recorded(topic, monkeypatch, tmp_path, capsys):
    """A case that is not there, or was measured with another kernel; the rest stays as it was."""
    monkeypatch.setattr(bench, "this_gpu", lambda: machine(1.0, date="day 1"))
    ahead = []
    monkeypatch.setattr(program, "compile_ahead", lambda jobs, seconds: ahead.append(jobs))
    program.record_topics(["doubling"])
    path = tmp_path / "test-gpu" / "doubling.json"
    rows = [row for row in record.load(path) if row.case != "case 0"]
    record.save([replace(row, source_hash="old") if row.case == "case 2" and row.source_hash else row for row in rows], path)
    monkeypatch.setattr(bench, "this_gpu", lambda: machine(1.0, date="day 2"))
    assert program.record_topics(["doubling"], missing=True) == 0
    assert ahead == [[("doubling", 0), ("doubling", 1), ("doubling", 2)], [("doubling", 0), ("doubling", 2)]]
    dates = {row.case: row.date for row in record.load(path)}
    assert [dates[f"case {i}"] for i in range(3)] == ["day 2", "day 1", "day 2"]
    assert "2 of 2 cases measured" in capsys.readouterr().out
    assert program.record_topics(["doubling"], missing=True) == 0
    assert "0 of 0 cases measured" in capsys.readouterr().out


def test_a_lost_gpu_and_what_is_missing(topic, monkeypatch, tmp_path):
    """The new process is told the same: the case that lost the GPU has a row by then."""
    monkeypatch.setattr(bench, "this_gpu", lambda: machine(1.0))
    begun = []
    monkeypatch.setattr(program.os, "execv", lambda python, command: begun.append(command[7:]))
    monkeypatch.setattr(bench, "lost", lambda machine: "illegal memory access" if not begun else "")
    program.record_topics(["doubling"], seconds=100.0, missing=True)
    assert begun == [["--missing"]]
    program.record_topics(["doubling"], seconds=100.0, missing=True)
    rows = record.load(tmp_path / "test-gpu" / "doubling.json")
    assert {row.case for row in rows} == {"ceiling", "case 0", "case 1", "case 2"}


AHEAD = """
from labkit.ahead import compile_ahead
if __name__ == "__main__":
    compile_ahead([("fusion", 0), ("fusion", 1)], 100.0)
"""


@pytest.mark.skipif(not ptx.compiler(), reason="no C++ compiler here: PTX cannot be run")
def test_kernels_are_compiled_ahead_by_other_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    printed = what_runs.run_script(AHEAD, "ptx")
    assert re.fullmatch(r"Compiled ahead in \d+ s", printed), printed
    assert {path.stem for path in tmp_path.rglob("*.ptx")} == {"_rmsnorm_kernel", "_swiglu_kernel"}


def test_no_time_left_is_said(topic, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "this_gpu", lambda: machine(1.0))
    monkeypatch.setattr(program, "RESERVE", 60.0)
    old = [replace(row, date="2025-01-01 00:00:00") for row in measured(topic, 10.0, 20.0)]
    path = tmp_path / "test-gpu" / "doubling.json"
    record.save(old, path)
    assert program.record_topics(["doubling"], seconds=60.0) == 0
    out = capsys.readouterr().out
    assert [f"doubling: case {i}: SKIPPED" in out for i in range(3)] == [True] * 3
    assert record.load(path) == old


def test_a_broken_write_leaves_the_old_file(topic, monkeypatch, tmp_path):
    path = tmp_path / "doubling.json"
    record.save(measured(topic, 10.0), path)
    before = path.read_text()
    unwritable = [replace(row, us=[float("nan")]) for row in measured(topic, 10.0)]
    with pytest.raises(ValueError):
        record.save(unwritable, path)
    assert path.read_text() == before
    monkeypatch.setattr(record.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        record.save(measured(topic, 99.0), path)
    assert path.read_text() == before


def interrupt(*_):
    raise KeyboardInterrupt


def test_dry_run(topic, tmp_path, capsys):
    assert program.dry(["doubling"]) == 1  # the wrong peer
    out = capsys.readouterr().out
    assert "FAILED wrong peer: wrong" in out
    assert "  double: ok" in out
    topic.double = half_written
    program.dry(["doubling"])
    assert "FAILED double: wrong" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


# What a peer may answer where there is no GPU, or where it is not installed.
REASONS = (
    r"No module named '(flashinfer|liger_kernel)'|No viable backend|No available kernel|not supported! Only CUDA|"
    r"Could not run 'aten::_flash_attention_forward'|half a minute a shape|waits for the GPU to skip slots|takes no block table"
)


@pytest.mark.parametrize("name", sorted(program.topics("cases")))
@pytest.mark.filterwarnings("ignore")
def test_every_case_is_ready_to_be_measured(name, capsys):
    """`make record DRY=1`: all kernels and variants right, and a peer is missing only for a reason that is known."""
    assert program.dry([name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(": ok" in line for line in lines) >= len(bench.topic_cases(name, tiny=True))
    odd = [line for line in lines if "not run" in line and not re.search(REASONS, line)]
    assert not odd, odd


def test_a_variant_that_means_another_result_is_judged_by_it():
    """The running maximum recomputes nothing; where rows trip, the plain call says that it did."""
    case = next(c for c in unified.cases(tiny=True) if "8 of 8 rows trip" in c.name)
    rows = bench.measure("flash_decoding_pp", case, kernels.flash_decoding_pp, bench.Machine(kernels.DEVICE, record.stamp("-")))
    assert [row.verdict.partition(":")[0] for row in rows] == ["ok", "ok"], rows
    (_, wrong) = bench.measure(
        "flash_decoding_pp", replace(case, meaning=()), kernels.flash_decoding_pp, bench.Machine(kernels.DEVICE, record.stamp("-"))
    )
    assert wrong.verdict.startswith("wrong: values differ")


def test_topics_are_found_and_unknown_names_refused(capsys):
    assert "flash_decoding" in program.topics("cases")
    with pytest.raises(SystemExit, match=r"'nonsense' is not known; there are: .*flash_decoding"):
        program.main(["record", "--dry", "nonsense"])


@pytest.mark.parametrize(("problems", "code"), [([], 0), (["12 bytes spilled"], 1)])
def test_codegen_is_a_gate(monkeypatch, capsys, problems, code):
    report = types.SimpleNamespace(rows=[{"problems": []}, {"problems": problems}])
    monkeypatch.setattr(program, "topics", lambda declares: {"doubling": None} if declares == "codegen_cases" else {})
    monkeypatch.setattr(program.codegen, "report", lambda topic: report)
    assert program.main(["codegen"]) == code
    assert "== doubling" in capsys.readouterr().out


# --- experiments


def coin(seed):
    if seed == 2 and coin.broken:
        raise RuntimeError("the machine went down")
    return {"seed": seed, "value": seed * 0.5}


coin.broken = False


@pytest.fixture
def here(monkeypatch):
    """A recorded function is found again by its name, below the lab's root: let that be this folder."""
    monkeypatch.setattr(provenance, "ROOT", Path(__file__).parent)


def test_experiment(topic, here, tmp_path, monkeypatch, capsys):
    assert record.experiment("coin") is None
    assert capsys.readouterr().out == "Nothing was recorded for the experiment coin: `make experiments` runs it.\n"
    weights = tmp_path / "weights"
    weights.write_bytes(b"abc")
    lab = sys.modules["labkit.doubling"]
    lab.experiments = lambda: {"coin": record.Experiment(coin, seeds=(0, 1, 2), weights=weights)}
    monkeypatch.setattr(program, "topics", lambda declares: {"doubling": lab})
    assert program.main(["experiments", "coin"]) == 0
    capsys.readouterr()
    got = record.experiment("coin")
    assert got.samples == {seed: coin(seed) for seed in (0, 1, 2)}
    assert got.weights_sha256.startswith("ba7816bf")
    said = capsys.readouterr().out
    assert "Recorded experiment coin: 3 of 3 seeds (0, 1, 2), weights ba7816bf8f01." in said
    assert "The code is unchanged since." in said
    path = tmp_path / "cpu" / "coin.json"
    path.write_text(path.read_text().replace(got.source_hash, "0" * 16))
    assert not record.experiment("coin").is_fresh()
    assert "The code has changed since." in capsys.readouterr().out


def test_an_interrupted_experiment_keeps_its_seeds(topic, here, monkeypatch, capsys):
    monkeypatch.setattr(coin, "broken", True)
    with pytest.raises(RuntimeError, match="went down"):
        record.run_experiment("coin", record.Experiment(coin, seeds=(0, 1, 2)))
    assert list(record.experiment("coin").samples) == [0, 1]
    assert "2 of 3 seeds (0, 1)" in capsys.readouterr().out


# --- what the cases and peers of decoding say


def test_bytes_of_decode_cases_are_those_of_the_tensors():
    case = next(case for case in decoding.cases() if case.name == "Llama-3-8B B=1 L=1024")
    inputs = case.make(torch.Generator().manual_seed(0), "cpu")
    q, k, v = (inputs[name] for name in "qkv")
    assert q.shape == (1, 32, 128)
    assert k.shape == v.shape == (1, 1024, 8, 128)
    assert case.bytes == k.nbytes + v.nbytes + 2 * q.nbytes
    assert [case.bytes for case in decoding.cases()][:9] == pytest.approx([2**26] * 9, rel=0.04)


def test_tiny_cases_have_the_same_names():
    assert [case.name for case in decoding.cases(tiny=True)] == [case.name for case in decoding.cases()]


def test_the_published_table_is_the_blogs():
    assert all(batch * kv_len == 2**16 for batch, kv_len in list(decoding.PUBLISHED_US)[:9])
    assert len(decoding.PUBLISHED_US) == 10


def test_sdpa_is_not_told_a_backend_where_launches_are_timed():
    eager = [case for case in decoding.cases(tiny=True) if not case.graph]
    assert [("SDPA, its choice" in case.peers, "SDPA flash" in case.peers) for case in eager] == [(True, True)]
    q, k, v, lens = check.DecodeCase("", (33, 33), 8, 2, capacity=48).tensors()
    assert_output_matches(eager[0].peers["SDPA, its choice"](q, k, v, lens)(), q, k, v, lens)


def assert_output_matches(o, *args):
    check.assert_matches(o, lambda *args: decode_attention(*args)[0], *args)


@pytest.mark.parametrize("name", ["naive torch", "SDPA flash", "SDPA flash [B,H,L,D]", "SDPA math", "FlexDecoding"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_peers_agree_and_refuse_ragged_lengths(name):
    q, k, v, lens = check.DecodeCase("", (33, 33), 8, 2, capacity=48).tensors()
    assert_output_matches(peers.DECODE[name](q, k, v, lens)(), q, k, v, lens)
    with pytest.raises(ValueError, match="kv_lens: got 2 different lengths"):
        peers.DECODE[name](q, k, v, torch.tensor([33, 20], dtype=torch.int32))


class PlannedWrapper:
    """A stand-in for FlashInfer's wrappers. It attends to the pages it is told: only a right plan gives o."""

    def __init__(self, workspace, layout, backend, use_tensor_cores=None):
        assert (workspace.dtype, layout, backend) == (torch.uint8, "NHD", "fa2")

    def plan_pages(self, first, ids, last, num_q_heads, num_kv_heads, head_dim, page_size, q_data_type, kv_data_type):
        assert {x.dtype for x in (first, ids, last)} == {torch.int32}
        assert (num_q_heads, num_kv_heads, head_dim, q_data_type) == (8, 2, 64, torch.float32)
        self.page_size, self.sequences = page_size, []
        for b, n in enumerate(last.tolist()):
            assert 1 <= n <= page_size
            mine = ids[first[b] : first[b + 1]].tolist()
            self.sequences.append((mine, (len(mine) - 1) * page_size + n))

    def run(self, q, pages):
        assert pages[0].shape[1] == self.page_size
        out = []
        for b, (ids, n) in enumerate(self.sequences):
            k, v = (x[ids].flatten(0, 1)[None, :n] for x in pages)
            out.append(attention(q[None, self.starts[b] : self.starts[b + 1]], k, v)[0])
        return torch.cat(out)


class DecodeWrapper(PlannedWrapper):
    built = []  # use_tensor_cores of each

    def __init__(self, *args, use_tensor_cores, **kwargs):
        self.built.append(use_tensor_cores)
        super().__init__(*args, **kwargs)

    def plan(self, *sizes, **dtypes):
        self.plan_pages(*sizes, **dtypes)
        self.starts = range(len(self.sequences) + 1)


class PrefillWrapper(PlannedWrapper):
    def plan(self, starts, *sizes, causal, **dtypes):
        assert causal
        assert starts.dtype == torch.int32
        self.plan_pages(*sizes, **dtypes)
        self.starts = starts.tolist()


@pytest.fixture
def flashinfer(monkeypatch):
    stand_in = types.SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=DecodeWrapper, BatchPrefillWithPagedKVCacheWrapper=PrefillWrapper
    )
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    peers._flashinfer_plan.cache_clear()
    DecodeWrapper.built.clear()
    yield
    peers._flashinfer_plan.cache_clear()


def test_flashinfer_is_planned_over_the_pages_of_a_contiguous_cache(flashinfer):
    q, k, v, lens = check.DecodeCase("", (33, 16, 1), 8, 2, capacity=48).tensors()
    for name in ("FlashInfer", "FlashInfer, no tensor cores"):
        assert_output_matches(peers.DECODE_MHA[name](q, k, v, lens)(), q, k, v, lens)
    assert DecodeWrapper.built == [True, False]
    with pytest.raises(ValueError, match="multiple of 16"):
        peers.flashinfer(q, k[:, :40], v[:, :40], lens)


def test_flashinfer_without_tensor_cores_beside_mha():
    """Where every query head has keys of its own, and nowhere else."""
    for topic in ("flash_decoding", "gqa"):
        for case in bench.topic_cases(topic, tiny=True):
            if "FlashInfer" in case.peers:
                inputs = case.make(torch.Generator(), "cpu")
                mha = inputs["q"].shape[1] == inputs["k"].shape[2]
                assert ("FlashInfer, no tensor cores" in case.peers) == mha, case.name
    assert sum("FlashInfer, no tensor cores" in case.peers for case in bench.topic_cases("gqa")) == 2


def pages_of(k, v, page_size, order):
    """k and v [B, L, Hkv, D] in pages [P, page_size, Hkv, D] in the order given, and the block table."""
    table = torch.tensor(order, dtype=torch.int32).view(len(k), -1)
    pages = [torch.empty(len(order), page_size, *x.shape[2:]) for x in (k, v)]
    for x, pool in zip((k, v), pages):
        pool[table.flatten().long()] = x.reshape(-1, page_size, *x.shape[2:])
    return *pages, table


def test_flashinfer_over_pages(flashinfer):
    """Decodes, and chunks of 2, 1 and 3 queries, over pages out of order."""
    q, k, v, lens = check.DecodeCase("", (33, 16, 5), 8, 2, capacity=48).tensors()
    k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)  # the stand-in gathers whole pages
    k_pages, v_pages, table = pages_of(k, v, 16, [8, 0, 4, 2, 6, 1, 7, 3, 5])
    call = peers.flashinfer_paged(q, k_pages, v_pages, table, lens)
    assert_output_matches(call(), q, k, v, lens)
    chunks = torch.randn(6, 8, 64, generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
    got = peers.flashinfer_paged(chunks, k_pages, v_pages, table, lens, q_starts=starts)()
    for b, n in enumerate(lens.tolist()):
        mine = slice(int(starts[b]), int(starts[b + 1]))
        expected = attention(chunks[None, mine], k[b : b + 1, :n], v[b : b + 1, :n])[0]
        torch.testing.assert_close(got[mine], expected)


# --- the GPU's timer, on a CUDA that only counts


class FakeCuda:
    """Each call takes `us` on the device and, outside a graph, `launch` more. With `refuse` it waits for the device."""

    def __init__(self, us, launch=0.0, refuse=False):
        self.us, self.launch, self.refuse, self.now, self.capturing, self.mode = us, launch, refuse, 0.0, None, "default"

    def call(self):
        if self.refuse and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing is not None:
            assert not self.refuse, "a capture that fails leaves the process spoiled: it must not be tried"
            self.capturing.calls += 1
        else:
            self.now += self.us + self.launch

    def CUDAGraph(self):
        graph = types.SimpleNamespace(calls=0)

        def replay():
            self.now += graph.calls * self.us

        graph.replay = replay
        return graph

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None

    def Event(self, enable_timing):
        event = types.SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) / 1e3
        return event

    def Stream(self):
        return types.SimpleNamespace(wait_stream=lambda other: None)

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    current_stream = Stream
    stream = staticmethod(lambda stream: contextlib.nullcontext())
    synchronize = staticmethod(lambda: None)


@pytest.mark.parametrize(
    ("graph", "refuse", "mode", "us"),
    [(True, False, "graph", 3.0), (True, True, "eager", 10.0), (False, False, "eager", 10.0)],
)
def test_gpu_timer(monkeypatch, graph, refuse, mode, us):
    cuda = FakeCuda(3.0, launch=7.0, refuse=refuse)
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    sample, got = timing.gpu_timer([cuda.call] * 4, graph=graph)
    assert got == mode
    start = cuda.now
    assert cuda.mode == "default"
    assert sample() == pytest.approx([us] * timing.REPLAYS)
    per_replay = (cuda.now - start) / (timing.REPLAYS + timing.WARMUPS)
    assert 1e3 <= per_replay < 1e3 + 4 * us  # one replay is a millisecond, not much more


def test_enough_copies_for_a_cold_cache(monkeypatch):
    monkeypatch.setattr(timing, "cold_bytes", lambda: 200e6)
    assert [timing.num_copies(n) for n in (1_000_000, 199_999_999, 200_000_000, 10**10)] == [200, 2, 2, 1]


def test_many_copies_are_replayed_less_often(monkeypatch):
    """A graph of 20,000 calls takes 60 ms: one replay would do for a round of 60 ms, and three are made."""
    cuda = FakeCuda(3.0)
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    sample, mode = timing.gpu_timer([cuda.call] * 20_000)
    start = cuda.now
    assert (sample(), mode) == (pytest.approx([3.0] * 3), "graph")
    assert cuda.now - start == pytest.approx(4 * 60_000)  # one to warm up


def test_of_many_calls_that_cannot_be_captured_a_few_are_timed(monkeypatch):
    cuda = FakeCuda(3.0, launch=97.0, refuse=True)
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    sample, mode = timing.gpu_timer([cuda.call] * 5_000)
    start = cuda.now
    assert (sample()[0], mode) == (pytest.approx(100.0), "eager")
    assert cuda.now - start < 200_000  # microseconds


def test_rows_are_plain_json(topic):
    for row in measured(topic, 10.0):
        assert record.Row(**json.loads(json.dumps(asdict(row), allow_nan=False))) == row
