"""StreamingLLM in plain torch (Xiao et al., ICLR 2024): keep the first tokens and the last, forget what is between.

The kept tokens are numbered anew at every step: a token's position is its place in the cache, not in the text. So the
cache holds keys before rotation, and whoever reads it rotates them.
"""

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from labkit import args, bench, check, codegen, peers, player
from labkit.attention import attention, decode_attention, softmax_dtype
from labkit.flash_decoding import CORNERS, decode_case, flash_decoding  # noqa: F401  (timed beside sink_decoding)
from labkit.model import rotate


def ring_positions(seen, num_sinks, window):
    """The cache position of every slot of a ring, [B, num_sinks + window] int64, for seen [B] tokens.

    Slots that hold no token yet get their own number. The inverse of: token i lies in slot i if i < num_sinks, else in
    num_sinks + (i - num_sinks) % window.
    """
    slot = torch.arange(num_sinks + window, device=seen.device)
    oldest = torch.where(seen > num_sinks + window, (seen - num_sinks) % window, 0)[:, None]  # its place in the window
    return torch.where(slot < num_sinks, slot, num_sinks + (slot - num_sinks - oldest) % window)


def sink_decoding(q, k_ring, v_ring, seen, *, num_sinks, window, cos, sin, sm_scale=None):
    """One new token a sequence attends to its sinks and its window, which lie in a ring.

    q [B, Hq, D] and k_ring [B, num_sinks + window, Hkv, D] before rotation; v_ring of the same shape; Hq a multiple of
    Hkv; D even; fp16, bf16, fp32 or fp64. Token i of a sequence lies in slot i if i < num_sinks, else in
    num_sinks + (i - num_sinks) % window. seen [B] int32: tokens so far, the current one included, which is already in
    the ring. Of these n = min(seen, num_sinks + window) are held. They are rotated to positions 0..n-1 in the order of
    the text, the query to n-1. cos, sin [num_sinks + window or more, D / 2] fp32 (or fp64). sm_scale defaults to
    D ** -0.5.

    Returns o [B, Hq, D] in q.dtype and lse [B, Hq] fp32 (fp64 for fp64); a sequence that has seen nothing gives 0 and
    -inf. Raises ValueError naming the argument. Source: Xiao et al., section 3.2.
    """
    args.ring(q, k_ring, v_ring, seen, num_sinks, window, cos, sin, dtypes=args.REFERENCE_FLOATS)
    held = seen.clamp(0, num_sinks + window)
    at = ring_positions(seen, num_sinks, window)  # [B, num_sinks + window]
    now = (held - 1).clamp(min=0)[:, None].long()  # [B, 1]
    wide = softmax_dtype(q.dtype)
    k = rotate(k_ring.to(wide), cos[at], sin[at]).to(q.dtype)
    q = rotate(q[:, None].to(wide), cos[now], sin[now]).to(q.dtype)[:, 0]
    return decode_attention(q, k, v_ring, held, sm_scale=sm_scale)  # what is held fills the first slots


