"""GELU and attention for training on a CPU, faster than torch's. No double backward, no torch.func."""

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt2_scratch.cpu.compiler import build
from model import ACTIVATIONS, MLP, Attention, causal_attention

TANH = (ACTIVATIONS["gelu_new"], ACTIVATIONS["gelu_pytorch_tanh"])


def fast_gelu(x: Tensor) -> Tensor:
    """tanh GELU: training.c's for float32 and bfloat16 if it compiles, otherwise torch's."""
    if kernel("gelu", x.dtype) is None:
        return F.gelu(x, approximate="tanh")
    return _Gelu.apply(x)


def fast_attention(qkv: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """`model.causal_attention`: training.c's without dropout, for float32 and bfloat16, if it compiles."""
    if dropout or library() is None or qkv.dtype not in (torch.float32, torch.bfloat16):
        return causal_attention(qkv, scale, dropout)
    return _Attention.apply(qkv, scale)


def use_fast_functions(network: nn.Module) -> None:
    """Let the layers of a network compute tanh GELU and attention through `fast_gelu` and `fast_attention`."""
    for module in network.modules():
        if isinstance(module, MLP) and module.activation in TANH:
            module.activation = fast_gelu
        elif isinstance(module, Attention):
            module.attention = fast_attention


@functools.cache
def library() -> Any:
    return build("training.c", "-fno-math-errno", "-fno-trapping-math")  # or the loops would not be vectorized


def kernel(name: str, dtype: torch.dtype) -> Any:
    """A function of training.c for a dtype, or None."""
    return getattr(library(), f"{name}_{str(dtype).removeprefix('torch.')}", None)


def call(function: Any, *arguments: Tensor | float) -> None:
    """Call a function of training.c: with contiguous tensors by their addresses, and ints as longs."""
    values: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            values.append(ctypes.c_void_p(argument.data_ptr()))
        else:
            values.append(ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_long(argument))
    function(*values)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        call(kernel("gelu", x.dtype), x, y, x.numel())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        call(kernel("gelu_gradient", x.dtype), x, dy.contiguous(), dx, x.numel())
        return dx


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float) -> Tensor:
        qkv = qkv.contiguous()
        B, T, _, n_head, head_dim = qkv.shape
        y = qkv.new_empty(B, T, n_head, head_dim)
        log_sums = torch.empty(B, n_head, T)  # of the exponentials of a query's scores
        ctx.shape = (B, T, n_head, head_dim, scale)
        ctx.save_for_backward(qkv, y, log_sums)
        call(library().attention, qkv.dtype == torch.bfloat16, qkv, y, log_sums, *ctx.shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        qkv, y, log_sums = ctx.saved_tensors
        dqkv = torch.empty_like(qkv)
        half = qkv.dtype == torch.bfloat16
        call(library().attention_gradient, half, qkv, y, log_sums, dy.contiguous(), dqkv, *ctx.shape)
        return dqkv, None
