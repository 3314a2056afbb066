"""Static, dynamic and continuous batching: the topic's names in one place, and attention over a ragged batch."""

import itertools
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from labkit import args, bench, codegen, peers
from labkit.attention import attention
from labkit.batching_study import experiments  # noqa: F401
from labkit.check import randn
from labkit.paged_attention import pad_tables, sequence_slots, to_pages
from labkit.scheduler import POLICIES, Batch, Request, Scheduler  # noqa: F401
from labkit.simulate import (  # noqa: F401
    TOY,
    LinearCost,
    RooflineCost,
    Trace,
    anyscale,
    capped_exponential,
    fit_cost,
    long_prompts,
    orca,
    simulate,
)


def ragged_attention(q, k_pages, v_pages, block_table, q_starts, kv_lens, *, sm_scale=None):
    """Causal attention of chunks of different lengths, one a sequence, over keys and values that lie in pages.

    q [N, Hq, D]: the queries of all sequences, one after the other; sequence b has those from q_starts[b] to
    q_starts[b + 1], perhaps none. k_pages, v_pages [P, page_size, Hkv, D]; fp16, bf16, fp32 or fp64. block_table
    [B, max_pages], q_starts [B + 1] and kv_lens [B] int32. kv_lens count the chunk, whose keys are in their pages
    already. The mask is aligned bottom-right: a sequence's last query sits on its last key. A query that sees no key
    gets 0. sm_scale defaults to D ** -0.5. Page ids beyond kv_len are never looked at.

    Returns o [N, Hq, D] in q.dtype. Raises ValueError naming the argument. Source: selective batching (Yu et al., OSDI
    2022, section 3.2): everything else in the model takes the flat tokens, attention takes a sequence at a time.
    """
    args.ragged(q, k_pages, v_pages, block_table, q_starts, kv_lens, dtypes=args.REFERENCE_FLOATS)
    num_pages, page_size = k_pages.shape[:2]
    o = torch.zeros_like(q)
    starts = q_starts.tolist()
    for b, (start, end) in enumerate(itertools.pairwise(starts)):
        slots = sequence_slots(block_table[b], kv_lens[b], page_size, num_pages)
        k, v = (x.flatten(0, 1)[slots][None] for x in (k_pages, v_pages))  # [1, kv_len, Hkv, D]
        o[start:end] = attention(q[start:end][None], k, v, sm_scale=sm_scale)[0]
    return o


