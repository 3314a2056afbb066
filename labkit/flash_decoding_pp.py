"""FlashDecoding++ in plain torch (Hong et al., MLSys 2024, arXiv 2311.01282): its three ideas, one after the other.

1. Unified max. Softmax is the same whatever constant phi is subtracted from the scores, so all partial results may
   use one phi: numerators and denominators simply add. Rows whose scores stray too far from it are done again.
2. Flat GEMM. A decode step multiplies a few tokens with a large matrix; a tile of 64 tokens is then mostly padding.
3. Heuristic dataflow. Which implementation is fastest changes with the number of tokens: measure once, look up later.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

from labkit import args, bench, check, codegen, corpus, peers, player, splits, timing
from labkit.attention import attention, decode_attention, softmax_dtype
from labkit.flash_decoding import BLOCK_KEYS, decode_case
from labkit.model import load
from labkit.record import version

# ---- 1. unified max


def scaled_scores(q, k, *, sm_scale=None):
    """x = sm_scale * q k^T in natural-log units: q [B, Hq, D], k [B, L, Hkv, D] -> [B, Hq, L], at least fp32."""
    q, k = (x.to(softmax_dtype(q.dtype)) for x in (q, k))
    x = torch.einsum("bhgd,blhd->bhgl", q.unflatten(1, (k.shape[2], -1)), k)
    return x.flatten(1, 2) * args.scale(sm_scale, q.shape[-1])


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


def unified_decoding(q, k, v, kv_lens, *, phi, bounds, num_splits=None, sm_scale=None, synchronised=False):
    """Decode attention with one maximum for all (paper: section 3, Eq. 4, Figure 6). Exact for every input.

    q [B, Hq, D]; k, v [B, L, Hkv, D]; kv_lens [B] int32, as in `decode_attention`. phi: the constant that replaces the
    maximum. bounds = (a, b): a row that has a valid key with x - phi <= a or >= b, x = sm_scale * q.k in natural-log
    units, is computed again with the synchronised softmax; keys beyond kv_len never count. Bounds wider than
    (-80, 60) are narrowed to that, the exponents that fp32 can hold. synchronised: the usual softmax for all rows, and
    nothing is recomputed.

    Returns o [B, Hq, D] in q.dtype and recomputed [B, Hq] bool. A sequence without keys gives 0 and False.
    Raises ValueError naming the argument.
    """
    batch, _, num_kv_heads, max_kv_len, dim = args.decode(q, k, v, kv_lens, dtypes=args.REFERENCE_FLOATS)
    args.num_splits(num_splits)
    args.unified(phi, bounds)
    nothing = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device)
    if batch == 0:
        return torch.empty_like(q), nothing
    if synchronised:
        return decode_attention(q, k, v, kv_lens, sm_scale=sm_scale)[0], nothing
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
        return cls(names, table, device or device_name(), {p: version(p) for p in ("torch", "triton")})

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


# ---- reading phi from a model

# Where 99.99 % of the scores x = q.k / sqrt(D) of a model lie (paper: Figure 5).
PUBLISHED_RANGES = {"Llama-2-7B": (-16.8, 6.5), "ChatGLM2-6B": (-10.5, 13.7), "OPT-6.7B": (-496.8, 363.5)}


def model_scores(model, ids):
    """The scores that a model's attention sees on a text: a tensor [rows, T] a layer, fp32, NaN where no key is seen.

    A row is one query of one head. model: a `labkit.model.Llama`, or any model(ids, attend=...) that calls
    attend(layer, q, k, v). ids [B, T] int.
    """
    seen = {}

    def attend(layer, q, k, v):
        x = torch.einsum("bthgd,blhd->bhgtl", q.unflatten(2, (k.shape[2], -1)).float(), k.float())
        keep = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        seen[layer] = (x * q.shape[-1] ** -0.5).masked_fill(~keep, math.nan).flatten(0, 3)
        return attention(q, k, v)

    with torch.no_grad():
        model(ids, attend=attend)
    return [seen[layer] for layer in sorted(seen)]


def score_range(scores, coverage=1.0):
    """(low, high): the central `coverage` of some scores lies between them. NaN is no score."""
    args.expect(0 < coverage <= 1, "coverage", coverage, "above 0, at most 1")
    x = scores[~scores.isnan()].sort().values
    args.expect(len(x) > 0, "scores", "no scores", "at least one")
    tail = int((1 - coverage) / 2 * len(x))
    return x[tail].item(), x[len(x) - 1 - tail].item()


def rows_outside(scores, phi, bounds):
    """Which rows of `model_scores` would be computed again, and which of these for nothing: two bool tensors [rows].

    For nothing: the row's largest score is within the bounds, so the keys far below it weigh next to nothing.
    """
    e, (a, b) = scores - phi, bounds
    trips = ((e <= a) | (e >= b)).any(-1)  # false for NaN
    top = e.nan_to_num(-math.inf).amax(-1)
    return trips, trips & (top > a) & (top < b)


def calibrate(low, high, dtype=torch.bfloat16):
    """(phi, bounds) for scores between low and high, p = exp(x - phi) in dtype.

    The bounds are what the dtype can hold, not what was seen: they are there to catch what calibration did not see.
    phi puts the range into the middle of them, so that both sides have the same room.
    Raises ValueError if the range is wider than the bounds: such a model (OPT-6.7B) is not for this technique.
    """
    a, b = args.EXP_LIMITS[torch.float16 if dtype == torch.float16 else torch.float32]
    what = f"{low:.1f} to {high:.1f} ({high - low:.1f} wide)"
    args.expect(low <= high and high - low < b - a, "low, high", what, f"at most {b - a:g} wide, for {dtype}")
    return (low + high) / 2 - (a + b) / 2, (a, b)


def flagged_rows(share, keys):
    """Share of rows with at least one of `keys` scores outside a range that holds the share 1 - `share` of all scores.

    As if scores were independent: 99.99 % of the scores is far from 99.99 % of the rows.
    """
    return 1 - (1 - share) ** keys


def lab_model_scores(rows=4, length=256):
    """`model_scores` of the lab's own model (or of $LAB_MODEL) on the calibration text; None where there is none."""
    try:
        model, encode, _ = load()
    except FileNotFoundError:
        return None
    text = b"".join(corpus.texts_of("calibration").values()).decode(errors="replace")
    return model_scores(model, torch.tensor(encode(text[: rows * length])[: rows * length]).view(rows, length))


