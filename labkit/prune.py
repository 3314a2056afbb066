"""Prune a whole model, one block after the other: `prune(model, method, ...)`, or `python -m labkit.prune IN OUT ...`.

The statistics of a block come from its dense weights, but from the outputs of blocks that are pruned already: so each
block can make up for what was lost before it. In memory are the model and the activations between two blocks.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from labkit import args, corpus, train
from labkit.masks import InputNorm, magnitude_mask, nm_mask, wanda_mask
from labkit.model import causal, load
from labkit.sparsegpt import Hessian, sparsegpt

STATISTICS = {"magnitude": None, "wanda": InputNorm, "sparsegpt": Hessian}  # what a method collects of a layer's inputs
SAME_INPUT = {"self_attn.k_proj": "self_attn.q_proj", "self_attn.v_proj": "self_attn.q_proj"}
SAME_INPUT["mlp.up_proj"] = "mlp.gate_proj"


def bar(done, total, seconds):
    """One line on stderr a block."""
    left = seconds / done * (total - done)
    end = "\r" if sys.stderr.isatty() and done < total else "\n"
    full = 30 * done // total
    print(f"[{'#' * full:.<30}] {done}/{total} blocks, {left:.0f} s left", end=end, file=sys.stderr, flush=True)


def linears(block):
    """{name: linear} of a block, in the order in which they are run."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def new_weight(w, statistic, method, *, sparsity, n, m, per, block_size, damp):
    """w [N, K] after pruning one layer. statistic: what was collected of its inputs, see STATISTICS."""
    if method == "sparsegpt":
        options = dict(sparsity=sparsity, n=n, m=m, block_size=block_size, damp=damp)
        return sparsegpt(w, statistic.value, **options)[0]
    if method == "wanda":
        keep = wanda_mask(w, statistic.value, sparsity=sparsity, n=n, m=m)
    else:
        keep = magnitude_mask(w, sparsity, per=per) if sparsity is not None else nm_mask(w.abs(), n, m)
    return w.masked_fill(~keep, 0)


@torch.no_grad()
def prune(
    model, method, batches=None, *, sparsity=None, n=None, m=None, per="row", block_size=128, damp=0.01, statistic=None,
    work=None, progress=bar,
):  # fmt: skip
    """Prune the linears of all blocks of a `labkit.model.Llama` in place, and return it. Embeddings and head stay.

    method: "magnitude", "wanda" or "sparsegpt". batches: calibration, a list of ids [B, T] that begin as the model's
    texts do; not needed for "magnitude". sparsity, or n of m: how much goes; per: "row" or "layer", for magnitude
    (n:m is per row always); block_size, damp: for sparsegpt. statistic: a class with `add` and `value` to try in place
    of the one that the method collects (STATISTICS).
    work: a folder for finished blocks (safetensors, each written whole or not at all). A run that was interrupted goes
    on from there, given the same model and settings. progress(done, total, seconds) is called after each block.

    `model.save_pretrained` writes the result as a checkpoint of the same layout. Raises ValueError naming the argument:
    if the calibration is shorter than sparsegpt's widest layer, if its Hessian is not positive definite, or if the
    folder belongs to another run; blocks before the failing one are pruned then.
    """
    args.expect(method in STATISTICS, "method", repr(method), " or ".join(map(repr, STATISTICS)))
    args.expect(per in ("row", "layer"), "per", repr(per), "'row' or 'layer'")
    widest = 0
    for block in model.layers:
        for linear in linears(block).values():
            args.sparsity_pattern(sparsity, n, m, linear.in_features, below_one=method == "sparsegpt")
            widest = max(widest, linear.in_features)
    blocks_fit = method != "sparsegpt" or m is None or block_size % m == 0
    args.expect(blocks_fit, "block_size", block_size, f"a multiple of m = {m}")
    batches = [] if method == "magnitude" else check_calibration(batches, method, widest, model.config.vocab_size)
    options = dict(sparsity=sparsity, n=n, m=m, per=per, block_size=block_size, damp=damp)
    finished = None
    if work is not None:
        kind = statistic.__name__ if statistic else None
        finished = Finished(work, dict(method=method, **options, statistic=kind, sha256=fingerprint(model, batches)))
    device = model.embed_tokens.weight.device
    hidden = [model.embed_tokens(ids.to(device)) for ids in batches]
    begun = time.monotonic()
    for i, block in enumerate(model.layers):
        if finished and (weights := finished.read(i)) is not None:
            block.load_state_dict(weights, strict=False)
        else:
            statistics = watch(model, block, hidden, statistic or STATISTICS[method]) if hidden else {}
            for name, linear in linears(block).items():
                try:
                    linear.weight.copy_(new_weight(linear.weight, statistics.get(name), method, **options))
                except ValueError as error:
                    raise ValueError(f"layers.{i}.{name}: {error}") from error
            if finished:
                finished.write(i, {f"{name}.weight": x.weight for name, x in linears(block).items()})
        for j, x in enumerate(hidden):
            hidden[j] = run(model, block, x)
        if progress:
            progress(i + 1, len(model.layers), time.monotonic() - begun)
    return model


