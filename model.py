"""GPT-1 and GPT-2: network, initialisation, loss, published weights in and out, text generation.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3, describes
GPT-2; "Improving Language Understanding by Generative Pre-Training" (2018), section 4.1, GPT-1.
Shapes are written with B sequences, T positions and n_embd = n_head * head_dim channels.
"""

import json
import math
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# transformers' names of the activations that published checkpoints use.
ACTIVATIONS = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}

# openai-gpt's config.json can say no more than this; its "gelu" is our gelu_new.
GPT1_VALUES = {
    "n_inner": (None,),
    "activation": ("gelu_new", "relu", "silu", "swish"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}


class ModelError(ValueError):
    """A config or checkpoint that this network cannot represent, or that is damaged."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a network. The defaults are GPT-2 124M."""

    block_size: int = 1024  # positions
    vocab_size: int = 50257  # token ids the outside sees
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # of embeddings, attention weights and both residual branches, as in GPT-2
    n_inner: int | None = None  # width of the feed-forward layer; None: 4 * n_embd
    activation: str = "gelu_new"  # a key of ACTIVATIONS
    layer_norm_epsilon: float = 1e-5
    post_norm: bool = False  # GPT-1: LayerNorm after each residual sum and none at the end
    tie_word_embeddings: bool = True  # the head shares the token embedding's weights
    scale_attn_weights: bool = True  # attention scores divided by sqrt(head_dim)
    scale_attn_by_inverse_layer_idx: bool = False  # and by the layer's number, counted from 1
    eos_token_id: int | None = None  # <|endoftext|>, where the vocabulary has one
    initializer_range: float = 0.02  # standard deviation of fresh weights; narrow models want more
    vocab_multiple: int = 64  # rows of the embedding are padded to this; never seen outside

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            right = isinstance(value, (int, float) if kind is float else kind)
            if not right or (isinstance(value, bool) and kind is not bool):
                raise ModelError(f"{field.name} is {value!r}; it must be {getattr(kind, '__name__', kind)}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "vocab_multiple"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ModelError(f"{name} is {getattr(self, name)}; it must be at least 1 and below 2**31")
        if self.n_layer > 10_000:  # such as a damaged file may name; building them would take all memory
            raise ModelError(f"n_layer is {self.n_layer}; it must be at most 10,000")
        if self.n_inner is not None and not 1 <= self.n_inner < 2**31:
            raise ModelError(f"n_inner is {self.n_inner}; it must be at least 1 and below 2**31")
        for name in ("layer_norm_epsilon", "initializer_range"):
            if not getattr(self, name) >= 0:
                raise ModelError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.activation not in ACTIVATIONS:
            raise ModelError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        for name, values in GPT1_VALUES.items():
            if self.post_norm and getattr(self, name) not in values:
                raise ModelError(f"{name} is {getattr(self, name)!r}; with post_norm it must be one of {values}")

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, past: "Past | None" = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, n_head, T, head_dim) each
        if past is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=self.scale)
        else:
            y = past.attend(self.layer, q, k, v, self.scale)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, n_embd)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Position-wise feed-forward layer."""

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
    """One transformer layer: pre-norm in GPT-2, post-norm in GPT-1.

    Attributes:
        recompute: in training keep only the input, and compute the rest again in the backward pass.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.recompute = False
        self.post_norm = config.post_norm
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: "Past | None" = None) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(self._forward, x, past, use_reentrant=False)
        return self._forward(x, past)

    def _forward(self, x: Tensor, past: "Past | None") -> Tensor:
        if self.post_norm:
            x = self.ln_1(x + self.attn(x, past))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class KVCache:
    """Keys and values of the tokens seen so far, in fixed buffers; `GPT.forward` reads and fills it.

    Rows may have seen different numbers of tokens: after a pass over rows padded on the right, `set_length` says
    the true ones. What padding wrote lies beyond them, is never attended to, and is overwritten.

    Args:
        config: of the model.
        batch_size: rows.
        max_len: tokens that fit.
        static: attend over the whole buffer, masked, so that every step has the same shapes and can be
            compiled; else only over the part in use.

    Attributes:
        k, v: (n_layer, batch_size, n_head, max_len, head_dim).
        length: tokens seen, int64 (batch_size,).
        extent: no row has seen more; known without asking the device, and kept only if not static.
        even: all rows have seen as many; likewise.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_len: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        static: bool = False,
    ):
        shape = (config.n_layer, batch_size, config.n_head, max_len, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.extent = 0
        self.even = True
        self.static = static

    def past(self, T: int) -> "Past":
        """What a pass over T more tokens of each row needs.

        Raises:
            ValueError: they do not fit.
        """
        max_len = self.k.shape[3]
        if self.extent + T > max_len:
            raise ValueError(f"{T} tokens after {self.extent} do not fit a cache of {max_len}")
        positions = self.length[:, None] + torch.arange(T, device=self.length.device)  # (B, T)
        S = max_len if self.static else self.extent + T
        even = self.even and not self.static
        mask = None  # plain causal attention among the new tokens, or of one to all
        if self.static or (self.extent > 0 and not (even and T == 1)):
            keys = torch.arange(S, device=self.length.device)
            mask = (keys <= positions[..., None])[:, None]
        return Past(self.k, self.v, positions, S, even, mask)

    def set_length(self, seen: list[int]) -> None:
        """Say how many tokens each row has seen; at most as many as were passed."""
        self.length.copy_(torch.tensor(seen))
        if not self.static:
            self.extent, self.even = max(seen), len(set(seen)) == 1

    def advance(self, T: int) -> None:
        self.length += T
        if not self.static:
            self.extent += T


@dataclass(frozen=True)
class Past:
    """The cache as one pass sees it."""

    k: Tensor  # (n_layer, B, n_head, max_len, head_dim)
    v: Tensor
    positions: Tensor  # of the new tokens, int64 (B, T)
    S: int  # keys to attend to
    even: bool  # all rows have the same positions, which end with S
    mask: Tensor | None  # which of the first S keys each new token attends to, (B, 1, T, S)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store a layer's new keys and values, and attend with its queries; all are (B, n_head, T, head_dim).

        Past the first pass the computation is in the dtype of the cache.
        """
        T, S = k.shape[2], self.S
        kept_k, kept_v = self.k[layer, :, :, :S], self.v[layer, :, :, :S]
        if self.even:
            kept_k[:, :, S - T :], kept_v[:, :, S - T :] = k, v
        else:
            rows = torch.arange(len(k), device=k.device)[:, None]
            layers = torch.full_like(rows, layer)  # a tensor as well: else compiled code copies the whole cache
            for kept, new in ((self.k, k), (self.v, v)):
                kept[layers, rows, :, self.positions] = new.transpose(1, 2).to(kept.dtype)  # (B, T, n_head, head_dim)
        if S > T:
            k, v = kept_k, kept_v  # (B, n_head, S, head_dim)
        causal = self.mask is None and T > 1
        y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=self.mask, is_causal=causal, scale=scale)
        return y.to(q.dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean loss in nats, of at least float32; logits (N, vocab_size), targets (N,), of which -1 do not count."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=-1)


class GPT(nn.Module):
    """The network. `GPT(config)` is freshly initialised, `GPT.from_pretrained` loads weights.

    Attributes:
        cross_entropy: makes the loss of logits and targets.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.cross_entropy = cross_entropy
        self.wte = _embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = _embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.Identity() if config.post_norm else nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        if self.wte.weight.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every parameter anew from torch's global generator.

        | parameter                          | distribution                                        |
        |------------------------------------|-----------------------------------------------------|
        | matrices, token and position table | N(0, s), s = initializer_range                      |
        | both `c_proj` of a block           | N(0, s / sqrt(2 * n_layer)), GPT-2 section 2.3      |
        | biases, padded rows                | 0                                                   |
        | LayerNorm                          | weight 1, bias 0                                    |
        """
        std = self.config.initializer_range
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer) if residual else std)
            else:
                nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)
        for p in {self.wte.weight, self.lm_head.weight}:
            p[self.config.vocab_size :] = 0

    def num_params(self) -> int:
        """Parameters without the padding, tied ones counted once: the published figure."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        tables = 1 if self.config.tie_word_embeddings else 2
        return sum(p.numel() for p in self.parameters()) - tables * padding

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, forward and backward.

        6N + 12 * L * H * Q * T of the PaLM paper (appendix B), N without the position table.
        """
        c = self.config
        return 6 * (self.num_params() - self.wpe.weight.numel()) + 12 * c.n_layer * c.n_embd * c.block_size

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, last_only: bool = False, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the next token at every position, and the mean loss if targets are given.

        Args:
            idx: token ids, int64 (B, T); with those in the cache at most block_size.
            targets: ids to predict, int64 (B, T); positions of -1 do not count.
            last_only: compute the logits of the last position alone.
            cache: keys and values of the tokens before these; this pass adds its own.

        Returns:
            logits (B, T, vocab_size), or (B, 1, vocab_size) with `last_only`; and the loss in nats
            per token, a scalar of at least float32, or None without targets.
        """
        x = self.hidden(idx, cache)  # (B, T, n_embd)
        x = self.ln_f(x[:, -1:] if last_only else x)
        if targets is None or x.is_cuda:
            logits = self.lm_head(x)[..., : self.config.vocab_size]  # (B, T, vocab_size), padding cut off
        else:  # here an odd size costs less than the copies that cutting makes
            logits = F.linear(x, self.lm_head.weight[: self.config.vocab_size])
        if targets is None:
            return logits, None
        return logits, self.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """The last block's output (B, T, n_embd) for idx (B, T)."""
        T = idx.shape[1]
        before = 0 if cache is None else cache.extent
        if before + T > self.config.block_size:
            raise ValueError(f"{before + T} tokens do not fit the model's block_size of {self.config.block_size}")
        past = None if cache is None else cache.past(T)
        x = self.wte(idx) + (self.wpe.weight[:T] if past is None else self.wpe(past.positions))
        x = self.drop(x)  # (B, T, n_embd)
        for block in self.h:
            x = block(x, past)
        if cache is not None:
            cache.advance(T)
        return x

    def generate(self, idx: Tensor, max_new_tokens: int, **sampling: Any) -> Tensor:
        """idx (B, T) with its continuation, (B, T + max_new_tokens); keyword arguments as of `Generation`."""
        if max_new_tokens == 0:
            return idx
        writing = Generation(self, idx.tolist(), max_new_tokens, **sampling)
        return torch.cat([idx, *(writing.step()[0][:, None] for _ in range(max_new_tokens))], dim=1)

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        block_size: int | None = None,
        **overrides: Any,
    ) -> "GPT":
        """A model with published weights, in evaluation mode.

        Args:
            name_or_dir: "gpt2", "openai-gpt" or any Hugging Face id of model type gpt2 or openai-gpt,
                or a local folder in that layout.
            revision: branch, tag or commit on the hub.
            dtype: of the parameters; None: as stored.
            block_size: keep only the first positions.
            overrides: fields of GPTConfig that weights do not fix: dropout (0 unless given), vocab_multiple.

        Raises:
            ModelError: nothing there, another architecture, a field that GPTConfig cannot represent, or a
                tensor missing, left over, of the wrong shape or unreadable; the text names it.
        """
        config_path = _find(name_or_dir, "config.json", revision)
        if config_path is None:
            raise ModelError(f"{name_or_dir} has no config.json; it is not a Hugging Face model")
        stored = config_from_hf(_read_json(config_path))
        if block_size is not None and block_size > stored.block_size:
            raise ModelError(f"block_size {block_size} is more than the {stored.block_size} positions of {name_or_dir}")
        config = replace(stored, block_size=stored.block_size if block_size is None else block_size, **overrides)
        with torch.device("meta"):
            model = cls(config)

        source = _open_weights(name_or_dir, revision)
        keys = {ours: _hf_name(ours, config).removeprefix("transformer.") for ours in model.state_dict()}
        tied_head = None
        if config.tie_word_embeddings:
            del keys["lm_head.weight"]
            tied_head = source.pop("lm_head.weight", None)
        if missing := sorted(set(keys.values()) - set(source)):
            raise ModelError(f"{name_or_dir} lacks the tensor {missing[0]} ({len(missing)} missing)")
        if extra := sorted(set(source) - set(keys.values())):
            raise ModelError(f"{name_or_dir} has the tensor {extra[0]}, which no GPT has ({len(extra)} left over)")

        # The largest first: its second copy, alive while it is converted, must not top a full model.
        shapes = {ours: tuple(p.shape) for ours, p in model.state_dict().items()}
        for ours in sorted(keys, key=lambda name: -math.prod(shapes[name])):
            tensor = source[keys[ours]]()
            if not tensor.is_floating_point():
                raise ModelError(f"{name_or_dir}: {keys[ours]} has dtype {tensor.dtype}, which is no floating point")
            expected = list(reversed(shapes[ours]) if _is_conv1d(ours) else shapes[ours])
            if ours == "wpe.weight":
                expected[0] = stored.block_size
            elif ours in ("wte.weight", "lm_head.weight"):
                expected[0] = config.vocab_size
            if list(tensor.shape) != expected:
                raise ModelError(
                    f"{name_or_dir}: {keys[ours]} has shape {tuple(tensor.shape)}, config.json wants {tuple(expected)}"
                )
            if ours == "wte.weight" and tied_head and not torch.equal(tied_head().to(tensor.dtype), tensor):
                raise ModelError(
                    f"{name_or_dir}: lm_head.weight differs from the embedding that config.json ties it to"
                )
            tensor = tensor.t() if _is_conv1d(ours) else tensor
            dtype = dtype or tensor.dtype
            parameter = torch.zeros(shapes[ours], dtype=dtype, device=device)
            rows = min(len(parameter), len(tensor))
            parameter[:rows] = tensor[:rows]
            module, _, attribute = ours.rpartition(".")
            setattr(model.get_submodule(module), attribute, nn.Parameter(parameter))
        if config.tie_word_embeddings:
            model.lm_head.weight = model.wte.weight
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, generation_config.json and model.safetensors as transformers lays them out."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for ours, tensor in self.state_dict().items():
            if ours == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if ours in ("wte.weight", "lm_head.weight"):
                tensor = tensor[: self.config.vocab_size]
            tensor = tensor.t() if _is_conv1d(ours) else tensor
            tensors[_hf_name(ours, self.config)] = tensor.detach().cpu().contiguous()
        try:
            save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        except SafetensorError as error:  # what the disk refuses, in the library's own kind
            raise OSError(str(error)) from error
        config = config_to_hf(self.config, self.wte.weight.dtype)
        _write_json(directory / "config.json", config)
        # The library lets nobody else read its file; take what the umask gives others.
        shutil.copymode(directory / "config.json", directory / "model.safetensors")
        ends = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
        _write_json(directory / "generation_config.json", ends)


