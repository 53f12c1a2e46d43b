"""Parameter groups, AdamW and Muon, learning-rate schedules."""

import math
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

TOGETHER = 2**27  # numbers in the matrices that Muon updates at a time, which takes about five times their memory


def parameter_groups(model: nn.Module, weight_decay: float, muon: bool = False, split_qkv: bool = False) -> list[dict]:
    """Weight decay for matrices and embeddings; none for biases and LayerNorm parameters.

    Decay pulls a weight towards 0, which regularizes a matrix but would only shrink a LayerNorm's gain. A group's
    learning rate is the run's times its `lr_scale`.

    Args:
        muon: put the matrices of the blocks into a group of their own, marked `muon`.
        split_qkv: and those that are query, key and value in one into another, to be orthogonalized in three `parts`.

    Raises:
        AssertionError: a parameter is not in exactly one group.
    """
    named = list(model.named_parameters())
    blocks = {name: p for name, p in named if muon and name.startswith("h.") and p.dim() == 2}
    qkv = [blocks.pop(name) for name in list(blocks) if split_qkv and name.endswith("attn.c_attn.weight")]
    in_blocks = {id(p) for p in [*blocks.values(), *qkv]}
    rest = [p for _, p in named if id(p) not in in_blocks]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay, "muon": False, "lr_scale": 1.0},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "muon": False, "lr_scale": 1.0},
    ]
    for params, parts in ((list(blocks.values()), 1), (qkv, 3)):
        if params:
            of_muon = {"weight_decay": weight_decay, "muon": True, "lr_scale": 1.0, "parts": parts}
            groups.append({"params": params, **of_muon})
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for _, p in named), "every parameter must be in exactly one group"
    return groups


def make_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    momentum: float = 0.95,
    embedding_lr_scale: float = 1.0,
    split_qkv: bool = False,
) -> torch.optim.AdamW:
    """ "adamw" (Loshchilov and Hutter, 2019) as one fused kernel, or "muon"; eps 1e-8.

    Args:
        momentum, embedding_lr_scale, split_qkv: of "muon" only.

    A step with the attribute `found_inf` (a float32 scalar on the device) at 1 changes nothing, except on MPS, whose
    kernel ignores it. torch.amp.GradScaler uses the same convention with fused optimizers.
    """
    groups = parameter_groups(model, weight_decay, name == "muon", split_qkv)
    if name == "muon":
        groups[0]["lr_scale"] = embedding_lr_scale
        for group in groups[2:]:
            group["momentum"] = momentum
    kind = Muon if name == "muon" else torch.optim.AdamW
    return kind(groups, lr=learning_rate, betas=(beta1, beta2), eps=1e-8, fused=True)


