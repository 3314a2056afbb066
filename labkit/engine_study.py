"""The studies of chapter 10: the engine against `transformers`, and what each technique contributes."""

import time
from html import escape
from string import ascii_uppercase

import numpy as np
import torch
import torch.nn.functional as F

from labkit import codegen, corpus, player
from labkit import model as models
from labkit.engine import Engine
from labkit.simulate import capped_exponential

WEIGHTS = models.TEACHER / "model.safetensors"

# ---- published figures, not reproduced here

# nano-vllm's README: one RTX 4070 Laptop (8 GB), Qwen3-0.6B, 256 sequences, prompts and outputs of 100 to 1,024
# tokens, drawn at random, 133,966 output tokens. Tokens/s.
PUBLISHED_NANO_VLLM = {"vLLM": 1361.84, "nano-vllm": 1434.13}

# ---- the workload


# Prompts from and to, uniform; outputs: mean and cap. "chat" has about the proportion of the ShareGPT data in vLLM's
# paper (161 tokens in, 338 out), in a model of 256 positions.
WORKLOADS = {"chat": (8, 56, 64, 192), "long prompts": (16, 96, 32, 128), "shared": (16, 64, 32, 128)}


def workload(count=192, kind="chat", *, seed=0):
    """Ragged requests, all there at once: (prompts, output lengths).

    Prompts are pieces of the held-out text after BOS; "shared": after one of four pieces of 64 bytes that many have in
    common. Outputs: exponential, drawn again above the cap, the shape of Anyscale's benchmark (chapter 9).
    """
    rng, text = np.random.default_rng(seed), corpus.read("held_out").tolist()
    shortest, longest, mean, cap = WORKLOADS[kind]

    def piece(length):
        start = int(rng.integers(0, len(text) - length))
        return text[start : start + length]

    common = [[corpus.BOS, *piece(63)] for _ in range(4)] if kind == "shared" else [[corpus.BOS]]
    sizes = rng.integers(shortest, longest + 1, count)
    prompts = [common[rng.integers(len(common))] + piece(int(size)) for size in sizes]
    return prompts, capped_exponential(rng, count, mean, cap).tolist()


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
    """{rung: figures} on the workload with shared beginnings; "texts as the first": how many equal the first rung's."""
    model, (prompts, lengths) = models.load(models.TEACHER)[0], workload(count, "shared", seed=seed)
    result, first = {}, None
    for name in LADDER:
        texts, figures = rung(model, name, prompts, lengths)
        first = first or texts
        same = sum(a == b for a, b in zip(texts, first))
        result[name] = figures | {"tokens": sum(map(len, texts)), "requests": len(texts), "texts as the first": same}
    return result


# ---- transformers

BATCHES = (16, 32, 64)


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


