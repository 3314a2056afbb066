"""Checkpoints in Hugging Face layout: config.json and *.safetensors, read strictly and written back. Never pickle.

Whatever is missing, extra, of another shape or not supported raises ValueError or OSError naming the file and the
tensor or setting: a model that loads is the model that was saved.
"""

import json
import sys
from dataclasses import asdict
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from labkit.args import expect

FLOATS = ("F32", "F16", "BF16")  # as safetensors calls them
MAX_SIZE = 2**20  # of a dimension: what a product of three is counted in stays within 63 bits
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# model_type, and what the architecture takes where config.json is silent.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {"num_key_value_heads": 8, "sliding_window": 4096, "use_sliding_window": True}),
    "Qwen2ForCausalLM": ("qwen2", {"num_key_value_heads": 32}),
    "Qwen3ForCausalLM": ("qwen3", {"num_key_value_heads": 32, "head_dim": 128}),
}


def read_config(file):
    """config.json -> the arguments of `labkit.model.Config`.

    generation_config.json beside it has the last word on eos_token_id, as in `generate` of transformers: chat models
    name the end of a turn only there.
    """
    config = parse_config(_read_json(file), str(file))
    return config | dict(eos_token_id=_eos(file.parent, config["eos_token_id"]))


def parse_config(settings, file):
    """Settings as in config.json -> the arguments of `labkit.model.Config`. file is named in errors."""
    by_type = {model_type: name for name, (model_type, _) in ARCHITECTURES.items()}
    arch = settings.get("architectures") or by_type.get(str(settings.get("model_type"))) or settings.get("model_type")
    arch = arch[0] if isinstance(arch, list) else arch
    known = isinstance(arch, str) and arch in ARCHITECTURES
    expect(known, f"{file}: architectures", repr(arch), ", ".join(ARCHITECTURES))
    settings = ARCHITECTURES[arch][1] | settings
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    expect(isinstance(rope, dict), f"{file}: rope_scaling", repr(rope), "an object")
    _refuse_unsupported(settings, rope, file)

    def number(name, default=None, kind=int, among=settings, most=MAX_SIZE):
        value = default if among.get(name) is None else among[name]
        good = isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 < value <= most
        expected = f"an integer from 1 to {most:,}" if kind is int else "a positive number"
        expect(good, f"{file}: {name}", repr(value), expected)
        return value

    real = partial(number, kind=float, most=sys.float_info.max)

    def flag(name):
        value = settings.get(name, False)
        expect(isinstance(value, bool), f"{file}: {name}", repr(value), "true or false")
        return value

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    kv_heads, head_dim = number("num_key_value_heads", heads), number("head_dim", hidden // heads)
    fits = settings.get("head_dim") is not None or hidden % heads == 0
    expect(fits, f"{file}: hidden_size", hidden, f"a multiple of the {heads} heads, or a head_dim")
    expect(heads % kv_heads == 0, f"{file}: num_key_value_heads", kv_heads, f"a divisor of the {heads} query heads")
    expect(head_dim % 2 == 0, f"{file}: head_dim", head_dim, "an even number")
    scaling = None
    if rope.get("rope_type", rope.get("type")) == "llama3":
        scaling = {name: real(name, among=rope) for name in LLAMA3}
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        expect(low < high, f"{file}: low_freq_factor", low, f"less than high_freq_factor, {high}")
    biased = arch in ("LlamaForCausalLM", "Qwen3ForCausalLM") and flag("attention_bias")
    return dict(
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=number("max_position_embeddings", 2048, most=2**31 - 1),
        rms_norm_eps=real("rms_norm_eps", 1e-6),
        rope_theta=real("rope_theta", real("rope_theta", 10000.0), among=rope),
        rope_scaling=scaling,
        tie_word_embeddings=flag("tie_word_embeddings"),
        qkv_bias=biased or arch == "Qwen2ForCausalLM",
        o_bias=biased,
        mlp_bias=arch == "LlamaForCausalLM" and flag("mlp_bias"),
        qk_norm=arch == "Qwen3ForCausalLM",
        bos_token_id=_token_ids(settings, "bos_token_id", file),
        eos_token_id=_token_ids(settings, "eos_token_id", file),
        architecture=arch,
    )


def _token_ids(settings, name, file):
    """An id, several ids in a list, or None, as they stand in the settings."""
    value = settings.get(name)
    ids = value if isinstance(value, list) else [value] if value is not None else []
    good = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MAX_SIZE for i in ids)
    expect(good, f"{file}: {name}", repr(value), "a token id, a list of them, or null")
    return value


def _eos(folder, otherwise):
    """eos_token_id as generation_config.json in the folder has it, or else `otherwise`."""
    file = folder / "generation_config.json"
    eos = _token_ids(_read_json(file), "eos_token_id", str(file)) if file.exists() else None
    return otherwise if eos is None else eos


