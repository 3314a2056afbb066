"""Graphs of modules: traced faithfully, counted, read through spellings, and edited. What `labkit.fuse` stands on."""

import contextlib
import inspect
import io
import logging
import math
import operator
import textwrap
import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from labkit.args import REFERENCE_FLOATS

# Modules whose forward is traced, so that nn.Linear and F.linear are the same node.
INLINED = (nn.Linear, nn.RMSNorm, nn.SiLU, nn.GELU, nn.Softmax, nn.Dropout, nn.Identity, nn.Sigmoid)
SAME = {  # other names of the same operation
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "bmm": "matmul",
    "mm": "matmul", "_softmax": "softmax", "special_expit": "sigmoid", "swapaxes": "transpose", "swapdims": "transpose",
    "concat": "cat", "concatenate": "cat", "_unsafe_view": "view",
}  # fmt: skip
CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy"}
SHAPES_ONLY = {"size", "dim", "ndimension", "numel", "ones_like", "zeros_like", "full_like", "new_ones", "new_zeros"}
SHAPES_ONLY |= {"new_full", "new_tensor", "shape", "dtype", "device", "ndim"}
VIEW_OR_COPY = {"contiguous", "reshape", "flatten", "ravel"}  # the layout decides


class Refused(Exception):
    """A known subgraph that must stay as it is; the message says why."""


# ---- 1. trace


def _hooked(m):
    return any((m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks))


class _Made(TorchDispatchMode):
    """tensors: those that are made inside, beside views of others. torch.fx keeps them as constants."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, old = func(*args, **(kwargs or {})), _storages((args, kwargs))
        self.tensors += [x for x in _tensors(out) if not old & _storages(x)]
        return out


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return _hooked(module) or (type(module) not in INLINED and super().is_leaf_module(module, name))


def _fx_trace(module, inputs):
    """Arguments that are no tensors become constants, also inside of tuples, lists and dictionaries."""
    if _hooked(module):
        raise ValueError("its hooks would be lost")
    parameters = inspect.signature(module.forward).parameters.values()
    constants = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for p, x in zip(parameters, inputs):
        if not isinstance(x, torch.Tensor):
            constants[p.name] = tree_map(lambda leaf: fx.PH if isinstance(leaf, torch.Tensor) else leaf, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a constant is not checked: `Guard` checks it
        tracer = _Tracer()
        with _Made() as made:
            graph = tracer.trace(module, concrete_args=constants or None)
    if packed := getattr(graph._codegen, "pytree_info", None):  # beside containers, torch.fx writes wrong code for ...
        graph._codegen.pytree_info = packed._replace(orig_args=["self", *packed.orig_args[1:]])  # another name of self
        for node in graph.find_nodes(op="placeholder"):
            node.args = ()  # and for defaults, which `Guard` fills in
    gm = fx.GraphModule(tracer.root, graph, type(module).__name__)
    gm.meta["made"] = made.tensors
    return gm


def _export_trace(module, inputs):
    if any(map(_hooked, module.modules())):
        raise ValueError("hooks would be lost")
    quiet = contextlib.redirect_stderr(io.StringIO())  # its advice on a failure: the error itself is reported
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gm = torch.export.export(module, _clone(inputs)).module()
    finally:
        logging.disable(disabled)
    for node in list(gm.graph.nodes):  # checks of the export itself: `Guard` checks the inputs
        if node.target == "_guards_fn" or "_assert_tensor_metadata" in str(node.target):
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


def _clone(inputs):
    """Each tensor on its own: of one that is given twice, torch.export would make one input."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, tuple(inputs))


def _same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype
        return same and (a.is_meta or bool(((a == b) | ((a != a) & (b != b))).all()))
    return type(a) is type(b) and (a is b or bool(a == b))


