import hashlib
import multiprocessing.queues
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from far_apart import far_apart
from fresh_memory import nan_in_fresh_memory

import kernels.flash_decoding as fd
from kernels import _tile
from labkit import flash_decoding as ref
from labkit import ranks, splits, trace
from labkit.attention import decode_attention
from labkit.check import DECODE_CASES, F16, DecodeCase, assert_matches, randn


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda c: c.name)
def test_kernel(case, device, monkeypatch):
    nan_in_fresh_memory(monkeypatch)
    q, k, v, kv_lens = case.tensors(device)
    got = fd.flash_decoding(q, k, v, kv_lens, num_splits=case.num_splits, sm_scale=case.sm_scale)
    assert_matches(got, decode_attention, q, k, v, kv_lens, sm_scale=case.sm_scale)


@pytest.mark.parametrize("one_launch", [False, True])
def test_the_largest_score_comes_late(one_launch, device):
    """40 splits are merged 16 at a time, and scores grow with the keys: what was merged before is scaled down."""
    q, k, v, kv_lens = DecodeCase("", (1280,), 5, 1, 64, torch.float32).tensors(device)
    k *= torch.linspace(0.1, 3.0, 1280, device=device)[None, :, None, None]
    got = fd.flash_decoding(q, k, v, kv_lens, num_splits=40, one_launch=one_launch)
    assert_matches(got, decode_attention, q, k, v, kv_lens)


ONE_LAUNCH = [c for c in DECODE_CASES if c.num_splits != 1 and any(w in c.name for w in ("ragged", "empty", "group"))]


@pytest.mark.parametrize("case", ONE_LAUNCH, ids=lambda c: c.name)
def test_one_launch(case, device, monkeypatch):
    nan_in_fresh_memory(monkeypatch)
    q, k, v, kv_lens = case.tensors(device)
    for _ in range(2):  # the arrival counters must be back at zero
        got = fd.flash_decoding(q, k, v, kv_lens, num_splits=case.num_splits or 3, one_launch=True)
        assert_matches(got, decode_attention, q, k, v, kv_lens)


@pytest.mark.parametrize("name, dim", [("q", 2), ("k", 1), ("k", 3), ("v", 3)])
def test_offsets_of_64_bits(name, dim, device):
    """Keys that lie far apart, and a cache with a large stride inside the head."""
    inputs = dict(zip(("q", "k", "v", "kv_lens"), DecodeCase("", (70, 70), dtype=F16).tensors(device)))
    got = fd.flash_decoding(**inputs | {name: far_apart(inputs[name], dim)}, num_splits=2)
    assert_matches(got, decode_attention, *inputs.values())


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda c: c.name)
def test_reference_equals_plain_attention(case):
    q, k, v, kv_lens = (x.nan_to_num(0.0) if x.is_floating_point() else x for x in case.tensors())
    got = ref.flash_decoding(q, k, v, kv_lens, num_splits=case.num_splits, sm_scale=case.sm_scale)
    assert_matches(got, decode_attention, q, k, v, kv_lens, sm_scale=case.sm_scale)


def test_reference_equals_torch():
    """The witness itself is checked against torch's own attention, which also fixes the order of heads in a group."""
    q, k, v, kv_lens = DecodeCase("", (40, 40), num_q_heads=6, num_kv_heads=2).tensors()
    o, lse = decode_attention(q.double(), k.double(), v.double(), kv_lens)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double()[:, :, None], k.double().transpose(1, 2), v.double().transpose(1, 2), enable_gqa=True
    )[:, :, 0]
    torch.testing.assert_close(o, want)
    scores = torch.einsum("bhd,blhd->bhl", q.double(), k.double().repeat_interleave(3, 2)) / 8
    torch.testing.assert_close(lse, scores.exp().sum(-1).log())


