"""Trials: one change to a kernel each, what it should do and why, and what it did.

A kernel gets fast by trials. Each says beforehand how much the change should gain; then it is measured. What the
compiler makes of it is known without a GPU, and settles some trials at once: what spills or does not fit is out.

`make tune` compiles all trials for the H200 into `results/trials.json` and, on a GPU, measures them into
`results/<gpu>/trials.json`. The page "The tuning log" shows both beside the predictions.
"""

import html
import importlib
from dataclasses import dataclass, field, replace

from labkit import bench, codegen, what_runs
from labkit.comparison import Comparison
from labkit.provenance import source_hash
from labkit.record import RESULTS, toolchain
from labkit.show import html_table

FILE = RESULTS / "trials.json"
TARGET = "sm_90"  # the GPU whose anchors the kernels are held against
CHANGED = "changed"
BLOCKS = ("constexprs", "num_warps", "num_stages")
FACTS = ("kernel", *BLOCKS, "registers", "spills", "shared", "shared_limit", "programs_per_sm")
FACTS += ("loops", "waits", "matrix", "dots")


@dataclass(frozen=True)
class Trial:
    """name: the change, in a few words; unique.

    topic, case: the line of the topic's benchmark that it is timed on. options: keyword arguments of the kernel.
    rules: block rules changed, as `labkit.rules.changed` takes them.
    gain: (least, most) predicted of time as it is / time with the change; None: the compiler should rule it out.
    because: the reason for the prediction, a sentence or two.
    compiled: which codegen case of the function is compiled, by name; "" the first one.
    launch: which of its launches the change is about. The first one works; a merge may follow.
    """

    name: str
    topic: str
    case: str
    gain: tuple[float, float] | None
    because: str
    options: dict = field(default_factory=dict)
    rules: dict = field(default_factory=dict)
    compiled: str = ""
    launch: int = 0


def _decode(name, gain, because, values=None, case="Llama-3-8B B=8 L=8192", **options):
    rules = {"kernels.flash_decoding:split_config": values} if values else {}
    return Trial(f"decode: {name}", "flash_decoding", case, gain, because, options, rules)


def _paged(name, gain, because, values=None, case="B=8 L=8192 page 16", **options):
    rules = {"kernels.paged_attention:split_config": values} if values else {}
    return Trial(f"pages: {name}", "paged_attention", case, gain, because, options, rules)


def _flat(name, gain, because, values, case="flat QKV M=8"):
    rules = {"kernels.flash_decoding_pp:flat_config": values}
    return Trial(f"flat GEMM: {name}", "flash_decoding_pp", case, gain, because, {}, rules)


def _gemv(name, gain, because, values, case="gemv FFN1 M=1"):
    rules = {"kernels.flash_decoding_pp:gemv_config": values}
    return Trial(f"gemv: {name}", "flash_decoding_pp", case, gain, because, {}, rules)


def _prefill(name, gain, because, values):
    rules = {"kernels.attention:prefill_config": values}
    case, compiled = "prefill, 16,384 tokens", "bfloat16, head_dim 128"
    return Trial(f"prefill: {name}", "gqa", case, gain, because, {}, rules, compiled)


