"""Compiled kernels without a GPU: the PTX that Triton makes, run on the CPU instruction by instruction.

With LAB_PTX=sm_90 in the environment Triton sees an H200 that is not there. Every launch is compiled for it, as on a
machine that has one, and its PTX is executed by the engine in `ptx.cpp`: the instructions of the matrix units,
asynchronous copies, the TMA and barriers, on the memory of CPU tensors. The engine also looks for what
compute-sanitizer looks for; its first lines say what. What it cannot tell: time, and what ptxas makes of the PTX.

    LAB_PTX=sm_90 pytest --on-device                 all tests that run kernels (`make compiled`)
    LAB_PTX=sm_90 python -m kernels record --dry     every case of the benchmark, on tiny sizes

Instructions: NVIDIA, Parallel Thread Execution ISA, version 8.7. Known are those that this lab's kernels need; another
one is named in the error and is a line in `ptx.cpp`. A C++20 compiler is needed: CXX, g++ or clang++.
"""

import ctypes
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np

from labkit.provenance import ROOT

TARGETS = ("sm_80", "sm_90")  # A100; H100 and H200
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O2", "-std=c++20", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"]
SHARED_BASE = 1024  # ptx.cpp has it too
SPECIALS = ["%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z"]
SPECIALS += ["%ntid.x", "%ntid.y", "%ntid.z", "%laneid"]
FIELDS = ["global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype"]
FIELDS += ["interleave_layout", "swizzle_mode", "fill_mode"]
INDEXED = ("box_dim", "global_dim", "global_stride", "element_stride")
WIDTHS = {".pred": 64, ".b16": 16, ".b32": 32, ".b64": 64}
ORDERING = ("wgmma.fence", "fence.", "bar.warp.sync", "cp.async.bulk.commit_group", "cp.async.bulk.wait_group")
TMA_LOAD = r"cp\.async\.bulk\.tensor\.\dd\.shared::(cta|cluster)\.global\.mbarrier::complete_tx::bytes"
COUNTS = ("warps", "bytes", "sectors", "wavefronts", "least")  # ptx.cpp says what they are
ERROR_SIZE = 1000
RESIDENT = 4  # programs that run at the same time under `emulate`


