"""docs/tour.ipynb, executed on a tiny model in a copy of the repository."""

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from conftest import ROOT, write_corpus
from nbclient import NotebookClient
from PIL import Image

from gpt2_scratch.tokenizer import load_tokenizer
from model import GPT, GPTConfig

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after it ran from top to bottom; an error in a cell raises."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("docs", "configs", "gpt2_scratch"):
        shutil.copytree(ROOT / name, clone / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, clone)
    write_corpus(clone)
    checkpoint = clone / "out" / "shakespeare" / "checkpoints" / "step_00000002"
    GPT(GPTConfig(64, 257, n_layer=2, n_head=2, n_embd=32, eos_token_id=256)).save_pretrained(checkpoint)
    load_tokenizer("bytes").save_pretrained(checkpoint)
    (checkpoint / "SHA256SUMS").touch()
    line = {"step": 2, "tokens": 2048, "train_loss": 5.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_sec": 1000}
    (clone / "out" / "shakespeare" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    notebook = nbformat.read(clone / "docs" / "tour.ipynb", as_version=4)
    settings = next(cell for cell in notebook.cells if cell.source.startswith("MODEL ="))
    settings.source, changed = settings.source.replace("STEPS = 300", "STEPS = 4"), settings.source
    assert settings.source != changed
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": clone / "docs"}}).execute()
    return notebook


def pictures(cell: Any) -> list[Image.Image]:
    data = [output.get("data", {}) for output in cell.get("outputs", [])]
    found = [part[kind] for part in data for kind in ("image/png", "image/gif") if kind in part]
    return [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in found]


def check_pictures(notebook: Any) -> None:
    """Every cell that draws shows a picture with content: axes, titles and scales have few coloured pixels."""
    drawing = [cell for cell in notebook.cells if re.search(r"^(show|Picture|tokens_picture)\(", cell.source, re.M)]
    assert len(drawing) == 11
    for cell in drawing:
        least = 0.002 if re.search("plot_(runs|undertrained)", cell.source) else 0.1  # lines and bars; whole areas
        (picture,) = pictures(cell)
        picture.seek(getattr(picture, "n_frames", 1) - 1)
        rgb = np.asarray(picture.convert("RGB"), dtype=int)
        assert (np.ptp(rgb, axis=-1) > 40).mean() > least, cell.source


def test_the_tour_runs_and_its_pictures_have_content(executed: Any) -> None:
    check_pictures(executed)


def test_the_committed_tour_is_small_complete_and_in_order() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert NOTEBOOK.stat().st_size < 1e6
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert str(Path.home()) + "/" not in json.dumps(outputs) and "/tmp/" not in json.dumps(outputs)
    check_pictures(notebook)