TRIALS = (
    _decode("128 keys a tile", (0.85, 1.0), "The double tile leaves room for one program an SM. While it starts and "
            "ends, nobody reads.", {"BLOCK_N": 128}),
    _decode("32 keys a tile", (0.9, 1.02), "Half as many bytes on their way, still more than the memory needs. Twice "
            "the turns of the loop.", {"BLOCK_N": 32}),
    _decode("two stages", (0.85, 1.0), "One tile on its way instead of two, and the products wait for it.",
            {"num_stages": 2}),
    _decode("four stages", (0.95, 1.02), "Two programs an SM with two tiles each have 128 KiB on their way, several "
            "times what the memory needs. More does not help.", {"num_stages": 4}),
    _decode("8 warps", (0.95, 1.02), "Memory decides. More warps only share the same few products.", {"num_warps": 8}),
    _decode("twice the splits", (0.9, 1.0), "At batch 1 the rule fills two programs an SM. More splits make a second "
            "wave and a longer merge.", case="Llama-3-8B B=1 L=8192", num_splits=64),
    _decode("half the splits", (0.8, 1.0), "One program an SM instead of two.", case="Llama-3-8B B=1 L=8192",
            num_splits=16),
    _decode("one launch", (1.02, 1.2), "The second launch costs a microsecond or so, of about a dozen.",
            case="Llama-3-8B B=1 L=8192", one_launch=True),
    _decode("one launch, 1,024 keys", (1.05, 1.4), "The same microsecond, of fewer.", case="Llama-3-8B B=1 L=1024",
            one_launch=True),
    _decode("16 splits for 8, 1,024 keys", (1.0, 1.1), "Programs of one tile each: half of the walk, and a merge of "
            "twice as many parts that is short either way.", case="Llama-3-8B B=1 L=1024", num_splits=16),
    Trial("decode: merge with 4 warps", "flash_decoding", "Llama-3-8B B=1 L=8192", (0.85, 1.0), "The splits of a head "
          "then meet in shared memory, 16 lanes to a bank: some hundred cycles of a short launch.",
          rules={"kernels.flash_decoding:merge_config": {"num_warps": 4}}, launch=1),
    Trial("decode: merge 32 splits at a time", "flash_decoding", "Llama-3-8B B=1 L=131072", (1.0, 1.05), "The splits "
          "of a head are read in half as many turns, each of which waits for the L2 cache.",
          rules={"kernels.flash_decoding:merge_config": {"BLOCK_S": 32}}, launch=1),
    _decode("split in two, 64 sequences", (0.97, 1.04), "512 programs are 1.3 waves of three an SM. Halves end more "
            "evenly, and have to be merged.", case="Llama-3-8B B=64 L=8192", num_splits=2),
    Trial("unified: with the running maximum", "flash_decoding_pp", "unified B=16 L=8192", (0.95, 1.0), "The maximum "
          "and the rescaling are hidden behind the reads.", {"synchronised": True}),
    Trial("unified: 8 warps", "flash_decoding_pp", "unified B=16 L=8192", (0.95, 1.02), "Memory decides.",
          rules={"kernels.flash_decoding_pp:unified_config": {"num_warps": 8}}),
    _flat("16 tokens a tile for 8", (0.95, 1.03), "The weights are most of the bytes. The padding costs products that "
          "nobody waits for.", {"BLOCK_M": 16}),
    _flat("64 tokens a tile for 8", (0.9, 1.0), "As before, and x takes shared memory from w.", {"BLOCK_M": 64}),
    _flat("two stages", (0.75, 0.97), "One tile of w on its way instead of three.", {"num_stages": 2}),
    _flat("64 of K a tile", (0.9, 1.02), "Rows of 128 bytes instead of 256, and twice the turns.", {"BLOCK_K": 64}),
    _flat("K cut into five", (0.85, 0.98), "320 programs where 264 run at a time: the last 56 have the memory to "
          "themselves, and cannot keep it busy.", {"SPLIT_K": 5}, case="flat O M=8"),
    _flat("K not cut", (0.4, 0.8), "64 tiles for 132 SMs: half of the GPU has no work.", {"SPLIT_K": 1},
          case="flat O M=8"),
    _gemv("two stages", (0.8, 0.97), "A loop without a dot waits for every tile unless more are on their way.",
          {"STAGES": 2}),
    _gemv("three stages, 4,096 rows", (1.0, 1.1), "Four stages let seven programs into an SM, so that 1,024 of them "
          "are more than one wave. Three let nine in.", {"STAGES": 3}, case="gemv FFN2 M=1"),
    _gemv("six stages", (0.97, 1.05), "Three tiles of 8 KiB are on their way in each program already.",
          {"STAGES": 6}),
    _gemv("8 rows a tile", (0.9, 1.05), "Twice the bytes on their way in each program, half as many programs.",
          {"BLOCK_N": 8}),
    _gemv("512 of K a tile", (0.9, 1.02), "Rows of 1 KiB instead of 2, and twice the turns.", {"BLOCK_K": 512}),
    Trial("gate, up: 4 rows a tile", "fusion", "norm, gate, up, SwiGLU, M=1", (0.95, 1.08), "Twice the bytes on their "
          "way in each program; x is read half as often.", rules={"kernels.fusion:gate_up_config": {"BLOCK_N": 4}}),
    Trial("norm: 16 warps, one token", "fusion", "add_rmsnorm [1, 4096]", (0.95, 1.1), "A single program: more warps "
          "ask for the row at once, and have more to sum up.", rules={"kernels.fusion:row_config": {"num_warps": 16}}),
    Trial("softmax: 4,096 of a row a tile", "fusion", "softmax [256, 131072]", (0.85, 1.0), "Half as much on its way "
          "in each thread, and twice the turns.", rules={"kernels.fusion:softmax_config": {"BLOCK_N": 4096}},
          compiled="bfloat16, [64, 131072]"),
    Trial("softmax: 16,384 of a row a tile, 16 warps", "fusion", "softmax [256, 131072]", (1.05, 1.3), "The loop waits "
          "for each tile. A tile of twice the size has twice as much on its way.",
          rules={"kernels.fusion:softmax_config": {"BLOCK_N": 16384, "num_warps": 16}},
          compiled="bfloat16, [64, 131072]"),
    Trial("norm: 4 warps, 2,048 tokens", "fusion", "add_rmsnorm [2048, 4096]", (0.95, 1.05), "Enough rows to keep "
          "memory busy either way.", rules={"kernels.fusion:row_config": {"num_warps": 4}}),
    Trial("2:4: K not cut", "pruning", "2:4 gate M=8", (0.8, 1.0), "224 programs where 660 find room: each SM then "
          "expands for one or two tiles at a time, and waits.", rules={"kernels.pruning:config_24": {"SPLIT_K": 1}},
          compiled="bfloat16, M=16 [4096, 4096]"),
    Trial("2:4: four stages", "pruning", "2:4 gate M=8", (0.98, 1.08), "The compressed tiles are small. One more fits.",
          rules={"kernels.pruning:config_24": {"num_stages": 4}}, compiled="bfloat16, M=16 [4096, 4096]"),
    Trial("2:4: 256 of K a tile", "pruning", "2:4 gate M=8", (0.9, 1.05), "Wider rows, fewer turns, and half as many "
          "programs in an SM.", rules={"kernels.pruning:config_24": {"BLOCK_K": 256}},
          compiled="bfloat16, M=16 [4096, 4096]"),
    Trial("2:4: 128 rows a tile", "pruning", "2:4 gate M=8", (0.95, 1.05), "x is expanded into the order of the matrix "
          "unit half as often: a few instructions less.",
          rules={"kernels.pruning:config_24": {"BLOCK_N": 128, "num_warps": 8}},
          compiled="bfloat16, M=16 [4096, 4096]"),
    Trial("2:4: 8 tokens a tile for 8", "pruning", "2:4 gate M=8", (0.95, 1.1), "No padding, and the matrix unit's "
          "older instruction: fewer registers, and no wait for a group of warps.",
          rules={"kernels.pruning:config_24": {"BLOCK_M": 8, "NEIGHBOURS": 4}},
          compiled="bfloat16, M=16 [4096, 4096]"),
    Trial("distillation: 8,192 logits a tile", "distillation", "forward KL, vocabulary 128,256", (0.95, 1.05),
          "Twice the threads walk along a row: as much on its way in an SM, in half as many programs.",
          rules={"kernels.distillation:distillation_config": {"BLOCK_V": 8192, "num_warps": 16}}),
    Trial("distillation: 8,192 logits, 4 warps", "distillation", "forward KL, vocabulary 128,256", None, "64 logits a "
          "thread of each model, in fp32, do not fit into its registers.",
          rules={"kernels.distillation:distillation_config": {"BLOCK_V": 8192, "num_warps": 4}}),
    _paged("id read in place", (0.8, 0.97), "A load that waits for another load cannot be fetched ahead as far: one "
           "tile on its way instead of two.", read_ahead=False),
    _paged("id read in place, five stages", (0.95, 1.02), "More stages give back what the load in the loop took.",
           {"num_stages": 5}, read_ahead=False),
    _paged("four stages", (0.95, 1.03), "As without pages: two tiles are enough.", {"num_stages": 4}),
    _paged("8 warps, 64 sequences", (0.97, 1.1), "512 programs are 1.3 waves. In the last one the time of a tile "
           "counts, and twice the warps halve it.", {"num_warps": 8}, case="B=64 L=2048 page 16"),
    Trial("pages: keys not split, a ragged batch", "paged_attention", "page 16", (0.8, 1.0), "The longest sequence has "
          "four times the keys of the mean. While it ends, most SMs have no work.", {"num_splits": 1}),
    Trial("pages: each in three pieces, a ragged batch", "paged_attention", "page 16", (0.9, 1.0), "Short sequences "
          "are cut, too: programs of a few tiles, each with its start and its end.", {"num_splits": 3}),
    Trial("GQA: one query head a program", "gqa", "B=16 L=4096, 8 KV heads", (0.3, 0.9), "Four programs read the same "
          "keys. The L2 cache takes a part of it away.", {"heads": 1}),
    Trial("stream: 64 keys a tile", "streaming_llm", "B=8 sinks 4 + window 1020", (0.85, 1.0), "The angles lie beside "
          "the keys, so the double tile leaves room for one program an SM.",
          rules={"kernels.streaming_llm:sink_config": {"BLOCK_N": 64}}),
    _prefill("4 warps", None, "A tile of 128 queries and 128 numbers each, in fp32, is 128 registers a thread before "
             "anything else.", {"num_warps": 4}),
    _prefill("without the TMA", (0.75, 0.95), "Addresses take instructions and registers: tiles of 64 keys instead of "
             "128, and 1.6 times the instructions for a key.", {"TMA": False, "BLOCK_N": 64, "num_stages": 3}),
    Trial("prefill: without the TMA, 2,048 tokens", "gqa", "prefill, 8 KV heads", (0.8, 1.05), "Every program writes "
          "two descriptors before it starts, and has an eighth of the keys to gain from them.", {},
          {"kernels.attention:prefill_config": {"TMA": False, "BLOCK_N": 64, "num_stages": 3}},
          "bfloat16, head_dim 128"),
    _prefill("64 keys a tile", (0.8, 0.97), "The output is rescaled for every tile, so twice as often, and the two "
             "halves of the program meet twice as often.", {"BLOCK_N": 64}),
    _prefill("two programs an SM", (0.7, 1.1), "While one computes its softmax the other multiplies. But 64 queries "
             "fetch every key that 128 fetched, and the L2 cache may not deliver that.",
             {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}),
    _prefill("two stages", (0.75, 0.95), "A tile is asked for when the one before it is multiplied with its values, "
             "and that product alone is shorter than the fetch of 64 KiB.", {"num_stages": 2}),
    Trial("ragged: 32 keys a tile", "batching", "32 decodes + chunk of 512", (0.8, 1.0), "The output is rescaled twice "
          "as often: a fifth more instructions for a key.", rules={"kernels.batching:ragged_config": {"BLOCK_N": 32}}),
    Trial("ragged: keys not split, one decode", "batching", "1 decode of 32768", (0.1, 0.25), "Eight programs for 132 "
          "SMs: 124 have no work.", {"num_splits": 1}, compiled="bf16, decodes"),
    Trial("ragged: keys not split, a chunk", "batching", "chunk of 64 after 32704", (0.15, 0.35), "Sixteen programs "
          "for 132 SMs. Seven times as many, and the merge of 64 rows.", {"num_splits": 1},
          compiled="bf16, mixed, 2 splits"),
    Trial("ragged: keys split in two, a full step", "batching", "32 decodes + chunk of 512", (0.8, 1.0), "There is a "
          "program for every SM, and more. Each half reads the same queries, and all rows pass through memory twice "
          "more, in fp32.", {"num_splits": 2}),
)  # fmt: skip


