"""The rules of `labkit.fuse` for attention: rotary positions of q and k, and softmax(q k^T) v."""

import torch
from torch import nn

from labkit.args import FLOATS, MAX_HEAD_DIM
from labkit.fx_graph import SHAPES_ONLY, Refused, Rewriter, arg, attribute, is_node, is_number, is_plain, name_of, shape

VERY_LOW = -1e9  # a score of this or less has no weight in a softmax that also sees an ordinary one


class AttentionRules(Rewriter):
    def rope(self, root):
        """q and k turned by the same angles: one launch for both."""
        first = self._rotation(root)
        if first is None:
            return False
        order = self.order()
        for node in sorted(order, key=lambda n: abs(order[n] - order[root])):  # the nearest: other layers have the same
            second = self._rotation(node) if node is not root else None
            if second and second[1:4] == first[1:4] and second[0] is not first[0]:
                break
        else:
            raise Refused("only one tensor is turned by these angles")
        (q_out, (q, cos, sin, heads, q_in)), (k_out, (k, *_, k_in)) = sorted(
            ((root, first), (node, second)), key=lambda pair: order[pair[0]]
        )
        others = {n for i in (-3, -2, -1) for n in (q, k) if i != heads and shape(n)[i] != shape(q)[i]}
        if others or shape(q)[:-3] != shape(k)[:-3] or q.meta["dtype"] != k.meta["dtype"]:
            raise Refused("the two tensors differ in more than their heads")
        inside = q_in | k_in
        self.closed(inside, [q_out, k_out])
        self.still(inside)
        self.unwritten([q_out, k_out])
        place = min([order[k_out], *(order[u] for u in q_out.users if u not in inside)])
        if max(order[n] for n in (q, k, cos, sin)) >= place:
            raise Refused("the second tensor is known only after the first is used")
        with self.graph.inserting_before(list(order)[place]):
            ends = []
            for n in (q, k):  # [..., len, H, D]
                size = list(shape(n))
                if heads == -3:
                    size[-3], size[-2] = size[-2], size[-3]
                    n = self.call(torch.transpose, (n, -3, -2), (tuple(size), n.meta["dtype"]))
                ends.append(n)
            angles = [self._one_row(n) for n in (cos, sin)]
            new, turned = self.op("rope", (*ends, *angles), [(shape(n), n.meta["dtype"]) for n in ends])
            if heads == -3:
                metas = [(shape(n), n.meta["dtype"]) for n in (q, k)]
                turned = [self.call(torch.transpose, (n, -3, -2), meta) for n, meta in zip(turned, metas)]
        self.replace("rope", [new], [(q_out, turned[0]), (k_out, turned[1])])
        return True

    def _rotation(self, root):
        """(x, cos, sin, axis of the heads, nodes), in one of two spellings, or None. cos and sin without that axis.

        By halves: cat(a * cos - b * sin, b * cos + a * sin). As Hugging Face: x * cos + cat(-b, a) * sin.
        """
        size = shape(root)
        if size is None or len(size) < 3 or size[-1] % 2 or name_of(root) not in ("cat", "add"):
            return None
        inside = {root}
        if name_of(root) == "cat" and arg(root, 1, "dim") in (-1, len(size) - 1):
            found = self._turned_halves(arg(root, 0, "tensors"), inside)
        elif name_of(root) == "add":
            found = next(filter(None, (self._turned_whole(pair, inside) for pair in self.two(root, "add"))), None)
        else:
            found = None
        if found is None:
            return None
        x, cos, sin = found
        if shape(x) != size:
            return None
        for heads in (-2, -3):
            angles = [self._per_head(n, x, heads, inside) for n in (cos, sin)]
            if None not in angles:
                return x, *angles, heads, inside
        return None

    def _turned_halves(self, pieces, inside):
        if [name_of(p) if is_node(p) and is_plain(p) else "" for p in pieces] != ["sub", "add"]:
            return None
        read = []  # for each of the four products: (x, which half, angle)
        for piece in pieces:
            for term in (arg(piece, 0, "input"), arg(piece, 1, "other")):
                known = [(self._half(a, inside), b) for a, b in self.two(term, "mul") if is_node(a)]
                known = [(half, b) for half, b in known if half]
                if len(known) != 1 or not is_node(known[0][1]):
                    return None
                inside.add(term)
                read.append((*known[0][0], self.strip(known[0][1], inside)))
        inside |= set(pieces)
        x, cos, sin = read[0][0], read[0][2], read[1][2]
        first, second = [(0, cos), (1, sin)], [(1, cos), (0, sin)]
        if any(r[0] is not x for r in read) or [r[1:] for r in read[:2]] != first:
            return None
        return (x, cos, sin) if [r[1:] for r in read[2:]] in (second, second[::-1]) else None

    def _turned_whole(self, terms, inside):
        plain, other = terms
        for x, cos in self.two(plain, "mul"):
            for pair, sin in self.two(other, "mul"):
                if not all(map(is_node, (x, cos, pair, sin))) or name_of(pair) != "cat":
                    continue
                pieces, dim = arg(pair, 0, "tensors"), arg(pair, 1, "dim")
                if len(pieces) != 2 or name_of(pieces[0]) != "neg" or dim not in (-1, len(shape(x)) - 1):
                    continue
                x, halves = self.strip(x, inside), set()
                if self._half(pieces[0].args[0], halves) == (x, 1) and self._half(pieces[1], halves) == (x, 0):
                    inside |= {plain, other, pair, pieces[0]} | halves
                    return x, cos, sin
        return None

    def _half(self, node, inside):
        """(x, 0 or 1) if node is the lower or the upper half of x's last dimension."""
        name, source, i = name_of(node), node.args[0] if node.args else None, None
        if name == "getitem" and is_node(source) and name_of(source) in ("chunk", "split"):
            x, count = arg(source, 0, "input"), arg(source, 1, "chunks", "split_size_or_sections", "split_size")
            halves = 2 if name_of(source) == "chunk" else shape(x)[-1] // 2
            if arg(source, 2, "dim", default=0) in (-1, len(shape(x)) - 1) and self._number(count) == halves:
                i = node.args[1]
                inside.add(source)
        elif name == "getitem" and isinstance(node.args[1], tuple) and shape(source):
            x, (*rest, last) = source, node.args[1]
            whole = all(r is Ellipsis or r == slice(None) for r in rest)
            if whole and isinstance(last, slice) and (Ellipsis in rest or len(rest) == len(shape(x)) - 1):
                i = self._which_half(shape(x)[-1], last.start, last.stop, last.step)
        elif name == "slice" and arg(node, 1, "dim", default=0) in (-1, len(shape(source)) - 1):
            x, i = source, self._which_half(shape(source)[-1], *(arg(node, j) for j in (2, 3, 4)))
        if i not in (0, 1):
            return None
        inside.add(node)
        return self.strip(x, inside), i

    def _one_row(self, angle):
        """Angles [1, len, D]: the same for all of the batch, of whatever size (torch.squeeze leaves other sizes be)."""
        size = shape(angle)
        if len(size) == 3 and size[0] == 1:
            return self.call(torch.squeeze, (angle, 0), (size[1:], angle.meta["dtype"]))
        return angle

    def _which_half(self, width, start, stop, step):
        start, stop = self._number(start) or 0, self._number(stop)
        stop = width if stop is None else min(stop, width)
        return {(0, width // 2): 0, (width // 2, width): 1}.get((start, stop)) if step in (None, 1) else None

    def _per_head(self, node, x, heads, inside):
        """cos before it got an axis for the heads: [len, D/2] or [..., len, D/2], or D wide."""
        if name_of(node) != "unsqueeze" or arg(node, 1, "dim") not in (heads, len(shape(node)) + heads):
            return None
        angle, size = self.strip(arg(node, 0, "input"), set()), list(shape(x))
        del size[heads]
        width = shape(angle)[-1]
        lead = [tuple(size[:-1]), (size[-2],), (1, size[-2])]
        fits = width in (size[-1] // 2, size[-1]) and shape(angle)[:-1] in lead
        if not fits or angle.meta["dtype"] not in (torch.float32, x.meta["dtype"]):
            return None
        inside.add(node)
        return angle

    def attention(self, root):
        """softmax(scale * q k^T + mask) v, the mask causal or absent: one kernel, and no [T, L] tensor in memory."""
        product = self._product(root)
        if product is None:
            return False
        p, v, v_axes = product
        inside = {root}
        p = self.strip(p, inside)
        if name_of(p) != "softmax" or arg(p, 1, "dim") not in (-1, len(shape(p)) - 1):
            return False
        inside.add(p)
        scores, causal = self._unmasked(self.strip(arg(p, 0, "input"), inside), inside)
        scale, qk = 1.0, None
        for factor, sign in self.factors(scores, inside):
            number = self._number(factor)
            if is_number(number) and (number or sign == 1):
                scale *= number**sign
            elif qk is None and sign == 1:
                qk = self.strip(factor, inside)
            else:
                raise Refused(f"{getattr(factor, 'name', factor)} is not a number that scales the scores")
        scored = self._scores(qk)
        if scored is None:
            return False
        if not 0 < scale < float("inf"):
            raise Refused(f"the scores are scaled by {scale}, the kernel wants a positive number")
        q, k, q_axes, k_axes = scored
        inside.add(qk)
        k, k_axes = self._unrepeated(k, k_axes, inside)
        v, v_axes = self._unrepeated(v, v_axes, inside)
        q_shape, k_shape, v_shape = (_moved(shape(n), axes) for n, axes in ((q, q_axes), (k, k_axes), (v, v_axes)))
        if k_shape != v_shape or len({n.meta["dtype"] for n in (q, k, v)}) > 1:
            raise Refused("q, k and v differ in head_dim or dtype")
        if q.meta["dtype"] not in FLOATS or q_shape[-1] > MAX_HEAD_DIM:
            raise Refused(f"head_dim {q_shape[-1]} or {q.meta['dtype']} is not for the kernel")
        self.closed(inside, [root])
        self.still(inside)
        self.unwritten([root])
        with self.graph.inserting_before(root):
            arranged = [self._arrange(n, axes) for n, axes in ((q, q_axes), (k, k_axes), (v, v_axes))]
            new, _ = self.op("attention", tuple(arranged), [(q_shape, q.meta["dtype"])], causal=causal, sm_scale=scale)
            out = self._restore(new, root)
        self.replace("attention", [new], [(root, out)])
        return True

    def _product(self, root):
        """p, v and how v's axes become [B, L, H, D], if root is p @ v."""
        if name_of(root) == "einsum":
            letters = _einsum(root)
            if letters is None:
                return None
            a, b, out = letters
            p, v = arg(root, 1, "operands")[:2] if isinstance(arg(root, 1), (list, tuple)) else root.args[1:3]
            if len(a) != 4 or len(b) != 4 or len(out) != 4:
                return None
            batch, heads, t, length = a
            d = next((c for c in b if c not in a), None)
            if d is None or set(b) != {batch, heads, length, d} or set(out) != {batch, heads, t, d}:
                return None
            return p, v, tuple(b.index(c) for c in (batch, length, heads, d))
        if name_of(root) != "matmul":
            return None
        p, v = arg(root, 0, "input"), arg(root, 1, "other", "mat2")
        if shape(p) is None or shape(v) is None or len(shape(v)) not in (3, 4) or len(shape(p)) != len(shape(v)):
            return None
        if shape(p)[:-2] != shape(v)[:-2]:
            return None
        return p, v, (0, 2, 1, 3) if len(shape(v)) == 4 else (0, 1, None, 2)

    def _scores(self, qk):
        """q, k and how their axes become [B, T, H, D], if qk is q @ k^T with scores [B, H, T, L]."""
        if not is_node(qk):
            return None
        if name_of(qk) == "einsum":
            letters = _einsum(qk)
            if letters is None:
                return None
            a, b, out = letters
            q, k = arg(qk, 1, "operands")[:2] if isinstance(arg(qk, 1), (list, tuple)) else qk.args[1:3]
            if len(a) != 4 or len(b) != 4 or len(out) != 4:
                return None
            batch, heads, t, length = out
            d = next((c for c in a if c not in out), None)
            if d is None or set(a) != {batch, heads, t, d} or set(b) != {batch, heads, length, d}:
                return None
            return q, k, *(tuple(s.index(c) for c in (batch, n, heads, d)) for s, n in ((a, t), (b, length)))
        if name_of(qk) != "matmul":
            return None
        q, k = arg(qk, 0, "input"), arg(qk, 1, "other", "mat2")
        if shape(q) is None or len(shape(q)) not in (3, 4) or len(shape(k)) != len(shape(q)):
            return None
        if shape(q)[:-2] != shape(k)[:-2]:
            return None
        # k arrives as k^T [B, H, D, L], however it was turned: a view turns it back
        return (q, k, (0, 2, 1, 3), (0, 3, 1, 2)) if len(shape(q)) == 4 else (q, k, (0, 1, None, 2), (0, 2, None, 1))

    def _unmasked(self, node, inside):
        """(scores without the mask, whether it was causal). Refuses masks that are not known to be causal."""
        name = name_of(node)
        if name == "masked_fill" and self._fixed(arg(node, 1, "mask")) and _is_low(arg(node, 2, "value")):
            drop = self._value(arg(node, 1, "mask"))
            scores = arg(node, 0, "input")
        elif name == "where" and self._fixed(keep := arg(node, 0, "condition")) and _is_low(
            self._number(arg(node, 2, "other"))
        ):
            drop, scores = ~self._value(keep), arg(node, 1, "input")
        elif name == "add":
            pair = next(((s, m) for s, m in self.two(node, "add") if is_node(m) and self._fixed(m)), None)
            if pair is None:
                raise Refused("the mask is an input: it need not be causal")
            scores, mask = pair[0], self._value(pair[1])
            if not bool(((mask == 0) | (mask <= VERY_LOW)).all()):
                raise Refused("what is added to the scores is no mask")
            drop = mask != 0
        elif name in ("masked_fill", "where"):
            raise Refused("the mask is an input: it need not be causal")
        else:
            return node, False
        self.pinned = True  # it was looked at in the size of the example
        t, length = shape(node)[-2:]
        keep = torch.ones(t, length, dtype=torch.bool, device=drop.device).tril(length - t)
        if t > length or not bool((drop == ~keep).all()) or drop.shape[-2:] != keep.shape:
            raise Refused("the mask is not the causal one")
        inside.add(node)
        return self.strip(scores, inside), True

    def _fixed(self, node):
        """A mask that follows from sizes and constants: no input, no parameter that training might change, and nothing
        that is written to, whatever with.
        """
        if not is_node(node) or not node.meta["fixed"]:
            return False
        todo, seen = [node], set()
        while todo:
            n = todo.pop()
            if n in seen:
                continue
            seen.add(n)
            if n.op == "get_attr" and isinstance(attribute(self.gm, n.target), nn.Parameter):
                return False
            if any(view in user.meta["writes"] for view in self.views(n) for user in view.users):
                return False
            todo += [] if name_of(n) in SHAPES_ONLY else n.all_input_nodes
        return True

    def _value(self, node):
        return attribute(self.gm, node.target) if node.op == "get_attr" else node.meta["value"]

    def _number(self, x):
        """x, or the number if it is a node whose value follows from sizes and constants."""
        value = self._value(x) if is_node(x) and self._fixed(x) else x
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
            value = value.item()
        if not is_number(value):
            return x
        self.pinned |= is_node(x)  # it follows from the sizes
        return value

    def _unrepeated(self, node, axes, inside):
        """K or V before its heads were copied for their groups: the kernel reads each once."""
        turned = node
        if name_of(node) in ("transpose", "permute", "mT") and axes == (0, 3, 1, 2):
            source = node.args[0]
            if shape(node) == (*shape(source)[:2], *shape(source)[:1:-1]):
                turned = source
        if name_of(turned) in ("reshape", "view") and name_of(turned.args[0]) == "expand":
            wide = turned.args[0]
            one = wide.args[0]
            full, narrow = shape(wide), shape(one)
            if len(full) == 5 and narrow == (*full[:2], 1, *full[3:]) and (full[1] == 1 or full[2] != 1):
                base = one.args[0]
                if shape(turned) == (full[0], full[1] * full[2], *full[3:]) and shape(base) == (*full[:2], *full[3:]):
                    inside |= {n for n in (node, turned, wide, one) if len(n.users) == 1}
                    return base, (0, 2, 1, 3)
        if name_of(turned) == "repeat_interleave" and arg(turned, 2, "dim") == 1 and len(shape(turned)) == 4:
            if isinstance(arg(turned, 1, "repeats"), int):
                inside |= {n for n in (node, turned) if len(n.users) == 1}
                return turned.args[0], (0, 2, 1, 3)
        return node, axes

    def _arrange(self, node, axes):
        """A view [B, T, H, D]; None among the axes: one head."""
        dtype = node.meta["dtype"]
        meta = (_moved(shape(node), axes), dtype)
        if None in axes:
            a, b, c = shape(node)
            node = self.call(torch.unsqueeze, (node, 2), ((a, b, 1, c), dtype))
            axes = (0, 1, 2, 3) if axes == (0, 1, None, 2) else (0, 3, 2, 1)
        return self.call(torch.permute, (node, axes), meta)

    def _restore(self, new, root):
        """The view of o [B, T, H, D] that root was."""
        meta = (shape(root), root.meta["dtype"])
        if name_of(root) == "einsum":
            a, b, out = _einsum(root)
            batch, heads, t, _ = a
            d = next(c for c in b if c not in a)
            return self.call(torch.permute, (new, tuple((batch, t, heads, d).index(c) for c in out)), meta)
        if len(shape(root)) == 3:
            return self.call(torch.squeeze, (new, 2), meta)
        return self.call(torch.permute, (new, (0, 2, 1, 3)), meta)


def _moved(size, axes):
    return tuple(1 if a is None else size[a] for a in axes)


def _is_low(x):
    return is_number(x) and x <= VERY_LOW


def _einsum(node):
    """The letters of its two inputs and its output, or None."""
    equation = arg(node, 0, "equation")
    if not isinstance(equation, str) or "->" not in equation or equation.count(",") != 1 or "." in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    return *inputs.split(","), out
