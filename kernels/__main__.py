"""`python -m kernels record | tune | metal | codegen | experiments`: the one program that imports kernels and labkit.

record [topic ...]        measure every case on this GPU into labkit/results/<gpu>/, in at most 8 minutes (--seconds)
record --dry [topic ...]  go through every case for correctness, on tiny sizes, anywhere; writes nothing
record --missing          only cases that the record of this GPU lacks, or has of an older kernel; likewise tune
tune [--dry]              compile all trials (labkit/trials.py) for the H200 and, on a GPU, measure them; --dry as above
metal [stage ...]         all that needs a GPU, in one go: tests, record, tune, notebooks, sanitizer (labkit/metal.py)
codegen [topic ...]       compile every kernel ahead of time and judge what the compiler made of it
codegen --table           write labkit/results/compiled.json: one call of every kernel, for eight GPUs
experiments [name ...]    run the long CPU experiments into labkit/results/cpu/
"""

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import signal
import sys
import time
from dataclasses import replace

import kernels
from labkit import bench, codegen, metal, record, trials, what_runs
from labkit.ahead import compile_ahead
from labkit.comparison import Comparison

SECONDS = 470.0
RESERVE = 10.0  # for the last copy and the tables


def topics(declares: str) -> dict:
    """{topic: labkit module} of the kernel files whose twin in labkit declares this function. No list to keep."""
    names = sorted(m.name for m in pkgutil.iter_modules(kernels.__path__) if not m.name.startswith("_"))
    modules = {n: importlib.import_module(f"labkit.{n}") for n in names if importlib.util.find_spec(f"labkit.{n}")}
    return {name: module for name, module in modules.items() if hasattr(module, declares)}


def chosen(known, wanted) -> list[str]:
    """The wanted names, all if none; leaves the program if one is not known."""
    for name in wanted:
        if name not in known:
            sys.exit(f"{name!r} is not known; there are: {', '.join(known) or 'none'}")
    return list(wanted or known)


def ops(topic):
    return importlib.import_module(f"kernels.{topic}")


def check_only() -> bench.Machine:
    """Where kernels run in this process, without a timer."""
    return bench.Machine(kernels.DEVICE, record.stamp(kernels.DEVICE))


def dry(names) -> int:
    """Check every case on tiny sizes. 1 if one of our kernels fails or a peer is wrong."""
    machine, bad = check_only(), 0
    for topic in names:
        for case in bench.topic_cases(topic, tiny=True):
            print(f"{topic}: {case.name}")
            for row in bench.measure(topic, case, ops(topic), machine):
                failed = not row.verdict.startswith("ok") and (row.source_hash or row.verdict.startswith("wrong"))
                bad += bool(failed)
                print(f"  {'FAILED ' if failed else ''}{row.provider}: {row.verdict}", flush=True)
    print(f"Dry run: {bad} failed. Nothing was timed, nothing written.")
    return int(bad > 0)


class TimeIsUp(BaseException):
    """The run must end now. Not an Exception: `measure` takes those for a provider's own."""


class GpuLost(Exception):
    """A kernel left the GPU in a state in which this process can't use it any more."""


def is_missing(case, module, rows) -> bool:
    """Whether the rows of a record lack the case's kernel, or a variant, as they are now."""
    known = {(row.case, row.provider, row.source_hash) for row in rows}
    return any(digest and (*key, digest) not in known for key, digest in bench.hashes([case], module).items())


def numbers(topic, gpu, missing) -> list[int]:
    """Of the topic's cases: all, or those that the record of this GPU lacks."""
    rows = record.find(topic, gpu)
    return [i for i, case in enumerate(bench.topic_cases(topic)) if not missing or is_missing(case, ops(topic), rows)]


