"""The results page: what is counted as won, tied and lost, honest when empty, and the headlines of all records."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from bs4 import BeautifulSoup

import kernels
from labkit import bench, notebooks, record, summary
from labkit.provenance import ROOT
from labkit.record import CEILING, Row
from labkit.step_map import CHAPTERS

SHARED = dict(device="Test GPU", driver="1", torch="2", triton="3", date="2026-01-01 00:00:00", commit="abc")


def row(case, provider, us, **changes):
    made = Row("t", case, provider, bool(us), us, 1000, 0.0, "ok: error 0" if us else "not run: no", "graph", **SHARED, source_hash="")
    return replace(made, **changes)


def case(name):
    return bench.Case(name, "kernel", lambda generator, device: {}, 1000, peers={"peer": None})


def test_no_gpu_is_no_record(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "x.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert summary.gpus(tmp_path) == []


def test_won_tied_lost_and_without_a_peer(tmp_path):
    rows = [row(CEILING, "copy", [1.0])]
    for name, own, peer in (("won", 10.0, 20.0), ("lost", 20.0, 10.0), ("tied", 10.0, 10.1), ("alone", 10.0, None), ("not run", None, 5.0)):
        rows += [row(name, "kernel", [own] * 3 if own else [], source_hash="h"), row(name, "peer", [peer] * 3 if peer else [])]
    record.save(rows, tmp_path / "test-gpu" / "t.json")
    (folder,) = summary.gpus(tmp_path)
    cases = [case(name) for name in ("won", "lost", "tied", "alone", "not run")]
    found = summary.comparison(folder, "t", cases, {(c.name, "kernel"): "h" for c in cases})
    assert summary.tally([found]) == {"won": 1, "tied": 1, "lost": 1, "no peer": 1}
    assert summary.comparison(folder, "other", cases, {}) is None
    assert summary.state(folder) == ["Test GPU: 2026-01-01 00:00:00 UTC, commit abc, driver 1, torch 2, triton 3"]
    assert not found.changed


def lines_of(table):
    """The body of a table in HTML: the texts of its cells, without the headings that they bring along."""
    rows = BeautifulSoup(table._repr_html_(), "html.parser").select(".lab-use tbody tr")
    return [[cell.get_text().removeprefix(b.text if (b := cell.select_one(".lab-label")) else "") for cell in row] for row in rows]


def test_the_table_of_a_gpu(tmp_path, monkeypatch):
    """Wins beside losses, the worst case by name, older code named, and what was not recorded."""
    rows = [row(CEILING, "copy", [1.0])]
    for name, own, peer in (("won", 10.0, 40.0), ("lost", 20.0, 10.0), ("tied", 10.0, 10.0), ("not run", None, None)):
        rows += [row(name, "kernel", [own] * 3 if own else [], source_hash="h"), row(name, "peer", [peer] * 3 if peer else [])]
    record.save(rows, tmp_path / "gqa.json")
    cases = {"gqa": [case(name) for name in ("won", "lost", "tied", "not run")], "pruning": [case("other")]}
    monkeypatch.setattr(bench, "topic_cases", cases.get)
    for now, said in (("h", "The kernels are unchanged since."), ("other", "the figures are of older code: kernel.")):
        monkeypatch.setattr(bench, "hashes", lambda cases, ops, now=now: {(c.name, "kernel"): now for c in cases})
        table = summary.measured_table(tmp_path, cases, lambda topic: None)
        heading, line = lines_of(table)
        assert heading[0].startswith("7 MHA, MQA and GQARecorded on Test GPU: 2026-01-01")
        assert heading[0].endswith(said)
        mean = (4 * 0.5 * 1) ** (1 / 3)
        expected = ["all cases", "3 of 4", f"{mean:.2f} times as fast", "0.50: lost, against peer", "5% to 10%", "1 faster, 1 tied, 1 slower"]
        assert line == expected
        assert "Not recorded on this GPU: <a href=\"04_pruning.html\">4 Pruning</a>" in table._repr_html_()
        assert "not run: no" in table._repr_html_(), "the fold has every case"
        assert "Not recorded: pruning" in repr(table)


def test_what_waits_for_a_gpu_in_the_order_of_the_chapters(monkeypatch):
    monkeypatch.setattr(bench, "topic_cases", {"gqa": [1, 2], "fusion": [1], "first_kernel": [1]}.get)
    text = BeautifulSoup(summary.planned(["first_kernel", "gqa", "fusion"]), "html.parser").text
    assert text == "4 cases: A first kernel (1), 3 Operator fusion (1), 7 MHA, MQA and GQA (2)"


def stage(name, verdict, **changes):
    return row(name, "-m pytest", [], topic="metal", bytes=0, error=None, verdict=verdict, mode="", **changes)


def test_the_stages_on_the_metal(tmp_path):
    assert summary.metal(tmp_path) == {}
    stages = [stage("tests", "ok: 900 passed (120 s)"), stage("memcheck", "not run: compute-sanitizer is missing")]
    later = stage("tune", "failed: a trial (9 s)", date="2026-01-02 00:00:00")
    record.save([*stages, later], tmp_path / "test-gpu" / "metal.json")
    first, second = summary.metal(tmp_path).items()
    assert first[0] == "Test GPU: 2026-01-01 00:00:00 UTC, commit abc, driver 1, torch 2, triton 3"
    assert first[1] == [("tests", "ok: 900 passed (120 s)"), ("memcheck", "not run: compute-sanitizer is missing")]
    assert "2026-01-02" in second[0]
    assert second[1] == [("tune", "failed: a trial (9 s)")]
    assert lines_of(summary.metal_table(tmp_path))[-2:] == [[second[0]], ["tune", "failed: a trial (9 s)"]]
    assert summary.gpus(tmp_path) == [], "stages are no measurements"


def test_stages_are_not_counted_among_measurements(tmp_path):
    folder = tmp_path / "test-gpu"
    record.save([row("one", "kernel", [1.0])], folder / "t.json")
    record.save([stage("tests", "ok: 1 passed", date="2027-01-01 00:00:00")], folder / "metal.json")
    assert summary.gpus(tmp_path) == [folder]
    assert summary.measured(folder) == [folder / "t.json"]
    assert len(summary.state(folder)) == 1
    assert "2027" not in summary.state(folder)[0]


def test_the_first_page_says_whether_a_gpu_was_measured():
    text = (ROOT / "chapters" / "intro.md").read_text(encoding="utf-8")
    assert ("No GPU has measured these kernels yet" in text) == (not summary.gpus())


def test_minutes_of_a_notebook(tmp_path):
    cells = [{"cell_type": "markdown", "source": ["one two\n", "three"], "metadata": {}}]
    source, metadata = ["a = 1\n", "b"], {"tags": ["hide-input"]}
    html = {"data": {"text/html": "<style>x y z</style><b>four</b>", "text/plain": "five six"}}
    shown = {"data": {"text/markdown": "From x:\n\n```python\n1\n```", "text/plain": "no words"}}
    cells.append({"cell_type": "code", "source": source, "metadata": {}, "outputs": [{"text": ["seven eight\n"]}, html]})
    cells.append({"cell_type": "code", "source": source, "metadata": metadata, "outputs": [shown]})
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert notebooks.minutes(path) == pytest.approx(6 / 150 + (2 + 4) / 10)


def test_the_cards_of_the_first_page_say_what_the_chapters_say():
    """Title, recap of _config.yml, and the minutes that stand in the chapter's overview."""
    text = (ROOT / "chapters" / "intro.md").read_text(encoding="utf-8")
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    recaps = config["sphinx"]["config"]["html_context"]["recaps"]
    for number, (file, title) in CHAPTERS.items():
        assert file in recaps, f"_config.yml: recaps has no sentence for {file}"
        start = f":::{{grid-item-card}} {number} {title}\n:link: {file}\n:link-type: doc\n\n{recaps[file]}\n+++\n"
        assert start in text, f"chapters/intro.md lacks this card:\n{start}<how many> minutes\n:::"
    card = r"{grid-item-card} (\d+) (.*)\n:link: (.*)\n:link-type: doc\n\n(.*)\n\+\+\+\n(\d+) minutes\n:::"
    cards = [(int(number), title, file, recap) for number, title, file, recap, _ in re.findall(card, text)]
    assert cards == [(number, title, file, recaps[file]) for number, (file, title) in CHAPTERS.items()]
    for *_, file, _, said in re.findall(card, text):
        path = ROOT / "chapters" / f"{file}.ipynb"
        start = f"Time: about {said} minutes"
        assert start in path.read_text(encoding="utf-8"), f"{file}: no {start!r}, as chapters/intro.md has it"
        assert abs(notebooks.minutes(path) - int(said)) <= max(3, int(said) / 8), f"{file}: about {notebooks.minutes(path):.0f} minutes"


