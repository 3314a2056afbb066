"""Shared KV heads: what they save, in plain arithmetic on real models, and the references of the two kernels.

Multi-head attention (MHA) has a KV head for every query head, multi-query attention (MQA, Shazeer 2019) one for all,
grouped-query attention (GQA, Ainslie et al. 2023) one for each group. How a trained model is turned from one into
another stands in `labkit/conversion.py`.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit import args, bench, check, codegen, player, trace
from labkit.attention import attention, decode_attention
from labkit.conversion import experiments, pool_kv_heads  # noqa: F401  (part of this topic's public names)
from labkit.flash_decoding import decode_case
from labkit.gpus import GPUS

BF16 = torch.bfloat16


def kv_bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that a cache keeps of one token. Raises ValueError naming the argument."""
    for name, count in (("num_layers", num_layers), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        good = isinstance(count, int) and not isinstance(count, bool) and count > 0
        args.expect(good, name, count, "a positive int")
    args.expect(isinstance(dtype, torch.dtype), "dtype", repr(dtype), "a torch.dtype")
    return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize


def intensity(num_q_heads: int, num_kv_heads: int, dtype: torch.dtype) -> float:
    """Operations a byte of keys and values in a decode step's attention: each number is multiplied by a whole group.

    Neither batch nor context enters: four operations a query head for the two numbers of K and V.
    """
    group = args.heads(num_q_heads, num_kv_heads)
    return 2 * group / dtype.itemsize


@dataclass(frozen=True)
class Model:
    """What of a model's config.json decides its cache. num_params: all of it, at its own number of KV heads.

    tied: the input embedding is the output's too, one table instead of two.
    """

    num_layers: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_params: int
    vocab_size: int
    tied: bool = False

    def with_kv_heads(self, num_kv_heads) -> "Model":
        """The model with another number of KV heads: k_proj and v_proj shrink or grow."""
        args.heads(self.num_q_heads, num_kv_heads)
        per_head = 2 * self.num_layers * self.hidden_size * self.head_dim
        num_params = self.num_params + per_head * (num_kv_heads - self.num_kv_heads)
        return replace(self, num_kv_heads=num_kv_heads, num_params=num_params)

    def kv_bytes(self, batch, kv_len, dtype=BF16) -> int:
        return batch * kv_len * kv_bytes_per_token(self.num_layers, self.num_kv_heads, self.head_dim, dtype)

    def weight_bytes(self, dtype=BF16) -> int:
        return self.num_params * dtype.itemsize

    @property
    def read_params(self) -> int:
        """What a step reads: all but an input embedding of its own, of which it looks up a row a sequence."""
        return self.num_params - (0 if self.tied else self.vocab_size * self.hidden_size)


# From each model's config.json; the numbers of parameters follow from it (a test builds the models without memory).
MODELS = {
    "Llama-2-7B": Model(32, 4096, 32, 32, 128, 6_738_415_616, 32_000),
    "Llama-2-70B": Model(80, 8192, 64, 8, 128, 68_976_648_192, 32_000),
    "Llama-3-8B": Model(32, 4096, 32, 8, 128, 8_030_261_248, 128_256),
    "Llama-3-70B": Model(80, 8192, 64, 8, 128, 70_553_706_496, 128_256),
    "Mistral-7B": Model(32, 4096, 32, 8, 128, 7_241_732_096, 32_000),
    "Falcon-7B": Model(32, 4544, 71, 1, 64, 6_921_720_704, 65_024, tied=True),
    "Falcon-40B": Model(60, 8192, 128, 8, 64, 41_303_293_952, 65_024, tied=True),
    "Qwen2.5-7B": Model(28, 3584, 28, 4, 128, 7_615_616_512, 152_064),
}
MEMORY_SHARE = 0.9  # of a GPU's memory, for weights and cache: the rest holds activations and workspaces


def largest_batch(model: Model, kv_len: int, memory_bytes: float) -> int:
    """How many sequences of kv_len tokens fit beside the weights, bf16; 0 if the weights alone do not."""
    room = MEMORY_SHARE * memory_bytes - model.weight_bytes()
    return max(0, int(room // model.kv_bytes(1, kv_len)))


def decode_floor(model: Model, batch: int, kv_len: int, gpu, num_gpus=1) -> float:
    """The least seconds of one decode step, bf16: weights and cache read once, or the arithmetic if that takes longer.

    gpu: a `labkit.gpus.Gpu`. num_gpus: what they read and compute adds up; their talk is left out.
    """
    num_bytes = model.read_params * BF16.itemsize + model.kv_bytes(batch, kv_len)
    attention_flops = 4 * model.num_layers * model.num_q_heads * model.head_dim * kv_len
    flops = batch * (2 * model.read_params + attention_flops)
    return max(num_bytes / gpu.bandwidth, flops / gpu.bf16_flops) / num_gpus


# ---- references


def gqa_decoding(q, k, v, kv_lens, *, sm_scale=None):
    """One new token a sequence, query head h on KV head h // group; as `labkit.attention.decode_attention`."""
    return decode_attention(q, k, v, kv_lens, sm_scale=sm_scale)


def expanded_decoding(q, k, v, kv_lens, *, sm_scale=None):
    """The same after each KV head was copied for every query head of its group, as `repeat_kv` in transformers does."""
    _, num_q_heads, num_kv_heads, _, _ = args.decode(q, k, v, kv_lens, dtypes=args.REFERENCE_FLOATS)
    k, v = (x.repeat_interleave(num_q_heads // num_kv_heads, dim=2) for x in (k, v))
    return decode_attention(q, k, v, kv_lens, sm_scale=sm_scale)


# --- players


def traced_problem(kv_lens=(90,), num_q_heads=8, num_kv_heads=2):
    """A decode step to be watched: v[..., 0] is the key's position + 1, and 1000 more for each KV head before it."""
    q, k, v, kv_lens = check.DecodeCase("", kv_lens, num_q_heads, num_kv_heads, 16).tensors()
    v[..., 0] = torch.arange(1, v.shape[1] + 1)[:, None] + 1000 * torch.arange(num_kv_heads)
    return dict(q=q, k=k, v=v, kv_lens=kv_lens)


def watch(function, arguments):
    """(what kernels.gqa's `function` returned, every tile that its programs attended to), see `labkit.trace.watch`."""
    return trace.watch("kernels.flash_decoding", "attend_tile", f"kernels.gqa:{function}", arguments)


def loaded_bytes(walk) -> int:
    """Bytes of keys and values in the tiles of a watched `traced_problem`; a row that was masked is zero there."""
    tiles = [(step.inputs[1], step.inputs[2]) for step in walk]
    return sum(int((v[:, 0] > 0).sum()) * (k.shape[1] + v.shape[1]) * v.itemsize for k, v in tiles)


def reads_player(problem, walks):
    """Two watched launches on the same problem, tile by tile, side by side.

    walks: {whom a program serves, such as "per group": the steps of the launch}.
    """

    def capital(name):
        return name[0].upper() + name[1:]

    num_kv_heads, group = problem["k"].shape[2], problem["q"].shape[1] // problem["k"].shape[2]
    size = max(int((step.inputs[2][:, 0] > 0).sum()) for walk in walks.values() for step in walk)
    num_tiles = -(-problem["k"].shape[1] // size)
    counts = {name: [[0] * num_tiles for _ in range(num_kv_heads)] for name in walks}
    heads = {name: num_kv_heads * group // len({step.program for step in walk}) for name, walk in walks.items()}
    steps = []
    for i in range(max(map(len, walks.values()))):
        frame, text = {}, []
        for number, (name, walk) in enumerate(walks.items()):
            now = None
            if i < len(walk):
                numbers = walk[i].inputs[2][:, 0]
                head, first = divmod(int(numbers[0]) - 1, 1000)
                now = head, first // size
                counts[name][head][now[1]] += 1
                program, again = walk[i].program[1], " again" * (counts[name][head][now[1]] > 1)
                queries = f"{program * heads[name]}–{(program + 1) * heads[name] - 1}"
                who = f"program {program}" + f" (query heads {queries})" * (heads[name] > 1)
                text.append(f"{capital(name)}: {who} loads KV head {head}{again}.")
            else:
                text.append(f"{capital(name)}: done after {len(walk)} loads.")
            colors = ["muted", "blue", "purple"]
            frame[f"tiles {number}"] = [
                [("orange" if (h, t) == now else colors[min(n, 2)], f"{n}x") for t, n in enumerate(row)]
                for h, row in enumerate(counts[name])
            ]
        done = {name: f"{loaded_bytes(walk[: i + 1]):,}" for name, walk in walks.items()}
        steps.append({"text": " ".join(text), "bytes": done} | frame)
    rows = [f"KV head {h}" for h in range(num_kv_heads)]
    cols = [f"{t * size}–{min((t + 1) * size, problem['k'].shape[1]) - 1}" for t in range(num_tiles)]
    labels = dict(row_labels=rows, col_labels=cols, corner="keys")
    panels = {
        f"tiles {n}": player.Grid(num_kv_heads, num_tiles, **labels, name=f"one program {name}")
        for n, name in enumerate(walks)
    }
    panels["bytes"] = player.Values(list(walks), ["bytes loaded"])
    legend = {"orange": "being loaded", "blue": "loaded once", "purple": "loaded again", "muted": "not yet"}
    caption = f"Two runs in the interpreter: {num_kv_heads * group} query heads on {num_kv_heads} KV heads."
    return player.Stepper("Who loads what, and how often", panels, steps, legend=legend, caption=caption)


CLUSTERS = {"A100 80GB": ("A100 80GB", 1), "H200": ("H200", 1), "8 x H200": ("H200", 8)}


def sizes(name, kv_len, batch, gpu) -> dict[str, list]:
    """What a model would need as MHA, as it is and as MQA: {label: one text a version}. gpu: a key of CLUSTERS."""
    model, (kind, num_gpus) = MODELS[name], CLUSTERS[gpu]
    table = {}
    for heads in (model.num_q_heads, model.num_kv_heads, 1):
        m, device = model.with_kv_heads(heads), GPUS[kind]
        cache, floor = m.kv_bytes(batch, kv_len), decode_floor(m, batch, kv_len, device, num_gpus)
        most = largest_batch(m, kv_len, num_gpus * device.memory_gb * 1e9)
        column = {
            "KV heads": heads,
            "one token": f"{m.kv_bytes(1, 1) / 1e3:,.0f} kB",
            "KV cache": f"{cache / 1e9:,.1f} GB",
            "weights": f"{m.weight_bytes() / 1e9:,.1f} GB",
            "largest batch": f"{most:,}",
            "decode floor": f"{floor * 1e3:,.1f} ms" if batch <= most else "does not fit",
        }
        for label, cell in column.items():
            table.setdefault(label, []).append(cell)
    return table


def sizes_player():
    """Explore model, context, batch and GPU: arithmetic on configs and datasheets, not a measurement."""

    def frame(name, kv_len, batch, gpu):
        model, (kind, num_gpus) = MODELS[name], CLUSTERS[gpu]
        room, bars = num_gpus * GPUS[kind].memory_gb * 1e9, []
        for lane, heads in enumerate((model.num_q_heads, model.num_kv_heads, 1)):
            m = model.with_kv_heads(heads)
            cuts = [0, m.weight_bytes(), m.weight_bytes() + m.kv_bytes(batch, kv_len)]
            cuts = [min(200.0, 100 * cut / room) for cut in cuts]
            fits = batch <= largest_batch(m, kv_len, room)
            bars += [(lane, *cuts[:2], "sky", ""), (lane, *cuts[1:], "blue" if fits else "orange", "")]
        text = f"{name}, {batch} x {kv_len:,} tokens on {gpu}: {model.num_q_heads} query heads on {model.num_kv_heads}."
        return {"text": text, "memory": bars, "sizes": sizes(name, kv_len, batch, gpu)}

    versions = ["as MHA", "as it is", "as MQA"]
    labels = ["KV heads", "one token", "KV cache", "weights", "largest batch", "decode floor"]
    panels = {
        "memory": player.Bars(versions, unit="% of the memory", span=200, name="weights and KV cache"),
        "sizes": player.Values(labels, versions),
    }
    controls = {"model": list(MODELS), "context": [2048, 8192, 32768], "batch": [1, 16, 64], "GPU": list(CLUSTERS)}
    legend = {"sky": "weights", "blue": "KV cache, fits", "orange": "KV cache, does not fit"}
    caption = f"bf16; weights and cache may take {MEMORY_SHARE:.0%} of the memory. Bars end at 200 %."
    options = dict(legend=legend, caption=caption, start=("Llama-3-8B", 8192, 16, "H200"))
    return player.Explorer("What the KV heads cost", controls, panels, frame, **options)


def try_sizes(model, group, kv_len, batch, gpu="H200"):
    """A model with `group` query heads a KV head (or the nearest it can have), in words. The live cell's callback."""
    own = MODELS[model]
    divisors = [h for h in range(1, own.num_q_heads + 1) if own.num_q_heads % h == 0]
    m = own.with_kv_heads(min(divisors, key=lambda h: abs(own.num_q_heads / h - group)))
    kind, num_gpus = CLUSTERS[gpu]
    most = largest_batch(m, kv_len, num_gpus * GPUS[kind].memory_gb * 1e9)
    floor = decode_floor(m, batch, kv_len, GPUS[kind], num_gpus)
    fits = f"a step takes at least {floor * 1e3:.2f} ms" if batch <= most else "that does not fit"
    heads = f"{m.num_kv_heads} KV head{'s' * (m.num_kv_heads > 1)}"
    return (
        f"{model} with {heads}: {m.kv_bytes(1, 1) / 1e3:,.0f} kB a token, "
        f"{m.kv_bytes(batch, kv_len) / 1e9:,.1f} GB for {batch} x {kv_len:,}; up to {most:,} sequences on {gpu}; {fits}"
    )


# --- benchmark cases

# Published, GQA's Table 1: seconds a sample on a TPUv4 chip, and the average of seven tasks' scores. The uptrained
# models had 5 % of the original steps.
PUBLISHED = {
    "MHA-Large": (0.37, 46.0), "MHA-XXL": (1.51, 47.2), "MQA-XXL": (0.24, 46.6), "GQA-8-XXL": (0.28, 47.1),
}  # fmt: skip
HEADS = "32 query heads, batch 16, 4096 keys, bf16"
SHORT = "Batch 1, 1024 keys: too small to matter"
PREFILL = "Prefill: 2048 tokens, 32 query heads, bf16"
LONG = "Prefill of a long prompt: 16,384 tokens, 32 query heads, bf16"
VARIANTS = {"expanded": {"heads": 1}}


def repeated_sdpa(q, k, v, kv_lens):
    """Copy each KV head for every query head of its group, then torch's FlashAttention, as `repeat_kv` models do."""
    group, length = q.shape[1] // k.shape[2], int(kv_lens.max())
    args.expect(int(kv_lens.min()) == length, "kv_lens", "different lengths", "one length")
    query = q.unsqueeze(2)
    k, v = (x[:, :length].transpose(1, 2) for x in (k, v))  # [B, Hkv, L, D]

    def call():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            many = [x.repeat_interleave(group, dim=1) for x in (k, v)]
            return F.scaled_dot_product_attention(query, *many).squeeze(2)

    return call


def causal_sdpa(backend, repeat=False):
    """torch's attention over a whole prompt. repeat: with the KV heads copied first."""

    def prepare(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]

        def call():
            many = [x.repeat_interleave(group, dim=1) for x in (k, v)] if repeat else [k, v]
            with sdpa_kernel(backend):
                o = F.scaled_dot_product_attention(q, *many, is_causal=True, enable_gqa=not repeat)
            return o.transpose(1, 2)

        return call

    return prepare


PREFILL_PEERS = {
    "SDPA flash": causal_sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA flash, repeated": causal_sdpa(SDPBackend.FLASH_ATTENTION, repeat=True),
    "SDPA cuDNN": causal_sdpa(SDPBackend.CUDNN_ATTENTION),
}


def attention_by_head(q, k, v):
    """`attention`, one KV head after another: all scores of a long prompt at once would not fit."""
    group = q.shape[2] // k.shape[2]
    heads = zip(q.split(group, 2), k.split(1, 2), v.split(1, 2))
    return torch.cat([attention(*head) for head in heads], 2)


def prefill_case(num_kv_heads, tiny=False, length=2048, **given):
    """Causal attention of a prompt by 32 query heads on num_kv_heads KV heads, bf16."""
    q_len, num_q_heads, head_dim = (70, 4, 64) if tiny else (length, 32, 128)
    num_kv_heads_ = max(1, num_kv_heads * num_q_heads // 32)

    def make(generator, device):
        shapes = {"q": num_q_heads, "k": num_kv_heads_, "v": num_kv_heads_}
        options = dict(generator=generator, device=device, dtype=BF16)
        return {name: torch.randn(1, q_len, heads, head_dim, **options) for name, heads in shapes.items()}

    given = dict(name=f"prefill, {num_kv_heads} KV heads", section=PREFILL) | given
    return bench.Case(
        op="attention", make=make, peers=PREFILL_PEERS,
        bytes=4 * q_len * head_dim * (num_q_heads + num_kv_heads_),
        flops=2 * q_len * (q_len + 1) * num_q_heads * head_dim, **given,  # the half below the diagonal
    )  # fmt: skip


def cases(tiny=False) -> list[bench.Case]:
    """Fewer and fewer KV heads under the same query heads: decoding a batch, one short sequence, and prefill."""
    result = []
    for section, batch, kv_len, counts in ((HEADS, 16, 4096, (32, 16, 8, 4, 2, 1)), (SHORT, 1, 1024, (32, 8, 1))):
        for heads in counts:
            name = f"B={batch} L={kv_len}, {heads} KV heads"
            flex = "it compiles for half a minute a shape; one is timed"
            without = {} if (section, heads) == (HEADS, 8) else {"FlexDecoding": flex}
            options = dict(op="gqa_decoding", section=section, tiny=tiny, variants=VARIANTS, without=without)
            case = decode_case(name, batch, kv_len, 32, heads, BF16, **options)
            result.append(replace(case, peers=case.peers | {"SDPA flash, repeated": repeated_sdpa}))
    long = dict(name="prefill, 16,384 tokens", section=LONG, reference="attention_by_head", length=16384)
    return result + [prefill_case(heads, tiny) for heads in (32, 8, 1)] + [prefill_case(8, tiny, **long)]


def codegen_cases() -> list[codegen.Case]:
    """One head a program, some, and the whole group; the corners of head_dim, group and dtype."""

    def case(function, head_dim, group, dtype, **options):
        kv = codegen.Tensor((1, 4096, 1, head_dim), dtype)
        tensors = dict(q=codegen.Tensor((1, group, head_dim), dtype), k=kv, v=kv)
        tensors["kv_lens"] = codegen.Tensor((1,), "int32", 4096)
        words = f", {options['heads']} heads a program" if "heads" in options else ""
        name = f"{function.split('_')[0]}: {dtype}, head_dim {head_dim}, group {group}{words}"
        return codegen.Case(f"kernels.gqa:{function}", name, tensors | options, ("split_kernel",))

    return [
        case("gqa_decoding", 128, 8, "bfloat16"),
        case("expanded_decoding", 128, 8, "bfloat16"),
        case("expanded_decoding", 64, 64, "float16"),
        case("expanded_decoding", 256, 4, "float32"),
        case("gqa_decoding", 128, 32, "float16", heads=8),
    ]
