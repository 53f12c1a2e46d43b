"""Every setting of a training run has the effect it promises, seen from outside: in weights, files, figures, calls."""

import contextlib
import dataclasses
import importlib.machinery
import json
import math
import re
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_end_to_end
import torch
from conftest import ROOT, TINY
from test_end_to_end import curve, metrics, run_tiny
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import gpt2_scratch.metrics
import train as training
from gpt2_scratch.checkpoint import CheckpointWriter, checkpoints, load_state
from gpt2_scratch.cli import UserError
from gpt2_scratch.config import TrainConfig
from gpt2_scratch.dataset import TokenDataset, training_batches, write_shards
from gpt2_scratch.optim import learning_rate_at, orthogonalize
from gpt2_scratch.parallel import Loss
from model import GPT, GPTConfig

Settings = dict[str, Any]
# The smallest network that has everything. Without clipping, so that every gradient shows.
SMALL: Settings = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "total_batch_size": 64, "batch_size": 2}
SMALL |= {"max_steps": 3, "warmup_steps": 0, "schedule": "linear", "learning_rate": 1e-2, "min_learning_rate": 0.0}
SMALL |= {"optimizer": "adamw", "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 0.0, "seed": 1337}
SMALL |= {"decay_share": 0.2, "momentum": 0.95, "embedding_lr_scale": 1.0, "split_qkv": False}
SMALL |= {"initializer_range": 0.06, "data": "data/shakespeare", "dtype": "float32"}
SMALL |= {"eval_interval": 0, "eval_tokens": 16, "checkpoint_interval": 0, "sample_interval": 0}
FROZEN: Settings = {"learning_rate": 1e-30, "min_learning_rate": 0.0, "weight_decay": 0.0}  # weights stay as they were

TESTED: dict[str, Callable] = {}  # the test of each setting


def setting(*names: str) -> Callable[[Callable], Callable]:
    """Marks the test of these settings."""

    def mark(test: Callable) -> Callable:
        TESTED.update(dict.fromkeys(names, test))
        return test

    return mark


def test_every_setting_has_a_test() -> None:
    assert TESTED.keys() == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes most of so short a run's time."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(training, "write_passage", lambda *_: "")


def run(name: str = "run", **changed: Any) -> Path:
    """Train with SMALL and what is changed of it; the newest checkpoint."""
    flags = [text for key, value in (SMALL | changed).items() for text in (f"--{key}", str(value))]
    run_tiny("--run_name", name, *flags)
    return checkpoints(Path("out") / name)[-1]


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in GPT.from_pretrained(checkpoint).named_parameters()}


@contextlib.contextmanager
def hooked(look: Callable[[nn.Module, tuple, Any], None]) -> Iterator[None]:
    """Within it a function sees the inputs and outputs of every module."""
    handle = register_module_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def corpus(folder: str, train: list[int], val: list[int]) -> str:
    """Make a folder of data of these bytes."""
    directory = Path(folder)
    directory.mkdir(parents=True)
    shards = {
        split: write_shards(directory, split, [np.array([256, *ids])], 257)
        for split, ids in {"train": train, "val": val}.items()
    }
    (directory / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 257, "shards": shards}))
    return folder


# Weights and figures, against a loop in the plainest words.


