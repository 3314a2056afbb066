"""The map of an inference step: what happens in which order, and the chapters that change it. One inline SVG."""

from html import escape

from labkit import player

CHAPTERS = {
    1: ("01_flash_decoding", "Flash-Decoding"), 2: ("02_flash_decoding_pp", "FlashDecoding++"),
    3: ("03_fusion", "Operator fusion"), 4: ("04_pruning", "Pruning"), 5: ("05_distillation", "Distillation"),
    6: ("06_streaming_llm", "StreamingLLM"), 7: ("07_gqa", "MHA, MQA and GQA"),
    8: ("08_paged_attention", "PagedAttention"), 9: ("09_batching", "Continuous batching"),
    10: ("10_engine", "The engine"),
}  # fmt: skip
FLAT = (2, "flat GEMM", "multiplies few rows without padding")
# What happens, and (chapter, words on the map, what it does there). IN_LAYER is repeated in every layer.
BEFORE = [
    ("weights", [(4, "pruning", "leaves weights out"), (5, "distillation", "trains a smaller model instead")]),
    ("scheduler", [(9, "batching", "decides who is computed"), (10, "engine", "lays the tokens out as one row")]),
    ("KV pages", [(8, "paging", "finds room for the new keys and values")]),
]
IN_LAYER = [
    ("norm", [(3, "fusion", "adds the residual and normalises in one kernel")]),
    ("q, k, v products", [FLAT, (7, "fewer heads", "has fewer keys and values to compute")]),
    ("RoPE, write K V", [(3, "fusion", "rotates and stores in one kernel"), (8, "slots", "says where the keys go")]),
    ("attention", [
        (1, "splits", "cuts the keys, so that the whole GPU reads"), (2, "one max", "needs no running maximum"),
        (6, "sinks", "keeps the first and the last tokens only"), (7, "groups", "reads keys and values once per group"),
    ]),
    ("output product", [FLAT]),
    ("norm, MLP", [
        (3, "fusion", "joins norm, products and SwiGLU"), (4, "2:4 weights", "reads 0.5625 of the weights' bytes"),
    ]),
]  # fmt: skip
AFTER = [("logits", [FLAT]), ("sample", [(10, "engine", "draws a token for every sequence")])]
CAPTION = "One decode step from top to bottom. The boxes on the right are links to the chapters that change it there."
_STYLE = """
figure.lab-map.lab-map { max-width: 30rem; margin: 1rem auto; }
.lab-map svg { width: 100%; height: auto; color: inherit; }
.lab-map text { fill: currentColor; font: 13px system-ui, sans-serif; }
.lab-map .box, .lab-map .layer { fill: currentColor; fill-opacity: .06; stroke: currentColor; stroke-opacity: .45; }
.lab-map .layer { fill: none; stroke-dasharray: 5 4; }
.lab-map path { stroke: currentColor; stroke-opacity: .6; fill: none; }
.lab-map a rect { fill: currentColor; fill-opacity: .03; stroke-width: 1.5;
  stroke: var(--pst-color-link, currentColor); }
.lab-map a text { fill: var(--pst-color-link, currentColor); font-size: 12px; } .lab-map a { outline: none; }
.lab-map a:hover rect { fill-opacity: .12; } .lab-map a:focus-visible rect { stroke-width: 4; }
"""
_ROW, _LEFT, _WIDTH = 34, 8, 132  # height of a row, and the boxes of the step


def step_map():
    """The map as `labkit.player.Html`. Links go to the built pages, by their names beside this one."""
    parts, y, middle = [], 4, _LEFT + _WIDTH / 2
    for block, rows in (("before", BEFORE), ("layer", IN_LAYER), ("after", AFTER)):
        top = y
        y += 24 * (block == "layer")
        for name, links in rows:
            height = _ROW * max(1, (len(links) + 1) // 2)
            parts.append(_box(name, links, y, height - 8))
            parts.append(f'<path d="M{middle},{y + height - 8} v8"/>')
            y += height
        if block == "layer":
            parts.append(f'<rect class="layer" x="2" y="{top}" width="376" height="{y - top - 2}" rx="6"/>')
            parts.append(f'<text x="{_LEFT}" y="{top + 17}">in every layer</text>')
            y += 8
    label = "Map of one inference step; its parts link to the chapters"
    svg = f'<svg viewBox="0 0 380 {y}" role="group" aria-label="{label}">{"".join(parts)}</svg>'
    html = f'<figure class="lab-map"><style>{_STYLE}</style>{svg}<figcaption>{CAPTION}</figcaption></figure>'
    lines = [f"{name}: " + ", ".join(f"{CHAPTERS[c][1]} {does}" for c, _, does in links) for name, links in steps()]
    return player.Html(html, "\n".join(lines))


def steps():
    """All rows of the map, in order."""
    return [*BEFORE, *IN_LAYER, *AFTER]


def _box(name, links, y, height):
    middle = y + height / 2
    parts = [
        f'<rect class="box" x="{_LEFT}" y="{y}" width="{_WIDTH}" height="{height}" rx="4"/>'
        f'<text x="{_LEFT + _WIDTH / 2}" y="{middle + 4.5}" text-anchor="middle">{escape(name)}</text>'
    ]
    for i, (chapter, words, does) in enumerate(links):
        x, top = 156 + 110 * (i % 2), y + _ROW * (i // 2)
        parts.append(chapter_link(chapter, words, does, x, top, 104, _ROW - 8))
    return "".join(parts)


def chapter_link(chapter, words, does, x, y, width, height):
    """A round box that links to a chapter's page beside this one. does: what it does here, said on hovering."""
    file, title = CHAPTERS[chapter]
    what = escape(f"Chapter {chapter}, {title}: {does}")
    return (
        f'<a href="{file}.html" aria-label="{what}"><title>{what}</title>'
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{height // 2}"/>'
        f'<text x="{x + width / 2:g}" y="{y + height // 2 + 4}" text-anchor="middle"><tspan font-weight="700">{chapter}'
        f"</tspan> {escape(words)}</text></a>"
    )
