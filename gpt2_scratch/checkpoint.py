"""A run's checkpoints: `out/<run>/checkpoints/step_00002000/`, each a Hugging Face model folder.

A checkpoint is written to a temporary folder, synced to disk, and then renamed into place. SHA256SUMS lists the hash of
every file, for `sha256sum -c` and for resuming, which skips damaged checkpoints.
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
from gpt2_scratch.tokenizer import Tokenizer, load_tokenizer
from model import GPT, GPTConfig, ModelError

STATE_FILE = "trainer_state.pt"
SUMS_FILE = "SHA256SUMS"
LOCK_FILE = ".lock"
LAUNCH_FILE = ".launch"
LATEST_FILE = ".latest"
STATE_KEYS = {"progress", "settings", "data", "optimizer", "scaler"}
# Until November 2026 checkpoints stored numbers as classes of the config parser of that time.
PARSER_NUMBERS: list[Any] = [
    *((int, f"jsonargparse.typing.{name}") for name in ("NonNegativeInt", "PositiveInt")),
    *((float, f"jsonargparse.typing.{name}") for name in ("ClosedUnitInterval", "NonNegativeFloat", "PositiveFloat")),
]


def warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)  # above the progress bar, if there is one


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; `checkpoint_problem` tells whether one is still valid."""
    found = (path for path in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name))
    return sorted((path for path in found if (path / SUMS_FILE).is_file()), key=step_of)


def find_model(name: str | None) -> str | Path:
    """Resolve a script's MODEL: a run's folder becomes its newest checkpoint, None that of the newest run.

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
        raise UserError(
            "there is no trained model under out/; make one with python train.py, which takes minutes on a CPU, or "
            "name one, such as gpt2"
        )
    return max(newest, key=lambda path: path.stat().st_mtime)


def load_model(source: str | Path, **options: Any) -> GPT:
    """GPT.from_pretrained(source, **options) for a source given by the user.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return GPT.from_pretrained(source, **options)
    except ModelError as error:
        raise UserError(str(error)) from error


def load_model_and_tokenizer(source: str | Path, **options: Any) -> tuple[GPT, Tokenizer]:
    """A model, loaded with GPT.from_pretrained's options, and its tokenizer.

    Raises:
        UserError: either cannot be loaded, or the tokenizer has ids that the model lacks.
    """
    model = load_model(source, **options)
    tokenizer = load_tokenizer(source)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {tokenizer.n_vocab:,} ids, the model {model.config.vocab_size:,}; resize "
            f"its embedding (as transformers' resize_token_embeddings does), or remove the tokens that were added"
        )
    return model, tokenizer


def latest_valid_checkpoint(run: Path, before: int | None = None) -> Path | None:
    """The newest checkpoint whose files match their hashes; warns about each that it skips.

    Args:
        before: consider only checkpoints of earlier steps than this.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    found = [path for path in checkpoints(run) if before is None or step_of(path) < before]
    for path in reversed(found):
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        warn(f"{path} is damaged ({problem}); looking for the one before")
    if found:
        raise UserError(f"every checkpoint of {run} is damaged; begin again with another --run_name")
    return None


def checkpoint_problem(checkpoint: Path) -> str | None:
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
    """The `state` that was passed to `CheckpointWriter.save`, tensors on the CPU.

    Raises:
        UserError: the file is damaged or holds anything but tensors and plain values.
    """
    path = checkpoint / STATE_FILE
    advice = f"move {checkpoint} elsewhere to resume from the one before"
    try:
        with safe_globals(PARSER_NUMBERS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path} cannot be read; {advice}") from error
    parts = {"progress": "step", "settings": "seed", "optimizer": "param_groups"}  # and a key each must have
    if not isinstance(state, dict) or not (
        STATE_KEYS <= state.keys()
        and all(isinstance(state[part], dict) and key in state[part] for part, key in parts.items())
    ):
        raise UserError(f"{path} is not the state of a run; {advice}")
    return state


def check_plain(value: Any, where: str = "state") -> None:
    """Raises TypeError for anything but tensors and plain values, which `weights_only` loading would refuse."""
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
    """Lock a run's folder until the lock is released or this process ends.

    Raises:
        UserError: another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / LOCK_FILE, is_singleton=True)  # reentrant within this process
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"another process is training {run}; wait for it, or end it first") from error
    except (NotImplementedError, OSError) as error:
        warn(f"{run} is not locked: its file system has no locks ({error}); make sure that only one process trains it")
    return lock


