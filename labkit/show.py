"""`show(fn)`: code in a notebook comes from its source file, never from a pasted copy. And tables as HTML."""

import inspect
import re
import textwrap
from html import escape, unescape
from pathlib import Path

from labkit.player import Html

_ROOT = Path(__file__).resolve().parent.parent


def html_table(head, body, *, style="", columns=""):
    """A table of cells that are HTML already; a line of the body begins with its heading. columns: its <colgroup>.

    A line of one cell is the heading of those below it.
    """
    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rows = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        if rest
        else f'<tr class="lab-group"><th scope="rowgroup" colspan="{len(head)}"><span>{first}</span></th></tr>'
        for first, *rest in body
    )
    style = f' style="{style}"' if style else ""
    return f"<table{style}>{columns}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def table(head, body):
    """A table of plain texts, and the same in lines for where HTML cannot be shown."""
    lines = [[str(cell) for cell in line] for line in (head, *body)]
    first, *rest = ([*map(escape, line)] for line in lines)
    return Html(html_table(first, rest), "\n".join(" | ".join(line) for line in lines))


_CARDS = """
.bd-content .cell_output .lab-use.lab-use table { white-space: normal; table-layout: fixed; width: 100%;
  font-size: .8rem; }
.lab-use :is(td, th) { vertical-align: top; text-align: left; } .lab-use .lab-label { display: none; }
.lab-use code { font-size: .95em; } .lab-use code span { white-space: nowrap; }
.lab-use .lab-group ~ tr:not(.lab-group) th { font-weight: normal; }
.lab-use tr { border-bottom: 1px solid #8885; }
.lab-use .lab-group th { padding-top: 1.2rem !important; font-size: 1.1em; }
.lab-use small { font-size: .8em; font-weight: normal; opacity: .8; }
@media (max-width: 700px) {
  .lab-use :is(table, tbody, tr, td, th) { display: block; width: auto !important; } .lab-use thead { display: none; }
  .lab-use tr:not(.lab-group) { border: 1px solid var(--pst-color-border, #888); border-radius: 6px;
    margin: .7rem 0; padding: .4rem; }
  .lab-use td:empty { display: none; } .lab-use .lab-label { display: inline; }
}
"""


def cards(head, body, widths=()):
    """A table, as of `html_table`, that turns into cards on a narrow screen: there each cell says its heading itself.

    widths: of the columns, in percent.
    """
    body = list(body)
    labels = [f'<b class="lab-label">{heading}: </b>' for heading in head[1:]]
    lines = [[first, *(cell and label + cell for label, cell in zip(labels, rest))] for first, *rest in body]
    columns = "".join(f'<col style="width: {width}%">' for width in widths)
    table = html_table(head, lines, columns=columns and f"<colgroup>{columns}</colgroup>")
    text = "\n".join(re.sub("<[^>]*>", "", unescape(" | ".join(line))) for line in body)
    return Html(f'<div class="lab-use"><style>{_CARDS}</style>{table}</div>', text)


class Source:
    """Python source that renders as highlighted code in Jupyter and in the book."""

    def __init__(self, code, where):
        self.code, self.where = code, where  # where: Markdown

    def __repr__(self):
        return f"# {self.where}\n{self.code}"

    def _repr_markdown_(self):
        fence = "`" * 3
        while fence in self.code:
            fence += "`"
        return f"From {self.where}:\n\n{fence}python\n{self.code}\n{fence}"


def show(obj, *, start=None, stop=None, docstring=True):
    """The source of a function, class or Triton kernel.

    start, stop: show only the lines from the first one that contains `start` to the last one that contains `stop`.
    docstring=False leaves the docstring out.
    Raises ValueError when start or stop is not found or their order is wrong.
    """
    python = inspect.unwrap(getattr(obj, "fn", obj))  # a jit function, compiled or interpreted, keeps its Python in .fn
    code = textwrap.dedent(inspect.getsource(python)).rstrip()
    path = Path(inspect.getsourcefile(python)).resolve()
    where = path.relative_to(_ROOT).as_posix() if path.is_relative_to(_ROOT) else path.name
    if not docstring:
        code = _without_docstring(code)
    lines = code.splitlines()
    first, last = 0, len(lines) - 1
    if start is not None:
        first = next((i for i, line in enumerate(lines) if start in line), None)
    if stop is not None:
        last = next((i for i in reversed(range(len(lines))) if stop in lines[i]), None)
    if first is None or last is None or first > last:
        raise ValueError(f"show: no lines of {python.__qualname__} from start={start!r} to stop={stop!r}")
    code = textwrap.dedent("\n".join(lines[first : last + 1]))
    return Source(code, f"`{where}`" + (f", part of `{python.__qualname__}`" if start or stop else ""))


def _without_docstring(code):
    import ast

    definition = ast.parse(code).body[0]
    first = definition.body[0]
    if ast.get_docstring(definition, clean=False) is None or len(definition.body) == 1:
        return code
    lines = code.splitlines()
    return "\n".join(lines[: first.lineno - 1] + lines[first.end_lineno :])