def against_transformers(seed, count=192, kind="chat", *, device="cpu", batches=BATCHES, ops=None, repeats=1):
    """The engine and `generate` of transformers on the same weights (fp32), prompts, lengths, device and threads.

    Nothing is shared between the prompts. The engine's pool is 896 pages of 16 tokens, less memory than `generate`
    takes for batches of 64; as many requests run as find room in it. The engine runs before each of the others, so that
    both meet the same neighbours; "tokens/s" is over all runs. "seconds": the process's CPU time on a CPU (of one
    thread), wall time on a GPU; "wall" always. {"transformers": None} without the package.
    """
    model, (prompts, lengths) = models.load(models.TEACHER, device=device)[0], workload(count, kind, seed=seed)
    clock = time.perf_counter if device == "cuda" else time.process_time
    settings = dict(num_pages=896, page_size=16, max_batch=192, max_tokens=256) | ({"ops": ops} if ops else {})

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
        for name in [name for other in runs for name in ("engine", other)] or ["engine"]:
            start, wall = clock(), time.perf_counter()
            results[name] = runs[name]() if name in runs else ours()
            times.setdefault(name, []).append((clock() - start, time.perf_counter() - wall))

    def rates(name):
        seconds, wall = zip(*times[name])
        return {"seconds": seconds, "wall": wall, "tokens/s": tokens * len(seconds) / sum(seconds)}

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
    """The experiment: all comparisons at full size, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            "transformers": against_transformers(seed),
            "long prompts": against_transformers(seed, 96, "long prompts", batches=(64,)),
            "ladder": ladder(seed),
        }
    finally:
        torch.set_num_threads(threads)


# ---- seen at work

PLAYED_PROMPTS = (
    "def __init__(self, name, value",
    "def __init__(self, name=None",
    "    for i in range(",
    "class Error(Exc",
    "    return self.",
)
PLAYED_LENGTHS = (18, 10, 24, 12, 14)
PLAYED = dict(num_pages=12, page_size=8, max_batch=4, max_tokens=24, watermark=0.0)


def watch(prompts, lengths, settings, *, sampling=None, loaded=None):
    """Serve texts and yield after every step, and once more when all is done, what is to be seen: a dict of

    batch; letters: {id: letter}; owners: {page: letters of its holders}; cached: pages that can be found; states and
    texts: {letter: ...}. loaded: what `labkit.model.load` returns; default: it is called.
    """
    model, encode, decode = loaded or models.load()
    engine = Engine(model, **settings)
    ids = [engine.add(encode(prompt), n, **sampling or {}) for prompt, n in zip(prompts, lengths)]
    letters = dict(zip(ids, ascii_uppercase))
    while True:
        engine.step()
        pool, owners = engine.scheduler.pool, {}
        for id in pool.seq_ids:
            for page in pool.table(id):
                owners[page] = owners.get(page, "") + letters[id]
        yield {
            "batch": engine.batch, "letters": letters, "owners": owners, "cached": pool.cached_pages,
            "states": {letters[id]: engine.state(id) for id in ids},
            "texts": {letters[id]: decode(engine.output(id)) for id in ids},
        }  # fmt: skip
        if not engine.batch:
            return


def describe(step) -> str:
    """What a step did, in words."""
    batch, letters = step["batch"], step["letters"]
    if not batch:
        return "Nothing is left to compute, and every page is free."
    doing = [f"{letters[id]} computes {n} tokens of its prompt" for id, _, n in batch.prefill]
    if batch.decode:
        names = ", ".join(letters[id] for id in batch.decode)
        doing.append(f"{names} decode" + "s" * (len(batch.decode) == 1))
    preempted = [f" {letters[id]} was preempted." for id in batch.preempted]
    return "; ".join(doing) + "." + "".join(preempted)


def engine_player() -> player.Stepper:
    """Five requests over twelve pages, on the lab's own model: who holds which page, and the texts as they grow."""
    steps, num_pages = [], PLAYED["num_pages"]
    names = list(ascii_uppercase[: len(PLAYED_PROMPTS)])
    played = list(watch(PLAYED_PROMPTS, PLAYED_LENGTHS, PLAYED, loaded=models.load(models.TEACHER)))
    for number, seen in enumerate(played, 1):
        cells = []
        for page in range(num_pages):
            who = seen["owners"].get(page, "")
            color = "purple" if len(who) > 1 else "green" if who else "sky" if page in seen["cached"] else "muted"
            cells.append((color, who))
        rows = [cells[i : i + 6] for i in range(0, num_pages, 6)]
        texts = {name: [seen["states"][name], seen["texts"][name].replace("\n", "\u21b5")] for name in names}
        steps.append({"text": f"Step {number}: {describe(seen)}", "pages": rows, "texts": texts})
    panels = {
        "pages": player.Grid(num_pages // 6, 6, name="pages, and who holds them"),
        "texts": player.Values(names, ["state", "text"], prose=["text"], name="requests"),
    }
    legend = {"green": "held by one", "purple": "shared", "sky": "free, but can be found", "muted": "free"}
    caption = "A run of the engine: pages of 8 tokens, at most 4 requests and 24 tokens a step, chunked prefill."
    key = max(range(len(played)), key=lambda i: len(played[i]["batch"].preempted))  # where somebody has to give way
    return player.Stepper("Five requests, twelve pages", panels, steps, legend=legend, caption=caption, key=key)


def picture(step, num_pages) -> str:
    """A step as plain text: the pages, then the requests."""
    held, cached = step["owners"], step["cached"]
    pages = " ".join(f"{held.get(page, '-' if page in cached else '.'):2}" for page in range(num_pages))
    lines = [f"{name} {step['states'][name]:10} {text!r}" for name, text in step["texts"].items()]
    return "\n".join([pages, describe(step), *lines])


def live_demo(max_new_tokens=40):
    """ipywidgets: type prompts, one a line, and see all of them stream while the pages change hands."""
    import ipywidgets

    prompts = ipywidgets.Textarea("\n".join(PLAYED_PROMPTS[:3]), description="prompts")
    pages = ipywidgets.IntSlider(20, 12, 60, description="pages")
    temperature = ipywidgets.FloatSlider(0.0, min=0.0, max=1.5, step=0.1, description="temperature")
    button, view = ipywidgets.Button(description="Serve"), ipywidgets.HTML()

    def serve(_):
        texts = [line for line in prompts.value.splitlines() if line][:26]
        settings = PLAYED | {"num_pages": pages.value}
        sampling = {"temperature": temperature.value}
        try:
            for step in watch(texts, [max_new_tokens] * len(texts), settings, sampling=sampling):
                view.value = f"<pre>{escape(picture(step, pages.value))}</pre>"
        except ValueError as error:  # a prompt that is too long for the pool
            view.value = f"<pre>{escape(str(error))}</pre>"

    button.on_click(serve)
    return ipywidgets.VBox([prompts, pages, temperature, button, view])


# ---- what the compiler makes of it


def cases_to_compile():
    """What a step of the lab's model launches in bf16: 8 heads of 32, pages of 16.

    Tiles of 32 numbers a row are too small to give every thread 16 bytes: narrow loads are allowed.
    """
    q, kv = codegen.Tensor((70, 8, 32), "bfloat16"), codegen.Tensor((64, 16, 8, 32), "bfloat16")
    tables = dict(block_table=codegen.Tensor((8, 16), "int32", 1), kv_lens=codegen.Tensor((8,), "int32", 100))
    starts = codegen.Tensor((9,), "int32", [*range(8), 70])
    new, slots = codegen.Tensor((70, 8, 32), "bfloat16"), codegen.Tensor((70,), "int64", list(range(70)))
    pages, one = dict(k_pages=kv, v_pages=kv), codegen.Tensor((8, 8, 32), "bfloat16")

    def case(function, name, arguments, kernel, matrix=True):
        return codegen.Case(f"kernels.engine:{function}", name, arguments, (kernel,) * matrix, (kernel,))

    mixed = dict(q=q, **pages, **tables, q_starts=starts)
    return [
        case("ragged_attention", "7 decodes and a chunk", mixed, "_ragged_kernel"),
        case("paged_decoding", "8 decodes", dict(q=one, **pages, **tables), "_paged_split_kernel"),
        case("write_kv", "70 tokens", dict(k=new, v=new, **pages, slots=slots), "_write_kv_kernel", False),
    ]
