"""The codegen gate: every topic's kernels, compiled for four GPUs; and the gate itself, against planted faults.

All topics are compiled together, one process a target, and cached under _build/codegen.
"""

import dataclasses
import pkgutil

import pytest

import labkit
from labkit import codegen
from labkit.codegen import Case, Tensor


def declared():
    """{topic: cases} of every labkit file that declares some."""
    names = [m.name for m in pkgutil.iter_modules(labkit.__path__) if m.name != "codegen"]
    texts = {name: (codegen.ROOT / "labkit" / f"{name}.py") for name in names}
    found = [n for n, file in texts.items() if file.is_file() and "\ndef codegen_cases(" in file.read_text("utf-8")]
    return {name: codegen.cases(name) for name in found}


TOPICS = declared()
PLANTED = {
    "sound": {},
    "sound, a warp group": {},
    "spills": {"sm_80": "spills registers"},
    "too_much_shared_memory": {"gfx942": "bytes of shared memory, the limit is 65,536"},
    "scalar_loads": {"sm_80": "128-bit loads", "gfx942": "128-bit loads"},
    "no_dot": {"sm_80": "no dot", "gfx942": "no dot"},
    "tf32": {"sm_80": "TF32", "gfx942": "TF32"},
    "tf32, a warp group": {"sm_100": "TF32"},
    "no_wgmma": {"sm_90": "expected HGMMA"},
    "serialised": {"sm_90": "waits for every wgmma"},
    "launches_nothing": {"sm_80": "launched no kernel"},
    "raises": {"sm_80": "ValueError: q: planted"},
}


def planted_case(name):
    function = name.split(",")[0]
    small = function in ("sound", "scalar_loads", "no_dot", "tf32") and "a warp group" not in name
    rows = 16 if small else 64
    tensors = dict(q=Tensor((rows, 128), "bfloat16"), k=Tensor((1024, 128), "bfloat16"))
    if function == "tf32":
        tensors = {key: dataclasses.replace(tensor, dtype="float32") for key, tensor in tensors.items()}
    return Case(f"tests.planted_kernels:{function}", name, tensors, matrix=("_scores_kernel",))


@pytest.fixture(scope="module")
def compiled_once():
    """Compile everything this file looks at, in one process a target."""
    some = [case for cases in TOPICS.values() for case in cases]
    some += [planted_case(name) for name in PLANTED]
    codegen.compiled(some, codegen.TARGETS)


@pytest.mark.parametrize("target", codegen.TARGETS)
@pytest.mark.parametrize("topic", TOPICS)
def test_gate(topic, target, compiled_once):
    report = codegen.report(topic, (target,))
    assert len(report.rows) >= len(TOPICS[topic])
    failed = [f"{row['case']}: {row['kernel']}: {'; '.join(row['problems'])}" for row in report.rows if row["problems"]]
    assert not failed, "\n" + "\n".join(failed)


