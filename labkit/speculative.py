"""Speculative decoding, greedy: a cheap draft proposes tokens, one pass of the model checks all of them.

A pass over the last token and k drafted ones says which token the model itself writes after each of them. The draft is
kept as far as it says the same; then comes the model's own next token. So the text is that of plain decoding, whatever
the draft, and a pass writes one to k + 1 tokens of it (Leviathan et al. 2023, Chen et al. 2023; both also for draws).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from labkit.args import expect
from labkit.attention import attention


def lookup(tokens: Sequence[int], k: int, *, longest=8, shortest=2) -> list[int]:
    """A draft without a model (prompt lookup, Saxena 2023): up to k tokens that followed when the text last ended so.

    The last `longest` tokens are looked for in what stands before, the latest place first; then one token fewer, down
    to `shortest`. [] where none of them stands there.
    """
    tokens = list(tokens)
    for n in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[-n:]:
                return tokens[start + n : start + n + k]
    return []


def verify(draft: Sequence[int], own: Sequence[int]) -> list[int]:
    """The tokens that a pass writes: the draft as far as the model agrees, and one of the model's.

    own: the model's token after what was known, after draft[0], after draft[1], ...: one more than the draft has.
    """
    expect(len(own) == len(draft) + 1, "own", f"{len(own)} tokens", f"{len(draft) + 1}, one more than the draft")
    agreed = 0
    while agreed < len(draft) and draft[agreed] == own[agreed]:
        agreed += 1
    return list(own[: agreed + 1])


class Cache:
    """Keys and values of one sequence, contiguous, of which the end can be forgotten."""

    def __init__(self, model, max_len):
        like, self.model, self.length = model.embed_tokens.weight, model, 0
        heads = [layer.self_attn.k_proj.weight.shape[0] // model.config.head_dim for layer in model.layers]
        shapes = [(2, 1, max_len, count, model.config.head_dim) for count in heads]
        self.layers = [torch.full(shape, float("nan"), dtype=like.dtype, device=like.device) for shape in shapes]

    @torch.no_grad()
    def forward(self, ids: Sequence[int]) -> torch.Tensor:
        """The logits [len(ids), V] after each of the next tokens, which attend to all before them."""
        end = self.length + len(ids)

        def attend(layer, q, k, v):
            keys, values = self.layers[layer]
            keys[:, self.length : end], values[:, self.length : end] = k, v
            return attention(q, keys[:, :end], values[:, :end])

        device = self.layers[0].device
        positions = torch.arange(self.length, end, device=device)
        logits = self.model(torch.tensor([ids], device=device), positions, attend)[0]
        self.length = end
        return logits

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. They are overwritten, not erased."""
        expect(0 <= length <= self.length, "length", length, f"0 to {self.length}")
        self.length = length


@dataclass
class Run:
    """What `generate` wrote, and what it took.

    accepted: drafted tokens that were written, the last token of each pass not counted: it is the model's own, also
    where it is a stop token that was drafted. So len(tokens) == passes + accepted. computed: tokens that went through
    the model, prompt included.
    """

    tokens: list[int] = field(default_factory=list)
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    computed: int = 0


@torch.inference_mode()
def generate(model, prompt: Sequence[int], max_new_tokens: int, draft: Callable | None = lookup, k=4, stop=()) -> Run:
    """Continue the prompt greedily. draft(tokens, k) -> at most k tokens, any of them; None: plain decoding.

    stop: token ids that end the text and are its last token. Raises ValueError naming the argument.
    """
    expect(len(prompt) > 0, "prompt", "no token", "at least one")
    expect(max_new_tokens >= 1 and k >= 0, "max_new_tokens, k", (max_new_tokens, k), "at least 1, at least 0")
    tokens, end, run = list(prompt), len(prompt) + max_new_tokens, Run()
    cache = Cache(model, end)
    while len(tokens) < end and not (run.tokens and run.tokens[-1] in stop):
        room = min(k, end - len(tokens) - 1)  # the pass itself writes one more
        guess = list(draft(tokens, room))[:room] if draft and room else []
        row = tokens[cache.length :] + guess  # the first time the prompt, then the one token without keys
        own = cache.forward(row)[-len(guess) - 1 :].argmax(-1).tolist()
        new = verify(guess, own)
        last = next((i for i, token in enumerate(new) if token in stop), len(new) - 1)
        tokens += new[: last + 1]
        run.accepted += last  # what is written beyond one token per pass
        cache.truncate(len(tokens) - 1)  # the keys of what was rejected
        run.tokens = tokens[len(prompt) :]
        run.passes, run.drafted, run.computed = run.passes + 1, run.drafted + len(guess), run.computed + len(row)
    return run
