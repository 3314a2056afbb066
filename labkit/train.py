"""Train the lab's own model: `python -m labkit.train`. Seeded, resumable, on a CPU or a GPU.

The recipe: matrices by Muon (Jordan et al. 2024: momentum, orthogonalised by Newton-Schulz), embeddings and norms by
AdamW; a short warm-up, a constant rate, then linear to zero. Every chunk begins with BOS, so that a sink can form.
"""

import bz2
import gzip
import hashlib
import lzma
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from labkit import corpus
from labkit.attention import attention
from labkit.model import TEACHER, Config, Llama

WORK = Path(__file__).parent.parent / "_build" / "train"  # checkpoints
SLICE = "graphlib.py"  # the held-out file that the tests measure again
PROMPT = "class Cache:\n    "


@dataclass
class Recipe:
    seed: int = 0
    steps: int = 1450
    batch: int = 16  # chunks a step
    length: int = 256  # bytes a chunk
    warmup: int = 50
    cooldown: float = 0.5  # share of the steps in which the rates fall to zero
    muon_lr: float = 0.02
    adam_lr: float = 0.004


def teacher_config(length):
    return Config(
        vocab_size=corpus.VOCAB, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, head_dim=32, max_position_embeddings=length, tie_word_embeddings=True,
        bos_token_id=corpus.BOS, eos_token_id=corpus.EOS,
    )  # fmt: skip


def init(config, seed):
    """Normal, 0.02; for what writes to the residual stream / sqrt(2 layers) (Radford et al. 2019, section 2.3)."""
    torch.manual_seed(seed)
    model = Llama(config)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, std=0.02 * ((2 * config.num_hidden_layers) ** -0.5 if writes else 1.0))
    return model


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, in fp32: torch's own Muon casts to bf16, which CPUs are slow at."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(m, group["momentum"])))  # Nesterov
            for (rows, cols), pairs in by_shape.items():
                updates = orthogonal(torch.stack([g for _, g in pairs]))
                for (p, _), update in zip(pairs, updates):
                    p.add_(update, alpha=-group["lr"] * max(1, rows / cols) ** 0.5)


