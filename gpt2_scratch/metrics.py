"""A run's metrics: metrics.jsonl, TensorBoard and Weights & Biases; and its speed."""

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Lock

from tqdm import tqdm

from gpt2_scratch.cli import UserError


class MetricsLog:
    """Appends metrics to `<run>/metrics.jsonl`, and to TensorBoard event files if it is installed.

    Args:
        run: the run's folder.
        step: where the run resumes; lines of later steps are removed.
        evaluation_due: the evaluation at `step` is yet to come; a line of it is removed as well.
        settings: shown by Weights & Biases beside the curves.
        wandb_project: the project to log to; "": none.

    Raises:
        UserError: a line to be kept is damaged.
    """

    def __init__(self, run: Path, settings: dict, step: int, evaluation_due: bool = False, wandb_project: str = ""):
        path = run / "metrics.jsonl"
        # Unbuffered: lines that a full disk rejects stay in `pending` and are written with the next one.
        self.file = path.open("ab", buffering=0)
        self.pending = b""
        self.lock = Lock()  # `sync` runs in the checkpoint thread
        os.truncate(path, _kept_bytes(path, step, evaluation_due))
        self.tensorboard = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(run), purge_step=step + 1)
        self.wandb = None
        if wandb_project:
            import wandb

            known = run / "wandb_id"  # of the W&B run, which a resumed run continues
            id = known.read_text() if known.exists() else None
            self.wandb = wandb.init(project=wandb_project, name=run.name, config=settings, id=id, resume="allow")
            known.write_text(self.wandb.id)

    def write(self, metrics: dict[str, float | int]) -> None:
        """Write one line: `step` and the metrics measured there. Non-finite values become null."""
        waiting = self.pending
        try:
            self._flush(json.dumps(for_json(metrics)).encode() + b"\n")
        except OSError as error:
            if not waiting:
                tqdm.write(f"warning: {error}; lines are kept in memory until there is room", file=sys.stderr)
        values = {name: value for name, value in metrics.items() if name != "step"}
        if self.tensorboard:
            try:
                for name, value in values.items():
                    self.tensorboard.add_scalar(name, value, metrics["step"])
            except OSError as error:
                tqdm.write(f"warning: TensorBoard: {error}; its files end here", file=sys.stderr)
                self.tensorboard = None
        if self.wandb:
            self.wandb.log(values, step=metrics["step"])

    def sync(self) -> None:
        """Flush every line to disk. Raises OSError if the disk rejects them."""
        self._flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Raises OSError if the disk rejects the last lines."""
        self._flush()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()

    def _flush(self, line: bytes = b"") -> None:
        with self.lock:
            self.pending += line
            try:
                while self.pending:
                    self.pending = self.pending[self.file.write(self.pending) :]
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.file.name)) from error


def _kept_bytes(path: Path, step: int, evaluation_due: bool) -> int:
    """The file's length up to the last line to keep. Lines are in the order of their steps."""
    kept = position = first_cut = newest = 0
    for number, line in enumerate(path.open("rb"), start=1):
        position += len(line)
        metrics = parsed_line(line) or {"step": math.inf}
        late = metrics["step"] > step or (metrics["step"] == step and evaluation_due and "val_loss" in metrics)
        if late or metrics["step"] < newest:
            first_cut = first_cut or number
        elif first_cut:
            raise UserError(f"{path}, line {first_cut}, is damaged or out of order; repair it, or move the file away")
        else:
            kept, newest = position, metrics["step"]
    return kept


def parsed_line(line: bytes) -> dict | None:
    """A line's metrics, or None if it is torn or not ours."""
    try:
        metrics = json.loads(line.decode()) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return metrics if isinstance(metrics, dict) and type(metrics.get("step")) is int else None


def for_json(values: dict[str, float | int]) -> dict[str, float | int | None]:
    """Values with null for NaN and infinity, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


class Speed:
    """Measures tokens per second and model FLOPs utilization, evaluations and checkpoints excluded.

    Args:
        step: where the run stands.
        flops_per_token: of a forward and a backward pass.
        peak_flops: of all devices together, FLOP/s; None: unknown.
    """

    def __init__(self, step: int, tokens_per_step: int, flops_per_token: int, peak_flops: float | None):
        self.began, self.step, self.tokens_per_step = time.perf_counter(), step, tokens_per_step
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.intervals = 0  # measured so far

    @contextmanager
    def paused(self) -> Iterator[None]:
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused

    def measure(self, step: int) -> dict[str, float]:
        """tokens_per_sec since the last call, and mfu where the peak is known (PaLM, appendix B)."""
        now = time.perf_counter()
        rate = (step - self.step) * self.tokens_per_step / (now - self.began)
        self.began, self.step = now, step
        self.intervals += 1
        return {"tokens_per_sec": rate} | (
            {"mfu": rate * self.flops_per_token / self.peak_flops} if self.peak_flops else {}
        )

    def forecast(self, measured: dict[str, float], steps: int) -> str:
        """What `measure` returned in words, and how long so many more steps take at that speed."""
        rate, mfu = measured["tokens_per_sec"], measured.get("mfu")
        left = timedelta(seconds=round(steps * self.tokens_per_step / rate))
        share = "" if mfu is None else f", {mfu:.1%} of the peak FLOP/s (MFU)"
        return f"{rate:,.0f} tokens/s{share}; the remaining {steps:,} steps take {left} at this speed, plus evaluations"