@dataclass(frozen=True)
class RaggedCase:
    """One step. chunks: (queries, keys) of every sequence. Pages are in random order, and NaN where no key is."""

    name: str
    chunks: list[tuple[int, int]]
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 16
    sm_scale: float | None = None
    strided: bool = False
    num_splits: int | None = None

    def tensors(self, device="cpu", seed=0):
        """q [N, Hq, D], k_pages, v_pages [P, page_size, Hkv, D], block_table [B, max_pages], q_starts [B + 1],
        kv_lens [B]."""
        rng = np.random.default_rng(seed)
        q_lens, kv_lens = [q for q, _ in self.chunks], [n for _, n in self.chunks]
        q = randn(rng, sum(q_lens), self.num_q_heads, self.head_dim, dtype=self.dtype)
        shape = (len(kv_lens), max(kv_lens, default=0), self.num_kv_heads, self.head_dim)
        k, v = (randn(rng, *shape, dtype=self.dtype) for _ in "kv")
        order = rng.permutation(sum(-(-n // self.page_size) for n in kv_lens) + 2)
        k_pages, v_pages, block_table = to_pages(k, v, kv_lens, self.page_size, order)
        if self.strided:  # other strides everywhere, NaN in between
            q, k_pages, v_pages = (_spread(x) for x in (q, k_pages, v_pages))
        q_starts = torch.tensor([0, *np.cumsum(q_lens, dtype=int)], dtype=torch.int32)
        tensors = (q, k_pages, v_pages, block_table, q_starts, torch.tensor(kv_lens, dtype=torch.int32))
        return tuple(x.to(device) for x in tensors)


def _spread(x):
    """x as a view of a buffer with twice as many heads and numbers, NaN where it is not x."""
    wide = torch.full((*x.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    return wide[..., ::2, ::2].copy_(x)


# --- what the compiler makes of it


def codegen_cases():
    """A mixed step and a step of decodes only, whole and cut; dtypes, head_dims and groups one at a time; fp32 with a
    group of 64."""

    def step(name, q_lens, dtype="bfloat16", head_dim=128, group=4, page_size=16, **options):
        pages = codegen.Tensor((64, page_size, 8, head_dim), dtype)
        tensors = dict(q=codegen.Tensor((sum(q_lens), 8 * group, head_dim), dtype), k_pages=pages, v_pages=pages)
        starts = [sum(q_lens[:b]) for b in range(len(q_lens) + 1)]
        tensors["block_table"] = codegen.Tensor((len(q_lens), 16), "int32", 1)
        tensors["q_starts"] = codegen.Tensor((len(starts),), "int32", starts)
        tensors["kv_lens"] = codegen.Tensor((len(q_lens),), "int32", 16 * page_size)
        kernel = ("_ragged_kernel",)
        # Where a tile spans pages, an id of 4 bytes a key is loaded beside K and V; the wider pages gate those alone.
        narrow = kernel if page_size < 64 or page_size % 64 else ()
        return codegen.Case("kernels.batching:ragged_attention", name, tensors | options, matrix=kernel, narrow=narrow)

    mixed, decodes = [40, 1, 1], [1, 1, 1, 1]
    return [
        step("bf16, mixed", mixed),
        step("bf16, decodes", decodes),
        step("bf16, mixed, 2 splits", mixed, num_splits=2),
        step("bf16, decodes, 1 split", decodes, num_splits=1),
        step("fp16, mixed, page 64, group 8", mixed, "float16", group=8, page_size=64),
        step("bf16, mixed, page 1", mixed, page_size=1),
        step("bf16, mixed, page 100", mixed, page_size=100),
        step("bf16, mixed, head_dim 64, group 1", mixed, head_dim=64, group=1),
        step("bf16, mixed, head_dim 256, group 8", mixed, head_dim=256, group=8, page_size=256),
        step("bf16, mixed, group 64", mixed, group=64),
        step("bf16, decodes, group 64", decodes, group=64),
        step("fp32, mixed, page 32", mixed, "float32", page_size=32),
        step("fp32, decodes, page 32", decodes, "float32", page_size=32),
        step("fp32, mixed, head_dim 64, group 64", mixed, "float32", head_dim=64, group=64),
        step("fp32, mixed, group 64", mixed, "float32", group=64),
        step("fp32, decodes, head_dim 256, group 64", decodes, "float32", head_dim=256, group=64),
    ]


# --- benchmark cases

MIXED = "One step of Llama-3-8B: decodes of 2,048 keys and one chunk of a prompt, bf16, page 16"
PLAIN = "One step of Llama-3-8B of one kind, bf16, page 16"
LONG = "One step of Llama-3-8B with a long context, bf16, page 16"


def padded_sdpa(q, k_pages, v_pages, block_table, q_starts, kv_lens):
    """What one does without a ragged kernel: keys gathered, queries padded to the longest chunk, a mask, SDPA."""
    starts, (_, num_heads, head_dim) = q_starts.tolist(), q.shape
    q_lens, page_size = [end - start for start, end in pairwise(starts)], k_pages.shape[1]
    batch, longest, length = len(q_lens), max(q_lens), int(kv_lens.max())
    table = block_table[:, : -(-length // page_size)].clamp(min=0).long()
    row = torch.arange(longest, device=q.device)
    lens = torch.tensor(q_lens, device=q.device)
    real = row < lens[:, None]  # [B, longest]
    where = real.flatten().nonzero().flatten()
    position = kv_lens[:, None] - lens[:, None] + row  # [B, longest]
    keep = torch.arange(length, device=q.device) <= position[:, :, None]  # [B, longest, length]

    def call():
        padded = q.new_zeros(batch * longest, num_heads, head_dim)
        padded[where] = q
        k, v = (x[table].flatten(1, 2)[:, :length].transpose(1, 2) for x in (k_pages, v_pages))
        rows = padded.view(batch, longest, num_heads, head_dim).transpose(1, 2)
        o = F.scaled_dot_product_attention(rows, k, v, attn_mask=keep[:, None], enable_gqa=True)
        return o.transpose(1, 2).reshape(batch * longest, num_heads, head_dim)[where]

    return call


def one_by_one(q, k_pages, v_pages, block_table, q_starts, kv_lens):
    """SDPA a sequence at a time: Orca's selective batching before its attention was fused."""
    starts, lens, page_size = q_starts.tolist(), kv_lens.tolist(), k_pages.shape[1]
    tables = [block_table[b, : -(-n // page_size)].long() for b, n in enumerate(lens)]

    def call():
        parts = []
        for b, (start, end) in enumerate(pairwise(starts)):
            k, v = (x[tables[b]].flatten(0, 1)[None, : lens[b]].transpose(1, 2) for x in (k_pages, v_pages))
            mask = None if end - start == 1 else causal_lower_right(end - start, lens[b])
            rows = q[start:end].transpose(0, 1)[None]
            parts.append(F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(parts)

    return call


def varlen_packed(q, k_pages, v_pages, block_table, q_starts, kv_lens):
    """torch's variable-length FlashAttention without pages: keys packed one sequence after the other, untimed."""
    slots = [sequence_slots(*one, k_pages.shape[1], len(k_pages)) for one in zip(block_table, kv_lens)]
    k, v = (x.flatten(0, 1)[torch.cat(slots)] for x in (k_pages, v_pages))  # [sum of kv_lens, Hkv, D]
    k_starts = F.pad(kv_lens.cumsum(0, dtype=torch.int32), (1, 0))
    return peers.varlen(q, k, v, None, kv_lens, q_starts, k_starts)


PEERS = {
    "padded SDPA": padded_sdpa, "SDPA one by one": one_by_one, "FlashInfer": peers.flashinfer_paged,
    "torch varlen": peers.varlen, "torch varlen, packed": varlen_packed,
}  # fmt: skip


def step_case(name, chunks, *, section, tiny=False, num_q_heads=32, num_kv_heads=8, head_dim=128, page_size=16):
    """One step of an engine over pages in random order. tiny: the same case, small enough for the interpreter."""
    if tiny:
        chunks = [(min(q, 9), min(n, 40)) for q, n in chunks[-3:]]
        num_q_heads, num_kv_heads, head_dim = 4, 1, 64
    counts = [-(-n // page_size) for _, n in chunks]
    order = np.random.default_rng(0).permutation(sum(counts))  # the same for every copy of the inputs
    starts = np.cumsum([0, *counts])
    tables = [order[start:end].tolist() for start, end in pairwise(starts)]
    num_tokens = sum(q for q, _ in chunks)

    def make(generator, device):
        def randn(*shape):
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

        def ints(values):
            return torch.tensor([int(x) for x in values], dtype=torch.int32, device=device)

        return {
            "q": randn(num_tokens, num_q_heads, head_dim),
            "k_pages": randn(len(order), page_size, num_kv_heads, head_dim),
            "v_pages": randn(len(order), page_size, num_kv_heads, head_dim),
            "block_table": pad_tables(tables, device).clamp(min=0),
            "q_starts": ints(np.cumsum([0, *(q for q, _ in chunks)])),
            "kv_lens": ints(n for _, n in chunks),
        }

    elements = 2 * head_dim * (sum(n for _, n in chunks) * num_kv_heads + num_tokens * num_q_heads)  # k, v, q, o
    rows = len(chunks) * max(n for _, n in chunks) * num_q_heads  # of padded keys, repeated for every query head
    padded = 4 * rows * (3 * head_dim + max(q for q, _ in chunks)) / 1e9  # K, K scaled, V and scores, if in fp32
    too_large = {"padded SDPA": f"padded keys and scores take up to {padded:.0f} GB"} if padded > 20 else {}
    pairs = sum(q * n - q * (q - 1) // 2 for q, n in chunks)  # what the mask keeps
    return bench.Case(
        name, "ragged_attention", make, bytes=2 * elements + 4 * len(order), section=section, peers=PEERS,
        without=too_large, flops=4 * pairs * num_q_heads * head_dim,
    )  # fmt: skip


def cases(tiny=False) -> list[bench.Case]:
    """Steps as a chunked scheduler makes them, the two kinds of step that it mixes, alone, and long contexts."""
    decode = [(1, 2048)]
    mixed = {
        "32 decodes + chunk of 256": 32 * decode + [(256, 1024)],
        "32 decodes + chunk of 512": 32 * decode + [(512, 1024)],
        "64 decodes + chunk of 512": 64 * decode + [(512, 512)],
        "8 decodes + prompt of 2048": 8 * decode + [(2048, 2048)],
    }
    plain = {
        "64 decodes": 64 * decode,
        "prompt of 4096": [(4096, 4096)],
        "8 prompts of 512": 8 * [(512, 512)],
    }
    long = {
        "1 decode of 32768": [(1, 32768)],
        "1 decode of 32768 + chunk of 256": [(1, 32768), (256, 256)],
        "chunk of 64 after 32704": [(64, 32768)],
        "32 decodes, one of 32768": 31 * decode + [(1, 32768)],
        "32 decodes, one of 32768 + chunk of 256": [*31 * decode, (1, 32768), (256, 1024)],
        "8 decodes, one of 32768 + prompt of 2048": [*7 * decode, (1, 32768), (2048, 2048)],
    }
    sections = {MIXED: mixed, PLAIN: plain, LONG: long}
    result = [step_case(*one, section=name, tiny=tiny) for name, steps in sections.items() for one in steps.items()]
    cut = {"not split": {"num_splits": 1}}
    return [replace(case, variants=cut) if case.section == LONG else case for case in result]
