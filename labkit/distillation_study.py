"""The distillation experiments: small students of the lab's model, and what a teacher gives back to a damaged model.

The model that stands in `labkit/weights` is the teacher. Students are smaller models trained from nothing, or from some
of its layers; damaged models are the teacher itself after pruning or quantisation. Each is trained by several losses on
the same batches in the same order. Quality is bits per byte of held-out text, of the weights as they would be stored.
"""

import copy
import json
import os
import shutil
from dataclasses import asdict, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from labkit import args, corpus, train
from labkit.attention import attention
from labkit.conversion import training_text_sha256
from labkit.distillation import kd_loss
from labkit.llm_pruner import llm_pruner
from labkit.model import TEACHER, Llama
from labkit.provenance import source_hash
from labkit.prune import calibration, linears, prune
from labkit.pruning import sparse_bytes
from labkit.record import Experiment

STUDENTS = {  # what of the teacher's config a student changes
    "narrow": dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4),
    "shallow": dict(num_hidden_layers=2),
}
LOSSES = {  # None: cross-entropy with the text; ending: what replaces the second half of the texts of a batch
    "hard labels": None,
    "KD, T=1": dict(temperature=1.0),
    "KD, T=2": dict(temperature=2.0),
    "KD, T=4": dict(temperature=4.0),
    "reverse KL": dict(kind="reverse_kl"),
    "JSD": dict(kind="jsd", beta=0.5),
    "on-policy": dict(temperature=1.0, ending="the student's"),
    "other endings": dict(temperature=1.0, ending="another text's"),  # a control: nothing of it is the student's
}
RUNS = [  # (student, its first weights, loss, number of seeds)
    *[("narrow", "fresh", name, 3) for name in LOSSES],
    *[("shallow", first, name, 2) for first in ("fresh", "alternate") for name in ("hard labels", "KD, T=1")],
    *[("shallow", "alternate", name, 2) for name in ("JSD", "reverse KL")],
]
# Chosen on calibration text: small batches and a higher rate for the embeddings get furthest in so few steps.
RECIPE = train.Recipe(steps=200, batch=4, warmup=10, adam_lr=0.012)
RECOVERY = train.Recipe(steps=40, batch=4, warmup=4, cooldown=1.0, muon_lr=0.004, adam_lr=0.0008)
MIXED = 0.5  # the share of batches with other endings
RECOVERED_BY, RECOVERY_SEEDS = ("hard labels", "KD, T=1"), 2
TRAINED_LONG = ("2-bit", "KD, T=1")  # also with the students' recipe
POINTS = 5  # of a curve
CURVE_TEXT, EVAL_TEXT, GAP_ROWS = 16 * 256, 64 * 256, 16  # ids of a point, ids at the end, chunks of 256
CONTEXT = 256  # tokens in the cache where decode bytes are counted
SLICE_STEPS = 4


# ---- how a weight is stored

BITS = {"int8": (8, None), "4-bit": (4, 32), "2-bit": (2, 32)}  # bits, and weights a scale: None is a whole row
STORED = ("bf16", "2:4", *BITS)


def quantised(w, bits, group):
    """w [N, K] rounded to the nearest of 2^bits - 1 levels, symmetric around 0: the largest of `group` neighbours of a
    row (None: the row) is the last level. The scale is a bf16 number, as it is stored."""
    args.expect(not group or w.shape[1] % group == 0, "w (columns)", w.shape[1], f"a multiple of {group}")
    rows, top = w.unflatten(1, (-1, group or w.shape[1])), 2 ** (bits - 1) - 1
    scale = (rows.abs().amax(-1, keepdim=True) / top).bfloat16().to(w.dtype)
    levels = torch.where(scale > 0, rows / scale, 0.0).round().clamp(-top, top)
    return (levels * scale).flatten(1)


def as_stored(w, form):
    """w [N, K] as it comes back from one of STORED."""
    return quantised(w, *BITS[form]) if form in BITS else w.bfloat16().to(w.dtype)


def weight_bytes(n, k, form):
    """Bytes of a weight [n, k] in one of STORED, scales of 2 bytes and positions included."""
    if form in BITS:
        bits, group = BITS[form]
        return n * k * bits // 8 + 2 * n * (k // (group or k))
    return sparse_bytes(n, k) if form == "2:4" else 2 * n * k


def block_linears(model):
    return [linear for block in model.layers for linear in linears(block).values()]


def size_bytes(model, form):
    """Bytes of a model whose blocks' linears are stored in `form` and all else in bf16."""
    inside = block_linears(model)
    rest = sum(p.numel() for p in model.parameters()) - sum(x.weight.numel() for x in inside)
    return 2 * rest + sum(weight_bytes(*x.weight.shape, form) for x in inside)