class Recording:
    """One run: the limits first, then the cases, each case saved when it is done, the copy once more at the end.

    wanted: {topic: numbers of the cases to measure}. begun counts the cases that were begun, or left for the end: a run
    that lost its GPU goes on behind them.
    """

    def __init__(self, wanted, machine, seconds, skip=0):
        self.machine, self.end = machine, time.monotonic() + seconds - RESERVE
        self.begun, self.measured, self.skip = 0, 0, skip
        self.wanted, self.cases = wanted, {topic: bench.topic_cases(topic) for topic in wanted}
        self.folder = record.RESULTS / record.slug(machine.shared["device"])
        self.ceilings = bench.measure_ceilings("", machine)

    def save(self, topic, rows):
        """Add rows to the topic's file; what is there of cases that no longer exist goes."""
        names = [case.name for case in self.cases[topic]]
        record.add([replace(row, topic=topic) for row in rows], self.folder / f"{topic}.json", names)

    def measure(self, topic, case):
        start = time.monotonic()
        rows = bench.measure(topic, case, ops(topic), self.machine)
        self.save(topic, self.ceilings + rows)
        self.measured += 1
        ran = sum(row.ran for row in rows)
        print(f"{topic}: {case.name}: {ran} of {len(rows)} timed, {time.monotonic() - start:.1f} s", flush=True)
        if why := bench.lost(self.machine):
            raise GpuLost(f"{topic}: {case.name}: {why}")

    def run(self):
        """Every section gets its share of the time that is left; what it had to skip is tried again at the end."""
        groups = {}
        for topic, cases in self.cases.items():
            for case in (cases[i] for i in self.wanted[topic]):
                groups.setdefault((topic, case.section), []).append(case)
        left, skipped = sum(map(len, groups.values())), []
        for (topic, _), cases in groups.items():
            now = time.monotonic()
            until = now + (self.end - now) * len(cases) / left
            left -= len(cases)
            for case in cases:
                self.begun += 1
                if self.begun <= self.skip:
                    continue
                if time.monotonic() < until:
                    self.measure(topic, case)
                else:
                    skipped.append((topic, case))
        for topic, case in skipped:
            if time.monotonic() < self.end:
                self.measure(topic, case)
            else:
                print(f"{topic}: {case.name}: SKIPPED, the time was spent; an older record of it stays", flush=True)
        again = bench.measure_ceilings("", self.machine, only="copy", suffix=" again")
        for topic in self.cases:
            if (self.folder / f"{topic}.json").exists():
                self.save(topic, again)

    def tables(self):
        for topic, cases in self.cases.items():
            rows = record.find(topic, self.machine.shared["device"])
            print(f"\n== {topic}\n{Comparison(topic, cases, rows, bench.hashes(cases, ops(topic)))}")
        print(f"\n{self.measured} of {self.begun - self.skip} cases measured on {self.machine.shared['device']}")


def record_topics(names, seconds=SECONDS, skip=0, missing=False) -> int:
    """Measure the topics on this GPU within `seconds`, without the first `skip` cases; missing: only those that its
    record lacks. 1 if there is no usable GPU.
    """
    machine = bench.this_gpu()
    if machine is None:
        print("No usable GPU here: nothing was measured. `make record DRY=1` checks every case without one.")
        return 1

    end = time.monotonic() + seconds

    def stop(*_):
        raise TimeIsUp

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)  # again, should one be raised where nobody hears it
    recording, lost = None, False
    try:
        wanted = {topic: numbers(topic, machine.shared["device"], missing) for topic in names}
        if not skip:
            compile_ahead([(topic, i) for topic in names for i in wanted[topic]], seconds / 3)
        recording = Recording(wanted, machine, end - time.monotonic(), skip)
        recording.run()
    except TimeIsUp:
        print(f"STOPPED after {seconds:.0f} s in the middle of a case; all finished cases are saved.")
    except GpuLost as error:
        print(f"LOST the GPU: {error}\nA new process goes on with the next case.", flush=True)
        lost = True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if lost:
        # The case that lost it is saved: where only the missing are wanted, it is none of them any more.
        options = ["--missing"] if missing else ["--skip", str(recording.begun)]
        return begin_again(names, end - time.monotonic(), options)
    if recording:
        recording.tables()
    return 0


def begin_again(names, seconds, options) -> int:
    """Let a new process record what is left: an illegal access spoils a process, not the GPU."""
    arguments = ["record", *names, "--seconds", f"{max(seconds, 1):.0f}", *options]
    os.execv(sys.executable, [sys.executable, "-m", "kernels", *arguments])


