"""Weights laid out for writing text: smaller or faster to read than those of training, same answers.

Writing a token reads every weight once, so what counts is bytes a token and how fast they are read.
"""

import torch
from torch import Tensor, nn

from model import GPT


class PackedLinear(nn.Module):
    """nn.Linear in bfloat16 on a CPU, its weight in the blocked layout that oneDNN reads fastest.

    Args:
        linear: with bfloat16 parameters.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights and one scale per output channel; inputs and outputs keep their dtype.

    Args:
        linear: whose weights are rounded: w[i, j] = q[i, j] * scale[i], scale[i] = max |w[i]| / 127.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127  # (out, 1)
        self.weight = (weight.float() / scale).round().to(torch.int8)
        self.scale = scale[:, 0].to(weight.dtype)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[-1] % 16 == 0:  # in bfloat16 the kernel reads 16 at a time, and beyond
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale).unflatten(0, x.shape[:-1])
        else:
            y = x @ (self.weight.to(x.dtype) * self.scale[:, None]).t()
        return y if self.bias is None else y + self.bias


def prepare(model: GPT, int8: bool = False, compile: bool = False) -> GPT:
    """Change a model in place for writing text; it can no longer be trained or saved.

    Args:
        int8: round the weights of all matrix products; else, on a CPU in bfloat16, only lay them out anew.
        compile: its steps are going to be compiled, which lays weights out by itself.
    """
    kind = Int8Linear if int8 else PackedLinear
    weight = model.wte.weight
    eager = weight.device.type == "cpu" and not compile and torch.backends.mkldnn.is_available()
    if int8 or (eager and weight.dtype == torch.bfloat16):
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, kind(child))
    return model
