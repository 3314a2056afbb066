"""The studies of chapter 10: the engine against `transformers`, and what each technique contributes."""

import time

import numpy as np
import torch
import torch.nn.functional as F

from labkit import corpus
from labkit import model as models
from labkit.engine import Engine
from labkit.simulate import capped_exponential

WEIGHTS = models.TEACHER / "model.safetensors"

# ---- published figures, not reproduced here

# nano-vllm's README: one RTX 4070 Laptop (8 GB), Qwen3-0.6B, 256 sequences, prompts and outputs of 100 to 1,024
# tokens, drawn at random, 133,966 output tokens. Tokens/s.
PUBLISHED_NANO_VLLM = {"vLLM": 1361.84, "nano-vllm": 1434.13}

# ---- the workload


def workload(count=96, *, shared=False, seed=0):
    """Ragged requests, all there at once: (prompts, output lengths).

    Prompts are pieces of the held-out text, 16 to 96 bytes after BOS, uniform. shared: instead, one of four pieces of
    64 bytes that many have in common, then 16 to 64 of its own. Outputs: exponential with mean 32, drawn again
    above 128, which is the shape of Anyscale's benchmark (chapter 9) in a model of 256 positions.
    """
    rng, text = np.random.default_rng(seed), corpus.read("held_out").tolist()

    def piece(length):
        start = int(rng.integers(0, len(text) - length))
        return text[start : start + length]

    common = [[corpus.BOS, *piece(63)] for _ in range(4)] if shared else [[corpus.BOS]]
    longest = 64 if shared else 96
    prompts = [common[rng.integers(len(common))] + piece(int(rng.integers(16, longest + 1))) for _ in range(count)]
    return prompts, capped_exponential(rng, count, 32, 128).tolist()


# ---- other ways to the same tokens


@torch.inference_mode()
def one_by_one(model, prompt, max_new_tokens, stop=()):
    """Greedy decoding without any cache: the whole sequence through the model for every token.

    Returns (new tokens, margins): by how much each token's logit was above the second largest.
    """
    tokens, margins = list(prompt), []
    device = model.embed_tokens.weight.device
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([tokens], device=device))[0, -1]
        first, second = logits.topk(2)[0].tolist()
        tokens.append(int(logits.argmax()))
        margins.append(first - second)
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :], margins


@torch.inference_mode()
def padded(model, prompts, lengths, batch):
    """Static batching as one would write it in an hour: left padding, one contiguous cache, until the longest is done.

    Returns (new tokens of each, peak bytes of the cache, passes through the model, tokens computed).
    """
    texts, peak, passes, computed = [], 0, 0, 0
    for first in range(0, len(prompts), batch):
        part, outs = prompts[first : first + batch], lengths[first : first + batch]
        new, used, rows = _padded_batch(model, part, max(outs))
        texts += [row[:n] for row, n in zip(new, outs)]
        peak, passes, computed = max(peak, used), passes + max(outs), computed + rows
    return texts, peak, passes, computed


def _padded_batch(model, prompts, most):
    """(new tokens [rows][most], bytes of the cache, tokens computed)."""
    config, like, longest = model.config, model.embed_tokens.weight, max(map(len, prompts))
    shape = (2, config.num_hidden_layers, len(prompts), longest + most, config.num_key_value_heads, config.head_dim)
    cache = torch.zeros(shape, dtype=like.dtype, device=like.device)
    pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=like.device)[:, None]
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=like.device)
    keys, start, new = torch.arange(longest + most, device=like.device), 0, []

    def attend(layer, q, k, v):
        end = start + q.shape[1]
        cache[0, layer, :, start:end], cache[1, layer, :, start:end] = k, v
        at = keys[start:end, None]
        # A padded query sees all keys, so that no row of the softmax is empty; nobody reads its output.
        keep = ((keys[:end] >= pads)[:, None] & (keys[:end] <= at)) | (at < pads[:, None])
        q, k, v = (x.transpose(1, 2) for x in (q, cache[0, layer, :, :end], cache[1, layer, :, :end]))
        o = F.scaled_dot_product_attention(q, k, v, keep[:, None], enable_gqa=q.shape[1] != k.shape[1])
        return o.transpose(1, 2)

    for _ in range(most):
        positions = (keys[start : start + ids.shape[1]] - pads).clamp(min=0)
        hidden = model.hidden(ids, positions, attend)
        start += ids.shape[1]
        ids = model.lm_head(hidden[:, -1:]).argmax(-1)
        new.append(ids)
    return torch.cat(new, 1).tolist(), cache.nbytes, len(prompts) * start


