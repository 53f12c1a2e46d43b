"""Learning-rate schedules, parameter groups and the optimizer's arithmetic."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gpt2_scratch import optim
from gpt2_scratch.config import parse_config
from gpt2_scratch.optim import (
    learning_rate_at,
    load_optimizer,
    make_optimizer,
    memory_of,
    orthogonalize,
    parameter_groups,
)
from model import GPT, GPTConfig

QUICK = settings(max_examples=50)
SCHEDULES = ["cosine", "linear", "wsd"]
RUN = {"max_steps": 1000, "warmup_steps": 200, "learning_rate": 6e-4, "min_learning_rate": 6e-5}


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    max_steps = draw(st.integers(1, 300))
    peak = draw(st.floats(1e-8, 1.0))
    return {
        "max_steps": max_steps,
        "warmup_steps": draw(st.integers(0, max_steps)),
        "learning_rate": peak,
        "min_learning_rate": peak * draw(st.floats(0.0, 1.0)),
    }


@pytest.mark.parametrize(
    ("schedule", "shares"),  # of the way from the peak to the minimum, at each quarter of the decay
    [
        ("cosine", [1.0, 0.8535533905932737, 0.5, 0.14644660940672627, 0.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("wsd", [1.0, 1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_decay_at_quarters(schedule: str, shares: list[float]) -> None:
    for quarter, share in enumerate(shares):
        rate = learning_rate_at(200 + 200 * quarter, schedule=schedule, **RUN)
        assert rate == pytest.approx(6e-5 + share * 5.4e-4, rel=1e-12)


def test_wsd_falls_in_a_line_over_the_last_fifth() -> None:
    rates = [learning_rate_at(step, schedule="wsd", **RUN) for step in range(1001)]
    assert set(rates[200:801]) == {6e-4}
    assert rates[850] == pytest.approx(6e-5 + 0.75 * 5.4e-4)
    assert rates[900] == pytest.approx(6e-5 + 0.5 * 5.4e-4)
    assert rates[1000] == pytest.approx(6e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(run=runs())
@QUICK
def test_warm_up_is_a_line_to_the_peak(schedule: str, run: dict[str, Any]) -> None:
    warmup, peak = run["warmup_steps"], run["learning_rate"]
    rates = [learning_rate_at(step, schedule=schedule, **run) for step in range(warmup)]
    assert rates == pytest.approx([peak * i / warmup for i in range(1, warmup + 1)])


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(run=runs())
@QUICK
def test_after_the_warm_up_it_falls_from_the_peak_to_the_minimum(schedule: str, run: dict[str, Any]) -> None:
    warmup, end = run["warmup_steps"], run["max_steps"]
    rates = [learning_rate_at(step, schedule=schedule, **run) for step in range(warmup, end + 1)]
    if warmup < end:
        assert rates[0] == pytest.approx(run["learning_rate"])
        assert rates[-1] == pytest.approx(run["min_learning_rate"])
    slack = 1e-12 * run["learning_rate"]
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(rates))
    assert all(rate >= run["min_learning_rate"] - slack for rate in rates)


def small_gpt() -> GPT:
    return GPT(GPTConfig(block_size=4, vocab_size=11, n_layer=2, n_head=2, n_embd=8))


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = small_gpt()
    groups = parameter_groups(model, weight_decay=0.1)
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        matrix = name.endswith("weight") and ".ln_" not in name and not name.startswith("ln_")
        assert decay_of[id(parameter)] == (0.1 if matrix else 0.0), name


def test_muon_takes_the_matrices_of_the_blocks_and_no_more() -> None:
    model = small_gpt()
    groups = parameter_groups(model, weight_decay=0.1, muon=True)
    chosen = {id(p) for group in groups if group["muon"] for p in group["params"]}
    assert chosen == {id(p) for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("shape", [(8, 8), (6, 24), (24, 6)])
def test_orthogonalize_keeps_directions_and_levels_singular_values(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    for drawn, made in zip(matrices, orthogonalize(matrices)):
        u, s, vh = torch.linalg.svd(drawn, full_matrices=False)
        values = torch.diagonal(u.T @ made @ vh.T)
        assert torch.allclose(u @ torch.diag(values) @ vh, made, atol=1e-9), "singular vectors stay"
        assert values[s > 0.02 * s[0]].min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("name", ["gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1558m"])
def test_muon_is_at_most_3_percent_of_a_step(name: str, ranks: int) -> None:
    """By the operations of the busiest rank's matrix products, beside the model's on its share of the tokens."""
    cfg = parse_config([str(ROOT / "configs" / f"{name}.toml")])
    with torch.device("meta"):
        model = GPT(GPTConfig(cfg.block_size, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd))
    shapes = [p.shape for key, p in model.h[0].named_parameters() if p.dim() == 2]
    with FlopCounterMode(display=False) as counted:
        for shape in shapes:
            parts = 3 if cfg.split_qkv and shape[0] == 3 * cfg.n_embd else 1
            orthogonalize(torch.empty(math.ceil(cfg.n_layer / ranks), *shape, device="meta"), parts)
    of_model = model.flops_per_token() * cfg.total_batch_size / ranks
    assert 0.001 < counted.get_total_flops() / of_model < 0.03


def test_muon_updates_many_matrices_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten of a shape, eight and then two, as all at once: the turns bound its memory."""
    model = GPT(GPTConfig(8, 16, n_layer=10, n_head=1, n_embd=8))
    twin, turns = copy.deepcopy(model), []
    monkeypatch.setattr(optim, "orthogonalize", lambda x, parts: (turns.append(len(x)), orthogonalize(x))[1])
    for net, together in ((model, 1), (twin, 2**27)):
        monkeypatch.setattr(optim, "TOGETHER", together)
        torch.manual_seed(0)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        make_optimizer(net, "muon", 0.1, 0.1, 0.9, 0.95).step()
    assert turns == [8, 2] * 4 + [10] * 4
    for p, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-6)