def test_corners_are_covered():
    """Every pair of head_dim, group and dtype is compiled for decoding."""
    seen = set()
    for case in codegen.cases("flash_decoding"):
        q, k = case.arguments["q"], case.arguments["k"]
        seen.add((q.shape[-1], q.shape[1] // k.shape[2], q.dtype))
    for values in [
        ((64, 128, 256), (1, 8, 64), None),
        ((64, 128, 256), None, ("float16", "bfloat16", "float32")),
        (None, (1, 8, 64), ("float16", "bfloat16", "float32")),
    ]:
        i, j = (n for n in range(3) if values[n])
        missing = {(a, b) for a in values[i] for b in values[j]} - {(corner[i], corner[j]) for corner in seen}
        assert not missing


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_found(name, compiled_once):
    case = planted_case(name)
    rows = codegen.report([case], tuple(PLANTED[name]) or codegen.TARGETS).rows
    assert len(rows) == len(PLANTED[name] or codegen.TARGETS)
    for row in rows:
        expected = PLANTED[name].get(row["target"])
        assert expected in "; ".join(row["problems"]) if expected else row["problems"] == []


def test_facts(compiled_once):
    """Facts that follow from the source alone: dots, constexprs, options, and the shape of the instruction."""
    case = planted_case("sound, a warp group")
    rows = {row["target"]: row for row in codegen.report([case]).rows}
    for row in rows.values():
        assert row["kernel"] == "_scores_kernel"
        assert row["constexprs"] == {"M": 64, "N": 32, "D": 128, "FAULT": ""}
        assert (row["num_warps"], row["num_stages"]) == (4, 2)
        assert row["dots"] == [[64, 32, 128, "bf16"], [64, 128, 32, "bf16"]]
        assert row["wide_share"] == 1.0
        assert 0 < row["registers"] <= 512
        assert row["programs_per_sm"] >= 1
    assert set(rows["sm_90"]["matrix"]) == {"HGMMA.64x32x16.F32.BF16", "HGMMA.64x128x16.F32.BF16"}
    assert set(rows["sm_80"]["matrix"]) == {"HMMA.16816.F32.BF16"}
    assert set(rows["sm_100"]["matrix"]) == {"UTCHMMA.64x128.64x32"}
    assert all(name.endswith("_bf16") for name in rows["gfx942"]["matrix"])


SASS = """
.text.k:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   MOV R1, R2 ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64] ;
                                                                /* 0x000000 */
        /*0030*/                   LDG.E.U16 R3, desc[UR4][R2.64] ;
        /*0040*/                   MUFU.EX2 R4, R4 ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   LDG.E R3, desc[UR4][R2.64] ;
        /*0070*/               @P1 BRA `(.L_x_3) ;
        /*0080*/               @P0 BRA `(.L_x_2) ;
.L_x_4:
        /*0090*/                   UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*00a0*/               @P0 BRA `(.L_x_4) ;
        /*00b0*/               @P2 BRA `(.L_x_0) ;
.L_x_3:
        /*00c0*/                   EXIT ;
"""


def test_loops():
    """Innermost loops only, backward jumps only; what the TMA fetches is nobody's load."""
    assert codegen._loops(SASS) == [[4, 18, 1], [3, 4, 0], [2, 0, 0]]
    row = {"loops": [[36, 18, 9], [30, 10, 0], [3, 4, 1], [2, 0, 0]]}
    assert codegen.per_byte(row) == [2.0, 3.0]
    assert codegen.per_byte(row, special=True) == [0.5, 0.0]
    assert codegen.per_byte({"loops": [[2, 0, 0]]}) == []


def test_loops_of_a_kernel(compiled_once):
    """By hand: a tile of 32 keys of 256 bytes, by 128 threads, is 64 bytes a thread."""
    rows = {row["target"]: row for row in codegen.report([planted_case("sound, a warp group")]).rows}
    for target in ("sm_80", "sm_90", "sm_100"):
        ((count, size, special),) = rows[target]["loops"]
        assert size == 64
        assert count > 64 // 16
        assert special == 0
    assert rows["gfx942"]["loops"] == []
    assert not codegen.serialised(rows["sm_90"])


def test_dtype_of_a_case_reaches_the_kernel(compiled_once):
    """The kernels are compiled for what the case says, not for a signature written beside it."""
    rows = codegen.report([planted_case("tf32")], ("sm_80",)).rows
    assert {dot[3] for row in rows for dot in row["dots"]} == {"f32"}


def test_occupancy_estimate():
    """By hand: 65,536 registers and 233,472 bytes an SM; each program takes 1,024 bytes besides its own."""
    target = codegen.ALL_TARGETS["sm_90"]
    row = {"registers": 128, "num_warps": 4, "shared": 71_680}
    # registers: 65,536 / (128 * 128) = 4; shared memory: 233,472 / 72,704 = 3
    assert codegen._programs_per_sm(target, row) == 3
    assert codegen._programs_per_sm(target, {**row, "shared": 1024}) == 4
    assert codegen._programs_per_sm(target, {**row, "registers": 32, "shared": 0}) == 16
    assert codegen._programs_per_sm(target, {"registers": 16, "num_warps": 1, "shared": 0}) == 32
    amd = codegen.ALL_TARGETS["gfx942"]
    # vector registers: 512 / 128 = 4 waves on each of four SIMDs; shared memory: 65,536 / 20,480 = 3
    assert codegen._programs_per_sm(amd, {"registers": 128, "num_warps": 4, "shared": 0}) == 4
    assert codegen._programs_per_sm(amd, {"registers": 128, "num_warps": 4, "shared": 20_480}) == 3


def test_compiled_once_and_again_after_an_edit(tmp_path, monkeypatch):
    """A cached case starts no process; another argument, target, version or source is another file."""
    case, file = planted_case("sound"), codegen._cache_file(planted_case("sound"), "sm_80", "source")
    assert codegen._cache_file(dataclasses.replace(case, name="other", matrix=()), "sm_80", "source") == file
    other = dataclasses.replace(case, arguments={**case.arguments, "k": Tensor((512, 128), "bfloat16")})
    keys = {file, codegen._cache_file(case, "sm_90", "source"), codegen._cache_file(case, "sm_80", "edited")}
    keys.add(codegen._cache_file(other, "sm_80", "source"))
    with monkeypatch.context() as m:
        m.setattr(codegen.importlib.metadata, "version", lambda package: "0.1")
        keys.add(codegen._cache_file(case, "sm_80", "source"))
    assert len(keys) == 5

    started = []
    monkeypatch.setattr(codegen, "CACHE", tmp_path)
    monkeypatch.setattr(codegen, "source_hash", lambda *roots: "source")
    codegen._cache_file(case, "sm_80", "source").write_text('[{"kernel": "from the cache"}]')
    monkeypatch.setattr(codegen.subprocess, "run", lambda *a, **k: started.append(a) or dead())
    assert codegen.compiled([case], ("sm_80",))[0]["kernel"] == "from the cache"
    assert not started
    monkeypatch.setattr(codegen, "source_hash", lambda *roots: "edited")
    assert "error" in codegen.compiled([case], ("sm_80",))[0]
    assert started


def dead():
    return codegen.subprocess.CompletedProcess([], -11, "", "first line\nlast words")


def test_a_process_that_dies_is_an_error_of_its_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(codegen, "CACHE", tmp_path)
    monkeypatch.setattr(codegen.subprocess, "run", lambda *a, **k: dead())
    (row,) = codegen.report([planted_case("sound")], ("sm_80",)).rows
    assert row["problems"] == ["the compiling process ended with code -11: last words"]
    assert not list(tmp_path.iterdir())


def test_shown(compiled_once, capsys):
    good, bad = planted_case("sound"), planted_case("launches_nothing")
    report = codegen.report([good, bad], ("sm_80",))
    text, page = repr(report), report._repr_html_()
    for part in ("sound", "sm_80 (A100)", "HMMA.16816", "passes", "launched no kernel"):
        assert part in text
        assert part in page
    assert "F32" not in text
    assert page.count("<tr>") == 1 + 2 + 2, "the head, and for each case its name and a line"
    assert page.startswith("<p>launches_nothing, sm_80, ")
    assert page.count('class="lab-fails"') == 1
    assert codegen.report([good], ("sm_80",))._repr_html_().startswith("<p>1 case x 1 target pass: no spills")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("HMMA.16816.F32.BF16", "HMMA.16816"),
        ("HGMMA.64x16x16.F32.BF16.gdesc0", "HGMMA.64x16x16"),
        ("UTCHMMA.gdesc.128x64", "UTCHMMA.128x64"),
        ("v_mfma_f32_16x16x16_bf16", "v_mfma_f32_16x16x16_bf16"),
    ],
)
def test_unit(name, shown):
    assert codegen._unit(name) == shown