def test_the_first_page_says_how_long_its_beginning_takes():
    text = (ROOT / "chapters" / "intro.md").read_text(encoding="utf-8")
    said = int(re.search(r"{doc}`one_step` \((\d+) minutes", text)[1])
    assert abs(notebooks.minutes(ROOT / "chapters" / "one_step.ipynb") - said) < 5


EXPERIMENTS = summary.experiments()


def test_experiments_are_there():
    assert {e.name for e in EXPERIMENTS} >= set(summary.HEADLINES)


@pytest.mark.parametrize("experiment", [e for e in EXPERIMENTS if e.name in summary.HEADLINES], ids=lambda e: e.name)
def test_findings_are_numbers_beside_others(experiment):
    lines = summary.headline(experiment)
    assert lines
    for what, result, against, spread in lines:
        assert what[0].isupper() or what[0].isdigit(), what
        assert re.match(r"[\d.]+ ", result), result
        assert re.search(r"\d", against), what
        assert spread, what
    assert len({what for what, *_ in lines}) == len(lines), "no two findings have the same words"


def test_findings_follow_the_record_and_all_its_seeds():
    (train,) = (e for e in EXPERIMENTS if e.name == "train")
    samples = [json.loads(json.dumps(train.samples[0])) | {"held_out_bits_per_byte": bits} for bits in (9.80, 9.90)]
    ((_, result, _, spread),) = summary.headline(replace(train, samples={0: samples[0]}))
    assert (result, spread) == ("9.80 bits per byte", "one seed")
    ((_, result, _, spread),) = summary.headline(replace(train, samples=dict(enumerate(samples))))
    assert (result, spread) == ("9.85 bits per byte", "2 seeds: 9.80 to 9.90")
    assert summary.headline(replace(train, name="new")) == []