def run(function, inputs):
    """All that can be seen of a call: its outputs, and its inputs afterwards."""
    inputs = _clone(inputs)
    devices = {x.device.index for x in _tensors(inputs) if x.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return [*tree_leaves(function(*inputs)), *tree_leaves(inputs)]


@contextlib.contextmanager
def buffers_kept(module):
    """Running the module inside changes no buffer, such as running statistics, for good."""
    kept = [(x, x.clone()) for x in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, before in kept:
                x.copy_(before)


def trace(module, inputs):
    """(GraphModule that does exactly what module does on the inputs, whether it holds for these shapes only)."""
    want, problems = run(module, inputs), []
    for how, tracer in {"torch.fx": _fx_trace, "torch.export": _export_trace}.items():
        try:
            gm = tracer(module, inputs)
            got = run(lambda *x, gm=gm: Counting(gm).run(*x), inputs)
            made = _storages(gm.meta.pop("made", []))
            if any(made & _storages(attribute(gm, n.target)) for n in _written(gm) if n.op == "get_attr"):
                problems.append(f"{how}: a tensor that is made anew in every call would be kept and written to")
                continue
            if len(got) == len(want) and all(map(_same, got, want)):
                return gm, how == "torch.export"
            problems.append(f"{how}: what it traced computes something else than the module")
        except Exception as error:  # a tracer raises whatever the module's own code raises on a proxy
            first = next(iter(str(error).strip().splitlines()), "")
            problems.append(f"{how}: {type(error).__name__}: {first[:150]}")
    raise ValueError(f"module: got {type(module).__name__}, which cannot be traced ({'; '.join(problems)})")


def arguments(name, takes, inputs):
    """All positional arguments of a call, those that are not given by their defaults. takes: the module's signature."""
    try:
        bound = takes.bind(*inputs)
    except TypeError as error:
        raise ValueError(f"{name}: got {len(inputs)}, {error}") from None
    bound.apply_defaults()
    return bound.args


def _written(gm):
    return {node for user in gm.graph.nodes for node in user.meta["writes"]}


@dataclass(frozen=True)
class Guard:
    """Called before the fused module: fills in defaults, and checks what was assumed when the graph was fused."""

    takes: inspect.Signature
    expected: list
    shapes_too: bool

    def __call__(self, module, inputs, keywords):
        if keywords:
            raise ValueError(f"inputs: got {', '.join(keywords)} by name, expected positional arguments")
        inputs = arguments("inputs", self.takes, inputs)
        if len(inputs) != len(self.expected):
            raise ValueError(f"inputs: got {len(inputs)}, expected {len(self.expected)}")
        for i, (x, want) in enumerate(zip(inputs, self.expected)):
            got = signature(x, self.shapes_too)
            if got != want:
                raise ValueError(f"input {i}: got {got}, expected {want}, which it was fused for")
        return inputs, {}


def signature(x, shapes_too):
    """What is fixed of an input: ["torch.float32", "cpu", [2, 3]], or without the shape; no tensor: itself."""

    def fixed(x):
        if not isinstance(x, torch.Tensor):
            return x
        return [str(x.dtype), str(x.device), *([list(x.shape)] if shapes_too else [])]

    return tree_map(fixed, x)


# ---- 2. count


def _tensors(x):
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)]


def _bytes(x):
    """Bytes of a tensor; an expanded dimension counts once."""
    sizes = [n for n, stride in zip(x.shape, x.stride()) if stride] if x.numel() else [0]
    return math.prod(sizes) * x.element_size()


def _storages(x):
    return {tensor.untyped_storage()._cdata for tensor in _tensors(x)}


class _Launches(TorchDispatchMode):
    """Counts what reaches the device: every operation that neither makes a view nor only allocates is one kernel.

    written: the storages that were changed in place.
    """

    def __init__(self):
        super().__init__()
        self.launches, self.bytes, self.written = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [x.name for x in func._schema.arguments if x.alias_info is not None and x.alias_info.is_write]
        given = {x.name: value for x, value in zip(func._schema.arguments, args)} | (kwargs or {})
        self.written |= _storages([given.get(name) for name in names])
        out = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        is_view = not func._schema.is_mutable and bool(_storages(inputs) & _storages(outputs))
        if outputs and not is_view and not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            self.launches += 1
            self.bytes += sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
        return out


