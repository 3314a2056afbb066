import importlib.metadata
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from far_apart import far_apart
from fresh_memory import nan_in_fresh_memory

import kernels.flash_decoding_pp as pp
from labkit import codegen
from labkit import flash_decoding_pp as ref
from labkit.attention import attention, decode_attention
from labkit.check import BF16, DECODE_CASES, F16, F32, DecodeCase, assert_matches, randn

# (old text, new text) of these files; tests/planted_bugs.py plants them one at a time.
PLANTED_BUGS = [
    ("kernels/flash_decoding_pp.py", "(high >= bound_b)", "(high > bound_b)"),
    ("kernels/flash_decoding_pp.py", "(low <= bound_a)", "(low < bound_a)"),
    ("kernels/flash_decoding_pp.py", 'low = tl.minimum(low, tl.where(valid, e, float("inf")))', "low = tl.minimum(low, e)"),
    ("kernels/flash_decoding_pp.py", 'e = tl.where(valid, e, float("-inf"))', "e = e"),
    ("kernels/flash_decoding_pp.py", "p = tl.exp2(e * LOG2E)", "p = tl.exp2(e)"),
    ("kernels/flash_decoding_pp.py", "positive_scale(sm_scale, head_dim), float(phi)", "args.scale(sm_scale, head_dim), float(phi)"),
    ("kernels/flash_decoding_pp.py", "    acc += dot(p, v)\n    return l + p.to(tl.float32),",
     "    acc += dot(p, v)\n    return l + tl.exp2(e * LOG2E),"),
    ("kernels/flash_decoding_pp.py", "1.0), lse, again,", "1.0), lse, mask_h,"),
    ("kernels/flash_decoding_pp.py", "tl.where(part_den == 0.0, 0.0, tl.exp2((base - top) * LOG2E))",
     "tl.exp2((base - top) * LOG2E)"),
    ("kernels/flash_decoding_pp.py", "if SYNCHRONISED or tripped > 0:", "if SYNCHRONISED:"),
    ("kernels/flash_decoding_pp.py", "stride_rh, tripped > 0)", "stride_rh, tripped > 1)"),
    ("kernels/flash_decoding_pp.py", "p_fp32 = q.dtype == torch.float16", "p_fp32 = False"),
    ("kernels/flash_decoding_pp.py", "mask_k = (offs_k < k - first)[None, None, :]", "mask_k = (offs_k < k)[None, None, :]"),
    ("kernels/flash_decoding_pp.py", "step = tl.full((), BLOCK_K, tl.int64)", "step = BLOCK_K"),
    ("kernels/flash_decoding_pp.py", "tl.store(arrived_ptr, 0)", "tl.store(arrived_ptr, 1)"),
    ("kernels/flash_decoding_pp.py", "== SPLIT_K - 1:", "== SPLIT_K - 2:"),
    ("kernels/flash_decoding_pp.py", "for s in range(1, SPLIT_K):", "for s in range(1, SPLIT_K - 1):"),
    ("kernels/flash_decoding_pp.py", "EVEN_K=k % config[\"BLOCK_K\"] == 0", "EVEN_K=True"),
    ("labkit/args.py", "return max(float(bounds[0]), low), min(float(bounds[1]), high)",
     "return float(bounds[0]), float(bounds[1])"),
    ("labkit/flash_decoding_pp.py", "us[name][ms[i]] < us[current]", "us[name][ms[i]] <= us[current]"),
    ("labkit/flash_decoding_pp.py", "current, start = name, first", "start = first"),
    ("labkit/flash_decoding_pp.py", "if device != here and not any_device:", "if False:"),
    ("labkit/flash_decoding_pp.py", "((e <= a) | (e >= b)) & valid", "((e >= b)) & valid"),
    ("labkit/flash_decoding_pp.py", "(low + high) / 2 - (a + b) / 2", "(low + high) / 2"),
]  # fmt: skip

# phi and bounds: nothing trips; a few rows trip, above and below; all trip; p is too large for fp16; p just fits it.
RANGES = ((0.0, (-30.0, 30.0)), (0.3, (-2.2, 2.4)), (100.0, (-3.0, 3.0)), (-25.0, (-60.0, 60.0)), (-8.0, (-9.0, 11.0)))


