import copy
import functools
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kernels.engine as ops
from labkit import batching, corpus, engine_ring, engine_study, fusion, paged_attention, torch_ops
from labkit import model as models
from labkit.attention import attention
from labkit.batching import POLICIES
from labkit.check import assert_matches
from labkit.decode_graphs import DecodeGraphs
from labkit.engine import Engine, fused_hidden, sample, uniform
from labkit.model import Config, Llama
from labkit.notebooks import CHAPTERS

VOCAB = 29


@functools.cache
def tiny(dtype=torch.float64, **changes):
    """Random weights, two layers, grouped queries. In fp64 no margin between two tokens is too small to decide."""
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = Llama(Config(**sizes | changes)).to(dtype).eval()
    for parameter in model.parameters():  # wide enough that texts do not end in one token repeated
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


# ---- sampling


def plainly(logits, temperature, top_k, top_p, u):
    """`sample` for one row, word by word."""
    if temperature == 0:
        return int(logits.argmax())
    p = torch.softmax(logits.double() / temperature, -1).tolist()
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))[:top_k]
    total, kept, reached = sum(p[i] for i in ranked), [], 0.0
    for i in ranked:
        if reached / total >= top_p:
            break
        kept.append(i)
        reached += p[i]
    below = 0.0
    for i in kept:
        below += p[i]
        if u * reached < below:
            return i
    return kept[-1]


def test_sample_is_what_its_docstring_says():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((400, 12)) * 3)
    temperature = torch.from_numpy(rng.choice([0.0, 0.3, 1.0, 2.0], 400))
    top_k = torch.from_numpy(rng.choice([1, 2, 5, 12], 400))
    top_p = torch.from_numpy(rng.choice([0.01, 0.5, 0.9, 1.0], 400))
    u = torch.from_numpy(rng.random(400))
    got = sample(logits, temperature, top_k, top_p, u).tolist()
    rows = zip(logits, temperature.tolist(), top_k.tolist(), top_p.tolist(), u.tolist())
    assert got == [plainly(*row) for row in rows]


def test_sample_has_the_right_distribution():
    """With u on a grid every token gets its probability, to one grid step at each end of its interval."""
    logits, n = torch.tensor([[0.3, -1.0, 2.0, 0.3, -30.0]]), 10_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    settings = (torch.full((n,), x, dtype=torch.float64) for x in (0.7, 5, 1.0))
    counts = torch.bincount(sample(logits.expand(n, -1), *settings, u), minlength=5)
    assert ((counts / n - (logits[0].double() / 0.7).softmax(-1)).abs() < 2 / n).all()
    edge = torch.tensor([1 - 2**-53], dtype=torch.float64)  # the largest number that is drawn
    last = sample(logits, *(torch.tensor([x], dtype=torch.float64) for x in (0.7, 3, 0.9)), edge).item()
    assert last == 0, "the second of the two that make 0.9"


def test_sample_draws_where_the_logits_lie():
    settings = (torch.tensor([x, x], dtype=torch.float64, device="meta") for x in (1, 3, 0.9, 0.5))
    assert sample(torch.zeros(2, 9, device="meta"), *settings).device.type == "meta"


def test_draws_depend_on_seed_and_position_only():
    assert uniform(5, 9) == uniform(5, 9)
    numbers = [uniform(seed, position) for seed in range(60) for position in range(60)]
    assert len(set(numbers)) == 3600
    assert 0 <= min(numbers)
    assert max(numbers) < 1
    assert abs(np.mean(numbers) - 0.5) < 0.02
    uniform(2**64 - 1, 0)


def test_a_seed_of_its_own():
    """Without a seed a request draws with its id; the largest seed is one."""
    engine, draws = Engine(tiny(), num_pages=32), dict(temperature=1.5)
    ids = [engine.add((1, 2), 8, **draws) for _ in range(2)] + [engine.add((1, 2), 8, **draws, seed=2**64 - 1)]
    while not all(map(engine.is_over, ids)):
        engine.step()
    for id, seed in zip(ids, (0, 1, 2**64 - 1)):
        assert engine.pop(id) == alone((1, 2), 8, seed=seed, **draws)


# ---- what is written


@functools.cache
def alone(prompt, length, temperature=0.0, top_k=VOCAB, top_p=1.0, seed=0, stop=(), model=None):
    """The text of a request served by nobody: the whole sequence through the model for every token, no cache."""
    model, tokens = model or tiny(), list(prompt)
    with torch.no_grad():
        for _ in range(length):
            logits = model(torch.tensor([tokens]))[0, -1]
            tokens.append(plainly(logits, temperature, top_k, top_p, uniform(seed, len(tokens))))
            if tokens[-1] in stop:
                break
    return tokens[len(prompt) :]


def random_engine(rng, policy):
    page_size = rng.choice([1, 2, 3, 4, 8])
    settings = dict(num_pages=-(-rng.randint(30, 60) // page_size), page_size=page_size)
    settings |= dict(max_batch=rng.randint(1, 6), max_tokens=rng.choice([13, 20, 64]), policy=policy)
    settings |= rng.choice([dict(), dict(), dict(prefix_caching=False), dict(reserve="max"), dict(mixed=True)])
    return Engine(tiny(), **settings, watermark=rng.choice([0.0, 0.1]), window=0.0)


def random_request(rng):
    """(prompt, length, sampling); many prompts begin alike."""
    start = rng.choice([(), (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 9, 9, 9, 9, 9)])
    prompt = start + tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 4 if start else 12)))
    draw = dict(temperature=rng.choice([0.5, 1.5]), top_k=rng.choice([3, VOCAB]), top_p=rng.choice([0.8, 1.0]))
    sampling = rng.choice([dict(), draw | dict(seed=rng.randrange(99))])
    return prompt, rng.randint(1, 14), sampling | rng.choice([dict(), dict(stop=(rng.randrange(VOCAB), 3))])


