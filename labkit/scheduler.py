"""Which requests run in the next step: static, dynamic, continuous and chunked batching over a pool of KV pages.

A step runs the model once. A request's prompt is computed in one step or, in chunks, in several (prefill); the last
of them yields its first token. Every later step yields one more (decode), and needs room for one more token.

    waiting --> running --> finished          cancelled: at any time      refused: could never run
       ^           |
       +-- preempted                          its pages are freed, its tokens are kept and computed again

A policy is a short function that fills a `Batch`. All of them are first come, first served: nobody overtakes.
"""

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from labkit.args import expect
from labkit.block_pool import BlockPool, OutOfPages

RESERVATIONS = ("max", "pow2", "oracle", "paged")
LIVE = ("waiting", "preempted", "running")


@dataclass(frozen=True, slots=True)
class Request:
    """arrival: seconds. prompt_len and max_new_tokens: tokens. output_len: how many it will really generate.

    output_len None: max_new_tokens. Policies must not look at output_len; only the reservation "oracle" does.
    Raises ValueError naming the argument.
    """

    id: Hashable
    arrival: float
    prompt_len: int
    max_new_tokens: int
    output_len: int | None = None

    def __post_init__(self):
        try:
            hash(self.id)
        except TypeError:
            expect(False, "id", repr(self.id), "something hashable")
        expect(_is_time(self.arrival), "arrival", self.arrival, "finite seconds >= 0")
        for name in ("prompt_len", "max_new_tokens"):
            _expect_count(name, getattr(self, name))
        if self.output_len is None:
            object.__setattr__(self, "output_len", self.max_new_tokens)
        ok = isinstance(self.output_len, int) and 1 <= self.output_len <= self.max_new_tokens
        expect(ok, "output_len", self.output_len, f"None or an int from 1 to {self.max_new_tokens}")