@pytest.mark.parametrize("case, phi, bounds", [
    pytest.param(case, *RANGES[i % len(RANGES)], id=f"{case.name}, phi {RANGES[i % len(RANGES)][0]:g}")
    for i, case in enumerate(DECODE_CASES)
])  # fmt: skip
def test_unified_decoding(case, phi, bounds, device, monkeypatch):
    nan_in_fresh_memory(monkeypatch)
    q, k, v, kv_lens = case.tensors(device)
    options = dict(phi=phi, bounds=bounds, num_splits=case.num_splits, sm_scale=case.sm_scale)
    got = pp.unified_decoding(q, k, v, kv_lens, **options)
    assert_matches(got, ref.unified_decoding, q, k, v, kv_lens, **options)
    assert_matches(got[0], only_o, q, k, v, kv_lens, sm_scale=case.sm_scale)


def only_o(*inputs, **options):
    return decode_attention(*inputs, **options)[0]


SYNC = {"synchronised": True}


@pytest.mark.parametrize("num_splits, options", [(1, {}), (3, {}), (1, SYNC), (3, SYNC)], ids=str)
def test_bounds_are_inclusive_and_masked_keys_do_not_count(num_splits, options, device):
    """Integer scores, so that x - phi meets the bounds exactly. Heads: 0 within; 1 on b; 2 on a; 3 far outside but unread."""
    scores = torch.tensor([[4.0, 5, 6, 7], [4, 9, 6, 7], [4, 5, 3, 7], [5, 6, 7, 900]], device=device)
    k = torch.zeros(1, 150, 4, 16, device=device)
    k[0, :, :, 0] = 6.0
    k[0, [0, 70, 140, 149], :, 0] = scores.T  # one in each split of 64 keys, and the last key
    q = torch.zeros(1, 4, 16, device=device)
    q[..., 0] = 1.0
    v = randn(np.random.default_rng(1), 1, 150, 4, 16, device=device)
    for kv_len in (150,) if options else (150, 149):
        kv_lens = torch.tensor([kv_len], dtype=torch.int32, device=device)
        args = dict(phi=6.0, bounds=(-3.0, 3.0), num_splits=num_splits, sm_scale=1.0)
        o, recomputed = pp.unified_decoding(q, k, v, kv_lens, **args, **options)
        want = [False, not options, not options, not options and kv_len == 150]
        assert recomputed.tolist() == [want]
        assert_matches(o, only_o, q, k, v, kv_lens, sm_scale=1.0)


def test_rows_within_bounds_do_not_depend_on_their_neighbours(device):
    """Bit for bit: a row that trips makes its group's tile be walked again, but only its own result is replaced."""
    q, k, v, kv_lens = DecodeCase("", (150,), num_q_heads=4, num_kv_heads=1, dtype=F32).tensors(device)
    quiet, _ = pp.unified_decoding(q, k, v, kv_lens, phi=0.0, bounds=(-30.0, 30.0), num_splits=2)
    q[0, 2] *= 100.0
    o, recomputed = pp.unified_decoding(q, k, v, kv_lens, phi=0.0, bounds=(-30.0, 30.0), num_splits=2)
    assert recomputed.tolist() == [[False, False, True, False]]
    assert torch.equal(o[0, [0, 1, 3]], quiet[0, [0, 1, 3]])


def test_large_scores_in_fp16(device):
    """|q.k| is beyond fp16, the scaled score is not: it must not be rounded before it is scaled."""
    q, k = torch.full((1, 2, 128), 30.0, device=device).half(), torch.full((1, 3, 1, 128), 30.0, device=device).half()
    v, kv_lens = torch.arange(384.0, device=device).view(1, 3, 1, 128).half(), torch.tensor([3], dtype=torch.int32, device=device)
    for room in (ref, pp):
        o, again = room.unified_decoding(q, k, v, kv_lens, phi=0.0, bounds=(-9.0, 11.0))
        assert again.all()
        torch.testing.assert_close(o, v.mean(1).expand(1, 2, 128), rtol=1e-3, atol=0)


