"""GPT-1 and GPT-2 in one file: the network, its initialization and loss, text generation, published weights.

GPT-2: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3. GPT-1: Radford et
al., "Improving Language Understanding by Generative Pre-Training" (2018), section 4.1.

Shapes in comments: B sequences, T positions, n_embd = n_head * head_dim channels.
"""

import json
import math
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.types import Device
from torch.utils.checkpoint import checkpoint

# Keyed by the names that transformers uses in config.json.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


class ModelError(ValueError):
    """A config or checkpoint that is damaged, or that this network cannot represent."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a network. The defaults are GPT-2 124M."""

    block_size: int = 1024  # context length: the number of position embeddings
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # on embeddings, attention weights and both residual branches, as in GPT-2
    n_inner: int | None = None  # hidden width of the MLP; None: 4 * n_embd
    activation: str = "gelu_new"  # a key of ACTIVATIONS
    layer_norm_epsilon: float = 1e-5
    post_norm: bool = False  # GPT-1: LayerNorm after each residual sum, none before the head
    tie_word_embeddings: bool = True  # the head reuses the token embedding: 38.6M parameters fewer at 124M
    scale_attn_weights: bool = True  # divide attention scores by sqrt(head_dim)
    scale_attn_by_inverse_layer_idx: bool = False  # and by the layer's number, counted from 1
    eos_token_id: int | None = None  # <|endoftext|>, if the vocabulary has one
    initializer_range: float = 0.02  # standard deviation of initial weights; narrow models want more
    vocab_multiple: int = 64  # pad the vocabulary to a multiple of this for the tensor cores; logits are cropped

    def __post_init__(self) -> None:
        limits = {"dropout": 1, "n_layer": 10_001}  # a corrupt file must not fill the memory
        for field in fields(self):
            name, kind, value = field.name, cast(Any, field.type), getattr(self, field.name)
            typed = isinstance(value, int | float if kind is float else kind)
            if not typed or isinstance(value, bool) != (kind is bool):  # Python's bools are ints
                raise ModelError(f"{name} is {value!r}; it must be {getattr(kind, '__name__', kind)}")
            least, limit = 0 if kind is float else 1, limits.get(name, 2**31)
            number = kind in (int, float) or (name == "n_inner" and value is not None)
            if number and not least <= value < limit:
                raise ModelError(f"{name} is {value}; it must be at least {least} and below {limit}")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.activation not in ACTIVATIONS:
            raise ModelError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.post_norm:  # allow only what openai-gpt's config.json can express; its "gelu" is our gelu_new
            for name in ("n_inner", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "activation"):
                value, default = getattr(self, name), getattr(GPTConfig, name)
                if value not in (default, "relu", "silu", "swish"):
                    raise ModelError(f"{name} is {value}; post_norm requires {default}")

    @property
    def padded_vocab_size(self) -> int:
        """50257 becomes 50304: matrix products on tensor cores are much slower if a dimension is odd."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        # A dot product of head_dim independent terms of variance 1 has variance head_dim. Unscaled, such scores
        # saturate the softmax and starve it of gradient.
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.attention = causal_attention  # may be replaced by an equivalent function

    def forward(self, x: Tensor, cache: "CacheView | None" = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        if cache is None:
            y = self.attention(qkv, self.scale, self.dropout if self.training else 0.0)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, head_dim) each
            y = cache.attend(self.layer, q, k, v, self.scale).transpose(1, 2)  # (B, T, n_head, head_dim)
        return self.resid_dropout(self.c_proj(y.reshape(B, T, C)))


def causal_attention(qkv: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """What each position gathers from itself and those before, (B, T, n_head, head_dim).

    Args:
        qkv: queries, keys and values (B, T, 3, n_head, head_dim).
        scale: of the scores.
        dropout: the share of the weights to drop.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, head_dim) each
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scale)
    return y.transpose(1, 2)