def test_muon_steps_are_near_torchs_own() -> None:
    """torch.optim.Muon, in bfloat16 and one matrix at a time, on the blocks; AdamW, exactly, on the rest."""
    rate, decay = 0.02, 10.0  # takes a fifth a step: that much shows beside the products' rounding
    model, twin = small_gpt(), small_gpt()
    twin.load_state_dict(model.state_dict())
    ours = make_optimizer(model, "muon", rate, decay, 0.9, 0.95)
    blocks = [p for name, p in twin.named_parameters() if name.startswith("h.") and p.dim() == 2]
    muon = torch.optim.Muon(blocks, lr=rate, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    rest = [group for group in parameter_groups(twin, decay, muon=True) if not group["muon"]]
    adamw = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(3):
        for p, other in zip(model.parameters(), twin.parameters()):
            p.grad = torch.randn_like(p)
            other.grad = p.grad.clone()
        for optimizer in (ours, muon, adamw):
            optimizer.step()
    for (name, p), other in zip(model.named_parameters(), twin.parameters()):
        moved = 3 * rate * 0.2 * max(p.shape) ** 0.5
        tolerance = 0.05 * moved if name.startswith("h.") and p.dim() == 2 else 1e-6
        assert (p - other).abs().max() < tolerance, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_step_with_found_inf_changes_nothing(name: str) -> None:
    """Weights, moments and counts: the step after it is that of an optimizer that never saw it."""
    model, twin = small_gpt(), small_gpt()
    twin.load_state_dict(model.state_dict())
    ours, theirs = (make_optimizer(m, name, 0.02, 0.1, 0.9, 0.95) for m in (model, twin))
    theirs.found_inf = torch.tensor(0.0)
    for bad in (0.0, 1.0, 0.0):
        for p, other in zip(model.parameters(), twin.parameters()):
            other.grad = torch.randn_like(p)
            p.grad = other.grad * (math.nan if bad else 1)
        ours.found_inf = torch.tensor(bad)
        ours.step()
        if not bad:
            theirs.step()
        assert all(torch.equal(p, other) for p, other in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_the_state_of_such_an_optimizer_is_loaded(name: str) -> None:
    def trained(n_embd: int, name: str) -> torch.optim.Optimizer:
        model = GPT(GPTConfig(block_size=4, vocab_size=11, n_layer=2, n_head=2, n_embd=n_embd))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer = make_optimizer(model, name, 0.02, 0.1, 0.9, 0.95)
        optimizer.step()
        return optimizer

    state = trained(8, name).state_dict()
    assert load_optimizer(trained(8, name), state)
    other = "adamw" if name == "muon" else "muon"
    for optimizer in (trained(16, name), trained(8, other)):
        assert not load_optimizer(optimizer, state)
    for lost in ("state", "param_groups"):
        assert not load_optimizer(trained(8, name), {key: value for key, value in state.items() if key != lost})


def test_state_from_before_a_groups_setting_loads_with_the_new_optimizers() -> None:
    model = small_gpt()
    optimizer = make_optimizer(model, "muon", 0.02, 0.1, 0.9, 0.95, momentum=0.8, embedding_lr_scale=2.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop("momentum", None)
        del group["lr_scale"]
    fresh = make_optimizer(small_gpt(), "muon", 0.02, 0.1, 0.9, 0.95)
    assert load_optimizer(fresh, state)
    assert [group["lr_scale"] for group in fresh.param_groups] == [1.0, 1.0, 1.0]
    assert fresh.param_groups[-1]["momentum"] == 0.95


def test_tied_weights_are_updated_once() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    assert [len(group["params"]) for group in parameter_groups(model, weight_decay=0.1)] == [1, 0]


def test_optimizer_steps_are_those_of_the_paper() -> None:
    """AdamW (Loshchilov and Hutter, 2019, algorithm 2), by hand in Python's float64, three steps."""
    rate, decay, beta1, beta2, eps = 0.02, 0.3, 0.9, 0.95, 1e-8
    model = nn.Linear(3, 2).double()
    optimizer = make_optimizer(model, "adamw", rate, decay, beta1, beta2)
    start = {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}
    gradients = {name: torch.randn(3, p.numel(), dtype=torch.float64).tolist() for name, p in model.named_parameters()}
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.tensor(gradients[name][step], dtype=torch.float64).view_as(parameter)
        optimizer.step()
    for name, parameter in model.named_parameters():
        for i, value in enumerate(start[name]):
            mean = square = 0.0
            for step in range(3):
                g = gradients[name][step][i]
                mean = beta1 * mean + (1 - beta1) * g
                square = beta2 * square + (1 - beta2) * g * g
                value -= rate * decay * value if name == "weight" else 0.0
                corrected = mean / (1 - beta1 ** (step + 1)), square / (1 - beta2 ** (step + 1))
                value -= rate * corrected[0] / (math.sqrt(corrected[1]) + eps)
            assert parameter.detach().flatten()[i].item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_memory_said_before_the_first_step_is_what_the_step_takes(kind: str) -> None:
    model = GPT(GPTConfig(block_size=8, vocab_size=40, n_layer=2, n_head=2, n_embd=16))
    optimizer = make_optimizer(model, kind, 1e-3, 0.1, 0.9, 0.95)
    said = memory_of(optimizer)
    idx = torch.zeros(1, 8, dtype=torch.int64)
    model(idx, idx)[1].backward()
    optimizer.step()
    kept = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
    assert said == (sum(p.nbytes for p in model.parameters()), kept)