@pytest.mark.parametrize("sm_scale", [0.0, -0.1, float("nan"), "x"])
def test_a_scale_that_is_not_positive(sm_scale, device):
    q, k, v, kv_lens = DecodeCase("", (130,)).tensors(device)
    with pytest.raises(ValueError, match=r"^sm_scale: got .*, expected a positive number"):
        pp.unified_decoding(q, k, v, kv_lens, phi=0.0, bounds=(-9.0, 9.0), sm_scale=sm_scale)


@pytest.mark.parametrize("dtype, phi, sm_scale", [(F32, 150.0, 1.0), (BF16, -150.0, 1.0), (F16, 0.0, 40.0)], ids=str)
def test_scores_far_from_phi(dtype, phi, sm_scale, device):
    """exp(x - phi) overflows or underflows in every float type; infinite bounds are narrowed to what fp32 can hold."""
    q, k, v, kv_lens = DecodeCase("", (130, 70), dtype=dtype).tensors(device)
    options = dict(phi=phi, bounds=(-np.inf, np.inf), num_splits=4, sm_scale=sm_scale)
    o, recomputed = pp.unified_decoding(q, k, v, kv_lens, **options)
    assert recomputed.all()
    assert_matches(o, only_o, q, k, v, kv_lens, sm_scale=sm_scale)


@dataclass(frozen=True)
class LinearCase:
    m: int
    n: int
    k: int
    dtype: torch.dtype = F32
    strided: bool = False

    def tensors(self, device):
        rng = np.random.default_rng(self.m + self.n)
        if self.strided:  # every second row and column of a buffer full of NaN
            wide = [torch.full((2 * rows, 2 * self.k), float("nan"), device=device) for rows in (self.m, self.n)]
            wide = [x.to(self.dtype)[::2, ::2] for x in wide]
            return [x.copy_(randn(rng, *x.shape, dtype=self.dtype, device=device)) for x in wide]
        return [randn(rng, rows, self.k, dtype=self.dtype, device=device) for rows in (self.m, self.n)]

    def __str__(self):
        return f"{self.m}x{self.n}x{self.k} {str(self.dtype)[6:]}{' strided' if self.strided else ''}"


GEMV_CASES = (
    LinearCase(1, 70, 130, BF16), LinearCase(2, 5, 2100, F16), LinearCase(5, 9, 64), LinearCase(3, 1, 33, BF16),
    LinearCase(4, 6, 1500, F32, strided=True), LinearCase(0, 4, 8), LinearCase(2, 0, 8), LinearCase(2, 3, 1, BF16),
)  # fmt: skip


@pytest.mark.parametrize("case", GEMV_CASES, ids=str)
def test_gemv(case, device, monkeypatch):
    nan_in_fresh_memory(monkeypatch)
    x, w = case.tensors(device)
    assert_matches(pp.gemv(x, w), ref.gemv, x, w)


@pytest.mark.parametrize("function, k", [(pp.gemv, 1500), (pp.flat_gemm, 129)], ids=["gemv", "flat_gemm"])
@pytest.mark.parametrize("far", [0, 1], ids=["x", "w"])
def test_offsets_of_64_bits(function, k, far, device):
    """A transposed matrix: its columns lie far apart. flat_gemm moves by 128 of them at a time."""
    given = LinearCase(3, 5, k, F16).tensors(device)
    spread = [far_apart(matrix, 1) if i == far else matrix for i, matrix in enumerate(given)]
    assert_matches(function(*spread), ref.gemv, *given)


def test_unified_decoding_of_a_transposed_cache(device):
    q, k, v, kv_lens = DecodeCase("", (70, 70), dtype=F16).tensors(device)
    options = dict(phi=0.0, bounds=(-9.0, 11.0), num_splits=2)
    o, _ = pp.unified_decoding(q, far_apart(k, 3), v, kv_lens, **options)
    assert torch.equal(o, pp.unified_decoding(q, k, v, kv_lens, **options)[0])


