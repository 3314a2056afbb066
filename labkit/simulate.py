"""A serving system without a GPU: the real scheduler, and a cost model in place of the model.

`simulate` lets requests arrive, asks the scheduler what each step computes, and lets a cost model say how long that
takes. Everything else (who waits, who is preempted, which pages are used) is what an engine would do.
"""

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from labkit.args import expect
from labkit.scheduler import Batch, Request, Scheduler

# ---- what a step costs


@dataclass(frozen=True)
class LinearCost:
    """seconds = fixed + per_token * tokens through the model (padding too) + per_kv_token * keys read."""

    fixed: float
    per_token: float
    per_kv_token: float = 0.0

    def __call__(self, batch: Batch) -> float:
        tokens = batch.num_tokens + batch.padding
        return self.fixed + self.per_token * tokens + self.per_kv_token * batch.kv_tokens


@dataclass(frozen=True)
class RooflineCost:
    """The least time of a step on a GPU: weights are read while tokens are computed, then keys and values are read.

    num_params: weights, 2 bytes and 2 operations a token each. kv_bytes: of one token. bandwidth: bytes/s; flops: 1/s.
    """

    num_params: float
    kv_bytes: float
    bandwidth: float
    flops: float

    def __call__(self, batch: Batch) -> float:
        tokens = batch.num_tokens + batch.padding
        weights = max(2 * self.num_params / self.bandwidth, 2 * self.num_params * tokens / self.flops)
        return weights + batch.kv_tokens * self.kv_bytes / self.bandwidth


# Toy constants, not measured: 17 ms is what an A100-40G needs to read OPT-13B once (26 GB at 1.555 TB/s).
TOY = LinearCost(fixed=17e-3, per_token=0.05e-3)


def fit_cost(samples: Iterable[tuple[int, int, float]]) -> LinearCost:
    """Least squares over measured steps (tokens, kv_tokens, seconds), with no negative coefficient.

    Squares of relative errors, so that short steps count as much as long ones.
    """
    tokens, kv_tokens, seconds = np.array(list(samples), dtype=float).T
    columns = np.stack([np.ones_like(tokens), tokens, kv_tokens], 1) / seconds[:, None]
    best, best_error = None, math.inf
    for kept in ([0, 1, 2], [0, 1], [0, 2], [1, 2], [0], [1], [2]):  # a coefficient that wants to be negative is 0
        x = np.zeros(3)
        x[kept] = np.linalg.lstsq(columns[:, kept], np.ones_like(seconds), rcond=None)[0]
        error = float(((columns @ x - 1) ** 2).sum())
        if (x >= 0).all() and error < best_error:
            best, best_error = x, error
    return LinearCost(*map(float, best))


# ---- the simulation


@dataclass
class Trace:
    """What happened. Times are seconds on the clock of Request.arrival.

    token_times: {id: when each of its tokens was there}. preemptions: {id: how often}. steps: (start, seconds, batch).
    pages_used: in each step. makespan: end of the last step. refused: ids.
    """

    requests: dict[Hashable, Request]
    token_times: dict[Hashable, list[float]]
    preemptions: dict[Hashable, int]
    steps: list[tuple[float, float, Batch]]
    pages_used: list[int]
    refused: list[Hashable]
    makespan: float

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return sum(map(len, self.token_times.values()))

    @property
    def throughput(self) -> float:
        """Generated tokens a second, from the first arrival to the end."""
        start = min((r.arrival for r in self.requests.values()), default=0.0)
        return self.num_tokens / (self.makespan - start) if self.makespan > start else 0.0

    def ttft(self) -> np.ndarray:
        """Time to first token of every request that got one, seconds."""
        return np.array([times[0] - self.requests[id].arrival for id, times in self._served()])

    def gaps(self) -> np.ndarray:
        """Time between tokens: all intervals between consecutive tokens of a request, seconds."""
        gaps = [np.diff(times) for _, times in self._served()]
        return np.concatenate(gaps) if gaps else np.zeros(0)

    def normalised_latency(self) -> np.ndarray:
        """Seconds from arrival to the last token, over the number of tokens: Orca's and vLLM's measure."""
        served = self._served()
        return np.array([(times[-1] - self.requests[id].arrival) / len(times) for id, times in served])

    def mean_batch(self) -> float:
        """Sequences in a step, averaged over time."""
        seconds = sum(s for _, s, _ in self.steps)
        return sum(s * (len(b.decode) + len(b.prefill)) for _, s, b in self.steps) / seconds if seconds else 0.0

    def summary(self) -> dict[str, float]:
        """The usual figures, by name; a time that nobody had is 0."""
        gaps, ttft, latency = self.gaps(), self.ttft(), self.normalised_latency()

        def percentile(x, q):
            return float(np.percentile(x, q)) if len(x) else 0.0

        return {
            "tokens": self.num_tokens,
            "tokens/s": self.throughput,
            "TTFT p50": percentile(ttft, 50),
            "TTFT p99": percentile(ttft, 99),
            "gap p50": percentile(gaps, 50),
            "gap p99": percentile(gaps, 99),
            "gap max": percentile(gaps, 100),
            "normalised latency": float(latency.mean()) if len(latency) else 0.0,
            "mean batch": self.mean_batch(),
            "preemptions": sum(self.preemptions.values()),
            "padding": sum(batch.padding for _, _, batch in self.steps),
        }

    def _served(self):
        return [(id, times) for id, times in self.token_times.items() if times]


