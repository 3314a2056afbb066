import copy
import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from fresh_memory import nan_in_fresh_memory
from torch import nn

import kernels.pruning as kp
from labkit import llm_pruner as lp
from labkit import masks, sparse24
from labkit import prune as pr
from labkit import pruning as ref
from labkit import pruning_players as players
from labkit import pruning_study as study
from labkit.check import BF16, F16, F32, assert_matches, randn
from labkit.model import Config, Llama

# (old text, new text) of these files; tests/planted_bugs.py plants them one at a time.
PLANTED_BUGS = [
    ("labkit/prune.py", "            hook.remove()", "            pass"),
    ("labkit/prune.py", "kind(x.in_features, x.weight.device)", "kind(x.in_features)"),
    ("labkit/llm_pruner.py", "uniform_(-bound, bound, generator=generator)", "uniform_(-bound, bound)"),
    ("labkit/llm_pruner.py", "fits = q_rows == shared * kv_rows and", "fits ="),
    ("kernels/pruning.py", "places = t.storage_offset(), ", "places = 0, "),
    ("kernels/pruning.py", "^ (12 * EACH)", "^ (3 * EACH)"),
    ("kernels/pruning.py", "(far | (far >> 2)) & (2 * EACH)", "far & (2 * EACH)"),
    ("kernels/pruning.py", "(far | (far >> 1)) & (5 * EACH)", "far & (5 * EACH)"),
    ("kernels/pruning.py", "outer = words ^ inner", "outer = words"),
    ("kernels/pruning.py", "turn = (bits & 2) * (HALF // 2)", "turn = bits & 0"),
    ("kernels/pruning.py", "return w0, w1, w2, w3", "return w0, w2, w1, w3"),
    ("kernels/pruning.py", "bits = tl.join(bits, bits >> 8)", "bits = tl.join(bits >> 8, bits)"),
    ("kernels/pruning.py", "bits = tl.join(bits, bits >> 16)", "bits = tl.join(bits, bits)"),
    ("kernels/pruning.py", "x0, x2 = tl.split(even)", "x2, x0 = tl.split(even)"),
    ("kernels/pruning.py", "(index & 8) == 0, x1, tl.where((index & 4) == 0, x2, x3)", "(index & 4) == 0, x2, x3"),
    ("kernels/pruning.py", "F.pad(t, (0, -t.shape[1] % count)).contiguous()", "t.flatten()[:t.numel() // count * count].view(len(t), -1)"),
    ("kernels/pruning.py", "if t.stride(1) != 1 or", "if"),
    ("kernels/pruning.py", "t.stride(0), t.shape[1], t.data_ptr()", "t.shape[1], t.data_ptr()"),
    ("kernels/pruning.py", "t.shape[1], t.data_ptr() // t.element_size()", "t.shape[1]"),
    ("kernels/pruning.py", "operand(x0, x1, x2, x3, BLOCK_M, GROUPS, NEIGHBOURS)", "operand(x0, x1, x2, x3, BLOCK_M, GROUPS, 2)"),
    ("kernels/pruning.py", "tl.join(tl.join(c0, c1), tl.join(c3, c2))", "tl.join(tl.join(c0, c1), tl.join(c2 * 1, c2))"),
    ("kernels/pruning.py", "bits | (bits << (HALF - 2))", "bits | (bits << HALF)"),
    ("kernels/pruning.py", "y.numel() == 0 or k == 0", "y.numel() == 0"),
    ("kernels/pruning.py", "end = tl.minimum(start + k_per_split // BLOCK_K, tl.cdiv(k, BLOCK_K))", "end = tl.cdiv(k, BLOCK_K)"),
    ("kernels/pruning.py", "mask_w = mask_n if EVEN_K else mask_n & (cols_w < k // 4)[None, :]", "mask_w = mask_n"),
    ("kernels/pruning.py", "mask_x = mask_m if EVEN_K else mask_m & (cols_k < k)[None, :]", "mask_x = mask_m"),
    ("kernels/flash_decoding_pp.py", "== SPLIT_K - 1:", "== SPLIT_K - 2:"),
    ("kernels/flash_decoding_pp.py", "tl.store(arrived_ptr, 0)", "tl.store(arrived_ptr, 1)"),
    ("kernels/pruning.py", "part_ptr += tile.to(tl.int64) * SPLIT_K * stride_pp", "part_ptr += 0"),
    ("kernels/pruning.py", "((other == mine) & (j < i)[None, None, :, :])", "((other == mine) & (j > i)[None, None, :, :])"),
    ("kernels/pruning.py", "score = tl.where(mask_k[None, :], score, float(\"inf\"))", "score = score"),
    ("kernels/pruning.py", "<= ties_removed, higher, cut", "< ties_removed, higher, cut"),
    ("kernels/pruning.py", "(offs_k >= cut)", "(offs_k > cut)"),
    ("kernels/pruning.py", "for b in range(31):", "for b in range(30):"),
    ("kernels/pruning.py", "bits = tl.where(mask, bits, 0x7FFFFFFF)", "bits = tl.where(mask, bits, 0)"),
    ("labkit/sparsegpt.py", ".t().clone(memory_format=torch.contiguous_format)", ".t().contiguous()"),
    ("labkit/prune.py", 'method != "sparsegpt" or m is None', "m is None"),
    ("labkit/masks.py", "equal.cumsum(-1) > (", "equal.cumsum(-1) >= ("),
    ("labkit/masks.py", "(other <= mine) if j < i", "(other < mine) if j < i"),
    ("labkit/masks.py", "x.float().square().sum((0, 1)) / len(x)", "x.float().square().mean((0, 1))"),
    ("labkit/masks.py", "share = len(x) / self.count", "share = 1 / self.count"),
    ("labkit/sparse24.py", "w.masked_fill(~mask, 0).unflatten", "w.unflatten"),
    ("labkit/sparse24.py", ".sort(dim=-1).values  # kept", "  # kept"),
    ("labkit/sparsegpt.py", "score > score.flatten()", "score >= score.flatten()"),
    ("labkit/sparsegpt.py", "diagonal += damp * diagonal.mean()", "diagonal += damp"),
    ("labkit/sparsegpt.py", "diagonal[diagonal == 0] = 1", "pass"),
    ("labkit/sparsegpt.py", "wt[unseen] = 0", "pass"),
    ("labkit/sparsegpt.py", "batch = 1 if x.dim() == 2 else len(x)", "batch = x.shape[-2] if x.dim() == 2 else len(x)"),
    ("labkit/sparsegpt.py", "block**2 / scale**2", "block**2 / scale"),
    ("labkit/sparsegpt.py", "h = hessian if overwrite else hessian.clone()", "h = hessian"),
    ("labkit/sparsegpt.py", "u[start:stop, stop:].t(), errors, alpha=-1", "u[start:stop, stop:].t(), errors, alpha=-2"),
    ("labkit/llm_pruner.py", "range(1, count - 1)", "range(count)"),
    ("labkit/llm_pruner.py", "argsort(descending=True, stable=True)", "argsort(stable=True)"),
    ("labkit/llm_pruner.py", "- 0.5 * w**2", "+ 0.5 * w**2"),
    ("labkit/llm_pruner.py", "value=1 / sequences", "value=1"),
    ("labkit/llm_pruner.py", "alpha=part[:, 1:].numel() / tokens", "alpha=1"),
    ("labkit/llm_pruner.py", "model = copy.deepcopy(model)", "model = model"),
    ("labkit/llm_pruner.py", "linear.bias = nn.Parameter(linear.bias.detach()[at])", "pass"),
    ("labkit/llm_pruner.py", "self.linear.weight += self.scale * self.b", "self.linear.weight += self.b"),
    ("labkit/prune.py", "hidden[j] = run(model, block, x)", "run(model, block, x)"),
    ("labkit/prune.py", "            block.load_state_dict(weights, strict=False)", "            pass"),
    ("labkit/prune.py", "os.replace(part, file)", "file.write_bytes(part.read_bytes()[:-1])"),
    ("labkit/args.py", "expect(columns % m == 0, \"columns\"", "expect(True, \"columns\""),
    ("labkit/llm_pruner.py", "torch.zeros_like(x, dtype=wide(x)) for x in weights", "torch.zeros_like(x) for x in weights"),
    ("labkit/llm_pruner.py", "linear.weight.detach().to(wide(linear.weight))", "linear.weight.detach()"),
    ("labkit/llm_pruner.py", "len(set(layers)) == len(layers) > 0", "len(layers) > 0"),
    ("labkit/prune.py", "zip(ids[:1], encode(\"\")) if a == b]", "zip(ids[:1], ids[:1])]"),
    ("labkit/prune.py", "*model.state_dict().values())", "*(x[:1] for x in model.state_dict().values()))"),
    ("labkit/prune.py", "train.fingerprint(shapes, *batches", "train.fingerprint(*batches"),
    ("labkit/prune.py", "args.expect(ids.numel() > 0, \"batches\", tuple(ids.shape), \"[>= 1, >= 1]\")", "pass"),
    ("labkit/pruning_study.py", "batches[2 * draw : 2 * draw + 2]", "batches[:2]"),
    ("labkit/pruning_study.py", "lost(w, x, fresh) for way", "lost(w, x, seen[:tokens]) for way"),
    ("labkit/pruning_study.py", "(w - kept) @ seen.mean", "kept @ seen.mean"),
    ("labkit/pruning_study.py", "to_fit = kept @ seen.products", "to_fit = w @ seen.products"),
]  # fmt: skip