def bench_case(trial, tiny=False):
    """The line of the benchmark with the change as its only variant, under the trial's name."""
    case = next(case for case in bench.topic_cases(trial.topic, tiny=tiny) if case.name == trial.case)
    variant = trial.options | ({"rules": trial.rules} if trial.rules else {})
    return replace(case, name=trial.name, section=trial.topic, peers={}, without={}, variants={CHANGED: variant})


def ops_of(trial):
    """The module with the kernels of the trial's topic, by its name: nothing here imports the kernels."""
    return importlib.import_module(f"kernels.{trial.topic}")


def function_of(trial):
    """The kernel that a trial is about, "module:name", where it is defined."""
    kernel = getattr(ops_of(trial), bench_case(trial, tiny=True).op)
    return f"{kernel.__module__}:{kernel.__name__}"


def file_of(trial):
    """The name of the file under `kernels/` that a trial's kernel stands in."""
    return function_of(trial).partition(":")[0].partition(".")[2]


def pair_of(trial):
    """The codegen case of the kernel as it is, and with the change."""
    function = function_of(trial)
    known = [case for case in codegen.cases(function.partition(":")[0].split(".")[1]) if case.function == function]
    case = next(case for case in known if trial.compiled in ("", case.name))
    return case, replace(case, name=trial.name, arguments=case.arguments | trial.options, rules=trial.rules)


