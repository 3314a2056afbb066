"""FlashDecoding++ in plain torch (Hong et al., MLSys 2024, arXiv 2311.01282): its three ideas, one after the other.

1. Unified max. Softmax is the same whatever constant phi is subtracted from the scores, so all partial results may
   use one phi: numerators and denominators simply add. Rows whose scores stray too far from it are done again.
2. Flat GEMM. A decode step multiplies a few tokens with a large matrix; a tile of 64 tokens is then mostly padding.
3. Heuristic dataflow. Which implementation is fastest changes with the number of tokens: measure once, look up later.
"""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

from labkit import args, splits
from labkit.attention import decode_attention, softmax_dtype
from labkit.flash_decoding import BLOCK_KEYS

# ---- 1. unified max


def scaled_scores(q, k, *, sm_scale=None):
    """x = sm_scale * q k^T in natural-log units: q [B, Hq, D], k [B, L, Hkv, D] -> [B, Hq, L], at least fp32."""
    x = torch.einsum("bhgd,blhd->bhgl", q.unflatten(1, (k.shape[2], -1)), k)
    return x.to(softmax_dtype(q.dtype)).flatten(1, 2) * args.scale(sm_scale, q.shape[-1])


def unified_parts(q, k, v, kv_lens, *, phi, num_splits, sm_scale=None):
    """What every split contributes with one phi for all: numerators [B, Hq, S, D] and denominators [B, Hq, S].

    num = sum of exp(x - phi) * v and den = sum of exp(x - phi) over the split's keys; no split looks at another.
    """
    e = scaled_scores(q, k, sm_scale=sm_scale) - phi
    dtype = e.dtype if v.dtype == torch.float16 else v.dtype  # of p; exp(12) is no fp16 number
    key = torch.arange(k.shape[1], device=q.device)
    num, den = [], []
    for s in range(num_splits):
        cuts = [splits.bounds(n, num_splits, BLOCK_KEYS)[s] for n in kv_lens.tolist()]
        keep = torch.stack([(key >= start) & (key < end) for start, end in cuts])  # [B, L]
        p = torch.exp(e).masked_fill(~keep[:, None], 0.0).to(dtype)
        grouped = p.unflatten(1, (k.shape[2], -1))
        num.append(torch.einsum("bhgl,blhd->bhgd", grouped, v.to(dtype)).flatten(1, 2).to(e.dtype))
        den.append(p.to(e.dtype).sum(-1))  # the rounded p, as in the numerator: a single key gives v exactly
    return torch.stack(num, 2), torch.stack(den, 2)


def out_of_bounds(q, k, kv_lens, *, phi, bounds, sm_scale=None):
    """[B, Hq] bool: rows where a valid key has x - phi <= a or >= b, bounds = (a, b). The bounds are inclusive."""
    a, b = args.unified(phi, bounds)
    e = scaled_scores(q, k, sm_scale=sm_scale) - phi
    valid = torch.arange(k.shape[1], device=q.device) < kv_lens[:, None]
    return (((e <= a) | (e >= b)) & valid[:, None]).any(-1)


def unified_decoding(q, k, v, kv_lens, *, phi, bounds, num_splits=None, sm_scale=None):
    """Decode attention with one maximum for all (paper: section 3, Eq. 4, Figure 6). Exact for every input.

    q [B, Hq, D]; k, v [B, L, Hkv, D]; kv_lens [B] int32, as in `decode_attention`. phi: the constant that replaces the
    maximum. bounds = (a, b): a row that has a valid key with x - phi <= a or >= b, x = sm_scale * q.k in natural-log
    units, is computed again with the synchronised softmax; keys beyond kv_len never count. Bounds wider than
    (-80, 60) are narrowed to that, the exponents that fp32 can hold.

    Returns o [B, Hq, D] in q.dtype and recomputed [B, Hq] bool. A sequence without keys gives 0 and False.
    Raises ValueError naming the argument.
    """
    batch, _, num_kv_heads, max_kv_len, dim = args.decode(q, k, v, kv_lens, dtypes=args.REFERENCE_FLOATS)
    args.num_splits(num_splits)
    args.unified(phi, bounds)
    if batch == 0:
        return torch.empty_like(q), torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device)
    num_splits = num_splits or splits.choose(batch * num_kv_heads, 132, max_kv_len, dim)
    valid = torch.arange(max_kv_len, device=q.device) < kv_lens[:, None]
    k, v = (x.masked_fill(~valid[:, :, None, None], 0.0) for x in (k, v))  # what lies beyond kv_len may be NaN
    num, den = unified_parts(q, k, v, kv_lens, phi=phi, num_splits=num_splits, sm_scale=sm_scale)
    num, den = num.sum(2), den.sum(2)  # Eq. 4: the partial results simply add
    o = num / den.masked_fill(den == 0.0, 1.0).unsqueeze(-1)
    recomputed = out_of_bounds(q, k, kv_lens, phi=phi, bounds=bounds, sm_scale=sm_scale)
    exact, _ = decode_attention(q, k, v, kv_lens, sm_scale=sm_scale)
    return torch.where(recomputed.unsqueeze(-1), exact, o.to(q.dtype)), recomputed


# ---- 2. flat GEMM


def gemv(x, w):
    """y = x w^T for a handful of tokens: x [M, K], w [N, K] as in `nn.Linear` -> y [M, N]; fp16, bf16, fp32 or fp64.

    Raises ValueError naming the argument.
    """
    args.linear(x, w, dtypes=args.REFERENCE_FLOATS)
    return F.linear(x, w)


def flat_gemm(x, w):
    """y = x w^T for few tokens: x [M, K], w [N, K] -> y [M, N] (paper: section 4). The same function as `gemv`."""
    return gemv(x, w)


