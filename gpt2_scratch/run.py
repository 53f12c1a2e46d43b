"""A run's folder, `out/<run>/`: open it, find what to resume on every node, begin to write to it."""

import importlib.util
import os
import platform
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import torch

from gpt2_scratch.checkpoint import (
    SUMS_FILE,
    CheckpointWriter,
    checkpoint_problem,
    checkpoints,
    holds_run,
    last_written,
    latest_valid_checkpoint,
    lock_run,
    mark_launch,
    started_by_this_launch,
)
from gpt2_scratch.cli import UserError
from gpt2_scratch.config import TrainConfig
from gpt2_scratch.dataset import file_sha256
from gpt2_scratch.distributed import (
    Runtime,
    all_ranks_or_none,
    diverged_ranks,
    place,
    print0,
    same_everywhere,
    send_files,
)
from gpt2_scratch.metrics import MetricsLog
from gpt2_scratch.tokenizer import Tokenizer
from model import GPT


def open_run(run: Path, cfg: TrainConfig, rt: Runtime, stack: ExitStack) -> Path | None:
    """The checkpoint to resume from, the same on every node; None for a new run.

    An existing run is locked before its checkpoints are looked at. The newest valid checkpoint of any node is sent to
    the nodes that lack it: with local disks, to all but one.

    Args:
        stack: holds the lock.

    Raises:
        UserError: the run exists but is not to be resumed, or cannot be.
    """
    name = sums = lost = None
    with all_ranks_or_none(rt):
        if cfg.wandb_project and rt.is_main and not importlib.util.find_spec("wandb"):
            raise UserError("wandb_project is set, but wandb is not installed; pip install wandb")
        if rt.local_rank == 0:
            refuse_unasked(run, cfg)
            if rt.is_main and run.exists():
                stack.callback(lock_run(run).release)
            try:
                found, written = latest_valid_checkpoint(run), last_written(run)
            except UserError as error:  # all are damaged on this node; another may have a valid one
                found, written, lost = None, None, str(error)
            if written and not found:
                lost = (
                    f"{run} had come to {written}, but no valid checkpoint of it is left; put one back to go on, or "
                    f"begin another run with --run_name NAME"
                )
            name, sums = (found.name, file_sha256(found / SUMS_FILE)) if found else (None, None)
    ranks = rt.all_gather_object([name, sums, lost, rt.local_rank])
    nodes = {rank: node for rank, node in enumerate(ranks) if node[3] == 0}
    newest = max((node[0] for node in nodes.values() if node[0]), key=lambda name: int(name[5:]), default=None)
    with all_ranks_or_none(rt):
        if not newest and (lost := next((node[2] for node in nodes.values() if node[2]), None)):
            raise UserError(lost)
    if not newest:
        return None
    owner = next(rank for rank, node in nodes.items() if node[0] == newest)
    checkpoint = run / "checkpoints" / newest
    same_everywhere(rt, {f"{checkpoint / SUMS_FILE}": sums if name == newest else nodes[owner][1]})
    lacking = [rank for rank, node in nodes.items() if node[0] != newest]
    if lacking:
        receive_checkpoint(checkpoint, owner, rt.rank in lacking, rt)
        metrics = run / "metrics.jsonl"  # rank 0 appends to it; next time that may be on another of these nodes
        if rt.all_gather_object(metrics.exists())[owner]:
            send_files(rt, [metrics], owner, run if rt.rank in lacking else None)
        elif 0 in lacking:
            print0(rt, f"{metrics} is not on the node that {checkpoint} comes from: the metrics begin anew")
    return checkpoint


