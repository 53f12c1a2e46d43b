"""What a GPU must be right about; run it first on a new card: `python -m pytest -m gpu -n 0`, minutes on one.

References are the CPU, float32 without TF32, uncompiled code and transformers.
"""

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_recipes
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import train
from gpt2_scratch.batch_size import fitting_batch_size
from gpt2_scratch.checkpoint import checkpoints, load_state
from gpt2_scratch.config import TrainConfig, parse_config
from gpt2_scratch.device import autocast_to
from gpt2_scratch.distributed import Runtime
from gpt2_scratch.generation import Generation, RecordedDecode
from gpt2_scratch.metrics import MetricsLog
from gpt2_scratch.optim import make_optimizer
from gpt2_scratch.parallel import Loss, warm_up, wrap
from model import GPT, GPTConfig

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SMALL = GPTConfig(block_size=64, vocab_size=300, n_layer=2, n_head=2, n_embd=64, initializer_range=0.1)
place = test_recipes.place  # a fixture


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """No TF32, until training asks for it."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()


def batch(config: GPTConfig = SMALL, rows: int = 3) -> tuple[Tensor, Tensor]:
    idx = torch.randint(config.vocab_size, (rows, config.block_size))
    targets = torch.randint(-1, config.vocab_size, (rows, config.block_size))
    return idx, targets


def loss_and_gradient(forward: Any, model: GPT, idx: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """The loss, and its gradient as one vector, on the CPU."""
    model.zero_grad()
    loss = forward(idx, targets)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).cpu()


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over that of the second."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def close(value: float, expected: float, within: float) -> None:
    assert_close(float(value), float(expected), rtol=0, atol=within)


# The network


def test_logits_loss_and_gradients_equal_those_of_a_cpu() -> None:
    model, (idx, targets) = GPT(SMALL), batch()
    other = copy.deepcopy(model).to(DEVICE)
    logits = model(idx, targets)[0]
    assert_close(other(idx.to(DEVICE), targets.to(DEVICE))[0].cpu(), logits, rtol=1e-4, atol=1e-4)
    loss, gradient = loss_and_gradient(Loss(other), other, idx.to(DEVICE), targets.to(DEVICE))
    expected, expected_gradient = loss_and_gradient(Loss(model), model, idx, targets)
    close(loss, expected, 1e-5)
    close(distance(gradient, expected_gradient), 0, 1e-4)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("dtype", "loss_within", "gradient_within"),
    [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 2e-2, 3e-2), (torch.float16, 5e-3, 1e-2)],
)
def test_autocast_and_compiled_code_stay_within_their_bounds(
    dtype: torch.dtype, loss_within: float, gradient_within: float, compile: bool
) -> None:
    """Of float32, uncompiled."""
    model = GPT(SMALL).to(DEVICE)
    idx, targets = (t.to(DEVICE) for t in batch())
    expected, expected_gradient = loss_and_gradient(Loss(model), model, idx, targets)
    forward = torch.compile(Loss(model)) if compile else Loss(model)
    with autocast_to(dtype, torch.device(DEVICE)):
        loss, gradient = loss_and_gradient(forward, model, idx, targets)
    close(loss, expected, loss_within)
    close(distance(gradient, expected_gradient), 0, gradient_within)


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"])
def test_each_attention_agrees_with_exact_arithmetic(backend: str) -> None:
    q, k, v, grad = (torch.randn(2, 12, 256, 64, dtype=torch.float64) for _ in range(4))
    results = []
    for dtype, device in ((torch.float64, "cpu"), (torch.bfloat16, DEVICE)):
        inputs = [t.to(device, dtype, copy=True).requires_grad_() for t in (q, k, v)]
        try:
            with sdpa_kernel([SDPBackend.MATH if device == "cpu" else getattr(SDPBackend, backend)]):
                y = F.scaled_dot_product_attention(*inputs, is_causal=True)
                y.backward(grad.to(device, dtype))
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            pytest.skip(f"{backend} does not run on this card")
        results.append([t.detach().double().cpu() for t in (y, *(x.grad for x in inputs))])
    for expected, seen in zip(*results):
        close(distance(seen, expected), 0, 2e-2)


# The optimizer


@pytest.mark.parametrize(("kind", "within"), [("adamw", 1e-4), ("muon", 3e-2)])  # Muon's products are in bfloat16
def test_fused_updates_equal_those_of_a_cpu_and_bad_ones_are_skipped(kind: str, within: float) -> None:
    start = GPT(SMALL)
    gradients = [[torch.randn_like(p) for p in start.parameters()] for _ in range(3)]
    updates = []
    for device in ("cpu", DEVICE):
        model = copy.deepcopy(start).to(device)
        optimizer = make_optimizer(model, kind, 1e-2, 0.1, 0.9, 0.95)
        for step in [*gradients, None]:  # the last one is not finite
            for i, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, torch.nan) if step is None else step[i].to(device)
            optimizer.found_inf = torch.tensor(float(step is None), device=device)
            optimizer.step()
        pairs = zip(model.parameters(), start.parameters())
        updates.append(torch.cat([(p.detach().cpu() - before.detach()).flatten() for p, before in pairs]))
    close(distance(updates[1], updates[0]), 0, within)


# Training


def curve(run: str, key: str = "train_loss") -> Tensor:
    lines = [json.loads(line) for line in (Path("out") / run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line[key] for line in lines if key in line])


def run_tiny(name: str, *flags: str) -> None:
    train.train(parse_config([*TINY, "--device", DEVICE, "--compile", "false", "--run_name", name, *flags]))


@pytest.mark.parametrize(
    "flags",
    [
        "--device cpu",
        "--dtype float16",
        "--dtype bfloat16",
        "--compile true",
        "--compile true --dtype auto",
        "--batch_size 2",
        "--activation_checkpointing true",
        "--compile true --activation_checkpointing true",
    ],
)
def test_settings_that_only_round_learn_the_same(workplace: Path, flags: str) -> None:
    run_tiny("plain")
    run_tiny("other", *flags.split())
    assert_close(curve("other"), curve("plain"), rtol=0, atol=0.03)
    assert_close(curve("other", "val_loss"), curve("plain", "val_loss"), rtol=0, atol=0.03)
    if "float16" in flags.split():
        scale = load_state(checkpoints(Path("out/other"))[-1])["scaler"]["scale"]
        close(scale, min(max(scale, 1), 2**16), 0)


@pytest.mark.parametrize("recipe", test_recipes.RECIPES, ids=lambda path: path.stem)
def test_a_recipe_learns(recipe: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty steps of a small network, compiled, in the card's own dtype."""
    monkeypatch.chdir(place)
    sizes = "--init_from published" if recipe.stem.startswith("finetune") else test_recipes.NETWORK
    flags = f"{sizes} --block_size 32 --total_batch_size 1024 --batch_size 16 --max_steps 50 --device {DEVICE}"
    flags += " --eval_interval 25 --eval_tokens 512 --checkpoint_interval 0 --log_interval 1 --sample_interval 0"
    train.train(parse_config([str(recipe), *flags.split(), "--run_name", f"gpu-{recipe.stem}"]))
    losses = curve(f"gpu-{recipe.stem}")
    assert len(losses) == 50
    assert_close((losses[-5:].mean() < losses[:5].mean()).float(), torch.tensor(1.0))


