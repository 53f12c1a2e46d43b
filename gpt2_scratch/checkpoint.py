"""A run's checkpoints: `out/<run>/checkpoints/step_00002000/`, each a Hugging Face model folder.

A checkpoint is written beside its place, synced to the disk and only then renamed into it. The SHA-256 of each
of its files stands in SHA256SUMS, which `sha256sum -c` reads, so that a damaged one is known and passed over.
"""

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

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.serialization import safe_globals
from tqdm import tqdm

from gpt2_scratch.cli import UserError
from gpt2_scratch.dataset import file_sha256
from gpt2_scratch.tokenizer import Tokenizer
from model import GPT, GPTConfig, ModelError

STATE_FILE = "trainer_state.pt"
SUMS_FILE = "SHA256SUMS"
LOCK_FILE = ".lock"
LAUNCH_FILE = ".launch"
LATEST_FILE = ".latest"
STATE_KEYS = {"progress", "settings", "data", "optimizer", "scaler"}
# Checkpoints written until November 2026 hold numbers as classes of the parser that the settings went through.
PARSER_NUMBERS: list[Any] = [
    *((int, f"jsonargparse.typing.{name}") for name in ("NonNegativeInt", "PositiveInt")),
    *((float, f"jsonargparse.typing.{name}") for name in ("ClosedUnitInterval", "NonNegativeFloat", "PositiveFloat")),
]


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
    advice = f"move {checkpoint} elsewhere to resume from the one before"
    try:
        with safe_globals(PARSER_NUMBERS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds on a damaged file
        raise UserError(f"{path} cannot be read; {advice}") from error
    parts = {"progress": "step", "settings": "seed", "optimizer": "param_groups"}  # and what each holds at least
    if not isinstance(state, dict) or not (
        STATE_KEYS <= state.keys()
        and all(isinstance(state[part], dict) and key in state[part] for part, key in parts.items())
    ):
        raise UserError(f"{path} is not the state of a run; {advice}")
    return state


def check_plain(value: Any, where: str = "state") -> None:
    """Raises TypeError for what a checkpoint could not be loaded with: anything but tensors and plain values."""
    if type(value) is dict:
        for key, item in value.items():
            check_plain(key, f"a key of {where}")
            check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            check_plain(item, f"{where}[{i}]")
    elif type(value) not in (Tensor, bool, int, float, str, type(None)):
        raise TypeError(f"{where} is a {type(value).__qualname__}; checkpoints hold tensors and plain values only")


def lock_run(run: Path) -> FileLock:
    """Take possession of a run's folder, for as long as this process lives or the lock is not released.

    Raises:
        UserError: another process has it.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / LOCK_FILE, is_singleton=True)  # so this process can take it twice
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"another process is training {run}; wait for it, or end it first") from error
    except (NotImplementedError, OSError) as error:
        warn(f"{run} is not locked, since its file system has no locks ({error}); make sure that one process trains it")
    return lock


def holds_run(run: Path) -> bool:
    """Whether a folder holds more than what was noted before a run's first step."""
    return run.is_dir() and any(path.name not in (LOCK_FILE, LAUNCH_FILE) for path in run.iterdir())


def latest_written(run: Path) -> str | None:
    """The name of the checkpoint that was written last, whether or not it is still there."""
    path = run / LATEST_FILE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def begun_by_this_launch(run: Path) -> bool:
    """Whether the torchrun that started this process, perhaps again after a failure, began the run."""
    try:
        return bool(_launch()) and (run / LAUNCH_FILE).read_text() == _launch()
    except (OSError, UnicodeDecodeError):
        return False


def mark_launch(run: Path) -> None:
    """Note that this launch trains the run, for `begun_by_this_launch`."""
    (run / LAUNCH_FILE).write_text(_launch())


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

    A write that the disk refuses is reported and leaves the earlier checkpoints whole; the next `save` tries again.
    The first checkpoint is read back: one that could not be loaded is an error now, not at the resume. Leaving the
    context waits for the write that goes on.

    Args:
        run: the run's folder, locked by this process.
        tokenizer: saved with each checkpoint.
        keep: how many checkpoints to keep, the newest ones.
        newest: the checkpoint that the run continues from.

    Attributes:
        newest: the newest checkpoint written, or that one.
        before: called in the thread before a checkpoint takes its place; what it raises, fails the write.
    """

    def __init__(self, run: Path, tokenizer: Tokenizer, keep: int, newest: Path | None):
        self.folder = run / "checkpoints"
        self.keep, self.newest = keep, newest
        self.before: Callable[[], None] = lambda: None
        self.error: OSError | None = None  # of the newest write, if it failed
        self.read_back = False
        self.host_model: GPT | None = None
        with tempfile.TemporaryDirectory() as directory:  # once: GPT-2's takes a second
            tokenizer.save_pretrained(directory)
            self.tokenizer_files = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
        self.thread = ThreadPoolExecutor(1, "checkpoints", initializer=_yield_to_training)
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

        Raises:
            TypeError: the state holds more than tensors and plain values.
        """
        if self.writing and not self.writing.done():
            if not wait:
                warn(f"no checkpoint of step {step}: that of step {self.writing_step} is still being written")
                return
        self.wait()
        if self.newest and step_of(self.newest) == step:
            return
        check_plain(state)
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
        """Until no write goes on. Raises what the thread did, but for what the disk refused."""
        if self.writing:
            self.writing.result()

    def __exit__(self, *_: Any) -> None:
        self.thread.shutdown()

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
            self.host_model.save_pretrained(partial)
            for name, content in self.tokenizer_files.items():
                (partial / name).write_bytes(content)
            _save_state(state, partial / STATE_FILE)
            if not self.read_back:
                try:
                    load_state(partial)
                except UserError as error:
                    raise RuntimeError(f"the state of step {step} was written, but cannot be loaded again") from error
                self.read_back = True
            files = sorted(partial.iterdir())
            (partial / SUMS_FILE).write_text("".join(f"{file_sha256(path)}  {path.name}\n" for path in files))
            for path in (*files, partial / SUMS_FILE, partial):
                _sync(path)
            self.before()
            shutil.rmtree(final, ignore_errors=True)  # one that was damaged, so that the run began before it
            os.replace(partial, final)
            _sync(self.folder)
            (self.folder.parent / LATEST_FILE).write_text(final.name)
            self.error, self.newest = None, final
        except OSError as error:
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


def _yield_to_training() -> None:
    """Leave the processors to the other threads of this process: what they have no use for is enough to write."""
    torch.set_num_threads(1)  # two sets of OpenMP threads would wait for each other, spinning
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.nice(19)


def _save_state(state: dict[str, Any], path: Path) -> None:
    """torch.save, which reports another trouble after that of the disk: this raises the disk's OSError."""
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


def _on_host(value: Any) -> Any:
    """A copy in host memory of a tensor, or of the tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    return [_on_host(item) for item in value] if isinstance(value, list | tuple) else value


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