def memory_of(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of this rank's share of the weights and of the optimizer's state; gradients take as much as weights."""
    weights = [sum(to_local(p).nbytes for p in group["params"]) for group in optimizer.param_groups]
    copies = [1 if group["muon"] else 2 for group in optimizer.param_groups]  # momentum, or both of AdamW's moments
    return sum(weights), sum(n * size for n, size in zip(copies, weights))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> bool:
    """Load a state_dict. Returns whether it has the state of every parameter, in its shape."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        for group, values in zip(optimizer.param_groups, settings):
            group.update({name: value for name, value in values.items() if name not in group})  # newer than the state
        for group in optimizer.param_groups:
            names = ("momentum",) if group["muon"] else ("exp_avg", "exp_avg_sq")
            for p in group["params"]:
                kept = optimizer.state[p]
                if kept["step"].shape or any(kept[name].shape != p.shape for name in names):
                    return False
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return True


class Muon(torch.optim.AdamW):
    """Muon for the groups marked `muon`, AdamW for the others.

    A matrix is updated by its gradient's momentum, orthogonalized (Jordan et al., "Muon: An optimizer for hidden
    layers in neural networks", 2024) and scaled to the RMS of an AdamW update, so that both share a learning rate (Liu
    et al., "Muon is Scalable for LLM Training", 2025, section 2.2). torch.optim.Muon works matrix by matrix in
    bfloat16, which takes seconds per step on a CPU without AMX; here all matrices of one shape are batched, in
    bfloat16 on CUDA only.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            shapes = {p.shape for p in group["params"]} if group["muon"] else ()
            for shape in sorted(shapes):
                params = [p for p in group["params"] if p.shape == shape and p.grad is not None]
                n = max(8, TOGETHER // shape.numel() // 8 * 8)  # eights divide evenly among the GPUs of a node
                for i in range(0, len(params), n):
                    self._update(params[i : i + n], group)

    def _update(self, params: list[Tensor], group: dict) -> None:
        """Update matrices of one shape (rows, columns)."""
        for p in params:
            if not self.state[p]:
                # `step` is unused, but AdamW.load_state_dict expects one in every state.
                self.state[p].update(step=torch.zeros(()), momentum=torch.zeros_like(p))
        buffers = [to_local(self.state[p]["momentum"]) for p in params]
        grads = torch.stack([to_local(cast(Tensor, p.grad)) for p in params])  # (n, rows, columns)
        old = torch.stack(buffers)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            grads = torch.where(found_inf > 0, old, grads)  # interpolating between equals changes nothing
        new = old.lerp(grads, 1 - group["momentum"])
        torch._foreach_copy_(buffers, list(new.unbind()))
        update = grads.lerp(new, group["momentum"])  # Nesterov's momentum
        update = orthogonalize_together(update, params[0], group["parts"])
        rate = group["lr"] if found_inf is None else group["lr"] * (1 - found_inf)
        own = [to_local(p) for p in params]
        torch._foreach_mul_(own, 1 - rate * group["weight_decay"])
        rows, columns = params[0].shape
        update *= -rate * 0.2 * max(rows // group["parts"], columns) ** 0.5
        torch._foreach_add_(own, list(update.unbind()))


def to_local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is.

    DTensors are recognized by their methods, here and elsewhere: importing torch.distributed.tensor takes a second.
    """
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def orthogonalize_together(matrices: Tensor, like: Tensor, parts: int = 1) -> Tensor:
    """`orthogonalize` with the work shared out over the ranks of a process group, if there is one. A collective.

    Args:
        matrices: (n, rows, columns); if sharded, this rank's rows of each.
        like: the parameter of one of them, which tells how it is sharded.
        parts: as of `orthogonalize`.
    """
    if hasattr(like, "to_local"):
        from torch.distributed.tensor import DTensor, Shard

        mesh, shape = cast(DTensor, like).device_mesh, torch.Size((len(matrices), *like.shape))
        layout: dict[str, Any] = {"shape": shape, "stride": (shape[1] * shape[2], shape[2], 1)}
        rows = DTensor.from_local(matrices, mesh, [Shard(1)], **layout)
        whole = rows.redistribute(placements=[Shard(0)]).to_local()  # all-to-all: n / ranks whole matrices
        own = orthogonalize(whole, parts)
        return DTensor.from_local(own, mesh, [Shard(0)], **layout).redistribute(placements=[Shard(1)]).to_local()
    if not dist.is_initialized():
        return orthogonalize(matrices, parts)
    ranks, n = dist.get_world_size(), len(matrices)
    share = math.ceil(n / ranks)
    padded = F.pad(matrices, (0, 0, 0, 0, 0, share * ranks - n))  # (ranks * share, rows, columns)
    own = orthogonalize(padded[dist.get_rank() * share :][:share], parts)
    dist.all_gather(list(padded.chunk(ranks)), own)
    return padded[:n]


def orthogonalize(matrices: Tensor, parts: int = 1) -> Tensor:
    """Push the singular values of matrices (n, rows, columns) towards 1, into about 0.7 to 1.2.

    Five steps of the quintic Newton-Schulz iteration with the coefficients of Jordan et al. (2024).

    Args:
        parts: matrices stacked in each, which are orthogonalized separately.
    """
    n, rows, columns = matrices.shape
    x = matrices.reshape(n * parts, rows // parts, columns)
    x = x.bfloat16() if matrices.is_cuda else x
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x if wide else x.transpose(1, 2)).reshape(matrices.shape).to(matrices.dtype)


def learning_rate_at(
    step: int,
    *,
    schedule: str,
    max_steps: int,
    warmup_steps: int,
    learning_rate: float,
    min_learning_rate: float,
    decay_share: float = 0.2,
) -> float:
    """The learning rate of a step, counted from 0.

    Rises linearly over `warmup_steps`, then falls to `min_learning_rate` at `max_steps`: along half a cosine
    ("cosine"), linearly ("linear"), or constant until the last `decay_share` of the run and then linearly ("wsd":
    warm-up, stable, decay; Hu et al., MiniCPM, 2024, section 4).
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    start = max(warmup_steps, int((1 - decay_share) * max_steps)) if schedule == "wsd" else warmup_steps
    done = min(1.0, max(0.0, (step - start) / max(1, max_steps - start)))
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return min_learning_rate + share * (learning_rate - min_learning_rate)
