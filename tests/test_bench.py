"""What bench.py reports follows its flags; its figures are nobody's to assert."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import bench
from gpt2_scratch.cli import UserError
from gpt2_scratch.config import TrainConfig, parse_config
from gpt2_scratch.rivals import Rival
from model import GPT, GPTConfig


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[str], str]:
    def run(command: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench.py", *command.split()])
        bench.main()
        return capsys.readouterr().out

    return run


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_training_that_is_killed_gives_a_sentence(run: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "time_training", killed)
    with pytest.raises(UserError, match=r"training \(unchanged\) was killed, most likely for want of memory; try"):
        run(f"train {ROOT / 'configs' / 'shakespeare.toml'}")


def tells_its_data(cfg: TrainConfig, *_: object) -> None:
    raise UserError(cfg.data)


def test_training_reads_the_data_of_the_recipe_if_it_is_there(
    run: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A recipe for bytes would otherwise be timed with GPT-2's vocabulary, 196 times as large."""
    monkeypatch.setattr(bench, "time_training", tells_its_data)
    monkeypatch.chdir(tmp_path)
    recipe = f"train {ROOT / 'configs' / 'shakespeare.toml'}"
    with pytest.raises(UserError, match=r"^(?!.*shakespeare)"):
        run(recipe)
    assert "data/shakespeare does not exist: random tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"typo$"):
        run(f"{recipe} --set data=data/typo")
    (tmp_path / "data" / "shakespeare").mkdir(parents=True)
    with pytest.raises(UserError, match=f"^{tmp_path}/data/shakespeare$"):
        run(recipe)
    assert "random tokens" not in capsys.readouterr().out


def test_sample_times_what_the_flags_say(run: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small network in place of GPT-2 124M, which takes a minute."""
    monkeypatch.setitem(bench.SIZES, "124m", (1, 2, 32))
    sampled: list[tuple[int, int]] = []
    timed = bench.ours

    def ours(model: object, new_tokens: int, compile: bool, prompt: torch.Tensor) -> tuple[float, float]:
        sampled.append((new_tokens, prompt.shape[1]))
        return timed(model, new_tokens, compile, prompt)

    monkeypatch.setattr(bench, "ours", ours)
    out = run(
        "sample --batch_sizes 1 3 --prompt_tokens 4 --new_tokens 5 --rounds 2 --dtypes float32 bfloat16 --device cpu"
    )
    assert "GPT-2 124m, 4 + 5 tokens" in out and "medians of 2 " in out
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in out.splitlines() if "| gpt2-scratch" in line]
    assert rows == [[batch, "gpt2-scratch", dtype] for batch in ("1", "3") for dtype in ("float32", "bfloat16")]
    assert "| transformers | float32 |" in out
    assert set(sampled) == {(5, 4)} and len(sampled) >= 2 * len(rows)


def test_sample_times_other_programs_beside_ours(
    run: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One of them takes a row at a time; one is not installed."""
    monkeypatch.setitem(bench.SIZES, "124m", (1, 2, 32))
    asked: list[tuple[int, int]] = []

    def rivals(model: GPT, folder: Path) -> Iterator[Rival]:
        def generate(prompt: torch.Tensor, n: int) -> None:
            asked.append((len(prompt), n))
            time.sleep(n / 1000)

        assert folder.is_dir() and model.config.n_embd == 32
        for dtype, most_rows in (("int8", None), ("q4", 1)):
            yield Rival(dtype, generate, 1000, most_rows)

    monkeypatch.setitem(bench.RIVALS, "llamacpp", rivals)
    flags = "--batch_sizes 1 2 --prompt_tokens 4 --new_tokens 5 --rounds 1 --dtypes float32 --device cpu"
    out = run(f"sample {flags} --with llamacpp")
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in out.splitlines() if "| llamacpp" in line]
    assert rows == [["1", "llamacpp", "int8"], ["1", "llamacpp", "q4"], ["2", "llamacpp", "int8"]]
    assert asked == [(1, 2), (1, 5)] * 2 + [(2, 2), (2, 5)]
    assert re.search(r"^batch 2: \S+ times transformers, \S+ times llamacpp, ", out, re.MULTILINE)
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(UserError, match="ctranslate2"):
        run(f"sample {flags} --with ctranslate2")