def tensor(*shape, seed=0, dtype=F32, device="cpu"):
    return randn(np.random.default_rng(seed), *shape, dtype=dtype, device=device)


# ---- masks


def kept_by_hand(score, removed):
    """A row of scores without its `removed` smallest, the leftmost of equals first."""
    order = sorted(range(len(score)), key=lambda i: (score[i], i))
    return [i not in order[:removed] for i in range(len(score))]


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("per", ["row", "layer"])
def test_magnitude_mask(per, sparsity):
    """Values of 0..3 only, so that ties decide."""
    w = torch.from_numpy(np.random.default_rng(0).integers(-3, 4, (5, 7))).float()
    keep = ref.magnitude_mask(w, sparsity, per=per)
    for row, mask in zip(w if per == "row" else w.view(1, -1), keep if per == "row" else keep.view(1, -1)):
        assert mask.tolist() == kept_by_hand(row.abs().tolist(), math.floor(len(row) * sparsity))


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 4), (4, 8), (2, 3), (4, 4), (1, 1)])
def test_nm_mask_keeps_n_of_m(n, m):
    score = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (6, 6 * m))).float()
    keep = ref.nm_mask(score, n, m)
    groups = zip(score.view(-1, m).tolist(), keep.view(-1, m).tolist())
    assert all(got == kept_by_hand(group, m - n) for group, got in groups)


def test_wanda_on_the_papers_figure():
    """Figure 1 of the paper: |W| ||X|| within a row; magnitude would keep the other weights."""
    w = torch.tensor([[4.0, 0, 1, -1], [3, -2, -1, -3], [-3, 1, 0, 2]])
    x_norm = torch.tensor([1.0, 2, 8, 3])
    score = ref.wanda_score(w, x_norm)
    assert score.tolist() == [[4, 0, 8, 3], [3, 4, 8, 9], [3, 2, 0, 6]]
    kept = torch.where(ref.wanda_mask(w, x_norm, sparsity=0.5), w, 0)
    assert kept.tolist() == [[4, 0, 1, 0], [0, 0, -1, -3], [-3, 0, 0, 2]]
    assert ref.wanda_mask(w, x_norm, n=1, m=2).tolist() == [[True, False, True, False], [False, True, False, True], [True, False, False, True]]


def test_input_norm_is_a_mean_over_sequences():
    x = tensor(5, 3, 4)
    want = x.square().sum(1).mean(0).sqrt()
    for parts in ((5,), (2, 3), (1, 1, 1, 1, 1)):
        norm = masks.InputNorm(4)
        for part in x.split(parts):
            norm.add(part if len(part) > 1 else part[0])
        torch.testing.assert_close(norm.value, want)


@dataclass(frozen=True)
class MaskCase:
    n_rows: int
    k: int
    options: tuple
    dtype: torch.dtype = F32
    strided: bool = False

    def __str__(self):
        options = " ".join(f"{name}={x}" for name, x in self.options)
        return f"{self.n_rows}x{self.k} {options} {str(self.dtype)[6:]}{' strided' if self.strided else ''}"


def mask_case(*shape, dtype=F32, strided=False, **options):
    return MaskCase(*shape, tuple(options.items()), dtype, strided)


@pytest.mark.parametrize("case", [
    mask_case(3, 128, sparsity=0.5), mask_case(2, 129, sparsity=0.3, dtype=BF16), mask_case(4, 127, sparsity=0.999, dtype=F16),
    mask_case(2, 128, sparsity=1.0), mask_case(2, 130, sparsity=1.0), mask_case(2, 128, sparsity=0.0), mask_case(1, 1, sparsity=0.5),
    mask_case(3, 100, sparsity=0.5, strided=True), mask_case(0, 8, sparsity=0.5), mask_case(2, 0, sparsity=0.5),
    mask_case(5, 512, n=2, m=4, dtype=BF16), mask_case(9, 264, n=4, m=8), mask_case(4, 260, n=1, m=4, dtype=F16),
    mask_case(5, 320, n=16, m=32), mask_case(9, 130, n=7, m=13, dtype=BF16),
    mask_case(3, 63, n=2, m=3), mask_case(2, 10, n=5, m=5), mask_case(2, 4, n=1, m=1), mask_case(5, 100, n=3, m=4, strided=True),
], ids=str)  # fmt: skip
def test_wanda_mask_kernel(case, device, monkeypatch):
    """Bit for bit the reference, ties included: a third of the scores are equal."""
    w, x_norm = tensor(case.n_rows, case.k, dtype=case.dtype, device=device), tensor(case.k, seed=1, device=device).abs()
    w[:, ::3], x_norm[::3] = 0.5, 1.0
    if case.strided:
        w = torch.stack((w, w.new_full(w.shape, math.nan)), 2)[:, :, 0]
        x_norm = torch.stack((x_norm, x_norm.new_full(x_norm.shape, math.nan)), 1)[:, 0]
    want = ref.wanda_mask(w, x_norm, **dict(case.options))
    nan_in_fresh_memory(monkeypatch)
    got = kp.wanda_mask(w, x_norm, **dict(case.options))
    assert got.dtype == torch.bool
    assert torch.equal(got, want)


def test_wanda_mask_tells_the_last_bit(device):
    """1 and the next number above it, and a threshold among the latter."""
    w = torch.ones(2, 64, device=device)
    w[:, ::2] = torch.nextafter(w[:, ::2], 2 * w[:, ::2])
    keep = kp.wanda_mask(w, torch.ones(64, device=device), sparsity=0.75)
    assert torch.equal(keep, ref.wanda_mask(w, torch.ones(64, device=device), sparsity=0.75))
    assert (keep.sum(1) == 16).all()