# ---- what the compiler makes of them


def compile_trials(trials=TRIALS):
    """Compile every trial for `TARGET`, as it is and changed; return what `save` writes."""
    pairs = {trial.name: pair_of(trial) for trial in trials}
    cases = {(case.function, case.name): case for pair in pairs.values() for case in pair}
    found = {}
    for row in codegen.compiled(list(cases.values()), (TARGET,)):
        facts = {"error": row["error"]} if "error" in row else {fact: row[fact] for fact in FACTS}
        found.setdefault((row["function"], row["case"]), []).append(facts)
    rows = {}
    for trial in trials:
        case, changed = pairs[trial.name]
        rows[trial.name] = {"function": case.function, "case": case.name, "source_hash": digest(trial)}
        of_each = {"as_is": found[case.function, case.name], CHANGED: found[case.function, changed.name]}
        rows[trial.name] |= {name: launches[min(trial.launch, len(launches) - 1)] for name, launches in of_each.items()}
    return toolchain() | {"target": TARGET, "trials": rows}


def digest(trial):
    """Hash of the kernel and the change: it differs once what was compiled is not what stands here."""
    return source_hash(function_of(trial), extra=[trial.options, trial.rules])


def save(compiled, path=FILE):
    """Write what `compile_trials` returned."""
    what_runs.save(compiled, path)


