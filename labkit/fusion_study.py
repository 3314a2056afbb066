"""The studies of chapter 03: the bill of a block, what torch.compile makes of one on a CPU, what others published."""

import dataclasses
import functools
import re
import shutil
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F

from labkit import check, fusion, player, plot
from labkit.fusion_bench import CACHE, GRAPH, MLP, PYTHON, ROWS  # noqa: F401
from labkit.gpus import GPUS
from labkit.model import Block, Config, Llama, causal
from labkit.record import Experiment

# ---- published figures, not reproduced here

# FasterTransformer's docs/bert_guide.md: BERT-base, fp16, an encoder in TorchScript against FasterTransformer, ms.
PUBLISHED_FT = {  # (GPU, batch, length): (TorchScript, FasterTransformer)
    ("A100", 1, 32): (4.22, 0.93), ("A100", 1, 128): (4.47, 1.09), ("A100", 8, 128): (4.35, 1.81),
    ("A100", 32, 128): (9.57, 4.81), ("A100", 32, 384): (32.43, 14.68), ("T4", 1, 32): (11.04, 1.72),
}  # fmt: skip
# Spector et al. 2025: Llama-3.2-1B, batch 1, bf16, one H100, the whole forward pass in one persistent kernel.
PUBLISHED_MEGAKERNEL = {"bandwidth used": 0.78, "engines' bandwidth": 0.5, "gap in a CUDA graph, us": 1.3}
HOST_US = 5.0  # an assumption: what PyTorch needs to launch one kernel from Python


# ---- the bill of a block

LLAMA_3_8B = Config(128_256, 4096, 14336, 32, 32, 8, 128, rms_norm_eps=1e-5)
BATCHES, KEYS = (1, 8, 64, 512), 1024