class Counting(fx.Interpreter):
    """Runs a graph and notes in every node's meta: shape, dtype, launches, bytes, which of its inputs it writes to, and
    the value if no input decides it.

    fused: {function: its reference}. A fused function counts as one launch, and its reference is run in its place. So
    does torch's own attention on the meta device, where its one-kernel forms do not exist.
    """

    def __init__(self, gm, fused=()):
        super().__init__(gm)
        self.fused = dict(fused)

    def call_function(self, target, arguments, kwargs):
        q = next(iter(_tensors((arguments, kwargs.get("query")))), None)
        if target is nn.functional.scaled_dot_product_attention and q.is_meta:
            self.fused[target] = _empty_attention
        if target not in self.fused:
            return super().call_function(target, arguments, kwargs)
        with torch.utils._python_dispatch._disable_current_modes():
            out = self.fused[target](*arguments, **kwargs)
        self.seen.launches = 1
        self.seen.bytes = sum(map(_bytes, _tensors((arguments, kwargs)) + _tensors(out)))
        return out

    def run_node(self, node):
        memory = {n: _storages(self.env[n]) for n in node.all_input_nodes}
        with _Launches() as self.seen:
            out = super().run_node(node)
        seen = self.seen
        node.meta["writes"] = [n for n, storages in memory.items() if storages & seen.written]
        node.meta |= dict(launches=seen.launches, bytes=seen.bytes, fixed=_is_fixed(node))
        node.meta["shape"] = tuple(out.shape) if isinstance(out, torch.Tensor) else None
        node.meta["dtype"] = out.dtype if isinstance(out, torch.Tensor) else None
        if node.meta["fixed"] and node.op != "get_attr":
            node.meta["value"] = out
        return out


def _empty_attention(query, key, value, *_, **__):
    """Laid out like q, as torch's own do, and as wide as v."""
    outer_first = sorted(range(query.ndim), key=query.stride, reverse=True)
    size = (*query.shape[:-1], value.shape[-1])
    return torch.empty_permuted(size, outer_first, dtype=query.dtype, device=query.device)


def wide(x):
    """Floats in fp64, and fp64 for the name of a float type."""
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


class _Wide(TorchDispatchMode):
    """Operations on floats in fp64, whatever type they ask for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            return func(*args, **(kwargs or {}))
        return tree_map(wide, func(*tree_map(wide, args), **tree_map(wide, kwargs or {})))


class _Exact(fx.Interpreter):
    """Runs a graph in fp64, casts to narrower types included: what it means, without what it rounds."""

    def __init__(self, gm, fused):
        super().__init__(gm)
        self.fused = fused

    def call_function(self, target, arguments, kwargs):
        return super().call_function(self.fused.get(target, target), arguments, kwargs)

    def run_node(self, node):
        return tree_map(wide, super().run_node(node))  # parameters


def exact(gm, inputs, fused):
    """(what `run` tells of a graph in fp64, ""), or (None, why it cannot be computed so). fused: as for `Counting`."""
    try:
        with _Wide():
            return run(_Exact(gm, fused).run, tree_map(wide, inputs)), ""
    except Exception as error:  # whatever an operation raises that has no fp64
        return None, f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:150]}"


def differences(got, want, num_inputs):
    """What differs between two results of `exact`, in words. Only floats: indices may be a toss-up."""
    words = []
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if not isinstance(b, torch.Tensor) or not b.is_floating_point() or b.is_meta:
            continue
        after = i - len(want) + num_inputs
        what = f"output {i}" if after < 0 else f"input {after} afterwards"
        if a.shape != b.shape:
            words.append(f"{what} has shape {list(a.shape)}, expected {list(b.shape)}")
            continue
        error = torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a - b).abs()).nan_to_num(math.inf)
        if b.numel() and error.max() > 1e-6 * b.abs().nan_to_num(0, posinf=0).max():
            words.append(f"{what} differs by up to {float(error.max()):.3g}")
    return words


def _is_fixed(node):
    """Whether the value follows from the inputs' shapes, and not from what is in them (or in a parameter)."""
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    if any(word in name_of(node) for word in ("rand", "normal", "bernoulli", "multinomial", "dropout")):
        return False
    return name_of(node) in SHAPES_ONLY or all(n.meta["fixed"] for n in node.all_input_nodes)


