"""The studies of chapter 06 on a model: what it loses over a long stream, what it still knows, what a token costs."""

import copy
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from labkit import corpus
from labkit.args import expect
from labkit.attention import attention
from labkit.model import TEACHER, Llama, causal, rotate
from labkit.record import Experiment
from labkit.streaming_llm import Stream

# ---- published, not reproduced here (Xiao et al., ICLR 2024): perplexities by (sinks, window)

# Figure 1 and Table 1: Llama-2-13B, the first book of PG19, 65K tokens.
PUBLISHED_WAYS = {
    "dense": 5641,
    "window, 0+1024": 5158,
    "window, recomputed for each token": 5.43,
    "StreamingLLM, 4+1020": 5.40,
    "the same, first four tokens replaced by newlines": 5.60,
}
# Table 2: 400K tokens of PG19. The cache holds 2048 tokens (Llama-2: 4096); columns: how many of them are first tokens.
PUBLISHED_SINKS = {
    "Falcon-7B": (17.90, 12.12, 12.12, 12.12, 12.12),
    "MPT-7B": (460.29, 14.99, 15.00, 14.99, 14.98),
    "Pythia-12B": (21.62, 11.95, 12.09, 12.09, 12.02),
    "Llama-2-7B": (3359.95, 11.88, 10.51, 9.59, 9.54),
}
# Table 3: 160M parameters, trained from scratch with each softmax; columns 0+1024, 1+1023, 2+1022, 4+1020.
PUBLISHED_TRAINED = {
    "ordinary softmax": (27.87, 18.49, 18.05, 18.05),
    "softmax-off-by-one (a zero sink)": (29214, 19.90, 18.27, 18.01),
    "a learnable sink token": (1235, 18.01, 18.01, 18.02),
}
# Table 5: Llama-2-7B-chat, questions of ARC asked in one stream; accuracy in %, ARC-Easy and ARC-Challenge.
PUBLISHED_ARC = {"each question alone": (71.25, 53.16), "window": (3.58, 1.39), "StreamingLLM": (71.34, 55.03)}

SIZE = 256  # tokens in the cache: the length that the model was trained on
LENGTH = 20_480


# ---- many steps of a stream in one pass


def read(model, ids, num_sinks, window, *, original=False, stream=None):
    """The logits [B, T, vocab] of a stream of ids [B, T], one token after the other, computed in one pass.

    A step writes each layer's key and value once and never changes them, so the steps of a layer need not wait for each
    other: what a token may see is a band and the sinks. Only the sinks' angles need care. Once the cache is full, the
    query is at position num_sinks + window - 1 for good; keys in the window keep their distance to it, and so their
    angle, for RoPE is relative; and the sinks are at distance num_sinks + window - 1 - i for good. original: sinks keep
    the distance that they have in the text. stream: a fresh `Stream` of these sizes whose caches are filled, too.
    """
    length, block = ids.shape[1], max(64, window)
    at = torch.arange(length, device=ids.device)
    now = at if original else at.clamp(max=num_sinks + window - 1)
    sink = at[:num_sinks]

    def attend(layer, q, k, v):
        if stream is not None:
            stream.caches[layer].append(k, v)
        group, outputs = q.shape[2] // k.shape[2], []
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        k_sink = model.rotate(k[:, :num_sinks], sink)
        for start in range(0, length, block):
            rows = slice(start, min(start + block, length))
            first = max(num_sinks, start - window + 1)  # the oldest key in the window of the block's first token
            near = slice(first, max(first, rows.stop))
            # Angles count from `first`: only distances matter, and small ones are exact.
            q_near, k_near = model.rotate(q[:, rows], at[rows] - first), model.rotate(k[:, near], at[near] - first)
            q_sink = model.rotate(q[:, rows], now[rows])
            s = torch.cat([torch.einsum("bthd,blhd->bhtl", *pair) for pair in ((q_sink, k_sink), (q_near, k_near))], -1)
            i, j = at[rows, None], torch.cat((sink, at[near]))
            keep = (j <= i) & ((j < num_sinks) | (j > i - window))
            p = (s * q.shape[-1] ** -0.5).masked_fill(~keep, float("-inf")).softmax(-1)
            outputs.append(torch.einsum("bhtl,blhd->bthd", p, torch.cat((v[:, :num_sinks], v[:, near]), 1)))
        return torch.cat(outputs, 1)

    return model(ids, torch.zeros_like(at), attend)


