"""How a step's sequences are divided among ranks and micro-steps, and how many of them fit a GPU's memory."""

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from gpt2_scratch.cli import UserError
from gpt2_scratch.config import TrainConfig
from gpt2_scratch.device import autocast_to
from gpt2_scratch.distributed import Runtime
from gpt2_scratch.optim import memory_of
from gpt2_scratch.parallel import Loss, LossFunction, is_sharded, warm_up
from model import GPT


@dataclass(frozen=True)
class BatchPlan:
    """A step's sequences: on each rank, so many micro-steps of batch_size each."""

    sequences: int  # per step, over all ranks
    batch_size: int  # sequences of one rank in a micro-step
    accumulation_steps: int


def plan_batch(total_batch_size: int, batch_size: int, block_size: int, world_size: int) -> BatchPlan:
    """Divide `total_batch_size` tokens into micro-steps of at most `batch_size` sequences.

    Raises:
        UserError: the tokens do not divide into sequences, or these among the ranks.
    """
    sequences, rest = divmod(total_batch_size, block_size)
    if rest or not sequences:
        unit = block_size * world_size
        raise UserError(
            f"total_batch_size {total_batch_size} does not divide into sequences of {block_size} tokens; "
            f"{max(1, round(total_batch_size / unit)) * unit} does"
        )
    share, rest = divmod(sequences, world_size)
    if rest:
        fitting = [n for n in range(1, sequences + 1) if sequences % n == 0]
        near = [max(n for n in fitting if n < world_size), *[n for n in fitting if n > world_size][:1]]
        raise UserError(
            f"total_batch_size {total_batch_size} is {sequences} sequences of {block_size} tokens, which do not "
            f"divide among {world_size} processes; {' or '.join(map(str, near))} processes can share them"
        )
    batch_size = max(n for n in range(1, min(batch_size, share) + 1) if share % n == 0)
    return BatchPlan(sequences, batch_size, share // batch_size)


def fitting_batch_size(
    cfg: TrainConfig, model: GPT, optimizer: torch.optim.Optimizer, dtype: torch.dtype, rt: Runtime
) -> int:
    """The largest batch_size that fits every rank's GPU and divides its share of a step.

    Extrapolates from the memory of one, two and four sequences, compiled if the run is, which takes about half as much.
    A tenth of the memory is left free, because fragmentation keeps the allocator from using all of it.

    Raises:
        UserError: the device is no GPU, or not even one sequence fits.
    """
    if rt.device.type != "cuda":
        raise UserError(f'batch_size "auto" measures the memory of a CUDA device; on {rt.device.type} give a number')
    share = max(1, cfg.total_batch_size // (model.config.block_size * rt.world_size))
    loss = Loss(model)
    try:
        peaks = peak_memory(torch.compile(loss, dynamic=False) if cfg.compile else loss, cfg, dtype)
    except Exception:
        if not cfg.compile:
            raise
        peaks = peak_memory(loss, cfg, dtype)  # no compiler works here: `wrap` will say so and train uncompiled
    torch._dynamo.reset()  # else the run's own batch would be a fourth size, compiled for any
    torch.cuda.empty_cache()  # blocks of these sizes would fragment the memory
    moments = 0 if optimizer.state else memory_of(optimizer)[1]
    # A sharded model keeps unsharded gradients between micro-steps.
    full_gradients = 4 * sum(p.numel() for p in model.parameters()) if is_sharded(model) else 0
    free = torch.cuda.mem_get_info(rt.device)[0] + torch.cuda.memory_reserved(rt.device)
    room = 0.9 * free - moments - full_gradients
    fitting = min(rt.all_gather_object(largest_batch(share, *peaks, room)))
    if not fitting:
        raise UserError(
            f"not even one sequence of {model.config.block_size} tokens fits the memory of {rt.device}; try "
            f"activation_checkpointing, or several processes with parallel fsdp"
        )
    return fitting


def peak_memory(forward: Any, cfg: TrainConfig, dtype: torch.dtype) -> tuple[float, float, float]:
    """Bytes at most in use while one, two and four sequences go forward and backward; infinite if they do not fit.

    Args:
        forward: `Loss`, compiled or not.
    """
    model = forward.model
    device = model.wte.weight.device
    loss_fn = LossFunction(model, forward, None, autocast_to(dtype, device), cfg.parallel)
    peaks = [math.inf] * 3
    for i, batch_size in enumerate((1, 2, 4)):
        with suppress(torch.OutOfMemoryError):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)  # present from the second micro-step on
            warm_up(loss_fn, batch_size).backward()  # compiling may take more than running
            torch.cuda.reset_peak_memory_stats(device)
            warm_up(loss_fn, batch_size).backward()
            peaks[i] = torch.cuda.max_memory_allocated(device)
        model.zero_grad(set_to_none=True)
    return peaks[0], peaks[1], peaks[2]


def largest_batch(share: int, one: float, two: float, four: float, room: float) -> int:
    """The largest divisor of `share` sequences that fits in `room` bytes, 0 if none does.

    Args:
        one, two, four: bytes that so many sequences take. One may take as much as two: what is in use at the end of the
            backward pass depends on no batch.
    """
    bytes_of = {1: one, 2: two}
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    return max([n for n in divisors if bytes_of.get(n, two + (n - 2) * (four - two) / 2) <= room], default=0)
