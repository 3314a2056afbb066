"""Exercises of chapter 09. The docstrings are the tasks."""

from itertools import accumulate, pairwise

import numpy as np
import torch

from labkit.exercises import device, exercise, expect, kernel_exercise
from labkit.scheduler import Batch, Request, Scheduler
from labkit.simulate import Trace


@exercise(
    hints=[
        "The budget is spent in a fixed order: decodes, the prompt that is unfinished, new prompts.",
        "A decode costs one token. A prompt gets what it still needs or what is left, whichever is less.",
        "Stop when nothing is left: a chunk of 0 tokens is no chunk.",
    ],
    bugs=[
        ("left = budget - num_decodes", "left = budget", "decodes cost nothing"),
        ("chunk = min(need, left)", "chunk = need", "prompts are never cut"),
        ("if left == 0:", "if left < 0:", "chunks of no token"),
        ("left -= chunk", "left -= 1", "a chunk costs one token"),
    ],
)
def pack_step(num_decodes, needs, budget):
    """One step of chunked prefill (Sarathi-Serve's Algorithm 3).

    num_decodes: running requests that decode, at most budget. needs: tokens that each prompt still
    has to compute, the unfinished one first, then those that wait. budget: tokens per step. Returns
    the list of chunks, one for each prompt that gets one, in order.
    """
    # >>> your code
    left = budget - num_decodes
    chunks = []
    for need in needs:
        if left == 0:
            break
        chunk = min(need, left)
        chunks.append(chunk)
        left -= chunk
    # <<< your code
    return chunks


@pack_step.case("a long prompt is cut")
def _(fn):
    expect(fn(4, [100], 32), [28], "chunks")


@pack_step.case("what is left goes to the next prompt")
def _(fn):
    expect(fn(2, [5, 3, 50], 16), [5, 3, 6], "chunks")


@pack_step.case("nothing is left after the decodes")
def _(fn):
    expect(fn(8, [5, 3], 8), [], "chunks")


@pack_step.case("prompts that just fit, and no more")
def _(fn):
    expect(fn(0, [8, 8, 8], 16), [8, 8], "chunks")


@pack_step.case("the scheduler does the same")
def _(fn):
    s = Scheduler("chunked", 99, 4, max_batch=8, max_tokens=12)
    for i, prompt_len in enumerate((4, 4, 30, 7)):
        s.add(Request(i, 0.0, prompt_len, 50))
    left = [30, 7]
    s.step()
    left[0] -= 4  # beside the first two prompts
    for _ in range(4):
        batch, needs = s.step(), [n for n in left if n]
        expect(fn(len(batch.decode), needs, 12), [n for _, _, n in batch.prefill], f"chunks for {needs}")
        for i, _, n in batch.prefill:
            left[i - 2] -= n


@exercise(
    hints=[
        "What was generated is not lost: its keys and values are.",
        "After a preemption the prompt to compute is the old prompt and all that was generated.",
        "How much is still to come is counted from what was generated in all, not since the preemption.",
    ],
    bugs=[
        ("to_compute = prompt_len + generated", "to_compute = prompt_len", "the generated tokens are forgotten"),
        ("to_generate = max_new_tokens - generated", "to_generate = max_new_tokens", "counts anew: extra tokens"),
        ("to_compute = prompt_len + generated", "to_compute = prompt_len + generated - 1", "one too few"),
    ],
)
def after_preemption(prompt_len, generated, max_new_tokens):
    """What is left to do for a request that lost its pages after it had generated some tokens.

    Returns (to_compute, to_generate): how many tokens its next prefill computes, and how many new
    tokens it may still generate.

    A published scheduler moves the generated tokens into the prompt, sets the count of generated
    tokens to 0 and then compares that count with max_new_tokens. Yours must not.
    """
    # >>> your code
    to_compute = prompt_len + generated
    to_generate = max_new_tokens - generated
    # <<< your code
    return to_compute, to_generate