# ---- players

FIGURE_6 = {"x": (4.0, 5.0, 6.0, 7.0), "y": (3.0, 6.0, 9.0, 6.0)}  # the paper's two rows: two parts of two keys each


def phi_player(bounds=(-3.0, 3.0)):
    """Turn phi on the rows of the paper's Figure 6: what each part adds up, and which keys meet a bound.

    All of it comes from the reference. The values are unit vectors, so the output is the softmax.
    """
    q, v = torch.zeros(1, 1, 16), torch.eye(4, 16).view(1, 4, 1, 16)
    q[..., 0] = 1.0

    def frame(row, phi):
        k = torch.zeros(1, 4, 1, 16)
        k[0, :, 0, 0] = torch.tensor(FIGURE_6[row])
        one, two, four = (torch.tensor([n], dtype=torch.int32) for n in (1, 2, 4))
        options = dict(phi=float(phi), sm_scale=1.0)
        met = [out_of_bounds(q, k[:, i : i + 1], one, bounds=bounds, **options).item() for i in range(4)]
        o, recomputed = unified_decoding(q, k, v, four, bounds=bounds, num_splits=1, **options)
        panels, dens = {}, []
        for part, at in {"part 0": slice(0, 2), "part 1": slice(2, 4)}.items():
            num, den = unified_parts(q, k[:, at], v[:, at], two, num_splits=1, **options)
            dens.append(den.item())
            scores, colors = FIGURE_6[row][at], ["orange" if m else "blue" for m in met[at]]
            lines = [scores, [x - phi for x in scores], num.flatten()[at].tolist()]
            panels[part] = [[(color, f"{x:.4g}") for color, x in zip(colors, line)] for line in lines]
        total = f"{dens[0]:.4g} + {dens[1]:.4g} = {sum(dens):.4g}"
        text = f"phi = {phi}: the parts' denominators add, {total}, and neither part waits for the other."
        if recomputed:
            keys = ", ".join(f"key {i}" for i in range(4) if met[i])
            text = f"phi = {phi}: a bound is met by {keys}. The row is computed again, with its maximum."
        return {"text": text, "o": [[("", f"{p:.4f}") for p in o[0, 0, :4].tolist()]]} | panels

    lines, keys = ["score", "score - phi", "exp of it"], [f"key {i}" for i in range(4)]
    panels = {
        "part 0": player.Grid(3, 2, row_labels=lines, col_labels=keys[:2], name="part 0"),
        "part 1": player.Grid(3, 2, row_labels=lines, col_labels=keys[2:], name="part 1"),
        "o": player.Grid(1, 4, row_labels=["softmax"], col_labels=keys, name="the result"),
    }
    controls = {"row": list(FIGURE_6), "phi": list(range(11))}
    legend = {"blue": "between the bounds", "orange": "meets a bound"}
    caption = f"The rows of the paper's Figure 6, bounds {bounds[0]:g} and {bounds[1]:g}. Computed by the reference."
    options = dict(legend=legend, caption=caption, start=("x", 6))
    return player.Explorer("One phi for two parts", controls, panels, frame, **options)


