"""The decoder: same logits and same text as transformers, any cache in a closure, and a bad checkpoint is named."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from labkit import corpus
from labkit.attention import attention
from labkit.check import BF16, Verdict, randn
from labkit.model import Config, Llama, RMSNorm, load

SMALL = Config(
    vocab_size=99, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
QWEN2 = dict(architecture="Qwen2ForCausalLM", qkv_bias=True, head_dim=8)
VARIANTS = {
    "llama": SMALL,
    "tied": replace(SMALL, tie_word_embeddings=True),
    "llama3 scaling": replace(SMALL, rope_scaling=LLAMA3, rope_theta=500000.0),
    "biased": replace(SMALL, qkv_bias=True, o_bias=True, mlp_bias=True),
    "mistral": replace(SMALL, architecture="MistralForCausalLM", num_key_value_heads=6),
    "qwen2": replace(SMALL, **QWEN2, tie_word_embeddings=True, num_key_value_heads=1),
    "qwen3": replace(SMALL, architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=32),
    "qwen3 biased": replace(SMALL, architecture="Qwen3ForCausalLM", qk_norm=True, qkv_bias=True, o_bias=True),
}

PLANTED_BUGS = [
    ("labkit/model.py", "torch.arange(ids.shape[1], device=ids.device)", "torch.arange(ids.shape[1])"),
    ("labkit/checkpoint.py", "expect(low < high,", "expect(True,"),
    ("labkit/checkpoint.py", ", most=sys.float_info.max", ""),
    ("labkit/checkpoint.py", "expect(shapes.keys() == state.keys(),", "expect(True,"),
    ("labkit/model.py", "a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin"),
    ("labkit/model.py", "x.chunk(2, dim=-1)", "(x[..., ::2], x[..., 1::2])"),
    ("labkit/model.py", "self.eps)).to(x.dtype)", "1e-6)).to(x.dtype)"),
    ("labkit/model.py", "rotate(self.q_norm(q), cos, sin)", "self.q_norm(rotate(q, cos, sin))"),
    ("labkit/model.py", "o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)", "o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.qkv_bias)"),
    ("labkit/model.py", "F.silu(self.gate_proj(x)) * self.up_proj(x)", "self.gate_proj(x) * F.silu(self.up_proj(x))"),
    ("labkit/model.py", "x + self.mlp(self.post_attention_layernorm(x))", "x + self.mlp(self.input_layernorm(x))"),
    ("labkit/model.py", "self.inv_freq = rope_frequencies(config)", "self.register_buffer('inv_freq', rope_frequencies(config), persistent=False)"),
    ("labkit/model.py", "positions.unsqueeze(-1).float() * self.inv_freq", "positions.flatten()[: positions.shape[-1], None].float() * self.inv_freq"),
    ("labkit/model.py", "causal if attend is None else attend", "attend or causal"),
    ("labkit/model.py", "if tied:\n            model.lm_head", "if False:\n            model.lm_head"),
    ("labkit/model.py", "((turns - low) / (high - low)).clamp(0, 1)", "(turns > low).float()"),
    ("labkit/model.py", "folder = Path(path or os.environ.get(\"LAB_MODEL\") or TEACHER)", "folder = Path(path or TEACHER)"),
    ("labkit/model.py", "in_range(\"ids\", ids, 0, self.config.vocab_size - 1)", "in_range(\"ids\", ids, 0, self.config.vocab_size)"),
    ("labkit/model.py", "is_causal=True", "is_causal=False"),
    ("labkit/checkpoint.py", "expect(known, where,", "expect(True, where,"),
    ("labkit/checkpoint.py", "expect(kind in FLOATS,", "expect(True,"),
    ("labkit/checkpoint.py", "expect(shape == shapes[name],", "expect(len(shape) == len(shapes[name]),"),
    ("labkit/checkpoint.py", "expect(not missing,", "expect(True,"),
    ("labkit/checkpoint.py", "expect(not extra,", "expect(True,"),
    ("labkit/checkpoint.py", "expect(not lost,", "expect(True,"),
    ("labkit/checkpoint.py", "expect(same,", "expect(True,"),
    ("labkit/checkpoint.py", "except SafetensorError", "except KeyError"),
    ("labkit/checkpoint.py", "rope.get(\"rope_type\", rope.get(\"type\", \"default\"))", "rope.get(\"rope_type\", \"default\")"),
    ("labkit/checkpoint.py", "settings.get(\"rope_scaling\") or settings.get(\"rope_parameters\") or {}", "settings.get(\"rope_scaling\") or {}"),
    ("labkit/checkpoint.py", "real(\"rope_theta\", 10000.0)", "10000.0"),
    ("labkit/checkpoint.py", "\"head_dim\": 128", "\"head_dim\": 64"),
    ("labkit/checkpoint.py", "if not (folder / shard).is_file():", "if False:"),
    ("labkit/checkpoint.py", "\"/\" not in shard and ", ""),
    ("labkit/checkpoint.py", "return otherwise if eos is None else eos", "return otherwise"),
    ("labkit/checkpoint.py", "not isinstance(value, bool) and 0 < value <= most", "not isinstance(value, bool) and 0 < value"),
    ("labkit/checkpoint.py", "isinstance(arch, str) and arch in ARCHITECTURES", "arch in ARCHITECTURES"),
    ("labkit/checkpoint.py", "not isinstance(value, bool) and 0 < value <= most", "not isinstance(value, bool)"),
    ("labkit/checkpoint.py", "if config.tie_word_embeddings:\n        del", "if False:\n        del"),
    ("labkit/checkpoint.py", "expect(list(x.shape) == shapes[name],", "expect(True,"),
    ("labkit/checkpoint.py", "            continue  # old exports", "            pass  # old exports"),
]  # fmt: skip


def random_model(config, seed=0):
    """Every weight random, norms and biases too, so that none can be left out unnoticed."""
    torch.manual_seed(seed)
    model = Llama(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3 if p.dim() == 1 else 0.15)
    return model.eval()


def random_ids(config, *shape, seed=1):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


class Contiguous:
    """A cache [B, L, Hkv, D] a layer, grown by concatenation."""

    def __init__(self):
        self.kv = {}

    def __call__(self, layer, q, k, v):
        past = self.kv.get(layer)
        self.kv[layer] = (k, v) if past is None else tuple(torch.cat(pair, dim=1) for pair in zip(past, (k, v)))
        return attention(q, *self.kv[layer])


def test_the_norm_is_taken_in_fp32():
    norm = RMSNorm(96, 1e-6)
    x = randn(np.random.default_rng(2), 7, 96, dtype=BF16) * 30
    norm.weight.data = randn(np.random.default_rng(3), 96).to(BF16)
    x64 = x.double()
    want = x64 * (x64.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(norm(x), want.to(BF16) * norm.weight, rtol=0, atol=0)


class Paged:
    """A dictionary of pages, filled in an order of its own. One sequence."""

    def __init__(self, page_size=4):
        self.page_size, self.pages, self.table, self.lens = page_size, {}, [], {}

    def __call__(self, layer, q, k, v):
        for i in range(k.shape[1]):
            n = self.lens.get(layer, 0)
            if n // self.page_size == len(self.table):
                self.table.append(1000 - len(self.table))
            page = self.pages.setdefault((layer, self.table[n // self.page_size]), {})
            page[n % self.page_size] = torch.stack((k[:, i], v[:, i]))
            self.lens[layer] = n + 1
        pages = [self.pages[layer, p] for p in self.table if (layer, p) in self.pages]
        kv = torch.stack([page[i] for page in pages for i in sorted(page)], dim=2)  # [2, B, L, Hkv, D]
        return attention(q, *kv)


class Sinks:
    """Attention sinks: the first num_sinks keys and the last window - num_sinks, unrotated, placed at 0..n-1 in the cache."""

    def __init__(self, model, num_sinks, window):
        self.model, self.num_sinks, self.window, self.kv = model, num_sinks, window, {}

    def __call__(self, layer, q, k, v):
        past = self.kv.get(layer)
        k, v = (k, v) if past is None else (torch.cat(pair, dim=1) for pair in zip(past, (k, v)))
        drop = max(0, k.shape[1] - self.window)
        keep = [i for i in range(k.shape[1]) if not self.num_sinks <= i < self.num_sinks + drop]
        self.kv[layer] = k[:, keep], v[:, keep]
        k, v = self.kv[layer]
        n, t = k.shape[1], q.shape[1]
        return attention(self.model.rotate(q, torch.arange(n - t, n)), self.model.rotate(k, torch.arange(n)), v)


def decode(model, ids, attend, *, prefill, rotated=True):
    """Logits of ids [B, T]: a prefill, then one token a step, over the cache in `attend`."""
    out = []
    for a, b in [(0, prefill)] + [(i, i + 1) for i in range(prefill, ids.shape[1])]:
        positions = torch.arange(a, b) if rotated else torch.zeros(b - a, dtype=torch.int64)
        out.append(model(ids[:, a:b], positions, attend))
    return torch.cat(out, dim=1)


def test_default_attention_is_the_reference():
    model = random_model(SMALL).double()
    ids = random_ids(SMALL, 2, 9)
    got = model(ids, attend=lambda layer, q, k, v: attention(q, k, v))
    torch.testing.assert_close(got, model(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cache", [Contiguous, Paged])
@pytest.mark.parametrize("variant", ["llama", "llama3 scaling", "qwen2", "qwen3"])
@torch.no_grad()
def test_decode_over_a_cache_is_full_recomputation(variant, cache):
    model = random_model(VARIANTS[variant]).double()
    ids = random_ids(model.config, 1, 23)
    for prefill in (1, 10, 23):
        got = decode(model, ids, cache(), prefill=prefill)
        torch.testing.assert_close(got, model(ids), rtol=0, atol=1e-11)


@torch.no_grad()
def test_a_position_per_sequence():
    """Rows of a batch at different positions, as an engine decodes them, equal each row alone."""
    model = random_model(SMALL).double()
    ids = random_ids(SMALL, 2, 7)
    positions = torch.stack((torch.arange(7), torch.arange(7) + 30))
    got = model(ids, positions)
    for row in range(2):
        torch.testing.assert_close(got[row : row + 1], model(ids[row : row + 1], positions[row]), rtol=0, atol=1e-12)
    # RoPE is relative: a shift of all positions leaves the logits as they are
    torch.testing.assert_close(got[1:], model(ids[1:]), rtol=0, atol=1e-4)


@torch.no_grad()
def test_sink_cache_until_it_is_full_is_the_dense_model():
    model = random_model(SMALL).double()
    ids = random_ids(SMALL, 1, 12)
    got = decode(model, ids, Sinks(model, 2, 12), prefill=5, rotated=False)
    torch.testing.assert_close(got, model(ids), rtol=0, atol=1e-6)


@torch.no_grad()
def test_sink_cache_with_one_layer_is_recomputation_from_what_is_kept():
    model = random_model(replace(SMALL, num_hidden_layers=1)).double()
    ids = random_ids(SMALL, 1, 30)
    got = decode(model, ids, Sinks(model, 2, 8), prefill=1, rotated=False)
    for t in (8, 20, 29):
        visible = torch.cat((ids[:, :2], ids[:, t - 5 : t + 1]), dim=1)
        torch.testing.assert_close(got[:, t], model(visible)[:, -1], rtol=0, atol=1e-6)


@torch.no_grad()
def test_position_zero_rotates_nothing():
    """So a cache that wants keys before rotation gets them, bit for bit."""
    model = random_model(SMALL)
    ids, seen = random_ids(SMALL, 2, 5), {}

    def attend(layer, q, k, v):
        seen[layer] = k
        return attention(model.rotate(q, torch.arange(5)), model.rotate(k, torch.arange(5)), v)

    got = model(ids, torch.zeros(5, dtype=torch.int64), attend)
    block = model.layers[0]
    unrotated = block.self_attn.k_proj(block.input_layernorm(model.embed_tokens(ids))).view(2, 5, 2, 16)
    assert torch.equal(seen[0], unrotated)
    torch.testing.assert_close(got, model(ids), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_cache_that_is_still_empty_is_a_cache():
    """An attend that is false, e.g. an object whose len is 0, is not taken for None."""

    class Empty(Contiguous):
        def __len__(self):
            return len(self.kv)

    model, cache = random_model(SMALL), Empty()
    model(random_ids(SMALL, 1, 3), attend=cache)
    assert len(cache) == SMALL.num_hidden_layers


def test_inv_freq_stays_fp32():
    model = random_model(SMALL).to(torch.bfloat16)
    assert model.inv_freq.dtype == torch.float32
    assert model(random_ids(SMALL, 1, 3)).dtype == torch.bfloat16


def test_all_is_made_where_the_model_lies():
    """Without a GPU, torch's device without memory shows it: it takes no tensor of the CPU."""
    model = random_model(SMALL).to("meta")
    assert model(random_ids(SMALL, 2, 5).to("meta")).device.type == "meta"


