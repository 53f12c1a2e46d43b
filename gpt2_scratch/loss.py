"""The loss that is trained on, and on a CPU a cross-entropy that takes less than half the memory of torch's."""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

CHUNK = 2**19  # logits at a time: what is made of them stays in the caches


class Loss(nn.Module):
    """A model's loss alone: compiled, it makes no gradient of zeros for logits that nobody reads."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.model(idx, targets)[1]


def lean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """`model.cross_entropy` for uncompiled training on a CPU, where logits are the largest tensors there are.

    F.cross_entropy makes three more of their size, and one of float32 from those of a smaller dtype. This keeps the
    logits and makes their gradient. It can be differentiated once, and not by torch.func.

    Args:
        logits: (N, vocab_size).
        targets: int64 (N,); -1 does not count.

    Returns:
        the mean loss in nats, of at least float32; nan where no target counts.
    """
    return _CrossEntropy.apply(logits, targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        chunks = logits.split(_rows(logits))
        log_sums = torch.cat([chunk.to(wide).logsumexp(1, keepdim=True) for chunk in chunks])  # (N, 1)
        counts = (targets[:, None] >= 0).to(wide)  # (N, 1)
        columns = targets[:, None].clamp(min=0)  # (N, 1)
        total = counts.sum()
        ctx.save_for_backward(logits, log_sums, columns, counts / total.clamp(min=1))
        return ((log_sums - logits.gather(1, columns)) * counts).sum() / total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, loss_gradient: Tensor) -> tuple[Tensor, None]:
        logits, log_sums, columns, shares = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        parts = (logits, gradient, log_sums, columns, shares * loss_gradient)
        for chunk, out, log_sum, column, share in zip(*(part.split(_rows(logits)) for part in parts)):
            wide = out if out.dtype == log_sum.dtype else torch.empty_like(out, dtype=log_sum.dtype)
            # (softmax - 1 at the target) * share
            torch.sub(chunk, log_sum, out=wide).exp_().mul_(share).scatter_add_(1, column, -share)
            out.copy_(wide)
        return gradient, None


def _rows(logits: Tensor) -> int:
    return max(1, CHUNK // logits.shape[1])
