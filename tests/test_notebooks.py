"""The chapters' lint, and the notebook tools on a small notebook: draft, run, lint, nbval."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from labkit import corpus, notebooks
from labkit.notebooks import CHAPTERS, ROOT

DRAFT = '''# Sample

```{note}
A fence that is not a code cell.
```

+++

## Second

```{code-cell}
from labkit import player, plot
from labkit.show import show
```

```{code-cell} hide-input
fig, ax = plot.figure()
ax.plot([1, 2], [3, 4])
plot.show(fig, name="fig-sample", caption="A *line*.", alt="A line that rises from three to four.")
```

```{code-cell}
steps = [{"text": f"step {i}", "keys": [["blue", ("", i)]]} for i in range(3)]
player.Stepper("Steps", {"keys": player.Grid(1, 2)}, steps)
```

```{code-cell} nbval-ignore-output
import time

t = time.time()
t
```

```{code-cell} nbval-check-output
print(t > 0)
```

```{code-cell} hide-cell
show(show, start="path =", stop="where =")
```

```{code-cell} skip-execution nbval-skip
player.live(print, x=[1, 2])
```
'''


@pytest.mark.parametrize("path", sorted(CHAPTERS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_chapter(path):
    assert notebooks.lint(path) == []


def test_draft_round_trip():
    assert notebooks.to_draft(notebooks.from_draft(DRAFT)) == DRAFT
    with pytest.raises(ValueError, match="not closed"):
        notebooks.from_draft("```{code-cell}\nx = 1\n")


def test_new_fills_in_the_stubs(tmp_path):
    """From the name alone, and where an old stub stands."""
    from labkit.exercises import gqa

    old = gqa.pool.cell.replace("the mean of", "")
    (tmp_path / "draft.md").write_text(f"```{{code-cell}} exercise\nexercises.pool\n```\n\n```{{code-cell}} exercise\n{old}\n```\n")
    path = tmp_path / "07_gqa.ipynb"
    notebooks.main(["new", str(tmp_path / "draft.md"), str(path)])
    assert [c.source for c in notebooks.read(path).cells] == [gqa.pool.cell] * 2
    (tmp_path / "draft.md").write_text("```{code-cell} exercise\npool\n```\n")
    with pytest.raises(ValueError, match="got 'pool', expected a line that begins with exercises"):
        notebooks.main(["new", str(tmp_path / "draft.md"), str(path)])


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The sample notebook, executed, while another labkit lies on the path."""
    folder = tmp_path_factory.mktemp("notebooks")
    other = tmp_path_factory.mktemp("other")
    (other / "labkit.py").write_text("", encoding="utf-8")
    path = folder / "sample.ipynb"
    notebooks.write(notebooks.from_draft(DRAFT), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(other))
        notebooks.run(path)
    return path


def test_run(sample):
    cells = notebooks.read(sample).cells
    assert notebooks.lint(sample) == []
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4, 5, 6, None]
    figure = code[1]
    assert figure.metadata.mystnb == {
        "figure": {"name": "fig-sample", "caption": "A *line*."},
        "image": {"alt": "A line that rises from three to four.", "classes": "lab-fits"},
    }
    assert set(figure.outputs[0].data) == {"image/png", "text/plain"}
    assert set(code[2].outputs[0].data) == {"text/html", "text/plain"}
    shown = code[5].outputs[0].data["text/markdown"]
    assert shown.startswith("From `labkit/show.py`, part of `show`:\n\n```python\npath =")
    assert shown.count("\n") == 5
    assert code[6].outputs == []
    raw = json.loads(sample.read_text(encoding="utf-8"))
    assert set(raw["metadata"]) == {"kernelspec", "language_info"}
    assert raw["metadata"]["language_info"] == {"name": "python"}


