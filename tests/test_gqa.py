"""Shared KV heads: the kernels and the bytes they load, the sizes of real models, and converting one model to another."""

import copy
import hashlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from fresh_memory import nan_in_fresh_memory
from test_flash_decoding import BAD, GOOD
from torch import nn

import kernels.flash_decoding as fd
import kernels.gqa as gqa
from labkit import bench, conversion, corpus, record, trace, train
from labkit import gqa as ref
from labkit.attention import decode_attention
from labkit.check import DECODE_CASES, DecodeCase, assert_matches, randn
from labkit.gpus import GPUS
from labkit.model import TEACHER, Config, Llama

# ---- kernels


# A program a query head: groups of 48 and 64 would be hundreds of programs in the interpreter.
SMALL_GROUPS = [c for c in DECODE_CASES if c.name not in ("group 48 of wide heads", "group 64")]


@pytest.mark.parametrize("case", SMALL_GROUPS, ids=lambda c: c.name)
def test_expanded(case, device, monkeypatch):
    nan_in_fresh_memory(monkeypatch)
    q, k, v, kv_lens = case.tensors(device)
    got = gqa.expanded_decoding(q, k, v, kv_lens, num_splits=case.num_splits, sm_scale=case.sm_scale)
    assert_matches(got, decode_attention, q, k, v, kv_lens, sm_scale=case.sm_scale)


SOME_HEADS = [
    ("group 8, four programs", DecodeCase("", (129, 0, 40), 8, 1, 64, torch.bfloat16), 2),
    ("group 8, two programs", DecodeCase("", (129,), 16, 2, 80, torch.float16, num_splits=2), 4),
    ("group 6, two programs", DecodeCase("", (70, 5), 12, 2, 128, torch.float32, num_splits=1), 3),
    ("group 64, two programs", DecodeCase("", (131,), 64, 1, 64, torch.float16, num_splits=2), 32),
    ("group 6, all of it", DecodeCase("", (70, 65), 12, 2, 64, torch.bfloat16, strided=True), 6),
]


@pytest.mark.parametrize(("name", "case", "heads"), SOME_HEADS, ids=[name for name, *_ in SOME_HEADS])
def test_some_heads_a_program(name, case, heads, device, monkeypatch):
    nan_in_fresh_memory(monkeypatch)
    q, k, v, kv_lens = case.tensors(device)
    got = gqa.gqa_decoding(q, k, v, kv_lens, num_splits=case.num_splits, heads=heads)
    assert_matches(got, ref.gqa_decoding, q, k, v, kv_lens)


def test_gqa_decoding_is_flash_decoding(device, monkeypatch):
    nan_in_fresh_memory(monkeypatch)
    q, k, v, kv_lens = DecodeCase("", (130, 7), 8, 2, 64, torch.bfloat16).tensors(device)
    options = dict(num_splits=3, sm_scale=0.3)
    got = gqa.gqa_decoding(q, k, v, kv_lens, **options)
    assert_matches(got, decode_attention, q, k, v, kv_lens, sm_scale=0.3)
    assert all(torch.equal(a, b) for a, b in zip(got, fd.flash_decoding(q, k, v, kv_lens, **options)))
    assert all(torch.equal(a, b) for a, b in zip(gqa.gqa_decoding(q, k, v, kv_lens, num_splits=3, heads=4),
                                                 fd.flash_decoding(q, k, v, kv_lens, num_splits=3)))  # fmt: skip


@pytest.mark.parametrize("case", DECODE_CASES[::3], ids=lambda c: c.name)
def test_references_agree(case):
    q, k, v, kv_lens = case.tensors()
    got = ref.expanded_decoding(q, k, v, kv_lens, sm_scale=case.sm_scale)
    assert_matches(got, ref.gqa_decoding, q, k, v, kv_lens, sm_scale=case.sm_scale)


FUNCTIONS = [getattr(module, name) for module in (gqa, ref) for name in ("gqa_decoding", "expanded_decoding")]
CHECKED = ("q: two dimensions", "heads do not divide", "k: other dtype", "v: other length", "kv_lens: too long")


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f"{f.__module__}.{f.__name__}")
@pytest.mark.parametrize("case", CHECKED)
def test_bad_input_is_named(case, function, device, monkeypatch):
    monkeypatch.setenv("LAB_CHECK", "1")
    name, changed = BAD[case]
    given = {n: torch.zeros(x) if isinstance(x, tuple) else x for n, x in (GOOD | changed).items()}
    with pytest.raises(ValueError, match=f"^{name}\\b.*got .* expected "):
        function(*(x.to(device) for x in given.values()))


