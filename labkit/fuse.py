"""`fuse`: find known subgraphs in a module and put one fused operation in the place of each.

1. Trace: torch.fx, and torch.export where fx cannot. The trace is run beside the module on the example inputs and has
   to give the same bits, so a trace that lost an aliasing or a branch is refused and never fused.
2. Count: the same run tells every node's shapes, and how many kernels it launches and bytes it moves.
3. Replace: each rule below looks at one node and either does not know it, or refuses with a reason, or replaces.

The rules see through spellings: products and quotients are taken apart into factors, casts between float types and
dropout that is off are looked through. What no rule knows stays as it is.
"""

import inspect
import math
import operator

import torch
from torch import nn

from labkit.args import FLOATS
from labkit.fuse_attention import AttentionRules
from labkit.fx_graph import (
    CASTS,
    Counting,
    Guard,
    Refused,
    arg,
    arguments,
    attribute,
    buffers_kept,
    differences,
    exact,
    is_node,
    is_number,
    is_plain,
    is_transparent,
    name_of,
    run,
    shape,
    signature,
    trace,
    tree_leaves,
)

RULES = ("rmsnorm", "add_rmsnorm", "swiglu", "bias_gelu", "attention", "rope", "siblings")


class _Pass(AttentionRules):
    def no_op_cast(self, node):
        """x.float() of an fp32 tensor is x itself."""
        if name_of(node) in CASTS and is_transparent(node) and node.meta["dtype"] == node.args[0].meta["dtype"]:
            if node.meta["launches"] == 0 and not any(node in user.meta["writes"] for user in node.users):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)
        return False

    def rmsnorm(self, root):
        """x * rsqrt(mean(x^2) + eps) * weight, or F.rms_norm."""
        found = self._norm(root)
        if found is None:
            return False
        x, w, eps, root, _ = found
        self.hoist(w)
        with self.graph.inserting_before(root):
            new, _ = self.op("rmsnorm", (x, w), [(shape(x), x.meta["dtype"])], eps=eps)
        self.replace("rmsnorm", [new], [(root, new)])
        return True

    def _norm(self, root):
        """(x, weight, eps, the last node, all nodes) of an RMSNorm that may go, or None if it is none."""
        if name_of(root) == "rms_norm":
            x, w, eps = arg(root, 0, "input"), arg(root, 2, "weight"), arg(root, 3, "eps")
            if w is None or not is_number(eps):
                return None
            inside = {root}
        elif name_of(root) in ("mul", "div"):
            inside = set()
            parts = self.factors(root, inside)
            found = self._inverse_rms(parts) if len(parts) == 3 else None
            if found is None:
                return None
            x, w, eps, inner = found
            inside |= inner
        else:
            return None
        x, w = self.strip(x, inside), self.strip(w, inside)
        root = self._last_cast(root, inside, x.meta["dtype"])
        if not is_node(w) or shape(w) != shape(x)[-1:] or w.meta["dtype"] != x.meta["dtype"]:
            raise Refused("the weight is not one row in the input's dtype")
        self._check_output(root, x)
        self.closed(inside, [root])
        self.still(inside)
        return x, w, float(eps), root, inside

    def _inverse_rms(self, parts):
        """x, w, eps and the nodes of 1 / sqrt(mean(x^2) + eps), if it is one of three factors with x and a weight."""
        for i, (factor, sign) in enumerate(parts):
            inner = set()
            value = self._root_mean_square(factor, sign, inner)
            if value is None:
                continue
            x, eps = value
            rest = [part for j, part in enumerate(parts) if j != i]
            for (a, sign_a), (w, sign_w) in (rest, rest[::-1]):
                if sign_a == sign_w == 1 and is_node(a) and self.strip(a, set()) is self.strip(x, set()):
                    return a, w, eps, inner
        return None

    def _root_mean_square(self, factor, sign, inside):
        """(x, eps) if factor ** sign is 1 / sqrt(mean(x^2) + eps)."""
        node = self.strip(factor, inside) if is_node(factor) else factor
        if not is_node(node):
            return None
        name = name_of(node)
        if sign == 1 and (name == "rsqrt" or (name == "pow" and arg(node, 1, "exponent") == -0.5)):
            inside.add(node)
        elif sign == 1 and name == "reciprocal" and name_of(arg(node, 0, "input")) == "sqrt":
            inside |= {node, node := arg(node, 0, "input")}
        elif sign == -1 and (name == "sqrt" or (name == "pow" and arg(node, 1, "exponent") == 0.5)):
            inside.add(node)
        else:
            return None
        total = self.strip(arg(node, 0, "input"), inside)
        for mean, eps in self.two(total, "add"):
            if is_number(eps) and is_node(mean):
                inside.add(total)
                square = self._mean(self.strip(mean, inside), inside)
                x = self._squared(square, inside) if square is not None else None
                return None if x is None else (x, eps)
        return None

    def _mean(self, node, inside):
        """What is averaged over the last dimension, kept: mean(-1, keepdim) or sum(-1, keepdim) / width."""
        width = None
        if name_of(node) in ("div", "mul"):
            number = arg(node, 1, "other")
            if not is_number(number) or not is_plain(node):
                return None
            inside.add(node)
            width, node = number if name_of(node) == "div" else 1 / number, self.strip(arg(node, 0, "input"), inside)
        if name_of(node) != ("mean" if width is None else "sum"):
            return None
        source, dim = arg(node, 0, "input"), arg(node, 1, "dim", "axis")
        dims = [dim] if isinstance(dim, int) else list(dim or ())
        size = shape(source)
        if len(dims) != 1 or dims[0] % len(size) != len(size) - 1 or not arg(node, 2, "keepdim", "keepdims"):
            return None
        if width is not None and width != size[-1]:
            return None
        inside.add(node)
        return self.strip(source, inside)

    def _squared(self, node, inside):
        name = name_of(node)
        x, y = arg(node, 0, "input"), arg(node, 1, "exponent", "other")
        if name == "square" or (name == "pow" and y == 2) or (name == "mul" and x is y):
            inside.add(node)
            return self.strip(x, inside)
        return None

    def _last_cast(self, root, inside, dtype):
        """The cast back to x's dtype, if that is what follows the product."""
        users = list(root.users)
        while root.meta["dtype"] != dtype and len(users) == 1 and is_transparent(users[0]):
            root, users = users[0], list(users[0].users)
            inside.add(root)
        return root

    def _check_output(self, root, x):
        if shape(root) != shape(x) or root.meta["dtype"] != x.meta["dtype"] or x.meta["dtype"] not in FLOATS:
            got = f"{list(shape(root) or ())} {root.meta['dtype']}"
            raise Refused(f"it gives {got} for an input {list(shape(x))} {x.meta['dtype']}")

    def add_rmsnorm(self, norm):
        """A residual add whose sum is normalised: both come out of one kernel."""
        if "rmsnorm" in self.functions:  # the rule above was here
            known = norm.target is self.functions["rmsnorm"]
            found = (*norm.args, norm.kwargs["eps"], norm, {norm}) if known else None
        else:
            found = self._norm(norm)
        if found is None or name_of(found[0]) != "add":
            return False
        s, w, eps, norm, inside = found
        (a, b), *_ = self.two(s, "add") or [(None, None)]
        same = all(is_node(x) and shape(x) == shape(s) and x.meta["dtype"] == s.meta["dtype"] for x in (a, b))
        if not same:
            raise Refused("the add is not of two tensors of one shape and dtype")
        self.still(inside | {s})
        self.hoist(w)
        if self.order()[w] > self.order()[s]:
            raise Refused("the weight is computed after the add")
        meta = (shape(s), s.meta["dtype"])
        with self.graph.inserting_after(s):
            marker = self.graph.call_function(operator.getitem, (s, 0))  # where the new nodes go
        with self.graph.inserting_before(marker):
            new, (y, total) = self.op("add_rmsnorm", (*self.paired(a, b), w), [meta, meta], eps=eps)
        self.graph.erase_node(marker)
        self.replace("add_rmsnorm", [new], [(norm, y), (s, total)])
        return True

    def swiglu(self, root):
        """silu(gate) * up, with silu also spelled gate * sigmoid(gate)."""
        if name_of(root) != "mul":
            return False
        inside = set()
        parts = self.factors(root, inside)
        nodes = [self.strip(f, inside) if is_node(f) else f for f, sign in parts if sign == 1]
        if len(nodes) != len(parts) or not all(map(is_node, nodes)):
            return False
        gate = None
        if len(nodes) == 2:
            act = next((n for n in nodes if name_of(n) == "silu"), None)
            if act is not None:
                gate, up = self.strip(arg(act, 0, "input"), inside), nodes[1 - nodes.index(act)]
        elif len(nodes) == 3:
            act = next((n for n in nodes if name_of(n) == "sigmoid"), None)
            rest = [n for n in nodes if n is not act]
            source = self.strip(arg(act, 0, "input"), inside) if act is not None else None
            if source in rest:
                gate, up = source, rest[1 - rest.index(source)]
        if gate is None:
            return False
        inside.add(act)
        root = self._last_cast(root, inside, gate.meta["dtype"])
        if shape(up) != shape(gate) or up.meta["dtype"] != gate.meta["dtype"]:
            raise Refused("gate and up differ in shape or dtype")
        self._check_output(root, gate)
        self.closed(inside, [root])
        self.still(inside)
        with self.graph.inserting_before(root):
            new, _ = self.op("swiglu", self.paired(gate, up), [(shape(gate), gate.meta["dtype"])])
        self.replace("swiglu", [new], [(root, new)])
        return True

    def bias_gelu(self, root):
        """gelu(x + bias), the add standing alone (a bias inside a linear layer costs no launch)."""
        if name_of(root) != "gelu" or name_of(arg(root, 0, "input")) != "add":
            return False
        total = arg(root, 0, "input")
        for x, bias in self.two(total, "add"):
            if is_node(x) and is_node(bias) and shape(x) != shape(bias) == shape(x)[-1:]:
                if bias.meta["dtype"] != x.meta["dtype"]:
                    raise Refused("the bias has another dtype")
                inside = {root, total}
                self._check_output(root, x)
                self.closed(inside, [root])
                self.still(inside)
                kind = arg(root, 1, "approximate", default="none")
                with self.graph.inserting_before(root):
                    new, _ = self.op("bias_gelu", (x, bias), [(shape(x), x.meta["dtype"])], approximate=kind)
                self.replace("bias_gelu", [new], [(root, new)])
                return True
        return False

    def siblings(self, node):
        """Linear layers of the same input, such as q, k and v: one product with the weights on top of each other."""
        if name_of(node) != "linear":
            return False
        x, order = arg(node, 0, "input"), self.order()
        group = [n for n in x.users if name_of(n) == "linear" and arg(n, 0, "input") is x]
        group = sorted((n for n in group if len(shape(arg(n, 1, "weight"))) == 2), key=order.get)
        weights, biases = [arg(n, 1, "weight") for n in group], [arg(n, 2, "bias") for n in group]
        attributes = [n for n in weights + biases if is_node(n)]
        if len(group) < 2 or any(n.op != "get_attr" for n in attributes):
            return False
        if len({n.meta["dtype"] for n in attributes}) > 1:
            raise Refused("the weights differ in dtype")
        for stack in (weights, biases):
            if len({attribute(self.gm, n.target).requires_grad for n in stack if is_node(n)}) > 1:
                raise Refused("some are frozen, others are trained")
        self.still(set(group))
        self.unwritten(group + attributes)
        rows = [shape(w)[0] for w in weights]
        dtype = group[0].meta["dtype"]
        lead = shape(x)[:-1]
        self.hoist(x)
        with self.graph.inserting_before(group[0]):
            weight = self._stacked(weights, rows)
            bias = self._stacked(biases, rows) if any(is_node(b) for b in biases) else None
            new = self.call(nn.functional.linear, (x, weight, bias), ((*lead, sum(rows)), dtype))
            parts = self.call(torch.split, (new, rows), (None, None), dim=-1)
            pieces = [self.call(operator.getitem, (parts, i), ((*lead, n), dtype)) for i, n in enumerate(rows)]
        elements = sum(math.prod(shape(n)) for n in (new, *new.all_input_nodes))
        new.meta |= dict(launches=1, bytes=dtype.itemsize * elements)
        self.replace("one product", [new], list(zip(group, pieces)))
        return True

    def _stacked(self, tensors, rows):
        """A new parameter: weights [N_i, K] (or biases [N_i], 0 where there is none) on top of each other."""
        values = [attribute(self.gm, t.target) if is_node(t) else None for t in tensors]
        some = next(v for v in values if v is not None)
        values = [some.new_zeros(n, *some.shape[1:]) if v is None else v.detach() for v, n in zip(values, rows)]
        name = "stacked_" + next(t.target for t in tensors if is_node(t)).replace(".", "_")
        self.gm.register_parameter(name, nn.Parameter(torch.cat(values), requires_grad=some.requires_grad))
        node = self.graph.get_attr(name)
        stacked = getattr(self.gm, name)
        node.meta = dict(launches=0, bytes=0, fixed=True, writes=(), shape=tuple(stacked.shape), dtype=stacked.dtype)
        return node


