import hashlib
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from kernels import distillation as kd
from labkit import corpus, record, train
from labkit import distillation_players as players
from labkit import distillation_study as study
from labkit.check import randn
from labkit.distillation import kd_loss
from labkit.gqa import kv_bytes_per_token
from labkit.model import TEACHER, Config, Llama
from labkit.sparse24 import pack_24

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
TEXT = torch.tensor(corpus.encode("def keep(x):\n    return x\n\n") * 700)
SMALL = train.Recipe(seed=3, steps=2, batch=2, length=32, warmup=1)


@pytest.fixture(scope="module")
def teacher():
    config = Config(corpus.VOCAB, 32, 64, 4, 4, 4, 8, tie_word_embeddings=True)
    return train.init(config, 5)


@pytest.fixture
def lessons(teacher):
    return study.Lessons(teacher, TEXT[:1600], SMALL)


def normal(*shape, seed=0):
    return randn(np.random.default_rng(seed), *shape)


# ---- storage


@pytest.mark.parametrize("form", study.BITS)
def test_quantised(form):
    bits, group = study.BITS[form]
    w = normal(5, 96)
    w[1, 40] = 100.0  # an outlier makes its own group coarse, and no other
    w[2] = 0.0
    got, top = study.as_stored(w, form), 2 ** (bits - 1) - 1
    for row, new in zip(w.split(1), got.split(1)):
        for a, b in zip(row.split(group or 96, 1), new.split(group or 96, 1)):
            scale = a.abs().max() / top
            assert (a - b).abs().max() <= scale * (0.5 + top * 2**-8)  # the scale itself is rounded to bf16
            assert len(b.unique()) <= 2**bits - 1
            torch.testing.assert_close(b.abs().max(), a.abs().max(), rtol=2**-8, atol=0)
    assert torch.equal(study.as_stored(got, form), got)
    assert not got[2].any()
    scale = got[0, : group or 96].abs().max() / top
    assert scale == scale.bfloat16()


def test_as_stored_in_bf16():
    w = normal(3, 8)
    for form in ("bf16", "2:4"):
        assert torch.equal(study.as_stored(w, form), w.bfloat16().float())
    with pytest.raises(ValueError, match=r"^w \(columns\): got 40, expected a multiple of 32"):
        study.quantised(normal(2, 40), 4, 32)


def test_weight_bytes():
    w = normal(64, 256).bfloat16()
    values, meta = pack_24(w, keep_two(w))
    assert study.weight_bytes(64, 256, "2:4") == values.nbytes + meta.nbytes == 0.5625 * w.nbytes
    assert study.weight_bytes(64, 256, "bf16") == w.nbytes
    assert study.weight_bytes(64, 256, "int8") == 64 * 256 + 64 * 2
    assert study.weight_bytes(64, 256, "4-bit") == 64 * 256 // 2 + 64 * 8 * 2
    assert study.weight_bytes(64, 256, "2-bit") == 64 * 256 // 4 + 64 * 8 * 2


def keep_two(w):
    return torch.arange(w.shape[1]).remainder(4).ge(2).expand_as(w)


def test_model_bytes():
    """The teacher's file holds its bf16 weights, and a header; the cache is chapter 7's."""
    model = Llama.from_pretrained(TEACHER)
    size = study.size_bytes(model, "bf16")
    assert size == 2 * sum(p.numel() for p in model.parameters())
    assert 0 < (TEACHER / "model.safetensors").stat().st_size - size < 10_000
    inside = sum(x.weight.numel() for x in study.block_linears(model))
    assert inside == 4 * (4 * 256 * 256 + 3 * 256 * 512)
    assert size - study.size_bytes(model, "2:4") == 2 * inside * (1 - 0.5625)
    cache = study.CONTEXT * kv_bytes_per_token(4, 8, 32, torch.bfloat16)
    assert study.decode_bytes(model, "int8") == study.size_bytes(model, "int8") + cache


def test_stored_model(teacher):
    before = [p.clone() for p in teacher.parameters()]
    model = study.stored(teacher, "4-bit")
    assert torch.equal(model.embed_tokens.weight, teacher.embed_tokens.weight.bfloat16().float())
    for got, w in zip(study.block_linears(model), study.block_linears(teacher)):
        assert torch.equal(got.weight, study.as_stored(w.weight, "4-bit"))
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters()))


