from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from far_apart import far_apart
from fresh_memory import nan_in_fresh_memory

import kernels.attention
import kernels.streaming_llm as sl
from labkit import corpus, record, trace
from labkit import streaming_llm as ref
from labkit import streaming_llm_study as study
from labkit.attention import attention, decode_attention
from labkit.check import assert_matches, randn
from labkit.model import TEACHER, Config, Llama, rotate
from labkit.streaming_llm import SinkCache, Stream

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def angles(rows, head_dim):
    angle = torch.arange(rows)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return angle.cos(), angle.sin()


@dataclass(frozen=True)
class Case:
    """A decode step on rings. Slots that hold nothing and angles beyond num_sinks + window are NaN."""

    name: str
    seen: tuple[int, ...]
    num_sinks: int = 4
    window: int = 60
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = F32
    num_splits: int | None = 2
    sm_scale: float | None = None
    strided: bool = False

    def tensors(self, device):
        """The arguments of sink_decoding but for num_splits: (q, k_ring, v_ring, seen), {the rest}."""
        rng, batch, size = np.random.default_rng(0), len(self.seen), self.num_sinks + self.window
        q = randn(rng, batch, self.num_q_heads, self.head_dim, dtype=self.dtype, device=device)
        shape = (batch, size, self.num_kv_heads, self.head_dim)
        k, v = (randn(rng, *shape, dtype=self.dtype, device=device) for _ in "kv")
        for b, n in enumerate(self.seen):
            k[b, max(n, 0) :] = v[b, max(n, 0) :] = float("nan")
        rows = torch.full((2, 3, self.head_dim // 2), float("nan"))
        cos, sin = (torch.cat(pair).to(device) for pair in zip(angles(size, self.head_dim), rows))
        if self.strided:  # other strides everywhere, NaN in between
            q, k, v, cos, sin = (spread(x) for x in (q, k, v, cos, sin))
        seen = torch.tensor(self.seen, dtype=torch.int32, device=device)
        sizes = dict(num_sinks=self.num_sinks, window=self.window, sm_scale=self.sm_scale)
        return (q, k, v, seen), sizes | dict(cos=cos, sin=sin)


def spread(x):
    wide = torch.full((*x.shape[:-2], 2 * x.shape[-1], x.shape[-2]), float("nan"), dtype=x.dtype, device=x.device)
    return wide.transpose(-1, -2)[..., ::2].copy_(x)


CASES = (
    Case("before, at and after the first eviction", (63, 64, 65), dtype=BF16),
    Case("nothing seen, one token, a full turn", (0, 1, 124), dtype=F16),
    Case("only sinks are there yet", (3, 4, 5), window=40),
    Case("no sinks, group 8", (200, 31), num_sinks=0, window=129, num_q_heads=8, num_kv_heads=1, dtype=BF16),
    Case("the window is a single token", (1, 7, 9), num_sinks=6, window=1, dtype=F32),
    Case("head_dim 128, three splits", (1000, 257), window=250, head_dim=128, dtype=BF16, num_splits=3),
    Case("head_dim 256, group 8", (150,), num_sinks=1, window=100, num_q_heads=8, num_kv_heads=1, head_dim=256, dtype=F16),
    Case("head_dim 80", (300, 70), num_sinks=5, window=91, head_dim=80, dtype=F32, num_splits=1),
    Case("head_dim 96, MHA", (129, 128), window=127, num_kv_heads=4, head_dim=96, dtype=BF16),
    Case("head_dim 32, as our model", (10_000,), num_sinks=1, window=127, num_q_heads=8, num_kv_heads=8, head_dim=32),
    Case("head_dim 6", (9,), num_sinks=2, window=5, head_dim=6, dtype=F32, num_splits=1),
    Case("group 64", (190,), num_q_heads=64, num_kv_heads=1, dtype=BF16, num_splits=1),
    Case("group 48 of wide heads", (61,), num_q_heads=48, num_kv_heads=1, head_dim=160, dtype=BF16),
    Case("group 6", (100, 99), num_q_heads=12, dtype=F16, num_splits=3),
    Case("more splits than tiles", (5, 300), num_splits=9),
    Case("strided fp32", (100, 20), strided=True),
    Case("strided bf16, default splits", (64, 4000), strided=True, dtype=BF16, head_dim=128, num_splits=None),
    Case("other scale", (90,), sm_scale=0.7, num_splits=1),
    Case("two billion tokens", (2**31 - 1, 2**31 - 60), num_sinks=3, window=77, dtype=F16),
    Case("no batch", ()),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_kernel(case, device, monkeypatch):
    nan_in_fresh_memory(monkeypatch)
    inputs, options = case.tensors(device)
    got = sl.sink_decoding(*inputs, **options, num_splits=case.num_splits)
    assert_matches(got, ref.sink_decoding, *inputs, **options)
    assert ref.sink_decoding(*inputs, **options)[0].isfinite().all()  # a NaN truth would let everything pass


@pytest.mark.parametrize("far, dim", [("q", 2), ("k", 3), ("v", 1), ("cos", 0), ("sin", 1)])
def test_offsets_of_64_bits(far, dim, device):
    """A ring whose slots lie far apart, and a large stride inside the head."""
    inputs, options = Case("", (100, 64), dtype=F16).tensors(device)
    want = sl.sink_decoding(*inputs, **options, num_splits=2)
    if far in options:
        options[far] = far_apart(options[far], dim)
    else:
        inputs = [far_apart(x, dim) if name == far else x for name, x in zip(("q", "k", "v", "seen"), inputs)]
    assert all(map(torch.equal, sl.sink_decoding(*inputs, **options, num_splits=2), want))


def test_negative_seen_is_no_token(device, monkeypatch):
    """Where values are not looked at, as on a GPU: it counts as 0."""
    monkeypatch.setattr("labkit.args.checks_values", lambda x: False)
    inputs, options = Case("", (0, 70)).tensors(device)
    negative = torch.tensor([-5, 70], dtype=torch.int32, device=device)
    got = sl.sink_decoding(*inputs[:3], negative, **options)
    assert_matches(got, ref.sink_decoding, *inputs, **options)


def kept_tokens(seen, num_sinks, window):
    """The method in one line: which tokens are visible, the current one (the last of `seen`) included."""
    return [i for i in range(seen) if i < num_sinks or i >= seen - window]


@pytest.mark.parametrize("num_sinks, window", [(4, 5), (0, 3), (2, 1), (1, 20)])
def test_ring_and_reference_are_the_definition(num_sinks, window):
    """Token by token: what SinkCache holds and sink_decoding computes is attention over the visible tokens, rotated
    to 0..n-1, whatever the ring looks like. View and ring agree."""
    rng = np.random.default_rng(1)
    k, v, q = randn(rng, 2, 30, 2, 8), randn(rng, 2, 30, 2, 8), randn(rng, 2, 30, 4, 8)
    cos, sin = angles(num_sinks + window, 8)
    cache = SinkCache(num_sinks, window)
    for seen in range(1, 31):
        cache.append(k[:, seen - 1 : seen], v[:, seen - 1 : seen])
        kept = kept_tokens(seen, num_sinks, window)
        n = len(kept)
        assert len(cache) == n <= num_sinks + window
        got_k, got_v, positions = cache.view()
        assert positions.tolist() == list(range(n))
        assert torch.equal(got_k, k[:, kept])
        assert torch.equal(got_v, v[:, kept])
        rotated = rotate(k[:, kept], cos[:n], sin[:n])
        want = decode_attention(
            rotate(q[:, [seen - 1]], cos[n - 1 : n], sin[n - 1 : n])[:, 0], rotated, v[:, kept],
            torch.tensor([n, n], dtype=torch.int32),
        )  # fmt: skip
        counts = torch.tensor([seen, seen], dtype=torch.int32)
        options = dict(num_sinks=num_sinks, window=window, cos=cos, sin=sin)
        got = ref.sink_decoding(q[:, seen - 1], cache.k, cache.v, counts, **options)
        torch.testing.assert_close(got, want)


def numbered(first, count):
    """Keys that say which token they are; values are the negative."""
    k = torch.arange(first, first + count, dtype=F32).view(1, count, 1, 1)
    return k, -k


def test_positions_follow_the_papers_example():
    """Figure 4: the cache holds tokens 0, 1, 2, 3, 6, 7, 8 while token 9 is decoded: positions 0 to 7, not 0 to 9."""
    cache = SinkCache(num_sinks=4, window=4)
    for i in range(10):
        cache.append(*numbered(i, 1))
    k, v, positions = cache.view()
    assert k.flatten().tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert v.flatten().tolist() == [0, -1, -2, -3, -6, -7, -8, -9]
    assert positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert cache.k.flatten().tolist() == [0, 1, 2, 3, 8, 9, 6, 7]  # the ring: only slots were overwritten
    assert ref.ring_positions(torch.tensor([10]), 4, 4).tolist() == [[0, 1, 2, 3, 6, 7, 4, 5]]


def test_a_step_moves_nothing():
    """One slot changes; the memory stays the same from the first token on."""
    cache = SinkCache(2, 5)
    cache.append(*numbered(0, 1))
    where = cache.k.data_ptr(), cache.v.data_ptr()
    for i in range(1, 40):
        before = cache.k.clone()
        cache.append(*numbered(i, 1))
        assert (cache.k != before).flatten().nonzero().flatten().tolist() == [cache.slot(i)]
        assert (cache.k.data_ptr(), cache.v.data_ptr()) == where


def test_random_operations_against_a_list():
    """Appends of any size and evictions, against a list of numbers that is cut by the paper's rule."""
    rng = np.random.default_rng(3)
    for _ in range(60):
        num_sinks, window = int(rng.integers(0, 5)), int(rng.integers(1, 8))
        cache, held, token = SinkCache(num_sinks, window), [], 0
        for _ in range(30):
            n = int(rng.integers(1, 2 * window + 4))
            if rng.random() < 0.3 and n <= num_sinks + window - min(len(held), num_sinks):
                cache.evict_for_space(n)
                excess = max(0, len(held) + n - num_sinks - window)
                held = held[:num_sinks] + held[num_sinks + excess :]
            else:
                cache.append(*numbered(token, n))
                held, token = held + list(range(token, token + n)), token + n
                held = held[:num_sinks] + held[max(num_sinks, len(held) - window) :]
            assert len(cache) == len(held)
            if token:
                k, v, positions = cache.view()
                assert k.flatten().tolist() == held
                assert v.flatten().tolist() == [-x for x in held]
                assert positions.tolist() == list(range(len(held)))
                in_ring = cache.k.flatten()[[cache.slot(i) for i in kept_tokens(cache.seen, num_sinks, window)]]
                assert in_ring.tolist() == held  # so sink_decoding, which knows only `seen`, reads the same


def test_official_sizes():
    """The official cache evicts after the step: with (start_size, recent_size) a token sees start + recent + 1 keys."""
    start, recent = 2, 3
    past, cache = [], SinkCache(start, recent + 1)
    for i in range(12):
        past = past + [i]  # the step attends to all of these
        cache.append(*numbered(i, 1))
        assert cache.view()[0].flatten().tolist() == past
        if len(past) > start + recent:
            past = past[:start] + past[-recent:]


def test_failed_calls_change_nothing():
    cache = SinkCache(1, 4)
    for call in (cache.view, lambda: cache.append(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1))):
        with pytest.raises(ValueError, match=r"got .* expected "):
            call()
    assert len(cache) == 0
    assert cache.k is None
    cache.append(*numbered(0, 7))
    k, v = numbered(7, 1)
    for name, bad in {
        "k": (k.double(), v.double()), "v": (k, v.double()), "k (shape)": (k.repeat(2, 1, 1, 1), v),
        "v (shape)": (k, v[:, :0]),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name.split()[0]}\\b.*got .* expected "):
            cache.append(*bad)
    for n in (-1, 5, 2.0, True):
        with pytest.raises(ValueError, match=r"^n: got .* expected "):
            cache.evict_for_space(n)
    for n in (0, 4):  # the limits: nothing to do, and room for all but the sink
        cache.evict_for_space(n)
        assert cache.view()[0].flatten().tolist() == ([0] if n else [0, 3, 4, 5, 6])


@pytest.mark.parametrize("sizes, name", [((-1, 4), "num_sinks"), ((1, 0), "window"), ((1.0, 2), "num_sinks"), ((1, True), "window")])
def test_sizes_are_checked(sizes, name):
    with pytest.raises(ValueError, match=f"^{name}: got .* expected "):
        SinkCache(*sizes)


GOOD = dict(q=(2, 4, 8), k_ring=(2, 7, 2, 8), v_ring=(2, 7, 2, 8), seen=torch.tensor([3, 20], dtype=torch.int32))
GOOD |= dict(num_sinks=2, window=5, cos=(7, 4), sin=(9, 4))
BAD = {
    "q: two dimensions": ("q", dict(q=(4, 8))),
    "q: integers": ("q", dict(q=torch.zeros(2, 4, 8, dtype=torch.int32))),
    "q: odd head_dim": ("q", dict(q=(2, 4, 9), k_ring=(2, 7, 2, 9), v_ring=(2, 7, 2, 9), cos=(7, 4), sin=(7, 4))),
    "heads do not divide": ("q", dict(q=(2, 5, 8))),
    "k_ring: other size": ("k_ring", dict(k_ring=(2, 8, 2, 8), v_ring=(2, 8, 2, 8))),
    "k_ring: other dtype": ("k_ring", dict(k_ring=torch.zeros(2, 7, 2, 8, dtype=F16))),
    "v_ring: other heads": ("v_ring", dict(v_ring=(2, 7, 1, 8))),
    "seen: int64": ("seen", dict(seen=torch.tensor([3, 4]))),
    "seen: negative": ("seen", dict(seen=torch.tensor([3, -4], dtype=torch.int32))),
    "cos: too few rows": ("cos", dict(cos=(6, 4))),
    "sin: whole head": ("sin", dict(sin=(7, 8))),
    "sin: bf16": ("sin", dict(sin=torch.zeros(7, 4, dtype=BF16))),
    "num_sinks: float": ("num_sinks", dict(num_sinks=2.0)),
    "window: zero": ("window", dict(window=0)),
}


@pytest.mark.parametrize("function", [sl.sink_decoding, ref.sink_decoding], ids=["kernel", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, function, device, monkeypatch):
    monkeypatch.setenv("LAB_CHECK", "1")  # look at values also where they live on a GPU
    name, changed = BAD[case]
    given = {n: torch.zeros(x) if isinstance(x, tuple) else x for n, x in (GOOD | changed).items()}
    given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    tensors = [given.pop(n) for n in ("q", "k_ring", "v_ring", "seen")]
    with pytest.raises(ValueError, match=f"^{name}\\b.*got .* expected "):
        function(*tensors, **given)


# ---- in a model

CONFIG = Config(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
)  # fmt: skip


def small_model(num_layers=2, dtype=torch.float64):
    """Random weights, large enough for attention to matter. In fp64 the angles are, too: what has to be equal is."""
    torch.manual_seed(0)
    model = Llama(replace(CONFIG, num_hidden_layers=num_layers)).to(dtype)
    for p in model.parameters():
        p.data = p.data * (4 if p.dim() == 2 else 1)

    def angles(positions):
        angle = positions.unsqueeze(-1).to(dtype) * model.inv_freq.to(positions.device)
        return angle.cos(), angle.sin()

    model.angles = angles
    return model


def ids(n, seed=0, batch=1):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 50, (batch, n)))


def steps(stream, text):
    return torch.cat([stream(text[:, i : i + 1]) for i in range(text.shape[1])], dim=1)


@pytest.mark.parametrize("num_sinks, window", [(4, 9), (0, 13), (12, 1)])
def test_the_first_steps_equal_dense_attention(num_sinks, window):
    """Until something is evicted nothing is different; with the first eviction it is."""
    model, text = small_model(), ids(20)
    dense, got = model(text), steps(Stream(model, num_sinks, window), text)
    n = num_sinks + window
    torch.testing.assert_close(got[:, :n], dense[:, :n])
    assert (got[:, n] - dense[:, n]).abs().max() > 1e-3


def test_a_stream_lies_where_the_model_does():
    stream = Stream(Llama(CONFIG).to("meta"), 2, 5)
    for n in (3, 1, 4):  # a prompt, a token, a prompt for which something is evicted
        assert stream(ids(n).to("meta")).device.type == "meta"
    assert {cache.k.device.type for cache in stream.caches} == {"meta"}


@pytest.mark.parametrize("num_layers", [1, 2])
def test_recomputation_is_equalled_by_one_layer_only(num_layers):
    """Read the visible tokens afresh. One layer: the same, since its keys and values depend on their token alone. Two:
    the second layer's keys and values were made when tokens now gone were still visible."""
    model, text = small_model(num_layers), ids(25)
    got = steps(Stream(model, 3, 6), text)[:, -1]
    again = model(text[:, kept_tokens(25, 3, 6)])[:, -1]
    if num_layers == 1:
        torch.testing.assert_close(got, again)
    else:
        assert (got - again).abs().max() > 1e-3


def test_a_prompt_goes_in_at_once():
    """As long as nothing is evicted a prompt is the same as its tokens one by one."""
    model, text = small_model(), ids(14, batch=3)
    one_by_one, at_once = Stream(model, 4, 20), Stream(model, 4, 20)
    want = steps(one_by_one, text)
    got = torch.cat([at_once(text[:, a:b]) for a, b in ((0, 6), (6, 7), (7, 14))], dim=1)
    torch.testing.assert_close(got, want)
    assert len(at_once) == len(one_by_one) == 14
    assert at_once.num_bytes == 2 * 2 * 24 * 3 * 2 * 8 * 8  # layers, k and v, slots, batch, KV heads, head_dim, fp64


def test_a_prompt_is_given_room():
    """Tokens that come together see what was kept for them and each other: evict_for_space, then no eviction."""
    model, text = small_model(1), ids(30)
    stream = Stream(model, 2, 10)
    steps(stream, text[:, :25])
    got = stream(text[:, 25:])  # the window keeps 10 - 5 tokens
    visible = [0, 1, *range(20, 30)]
    torch.testing.assert_close(got, model(text[:, visible])[:, -5:])
    assert len(stream) == 12
    with pytest.raises(ValueError, match=r"^n: got 11, expected "):
        stream(text[:, :11])


def test_a_refused_call_leaves_the_stream_as_it_was():
    """Also where room was to be made first: nothing is evicted for a prompt that does not come."""
    model, text = small_model(), ids(40)
    stream, other = Stream(model, 4, 20), Stream(model, 4, 20)
    for x in (stream, other):
        steps(x, text[:, :30])
    for bad in (
        text[:, :9].repeat(2, 1), text[:, :9] + 50, text[:, :9].float(), text[0, :9], text[:, :0], text[:, :1] - 51, text[:1, :1].repeat(2, 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^ids\b.*got .* expected "):
            stream(bad)
    with pytest.raises(ValueError, match=r"^n: got 21, expected "):
        stream(text[:, :21])
    assert len(stream) == 24
    for a, b in zip(stream.caches, other.caches):
        assert a.seen == b.seen == 30
        assert torch.equal(a.k, b.k)
        assert torch.equal(a.v, b.v)
    assert torch.equal(stream(text[:, 30:]), other(text[:, 30:]))


def test_stream_on_the_kernels(device):
    """The same stream with both kernels in place of the references, a prompt in the middle."""
    model, text = small_model(dtype=F32).to(device), ids(12).to(device)

    def logits(**ops):
        stream = Stream(model, 2, 4, **ops)
        return torch.cat([steps(stream, text[:, :7]), stream(text[:, 7:10]), steps(stream, text[:, 10:])], dim=1)

    got = logits(decode=sl.sink_decoding, prefill=kernels.attention.attention)
    torch.testing.assert_close(got, logits(), atol=1e-4, rtol=1e-4)


def test_prefill_mask_is_what_a_cache_with_original_positions_keeps(device):
    """The prefill kernel with window and num_sinks: each query sees the tokens that a SinkCache would hold."""
    rng = np.random.default_rng(5)
    q, k, v = randn(rng, 1, 40, 4, 16, device=device), *(randn(rng, 1, 40, 2, 16, device=device) for _ in "kv")
    got = kernels.attention.attention(q, k, v, window=9, num_sinks=3)
    assert_matches(got, attention, q, k, v, window=9, num_sinks=3)
    cache = SinkCache(3, 9)
    for i in range(40):
        cache.append(k[:, i : i + 1], v[:, i : i + 1])
        held_k, held_v, positions = cache.view()
        n = torch.tensor([len(positions)], dtype=torch.int32, device=device)
        torch.testing.assert_close(got[:, i], decode_attention(q[:, i], held_k, held_v, n)[0])


# ---- the studies


@pytest.mark.parametrize("num_sinks, window", [(4, 70), (0, 33), (3, 1), (1, 200)])
def test_a_pass_over_the_stream_is_its_steps(num_sinks, window):
    """`read` computes at once what a Stream computes token by token, and leaves the same caches behind."""
    model, text = small_model(3), ids(150, batch=2)
    stream, filled = Stream(model, num_sinks, window), Stream(model, num_sinks, window)
    with torch.no_grad():
        got = study.read(model, text, num_sinks, window, stream=filled)
    want = steps(stream, text)
    torch.testing.assert_close(got, want)
    for a, b in zip(filled.caches, stream.caches):
        assert a.seen == b.seen == 150
        torch.testing.assert_close((a.k, a.v), (b.k, b.v))


def test_original_positions_are_a_plain_mask():
    """With original positions nothing is assigned anew: the model rotates as ever, and the mask says who is seen."""
    model, text = small_model(), ids(90)

    def masked(layer, q, k, v):
        return attention(q, k, v, window=20, num_sinks=3)

    with torch.no_grad():
        original = study.read(model, text, 3, 20, original=True)
        torch.testing.assert_close(original, model(text, None, masked))
        assert (original - study.read(model, text, 3, 20)).abs().max() > 1e-3
        without = study.read(model, text, 0, 20, original=True)
        torch.testing.assert_close(without, study.read(model, text, 0, 20))


def test_ways_agree_where_they_have_to():
    """While nothing is evicted all ways read the same text; afterwards each sees what its name says."""
    model, tokens = small_model(), ids(97)[0]
    with torch.no_grad():
        dense, size = study.dense(model, tokens), 24
        for bits in (
            study.reset(model, tokens, size),
            study.reread(model, tokens, size),
            study.cached(model, tokens, 2, size - 2),
        ):
            torch.testing.assert_close(bits[:size], dense[:size])
            assert (bits[size:] - dense[size:]).abs().max() > 1e-3
        after_reset = torch.cat((tokens[:1], tokens[49:73]))
        torch.testing.assert_close(study.reset(model, tokens, size)[48:72], study.dense(model, after_reset))
        half_again = torch.cat((tokens[:1], tokens[37:61]))  # BOS, the newer half, and the half that is predicted
        torch.testing.assert_close(study.reread(model, tokens, size)[48:60], study.dense(model, half_again)[12:])
        at = torch.tensor([24, 60, 95])
        plain, with_bos = (study.recomputed(model, tokens, at, bos=bos, size=size) for bos in (False, True))
        for i, one, two in zip(at.tolist(), plain, with_bos):
            window = tokens[i + 1 - size : i + 2]  # the last `size` tokens, and the one that is predicted
            torch.testing.assert_close(one, study.dense(model, window)[-1])
            window = torch.cat((tokens[:1], window[1:]))
            torch.testing.assert_close(two, study.dense(model, window)[-1])


def test_differences_are_taken_token_by_token():
    rng = np.random.default_rng(6)
    noise, less = randn(rng, 400), 0.1 + 0.02 * randn(rng, 400)
    found = study.difference(noise, noise - less)
    assert found["less"] == pytest.approx(less.mean().item(), abs=1e-6)
    assert found["standard error"] == pytest.approx(less.std().item() / 20, rel=1e-3)
    model, tokens = small_model(), ids(2 * study.SIZE + 1)[0]
    short = [tokens[: study.SIZE + 1], torch.cat((tokens[:1], tokens[study.SIZE + 1 :]))]  # each after BOS
    for length, streams in {study.SIZE: short, 2 * study.SIZE: [tokens]}.items():
        with torch.no_grad():
            plain = torch.cat([study.cached(model, text, 0, 64)[64:] for text in streams])
            original = torch.cat([study.cached(model, text, 4, 60, original=True)[64:] for text in streams])
        assert study.original_positions(model, tokens)[length] == pytest.approx(study.difference(plain, original))


def test_the_slice_on_record():
    """The record's slice is what the committed weights give."""
    if corpus.left_out("held_out"):
        pytest.skip(corpus.differs())
    recorded = record.experiment("streaming_llm").samples[0]["slice"]
    assert study.slice_bits(Llama.from_pretrained(TEACHER)) == pytest.approx(recorded, abs=1e-3)


def test_a_fact_is_found_inside_the_window_only():
    model = Llama.from_pretrained(TEACHER)
    inside, outside = (study.needle(model, distance, count=4) for distance in (100, 140))
    assert inside["4+124"] > 1.5
    assert abs(outside["4+124"]) < 0.2
    assert outside["4+252"] > 1.5


def test_needle_stands_where_it_says():
    """The letters asked for are exactly `distance` tokens after their copies."""
    row = torch.zeros(60, dtype=torch.long)
    study.put(row, "abcdefgh", 40)
    assert bytes(row[20:28].tolist()) == b"abcdefgh"
    seen = []
    model = lambda rows: (seen.append(rows), torch.zeros(*rows.shape, 258))[1]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "read", lambda model, rows, *args, **options: model(rows))
        study.needle(model, 50, count=3)
    rows = seen[0]
    for row in rows[:3]:  # told: the question's letters are those of the fact
        assert torch.equal(row[-8:], row[-58:-50])
    for row in rows[3:]:
        assert not torch.equal(row[-8:], row[-58:-50])
    assert torch.equal(rows[:3, -8:], rows[3:, -8:])


def test_books_and_dialogue_keep_constant_memory():
    model, tokens = small_model(dtype=F32), ids(200)[0]
    rounds = study.dialogue(model, tokens, rounds=5, prompt=7, answer=3, size=16, num_sinks=2)
    assert [r["tokens"] for r in rounds] == [10, 20, 30, 40, 50]
    assert [r["held"]["stream"] for r in rounds] == [10, 16, 16, 16, 16]
    assert [r["held"]["dense"] for r in rounds] == [10, 20, 30, 40, 50]
    assert len({r["bytes"] for r in rounds}) == 1
    assert all(len(r["ms"]["stream"]) == len(r["ms"]["dense"]) == 3 for r in rounds)
    teacher = Llama.from_pretrained(TEACHER)
    saved = study.book(teacher, count=4, length=500, places=(60, 400))
    assert saved["stream"][0] > 1.5
    assert abs(saved["stream"][1]) < 0.5
    assert saved["last window"][0] > 1.5
    assert abs(saved["last window"][1]) < 0.5  # it is not in what was read


def test_token_costs_are_of_one_more_token():
    """Dense attends to `length` tokens, the stream to what it holds, recomputation reads a window of them."""
    model, seen = small_model(dtype=F32), []
    hidden = model.hidden

    def watched(tokens, positions=None, attend=None):
        seen.append((tokens.shape[1], None if positions is None else positions.tolist()))
        return hidden(tokens, positions, attend)

    model.hidden = watched
    ms = study.token_costs(model, 40, repeats=2, size=16, num_sinks=2)
    assert seen == [(1, [0]), (1, [39]), (16, None)] * 2
    assert {way: len(times) for way, times in ms.items()} == {"stream": 2, "dense": 2, "recomputed": 2}
    assert all(time > 0 for times in ms.values() for time in times)


def test_planted_sink():
    """The window's output is wrong by a factor as soon as the first token leaves; four sinks make it right."""
    outputs, weights = study.planted_sink(length=600, size=128)
    dense = outputs.pop("dense")
    assert weights.shape == (1, 600, 600)
    assert weights[0, 127, 0] == pytest.approx(0.9, abs=1e-3)
    errors = {name: (o - dense)[1:].flatten(1).norm(dim=1) / dense[1:].flatten(1).norm(dim=1) for name, o in outputs.items()}
    assert errors["0+128"][:127].max() < 1e-5  # tokens 1 to 127
    assert errors["0+128"][127:].min() > 1
    assert errors["4+124"].max() < 0.2


def test_attention_maps_are_the_models():
    """Rows sum to one, later tokens get nothing, and the maps' averages of v are what the model computes with."""
    model, text = small_model(1), ids(12)
    maps = study.attention_maps(model, text)
    assert maps.shape == (1, 1, 4, 12, 12)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    assert maps.triu(1).abs().max() == 0
    values = []

    def attend(layer, q, k, v):
        values.append(v)
        return torch.einsum("bhtl,blhd->bthd", maps[layer], v.repeat_interleave(2, 2))

    with torch.no_grad():
        torch.testing.assert_close(model(text, None, attend), model(text))


# ---- players and the live cell


def test_players_colours_say_what_the_legend_says(monkeypatch):
    """Two sinks and a window of three: f takes the slot of c, and sits at the last position."""
    monkeypatch.setattr(ref.player, "Stepper", lambda title, panels, steps, **kwargs: steps)
    steps = ref.cache_player("a b c d e f g".split(), num_sinks=2, window=3)
    (words,), ring = steps[5]["words"], steps[5]["ring"]
    assert words == [
        ("purple", "a"), ("purple", "b"), ("muted", "c"), ("blue", "d"), ("blue", "e"), ("orange", "f"),
        ("outline", "g"), None,
    ]  # fmt: skip
    strip, positions, numbers = ring
    assert strip == [("purple", "a"), ("purple", "b"), ("orange", "f"), ("blue", "d"), ("blue", "e")]
    assert [n for _, n in positions] == list("01423")
    assert [n for _, n in numbers] == list("01534")
    assert steps[2]["ring"] == [
        [("purple", "a"), ("purple", "b"), ("orange", "c"), "outline", "outline"],
        *2 * [[("", "0"), ("", "1"), ("", "2"), None, None]],
    ]
    arguments = ref.traced_problem()
    *walk, last = ref.walk_player(arguments, trace.watch("kernels.streaming_llm", "_load_rotated", "sink_decoding", arguments)[1])
    done, at = 0, ref.ring_positions(arguments["seen"], arguments["num_sinks"], arguments["window"])[0].tolist()
    for step in walk:
        cells = [cell for row in step["ring"] for cell in row]
        count = Counter(color for color, _ in cells)
        assert (count["orange"], count["blue"]) == (32, done)
        assert all(label == (str(at[slot]) if color != "muted" else "") for slot, (color, label) in enumerate(cells))
        done += 32
    assert [cell for row in last["ring"] for cell in row] == [("blue", str(position)) for position in at]


def test_players_show_the_run():
    words = "a b c d e f g h i j".split()
    html = ref.cache_player(words, num_sinks=2, window=3).html
    assert "&quot;f&quot; comes" in html or '\\"f\\" comes' in html
    assert 'It takes the slot of \\"c\\", which is evicted. Held: 5, forgotten: 1.' in html
    arguments = ref.traced_problem()
    got, walk = trace.watch("kernels.streaming_llm", "_load_rotated", "sink_decoding", arguments)
    options = {name: arguments[name] for name in ("num_sinks", "window", "cos", "sin")}
    tensors = [arguments[name] for name in ("q", "k_ring", "v_ring", "seen")]
    assert_matches(got, ref.sink_decoding, *tensors, **options)
    html = ref.walk_player(arguments, walk).html
    for text in ("0 reads positions 0 to 31, which lie in slots 0-3 and 60-87", "2 reads positions 128 to 159, which lie in slots 184-191 and 4-27"):
        assert text in html, text


@pytest.mark.parametrize("seen, held", [(1, 1), (64, 64), (1000, 64)])
def test_live_cell(seen, held, device):
    said = ref.try_ring(sl.sink_decoding, seen, 4, 60, device)
    assert said.startswith(f"{held} of {seen} tokens are held, {seen - held} forgotten. output 0: ok")
    assert "WRONG" not in said


PLANTED_BUGS = [
    ("labkit/streaming_llm.py", '"blue" if i in held else "muted"', '"blue"'),
    ("labkit/streaming_llm.py", "positions = [(\"\", str(at[s]))", "positions = [(\"\", str(s))"),
    ("labkit/streaming_llm.py", '["blue" if color == "orange" else color for color in reading]', "reading"),
    ("labkit/streaming_llm.py", "torch.zeros(n, dtype=torch.long, device=ids.device)", "torch.zeros(n, dtype=torch.long)"),
    ("kernels/streaming_llm.py", "tl.where(seen > num_sinks + window, (seen", "tl.where(seen > num_sinks, (seen"),
    ("kernels/streaming_llm.py", "(seen - num_sinks) % window, 0)", "seen % window, 0)"),
    ("kernels/streaming_llm.py", "    place -= tl.where(place >= window, window, 0)\n", ""),
    ("kernels/streaming_llm.py", "tl.where(position < num_sinks, position, num_sinks + place)", "num_sinks + place"),
    ("kernels/streaming_llm.py", "cast(a * cos - b * sin, dtype)", "cast(a, dtype)"),
    ("kernels/streaming_llm.py", "cast(b * cos + a * sin, dtype)", "cast(b * cos - a * sin, dtype)"),
    ("kernels/streaming_llm.py", "last = tl.maximum(held - 1, 0)", "last = held"),
    ("kernels/streaming_llm.py", "held = tl.minimum(seen, num_sinks + window)", "held = seen"),
    ("kernels/streaming_llm.py", "_load_angles(cos_ptr, stride_cn, stride_cd, first", "_load_angles(cos_ptr, stride_cn, stride_cd, 0"),
    ("kernels/streaming_llm.py", "rows.to(tl.int64) * stride_n + skipped.to(tl.int64) * stride_d", "rows.to(tl.int64) * stride_n"),
    ("kernels/streaming_llm.py", "(HALF - skipped)[:, None]", "(HALF + 0 * skipped)[:, None]"),
    ("kernels/streaming_llm.py", "pid_h // TILES * stride_vh", "pid_h * stride_vh"),
    ("kernels/streaming_llm.py", "mask_n = position < end", "mask_n = position < end + 1"),
    ("kernels/streaming_llm.py", "tl.where(mask_n[None, :], s, float(\"-inf\"))", "s"),
    ("kernels/streaming_llm.py", "dot(q_a, tl.trans(k_a)) + dot(q_b, tl.trans(k_b))", "dot(q_a, tl.trans(k_a))"),
    ("kernels/streaming_llm.py", "v_ptr + slot * stride_vn", "v_ptr + position.to(tl.int64)[:, None] * stride_vn"),
    ("kernels/streaming_llm.py", "end = tl.minimum(start + split_len, held)", "end = held"),
    ("labkit/streaming_llm.py", "torch.where(seen > num_sinks + window, (seen", "torch.where(seen >= num_sinks, (seen"),
    ("labkit/streaming_llm.py", "(slot - num_sinks - oldest) % window", "(slot - num_sinks + oldest) % window"),
    ("labkit/streaming_llm.py", "k = rotate(k_ring.to(wide), cos[at], sin[at])", "k = rotate(k_ring.to(wide), cos[: at.shape[1]], sin[: at.shape[1]])"),
    ("labkit/streaming_llm.py", "now = (held - 1).clamp(min=0)", "now = (seen - 1).clamp(0, cos.shape[0] - 1)"),
    ("labkit/streaming_llm.py", "num_sinks + (token - self.num_sinks) % self.window", "num_sinks + token % self.window"),
    ("labkit/streaming_llm.py", "i >= self.seen - self.window]", "i > self.seen - self.window]"),
    ("labkit/streaming_llm.py", "held[len(held) - (room - self.num_sinks) :]", "held[len(held) - room :]"),
    ("labkit/streaming_llm.py", "        self.seen = len(kept)\n", ""),
    ("labkit/streaming_llm.py", "        if self.seen <= room:\n            return\n", ""),
    ("labkit/streaming_llm.py", "            args.tensor(\"k\", k, (batch, \"n\", num_kv_heads, head_dim), like=self.k, dtype=self.k.dtype)\n", ""),
    ("labkit/streaming_llm.py", "((q, at[-n:]), (k, at))", "((q, at[:n]), (k, at))"),
    ("labkit/streaming_llm.py", "                cache.evict_for_space(n)\n", "                pass\n"),
    ("labkit/streaming_llm_study.py", "at.clamp(max=num_sinks + window - 1)", "at.clamp(max=num_sinks + window)"),
    ("labkit/streaming_llm_study.py", "max(num_sinks, start - window + 1)", "max(num_sinks, start - window + 2)"),
    ("labkit/streaming_llm_study.py", "(j < num_sinks) | (j > i - window)", "(j < num_sinks) | (j >= i - window)"),
    ("labkit/streaming_llm_study.py", "torch.cat((bits[0, :half], bits[:, half:].flatten()))", "torch.cat((bits[0, :half], bits[:, :half].flatten()))"),
    ("labkit/streaming_llm_study.py", "tokens[i + 1 - size : i + 1] for i in part", "tokens[i - size : i] for i in part"),
    ("labkit/streaming_llm_study.py", "start = len(row) - distance - FACT.index(\"{\")", "start = len(row) - distance"),
    ("labkit/streaming_llm_study.py", "k[:, 0] = 0.0\n", "\n"),
    ("labkit/streaming_llm.py", "        args.in_range(\"ids\", ids, 0, len(vocab) - 1)\n", ""),
    ("labkit/streaming_llm.py", "batch = \"batch\" if held is None else len(held)", "batch = \"batch\""),
    ("labkit/streaming_llm.py", "        args.expect(ids.shape[1] > 0, \"ids (shape)\", list(ids.shape), \"a token or more\")\n", ""),
    ("labkit/streaming_llm_study.py", "(less.std() / len(less) ** 0.5)", "less.std()"),
    ("labkit/streaming_llm_study.py", "num_sinks, size - num_sinks, original=True)", "num_sinks, size - num_sinks)"),
    ("labkit/args.py", "expect(x.shape[0] >= size, f\"{name} (rows)\"", "expect(True, f\"{name} (rows)\""),
    ("labkit/args.py", "expect(dim % 2 == 0, \"q (head_dim)\", dim, \"an even number, to rotate pairs\")", "pass"),
]  # fmt: skip
