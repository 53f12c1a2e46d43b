"""Training that is killed, signalled, starved of disk or fed bad numbers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, fill
from soak_kill import soak
from test_end_to_end import curve, metrics, run_tiny

import train as training
from gpt2_scratch.checkpoint import CheckpointWriter, checkpoint_problem, checkpoints, load_state
from gpt2_scratch.cli import UserError
from gpt2_scratch.metrics import MetricsLog
from model import GPT, Block


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many as the processes that are started here have: equal to the bit."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def untimed(run: str) -> list[dict]:
    return [{key: v for key, v in line.items() if key != "tokens_per_sec"} for line in metrics(run)]


def newest(run: str) -> Path:
    return checkpoints(Path("out") / run)[-1]


def assert_same_run(run: str, other: str) -> None:
    assert untimed(run) == untimed(other)
    assert (newest(run) / "model.safetensors").read_bytes() == (newest(other) / "model.safetensors").read_bytes()
    ours, theirs = load_state(newest(run)), load_state(newest(other))
    assert ours["progress"] == theirs["progress"]
    states = ours["optimizer"]["state"], theirs["optimizer"]["state"]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])


def start(*flags: str, **environment: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *flags]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(run: str, n: int) -> None:
    path, end = Path("out") / run / "metrics.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < n:
        assert time.monotonic() < end, f"{run} has not come to {n} lines of metrics"
        time.sleep(0.02)


def test_signal_saves_and_the_run_goes_on_exactly(workplace: Path) -> None:
    flags = ["--max_steps", "80", "--eval_interval", "30", "--checkpoint_interval", "0", "--dropout", "0.1"]
    run_tiny(*flags, "--run_name", "whole")
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    stopped = {}
    for kind in kinds:  # one after the other: while one begins, another may come to its end
        stopped[kind] = start(*flags, "--run_name", kind.name)
        wait_for_lines(kind.name, 5)
        stopped[kind].send_signal(kind)
    for kind, process in stopped.items():
        output, errors = process.communicate(timeout=60)
        step = load_state(newest(kind.name))["progress"]["step"]
        assert process.returncode == 128 + kind, errors
        assert f"stopped by {kind.name} after step {step}" in output and 5 <= step < 80
        assert "Traceback" not in errors and metrics(kind.name)[-1]["step"] == step
        run_tiny(*flags, "--run_name", kind.name, "--resume")
        assert_same_run(kind.name, "whole")


def test_second_signal_ends_at_once(workplace: Path) -> None:
    """Where the first is not obeyed: an update of minutes is not broken off."""
    lines = [f"import sys, time; sys.path.insert(0, {str(ROOT)!r})", "import train"]
    lines += ["from gpt2_scratch import config, optim"]
    lines += ["optim.Muon.step = lambda self: (open('updating', 'w'), time.sleep(120))"]
    hang = "\n".join([*lines, "train.train(config.parse_config(sys.argv[1:]))"])
    process = subprocess.Popen([sys.executable, "-c", hang, *TINY], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not Path("updating").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert not checkpoints(Path("out/tiny"))
    process.communicate()


@pytest.mark.parametrize("where", ["between micro-steps", "forward", "backward"])
def test_signal_ends_a_long_step_which_is_repeated_after_the_resume(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    flags = ["--max_steps", "4", "--batch_size", "1", "--dropout", "0.1"]
    run_tiny(*flags, "--run_name", "whole")
    calls = []
    per_step = 16 * {"between micro-steps": 1, "forward": 2, "backward": 4}[where]  # micro-steps, calls in each

    def in_the_third_step(*_: object) -> None:
        calls.append(where)
        if len(calls) == 2 * per_step + 5:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)  # for the thread that listens

    def watched(*args: object, **kwargs: object) -> torch.Tensor:
        in_the_third_step()
        out = block_forward(*args, **kwargs)
        if where == "backward" and out.requires_grad:
            out.register_hook(in_the_third_step)
        return out

    def batches(*args: object, **kwargs: object) -> Iterator:
        for batch in training_batches(*args, **kwargs):
            in_the_third_step()
            yield batch

    block_forward, training_batches = Block.forward, training.training_batches
    with monkeypatch.context() as patched:
        if where == "between micro-steps":
            patched.setattr(training, "training_batches", batches)
        else:
            patched.setattr(Block, "forward", watched)
        with pytest.raises(SystemExit) as end:
            run_tiny(*flags)
    assert end.value.code == 128 + signal.SIGTERM
    step = load_state(newest("tiny"))["progress"]["step"]
    assert step == metrics("tiny")[-1]["step"] < 3, "what was done of the step is dropped"
    run_tiny(*flags, "--resume")
    assert_same_run("tiny", "whole")


def test_processes_without_their_torchrun_save_and_end(workplace: Path) -> None:
    """Killed, or ended by a signal that it does not pass on, such as SIGUSR1."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "train.py"), *TINY, "--max_steps", "100000", "--batch_size", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as torchrun:
        wait_for_lines("tiny", 5)
        torchrun.kill()
        said = torchrun.stdout.read()  # up to the end of the last process that has it
    assert "stopped by SIGTERM after step" in said
    assert metrics("tiny")[-1]["step"] == load_state(newest("tiny"))["progress"]["step"]