def utilisation(m, pad):
    """Share of a tile's tokens that are tokens and not padding: m tokens in tiles of `pad`."""
    return m / (-(-m // pad) * pad)


def intensity(m, n, k, block_n):
    """(compute / memory, parallelism) of the paper's flat GEMM (section 4), in its own counting.

    compute / memory = 2 M K / (K + M K / block_n + M), in operations an element; parallelism = N / block_n programs.
    """
    return 2 * m * k / (k + m * k / block_n + m), n / block_n


# ---- 3. heuristic dataflow


class Dataflow:
    """Which implementation to use for M tokens and a weight [N, K]: measured once, looked up later (paper: section 5).

    A model has only four [N, K]. For each of them two numbers decide: M1, from which the second implementation is
    used, and M2, from which the third is.
    """

    FORMAT = 1

    def __init__(self, impls, table, device, versions):
        """impls: names in order. table: {(n, k): {"switch": [M1, M2], "us": {name: {m: us}}}}, None: never."""
        self.impls, self.table, self.device, self.versions = list(impls), table, device, versions

    @classmethod
    def profile(cls, shapes, ms, impls, timer, *, device=None):
        """Measure, and find M1 and M2 for every shape.

        shapes: [(n, k)]. ms: numbers of tokens, e.g. range(1, 65). impls: {name: function(x, w)} or a list of names, in
        the order in which they take over as M grows: GEMV, flat GEMM, library. timer(impl, m, n, k) -> microseconds,
        impl being the function (or the name, if only names were given). device: default this machine's.

        The paper's rule: go through M = 1, 2, ... with the first implementation until the second beats it: that is M1.
        Go on until the third beats the second: M2. One that never beats the one before it is left out.
        Raises ValueError naming the argument.
        """
        shapes, ms, names = [tuple(shape) for shape in shapes], sorted(set(ms)), list(impls)
        args.expect(bool(shapes) and all(len(s) == 2 for s in shapes), "shapes", shapes, "at least one (n, k)")
        args.expect(bool(ms) and ms[0] >= 1, "ms", ms, "at least one number of tokens >= 1")
        args.expect(bool(names), "impls", names, "at least one implementation")
        call = impls if isinstance(impls, Mapping) else {name: name for name in names}
        table = {}
        for n, k in shapes:
            us = {name: {m: float(timer(call[name], m, n, k)) for m in ms} for name in names}
            bad = [(name, m) for name in names for m in ms if not us[name][m] > 0]
            args.expect(not bad, "timer", f"a time that is not positive at {bad[:3]}", "microseconds > 0")
            table[n, k] = {"switch": _switches(names, ms, us), "us": us}
        return cls(names, table, device or device_name(), versions())

    def pick(self, m, n, k):
        """The name of the implementation for x [m, k] and w [n, k]. ValueError for a shape that was not profiled."""
        args.expect(isinstance(m, int) and m >= 1, "m", m, "an int >= 1")
        known = ", ".join(f"[{n}, {k}]" for n, k in self.table)
        args.expect((n, k) in self.table, "n, k", f"[{n}, {k}]", f"one of the profiled {known}")
        chosen = self.impls[0]
        for name, start in zip(self.impls[1:], self.table[n, k]["switch"]):
            if start is not None and m >= start:
                chosen = name
        return chosen

    def save(self, path):
        """Write the table as JSON, with device and versions."""
        shapes = [
            {"n": n, "k": k, "switch": row["switch"], "us": {name: list(t.items()) for name, t in row["us"].items()}}
            for (n, k), row in self.table.items()
        ]
        record = {"format": self.FORMAT, "device": self.device, "versions": self.versions, "impls": self.impls}
        path = Path(path)
        part = path.with_name(path.name + ".part")  # an interrupted run leaves the old table whole
        part.write_text(json.dumps(record | {"shapes": shapes}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path, *, any_device=False):
        """Read a saved table. One that was measured on another device is refused, unless any_device is True.

        Raises ValueError naming the file if it is no such table, OSError if it cannot be read.
        """
        path = Path(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != cls.FORMAT:
                raise ValueError(f"format {record['format']}, expected {cls.FORMAT}")
            impls, device, made_with = record["impls"], record["device"], record["versions"]
            table = {(row["n"], row["k"]): _read_row(row, impls) for row in record["shapes"]}
            if not table or not isinstance(device, str) or not isinstance(made_with, dict):
                raise ValueError("no shapes, device or versions")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"path: {path.name} is not a saved Dataflow table ({what})") from None
        here = device_name()
        if device != here and not any_device:
            raise ValueError(
                f"path: {path.name} was measured on {device}, this machine has {here}. Its crossover points need not "
                "hold here: run Dataflow.profile, or ask for the table with any_device=True"
            )
        return cls(impls, table, device, made_with)


def _switches(names, ms, us):
    """From which M on each implementation but the first is used; None for one that never beats the one before it."""
    found, current, start = [], names[0], 0
    for name in names[1:]:
        first = next((i for i in range(start, len(ms)) if us[name][ms[i]] < us[current][ms[i]]), None)
        found.append(None if first is None else ms[first])
        if first is not None:
            current, start = name, first
    return found


def _read_row(row, impls):
    us = {name: {int(m): float(t) for m, t in row["us"][name]} for name in impls}
    switch = row["switch"]
    if len(switch) != len(impls) - 1 or any(s is not None and not isinstance(s, int) for s in switch):
        raise ValueError(f"switch: got {switch}, expected {len(impls) - 1} numbers of tokens")
    return {"switch": switch, "us": us}


def device_name():
    """The GPU's name, or "CPU" and its architecture, as the records name it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}"


def versions():
    """{"torch": ..., "triton": ...}: what the timed code was built with."""
    found = {"torch": torch.__version__}
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "none"
    return found
