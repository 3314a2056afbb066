import importlib.util
import shutil
import sys

import pytest

from labkit import provenance

KERNEL = '''"""A kernel."""
import triton
import triton.language as tl

from tiles import scale_tile
import constants as c

@triton.jit
def _kernel(x_ptr, N: tl.constexpr):
    """Scale."""
    offs = tl.arange(0, N)
    tl.store(x_ptr + offs, scale_tile(tl.load(x_ptr + offs), c.FACTOR))

def scale(x):
    """Launch."""
    _kernel[(1,)](x, N=block(x))

def block(x):
    return x.numel()
'''
TILES = '''import triton

@triton.jit
def scale_tile(x, factor):
    return twice(x) * factor

@triton.jit
def twice(x):
    """Double."""
    # a comment
    if x.shape[0] > 1:
        return x + x
    return (x +
            x)

@triton.jit
def unused(x):
    return x
'''
CONSTANTS = "FACTOR = 3\nOTHER = 4\n"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A tiny lab of three files; `edit(file, old, new)` rewrites one and returns the hash of the kernel."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    files = {"kernel.py": KERNEL, "tiles.py": TILES, "constants.py": CONSTANTS}

    def edit(file="kernel.py", old="", new="", root="kernel:_kernel"):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        assert old in files[file]
        (tmp_path / file).write_text(files[file].replace(old, new, 1) if old else files[file])
        return provenance.source_hash(root)

    return edit


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("tiles.py", "    # a comment\n", ""),
        ("tiles.py", "# a comment", "# another"),
        ("tiles.py", '    """Double."""\n', ""),
        ("tiles.py", '"""Double."""', "'''Twice\n\n    as much.'''"),
        ("tiles.py", "return (x +\n            x)", "return (x + x)"),
        ("tiles.py", "\n@triton.jit\ndef twice", "\n\n\n@triton.jit\ndef twice"),
        ("tiles.py", "    return x\n", "    return -x\n"),
        ("constants.py", "OTHER = 4", "OTHER = 5"),
        ("kernel.py", "x.numel()", "2 * x.numel()"),
        ("kernel.py", '"""A kernel."""', '"""Another text."""'),
    ],
)
def test_hash_kept(lab, file, old, new):
    assert lab(file, old, new) == lab()


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("kernel.py", "tl.arange(0, N)", "tl.arange(0, N * 1)"),
        ("kernel.py", "@triton.jit", "@triton.jit(noinline=True)"),
        ("tiles.py", "return x + x", "return x - x"),
        ("tiles.py", "        return x + x\n    return", "        return x + x\n        return"),
        ("tiles.py", "* factor", "+ factor"),
        ("constants.py", "FACTOR = 3", "FACTOR = 5"),
        ("constants.py", "FACTOR = 3", "FACTOR = 3\nFACTOR += 1"),
        ("constants.py", "FACTOR = 3", "FACTOR = 3\nif OTHER:\n    FACTOR = 5"),
        ("constants.py", "FACTOR = 3", "FACTOR = 3\nif OTHER:\n    pass\nelse:\n    FACTOR = 5"),
        ("constants.py", "FACTOR = 3", "FACTOR = 3\ntry:\n    pass\nexcept OSError:\n    FACTOR = 5"),
    ],
)
def test_hash_changed(lab, file, old, new):
    assert lab(file, old, new) != lab()


@pytest.mark.parametrize("using", ["run(tiles, x)", "getattr(tiles, 'twice')(x)"])
def test_a_module_handed_on_is_reached_whole(lab, using):
    """Whatever it defines may be called; a module of which one name is used is not."""
    new = f"import tiles\n\ndef scale(x):\n    return {using}\n\ndef run(ops, x):\n    return ops.unused(x)\n\n"

    def hashed(file="kernel.py", old="", text=""):
        lab()
        (provenance.ROOT / "kernel.py").write_text(new)
        if file == "tiles.py":
            (provenance.ROOT / file).write_text(TILES.replace(old, text, 1))
        return provenance.source_hash("kernel:scale")

    assert hashed("tiles.py", "    return x\n", "    return -x\n") != hashed()
    declared = "def cases():\n    return {}\n\n\n@triton.jit\ndef twice"
    assert hashed("tiles.py", "@triton.jit\ndef twice", declared.format(1)) == hashed(), "what is to be measured"
    assert lab("tiles.py", "    return x\n", "    return -x\n") == lab()