def test_straight_through():
    """The layer computes with the rounded weight; the gradient is that of the weight, and 0 where nothing is kept."""
    w, x = normal(4, 64).requires_grad_(), normal(3, 64, seed=1)
    mask = keep_two(w)
    y = F.linear(x, study.Stored("4-bit", mask)(w))
    torch.testing.assert_close(y, F.linear(x, study.as_stored(w.detach() * mask, "4-bit")))
    y.sum().backward()
    torch.testing.assert_close(w.grad, x.sum(0).expand_as(w) * mask)


# ---- students and damaged models


def test_student(teacher, monkeypatch):
    narrow = study.student(Llama.from_pretrained(TEACHER), "narrow", "fresh", 0)
    share = sum(p.numel() for p in narrow.parameters()) / 2_689_792
    assert share == pytest.approx(0.25, abs=0.01)
    shallow = [study.student(teacher, "shallow", "fresh", seed) for seed in (0, 0, 1)]
    first, same, other = (x.layers[0].mlp.up_proj.weight for x in shallow)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    alternate = study.student(teacher, "shallow", "alternate", 0)
    assert alternate.config == shallow[0].config
    for i, j in ((0, 0), (1, 2)):
        for name, p in alternate.layers[i].state_dict().items():
            assert torch.equal(p, teacher.layers[j].state_dict()[name])
    alternate.layers[0].mlp.up_proj.weight.data.zero_()
    assert len(teacher.layers) == 4
    assert teacher.layers[0].mlp.up_proj.weight.any()
    ids = TEXT[:20][None]
    assert alternate(ids).shape == shallow[0](ids).shape


@pytest.fixture
def short(monkeypatch):
    """Repeated text instead of the library's files, and little of it for calibration."""
    monkeypatch.setattr(study.corpus, "read", lambda split, names=None: TEXT[:1600] if split == "train" else TEXT)
    monkeypatch.setattr(study, "calibration", lambda **_: [TEXT[:512].view(8, 64)])


@pytest.mark.parametrize("how", study.DAMAGES)
def test_damaged_stays_damaged(how, teacher, lessons, short):
    """Training keeps what was damaged: two of four, fewer heads, few levels; and it moves the weights that are left."""
    before = [p.clone() for p in teacher.parameters()]
    model, form = study.damaged(teacher, how)
    untrained = study.damaged(teacher, how)[0]
    r = replace(study.RECOVERY, seed=3, steps=2, batch=2, length=32, warmup=1, muon_lr=0.02)
    study.distil(model, lessons, r, study.LOSSES["KD, T=1"], TEXT[:256], every=2)
    trained = study.stored(study.whole(model), form)
    assert not any(parametrize.is_parametrized(x) for x in study.block_linears(trained))
    assert study.size_bytes(trained, form) < study.size_bytes(teacher, "bf16")
    for linear, old in zip(study.block_linears(trained), study.block_linears(study.whole(untrained))):
        w = linear.weight.detach()
        assert torch.equal(w, study.as_stored(w, form))
        assert linear.weight.shape == old.weight.shape
        if how == "2:4":
            pack_24(w, w != 0)  # refuses more than two of four
            assert ((w != 0) == (old.weight != 0)).float().mean() > 0.99
    moved = [
        not torch.equal(a.weight, b.weight)
        for a, b in zip(study.block_linears(trained), study.block_linears(untrained))
    ]
    assert all(moved) if form in ("2:4", "bf16") else any(moved)
    if how == "narrower":
        kept = [len(block.mlp.up_proj.weight) for block in trained.layers]
        assert kept == [64, 32, 32, 64]
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters()))


# ---- training


def test_lessons(teacher, lessons):
    calls = []
    lessons.teacher = lambda ids: calls.append(1) or teacher(ids)
    for _ in range(2):
        for step in (1, 0):
            y, logits = lessons(step)
            assert torch.equal(y, train.batch(TEXT[:1600], step, SMALL))
            torch.testing.assert_close(logits.float(), teacher(corpus.with_bos(y)), rtol=1e-3, atol=1e-3)
    assert len(calls) == 2


def test_continued(teacher):
    """The same ids as from whole forward passes without a cache; the first half is the text's."""
    model, y = study.copy.deepcopy(teacher).double(), TEXT[:48].view(2, 24)
    for p in model.parameters():
        p.data *= 20 if p.dim() == 2 else 1  # so that it looks at what stands where
    got = study.continued(model, y, torch.Generator().manual_seed(1))
    generator, want = torch.Generator().manual_seed(1), y[:, :12]
    for _ in range(12):
        x = torch.cat((torch.full((2, 1), corpus.BOS), want), 1)
        want = torch.cat((want, torch.multinomial(model(x)[:, -1].softmax(-1), 1, generator=generator)), 1)
    assert torch.equal(got, want)