def token_bits(logits, targets):
    """-log2 p of each target, [B, T]."""
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none") / np.log(2)


# ---- the ways to read an endless text: tokens [T + 1], the first of them BOS -> bits of the other T


def cached(model, tokens, num_sinks, window, *, original=False):
    """A cache of num_sinks + window tokens, whose positions are those in the cache or the original ones."""
    return token_bits(read(model, tokens[None, :-1], num_sinks, window, original=original), tokens[None, 1:])[0]


def dense(model, tokens):
    """Everything is kept: memory grows, and positions that were never trained are met."""
    return token_bits(model(tokens[None, :-1]), tokens[None, 1:])[0]


def reset(model, tokens, size=SIZE):
    """The cache is emptied when it is full: BOS, and on from there. T is a multiple of size."""
    rows = tokens[1:].view(-1, size)
    return token_bits(model(after(tokens[0], rows)), rows).flatten()


def reread(model, tokens, size=SIZE):
    """When the cache is full, the newer half of its text is read again after BOS. T is a multiple of size / 2."""
    rows, half = tokens[1:].unfold(0, size, size // 2), size // 2
    bits = token_bits(model(after(tokens[0], rows)), rows)
    return torch.cat((bits[0, :half], bits[:, half:].flatten()))


def recomputed(model, tokens, at, *, bos=True, size=SIZE):
    """Bits of tokens[1:][at] only, at >= size: for each of them the last `size` tokens are read afresh from position 0,
    the first of them replaced by BOS if bos."""
    bits = []
    for part in at.split(16):
        rows = torch.stack([tokens[i + 1 - size : i + 1] for i in part])
        if bos:
            rows[:, 0] = tokens[0]
        bits.append(token_bits(model(rows)[:, -1:], tokens[part + 1, None])[:, 0])
    return torch.cat(bits)


def after(first, rows):
    """What a model reads to predict rows [B, T]: `first`, then all but the last."""
    return torch.cat((first.expand(len(rows), 1), rows[:, :-1]), 1)


def text(seed, length=LENGTH):
    """BOS and a stream of held-out text: the files in an order of the seed's, one after the other. [length + 1]."""
    names = [name for name in corpus.HELD_OUT if name not in corpus.left_out("held_out")]
    ids = corpus.read("held_out", [names[i] for i in np.random.default_rng(seed).permutation(len(names))])
    expect(len(ids) >= length, "held_out (ids)", len(ids), f"at least {length}")
    return torch.cat((torch.tensor([corpus.BOS]), ids[:length]))


SINKS = (0, 1, 2, 4, 8)
NEWLINE = "1+255, first token a newline"


def ways(model):
    """{name: function of tokens [T + 1] -> bits [T]} of all ways that are not sampled."""
    caches = {f"{s}+{SIZE - s}": dict(num_sinks=s, window=SIZE - s) for s in SINKS}
    caches |= {f"{s}+{128 - s}": dict(num_sinks=s, window=128 - s) for s in (0, 1, 4)}
    for s in (1, 4):
        caches[f"{s}+{SIZE - s}, original positions"] = dict(num_sinks=s, window=SIZE - s, original=True)
    older = {way.__name__: partial(way, model) for way in (dense, reset, reread)}
    return older | {name: partial(cached, model, **options) for name, options in caches.items()}


@torch.no_grad()
def compare(model, tokens, *, every=40, curve=512):
    """All ways on one stream. {name: {"mean" beyond the first SIZE tokens, "sampled": the mean over every 40th of them,
    "curve": means over 512 tokens each}}; the two that recompute for each token were done for the sampled ones only.
    These have "less" than 4+252 there, and the standard error of that mean of differences."""
    at, result, sampled = torch.arange(SIZE, len(tokens) - 1, every), {}, {}

    def note(name, bits):
        sampled[name] = bits[at]
        result[name] = dict(mean=bits[SIZE:].mean().item(), sampled=bits[at].mean().item())
        result[name]["curve"] = [round(x, 4) for x in bits.view(-1, curve).mean(1).tolist()]

    for name, way in ways(model).items():
        note(name, way(tokens=tokens))
    newline = torch.cat((torch.tensor([10]), tokens[1:]))
    note(NEWLINE, cached(model, newline, 1, SIZE - 1))
    for name, bos in (("recomputed", True), ("recomputed, no BOS", False)):
        bits = recomputed(model, tokens, at, bos=bos)
        result[name] = dict(sampled=bits.mean().item()) | difference(sampled["4+252"], bits)
    return result


def difference(bits, fewer):
    """{"less": how much less `fewer` needs on the mean, and the "standard error" of it}: both [n], token by token."""
    less = (bits - fewer).double()
    return {"less": less.mean().item(), "standard error": (less.std() / len(less) ** 0.5).item()}


@torch.no_grad()
def two_by_two(model, tokens, size, num_sinks=4):
    """Mean bits beyond the first `size` tokens: {"no sinks", "sinks", "sinks, original positions"}.

    The fourth corner is the first one again: without sinks only distances inside the window are met, and RoPE is
    relative.
    """
    window = size - num_sinks
    bits = {
        "no sinks": cached(model, tokens, 0, size),
        "sinks": cached(model, tokens, num_sinks, window),
        "sinks, original positions": cached(model, tokens, num_sinks, window, original=True),
    }
    return {name: x[size:].mean().item() for name, x in bits.items()}


@torch.no_grad()
def original_positions(model, tokens, size=64, num_sinks=4):
    """What sinks at original positions save against no sinks, by the length of the streams: {length: `difference`}.

    Of streams no longer than the model was trained for, SIZE tokens each, and of all tokens as one stream; `size` of
    them in the cache, and the tokens beyond the first `size` count.
    """
    found = {}
    for length in (SIZE, len(tokens) - 1):
        rows = tokens[1:].view(-1, length)
        ids = after(tokens[0], rows)
        plain = read(model, ids, 0, size)
        original = read(model, ids, num_sinks, size - num_sinks, original=True)
        found[length] = difference(*(token_bits(logits, rows)[:, size:].flatten() for logits in (plain, original)))
    return found


# ---- where attention goes


@torch.no_grad()
def attention_maps(model, ids):
    """What every head looks at: ids [B, T] -> [layers, B, heads, T, T]."""
    maps = []

    def attend(layer, q, k, v):
        k_all = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        s = torch.einsum("bthd,blhd->bhtl", q, k_all) * q.shape[-1] ** -0.5
        later = torch.ones_like(s[0, 0], dtype=torch.bool).triu(1)
        maps.append(s.masked_fill(later, float("-inf")).softmax(-1))
        return causal(layer, q, k, v)

    model(ids, None, attend)
    return torch.stack(maps)


def planted_sink(length=4096, size=1024, num_sinks=4, *, share=0.9, num_heads=1, head_dim=128, seed=0):
    """A layer with a sink of full size, under three caches: {name: o [length, heads, head_dim]}; and its attention,
    [heads, length, length].

    As trained heads do, it looks at neighbours (a constant part in q and k, which RoPE lets fade with the distance) and
    rests on the first token: every query agrees with its key, in the pair of dimensions that turns slowest, and its
    value is 0. The agreement is such that at `size` tokens the first one gets `share` of the attention.
    """
    rng, half = np.random.default_rng(seed), head_dim // 2
    q, k, v = (torch.from_numpy(rng.standard_normal((1, length, num_heads, head_dim), dtype=np.float32)) for _ in "qkv")
    q, k = q * 0.5 + 1.2, k * 0.5 + 1.2
    angle = torch.arange(length)[:, None] * 500_000.0 ** (-torch.arange(half) / half)
    q[..., half - 1], q[..., -1], k[..., half - 1], k[..., -1] = 1.0, 0.0, 0.0, 0.0
    v[:, 0] = 0.0
    q, k = rotate(q, angle.cos(), angle.sin()), rotate(k, angle.cos(), angle.sin())
    k[:, 0] = 0.0
    others = torch.einsum("hd,lhd->hl", q[0, size - 1], k[0, 1:size]) * head_dim**-0.5
    k[0, 0, :, half - 1] = (others.logsumexp(-1) + np.log(share / (1 - share))) * head_dim**0.5
    scores = torch.einsum("thd,lhd->htl", q[0], k[0]) * head_dim**-0.5
    weights = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    window = size - num_sinks
    caches = {"dense": {}, f"0+{size}": dict(window=size)}
    caches[f"{num_sinks}+{window}"] = dict(window=window, num_sinks=num_sinks)
    return {name: attention(q, k, v, **options)[0] for name, options in caches.items()}, weights


# ---- what it still knows: names that stand once in a text, and are asked for later

NAME, ASKED = 8, 5  # letters of a name; how many of them are asked for, the rest being given
FACT, QUESTION = "\ndef {}(self):\n", "\n    self.{}"


def names(rng, count):
    return ["".join(chr(97 + c) for c in rng.integers(0, 26, NAME)) for _ in range(count)]


def passages(rng, count, length):
    """Pieces of the calibration text, which is no training text either, [count, length]."""
    ids = corpus.read("calibration")
    starts = rng.integers(0, len(ids) - length, count)
    return torch.stack([ids[s : s + length] for s in starts])


def put(row, name, distance):
    """Write the fact over row [T] such that the name begins `distance` tokens before the end."""
    fact = torch.tensor(corpus.encode(FACT.format(name)))
    start = len(row) - distance - FACT.index("{")
    row[start : start + len(fact)] = fact


def questions(asked):
    return torch.tensor([corpus.encode(QUESTION.format(name)) for name in asked])


def answer_bits(logits, tokens):
    """Mean bits of the letters asked for, at the end of tokens [B, T]."""
    return token_bits(logits[:, -ASKED - 1 : -1], tokens[:, -ASKED:]).mean().item()


DISTANCES = (32, 64, 96, 112, 120, 124, 132, 144, 176, 224, 248, 256, 288, 384)
LEAD = 64  # text before the fact


@torch.no_grad()
def needle(model, distance, *, count=16, seed=0):
    """Bits that a fact saves for each letter of a name asked for, `distance` tokens after it: {way: bits}.

    Saved: bits of the letters where another name was in the fact's place, less those where it was this one.
    """
    rng = np.random.default_rng((seed, distance))
    asked, others = names(rng, count), names(rng, count)
    end = distance + NAME - (len(QUESTION) - 2 + NAME)  # of the text, so that the question's letters are at `distance`
    rows = passages(rng, count, LEAD + end + len(FACT)).repeat(2, 1)
    for row, name in zip(rows, asked + others):
        put(row, name, end)
    rows = torch.cat((torch.full((2 * count, 1), corpus.BOS), rows, questions(asked).repeat(2, 1)), 1)
    ways = {"dense": model, "4+124": partial(read, model, num_sinks=4, window=124)}
    ways["4+252"] = partial(read, model, num_sinks=4, window=252)
    saved = {}
    for name, way in ways.items():
        told, untold = (answer_bits(*pair) for pair in zip(way(rows).split(count), rows.split(count)))
        saved[name] = untold - told
    return saved


BOOK = 4096
PLACES = (40, 80, 120, 160, 200, 240, 280, 400, 600, 1000, 2000, 4000)  # of the facts, in tokens before the book's end


@torch.no_grad()
def book(model, *, count=16, seed=0, length=BOOK, places=PLACES, size=SIZE, num_sinks=4):
    """Read books with a fact at each of the places, then ask for every one: {reader: bits saved at each place}.

    The stream has read the whole book; the reader of the last window got nothing but the last tokens, after BOS.
    """
    rng = np.random.default_rng(seed)
    rows, facts = passages(rng, count, length), [names(rng, count) for _ in places]
    for place, asked in zip(places, facts):
        for row, name in zip(rows, asked):
            put(row, name, place)
    start = torch.full((count, 1), corpus.BOS)
    stream = Stream(model, num_sinks, size - num_sinks)
    read(model, torch.cat((start, rows), 1), num_sinks, size - num_sinks, stream=stream)
    rest = size - 1 - len(QUESTION) + 2 - NAME

    def ask(asked):
        tokens, fork = questions(asked), copy.deepcopy(stream.caches)
        bits = answer_bits(stream(tokens), tokens)
        stream.caches = fork
        window = torch.cat((start, rows[:, -rest:], tokens), 1)
        return bits, answer_bits(model(window), window)

    saved = {"stream": [], "last window": []}
    for asked in facts:
        told, untold = ask(asked), ask(asked[1:] + asked[:1])  # the right book, and the same questions to a wrong one
        for reader, right, wrong in zip(saved, told, untold):
            saved[reader].append(wrong - right)
    return saved


# ---- what a token costs


@torch.no_grad()
def dialogue(model, tokens, *, rounds=40, prompt=200, answer=24, size=SIZE, num_sinks=4):
    """Rounds of a prompt and an answer, read from tokens [T]: one list entry a round.

    {"tokens" so far, "ms": {way: [milliseconds of each token of the answer]}, "held": {way: tokens in the cache},
    "bytes" of the stream's cache}. The recomputing way keeps nothing, and is timed for one token a round.
    """
    stream, keys, kept, end = Stream(model, num_sinks, size - num_sinks), {}, [], 0

    def keep(layer, q, k, v):  # dense: room for all tokens is there from the start
        if layer not in keys:
            keys[layer] = [x.new_zeros(1, x.shape[2], rounds * (prompt + answer), x.shape[3]) for x in (k, v)]
        start = end - k.shape[1]
        for cache, x in zip(keys[layer], (k, v)):
            cache[:, :, start:end] = x.transpose(1, 2)
        k, v = (cache[:, :, :end] for cache in keys[layer])
        mask = torch.ones(q.shape[1], end, dtype=torch.bool).tril(start) if q.shape[1] > 1 else None
        options = dict(attn_mask=mask, enable_gqa=q.shape[2] != k.shape[1])
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, **options).transpose(1, 2)

    def timed(call, *inputs):
        begin = time.perf_counter()
        call(*inputs)
        return round(1e3 * (time.perf_counter() - begin), 3)

    for _ in range(rounds):
        ms = {"stream": [], "dense": [], "recomputed": []}
        for n in (prompt, *[1] * answer):
            first, end = end, end + n
            new, at = tokens[None, first:end], torch.arange(first, end)
            once = {"stream": timed(stream, new), "dense": timed(model, new, at, keep)}
            if n == 1:
                for way, value in once.items():
                    ms[way].append(value)
        ms["recomputed"].append(timed(model, tokens[None, max(0, end - size) : end]))
        kept.append({"tokens": end, "ms": ms, "held": {"stream": len(stream), "dense": end}, "bytes": stream.num_bytes})
    return kept