def load(path=FILE):
    """What `save` wrote."""
    return what_runs.load(path)


def ruled_out(facts):
    """Why nobody needs to time this: a sentence, or ""."""
    if "error" in facts:
        return "does not compile"
    if facts["shared"] > facts["shared_limit"]:
        return f"needs {facts['shared']:,} bytes of shared memory, there are {facts['shared_limit']:,}"
    if facts["spills"]:
        return f"spills ({facts['spills']} spilled loads and stores)"
    return codegen.SERIALISED if codegen.serialised(facts) else ""


# ---- what was measured


def measure(trial, machine, tiny=False):
    """Check the trial's kernel with and without the change, and time both in turn; rows for the record."""
    rows = bench.measure(trial.topic, bench_case(trial, tiny), ops_of(trial), machine)
    return [replace(row, topic="trials") for row in rows]


class Log:
    """Every trial with its prediction, what the compiler made of it, and what was measured, if it was."""

    def __init__(self, compiled, rows, trials=None):
        """compiled: from `load`. rows: measured, from `labkit.record`. trials: all of them if None."""
        trials = TRIALS if trials is None else trials
        self.trials, self.compiled = {trial.name: trial for trial in trials}, compiled
        self.files = {trial.name: file_of(trial) for trial in trials}
        cases = [bench_case(trial) for trial in trials]
        hashes = [bench.hashes([case], ops_of(trial)) for trial, case in zip(trials, cases)]
        self.measured = Comparison("trials", cases, rows, {key: one[key] for one in hashes for key in one})
        self.stale = [t.name for t in trials if compiled["trials"].get(t.name, {}).get("source_hash") != digest(t)]

    def gain(self, name):
        """Time as it is / time with the change; None where it was not measured."""
        return self.measured.ratio(name, self.measured.cases[name].op, CHANGED)

    def foreseen(self, name):
        """Whether it came as predicted; None while that is open."""
        trial, gain = self.trials[name], self.gain(name)
        out = bool(ruled_out(self.compiled["trials"][name][CHANGED]))
        if out or trial.gain is None:
            return out == (trial.gain is None)
        least, most = trial.gain
        return None if gain is None else least <= gain <= most

    def outcome(self, name):
        """What came of a trial, in words."""
        foreseen, gain = self.foreseen(name), self.gain(name)
        if foreseen is None:
            row = self.measured.row(name, CHANGED)
            return row.verdict if row else "open"
        words = "as predicted" if foreseen else "not as predicted"
        why = ruled_out(self.compiled["trials"][name][CHANGED])
        if why or self.trials[name].gain is None:
            return f"{words}: {why or 'the compiler has nothing against it'}"
        tie = self.measured.is_tie(name, CHANGED)
        return f"{gain:.2f}, {words}: {'a tie' if tie else 'faster' if gain > 1 else 'slower'}"

    def lines(self, file):
        """Header and a line per trial of a kernel file: change and case, reason, prediction, compiled, outcome."""
        lines = [["change, measured on", "because", "predicted gain", f"compiled for {TARGET}", "outcome"]]
        for name, trial in self.trials.items():
            if self.files[name] == file:
                compiled = self.compiled["trials"][name]
                predicted = f"{trial.gain[0]:.2f}\N{EN DASH}{trial.gain[1]:.2f}" if trial.gain else "ruled out"
                facts = _difference(compiled["as_is"], compiled[CHANGED])
                change = f"{name.partition(': ')[2]}\n{trial.case}"
                lines.append([change, trial.because, predicted, facts, self.outcome(name)])
        return lines

    def headings(self):
        """The files under `kernels/` that the trials are about. Prefill is timed by the topic gqa, and has its own."""
        return list(dict.fromkeys(self.files.values()))

    def tally(self):
        """{"as predicted" | "not as predicted" | "open": how many}"""
        found = [self.foreseen(name) for name in self.trials]
        words = {"as predicted": True, "not as predicted": False, "open": None}
        return {word: found.count(value) for word, value in words.items()}

    def __repr__(self):
        lines = [line for file in self.headings() for line in self.lines(file)]
        return "\n".join(" | ".join(cell.replace("\n", ", ") for cell in line) for line in lines)

    def _repr_html_(self):
        widths = "".join(f'<col style="width: {width}%">' for width in (25, 30, 12, 20, 13))
        style = "white-space: normal; table-layout: fixed; width: 100%; min-width: 40rem"
        parts = []
        for file in self.headings():
            head, *body = ([html.escape(cell).replace("\n", "<br>") for cell in line] for line in self.lines(file))
            table = html_table(head, body, style=style, columns=f"<colgroup>{widths}</colgroup>")
            parts.append(f"<p><strong>{file}</strong></p>{table}")
        return "".join(parts)


def main_loop(facts):
    """Instructions a byte of the first loop, as text: a loop over whole tiles comes before the rest. "-": the TMA's."""
    return next((f"{count:.1f}" for count in codegen.per_byte(facts)), "-")


def _difference(as_is, changed):
    """What the change did to the compiled kernel, a line each: "registers 87 -> 128", "programs / SM 3 -> 1"."""
    if "error" in as_is or "error" in changed:
        return changed.get("error", "") or as_is["error"]
    arrow = "{} {} \N{RIGHTWARDS ARROW} {}"
    names = {"registers": "registers", "shared": "shared KiB", "programs_per_sm": "programs / SM"}
    names |= {"per_byte": "instr. / byte"}
    shown = [
        {**facts, "shared": codegen.kib(facts["shared"]), "per_byte": main_loop(facts)} for facts in (as_is, changed)
    ]
    changes = [key for key in names if shown[0][key] != shown[1][key]]
    lines = [arrow.format(names[key], *(facts[key] for facts in shown)) for key in changes]
    return "\n".join(lines) or "the same resources"