@pytest.mark.parametrize("function", [kp.wanda_mask, ref.wanda_mask])
def test_bad_patterns_are_named(function, device):
    w, x_norm = torch.zeros(2, 12, device=device), torch.zeros(12, device=device)
    for name, options in (
        ("sparsity, n, m", {}), ("sparsity, n, m", dict(sparsity=0.5, n=2, m=4)), ("sparsity, n, m", dict(n=2)),
        ("sparsity", dict(sparsity=1.5)), ("sparsity", dict(sparsity=-0.1)), ("sparsity", dict(sparsity="half")),
        ("n, m", dict(n=5, m=4)), ("n, m", dict(n=0, m=4)), ("n, m", dict(n=True, m=4)), ("columns", dict(n=4, m=8)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}: got .* expected "):
            function(w, x_norm, **options)
    for name, given in {"w": (w[0], x_norm), "x_norm": (w, x_norm[:3]), "x_norm ": (w, x_norm.int())}.items():
        with pytest.raises(ValueError, match=rf"^{name.strip()} .*got .* expected "):
            function(*given, sparsity=0.5)
    with pytest.raises(ValueError, match=r"^per: got 'column'"):
        ref.magnitude_mask(w, 0.5, per="column")


def test_wanda_mask_has_room_for_so_much(device):
    with pytest.raises(ValueError, match=r"^w \(columns\): got 65537, expected at most 65536"):
        kp.wanda_mask(torch.zeros(1, 65537, device=device), torch.zeros(65537, device=device), sparsity=0.5)
    with pytest.raises(ValueError, match=r"^m: got 64, expected at most 32"):
        kp.wanda_mask(torch.zeros(1, 64, device=device), torch.zeros(64, device=device), n=1, m=64)


# ---- 2:4


def test_pack_24_by_hand():
    w = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [0, 1, 0, 2, 9, 9, 9, 9]])
    mask = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0]]).bool()
    values, meta = ref.pack_24(w, mask)
    assert values.tolist() == [[1, 4, 6, 7], [0, 1, 0, 0]]
    assert meta.tolist() == [[0b10_01_11_00], [0b01_00_01_00]]
    assert torch.equal(ref.unpack_24(values, meta), w * mask)


def test_pack_24_gives_back_every_mask():
    """All 11 ways to keep at most two of four, in all pairs."""
    ways = [[(c >> i) & 1 for i in range(4)] for c in range(16) if bin(c).count("1") <= 2]
    mask = torch.tensor([a + b for a in ways for b in ways]).bool()
    w = tensor(*mask.shape)
    values, meta = ref.pack_24(w, mask)
    assert values.shape == (121, 4)
    assert meta.shape == (121, 1)
    assert torch.equal(ref.unpack_24(values, meta), w * mask)
    i, j = sparse24.indices_24(meta).view(-1, 2).T
    assert (i < j).all()  # the kernel counts on it


def test_pack_24_keeps_nothing_of_what_is_masked():
    w = torch.full((1, 8), math.inf)
    values, _ = ref.pack_24(w.masked_fill(torch.arange(8) > 1, 3.0), torch.arange(8)[None] < 1)
    assert values.tolist() == [[math.inf, 0, 0, 0]]


def test_bad_24_is_named(device):
    w = torch.zeros(2, 16, device=device)
    with pytest.raises(ValueError, match=r"^mask: got a group of four that keeps 3, expected at most two"):
        ref.pack_24(w, torch.arange(16, device=device).expand(2, 16) % 4 < 3)
    with pytest.raises(ValueError, match=r"^w \(columns\): got 12, expected a multiple of 8"):
        ref.pack_24(w[:, :12], w[:, :12].bool())
    with pytest.raises(ValueError, match=r"^mask "):
        ref.pack_24(w, w)
    x, values, meta = torch.zeros(3, 16, device=device), torch.zeros(5, 8, device=device), torch.zeros(5, 2, dtype=torch.uint8, device=device)
    for function in (kp.matmul_24, ref.matmul_24):
        for name, given in {
            "x": (x[0], values, meta), "x ": (x[:, :12], values, meta), "values": (x, values[:, :4], meta),
            "values ": (x, values.half(), meta), "meta": (x, values, meta.int()), "meta ": (x, values, meta[:3]),
        }.items():  # fmt: skip
            with pytest.raises(ValueError, match=rf"^{name.strip()} .*got .* expected "):
                function(*given)


@pytest.mark.parametrize("m, n, k, dtype, strided", [
    (1, 5, 128, F32, False), (1, 6, 1032, F32, True), (1, 9, 4104, BF16, False), (1, 130, 136, F16, True), (1, 1, 8, BF16, False),
    (2, 3, 8, F32, False), (3, 70, 520, F16, False), (16, 33, 64, BF16, True), (17, 64, 128, BF16, False),
    (8, 20, 1160, F32, False), (5, 65, 1032, BF16, False), (70, 8, 136, F16, False), (0, 3, 8, F32, False), (2, 0, 8, F32, False),
    (3, 4, 0, F32, False),
], ids=str)  # fmt: skip
def test_matmul_24(m, n, k, dtype, strided, device, monkeypatch):
    x, w = tensor(m, k, dtype=dtype, device=device), tensor(n, k, seed=1, dtype=dtype, device=device)
    values, meta = ref.pack_24(w, ref.nm_mask(w.abs(), 2, 4))
    if strided:  # every second element of a buffer full of NaN (meta: of ones)
        x, values = (torch.stack((a, torch.full_like(a, math.nan)), 2)[:, :, 0] for a in (x, values))
        meta = torch.stack((meta, torch.full_like(meta, 255)), 2)[:, :, 0]
    assert_matches(ref.matmul_24(x, values, meta), lambda x, w: x @ w.T, x, ref.unpack_24(values, meta))
    nan_in_fresh_memory(monkeypatch)
    for _ in range(2 if k > 1000 else 1):  # K is cut there: the arrival counters must be back at zero
        assert_matches(kp.matmul_24(x, values, meta), ref.matmul_24, x, values, meta)


@pytest.mark.parametrize("dtype, neighbours", [(F16, 4), (BF16, 2), (BF16, 4), (F32, 2), (F32, 4)], ids=str)
def test_matmul_24_only_moves_the_weights(dtype, neighbours, device, monkeypatch):
    """Times the identity: every way to keep at most two of four, next to every other, comes back to the bit."""
    ways = [[(c >> i) & 1 for i in range(4)] for c in range(16) if bin(c).count("1") <= 2]
    mask = torch.tensor([a + b for a in ways for b in ways], device=device).bool().view(11, 88)
    w = tensor(11, 88, dtype=dtype, device=device)
    monkeypatch.setattr(kp, "_neighbours", lambda: neighbours)
    y = kp.matmul_24(torch.eye(88, dtype=dtype, device=device), *ref.pack_24(w, mask))
    assert torch.equal(y, (w * mask).t())


@pytest.mark.parametrize("m, dtype", [(1, F32), (1, BF16), (3, F16)], ids=str)
def test_matmul_24_reads_no_neighbours(m, dtype, device):
    """NaN in one row of the weight, and in one token: beyond the end of a row lies the next one."""
    x, w = tensor(m, 136, dtype=dtype, device=device), tensor(4, 136, seed=1, dtype=dtype, device=device)
    values, meta = ref.pack_24(w, ref.nm_mask(w.abs(), 2, 4))
    x[1:2], values[2] = math.nan, math.nan
    y = kp.matmul_24(x, values, meta)
    assert torch.isnan(y[1:2]).all()
    assert torch.isnan(y[:, 2]).all()
    assert_matches(y[::2, :2], ref.matmul_24, x[::2], values[:2], meta[:2])


