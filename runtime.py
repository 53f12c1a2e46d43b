"""What a script needs of the machine: device, precision, processes, peak speed, one-sentence errors."""

import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

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


@dataclass(frozen=True)
class Runtime:
    """One process's place in the run."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device of a name; "auto" is the best there is of CUDA, Apple's MPS and the CPU.

    Raises:
        ValueError: the name is unknown or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.partition(":")[0]
    if not re.fullmatch(r"(cpu|mps|cuda(:\d+)?)", name):
        raise ValueError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N, mps")
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(f"device {name!r} is not available here; leave the device out to use what is")
    if kind != "cuda":
        return torch.device(kind)
    index = int(name[5:]) if ":" in name else local_rank
    if index >= torch.cuda.device_count():
        raise ValueError(f"there is no CUDA device {index}; this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def start(device: str = "auto") -> Runtime:
    """Pick this process's device; under torchrun also join the process group (NCCL, Gloo on CPU)."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    picked = pick_device(device, local_rank)
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
        torch.set_float32_matmul_precision("high")  # TF32 for float32 products outside autocast
    if world_size > 1:
        dist.init_process_group("nccl" if picked.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return Runtime(picked, rank, local_rank, world_size)


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


def nearest(word: str, known: list[str]) -> str:
    """ "; did you mean X?" where one of the known words is close, else nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; bad input ends it with one sentence and exit code 1.

    `python -X dev SCRIPT` shows the traceback instead.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
