"""Trials: each one changes what it says, stays right, and its outcome is told as it was. Block rules come back."""

import importlib
from dataclasses import replace

import pytest

import kernels
import kernels.__main__ as program
from labkit import bench, record, trials
from labkit.rules import changed
from labkit.trials import CHANGED, TRIALS, Log, Trial, bench_case, measure, ruled_out

PLANTED_BUGS = [
    ("labkit/trials.py", 'if trial.gain else "ruled out"', 'if not trial.gain else "ruled out"'),
    ("labkit/rules.py", "return chosen | values", "return chosen"),
    ("labkit/rules.py", "undo.callback(setattr, module, function, rule)", "pass"),
    ("labkit/rules.py", "set(values) - set(chosen)", "set(values) - set(values)"),
    ("labkit/bench.py", "with changed(rules):\n        return call()", "return call()"),
    ("labkit/bench.py", '{"rules": rules} if rules else {}', "{}"),
    ("labkit/codegen.py", 'with changed(case["rules"]):', "with changed({}):"),
    ("labkit/codegen.py", "key += [case.rules] if case.rules else []", "pass"),
    ("labkit/trials.py", "arguments=case.arguments | trial.options, rules", "rules"),
    ("labkit/trials.py", 'return f"spills ({facts[\'spills\']}', 'return "" and f"({facts[\'spills\']}'),
    ("labkit/trials.py", "least <= gain <= most", "least <= gain"),
    ("labkit/trials.py", "return function_of(trial).partition(\":\")[0].partition(\".\")[2]", "return trial.topic"),
    ("labkit/trials.py", "extra=[trial.options, trial.rules]", "extra=[trial.options]"),
    ("labkit/trials.py", "'a tie' if tie else", "'a tie' if not tie else"),
    ("labkit/trials.py", "self.measured.ratio(name, self.measured.cases[name].op, CHANGED)", "self.measured.ratio(name, CHANGED)"),
]
SPLIT_CONFIG = "kernels.flash_decoding:split_config"


def ops(topic):
    return importlib.import_module(f"kernels.{topic}")


def test_a_rule_is_changed_and_comes_back():
    module = ops("flash_decoding")
    rule = module.split_config
    import torch

    as_is = rule(torch.bfloat16, 128, 4)
    with changed({SPLIT_CONFIG: {"BLOCK_N": 8, "num_warps": 1}}):
        assert module.split_config(torch.bfloat16, 128, 4) == as_is | {"BLOCK_N": 8, "num_warps": 1}
    assert module.split_config is rule
    with pytest.raises(RuntimeError), changed({SPLIT_CONFIG: {"BLOCK_N": 8}}):
        raise RuntimeError
    assert module.split_config is rule


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({SPLIT_CONFIG: {"num_warps": 8}, "kernels.flash_decoding:no_rule": {}}, "no_rule"),
        ({SPLIT_CONFIG: {"BLOCK_Q": 8}}, r"got \['BLOCK_Q'\]"),
    ],
)
def test_a_rule_that_is_not_there(rules, words):
    import torch

    module = ops("flash_decoding")
    rule = module.split_config
    with pytest.raises(ValueError, match=words), changed(rules):
        module.split_config(torch.bfloat16, 128, 4)
    assert module.split_config is rule


def test_trials_say_what_they_expect():
    names = [trial.name for trial in TRIALS]
    assert len(set(names)) == len(names)
    for trial in TRIALS:
        assert trial.gain is None or 0 < trial.gain[0] < trial.gain[1], trial.name
        assert len(trial.because.split()) > 1
        assert trial.options or trial.rules, f"{trial.name} changes nothing"
    assert bench_case(TRIALS[0]).name == TRIALS[0].name, "recorded under the name of the trial"


def test_every_trial_is_compiled_and_differs():
    """The record holds all trials, and a changed rule changed what was compiled. Fresh or not, its page says."""
    compiled = trials.load()["trials"]
    assert set(compiled) == {trial.name for trial in TRIALS}
    for trial in TRIALS:
        as_is, other = compiled[trial.name]["as_is"], compiled[trial.name][CHANGED]
        if trial.rules and "error" not in other and set(trial.rules) != {"kernels.flash_decoding_pp:flat_config"}:
            assert [as_is[key] for key in trials.BLOCKS] != [other[key] for key in trials.BLOCKS], trial.name


def test_a_trial_compiled_anew():
    """One that the compiler rules out, through a rule, and one that takes another kernel, through an argument."""
    chosen = [next(t for t in TRIALS if t.name == name) for name in ("prefill: 4 warps", "decode: one launch")]
    compiled = trials.compile_trials(chosen)["trials"]
    spilling, launch = compiled.values()
    assert spilling["as_is"]["num_warps"] == 8
    assert spilling[CHANGED]["num_warps"] == 4
    assert not ruled_out(spilling["as_is"])
    assert "spills" in ruled_out(spilling[CHANGED])
    assert [launch[key]["kernel"] for key in ("as_is", CHANGED)] == ["split_kernel", "_one_launch_kernel"]


