"""Where the memory of a KV cache goes: the waste study of the PagedAttention paper, with real allocators.

Before paging, a sequence's keys and values had to lie in one piece, so the piece was reserved when the request came,
for an output whose length nobody knows. Kwon et al. (SOSP 2023, section 2.3 and figures 2 and 13) compare three
guesses, each on a buddy allocator, with pages taken as tokens come:

    max     as much as the model can hold        pow2    prompt + the output rounded up to a power of two
    oracle  prompt + output, exactly             paged   pages of page_size tokens, from a BlockPool

A slot holds the keys and values of one token. At any moment it is one of CLASSES:

    token state  in use              reservation  empty, but this request will use it
    internal     taken, never used   external     not taken: free, lost to rounding up, or too small a piece
"""

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from labkit import args, player
from labkit.block_pool import BlockPool, OutOfPages

CLASSES = ("token state", "reservation", "internal", "external")
POLICIES = ("max", "pow2", "oracle", "paged")
# OPT-13B on one A100 40 GB has room for 15.7K tokens (Table 1) and holds up to 2048 a sequence.
NUM_SLOTS, MAX_LEN = 15_700, 2048
WORKLOADS = {"ShareGPT": (161.31, 337.99), "Alpaca": (19.31, 58.45)}  # mean prompt and output, figure 11

# Published for OPT-13B on an A100, ShareGPT at 2 requests/s: % of the KV memory (figure 2), and the mean number of
# requests in a batch, also for Alpaca at 30 requests/s (figure 13). Of "paged", only the token states are given.
PUBLISHED_SHARES = {
    "max": (20.4, 13.3, 57.3, 8.9), "pow2": (26.8, 17.9, 13.6, 41.6), "oracle": (38.2, 25.2, 0.0, 36.6),
    "paged": (96.3,),
}  # fmt: skip
PUBLISHED_BATCH = {"ShareGPT": (7.00, 9.81, 13.62, 30.42), "Alpaca": (7.00, 43.24, 72.75, 132.44)}
# % of pages saved by sharing, with 2, 4 and 6 sequences a request: smallest and largest (section 6.3).
PUBLISHED_SHARING = {
    ("parallel", "Alpaca"): (6.1, 9.8), ("parallel", "ShareGPT"): (16.2, 30.5),
    ("beam", "Alpaca"): (37.6, 55.2), ("beam", "ShareGPT"): (44.3, 66.3),
}  # fmt: skip


@dataclass(eq=False)
class Request:
    id: int
    prompt_len: int
    output_len: int
    stored: int = 0  # tokens in memory, or to be computed again after a preemption

    @property
    def total(self) -> int:
        return self.prompt_len + self.output_len


def requests(workload, *, sigma=1.0, seed=0, max_len=MAX_LEN) -> Iterator[Request]:
    """Endless requests with lognormal lengths. workload: a name, or (mean prompt, mean output).

    The paper prints means only; sigma, the standard deviation of the logarithm, is our assumption.
    """
    means = np.array(WORKLOADS[workload] if isinstance(workload, str) else workload)
    rng, count = np.random.default_rng(seed), 0
    while True:
        for prompt, output in rng.lognormal(np.log(means) - sigma**2 / 2, sigma, (256, 2)).round().astype(int):
            prompt = int(min(max(prompt, 1), max_len - 1))
            yield Request(count, prompt, int(min(max(output, 1), max_len - prompt)), prompt)
            count += 1


class Buddy:
    """A buddy allocator (Knuth, TAOCP 1, section 2.5): pieces are powers of two, at multiples of their size.

    A piece that is too large is halved; a freed one joins its other half as soon as that is free too.
    """

    def __init__(self, num_slots):
        args.expect(num_slots >= 1, "num_slots", num_slots, "at least 1")
        self.free_pieces: dict[int, list[int]] = {}  # size -> heap of offsets
        self.taken: dict[int, int] = {}  # offset -> size
        offset = 0
        for bit in reversed(range(num_slots.bit_length())):
            if num_slots >> bit & 1:  # 15,700 slots are pieces of 8192, 4096, 2048, 1024, 256, 64, 16 and 4
                self.free_pieces[1 << bit] = [offset]
                offset += 1 << bit

    def allocate(self, num_slots) -> int | None:
        """Offset of a piece of the next power of two; None if there is none. The smallest that fits is halved."""
        size = 1 << (num_slots - 1).bit_length()
        found = min((s for s, offsets in self.free_pieces.items() if s >= size and offsets), default=None)
        if found is None:
            return None
        offset = heapq.heappop(self.free_pieces[found])
        while found > size:
            found //= 2
            heapq.heappush(self.free_pieces.setdefault(found, []), offset + found)
        self.taken[offset] = size
        return offset

    def free(self, offset) -> None:
        args.expect(offset in self.taken, "offset", offset, "one that was allocated")
        size = self.taken.pop(offset)
        while offset ^ size in self.free_pieces.get(size, ()):
            self.free_pieces[size].remove(offset ^ size)
            heapq.heapify(self.free_pieces[size])
            offset, size = offset & ~size, 2 * size
        heapq.heappush(self.free_pieces.setdefault(size, []), offset)


