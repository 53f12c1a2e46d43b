"""Device, precision and peak speed."""

import ctypes
import re
import sys
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from gpt2_scratch.cli import UserError

# Dense bf16 peak of the datasheet, FLOP/s, by a part of the device's name.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device with a name; "auto" is the best available of CUDA, Apple's MPS and the CPU.

    Raises:
        UserError: the name is unknown, or the device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.partition(":")[0]
    if not re.fullmatch(r"(cpu|mps|cuda(:\d+)?)", name):
        raise UserError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N, mps")
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"device {name!r} is not available here; leave the device out to use what is")
    if kind != "cuda":
        return torch.device(kind)
    index = int(name[5:]) if ":" in name else local_rank
    if index >= torch.cuda.device_count():
        raise UserError(f"there is no CUDA device {index}; this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def keep_freed_memory() -> None:
    """Stop glibc returning freed blocks to the system: refaulting zeroed pages slows every step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def pick_dtype(name: str, device: torch.device, training: bool = True) -> torch.dtype:
    """The dtype of matrix products; "auto" is the fastest that is precise enough on the device.

    CUDA: bfloat16 from compute capability 8.0 on, float16 before. CPU: bfloat16 with AMX; with AVX512-BF16 for
    generation only, where it halves the bytes read per token: its products ran at 0.55 times the speed of float32 on
    the one Xeon measured. Otherwise float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    amx, avx = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    if device.type == "cpu" and (amx or (avx and not training)):
        return torch.bfloat16
    return torch.float32


def autocast_to(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Autocast of matrix products; float32 needs none."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class AsyncReader:
    """Copies a step's metrics to the host; on CUDA without waiting: it returns those of the step before."""

    def __init__(self) -> None:
        self.newest: tuple[int, Tensor, torch.cuda.Event] | None = None

    def read(self, step: int, metrics: Tensor, now: bool) -> tuple[int, list[float]]:
        """The number of a step and its metrics: this step (always if `now`, which waits for the device) or the last."""
        if metrics.device.type != "cuda":
            return step, metrics.tolist()
        host = torch.empty(metrics.shape, dtype=metrics.dtype, pin_memory=True)
        host.copy_(metrics, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        previous, self.newest = self.newest, (step, host, event)
        step, host, event = self.newest if now or previous is None else previous
        event.synchronize()
        return step, host.tolist()
