"""A run's checkpoints: `out/<run>/checkpoints/step_00002000/`, each a Hugging Face model folder.

A checkpoint is written beside its place, synced to the disk and only then renamed into it. The SHA-256 of each
of its files stands in SHA256SUMS, which `sha256sum -c` reads, so that a damaged one is known and passed over.
"""

import fcntl
import hashlib
import io
import mmap
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import serialization
from tqdm import tqdm

from cli import UserError
from dataset import file_sha256
from model import GPT, GPTConfig, ModelError
from tokenizer import Tokenizer

STATE_FILE = "trainer_state.pt"
SUMS_FILE = "SHA256SUMS"
LOCK_FILE = ".lock"
STATE_KEYS = {"progress", "settings", "data", "optimizer", "scaler"}


def warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)  # above a progress bar, if there is one


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; `damage` tells whether one is still sound."""
    found = (path for path in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name))
    return sorted((path for path in found if (path / SUMS_FILE).is_file()), key=step_of)


def find_model(name: str | None) -> str | Path:
    """What a script's MODEL stands for: a run's folder for its newest checkpoint, nothing for the newest run's.

    Raises:
        UserError: there is no such checkpoint.
    """
    runs = [Path(name)] if name else list(Path("out").glob("*"))
    if name and not (runs[0] / "checkpoints").is_dir():
        return name  # a model's folder, or its name on the Hugging Face hub
    newest = [paths[-1] for run in runs if (paths := checkpoints(run))]
    if name and not newest:
        raise UserError(f"{name} has no complete checkpoint yet")
    if not newest:
        raise UserError("there is no trained model under out/; run python train.py, or name a model")
    return max(newest, key=lambda path: path.stat().st_mtime)


def load_model(source: str | Path, **options: Any) -> GPT:
    """GPT.from_pretrained(source, **options), for a source that the user named.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return GPT.from_pretrained(source, **options)
    except ModelError as error:
        raise UserError(str(error)) from error


def newest_sound_checkpoint(run: Path, before: int | None = None) -> Path | None:
    """The newest checkpoint whose files are as they were written, with a warning for each that is passed over.

    Args:
        before: the step from which on they do not count.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found = [path for path in checkpoints(run) if before is None or step_of(path) < before]
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            return path
        warn(f"{path} is damaged ({problem}); looking for the one before")
    if found:
        raise UserError(f"every checkpoint of {run} is damaged; begin again with another --run_name")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        lines = (checkpoint / SUMS_FILE).read_text(encoding="utf-8").splitlines()
        listed = {match[2]: match[1] for line in lines if (match := re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line))}
        if len(listed) != len(lines) or not {"config.json", "model.safetensors", STATE_FILE} <= listed.keys():
            return f"{SUMS_FILE} is not a list of its files"
        for name, digest in listed.items():
            if file_sha256(checkpoint / name) != digest:
                return f"the SHA-256 of {name} is not that of {SUMS_FILE}"
    except UnicodeDecodeError:
        return f"{SUMS_FILE} is not a list of its files"
    except OSError as error:
        return str(error)
    return None


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `CheckpointWriter.save` was given as `state`. Tensors are on the CPU.

    Raises:
        UserError: the file is damaged or holds anything but tensors and plain values.
    """
    path = checkpoint / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds on a damaged file
        raise UserError(f"{path} cannot be read; delete {checkpoint} to use the one before") from error
    parts = {"progress": "step", "settings": "seed", "optimizer": "param_groups"}  # and what each holds at least
    if not isinstance(state, dict) or not (
        STATE_KEYS <= state.keys()
        and all(isinstance(state[part], dict) and key in state[part] for part, key in parts.items())
    ):
        raise UserError(f"{path} is not the state of a run; delete {checkpoint} to use the one before")
    return state


