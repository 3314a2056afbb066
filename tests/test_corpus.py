"""The corpus: pinned splits, BOS and EOS beyond the bytes, nothing of the held-out text in the training text."""

import hashlib
import re
import sys

import numpy as np
import pytest
import torch

from labkit import corpus

PLANTED_BUGS = [
    ("labkit/corpus.py", "np.append(np.frombuffer(texts[name], np.uint8).astype(np.int64), EOS)", "np.frombuffer(texts[name], np.uint8).astype(np.int64)"),
    ("labkit/corpus.py", "{n: data for n, data in texts.items() if hashlib.sha256(data).hexdigest() == PINNED[split][n]}", "texts"),
    ("labkit/corpus.py", "if name not in apart and", "if"),
    ("labkit/corpus.py", "names = sorted(p.as_posix()", "names = list(p.as_posix()"),
    ("labkit/corpus.py", "\"site-packages\", ", ""),
    ("labkit/corpus.py", "\"encodings\"", "\"x\""),
    ("labkit/corpus.py", "not absent, ", "True, "),
    ("labkit/corpus.py", "i for i in ids if i < BOS", "i % 256 for i in ids"),
    ("labkit/corpus.py", "rows[:, :-1]), dim=1", "rows[:, 1:]), dim=1"),
]  # fmt: skip


@pytest.mark.parametrize("split", ["train", "held_out", "calibration"])
def test_read_is_the_files_in_order_each_with_eos(split):
    ids = corpus.read(split)
    assert ids.dtype == torch.int64
    texts = list(corpus.texts_of(split).values())
    ends = (ids == corpus.EOS).nonzero().flatten().tolist()
    assert len(ends) == len(texts)
    start = 0
    for end, data in zip(ends, texts):
        assert ids[start:end].numpy().astype(np.uint8).tobytes() == data
        start = end + 1
    assert start == len(ids)


@pytest.mark.parametrize("split", corpus.PINNED)
def test_pinned_files_are_what_was_pinned(split):
    texts, left_out = corpus.texts_of(split), corpus.left_out(split)
    assert {*texts, *left_out} == {*corpus.PINNED[split]}
    assert all(hashlib.sha256(data).hexdigest() == corpus.PINNED[split][name] for name, data in texts.items())
    if sys.version_info[:2] <= (3, 13):
        assert len(left_out) <= 5, left_out  # changed in a later patch release, or by a distribution


def test_a_file_that_differs_is_left_out_and_named(monkeypatch):
    pins = dict(corpus.PINNED["held_out"], **{"heapq.py": "0" * 64, "no/such.py": "1" * 64})
    monkeypatch.setitem(corpus.PINNED, "held_out", pins)
    corpus.texts_of.cache_clear()
    try:
        left_out = corpus.left_out("held_out")
        assert left_out["heapq.py"] == "differs"
        assert re.search(r"another .*heapq.py.*no/such.py", corpus.differs())
        assert left_out["no/such.py"] == "absent"
        assert "heapq.py" not in corpus.texts_of("held_out")
        with pytest.raises(ValueError, match=r"heapq\.py"):
            corpus.read("held_out", ["heapq.py"])
    finally:
        corpus.texts_of.cache_clear()


def test_splits_share_no_text():
    """Of the long lines of a pinned file, next to none stands in the training text: no copies under another name."""
    train = corpus.texts_of("train").values()
    lines = {line for data in train for line in data.split(b"\n") if len(line) > 60}
    for split in corpus.PINNED:
        texts = corpus.texts_of(split)
        assert not set(texts) & set(corpus.texts_of("train"))
        for name, data in texts.items():
            long = [line for line in data.split(b"\n") if len(line) > 60]
            shared = [line for line in long if line in lines]
            assert len(shared) <= 0.1 * len(long) + 2, (name, shared)


def test_training_text_is_the_library_and_nothing_installed():
    names = list(corpus.texts_of("train"))
    assert names == [*sorted(names[:-1]), "pydoc_data/topics.py"]
    assert {"argparse.py", "asyncio/locks.py", "ast.py"} <= {*names}
    apart = {"site-packages", "dist-packages", "lib-dynload", "test", "tests", "idlelib", "lib2to3", "encodings"}
    assert not [n for n in names if apart & {*n.split("/")} or "_sysconfigdata" in n]
    topics = corpus.texts_of("train")["pydoc_data/topics.py"]
    assert b'\n   assert_stmt ::= "assert"' in topics or b"assert_stmt:" in topics  # the text, not its source code


def test_with_bos():
    rows = corpus.read("calibration")[:24].view(3, 8)
    read = corpus.with_bos(rows)
    assert (read[:, 0] == corpus.BOS).all()
    assert torch.equal(read[:, 1:], rows[:, :-1])


def test_encode_and_decode():
    text = "naïve – ok\n"
    assert corpus.encode(text) == list(text.encode())
    assert corpus.decode([corpus.BOS, *corpus.encode(text), corpus.EOS]) == text
    assert corpus.decode([0xC3]) == "\ufffd"
    assert np.max(corpus.encode(text)) < corpus.BOS < corpus.EOS < corpus.VOCAB


def test_unknown_split():
    with pytest.raises(ValueError, match=r"split.*'test'"):
        corpus.read("test")