def orthogonal(g, steps=5):
    """g [n, rows, cols], its singular values pushed to about 1 by Newton-Schulz steps (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.transpose(1, 2) if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.transpose(1, 2)
        x = a * x + (b * s + c * s @ s) @ x
    return x.transpose(1, 2) if tall else x


def optimizers(model, r):
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers." in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "layers." not in name]
    return [Muon(matrices, r.muon_lr), torch.optim.AdamW(others, r.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def batch(ids, step, r):
    """The chunks [B, T] of a step: every chunk of the corpus once an epoch, in an order that (seed, epoch) fixes."""
    blocks = (len(ids) - r.length) // r.length
    epoch, i = divmod(step, blocks // r.batch)
    g = torch.Generator().manual_seed(r.seed * 1000 + epoch)
    shift = torch.randint(r.length, (), generator=g)
    pick = torch.randperm(blocks, generator=g)[i * r.batch : (i + 1) * r.batch]
    return torch.stack([ids[shift + j * r.length :][: r.length] for j in pick])


def rate(step, r):
    """The share of the peak learning rates at a step."""
    return min(1.0, (step + 1) / r.warmup, (r.steps - step) / (r.cooldown * r.steps))


def train(model, r, ids, held_out, work, *, device="cpu", compile=False, every=100, until=None):
    """Train model in place on ids [n], from the checkpoint in the folder `work` if there is one.

    Every `every` steps the checkpoint is renewed and a point is added to the curve: [step, training and held-out bits
    per byte, seconds]. until: stop at this step, to be resumed. Returns the curve. Raises ValueError, with nothing
    trained, for the checkpoint of another run: another recipe, text or first weights.
    """
    run = asdict(r) | {"begins": fingerprint(ids, *model.state_dict().values())}
    model, opts = model.to(device).train(), optimizers(model, r)

    def loss_of(y):
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            logits = model(corpus.with_bos(y))
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    loss_of = torch.compile(loss_of) if compile else loss_of
    work.mkdir(parents=True, exist_ok=True)
    saved, start, curve, recent = work / "checkpoint.pt", 0, [], []
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        if state["run"] != run:
            raise ValueError(f"{saved}: got the run {state['run']}, expected {run}; delete it to start again")
        start, curve = state["step"], state["curve"]
        model.load_state_dict(state["model"])
        for opt, opt_state in zip(opts, state["opts"]):
            opt.load_state_dict(opt_state)
    bar, begun = Bar(r.steps), time.perf_counter() - (curve[-1][3] if curve else 0)
    for step in range(start, r.steps if until is None else until):
        for opt, peak in zip(opts, (r.muon_lr, r.adam_lr)):
            opt.param_groups[0]["lr"] = peak * rate(step, r)
        loss = loss_of(batch(ids, step, r).to(device))
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        recent = [*recent[-every + 1 :], loss.item() / math.log(2)]
        bits, done = sum(recent) / len(recent), step + 1
        if done % every == 0 or done == r.steps:
            seconds = round(time.perf_counter() - begun)
            curve.append([done, round(bits, 4), round(bits_per_byte(model, held_out, r.length), 4), seconds])
            state = dict(run=run, step=done, curve=curve, model=model.state_dict())
            torch.save(state | dict(opts=[opt.state_dict() for opt in opts]), saved.with_suffix(".part"))
            saved.with_suffix(".part").replace(saved)
        bar.show(done, bits, curve)
    return curve


def fingerprint(*tensors):
    """SHA-256 of the tensors' numbers."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class Bar:
    """One line, redrawn on a terminal; elsewhere one line every 50 steps."""

    def __init__(self, steps):
        self.steps, self.first, self.begun = steps, None, None

    def show(self, step, bits, curve):
        if self.first is None:  # counted from here: the first step compiles
            self.first, self.begun = step, time.perf_counter()
        terminal, left = sys.stderr.isatty(), (self.steps - step) / max(1, step - self.first)
        if terminal or step % 50 == 0 or step == self.steps:
            full, minutes = 30 * step // self.steps, left * (time.perf_counter() - self.begun) / 60
            held_out = f", held out {curve[-1][2]:.3f}" if curve else ""
            text = (
                f"[{'#' * full:.<30}] {step}/{self.steps}, {bits:.3f} bits per byte{held_out}, {minutes:.0f} min left"
            )
            print(text, end="\r" if terminal and step < self.steps else "\n", file=sys.stderr, flush=True)