@pytest.mark.parametrize("before, after", [(1, 0), (1, 1), (0, 1)])
def test_matmul_24_rows_that_start_anywhere(before, after, device):
    x, w = tensor(2, 64, dtype=BF16, device=device), tensor(3, 64, seed=1, dtype=BF16, device=device)
    values, meta = ref.pack_24(w, ref.nm_mask(w.abs(), 2, 4))
    placed = []
    for t in (values, meta):
        room = torch.full((3, before + t.shape[1] + after), 99, dtype=t.dtype, device=device)
        placed.append(room[:, before : before + t.shape[1]].copy_(t))
    assert_matches(kp.matmul_24(x, *placed), ref.matmul_24, x, values, meta)


@pytest.mark.parametrize("start", [0, 1])
def test_words_of_memory_that_starts_between_them(start):
    """The storage of foreign memory may start at any byte, and a tensor in it where a word does."""
    meta = torch.frombuffer(bytearray(range(34)), dtype=torch.uint8, offset=1)[start : start + 32].view(4, 8)
    words = kp.as_words(meta, torch.uint16)
    assert words.shape == (4, 4)
    assert words.data_ptr() % 2 == 0
    assert torch.equal(words.view(torch.uint8), meta)


def test_k_is_cut_where_n_is_small(monkeypatch):
    """On the 132 SMs of an H200."""
    monkeypatch.setattr("kernels.flash_decoding_pp.device_properties", lambda: {"multiprocessor_count": 132})
    cut = lambda m, n, k: kp.config_24(BF16, m, n, k)["SPLIT_K"]  # noqa: E731
    assert [cut(8, n, 4096) for n in (64, 4096, 14336, 128256)] == [8, 8, 2, 1]


# ---- SparseGPT


def sparsegpt_plainly(w, hessian, sparsity, n, m, block_size, damp):
    """The official algorithm, one weight of one row at a time, with H^-1 of the columns that are left by inversion.

    Where the code has one Cholesky factor U, the definition has an inverse for every step: U_jj^2 is the first
    diagonal entry of the inverse of H[j:, j:], and U[j, j:] / U_jj its first row over that entry.
    """
    w, h = w.double().clone(), hessian.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    h += damp * h.diagonal().mean() * torch.eye(len(h))
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(len(h))]
    keep = torch.ones_like(w, dtype=torch.bool)
    first = torch.stack([inverse[0, 0] for inverse in inverses])
    for j in range(w.shape[1]):
        score = w**2 / first
        if n is None and j % block_size == 0:
            block = score[:, j : j + block_size]
            threshold = sorted(block.flatten().tolist())[math.floor(block.numel() * sparsity)]
            keep[:, j : j + block_size] = block > threshold
        if n is not None and j % m == 0:
            for r in range(len(w)):
                keep[r, j : j + m] = torch.tensor(kept_by_hand(score[r, j : j + m].tolist(), m - n))
        for r in range(len(w)):
            if not keep[r, j]:
                w[r, j:] -= w[r, j].item() / first[j] * inverses[j][0]
                w[r, j] = 0.0
    return w, keep


@pytest.mark.parametrize("options", [
    dict(sparsity=0.5), dict(sparsity=0.8, block_size=16, damp=0.1), dict(n=2, m=4), dict(n=1, m=4), dict(n=4, m=8, block_size=8),
], ids=str)  # fmt: skip
def test_sparsegpt_is_its_definition(options):
    """Correlated inputs, a feature that was never seen, and a block that is not full."""
    x = tensor(300, 40) @ tensor(40, 40, seed=1)
    x[:, 5] = 0.0
    hessian = ref.Hessian(40)
    hessian.add(x)
    w, h = tensor(6, 40, seed=2).double(), hessian.value.double()
    before = w.clone(), h.clone()
    new, mask = ref.sparsegpt(w, h, **options)
    want, keep = sparsegpt_plainly(w, h, *({"sparsity": None, "n": None, "m": None, "block_size": 128, "damp": 0.01} | options).values())
    assert torch.equal(mask, keep)
    torch.testing.assert_close(new, want)
    assert (new[~mask] == 0).all()
    assert torch.equal(w, before[0])
    assert torch.equal(h, before[1])
    assert torch.equal(ref.sparsegpt(w, h.clone(), overwrite=True, **options)[0], new)
    if "sparsity" in options:
        blocks = [6 * len(c) for c in torch.arange(40).split(options.get("block_size", 128))]
        assert (~mask).sum() == sum(math.floor(b * options["sparsity"]) + 1 for b in blocks)


def test_ties_at_the_threshold_all_go():
    """Equal scores: the official `<=` removes more than floor(n * s) + 1; a mask by count would not."""
    _, mask = ref.sparsegpt(torch.ones(2, 8), torch.eye(8), sparsity=0.5)
    assert not mask.any()


def test_sparsegpt_beats_the_mask_alone():
    """Where inputs are correlated the other weights make up for the lost ones; on white inputs they hardly can."""
    gain = {}
    for name, mix in (("white", torch.eye(64)), ("correlated", torch.tril(torch.ones(64, 64)))):
        x, w = tensor(2000, 64) @ mix, tensor(32, 64, seed=1)
        hessian, norm = ref.Hessian(64), ref.InputNorm(64)
        hessian.add(x), norm.add(x)
        wanda = w * ref.wanda_mask(w, norm.value, sparsity=0.5)
        ours, _ = ref.sparsegpt(w, hessian.value, sparsity=0.5)
        gain[name] = ((x @ (w - ours).T).norm() / (x @ (w - wanda).T).norm()).item()
    assert gain["correlated"] < 0.5 < 0.8 < gain["white"] < 1.0


def test_hessian_counts_sequences():
    x = tensor(5, 3, 4)
    want = 2 * x.flatten(0, 1).T @ x.flatten(0, 1) / 5
    for parts in ((5,), (2, 3), (1, 1, 1, 1, 1)):
        hessian = ref.Hessian(4)
        for part in x.split(parts):
            hessian.add(part if len(part) > 1 else part[0])
        torch.testing.assert_close(hessian.value, want)


@pytest.mark.parametrize("shape", [(8, 4), (8, 1), (1, 8)])
def test_sparsegpt_leaves_its_arguments(shape):
    """Also where the weights lie as its own copy of them would: transposed (a Conv1D's), or a single row or column."""
    for w in (tensor(*shape).t(), torch.nn.Parameter(tensor(*shape))):
        x = tensor(16, w.shape[1])
        hessian, kept = x.t() @ x, w.detach().clone()
        w_new, _ = ref.sparsegpt(w, hessian, sparsity=0.5)
        assert torch.equal(w, kept)
        assert not torch.equal(w_new, kept)
        assert not w_new.requires_grad


