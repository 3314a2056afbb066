"""Exercises of chapter 07. The docstrings are the tasks."""

import torch

from labkit.attention import decode_attention
from labkit.exercises import device, exercise, expect, kernel_exercise


def _randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise(
    hints=[
        "Query head h reads KV head h // group. Which old KV heads did the query heads of the new head 0 read?",
        "The old heads of one new head are neighbours: with 8 heads and 2 new ones, 0 to 3 and 4 to 7.",
        "View the rows as [num_to, group, head_dim, ...] and take the mean over the group.",
    ],
    bugs=[
        (
            "weight.unflatten(0, (num_to, -1, head_dim)).mean(1)",
            "weight.unflatten(0, (-1, num_to, head_dim)).mean(0)",
            "strided: new head 0 takes old heads 0, 2, 4, 6",
        ),
        ("(num_to, -1, head_dim)).mean(1)", "(num_to, -1, head_dim)).sum(1)", "the sum"),
        ("(num_to, -1, head_dim)).mean(1)", "(num_to, -1, head_dim))[:, 0]", "only the first head"),
        ("(num_to, -1, head_dim)).mean(1)", "(num_to, head_dim, -1)).mean(2)", "averages rows of one head"),
    ],
)
def pool(weight, num_to, head_dim):
    """Make num_to KV heads of those in a k_proj or v_proj: the mean of each group of heads.

    weight [num_from * head_dim, in_features], or a bias [num_from * head_dim]. Query head h of the
    model will read KV head h // group, as in every checkpoint. Returns [num_to * head_dim, ...].
    """
    # >>> your code
    groups = weight.unflatten(0, (num_to, -1, head_dim)).mean(1)
    pooled = groups.flatten(0, 1)
    # <<< your code
    return pooled


@pool.case("four heads of two rows, in numbers")
def _(fn):
    weight = torch.tensor([0.0, 1.0, 10.0, 11.0, 20.0, 21.0, 30.0, 31.0])[:, None]
    expect(fn(weight, 2, 2), torch.tensor([5.0, 6.0, 25.0, 26.0])[:, None], "pooled")


@pool.case("heads that are equal in a group come back as they were")
def _(fn):
    weight = _randn(0, 3, 4, 5)
    equal = weight.repeat_interleave(2, 0).flatten(0, 1)
    expect(fn(equal, 3, 4), weight.flatten(0, 1), "pooled")


@pool.case("a bias, pooled to one head")
def _(fn):
    expect(fn(torch.arange(6.0), 1, 2), torch.tensor([2.0, 3.0]), "pooled")


@pool.case("the attention of a converted layer, equal heads, stays the same")
def _(fn):
    x, w = _randn(1, 2, 9, 16), [_randn(seed, 2, 8, 16).repeat_interleave(2, 0).flatten(0, 1) for seed in (2, 3)]
    q, lens = _randn(4, 2, 4, 8), torch.tensor([9, 5], dtype=torch.int32)
    want = decode_attention(q, *((x @ one.T).unflatten(-1, (4, 8)) for one in w), lens)
    pooled = [fn(one, 2, 8) for one in w]
    expect([tuple(one.shape) for one in pooled], [(16, 16), (16, 16)], "shapes of the pooled weights")
    few = [(x @ one.T).unflatten(-1, (2, 8)) for one in pooled]
    expect(decode_attention(q, *few, lens), want, "(o, lse)")