@pytest.mark.parametrize(("size", "shown"), [(71_680, "70"), (101_376, "99"), (16, "0.02"), (0, "0"), (232_448, "227")])
def test_kib(size, shown):
    assert codegen.kib(size) == shown


def test_verdicts(compiled_once, monkeypatch, capsys):
    monkeypatch.setattr(codegen, "cases", lambda topic: [planted_case("sound")])
    codegen.verdicts("sound", ("sm_80", "gfx942"))
    line = capsys.readouterr().out
    assert line.startswith("sound: 1 case x 2 targets pass: no spills")
    monkeypatch.setattr(codegen, "cases", lambda topic: [planted_case("sound"), planted_case("scalar_loads")])
    codegen.verdicts("mixed", ("sm_80",))
    line = capsys.readouterr().out
    assert line.startswith("mixed: scalar_loads, sm_80, _scores_kernel: only ")


def test_without_triton(monkeypatch, capsys):
    monkeypatch.setattr(codegen.importlib.util, "find_spec", lambda name: None)
    codegen.verdicts("flash_decoding")
    assert capsys.readouterr().out == "Triton is not installed here (it needs Linux), so nothing was compiled.\n"
    assert "not installed" in codegen.report("flash_decoding")._repr_html_()


def test_same_name_twice():
    with pytest.raises(ValueError, match="same name"):
        codegen.report([planted_case("sound")] * 2)
