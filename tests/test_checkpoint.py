"""Checkpoints: whole or known to be damaged, whatever the disk does."""

import os
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PAGE, fill
from torch import Tensor
from transformers import AutoModelForCausalLM

from gpt2_scratch import checkpoint
from gpt2_scratch.checkpoint import (
    STATE_KEYS,
    CheckpointWriter,
    check_plain,
    checkpoint_problem,
    checkpoints,
    find_model,
    latest_valid_checkpoint,
    load_state,
    lock_run,
    mark_launch,
    started_by_this_launch,
)
from gpt2_scratch.cli import UserError
from gpt2_scratch.tokenizer import load_tokenizer
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = load_tokenizer("bytes")


def small_model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=2, n_embd=16))


def weights(model: GPT) -> tuple[GPTConfig, dict[str, torch.Tensor]]:
    return model.config, model.state_dict()


def small_state(step: int = 0) -> dict[str, Any]:
    """A state with what optimizers keep: tensors of several kinds, in dicts and lists."""
    torch.manual_seed(step)
    moments = {"step": torch.tensor(float(step)), "exp_avg": torch.randn(32, 48), "half": torch.randn(7).bfloat16()}
    optimizer = {"state": {0: moments, 1: {"exp_avg": torch.randn(5)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    state = {"progress": {"step": step, "best": float("inf")}, "settings": {"seed": 1, "name": "é", "none": None}}
    return state | {"data": "0" * 64, "optimizer": optimizer, "scaler": {"nested": [[torch.arange(3), [1, 2.5]], "x"]}}


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal to the bit, types included."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


def write(run: Path, *steps: int, keep: int = 99, saved_step: int | None = None) -> list[Path]:
    """The checkpoints of a run after one writer has added these; the model of step n is small_model(n)."""
    run.mkdir(parents=True, exist_ok=True)
    newest = run / "checkpoints" / f"step_{saved_step:08d}" if saved_step else None
    with CheckpointWriter(run, TOKENIZER, keep, newest) as writer:
        for step in steps:
            writer.save(step, *weights(small_model(step)), small_state(step), wait=True)
        writer.close()
    return checkpoints(run)


def is_of(checkpoint: Path, step: int) -> bool:
    """Whether a checkpoint holds what `write` put into that of a step."""
    weights = GPT.from_pretrained(checkpoint).state_dict()
    return same(weights, dict(small_model(step).state_dict())) and same(load_state(checkpoint), small_state(step))


def spoil(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Gate:
    """Holds the writing thread until it is opened, or for as long as no test should take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str):
        self.event, original = threading.Event(), getattr(owner, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            assert self.event.wait(30)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, held)

    def open(self) -> None:
        self.event.set()


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    if not shutil.which("sha256sum"):
        pytest.skip("there is no command sha256sum")
    [path] = write(tmp_path, 3)
    check = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    done = subprocess.run(check, cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{name}: OK" for name in names(path) if name != "SHA256SUMS"]
    with (path / "tokenizer.json").open("ab") as file:
        file.write(b" ")
    assert subprocess.run(check, cwd=path, capture_output=True).returncode == 1
    assert "tokenizer.json" in (checkpoint_problem(path) or "")


def test_checkpoint_gives_back_model_and_state_to_the_bit(tmp_path: Path) -> None:
    [path] = write(tmp_path, 3)
    assert is_of(path, 3) and not is_of(path, 4)
    assert load_tokenizer(path).name == "bytes"


def test_transformers_loads_a_checkpoint(tmp_path: Path) -> None:
    [path] = write(tmp_path, 3)
    ours, theirs, ids = small_model(3).eval(), AutoModelForCausalLM.from_pretrained(path), torch.arange(250, 257)[None]
    with torch.no_grad():
        assert torch.allclose(ours(ids)[0], theirs(ids).logits, atol=1e-6)
    assert torch.equal(theirs.transformer.wte.weight, ours.wte.weight[:257])


def test_head_of_its_own_is_kept(tmp_path: Path) -> None:
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=2, n_embd=16, tie_word_embeddings=False))
    with CheckpointWriter(tmp_path, TOKENIZER, 2, None) as writer:
        writer.save(4, *weights(model), small_state(4))
        writer.close()
    [path] = checkpoints(tmp_path)
    assert same(GPT.from_pretrained(path).state_dict(), model.state_dict())


# What `save` promises: training goes on while the disk works.


@pytest.mark.parametrize("held", ["model", "state"])
def test_save_returns_before_the_disk_has_it_and_keeps_what_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    gate = Gate(monkeypatch, *((GPT, "save_pretrained") if held == "model" else (torch, "save")))
    model, state = small_model(4), small_state(4)
    with CheckpointWriter(tmp_path, TOKENIZER, 2, None) as writer:
        writer.save(4, *weights(model), state)
        assert checkpoints(tmp_path) == []
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)
        state["optimizer"]["state"][0]["exp_avg"].fill_(7)
        state["optimizer"]["state"][0]["half"].fill_(7)
        state["scaler"]["nested"][0][0].fill_(7)
        state["scaler"]["nested"][0].append(7)
        state["progress"]["step"] = 7
        del state["data"]
        gate.open()
        writer.close()
    [path] = checkpoints(tmp_path)
    assert checkpoint_problem(path) is None and is_of(path, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_only_the_writing_thread_stands_back(tmp_path: Path) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0), torch.get_num_threads()
    with CheckpointWriter(tmp_path, TOKENIZER, 2, None) as writer:
        priority = writer.thread.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        assert priority.result() == 19
    assert (os.getpriority(os.PRIO_PROCESS, 0), torch.get_num_threads()) == before


def test_save_while_one_is_written_is_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gate = Gate(monkeypatch, torch, "save")
    with CheckpointWriter(tmp_path, TOKENIZER, 9, None) as writer:
        writer.save(4, *weights(small_model(4)), small_state(4))
        assert capsys.readouterr().err == ""
        writer.save(8, *weights(small_model(8)), small_state(8))
        [warning] = capsys.readouterr().err.splitlines()
        assert "no checkpoint of step 8" in warning and "step 4" in warning
        gate.open()
        writer.wait()
        writer.save(12, *weights(small_model(12)), small_state(12))
        writer.close()
    assert names(tmp_path / "checkpoints") == ["step_00000004", "step_00000012"]
    assert all(is_of(path, step) for path, step in zip(checkpoints(tmp_path), (4, 12)))


def test_last_save_waits_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gate = Gate(monkeypatch, GPT, "save_pretrained")
    with CheckpointWriter(tmp_path, TOKENIZER, 9, None) as writer:
        writer.save(4, *weights(small_model(4)), small_state(4))
        timer = threading.Timer(0.2, gate.open)
        timer.start()
        writer.save(8, *weights(small_model(8)), small_state(8), wait=True)
        timer.join()
    assert capsys.readouterr().err == ""
    assert names(tmp_path / "checkpoints") == ["step_00000004", "step_00000008"]
    assert all(is_of(path, step) for path, step in zip(checkpoints(tmp_path), (4, 8)))


# Damage.


def alterations(content: bytes) -> Iterator[bytes | None]:
    """One bit flipped at the first, middle and last byte, the file cut short, and None: no file."""
    for position in (0, len(content) // 2, len(content) - 1):
        for bit in range(8):
            yield content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]
    yield from (content[:length] for length in (0, len(content) // 2, len(content) - 1))
    yield None


def test_any_damaged_file_is_known_and_the_checkpoint_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before, newest = write(tmp_path, 4, 8)
    harmless = []
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        for altered in alterations(content):
            if altered is None:
                file.unlink()
            else:
                file.write_bytes(altered)
            if checkpoint_problem(newest) is None:
                harmless.append(file.name)
                assert is_of(newest, 8), "what is damaged and not known to be"
                continue
            assert latest_valid_checkpoint(tmp_path) == before
            if altered is None and file.name == "SHA256SUMS":  # without it, it is no checkpoint
                assert checkpoints(tmp_path) == [before]
            else:
                [warning] = capsys.readouterr().err.splitlines()
                assert str(newest) in warning and str(before) not in warning
        file.write_bytes(content)
    assert latest_valid_checkpoint(tmp_path) == newest and is_of(newest, 8)
    assert set(harmless) <= {"SHA256SUMS"}, "the end of its last line alone does not matter"


def test_no_sound_checkpoint_is_an_error_and_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_valid_checkpoint(tmp_path / "nowhere") is None
    for path in write(tmp_path, 4, 8):
        spoil(path)
    with pytest.raises(ValueError, match=r"every checkpoint of .* is damaged"):
        latest_valid_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\n", b"../step_00000004/config.json\n"])
def test_list_of_sums_that_is_none_is_damage(tmp_path: Path, content: bytes) -> None:
    [path] = write(tmp_path, 4)
    (path / "SHA256SUMS").write_bytes(content)
    assert checkpoint_problem(path) is not None


def test_list_of_sums_must_name_what_a_run_continues_from(tmp_path: Path) -> None:
    """A list cut at the end of a line is true of the files it still names."""
    [path] = write(tmp_path, 4)
    sums = path / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    for kept in range(len(lines)):
        sums.write_text("".join(lines[:kept]))
        assert checkpoint_problem(path) is not None
    for at, line in enumerate(lines):  # without it, a file could change unseen
        sums.write_text("".join([*lines[:at], f"g{line[1:]}", *lines[at + 1 :]]))
        assert checkpoint_problem(path) is not None
    sums.write_text("".join(lines))
    assert checkpoint_problem(path) is None


@pytest.mark.parametrize("content", [b"", b"no pickle", {"progress": {}}, [1, 2], {key: Path() for key in STATE_KEYS}])
def test_state_that_is_none_is_refused_by_name(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "step_00000004"
    path.mkdir()
    if isinstance(content, bytes):
        (path / "trainer_state.pt").write_bytes(content)
    else:
        torch.save(content, path / "trainer_state.pt")
    with pytest.raises(ValueError, match=r"step_00000004/trainer_state\.pt"):
        load_state(path)


# Disks that do not take a checkpoint.


def test_full_disk_costs_only_the_checkpoint_being_written(small_disk: Path, capsys: pytest.CaptureFixture) -> None:
    """However little room is missing, so that each file is the one it fails at."""
    [first] = write(small_disk, 1)
    taken = sum(-(-file.stat().st_size // PAGE) * PAGE for file in first.iterdir())
    with CheckpointWriter(small_disk, TOKENIZER, 9, small_disk / "checkpoints" / "step_00000001") as writer:
        for step, leave in enumerate(range(0, taken, PAGE), start=2):
            filler = fill(small_disk, leave)
            writer.save(step, *weights(small_model(step)), small_state(step), wait=True)
            writer.wait()
            [warning] = capsys.readouterr().err.splitlines()
            assert f"no checkpoint of step {step}: " in warning and "No space left on device" in warning
            assert names(small_disk / "checkpoints") == ["step_00000001"] and checkpoint_problem(first) is None
            filler.unlink()
        with pytest.raises(UserError, match=f"of step {step}, could not be written"):
            writer.close()
        writer.save(step + 1, *weights(small_model(step + 1)), small_state(step + 1))
        writer.close()
    assert step > 10 and capsys.readouterr().err == ""
    _, second = checkpoints(small_disk)
    assert checkpoint_problem(second) is None and is_of(second, step + 1) and is_of(first, 1)


def test_folder_that_cannot_be_written_costs_only_the_checkpoint(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(small_disk)  # the run's open files would keep the disk from becoming read-only
    with CheckpointWriter(run, TOKENIZER, 1, None) as writer:
        writer.save(4, *weights(small_model(4)), small_state(4))
        writer.close()
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        writer.save(8, *weights(small_model(8)), small_state(8))
        with pytest.raises(UserError, match=r"of step 8, .*Read-only file system"):
            writer.close()
        assert "no checkpoint of step 8: " in capsys.readouterr().err
        [path] = checkpoints(run)
        assert is_of(path, 4) and checkpoint_problem(path) is None
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        writer.save(12, *weights(small_model(12)), small_state(12))
        writer.close()
    [path] = checkpoints(run)
    assert is_of(path, 12) and names(small_disk) == ["step_00000012"]


def test_what_before_raises_fails_the_write(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refuse() -> None:
        assert checkpoints(tmp_path) == [], "the checkpoint has its place already"
        raise OSError("no room for metrics")

    with CheckpointWriter(tmp_path, TOKENIZER, 1, None) as writer:
        writer.before = refuse
        writer.save(4, *weights(small_model(4)), small_state(4))
        with pytest.raises(UserError, match=r"of step 4, .*no room for metrics"):
            writer.close()
        assert "no room for metrics" in capsys.readouterr().err and names(tmp_path / "checkpoints") == []
        writer.before = lambda: None
        writer.save(4, *weights(small_model(4)), small_state(4))
        writer.close()
    assert names(tmp_path / "checkpoints") == ["step_00000004"]


# Which checkpoints there are.


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for steps, left in [((1, 2), [1, 2]), ((3,), [2, 3]), ((10, 20, 30), [20, 30])]:
        assert [int(path.name[5:]) for path in write(tmp_path, *steps, keep=2)] == left
        assert len(names(tmp_path / "checkpoints")) == 2


def test_damaged_checkpoint_ahead_does_not_push_out_a_new_one(tmp_path: Path) -> None:
    spoil(write(tmp_path, 4, 9)[-1])
    four, nine = checkpoints(tmp_path)
    eight, ahead = write(tmp_path, 8, keep=1, saved_step=4)
    assert not four.exists() and ahead == nine and is_of(eight, 8)
    assert latest_valid_checkpoint(tmp_path) == eight
    assert write(tmp_path, 9, keep=1, saved_step=8) == [nine]
    assert checkpoint_problem(nine) is None and is_of(nine, 9)


def test_leftovers_of_a_killed_writer_are_no_checkpoints_and_are_removed(tmp_path: Path) -> None:
    four, eight = write(tmp_path, 4, 8)
    eight.rename(eight.with_name(".step_00000008"))  # killed just before it took its place, or when it was too old
    (tmp_path / "checkpoints" / ".step_00000006").mkdir()
    assert checkpoints(tmp_path) == [four]
    assert latest_valid_checkpoint(tmp_path) == four
    with CheckpointWriter(tmp_path, TOKENIZER, 9, tmp_path / "checkpoints" / "step_00000004"):
        assert names(tmp_path / "checkpoints") == ["step_00000004"]
    assert write(tmp_path, 8, saved_step=4) == [four, eight] and is_of(eight, 8)


def test_folders_without_sums_or_with_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    four, eight = write(tmp_path, 4, 8)
    (eight / "SHA256SUMS").unlink()
    for name in ("step_8", "step_00000009.bak", "my_step_00000009", "step_0000000x"):
        shutil.copytree(four, four.with_name(name))
    assert checkpoints(tmp_path) == [four]


def test_steps_of_more_than_eight_digits_sort_by_number(tmp_path: Path) -> None:
    assert [path.name for path in write(tmp_path, 99999999, 100000000)] == ["step_99999999", "step_100000000"]
    assert latest_valid_checkpoint(tmp_path).name == "step_100000000"
    assert [path.name for path in write(tmp_path, 100000001, keep=1)] == ["step_100000001"]


def test_step_that_is_saved_already_is_not_written_again(tmp_path: Path) -> None:
    [four] = write(tmp_path, 4)
    with CheckpointWriter(tmp_path, TOKENIZER, 9, tmp_path / "checkpoints" / "step_00000004") as writer:
        writer.save(4, *weights(small_model(5)), small_state(5), wait=True)
        writer.wait()
        assert checkpoints(tmp_path) == [four] and is_of(four, 4)
        writer.save(8, *weights(small_model(8)), small_state(8))
        writer.wait()
        writer.save(8, *weights(small_model(5)), small_state(5), wait=True)
        writer.close()
    _, eight = checkpoints(tmp_path)
    assert is_of(four, 4) and is_of(eight, 8)


def test_model_is_that_of_the_run_named_or_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no trained model under out/"):
        find_model(None)
    out = Path("out")
    (out / "empty" / "checkpoints").mkdir(parents=True)
    (out / "notes.txt").write_text("no run")
    write(out / "z", 500)
    time.sleep(0.05)  # file systems stamp times in ticks
    [earlier, newest] = write(out / "b", 3, 7)
    assert find_model(None) == newest
    time.sleep(0.05)
    [other] = write(out / "a", 1)
    assert find_model(None) == other and find_model("out/b") == newest
    assert find_model(str(earlier)) == str(earlier) and find_model("gpt2") == "gpt2"
    with pytest.raises(ValueError, match="out/empty has no complete checkpoint yet"):
        find_model("out/empty")


# Which process a run belongs to.


def test_run_has_one_process_at_a_time(tmp_path: Path) -> None:
    """Also where the first ended without a word."""
    hold = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from gpt2_scratch.checkpoint import lock_run; "
    hold += f"from pathlib import Path; lock = lock_run(Path({str(tmp_path)!r})); print('locked', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"another process is training {tmp_path}"):
            lock_run(tmp_path)
        other.kill()
    lock_run(tmp_path).release()


def test_leaving_the_writer_waits_for_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where training ends with an error."""
    gate = Gate(monkeypatch, torch, "save")
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, TOKENIZER, 2, None) as writer:
        writer.save(4, *weights(small_model(4)), small_state(4))
        threading.Timer(0.1, gate.open).start()
        raise ZeroDivisionError
    [path] = checkpoints(tmp_path)
    assert checkpoint_problem(path) is None and is_of(path, 4)


def test_run_is_started_by_this_launch_only_under_the_same_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not started_by_this_launch(tmp_path)
    mark_launch(tmp_path)
    assert not started_by_this_launch(tmp_path), "without torchrun nothing tells launches apart"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert not started_by_this_launch(tmp_path) and not started_by_this_launch(tmp_path / "nowhere")
    mark_launch(tmp_path)
    assert started_by_this_launch(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert not started_by_this_launch(tmp_path)
    mark_launch(tmp_path)
    assert started_by_this_launch(tmp_path), "what was begun by one can be taken over by another"
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert not started_by_this_launch(tmp_path), "another torchrun, whose id is the default one perhaps"


# What a checkpoint can hold.


class Rate(float):
    """A number of a class of its own, as parsers make them."""


@pytest.mark.parametrize("stranger", [Rate(0.1), np.float64(0.1), Path("data"), torch.float32, {1, 2}])
@pytest.mark.parametrize("place", ["settings", "optimizer"])
def test_state_that_could_not_be_loaded_is_an_error_when_it_is_saved(tmp_path: Path, stranger: Any, place: str) -> None:
    state = small_state(4)
    if place == "settings":
        state["settings"]["learning_rate"] = stranger
    else:
        state["optimizer"]["param_groups"][0]["betas"] = (0.9, stranger)
    with CheckpointWriter(tmp_path, TOKENIZER, 2, None) as writer:
        with pytest.raises(TypeError, match=rf"state\['{place}'\].* is a {type(stranger).__qualname__}"):
            writer.save(4, *weights(small_model(4)), state)
        writer.save(4, *weights(small_model(4)), small_state(4))
        writer.close()
    check_plain(load_state(checkpoints(tmp_path)[0]))


def test_first_checkpoint_that_cannot_be_read_back_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As would be with a kind of value that `check_plain` lets pass and torch.load refuses."""
    monkeypatch.setattr(checkpoint, "check_plain", lambda state: None)
    state = small_state(4)
    state["settings"]["seed"] = Rate(1)
    with CheckpointWriter(tmp_path, TOKENIZER, 2, None) as writer:
        writer.save(4, *weights(small_model(4)), state)
        with pytest.raises(RuntimeError, match=r"state of step 4 .* cannot be loaded again"):
            writer.close()
    assert checkpoints(tmp_path) == []


def test_numbers_of_the_former_parser_are_read_as_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until November 2026 settings were numbers of classes of jsonargparse, which went into checkpoints."""
    kinds = {
        "ClosedUnitInterval": 0.95,
        "NonNegativeFloat": 0.1,
        "PositiveFloat": 0.5,
        "PositiveInt": 7,
        "NonNegativeInt": 0,
    }
    module = types.ModuleType("jsonargparse.typing")
    for name, value in kinds.items():
        setattr(module, name, type(name, (type(value),), {"__module__": module.__name__}))
    monkeypatch.setitem(sys.modules, "jsonargparse", types.ModuleType("jsonargparse"))
    monkeypatch.setitem(sys.modules, "jsonargparse.typing", module)
    state = small_state(4)
    state["optimizer"]["param_groups"][0] |= {name: getattr(module, name)(value) for name, value in kinds.items()}
    torch.save(state, tmp_path / "trainer_state.pt")
    monkeypatch.undo()
    group = load_state(tmp_path)["optimizer"]["param_groups"][0]
    check_plain(group)
    assert {name: group[name] for name in kinds} == kinds


def test_disk_has_a_checkpoint_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may lose what was not synced, but not the renaming, and leave a checkpoint of zeros."""
    events: list[tuple[str, Any]] = []
    fsync, replace = os.fsync, os.replace

    def identity(status: os.stat_result) -> tuple[int, int, int]:
        return status.st_ino, status.st_size, status.st_mtime_ns  # as it was synced: nothing written since

    def spy_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("synced", identity(os.fstat(descriptor))))

    def spy_replace(source: Path, target: Path) -> None:
        if target.name == "step_00000001":
            paths = [*source.iterdir(), *([source] if os.name == "posix" else [])]  # Windows syncs no folders
            events.append(("replaced", {identity(path.stat()) for path in paths}))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write(tmp_path, 1)
    at = [kind for kind, _ in events].index("replaced")
    assert len(events[at][1]) > 5 and events[at][1] <= {found for _, found in events[:at]}
    if os.name == "posix":
        folder = (tmp_path / "checkpoints").stat().st_ino
        assert folder in [found[0] for kind, found in events[at + 1 :] if kind == "synced"], "the new name as well"