def test_running_again_changes_only_what_is_not_compared(sample, tmp_path):
    before = notebooks.read(sample)
    notebooks.run(sample)
    after = notebooks.read(sample)
    differ = [i for i, (a, b) in enumerate(zip(before.cells, after.cells, strict=True)) if a != b]
    assert [after.cells[i].metadata.tags for i in differ] == [["nbval-ignore-output"]]


def test_a_failing_cell_leaves_the_file_alone(tmp_path, capsys):
    path = tmp_path / "fails.ipynb"
    notebooks.write(notebooks.from_draft("```{code-cell}\n1 / 0\n```\n"), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError):
        notebooks.run(path)
    assert notebooks.main(["run", str(path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert path.read_bytes() == before


def cell(notebook, tag=None, number=0):
    code = [c for c in notebook.cells if c.cell_type == "code"]
    return next(c for c in code if tag in c.metadata.get("tags", [])) if tag else code[number]


def stream(name, text):
    return nbformat.v4.new_output("stream", name=name, text=text)


FAULTS = {
    "not run": (lambda nb: cell(nb).update(execution_count=None), "run number None, expected 1"),
    "out of order": (lambda nb: cell(nb, number=1).update(execution_count=9), "run number 9, expected 2"),
    "stderr": (lambda nb: cell(nb).outputs.append(stream("stderr", "x")), "stored stderr"),
    "error": (
        lambda nb: cell(nb).outputs.append(nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])),
        "a stored error, E",
    ),
    "long cell": (lambda nb: cell(nb).update(source="\n" * 20), "21 lines, at most 20"),
    "absolute path in a source": (lambda nb: cell(nb).update(source='open("/home/me/x")'), "absolute path"),
    "absolute path in an output": (lambda nb: cell(nb).outputs.append(stream("stdout", "at /tmp/x/y")), "absolute path"),
    "absolute path in prose": (lambda nb: nb.cells[0].update(source="see /root/x"), "absolute path"),
    "no verdict": (lambda nb: nb.cells.remove(cell(nb, "nbval-check-output")), "must be its verdict"),
    "half skipped": (lambda nb: cell(nb, "skip-execution").metadata.tags.remove("nbval-skip"), "go together"),
    "output of a cell not run": (lambda nb: cell(nb, "skip-execution").outputs.append(stream("stdout", "x")), "has no output"),
    "unknown tag": (lambda nb: cell(nb, "hide-input").metadata.tags.append("hide_input"), "unknown tag hide_input"),
    "bare image": (lambda nb: cell(nb, number=1).outputs[0].metadata.pop("lab_figure"), "use labkit.plot.show"),
    "two figures": (lambda nb: cell(nb, number=1).outputs.append(cell(nb, number=1).outputs[0]), "more than one figure"),
    "stale caption": (lambda nb: cell(nb, number=1).metadata.mystnb.figure.update(caption="old"), "canonical form"),
    "timestamps": (lambda nb: cell(nb).metadata.update(execution={"iopub.status.busy": "2026-01-01T00:00:00"}), "canonical form"),
    "kernel version": (lambda nb: nb.metadata.language_info.update(version="3.11.7"), "canonical form"),
    "widget": (
        lambda nb: cell(nb).outputs.append(
            nbformat.v4.new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}})
        ),
        "a stored widget",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_lint_finds(fault, sample, tmp_path):
    plant, message = FAULTS[fault]
    notebook = notebooks.read(sample)
    plant(notebook)
    path = tmp_path / "planted.ipynb"
    notebooks.write(notebook, path)
    assert message in "\n".join(notebooks.lint(path))
    assert notebooks.main(["lint", str(path)]) == 1


def test_lint_finds_other_json(sample, tmp_path):
    path = tmp_path / "planted.ipynb"
    path.write_text(json.dumps(json.loads(sample.read_text(encoding="utf-8")), indent=2), encoding="utf-8")
    assert "canonical form" in notebooks.lint(path)[0]
    assert notebooks.main(["tidy", str(path)]) == 0
    assert path.read_text(encoding="utf-8") == sample.read_text(encoding="utf-8")