@pytest.mark.parametrize("policy", POLICIES)
def test_everybody_gets_the_text_that_it_would_get_alone(policy):
    """Whatever the pool, the order of arrival, who is preempted and who gives up."""
    rng, preempted, cancelled, shared = random.Random(policy), 0, 0, 0
    for _ in range(14):
        engine, want, told = random_engine(rng, policy), {}, {}
        pool = engine.scheduler.pool
        to_come = rng.randint(3, 12)
        while to_come or not all(map(engine.is_over, want)):
            for _ in range(min(to_come, rng.choice([0, 0, 1, 2, 9]))):
                prompt, length, sampling = random_request(rng)
                id = engine.add(prompt, length, **sampling)
                want[id], told[id] = alone(prompt, length, **sampling), []
                to_come -= 1
            if want and rng.random() < 0.06:
                cancelled += engine.cancel(rng.choice(list(want)))
            for id, token in engine.step().items():
                told[id].append(token)
            engine.scheduler.check()
            shared += max(pool.ref_counts) > 1
        engine.step()
        assert pool.num_free == pool.num_pages
        assert not pool.seq_ids
        for id, text in want.items():
            preempted += engine.scheduler.preemptions(id)
            over, got = engine.state(id), engine.pop(id)
            assert got == told[id], "what step() said is not what output() says"
            assert got == text if over == "finished" else got == text[: len(got)]
        assert not engine._jobs
        assert not engine.scheduler.finished
    assert cancelled > 5
    assert shared > 5
    assert preempted > 3 or (policy == "static" and preempted > 0), "the pools were too large to prove anything"


@functools.cache
def teacher(dtype=torch.float32):
    return models.load(dtype=dtype)[0]


class Listening(Engine):
    """Keeps the logits that tokens were chosen from: {id: [of each token]}."""

    def _draw(self, ids, logits):
        self.heard = getattr(self, "heard", {})
        for id, row in zip(ids, logits):
            self.heard.setdefault(id, []).append(row.clone())
        return super()._draw(ids, logits)


def text_of(count, seed=1):
    return engine_study.workload(count, seed=seed)


@torch.no_grad()
def test_fp32_margins_are_measured():
    """In fp32 sums in another order differ in the last digits. Equal texts are no luck where every margin between the
    two likeliest tokens is larger than what the two ways of computing differ by."""
    model, (prompts, _) = teacher(), text_of(4)
    wanted = [engine_study.one_by_one(model, prompt, 20) for prompt in prompts]
    for policy in ("static", "chunked"):
        engine = Listening(model, num_pages=48, max_tokens=100, max_batch=3, policy=policy)
        texts, error = engine.generate(prompts, max_new_tokens=20, stop=()), 0.0
        for id, (prompt, text, (want, margins)) in enumerate(zip(prompts, texts, wanted)):
            assert text == want
            logits = model(torch.tensor([prompt + text[:-1]]))[0, len(prompt) - 1 :]
            error = (logits - torch.stack(engine.heard[id])).abs().max().item()
            assert 2 * error < min(margins), f"a tie: margin {min(margins)}, difference {error}"


