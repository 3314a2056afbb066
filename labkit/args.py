"""Argument checks. Every public function calls these first, so that bad input fails before anything is touched.

Shapes, dtypes and devices are always checked. Values of integer tensors (`kv_lens`, `block_table`, ...) are checked
when they live on the CPU; on a GPU that would force a synchronisation, so there they are checked only under
LAB_CHECK=1 and the kernels clamp or ignore what is out of range.
"""

import math
import numbers
import os
from typing import NoReturn

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
REFERENCE_FLOATS = (*FLOATS, torch.float64)  # the references also run in fp64: that is the truth of every test
MAX_HEAD_DIM = 256


def refuse(name: str, got, expected: str) -> NoReturn:
    """Raise ValueError naming the argument, what came and what was expected."""
    raise ValueError(f"{name}: got {got}, expected {expected}")


def expect(ok: bool, name: str, got, expected: str) -> None:
    """Refuse unless ok."""
    if not ok:
        refuse(name, got, expected)


def tensor(name: str, x, shape: tuple, like: torch.Tensor | None = None, dtypes=None, dtype=None) -> None:
    """x is a tensor of this shape (an int is fixed, a string names a free size) with one of these dtypes.

    like: x must be on its device. dtype: exactly this one; dtypes: one of these. Runs several times a call, so no text
    is made before there is something to refuse.
    """
    if not isinstance(x, torch.Tensor):
        refuse(name, type(x).__name__, "a tensor")
    got = x.shape
    if len(got) != len(shape) or any(n != m and not isinstance(n, str) for n, m in zip(shape, got)):
        refuse(f"{name} (shape)", tuple(got), "[" + ", ".join(map(str, shape)) + "]")
    if dtype is not None and x.dtype != dtype:
        refuse(f"{name} (dtype)", x.dtype, str(dtype))
    if dtypes is not None and x.dtype not in dtypes:
        refuse(f"{name} (dtype)", x.dtype, " or ".join(map(str, dtypes)))
    if like is not None and x.device != like.device:
        refuse(f"{name} (device)", x.device, str(like.device))


def checks_values(x: torch.Tensor) -> bool:
    """Whether the values of an integer tensor may be looked at (see the module's docstring)."""
    return x.device.type == "cpu" or os.environ.get("LAB_CHECK") == "1"


def in_range(name: str, x: torch.Tensor, low: int, high: int) -> None:
    """low <= x <= high for every value, where values may be looked at."""
    if x.numel() and checks_values(x):
        got = (int(x.min()), int(x.max()))
        expect(low <= got[0] and got[1] <= high, name, f"values from {got[0]} to {got[1]}", f"{low} to {high}")


def head_dim(name: str, dim: int) -> None:
    """Check a head dimension; `name` is the tensor that has it."""
    expect(1 <= dim <= MAX_HEAD_DIM, f"{name} (head_dim)", dim, f"1 to {MAX_HEAD_DIM}")


def heads(num_q_heads: int, num_kv_heads: int) -> int:
    """The group: how many query heads share one KV head."""
    ok = num_kv_heads > 0 and num_q_heads > 0 and num_q_heads % num_kv_heads == 0
    expect(ok, "q (heads)", f"{num_q_heads} query heads for {num_kv_heads} KV heads", "a positive multiple")
    return num_q_heads // num_kv_heads


def scale(sm_scale: float | None, dim: int) -> float:
    """sm_scale, or its default head_dim ** -0.5."""
    if sm_scale is None:
        return dim**-0.5
    expect(_is_number(sm_scale) and math.isfinite(sm_scale), "sm_scale", sm_scale, "None or a finite number")
    return float(sm_scale)


def decode(q, k, v, kv_lens, dtypes=FLOATS) -> tuple[int, int, int, int, int]:
    """Check the arguments of a decode step: q [B, Hq, D]; k, v [B, L, Hkv, D]; kv_lens [B] int32.

    Returns (B, Hq, Hkv, L, D).
    """
    tensor("q", q, ("batch", "num_q_heads", "head_dim"), dtypes=dtypes)
    batch, num_q_heads, dim = q.shape
    head_dim("q", dim)
    tensor("k", k, (batch, "max_kv_len", "num_kv_heads", dim), like=q, dtype=q.dtype)
    tensor("v", v, tuple(k.shape), like=q, dtype=q.dtype)
    _, max_kv_len, num_kv_heads, _ = k.shape
    heads(num_q_heads, num_kv_heads)
    tensor("kv_lens", kv_lens, (batch,), like=q, dtype=torch.int32)
    in_range("kv_lens", kv_lens, 0, max_kv_len)
    return batch, num_q_heads, num_kv_heads, max_kv_len, dim