def decode_bytes(model, form, context=CONTEXT):
    """Bytes that a decode step reads for one sequence: every weight once (the tied embedding as the head), and the
    keys and values of `context` tokens in bf16."""
    cache = sum(2 * 2 * context * block.self_attn.k_proj.weight.shape[0] for block in model.layers)
    return size_bytes(model, form) + cache


@torch.no_grad()
def stored(model, form):
    """A copy of a model with every weight as it comes back from storage."""
    model = copy.deepcopy(model)
    inside = {id(linear.weight) for linear in block_linears(model)}
    for p in model.parameters():
        p.copy_(as_stored(p, form) if id(p) in inside else p.bfloat16())
    return model


class Stored(nn.Module):
    """A parametrisation: the layer computes with the stored form of its weight, and the gradient goes straight through
    the rounding (Bengio et al. 2013). What the mask [N, K] leaves out stays 0."""

    def __init__(self, form, mask):
        super().__init__()
        self.form = form
        self.register_buffer("mask", mask)

    def forward(self, w):
        w = w.masked_fill(~self.mask, 0)
        return w + (as_stored(w, self.form) - w).detach()


# ---- students and damaged models


def student(teacher, which, first, seed):
    """One of STUDENTS; first weights "fresh", or from "alternate" layers of the teacher: 0, 2, ... (DistilBERT)."""
    if first == "fresh":
        return train.init(replace(teacher.config, **STUDENTS[which]), seed)
    model = copy.deepcopy(teacher)
    model.layers = nn.ModuleList(model.layers[::2])
    model.config = replace(teacher.config, num_hidden_layers=len(model.layers))
    return model


def damaged(teacher, how):
    """(model, form of storage) of the teacher after one kind of damage; training keeps its linears in that form."""
    model, form, keep = copy.deepcopy(teacher), how, None
    if how == "2:4":
        prune(model, "sparsegpt", calibration(), n=2, m=4, progress=None)
        keep = [linear.weight != 0 for linear in block_linears(model)]
    elif how == "narrower":  # half of the heads and channels of all layers but the first and the last
        model, form = llm_pruner(teacher, calibration(sequences=16, length=128), ratio=0.5), "bf16"
    for i, linear in enumerate(block_linears(model)):
        mask = keep[i] if keep else torch.ones_like(linear.weight, dtype=torch.bool)
        parametrize.register_parametrization(linear, "weight", Stored(form, mask.detach()))
    return model, form


DAMAGES = ("2:4", "narrower", *BITS)


def whole(model):
    """The model with its parametrisations worked into the weights, in place."""
    for linear in block_linears(model):
        parametrize.remove_parametrizations(linear, "weight")
    return model


# ---- training


class Lessons:
    """The batches of a recipe and the teacher's logits for them, computed once and kept in fp16."""

    def __init__(self, teacher, ids, recipe):
        self.teacher, self.ids, self.recipe, self.kept = teacher, ids, recipe, {}

    @torch.no_grad()
    def logits(self, y):
        return self.teacher(corpus.with_bos(y))

    def __call__(self, step):
        """(y [B, T], logits [B, T, V])."""
        if step not in self.kept:
            y = train.batch(self.ids, step, self.recipe)
            self.kept[step] = y, self.logits(y).half()
        return self.kept[step]


@torch.no_grad()
def continued(model, y, generator):
    """y [B, T] with its second half drawn from the model (temperature 1), one id at a time, over a cache."""
    ids, cache, half = corpus.with_bos(y)[:, : y.shape[1] // 2 + 1], {}, y.shape[1] // 2

    def attend(layer, q, k, v):
        cache[layer] = [torch.cat(pair, dim=1) for pair in zip(cache[layer], (k, v))] if layer in cache else [k, v]
        return attention(q, *cache[layer])

    written, new, at = [y[:, :half]], ids, torch.arange(half + 1)
    while True:
        p = model(new, at, attend)[:, -1].softmax(-1)
        new = torch.multinomial(p, 1, generator=generator)
        written.append(new)
        if len(written) > y.shape[1] - half:
            return torch.cat(written, dim=1)
        at = at[-1:] + 1


def exchanged(y):
    """y [B, T] with the second half of every text taken from the next text."""
    half = y.shape[1] // 2
    return torch.cat((y[:, :half], y.roll(1, 0)[:, half:]), dim=1)


def loss_of(logits, teacher_logits, y, options):
    """One of LOSSES for logits [B, T, V] and the text y [B, T]."""
    if options is None:
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())
    return kd_loss(logits, teacher_logits, **{k: v for k, v in options.items() if k != "ending"})


