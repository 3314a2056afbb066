"""The pruning experiments: the papers' tables on the lab's model, layers whose inputs are planted, and what it costs.

Layers are judged by the share of the output's energy that is lost, |X (W - W')^T|^2 / |X W^T|^2; models by bits per
byte of held-out text (perplexity a byte is two to the power of it).
"""

import copy
import itertools
import time

import numpy as np
import torch

from labkit import corpus, train
from labkit.check import randn
from labkit.llm_pruner import groups, llm_pruner, recover
from labkit.masks import InputNorm
from labkit.model import TEACHER, Llama
from labkit.prune import STATISTICS, calibration, linears, new_weight, prune, run, watch
from labkit.record import Experiment
from labkit.sparsegpt import Hessian, sparsegpt

PATTERNS = {"50%": dict(sparsity=0.5), "4:8": dict(n=4, m=8), "2:4": dict(n=2, m=4), "80%": dict(sparsity=0.8)}
METHODS = {
    "magnitude, per layer": dict(method="magnitude", per="layer"),
    "magnitude, per row": dict(method="magnitude", per="row"),
    "Wanda": dict(method="wanda"),
    "SparseGPT": dict(method="sparsegpt"),
}
DEFAULTS = dict(sparsity=None, n=None, m=None, per="row", block_size=128, damp=0.01)  # of `prune`
INPUTS = ("white", "correlated", "outliers")
EVAL_TEXT = 64 * 256  # ids of the held-out text
SLICE_TEXT = 8 * 256


def cells():
    """(pattern, method) of the tables. n of m is chosen within a row, so per layer means nothing there."""
    return [(p, m) for p in PATTERNS for m in METHODS if "n" not in PATTERNS[p] or METHODS[m].get("per") != "layer"]


# ---- planted layers


def planted_layer(inputs, seed=0, rows=256, columns=512, tokens=4096):
    """A layer w [rows, columns] and its inputs x [tokens, columns] for one of INPUTS.

    white: independent features of one size. correlated: every feature is 0.9 of its neighbour and something new.
    outliers: white, but 12 features 50 times as large, and their weights 50 times as small: the same function.
    """
    rng = np.random.default_rng(seed)
    w, x = randn(rng, rows, columns), randn(rng, tokens, columns)
    if inputs == "correlated":
        for j in range(1, columns):
            x[:, j] = 0.9 * x[:, j - 1] + 0.19**0.5 * x[:, j]
    elif inputs == "outliers":
        features = torch.from_numpy(rng.choice(columns, 12, replace=False))
        x[:, features] *= 50
        w[:, features] /= 50
    return w, x


def lost(w, new, x):
    """The share of the output's energy that is lost when w is replaced by new: w, new [N, K]; x [T, K]."""
    return ((x @ (w - new).T).square().sum() / (x @ w.T).square().sum()).item()


def prune_layer(w, x, pattern, name):
    """w [N, K] pruned by one of METHODS, with statistics of x [T, K]."""
    statistic = None
    if kind := STATISTICS[METHODS[name]["method"]]:
        statistic = kind(w.shape[1])
        statistic.add(x)
    return new_weight(w, statistic, **(DEFAULTS | PATTERNS[pattern] | METHODS[name]))


def planted_table(seed=0, patterns=tuple(PATTERNS), **sizes):
    """[{inputs, pattern, method, lost}] of planted layers; sizes: rows, columns, tokens."""
    table = []
    for inputs in INPUTS:
        w, x = planted_layer(inputs, seed, **sizes)
        for pattern, name in cells():
            if pattern in patterns:
                new = prune_layer(w, x, pattern, name)
                table.append(dict(inputs=inputs, pattern=pattern, method=name, lost=lost(w, new, x)))
    return table


CALIBRATION_TOKENS, DAMPS = (32, 64, 256, 2048), (0.01, 0.1, 1.0)


