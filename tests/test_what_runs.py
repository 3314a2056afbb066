"""What runs where: the committed table is complete, and what the page says of it follows from it."""

import copy

import pytest

from labkit import codegen, what_runs
from labkit.codegen import Case, Tensor

TABLE = what_runs.load()
FUNCTIONS = [row["function"] for row in TABLE["rows"]]


def test_every_kernel_that_is_compiled_stands_in_it_once():
    """By the name of its function: some are shown by two topics."""
    from kernels.__main__ import topics

    declared = {function.partition(":")[2] for function in what_runs.representatives(topics("codegen_cases"))}
    names = [function.partition(":")[2] for function in FUNCTIONS]
    assert sorted(names) == sorted(declared), "`make table` compiles what is missing and writes the page"
    assert tuple(TABLE["targets"]) == what_runs.TARGETS
    assert all(tuple(row["targets"]) == what_runs.TARGETS for row in TABLE["rows"])


@pytest.mark.parametrize("how", ["interpreter", "ptx"])
def test_nothing_that_ran_was_wrong(how):
    assert {row[how].partition(":")[0] for row in TABLE["rows"]} <= {"ok", ""}
    assert sum(row[how].startswith("ok") for row in TABLE["rows"]) > len(FUNCTIONS) / 2


def test_a_changed_kernel_is_named():
    table = copy.deepcopy(TABLE)
    for row in table["rows"]:
        row["source_hash"] = what_runs.source_hash(row["function"])
    assert what_runs.changed(table) == []
    table["rows"][1]["source_hash"] = "0" * 16
    table["rows"][2]["function"] = "kernels.fusion:gone"
    assert what_runs.changed(table) == [FUNCTIONS[1], "kernels.fusion:gone"]


def test_the_first_case_of_a_function_is_the_one(monkeypatch):
    cases = {"a": [Case("m:f", "one", {}), Case("m:f", "two", {})], "b": [Case("m:g", "three", {}), Case("m:f", "four", {})]}
    monkeypatch.setattr(codegen, "cases", cases.get)
    assert {function: case.name for function, case in what_runs.representatives("ab").items()} == {"m:f": "one", "m:g": "three"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ("ok", "2 KiB HMMA")),
        ({"shared": 40, "matrix": []}, ("ok", "40 B")),
        ({"matrix": ["v_mfma_f32_16x16x16_bf16"]}, ("ok", "2 KiB mfma")),
        ({"spills": 7, "problems": ["spills registers (7 spilled loads and stores)"]}, ("7 spills", "2 KiB HMMA")),
        ({"matrix": [], "problems": ["dot 1x1x1 bf16: matrix instruction none, expected HMMA"]}, ("no MMA", "2 KiB")),
        ({"problems": ["uses 8 bytes of stack"]}, ("see below", "2 KiB HMMA")),
        ({"compiles": False, "problems": ["RuntimeError: no"]}, ("does not compile", "")),
    ],
)
def test_a_cell(change, expected):
    result = {"compiles": True, "problems": [], "spills": 0, "shared": 2048, "matrix": ["HMMA.16816.F32.BF16"], **change}
    assert what_runs.cell(result) == expected
    rows = [{"function": "kernels.m:f", "case": "c", "interpreter": "ok: 0", "ptx": "", "targets": dict.fromkeys(("sm_80", "sm_90"), result)}]
    table = dict(targets=["sm_80", "sm_90"], rows=rows, date="2026-01-01", commit="abc", triton="3", torch="2")
    shown = what_runs.Table(table)
    assert [line[-1] for line in shown.lines()[2:]] == [expected]
    assert expected[0] in shown._repr_html_()
    assert expected[0] in repr(shown)
    assert "Compiled 2026-01-01 UTC, commit abc" in shown._repr_html_()
    notes = repr(shown.notes())
    assert notes == "".join(f"m: f | sm_80 A100, sm_90 H200 | {problem}" for problem in result["problems"])


def test_the_command_prints_what_it_wrote(monkeypatch, capsys):
    from kernels import __main__ as program

    monkeypatch.setattr(program, "verdicts", dict)
    monkeypatch.setattr(what_runs, "run_script", lambda *_: "{}")
    monkeypatch.setattr(what_runs, "compile_table", lambda cases, run: TABLE)
    saved = []
    monkeypatch.setattr(what_runs, "save", saved.append)
    assert program.table() == 0
    assert saved == [TABLE]
    shown = what_runs.Table(TABLE)
    assert capsys.readouterr().out == f"{shown}\n{shown.notes()}\n"


def test_functions_stand_under_their_file():
    headings = [line[0][0] for line in what_runs.Table(TABLE).lines() if len(line) == 1]
    assert headings == sorted(set(headings))
    assert set(headings) == {function.removeprefix("kernels.").partition(":")[0] for function in FUNCTIONS}


@pytest.mark.skipif(not codegen.importlib.util.find_spec("triton"), reason="Triton is not installed: nothing to compile")
def test_what_does_not_compile_is_kept_with_its_message(tmp_path):
    tensors = dict(q=Tensor((16, 128), "bfloat16"), k=Tensor((1024, 128), "bfloat16"))
    case = Case("tests.planted_kernels:raises", "raises", tensors)
    made = what_runs.compile_table({case.function: case}, {}, ("sm_80",))
    what_runs.save(made, tmp_path / "t.json")
    (row,) = what_runs.load(tmp_path / "t.json")["rows"]
    assert not row["targets"]["sm_80"]["compiles"]
    assert "planted" in row["targets"]["sm_80"]["problems"][0]