def distil(model, lessons, r, options, text, *, every, until=None):
    """Train model in place by one of LOSSES, with the optimisers and rates of `labkit.train`.

    lessons: `Lessons` of the same seed, batch and length as the recipe r. Returns the curve: [step, bits per byte of
    text] at the start and every `every` steps.
    """
    opts, generator = train.optimizers(model.train(), r), torch.Generator().manual_seed(r.seed)
    curve = [[0, train.bits_per_byte(model, text)]]
    for step in range(r.steps if until is None else until):
        for opt, peak in zip(opts, (r.muon_lr, r.adam_lr)):
            opt.param_groups[0]["lr"] = peak * train.rate(step, r)
        y, teacher_logits = lessons(step)
        if options and "ending" in options and torch.rand((), generator=generator) < MIXED:
            y = continued(model, y, generator) if options["ending"] == "the student's" else exchanged(y)
            teacher_logits = lessons.logits(y)
        loss_of(model(corpus.with_bos(y)), teacher_logits, y, options).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        if (step + 1) % every == 0:
            curve.append([step + 1, train.bits_per_byte(model, text)])
    return curve


@torch.no_grad()
def gaps(model, teacher, text, rows=GAP_ROWS):
    """Forward and reverse KL between teacher and model in bits a byte, on `rows` chunks of text."""
    x = corpus.with_bos(text[: rows * 256].view(-1, 256))
    z, t = model(x), teacher(x)
    bits = torch.tensor(2.0).log()
    return {kind: (kd_loss(z, t, kind=kind) / bits).item() for kind in ("forward_kl", "reverse_kl")}


# ---- the record


