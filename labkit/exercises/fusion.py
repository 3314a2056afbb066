"""Exercises of chapter 03. The docstrings are the tasks."""

import math

import torch

from labkit.exercises import device, exercise, expect, kernel_exercise


@exercise(
    hints=[
        "A tensor made and used inside the kernel stays in registers, and costs nothing.",
        "Reads: whatever an operation takes in that no earlier operation made, once however often it is used.",
        "Writes: what is made inside and wanted afterwards. Sum the sizes of both sets.",
    ],
    bugs=[
        ("read |= set(inputs) - made", "read |= set(inputs)", "intermediates are read from memory"),
        ("(read | (made & wanted))", "(read | made)", "intermediates are written to memory"),
        ("(read | (made & wanted))", "(read | wanted)", "all that is wanted afterwards is written, whoever made it"),
        ("set(inputs) - made", "set(inputs[:1]) - made", "only the first input of every operation is read"),
    ],
)
def fused_bytes(ops, sizes, wanted):
    """Bytes that a chain of operations moves if it becomes one kernel.

    ops: [(inputs, output)] in order, tensors by name. sizes: {name: bytes}. wanted: the set of
    names that are used after the chain. A tensor is read at most once, however many operations
    use it, and made at most once, before it is used. Returns a number of bytes.
    """
    made, read = set(), set()
    # >>> your code
    for inputs, output in ops:
        read |= set(inputs) - made
        made.add(output)
    moved = (read | (made & wanted))
    total = sum(sizes[name] for name in moved)
    # <<< your code
    return total


CHAIN = [(("x", "r"), "s"), (("s",), "rstd"), (("s", "rstd"), "h"), (("h", "w"), "y")]  # add, statistics, scale, weight
SIZES = {"x": 100, "r": 100, "s": 100, "rstd": 4, "h": 100, "w": 10, "y": 100}


@fused_bytes.case("residual add and norm: two tensors in, two out, and the weight")
def _(fn):
    expect(fn(CHAIN, SIZES, {"s", "y"}), 410, "bytes")


@fused_bytes.case("if the sum is not wanted afterwards, it is never written")
def _(fn):
    expect(fn(CHAIN, SIZES, {"y"}), 310, "bytes")


@fused_bytes.case("what is used after the chain but was only read in it costs its read, no more")
def _(fn):
    expect(fn(CHAIN[1:], SIZES, {"s", "y"}), 210, "bytes")


@fused_bytes.case("x * x reads x once; something else that is wanted is not this kernel's")
def _(fn):
    expect(fn([(("x", "x"), "y")], SIZES, {"y", "w"}), 200, "bytes")


@exercise(
    hints=[
        "rstd depends on every s of the row, so dy of one column reaches all of them.",
        "With h = s * rstd and g = dy * w: d rstd / d s_j = -rstd^3 s_j / n.",
        "dx = rstd * (g - h * mean(g * h)), the mean over the row. dw: the sum of dy * h over the rows.",
    ],
    bugs=[
        ("- h * (g * h).mean(-1, keepdim=True)", "", "rstd is taken for a constant"),
        ("(g * h).mean(-1", "(g * h).sum(-1", "the sum instead of the mean"),
        ("g = dy * w", "g = dy", "the weight is forgotten"),
        ("(dy * h).sum(0)", "(dy * s).sum(0)", "dw without the normalisation"),
        ("keepdim=True) + eps)", "keepdim=True))", "eps is forgotten"),
    ],
)
def rmsnorm_gradient(dy, s, w, eps):
    """The gradients of y = s / sqrt(mean(s^2) + eps) * w, by hand, as the backward kernel does it.

    dy, s [rows, n]; w [n]. Returns dx [rows, n] and dw [n].
    """
    # >>> your code
    rstd = torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps)
    h = s * rstd
    g = dy * w
    dx = rstd * (g - h * (g * h).mean(-1, keepdim=True))
    dw = (dy * h).sum(0)
    # <<< your code
    return dx, dw


