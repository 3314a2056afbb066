"""What was measured, on what, when: the rows in `results/<gpu>/<topic>.json` and the experiments in `results/cpu/`.

A file is rewritten in one step after every case or seed, so an interrupted run keeps what it had measured.
`results/README.md` explains every field.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from labkit.provenance import source_hash

RESULTS = Path(__file__).resolve().parent / "results"
CEILING = "ceiling"  # the case name of the rows that hold what the device can do at most
METAL = "metal.json"  # beside the measurements of a GPU: what came of the stages of `make metal`


@dataclass(frozen=True)
class Row:
    """One provider on one case. `us` holds every sample, microseconds a call; without a run it is empty."""

    topic: str
    case: str
    provider: str
    ran: bool
    us: list[float]
    bytes: int
    error: float | None  # largest absolute error against fp64; None where there is no finite one
    verdict: str  # "ok: ...", "wrong: ...", or why it did not run
    mode: str  # "graph", "eager", or "" if not timed
    device: str
    driver: str
    torch: str
    triton: str
    date: str  # UTC; the same in all rows of one run
    commit: str
    source_hash: str  # of the kernel; "" for a library


def stamp(device: str, driver: str = "") -> dict[str, str]:
    """The fields that all rows of one run share."""
    return {
        "device": device,
        "driver": driver,
        "torch": version("torch"),
        "triton": version("triton"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "commit": _commit(),
    }


def toolchain() -> dict[str, str]:
    """Of `stamp`, what no device has a part in: versions, date and commit."""
    return {key: value for key, value in stamp("").items() if key in ("torch", "triton", "date", "commit")}


def version(package: str) -> str:
    """The installed version of a package, "none" if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The commit of the code, "+changes" if kernels or labkit differ from it; "unknown" outside a checkout."""
    git = ["git", "-C", str(RESULTS.parent.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        paths = ["kernels", "labkit", ":!labkit/results"]
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--", *paths], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LAB_COMMIT", "unknown")  # a copy without .git, as on a lent machine
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def slug(device: str) -> str:
    """The folder of a GPU's results: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _write(path: Path, text: str) -> None:
    """The whole file or nothing: a reader or an interrupted run never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def save(rows: list[Row], path: Path) -> None:
    """Write rows as a JSON list, one row a line."""
    lines = ",\n".join(json.dumps(asdict(row), allow_nan=False) for row in rows)
    _write(path, f"[\n{lines}\n]\n" if rows else "[]\n")


def load(path: Path) -> list[Row]:
    """The rows of a file. Raises ValueError naming the file if they do not follow the schema."""
    try:
        return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: not a list of rows as labkit.record.Row describes them: {error}") from None


def update(old: list[Row], new: list[Row]) -> list[Row]:
    """The rows of a case are replaced together. A ceiling stays as long as a row of its run does."""
    cases = {row.case for row in new} - {CEILING}
    rows = [row for row in old if row.case not in cases and row not in new] + new
    runs = {row.date for row in rows if row.case != CEILING}
    return [row for row in rows if row.case != CEILING or row.date in runs]


def add(new: list[Row], path: Path, cases) -> None:
    """Add rows to a file, which may not be there yet; what it holds of cases that are not among `cases` goes."""
    known = {*cases, CEILING}
    old = [row for row in load(path) if row.case in known] if path.exists() else []
    save(update(old, new), path)


def find(topic: str, gpu: str | None = None, results: Path | None = None) -> list[Row]:
    """The recorded rows of a topic: of this GPU, or of the one measured last. [] if there are none."""
    paths = sorted((results or RESULTS).glob(f"{slug(gpu) if gpu else '*'}/{topic}.json"))
    records = [load(path) for path in paths if path.parent.name != "cpu"]
    return max(records, key=lambda rows: max((row.date for row in rows), default=""), default=[])


@dataclass(frozen=True)
class Experiment:
    """A long experiment on the CPU: run(seed) -> anything JSON can hold, for every seed.

    run is a function at the top level of its file. weights: the checkpoint that it starts from, if any.
    """

    run: Callable[[int], object]
    seeds: tuple[int, ...] = (0,)
    weights: Path | None = None


@dataclass(frozen=True)
class Recorded:
    """A recorded experiment. samples: what run(seed) returned, by seed."""

    name: str
    root: str  # "module:function" of the run
    samples: dict[int, object]
    seeds: tuple[int, ...]
    weights_sha256: str
    source_hash: str
    device: str
    python: str
    torch: str
    date: str
    commit: str

    def __str__(self) -> str:
        done = f"{len(self.samples)} of {len(self.seeds)} seeds ({', '.join(map(str, self.samples))})"
        weights = f", weights {self.weights_sha256[:12]}" if self.weights_sha256 else ""
        return (
            f"Recorded experiment {self.name}: {done}{weights}.\n"
            f"{self.date} UTC, commit {self.commit}, {self.device}, Python {self.python}, torch {self.torch}.\n"
            + ("The code is unchanged since." if self.is_fresh() else "The code has changed since.")
        )

    def is_fresh(self) -> bool:
        try:
            return source_hash(self.root) == self.source_hash
        except ValueError:  # the function is gone
            return False


def run_experiment(name: str, experiment: Experiment, results: Path | None = None) -> Recorded:
    """Run every seed and write results/cpu/<name>.json after each."""
    root = f"{experiment.run.__module__}:{experiment.run.__qualname__}"
    weights = hashlib.sha256(Path(experiment.weights).read_bytes()).hexdigest() if experiment.weights else ""
    now = stamp(f"CPU {platform.machine()}")
    shared = {key: now[key] for key in ("device", "torch", "date", "commit")} | {"python": platform.python_version()}
    samples = {}
    for seed in experiment.seeds:
        samples[seed] = experiment.run(seed)
        record = Recorded(name, root, dict(samples), experiment.seeds, weights, source_hash(root), **shared)
        path = (results or RESULTS) / "cpu" / f"{name}.json"
        _write(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")
    return record


def read_experiment(path: Path) -> Recorded:
    """What `run_experiment` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    samples = {int(seed): sample for seed, sample in record["samples"].items()}
    return Recorded(**record | {"samples": samples, "seeds": tuple(record["seeds"])})


def experiment(name: str, results: Path | None = None) -> Recorded | None:
    """Read a recorded experiment and print where it comes from; None, said in words, if it was never run."""
    path = (results or RESULTS) / "cpu" / f"{name}.json"
    if not path.exists():
        print(f"Nothing was recorded for the experiment {name}: `make experiments` runs it.")
        return None
    record = read_experiment(path)
    print(record)
    return record
