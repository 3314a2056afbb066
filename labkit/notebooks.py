"""The notebooks' tools: write from a draft, run in a fresh kernel, lint, test. `python -m labkit.notebooks` lists them.

A draft is Markdown. A fence ```{code-cell} opens a code cell, tags follow on the same line; `+++` alone on a line
starts a new Markdown cell. `new` turns a draft into a notebook, `draft` turns a notebook back into a draft. Of a cell
tagged `exercise` a draft needs only `exercises.<name>`: `new` puts the stub there.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from labkit.provenance import ROOT, with_root

CHAPTERS, REQUIREMENTS = ROOT / "chapters", ROOT / "requirements.txt"
PYTHON = (3, 11)  # of the stored outputs
# One thread and one instruction set, so that the stored outputs are the same on every x86 machine. torch.compile would
# keep what it made for that set and hand it to a process that has another one, whose memory it then spoils: no cache.
ENV = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
}
SECTIONS = (
    "Overview",
    "The bottleneck",
    "Predict",
    "The idea",
    "Reference",
    "The kernel",
    "Correctness",
    "What the compiler made of it",
    "Measurement",
    "Play",
    "Where it loses",
    "Exercises",
    "What production systems add",
    "References",
)
TAGS = {
    "nbval-check-output", "nbval-ignore-output", "nbval-skip", "skip-execution", "raises-exception",
    "hide-input", "hide-output", "hide-cell", "remove-input", "remove-cell", "exercise", "pinned-text",
}
MAX_LINES = 20
NB_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_TOP = "home|root|tmp|usr|opt|var|mnt|work|workspace|Users|private"
_ABSOLUTE = re.compile(rf"(?<![\w.~/:<-])/(?:{_TOP})/|\b[A-Z]:\\\\?Users")


# ---- drafts


def from_draft(text):
    """Notebook without outputs from a draft (str)."""
    cells, lines, kind, tags = [], [], "markdown", []

    def close():
        source = "\n".join(lines).strip("\n")
        if source:
            make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
            cells.append(make(source, metadata={"tags": list(tags)} if tags else {}))
        lines.clear()

    for line in text.splitlines():
        if kind == "markdown" and line.startswith("```{code-cell}"):
            close()
            kind, tags = "code", line.removeprefix("```{code-cell}").replace(",", " ").split()
        elif kind == "code" and line.rstrip() == "```":
            close()
            kind, tags = "markdown", []
        elif kind == "markdown" and line.rstrip() == "+++":
            close()
        else:
            lines.append(line)
    if kind == "code":
        raise ValueError(f"draft: the last code cell is not closed, {lines[:1]}")
    close()
    return tidy(nbformat.v4.new_notebook(cells=cells), new_ids=True)


def to_draft(notebook):
    """The draft (str) of a notebook: its sources and tags, without outputs."""
    parts, previous = [], None
    for cell in notebook.cells:
        if cell.cell_type == "code":
            tags = cell.metadata.get("tags", [])
            parts.append(" ".join(["```{code-cell}", *tags]) + f"\n{cell.source}\n```")
        else:
            parts.append(("+++\n\n" if previous == "markdown" else "") + cell.source)
        previous = cell.cell_type
    return "\n\n".join(parts) + "\n"


def with_stubs(notebook, topic):
    """The notebook, its cells tagged `exercise` as labkit/exercises/<topic>.py has them. Changes it and returns it."""
    for cell in notebook.cells:
        if "exercise" in cell.metadata.get("tags", []):
            name = re.search(r"^exercises\.(\w+)", cell.source, re.MULTILINE)
            if not name:
                raise ValueError(f"exercise: got {cell.source!r}, expected a line that begins with exercises.<name>")
            cell.source = getattr(importlib.import_module(f"labkit.exercises.{topic}"), name[1]).cell
    return tidy(notebook, new_ids=True)


# ---- canonical form


def tidy(notebook, *, new_ids=False):
    """The notebook in canonical form. Changes `notebook` and returns it.

    No timestamps, versions or viewer state; stable cell ids; captions where the book looks for them.
    """
    notebook.metadata = nbformat.from_dict(NB_METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    used = set()
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in ("tags", "mystnb") and v})
        if new_ids or "id" not in cell or cell.id in used:
            stem = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
            cell.id = next(i for n in range(len(notebook.cells)) if (i := f"{stem}-{n}" if n else stem) not in used)
        used.add(cell.id)
        if cell.cell_type == "code":
            cell.metadata.pop("mystnb", None)
            if handle := _handle(cell):
                show, hide = f"Show {handle}", f"Hide {handle.replace('a ', 'the ')}"
                cell.metadata["mystnb"] = nbformat.from_dict({"code_prompt_show": show, "code_prompt_hide": hide})
            for output in cell.outputs:
                # labkit.plot.show puts caption and alt text into the output; the book reads them from the cell.
                if figure := output.get("metadata", {}).get("lab_figure"):
                    cell.metadata["mystnb"] = nbformat.from_dict(figure)
    return notebook


def _handle(cell):
    """What is folded in a cell, for the words on the fold's handle; "" where _config.yml's do."""
    tags = cell.metadata.get("tags", [])
    if cell.source.endswith(".solution"):
        return "a solution"
    if "hide-output" in tags:
        return "the table"
    return "the imports" if "hide-input" in tags and cell.source.startswith("import kernels") else ""


def dumps(notebook):
    """Canonical JSON (str): indent 1, sorted keys, no escapes, one newline at the end."""
    return json.dumps(nbformat.from_dict(_split(notebook)), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _split(notebook):
    """On disk a text is a list of lines, as Jupyter writes it."""
    return json.loads(nbformat.writes(notebook, version=4))


def read(path):
    """The notebook at `path`."""
    return nbformat.read(path, as_version=4)


def write(notebook, path):
    """Store the notebook at `path`, valid and as canonical JSON."""
    nbformat.validate(notebook)
    Path(path).write_text(dumps(notebook), encoding="utf-8")


# ---- run


def environment():
    """Of a process that runs a notebook: the fixed settings, and the labkit that lies beside it."""
    return {**os.environ, **ENV, "PYTHONPATH": with_root()}


def run(path, *, timeout=300):
    """Execute the notebook at `path` top to bottom in a fresh kernel and store its outputs. Returns the seconds.

    Cells tagged `skip-execution` are not run and keep no outputs. The file is written only if no cell failed.
    Raises nbclient.exceptions.CellExecutionError when a cell fails.
    """
    notebook = tidy(read(path))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(Path(path).resolve().parent)}},
        record_timing=False,
        coalesce_streams=True,
        skip_cells_with_tag="skip-execution",
    )
    start = time.perf_counter()
    client.execute(env=environment())
    seconds = time.perf_counter() - start
    write(tidy(notebook), path)
    return seconds


# ---- how long it takes to read

WORDS_A_MINUTE, LINES_A_MINUTE = 150, 10  # a slow reader, of technical text and of code


def minutes(path):
    """How long it takes to read a notebook with its outputs, without folded code, pictures and exercises done."""
    words = lines = 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += _words(source)
        elif not any(tag.startswith(("hide", "remove")) for tag in cell["metadata"].get("tags", [])):
            lines += source.count("\n") + 1
        for output in cell.get("outputs", []):
            data = {kind: "".join(text) for kind, text in output.get("data", {}).items() if kind.startswith("text/")}
            if "text/markdown" in data:  # code that is shown from its source
                lines += data["text/markdown"].count("\n")
            elif "image/png" not in output.get("data", {}):
                page = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", data.get("text/html", ""), flags=re.DOTALL)
                words += _words(page or "".join(output.get("text", "")) or data.get("text/plain", ""))
    return words / WORDS_A_MINUTE + lines / LINES_A_MINUTE


def _words(text):
    return len(re.findall(r"[A-Za-z][\w'-]*", text))


# ---- lint


def lint(path):
    """What is wrong with the notebook at `path`: a list of sentences, empty when all is well."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    found = []
    if text != dumps(tidy(nbformat.reads(text, as_version=4))):
        found.append("not in canonical form: run `python -m labkit.notebooks tidy`")
    expected = 0
    code = [(number, cell) for number, cell in enumerate(notebook.cells, 1) if cell.cell_type == "code"]
    for position, (number, cell) in enumerate(code):
        tags = set(cell.metadata.get("tags", []))
        skipped = "skip-execution" in tags
        problems = []
        if unknown := tags - TAGS:
            problems.append(f"unknown tag {', '.join(sorted(unknown))}")
        if skipped != ("nbval-skip" in tags):
            problems.append("skip-execution and nbval-skip go together")
        if cell.source.count("\n") >= MAX_LINES:
            problems.append(f"{cell.source.count(chr(10)) + 1} lines, at most {MAX_LINES}")
        if skipped:
            if cell.outputs or cell.execution_count is not None:
                problems.append("a cell that is not run has no output")
        else:
            expected += 1
            if cell.execution_count != expected:
                problems.append(f"run number {cell.execution_count}, expected {expected}: not run in order")
            problems += _lint_outputs(cell, tags)
        if "nbval-ignore-output" in tags:
            after = code[position + 1][1].metadata.get("tags", []) if position + 1 < len(code) else []
            if "nbval-check-output" not in after:
                problems.append("nbval-ignore-output: the next code cell must be its verdict (nbval-check-output)")
        found += [f"cell {number}: {problem}" for problem in problems]
    for number, cell in enumerate(notebook.cells, 1):
        stored = json.dumps([o.get("data", {}).get(m) for o in cell.get("outputs", []) for m in o.get("data", {})
                             if m.startswith("text/")] + [o.get("text") for o in cell.get("outputs", [])])
        if match := _ABSOLUTE.search(cell.source + "\n" + stored):
            found.append(f"cell {number}: absolute path {match.group().strip()}...")
    if re.match(r"\d\d_", path.name):
        headings = [line[3:].strip() for cell in notebook.cells if cell.cell_type == "markdown"
                    for line in _prose(cell.source) if line.startswith("## ")]
        if headings != list(SECTIONS):
            found.append(f"sections are {headings}, expected {list(SECTIONS)}")
    return found


