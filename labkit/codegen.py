"""What the compiler makes of a kernel, read without a GPU: registers, spills, shared memory, loads, matrix unit.

`compiled` calls the public functions in a fresh process, under a driver that stands in for the target GPU, compiles
every kernel they launch exactly as they launch it, and reads the machine code. Nothing runs on a GPU. Results are kept
as JSON under `_build/codegen`, keyed by the source reached, the versions, the target and the case.

A topic declares its cases in `labkit/<topic>.py`, function `codegen_cases() -> list[Case]`.
"""

import concurrent.futures
import dataclasses
import hashlib
import html
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from labkit.provenance import ROOT, source_hash
from labkit.rules import changed

CACHE = ROOT / "_build" / "codegen"
# The share of coded load bytes that must come 16 bytes at a time: a kernel that reads K whole and V in pieces has half.
WIDE_SHARE = 2 / 3


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for, and the limits of one of its multiprocessors."""

    name: str
    device: str
    num_sms: int
    shared_limit: int  # bytes a program may use
    shared_per_sm: int
    warps_per_sm: int
    programs_per_sm: int

    @property
    def is_amd(self):
        return self.name.startswith("gfx")


# Limits: CUDA C++ programming guide, table "Technical Specifications per Compute Capability"; AMD CDNA3 ISA guide.
ALL_TARGETS = {
    target.name: target
    for target in [
        Target("sm_75", "T4", 40, 65_536, 65_536, 32, 16),
        Target("sm_80", "A100", 108, 166_912, 167_936, 64, 32),
        Target("sm_86", "RTX 3090", 82, 101_376, 102_400, 48, 16),
        Target("sm_89", "RTX 4090", 128, 101_376, 102_400, 48, 24),
        Target("sm_90", "H200", 132, 232_448, 233_472, 64, 32),
        Target("sm_100", "B200", 148, 232_448, 233_472, 64, 32),
        Target("sm_120", "RTX 5090", 170, 101_376, 102_400, 48, 24),
        Target("gfx942", "MI300X", 304, 65_536, 65_536, 32, 16),
    ]
}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor argument of a case: contiguous, filled with `fill` (a number, or nested lists of the whole shape)."""

    shape: tuple
    dtype: str
    fill: object = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a public function, and what its kernels are expected to compile to.

    function: "kernels.flash_decoding:flash_decoding". name: a few words, e.g. "bf16, head_dim 128, group 8".
    arguments: by name; a `Tensor` or any plain value.
    rules: block rules changed for this call, as `labkit.rules.changed` takes them.
    matrix: names of the launched kernels that have to use the matrix unit. Which instruction follows from the dot's
        tile and dtype (`best_matrix`).
    narrow: names of the kernels that are allowed loads narrower than 16 bytes.
    """

    function: str
    name: str
    arguments: dict
    matrix: tuple = ()
    narrow: tuple = ()
    rules: dict = dataclasses.field(default_factory=dict)


def cases(topic):
    """Return the cases that `labkit/<topic>.py` declares."""
    return importlib.import_module(f"labkit.{topic}").codegen_cases()


# ---- what is expected ------------------------------------------------------------------------------------------------


def best_matrix(target, rows, dtype):
    """Return how the name of the matrix instruction starts that a dot of `rows` rows should become, or None.

    fp32 is multiplied exactly in these kernels, and NVIDIA's matrix units have no exact fp32.
    """
    if ALL_TARGETS[target].is_amd:
        return "v_mfma"
    if dtype == "f32":
        return None
    if rows >= 64 and target == "sm_90":
        return "HGMMA"
    if rows >= 64 and target == "sm_100":
        return "UTC"
    return "HMMA"


SERIALISED = "waits for every wgmma before it starts the next"


def serialised(row):
    """Whether ptxas gave up keeping several of Hopper's matrix instructions (wgmma) under way: it waits after each."""
    count = sum(n for name, n in row["matrix"].items() if name.startswith("HGMMA"))
    return row["waits"] >= count > 0 and any(k > 16 for _, _, k, _ in row["dots"])  # 16 of k: one instruction