def num_splits(count: int | None) -> None:
    """Check num_splits: None, or an int of at least 1."""
    expect(count is None or (_is_int(count) and count >= 1), "num_splits", count, "None or an int >= 1")


def prefill(q, k, v, kv_lens, causal, window, num_sinks, dtypes=FLOATS) -> tuple[int, int, int, int, int, int]:
    """Check the arguments of `attention`: q [B, T, Hq, D]; k, v [B, L, Hkv, D]. Returns (B, T, Hq, Hkv, L, D)."""
    tensor("q", q, ("batch", "q_len", "num_q_heads", "head_dim"), dtypes=dtypes)
    batch, q_len, num_q_heads, dim = q.shape
    head_dim("q", dim)
    tensor("k", k, (batch, "max_kv_len", "num_kv_heads", dim), like=q, dtype=q.dtype)
    tensor("v", v, tuple(k.shape), like=q, dtype=q.dtype)
    _, max_kv_len, num_kv_heads, _ = k.shape
    heads(num_q_heads, num_kv_heads)
    if kv_lens is not None:
        tensor("kv_lens", kv_lens, (batch,), like=q, dtype=torch.int32)
        in_range("kv_lens", kv_lens, 0, max_kv_len)
    if window is not None:
        expect(_is_int(window) and window >= 1, "window", window, "None or an int >= 1")
        expect(causal, "window", f"{window} with causal=False", "causal=True")
    expect(_is_int(num_sinks) and num_sinks >= 0, "num_sinks", num_sinks, "an int >= 0")
    return batch, q_len, num_q_heads, num_kv_heads, max_kv_len, dim


def merge(part_o, part_lse, dtypes=(torch.float32,)) -> tuple[int, int, int, int]:
    """Check the arguments of `merge`: part_o [B, Hq, S, D]; part_lse [B, Hq, S]. Returns (B, Hq, S, D)."""
    tensor("part_o", part_o, ("batch", "num_q_heads", "num_splits", "head_dim"), dtypes=dtypes)
    tensor("part_lse", part_lse, tuple(part_o.shape[:3]), like=part_o, dtype=part_o.dtype)
    expect(part_o.shape[2] >= 1, "part_o (num_splits)", 0, "at least 1")
    return tuple(part_o.shape)


# What exp(x - phi) may be raised to. fp16: its largest number is e^11.09, and below e^-9.7 it loses digits. Elsewhere p
# has fp32's exponents, and the sums over millions of keys have to stay below e^88.
EXP_LIMITS = {torch.float16: (-9.0, 11.0), torch.float32: (-80.0, 60.0)}


def unified(phi: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """Check FlashDecoding++'s phi and bounds (a, b) on x - phi. Returns the bounds, narrowed to what fp32 can hold."""
    expect(_is_number(phi) and math.isfinite(phi), "phi", phi, "a finite number")
    ok = isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(map(_is_number, bounds))
    expect(ok and bounds[0] < bounds[1], "bounds", bounds, "two numbers (a, b), a < b")
    low, high = EXP_LIMITS[torch.float32]
    return max(float(bounds[0]), low), min(float(bounds[1]), high)


def _is_number(x) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)  # numpy's too


