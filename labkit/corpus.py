"""The text that every reader already has: the Python standard library. Ids 0..255 are its bytes, then BOS and EOS.

Three splits. `held_out` and `calibration` are files that are byte-identical in early releases of Python 3.11, 3.12 and
3.13, pinned by sha256; one that differs here is left out, and `left_out` names it. `train` is the rest of the running
Python's library: source with its docstrings, and the language reference in `pydoc_data`. It varies with the version,
so a recipe that trains on it records its sha256.
"""

import hashlib
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np
import torch

from labkit.args import expect

BOS, EOS, VOCAB = 256, 257, 258

HELD_OUT = {
    "_markupbase.py": "cb14dd6f2e2439eb70b806cd49d19911363d424c2b6b9f4b73c9c08022d47030",
    "concurrent/futures/_base.py": "8c6d5f09f7c535d40fa1c30ebfcb35e0601c2abf32286a82cf151af7ddf72473",
    "email/headerregistry.py": "fada56c25b6a457c6a62af43f9f929bbc29424103ce65f40f114adb4fdf3d39f",
    "graphlib.py": "7bd338c5a475d1101064603d3baa5507446d3c5e73f741f6d6e77c6204c1eb65",
    "heapq.py": "6d43277e5c76fc0f073cd388fcff852d14d068f6bb6d4886c340f8b75a1229a9",
    "json/__init__.py": "d5d41e2c29049515d295d81a6d40b4890fbec8d8482cfb401630f8ef2f77e4d5",
    "optparse.py": "07d224301cba312fa0697bff9cd5a4bb4f778a90629632091b3f4ae874d89af5",
    "py_compile.py": "3464f04938b57a7aafbc5c394ccd4c46823ee607f7fe36b48b91ecbc30ff4e48",
    "string.py": "24aeae1f0526250f442022022bf98df9a823b1cb330543ee79e70e44907462e9",
    "tomllib/_parser.py": "4579b04a7566452304781ccce37d3ebc1c36e810b058bdb1f33c0e51ddab0397",
    "tracemalloc.py": "c2cc84a05b824df79840c98729a0e94ef8909b11c528a1b2c5a00aa436b97b25",
    "unittest/suite.py": "ed2da92bc9f97c53403ee2d3d12cc53b16a96e85d596ebc887b5a93458f3f6bc",
    "urllib/robotparser.py": "389b811835f9a3ba72b192c3487b0266fa31f6e571b7a83ceb2a34792dc0d9fc",
    "xml/sax/saxutils.py": "3fe2cdb6386e0c4d42d37c657bbecb78b69c57aedb1610dbd8bf4043944130ab",
}
CALIBRATION = {
    "difflib.py": "0c6afc23568d55b3e9ac914f9c5361e3033e778aa5b58d3cc82835fc5c638679",
    "email/contentmanager.py": "2d81026aef17e4786b15d9ec0629304987e3f275a0fd0a421a81b4ed87234b2c",
    "email/header.py": "4d9baa908ad5288dd8fad8cf20b3802ffac77ba1642727804a633b201c56e5ca",
    "multiprocessing/heap.py": "f6bb79bb99b9ae484935f0d68822e9603a1622dd0b6c4966c79db232a93ba614",
    "pyclbr.py": "e8ca09333701ba41244e20b8c2c37b7ed0499b88c4b2ca82cac51ef89ca9e647",
    "weakref.py": "56f8d313fb74019e53eb9287400702fbce788b7fe30e097b0b6e06296f3f080c",
    "xml/sax/handler.py": "64c7aae49f1dd382a7b9012610307bfa1d43a14a5dc09a5c8da30903f6805c3d",
    "zoneinfo/_zoneinfo.py": "ebb9b679519a23252eb90541003a2fdbb3f2d7bc36713fd70672baa575dcdcb6",
}
PINNED = {"held_out": HELD_OUT, "calibration": CALIBRATION}

# Not for training: installed packages, what distributions strip, character tables, compiled modules.
SKIP = {"site-packages", "dist-packages", "lib-dynload", "test", "tests", "idlelib", "lib2to3", "encodings"}


def encode(text):
    """str -> list of byte ids (UTF-8)."""
    return list(text.encode())


def decode(ids):
    """Ids -> str; BOS and EOS are dropped, broken UTF-8 shown as U+FFFD."""
    return bytes(i for i in ids if i < BOS).decode(errors="replace")


def read(split, names=None):
    """The split ("train", "held_out" or "calibration") as ids [n] int64: its files in order, each followed by EOS.

    names: only these files. Raises ValueError for a name that is not in the split here (see `left_out`).
    """
    texts = texts_of(split)
    names = list(texts) if names is None else names
    absent = [name for name in names if name not in texts]
    expect(names and not absent, f"{split} (files)", absent or "none", "files that this Python has as they were pinned")
    parts = [np.append(np.frombuffer(texts[name], np.uint8).astype(np.int64), EOS) for name in names]
    return torch.from_numpy(np.concatenate(parts))


def left_out(split):
    """{name: why} of the pinned files that this Python lacks or has in another version."""
    here = texts_of(split)
    return {
        name: "differs" if (_library() / name).exists() else "absent"
        for name in PINNED.get(split, {})
        if name not in here
    }


def differs():
    """Why a figure that was recorded on pinned text can't be measured again here; "" if it can.

    Python's later patch releases change a file now and then.
    """
    names = sorted(name for split in PINNED for name in left_out(split))
    return f"not measured again: this Python has another {', '.join(names)}" if names else ""


def with_bos(rows):
    """Chunks [B, T] of a stream -> what the model reads to predict them, [B, T]: BOS, then all but the last id."""
    return torch.cat((torch.full_like(rows[:, :1], BOS), rows[:, :-1]), dim=1)


def _library():
    return Path(sysconfig.get_paths()["stdlib"])


@cache
def texts_of(split):
    """{name: bytes} of the split, in the order of `read`. Line ends are Unix's, whatever the installer wrote."""
    expect(split in ("train", *PINNED), "split", repr(split), "train, held_out or calibration")
    root = _library()
    if split in PINNED:
        names = [name for name in PINNED[split] if (root / name).exists()]
    else:
        apart = {"pydoc_data/topics.py"}.union(*PINNED.values())
        paths = [p.relative_to(root) for p in root.rglob("*.py")]
        names = sorted(p.as_posix() for p in paths if not SKIP & {*p.parts} and not p.name.startswith("_sysconfigdata"))
        names = [name for name in names if name not in apart and not name.startswith("config-")]
    texts = {name: (root / name).read_bytes().replace(b"\r\n", b"\n") for name in names}
    if split in PINNED:
        return {n: data for n, data in texts.items() if hashlib.sha256(data).hexdigest() == PINNED[split][n]}
    from pydoc_data.topics import topics

    return texts | {"pydoc_data/topics.py": "\n".join(text for _, text in sorted(topics.items())).encode()}
