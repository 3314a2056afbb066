"""Attention in plain torch: what the kernels are checked against."""

import torch

from labkit import args, codegen


def _group_heads(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[..., Hq, D] -> [..., Hkv, group, D]: query head h reads KV head h // group, so a group is adjacent."""
    return x.unflatten(-2, (num_kv_heads, -1))


def masked_softmax(s: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of s over its last dimension where keep is True; also the natural log-sum-exp of every row.

    A row with nothing to keep gives p 0 and lse -inf.
    """
    s = s.masked_fill(~keep, float("-inf"))
    lse = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:-1], float("-inf"))
    p = torch.exp(s - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    return p, lse


def softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and softmax are at least fp32, also before they are scaled: fp16 ends at 65504. fp64 stays fp64."""
    return torch.promote_types(dtype, torch.float32)


def decode_attention(q, k, v, kv_lens, *, sm_scale=None):
    """One new token a sequence attends to its keys: o = softmax(sm_scale * q k^T) v.

    q [B, Hq, D]; k, v [B, L, Hkv, D], Hq a multiple of Hkv; fp16, bf16, fp32 or fp64. kv_lens [B] int32 on q's
    device: sequence b reads keys [0, kv_lens[b]). sm_scale defaults to D ** -0.5.

    Returns o [B, Hq, D] in q.dtype and lse [B, Hq], the natural log-sum-exp of the scaled scores, fp32 (fp64 for
    fp64). A sequence without keys gives o 0 and lse -inf. Raises ValueError naming the argument.
    """
    _, _, num_kv_heads, max_kv_len, dim = args.decode(q, k, v, kv_lens, dtypes=args.REFERENCE_FLOATS)
    keep = torch.arange(max_kv_len, device=q.device) < kv_lens[:, None]  # [B, L]
    k, v = (x.masked_fill(~keep[:, :, None, None], 0.0) for x in (k, v))  # what lies beyond kv_len may be NaN
    wide = softmax_dtype(q.dtype)
    s = torch.einsum("bhgd,blhd->bhgl", _group_heads(q, num_kv_heads).to(wide), k.to(wide)) * args.scale(sm_scale, dim)
    p, lse = masked_softmax(s, keep[:, None, None, :])
    o = torch.einsum("bhgl,blhd->bhgd", p.to(v.dtype), v)
    return o.flatten(1, 2), lse.flatten(1, 2)


def attention_mask(q_len, kv_lens, max_kv_len, *, causal=True, window=None, num_sinks=0):
    """[B, q_len, max_kv_len] bool, True where a key is kept. Aligned bottom-right: the last query sits on the last key.

    kv_lens [B]. window counts the token itself; the first num_sinks keys stay visible outside the window.
    """
    key = torch.arange(max_kv_len, device=kv_lens.device)
    position = kv_lens[:, None, None] - q_len + torch.arange(q_len, device=kv_lens.device)[:, None]  # [B, q_len, 1]
    keep = (key < kv_lens[:, None, None]).expand(-1, q_len, -1)
    if causal:
        keep = keep & (key <= position)
    if window is not None:
        keep = keep & ((key > position - window) | (key < num_sinks))
    return keep


def attention(q, k, v, *, causal=True, window=None, num_sinks=0, sm_scale=None, kv_lens=None):
    """Attention of a chunk of queries, as in prefill.

    q [B, T, Hq, D]; k, v [B, L, Hkv, D]; kv_lens [B] int32 on q's device, all L keys if None. The mask is aligned
    bottom-right: query i sits at position kv_lens - T + i. causal keeps keys up to that position; window (only with
    causal) keeps the last `window` of them, the token itself included, and the first num_sinks. A query that sees
    nothing gets 0. Returns o [B, T, Hq, D] in q.dtype. Raises ValueError naming the argument.
    """
    batch, q_len, _, num_kv_heads, max_kv_len, dim = args.prefill(
        q, k, v, kv_lens, causal, window, num_sinks, dtypes=args.REFERENCE_FLOATS
    )
    if kv_lens is None:
        kv_lens = torch.full((batch,), max_kv_len, dtype=torch.int32, device=q.device)
    keep = attention_mask(q_len, kv_lens, max_kv_len, causal=causal, window=window, num_sinks=num_sinks)
    valid = torch.arange(max_kv_len, device=q.device) < kv_lens[:, None]
    k, v = (x.masked_fill(~valid[:, :, None, None], 0.0) for x in (k, v))
    wide = softmax_dtype(q.dtype)
    s = torch.einsum("bthgd,blhd->bhgtl", _group_heads(q, num_kv_heads).to(wide), k.to(wide))
    s = s * args.scale(sm_scale, dim)
    p, _ = masked_softmax(s, keep[:, None, None])
    o = torch.einsum("bhgtl,blhd->bthgd", p.to(v.dtype), v)
    return o.flatten(2, 3)


def codegen_cases() -> list[codegen.Case]:
    """Prefill: each head_dim and dtype, ragged; one case with a window and sinks, one that is not causal."""

    def case(head_dim, dtype, name="", **options):
        kv = codegen.Tensor((1, 1024, 1, head_dim), dtype)
        tensors = dict(q=codegen.Tensor((1, 512, 4, head_dim), dtype), k=kv, v=kv)
        tensors["kv_lens"] = codegen.Tensor((1,), "int32", 1000)
        name = f"{dtype}, head_dim {head_dim}{name}"
        return codegen.Case("kernels.attention:attention", name, tensors | options, matrix=("_attention_kernel",))

    return [
        case(64, "float16"), case(128, "bfloat16"), case(192, "bfloat16"), case(256, "bfloat16"), case(256, "float32"),
        case(128, "bfloat16", ", window 256, 4 sinks", window=256, num_sinks=4),
        case(128, "float32", ", not causal", causal=False),
    ]  # fmt: skip
