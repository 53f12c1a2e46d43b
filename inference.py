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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, KVCache, Past
from runtime import keep_freed_memory


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


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """kernels.c, compiled for this processor; None but on Linux with AVX512 and a C compiler ($CC, else `cc`)."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or "AVX512" not in torch.backends.cpu.get_cpu_capability() or not compiler:
        return None
    # Linked with the OpenMP library that torch has loaded: the threads of a second one would fight with those.
    openmp = re.search(r"/.*/lib(gomp|iomp5|omp)\b.*", Path("/proc/self/maps").read_text())
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-nodefaultlibs"]
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [compiler, *flags, Path(__file__).with_name("kernels.c"), openmp[0], "-o", f"{folder}/kernels.so"]
            subprocess.run(command, check=True, capture_output=True)
            library = ctypes.CDLL(f"{folder}/kernels.so")  # it stays when its file goes
    except (OSError, TypeError, subprocess.CalledProcessError):
        return None
    for product in (library.linear_bfloat16, library.linear_int8):
        product.argtypes = [ctypes.c_long] * 3 + [ctypes.c_void_p] * 5
    library.attend.argtypes = [ctypes.c_long] * 5 + [ctypes.c_float] + [ctypes.c_void_p] * 7
    return library


class KernelLinear(nn.Module):
    """nn.Linear on a CPU with weights in bfloat16 or int8; inputs, sums and outputs are float32.

    Args:
        linear: whose weights are kept in bfloat16, or rounded as in `Int8Linear`.
    """

    def __init__(self, linear: nn.Linear, int8: bool = False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach() if int8 else linear.weight.detach().bfloat16()
        weight = F.pad(weight, (0, self.in_features % 2, 0, -self.out_features % 32))
        N, K = self.shape = weight.shape
        self.scale, self.bias = torch.ones(N), torch.zeros(N)
        if linear.bias is not None:
            self.bias[: self.out_features] = linear.bias.detach()
        if int8:
            weight, self.scale = round_to_int8(weight)
            self.weight = weight.view(N // 32, 32, K).transpose(1, 2).contiguous()  # (N / 32, K, 32)
            self.product = kernels().linear_int8
        else:  # pairs of bfloat16 are moved as one int32
            pairs = weight.view(torch.int32).view(N // 32, 32, K // 2)
            self.weight = pairs.transpose(1, 2).contiguous().view(torch.bfloat16)  # (N / 32, K / 2, 32 * 2)
            self.product = kernels().linear_bfloat16
        self.pointers = [tensor.data_ptr() for tensor in (self.weight, self.scale, self.bias)]
        # What many rows cost is arithmetic, and there AMX is many times as fast.
        self.many = PackedLinear(linear.bfloat16()) if torch.cpu._is_amx_tile_supported() and not int8 else None

    def forward(self, x: Tensor) -> Tensor:
        (N, K), rows = self.shape, x.numel() // self.in_features
        if self.many and rows > 8:
            return self.many(x.bfloat16()).float()
        x = x.float().contiguous() if K == self.in_features else F.pad(x.float(), (0, 1))
        y = torch.empty(*x.shape[:-1], N)
        self.product(rows, K, N, x.data_ptr(), *self.pointers, y.data_ptr())
        return y if N == self.out_features else y[..., : self.out_features]


class KernelCache(KVCache):
    """A cache in bfloat16 on a CPU, of a network that computes in float32."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options | {"dtype": torch.bfloat16})

    def past(self, T: int) -> Past:
        past = super().past(T)
        return KernelPast(**vars(past)) if T == 1 and self.extent > 0 else past


class KernelPast(Past):
    """As a pass over one more token of each row sees it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        _, B, n_head, max_len, head_dim = self.k.shape
        if not q.stride() == k.stride() == v.stride() or (q.stride(1), q.stride(3)) != (head_dim, 1):
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        y = torch.empty(B, n_head, 1, head_dim)
        tensors = (q, k, v, self.k[layer], self.v[layer], self.positions, y)
        pointers = [tensor.data_ptr() for tensor in tensors]
        kernels().attend(B, n_head, max_len, head_dim, q.stride(0), scale, *pointers)
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
        int8: round the weights of all matrix products; else, on a CPU in bfloat16, only lay them out anew.
        compile: its steps are going to be compiled, which lays weights out by itself.
    """
    weight = model.wte.weight
    eager = weight.device.type == "cpu" and not compile
    fast = eager and (int8 or weight.dtype == torch.bfloat16) and kernels() is not None
    if fast:
        kind = partial(KernelLinear, int8=int8)
    elif int8:
        kind = Int8Linear
    elif eager and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        kind = PackedLinear
    else:
        return model
    if eager:
        keep_freed_memory()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child))
            elif isinstance(child, nn.Dropout):
                setattr(module, name, nn.Identity())  # half a hundred calls a token
            elif fast and isinstance(child, nn.LayerNorm | nn.Embedding) and child is not model.wte:
                child.float()  # so that all is computed in float32; of `wte` single rows are read
    if fast:
        model.cache_class = KernelCache
    return model
