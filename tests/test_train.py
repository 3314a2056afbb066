"""The trainer: a resumed run is the same run, what it reports is what it says, and the committed model is the recorded one."""

import hashlib
import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from labkit import corpus, record, train
from labkit.model import TEACHER, Config, load

TINY = Config(corpus.VOCAB, 32, 48, 2, 2, 2, 16, tie_word_embeddings=True)
RECIPE = train.Recipe(steps=12, batch=2, length=16, warmup=3, cooldown=0.5)
PLANTED_BUGS = [
    ("labkit/train.py", "zip(opts, state[\"opts\"])", "zip(opts[:1], state[\"opts\"])"),  # AdamW's moments lost
    ("labkit/train.py", "start, curve = state[\"step\"], state[\"curve\"]", "start, curve = state[\"step\"] + 1, state[\"curve\"]"),
    ("labkit/train.py", "if state[\"run\"] != run:", "if False:"),
    ("labkit/train.py", "            opt.zero_grad()\n", ""),
    ("labkit/train.py", "opt.param_groups[0][\"lr\"] = peak * rate(step, r)", "pass"),
    ("labkit/train.py", "(r.steps - step) / (r.cooldown * r.steps)", "1.0"),
    ("labkit/train.py", "r.seed * 1000 + epoch", "r.seed * 1000"),
    ("labkit/train.py", "ids[shift + j * r.length :]", "ids[shift + j :]"),
    ("labkit/train.py", "    return x.transpose(1, 2) if tall else x\n", "    return x\n"),
    ("labkit/train.py", "+ c * s @ s", "- c * s @ s"),
    ("labkit/train.py", "windows, half, nats, count = ids.unfold(0, length, length // 2)", "windows, half, nats, count = ids.unfold(0, length, length)"),
    ("labkit/train.py", "if i else torch.cat((loss[0, :half], loss[:, half:].flatten()))", ""),
    ("labkit/train.py", "nats / count / math.log(2)", "nats / count"),
    ("labkit/train.py", "fingerprint(ids, *model.state_dict().values())", "fingerprint(ids)"),
    ("labkit/train.py", "fingerprint(ids, *model.state_dict().values())", "fingerprint(*model.state_dict().values())"),
    ("labkit/train.py", "np.full(k, corpus.EOS)", "np.full(k, 0)"),
    ("labkit/train.py", "(count + types * p) / np.maximum(total + types, 1)", "(count + p) / np.maximum(total + 1, 1)"),
    ("labkit/train.py", "size(known + data) - size(known)", "size(data)"),
    ("labkit/train.py", "torch.tensor([len(ids) - 1])", "torch.tensor([len(ids)])"),
    ("labkit/corpus.py", "torch.full_like(rows[:, :1], BOS)", "rows[:, :1]"),
]  # fmt: skip

TEXT = torch.tensor(corpus.encode("def keep(x):\n    return x\n\n") * 40)


def run(folder, recipe=RECIPE, **kwargs):
    model = train.init(TINY, recipe.seed)
    curve = train.train(model, recipe, TEXT, TEXT[:64], folder, every=4, **kwargs)
    return model, curve


def test_a_resumed_run_is_the_same_run(tmp_path):
    whole, curve = run(tmp_path / "whole")
    run(tmp_path / "parts", until=8)
    resumed, resumed_curve = run(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))
    assert [point[::2] for point in resumed_curve] == [point[::2] for point in curve]  # seconds and means apart
    assert [point[0] for point in curve] == [4, 8, 12]
    with pytest.raises(ValueError, match=r"checkpoint\.pt.*'seed': 0.*'seed': 1"):
        run(tmp_path / "parts", replace(RECIPE, seed=1))


@pytest.mark.parametrize("what", ["text", "weights"])
def test_the_checkpoint_of_another_run_is_refused(what, tmp_path):
    """A new teacher converted in the same folder must not end as the old one."""
    run(tmp_path, until=8)
    ids, model = TEXT.clone(), train.init(TINY, RECIPE.seed)
    if what == "text":
        ids[500] += 1
    else:
        model.layers[0].mlp.up_proj.weight.data[3, 4] += 1e-3
    start = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"checkpoint\.pt: got the run .*begins.*delete it"):
        train.train(model, RECIPE, ids, TEXT[:64], tmp_path, every=4)
    assert all(torch.equal(x, start[name]) for name, x in model.state_dict().items())
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 8


def test_it_learns(tmp_path):
    model, curve = run(tmp_path, replace(RECIPE, steps=60))
    assert curve[-1][2] < 2 < 4 < curve[0][2]  # a text of 27 bytes, over and over
    assert abs(curve[-1][2] - train.bits_per_byte(model, TEXT[:64], RECIPE.length)) < 1e-3


def test_the_rate_rises_stays_and_falls_to_zero():
    r = replace(RECIPE, steps=100, warmup=10)
    rates = [train.rate(step, r) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10:51] == [1.0] * 41
    np.testing.assert_allclose(rates[50:], np.arange(50, 0, -1) / 50)


def test_the_rate_is_what_moves_the_weights(tmp_path):
    model, _ = run(tmp_path, replace(RECIPE, warmup=10**9))  # rates of next to nothing
    start = train.init(TINY, RECIPE.seed)
    assert max((a - b).abs().max().item() for a, b in zip(model.parameters(), start.parameters())) < 1e-7