@pytest.mark.parametrize("heads", [0, 3, 8, 2.0])
def test_heads_must_divide_the_group(heads, device):
    q, k, v, kv_lens = DecodeCase("", (9,), 8, 2, 64).tensors(device)
    with pytest.raises(ValueError, match=r"^heads: got .* expected a divisor of 4"):
        gqa.gqa_decoding(q, k, v, kv_lens, heads=heads)
    with pytest.raises(ValueError, match=r"^num_splits: got"):
        gqa.expanded_decoding(q, k, v, kv_lens, num_splits=0)


@pytest.mark.parametrize(("heads", "times"), [(None, 1), (4, 1), (2, 2), (1, 4)])
def test_bytes_that_a_launch_loads(heads, times):
    """Counted in the run: each valid row of K and V once for each program of its group."""
    problem = ref.traced_problem((70, 33), num_q_heads=8, num_kv_heads=2)
    (o, lse), walk = ref.watch("gqa_decoding", problem | dict(num_splits=2, heads=heads))
    assert_matches((o, lse), decode_attention, *problem.values())
    once = sum((70, 33)) * 2 * 2 * problem["k"].shape[-1] * 4  # keys, KV heads, K and V, fp32
    assert ref.loaded_bytes(walk) == times * once
    if heads == 1:
        _, walk = ref.watch("expanded_decoding", problem | dict(num_splits=2))
        assert ref.loaded_bytes(walk) == times * once


def test_watch_finds_the_function_elsewhere():
    """The same launch, watched from the file of its kernel and from the one that calls it."""
    problem = ref.traced_problem((40,)) | {"num_splits": 1}
    _, here = trace.watch("kernels.flash_decoding", "attend_tile", "flash_decoding", problem)
    _, there = trace.watch("kernels.flash_decoding", "attend_tile", "kernels.gqa:gqa_decoding", problem)
    assert len(here) == len(there) > 0
    assert all(np.array_equal(a.inputs[2], b.inputs[2]) for a, b in zip(here, there))


def test_reads_player_shows_the_runs():
    """Two KV heads of three tiles, group 4: the last frame has every tile loaded once, and four times."""
    problem = ref.traced_problem((90,))
    walks = {name: ref.watch("gqa_decoding", problem | dict(num_splits=1, heads=h))[1] for name, h in (("A", 1), ("B", None))}
    assert (len(walks["A"]), len(walks["B"])) == (24, 6)
    html = ref.reads_player(problem, walks).html
    for text in (
        "A: program 7 loads KV head 1 again.", "B: program 1 (query heads 4–7) loads KV head 1.", "64–89",
        "A: program 3 loads KV head 0 again.", "B: done after 6 loads.", "4x", "92,160", "23,040",
    ):  # fmt: skip
        assert text in html, text
    assert "5x" not in html


# ---- sizes


@pytest.mark.parametrize(
    ("arguments", "kb"),
    [((32, 32, 128, torch.float16), 512), ((80, 8, 128, torch.bfloat16), 320), ((32, 1, 64, torch.float32), 16)],
)
def test_kv_bytes_per_token(arguments, kb):
    assert ref.kv_bytes_per_token(*arguments) == kb * 1024


@pytest.mark.parametrize("i", range(4))
def test_kv_bytes_names_what_is_wrong(i):
    name = ("num_layers", "num_kv_heads", "head_dim", "dtype")[i]
    for wrong in (0, -1, 2.0, True):
        arguments = [4, 2, 64, torch.float16]
        arguments[i] = wrong
        with pytest.raises(ValueError, match=f"^{name}: got .* expected "):
            ref.kv_bytes_per_token(*arguments)


# vocab_size, hidden_size, intermediate_size, layers, query heads, KV heads, head_dim, biases on q, k, v
LLAMAS = {
    "Llama-2-7B": (32000, 4096, 11008, 32, 32, 32, 128, False),
    "Llama-2-70B": (32000, 8192, 28672, 80, 64, 8, 128, False),
    "Llama-3-8B": (128256, 4096, 14336, 32, 32, 8, 128, False),
    "Llama-3-70B": (128256, 8192, 28672, 80, 64, 8, 128, False),
    "Mistral-7B": (32000, 4096, 14336, 32, 32, 8, 128, False),
    "Qwen2.5-7B": (152064, 3584, 18944, 28, 28, 4, 128, True),
}


