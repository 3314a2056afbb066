import itertools
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from far_apart import far_apart
from fresh_memory import nan_in_fresh_memory

import kernels
import kernels.batching as ops
from labkit import batching as ref
from labkit import batching_slots, splits, trace
from labkit import batching_study as study
from labkit.attention import attention
from labkit.batching import TOY, Request, Scheduler, simulate
from labkit.check import BF16, F16, F32, assert_matches

# ---- the scheduler


class Witness:
    """Believes nothing but the batches: replays them, and knows what a model would have computed."""

    def __init__(self, requests, page_size, num_pages, max_batch, max_tokens):
        self.requests = {request.id: request for request in requests}
        self.page_size, self.num_pages, self.max_batch, self.max_tokens = page_size, num_pages, max_batch, max_tokens
        self.computed, self.tokens, self.first = {}, Counter(), []  # keys in memory; tokens generated

    def see(self, batch):
        for id in batch.preempted:
            assert self.computed.pop(id) > 0, "preempted without having anything"
        ending = []
        for id, start, n in batch.prefill:
            assert n > 0
            assert start == self.computed.get(id, 0), id
            self.computed[id] = start + n
            goal = self.requests[id].prompt_len + self.tokens[id]
            assert start + n <= goal, "computes a token that does not exist yet"
            ending += [id] * (start + n == goal)
        assert batch.ending == ending
        assert not batch.preempted or all(start > 0 for _, start, _ in batch.prefill), "given away what was just taken"
        for id in batch.decode:
            self.computed[id] += 1
            assert self.computed[id] == self.requests[id].prompt_len + self.tokens[id], "a token fed twice or never"
        for id in (*batch.decode, *ending):
            self.first += [id] * (self.tokens[id] == 0)
            self.tokens[id] += 1
        rows = [id for id, *_ in batch.prefill] + batch.decode
        assert len(set(rows)) == len(rows) <= self.max_batch
        assert batch.num_tokens == len(batch.decode) + sum(n for *_, n in batch.prefill) <= self.max_tokens
        assert batch.kv_tokens == sum(self.computed[id] for id in rows)
        # what lies in memory while the step runs fits into it
        assert sum(-(-n // self.page_size) for n in self.computed.values()) <= self.num_pages
        for id in rows:
            if self.tokens[id] == self.requests[id].output_len:
                del self.computed[id]


def random_requests(rng, count, longest):
    """Some of them can never run."""
    result = []
    for i in range(count):
        most = rng.randint(1, longest)
        result.append(Request(i, rng.random() * 3, rng.randint(1, longest), most, rng.randint(1, most)))
    return result


COMBINATIONS = [(p, r) for p in ref.POLICIES for r in ("paged", "max", "pow2", "oracle")]


@pytest.mark.parametrize("policy, reserve", COMBINATIONS)
def test_no_token_lost_or_extra(policy, reserve):
    """Random sizes, arrivals in any order, tiny pools, cancellations and early ends between any two steps."""
    seen = Counter()
    for seed in range(6):
        rng = random.Random(f"{policy} {reserve} {seed}")
        page_size, num_pages = rng.choice([(1, 50), (4, 13), (16, 3), (3, 17)])
        max_batch, max_tokens = [(8, 64), (3, 20), (8, 33), (1, 64), (9, 5), (5, 48)][seed]
        mixed = rng.choice([None, True, False])
        todo = random_requests(rng, 30, 30)
        witness = Witness(todo, page_size, num_pages, max_batch, max_tokens)
        s = Scheduler(policy, num_pages, page_size, max_batch, max_tokens, reserve, mixed=mixed, watermark=0.05)
        over, refused = {}, set()  # id -> tokens when it was cancelled or stopped
        while todo or s.waiting or s.running:
            for _ in range(min(len(todo), rng.choice([0, 0, 1, 5]))):
                request = todo.pop()
                if not s.add(request):
                    refused.add(request.id)
            batch = s.step()
            s.check()
            witness.see(batch)
            assert batch or not s.waiting, "stuck"
            live = [*s.waiting, *s.running]
            if live and rng.random() < 0.05:
                id = rng.choice(live)
                assert s.cancel(id) if id % 2 else s.stop(id)
                over[id] = witness.tokens[id]
                witness.computed.pop(id, None)
                assert not s.cancel(id)
                assert not s.stop(id)
                s.check()
            seen["preempted"] += len(batch.preempted)
        assert not s.step()
        assert s.pages_used == 0
        for id, request in witness.requests.items():
            want = 0 if id in refused else over.get(id, request.output_len)
            assert witness.tokens[id] == s.generated(id) == want, id
            ends = {True: "refused", False: "finished"}[id in refused]
            assert s.state(id) == ("cancelled" if id in over and id % 2 else ends)
        assert sorted(s.finished) == sorted(id for id in witness.requests if s.state(id) == "finished")
        seen["refused"] += len(refused)
        seen["cancelled"] += len(over)
    assert min(seen["refused"], seen["cancelled"]) > 0, seen
    assert (seen["preempted"] > 0) == (reserve == "paged"), seen


@pytest.mark.parametrize("policy, reserve", COMBINATIONS)
def test_first_come_first_served(policy, reserve):
    """First tokens come in the order of arrival, whatever is preempted: nobody starves."""
    for seed in range(4):
        requests = random_requests(random.Random(seed), 60, 20)
        memory = dict(num_pages=12, page_size=4, max_batch=6, max_tokens=48, reserve=reserve)
        trace = simulate(requests, policy, lambda batch: 0.1, **memory)
        served = [r for r in sorted(requests, key=lambda r: r.arrival) if r.id not in trace.refused]
        first = [trace.token_times[r.id][0] for r in served]
        assert first == sorted(first)
        assert {r.id: len(trace.token_times[r.id]) for r in served} == {r.id: r.output_len for r in served}
        assert len(served) > 40


def run(s, requests=()):
    """All batches until nothing is left."""
    for request in requests:
        s.add(request)
    batches = []
    while batch := s.step():
        batches.append(batch)
    return batches


def ids(batch):
    return [id for id, *_ in batch.prefill], batch.decode


LENGTHS = [Request("a", 0, 4, 1), Request("b", 0, 2, 4), Request("c", 0, 3, 2), Request("d", 0, 5, 2)]


def test_static_runs_a_batch_to_its_end():
    """b needs four steps; a's row is computed for nothing meanwhile, and c and d wait."""
    batches = run(Scheduler("static", 99, 4, max_batch=2, max_tokens=99), LENGTHS)
    assert [ids(b) for b in batches] == [
        (["a", "b"], []), ([], ["b"]), ([], ["b"]), ([], ["b"]), (["c", "d"], []), ([], ["c", "d"]),
    ]  # fmt: skip
    assert [b.padding for b in batches] == [2, 1, 1, 1, 2, 0]


def test_static_forms_its_batch_in_several_steps():
    batches = run(Scheduler("static", 99, 4, max_batch=3, max_tokens=6), LENGTHS)
    assert [ids(b) for b in batches][:3] == [(["a", "b"], []), (["c"], []), ([], ["b", "c"])]


@pytest.mark.parametrize("policy", ["static", "continuous"])
def test_a_prompt_is_computed_whole_or_waits(policy):
    """Of 4 + 3 tokens a step of 6 computes the first 4; a prompt of exactly 6 is not too long."""
    s = Scheduler(policy, 99, 4, max_batch=3, max_tokens=6)
    batches = run(s, [Request("a", 0, 4, 1), Request("b", 0, 3, 1), Request("c", 0, 6, 1)])
    assert [b.prefill for b in batches] == [[("a", 0, 4)], [("b", 0, 3)], [("c", 0, 6)]]


def test_static_takes_nobody_in_once_it_decodes():
    """c comes when a and b decode; there is room for it, but the batch is closed."""
    s = Scheduler("static", 99, 4, max_batch=3, max_tokens=99)
    for request in (Request("a", 0, 4, 3), Request("b", 0, 2, 3)):
        s.add(request)
    assert [ids(s.step()) for _ in range(2)] == [(["a", "b"], []), ([], ["a", "b"])]
    s.add(Request("c", 0, 3, 2))
    assert [ids(s.step()) for _ in range(2)] == [([], ["a", "b"]), (["c"], [])]


def test_dynamic_waits_for_the_window():
    s = Scheduler("dynamic", 99, 4, max_batch=2, max_tokens=99, window=0.5)
    s.add(Request("a", 1.0, 4, 1))
    assert not s.step(1.2)
    assert s.wake == 1.5
    assert ids(s.step(1.5)) == (["a"], [])  # the window is over
    s.add(Request("b", 2.0, 4, 1))
    s.add(Request("c", 2.1, 4, 1))
    assert ids(s.step(2.1)) == (["b", "c"], [])  # full
    s.add(Request("d", 3.0, 4, 1))
    assert ids(s.step()) == (["d"], [])  # without a clock there is nothing to wait for
    trace = simulate([Request(0, 1.0, 4, 2)], "dynamic", lambda b: 1.0, num_pages=9, page_size=4, max_batch=2,
                     max_tokens=9, window=0.25)  # fmt: skip
    assert trace.token_times == {0: [2.25, 3.25]}
    assert trace.makespan == 3.25


def test_continuous_takes_the_free_place_at_once():
    mixed = run(Scheduler("continuous", 99, 4, max_batch=2, max_tokens=99, reserve="max"), LENGTHS)
    assert [ids(b) for b in mixed] == [
        (["a", "b"], []), (["c"], ["b"]), ([], ["b", "c"]), (["d"], ["b"]), ([], ["d"]),
    ]  # fmt: skip
    alone = run(Scheduler("continuous", 99, 4, max_batch=2, max_tokens=99), LENGTHS)
    assert [ids(b) for b in alone] == [
        (["a", "b"], []), (["c"], []), ([], ["b", "c"]), (["d"], []), ([], ["b", "d"]), ([], ["b"]),
    ]  # fmt: skip
    assert all(b.padding == 0 for b in mixed + alone)
    for asked, reserve, as_in in ((True, "paged", mixed), (False, "max", alone)):  # whatever is the default
        s = Scheduler("continuous", 99, 4, max_batch=2, max_tokens=99, reserve=reserve, mixed=asked)
        assert [ids(b) for b in run(s, LENGTHS)] == [ids(b) for b in as_in]


def test_chunked_is_sarathis_algorithm_3():
    """Decodes first, then the unfinished prompt, then a new one, all within 5 tokens a step."""
    batches = run(Scheduler("chunked", 99, 4, max_batch=4, max_tokens=5), [Request("a", 0, 3, 9), Request("b", 0, 7, 2), Request("c", 0, 2, 1)])  # fmt: skip
    assert [(b.prefill, b.decode) for b in batches][:4] == [
        ([("a", 0, 3), ("b", 0, 2)], []),
        ([("b", 2, 4)], ["a"]),
        ([("b", 6, 1), ("c", 0, 2)], ["a"]),
        ([], ["a", "b"]),
    ]
    assert [b.ending for b in batches][:4] == [["a"], [], ["b", "c"], []]


def test_decodes_stay_within_the_budget():
    """Six run, four tokens a step: the oldest four go on, and the others get their turn when one of them is done."""
    s = Scheduler("chunked", 99, 4, max_batch=6, max_tokens=4)
    batches = run(s, [Request(i, 0, 1, 3) for i in range(6)])
    assert [(len(b.prefill), b.decode) for b in batches] == [
        (4, []), (0, [0, 1, 2, 3]), (0, [0, 1, 2, 3]), (2, []), (0, [4, 5]), (0, [4, 5]),
    ]  # fmt: skip
    s = Scheduler("static", 99, 4, max_batch=6, max_tokens=4)
    batches = run(s, [Request(i, 0, 1, 3) for i in range(6)])
    assert [b.decode for b in batches] == [[], [], [0, 1, 2, 3], [0, 1, 2, 3], [4, 5], [4, 5]]


def test_preemption_takes_the_newest_and_keeps_its_tokens():
    """Two requests of 4 + 8 tokens in 5 pages of 4: when both need a third page, b goes, and comes back with 9."""
    s = Scheduler("continuous", 5, 4, max_batch=2, max_tokens=99, watermark=0)
    batches = run(s, [Request("a", 0, 4, 8), Request("b", 0, 4, 8)])
    preempting = next(i for i, b in enumerate(batches) if b.preempted)
    assert batches[preempting].preempted == ["b"]
    assert batches[preempting].decode == ["a"]
    assert s.preemptions("b") == 1
    assert s.preemptions("a") == 0
    again = [b.prefill for b in batches[preempting:] if b.prefill]
    assert again == [[("b", 0, 4 + 5)]]  # its prompt and the five tokens that it had
    assert Counter(id for b in batches for id in (*b.decode, *b.ending)) == {"a": 8, "b": 8}


def test_a_preempted_request_may_outgrow_a_step():
    """12 tokens a step; after preemption 16 have to be computed again, which takes two steps of prefill."""
    s = Scheduler("continuous", 10, 3, max_batch=2, max_tokens=12, watermark=0)
    batches = run(s, [Request("a", 0, 8, 20), Request("b", 0, 8, 20)])
    assert max(b.num_tokens for b in batches) <= 12
    assert any(start > 0 for b in batches for _, start, _ in b.prefill)
    assert Counter(id for b in batches for id in (*b.decode, *b.ending)) == {"a": 20, "b": 20}


def test_watermark_leaves_pages_free():
    """8 of 10 pages are asked for; with 30 % kept free the third request has to wait."""
    for watermark, together in ((0.0, 2), (0.3, 1)):
        s = Scheduler("continuous", 10, 4, max_batch=9, max_tokens=99, watermark=watermark)
        for i in range(2):
            s.add(Request(i, 0, 16, 4))
        assert len(s.step().prefill) == together
    s = Scheduler("continuous", 10, 4, max_batch=9, max_tokens=99, reserve="max", watermark=0.3)
    assert s.add(Request(0, 0, 16, 24)), "who has all it needs from the start needs no pages left free"


@pytest.mark.parametrize("reserve, pages", [("max", 5), ("pow2", 4), ("oracle", 3), ("paged", 2)])
def test_reservations(reserve, pages):
    """5 tokens of prompt, 5 of output where up to 13 were allowed; pages of 4."""
    s = Scheduler("continuous", 50, 4, max_batch=9, max_tokens=99, reserve=reserve)
    s.add(Request(0, 0, 5, 13, 5))
    s.step()
    assert s.pages_used == pages
    if reserve == "max":
        s = Scheduler("continuous", 50, 4, max_batch=9, max_tokens=99, reserve=reserve, max_len=64)
        s.add(Request(0, 0, 5, 13, 5))
        s.step()
        assert s.pages_used == 16


def test_a_power_of_two_is_reserved_as_it_is():
    """5 tokens of prompt and 8 of output are 13: four pages of 4, not the 21 of the next power of two."""
    s = Scheduler("continuous", 50, 4, max_batch=9, max_tokens=99, reserve="pow2")
    s.add(Request(0, 0, 5, 8, 8))
    s.step()
    assert s.pages_used == 4


def test_no_reservation_beyond_the_limit():
    """15 tokens of prompt and 17 of output are the 32 that two pages hold, though 17 rounds up to 32."""
    s = Scheduler("continuous", 2, 16, max_batch=1, max_tokens=99, reserve="pow2", max_len=32)
    assert s.add(Request(0, 0, 15, 17, 17))
    assert not s.add(Request(1, 0, 15, 18, 18))
    run(s)


def test_the_oldest_wakes_a_waiting_batch():
    s = Scheduler("dynamic", 9, 4, max_batch=3, max_tokens=99, window=0.5)
    for i in range(2):
        s.add(Request(i, float(i), 4, 2))
    assert s.wake == 0.5


def test_who_is_preempted_leaves_the_static_batch():
    """Two requests of 4 + 8 tokens in five pages of four: one is taken out, and its row is nobody's padding."""
    s = Scheduler("static", 5, 4, max_batch=2, max_tokens=99, watermark=0)
    for i in range(2):
        s.add(Request(i, 0, 4, 8))
    while not (batch := s.step()).preempted:
        assert batch
    while s.running:
        assert not s.step().padding


def test_too_long_is_refused_and_blocks_nobody():
    s = Scheduler("continuous", 8, 4, max_batch=4, max_tokens=20, watermark=0.25)
    assert not s.add(Request("prompt", 0, 21, 1))  # no step can hold it
    assert not s.add(Request("memory", 0, 10, 16))  # 25 tokens are kept, and 6 of 8 pages may be had
    assert s.add(Request("just", 0, 10, 15))
    assert s.add(Request("next", 0, 4, 2))
    assert s.state("prompt") == s.state("memory") == "refused"
    assert not s.cancel("memory")
    run(s)
    assert s.finished == ["next", "just"]
    assert Scheduler("chunked", 99, 4, max_batch=4, max_tokens=20).add(Request(0, 0, 21, 1))
    assert not Scheduler("chunked", 99, 4, max_batch=4, max_tokens=20, max_len=30).add(Request(0, 0, 21, 10))


def test_cancel_frees_pages_at_once():
    s = Scheduler("chunked", 10, 4, max_batch=4, max_tokens=10)
    for request in (Request("a", 0, 8, 9), Request("b", 0, 8, 9), Request("c", 0, 8, 9)):
        s.add(request)
    s.step()
    assert s.pages_used == 4
    assert list(s.waiting) == ["c"]
    assert s.cancel("c")
    assert s.pages_used == 4
    assert s.cancel("b")
    assert s.pages_used == 2
    assert s.state("b") == "cancelled"
    assert [id for b in run(s) for id in b.decode] == ["a"] * 8
    assert s.finished == ["a"]


def test_prefixes_are_found_with_token_ids():
    """The second request begins like the first: its full pages are not computed again."""
    tokens = {"a": list(range(10)), "b": [*range(9), 99, 98]}
    s = Scheduler("chunked", 20, 4, max_batch=4, max_tokens=16, tokens=tokens.__getitem__)
    s.add(Request("a", 0, 10, 3))
    assert s.step().prefill == [("a", 0, 10)]
    tokens["a"].append(7)
    s.add(Request("b", 0, 11, 2))
    batch = s.step()
    assert batch.prefill == [("b", 8, 3)]
    assert batch.decode == ["a"]
    assert s.pool.table("a")[:2] == s.pool.table("b")[:2]
    s.check()
    with pytest.raises(ValueError, match=r"^tokens: got .* expected "):
        Scheduler("chunked", 20, 4, 4, 16, reserve="max", tokens=tokens.__getitem__)
    s = Scheduler("chunked", 20, 4, max_batch=4, max_tokens=16, tokens=tokens.__getitem__)
    s.add(Request("b", 0, 12, 2))  # one more than there are ids
    with pytest.raises(ValueError, match=r"^tokens: got 11 of 'b', expected at least 12"):
        s.step()
    s.check()
    assert s.state("b") == "waiting"


BAD_REQUESTS = {
    "id": dict(id=[1]), "arrival": dict(arrival=-1.0), "prompt_len": dict(prompt_len=0),
    "max_new_tokens": dict(max_new_tokens=2.5), "output_len": dict(output_len=9),
}  # fmt: skip
BAD_SCHEDULERS = {
    "policy": dict(policy="eager"), "num_pages": dict(num_pages=0), "page_size": dict(page_size=0),
    "max_batch": dict(max_batch=True), "max_tokens": dict(max_tokens=-1), "reserve": dict(reserve="half"),
    "watermark": dict(watermark=1.0), "window": dict(window=-1), "max_len": dict(max_len=0),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request_is_named(name):
    with pytest.raises(ValueError, match=f"^{name}: got .* expected "):
        Request(**dict(id=0, arrival=0.0, prompt_len=4, max_new_tokens=8) | BAD_REQUESTS[name])


@pytest.mark.parametrize("name", BAD_SCHEDULERS)
def test_bad_setting_is_named(name):
    good = dict(policy="chunked", num_pages=9, page_size=4, max_batch=2, max_tokens=8)
    with pytest.raises(ValueError, match=f"^{name}: got .* expected "):
        Scheduler(**good | BAD_SCHEDULERS[name])


def test_misuse_changes_nothing():
    s = Scheduler("continuous", 9, 4, max_batch=2, max_tokens=99)
    s.add(Request("a", 0, 4, 2))
    for call, name in ((lambda: s.add(Request("a", 0, 4, 2)), "request"), (lambda: s.add("a"), "request"),
                       (lambda: s.cancel("x"), "id"), (lambda: s.state([]), "id")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: got .* expected "):
            call()
    s.check()
    assert list(s.waiting) == ["a"]
    assert len(run(s)) == 2


def test_check_notices():
    """What check() is for: each of these states is wrong."""
    breaks = {
        "pages": lambda s: s.pool.free("a"),
        "counter": lambda s: setattr(s.running["a"], "generated", 3),
        "queue": lambda s: s.waiting.update(a=s.running["a"]),
        "order": lambda s: s.running.move_to_end("a"),
        "lost": lambda s: s.running.pop("b"),
    }
    for broken in breaks.values():
        s = Scheduler("continuous", 9, 4, max_batch=2, max_tokens=99)
        s.add(Request("a", 0, 4, 5))
        s.add(Request("b", 0, 4, 5))
        s.step()
        s.check()
        broken(s)
        with pytest.raises(RuntimeError, match="is broken"):
            s.check()


# ---- the simulation


def test_trace_of_a_toy_case():
    """Two requests, one second a step: every number by hand."""
    requests = [Request("a", 0.0, 4, 2), Request("b", 0.5, 4, 3)]
    trace = simulate(requests, "chunked", lambda batch: 1.0, num_pages=9, page_size=4, max_batch=2, max_tokens=4)
    # step 1: a's prompt. 2: a's last token, three of b's prompt. 3: b's prompt ends. 4, 5: b
    assert trace.token_times == {"a": [1.0, 2.0], "b": [3.0, 4.0, 5.0]}
    assert [(start, seconds) for start, seconds, _ in trace.steps] == [(i, 1.0) for i in range(5)]
    assert trace.steps[1][2].prefill == [("b", 0, 3)]
    assert trace.steps[1][2].decode == ["a"]
    assert trace.pages_used == [1, 3, 1, 2, 2]
    assert trace.makespan == 5.0
    assert trace.preemptions == {"a": 0, "b": 0}
    assert trace.num_tokens == 5
    assert trace.throughput == 1.0
    assert trace.mean_batch() == 6 / 5
    assert trace.ttft().tolist() == [1.0, 2.5]
    assert trace.gaps().tolist() == [1.0, 1.0, 1.0]
    assert trace.normalised_latency().tolist() == [1.0, 1.5]


def test_costs():
    batch = ref.Batch(prefill=[("a", 0, 6)], decode=["b", "c"], padding=2, kv_tokens=30)
    assert ref.LinearCost(1.0, 0.1, 0.01)(batch) == pytest.approx(1 + 1.0 + 0.3)
    roofline = ref.RooflineCost(num_params=10, kv_bytes=3, bandwidth=5, flops=20)
    assert roofline(batch) == pytest.approx(max(20 / 5, 20 * 10 / 20) + 30 * 3 / 5)
    true = ref.LinearCost(2e-3, 3e-5, 4e-7)
    shapes = [(t, k) for t in (1, 8, 64) for k in (10, 1000)]
    samples = [(t, k, true.fixed + true.per_token * t + true.per_kv_token * k) for t, k in shapes]
    got = ref.fit_cost(samples)
    assert np.allclose([got.fixed, got.per_token, got.per_kv_token], [2e-3, 3e-5, 4e-7])
    flat = ref.fit_cost([(t, k, 1e-3 - 1e-7 * t) for t, k in shapes])  # falls with the tokens: no negative price
    assert flat.per_token == 0
    assert flat.fixed == pytest.approx(1e-3, rel=1e-2)


def test_workloads_follow_their_sources():
    for cap in (32, 128, 512, 1536):
        requests = ref.anyscale(cap)
        outputs = np.array([r.output_len for r in requests])
        assert len(requests) == 1000
        assert outputs.min() >= 1
        assert outputs.max() <= cap
        assert {(r.arrival, r.prompt_len, r.max_new_tokens) for r in requests} == {(0.0, 512, cap)}
        x = np.arange(1, cap + 1)
        p = np.exp(-(x - 1) / 128) - np.exp(-x / 128)  # of ceil(exponential), then cut and normalised
        assert abs(outputs.mean() - (p * x).sum() / p.sum()) < 4 * outputs.std() / 1000**0.5
    requests = ref.orca(5.0, 4000)
    prompts, outputs = (np.array([getattr(r, name) for r in requests]) for name in ("prompt_len", "output_len"))
    assert (prompts.min(), prompts.max(), outputs.min(), outputs.max()) == (32, 512, 1, 128)
    assert np.mean(np.diff([r.arrival for r in requests])) == pytest.approx(0.2, rel=0.06)
    assert np.median([r.prompt_len for r in ref.long_prompts(1.0, 2000)]) == pytest.approx(1730, rel=0.1)


def test_better_policies_are_better():
    """The order that the literature reports, on Anyscale's workload: scheduling, then memory."""
    requests, memory = ref.anyscale(512, 150), dict(num_pages=981, page_size=16, max_tokens=4096)
    rates = [
        simulate(requests, policy, TOY, **memory, **options).throughput
        for policy, options in (
            ("static", dict(max_batch=8, reserve="max")),
            ("continuous", dict(max_batch=8, reserve="max")),
            ("continuous", dict(max_batch=256)),
        )
    ]
    assert rates[1] > 1.5 * rates[0]
    assert rates[2] > 1.5 * rates[1]


def test_chunks_cure_the_stall():
    requests = ref.long_prompts(2.0, 40)
    memory = dict(num_pages=4096, page_size=16, max_batch=64)
    stall = simulate(requests, "continuous", TOY, max_tokens=8192, **memory).gaps()
    cure = simulate(requests, "chunked", TOY, max_tokens=256, **memory).gaps()
    assert np.percentile(stall, 99) > 2 * np.percentile(cure, 99)
    assert cure.max() <= TOY(ref.Batch(decode=range(256))) + 1e-9


def test_bad_simulation_is_named():
    requests, memory = [Request(0, 0, 4, 4)], dict(num_pages=9, page_size=4, max_batch=2, max_tokens=8)
    with pytest.raises(ValueError, match=r"^cost_model: got .* expected "):
        simulate(requests, "static", lambda batch: 0.0, **memory)
    with pytest.raises(ValueError, match=r"^requests: got .* expected "):
        simulate(requests * 2, "static", TOY, **memory)
    assert simulate([], "static", TOY, **memory).summary()["tokens/s"] == 0


# ---- attention over a ragged batch

case = ref.RaggedCase
NAMES = ("q", "k_pages", "v_pages", "block_table", "q_starts", "kv_lens")
# Every chunk is (queries, keys): a decode is (1, n), a whole prompt (n, n), a later chunk in between.
CASES = [
    case("prompts and decodes", [(17, 17), (1, 70), (33, 90), (1, 1)], dtype=BF16),
    case("decodes only", [(1, 130), (1, 1), (1, 64)], dtype=F16),
    case("one query", [(1, 1)], dtype=F32),
    case("one whole prompt", [(129, 129)], dtype=BF16, page_size=32),
    case("edges of a tile", [(127, 127), (128, 128)], dtype=F16, num_q_heads=1, num_kv_heads=1),
    case("chunks of 0, first, between and last", [(0, 40), (5, 9), (0, 0), (0, 3), (64, 65), (0, 20)], dtype=F32),
    case("nothing but empty chunks", [(0, 7), (0, 0)], dtype=F32),
    case("no batch", [], dtype=F32),
    case("as many queries as sequences, not one each", [(3, 50), (0, 9), (1, 20), (0, 4)], dtype=BF16),
    case("more queries than keys", [(9, 4), (3, 0), (20, 33)], dtype=F32),
    case("page 1", [(7, 30), (1, 33)], dtype=BF16, page_size=1),
    case("page 3", [(31, 50), (1, 10)], dtype=F32, page_size=3),
    case("page 256", [(65, 300), (2, 256), (1, 257)], dtype=F16, page_size=256),
    case("page 100, MQA, group 8", [(30, 130), (1, 99)], dtype=BF16, page_size=100, num_q_heads=8, num_kv_heads=1),
    case("group 6, not a power of two", [(23, 40), (1, 41)], dtype=BF16, num_q_heads=12),
    case("group 6, decodes only", [(1, 40), (1, 41)], dtype=F16, num_q_heads=12),
    case("group 64", [(3, 20), (1, 33)], dtype=F16, num_q_heads=64, num_kv_heads=1),
    case("fp32, group 64", [(3, 20), (1, 33)], dtype=F32, num_q_heads=128),
    case("fp32, group 40, decodes only", [(1, 20), (1, 33)], dtype=F32, num_q_heads=80),
    case("MHA", [(40, 70), (1, 20)], dtype=F16, num_kv_heads=4),
    case("head_dim 80", [(20, 66), (1, 5)], dtype=F16, head_dim=80),
    case("head_dim 96", [(20, 66), (1, 5)], dtype=BF16, head_dim=96),
    case("head_dim 128", [(70, 140), (1, 50)], dtype=BF16, head_dim=128),
    case("head_dim 256", [(18, 40), (1, 33)], dtype=F32, head_dim=256),
    case("head_dim 32, small model", [(40, 60), (1, 7)], dtype=F32, head_dim=32, num_q_heads=8, num_kv_heads=8),
    case("strided fp32", [(20, 66), (1, 5)], dtype=F32, strided=True),
    case("strided bf16", [(20, 66), (1, 5)], dtype=BF16, strided=True),
    case("other scale", [(20, 66), (1, 5)], dtype=F32, sm_scale=0.5),
    case("large scores", [(20, 66), (1, 5)], dtype=BF16, sm_scale=4.0),
    case("3 splits", [(17, 17), (1, 70), (33, 200), (0, 9), (1, 1)], dtype=BF16, num_splits=3),
    case("2 splits of decodes", [(1, 300), (1, 1), (0, 5), (1, 129)], dtype=F16, num_splits=2, strided=True),
    case("more splits than tiles of keys", [(9, 4), (3, 0), (20, 66), (1, 33)], dtype=F32, num_splits=5),
    case("a rule's splits, one decode", [(1, 1100)], dtype=BF16, num_q_heads=2, num_kv_heads=1),
    case("a rule's splits, a chunk", [(5, 1100)], dtype=BF16, num_q_heads=2, num_kv_heads=1),
    case("splits, group 6, head_dim 80", [(20, 150), (1, 41)], dtype=F16, num_q_heads=12, head_dim=80, num_splits=2),
    case("splits, fp32, group 64", [(3, 70), (1, 33)], dtype=F32, num_q_heads=64, num_kv_heads=1, num_splits=2),
    case("many sequences", [(i % 4, i % 7 + 3) for i in range(23)], dtype=F32, num_q_heads=2, num_kv_heads=1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_ragged(case, device, monkeypatch):
    nan_in_fresh_memory(monkeypatch)
    tensors = case.tensors(device)
    got = ops.ragged_attention(*tensors, num_splits=case.num_splits, sm_scale=case.sm_scale)
    assert_matches(got, ref.ragged_attention, *tensors, sm_scale=case.sm_scale)


def test_splits_follow_the_work():
    """A short chunk is spread over one program an SM; pieces keep enough keys; a full step is not cut."""
    assert ops.even_splits(16, 132, 32768, 128, only_decodes=False) == 7  # 112 programs for 132 SMs
    assert ops.even_splits(16, 132, 500, 128, only_decodes=False) == 1
    assert ops.even_splits(8 * 33, 132, 32768, 128, only_decodes=False) == 1
    assert ops.even_splits(8, 132, 32768, 128, only_decodes=True) == splits.choose(8, 132, 32768, 128) > 8


@pytest.mark.parametrize(
    "chunks, tiles", [([(1, 600)], 1), ([(1, 600)] * 3, 3), ([(1, 600), (0, 9), (0, 9)], 1), ([(32, 600)], 1)]
)
def test_a_step_is_cut_by_the_tiles_that_have_work(chunks, tiles, device, monkeypatch):
    """For the rule only those count, not the ones that the grid holds ready."""
    asked, rule = [], ops.even_splits
    monkeypatch.setattr(ops, "even_splits", lambda *sizes: asked.append(sizes) or rule(*sizes))
    ops.ragged_attention(*ref.RaggedCase("", chunks, dtype=F16).tensors(device))
    ((programs, _, *rest),) = asked
    assert (programs, *rest) == (2 * tiles, 608, 64, chunks != [(32, 600)])


PIECES = ref.RaggedCase("", [(1, 500), (1, 128), (1, 129), (0, 7), (1, 1), (1, 700)], dtype=BF16)


@pytest.fixture
def four_pieces(four_pieces, monkeypatch):
    """Also where a step has chunks, and not from the rule's memory."""
    monkeypatch.setattr(ops, "even_splits", lambda *_: four_pieces)
    return four_pieces


@pytest.mark.parametrize("chunk", [(0, 7), (70, 150)], ids=["decodes", "with a chunk"])
def test_pieces_have_a_least_length(chunk, device, four_pieces, monkeypatch):
    nan_in_fresh_memory(monkeypatch)
    tensors = replace(PIECES, chunks=[*PIECES.chunks, chunk]).tensors(device)
    assert_matches(ops.ragged_attention(*tensors), ref.ragged_attention, *tensors)


@pytest.mark.skipif(not kernels.INTERPRETED, reason="watched in the interpreter of this process")
def test_only_long_sequences_are_cut_further(four_pieces):
    """Which pieces have work, by the keys that programs walked: 64 a turn."""
    arguments = dict(zip(NAMES, PIECES.tensors()))
    _, walk = trace.watch("kernels.batching", "attend_tile", "ragged_attention", arguments)
    turns = Counter((step.program[0] // 2, step.program[1]) for step in walk if step.program[0] % 2)  # of a KV head
    by_tile = [[turns[tile, piece] for piece in range(4)] for tile in sorted({tile for tile, _ in turns}, reverse=True)]
    second = {1: [2, 0, 0, 0], 2: [1, 1, 0, 0]}[four_pieces]
    assert by_tile == [[2, 2, 2, 2], second, [2, 1, 0, 0], [1, 0, 0, 0], [3, 3, 3, 2]]


@pytest.mark.skipif(not kernels.INTERPRETED, reason="watched in the interpreter of this process")
def test_long_tiles_start_first():
    """The first programs have the last tile of the chunk, one for each of two KV heads; the decode comes at the end."""
    arguments = dict(zip(NAMES, ref.RaggedCase("", [(1, 40), (200, 200)], dtype=BF16).tensors()))
    _, walk = trace.watch("kernels.batching", "attend_tile", "ragged_attention", arguments)
    turns = Counter(step.program for step in walk)
    assert [turns[number, 0, 0] for number in range(10)] == [4, 4, 3, 3, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("num_splits", [0, -1, 1.5, "2"])
def test_bad_number_of_splits_is_named(num_splits, device):
    tensors = ref.RaggedCase("", [(1, 5)]).tensors(device)
    with pytest.raises(ValueError, match=r"^num_splits: got .* expected "):
        ops.ragged_attention(*tensors, num_splits=num_splits)


@pytest.mark.parametrize("name, dim", [("k_pages", 1), ("v_pages", 1), ("k_pages", 3), ("q", 2)])
def test_offsets_of_64_bits(name, dim, device):
    """Pages whose tokens lie far apart, as in [page_size, P, Hkv, D], and a large stride inside the head."""
    tensors = ref.RaggedCase("", [(5, 70), (1, 33)], dtype=F16).tensors(device)
    spread = [far_apart(x, dim) if n == name else x for n, x in zip(NAMES, tensors)]
    assert_matches(ops.ragged_attention(*spread), ref.ragged_attention, *tensors)


def test_reference_is_torchs_attention():
    """One sequence at a time, through torch's own attention on the contiguous keys that the pages were cut from."""
    case = ref.RaggedCase("", [(5, 9), (1, 20), (4, 4)], dtype=F32, num_q_heads=6)
    q, k_pages, v_pages, table, q_starts, kv_lens = case.tensors()
    got, starts = ref.ragged_attention(q, k_pages, v_pages, table, q_starts, kv_lens), q_starts.tolist()
    for b, (start, end) in enumerate(itertools.pairwise(starts)):
        n, rows = int(kv_lens[b]), end - start
        slots = [int(table[b, i // 16]) * 16 + i % 16 for i in range(n)]
        k, v = (x.reshape(-1, 2, 64)[slots].transpose(0, 1)[None] for x in (k_pages, v_pages))  # [1, Hkv, n, D]
        keep = torch.ones(rows, n, dtype=torch.bool).tril(n - rows)
        want = torch.nn.functional.scaled_dot_product_attention(
            q[start:end].transpose(0, 1)[None], k, v, attn_mask=keep, enable_gqa=True
        )
        torch.testing.assert_close(got[start:end], want[0].transpose(0, 1))


def test_what_lies_in_other_pages_does_not_matter(device):
    """Pages of nobody are NaN already; here the table's unused entries point to pages that do not exist."""
    q, k_pages, v_pages, table, q_starts, kv_lens = ref.RaggedCase("", [(5, 9), (1, 20)], dtype=F32).tensors(device)
    wide = torch.cat([table, torch.full_like(table, 2**30)], 1)
    got = ops.ragged_attention(q, k_pages, v_pages, wide, q_starts, kv_lens)
    assert torch.equal(got, ops.ragged_attention(q, k_pages, v_pages, table, q_starts, kv_lens))


def varlen_of_torch(q, k, v, q_starts, k_starts, max_q, max_k, *, window_size, enable_gqa=False):
    """What torch's varlen_attn computes, causal and bottom-right, one sequence after the other."""
    assert window_size == ((-1, -1) if max_q == 1 else (-1, 0))  # one query of each: no mask, or it gets slow
    spans = [list(itertools.pairwise(starts.tolist())) for starts in (q_starts, k_starts)]
    assert [max(end - start for start, end in span) for span in spans] == [max_q, max_k]
    parts = [attention(q[None, a:b], k[None, c:d], v[None, c:d])[0] for (a, b), (c, d) in zip(*spans)]
    return torch.cat(parts)


@pytest.mark.parametrize("knows_gqa", [True, False], ids=["torch 2.13", "torch 2.11"])
def test_packed_keys_for_torchs_varlen(knows_gqa, monkeypatch):
    def older(*inputs, window_size):
        return varlen_of_torch(*inputs, window_size=window_size)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of_torch if knows_gqa else older)
    for chunks in ([(5, 9), (1, 40), (0, 3), (17, 17)], [(1, 9), (1, 40), (0, 3)]):
        tensors = ref.RaggedCase("", chunks, dtype=F32).tensors()
        prepare = ref.PEERS["torch varlen, packed"]
        assert_matches(prepare(**dict(zip(NAMES, tensors)))(), ref.ragged_attention, *tensors)
    if not knows_gqa:
        with pytest.raises(ValueError, match=r"^varlen_attn of torch .* takes no block table"):
            ref.PEERS["torch varlen"](**dict(zip(NAMES, tensors)))


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


GOOD = dict(
    q=torch.zeros(4, 4, 64), k_pages=torch.zeros(3, 16, 2, 64), v_pages=torch.zeros(3, 16, 2, 64),
    block_table=ints(0, 1, 2, -1).reshape(2, 2), q_starts=ints(0, 3, 4), kv_lens=ints(20, 16),
)  # fmt: skip
BAD = {
    "q: two dimensions": ("q", torch.zeros(4, 64)),
    "q: heads do not divide": ("q", torch.zeros(4, 5, 64)),
    "k_pages: other head_dim": ("k_pages", torch.zeros(3, 16, 2, 32)),
    "v_pages: other dtype": ("v_pages", torch.zeros(3, 16, 2, 64, dtype=F16)),
    "block_table: int64": ("block_table", torch.zeros(2, 2, dtype=torch.int64)),
    "block_table: no such page": ("block_table", ints(0, 3, 2, -1).reshape(2, 2)),
    "block_table: other batch": ("block_table", ints(0, 1).reshape(1, 2)),
    "kv_lens: too long": ("kv_lens", ints(20, 33)),
    "q_starts: int64": ("q_starts", torch.tensor([0, 3, 4])),
    "q_starts: nothing": ("q_starts", ints()),
    "q_starts: falls": ("q_starts", ints(0, 5, 4)),
    "q_starts: begins late": ("q_starts", ints(1, 3, 4)),
    "q_starts: ends early": ("q_starts", ints(0, 2, 3)),
}


@pytest.mark.parametrize("function", [ops.ragged_attention, ref.ragged_attention], ids=["kernel", "reference"])
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what, function, device, monkeypatch):
    monkeypatch.setenv("LAB_CHECK", "1")
    name, value = BAD[what]
    with pytest.raises(ValueError, match=rf"^{name}\b.*got .* expected "):
        function(**{key: x.to(device) for key, x in (GOOD | {name: value}).items()})


# ---- a real model under every policy


def test_every_policy_writes_the_same_text():
    """Greedy tokens of a small model in fp64, against decoding each prompt alone without cache or pages."""
    model, rng = study.small_model(dtype=torch.float64, hidden=64, layers=2), random.Random(0)
    prompts = [[rng.randrange(258) for _ in range(rng.randrange(3, 25))] for _ in range(5)] + [[7] * 13] * 2
    lengths = [rng.randrange(2, 14) for _ in prompts]
    want = []
    for prompt, n in zip(prompts, lengths):
        ids = list(prompt)
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        want.append(ids[len(prompt) :])
    for policy in ref.POLICIES:
        for num_pages, max_tokens in ((40, 64), (9, 30)):
            step = study.ModelStep(model, num_pages, 4, ref.ragged_attention)
            memory = dict(num_pages=num_pages, page_size=4, max_batch=4, max_tokens=max_tokens, watermark=0.0)
            got, _ = study.generate(step, prompts, lengths, policy, **memory)
            assert got == want, (policy, num_pages)


def test_measured_steps_are_real_steps():
    step = study.ModelStep(study.small_model(hidden=32, layers=1), 8, 16, ref.ragged_attention)
    samples = study.measure_steps(step, [(1, 8, 0), (2, 8, 5), (0, 8, 9)], repeats=1)
    assert [(t, k) for t, k, _ in samples] == [(1, 8), (7, 21), (9, 9)]
    assert all(seconds > 0 for *_, seconds in samples)
    assert not step.k_pages[:, 0].isnan().all()


def test_studies_run_in_small():
    """The same functions as the recorded experiment, on a few requests."""
    rungs = study.ladder(128, 40)
    assert list(rungs) == list(study.LADDER)
    assert len({summary["tokens"] for summary in rungs.values()}) == 1  # the same work everywhere
    sweep = study.rate_sweep(60, rates=(0.5, 8.0))
    for by_rate in sweep.values():
        assert by_rate[8.0]["normalised latency"] > by_rate[0.5]["normalised latency"]
    assert {trace.num_tokens for trace in study.stalls(count=20).values()} == {
        sum(r.output_len for r in ref.long_prompts(2.0, 20))
    }


def test_player_shows_the_run():
    """What stands in the player is what the scheduler did, and under pages somebody is preempted."""
    html = study.batching_player().html
    settings = dict(num_pages=7, page_size=4, max_batch=3, max_tokens=8)
    runs = {name: study.watch(study.PLAYED, **settings, **o) for name, o in study.PLAYED_POLICIES.items()}
    for name, seen in runs.items():
        assert seen[-1]["tokens"] == sum(r.output_len for r in study.PLAYED), name
        assert max(len(step["owner"]) for step in seen) <= 7
    assert len(runs["static"]) > len(runs["continuous, paged"]) > len(runs["chunked, paged"])
    assert any(step["batch"].preempted for step in runs["continuous, paged"])
    assert "is preempted" in html
    assert "of padding computed" in html
    assert "0 of 7" in html, "the run is over: no page is anybody's"
    assert f"all done after {len(runs['chunked, paged'])} iterations" in html


@pytest.mark.parametrize("policy", study.PLAYED_POLICIES)
def test_live_cell(policy):
    assert "33 tokens in" in study.try_policy(policy, 3, 7)
    assert "33 tokens in" not in study.try_policy(policy, 3, 1)  # most are refused


def test_slots_show_what_ran():
    """Every computed row stands in one cell, a request keeps its place, and nobody sits on another's."""
    for name, options in study.PLAYED_POLICIES.items():
        seen = study.watch(study.PLAYED, num_pages=7, page_size=4, max_batch=3, max_tokens=8, **options)
        grid = batching_slots.slots(seen, 3)
        for i, step in enumerate(seen):
            cells = [row[i] for row in grid if row[i]]
            batch = step["batch"]
            said = [(id, "prefill") for id, *_ in batch.prefill] + [(id, "decode") for id in batch.decode]
            assert sorted(cells) == sorted(said), name
            if i and name == "static":
                before = {row[i - 1][0]: place for place, row in enumerate(grid) if row[i - 1]}
                assert all(before.get(row[i][0], place) == place for place, row in enumerate(grid) if row[i])


def test_slots_are_drawn_and_counted():
    seen = study.watch(study.PLAYED, num_pages=12, page_size=4, max_batch=3, max_tokens=16, policy="static", reserve="max")
    ax = batching_slots.draw({"one": seen, "two": seen}, 3).axes[0]
    words = [text.get_text() for text in ax.texts]
    busy = sum(len(step["batch"].prefill) + len(step["batch"].decode) for step in seen)
    assert f"{len(seen)} steps\n{3 * len(seen) - busy} idle cells" in words
    assert words.count("idle") == 3 * len(seen) - busy
    assert words.count("the next batch enters") == 1


PLANTED_BUGS = [
    ("labkit/scheduler.py", "        s.rows -= len(batch.preempted)\n", ""),
    ("labkit/scheduler.py", "longest > self.max_len", "longest >= self.max_len"),
    ("labkit/scheduler.py", "request.prompt_len > self.max_tokens", "request.prompt_len >= self.max_tokens"),
    ("labkit/scheduler.py", "if not chunks and used and used + run", "if not used and used + run"),
    ("labkit/scheduler.py", 'reserve != "paged" if mixed is None else mixed', 'reserve != "paged"'),
    ("labkit/scheduler.py", 'watermark = watermark if reserve == "paged" else 0.0', "pass"),
    ("labkit/scheduler.py", "expect(len(tokens) == need,", "expect(True,"),
    ("labkit/scheduler.py", "next(iter(self.waiting.values()), None)", "next(reversed(self.waiting.values()), None)"),
    ("labkit/scheduler.py", "return min(most, request.prompt_len + (1", "return max(0, request.prompt_len + (1"),
    ("labkit/scheduler.py", "run.computed = run.room = 0\n        run.preemptions", "run.computed = run.room = run.generated = 0\n        run.preemptions"),
    ("labkit/scheduler.py", "target = run.request.prompt_len + run.generated\n        need", "target = run.request.prompt_len\n        need"),
    ("labkit/scheduler.py", "self.waiting.move_to_end(run.id, last=False)", "pass"),
    ("labkit/scheduler.py", "victim = next(reversed(self.running.values()))", "victim = next(iter(self.running.values()))"),
    ("labkit/scheduler.py", "self.max_batch - len(self.running) - len(self._leaving)", "self.max_batch - len(self.running)"),
    ("labkit/scheduler.py", "if run.computed == run.target:\n                run.generated += 1", "if run.computed == run.target:\n                run.generated += 0"),
    ("labkit/scheduler.py", "if run.computed < run.target:\n                continue", "if run.computed < 0:\n                continue"),
    ("labkit/scheduler.py", "if run.computed == run.room and not", "if run.computed > run.room and not"),
    ("labkit/scheduler.py", "if len(decode) == left:", "if len(decode) == left + 1:"),
    ("labkit/scheduler.py", "            self.pool.free(run.id)\n            del self.running[run.id]\n        else", "            del self.running[run.id]\n        else"),
    ("labkit/scheduler.py", "need = self._reservation(request) or longest - 1", "need = request.prompt_len"),
    ("labkit/scheduler.py", "self._leaving.append(run)", "self.pool.free(run.id)"),
    ("labkit/scheduler.py", "s.forming, batch.padding = False, s.rows - len(s.running)", "batch.padding = s.rows - len(s.running)"),
    ("labkit/scheduler.py", "or now >= s.wake", "or now > s.wake"),
    ("labkit/scheduler.py", "(1 << (request.output_len - 1).bit_length())", "(1 << request.output_len.bit_length())"),
    ("labkit/simulate.py", "waking = scheduler.wake if scheduler.wake > clock else math.inf", "waking = math.inf"),
    ("labkit/simulate.py", "drawn[drawn <= cap]", "drawn.clip(1, cap)"),
    ("labkit/simulate.py", "for id in batch.ending:", "for id, *_ in batch.prefill:"),
    ("kernels/batching.py", "first = tl.load(q_starts_ptr + middle) // BLOCK_Q + middle", "first = tl.load(q_starts_ptr + middle) // BLOCK_Q"),
    ("kernels/batching.py", "key[None, :] <= position[:, None]", "key[None, :] < position[:, None]"),
    ("kernels/batching.py", "position = query + kv_len - q_len", "position = query"),
    ("kernels/batching.py", "tl.minimum(tile * BLOCK_Q + BLOCK_Q, q_len)", "tl.minimum(tile * BLOCK_Q, q_len)"),
    ("kernels/batching.py", "tl.maximum(last, 0)", "kv_len // BLOCK_N * BLOCK_N + BLOCK_N"),
    ("kernels/batching.py", "(offs_m % GROUP < group)", "(offs_m % GROUP < GROUP)"),
    ("kernels/batching.py", "pid_h // TILES * stride_kh", "pid_h * stride_kh"),
    ("kernels/batching.py", "head = pid_h * group + offs_m % GROUP", "head = pid_h * GROUP + offs_m % GROUP"),
    ("kernels/batching.py", "rows = (q_start + query)", "rows = query"),
    ("kernels/batching.py", "length_of_pieces(end, num_splits, even, PIECE, BLOCK_N)", "tl.cdiv(end, num_splits) // BLOCK_N * BLOCK_N"),
    ("kernels/batching.py", "length_of_pieces(end, num_splits, even, PIECE, BLOCK_N)", "length_of_pieces(end, num_splits, 1, PIECE, BLOCK_N)"),
    ("kernels/batching.py", "length_of_pieces(end, num_splits, even, PIECE, BLOCK_N)", "length_of_pieces(end, num_splits, even, 0, BLOCK_N)"),
    ("kernels/batching.py", "(pid_s == 0) | (start < end)", "start < end"),
    ("kernels/batching.py", "number = tl.num_programs(0) - 1 - tl.program_id(0)", "number = tl.program_id(0)"),
    ("kernels/batching.py", "[(num_tiles * num_heads, num_splits)]", "[(num_tiles * num_heads - 1, num_splits)]"),
    ("kernels/batching.py", "end = tl.minimum(start + split_len, end)", "end = start + split_len"),
    ("kernels/batching.py", "head * stride_oh + pid_s * stride_os", "head * stride_oh"),
    ("kernels/batching.py", "lse, mask=mask_m)", "lse)"),
    ("kernels/batching.py", "range(start, end, BLOCK_N)", "range(0, end, BLOCK_N)"),
    ("kernels/batching.py", "stride_tp, start, end, PAGE_SIZE", "stride_tp, 0, end, PAGE_SIZE"),
    ("kernels/batching.py", "min(batch, num_tokens))  # tiles", "batch)  # tiles"),
    ("kernels/batching.py", "    if only_decodes:\n        return", "    if False:\n        return"),
    ("kernels/batching.py", "cdiv(max_kv_len, SPLIT_KEYS)", "max_kv_len // SPLIT_KEYS + 9"),
    ("kernels/batching.py", "(key % PAGE_SIZE).to(tl.int64)", "(offs_n % PAGE_SIZE).to(tl.int64)"),
    ("kernels/batching.py", "// config[\"BLOCK_Q\"] + batch, num_kv_heads * tiles", "// config[\"BLOCK_Q\"] + 1, num_kv_heads * tiles"),
    ("labkit/args.py", "starts == sorted(starts) and", ""),
]