def test_bad_sparsegpt_is_named():
    w, h = torch.ones(3, 8), torch.eye(8)
    for name, given, options in (
        ("hessian ", (w, h[:4, :4]), {}), ("w ", (w[0], h), {}), ("sparsity", (w, h), dict(sparsity=1.0)),
        ("block_size", (w, h), dict(block_size=0)), ("block_size", (w, h), dict(sparsity=None, n=2, m=4, block_size=6)),
        ("damp", (w, h), dict(damp=-1.0)), ("hessian", (w, h * math.nan), {}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}.*got .* expected "):
            ref.sparsegpt(*given, **({"sparsity": 0.5} | options))
    flat = torch.ones(8, 8)  # one input seen eight times: rank 1
    with pytest.raises(ValueError, match=r"^hessian: got a matrix that is not positive definite .* more calibration text, or a damp above 0"):
        ref.sparsegpt(w, flat, sparsity=0.5, damp=0.0)
    assert ref.sparsegpt(w, flat, sparsity=0.5, damp=0.01)[0].isfinite().all()


# ---- a whole model, block by block


def small_model(kv_heads=2, layers=2, bias=False, seed=0):
    """Four query heads of 8, hidden 32, 48 channels; weights large enough that every layer matters."""
    config = Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=8, tie_word_embeddings=True, qkv_bias=bias,
        architecture="Qwen2ForCausalLM" if bias else "LlamaForCausalLM",
    )  # fmt: skip
    model = Llama(config)
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        if p.dim() == 2 or bias:
            p.data = 0.2 * randn(rng, *p.shape) + (p.data if p.dim() == 1 and p.data.mean() == 1 else 0)
    return model.eval()


def small_batches(seed=1, shape=(3, 4, 20)):
    return list(torch.from_numpy(np.random.default_rng(seed).integers(0, 40, shape)))


QUIET = dict(progress=None)


def pruned_plainly(model, method, batches, **options):
    """Hooks on the whole model, run once before each block is pruned: what comes in then is what must be used."""
    for block in model.layers:
        inputs = {name: [] for name in pr.linears(block)}
        hooks = [
            linear.register_forward_hook(lambda module, given, out, seen=inputs[name]: seen.append(given[0]))
            for name, linear in pr.linears(block).items()
        ]
        with torch.no_grad():
            for ids in batches:
                model(ids)
        for hook in hooks:
            hook.remove()
        for name, linear in pr.linears(block).items():
            x = torch.cat(inputs[name])
            if method == "wanda":
                keep = ref.wanda_mask(linear.weight.data, x.square().sum(1).mean(0).sqrt(), **options)
                linear.weight.data *= keep
            else:
                hessian = 2 * x.flatten(0, 1).T @ x.flatten(0, 1) / len(x)
                linear.weight.data = ref.sparsegpt(linear.weight.data, hessian, **options)[0]
    return model


@pytest.mark.parametrize("method, options", [("wanda", dict(sparsity=0.5)), ("wanda", dict(n=2, m=4)), ("sparsegpt", dict(n=4, m=8))], ids=str)
def test_prune_is_sequential(method, options):
    """Bit-equal masks with statistics that were collected from the whole model, earlier blocks pruned."""
    got = ref.prune(small_model(), method, small_batches(), **options, **QUIET)
    want = pruned_plainly(small_model(), method, small_batches(), **options)
    for (name, a), b in zip(got.state_dict().items(), want.state_dict().values()):
        assert torch.equal(a == 0, b == 0), name
        torch.testing.assert_close(a, b, msg=name, rtol=1e-3, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in got.modules()), "nobody listens any more"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_statistics_lie_where_the_model_does(method):
    """On torch's device without memory, which takes no tensor of the CPU."""
    model, x = small_model().to("meta"), torch.zeros(3, 20, 32, device="meta")
    statistics = pr.watch(model, model.layers[0], [x, x], pr.STATISTICS[method])
    assert {s.value.device.type for s in statistics.values()} == {"meta"}


def test_prune_by_magnitude_needs_no_text():
    dense, model = small_model(), ref.prune(small_model(), "magnitude", sparsity=0.5, per="layer", **QUIET)
    for a, b in zip(dense.layers, model.layers):
        for x, y in zip(pr.linears(a).values(), pr.linears(b).values()):
            assert torch.equal(y.weight, x.weight * ref.magnitude_mask(x.weight, 0.5, per="layer"))
    assert torch.equal(dense.embed_tokens.weight, model.embed_tokens.weight)
    nm = ref.prune(small_model(), "magnitude", n=2, m=4, **QUIET).layers[0].mlp.up_proj.weight
    assert ((nm.view(-1, 4) != 0).sum(1) == 2).all()


def test_only_sparsegpt_has_blocks_of_columns():
    odd = dict(n=2, m=4, block_size=6, **QUIET)
    for method in ("magnitude", "wanda"):
        got = ref.prune(small_model(), method, small_batches(), **odd)
        want = ref.prune(small_model(), method, small_batches(), n=2, m=4, **QUIET)
        assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"^block_size: got 6, expected a multiple of m = 4"):
        ref.prune(small_model(), "sparsegpt", small_batches(), **odd)


def test_prune_goes_on_where_it_stopped(tmp_path, monkeypatch):
    options = dict(sparsity=0.5, work=tmp_path / "work")
    want = ref.prune(small_model(layers=3), "sparsegpt", small_batches(), sparsity=0.5, **QUIET)

    def stop(done, total, seconds):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ref.prune(small_model(layers=3), "sparsegpt", small_batches(), progress=stop, **options)
    (tmp_path / "work" / "block-002.part").write_bytes(b"half a file")
    pruned, real = [], pr.new_weight
    monkeypatch.setattr(pr, "new_weight", lambda w, *a, **kw: pruned.append(w.shape) or real(w, *a, **kw))
    steps = []
    got = ref.prune(small_model(layers=3), "sparsegpt", small_batches(), progress=lambda *a: steps.append(a[:2]), **options)
    assert len(pruned) == 7  # the linears of the last block only
    assert steps == [(1, 3), (2, 3), (3, 3)]
    for (name, a), b in zip(got.state_dict().items(), want.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)
    changed = small_model(layers=3)
    changed.layers[1].mlp.up_proj.weight.data[-1, -1] += 0.1  # one weight, and not of a first row
    for other in (
        dict(method="wanda"), dict(batches=small_batches(seed=2)), dict(batches=[torch.cat(small_batches())]), dict(model=changed),
        dict(sparsity=0.6),
    ):  # fmt: skip
        call = dict(model=small_model(layers=3), method="sparsegpt", batches=small_batches()) | options | other
        with pytest.raises(ValueError, match=r"^work .*got a run with .* expected .*delete the folder"):
            ref.prune(**call, **QUIET)


def test_prune_writes_a_file_whole_or_not_at_all(tmp_path, monkeypatch):
    def torn(weights, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pr, "save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        ref.prune(small_model(), "magnitude", sparsity=0.5, work=tmp_path, **QUIET)
    assert not list(tmp_path.glob("*.safetensors"))


def test_prune_says_what_to_raise():
    for options, message in (
        (dict(method="obd"), "^method: got 'obd'"), (dict(per="column"), "^per: "), (dict(sparsity=None), "^sparsity, n, m: "),
        (dict(sparsity=None, n=3, m=5), "^columns: got 32, expected a multiple of m = 5"), (dict(batches=None), "^batches: got none"),
        (dict(batches=[torch.zeros(3)]), "^batches "), (dict(batches=[torch.full((1, 60), 40)]), "^batches: got values from 40"),
        (dict(method="wanda", batches=[torch.zeros(0, 8).long()]), r"^batches: got \(0, 8\), expected "),
        (dict(method="wanda", batches=[*small_batches(), torch.zeros(2, 0).long()]), r"^batches: got \(2, 0\), expected "),
        (dict(batches=small_batches(shape=(1, 1, 47))), r"^batches: got 47 tokens, expected at least 48, .* raise the number"),
        (dict(batches=[torch.zeros(1, 60).long()], damp=0.0), r"^layers.0.self_attn.\w+: hessian: .* damp above 0"),
    ):  # fmt: skip
        call = dict(model=small_model(), method="sparsegpt", batches=small_batches(), sparsity=0.5) | options
        with pytest.raises(ValueError, match=message):
            ref.prune(**call, **QUIET)
    assert ref.prune(small_model(), "wanda", [torch.zeros(1, 1).long()], sparsity=0.5, **QUIET)


def test_prune_a_checkpoint_by_command(tmp_path, capsys):
    """Folder in, folder out; the vocabulary of our bytes, and the lab's calibration text."""
    config = replace(small_model().config, vocab_size=258)
    Llama(config).save_pretrained(tmp_path / "dense")
    command = f"{tmp_path / 'dense'} {tmp_path / 'out'} --method sparsegpt --keep 2:4 --sequences 4 --length 32 --dtype float32"
    pr.main(command.split())
    assert "2/2 blocks" in capsys.readouterr().err
    pruned = Llama.from_pretrained(tmp_path / "out")
    weight = pruned.layers[1].mlp.down_proj.weight
    assert ((weight.view(-1, 4) == 0).sum(1) == 2).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]