def decode_block(batch, keys=KEYS, config=LLAMA_3_8B):
    """(a block, its inputs) for one new token of each sequence, over a cache; on the meta device, so without memory."""
    with torch.device("meta"):
        block = Block(config).to(torch.bfloat16).eval()
        shape = (batch, config.num_key_value_heads, keys, config.head_dim)
        k_cache, v_cache = (torch.empty(shape, dtype=torch.bfloat16) for _ in "kv")

        def attend(q, k, v):
            for cache, new in ((k_cache, k), (v_cache, v)):
                cache[:, :, -1:].copy_(new.transpose(1, 2))
            return F.scaled_dot_product_attention(q.transpose(1, 2), k_cache, v_cache, enable_gqa=True).transpose(1, 2)

        x = torch.empty(batch, 1, config.hidden_size, dtype=torch.bfloat16)
        cos, sin = (torch.empty(1, config.head_dim // 2) for _ in range(2))
    return block, (x, cos, sin, attend)


@dataclasses.dataclass(frozen=True)
class Bill:
    """Launches and bytes of one decode step of a block: as traced, fused, and the floor of bytes; operations."""

    batch: int
    eager: tuple[int, int]
    fused: tuple[int, int]
    floor: int
    flops: int
    report: object = dataclasses.field(repr=False)


@functools.cache
def bill(batch, keys=KEYS):
    """Counted by a real pass over the block. The floor: weights, cache and the residual stream, each moved once."""
    block, inputs = decode_block(batch, keys)
    report = fusion.fuse(block, inputs, verbose=False).report
    weights = sum(p.numel() for p in block.parameters())
    c = LLAMA_3_8B
    cache = 2 * batch * keys * c.num_key_value_heads * c.head_dim
    flops = 2 * batch * weights + 4 * batch * keys * c.num_attention_heads * c.head_dim
    floor = 2 * (weights + cache + 2 * batch * c.hidden_size)
    return Bill(batch, report.total(report.before), report.total(report.after), floor, flops, report)


def step_us(launches, num_bytes, flops, *, gpu="H200", graph=False):
    """Arithmetic, not a measurement: microseconds of a step at the datasheet's rates.

    The device works for bytes / bandwidth (or operations / peak) and idles for the published gap between two kernels.
    Without a CUDA graph the host must launch each kernel too, at HOST_US; whoever is slower decides.
    """
    rate = GPUS[gpu]
    device = 1e6 * max(num_bytes / rate.bandwidth, flops / rate.bf16_flops)
    device += launches * PUBLISHED_MEGAKERNEL["gap in a CUDA graph, us"]
    return device if graph else max(device, launches * HOST_US)


WAYS = {
    "eager": ("eager", False), "fused": ("fused", False), "eager, in a graph": ("eager", True),
    "fused, in a graph": ("fused", True),
}  # fmt: skip


def ways_us(b, gpu="H200"):
    """{way: microseconds of the block} by `step_us`, and the floor: one launch that moves every tensor once."""
    times = {name: step_us(*getattr(b, kind), b.flops, gpu=gpu, graph=graph) for name, (kind, graph) in WAYS.items()}
    return times | {"floor": step_us(1, b.floor, b.flops, gpu=gpu, graph=True)}


def megakernel(b, layers=32, gpu="H200"):
    """What one persistent kernel for all layers would save over fused kernels in a CUDA graph, in arithmetic.

    Returns (microseconds in gaps, microseconds in bytes that need not move, microseconds in all) for `layers` blocks.
    """
    times = ways_us(b, gpu)
    gaps = (b.fused[0] * layers - 1) * PUBLISHED_MEGAKERNEL["gap in a CUDA graph, us"]
    traffic = 1e6 * layers * max(0, b.fused[1] - b.floor) / GPUS[gpu].bandwidth
    return gaps, traffic, layers * times["fused, in a graph"]


# ---- pictures of the pass

KINDS = {  # of an operation: colour, meaning
    "orange": ("matrix product", {"linear", "matmul", "einsum"}),
    "purple": ("attention", {"scaled_dot_product_attention", "attention", "softmax"}),
    "green": ("fused by the pass", {"rmsnorm", "add_rmsnorm", "swiglu", "rope", "bias_gelu"}),
    "sky": ("everything else", set()),
}


def color_of(row):
    return next((color for color, (_, names) in KINDS.items() if row.what in names), "sky")


def draw(report, *, name, caption, alt):
    """The graph before and after: a dot for each launch, in order, an arc for each result that a later one reads."""
    fig, axes = plot.figure(2, 1, height=5.0, height_ratios=(5, 3))
    angle, width = torch.linspace(0, torch.pi, 20), len(report.before)
    for ax, title, rows in zip(axes, ("before", "after"), (report.before, report.after)):
        at, highest = {row.node: i for i, row in enumerate(rows)}, 1
        for i, row in enumerate(rows):
            for source in row.reads:
                far = i - at.get(source, -1)
                highest = max(highest, far / 2)
                x, y = i - far / 2 * (1 - angle.cos()), far / 2 * angle.sin()
                ax.plot(x, y, color="#bbbbbb", lw=0.8, marker="", ls="-")
        for color, (meaning, _) in KINDS.items():
            here = [i for i, row in enumerate(rows) if color_of(row) == color]
            ax.scatter(here, [0] * len(here), s=26, color=plot.COLORS[color], zorder=3, label=meaning)
        launches, size = report.total(rows)
        ax.set_title(f"{title}: {launches} launches, {size / 1e6:,.1f} MB")
        ax.set(xlim=(-2, width), ylim=(-highest / 8, 1.1 * highest), yticks=[])
        ax.set_xticks(range(len(rows)), [_short(row.what) for row in rows], rotation=90)
        ax.grid(False)
        ax.spines["left"].set_visible(False)
    axes[0].legend(loc="upper right", ncols=2)
    return plot.show(fig, name=name, caption=caption, alt=alt)


def draw_traffic(plans, few, *, name, caption, alt):
    """Who reads and writes what: a row for each tensor, a column for each kernel, a grey bar while a tensor is in use.

    plans: one or more lists of (kernel, inputs, outputs), tensors by name with spaces between. few: those drawn small.
    """
    tensors = list(dict.fromkeys(t for plan in plans for _, *sides in plan for t in " ".join(sides).split()))
    count = sum(map(len, plans)) + len(plans) - 1
    fig, ax = plot.figure(width=4.6, height=0.27 * len(tensors) + 1.3)
    looks, column, ticks = (("read", "o", plot.COLORS["blue"]), ("written", "s", plot.COLORS["orange"])), 0, {}
    for plan in plans:
        seen = {}
        for kernel, *sides in plan:
            ticks[column] = kernel
            for (_, mark, color), side in zip(looks, sides, strict=True):
                for t in side.split():
                    seen.setdefault(t, []).append(column)
                    ax.plot(column, tensors.index(t), mark, color=color, ms=5 if t in few else 10, zorder=3)
            column += 1
        for t, at in seen.items():
            ax.plot([at[0], at[-1]], [tensors.index(t)] * 2, color="#dddddd", lw=6, ls="-", marker="", zorder=1)
        column += 1
    for word, mark, color in looks:
        ax.plot([], [], mark, color=color, ms=10, ls="", label=word)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, borderpad=0)
    ax.set(xlim=(-0.6, count - 0.4), ylim=(len(tensors) - 0.4, -0.6), yticks=range(len(tensors)), yticklabels=tensors)
    ax.set_xticks(list(ticks), list(ticks.values()), rotation=45, ha="right", rotation_mode="anchor")
    plot.bare(ax)
    return plot.show(fig, name=name, caption=caption, alt=alt)


def folding_player(report, title, columns=8, caption="From the pass itself."):
    """The graph folding, one replacement a step: each cell is a kernel, in the order of execution."""
    states = report.states()
    rows = -(-max(len(launched) for _, launched in states) // columns)
    steps, known = [], set()
    for i, (rule, launched) in enumerate(states):
        cells = [(color_of(row) if row.node in known or not i else "bold", _short(row.what)) for row in launched]
        new = [row.what for row in launched if row.node not in known]
        known |= {row.node for row in launched}
        cells += [None] * (rows * columns - len(cells))
        (n, size), before = report.total(launched), report.total(states[max(i - 1, 0)][1])
        if i == 0:
            text = f"As traced: {n} launches."
        elif new:
            saved = (before[1] - size) / 1e6
            text = f"{new[0]} takes the place of {before[0] - n + 1} launches; {saved:,.2f} MB less to move."
        else:
            text = f"{rule}: {before[0] - n} launches less."
        numbers = {"launches": n, "MB moved": f"{size / 1e6:,.2f}"}
        grid = [cells[r * columns : (r + 1) * columns] for r in range(rows)]
        steps.append({"text": text, "kernels": grid, "bill": numbers})
    panels = {
        "kernels": player.Grid(rows, columns, name="one cell a kernel, in order"),
        "bill": player.Values(["launches", "MB moved"], name="the bill"),
    }
    legend = {color: meaning for color, (meaning, _) in KINDS.items()} | {"bold": "new in this step"}
    return player.Stepper(title, panels, steps, legend=legend, caption=caption)


SHORT = {"scaled_dot_product_attention": "sdpa", "add_rmsnorm": "add+norm", "rmsnorm": "norm", "contiguous": "copy"}


def _short(what):
    return SHORT.get(what, what)


def bill_player(batches=BATCHES, gpus=("A100 80GB", "H200", "B200")):
    """Bytes, launches and the arithmetic of time over the batch."""
    bills = {batch: bill(batch) for batch in batches}
    lanes = [*WAYS, "floor"]

    def frame(gpu, batch):
        b = bills[batch]
        times = ways_us(b, gpu)
        bars = []
        for lane, (name, us) in enumerate(times.items()):
            color = "green" if name.startswith("fused") else "muted" if name == "floor" else "orange"
            bars.append((lane, 0, us / times["floor"], color, f"{us:,.0f} us"))
        best = times["fused, in a graph"]
        text = (
            f"Batch {batch}: fused and in a graph, {times['eager'] / best:.1f} times as fast as eager; "
            f"against eager in a graph, {times['eager, in a graph'] / best:.2f} times."
        )
        values = {
            "launches": [b.eager[0], b.fused[0], 1],
            "MB moved": [f"{x / 1e6:,.1f}" for x in (b.eager[1], b.fused[1], b.floor)],
        }
        return {"text": text, "time": bars, "bill": values}

    panels = {
        "time": player.Bars(lanes, unit="times the floor", name="one decode step of one block, by arithmetic"),
        "bill": player.Values(["launches", "MB moved"], ["eager", "fused", "floor"], name="the bill"),
    }
    caption = f"Llama-3-8B, {KEYS:,} keys a sequence, bf16. Counted by the pass; times are arithmetic on datasheets."
    return player.Explorer("Who pays for what?", {"GPU": list(gpus), "batch": list(batches)}, panels, frame,
                           start=("H200", batches[0]), caption=caption)  # fmt: skip


# ---- what a compiler fuses, on a CPU

TOKENS = (1, 8, 64, 512)
SMALL = Config(64, 512, 1408, 1, 8, 4, 64)
CPU_OPS = {  # a few of the kernels' references, and shapes of their inputs
    "add_rmsnorm": ((64, 4096), (64, 4096), (4096,)),
    "swiglu": ((64, 4096), (64, 4096)),
    "bias_gelu": ((64, 4096), (4096,)),
    "softmax": ((64, 4096),),
}
SAMPLES = 15


def inductor_plan(function, *inputs):
    """(torch.compile's version of function, what its own output code calls, in order).

    A generated kernel is named after the operations that went into it; what it leaves to a library stands beside.
    """
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=False)
    with torch.no_grad():
        _, sources = run_and_get_code(compiled, *inputs)
    calls = []
    for source in sources:
        body = source[source.index("def call(") :]
        names = r"\b((?:cpp|triton)_\w*fused_\w+?)(?:\.run)?\(|\b((?:extern_kernels|torch\.ops\.\w+)\.[\w.]+)\("
        calls += [kernel or library for kernel, library in re.findall(names, body)]
    return compiled, calls


def split_plan(calls):
    """(generated kernels, library calls) of a plan."""
    return [c for c in calls if "fused" in c], [c for c in calls if "fused" not in c]


def has_compiler():
    """Whether torch.compile can build for this CPU: it needs a C++ compiler."""
    return any(map(shutil.which, ("g++", "clang++", "c++")))


def cpu_block(tokens, seed=0):
    """(a small Llama block in fp32, its inputs) for a prompt of so many tokens."""
    torch.manual_seed(seed)
    model = Llama(SMALL).eval()
    cos, sin = model.angles(torch.arange(tokens))
    return model.layers[0], (torch.randn(1, tokens, SMALL.hidden_size), cos, sin, partial(causal, 0))


def processor_us(functions, inputs, samples=SAMPLES):
    """{name: [microseconds of processor time a call]}, the functions taking turns; each sample is 20 ms or more."""
    repeats, times = {}, {name: [] for name in functions}
    with torch.no_grad():
        for name, function in functions.items():
            function(*inputs)
            start = time.process_time()
            function(*inputs)
            repeats[name] = max(1, int(0.02 / max(time.process_time() - start, 1e-5)))
        for _ in range(samples):
            for name, function in functions.items():
                start = time.process_time()
                for _ in range(repeats[name]):
                    function(*inputs)
                times[name].append(round(1e6 * (time.process_time() - start) / repeats[name], 2))
    return times


def study(seed):
    """Eager against torch.compile on one CPU thread: some operations, then a block over the number of tokens."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = {"ops": {}, "block": {}}
        for name, shapes in CPU_OPS.items():
            generator = torch.Generator().manual_seed(seed)
            inputs = [torch.randn(shape, generator=generator) for shape in shapes]
            function = getattr(fusion, name)
            compiled, calls = inductor_plan(function, *inputs)
            result["ops"][name] = processor_us({"eager": function, "compiled": compiled}, inputs) | {"plan": calls}
        for tokens in TOKENS:
            block, inputs = cpu_block(tokens, seed)
            compiled, calls = inductor_plan(block, *inputs)
            with torch.no_grad():
                error = (compiled(*inputs) - block(*inputs)).abs().max().item()
            times = processor_us({"eager": block, "compiled": compiled}, inputs)
            result["block"][str(tokens)] = times | {"plan": calls, "max difference": error}
        return result
    finally:
        torch.set_num_threads(threads)


def gain(times):
    """Median time of eager / median time of compiled."""
    return statistics.median(times["eager"]) / statistics.median(times["compiled"])


def experiments():
    return {"fusion": Experiment(study)}


# ---- the live cell

SPELLINGS = {
    "x * rsqrt(mean(x^2) + eps)": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "x / sqrt(mean(x * x) + eps)": lambda x, w: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w,
    "F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
    "eps outside the root": lambda x, w: w * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)),
    "the variance is used again": lambda x, w: _with_variance(x, w, x.pow(2).mean(-1, keepdim=True)),
}


def _with_variance(x, w, variance):
    return w * (x * torch.rsqrt(variance + 1e-6)) + variance


class Spelled(torch.nn.Module):
    def __init__(self, spelling, width, dtype):
        super().__init__()
        self.function = SPELLINGS[spelling]
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, width, dtype=dtype))

    def forward(self, x):
        return self.function(x, self.weight.to(x.dtype))


def try_spelling(spelling, dtype, ops, device="cpu", width=48):
    """Fuse one spelling of RMSNorm with the given functions and say what happened. For the live cell."""
    dtype = getattr(torch, dtype)
    module = Spelled(spelling, width, dtype).to(device)
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad():
        fused = fusion.fuse(module, (x,), ops=ops, verbose=False)
        verdict = check.compare(fused(x), module, x)[0]
    return f"{fused.report}\n{verdict}"
