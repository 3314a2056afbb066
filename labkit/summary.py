"""Everything that was recorded, on one page: GPU measurements with their wins and losses, and the CPU experiments.

Nothing is computed anew and no figure is typed in: lines are drawn from the files under `results/`.
"""

from html import escape
from statistics import fmean, geometric_mean, median

from labkit import bench
from labkit.comparison import Comparison
from labkit.fusion_study import gain
from labkit.player import Html, as_html
from labkit.record import CEILING, METAL, RESULTS, load, read_experiment
from labkit.show import cards
from labkit.step_map import CHAPTERS
from labkit.streaming_llm_study import LENGTH

# pages of topics and experiments that are not named as a chapter is: (file, title)
PAGES = {"first_kernel": ("first_kernel", "A first kernel"), "train": ("model", "The model we use")}
PAGES["streaming_costs"] = ("06_streaming_llm", "6 StreamingLLM: what it costs")


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
    """What came of `make metal` on each GPU: {its run, as a line: [(stage, outcome)]}; {} where it never ran."""
    files = sorted((results or RESULTS).glob(f"*/{METAL}"))
    runs = _by_run([row for path in files for row in load(path)])
    return {run: [(row.case, row.verdict) for row in rows] for run, rows in runs.items()}


def experiments(results=None):
    """All recorded CPU experiments, [Recorded], by name."""
    return [read_experiment(path) for path in sorted((results or RESULTS).glob("cpu/*.json"))]


# ---- the GPU's part as a table


def page(name):
    """(file, title) of the page of a topic or an experiment."""
    return PAGES.get(name) or next((file, f"{n} {title}") for n, (file, title) in CHAPTERS.items() if file[3:] == name)


def _link(name):
    file, title = page(name)
    return f'<a href="{file}.html">{escape(title)}</a>'


def in_order(topics):
    """Topics in the order of the chapters; those without a number come first."""
    numbers = {file[3:]: number for number, (file, _) in CHAPTERS.items()}
    return sorted(topics, key=lambda topic: numbers.get(topic, 0))


HOW_TO_READ = (
    "<p><em>1.20 times as fast</em>: the best peer's time over ours, the geometric mean of the cases. Below 1 our "
    "kernel loses. <em>Of the limit</em>: how near it comes to what this GPU's memory or matrix unit reached in the "
    "same run.</p>"
)
MEASURED = ("measured", "cases", "against the best peer", "worst case", "of the limit", "case by case")


def measured_table(folder, topics, ops):
    """Every topic recorded on one GPU, a line a section: against the best peer of each case, losses as plain as wins.

    topics: their names. ops(topic): the topic's kernels. Topics without a record are named below.
    """
    body, folded, missing = [], [], []
    for topic in in_order(topics):
        cases = bench.topic_cases(topic)
        hashes = bench.hashes(cases, ops(topic))
        whole = comparison(folder, topic, cases, hashes)
        if whole is None or not any(whole.us(case) for case in whole.cases):
            missing.append(topic)
            continue
        told = (line for line in whole.provenance() if not line.startswith(("Limits", "State")))
        body.append([f"{_link(topic)}<br>{_small(' '.join(told))}"])
        for section in dict.fromkeys(case.section for case in cases):
            some = [case for case in cases if case.section == section]
            body.append(_section(section or "all cases", comparison(folder, topic, some, hashes)))
        folded.append(f"<details><summary>{escape(page(topic)[1])}</summary>{whole._repr_html_()}</details>")
    table = cards(MEASURED, body, widths=(28, 9, 13, 24, 12, 14))
    rest = f"<p>Not recorded on this GPU: {', '.join(map(_link, missing))}.</p>" if missing else ""
    rest += "<p>All cases, with all times, limits and what was not timed:</p>"
    said = f"\nNot recorded: {', '.join(missing) or 'nothing'}"
    folds = f'<div style="margin-bottom: 2rem">{"".join(folded)}</div>'
    return Html(HOW_TO_READ + table.html + rest + folds, table.text + said)


