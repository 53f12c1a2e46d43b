"""The dtype that "auto" takes: by measurement on a CPU, kept by a run."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_end_to_end import run_tiny

import sample
from gpt2_scratch import precision
from gpt2_scratch.checkpoint import checkpoints, load_state
from gpt2_scratch.cpu.decode import can_pack
from gpt2_scratch.distributed import Runtime
from gpt2_scratch.precision import pick_dtype
from gpt2_scratch.tokenizer import load_tokenizer
from model import GPT, Block, GPTConfig

CPU = torch.device("cpu")
SMALL = GPTConfig(block_size=32, vocab_size=257, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, float]:
    """Pretended measurements, the same for training and for writing; a CPU with bfloat16 products."""
    pretended = {torch.float32: 1.0, torch.bfloat16: 0.5}
    monkeypatch.setattr(precision, "can_pack", lambda: True)
    monkeypatch.setattr(precision, "can_compile", lambda: False)
    monkeypatch.setattr(precision, "training", lambda batch_size, config, dtype: pretended[dtype] * batch_size)
    monkeypatch.setattr(precision, "decoding", lambda config, dtype: pretended[dtype])
    return pretended


@pytest.mark.parametrize("batch_size", [None, 8])
@pytest.mark.parametrize(("bfloat16", "chosen"), [(0.4, torch.bfloat16), (0.95, torch.float32), (3, torch.float32)])
def test_auto_takes_bfloat16_where_it_is_clearly_faster(
    times: dict, batch_size: int | None, bfloat16: float, chosen: torch.dtype
) -> None:
    times[torch.bfloat16] = bfloat16
    reason = f"bfloat16 takes {bfloat16:.2f} of float32's time here"
    assert pick_dtype("auto", CPU, SMALL, batch_size) == (chosen, reason)
    assert pick_dtype("float16", CPU, SMALL, batch_size) == (torch.float16, "")


@pytest.mark.parametrize(("seconds", "chosen"), [(0.0549, torch.bfloat16), (0.0005, torch.float32)])
def test_kernels_are_compiled_where_they_repay_it(
    times: dict, monkeypatch: pytest.MonkeyPatch, seconds: float, chosen: torch.dtype
) -> None:
    """By the time of float32 alone: bfloat16 is read by kernels that are yet to be compiled."""
    monkeypatch.setattr(precision, "can_compile", lambda: True)
    times[torch.float32] = seconds
    del times[torch.bfloat16]
    reason = f"float32 weights take {1e3 * seconds:.1f} ms per token here"
    assert pick_dtype("auto", CPU, SMALL) == (chosen, reason)


@pytest.mark.parametrize(
    ("compiles", "packs", "dtype"),
    [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)],
)
def test_int8_is_not_measured(
    times: dict, monkeypatch: pytest.MonkeyPatch, compiles: bool, packs: bool, dtype: torch.dtype
) -> None:
    """What is not int8 beside it is in what is supported."""
    times.clear()
    monkeypatch.setattr(precision, "can_compile", lambda: compiles)
    monkeypatch.setattr(precision, "can_pack", lambda: packs)
    assert pick_dtype("int8", CPU, SMALL) == (dtype, "")


def test_nothing_is_measured_where_bfloat16_does_not_run(times: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    times.clear()
    monkeypatch.setattr(precision, "can_pack", lambda: False)
    assert pick_dtype("auto", CPU, SMALL) == pick_dtype("auto", CPU, SMALL, 8) == (torch.float32, "")
    assert pick_dtype("auto", torch.device("mps"), SMALL) == (torch.float32, "")


def test_processes_take_the_dtype_of_rank_0(times: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "all_gather_object", lambda rt, value: [2.0, value])
    assert pick_dtype("auto", CPU, SMALL, 8, Runtime(CPU, rank=1, world_size=2))[0] == torch.float32


@pytest.mark.parametrize("config", [SMALL, GPTConfig(block_size=1000, n_layer=1, n_head=3, n_embd=96, dropout=0.1)])
def test_measurements_run_the_network_and_leave_random_numbers_alone(config: GPTConfig) -> None:
    state = torch.random.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        assert 0 < precision.training(3, config, dtype) < 60
        if dtype == torch.float32 or can_pack():
            assert 0 < precision.decoding(config, dtype) < 60
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("config", "batch_size", "shape"),
    [
        ({"n_embd": 96, "block_size": 128}, 16, (16, 128, 96)),
        ({"n_embd": 96, "block_size": 128}, 1000, (23, 128, 96)),
        ({}, 32, (1, 256, 768)),
        ({"n_embd": 96, "block_size": 128}, "auto", (1, 128, 96)),
    ],
)
def test_a_network_is_measured_on_a_batch_of_its_own_if_that_takes_no_time(
    config: dict, batch_size: int | str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences of a narrow one say that bfloat16 is slow, where 16 of them are faster in it."""
    shapes: list[tuple[int, ...]] = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda block, x: shapes.append(tuple(x.shape)) or forward(block, x))
    monkeypatch.setattr(precision, "shortest", lambda run: run() or 1.0)
    precision.training(batch_size, GPTConfig(n_layer=1, n_head=4, **config), torch.float32)
    assert shapes == [shape]


def test_a_run_keeps_the_dtype_it_began_with(workplace: Path, times: dict, capsys: pytest.CaptureFixture) -> None:
    """Whatever another machine would choose, unless told otherwise."""

    def dtypes(*flags: str) -> tuple[str, str]:
        """The dtype recorded, and the first lines printed."""
        run_tiny("--run_name", "run", "--warmup_steps", "0", *flags)
        return load_state(checkpoints(Path("out/run"))[-1])["settings"]["dtype"], capsys.readouterr().out

    recorded, printed = dtypes("--dtype", "auto", "--max_steps", "1")
    assert recorded == "bfloat16" and "in bfloat16 (bfloat16 takes 0.50 of float32's time here), " in printed
    times[torch.bfloat16] = 2.0
    recorded, printed = dtypes("--dtype", "auto", "--max_steps", "2", "--resume")
    assert recorded == "bfloat16" and "in bfloat16, " in printed and "dtype" not in printed
    recorded, printed = dtypes("--dtype", "float32", "--max_steps", "3", "--resume")
    assert recorded == "float32" and "; dtype was 'bfloat16', is now 'float32'" in printed
    recorded, printed = dtypes("--dtype", "float16", "--max_steps", "4", "--resume")
    assert recorded == "float16" and load_state(checkpoints(Path("out/run"))[-1])["scaler"]


def test_a_text_is_written_in_the_dtype_measured(
    times: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    GPT(SMALL).save_pretrained(tmp_path / "model")
    load_tokenizer("bytes").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(tmp_path / "model"), "--device", "cpu"])
    seen: list[Any] = []
    monkeypatch.setattr(sample, "prepare", lambda model, *_: (seen.append(model.wte.weight.dtype), model.float())[1])
    monkeypatch.setattr(sample, "kernels", lambda: None)
    for share in (0.5, 2.0):  # without kernels.c
        times[torch.bfloat16] = share
        sample.Sampler(sample.parse_args())
        assert f"(bfloat16 takes {share:.2f} of float32's time here)" in capsys.readouterr().err
    assert seen == [torch.bfloat16, torch.float32]