# ---- reading nodes


def name_of(node):
    """The operation's name, whether it is spelled as function, method, operator or ATen overload; "" if not known."""
    if node.op == "call_method":
        name = node.target
    elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.split("::")[1]
    elif node.target is getattr:
        name = node.args[1]
    elif node.op == "call_function":
        module = getattr(node.target, "__module__", None) or "torch"
        name = getattr(node.target, "__name__", "") if module.split(".")[0] in ("torch", "_operator") else ""
    else:
        name = ""
    return SAME.get(name, name)


def arg(node, i, *names, default=None):
    """Argument i, or by one of its names."""
    if i is not None and len(node.args) > i:
        return node.args[i]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def is_node(x):
    return isinstance(x, fx.Node)


def shape(node):
    return node.meta.get("shape")


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def is_plain(node):
    """Neither x + alpha * y nor a quotient that is rounded."""
    return (arg(node, None, "alpha", default=1), arg(node, None, "rounding_mode")) == (1, None)


def is_transparent(node):
    """A cast between float types, or an operation that does nothing."""
    if not is_node(node) or not node.all_input_nodes:
        return False
    name, source = name_of(node), node.args[0] if node.args else None
    if not is_node(source) or shape(node) != shape(source) or shape(node) is None:
        return False
    if name in CASTS:
        return node.meta["dtype"] in REFERENCE_FLOATS and source.meta["dtype"] in REFERENCE_FLOATS
    return name == "dropout" and (arg(node, 1, "p") == 0 or not arg(node, 2, "training", "train", default=True))


# ---- edit


@dataclass
class Step:
    """One replacement: what went, what came."""

    rule: str
    removed: tuple[str, ...]
    added: tuple[str, ...]


@dataclass
class Row:
    """One node that launches something. reads: the nodes among them whose results it reads, through views."""

    node: str
    what: str
    launches: int
    bytes: int
    reads: tuple[str, ...] = ()


@dataclass
class Report:
    """What `fuse` did. before, after: rows in order; steps; left: why known subgraphs were left alone.

    unchecked: why the two graphs were not compared in fp64, if they were not.
    """

    before: list[Row]
    after: list[Row] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)
    unchecked: str = ""

    @staticmethod
    def total(rows):
        """(launches, bytes)."""
        return sum(row.launches for row in rows), sum(row.bytes for row in rows)

    def __str__(self):
        lines = []
        for title, rows in (("before", self.before), ("after", self.after)):
            launches, size = self.total(rows)
            lines.append(f"{title}: {launches} launches, {size:,} bytes")
            counts = Counter()
            for row in rows:
                counts[row.what] += row.launches
            words = ", ".join(f"{n} {what}" for what, n in counts.most_common())
            lines.append(textwrap.fill(words, 84, initial_indent="    ", subsequent_indent="    "))
        rules = Counter(step.rule for step in self.steps)
        lines.append("replaced: " + (", ".join(f"{n} {rule}" for rule, n in rules.items()) or "nothing"))
        lines += [f"left alone: {reason}" for reason in dict.fromkeys(self.left)]
        return "\n".join(lines + ([f"not checked in fp64: {self.unchecked}"] if self.unchecked else []))

    def states(self):
        """The rows before the first step, after the first, and so on: [(rule, rows)]."""
        rows, states = list(self.before), [("as traced", list(self.before))]
        for step in self.steps:
            at = [i for i, row in enumerate(rows) if row.node in step.removed]
            place = at[-1] + 1 if at else len(rows)
            rows[place:place] = [self.rows[name] for name in step.added if self.rows[name].launches]
            rows = [row for row in rows if row.node not in step.removed]
            states.append((step.rule, list(rows)))
        if [row.node for row in rows] == [row.node for row in self.after]:
            states.pop()
            return [*states, (self.steps[-1].rule if self.steps else "as traced", list(self.after))]
        return [*states, ("copies that have become views", list(self.after))]


