"""Exercises of chapter 02. The docstrings are the tasks."""

import math

import torch

from labkit.exercises import device, exercise, expect, kernel_exercise


@exercise(
    hints=[
        "Figure 6 says \"9-5>2\" of y = (3, 6 | 9, 6). phi is 6, b is 3: what is 9 - phi?",
        "9 - 6 = 3 is not below b = 3: the bounds are inclusive, a score that meets one trips it.",
        "A masked key has no say, however far out its score is (-inf, for one).",
    ],
    bugs=[
        ("e >= b", "e > b", "the upper bound is taken as exclusive"),
        ("e <= a", "e < a", "the lower bound is taken as exclusive"),
        ("(e <= a) | (e >= b)", "e >= b", "only overflow is guarded, not underflow"),
        ("e = scores - phi", "e = scores", "the scores themselves are compared: the paper's other (a, b)"),
        (" & keep", "", "masked keys trip the bounds"),
        (".any(-1)", ".all(-1)", "every key has to trip"),
        (".any(-1)", ".sum(-1)", "a count of keys instead of a bool"),
    ],
)
def rows_to_recompute(scores, keep, phi, a, b):
    """Which rows leave the bounds a < score - phi < b, as the paper's Figure 6 has it (but right).

    scores [rows, keys]; keep [rows, keys] bool, False for masked keys. Returns [rows] bool.
    """
    # >>> your code
    e = scores - phi
    outside = ((e <= a) | (e >= b)) & keep
    trips = outside.any(-1)
    # <<< your code
    return trips


def _trips(fn, scores, keep=None, phi=6.0, a=-3.0, b=3.0):
    scores = torch.tensor(scores)
    keep = torch.ones_like(scores, dtype=torch.bool) if keep is None else torch.tensor(keep)
    trips = fn(scores, keep, phi, a, b)
    expect(getattr(trips, "dtype", type(trips)), torch.bool, "the dtype of trips")
    return trips.tolist()


@rows_to_recompute.case("Figure 6: x stays, y is done again")
def _(fn):
    expect(_trips(fn, [[4.0, 5, 6, 7], [3.5, 6, 9, 6]]), [False, True], "trips")


@rows_to_recompute.case("a score that meets the lower bound, and one far below it")
def _(fn):
    expect(_trips(fn, [[3.0, 6, 6, 6], [4.0, 6, 6, 6], [-90.0, 6, 6, 6]]), [True, False, True], "trips")


@rows_to_recompute.case("masked keys do not count")
def _(fn):
    keep = [[True, True, False], [True, False, False]]
    expect(_trips(fn, [[5.0, 6, -math.inf], [6.0, 99, -99]], keep), [False, False], "trips")


@exercise(
    hints=[
        "Nothing of another part is needed: no maximum, no factor.",
        "Figure 6 prints e^(4-6) and e^(5-6) twice. The second part has its own scores.",
        "num is the sum of exp(score - phi) * value, den the sum of exp(score - phi). Divide after adding, not before.",
    ],
    bugs=[
        ("scores[cut:], v[cut:]", "scores[:cut], v[:cut]", "the first part twice, as printed in Figure 6"),
        ("torch.exp(s - phi)", "torch.exp(s - s.max())", "every part uses its own maximum"),
        ("torch.exp(s - phi)", "torch.exp(s)", "phi is forgotten: large scores overflow"),
        ("num += p @ values", "num += p @ values / p.sum()", "the parts are divided before they are added"),
        ("den += p.sum()", "den = p.sum()", "only the last part's denominator"),
    ],
)
def add_parts(scores, v, phi, cut):
    """Attention of one query in two parts that know nothing of each other (Eq. 4).

    scores [L], v [L, D]; the parts are keys [0, cut) and [cut, L). Returns the output [D].
    """
    # >>> your code
    num, den = torch.zeros(v.shape[1]), torch.tensor(0.0)
    for s, values in ((scores[:cut], v[:cut]), (scores[cut:], v[cut:])):
        p = torch.exp(s - phi)
        num += p @ values
        den += p.sum()
    # <<< your code
    return num / den


def _problem(length=12):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(length, generator=generator) * 3, torch.randn(length, 4, generator=generator)


@add_parts.case("two halves")
def _(fn):
    scores, v = _problem()
    expect(fn(scores, v, 1.0, 6), scores.softmax(0) @ v, "output")