def count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


@pytest.mark.parametrize("name", LLAMAS)
def test_models_are_the_real_ones(name):
    """Built without memory from their configs: parameters, and the weights that another number of KV heads saves."""
    model, (vocab, hidden, inner, layers, q_heads, kv_heads, dim, bias) = ref.MODELS[name], LLAMAS[name]
    config = Config(vocab, hidden, inner, layers, q_heads, kv_heads, dim, qkv_bias=bias)
    assert model == ref.Model(layers, hidden, q_heads, kv_heads, dim, count(config), vocab)
    with torch.device("meta"):
        looked_up = Llama(config).embed_tokens.weight.numel()
    assert model.read_params == count(config) - looked_up
    if not bias:
        one = replace(config, num_key_value_heads=1)
        assert model.with_kv_heads(1).num_params == count(one)


@pytest.mark.parametrize(("name", "vocab"), [("Falcon-7B", 65024), ("Falcon-40B", 65024)])
def test_falcons_are_the_real_ones(name, vocab):
    """One MLP of four times the width without a gate, embeddings tied, LayerNorms with a bias: one a layer, or two."""
    m = ref.MODELS[name]
    h, qkv = m.hidden_size, (m.num_q_heads + 2 * m.num_kv_heads) * m.head_dim
    norms = 2 * h * (2 if name == "Falcon-40B" else 1)
    assert m.num_q_heads * m.head_dim == h
    assert m.num_params == m.num_layers * (h * qkv + h * h + 8 * h * h + norms) + vocab * h + 2 * h
    assert (m.vocab_size, m.read_params) == (vocab, m.num_params)


def test_largest_batch_fits_and_one_more_does_not():
    model, memory = ref.MODELS["Llama-3-8B"], 80e9
    fits = ref.largest_batch(model, 8192, memory)
    used = [model.weight_bytes() + model.kv_bytes(batch, 8192) for batch in (fits, fits + 1)]
    assert used[0] <= ref.MEMORY_SHARE * memory < used[1]
    assert ref.largest_batch(ref.MODELS["Llama-2-70B"], 4096, memory) == 0


def test_decode_floor_by_hand():
    """Llama-2-7B on an A100: at batch 1 memory decides, at batch 4096 with one key the arithmetic does."""
    model, gpu = ref.MODELS["Llama-2-7B"], GPUS["A100 80GB"]
    read = 6_738_415_616 - 32_000 * 4096
    want = (2 * read + 1000 * 512 * 1024) / 2.039e12
    assert ref.decode_floor(model, 1, 1000, gpu) == pytest.approx(want)
    assert ref.decode_floor(model, 1, 1000, gpu, 4) == pytest.approx(want / 4)
    want = 4096 * (2 * read + 4 * 32 * 4096) / 312e12
    assert ref.decode_floor(model, 4096, 1, gpu) == pytest.approx(want)


def test_intensity_is_the_group_in_16_bits():
    assert [ref.intensity(32, heads, torch.bfloat16) for heads in (32, 8, 1)] == [1, 4, 32]
    assert ref.intensity(64, 8, torch.float32) == 4
    with pytest.raises(ValueError, match=r"^q \(heads\): got 32 query heads for 5"):
        ref.intensity(32, 5, torch.bfloat16)


def test_sizes_players():
    """Llama-3-8B by hand, and what the player and the live cell's callback say of it."""
    table = ref.sizes("Llama-3-8B", 8192, 16, "H200")
    assert table["KV heads"] == [32, 8, 1]
    assert table["one token"] == ["524 kB", "131 kB", "16 kB"]
    assert table["KV cache"][1] == "17.2 GB"  # 16 * 8192 * 131,072 bytes
    assert table["largest batch"][1] == f"{int((0.9 * 141e9 - 2 * 8_030_261_248) / (8192 * 131_072)):,}"
    assert table["decode floor"][1] == "6.7 ms"  # (16.06 - 1.05 + 17.18) GB at 4.8 TB/s
    assert ref.sizes("Llama-2-70B", 2048, 1, "A100 80GB")["decode floor"] == 3 * ["does not fit"]
    html = ref.sizes_player().html
    assert "Llama-3-8B, 16 x 8,192 tokens on H200: 32 query heads on 8." in html
    assert "17.2 GB" in html
    said = ref.try_sizes("Llama-3-8B", 4, 8192, 16)
    assert said.startswith("Llama-3-8B with 8 KV heads: 131 kB a token, 17.2 GB for 16 x 8,192; up to 103 sequences")
    assert said.endswith("a step takes at least 6.71 ms")
    assert "that does not fit" in ref.try_sizes("Llama-2-70B", 1, 8192, 16)
    assert "with 1 KV head:" in ref.try_sizes("Falcon-7B", 71, 2048, 1)


