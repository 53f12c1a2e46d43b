"""Weight layouts for text generation: smaller than those of training, or faster to read.

Decoding is bandwidth-bound: each token reads every weight once, so its time is the weights' bytes over the bandwidth.
"""

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_scratch.cli import UserError
from gpt2_scratch.cpu.compiler import build
from gpt2_scratch.device import keep_freed_memory, shortest
from model import GPT, Block, CacheView

PREFILL_ROWS = 64  # positions per product of a prompt in oneDNN


class PackedLinear(nn.Module):
    """A bfloat16 nn.Linear on a CPU, with its weight in oneDNN's blocked layout."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack() -> bool:
    """Whether oneDNN supports bfloat16 on this CPU; on x86 that takes AVX512."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def kernels() -> Any:
    """kernels.c, compiled for this CPU; None if that is not possible.

    With AVX512-BF16 inputs may be rounded to bfloat16, of which it multiplies two at a time: whichever is faster here.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return compiled(False)
    with ThreadPoolExecutor() as pool:
        exact, rounding = pool.map(compiled, (False, True))
    layer = layer_to_time()
    return rounding if rounding and faster(*(KernelLinear(layer, library=lib) for lib in (rounding, exact))) else exact


@functools.cache
def prompts_are_faster_in_onednn() -> bool:
    """By a measurement; true with AMX, which multiplies several times as fast."""
    if not can_pack():
        return False
    layer = layer_to_time().bfloat16()
    packed = PackedLinear(layer)
    return faster(lambda x: packed(x.bfloat16()).float(), KernelLinear(layer))


def layer_to_time() -> nn.Linear:
    layer = nn.Linear(768, 3072, bias=False, device="meta")  # else initializing draws random numbers
    layer.weight = nn.Parameter(torch.full((3072, 768), 0.01))
    return layer


@torch.no_grad()
def faster(this: Callable[[Tensor], Tensor], than: Callable[[Tensor], Tensor]) -> bool:
    """Whether `layer_to_time` multiplies `PREFILL_ROWS` rows in one way in at most 0.9 of the time of another."""
    x = torch.ones(1, PREFILL_ROWS, 768)
    return shortest(lambda: this(x)) <= 0.9 * shortest(lambda: than(x))


@functools.cache
def compiled(round_inputs: bool) -> Any:
    """kernels.c with or without rounding its inputs; None if it cannot be compiled."""
    library = build("kernels.c", *["-DROUND_INPUTS"] * round_inputs)
    if library is None:
        return None
    library.tile_outputs = ctypes.c_int.in_dll(library, "tile_outputs").value
    library.linear.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    library.plan.argtypes, library.plan.restype = [ctypes.c_long] * 2 + [ctypes.c_void_p] * 3, ctypes.c_long
    library.pack.argtypes = [ctypes.c_long] * 2 + [ctypes.c_void_p] * 4
    library.block.argtypes = [ctypes.c_void_p] + [ctypes.c_long] * 3 + [ctypes.c_void_p] * 5
    return library


class CLinear(ctypes.Structure):
    _fields_: ClassVar[list[Any]] = [(name, ctypes.c_long) for name in ("bytes", "K", "N")] + [
        (name, ctypes.c_void_p) for name in ("weight", "starts", "upper", "scale", "bias")
    ]


class CNorm(ctypes.Structure):
    _fields_: ClassVar[list[Any]] = [(name, ctypes.c_void_p) for name in ("weight", "bias")]


class CBlock(ctypes.Structure):
    _fields_: ClassVar[list[Any]] = (
        [(name, CLinear) for name in ("attn_in", "attn_out", "mlp_in", "mlp_out")]
        + [(name, CNorm) for name in ("ln_1", "ln_2")]
        + [(name, ctypes.c_long) for name in ("n_head", "post_norm")]
        + [(name, ctypes.c_float) for name in ("scale", "epsilon")]
    )


class KernelLinear(nn.Module):
    """nn.Linear through kernels.c: weights in bfloat16, or in int8 as in `Int8Linear`; results in float32.

    Args:
        library: other than `kernels`.
        onednn_prompts: multiply more than one new token of a row in oneDNN, which takes a copy of the weights.
    """

    def __init__(self, linear: nn.Linear, int8: bool = False, library: Any = None, onednn_prompts: bool = False):
        super().__init__()
        self.library = library or kernels()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach() if int8 else linear.weight.detach().bfloat16()
        weight = F.pad(weight, (0, -self.in_features % 4, 0, -self.out_features % 32))
        N, K = self.shape = weight.shape
        self.scale, self.bias = torch.ones(N), torch.zeros(N)
        if linear.bias is not None:
            self.bias[: self.out_features] = linear.bias.detach()
        self.starts, self.upper = torch.empty(0), torch.empty(16, dtype=torch.uint8)
        if int8:
            weight, self.scale = round_to_int8(weight)
            tiles = weight.view(-1, self.library.tile_outputs, K)  # (tiles, outputs, K)
            self.weight = tiles.transpose(1, 2).contiguous()  # (tiles, K, outputs)
        else:
            weight = weight.contiguous()
            # The 16 commonest upper bytes, which the packed format stores in half a byte; a million weights will do.
            subset = weight.flatten()[:: max(1, weight.numel() // 10**6)].view(torch.int16)
            self.upper = (subset >> 8 & 255).bincount(minlength=256).topk(16).indices.to(torch.uint8)
            self.starts = torch.empty(N // self.library.tile_outputs, dtype=torch.int64)
            pointers = [tensor.data_ptr() for tensor in (weight, self.upper, self.starts)]
            self.weight = torch.empty(self.library.plan(K, N, *pointers), dtype=torch.uint8)
            self.library.pack(K, N, *pointers, self.weight.data_ptr())
        tensors = (self.weight, self.starts, self.upper, self.scale, self.bias)
        self.fields = CLinear(1 if int8 else 2, K, N, *(tensor.data_ptr() for tensor in tensors))
        self.prefill = PackedLinear(linear.bfloat16()) if onednn_prompts else None

    def forward(self, x: Tensor) -> Tensor:
        (N, K), rows = self.shape, x.numel() // self.in_features
        if self.prefill and x.shape[-2] > 1:  # (B, T, in_features)
            # oneDNN's order of summation depends on the number of rows, and a prompt must give the same bits in any
            # batch: so all go in blocks of one size.
            blocks = F.pad(x.reshape(rows, -1).bfloat16(), (0, 0, 0, -rows % PREFILL_ROWS)).split(PREFILL_ROWS)
            y = torch.cat([self.prefill(block) for block in blocks])  # (rows in whole blocks, out_features)
            return y[:rows].view(*x.shape[:-1], -1).float()
        x = x.float().contiguous() if K == self.in_features else F.pad(x.float(), (0, K - self.in_features))
        y = torch.empty(*x.shape[:-1], N)
        self.library.linear(ctypes.byref(self.fields), rows, x.data_ptr(), y.data_ptr())
        return y if N == self.out_features else y[..., : self.out_features]


class KernelBlock(nn.Module):
    """A Block in a single call to kernels.c, given a bfloat16 cache.

    Args:
        block: made of KernelLinear, with tanh GELU, widths that are multiples of 32 and heads that fill registers.
    """

    def __init__(self, block: Block):
        super().__init__()
        self.block = block
        attn, mlp = block.attn, block.mlp
        self.fields = CBlock(
            *(linear.fields for linear in (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj)),
            *(CNorm(norm.weight.data_ptr(), norm.bias.data_ptr()) for norm in (block.ln_1, block.ln_2)),
            attn.n_head,
            block.post_norm,
            attn.scale,
            block.ln_1.eps,
        )

    def forward(self, x: Tensor, cache: CacheView | None = None) -> Tensor:
        (B, T, _), onednn = x.shape, self.block.attn.c_attn.prefill
        if cache is None or cache.k.dtype != torch.bfloat16 or (onednn and T > 1):
            return self.block(x, cache)
        x, y = x.contiguous(), torch.empty_like(x)
        layer = self.block.attn.layer
        keys, values = cache.k[layer], cache.v[layer]  # (B, n_head, max_len, head_dim)
        tensors = (x, keys, values, cache.positions, y)
        kernels().block(ctypes.byref(self.fields), B, T, keys.shape[2], *(tensor.data_ptr() for tensor in tensors))
        return y


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights and one scale per output channel; inputs and outputs keep their dtype.

    w[i, j] = q[i, j] * scale[i] with scale[i] = max |w[i]| / 127.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, scale = round_to_int8(linear.weight.detach())
        self.scale = scale.to(linear.weight.dtype)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        if (
            x.device.type == "cpu" and x.shape[-1] % 16 == 0
        ):  # the bfloat16 kernel reads 16 at a time, out of bounds if need be
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).unflatten(0, x.shape[:-1])
        else:
            y = x @ (self.weight.to(x.dtype) * self.scale[:, None]).t()
        return y if self.bias is None else y + self.bias


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric quantization: int8 values from -127 to 127 (out, in), and float32 scales (out,)."""
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def prepare(model: GPT, int8: bool = False, compile: bool = False) -> GPT:
    """Optimize a model for generation, in place. It can no longer be trained or saved.

    Args:
        int8: quantize the weights of all linear layers. Otherwise only the layout changes, for bfloat16 on a CPU that
            has a faster one.
        compile: the steps will be compiled; torch.compile chooses layouts itself.

    Raises:
        UserError: int8 on CUDA, where no kernel here reads it: weights would be unpacked for every token.
    """
    weight = model.wte.weight
    if int8 and weight.device.type == "cuda":
        raise UserError("int8 is for CPUs and slower than bfloat16 on CUDA; leave the dtype out, or add --device cpu")
    eager = weight.device.type == "cpu" and not compile
    fast = eager and (int8 or weight.dtype == torch.bfloat16) and kernels() is not None
    if eager and weight.dtype == torch.bfloat16 and not (fast or can_pack()):
        model.float()  # nothing here supports bfloat16, and torch takes many times as long for it
    packed = eager and not int8 and weight.dtype == torch.bfloat16
    if not (fast or int8 or packed):
        return model
    if eager:
        keep_freed_memory()
    onednn = fast and not int8 and prompts_are_faster_in_onednn()
    for name in [name for name, _ in model.named_modules()]:  # by name: holds no reference to replaced modules
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            if fast:
                replacement: nn.Module = KernelLinear(module, int8, onednn_prompts=onednn)
            else:
                replacement = Int8Linear(module) if int8 else PackedLinear(module)
            model.set_submodule(name, replacement)
        elif isinstance(module, nn.Dropout):
            model.set_submodule(name, nn.Identity())  # saves dozens of calls per token
        elif fast and isinstance(module, nn.LayerNorm | nn.Embedding):
            # Everything is computed in float32. `wte` stays in bfloat16: the cache takes its dtype from it.
            module.to(torch.bfloat16 if module is model.wte else torch.float32)
    c = model.config
    register = kernels().tile_outputs // 2 if fast else 1  # floats
    even = c.n_embd % 32 == (c.n_inner or 0) % 32 == c.n_embd // c.n_head % register == 0
    if fast and even and c.activation in ("gelu_new", "gelu_pytorch_tanh"):
        model.h = nn.ModuleList(KernelBlock(block) for block in model.h)
    return model