def compiler() -> str | None:
    """The C++ compiler that `ptx.cpp` is compiled with: CXX, g++ or clang++."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@functools.cache
def engine() -> ctypes.CDLL:
    """`ptx.cpp`, compiled once under `_build/ptx`. Raises RuntimeError where there is no compiler, or it fails."""
    if not (command := compiler()):
        raise RuntimeError("no C++ compiler: g++ or clang++ is needed to run PTX (or name one in CXX)")
    digest = hashlib.sha256(" ".join([command, *FLAGS]).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = ROOT / "_build" / "ptx" / f"engine-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")  # other processes may be at it
        made = subprocess.run([command, *FLAGS, "-o", part, SOURCE], capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(f"{command} failed on {SOURCE.name}: {made.stderr[-1000:]}")
        part.replace(library)
    loaded = ctypes.CDLL(str(library))
    number, numbers = ctypes.c_int64, np.ctypeslib.ndpointer(np.int64)
    loaded.ptx_load.restype = ctypes.c_void_p
    text = ctypes.c_char_p
    loaded.ptx_load.argtypes = [numbers, number, text, number, numbers, number, numbers, number, text, number]
    loaded.ptx_launch.restype = number
    loaded.ptx_launch.argtypes = [ctypes.c_void_p, numbers, number, number, text, number, numbers, number]
    loaded.ptx_launch.argtypes += [number, number, number, numbers, text, number]
    return loaded


class Kernel:
    """One kernel, read from its PTX.

    Every operand is a row of the register file: [32] values of 64 bits, one a lane; constants and special registers
    have rows too. Raises ValueError, with the line, for what is not known.
    """

    def __init__(self, text: str):
        head, body, line = _split(text)
        self.parameters, self.parameter_bytes = [], 0  # [(kind, offset, bytes)], in order
        self._offsets = {}
        for kind, name in re.findall(r"\.param\s+\.(\w+)\s+(?:\.ptr[^,)]*?)?(\w+)\s*[,)\n]", head):
            size = int(kind[1:]) // 8
            offset = -(-self.parameter_bytes // size) * size
            self.parameters.append((kind, offset, size))
            self._offsets[name], self.parameter_bytes = offset, offset + size
        self.num_threads = int(re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", text)[1])
        self._widths, self._constants, self._specials = [], {}, {}  # of rows; (value, width) -> row; name -> row
        self._scopes = [{}]  # register -> its width, or its row once it is used
        self._names, self._instructions = {}, []
        self._read(body, line)
        self._handle = self._load()
        self._counts = np.zeros((len(self._instructions), len(COUNTS)), dtype=np.int64)  # over all launches

    # ---- rows

    def _new_row(self, width):
        self._widths.append(width)
        return len(self._widths) - 1

    def _declare(self, kind, names):
        for name in names:
            family = re.fullmatch(r"(%\w+)<(\d+)>", name)
            each = [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [name]
            self._scopes[-1].update(dict.fromkeys(each, (WIDTHS[kind], None)))

    def _row(self, name):
        for scope in reversed(self._scopes):
            if name in scope:
                width, row = scope[name]
                if row is None:
                    row = self._new_row(width)
                    scope[name] = (width, row)
                return row
        if name not in SPECIALS:
            raise ValueError(f"unknown register {name}")
        if name not in self._specials:
            self._specials[name] = self._new_row(32)
        return self._specials[name]

    def _operand(self, text, width=32):
        """The row of a register or a constant; -1 for "_"."""
        if text == "_":
            return -1
        value = SHARED_BASE if text == "global_smem" else _number(text)
        if value is None:
            return self._row(text)
        key = (value & ((1 << width) - 1), width)
        if key not in self._constants:
            self._constants[key] = self._new_row(width)
        return self._constants[key]

    def _vector(self, text, width=32):
        return [self._operand(x, width) for x in (_arguments(text[1:-1]) if text.startswith("{") else [text])]

    def _address(self, text):
        """[register + offset] -> (row, offset)."""
        base, offset = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
        return self._operand(base), int(offset or "0", 0)

    def _place(self, text):
        """[register] -> row."""
        row, offset = self._address(text)
        if offset:
            raise ValueError("an offset where none is known")
        return row

    # ---- statements

    def _read(self, body, line):
        labels, jumps = {}, []  # (scope, name) -> instruction; (instruction, scope, name)
        scope, counter, at = (0,), itertools.count(1), 0
        label = re.compile(r"([$\w]+):(?!:)")
        while at < len(body):
            char = body[at]
            if char == "{":
                scope = (*scope, next(counter))
                self._scopes.append({})
            elif char == "}":
                scope = scope[:-1]
                self._scopes.pop()
            elif found := label.match(body, at):
                labels[scope, found[1]] = len(self._instructions)
                at = found.end()
                continue
            elif not char.isspace():
                end = body.index(";", at)
                statement = body[at:end].strip()
                try:
                    target = self._statement(statement, line) if statement else None
                except (LookupError, ValueError, TypeError, AttributeError, StopIteration) as e:
                    raise ValueError(f"PTX, line {line}: {statement[:80]}: {e!r}") from e
                if target:
                    jumps.append((len(self._instructions) - 1, scope, target))
                line += body.count("\n", at, end)
                at = end + 1
                continue
            line += char == "\n"
            at += 1
        for instruction, scope, name in jumps:
            while (scope, name) not in labels:
                if not scope:
                    raise ValueError(f"no label {name}")
                scope = scope[:-1]
            self._instructions[instruction][-1] = [labels[scope, name]]
        self._emit("ret", "ret", [], [], -1, 0, line)

    def _statement(self, text, line):
        """Read one; returns the label that it jumps to, if it does."""
        if text.startswith("."):
            directive, kind, names = [*text.split(None, 2), "", ""][:3]
            if directive == ".reg":
                self._declare(kind, [name.strip() for name in names.split(",")])
            return None
        guard, negated = -1, 0
        if found := re.match(r"@(!?)([%\w]+)\s+", text):
            guard, negated, text = self._row(found[2]), int(bool(found[1])), text[found.end() :]
        name, *rest = text.split(None, 1)
        operands = _arguments(rest[0] if rest else "")
        kind, rows, numbers = self._meaning(name, operands)
        self._emit(kind, name, rows, numbers, guard, negated, line)
        return operands[0] if kind == "bra" else None

    def _emit(self, kind, name, rows, numbers, guard, negated, line):
        index = self._names.setdefault((kind, name), len(self._names))
        self._instructions.append([index, guard, negated, line, rows, numbers])

    def _meaning(self, name, ops):
        """(the engine's name for it, rows, numbers): what is said at the handlers of `ptx.cpp`."""
        parts = name.split(".")
        kind = parts[-1]
        bits = int(re.sub(r"x2$|\D", "", kind) or 0) * (2 if kind.endswith("x2") else 1)
        if name.startswith(ORDERING):  # instructions are done in order here
            if name == "bar.warp.sync":
                _all_lanes(ops[0])
            return "nothing", [], []
        if parts[0] in ("ld", "st"):
            return self._load_or_store(parts, bits, ops)
        if name.startswith("cp.async"):
            return self._copy(name, ops)
        if parts[0] in ("mbarrier", "tensormap"):
            return self._mbarrier_or_map(name, parts, ops)
        if parts[0] == "atom":
            order = {"acq_rel", "relaxed"} & set(parts)
            if not ({"global", "add"} <= set(parts) and order and kind in ("u32", "s32", "f32")):
                raise ValueError("an atomic that is not known")
            address, offset = self._address(ops[1])
            numbers = [offset, int(kind == "f32"), int("acq_rel" in order)]
            return "atom.add", [self._operand(ops[0]), address, self._operand(ops[2])], numbers
        if parts[0] == "shfl":
            _all_lanes(ops[4])
            rows = [self._row(ops[0]), *(self._operand(x) for x in ops[1:4])]
            return "shfl", rows, [["bfly", "idx", "up", "down"].index(parts[2])]
        if parts[:2] == ["redux", "sync"]:
            _all_lanes(ops[2])
            return f"redux.{'.'.join(parts[2:])}", [self._operand(x) for x in ops[:2]], []
        if parts[0] == "elect":
            _all_lanes(ops[1])
            return "elect", [self._operand(x) for x in ops[0].split("|")], []
        if parts[0] in ("ldmatrix", "stmatrix"):
            values, place = ops if parts[0] == "ldmatrix" else reversed(ops)
            values, (address, offset) = self._vector(values), self._address(place)
            rows = [*values, address] if parts[0] == "ldmatrix" else [address, *values]
            return parts[0], rows, [len(values), "trans" in parts, offset]
        if found := re.fullmatch(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32", name):
            return f"mma.{found[1]}", [row for x in ops for row in self._vector(x)], []
        if found := re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(b?f16)\.\2", name):
            in_registers = ops[1].startswith("{")
            signs, transposed = ops[4:6], [int(x) for x in ops[6:]]
            if signs != ["1", "1"]:
                raise ValueError("a product with a sign")
            rows = self._vector(ops[0]) + self._vector(ops[1], 64) + [self._operand(x, 64) for x in ops[2:4]]
            return f"wgmma.{found[2]}", rows, [int(found[1]), in_registers, *[0] * in_registers, *transposed]
        if name.startswith(("wgmma.commit_group", "wgmma.wait_group")):
            return name.removesuffix(".sync.aligned"), [], [int(x) for x in ops]
        if parts[0] in ("bar", "barrier"):
            if name != "bar.sync" or ops != ["0"]:
                raise ValueError("a barrier that is not known")
            return "bar.sync", [], []
        if parts[0] in ("bra", "ret", "trap"):
            return parts[0], [], []
        if parts[0] == "cvta":
            return "mov.b64", [self._operand(x, 64) for x in ops], []
        if parts[0] == "mov" and (ops[0] + ops[1]).count("{"):
            which = ops[0].startswith("{")
            count = len(_arguments(ops[0][1:-1] if which else ops[1][1:-1]))
            each = bits // count
            rows = self._vector(ops[0], each if which else bits) + self._vector(ops[1], bits if which else each)
            return "unpack" if which else "pack", rows, [count, each]
        return name, self._plain(name, parts[0], bits or 64, ops), []

    def _plain(self, name, operation, bits, ops):
        """Arithmetic: constants have the width of the type, amounts of a shift 32, sums of wide products twice it."""
        widths = [bits] * len(ops)
        if operation in ("shl", "shr"):
            widths[2] = 32
        if name.startswith("mad.wide"):
            widths[3] = 2 * bits
        return [self._operand(x, width) for x, width in zip(ops, widths, strict=True)]

    def _load_or_store(self, parts, bits, ops):
        vector = next((int(x[1:]) for x in parts if re.fullmatch(r"v\d", x)), 1)
        numbers = [vector, bits // 8]
        space = next(x for x in ("param", "global", "shared") if x in parts or f"{x}::cta" in parts)
        if parts[0] == "st":
            address, offset = self._address(ops[0])
            return f"st.{space}", [address, *self._vector(ops[1], bits)], [*numbers, offset]
        to = self._vector(ops[0], bits)
        if space == "param":
            name, offset = re.fullmatch(r"\[(\w+)(?:\+(\d+))?\]", ops[1]).groups()
            (row,) = to
            rows, offset = [row], self._offsets[name] + int(offset or 0)
        else:
            address, offset = self._address(ops[1])
            rows = [*to, address]
        width = max(self._widths[row] for row in to if row >= 0)
        return f"ld.{space}", rows, [*numbers, parts[-1][0] == "s", offset, (1 << width) - 1 if width < 64 else -1]

    def _copy(self, name, ops):
        if name == "cp.async.commit_group":
            return name, [], []
        if name in ("cp.async.wait_group", "cp.async.wait_all"):
            return "cp.async.wait_group", [], [int(ops[0]) if ops else 0, name.endswith("all")]
        if re.fullmatch(r"cp\.async\.c[ag]\.shared\.global", name):
            (to, to_offset), (from_, from_offset) = self._address(ops[0]), self._address(ops[1])
            rows = [to, from_, *(self._operand(x) for x in ops[3:])]
            return "cp.async", rows, [int(ops[2], 0), to_offset, from_offset]
        if re.fullmatch(TMA_LOAD, name):
            map_, coordinates = _arguments(ops[1][1:-1])
            coordinates = self._vector(coordinates)
            rows = [self._place(ops[0]), self._row(map_), *coordinates, self._place(ops[2])]
            return "tma.load", rows, [len(coordinates)]
        raise ValueError("a copy that is not known")

    def _mbarrier_or_map(self, name, parts, ops):
        if name.startswith("tensormap.cp_fenceproxy"):
            return "tensormap.publish", [self._place(x) for x in ops[:2]], []
        if name.startswith("tensormap.replace.tile"):
            field, constant = parts[3], _number(ops[-1])
            rows = [self._place(ops[0]), *([] if constant is not None else [self._row(ops[-1])])]
            index = int(ops[1], 0) if field in INDEXED else 0
            return "tensormap.replace", rows, [FIELDS.index(field), index, constant or 0]
        if parts[1] == "init":
            return "mbarrier.init", [self._place(ops[0])], [int(ops[1])]
        if parts[1] == "inval":
            return "mbarrier.inval", [self._place(ops[0])], []
        if parts[1:3] == ["arrive", "expect_tx"] and ops[0] == "_":
            return "mbarrier.expect_tx", [self._place(ops[1])], [int(ops[2])]
        if parts[1:3] == ["try_wait", "parity"]:
            return "mbarrier.try_wait", [self._row(ops[0]), self._place(ops[1]), self._operand(ops[2])], []
        raise ValueError("a use of mbarrier that is not known")

    # ---- the engine

    def _load(self):
        stream = []
        for *first, rows, numbers in self._instructions:
            stream += [*first, len(rows), *rows, len(numbers), *numbers]
        names = "\n".join(" ".join(pair) for pair in self._names)
        constants = [x for (value, _), row in self._constants.items() for x in (row, value - (value >> 63 << 64))]
        specials = [x for name, row in self._specials.items() for x in (row, SPECIALS.index(name))]
        parts = [np.array(part, dtype=np.int64) for part in (stream, constants, specials)]
        (code, length), *others = [(part, len(part)) for part in parts]
        error = ctypes.create_string_buffer(ERROR_SIZE)
        others = [x for pair in others for x in pair]
        handle = engine().ptx_load(code, length, names.encode(), len(self._widths), *others, error, ERROR_SIZE)
        if not handle:
            raise ValueError(error.value.decode())
        return handle

    def counts(self) -> list[dict]:
        """Of every instruction that was run, summed over all launches: its name, its line in the PTX, and `COUNTS`.

        warps: how often a warp ran it. Global memory: bytes asked for, and the sectors of 32 bytes that they lie in,
        for each access of a warp (what the L1 cache keeps is not known here). Shared memory: wavefronts, the passes
        that the accesses take, and the least that they would take without bank conflicts. Loads, stores, matrices and
        cp.async; what the TMA, atomics and the operands of wgmma move is not counted.
        """
        names = [name for _, name in self._names]
        pairs = zip(self._instructions, self._counts.tolist(), strict=True)
        return [
            {"name": names[instruction[0]], "line": instruction[3], **dict(zip(COUNTS, row, strict=True))}
            for instruction, row in pairs
            if row[0]
        ]

    def launch(self, grid, arguments, ranges, shared=0, *, seed=0, resident=1, races=True):
        """Run it: a grid of 3; numbers and addresses, one a parameter; ranges [(begin, end)] that it may touch.

        shared: bytes of shared memory a program. resident: programs that run at the same time; seed: of their order.
        races: look for accesses that nothing orders. Raises RuntimeError with what it did wrong, and where.
        """
        data = bytearray(self.parameter_bytes)
        for value, (kind, offset, size) in zip(arguments, self.parameters, strict=True):
            whole = int(np.float32(value).view(np.uint32)) if kind == "f32" else int(value) % (1 << 8 * size)
            data[offset : offset + size] = whole.to_bytes(size, "little")
        error = ctypes.create_string_buffer(ERROR_SIZE)
        grid, pairs = np.array(grid, dtype=np.int64), np.array(ranges, dtype=np.int64)
        failed = engine().ptx_launch(
            self._handle, grid, self.num_threads, shared, bytes(data), len(data), pairs.reshape(-1), len(ranges),
            seed, resident, races, self._counts.reshape(-1), error, ERROR_SIZE,
        )  # fmt: skip
        if failed:
            raise RuntimeError(error.value.decode())


def _extent(x):
    """(begin, end) of the bytes that a tensor spans: what lies beyond a slice is not its own."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size() * bool(x.numel())


def _merged(ranges):
    """Those that overlap as one: several arguments may be views of the same memory."""
    found = []
    for begin, end in sorted(ranges):
        if found and begin < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif begin < end:
            found.append((begin, end))
    return found


def _split(text):
    """(the head with the parameters, the body without comments and debug lines, the line on which it begins)."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"(?m)^[ \t]*\.(loc|file)\b[^\n]*", "", text)
    entry = text.index(".entry")
    first = text.index("{", text.index(")", entry))
    depth = 0
    for end in range(first, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            break
    return text[entry:first], text[first + 1 : end], text.count("\n", 0, first) + 1


def _all_lanes(mask):
    """A register is believed: which lanes are there is looked at when the instruction is run."""
    if mask != "-1" and not mask.startswith("%"):
        raise ValueError(f"a mask of lanes that is not -1: {mask}")


def _number(text):
    """The bits of a constant, None if the text is not one. Floats: 0f and 8 digits."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0) if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text) else None


def _arguments(text):
    """Split at the commas that stand outside brackets."""
    found, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    return [*found, text[start:].strip()] if text.strip() else []


def emulate(target: str) -> None:
    """From now on this process compiles every kernel for `target` and runs its PTX on the CPU, on CPU tensors.

    `kernels` calls it for LAB_PTX. target: "sm_80" or "sm_90". Raises ValueError for another one.
    """
    if target not in TARGETS:
        raise ValueError(f"LAB_PTX: got {target!r}, expected one of {', '.join(TARGETS)}")
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "_build" / "triton"))
    from labkit import codegen

    seeds = itertools.count()  # every launch has an order of its own, the same in every run

    def run(kernel, arguments, grid):
        if kernel.hash not in _read:
            _read[kernel.hash] = (kernel.src.fn.fn.__name__, Kernel(kernel.asm["ptx"]))
        if 0 not in grid:
            _launch(_read[kernel.hash][1], kernel, arguments, grid, next(seeds))

    codegen.stand_in(codegen.ALL_TARGETS[target], run)


_read = {}  # what this process has launched: hash -> (name, Kernel)


def traffic() -> dict[str, dict]:
    """{kernel: `COUNTS`}, as `Kernel.counts` has them, summed over instructions and over this process' launches."""
    totals = {}
    for name, kernel in _read.values():
        for row in kernel.counts():
            total = totals.setdefault(name, dict.fromkeys(COUNTS, 0))
            total.update({key: total[key] + row[key] for key in COUNTS})
    return totals


def _launch(code, kernel, arguments, grid, seed):
    """Hand over what Triton's own launcher would: what is not compiled in, scratch memory, and a null pointer."""
    import torch

    given = [arguments[name] for name, kind in kernel.src.signature.items() if kind != "constexpr"]
    scratch = torch.zeros(kernel.metadata.global_scratch_size * np.prod(grid) + 128, dtype=torch.uint8)
    aligned = -(-scratch.data_ptr() // 128) * 128
    values = [x.data_ptr() if torch.is_tensor(x) else x for x in given]
    values += [aligned, 0][: len(code.parameters) - len(values)]
    ranges = _merged(_extent(x) for x in [*given, scratch] if torch.is_tensor(x))
    try:
        code.launch(grid, values, ranges, kernel.metadata.shared, seed=seed, resident=RESIDENT)
    except RuntimeError as e:
        raise RuntimeError(f"{kernel.src.fn.fn.__name__}: {e}") from None