def test_signal_breaks_off_an_evaluation_which_is_made_after_the_resume(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tiny("--run_name", "whole")
    whole_batches, seen = training.evaluation_batches, []

    def interrupted(*args: object, **kwargs: object) -> Iterator:
        for batch in whole_batches(*args, **kwargs):
            seen.append(batch)
            yield batch
            if len(seen) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)

    monkeypatch.setattr(training, "evaluation_batches", interrupted)
    with pytest.raises(SystemExit) as end:
        run_tiny()
    assert end.value.code == 128 + signal.SIGTERM
    assert metrics("tiny")[-1]["step"] == 6 and "val_loss" not in metrics("tiny")[-1]
    monkeypatch.undo()
    os.chdir(workplace)
    run_tiny("--resume")
    assert_same_run("tiny", "whole")


def test_handlers_are_the_old_ones_after_a_run(workplace: Path) -> None:
    before = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    threads = threading.active_count()
    run_tiny("--max_steps", "2")
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    time.sleep(0.2)
    assert threading.active_count() <= threads


def poison(monkeypatch: pytest.MonkeyPatch, bad_calls: set[int], value: float, where: str) -> None:
    """Make the loss or the gradient of some training micro-steps, counted from 1, not finite."""
    whole, calls = GPT.forward, []

    def forward(self: GPT, idx: torch.Tensor, *args: object, **kwargs: object) -> tuple:
        logits, loss = whole(self, idx, *args, **kwargs)
        if self.training:
            calls.append(idx)
            if len(calls) in bad_calls and where == "loss":
                loss = loss * value
            elif len(calls) in bad_calls:
                loss.register_hook(lambda grad: grad * value)
        return logits, loss

    monkeypatch.setattr(GPT, "forward", forward)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("where", "value"), [("loss", float("nan")), ("gradient", float("inf"))])