@torch.no_grad()
def test_bf16_takes_a_token_that_is_likeliest_within_rounding():
    """In bf16 margins may be smaller than rounding. What holds then: no chosen token is further below the likeliest
    than twice the error of the model itself in bf16."""
    model, exact, (prompts, _) = teacher(torch.bfloat16), teacher(torch.float64), text_of(4)
    texts = Engine(model, num_pages=64, max_tokens=48).generate(prompts, max_new_tokens=24, stop=())
    for prompt, text in zip(prompts, texts):
        ids = torch.tensor([prompt + text[:-1]])
        truth, plain = (m(ids)[0, len(prompt) - 1 :].double() for m in (exact, model))
        below = truth.max(-1).values - truth.gather(1, torch.tensor(text)[:, None])[:, 0]
        assert below.max() <= 2 * (truth - plain).abs().max()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_checkpoints_of_transformers(kv_heads, tmp_path):
    """Greedy texts are those of `generate` of transformers, which also stops at EOS."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(kv_heads)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, eos_token_id=[7, 11], bos_token_id=1,
    )  # fmt: skip
    hf = LlamaForCausalLM(config).eval()
    hf.save_pretrained(tmp_path)
    prompts = [[5, 6, 8, 9], [1, 2, 3], [30, 31, 32, 33, 34, 35, 36], [4] * 9, [12, 17]]
    want = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        done = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0)
        want.append(done[0, len(prompt) :].tolist())
    engine = Engine(Llama.from_pretrained(tmp_path), num_pages=12, page_size=4, max_batch=3, max_tokens=8)
    assert engine.generate(prompts, max_new_tokens=20) == want
    assert engine.generate(prompts, max_new_tokens=20, stop=())[0][: len(want[0])] == want[0]
    if kv_heads == 1:
        assert any(len(text) < 20 for text in want), "no text ended early: the test proves less than it says"


# ---- requests


def test_stop_tokens():
    prompt, text = (1, 2, 3), alone((1, 2, 3), 12)
    engine = Engine(tiny(), num_pages=20)
    assert engine.generate([prompt], max_new_tokens=12) == [text]
    stop = text[4]
    assert engine.generate([prompt], max_new_tokens=12, stop=[stop]) == [text[: text.index(stop) + 1]]
    ends = Engine(tiny(eos_token_id=stop), num_pages=20)  # the same weights: the seed is in `tiny`
    assert ends.generate([prompt], max_new_tokens=12) == [text[: text.index(stop) + 1]]
    assert ends.generate([prompt], max_new_tokens=12, stop=()) == [text]


def test_why_a_text_ended():
    """Its last token may end it and be the last that was asked for: that is a stop."""
    prompt, text = (1, 2, 3), alone((1, 2, 3), 12)
    first = text.index(text[4]) + 1
    engine = Engine(tiny(), num_pages=99)
    ends = {n: engine.add(prompt, n, stop=[text[4]]) for n in (first - 1, first, first + 1)}
    cancelled = engine.add(prompt, 5)
    assert engine.finish_reason(ends[first]) is None
    engine.step()
    engine.cancel(cancelled)
    while not all(map(engine.is_over, ends.values())):
        engine.step()
    assert [engine.finish_reason(id) for id in ends.values()] == ["length", "stop", "stop"]
    assert engine.finish_reason(cancelled) == "cancelled"
    with pytest.raises(ValueError, match=r"^id: got 77"):
        engine.finish_reason(77)


def test_generate_takes_lengths_arrays_and_seeds():
    engine = Engine(tiny(), num_pages=20)
    prompts = [np.array([1, 2, 3]), torch.tensor([4, 5]), (6,)]
    texts = engine.generate(prompts, max_new_tokens=np.array([3, 1, 5]))
    assert [len(text) for text in texts] == [3, 1, 5]
    assert texts == engine.generate([p.tolist() for p in prompts[:2]] + [[6]], max_new_tokens=[3, 1, 5])
    warm = dict(max_new_tokens=8, temperature=1.0)
    one, two, other = (engine.generate([[1, 2]] * 2, **warm, seed=seed) for seed in (7, 7, 8))
    assert one == two
    assert one[0] != one[1]
    assert one[1] == other[0]
    assert engine.generate([], max_new_tokens=3) == []
    own = Engine(tiny(), num_pages=20).generate([[1, 2]] * 2, **warm, seed=None)
    assert own == [alone((1, 2), 8, temperature=1.0, seed=id) for id in (0, 1)], "as `add`: with the ids"


def test_streams_move_together_and_closing_cancels():
    engine = Engine(tiny(), num_pages=20)
    one, two = engine.stream((1, 2, 3), 6), engine.stream((4, 5), 9)
    assert [next(one), next(one)] == alone((1, 2, 3), 6)[:2]
    assert next(two) == alone((4, 5), 9)[0]
    assert engine.scheduler.generated(1) == 2
    assert list(one) == alone((1, 2, 3), 6)[2:]
    two.close()
    short, long = engine.stream((7, 8), 3), engine.stream((4, 5), 9)
    assert next(short) == alone((7, 8), 3)[0]
    assert list(long) == alone((4, 5), 9)
    assert engine.is_over(2)
    assert list(short) == alone((7, 8), 3)[1:], "who ended while nobody read has it all to tell"
    never_read = engine.stream((7,), 5)
    never_read.close()
    engine.step()
    assert engine.scheduler.pages_used == 0
    assert not engine._jobs
    with pytest.raises(ValueError, match=r"^id: "):
        engine.output(1)


def test_cancel_frees_pages_at_once():
    engine = Engine(tiny(), num_pages=8, page_size=4)
    ids = [engine.add(range(9), 6), engine.add(range(10, 15), 6), engine.add((1,), 2)]
    engine.step()
    used = engine.scheduler.pages_used
    assert engine.cancel(ids[0])
    assert engine.state(ids[0]) == "cancelled"
    assert engine.scheduler.pages_used == used - 3
    assert not engine.cancel(ids[0])
    assert engine.pop(ids[0]) == alone(tuple(range(9)), 6)[:1]
    while not engine.is_over(ids[1]):
        engine.step()
        engine.scheduler.check()
    assert engine.output(ids[1]) == alone(tuple(range(10, 15)), 6)
    assert engine.output(ids[2]) == alone((1,), 2)


def test_prefixes_are_computed_once():
    engine = Engine(tiny(), num_pages=32, page_size=4, max_tokens=64)
    prompt = list(range(18))
    engine.generate([prompt], max_new_tokens=2)
    for follow, cached in (([20, 21], 16), ([], 16), ([20, 21, 22], 20)):  # the 5th page: of the first follow-up
        id = engine.add(prompt + follow, 1)
        engine.step()
        assert engine.batch.prefill == [(id, cached, len(prompt) + len(follow) - cached)]
        assert engine.output(id) == alone(tuple(prompt + follow), 1)
    plain = Engine(tiny(), num_pages=32, page_size=4, prefix_caching=False)
    for _ in range(2):
        id = plain.add(prompt, 1)
        plain.step()
        assert plain.batch.prefill == [(id, 0, 18)]


def test_a_burst_shares_what_one_step_computes():
    """The second prompt finds the pages of the first, which the same step fills; also where the first ends with it."""
    engine = Engine(tiny(), num_pages=32, page_size=4, max_tokens=64)
    prompt = tuple(range(18))
    prompts, lengths = [prompt, (*prompt, 20, 21), prompt], [1, 3, 2]
    ids = [engine.add(p, n) for p, n in zip(prompts, lengths)]
    engine.step()
    assert engine.batch.prefill == [(ids[0], 0, 18), (ids[1], 16, 4), (ids[2], 16, 2)]
    while not all(map(engine.is_over, ids)):
        engine.step()
        engine.scheduler.check()
    assert [engine.output(id) for id in ids] == [alone(p, n) for p, n in zip(prompts, lengths)]
    engine.add(prompt, 1)
    engine.step()
    assert engine.batch.prefill == [(3, 16, 2)], "the prompt of a text that ended at once is still there"


def test_who_leaves_halfway_leaves_only_what_was_computed():
    """6 of 20 tokens of a prompt are computed: of its pages the next one with that prompt finds the first."""
    engine, prompt = Engine(tiny(), num_pages=16, page_size=4, max_tokens=6), tuple(range(20))
    engine.add(prompt, 3)
    engine.step()
    engine.cancel(0)
    again = engine.add(prompt, 3)
    engine.step()
    assert engine.batch.prefill == [(again, 4, 6)]
    while not engine.is_over(again):
        engine.step()
    assert engine.output(again) == alone(prompt, 3)


def test_longer_than_the_model_is_refused():
    engine = Engine(tiny(max_position_embeddings=32), num_pages=99)
    before = state(engine)
    with pytest.raises(ValueError, match=r"^prompt_ids, max_new_tokens: got 33 tokens, expected at most 32"):
        engine.add(range(20), 13)
    assert state(engine) == before
    engine.add(range(20), 12)
    shorter = Engine(tiny(), num_pages=99, max_len=24)
    with pytest.raises(ValueError, match=r"^prompt_ids, max_new_tokens: got 20 tokens and 5 to come.* max_len 24"):
        shorter.add(range(20), 5)
    shorter.add(range(20), 4)


def test_dynamic_waits_for_company():
    engine = Engine(tiny(), num_pages=32, policy="dynamic", max_batch=2, window=0.05)
    id = engine.add((1, 2), 3)
    first = next(iter(engine.scheduler.waiting.values())).request.arrival
    assert engine.step(first) == {}
    assert not engine.batch
    assert list(engine.step(first + 0.06)) == [id]
    engine.cancel(id)
    assert engine.generate([(1, 2)], max_new_tokens=3) == [alone((1, 2), 3)]  # waits, and does not spin for ever
    patient = Engine(tiny(), num_pages=32, policy="dynamic", max_batch=2, window=60.0)
    patient.add((1, 2), 3)
    assert patient.step() == {}, "without a time it takes that of the clock"


def state(engine):
    s = engine.scheduler
    return (
        list(engine._jobs), {id: job.tokens[:] for id, job in engine._jobs.items()}, list(s.waiting), list(s.running),
        s.finished[:], s.pool.free_queue, s.pool.ref_counts, s.pool.cached_pages, list(s._runs),
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, call",
    {
        "prompt_ids": lambda e: e.add([], 3),
        "prompt_ids ": lambda e: e.add([1, VOCAB], 3),
        "prompt_ids  ": lambda e: e.add([1, -1], 3),
        "prompt_ids   ": lambda e: e.add([1.5], 3),
        "prompt_ids    ": lambda e: e.add(7, 3),
        "prompt_ids, max_new_tokens": lambda e: e.add([1] * 20, 20),
        "prompt_ids, max_new_tokens ": lambda e: e.stream([1] * 20, 20),
        "max_new_tokens": lambda e: e.add([1], 0),
        "max_new_tokens ": lambda e: e.add([1], 2.0),
        "max_new_tokens  ": lambda e: e.generate([[1], [2]], max_new_tokens=[1]),
        "max_new_tokens   ": lambda e: e.generate([[1]], max_new_tokens=2.5),
        "max_new_tokens    ": lambda e: e.generate([[1]], max_new_tokens=None),
        "seed ": lambda e: e.generate([[1]], max_new_tokens=2, seed="x"),
        "temperature": lambda e: e.add([1], 3, temperature=-1),
        "temperature ": lambda e: e.add([1], 3, temperature=float("nan")),
        "top_k": lambda e: e.add([1], 3, top_k=0),
        "top_p": lambda e: e.add([1], 3, top_p=0.0),
        "top_p ": lambda e: e.add([1], 3, top_p=1.5),
        "seed": lambda e: e.add([1], 3, seed=-1),
        "stop": lambda e: e.add([1], 3, stop=[99]),
        "id": lambda e: e.cancel(99),
        "id ": lambda e: e.output("x"),
        "id  ": lambda e: e.pop(0),  # it waits
        "prompt_ids, max_new_tokens   ": lambda e: e.generate([[1], [1] * 30], max_new_tokens=9),  # nobody is queued
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_named_and_changes_nothing(name, call):
    engine = Engine(tiny(), num_pages=4, page_size=8, max_tokens=16)
    engine.generate([[1] * 9], max_new_tokens=4)
    engine.add([3, 4], 5)
    before = state(engine)
    with pytest.raises(ValueError, match=rf"^{name.strip()}\b"):
        call(engine)
    assert state(engine) == before
    assert engine.add([5], 2) == 2  # no id was lost


@pytest.mark.parametrize(
    "name, settings",
    {
        "ops": dict(ops=SimpleNamespace(write_kv=1)),
        "policy": dict(policy="fifo"),
        "num_pages": dict(num_pages=0),
        "page_size": dict(page_size=0),
        "max_batch": dict(max_batch=0),
        "max_tokens": dict(max_tokens=0),
        "cuda_graphs": dict(cuda_graphs=True),
    }.items(),
)
def test_bad_setting_is_named(name, settings):
    with pytest.raises(ValueError, match=f"^{name}: "):
        Engine(tiny(), **dict(num_pages=4) | settings)


def test_full_pool_is_no_error():
    """A pool for one request at a time: all the same, everybody is served."""
    engine = Engine(tiny(), num_pages=3, page_size=4, watermark=0.0)
    texts = engine.generate([(1, 2, 3), (4, 5), (6,)], max_new_tokens=9)
    assert texts == [alone(prompt, 9) for prompt in ((1, 2, 3), (4, 5), (6,))]


def test_a_step_that_fails_leaves_an_engine_that_works():
    """A page that was to be full after the step must not be found by others: its last key was never written."""
    fail = False

    def write_kv(*args):
        if fail:
            raise KeyboardInterrupt
        torch_ops.write_kv(*args)

    space = SimpleNamespace(write_kv=write_kv, ragged_attention=torch_ops.ragged_attention)
    engine = Engine(tiny(), num_pages=16, page_size=4, ops=space)
    text = alone((1, 2, 3), 9)
    for steps in range(1, 9):
        id, waits = engine.add((1, 2, 3), 9), None
        for _ in range(steps):
            engine.step()
        fail, waits = True, engine.add((1, 2, 3, *text[:4]), 3)
        engine.scheduler.waiting.move_to_end(waits)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        fail = False
        assert engine.state(id) == "cancelled"
        assert engine.output(id) == text[:steps]
        engine.cancel(waits)
        engine.scheduler.check()
        assert engine.generate([(1, 2, 3, *text)], max_new_tokens=3) == [alone((1, 2, 3, *text), 3)]
    fail, id = True, engine.add((4, 21, 2, 3), 4)  # a step that computes its prompt
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    fail = False
    assert engine.state(id) == "cancelled"
    assert engine.generate([(4, 21, 2, 3)], max_new_tokens=4) == [alone((4, 21, 2, 3), 4)]
    known, fail = list(engine._jobs), True  # `generate` keeps nobody, neither who ran nor who still waited
    with pytest.raises(KeyboardInterrupt):
        engine.generate([(1, 2, 3)] * 99, max_new_tokens=9)
    assert list(engine._jobs) == known
    engine.scheduler.check()
    assert not engine.scheduler.waiting
    assert not engine.scheduler.running


def test_the_scheduler_forgets():
    """A long life leaves nothing behind, and who comes later is still later."""
    s = batching.Scheduler("continuous", 8, 4, max_batch=1, max_tokens=16)
    for i in range(3):
        s.add(batching.Request(i, 0.0, 4, 2))
    with pytest.raises(ValueError, match=r"^id: .*waiting"):
        s.forget(0)
    for i in (0, 1):
        s.cancel(i)
        s.forget(i)
    s.add(batching.Request(3, 0.0, 4, 2))
    s.check()
    assert s.add(batching.Request(0, 0.0, 4, 2))  # the id is free
    while s.step():
        s.check()
    assert s.finished == [2, 3, 0]
    for i in (2, 3, 0):
        s.forget(i)
    assert not s.finished
    assert not s._runs


# ---- operations


NAMES = ("write_kv", "ragged_attention", "paged_decoding", "add_rmsnorm", "rope", "swiglu")
PLAIN = SimpleNamespace(write_kv=paged_attention.write_kv, ragged_attention=batching.ragged_attention)


def counting(namespace):
    """A copy of the namespace that counts calls."""
    calls = dict.fromkeys(NAMES, 0)

    def counted(name, fn):
        def call(*args, **kwargs):
            calls[name] += 1
            return fn(*args, **kwargs)

        return call

    functions = {name: counted(name, getattr(namespace, name)) for name in NAMES if hasattr(namespace, name)}
    return SimpleNamespace(**functions), calls


PROMPTS, LENGTHS = [(1, 2, 3, 4, 5), (6, 7), (8,)], [4, 6, 3]


@pytest.mark.parametrize(
    "changes", [dict(rms_norm_eps=0.1), dict(qk_norm=True), dict(qkv_bias=True)], ids=["llama", "qwen3", "qwen2"]
)
def test_ops_are_interchangeable(changes):
    """The reference, torch's attention, and the fused operations write the same texts."""
    model = tiny(**changes)
    fused = SimpleNamespace(**vars(PLAIN), **{name: getattr(fusion, name) for name in NAMES[3:]})
    fused.paged_decoding = paged_attention.paged_decoding
    want = [alone(prompt, n, model=model) for prompt, n in zip(PROMPTS, LENGTHS)]
    for namespace, used in ((PLAIN, NAMES[:2]), (fused, NAMES)):
        counted, calls = counting(namespace)
        engine = Engine(model, num_pages=16, page_size=4, ops=counted, max_tokens=7)
        assert engine.generate(PROMPTS, max_new_tokens=LENGTHS) == want
        assert {name for name, count in calls.items() if count} == set(used)
    assert Engine(model, num_pages=16, max_tokens=7).generate(PROMPTS, max_new_tokens=LENGTHS) == want
    given = torch.tensor(PROMPTS[:1]), torch.arange(len(PROMPTS[0])), lambda layer, q, k, v: attention(q, k, v)
    torch.testing.assert_close(fused_hidden(model, fused, *given), model.hidden(*given))


