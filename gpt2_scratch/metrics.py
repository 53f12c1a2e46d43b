"""Where a run's figures go: metrics.jsonl always, TensorBoard and Weights & Biases where wanted."""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from threading import Lock

from tqdm import tqdm

from gpt2_scratch.cli import UserError


class MetricsLog:
    """Append figures to `<run>/metrics.jsonl`, and to TensorBoard event files if it is installed.

    Args:
        run: the run's folder.
        step: where the run stands; lines of later steps, lost with a crash, are cut off.
        evaluation_due: the validation loss of `step` is yet to come; a line of it is cut off as well.
        settings: what Weights & Biases shows beside the curves.
        wandb_project: the project to send to; "": nowhere.

    Raises:
        UserError: a line that is to be kept is not one of ours.
    """

    def __init__(self, run: Path, settings: dict, step: int, evaluation_due: bool = False, wandb_project: str = ""):
        path = run / "metrics.jsonl"
        # Not buffered: what a full disk did not take is kept here and written with the next line.
        self.file = path.open("ab", buffering=0)
        self.pending = b""
        self.lock = Lock()  # `sync` is called from another thread
        os.truncate(path, _kept_bytes(path, step, evaluation_due))
        self.tensorboard = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(run), purge_step=step + 1)
        self.wandb = None
        if wandb_project:
            import wandb

            self.wandb = wandb.init(project=wandb_project, name=run.name, config=settings, resume="allow")

    def write(self, figures: dict[str, float | int]) -> None:
        """Write one line; `figures` holds `step` and what was measured there. What is not finite becomes null."""
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        waiting = self.pending
        try:
            self._flush(json.dumps(finite).encode() + b"\n")
        except OSError as error:
            if not waiting:
                tqdm.write(f"warning: {error}; lines are kept until there is room", file=sys.stderr)
        values = {name: value for name, value in figures.items() if name != "step"}
        if self.tensorboard:
            try:
                for name, value in values.items():
                    self.tensorboard.add_scalar(name, value, figures["step"])
            except OSError as error:
                tqdm.write(f"warning: TensorBoard: {error}; its files end here", file=sys.stderr)
                self.tensorboard = None
        if self.wandb:
            self.wandb.log(values, step=figures["step"])

    def sync(self) -> None:
        """Have the disk hold every line. Raises OSError where it does not take them."""
        self._flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Raises OSError where the disk did not take the last lines."""
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
    """How long the file is up to the last line to be kept. Lines stand in the order of their steps."""
    kept = position = first_cut = newest = 0
    for number, line in enumerate(path.open("rb"), start=1):
        position += len(line)
        figures = parsed_line(line) or {"step": math.inf}
        late = figures["step"] > step or (figures["step"] == step and evaluation_due and "val_loss" in figures)
        if late or figures["step"] < newest:
            first_cut = first_cut or number
        elif first_cut:
            raise UserError(f"{path}, line {first_cut}, is damaged or out of order; mend it, or move the file away")
        else:
            kept, newest = position, figures["step"]
    return kept


def parsed_line(line: bytes) -> dict | None:
    """The figures of a whole line, or None."""
    try:
        figures = json.loads(line.decode()) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return figures if isinstance(figures, dict) and type(figures.get("step")) is int else None