class SinkCache:
    """Keys and values of the first num_sinks tokens and of the last `window`, the current one included.

    A ring: a new token takes the slot of the oldest one of the window, and nothing else moves. Keys are stored before
    rotation. `seen` counts the tokens; k and v [B, num_sinks + window, Hkv, D] are what `sink_decoding` reads, None
    before the first token. Source: Xiao et al., section 3.2; their code evicts after a step and so attends to one
    token more: its (start_size, recent_size) is our (num_sinks, window - 1).
    """

    def __init__(self, num_sinks, window):
        args.sinks(num_sinks, window)
        self.num_sinks, self.window, self.seen, self.k, self.v = num_sinks, window, 0, None, None

    def __len__(self):
        """How many tokens are held: never more than num_sinks + window."""
        return min(self.seen, self.num_sinks + self.window)

    def slot(self, token):
        """The slot of token number `token`."""
        return token if token < self.num_sinks else self.num_sinks + (token - self.num_sinks) % self.window

    def append(self, k, v):
        """Store n more tokens, k and v [B, n, Hkv, D], keys before rotation, in place of the n oldest of the window.

        The same as storing them one after the other. Raises ValueError, and stores nothing, unless shape, dtype and
        device are those of the tokens before.
        """
        args.tensor("k", k, ("batch", "n", "num_kv_heads", "head_dim"), dtypes=args.REFERENCE_FLOATS)
        if self.k is not None:
            batch, _, num_kv_heads, head_dim = self.k.shape
            args.tensor("k", k, (batch, "n", num_kv_heads, head_dim), like=self.k, dtype=self.k.dtype)
        args.tensor("v", v, tuple(k.shape), like=k, dtype=k.dtype)
        if self.k is None:
            shape = (k.shape[0], self.num_sinks + self.window, *k.shape[2:])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        first, self.seen = self.seen, self.seen + k.shape[1]
        # Of many new tokens only the sinks and the last of the window stay.
        kept = [i for i in range(first, self.seen) if i < self.num_sinks or i >= self.seen - self.window]
        slots = torch.tensor([self.slot(i) for i in kept], dtype=torch.long, device=k.device)
        new = torch.tensor([i - first for i in kept], dtype=torch.long, device=k.device)
        self.k[:, slots], self.v[:, slots] = k[:, new], v[:, new]

    def view(self):
        """(k, v [B, n, Hkv, D], positions [n] = 0..n-1): what is held, in the order of the text.

        Slices of the ring until something has been evicted; after that a copy, since the ring's order is another one.
        """
        args.expect(self.k is not None, "view", "a cache without tokens", "append before it")
        n = len(self)
        positions = torch.arange(n, device=self.k.device)
        if self.seen == n:
            return self.k[:, :n], self.v[:, :n], positions
        order = torch.tensor([self.slot(i) for i in self._held()], device=self.k.device)
        return self.k[:, order], self.v[:, order], positions

    def evict_for_space(self, n):
        """Make room for n tokens that come together, e.g. the next prompt: nothing will be evicted while they do.

        Evicts the oldest of the window, no more than needed. Once a prompt, so what stays may move: to the front of the
        ring, in the order of the text. The tokens evicted are as if they had never been: `seen` counts without them.
        """
        most = self.num_sinks + self.window - min(self.seen, self.num_sinks)
        is_int = isinstance(n, int) and not isinstance(n, bool)
        args.expect(is_int and 0 <= n <= most, "n", n, f"an int from 0 to {most}, what fits beside the sinks")
        room = self.num_sinks + self.window - n
        if self.seen <= room:
            return
        held = self._held()
        kept = held[: self.num_sinks] + held[len(held) - (room - self.num_sinks) :]
        order = torch.tensor([self.slot(i) for i in kept], dtype=torch.long, device=self.k.device)
        self.k[:, : len(kept)], self.v[:, : len(kept)] = self.k[:, order], self.v[:, order]
        self.seen = len(kept)

    def _held(self):
        """The numbers of the tokens held, in order."""
        sinks = range(min(self.num_sinks, self.seen))
        return [*sinks, *range(max(len(sinks), self.seen - self.window), self.seen)]


class Stream:
    """A model that reads on and on in constant memory: one SinkCache a layer.

    stream(ids [B, n]) -> logits [B, n, vocab]. One token goes through `decode` on the ring. More than one, a prompt,
    are given room first and then attend to the cache and, causally, to each other: as many as fit beside the sinks.
    A call with bad ids raises ValueError naming them, and changes nothing.
    """

    def __init__(self, model, num_sinks, window, *, decode=sink_decoding, prefill=attention):
        self.model, self.decode, self.prefill = model, decode, prefill
        self.caches = [SinkCache(num_sinks, window) for _ in model.layers]
        self.sizes = dict(num_sinks=num_sinks, window=window)
        device = model.embed_tokens.weight.device
        self.cos, self.sin = model.angles(torch.arange(num_sinks + window, device=device))

    def __len__(self):
        return len(self.caches[0])

    @property
    def num_bytes(self):
        """What the cache takes, all layers."""
        return sum(x.nbytes for cache in self.caches if cache.k is not None for x in (cache.k, cache.v))

    @torch.no_grad()
    def __call__(self, ids):
        held, vocab = self.caches[0].k, self.model.embed_tokens.weight
        batch = "batch" if held is None else len(held)
        args.tensor("ids", ids, (batch, "n"), like=vocab, dtypes=(torch.int32, torch.int64))
        args.expect(ids.shape[1] > 0, "ids (shape)", list(ids.shape), "a token or more")
        args.in_range("ids", ids, 0, len(vocab) - 1)
        batch, n = ids.shape
        if n > 1:  # what comes now changes the caches
            for cache in self.caches:
                cache.evict_for_space(n)
        positions = torch.zeros(n, dtype=torch.long, device=ids.device)  # an angle of 0: nothing is rotated

        def attend(layer, q, k, v):
            cache = self.caches[layer]
            cache.append(k, v)
            if n == 1:
                seen = torch.full((batch,), cache.seen, dtype=torch.int32, device=q.device)
                angles = dict(cos=self.cos, sin=self.sin)
                return self.decode(q[:, 0], cache.k, cache.v, seen, **self.sizes, **angles)[0][:, None]
            k, v, at = cache.view()
            q, k = (rotate(x, self.cos[p], self.sin[p]) for x, p in ((q, at[-n:]), (k, at)))
            return self.prefill(q, k, v)

        return self.model(ids, positions, attend)


