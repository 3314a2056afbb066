"""The model of a decode step against other witnesses of its parts, and the page's player against Python."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest
from browser import chromium, operate, page
from bs4 import BeautifulSoup

import kernels.gqa
from labkit import (
    bench,
    fusion,
    gqa,
    paged_attention,
    pruning,
    record,
    roofline,
    simulator,
    step_bill,
    step_map,
    step_model,
)
from labkit.gpus import GPUS
from labkit.model import Config, Llama
from labkit.provenance import ROOT
from labkit.step_model import BATCHES, CONTEXTS, DEVICES, FORMULAS, SWITCHES, step

CHOICES = [(m, d, c, b) for m in step_model.CHOICES for d in DEVICES for c in CONTEXTS for b in BATCHES]


def some(count, seed=0):
    """Random choices of everything: (model, device, context, batch, switches)."""
    rng = random.Random(seed)
    return [(*rng.choice(CHOICES), {name: rng.random() < 0.5 for name in SWITCHES}) for _ in range(count)]


@pytest.mark.parametrize("name", step_model.CHOICES)
def test_floor_is_chapter_7s(name):
    model = gqa.MODELS[name]
    for device, (kind, count) in DEVICES.items():
        gpu = GPUS[kind]
        for context in CONTEXTS:
            for heads, with_gqa in ((model.num_q_heads, False), (model.num_kv_heads, True)):
                m = model.with_kv_heads(heads)
                got = step(name, device, context, 4, gqa=with_gqa)
                assert got["largest"] == gqa.largest_batch(m, context, count * gpu.memory_gb * 1e9)
                if got["running"] == 4 and got["read"] / gpu.bandwidth > got["operations"] / gpu.bf16_flops:
                    floor = gqa.decode_floor(m, 4, context, gpu, count)
                    assert got["seconds"] == pytest.approx(floor, rel=1e-12)


def test_24_weights_are_as_large_as_the_packed_ones():
    """All linear layers of a block of Llama-3-8B, in the format of chapter 4."""
    import torch

    dense, pruned = (step("Llama-3-8B", "H200", 1024, 1, pruned=p) for p in (False, True))
    with torch.device("meta"):
        block = Llama(Config(128_256, 4096, 14336, 1, 32, 8, 128)).layers[0]
    linear = [p.shape for p in block.parameters() if p.ndim == 2]
    saved = 32 * sum(2 * n * k - pruning.sparse_bytes(n, k) for n, k in linear)
    norms = (2 * 32 + 1) * 4096  # vectors, which the model counts among the linear layers
    assert dense["weights"] - pruned["weights"] == pytest.approx(saved + 0.875 * norms)


def test_pages_are_those_of_the_block_pool():
    for context in (1, 15, 16, 17, 1000, 4096):
        pool = paged_attention.BlockPool(2048, 16)
        pool.allocate("a", list(range(context)))
        pages = len(pool.table("a"))
        assert step("Llama-3-8B", "H200", context, 1)["reserved"] == 16 * pages
        assert step("Llama-3-8B", "H200", context, 1, paged=False)["reserved"] == CONTEXTS[-1]


def test_static_batches_waste_what_a_simulation_says():
    """Exponential outputs: useful rows / computed rows of batches that run until their longest output is done."""
    lengths = np.random.default_rng(0).exponential(1.0, (20_000, 16))
    share = lengths.sum() / (16 * lengths.max(1).sum())
    assert step("Llama-3-8B", "H200", 1024, 16, continuous=False)["useful"] == pytest.approx(share, rel=0.01)
    assert step("Llama-3-8B", "H200", 1024, 1, continuous=False)["useful"] == 1


def test_streaming_bounds_the_cache():
    for context in CONTEXTS:
        for paged in (True, False):
            got = step("Llama-3-8B", "H200", context, 1, streaming=True, paged=paged)
            assert got["kept"] == min(context, 2048)
            assert got["reserved"] == (2048 if not paged else got["kept"])


@pytest.mark.parametrize("name", SWITCHES)
def test_no_switch_makes_it_slower(name):
    """With continuous batching. A larger static batch waits longer for its longest output, and can be slower."""
    for model, device, context, batch, switches in some(300):
        switches["continuous"] = True
        off, on = (step(model, device, context, batch, **{**switches, name: value})["tokens"] for value in (False, True))
        assert on >= off * (1 - 1e-9)


def test_what_does_not_fit_does_not_run():
    got = step("Llama-3-70B", "L4", 1024, 4)
    assert (got["largest"], got["running"], got["used"], got["tokens"]) == (0, 0, 0, 0)
    now = simulator.frame("Llama-3-70B", "L4", 1024, 4, *[off for _, off, _ in SWITCHES.values()])
    assert now["text"].endswith("fits beside the weights.")
    steps = ("a step reads", "a step takes at least", "rows that are useful")
    assert all(now["values"][row] == ["-", "-"] for row in steps)
    assert [label for *_, label in now["memory"]["bars"]] == ["does not fit", "", ""] * 2
    assert now["values"]["tokens/s at most"] == ["0", "0"]


def test_what_moves_the_time_of_one_short_sequence():
    """As the simulator's page says: 2:4 weights most, fewer KV heads a little (k_proj and v_proj shrink), else nothing."""
    off = dict.fromkeys(SWITCHES, False)
    for start in (off, {name: name in ("gqa", "paged", "continuous") for name in SWITCHES}):
        saved = {
            name: step("Llama-3-8B", "H200", 1024, 1, **start | {name: False})["seconds"]
            - step("Llama-3-8B", "H200", 1024, 1, **start | {name: True})["seconds"]
            for name in SWITCHES
        }
        assert saved["pruned"] > 2 * saved["gqa"] > 0
        assert saved["paged"] == saved["streaming"] == saved["continuous"] == 0