def plain(**changed: Any) -> dict[str, Tensor]:
    """What a run leaves: its weights, its optimizer's state, and loss, gradient norm and learning rate of each step."""
    s = SMALL | changed
    torch.manual_seed(s["seed"])
    sizes = {name: s[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "initializer_range")}
    model = GPT(GPTConfig(vocab_size=257, **sizes))
    windows = s["total_batch_size"] // s["block_size"]
    batches = training_batches(
        TokenDataset(s["data"], "train", s["block_size"]),
        seed=s["seed"],
        consumed=0,
        sequences_per_step=windows,
        batch_size=windows,
        rank=0,
        world_size=1,
    )
    schedule = ("schedule", "max_steps", "warmup_steps", "learning_rate", "min_learning_rate", "decay_share")
    muon = s["optimizer"] == "muon"
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    lines = []
    for step in range(s["max_steps"]):
        rate = learning_rate_at(step, **{name: s[name] for name in schedule})
        batch = torch.from_numpy(next(batches))
        loss = model(batch[:, :-1], batch[:, 1:])[1]
        grads = dict(zip(moments, torch.autograd.grad(loss, list(model.parameters()))))
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        for name, p in model.named_parameters():
            g = grads[name] * (min(1, s["grad_clip"] / norm) if s["grad_clip"] else 1)
            mean, square = moments[name]
            decay = s["weight_decay"] if p.dim() == 2 else 0.0
            with torch.no_grad():
                if muon and name.startswith("h.") and p.dim() == 2:
                    m = s["momentum"]
                    mean.mul_(m).add_((1 - m) * g)
                    whole = (1 - m) * g + m * mean
                    stacked = whole.chunk(3) if s["split_qkv"] and "c_attn" in name else [whole]
                    update = torch.cat([0.2 * max(w.shape) ** 0.5 * orthogonalize(w[None])[0] for w in stacked])
                else:
                    mean.mul_(s["beta1"]).add_((1 - s["beta1"]) * g)
                    square.mul_(s["beta2"]).add_((1 - s["beta2"]) * g * g)
                    corrected = square / (1 - s["beta2"] ** (step + 1))
                    update = mean / (1 - s["beta1"] ** (step + 1)) / (corrected.sqrt() + 1e-8)
                scale = s["embedding_lr_scale"] if muon and name in ("wte.weight", "wpe.weight") else 1.0
                p -= scale * rate * (decay * p + update)
        lines.append([loss.item(), norm, rate])
    left = {"lines": torch.tensor(lines)} | {name: p.detach() for name, p in model.named_parameters()}
    return left | {f"mean of {name}": mean for name, (mean, _) in moments.items()}