# --- players


def cache_player(words, num_sinks=2, window=5):
    """The cache as a strip, word by word: who is held, in which slot, at which position. A run of a SinkCache whose
    keys are the numbers of the words."""
    cache, steps, size, cols = SinkCache(num_sinks, window), [], num_sinks + window, 8
    for new in range(len(words)):
        ring = [] if cache.k is None else cache.k.flatten().tolist()
        number = torch.full((1, 1, 1, 1), float(new))
        cache.append(number, number)
        held = [int(x) for x in cache.view()[0].flatten()]
        gone = set(range(new)) - set(held)
        just = [int(x) for slot, x in enumerate(ring) if x != cache.k.flatten()[slot] and new >= size]

        def color(i, new=new, held=held):
            return "orange" if i == new else "purple" if i < num_sinks else "blue" if i in held else "muted"

        cells = [(color(i), word) if i <= new else ("outline", word) for i, word in enumerate(words)]
        cells += [None] * (-len(words) % cols)
        at = ring_positions(torch.tensor([cache.seen]), num_sinks, window)[0].tolist()
        slots = [int(x) for x in cache.k.flatten()]
        filled = range(len(cache))  # the slots that hold a token
        strip = [(color(slots[s]), words[slots[s]]) if s in filled else "outline" for s in range(size)]
        positions = [("", str(at[s])) if s in filled else None for s in range(size)]
        numbers = [("", str(slots[s])) if s in filled else None for s in range(size)]
        evicted = f' It takes the slot of "{words[just[0]]}", which is evicted.' if just else ""
        text = f'"{words[new]}" comes.{evicted} Held: {len(held)}, forgotten: {len(gone)}.'
        rows = [cells[i : i + cols] for i in range(0, len(cells), cols)]
        steps.append({"text": text, "words": rows, "ring": [strip, positions, numbers]})
    panels = {
        "words": player.Grid(-(-len(words) // cols), cols, name="the text"),
        "ring": player.Grid(3, size, row_labels=["slot", "position", "number in the text"], name="the ring"),
    }
    legend = {"orange": "new", "purple": "sink", "blue": "in the window", "muted": "forgotten", "outline": "to come"}
    caption = f"A run of the lab's SinkCache: {num_sinks} sinks and a window of {window}, the new word included."
    return player.Stepper("The rolling cache", panels, steps, legend=legend, caption=caption)


def traced_problem(num_sinks=4, window=188, seen=1000):
    """A step for `walk_player`. The first pair of the key in slot s is (s + 1, 0), so that its length says which slot
    it came from, rotated or not; the second pair turns a hundredth of a radian a position, and so tells that."""
    size = num_sinks + window
    k = torch.zeros(1, size, 1, 4)
    k[0, :, 0, 0], k[0, :, 0, 1] = torch.arange(1.0, size + 1), 1.0
    angle = torch.arange(size)[:, None] * torch.tensor([1.0, 0.01])
    return dict(
        q=torch.ones(1, 1, 4), k_ring=k, v_ring=k.clone(), seen=torch.tensor([seen], dtype=torch.int32),
        num_sinks=num_sinks, window=window, cos=angle.cos(), sin=angle.sin(), num_splits=3,
    )  # fmt: skip


def walk_player(inputs, walk):
    """Step through a recorded launch (`labkit.trace.watch` of `_load_rotated` on `traced_problem`)."""
    size, cols = inputs["k_ring"].shape[1], 16
    labels, steps, reading = [""] * size, [], ["muted"] * size
    for step in walk:
        if len(step.inputs[2]) == 1:  # one row of angles: the query
            continue
        a, b = (torch.from_numpy(half) for half in step.outputs)  # of the rotated rows; a row that is masked is 0
        slots = [round(x) - 1 for x in torch.hypot(a[:, 0], b[:, 0]).tolist() if x > 0.5]
        positions = (100 * torch.atan2(b[:, 1], a[:, 1])).round().long().tolist()[: len(slots)]
        for slot, position in zip(slots, positions):
            reading[slot], labels[slot] = "orange", str(position)
        cells = list(zip(reading, labels))
        text = (
            f"Program {step.program[0]} reads positions {positions[0]} to {positions[-1]}, "
            f"which lie in slots {_runs(slots)}, and rotates each key by its position."
        )
        steps.append({"text": text, "ring": [cells[i : i + cols] for i in range(0, size, cols)]})
        reading = ["blue" if color == "orange" else color for color in reading]
    cells = list(zip(reading, labels))
    text = f"All {size} keys were read once. The text has {int(inputs['seen'][0])} tokens, and no other was touched."
    steps.append({"text": text, "ring": [cells[i : i + cols] for i in range(0, size, cols)]})
    panels = {
        "ring": player.Grid(
            size // cols, cols, row_labels=[f"slot {i}" for i in range(0, size, cols)], name="the ring, with positions"
        )
    }
    legend = {"orange": "being read", "blue": "read", "muted": "not yet"}
    caption = "A run of the kernel in the interpreter; slots and positions are read off the keys that it rotated."
    return player.Stepper("The kernel's walk around the ring", panels, steps, legend=legend, caption=caption)


def _runs(numbers):
    """[4, 5, 6, 9] -> "4-6 and 9-9": where neighbours follow each other."""
    runs = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return " and ".join(f"{a}-{b}" for a, b in runs)


def try_ring(kernel, seen, num_sinks, window, device="cpu"):
    """Run the kernel on a ring after `seen` tokens and say what it held. The live cell's callback."""
    generator = torch.Generator().manual_seed(0)
    size = num_sinks + window
    ring = torch.randn(2, 1, size, 2, 64, generator=generator).to(device)
    angle = torch.arange(size, device=device)[:, None] * 10_000.0 ** (-torch.arange(32, device=device) / 32)
    inputs = torch.randn(1, 4, 64, generator=generator).to(device), *ring
    inputs += (torch.tensor([seen], dtype=torch.int32, device=device),)
    options = dict(num_sinks=num_sinks, window=window, cos=angle.cos(), sin=angle.sin())
    verdicts = check.compare(kernel(*inputs, **options), sink_decoding, *inputs, **options)
    held = min(seen, size)
    return f"{held} of {seen} tokens are held, {seen - held} forgotten. " + "; ".join(map(str, verdicts))


def experiments():
    """The long CPU experiments of the topic."""
    from labkit import streaming_llm_study as study  # which imports this file

    return study.experiments()


# --- what the compiler makes of it


def codegen_cases() -> list[codegen.Case]:
    """Llama-3-8B's shape, a group that fp32 cuts, then corners: every pair of head_dim, group and dtype meets once."""

    def case(head_dim, group, dtype, **options):
        ring = codegen.Tensor((1, 1024, 1, head_dim), dtype)
        tensors = dict(q=codegen.Tensor((1, group, head_dim), dtype), k_ring=ring, v_ring=ring)
        tensors |= dict.fromkeys(("cos", "sin"), codegen.Tensor((1024, head_dim // 2), "float32"))
        tensors |= dict(seen=codegen.Tensor((1,), "int32", 5000), num_sinks=4, window=1020)
        name = f"{dtype}, head_dim {head_dim}, group {group}"
        kernels = ("_sink_split_kernel",)
        narrow = kernels if dtype == "float32" else ()  # half a key of 64 numbers, spread over AMD's 512 threads
        return codegen.Case("kernels.streaming_llm:sink_decoding", name, tensors | options, kernels, narrow)

    return [
        case(128, 4, "bfloat16"),
        case(80, 64, "float32"),
        *(case(*corner, **options) for *corner, options in CORNERS),
    ]


# --- benchmark cases

SECTION = "A stream of 32,768 tokens: Llama-3-8B, bf16"
STREAM = 32768


def _in_order(q, k_ring, v_ring, seen, num_sinks, window, cos, sin):
    """A function that gathers the ring in the order of the text and rotates: q [B, Hq, 1, D]; k, v [B, Hkv, n, D]."""
    lengths = set(seen.tolist())
    if len(lengths) != 1:
        raise ValueError(f"seen: got {len(lengths)} different lengths, expected one")
    order = ring_positions(seen[:1], num_sinks, window)[0].argsort()[: lengths.pop()]
    n = len(order)

    def gather():
        k = rotate(k_ring[:, order], cos[:n], sin[:n])
        now = rotate(q[:, None], cos[n - 1 : n], sin[n - 1 : n])
        return tuple(x.transpose(1, 2) for x in (now, k, v_ring[:, order]))

    return gather


def _sdpa(q, k, v):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).squeeze(2)


def window_sdpa(**inputs):
    """torch's FlashAttention on keys that lie in order and are rotated: what is left when both cost nothing."""
    q, k, v = _in_order(**inputs)()
    return lambda: _sdpa(q, k, v)


def gathered_sdpa(**inputs):
    """Gather, rotate, then torch's FlashAttention: the official code's step, which copies the cache every time."""
    gather = _in_order(**inputs)
    return lambda: _sdpa(*gather())


@functools.lru_cache(maxsize=2)
def _block_mask(length, num_sinks, window, device):
    """Sinks and window of one query at the end of `length` keys. One for all copies of the inputs: a new mask function
    would be compiled anew."""
    from torch.nn.attention.flex_attention import create_block_mask

    def keep(b, h, q_idx, kv_idx):
        return (kv_idx < num_sinks) | (kv_idx >= length - window)

    return create_block_mask(keep, None, None, 1, length, device=device)


def flex_mask(q, k_ring, v_ring, seen, num_sinks, window, cos, sin):
    """Compiled FlexAttention over the whole stream's keys, with a block mask that keeps sinks and window.

    Where the mask keeps nothing the keys are zeros: they are not read. Keys are rotated beforehand.
    """
    inputs = dict(q=q, k_ring=k_ring, v_ring=v_ring, seen=seen, num_sinks=num_sinks, window=window, cos=cos, sin=sin)
    q, k, v = _in_order(**inputs)()
    length = int(seen[0])

    def whole(x):
        everything = x.new_zeros(*x.shape[:2], length, x.shape[3])
        everything[:, :, :num_sinks], everything[:, :, -window:] = x[:, :, :num_sinks], x[:, :, num_sinks:]
        return everything

    k, v, mask = whole(k), whole(v), _block_mask(length, num_sinks, window, q.device.type)
    return peers.flex_attention(q, k, v, block_mask=mask)


PEERS = {"SDPA, window": window_sdpa, "gather, rotate, SDPA": gathered_sdpa, "FlexAttention, mask": flex_mask}


def sink_case(name, batch, num_sinks, window, *, tiny=False, num_q_heads=32, num_kv_heads=8, head_dim=128, **options):
    """One decode step in the middle of a stream. tiny: the same case, small enough for the interpreter."""
    seen = STREAM
    if tiny:
        batch, window, seen, head_dim, num_q_heads, num_kv_heads = min(batch, 2), 60, 150, 64, 4, 1
    size = num_sinks + window

    def make(generator, device):
        def randn(*shape):
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

        frequency = 500_000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
        angle = torch.arange(size, device=device)[:, None] * frequency
        return {
            "q": randn(batch, num_q_heads, head_dim),
            "k_ring": randn(batch, size, num_kv_heads, head_dim),
            "v_ring": randn(batch, size, num_kv_heads, head_dim),
            "seen": torch.full((batch,), seen, dtype=torch.int32, device=device),
            "num_sinks": num_sinks, "window": window, "cos": angle.cos(), "sin": angle.sin(),
        }  # fmt: skip

    elements = 2 * batch * head_dim * (size * num_kv_heads + num_q_heads)  # k, v, q and o
    return bench.Case(
        name, "sink_decoding", make, bytes=2 * elements + 4 * size * head_dim, section=SECTION, peers=PEERS,
        flops=4 * batch * size * num_q_heads * head_dim, **options,
    )  # fmt: skip


def cases(tiny=False) -> list[bench.Case]:
    """Two windows and three batches, and beside them the dense step that reads the whole stream."""
    slow = {"FlexAttention, mask": "it compiles for half a minute a shape; two are timed"}
    result = []
    for batch in (1, 8):
        dense = dict(op="flash_decoding", section=SECTION, tiny=tiny)
        case = decode_case(f"B={batch} dense, all {STREAM}", batch, STREAM, 32, 8, torch.bfloat16, **dense)
        result.append(replace(case, peers={"SDPA flash": case.peers["SDPA flash"]}, reference="flash_decoding"))
    for batch, num_sinks, window in ((1, 4, 1020), (1, 4, 4092), (8, 4, 1020), (64, 4, 1020), (8, 0, 1024)):
        without = {} if (batch, num_sinks, window) in ((1, 4, 1020), (8, 4, 1020)) else slow
        variants = {"one split": {"num_splits": 1}}
        name = f"B={batch} sinks {num_sinks} + window {window}"
        result.append(sink_case(name, batch, num_sinks, window, tiny=tiny, without=without, variants=variants))
    return result
