"""Players: small pictures that a reader steps through or explores, in Jupyter, in the static book and from file://.

A player is a fixed drawing (`Grid`, `Values`, `Bars`) whose items change look and text from frame to frame. Python
draws it once, at its most telling frame, which is what print and a browser without JavaScript show; the frames travel
as a small table of states, and player.js only swaps them. The data come from the caller, who takes them from a real
run.

    Stepper   one frame a step, with buttons, a slider and the arrow keys
    Explorer  one frame for each choice of the controls, all computed beforehand by the caller's function
    predict, reveal   the reader commits to a number; later it is laid beside the recorded one
    live      ipywidgets controls for one cell a chapter
"""

import json
import math
import re
from html import escape
from itertools import product
from numbers import Real
from pathlib import Path

COLORS = ("muted", "blue", "orange", "green", "purple", "sky", "outline", "bold", "")  # bold: framed, whatever is new
MAX_BYTES = 100_000
_QUESTIONS = {}  # key of a prediction: what was asked
_HERE = Path(__file__).parent


class Grid:
    """Rows of cells. A frame gives a nested list [rows][cols]; a cell is a colour, (colour, label), or None.

    corner: what the columns are, written before their labels; it needs row_labels.
    """

    kind = "lab-grid"

    def __init__(self, rows, cols, *, row_labels=(), col_labels=(), corner="", name=""):
        for what, labels, n in (("row_labels", row_labels, rows), ("col_labels", col_labels, cols)):
            if labels and len(labels) != n:
                raise ValueError(f"{what}: got {len(labels)} labels, expected {n}")
        self.rows, self.cols, self.corner, self.name = rows, cols, corner, name
        self.row_labels, self.col_labels = list(row_labels), list(col_labels)
        self.widths, self.prose = [0] * cols, [False] * cols

    def measure(self, frames):
        """Look at all frames: a column is as wide as its longest label, so that nothing moves from frame to frame."""
        labels = [[len(label) for _, label, _ in self.items(frame)] for frame in frames]
        self.widths = [max(n for row in labels for n in row[c :: self.cols]) for c in range(self.cols)]

    def items(self, data):
        """The frame's cells in drawing order, as (colour, label, style)."""
        if len(data) != self.rows or any(len(row) != self.cols for row in data):
            got = [len(row) for row in data]
            raise ValueError(f"grid {self.name!r}: got rows of {got} cells, expected {self.rows} rows of {self.cols}")
        return [_look(cell) for row in data for cell in row]

    def html(self, items):
        cells = iter(items)
        head = f"<colgroup>{'<col>' if self.row_labels else ''}"  # prose may grow: it begins at the left
        head += "".join("<col>" if prose else f'<col style="--n:{n}">' for n, prose in zip(self.widths, self.prose))
        head += "</colgroup>"
        if self.col_labels:
            corner = f"<th>{escape(self.corner)}</th>" if self.row_labels else ""
            side = ("", ' style="text-align:left"')
            columns = zip(self.col_labels, self.prose)
            columns = "".join(f"<th scope=col{side[prose]}>{escape(str(c))}</th>" for c, prose in columns)
            head += f"<thead><tr>{corner}{columns}</tr></thead>"
        body = ""
        for r in range(self.rows):
            body += f"<tr><th scope=row>{escape(str(self.row_labels[r]))}</th>" if self.row_labels else "<tr>"
            body += "".join(_item("td", next(cells)) for _ in range(self.cols)) + "</tr>"
        return f'<table class="{self.kind}">{head}<tbody>{body}</tbody></table>'


class Values(Grid):
    """Named values, one row each. A frame gives {name: text or number}, with `columns` {name: list of them}.

    prose: columns that hold text, which begins at the left.
    """

    kind = "lab-values"

    def __init__(self, names, columns=(), *, prose=(), corner="", name=""):
        labels = dict(row_labels=names, col_labels=columns, corner=corner)
        super().__init__(len(names), max(1, len(columns)), **labels, name=name)
        if unknown := set(prose) - set(columns):
            raise ValueError(f"prose: got {sorted(unknown)}, expected some of the columns {list(columns)}")
        self.prose = [column in prose for column in columns] or [False]

    def items(self, data):
        if list(data) != self.row_labels:
            raise ValueError(f"values {self.name!r}: got {list(data)}, expected {self.row_labels}")
        rows = [row if isinstance(row, list) else [row] for row in data.values()]
        items = super().items([[cell if isinstance(cell, tuple) else ("", cell) for cell in row] for row in rows])
        return [(*item[:2], "text-align:left" if self.prose[i % self.cols] else "") for i, item in enumerate(items)]