@add_parts.case("any phi, any cut")
def _(fn):
    scores, v = _problem()
    for phi, cut in ((-4.0, 1), (9.0, 11), (0.0, 5)):
        expect(fn(scores, v, phi, cut), scores.softmax(0) @ v, f"output for phi {phi:g}, cut {cut}")
    expect(fn(scores + 200, v, 200.0, 5), scores.softmax(0) @ v, "output for scores around 200, phi 200", atol=1e-4)


@exercise(
    hints=[
        "Section 3 offers phi = a, the smallest score. How large is score - phi then?",
        "The range of score - phi is (low - phi, high - phi). Both ends want the same distance to their bound.",
        "low - phi - a = b - (high - phi). Solve for phi; there is no room if high - low >= b - a.",
    ],
    bugs=[
        ("(low + high - a - b) / 2", "low", "the paper's phi = a: every exponent is positive"),
        ("(low + high - a - b) / 2", "high", "the ordinary maximum: every exponent is negative"),
        ("(low + high - a - b) / 2", "(low + high) / 2", "right only for bounds around 0"),
        ("high - low < b - a", "True", "a range that does not fit is not noticed"),
        ("high - low < b - a", "high - low <= b - a", "a range as wide as the bounds touches them"),
    ],
)
def choose_phi(low, high, a, b):
    """The phi that puts scores between low and high into the middle of a < score - phi < b.

    None if they do not fit.
    """
    # >>> your code
    phi = (low + high - a - b) / 2 if high - low < b - a else None
    # <<< your code
    return phi


@choose_phi.case("Llama-2-7B in fp32, symmetric bounds")
def _(fn):
    expect(fn(-16.8, 6.5, -60.0, 60.0), -5.15, "phi")


@choose_phi.case("Llama-2-7B does not fit fp16's bounds, ChatGLM2-6B neither; a narrower model does")
def _(fn):
    expect(fn(-16.8, 6.5, -9.0, 11.0), None, "phi for Llama-2-7B")
    expect(fn(-10.5, 13.7, -9.0, 11.0), None, "phi for ChatGLM2-6B")
    expect(fn(-10.0, 5.0, -9.0, 11.0), -3.5, "phi")


@choose_phi.case("OPT-6.7B does not fit fp32")
def _(fn):
    expect(fn(-496.8, 363.5, -80.0, 60.0), None, "phi")


@choose_phi.case("a range exactly as wide as the bounds: they are strict")
def _(fn):
    expect(fn(0.0, 20.0, -9.0, 11.0), None, "phi")


@exercise(
    hints=[
        "Two searches, one after the other, upwards in M.",
        "M1 is the first M where B is faster than A. The second search begins there, and compares C with B.",
        "A tie is no win: stay with what you have.",
    ],
    bugs=[
        ("us_b[m] < us_a[m]", "us_b[m] <= us_a[m]", "a tie counts as a win"),
        ("us_c[m] < us_b[m]", "us_c[m] < us_a[m]", "C is compared with A"),
        ("m >= m1 and", "", "the second search begins at 1"),
        ("m1 = min(", "m1 = max(", "the last crossing, not the first"),
        ("m1 = min(", "m1 = next(", "the first in the order of the dict, not of M"),
    ],
)
def switch_points(us_a, us_b, us_c):
    """The paper's M1 and M2 (section 5) from the times of GEMV (A), flat GEMM (B) and library (C).

    Times are {m: microseconds}. A is used for M < M1, B for M1 <= M < M2, C from M2 on.
    Both exist in the data given. Returns (m1, m2).
    """
    # >>> your code
    m1 = min(m for m in us_a if us_b[m] < us_a[m])
    m2 = min(m for m in us_b if m >= m1 and us_c[m] < us_b[m])
    # <<< your code
    return m1, m2


def _times(*us):
    return dict(zip((1, 2, 4, 8, 16), us, strict=True))


@switch_points.case("plain crossings")
def _(fn):
    found = fn(_times(5, 7, 9, 17, 33), _times(8, 8, 8, 8, 16), _times(12, 12, 12, 12, 12))
    expect(tuple(found), (4, 16), "(M1, M2)")


@switch_points.case("a tie, and an early win of C over B that does not count")
def _(fn):
    found = fn(_times(5, 8, 16, 32, 64), _times(14, 8, 8, 9, 20), _times(12, 12, 12, 12, 12))
    expect(tuple(found), (4, 16), "(M1, M2)")