def begun_by_this_launch(run: Path) -> bool:
    """Whether the torchrun that started this process, perhaps again after a failure, began the run."""
    try:
        return bool(_launch()) and (run / LOCK_FILE).read_text() == _launch()
    except (OSError, UnicodeDecodeError):
        return False


def _launch() -> str:
    """What tells this torchrun from others; "" without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    # Its name and process number can be the same again, in containers even often; when it began is not.
    status = Path(f"/proc/{os.getppid()}/stat")
    began = status.read_text().rpartition(")")[2].split()[19] if status.exists() else ""
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {os.getppid()} {began}"


class CheckpointWriter(AbstractContextManager):
    """Writes the checkpoints of a run in a thread: training waits for the copy to host memory only, but at its end.

    A write that fails is reported and leaves the earlier checkpoints whole; the next `save` tries again. A run
    has one writer at a time, in all processes; leaving the context waits for the write that goes on.

    Args:
        run: the run's folder.
        tokenizer: saved with each checkpoint.
        keep: how many checkpoints to keep, the newest ones.
        newest: the checkpoint that the run continues from.

    Attributes:
        newest: the newest checkpoint written, or that one.
        before: called in the thread before a checkpoint takes its place; what it raises, fails the write.

    Raises:
        UserError: another process writes the run.
    """

    def __init__(self, run: Path, tokenizer: Tokenizer, keep: int, newest: Path | None):
        self.folder = run / "checkpoints"
        self.keep, self.newest = keep, newest
        self.before: Callable[[], None] = lambda: None
        self.lock = (run / LOCK_FILE).open("a+")  # open files lose their locks when their process ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is training {run}; end that one first") from error
        except OSError:
            pass  # a file system without locks
        self.lock.truncate(0)
        self.lock.write(_launch())
        self.lock.flush()
        self.error: Exception | None = None  # of the newest write, if it failed
        self.host_model: GPT | None = None
        with tempfile.TemporaryDirectory() as directory:  # once: GPT-2's takes a second
            tokenizer.save_pretrained(directory)
            self.tokenizer_files = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
        self.thread = ThreadPoolExecutor(1, "checkpoints", initializer=_stand_back)
        self.writing: Future | None = None
        for partial in self.folder.glob(".step_*"):  # of a process that was killed
            shutil.rmtree(partial)

    def save(
        self, step: int, config: GPTConfig, weights: dict[str, Tensor], state: dict[str, Any], wait: bool = False
    ) -> None:
        """Copy a model and the state beside it, and leave the writing to the thread.

        Args:
            weights: the model's state_dict.
            wait: until this one is written; otherwise it is left out while the one before is being written.
        """
        if self.writing and not self.writing.done():
            if not wait:
                warn(f"no checkpoint of step {step}: that of step {self.writing_step} is still being written")
                return
            self.wait()
        if self.newest and step_of(self.newest) == step:
            return
        if self.host_model is None:
            with torch.device("meta"):
                self.host_model = GPT(config)
            self.host_model.to_empty(device="cpu")
            if config.tie_word_embeddings:
                self.host_model.lm_head.weight = self.host_model.wte.weight
        self.host_model.load_state_dict(weights)
        self.writing_step, state = step, _on_host(state)
        if wait:
            self._write(step, state)  # here, where it has the priority of training
        else:
            self.writing = self.thread.submit(self._write, step, state)

    def wait(self) -> None:
        """Until no write goes on."""
        if self.writing:
            self.writing.result()

    def __exit__(self, *_: Any) -> None:
        self.thread.shutdown()
        self.lock.close()

    def close(self) -> None:
        """Wait for the last write.

        Raises:
            UserError: it failed.
        """
        self.wait()
        if self.error:
            raise UserError(f"the last checkpoint, of step {self.writing_step}, could not be written: {self.error}")

    def _write(self, step: int, state: dict[str, Any]) -> None:
        final = self.folder / f"step_{step:08d}"
        partial = final.with_name(f".{final.name}")
        try:
            partial.mkdir(parents=True)
            sums: dict[str, str] = {}
            self.host_model.save_pretrained(partial, lambda path, mode: UncachedFile(path, sums))
            for name, content in self.tokenizer_files.items():
                (partial / name).write_bytes(content)
            with UncachedFile(partial / STATE_FILE, sums) as file:
                with serialization.config.patch("save.compute_crc32", False):  # half as costly again as the SHA-256
                    torch.save(state, file)
            files = sorted(partial.iterdir())
            lines = [f"{sums.get(path.name) or file_sha256(path)}  {path.name}\n" for path in files]
            (partial / SUMS_FILE).write_text("".join(lines))
            for path in (*files, partial / SUMS_FILE, partial):
                _sync(path)
            self.before()
            shutil.rmtree(final, ignore_errors=True)  # one that was damaged, so that the run began before it
            os.replace(partial, final)
            _sync(self.folder)
            self.error, self.newest = None, final
        except Exception as error:
            while isinstance(error.__context__, Exception):  # torch reports another trouble after that of the disk
                error = error.__context__
            self.error = error
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self.folder.parent).free / 1e6
            warn(
                f"no checkpoint of step {step}: {error} ({free:,.1f} MB are free there); training goes on, the earlier "
                f"checkpoints are whole"
            )
            return
        for old in [path for path in checkpoints(self.folder.parent) if step_of(path) <= step][: -self.keep]:
            doomed = old.with_name(f".{old.name}")
            try:
                os.replace(old, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                warn(f"{old} could not be removed: {error}")


def _stand_back() -> None:
    """Leave the processors to the other threads of this process: what they have no use for is enough to write."""
    torch.set_num_threads(1)  # two sets of OpenMP threads would wait for each other, spinning
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.nice(19)


class UncachedFile(io.RawIOBase):
    """A new file, written past the system's page cache where that can be, and its SHA-256.

    Through the cache gigabytes would push the token shards out of it, and cost more time than to hash them.

    Args:
        sums: gets the file's SHA-256 under its name when it is closed.
        buffer_size: bytes written at once, a multiple of the page size.
    """

    def __init__(self, path: Path, sums: dict[str, str], buffer_size: int = 2**22):
        self.path, self.sums = path, sums
        self.sha256 = hashlib.sha256()
        self.buffer = np.frombuffer(mmap.mmap(-1, buffer_size), np.uint8)  # such writes want whole pages, in memory too
        self.filled = self.size = 0
        self.file = path.open("xb", buffering=0)
        flags = fcntl.fcntl(self.file, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.file, fcntl.F_SETFL, flags | getattr(os, "O_DIRECT", 0))
            self.file.write(self.buffer[: mmap.PAGESIZE])  # some file systems refuse only here
        except OSError:
            fcntl.fcntl(self.file, fcntl.F_SETFL, flags)
        self.file.seek(0)

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:
        rest = whole = np.frombuffer(data, np.uint8)  # numpy lets other threads of Python run while it copies
        while len(rest):
            part = rest[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            rest = rest[len(part) :]
            if self.filled == len(self.buffer):
                self._empty()
        return len(whole)

    def _empty(self) -> None:
        """Write what the buffer holds, up to the end of a page; `close` cuts off what is too much."""
        self.sha256.update(self.buffer[: self.filled])
        rest = self.buffer[: -(-self.filled // mmap.PAGESIZE) * mmap.PAGESIZE]
        self.size, self.filled = self.size + self.filled, 0
        while len(rest):
            rest = rest[self.file.write(rest) :]

    def close(self) -> None:
        if self.closed:
            return
        try:
            self._empty()
            self.file.truncate(self.size)
            self.sums[self.path.name] = self.sha256.hexdigest()
        finally:
            self.file.close()
            super().close()


def _on_host(value: Any) -> Any:
    """A copy in host memory of a tensor, or of the tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return [_on_host(item) for item in value] if isinstance(value, list | tuple) else value


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