FLAT_CASES = (
    (LinearCase(1, 1, 1700, BF16), None), (LinearCase(8, 130, 640, BF16), 8), (LinearCase(9, 65, 1000, F16), 8),
    (LinearCase(3, 64, 128, F16), 16), (LinearCase(17, 70, 300, BF16), 64), (LinearCase(65, 33, 100, F32), None),
    (LinearCase(8, 40, 500, F32, strided=True), 8), (LinearCase(20, 64, 520, BF16, strided=True), None),
    (LinearCase(0, 4, 8), None), (LinearCase(4, 7, 0), None), (LinearCase(2, 3, 1, F16), 16),
)  # fmt: skip


@pytest.mark.parametrize("case, pad", FLAT_CASES, ids=str)
def test_flat_gemm(case, pad, device, monkeypatch):
    nan_in_fresh_memory(monkeypatch)
    x, w = case.tensors(device)
    for _ in range(2 if case.k >= 500 else 1):  # K is cut there: the arrival counters must be back at zero
        assert_matches(pp.flat_gemm(x, w, pad=pad), ref.flat_gemm, x, w)


def test_flat_gemm_cuts_k_where_n_is_small(monkeypatch):
    """On 132 SMs: as many programs as run at a time, two an SM, and no piece of K shorter than four blocks."""
    monkeypatch.setattr(pp, "device_properties", lambda: {"multiprocessor_count": 132, "max_shared_mem": 232_448})
    split = lambda m, n, k: pp.flat_config(BF16, m, n, k)["SPLIT_K"]  # noqa: E731
    assert [split(8, n, 4096) for n in (64, 4096, 12288, 32000)] == [8, 4, 1, 1]
    assert split(8, 64, 128) == split(8, 64, 1) == 1
    assert [pp.flat_config(BF16, m, 4096, 4096)["BLOCK_M"] for m in (1, 8, 9, 33, 65)] == [8, 8, 16, 64, 64]


PADDED = {pad: f"bfloat16, M=8 [4096, 4096], pad {pad}" for pad in (8, 16, 64)}


def test_padding_shows_in_the_instruction():
    """On an A100 the padding is the number of m16n8k16 instructions, on an H200 the n of the wgmma (8: an mma)."""
    cases = [case for case in ref.codegen_cases() if case.name in PADDED.values()]
    rows = {(row["target"], row["case"]): row["matrix"] for row in codegen.compiled(cases, ("sm_80", "sm_90"))}
    counts = {pad: rows["sm_80", name] for pad, name in PADDED.items()}
    assert all(list(count) == ["HMMA.16816.F32.BF16"] for count in counts.values())
    assert [sum(counts[pad].values()) / sum(counts[8].values()) for pad in PADDED] == [1, 2, 8]
    hopper = {pad: list(rows["sm_90", name]) for pad, name in PADDED.items()}
    assert hopper[16] == ["HGMMA.64x16x16.F32.BF16"]
    assert hopper[64] == ["HGMMA.64x64x16.F32.BF16"]
    assert hopper[8] in (["HMMA.16816.F32.BF16"], ["HGMMA.64x8x16.F32.BF16"])


@pytest.mark.parametrize("function", [pp.gemv, pp.flat_gemm, ref.gemv, ref.flat_gemm])
def test_bad_linear_is_named(function, device):
    x, w = torch.zeros(2, 8, device=device), torch.zeros(3, 8, device=device)
    for name, given in {
        "x": (x[0], w), "w": (x, w[:, :4]), "x ": (x.int(), w.int()), "w ": (x, w.half()), "w  ": (x, w.to("meta")),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name.strip()} .*got .* expected "):
            function(*given)