class Bars:
    """Bars along a common axis, in lanes: a timeline, or quantities side by side.

    A frame gives a list of (lane, start, end, colour, label), or {"bars": [...], "cursor": position}. lane counts from
    0; start and end are in `unit`. span: where the axis ends; default: the largest end of all frames. long_labels: a
    label begins where its bar does and may be longer; else it stands in the middle and is cut.
    """

    kind = "lab-bars"

    def __init__(self, lanes, *, unit="", span=None, lane_height=1.6, long_labels=False, name=""):
        self.lanes, self.unit, self.given_span, self.lane_height, self.name = list(lanes), unit, span, lane_height, name
        self.long_labels = long_labels
        self.span, self.slots, self.cursor = span, 0, False

    def measure(self, frames):
        """Look at all frames: the axis must hold every bar, and there must be an item for each."""
        self.span = self.given_span or max((bar[2] for f in frames for bar in _bars(f)[0]), default=1) or 1
        self.slots = max((len(_bars(f)[0]) for f in frames), default=0)
        self.cursor = any(_bars(f)[1] is not None for f in frames)

    def items(self, data):
        bars, cursor = _bars(data)
        items = []
        for lane, start, end, color, label in bars:
            if not 0 <= lane < len(self.lanes) or not 0 <= start <= end:
                raise ValueError(f"bar: got lane {lane} from {start} to {end}, expected a lane below {len(self.lanes)}")
            left, width = 100 * start / self.span, 100 * (end - start) / self.span
            style = f"left:{left:.4g}%;width:{width:.4g}%;top:{100 * lane / len(self.lanes):.4g}%"
            items.append((*_look((color, label))[:2], style))
        items += [("", "", "display:none")] * (self.slots - len(bars))
        if self.cursor:
            style = "display:none" if cursor is None else f"left:{100 * cursor / self.span:.4g}%;top:0;height:100%"
            items.append(("lab-cursor", "", style))
        return items

    def html(self, items):
        step, lanes = _nice(self.span), "".join(f"<div>{escape(str(lane))}</div>" for lane in self.lanes)
        size = f'style="height:{self.lane_height * len(self.lanes):.4g}em;--bar:{90 / len(self.lanes):.4g}%"'
        ticks = [i * step for i in range(int(self.span / step + 1e-9) + 1)]
        axis = "".join(f'<span style="left:{100 * t / self.span:.4g}%">{t:g}</span>' for t in ticks)
        bars = "".join(_item("div", item) for item in items)
        track = "lab-track" + " lab-long" * self.long_labels
        return (
            f'<div class="{self.kind}"><div class="lab-lanes">{lanes}</div>'
            f'<div class="{track}" {size}>{bars}</div><div class="lab-unit">{escape(self.unit)}</div>'
            f'<div class="lab-axis">{axis}</div></div>'
        )


class Html:
    """A piece of self-contained HTML with a text that stands for it where HTML cannot be shown."""

    def __init__(self, html, text):
        size = len(html.encode())
        if size > MAX_BYTES:
            raise ValueError(f"player: got {size:,} bytes, expected at most {MAX_BYTES:,} (fewer frames or items)")
        self.html, self.text = html, text

    def __repr__(self):
        return self.text

    def _repr_html_(self):
        return self.html


class Explorer(Html):
    """Controls, and one frame for each of their choices.

    controls: {label: list of values}. panels: {name: Grid, Values or Bars}. frame(*choice) -> {"text": what to see, and
    for each panel its data}; called once for each combination, in the order of the controls.
    legend: {colour: meaning}. start: the combination to begin with; key: the one for print (default: start).
    """

    def __init__(self, title, controls, panels, frame, *, legend=None, caption="", start=None, key=None):
        choices = list(product(*controls.values()))
        if not choices or not controls:
            raise ValueError(f"controls: got {controls}, expected at least one value each")
        start = choices[0] if start is None else tuple(start)
        key = start if key is None else tuple(key)
        for what, choice in (("start", start), ("key", key)):
            if choice not in choices:
                raise ValueError(f"{what}: got {choice}, expected one value of each control in {controls}")
        html = []
        for (label, values), first in zip(controls.items(), start, strict=True):
            html.append(control(label, values, values.index(first)))
        frames = [frame(*choice) for choice in choices]
        options = [[str(value) for value in values] for values in controls.values()]
        key, controls = choices.index(key), "".join(html)
        super().__init__(*_player(title, panels, frames, controls, options, key, legend, caption, choose_first=True))