def problems(case, row):
    """Return what is wrong with one compiled kernel, as a list of sentences; empty: it passes the gate."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["spills"]:
        found.append(f"spills registers ({row['spills']} spilled loads and stores)")
    if row["stack"]:
        found.append(f"uses {row['stack']} bytes of stack")
    if row["shared"] > row["shared_limit"]:
        found.append(f"needs {row['shared']:,} bytes of shared memory, the limit is {row['shared_limit']:,}")
    if row["wide_share"] < WIDE_SHARE and row["kernel"] not in case.narrow:
        found.append(f"only {row['wide_share']:.0%} of the bytes it loads come in 128-bit loads")
    if any("TF32" in name or "xf32" in name for name in row["matrix"]):
        found.append("multiplies fp32 as TF32")
    if serialised(row):
        found.append(SERIALISED)
    if row["kernel"] in case.matrix:
        if not row["dots"]:
            found.append("has no dot, a matrix instruction is expected")
        for m, n, k, dtype in row["dots"]:
            best = best_matrix(row["target"], m, dtype)
            if best and not any(name.startswith(best) for name in row["matrix"]):
                used = ", ".join(row["matrix"]) or "none"
                found.append(f"dot {m}x{n}x{k} {dtype}: matrix instruction {used}, expected {best}")
    return found


# ---- compile, once ---------------------------------------------------------------------------------------------------


def compiled(some_cases, targets=TARGETS):
    """Return one dict for every case, target and kernel launched, compiling what is not in the cache yet.

    Keys: case, function, target, kernel, constexprs, num_warps, num_stages, registers, spills, stack, shared,
    shared_limit (bytes), loads {bits: count}, loops [[instructions, bytes a thread loads, special] a turn] (NVIDIA),
    wide_share, matrix {instruction: count}, waits (for wgmma), dots [[m, n, k, dtype]], programs_per_sm (an
    estimate). A case that does not compile gives one dict with the key "error".
    """
    sources = {name: source_hash(name, "labkit.codegen:_compile_case") for name in {c.function for c in some_cases}}
    files = {
        (target, i): _cache_file(case, target, sources[case.function])
        for target in targets
        for i, case in enumerate(some_cases)
    }
    missing = {t: [i for i in range(len(some_cases)) if not files[t, i].exists()] for t in targets}
    errors = {}

    def work(target):
        todo = missing[target]
        job = {"target": target, "cases": [[dataclasses.asdict(some_cases[i]), str(files[target, i])] for i in todo]}
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "TRITON_INTERPRET": "0", "LAB_PTX": "", "OMP_NUM_THREADS": "1"}
            env |= {"TRITON_CACHE_DIR": folder}
            run = subprocess.run(
                [sys.executable, "-m", "labkit.codegen"],
                input=json.dumps(job), capture_output=True, text=True, cwd=ROOT, env=env,
            )
        failed = dict(json.loads(line) for line in run.stdout.splitlines() if line.startswith('["'))
        for i in todo:
            if not files[target, i].exists():
                last = (run.stderr.strip().splitlines() or ["no message"])[-1]
                died = f"the compiling process ended with code {run.returncode}: {last}"
                errors[target, i] = failed.get(str(files[target, i]), died)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(work, [target for target in targets if missing[target]]))
    rows = []
    for i, case in enumerate(some_cases):
        for target in targets:
            if (target, i) in errors:
                stored = [{"kernel": "-", "error": errors[target, i]}]
            else:
                stored = json.loads(files[target, i].read_text())
            rows += [{"case": case.name, "function": case.function, "target": target, **row} for row in stored]
    return rows


def _cache_file(case, target, source):
    """Where the result is kept: named by the code that it depends on, the arguments, the target and the versions."""
    arguments = {name: str(value) for name, value in sorted(case.arguments.items())}
    key = [case.function, arguments, source, target, *map(importlib.metadata.version, ("torch", "triton"))]
    key += [case.rules] if case.rules else []
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return CACHE / f"{case.function.replace(':', '.')}-{target}-{digest}.json"


def _main():
    """The compiling process: one target, many cases, on stdin; each result goes to the file named with the case.

    An error is not kept, it may be the machine's: it is printed, as one line [file, message].
    """
    job, launches = json.load(sys.stdin), []

    def keep(kernel, arguments, grid):
        launches.append((kernel, {p.name: arguments[p.name] for p in kernel.src.fn.params if p.is_constexpr}))

    stand_in(ALL_TARGETS[job["target"]], keep)
    for case, file in job["cases"]:
        launches.clear()
        try:
            with changed(case["rules"]):
                result = _compile_case(case, ALL_TARGETS[job["target"]], launches)
        except Exception as e:
            print("\n" + json.dumps([file, f"{type(e).__name__}: {e}"]), flush=True)
            continue
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(result, indent=1))
        part.replace(file)


def stand_in(target: Target, launched) -> None:
    """Make `target` Triton's current device. A launch is compiled, and not run: launched(kernel, arguments, grid).

    kernel: what Triton compiled; arguments {name: value}; grid: 3 numbers.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": target.shared_limit, "multiprocessor_count": target.num_sms}

    class Driver:
        utils = Utils

        @staticmethod
        def get_current_target():
            if target.is_amd:
                return GPUTarget("hip", target.name, 64)
            return GPUTarget("cuda", int(target.name.removeprefix("sm_")), 32)

        @staticmethod
        def get_current_device():
            return 0

        @staticmethod
        def get_current_stream(device):
            return 0

    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        bound = self.signature.bind_partial(*args, **{k: v for k, v in kwargs.items() if k in self.arg_names})
        bound.apply_defaults()
        launched(kernel, bound.arguments, (*grid, 1, 1)[:3])
        return kernel

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only