def test_memory_never_overflows():
    for model, device, context, batch, switches in some(500, seed=1):
        got = step(model, device, context, batch, **switches)
        memory = step_model.inputs(model, device)["memory"]
        assert got["running"] == 0 or got["weights"] + got["used"] + got["empty"] <= 0.9 * memory


def test_bad_input():
    for change, name in (
        ({"model": "GPT-9"}, "model"), ({"device": "abacus"}, "device"), ({"context": 0}, "context"),
        ({"context": 40_000}, "context"), ({"batch": 0}, "batch"), ({"batch": 1.5}, "batch"), ({"gqa": 2}, "switches"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: got .* expected "):
            step(**{"model": "Llama-3-8B", "device": "H200", "context": 1024, "batch": 1, **change})


def test_formulas_are_python_and_javascript():
    for expression, *_ in FORMULAS.values():
        assert re.fullmatch(r"[\w\s.,()*/+-]+", expression)
        assert not re.search(r"\*\*|//|\b0\d", expression)


def test_the_map_names_every_chapter_and_says_what_a_link_is():
    soup = BeautifulSoup(step_map.step_map()._repr_html_(), "html.parser")
    written = {path.stem for path in (ROOT / "chapters").glob("[0-9][0-9]_*.ipynb")}
    links = soup.select("svg a")
    placed = {c for _, links in step_map.steps() for c, *_ in links}
    assert placed == set(step_map.CHAPTERS), "labkit/step_map.py: BEFORE, IN_LAYER and AFTER name each of CHAPTERS"
    assert {link["href"].removesuffix(".html") for link in links if link.has_attr("href")} == written
    for link in links:
        assert link.title.text == link["aria-label"]
        assert link["aria-label"].startswith(f"Chapter {link.tspan.text}, ")
    drawn = soup.svg.select("rect")
    assert all(float(r["x"]) + float(r["width"]) <= 380 for r in drawn)


def test_the_bill_is_drawn_to_scale_and_links_to_the_chapters_that_shorten_it():
    soup = BeautifulSoup(step_bill.step_bill()._repr_html_(), "html.parser")
    widths = {kind: [float(r["width"]) for r in soup.select(f"rect.{kind}")] for kind in ("weights", "cache", "compute")}
    for i, users in enumerate(step_bill.USERS):
        got, gpu = step(step_bill.MODEL, step_bill.GPU, step_bill.CONTEXT, users), GPUS[step_bill.GPU]
        scale = widths["weights"][0] / (got["read"] - got["used"])
        assert widths["weights"][i] == widths["weights"][0], "the weights are the same for one user"
        assert widths["cache"][i] == pytest.approx(scale * got["used"], abs=0.3)
        arithmetic = scale * got["operations"] / gpu.bf16_flops * gpu.bandwidth
        assert widths["compute"][i] == pytest.approx(max(1, arithmetic), abs=0.3)
    links = soup.select("svg a")
    assert [int(link.tspan.text) for link in links] == [1, 2, 3, 9, 4, 5, 6, 7, 8]
    for link in links:
        assert link["href"] == f"{step_map.CHAPTERS[int(link.tspan.text)][0]}.html"
        assert link.title.text == link["aria-label"]


def test_the_first_page_shows_the_bill_as_it_is():
    assert step_bill.FILE.name in (ROOT / "chapters" / "intro.md").read_text(encoding="utf-8")
    written = step_bill.FILE.read_text(encoding="utf-8")
    assert written == step_bill.step_bill()._repr_html_() + "\n", "old: run python -m labkit.step_bill"


def test_points_are_those_of_the_cases():
    """Bytes and operations come from the topics, and the counted ones from formulas that one can check by hand."""
    points = {point.words: point for point in roofline.points()}
    assert len(points) == len(roofline.OPERATIONS) + len(roofline.LAUNCHED)
    for words, topic, name, *_ in roofline.OPERATIONS:
        (case,) = (case for case in bench.topic_cases(topic) if case.name == name)
        assert points[words].bytes == case.bytes
        assert points[words].flops == case.flops or case.flops == 0 < points[words].flops
        assert points[words].us is None or points[words].us > 0
    numbers = 64 * 14336  # a sigmoid and two products; 3 x 2 bytes a number in one kernel, 5 x 2 in two
    one, two = points["SwiGLU, one kernel"], points["SwiGLU, two kernels"]
    assert (one.flops, one.bytes, two.flops, two.bytes) == (3 * numbers, 6 * numbers, 3 * numbers, 10 * numbers)
    rows, width = 64, 4096  # add, square, mean, two products a number; add and root a row
    assert points["residual + RMSNorm"].flops == 5 * rows * width + 2 * rows


def test_what_an_operation_counts():
    import torch

    x = torch.empty(3, 4, dtype=torch.bfloat16)
    traced = roofline._traced(lambda x: (x.float().exp() + 1).sum(), {"x": x})
    assert roofline.count(traced) == 3 * 12, "exp, add and sum; not the change of type"
    assert roofline.moved(traced) == 12 * (2 + 4 + 4 + 4 + 4 + 4 + 4) + 4, "each a kernel, the change of type too"
    assert roofline.count(roofline._traced(fusion.softmax, {"x": x}, split=True)) > 3 * 12


def test_every_chapter_has_a_place_on_the_map():
    """And nothing else: the map, and so the tables of What to use when, follow the book's table of contents."""
    listed = re.findall(r"file: chapters/(\d\d_\w+)", (ROOT / "_toc.yml").read_text())
    assert [file for file, _ in step_map.CHAPTERS.values()] == listed, "labkit/step_map.py: CHAPTERS, and _toc.yml"
    assert list(step_map.CHAPTERS) == [int(file[:2]) for file in listed]


def test_roofs():
    for gpu in GPUS.values():
        ridge = gpu.flops_per_byte
        assert roofline.attainable(gpu, ridge) == pytest.approx(gpu.bf16_flops)
        assert roofline.attainable(gpu, ridge / 4) == pytest.approx(gpu.bf16_flops / 4)
        assert roofline.attainable(gpu, 4 * ridge) == gpu.bf16_flops


def test_a_recorded_point(tmp_path):
    """Its time is the median of our own kernel as it is, on that GPU; a peer, another GPU, a row that did not run or
    an older kernel is none."""
    (prefill,) = (o for o in roofline.OPERATIONS if o[0] == "prefill attention")
    (case,) = (case for case in bench.topic_cases("gqa") if case.name == prefill[2])
    digest = bench.hashes([case], kernels.gqa)[case.name, "attention"]
    shared = record.stamp("NVIDIA H200") | {"source_hash": digest}
    us = {"SDPA flash": [1.0], "attention": [50.0, 70.0, 60.0]}
    rows = [record.Row("gqa", prefill[2], name, True, x, 1, 0.0, "ok: -", "graph", **shared) for name, x in us.items()]
    rows += [record.Row("gqa", roofline.OPERATIONS[2][2], "gqa_decoding", False, [], 1, 0.0, "not run: -", "", **shared)]
    record.save(rows, tmp_path / "nvidia-h200" / "gqa.json")
    measured = {point.words: point.us for point in roofline.points(results=tmp_path)}
    assert {words: us for words, us in measured.items() if us} == {"prefill attention": 60.0}
    assert not any(point.us for point in roofline.points("B200", tmp_path))
    figure = roofline.draw(roofline.points(results=tmp_path), name="fig-t", caption="c", alt="a b c d e")
    bare = roofline.draw(roofline.points("B200", tmp_path), name="fig-t", caption="c", alt="a b c d e")
    assert figure.png != bare.png
    record.save([replace(row, source_hash="0" * 16) for row in rows], tmp_path / "nvidia-h200" / "gqa.json")
    assert not any(point.us for point in roofline.points(results=tmp_path)), "of older code"


def test_in_a_browser(tmp_path):
    """What simulator.js draws is what Python draws: every bar, every number, the text; and the keyboard works it."""
    path = tmp_path / "index.html"
    html = simulator.simulator()._repr_html_()
    path.write_text(f'<!doctype html><html lang="en"><meta charset="utf-8"><title>t</title><body>{html}', encoding="utf-8")
    options = list(simulator.CONTROLS.values())
    chosen = [(*choice, *[SWITCHES[n][1 + on] for n, on in switches.items()]) for *choice, switches in some(400, seed=2)]
    chosen.append(simulator.START)
    places = [[values.index(value) for values, value in zip(options, choice)] for choice in chosen]
    with chromium() as browser, page(browser, path.as_uri(), width=390) as tab:
        read = """f => [f.querySelector('.lab-text').textContent, ...[...f.querySelectorAll('.x')].map(x =>
            x.style.display === 'none' ? null : x.textContent || [x.className.slice(2), x.style.left, x.style.width, x.style.top])]"""
        figure = tab.query_selector(".lab-player")
        assert not operate(tab, figure)
        for words, on in (("all on", True), ("all off", False)):
            tab.get_by_role("button", name=words).click()
            boxes = tab.get_by_role("group", name="techniques").get_by_role("checkbox")
            assert [box.is_checked() for box in boxes.all()] == [on] * len(SWITCHES)
        assert ", all off: " in figure.query_selector(".lab-text").text_content()
        draw = f"""(f, places) => places.map(place => {{
            f.querySelectorAll('input, select').forEach((field, i) => {{
                if (field.type === 'checkbox') field.checked = place[i]; else field.value = place[i]; }});
            f.dispatchEvent(new Event('input'));
            return ({read})(f); }})"""
        drawn = figure.evaluate(draw, places)
    for choice, (text, *items) in zip(chosen, drawn):
        now = simulator.frame(*choice)
        assert text == now["text"]
        expected = [item for name, panel in simulator.panels().items() for item in panel.items(now[name])]
        assert len(items) == len(expected)
        for item, (color, label, style) in zip(items, expected):
            if item is None or style == "display:none":
                assert (item, style) == (None, "display:none"), choice
            elif isinstance(item, str):
                assert item == label, choice
            else:
                numbers = [float(x) for x in re.findall(r"[\d.e-]+(?=%)", style)]
                assert item[0] == color
                if color == "lab-cursor":  # drawn once, by Python
                    assert item[1] == "75%"
                    continue
                assert [float(x.rstrip("%")) for x in item[1:]] == pytest.approx(numbers, abs=0.01), choice


PLANTED_BUGS = [
    ("labkit/step_model.py", '"weights - 2 * embedding + used"', '"weights + used"'),
    ("labkit/step_model.py", "2 * params - pruned * 0.875", "2 * params - pruned * 1.0"),
    ("labkit/step_model.py", "paged * 16 * ceil(kept / 16)", "paged * 16 * floor(kept / 16 + 1)"),
    ("labkit/step_model.py", "min(context, 2048)", "max(context, 2048)"),
    ("labkit/step_model.py", "harmonic(max(1, running))", "max(1, running)"),
    ("labkit/step_model.py", "0.9 * memory", "memory"),
    ("labkit/simulator.js", "s.weights + s.used, s.weights + s.used + s.empty", "s.weights + s.used, s.weights + s.empty"),
    ("labkit/simulator.js", "switches.map(() => 0)", "switches.map(() => 1)"),
    ("labkit/simulator.js", 'none ? "-" :', 'false ? "-" :'),
    ("labkit/roofline.py", "min(gpu.bf16_flops, intensity * gpu.bandwidth)", "intensity * gpu.bandwidth"),
    ("labkit/roofline.py", "max(read, made) for name, read, made", "made for name, read, made"),
    ("labkit/roofline.py", 'FREE - {"_to_copy"}', "FREE"),
    ("labkit/roofline.py", "(row.case, row.provider) == (name, case.op)", "row.case == name"),
    ("labkit/roofline.py", "median(own.us) if fresh", "median(own.us) if own"),
    ("labkit/roofline.py", "median(own.us)", "min(own.us)"),
    ("labkit/step_map.py", 'aria-label="{what}"><title>{what}', 'aria-label="{words}"><title>{what}'),
]
