"""What to use when: what each technique takes away, when it pays, what it costs, and how it is switched on.

Numbers are computed, or read from the records of `make experiments`; names of options were looked up in the versions
that `SYSTEMS` names. "none": looked for, and not found. An empty cell: not looked up.
"""

import re
from functools import cache
from html import escape

from labkit import flash_decoding_pp, fusion_study, gqa, splits, step_model, summary
from labkit.gpus import GPUS
from labkit.show import cards
from labkit.step_map import CHAPTERS

STEP = dict(model="Llama-3-8B", device="H200", context=8192, batch=64)  # as on the page of one step
HEAD = ("technique", "takes away", "pays when", "loses when", "costs in quality")
# chapter: what it takes away, when it pays, when it loses, what it costs. {names} are keys of `numbers()`.
ROWS = {
    1: ("idle SMs: {sms} of {all_sms} read, at batch 1", "few sequences, long contexts",
        "there are programs enough without it", "nothing but rounding"),
    2: ("padding: {rows} of a tile are tokens, batch 8; the wait for a maximum",
        "small batches; scores in a known range", "scores leave the range, and rows are computed twice",
        "nothing but rounding, if guarded"),
    3: ("launches: {launches} in a layer; activations on their way through memory", "small batches, small models",
        "the matrix products take the time", "nothing but rounding"),
    4: ("weights: {weights} in a step with 2:4", "small batches, and kernels that know the pattern",
        "many tokens; zeros in a dense weight are read all the same",
        "{pruned} (2:4 by SparseGPT, the lab's model)"),
    5: ("a part of the model, whichever you choose", "a small model is needed, and there is a large one to learn from",
        "training time is short and text is plenty",
        "{student} (half the layers, after a short training, the lab's model)"),
    6: ("old keys and values: {kept} in a step", "endless streams, of which only the recent part matters",
        "what was dropped is asked for", "whatever left the window is forgotten"),
    7: ("keys and values: {token} per token", "long contexts, large batches",
        "the cache is small beside the weights; one KV head on many GPUs",
        "none for a model trained so; {grouped} for one converted and tuned (4 of 8 heads, the lab's model)"),
    8: ("reserved, empty memory: {fit} sequences fit", "lengths vary and nobody knows them; common beginnings",
        "all lengths are known and equal", "nothing"),
    9: ("rows of a batch that nobody reads: {useful} are useful", "many requests of different lengths",
        "all requests are equally long, or there is one", "nothing but rounding"),
    10: ("all of it together: {engine} the tokens per second of transformers' generate, on a CPU",
         "many requests at a time", "one request alone", "nothing but rounding"),
}  # fmt: skip

SYSTEMS = {  # name: version
    "vLLM": "0.33.0", "SGLang": "0.5.23", "TensorRT-LLM": "1.4.0rc", "llama.cpp": "in llama-cpp-python 0.3.36",
    "transformers": "5.24.0",
}  # fmt: skip
# chapter: for each of SYSTEMS what to switch on, in Markdown's `code`. "on": it is so without an option. "none": there
# is none. "": not looked up.
STUDENT = "no option: a model like any other"
OPTIONS = {
    1: ("on; `--attention-backend`", "on; `--decode-attention-backend`, for Triton `--triton-attention-num-kv-splits`",
        "", "on by itself; `--flash-attn`", "`attn_implementation`"),
    2: ("none", "none", "", "none", "none"),
    3: ("on, `-O2`; `--compilation-config`", "graphs on; `--enable-torch-compile`", "`torch_compile_config`", "",
        "`use_kernels`, `fusion_config`"),
    4: ("2:4 checkpoints are refused", "2:4 checkpoints are refused", "", "", "none"),
    5: (STUDENT, STUDENT, STUDENT, STUDENT, STUDENT),
    6: ("", "for a drafter: `--speculative-draft-sink-size`", "`sink_token_length`, `max_attention_window`",
        "`--context-shift --keep N`", "`SinkCache`, removed in 5"),
    7: ("on, from the model", "on, from the model", "on, from the model", "on, from the model", "on, from the model"),
    8: ("on; `--block-size`, `--enable-prefix-caching`",
        "on; `--page-size`; prefixes too, unless `--disable-radix-cache`",
        "on; `tokens_per_block`, `enable_block_reuse`", "`--kv-unified`, `--cache-reuse`",
        "`ContinuousBatchingConfig`: `page_size`, `allow_block_sharing`"),
    9: ("on; `--max-num-seqs`, `--max-num-batched-tokens`", "on; `--chunked-prefill-size`, `--enable-mixed-chunk`",
        "on; `enable_chunked_prefill`, `capacity_scheduler_policy`", "on; `--parallel`, `--ubatch-size`",
        "`generate_batch`; `transformers serve --continuous-batching`"),
    10: ("`--async-scheduling`", "on, unless `--disable-overlap-schedule`", "", "",
         "`use_async_batching`, `use_cuda_graph`"),
}  # fmt: skip
DRAFTS = ("10_engine", "Speculative decoding, in one page")  # chapter, section: a small model drafts
DRAFT_OPTIONS = (
    "`--speculative-config`", "`--speculative-algorithm STANDALONE`",
    "`speculative_config`: `DraftTargetDecodingConfig` (1.3.0rc29)", "`--model-draft`", "`assistant_model`",
)  # fmt: skip