class Stepper(Html):
    """One frame a step: steps is a list of {"text": what happens, and for each panel its data}.

    panels: {name: Grid, Values or Bars}. legend: {colour: meaning}. key: the step that print shows (default the last).
    """

    def __init__(self, title, panels, steps, *, legend=None, caption="", key=-1):
        last = len(steps) - 1
        if last < 1:
            raise ValueError(f"steps: got {len(steps)}, expected at least two")
        signs = {"first": "|&lt;", "back": "&lt;", "next": "&gt;", "last": "&gt;|"}
        button = '<button type=button data-go={0} aria-label="{0} step">{1}</button>'
        buttons = "".join(button.format(*item) for item in signs.items())
        buttons += "<button type=button data-go=play>Play</button>"
        options = [f"{i + 1} of {last + 1}" for i in range(last + 1)]
        slider = f"<label>Step <input type=range min=0 max={last} value=0><output>{options[0]}</output></label>"
        key = range(last + 1)[key]
        super().__init__(*_player(title, panels, steps, buttons + slider, [options], key, legend, caption))


def predict(key, question, unit=""):
    """Ask for a number before the answer is shown. The same `key` goes to `reveal`, which repeats the question."""
    _QUESTIONS[key] = question
    question_, unit_ = escape(question), escape(unit)
    body = (
        '<div class="lab-title">Predict</div><div class="lab-controls" hidden>'
        f"<label>{question_} <input type=number step=any>{unit_}</label><button type=button>Commit</button></div>"
        f'<p class="lab-text" aria-live="polite">{question_} Write down a number ({unit_}) before you read on.</p>'
    )
    data, attributes = {"predict": key, "unit": unit}, f' data-predict="{escape(key)}"'
    return Html(figure("Predict", body, data, attributes=attributes), f"Predict: {question} ({unit})")


def reveal(key, answer, unit="", *, source, how="Recorded", until=None):
    """Repeat the question, and lay the `answer` (a number, or None: not recorded) beside the reader's prediction.

    source: where the number comes from, in words (the record's own provenance line); `x` is shown as code.
    how: what was done to get it, e.g. "Counted". until: (how, number, source) of a number that answers another
    question, to show until there is an answer to this one; nobody's prediction is judged by it.
    """
    shown = answer
    if answer is None and until:
        how, shown, source = until
    found = f"{how}: {shown:.4g} {unit}." if shown is not None else "Not known yet."
    asked = f'<p class="lab-name">{escape(_QUESTIONS[key])}</p>' if key in _QUESTIONS else ""
    source_ = f"<small>{as_html(source)}</small>" if answer is not None and how == "Recorded" else as_html(source)
    body = (
        f'<div class="lab-title">Your prediction</div>{asked}<p><strong>{escape(found)}</strong> {source_}</p>'
        '<p class="lab-yours" aria-live="polite"></p>'
    )
    data = {"reveal": key, "answer": answer, "unit": unit}
    return Html(figure("Your prediction", body, data), f"{found} {source}")


def live(callback, **controls):
    """ipywidgets controls that call `callback`: a list becomes a slider over its values, the rest as in `interact`.

    Its cell is tagged skip-execution and nbval-skip; `callback` is a function that a test calls.
    """
    import ipywidgets

    def control(name, values):
        if not isinstance(values, list):
            return values
        return ipywidgets.SelectionSlider(options=values, description=name, continuous_update=False)

    return ipywidgets.interact(callback, **{name: control(name, values) for name, values in controls.items()})


