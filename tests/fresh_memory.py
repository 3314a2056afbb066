"""Shared by the kernels' tests: memory that a kernel forgets to write must show."""

import torch


def nan_in_fresh_memory(monkeypatch):
    """What torch.empty and empty_like return is NaN (a flag: True) until it is written, not a lucky leftover."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(x):
        if x.is_floating_point():
            x.fill_(float("nan"))
        return x.fill_(True) if x.dtype == torch.bool else x

    monkeypatch.setattr(torch, "empty", lambda *a, **kw: fill(empty(*a, **kw)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: fill(empty_like(*a, **kw)))
