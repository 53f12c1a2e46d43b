"""Device, autocast and peak speed."""

import ctypes
import re
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2_scratch.cli import UserError

# Peak of dense products on the tensor cores in bf16 (fp16 before Ampere), summed in float32, in TFLOP/s: from the
# makers' datasheets, whose larger figures count zeros. Each of a MI250X's two dies is a device.
PEAK_TFLOPS = {
    "B200": 2250,
    "GB200": 2500,
    "GH200": 989,
    "H200": 989,
    "H200 NVL": 835,
    "H100 PCIe": 756,  # before the SXM one, which the rest of its name would fit as well
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "A40": 149.7,
    "A30": 165,
    "A10": 125,
    "A10G": 70,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 5080": 112.6,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 4070": 58.3,
    "RTX 3090": 71,
    "V100-SXM2": 125,
    "V100-SXM3": 125,
    "V100-PCIE": 112,
    "T4": 65,
    "MI250X": 191.5,
    "MI300X": 1307.4,
}
MAKERS = r"(NVIDIA |AMD |Tesla |GeForce |Instinct )*"
MEMORY = r"([ -](SXM\d?|PCIE?|\d+GB|HBM\d\w?))*"  # what may follow a model's name without changing its speed


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


def shortest(run: Callable[[], object]) -> float:
    """Seconds of the shortest of three runs, after one to warm up."""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def keep_freed_memory() -> None:
    """Stop glibc returning freed blocks to the system: refaulting zeroed pages slows every step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def autocast_to(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Autocast of matrix products; float32 needs none."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def attention_of_varying_shapes() -> Any:
    """Attention without cuDNN's kernel, which plans anew for each shape, and a text's shapes change with each token."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None if unknown: for a laptop's chip, or a part of a card."""
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(name: str) -> float | None:
    """The same for the name of a device, such as "NVIDIA A100-SXM4-40GB"."""
    fits = (peak for model, peak in PEAK_TFLOPS.items() if re.fullmatch(MAKERS + model + MEMORY, name, re.IGNORECASE))
    return next((peak * 1e12 for peak in fits), None)


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