@exercise(
    hints=[
        "Do not copy keys: give the queries one more dimension, [B, Hkv, group, D].",
        "With Hkv = 1 there is one group of all query heads (MQA); with Hkv = Hq each group has one (MHA).",
        "Scores are [B, Hkv, group, L]; the output goes back to [B, Hq, D].",
    ],
    bugs=[
        (
            "q.unflatten(1, (num_kv_heads, -1))",
            "q.unflatten(1, (-1, num_kv_heads)).transpose(1, 2)",
            "strided groups, and the heads come back in another order",
        ),
        ("* q.shape[-1] ** -0.5", "", "the scale is forgotten"),
        (".softmax(-1)", ".softmax(2)", "softmax over the heads of a group"),
        ("scores = torch", "v = v.flip(2)\n    scores = torch", "the values of another head"),
    ],
)
def grouped_attention(q, k, v):
    """One decode step for any number of KV heads: MHA, GQA, and MQA, which is GQA with one group.

    q [B, Hq, D]; k, v [B, L, Hkv, D], Hq a multiple of Hkv; every sequence reads all L keys; scale
    D ** -0.5. Returns o [B, Hq, D].
    """
    num_kv_heads = k.shape[2]
    # >>> your code
    groups = q.unflatten(1, (num_kv_heads, -1))
    scores = torch.einsum("bhgd,blhd->bhgl", groups, k) * q.shape[-1] ** -0.5
    o = torch.einsum("bhgl,blhd->bhgd", scores.softmax(-1), v).flatten(1, 2)
    # <<< your code
    return o


def _attends(fn, num_kv_heads):
    q, k, v = _randn(0, 2, 6, 8), _randn(1, 2, 5, num_kv_heads, 8), _randn(2, 2, 5, num_kv_heads, 8)
    expect(fn(q, k, v), decode_attention(q, k, v, torch.tensor([5, 5], dtype=torch.int32))[0], "o")


@grouped_attention.case("one KV head: MQA")
def _(fn):
    _attends(fn, 1)


@grouped_attention.case("two KV heads: groups of three neighbours")
def _(fn):
    _attends(fn, 2)


@grouped_attention.case("as many KV heads as query heads: MHA")
def _(fn):
    _attends(fn, 6)