def test_bad_options_are_named(device):
    q, k, v, kv_lens = DecodeCase("", (3,)).tensors(device)
    bad = {"phi": (float("nan"), "1", None), "bounds": ((3.0, -3.0), (1.0, 1.0), (1.0,), 3.0, (float("nan"), 1.0))}
    for function in (pp.unified_decoding, ref.unified_decoding):
        for name, values in bad.items():
            for value in values:
                with pytest.raises(ValueError, match=f"^{name}: got .* expected "):
                    function(q, k, v, kv_lens, **({"phi": 0.0, "bounds": (-3.0, 3.0)} | {name: value}))
        with pytest.raises(ValueError, match=r"^num_splits: got 0"):
            function(q, k, v, kv_lens, phi=0.0, bounds=(-1.0, 1.0), num_splits=0)
        with pytest.raises(ValueError, match=r"^k "):
            function(q, k[..., :5], v, kv_lens, phi=0.0, bounds=(-1.0, 1.0))
    with pytest.raises(ValueError, match=r"^pad: got 32"):
        pp.flat_gemm(torch.zeros(1, 8, device=device), torch.zeros(1, 8, device=device), pad=32)


def test_unified_parts_of_the_paper():
    """Figure 6 with phi 6, a -3, b 3: x passes, y trips on 9 - 6 >= 3. num / den is the softmax for any phi."""
    k = torch.zeros(1, 4, 1, 16)
    q, v = torch.zeros(1, 1, 16), torch.eye(4, 16).view(1, 4, 1, 16)
    q[..., 0] = 1.0
    for scores, trips in (((4.0, 5, 6, 7), False), ((3.0, 6, 9, 6), True)):
        k[0, :, 0, 0] = torch.tensor(scores)
        lens = torch.tensor([4], dtype=torch.int32)
        o, recomputed = ref.unified_decoding(q, k, v, lens, phi=6.0, bounds=(-3.0, 3.0), num_splits=1, sm_scale=1.0)
        torch.testing.assert_close(o[0, 0, :4], torch.tensor(scores).softmax(0))
        assert recomputed.item() is trips
        for phi in (0.0, 6.0, 20.0):
            num, den = ref.unified_parts(q, k, v, lens, phi=phi, num_splits=2, sm_scale=1.0)
            torch.testing.assert_close((num.sum(2) / den.sum(2).unsqueeze(-1))[0, 0, :4], o[0, 0, :4])


# ---- dataflow

# Made-up microseconds: gemv grows with M, flat_gemm is level to 8, the library is level throughout.
COSTS = {"gemv": lambda m, n, k: 3 + 2 * m, "flat_gemm": lambda m, n, k: 9 + (m > 8) * m, "library": lambda m, n, k: 12}


def profiled(costs=COSTS, **options):
    return ref.Dataflow.profile([(64, 32), (128, 32)], range(1, 20), list(costs), lambda *a: costs[a[0]](*a[1:]), **options)


def test_dataflow_finds_the_crossings():
    flow = profiled()
    # gemv 5, 7, 9, 11 against 9, and a tie is no win: from 4 on. flat_gemm 9 up to 8, then 18 against 12: from 9 on.
    assert flow.table[64, 32]["switch"] == [4, 9]
    assert [flow.pick(m, 64, 32) for m in (1, 3, 4, 8, 9, 500)] == ["gemv"] * 2 + ["flat_gemm"] * 2 + ["library"] * 2


def test_dataflow_stays_with_the_first_crossing():
    """The paper's rule goes upwards and never back, even where an earlier implementation would win again."""
    costs = COSTS | {"flat_gemm": lambda m, n, k: {4: 1, 5: 100}.get(m, 10)}
    assert profiled(costs).table[64, 32]["switch"] == [4, 5]
    costs = COSTS | {"flat_gemm": lambda m, n, k: 1000}  # never wins: left out
    assert profiled(costs).table[64, 32]["switch"] == [None, 5]
    assert profiled({"gemv": COSTS["gemv"]}).pick(9, 64, 32) == "gemv"


def test_dataflow_times_functions_when_it_gets_them():
    seen = []
    impls = {"gemv": ref.gemv, "flat_gemm": ref.flat_gemm}
    ref.Dataflow.profile([(4, 8)], [2, 1], impls, lambda *a: seen.append(a) or 1.0)
    assert seen == [(f, m, 4, 8) for f in impls.values() for m in (1, 2)]