def test_benchmark_cases():
    """Unique names, the same small and large; bytes are those of one read of K, V and q and one write of o."""
    cases = bench.topic_cases("gqa")
    assert [case.name for case in cases] == [case.name for case in bench.topic_cases("gqa", tiny=True)]
    by_name = {case.name: case for case in cases}
    assert by_name["B=16 L=4096, 8 KV heads"].bytes == 2 * 2 * 16 * 128 * (4096 * 8 + 32)
    prefill = by_name["prefill, 8 KV heads"]
    assert prefill.bytes == 2 * 2 * 2048 * 128 * (8 + 32)
    assert prefill.flops == 4 * 32 * 128 * sum(range(1, 2049))


def test_peers_of_this_topic(device):
    """repeat_kv and causal SDPA, with two groups of three, and lengths that differ refused."""
    q, k, v, kv_lens = DecodeCase("", (20, 20), 6, 2, capacity=24).tensors(device)
    assert_matches((ref.repeated_sdpa(q, k, v, kv_lens)(),), lambda *a: decode_attention(*a)[:1], q, k, v, kv_lens)
    with pytest.raises(ValueError, match=r"^kv_lens: got different lengths"):
        ref.repeated_sdpa(q, k, v, torch.tensor([20, 19], dtype=torch.int32))
    rng = np.random.default_rng(0)
    q, k, v = (randn(rng, 2, 33, heads, 64, dtype=torch.bfloat16, device=device) for heads in (6, 2, 2))
    for name in ("SDPA flash", "SDPA flash, repeated"):
        assert_matches(ref.PREFILL_PEERS[name](q, k, v)(), ref.attention, q, k, v)


@pytest.mark.parametrize("section", [ref.HEADS, ref.PREFILL])
def test_a_case_as_it_is_recorded(section, device):
    """One small case of a section, as `record --dry` runs all of them."""
    case = next(case for case in bench.topic_cases("gqa", tiny=True) if case.section == section)
    rows = bench.measure("gqa", replace(case, peers={}), gqa, bench.Machine(device, record.stamp(device)))
    assert [row.provider for row in rows] == [case.op, *case.variants]
    assert all(row.verdict.startswith("ok") for row in rows)


# ---- conversion


def by_hand(weight, num_to, head_dim):
    """The mean of adjacent heads, head by head."""
    heads = list(weight.double().split(head_dim))
    size = len(heads) // num_to
    return torch.cat([sum(heads[i * size : (i + 1) * size]) / size for i in range(num_to)]).to(weight.dtype)


@pytest.mark.parametrize("num_to", [6, 3, 2, 1])
@pytest.mark.parametrize("shape", [(24, 5), (24,)], ids=["weight", "bias"])
def test_pool(shape, num_to):
    w = randn(np.random.default_rng(0), *shape)
    assert torch.equal(conversion.pool_kv_heads(w, 6, num_to, 4), by_hand(w, num_to, 4))
    first = conversion.pool_kv_heads(w, 6, num_to, 4, "first")
    step = 6 // num_to * 4
    assert torch.equal(first, torch.cat([w[i : i + 4] for i in range(0, 24, step)]))
    first.zero_()
    assert w.all()  # a copy


