"""What several test files use."""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: the tests need no network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes with two threads each would wait for each other

import numpy as np
import pytest
import torch
from hypothesis import settings

from gpt2_scratch.dataset import write_shards
from gpt2_scratch.tokenizer import load_tokenizer

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell: what tests start inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, so that a red test is red again; HYPOTHESIS_PROFILE=random looks for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

PAGE = 4096  # in which a tmpfs counts
ROOT = Path(__file__).resolve().parent.parent
# The recipe that `python train.py` runs, made small by flags alone: no setting that users have is absent here.
TINY = [str(ROOT / "configs" / "shakespeare.toml"), "--run_name", "tiny", "--device", "cpu", "--dtype", "float32"]
TINY += ["--batch_size", "8"]  # so that 512 tokens are two micro-steps
TINY += ["--n_layer", "2", "--n_head", "2", "--n_embd", "32", "--block_size", "32", "--total_batch_size", "512"]
TINY += ["--max_steps", "12", "--warmup_steps", "2", "--learning_rate", "1e-2", "--log_interval", "1"]
TINY += ["--eval_interval", "6", "--checkpoint_interval", "4", "--keep_checkpoints", "9"]
TINY += ["--sample_interval", "0"]  # a passage takes longer than twelve such steps


# Two workers take a file at a time, so the longest go first, or one would be alone with the last.
LONGEST = ["test_recipes", "test_faults", "test_end_to_end", "test_readme", "test_nodes", "test_prepare_data"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers do not depend on which tests ran before."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with a small corpus of bytes at data/shakespeare."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    return tmp_path


def write_corpus(place: Path) -> None:
    folder = place / "data" / "shakespeare"
    folder.mkdir(parents=True)
    tokenizer = load_tokenizer("bytes")
    rng = np.random.default_rng(0)
    words = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler", "in", "mind"]
    text = {split: " ".join(rng.choice(words, n)) for split, n in (("train", 4000), ("val", 500))}
    shards = {
        split: write_shards(folder, split, [np.array([256, *tokenizer.encode(text[split])])], 257) for split in text
    }
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 257, "shards": shards}))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no command mount")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # lazy: a test that failed may hold files open


def fill(disk: Path, leave: int) -> Path:
    """A file that takes all the room of a disk but `leave` bytes."""
    room = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(b"x" * (room.f_bavail * room.f_frsize - leave))
    return filler