def _gradients(rows, n, eps):
    generator = torch.Generator().manual_seed(rows * n)
    dy, s = (torch.randn(rows, n, generator=generator) for _ in range(2))
    s, w = s.requires_grad_(), torch.linspace(0.5, 2, n).requires_grad_()
    y = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps) * w
    return dy, s.detach(), w.detach(), torch.autograd.grad(y, (s, w), dy)


@rmsnorm_gradient.case("several rows, against autograd")
def _(fn):
    dy, s, w, want = _gradients(4, 6, 1e-6)
    expect(fn(dy, s, w, 1e-6), want, "gradient")


@rmsnorm_gradient.case("an eps that counts")
def _(fn):
    dy, s, w, want = _gradients(3, 5, 0.7)
    expect(fn(dy, s, w, 0.7), want, "gradient")


@exercise(
    hints=[
        "rstd is one number for the whole row: it comes out of the sum over k.",
        "So one walk over k is enough: add up x * norm * weight, and beside it x^2.",
        "After the loop: y = total * rsqrt(square / k + eps).",
    ],
    bugs=[
        ("square += (part * part).sum(-1)", "square = (part * part).sum(-1)", "only the last block's squares"),
        ("(part * norm[cut])", "part", "the norm's weight is forgotten"),
        ("square / k + eps", "square + eps", "the sum instead of the mean"),
        ("total * torch.rsqrt", "total / torch.rsqrt", "divided instead of multiplied"),
    ],
)
def norm_into_product(x, norm, weight, eps, block):
    """rmsnorm(x, norm) @ weight.T in one walk over k, `block` columns at a time.

    x [m, k]; norm [k]; weight [n, k]. Do not form rmsnorm(x): its rstd is known only at the end.
    Returns y [m, n].
    """
    k = x.shape[1]
    total, square = torch.zeros(len(x), len(weight)), torch.zeros(len(x))
    for first in range(0, k, block):
        cut = slice(first, first + block)
        part = x[:, cut]
        # >>> your code
        total += (part * norm[cut]) @ weight[:, cut].T
        square += (part * part).sum(-1)
    y = total * torch.rsqrt(square / k + eps)[:, None]
    # <<< your code
    return y


def _product(m, k, n, eps, block, fn):
    generator = torch.Generator().manual_seed(k)
    x, weight = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    norm = torch.linspace(0.5, 2, k)
    want = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm) @ weight.T
    expect(fn(x, norm, weight, eps, block), want, "y")


@norm_into_product.case("one block")
def _(fn):
    _product(3, 8, 4, 1e-6, 8, fn)


@norm_into_product.case("several blocks, the last one shorter")
def _(fn):
    _product(2, 10, 3, 0.1, 4, fn)


@exercise(
    hints=[
        "Fusing removes the nodes in `inside`. Who would miss them?",
        "An output may be used by anybody: the fused kernel writes it. Every other node may be used only inside.",
    ],
    bugs=[
        ("inside - outputs", "inside", "outputs are not allowed outside users"),
        ("users[node] - inside", "users[node]", "users inside count as well"),
        ("inside - outputs", "outputs - inside", "looks at the wrong nodes"),
        ("inside - outputs", "set(users) - outputs", "counts nodes that the pattern leaves where they are"),
    ],
)
def missed(users, inside, outputs):
    """Which nodes of a pattern must survive because somebody outside needs them.

    users: {node: set of the nodes that read it}. inside: set of nodes that one kernel would
    replace. outputs: those of them that the kernel writes. Returns a set of nodes.
    """
    # >>> your code
    lost = {node for node in inside - outputs if users[node] - inside}
    # <<< your code
    return lost


USERS = {"square": {"mean"}, "mean": {"rsqrt"}, "rsqrt": {"unit"}, "unit": {"y"}, "y": {"linear", "residual"}}


@missed.case("a norm whose result alone is used")
def _(fn):
    expect(fn(USERS, set(USERS), {"y"}), set(), "nodes")


