"""All that needs a GPU, in one command: `python -m kernels metal`, or `make metal`.

Each stage is a process of its own with a limit of time, so one that hangs or dies costs no other. They come in the
order of what is hardest to have otherwise: are the kernels right, how fast are they, what do the trials say, do the
notebooks run, does NVIDIA's compute-sanitizer find something. What came of them is kept beside the measurements, in
`results/<gpu>/metal.json`, and shown on the page "Results". A stage is also a command that can be run alone.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

from labkit import bench, record
from labkit.provenance import ROOT

SECONDS = 1800.0
LEAST = 20.0  # a stage is not begun with less
JOBS = str(max(2, (os.cpu_count() or 2) // 2))
HANGS = ("-o", "faulthandler_timeout=180")
PYTEST = ("-m", "pytest", "-q", "--on-device", *HANGS)
TESTS = ("pytest", "xdist", "safetensors", "matplotlib")
SAMPLE = ("--every", "12")  # under compute-sanitizer all tests would take hours


@dataclass(frozen=True)
class Stage:
    """One command, and what it takes."""

    arguments: tuple[str, ...]  # of Python
    seconds: float  # that it may take
    tool: tuple[str, ...] = ()  # a program to run it under
    needs: tuple[str, ...] = ()  # modules
    dry: tuple[str, ...] | None = None  # arguments of a rehearsal without a GPU; None: there is none

    def missing(self, dry=False) -> str:
        """Why it can't run here, "" if it can. dry: without its tool."""
        if self.tool and not dry and not shutil.which(self.tool[0]):
            return f"{self.tool[0]} is missing"
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"missing: {', '.join(missing)}" if missing else ""


def _sanitizer(tool):
    return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")


STAGES = {
    "tests": Stage((*PYTEST, "-n", JOBS), 180, needs=TESTS, dry=(*PYTEST, "-n", JOBS, *SAMPLE)),
    "record": Stage(("-m", "kernels", "record"), 490, dry=("-m", "kernels", "record", "--dry")),
    "tune": Stage(("-m", "kernels", "tune"), 180, dry=("-m", "kernels", "tune", "--dry")),
    "notebooks": Stage(("-m", "labkit.notebooks", "test", "-n", JOBS), 300, needs=("nbval", "ipykernel")),
    "memcheck": Stage((*PYTEST, *SAMPLE), 300, _sanitizer("memcheck"), TESTS),
    "racecheck": Stage((*PYTEST, *SAMPLE), 300, _sanitizer("racecheck"), TESTS),
}


def run(names, seconds=SECONDS, dry=False) -> int:
    """Run the stages with these names within `seconds`. 1 if one failed or was stopped, or without a usable GPU.

    dry: their rehearsal on small sizes, anywhere; nothing is written.
    """
    machine = bench.this_gpu()
    if machine is None and not dry:
        print("No usable GPU here: nothing was run. `make metal DRY=1` rehearses it without one.")
        return 1
    end, rows = time.monotonic() + seconds, []
    for name in names:
        left = end - time.monotonic()
        verdict = run_stage(STAGES[name], left, dry)
        print(f"== {name}: {verdict}\n", flush=True)
        rows.append((name, verdict))
        if not dry:
            row = record.Row("metal", name, " ".join(STAGES[name].arguments), False, [], 0, None, verdict, "",
                             **machine.shared, source_hash="")  # fmt: skip
            record.add([row], record.RESULTS / record.slug(machine.shared["device"]) / record.METAL, STAGES)
    print("\n".join(f"{name:10} {verdict}" for name, verdict in rows))
    return int(any(verdict.startswith(("failed", "stopped")) for _, verdict in rows))


def run_stage(stage, left, dry=False) -> str:
    """Run one stage; its output is shown as it comes. "ok: ", "failed: " or "stopped ...: " and its last line, or
    "not run: " and why."""
    arguments = stage.dry if dry else stage.arguments
    if arguments is None:
        return "not run: it has no rehearsal"
    if left < LEAST:
        return "not run: the time was spent"
    if why := stage.missing(dry):
        return f"not run: {why}"
    limit = min(stage.seconds, left)
    timed = not dry and arguments[-1] in ("record", "tune")  # they stop themselves, and keep what they have
    arguments = [*arguments, *(("--seconds", f"{limit - LEAST / 2:.0f}") if timed else ())]
    command = [*(() if dry else stage.tool), sys.executable, *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if stage.tool else {})
    start, last = time.monotonic(), ""
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    alarm = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))  # with all that it started
    alarm.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip("= \n") or last
        code, took = process.wait(), time.monotonic() - start
    finally:  # Ctrl-C does not reach a session of its own
        alarm.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    word = "stopped when its time was spent" if code == -signal.SIGKILL else "failed" if code else "ok"
    return f"{word}: {last[:160]} ({took:.0f} s)"
