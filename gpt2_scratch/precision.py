"""The dtype of matrix products: measured on a CPU, known from the architecture elsewhere."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from gpt2_scratch.cpu.compiler import can_compile
from gpt2_scratch.cpu.decode import PackedLinear, can_pack
from gpt2_scratch.cpu.training import use_fast_functions
from gpt2_scratch.device import autocast_to, shortest
from gpt2_scratch.distributed import Runtime
from model import Block, GPTConfig

CPU = torch.device("cpu")
# kernels.c takes about a second to compile, and most of float32's time per token away: repaid within 500 tokens if that
# time is this many milliseconds.
REPAYS = 5


def dtype_name(dtype: torch.dtype, reason: str = "") -> str:
    """Such as "bfloat16", or "bfloat16 (reason)"."""
    return str(dtype).removeprefix("torch.") + (reason and f" ({reason})")


def pick_dtype(
    name: str, device: torch.device, config: GPTConfig, batch_size: int | str | None = None, rt: Runtime | None = None
) -> tuple[torch.dtype, str]:
    """The dtype with a name, and why; "auto" is the fastest that is precise enough on the device.

    CUDA: bfloat16 from compute capability 8.0 on, float16 before. CPU: bfloat16 if this network takes at most 0.9 of
    float32's time in it, which differs from processor to processor, and with the network's width; for generation with
    kernels.c, if float32 takes at least `REPAYS` milliseconds per token. Otherwise float32. "int8" is a matter of the
    weights; this is the dtype of the rest.

    Args:
        batch_size: sequences of a micro-step, or "auto", which counts as 1; None: to generate text.
        rt: the processes that all call this; measurements differ, and on a CPU that of rank 0 counts.

    Returns:
        The reason is a clause to print, and empty unless something was measured.
    """
    if name == "int8":
        return (torch.bfloat16 if device.type == "cpu" and (can_compile() or can_pack()) else torch.float32), ""
    if name != "auto":
        return getattr(torch, name), ""
    if device.type == "cuda":
        return (torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16), ""
    if device.type != "cpu":
        return torch.float32, ""
    if batch_size is None and can_compile():
        ms = 1e3 * decoding(config, torch.float32)
        return (torch.bfloat16 if ms >= REPAYS else torch.float32), f"float32 weights take {ms:.1f} ms per token here"
    share = math.inf
    if can_pack():
        measure = decoding if batch_size is None else partial(training, batch_size)
        share = measure(config, torch.bfloat16) / measure(config, torch.float32)
    share = rt.broadcast_object(share) if rt else share
    reason = "" if math.isinf(share) else f"bfloat16 takes {share:.2f} of float32's time here"
    return (torch.bfloat16 if share <= 0.9 else torch.float32), reason


def training(batch_size: int | str, config: GPTConfig, dtype: torch.dtype) -> float:
    """Seconds that one block takes forward and backward on a CPU: of some GFLOP, in sequences of at most 256 tokens."""
    T = min(config.block_size, 256)
    sequence = 6 * 12 * config.n_embd**2 * T  # FLOP
    B = 1 if batch_size == "auto" else min(int(batch_size), max(1, 2 * 10**9 // sequence))
    with torch.device("meta"):
        block = Block(config, 0)
    block.to_empty(device="cpu").eval()  # dropout would draw random numbers
    for p in block.parameters():
        nn.init.constant_(p, 0.01)
    use_fast_functions(block)
    x = torch.ones(B, T, config.n_embd, requires_grad=True)

    def step() -> None:
        with autocast_to(dtype, CPU):
            block(x).sum().backward()

    return shortest(step)


@torch.no_grad()
def decoding(config: GPTConfig, dtype: torch.dtype) -> float:
    """Seconds to read the network's weights once on a CPU, as each token does: from at most 64 MiB of them."""
    C = config.n_embd
    weights = 12 * config.n_layer * C * C + config.padded_vocab_size * C
    n = max(1, min(4 * weights, 2**26) // (16 * C * C))  # products of C by 4 * C
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

    return shortest(step) * weights / (n * 4 * C * C)