# ---- measuring


def serve(model, prompts, lengths, *, clock=time.process_time, **settings):
    """Serve all prompts with an Engine and note what happened. clock: default CPU seconds of this process.

    Returns (new tokens of each, {"passes", "tokens computed", "peak pages", "peak KV bytes", "seconds", ...}).
    """
    engine = Engine(model, **settings)
    page_bytes = sum(x[:1].nbytes for pair in engine.pages for x in pair)
    passes, computed, peak, rows, start = 0, 0, 0, 0, clock()
    ids = [engine.add(prompt, n, stop=()) for prompt, n in zip(prompts, lengths)]
    times = {id: [] for id in ids}
    while True:
        new, now = engine.step(), clock() - start
        if not engine.batch:
            break
        for id in new:
            times[id].append(now)
        passes += 1
        computed += engine.batch.num_tokens
        rows += len(engine.batch.prefill) + len(engine.batch.decode)
        peak = max(peak, engine.scheduler.pages_used)
    seconds = clock() - start
    gaps = np.concatenate([np.diff(t) for t in times.values()])
    figures = {
        "passes": passes, "tokens computed": computed, "peak pages": peak, "peak KV bytes": peak * page_bytes,
        "rows a pass": rows / passes, "preemptions": sum(map(engine.scheduler.preemptions, ids)),
        "seconds": seconds, "TTFT p50": float(np.median([t[0] for t in times.values()])),
        "gap p99": float(np.percentile(gaps, 99)), "gap max": float(gaps.max()),
    }  # fmt: skip
    return [engine.pop(id) for id in ids], figures


# One technique more a rung. The memory is the same for all: 192 pages of 16 tokens, 24 MiB of keys and values in the
# lab's model. Without paging a request takes max_len tokens of it, so twelve fit.
MEMORY = dict(num_pages=192, page_size=16)
MAX_LEN = 256
RESERVED = dict(reserve="max", max_len=MAX_LEN, max_batch=12, max_tokens=2048)
LADDER = {
    "one at a time": dict(policy="continuous", reserve="max", max_len=MAX_LEN, max_batch=1, max_tokens=2048),
    "static, padded": None,  # `padded`, not the engine
    "static, ragged": dict(policy="static", **RESERVED),
    "continuous": dict(policy="continuous", **RESERVED),
    "+ pages": dict(policy="continuous", max_batch=64, max_tokens=2048, prefix_caching=False),
    "+ prefix caching": dict(policy="continuous", max_batch=64, max_tokens=2048),
    "+ chunked prefill": dict(policy="chunked", max_batch=64, max_tokens=128),
}
COUNTS = ("passes", "tokens computed", "peak pages", "preemptions")  # what does not depend on the machine


def rung(model, name, prompts, lengths):
    """One rung of LADDER: (new tokens of each, figures). The padded one has no times of single tokens."""
    if LADDER[name] is not None:
        return serve(model, prompts, lengths, **MEMORY, **LADDER[name])
    start = time.process_time()
    texts, peak, passes, computed = padded(
        model, prompts, lengths, MEMORY["num_pages"] * MEMORY["page_size"] // MAX_LEN
    )
    seconds = time.process_time() - start
    return texts, {"passes": passes, "tokens computed": computed, "peak KV bytes": peak, "seconds": seconds}