def _section(name, c):
    """One line of `measured_table`."""
    done = [case for case in c.cases if c.us(case)]
    ratios = {case: c.ratio(case, c.best_peer(case)) for case in done if c.best_peer(case)}
    shares = [share for share in map(c.share, done) if share]
    counts, (mean, worst) = tally([c]), ("", "")
    if ratios:
        least = min(ratios, key=ratios.get)
        mean = f"<b>{geometric_mean(ratios.values()):.2f} times as fast</b>"
        worst = f"{ratios[least]:.2f}: {escape(least)}, against {escape(c.best_peer(least))}"
    reached = " to ".join(dict.fromkeys(f"{share(shares):.0%}" for share in (min, max))) if shares else ""
    score = "{won} faster, {tied} tied, {lost} slower".format(**counts) if ratios else "no peer ran"
    return [escape(name), f"{len(done)} of {len(c.cases)}", mean, worst, reached, score if done else ""]


def planned(topics):
    """What `make record` would measure, HTML: how many cases of which topic."""
    counts = {topic: len(bench.topic_cases(topic)) for topic in in_order(topics)}
    return f"{sum(counts.values())} cases: " + ", ".join(f"{_link(topic)} ({n})" for topic, n in counts.items())


def metal_table(results=None):
    """What came of each stage of `make metal`."""
    lines = []
    for run, stages in metal(results).items():
        lines += [[_small(run)], *([escape(stage), escape(verdict)] for stage, verdict in stages)]
    return cards(("stage", "outcome"), lines, widths=(20, 80))


def _small(text):
    return f"<small>{as_html(text)}</small>"


# ---- the CPU's part: what an experiment found, [(finding, result, compared with, seeds and spread)]; of all its seeds

BITS = "bits per byte"


def found(what, values, against="", unit=BITS, form=".2f", each="seed"):
    """One finding: the mean of its values, one a seed, and how far they lie apart."""
    low, high = format(min(values), form), format(max(values), form)
    spread = f"{len(values)} {each}s: {low} to {high}" if len(values) > 1 else f"one {each}"
    return what, f"{fmean(values):{form}} {unit}", against, spread


def _each(samples, *path):
    """The value under these keys in every sample that has it."""
    values = []
    for sample in samples:
        for key in path:
            sample = sample.get(key) if isinstance(sample, dict) else None
        values += [] if sample is None else [sample]
    return values


def _train(samples):
    own = _each(samples, "held_out_bits_per_byte")
    peers = samples[0]["peers"]
    best = min(peers, key=peers.get)
    what = f"The book's model, {samples[0]['parameters']:,} parameters, reads text that it was not trained on"
    return [found(what, own, f"the best of {len(peers)} compressors, {best}: {peers[best]:.2f}")]


MADE = {
    "mean": "{} KV heads averaged into {}", "first": "{} KV heads cut to {}, the first of each group",
    "random": "{} KV heads replaced by {} with random weights",
}  # fmt: skip


def _gqa(samples):
    (whole, *runs), steps = samples[0]["runs"], samples[0]["recipe"]["steps"]
    findings = []
    for run in runs:
        against = f"at once: {run['before']:.2f}; all {whole['heads']}, trained on as long: {whole['after']:.2f}"
        what = MADE[run["how"]].format(whole["heads"], run["heads"]) + f", then trained on for {steps} steps"
        same = [r["after"] for s in samples for r in s["runs"] if (r["heads"], r["how"]) == (run["heads"], run["how"])]
        findings.append(found(what, same, against))
    return findings


PATTERNS = {
    "50%": "Half of all weights left out, wherever they stand", "80%": "Four fifths left out, wherever they stand",
    "4:8": "Half left out, four of every eight neighbours", "2:4": "Half left out, two of every four neighbours",
}  # fmt: skip


