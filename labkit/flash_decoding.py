"""Flash-Decoding in plain torch, step by step as its authors tell it (Dao, Haziza, Massa, Sizov 2023).

1. Cut the keys and values of every sequence into splits. No data moves: a split is a view.
2. Attend to each split on its own. Besides the partial output keep one number a row, the log-sum-exp of its scores.
3. Merge: a partial output weighs exp(lse_split - lse_total).
"""

from dataclasses import replace

import torch
import torch.distributed as dist

from labkit import args, bench, check, codegen, peers, player, splits
from labkit.attention import decode_attention, softmax_dtype
from labkit.gpus import GPUS
from labkit.splits import num_splits_heuristic  # noqa: F401  (part of this topic's public names)

BLOCK_KEYS = 64  # a split is a whole number of these


def online_softmax(scores, values):
    """Softmax(scores) @ values in one pass, a key at a time (Milakov & Gimelshein 2018, Algorithm 3).

    scores [L], values [L, D]. Yields (m, l, acc) after every key: running maximum, denominator and unnormalised
    output [D]. The result is acc / l after the last one.
    """
    m, l, acc = float("-inf"), 0.0, torch.zeros_like(values[0])
    for score, value in zip(scores.tolist(), values):
        m_new = max(m, score)
        alpha = torch.tensor(m - m_new).exp().item()  # what was summed so far was relative to the old maximum
        p = torch.tensor(score - m_new).exp().item()
        m, l, acc = m_new, l * alpha + p, acc * alpha + p * value
        yield m, l, acc


def split_attention(q, k, v, kv_lens, *, num_splits, sm_scale=None):
    """Steps 1 and 2. Returns part_o [B, Hq, S, D] and part_lse [B, Hq, S], at least fp32; empty splits: 0 and -inf.

    Partial outputs are not rounded to fp16 or bf16: the merge would add those errors up.
    """
    q, k, v = (x.to(softmax_dtype(q.dtype)) for x in (q, k, v))
    parts = []
    for s in range(num_splits):
        cuts = [splits.bounds(n, num_splits, BLOCK_KEYS)[s] for n in kv_lens.tolist()]
        o, lse = [], []
        for b, (start, end) in enumerate(cuts):
            view = slice(b, b + 1)
            length = torch.tensor([end - start], dtype=torch.int32, device=q.device)
            o_b, lse_b = decode_attention(q[view], k[view, start:end], v[view, start:end], length, sm_scale=sm_scale)
            o.append(o_b)
            lse.append(lse_b)
        parts.append((torch.cat(o), torch.cat(lse)))
    part_o, part_lse = (torch.stack(x, 2) for x in zip(*parts))
    return part_o, part_lse