def test_the_table_of_findings_says_where_they_come_from():
    """By chapter, each under a heading with date, commit and whether its code is the one that was run."""
    (train,) = (e for e in EXPERIMENTS if e.name == "train")
    new = replace(train, name="new <one>", source_hash="0" * 16)
    *_, last, heading = lines_of(summary.findings([new, *EXPERIMENTS]))
    assert heading[0].startswith("new <one>")
    assert "The code has changed since." in heading[0]
    assert len(last) == len(summary.HEAD)
    headings = [line[0] for line in lines_of(summary.findings(EXPERIMENTS)) if len(line) == 1]
    assert len(headings) == len(EXPERIMENTS)
    assert all(e.date in text and e.commit in text for e, text in zip(sorted(EXPERIMENTS, key=lambda e: [*summary.HEADLINES].index(e.name)), headings))


@pytest.mark.parametrize(
    ("interpreted", "capability", "expected"),
    [
        (True, None, "No GPU that torch"),
        (True, (7, 5), "Tesla T4 (compute capability 7.5) is here, but Triton supports 8.0"),
        (True, (8, 0), "but TRITON_INTERPRET=1 is set"),
        (False, (9, 0), "Kernels are compiled for Tesla T4 (compute capability 9.0)"),
    ],
)
def test_where(monkeypatch, interpreted, capability, expected):
    monkeypatch.setattr(kernels, "INTERPRETED", interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert expected in kernels.where()
    assert ("interpreter" in kernels.where()) == interpreted


def test_where_never_raises(monkeypatch):
    def broken():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert "driver too old" in kernels.where()
