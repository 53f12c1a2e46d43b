"""Parameter groups, optimizer and learning-rate schedule."""

import math

import torch
import torch.nn as nn

SCHEDULES = ("cosine", "linear", "wsd")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices (embeddings among them) decay; biases and LayerNorm parameters do not.

    Raises:
        AssertionError: if a parameter is not in exactly one group.
    """
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, params)), "every parameter must be in exactly one group"
    return groups


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, beta1: float, beta2: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) as one fused kernel where the device has it, eps 1e-8."""
    groups = parameter_groups(model, weight_decay)
    fused = next(model.parameters()).device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=1e-8, fused=fused)


def learning_rate_at(
    step: int, *, schedule: str, max_steps: int, warmup_steps: int, learning_rate: float, min_learning_rate: float
) -> float:
    """The learning rate of a step, counted from 0: a pure function.

    It rises linearly over `warmup_steps`, then falls to `min_learning_rate` at `max_steps`: along half a
    cosine ("cosine"), a straight line ("linear"), or level until the last fifth of the run and then a
    straight line ("wsd": warm-up, stable, decay; Hu et al., MiniCPM, 2024, section 4).
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    start = max(warmup_steps, int(0.8 * max_steps)) if schedule == "wsd" else warmup_steps
    done = min(1.0, max(0.0, (step - start) / max(1, max_steps - start)))
    share = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return min_learning_rate + share * (learning_rate - min_learning_rate)
