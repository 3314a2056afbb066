"""The one rule of correctness, and the cases that every attention kernel is tried on.

FlashAttention's rule: run the reference in fp64 (the truth) and in the tested dtype (the yardstick). A kernel is
right if its largest error is at most twice the yardstick's, plus 1e-5. So no test has a tolerance of its own. Our
references keep scores in fp32, where FlashAttention's rounds them, so the limit is tighter. Beyond 64 the last digit of
fp32 is worth about as much as 1e-5 or more: there, two of it count instead.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Verdict:
    """One output compared: largest errors of the kernel and of the yardstick against fp64, and the limit."""

    output: int
    error: float
    yardstick: float
    problem: str = ""
    size: float = 0.0  # the largest finite number of the truth

    @property
    def limit(self) -> float:
        return 2 * self.yardstick + max(1e-5, 2 * float(np.spacing(np.float32(self.size))))

    @property
    def ok(self) -> bool:
        return not self.problem and self.error <= self.limit

    def __str__(self) -> str:
        why = self.problem or f"error {self.error:.3g}, limit {self.limit:.3g} (yardstick {self.yardstick:.3g})"
        return f"output {self.output}: {'ok' if self.ok else 'WRONG'}: {why}"


def _as(x, dtype):
    """Floating tensors, also inside lists and tuples, in dtype; all else as it is."""
    if isinstance(x, (list, tuple)):
        return type(x)(_as(item, dtype) for item in x)
    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _outputs(result) -> tuple:
    return tuple(result) if isinstance(result, (list, tuple)) else (result,)


def _max_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest |x - truth|; equal infinities are no error, a NaN or a wrong infinity is an infinite one."""
    x = x.double()
    diff = torch.where(x == truth, 0.0, (x - truth).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(diff.max()) if diff.numel() else 0.0


def _judge(index: int, got, truth: torch.Tensor, plain: torch.Tensor) -> Verdict:
    inf = float("inf")
    if not isinstance(got, torch.Tensor) or got.shape != truth.shape:
        shape = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
        return Verdict(index, inf, 0.0, f"shape {shape}, expected {tuple(truth.shape)}")
    if not truth.is_floating_point():  # flags and indices have to be equal
        if got.dtype != plain.dtype:
            return Verdict(index, inf, 0.0, f"dtype {got.dtype}, expected {plain.dtype}")
        same = bool((got == truth).all())
        return Verdict(index, 0.0 if same else inf, 0.0, "" if same else "values differ")
    if truth.isnan().any() or plain.isnan().any():  # then the limit would be infinite, and anything would pass
        return Verdict(index, inf, 0.0, "the reference has NaN")
    if got.dtype != plain.dtype:
        return Verdict(index, inf, 0.0, f"dtype {got.dtype}, expected {plain.dtype}")
    yardstick = _max_error(plain, truth)
    if yardstick == inf:  # here, too
        return Verdict(index, inf, 0.0, f"the reference overflows in {plain.dtype}")
    size = truth[truth.isfinite()].abs()
    return Verdict(index, _max_error(got, truth), yardstick, size=float(size.max()) if len(size) else 0.0)


def compare(got, reference, *args, **kwargs) -> list[Verdict]:
    """Judge the outputs `got` against reference(*args, **kwargs). args hold the tensors that the kernel was given."""
    truth = _outputs(reference(*_as(args, torch.float64), **_as_values(kwargs, torch.float64)))
    plain = _outputs(reference(*args, **kwargs))
    got = _outputs(got)
    if len(got) != len(truth):
        raise AssertionError(f"{len(got)} outputs, the reference has {len(truth)}")
    return [_judge(i, *trio) for i, trio in enumerate(zip(got, truth, plain))]


def _as_values(kwargs: dict, dtype) -> dict:
    return {name: _as(x, dtype) for name, x in kwargs.items()}


def assert_matches(got, reference, *args, **kwargs) -> None:
    """Raise AssertionError unless every output of `got` is right by the rule above."""
    wrong = [str(v) for v in compare(got, reference, *args, **kwargs) if not v.ok]
    if wrong:
        raise AssertionError(f"{getattr(reference, '__name__', 'reference')}: " + "; ".join(wrong))


def randn(rng: np.random.Generator, *shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    """Normal values from numpy's generator, so that they are the same on every machine."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(device=device, dtype=dtype)


@dataclass(frozen=True)
class DecodeCase:
    """One decode problem. Keys and values beyond kv_len are NaN; `strided` takes them from a larger buffer."""

    name: str
    kv_lens: tuple[int, ...]
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    num_splits: int | None = 3
    sm_scale: float | None = None
    capacity: int | None = None  # max_kv_len; the longest kv_len if None
    strided: bool = False

    def tensors(self, device="cpu", seed: int = 0):
        """q [B, Hq, D], k, v [B, L, Hkv, D], kv_lens [B] int32."""
        rng = np.random.default_rng(seed)
        batch, length = len(self.kv_lens), max(self.kv_lens, default=0) if self.capacity is None else self.capacity
        q = randn(rng, batch, self.num_q_heads, self.head_dim, dtype=self.dtype, device=device)
        shape = (batch, length, self.num_kv_heads, self.head_dim)
        k, v = (randn(rng, *shape, dtype=self.dtype, device=device) for _ in "kv")
        if self.strided:  # other strides everywhere, NaN in between: [B, Hkv, L, 2 D] seen as [B, L, Hkv, D]
            wide = (torch.full((batch, self.num_kv_heads, length, 2 * self.head_dim), float("nan")) for _ in "kv")
            wide = [w.to(k)[..., : self.head_dim].transpose(1, 2) for w in wide]
            k, v = wide[0].copy_(k), wide[1].copy_(v)
            q = torch.full((batch, 2 * self.num_q_heads, self.head_dim), float("nan")).to(q)[:, ::2].copy_(q)
        for b, n in enumerate(self.kv_lens):
            k[b, n:] = v[b, n:] = float("nan")
        return q, k, v, torch.tensor(self.kv_lens, dtype=torch.int32, device=device)


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

# Pairwise over length, dtype, head_dim, group, splits and strides; every row is a shape that once broke somebody.
DECODE_CASES = (
    DecodeCase("empty sequence among full ones", (0, 129, 1), dtype=BF16),
    DecodeCase("one key", (1, 1), dtype=F16, num_splits=2, head_dim=128),
    DecodeCase("127 keys and none, MHA", (127, 0), num_kv_heads=4, dtype=BF16, num_splits=1),
    DecodeCase("128 keys, MQA", (128, 128), num_kv_heads=1, dtype=F16, num_splits=2),
    DecodeCase("129 keys, group 8", (129,), num_q_heads=8, num_kv_heads=1, dtype=BF16, num_splits=2),
    DecodeCase("ragged, default splits", (300, 17, 64), dtype=BF16, num_splits=None),
    DecodeCase("more splits than blocks", (70, 5), num_splits=9, dtype=F32),
    DecodeCase("all sequences empty", (0, 0), num_splits=2, dtype=BF16, capacity=64),
    DecodeCase("no batch", (), dtype=F32),
    DecodeCase("no keys at all", (0,), capacity=0, dtype=F32),
    DecodeCase("long buffer, short use", (33, 65), capacity=512, dtype=F32, num_splits=4),
    DecodeCase("head_dim 80", (130, 64), head_dim=80, dtype=F16, num_splits=2),
    DecodeCase("head_dim 96", (63, 200), head_dim=96, dtype=BF16, num_splits=3),
    DecodeCase("head_dim 256", (65, 190), head_dim=256, dtype=F32, num_splits=2),
    DecodeCase("head_dim 32, small model", (100, 3), head_dim=32, num_q_heads=8, num_kv_heads=8, dtype=F32),
    DecodeCase("group 64", (131,), num_q_heads=64, num_kv_heads=1, dtype=F16, num_splits=2),
    DecodeCase("group 48 of wide heads", (70, 33), num_q_heads=48, num_kv_heads=1, head_dim=160, dtype=BF16),
    DecodeCase("group 24 in fp32", (70, 33), num_q_heads=24, num_kv_heads=1, dtype=F32, num_splits=2),
    DecodeCase("group 6, not a power of two", (150, 77), num_q_heads=12, dtype=BF16, num_splits=2),
    DecodeCase("strided fp32", (66, 129), strided=True, dtype=F32, num_splits=2),
    DecodeCase("strided bf16", (129, 0), strided=True, dtype=BF16, num_splits=3, head_dim=128),
    DecodeCase("other scale", (140,), sm_scale=0.5, dtype=F32, num_splits=2),
    DecodeCase("large scores", (257,), sm_scale=4.0, dtype=BF16, num_splits=4, head_dim=128),
)
