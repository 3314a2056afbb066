"""The studies, pictures and live cell of chapter 03."""

import json

import pytest
import torch

from kernels import fusion
from labkit import fusion as ref
from labkit import fusion_study as study
from labkit.check import assert_matches
from labkit.record import experiment


def test_the_bill_by_hand():
    """The block's products and attention by the formula; the rest is what the pass says of them."""
    b = study.bill(8)
    weights = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) + 2 * 4096
    cache = 2 * 8 * study.KEYS * 8 * 128
    assert b.floor == 2 * (weights + cache + 2 * 8 * 4096)
    assert b.flops == 2 * 8 * weights + 4 * 8 * study.KEYS * 4096
    assert b.floor < b.fused[1] < b.eager[1] < 1.02 * b.floor
    assert b.fused[0] == 12
    times = study.ways_us(b)
    assert times["floor"] < times["fused, in a graph"] <= times["fused"] < times["eager, in a graph"] < times["eager"]
    gaps, traffic, total = study.megakernel(b)
    assert gaps == pytest.approx((12 * 32 - 1) * 1.3)
    assert 0 < traffic < gaps < total


def test_players_show_the_pass():
    report = study.bill(1).report
    html = study.folding_player(report, "t")
    states = report.states()
    assert html.text.startswith(f"t: {len(states)} frames.")
    texts = json.loads(html.html.split('<script type="application/json">')[1].split("</script>")[0])["texts"]
    assert texts[0] == f"As traced: {sum(row.launches for row in report.before)} launches."
    said = [int(t.split(" takes the place of ")[1].split()[0]) - 1 for t in texts[1:] if "takes" in t]
    assert sum(row.launches for row in report.before) - sum(said) == sum(row.launches for row in report.after)
    assert "batch" in study.bill_player((1, 8)).html
    figure = study.draw(report, name="fig-test", caption="c", alt="one two three four five")
    assert figure.png


def test_recorded_study_has_what_the_chapter_shows():
    sample = experiment("fusion").samples[0]
    assert set(sample["ops"]) == set(study.CPU_OPS)
    assert [int(m) for m in sample["block"]] == list(study.TOKENS)
    for times in (*sample["ops"].values(), *sample["block"].values()):
        assert len(times["eager"]) == len(times["compiled"]) == study.SAMPLES
        kernels, library = study.split_plan(times["plan"])
        assert kernels
        assert all("fused" not in call for call in library)


@pytest.mark.skipif(not study.has_compiler(), reason="no C++ compiler: torch.compile cannot build for the CPU")
def test_inductor_fuses_the_norm_into_one_kernel():
    inputs = [torch.ones(3, 64), torch.ones(3, 64), torch.ones(64)]
    compiled, plan = study.inductor_plan(ref.add_rmsnorm, *inputs)
    assert len(plan) == 1
    assert study.split_plan(plan)[1] == []
    assert_matches(compiled(*inputs), ref.add_rmsnorm, *inputs)


def test_processor_times():
    def slow(x):
        return [x.sin() for _ in range(30)]

    times = study.processor_us({"eager": slow, "compiled": torch.sin}, (torch.ones(20_000),), samples=3)
    assert [len(t) for t in times.values()] == [3, 3]
    assert study.gain(times) > 3, "thirty times the work"


@pytest.mark.parametrize("spelling", study.SPELLINGS)
def test_live_cell(spelling, device):
    said = study.try_spelling(spelling, "bfloat16", fusion, device)
    assert "output 0: ok" in said
    found = spelling not in ("eps outside the root", "the variance is used again")
    assert ("replaced: 1 rmsnorm" in said) is found