@pytest.mark.parametrize("name", bench.RIVALS)
def test_other_programs_write_what_ours_does(name: str, tmp_path: Path) -> None:
    """The most precise of them to the token, so that all are given the right weights."""
    pytest.importorskip({"llamacpp": "xllamacpp"}.get(name, name))
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=64, initializer_range=0.2)).eval()
    prompt = torch.randint(300, (1, 8))
    expected = model.generate(prompt, 16, temperature=0)[0, 8:].tolist()
    texts = {rival.dtype: rival.generate(prompt, 16) for rival in bench.RIVALS[name](model, tmp_path)}
    if name == "ctranslate2":
        assert texts["float32"] == [expected] and len(texts["int8"][0]) == 16
    else:
        assert texts["float16"]["choices"][0]["text"] == "".join(map(str, expected))
        assert {text["usage"]["completion_tokens"] for text in texts.values()} == {16}


def test_nanogpt_is_also_timed_with_autocast(tmp_path: Path) -> None:
    """By a script that says its own settings, in place of nanoGPT's."""
    clone, cfg = tmp_path / "clone", parse_config(["--device", "cpu"])
    clone.mkdir()
    script = """
import sys
ctx = nullcontext() if device_type == 'cpu' else [('bfloat16', 1.0)]
speed = 2.0 if "--dtype=bfloat16" in sys.argv else 4.0
for i in range(40): print(f"iter {i}: loss 1, time {speed:.2f}ms")
"""
    (clone / "train.py").write_text(script.replace("ctx =", "device_type, nullcontext = 'cpu', list\nctx ="))
    ids = np.zeros(10, np.uint16)
    plain, rounded = (
        bench.time_nanogpt(clone, tmp_path / str(autocast), ids, cfg, autocast) for autocast in (False, True)
    )
    assert rounded == 2 * plain
    assert "ctx = [('bfloat16'" in (tmp_path / "True" / "train.py").read_text()
    (clone / "train.py").write_text("print('another program')")
    with pytest.raises(UserError, match="pass a clone of nanoGPT"):
        bench.time_nanogpt(clone, tmp_path / "again", ids, cfg, autocast=True)


def test_data_times_what_the_flags_say(run: Callable[[str], str]) -> None:
    out = run("data --megabytes 1 --workers 1 --shards 3").splitlines()
    assert re.match(r"1 processes, 1 MB as \.jsonl\.gz: [\d,]+ tokens/s with start-up; tiktoken alone", out[0])
    assert out[1].startswith("3 shards, 300,000,000 tokens: opened in")


def test_gpu_measures_the_sizes_and_clones_named_in_the_minutes_given(
    run: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The commands alone, since each takes minutes on a card."""
    asked: list[tuple[list[str], float]] = []
    monkeypatch.setattr(bench, "pick_device", lambda name: bench.torch.device(name))
    monkeypatch.setattr(bench, "device_table", lambda device: iter(["| products |"]))
    monkeypatch.setattr(bench, "reported", lambda command, report, left: asked.append((command, left)) or "")
    monkeypatch.setattr(bench.torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(bench.torch.cuda, "empty_cache", lambda: None)
    file = tmp_path / "report.md"
    run(f"gpu --output {file} --minutes 2 --sizes 350m --nanogpt one --build_nanogpt two")
    assert "# a card" in file.read_text() and "| products |" in file.read_text()
    assert [command[0] for command, _ in asked].count("sample") == 2  # eager and compiled
    assert all("350m" in " ".join(command) for command, _ in asked)
    assert asked[0][0][-4:] == ["--nanogpt", "one", "--build_nanogpt", "two"]
    assert all(118 < left <= 120 for _, left in asked)