def left_by_run(checkpoint: Path) -> dict[str, Tensor]:
    """The same of a run that was trained."""
    found = weights(checkpoint)
    state = load_state(checkpoint)["optimizer"]
    rest, vectors, blocks, qkv = [], [], [], []
    groups = len(state["param_groups"])  # of AdamW, one more of Muon, or two if it splits c_attn
    for name, p in found.items():
        muon = groups > 2 and name.startswith("h.") and p.dim() == 2
        split = muon and groups == 4 and "c_attn" in name
        (qkv if split else blocks if muon else rest if p.dim() == 2 else vectors).append(name)
    means = {
        f"mean of {name}": state["state"][i]["exp_avg" if name not in blocks + qkv else "momentum"]
        for i, name in enumerate(rest + vectors + blocks + qkv)
    }
    keys = ("train_loss", "grad_norm", "lr")
    lines = [[line[key] for key in keys] for line in metrics(checkpoint.parts[1]) if "lr" in line]
    return {"lines": torch.tensor(lines)} | found | means


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two runs, relative to the largest value of its tensor."""
    if {name: value.shape for name, value in a.items()} != {name: value.shape for name, value in b.items()}:
        return math.inf
    # Softmax does not see the keys' bias: its gradient is rounding noise, which AdamW makes large.
    pairs = [(a[name], b[name]) for name in a if not name.endswith("c_attn.bias")]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


@setting("seed", "n_layer", "n_head", "n_embd", "block_size", "initializer_range", "total_batch_size", "max_steps")
@setting("learning_rate", "min_learning_rate", "warmup_steps", "optimizer", "weight_decay", "beta1", "beta2")
@setting("grad_clip", "momentum", "embedding_lr_scale", "split_qkv")
@pytest.mark.parametrize(
    ("name", "value", "wrong", "beside"),  # wrong: values that would leave something else
    [
        ("seed", 7, [8, 14], {}),
        ("n_layer", 2, [1, 3], {}),
        ("n_head", 4, [2, 8], {}),
        # Of seed 1337 one gradient is so close to 0 that AdamW turns its rounding into 2e-3.
        ("n_embd", 24, [22, 48], {"seed": 7}),
        ("block_size", 8, [4, 16], {}),
        ("initializer_range", 0.1, [0.02, 0.05, 0.2], {}),
        ("total_batch_size", 96, [64, 192], {}),
        ("max_steps", 2, [1, 3, 4], {}),
        ("learning_rate", 2e-2, [1e-2, 4e-2], {}),
        ("min_learning_rate", 4e-3, [0.0, 2e-3, 8e-3], {}),
        ("warmup_steps", 2, [0, 1, 3], {}),
        ("optimizer", "muon", ["adamw"], {}),
        ("weight_decay", 3.0, [0.0, 1.5, 6.0], {}),
        ("weight_decay", 3.0, [0.0, 1.5, 6.0], {"optimizer": "muon"}),
        ("beta1", 0.6, [0.0, 0.3, 0.9], {}),
        ("beta2", 0.4, [0.0, 0.8, 0.95], {}),
        ("momentum", 0.6, [0.3, 0.8, 0.95], {"optimizer": "muon"}),
        ("embedding_lr_scale", 3.0, [0.5, 1.0, 2.0], {"optimizer": "muon"}),
        ("split_qkv", True, [False], {"optimizer": "muon"}),
        ("grad_clip", 0.2, [0.0, 0.1, 0.4], {}),
    ],
)
def test_run_is_that_of_a_plain_loop(
    workplace: Path, name: str, value: Any, wrong: list[Any], beside: Settings
) -> None:
    left = left_by_run(run(**beside, **{name: value}))
    assert distance(left, plain(**beside, **{name: value})) < 1e-3
    assert all(distance(left, plain(**beside, **{name: other})) > 1e-2 for other in wrong), "or it would prove nothing"


@setting("schedule", "decay_share")
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"schedule": "linear"}, [5e-3, 1e-2, 1e-2, 8.2e-3, 6.4e-3, 4.6e-3, 2.8e-3]),
        ({"schedule": "cosine"}, [5e-3, 1e-2, 1e-2, 9.140576e-3, 6.890576e-3, 4.109424e-3, 1.859424e-3]),
        ({"schedule": "wsd"}, [5e-3, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2, 5.5e-3]),
        ({"schedule": "wsd", "decay_share": 0.5}, [5e-3, 1e-2, 1e-2, 1e-2, 7.75e-3, 5.5e-3, 3.25e-3]),
        ({"schedule": "wsd", "decay_share": 1.0}, [5e-3, 1e-2, 1e-2, 8.2e-3, 6.4e-3, 4.6e-3, 2.8e-3]),
    ],
)
def test_learning_rate_of_each_step(workplace: Path, schedule: Settings, expected: list[float]) -> None:
    settings = {**schedule, "max_steps": 7, "warmup_steps": 2, "min_learning_rate": 1e-3}
    left = left_by_run(run(**settings))
    assert curve("run", "lr") == pytest.approx(expected, rel=1e-5)
    assert distance(left, plain(**settings)) < 1e-2


@setting("data")
def test_trains_and_evaluates_on_the_data_named(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    other = corpus("data/other", list(range(256)) * 8, list(range(100)))
    left = left_by_run(run(data=other, eval_tokens=0))
    assert "over 100 tokens" in capsys.readouterr().out
    assert distance(left, plain(data=other)) < 1e-3 and distance(left, plain()) > 1e-2


@setting("batch_size")
def test_micro_steps_are_of_batch_size_windows(workplace: Path) -> None:
    """And give the gradient of the whole step. More windows than a step has are cut to those."""
    for batch_size, shapes in {1: [(1, 16)] * 4, 2: [(2, 16)] * 2, 4: [(4, 16)], 64: [(4, 16)]}.items():
        seen = []

        def look(module: nn.Module, inputs: tuple, _: Any, seen: list = seen) -> None:
            if isinstance(module, Loss) and module.training:
                seen.append(tuple(inputs[0].shape))

        with hooked(look):
            left = left_by_run(run(f"b{batch_size}", batch_size=batch_size, max_steps=1))
        assert seen == shapes
        assert distance(left, plain(max_steps=1)) < 1e-3


@setting("init_from")
def test_begins_from_the_weights_named(workplace: Path) -> None:
    source = run("source", n_layer=2, block_size=32, max_steps=1)
    free = {"n_layer": 0, "n_head": 0, "n_embd": 0, "block_size": 16}  # as loaded, but for a shorter context
    fine = weights(run("fine", init_from=source, seed=7, **free, **FROZEN, max_steps=1))
    assert fine.keys() == weights(source).keys()
    for name, p in weights(source).items():
        # A weight of exactly 0 takes a step of 1e-30.
        torch.testing.assert_close(fine[name], p[:16] if name == "wpe.weight" else p, rtol=0, atol=1e-29)


@setting("dtype")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_are_made_in_dtype(workplace: Path, dtype: str) -> None:
    """Gradients are clipped and logged at their true size, though float16 scales them up on their way."""
    seen = set()

    def look(module: nn.Module, _: tuple, output: Any) -> None:
        if isinstance(module, nn.Linear):
            seen.add(output.dtype)

    with hooked(look):
        checkpoint = run(dtype=dtype, grad_clip=0.2, max_steps=2)
    assert seen == {getattr(torch, dtype)}
    assert all(p.dtype == torch.float32 for p in weights(checkpoint).values())
    left, expected = left_by_run(checkpoint), plain(grad_clip=0.2, max_steps=2)
    means = [name for name in expected if name.startswith("mean")] + ["lines"]
    off = distance({name: left[name] for name in means}, {name: expected[name] for name in means})
    assert off < 1e-4 if dtype == "float32" else 1e-5 < off < 0.1


def test_float16_takes_its_scale_along(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It halves with a step whose gradient is too large for it, and a resumed run begins with what it had."""
    forward = GPT.forward
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", lambda self, *args: (None, forward(self, *args)[1] * math.inf))
        scaled = load_state(run(dtype="float16", max_steps=1))["scaler"]
    assert scaled["scale"] == 2**15
    assert load_state(run(dtype="float16", max_steps=2, resume=True))["scaler"]["scale"] == 2**15
    assert not load_state(run("whole", dtype="float32", max_steps=1))["scaler"]


