"""Everything that was recorded, on one page: GPU measurements with their wins and losses, and the CPU experiments.

Nothing is computed anew and no figure is typed in: lines are drawn from the files under `results/`.
"""

import json
import re
from statistics import median

from labkit.comparison import Comparison
from labkit.fusion_study import gain
from labkit.record import CEILING, METAL, RESULTS, load, read_experiment


def measured(folder):
    """The files with a GPU's measurements. `metal.json` lies beside them: how its stages ended, no times of kernels."""
    return sorted(path for path in folder.glob("*.json") if path.name != METAL)


def gpus(results=None):
    """Folders of `results` that hold the measurements of a GPU, by name."""
    folders = [path for path in (results or RESULTS).iterdir() if path.is_dir() and path.name != "cpu"]
    return sorted(folder for folder in folders if measured(folder))


def comparison(folder, topic, cases, hashes):
    """The record of one topic on one GPU as a `Comparison`; None where there is none."""
    path = folder / f"{topic}.json"
    return Comparison(topic, cases, load(path), hashes) if path.exists() else None


def tally(comparisons):
    """Over all cases of some comparisons, against the best peer each: {"won", "tied", "lost", "no peer"} -> count."""
    counts = dict.fromkeys(("won", "tied", "lost", "no peer"), 0)
    for c in comparisons:
        for case in c.cases:
            if c.us(case) is None:
                continue
            peer = c.best_peer(case)
            if peer is None:
                counts["no peer"] += 1
            elif c.is_tie(case, peer):
                counts["tied"] += 1
            else:
                counts["won" if c.ratio(case, peer) > 1 else "lost"] += 1
    return counts


def state(folder):
    """Device, dates and versions of a GPU's records, one line a run."""
    rows = [row for path in measured(folder) for row in load(path) if row.case != CEILING]
    return list(_by_run(rows))


def _by_run(rows):
    """{device, date and versions of a run, as a line: its rows}, in the order of time."""
    runs = {}
    for r in sorted(rows, key=lambda r: (r.date, r.device)):
        versions = f"driver {r.driver}, torch {r.torch}, triton {r.triton}"
        runs.setdefault(f"{r.device}: {r.date} UTC, commit {r.commit}, {versions}", []).append(r)
    return runs


def metal(results=None):
    """What came of `make metal` on each GPU: {its run, as a line: a line for each stage}; {} where it never ran."""
    files = sorted((results or RESULTS).glob(f"*/{METAL}"))
    runs = _by_run([row for path in files for row in load(path)])
    return {run: [f"{row.case:12}{row.verdict}" for row in rows] for run, rows in runs.items()}


def experiments(results=None):
    """All recorded CPU experiments, [Recorded], by name."""
    return [read_experiment(path) for path in sorted((results or RESULTS).glob("cpu/*.json"))]


WORDS_A_MINUTE, LINES_A_MINUTE = 150, 10  # a slow reader, of technical text and of code


def minutes(path):
    """How long it takes to read a notebook with its outputs, without folded code, pictures and exercises done."""
    words = lines = 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += _words(source)
        elif not any(tag.startswith(("hide", "remove")) for tag in cell["metadata"].get("tags", [])):
            lines += source.count("\n") + 1
        for output in cell.get("outputs", []):
            data = {kind: "".join(text) for kind, text in output.get("data", {}).items() if kind.startswith("text/")}
            if "text/markdown" in data:  # code that is shown from its source
                lines += data["text/markdown"].count("\n")
            elif "image/png" not in output.get("data", {}):
                page = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", data.get("text/html", ""), flags=re.DOTALL)
                words += _words(page or "".join(output.get("text", "")) or data.get("text/plain", ""))
    return words / WORDS_A_MINUTE + lines / LINES_A_MINUTE


def _words(text):
    return len(re.findall(r"[A-Za-z][\w'-]*", text))


# ---- what an experiment says in a line or two: function of one seed's sample


def _train(s):
    best = min(s["peers"], key=s["peers"].get)
    own, peer = s["held_out_bits_per_byte"], s["peers"][best]
    text = f"{s['parameters']:,} parameters: {own:.2f} bits per byte on held-out text"
    return [f"{text}; the best compressor, {best}: {peer:.2f}"]


def _gqa(s):
    form = "{heads} KV head{s}, {how}: {before:.2f} bits per byte, trained on: {after:.2f}"
    return [form.format(**run, s="s" * (run["heads"] > 1)) for run in s["runs"]]


def _pruning(s):
    rows = sorted((row for row in s["model"] if row["pattern"] == "2:4"), key=lambda row: -row["bits"])
    bits = ", ".join(f"{row['method']} {row['bits']:.2f}" for row in rows)
    return [f"dense {s['dense']:.2f} bits per byte; 2:4 by {bits}"]


def _streaming(s):
    bits = {name: (x["mean"] if isinstance(x, dict) else x) for name, x in s["bits"].items() if "mean" in x}
    kept = [name for name in ("dense", "0+256", "4+252", "4+252, original positions") if name in bits]
    return ["bits per byte of a long stream: " + ", ".join(f"{name} {bits[name]:.3f}" for name in kept)]


def _streaming_costs(s):
    last = max(s, key=int)
    ms = {way: median(samples) for way, samples in s[last].items() if samples}
    times = ", ".join(f"{way} {x:.1f} ms" for way, x in ms.items())
    return [f"after {int(last):,} bytes, median of one more: {times}"]


def _fusion(s):
    gains = (f"{n} token{'s' * (int(n) > 1)} {gain(times):.2f}x" for n, times in s["block"].items())
    return ["a block, eager / torch.compile: " + ", ".join(gains)]


def _batching(s):
    lines = []
    for cost, study in s.items():
        if "anyscale" in study:
            cap = max(study["anyscale"], key=int)
            rates = {way: x["tokens/s"] for way, x in study["anyscale"][cap].items()}
            first = rates[next(iter(rates))]
            ratios = "; ".join(f"{way}: {rate / first:.1f}x" for way, rate in rates.items())
            lines.append(f"simulated, {cost}, outputs up to {cap}: {ratios}")
    return lines


def _distillation(s):
    lines = {}
    for row in s["students"]:
        found = f"{row['loss']} {row['bits']:.2f}".replace(" ", "\N{NO-BREAK SPACE}")  # a line never breaks in there
        lines.setdefault(f"{row['student']}, {row['first']}", []).append(found)
    return [f"{name} student, bits per byte: " + ", ".join(found) for name, found in lines.items()]


def _engine(s):
    run = s["transformers"]
    best = max(run["transformers"], key=lambda batch: run["transformers"][batch]["tokens/s"])
    own, other = run["engine"]["tokens/s"], run["transformers"][best]["tokens/s"]
    text = f"{own:,.0f} tokens/s; generate of transformers at its best batch size, {best}: {other:,.0f}"
    return [f"{text}; {own / other:.1f}x"]


HEADLINES = {
    "train": _train, "gqa": _gqa, "pruning": _pruning, "streaming_llm": _streaming, "streaming_costs": _streaming_costs,
    "fusion": _fusion, "batching": _batching, "engine": _engine, "distillation": _distillation,
}  # fmt: skip


def headline(record):
    """What one experiment found, in lines; by seed where there are several. [] for an experiment without a headline."""
    make = HEADLINES.get(record.name)
    if make is None:
        return []
    lines = []
    for seed, sample in record.samples.items():
        mark = f"seed {seed}: " if len(record.samples) > 1 else ""
        lines += [mark + line for line in make(sample)]
    return lines