@missed.case("the variance is used elsewhere")
def _(fn):
    expect(fn(USERS | {"mean": {"rsqrt", "loss"}}, set(USERS), {"y"}), {"mean"}, "nodes")


@missed.case("unless the kernel writes it")
def _(fn):
    expect(fn(USERS | {"mean": {"rsqrt", "loss"}}, set(USERS), {"y", "mean"}), set(), "nodes")
    expect(fn(USERS | {"x": {"square", "residual"}}, set(USERS), {"y"}), set(), "nodes, x being outside")


@kernel_exercise(
    hints=[
        "Row r begins at r * n. A tile is wider than the row: every load and every store needs cols < n.",
        "fp16 ends at 65,504, and 300 squared is more: go to fp32 before you add or square.",
        "Masked elements are loaded as 0 and add nothing to the sum of squares; the mean divides by n, not by BLOCK.",
    ],
    bugs=[
        ("tl.store(y_ptr + at, s * rstd * w, mask=mask)", "tl.store(y_ptr + at, s * rstd * w)",
         "writes into the next row, whose program writes there too, and behind the last one"),
        ("r = tl.load(r_ptr + at, mask=mask, other=0.0)", "r = tl.load(r_ptr + at)", "the next row counts as well"),
        ("s = x.to(tl.float32) + r", "s = x + r", "sums and squares in fp16"),
        ("/ n + eps", "/ BLOCK + eps", "the mean over the tile, not over the row"),
        ("tl.rsqrt(tl.sum(s * s, 0) / n + eps)", "tl.rsqrt(tl.sum(s * s, 0) / n)", "eps is forgotten"),
        ("tl.store(s_ptr + at, s, mask=mask)", "tl.store(s_ptr + at, x, mask=mask)", "the residual is not updated"),
    ],
)
def add_norm(x_ptr, r_ptr, w_ptr, y_ptr, s_ptr, n, eps, BLOCK: "tl.constexpr"):
    """s = x + r and y = s / sqrt(mean(s^2) + eps) * w in one kernel, one program per row.

    x, r [rows, n], w [n]; out: y and s [rows, n]. All fp16 and contiguous; n <= BLOCK.
    Compute in fp32.
    """
    cols = tl.arange(0, BLOCK)
    mask = cols < n
    at = tl.program_id(0) * n + cols
    # >>> your code
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    r = tl.load(r_ptr + at, mask=mask, other=0.0)
    w = tl.load(w_ptr + cols, mask=mask, other=0.0)
    s = x.to(tl.float32) + r
    rstd = tl.rsqrt(tl.sum(s * s, 0) / n + eps)
    tl.store(s_ptr + at, s, mask=mask)
    tl.store(y_ptr + at, s * rstd * w, mask=mask)
    # <<< your code


def _add_norm(fn, rows, n, scale, eps):
    """Run the reader's kernel. In the interpreter a stray write of y stays within memory that nobody else uses."""
    generator = torch.Generator().manual_seed(rows * n)
    x, r = (scale * torch.randn(rows, n, generator=generator) for _ in range(2))
    x, r, w = (t.half() for t in (x, r, torch.linspace(0.5, 2, n)))
    s = x.float() + r.float()
    y = s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps) * w.float()
    room = torch.full((2, rows + 64, n), math.nan, dtype=torch.float16, device=device())
    got_y, got_s = room[:, :rows]
    fn[(rows,)](*(t.to(device()) for t in (x, r, w)), got_y, got_s, n, eps, BLOCK=64)
    expect((got_y.cpu().float(), got_s.cpu().float()), (y, s), "(y, s)", atol=2e-3, rtol=2e-3)


@add_norm.case("rows that fill the tile")
def _(fn):
    _add_norm(fn, 2, 64, 1.0, 1e-6)


@add_norm.case("rows of 50, an eps that counts")
def _(fn):
    _add_norm(fn, 4, 50, 1.0, 0.5)


@add_norm.case("values whose squares no fp16 holds")
def _(fn):
    _add_norm(fn, 2, 64, 300.0, 1e-6)