class MLP(nn.Module):
    """The feed-forward layer, applied to each position by itself."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_inner)
        self.activation = ACTIVATIONS[config.activation]
        self.c_proj = nn.Linear(n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    """One transformer layer: attention gathers from earlier positions, the MLP works on what was gathered.

    GPT-2 is pre-norm: LayerNorm sits inside the branches, so x itself runs from the embedding to the head through
    additions only, and gradients reach every layer undistorted. GPT-1's post-norm rescales x after every sum, which
    makes deep networks hard to train without a careful warmup.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.recompute = False  # in training keep only the block's input, and run the block again in the backward pass
        self.post_norm = config.post_norm
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: "CacheView | None" = None) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(self._forward, x, cache, use_reentrant=False)
        return self._forward(x, cache)

    def _forward(self, x: Tensor, cache: "CacheView | None") -> Tensor:
        if self.post_norm:
            x = self.ln_1(x + self.attn(x, cache))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class KVCache:
    """Keys and values of past tokens in buffers that `GPT.forward` extends: a new token costs one position's work."""

    def __init__(self, config: GPTConfig, batch_size: int, max_len: int, dtype: torch.dtype, device: Device = "cpu"):
        shape = (config.n_layer, batch_size, config.n_head, max_len, config.n_embd // config.n_head)
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.kv_len = 0  # tokens seen so far

    def view(self, T: int) -> "CacheView":
        """The cache as a forward pass over T more tokens uses it."""
        B, kv_len, device = self.k.shape[1], self.kv_len + T, self.k.device
        if kv_len > self.k.shape[3]:
            raise ValueError(f"{T} tokens after {self.kv_len} do not fit a cache of {self.k.shape[3]}")
        positions = torch.arange(self.kv_len, kv_len, device=device).repeat(B, 1)  # (B, T)
        mask = None  # not needed by the first pass, which is plainly causal, nor by one token, which sees everything
        if self.kv_len and T > 1:
            mask = (torch.arange(kv_len, device=device) <= positions[..., None])[:, None]  # (B, 1, T, kv_len)
        return CacheView(self.k, self.v, positions, kv_len, mask)

    def advance(self, T: int) -> None:
        self.kv_len += T


@dataclass(frozen=True)
class CacheView:
    """A KVCache during one forward pass; all layers share it."""

    k: Tensor  # (n_layer, B, n_head, max_len, head_dim)
    v: Tensor
    positions: Tensor  # of the new tokens, int64 (B, T)
    kv_len: int  # keys to attend to
    mask: Tensor | None  # which keys each new token may attend to, (B, 1, T, kv_len)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        new = slice(self.kv_len - k.shape[2], self.kv_len)
        self.k[layer, :, :, new], self.v[layer, :, :, new] = k, v

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store a layer's new keys and values, then attend to all so far; q, k, v, result (B, n_head, T, head_dim)."""
        T = k.shape[2]
        self.store(layer, k, v)
        if self.kv_len > T:
            k, v = (stored[layer, :, :, : self.kv_len] for stored in (self.k, self.v))  # (B, n_head, kv_len, head_dim)
        causal = self.mask is None and T > 1
        y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=self.mask, is_causal=causal, scale=scale)
        return y.to(q.dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats, in float32 or wider; logits (N, vocab_size), targets (N,) with -1 ignored."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=-1)


class GPT(nn.Module):
    """The network. `GPT(config)` is freshly initialized, `GPT.from_pretrained` loads weights."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.cross_entropy = cross_entropy  # the loss; may be replaced by an equivalent function
        self.wte = _embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = _embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h: Any = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.Identity() if config.post_norm else nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        if self.wte.weight.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every parameter from torch's global generator.

        | parameter                             | distribution                                     |
        |---------------------------------------|--------------------------------------------------|
        | matrices, token and position table    | N(0, s), s = initializer_range                   |
        | both `c_proj` of a block              | N(0, s / sqrt(2 * n_layer)), GPT-2 section 2.3   |
        | biases, rows that pad the vocabulary  | 0                                                |
        | LayerNorm                             | weight 1, bias 0                                 |

        The two `c_proj` of every layer write to the residual stream: 2 * n_layer independent terms, whose variances
        add up. Scaling them by 1 / sqrt(2 * n_layer) keeps the sum's variance independent of depth.

        Weights this small make the first logits nearly equal, so the first loss must be close to that of a uniform
        guess, ln(vocab_size): 10.82 for 50,257 tokens. A much larger one means that the initialization is wrong.
        """
        std = self.config.initializer_range
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer) if residual else std)
            else:
                nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)
        for table in {self.wte.weight, self.lm_head.weight}:  # one tensor if tied
            table[self.config.vocab_size :] = 0

    def num_params(self) -> int:
        """Number of parameters as published: tied ones counted once, padding not at all."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        tables = 1 if self.config.tie_word_embeddings else 2
        return sum(p.numel() for p in self.parameters()) - tables * padding

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, forward and backward.

        6N + 12 * L * H * Q * T as in the PaLM paper (appendix B), with N less the position table: a weight takes part
        in one multiply-add forward and two backward.
        """
        c = self.config
        return 6 * (self.num_params() - self.wpe.weight.numel()) + 12 * c.n_layer * c.n_embd * c.block_size

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, last_only: bool = False, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the next token at every position and, given targets, the mean loss.

        Args:
            idx: token ids, int64 (B, T); at most block_size including those in the cache.
            targets: the ids to predict, int64 (B, T); -1 is ignored.
            last_only: compute the last position's logits only, which is all that generation needs.
            cache: keys and values of earlier tokens; this pass appends its own.

        Returns:
            logits (B, T, vocab_size), or (B, 1, vocab_size) with `last_only`; and the loss in nats per token, a scalar
            in float32 or wider, or None without targets.
        """
        x = self.hidden(idx, cache)  # (B, T, n_embd)
        x = self.ln_f(x[:, -1:] if last_only else x)
        if targets is None or x.is_cuda:
            logits = self.lm_head(x)[..., : self.config.vocab_size]  # (B, T, vocab_size)
        else:  # on a CPU an odd vocabulary costs less than copying the cropped logits to make them contiguous
            logits = F.linear(x, self.lm_head.weight[: self.config.vocab_size])  # (B, T, vocab_size)
        loss = None if targets is None else self.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """The last block's output (B, T, n_embd) for idx (B, T)."""
        T = idx.shape[1]
        seen = 0 if cache is None else cache.kv_len
        if seen + T > self.config.block_size:
            raise ValueError(f"{seen + T} tokens do not fit the model's block_size of {self.config.block_size}")
        view = None if cache is None else cache.view(T)
        positions = self.wpe.weight[:T] if view is None else self.wpe(view.positions)  # (T, n_embd) or (B, T, n_embd)
        x = self.drop(self.wte(idx) + positions)  # (B, T, n_embd)
        for block in self.h:
            x = block(x, view)
        if cache is not None:
            cache.advance(T)
        return x

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """idx (B, T) with its continuation, (B, T + max_new_tokens). T must be at least 1.

        This is the plain loop; gpt2_scratch/generation.py does the same faster, and for prompts of different lengths.

        Args:
            temperature, top_k, top_p: see `sample_token`.
            seed: makes the text repeatable; None: different each time.
        """
        B, T = idx.shape
        block_size, weight = self.config.block_size, self.wte.weight
        draws = uniform_draws(seed, range(B), max_new_tokens, weight.device)  # (B, max_new_tokens)
        cache = KVCache(self.config, B, min(T + max_new_tokens, block_size), weight.dtype, weight.device)
        new = idx[:, -block_size:]  # the tokens that the cache lacks: first the prompt, then the last one sampled
        for step in range(max_new_tokens):
            if cache.kv_len == block_size:  # the context is full: start over from its newer half
                cache.kv_len = 0
                new = idx[:, -(block_size // 2 + 1) :]
            logits, _ = self(new, last_only=True, cache=cache)
            new = sample_token(logits[:, -1], draws[:, step], temperature, top_k, top_p)[:, None]  # (B, 1)
            idx = torch.cat([idx, new], dim=1)
        return idx

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | Callable[[GPTConfig], torch.dtype] | None = None,
        device: Device = "cpu",
        block_size: int | None = None,
        **overrides: Any,
    ) -> "GPT":
        """Load a published model, in evaluation mode.

        Args:
            name_or_dir: a Hugging Face id of model type gpt2 or openai-gpt, or a local folder in that layout.
            revision: branch, tag or commit on the hub.
            dtype: of the parameters, or a function of the config that returns it; None: as stored.
            block_size: keep only the first positions.
            overrides: GPTConfig fields that the weights leave open: dropout (0 unless given), vocab_multiple.

        Raises:
            ModelError: not found, no such network, or a tensor (named) is missing, unknown, misshapen or unreadable.
        """
        folder, weights = _model_files(name_or_dir, revision)
        try:
            config = replace(_read_config(folder / "config.json"), **overrides)
            if block_size is not None and block_size > config.block_size:
                raise ModelError(f"block_size {block_size} is more than its {config.block_size} positions")
            with torch.device("meta"):  # shapes without storage: each parameter is allocated when its tensor is read
                model = cls(config)
            dtype = cast(torch.dtype | None, dtype(config) if callable(dtype) else dtype)
            if heads := _load_weights(model, weights, dtype, device):
                print(f"{name_or_dir}: left out what is not the language model: {', '.join(heads)}", file=sys.stderr)
            if block_size is not None:
                model.config = replace(config, block_size=block_size)
                model.wpe = nn.Embedding.from_pretrained(model.wpe.weight[:block_size].clone(), freeze=False)
        except ModelError as error:
            raise ModelError(f"{name_or_dir}: {error}") from error
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, generation_config.json and model.safetensors in transformers' layout."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        layout = (_to_hf(name, p, self.config) for name, p in self.named_parameters())  # which has tied ones once
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in layout}
        try:
            save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(str(error)) from error
        config = config_to_hf(self.config, self.wte.weight.dtype)
        ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        for file, content in {"config.json": config, "generation_config.json": ends}.items():
            (directory / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # safetensors creates its file readable by the owner only; give it the usual permissions.
        shutil.copymode(directory / "config.json", directory / "model.safetensors")


# Sampling


def uniform_draws(seed: int | None, rows: Iterable[int], steps: int, device: torch.device) -> Tensor:
    """Uniform random numbers in [0, 1), one per row and step: (len(rows), steps)."""
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    # Every row number has a generator of its own, so a row's text does not depend on the other rows of its batch.
    sources = [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63) for row in rows]
    return torch.stack([torch.rand(steps, dtype=dtype, generator=source) for source in sources]).to(device)