def test_loss_of():
    z, t, y = normal(2, 3, 10), normal(2, 3, 10, seed=1), torch.arange(6).view(2, 3)
    torch.testing.assert_close(study.loss_of(z, t, y, None), F.nll_loss(z.log_softmax(-1).view(6, 10), y.view(-1)))
    for options in study.LOSSES.values():
        if options:
            want = {k: v for k, v in options.items() if k != "ending"}
            torch.testing.assert_close(study.loss_of(z, t, y, options), kd_loss(z, t, **want))
            # the fused kernel would give the same training
            torch.testing.assert_close(kd.kd_loss(z, t, **want), kd_loss(z, t, **want))
    assert study.LOSSES["KD, T=4"]["temperature"] == 4.0


def test_distil_by_hard_labels_is_training(teacher, lessons, tmp_path):
    """With hard labels it is `train.train`, step for step: the same optimisers, rates and batches."""
    ours, theirs = (study.student(teacher, "shallow", "fresh", 1) for _ in range(2))
    r = replace(SMALL, steps=4, warmup=2)  # the rate rises, stays and falls
    curve = study.distil(ours, lessons, r, None, TEXT[:256], every=1)
    expected = train.train(theirs, r, TEXT[:1600], TEXT[:256], tmp_path, every=1)
    assert [step for step, _ in curve] == [0, 1, 2, 3, 4]
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert expected[-1][0] == curve[-1][0]


def test_a_student_of_its_own_teacher_learns_nothing(teacher, lessons):
    """At the teacher's own weights the divergence has no gradient; the text still has one. (AdamW and Muon would blow
    up a gradient of rounding errors, so the gradient is looked at, and not a step.)"""
    model = study.copy.deepcopy(teacher)
    y, logits = lessons(0)
    logits = lessons.logits(y)
    for name, options in study.LOSSES.items():
        model.zero_grad()
        study.loss_of(model(corpus.with_bos(y)), logits, y, options).backward()
        size = max(p.grad.abs().max().item() for p in model.parameters())
        assert (size > 1e-3) if options is None else (size < 1e-5), name


@pytest.mark.parametrize("ending, maker", [("the student's", "continued"), ("another text's", "exchanged")])
def test_other_endings(ending, maker, teacher, lessons, monkeypatch):
    """Share 0 is plain KD; share 1 never learns from the second half of the text, and asks the teacher anew."""

    def trained(options):
        model = study.student(teacher, "shallow", "fresh", 1)
        study.distil(model, lessons, SMALL, options, TEXT[:256], every=2)
        return model.embed_tokens.weight

    plain = trained(dict(temperature=1.0))
    monkeypatch.setattr(study, "MIXED", 0.0)
    assert torch.equal(trained(dict(temperature=1.0, ending=ending)), plain)
    monkeypatch.setattr(study, "MIXED", 1.0)
    written = []
    original = getattr(study, maker)
    monkeypatch.setattr(study, maker, lambda *a: written.append(original(*a)) or written[-1])
    asked = []
    monkeypatch.setattr(lessons, "logits", lambda y: asked.append(y) or study.Lessons.logits(lessons, y))
    assert not torch.equal(trained(dict(temperature=1.0, ending=ending)), plain)
    assert len(written) == len(asked) == 2
    assert all(torch.equal(a, b) for a, b in zip(written, asked))


def test_exchanged():
    y = torch.arange(15).view(3, 5)
    assert study.exchanged(y).tolist() == [[0, 1, 12, 13, 14], [5, 6, 2, 3, 4], [10, 11, 7, 8, 9]]


def test_kd_cost(teacher):
    """The teacher's forward pass, 2 of the 6 operations a weight that training takes."""
    assert study.kd_cost(teacher, teacher) == pytest.approx(4 / 3)