@dataclass(slots=True)
class Batch:
    """What one step computes.

    prefill: (id, start, n): tokens [start, start + n) of prompt and, after a preemption, of what was generated.
    decode: ids that compute their last token. preempted: ids whose pages were taken away for this step.
    ending: ids in prefill whose last chunk this is. They and those in decode get a new token from this step.
    padding: tokens computed for nothing. kv_tokens: keys that the step's attention reads, summed over its sequences.
    """

    prefill: list[tuple[Hashable, int, int]] = field(default_factory=list)
    decode: list[Hashable] = field(default_factory=list)
    preempted: list[Hashable] = field(default_factory=list)
    ending: list[Hashable] = field(default_factory=list)
    padding: int = 0
    kv_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model, padding apart."""
        return len(self.decode) + sum(n for _, _, n in self.prefill)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


# ---- the policies: fill an empty batch


def static(s: "Scheduler", batch: Batch, now: float | None) -> None:
    """Request-level batching: a batch is formed, and runs until its last request is done.

    Prompts are padded to the longest, and a finished request's row is computed until the batch ends.
    """
    if not s.running:
        s.forming, s.rows = True, 0
    if s.forming:
        s.prefill(batch, room=s.max_batch - s.rows)
        sizes = [n for _, _, n in batch.prefill]
        s.rows += len(sizes)
        batch.padding = len(sizes) * max(sizes, default=0) - sum(sizes)
    if not batch.prefill:
        s.forming, batch.padding = False, s.rows - len(s.running)
        s.decode(batch)
        s.rows -= len(batch.preempted)


def dynamic(s: "Scheduler", batch: Batch, now: float | None) -> None:
    """Static, but a batch that is not full waits until its oldest request has waited `window` seconds."""
    if s.running or len(s.waiting) >= s.max_batch or now is None or now >= s.wake:
        static(s, batch, now)


def continuous(s: "Scheduler", batch: Batch, now: float | None) -> None:
    """Iteration-level batching: whoever is done leaves after any step, and who waits takes the place at once.

    mixed: whole prompts beside the decodes, in one step (Yu et al., OSDI 2022, Algorithm 1). Not mixed: prompts first,
    in a step of their own (Kwon et al., SOSP 2023; vLLM 0.2).
    """
    if s.mixed:
        s.decode(batch)
        s.prefill(batch)
    else:
        s.prefill(batch)
        if not batch.prefill:
            s.decode(batch)


def chunked(s: "Scheduler", batch: Batch, now: float | None) -> None:
    """Stall-free: every decode first, then prompts, cut so that the step stays within max_tokens.

    Agrawal et al., OSDI 2024, Algorithm 3.
    """
    s.decode(batch)
    s.prefill(batch, chunks=True)


POLICIES = {"static": static, "dynamic": dynamic, "continuous": continuous, "chunked": chunked}


# ---- the scheduler


@dataclass(slots=True, eq=False)
class _Run:
    """What is known of one request. Its counters of tokens are kept apart, so that preemption can change only one.

    target: tokens to prefill, known when it is admitted. computed: tokens whose keys and values are in its pages.
    generated: tokens it has produced, which no preemption takes back. room: tokens that its pages can hold.
    """

    request: Request
    id: Hashable
    output_len: int
    number: int  # order of arrival
    state: str = "waiting"
    target: int = 0
    computed: int = 0
    generated: int = 0
    room: int = 0
    preemptions: int = 0


class Scheduler:
    """Decides what each step computes. A call that fails changes nothing.

    policy: "static", "dynamic", "continuous", "chunked", or a function like those.
    num_pages, page_size: the KV memory. max_batch: requests that run at the same time. max_tokens: tokens a step.
    reserve: what a request gets when it is admitted. "paged": room for its prompt, then a page at a time; when none is
    left, the newest running request is preempted and later computed again. "max": room for all it may ever need, or
    `max_len` tokens if given. "pow2": its real output rounded up to a power of two. "oracle": exactly what it will use.
    watermark: share of the pages that admission leaves free under "paged". window: seconds, for "dynamic".
    mixed: see `continuous`; default: with a reservation as Orca, with pages as vLLM. max_len: no request may be longer.
    tokens(id) -> the ids of its tokens so far, prompt first: with them the pool finds cached prefixes ("paged" only),
    also those that the same step computes: it has to write all its keys before it reads any.

    finished: ids, in the order in which they got their last token. The pages of that step are held until the next one
    is asked for. Misuse (an unknown or repeated id, a setting out of range) raises ValueError naming the argument.
    """

    def __init__(
        self, policy, num_pages, page_size, max_batch, max_tokens, reserve="paged", *,
        watermark=0.01, window=0.05, mixed=None, max_len=None, tokens: Callable | None = None,
    ):  # fmt: skip
        known = callable(policy) or (isinstance(policy, str) and policy in POLICIES)
        expect(known, "policy", repr(policy), "one of " + ", ".join(POLICIES))
        expect(reserve in RESERVATIONS, "reserve", repr(reserve), "one of " + ", ".join(RESERVATIONS))
        _expect_count("page_size", page_size)
        _expect_count("max_batch", max_batch)
        _expect_count("max_tokens", max_tokens)
        expect(_is_time(window), "window", window, "finite seconds >= 0")
        if max_len is not None:
            _expect_count("max_len", max_len)
        expect(tokens is None or reserve == "paged", "tokens", f"them with reserve {reserve!r}", "'paged'")
        self.policy = policy if callable(policy) else POLICIES[policy]
        self.page_size, self.max_batch, self.max_tokens, self.reserve = page_size, max_batch, max_tokens, reserve
        self.mixed = reserve != "paged" if mixed is None else mixed
        self.window, self.max_len, self.tokens = window, max_len, tokens
        # Without token ids nothing tells the tokens of a page apart: the pool's token is then a whole page.
        self.unit = 1 if tokens else page_size
        watermark = watermark if reserve == "paged" else 0.0
        self.pool = BlockPool(
            num_pages, page_size if tokens else 1, watermark=watermark, prefix_caching=tokens is not None
        )
        self.waiting: OrderedDict[Hashable, _Run] = OrderedDict()  # first come first; the preempted in front
        self.running: OrderedDict[Hashable, _Run] = OrderedDict()  # the newest last
        self.finished: list[Hashable] = []
        self._runs: dict[Hashable, _Run] = {}
        self._numbers = itertools.count()
        self._leaving: list[_Run] = []  # finished by the last step, their pages still in use
        self._last = Batch()  # what the last step computes
        self.forming, self.rows = False, 0  # of the static policies: is the batch still open, how many rows has it

    # ---- requests come and go

    def add(self, request: Request) -> bool:
        """Queue a request. False: it is refused, because it could never run; the others do not notice."""
        expect(isinstance(request, Request), "request", type(request).__name__, "a Request")
        expect(request.id not in self._runs, "request", f"the id {request.id!r} again", "an id that is new")
        run = _Run(request, request.id, request.output_len, next(self._numbers))
        self._runs[run.id] = run
        run.state = "waiting" if self.fits(request) else "refused"
        if run.state == "waiting":
            self.waiting[run.id] = run
        return run.state == "waiting"

    def cancel(self, id) -> bool:
        """Drop a request and free its pages now. False if it was over already."""
        return self._end(self._get(id), "cancelled")

    def stop(self, id) -> bool:
        """The request ended before output_len tokens (the model said so): it is finished, its pages are free now."""
        return self._end(self._get(id), "finished")

    def fits(self, request) -> bool:
        """Could it run to its end if it were alone? `add` refuses a request that could not."""
        longest = request.prompt_len + request.max_new_tokens
        if self.max_len is not None and longest > self.max_len:
            return False
        if self.policy is not chunked and request.prompt_len > self.max_tokens:
            return False
        # The last token is never fed back. After a preemption all but one of max_new_tokens may have to be computed.
        need = self._reservation(request) or longest - 1
        return -(-need // self.page_size) <= self.pool.num_pages - self.pool.reserve

    def abandon(self) -> None:
        """The last step failed, and nobody knows which keys it wrote. Its requests are cancelled, and no page that is
        filled now will be found by others."""
        for id in [*self._last.decode, *(id for id, _, _ in self._last.prefill)]:
            run = self._get(id)
            if run in self._leaving:
                self.finished.remove(id)
                run.state = "cancelled"
            self._end(run, "cancelled")
        self._last = Batch()
        self.pool.forget_prefixes()

    def forget(self, id) -> None:
        """Drop what is known of a request that is over; its id is unknown then."""
        run = self._get(id)
        expect(run.state not in LIVE, "id", f"{id!r}, which is {run.state}", "a request that is over")
        if run.state == "finished":
            self.finished.remove(id)
        del self._runs[id]

    def state(self, id) -> str:
        """waiting, running, preempted, finished, cancelled or refused."""
        return self._get(id).state

    def generated(self, id) -> int:
        """Tokens it has got so far."""
        return self._get(id).generated

    def preemptions(self, id) -> int:
        return self._get(id).preemptions

    @property
    def pages_used(self) -> int:
        return self.pool.num_pages - self.pool.num_free

    @property
    def wake(self) -> float:
        """When "dynamic" will start a batch that is not full: seconds; infinite if nobody waits."""
        first = next(iter(self.waiting.values()), None)
        return first.request.arrival + self.window if first else math.inf

    # ---- one step

    def step(self, now: float | None = None) -> Batch:
        """What to compute next. The step before is taken as done. An empty batch: nothing to do (yet).

        now: seconds, on the clock of `Request.arrival`; only "dynamic" looks at it, and without it does not wait.
        """
        self._settle()
        batch = Batch()
        self.policy(self, batch, now)
        self._last = batch
        return batch

    def decode(self, batch: Batch) -> None:
        """Every running request whose prompt is computed gets a token, the oldest first, within max_tokens."""
        decode, kv_tokens, left = batch.decode, 0, self.max_tokens - batch.num_tokens
        for run in list(self.running.values()):
            if run.computed < run.target:
                continue
            if len(decode) == left:
                break
            if run.computed == run.room and not self._grow(run, batch):
                break  # it was the newest itself
            run.computed += 1
            run.generated += 1
            kv_tokens += run.computed
            decode.append(run.id)
            if run.generated == run.output_len:
                self._leave(run)
        batch.kv_tokens += kv_tokens

    def prefill(self, batch: Batch, *, chunks: bool = False, room: int | None = None) -> None:
        """Go on with the prompt that is unfinished, then admit who waits, within max_batch, max_tokens and the pages.

        room: how many to admit at most; default: as many as max_batch leaves, who leaves by this step still counted.
        Without chunks a prompt is computed whole. (One that grew beyond max_tokens by what it had generated before it
        was preempted has to be cut all the same; it begins a step of its own.)
        """
        newest = next(reversed(self.running.values()), None)
        if newest and newest.computed < newest.target:  # only the newest can be unfinished
            self._compute(newest, batch)
        if batch.preempted:  # the last one taken out waits in front, and needs more pages than are free
            return
        used = batch.num_tokens
        room = self.max_batch - len(self.running) - len(self._leaving) if room is None else room
        while self.waiting and room > 0 and used < self.max_tokens:
            run = next(iter(self.waiting.values()))
            if not chunks and used and used + run.request.prompt_len + run.generated > self.max_tokens:
                return
            if not self._admit(run):
                return
            used, room = used + self._compute(run, batch), room - 1

    # ---- inside

    def _get(self, id) -> _Run:
        expect(isinstance(id, Hashable) and id in self._runs, "id", repr(id), "the id of a request that was added")
        return self._runs[id]

    def _reservation(self, request) -> int:
        """Tokens of room that it gets when it is admitted, if that is more than it has tokens."""
        if self.reserve == "max":
            return self.max_len or request.prompt_len + request.max_new_tokens
        if self.reserve == "pow2":
            most = math.inf if self.max_len is None else self.max_len
            return min(most, request.prompt_len + (1 << (request.output_len - 1).bit_length()))
        return request.prompt_len + request.output_len if self.reserve == "oracle" else 0

    def _admit(self, run) -> bool:
        """Give it pages, if there are enough."""
        target = run.request.prompt_len + run.generated
        need = -(-max(target, self._reservation(run.request)) // self.unit)
        tokens = list(self.tokens(run.id))[:target] if self.tokens else [0] * need
        expect(len(tokens) == need, "tokens", f"{len(tokens)} of {run.id!r}", f"at least {need}")
        try:
            cached = self.pool.allocate(run.id, tokens, publish=False)
        except OutOfPages:
            return False
        run.target, run.computed, run.room, run.state = target, cached, need * self.unit, "running"
        del self.waiting[run.id]
        self.running[run.id] = run
        return True

    def _compute(self, run, batch) -> int:
        """Put the next chunk of its prompt into the batch; returns its length."""
        n = min(run.target - run.computed, self.max_tokens - batch.num_tokens)
        if n:
            batch.prefill.append((run.id, run.computed, n))
            run.computed += n
            if self.tokens:  # a step writes all its keys before it reads any: others of this step may find these pages
                self.pool.publish(run.id, run.computed)
            batch.kv_tokens += run.computed
            if run.computed == run.target:
                run.generated += 1
                batch.ending.append(run.id)
                if run.generated == run.output_len:
                    self._leave(run)
        return n

    def _grow(self, run, batch) -> bool:
        """Room for its next token. Preempts the newest until there is; False if that was the request itself."""
        token = self.tokens(run.id)[run.computed] if self.tokens else 0
        while True:
            try:
                self.pool.append(run.id, token)
            except OutOfPages:
                victim = next(reversed(self.running.values()))
                self._preempt(victim, batch)
                if victim is run:
                    return False
            else:
                run.room += self.unit
                return True

    def _preempt(self, run, batch) -> None:
        self.pool.free(run.id)
        run.computed = run.room = 0
        run.preemptions += 1
        run.state = "preempted"
        del self.running[run.id]
        self.waiting[run.id] = run
        self.waiting.move_to_end(run.id, last=False)
        batch.preempted.append(run.id)

    def _leave(self, run) -> None:
        """It has its last token. The step that computes it still reads its pages."""
        del self.running[run.id]
        run.state = "finished"
        self.finished.append(run.id)
        self._leaving.append(run)

    def _settle(self) -> None:
        """The last step is done: who finished gives back the pages."""
        self._last = Batch()
        for run in self._leaving:
            self.pool.free(run.id)
            run.room = 0
        self._leaving.clear()

    def _end(self, run, state) -> bool:
        if run.state not in LIVE:
            return False
        if run.state == "running":
            self.pool.free(run.id)
            del self.running[run.id]
        else:
            del self.waiting[run.id]
        run.room, run.state = 0, state
        if state == "finished":
            self.finished.append(run.id)
        return True

    def check(self) -> None:
        """Prove that queues, counters and pages agree. Raises RuntimeError with the numbers."""
        self.pool.check()
        in_queue = {**self.waiting, **self.running}
        _prove(len(in_queue) == len(self.waiting) + len(self.running), "a request both waits and runs")
        live = [run.id for run in self._runs.values() if run.state in LIVE]
        _prove(set(live) == set(in_queue), f"live {live}, in a queue {list(in_queue)}")
        held = [run.id for run in (*self.running.values(), *self._leaving)]
        _prove(set(held) == set(self.pool.seq_ids), f"hold pages {self.pool.seq_ids}, should {held}")
        numbers = [run.number for run in (*self.running.values(), *self.waiting.values())]
        _prove(numbers == sorted(numbers), f"somebody was overtaken: {numbers}")
        _prove(len(self.running) <= self.max_batch, f"{len(self.running)} run, max_batch is {self.max_batch}")
        for run in self._runs.values():
            _prove(0 <= run.generated <= run.output_len, f"{run.id!r}: {run.generated} tokens of {run.output_len}")
            tokens = run.request.prompt_len + run.generated
            if run.state == "running":
                last = next(reversed(self.running)) == run.id
                _prove(run.computed >= run.target or last, f"{run.id!r}: an unfinished prompt that is not the newest")
                done = run.computed == tokens - 1
                _prove(done or run.computed < run.target, f"{run.id!r}: {run.computed} of {tokens} tokens computed")
                _prove(run.computed <= run.room, f"{run.id!r}: {run.computed} tokens, room for {run.room}")
                _prove(run.room == self.unit * self.pool.num_tokens(run.id), f"{run.id!r}: room {run.room}")
            elif run.state in ("waiting", "preempted"):
                _prove(run.room == 0 and run.generated < run.output_len, f"{run.id!r}: {run.state} with {run.room}")
                _prove((run.state == "preempted") == (run.preemptions > 0), f"{run.id!r}: {run.state}")


def _is_time(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < math.inf


def _expect_count(name, x) -> None:
    expect(isinstance(x, int) and not isinstance(x, bool) and x >= 1, name, x, "an int >= 1")


def _prove(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"Scheduler is broken: {what}")