def _prose(source):
    """Lines of a Markdown cell outside of fences."""
    inside = False
    for line in source.splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            yield line


def _lint_outputs(cell, tags):
    problems = []
    for output in cell.outputs:
        if output.output_type == "error" and "raises-exception" not in tags:
            problems.append(f"a stored error, {output.ename}")
        if output.output_type == "stream" and output.name == "stderr":
            problems.append("stored stderr")
        data = output.get("data", {})
        if any(mime.startswith("image/") for mime in data) and "lab_figure" not in output.metadata:
            problems.append("an image without caption and alt text: use labkit.plot.show")
        if "application/vnd.jupyter.widget-view+json" in data:
            problems.append("a stored widget: tag the cell skip-execution and nbval-skip")
    if sum("lab_figure" in output.get("metadata", {}) for output in cell.outputs) > 1:
        problems.append("more than one figure: one cell, one caption")
    return problems


# ---- nbval


def setup_differs():
    """Why this set-up is not the one whose outputs are stored: a sentence, or "" where it is the same."""
    import torch

    if torch.cuda.is_available():
        return "there is a GPU"
    if sys.version_info[:2] != PYTHON:
        return f"Python {sys.version_info[0]}.{sys.version_info[1]}, stored with {PYTHON[0]}.{PYTHON[1]}"
    pins = dict(re.findall(r"^(torch|triton|numpy)==([\w.]+)", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE))
    for package, pin in pins.items():
        try:
            installed = version(package).split("+")[0]
        except PackageNotFoundError:
            installed = "missing"
        if installed != pin:
            return f"{package} {installed}, stored with {pin}"
    return ""