def test_every_chunk_once_an_epoch():
    ids, r = torch.arange(1000), replace(RECIPE, length=16, batch=4)
    steps = ((1000 - 16) // 16) // 4
    first = torch.cat([train.batch(ids, step, r) for step in range(steps)])
    assert (first.diff(dim=1) == 1).all()  # consecutive ids
    assert first.unique().numel() == first.numel()  # none twice
    again = torch.cat([train.batch(ids, step, r) for step in range(steps)])
    second = torch.cat([train.batch(ids, step, r) for step in range(steps, 2 * steps)])
    other = torch.cat([train.batch(ids, step, replace(r, seed=1)) for step in range(steps)])
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(3, 24, 64), (2, 64, 24), (1, 32, 32)])
def test_orthogonal(shape):
    g = torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    g = u @ (s.clamp(min=s.max() / 20)[..., None] * vh)  # no vanishing directions
    o = train.orthogonal(g)
    assert o.shape == g.shape
    s = torch.linalg.svdvals(o)
    assert (s > 0.5).all()
    assert (s < 1.3).all()
    along = torch.einsum("nij,nij->n", o, u @ vh) / s.sum(-1)  # 1: the same singular vectors
    assert (along > 0.999).all()


@torch.no_grad()
def test_bits_per_byte():
    model, ids, length = train.init(TINY, 0), TEXT[:77], 16
    torch.nn.init.normal_(model.embed_tokens.weight, std=1.0)
    want = []
    for start in range(0, 77 - length + 1, length // 2):
        window = ids[start : start + length]
        nats = F.cross_entropy(
            model(torch.cat((torch.tensor([corpus.BOS]), window[:-1]))[None])[0], window, reduction="none"
        )
        want += nats[0 if start == 0 else length // 2 :].tolist()
    for rows in (1, 3, 100):
        assert abs(train.bits_per_byte(model, ids, length, rows) - np.mean(want) / math.log(2)) < 1e-5
    assert len(want) == 72
    torch.nn.init.zeros_(model.embed_tokens.weight)  # uniform
    assert abs(train.bits_per_byte(model, ids, length) - math.log2(corpus.VOCAB)) < 1e-5


@pytest.mark.parametrize("order", [0, 2, 5])
def test_order_n_model_beside_dictionaries(order):
    rng = np.random.default_rng(0)
    known, held = rng.choice([97, 98, 99, corpus.EOS], (2, 400))
    held[7] = 120  # never seen

    def counted(ids):
        padded = [corpus.EOS] * order + ids.tolist()
        return [(tuple(padded[i : i + order]), padded[i + order]) for i in range(len(ids))]

    counts = defaultdict(Counter)
    for context, x in counted(known):
        for k in range(order + 1):
            counts[context[order - k :]][x] += 1

    def p(context, x):
        lower = p(context[1:], x) if context else 1 / corpus.VOCAB
        seen = counts[context]
        return (seen[x] + len(seen) * lower) / (seen.total() + len(seen)) if seen else lower

    want = -np.mean([math.log2(p(context, x)) for context, x in counted(held)])
    assert abs(train.order_n_bits(known, held, order) - want) < 1e-9


def test_compressors():
    text = torch.tensor(corpus.encode("".join(f"line {i * i}\n" for i in range(300))))
    bits = train.compressors(text, text)
    assert set(bits) == {"gzip", "bz2", "lzma", "lzma, primed with the training text", "order-5 model"}
    assert 0 < bits["lzma, primed with the training text"] < 0.1 * bits["lzma"]  # it has seen all of it
    assert all(0.1 < bits[name] < 8 for name in ("gzip", "bz2", "lzma", "order-5 model"))


@torch.no_grad()
def test_greedy_sample_is_full_recomputation():
    model = train.init(TINY, 3)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.6)
    ids = [corpus.BOS, *corpus.encode("def")]
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert len(set(ids[4:])) > 3  # not one byte over and over
    assert train.sample(model, "def", 8, temperature=0) == corpus.decode(ids)
    assert train.sample(model, "def", 8, seed=1) == train.sample(model, "def", 8, seed=1)
    assert train.sample(model, "def", 8, seed=1) != train.sample(model, "def", 8, seed=2)


# --- the committed teacher -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded():
    experiment = record.experiment("train")
    assert experiment is not None
    return experiment.samples[0]


def test_the_weights_are_those_of_the_record(recorded):
    file = TEACHER / "model.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == recorded["weights_sha256"]
    assert file.stat().st_size <= 12_000_000
    model, _, _ = load(TEACHER)
    assert sum(p.numel() for p in model.parameters()) == recorded["parameters"]
    assert recorded["recipe"]["steps"] == recorded["curve"][-1][0]


@torch.no_grad()
def test_held_out_bits_per_byte_of_one_file(recorded):
    if train.SLICE in corpus.left_out("held_out"):
        pytest.skip(f"{train.SLICE} of this Python is not the pinned one")
    model, _, _ = load(TEACHER)
    bits = train.bits_per_byte(model, corpus.read("held_out", [train.SLICE]))
    assert abs(bits - recorded["slice_bits_per_byte"]) < 1e-3  # other CPUs add in another order


def test_the_teacher_beats_what_it_must(recorded):
    for peer in ("gzip", "bz2", "order-5 model"):
        assert recorded["held_out_bits_per_byte"] < recorded["peers"][peer], peer