@torch.no_grad()
def bits_per_byte(model, ids, length=256, rows=16):
    """Mean bits per id of the stream ids [n], EOS included. Windows of `length` after BOS, each half over the last.

    Only the new half of a window counts: all but the first length/2 ids are predicted from length/2 others or more.
    What is left at the end, less than half a window, does not count.
    """
    windows, half, nats, count = ids.unfold(0, length, length // 2), length // 2, 0.0, 0
    for i in range(0, len(windows), rows):
        y = windows[i : i + rows].to(model.norm.weight.device)
        logits = model(corpus.with_bos(y)).float()
        loss = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")  # [rows, length]
        new = loss[:, half:] if i else torch.cat((loss[0, :half], loss[:, half:].flatten()))
        nats, count = nats + new.sum().item(), count + new.numel()
    return nats / count / math.log(2)


def compressors(train_ids, held_ids):
    """Bits per byte of the held-out stream under each peer. Primed: what lzma adds to the compressed training text."""
    known, data = (bytes(i for i in ids.tolist() if i < corpus.BOS) for ids in (train_ids, held_ids))
    best = 9 | lzma.PRESET_EXTREME

    def size(text):
        return len(lzma.compress(text, preset=best))

    sizes = {
        "gzip": len(gzip.compress(data, 9)),
        "bz2": len(bz2.compress(data, 9)),
        "lzma": size(data),
        "lzma, primed with the training text": size(known + data) - size(known),
    }
    bits = {name: 8 * n / len(data) for name, n in sizes.items()}
    return bits | {"order-5 model": order_n_bits(train_ids.numpy(), held_ids.numpy(), 5)}


def order_n_bits(train_ids, held_ids, order):
    """Bits per id of a byte n-gram model: contexts of 0..order ids, interpolated by Witten and Bell's rule (1991).

    p_k(x | c) = (count(c x) + distinct(c) p_{k-1}(x | c')) / (count(c) + distinct(c)), c' being c without its first id.
    """
    p = np.full(len(held_ids), 1 / corpus.VOCAB)
    for k in range(order + 1):
        keys, counts = np.unique(_contexts(train_ids, k), return_counts=True)  # c x, and how often
        contexts, first = np.unique(keys // corpus.VOCAB, return_index=True)  # c
        totals, distinct = np.add.reduceat(counts, first), np.diff(np.append(first, len(keys)))
        wanted = _contexts(held_ids, k)
        count = _look_up(keys, counts, wanted)
        total, types = (_look_up(contexts, x, wanted // corpus.VOCAB) for x in (totals, distinct))
        p = np.where(total > 0, (count + types * p) / np.maximum(total + types, 1), p)
    return float(-np.log2(p).mean())


def _contexts(ids, k):
    """For every id a number for (the k ids before it, itself); EOS stands before the first."""
    padded, key = np.concatenate((np.full(k, corpus.EOS), ids)), 0
    for i in range(k + 1):
        key = key * corpus.VOCAB + padded[i : i + len(ids)]
    return key


def _look_up(keys, values, wanted):
    """values of the wanted keys (sorted keys), 0 where there is none."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


@torch.no_grad()
def sample(model, prompt, n, *, seed=0, temperature=0.7):
    """prompt and n ids after it, drawn at a temperature (0: the likeliest), over a cache in a closure."""
    ids, cache = [corpus.BOS, *corpus.encode(prompt)], {}
    generator = torch.Generator().manual_seed(seed)

    def attend(layer, q, k, v):
        cache[layer] = [torch.cat(pair, dim=1) for pair in zip(cache[layer], (k, v))] if layer in cache else [k, v]
        return attention(q, *cache[layer])

    logits = model(torch.tensor([ids]), None, attend)[0, -1]
    for _ in range(n):
        p = (logits / temperature).softmax(-1) if temperature else (logits == logits.max()).float()
        ids.append(int(torch.multinomial(p, 1, generator=generator)))
        logits = model(torch.tensor([ids[-1:]]), torch.tensor([len(ids) - 1]), attend)[0, -1]
    return corpus.decode(ids)


def teacher(seed):
    """Train the teacher, write its weights in bf16, and return all that is to be recorded of it."""
    r = Recipe(seed=seed)
    model, ids, held_out = init(teacher_config(r.length), seed), corpus.read("train"), corpus.read("held_out")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids):,} ids of training text; {r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compile = device == "cuda" or bool(shutil.which("g++"))
    curve = train(model, r, ids, held_out[: 64 * r.length], WORK, device=device, compile=compile)
    model.to("cpu", torch.bfloat16).save_pretrained(TEACHER)
    model = Llama.from_pretrained(TEACHER)
    text = b"".join(corpus.texts_of("train").values())
    found = dict(
        recipe=asdict(r),
        parameters=sum(p.numel() for p in model.parameters()),
        threads=torch.get_num_threads(),
        training_text=dict(bytes=len(text), sha256=hashlib.sha256(text).hexdigest()),
        left_out=corpus.left_out("held_out"),
        curve=curve,
        held_out_bits_per_byte=bits_per_byte(model, held_out),
        slice_bits_per_byte=bits_per_byte(model, corpus.read("held_out", [SLICE])),
        calibration_bits_per_byte=bits_per_byte(model, corpus.read("calibration")),
        peers=compressors(ids, held_out),
        samples=[sample(model, PROMPT, 240 - len(PROMPT), seed=s) for s in range(3)],
        weights_sha256=hashlib.sha256((TEACHER / "model.safetensors").read_bytes()).hexdigest(),
    )
    (WORK / "checkpoint.pt").unlink()  # what is done is not to be taken for an interrupted run of other code
    return found


if __name__ == "__main__":
    from labkit import record, train  # so that the experiment's function has a module's name, not __main__

    print(record.run_experiment("train", record.Experiment(train.teacher)))