def receive_checkpoint(checkpoint: Path, owner: int, receives: bool, rt: Runtime) -> None:
    """Send a checkpoint from one rank's node to those where it is missing or damaged. A collective."""
    with all_ranks_or_none(rt):
        partial = checkpoint.with_name(f".{checkpoint.name}.{rt.rank}")
        if receives:
            print(f"{place(rt.rank)} gets {checkpoint} from rank {owner}", flush=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    own = sorted(path.name for path in checkpoint.iterdir()) if rt.rank == owner else None
    names = rt.all_gather_object(own)[owner]
    send_files(rt, [checkpoint / name for name in names], owner, partial if receives else None)
    with all_ranks_or_none(rt):
        if receives:
            if problem := checkpoint_problem(partial):
                raise UserError(f"{checkpoint} did not arrive whole: {problem}")
            if checkpoint.exists():  # damaged, or it would not have been sent
                os.replace(checkpoint, checkpoint.with_name(f"{checkpoint.name}.damaged"))
            os.replace(partial, checkpoint)


def refuse_unasked(run: Path, cfg: TrainConfig) -> None:
    """Raises UserError: the folder holds a run that nobody asked to resume."""
    if holds_run(run) and not (cfg.resume or started_by_this_launch(run)):
        raise UserError(f"{run} holds a run already; add --resume to continue it, or --run_name NAME for another")


def start_writing(
    run: Path,
    cfg: TrainConfig,
    checkpoint: Path | None,
    tokenizer: Tokenizer,
    step: int,
    evaluation_due: bool,
    stack: ExitStack,
) -> tuple[MetricsLog, CheckpointWriter]:
    """Lock the run's folder and bring its files back to the step that the run is at.

    Raises:
        UserError: another process writes to the run, or its metrics.jsonl is damaged.
    """
    stack.callback(lock_run(run).release)
    refuse_unasked(run, cfg)
    if checkpoints(run) and not checkpoint:
        raise UserError(f"another process has trained {run} meanwhile; add --resume to continue it")
    mark_launch(run)
    settings = run / "config.toml"
    writer = CheckpointWriter(run, tokenizer, cfg.keep_checkpoints, checkpoint)
    log = MetricsLog(run, vars(cfg), step, evaluation_due, cfg.wandb_project)
    writer.before = log.sync  # a checkpoint is of use only with the metrics up to it
    lines = (
        settings.read_text(encoding="utf-8", errors="replace").splitlines() if checkpoint and settings.exists() else []
    )
    earlier = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    cfg.save(settings, [*earlier, f"step {step}: {versions()}"])
    return log, writer


def end_for_nonfinite_steps(run: Path, writer: CheckpointWriter | None, first: int, last: int, rt: Runtime) -> None:
    """Raises UserError: every step from `first` to `last` was skipped; it names the checkpoint from before."""
    with all_ranks_or_none(rt):
        good = checkpoint_before(run, writer, first, rt)
        advice = (
            f"{good} is good: begin a run from it with --init_from, --run_name NAME and a lower learning_rate"
            if good
            else "there is no checkpoint from before; begin again with a lower learning_rate"
        )
        raise UserError(f"the loss or its gradient was not finite in all steps from {first} to {last}; {advice}")


def check_replicas(run: Path, writer: CheckpointWriter | None, model: GPT, step: int, rt: Runtime) -> None:
    """Raises UserError: the replicas of the model have diverged; it names the ranks and the checkpoint from before."""
    if ranks := diverged_ranks(model, rt):
        with all_ranks_or_none(rt):
            good = checkpoint_before(run, writer, step, rt)
            raise UserError(
                f"after step {step} the weights of rank {', '.join(map(str, ranks))} are not those of rank 0; the "
                f"newest checkpoint from before is {good}: look for a faulty device, then add --resume"
            )


def checkpoint_before(run: Path, writer: CheckpointWriter | None, step: int, rt: Runtime) -> str | None:
    """The newest valid checkpoint before a step. A collective."""
    if writer:
        writer.wait()
    good = latest_valid_checkpoint(run, before=step) if writer else None
    return rt.broadcast_object(good and str(good))


def versions() -> str:
    """Python, torch and this program's commit, for the head of config.toml."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return f"Python {platform.python_version()}, torch {torch.__version__}, commit {commit}"