def _pruning(samples):
    bits = {}
    for row in (row for sample in samples for row in sample["model"]):
        bits.setdefault(row["pattern"], {}).setdefault(row["method"], []).append(row["bits"])
    findings = []
    for pattern, methods in bits.items():
        best, *others = sorted(methods, key=lambda method: fmean(methods[method]))
        against = "; ".join(f"{method}: {fmean(methods[method]):.2f}" for method in others)
        what = f"{PATTERNS.get(pattern, pattern)}, by {best}"
        findings.append(found(what, methods[best], f"nothing left out: {samples[0]['dense']:.2f}; {against}"))
    return findings


def _streaming(samples):
    mean = {name: _each(samples, "bits", name, "mean") for name in samples[0]["bits"]}
    said = {name: f"{fmean(values):.3f}" for name, values in mean.items() if values}
    cases = {
        "4+252": ("the first 4 and the last 252 are kept, numbered anew", f"all kept: {said['dense']}"),
        "0+256": ("only the last 256 are kept", f"the first 4 among them: {said['4+252']}"),
        "4+252, original positions": ("4 + 252, with the numbers they had", f"numbered anew: {said['4+252']}"),
        "reset": ("the cache is emptied whenever it is full", f"the last 256 kept: {said['0+256']}"),
    }
    stream = f"A stream of {LENGTH:,} bytes"
    return [found(f"{stream}: {what}", mean[name], against, form=".3f") for name, (what, against) in cases.items()]


def _streaming_costs(samples):
    findings = []
    for length in sorted(samples[0], key=int)[:: len(samples[0]) - 1]:  # the shortest and the longest
        ms = {way: [x for s in samples for x in s[length].get(way, [])] for way in samples[0][length]}
        others = f"all kept: {median(ms['dense']):.1f}; the window computed anew: {median(ms['recomputed']):.1f}"
        low, high = min(ms["stream"]), max(ms["stream"])
        what = f"One more byte after {int(length):,}, first and last tokens kept"
        spread = f"{len(ms['stream'])} runs: {low:.1f} to {high:.1f}"
        findings.append((what, f"{median(ms['stream']):.1f} ms", others, spread))
    return findings


def _fusion(samples):
    findings = []
    for n, times in samples[0]["block"].items():
        us = {way: median(times[way]) for way in ("eager", "compiled")}
        what = f"A block of the model at {n} token{'s' * (int(n) > 1)}, by torch.compile"
        against = f"as written: {us['eager']:,.0f} against {us['compiled']:,.0f} \N{MICRO SIGN}s"
        findings.append((what, f"{gain(times):.2f} times as fast", against, f"medians of {len(times['eager'])} runs"))
    return findings


RUNGS = {
    "continuous, batch 8": "Requests join and leave after every step, 8 at a time",
    "continuous, all that fit": "As many as fit, room for the longest answer reserved for each",
    "continuous, paged": "As many as fit, memory handed out by the page",
    "chunked 512, paged": "The same, and prompts computed 512 tokens at a time",
}


def _batching(samples):
    costs = {cost: study["anyscale"] for cost, study in samples[0].items() if "anyscale" in study}
    cap = max((cap for caps in costs.values() for cap in caps), key=int)
    rates = {cost: {way: x["tokens/s"] for way, x in caps[cap].items()} for cost, caps in costs.items()}
    first, *ways = next(iter(rates.values()))
    findings = []
    for way in ways:
        ratios = {cost: of[way] / of[first] for cost, of in rates.items()}
        low, high = min(ratios.values()), max(ratios.values())
        result = f"{low:.1f} to {high:.1f} times the tokens per second, simulated"
        spread = "; ".join(f"{cost}: {ratio:.1f}" for cost, ratio in ratios.items())
        findings.append((RUNGS.get(way, way), result, f"{first}; answers of up to {int(cap):,} tokens", spread))
    return findings


