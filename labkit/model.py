"""A Llama-family decoder in plain torch: Llama, Mistral without a window, Qwen2, Qwen3.

The model has no cache. `attend(layer, q, k, v) -> o` is handed in, and whatever it closes over is the cache:

    def attend(layer, q, k, v):                      # contiguous cache; q, k, v [B, T, H, D]
        cache[layer] = torch.cat((cache[layer], torch.stack((k, v))), dim=2)
        return attention(q, *cache[layer])

q and k arrive rotated to `positions`. A cache that must hold keys BEFORE rotation (attention sinks, chapter 06)
passes positions of 0: the angle is then 0, nothing is rotated, and the closure calls `model.rotate(x, positions)`.
"""

import os
from dataclasses import dataclass
from functools import partial
from math import pi
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from labkit import checkpoint, corpus
from labkit.args import expect, in_range

TEACHER = Path(__file__).parent / "weights" / "teacher"  # the lab's own model; labkit/train.py made it


@dataclass
class Config:
    """The settings that matter, under Hugging Face's names; the flags are what the architectures differ in."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or Llama 3's four numbers
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # always in Qwen2
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # always in Qwen3
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    architecture: str = "LlamaForCausalLM"


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotate(x, cos, sin):
    """RoPE (Su et al. 2021): turn the pairs (d, d + D/2) of x [..., T, H, D] by angles, cos and sin [..., T, D/2]."""
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def causal(layer, q, k, v):
    """Plain causal attention without a cache: the default `attend`. q [B, T, Hq, D]; k, v [B, T, Hkv, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, attend):
        # Head counts are read off the weights, so that a layer may be pruned or converted in place.
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.o_proj(attend(q, k, v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """model(ids, positions=None, attend=None) -> logits [B, T, vocab_size]; see the module's docstring for `attend`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # No buffer: `model.to(torch.bfloat16)` must leave it in fp32.
        self.inv_freq = rope_frequencies(config)

    def angles(self, positions):
        """cos, sin [..., T, D/2] fp32 of integer positions [..., T]."""
        self.inv_freq = self.inv_freq.to(positions.device)
        angle = positions.unsqueeze(-1).float() * self.inv_freq
        return angle.cos(), angle.sin()

    def rotate(self, x, positions):
        """x [B, T, H, D] rotated to positions, [T] or [B, T]."""
        return rotate(x, *self.angles(positions))

    def hidden(self, ids, positions=None, attend=None):
        """The last hidden states [B, T, hidden_size], normalised: what lm_head turns into logits."""
        good = ids.dim() == 2 and ids.dtype in (torch.int32, torch.int64)
        expect(good, "ids", f"{ids.dtype} {list(ids.shape)}", "integers [batch, len]")
        if not torch.compiler.is_compiling():
            in_range("ids", ids, 0, self.config.vocab_size - 1)
        positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        attend = causal if attend is None else attend
        good = positions.shape in (ids.shape, ids.shape[1:])
        expect(good, "positions (shape)", list(positions.shape), f"{list(ids.shape)} or [{ids.shape[1]}]")
        cos, sin = self.angles(positions)
        x = self.embed_tokens(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, partial(attend, i))
        return self.norm(x)

    def forward(self, ids, positions=None, attend=None):
        """ids [B, T] int; positions [T] or [B, T] int, default 0..T-1 -> logits [B, T, vocab_size]."""
        return self.lm_head(self.hidden(ids, positions, attend))

    @classmethod
    def from_pretrained(cls, path, *, dtype=torch.float32, device="cpu"):
        """Read config.json and model.safetensors (or its shards) from the folder `path`; weights are cast to dtype.

        Architectures: checkpoint.ARCHITECTURES. Pickled weights (*.bin) are never opened. A bad checkpoint raises
        ValueError or OSError naming the file and the tensor or setting.
        """
        folder = Path(path)
        with torch.device("meta"):  # shapes without memory
            model = cls(Config(**checkpoint.read_config(folder / "config.json")))
        shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
        tied = model.config.tie_word_embeddings
        model.load_state_dict(checkpoint.read_tensors(folder, shapes, tied, dtype, device), assign=True)
        if tied:
            model.lm_head.weight = model.embed_tokens.weight
        return model.eval()

    def save_pretrained(self, path):
        """Write config.json and model.safetensors, in the weights' dtype, for `transformers` and from_pretrained.

        ValueError where the layout cannot hold the model, e.g. layers of different widths after pruning.
        """
        with torch.device("meta"):
            shapes = {name: list(x.shape) for name, x in Llama(self.config).state_dict().items()}
        checkpoint.write(Path(path), self.config, self.state_dict(), shapes)


def load(path=None, *, dtype=torch.float32, device="cpu"):
    """The chapters' model: (model, encode, decode). path defaults to $LAB_MODEL, and that to the lab's own.

    encode(text) -> list of ids, beginning as the model's tokenizer has it (ours: with BOS); decode(ids) -> text.
    A folder with tokenizer.json needs the package `tokenizers`; one without must have our vocabulary, bytes.
    """
    folder = Path(path or os.environ.get("LAB_MODEL") or TEACHER)
    model, file = Llama.from_pretrained(folder, dtype=dtype, device=device), folder / "tokenizer.json"
    if not file.exists():
        size = model.config.vocab_size
        expect(size == corpus.VOCAB, f"{file} is absent; vocab_size", size, f"{corpus.VOCAB}, our bytes")
        return model, lambda text: [corpus.BOS, *corpus.encode(text)], corpus.decode
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"{file}: reading it needs the package tokenizers (pip install tokenizers)") from error
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{file}: not a tokenizer ({error})") from error
    return model, lambda text: tokenizer.encode(text).ids, lambda ids: tokenizer.decode(list(ids))


def rope_frequencies(config):
    """Radians a position for each pair, [D/2] fp32. Llama 3.1 divides the slow ones by `factor`, blending between."""
    share = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    freq = 1.0 / config.rope_theta**share
    if config.rope_scaling:
        factor, low, high, old_len = (config.rope_scaling[name] for name in checkpoint.LLAMA3)
        turns = old_len * freq / (2 * pi)  # of the pair, over the length of the first training
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: left alone, 0: divided by factor
        freq = keep * freq + (1 - keep) * freq / factor
    return freq
