"""metrics.jsonl: each line once and whole, through crashes, resumes and full disks."""

import errno
import importlib.machinery
import json
import math
import os
import sys
import tempfile
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from conftest import fill
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_scratch.metrics import MetricsLog

Figures = dict[str, float | int]


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed: its files would take room on the small disk, and seconds."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)


def train_line(step: int) -> Figures:
    return {"step": step, "tokens": 512 * step, "train_loss": 1 / step, "lr": 6e-4 / 3}


def val_line(step: int) -> Figures:
    return {"step": step, "tokens": 512 * step, "val_loss": 2 / step}


def write(run: Path, lines: list[Figures], step: int = 0, evaluation_due: bool = False) -> None:
    log = MetricsLog(run, {}, step, evaluation_due)
    for line in lines:
        log.write(line)
    log.close()


def kept(line: Figures, step: int, evaluation_due: bool) -> bool:
    """Whether a run that goes on from a step keeps a line."""
    return line["step"] < step or (line["step"] == step and not (evaluation_due and "val_loss" in line))


def strict_json(line: bytes) -> Any:
    """What a parser makes of a line that knows JSON as RFC 8259 has it, without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def read(run: Path) -> list[Any]:
    content = (run / "metrics.jsonl").read_bytes()
    assert content.endswith(b"\n") or not content
    return [strict_json(line) for line in content.split(b"\n")[:-1]]


@pytest.fixture
def twelve(tmp_path: Path) -> Path:
    """A run of 12 steps, evaluated at 6 and 12."""
    write(tmp_path, [line(step) for step in range(1, 13) for line in (train_line, val_line)[: 1 + (step % 6 == 0)]])
    return tmp_path


def test_lines_come_back_each_once_and_in_order(twelve: Path) -> None:
    lines = read(twelve)
    assert [line for line in lines if "train_loss" in line] == [train_line(step) for step in range(1, 13)]
    assert [line for line in lines if "val_loss" in line] == [val_line(6), val_line(12)]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12, 12]


def test_each_line_is_in_the_file_when_it_is_written(tmp_path: Path) -> None:
    """So that `tail -f` shows it, and a process that is killed loses none."""
    log = MetricsLog(tmp_path, {}, 0)
    for step in range(1, 4):
        log.write(train_line(step))
        assert read(tmp_path) == [train_line(n) for n in range(1, step + 1)]
    log.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    write(tmp_path, [{"step": 1, "train_loss": value, "lr": 0.1}, train_line(2)])
    assert read(tmp_path) == [{"step": 1, "train_loss": None, "lr": 0.1}, train_line(2)]
    write(tmp_path, [train_line(3)], step=2)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3], "a line with null is one of ours"


# Going on from an earlier step.


@pytest.mark.parametrize("evaluation_due", [False, True])
def test_later_lines_are_cut_and_earlier_ones_untouched(twelve: Path, evaluation_due: bool) -> None:
    path = twelve / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for step in (*range(14, -1, -1), 3):
        path.write_bytes(b"".join(lines))
        write(twelve, [], step, evaluation_due)
        assert path.read_bytes() == b"".join(line for line in lines if kept(json.loads(line), step, evaluation_due))


def test_evaluation_that_is_due_again_cuts_its_own_line_only(twelve: Path) -> None:
    write(twelve, [], step=6, evaluation_due=True)
    assert read(twelve)[-2:] == [train_line(5), train_line(6)]
    write(twelve, [val_line(6), train_line(7)], step=6, evaluation_due=True)
    write(twelve, [], step=7)
    assert read(twelve)[-3:] == [train_line(6), val_line(6), train_line(7)]


def test_torn_last_line_is_removed_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(tmp_path, [train_line(1), train_line(2), {**train_line(3), "grad_norm": 12.5}])
    content = path.read_bytes()
    whole = content.index(b"\n", content.index(b"\n") + 1) + 1
    for end in range(whole, len(content)):
        path.write_bytes(content[:end])
        write(tmp_path, [], step=3)
        assert path.read_bytes() == content[:whole]
    path.write_bytes(content)
    write(tmp_path, [], step=3)
    assert path.read_bytes() == content


@settings(max_examples=150)
@given(data=st.data())
def test_interrupted_run_leaves_the_file_of_one_that_was_not(data: st.DataObject) -> None:
    """Killed anywhere, also within a line, and resumed at a step whose lines were all written, several times."""
    steps = sorted(data.draw(st.sets(st.integers(1, 200), min_size=1, max_size=12), "steps"))
    lines: list[Figures] = []
    for step in steps:
        kinds = data.draw(st.sampled_from([("train_loss",), ("val_loss",), ("train_loss", "val_loss")]), "kinds")
        lines += [{"step": step, "tokens": 512 * step, kind: data.draw(st.floats(), kind)} for kind in kinds]

    with tempfile.TemporaryDirectory() as folder:
        at_one_go, parts = Path(folder, "at_one_go"), Path(folder, "parts")
        for run in (at_one_go, parts):
            run.mkdir()
        write(at_one_go, lines)
        expected = (at_one_go / "metrics.jsonl").read_bytes()
        encoded = expected.splitlines(keepends=True)

        begin, step, due = 0, 0, False
        for _ in range(data.draw(st.integers(1, 4), "interruptions")):
            end = data.draw(st.integers(begin, len(lines)), "lines written")
            write(parts, lines[begin:end], step, due)
            if end < len(lines):
                with (parts / "metrics.jsonl").open("ab") as file:
                    file.write(encoded[end][: data.draw(st.integers(0, len(encoded[end]) - 1), "bytes of the next")])
            # A checkpoint is made when all lines up to it are written.
            choices = [(at, due) for at in range(max(steps) + 2) for due in (False, True)]
            made = [(at, due) for at, due in choices if not any(kept(line, at, due) for line in lines[end:])]
            step, due = data.draw(st.sampled_from(made), "resumed at")
            begin = sum(kept(line, step, due) for line in lines)
        write(parts, lines[begin:], step, due)
        assert (parts / "metrics.jsonl").read_bytes() == expected
        finite = [{k: v if math.isfinite(v) else None for k, v in line.items()} for line in lines]
        assert read(parts) == finite


@pytest.mark.parametrize(
    "damaged",
    [
        b"\n",
        b"\0" * 60 + b"\n",
        b"\xff\xfe\n",
        b'{"step": 3, "train_lo\n',
        b'{"tokens": 1536}\n',
        b'{"step": "3"}\n',
        b'{"step": null}\n',
        b"[3]\n",
        b"3\n",
        b"[" * 100_000 + b"\n",
        b'{"step": 11}\n',
    ],
)
def test_damaged_line_before_one_to_keep_is_an_error_that_names_it(twelve: Path, damaged: bytes) -> None:
    path = twelve / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[3] = damaged  # the first of them is to be named
    path.write_bytes(b"".join(lines))
    for step, due in ((5, False), (10, False), (5, True)):
        with pytest.raises(ValueError, match=rf"{path}, line 3,"):
            MetricsLog(twelve, {}, step, due)
        assert path.read_bytes() == b"".join(lines)
    write(twelve, [train_line(3)], step=2)
    assert read(twelve) == [train_line(1), train_line(2), train_line(3)], "what is to be cut may be damaged"


# Disks that do not take a line.


def test_full_disk_delays_lines_and_loses_none(small_disk: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [train_line(step) for step in range(1, 301)]
    log = MetricsLog(small_disk, {}, 0)
    log.write(lines[0])
    log.sync()
    filler = fill(small_disk, leave=0)
    for line in lines[1:200]:
        log.write(line)
    warnings = capsys.readouterr().err.splitlines()
    assert warnings and all("warning: " in line and "metrics.jsonl" in line for line in warnings)
    content = (small_disk / "metrics.jsonl").read_bytes()
    assert content == "".join(json.dumps(line) + "\n" for line in lines).encode()[: len(content)]
    assert not content.endswith(b"\n"), "the disk became full within a line, which is the hard case"
    with pytest.raises(OSError, match=r"metrics.jsonl"):
        log.sync()

    filler.unlink()
    for line in lines[200:]:
        log.write(line)
    log.sync()
    assert read(small_disk) == lines
    log.close()
    assert capsys.readouterr().err == ""


def test_full_disk_is_said_once_until_there_is_room(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = MetricsLog(tmp_path, {}, 0)
    file, full = log.file, True

    class FullFile:
        name = "metrics.jsonl"

        def write(self, content: bytes) -> int:
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return file.write(content)

    log.file = FullFile()
    for step in range(1, 6):
        full = step != 3
        log.write(train_line(step))
        assert capsys.readouterr().err.count("warning") == (step in (1, 4))
    log.file = file
    log.close()
    assert read(tmp_path) == [train_line(step) for step in range(1, 6)]


def test_run_killed_with_a_full_disk_goes_on_whole(small_disk: Path) -> None:
    log = MetricsLog(small_disk, {}, 0)
    log.write(train_line(1))
    filler = fill(small_disk, leave=0)
    for step in range(2, 200):
        log.write(train_line(step))
    del log  # killed: its pending lines are lost, the last line on the disk is torn
    filler.unlink()
    written = (small_disk / "metrics.jsonl").read_bytes().count(b"\n")
    write(small_disk, [train_line(step) for step in range(written + 1, 200)], step=written)
    assert read(small_disk) == [train_line(step) for step in range(1, 200)]


def test_close_fails_while_lines_are_pending(small_disk: Path) -> None:
    log = MetricsLog(small_disk, {}, 0)
    filler = fill(small_disk, leave=0)
    for step in range(1, 4):
        log.write(train_line(step))
    with pytest.raises(OSError, match="No space left"):
        log.close()
    filler.unlink()
    log.close()
    assert read(small_disk) == [train_line(1), train_line(2), train_line(3)]


# Where else figures go, and when the disk has them.


def test_sync_has_the_disk_hold_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((tmp_path / "metrics.jsonl").read_bytes()))
    log = MetricsLog(tmp_path, {}, 0)
    log.write(train_line(1))
    log.sync()
    assert [json.loads(content) for content in synced] == [train_line(1)]
    log.close()


def test_line_is_written_once_though_a_checkpoint_syncs_meanwhile(tmp_path: Path) -> None:
    """`sync` comes from the thread that writes checkpoints, here in the middle of a write."""
    log = MetricsLog(tmp_path, {}, 0)
    file, syncing = log.file, threading.Thread(target=log.sync)

    class SlowFile:
        fileno = file.fileno

        def write(self, content: bytes) -> int:
            if not syncing.ident:
                syncing.start()
                syncing.join(timeout=0.2)  # it waits for this write
            return file.write(content)

    log.file = SlowFile()
    log.write(train_line(1))
    syncing.join()
    log.file = file
    log.close()
    assert read(tmp_path) == [train_line(1)]


def test_tensorboard_gets_each_figure_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And forgets what an earlier process wrote of later steps."""
    calls: list[tuple] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int):
            calls.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append(("close",))

    fake = types.ModuleType("tensorboard")
    fake.__spec__ = importlib.machinery.ModuleSpec("tensorboard", None)
    writers = types.ModuleType("torch.utils.tensorboard")
    writers.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboard", fake)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writers)
    write(tmp_path, [val_line(4)], step=3)
    assert calls == [(str(tmp_path), 4), ("tokens", 2048, 4), ("val_loss", 0.5, 4), ("close",)]
