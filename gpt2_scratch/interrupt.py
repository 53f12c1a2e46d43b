"""End a step early when a process is signalled: on a CPU a step can take minutes."""

import time

import torch
from torch import Tensor

from gpt2_scratch.distributed import Runtime, all_gather
from gpt2_scratch.signals import StopSignals
from model import GPT


class StepInterrupted(Exception):
    """A signal came in the middle of a step."""

    def __init__(self, signum: int):
        self.signum = signum


class Interrupt:
    """Ends a step between micro-steps once any rank has been signalled.

    Ranks ask each other only if steps are slow, over a second per micro-step.

    Args:
        common_steps: micro-steps that every rank makes; batch_size may differ between ranks.
    """

    def __init__(self, signals: StopSignals, common_steps: int, rt: Runtime):
        self.signals, self.common_steps, self.rt = signals, common_steps, rt
        self.ask, self.began = True, time.perf_counter()  # the first step's speed is not known yet

    def __call__(self, micro_step: int) -> None:
        if micro_step == 0:
            self.began = time.perf_counter()
        if self.rt.world_size == 1 or (self.ask and micro_step < self.common_steps):
            if signum := signal_of_any(self.signals, self.rt):
                raise StepInterrupted(signum)

    def status(self, like: Tensor) -> Tensor:
        """The largest signal number and duration of a step over all ranks, (2,). Does not synchronize with the host."""
        # Filled on the device: a copy from the host would wait for it.
        signum, seconds = (torch.full_like(like, x) for x in (self.signals.signum, time.perf_counter() - self.began))
        return all_gather(torch.stack([signum, seconds]), self.rt).amax(dim=0)

    def after_step(self, signum: float, seconds: float) -> int:
        self.ask = seconds > self.common_steps
        return int(signum)


def interrupt_within(model: GPT, signals: StopSignals) -> None:
    """Let a signal end a step at the next block, forward or backward: on a CPU a micro-batch can take minutes."""

    def check(*_: object) -> None:
        if signals.signum and model.training:
            raise StepInterrupted(signals.signum)

    for module in model.h:
        module.register_forward_pre_hook(check)
        module.register_full_backward_pre_hook(check)


def signal_of_any(signals: StopSignals, rt: Runtime) -> int:
    """The number of a signal that any rank has received, or 0. With several ranks a collective that synchronizes."""
    if rt.world_size == 1:
        return signals.signum
    return int(all_gather(torch.tensor([float(signals.signum)], device=rt.device), rt).max())