def simulate(requests: Iterable[Request], policy, cost_model: Callable[[Batch], float], **memory) -> Trace:
    """Serve the requests and return the Trace. cost_model(batch) -> seconds of that step, above 0.

    policy and memory: as for `Scheduler` (num_pages, page_size, max_batch, max_tokens, reserve, ...). Requests are
    taken in the order of their arrival. Raises ValueError naming the argument.
    """
    queue = sorted(requests, key=lambda request: request.arrival)
    scheduler = Scheduler(policy, **memory)
    times = {request.id: [] for request in queue}
    expect(len(times) == len(queue), "requests", "two with one id", "unique ids")
    steps, pages_used, refused, clock, arrived = [], [], [], 0.0, 0
    while True:
        while arrived < len(queue) and queue[arrived].arrival <= clock:
            if not scheduler.add(queue[arrived]):
                refused.append(queue[arrived].id)
            arrived += 1
        batch = scheduler.step(clock)
        if not batch:
            waking = scheduler.wake if scheduler.wake > clock else math.inf
            clock = min(queue[arrived].arrival if arrived < len(queue) else math.inf, waking)
            if clock == math.inf:
                break
            continue
        seconds = float(cost_model(batch))
        expect(0 < seconds < math.inf, "cost_model", f"{seconds} seconds", "a finite time above 0")
        steps.append((clock, seconds, batch))
        pages_used.append(scheduler.pages_used)
        clock += seconds
        for id in batch.decode:
            times[id].append(clock)
        for id in batch.ending:
            times[id].append(clock)
    preemptions = {request.id: scheduler.preemptions(request.id) for request in queue}
    end = steps[-1][0] + steps[-1][1] if steps else 0.0
    return Trace({r.id: r for r in queue}, times, preemptions, steps, pages_used, refused, end)


# ---- workloads


def capped_exponential(rng, count, mean, cap) -> np.ndarray:
    """`count` lengths from 1 to cap: exponential with this mean, drawn again where they exceed the cap."""
    kept = np.zeros(0, dtype=int)
    while len(kept) < count:
        drawn = np.ceil(rng.exponential(mean, 2 * count)).astype(int)
        kept = np.concatenate([kept, drawn[drawn <= cap]])
    return kept[:count]


def anyscale(cap, count=1000, *, prompt_len=512, mean=128, seed=0) -> list[Request]:
    """The benchmark of Anyscale's blog: all at once, equal prompts, outputs of very different lengths up to a cap."""
    outputs = capped_exponential(np.random.default_rng(seed), count, mean, cap)
    return [Request(i, 0.0, prompt_len, cap, int(n)) for i, n in enumerate(outputs)]


def poisson(rng, rate, count) -> np.ndarray:
    """Arrival times, seconds, of `count` requests at `rate` a second."""
    return np.cumsum(rng.exponential(1 / rate, count))


def orca(rate, count=1000, *, seed=0) -> list[Request]:
    """Orca's trace in shape (OSDI 2022, section 6.2): prompts U(32, 512), outputs U(1, 128), no early end, Poisson."""
    rng = np.random.default_rng(seed)
    sizes = zip(poisson(rng, rate, count), rng.integers(32, 513, count), rng.integers(1, 129, count))
    return [Request(i, float(t), int(p), int(n)) for i, (t, p, n) in enumerate(sizes)]


def long_prompts(rate, count=300, *, median=1730, longest=6144, output=415, seed=0) -> list[Request]:
    """Long lognormal prompts and outputs, Poisson; medians as in Sarathi-Serve's openchat_sharegpt4 trace."""
    rng = np.random.default_rng(seed)
    prompts = rng.lognormal(math.log(median), 0.9, count).clip(16, longest)
    outputs = rng.lognormal(math.log(output), 0.5, count).clip(1, 2048)
    sizes = zip(poisson(rng, rate, count), prompts, outputs)
    return [Request(i, float(t), int(p), int(n)) for i, (t, p, n) in enumerate(sizes)]