@after_preemption.case("preempted after 5 of 8 tokens")
def _(fn):
    expect(fn(4, 5, 8), (9, 3), "(to_compute, to_generate)")


@after_preemption.case("preempted before the first token")
def _(fn):
    expect(fn(10, 0, 3), (10, 3), "(to_compute, to_generate)")


@after_preemption.case("the scheduler does the same")
def _(fn):
    s = Scheduler("continuous", 5, 4, max_batch=2, max_tokens=99, watermark=0)
    for name in "ab":
        s.add(Request(name, 0.0, 4, 8))
    counts, seen = {"a": 0, "b": 0}, None
    while batch := s.step():
        if batch.preempted:
            seen = counts["b"]
        for _, _, n in batch.prefill if seen is not None else ():
            expect(fn(4, seen, 8), (n, 8 - seen), "(to_compute, to_generate)")
        for id in (*batch.decode, *batch.ending):
            counts[id] += 1


@exercise(
    hints=[
        "What a reservation costs is known at once: the prompt and all that may be generated, in whole pages.",
        "A request holds ceil(tokens / page_size) pages.",
        "Under paging a request holds on average its prompt and half of what it really generates.",
    ],
    bugs=[
        ("-(-(prompt_len + max_new_tokens)", "-(-(prompt_len + output_len)", "reserves what it cannot know"),
        ("-(-(prompt_len + max_new_tokens) // page_size)", "((prompt_len + max_new_tokens) // page_size)", "floor"),
        ("prompt_len + output_len // 2", "prompt_len + output_len", "counts the end, not the middle"),
        ("prompt_len + output_len // 2", "prompt_len + output_len / 2", "half a token takes a page"),
    ],
)
def concurrent(num_pages, page_size, prompt_len, max_new_tokens, output_len):
    """How many equal requests fit into the memory: (reserved, paged).

    reserved: each gets pages for its prompt and max_new_tokens when it starts. paged: each holds,
    on average over its life, its prompt and half of the output_len tokens that it really
    generates, rounded down to tokens.
    """
    # >>> your code
    reserved = num_pages // -(-(prompt_len + max_new_tokens) // page_size)
    paged = num_pages // -(-(prompt_len + output_len // 2) // page_size)
    # <<< your code
    return reserved, paged


@concurrent.case("OPT-13B on 40 GB, 512 + 1536 tokens allowed, 128 used")
def _(fn):
    expect(fn(981, 16, 512, 1536, 128), (7, 27), "(reserved, paged)")


@concurrent.case("sizes that do not fill their last page")
def _(fn):
    expect(fn(10, 4, 3, 2, 2), (5, 10), "(reserved, paged)")
    expect(fn(10, 4, 3, 3, 3), (5, 10), "(reserved, paged) for an odd output_len")


@exercise(
    hints=[
        "The time to the first token is not a time between tokens.",
        "np.diff of a request's token times gives its gaps; those of all requests go into one list.",
        "The 99th percentile is taken over all gaps, not over the requests' means.",
    ],
    bugs=[
        ("in token_times.values()", "in list(token_times.values())[:1]", "looks at one request only"),
        ("pairwise(times)", "pairwise(times[1:])", "the first gap is lost"),
        ("np.percentile(gaps, 99)", "np.mean(gaps)", "the mean hides the stall"),
    ],
)
def p99_gap(token_times):
    """The 99th percentile, as numpy computes it, of the time between tokens, over all gaps.

    token_times: {id: when each of its tokens was there, seconds}, as in `Trace.token_times`; some
    may be empty.
    """
    # >>> your code
    gaps = [b - a for times in token_times.values() for a, b in pairwise(times)]
    result = float(np.percentile(gaps, 99))
    # <<< your code
    return result


@p99_gap.case("two requests, one stall")
def _(fn):
    expect(fn({"a": [0.0, 1.0, 2.0, 3.0], "b": [2.0, 3.0, 13.0], "c": []}), 9.64, "p99")