def ladder(seed, count=96):
    """{rung: figures} on the workload with shared beginnings. Raises if a rung writes anything else than the first."""
    model, (prompts, lengths) = models.load(models.TEACHER)[0], workload(count, shared=True, seed=seed)
    result, first = {}, None
    for name in LADDER:
        texts, figures = rung(model, name, prompts, lengths)
        first = first or texts
        same = sum(a == b for a, b in zip(texts, first))
        result[name] = figures | {"tokens": sum(map(len, texts)), "requests": len(texts), "texts as the first": same}
    return result


# ---- transformers

BATCHES = (8, 16, 32, 64)


@torch.inference_mode()
def transformers_generate(hf, prompts, lengths, batch):
    """`generate` of transformers as its users run it: static batches in order of arrival, left padding, KV cache.

    A batch runs until its longest output is done; every request keeps its own number of tokens. Returns (new tokens of
    each, peak bytes of the cache).
    """
    texts, peak = [], 0
    for first in range(0, len(prompts), batch):
        part, outs = prompts[first : first + batch], lengths[first : first + batch]
        longest, most = max(map(len, part)), max(outs)
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in part], device=hf.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part], device=hf.device)
        done = hf.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False, use_cache=True, pad_token_id=0,
            eos_token_id=None, return_dict_in_generate=True,
        )  # fmt: skip
        texts += [row[longest : longest + n] for row, n in zip(done.sequences.tolist(), outs)]
        peak = max(peak, sum(x.nbytes for layer in done.past_key_values.layers for x in (layer.keys, layer.values)))
    return texts, peak


def against_transformers(seed, count=96, *, device="cpu", batches=BATCHES, ops=None, repeats=2):
    """The engine and `generate` of transformers on the same weights (fp32), prompts, lengths, device and threads.

    Nothing is shared between the prompts. The engine's pool of 224 pages of 16 tokens is what 16 rows of `generate`
    take. Of `repeats` runs, interleaved, the fastest of each counts. "seconds": the process's CPU time on a CPU (of one
    thread: the time that it would take on an idle machine), wall time on a GPU; "wall" always. {"transformers": None}
    without the package.
    """
    model, (prompts, lengths) = models.load(models.TEACHER, device=device)[0], workload(count, seed=seed)
    clock = time.perf_counter if device == "cuda" else time.process_time
    settings = dict(num_pages=224, page_size=16, max_batch=64, max_tokens=256) | ({"ops": ops} if ops else {})

    def ours():
        return serve(model, prompts, lengths, clock=clock, **settings)

    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        hf = AutoModelForCausalLM.from_pretrained(models.TEACHER, dtype=torch.float32, attn_implementation="sdpa")
        runs = {batch: lambda b=batch: transformers_generate(hf, prompts, lengths, b) for batch in batches}
        hf = hf.eval().to(device)
        transformers_generate(hf, prompts[:2], [2, 2], 2)  # warm
    except ImportError:
        runs = {}
    serve(model, prompts[:2], [2, 2], **settings)
    times, results, tokens = {}, {}, sum(lengths)
    for _ in range(repeats):
        for name, run in {"engine": ours, **runs}.items():
            start, wall = clock(), time.perf_counter()
            results[name] = run()
            times.setdefault(name, []).append((clock() - start, time.perf_counter() - wall))

    def rates(name):
        seconds, wall = zip(*times[name])
        return {"seconds": seconds, "wall": wall, "tokens/s": tokens / min(seconds)}

    texts, figures = results["engine"]
    pool = figures["peak KV bytes"] // figures["peak pages"] * settings["num_pages"]
    engine = rates("engine") | {"figures": figures, "pool bytes": pool}
    others = {}
    for batch in runs:
        same = sum(a == b for a, b in zip(results[batch][0], texts))
        others[str(batch)] = rates(batch) | {"peak KV bytes": results[batch][1], "same texts": same}
    return {
        "requests": count,
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "engine": engine,
        "transformers": others or None,
    }


def study(seed) -> dict:
    """The experiment: both comparisons at full size, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"transformers": against_transformers(seed), "ladder": ladder(seed)}
    finally:
        torch.set_num_threads(threads)