def test_step_with_bad_numbers_changes_nothing(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, where: str, value: float
) -> None:
    flags = ["--optimizer", optimizer, "--max_steps", "5"]
    poison(monkeypatch, {10}, value, where)  # the second of two micro-steps of step 5
    run_tiny(*flags)
    assert [line["bad_steps"] for line in metrics("tiny") if "bad_steps" in line] == [0, 0, 0, 0, 1]
    last = next(line for line in metrics("tiny") if line["step"] == 5)
    assert (last["train_loss"] if where == "loss" else last["grad_norm"]) is None
    before, after = checkpoints(Path("out/tiny"))
    assert (before / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()
    ours, theirs = (load_state(path)["optimizer"]["state"] for path in (before, after))
    assert all(torch.equal(ours[i][key], theirs[i][key]) for i in ours for key in ours[i])


def test_training_goes_on_after_bad_steps(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {5, 9, 10, 11}, float("inf"), "loss")
    run_tiny("--max_bad_steps", "4")
    assert metrics("tiny")[-2]["bad_steps"] == 3 and curve("tiny", "val_loss")[-1] < 4
    assert load_state(newest("tiny"))["progress"]["bad_steps"] == 3


def test_run_ends_after_bad_steps_in_a_row(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, set(range(13, 100)), float("nan"), "loss")  # from step 7 on
    with pytest.raises(ValueError, match=r"all steps from 7 to 9; out/tiny/checkpoints/step_00000004 is good"):
        run_tiny("--max_bad_steps", "3", "--checkpoint_interval", "4")
    assert [path.name for path in checkpoints(Path("out/tiny"))] == ["step_00000004"], "none from the bad steps"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--learning_rate", "0.02"], r"made with learning_rate 0.01; now it is learning_rate 0.02"),
        (["--seed", "1", "--n_layer", "3"], r"made with seed 1337, n_layer 2; now it is seed 1, n_layer 3"),
        (["--total_batch_size", "1024"], r"made with total_batch_size 512; now it is total_batch_size 1024"),
        (["--max_steps", "3"], r"is at step 4 already, beyond max_steps 3"),
    ],
)
def test_settings_that_make_another_run_are_refused(workplace: Path, flags: list[str], expected: str) -> None:
    run_tiny("--max_steps", "4")
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=expected):
        run_tiny("--max_steps", "4", "--resume", *flags)
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