@p99_gap.case("the trace says the same")
def _(fn):
    times = {i: [0.1 * i + 0.02 * j * j for j in range(1, i + 3)] for i in range(9)}
    trace = Trace({}, times, {}, [(0.0, 1.0, Batch())], [0], [], 1.0)
    expect(fn(times), float(np.percentile(trace.gaps(), 99)), "p99")


@p99_gap.case("the first gap counts")
def _(fn):
    expect(fn({"a": [0.0, 5.0, 6.0], "b": [1.0, 2.0, 3.0]}), 4.88, "p99")


@kernel_exercise(
    hints=[
        "Tile `pid` belongs to the last sequence b with q_starts[b] // BLOCK_Q + b <= pid. It is its tile number "
        "pid - (q_starts[b] // BLOCK_Q + b).",
        "The last query of the chunk has position kv_len - 1, the one before it one less: bottom-right.",
        "A tile may have more rows than its chunk has queries. They belong to the next sequence: store nothing there.",
    ],
    bugs=[
        ("kv_len - (q_end - query)", "query - q_start", "top-left: as if no key had been there before the chunk"),
        ("key[None, :] <= position", "key[None, :] < position", "a query does not see its own key"),
        ("+ i <= pid", "+ i < pid", "the first tile of a sequence goes to the one before it"),
        ("(pid - (q_start // BLOCK_Q + b))", "(pid - q_start // BLOCK_Q)", "partial tiles are not counted"),
        (", (query < q_end)[:, None]", ", query[:, None] >= 0", "the neighbour's rows: compiled code tells"),
    ],
)
def ragged_mask(
    q_starts_ptr, kv_lens_ptr, keep_ptr, batch,
    BLOCK_Q: "tl.constexpr", KEYS: "tl.constexpr",
):
    """keep[i, n] = 1 where query i sees key n of its sequence, else 0: causal, bottom-right.

    q_starts [B + 1]: sequence b has the queries q_starts[b] to q_starts[b + 1], perhaps none.
    kv_lens [B] include them. keep [N, KEYS] int8. Sequence b has the programs from
    q_starts[b] // BLOCK_Q + b on, with BLOCK_Q queries each; some are left over.
    """
    pid, key = tl.program_id(0), tl.arange(0, KEYS)
    # >>> your code
    b = 0
    for i in range(1, batch):
        b = tl.where(tl.load(q_starts_ptr + i) // BLOCK_Q + i <= pid, i, b)
    q_start, q_end = tl.load(q_starts_ptr + b), tl.load(q_starts_ptr + b + 1)
    query = q_start + (pid - (q_start // BLOCK_Q + b)) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    kv_len = tl.load(kv_lens_ptr + b)
    position = kv_len - (q_end - query)
    keep, mask = key[None, :] <= position[:, None], (query < q_end)[:, None]
    tl.store(keep_ptr + query[:, None] * KEYS + key, keep.to(tl.int8), mask=mask)
    # <<< your code


def _masks(fn, chunks, block):
    """chunks: (queries, keys) of each sequence."""
    starts = [0, *accumulate(n for n, _ in chunks)]
    want = [[n <= kv_len - (count - i) for n in range(64)] for count, kv_len in chunks for i in range(count)]
    room = torch.full((starts[-1] + 4 * block, 64), -1, dtype=torch.int8, device=device())
    q_starts = torch.tensor(starts, dtype=torch.int32, device=device())
    kv_lens = torch.tensor([n for _, n in chunks], dtype=torch.int32, device=device())
    fn[(starts[-1] // block + len(chunks),)](q_starts, kv_lens, room, len(chunks), BLOCK_Q=block, KEYS=64)
    expect(room[: starts[-1]].cpu(), torch.tensor(want, dtype=torch.int8), "keep")


@ragged_mask.case("a prompt, a decode and a chunk")
def _(fn):
    _masks(fn, [(17, 17), (1, 50), (9, 40)], 16)


@ragged_mask.case("an empty chunk in the middle, tiles that just fill")
def _(fn):
    _masks(fn, [(3, 3), (0, 9), (8, 30), (16, 64)], 8)
