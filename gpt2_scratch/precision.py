"""The dtype of matrix products: measured on a CPU, known from the architecture elsewhere."""

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from gpt2_scratch.cpu.decode import PackedLinear, can_pack
from gpt2_scratch.device import autocast_to
from gpt2_scratch.distributed import Runtime
from model import Block, GPTConfig

CPU = torch.device("cpu")


def pick_dtype(
    name: str, device: torch.device, config: GPTConfig, batch_size: int | None = None, rt: Runtime | None = None
) -> tuple[torch.dtype, str]:
    """The dtype with a name, and why; "auto" is the fastest that is precise enough on the device.

    CUDA: bfloat16 from compute capability 8.0 on, float16 before. CPU: bfloat16 if this network takes at most 0.9 of
    float32's time in it, which differs from processor to processor, and with the network's width. Otherwise float32.

    Args:
        batch_size: sequences of a training step; None: to generate text.
        rt: the processes that all call this; measurements differ, and on a CPU that of rank 0 counts.

    Returns:
        The reason is a clause to print, and empty unless something was measured.
    """
    if name != "auto":
        return getattr(torch, name), ""
    if device.type == "cuda":
        return (torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16), ""
    share = math.inf
    if device.type == "cpu" and can_pack():
        measure = decoding if batch_size is None else partial(training, batch_size)
        share = measure(config, torch.bfloat16) / measure(config, torch.float32)
    if device.type == "cpu" and rt:
        share = rt.broadcast_object(share)
    if math.isinf(share):
        return torch.float32, ""
    return (torch.bfloat16 if share <= 0.9 else torch.float32), f"bfloat16 takes {share:.2f} of float32's time here"


def training(batch_size: int, config: GPTConfig, dtype: torch.dtype) -> float:
    """Seconds that one block takes forward and backward on a CPU, for a batch of at most 256 tokens."""
    T = min(config.block_size, 256)
    B = min(batch_size, 256 // T)
    with torch.device("meta"):
        block = Block(config, 0)
    block.to_empty(device="cpu").requires_grad_()
    for p in block.parameters():
        nn.init.constant_(p, 0.01)
    x = torch.ones(B, T, config.n_embd, requires_grad=True)

    def step() -> None:
        with autocast_to(dtype, CPU):
            block(x).sum().backward()

    return seconds(step)


@torch.no_grad()
def decoding(config: GPTConfig, dtype: torch.dtype) -> float:
    """Seconds that one token takes to read the network's weights on a CPU, or 64 MiB of them in float32."""
    C = config.n_embd
    n = max(1, min(config.n_layer * 12 * C * C * 4, 2**26) // (4 * C * C * 4))  # products of C by 4 * C
    weight = torch.full((4 * C, C), 0.01, dtype=dtype)
    linears: list[Callable[[torch.Tensor], torch.Tensor]] = []
    for _ in range(n):
        linear = nn.Linear(C, 4 * C, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.clone())
        linears.append(PackedLinear(linear) if dtype == torch.bfloat16 else linear)
    x = torch.ones(1, C, dtype=dtype)

    def step() -> None:
        for linear in linears:
            linear(x)

    return seconds(step)


def seconds(run: Callable[[], None]) -> float:
    """The shortest of three runs, after one to warm up."""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times[1:])