def test_gaps(teacher):
    other = study.student(teacher, "shallow", "fresh", 1)
    assert study.gaps(teacher, teacher, TEXT, rows=2) == {"forward_kl": 0.0, "reverse_kl": 0.0}
    got = study.gaps(other, teacher, TEXT, rows=2)
    x = corpus.with_bos(TEXT[:512].view(2, 256))
    p, q = (m(x).double().log_softmax(-1) for m in (teacher, other))
    assert got["forward_kl"] == pytest.approx(((p.exp() * (p - q)).sum(-1).mean() / np.log(2)).item(), rel=1e-4)
    assert got["reverse_kl"] == pytest.approx(((q.exp() * (q - p)).sum(-1).mean() / np.log(2)).item(), rel=1e-4)


# ---- the record


@pytest.fixture
def small_study(teacher, tmp_path, monkeypatch, short):
    """study(seed) on a small teacher and a short text, two steps a run."""
    teacher.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(study, "TEACHER", tmp_path / "teacher")
    monkeypatch.setattr(study.train, "WORK", tmp_path / "work")
    monkeypatch.setattr(study, "RECIPE", replace(study.RECIPE, steps=2, batch=2, length=32, warmup=1))
    monkeypatch.setattr(study, "RECOVERY", replace(study.RECOVERY, steps=2, batch=2, length=32, warmup=1))
    monkeypatch.setitem(study.STUDENTS, "narrow", dict(hidden_size=32, intermediate_size=32))
    for name, value in dict(EVAL_TEXT=512, CURVE_TEXT=256, GAP_ROWS=1, POINTS=2, SLICE_STEPS=2).items():
        monkeypatch.setattr(study, name, value)
    return study.study


def test_study(small_study, tmp_path):
    samples = {seed: small_study(seed) for seed in (0, 2)}
    assert not list((tmp_path / "work").rglob("*.json"))  # nothing is left that a later study would go on from
    for seed, sample in samples.items():
        rows = {(row["student"], row["first"], row["loss"]): row for row in sample["students"]}
        assert list(rows) == [tuple(names) for *names, seeds in study.RUNS if seed < seeds]
        assert len({row["bits"] for row in rows.values()}) == len(rows)  # as many models
        for (which, first, _), row in rows.items():
            assert [step for step, _ in row["curve"]] == [0, 1, 2]
            assert row["curve"][0] == rows[which, first, "hard labels"]["curve"][0]  # the same first weights
            assert row["rounded"]["size"] < row["size"]
            assert row["rounded"]["bits"] != row["bits"]
    recovered = {(row["how"], row["loss"]): row for row in samples[0]["recovered"]}
    assert list(recovered) == [(how, loss) for how in study.DAMAGES for loss in (None, "hard labels", "KD, T=1")]
    assert samples[2]["recovered"] == []
    assert samples[2]["trained_long"] is None
    assert (samples[0]["trained_long"]["how"], samples[0]["trained_long"]["loss"]) == study.TRAINED_LONG
    for sample in samples.values():  # a step instead of two, and the model of no other run
        assert [step for step, _ in sample["equal_operations"]["curve"]] == [0, sample["equal_operations"]["steps"]] == [0, 1]
        assert sample["equal_operations"]["bits"] not in {row["bits"] for row in sample["students"]}
    assert samples[2]["slice"] is None
    narrow = {row["loss"]: row for row in samples[0]["students"] if row["student"] == "narrow"}
    for loss in ("hard labels", "KD, T=2"):
        assert samples[0]["slice"][loss] == narrow[loss]["curve"][-1][1]
    assert samples[2]["recipe"] == asdict(replace(study.RECIPE, seed=2))
    table = {point["name"]: point for point in study.points(samples)}
    hard = [row["bits"] for s in samples.values() for row in s["students"][:1]]
    assert table["narrow, fresh, hard labels"]["bits"] == pytest.approx(np.mean(hard))
    assert table["narrow, fresh, hard labels"]["spread"] == max(hard) - min(hard) > 0
    assert table["2:4, not trained"]["size"] == recovered["2:4", None]["size"]


def test_an_interrupted_study_goes_on(small_study, tmp_path, monkeypatch):
    """Runs that were finished are not run again, and the record is what it would have been."""
    monkeypatch.setattr(study, "RUNS", study.RUNS[:2])
    monkeypatch.setattr(study, "DAMAGES", ("int8",))
    whole, original, started = small_study(1), study.student_run, []

    def failing(*options):
        started.append(options[-1])
        if len(started) == 2:
            raise KeyboardInterrupt
        return original(*options)

    monkeypatch.setattr(study, "student_run", failing)
    with pytest.raises(KeyboardInterrupt):
        small_study(1)
    assert small_study(1) == whole
    assert started == ["hard labels", "KD, T=1", "KD, T=1", "KD, T=1"]  # the last with fewer steps