def test_dataflow_on_disk(tmp_path):
    path = tmp_path / "flow.json"
    flow = profiled()
    flow.save(path)
    again = ref.Dataflow.load(path)
    assert vars(again) == vars(flow)
    assert again.versions["torch"] == importlib.metadata.version("torch")  # without the +cu130 of torch.__version__
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"device": "NVIDIA H9000"}))
    with pytest.raises(ValueError, match=r"flow.json was measured on NVIDIA H9000, this machine has .*any_device=True"):
        ref.Dataflow.load(path)
    assert ref.Dataflow.load(path, any_device=True).pick(4, 64, 32) == "flat_gemm"
    broken = (path.read_text()[:-40], "[]", "{}", json.dumps(record | {"format": 2}), json.dumps(record | {"shapes": []}))
    broken += (json.dumps(record | {"impls": ["gemv", "cublas", "library"]}), json.dumps(record | {"impls": ["gemv"]}))
    for text in broken:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^path: flow.json is not a saved Dataflow table"):
            ref.Dataflow.load(path)
    with pytest.raises(FileNotFoundError):
        ref.Dataflow.load(tmp_path / "missing.json")


def test_dataflow_refuses_nonsense():
    flow = profiled()
    with pytest.raises(ValueError, match=r"^n, k: got \[64, 33\], expected one of the profiled \[64, 32\], \[128, 32\]"):
        flow.pick(1, 64, 33)
    with pytest.raises(ValueError, match=r"^m: got 0"):
        flow.pick(0, 64, 32)
    for name, given in {"shapes": ([], [1], ["a"]), "ms": ([(1, 1)], [0], ["a"]), "impls": ([(1, 1)], [1], [])}.items():
        with pytest.raises(ValueError, match=f"^{name}: got"):
            ref.Dataflow.profile(*given, lambda *a: 1.0)
    with pytest.raises(ValueError, match=r"^timer: got"):
        ref.Dataflow.profile([(1, 1)], [1], ["a"], lambda *a: float("nan"))


# ---- calibration, players, cases