def dataflow_player(flow, where):
    """Walk M: how long each implementation took, which one the table picks, and why. where: what the times are."""
    shapes = {f"[{n}, {k}]": (n, k) for n, k in flow.table}
    ms = list(next(iter(flow.table.values()))["us"][flow.impls[0]])

    def times(shape, m):
        return {name: us[m] for name, us in flow.table[shapes[shape]]["us"].items()}

    def best_and_chosen(shape, m):
        us = times(shape, m)
        return min(us, key=us.get), flow.pick(m, *shapes[shape])

    def second_to_best(at):
        best, second = sorted(times(*at).values())[:2]
        return second / best

    def frame(shape, m):
        us = times(shape, m)
        best, chosen = best_and_chosen(shape, m)
        bars = []
        for lane, name in enumerate(flow.impls):
            color = "green" if name == chosen else "blue"
            label = f"{us[name]:.0f} us" if us[name] < math.inf else "not measured"
            bars.append((lane, 0, min(us[name] / us[best], 4.0), color, label))
        start = dict(zip(flow.impls, [1, *flow.table[shapes[shape]]["switch"]]))
        used = {name: m1 for name, m1 in start.items() if m1 is not None and flow.pick(m1, *shapes[shape]) == name}
        text = f"{shape}, M = {m}: {chosen}. Table: "
        text += ", then ".join(f"{name} from M = {m1}" for name, m1 in used.items()) + "."
        if best != chosen:
            text += f" At this M {best} was faster: the rule goes by the first crossing and never back."
        switches = {name: used.get(name, "never") for name in flow.impls}
        return {"text": text, "time": bars, "starts": switches}

    panels = {
        "time": player.Bars(flow.impls, unit="times the fastest (cut at 4)", span=4.0, name="time for this M"),
        "starts": player.Values(flow.impls, ["used from M ="], name="the lookup table"),
    }
    controls = {"weight [N, K]": list(shapes), "M": ms}
    legend = {"green": "picked", "blue": "the others"}
    right = [at for at in itertools.product(*controls.values()) if len(set(best_and_chosen(*at))) == 1]
    start = max(right, key=second_to_best, default=None)  # where it matters; a miss is for the reader to find
    options = dict(legend=legend, caption=where, start=start)
    return player.Explorer("Who multiplies?", controls, panels, frame, **options)


def try_phi(kernel, phi, width, device="cpu"):
    """Run the kernel with one phi and bounds of +-width on scores around 0, and say what it did. For the live cell."""
    q, k, v, kv_lens = check.DecodeCase("", (200, 100), 4, 2, 64, torch.float32).tensors(device)
    options = dict(phi=float(phi), bounds=(-float(width), float(width)), num_splits=2)
    got = kernel(q, k, v, kv_lens, **options)
    verdicts = check.compare(got, unified_decoding, q, k, v, kv_lens, **options)
    return f"{int(got[1].sum())} of {got[1].numel()} rows were computed again. " + "; ".join(map(str, verdicts))


# ---- what is compiled