def test_the_record_is_of_this_study():
    """The committed record: every run of every seed, from the committed teacher, by these recipes."""
    recorded = record.experiment("distillation")
    assert recorded.weights_sha256 == hashlib.sha256((TEACHER / "model.safetensors").read_bytes()).hexdigest()
    assert tuple(recorded.samples) == recorded.seeds == study.experiments()["distillation"].seeds
    for seed, sample in recorded.samples.items():
        assert sample["recipe"] == asdict(replace(study.RECIPE, seed=seed))
        assert sample["recovery"] == asdict(replace(study.RECOVERY, seed=seed))
        rows = [(row["student"], row["first"], row["loss"]) for row in sample["students"]]
        assert rows == [tuple(names) for *names, seeds in study.RUNS if seed < seeds]
        assert len(sample["recovered"]) == {0: 15, 1: 10, 2: 0}[seed]
        assert sample["equal_operations"]["steps"] < sample["recipe"]["steps"] / 2
        assert bool(sample["trained_long"]) == (seed < study.RECOVERY_SEEDS)
        for row in sample["students"]:
            assert [step for step, _ in row["curve"]] == [0, 40, 80, 120, 160, 200]
            assert row["curve"][0][1] > row["curve"][-1][1]
    # chapter 4 measured the same pruned model on the same text; here its weights are rounded to bf16
    pruned = record.experiment("pruning").samples[0]["model"]
    (there,) = (row["bits"] for row in pruned if (row["pattern"], row["method"]) == ("2:4", "SparseGPT"))
    (here,) = (row["bits"] for row in recorded.samples[0]["recovered"] if (row["how"], row["loss"]) == ("2:4", None))
    assert here == pytest.approx(there, abs=2e-3)


def test_frontier():
    def point(name, size, bits):
        return dict(name=name, size=size, decode=-size, bits=bits)

    some = [point("a", 4, 1.0), point("b", 1, 3.0), point("c", 2, 3.0), point("d", 2, 2.0), point("e", 3, 2.0)]
    assert study.frontier(some) == ["b", "d", "a"]
    assert study.frontier(some, cost="decode") == ["a"]


# ---- what the chapter steps through


def frames(shown):
    """[(text, labels in drawing order)] of a player, from the data that the browser gets."""
    data = json.loads(shown.html.split('<script type="application/json">')[1].split("</script>")[0])
    return [(text, [data["states"][i][1] for i in row]) for text, row in zip(data["texts"], data["frames"])]


def test_temperature_player(teacher):
    """Each frame is the teacher's own distribution: names and probabilities of its likeliest bytes."""
    seen = frames(players.temperature_player(teacher))
    wanted = [(c, t) for c in players.CONTEXTS for t in players.TEMPERATURES]
    assert len(seen) == len(wanted)
    for (context, temperature), (text, labels) in zip(wanted, seen):
        x = torch.tensor([[corpus.BOS, *context.encode()]])
        p = (teacher(x)[0, -1] / temperature).softmax(-1)
        top = p.topk(players.SHOWN)
        bars = [f"{players.byte_name(i)}  {x:.3f}" for i, x in zip(top.indices.tolist(), top.values)]
        inside, behind = labels[0 : 2 * players.SHOWN : 2], labels[1 : 2 * players.SHOWN : 2]
        assert [a + b for a, b in zip(inside, behind)] == bars
        assert f"At T = {temperature}, {players.byte_name(int(top.indices[0]))} has {top.values[0]:.1%}" in text
        entropy = -(p * p.log2()).sum()
        assert f"{entropy:.2f}" in labels


def test_descents():
    """Forward KL matches the mean of both modes, reverse KL takes one and pays -log of its share."""
    p = players.two_modes().softmax(-1)
    assert p[players.X < 0].sum().item() == pytest.approx(0.6, abs=1e-3)
    ends = {}
    for name, options in players.DIVERGENCES.items():
        for start, path in players.descend(options, (-3.0, 3.0)).items():
            assert len(path) == players.STEPS[-1] + 1
            assert path[0][:2] == pytest.approx((start, 1.0))
            assert path[-1][2] < path[0][2]
            ends[name, start] = path[-1]
    mu, sigma, _ = players.descend(players.DIVERGENCES["forward KL"], (3.0,), steps=400)[3.0][-1]
    q = players.bell(mu, sigma).softmax(-1)
    assert (q * players.X).sum().item() == pytest.approx((p * players.X).sum().item(), abs=1e-5)
    assert (q * players.X**2).sum().item() == pytest.approx((p * players.X**2).sum().item(), rel=1e-5)
    assert ends["reverse KL", -3.0][2] == pytest.approx(-np.log(0.6), abs=2e-3)
    assert ends["reverse KL", 3.0][2] == pytest.approx(-np.log(0.4), abs=2e-3)


