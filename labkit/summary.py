"""Everything that was recorded, on one page: GPU measurements with their wins and losses, and the CPU experiments.

Nothing is computed anew and no figure is typed in: lines are drawn from the files under `results/`.
"""

from statistics import median

from labkit.comparison import Comparison
from labkit.fusion_study import gain
from labkit.record import CEILING, RESULTS, load, read_experiment


def gpus(results=None):
    """Folders of `results` that hold the measurements of a GPU, by name."""
    folders = [path for path in (results or RESULTS).iterdir() if path.is_dir() and path.name != "cpu"]
    return sorted(folder for folder in folders if any(folder.glob("*.json")))


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
    rows = [row for path in sorted(folder.glob("*.json")) for row in load(path) if row.case != CEILING]
    runs = {(r.date, r.device, r.driver, r.torch, r.triton, r.commit) for r in rows}
    return [
        f"{device}: {date} UTC, commit {commit}, driver {driver}, torch {torch}, triton {triton}"
        for date, device, driver, torch, triton, commit in sorted(runs)
    ]


def experiments(results=None):
    """All recorded CPU experiments, [Recorded], by name."""
    return [read_experiment(path) for path in sorted((results or RESULTS).glob("cpu/*.json"))]


# ---- what an experiment says in a line or two: function of one seed's sample


def _train(s):
    best = min(s["peers"], key=s["peers"].get)
    own, peer = s["held_out_bits_per_byte"], s["peers"][best]
    text = f"{s['parameters']:,} parameters: {own:.2f} bits a byte on held-out text"
    return [f"{text}; the best compressor, {best}: {peer:.2f}"]


def _gqa(s):
    form = "{heads} KV head{s}, {how}: {before:.2f} bits a byte, trained on: {after:.2f}"
    return [form.format(**run, s="s" * (run["heads"] > 1)) for run in s["runs"]]


def _pruning(s):
    rows = sorted((row for row in s["model"] if row["pattern"] == "2:4"), key=lambda row: -row["bits"])
    bits = ", ".join(f"{row['method']} {row['bits']:.2f}" for row in rows)
    return [f"dense {s['dense']:.2f} bits a byte; 2:4 by {bits}"]


def _streaming(s):
    bits = {name: (x["mean"] if isinstance(x, dict) else x) for name, x in s["bits"].items() if "mean" in x}
    kept = [name for name in ("dense", "0+256", "4+252", "4+252, original positions") if name in bits]
    return ["bits a byte of a long stream: " + ", ".join(f"{name} {bits[name]:.3f}" for name in kept)]


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
    return [f"{name} student, bits a byte: " + ", ".join(found) for name, found in lines.items()]


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
