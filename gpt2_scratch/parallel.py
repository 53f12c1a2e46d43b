"""Several processes that train one model: whole in each ("ddp"), or each with a share of it ("zero2", "fsdp")."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from model import GPT


def shard(model: GPT, kind: str, reduce_dtype: torch.dtype) -> None:
    """Leave each process a share of every parameter, and with that of its gradient and optimizer state (FSDP2).

    A block's weights are gathered for its forward pass, and kept until its backward pass ("zero2": Rajbhandari et
    al., ZeRO, 2020, P_os+g) or gathered again for that ("fsdp": P_os+g+p).

    Args:
        reduce_dtype: of gradients on their way between processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(model.wte.weight.device.type, (dist.get_world_size(),))
    # Without the cast the residual stream keeps its dtype.
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in model.h:
        fully_shard(block, mesh=mesh, reshard_after_forward=kind == "fsdp", mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # the logits; nobody writes to them


def replicate(forward: nn.Module, reduce_dtype: torch.dtype) -> DistributedDataParallel:
    """The model with its gradients averaged over the processes.

    DDP groups the gradients anew after its first backward pass, and with that adds them up in another order. So the
    caller makes the first for nothing: a run that is resumed then adds up in the order of one that goes on.
    """
    parallel = DistributedDataParallel(forward, gradient_as_bucket_view=True)  # gradients once, not twice
    if reduce_dtype == torch.bfloat16:
        # Behind a function of another name: DDP takes the bare one for NCCL only, though Gloo can do it as well.
        parallel.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
    return parallel


def rehearse(forward: nn.Module, model: GPT, batch_size: int, autocast: AbstractContextManager) -> Tensor:
    """The loss of a micro-batch of zeros, laid out as `runtime.to_device` does: compiled code would notice else."""
    batch = torch.zeros(batch_size, model.config.block_size + 1, dtype=torch.int64, device=model.wte.weight.device)
    with autocast:
        return forward(batch[:, :-1].clamp(min=0), batch[:, 1:])


def synchronised_if(
    last: bool, model: GPT, kind: str, replicas: DistributedDataParallel | None
) -> AbstractContextManager:
    """Gradients are reduced over the processes, and "zero2" gives up whole weights, in the last micro-step only."""
    if hasattr(model, "unshard"):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or kind == "fsdp")
    return replicas.no_sync() if replicas and not last else nullcontext()


@contextmanager
def whole_weights(model: GPT, kind: str) -> Iterator[None]:
    """Within it each process has all of the weights, and can use the model without the others."""
    blocks = list(model.h) if hasattr(model, "unshard") else []
    for block in blocks:
        block.set_reshard_after_forward(False)
        block.unshard()
    if blocks:
        model.unshard()
    yield
    for block in blocks:
        block.set_reshard_after_forward(kind == "fsdp")
        block.reshard()
    if blocks:
        model.reshard()


def gathered(value: Any, keep: bool) -> Any:
    """A tensor of which each process has a share, whole and in host memory; likewise in nested dicts and lists.

    Args:
        keep: whether this process wants it; every process must call, in the same order.
    """
    if hasattr(value, "full_tensor"):
        whole = value.detach().full_tensor()
        return whole.cpu() if keep else None
    if isinstance(value, dict):
        return {key: gathered(item, keep) for key, item in value.items()}
    return [gathered(item, keep) for item in value] if isinstance(value, list) else value


def distribute(optimizer: torch.optim.Optimizer) -> None:
    """Leave each process the share of loaded optimizer state that belongs to its share of the parameters."""
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if hasattr(p, "to_local") and isinstance(value, Tensor) and value.shape == p.shape:
                from torch.distributed.tensor import distribute_tensor

                state[key] = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