def calibration_table(seed=0, columns=256):
    """{tokens: {"Wanda" or SparseGPT's damp: lost}}: a layer with correlated inputs at 50 %, judged on fresh inputs."""
    w, x = planted_layer("correlated", seed, rows=64, columns=columns, tokens=2 * max(CALIBRATION_TOKENS))
    seen, fresh = x.chunk(2)
    table = {}
    for tokens in CALIBRATION_TOKENS:
        new = {"Wanda": prune_layer(w, seen[:tokens], "50%", "Wanda")}
        hessian = Hessian(columns)
        hessian.add(seen[:tokens])
        new |= {damp: sparsegpt(w, hessian.value, sparsity=0.5, damp=damp)[0] for damp in DAMPS}
        table[tokens] = {way: lost(w, x, fresh) for way, x in new.items()}
    return table


# ---- the lab's model


def plant_outliers(model, count=12, factor=50.0, seed=0):
    """Make `count` features behind every norm `factor` times as large, and the weights that read them as small.

    In place. The model computes what it did before; only the scales that magnitude looks at have changed.
    """
    rng = np.random.default_rng(seed)
    for block in model.layers:
        a, mlp = block.self_attn, block.mlp
        readers = {
            block.input_layernorm: (a.q_proj, a.k_proj, a.v_proj),
            block.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, those in readers.items():
            features = torch.from_numpy(rng.choice(len(norm.weight), count, replace=False))
            norm.weight.data[features] *= factor
            for linear in those:
                linear.weight.data[:, features] /= factor
    return model


def model_table(model, text, batches, wanted):
    """[{pattern, method, bits}] of pruned copies of a model, on the ids `text`."""
    table = []
    for pattern, name in wanted:
        pruned = prune(copy.deepcopy(model), batches=batches, progress=None, **PATTERNS[pattern], **METHODS[name])
        table.append(dict(pattern=pattern, method=name, bits=train.bits_per_byte(pruned, text)))
        print(f"{pattern} {name}: {table[-1]['bits']:.4f} bits per byte", flush=True)
    return table


def times(model, batches):
    """Processor seconds for the teacher's first block: the forward passes with each statistic, and what comes after."""
    block, found = model.layers[0], {}
    hidden = [model.embed_tokens(ids).detach() for ids in batches]
    for name, kind in (("Wanda", InputNorm), ("SparseGPT", Hessian)):
        with torch.no_grad():
            start = time.process_time()
            statistics = watch(model, block, hidden, kind)
            middle = time.process_time()
            for key, linear in linears(block).items():
                new_weight(linear.weight, statistics[key], **(DEFAULTS | PATTERNS["50%"] | METHODS[name]))
        found[name] = dict(forward=middle - start, weights=time.process_time() - middle)
    return found


class InputSpread:
    """The standard deviation of every input feature: `InputNorm` without the feature's mean. Not Wanda's but FLAP's."""

    def __init__(self, columns, device="cpu"):
        self.total, self.products = torch.zeros(columns, device=device), torch.zeros(columns, columns, device=device)
        self.count = 0

    def add(self, x):
        x = x.flatten(0, -2).float()
        self.total += x.sum(0)
        self.products += x.t() @ x
        self.count += len(x)

    @property
    def mean(self):
        return self.total / self.count

    @property
    def value(self):
        return (self.products.diagonal() / self.count - self.mean**2).clamp(min=0).sqrt()


class InputSize(InputSpread):
    """Wanda's norm of every input feature, but for a factor that all share; its mean is known as well."""

    @property
    def value(self):
        return (self.products.diagonal() / self.count).sqrt()


@torch.no_grad()
def prune_and_mend(model, batches, kind, *, rescale, bias):
    """Wanda at 50 % with one of the two above, then mended. In place, as `prune`.

    rescale: each row takes the factor that brings its output nearest to the dense one (least squares). bias: what is
    lost on average comes back as a bias of the layer.
    """
    hidden = [model.embed_tokens(ids) for ids in batches]
    for block in model.layers:
        statistics = watch(model, block, hidden, kind)
        for name, linear in linears(block).items():
            w, seen = linear.weight.clone(), statistics[name]
            kept = new_weight(w, seen, **(DEFAULTS | PATTERNS["50%"] | METHODS["Wanda"]))
            if rescale:
                to_fit = kept @ seen.products
                kept *= ((w * to_fit).sum(1) / (kept * to_fit).sum(1)).unsqueeze(1)
            linear.weight.copy_(kept)
            if bias:
                linear.bias = torch.nn.Parameter((w - kept) @ seen.mean)  # the lab's model has none
        hidden = [run(model, block, x) for x in hidden]
    return model


def norm_or_spread():
    """{rule: bits per byte} of the teacher at 50 %, on the text of `slice_table`: what the mean of a feature does."""
    model, text = Llama.from_pretrained(TEACHER), corpus.read("held_out", [train.SLICE])[:SLICE_TEXT]
    batches = calibration(sequences=16)
    magnitude = prune(copy.deepcopy(model), "magnitude", sparsity=0.5, progress=None)
    found = {"dense": train.bits_per_byte(model, text), "magnitude": train.bits_per_byte(magnitude, text)}
    for rule, kind in (("norm", InputSize), ("spread", InputSpread)):
        for rescale, bias in itertools.product((False, True), repeat=2):
            mended = prune_and_mend(copy.deepcopy(model), batches, kind, rescale=rescale, bias=bias)
            name = rule + ", rescaled" * rescale + ", bias" * bias
            found[name] = train.bits_per_byte(mended, text)
    return found


def layer_losses():
    """[(name, magnitude, Wanda)] of every linear of the dense teacher at 50 %: the share of the output that is lost."""
    model, found = Llama.from_pretrained(TEACHER), []
    hidden = [model.embed_tokens(ids) for ids in calibration(sequences=16)]
    with torch.no_grad():
        for i, block in enumerate(model.layers):
            inputs = {name: [] for name in linears(block)}
            hooks = [
                linear.register_forward_pre_hook(lambda module, given, seen=inputs[name]: seen.append(given[0]))
                for name, linear in linears(block).items()
            ]
            hidden = [run(model, block, x) for x in hidden]
            for hook in hooks:
                hook.remove()
            for name, linear in linears(block).items():
                w, x = linear.weight, torch.cat(inputs[name]).flatten(0, 1)
                losses = [lost(w, prune_layer(w, x, "50%", rule), x) for rule in ("magnitude, per row", "Wanda")]
                found.append((f"{i}.{name.split('.')[1]}", *losses))
    return found


# ---- published

# (Llama-2 7B, 13B, 70B): WikiText2 perplexity at context 4,096, from the README of the Wanda repository.
PUBLISHED = {
    "dense": (5.12, 4.57, 3.12),
    "50% magnitude": (14.89, 6.37, 4.98), "50% SparseGPT": (6.51, 5.63, 3.98), "50% Wanda": (6.42, 5.56, 3.98),
    "4:8 magnitude": (16.48, 6.76, 5.58), "4:8 SparseGPT": (8.12, 6.60, 4.59), "4:8 Wanda": (7.97, 6.55, 4.47),
    "2:4 magnitude": (54.59, 8.33, 6.33), "2:4 SparseGPT": (10.17, 8.32, 5.40), "2:4 Wanda": (11.02, 8.27, 5.16),
}  # fmt: skip
# LLaMA-7B with a fifth of its parameters removed: (WikiText2 perplexity at context 128, average of 7 tasks in %),
# before and after LoRA tuning (None: not given). LLM-Pruner, Table 1.
PUBLISHED_STRUCTURAL = {
    "dense": ((12.62, 63.25), None), "L2": ((582.41, 42.65), None), "random": ((27.51, 52.69), None),
    "vector": ((22.28, 53.25), (18.84, 57.23)), "element, second order": ((19.77, 56.82), (17.37, 60.07)),
    "element, first order": ((19.09, 56.69), (17.58, 59.23)),
}  # fmt: skip


# ---- structural pruning


RATIOS = (0.25, 0.5)
ORDERS = ("l2", "random", "vector", "first", "second")
DRAWS = 3  # seeds of random; sets of 16 calibration sequences for the orders that differentiate the loss
RECOVERED_RATIO, RECOVERY_STEPS = 0.5, 40


def structural_table(model, text, seed=0):
    """[{order, ratio, draw, parameters, before, after}]: bits per byte; after recovery by LoRA where it was done.

    draw: which seed of random, or which calibration sequences; l2 needs neither and is there once.
    """
    batches = calibration(sequences=16 * DRAWS, length=128)  # of 8 sequences each
    rows = torch.cat(calibration(sequences=192))
    table = []
    for ratio in RATIOS:
        for order in ORDERS:
            for draw in range(1 if order == "l2" else DRAWS):
                drawn = batches[2 * draw : 2 * draw + 2]
                pruned = llm_pruner(model, drawn, ratio=ratio, order=order, seed=seed + draw)
                row = dict(order=order, ratio=ratio, draw=draw, after=None)
                row |= dict(parameters=sum(p.numel() for p in pruned.parameters()))
                row |= dict(before=train.bits_per_byte(pruned, text))
                if ratio == RECOVERED_RATIO and draw == 0:
                    recover(pruned, rows, steps=RECOVERY_STEPS, batch=8, seed=seed)
                    row["after"] = train.bits_per_byte(pruned, text)
                table.append(row)
                print(f"{order} {ratio} {draw}: {row['before']:.4f}, recovered {row['after']}", flush=True)
    return table


def plant_scales(model, spread=16.0, seed=0):
    """Make every MLP channel and every head up to `spread` times as large or small, and undo it where it is read.

    In place. The model computes what it did before, and w * gradient of every weight is what it was; w^2 is not.
    """
    rng = np.random.default_rng(seed)
    for block in model.layers:
        for members in groups(block).values():
            (writer, _, size), (reader, _, read_size) = members[-2:]  # up and down, v and o
            factor = torch.from_numpy(spread ** rng.uniform(-1, 1, writer.weight.shape[0] // size)).float()
            writer.weight.data *= factor.repeat_interleave(size)[:, None]
            if writer.bias is not None:
                writer.bias.data *= factor.repeat_interleave(size)
            reader.weight.data /= factor.repeat_interleave(read_size)
    return model


def scales_and_orders():
    """{order: bits per byte of the pruned teacher, without and with planted scales}: half of the groups removed.

    On the text of `slice_table`.
    """
    model, text = Llama.from_pretrained(TEACHER), corpus.read("held_out", [train.SLICE])[:SLICE_TEXT]
    batches, found = calibration(sequences=16, length=128), {}
    planted = plant_scales(copy.deepcopy(model))
    for order in ("l2", "first"):
        pruned = [llm_pruner(one, batches, ratio=0.5, order=order) for one in (model, planted)]
        found[order] = tuple(train.bits_per_byte(one, text) for one in pruned)
    return found


# ---- the record


def slice_table():
    """What a notebook runs again: the pinned text only, so every Python has the same. bits on one held-out file."""
    model, text = Llama.from_pretrained(TEACHER), corpus.read("held_out", [train.SLICE])[:SLICE_TEXT]
    wanted = [("2:4", "magnitude, per row"), ("2:4", "Wanda"), ("2:4", "SparseGPT")]
    return model_table(model, text, calibration(sequences=16), wanted)


def study(seed) -> dict:
    """All tables, from the teacher. Calibration: 64 sequences of 256 ids of the pinned text."""
    model, text = Llama.from_pretrained(TEACHER), corpus.read("held_out")[:EVAL_TEXT]
    batches = calibration(sequences=64)
    planted = plant_outliers(copy.deepcopy(model), seed=seed)
    return dict(
        threads=torch.get_num_threads(),
        left_out=corpus.left_out("held_out") | corpus.left_out("calibration"),
        dense=train.bits_per_byte(model, text),
        planted_dense=train.bits_per_byte(planted, text),
        layers=planted_table(seed),
        times=times(model, batches),
        model=model_table(model, text, batches, cells()),
        planted=model_table(planted, text, batches, [("50%", name) for name in METHODS]),
        structural=structural_table(model, text, seed),
        slice=slice_table(),
    )


def experiments() -> dict[str, Experiment]:
    return {"pruning": Experiment(study, weights=TEACHER / "model.safetensors")}