def test_the_kernels_as_ops(device):
    """The Triton kernels, all of them, under the engine. fp32: the margins of these texts are far above rounding."""
    model = tiny(torch.float32)
    counted, calls = counting(ops)
    engine = Engine(model.to(device), num_pages=16, page_size=4, ops=counted, max_tokens=7, cuda_graphs=False)
    texts = engine.generate(PROMPTS, max_new_tokens=LENGTHS)
    model.to("cpu")
    for prompt, n, text in zip(PROMPTS, LENGTHS, texts):
        want, margins = engine_study.one_by_one(model, prompt, n)
        assert min(margins) > 1e-3
        assert text == want
    assert all(calls.values())


def test_decode_graphs_pad_and_replay():
    """The part of CUDA graphs that is not CUDA: fixed inputs, padded batches, one recording a size."""
    model, captured = tiny(), []

    def capture(fn):
        result = fn().clone()
        captured.append(len(result))
        assert (fn.args[2] == 0).sum() == (fn.args[0][2] == -1).sum()  # rows that write nothing read nothing
        return lambda: result.copy_(fn()), result

    space = SimpleNamespace(**vars(PLAIN), paged_decoding=paged_attention.paged_decoding)
    engine = Engine(model, num_pages=40, page_size=4, ops=space, max_batch=11)
    engine._graphs = DecodeGraphs(engine._decode, 11, 8, "cpu", capture)
    prompts, lengths = [(i, i + 1, 5) for i in range(11)], [1 + (5 * i) % 13 for i in range(11)]
    for _ in range(2):
        assert engine.generate(prompts, max_new_tokens=lengths) == [alone(p, n) for p, n in zip(prompts, lengths)]
    assert len(captured) == len(set(captured))
    assert set(captured) <= {1, 2, 4, 8, 11}
    assert len(captured) > 3