def test_large_scores_in_fp16(device):
    """|q.k| is beyond fp16, the scaled score is not: it must not be rounded before it is scaled."""
    q, k = torch.full((1, 2, 128), 30.0, device=device).half(), torch.full((1, 3, 1, 128), 30.0, device=device).half()
    v, kv_lens = torch.arange(384.0, device=device).view(1, 3, 1, 128).half(), torch.tensor([3], dtype=torch.int32, device=device)
    for function in (fd.flash_decoding, ref.flash_decoding, decode_attention):
        o, lse = function(q, k, v, kv_lens)
        torch.testing.assert_close(o, v.mean(1).expand(1, 2, 128), rtol=1e-3, atol=0)
        torch.testing.assert_close(lse, torch.full_like(lse, 900 * 128**0.5 + np.log(3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_splits", [1, 2, 16, 17, 40])
def test_merge(num_splits, device):
    rng = np.random.default_rng(num_splits)
    part_o = randn(rng, 2, 3, num_splits, 80, device=device)
    part_lse = randn(rng, 2, 3, num_splits, device=device) * 30
    part_lse[0, 0, : num_splits // 2] = float("-inf")
    part_lse[1, 1] = float("-inf")  # nothing to merge: 0 and -inf
    part_o[part_lse == float("-inf")] = float("nan")  # an empty split need not have written anything
    assert_matches(fd.merge(part_o, part_lse), ref.merge, part_o, part_lse)
    strided = part_o.transpose(0, 1).contiguous().transpose(0, 1)
    assert_matches(fd.merge(strided, part_lse), ref.merge, part_o, part_lse)


def test_merge_of_nothing_but_sums(device, monkeypatch):
    """Heads without numbers still have a sum."""
    nan_in_fresh_memory(monkeypatch)
    part_o, part_lse = torch.zeros(1, 2, 3, 0, device=device), torch.zeros(1, 2, 3, device=device)
    assert_matches(fd.merge(part_o, part_lse)[1], lambda lse: ref.merge(part_o.to(lse.dtype), lse)[1], part_lse)


def test_merge_of_splits_that_lie_far_apart(device):
    rng = np.random.default_rng(0)
    part_o, part_lse = randn(rng, 2, 3, 17, 8, device=device), randn(rng, 2, 3, 17, device=device)
    got = fd.merge(far_apart(part_o, 2), far_apart(part_lse, 2))
    assert_matches(got, ref.merge, part_o, part_lse)


def test_online_softmax_is_softmax():
    rng = np.random.default_rng(0)
    scores, values = randn(rng, 50) * 10, randn(rng, 50, 4)
    *_, (m, l, acc) = ref.online_softmax(scores, values)
    assert m == scores.max()
    torch.testing.assert_close(acc / l, scores.softmax(0) @ values)


def test_split_bounds_cover_every_key_once():
    for kv_len in (0, 1, 63, 64, 65, 1000):
        for num_splits in (1, 2, 3, 7, 50):
            cuts = splits.bounds(kv_len, num_splits, 64)
            assert len(cuts) == num_splits
            assert [key for start, end in cuts for key in range(start, end)] == list(range(kv_len))


# FlashAttention-2 on an A100 (2 * 108 slots) and an H200 (2 * 132), 2 KV heads, head_dim 128; the C++ prints these.
FA2_SPLITS = {512: (4, 4), 1024: (8, 8), 4096: (32, 32), 16384: (64, 128), 65536: (103, 128), 131072: (94, 114)}


@pytest.mark.parametrize("kv_len", FA2_SPLITS)
def test_split_rule_is_flash_attentions(kv_len):
    got = tuple(splits.num_splits_heuristic(2, 2 * sms, kv_len // 128) for sms in (108, 132))
    assert got == FA2_SPLITS[kv_len]


def test_split_rule_on_a_grid():
    """The digest is of what the C++ rule, compiled with g++, returns for these arguments."""
    tiles, sms, blocks = range(1, 220, 3), (108, 132, 216, 264), (1, 2, 5, 13, 32, 100, 128, 512, 1000)
    got = bytes(splits.num_splits_heuristic(t, s, n) for s in sms for t in tiles for n in blocks)
    assert hashlib.sha256(got).hexdigest() == "40cd69b4bd8570767974c148c256378a9578adf4fff9601f61b4f5e4b80aa048"


def test_split_rule_edges():
    assert splits.num_splits_heuristic(173, 216, 64) == 1  # 0.8 * 216 = 172.8 slots are filled
    assert splits.num_splits_heuristic(172, 216, 64) == 5
    assert splits.num_splits_heuristic(1, 216, 0) == splits.num_splits_heuristic(0, 216, 64) == 1
    assert splits.num_splits_heuristic(1, 216, 10_000, max_splits=5) == 5


GOOD = dict(q=(2, 4, 64), k=(2, 32, 2, 64), v=(2, 32, 2, 64), kv_lens=torch.tensor([3, 32], dtype=torch.int32))
BAD = {
    "q: two dimensions": ("q", dict(q=(4, 64))),
    "q: not a tensor": ("q", dict(q=[1.0])),
    "q: integers": ("q", dict(q=torch.zeros(2, 4, 64, dtype=torch.int32))),
    "q: fp64": ("q", dict(q=torch.zeros(2, 4, 64, dtype=torch.float64))),
    "heads do not divide": ("q", dict(q=(2, 5, 64))),
    "no KV heads": ("q", dict(k=(2, 32, 0, 64), v=(2, 32, 0, 64))),
    "head_dim too large": ("q", dict(q=(2, 4, 257), k=(2, 32, 2, 257), v=(2, 32, 2, 257))),
    "k: other batch": ("k", dict(k=(3, 32, 2, 64))),
    "k: other head_dim": ("k", dict(k=(2, 32, 2, 32))),
    "k: other dtype": ("k", dict(k=torch.zeros(2, 32, 2, 64, dtype=torch.float16))),
    "k: other device": ("k", dict(k=torch.zeros(2, 32, 2, 64, device="meta"))),
    "v: other length": ("v", dict(v=(2, 31, 2, 64))),
    "kv_lens: int64": ("kv_lens", dict(kv_lens=torch.tensor([3, 32]))),
    "kv_lens: other batch": ("kv_lens", dict(kv_lens=torch.tensor([3], dtype=torch.int32))),
    "kv_lens: negative": ("kv_lens", dict(kv_lens=torch.tensor([-1, 32], dtype=torch.int32))),
    "kv_lens: too long": ("kv_lens", dict(kv_lens=torch.tensor([3, 33], dtype=torch.int32))),
    "num_splits: zero": ("num_splits", dict(num_splits=0)),
    "num_splits: float": ("num_splits", dict(num_splits=2.0)),
}


@pytest.mark.parametrize("function", [fd.flash_decoding, ref.flash_decoding], ids=["kernel", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case, function, device, monkeypatch):
    monkeypatch.setenv("LAB_CHECK", "1")  # look at values also where they live on a GPU
    name, changed = BAD[case]
    if function is ref.flash_decoding and case == "q: fp64":
        name = "k"  # the reference takes fp64, but not mixed with fp32
    given = GOOD | changed
    given = {n: torch.zeros(x) if isinstance(x, tuple) else x for n, x in given.items()}
    given = {n: x.to(device) if getattr(x, "device", None) == torch.device("cpu") else x for n, x in given.items()}
    with pytest.raises(ValueError, match=f"^{name}\\b.*got .* expected "):
        function(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("kv_lens"), **given)


def test_cast_rounds_to_nearest_even(device):
    """Around bf16 values and at the ties, through the kernel's own cast: one split merged is a copy of part_o."""
    bits = torch.arange(0, 2**16, 7, dtype=torch.int32)[:9216]
    for low in (0, 0x7FFF, 0x8000, 0x8001):
        x = ((bits << 16) | low).view(torch.float32)
        part_o = x.nan_to_num(0.0, 0.0, 0.0).reshape(1, 36, 1, 256).to(device)
        out = torch.empty(1, 36, 256, dtype=torch.bfloat16, device=device)
        fd._launch_merge(part_o, torch.zeros(1, 36, 1, device=device), out, torch.empty(1, 36, device=device))
        assert torch.equal(out, part_o[:, :, 0].to(torch.bfloat16))


def test_every_device_has_its_own_properties(monkeypatch):
    """Two GPUs in one process, and a rule that was asked on the first: the second's answer is its own, and kept."""
    asked = []
    driver = types.SimpleNamespace(get_current_device=lambda: current)
    driver.utils = types.SimpleNamespace(get_device_properties=lambda i: asked.append(i) or {"max_shared_mem": 1000 + i})
    monkeypatch.setattr(_tile, "INTERPRETED", False)
    monkeypatch.setattr(_tile.triton.runtime, "driver", types.SimpleNamespace(active=driver))
    for current in (70, 80, 70, 80):
        assert _tile.device_properties() == {"max_shared_mem": 1000 + current}
    assert asked == [70, 80]
    _tile._properties_of.cache_clear()


@pytest.mark.parametrize("world_size", [2, 4])
def test_context_parallel(world_size):
    """The merge across processes: ragged, one sequence that some ranks hold nothing of, one that is empty."""
    q, k, v, kv_lens = (x.nan_to_num(0.0) for x in DecodeCase("", (130, 20, 0), num_q_heads=6).tensors())
    for got in ranks.run(world_size, ref.context_parallel, decode_attention, q, k, v, kv_lens):
        assert_matches(got, decode_attention, q, k, v, kv_lens)


def test_players_show_the_run(device):
    """The player's table ends with the kernel's own output, and its tiles are the keys that the programs loaded."""
    arguments = ref.traced_problem() | {"num_splits": 3}
    (o, lse), walk = trace.watch("kernels.flash_decoding", "attend_tile", "flash_decoding", arguments)
    assert_matches((o, lse), decode_attention, *list(arguments.values())[:4])
    html = ref.split_player(o, lse, walk).html
    assert "At once, program 0 reads keys 64–95, program 1 reads keys 160–191. Each" in html
    for text in ("0–31", "192–223", "224–229", "1 of 4", f"lse {lse[0, 0]:.3f}", f"o {o[0, 0, 1]:.3f}"):
        assert text in html, text
    assert "256 programs" in ref.sm_player().html


def test_a_run_is_watched_where_kernels_are_compiled(monkeypatch):
    """There another process interprets. It ends before its answer is read, and the answer is whole: the same run."""
    job = ("kernels.flash_decoding", "attend_tile", "flash_decoding", ref.traced_problem() | {"num_splits": 3})
    here = trace.watch(*job)
    pickler = multiprocessing.queues._ForkingPickler
    read = pickler.loads

    def read_late(data):
        for child in multiprocessing.active_children():
            child.join()
        return read(data)

    monkeypatch.setattr(pickler, "loads", read_late)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    there = trace.watch(*job)
    assert all(torch.equal(a, b) for a, b in zip(here[0], there[0], strict=True))
    for a, b in zip(here[1], there[1], strict=True):
        assert a.program == b.program
        assert all(np.array_equal(x, y) for x, y in zip(a.inputs + a.outputs, b.inputs + b.outputs, strict=True))


@pytest.mark.parametrize("kv_len, num_splits, empty", [(1, 1, 0), (65, 3, 1), (1000, 40, 24)])
def test_live_cell(kv_len, num_splits, empty, device):
    said = ref.try_splits(fd.flash_decoding, kv_len, num_splits, device)
    assert said.startswith(f"{num_splits} splits, {empty} of them empty. output 0: ok")
    assert "WRONG" not in said


def test_too_late_import_is_explained():
    code = "import triton.language, os; os.environ['TRITON_INTERPRET'] = '1'; import kernels.flash_decoding"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "too late: Triton was imported before `kernels`" in done.stderr, done.stderr

PLANTED_BUGS = [
    ("kernels/flash_decoding.py", "mask_n = first + offs_n < end", "mask_n = first + offs_n < end + 1"),
    ("kernels/flash_decoding.py", "m, l, acc, qk_scale, True)", "m, l, acc, qk_scale, False)"),
    ("kernels/flash_decoding.py", "tl.where(holds[:, :, None], part, 0.0)", "part"),
    ("kernels/flash_decoding.py", "end = tl.minimum(start + split_len, kv_len)", "end = tl.minimum(start + split_len, max_kv_len)"),
    ("kernels/flash_decoding.py", "tl.cdiv(tl.cdiv(kv_len, BLOCK_N), num_splits)", "(tl.cdiv(kv_len, BLOCK_N) // num_splits)"),
    ("kernels/flash_decoding.py", "(pid_h * group + offs_h[:, None]) * stride_qh", "(pid_h + offs_h[:, None]) * stride_qh"),
    ("kernels/flash_decoding.py", "offs_s = tl.arange(0, BLOCK_S).to(tl.int64)", "offs_s = tl.arange(0, BLOCK_S)"),
    ("kernels/flash_decoding.py", "weight = tl.exp2((part_lse - m_safe[None, :]) * LOG2E)", "weight = tl.exp2(part_lse - m_safe[None, :])"),
    ("kernels/flash_decoding.py", "l = l * alpha + tl.sum(weight, 0)\n        acc", "l = l + tl.sum(weight, 0)\n        acc"),
    ("kernels/flash_decoding.py", "acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * part, 0)", "acc += tl.sum(weight[:, :, None] * part, 0)"),
    ("kernels/flash_decoding.py", "mask = (s + offs_s < num_splits)[:, None] & mask_h[None, :]", "mask = (s + offs_s < BLOCK_S)[:, None] & mask_h[None, :]"),
    ("kernels/flash_decoding.py", "tl.store(arrived, 0)", "tl.store(arrived, 1)"),
    ("kernels/flash_decoding.py", "for first in range(0, group, HEADS):", "for first in range(0, HEADS, HEADS):"),
    ("kernels/flash_decoding.py", "kv_head = pid_h // TILES", "kv_head = pid_h"),
    ("kernels/_tile.py", "acc * alpha[:, None] + dot", "acc + dot"),
    ("kernels/_tile.py", "l * alpha + tl.sum(p, 1)", "l + tl.sum(p, 1)"),
    ("kernels/_tile.py", "bits += 0x7FFF + ((bits >> 16) & 1)", "bits += 0x7FFF"),
    ("kernels/_tile.py", "l = tl.where(l == 0.0, 1.0, l)", "l = l"),
    ("kernels/_tile.py", "return acc * (1.0 / l)[:, None], (m + tl.log2(l)) * LN2", "return acc * (1.0 / l)[:, None], m + tl.log2(l)"),
    ("labkit/attention.py", "_group_heads(q, num_kv_heads).to(wide), k.to(wide)) * args", "_group_heads(q, num_kv_heads), k).to(wide) * args"),
    ("labkit/flash_decoding.py", "op=dist.ReduceOp.MAX, ", ""),
    ("labkit/flash_decoding.py", "(kv_lens - rank * per_rank)", "kv_lens"),
    ("labkit/splits.py", "0.85 * best", "0.9 * best"),
    ("labkit/splits.py", "f32(0.8) * f32(num_sms)", "f32(0.9) * f32(num_sms)"),
    ("labkit/args.py", "low <= got[0] and got[1] <= high", "low <= got[0]"),
]
