"""What a user would pick instead: library calls to time the kernels against.

Each function is a `prepare` of `labkit.bench.Case`: it takes the inputs by name, does untimed whatever the library
wants done once (import, plan, another layout, compile), and returns a function without arguments. A library that is
missing, or that refuses the shape, raises; the row then names the reason.

Decoding: q [B, Hq, D]; k, v [B, L, Hkv, D]; kv_lens [B] int32. Every call returns o [B, Hq, D].
"""

import functools
import inspect
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def _heads_first(k, v, kv_lens):
    """k and v as [B, Hkv, L, D] views, cut to the one length that all sequences have.

    Cut, not masked: a mask would cost SDPA its fast backends.
    """
    lengths = set(kv_lens.tolist())
    if len(lengths) != 1:
        raise ValueError(f"kv_lens: got {len(lengths)} different lengths, expected one")
    length = lengths.pop()
    return k[:, :length].transpose(1, 2), v[:, :length].transpose(1, 2)


def naive(q, k, v, kv_lens):
    """Two matmuls and a softmax of fp32 scores; the cache is laid out as [B, Hkv, L, D], which suits them best."""
    shape, num_kv_heads, scale = q.shape, k.shape[2], q.shape[-1] ** -0.5
    k, v = (x.contiguous().flatten(0, 1) for x in _heads_first(k, v, kv_lens))  # [B * Hkv, L, D]
    q, k = q.unflatten(1, (num_kv_heads, -1)).flatten(0, 1), k.transpose(1, 2)  # [B * Hkv, group, D]

    def call():
        if q.is_cuda and q.dtype != torch.float32:  # factors of 16 bits, a product of 32: only CUDA has it
            scores = torch.bmm(q, k, out_dtype=torch.float32)
        else:
            scores = q.float() @ k.float()
        return (torch.softmax(scores * scale, -1).to(v.dtype) @ v).view(shape)

    return call


def sdpa(backend: SDPBackend | None, contiguous: bool = False):
    """`F.scaled_dot_product_attention` with one backend, or with what it chooses itself (None).

    contiguous: k and v laid out as [B, Hkv, L, D]. A backend is asked for in every call, which takes Python some time:
    None is what to compare with where the launch is timed as well.
    """

    def prepare(q, k, v, kv_lens):
        k, v = _heads_first(k, v, kv_lens)
        if contiguous:
            k, v = k.contiguous(), v.contiguous()
        q = q.unsqueeze(2)  # [B, Hq, 1, D]

        def call():
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).squeeze(2)

        return call if backend is None else sdpa_kernel(backend)(call)

    return prepare


@functools.lru_cache(maxsize=2)
def compiled(function, device, *key, mode=None):
    """torch.compile of a function for one set of shapes, the key; without the reset the ninth would run uncompiled."""
    if device == "cpu":  # the same call, but no compiler is needed to check it
        return function
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, mode=mode)


def flex_attention(q, k, v, **options):
    """FlexAttention compiled for q [B, Hq, 1, D] and k, v [B, Hkv, L, D]: its split-KV kernel for one query."""
    from torch.nn.attention.flex_attention import flex_attention

    key = (q.dtype, q.shape, k.shape, k.stride())
    function = compiled(flex_attention, q.device.type, *key, mode="max-autotune-no-cudagraphs")
    best = {"PRESCALE_QK": True, "ROWS_GUARANTEED_SAFE": True}  # every query sees a key
    return lambda: function(q, k, v, enable_gqa=True, kernel_options=best, **options).squeeze(2)


def flex_decoding(q, k, v, kv_lens):
    """FlexDecoding: compiled FlexAttention."""
    return flex_attention(q.unsqueeze(2), *_heads_first(k, v, kv_lens))