class Reserved:
    """Memory that reserves a piece for every request when it comes. policy: "max" | "pow2" | "oracle"."""

    def __init__(self, policy, num_slots, max_len=MAX_LEN):
        args.expect(policy in POLICIES[:3], "policy", policy, f"one of {POLICIES[:3]}")
        self.policy, self.num_slots, self.max_len = policy, num_slots, max_len
        self.buddy, self.offsets = Buddy(num_slots), {}

    def reserved(self, request) -> int:
        if self.policy == "max":
            return self.max_len
        if self.policy == "pow2":
            return min(request.prompt_len + (1 << (request.output_len - 1).bit_length()), self.max_len)
        return request.total

    def admit(self, request) -> bool:
        offset = self.buddy.allocate(self.reserved(request))
        if offset is not None:
            self.offsets[request] = offset
        return offset is not None

    def grow(self, request) -> bool:
        return True

    def leave(self, request) -> None:
        self.buddy.free(self.offsets.pop(request))

    def slots(self, request) -> list[tuple[int, int, str]]:
        """The request's slots as ranges (start, stop, class)."""
        at = self.offsets[request]
        cuts = (at, at + request.stored, at + request.total, at + self.reserved(request))
        return list(zip(cuts, cuts[1:], CLASSES))


class Paged:
    """Memory in pages, taken as tokens come. The last page of a request is all that it can waste."""

    def __init__(self, num_slots, page_size=16):
        self.num_slots, self.page_size = num_slots, page_size
        self.pool = BlockPool(num_slots // page_size, page_size, watermark=0.01, prefix_caching=False)

    def admit(self, request) -> bool:
        try:
            self.pool.allocate(request, range(request.stored))
        except OutOfPages:
            return False
        return True

    def grow(self, request) -> bool:
        try:
            self.pool.append(request, 0)
        except OutOfPages:
            return False
        return True

    def leave(self, request) -> None:
        self.pool.free(request)

    def slots(self, request) -> list[tuple[int, int, str]]:
        size, found = self.page_size, []
        for i, page in enumerate(self.pool.table(request)):
            cuts = [page * size + min(max(n - i * size, 0), size) for n in (0, request.stored, request.total)]
            found += zip(cuts, [*cuts[1:], (page + 1) * size], CLASSES)
        return found


def memory(policy, num_slots=NUM_SLOTS, *, page_size=16, max_len=MAX_LEN) -> Reserved | Paged:
    """The memory of a policy of POLICIES, num_slots tokens large."""
    args.expect(policy in POLICIES, "policy", policy, f"one of {POLICIES}")
    return Paged(num_slots, page_size) if policy == "paged" else Reserved(policy, num_slots, max_len)


def run(memory, queue: Iterable[Request]) -> Iterator[list[Request]]:
    """Serve an endless queue, first come, first served; yields the running requests after every step.

    A step gives every running request one token. When a page is missing, the newest request is preempted: it leaves,
    goes to the front of the queue, and its tokens are computed again when it comes back (vLLM's recomputation).
    """
    queue, waiting, running = iter(queue), deque(), []
    while True:
        for request in [r for r in running if r.stored == r.total]:
            memory.leave(request)
            running.remove(request)
        while True:
            if not waiting:
                waiting.append(next(queue))
            if not memory.admit(waiting[0]):
                break
            running.append(waiting.popleft())
        if not running:
            raise ValueError(
                f"queue: request {waiting[0]} does not fit into an empty memory of {memory.num_slots} slots"
            )
        for request in list(running):  # oldest first
            while request in running and not memory.grow(request):
                newest = running.pop()
                memory.leave(newest)
                waiting.appendleft(newest)
            if request in running:
                request.stored += 1
        yield running


def count_slots(memory, running) -> Counter:
    """Slots of each class; all of them together are memory.num_slots."""
    counts = Counter(dict.fromkeys(CLASSES, 0))
    for request in running:
        for start, stop, kind in memory.slots(request):
            counts[kind] += stop - start
    counts["external"] = memory.num_slots - sum(counts[kind] for kind in CLASSES[:3])
    return counts


def waste(policy, workload="ShareGPT", *, steps=4000, warmup=1000, every=20, sigma=1.0, seed=0, page_size=16):
    """Mean over time: ({class: % of the memory}, requests in a batch), with the memory always asked for more."""
    where = memory(policy, page_size=page_size)
    counts, batch, samples = Counter(), 0, 0
    for running in islice(run(where, requests(workload, sigma=sigma, seed=seed)), warmup, warmup + steps, every):
        counts.update(count_slots(where, running))
        batch, samples = batch + len(running), samples + 1
    return {kind: 100 * counts[kind] / samples / where.num_slots for kind in CLASSES}, batch / samples


# ---- sharing


def parallel_sampling(pool, prompt_len, output_len, width, rng):
    """`width` samples of one prompt. Yields after every token."""
    pool.allocate(0, range(prompt_len))
    for sample in range(1, width):
        pool.fork(0, sample)
    for _ in range(output_len):
        for sample in range(width):
            pool.append(sample, int(rng.integers(1000)))
        yield


def beam_search(pool, prompt_len, output_len, width, rng, *, spread=2.0, vocab=64):
    """Beam search on random scores: a token's logits are normal with standard deviation `spread`.

    Every beam offers its best continuations, and the best `width` of all go on: a beam may have several children, or
    none. Yields after every token.
    """
    pool.allocate(0, range(prompt_len))
    beams, scores, next_id = [0], np.zeros(1), 1
    for _ in range(output_len):
        logits = rng.normal(0, spread, (len(beams), vocab))
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        total = scores[:, None] + logprobs
        best = np.argsort(total, axis=None)[::-1][:width]
        children = []
        for parent, token in zip(*np.unravel_index(best, total.shape)):
            pool.fork(beams[parent], next_id)
            children.append((next_id, int(token)))
            next_id += 1
        for beam in beams:
            pool.free(beam)
        for child, token in children:
            pool.append(child, token)
        beams, scores = [child for child, _ in children], total.flat[best]
        yield


def sharing(kind, workload, width, *, count=20, seed=0, page_size=16) -> float:
    """% of pages saved by sharing, over the life of `count` requests. kind: "parallel" | "beam"."""
    args.expect(kind in ("parallel", "beam"), "kind", kind, "'parallel' or 'beam'")
    decode, rng = parallel_sampling if kind == "parallel" else beam_search, np.random.default_rng(seed)
    held = used = 0
    for _, request in zip(range(count), requests(workload, seed=seed)):
        pool = BlockPool(width * (MAX_LEN // page_size + 2), page_size, prefix_caching=False)
        for _ in decode(pool, request.prompt_len, request.output_len, width, rng):
            held += sum(len(pool.table(seq_id)) for seq_id in pool.seq_ids)
            used += pool.num_pages - pool.num_free
    return 100 * (1 - used / held)


# ---- to look at

COLORS = {"token state": "blue", "reservation": "sky", "internal": "orange", "external": "muted"}


def memory_player(num_slots=256, cols=16, steps=12, max_len=64, page_size=4, seed=2):
    """A small memory under each policy, the same queue of requests, slot by slot."""
    traces = {}
    for policy in POLICIES:
        where, frames = memory(policy, num_slots, page_size=page_size, max_len=max_len), []
        queue = requests((7, 14), sigma=0.8, seed=seed, max_len=max_len)
        for running in islice(run(where, queue), 1, 2 * steps, 2):
            cells = ["muted"] * num_slots
            for request in running:
                for start, stop, kind in where.slots(request):
                    cells[start:stop] = [COLORS[kind]] * (stop - start)
            counts = count_slots(where, running)
            frames.append((cells, counts, len(running)))
        traces[policy] = frames

    def frame(policy, step):
        cells, counts, batch = traces[policy][step // 2 - 1]
        share = {kind: f"{count / num_slots:.0%}" for kind, count in counts.items()}
        text = f"{policy}, step {step}: {batch} requests run, {share['token state']} of the memory holds tokens."
        rows = [cells[i : i + cols] for i in range(0, num_slots, cols)]
        return {"text": text, "memory": rows, "share": {"requests": batch} | share}

    panels = {
        "memory": player.Grid(num_slots // cols, cols, name=f"{num_slots} slots, one token each"),
        "share": player.Values(["requests", *CLASSES]),
    }
    controls = {"policy": list(POLICIES), "step": list(range(2, 2 * steps + 1, 2))}
    legend = {COLORS[kind]: kind for kind in CLASSES}
    caption = f"The same queue under each policy, at most {max_len} tokens a request, pages of {page_size}."
    start = ("max", 2 * steps)
    return player.Explorer("Memory filling", controls, panels, frame, legend=legend, caption=caption, start=start)


def try_pages(page_size, sigma):
    """One run with this page size and spread of lengths, in words. The live cell's callback."""
    shares, batch = waste("paged", page_size=page_size, sigma=sigma, steps=1500, warmup=500)
    text = ", ".join(f"{kind} {share:.1f} %" for kind, share in shares.items())
    return f"pages of {page_size}, sigma {sigma}: {batch:.1f} requests in a batch; {text}"
