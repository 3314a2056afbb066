"""The roofline of the book's operations: operations per byte against the rate that a GPU allows. No measurements.

Bytes and operations are those of the topics' benchmark cases. Where a case states no operations, since no matrix
product is in it, they are counted in its reference: one for every number that a step of it computes.
"""

from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from labkit import bench, plot, show
from labkit.gpus import GPUS
from labkit.provenance import source_hash
from labkit.record import find

ROOFS = {"A100 80GB": "orange", "H200": "blue", "B200": "green"}
OPERATIONS = (  # (words, topic, case, chapter, side of its point on which the words stand)
    ("SwiGLU, one kernel", "fusion", "swiglu [64, 14336]", 3, "right"),
    ("residual + RMSNorm", "fusion", "add_rmsnorm [64, 4096]", 3, "left"),
    ("decode attention, MHA", "gqa", "B=16 L=4096, 32 KV heads", 7, "left"),
    ("GEMV, 1 token", "flash_decoding_pp", "gemv QKV M=1", 2, "right"),
    ("decode attention, GQA, group 4", "flash_decoding", "Llama-3-8B B=8 L=8192", 1, "right"),
    ("distillation loss", "distillation", "forward KL, vocabulary 128,256", 5, "left"),
    ("flat GEMM, 8 tokens", "flash_decoding_pp", "flat QKV M=8", 2, "left"),
    ("2:4 weights, 8 tokens", "pruning", "2:4 gate M=8", 4, "right"),
    ("32 decodes + chunk of 512", "batching", "32 decodes + chunk of 512", 9, "left"),
    ("decode attention, MQA", "gqa", "B=16 L=4096, 1 KV heads", 7, "right"),
    ("flat GEMM, 64 tokens", "flash_decoding_pp", "flat QKV M=64", 2, "left"),
    ("prefill attention", "gqa", "prefill, 8 KV heads", 7, "below"),
)
LAUNCHED = {"swiglu": lambda gate, up: F.silu(gate) * up}  # as a user of PyTorch writes it: two kernels
# What computes nothing: views, copies that change the type, and what is made from nothing.
FREE = {"_to_copy", "detach", "view", "expand", "unsqueeze", "ones_like", "zeros_like", "scalar_tensor"}


@dataclass(frozen=True)
class Point:
    """bytes, flops: the least to be moved and computed. us: measured on the GPU under whose roof it stands, or None."""

    words: str
    topic: str
    case: str
    chapter: int
    side: str
    bytes: int
    flops: int
    us: float | None = None

    @property
    def intensity(self):
        """Operations per byte."""
        return self.flops / self.bytes


def attainable(gpu, intensity):
    """Operations per second that a GPU (labkit.gpus) allows at so many operations per byte."""
    return min(gpu.bf16_flops, intensity * gpu.bandwidth)


def points(gpu="H200", results=None):
    """A `Point` for each of OPERATIONS, SwiGLU in two kernels before it in one; us from the record of that GPU, if the
    kernel has not changed since."""
    found = []
    for words, topic, name, chapter, side in OPERATIONS:
        case = next(case for case in bench.topic_cases(topic) if case.name == name)
        flops = case.flops or count(_traced(getattr(bench.topic_module(topic), case.op), _inputs(case), split=True))
        rows = find(topic, f"NVIDIA {gpu}", results)
        own = next((row for row in rows if (row.case, row.provider) == (name, case.op) and row.us), None)
        fresh = own and own.source_hash == source_hash(f"kernels.{topic}:{case.op}", extra={})
        us = median(own.us) if fresh else None
        found.append(Point(words, topic, name, chapter, side, case.bytes, flops, us))
        if case.op in LAUNCHED:
            apart = moved(_traced(LAUNCHED[case.op], _inputs(case)))
            found.insert(-1, replace(found[-1], words="SwiGLU, two kernels", side="right", bytes=apart, us=None))
    return sorted(found, key=lambda point: point.intensity)


def _inputs(case):
    """The case's arguments, without memory."""
    with FakeTensorMode():
        return case.make(None, "cpu")


