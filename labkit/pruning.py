"""Pruning: leave weights out, and know which. The names of the topic, and what is compiled, timed and recorded.

`labkit.masks`: magnitude, n of m, Wanda. `labkit.sparsegpt`: SparseGPT. `labkit.llm_pruner`: whole heads and channels.
`labkit.prune`: a model, block by block. `labkit.sparse24`: 2:4 weights in memory. `labkit.pruning_study`: experiments.
"""

import contextlib

import torch
import torch.nn.functional as F

from labkit import bench, codegen
from labkit.flash_decoding_pp import flat_gemm, gemv
from labkit.llm_pruner import llm_pruner, recover
from labkit.masks import InputNorm, magnitude_mask, nm_mask, wanda_mask, wanda_score
from labkit.prune import prune
from labkit.sparse24 import matmul_24, pack_24, unpack_24
from labkit.sparsegpt import Hessian, sparsegpt

__all__ = [
    "Hessian", "InputNorm", "flat_gemm", "gemv", "llm_pruner", "magnitude_mask", "matmul_24", "nm_mask", "pack_24",
    "prune", "recover", "sparsegpt", "unpack_24", "wanda_mask", "wanda_score",
]  # fmt: skip


def sparse_bytes(n, k, itemsize=2):
    """Bytes of a weight [n, k] in the 2:4 format: half the values, and two bits for each."""
    return n * k // 2 * itemsize + n * k // 8


# ---- what is compiled


