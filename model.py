"""GPT-1 and GPT-2: network, initialisation, loss, published weights in and out, text generation.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3, describes
GPT-2; "Improving Language Understanding by Generative Pre-Training" (2018), section 4.1, GPT-1.
Shapes are written with B sequences, T positions and n_embd = n_head * head_dim channels.
"""

import json
import math
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
                raise ValueError(f"{field.name} is {value!r}; it must be {getattr(kind, '__name__', kind)}")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_inner is not None and self.n_inner < 1:
            raise ValueError(f"n_inner is {self.n_inner}; it must be at least 1")
        for name in ("layer_norm_epsilon", "initializer_range"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        for name, values in GPT1_VALUES.items():
            if self.post_norm and getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; with post_norm it must be one of {values}")

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, n_head, T, head_dim) each
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0, scale=self.scale
        )
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
    """One transformer layer: pre-norm in GPT-2, post-norm in GPT-1."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.post_norm = config.post_norm
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = self.ln_1(x + self.attn(x))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The network. `GPT(config)` is freshly initialised, `GPT.from_pretrained` loads weights."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
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
        self, idx: Tensor, targets: Tensor | None = None, last_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the next token at every position, and the mean loss if targets are given.

        Args:
            idx: token ids, int64 (B, T) with T <= block_size.
            targets: ids to predict, int64 (B, T); positions of -1 do not count.
            last_only: compute the logits of the last position alone.

        Returns:
            logits (B, T, vocab_size), or (B, 1, vocab_size) with `last_only`; and the loss in nats
            per token, a scalar of at least float32, or None without targets.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit the model's block_size of {self.config.block_size}")
        x = self.drop(self.wte(idx) + self.wpe.weight[:T])  # (B, T, n_embd)
        for block in self.h:
            x = block(x)
        x = self.ln_f(x[:, -1:] if last_only else x)
        logits = self.lm_head(x)[..., : self.config.vocab_size]  # (B, T, vocab_size), padding cut off
        if targets is None:
            return logits, None
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.inference_mode()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue the rows of idx (B, T) token by token: yields ids (B,), `max_new_tokens` times.

        Arguments as in `sample_token`. Past block_size the newest block_size tokens are the context.
        """
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size :], last_only=True)
            token = sample_token(logits[:, -1], temperature, top_k, top_p, generator)
            idx = torch.cat([idx, token[:, None]], dim=1)
            yield token

    def generate(self, idx: Tensor, max_new_tokens: int, **sampling: Any) -> Tensor:
        """idx (B, T) with its continuation, (B, T + max_new_tokens); arguments as in `stream`."""
        return torch.cat([idx, *(token[:, None] for token in self.stream(idx, max_new_tokens, **sampling))], dim=1)

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
            ValueError: nothing there, another architecture, a field that GPTConfig cannot represent, or a
                tensor missing, left over, of the wrong shape or unreadable; the text names it.
        """
        config_path = _find(name_or_dir, "config.json", revision)
        if config_path is None:
            raise ValueError(f"{name_or_dir} has no config.json; it is not a Hugging Face model")
        stored = config_from_hf(_read_json(config_path))
        if block_size is not None and block_size > stored.block_size:
            raise ValueError(f"block_size {block_size} is more than the {stored.block_size} positions of {name_or_dir}")
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
            raise ValueError(f"{name_or_dir} lacks the tensor {missing[0]} ({len(missing)} missing)")
        if extra := sorted(set(source) - set(keys.values())):
            raise ValueError(f"{name_or_dir} has the tensor {extra[0]}, which no GPT has ({len(extra)} left over)")

        # The largest first: its second copy, alive while it is converted, must not top a full model.
        shapes = {ours: tuple(p.shape) for ours, p in model.state_dict().items()}
        for ours in sorted(keys, key=lambda name: -math.prod(shapes[name])):
            tensor = source[keys[ours]]()
            if not tensor.is_floating_point():
                raise ValueError(f"{name_or_dir}: {keys[ours]} has dtype {tensor.dtype}, which is no floating point")
            expected = list(reversed(shapes[ours]) if _is_conv1d(ours) else shapes[ours])
            if ours == "wpe.weight":
                expected[0] = stored.block_size
            elif ours in ("wte.weight", "lm_head.weight"):
                expected[0] = config.vocab_size
            if list(tensor.shape) != expected:
                raise ValueError(
                    f"{name_or_dir}: {keys[ours]} has shape {tuple(tensor.shape)}, config.json wants {tuple(expected)}"
                )
            if ours == "wte.weight" and tied_head and not torch.equal(tied_head().to(tensor.dtype), tensor):
                raise ValueError(
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
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = config_to_hf(self.config, self.wte.weight.dtype)
        _write_json(directory / "config.json", config)
        ends = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
        _write_json(directory / "generation_config.json", ends)


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the next token of each row of logits (B, vocab_size): ids (B,).

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the fewest likeliest tokens that hold this share of the probability (Holtzman
            et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1).
        generator: the random state; torch's global one if None.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)  # (B, vocab_size)
        before = probs.cumsum(dim=-1) - probs  # probability of the likelier tokens
        drop = before >= top_p
        drop[:, 0] = False
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


# Hugging Face files. GPT-2's config.json: transformers' GPT2Config; GPT-1's: OpenAIGPTConfig.

# Fields that change the numbers and that GPTConfig does not represent, with the values that change nothing.
UNSUPPORTED = {"add_cross_attention": False, "quantization_config": None, "pruned_heads": {}}


def config_from_hf(hf: dict[str, Any]) -> GPTConfig:
    """The GPTConfig of a parsed config.json. A key that is absent has transformers' default.

    Raises:
        ValueError: another model type, a field that GPTConfig does not represent, or a wrong value.
    """
    kind = hf.get("model_type")
    if kind not in ("gpt2", "openai-gpt"):
        raise ValueError(f"config.json says model_type {kind!r}; gpt2 and openai-gpt can be loaded")
    for field, harmless in UNSUPPORTED.items():
        if hf.get(field, harmless) not in (harmless, None):
            raise ValueError(f"config.json sets {field} to {hf[field]!r}, which this model does not represent")
    gpt1 = kind == "openai-gpt"
    activation = hf.get("afn", "gelu") if gpt1 else hf.get("activation_function", "gelu_new")
    if gpt1 and activation == "gelu":
        activation = "gelu_new"  # GPT-1's code calls the tanh form "gelu"
    if activation not in tuple(ACTIVATIONS):  # a tuple: JSON's lists have no hash
        field = "afn" if gpt1 else "activation_function"
        raise ValueError(f"config.json sets {field} to {activation!r}; supported are {', '.join(ACTIVATIONS)}")
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
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from error


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
        raise ValueError(
            f"{name_or_dir} is neither a folder nor in the Hugging Face cache, and the hub cannot be reached"
        ) from error
    except EntryNotFoundError:
        return None
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name_or_dir} is not a folder and cannot be had from the hub: {reason}") from error


def _open_weights(name_or_dir: str | Path, revision: str | None) -> dict[str, Callable[[], Tensor]]:
    """For each tensor stored, under its name without old spellings, a function that reads it."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if path := _find(name_or_dir, single, revision):
            paths = [path]
            break
        if index := _find(name_or_dir, f"{single}.index.json", revision):
            weight_map = _read_json(index).get("weight_map")
            if not weight_map or not isinstance(weight_map, dict) or {type(v) for v in weight_map.values()} != {str}:
                raise ValueError(f"{index} has no weight_map from tensors to files")
            shards = sorted(set(weight_map.values()))
            found = {shard: _find(name_or_dir, shard, revision) for shard in shards}
            for shard, path in found.items():
                if path is None:
                    raise ValueError(f"{name_or_dir} lacks {shard}, which its index names")
            paths = [path for path in found.values() if path]
            break
    else:
        raise ValueError(f"{name_or_dir} has no weights: neither model.safetensors nor pytorch_model.bin")
    source: dict[str, Callable[[], Tensor]] = {}
    for path in paths:
        for key, read in _open_file(path).items():
            name = key.removeprefix("transformer.").replace(".gamma", ".weight").replace(".beta", ".bias")
            # Causal masks, and GPT-1's position numbers, which older versions of transformers stored.
            if name != "position_ids" and not name.endswith((".attn.bias", ".attn.masked_bias")):
                source[name] = read
    return source


def _open_file(path: Path) -> dict[str, Callable[[], Tensor]]:
    if path.suffix == ".safetensors":

        def read(key: str) -> Tensor:
            # Opened anew for each tensor: the pages of a mapped file count as memory until it is closed.
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(key)

        try:
            with safe_open(path, framework="pt") as file:
                return {key: partial(read, key) for key in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6, which cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors or is damaged; it was not opened, as it could run code"
        ) from error
    except Exception as error:  # torch raises half a dozen kinds on a damaged file
        raise ValueError(f"{path} is damaged or no PyTorch file: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a dictionary of tensors")
    return {key: partial(state.pop, key) for key in list(state)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