@pytest.mark.parametrize("compile", ["false", "true"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, compile: str
) -> None:
    """To rounding: some backward passes on a GPU add in any order."""

    def write_then_signal(log: MetricsLog, line: dict) -> None:
        write(log, line)
        if line["step"] == 5 and "train_loss" in line:
            os.kill(os.getpid(), signal.SIGINT)

    flags = ["--dropout", "0.1", "--optimizer", "muon", "--compile", compile]
    run_tiny("whole", *flags)
    write = MetricsLog.write
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(MetricsLog, "write", write_then_signal)
        run_tiny("parts", *flags)
    assert len(curve("parts")) < 12
    run_tiny("parts", *flags, "--resume")
    assert len(curve("parts")) == 12
    assert_close(curve("parts"), curve("whole"), rtol=0, atol=5e-3)


def test_a_step_does_not_wait_for_the_device(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor copy from memory that is not pinned. The first step may."""
    step, steps = train.train_step, []

    def watched(*args: Any) -> Any:
        steps.append(args)
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 1 else "default")
        try:
            return step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train, "train_step", watched)
    run_tiny("tiny", "--dtype", "auto", "--optimizer", "muon", "--dropout", "0.1")
    assert len(steps) == 12


@pytest.mark.parametrize("compile", [False, True])
def test_batch_size_auto_fits(compile: bool) -> None:
    """And leaves about half of the memory unused at most: sequences are a divisor of a step's."""
    torch.cuda.empty_cache()
    device = torch.device(DEVICE, 0)
    model = GPT(GPTConfig(n_layer=2)).to(device)
    optimizer = make_optimizer(model, "adamw", 1e-4, 0.1, 0.9, 0.95)
    cfg = replace(TrainConfig(), total_batch_size=2**23, batch_size="auto", compile=compile)
    rt = Runtime(device)
    found = fitting_batch_size(cfg, model, optimizer, torch.bfloat16, rt)
    torch.cuda.reset_peak_memory_stats()
    loss_fn = wrap(model, cfg, found, torch.bfloat16, rt)
    for _ in range(2):
        for _ in range(2):
            warm_up(loss_fn, found).backward()
        optimizer.step()
    total = torch.cuda.mem_get_info(device)[1]
    assert 0.4 * total < torch.cuda.max_memory_allocated(device) < total


# Generation


@pytest.fixture
def theirs(tmp_path: Path) -> GPT2LMHeadModel:
    config = {"vocab_size": 500, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=None, eos_token_id=None)).eval()
    model.save_pretrained(tmp_path / "model")
    return model.to(DEVICE)


def write(generation: Generation, steps: int) -> Tensor:
    return torch.stack([generation.step()[0] for _ in range(steps)], dim=1).cpu()  # (B, steps)


@pytest.mark.parametrize("compile", [False, True])
def test_greedy_text_equals_that_of_transformers(theirs: GPT2LMHeadModel, tmp_path: Path, compile: bool) -> None:
    """Ragged rows, compiled or not."""
    ours = GPT.from_pretrained(tmp_path / "model", device=DEVICE)
    prompts = [torch.randint(500, (n,)).tolist() for n in (1, 17, 60)]
    written = write(Generation(ours, prompts, 100, temperature=0, compile=compile), 100)
    for row, prompt in zip(written, prompts):
        idx = torch.tensor([prompt], device=DEVICE)
        mask = torch.ones_like(idx)
        text = theirs.generate(idx, attention_mask=mask, max_new_tokens=100, do_sample=False, pad_token_id=0)
        assert_close(row, text[0, len(prompt) :].cpu())


@pytest.mark.parametrize("compile", [False, True])
def test_text_past_the_context_equals_that_of_a_cpu(compile: bool) -> None:
    """By the seed, in ragged rows of which one ends early."""
    model, prompts = GPT(SMALL).eval(), [[1, 2, 3], [4], [5] * 30]
    sampling = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1}
    written = []
    for device, compiled in (("cpu", False), (DEVICE, compile)):
        generation = Generation(copy.deepcopy(model).to(device), prompts, 100, **sampling, compile=compiled)
        first = write(generation, 30)
        generation.end({1})
        written.append([first, write(generation, 70)])
    for expected, seen in zip(*written):
        assert_close(seen, expected)


