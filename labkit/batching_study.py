"""The studies of chapter 09: what scheduling and memory bring on published workloads, and a real model under each
policy."""

import time

import torch

from labkit import player
from labkit.model import Config, Llama
from labkit.paged_attention import pad_tables, write_kv
from labkit.record import Experiment
from labkit.scheduler import Batch, Request, Scheduler
from labkit.simulate import TOY, RooflineCost, anyscale, long_prompts, orca, simulate

# ---- published figures, not reproduced here

# Anyscale's blog (Daniel et al., 2023): OPT-13B on one A100-40G, against Hugging Face's static batching.
PUBLISHED_SPEED_UP = {
    "static, a faster engine (FasterTransformer)": 4,
    "continuous (TGI, Ray Serve)": 8,
    "continuous and paged (vLLM)": 23,
}
# Orca (OSDI 2022): GPT-3 175B on 16 A100-40G, requests a second at a median of 190 ms a token.
PUBLISHED_ORCA = {"FasterTransformer": 0.185, "Orca": 6.81}

# The same model and GPU: 26 GB of weights leave room for 15.7K tokens of 800 KB (vLLM's Table 1). Datasheet peaks.
OPT_13B = dict(num_pages=981, page_size=16)
A100_OPT_13B = RooflineCost(num_params=13e9, kv_bytes=2 * 2 * 40 * 5120, bandwidth=1.555e12, flops=312e12)
COSTS = {"toy constants": TOY, "A100 roofline": A100_OPT_13B}

# One step at a time from what static batching does to what vLLM and Sarathi do.
LADDER = {
    "static, batch 8": ("static", dict(max_batch=8, max_tokens=4096, reserve="max")),
    "continuous, batch 8": ("continuous", dict(max_batch=8, max_tokens=4096, reserve="max")),
    "continuous, all that fit": ("continuous", dict(max_batch=256, max_tokens=4096, reserve="max")),
    "continuous, paged": ("continuous", dict(max_batch=256, max_tokens=4096)),
    "chunked 512, paged": ("chunked", dict(max_batch=256, max_tokens=512)),
}
CAPS = (32, 128, 512, 1536)


def ladder(cap, count=1000, *, cost=TOY, seed=0) -> dict[str, dict]:
    """Anyscale's workload with this cap under every rung of LADDER: {rung: summary}."""
    requests = anyscale(cap, count, seed=seed)
    return {
        rung: simulate(requests, policy, cost, **OPT_13B, **options).summary()
        for rung, (policy, options) in LADDER.items()
    }


RATES = (0.5, 1.0, 2.0, 4.0, 8.0)
SERVED = {name: LADDER[name] for name in ("static, batch 8", "continuous, batch 8", "continuous, paged")} | {
    "dynamic, batch 8": ("dynamic", dict(max_batch=8, max_tokens=4096, reserve="max", window=1.0))
}


def rate_sweep(count=400, *, rates=RATES, cost=TOY, seed=0) -> dict[str, dict[float, dict]]:
    """Orca's trace in shape over the request rate: {policy: {rate: summary}}."""
    return {
        name: {r: simulate(orca(r, count, seed=seed), policy, cost, **OPT_13B, **options).summary() for r in rates}
        for name, (policy, options) in SERVED.items()
    }


STALLS = {
    "whole prompts": ("continuous", dict(max_tokens=8192)),
    "whole prompts beside decodes": ("continuous", dict(max_tokens=8192, mixed=True)),
    "chunks, 2048 tokens a step": ("chunked", dict(max_tokens=2048)),
    "chunks, 512 tokens a step": ("chunked", dict(max_tokens=512)),
    "chunks, 256 tokens a step": ("chunked", dict(max_tokens=256)),
}


def stalls(rate=2.0, count=150, *, cost=TOY, seed=0):
    """Long prompts among decodes: {setting: Trace}."""
    requests, memory = long_prompts(rate, count, seed=seed), dict(num_pages=8192, page_size=16, max_batch=128)
    return {name: simulate(requests, p, cost, **memory, **options) for name, (p, options) in STALLS.items()}


def study(seed) -> dict:
    """Everything above at full size, under both costs, and 100,000 requests in one simulation."""
    result = {}
    for name, cost in COSTS.items():
        result[name] = {
            "anyscale": {str(cap): ladder(cap, cost=cost, seed=seed) for cap in CAPS},
            "orca": {
                policy: {str(rate): summary for rate, summary in by_rate.items()}
                for policy, by_rate in rate_sweep(2000, cost=cost, seed=seed).items()
            },
            "stalls": {name: trace.summary() for name, trace in stalls(count=600, cost=cost, seed=seed).items()},
        }
    start = time.process_time()
    trace = simulate(orca(15.0, 100_000, seed=seed), "continuous", TOY, max_batch=256, max_tokens=4096, **OPT_13B)
    seconds = time.process_time() - start
    return result | {"100,000 requests": trace.summary() | {"steps": len(trace.steps), "CPU seconds": seconds}}


