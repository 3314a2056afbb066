"""From multi-head to grouped-query attention: pool the KV heads of a trained model, then train on for a little.

The recipe of Ainslie et al. 2023, section 2: the projections of the KV heads of a group are replaced by their mean, and
the model goes on with its own training for a few percent of its steps ("uptraining").
"""

import copy
import hashlib
import shutil
import tempfile
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch
from torch import nn

from labkit import corpus, train
from labkit.args import expect
from labkit.model import TEACHER, Llama
from labkit.record import Experiment

HOW = ("mean", "first", "random")


def pool_kv_heads(weight, num_kv_heads_from, num_kv_heads_to, head_dim, how="mean", *, generator=None):
    """The weight or bias of a k_proj or v_proj for fewer KV heads: each new head replaces a group of adjacent ones.

    weight [num_kv_heads_from * head_dim, in_features], or a bias [num_kv_heads_from * head_dim]. A group is adjacent
    because query head h reads KV head h // group. how: "mean" of the group; its "first" head; "random": new normal
    values with the weight's standard deviation (a bias: 0), drawn with the torch `generator`.

    "mean" and "first" are exact where the heads of a group are equal: the mean is taken in fp64. With k_norm (Qwen3)
    the heads are pooled before the norm, which stays as it is; the mean is then only an approximation of the mean key.

    Returns [num_kv_heads_to * head_dim, ...] in weight's dtype. Raises ValueError naming the argument. Source: Ainslie
    et al. 2023, section 2.1 and figure 4.
    """
    for name, count in (("num_kv_heads_from", num_kv_heads_from), ("head_dim", head_dim)):
        expect(isinstance(count, int) and count > 0, name, count, "a positive int")
    ok = isinstance(num_kv_heads_to, int) and num_kv_heads_to > 0 and num_kv_heads_from % num_kv_heads_to == 0
    expect(ok, "num_kv_heads_to", num_kv_heads_to, f"a divisor of {num_kv_heads_from}")
    expect(how in HOW, "how", repr(how), " or ".join(map(repr, HOW)))
    good = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dim() in (1, 2)
    expect(good, "weight", getattr(weight, "dtype", type(weight).__name__), "a floating tensor of 1 or 2 dimensions")
    rows = num_kv_heads_from * head_dim
    expect(len(weight) == rows, "weight (shape)", tuple(weight.shape), f"{num_kv_heads_from} heads of {head_dim} rows")
    groups = weight.unflatten(0, (num_kv_heads_to, -1, head_dim))  # [to, group, D, ...]
    if how == "mean":
        pooled = groups.double().mean(1).to(weight.dtype)
    elif how == "first":
        pooled = groups[:, 0].clone()
    elif weight.dim() == 1:
        pooled = torch.zeros_like(groups[:, 0])
    else:
        pooled = torch.randn(groups[:, 0].shape, generator=generator) * weight.float().std().cpu()
        pooled = pooled.to(weight)
    return pooled.flatten(0, 1)


def convert(model: Llama, num_kv_heads: int, how="mean", *, seed=0) -> Llama:
    """A copy of the model with fewer KV heads: weights, biases and config. Query heads and all else stay.

    The model itself is not touched. save_pretrained writes the copy as a checkpoint. seed: for how="random".
    Raises ValueError naming the argument.
    """
    converted, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    old, head_dim = model.config.num_key_value_heads, model.config.head_dim
    for layer in converted.layers:
        for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            for name, x in list(proj.named_parameters()):
                pooled = pool_kv_heads(x.detach(), old, num_kv_heads, head_dim, how, generator=generator)
                setattr(proj, name, nn.Parameter(pooled))
            proj.out_features = num_kv_heads * head_dim
    converted.config = replace(model.config, num_key_value_heads=num_kv_heads)
    return converted


# ---- the experiment

ALPHA = 0.05  # share of the teacher's steps
# The teacher's recipe, with other batches. Its rates had fallen to zero: they rise again and fall over all the steps.
# (Lower ones were tried: 24 steps to one KV head ended at 3.97 bits per byte of calibration text, with a third of the
# rates at 4.33, with a tenth at 4.89.)
UPTRAINING = train.Recipe(seed=1, steps=round(ALPHA * train.Recipe.steps), warmup=5, cooldown=1.0)
RUNS = ((8, "mean"), (4, "mean"), (2, "mean"), (1, "mean"), (1, "first"), (1, "random"))  # 8: the teacher, the control
POINTS = 6  # of the curve
CURVE_TEXT, EVAL_TEXT = 32 * 256, 128 * 256  # ids of the held-out text for a point of the curve, and before and after
SLICE_STEPS = 2


def converted_slice(num_kv_heads, how="mean") -> dict:
    """What a notebook measures again: bits per byte of one held-out file after conversion, and after SLICE_STEPS more.

    The second number hangs on the training text, which `corpus` takes from the running Python.
    """
    text = corpus.read("held_out", [train.SLICE])
    model = convert(Llama.from_pretrained(TEACHER), num_kv_heads, how)
    before = train.bits_per_byte(model, text)
    with tempfile.TemporaryDirectory() as work:
        options = dict(every=SLICE_STEPS, until=SLICE_STEPS)
        ((_, _, after, _),) = train.train(model, UPTRAINING, corpus.read("train"), text, Path(work), **options)
    return {"converted": before, "uptrained": after}


def training_text_sha256() -> str:
    return hashlib.sha256(b"".join(corpus.texts_of("train").values())).hexdigest()


def study(seed) -> dict:
    """Convert the teacher, measure, uptrain, measure: held-out bits per byte, everything on the same text and batches.

    at_once: every conversion without training, on the text of the curves. runs: for each of RUNS the curve, and the
    bits per byte of a longer text before and after. slice: `converted_slice` of one KV head.
    """
    teacher, recipe = Llama.from_pretrained(TEACHER), replace(UPTRAINING, seed=UPTRAINING.seed + seed)
    ids, held_out = corpus.read("train"), corpus.read("held_out")[:EVAL_TEXT]
    short, runs, at_once = held_out[:CURVE_TEXT], [], []
    for how, heads in product(HOW, (4, 2, 1)):
        bits = train.bits_per_byte(convert(teacher, heads, how, seed=seed), short)
        at_once.append(dict(heads=heads, how=how, bits=bits))
    for heads, how in RUNS:
        model = convert(teacher, heads, how, seed=seed)
        before = train.bits_per_byte(model, held_out)
        work = train.WORK / f"gqa-{seed}" / f"{heads}-{how}"  # an interrupted study goes on from there
        curve = [[0, None, train.bits_per_byte(model, short), 0]]
        curve += train.train(model, recipe, ids, short, work, every=recipe.steps // POINTS)
        after = train.bits_per_byte(model, held_out)
        parameters = sum(p.numel() for p in model.parameters())
        runs.append(dict(heads=heads, how=how, parameters=parameters, curve=curve, before=before, after=after))
        print(f"{heads} KV heads, {how}: {before:.4f} bits per byte, after uptraining {after:.4f}", flush=True)
    shutil.rmtree(train.WORK / f"gqa-{seed}")
    return dict(
        recipe=asdict(recipe),
        teacher_steps=train.Recipe.steps,
        threads=torch.get_num_threads(),
        training_text_sha256=training_text_sha256(),
        left_out=corpus.left_out("held_out"),
        at_once=at_once,
        runs=runs,
        slice=converted_slice(1),
    )


def experiments() -> dict[str, Experiment]:
    return {"gqa": Experiment(study, weights=TEACHER / "model.safetensors")}