def test_pool_random_is_new_at_the_same_scale():
    w = 3 * randn(np.random.default_rng(0), 512, 64)
    one, other = (conversion.pool_kv_heads(w, 8, 2, 64, "random", generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert one.shape == other.shape == (128, 64)
    assert not torch.equal(one, other)
    for new in (one, other):
        assert float(new.std()) == pytest.approx(3, rel=0.05)
        assert abs(float(torch.corrcoef(torch.stack([new.flatten(), by_hand(w, 2, 64).flatten()]))[0, 1])) < 0.05
    assert not conversion.pool_kv_heads(w[:, 0], 8, 2, 64, "random").any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", ["mean", "first"])
def test_pool_is_exact_on_equal_heads(how, dtype):
    """Groups of three, where a mean in the weight's dtype would be off by a rounding."""
    w = randn(np.random.default_rng(1), 2 * 16, 8, dtype=dtype)
    doubled = w.unflatten(0, (2, 16)).repeat_interleave(3, 0).flatten(0, 1)
    assert torch.equal(conversion.pool_kv_heads(doubled, 6, 2, 16, how), w)


BAD_POOL = {
    "weight: other rows": ("weight", dict(weight=torch.zeros(31, 8))),
    "weight: three dimensions": ("weight", dict(weight=torch.zeros(32, 8, 1))),
    "weight: integers": ("weight", dict(weight=torch.zeros(32, 8, dtype=torch.int64))),
    "weight: a list": ("weight", dict(weight=[1.0])),
    "to does not divide": ("num_kv_heads_to", dict(num_kv_heads_to=3)),
    "to is more": ("num_kv_heads_to", dict(num_kv_heads_to=16)),
    "to is zero": ("num_kv_heads_to", dict(num_kv_heads_to=0)),
    "from is zero": ("num_kv_heads_from", dict(num_kv_heads_from=0)),
    "head_dim: float": ("head_dim", dict(head_dim=4.0)),
    "how": ("how", dict(how="median")),
}


@pytest.mark.parametrize("case", BAD_POOL)
def test_pool_names_what_is_wrong(case):
    name, changed = BAD_POOL[case]
    good = dict(weight=torch.zeros(32, 8), num_kv_heads_from=8, num_kv_heads_to=2, head_dim=4, how="mean")
    with pytest.raises(ValueError, match=f"^{name}\\b.*got .* expected "):
        ref.pool_kv_heads(**(good | changed))


def model_with_equal_heads(config, groups):
    """A random model whose KV heads are equal in each of `groups` groups of adjacent heads."""
    model = train.init(config, 0)
    for layer in model.layers:
        for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            for name, x in list(proj.named_parameters()):
                x = x.detach() + 0.3 * torch.rand_like(x)  # init leaves biases at the layer's default
                heads = x.unflatten(0, (groups, -1, config.head_dim))[:, :1]
                equal = heads.expand(-1, config.num_key_value_heads // groups, *heads.shape[2:])
                setattr(proj, name, nn.Parameter(equal.flatten(0, 2).clone()))
    return model.eval()


LLAMA = Config(64, 48, 64, 2, 6, 6, 8)
KINDS = {
    "llama": LLAMA,
    "qwen2, biases": replace(LLAMA, qkv_bias=True, architecture="Qwen2ForCausalLM", num_attention_heads=12),
    "qwen3, norms on q and k": replace(LLAMA, qk_norm=True, architecture="Qwen3ForCausalLM"),
}


@pytest.mark.parametrize("how", ["mean", "first"])
@pytest.mark.parametrize("kind", KINDS)
def test_conversion_is_exact_where_heads_are_equal(kind, how):
    """Through the whole model, to the last bit; also with biases, with norms on q and k, and with groups of three."""
    model = model_with_equal_heads(KINDS[kind], 2)
    converted = conversion.convert(model, 2, how)
    ids = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids)
        assert torch.equal(converted(ids), want)
        assert not torch.equal(conversion.convert(model, 1, how)(ids), want)


def test_conversion_leaves_the_model_alone_and_can_be_saved(tmp_path):
    teacher = Llama.from_pretrained(TEACHER)
    before = copy.deepcopy(teacher.state_dict())
    converted = conversion.convert(teacher, 2)
    with torch.no_grad():
        for p in converted.parameters():
            p.add_(1)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert teacher.config.num_key_value_heads == 8
    assert converted.lm_head.weight is converted.embed_tokens.weight
    assert converted.layers[0].self_attn.v_proj.out_features == 2 * 32
    converted.save_pretrained(tmp_path)
    again = Llama.from_pretrained(tmp_path)
    assert again.config == converted.config == replace(teacher.config, num_key_value_heads=2)
    assert all(torch.equal(x, y) for x, y in zip(again.state_dict().values(), converted.state_dict().values()))
    saved = sum(x.numel() for x in before.values()) - sum(x.numel() for x in again.state_dict().values())
    assert saved == 2 * 4 * 256 * 6 * 32  # K and V, layers, hidden_size, six heads fewer, head_dim


def test_conversion_takes_only_k_and_v():
    teacher = Llama.from_pretrained(TEACHER)
    converted = conversion.convert(teacher, 4).state_dict()
    for name, x in teacher.state_dict().items():
        if "k_proj" in name or "v_proj" in name:
            assert torch.equal(converted[name], by_hand(x, 4, 32))
        else:
            assert torch.equal(converted[name], x)
    drawn = [conversion.convert(teacher, 1, "random", seed=seed).state_dict() for seed in (0, 0, 1)]
    keys = "layers.0.self_attn.k_proj.weight", "layers.0.self_attn.v_proj.weight"
    assert torch.equal(drawn[0][keys[0]], drawn[1][keys[0]])
    assert not torch.equal(drawn[0][keys[0]], drawn[2][keys[0]])
    assert not torch.equal(drawn[0][keys[0]], drawn[0][keys[1]])
    with pytest.raises(ValueError, match=r"^num_kv_heads_to: got 3, expected a divisor of 8"):
        conversion.convert(teacher, 3)


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """The study on a small random model and a short text, two steps a run."""
    config = Config(corpus.VOCAB, 32, 48, 2, 8, 8, 8, tie_word_embeddings=True)
    train.init(config, 0).save_pretrained(tmp_path)
    text = torch.tensor(corpus.encode("def keep(x):\n    return x\n\n") * 60)
    monkeypatch.setattr(conversion, "TEACHER", tmp_path)
    monkeypatch.setattr(conversion.train, "WORK", tmp_path / "work")
    monkeypatch.setattr(conversion.corpus, "read", lambda split, names=None: text[:1600] if split == "train" else text[:300])
    monkeypatch.setattr(conversion, "UPTRAINING", replace(conversion.UPTRAINING, steps=2, batch=2, warmup=1))
    monkeypatch.setattr(conversion, "POINTS", 2)
    study = conversion.study(0)
    assert not list((tmp_path / "work").iterdir())  # nothing is left that a later study would go on from
    return study


def test_study(small_study):
    runs = {(run["heads"], run["how"]): run for run in small_study["runs"]}
    assert list(runs) == list(conversion.RUNS)
    for run in runs.values():
        assert [point[0] for point in run["curve"]] == [0, 1, 2]
        assert run["curve"][-1][2] == round(run["after"], 4)
        assert run["after"] < run["before"] == run["curve"][0][2]
    assert len({run["after"] for run in runs.values()}) == 6  # six models, not one
    assert runs[8, "mean"]["parameters"] - runs[1, "mean"]["parameters"] == 2 * 2 * 32 * 7 * 8
    at_once = {(row["heads"], row["how"]): row["bits"] for row in small_study["at_once"]}
    assert len(at_once) == 9
    for key in (1, "mean"), (1, "first"), (1, "random"):
        assert at_once[key] == runs[key]["before"]
    mean = runs[1, "mean"]
    assert small_study["slice"] == {"converted": mean["before"], "uptrained": round(mean["after"], 4)}
    assert small_study["recipe"]["steps"] == 2


def test_the_share_of_steps_is_the_papers():
    assert conversion.UPTRAINING.steps / train.Recipe.steps == pytest.approx(0.05, abs=0.001)
    assert conversion.UPTRAINING.steps % conversion.POINTS == 0


def test_the_record_is_of_this_study():
    """The committed record: every run, from the committed teacher, with this recipe; later points of a curve are lower."""
    recorded = record.experiment("gqa")
    study = recorded.samples[0]
    assert recorded.weights_sha256 == hashlib.sha256((TEACHER / "model.safetensors").read_bytes()).hexdigest()
    assert study["recipe"] == asdict(conversion.UPTRAINING)
    assert [(run["heads"], run["how"]) for run in study["runs"]] == list(conversion.RUNS)
    for run in study["runs"]:
        steps, _, bits, _ = zip(*run["curve"])
        assert steps == tuple(range(0, 73, 12))
        assert run["heads"] == 8 or bits[0] > bits[1] > bits[-1]


# fmt: off
PLANTED_BUGS = [
    ("kernels/gqa.py", "TILES=group // heads", "TILES=group"),
    ("kernels/gqa.py", "tiles = num_q_heads // heads", "tiles = num_kv_heads"),
    ("kernels/gqa.py", "max_kv_len, num_splits, heads, qk", "max_kv_len, num_splits, group, qk"),
    ("kernels/gqa.py", "group % heads == 0", "num_q_heads % heads == 0"),
    ("kernels/gqa.py", "sm_scale=sm_scale, heads=1)", "sm_scale=sm_scale)"),
    ("kernels/gqa.py", "    merge_splits()", "    pass"),
    ("kernels/gqa.py", "flash_decoding(q, k, v, kv_lens, num_splits=num_splits, sm_scale=sm_scale)", "flash_decoding(q, k, v, kv_lens, num_splits=num_splits)"),
    ("labkit/trace.py", "home or module", "module"),
    ("labkit/gqa.py", "2 * num_layers * num_kv_heads", "num_layers * num_kv_heads"),
    ("labkit/gqa.py", "and not isinstance(count, bool)", ""),
    ("labkit/gqa.py", "2 * group / dtype.itemsize", "group / dtype.itemsize"),
    ("labkit/gqa.py", "(num_kv_heads - self.num_kv_heads)", "(self.num_kv_heads - num_kv_heads)"),
    ("labkit/gqa.py", "6_738_415_616", "6_738_415_617"),
    ("labkit/gqa.py", "41_303_293_952", "41_303_293_953"),
    ("labkit/gqa.py", "room = MEMORY_SHARE * memory_bytes", "room = memory_bytes"),
    ("labkit/gqa.py", "int(room // model", "1 + int(room // model"),
    ("labkit/gqa.py", "max(num_bytes / gpu.bandwidth, flops / gpu.bf16_flops)", "num_bytes / gpu.bandwidth"),
    ("labkit/gqa.py", "flops / gpu.bf16_flops) / num_gpus", "flops / gpu.bf16_flops)"),
    ("labkit/gqa.py", "x.repeat_interleave(num_q_heads // num_kv_heads, dim=2)", "x.repeat(1, 1, num_q_heads // num_kv_heads, 1)"),
    ("labkit/gqa.py", "many = [x.repeat_interleave(group, dim=1) for x in (k, v)]\n            return", "many = [x.repeat(1, group, 1, 1) for x in (k, v)]\n            return"),
    ("labkit/gqa.py", "[x.repeat_interleave(group, dim=1) for x in (k, v)] if repeat", "[x.repeat(1, group, 1, 1) for x in (k, v)] if repeat"),
    ("labkit/gqa.py", "is_causal=True, ", ""),
    ("labkit/gqa.py", "int((v[:, 0] > 0).sum())", "len(v)"),
    ("labkit/gqa.py", "counts[name][head][now[1]] += 1", "counts[name][head][now[1]] = 1"),
    ("labkit/gqa.py", "flops=2 * q_len * (q_len + 1)", "flops=4 * q_len * (q_len + 1)"),
    ("labkit/conversion.py", "groups = weight.unflatten(0, (num_kv_heads_to, -1, head_dim))", "groups = weight.unflatten(0, (-1, num_kv_heads_to, head_dim)).transpose(0, 1)"),
    ("labkit/conversion.py", "groups.double().mean(1)", "groups.mean(1)"),
    ("labkit/conversion.py", "groups[:, 0].clone()", "groups[:, -1].clone()"),
    ("labkit/conversion.py", "groups[:, 0].clone()", "groups[:, 0]"),
    ("labkit/conversion.py", "weight.float().std().cpu()", "0.02"),
    ("labkit/conversion.py", "and num_kv_heads_from % num_kv_heads_to == 0", ""),
    ("labkit/conversion.py", "copy.deepcopy(model), torch", "copy.copy(model), torch"),
    ("labkit/conversion.py", "    converted.config = replace(model.config, num_key_value_heads=num_kv_heads)\n", ""),
    ("labkit/conversion.py", "(layer.self_attn.k_proj, layer.self_attn.v_proj)", "(layer.self_attn.k_proj,)"),
    ("labkit/conversion.py", "list(proj.named_parameters())", "[('weight', proj.weight)]"),
    ("labkit/conversion.py", "torch.Generator().manual_seed(seed)", "torch.Generator().manual_seed(0)"),
    ("labkit/conversion.py", "            proj.out_features = num_kv_heads * head_dim\n", ""),
    ("labkit/conversion.py", "after = train.bits_per_byte(model, held_out)", "after = before"),
    ("labkit/conversion.py", "f\"{heads}-{how}\"", "f\"{heads}\""),
    ("labkit/conversion.py", "    shutil.rmtree(train.WORK / f\"gqa-{seed}\")\n", ""),
    ("labkit/conversion.py", "ALPHA = 0.05", "ALPHA = 0.5"),
]