def codegen_cases():
    """Both walks of the split kernel, wide fp16 bounds; each padding of the flat GEMM, with and without a cut K."""
    tensor = codegen.Tensor

    def decode(name, dtype="bfloat16", head_dim=128, group=8, bounds=(-9.0, 11.0), **options):
        kv = tensor((2, 512, 2, head_dim), dtype)
        inputs = dict(q=tensor((2, 2 * group, head_dim), dtype), k=kv, v=kv, kv_lens=tensor((2,), "int32", 512))
        return codegen.Case(
            "kernels.flash_decoding_pp:unified_decoding", name,
            inputs | dict(phi=0.0, bounds=bounds, num_splits=4) | options,
            matrix=("_unified_split_kernel",), narrow=("_unified_merge_kernel",),
        )  # fmt: skip

    def linear(function, m, n, k, dtype="bfloat16", name="", **options):
        # 8 columns are one mma; Triton 3.7 makes no wgmma of them. A test of its own looks at the instruction.
        kernels = ("_flat_gemm_kernel",) if options.get("pad") in (16, 64) else ()
        return codegen.Case(
            f"kernels.flash_decoding_pp:{function}",
            name or f"{dtype}, M={m} [{n}, {k}]" + "".join(f", {key} {value}" for key, value in options.items()),
            dict(x=tensor((m, k), dtype), w=tensor((n, k), dtype)) | options, matrix=kernels,
        )  # fmt: skip

    return [
        decode("bf16, head_dim 128, group 8"),
        decode("bf16, head_dim 128, group 8, synchronised", synchronised=True),
        decode("fp16, head_dim 64, group 1, one split", "float16", 64, 1, num_splits=1),
        decode("fp16, head_dim 128, group 8, bounds wider than fp16", "float16", bounds=(-30.0, 30.0)),
        decode("bf16, head_dim 128, group 64", group=64),
        decode("bf16, head_dim 256, group 64", head_dim=256, group=64),
        decode("fp32, head_dim 128, group 8", "float32"),
        decode("fp32, head_dim 160, group 64", "float32", 160, 64),
        linear("gemv", 1, 4096, 4096),
        linear("gemv", 4, 11008, 4096, "float16"),
        linear("flat_gemm", 8, 4096, 4096, pad=8),
        linear("flat_gemm", 8, 4096, 4096, pad=16),
        linear("flat_gemm", 8, 4096, 4096, pad=64),
        linear("flat_gemm", 8, 32000, 4096, "float16", pad=8),
        linear("flat_gemm", 8, 4096, 4096, "float32"),
    ]


# ---- benchmark cases

LLAMA2_7B = {"QKV": (12288, 4096), "O": (4096, 4096), "FFN1": (11008, 4096), "FFN2": (4096, 11008)}  # [N, K]
MS = (1, 2, 4, 8, 16, 32, 64)
SYNC, FLAGGED = "Llama-2-7B heads (32, 32), bf16: with and without the running maximum", "Share of rows that trip"
FLAT, GEMV = "Flat GEMM, the four [N, K] of Llama-2-7B, bf16", "GEMV, the four [N, K] of Llama-2-7B, bf16"
PADS = {f"pad {pad}": {"pad": pad} for pad in (8, 16, 64)}
COMPILED = {"flat O M=8", "flat QKV M=8", "flat FFN2 M=64"}


def library(x, w):
    """`F.linear`: cuBLAS on an NVIDIA GPU."""
    return lambda: F.linear(x, w)


def compiled(x, w):
    """torch.compile with max-autotune: it may choose a Triton kernel of its own, split-K included, or cuBLAS."""
    key = (x.dtype, x.shape, w.shape)
    linear = peers.compiled(F.linear, x.device.type, *key, mode="max-autotune-no-cudagraphs")
    return lambda: linear(x, w)


def linear_case(name, op, m, n, k, *, tiny=False, **options):
    """y = x w^T in bf16, weights scaled as a layer's, so that y is of the size of x."""
    if tiny:
        n, k = n // 128, k // 32
    options |= dict(bytes=2 * (m * k + n * k + m * n), flops=2 * m * n * k)

    def make(generator, device):
        x, w = (torch.randn(r, k, generator=generator, device=device) for r in (m, n))
        return {"x": x.bfloat16(), "w": (w * k**-0.5).bfloat16()}

    return bench.Case(name, op, make, **options)


def unified_case(name, batch, kv_len, share=0.0, *, tiny=False, **options):
    """One decode step of Llama-2-7B; in `share` of the sequences one key of every head lies out of bounds."""
    base = decode_case(
        name, batch, kv_len, 32, 32, torch.bfloat16, op="unified_decoding", tiny=tiny, **options
    )  # fmt: skip

    def make(generator, device):
        inputs = base.make(generator, device)
        rows = round(share * len(inputs["q"]))
        inputs["k"][:rows, 0] = inputs["q"][:rows, : inputs["k"].shape[2]] * 4  # x = 4 |q|^2 / sqrt(D), about 45
        return inputs | {"phi": 0.0, "bounds": (-20.0, 20.0)}

    return dataclasses.replace(base, make=make, peers={}, reference="unified_decoding", meaning=("synchronised",))