LENGTHS = (256, 1024, 2048, 4096, 8192, 16384)


@torch.no_grad()
def token_costs(model, length, *, repeats=15, size=SIZE, num_sinks=4):
    """Milliseconds of CPU time that one more token takes after `length` of them: {way: [ms]}, the ways in turn.

    CPU time, unlike the clock's, does not count what else the machine does. Caches hold random numbers.
    """
    c, stream = model.config, Stream(model, num_sinks, size - num_sinks)
    kept = [torch.randn(2, 1, c.num_key_value_heads, length, c.head_dim) for _ in model.layers]
    for cache, (k, v) in zip(stream.caches, kept):
        cache.append(k.transpose(1, 2), v.transpose(1, 2))

    def keep(layer, q, k, v):  # the last slot takes the new token
        kept[layer][:, :, :, -1:] = torch.stack((k, v)).transpose(2, 3)
        options = dict(enable_gqa=q.shape[2] != k.shape[2])
        return F.scaled_dot_product_attention(q.transpose(1, 2), *kept[layer], **options).transpose(1, 2)

    new, last, window = torch.zeros(1, 1, dtype=torch.long), torch.tensor([length - 1]), min(length, size)
    calls = {"stream": partial(stream, new), "dense": partial(model, new, last, keep)}
    calls["recomputed"] = partial(model, new.expand(1, window))
    ms = {way: [] for way in calls}
    for _ in range(repeats):
        for way, call in calls.items():
            begin = time.process_time()
            call()
            ms[way].append(round(1e3 * (time.process_time() - begin), 3))
    return ms


