"""Where a run's figures go: metrics.jsonl always, TensorBoard and Weights & Biases where wanted."""

import importlib.util
import json
from pathlib import Path


class MetricsLog:
    """Append figures to `<run>/metrics.jsonl`, and to TensorBoard event files if it is installed.

    Args:
        run: the run's folder.
        step: where the run stands; lines of later steps, lost with a crash, are removed.
        settings: what Weights & Biases shows beside the curves.
        wandb_project: the project to send to; "": nowhere.
    """

    def __init__(self, run: Path, settings: dict, step: int, wandb_project: str = ""):
        path = run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")
        self.tensorboard = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(run))
        self.wandb = None
        if wandb_project:
            import wandb

            self.wandb = wandb.init(project=wandb_project, name=run.name, config=settings, resume="allow")

    def write(self, figures: dict[str, float | int]) -> None:
        """Write one line; `figures` holds `step` and what was measured there."""
        self.file.write(json.dumps(figures) + "\n")
        self.file.flush()
        values = {name: value for name, value in figures.items() if name != "step"}
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, figures["step"])
        if self.wandb:
            self.wandb.log(values, step=figures["step"])

    def close(self) -> None:
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
