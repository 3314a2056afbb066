import numpy as np
import pytest
import torch
from far_apart import far_apart

import kernels.attention
from labkit.attention import attention
from labkit.check import BF16, F16, F32, assert_matches, randn

# (q_len, max_kv_len, q heads, kv heads, head_dim, dtype, arguments)
CASES = {
    "square, bf16": (130, 130, 2, 1, 64, BF16, {}),
    "one query, one key": (1, 1, 2, 2, 32, F32, {}),
    "edge 127": (127, 127, 1, 1, 64, F16, {}),
    "edge 128": (128, 128, 1, 1, 128, BF16, {}),
    "edge 129": (129, 129, 1, 1, 80, F32, {}),
    "chunk after a prefix": (33, 150, 4, 2, 64, BF16, {}),
    "decode as a chunk of one": (1, 200, 4, 1, 64, F32, {}),
    "more queries than keys": (70, 20, 2, 2, 64, F32, {}),
    "no keys": (5, 0, 2, 2, 64, F32, {}),
    "no queries": (0, 8, 2, 2, 64, F32, {}),
    "not causal": (40, 99, 2, 1, 96, F16, dict(causal=False)),
    "ragged": (65, 140, 2, 1, 64, BF16, dict(kv_lens=(140, 65, 64, 1, 0))),
    "ragged, not causal": (20, 90, 2, 2, 64, F32, dict(kv_lens=(90, 0, 33), causal=False)),
    "window": (100, 100, 2, 1, 64, F32, dict(window=17)),
    "window of one": (40, 60, 1, 1, 64, F32, dict(window=1)),
    "window wider than all": (50, 50, 1, 1, 64, BF16, dict(window=1000)),
    "window and sinks": (150, 150, 2, 1, 64, BF16, dict(window=20, num_sinks=4)),
    "window meets sinks": (90, 120, 2, 2, 64, F32, dict(window=60, num_sinks=50)),
    "sinks without window": (40, 40, 1, 1, 64, F32, dict(num_sinks=4)),
    "ragged window and sinks": (70, 200, 2, 1, 64, F16, dict(window=33, num_sinks=5, kv_lens=(200, 71, 30))),
    "head_dim 256": (40, 70, 1, 1, 256, BF16, {}),
    "other scale": (40, 40, 1, 1, 64, F32, dict(sm_scale=1.0)),
}


LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "odd start": lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:],  # the TMA cannot read it
    "every second number": lambda x: x.repeat_interleave(2, -1)[..., ::2],  # nor this
    "one key, repeated": lambda x: x[:, :1].expand_as(x),  # nor rows without distance
}


def tensors(q_len, max_kv_len, num_q_heads, num_kv_heads, head_dim, dtype, given, device, layout=None):
    rng = np.random.default_rng(0)
    given = dict(given)
    lens = given.pop("kv_lens", None)
    batch = 1 if lens is None else len(lens)
    q = randn(rng, batch, q_len, num_q_heads, head_dim, dtype=dtype, device=device)
    k, v = (randn(rng, batch, max_kv_len, num_kv_heads, head_dim, dtype=dtype, device=device) for _ in "kv")
    if lens is not None:
        for b, n in enumerate(lens):
            k[b, n:] = v[b, n:] = float("nan")
    if layout:
        q, k, v = (LAYOUTS[layout](x) for x in (q, k, v))
    if lens is not None:
        given["kv_lens"] = torch.tensor(lens, dtype=torch.int32, device=device)
    return q, k, v, given


LAID_OUT = [
    ("square, bf16", "heads first"),
    ("ragged window and sinks", "heads first"),
    ("edge 129", "heads first"),
    ("edge 128", "odd start"),
    ("ragged", "odd start"),
    ("ragged window and sinks", "every second number"),
    ("not causal", "one key, repeated"),
]


