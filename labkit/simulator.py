"""The player of `labkit.step_model`: model, GPU, context, batch and five techniques, in any browser, without Python.

There are too many choices for a table of frames. So the page carries the formulas themselves, and simulator.js
evaluates them; a test compares what it draws with what Python draws.
"""

from html import escape

from labkit import player, step_model
from labkit.step_model import BATCHES, CHOICES, CONTEXTS, DEVICES, FORMULAS, SWITCHES

CONTROLS = {"model": CHOICES, "GPU": list(DEVICES), "context": list(CONTEXTS), "batch": list(BATCHES)} | {
    label: [off, on] for label, off, on in SWITCHES.values()
}
START = ("Llama-3-8B", "H200", 8192, 64, *(SWITCHES[name][2] for name in ("gqa", "paged")), "all tokens", "continuous",
         "dense")  # fmt: skip
TECHNIQUES = {  # name of a switch: (technique, chapter)
    "gqa": ("grouped-query attention", 7), "paged": ("paged cache", 8), "streaming": ("attention sinks", 6),
    "continuous": ("continuous batching", 9), "pruned": ("2:4 weights", 4),
}  # fmt: skip
FULL = 90  # % of the memory that weights and cache may take
COLUMNS = ["all off", "as chosen"]
ROWS = [  # label, name of a formula, times, decimals, unit
    ("KV heads", "kv_heads", 1, 0, ""), ("K and V of a token", "kv_token", 1e-3, 0, "kB"),
    ("tokens kept", "kept", 1, 0, ""), ("tokens reserved", "reserved", 1, 0, ""),
    ("weights", "weights", 1e-9, 1, "GB"), ("cache in use", "used", 1e-9, 1, "GB"),
    ("cache empty", "empty", 1e-9, 1, "GB"), ("sequences that fit", "largest", 1, 0, ""),
    ("sequences running", "running", 1, 0, ""), ("a step reads", "read", 1e-9, 1, "GB"),
    ("a step takes at least", "seconds", 1e3, 2, "ms"), ("rows that are useful", "useful", 100, 0, "%"),
    ("tokens/s at most", "tokens", 1, 0, ""),
]  # fmt: skip
OF_A_STEP = ("read", "seconds", "useful")  # not there where no sequence runs
TEXT = {
    "runs": "{choice}: {running} of {batch} sequences run, "
    "a step takes at least {seconds} ms, at most {tokens} tokens/s.",
    "full": "{choice}: not one sequence fits beside the weights.",
}
CAPTION = (
    "A model, not a measurement: bytes over the datasheet's bandwidth. The line: 90 % of the memory holds weights and "
    "cache. 'All off' is the same model, GPU, context and batch without the five techniques."
)
LEGEND = {"sky": "weights", "blue": "cache in use", "orange": "reserved, empty", "green": "time"}


def shown(value, times, decimals, unit=""):
    """A number as the player prints it: 1,234.5 GB."""
    return f"{value * times:,.{decimals}f} {unit}".strip()


def frame(model, device, context, batch, *labels):
    """What the player shows for one choice of CONTROLS: {"text", "memory": bars, "time": bars, "values"}."""
    chosen = {name: labels[i] == on for i, (name, (_, _, on)) in enumerate(SWITCHES.items())}
    steps = [step_model.step(model, device, context, batch, **s) for s in (dict.fromkeys(SWITCHES, False), chosen)]
    memory, slowest = step_model.inputs(model, device)["memory"], None
    bars, times = [], []
    for lane, s in enumerate(steps):
        cuts = [0, s["weights"], s["weights"] + s["used"], s["weights"] + s["used"] + s["empty"]]
        cuts = [min(120.0, 100 * cut / memory) for cut in cuts]
        for color, start, end in zip(("sky", "blue", "orange"), cuts, cuts[1:]):
            label = "does not fit" if color == "sky" and end > FULL else ""
            bars.append((lane, start, end, color if end > start else "", label))
        if s["tokens"]:
            slowest = slowest or 1 / s["tokens"]
            times.append((lane, 0, min(120.0, 100 / s["tokens"] / slowest), "green", ""))
    words = {name: shown(steps[1][name], times_, decimals) for _, name, times_, decimals, _ in ROWS}
    techniques = [technique for name, (technique, _) in TECHNIQUES.items() if chosen[name]]
    words["choice"] = f"{model} on {device}, {context:,} tokens each, {', '.join(techniques) or 'all off'}"
    text = TEXT["runs" if steps[1]["running"] else "full"].format(batch=f"{batch:,}", **words)
    values = {
        label: ["-" if name in OF_A_STEP and not s["running"] else shown(s[name], *form) for s in steps]
        for label, name, *form in ROWS
    }
    return {"text": text, "memory": {"bars": bars, "cursor": FULL}, "time": times, "values": values}


