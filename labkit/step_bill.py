"""What one decode step reads, drawn to scale: many users above, one below, and the chapters that shorten the bars.

One inline SVG for two pages. A Markdown page cannot call a function, so it includes `FILE`, which
`python -m labkit.step_bill` writes; a test says when it is old.
"""

from html import escape

from labkit import player, step_model
from labkit.provenance import ROOT
from labkit.step_map import chapter_link

FILE = ROOT / "chapters" / "_static" / "step_bill.html"
MODEL, GPU, CONTEXT, USERS = "Llama-3-8B", "H200", 8192, (64, 1)
# Chapter, words on the picture, what it does there.
TIME = [
    (1, "splits", "every multiprocessor reads"), (2, "one max", "less waiting and less padding between the reads"),
    (3, "fusion", "fewer launches, fewer results written and read again"), (9, "batching", "no rows that are nobody's"),
]  # fmt: skip
WEIGHTS = [(4, "pruning", "fewer weights"), (5, "distillation", "a smaller model")]
CACHE = [
    (6, "sinks", "only the first and the last tokens"), (7, "groups", "keys and values that query heads share"),
    (8, "pages", "no room kept for tokens that are not there"),
]  # fmt: skip
CAPTION = (
    "A step waits for memory, not for arithmetic: the bars are bytes, the thin orange line is all of the computing. "
    "Each chapter shortens a piece; chapter 8 makes room for more of the blue one."
)
_STYLE = """
figure.lab-bill.lab-bill { max-width: 34rem; margin: 1rem auto; }
.lab-bill svg { width: 100%; height: auto; color: inherit; }
.lab-bill text { fill: currentColor; font: 12px system-ui, sans-serif; }
.lab-bill .head { font-weight: 700; }
.lab-bill path { stroke: currentColor; stroke-opacity: .6; fill: none; }
.lab-bill .weights, .lab-bill .cache { stroke: currentColor; stroke-opacity: .6; }
.lab-bill .weights { fill: currentColor; fill-opacity: .15; } .lab-bill .cache { fill: #0072b2; fill-opacity: .35; }
.lab-bill .compute { fill: #d55e00; }
.lab-bill a rect { fill: currentColor; fill-opacity: .03; stroke: var(--pst-color-link, currentColor); }
.lab-bill a text { fill: var(--pst-color-link, currentColor); } .lab-bill a { outline: none; }
.lab-bill a:hover rect { fill-opacity: .12; } .lab-bill a:focus-visible rect { stroke-width: 4; }
"""
_LEFT, _WIDTH = 8, 376  # of the longest bar


def step_bill():
    """The picture as `labkit.player.Html`. Links go to the built pages, by their names beside this one."""
    steps = {users: step_model.step(MODEL, GPU, CONTEXT, users) for users in USERS}
    known = step_model.inputs(MODEL, GPU)
    most = max(step["read"] for step in steps.values())
    parts, lines = [_text(_LEFT, 14, "waste less of the time"), _links(_LEFT, 22, TIME)], []
    parts.append(f'<path d="M{_LEFT},60 v-6 h{_WIDTH} v6"/>')
    for (users, step), y in zip(steps.items(), (78, 244)):
        weights, cache = (_WIDTH * n / most for n in (step["read"] - step["used"], step["used"]))
        compute = step["operations"] / known["flops"]
        who = f"{users} user{'s' * (users > 1)}, {CONTEXT:,} tokens each".removesuffix(" each" * (users == 1))
        total = f"{step['read'] / 1e9:.1f} GB, {1e3 * step['seconds']:.1f} ms"
        parts.append(_text(_LEFT, y, f"{who}: {total}", "head"))
        for name, x, width, num_bytes in (
            ("weights", _LEFT, weights, step["read"] - step["used"]), ("cache", _LEFT + weights, cache, step["used"]),
        ):  # fmt: skip
            parts.append(f'<rect class="{name}" x="{x:.1f}" y="{y + 8}" width="{width:.1f}" height="36"/>')
            words = ("keys and values" if name == "cache" else name, f"{num_bytes / 1e9:.1f} GB")
            lines.append(f"{who}, {words[0]}: {words[1]}")
            middle, fits = x + width / 2, width > 60
            for i, word in enumerate(words):  # beside a piece that is too small for them
                at, anchor = (middle, "middle") if fits else (x + width + 6, "start")
                parts.append(_text(at, y + 23 + 15 * i, word, anchor=anchor))
        # Seconds to the same scale: a byte is the time it takes.
        width = _WIDTH * compute * known["bandwidth"] / most
        parts.append(f'<rect class="compute" x="{_LEFT}" y="{y + 47}" width="{max(width, 1):.1f}" height="5"/>')
        lines.append(f"{who}, all the arithmetic: {1e3 * compute:.2f} ms of {1e3 * step['seconds']:.1f} ms")
        parts.append(_text(_LEFT + width + 6, y + 54, f"all the arithmetic: {1e3 * compute:.2f} ms"))
        if users == max(USERS):
            what = "fewer keys and values, or room for more"
            for x, words, *links in ((_LEFT, "read fewer weights", WEIGHTS, 1, 110), (136, what, CACHE, 3, 80)):
                parts += [_text(x, y + 82, words), _links(x, y + 90, *links)]
            parts.append(f'<path d="M{_LEFT},{y + 56} v12 M{_LEFT + weights + cache / 2:.1f},{y + 44} v24"/>')
    parts += _axes(most, known["bandwidth"], 310)
    speed = f"{known['bandwidth'] / 1e12:.1f} TB/s"
    parts.append(_text(_LEFT, 366, f"{MODEL}, bf16; {GPU}, {speed}: a floor, not a measurement"))
    label = "Bars to one scale: what a decode step reads for 64 users and for one, and the time of its arithmetic"
    svg = f'<svg viewBox="0 0 392 372" role="group" aria-label="{label}">{"".join(parts)}</svg>'
    html = f'<figure class="lab-bill"><style>{_STYLE}</style>{svg}<figcaption>{CAPTION}</figcaption></figure>'
    return player.Html(html, "\n".join(lines))


def _text(x, y, words, kind="", anchor="start"):
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def _links(x, y, links, columns=4, width=91):
    places = ((x + (width + 4) * (i % columns), y + 28 * (i // columns)) for i in range(len(links)))
    return "".join(chapter_link(*link, *place, width, 24) for link, place in zip(links, places))


def _axes(most, bandwidth, y):
    """GB, and below it what they take at the GPU's bandwidth."""
    parts = [f'<path d="M{_LEFT},{y} h{_WIDTH}"/>']
    for step, unit, scale, top in ((20, "GB", 1e9, y), (5, "ms", bandwidth / 1e3, y + 22)):
        for tick in range(0, int(most / scale) + 1, step):
            x = _LEFT + _WIDTH * tick * scale / most
            words = f"{tick} {unit}" if tick else "0"
            parts.append(f'<path d="M{x:.1f},{top} v4"/>' + _text(x, top + 16, words, anchor="middle"))
    return parts


if __name__ == "__main__":
    FILE.write_text(step_bill()._repr_html_() + "\n", encoding="utf-8")
