"""A model of one decode step: memory, the least time, and what five techniques change of both. Not a measurement.

The step of a Llama-like model reads its weights once and every kept key and value once; it cannot be faster than those
bytes at the datasheet's bandwidth, or than its operations at the peak rate. Launches, the work between the products,
communication and everything else that makes a real step slower are left out: the time is a floor.

`FORMULAS` is the one source. They are written in what Python and JavaScript have in common, so the player of
`labkit.simulator` runs the same text in a reader's browser. bf16: 2 bytes per number. Bytes and seconds throughout.
"""

import math

from labkit import args
from labkit.gpus import GPUS
from labkit.gqa import CLUSTERS, MODELS

CHOICES = [name for name, m in MODELS.items() if not m.tied]  # input and output embedding: two tables
DEVICES = {name: (name, 1) for name in GPUS} | {"8 x H200": CLUSTERS["8 x H200"]}  # name: (GPU, how many)
CONTEXTS = (1024, 2048, 4096, 8192, 16_384, 32_768)
BATCHES = (1, 4, 16, 64, 256)
SWITCHES = {  # argument: (label, what 0 means, what 1 means)
    "gqa": ("heads", "as MHA", "as it is (GQA)"),
    "paged": ("cache", "contiguous", "paged"),
    "streaming": ("attention", "all tokens", "4 sinks + 2,044"),
    "continuous": ("batching", "static", "continuous"),
    "pruned": ("weights", "dense", "2:4"),
}

# name: (expression, unit, what it is). An expression may use the names above it.
FORMULAS = {
    "kv_heads": (
        "num_q_heads + gqa * (num_kv_heads - num_q_heads)", "", "MHA has a KV head for every query head (chapter 7)"),
    "params": (
        "num_params + 2 * num_layers * hidden * head_dim * (kv_heads - num_kv_heads)", "", "k_proj and v_proj follow"),
    "embedding": ("vocab * hidden", "", "numbers in the input embedding, and as many in the output's"),
    "weights": (
        "2 * params - pruned * 0.875 * (params - 2 * embedding)", "bytes",
        "2:4 stores 1.125 bytes per weight instead of 2, embeddings stay dense (chapter 4)"),
    "kv_token": ("4 * num_layers * kv_heads * head_dim", "bytes", "K and V of one token, 2 bytes per number"),
    "kept": (
        "context + streaming * (min(context, 2048) - context)", "tokens", "of a sequence, in the cache (chapter 6)"),
    "reserved": (
        "paged * 16 * ceil(kept / 16) + (1 - paged) * (32768 - streaming * 30720)", "tokens",
        "pages of 16, or one piece for the longest sequence that is accepted, 32,768 tokens (chapter 8)"),
    "largest": (
        "max(0, floor((0.9 * memory - weights) / (reserved * kv_token)))", "sequences",
        "fit into 90 % of the memory beside the weights"),
    "running": ("min(batch, largest)", "sequences", "the others wait"),
    "used": ("running * kept * kv_token", "bytes", "keys and values in use"),
    "empty": ("running * (reserved - kept) * kv_token", "bytes", "reserved for tokens that are not there"),
    "read": ("weights - 2 * embedding + used", "bytes", "the input embedding is looked up, not read"),
    "operations": (
        "running * (2 * (params - embedding) + 4 * num_layers * num_q_heads * head_dim * kept)", "",
        "2:4 weights are expanded and multiplied as dense ones"),
    "seconds": ("max(read / bandwidth, operations / flops)", "s", "the least time of a step"),
    "useful": (
        "continuous + (1 - continuous) / harmonic(max(1, running))", "",
        "a static batch waits for its longest output; of exponential ones the share 1 / (1 + 1/2 + ... + 1/n) is useful"
        " (chapter 9)"),
    "tokens": ("running * useful / seconds", "1/s", "at most"),
}  # fmt: skip


def harmonic(n):
    """1 + 1/2 + ... + 1/n: the longest of n exponential outputs, in multiples of the mean."""
    return sum(1 / i for i in range(1, int(n) + 1))


FUNCTIONS = {"min": min, "max": max, "ceil": math.ceil, "floor": math.floor, "harmonic": harmonic}


def inputs(model, device):
    """What the formulas need of a model and of a device (all its GPUs together): {name: number}."""
    args.expect(model in CHOICES, "model", repr(model), f"one of {', '.join(CHOICES)}")
    args.expect(device in DEVICES, "device", repr(device), f"one of {', '.join(DEVICES)}")
    m, (kind, count) = MODELS[model], DEVICES[device]
    gpu = GPUS[kind]
    return {
        "num_layers": m.num_layers, "hidden": m.hidden_size, "num_q_heads": m.num_q_heads,
        "num_kv_heads": m.num_kv_heads, "head_dim": m.head_dim, "num_params": m.num_params, "vocab": m.vocab_size,
        "memory": count * gpu.memory_gb * 10**9, "bandwidth": count * gpu.bandwidth, "flops": count * gpu.bf16_flops,
    }  # fmt: skip


def step(model, device, context, batch, *, gqa=True, paged=True, streaming=False, continuous=True, pruned=False):
    """One decode step of `batch` sequences that have seen `context` tokens each: {name: number} of all FORMULAS.

    model: one of CHOICES. device: a key of DEVICES. context: 1 to 32,768. Where not even one sequence fits, `running`
    is 0 and so is `tokens`. Raises ValueError for anything else.
    """
    args.expect(isinstance(context, int) and 1 <= context <= CONTEXTS[-1], "context", context, "1 to 32,768")
    args.expect(isinstance(batch, int) and batch >= 1, "batch", batch, "a positive int")
    switches = dict(gqa=gqa, paged=paged, streaming=streaming, continuous=continuous, pruned=pruned)
    args.expect(all(s in (0, 1) for s in switches.values()), "switches", switches, "True or False each")
    known = inputs(model, device) | {"context": context, "batch": batch} | {k: int(v) for k, v in switches.items()}
    for name, (expression, *_) in FORMULAS.items():
        known[name] = eval(expression, {"__builtins__": {}}, FUNCTIONS | known)
    return {name: known[name] for name in FORMULAS}