class Rewriter:
    """Edits one graph. A rule is a method rule(node) -> bool: True if it replaced something, Refused if it must not."""

    def __init__(self, gm, functions, pinned):
        self.gm, self.graph, self.functions, self.pinned = gm, gm.graph, functions, pinned
        self.report = Report(self.rows())
        # Nobody reads them, or they write: they are there to act.
        self.effects = {node for node in self.graph.nodes if not node.users or node.meta["writes"]}

    def rows(self):
        return [_row(node) for node in self.graph.nodes if node.meta["launches"]]

    # -- the graph

    def order(self):
        return {node: i for i, node in enumerate(self.graph.nodes)}

    def closed(self, inside, outputs):
        """inside: nodes that go; outputs: those of them that are replaced. Refuse if another is needed elsewhere."""
        for node in inside - set(outputs):
            if is_transparent(node) and node.args[0] not in inside:
                continue  # a cast of an input: it stays for whoever else wants it
            elsewhere = [user for user in node.users if user not in inside]
            if elsewhere:
                raise Refused(f"{node.name} is used elsewhere too, by {elsewhere[0].name}")

    def still(self, inside):
        """Refuse if a tensor is changed in place between the first and the last node: it might be one of ours."""
        order = self.order()
        first, last = min(map(order.get, inside)), max(map(order.get, inside))
        for node, i in order.items():
            if first <= i <= last and node.meta["writes"]:
                raise Refused(f"{node.name} writes in place in between")

    def views(self, node):
        """The nodes that show node's memory, or would if it were laid out in another way."""
        views = [node]
        if node.op == "get_attr":  # a buffer has one node for each time it is read
            own = _storages(attribute(self.gm, node.target))
            others = (n for n in self.graph.find_nodes(op="get_attr") if n is not node)
            views += [n for n in others if own & _storages(attribute(self.gm, n.target))]
        for view in views:
            for user in view.users:
                shows = user.meta["launches"] == 0 and name_of(user) not in SHAPES_ONLY
                if (shows or name_of(user) in VIEW_OR_COPY or view in user.meta["writes"]) and user not in views:
                    views.append(user)
        return views

    def unwritten(self, nodes):
        """Refuse if one is changed in place, or a view of it: what takes its place is laid out in another way, so that
        a view may become a copy or a copy a view.
        """
        for view in (view for node in nodes for view in self.views(node)):
            for user in view.users:
                if view in user.meta["writes"]:
                    raise Refused(f"{user.name} writes in place to {view.name}")

    def hoist(self, *nodes):
        """Attributes to the top: they have no inputs, so they may be read at any time."""
        top = next(iter(self.graph.nodes))
        for node in nodes:
            if is_node(node) and node.op == "get_attr" and node is not top:
                top.prepend(node)

    def call(self, target, arguments, like, **kwargs):
        """A new node at the insertion point. like: (shape, dtype); its launches and bytes are set by `replace`."""
        node = self.graph.call_function(target, arguments, kwargs)
        node.meta = dict(launches=0, bytes=0, fixed=False, writes=(), shape=like[0], dtype=like[1])
        return node

    def op(self, name, arguments, like, **kwargs):
        """A fused operation: one launch, which reads its inputs once and writes its outputs once."""
        node = self.call(self.functions[name], arguments, like[0] if len(like) == 1 else (None, None), **kwargs)
        size = sum(math.prod(s) * d.itemsize for s, d in like)
        size += sum(math.prod(shape(n)) * n.meta["dtype"].itemsize for n in node.all_input_nodes)
        node.meta |= dict(launches=1, bytes=size)
        outputs = [self.call(operator.getitem, (node, i), meta) for i, meta in enumerate(like)] if len(like) > 1 else []
        return node, outputs

    def paired(self, a, b):
        """Two tensors of one shape. A size of 1 may be another size in another call, of one of them only."""
        if 1 not in shape(a) or a is b or self.pinned:
            return a, b
        both = self.call(torch.broadcast_tensors, (a, b), (None, None))
        return tuple(self.call(operator.getitem, (both, i), (shape(n), n.meta["dtype"])) for i, n in enumerate((a, b)))

    def replace(self, rule, new, pairs):
        """Users of old take new instead, for each (old, new); what nobody needs then goes. new: nodes to report."""
        before = [node.name for node in self.graph.nodes]
        for old, by in pairs:
            for view in self.views(old)[1:]:  # where what is new cannot be viewed so, reshape copies
                if view.op == "call_method" and view.target == "view" and len(view.args) > 1:
                    if not isinstance(view.args[1], torch.dtype):
                        view.target = "reshape"
                elif view.target is torch.ops.aten.view.default:
                    view.target = torch.ops.aten.reshape.default
            old.replace_all_uses_with(by)
        for node in reversed(list(self.graph.nodes)):
            dead = not node.users and node not in self.effects
            if dead and (not node.is_impure() or is_transparent(node)):  # torch takes dropout for impure even if off
                self.graph.erase_node(node)
        alive = {node.name for node in self.graph.nodes}
        added = tuple(node.name for node in new)
        self.report.rows |= {node.name: _row(node) for node in new}
        self.report.steps.append(Step(rule, tuple(n for n in before if n not in alive), added))

    def sweep(self, rule, function):
        """Try a rule on every node, until it finds nothing more."""
        known = set()
        while True:
            for node in reversed(list(self.graph.nodes)):
                if node in known:
                    continue
                known.add(node)
                nodes, parameters, pinned = set(self.graph.nodes), set(self.gm._parameters), self.pinned
                try:
                    if function(node):
                        break
                except Refused as reason:
                    self.report.left.append(f"{rule} at {node.name}: {reason}")
                except (TypeError, AttributeError, IndexError, ArithmeticError) as error:  # e.g. a number for a node
                    if not self._undone(nodes, parameters):
                        raise
                    self.report.left.append(f"{rule} at {node.name}: an unknown form ({type(error).__name__})")
                self.pinned = pinned  # whatever was looked at, nothing came of it
            else:
                return

    def _undone(self, nodes, parameters):
        """Take out what a rule added before it failed. False if the graph that was there has changed as well."""
        added = [node for node in self.graph.nodes if node not in nodes]
        if len(added) + len(nodes) != len(self.graph.nodes) or any(nodes & set(node.users) for node in added):
            return False
        for node in reversed(added):
            self.graph.erase_node(node)
        for name in set(self.gm._parameters) - parameters:
            delattr(self.gm, name)
        return True

    # -- reading through spellings

    def strip(self, node, inside):
        """The node under casts and disabled dropout; those go into `inside`."""
        while is_transparent(node):
            inside.add(node)
            node = node.args[0]
        return node

    def factors(self, node, inside, top=True):
        """[(factor, +1 or -1)] of a product: x * y / z, in any order, through casts. A shared product is one factor."""
        stripped = set()
        bare = self.strip(node, stripped) if is_node(node) else node
        if is_node(bare) and name_of(bare) in ("mul", "div") and (top or len(bare.users) == 1):
            if is_plain(bare):
                inside |= stripped | {bare}
                left = self.factors(arg(bare, 0, "input"), inside, False)
                right = self.factors(arg(bare, 1, "other"), inside, False)
                sign = 1 if name_of(bare) == "mul" else -1
                return left + [(f, sign * s) for f, s in right]
        return [(node, 1)]

    def two(self, node, name):
        """The operands of a commutative operation, in both orders."""
        if is_node(node) and name_of(node) == name and is_plain(node):
            a, b = arg(node, 0, "input"), arg(node, 1, "other")
            return [(a, b), (b, a)]
        return []


def _row(node):
    what = node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    sources, todo = [], list(node.all_input_nodes)
    while todo:
        source = todo.pop()
        if source.meta["launches"] or source.op == "placeholder":
            sources.append(source.name)
        else:
            todo += source.all_input_nodes
    reads = tuple(dict.fromkeys(sources))
    return Row(node.name, name_of(node) or str(what), node.meta["launches"], node.meta["bytes"], reads)


def attribute(module, path):
    for name in path.split("."):
        module = getattr(module, name)
    return module
