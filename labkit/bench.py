"""Is it fast? Measured live on a GPU, read from the record elsewhere, never guessed.

A topic declares what is worth timing: `labkit/<topic>.py` has `cases(tiny=False) -> list[Case]`. `bench` checks every
provider against the reference first (`labkit.check`) and times only what is right, kernel and peers in turn, on the
same inputs. Without a GPU it shows what `make record` wrote, with device, versions, date and commit, and says whether
the kernel has changed since; or it says that nothing was recorded.
"""

import contextlib
import functools
import importlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from labkit import check, timing
from labkit.comparison import Comparison
from labkit.provenance import source_hash
from labkit.record import CEILING, Row, find, stamp
from labkit.rules import changed
from labkit.trace import interpreted

ROUNDS = 3
SEED = 0


@dataclass(frozen=True)
class Case:
    """One line of a table: an operation on one size of inputs, and what else could do it.

    name: unique in its topic.
    op: name of the function in `kernels.<topic>`. It does not write to its arguments.
    reference: name of the function in `labkit.<topic>` that it has to match; "" if it is the same.
    make(generator, device) -> its arguments by name. Lengths and indices must not depend on the generator: a peer
        plans once, and every copy of the inputs has to suit that plan.
    bytes, flops: the least that has to be moved and computed.
    peers: {name: prepare}. prepare(**inputs) imports, plans and lays out whatever the peer wants, untimed, and
        returns a function without arguments; its outputs are compared with the first ones of the reference. What it
        raises is the reason why the peer did not run.
    variants: {name: keyword arguments} of the kernel, timed beside its default. The keyword "rules" is not the
        kernel's: it changes block rules, as `labkit.rules.changed` takes them.
    meaning: keywords of variants that change the result and not only the way to it: the reference takes them too.
    without: {peer: reason} for peers left out of this case.
    graph: False times single launches from Python, as a notebook user meets them.
    """

    name: str
    op: str
    make: Callable[[torch.Generator, torch.device], dict]
    bytes: int
    flops: int = 0
    section: str = ""
    peers: Mapping[str, Callable] = field(default_factory=dict)
    variants: Mapping[str, dict] = field(default_factory=dict)
    meaning: tuple[str, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    graph: bool = True
    reference: str = ""


class NotRun(Exception):
    """Why a provider was not run."""


@contextlib.contextmanager
def poisoned():
    """Memory from torch.empty is NaN (integers: the largest) inside, so an output left unwritten shows."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


@dataclass(frozen=True)
class Machine:
    """Where to measure. shared: the fields from `labkit.record.stamp`. timer None: check only, as a dry run does."""

    device: str
    shared: dict[str, str]
    timer: Callable | None = None


def this_gpu() -> Machine | None:
    """The GPU of this process; None where kernels do not run compiled. The interpreter is never timed."""
    if interpreted() or not torch.cuda.is_available():
        return None
    driver = timing.nvidia_smi("driver_version")
    return Machine("cuda", stamp(torch.cuda.get_device_name(), driver), timing.gpu_timer)


def lost(machine: Machine) -> str:
    """Why this process can't use its GPU any more (an illegal access of a kernel, say), "" while it can."""
    try:
        if machine.device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        return _first_line(error)
    return ""


def topic_module(topic):
    """The module labkit.<topic>."""
    return importlib.import_module(f"labkit.{topic}")


def topic_cases(topic, **options) -> list[Case]:
    """The cases that a topic declares. Raises ValueError if two have the same name."""
    cases = topic_module(topic).cases(**options)
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"cases of {topic}: got the name {max(names, key=names.count)!r} twice, expected unique names")
    return cases


@functools.cache
def _digest(kernel, options: str) -> str:
    return source_hash(kernel, extra=json.loads(options))


def providers(case: Case, ops) -> dict[str, tuple[Callable, str]]:
    """{name: (prepare, source hash)}: the kernel, its variants, then the peers (hash "")."""
    kernel = getattr(ops, case.op)

    def bound(rules=None, **options):
        def prepare(**inputs):
            call = functools.partial(kernel, **inputs, **options)
            return functools.partial(_under, rules, call) if rules else call

        return prepare, _digest(kernel, json.dumps(options | ({"rules": rules} if rules else {}), sort_keys=True))

    own = {case.op: bound()} | {name: bound(**options) for name, options in case.variants.items()}
    return own | {name: (prepare, "") for name, prepare in case.peers.items()}


def _under(rules, call):
    with changed(rules):
        return call()


def hashes(cases, ops) -> dict[tuple[str, str], str]:
    """{(case, provider): source hash} of the kernels as they are now."""
    return {(case.name, name): digest for case in cases for name, (_, digest) in providers(case, ops).items()}