def test_lint_wants_the_sections_of_a_chapter(tmp_path):
    path = tmp_path / "01_topic.ipynb"
    sections = [f"## {name}\n\n```python\n## not a heading\n```" for name in notebooks.SECTIONS]
    notebooks.write(notebooks.from_draft("\n\n".join(["# T", *sections])), path)
    assert notebooks.lint(path) == []
    notebooks.write(notebooks.from_draft("\n\n".join(["# T", *sections[:-2], sections[-1]])), path)
    assert "sections are" in notebooks.lint(path)[0]


def nbval(mode, path):
    """The numbers of the code cells in which nbval finds another output."""
    command = [sys.executable, "-m", "pytest", "-q", mode, "-p", "nbval.plugin", "-p", "no:cacheprovider", "--rootdir", "."]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the others only cost time
    out = subprocess.run([*command, path.name], capture_output=True, text=True, cwd=path.parent, env=env).stdout
    failed = [int(n) for n in re.findall(r"^FAILED .*Cell (\d+)", out, re.MULTILINE)]
    assert f"{len(failed)} failed, {6 - len(failed)} passed, 1 skipped" in out, out
    return failed


def test_nbval_notices_a_changed_output(sample):
    """Strict compares all but what is ignored, lax the verdicts. What was not changed passes, figure and player too."""
    notebook = notebooks.read(sample)
    player = cell(notebook, number=2).outputs[0].data
    player["text/html"] = player["text/html"].replace("step 1", "step 7")
    cell(notebook, "nbval-check-output").outputs[0].text = "False\n"
    path = sample.with_name("planted.ipynb")
    notebooks.write(notebook, path)
    assert nbval("--nbval", path) == [2, 4]
    assert nbval("--nbval-lax", path) == [4]


def test_what_needs_the_pinned_text_is_skipped_where_it_is_another(sample, monkeypatch, capfd):
    """A cell that compares with a record on pinned text runs where the text is there, and is left out elsewhere."""
    source = "from labkit import corpus\n\nassert not corpus.differs.__name__ == 'differs'"  # fails wherever it runs
    cells = [notebooks.nbformat.v4.new_code_cell(source, metadata={"tags": ["pinned-text"]})]
    path = sample.with_name("pinned.ipynb")
    notebooks.write(notebooks.tidy(notebooks.nbformat.v4.new_notebook(cells=cells), new_ids=True), path)
    args = ["-q", "-p", "nbval.plugin"]
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(corpus, "differs", lambda: "")
    assert notebooks.nbval([path], args) == 1
    assert "1 failed" in capfd.readouterr().out
    monkeypatch.setattr(corpus, "differs", lambda: "this Python has another heapq.py")
    assert notebooks.nbval([path], args) == 0
    out = capfd.readouterr().out
    assert "skips the cells tagged pinned-text, this Python has another heapq.py" in out
    assert "1 skipped" in out


def test_setup_differs(monkeypatch):
    import torch

    pins = notebooks.REQUIREMENTS.read_text(encoding="utf-8")
    assert all(f"\n{package}==" in pins for package in ("torch", "triton", "numpy"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert notebooks.setup_differs() == "there is a GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(notebooks, "version", lambda package: "0.0+cpu")
    monkeypatch.setattr(notebooks, "PYTHON", sys.version_info[:2])
    assert notebooks.setup_differs().startswith("torch 0.0, stored with ")
    monkeypatch.setattr(notebooks, "PYTHON", (2, 7))
    assert notebooks.setup_differs().endswith("stored with 2.7")


def test_makefile_sets_the_same_environment():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    line = re.search(r"^NOTEBOOK_ENV := (.*)$", text, re.MULTILINE)[1]
    assert dict(setting.split("=") for setting in line.split()) == notebooks.ENV
