"""One model on several processes: a copy in each (DDP), or a shard in each (ZeRO stage 2, FSDP)."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from gpt2_scratch.config import TrainConfig
from gpt2_scratch.cpu.cross_entropy import lean_cross_entropy
from gpt2_scratch.cpu.training import use_fast_functions
from gpt2_scratch.device import autocast_to
from gpt2_scratch.distributed import Runtime, all_gather
from model import GPT


class Loss(nn.Module):
    """The model's loss without its logits: compiled, it makes no gradient of zeros for logits that go unused."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.model(idx, targets)[1]


class LossFunction:
    """The model's loss as training computes it: in the training dtype, compiled, with gradients reduced over ranks.

    Args:
        forward: `Loss`, compiled or not; what evaluation uses.
        ddp: the same inside DistributedDataParallel, if that is in use.
    """

    def __init__(
        self,
        model: GPT,
        forward: nn.Module,
        ddp: DistributedDataParallel | None,
        autocast: AbstractContextManager,
        parallel: str,
    ):
        self.model, self.forward, self.ddp, self.autocast, self.parallel = model, forward, ddp, autocast, parallel

    @property
    def compiled(self) -> bool:
        return not isinstance(self.forward, Loss)

    def __call__(self, inputs: Tensor, targets: Tensor, sync: bool = True) -> Tensor:
        """The mean loss in nats per token, of inputs and targets (B, T).

        Args:
            sync: reduce gradients over the ranks in the backward pass; without, they add up locally.
        """
        forward = self.forward
        if is_sharded(self.model):
            sharded: Any = self.model
            sharded.set_requires_gradient_sync(sync)
            sharded.set_reshard_after_backward(sync or self.parallel == "fsdp")
        elif self.ddp is not None and torch.is_grad_enabled():
            forward = self.ddp
            self.ddp.require_backward_grad_sync = sync  # what DDP.no_sync() sets
        with self.autocast:
            return forward(inputs, targets)


def wrap(model: GPT, cfg: TrainConfig, batch_size: int, dtype: torch.dtype, rt: Runtime) -> LossFunction:
    """Compile the loss of a model if `cfg.compile` is set and a compiler works, and put it into DDP if that is in use.

    (ZeRO and FSDP shard parameters in place, before the optimizer is made: `shard`.) The compiled module goes inside
    DDP, which then splits the graph at its buckets, so that gradients travel during the backward pass. Either every
    rank compiles or none does: one without a compiler would leave the others waiting.
    """
    autocast = autocast_to(dtype, rt.device)

    def build(forward: Any) -> LossFunction:
        use_ddp = rt.world_size > 1 and cfg.parallel == "ddp"
        ddp = wrap_ddp(forward, getattr(torch, cfg.reduce_dtype)) if use_ddp else None
        return LossFunction(model, forward, ddp, autocast, cfg.parallel)

    failed = False
    loss_fn: Any = None
    loss: Any = None
    if cfg.compile:
        try:
            loss_fn = build(torch.compile(Loss(model)))
            loss = warm_up(loss_fn, batch_size)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Inductor, Triton and the C++ compiler each raise their own
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            warnings.warn(f"torch.compile does not work here; training uncompiled ({reason})", stacklevel=2)
            torch._dynamo.reset()
            failed = True
    if not cfg.compile or all_gather(torch.tensor([float(failed)], device=rt.device), rt).any():
        loss_fn = loss = None  # two DDPs at once would reduce the gradients twice
        if rt.device.type == "cpu":
            use_cpu_functions(model)
        loss_fn = build(Loss(model))
        loss = warm_up(loss_fn, batch_size) if loss_fn.ddp else None
    if loss_fn.ddp:
        # DDP rebuilds its buckets after the first backward pass, which changes the order of summation. Do that
        # pass here, or a resumed run would differ from an uninterrupted one in the last bit.
        loss.backward()
        model.zero_grad(set_to_none=False)
    return loss_fn


def use_cpu_functions(model: GPT) -> None:
    """Replace loss, attention and tanh GELU by equivalents of ours that are faster in uncompiled training on a CPU."""
    model.cross_entropy = lean_cross_entropy
    use_fast_functions(model)


def warm_up(loss_fn: LossFunction, batch_size: int) -> Tensor:
    """The loss of a micro-batch of zeros, with the strides of real batches, or torch.compile would recompile."""
    T = loss_fn.model.config.block_size
    batch = torch.zeros(batch_size, T + 1, dtype=torch.int64, device=loss_fn.model.wte.weight.device)
    return loss_fn(batch[:, :-1].clamp(min=0), batch[:, 1:])


def wrap_ddp(forward: nn.Module, reduce_dtype: torch.dtype) -> DistributedDataParallel:
    """DistributedDataParallel, which averages gradients over the ranks, in `reduce_dtype` on the wire."""
    ddp = DistributedDataParallel(forward, gradient_as_bucket_view=True)  # views into the buckets: no second copy
    if reduce_dtype == torch.bfloat16:
        # A wrapper, because DDP accepts the bare hook for NCCL only, though it works with Gloo.
        ddp.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    return ddp


def shard(model: GPT, parallel: str, reduce_dtype: torch.dtype) -> None:
    """Shard parameters, gradients and optimizer state over the ranks, in place (FSDP2).

    A block's weights are all-gathered for its forward pass, and kept until its backward pass ("zero2": Rajbhandari et
    al., ZeRO, 2020, P_os+g) or gathered again for it ("fsdp": P_os+g+p).

    Args:
        reduce_dtype: of gradients on the wire.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(model.wte.weight.device.type, (dist.get_world_size(),))
    # Casting inputs would cast the residual stream between blocks.
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in model.h:
        fully_shard(block, mesh=mesh, reshard_after_forward=parallel == "fsdp", mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # the logits; nothing writes to them


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "unshard")  # importing FSDPModule to ask for it takes a second


@contextmanager
def unsharded(model: GPT, parallel: str) -> Iterator[None]:
    """Give every rank all weights within the block, so that each can use the model without the others."""
    if not is_sharded(model):
        yield
        return
    sharded: Any = model
    for block in model.h:
        block.set_reshard_after_forward(False)
        block.unshard()
    sharded.unshard()
    yield
    for block in model.h:
        block.set_reshard_after_forward(parallel == "fsdp")
        block.reshard()
    sharded.reshard()


def full_state(state: Any, keep: bool) -> Any:
    """A state_dict with its sharded tensors whole and in host memory. A collective: every rank must call.

    Args:
        keep: whether this rank wants the result.
    """
    if hasattr(state, "full_tensor"):
        full = state.detach().full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, dict):
        return {key: full_state(item, keep) for key, item in state.items()}
    return [full_state(item, keep) for item in state] if isinstance(state, list) else state


def shard_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Shard loaded optimizer state as its parameters are sharded."""
    p: Any
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if hasattr(p, "to_local") and isinstance(value, Tensor) and value.shape == p.shape:
                from torch.distributed.tensor import distribute_tensor

                state[key] = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