def cases(tiny=False) -> list[bench.Case]:
    """The running maximum's price, the price of recomputing, and who multiplies best for how many tokens."""
    result = []
    variants = {"synchronised": {"synchronised": True}}
    for batch, kv_len in ((1, 1024), (1, 8192), (1, 65536), (16, 1024), (16, 8192)):
        options = dict(section=SYNC, variants=variants, tiny=tiny)
        result.append(unified_case(f"unified B={batch} L={kv_len}", batch, kv_len, **options))
    for eighths in (0, 1, 2, 4, 8):
        name = f"unified B=16 L=4096, {eighths} of 8 rows trip"
        result.append(unified_case(name, 16, 4096, eighths / 8, section=FLAGGED, variants=variants, tiny=tiny))
    for layer, (n, k) in LLAMA2_7B.items():
        for m in MS:
            flat, few = f"flat {layer} M={m}", {"compile": "it takes half a minute a shape; three are timed"}
            without = {} if flat in COMPILED else few
            options = dict(section=FLAT, variants=PADS, peers={"F.linear": library, "compile": compiled})
            result.append(linear_case(flat, "flat_gemm", m, n, k, tiny=tiny, without=without, **options))
            if m <= 16:
                options = dict(section=GEMV, peers={"F.linear": library})
                result.append(linear_case(f"gemv {layer} M={m}", "gemv", m, n, k, tiny=tiny, **options))
    return result


def recorded_timer(comparison):
    """A timer for `Dataflow.profile` over the names "gemv", "flat_gemm" and "F.linear": medians of measured rows.

    comparison: what `labkit.bench.bench` returned. Returns None if it holds no timings of these cases.
    """
    layers = {shape: layer for layer, shape in LLAMA2_7B.items()}

    def timer(name, m, n, k):
        if name == "gemv" and m > 16:  # not measured: it reads w again for every four tokens
            return math.inf
        case = f"{'gemv' if name == 'gemv' else 'flat'} {layers[n, k]} M={m}"
        return comparison.us(case, "F.linear" if name == "F.linear" else None)

    known = all(timer(name, m, n, k) for n, k in layers for m in MS for name in ("gemv", "flat_gemm", "F.linear"))
    return timer if known else None


def gpu_timer(impl, m, n, k):
    """Median microseconds of impl(x [m, k], w [n, k]) on the GPU in bf16, with a cold L2 cache, in a CUDA graph."""
    case = linear_case("", "", m, n, k)
    generator = torch.Generator("cuda").manual_seed(0)
    copies = [case.make(generator, "cuda") for _ in range(timing.num_copies(case.bytes))]
    sample, _ = timing.gpu_timer([functools.partial(impl, **inputs) for inputs in copies])
    return sorted(us := sample())[len(us) // 2]


# ---- a stand-in where there is no GPU: three ways to multiply in torch, on this CPU

CPU_SHAPES = [(n // 4, k // 4) for n, k in LLAMA2_7B.values()]
CPU_MS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)


def cpu_token_by_token(x, w):
    return torch.stack([torch.mv(w, token) for token in x])


def cpu_swapped(x, w):
    return torch.mm(w, x.t()).t()


CPU_IMPLS = {"mv, token by token": cpu_token_by_token, "mm, w x^T": cpu_swapped, "F.linear": F.linear}


def cpu_timer(impl, m, n, k, repeats=7):
    """Least microseconds of processor time of impl(x [m, k], w [n, k]) in fp32, all threads together."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, k, generator=generator) for rows in (m, n))
    impl(x, w)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        impl(x, w)
        times.append(time.process_time() - start)
    return 1e6 * min(times)


def profile_here(ops, comparison):
    """(Dataflow, where its times come from): measured now on this GPU, or the record, or else this CPU's stand-in.

    ops: the module with the kernels. comparison: what `labkit.bench.bench` returned for this topic.
    """
    impls = {"gemv": ops.gemv, "flat_gemm": ops.flat_gemm, "F.linear": F.linear}
    shapes = LLAMA2_7B.values()
    if bench.this_gpu():
        return Dataflow.profile(shapes, MS, impls, gpu_timer), f"Measured now on {device_name()}, bf16."
    if timer := recorded_timer(comparison):
        flow = Dataflow.profile(shapes, MS, list(impls), timer, device=comparison.rows[0].device)
        return flow, comparison.source()
    where = (
        f"A stand-in: three ways to multiply in torch, timed now on this machine's processor ({device_name()}, fp32, "
        "weights a quarter as wide and as high). No GPU measurement has been recorded."
    )
    return Dataflow.profile(CPU_SHAPES, CPU_MS, CPU_IMPLS, cpu_timer), where