@pytest.mark.parametrize(
    "args, name",
    [
        ((torch.zeros(3, dtype=torch.int64),), "ids"),
        ((torch.zeros(1, 3),), "ids"),
        ((torch.full((1, 3), 99),), "ids"),
        ((torch.full((1, 3), -1),), "ids"),
        ((torch.zeros(1, 3, dtype=torch.int64), torch.arange(4)), "positions"),
    ],
)
def test_bad_arguments_are_named(args, name):
    with pytest.raises(ValueError, match=name):
        random_model(SMALL)(*args)


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(variant, tmp_path):
    model = random_model(VARIANTS[variant])
    model.save_pretrained(tmp_path / "new" / "folder")
    again = Llama.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    tied = again.lm_head.weight is again.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype, tmp_path):
    model = random_model(SMALL).to(dtype)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    for asked in (torch.float32, dtype):
        again = Llama.from_pretrained(tmp_path, dtype=asked)
        assert torch.equal(again.norm.weight, model.norm.weight.to(asked))
        assert {p.dtype for p in again.parameters()} == {asked}


def shard(folder, parts=3):
    """Turn the single file of a checkpoint into shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {name: f"model-{i % parts + 1:05}-of-{parts:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in weight_map if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = dict(metadata={"total_size": 0}, weight_map=weight_map)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return index


def test_shards(tmp_path):
    model = random_model(SMALL)
    model.save_pretrained(tmp_path)
    shard(tmp_path)
    ids = random_ids(SMALL, 1, 5)
    assert torch.equal(Llama.from_pretrained(tmp_path)(ids), model(ids))


def edit_config(**changes):
    def edit(folder):
        settings = json.loads((folder / "config.json").read_text())
        settings |= changes
        settings = {name: value for name, value in settings.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(settings))

    return edit


def generation(**settings):
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(settings))


def edit_tensors(change):
    def edit(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return edit


def edit_index(change):
    def edit(folder):
        index = shard(folder)
        change(folder, index["weight_map"])
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


def truncate(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


DOWN = "model.layers.1.mlp.down_proj.weight"
BAD = {
    "no folder": (shutil.rmtree, OSError, "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), OSError, "config.json"),
    "config cut": (truncate("config.json", 40), ValueError, "config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "config.json"),
    "config not utf-8": (lambda f: (f / "config.json").write_bytes(b"\xff{}"), ValueError, "config.json"),
    "other architecture": (edit_config(architectures=["GPT2LMHeadModel"]), ValueError, "architectures.*GPT2LMHeadModel"),
    "other type": (edit_config(architectures=..., model_type="gpt2"), ValueError, "architectures.*gpt2"),
    "no architecture": (edit_config(architectures=..., model_type=...), ValueError, "architectures"),
    "architectures nested": (edit_config(architectures=[["LlamaForCausalLM"]]), ValueError, "architectures"),
    "type a list": (edit_config(architectures=..., model_type=["llama"]), ValueError, "architectures"),
    "too deep": (lambda f: (f / "config.json").write_text('{"a":' * 100000), ValueError, "config.json"),
    "missing setting": (edit_config(hidden_size=...), ValueError, "hidden_size"),
    "a size beyond 64 bits": (edit_config(vocab_size=10**30), ValueError, "vocab_size"),
    "sizes whose product is beyond": (edit_config(hidden_size=2**33, intermediate_size=2**33), ValueError, "hidden_size"),
    "rope_theta 0": (edit_config(rope_theta=0), ValueError, "rope_theta"),
    "rope_theta infinite": (edit_config(rope_theta=float("inf")), ValueError, "rope_theta"),
    "eps nan": (edit_config(rms_norm_eps=float("nan")), ValueError, "rms_norm_eps"),
    "eos a text": (edit_config(eos_token_id="</s>"), ValueError, "eos_token_id.*</s>"),
    "eos among texts": (edit_config(eos_token_id=[2, "</s>"]), ValueError, "eos_token_id.*</s>"),
    "bos negative": (edit_config(bos_token_id=-1), ValueError, "bos_token_id.*-1"),
    "generation's eos": (generation(eos_token_id=1.5), ValueError, "generation_config.json: eos_token_id.*1.5"),
    "generation cut": (lambda f: (f / "generation_config.json").write_text('{"eos'), ValueError, "generation_config.json"),
    "layer types a number": (edit_config(layer_types=3), ValueError, "layer_types"),
    "zero layers": (edit_config(num_hidden_layers=0), ValueError, "num_hidden_layers"),
    "a string for a number": (edit_config(vocab_size="99"), ValueError, "vocab_size"),
    "a number for a flag": (edit_config(tie_word_embeddings=1), ValueError, "tie_word_embeddings"),
    "heads do not divide": (edit_config(num_key_value_heads=4), ValueError, "num_key_value_heads"),
    "odd head_dim": (edit_config(head_dim=15), ValueError, "head_dim"),
    "heads do not divide hidden": (edit_config(head_dim=..., num_attention_heads=7), ValueError, "hidden_size"),
    "yarn": (edit_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ValueError, "rope_type.*yarn"),
    "linear, old spelling": (edit_config(rope_scaling={"type": "linear", "factor": 2.0}), ValueError, "rope_type.*linear"),
    "yarn, new spelling": (edit_config(rope_parameters={"rope_type": "yarn"}), ValueError, "rope_type.*yarn"),
    "rope_scaling a string": (edit_config(rope_scaling="llama3"), ValueError, "rope_scaling"),
    "llama3 without a factor": (
        edit_config(rope_scaling={n: v for n, v in LLAMA3.items() if n != "factor"} | {"rope_type": "llama3"}),
        ValueError, "factor",
    ),
    "llama3 without a range": (
        edit_config(rope_scaling=LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 4.0}), ValueError, "low_freq_factor",
    ),
    "interleaved pairs": (edit_config(rope_interleaved=True), ValueError, "rope_interleaved"),
    "activation": (edit_config(hidden_act="gelu"), ValueError, "hidden_act.*gelu"),
    "quantised": (edit_config(quantization_config={"bits": 4}), ValueError, "quantization_config"),
    "window": (edit_config(architectures=["MistralForCausalLM"], sliding_window=16, use_sliding_window=...), ValueError,
               "sliding_window.*16"),
    "window, silent": (edit_config(architectures=["MistralForCausalLM"], sliding_window=..., use_sliding_window=...),
                       ValueError, "sliding_window.*4096"),
    "window, qwen": (edit_config(architectures=["Qwen2ForCausalLM"], sliding_window=16, use_sliding_window=True),
                     ValueError, "sliding_window.*16"),
    "layer types": (edit_config(layer_types=["full_attention", "sliding_attention"]), ValueError, "layer_types"),
    "partial rotary": (edit_config(partial_rotary_factor=0.5), ValueError, "partial_rotary_factor"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), OSError, "model.safetensors"),
    "pickle only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ValueError, "pytorch_model.bin"),
    "empty file": (truncate("model.safetensors", 0), ValueError, "model.safetensors"),
    "header cut": (truncate("model.safetensors", 100), ValueError, "model.safetensors"),
    "data cut": (truncate("model.safetensors", -1), ValueError, "model.safetensors"),
    "text for weights": (lambda f: (f / "model.safetensors").write_text("hello" * 9), ValueError, "model.safetensors"),
    "missing tensor": (edit_tensors(lambda t: t.pop(DOWN)), ValueError, DOWN),
    "missing head": (edit_tensors(lambda t: t.pop("lm_head.weight")), ValueError, "lm_head.weight"),
    "extra tensor": (edit_tensors(lambda t: t.update(oops=torch.ones(2))), ValueError, "oops"),
    "a bias too many": (edit_tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(96)})),
                        ValueError, "q_proj.bias"),
    "a layer too many": (edit_tensors(lambda t: t.update({DOWN.replace(".1.", ".3."): t[DOWN].clone()})), ValueError,
                         "layers.3"),
    "no prefix": (edit_tensors(lambda t: t.update({"norm.weight": t.pop("model.norm.weight")})), ValueError, "norm.weight"),
    "wrong shape": (edit_tensors(lambda t: t.update({DOWN: t[DOWN].T.contiguous()})), ValueError, DOWN + ".*shape"),
    "integers": (edit_tensors(lambda t: t.update({DOWN: t[DOWN].to(torch.int8)})), ValueError, DOWN + ".*dtype"),
    "another tied head": (edit_config(tie_word_embeddings=True), ValueError, "lm_head.weight"),
    "index cut": (lambda f: (shard(f), truncate("model.safetensors.index.json", 30)(f)), ValueError, "index.json"),
    "index without a map": (lambda f: (shard(f), (f / "model.safetensors.index.json").write_text("{}")), ValueError,
                            "index.json: weight_map"),
    "missing shard": (edit_index(lambda f, m: (f / m[DOWN]).unlink()), OSError, "model-0000.-of-00003.safetensors"),
    "unknown shard": (edit_index(lambda f, m: m.update({DOWN: "other.safetensors"})), OSError, "other.safetensors"),
    "shard elsewhere": (edit_index(lambda f, m: m.update({DOWN: "../other.safetensors"})), ValueError, "index.json: " + DOWN),
    "shard elsewhere, on Windows": (edit_index(lambda f, m: m.update({DOWN: "..\\other.safetensors"})), ValueError,
                                    "index.json: " + DOWN),
    "shard cut": (edit_index(lambda f, m: truncate(m[DOWN], -1)(f)), ValueError, "model-0000.-of-00003.safetensors"),
    "not in its shard": (edit_index(lambda f, m: m.update({"model.oops": m[DOWN]})), ValueError, "oops"),
    "not in the index": (edit_index(lambda f, m: m.pop(DOWN)), ValueError, DOWN),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_named(case, tmp_path):
    spoil, error, match = BAD[case]
    folder = tmp_path / "model"
    random_model(SMALL).save_pretrained(folder)
    spoil(folder)
    with pytest.raises(error, match=match):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize(
    "config, beside, want",
    [
        (1, None, 1), (None, None, None), ([1, 5], {}, [1, 5]), (1, dict(eos_token_id=None), 1),
        (1, dict(eos_token_id=[7, 8]), [7, 8]), (None, dict(eos_token_id=0), 0),
    ],
)  # fmt: skip
def test_generation_config_has_the_last_word_on_eos(config, beside, want, tmp_path):
    model = random_model(replace(SMALL, eos_token_id=config))
    model.save_pretrained(tmp_path)
    if beside is not None:
        generation(**beside)(tmp_path)
    assert Llama.from_pretrained(tmp_path).config.eos_token_id == want


def test_settings_of_a_long_context(tmp_path):
    """Positions and a rope_theta above a million are no damaged sizes; the type alone says the architecture."""
    random_model(SMALL).save_pretrained(tmp_path)
    edit_config(max_position_embeddings=2**22, rope_theta=1e7, architectures=...)(tmp_path)
    config = Llama.from_pretrained(tmp_path).config
    assert config == replace(SMALL, max_position_embeddings=2**22, rope_theta=1e7)


def test_another_eos_in_the_folder_is_not_saved_over(tmp_path):
    generation(eos_token_id=7)(tmp_path)
    with pytest.raises(ValueError, match=r"generation_config\.json: got eos_token_id 7"):
        random_model(replace(SMALL, eos_token_id=5)).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["generation_config.json"]
    random_model(replace(SMALL, eos_token_id=7)).save_pretrained(tmp_path)
    assert Llama.from_pretrained(tmp_path).config.eos_token_id == 7


def test_old_exports_and_a_spelled_out_tied_head_load(tmp_path):
    model = random_model(VARIANTS["tied"])
    model.save_pretrained(tmp_path)
    edit_tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))(tmp_path)
    edit_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(tmp_path)
    ids = random_ids(SMALL, 1, 4)
    assert torch.equal(Llama.from_pretrained(tmp_path)(ids), model(ids))


def test_what_the_layout_cannot_hold_is_not_written(tmp_path):
    narrow = random_model(SMALL)
    narrow.layers[1].mlp.down_proj = torch.nn.Linear(40, 48, bias=False)
    biased = random_model(replace(SMALL, qkv_bias=True))
    one_bias = random_model(SMALL)
    one_bias.layers[1].mlp.up_proj = torch.nn.Linear(48, 80)
    other = random_model(replace(SMALL, architecture="GPT2LMHeadModel"))
    for model, name in (
        (narrow, "layers.1.mlp.down_proj.weight"), (biased, "qkv_bias"), (one_bias, "layers.1.mlp.up_proj.bias"),
        (other, "^architecture: got GPT2LMHeadModel"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_pruned_layer_still_runs():
    """Head counts are read off the weights: drop query heads 3..5 with KV head 1 of one layer."""
    model = random_model(SMALL)
    layer = model.layers[1].self_attn
    for name, rows in (("q_proj", 48), ("k_proj", 16), ("v_proj", 16)):
        getattr(layer, name).weight.data = getattr(layer, name).weight.data[:rows]
    layer.o_proj.weight.data = layer.o_proj.weight.data[:, :48]
    full = random_model(SMALL)
    full.layers[1].self_attn.o_proj.weight.data[:, 48:] = 0
    ids = random_ids(SMALL, 2, 6)
    torch.testing.assert_close(model(ids), full(ids))


# --- beside transformers ---------------------------------------------------------------------------------------------

# The config.json of real checkpoints, word for word where it matters, with small sizes.
REAL = {
    "SmolLM2-135M": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False, hidden_act="silu", hidden_size=36,
        intermediate_size=60, is_llama_config=True, max_position_embeddings=8192, num_attention_heads=9,
        num_hidden_layers=2, num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-05, rope_interleaved=False,
        rope_scaling=None, rope_theta=100000, tie_word_embeddings=True, torch_dtype="bfloat16", vocab_size=99,
        bos_token_id=0, eos_token_id=0,
    ),
    "Llama-3.2-1B": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False, head_dim=16, hidden_act="silu",
        hidden_size=64, intermediate_size=96, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=4,
        num_hidden_layers=2, num_key_value_heads=2, pretraining_tp=1, rms_norm_eps=1e-05, rope_theta=500000.0,
        rope_scaling=dict(
            factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=64,
            rope_type="llama3",
        ),
        tie_word_embeddings=True, torch_dtype="bfloat16", vocab_size=99, bos_token_id=97, eos_token_id=98,
    ),
    "Qwen2.5-0.5B": dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_act="silu", hidden_size=56, intermediate_size=80,
        max_position_embeddings=32768, max_window_layers=24, num_attention_heads=14, num_hidden_layers=2,
        num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768, use_mrope=False,
        tie_word_embeddings=True, torch_dtype="bfloat16", use_sliding_window=False, vocab_size=99,
    ),
    "Qwen3-0.6B": dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=False, head_dim=32, hidden_act="silu",
        hidden_size=48, intermediate_size=80, max_position_embeddings=40960, max_window_layers=28, rope_scaling=None,
        num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=1000000,
        sliding_window=None, tie_word_embeddings=True, torch_dtype="bfloat16", use_sliding_window=False, vocab_size=99,
    ),
    "Qwen3, head_dim left to its default": dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=48, intermediate_size=80, vocab_size=99,
        num_attention_heads=2, num_hidden_layers=1, num_key_value_heads=2,
    ),
    "Llama, all defaults": dict(
        architectures=["LlamaForCausalLM"], hidden_size=48, intermediate_size=80, vocab_size=99, model_type="llama",
        num_attention_heads=3, num_hidden_layers=1,
    ),
    "Mistral-7B-v0.3": dict(
        architectures=["MistralForCausalLM"], model_type="mistral", hidden_act="silu", hidden_size=64,
        intermediate_size=96, max_position_embeddings=32768, num_attention_heads=8, num_hidden_layers=2,
        num_key_value_heads=4, rms_norm_eps=1e-05, rope_theta=1000000.0, sliding_window=None,
        tie_word_embeddings=False, torch_dtype="bfloat16", vocab_size=99,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the test extra is not installed: pip install transformers")


def theirs(transformers, folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def greedy(model, ids, n):
    """n ids after ids [1, T], the likeliest each time, over a contiguous cache."""
    cache, logits = Contiguous(), None
    for i in range(n):
        start = ids.shape[1] - 1 if i else 0
        logits = model(ids[:, start:], torch.arange(start, ids.shape[1]), cache)
        ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


def assert_same_model(ours, hf, ours64, ids):
    """The rule of labkit.check, transformers being judged: our fp64 logits are the truth, ours the yardstick."""
    truth = ours64(ids)
    error, yardstick = ((model.double() - truth).abs().max().item() for model in (hf(ids).logits, ours(ids)))
    verdict = Verdict(0, error, yardstick)
    assert verdict.ok, verdict
    assert truth.std() > 0.1  # logits that say something


@pytest.mark.parametrize("name", REAL)
@torch.no_grad()
def test_real_layouts_equal_transformers(name, transformers, tmp_path):
    """transformers writes random weights, in shards; its own config.json is replaced by the published spelling."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**REAL[name])
    hf = transformers.AutoModelForCausalLM.from_config(config)
    for p in hf.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3 if p.dim() == 1 else 0.15)
    hf.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    written = Llama.from_pretrained(tmp_path)  # with the config.json that transformers wrote
    (tmp_path / "config.json").write_text(json.dumps(REAL[name]))
    ours, ours64 = Llama.from_pretrained(tmp_path), Llama.from_pretrained(tmp_path, dtype=torch.float64)
    ids = random_ids(ours.config, 2, 90)
    assert_same_model(ours, theirs(transformers, tmp_path), ours64, ids)
    torch.testing.assert_close(written(ids), ours(ids), rtol=0, atol=0)
    want = theirs(transformers, tmp_path).generate(ids[:1, :9], max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert greedy(ours, ids[:1, :9], 24).tolist() == want.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_transformers_loads_what_we_save(variant, transformers, tmp_path):
    model = random_model(VARIANTS[variant])
    model.save_pretrained(tmp_path)
    assert_same_model(model, theirs(transformers, tmp_path), Llama.from_pretrained(tmp_path, dtype=torch.float64),
                      random_ids(model.config, 2, 50))  # fmt: skip


@torch.no_grad()
def test_bf16_logits_are_as_good_as_those_of_transformers(transformers, tmp_path):
    random_model(SMALL).to(torch.bfloat16).save_pretrained(tmp_path)
    ours, truth = (Llama.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    hf, ids = theirs(transformers, tmp_path, torch.bfloat16), random_ids(SMALL, 2, 40)
    error, yardstick = ((x.double() - truth(ids)).abs().max().item() for x in (ours(ids), hf(ids).logits))
    assert Verdict(0, error, yardstick).ok, (error, yardstick)


# --- LAB_MODEL -------------------------------------------------------------------------------------------------------


def test_lab_model_with_a_tokenizer(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers", reason="the test extra is not installed: pip install tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cache keeps the keys and the values"] * 3, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    random_model(replace(SMALL, vocab_size=tokenizer.get_vocab_size())).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setenv("LAB_MODEL", str(tmp_path))
    model, encode, decode = load()
    ids = encode("the keys, naïve")
    assert ids == tokenizer.encode("the keys, naïve").ids
    assert ids[0] == 0
    assert decode(torch.tensor(ids)) == "the keys, naïve"
    assert model(torch.tensor([ids])).shape == (1, len(ids), model.config.vocab_size)
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"tokenizer\.json.*pip install tokenizers"):
        load()
    monkeypatch.undo()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is absent"):
        load(tmp_path)


def test_a_byte_model_needs_no_tokenizer(tmp_path):
    random_model(replace(SMALL, vocab_size=corpus.VOCAB)).save_pretrained(tmp_path)
    _, encode, decode = load(tmp_path)
    assert encode("é") == [corpus.BOS, 0xC3, 0xA9]
    assert decode(encode("é")) == "é"
