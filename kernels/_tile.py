"""Tile helpers shared by the kernels: `dot` and `cast` that are right for bf16 on both machines, the online-softmax
step, sums that stay inside a thread, and the facts about the device that the launch rules need.

Triton's interpreter computes on the bit patterns of bf16 values (`dot`, `+`, `*`, comparisons) and truncates when it
stores them. So kernels upcast to fp32 before any arithmetic and go through `dot` and `cast` for the rest.
"""

import functools
import numbers

import triton
import triton.language as tl

from kernels import INTERPRETED
from labkit import args, splits

# Triton decides at import time whether its own library is interpreted: a switch set later would mix both modes.
if isinstance(tl.cdiv, triton.runtime.JITFunction) == INTERPRETED:
    raise ImportError(
        "too late: Triton was imported before `kernels`, in the other mode "
        f"(TRITON_INTERPRET is now {'1' if INTERPRETED else '0'}). "
        "Import `kernels` first, before torch.compile or triton, or set TRITON_INTERPRET in the environment."
    )


def _scalars_are_numbers():
    """Triton 3.6's interpreter takes an array of one element for a number, which numpy 2.4 no longer does."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched


def _masked_is_undefined():
    """A load with a mask and without `other` leaves what is masked undefined. Triton's interpreter makes it 0, so that
    a kernel which needs the 0 would pass: here floats are NaN. Integers stay 0, they may be part of an address.
    """
    from triton.runtime import interpreter

    load = interpreter.InterpreterBuilder.create_masked_load
    nan = {tl.float16: float("nan"), tl.bfloat16: 0x7FC0, tl.float32: float("nan"), tl.float64: float("nan")}

    def create_masked_load(self, ptrs, mask, other, *options, **named):
        loaded = load(self, ptrs, mask, other, *options, **named)
        if other is None and loaded.dtype.scalar in nan:  # bf16 is held as its bits
            loaded.data[~mask.data] = nan[loaded.dtype.scalar]
        return loaded

    interpreter.InterpreterBuilder.create_masked_load = create_masked_load


if INTERPRETED:
    _masked_is_undefined()
    if triton.__version__.startswith("3.6."):
        _scalars_are_numbers()

# Triton's own are made for use inside of kernels, too; that wrapper costs each launch rule some microseconds.
cdiv, next_power_of_2 = (getattr(f, "fn", f) for f in (triton.cdiv, triton.next_power_of_2))

INTERPRET = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def device_properties() -> dict:
    """"multiprocessor_count" and "max_shared_mem" (bytes a block) of the current device.

    The interpreter has no device: it gets the numbers of an H200, so that it takes the same launch decisions.
    """
    if INTERPRETED:
        return {"multiprocessor_count": 132, "max_shared_mem": 232_448}
    return _properties_of(triton.runtime.driver.active.get_current_device())


@functools.cache
def _properties_of(device: int) -> dict:
    return triton.runtime.driver.active.utils.get_device_properties(device)


def has_tma() -> bool:
    """Whether the current device fetches tiles by descriptor: NVIDIA's Tensor Memory Accelerator, from Hopper on."""
    if INTERPRETED:
        return True
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def splits_or_default(num_splits: int | None, num_tiles: int, max_kv_len: int, head_dim: int) -> int:
    """num_splits, or where it is None the rule's choice for num_tiles programs a split on the current device."""
    if num_splits is None:
        return splits.choose(num_tiles, device_properties()["multiprocessor_count"], max_kv_len, head_dim)
    return num_splits


def positive_scale(sm_scale: float | None, head_dim: int) -> float:
    """sm_scale, or its default head_dim ** -0.5.

    Raises ValueError for one that is not positive: kernels find the largest score before they scale.
    """
    known = sm_scale is None or isinstance(sm_scale, numbers.Real)
    positive = known and (sm_scale is None or 2.0**-126 <= sm_scale < float("inf"))  # in fp32, too
    args.expect(positive, "sm_scale", repr(sm_scale), "a positive number")
    return args.scale(sm_scale, head_dim)