def merge(part_o, part_lse):
    """Step 3: combine partial attentions over disjoint sets of keys, exactly.

    part_o [B, Hq, S, D], part_lse [B, Hq, S], fp32 (or fp64). Returns o [B, Hq, D] and lse [B, Hq] in that dtype.
    A split without keys has lse -inf and no weight; if all are empty, o is 0 and lse -inf.
    Raises ValueError naming the argument.
    """
    args.merge(part_o, part_lse, dtypes=(torch.float32, torch.float64))
    lse = torch.logsumexp(part_lse, -1)
    weight = torch.exp(part_lse - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    part_o = part_o.masked_fill((part_lse == float("-inf")).unsqueeze(-1), 0.0)  # whatever an empty split holds
    return (weight.unsqueeze(-1) * part_o).sum(2), lse


def flash_decoding(q, k, v, kv_lens, *, num_splits=None, sm_scale=None):
    """Decode attention with the keys cut into num_splits pieces; same arguments and result as `decode_attention`.

    num_splits None: `labkit.splits.choose` for an H200. Whatever it is, the result is the same up to rounding.
    """
    batch, _, num_kv_heads, max_kv_len, dim = args.decode(q, k, v, kv_lens, dtypes=args.REFERENCE_FLOATS)
    args.num_splits(num_splits)
    if batch == 0:
        return decode_attention(q, k, v, kv_lens, sm_scale=sm_scale)
    num_splits = num_splits or splits.choose(batch * num_kv_heads, 132, max_kv_len, dim)
    part_o, part_lse = split_attention(q, k, v, kv_lens, num_splits=num_splits, sm_scale=sm_scale)
    o, lse = merge(part_o, part_lse)
    return o.to(q.dtype), lse


def merge_ranks(o, lse, group=None):
    """The same merge across processes: every rank holds the attention over its own slice of the keys.

    o [B, Hq, D], lse [B, Hq] of this rank; group is a torch.distributed process group (gloo on CPUs, NCCL on GPUs).
    Returns, on every rank, o in its dtype and lse over all keys. Two collectives move B * Hq * (D + 2) numbers,
    however long the cache is: a maximum, so that no exponential overflows, then one sum.
    """
    top = lse.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    weight = torch.exp(lse - top.masked_fill(top == float("-inf"), 0.0))
    total = torch.cat([o.to(lse.dtype) * weight.unsqueeze(-1), weight.unsqueeze(-1)], -1)  # [B, Hq, D + 1]
    dist.all_reduce(total, group=group)
    weighted, denominator = total[..., :-1], total[..., -1]
    merged = weighted / denominator.masked_fill(denominator == 0, 1.0).unsqueeze(-1)
    return merged.to(o.dtype), top + denominator.log()


def context_parallel(rank, world_size, attend, q, k, v, kv_lens):
    """Decode with the cache sliced over ranks: rank r holds an equal slice of the positions [0, L).

    attend is `decode_attention`, `flash_decoding` or their kernel. Here every rank is given the whole cache and takes
    its slice; in a real system it never had the rest.
    """
    per_rank = -(-k.shape[1] // world_size)
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    k, v = k[:, mine], v[:, mine]
    local_lens = (kv_lens - rank * per_rank).clamp(0, k.shape[1])
    return merge_ranks(*attend(q, k, v, local_lens))


# --- players


def traced_problem(kv_len=230, head_dim=8):
    """A decode problem of two query heads for `split_player`: v[..., 0] holds the key's position plus one."""
    q, k, v, kv_lens = check.DecodeCase("", (kv_len,), 2, 1, head_dim).tensors()
    v[..., 0] = torch.arange(1, kv_len + 1)[None, :, None]
    return dict(q=q, k=k, v=v, kv_lens=kv_lens)


def split_player(o, lse, walk):
    """Step through a recorded launch (`labkit.trace.watch` of `attend_tile` on `traced_problem`) and its merge.

    A step shows one tile of every program, as a GPU would run them. Which keys a program read is seen in the values
    that it loaded; m, l and acc are those of query head 0.
    """
    tiles = {}  # program -> its tiles: (keys, outputs)
    for step in walk:
        numbers = step.inputs[2][:, 0]
        first, last = int(numbers.max() - (numbers > 0).sum()), int(numbers.max()) - 1
        tiles.setdefault(step.program[0], []).append((f"{first}–{last}", step.outputs))
    width = max(map(len, tiles.values()))
    table, steps = {f"split {s}": [""] * 4 for s in tiles}, []

    def picture(now):
        colors = ["blue"] * now + ["orange"] + ["muted"] * width
        rows = [[(color, keys) for color, (keys, _) in zip(colors, own)] for own in tiles.values()]
        return [row + [None] * (width - len(row)) for row in rows]

    for i in range(width):
        now = {s: own[i] for s, own in tiles.items() if i < len(own)}
        for s, (_, (m, l, acc)) in now.items():
            table[f"split {s}"] = [f"{m[0]:.3f}", f"{l[0]:.3f}", f"{acc[0, 1]:.3f}", f"{acc[0, 2]:.3f}"]
        reads = ", ".join(f"program {s} reads keys {keys}" for s, (keys, _) in now.items())
        text = f"At once, {reads}. Each updates its own m, l and acc."
        steps.append({"text": text, "keys": picture(i), "state": dict(table) | {"merged": [""] * 4}})
    merged = ["", f"lse {lse[0, 0]:.3f}", f"o {o[0, 0, 1]:.3f}", f"o {o[0, 0, 2]:.3f}"]
    text = "The merge weighs each split by exp(lse of the split - lse of all). This is the kernel's output."
    steps.append({"text": text, "keys": picture(width), "state": dict(table) | {"merged": merged}})
    panels = {
        "keys": player.Grid(len(tiles), width, row_labels=[f"split {s}" for s in tiles], name="tiles of keys"),
        "state": player.Values([*table, "merged"], ["m (log2)", "l", "acc[1]", "acc[2]"], name="query head 0"),
    }
    legend = {"orange": "being read", "blue": "read", "muted": "not yet"}
    caption = "Recorded in the interpreter, one program after another; drawn as a GPU runs them, at once."
    return player.Stepper("Three splits and a merge", panels, steps, legend=legend, caption=caption)


def sm_player(gpu="H200", num_kv_heads=2, head_dim=128):
    """What the split rule sees: programs, the SMs they fill and the waves they take. A model, not a measurement."""
    num_sms = GPUS[gpu].num_sms
    cols = 12  # narrow enough for a phone
    rows = -(-num_sms // cols)

    def frame(batch, kv_len):
        rule = splits.choose(batch * num_kv_heads, num_sms, kv_len, head_dim)
        lanes, values, grids, length = [], {}, {}, {}
        for lane, (name, n) in enumerate({"one split": 1, "the rule": rule}.items()):
            programs = batch * num_kv_heads * n
            blocks = max(-(-(end - start) // BLOCK_KEYS) for start, end in splits.bounds(kv_len, n, BLOCK_KEYS))
            waves = -(-programs // (2 * num_sms))
            length[name] = waves * blocks
            for w in range(waves):
                at = [100 * (w + i) * blocks / length["one split"] for i in (0, 1)]
                in_wave = min(2 * num_sms, programs - w * 2 * num_sms)
                lanes.append((lane, *at, "green", f"{in_wave} programs"))
            busy = [programs // num_sms + (sm < programs % num_sms) for sm in range(num_sms)]
            colors = ["outline" if b == 0 else "sky" if b == 1 else "blue" for b in busy]
            colors += [None] * (rows * cols - num_sms)
            grids[name] = [colors[r * cols : (r + 1) * cols] for r in range(rows)]
            values[name] = [n, programs, f"{sum(b > 0 for b in busy)} of {num_sms}", waves, blocks]
        cut, whole = values["the rule"][-1], values["one split"][-1]
        text = f"Batch {batch}, {kv_len:,} keys, {rule} splits: a program walks {cut:,} blocks instead of {whole:,}."
        return {"text": text, "time": lanes, "work": values, "one": grids["one split"], "many": grids["the rule"]}

    panels = {
        "one": player.Grid(rows, cols, name=f"the {num_sms} SMs with one split"),
        "many": player.Grid(rows, cols, name="and with the rule's splits"),
        "time": player.Bars(["one split", "the rule"], unit="% of the time with one split", span=100, name="waves"),
        "work": player.Values(["one split", "the rule"], ["splits", "programs", "SMs at work", "waves", "blocks each"]),
    }
    controls = {"batch": [1, 2, 4, 8, 16, 32, 64], "keys": [1024, 4096, 16384, 65536]}
    legend = {"outline": "idle", "sky": "one program", "blue": "two or more", "green": "a wave of programs"}
    caption = f"A model of an {gpu} with {num_kv_heads} KV heads, two programs per SM: blocks, not measured time."
    return player.Explorer("Who has work?", controls, panels, frame, legend=legend, caption=caption, start=(1, 16384))


def try_splits(kernel, kv_len, num_splits, device="cpu"):
    """Run the kernel on one sequence of kv_len keys and say what it did. The live cell's callback."""
    case = check.DecodeCase("", (kv_len,), 8, 2, 64, torch.bfloat16)
    q, k, v, kv_lens = case.tensors(device)
    verdicts = check.compare(kernel(q, k, v, kv_lens, num_splits=num_splits), decode_attention, q, k, v, kv_lens)
    cuts = splits.bounds(kv_len, num_splits, BLOCK_KEYS)
    empty = sum(start == end for start, end in cuts)
    return f"{num_splits} splits, {empty} of them empty. " + "; ".join(map(str, verdicts))


# --- benchmark cases

# Published in the blog: one A100, fp16, microseconds by (batch, kv_len) of PyTorch eager, FlashAttention 2.0.9 and
# Flash-Decoding.
PUBLISHED_US = {
    (256, 256): (3058.6, 390.5, 63.4),
    (128, 512): (3151.4, 366.3, 67.7),
    (64, 1024): (3160.4, 364.8, 77.7),
    (32, 2048): (3158.3, 352.0, 58.5),
    (16, 4096): (3157.0, 401.7, 57.0),
    (8, 8192): (3173.1, 529.2, 56.4),
    (4, 16384): (3223.0, 582.7, 58.2),
    (2, 32768): (3224.1, 1156.1, 60.3),
    (1, 65536): (1335.6, 2300.6, 64.4),
    (1, 131072): (2664.0, 4592.2, 106.6),
}  # fmt: skip
BLOG, LLAMA = "16 query and 2 KV heads, fp16", "Llama-3-8B: 32 query and 8 KV heads, bf16"
EAGER = "Llama-3-8B, each step launched from Python"
VARIANTS = {"one launch": {"one_launch": True}, "no split": {"num_splits": 1}}
COMPILED = {"B=8 L=8192", "Llama-3-8B B=1 L=8192", "Llama-3-8B B=8 L=8192"}


def decode_case(name, batch, kv_len, num_q_heads, num_kv_heads, dtype, *, op, head_dim=128, tiny=False, **options):
    """One decode step over full caches. tiny: the same case, small enough for the interpreter."""
    if tiny:
        batch, kv_len, head_dim = min(batch, 2), min(kv_len // 4, 80), 64
        num_q_heads, num_kv_heads = num_q_heads // num_kv_heads, 1

    def make(generator, device):
        def randn(*shape):
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        return {
            "q": randn(batch, num_q_heads, head_dim),
            "k": randn(batch, kv_len, num_kv_heads, head_dim),
            "v": randn(batch, kv_len, num_kv_heads, head_dim),
            "kv_lens": torch.full((batch,), kv_len, dtype=torch.int32, device=device),
        }

    elements = 2 * batch * head_dim * (kv_len * num_kv_heads + num_q_heads)  # k, v, q and o
    flops = 4 * batch * num_q_heads * kv_len * head_dim
    options |= dict(bytes=elements * dtype.itemsize, flops=flops, reference="decode_attention")
    options["peers"] = peers.DECODE_MHA if num_q_heads == num_kv_heads else peers.DECODE
    return bench.Case(name, op, make, **options)


def cases(tiny=False) -> list[bench.Case]:
    """The blog's table, at batch * kv_len = 64k, and Llama-3-8B over batch and context."""
    contexts = {1: (1024, 8192, 32768, 131072), 8: (1024, 8192, 32768), 64: (1024, 8192)}
    sizes = [(BLOG, "", *size, 16, 2, torch.float16) for size in PUBLISHED_US]
    sizes += [(LLAMA, "Llama-3-8B ", b, n, 32, 8, torch.bfloat16) for b in contexts for n in contexts[b]]
    sizes += [(EAGER, "eager Llama-3-8B ", 1, 1024, 32, 8, torch.bfloat16)]
    result = []
    for section, prefix, batch, kv_len, *heads_and_dtype in sizes:
        name = f"{prefix}B={batch} L={kv_len}"
        without = {} if name in COMPILED else {"FlexDecoding": "it compiles for half a minute a shape; three are timed"}
        options = dict(op="flash_decoding", section=section, variants=VARIANTS, without=without, tiny=tiny)
        case = decode_case(name, batch, kv_len, *heads_and_dtype, **options)
        if section == EAGER:
            case = replace(case, graph=False, peers=case.peers | {"SDPA, its choice": peers.sdpa(None)})
        result.append(case)
    return result


# (head_dim, group, dtype, options) for the compiler: every pair of the first three meets once.
CORNERS = (
    (64, 1, "float16", dict(num_splits=1)), (64, 8, "bfloat16", {}), (64, 64, "float32", {}),
    (128, 1, "bfloat16", {}), (128, 8, "float32", {}), (128, 64, "float16", dict(num_splits=1)),
    (256, 1, "float32", {}), (256, 8, "float16", dict(num_splits=1)), (256, 64, "bfloat16", {}),
)  # fmt: skip


def codegen_cases() -> list[codegen.Case]:
    """Llama-3-8B in two launches and in one; a group that fp32 cuts into tiles; then nine corners: every pair of
    head_dim, group and dtype meets once."""

    def case(head_dim, group, dtype, **options):
        kv = codegen.Tensor((1, 4096, 1, head_dim), dtype)
        tensors = dict(q=codegen.Tensor((1, group, head_dim), dtype), k=kv, v=kv)
        tensors["kv_lens"] = codegen.Tensor((1,), "int32", 4096)
        words = "".join(f", {key.replace('_', ' ')} {value}" for key, value in options.items())
        name = f"{dtype}, head_dim {head_dim}, group {group}{words}"
        matrix = ("split_kernel", "_one_launch_kernel")
        return codegen.Case("kernels.flash_decoding:flash_decoding", name, tensors | options, matrix)

    return [
        case(128, 4, "bfloat16"),
        case(128, 4, "bfloat16", one_launch=True),
        case(80, 64, "float32"),
        case(80, 64, "float32", one_launch=True),
        *(case(*corner, **options) for *corner, options in CORNERS),
    ]