@pytest.mark.parametrize("compile", [False, True])
def test_memory_stays_flat_over_twenty_texts(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And two sizes of cache are recorded as CUDA graphs, once each."""
    recordings = []
    record = RecordedDecode.__init__
    monkeypatch.setattr(RecordedDecode, "__init__", lambda *args: (recordings.append(1), record(*args))[1])
    model = GPT(replace(SMALL, block_size=256)).eval().to(DEVICE)
    torch._dynamo.utils.counters.clear()
    used = []
    for n in range(20):
        write(Generation(model, [[1] * (1 + 8 * n), [2]], 40, seed=n, compile=compile), 40)
        used.append(torch.cuda.memory_allocated())
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 3 * compile and len(recordings) == 2
    assert max(used[-6:]) <= used[-7] + 2**20


# Several cards


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "zero2", "fsdp"])
@pytest.mark.parametrize("compile", ["false", "true"])
def test_several_cards_learn_as_one(workplace: Path, parallel: str, compile: str) -> None:
    run_tiny("one", "--batch_size", "2")
    n = 1 << (min(torch.cuda.device_count(), 8).bit_length() - 1)  # sixteen sequences a step divide among them
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    command += [str(ROOT / "train.py"), *TINY, "--device", DEVICE, "--run_name", "all", "--batch_size", "1"]
    done = subprocess.run([*command, "--parallel", parallel, "--compile", compile], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "device_id" not in done.stderr
    for key in ("train_loss", "val_loss", "grad_norm"):
        assert_close(curve("all", key), curve("one", key), rtol=1e-2, atol=1e-2)