def test_scores_of_a_model():
    """A model of two layers: the scores of its causal pairs, grouped heads included, and attention as it should be."""
    rng = np.random.default_rng(0)
    q, k, v = randn(rng, 2, 5, 4, 8), randn(rng, 2, 5, 2, 8), randn(rng, 2, 5, 2, 8)

    def model(ids, attend):
        for layer in (0, 1):
            torch.testing.assert_close(attend(layer, q * (layer + 1), k, v), attention(q * (layer + 1), k, v))

    first, second = ref.model_scores(model, None)
    assert first.shape == (2 * 4 * 5, 5)
    want = torch.full((2, 4, 5, 5), np.nan)
    for b, h, t, n in np.ndindex(2, 4, 5, 5):
        if n <= t:
            want[b, h, t, n] = q[b, t, h] @ k[b, n, h // 2] / 8**0.5
    torch.testing.assert_close(first, want.view(40, 5), equal_nan=True)
    torch.testing.assert_close(second, 2 * first, equal_nan=True)
    assert ref.score_range(first) == pytest.approx((want.nan_to_num(99).min().item(), want.nan_to_num(-99).max().item()))
    assert ref.score_range(torch.arange(1000.0), 0.99) == (5.0, 994.0)


def test_rows_outside():
    """Within; one key on the lower bound, for nothing; the largest key outside; all below; only the keys seen count."""
    nan = np.nan
    scores = torch.tensor([[4.0, 6, nan], [3, 6, 7], [9, 6, 6], [1, 2, 2], [6, nan, nan]])
    trips, for_nothing = ref.rows_outside(scores, 6.0, (-3.0, 3.0))
    assert trips.tolist() == [False, True, True, True, False]
    assert for_nothing.tolist() == [False, True, False, False, False]


def test_calibration():
    for name, (low, high) in ref.PUBLISHED_RANGES.items():
        if name == "OPT-6.7B":
            with pytest.raises(ValueError, match=r"^low, high: got -496.8 to 363.5 \(860.3 wide\), expected at most 140"):
                ref.calibrate(low, high)
            continue
        phi, (a, b) = ref.calibrate(low, high)
        assert (low - phi) - a == pytest.approx(b - (high - phi))
        assert a < low - phi < high - phi < b
        with pytest.raises(ValueError, match=r"at most 20 wide, for torch.float16"):
            ref.calibrate(low, high, F16)
    assert ref.flagged_rows(1e-4, 1) == pytest.approx(1e-4)
    assert ref.flagged_rows(0.5, 3) == pytest.approx(0.875)


def test_phi_player_shows_the_reference():
    """Whatever phi is, the softmax stays. Row x is within its bounds for two of them, row y, 6 wide, for none."""
    html = ref.phi_player().html
    data = json.loads(html.split('<script type="application/json">')[1].split("</script>")[0])
    softmax = {row: [f"{p:.4f}" for p in torch.tensor(x).softmax(0).tolist()] for row, x in ref.FIGURE_6.items()}
    stays = {}
    for i, (frame, text) in enumerate(zip(data["frames"], data["texts"])):
        row, phi = "xy"[i // 11], i % 11
        assert text.startswith(f"phi = {phi}: ")
        shown = [data["states"][state][1] for state in frame]  # three lines of a part, then of the other, then softmax
        e = [x - phi for x in ref.FIGURE_6[row]]
        assert shown[2:4] + shown[8:10] == [f"{x:.4g}" for x in e]
        assert [float(x) for x in shown[4:6] + shown[10:12]] == pytest.approx(np.exp(e).tolist(), rel=1e-3)
        assert shown[12:] == softmax[row]
        if "again" not in text:
            stays.setdefault(row, []).append(phi)
    assert stays == {"x": [5, 6]}
    assert "phi = 6: a bound is met by key 0, key 2." in html


def test_player_shows_what_the_table_picks():
    flow = profiled()
    html = ref.dataflow_player(flow, "made up")
    texts = json.loads(html.html.split('<script type="application/json">')[1].split("</script>")[0])["texts"]
    want = [flow.pick(m, n, k) for n, k in flow.table for m in range(1, 20)]
    assert [text.split(": ")[1].split(".")[0] for text in texts] == want
    assert texts[0] == "[64, 32], M = 1: gemv. Table: gemv from M = 1, then flat_gemm from M = 4, then library from M = 9."
    assert "gemv was faster" not in texts[0]


def test_live_cell(device):
    said = [ref.try_phi(pp.unified_decoding, phi, 8, device) for phi in (0, 100)]
    assert [s.split(" rows")[0] for s in said] == ["0 of 8", "8 of 8"]
    assert all("WRONG" not in s for s in said)


def test_every_benchmark_case_is_right(device):
    """One of each section, tiny: the inputs that are timed are inputs that the kernel gets right."""
    cases = {case.section + case.name[-20:]: case for case in ref.cases(tiny=True) if "M=64" not in case.name}
    assert [case.name for case in ref.cases(tiny=True)] == [case.name for case in ref.cases()]
    tripping = next(case for case in cases.values() if "4 of 8 rows trip" in case.name)
    for case in (tripping, *{case.section: case for case in cases.values()}.values()):
        inputs = case.make(torch.Generator(device).manual_seed(0), device)
        got = getattr(pp, case.op)(**inputs)
        assert_matches(got, getattr(ref, case.reference or case.op), **inputs)
        if case is tripping:
            assert got[1].float().mean() == 0.5


def test_recorded_times_become_a_table():
    class Record:
        def us(self, case, provider=None):
            m = int(case.split("=")[1])
            return {"gemv": 2.0 * m, "F.linear": 20.0}.get(provider or case.split()[0], 5.0 + 20 * (m > 32))

    timer = ref.recorded_timer(Record())
    flow = ref.Dataflow.profile(ref.LLAMA2_7B.values(), ref.MS, ["gemv", "flat_gemm", "F.linear"], timer, device="x")
    assert all(row["switch"] == [4, 64] for row in flow.table.values())
    Record.us = lambda self, case, provider=None: None
    assert ref.recorded_timer(Record()) is None