@setting("dropout")
def test_dropout_is_the_share_of_zeros_in_training_alone(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: dict[bool, list[float]] = {True: [], False: []}
    attention: dict[bool, set[float]] = {True: set(), False: set()}
    whole = nn.functional.scaled_dot_product_attention

    def look(module: nn.Module, _: tuple, output: Any) -> None:
        if isinstance(module, nn.Dropout):
            shares[module.training].append(float((output == 0).float().mean()))

    def attend(*args: Any, dropout_p: float = 0.0, **options: Any) -> Tensor:
        attention[torch.is_grad_enabled()].add(dropout_p)
        return whole(*args, dropout_p=dropout_p, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    Path("rows.jsonl").write_text('{"ctx": "so", "endings": ["a", "b", "c", "d"], "label": "0"}\n')
    with hooked(look):
        evaluated = {"eval_interval": 1, "eval_hellaswag": 1, "hellaswag_data": "rows.jsonl"}
        run(dropout=0.3, max_steps=2, total_batch_size=1024, batch_size=64, **evaluated)
    # Of the embeddings, and of a block's attention and MLP, in each of two steps.
    assert shares[True] == pytest.approx([0.3] * 6, abs=0.02)
    assert set(shares[False]) == {0.0}
    assert attention[True] == {0.3} and attention[False] <= {0.0}  # where nothing is dropped, it may be computed in C


def test_dropout_is_drawn_anew_for_each_step_and_seed(workplace: Path) -> None:
    """With the same weights and windows that are all alike nothing but the masks can make losses differ."""
    data = corpus("data/alike", [97] * 999, [97] * 99)
    source = run("source", data=data, max_steps=1)
    again = {"data": data, "init_from": source, "dropout": 0.3, **FROZEN}
    losses = []
    for seed in (1, 2):
        run(f"seed{seed}", seed=seed, **again)
        losses += curve(f"seed{seed}")
    assert len(set(losses)) == 6
    run("none", **again | {"dropout": 0.0})
    assert len(set(curve("none"))) == 1


# What is evaluated, written and counted, and when.


@setting("run_name")
def test_run_is_written_to_its_folder_alone(workplace: Path) -> None:
    checkpoint = run("elsewhere", max_steps=1)
    assert json.loads((checkpoint / "config.json").read_text())["eos_token_id"] == 256, "the data's <|endoftext|>"
    assert [path.name for path in Path("out").iterdir()] == ["elsewhere"]
    assert {"config.toml", "metrics.jsonl", "checkpoints"} <= {path.name for path in Path("out/elsewhere").iterdir()}


@setting("resume")
def test_resume_goes_on_and_nothing_else_does(workplace: Path) -> None:
    level = {"min_learning_rate": SMALL["learning_rate"]}  # a schedule that does not depend on max_steps
    run(max_steps=1, **level)
    with pytest.raises(UserError, match="--resume"):
        run(max_steps=3, resume=False, **level)
    left = left_by_run(run(max_steps=3, resume=True, **level))
    assert distance(left, plain(max_steps=3, **level)) < 1e-3


@setting("eval_interval", "log_interval", "checkpoint_interval", "keep_checkpoints")
@pytest.mark.parametrize(
    ("name", "value", "evaluated", "logged", "kept"),
    [
        ("eval_interval", 2, [2, 4, 5], [5], [5]),
        ("log_interval", 2, [5], [2, 4, 5], [5]),
        ("checkpoint_interval", 2, [5], [5], [2, 4, 5]),
        ("keep_checkpoints", 2, [5], [5], [4, 5]),
    ],
)
def test_intervals(
    workplace: Path, name: str, value: int, evaluated: list[int], logged: list[int], kept: list[int]
) -> None:
    """0, the default of this test, is at the end only."""
    intervals = {"eval_interval": 0, "log_interval": 0, "checkpoint_interval": 0, "keep_checkpoints": 9}
    if name == "keep_checkpoints":
        intervals["checkpoint_interval"] = 1
    every_checkpoint_waits = CheckpointWriter.save
    with pytest.MonkeyPatch.context() as patch:  # else one may be left out while the one before is written
        patch.setattr(CheckpointWriter, "save", lambda *args, wait=True: every_checkpoint_waits(*args, wait=True))
        run(**intervals | {name: value}, max_steps=5)
    lines = metrics("run")
    assert [line["step"] for line in lines if "val_loss" in line] == evaluated
    assert [line["step"] for line in lines if "train_loss" in line] == logged
    assert [int(path.name[5:]) for path in checkpoints(Path("out/run"))] == kept
    assert [line["tokens"] for line in lines] == [64 * line["step"] for line in lines]


@setting("eval_tokens")
@pytest.mark.parametrize(("eval_tokens", "counted"), [(16, 16), (40, 48), (0, 90)])
def test_evaluation_is_over_so_many_tokens(
    workplace: Path, capsys: pytest.CaptureFixture, eval_tokens: int, counted: int
) -> None:
    """The first ones, rounded up to a window."""
    val = np.random.default_rng(0).integers(0, 256, 90)
    model = GPT.from_pretrained(run(data=corpus("data/short", [97] * 999, val.tolist()), eval_tokens=eval_tokens))
    assert f"over {counted} tokens" in capsys.readouterr().out
    ids = torch.tensor([256, *val])[: counted + 1]
    pieces = [ids[i : i + 17] for i in range(0, counted, 16)]
    loss = sum(model(piece[None, :-1], piece[None, 1:])[1].item() * (len(piece) - 1) for piece in pieces) / counted
    assert curve("run", "val_loss") == [pytest.approx(loss, abs=1e-5)]


def test_best_loss_is_that_of_the_best_evaluation(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = run(learning_rate=1.0, max_steps=4, eval_interval=1)
    losses = curve("run", "val_loss")
    assert losses[-1] > min(losses), "or it would prove nothing"
    best = [float(text) for text in re.findall(r"\(best: ([\d.]+)\)", capsys.readouterr().out)]
    assert best == pytest.approx([min(losses[: i + 1]) for i in range(4)], abs=1e-4)
    assert load_state(checkpoint)["progress"]["best_val_loss"] == min(losses)


@setting("eval_hellaswag", "hellaswag_data")
def test_examples_of_the_file_are_scored_evenly_spread(workplace: Path) -> None:
    """An untrained model finds the shortest ending likeliest; the rows that have it as answer tell which were read."""
    rows = [
        {"ctx": "so", "endings": ["b" * 40, "a", "c" * 40, "d" * 40], "label": str(int(right))}
        for right in (True, True, False, True, False, False)
    ]
    for file, first in {"rows.jsonl": 0, "turned.jsonl": 3}.items():
        turned = rows[first:] + rows[:first]
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in turned))
    still = {**FROZEN, "max_steps": 1, "block_size": 64, "eval_interval": 1}
    scores = {}
    for file, n in (("rows.jsonl", 4), ("rows.jsonl", 3), ("rows.jsonl", 5), ("rows.jsonl", 99), ("turned.jsonl", 3)):
        run(f"{file}{n}", eval_hellaswag=n, hellaswag_data=file, **still)
        scores[file, n] = metrics(f"{file}{n}")[-1]["hellaswag_acc"]
    rows_of = {4: [0, 1, 3, 4], 3: [0, 2, 4], 5: [0, 1, 2, 3, 4], 99: range(6)}
    right = [row["label"] == "1" for row in rows]
    for n, numbers in rows_of.items():
        assert scores["rows.jsonl", n] == pytest.approx(sum(right[i] for i in numbers) / len(numbers))
    assert scores["turned.jsonl", 3] == pytest.approx(2 / 3)
    run("none", hellaswag_data="nowhere.jsonl", **still)
    assert "hellaswag_acc" not in metrics("none")[-1]


@setting("sample_interval")
@pytest.mark.parametrize(("value", "steps"), [("eval", [2, 4]), (3, [3]), (0, [])])
def test_passages_are_written_while_training(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, value: object, steps: list[int]
) -> None:
    """At the end a longer one is written anyway; they leave the run as it is."""
    monkeypatch.setattr(training, "write_passage", lambda model, tokenizer, n=400: f"{n} tokens{torch.rand(1)}")
    run("written", sample_interval=value, max_steps=5, eval_interval=2)
    said = capsys.readouterr().out
    assert [int(step) for step in re.findall(r"step (\d+): 100 tokens", said)] == steps and "\n400 tokens" in said
    run("silent", sample_interval=0, max_steps=5, eval_interval=2)
    assert curve("written") == curve("silent")


@setting("wandb_project")
def test_figures_go_to_the_project_named(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.log = lambda figures, step: calls.append((step, figures))
    fake.finish = lambda: calls.append(("finish",))
    fake.id = "abc"
    fake.init = lambda **options: calls.append((options["project"], options["name"], options["id"])) or fake
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run("shown", wandb_project="plays", max_steps=1)
    assert calls[0] == ("plays", "shown", None) and calls[-1] == ("finish",)
    assert [{"step": step, **figures} for step, figures in calls[1:-1]] == metrics("shown")
    calls.clear()
    run("shown", wandb_project="plays", max_steps=2, resume=True)
    assert calls[0] == ("plays", "shown", "abc"), "or the curve would be cut in two there"
    calls.clear()
    run("alone", max_steps=1)
    assert not calls


def test_speed_is_that_of_training_alone(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """On a clock that a micro-step takes on by one second, and evaluations and checkpoints by hours."""
    now = [0.0]
    clock = types.SimpleNamespace(**{**vars(time), "perf_counter": lambda: now[0]})
    save = CheckpointWriter.save

    def slow_save(*args: Any, **options: Any) -> None:
        now[0] += 5000
        save(*args, **options)

    def look(module: nn.Module, _: tuple, __: Any) -> None:
        if isinstance(module, Loss):
            now[0] += 1 if module.training else 10_000

    monkeypatch.setattr(gpt2_scratch.metrics, "time", clock)
    monkeypatch.setattr(CheckpointWriter, "save", slow_save)
    with hooked(look):
        run(max_steps=7, eval_interval=1, checkpoint_interval=3, log_interval=2)
    # Two micro-steps of 32 tokens a step.
    assert curve("run", "tokens_per_sec") == pytest.approx([32.0] * 4)
    said = capsys.readouterr().out
    assert "64 tokens a step" in said and said.count("tokens/s") == 1
    assert "32 tokens/s; the remaining 3 steps take 0:00:06 at this speed" in said


# The machine.


@setting("device")
def test_device_is_the_one_named(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Where there seems to be an MPS device, "auto" takes it, and "cpu" does not."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    run(device="cpu", max_steps=1)
    assert "on cpu" in capsys.readouterr().out
    with pytest.raises((RuntimeError, UserError, AssertionError), match=r"(?i)mps"):
        run("auto", device="auto", max_steps=1)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device 'cuda' is not available"):
            run("cuda", device="cuda", max_steps=1)


@setting("compile")
def test_compile_hands_the_model_to_torchs_compiler(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    class Compiled(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module, self.shapes = module, []
            compiled.append(self)

        def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
            self.shapes.append((self.training, tuple(idx.shape)))
            return self.module(idx, targets)

    monkeypatch.setattr(torch, "compile", Compiled)
    left = left_by_run(run("compiled", compile=True))
    (module,) = compiled
    assert module.shapes.count((True, (2, 16))) == 7, "a rehearsal and two micro-steps in each of three steps"
    assert distance(left, plain()) < 1e-3
    run("eager", compile=False)
    assert len(compiled) == 1


@setting("activation_checkpointing")
def test_activation_checkpointing_keeps_less_and_gives_the_same(workplace: Path) -> None:
    kept, left = {}, {}
    for on in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            left[on] = left_by_run(run(str(on), activation_checkpointing=on, n_layer=4, max_steps=1))
        kept[on] = sum(sizes)
    assert kept[True] < 0.4 * kept[False]
    assert distance(left[True], left[False]) < 1e-6


@setting("verify_data")
@pytest.mark.parametrize("split", ["train", "val"])
def test_sums_are_checked_unless_told_otherwise(workplace: Path, split: str) -> None:
    shard = Path(f"data/shakespeare/{split}_000000.bin")
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="altered"):
        run(verify_data=True, max_steps=1)
    run(verify_data=False, max_steps=1)


@setting("timeout")
def test_process_waits_for_the_others_so_long(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0]}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=r"(?i)timed out after [12] seconds"):  # torch's store rounds up
        run(timeout=1)


@setting("max_bad_steps")
def test_run_ends_after_so_many_bad_steps(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *args: (None, forward(self, *args)[1] * math.nan))
    with pytest.raises(UserError, match="all steps from 1 to 2;"):
        run(max_bad_steps=2, max_steps=9)


# Two processes.

setting("reduce_dtype")(test_end_to_end.test_gradients_reduced_in_bfloat16_differ_in_rounding_only)

TWO_PROCESSES = """
import json, os, sys
import torch
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
import train
from gpt2_scratch.config import parse_config
from gpt2_scratch.parallel import Loss

train.write_passage = lambda *_: ""
held = {}

def share(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

def after_step(optimizer, *_):
    held["moments"] = sum(share(value).numel() for state in optimizer.state.values() for value in state.values())

def after_forward(module, *_):
    if isinstance(module, Loss) and module.training:
        held["block"] = sum(share(p).numel() for p in module.model.h[0].parameters())

register_optimizer_step_post_hook(after_step)
register_module_forward_hook(after_forward)
found = {}
for port, (name, flags) in zip(sys.argv[1].split(), json.loads(sys.argv[2]).items()):
    os.environ["MASTER_PORT"] = port
    train.train(parse_config([*flags, "--run_name", name]))
    found[name] = dict(held)
print(json.dumps(found), file=open(os.environ["RANK"] + ".json", "w"))
"""


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@setting("parallel")
def test_two_processes_share_what_parallel_says_and_drop_units_of_their_own(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a forward pass a process has, of a block's weights, all ("ddp", "zero2") or its share ("fsdp").

    Windows are all alike, so that processes that dropped the same units would log the loss of one process alone.
    """
    small = SMALL | FROZEN | {"data": corpus("data/alike", [97] * 999, [97] * 99), "dropout": 0.3, "max_steps": 1}
    one = small | {"total_batch_size": 16, "batch_size": 1}
    run("alone", **one)
    flags = {
        kind: [
            *TINY,
            *(
                str(text)
                for key, value in (one | {"total_batch_size": 32, "parallel": kind}).items()
                for text in (f"--{key}", value)
            ),
        ]
        for kind in ("ddp", "zero2", "fsdp")
    }
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    ports, processes = " ".join(map(str, free_ports(3))), []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        command = [sys.executable, "-c", TWO_PROCESSES, ports, json.dumps(flags)]
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    found = [json.loads(Path(f"{rank}.json").read_text()) for rank in (0, 1)]

    model = GPT(GPTConfig(vocab_size=257, n_layer=1, n_head=2, n_embd=16, block_size=16))
    whole, block = (sum(p.numel() for p in module.parameters()) for module in (model, model.h[0]))
    for held in found:
        assert held["ddp"]["moments"] > 2 * whole
        assert held["zero2"]["moments"] == pytest.approx(whole, rel=0.05) == held["fsdp"]["moments"]
        assert held["ddp"]["block"] == held["zero2"]["block"] == block == 2 * held["fsdp"]["block"]
    for kind in flags:
        assert curve(kind)[0] != pytest.approx(curve("alone")[0], rel=1e-4)
        assert curve(kind)[0] == pytest.approx(curve("ddp")[0], rel=1e-5)
        assert curve(kind, "val_loss") == pytest.approx(curve("alone", "val_loss"), abs=1e-5)
