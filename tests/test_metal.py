"""The one command for a GPU: stages that pass, fail, hang, or cannot run here, and what is written of them."""

import importlib.util
import time

import pytest

import kernels.__main__ as program
from labkit import bench, metal, record
from labkit.metal import Stage

PLANTED_BUGS = [
    ("labkit/metal.py", "limit = min(stage.seconds, left)", "limit = stage.seconds"),
    ("labkit/metal.py", "os.killpg, (process.pid, signal.SIGKILL)", "os.kill, (process.pid, signal.SIGKILL)"),
    ("labkit/metal.py", '"failed" if code else "ok"', '"ok"'),
    ("labkit/metal.py", "code == -signal.SIGKILL", "code == signal.SIGKILL"),
    ("labkit/metal.py", "int(any(verdict", "int(all(verdict"),
    ("labkit/metal.py", "        if not dry:\n            row", "        if True:\n            row"),
    ("labkit/metal.py", "if left < LEAST:", "if left < 0:"),
    ("labkit/metal.py", "if self.tool and not dry and not shutil.which(self.tool[0]):", "if False:"),
    ("labkit/metal.py", "last = line.strip(\"= \\n\") or last", "last = last or line.strip(\"= \\n\")"),
    ("labkit/metal.py", "if machine is None and not dry:", "if machine is None:"),
]
NOW = dict(device="Test GPU", driver="1", torch="2", triton="3", date="2026-01-01 00:00:00", commit="abc")
SLEEPER = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


def script(text, seconds=60.0, **more):
    return Stage(("-c", text), seconds, **more)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine that says it has a GPU, stages of our own, an empty results folder."""
    monkeypatch.setattr(bench, "this_gpu", lambda: bench.Machine("cpu", NOW))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    stages = {"good": script("print('begun'); print('3 passed')"), "bad": script("print('1 failed'); raise SystemExit(1)")}
    monkeypatch.setattr(metal, "STAGES", stages)
    return tmp_path / "test-gpu" / "metal.json"


def test_what_came_of_each_stage_is_kept(gpu, capsys):
    assert metal.run(["good", "bad"]) == 1
    rows = {row.case: row for row in record.load(gpu)}
    assert rows["good"].verdict.startswith("ok: 3 passed (")
    assert rows["bad"].verdict.startswith("failed: 1 failed (")
    assert all(not row.ran and row.us == [] and row.device == "Test GPU" for row in rows.values())
    out = capsys.readouterr().out
    assert out.index("3 passed") < out.index("== good") < out.index("1 failed")
    metal.STAGES["bad"] = script("print('4 passed')")
    assert metal.run(["bad"]) == 0
    assert {row.case: row.verdict[:12] for row in record.load(gpu)} == {"good": "ok: 3 passed", "bad": "ok: 4 passed"}


def test_one_that_hangs_is_stopped_with_all_it_started(gpu, monkeypatch):
    monkeypatch.setattr(metal, "LEAST", 0.0)
    start = time.monotonic()
    verdict = metal.run_stage(script(SLEEPER, seconds=3.0), 100.0)
    assert verdict == "stopped when its time was spent: begun (3 s)"
    assert time.monotonic() - start < 30  # not the 60 s that its child would sleep, with the pipe open


def test_what_cannot_run_says_why(gpu):
    assert metal.run_stage(script("", tool=("no-such-tool",)), 100.0) == "not run: no-such-tool is missing"
    assert metal.run_stage(script("", needs=("no_such_module",)), 100.0) == "not run: missing: no_such_module"
    assert metal.run_stage(script("", needs=("no_such_module",), dry=("-c", "")), 100.0, dry=True) == "not run: missing: no_such_module"
    assert metal.run_stage(script(""), metal.LEAST - 1) == "not run: the time was spent"
    assert metal.run_stage(script(""), 100.0, dry=True) == "not run: it has no rehearsal"


def test_the_time_is_shared(gpu):
    """Record and tune are told how long they may take: they stop themselves, and keep what they have."""
    for name in ("record", "tune"):
        told = Stage(("-c", "import sys; print(sys.argv[1:])", name), 490.0)
        assert f"['{name}', '--seconds', '90']" in metal.run_stage(told, 100.0)
        assert f"['{name}', '--seconds', '480']" in metal.run_stage(told, 1000.0)


def test_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "this_gpu", lambda: None)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert metal.run(["tests"]) == 1
    assert "No usable GPU here: nothing was run." in capsys.readouterr().out
    monkeypatch.setattr(metal, "STAGES", {"good": script("print('full')", dry=("-c", "print('rehearsed')"))})
    assert metal.run(["good"], dry=True) == 0
    assert "ok: rehearsed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_stages_are_commands_that_exist():
    for name, stage in metal.STAGES.items():
        for arguments in filter(None, (stage.arguments, stage.dry)):
            assert arguments[0] == "-m", name
            assert importlib.util.find_spec(arguments[1]), name
    assert sum(stage.seconds for stage in metal.STAGES.values()) <= metal.SECONDS
    assert list(metal.STAGES)[:2] == ["tests", "record"]  # what no other machine can tell comes first


@pytest.mark.parametrize("name", ["record", "tune"])
def test_record_and_tune_take_their_time_from_the_stage(name, monkeypatch):
    told = []
    record_topics = lambda names, seconds, skip, missing: told.append((seconds, missing)) or 0  # noqa: E731
    monkeypatch.setattr(program, "record_topics", record_topics)
    monkeypatch.setattr(program, "tune", lambda dry, seconds, missing: told.append((seconds, missing)) or 0)
    assert program.main([name, "--seconds", "90"]) == 0
    assert program.main([name, "--missing"]) == 0
    assert told == [(90.0, False), (program.SECONDS, True)]


def test_an_interrupt_ends_the_stage(gpu, monkeypatch):
    """Ctrl-C reaches this process alone: the stage, in a session of its own, is ended with all that it started."""
    begun = []

    class Interrupted:
        def __init__(self, command, **options):
            self.process = real(command, **options)
            begun.append(self.process)
            self.pid, self.poll, self.wait = self.process.pid, self.process.poll, self.process.wait

        @property
        def stdout(self):
            raise KeyboardInterrupt

    real = metal.subprocess.Popen
    monkeypatch.setattr(metal.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        metal.run_stage(script("import time; time.sleep(60)"), 100.0)
    assert begun[0].wait(10) == -metal.signal.SIGKILL