def qk_scale(sm_scale: float | None, head_dim: int) -> float:
    """What `softmax_step` scales the scores with: log2(e) times `positive_scale`."""
    return positive_scale(sm_scale, head_dim) * LOG2E.value


def block_dim(head_dim: int) -> int:
    """Width of a tile that holds one head: a power of two, at least 16 (the matrix unit's depth)."""
    return max(16, next_power_of_2(head_dim))


@triton.jit
def dot(a, b):
    """a @ b in fp32. fp32 operands are multiplied exactly (IEEE), never as TF32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x (fp32) rounded to nearest even, as a GPU does; the interpreter would truncate to bf16."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, bits, 0x7FC00000)  # a NaN stays one
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def softmax_step(s, m, l, qk_scale):
    """One step of the online softmax (Milakov & Gimelshein 2018, Algorithm 3), in powers of two.

    s [M, N] scores, -inf where masked; qk_scale > 0: log2(e) times the scale of the scores, which stay below 2^24 in
    size when scaled; m, l [M] running maximum of the scaled scores, and denominator.
    Returns p [M, N], alpha [M] (what the accumulator has to be multiplied with), and the new m and l.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)  # the largest stays the largest under a positive scale
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen so far: exp2(-inf - 0) is 0, not NaN
    p = tl.exp2(tl.fma(s, qk_scale, -m_safe[:, None]))  # scaled and subtracted by one instruction a score
    alpha = tl.exp2(m - m_safe)
    return p, alpha, m_new, l * alpha + tl.sum(p, 1)


@triton.jit
def attend_tile(q, k, v, valid, m, l, acc, qk_scale, MASKED: tl.constexpr):
    """Add one tile of keys to the running attention of a tile of queries.

    q [M, D]; k, v [N, D]; valid [M, N] or [1, N], True where a key is kept (read only if MASKED); m, l [M]; acc [M, D].
    """
    s = dot(q, tl.trans(k))
    if MASKED:
        s = tl.where(valid, s, float("-inf"))
    p, alpha, m, l = softmax_step(s, m, l, qk_scale)
    acc = acc * alpha[:, None] + dot(cast(p, v.dtype), v)
    return m, l, acc


@triton.jit
def finish(m, l, acc):
    """Normalise: o [M, D] and natural lse [M]. A row that saw no key gets o 0 and lse -inf."""
    l = tl.where(l == 0.0, 1.0, l)  # m is -inf there, and stays it
    return acc * (1.0 / l)[:, None], (m + tl.log2(l)) * LN2  # a division a row, not a number


# A reduction over the whole program takes shuffles, and barriers at which all warps wait. In every turn of a loop that
# is dear. So a piece of a long row is seen as [CHUNKS, THREADS, VEC]: VEC neighbours that a thread loads at once,
# CHUNKS times. What is reduced over the first and the last axis stays inside a thread. Each thread keeps a running
# state of its own, and the states [THREADS] are merged once, at the end of the row.


def thread_view(num_warps: int, *rows) -> dict:
    """THREADS and VEC for a program that walks along rows [..., N], one of each tensor, at the same time.

    VEC is 16 bytes of the narrowest dtype; or 1 where rows may begin in between, for then loads are narrow as well.
    """
    lanes = 32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size
    wide = all(
        x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(n % 16 for n in x.stride()[:-1]) for x in rows
    )
    return {"THREADS": lanes * num_warps, "VEC": 16 // min(x.element_size() for x in rows) if wide else 1}


@triton.jit
def own_max(x):
    """[CHUNKS, THREADS, VEC] -> [THREADS]: the maximum of what a thread holds."""
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def own_sum(x):
    """[CHUNKS, THREADS, VEC] -> [THREADS]: the sum of what a thread holds."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def finite(m):
    """A running maximum as something to subtract: 0 while nothing but -inf was seen, so that no NaN comes of it."""
    return tl.where(m == float("-inf"), 0.0, m)