def _refuse_unsupported(settings, rope, file):
    layer_types = settings.get("layer_types") or []
    expect(isinstance(layer_types, list), f"{file}: layer_types", repr(layer_types), "a list")
    window = settings.get("sliding_window") if settings.get("use_sliding_window") else None
    for name, value, supported in (
        ("hidden_act", settings.get("hidden_act", "silu"), ["silu"]),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), ["default", "llama3"]),
        ("rope_interleaved", settings.get("rope_interleaved") or False, [False]),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1)), [1]),
        ("sliding_window", window, [None]),
        ("quantization_config", settings.get("quantization_config"), [None]),
        *(("layer_types", value, ["full_attention"]) for value in layer_types),
    ):
        expect(value in supported, f"{file}: {name} (not supported)", repr(value), " or ".join(map(repr, supported)))


def read_tensors(folder, shapes, tied, dtype, device):
    """{name: tensor} of a checkpoint, exactly those of shapes {name: list}, as dtype. tied: lm_head may be absent."""
    tensors = {}
    for file, promised in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as f:
                held = set(f.keys())
                lost, extra = sorted((promised or held) - held), sorted(held - (promised or held))
                expect(not lost, f"{file}: tensors", f"{lost[:3]} missing", "those that the index names")
                expect(not extra, f"{file}: tensors", f"{extra[:3]} too", "those that the index names")
                for key in sorted(held):
                    if key.endswith("rotary_emb.inv_freq"):
                        continue  # old exports carry it; it follows from the settings
                    name, tensor, where = key.removeprefix("model."), f.get_slice(key), f"{file}: tensor {key}"
                    known = name in shapes and key == _key(name)
                    expect(known, where, "an extra tensor", "those of the architecture")
                    shape, kind = tensor.get_shape(), tensor.get_dtype()
                    expect(shape == shapes[name], f"{where} (shape)", shape, str(shapes[name]))
                    expect(kind in FLOATS, f"{where} (dtype)", kind, " or ".join(FLOATS))
                    tensors[name] = f.get_tensor(key).to(device=device, dtype=dtype)
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged, or no safetensors file ({error})") from error
    if tied and "embed_tokens.weight" in tensors:
        head = tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
        same = torch.equal(head, tensors["embed_tokens.weight"])
        expect(same, f"{folder}: tensor lm_head.weight", "other values", "the embeddings, which it is tied to")
    missing = [_key(name) for name in shapes if name not in tensors]
    expect(not missing, f"{folder}: tensors", f"{len(missing)} missing: {', '.join(missing[:3])}", f"all {len(shapes)}")
    return tensors


def _weight_files(folder):
    """[(file, names that the index promises in it, or None)]"""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [(single, None)]
    if not index.exists():
        pickled = sorted(p.name for end in ("bin", "pt", "pth") for p in folder.glob(f"*.{end}"))
        only = f"only pickled weights, {pickled[0]}; a pickle can run code" if pickled else "no weights"
        expect(not pickled, str(folder), only, "model.safetensors")
        raise FileNotFoundError(f"{folder}: {only}, expected {single.name} or {index.name}")
    weight_map = _read_json(index).get("weight_map")
    good = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())
    expect(good and weight_map, f"{index}: weight_map", repr(weight_map)[:60], "an object {tensor: file}")
    promised = {}
    for name, shard in weight_map.items():
        expect("/" not in shard and "\\" not in shard, f"{index}: {name}", repr(shard), "a file in the same folder")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{index}: tensor {name} is said to be in {shard}, which is missing")
        promised.setdefault(folder / shard, set()).add(name)
    return sorted(promised.items())


def write(folder, config, state, shapes):
    """Write a Config and its tensors {name: tensor}; ValueError, with nothing written, unless they would read back."""
    ours = asdict(config)
    expect(config.architecture in ARCHITECTURES, "architecture", config.architecture, ", ".join(ARCHITECTURES))
    implied = ("architecture", "qkv_bias", "o_bias", "qk_norm")
    settings = {name: value for name, value in ours.items() if name not in implied}
    settings |= {
        "architectures": [config.architecture],
        "model_type": ARCHITECTURES[config.architecture][0],
        "hidden_act": "silu",
        "attention_bias": config.o_bias,
        "use_sliding_window": False,
        "sliding_window": None,
        "torch_dtype": str(state["norm.weight"].dtype).removeprefix("torch."),
    }
    if config.rope_scaling:
        settings["rope_scaling"] = {"rope_type": "llama3"} | config.rope_scaling
    back = parse_config(settings, "config")
    for name in ours:
        expect(back[name] == ours[name], f"config: {name}", ours[name], f"{back[name]}, as in {config.architecture}")
    eos = _eos(folder, ours["eos_token_id"])
    expect(eos == ours["eos_token_id"], f"{folder}: generation_config.json", f"eos_token_id {eos}", "the config's")
    expect(shapes.keys() == state.keys(), "model", sorted(shapes.keys() ^ state.keys())[:3], "the config's tensors")
    for name, x in state.items():
        expect(list(x.shape) == shapes[name], f"{name} (shape)", list(x.shape), f"the config's {shapes[name]}")
    tensors = {_key(name): x.contiguous() for name, x in state.items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _key(name):
    """Our name -> the checkpoint's."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def _read_json(file):
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON or UTF-8; too deep
        raise ValueError(f"{file}: no valid JSON ({error})") from error
    expect(isinstance(data, dict), str(file), type(data).__name__, "a JSON object")
    return data