def holds_run(run: Path) -> bool:
    """Whether a folder holds more than the notes made before a run's first step."""
    return run.is_dir() and any(path.name not in (LOCK_FILE, LAUNCH_FILE) for path in run.iterdir())


def last_written(run: Path) -> str | None:
    """The name of the last checkpoint written, whether or not it still exists."""
    path = run / LATEST_FILE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def started_by_this_launch(run: Path) -> bool:
    """Whether the run was begun by the same torchrun that started this process, perhaps as a restart."""
    try:
        return bool(_launch()) and (run / LAUNCH_FILE).read_text() == _launch()
    except (OSError, UnicodeDecodeError):
        return False


def mark_launch(run: Path) -> None:
    """Record which launch trains the run, for `started_by_this_launch`."""
    (run / LAUNCH_FILE).write_text(_launch())


def _launch() -> str:
    """An identifier of the torchrun above this process; "" without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    # Run id and process id can repeat, in containers even often; the start time does not.
    status = Path(f"/proc/{os.getppid()}/stat")
    began = status.read_text().rpartition(")")[2].split()[19] if status.exists() else ""
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {os.getppid()} {began}"


class CheckpointWriter(AbstractContextManager):
    """Writes a run's checkpoints in a background thread: training waits only for the copy to host memory.

    A failed write (say, a full disk) is reported and leaves earlier checkpoints intact; the next `save` tries again.
    The first checkpoint is read back, so one that could not be loaded is an error now rather than on resume. Leaving
    the context waits for a write in progress.

    Args:
        run: the run's folder, locked by this process.
        tokenizer: saved with each checkpoint.
        keep: how many of the newest checkpoints to keep.
        newest: the checkpoint that the run resumes from.

    Attributes:
        newest: the newest checkpoint written, or the one resumed from.
        before: called in the thread before a checkpoint is renamed into place; an exception fails the write.
    """

    def __init__(self, run: Path, tokenizer: Tokenizer, keep: int, newest: Path | None):
        self.folder = run / "checkpoints"
        self.keep, self.newest = keep, newest
        self.before: Callable[[], None] = lambda: None
        self.error: OSError | None = None  # of the newest write, if it failed
        self.read_back = False
        self.host_model: GPT | None = None
        with tempfile.TemporaryDirectory() as directory:  # once per run: GPT-2's takes a second
            tokenizer.save_pretrained(directory)
            self.tokenizer_files = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
        self.thread = ThreadPoolExecutor(1, "checkpoints", initializer=_yield_to_training)
        self.writing: Future | None = None
        self.writing_step = 0
        for partial in self.folder.glob(".step_*"):  # of a process that was killed
            shutil.rmtree(partial)

    def save(
        self, step: int, config: GPTConfig, weights: dict[str, Tensor], state: dict[str, Any], wait: bool = False
    ) -> None:
        """Copy weights and state to host memory, and write them in the thread.

        Args:
            weights: the model's state_dict.
            wait: until it is written; otherwise it is skipped if the previous one is still being written.

        Raises:
            TypeError: the state holds anything but tensors and plain values.
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
            self._write(step, state)  # in this thread, at normal priority
        else:
            self.writing = self.thread.submit(self._write, step, state)

    def wait(self) -> None:
        """Wait for a write in progress. Raises the thread's exception, unless it was the disk's."""
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
            assert self.host_model is not None  # made by `save`
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
            shutil.rmtree(final, ignore_errors=True)  # a damaged one that this run has gone back behind
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
    """Lowest priority for the writing thread: it makes do with what training leaves idle."""
    torch.set_num_threads(1)  # a second pool of OpenMP threads would spin against the first
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        os.nice(19)


def _save_state(state: dict[str, Any], path: Path) -> None:
    """torch.save, raising the disk's OSError rather than the RuntimeError that torch raises after it."""
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
    """Flush a file or folder to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
