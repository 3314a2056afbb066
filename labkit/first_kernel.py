"""The first kernels in plain torch: what each computes, what is measured and compiled, and the page's pictures."""

import functools
import numbers

import torch

from labkit import args, bench, codegen, player
from labkit.attention import softmax_dtype
from labkit.gpus import GPUS

# ---- what the kernels compute


def axpy(a, x, y):
    """a * x + y: a a number; x, y [n]; fp16, bf16, fp32 or fp64. Raises ValueError naming the argument."""
    args.expect(isinstance(a, numbers.Real), "a", type(a).__name__, "a number")
    args.tensor("x", x, ("n",), dtypes=args.REFERENCE_FLOATS)
    args.tensor("y", y, tuple(x.shape), like=x, dtype=x.dtype)
    return torch.add(y, x, alpha=a)


def row_sum(x):
    """The sum of each row of x [rows, n], in at least fp32, then rounded. Raises ValueError naming the argument."""
    args.tensor("x", x, ("rows", "n"), dtypes=args.REFERENCE_FLOATS)
    return x.sum(-1, dtype=softmax_dtype(x.dtype)).to(x.dtype)


def matvec(x, w):
    """y = w x: x [K], w [N, K] as in `nn.Linear` -> y [N]. Raises ValueError naming the argument."""
    args.tensor("x", x, ("k",), dtypes=args.REFERENCE_FLOATS)
    args.tensor("w", w, ("n", len(x)), like=x, dtype=x.dtype)
    return torch.mv(w, x)


# ---- what is compiled


def codegen_cases() -> list[codegen.Case]:
    """Each kernel in bf16, and in another dtype."""

    def case(function, name, dtype="bfloat16", a=None, **shapes):
        arguments = {key: codegen.Tensor(shape, dtype) for key, shape in shapes.items()}
        arguments |= {} if a is None else {"a": a}
        return codegen.Case(f"kernels.first_kernel:{function}", f"{function}, {dtype}, {name}", arguments)

    line = (2**20,)
    return [
        case("axpy", "[1048576]", a=2.0, x=line, y=line),
        case("axpy", "[1048576]", "float32", a=2.0, x=line, y=line),
        case("row_sum", "[64, 4096]", x=(64, 4096)),
        case("row_sum", "[64, 32000]", "float16", x=(64, 32_000)),
        case("matvec", "[4096, 4096]", x=(4096,), w=(4096, 4096)),
        case("matvec", "[14336, 4096]", "float32", x=(4096,), w=(14_336, 4096)),
    ]


# ---- what is measured

FFN, HIDDEN = 14_336, 4096  # Llama-3-8B


def cases(tiny=False) -> list[bench.Case]:
    """An elementwise kernel on few and on many numbers, a sum, and the product that a decode step is made of."""

    def case(name, op, shapes, moved, peer, **options):
        def make(generator, device):
            def randn(name, shape):
                x = torch.randn(shape, generator=generator, device=device)
                return (x * shape[-1] ** -0.5 if name == "w" else x).bfloat16()

            inputs = {key: randn(key, shape) for key, shape in shapes.items()}
            return inputs | ({"a": 2.0} if op == "axpy" else {})

        return bench.Case(name, op, make, bytes=moved, peers=peer, **options)

    def library(function):
        return lambda **inputs: functools.partial(function, **inputs)

    few, many, rows = (100, 3000, 3) if tiny else (4096, 2**26, 2**14)
    n, k = (70, 300) if tiny else (FFN, HIDDEN)
    add = {"torch.add": library(lambda a, x, y: torch.add(y, x, alpha=a))}
    return [
        case("axpy, 4,096 numbers", "axpy", {"x": (few,), "y": (few,)}, 6 * few, add, flops=2 * few),
        case("axpy, 67,108,864 numbers", "axpy", {"x": (many,), "y": (many,)}, 6 * many, add, flops=2 * many),
        case(f"row_sum [16384, {HIDDEN}]", "row_sum", {"x": (rows, k)}, 2 * rows * (k + 1),
             {"torch.sum": library(lambda x: x.sum(-1))}, flops=rows * k),
        case(f"matvec [{FFN}, {HIDDEN}]", "matvec", {"x": (k,), "w": (n, k)}, 2 * (n * k + n + k),
             {"torch.mv": library(lambda x, w: torch.mv(w, x))}, flops=2 * n * k),
    ]  # fmt: skip


# ---- the page's pictures


def launch_player(out, walk, block):
    """Who is which program: out [n], what `axpy` returned; walk, `trace.watch`'s record of `own_elements`."""
    n, programs = len(out), len(walk)
    done, steps = set(), []
    for step in walk:
        offs, mask = step.outputs
        mine = [int(i) for i in offs[mask]]
        done |= set(mine)
        lanes = [
            [("sky", lane) for lane in range(block)],
            [("blue" if ok else "orange", int(i)) for i, ok in zip(offs, mask)],
            [("blue" if ok else "orange", "True" if ok else "False") for ok in mask],
        ]
        cells = [
            ("blue" if i in mine else "muted", f"{out[i]:.0f}") if i in done else ("outline" if i < n else "orange", "")
            for i in range(programs * block)
        ]
        left = block - len(mine)
        steps.append({
            "text": f"Program {step.program[0]} of {programs} owns the elements {mine[0]} to {mine[-1]}."
            + (f" {left} of its {block} lanes are masked: there are no such elements." if left else ""),
            "lanes": lanes,
            "out": [cells[p * block : (p + 1) * block] for p in range(programs)],
        })  # fmt: skip
    panels = {
        "lanes": player.Grid(3, block, row_labels=["tl.arange", "offs", "mask"], name="the lanes of this program"),
        "out": player.Grid(programs, block, row_labels=[f"program {p}" for p in range(programs)], name="out in memory"),
    }
    legend = {"blue": "this program's own", "muted": "written before", "outline": "not yet", "orange": "masked"}
    return player.Stepper(
        f"A launch: {programs} programs for {n} elements", panels, steps, legend=legend,
        caption=f"A recorded run of axpy with BLOCK = {block}, n = {n}. The interpreter runs one program after the "
        "other; a GPU runs many at a time, in any order.",
    )  # fmt: skip


