"""Decoding with shared KV heads: what is saved when the query heads of a group read their keys and values together.

Both functions are Flash-Decoding and launch the same kernel; they differ in how many query heads a program takes.
"""

import torch

from kernels._tile import qk_scale, splits_or_default
from kernels.attention import attention  # noqa: F401  (prefill: timed beside them, under this topic's name)
from kernels.flash_decoding import flash_decoding, split_config, split_kernel, split_outputs
from labkit import args


def gqa_decoding(q, k, v, kv_lens, *, num_splits=None, sm_scale=None, heads=None):
    """Attention of one new token a sequence; a program takes `heads` query heads of a group, None: all of them.

    q [B, Hq, D]; k, v [B, L, Hkv, D], Hq a multiple of Hkv, any strides; fp16, bf16 or fp32; D up to 256.
    kv_lens [B] int32 on q's device: sequence b reads keys [0, kv_lens[b]). num_splits None leaves it to
    `labkit.splits.choose`; sm_scale > 0 defaults to D ** -0.5. heads must divide the group Hq / Hkv: every key and
    value is loaded group / heads times. None is `flash_decoding`, which loads them once (a large group in a few tiles,
    in fp32 or where heads are wide).

    Returns o [B, Hq, D] in q.dtype and lse [B, Hq] fp32 (natural log); a sequence without keys gives 0 and -inf.
    Raises ValueError naming the argument. Source: Ainslie et al. 2023 for the model; FlashAttention-2's packing of the
    group into the query tile for the kernel.
    """
    if heads is None:
        return flash_decoding(q, k, v, kv_lens, num_splits=num_splits, sm_scale=sm_scale)
    batch, num_q_heads, num_kv_heads, max_kv_len, head_dim = args.decode(q, k, v, kv_lens)
    args.num_splits(num_splits)
    group = num_q_heads // num_kv_heads
    args.expect(isinstance(heads, int) and heads > 0 and group % heads == 0, "heads", heads, f"a divisor of {group}")
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_q_heads, dtype=torch.float32, device=q.device)
    if batch == 0:
        return o, lse
    tiles = num_q_heads // heads  # programs of a sequence and split
    # The rule sees the programs that there are, so each version gets the splits that suit it.
    num_splits = splits_or_default(num_splits, batch * tiles, max_kv_len, head_dim)
    outputs, merge_splits = split_outputs(o, lse, num_splits)
    split_kernel[(num_splits, tiles, batch)](
        q, *q.stride(), k, *k.stride(), v, *v.stride(), kv_lens.contiguous(), *outputs,
        max_kv_len, num_splits, heads, qk_scale(sm_scale, head_dim),
        HEAD_DIM=head_dim, TILES=group // heads, **split_config(q.dtype, head_dim, heads),
    )  # fmt: skip
    merge_splits()
    return o, lse


def expanded_decoding(q, k, v, kv_lens, *, num_splits=None, sm_scale=None):
    """`gqa_decoding` with one program a query head: a group's keys and values are loaded once for each of its heads.

    For comparison: this is what a kernel does that was written for as many KV heads as query heads.
    """
    return gqa_decoding(q, k, v, kv_lens, num_splits=num_splits, sm_scale=sm_scale, heads=1)