@pytest.mark.parametrize("before, after", [([7], []), ([], []), ([7], [9]), ([], [9])])
def test_calibration_begins_as_the_models_texts_do(before, after):
    """BOS stands before every sequence if the tokenizer puts one before every text, and nothing if it does not."""
    ids, text = [], lambda encoded: encoded[len(before) : len(encoded) - len(after)]
    encode = lambda words: ids.append([*before, *words.encode(), *after]) or ids[-1]  # noqa: E731
    batches = pr.calibration(encode, sequences=20, length=10)
    assert [tuple(x.shape) for x in batches] == [(8, 10), (8, 10), (4, 10)]
    rows = torch.cat(batches)
    assert (rows[:, : len(before)] == 7).all()
    assert rows[:, len(before) :].flatten().tolist() == text(max(ids, key=len))[: 20 * (10 - len(before))]


# ---- LLM-Pruner


def test_groups_cover_every_weight_of_the_linears():
    """Removing a group is removing its output: the model without group g is the model with g's outputs zeroed."""
    for kv_heads in (4, 2):
        for family in ("heads", "channels"):
            model, zeroed = small_model(kv_heads, bias=True), small_model(kv_heads, bias=True)
            members, count = lp.groups(model.layers[1])[family], {"heads": kv_heads, "channels": 48}[family]
            keep = torch.tensor([i for i in range(count) if i != 1])
            lp.remove(members, keep)
            linear, dim, size = lp.groups(zeroed.layers[1])[family][-1]
            assert dim == 1
            linear.weight.data[:, size : 2 * size] = 0
            ids = small_batches()[0]
            torch.testing.assert_close(model(ids), zeroed(ids))


def importances_by_hand(model, batches, order):
    """{(layer, family): scores} with one backward pass a sequence and plain loops over groups."""
    weights = [x for block in model.layers for x in block.parameters() if x.dim() == 2]
    total, squares, tokens, sequences = [0] * len(weights), [0] * len(weights), 0, 0
    for ids in (row for batch in batches for row in batch):
        loss = nn.functional.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum")
        grads = torch.autograd.grad(loss, weights)
        total = [a + g for a, g in zip(total, grads)]
        squares = [a + (g / (len(ids) - 1)) ** 2 for a, g in zip(squares, grads)]
        tokens, sequences = tokens + len(ids) - 1, sequences + 1
    g = {w: x / tokens for w, x in zip(weights, total)}
    h = {w: x / sequences for w, x in zip(weights, squares)}
    element = {
        "first": lambda w: (w * g[w]).abs(), "second": lambda w: (w * g[w] - 0.5 * w * w * h[w]).abs(),
        "hessian": lambda w: w * w * h[w], "l2": lambda w: w * w, "vector": lambda w: w * g[w],
    }[order]  # fmt: skip
    found = {}
    for i, block in enumerate(model.layers):
        a, mlp, dim = block.self_attn, block.mlp, 8
        kv = a.k_proj.weight.shape[0] // dim
        q = a.q_proj.weight.shape[0] // kv
        for family, slices in (
            ("heads", [[(a.q_proj, slice(j * q, j * q + q), None), (a.k_proj, slice(j * dim, j * dim + dim), None),
                        (a.v_proj, slice(j * dim, j * dim + dim), None), (a.o_proj, None, slice(j * q, j * q + q))] for j in range(kv)]),
            ("channels", [[(mlp.gate_proj, slice(j, j + 1), None), (mlp.up_proj, slice(j, j + 1), None), (mlp.down_proj, None, slice(j, j + 1))]
                          for j in range(48)]),
        ):  # fmt: skip
            scores = []
            for members in slices:
                score = 0.0
                for linear, rows, columns in members:
                    part = element(linear.weight)
                    part = part[rows] if rows is not None else part[:, columns].T  # a line is a row or a column
                    score += sum(abs(line.sum().item()) for line in part)
                scores.append(score)
            found[i, family] = torch.tensor(scores)
    return found


@pytest.mark.parametrize("order, kv_heads", [("first", 2), ("second", 4), ("hessian", 2), ("vector", 4), ("l2", 2)])
def test_llm_pruner_removes_the_least_important_groups(order, kv_heads):
    """A quarter or half of the groups of the middle layer, whole KV groups under GQA, biases with them."""
    model = small_model(kv_heads, layers=3, bias=kv_heads == 2)
    ratio = 0.5 if kv_heads == 2 else 0.25
    batches = [*small_batches(), torch.arange(14).view(2, 7)]  # of different lengths
    scores = importances_by_hand(model, batches, order)
    gradient, square = lp.gradients(model, batches, squares=True)
    for i, block in enumerate(model.layers):
        for family, members in lp.groups(block).items():
            torch.testing.assert_close(lp.importance(members, order, gradient, square), scores[i, family], rtol=1e-3, atol=1e-6)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    pruned = ref.llm_pruner(model, batches, ratio=ratio, order=order)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    for i, (dense, block) in enumerate(zip(model.layers, pruned.layers)):
        for family, members in lp.groups(block).items():
            count = {"heads": kv_heads, "channels": 48}[family]
            keep = scores[i, family].argsort(descending=True)[: round(count * (1 - ratio)) if i == 1 else count].sort().values
            for (linear, dim, size), (whole, _, _) in zip(members, lp.groups(dense)[family]):
                want = whole.weight.unflatten(dim, (count, size)).index_select(dim, keep).flatten(dim, dim + 1)
                assert torch.equal(linear.weight, want)
                assert (linear.out_features, linear.in_features) == linear.weight.shape
                if linear.bias is not None and dim == 0:
                    assert torch.equal(linear.bias, whole.bias.view(count, size)[keep].flatten())
    assert pruned(batches[0]).isfinite().all()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_importance_is_summed_in_fp32(dtype):
    """Of a model in 16 bits: its gradients, added up in fp64 here; squares of small ones would be 0 in fp16."""
    model, batches = small_model(layers=3).to(dtype), small_batches()
    weights = [x for block in model.layers for x in block.parameters() if x.dim() == 2]
    found = [torch.autograd.grad(1e-3 * lp.loss_of(model, row[None]), weights) for ids in batches for row in ids]
    with pytest.MonkeyPatch.context() as patch:
        loss_of = lp.loss_of
        patch.setattr(lp, "loss_of", lambda *given: 1e-3 * loss_of(*given))
        gradient, square = lp.gradients(model, batches, squares=True)
    for w, *grads in zip(weights, *found):
        g = torch.stack(grads).double()
        torch.testing.assert_close(square[w].double(), g.square().mean(0), rtol=1e-5, atol=1e-20)
    for members in lp.groups(model.layers[1]).values():
        score = lp.importance(members, "hessian", gradient, square)
        assert score.dtype == F32
        want = sum(
            (w.double() ** 2 * square[w]).sum(1 - dim).view(-1, size).sum(1)
            for w, dim, size in ((linear.weight, dim, size) for linear, dim, size in members)
        )
        torch.testing.assert_close(score.double(), want, rtol=1e-5, atol=0)
        assert (score > 0).all()