REGISTERS = 65_536  # of 4 bytes, per SM; CUDA C++ programming guide, "Technical Specifications per Compute Capability"
L2 = 60 * 2**20  # bytes; what PyTorch reports of an H200


def machine(gpu="H200", target="sm_90") -> dict:
    """{level: (bytes of one, how many, bytes/s of all or None)} from the datasheet and the programming guide."""
    facts, limits = GPUS[gpu], codegen.ALL_TARGETS[target]
    clock = 67e12 / (2 * 128 * facts.num_sms)  # the datasheet's fp32 rate; 128 multiply-adds per SM and clock
    return {
        "registers": (4 * REGISTERS, facts.num_sms, None),
        "shared memory": (limits.shared_per_sm, facts.num_sms, 32 * 4 * clock * facts.num_sms),  # 32 banks of 4 bytes
        "L2 cache": (L2, 1, None),
        "HBM": (facts.memory_gb * 10**9, 1, facts.bandwidth),
    }


def machine_figure():
    """An H200 as a kernel sees it, with the sizes and rates of `machine`; and what a program becomes on it."""
    from labkit import plot

    levels = machine()
    registers, shared, l2, hbm = levels.values()
    fig, ax = plot.figure(width=5.2, height=4.2)

    def box(x, y, width, height, text, color, alpha=0.25, **options):
        rectangle = plot.plt.Rectangle((x, y), width, height, facecolor=(color, alpha), edgecolor=color, linewidth=1.2)
        ax.add_patch(rectangle)
        ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", **options)

    def arrow(x, y, length, text):
        ax.annotate("", (x, y + length), (x, y), arrowprops={"arrowstyle": "<->", "color": plot.COLORS["black"]})
        ax.text(x + 0.12, y + length / 2, text, va="center", fontsize=8)

    color = plot.COLORS
    box(0, 0, 10, 0.9, f"HBM, {hbm[0] / 1e9:.0f} GB: the tensors", color["orange"])
    arrow(0.6, 0.9, 0.7, f"{hbm[2] / 1e12:.1f} TB/s")
    box(0, 1.6, 10, 0.9, f"L2 cache, {l2[0] / 2**20:.0f} MiB, for all SMs", color["purple"])
    arrow(0.6, 2.5, 0.7, "")
    box(0, 3.2, 5.9, 4.1, "", color["blue"], 0.08)
    ax.text(0.2, 7.0, f"an SM, one of {registers[1]}", va="center", weight="bold", fontsize=9)
    box(0.3, 3.4, 5.3, 0.8, f"shared memory, {shared[0] / 1024:.0f} KiB", color["green"])
    arrow(0.6, 4.2, 0.5, f"{shared[2] / 1e12:.0f} TB/s, all SMs together")
    box(0.3, 4.7, 5.3, 0.8, f"registers, {registers[0] / 1024:.0f} KiB", color["blue"])
    for i in range(4):
        box(0.3 + 1.35 * i, 5.7, 1.25, 1.0, "32 lanes\nmatrix\nunit", color["sky"], fontsize=8)
    box(6.4, 3.2, 3.6, 4.1, "", color["black"], 0.05)
    ax.text(6.6, 7.0, "a program, 4 warps", va="center", weight="bold", fontsize=9)
    for i in range(4):
        box(6.6, 6.1 - 0.75 * i, 3.2, 0.6, f"warp {i}: 32 lanes, in step", color["sky"], fontsize=8)
    ax.text(6.6, 3.5, "tiles: in lanes' registers", va="center", fontsize=8)
    ax.annotate("", (5.9, 5.2), (6.4, 5.2), arrowprops={"arrowstyle": "->", "color": color["black"]})
    ax.set(xlim=(-0.05, 10.05), ylim=(-0.05, 7.4))
    ax.axis("off")
    return plot.show(
        fig, name="fig-fk-machine",
        caption="An H200 as a kernel sees it. A program runs on one SM from beginning to end; as many share an SM as "
        "its registers and its shared memory hold. Sizes: CUDA programming guide {cite}`nvidia2025cuda`, datasheet "
        "{cite}`nvidia2024h200`, and for the L2 cache what PyTorch reports. Rates: the datasheet; 32 banks of 4 bytes "
        "per SM and clock.",
        alt=f"Boxes: HBM of {hbm[0] / 1e9:.0f} GB at the bottom, above it the L2 cache of {l2[0] / 2**20:.0f} MiB, "
        f"above it one of {registers[1]} SMs with {shared[0] / 1024:.0f} KiB of shared memory, "
        f"{registers[0] / 1024:.0f} KiB of registers and four groups of 32 lanes with a matrix unit; beside it a "
        "program of four warps, on that SM.",
    )  # fmt: skip