def _compile_case(case, target, launches):
    import torch

    def build(value):
        if not isinstance(value, dict):
            return value
        dtype = getattr(torch, value["dtype"])
        if isinstance(value["fill"], list):
            return torch.tensor(value["fill"], dtype=dtype).reshape(value["shape"])
        return torch.full(value["shape"], value["fill"], dtype=dtype)

    module, _, name = case["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    function(**{name: build(value) for name, value in case["arguments"].items()})
    if not launches:
        raise RuntimeError(f"{case['function']} launched no kernel")
    rows = []
    for kernel, constexprs in launches:
        row = {
            "kernel": kernel.src.fn.fn.__name__,
            "constexprs": {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in constexprs.items()},
            "num_warps": kernel.metadata.num_warps,
            "num_stages": kernel.metadata.num_stages,
            "shared": kernel.metadata.shared,
            "shared_limit": target.shared_limit,
            **(_amd_facts(kernel.asm["amdgcn"]) if target.is_amd else _nvidia_facts(kernel.asm["cubin"])),
            "dots": _dots(kernel.asm["ttir"]),
        }
        # Blackwell's instruction keeps its shape in an operand; the accumulator in Triton's IR tells it.
        shapes = sorted(set(re.findall(r"tc_gen5_mma .*memdesc<(\d+x\d+)xf32", kernel.asm.get("ttgir", ""))))
        shapes += ["TF32"] if "kind::tf32" in kernel.asm.get("ptx", "") else []  # nor does its name tell this
        row["matrix"] = {".".join([k, *shapes * k.startswith("UTC")]): n for k, n in row["matrix"].items()}
        sizes = {int(bits): int(bits) * count for bits, count in row["loads"].items()}
        row["wide_share"] = sum(v for k, v in sizes.items() if k >= 128) / max(1, sum(sizes.values()))
        row["programs_per_sm"] = _programs_per_sm(target, row)
        if row not in rows:
            rows.append(row)
    return rows


# ---- read the machine code -------------------------------------------------------------------------------------------


def _dots(ttir):
    """Return [m, n, k, operand dtype] of every dot in Triton's own IR."""
    pattern = r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>"
    found = [[int(m), int(n), int(k), dtype] for m, k, dtype, n in re.findall(pattern, ttir)]
    return [dot for i, dot in enumerate(found) if dot not in found[:i]]


def _count(pattern, text):
    """Count the matches of a pattern by their text, sorted."""
    found = re.findall(pattern, text)
    return {name: found.count(name) for name in sorted(set(found))}


def _nvidia_facts(cubin):
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def read(tool, *flags):
            command = [tools / tool, *flags, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = read("cuobjdump", "-res-usage"), read("nvdisasm", "-c", "-ndf")
    loads = {}
    for name, count in _count(_LOAD, sass).items():
        loads[_width(name)] = loads.get(_width(name), 0) + count
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "loads": loads,
        "loops": _loops(sass),
        "waits": len(re.findall(r"\bWARPGROUP\.DEPBAR\b", sass)),
        "matrix": _count(r"\b(?:HMMA|IMMA|DMMA|QMMA|HGMMA|UTC\w*MMA)\b[.\w]*", sass),
    }


_LOAD = r"\b(?:LDGSTS|LDG|UTMALDG|UBLKCP)\b[.\w]*"


def _width(load):
    """Bits of a load instruction, as text. TMA: the hardware fetches whole tiles."""
    width = re.search(r"\.(256|128|64|[US]?16|[US]?8)\b", load)
    return "128" if load.startswith("U") else width[1].lstrip("US") if width else "32"


def _loops(sass):
    """[instructions, bytes that a thread loads, special] of a turn of every innermost loop that loads from memory.

    0 bytes: its tiles are fetched by the TMA. special: instructions of the unit for exponentials and logarithms.
    """
    labels, code, spans = {}, [], []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif re.match(r"\s*/\*[0-9a-f]+\*/", line):
            code.append(line)
            jump = re.search(r"\bBRA\b.*(\.L_x_\d+)", line)
            if jump and jump[1] in labels:  # backwards
                spans.append((labels[jump[1]], len(code)))
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]
    found = []
    for body in ("\n".join(code[a:b]) for a, b in inner):
        sizes = [int(_width(load)) // 8 for load in re.findall(_LOAD, body)]
        if sizes:
            loaded = 0 if "UTMALDG" in body else sum(sizes)
            found.append([body.count("\n") + 1, loaded, len(re.findall(r"\bMUFU\b", body))])
    return found


def per_byte(row, special=False):
    """Instructions a byte of the loops that load most: one number a loop, in order; [] if none is known.

    A thread's instructions (special: exponentials and logarithms alone) over the bytes that it loads, wherever these
    come from. Loops that load less than half as much are not counted.
    """
    most = max((size for _, size, _ in row["loops"]), default=0)
    return [(few if special else all_) / size for all_, size, few in row["loops"] if size and 2 * size >= most]


def _amd_facts(text):
    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    bits = {"dwordx4": "128", "dwordx3": "96", "dwordx2": "64", "dword": "32", "ushort": "16", "ubyte": "8"}
    loads = {}
    for name, count in _count(r"\b(?:global|buffer|flat)_load_(?:lds_)?(\w+)", text).items():
        width = bits.get(name, "8" if "byte" in name else "16")
        loads[width] = loads.get(width, 0) + count
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        # a spilled scalar register goes to a lane of a vector register, not to memory
        "spills": field("vgpr_spill_count"),
        "loads": loads,
        "loops": [],
        "waits": 0,
        "matrix": _count(r"\bv_mfma_\w+", text),
    }


