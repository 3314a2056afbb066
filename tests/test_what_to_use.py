"""The page "What to use when": its numbers are those of the records and of the step's arithmetic, its tables are whole."""

import json
import re

import pytest
from bs4 import BeautifulSoup

from labkit import gqa, step_model, summary, what_to_use
from labkit.gpus import GPUS
from labkit.provenance import ROOT
from labkit.step_map import CHAPTERS

PLANTED_BUGS = [
    ("labkit/what_to_use.py", '["2:4", "SparseGPT"]', '["4:8", "SparseGPT"]'),
    ("labkit/what_to_use.py", "heads[4][", "heads[1]["),
    ("labkit/what_to_use.py", "weights / (weights + b * n * token)", "weights / (weights + n * token)"),
    ("labkit/show.py", "cell and label + cell", "label + cell"),
    ("labkit/what_to_use.py", "(?<=[a-z])(?=[A-Z])", "(?<=[a-z])(?=[a-z])"),
    ("labkit/what_to_use.py", "Speculative decoding, in one page", "Speculative decoding, on one page"),
]


def test_a_line_for_every_chapter():
    for lines in (what_to_use.ROWS, what_to_use.OPTIONS):
        assert list(lines) == list(CHAPTERS), "labkit/what_to_use.py: ROWS and OPTIONS have a line for each of CHAPTERS"
    assert all(len(texts) == len(what_to_use.SYSTEMS) for texts in what_to_use.OPTIONS.values())
    assert all(len(texts) == len(what_to_use.HEAD) - 1 and all(texts) for texts in what_to_use.ROWS.values())
    assert len(what_to_use.DRAFT_OPTIONS) == len(what_to_use.SYSTEMS)
    assert sum(1 for _ in what_to_use.options()) == len(CHAPTERS) + 1


def test_numbers_are_those_of_the_records():
    found, numbers = {e.name: e.samples[0] for e in summary.experiments()}, what_to_use.numbers()

    def both(name):
        return [float(x.replace(",", "")) for x in re.findall(r"[\d.,]+\d|\d", numbers[name])]

    (sparse,) = (r["bits"] for r in found["pruning"]["model"] if (r["pattern"], r["method"]) == ("2:4", "SparseGPT"))
    assert both("pruned") == [round(found["pruning"]["dense"], 2), round(sparse, 2)]
    runs = {(run["heads"], run["how"]): run for run in found["gqa"]["runs"]}
    assert both("grouped") == [round(runs[8, "mean"]["before"], 2), round(runs[4, "mean"]["after"], 2)]
    assert both("student")[0] == round(found["distillation"]["teacher"]["bits"], 2) < both("student")[1]
    step = step_model.step(**what_to_use.STEP)
    assert both("fit")[1] == step["largest"]
    assert both("kept")[0] == round(step["used"] / 1e9, 1)
    assert both("token")[1] == round(step["kv_token"] / 1e3, 1)
    used = {name for texts in what_to_use.ROWS.values() for text in texts for name in re.findall(r"\{(\w+)\}", text)}
    assert used == set(numbers)


def test_share_of_the_weights():
    """Against the step's own bytes, where the batch fits."""
    share = what_to_use.weights_share("Llama-3-8B", (1, 16), (1024, 8192))
    for (batch, context), got in share.items():
        step = step_model.step("Llama-3-8B", "H200", context, batch)
        assert step["running"] == batch
        assert got == pytest.approx((step["read"] - step["used"]) / step["read"], rel=1e-3)
    model = gqa.MODELS["Llama-3-8B"]
    assert gqa.decode_floor(model, 16, 8192, GPUS["H200"]) * GPUS["H200"].bandwidth * share[16, 8192] == pytest.approx(
        2 * model.read_params, rel=1e-3
    )


def test_tables_are_cards_on_a_phone():
    """Each cell brings its heading along, empty ones bring nothing; links go to chapters; `code` is code."""
    html = what_to_use.table(("technique", *what_to_use.SYSTEMS), what_to_use.options())._repr_html_()
    soup = BeautifulSoup(html, "html.parser")
    written = {path.stem for path in (ROOT / "chapters").glob("[0-9][0-9]_*.ipynb")}
    assert {a["href"].partition(".html")[0] for a in soup.select("th a")} <= written
    rows = [*what_to_use.OPTIONS.values(), what_to_use.DRAFT_OPTIONS]
    for row, texts in zip(soup.select("tbody tr"), rows, strict=True):
        for name, cell, text in zip(what_to_use.SYSTEMS, row.select("td"), texts, strict=True):
            assert cell.text == (f"{name}: {text}".replace("`", "") if text else "")
    assert "`" not in soup.text
    assert soup.select("td code")
    assert "Continuous<wbr/>Batching<wbr/>Config" in str(soup), "a long name breaks between its words"
    assert "<" not in repr(what_to_use.table(what_to_use.HEAD, what_to_use.techniques()))


def test_the_section_on_drafts_is_there():
    file, section = what_to_use.DRAFTS
    cells = json.loads((ROOT / "chapters" / f"{file}.ipynb").read_text(encoding="utf-8"))["cells"]
    headings = [line for c in cells if c["cell_type"] == "markdown" for line in "".join(c["source"]).splitlines()]
    assert f"### {section}" in headings
    *_, (name, _) = what_to_use.options()
    assert 'href="10_engine.html#speculative-decoding-in-one-page"' in name
