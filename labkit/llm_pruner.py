"""LLM-Pruner (Ma, Fang & Wang, NeurIPS 2023, arXiv 2305.11627): remove whole heads and channels.

What is removed leaves a smaller dense model, so no kernel has to know of it. But a channel cannot go alone: its row in
gate_proj and up_proj and its column in down_proj only have a meaning together. Such a group is scored and removed as
one. The loss after removal is restored by tuning low-rank additions (LoRA), which are then merged into the weights.
"""

import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from labkit import args, checkpoint
from labkit.model import Config, Llama

ORDERS = ("first", "second", "hessian", "vector", "l2", "random")


def groups(block):
    """The families of coupled rows (dim 0) and columns (dim 1) of a block: {name: [(linear, dim, size a group)]}.

    Group i owns entries i * size to (i + 1) * size of each member. A head's group is one KV head with all the query
    heads that read it: with GQA none of them can go without the others.
    """
    a, mlp = block.self_attn, block.mlp
    shared = a.q_proj.weight.shape[0] // a.k_proj.weight.shape[0]  # query heads a KV head
    heads = [(a.q_proj, 0, shared * a.head_dim), (a.k_proj, 0, a.head_dim), (a.v_proj, 0, a.head_dim)]
    return {
        "heads": [*heads, (a.o_proj, 1, shared * a.head_dim)],
        "channels": [(mlp.gate_proj, 0, 1), (mlp.up_proj, 0, 1), (mlp.down_proj, 1, 1)],
    }


def loss_of(model, ids):
    """Mean next-token cross-entropy of ids [B, T], every sequence beginning with BOS if the model has one."""
    return F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten().long())


def gradients(model, batches, squares):
    """Of the loss over all batches: {weight: gradient}, and {weight: mean over sequences of its square} if squares.

    Summed in fp32 (fp64 for fp64 weights): in fp16 the squares would be 0, in bf16 few sums differ.
    """
    tokens = sum(ids[:, 1:].numel() for ids in batches)
    sequences = sum(len(ids) for ids in batches)
    weights = [x for block in model.layers for x in block.parameters() if x.dim() == 2]
    mean = [torch.zeros_like(x, dtype=wide(x)) for x in weights]
    mean_square = [torch.zeros_like(x) for x in mean] if squares else []
    for ids in batches:
        for part in ids.split(1) if squares else [ids]:
            found = [g.to(wide(g)) for g in torch.autograd.grad(loss_of(model, part), weights)]
            torch._foreach_add_(mean, found, alpha=part[:, 1:].numel() / tokens)
            if squares:
                torch._foreach_addcmul_(mean_square, found, found, value=1 / sequences)
    return dict(zip(weights, mean)), dict(zip(weights, mean_square))


def wide(x):
    """The dtype in which many numbers like those of x are added up."""
    return torch.promote_types(x.dtype, torch.float32)


def importance(members, order, gradient=None, square=None, generator=None):
    """The score of every group of a family [count] (paper: section 3.2); the smallest scores are removed.

    first: sum of |w g|. second: sum of |w g - w^2 h / 2|, h the mean squared gradient (the diagonal of the Fisher
    matrix). hessian: sum of w^2 h, the second-order term alone. vector: |sum of w g| of each row or column. l2: sum of
    w^2. random: as it says. In fp32 (fp64 for fp64 weights).
    """
    linear, dim, size = members[0]
    if order == "random":
        return torch.rand(linear.weight.shape[dim] // size, generator=generator)
    total = 0
    for linear, dim, size in members:
        w = linear.weight.detach().to(wide(linear.weight))
        if order == "l2":
            salience = w**2
        elif order == "hessian":
            salience = w**2 * square[linear.weight]
        else:
            salience = w * gradient[linear.weight]
            if order == "second":
                salience = salience - 0.5 * w**2 * square[linear.weight]
        rows = salience.sum(1 - dim).abs() if order == "vector" else salience.abs().sum(1 - dim)
        total = total + rows.view(-1, size).sum(1)
    return total


def remove(members, keep):
    """Cut every member to the groups in keep (indices, in order): weights, and biases along rows."""
    for linear, dim, size in members:
        at = (keep[:, None] * size + torch.arange(size, device=keep.device)).flatten().to(linear.weight.device)
        linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, at))
        if dim == 0 and linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[at])
        linear.out_features, linear.in_features = linear.weight.shape