class Generation:
    """Rows of text being written: `step` gives each live row its next token, `end` takes rows out.

    A row's text depends on its prompt, the settings and its seed, not on the rows beside it. When a row has
    filled the context, its newest block_size // 2 tokens are kept and the cache is filled from them anew.

    Args:
        model: with weights of the dtype to compute in.
        prompts: ids of each row, at least one; of a longer one the last block_size count.
        max_new_tokens: how often `step` can be called.
        temperature, top_k, top_p: as of `sample_token`.
        seed: the rows' random numbers come from it and `row_numbers`; None: others each time.
        row_numbers: tell rows of one seed apart; None: 0, 1, ...
        compile: run the steps through torch.compile, with CUDA graphs on CUDA.

    Attributes:
        live: the rows that `step` answers for, counted from 0 in `prompts`.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: GPT,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        row_numbers: list[int] | None = None,
        compile: bool = False,
    ):
        if not prompts or not all(prompts):
            raise ValueError("there is no prompt, or one has no token; begin it with <|endoftext|>")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if not (temperature >= 0 and (top_k is None or top_k > 0) and (top_p is None or 0 < top_p <= 1)):
            raise ValueError(f"temperature {temperature}, top_k {top_k} or top_p {top_p} is out of range")
        self.model = model
        self.device = model.wte.weight.device
        self.sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.live = list(range(len(prompts)))
        self.slots = list(self.live)  # where the live rows are in the tensors below
        prompts = [prompt[-model.config.block_size :] for prompt in prompts]

        # One number a row and step decides its token, so a row draws the same whatever stands beside it.
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        draws = []
        for number in self.live if row_numbers is None else row_numbers:
            source = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
            draws.append(torch.rand(max_new_tokens, dtype=wide, generator=source))
        self.draws = torch.stack(draws).to(self.device)  # (B, max_new_tokens)
        self.steps = 0

        # All but a prompt's last token fill the cache; the last one is the first step's input.
        self.totals = [len(prompt) for prompt in prompts]  # tokens a row has
        longest = max(self.totals)
        ids = torch.zeros(len(prompts), longest + max_new_tokens, dtype=torch.int64)
        for row, prompt in zip(ids, prompts):
            row[: len(prompt)] = torch.tensor(prompt)
        self.ids = ids.to(self.device)  # (B, longest + max_new_tokens)
        self.rows = torch.arange(len(prompts), device=self.device)
        self.column = torch.tensor(self.totals, device=self.device)  # of `ids`, where a row's next token goes
        max_len = min(longest + max_new_tokens, model.config.block_size)
        dtype = model.wte.weight.dtype
        self.cache = KVCache(model.config, len(prompts), max_len, dtype=dtype, device=self.device, static=compile)
        self.cached = [0] * len(prompts)  # tokens a row has in the cache
        self._fill(self.slots, [total - 1 for total in self.totals])
        self.decode = self._decode
        if compile:
            for buffer in (self.cache.k, self.cache.v, self.cache.length):
                torch._dynamo.mark_static_address(buffer)
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.decode = torch.compile(self._decode, mode=mode)
        self.coming = self._next(self.ids[self.rows, self.column - 1])

    @torch.inference_mode()
    def step(self) -> tuple[Tensor, Tensor]:
        """The next token of each live row, int64 (live,), and its log-probability under the model, float32 (live,)."""
        tokens, logprobs = self.coming
        if self.steps < self.draws.shape[1]:
            self.coming = self._next(tokens)  # launched before the caller waits for these, so no time is lost
        if len(self.slots) == len(tokens):
            return tokens, logprobs
        return tokens[self.slots], logprobs[self.slots]

    @torch.inference_mode()
    def end(self, rows: set[int]) -> None:
        """Take rows out. They stop costing, except in compiled steps, whose shapes are fixed."""
        staying = [i for i, row in enumerate(self.live) if row not in rows]
        self.live = [self.live[i] for i in staying]
        self.slots = [self.slots[i] for i in staying]
        if not self.live or self.cache.static:
            return
        cache, slots = self.cache, torch.tensor(self.slots, device=self.device)
        cache.k, cache.v, cache.length = cache.k[:, slots], cache.v[:, slots], cache.length[: len(slots)]
        self.ids, self.draws = self.ids[slots], self.draws[slots]
        self.rows, self.column = self.rows[: len(slots)], self.column[slots]
        self.coming = (self.coming[0][slots], self.coming[1][slots])
        self.totals = [self.totals[i] for i in self.slots]
        self.cached = [self.cached[i] for i in self.slots]
        cache.set_length(self.cached)
        self.slots = list(range(len(self.live)))

    def _next(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Feed each row its newest token: the following one and its log-probability, (B,) each."""
        block_size = self.model.config.block_size
        if full := [i for i, cached in enumerate(self.cached) if cached == block_size]:
            self._fill(full, [block_size // 2] * len(full))
        if self.cache.static and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        tokens, logprobs = self.decode(tokens, self.draws[:, self.steps])
        if self.cache.static:  # the graph's own outputs are overwritten by its next run
            tokens, logprobs = tokens.clone(), logprobs.clone()
        self.steps += 1
        self.cached = [cached + 1 for cached in self.cached]
        self.ids[self.rows, self.column] = tokens
        self.column += 1
        self.totals = [total + 1 for total in self.totals]
        return tokens, logprobs

    def _decode(self, tokens: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        logits, _ = self.model(tokens[:, None], last_only=True, cache=self.cache)
        logits = logits[:, 0].float()  # (B, vocab_size)
        tokens = sample_token(logits, draw, **self.sampling)
        return tokens, logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=1)

    def _fill(self, slots: list[int], counts: list[int]) -> None:
        """Fill the cache of these slots with so many of their newest tokens, the very last one left out."""
        T = max(counts)
        fresh = KVCache(self.model.config, len(slots), T, dtype=self.cache.k.dtype, device=self.device)
        if T:
            idx = torch.zeros(len(slots), T, dtype=torch.int64, device=self.device)
            for row, slot, count in zip(idx, slots, counts):
                end = self.totals[slot] - 1
                row[:count] = self.ids[slot, end - count : end]
            self.model.hidden(idx, fresh)
        self.cache.k[:, slots, :, :T] = fresh.k
        self.cache.v[:, slots, :, :T] = fresh.v
        for slot, count in zip(slots, counts):
            self.cached[slot] = count
        self.cache.set_length(self.cached)


def sample_token(
    logits: Tensor,
    draw: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Draw the next token of each row of logits (B, vocab_size): ids (B,).

    Args:
        draw: a uniform random number in [0, 1) for each row, (B,); the token is where it falls among the
            cumulated probabilities, so that it alone decides.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the fewest likeliest tokens that hold this share of the probability (Holtzman
            et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1).
    """
    if temperature == 0:
        return logits.max(dim=-1).indices
    order = None  # the ids of the columns, where they are sorted
    if top_k is not None and top_k < logits.shape[-1]:
        logits, order = logits.topk(top_k)  # (B, top_k), descending
    elif top_p is not None and top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True)
    logits = logits.float()
    temperature = max(temperature, 1e-30)  # float32 rounds much smaller ones to 0, and 0 / 0 is no number
    probs = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    if top_p is not None and top_p < 1:
        drop = probs.cumsum(dim=-1) - probs >= top_p  # the likelier tokens hold that share already
        drop[:, 0] = False
        probs = probs.masked_fill(drop, 0.0)
    cumulated = probs.to(draw.dtype).cumsum(dim=-1)
    column = torch.searchsorted(cumulated, draw[:, None] * cumulated[:, -1:], right=True)  # (B, 1)
    column = column.clamp(max=cumulated.shape[1] - 1)  # NaNs sort last, and an id beyond the end stops a GPU
    return (column if order is None else order.gather(1, column))[:, 0]


# Hugging Face files. GPT-2's config.json: transformers' GPT2Config; GPT-1's: OpenAIGPTConfig.

# Fields that change the numbers and that GPTConfig does not represent, with the values that change nothing.
UNSUPPORTED = {"add_cross_attention": False, "quantization_config": None, "pruned_heads": {}}


def config_from_hf(hf: dict[str, Any]) -> GPTConfig:
    """The GPTConfig of a parsed config.json. A key that is absent has transformers' default.

    Raises:
        ModelError: another model type, a field that GPTConfig does not represent, or a wrong value.
    """
    kind = hf.get("model_type")
    if kind not in ("gpt2", "openai-gpt"):
        raise ModelError(f"config.json says model_type {kind!r}; gpt2 and openai-gpt can be loaded")
    for field, harmless in UNSUPPORTED.items():
        if hf.get(field, harmless) not in (harmless, None):
            raise ModelError(f"config.json sets {field} to {hf[field]!r}, which this model does not represent")
    gpt1 = kind == "openai-gpt"
    activation = hf.get("afn", "gelu") if gpt1 else hf.get("activation_function", "gelu_new")
    if gpt1 and activation == "gelu":
        activation = "gelu_new"  # GPT-1's code calls the tanh form "gelu"
    if activation not in tuple(ACTIVATIONS):  # a tuple: JSON's lists have no hash
        field = "afn" if gpt1 else "activation_function"
        raise ModelError(f"config.json sets {field} to {activation!r}; supported are {', '.join(ACTIVATIONS)}")
    try:
        return GPTConfig(
            block_size=hf.get("n_positions", 512 if gpt1 else 1024),
            vocab_size=hf.get("vocab_size", 40478 if gpt1 else 50257),
            n_layer=hf.get("n_layer", 12),
            n_head=hf.get("n_head", 12),
            n_embd=hf.get("n_embd", 768),
            n_inner=None if gpt1 else hf.get("n_inner"),
            activation=activation,
            layer_norm_epsilon=hf.get("layer_norm_epsilon", 1e-5),
            post_norm=gpt1,
            tie_word_embeddings=hf.get("tie_word_embeddings", True),
            scale_attn_weights=gpt1 or hf.get("scale_attn_weights", True),
            scale_attn_by_inverse_layer_idx=not gpt1 and hf.get("scale_attn_by_inverse_layer_idx", False),
            eos_token_id=hf.get("eos_token_id", None if gpt1 else 50256),
            initializer_range=hf.get("initializer_range", 0.02),
        )
    except ModelError as error:
        raise ModelError(f"config.json: {error}") from error


def config_to_hf(config: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The inverse of `config_from_hf`, with what transformers wants besides."""
    hf: dict[str, Any] = {
        "architectures": ["OpenAIGPTLMHeadModel" if config.post_norm else "GPT2LMHeadModel"],
        "model_type": "openai-gpt" if config.post_norm else "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.eos_token_id,
        "eos_token_id": config.eos_token_id,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if config.post_norm:
        return hf | {"afn": "gelu" if config.activation == "gelu_new" else config.activation}
    return hf | {
        "activation_function": config.activation,
        "n_inner": config.n_inner,
        "scale_attn_weights": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
    }


def _embedding(rows: int, width: int) -> nn.Embedding:
    """nn.Embedding; without its first drawing on the meta device, which would import torch._dynamo: two seconds."""
    if torch.get_default_device().type == "meta":
        return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
    return nn.Embedding(rows, width)


def _is_conv1d(name: str) -> bool:
    """Whether transformers stores this weight as (in, out), the transpose of nn.Linear's."""
    return name.startswith("h.") and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def _hf_name(name: str, config: GPTConfig) -> str:
    if name == "lm_head.weight":
        return name
    if config.post_norm:
        name = name.replace("wte.", "tokens_embed.").replace("wpe.", "positions_embed.")
    return f"transformer.{name}"


def _find(name_or_dir: str | Path, file: str, revision: str | None) -> Path | None:
    """Where a file of a local folder or of a hub model lies on this disk; None if the model lacks it."""
    if os.path.isdir(name_or_dir):
        path = Path(name_or_dir) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(name_or_dir), file, revision=revision))
    except LocalEntryNotFoundError as error:
        if file != "config.json":
            return None  # offline, and this one of several possible files is not in the cache
        raise ModelError(
            f"{name_or_dir} is neither a folder nor in the Hugging Face cache, and the hub cannot be reached"
        ) from error
    except EntryNotFoundError:
        return None
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{name_or_dir} is not a folder and cannot be had from the hub: {reason}") from error


def _open_weights(name_or_dir: str | Path, revision: str | None) -> dict[str, Callable[[], Tensor]]:
    """For each tensor stored, under its name without old spellings, a function that reads it."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if path := _find(name_or_dir, single, revision):
            paths = [path]
            break
        if index := _find(name_or_dir, f"{single}.index.json", revision):
            weight_map = _read_json(index).get("weight_map")
            if not weight_map or not isinstance(weight_map, dict) or {type(v) for v in weight_map.values()} != {str}:
                raise ModelError(f"{index} has no weight_map from tensors to files")
            shards = sorted(set(weight_map.values()))
            for path in map(PureWindowsPath, shards):  # it knows both separators and drives
                if path.anchor or ".." in path.parts:
                    raise ModelError(f"{index} names {path.as_posix()}, which is outside its folder")
            found = {shard: _find(name_or_dir, shard, revision) for shard in shards}
            for shard, path in found.items():
                if path is None:
                    raise ModelError(f"{name_or_dir} lacks {shard}, which its index names")
            paths = [path for path in found.values() if path]
            break
    else:
        raise ModelError(f"{name_or_dir} has no weights: neither model.safetensors nor pytorch_model.bin")
    source: dict[str, Callable[[], Tensor]] = {}
    for path in paths:
        for key, read in _open_file(path).items():
            name = key.removeprefix("transformer.").replace(".gamma", ".weight").replace(".beta", ".bias")
            # Causal masks, and GPT-1's position numbers, which older versions of transformers stored.
            if name != "position_ids" and not name.endswith((".attn.bias", ".attn.masked_bias")):
                source[name] = read
    return source


def _open_file(path: Path) -> dict[str, Callable[[], Tensor]]:
    """A function for each tensor of a file. The pages of a mapped file count as memory until it is closed, so
    files are opened anew as reading goes on."""
    if path.suffix == ".safetensors":

        def read_safetensors(key: str) -> Tensor:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key)

        try:
            with safe_open(path, framework="pt") as file:
                return {key: partial(read_safetensors, key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged or no safetensors file: {error}") from error

    state, mapped = _load_pickle(path)
    copy = None
    if not mapped:  # write it anew in the format that can be, or memory would hold the weights twice in part
        copy = tempfile.TemporaryDirectory()
        path = Path(copy.name) / path.name
        torch.save(state, path)
        state, _ = _load_pickle(path)
    n_read, limit = 0, path.stat().st_size // 50

    def read_pickle(key: str, copy: tempfile.TemporaryDirectory | None = copy) -> Tensor:  # keeps the copy alive
        nonlocal state, n_read
        if n_read > limit:
            state, n_read = _load_pickle(path)[0], 0
        n_read += state[key].nbytes
        return state[key]

    return {key: partial(read_pickle, key) for key in state}


def _load_pickle(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a PyTorch file, and whether they are mapped from it rather than in memory."""
    try:
        try:
            state, mapped = torch.load(path, map_location="cpu", weights_only=True, mmap=True), True
        except RuntimeError:  # the format before torch 1.6, which cannot be mapped
            state, mapped = torch.load(path, map_location="cpu", weights_only=True), False
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors or is damaged; it was not opened, as it could run code"
        ) from error
    except Exception as error:  # torch raises half a dozen kinds on a damaged file
        raise ModelError(f"{path} is damaged or no PyTorch file: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path} is not a dictionary of tensors")
    return state, mapped


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