def _programs_per_sm(target, row):
    """Estimate how many programs fit a multiprocessor at the same time: the tightest of four limits."""
    if target.is_amd:
        # four SIMDs, each with 512 vector registers a lane, given out in eights, and at most 8 waves
        waves = min(8, 512 // max(8, -(-row["registers"] // 8) * 8))
        by_waves, reserved = 4 * waves // row["num_warps"], 0
    else:
        # 65,536 registers, given to a warp in pieces of 256
        warps = min(target.warps_per_sm, 65_536 // (-(-row["registers"] * 32 // 256) * 256))
        by_waves, reserved = warps // row["num_warps"], 0 if target.name == "sm_75" else 1024
    by_shared = target.shared_per_sm // max(1, row["shared"] + reserved)
    return min(target.programs_per_sm, by_waves, by_shared)


# ---- show ------------------------------------------------------------------------------------------------------------

def _unit(name):
    """A matrix instruction without its types: HMMA.16816.F32.BF16 -> HMMA.16816."""
    return re.sub(r"\.(?:F32|F16|BF16).*|\.gdesc", "", name)


def kib(size):
    """Bytes as KiB, three digits or two decimals: 71680 -> "70", 16 -> "0.02"."""
    return f"{size / 1024:.2f}" if 0 < size < 1024 else f"{size / 1024:.3g}"


# What the texts speak of comes first and fits on a page; the rest is reached by scrolling.
_COLUMNS = {
    "target": lambda r: f"{r['target']} ({ALL_TARGETS[r['target']].device})",
    "kernel": lambda r: r["kernel"].strip("_"),
    "verdict": lambda r: "; ".join(r["problems"]) or "passes",
    "registers": lambda r: r["registers"],
    "spills": lambda r: r["spills"],
    "shared KiB": lambda r: f"{kib(r['shared'])} of {kib(r['shared_limit'])}",
    "128-bit loads": lambda r: f"{r['wide_share']:.0%}",
    "instructions / byte": lambda r: ", ".join(f"{x:.1f}" for x in per_byte(r)) or "-",
    "matrix instruction": lambda r: ", ".join(dict.fromkeys(map(_unit, r["matrix"]))) or "none",
    "programs / SM": lambda r: r["programs_per_sm"],
    "warps": lambda r: r["num_warps"],
    "stages": lambda r: r["num_stages"],
    "blocks": lambda r: ", ".join(f"{k} {v}" for k, v in r["constexprs"].items()),
}


def _cell(column, words):
    """HTML of a cell; an instruction may break after its name, and never within its shape."""
    kind = ' class="lab-fails"' if column == "verdict" and words != "passes" else ""
    words = re.sub(r"(?<=HGMMA\.)|(?<=UTCHMMA\.)|(?<=v_mfma_f32_)", "<wbr>", html.escape(words))
    return f"<td{kind}>{words}</td>"


class Report:
    """One row for every case, target and kernel. `rows` has all facts; print it, or let a notebook show it."""

    def __init__(self, rows, note=""):
        self.rows, self.note = rows, note

    def _groups(self):
        """[(case, lines)], rows of one case together."""
        groups = {}
        for row in self.rows:
            known = ("target", "verdict") if "error" in row else _COLUMNS
            line = [str(show(row)) if name in known else "-" for name, show in _COLUMNS.items()]
            groups.setdefault((row["function"], row["case"]), []).append(line)
        return [(case, lines) for (_, case), lines in groups.items()]

    def verdict(self):
        """The gate's verdict on all rows, in words and whole numbers only: what fails, or that all pass; lines."""
        if failed := [row for row in self.rows if row["problems"]]:
            return [f"{row['case']}, {row['target']}, {row['kernel']}: {'; '.join(row['problems'])}" for row in failed]
        narrow = sorted({row["kernel"].strip("_") for row in self.rows if row["wide_share"] < WIDE_SHARE})
        allowed = f" (but in {', '.join(narrow)}, where a case allows it)" if narrow else ""
        groups = {(row["function"], row["case"]) for row in self.rows}
        counts = {"case": len(groups), "target": len({row["target"] for row in self.rows})}
        passed = " x ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items()) + " pass"
        also = f"shared memory fits, 128-bit loads{allowed}, matrix instructions as expected"
        return [f"{passed}: no spills, no stack,\n{also}"]

    def __repr__(self):
        if self.note:
            return self.note
        lines = [list(_COLUMNS), *(line for _, lines in self._groups() for line in lines)]
        widths = [max(map(len, column)) for column in zip(*lines)]

        def text(line):
            return "  ".join(map(str.ljust, line, widths)).rstrip()

        parts = [text(lines[0])]
        for case, found in self._groups():
            parts += [case, *map(text, found)]
        return "\n".join(parts)

    def _repr_html_(self):
        if self.note:
            return f"<p>{html.escape(self.note)}</p>"
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in _COLUMNS)
        lines = "<br>".join(html.escape(line) for line in self.verdict())
        parts = [f'<p>{lines}.</p><table class="lab-compiled"><thead><tr>{head}</tr></thead>']
        for case, lines in self._groups():
            title = f'<th colspan="{len(_COLUMNS)}" scope="rowgroup">{html.escape(case)}</th>'
            cells = ("".join(map(_cell, _COLUMNS, line)) for line in lines)
            parts.append(f"<tbody><tr>{title}</tr>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</tbody>")
        return "".join(parts) + "</table>"


def report(topic_or_cases, targets=TARGETS):
    """Compile (or read from the cache) a topic's cases, or a list of them; return a `Report` with verdicts."""
    if importlib.util.find_spec("triton") is None:
        return Report([], "Triton is not installed here (it needs Linux), so nothing was compiled.")
    some_cases = cases(topic_or_cases) if isinstance(topic_or_cases, str) else topic_or_cases
    by_name = {(case.function, case.name): case for case in some_cases}
    if len(by_name) < len(some_cases):
        raise ValueError("topic_or_cases: two cases of one function have the same name")
    rows = compiled(some_cases, targets)
    return Report([{**row, "problems": problems(by_name[row["function"], row["case"]], row)} for row in rows])


def verdicts(topic, targets=TARGETS):
    """Print the gate's verdict on a topic in words and whole numbers only."""
    result = report(topic, targets)
    if result.note:
        print(result.note)
    else:
        print(*(f"{topic}: {line}" for line in result.verdict()), sep="\n")


if __name__ == "__main__":
    _main()
