"""The results page: what is counted as won, tied and lost, honest when empty, and the headlines of all records."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml

import kernels
from labkit import bench, record, summary
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


def stage(name, verdict, **changes):
    return row(name, "-m pytest", [], topic="metal", bytes=0, error=None, verdict=verdict, mode="", **changes)


def test_the_stages_on_the_metal(tmp_path):
    assert summary.metal(tmp_path) == {}
    stages = [stage("tests", "ok: 900 passed (120 s)"), stage("memcheck", "not run: compute-sanitizer is missing")]
    later = stage("tune", "failed: a trial (9 s)", date="2026-01-02 00:00:00")
    record.save([*stages, later], tmp_path / "test-gpu" / "metal.json")
    first, second = summary.metal(tmp_path).items()
    assert first[0] == "Test GPU: 2026-01-01 00:00:00 UTC, commit abc, driver 1, torch 2, triton 3"
    assert first[1] == ["tests       ok: 900 passed (120 s)", "memcheck    not run: compute-sanitizer is missing"]
    assert "2026-01-02" in second[0]
    assert second[1] == ["tune        failed: a trial (9 s)"]
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
    assert summary.minutes(path) == pytest.approx(6 / 150 + (2 + 4) / 10)


def test_the_cards_of_the_first_page_say_what_the_chapters_say():
    """Title, recap of _config.yml, and the minutes that stand in the chapter's overview."""
    text = (ROOT / "chapters" / "intro.md").read_text(encoding="utf-8")
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    recaps = config["sphinx"]["config"]["html_context"]["recaps"]
    card = r"{grid-item-card} (\d+) (.*)\n:link: (.*)\n:link-type: doc\n\n(.*)\n\+\+\+\n(\d+) minutes\n:::"
    cards = [(int(number), title, file, recap) for number, title, file, recap, _ in re.findall(card, text)]
    assert cards == [(number, title, file, recaps[file]) for number, (file, title) in CHAPTERS.items()]
    for *_, file, _, said in re.findall(card, text):
        path = ROOT / "chapters" / f"{file}.ipynb"
        assert f"Time: about {said} minutes" in path.read_text(encoding="utf-8"), file
        assert abs(summary.minutes(path) - int(said)) < 20, f"{file}: about {summary.minutes(path):.0f} minutes"


def test_the_first_page_says_how_long_its_beginning_takes():
    text = (ROOT / "chapters" / "intro.md").read_text(encoding="utf-8")
    said = int(re.search(r"{doc}`one_step` \((\d+) minutes", text)[1])
    assert abs(summary.minutes(ROOT / "chapters" / "one_step.ipynb") - said) < 5


EXPERIMENTS = summary.experiments()


def test_experiments_are_there():
    assert {e.name for e in EXPERIMENTS} >= set(summary.HEADLINES)


@pytest.mark.parametrize("experiment", [e for e in EXPERIMENTS if e.name in summary.HEADLINES], ids=lambda e: e.name)
def test_headlines_are_numbers(experiment):
    lines = summary.headline(experiment)
    assert lines
    assert all(any(c.isdigit() for c in line) for line in lines)


def test_headlines_follow_the_record():
    (train,) = (e for e in EXPERIMENTS if e.name == "train")
    sample = json.loads(json.dumps(train.samples[0])) | {"held_out_bits_per_byte": 9.87}
    assert "9.87 bits" in summary.headline(replace(train, samples={0: sample}))[0]
    two = replace(train, samples={0: sample, 1: sample})
    assert [line.split(":")[0] for line in summary.headline(two)] == ["seed 0", "seed 1"]
    assert summary.headline(replace(train, name="new")) == []


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
