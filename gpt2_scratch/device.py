"""What a script needs of the machine: device, precision, signals, peak speed."""

import ctypes
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from threading import Thread
from typing import Any

import numpy as np
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
    """The device of a name; "auto" is the best there is of CUDA, Apple's MPS and the CPU.

    Raises:
        UserError: the name is unknown or the device is not there.
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
    """The dtype of matrix products: "auto" is the fastest one of the device that is precise enough.

    bfloat16 on CUDA of compute capability 8.0, float16 on older CUDA. On a CPU bfloat16 where it has AMX, or,
    for writing text, AVX512-BF16: that halves the bytes to read, but its products run at 0.55 times float32's
    speed (measured), so that training is better off in float32, as are all other devices.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    amx, avx = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    if device.type == "cpu" and (amx or (avx and not training)):
        return torch.bfloat16
    return torch.float32


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class LateReader:
    """Reads the figures of each step from the device; on CUDA those of the step before, so as not to wait."""

    def __init__(self) -> None:
        self.newest: tuple[int, Tensor, torch.cuda.Event] | None = None

    def read(self, step: int, figures: Tensor, now: bool) -> tuple[int, list[float]]:
        """The figures of this step (with `now`, which waits for the device) or of one before, and its number."""
        if figures.device.type != "cuda":
            return step, figures.tolist()
        host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        host.copy_(figures, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        late, self.newest = self.newest, (step, host, event)
        at, host, event = self.newest if now or late is None else late
        event.synchronize()
        return at, host.tolist()


def launcher_is_gone(launcher: int) -> bool:
    """Whether the torchrun that started this process, of that process number, has ended before it."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != launcher


class StopSignals(AbstractContextManager):
    """Within it SIGTERM, SIGINT and SIGUSR1 ask for an end: `signum` is the number of the first, 0 before.

    A second one ends the process at once; a thread sees to that, as the main one may be waiting in a library.
    Schedulers signal a process directly and through its launcher, so signals within a second count as one. A torchrun
    that is gone, which would have passed signals on, counts as SIGTERM.

    Args:
        launcher: the process number that torchrun had when this process started.
    """

    # Windows has no SIGUSR1.
    KINDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, launcher: int):
        self.launcher = launcher

    def __enter__(self) -> "StopSignals":
        self.signum = 0
        self.inlet, self.outlet = socket.socketpair()  # a pipe would not do on Windows
        self.outlet.setblocking(False)
        self.old_handlers = {kind: signal.signal(kind, lambda *_: None) for kind in self.KINDS}
        self.old_outlet = signal.set_wakeup_fd(self.outlet.fileno(), warn_on_full_buffer=False)
        Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        signal.set_wakeup_fd(self.old_outlet)
        for kind, handler in self.old_handlers.items():
            signal.signal(kind, handler)
        self.outlet.close()

    def _watch(self) -> None:
        self.inlet.settimeout(1)
        while True:
            try:
                received = self.inlet.recv(1)
            except TimeoutError:
                # torchrun ends its processes before itself, unless it was killed: then nobody else would end these.
                if launcher_is_gone(self.launcher) and not self.signum:
                    self.signum, first = signal.SIGTERM, time.monotonic()
                continue
            if not received:
                break
            if received[0] not in self.KINDS:
                continue
            if not self.signum:
                self.signum, first = received[0], time.monotonic()
            elif time.monotonic() - first > 1:
                os._exit(128 + received[0])
        self.inlet.close()


def to_device(batches: Iterator[np.ndarray], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, T) on the device, the next batch made by a thread while this one is used."""

    def load() -> Tensor | None:
        batch = next(batches, None)
        if batch is None:
            return None
        tensor = torch.from_numpy(batch)
        return tensor.pin_memory() if device.type == "cuda" else tensor

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        coming = pool.submit(load)
        while (batch := coming.result()) is not None:
            coming = pool.submit(load)
            batch = batch.to(device, non_blocking=True)
            yield batch[:, :-1].clamp(min=0), batch[:, 1:]  # filler is never a target, any id will do as input