def num_kept(members, ratio):
    """How many groups stay: rows are counted as the official code does, C - int(C * (1 - ratio)) go; one stays."""
    linear, dim, size = members[0]
    rows = linear.weight.shape[dim]
    return max(1, (rows - (rows - int(rows * (1 - ratio))) // size * size) // size)


def llm_pruner(model, batches, *, ratio, order="first", layers=None, seed=0):
    """A copy of the model with the least important heads and MLP channels removed: smaller, dense, a little worse.

    model: a `labkit.model.Llama`; it is left as it is. batches: list of ids [B, T], T >= 2, whose loss is
    differentiated. ratio: share of the groups that goes in each pruned layer. order: "first" or "second" order Taylor
    expansion of the loss; "hessian", "vector"; "l2" and "random" are the baselines, and need no batches; see
    `importance`. layers: which ones are pruned; default all but the first and the last. seed: for "random".

    The config stays that of the whole model, since its layers now differ: head counts are read off the weights, and
    `save` and `load` keep them. Raises ValueError naming the argument.
    """
    args.share("ratio", ratio, below_one=True)
    args.expect(order in ORDERS, "order", repr(order), " or ".join(map(repr, ORDERS)))
    count = len(model.layers)
    layers = range(1, count - 1) if layers is None else layers
    ok = len(set(layers)) == len(layers) > 0 and all(0 <= i < count for i in layers)
    args.expect(ok, "layers", list(layers), f"some of the model's {count}, each once; default: all but first and last")
    batches = list(batches or [])
    if order not in ("l2", "random"):
        args.expect(len(batches) > 0, "batches", "none", "at least one, to differentiate the loss of")
        for ids in batches:
            args.tensor("batches", ids, ("batch", "len"), dtypes=(torch.int64, torch.int32))
            args.expect(ids.shape[0] >= 1 and ids.shape[1] >= 2, "batches", tuple(ids.shape), "[>= 1, >= 2]")
    model = copy.deepcopy(model)
    gradient = square = None
    if order not in ("l2", "random"):
        model.requires_grad_(True)
        with torch.enable_grad():  # who prunes often does so under no_grad
            gradient, square = gradients(model, batches, order in ("second", "hessian"))
    generator = torch.Generator().manual_seed(seed)
    for i in layers:
        for members in groups(model.layers[i]).values():
            score = importance(members, order, gradient, square, generator)
            keep = score.argsort(descending=True, stable=True)[: num_kept(members, ratio)]
            remove(members, keep.sort().values)
    return model


def widths(model):
    """[query rows, KV rows, MLP channels] of every layer."""
    layers = [(x.self_attn.q_proj, x.self_attn.k_proj, x.mlp.gate_proj) for x in model.layers]
    return [[linear.weight.shape[0] for linear in layer] for layer in layers]


def save(model, path):
    """Write a model whose layers differ in width: the checkpoint files, and widths.json. `load` reads them back.

    `Llama.from_pretrained` refuses such a folder, and so does `transformers`: their config has one width for all.
    """
    state = model.state_dict()
    checkpoint.write(Path(path), model.config, state, {name: list(x.shape) for name, x in state.items()})
    (Path(path) / "widths.json").write_text(json.dumps(widths(model)) + "\n")


def load(path, *, dtype=torch.float32, device="cpu"):
    """Read what `save` wrote. Raises ValueError or OSError naming the file and what is wrong."""
    folder, file = Path(path), Path(path) / "widths.json"
    with torch.device("meta"):
        model = Llama(Config(**checkpoint.read_config(folder / "config.json")))
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(f"{file}: no valid JSON ({error})") from error
    fits = isinstance(found, list) and len(found) == len(model.layers) and all(map(_is_row, found))
    args.expect(fits, f"{file}: widths", found, f"three counts for each of {len(model.layers)} layers")
    for block, (q_rows, kv_rows, channels) in zip(model.layers, found):
        head_dim, rows = block.self_attn.head_dim, block.self_attn.k_proj.weight.shape[0]
        shared = block.self_attn.q_proj.weight.shape[0] // rows
        fits = q_rows == shared * kv_rows and kv_rows % head_dim == 0
        args.expect(fits, f"{file}: widths", [q_rows, kv_rows], f"whole heads of {head_dim}, {shared} a KV head")
        for members, kept in zip(groups(block).values(), (kv_rows // head_dim, channels)):
            remove(members, torch.arange(kept, device="cpu"))
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    tied = model.config.tie_word_embeddings
    model.load_state_dict(checkpoint.read_tensors(folder, shapes, tied, dtype, device), assign=True)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def _is_row(row):
    return isinstance(row, list) and len(row) == 3 and all(isinstance(n, int) and n >= 1 for n in row)


# ---- recovery


class LoRA(nn.Module):
    """y = linear(x) + alpha / rank * B A x, with the linear frozen (Hu et al. 2022). B starts at 0: nothing changes."""

    def __init__(self, linear, rank, alpha, generator):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        out, columns = linear.weight.shape
        bound = columns**-0.5
        a = torch.empty(rank, columns, device="cpu").uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(a.to(linear.weight))
        self.b = nn.Parameter(torch.zeros(out, rank).to(linear.weight))

    def forward(self, x):
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.a), self.b)

    def merged(self):
        """The linear with B A added to its weight: what is left of LoRA when the tuning is over."""
        with torch.no_grad():
            self.linear.weight += self.scale * self.b @ self.a
        return self.linear


def _linears(model):
    """[(parent module, name, linear)] of all blocks."""
    modules = [module for block in model.layers for module in block.modules()]
    return [(m, name, x) for m in modules for name, x in m.named_children() if isinstance(x, nn.Linear)]


def recover(model, rows, *, steps, batch=16, rank=8, alpha=16.0, lr=1e-3, seed=0, on_step=None):
    """Tune a pruned model on rows of text by LoRA on all its linears, merge, and return it (changed in place).

    rows [n, T] ids, every row beginning as the model's texts do; `batch` of them a step, drawn as seed says; AdamW, the
    rate falling linearly to 0. on_step(step, loss) is called after each. Embeddings, norms and head stay as they are.
    The paper tunes with rank 8 for two epochs of 50,000 instructions. Raises ValueError naming the argument.
    """
    args.tensor("rows", rows, ("n", "len"), dtypes=(torch.int64, torch.int32))
    args.expect(rows.shape[0] >= 1 and rows.shape[1] >= 2, "rows", tuple(rows.shape), "[>= 1, >= 2]")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    wrapped = _linears(model)
    for parent, name, linear in wrapped:
        setattr(parent, name, LoRA(linear, rank, alpha, generator))
    tuned = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = loss_of(model, rows[torch.randint(len(rows), (batch,), generator=generator)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_step:
            on_step(step, loss.item())
    for parent, name, _ in wrapped:
        setattr(parent, name, getattr(parent, name).merged())
    return model.requires_grad_(True)