def student_run(teacher, lessons, text, r, which, first, loss):
    """One row of the record: a student trained by one loss, and the same one rounded to 4 bits afterwards."""
    model = student(teacher, which, first, r.seed)
    curve = distil(model, lessons, r, LOSSES[loss], text[:CURVE_TEXT], every=max(1, r.steps // POINTS))
    rounded = measured(model, "4-bit", teacher, text)
    row = dict(student=which, first=first, loss=loss, curve=curve, rounded=rounded)
    return row | measured(model, "bf16", teacher, text)


def recovery_run(teacher, lessons, text, r, how, loss):
    """One row of the record: a damaged model after a short training by one loss (None: not trained)."""
    (model, form), curve = damaged(teacher, how), []
    if loss:
        curve = distil(model, lessons, r, LOSSES[loss], text[:CURVE_TEXT], every=max(1, r.steps // 2))
    return dict(how=how, loss=loss, curve=curve) | measured(whole(model), form, teacher, text)


def kd_cost(teacher, model):
    """Operations of a step of KD over those of a step with hard labels: 2 a weight forward, 6 for training."""
    big, small = (sum(p.numel() for p in m.parameters()) for m in (teacher, model))
    return (2 * big + 6 * small) / (6 * small)


def measured(model, form, teacher, text):
    """Quality and cost of a model as stored in `form`: bits per byte, KL to the teacher, bytes."""
    model = stored(model, form)
    cost = dict(size=size_bytes(model, form), decode=decode_bytes(model, form))
    return dict(bits=train.bits_per_byte(model, text), **cost, **gaps(model, teacher, text))


def kept(folder, names, run, *options):
    """run(*options, *names): the row of a run, from the folder if an interrupted study has left it there."""
    name = ", ".join(map(str, names))
    file = folder / f"{name.replace(':', ' of ')}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(run(*options, *names)))
        os.replace(part, file)
    row = json.loads(file.read_text())
    print(f"{name}: {row['bits']:.4f} bits per byte", flush=True)
    return row


def slice_table():
    """What a notebook runs again: bits per byte of one held-out file after the first steps of two runs of seed 0."""
    teacher, text = Llama.from_pretrained(TEACHER), corpus.read("held_out", [train.SLICE])[:CURVE_TEXT]
    lessons, found = Lessons(teacher, corpus.read("train"), RECIPE), {}
    for loss in ("hard labels", "KD, T=2"):
        model = student(teacher, "narrow", "fresh", RECIPE.seed)
        found[loss] = distil(model, lessons, RECIPE, LOSSES[loss], text, every=SLICE_STEPS, until=SLICE_STEPS)[-1][1]
    return found


def study(seed) -> dict:
    """All runs of a seed. students: `student_run` of RUNS; recovered: `recovery_run` of DAMAGES, trained and not.

    equal_operations: the narrow student by KD in as few steps as cost what its steps with hard labels do.
    trained_long: one damaged model with the students' recipe.
    """
    r, recovery = replace(RECIPE, seed=seed), replace(RECOVERY, seed=seed)
    teacher, text = Llama.from_pretrained(TEACHER), corpus.read("held_out")[:EVAL_TEXT]
    lessons = Lessons(teacher, corpus.read("train"), r)
    lesson = f"{source_hash('labkit.distillation_study:study')}-{train.fingerprint(*teacher.state_dict().values())[:8]}"
    work = train.WORK / f"distillation-{lesson}" / str(seed)  # of this code and this teacher
    students = [kept(work, names, student_run, teacher, lessons, text, r) for *names, seeds in RUNS if seed < seeds]
    losses = (None, *RECOVERED_BY) if seed == 0 else RECOVERED_BY
    recovered = [
        kept(work, names, recovery_run, teacher, lessons, text, recovery)
        for names in product(DAMAGES, losses)
        if seed < RECOVERY_SEEDS
    ]
    fewer = replace(r, steps=max(1, round(r.steps / kd_cost(teacher, student(teacher, "narrow", "fresh", seed)))))
    short = kept(work / "fewer", ("narrow", "fresh", "KD, T=1"), student_run, teacher, lessons, text, fewer)
    long = None
    if seed < RECOVERY_SEEDS:
        long = kept(work / "long", TRAINED_LONG, recovery_run, teacher, lessons, text, r)
    result = dict(
        recipe=asdict(r),
        recovery=asdict(recovery),
        equal_operations=short | dict(steps=fewer.steps),
        trained_long=long,
        threads=torch.get_num_threads(),
        training_text_sha256=training_text_sha256(),
        left_out=corpus.left_out("held_out") | corpus.left_out("calibration"),
        teacher=measured(teacher, "bf16", teacher, text),
        students=students,
        recovered=recovered,
        slice=slice_table() if seed == 0 else None,
    )
    shutil.rmtree(work, ignore_errors=True)
    return result


def experiments() -> dict[str, Experiment]:
    return {"distillation": Experiment(study, seeds=(0, 1, 2), weights=TEACHER / "model.safetensors")}


# ---- size against quality


def points(samples):
    """[{name, group, size, decode, bits, spread}] of the recorded samples {seed: study(seed)}, means over the seeds."""
    found = {}

    def add(group, name, row):
        found.setdefault((group, name), []).append(row)

    for sample in samples.values():
        add("teacher", "teacher", sample["teacher"])
        for row in sample["students"]:
            name = f"{row['student']}, {row['first']}, {row['loss']}"
            add("student", name, row)
            add("student, 4-bit", f"{name}, 4-bit", row["rounded"])
        for row in sample["recovered"]:
            add(row["how"], f"{row['how']}, {row['loss'] or 'not trained'}", row)
        if row := sample["trained_long"]:
            add(row["how"], f"{row['how']}, {row['loss']}, {sample['recipe']['steps']} steps", row)
    table = []
    for (group, name), rows in found.items():
        bits = [row["bits"] for row in rows]
        size, decode = rows[0]["size"], rows[0]["decode"]
        mean, spread = sum(bits) / len(bits), max(bits) - min(bits)
        table.append(dict(group=group, name=name, size=size, decode=decode, bits=mean, spread=spread))
    return table


def frontier(points, cost="size"):
    """The names of the points that no other beats: none as small has fewer bits, none as good is smaller. By size."""
    best, names = float("inf"), []
    for point in sorted(points, key=lambda p: (p[cost], p["bits"])):
        if point["bits"] < best:
            best = point["bits"]
            names.append(point["name"])
    return names


# ---- published

# Hinton, Vinyals and Dean 2015. MNIST, test errors of 10,000 (section 3, T = 20): the large net, the small one, and the
# small one distilled. Speech, % of frames right (Table 1): one model, ten averaged, one distilled from the ten.
PUBLISHED_HINTON = {"MNIST, errors": (67, 146, 74), "speech, % right": (61.1, 58.9, 60.8)}  # teacher, alone, distilled
# DistilBERT (Sanh et al. 2019): GLUE score; DistilGPT2 (README of its training code): WikiText-103 perplexity.
PUBLISHED_DISTILBERT = {"GLUE, BERT and DistilBERT": (79.5, 77.0), "perplexity, GPT-2 and DistilGPT2": (16.3, 21.1)}
# MiniLLM (Gu et al. 2024), figure 1, read off the plot: GPT-4's score of students of GPT-2 1.5B, which has about 50.
PUBLISHED_MINILLM = {"120M": (33, 37), "340M": (43.5, 46), "760M": (45.8, 48.4)}  # SeqKD, MiniLLM
# QLoRA (Dettmers et al. 2023), Table 2: mean perplexity on Pile Common Crawl of 125M to 13B models, by 4-bit type.
PUBLISHED_QLORA = {"Int4": 34.34, "Float4 (E2M1)": 31.07, "Float4 (E3M0)": 29.48, "NFloat4 + DQ": 27.41}
