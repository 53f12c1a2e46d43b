"""What bench.py reports follows its flags; its figures are nobody's to assert."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bench


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[str], str]:
    def run(command: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench.py", *command.split()])
        bench.main()
        return capsys.readouterr().out

    return run


def test_sample_times_what_the_flags_say(run: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small network in place of GPT-2 124M, which takes a minute."""
    monkeypatch.setitem(bench.SIZES, "124m", (1, 2, 32))
    sampled: list[tuple[int, int]] = []
    timed = bench.ours

    def ours(model: object, new_tokens: int, compile: bool, prompt: bench.torch.Tensor) -> tuple[float, float]:
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