def experiments() -> dict[str, Experiment]:
    return {"batching": Experiment(study, seeds=(0,))}


# ---- a real model, one ragged step at a time


class ModelStep:
    """A model that computes the chunks of one step together: selective batching.

    Linear layers, norms and the MLP see all tokens as one row of N; attention sees them a sequence at a time.
    attend: `ragged_attention`, the reference or the kernel.
    """

    def __init__(self, model, num_pages, page_size, attend):
        self.model, self.attend, self.page_size = model, attend, page_size
        c, like = model.config, model.embed_tokens.weight
        shape = (c.num_hidden_layers, num_pages, page_size, c.num_key_value_heads, c.head_dim)
        self.k_pages, self.v_pages = (torch.full(shape, float("nan"), dtype=like.dtype) for _ in "kv")

    @torch.no_grad()
    def __call__(self, chunks):
        """chunks: (table, start, ids) of each sequence, table a list of pages. Returns the last logits [B, vocab]."""
        ints = torch.int32
        ends = torch.tensor([len(ids) for _, _, ids in chunks]).cumsum(0)
        q_starts = torch.cat([torch.zeros(1, dtype=ints), ends.to(ints)])
        kv_lens = torch.tensor([start + len(ids) for _, start, ids in chunks], dtype=ints)
        table = pad_tables([table for table, _, _ in chunks])
        positions = [start + i for _, start, ids in chunks for i in range(len(ids))]
        rows = [t for t, _, ids in chunks for _ in ids]
        size = self.page_size
        slots = torch.tensor([t[p // size] * size + p % size for t, p in zip(rows, positions)])

        def attend(layer, q, k, v):  # [1, N, H, D]
            k_pages, v_pages = self.k_pages[layer], self.v_pages[layer]
            write_kv(k[0], v[0], k_pages, v_pages, slots)
            return self.attend(q[0], k_pages, v_pages, table, q_starts, kv_lens)[None]

        ids = torch.tensor([[id for _, _, ids in chunks for id in ids]])
        hidden = self.model.hidden(ids, torch.tensor(positions), attend)
        return self.model.lm_head(hidden[0, ends - 1])


def generate(step, prompts, max_new_tokens, policy, **memory) -> tuple[list[list[int]], int]:
    """Greedy decoding of all prompts under a policy, on the real scheduler. Returns (new tokens of each, steps)."""
    tokens = {i: list(prompt) for i, prompt in enumerate(prompts)}
    scheduler = Scheduler(policy, **memory, tokens=tokens.__getitem__)
    for i, prompt in enumerate(prompts):
        scheduler.add(Request(i, 0.0, len(prompt), max_new_tokens[i]))
    steps = 0
    while batch := scheduler.step():
        where = {id: (start, n) for id, start, n in batch.prefill}
        where |= {id: (len(tokens[id]) - 1, 1) for id in batch.decode}
        chunks = [(scheduler.pool.table(id), s, tokens[id][s : s + n]) for id, (s, n) in where.items()]
        best = step(chunks).argmax(-1).tolist()
        for id, token in zip(where, best):
            if id in batch.ending or id in batch.decode:
                tokens[id].append(token)
        steps += 1
    return [tokens[i][len(prompt) :] for i, prompt in enumerate(prompts)], steps


def small_model(seed=0, dtype=torch.float32, hidden=256, layers=4):
    """Of the size of the lab's own model, with random weights: a step takes as long."""
    torch.manual_seed(seed)
    config = Config(
        vocab_size=258, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, head_dim=32,
    )  # fmt: skip
    return Llama(config).to(dtype).eval()


def measure_steps(step, shapes, repeats=3) -> list[tuple[int, int, float]]:
    """Time steps of (decodes, kv_len, chunk): (tokens, kv_tokens, least seconds of `repeats`) each, for `fit_cost`."""
    samples, size = [], step.page_size
    for decodes, kv_len, chunk in shapes:
        per = -(-max(kv_len, chunk) // size)
        chunks = [(list(range(b * per, (b + 1) * per)), kv_len - 1, [1]) for b in range(decodes)]
        chunks += [(list(range(decodes * per, (decodes + 1) * per)), 0, [1] * chunk)] if chunk else []
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            step(chunks)
            seconds.append(time.perf_counter() - start)
        samples.append((decodes + chunk, decodes * kv_len + chunk, min(seconds)))
    return samples


# ---- the player

PLAYED_SIZES = {"A": (5, 9), "B": (3, 2), "C": (7, 6), "D": (4, 8), "E": (6, 3), "F": (2, 5)}  # prompt, output
PLAYED = [Request(name, 0.0, prompt, output) for name, (prompt, output) in PLAYED_SIZES.items()]
PLAYED_POLICIES = {
    "static": dict(policy="static", reserve="max"),
    "continuous, reserved": dict(policy="continuous", reserve="max"),
    "continuous, paged": dict(policy="continuous", watermark=0),
    "chunked, paged": dict(policy="chunked", watermark=0),
}


def watch(requests, **settings) -> list[dict]:
    """Run a Scheduler and note after every step: its batch, who holds which page, and the state of every request."""
    s, seen = Scheduler(**settings), []
    for request in requests:
        s.add(request)
    while batch := s.step():
        owner = {page: id for id in s.pool.seq_ids for page in s.pool.table(id)}
        seen.append({
            "batch": batch, "owner": owner, "waiting": len(s.waiting), "finished": set(s.finished),
            "tokens": sum(s.generated(r.id) for r in requests),
        })  # fmt: skip
    return seen


def batching_player(requests=PLAYED, num_pages=7, page_size=4, max_batch=3, max_tokens=8) -> player.Explorer:
    """Requests over iterations under each policy, and below what the pages and the batch hold. All of it from the
    scheduler at work."""
    settings = dict(num_pages=num_pages, page_size=page_size, max_batch=max_batch, max_tokens=max_tokens)
    runs = {name: watch(requests, **settings, **options) for name, options in PLAYED_POLICIES.items()}
    longest, names = max(map(len, runs.values())), [r.id for r in requests]

    def cells(seen, until):
        rows = {name: [None] * longest for name in names}
        for i, step in enumerate(seen[:until]):
            batch = step["batch"]
            for id, _, n in batch.prefill:
                rows[id][i] = ("orange", str(n))
            for id in batch.decode:
                rows[id][i] = "blue"
            for id in batch.preempted:
                rows[id][i] = ("purple", "!")
            for id in names:
                if rows[id][i] is None and id not in step["finished"]:
                    rows[id][i] = "outline"
        return list(rows.values())

    def frame(policy, iteration):
        seen = runs[policy]
        if iteration <= len(seen):
            step = seen[iteration - 1]
        else:  # the run is over: nothing is computed and every page is free
            step = seen[-1] | {"batch": Batch(), "owner": {}}
        batch = step["batch"]
        pages = [("green", step["owner"][p]) if p in step["owner"] else "muted" for p in range(num_pages)]
        if iteration > len(seen):
            text = f"{policy}: all done after {len(seen)} iterations."
        else:
            doing = [f"{id} prefills {n}" for id, _, n in batch.prefill] + [f"{id} decodes" for id in batch.decode]
            doing += [f"{id} is preempted" for id in batch.preempted]
            text = f"Iteration {iteration}: {', '.join(doing)}."
            text += f" {batch.padding} row{'s' * (batch.padding > 1)} of padding computed." if batch.padding else ""
        rows = len(batch.prefill) + len(batch.decode)
        values = {
            "in the batch": f"{rows} of {max_batch}", "tokens computed": batch.num_tokens,
            "pages used": f"{len(step['owner'])} of {num_pages}", "waiting": step["waiting"],
            "finished": len(step["finished"]), "tokens generated": step["tokens"],
        }  # fmt: skip
        return {"text": text, "time": cells(seen, iteration), "pages": [pages], "state": values}

    panels = {
        "time": player.Grid(
            len(names), longest, row_labels=names, col_labels=range(1, longest + 1), name="requests over iterations"
        ),
        "pages": player.Grid(1, num_pages, name="the pages, and whose they are"),
        "state": player.Values(list(frame("static", 1)["state"])),
    }
    legend = {"orange": "prefill (tokens)", "blue": "decode", "purple": "preempted", "outline": "waits"}
    legend |= {"green": "page in use", "muted": "free"}
    limits = f"at most {max_batch} requests and {max_tokens} tokens a step"
    caption = f"Six requests, {num_pages} pages of {page_size} tokens; {limits}. "
    caption += "Compare static and continuous at iteration 9."
    controls = {"policy": list(runs), "iteration": list(range(1, longest + 1))}
    key = ("continuous, paged", len(runs["continuous, paged"]))
    return player.Explorer(
        "Who runs when?", controls, panels, frame, legend=legend, caption=caption, start=("static", 9), key=key
    )


def try_policy(policy, max_batch, num_pages):
    """Run the player's requests under a setting of your own and say what came of it. The live cell's callback."""
    options = PLAYED_POLICIES[policy]
    seen = watch(PLAYED, **dict(num_pages=num_pages, page_size=4, max_batch=max_batch, max_tokens=8) | options)
    preempted = sum(len(step["batch"].preempted) for step in seen)
    if not seen:
        return f"{policy}: every request was refused, {num_pages} pages can hold none of them."
    tokens, done = seen[-1]["tokens"], len(seen[-1]["finished"])
    done = f"{done} of {len(PLAYED)} finished"
    return f"{policy}: {tokens} tokens in {len(seen)} iterations, {done}, {preempted} preemptions."
