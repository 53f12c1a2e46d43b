"""The lean cross-entropy of training on a CPU, against torch's own in float64; what is compiled for training."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gpt2_scratch.config import TrainConfig
from gpt2_scratch.cpu import cross_entropy as lean
from gpt2_scratch.cpu.cross_entropy import lean_cross_entropy
from gpt2_scratch.dataset import to_device
from gpt2_scratch.distributed import Runtime
from gpt2_scratch.parallel import wrap
from model import GPT, GPTConfig


@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.sampled_from([1, 64, 2**19]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
)
def test_loss_and_gradient_are_those_of_float64(n: int, vocab_size: int, chunk: int, dtype: torch.dtype, seed: int):
    source = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, vocab_size, generator=source) * 8).to(dtype).requires_grad_()
    targets = torch.randint(-1, vocab_size, (n,), generator=source)
    exact_logits = logits.detach().double().requires_grad_()
    exact = F.cross_entropy(exact_logits, targets, ignore_index=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean, "CHUNK", chunk)
        ours = lean_cross_entropy(logits, targets)
        (3 * ours).backward()
    (3 * exact).backward()
    wide = torch.promote_types(dtype, torch.float32)
    assert ours.dtype == wide
    torch.testing.assert_close(ours, exact.to(wide), rtol=1e-5, atol=1e-5, equal_nan=True)
    error = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(logits.grad.double(), exact_logits.grad, rtol=error, atol=1e-5, equal_nan=True)


def test_huge_logits_do_not_overflow():
    logits = torch.tensor([[3e4, -3e4, 0.0]], requires_grad=True)
    ours = lean_cross_entropy(logits, torch.tensor([1]))
    ours.backward()
    assert ours.item() == 6e4
    assert logits.grad.tolist() == [[1.0, -1.0, 0.0]]


def test_a_target_outside_the_vocabulary_is_an_error():
    with pytest.raises((IndexError, RuntimeError), match="index"):
        lean_cross_entropy(torch.randn(2, 5), torch.tensor([1, 5]))


def test_the_model_trains_as_with_torchs_loss_and_its_logits_stay():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=97, n_layer=2, n_head=2, n_embd=32))
    idx = torch.randint(97, (3, 16))
    targets = torch.randint(-1, 97, (3, 16))
    gradients = []
    for cross_entropy in (model.cross_entropy, lean_cross_entropy):
        model.cross_entropy = cross_entropy
        model.zero_grad()
        logits, value = model(idx, targets)
        before = logits.detach().clone()
        value.backward()
        assert torch.equal(logits.detach(), before)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for torchs, ours in zip(*gradients):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-6)


def test_training_goes_on_with_what_was_compiled_at_its_start(monkeypatch: pytest.MonkeyPatch):
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    device = torch.device("cpu")
    model = GPT(GPTConfig(block_size=16, vocab_size=97, n_layer=1, n_head=2, n_embd=32))
    loss_fn = wrap(model, TrainConfig(), 2, torch.float32, Runtime(device))
    assert loss_fn.compiled and loss_fn.ddp is None
    (graph,) = graphs
    assert len(graph.graph.output_node().args[0]) == 1  # the loss: logits would have a gradient
    batches = iter([np.random.default_rng(0).integers(97, size=(2, 17))])
    for inputs, targets in to_device(batches, device):
        value = loss_fn(inputs, targets)
        assert value.item() == model(inputs, targets)[1].item()
    assert len(graphs) == 1