# loss: (what the student learns from, the loss it is compared with)
LOSSES = {
    "KD, T=1": ("the teacher's probabilities", "hard labels"),
    "KD, T=2": ("the teacher's probabilities at temperature 2", "KD, T=1"),
    "KD, T=4": ("the teacher's probabilities at temperature 4", "KD, T=1"),
    "reverse KL": ("the teacher's probabilities by reverse KL divergence", "KD, T=1"),
    "JSD": ("the teacher's probabilities by Jensen-Shannon divergence", "KD, T=1"),
    "on-policy": ("the teacher's probabilities, half of the time on texts of its own", "other endings"),
}
SAID = {
    "hard labels": "from the text alone", "KD, T=1": "by forward KL at temperature 1",
    "other endings": "instead of its own texts, ones with foreign endings",
}  # fmt: skip
STUDENTS = {
    ("narrow", "fresh"): "A student half as wide", ("shallow", "fresh"): "A student with half the layers",
    ("shallow", "alternate"): "A student made of every second layer of the teacher",
}  # fmt: skip
SMALLER = {
    "2:4": "two of every four weights left out", "narrower": "half of the inner layers' heads and channels left out",
    "int8": "rounded to 8 bits", "4-bit": "rounded to 4 bits", "2-bit": "rounded to 2 bits",
}  # fmt: skip


def _distillation(samples):
    bits, damaged, teacher = {}, {}, f"; the teacher: {samples[0]['teacher']['bits']:.2f}"
    for row in (row for sample in samples for row in sample["students"]):
        bits.setdefault((row["student"], row["first"]), {}).setdefault(row["loss"], []).append(row["bits"])
    for row in (row for sample in samples for row in sample["recovered"]):
        damaged.setdefault(row["how"], {}).setdefault(row["loss"], []).append(row["bits"])
    findings = []
    for student, losses in bits.items():
        for loss in (loss for loss in LOSSES if loss in losses):
            learns, other = LOSSES[loss]
            against = f"{SAID[other]}: {fmean(losses[other]):.2f}" + teacher * (other == "hard labels")
            findings.append(found(f"{STUDENTS[student]} learns from {learns}", losses[loss], against))
    for how, losses in damaged.items():
        against = f"at once: {fmean(losses[None]):.3f}; taught by the text alone: {fmean(losses['hard labels']):.3f}"
        what = f"The teacher, {SMALLER.get(how, how)}, then taught by what it was"
        findings.append(found(what, losses["KD, T=1"], against, form=".3f"))
    return findings


def _engine(samples):
    findings = []
    for study, words in (("transformers", "The book's engine"), ("long prompts", "The same, with long prompts")):
        own = _each(samples, study, "engine", "tokens/s")
        best = [max(run["tokens/s"] for run in s[study]["transformers"].values()) for s in samples]
        what = f"{words}: {samples[0][study]['requests']} requests on one thread"
        against = f"generate of transformers, best batch: {fmean(own):,.0f} against {fmean(best):,.0f} tokens/s"
        ratios = [a / b for a, b in zip(own, best)]
        findings.append(found(what, ratios, against, "times the tokens per second", ".1f"))
    return findings


HEADLINES = {  # in the order of the chapters
    "train": _train, "fusion": _fusion, "pruning": _pruning, "distillation": _distillation, "streaming_llm": _streaming,
    "streaming_costs": _streaming_costs, "gqa": _gqa, "batching": _batching, "engine": _engine,
}  # fmt: skip
HEAD = ("finding", "result", "compared with", "seeds, spread")


def headline(record):
    """What one experiment found, lines of HEAD over all its seeds. [] for an experiment without a headline."""
    make = HEADLINES.get(record.name)
    return make(list(record.samples.values())) if make else []


def findings(records):
    """The recorded experiments as a table: a heading each, with where it comes from, and a line a finding."""
    order = [*HEADLINES]
    body = []
    for record in sorted(records, key=lambda r: order.index(r.name) if r.name in order else len(order)):
        link = _link(record.name) if record.name in HEADLINES else escape(record.name)
        body.append([f"{link}<br>{_small(' '.join(str(record).splitlines()))}"])
        for what, result, *rest in (map(escape, line) for line in headline(record)):
            body.append([what, f"<b>{result}</b>", *rest])
    return cards(HEAD, body, widths=(37, 17, 28, 18))