def tune(dry, seconds=SECONDS, missing=False) -> int:
    """Compile all trials; on a GPU, measure them within `seconds`; missing: only those that its record lacks.

    dry: check them on tiny sizes; 1 if one is wrong.
    """
    end = time.monotonic() + seconds
    machine = check_only() if dry else bench.this_gpu()
    rows, path, names, todo = [], None, [trial.name for trial in trials.TRIALS], list(range(len(trials.TRIALS)))
    if not dry:
        compiled = trials.load()
        if not machine or trials.Log(compiled, []).stale:  # a GPU's minutes are for measuring
            compiled = trials.compile_trials()
            trials.save(compiled)
    if machine and not dry:
        if missing:
            known = record.find("trials", machine.shared["device"])
            cases = [(trials.bench_case(trial), trials.ops_of(trial)) for trial in trials.TRIALS]
            todo = [i for i, one in enumerate(cases) if is_missing(*one, known)]
        compile_ahead([("trials", i) for i in todo], (end - time.monotonic()) / 2)
        path = record.RESULTS / record.slug(machine.shared["device"]) / "trials.json"
        rows = bench.measure_ceilings("trials", machine)
    for trial in (trials.TRIALS[i] for i in todo) if machine else ():
        if not dry and time.monotonic() > end:
            print(f"{trial.name}: SKIPPED, the time was spent", flush=True)
            continue
        rows += trials.measure(trial, machine, tiny=dry)
        if path:
            record.add(rows, path, names)
        print(f"{trial.name}: " + "; ".join(f"{row.provider} {row.verdict}" for row in rows[-2:]), flush=True)
    if not dry:
        log = trials.Log(compiled, record.load(path) if path and path.exists() else [])
        print(log, "; ".join(f"{n} {word}" for word, n in log.tally().items()), sep="\n")
    return int(any(not row.verdict.startswith("ok") for row in rows if row.case != record.CEILING))


def compile_topics(names) -> int:
    """1 if the gate fails for one of the topics."""
    bad = 0
    for topic in names:
        report = codegen.report(topic)
        bad += sum(bool(row["problems"]) for row in report.rows)
        print(f"== {topic}\n{report}\n", flush=True)
    if bad:
        print("Mend it in the kernel or its block rule; what a case may allow: `Case` in labkit/codegen.py")
    return int(bad > 0)


def table() -> int:
    """Write what runs where. A kernel is run, in the interpreter and as PTX, where a benchmark case calls it."""
    cases, run = representatives(), {"interpreter": verdicts() if kernels.INTERPRETED else {}}
    script = "import json; from kernels.__main__ import verdicts; print(json.dumps(verdicts()))"
    run["ptx"] = json.loads(what_runs.run_script(script, "ptx").splitlines()[-1])
    made = what_runs.compile_table(cases, run)
    what_runs.save(made)
    shown = what_runs.Table(made)
    print(shown, shown.notes(), sep="\n")
    return 0


def representatives() -> dict:
    """{name: compiler case} of every kernel. A function that two topics show stands once, where it is defined."""
    cases, names = what_runs.representatives(topics("codegen_cases")), {}
    for name in sorted(cases, key=lambda name: kernel_of(name).__module__ != name.partition(":")[0]):
        names.setdefault(kernel_of(name), name)
    return {name: case for name, case in cases.items() if name in names.values()}


def verdicts() -> dict[str, str]:
    """{name: verdict} of one benchmark case a kernel, on tiny sizes, as kernels run in this process."""
    names, found, machine = {kernel_of(name): name for name in representatives()}, {}, check_only()
    for topic in topics("cases"):
        for case in bench.topic_cases(topic, tiny=True):
            name = names.get(getattr(ops(topic), case.op))
            if name and name not in found:
                plain = replace(case, peers={}, variants={}, without={})
                found[name] = bench.measure(topic, plain, ops(topic), machine)[0].verdict
    return found


def kernel_of(name):
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def run_experiments(wanted) -> int:
    """Run the wanted experiments (none: all) and record each."""
    known = {name: e for module in topics("experiments").values() for name, e in module.experiments().items()}
    for name in chosen(known, wanted):
        print(record.run_experiment(name, known[name]), flush=True)
    return 0


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser("kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=("record", "tune", "metal", "codegen", "experiments"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--dry", action="store_true", help="with record, tune and metal: check, do not measure")
    parser.add_argument("--seconds", type=float, help="with record, tune and metal: how long it may take")
    parser.add_argument("--missing", action="store_true", help="with record and tune: what this GPU's record lacks")
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="with codegen: write the table of the book")
    options = parser.parse_intermixed_args(arguments)
    if options.command == "experiments":
        return run_experiments(options.names)
    if options.command == "tune":
        return tune(options.dry, options.seconds or SECONDS, options.missing)
    if options.command == "metal":
        return metal.run(chosen(metal.STAGES, options.names), options.seconds or metal.SECONDS, options.dry)
    names = chosen(topics("cases" if options.command == "record" else "codegen_cases"), options.names)
    if options.command == "codegen":
        return table() if options.table else compile_topics(names)
    if options.dry:
        return dry(names)
    return record_topics(names, options.seconds or SECONDS, options.skip, options.missing)


if __name__ == "__main__":
    sys.exit(main())
