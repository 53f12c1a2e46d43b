"""GELU and attention of training on a CPU, against torch's own in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_scratch.config import TrainConfig
from gpt2_scratch.cpu import training as module
from gpt2_scratch.cpu.training import fast_attention, fast_gelu
from gpt2_scratch.distributed import Runtime
from gpt2_scratch.parallel import wrap
from model import ACTIVATIONS, GPT, GPTConfig, causal_attention

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
def test_gelu_and_its_gradient_are_those_of_float64(n: int, dtype: torch.dtype) -> None:
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
@pytest.mark.parametrize("shape", [(100_003,), (2, 70, 3, 3, 24)])
def test_threads_share_the_work_and_give_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    before, found = torch.get_num_threads(), []
    x = torch.randn(shape).to(dtype)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        own = x.clone().requires_grad_()
        y = fast_gelu(own) if len(shape) == 1 else fast_attention(own, 0.2)
        y.backward(y.detach())
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


@needs_compiler
@settings(max_examples=60)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 100),
    n_head=st.integers(1, 3),
    head_dim=st.integers(1, 70),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_attention_and_its_gradient_are_those_of_float64(
    B: int, T: int, n_head: int, head_dim: int, spread: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    qkv = (spread * torch.randn(B, T, 3, n_head, head_dim)).to(dtype).requires_grad_()
    dy = torch.randn(B, T, n_head, head_dim).to(dtype)
    wide = qkv.detach().double().requires_grad_()
    expected = causal_attention(wide, head_dim**-0.5)
    expected.backward(dy.double())
    y = fast_attention(qkv, head_dim**-0.5)
    y.backward(dy)
    assert wide.grad is not None and qkv.grad is not None and y.dtype == qkv.grad.dtype == dtype
    # y is rounded, and by it the gradient: in bfloat16 to 2^-9 of values of the order of `spread`
    error = {torch.float32: 2e-5, torch.bfloat16: 2**-7}[dtype]
    size = float(wide.grad.abs().max())
    torch.testing.assert_close(y.double(), expected.detach(), rtol=error, atol=error * spread)
    torch.testing.assert_close(qkv.grad.double(), wide.grad, rtol=error, atol=error * max(size, spread))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_does_not_depend_on_later_positions(dtype: torch.dtype) -> None:
    qkv = torch.randn(2, 70, 3, 2, 24).to(dtype).requires_grad_()
    later = qkv.detach().clone()
    later[0, 40:] = 100
    later.requires_grad_()
    y, other = fast_attention(qkv, 0.2), fast_attention(later, 0.2)
    assert torch.equal(other[0, :40], y[0, :40]) and torch.equal(other[1], y[1]) and not torch.equal(other, y)
    y[:, :40].float().sum().backward()
    other[:, :40].float().sum().backward()
    assert qkv.grad is not None and later.grad is not None and not qkv.grad[:, 40:].any()
    assert torch.equal(qkv.grad, later.grad)


def test_attention_weights_are_dropped_by_torch() -> None:
    qkv = torch.randn(1, 5, 3, 1, 4)
    torch.manual_seed(1)
    dropped = fast_attention(qkv, 0.5, 0.9)
    torch.manual_seed(1)
    assert torch.equal(dropped, causal_attention(qkv, 0.5, 0.9))
    assert not torch.allclose(dropped, fast_attention(qkv, 0.5))


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.called.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiles", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_on_a_cpu_uses_them(activation: str, compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert any("attention" in name for name in operators.called) != compiles
    tanh = activation in ("gelu_new", "gelu_pytorch_tanh")
    assert ("aten::gelu" in operators.called) == (activation == "gelu" or (tanh and not compiles))
    for before, after in zip(plain, ours):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
