"""The shape of the house: who may import whom, one name in four rooms, and the switch that decides how kernels run."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from planted_bugs import planted_bugs

ROOT = Path(__file__).parent.parent
KERNELS = [path for path in (ROOT / "kernels").glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
LABKIT = list((ROOT / "labkit").rglob("*.py"))


def imports(path: Path, top_level_only=False) -> set[str]:
    """Names of the modules that a file imports: "labkit.args" for `from labkit import args`."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import hides where a name comes from"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", LABKIT, ids=lambda p: p.relative_to(ROOT / "labkit").as_posix())
def test_the_reference_is_an_independent_witness(path):
    assert not {name for name in imports(path) if name.split(".")[0] == "kernels"}
    assert "triton" not in {name.split(".")[0] for name in imports(path, top_level_only=True)}  # optional there


ALLOWED = ("torch", "triton", "kernels", "labkit.args", "labkit.splits")


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_import_no_reference(path):
    standard = set(sys.stdlib_module_names)
    foreign = {
        name
        for name in imports(path)
        if name.split(".")[0] not in standard and not any(f"{name}.".startswith(f"{ok}.") for ok in ALLOWED)
    }
    assert not foreign


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_what_another_kernel_file_uses_is_not_private(path):
    assert not {name for name in imports(path) if name.startswith("kernels.") and name.rpartition(".")[2][0] == "_"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_keep_the_rules(path):
    code = path.read_text()
    for banned in ("make_block_ptr", "triton.autotune", "triton.Autotuner"):
        assert banned not in code
    if path.name != "_tile.py":
        assert ".to(tl.bfloat16)" not in code, "use _tile.cast"
        assert "tl.dot(" not in code, "use _tile.dot"
        assert f"def {path.stem}(" in code or (ROOT / f"labkit/{path.stem}.py").exists(), "no such topic in labkit"


def test_topics_stand_in_every_room():
    for chapter in (ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"):
        topic = chapter.stem[3:]
        rooms = (f"kernels/{topic}.py", f"labkit/{topic}.py", f"tests/test_{topic}.py", f"labkit/exercises/{topic}.py")
        for room in rooms:
            assert (ROOT / room).exists(), f"{chapter.name} without {room}"
        assert planted_bugs(ROOT / f"tests/test_{topic}.py"), f"tests/test_{topic}.py without PLANTED_BUGS"


def run(code: str, **env) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    return done.stdout.strip() or done.stderr


SAY = "import kernels, os; print(kernels.INTERPRETED, kernels.DEVICE, os.environ.get('TRITON_INTERPRET'))"


def test_an_explicit_choice_is_left_alone():
    assert run(SAY, TRITON_INTERPRET="0") == "False cuda 0"
    assert run(SAY, TRITON_INTERPRET="1") == "True cpu 1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: kernels are compiled by default")
def test_without_a_gpu_kernels_are_interpreted():
    assert run(SAY) == "True cpu 1"


def test_importing_kernels_never_raises():
    """`transformers` probes for a package of this name: not even a broken torch may make the import fail."""
    code = "import sys; sys.modules['torch'] = None; import kernels; print(kernels.INTERPRETED)"
    assert run(code) == "True"


def test_pins_agree_with_the_supported_ranges():
    """requirements.txt pins the tested set-up, inside what pyproject.toml allows, and installs this project last."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[-1] == "-e ."
    pins = dict(line.split(";")[0].strip().split("==") for line in lines[:-1])
    assert pins["jupyter-book"].startswith("1."), "Jupyter Book 2 ignores _config.yml"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {d.split(";")[0].split(">")[0].strip() for d in project["dependencies"]}
    assert names <= set(pins)
    assert project["name"] != "kernels", "that name is taken"


@pytest.mark.parametrize("test_file", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda path: path.stem)
def test_planted_bugs_apply(test_file):
    """The text that a planted bug changes stands in its file exactly once: a table does not rot between two runs."""
    for file, old, new in planted_bugs(test_file):
        count = (ROOT / file).read_text().count(old)
        assert count == 1, f"PLANTED_BUGS: the old text stands {count} times in {file}, expected once: {old!r}"
        assert old != new
