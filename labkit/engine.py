"""A small inference engine: paged KV, prefix caching, continuous batching with chunked prefill, sampling, streaming.

    engine = Engine(model, num_pages=256)
    outputs = engine.generate(prompts, max_new_tokens=64)           # all of them, batched as they fit
    for token in engine.stream(prompt, 64, temperature=0.8): ...    # as they come; leaving the loop cancels
    id = engine.add(prompt, 64); engine.step(); engine.cancel(id)   # what both are made of

What runs next is the scheduler's decision (chapter 9), where keys and values lie is its pool's (chapter 8). The engine
gathers the tokens of a step into one row, runs the model over it once, and draws one token for every sequence whose
last known token was in it.
"""

import math
import os
import time
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import numpy as np
import torch

from labkit import torch_ops
from labkit.args import expect
from labkit.decode_graphs import DecodeGraphs
from labkit.record import Experiment
from labkit.scheduler import Request, Scheduler

# ---- sampling


def sample(logits, temperature, top_k, top_p, u):
    """Draw a token for each row. logits [B, V]; the others [B]; u: uniform numbers in [0, 1). Returns ids [B] int64.

    softmax(logits / temperature), of it the top_k most likely tokens, of those the fewest that reach top_p together
    (Holtzman et al. 2020), drawn by inverting the distribution function at u. temperature 0 takes the most likely.
    """
    warm = temperature > 0
    x = logits.double() - logits.amax(-1, keepdim=True).double()  # a tiny temperature: no overflow to inf - inf
    p = (x / torch.where(warm, temperature, 1.0).double()[:, None]).softmax(-1)
    p, ids = p.sort(dim=-1, descending=True, stable=True)
    p = p * (torch.arange(p.shape[1], device=p.device) < top_k[:, None])
    p = p / p.sum(-1, keepdim=True)
    p = p * (p.cumsum(-1) - p < top_p[:, None])  # what the more likely ones reach without it
    reached = p.cumsum(-1)
    drawn = (reached <= u[:, None] * reached[:, -1:]).sum(-1)
    drawn = torch.minimum(drawn, (p > 0).sum(-1) - 1)  # u * total may round up to total
    return torch.where(warm, ids.gather(1, drawn[:, None])[:, 0], logits.argmax(-1))


