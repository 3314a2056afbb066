"""How many pieces the keys of one sequence are cut into."""

import functools
import math

import numpy as np


def num_splits_heuristic(num_tiles: int, num_sms: int, num_kv_blocks: int, max_splits: int = 128) -> int:
    """FlashAttention-2's rule (`num_splits_heuristic` in flash_api.cpp), exactly, with its floating-point types.

    num_tiles: programs without a split (batch * KV heads in decoding). num_sms: slots for programs that run at the
    same time; FlashAttention-2 passes twice the number of SMs. num_kv_blocks: tiles of keys in one sequence.

    If the tiles fill 80 % of the slots there is nothing to gain. Otherwise programs run in waves, and the last wave
    is rarely full: take the smallest number of splits whose waves are filled to at least 85 % of the best filling.
    A split count that gives no program fewer blocks than a smaller count did is not considered.
    """
    f32 = np.float32
    if num_tiles == 0 or num_tiles >= f32(0.8) * f32(num_sms):
        return 1
    limit = min(max_splits, num_sms, num_kv_blocks)
    filling = {}
    for n in range(1, limit + 1):
        if n > 1 and math.ceil(num_kv_blocks / n) == math.ceil(num_kv_blocks / (n - 1)):
            continue
        waves = f32(num_tiles * n) / f32(num_sms)
        filling[n] = float(waves / np.ceil(waves))
    best = max(filling.values(), default=0.0)  # compared in double, as C++ does
    return next((n for n, eff in filling.items() if eff >= 0.85 * best), 1)


def key_block(head_dim: int) -> int:
    """Keys a block in FlashAttention-2's split kernel."""
    return 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64


@functools.lru_cache(maxsize=4096)  # a decode step asks for the same few sizes; the rule takes 7 to 60 us
def choose(num_tiles: int, num_sms: int, max_kv_len: int, head_dim: int) -> int:
    """The kernels' default: FlashAttention-2's rule with its block of keys and two programs an SM."""
    return num_splits_heuristic(num_tiles, 2 * num_sms, math.ceil(max_kv_len / key_block(head_dim)))


PIECE, MOST_PIECES, SCRATCH = 4096, 8, 32 * 2**20


def offered(even: int, max_kv_len: int, piece_bytes: int) -> int:
    """Pieces to offer where sequences differ in length and each is cut into `even` pieces at least.

    A batch that fills the GPU is not cut by `choose`, and its longest sequence may be at work when all others are done.
    The lengths are on the GPU, where no rule on the host sees them. But the host can offer more pieces, and a sequence
    take as many of them as it needs: PIECE keys each, or more where MOST_PIECES of those are not enough. Partial
    results of all pieces, piece_bytes each, stay below SCRATCH: in the L2 cache.
    """
    pieces = min(MOST_PIECES, math.ceil(max_kv_len / PIECE), SCRATCH // max(1, piece_bytes))
    return max(even, pieces)


def bounds(kv_len: int, num_splits: int, block: int) -> list[tuple[int, int]]:
    """Keys [start, end) of each split: whole blocks, as even as they go; late splits may be empty (start == end)."""
    per_split = math.ceil(math.ceil(kv_len / block) / num_splits) * block
    return [(min(s * per_split, kv_len), min((s + 1) * per_split, kv_len)) for s in range(num_splits)]