@functools.lru_cache(maxsize=1)
def _flashinfer_plan(
    q_starts, kv_lens, table, page_size, num_q_heads, num_kv_heads, head_dim, dtype, device, tensor_cores
):  # fmt: skip
    """A planned wrapper; tuples and the block table's bytes, so that all copies of the inputs share one plan."""
    import flashinfer

    workspace = torch.zeros(256 * 2**20, dtype=torch.uint8, device=device)
    rows = torch.frombuffer(bytearray(table), dtype=torch.int32).view(len(kv_lens), -1)
    counts = [-(-n // page_size) for n in kv_lens]
    first = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ids = torch.cat([row[:count] for row, count in zip(rows, counts)])
    last = torch.tensor([n - (count - 1) * page_size for n, count in zip(kv_lens, counts)], dtype=torch.int32)
    sizes = (first, ids.to(device), last, num_q_heads, num_kv_heads, head_dim, page_size)
    dtypes = dict(q_data_type=dtype, kv_data_type=dtype)
    if q_starts is None:
        options = dict(use_tensor_cores=tensor_cores, backend="fa2")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", **options)
        wrapper.plan(*sizes, **dtypes)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        wrapper.plan(torch.tensor(q_starts, dtype=torch.int32), *sizes, causal=True, **dtypes)
    return wrapper


def flashinfer_paged(q, k_pages, v_pages, block_table, kv_lens, q_starts=None, *, tensor_cores=True):
    """FlashInfer's FlashAttention-2 kernels over the same pages [P, page_size, Hkv, D], planned once.

    Its batch decode, on tensor cores or without, for one query a sequence; with q_starts [B + 1] its batch prefill, in
    which a decode is a chunk of one.
    """
    _, page_size, num_kv_heads, head_dim = k_pages.shape
    wrapper = _flashinfer_plan(
        None if q_starts is None else tuple(q_starts.tolist()), tuple(kv_lens.tolist()),
        block_table.cpu().contiguous().numpy().tobytes(), page_size, q.shape[1], num_kv_heads, head_dim, q.dtype,
        str(q.device), tensor_cores,
    )  # fmt: skip
    return lambda: wrapper.run(q, (k_pages, v_pages))


def flashinfer(q, k, v, kv_lens, **options):
    """FlashInfer's batch decode over a contiguous cache, seen as large pages. options: of `flashinfer_paged`."""
    batch, max_kv_len, num_kv_heads, head_dim = k.shape
    page_size = math.gcd(max_kv_len, 256)
    if page_size < 16:
        raise ValueError(f"k: got {max_kv_len} keys, expected a multiple of 16 to see them as pages")
    table = torch.arange(batch * max_kv_len // page_size, dtype=torch.int32).view(batch, -1)
    pages = (x.view(-1, page_size, num_kv_heads, head_dim) for x in (k, v))
    return flashinfer_paged(q, *pages, table, kv_lens, **options)


def varlen(q, k_pages, v_pages, block_table, kv_lens, q_starts=None, k_starts=None):
    """torch's own variable-length FlashAttention, causal, over pages [P, page_size, Hkv, D]. torch 2.11 takes none yet.

    q_starts [B + 1]: None for one query a sequence. k_starts [B + 1]: instead of pages, k_pages and v_pages [N, Hkv, D]
    hold one sequence after the other.
    """
    from torch.nn.attention.varlen import varlen_attn

    known, lens = inspect.signature(varlen_attn).parameters, kv_lens.tolist()
    if q_starts is None:
        q_starts = torch.arange(len(lens) + 1, dtype=torch.int32, device=q.device)
    longest = int(q_starts.diff().max()), max(lens)
    # One query sees all keys either way. Asked for a mask, FlashAttention would neither pack the heads of a group into
    # a tile nor split the keys.
    options = {"window_size": (-1, -1) if longest[0] == 1 else (-1, 0)}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    if k_starts is None:
        if "block_table" not in known:
            raise ValueError(f"varlen_attn of torch {torch.__version__} takes no block table")
        options |= dict(seqused_k=kv_lens, block_table=block_table)
    return lambda: varlen_attn(q, k_pages, v_pages, q_starts, k_starts, *longest, **options)


DECODE = {
    "naive torch": naive,
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA flash [B,H,L,D]": sdpa(SDPBackend.FLASH_ATTENTION, contiguous=True),
    "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA cuDNN [B,H,L,D]": sdpa(SDPBackend.CUDNN_ATTENTION, contiguous=True),
    "SDPA efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "SDPA math": sdpa(SDPBackend.MATH, contiguous=True),
    "FlexDecoding": flex_decoding,
    "FlashInfer": flashinfer,
}
# One query head a KV head makes no tile for a tensor core: its kernel without them may be the faster one.
DECODE_MHA = DECODE | {"FlashInfer, no tensor cores": functools.partial(flashinfer, tensor_cores=False)}