def codegen_cases():
    """2:4 with and without the matrix unit, K cut or not, each dtype; both selections of Wanda, narrow and wide."""
    tensor = codegen.Tensor

    def product(m, n, k, dtype="bfloat16"):
        tensors = dict(x=tensor((m, k), dtype), values=tensor((n, k // 2), dtype), meta=tensor((n, k // 8), "uint8"))
        matrix = () if m == 1 and dtype == "float32" else ("_matmul_24_kernel",)
        return codegen.Case("kernels.pruning:matmul_24", f"{dtype}, M={m} [{n}, {k}]", tensors, matrix=matrix)

    def mask(name, rows, k, dtype="bfloat16", narrow=(), **options):
        arguments = dict(w=tensor((rows, k), dtype), x_norm=tensor((k,), "float32")) | options
        return codegen.Case("kernels.pruning:wanda_mask", f"{dtype} [{rows}, {k}], {name}", arguments, narrow=narrow)

    return [
        product(1, 4096, 4096),
        product(1, 1024, 14336, "float32"),
        product(16, 4096, 4096),
        product(16, 32000, 4096, "float16"),
        product(64, 8192, 4096),
        product(8, 4096, 4096, "float32"),
        mask("2 of 4", 4096, 4096, n=2, m=4),
        mask("4 of 8", 4096, 4096, "float16", n=4, m=8),
        mask("16 of 32", 4096, 4096, n=16, m=32, narrow=("_nm_mask_kernel",)),
        mask("rows", 4096, 4096, sparsity=0.5),
        mask("rows", 64, 14336, sparsity=0.5),
    ]


# ---- benchmark cases

LAYERS = {"O": (4096, 4096), "gate": (14336, 4096), "down": (4096, 14336)}  # [N, K] of Llama-3-8B
MS = (1, 8, 16, 64, 1024)
SPARSE = "2:4 weights of Llama-3-8B, bf16: compressed and expanded in registers"
ZEROS = "The same product with fewer weights: zeros in a dense weight, and a narrower one (bf16, M=1)"
SELECT = "Wanda's mask of a weight, bf16"


def dense(x, values, meta):
    """The pruned weight with its zeros, as a dense one: cuBLAS reads every byte of it."""
    w = unpack_24(values, meta)
    return lambda: F.linear(x, w)


def semi_structured(x, values, meta):
    """torch's 2:4 weights on sparse matrix units: cuSPARSELt, or CUTLASS where torch has no other."""
    w = torch.sparse.to_sparse_semi_structured(unpack_24(values, meta))
    key = (*w.shape, *x.shape)
    with contextlib.suppress(AttributeError, RuntimeError):  # its default algorithm is seldom its best; search once
        if key not in _ALGORITHMS:
            _ALGORITHMS[key] = torch._cslt_sparse_mm_search(w.packed, w._pad_dense_input(x).t())
        w.alg_id_cusparselt = _ALGORITHMS[key]
    return lambda: F.linear(x, w)


_ALGORITHMS = {}  # (n, k, m, k) -> cuSPARSELt's number


def torch_mask(w, x_norm, sparsity=None, n=None, m=None):
    """Score and select in plain torch, as the reference does."""
    return lambda: wanda_mask(w, x_norm, sparsity=sparsity, n=n, m=m)


def _random(generator, device, rows, k):
    return torch.randn(rows, k, generator=generator, device=device)


def sparse_case(layer, m, *, tiny=False):
    """The product of m tokens with the 2:4 weights of a layer of LAYERS, bf16."""
    n, k = LAYERS[layer]
    if tiny:
        n, k = n // 128, k // 32

    def make(generator, device):
        x, w = _random(generator, device, m, k).bfloat16(), (_random(generator, device, n, k) * k**-0.5).bfloat16()
        values, meta = pack_24(w, nm_mask(w.abs(), 2, 4))
        return {"x": x, "values": values, "meta": meta}

    return bench.Case(
        f"2:4 {layer} M={m}", "matmul_24", make, section=SPARSE,
        bytes=sparse_bytes(n, k) + 2 * m * (k + n), flops=2 * m * n * k,
        peers={"F.linear, dense": dense, "torch 2:4": semi_structured},
    )  # fmt: skip


def zeros_case(name, share, width, *, tiny=False):
    """gate_proj with `share` of its weights set to 0, or only `width` of its rows: both multiplied as dense weights."""
    n, k = LAYERS["gate"]
    n, k = (n // 128, k // 32) if tiny else (n, k)
    n = int(n * width)

    def make(generator, device):
        x, w = _random(generator, device, 1, k).bfloat16(), (_random(generator, device, n, k) * k**-0.5).bfloat16()
        return {"x": x, "w": w.masked_fill(~magnitude_mask(w, share), 0)}

    def library(x, w):
        return lambda: F.linear(x, w)

    return bench.Case(
        name, "gemv", make, section=ZEROS, bytes=2 * (n * k + k + n), flops=2 * n * k, peers={"F.linear": library}
    )  # fmt: skip


def mask_case(name, layer, *, tiny=False, **options):
    """Wanda's mask of a layer of LAYERS; options: sparsity, or n and m."""
    rows, k = LAYERS[layer]
    rows, k = (rows // 1024, k // 32) if tiny else (rows, k)

    def make(generator, device):
        w = (_random(generator, device, rows, k) * k**-0.5).bfloat16()
        x_norm = _random(generator, device, 1, k)[0].abs().bfloat16().float()  # products of two bf16: exact in fp32
        return {"w": w, "x_norm": x_norm} | options

    return bench.Case(
        f"{name} {layer}", "wanda_mask", make, section=SELECT, bytes=3 * rows * k + 4 * k, peers={"torch": torch_mask}
    )  # fmt: skip


def cases(tiny=False) -> list[bench.Case]:
    """Compressed against dense weights over M; zeros that are multiplied; the selection."""
    result = [sparse_case(layer, m, tiny=tiny) for layer in LAYERS for m in MS]
    for name, zeros, width in (("dense", 0.0, 1.0), ("half zeros", 0.5, 1.0), ("half as wide", 0.0, 0.5)):
        result.append(zeros_case(f"gate, {name}", zeros, width, tiny=tiny))
    for layer in ("O", "down"):
        result.append(mask_case("2 of 4", layer, n=2, m=4, tiny=tiny))
        result.append(mask_case("rows", layer, sparsity=0.5, tiny=tiny))
    return result


# ---- long experiments


def experiments():
    from labkit import pruning_study

    return pruning_study.experiments()