def as_html(text):
    """A line of text for HTML: what stands in backticks becomes code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


# ---- drawing


def _player(title, panels, frames, controls, options, key, legend, caption, choose_first=False):
    """(html, text) of a player: drawn at frame `key`, all frames as a table of states.

    choose_first: the controls stand above the picture, not below it.
    """
    panels = dict(sorted(panels.items(), key=lambda item: isinstance(item[1], Values)))  # pictures first, then tables
    states, table, texts = {}, [], []
    for number, frame in enumerate(frames):
        if set(frame) != {"text", *panels}:
            raise ValueError(f"frame {number}: got {sorted(frame)}, expected {sorted(['text', *panels])}")
    for name, panel in panels.items():
        panel.measure([frame[name] for frame in frames])
    for frame in frames:
        items = [item for name, panel in panels.items() for item in panel.items(frame[name])]
        table.append([states.setdefault(item, len(states)) for item in items])
        texts.append(str(frame["text"]))
    drawn, values = "", ""
    for name, panel in panels.items():
        heading = f'<p class="lab-name">{escape(panel.name)}</p>' if panel.name else ""
        wide = " lab-wide" if isinstance(panel, Bars) else ""
        block = f'<div class="lab-panel{wide}">{heading}{panel.html(panel.items(frames[key][name]))}</div>'
        drawn, values = (drawn, values + block) if isinstance(panel, Values) else (drawn + block, values)
    marks = [f'<li><i class="{_color(c)}"></i>{escape(meaning)}</li>' for c, meaning in (legend or {}).items()]
    wide = "" if any(panel.kind == Grid.kind for panel in panels.values()) else " lab-wide"  # bars may be narrower
    stage = f'<div class="lab-panels lab-stage{wide}" role="img" aria-label="{escape(texts[key])}">{drawn}</div>'
    controls = f'<div class="lab-controls" hidden>{controls}</div>'
    body = (
        f'<div class="lab-title">{escape(title)}</div>'
        + (controls if choose_first else "")
        + '<div class="lab-view">'
        + (stage if drawn else "")
        + (f'<div class="lab-panels">{values}</div>' if values else "")
        + "</div>"
        + (f'<ul class="lab-legend">{"".join(marks)}</ul>' if marks else "")
        + f'<p class="lab-text" aria-live="polite">{escape(texts[key])}</p>'
        + ("" if choose_first else controls)
        + "<noscript><p>Without JavaScript this is a still picture.</p></noscript>"
        + f"<figcaption>{escape(caption)}</figcaption>"
    )
    data = {"key": key, "options": options, "states": list(states), "frames": table, "texts": texts}
    return figure(title, body, data), f"{title}: {len(frames)} frames. {texts[key]}"


def figure(title, body, data, script="player.js", *, classes="lab-player", attributes=""):
    """The HTML of a figure with its style, the data of its script as JSON, and the script (a file beside this one)."""
    css, js = ((_HERE / name).read_text(encoding="utf-8") for name in ("player.css", script))
    # `</` would end the script; JSON allows the escaped slash.
    payload = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    return (
        f'<figure class="{classes}" role="group" aria-label="{escape(title)}"{attributes}><style>{css}</style>{body}'
        f'<script type="application/json">{payload}</script><script>{js}</script></figure>'
    )


def control(label, values, index):
    """The HTML of one choice: a slider for more than three numbers, else a list."""
    if len(values) > 3 and all(isinstance(value, Real) for value in values):
        shown = escape(str(values[index]))
        field = f"<input type=range min=0 max={len(values) - 1} value={index}><output>{shown}</output>"
    else:
        chosen = ("", " selected")
        options = [f"<option value={i}{chosen[i == index]}>{escape(str(v))}</option>" for i, v in enumerate(values)]
        field = f"<select>{''.join(options)}</select>"
    return f"<label>{escape(label)} {field}</label>"


def _item(tag, item):
    look, label, style = item
    style = f' style="{style}"' if style else ""
    return f'<{tag} class="x {look}"{style}>{escape(label)}</{tag}>'


def _look(cell):
    """A cell as (colour, label, style)."""
    color, label = cell if isinstance(cell, tuple) else (cell, "")
    return _color(color or ""), f"{label:.4g}" if isinstance(label, float) else str(label), ""


def _color(color):
    if color not in COLORS:
        raise ValueError(f"colour: got {color!r}, expected one of {', '.join(filter(None, COLORS))}")
    return color


def _bars(data):
    return (data["bars"], data.get("cursor")) if isinstance(data, dict) else (data, None)


def _nice(span):
    """A tick distance of 1, 2 or 5 times a power of ten, three to seven to the span."""
    power = 10.0 ** math.floor(math.log10(span / 3))
    return max(step * power for step in (1, 2, 5) if step * power <= span / 3)