def test_llm_pruner_needs_no_gradients_switched_on():
    model, batches = small_model(layers=3), small_batches()
    want = ref.llm_pruner(model, batches, ratio=0.4)
    with torch.no_grad():
        got = ref.llm_pruner(model, batches, ratio=0.4)
    frozen = ref.llm_pruner(model.requires_grad_(False), batches, ratio=0.4)
    for a, b, c in zip(want.parameters(), got.parameters(), frozen.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_random_pruning_is_seeded_and_counts_as_the_official_code():
    model = small_model(4, layers=3)
    same, again, other = (ref.llm_pruner(model, None, ratio=0.3, order="random", seed=s) for s in (0, 0, 1))
    assert torch.equal(same.layers[1].mlp.up_proj.weight, again.layers[1].mlp.up_proj.weight)
    assert not torch.equal(same.layers[1].mlp.up_proj.weight, other.layers[1].mlp.up_proj.weight)
    # 32 rows - int(32 * 0.7) = 10 rows: one head of 8 goes; 48 - int(48 * 0.7) = 15 channels go.
    assert lp.widths(same) == [[32, 32, 48], [24, 24, 33], [32, 32, 48]]
    assert lp.widths(ref.llm_pruner(model, None, ratio=0.99, order="l2"))[1] == [8, 8, 1]  # one group stays


def test_bad_llm_pruner_is_named():
    model, batches = small_model(layers=3), small_batches()
    least = ref.llm_pruner(model, [batches[0][:1, :2]], ratio=0.5, layers=[0])  # the least that is not bad
    assert lp.widths(least) == [[16, 8, 24], [32, 16, 48], [32, 16, 48]]
    for name, given, options in (
        ("ratio", (model, batches), dict(ratio=1.0)), ("ratio", (model, batches), dict(ratio="1")), ("order", (model, batches), dict(order="third")),
        ("batches", (model, None), {}), ("batches", (model, [torch.zeros(3, 1).long()]), {}), ("batches", (model, [torch.zeros(3)]), {}),
        ("layers", (small_model(), batches), {}), ("layers", (model, batches), dict(layers=[3])),
        ("layers", (model, batches), dict(layers=[1, 1])), ("layers", (model, None), dict(layers=[1, 1], order="l2")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^{name}.*got .* expected "):
            ref.llm_pruner(*given, **({"ratio": 0.5} | options))


def test_a_narrower_model_is_saved_and_read_back(tmp_path):
    pruned = ref.llm_pruner(small_model(layers=3, bias=True), None, ratio=0.5, order="l2")
    lp.save(pruned, tmp_path)
    back = lp.load(tmp_path)
    ids = small_batches()[0]
    assert torch.equal(back(ids), pruned(ids))
    assert back.lm_head.weight is back.embed_tokens.weight
    assert lp.widths(back) == lp.widths(pruned) == [[32, 16, 48], [16, 8, 24], [32, 16, 48]]
    with pytest.raises(ValueError, match=r"layers.1.*shape"):
        Llama.from_pretrained(tmp_path)
    outer = [32, 16, 48]
    for bad in ([16, 6, 24], [24, 8, 24], [16, 8], [16, 8, "24"], [16, 8, 24.0], [-16, -8, 24], 3):
        (tmp_path / "widths.json").write_text(json.dumps([outer, bad, outer]))
        with pytest.raises(ValueError, match=r"widths.json: widths"):
            lp.load(tmp_path)
    for bad in ("null", json.dumps([outer, outer]), "[[32, 16"):
        (tmp_path / "widths.json").write_text(bad)
        with pytest.raises(ValueError, match=r"widths.json: "):
            lp.load(tmp_path)


def test_recovery_starts_from_the_pruned_model_and_ends_dense():
    model = ref.llm_pruner(small_model(layers=3), None, ratio=0.5, order="l2")
    rows, names = torch.from_numpy(np.random.default_rng(3).integers(0, 5, (40, 16))), list(model.state_dict())
    untouched, before, losses = model.embed_tokens.weight.clone(), lp.loss_of(model, rows).item(), []
    options = dict(batch=8, rank=2, lr=1e-2)
    assert lp.loss_of(ref.recover(model, rows, steps=0, **options), rows).item() == before
    tuned = ref.recover(model, rows, steps=30, on_step=lambda step, loss: losses.append(loss), **options)
    assert list(tuned.state_dict()) == names
    assert torch.equal(tuned.embed_tokens.weight, untouched)
    # Merged: the dense model has the loss that the additions had reached.
    assert lp.loss_of(tuned, rows).item() < before - 0.2
    assert abs(lp.loss_of(tuned, rows).item() - losses[-1]) < 0.2
    for bad in (rows[0], rows[:0], rows[:, :1]):
        with pytest.raises(ValueError, match=r"^rows"):
            ref.recover(model, bad, steps=1)


def test_recovery_hangs_on_its_seed_alone():
    model, rows = small_model(layers=3), small_batches()[0]
    torch.manual_seed(1)
    first, again, other = (ref.recover(copy.deepcopy(model), rows, steps=1, seed=s).layers[1].mlp.up_proj.weight for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- the study and the players


def test_planted_layers_show_what_the_methods_are_for():
    """White inputs tell nothing apart; correlated ones are SparseGPT's, unequal sizes are Wanda's; 50 % < 4:8 < 2:4."""
    table = study.planted_table(patterns=("50%", "4:8", "2:4"), rows=96, columns=256, tokens=1024)
    lost = {(r["inputs"], r["pattern"], r["method"]): r["lost"] for r in table}
    row, wanda, sgpt = "magnitude, per row", "Wanda", "SparseGPT"
    for inputs in study.INPUTS:
        for method in (row, wanda, sgpt):
            assert lost[inputs, "50%", method] < lost[inputs, "4:8", method] < lost[inputs, "2:4", method]
    assert abs(lost["white", "50%", wanda] / lost["white", "50%", row] - 1) < 0.01
    assert lost["correlated", "50%", sgpt] < 0.4 * lost["correlated", "50%", wanda]
    assert lost["outliers", "50%", row] > 1.15 * lost["white", "50%", row]
    assert lost["outliers", "50%", wanda] == pytest.approx(lost["white", "50%", wanda], rel=1e-4)  # the function is the same


def test_planted_outliers_change_no_output():
    model, ids = small_model(), small_batches()[0]
    before, weight = model(ids), model.layers[0].mlp.up_proj.weight.clone()
    study.plant_outliers(model, count=3)
    torch.testing.assert_close(model(ids), before, atol=1e-4, rtol=1e-4)
    assert (weight / model.layers[0].mlp.up_proj.weight).abs().amax(0).gt(40).sum() == 3


def test_spread_is_the_norm_without_the_mean():
    x, spread = tensor(5, 30, 4) + torch.arange(4.0), study.InputSpread(4)
    for part in x.split((2, 3)):
        spread.add(part)
    torch.testing.assert_close(spread.value, x.flatten(0, 1).std(0, correction=0))
    dense, pruned = small_model(), ref.prune(small_model(), "wanda", small_batches(), sparsity=0.5, statistic=study.InputSpread, **QUIET)
    assert not torch.equal(pruned.layers[1].mlp.up_proj.weight, ref.prune(dense, "wanda", small_batches(), sparsity=0.5, **QUIET).layers[1].mlp.up_proj.weight)


def test_a_bias_keeps_what_weights_gave_on_average():
    dense, model, batches = small_model(), small_model(), small_batches()
    study.prune_and_mend(model, batches, study.InputSpread, rescale=False, bias=True)
    hidden = [model.embed_tokens(ids) for ids in batches]
    with torch.no_grad():
        for old, block in zip(dense.layers, model.layers):  # each sees what the blocks before it make of the text
            x = torch.cat(hidden).flatten(0, 1)
            x = block.input_layernorm(x)
            before, after = (b.self_attn.q_proj(x) for b in (old, block))
            assert (before - after).abs().max() > 0.1
            torch.testing.assert_close(after.mean(0), before.mean(0), atol=1e-4, rtol=1e-4)
            hidden = [pr.run(model, block, x) for x in hidden]
    plain = study.prune_and_mend(small_model(), batches, study.InputSpread, rescale=False, bias=False)
    assert plain.layers[1].mlp.up_proj.bias is None
    likewise = ref.prune(small_model(), "wanda", batches, sparsity=0.5, statistic=study.InputSpread, **QUIET)
    assert all(map(torch.equal, plain.parameters(), likewise.parameters()))
    size, norm = study.InputSize(4), masks.InputNorm(4)
    size.add(tensor(5, 30, 4)), norm.add(tensor(5, 30, 4))
    torch.testing.assert_close(size.value * 30**0.5, norm.value)


def test_a_rescaled_row_is_as_near_as_a_factor_can_bring_it():
    dense, plain, model, batches = small_model(), small_model(), small_model(), small_batches()
    for pruned, rescale in ((plain, False), (model, True)):
        study.prune_and_mend(pruned, batches, study.InputSize, rescale=rescale, bias=False)
    with torch.no_grad():
        x = dense.layers[0].input_layernorm(torch.cat([dense.embed_tokens(ids) for ids in batches])).flatten(0, 1)
        before, short, after = (m.layers[0].self_attn.k_proj(x) for m in (dense, plain, model))
    factor = after.abs().sum(0) / short.abs().sum(0)
    torch.testing.assert_close(after, short * factor, atol=1e-4, rtol=1e-4)
    assert (factor - 1).abs().max() > 0.01
    what_is_left = before - after  # of a least-squares fit: at a right angle to it
    assert ((what_is_left * after).sum(0).abs() < 1e-4 * before.square().sum(0)).all()


def test_little_calibration_is_no_matter_of_damping():
    """Few tokens: SparseGPT loses more than Wanda on fresh inputs, ten times the damp helps, more text helps more."""
    for seed in range(2):
        table = study.calibration_table(seed)
        for few in (32, 64):
            assert table[few][0.01] > 1.1 * table[few]["Wanda"]
            assert table[few][0.1] < 0.7 * table[few][0.01]
            assert min(table[few][damp] for damp in study.DAMPS) > 1.5 * table[2048][0.01]
        assert table[2048][1.0] > 1.2 * table[2048][0.01]


def test_structural_table_draws_what_an_order_depends_on(monkeypatch):
    calls = []
    monkeypatch.setattr(study, "llm_pruner", lambda model, batches, **options: calls.append((batches, options)) or model)
    monkeypatch.setattr(study, "recover", lambda *given, **options: None)
    monkeypatch.setattr(study.train, "bits_per_byte", lambda *given: 1.0)
    table = study.structural_table(small_model(), None)
    assert [(r["ratio"], r["order"], r["draw"]) for r in table] == [
        (ratio, order, draw) for ratio in study.RATIOS for order in study.ORDERS for draw in range(1 if order == "l2" else 3)
    ]
    assert [r["order"] for r in table if r["after"]] == list(study.ORDERS)
    first = [torch.cat(batches) for batches, options in calls if (options["order"], options["ratio"]) == ("first", 0.5)]
    assert [x.shape for x in first] == [(16, 128)] * 3
    assert len({tuple(row.tolist()) for x in first for row in x}) == 48  # no sequence twice
    assert [options["seed"] for _, options in calls if options["order"] == "random"] == [0, 1, 2] * 2


def test_planted_scales_fool_l2_and_no_taylor_order():
    model, ids = small_model(2, layers=3, bias=True), small_batches()[0]
    planted = study.plant_scales(small_model(2, layers=3, bias=True))
    torch.testing.assert_close(planted(ids), model(ids), atol=1e-4, rtol=1e-4)
    for order, fooled in (("first", False), ("second", False), ("l2", True)):
        a, b = (ref.llm_pruner(one, small_batches(), ratio=0.5, order=order)(ids) for one in (model, planted))
        assert torch.allclose(a, b, atol=1e-3) is not fooled, order


def test_sweep_player_shows_a_run():
    w, seen = players.sweep()
    assert len(seen) == w.shape[1] == 8
    for j, (now, keep, _) in enumerate(seen):
        assert torch.equal(now[:, : j + 1] == 0, ~keep[:, : j + 1])
        before = seen[j - 1][0] if j else w
        assert torch.equal(now[:, :j], before[:, :j])  # nothing to the left moves
        moved = (now[:, j + 1 :] != before[:, j + 1 :]).any(1)
        assert not (moved & keep[:, j]).any()  # only rows that lost a weight
    x = players.small_layer()[1]
    hessian = ref.Hessian(8)
    hessian.add(x)
    assert torch.equal(seen[-1][0], ref.sparsegpt(w, hessian.value, sparsity=0.5)[0])
    assert "column" in players.sweep_player().html.lower()


def test_wanda_player_tells_the_rules_apart():
    text = {rule: players.wanda_player(norms=(1, 16)).html.count(rule) for rule in players.RULES}
    assert all(text.values())
    w, norm = players.uneven_rows(), torch.ones(8)
    norm[2] = 16
    kept = {rule: players.choose(w, norm, rule) for rule in players.RULES}
    assert kept["Wanda"][:, 2].all()
    assert not kept["magnitude, per row"][:, 2].all()
    assert (kept["magnitude, per row"].sum(1) == 4).all()
    assert kept["magnitude, per layer"].sum() == 16
    assert not kept["magnitude, per layer"][0].any()


def test_pack_player_ends_with_the_kernels_row(device):
    shown = players.pack_player(kp.matmul_24, device)
    assert "10011100" not in shown.text  # the frame in print is the last
    kept = {"0.90", "-1.20", "1.50", "-0.70"}
    assert all(x in shown.html for x in kept)
    broken = players.pack_player(lambda x, values, meta: kp.matmul_24(x, values, meta) * 0, device)
    assert broken.html != shown.html


def test_live_cells(device):
    words = players.try_pattern(kp.wanda_mask, 0.5, 10, device)
    lost = [float(word.rstrip("%")) for word in words.split() if word.endswith("%") and word != "50%"]
    assert lost[0] > 2 * lost[1]
    assert players.factor_error(64, 8, 0.0).startswith("refused: hessian")
    assert players.factor_error(64, 8, 0.01).startswith("smallest U_jj")


def test_bytes_of_the_cases():
    assert ref.sparse_bytes(4096, 4096) == 0.5625 * 2 * 4096 * 4096
    case = {case.name: case for case in ref.cases()}["2:4 O M=1"]
    inputs = {case.name: case for case in ref.cases(tiny=True)}["2:4 O M=1"].make(torch.Generator().manual_seed(0), "cpu")
    assert inputs["values"].nbytes + inputs["meta"].nbytes == ref.sparse_bytes(32, 128)
    assert case.bytes == ref.sparse_bytes(4096, 4096) + 2 * 2 * 4096