def sample_token(
    logits: Tensor, draw: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Sample the next token of each row from logits (B, vocab_size): ids (B,).

    Args:
        draw: uniform random numbers in [0, 1), (B,). A row's token is the one whose share of the cumulative
            distribution its number falls into, so the result is a pure function of the arguments.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the smallest set of likeliest tokens whose probabilities sum to top_p (Holtzman et al., "The
            Curious Case of Neural Text Degeneration", 2020, section 3.1).
    """
    if not (temperature >= 0 and (top_k is None or top_k > 0) and (top_p is None or 0 < top_p <= 1)):
        raise ValueError(f"temperature {temperature}, top_k {top_k} or top_p {top_p} is out of range")
    logits = logits.float()
    if temperature == 0:
        return logits.max(dim=-1).indices
    order = None  # token ids of the columns, once these are sorted
    if top_k is not None and top_k < logits.shape[-1]:
        logits, order = logits.topk(top_k)  # (B, top_k), descending
    elif top_p is not None and top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True)
    temperature = max(temperature, 1e-30)  # float32 rounds much smaller ones to 0, and 0 / 0 is NaN
    probs = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    if top_p is not None and top_p < 1:
        drop = probs.cumsum(dim=-1) - probs >= top_p  # the likelier tokens reach top_p without this one
        drop[:, 0] = False
        probs = probs.masked_fill(drop, 0.0)
    cumulative = probs.to(draw.dtype).cumsum(dim=-1)
    column = torch.searchsorted(cumulative, draw[:, None] * cumulative[:, -1:], right=True)  # (B, 1)
    column = column.clamp(max=cumulative.shape[1] - 1)  # NaNs sort last, and an id out of range would crash a GPU
    return (column if order is None else order.gather(1, column))[:, 0]


# Hugging Face files: config.json as transformers' GPT2Config and OpenAIGPTConfig write it, and the weights

# Keys in config.json of GPTConfig's fields, by model type.
SAME = "vocab_size n_layer n_head n_embd layer_norm_epsilon initializer_range tie_word_embeddings eos_token_id".split()
KEYS = {kind: {name: name for name in SAME} | {"block_size": "n_positions"} for kind in ("gpt2", "openai-gpt")}
KEYS["gpt2"] |= {name: name for name in ("n_inner", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")}
KEYS["gpt2"]["activation"], KEYS["openai-gpt"]["activation"] = "activation_function", "afn"

# transformers' defaults where they differ from GPTConfig's.
GPT1_DEFAULTS = {"block_size": 512, "vocab_size": 40478, "activation": "gelu", "post_norm": True}
DEFAULTS: dict[str, dict[str, Any]] = {"gpt2": {"eos_token_id": 50256}, "openai-gpt": GPT1_DEFAULTS}

# transformers' other names for keys; where both are present, these count.
ALIASES = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
ALIASES["max_position_embeddings"] = "n_positions"


def config_from_hf(hf: dict[str, Any]) -> GPTConfig:
    """The GPTConfig for a parsed config.json; missing keys have transformers' defaults. Raises ModelError."""
    kind = str(hf.get("model_type"))
    if kind not in KEYS:
        raise ModelError(f"model_type {hf.get('model_type')!r} is neither gpt2 nor openai-gpt")
    hf = hf | {name: hf[alias] for alias, name in ALIASES.items() if alias in hf}
    values = DEFAULTS[kind] | {ours: hf[theirs] for ours, theirs in KEYS[kind].items() if theirs in hf}
    if values.get("post_norm") and values["activation"] == "gelu":
        values["activation"] = "gelu_new"  # GPT-1's code calls the tanh form "gelu"
    if isinstance(ends := values.get("eos_token_id"), list):
        values["eos_token_id"] = ends[0] if ends else None
    return GPTConfig(**values)


def config_to_hf(config: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The inverse of `config_from_hf`, with the other keys that transformers and llama.cpp (n_ctx) expect."""
    kind = "openai-gpt" if config.post_norm else "gpt2"
    hf: dict[str, Any] = {"model_type": kind, "dtype": str(dtype).removeprefix("torch.")}
    hf |= {"architectures": ["OpenAIGPTLMHeadModel" if config.post_norm else "GPT2LMHeadModel"]}
    hf |= {"bos_token_id": config.eos_token_id, "n_ctx": config.block_size}
    hf |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout)
    hf |= {theirs: getattr(config, ours) for ours, theirs in KEYS[kind].items()}
    if config.post_norm and config.activation == "gelu_new":
        hf["afn"] = "gelu"
    return hf


def _to_hf(name: str, tensor: Tensor, config: GPTConfig) -> tuple[str, Tensor]:
    """A parameter under transformers' name and in its layout, without the vocabulary's padding."""
    if name in ("wte.weight", "lm_head.weight"):
        tensor = tensor[: config.vocab_size]
    elif name.startswith("h.") and tensor.dim() == 2:
        tensor = tensor.t()  # transformers' Conv1D stores (in, out), nn.Linear (out, in)
    if config.post_norm:
        name = name.replace("wte.", "tokens_embed.").replace("wpe.", "positions_embed.")
    return name if name == "lm_head.weight" else f"transformer.{name}", tensor


def _embedding(rows: int, width: int) -> nn.Embedding:
    """nn.Embedding. Its random initialization on the meta device would import torch._dynamo, which takes seconds."""
    if torch.get_default_device().type == "meta":
        return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
    return nn.Embedding(rows, width)


def _model_files(name_or_dir: str | Path, revision: str | None) -> tuple[Path, list[Path]]:
    """A model's folder and weights, downloaded if need be; pickled weights only if it has no others."""
    for name, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, shards = f"{name}.{suffix}", f"{name}-?????-of-?????.{suffix}"
        folder = Path(name_or_dir)
        if not os.path.isdir(name_or_dir):
            from huggingface_hub import snapshot_download

            files = ["config.json", single, shards]
            try:
                folder = Path(snapshot_download(str(name_or_dir), revision=revision, allow_patterns=files))
            except (OSError, ValueError) as error:
                why = str(error).strip().partition("\n")[0]
                raise ModelError(f"{name_or_dir} is not a folder and cannot be loaded from the hub: {why}") from error
        if paths := sorted(folder.glob(single)) or sorted(folder.glob(shards)):
            return folder, paths
    raise ModelError(f"{name_or_dir} has no weights: neither model.safetensors nor pytorch_model.bin")


def _read_config(path: Path) -> GPTConfig:
    try:
        return config_from_hf(dict(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"config.json cannot be used: {error}") from error


def _stored_tensors(paths: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of each file, the largest first, so that conversion copies don't raise the peak of memory."""
    for path in paths:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    sizes = {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}
                for key in sorted(sizes, key=lambda key: (sizes[key], key), reverse=True):
                    # Reopened for every tensor: pages read from a mapped file count as memory until it is closed.
                    with safe_open(path, framework="pt") as file:
                        yield key, file.get_tensor(key)
            else:
                mmap = zipfile.is_zipfile(path)  # torch before 1.6 wrote another format, which cannot be mapped
                state = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)  # a pickle could run code
                for key in sorted(state, key=lambda key: (state[key].numel(), key), reverse=True):
                    yield str(key), state.pop(key).detach().cpu().contiguous()  # raises for sparse and meta tensors
        except Exception as error:  # on a damaged file torch raises half a dozen kinds
            why = str(error).partition("\n")[0]
            raise ModelError(f"{path.name} is damaged, or has more than tensors and could run code: {why}") from error


def _load_weights(model: GPT, files: list[Path], dtype: torch.dtype | None, device: Device) -> list[str]:
    """Load a model that is on the meta device. Returns names left out: heads for values, choices or classes."""
    config, parameters = model.config, dict(model.named_parameters())
    ours = {_to_hf(name, p, config)[0].removeprefix("transformer."): name for name, p in parameters.items()}
    roots = {name.partition(".")[0] for name in ours} | {"transformer", "lm_head"}
    if config.tie_word_embeddings:
        ours["lm_head.weight"] = "wte.weight"
    loaded: dict[str, Tensor] = {}
    others = []
    for key, tensor in _stored_tensors(files):
        # Conversions from TensorFlow say gamma and beta. Older versions of transformers stored masks and positions.
        name = key.removeprefix("transformer.").replace(".gamma", ".weight").replace(".beta", ".bias")
        if name not in ours:
            if name != "position_ids" and not name.endswith((".attn.bias", ".attn.masked_bias")):
                others.append(key)
            continue
        own = ours[name]
        shape = _to_hf(own, parameters[own], config)[1].shape
        if tensor.shape != shape:
            raise ModelError(f"{name} has shape {tuple(tensor.shape)}, but config.json implies {tuple(shape)}")
        if not tensor.is_floating_point():
            raise ModelError(f"{name} has dtype {tensor.dtype}, which is not a floating-point type")
        dtype = dtype or tensor.dtype
        parameter = torch.zeros(parameters[own].shape, dtype=dtype, device=device)
        _to_hf(own, parameter, config)[1].copy_(tensor)  # into a view of it in the file's layout
        if own in loaded and not torch.equal(loaded[own], parameter):
            raise ModelError(f"{name} differs from another tensor for {own} (tied, or stored twice)")
        loaded[own] = parameter
    if missing := [name for name in ours if ours[name] not in loaded]:
        raise ModelError(f"lacks the tensor {missing[0]} ({len(parameters) - len(loaded)} missing)")
    if unknown := [key.removeprefix("transformer.") for key in others if key.partition(".")[0] in roots]:
        raise ModelError(f"has the tensor {min(unknown)}, which no GPT has ({len(unknown)} left over)")
    model.load_state_dict(loaded, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.wte.weight
    return sorted(others)