def test_decode_graphs_keep_their_inputs_where_they_are_told():
    graphs = DecodeGraphs(None, 3, 2, "meta")
    assert {x.device.type for x in (graphs.numbers, graphs.table, graphs.kv_lens)} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU, there is none here")
def test_decode_graphs_on_a_gpu():
    model = tiny(torch.float32).to("cuda")
    settings = dict(max_len=64, cuda_graphs=True), dict(cuda_graphs=False), {}
    engines = [Engine(model, num_pages=64, ops=ops, **options) for options in settings]
    assert [engine._graphs is not None for engine in engines] == [True, False, True], "a GPU has graphs by default"
    with_graphs, without, default = (engine.generate(PROMPTS * 4, max_new_tokens=20) for engine in engines)
    assert with_graphs == without == default


CASES = [
    batching.RaggedCase("mixed", [(17, 17), (1, 70), (33, 90), (1, 1)]),
    batching.RaggedCase("many decodes", [(1, n) for n in range(40, 3, -2)] + [(5, 9)], dtype=torch.float32),
    batching.RaggedCase("empty chunks", [(0, 40), (5, 9), (0, 0), (64, 65)], dtype=torch.float16),
    batching.RaggedCase("page 1, group 6", [(7, 30), (1, 33), (1, 2)], page_size=1, num_q_heads=12),
    batching.RaggedCase("strided", [(20, 66), (1, 5), (1, 77)], head_dim=80, strided=True, sm_scale=0.3),
    batching.RaggedCase("decodes between chunks", [(1, 7), (9, 12), (1, 40), (1, 1), (3, 33)], dtype=torch.float32),
    batching.RaggedCase("decodes, strided", [(1, 5), (1, 77)], dtype=torch.float32, strided=True, sm_scale=0.3),
    batching.RaggedCase("nobody", []),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_torch_attention(case):
    tensors = case.tensors()
    got = torch_ops.ragged_attention(*tensors, sm_scale=case.sm_scale)
    assert_matches(got, batching.ragged_attention, *tensors, sm_scale=case.sm_scale)


def test_layers_may_differ_in_width():
    """As after pruning in width: layer 1 keeps one KV head of two, and its two query heads."""
    model = copy.deepcopy(tiny())
    a = model.layers[1].self_attn
    for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        linear = getattr(a, name)
        linear.weight = torch.nn.Parameter(linear.weight[:rows].clone())
    a.o_proj.weight = torch.nn.Parameter(a.o_proj.weight[:, :16].clone())
    prompts = [(1, 2, 3), (4, 5), (6, 7, 8, 9)]
    texts = Engine(model, num_pages=16, page_size=4).generate(prompts, max_new_tokens=6)
    assert texts == [alone(prompt, 6, model=model) for prompt in prompts]


def test_a_tiny_temperature_is_greedy_and_disturbs_nobody():
    engine = Engine(tiny(), num_pages=16, page_size=4)
    cold, other = engine.add([1, 2], 5, temperature=1e-320, stop=()), engine.add([3], 5, stop=())
    while not (engine.is_over(cold) and engine.is_over(other)):
        engine.step()
    assert engine.output(cold) == alone((1, 2), 5)
    assert engine.output(other) == alone((3,), 5)


def test_torch_write_kv():
    """As the reference, on memory in both orders; a negative slot is skipped."""
    rng = np.random.default_rng(0)
    k, v = (torch.from_numpy(rng.standard_normal((5, 2, 8))) for _ in "kv")
    slots = torch.tensor([7, -1, 0, 11, 3])
    for order in ((0, 1, 2, 3), (1, 2, 0, 3)):
        sizes = (3, 4, 2, 8) if order[0] == 0 else (2, 3, 4, 8)
        pages = [torch.zeros(sizes, dtype=k.dtype).permute(order) for _ in range(4)]
        torch_ops.write_kv(k, v, *pages[:2], slots)
        paged_attention.write_kv(k, v, *pages[2:], slots)
        assert torch.equal(pages[0], pages[2])
        assert torch.equal(pages[1], pages[3])
        assert pages[0].any()
    with pytest.raises(ValueError, match=r"^slots: "):
        torch_ops.write_kv(k, v, *pages[:2], slots + 1)
    k_pages, v_pages = torch.zeros(3, 4, 2, 8, dtype=k.dtype), torch.zeros(4, 3, 2, 8, dtype=k.dtype).transpose(0, 1)
    with pytest.raises(ValueError, match=r"^v_pages .strides.: "):
        torch_ops.write_kv(k, v, k_pages, v_pages, slots)
    assert not k_pages.any()


def test_torch_attention_names_bad_input():
    q, k_pages, v_pages, table, starts, lens = CASES[0].tensors()
    with pytest.raises(ValueError, match=r"^kv_lens: "):
        torch_ops.ragged_attention(q, k_pages, v_pages, table, starts, torch.ones_like(lens))
    with pytest.raises(ValueError, match=r"^q_starts "):
        torch_ops.ragged_attention(q, k_pages, v_pages, table, starts.long(), lens)


# ---- the study


def test_padded_writes_the_same():
    prompts, lengths = [p for p, _, _ in map(random_request, [random.Random(0)] * 7)], [5, 1, 9, 3, 3, 8, 2]
    texts, peak, passes, computed = engine_study.padded(tiny(), prompts, lengths, batch=3)
    assert texts == [alone(prompt, n) for prompt, n in zip(prompts, lengths)]
    widest = [max(map(len, prompts[i : i + 3])) for i in (0, 3, 6)]
    assert passes == 9 + 8 + 2
    assert computed == 3 * (widest[0] + 8) + 3 * (widest[1] + 7) + widest[2] + 1
    assert peak == max(3 * (widest[0] + 9), 3 * (widest[1] + 8)) * 2 * 2 * 2 * 8 * 8  # tokens x k and v x layers x ...


def test_study_runs_in_small():
    rungs = engine_study.ladder(0, count=4)
    assert list(rungs) == list(engine_study.LADDER)
    assert {figures["texts as the first"] for figures in rungs.values()} == {4}
    assert rungs["one at a time"]["passes"] == rungs["one at a time"]["tokens"]
    assert rungs["continuous"]["passes"] <= rungs["static, ragged"]["passes"] <= rungs["one at a time"]["passes"]
    result = engine_study.against_transformers(0, count=4, batches=(2, 4), repeats=1)
    assert result["tokens"] == sum(engine_study.workload(4)[1])
    for batch, other in result["transformers"].items():
        assert other["same texts"] == 4
        longest = max(map(len, engine_study.workload(4)[0]))
        assert batch == "2" or other["peak KV bytes"] <= 4 * (longest + 192) * 8192


@pytest.mark.parametrize("kind", engine_study.WORKLOADS)
def test_workload_is_ragged_and_fits_the_model(kind):
    prompts, lengths = engine_study.workload(96, kind)
    assert max(len(p) + n for p, n in zip(prompts, lengths)) <= 256
    assert {p[0] for p in prompts} == {corpus.BOS}
    assert len({tuple(p[:64]) for p in prompts}) == (4 if kind == "shared" else 96)
    assert max(lengths) > 3 * np.median(lengths)


def test_player_and_demo_show_a_real_run():
    """The texts are those of the engine; a page is shared and somebody is preempted, or there is little to see."""
    model, encode, decode = models.load(models.TEACHER)
    steps = list(engine_study.watch(engine_study.PLAYED_PROMPTS, engine_study.PLAYED_LENGTHS, engine_study.PLAYED))
    assert any(step["batch"].preempted for step in steps)
    assert any(len(who) == 2 for step in steps for who in step["owners"].values())
    prompts = [encode(prompt) for prompt in engine_study.PLAYED_PROMPTS]
    assert not steps[-1]["owners"], "all is done, and no page is anybody's"
    texts = Engine(model, num_pages=99).generate(prompts, max_new_tokens=engine_study.PLAYED_LENGTHS)
    assert list(steps[-1]["texts"].values()) == [decode(text) for text in texts]
    html = engine_study.engine_player().html
    assert f"{len(steps)} of {len(steps)}" in html
    assert "was preempted" in html
    demo = engine_study.live_demo(max_new_tokens=4)
    prompts, pages, _, button, view = demo.children
    prompts.value, pages.value = "    return self.\nimport ", 12
    button.click()
    assert "A finished" in view.value
    assert "B finished" in view.value
    prompts.value = 200 * "too long "
    button.click()
    assert "got 1805 tokens, expected at most 256" in view.value


def test_the_ring_is_a_step():
    """The picture's order, callers and chapters, held against two steps: a prompt that ends at once, then a decode."""
    rows = [(calls[0][0], names, chapter) for calls in engine_ring.STEP.values() for names, chapter in calls]
    drawn = {}  # function: (the first of its part, its chapter)
    for first, names, chapter in rows:
        owner, dot, _ = names.partition(".")  # "BlockPool.allocate, append" are two methods
        for name in names.split(", "):
            drawn[name if "." in name else f"{owner}{dot}{name}" if dot else name] = first, chapter
    callers, files = {}, {}

    def note(frame, event, _):
        name = frame.f_code.co_qualname
        if event == "call" and name in drawn:
            files.setdefault(name, Path(frame.f_code.co_filename).stem)
            chain = callers.setdefault(name, [])
            while frame := frame.f_back:
                chain.append(frame.f_code.co_qualname)

    given = SimpleNamespace(ragged_attention=batching.ragged_attention, rope=fusion.rope, swiglu=fusion.swiglu)
    given.add_rmsnorm, given.write_kv = fusion.add_rmsnorm, paged_attention.write_kv
    given.paged_decoding = paged_attention.paged_decoding
    engine = Engine(tiny(), num_pages=16, page_size=4, ops=given)
    engine.add((1, 2, 3), 5, stop=range(VOCAB), temperature=1.0)
    engine.add((4, 5, 6, 7), 5, stop=())
    sys.setprofile(note)
    try:
        engine.step()
        order = list(callers)
        engine.step()
    finally:
        sys.setprofile(None)
    firsts = list(dict.fromkeys(first for first, _ in drawn.values()))
    assert set(callers) == set(drawn)
    assert [name for name in order if name in firsts] == firsts
    assert {name: callers[name][0] for name in firsts} == dict.fromkeys(firsts, "Engine.step") | {"Engine._hidden": "Engine._forward"}
    for name, (first, chapter) in drawn.items():
        assert name == first or first in callers[name], name
        shown = f"show({name.split('.')[0]}."  # a page that shows the class, or has the name of the file
        made = [page.stem for page in CHAPTERS.glob("[0-9]*.ipynb") if page.stem[3:] == files[name] or shown in page.read_text(encoding="utf-8")]
        assert [int(stem[:2]) for stem in made] == [chapter], name
    words = [text.get_text() for text in engine_ring.draw().axes[0].texts]
    assert all(names in words and f"ch. {chapter}" in words for _, names, chapter in rows)


PLANTED_BUGS = [
    ("labkit/engine.py", "p.cumsum(-1) - p < top_p", "p.cumsum(-1) < top_p"),
    ("labkit/engine.py", "p = p / p.sum(-1, keepdim=True)", "p = p / 1"),
    ("labkit/engine.py", "(reached <= u[:, None]", "(reached < 0 * u[:, None]"),
    ("labkit/engine.py", "counter=[position, 0, 0, 0]", "counter=[0, position, 0, 0]"),
    ("labkit/engine.py", "uniform(job.seed, len(job.tokens))", "uniform(job.seed, len(job.tokens) - job.prompt_len)"),
    ("labkit/engine.py", "ending = set(batch.ending).union(batch.decode)", "ending = {id for id, _, _ in rows}"),
    ("labkit/engine.py", "self.scheduler.abandon()", "pass"),
    ("labkit/engine.py", 'return "stop" if job.tokens[-1] in job.stop', 'return "stop" if job.tokens[-1] not in job.stop'),
    ("labkit/engine.py", 'return state if state == "cancelled" else None', "return None"),
    ("labkit/engine.py", "model.norm.weight, eps=model.norm.eps)[0]", "model.norm.weight)[0]"),
    ("labkit/engine.py", "job.seed = id if job.seed is None", "job.seed = 0 if job.seed is None"),
    ("labkit/scheduler.py", "[*self._last.decode, *(id for id, _, _ in self._last.prefill)]", "self._last.decode"),
    ("labkit/scheduler.py", "self.pool.publish(run.id, run.computed)", "pass"),
    ("labkit/scheduler.py", "allocate(run.id, tokens, publish=False)", "allocate(run.id, tokens)"),
    ("labkit/engine.py", "max_tokens, max_len=max_len,", "max_tokens,"),
    ("labkit/engine.py", "self.scheduler.stop(id)", "pass"),
    ("labkit/engine.py", "for job, length in zip(jobs, lengths):\n            self._request(-1, job, length)", "pass"),
    ("labkit/engine.py", "        finally:\n            self._drop([id])", "        finally:\n            pass"),
    ("labkit/engine.py", "            self.cancel(id)\n            self.pop(id)", "            self.cancel(id)"),
    ("labkit/engine.py", "            self._drop(ids)", "            pass"),
    ("labkit/engine.py", "if not new and self.is_over(id):", "if self.is_over(id):"),
    ("labkit/engine.py", "time.monotonic() if now is None else now", "now"),
    ("labkit/engine.py", "self._tokens if prefix_caching else None", "self._tokens if \"reserve\" not in scheduling else None"),
    ("labkit/engine.py", "self._request(-1, job, max_new_tokens)  # before an id is spent", "pass"),
    ("labkit/engine.py", "* size + p % size", "* size + (p - start) % size"),
    ("labkit/engine.py", "positions += range(start, start + n)", "positions += range(n)"),
    ("labkit/engine.py", "np.array([start + n for _, start, n in rows], np.int32)", "np.array([n for _, start, n in rows], np.int32)"),
    ("labkit/engine.py", "ops.rope(a.q_norm(q), a.k_norm(k), cos, sin)", "ops.rope(q, k, cos, sin)"),
    ("labkit/engine.py", "self.stop if stop is None else", "self.stop if not stop else"),
    ("labkit/engine.py", "None if seed is None else seed + i", "seed"),
    ("labkit/decode_graphs.py", "self.numbers[2, batch:size] = 0, -1", "self.numbers[2, batch:size] = 0, 0"),
    ("labkit/decode_graphs.py", "self.kv_lens[batch:size] = kv_lens, 0", "self.kv_lens[batch:size] = kv_lens, 1"),
    ("labkit/decode_graphs.py", "if size not in self.graphs:", "if True:"),
    ("labkit/torch_ops.py", "<= position[:, None]", "< position[:, None]"),
    ("labkit/torch_ops.py", "torch.arange(kv_len - q_len, kv_len", "torch.arange(q_len"),
    ("labkit/torch_ops.py", "kv_head[:, None] * pool", "0 * kv_head[:, None]"),
    ("labkit/torch_ops.py", "np.arange(num_heads) // (num_heads // num_kv_heads)", "np.arange(num_heads) % num_kv_heads"),
    ("labkit/torch_ops.py", "alpha=scale, out=scores", "alpha=1.0, out=scores"),
    ("labkit/torch_ops.py", "if heads not in known:", "if not known:"),
    ("labkit/engine.py", "logits.double() - logits.amax(-1, keepdim=True).double()", "logits.double()"),
    ("labkit/torch_ops.py", "in_order = rows == list(range(rows[0], rows[0] + len(rows)))", "in_order = True"),
    ("labkit/torch_ops.py", "if bool((slots < 0).any()):", "if False:"),
    ("labkit/scheduler.py", "        self._last = Batch()\n        self.pool.forget_prefixes()", "        self._last = Batch()"),
    ("labkit/scheduler.py", "next(self._numbers))", "len(self._runs))"),
    ("labkit/scheduler.py", "            self.finished.remove(id)\n        del self._runs[id]", "            pass\n        del self._runs[id]"),
    ("labkit/engine_ring.py", '("BlockPool.table", 8)', '("BlockPool.table", 9)'),
    ("labkit/engine_ring.py", '("Engine._draw", 10), ("sample", 10)', '("sample", 10), ("Engine._draw", 10)'),
    ("labkit/engine_study.py", "((keys[:end] >= pads)[:, None] & (keys[:end] <= at))", "(0 * pads[:, None] <= (keys[:end] <= at))"),
]