def _is_int(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def linear(x, w, dtypes=FLOATS) -> tuple[int, int, int]:
    """Check the arguments of y = x w^T: x [M, K], w [N, K]. Returns (M, N, K)."""
    tensor("x", x, ("m", "k"), dtypes=dtypes)
    m, k = x.shape
    tensor("w", w, ("n", k), like=x, dtype=x.dtype)
    return m, w.shape[0], k


def pages(k_pages, v_pages, like: torch.Tensor, head_dim: int | str = "head_dim") -> tuple[int, int, int, int]:
    """Check a paged cache: k_pages, v_pages [P, page_size, Hkv, D]. Returns (P, page_size, Hkv, D)."""
    tensor("k_pages", k_pages, ("num_pages", "page_size", "num_kv_heads", head_dim), like=like, dtype=like.dtype)
    tensor("v_pages", v_pages, tuple(k_pages.shape), like=like, dtype=like.dtype)
    expect(k_pages.shape[1] >= 1, "k_pages (page_size)", 0, "at least 1")
    return tuple(k_pages.shape)


def page_table(block_table, kv_lens, batch: int, num_pages: int, page_size: int, like: torch.Tensor) -> int:
    """Check block_table [B, max_pages] and kv_lens [B], int32. Returns max_pages.

    Values: every page that kv_lens reaches must exist; what stands in the table beyond is never looked at.
    """
    tensor("block_table", block_table, (batch, "max_pages"), like=like, dtype=torch.int32)
    tensor("kv_lens", kv_lens, (batch,), like=like, dtype=torch.int32)
    max_pages = block_table.shape[1]
    in_range("kv_lens", kv_lens, 0, max_pages * page_size)
    if checks_values(block_table):
        used = torch.arange(max_pages, device=like.device) * page_size < kv_lens[:, None]
        in_range("block_table", block_table[used], 0, num_pages - 1)
    return max_pages


def paged(q, k_pages, v_pages, block_table, kv_lens, dtypes=FLOATS) -> tuple[int, int, int, int, int]:
    """Check the arguments of a decode step over pages: q [B, Hq, D]; k_pages, v_pages [P, page_size, Hkv, D];
    block_table [B, max_pages] int32; kv_lens [B] int32. Returns (B, Hq, Hkv, max_pages, D).
    """
    tensor("q", q, ("batch", "num_q_heads", "head_dim"), dtypes=dtypes)
    batch, num_q_heads, dim = q.shape
    head_dim("q", dim)
    num_pages, page_size, num_kv_heads, _ = pages(k_pages, v_pages, q, dim)
    heads(num_q_heads, num_kv_heads)
    max_pages = page_table(block_table, kv_lens, batch, num_pages, page_size, q)
    return batch, num_q_heads, num_kv_heads, max_pages, dim


def write_kv(k, v, k_pages, v_pages, slots, dtypes=FLOATS) -> None:
    """Check the arguments of `write_kv`: k, v [N, Hkv, D]; k_pages, v_pages [P, page_size, Hkv, D]; slots [N] int64."""
    tensor("k", k, ("tokens", "num_kv_heads", "head_dim"), dtypes=dtypes)
    tensor("v", v, tuple(k.shape), like=k, dtype=k.dtype)
    num_pages, page_size, num_kv_heads, _ = pages(k_pages, v_pages, k, k.shape[2])
    expect(num_kv_heads == k.shape[1], "k_pages (num_kv_heads)", num_kv_heads, str(k.shape[1]))
    slot_numbers(slots, k, num_pages * page_size)


def slot_numbers(slots, new, num_slots) -> None:
    """Check slots [N] int64: one for each row of new [N, ...], below num_slots; a negative one is skipped."""
    tensor("slots", slots, (new.shape[0],), like=new, dtype=torch.int64)
    if slots.numel() and checks_values(slots):
        top = int(slots.max())
        expect(top < num_slots, "slots", f"values up to {top}", f"below {num_slots}")


def ragged(q, k_pages, v_pages, block_table, q_starts, kv_lens, dtypes=FLOATS) -> tuple[int, int, int, int, int]:
    """Check the arguments of `ragged_attention`: q [N, Hq, D]; k_pages, v_pages [P, page_size, Hkv, D];
    block_table [B, max_pages], q_starts [B + 1] and kv_lens [B], int32. Returns (B, Hq, Hkv, max_pages, D).
    """
    tensor("q", q, ("tokens", "num_q_heads", "head_dim"), dtypes=dtypes)
    num_tokens, num_q_heads, dim = q.shape
    head_dim("q", dim)
    num_pages, page_size, num_kv_heads, _ = pages(k_pages, v_pages, q, dim)
    heads(num_q_heads, num_kv_heads)
    tensor("q_starts", q_starts, ("batch + 1",), like=q, dtype=torch.int32)
    batch = len(q_starts) - 1
    expect(batch >= 0, "q_starts (shape)", (0,), "at least one number")
    max_pages = page_table(block_table, kv_lens, batch, num_pages, page_size, q)
    if checks_values(q_starts):
        starts = q_starts.tolist()
        ok = starts[0] == 0 and starts == sorted(starts) and starts[-1] == num_tokens
        expect(ok, "q_starts", starts, f"0, rising, up to {num_tokens}")
    return batch, num_q_heads, num_kv_heads, max_pages, dim


def sinks(num_sinks, window) -> None:
    """Check the sizes of a cache with attention sinks."""
    for name, value, least in (("num_sinks", num_sinks, 0), ("window", window, 1)):
        expect(_is_int(value) and value >= least, name, value, f"an int >= {least}")


def ring(q, k_ring, v_ring, seen, num_sinks, window, cos, sin, dtypes=FLOATS) -> tuple[int, int, int, int]:
    """Check the arguments of `sink_decoding`: q [B, Hq, D]; k_ring, v_ring [B, num_sinks + window, Hkv, D]; seen [B]
    int32; cos, sin [num_sinks + window or more, D / 2] fp32. Returns (B, Hq, Hkv, D).
    """
    sinks(num_sinks, window)
    tensor("q", q, ("batch", "num_q_heads", "head_dim"), dtypes=dtypes)
    batch, num_q_heads, dim = q.shape
    head_dim("q", dim)
    expect(dim % 2 == 0, "q (head_dim)", dim, "an even number, to rotate pairs")
    size = num_sinks + window
    tensor("k_ring", k_ring, (batch, size, "num_kv_heads", dim), like=q, dtype=q.dtype)
    tensor("v_ring", v_ring, tuple(k_ring.shape), like=q, dtype=q.dtype)
    num_kv_heads = k_ring.shape[2]
    heads(num_q_heads, num_kv_heads)
    tensor("seen", seen, (batch,), like=q, dtype=torch.int32)
    in_range("seen", seen, 0, 2**31 - 1)
    angles = tuple(dtype for dtype in (torch.float32, torch.float64) if dtype in dtypes)
    for name, x in (("cos", cos), ("sin", sin)):
        tensor(name, x, ("rows", dim // 2), like=q, dtypes=angles)
        expect(x.shape[0] >= size, f"{name} (rows)", x.shape[0], f"at least num_sinks + window = {size}")
    return batch, num_q_heads, num_kv_heads, dim


def norm(x, residual, weight, dtypes=FLOATS) -> tuple[int, int]:
    """Check the arguments of `rmsnorm` (residual None) and `add_rmsnorm`: x, residual [..., N]; weight [N].

    Returns (rows, N).
    """
    rows, n = row_tensor("x", x, dtypes)
    if residual is not None:
        tensor("residual", residual, tuple(x.shape), like=x, dtype=x.dtype)
    tensor("weight", weight, (n,), like=x, dtype=x.dtype)
    return rows, n


def row_tensor(name: str, x, dtypes=FLOATS) -> tuple[int, int]:
    """Check a tensor whose last dimension is worked on: x [..., N]. Returns (rows, N)."""
    expect(isinstance(x, torch.Tensor), name, type(x).__name__, "a tensor")
    expect(x.dtype in dtypes, f"{name} (dtype)", x.dtype, " or ".join(map(str, dtypes)))
    expect(x.ndim >= 1, f"{name} (shape)", tuple(x.shape), "[..., n]")
    return math.prod(x.shape[:-1]), x.shape[-1]


def rope(q, k, cos, sin, dtypes=FLOATS) -> tuple[int, int, int]:
    """Check the arguments of `rope`: q [..., len, Hq, D], k [..., len, Hkv, D]; cos, sin [len, D/2] or
    [..., len, D/2], or D wide, fp32 or q's dtype. Returns (batch, len, D), the leading dimensions being one batch.
    """
    row_tensor("q", q, dtypes)
    expect(q.ndim >= 3, "q (shape)", tuple(q.shape), "[..., len, num_q_heads, head_dim]")
    *lead, length, _, dim = q.shape
    head_dim("q", dim)
    expect(dim % 2 == 0, "q (head_dim)", dim, "an even number")
    tensor("k", k, (*lead, length, "num_kv_heads", dim), like=q, dtype=q.dtype)
    for name, x in {"cos": cos, "sin": sin}.items():
        expect(isinstance(x, torch.Tensor), name, type(x).__name__, "a tensor")
        wide = x.ndim >= 2 and x.shape[-1] == dim
        angles(name, x, (length,) if x.ndim == 2 else (*lead, length), q, 2 * dim if wide else dim)
    expect(cos.shape == sin.shape, "sin (shape)", tuple(sin.shape), str(tuple(cos.shape)))
    return math.prod(lead), length, dim


def angles(name, x, shape, q, dim) -> None:
    """cos or sin [*shape, dim/2], fp32 or q's dtype (or fp64, which only the references meet)."""
    tensor(name, x, (*shape, dim // 2), like=q, dtypes=(torch.float32, torch.float64, q.dtype))


def rope_write_kv(qkv, bias, cos, sin, k_pages, v_pages, slots, dtypes=FLOATS) -> tuple[int, int, int, int]:
    """Check the arguments of `rope_write_kv`: qkv [N, (Hq + 2 Hkv) D]; bias as wide or None; cos, sin [N, D/2];
    k_pages, v_pages [P, page_size, Hkv, D]; slots [N] int64. Returns (N, Hq, Hkv, D).
    """
    tensor("qkv", qkv, ("tokens", "(num_q_heads + 2 num_kv_heads) head_dim"), dtypes=dtypes)
    num_tokens, width = qkv.shape
    num_pages, page_size, num_kv_heads, dim = pages(k_pages, v_pages, qkv)
    head_dim("k_pages", dim)
    expect(dim % 2 == 0, "k_pages (head_dim)", dim, "an even number")
    num_q_heads = width // dim - 2 * num_kv_heads
    ok = width % dim == 0 and num_kv_heads > 0 and num_q_heads > 0
    expect(ok, "qkv (width)", width, f"(num_q_heads + 2 * {num_kv_heads}) * {dim}")
    if bias is not None:
        tensor("bias", bias, (width,), like=qkv, dtype=qkv.dtype)
    angles("cos", cos, (num_tokens,), qkv, dim)
    angles("sin", sin, (num_tokens,), qkv, dim)
    slot_numbers(slots, qkv, num_pages * page_size)
    return num_tokens, num_q_heads, num_kv_heads, dim


def gate_up(x, gate_weight, up_weight, norm_weight, dtypes=FLOATS) -> tuple[int, int, int]:
    """Check the arguments of `gate_up_swiglu`: x [..., K]; gate_weight, up_weight [N, K]; norm_weight [K] or None.

    Returns (rows, N, K).
    """
    m, k = row_tensor("x", x, dtypes)
    tensor("gate_weight", gate_weight, ("n", k), like=x, dtype=x.dtype)
    tensor("up_weight", up_weight, tuple(gate_weight.shape), like=x, dtype=x.dtype)
    if norm_weight is not None:
        tensor("norm_weight", norm_weight, (k,), like=x, dtype=x.dtype)
    return m, gate_weight.shape[0], k


def distillation(student, teacher, labels, temperature, ce_weight, kind, beta, reduction, dtypes=FLOATS) -> tuple:
    """Check the arguments of `kd_loss`: student, teacher logits [..., V]; labels [...] integers or None.

    Returns (rows, V, kind), where kind is "forward_kl" or "reverse_kl" for the two ends of "jsd" (beta 0 and 1).
    """
    rows, vocab = row_tensor("student_logits", student, dtypes)
    row_tensor("teacher_logits", teacher, dtypes)
    tensor("teacher_logits", teacher, tuple(student.shape), like=student)
    expect(vocab > 0, "student_logits (vocabulary)", vocab, "at least 1")
    expect(_is_number(temperature) and 0 < temperature < math.inf, "temperature", temperature, "a number above 0")
    expect(_is_number(ce_weight) and 0 <= ce_weight < math.inf, "ce_weight", ce_weight, "a number, at least 0")
    expect(kind in ("forward_kl", "reverse_kl", "jsd"), "kind", repr(kind), "'forward_kl', 'reverse_kl' or 'jsd'")
    expect(_is_number(beta) and 0 <= beta <= 1, "beta", beta, "a number from 0 to 1")
    expect(reduction in ("mean", "sum", "none"), "reduction", repr(reduction), "'mean', 'sum' or 'none'")
    expect(labels is not None or not ce_weight, "labels", "None", f"labels, since ce_weight is {ce_weight}")
    if labels is not None:
        tensor("labels", labels, tuple(student.shape[:-1]), like=student, dtypes=(torch.int32, torch.int64))
        if checks_values(labels):
            bad = labels[(labels != -100) & ((labels < 0) | (labels >= vocab))]
            expect(not len(bad), "labels", bad[:1].tolist(), f"0 to {vocab - 1}, or -100 for a row to leave out")
    return rows, vocab, {0: "forward_kl", 1: "reverse_kl"}.get(beta, kind) if kind == "jsd" else kind


def decode_block(
    x, cos, sin, k, norm, qkv_weight, o_weight, mlp_norm, gate_up_weight, down_weight, dtypes=FLOATS
) -> tuple[int, int, int]:
    """Check the arguments of `decode_block`: x [B, K]; cos, sin [B, D/2]; k [B, L, Hkv, D]; norm, mlp_norm [K];
    qkv_weight [(Hq + 2 Hkv) D, K]; o_weight [K, Hq D]; gate_up_weight [2 F, K]; down_weight [K, F].
    Returns (Hq, Hkv, D).
    """
    tensor("x", x, ("batch", "k"), dtypes=dtypes)
    tensor("k", k, (len(x), "max_kv_len", "num_kv_heads", "head_dim"), like=x, dtype=x.dtype)
    width, num_kv_heads, dim = x.shape[1], *k.shape[2:]
    tensor("qkv_weight", qkv_weight, ("(num_q_heads + 2 num_kv_heads) head_dim", width), like=x, dtype=x.dtype)
    angles("cos", cos, (len(x),), x, dim)
    angles("sin", sin, (len(x),), x, dim)
    rows = qkv_weight.shape[0]
    num_q_heads = rows // max(1, dim) - 2 * num_kv_heads
    ok = dim > 0 and rows % dim == 0 and num_q_heads > 0
    expect(ok, "qkv_weight (rows)", rows, f"(num_q_heads + 2 * {num_kv_heads}) * {dim}")
    tensor("norm", norm, (width,), like=x, dtype=x.dtype)
    tensor("mlp_norm", mlp_norm, (width,), like=x, dtype=x.dtype)
    tensor("o_weight", o_weight, (width, num_q_heads * dim), like=x, dtype=x.dtype)
    tensor("gate_up_weight", gate_up_weight, ("2 f", width), like=x, dtype=x.dtype)
    expect(gate_up_weight.shape[0] % 2 == 0, "gate_up_weight (rows)", gate_up_weight.shape[0], "an even number")
    tensor("down_weight", down_weight, (width, gate_up_weight.shape[0] // 2), like=x, dtype=x.dtype)
    return num_q_heads, num_kv_heads, dim


def share(name: str, value, *, below_one=False) -> None:
    """A share of weights or groups: a number from 0 to 1, or below 1."""
    ok = _is_number(value) and 0 <= value <= 1 and not (below_one and value == 1)
    expect(ok, name, value, "a number from 0 to " + ("below 1" if below_one else "1"))


def n_of_m(n, m, columns: int) -> None:
    """n of m neighbouring columns are kept."""
    ok = _is_int(n) and _is_int(m) and 1 <= n <= m
    expect(ok, "n, m", (n, m), "two ints, 1 <= n <= m")
    expect(columns % m == 0, "columns", columns, f"a multiple of m = {m}")


def sparsity_pattern(sparsity, n, m, columns: int, *, below_one=False) -> None:
    """Either a share of all weights to remove, or n of m neighbouring columns to keep."""
    ok = (n is None and m is None) if sparsity is not None else (n is not None and m is not None)
    expect(ok, "sparsity, n, m", (sparsity, n, m), "sparsity alone, or n and m")
    if sparsity is None:
        n_of_m(n, m, columns)
    else:
        share("sparsity", sparsity, below_one=below_one)


def wanda(w, x_norm, sparsity, n, m, dtypes=FLOATS) -> tuple[int, int]:
    """Check the arguments of `wanda_mask`: w [N, K]; x_norm [K], a float type. Returns (N, K)."""
    tensor("w", w, ("n", "k"), dtypes=dtypes)
    tensor("x_norm", x_norm, (w.shape[1],), like=w, dtypes=dtypes)
    sparsity_pattern(sparsity, n, m, w.shape[1])
    return tuple(w.shape)


def sparse_24(x, values, meta, dtypes=FLOATS) -> tuple[int, int, int]:
    """Check the arguments of `matmul_24`: x [M, K]; values [N, K/2] in x's dtype; meta [N, K/8] uint8.

    Returns (M, N, K).
    """
    tensor("x", x, ("m", "k"), dtypes=dtypes)
    m, k = x.shape
    expect(k % 8 == 0, "x (columns)", k, "a multiple of 8")
    tensor("values", values, ("n", k // 2), like=x, dtype=x.dtype)
    tensor("meta", meta, (values.shape[0], k // 8), like=x, dtype=torch.uint8)
    return m, values.shape[0], k