def _named(function, name):
    """torch.fx writes code, so what it calls needs a name; an object such as functools.partial has none."""
    if hasattr(function, "__name__"):
        return function

    def call(*arguments, **kwargs):
        return function(*arguments, **kwargs)

    call.__name__ = name
    return call


def fuse(module, example_inputs, *, ops, reference, verbose=True):
    """Put fused operations into a copy of module's graph; the module itself stays as it is.

    example_inputs: its positional arguments. ops: the namespace whose functions replace the subgraphs (rmsnorm,
    add_rmsnorm, swiglu, bias_gelu, attention, rope); a rule whose function it lacks is left out. reference: the
    same functions in plain torch, to count with. verbose: print the report.

    Returns a GraphModule with the module's signature and `.report`. Parameters are shared with the module, except for
    linear layers of one input: their weights are copied on top of each other.

    Fixed are the inputs' dtypes and devices, arguments that are no tensors, how tensors are packed in tuples, lists and
    dictionaries, and (after torch.export, or where a mask was recognised) the shapes: other inputs raise ValueError. So
    do q and k, or k and v, of different batches where rope or attention was put in and the example had only one.

    Left alone: a subgraph in whose midst something writes in place; rope, attention and linear layers if a view of
    their output is written to, since it may become a copy; linear layers of which only some are frozen; a submodule
    with hooks, which is called as it is. The module's own hooks are refused, and any if torch.export has to trace.

    At last both graphs run in fp64, without their casts to narrower types, where each operation has fp64: there their
    floating outputs, and the inputs afterwards, have to agree to 1e-6 of the largest value. Where one cannot run so,
    the report says why they were not compared.

    Raises ValueError if they do not, naming what differs; if the module cannot be traced faithfully, naming both
    tracers' reasons; if example_inputs are not what the module takes.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: got {type(module).__name__}, expected an nn.Module")
    if not isinstance(example_inputs, (tuple, list)):
        raise ValueError(f"example_inputs: got {type(example_inputs).__name__}, expected a tuple of arguments")
    takes = inspect.signature(module.forward)
    inputs = arguments("example_inputs", takes, example_inputs)
    with buffers_kept(module):
        gm, pinned = trace(module, inputs)
        functions = {name: _named(getattr(ops, name), name) for name in RULES if hasattr(ops, name)}
        work = _Pass(gm, functions, pinned)
        work.sweep("cast", work.no_op_cast)
        want, why = exact(gm, inputs, {})
        for rule in RULES:
            if rule == "siblings" or rule in work.functions:
                work.sweep(rule, getattr(work, rule))
        gm.graph.lint()
        gm.delete_all_unused_submodules()
        gm.recompile()
        fused = {function: getattr(reference, name) for name, function in work.functions.items()}
        run(Counting(gm, fused).run, inputs)
        got, why = exact(gm, inputs, fused) if want is not None else (None, why)
        wrong = differences(got, want, len(tree_leaves(inputs))) if got is not None else []
    if wrong:
        rules = ", ".join(dict.fromkeys(step.rule for step in work.report.steps))
        raise ValueError(f"module: got {type(module).__name__}, which {rules} would change: {'; '.join(wrong)}")
    gm.report = work.report
    gm.report.unchecked = why
    gm.report.after = work.rows()
    expected = [signature(x, work.pinned) for x in inputs]
    gm.register_forward_pre_hook(Guard(takes, expected, work.pinned), with_kwargs=True, prepend=True)
    if verbose:
        print(gm.report)
    return gm
