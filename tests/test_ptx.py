"""The engine that runs compiled kernels on the CPU: single instructions, what it has to find, and the lab's kernels."""

import ast
import math
import os
import subprocess
import sys

import pytest
import torch

from labkit import ptx, what_runs
from labkit.provenance import ROOT

pytestmark = pytest.mark.skipif(not ptx.compiler(), reason="no C++ compiler here: PTX cannot be run")
HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k({parameters})
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<99>;
    ld.param.b64 %rd0, [k_param_0];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    shr.u32 %r2, %r0, 5;  // warp
    mul.wide.u32 %rd90, %r0, 4;
    add.s64 %rd1, %rd0, %rd90;  // this thread's word of the first argument
{body}
    ret;
}}
"""


def run(body, *tensors, threads=64, programs=1, shared=4096, **how):
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(len(tensors)))
    kernel = ptx.Kernel(HEAD.format(parameters=parameters, threads=threads, body=body))
    ranges = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors]
    kernel.launch((programs, 1, 1), [x.data_ptr() for x in tensors], ranges, shared, **how)
    return kernel


# ---- single instructions: d = op(a, b, c), a word a lane

INTS = torch.tensor([0, 1, 2, 3, 5, 31, 32, 33, 255, 256, -1, -2, -255, 1 << 30, -(1 << 31), (1 << 31) - 1] * 4)
OTHERS, THIRDS = INTS.roll(5), torch.arange(64) % 40


def words(x):
    """Integers of any size as int32 with the same low bits."""
    return ((x.long() + (1 << 31)) % (1 << 32) - (1 << 31)).int()


def bit_field(a, at, size):
    return (a % (1 << 32) >> at) % (1 << size) if at < 32 else 0


def signed_field(a, at, size):
    x = (a >> min(at, 31)) % (1 << size) if size else 0
    return x - (1 << size) if size and x >> (size - 1) else x


UNSIGNED = 1 << 32
INTEGER = {
    "add.s32": lambda a, b, c: a + b,
    "sub.s32": lambda a, b, c: a - b,
    "mul.lo.s32": lambda a, b, c: a * b,
    "mul.hi.s32": lambda a, b, c: a * b >> 32,
    "mul.hi.u32": lambda a, b, c: (a % UNSIGNED) * (b % UNSIGNED) >> 32,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "and.b32": lambda a, b, c: a & b,
    "or.b32": lambda a, b, c: a | b,
    "xor.b32": lambda a, b, c: a ^ b,
    "min.s32": lambda a, b, c: min(a, b),
    "max.u32": lambda a, b, c: max(a % UNSIGNED, b % UNSIGNED),
    "min.relu.s32": lambda a, b, c: max(0, min(a, b)),
    "shl.b32": lambda a, b, c: a << (b % UNSIGNED) if b % UNSIGNED < 32 else 0,
    "shr.u32": lambda a, b, c: a % UNSIGNED >> (b % UNSIGNED) if b % UNSIGNED < 32 else 0,
    "shr.s32": lambda a, b, c: a >> min(b % UNSIGNED, 31),
    "bfe.u32": lambda a, b, c: bit_field(a, b % 256, c % 256),
    "bfe.s32": lambda a, b, c: signed_field(a, b % 256, min(c % 256, 32)),
    "shf.l.wrap.b32": lambda a, b, c: ((b % UNSIGNED << 32 | a % UNSIGNED) << c % 32) >> 32,
    "popc.b32": lambda a, b, c: (a % UNSIGNED).bit_count(),
}


@pytest.mark.parametrize("name", INTEGER)
def test_integers(name):
    a, b, c = (words(x) for x in (INTS, OTHERS, THIRDS))
    count = {"popc.b32": 1, "mad.lo.s32": 3, "bfe.u32": 3, "bfe.s32": 3, "shf.l.wrap.b32": 3}.get(name, 2)
    got = apply(name, count, a, b, c)
    expected = [INTEGER[name](*x) for x in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    assert got.tolist() == words(torch.tensor([x % UNSIGNED for x in expected])).tolist()


def apply(name, count, *inputs, operands=""):
    """One instruction on words of 64 threads; operands: if they are not those words."""
    out = torch.full_like(inputs[0], 7)
    loads = "\n".join(
        f"ld.param.b64 %rd{i + 10}, [k_param_{i + 1}]; add.s64 %rd{i + 20}, %rd{i + 10}, %rd90;"
        f"ld.global.b32 {{ %r{i + 10} }}, [ %rd{i + 20} + 0 ];"
        for i in range(count)
    )
    operands = operands or ", ".join(f"%r{i + 10}" for i in range(count))
    run(f"{loads} {name} %r20, {operands}; st.global.b32 [ %rd1 + 0 ], {{ %r20 }};", out, *inputs)
    return out


@pytest.mark.parametrize("kind", ["s64", "u64"])
def test_upper_half_of_a_product(kind):
    """What a division by a constant is made of. Words times 2^29, so that both halves of the product are used."""
    a, b = words(INTS), words(OTHERS)
    widen = "; ".join(f"cvt.s64.s32 %rd{i + 30}, %r{i + 10}; shl.b64 %rd{i + 30}, %rd{i + 30}, 29" for i in range(2))
    got = apply(f"{widen}; mul.hi.{kind} %rd33, %rd30, %rd31; cvt.u32.u64", 2, a, b, operands="%rd33")
    limit = 1 << 64 if kind == "u64" else None
    factors = [[x << 29 if limit is None else (x << 29) % limit for x in pair] for pair in zip(a.tolist(), b.tolist())]
    assert got.tolist() == words(torch.tensor([(x * y >> 64) % UNSIGNED for x, y in factors])).tolist()


def test_division_and_comparison():
    a, b = words(INTS), words(OTHERS)
    b = torch.where(b == 0, 7, b)
    a = torch.where((a == -(1 << 31)) & (b == -1), 1, a)  # overflows
    assert apply("div.s32", 2, a, b).tolist() == torch.div(a, b, rounding_mode="trunc").tolist()
    assert apply("rem.s32", 2, a, b).tolist() == torch.fmod(a, b).tolist()
    least = torch.full_like(a, -(1 << 31))
    assert apply("div.s32", 2, least, torch.full_like(a, -1)).tolist() == least.tolist()
    assert apply("div.s32", 2, a, torch.zeros_like(a)).tolist() == [-1] * 64  # anything would do, but a stop
    for name, expected in {"lt.s32": a < b, "ge.u32": (a.long() % UNSIGNED) >= (b.long() % UNSIGNED)}.items():
        out = torch.zeros_like(a)
        run(
            f"ld.param.b64 %rd2, [k_param_1]; add.s64 %rd2, %rd2, %rd90; ld.global.b32 %r3, [%rd2];"
            f"ld.param.b64 %rd3, [k_param_2]; add.s64 %rd3, %rd3, %rd90; ld.global.b32 %r4, [%rd3];"
            f"setp.{name} %p1, %r3, %r4; selp.b32 %r5, -1, 3, %p1; st.global.b32 [%rd1], %r5;",
            out, a, b,
        )  # fmt: skip
        assert out.tolist() == torch.where(expected, -1, 3).tolist()


FLOATS = torch.cat([torch.randn(40, generator=torch.Generator().manual_seed(0)) * 10, torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-40, -1e-40, 3e38, -3e38, math.inf, -math.inf, math.nan, 1e-20, 7.0, 65504.0,
     65520.0, 1e-8, 3.0, -3.0, 127.0, -127.0, 88.0, -149.0])])  # fmt: skip
FLOAT = {
    "add.f32": lambda a, b, c: a + b,
    "sub.f32": lambda a, b, c: a - b,
    "mul.f32": lambda a, b, c: a * b,
    "fma.rn.f32": lambda a, b, c: (a.double() * b.double() + c.double()).float(),
    "max.f32": torch.fmax,
    "max.NaN.f32": torch.maximum,
    "min.f32": torch.fmin,
    "neg.f32": lambda a, b, c: -a,
    "abs.f32": lambda a, b, c: a.abs(),
}


@pytest.mark.parametrize("name", FLOAT)
def test_floats(name):
    a, b, c = FLOATS, FLOATS.roll(7), FLOATS.roll(3)
    count = {"fma.rn.f32": 3, "neg.f32": 1, "abs.f32": 1}.get(name, 2)
    got = apply(name, count, *(x.view(torch.int32) for x in (a, b, c))).view(torch.float32)
    expected = FLOAT[name](a, b) if name in ("max.f32", "max.NaN.f32", "min.f32") else FLOAT[name](a, b, c)
    if name == "fma.rn.f32":  # double rounds twice; where that shows, it is by one unit in the last place
        torch.testing.assert_close(got, expected, rtol=2.0**-23, atol=0.0, equal_nan=True)
    else:
        torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "function", "error"),
    [("ex2.approx.ftz.f32", torch.exp2, 2.0**-22), ("ex2.approx.f32", torch.exp2, 2.0**-22), ("rsqrt.approx.ftz.f32", torch.rsqrt, 2.0**-22),
     ("lg2.approx.ftz.f32", torch.log2, 2.0**-22), ("sqrt.approx.ftz.f32", torch.sqrt, 2.0**-22)],
)  # fmt: skip
def test_approximations_are_off_by_what_they_may(name, function, error):
    """Within the error of the PTX ISA, and not always the rounded result: a kernel must not count on that."""
    x = torch.rand(64, generator=torch.Generator().manual_seed(1)) * 3 + 0.01
    got = apply(name, 1, x.view(torch.int32)).view(torch.float32).double()
    exact, where = function(x.double()), (x > 0.5) & (x < 2)
    bound = error * 1.3 * (torch.where(where, 1.0, exact.abs()) if "lg2" in name else exact.abs())
    assert ((got - exact).abs() <= bound).all()
    assert (got != exact.float().double())[where].any()
    if "ex2" in name:
        ends = torch.tensor([0.0, -math.inf, -200.0, math.inf] * 16)
        assert apply(name, 1, ends.view(torch.int32)).view(torch.float32)[:4].tolist() == [1.0, 0.0, 0.0, math.inf]


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_halves(name, dtype):
    """Two floats to a word, rounded to nearest even, and back."""
    ties = torch.arange(64, dtype=torch.int32) * 0x00808000 + 0x38000000
    x, y = FLOATS, ties.view(torch.float32)
    packed = apply(f"cvt.rn.{name}x2.f32", 2, y.view(torch.int32), x.view(torch.int32))  # the second is the low half
    halves = packed.view(dtype).reshape(64, 2).float()
    torch.testing.assert_close(halves, torch.stack([x, y], 1).to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    out = torch.zeros(64)
    unpack = "ld.param.b64 %rd2, [k_param_1]; add.s64 %rd2, %rd2, %rd90; ld.global.b32 %r3, [%rd2];"
    unpack += f"mov.b32 {{_, %rs1}}, %r3; cvt.f32.{name} %r4, %rs1; st.global.b32 [%rd1], %r4;"
    run(unpack, out, packed)
    torch.testing.assert_close(out, halves[:, 1], rtol=0, atol=0, equal_nan=True)


def test_lanes_part_and_meet():
    """A loop whose length differs by lane, then a shuffle of all lanes."""
    out = torch.zeros(64, dtype=torch.int32)
    run(
        """
        and.b32 %r3, %r0, 7;
        mov.b32 %r4, 0;
        $loop:
        setp.ge.s32 %p1, %r4, %r3;
        @%p1 bra $done;
        add.s32 %r4, %r4, 1;
        bra.uni $loop;
        $done:
        shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1;
        st.global.b32 [%rd1], %r5;
        """,
        out,
    )
    assert out.tolist() == [(i & 7) ^ 1 for i in range(64)]


# ---- what it has to find: a body that is wrong, what it says, and what makes it right

SHARED = "mov.b32 %r9, global_smem; shl.b32 %r8, %r0, 2; add.s32 %r8, %r8, %r9;"
FROM_NEIGHBOUR = "xor.b32 %r7, %r0, 32; shl.b32 %r7, %r7, 2; add.s32 %r7, %r7, %r9; ld.shared.b32 %r6, [%r7];"
WAIT = "waitLoop: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r9], 0; @!%p1 bra waitLoop;"
# Thread 40 of the first program stores; and a program that finds itself the last of three to count itself in reads it.
STORE_OF_ONE = (
    "setp.eq.b32 %p1, %r0, 0; setp.eq.b32 %p2, %r1, 0; setp.eq.b32 %p4, %r0, 40; and.pred %p3, %p4, %p2;"
    "@%p3 st.global.b32 [%rd0], 5;"
)
COUNT_IN = (
    "ld.param.b64 %rd5, [k_param_0]; @%p1 atom.global.gpu.acq_rel.add.u32 %r5, [%rd5 + 128], 1;"
    "setp.eq.b32 %p5, %r5, 2; and.pred %p6, %p5, %p1; @%p6 ld.global.b32 %r3, [%rd0];"
)

WRONG = {
    "a word past the end": ("st.global.b32 [%rd1 + 4], %r0;", "write of 4 bytes, 4 bytes outside", "+ 4", "+ 0"),
    "a word before the start": ("ld.global.b32 %r3, [%rd1 + -4];", "read of 4 bytes, -4 bytes outside", "+ -4", "+ 0"),
    "misaligned": ("st.global.v2.b32 [%rd1], {%r0, %r0};", "misaligned write of 8 bytes", "v2.b32", "b32"),
    "no barrier, read": (
        f"{SHARED} st.shared.b32 [%r8], %r0; nop.sync; {FROM_NEIGHBOUR}", "no barrier between", "nop.sync", "bar.sync 0",
    ),
    "no barrier, write": (
        f"{SHARED} st.shared.b32 [%r9], %r2;", "warp \\d wrote, and no barrier between", "%r2;", "5;",
    ),
    "past shared memory": (f"{SHARED} st.shared.b32 [%r8 + 4096], %r0;", "shared memory of 4096", "4096", "0"),
    "one byte, two programs": ("st.global.b32 [%rd1], %r1;", "programs \\d and \\d write the same byte", "", "programs=1"),
    "read before the atomic": (
        f"{STORE_OF_ONE} ld.global.b32 %r3, [%rd0];",
        "a read of what program 0 wrote|a write of what another program has read", "ld.global.b32 %r3, [%rd0];",
        f"bar.sync 0; {COUNT_IN}",
    ),
    "no barrier before the atomic": (
        f"{STORE_OF_ONE} nop.sync; {COUNT_IN}", "a read of what warp 1 of program 0 wrote: .* no barrier between", "nop.sync;",
        "bar.sync 0;",
    ),
    "a relaxed atomic": (
        f"{STORE_OF_ONE} bar.sync 0; {COUNT_IN}".replace("acq_rel", "relaxed"),
        "a read of what program 0 wrote, and no atomic between", "relaxed", "acq_rel",
    ),
    "a shuffle of some lanes": (
        "setp.lt.u32 %p1, %r0, 7; @%p1 bra $over; shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1; $over:",
        "only the lanes ffffff80 are here", "%r0, 7", "%r0, 0",
    ),
    "a shuffle under a guard": (
        "setp.lt.u32 %p1, %r0, 7; @%p1 shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;", "only the lanes 0000007f are here",
        "%r0, 7", "%r0, 64",
    ),
    "null": ("ld.global.b32 %r3, [%rd5 + -4];", "read of 4 bytes", "%rd5 + -4", "%rd1 + 0"),
    "nobody arrives": (
        f"{SHARED} setp.eq.b32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r9], 1; bar.sync 0; nop.arrive; {WAIT}",
        "every warp waits, and nothing is under way", "nop.arrive;",
        "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 0;",
    ),
    "an assertion": ("setp.eq.b32 %p1, %r0, 40; @%p1 trap;", "an assertion of the kernel failed", "40", "64"),
}  # fmt: skip


def test_atomics_add_numbers_of_all_programs():
    x = torch.zeros(64)
    run("mov.b32 %r3, 0f3F000000; atom.global.gpu.relaxed.add.f32 %r4, [%rd0 + 8], %r3;", x, programs=3)  # 0.5
    assert x.tolist() == [0.0, 0.0, 96.0, *[0.0] * 61]


@pytest.mark.parametrize("case", WRONG)
def test_finds(case):
    body, message, wrong, right = WRONG[case]
    several = 3 if case == "one byte, two programs" or "atomic" in case else 1
    memory = torch.zeros(64, dtype=torch.int32)

    def go(body, programs):
        body = "\n".join(s for s in body.replace(";", ";\n").split("\n") if not s.strip().startswith("nop."))
        for seed in range(8):  # other orders
            memory.zero_()
            run(body, memory, programs=programs, resident=programs, seed=seed)

    with pytest.raises(RuntimeError, match=message):
        go(body, several)
    assert wrong in body
    go(body.replace(wrong, right, 1) if wrong else body, 1 if right == "programs=1" else several)


def test_copies_land_when_they_are_waited_for():
    """Bytes that nobody waited for are not there; lanes may ask for fewer than they get, the rest is 0."""
    out, source = torch.zeros(64, dtype=torch.int32), torch.arange(256, dtype=torch.int32)
    body = f"""
        {SHARED} mul.lo.s32 %r8, %r0, 16; add.s32 %r8, %r8, %r9;
        ld.param.b64 %rd2, [k_param_1]; mul.wide.u32 %rd3, %r0, 16; add.s64 %rd2, %rd2, %rd3;
        cp.async.cg.shared.global [%r8 + 0], [%rd2 + 0], 0x10, 8;
        cp.async.commit_group;
        cp.async.wait_group {{groups}};
        ld.shared.b32 %r3, [%r8 + {{at}}];
        st.global.b32 [%rd1], %r3;
    """
    run(body.format(groups=0, at=4), out, source)
    assert out.tolist() == list(range(1, 256, 4))
    run(body.format(groups=0, at=8), out, source)
    assert out.tolist() == [0] * 64
    run(body.format(groups=1, at=4), out, source)
    assert out.tolist() == [-1] * 64
    run(body.replace("cp.async.commit_group;", "").format(groups=0, at=4).replace("wait_group 0", "wait_all"), out, source)
    assert out.tolist() == list(range(1, 256, 4))
    before = "st.shared.b32 [%r8 + 4], 7;\ncp.async.cg"  # what was there is gone from the copy's beginning on
    run(body.format(groups=1, at=4).replace("cp.async.cg", before), out, source)
    assert out.tolist() == [-1] * 64


def test_two_warps_meet():
    """At an mbarrier, twenty times: nobody waits for ever, though both are often seen waiting."""
    out = torch.zeros(64, dtype=torch.int32)
    body = f"""
        {SHARED}
        setp.eq.b32 %p2, %r0, 0;
        @%p2 mbarrier.init.shared::cta.b64 [%r9], 2;
        bar.sync 0;
        and.b32 %r12, %r0, 31;
        setp.eq.b32 %p4, %r12, 0;
        mov.b32 %r13, 0;
        $turn:
        and.b32 %r14, %r13, 1;
        @%p4 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 0;
        $wait:
        mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r9], %r14;
        @!%p5 bra $wait;
        add.s32 %r13, %r13, 1;
        setp.lt.s32 %p6, %r13, 20;
        @%p6 bra $turn;
        st.global.b32 [%rd1], %r13;
    """
    for seed in range(8):
        run(body, out, seed=seed)
    assert out.tolist() == [20] * 64


@pytest.mark.parametrize(("apart", "sectors"), [(4, 4), (8, 8), (32, 32), (64, 32), (0, 1)])
def test_sectors(apart, sectors):
    """32 lanes that read 4 bytes each, so far apart. Two warps, of which the second starts a sector later."""
    body = f"mul.wide.u32 %rd5, %r0, {apart}; add.s64 %rd5, %rd0, %rd5; ld.global.b32 %r3, [%rd5 + 32];"
    (row,) = (c for c in run(body, torch.zeros(2048)).counts() if c["name"] == "ld.global.b32")
    assert (row["warps"], row["bytes"], row["sectors"], row["wavefronts"]) == (2, 256, 2 * sectors, 0)


@pytest.mark.parametrize(
    ("access", "apart", "wavefronts", "least"),
    [("b32 %r3", 4, 1, 1), ("b32 %r3", 8, 2, 1), ("b32 %r3", 64, 16, 1), ("b32 %r3", 128, 32, 1), ("b32 %r3", 0, 1, 1),
     ("b32 %r3", 132, 1, 1), ("v2.b32 {%r3, %r4}", 8, 2, 2), ("v2.b32 {%r3, %r4}", 16, 4, 2),
     ("v4.b32 {%r3, %r4, %r5, %r6}", 16, 4, 4), ("v4.b32 {%r3, %r4, %r5, %r6}", 128, 32, 4)],
)  # fmt: skip
def test_bank_conflicts(access, apart, wavefronts, least):
    body = f"mov.b32 %r9, global_smem; mul.lo.s32 %r8, %r0, {apart}; add.s32 %r8, %r8, %r9; ld.shared.{access}, [%r8];"
    (row,) = (c for c in run(body, torch.zeros(32), threads=32, shared=8192).counts() if c["name"].startswith("ld.shared"))
    assert (row["wavefronts"], row["least"]) == (wavefronts, least)


def test_what_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"not known: sin\.approx\.f32"):
        run("sin.approx.f32 %r3, %r0;", torch.zeros(64))
    with pytest.raises(ValueError, match=r"PTX, line 22: .*an atomic that is not known"):
        run("\n\n\natom.global.gpu.relaxed.max.u32 %r3, [%rd1], %r0;", torch.zeros(64))
    with pytest.raises(ValueError, match="a barrier that is not known"):
        run("bar.sync 1, 64;", torch.zeros(64))
    with pytest.raises(ValueError, match="a mask of lanes that is not -1: 7"):
        run("shfl.sync.bfly.b32 %r5, %r0, 1, 31, 7;", torch.zeros(64))
    with pytest.raises(ValueError, match="no label nowhere"):
        run("bra nowhere;", torch.zeros(64))
    with pytest.raises(ValueError, match="unknown register %q1"):
        run("mov.b32 %r3, %q1;", torch.zeros(64))
    with pytest.raises(ValueError, match=r"LAB_PTX: got 'sm_70', expected one of sm_80, sm_90"):
        ptx.emulate("sm_70")


def test_without_a_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    ptx.engine.cache_clear()
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        ptx.engine()
    ptx.engine.cache_clear()


# ---- the lab's kernels

UNSAFE = '''
import kernels, torch, triton, triton.language as tl

@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + offs, 2 * tl.load(x + offs, mask=offs < n), mask=offs < MASK)

x = torch.ones(1024)[:1000]
double[(2,)](x, 1000, BLOCK=512)
print(kernels.where(), kernels.DEVICE, x.sum().item())
'''


@pytest.mark.parametrize(("mask", "expected"), [("n", "cpu 2000.0"), ("n + 8", "RuntimeError: double: write of")])
def test_a_kernel(mask, expected):
    assert expected in what_runs.run_script(UNSAFE.replace("MASK", mask), "ptx")


def test_traffic():
    """Over all launches of the script: 1,000 words each, read and written once. A thread has four neighbours, but takes
    them one by one, since 1,000 might not be a multiple of four: every access touches a sector a lane, four in all.
    """
    script = UNSAFE.replace("MASK", "n") + "double[(2,)](x, 1000, BLOCK=512)\nfrom labkit import ptx; print(ptx.traffic())"
    found = ast.literal_eval(what_runs.run_script(script, "ptx").splitlines()[-1])
    assert list(found) == ["double"]
    assert (found["double"]["bytes"], found["double"]["sectors"]) == (2 * 2 * 4000, 4 * 2 * 2 * 125)


def test_every_benchmark_case_compiled_for_an_h200():
    """All topics; matrix unit, TMA and all. `make compiled` runs every test of the kernels so, and for an A100 too."""
    env = {**os.environ, "LAB_PTX": "sm_90"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "kernels", "record", "--dry"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Dry run: 0 failed." in done.stdout


PLANTED_BUGS = [
    ("labkit/ptx.cpp", "return a ^ (a >> 7 & swizzle) << 4;", "return a;"),
    ("labkit/ptx.cpp", "to ^= (to >> 7 & swizzle) << 4;", ""),
    ("labkit/ptx.cpp", "at[0] = VALUE(x), at[1] = VALUE(x >> 16);", "at[1] = VALUE(x), at[0] = VALUE(x >> 16);"),
    ("labkit/ptx.cpp", "return lane / 4 + 8 * (k >> 1 & 1);", "return lane / 4 + 8 * (k & 1);"),
    ("labkit/ptx.cpp", "inside &= x >= 0 && x < s64(map.size[k]);", "inside &= x >= 0;"),
    ("labkit/ptx.cpp", "        program.epoch++;\n", ""),
    ("labkit/ptx.cpp", "bool same = data && program.shared[i] == data[k];", "bool same = true;"),
    ("labkit/ptx.cpp", "if (writer && writer != me) fault(\"programs", "if (false) fault(\"programs"),
    ("labkit/ptx.cpp", "address - r.begin <= r.end - r.begin - size) return r;", "address <= r.end) return r;"),
    ("labkit/ptx.cpp", "for (; w.groups.size() > groups_left; w.groups.pop_front()) {", "for (; !w.groups.empty(); w.groups.pop_front()) {"),
    ("labkit/ptx.cpp", "(mode == UP ? from >= limit : from <= limit)", "(from >= limit)"),
    ("labkit/ptx.cpp", "if (f.lanes) merged[f.at] |= f.lanes;", "if (f.lanes) merged[f.at] = f.lanes;"),
    ("labkit/ptx.cpp", "return x != x ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;", "return x != x ? 0x7fff : b >> 16;"),
    ("labkit/ptx.cpp", "if (i.whole_warp && here && here != ALL_LANES)", "if (i.whole_warp && now.lanes != ALL_LANES)"),
    ("labkit/ptx.cpp", "memset(&w.program->shared[to - SHARED_BASE], 0xff, size);  // until it lands", ""),
    ("labkit/ptx.cpp", "        w.program->idle = 0;\n", ""),
    ("labkit/ptx.cpp", "f32(y + 0x1p-22 * noise(bits<u32>(x)))", "y"),
    ("labkit/ptx.cpp", "b.bytes += i.numbers[0], b.pending--;", "b.bytes += i.numbers[0] + 1, b.pending--;"),
    ("labkit/ptx.cpp", "for (u32 w : words) per_bank[w % 32]++;", "for (u32 w : words) per_bank[w % 16]++;"),
    ("labkit/ptx.cpp", "s <= (address[lane] + size - 1) / 32; s++", "s <= address[lane] / 32 + 1; s++"),
    ("labkit/ptx.py", "negated, text = self._row(found[2]), int(bool(found[1]))", "negated, text = self._row(found[2]), 0"),
    ("labkit/ptx.py", "*[0] * in_registers, *transposed]", "0, 0]"),
    ("labkit/ptx.py", "aligned = -(-scratch.data_ptr() // 128) * 128", "aligned = -(-scratch.data_ptr() // 128) * 128 + 64"),
    # what the interpreter never runs
    ("kernels/distillation.py", "return libdevice.fast_log2f(x)", "return x"),
]