def test_other_data_is_refused_and_moved_data_accepted(workplace: Path) -> None:
    run_tiny("--max_steps", "4")
    Path("data/shakespeare").rename("data/moved")
    flags = ["--max_steps", "8", "--resume", "--data", "data/moved"]
    run_tiny(*flags)
    meta = json.loads(Path("data/moved/meta.json").read_text())
    meta["shards"]["train"] += meta["shards"]["val"]
    Path("data/moved/meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"made with the tokens of data/moved; data/moved now holds others"):
        run_tiny(*flags)


def test_settings_that_change_no_mathematics_are_accepted_and_said(
    workplace: Path, capsys: pytest.CaptureFixture
) -> None:
    run_tiny("--max_steps", "4")
    capsys.readouterr()
    run_tiny("--max_steps", "8", "--resume", "--batch_size", "2", "--log_interval", "2", "--eval_interval", "3")
    said = capsys.readouterr().out.splitlines()[0]
    assert "max_steps was 4, is now 8" in said and "the linear schedule now ends at step 8" in said
    assert "batch_size was 8, is now 2" in said
    config = Path("out/tiny/config.toml").read_text()
    assert "max_steps = 8" in config and config.startswith("# step 0: Python") and "\n# step 4: Python" in config


def test_one_process_at_a_time_trains_a_run(workplace: Path) -> None:
    process = start("--max_steps", "100000", "--eval_interval", "0")
    wait_for_lines("tiny", 5)
    with pytest.raises(ValueError, match="another process is training out/tiny"):
        run_tiny("--max_steps", "100000", "--eval_interval", "0", "--resume")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    lines = [line["step"] for line in metrics("tiny")]
    assert lines == list(range(1, len(lines) + 1))


@pytest.fixture
def every_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waits for each checkpoint: one more or less, or one later, is another test's business."""

    def save(self: CheckpointWriter, *args: object, wait: bool = False) -> None:
        whole_save(self, *args, wait=True)

    whole_save = CheckpointWriter.save
    monkeypatch.setattr(CheckpointWriter, "save", save)


@pytest.mark.usefixtures("every_checkpoint")
def test_full_disk_does_not_stop_the_run(
    workplace: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--max_steps", "40", "--eval_interval", "40", "--keep_checkpoints", "1"]
    run_tiny(*flags, "--run_name", "whole")
    capsys.readouterr()  # it may have left out a checkpoint
    Path("out/tiny").symlink_to(small_disk)
    whole, filler = MetricsLog.write, small_disk / "filler"

    def write(self: MetricsLog, figures: dict) -> None:
        if figures["step"] == 6:
            fill(small_disk, leave=0)
        if figures["step"] == 30:
            filler.unlink()
        whole(self, figures)

    monkeypatch.setattr(MetricsLog, "write", write)
    run_tiny(*flags, "--resume")
    errors = capsys.readouterr().err
    assert "no checkpoint of step 8: " in errors and "No space left" in errors
    assert "no checkpoint of step 36" not in errors
    assert_same_run("tiny", "whole")


@pytest.mark.usefixtures("every_checkpoint")
def test_full_disk_at_the_end_is_an_error(workplace: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out").mkdir()
    Path("out/tiny").symlink_to(small_disk)
    whole = MetricsLog.write

    def write(self: MetricsLog, figures: dict) -> None:
        whole(self, figures)
        if figures["step"] == 7:
            fill(small_disk, leave=0)

    monkeypatch.setattr(MetricsLog, "write", write)
    with pytest.raises(UserError, match="step 12, could not be written"):
        run_tiny("--resume")
    assert checkpoint_problem(newest("tiny")) is None and newest("tiny").name == "step_00000004"


def processes(world_size: int, *flags: str) -> list[subprocess.Popen]:
    """The processes of a group, without a launcher that would clean up after them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world_size)}
    return [start(*flags, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(world_size)]


def test_process_that_hangs_ends_the_others(workplace: Path) -> None:
    first, second = processes(2, "--max_steps", "100000", "--batch_size", "4", "--timeout", "4")
    wait_for_lines("tiny", 5)
    second.send_signal(signal.SIGSTOP)
    try:
        errors = first.communicate(timeout=60)[1]
        assert (
            first.returncode == 1
            and re.search("error: rank 0 on .* lost the others", errors)
            and "Traceback" not in errors
        )
    finally:
        second.kill()
        second.communicate()


def test_bad_shard_fails_all_processes_with_one_message(workplace: Path) -> None:
    shard = Path("data/shakespeare/val_000000.bin")
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    group = processes(2, "--batch_size", "4")
    errors = [process.communicate(timeout=60)[1] for process in group]
    assert [process.returncode for process in group] == [1, 1]
    assert "".join(errors).count("error:") == 1 and "val_000000.bin was altered" in errors[0]
    assert "Traceback" not in "".join(errors) and not Path("out").exists()


def test_signal_to_one_process_stops_all(workplace: Path) -> None:
    group = processes(2, "--max_steps", "100000", "--batch_size", "4")
    wait_for_lines("tiny", 5)
    group[1].send_signal(signal.SIGUSR1)
    errors = [process.communicate(timeout=60)[1] for process in group]
    assert [process.returncode for process in group] == [128 + signal.SIGUSR1] * 2, errors
    assert metrics("tiny")[-1]["step"] == load_state(newest("tiny"))["progress"]["step"]


@pytest.mark.slow
def test_resume_on_other_numbers_of_processes(workplace: Path) -> None:
    run_tiny("--run_name", "whole")
    for world_size in (1, 2, 4):
        for resumed in (1, 2, 4):
            run = f"from_{world_size}_to_{resumed}"
            group = processes(world_size, "--run_name", run, "--batch_size", "4")
            assert [process.wait(timeout=120) for process in group] == [0] * world_size
            for path in checkpoints(Path("out") / run)[1:]:
                (path / "SHA256SUMS").unlink()
            group = processes(resumed, "--run_name", run, "--batch_size", "4", "--resume")
            assert [process.wait(timeout=120) for process in group] == [0] * resumed
            for key in ("train_loss", "val_loss"):
                assert curve(run, key) == pytest.approx(curve("whole", key), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 25), (2, 5), (4, 5)])
def test_killed_runs_end_as_if_left_in_peace(tmp_path: Path, processes: int, kills: int) -> None:
    assert soak(tmp_path, kills, processes).total() == kills