@pytest.mark.parametrize(
    "case, layout",
    [(case, None) for case in CASES] + LAID_OUT,
    ids=[*CASES, *(", ".join(pair) for pair in LAID_OUT)],
)
def test_kernel(case, layout, device):
    q, k, v, given = tensors(*CASES[case], device, layout)
    got = kernels.attention.attention(q, k, v, **given)
    assert_matches(got, attention, q, k, v, **given)


@pytest.mark.parametrize("name, dim", [("q", 1), ("q", 3), ("k", 3), ("v", 1)])
def test_offsets_of_64_bits(name, dim, device):
    """Tokens that lie far apart, and a large stride inside the head."""
    q, k, v, _ = tensors(20, 40, 2, 1, 64, F16, {}, device)
    spread = [far_apart(x, dim) if n == name else x for n, x in zip("qkv", (q, k, v))]
    assert_matches(kernels.attention.attention(*spread), attention, q, k, v)


def test_what_the_tma_can_read():
    x = torch.zeros(2, 8, 2, 64, dtype=BF16)
    assert kernels.attention.tma_can_read(x)
    assert kernels.attention.tma_can_read(LAYOUTS["heads first"](x))
    for layout in ("odd start", "every second number", "one key, repeated"):
        assert not kernels.attention.tma_can_read(LAYOUTS[layout](x)), layout
    shifted = torch.zeros(x.numel() + 4, dtype=BF16)[4:].view_as(x)  # 8 bytes on
    assert not kernels.attention.tma_can_read(shifted)
    assert kernels.attention.tma_can_read(x.expand(3, 2, 8, 2, 64)[:, 0]), "sequences may share their keys"


@pytest.mark.parametrize("only", ["k", "v"])
@pytest.mark.parametrize("layout", ["odd start", "every second number", "one key, repeated"])
def test_tma_needs_both(only, layout, device):
    """One tensor that the TMA cannot read is enough: pointers then read both."""
    q, k, v, _ = tensors(20, 40, 2, 1, 64, BF16, {}, device)
    k, v = (LAYOUTS[layout](x) if name == only else x for name, x in (("k", k), ("v", v)))
    assert_matches(kernels.attention.attention(q, k, v), attention, q, k, v)


def test_reference_equals_torch():
    q, k, v, _ = tensors(9, 9, 4, 2, 16, F32, {}, "cpu")
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(attention(q.double(), k.double(), v.double()), want)


def test_large_scores_in_fp16(device):
    """|q.k| is beyond fp16, the scaled score is not: it must not be rounded before it is scaled."""
    q, k = torch.full((1, 2, 1, 128), 30.0, device=device).half(), torch.full((1, 3, 1, 128), 30.0, device=device).half()
    v = torch.arange(384.0, device=device).view(1, 3, 1, 128).half()
    for function in (kernels.attention.attention, attention):
        o = function(q, k, v, causal=False)
        torch.testing.assert_close(o, v.mean(1, keepdim=True).expand_as(o), rtol=1e-3, atol=0)


def test_window_counts_the_token_itself():
    """With v a one-hot of its position, the output shows which keys a query saw."""
    q, k = torch.zeros(1, 6, 1, 6), torch.zeros(1, 6, 1, 6)
    seen = attention(q, k, torch.eye(6).reshape(1, 6, 1, 6), window=2, num_sinks=1)[0, :, 0] > 0
    want = [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]]
    assert [row.nonzero().flatten().tolist() for row in seen] == want


