"""The GELU of training on a CPU, against torch's own in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_scratch.config import TrainConfig
from gpt2_scratch.cpu import gelu as module
from gpt2_scratch.cpu.gelu import fast_gelu
from gpt2_scratch.distributed import Runtime
from gpt2_scratch.parallel import wrap
from model import ACTIVATIONS, GPT, GPTConfig

needs_compiler = pytest.mark.skipif(module.library() is None, reason="needs Linux, AVX2 and a C compiler")


def exact(x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Values and gradient in float64."""
    wide = x.detach().double().requires_grad_()
    y = F.gelu(wide, approximate="tanh")
    y.backward(upstream.double())
    assert wide.grad is not None
    return y.detach(), wide.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 7, 1000, 100_003])
def test_values_and_gradient_are_those_of_float64(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    x = torch.cat([torch.randn(n) * 3, torch.linspace(-12, 12, n), torch.tensor([0.0, -0.0, 100.0, -100.0, 1e9, -1e9])])
    x = x.to(dtype).requires_grad_()
    upstream = torch.randn(len(x)).to(dtype)
    y = fast_gelu(x)
    y.backward(upstream)
    assert y.dtype == dtype and x.grad is not None
    error = {"rtol": max(0.51 * torch.finfo(dtype).eps, 1e-6), "atol": 1e-6}  # rounded to nearest
    for ours, theirs in zip((y.detach(), x.grad), exact(x, upstream)):
        torch.testing.assert_close(ours.double(), theirs, **error)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_nan_and_infinity_is_not_lost(dtype: torch.dtype) -> None:
    x = torch.tensor([float("nan"), float("inf")]).to(dtype).requires_grad_()
    y = fast_gelu(x)
    y.backward(torch.ones_like(x))
    assert x.grad is not None and x.grad.isnan().all()  # NaN at infinity too, as in torch
    assert y[0].isnan() and y[1].isinf()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_the_work_and_give_the_same_bits(dtype: torch.dtype) -> None:
    before, found = torch.get_num_threads(), []
    x, upstream = torch.randn(2, 100_003).to(dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        own = x.clone().requires_grad_()
        y = fast_gelu(own)
        y.backward(upstream)
        found.append((y.detach(), own.grad))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@needs_compiler
@pytest.mark.parametrize("upstream", [torch.randn(6, 4), torch.randn(4, 6).t(), torch.ones(()).expand(6, 4)])
def test_any_strides_will_do(upstream: Tensor) -> None:
    x = torch.randn(4, 6).t().requires_grad_()
    y = fast_gelu(x)
    y.backward(upstream)
    for ours, theirs in zip((y.detach(), x.grad), exact(x, upstream)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.called.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiles", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_on_a_cpu_uses_it_for_the_tanh_form(
    activation: str, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiles:
        monkeypatch.setattr(module, "library", lambda: None)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=97, n_layer=2, n_head=2, n_embd=32, activation=activation))
    if activation == "relu":  # as if model.py had been edited; the config would say otherwise
        model = GPT(replace(model.config, activation="gelu_new"))
        for block in model.h:
            block.mlp.activation = F.relu
    idx = torch.randint(97, (3, 9))
    plain = torch.autograd.grad(model(idx[:, :-1], idx[:, 1:])[1], list(model.parameters()))
    loss_fn = wrap(model, TrainConfig(compile=False), 3, torch.float32, Runtime(torch.device("cpu")))
    with Operators() as operators:
        ours = torch.autograd.grad(loss_fn(idx[:, :-1], idx[:, 1:]), list(model.parameters()))
    tanh = activation in ("gelu_new", "gelu_pytorch_tanh")
    assert ("aten::gelu" in operators.called) == (activation == "gelu" or (tanh and not compiles))
    for before, after in zip(plain, ours):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