@pytest.mark.parametrize("topic", sorted({trial.topic for trial in TRIALS}))
def test_trials_stay_right(topic, device):
    """The kernel with the change passes the rule of correctness, like every variant."""
    machine = bench.Machine(device, record.stamp(device))
    for trial in TRIALS:
        if trial.topic == topic:
            for row in measure(trial, machine, tiny=True):
                assert row.verdict.startswith("ok"), f"{trial.name}, {row.provider}: {row.verdict}"
                assert row.case == trial.name
                assert row.topic == "trials"


def test_a_trial_that_breaks_the_kernel_is_not_timed(device):
    """A tile of 0 keys does not run; the verdict says so, and the kernel as it is is judged all the same."""
    trial = Trial("t", "flash_decoding", "Llama-3-8B B=1 L=1024", (1.0, 2.0), "-", rules={SPLIT_CONFIG: {"BLOCK_N": 0}})
    as_is, broken = measure(trial, bench.Machine(device, record.stamp(device)), tiny=True)
    assert as_is.verdict.startswith("ok")
    assert broken.verdict.startswith("not run")


FACTS = {"kernel": "k", "constexprs": {}, "num_warps": 4, "num_stages": 3, "registers": 80, "spills": 0,
         "shared": 1000, "shared_limit": 2000, "programs_per_sm": 3, "loops": [[80, 40, 0]], "waits": 1,
         "matrix": {"HGMMA": 8}, "dots": [[64, 64, 64, "bf16"]]}  # fmt: skip


def log_of(trial, us=(), facts=FACTS):
    """The log of one trial; us: medians as it is and changed."""
    case = bench_case(trial)
    rows = []
    hashes = bench.hashes([case], ops(trial.topic))
    for provider, time in zip((case.op, CHANGED), us):
        shared = {**record.stamp("GPU"), "source_hash": hashes[case.name, provider]}
        rows.append(record.Row("trials", case.name, provider, True, [time] * 5, 1, 0.0, "ok: -", "graph", **shared))
    compiled = {"trials": {trial.name: {"as_is": FACTS, CHANGED: facts, "source_hash": trials.digest(trial)}}}
    return Log(compiled, rows, [trial])


@pytest.mark.parametrize(
    ("us", "outcome", "tally"),
    [
        ((10.0, 9.5), "1.05, as predicted: faster", (1, 0, 0)),
        ((10.0, 10.05), "1.00, as predicted: a tie", (1, 0, 0)),
        ((10.0, 8.0), "1.25, not as predicted: faster", (0, 1, 0)),
        ((10.0, 12.5), "0.80, not as predicted: slower", (0, 1, 0)),
        ((), "open", (0, 0, 1)),
    ],
)
def test_outcomes(us, outcome, tally):
    log = log_of(replace(TRIALS[0], gain=(0.95, 1.1)), us)
    assert log.outcome(TRIALS[0].name) == outcome
    assert tuple(log.tally().values()) == tally
    assert not log.stale
    assert log.lines("flash_decoding")[1][2] == "0.95\N{EN DASH}1.10"
    assert outcome in log._repr_html_()
    assert outcome in repr(log)


@pytest.mark.parametrize(
    ("gain", "facts", "outcome"),
    [
        (None, {"spills": 7}, "as predicted: spills (7 spilled loads and stores)"),
        (None, {}, "not as predicted: the compiler has nothing against it"),
        ((0.9, 1.1), {"shared": 3000}, "not as predicted: needs 3,000 bytes of shared memory, there are 2,000"),
        ((0.9, 1.1), {"error": "no"}, "not as predicted: does not compile"),
        (None, {"waits": 8}, "as predicted: waits for every wgmma before it starts the next"),
    ],
)
def test_what_the_compiler_rules_out(gain, facts, outcome):
    log = log_of(replace(TRIALS[0], gain=gain), (10.0, 9.0), facts if "error" in facts else FACTS | facts)
    assert log.outcome(TRIALS[0].name) == outcome
    assert log.lines("flash_decoding")[1][2] == ("0.90\N{EN DASH}1.10" if gain else "ruled out")


def test_what_the_change_did_to_the_kernel():
    other = FACTS | {"registers": 90, "loops": [[120, 40, 0], [160, 40, 0]]}
    line = log_of(TRIALS[0], (), other).lines("flash_decoding")[1]
    assert line[3] == "registers 80 \N{RIGHTWARDS ARROW} 90\ninstr. / byte 2.0 \N{RIGHTWARDS ARROW} 3.0"
    assert log_of(TRIALS[0]).lines("flash_decoding")[1][3] == "the same resources"


