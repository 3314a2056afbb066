import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import kernels.flash_decoding_pp as pp
from labkit import flash_decoding_pp as ref
from labkit.attention import decode_attention
from labkit.check import BF16, DECODE_CASES, F16, F32, DecodeCase, assert_matches, randn

# (old text, new text) of these files; tests/planted_bugs.py plants them one at a time.
PLANTED_BUGS = []

# phi and bounds: nothing trips; a few rows trip, above and below; all trip; p needs more than fp16.
RANGES = ((0.0, (-30.0, 30.0)), (0.3, (-2.2, 2.4)), (100.0, (-3.0, 3.0)), (-8.0, (-9.0, 11.0)), (40.0, (-60.0, 60.0)))


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


def nan_in_fresh_memory(monkeypatch):
    """An output that a kernel forgets to write is NaN (a flag: True), not a lucky leftover."""
    empty, empty_like = torch.empty, torch.empty_like
    fill = lambda x: x.fill_(float("nan") if x.is_floating_point() else x.dtype == torch.bool)  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: fill(empty(*a, **kw)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: fill(empty_like(*a, **kw)))