def test_public_function_reaches_rule_and_kernels(lab):
    whole = lab(root="kernel:scale")
    assert lab("kernel.py", "x.numel()", "2 * x.numel()", root="kernel:scale") != whole
    assert lab("tiles.py", "x + x", "x * 3", root="kernel:scale") != whole


def test_checks_decide_no_result(lab, monkeypatch):
    """Of the file of checks, what returns nothing is left out; what returns a value may decide a result."""

    def changes_the_hash(returns):
        plain, other = (lab("tiles.py", "def twice(x):", f"def twice(x) -> {returns}:{body}", root="kernel:scale")
                        for body in ("", "\n    return 0"))  # fmt: skip
        return plain != other

    assert changes_the_hash("None"), "another file"
    monkeypatch.setattr(provenance, "_CHECKS", "tiles")
    assert not changes_the_hash("None")
    assert changes_the_hash("int")


def test_hash_holds_extra(lab):
    lab()
    plain = provenance.source_hash("kernel:_kernel")
    one = provenance.source_hash("kernel:_kernel", extra={"N": 64, "num_warps": 4})
    assert one == provenance.source_hash("kernel:_kernel", extra={"num_warps": 4, "N": 64})
    assert len({plain, one, provenance.source_hash("kernel:_kernel", extra={"N": 64, "num_warps": 8})}) == 3


def test_moving_a_helper_keeps_the_hash(lab, tmp_path):
    before = lab()
    shutil.move(tmp_path / "tiles.py", tmp_path / "other.py")
    (tmp_path / "tiles.py").write_text("from other import scale_tile\n")
    assert provenance.source_hash("kernel:_kernel") == before


def test_objects_and_names_agree(lab, tmp_path, monkeypatch):
    """An interpreted or compiled function keeps the Python function in `.fn`."""
    expected = lab()
    stub = "class jit:\n    def __init__(self, fn):\n        self.fn = fn\n"
    (tmp_path / "triton.py").write_text(stub)
    (tmp_path / "tl.py").write_text("class constexpr: pass\n")
    text = KERNEL.replace("import triton\nimport triton.language as tl", "import tl\nimport triton")
    (tmp_path / "kernel.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("triton", tmp_path / "triton.py")
    monkeypatch.setitem(sys.modules, "triton", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules["triton"])
    for name in ("kernel", "tiles", "constants", "tl"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import kernel

    # triton.py and tl.py now lie in the lab's own folder, so they are reached as well: compare like with like
    assert provenance.source_hash(kernel._kernel) == provenance.source_hash("kernel:_kernel")
    (tmp_path / "triton.py").unlink()
    (tmp_path / "tl.py").unlink()
    assert provenance.source_hash(kernel._kernel) == expected
    for name in ("kernel", "tiles", "constants", "tl"):
        sys.modules.pop(name, None)


def test_unknown_root():
    with pytest.raises(ValueError, match="nowhere:f"):
        provenance.source_hash("nowhere:f")
    with pytest.raises(ValueError, match="not_there"):
        provenance.source_hash("labkit.provenance:not_there")
    with pytest.raises(ValueError, match="top level"):
        provenance.source_hash(lambda: 0)


def test_equal_on_every_python(tmp_path, monkeypatch):
    """The value below was computed on 3.11, 3.12 and 3.13; 3.12 changed how f-strings are split into tokens."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    body = """return f"{x!r:>{WIDTH}} {f'{x}'}" "b"  # end"""
    (tmp_path / "f.py").write_text(f'WIDTH = 8\ndef f(x):\n    """Doc."""\n    {body}\n')
    assert provenance.source_hash("f:f") == "5c359addc8d401af"


PLANTED_BUGS = [
    ("labkit/provenance.py", "(ast.Assign, ast.AnnAssign, ast.AugAssign)", "(ast.Assign, ast.AnnAssign)"),
    ("labkit/provenance.py", 'for field in ("body", "orelse", "finalbody"):', "for field in ():"),
    ("labkit/provenance.py", "self._collect(handler.body)", "pass"),
    ("labkit/provenance.py", 'ast.unparse(node.returns) in ("None", "NoReturn")', "True"),
    ("labkit/provenance.py", "if module.name == _CHECKS and all", "if all"),
    ("labkit/provenance.py", "if module.name == _CHECKS and all(", "if False and all("),
    ("labkit/provenance.py", "set(target.defined) - _DECLARATIONS", "set(target.defined)"),
]