_ARROW = "\N{NO-BREAK SPACE}\N{RIGHTWARDS ARROW}\N{NO-BREAK SPACE}"


@cache
def numbers():
    """{name: text} for ROWS: arithmetic of one step, and what the CPU experiments found."""

    def of(name, **switches):
        return step_model.step(**STEP, **switches)[name]

    def pair(before, after, unit=""):
        texts = (f"{x:,.1f}".removesuffix(".0") for x in (before, after))
        return f"{_ARROW.join(texts)}\N{NO-BREAK SPACE}{unit}".rstrip()

    model, gpu = gqa.MODELS[STEP["model"]], GPUS[STEP["device"]]
    programs = model.num_kv_heads * splits.choose(model.num_kv_heads, gpu.num_sms, STEP["context"], model.head_dim)
    bill = fusion_study.bill(STEP["batch"], STEP["context"])
    found = {e.name: e.samples[0] for e in summary.experiments()}
    dense, teacher = found["pruning"]["dense"], found["distillation"]["teacher"]["bits"]
    sparse = {(row["pattern"], row["method"]): row["bits"] for row in found["pruning"]["model"]}["2:4", "SparseGPT"]
    students = {(s["student"], s["first"], s["loss"]): s["bits"] for s in found["distillation"]["students"]}
    heads = {run["heads"]: run for run in found["gqa"]["runs"] if run["how"] == "mean"}
    run = found["engine"]["transformers"]
    best = max(other["tokens/s"] for other in run["transformers"].values())
    return {
        "sms": pair(model.num_kv_heads, min(programs, gpu.num_sms)),
        "all_sms": gpu.num_sms,
        "rows": pair(*(100 * flash_decoding_pp.utilisation(8, pad) for pad in (64, 8)), "%"),
        "launches": pair(bill.eager[0], bill.fused[0]),
        "weights": pair(*((of("read", pruned=p) - of("used")) / 1e9 for p in (False, True)), "GB"),
        "kept": pair(*(of("used", streaming=s) / 1e9 for s in (False, True)), "GB"),
        "token": pair(*(of("kv_token", gqa=g) / 1e3 for g in (False, True)), "kB"),
        "fit": pair(*(of("largest", paged=p) for p in (False, True))),
        "useful": pair(*(100 * of("useful", continuous=c) for c in (False, True)), "%"),
        "engine": f"{run['engine']['tokens/s'] / best:.1f} times",
        "pruned": _bits(dense, sparse),
        "student": _bits(teacher, students["shallow", "alternate", "KD, T=1"]),
        "grouped": _bits(heads[8]["before"], heads[4]["after"]),
    }


def _bits(before, after):
    return f"{before:.2f}{_ARROW}{after:.2f} bits per byte"


def weights_share(model, batches, contexts):
    """{(batch, context): the share of a step's bytes that are weights}, whether it fits into a GPU or not."""
    m = gqa.MODELS[model]
    weights, token = 2 * m.read_params, 4 * m.num_layers * m.num_kv_heads * m.head_dim
    return {(b, n): weights / (weights + b * n * token) for b in batches for n in contexts}


def techniques():
    """A line per chapter: its name as HTML, and the texts of ROWS with their numbers."""
    for chapter, texts in ROWS.items():
        yield _link(chapter), [escape(text.format(**numbers())) for text in texts]


def options():
    """A line per chapter, and one for drafting: its name as HTML, and what each of SYSTEMS is told."""
    for chapter, texts in OPTIONS.items():
        yield _link(chapter), [_code(text) for text in texts]
    file, section = DRAFTS
    anchor = re.sub(r"\W+", "-", section.lower())
    yield f'<a href="{file}.html#{anchor}">10 Speculative decoding</a>', [_code(text) for text in DRAFT_OPTIONS]


def table(head, lines):
    """A table that turns into cards on a narrow screen."""
    return cards([escape(heading) for heading in head], [[first, *cells] for first, cells in lines])


def _link(chapter):
    file, title = CHAPTERS[chapter]
    return f'<a href="{file}.html">{chapter} {escape(title)}</a>'


def _code(text):
    parts = escape(text).split("`")
    breaks = [re.sub(r"(?<=\w)([-_])", r"\1<wbr>", part) for part in parts]  # inside of a name, not before it
    breaks = [re.sub(r"(?<=[a-z])(?=[A-Z])", "<wbr>", part) for part in breaks]
    breaks = [re.sub(r"(?<!\w)(--?\w+)", r"<span>\1</span>", part) for part in breaks]
    return "".join(f"<code>{part}</code>" if i % 2 else parts[i] for i, part in enumerate(breaks))
