"""What a user would pick instead: library calls to time the kernels against.

Each function is a `prepare` of `labkit.bench.Case`: it takes the inputs by name, does untimed whatever the library
wants done once (import, plan, another layout, compile), and returns a function without arguments. A library that is
missing, or that refuses the shape, raises; the row then names the reason.

Decoding: q [B, Hq, D]; k, v [B, L, Hkv, D]; kv_lens [B] int32. Every call returns o [B, Hq, D].
"""

import functools
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
    """Two matmuls and a softmax; the cache is laid out as [B, Hkv, L, D], which suits them best."""
    k, v = (x.contiguous() for x in _heads_first(k, v, kv_lens))
    q = q.unflatten(1, (k.shape[1], -1))  # [B, Hkv, group, D]
    scale = q.shape[-1] ** -0.5

    def call():
        scores = q @ k.transpose(2, 3)
        return (torch.softmax(scores * scale, -1) @ v).flatten(1, 2)

    return call


def sdpa(backend: SDPBackend, contiguous: bool = False):
    """`F.scaled_dot_product_attention` with one backend. contiguous: k and v laid out as [B, Hkv, L, D]."""

    def prepare(q, k, v, kv_lens):
        k, v = _heads_first(k, v, kv_lens)
        if contiguous:
            k, v = k.contiguous(), v.contiguous()
        q = q.unsqueeze(2)  # [B, Hq, 1, D]

        def call():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).squeeze(2)

        return call

    return prepare


@functools.lru_cache(maxsize=1)
def _compiled_flex_attention(*shapes):
    """flex_attention compiled for one set of shapes; without the reset the ninth would silently run uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    if shapes[0] == "cpu":  # the same call, but no compiler is needed to check it
        return flex_attention
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")


def flex_decoding(q, k, v, kv_lens):
    """Compiled FlexAttention, which takes its split-KV kernel for one query a sequence."""
    k, v = _heads_first(k, v, kv_lens)
    q = q.unsqueeze(2)
    flex_attention = _compiled_flex_attention(q.device.type, q.dtype, q.shape, k.shape, k.stride())
    return lambda: flex_attention(q, k, v, enable_gqa=True).squeeze(2)


@functools.lru_cache(maxsize=1)
def _flashinfer_wrapper(lengths, page_size, max_pages, num_q_heads, num_kv_heads, head_dim, dtype, device):
    """A planned wrapper over caches [B, L, Hkv, D] seen as pages: sequence b has max_pages of them, in order."""
    import flashinfer

    workspace = torch.zeros(256 * 2**20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")
    pages = [-(-n // page_size) for n in lengths]
    first = torch.tensor([0, *pages], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ids = [b * max_pages + i for b, count in enumerate(pages) for i in range(count)]
    last = [n - (count - 1) * page_size for n, count in zip(lengths, pages)]
    wrapper.plan(
        first, torch.tensor(ids, dtype=torch.int32, device=device), torch.tensor(last, dtype=torch.int32),
        num_q_heads, num_kv_heads, head_dim, page_size, q_data_type=dtype, kv_data_type=dtype,
    )  # fmt: skip
    return wrapper


def flashinfer(q, k, v, kv_lens):
    """FlashInfer's batch decode on tensor cores (its FlashAttention-2 kernels), planned once, over large pages."""
    _, max_kv_len, num_kv_heads, head_dim = k.shape
    page_size = math.gcd(max_kv_len, 256)
    if page_size < 16:
        raise ValueError(f"k: got {max_kv_len} keys, expected a multiple of 16 to see them as pages")
    wrapper = _flashinfer_wrapper(
        tuple(kv_lens.tolist()), page_size, max_kv_len // page_size, q.shape[1], num_kv_heads, head_dim, q.dtype,
        str(q.device),
    )  # fmt: skip
    pages = tuple(x.view(-1, page_size, num_kv_heads, head_dim) for x in (k, v))
    return lambda: wrapper.run(q, pages)


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
