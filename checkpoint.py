"""A run's checkpoints: `out/<run>/checkpoints/step_00002000/`, each a Hugging Face model folder."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from model import GPT
from tokenizer import Tokenizer

STATE_FILE = "trainer_state.pt"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if (path / STATE_FILE).is_file())


def newest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of the newest run in a folder of runs."""
    found = [paths[-1] for run in out.glob("*") if (paths := checkpoints(run))]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def save_checkpoint(run: Path, step: int, model: GPT, tokenizer: Tokenizer, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint beside its place, rename it into it, and delete all but the newest `keep`."""
    final = run / "checkpoints" / f"step_{step:08d}"
    partial = final.with_name(f".{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    torch.save(state, partial / STATE_FILE)
    shutil.rmtree(final, ignore_errors=True)  # the same step again, after a resume from an older one
    os.replace(partial, final)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`. Tensors are on the CPU.

    Raises:
        ValueError: the file is damaged or holds anything but tensors and plain values.
    """
    try:
        return torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds on a damaged file
        raise ValueError(
            f"{checkpoint / STATE_FILE} cannot be read; delete {checkpoint} to use the one before"
        ) from error