def test_landscape_player():
    """25 lanes hold all of the teacher and of the student; the loss is that of the student at its mean and width."""
    for logits in (players.two_modes(), players.bell(0.5, 1.0)):
        lanes = players.lanes_of(logits)
        assert len(lanes) == 25
        assert sum(lanes) == pytest.approx(1.0)
        assert lanes[8] == pytest.approx(logits.softmax(-1)[38:43].sum().item())  # around -2
    seen = frames(players.landscape_player(starts=(3.0,)))
    assert len(seen) == len(players.DIVERGENCES) * len(players.STEPS)
    for i, (name, options) in enumerate(players.DIVERGENCES.items()):
        text, labels = seen[i * len(players.STEPS)]
        assert text.startswith(f"{name} from 3.0, after 0 steps: mean 3.00, width 1.00")
        assert labels[50] == f"{kd_loss(players.bell(3.0, 1.0), players.two_modes(), **options):.3f}"


def test_try_loss(teacher, device):
    sure = study.copy.deepcopy(teacher)
    sure.embed_tokens.weight.data *= 20
    student = study.student(sure, "shallow", "fresh", 0)
    for kind in kd.KINDS:
        said = players.try_loss(kd.kd_loss_and_grad, sure, student, kind, 2, device=device)
        assert said.startswith(f"{kind} at T = 2: loss ")
        other = lambda *a, **o: kd.kd_loss_and_grad(*a, **o | dict(temperature=3.0))  # noqa: E731
        wrong = players.try_loss(other, sure, student, kind, 2, device=device)
        assert wrong.endswith("; WRONG")
        assert said.endswith("; right")


PLANTED_BUGS = [
    ("labkit/distillation_study.py", "2 ** (bits - 1) - 1\n    scale", "2 ** (bits - 1)\n    scale"),
    ("labkit/distillation_study.py", ").bfloat16().to(w.dtype)\n    levels", ").to(w.dtype)\n    levels"),
    ("labkit/distillation_study.py", "(-1, group or w.shape[1])", "(-1, w.shape[1])"),
    ("labkit/distillation_study.py", "+ 2 * n * (k // (group or k))", ""),
    ("labkit/distillation_study.py", "2 * 2 * context", "2 * context"),
    ("labkit/distillation_study.py", "w + (as_stored(w, self.form) - w).detach()", "as_stored(w, self.form)"),
    ("labkit/distillation_study.py", "        w = w.masked_fill(~self.mask, 0)\n", ""),
    ("labkit/distillation_study.py", "model.layers[::2]", "model.layers[: len(model.layers) // 2]"),
    ("labkit/distillation_study.py", "STUDENTS[which]), seed)", "STUDENTS[which]), 0)"),
    (
        "labkit/distillation_study.py",
        "            self.kept[step] = y, self.logits(y).half()\n",
        "            return y, self.logits(y).half()\n",
    ),
    ("labkit/distillation_study.py", "        at = at[-1:] + 1\n", "        at = at[-1:]\n"),
    ("labkit/distillation_study.py", "            teacher_logits = lessons.logits(y)\n", ""),
    ("labkit/distillation_study.py", "peak * train.rate(step, r)", "peak"),
    ("labkit/distillation_study.py", "bits = torch.tensor(2.0).log()", "bits = 1.0"),
    ("labkit/distillation_study.py", "stored(model, form)\n    cost", "model\n    cost"),
    ("labkit/distillation_study.py", "    shutil.rmtree(work, ignore_errors=True)\n", ""),
    ("labkit/distillation_study.py", "    if not file.exists():\n", "    if True:\n"),
    ("labkit/distillation_study.py", 'if point["bits"] < best:', 'if point["bits"] <= best:'),
    ("labkit/distillation_players.py", "torch.tensor(share).log()", "torch.tensor(share)"),
    (
        "labkit/distillation_players.py",
        "softened(logits, temperature)\n        top",
        "softened(logits, 1.0)\n        top",
    ),
]