def without_pinned_text(path, folder):
    """A copy of the notebook in `folder` whose cells tagged `pinned-text` are skipped.

    They measure again what was recorded on files of Python's library, and this Python has another version of one.
    """
    notebook = read(path)
    for cell in notebook.cells:
        if "pinned-text" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("nbval-skip")
    copy = Path(folder, Path(path).name)
    write(notebook, copy)
    return copy


def nbval(paths, pytest_args):
    """Run nbval on the notebooks: strict where the outputs were stored, elsewhere lax. Returns pytest's exit code."""
    from labkit import corpus

    reason, other_text = setup_differs(), corpus.differs()
    mode = "--nbval-lax" if reason else "--nbval"
    print(f"nbval: verdict cells only, {reason}" if reason else "nbval: every output is compared", flush=True)
    command = [sys.executable, "-m", "pytest", mode, "--nbval-cell-timeout=120", "-p", "no:cacheprovider", *pytest_args]
    with tempfile.TemporaryDirectory() as folder:
        if other_text:
            print(f"nbval: skips the cells tagged pinned-text, {other_text}", flush=True)
            paths = [without_pinned_text(path, folder) for path in paths]
        code = subprocess.run([*command, *map(str, paths)], env=environment()).returncode
    if code:
        print("Where the new output is the right one: python -m labkit.notebooks run <notebook>", flush=True)
    return code


# ---- command line


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m labkit.notebooks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("run", "execute and store the outputs"), ("lint", "check"), ("tidy", "canonical form only")):
        command = commands.add_parser(name, help=text)
        command.add_argument("files", nargs="*", type=Path, help="notebooks; default: all chapters")
    command = commands.add_parser("test", help="nbval: strict on the pinned set-up without a GPU, elsewhere lax")
    command.add_argument("-n", dest="jobs", default="0", help="processes, one notebook each")
    command.add_argument("files", nargs="*", type=Path, help="notebooks; default: all chapters")
    for name, text in (("new", "draft -> notebook without outputs"), ("draft", "notebook -> draft")):
        command = commands.add_parser(name, help=text)
        command.add_argument("source", type=Path)
        command.add_argument("target", type=Path)
    args = parser.parse_args(argv)
    if args.command == "new":
        notebook = from_draft(args.source.read_text(encoding="utf-8"))
        write(with_stubs(notebook, args.target.stem.lstrip("0123456789_")), args.target)
    elif args.command == "draft":
        args.target.write_text(to_draft(read(args.source)), encoding="utf-8")
    failed = 0
    paths = (args.files or sorted(CHAPTERS.glob("*.ipynb"))) if "files" in args else []
    if args.command == "test":
        return nbval(paths, ["-q", "-n", args.jobs, "--dist", "loadscope"]) if paths else 0
    for path in paths:
        if args.command == "tidy":
            write(tidy(read(path)), path)
        if args.command == "run":
            try:
                seconds = run(path)
                print(f"{path.name}: {seconds:.0f} s, about {minutes(path):.0f} minutes to read", flush=True)
            except CellExecutionError as error:
                print(f"{path.name}: {error}")
                failed = 1
                continue
        for problem in lint(path) if args.command in ("run", "lint") else ():
            print(f"{path.name}: {problem}")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