def check_calibration(batches, method, widest, vocab_size):
    """batches as a list, after a look at each; for SparseGPT enough of them for Hessians of full rank."""
    batches = list(batches or [])
    args.expect(len(batches) > 0, "batches", "none", f"calibration for {method}: ids [B, T]")
    for ids in batches:
        args.tensor("batches", ids, ("batch", "len"), dtypes=(torch.int64, torch.int32))
        args.expect(ids.numel() > 0, "batches", tuple(ids.shape), "[>= 1, >= 1]")
        args.in_range("batches", ids, 0, vocab_size - 1)
    tokens = sum(ids.numel() for ids in batches)
    if method == "sparsegpt":
        expected = f"at least {widest}, the inputs of the widest layer: raise the number of sequences or their length"
        args.expect(tokens >= widest, "batches", f"{tokens} tokens", expected)
    return batches


def run(model, block, x):
    """The block's output for x [B, T, hidden], plain causal attention."""
    cos, sin = model.angles(torch.arange(x.shape[1], device=x.device))
    return block(x, cos, sin, lambda q, k, v: causal(0, q, k, v))


def watch(model, block, hidden, kind):
    """Run the block on all hidden states [B, T, hidden] and collect `kind` of the inputs of each of its linears."""
    own = {name: x for name, x in linears(block).items() if name not in SAME_INPUT}
    statistics = {name: kind(x.in_features, x.weight.device) for name, x in own.items()}
    hooks = [
        x.register_forward_pre_hook(lambda module, inputs, name=name: statistics[name].add(inputs[0]))
        for name, x in own.items()
    ]
    try:
        for x in hidden:
            run(model, block, x)
    finally:
        for hook in hooks:
            hook.remove()
    return statistics | {name: statistics[other] for name, other in SAME_INPUT.items()}


def fingerprint(model, batches):
    """sha256 of the calibration ids, as they are batched, and of all weights: another model or text is another run."""
    shapes = torch.tensor([ids.shape for ids in batches])
    return train.fingerprint(shapes, *batches, *model.state_dict().values())


class Finished:
    """The blocks that a run has finished, a file each in its folder."""

    def __init__(self, folder, settings):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "settings.json"
        if file.exists():
            found = json.loads(file.read_text())
            what = {name: found.get(name) for name in settings if found.get(name) != settings[name]}
            expected = f"{ {name: settings[name] for name in what} }; delete the folder to start again"
            args.expect(not what, f"work ({file})", f"a run with {what}", expected)
        else:
            self._replace(file, lambda part: part.write_text(json.dumps(settings) + "\n"))

    def _replace(self, file, write):
        part = file.with_suffix(".part")
        write(part)
        os.replace(part, file)

    def _file(self, i):
        return self.folder / f"block-{i:03}.safetensors"

    def read(self, i):
        return load_file(self._file(i)) if self._file(i).exists() else None

    def write(self, i, weights):
        weights = {name: x.detach().cpu().contiguous() for name, x in weights.items()}
        self._replace(self._file(i), lambda part: save_file(weights, part))


def calibration(encode=None, *, sequences=64, length=256):
    """`sequences` chunks of the calibration text, [B, T] each 8 at a time, every one after BOS if the model has one.

    encode(text) -> ids, as `labkit.model.load` gives it: after BOS or, with Qwen, nothing. Default: the lab's bytes.
    """
    if encode is None:
        ids, first = corpus.read("calibration"), [corpus.BOS]
    else:
        ids = encode(b"".join(corpus.texts_of("calibration").values()).decode(errors="replace"))
        first = [a for a, b in zip(ids[:1], encode("")) if a == b]  # BOS is what begins a text of nothing, too
        ids = torch.tensor(ids[len(first) :])
    own = length - len(first)
    have = len(ids) // own
    args.expect(sequences <= have, "sequences", sequences, f"at most {have} of length {length} in the calibration text")
    rows, first = ids[: sequences * own].view(sequences, own), torch.tensor(first, dtype=torch.long)
    return list(torch.cat((first.expand(sequences, -1), rows), dim=1).split(8))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m labkit.prune", description=prune.__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a checkpoint in Hugging Face layout")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--method", choices=list(STATISTICS), default="wanda")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--keep", help="n:m, e.g. 2:4")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the result")
    options = parser.parse_args(argv)
    n, m = map(int, options.keep.split(":")) if options.keep else (None, None)
    model, encode, _ = load(options.model)
    batches = calibration(encode, sequences=options.sequences, length=options.length)
    work = Path(f"{options.out}.work")
    prune(model, options.method, batches, sparsity=options.sparsity, n=n, m=m, damp=options.damp, work=work)
    model.to(getattr(torch, options.dtype)).save_pretrained(options.out)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