@pytest.mark.parametrize("function", [kernels.attention.attention, attention], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    "name, changed",
    [
        ("q", dict(q=(2, 3, 64))),
        ("q", dict(q=(1, 3, 5, 64))),
        ("k", dict(k=(1, 8, 2, 32))),
        ("v", dict(v=(1, 7, 2, 64))),
        ("kv_lens", dict(kv_lens=torch.tensor([9], dtype=torch.int32))),
        ("kv_lens", dict(kv_lens=torch.tensor([1, 2], dtype=torch.int32))),
        ("window", dict(window=0)),
        ("window", dict(window=4, causal=False)),
        ("window", dict(window=True)),
        ("num_sinks", dict(num_sinks=-1)),
        ("num_sinks", dict(num_sinks=True)),
        ("sm_scale", dict(sm_scale=float("nan"))),
        ("sm_scale", dict(sm_scale="0.125")),
    ],
)
def test_bad_input_is_named(function, name, changed, device, monkeypatch):
    monkeypatch.setenv("LAB_CHECK", "1")
    given = dict(q=(1, 3, 4, 64), k=(1, 8, 2, 64), v=(1, 8, 2, 64)) | changed
    given = {n: torch.zeros(x) if isinstance(x, tuple) else x for n, x in given.items()}
    given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    with pytest.raises(ValueError, match=f"^{name}\\b.*got .* expected "):
        function(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize("sm_scale", [0.0, -0.1, 1e-46, float("inf"), float("nan")])
def test_a_scale_that_is_not_positive(sm_scale, device):
    q, k, v, _ = tensors(3, 8, 4, 2, 64, F32, {}, device)
    with pytest.raises(ValueError, match=r"^sm_scale: got .*, expected a positive number"):
        kernels.attention.attention(q, k, v, sm_scale=sm_scale)


PLANTED_BUGS = [
    ("kernels/_tile.py", "m_safe = tl.where(m_new == float(\"-inf\"), 0.0, m_new)", "m_safe = m_new"),
    ("labkit/attention.py", "_group_heads(q, num_kv_heads).to(wide), k.to(wide))\n", "_group_heads(q, num_kv_heads), k).to(wide)\n"),
    ("labkit/args.py", "_is_number(sm_scale) and math.isfinite(sm_scale)", "_is_number(sm_scale)"),
    ("kernels/attention.py", "key <= position[:, None])", "key < position[:, None])"),
    ("kernels/attention.py", "key > position[:, None] - window)", "key >= position[:, None] - window)"),
    ("kernels/attention.py", "offset = kv_len - q_len", "offset = 0"),
    ("kernels/attention.py", "tl.maximum(first_position + 1, 0) // BLOCK_N", "tl.maximum(first_position + BLOCK_M, 0) // BLOCK_N"),
    ("kernels/attention.py", "first_position + BLOCK_M), 0)", "first_position + BLOCK_M - 1), 0)"),
    ("kernels/attention.py", "tl.maximum(first_position - window + 1, 0)", "tl.maximum(first_position - window + BLOCK_N, 0)"),
    ("kernels/attention.py", "0, tl.minimum(num_sinks, start),", "0, num_sinks,"),
    ("kernels/attention.py", "keep = key < end ", "keep = key >= 0 "),
    ("kernels/attention.py", "v = v_ptr + pid_b * stride_vb + head // group", "v = v_ptr + pid_b * stride_vb + head % group"),
    ("kernels/attention.py", "tl.maximum(kv_len, 1)", "tl.maximum(max_kv_len, 1)"),
    ("kernels/attention.py", "tma_can_read(k) and tma_can_read(v)", "tma_can_read(v)"),
    ("kernels/attention.py", "tma_can_read(k) and tma_can_read(v)", "tma_can_read(k)"),
    ("kernels/attention.py", "inner == 1 and ", ""),
    ("kernels/attention.py", "outer[1] > 0 and ", ""),
    ("kernels/attention.py", "[x.data_ptr(), *(stride", "[*(stride"),
    ("kernels/attention.py", "(rows < end) & mask_d", "mask_d"),
    ("kernels/_tile.py", "tl.max(s, 1) * qk_scale", "tl.max(s, 1)"),
    ("kernels/_tile.py", "tl.fma(s, qk_scale, -m_safe[:, None])", "s - m_safe[:, None]"),
    ("kernels/_tile.py", "2.0**-126 <= sm_scale", "0.0 <= sm_scale"),
]