def judge(got, reference, inputs, partial=False) -> tuple[float | None, str]:
    """(largest error, "ok: ..." or "wrong: ..."). partial: got may be the first outputs of the reference only."""
    count = len(got) if isinstance(got, (tuple, list)) else 1

    def first(**kwargs):
        out = reference(**kwargs)
        return out[:count] if isinstance(out, (tuple, list)) else out

    verdicts = check.compare(got, first if partial else reference, **inputs)
    worst = max(verdicts, key=lambda v: (not v.ok, v.error))
    error = max(v.error for v in verdicts)
    why = worst.problem or f"error {worst.error:.2g}, limit {worst.limit:.2g}"
    return error if math.isfinite(error) else None, f"{'ok' if worst.ok else 'wrong'}: {why}"


def once(reference):
    """The reference under options, computed once a dtype: all providers of a case are judged on the same inputs."""
    known = {}

    def under(**options):
        def call(**inputs):
            key = (*(getattr(x, "dtype", None) for x in inputs.values()), repr(sorted(options.items())))
            if key not in known:
                known[key] = reference(**inputs, **options)
            return known[key]

        return call

    return under


def measure(topic, case, ops, machine: Machine) -> list[Row]:
    """Check every provider of a case, then time those that are right, in turn."""
    reference = once(getattr(topic_module(topic), case.reference or case.op))
    generator = torch.Generator(machine.device).manual_seed(SEED)
    num_copies = timing.num_copies(case.bytes) if machine.timer else 1
    copies, rows, samplers = [], {}, {}
    for name, (prepare, digest) in providers(case, ops).items():
        row = Row(topic, case.name, name, False, [], case.bytes, None, "", "", **machine.shared, source_hash=digest)
        try:
            if name in case.without:
                raise NotRun(case.without[name])
            copies = copies or [case.make(generator, machine.device) for _ in range(num_copies)]
            calls = [prepare(**inputs) for inputs in copies]
            # a library is trusted to write its outputs, and poison would make a compiled one compile again
            with poisoned() if digest else contextlib.nullcontext():
                got = calls[0]()
            meant = {key: value for key, value in case.variants.get(name, {}).items() if key in case.meaning}
            error, verdict = judge(got, reference(**meant), copies[0], partial=not digest)
            row = replace(row, error=error, verdict=verdict)
            if machine.timer and verdict.startswith("ok"):
                samplers[name], mode = machine.timer(calls, graph=case.graph)
                row = replace(row, mode=mode)
        except Exception as error:  # whatever it raises is the reason, and the others go on
            row = replace(row, verdict=_reason(error))
        rows[name] = row
    samples = {name: [] for name in samplers}
    for _ in range(ROUNDS):  # in turn, so that a drifting clock meets all of them
        for name, sample in list(samplers.items()):
            try:
                samples[name] += sample()
            except Exception as error:
                rows[name] = replace(rows[name], mode="", verdict=_reason(error))
                del samplers[name], samples[name]
    for name, us in samples.items():
        rows[name] = replace(rows[name], ran=True, us=[round(x, 3) for x in us])
    return list(rows.values())


def warm(case, ops, device) -> None:
    """Call what compiles once, at full size: the result is on disk when `measure` comes.

    That is our kernels and "torch.compile". Peers that time their candidates have to be alone on the GPU for it.
    """
    inputs = case.make(torch.Generator(device).manual_seed(SEED), device)
    for name, (prepare, digest) in providers(case, ops).items():
        if (digest or name == "torch.compile") and name not in case.without:
            with contextlib.suppress(Exception):  # `measure` meets it again, and says it
                prepare(**inputs)()


def _reason(error: Exception) -> str:
    if isinstance(error, NotRun):
        return f"not run: {error}"
    return f"not run: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]


def measure_ceilings(topic, machine: Machine, only=None, suffix="") -> list[Row]:
    """Rows of what the machine can do at most: copy, read and matmul, or one of them."""
    state = timing.nvidia_smi("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    rows = []
    for name, (calls, num_bytes) in timing.ceiling_calls(machine.device).items():
        if only in (None, name):
            sample, mode = machine.timer(calls)
            us = [round(x, 3) for _ in range(ROUNDS) for x in sample()]
            verdict = f"SM clock, memory clock, temperature in C, power: {state}" if not rows else ""
            shared = {**machine.shared, "source_hash": ""}
            rows.append(Row(topic, CEILING, name + suffix, True, us, num_bytes, None, verdict, mode, **shared))
    return rows


def bench(topic, ops, *, section=None, seconds=60.0, gpu=None, results=None) -> Comparison:
    """Measure a topic's cases on this GPU, or read their record.

    ops: the module with the kernels, `kernels.<topic>`. section: one section's cases only. seconds: no case is begun
    after that. gpu: whose record to read; None: the one measured last.
    """
    cases = topic_cases(topic)
    sections = {case.section for case in cases}
    if section is not None and section not in sections:
        raise ValueError(f"section: got {section!r}, expected one of {sorted(sections)}")
    cases = [case for case in cases if section in (None, case.section)]
    machine = this_gpu()
    if machine is None:
        return Comparison(topic, cases, find(topic, gpu, results), hashes(cases, ops))
    start = time.monotonic()
    rows = measure_ceilings(topic, machine)
    for case in cases:
        if time.monotonic() - start < seconds:
            rows += measure(topic, case, ops, machine)
    return Comparison(topic, cases, rows, hashes(cases, ops), live=True)
