"""Weights laid out for writing text: smaller or faster to read than those of training, same answers.

Writing a token reads every weight once, so what counts is bytes a token and how fast they are read.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_scratch.device import keep_freed_memory
from model import GPT, Block, CacheView


class PackedLinear(nn.Module):
    """nn.Linear in bfloat16 on a CPU, its weight in the blocked layout that oneDNN reads fastest.

    Args:
        linear: with bfloat16 parameters.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack() -> bool:
    """Whether oneDNN takes bfloat16 here; on x86 that needs AVX512 or newer."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """kernels.c, compiled for this processor; None but on Linux with AVX512 and a C compiler ($CC, else `cc`)."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or "AVX512" not in torch.backends.cpu.get_cpu_capability() or not compiler:
        return None
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-nodefaultlibs"]
    try:
        # Linked with the OpenMP library that torch has loaded: the threads of a second one would fight with those.
        openmp = re.search(r"/.*/lib(gomp|iomp5|omp)\b.*", Path("/proc/self/maps").read_text())
        with tempfile.TemporaryDirectory() as folder:
            command = [compiler, *flags, Path(__file__).with_name("kernels.c"), openmp[0], "-o", f"{folder}/kernels.so"]
            subprocess.run(command, check=True, capture_output=True)
            library = ctypes.CDLL(f"{folder}/kernels.so")  # it stays when its file goes
    except (OSError, TypeError, subprocess.CalledProcessError):
        return None
    library.linear.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    library.plan.argtypes, library.plan.restype = [ctypes.c_long] * 2 + [ctypes.c_void_p] * 3, ctypes.c_long
    library.pack.argtypes = [ctypes.c_long] * 2 + [ctypes.c_void_p] * 4
    library.block.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long] + [ctypes.c_void_p] * 5
    return library


class CLinear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("bytes", "K", "N")] + [
        (name, ctypes.c_void_p) for name in ("weight", "starts", "upper", "scale", "bias")
    ]


class CNorm(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "bias")]


class CBlock(ctypes.Structure):
    _fields_ = (
        [(name, CLinear) for name in ("attn_in", "attn_out", "mlp_in", "mlp_out")]
        + [(name, CNorm) for name in ("ln_1", "ln_2")]
        + [(name, ctypes.c_long) for name in ("n_head", "post_norm")]
        + [(name, ctypes.c_float) for name in ("scale", "epsilon")]
    )


class KernelLinear(nn.Module):
    """nn.Linear on a CPU with weights in bfloat16 or int8; inputs, sums and outputs are float32.

    Args:
        linear: whose weights are kept in bfloat16, or rounded as in `Int8Linear`.
    """

    def __init__(self, linear: nn.Linear, int8: bool = False):
        super().__init__()
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
            self.weight = weight.view(N // 32, 32, K).transpose(1, 2).contiguous()  # (N / 32, K, 32)
        else:
            weight = weight.contiguous()
            sample = weight.flatten()[:: max(1, weight.numel() // 10**6)].view(torch.int16)
            self.upper = (sample >> 8 & 255).bincount(minlength=256).topk(16).indices.to(torch.uint8)
            self.starts = torch.empty(N // 32, dtype=torch.int64)
            pointers = [tensor.data_ptr() for tensor in (weight, self.upper, self.starts)]
            self.weight = torch.empty(kernels().plan(K, N, *pointers), dtype=torch.uint8)
            kernels().pack(K, N, *pointers, self.weight.data_ptr())
        tensors = (self.weight, self.starts, self.upper, self.scale, self.bias)
        self.fields = CLinear(1 if int8 else 2, K, N, *(tensor.data_ptr() for tensor in tensors))
        # What many rows cost is arithmetic, and there AMX is many times as fast.
        self.many = PackedLinear(linear.bfloat16()) if torch.cpu._is_amx_tile_supported() and not int8 else None

    def forward(self, x: Tensor) -> Tensor:
        (N, K), rows = self.shape, x.numel() // self.in_features
        if self.many and rows > 8:
            return self.many(x.bfloat16()).float()
        x = x.float().contiguous() if K == self.in_features else F.pad(x.float(), (0, K - self.in_features))
        y = torch.empty(*x.shape[:-1], N)
        kernels().linear(ctypes.byref(self.fields), rows, x.data_ptr(), y.data_ptr())
        return y if N == self.out_features else y[..., : self.out_features]


class KernelBlock(nn.Module):
    """A Block of KernelLinear, one call for a pass over one more token of each row; the cache is in bfloat16.

    Args:
        block: of widths that 32 divides, its activation the tanh form of GELU.
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
        B, T, _ = x.shape
        if cache is None or T > 1 or cache.k.dtype != torch.bfloat16 or (B > 8 and self.block.mlp.c_fc.many):
            return self.block(x, cache)
        x, y = x.contiguous(), torch.empty_like(x)
        layer = self.block.attn.layer
        keys, values = cache.k[layer], cache.v[layer]  # (B, n_head, max_len, head_dim)
        tensors = (x, keys, values, cache.positions, y)
        kernels().block(ctypes.byref(self.fields), B, keys.shape[2], *(tensor.data_ptr() for tensor in tensors))
        return y


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights and one scale per output channel; inputs and outputs keep their dtype.

    Args:
        linear: whose weights are rounded: w[i, j] = q[i, j] * scale[i], scale[i] = max |w[i]| / 127.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, scale = round_to_int8(linear.weight.detach())
        self.scale = scale.to(linear.weight.dtype)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[-1] % 16 == 0:  # in bfloat16 the kernel reads 16 at a time, and beyond
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).unflatten(0, x.shape[:-1])
        else:
            y = x @ (self.weight.to(x.dtype) * self.scale[:, None]).t()
        return y if self.bias is None else y + self.bias


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers of at most 127 in size, int8 (out, in), and what they are multiples of, float32 (out,)."""
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def prepare(model: GPT, int8: bool = False, compile: bool = False) -> GPT:
    """Change a model in place for writing text; it can no longer be trained or saved.

    Args:
        int8: round the weights of all matrix products; else, on a CPU in bfloat16, only lay them out anew, where
            that is possible.
        compile: its steps are going to be compiled, which lays weights out by itself.
    """
    weight = model.wte.weight
    eager = weight.device.type == "cpu" and not compile
    fast = eager and (int8 or weight.dtype == torch.bfloat16) and kernels() is not None
    packed = eager and not int8 and weight.dtype == torch.bfloat16 and can_pack()
    if not (fast or int8 or packed):
        return model
    if eager:
        keep_freed_memory()
    for name in [name for name, _ in model.named_modules()]:  # by name, so that what is replaced goes at once
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            if fast:
                laid_out = KernelLinear(module, int8)
            else:
                laid_out = Int8Linear(module) if int8 else PackedLinear(module)
            model.set_submodule(name, laid_out)
        elif isinstance(module, nn.Dropout):
            model.set_submodule(name, nn.Identity())  # half a hundred calls a token
        elif fast and isinstance(module, nn.LayerNorm | nn.Embedding):
            # All is computed in float32; of `wte` single rows are read, and the cache has its dtype.
            module.to(torch.bfloat16 if module is model.wte else torch.float32)
    c = model.config
    if fast and c.activation in ("gelu_new", "gelu_pytorch_tanh") and c.n_embd % 32 == (c.n_inner or 0) % 32 == 0:
        model.h = nn.ModuleList(KernelBlock(block) for block in model.h)
    return model