def _traced(function, inputs, split=False):
    """The operations of function(**inputs): [(name, numbers read, numbers made, bytes read and written)].

    split: softmax and its like in their parts.
    """
    from torch._decomp import get_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    aten = torch.ops.aten
    parts = [aten._log_softmax, aten._softmax, aten._log_softmax_backward_data, aten.silu] if split else []
    names = [name for name, x in inputs.items() if isinstance(x, torch.Tensor)]
    rest = {name: x for name, x in inputs.items() if name not in names}

    def call(*tensors):
        return function(**dict(zip(names, tensors)), **rest)

    graph = make_fx(call, get_decompositions(parts), "fake", _allow_non_fake_inputs=True)(*map(inputs.get, names)).graph
    found = []
    for node in graph.nodes:
        made = node.meta.get("val")
        if node.op == "call_function" and isinstance(made, torch.Tensor):
            read = [x for n in node.all_input_nodes if isinstance(x := n.meta.get("val"), torch.Tensor)]
            most, size = max((x.numel() for x in read), default=0), sum(x.nbytes for x in (*read, made))
            found.append((node.target.overloadpacket.__name__, most, made.numel(), size))
    return found


def count(traced):
    """One operation for each number that a step makes, or reads, if these are more. An exponential is one too."""
    return sum(max(read, made) for name, read, made, _ in traced if name not in FREE)


def moved(traced):
    """Bytes, if every step is a kernel of its own."""
    return sum(size for name, *_, size in traced if name not in FREE - {"_to_copy"})


def moves(topic, without, with_):
    """The factor by which operations per byte change from one case of a topic to another."""
    case = {case.name: case for case in bench.topic_cases(topic)}
    intensity = [case[name].flops / case[name].bytes for name in (without, with_)]
    return intensity[1] / intensity[0]


def table(points, gpu="H200"):
    """The points as a table: operations per byte, what the GPU allows, and what that is of its peak."""
    head = ("operation", "chapter", "operations per byte", "TFLOP/s at most", "of the peak")
    lines = []
    for point in points:
        rate = attainable(GPUS[gpu], point.intensity)
        shown = (f"{point.intensity:.1f}", f"{rate / 1e12:,.1f}", f"{rate / GPUS[gpu].bf16_flops:.1%}")
        lines.append((point.words, str(point.chapter), *shown))
    return show.table(head, lines)


def draw(points, *, name, caption, alt, gpu="H200"):
    """The roofs, and the points on the roof of one GPU; hollow below it what was measured there."""
    fig, ax = plot.figure(height=4.8)
    low, high = 0.04, 4000.0
    for kind, color in ROOFS.items():
        peak, own = GPUS[kind].bf16_flops / 1e12, kind == gpu
        xs = [low, GPUS[kind].flops_per_byte, high]
        style = {"color": plot.COLORS[color], "ls": "-" if own else "--", "lw": 2 if own else 1.2, "marker": ""}
        ax.plot(xs, [attainable(GPUS[kind], x) / 1e12 for x in xs], **style)
        beside = {"textcoords": "offset points", "ha": "right", "va": "center", "color": plot.COLORS[color]}
        ax.annotate(kind, (high, peak), (0, 8 if peak > 500 else -9), **beside)
    ridge = GPUS[gpu].flops_per_byte
    ax.plot([ridge, ridge], [0.1, GPUS[gpu].bf16_flops / 1e12], color="#888888", lw=1, ls=":", marker="")
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    beside = {"textcoords": "offset points", "ha": "center", "color": "#555555", "bbox": paper}
    ax.annotate("ridge", (ridge, 1.1), (0, 0), **beside)
    for words, far, align in (("waits for memory", -6, "right"), ("for the matrix unit", 6, "left")):
        ax.annotate(words, (ridge, 0.5), (far, 0), textcoords="offset points", ha=align, color="#555555")
    for point in points:
        x, y = point.intensity, attainable(GPUS[gpu], point.intensity) / 1e12
        ax.plot(x, y, "o", color=plot.COLORS["black"], ms=6, zorder=4)
        where = {"left": (-8, 3, "right"), "right": (8, -4, "left"), "below": (0, -13, "center")}[point.side]
        beside = {"textcoords": "offset points", "ha": where[2], "va": "center", "bbox": paper}
        ax.annotate(point.words, (x, y), where[:2], **beside)
        if point.us is not None:
            ax.plot(x, point.flops / point.us / 1e6, "o", color=plot.COLORS["black"], mfc="white", ms=6, zorder=4)
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(0.3, 6000))
    ax.set(xlabel="operations per byte", ylabel="TFLOP/s at most")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x:,g}")
    return plot.show(fig, name=name, caption=caption, alt=alt)