def panels():
    """{name: panel}: the bars of memory and time, and the table under them."""
    memory = player.Bars(COLUMNS, unit="% of the memory", span=120, name="memory of the GPU")
    time = player.Bars(COLUMNS, unit="% of all off", span=120, name="time of a token, all sequences together")
    for bars, slots in ((memory, 6), (time, 2)):
        bars.slots = slots
    memory.cursor = True
    values = player.Values([row[0] for row in ROWS], COLUMNS)
    values.widths = [9, 9]  # "123,456 GB"
    return {"memory": memory, "time": time, "values": values}


def simulator():
    """The player, drawn at START by Python."""
    now = frame(*START)
    chosen = list(zip(CONTROLS.items(), START, strict=True))
    controls = "".join(player.control(label, values, values.index(first)) for (label, values), first in chosen[:4])
    switches = "".join(
        f"<label><input type=checkbox{' checked' * values.index(first)}>{technique} (chapter {chapter})</label>"
        for (technique, chapter), ((_, values), first) in zip(TECHNIQUES.values(), chosen[4:], strict=True)
    )
    for on, words in enumerate(("all off", "all on")):
        switches += f"<button type=button data-all={on}>{words}</button>"
    controls += f'<div class="lab-controls" role="group" aria-label="techniques">{switches}</div>'
    made = panels()
    drawn = {name: panel.html(panel.items(now[name])) for name, panel in made.items()}
    names = {name: f'<p class="lab-name">{escape(panel.name)}</p>' for name, panel in made.items()}
    bars = "".join(f'<div class="lab-panel lab-wide">{names[name]}{drawn[name]}</div>' for name in ("memory", "time"))
    marks = "".join(f'<li><i class="{color}"></i>{meaning}</li>' for color, meaning in LEGEND.items())
    text = escape(now["text"])
    body = (
        '<div class="lab-title">One decode step</div>'
        f'<div class="lab-controls" hidden>{controls}</div>'
        f'<p class="lab-text" aria-live="polite">{text}</p>'
        f'<div class="lab-view"><div class="lab-panels lab-stage lab-wide" role="img" aria-label="{text}">{bars}'
        f'<ul class="lab-legend">{marks}</ul></div>'
        f'<div class="lab-panels"><div class="lab-panel">{drawn["values"]}</div></div></div>'
        "<noscript><p>Without JavaScript this is a still picture.</p></noscript>"
        f"<figcaption>{escape(CAPTION)}</figcaption>"
    )
    data = {
        "controls": CONTROLS, "techniques": {name: technique for name, (technique, _) in TECHNIQUES.items()},
        "full": FULL / 100, "rows": ROWS, "ofAStep": OF_A_STEP, "text": TEXT,
        "formulas": {name: expression for name, (expression, *_) in FORMULAS.items()},
        "models": {name: step_model.inputs(name, "H200") for name in CHOICES},
        "devices": {
            name: {key: step_model.inputs("Llama-3-8B", name)[key] for key in ("memory", "bandwidth", "flops")}
            for name in DEVICES
        },
    }  # fmt: skip
    look = dict(classes="lab-player lab-simulator", attributes=" data-ready")  # the players' own script passes it by
    html = player.figure("One decode step", body, data, "simulator.js", **look)
    return player.Html(html, f"One decode step: {now['text']}")