# ---- the experiments

SLICE = 2048  # tokens of seed 0's stream; the chapter measures these again


def slice_bits(model):
    return two_by_two(model, text(0)[: SLICE + 1], SIZE)


def study(seed):
    """Everything of this file on the lab's model, for one order of the held-out text."""
    model, tokens = Llama.from_pretrained(TEACHER), text(seed)
    first = attention_maps(model, after(tokens[0], tokens[1:4097].view(-1, 256)))[..., 64:, 0]
    return dict(
        bits=compare(model, tokens),
        slice=slice_bits(model),
        original_positions=original_positions(model, tokens),
        sink_share=first.mean((1, 3)).tolist(),  # [layers][heads], of queries 64..255
        needle={d: needle(model, d, seed=seed) for d in DISTANCES},
        book=book(model, seed=seed),
        dialogue=dialogue(model, tokens),
    )


def costs(seed):
    """What a token costs on one thread, by the length of the stream."""
    torch.manual_seed(seed)
    model, threads = Llama.from_pretrained(TEACHER), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {length: token_costs(model, length) for length in LENGTHS}
    finally:
        torch.set_num_threads(threads)


def experiments():
    weights = TEACHER / "model.safetensors"
    return {
        "streaming_llm": Experiment(study, seeds=(0, 1), weights=weights),
        "streaming_costs": Experiment(costs, weights=weights),
    }