@switch_points.case("B wins, loses and wins again: the first crossing counts")
def _(fn):
    times = _times(5, 9, 9, 17, 33), _times(8, 8, 11, 8, 16), _times(20, 20, 12, 12, 12)
    expect(tuple(fn(*times)), (2, 16), "(M1, M2)")
    backwards = [dict(reversed(us.items())) for us in times]
    expect(tuple(fn(*backwards)), (2, 16), "(M1, M2) of the same times, largest M first")


@kernel_exercise(
    hints=[
        "A key beyond kv_len must not be read, and its p must be 0: load its score as -inf.",
        "Programs run in any order. tl.atomic_add returns the value before: the last one finds tl.num_programs(0) - 1.",
        "Store num and den, then tl.debug_barrier(), so that all threads have stored; then count the program in.",
    ],
    bugs=[
        ("tl.atomic_add(arrived_ptr, 1) ==", "s ==",
         "the program with the last number need not be the last to arrive: only compiled code tells"),
        ("mask=keep[:, None], other=0.0", "", "reads past the last value"),
        ("    tl.debug_barrier()\n    if", "    if",
         "counted in before all warps have stored: only compiled code tells"),
        ("== tl.num_programs(0) - 1", ">= 0", "every program adds up and writes o: only compiled code tells"),
        ('mask=keep, other=float("-inf")', "mask=keep, other=0.0", "keys beyond kv_len count in den"),
        ("tl.exp2(x - phi)", "tl.exp2(x - tl.max(x, 0))", "every split uses its own maximum"),
        ("den += ", "den = ", "only the last part's denominator"),
    ],
)
def add_splits(
    x_ptr, v_ptr, num_ptr, den_ptr, arrived_ptr, o_ptr, kv_len, phi,
    D: "tl.constexpr", BLOCK: "tl.constexpr",
):
    """Program s takes BLOCK keys: num[s] = sum of 2^(x - phi) v, den[s] = sum of 2^(x - phi).

    The last to arrive writes o [D], the sum of num over the sum of den. x [kv_len], scores times
    log2(e); v [kv_len, D]; num [S, D] and den [S], scratch; arrived [1], int32, counts from 0.
    All threads must have stored before the program counts itself in: `tl.debug_barrier()`.
    """
    s, offs_d = tl.program_id(0), tl.arange(0, D)
    keys = s * BLOCK + tl.arange(0, BLOCK)
    # >>> your code
    keep = keys < kv_len
    x = tl.load(x_ptr + keys, mask=keep, other=float("-inf"))
    v = tl.load(v_ptr + keys[:, None] * D + offs_d[None, :], mask=keep[:, None], other=0.0)
    p = tl.exp2(x - phi)
    tl.store(den_ptr + s, tl.sum(p, 0))
    tl.store(num_ptr + s * D + offs_d, tl.sum(p[:, None] * v, 0))
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1) == tl.num_programs(0) - 1:
        num, den = tl.zeros([D], tl.float32), 0.0
        for i in range(tl.num_programs(0)):
            num += tl.load(num_ptr + i * D + offs_d)
            den += tl.load(den_ptr + i)
        tl.store(o_ptr + offs_d, num / den)
    # <<< your code


def _add_splits(fn, kv_len, phi, block=16):
    dim = 128  # so many numbers that every warp stores some
    generator = torch.Generator().manual_seed(kv_len)
    scores, v = 3 * torch.randn(kv_len, generator=generator), torch.randn(kv_len, dim, generator=generator)
    want = scores.softmax(0) @ v
    scores, v = (scores * math.log2(math.e)).to(device()), v.to(device())
    num_splits = -(-kv_len // block)
    num, den = (torch.full((num_splits, n), math.nan, device=device()) for n in (dim, 1))
    arrived, o = torch.zeros(1, dtype=torch.int32, device=device()), torch.full((dim,), math.nan, device=device())
    fn[(num_splits,)](scores, v, num, den, arrived, o, kv_len, phi, D=dim, BLOCK=block)
    expect(o.cpu(), want, f"o for phi {phi:g}", atol=1e-4)


@add_splits.case("four splits of 16 keys, any phi")
def _(fn):
    for phi in (0.0, 2.0, -5.0):
        _add_splits(fn, 64, phi)


@add_splits.case("the last split has two keys")
def _(fn):
    _add_splits(fn, 50, 1.0)


@add_splits.case("a single split, and splits of a single key")
def _(fn):
    _add_splits(fn, 7, 0.0)
    _add_splits(fn, 5, 0.0, block=1)  # here no barrier of the compiler's own stands before the atomic