def test_prefill_has_a_heading_of_its_own():
    """Its trials are timed by the topic gqa, and stand under the file of their kernel."""
    compiled = trials.load()
    log = Log(compiled, [], [t for t in TRIALS if t.topic in ("gqa", "batching")])
    assert log.headings() == ["gqa", "attention", "batching"]
    assert [line[0].splitlines()[0] for line in log.lines("gqa")[1:]] == ["one query head a program"]
    prefill = [t.name for t in TRIALS if t.name.startswith("prefill: ")]
    assert [line[1] for line in log.lines("attention")[1:]] == [log.trials[name].because for name in prefill]
    assert log._repr_html_().count("<strong>") == 3


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """`make tune` over two trials on small sizes; returns a function that says which GPU there is, and what was to be
    compiled ahead: other processes would not know of the small sizes.
    """
    ahead = []
    monkeypatch.setattr(program, "compile_ahead", lambda jobs, seconds: ahead.append(jobs))
    two = tuple(t for t in TRIALS if t.name in ("decode: 32 keys a tile", "flat GEMM: 16 tokens a tile for 8"))
    monkeypatch.setattr(trials, "TRIALS", two)
    monkeypatch.setattr(trials, "compile_trials", lambda: trials.load(trials.FILE))
    monkeypatch.setattr(trials, "save", lambda compiled: None)
    monkeypatch.setattr(trials, "bench_case", lambda trial, tiny=False: bench_case(trial, tiny=True))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "measure_ceilings", lambda topic, machine: [])

    def timer(calls, graph=True):
        calls[0]()
        return lambda: [2.0, 2.0], "graph"

    def use(name):
        machine = name and bench.Machine(kernels.DEVICE, record.stamp(name), timer)
        monkeypatch.setattr(bench, "this_gpu", lambda: machine)
        monkeypatch.setattr(bench.timing, "num_copies", lambda size: 1)
        return ahead

    return use


def test_tune_on_a_gpu(tuning, tmp_path, capsys):
    ahead = tuning("Test GPU")
    assert program.main(["tune"]) == 0
    assert ahead == [[("trials", 0), ("trials", 1)]]
    rows = record.load(tmp_path / "test-gpu" / "trials.json")
    assert [(row.case, row.provider, row.ran) for row in rows] == [
        ("decode: 32 keys a tile", "flash_decoding", True),
        ("decode: 32 keys a tile", CHANGED, True),
        ("flat GEMM: 16 tokens a tile for 8", "flat_gemm", True),
        ("flat GEMM: 16 tokens a tile for 8", CHANGED, True),
    ]
    assert capsys.readouterr().out.count("1.00, as predicted: a tie") == 2
    assert program.main(["tune"]) == 0
    assert len(record.load(tmp_path / "test-gpu" / "trials.json")) == 4, "measured again, not added"


def test_tune_what_is_missing(tuning, tmp_path, monkeypatch, capsys):
    ahead = tuning("Test GPU")
    path, measured, measure = tmp_path / "test-gpu" / "trials.json", [], trials.measure
    monkeypatch.setattr(trials, "measure", lambda trial, *rest, **how: measured.append(trial.name) or measure(trial, *rest, **how))
    program.main(["tune"])
    first, second = (trial.name for trial in trials.TRIALS)
    record.save([row for row in record.load(path) if (row.case, row.provider) != (second, CHANGED)], path)
    assert program.main(["tune", "--missing"]) == 0
    assert measured == [first, second, second]
    assert ahead[1:] == [[("trials", 1)]]
    assert len(record.load(path)) == 4
    capsys.readouterr()
    assert program.main(["tune", "--missing"]) == 0
    assert measured == [first, second, second]
    assert capsys.readouterr().out.count("1.00, as predicted: a tie") == 2, "what was measured before is in the log"


def test_tune_without_a_gpu(tuning, tmp_path, capsys):
    tuning(None)
    assert program.main(["tune"]) == 0
    assert capsys.readouterr().out.count("| open") == 2
    assert program.main(["tune", "--dry"]) == 0
    assert not list(tmp_path.iterdir())


def test_tune_says_when_a_trial_is_wrong(tuning, monkeypatch, capsys):
    tuning(None)
    broken = replace(TRIALS[0], rules={SPLIT_CONFIG: {"BLOCK_N": 0}})
    monkeypatch.setattr(trials, "TRIALS", (broken,))
    assert program.main(["tune", "--dry"]) == 1
    assert "changed not run" in capsys.readouterr().out


def test_an_old_compilation_is_noticed():
    trial = TRIALS[0]
    log = log_of(trial)
    other = Log(log.compiled, [], [replace(trial, rules={SPLIT_CONFIG: {"BLOCK_N": 99}})])
    assert other.stale == [trial.name]


def test_hash_knows_the_rule():
    case = bench_case(TRIALS[0])
    hashes = bench.hashes([case], ops(TRIALS[0].topic))
    assert len(set(hashes.values())) == 2, "with and without the change"
    assert kernels.DEVICE in ("cpu", "cuda")