@exercise(
    hints=[
        "The weights are read once a step for the whole batch, the cache once for every sequence of it.",
        "The cache of one sequence is kv_len tokens; a number of a weight takes two bytes here.",
        "At the smallest such batch the quotient is rounded up.",
    ],
    bugs=[
        ("-(-weights // sequence)", "weights // sequence", "rounded down: the cache is still smaller"),
        ("2 * num_params", "num_params", "a byte a weight"),
        ("kv_len * kv_bytes_per_token", "kv_bytes_per_token", "one token a sequence"),
        ("-(-weights // sequence)", "max(1, weights // sequence + 1)", "one too many where it divides"),
    ],
)
def break_even_batch(num_params, kv_bytes_per_token, kv_len):
    """The smallest batch whose caches are at least as many bytes as the weights, both in bf16.

    From here on it is the cache that a decode step mostly waits for, and fewer KV heads pay.
    kv_len: tokens in every sequence. Returns an int.
    """
    # >>> your code
    weights = 2 * num_params
    sequence = kv_len * kv_bytes_per_token
    batch = -(-weights // sequence)
    # <<< your code
    return batch


@break_even_batch.case("Llama-2-7B with 4,096 tokens: 7")
def _(fn):
    expect(fn(6_738_415_616, 524_288, 4096), 7, "batch")


@break_even_batch.case("Llama-3-8B with 4,096 tokens: 30")
def _(fn):
    expect(fn(8_030_261_248, 131_072, 4096), 30, "batch")


@break_even_batch.case("where the numbers divide")
def _(fn):
    expect(fn(1000, 20, 10), 10, "batch")


@exercise(
    hints=[
        "Count once how many bytes K and V are; the rest is how often they move.",
        "A program loads the K and V of its KV head once, however many query heads it has.",
        "Repeating reads K and V once, writes them group times, and then all of that is read.",
    ],
    bugs=[
        ("2 * batch * kv_len", "2 * kv_len", "one sequence only"),
        ("2 * batch", "batch", "V is forgotten"),
        ('"expanded": group', '"expanded": num_q_heads', "as if there were one KV head"),
        ("1 + 2 * group", "1 + group", "the copies are written but not read"),
        ("1 + 2 * group", "2 * group", "the originals are not read"),
    ],
)
def moved_bytes(how, batch, kv_len, num_q_heads, num_kv_heads, head_dim):
    """Bytes of K and V, 16 bits each, that a decode step moves in one layer if nothing is cached.

    how: "grouped", one program per KV head; "expanded", one per query head; "repeated", K and V
    are first copied for every query head (read and written), then one program per query head.
    """
    group = num_q_heads // num_kv_heads
    # >>> your code
    once = 2 * batch * kv_len * num_kv_heads * head_dim * 2
    times = {"grouped": 1, "expanded": group, "repeated": 1 + 2 * group}
    moved = once * times[how]
    # <<< your code
    return moved


@moved_bytes.case("one program a KV head of Llama-3-8B, 8,192 keys")
def _(fn):
    expect(fn("grouped", 1, 8192, 32, 8, 128), 33_554_432, "bytes")
    expect(fn("grouped", 3, 8192, 32, 8, 128), 3 * 33_554_432, "bytes of three sequences")


@moved_bytes.case("one program a query head: four times as much")
def _(fn):
    expect(fn("expanded", 1, 8192, 32, 8, 128), 134_217_728, "bytes")


@moved_bytes.case("repeated: nine times as much")
def _(fn):
    expect(fn("repeated", 1, 8192, 32, 8, 128), 301_989_888, "bytes")


@kernel_exercise(
    hints=[
        "The rows of the tile are query heads. Row r of KV head j's program is head j * GROUP + r, while r < GROUP.",
        "Load K as [D, 32], once; tl.dot(q, k) then has a row of scores for every query head.",
        "Two masks everywhere: rows beyond the group belong to the next program, keys beyond kv_len to nobody.",
    ],
    bugs=[
        ("kv_head * GROUP + row", "kv_head + row * num_kv_heads", "strided: heads 0, 2, 4, ... share a KV head"),
        ("key * num_kv_heads + kv_head", "kv_head * kv_len + key", "K as if the heads came first"),
        ("mask=mask_h & mask_n)", "mask=mask_n)", "over the next group's rows: only compiled code tells"),
        ("head * D + d, mask=mask_h)", "head * D + d)",
         "the last group's tile reads past the end of q: only compiled code tells"),
    ],
)
def group_scores(q_ptr, k_ptr, s_ptr, kv_len, GROUP: "tl.constexpr", D: "tl.constexpr"):
    """s[h, n] = q[h] . k[n, h // GROUP]: the scores of a group of query heads, in one product.

    q [Hkv * GROUP, D], k [kv_len, Hkv, D] fp16; s [Hkv * GROUP, kv_len] fp32. One program per KV
    head and 32 keys, read once. The matrix unit takes 16 rows: the first GROUP are heads.
    """
    kv_head, num_kv_heads = tl.program_id(0), tl.num_programs(0)
    row, d = tl.arange(0, 16)[:, None], tl.arange(0, D)
    key = tl.program_id(1) * 32 + tl.arange(0, 32)
    # >>> your code
    head, mask_h, mask_n = kv_head * GROUP + row, row < GROUP, (key < kv_len)[None, :]
    q = tl.load(q_ptr + head * D + d, mask=mask_h)
    rows_of_k = key * num_kv_heads + kv_head
    k = tl.load(k_ptr + rows_of_k[None, :] * D + d[:, None], mask=mask_n)
    tl.store(s_ptr + head * kv_len + key[None, :], tl.dot(q, k), mask=mask_h & mask_n)
    # <<< your code


def _scores(fn, num_kv_heads, group, kv_len):
    q, k = _randn(0, num_kv_heads * group, 16).half(), _randn(1, kv_len, num_kv_heads, 16).half()
    room = torch.full((len(q) + 16, kv_len), float("nan"), device=device())  # rows of nobody have a place
    fn[(num_kv_heads, -(-kv_len // 32))](q.to(device()), k.to(device()), room, kv_len, GROUP=group, D=16)
    want = torch.einsum("jgd,njd->jgn", q.float().unflatten(0, (num_kv_heads, group)), k.float())
    expect(room[: len(q)].cpu(), want.flatten(0, 1), "s", atol=1e-3)


@group_scores.case("groups of four on two KV heads, 40 keys")
def _(fn):
    _scores(fn, 2, 4, 40)


@group_scores.case("groups of three on three KV heads, 32 keys")
def _(fn):
    _scores(fn, 3, 3, 32)
