"""A chapter opened alone, as on Colab: the first cell brings the lab, and the rest of the notebook runs."""

import shutil
import subprocess
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from labkit import launch
from labkit.notebooks import CHAPTERS, ENV, ROOT

PLANTED_BUGS = [
    ("labkit/launch.py", 'sys.path.insert(0, os.path.abspath(".."))', "pass"),
    ("labkit/launch.py", "%cd -q lab/chapters", "%cd -q lab"),
    ("labkit/launch.py", 'assert os.path.isdir("lab/labkit")', "assert True"),
    ("labkit/launch.py", "%pip install -q -e ..", "%pip install -q -e ."),
    ("labkit/launch.py", "copy.cells.insert(0,", "copy.cells.insert(1,"),
]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder with nothing in it, and pip that resolves and builds but neither fetches nor installs."""
    monkeypatch.chdir(tmp_path)
    for name, value in {**ENV, "PIP_DRY_RUN": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "alone"
    folder.mkdir()
    return folder


def run(notebook, folder):
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not here")
def test_a_notebook_alone_brings_the_lab(alone, tmp_path):
    """The files as they are now, in a repository of their own; twice, as a reader who runs the cell again."""
    source = tmp_path / "source"
    for name in ("kernels", "labkit", "chapters"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results", "weights"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    git = ["git", "-C", source, "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    notebook = launch.notebook(CHAPTERS / "simulator.ipynb", source.as_uri())
    notebook.cells += [notebook.cells[0].copy()]
    where = nbformat.v4.new_code_cell("import labkit, os\nprint(labkit.__file__, kernels.__file__, os.getcwd())")
    notebook.cells += [where]
    run(notebook, alone)
    assert "Kernels " in printed(notebook.cells[0])
    assert "error" not in printed(notebook.cells[0]).lower(), "pip or git"
    lab = alone.resolve() / "lab"
    assert printed(where).split() == [f"{lab}/labkit/__init__.py", f"{lab}/kernels/__init__.py", f"{lab}/chapters"]
    assert printed(notebook.cells[0]).endswith(printed(notebook.cells[-2])), "the second time it only says where"


def test_a_repository_that_cannot_be_reached(alone, tmp_path):
    notebook = launch.notebook(CHAPTERS / "simulator.ipynb", (tmp_path / "nowhere").as_uri())
    with pytest.raises(CellExecutionError, match="git did not bring the lab"):
        run(notebook, alone)


@pytest.mark.parametrize("path", sorted(CHAPTERS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_only_the_first_cell_is_new(path):
    stored, copy = nbformat.read(path, as_version=4), launch.notebook(path, "https://github.com/some-one/a-lab")
    assert copy.cells[1:] == stored.cells
    assert "git clone --quiet --depth 1 https://github.com/some-one/a-lab lab" in copy.cells[0].source
    nbformat.validate(copy)


@pytest.mark.parametrize(
    "address", ["some-one/a-lab", "https://github.com/some-one", "https://gitlab.com/a/b", "https://github.com/a/b; rm"]
)
def test_an_address_that_colab_cannot_open(address, monkeypatch):
    monkeypatch.setenv("LAB_REPOSITORY", address)
    with pytest.raises(ValueError, match="LAB_REPOSITORY"):
        launch.setup(None)


def test_without_an_address_nothing_happens(monkeypatch):
    monkeypatch.delenv("LAB_REPOSITORY", raising=False)
    connected = []
    launch.setup(SimpleNamespace(connect=lambda *event: connected.append(event)))
    assert not connected