def uniform(seed, position) -> float:
    """The random number of a request's token at this position: a function of the two, whoever else is in the batch.

    So a request that was preempted, or served on another day, draws the same. Philox (Salmon et al. 2011).
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=[position, 0, 0, 0])).random()


# ---- the engine


@dataclass(slots=True)
class _Job:
    """A request: tokens, the prompt first, and how to go on from there."""

    tokens: list[int]
    prompt_len: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: frozenset


class Engine:
    """Serves requests with `model` (labkit.model.Llama) out of num_pages pages of page_size tokens.

    max_batch: requests that run at the same time. max_tokens: tokens a step. policy: a policy of the Scheduler;
    **scheduling: its other settings (reserve, watermark, mixed, window, max_len). prefix_caching: prompts that begin
    alike share pages; under reserve="paged" only.

    ops: a namespace with write_kv and ragged_attention, e.g. kernels.engine; by default torch's own operations. If it
    has them too, `plan` (see labkit.torch_ops) is called once a step instead of both, `paged_decoding` where a step
    only decodes, and add_rmsnorm, rope and swiglu stand in for the model's.
    cuda_graphs: record decode steps and replay them; default: on a GPU, with ops that have paged_decoding. Needs
    max_len, which says how wide a block table is; default then: the model's max_position_embeddings.

    step() takes the time of one pass through the model. Not for several threads at once. A request of which all is
    over and read is dropped by `pop`; `generate` and `stream` do so themselves.
    """

    def __init__(
        self, model, num_pages, page_size=16, max_batch=64, max_tokens=512, *, ops=torch_ops, policy="chunked",
        prefix_caching=True, cuda_graphs=None, max_len=None, **scheduling,
    ):  # fmt: skip
        for name in ("write_kv", "ragged_attention"):
            expect(callable(getattr(ops, name, None)), "ops", f"no {name}", "write_kv and ragged_attention in it")
        prefix_caching = prefix_caching and scheduling.get("reserve", "paged") == "paged"
        config, like = model.config, model.embed_tokens.weight
        able = like.is_cuda and hasattr(ops, "paged_decoding") and os.environ.get("LAB_CHECK") != "1"
        expect(able or not cuda_graphs, "cuda_graphs", True, "a GPU, ops with paged_decoding, and LAB_CHECK unset")
        graphs = able if cuda_graphs is None else cuda_graphs
        if graphs and max_len is None:
            max_len = config.max_position_embeddings
        self.scheduler = Scheduler(
            policy, num_pages, page_size, max_batch, max_tokens, max_len=max_len,
            tokens=self._tokens if prefix_caching else None, **scheduling,
        )  # fmt: skip
        self.model, self.ops, self.page_size = model, ops, page_size
        eos = config.eos_token_id
        self.stop = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
        self.pages = allocate_pages(model, num_pages, page_size)
        self._jobs: dict[int, _Job] = {}
        self._ids = count()
        self.batch = None  # what the last step computed
        self._graphs = DecodeGraphs(self._decode, max_batch, -(-max_len // page_size), like.device) if graphs else None

    # ---- requests come and go

    def add(self, prompt_ids, max_new_tokens, *, temperature=0.0, top_k=None, top_p=1.0, seed=None, stop=None) -> int:
        """Queue a request and return its id.

        temperature 0: greedy. top_k None: all tokens. seed: of the draws; default: the id. stop: token ids that end the
        text and are its last token; default: the model's EOS; () for none. Raises ValueError naming the argument, also
        if the request could never run in this engine; nothing is changed then.
        """
        return self._add(self._job(prompt_ids, temperature, top_k, top_p, seed, stop), max_new_tokens)

    def cancel(self, id) -> bool:
        """End a request now and free its pages. False if it was over already."""
        return self.scheduler.cancel(id)

    def state(self, id) -> str:
        """waiting, running, preempted, finished or cancelled."""
        return self.scheduler.state(id)

    def is_over(self, id) -> bool:
        return self.state(id) in ("finished", "cancelled")

    def finish_reason(self, id) -> str | None:
        """Why it is over: "stop" (its last token ends a text), "length" or "cancelled". None: it is not over."""
        state, job = self.state(id), self._jobs[id]
        if state != "finished":
            return state if state == "cancelled" else None
        return "stop" if job.tokens[-1] in job.stop else "length"

    def output(self, id) -> list[int]:
        """The tokens generated so far."""
        self.scheduler.state(id)  # raises for an unknown id
        return self._jobs[id].tokens[self._jobs[id].prompt_len :]

    def pop(self, id) -> list[int]:
        """The tokens of a request that is over, which is then forgotten."""
        output = self.output(id)
        self.scheduler.forget(id)
        del self._jobs[id]
        return output

    # ---- one step

    @torch.inference_mode()
    def step(self, now=None) -> dict[int, int]:
        """Run the model once. Returns the new token of every request that got one: {id: token}; {} if nothing runs.

        If the model raises, the requests of this step are cancelled and cached prefixes forgotten; the engine goes on.
        now: seconds on the clock of time.monotonic(), which is the default, for the policy "dynamic".
        """
        self.batch = batch = self.scheduler.step(time.monotonic() if now is None else now)
        if not batch:
            return {}
        rows = [(id, start, n) for id, start, n in batch.prefill]
        rows += [(id, len(self._jobs[id].tokens) - 1, 1) for id in batch.decode]
        rows.sort(key=lambda row: (row[2], row[1]))  # neighbours of about one length can be computed together
        ending = set(batch.ending).union(batch.decode)
        picked = [i for i, (id, _, _) in enumerate(rows) if id in ending]
        ids = [rows[i][0] for i in picked]
        try:
            logits = self._forward(rows, picked, only_decodes=not batch.prefill)
            new = dict(zip(ids, self._draw(ids, logits)))
        except BaseException:  # an interrupt too
            self.scheduler.abandon()
            raise
        for id, token in new.items():
            job = self._jobs[id]
            job.tokens.append(token)
            if token in job.stop:
                self.scheduler.stop(id)
        return new

    # ---- whole texts

    def generate(self, prompts, *, max_new_tokens, seed=0, **sampling) -> list[list[int]]:
        """The new tokens of every prompt. max_new_tokens: an int, or one a prompt. seed: prompt i draws with seed + i.

        **sampling: temperature, top_k, top_p, stop as for `add`. Raises ValueError before anything is computed.
        """
        prompts = list(prompts)
        expect(seed is None or _is_int(seed), "seed", repr(seed), "None or an int")
        seeds = [None if seed is None else seed + i for i in range(len(prompts))]
        jobs = [self._job(prompt, seed=s, **sampling) for prompt, s in zip(prompts, seeds)]
        many = isinstance(max_new_tokens, (list, tuple)) or getattr(max_new_tokens, "ndim", 0) == 1
        lengths = list(max_new_tokens) if many else [max_new_tokens] * len(jobs)  # `_request` names a bad one
        expect(len(lengths) == len(jobs), "max_new_tokens", f"{len(lengths)} numbers", f"one or {len(jobs)}")
        for job, length in zip(jobs, lengths):
            self._request(-1, job, length)
        ids = left = [self._add(job, length) for job, length in zip(jobs, lengths)]
        try:
            while left := [id for id in left if not self.is_over(id)]:
                self._step_or_wait()
            return [self.output(id) for id in ids]
        finally:
            self._drop(ids)

    def stream(self, prompt_ids, max_new_tokens, **sampling):
        """Queue a request as `add` does, now, and return an iterator over its tokens, each as soon as it is there.

        Whoever else is queued moves on with it: several streams may be read in turn. Closing it cancels the request.
        """
        stream = self._stream(self.add(prompt_ids, max_new_tokens, **sampling))
        next(stream)  # into its `try`
        return stream

    def _stream(self, id):
        given = 0
        try:
            yield
            while True:
                new = self.output(id)[given:]
                yield from new
                given += len(new)
                if not new and self.is_over(id):
                    return
                if not new:
                    self._step_or_wait()
        finally:
            self._drop([id])

    # ---- inside

    def _tokens(self, id):
        return self._jobs[id].tokens

    def _job(self, prompt_ids, temperature=0.0, top_k=None, top_p=1.0, seed=None, stop=None) -> _Job:
        vocab = self.model.config.vocab_size
        tokens = _ids("prompt_ids", prompt_ids, vocab)
        expect(len(tokens) > 0, "prompt_ids", "no token", "at least one")
        expect(_is_number(temperature) and temperature >= 0, "temperature", temperature, "a finite number >= 0")
        expect(top_k is None or (_is_int(top_k) and top_k >= 1), "top_k", top_k, "None or an int >= 1")
        expect(_is_number(top_p) and 0 < top_p <= 1, "top_p", top_p, "a number above 0, at most 1")
        expect(seed is None or (_is_int(seed) and 0 <= seed < 2**64), "seed", seed, "None or an int from 0 to 2^64 - 1")
        stop = self.stop if stop is None else frozenset(_ids("stop", stop, vocab))
        return _Job(tokens, len(tokens), float(temperature), top_k or vocab, float(top_p), seed, stop)

    def _request(self, id, job, max_new_tokens) -> Request:
        length = int(max_new_tokens) if _is_int(max_new_tokens) else max_new_tokens
        request = Request(id, time.monotonic(), job.prompt_len, length)
        most, got = self.model.config.max_position_embeddings, job.prompt_len + length
        expect(got <= most, "prompt_ids, max_new_tokens", f"{got} tokens", f"at most {most}, the model's")
        if not self.scheduler.fits(request):
            s, got = self.scheduler, f"{job.prompt_len} tokens and {max_new_tokens} to come"
            limit = f"what {s.pool.num_pages} pages of {self.page_size}, max_tokens {s.max_tokens} (unless chunked)"
            expect(False, "prompt_ids, max_new_tokens", got, f"{limit} and max_len {s.max_len} can hold")
        return request

    def _add(self, job, max_new_tokens) -> int:
        self._request(-1, job, max_new_tokens)  # before an id is spent
        id = next(self._ids)
        job.seed = id if job.seed is None else job.seed
        self._jobs[id] = job
        self.scheduler.add(self._request(id, job, max_new_tokens))
        return id

    def _drop(self, ids):
        for id in ids:
            self.cancel(id)
            self.pop(id)

    def _step_or_wait(self):
        self.step()
        if not self.batch:  # "dynamic" waits for more requests
            time.sleep(max(0.0, min(self.scheduler.wake - time.monotonic(), 1.0)))

    def _forward(self, rows, picked, only_decodes):
        """rows: (id, start, n), tokens [start, start + n) of each. Returns the logits after the picked ones [., V]."""
        size, device = self.page_size, self.model.embed_tokens.weight.device
        tables = [self.scheduler.pool.table(id) for id, _, _ in rows]
        table = np.zeros((len(rows), max(map(len, tables))), np.int32)
        ids, positions, slots = [], [], []
        for row, (id, start, n), pages in zip(table, rows, tables):
            row[: len(pages)] = pages
            ids += islice(self._jobs[id].tokens, start, start + n)
            positions += range(start, start + n)
            slots += [pages[p // size] * size + p % size for p in range(start, start + n)]
        q_starts = np.cumsum([0, *(n for _, _, n in rows)], dtype=np.int32)
        kv_lens = np.array([start + n for _, start, n in rows], np.int32)
        arrays = (np.array([ids, positions, slots]), table, q_starts, kv_lens)
        numbers, table, q_starts, kv_lens = (torch.from_numpy(x).to(device, non_blocking=True) for x in arrays)
        if only_decodes and self._graphs:
            return self._graphs(numbers, table, kv_lens)
        if only_decodes and hasattr(self.ops, "paged_decoding"):
            return self._decode(numbers, table, kv_lens)
        if hasattr(self.ops, "plan"):
            layer = self.ops.plan(table, q_starts, kv_lens, numbers[2], size)
        else:
            layer = partial(_ragged, self.ops, table, q_starts, kv_lens, numbers[2])
        hidden = self._hidden(numbers, layer)
        last = q_starts[1:].long()[torch.tensor(picked, dtype=torch.long, device=device)] - 1
        return self.model.lm_head(hidden[last])

    def _decode(self, numbers, table, kv_lens):
        """A step of decodes. numbers [3, B] int64: ids, positions, slots; table [B, max_pages]; kv_lens [B]."""
        return self.model.lm_head(self._hidden(numbers, partial(_decoding, self.ops, table, kv_lens, numbers[2])))

    def _hidden(self, numbers, layer):
        """All tokens of the step as one sequence: [N, hidden_size]."""
        ids, positions, _ = numbers

        def attend(i, q, k, v):  # [1, N, H, D]
            return layer(q[0], k[0], v[0], *self.pages[i])[None]

        if hasattr(self.ops, "add_rmsnorm"):
            return fused_hidden(self.model, self.ops, ids[None], positions, attend)[0]
        return self.model.hidden(ids[None], positions, attend)[0]

    def _draw(self, ids, logits) -> list[int]:
        jobs = [self._jobs[id] for id in ids]
        if not any(job.temperature for job in jobs):
            return logits.argmax(-1).tolist()
        draws = [uniform(job.seed, len(job.tokens)) if job.temperature else 0.0 for job in jobs]
        columns = zip(*((job.temperature, job.top_k, job.top_p, u) for job, u in zip(jobs, draws)))
        settings = (torch.tensor(x, dtype=torch.float64, device=logits.device) for x in columns)
        return sample(logits, *settings).tolist()


def allocate_pages(model, num_pages, page_size):
    """A pair (k_pages, v_pages) of [P, page_size, Hkv, D] for every layer, as wide as that layer's weights say.

    In memory a head's part of a page lies together. Zeros, so that the memory is taken now and not in the first steps.
    """
    pages, dim = [], model.config.head_dim
    for layer in model.layers:
        weight = layer.self_attn.k_proj.weight
        shape = (2, weight.shape[0] // dim, num_pages, page_size, dim)
        pages.append(torch.zeros(shape, dtype=weight.dtype, device=weight.device).permute(0, 2, 3, 1, 4).unbind())
    return pages


def _ragged(ops, table, q_starts, kv_lens, slots, q, k, v, k_pages, v_pages):
    ops.write_kv(k, v, k_pages, v_pages, slots)
    return ops.ragged_attention(q, k_pages, v_pages, table, q_starts, kv_lens)


def _decoding(ops, table, kv_lens, slots, q, k, v, k_pages, v_pages):
    ops.write_kv(k, v, k_pages, v_pages, slots)
    return ops.paged_decoding(q, k_pages, v_pages, table, kv_lens)[0]


def fused_hidden(model, ops, ids, positions, attend):
    """`model.hidden` with the fused operations of chapter 3: the residual is added where the next norm reads it."""
    cos, sin = model.angles(positions)
    x = model.embed_tokens(ids)
    residual = torch.zeros_like(x)
    for i, layer in enumerate(model.layers):
        norm, a, mlp = layer.input_layernorm, layer.self_attn, layer.mlp
        x, residual = ops.add_rmsnorm(x, residual, norm.weight, eps=norm.eps)
        q, k, v = (proj(x).unflatten(-1, (-1, a.head_dim)) for proj in (a.q_proj, a.k_proj, a.v_proj))
        q, k = ops.rope(a.q_norm(q), a.k_norm(k), cos, sin)
        x, norm = a.o_proj(attend(i, q, k, v).flatten(-2)), layer.post_attention_layernorm
        x, residual = ops.add_rmsnorm(x, residual, norm.weight, eps=norm.eps)
        x = mlp.down_proj(ops.swiglu(mlp.gate_proj(x), mlp.up_proj(x)))
    return ops.add_rmsnorm(x, residual, model.norm.weight, eps=model.norm.eps)[0]


def _ids(name, ids, vocab_size) -> list[int]:
    try:
        ids = list(ids.tolist() if hasattr(ids, "tolist") else ids)
    except TypeError:
        expect(False, name, type(ids).__name__, "a sequence of token ids")
    wrong = next((id for id in ids if not _is_int(id) or not 0 <= id < vocab_size), None)
    expect(wrong is None, name, repr(wrong), f"token ids from 0 to {vocab_size - 1}")
    return [int(id) for id in ids]


def _is_int(x) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


# The topic's studies import this file.


def experiments() -> dict[str, Experiment]:
    from labkit import engine_study

    return {"engine": Experiment(engine_study.study, seeds=(0, 1), weights=engine_study.WEIGHTS)}


def codegen_cases():
    from labkit import engine_study

    return engine_study.cases_to_compile()
