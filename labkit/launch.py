"""Chapters that travel alone: the button that opens one on Colab, and the first cell that brings the lab along.

A Sphinx extension. It does nothing until the book is built for an address:

    make book LAB_REPOSITORY=https://github.com/<owner>/<name>

Then every notebook's page has a launch button, and `launch/` in the built book holds a copy of every notebook that
begins with `FIRST_CELL`. Colab opens notebooks from a repository, so the built book has to be pushed to the branch
`BRANCH` there; `.github/workflows/cpu.yml` does both.
"""

import os
import re
from pathlib import Path

import nbformat

from labkit import notebooks

BRANCH, FOLDER = "gh-pages", "launch"
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+")
FIRST_CELL = """\
# Only in this copy of the notebook: bring the rest of the lab, install what is missing, look for a GPU.
import os
import sys

if not os.path.isdir("../labkit"):
    !git clone --quiet --depth 1 {repository} lab
    assert os.path.isdir("lab/labkit"), "git did not bring the lab: see its message above"
    %cd -q lab/chapters
    %pip install -q -e ..
sys.path.insert(0, os.path.abspath(".."))
import kernels

print(kernels.where())"""


def notebook(path, repository: str):
    """The notebook at `path` with the first cell in front that clones `repository`, any address that git takes."""
    copy = notebooks.read(path)
    copy.cells.insert(0, nbformat.v4.new_code_cell(FIRST_CELL.format(repository=repository), id="launch"))
    return copy


def setup(app):
    """Called by Sphinx. Raises ValueError if LAB_REPOSITORY is not the address of a repository on GitHub."""
    repository = os.environ.get("LAB_REPOSITORY", "").rstrip("/")
    if repository:
        if not ADDRESS.fullmatch(repository):
            raise ValueError(f"LAB_REPOSITORY: got {repository!r}, expected https://github.com/<owner>/<name>")
        app.connect("config-inited", lambda _, config: _buttons(config, repository))
        app.connect("build-finished", lambda app, error: error or _notebooks(app, repository))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _buttons(config, repository):
    config.html_theme_options = {
        **config.html_theme_options,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
        "repository_url": repository,
        "repository_branch": BRANCH,
        "path_to_docs": FOLDER,
    }


def _notebooks(app, repository):
    for name in sorted(app.env.found_docs):
        source = app.env.doc2path(name)
        if str(source).endswith(".ipynb"):
            target = Path(app.outdir, FOLDER, f"{name}.ipynb")
            target.parent.mkdir(parents=True, exist_ok=True)
            notebooks.write(notebook(source, repository), target)
