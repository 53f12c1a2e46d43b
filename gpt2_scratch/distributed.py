"""Several processes as one: they meet, agree on what they are about to do, and fail together with one sentence."""

import hashlib
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt2_scratch.cli import MACHINE_ERRORS, UserError
from gpt2_scratch.device import keep_freed_memory, pick_device
from gpt2_scratch.signals import launcher_is_gone

# Errors of Gloo, NCCL and the store when another process is gone or does not answer.
LOST = re.compile(
    r"gloo/transport|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|failed to recv", re.IGNORECASE
)
CHUNK = 2**26  # bytes of a file per broadcast


class SharedError(UserError):
    """A UserError raised by every process and printed by the first one on each node."""

    def __init__(self, message: str):
        super().__init__(message)
        self.silent = place_in_group()[1] > 0


class Peers:
    """Exchange of small values between processes on the host, through torch's key-value store.

    For the time before and after training: it needs no device, and it waits for as long as the others send heartbeats,
    however long their work takes. Collectives, by contrast, give up after `timeout` seconds.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float, launcher: int):
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.launcher = launcher
        self.training = False  # whether there is a run to resume if the others are lost
        self.numbers = itertools.count()
        self.ended = Event()
        self.heart = Thread(target=self._beat, daemon=True)
        self.heart.start()

    def all_gather_object(self, value: Any, error: str | None = None) -> list[Any]:
        """The JSON value of every rank, in order.

        Raises:
            SharedError: a rank passed an `error`, from here or from the block where it failed.
        """
        number = next(self.numbers)
        mine = {"place": place(self.rank), "value": value, "error": error}
        try:
            self.store.set(f"{number}/{self.rank}", json.dumps(mine))
            messages = [json.loads(self._wait(f"{number}/{rank}", rank)) for rank in range(self.world_size)]
        except RuntimeError:
            if not launcher_is_gone(self.launcher):
                raise
            messages = [None] * self.world_size  # the store went with torchrun; the process group is still there
            dist.all_gather_object(messages, mine)
        places: dict[str, list[str]] = {}
        for one in messages:
            if one["error"] is not None:
                places.setdefault(one["error"], []).append(one["place"])
        if places:
            everywhere = len(places) == 1 and len(next(iter(places.values()))) == self.world_size
            sentences = [text if everywhere else f"{text} ({listed(at)})" for text, at in places.items()]
            raise SharedError("; ".join(sentences))
        return [one["value"] for one in messages]

    def end(self) -> None:
        """Leave, as the last call. Rank 0, whose launcher may host the store, leaves after the others."""
        with suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "")
            for rank in range(1, self.world_size if self.rank == 0 else 0):
                self._wait(f"left/{rank}", rank)
        self.ended.set()
        self.heart.join()

    def _wait(self, key: str, rank: int) -> bytes:
        """The value a rank stores under a key; waits as long as that rank sends heartbeats."""
        heard, beats, pause = time.monotonic(), b"", 0.001
        while not self.store.check([key]):
            alive = f"alive/{rank}"
            newest = self.store.get(alive) if self.store.check([alive]) else b""
            if newest != beats:
                heard, beats = time.monotonic(), newest
            elif time.monotonic() - heard > self.timeout:
                raise RuntimeError(f"timed out, no heartbeat from rank {rank}")
            time.sleep(pause)
            pause = min(0.05, 1.5 * pause)
        return self.store.get(key)

    def _beat(self) -> None:
        for beats in itertools.count():
            try:
                self.store.set(f"alive/{self.rank}", str(beats))
            except RuntimeError:
                return  # the store is gone; whoever needs it next will report that
            if self.ended.wait(min(5, self.timeout / 4)):
                return


@dataclass(frozen=True)
class Runtime:
    """One process of the run: its device and rank."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    peers: Peers | None = None
    launcher: int = field(default_factory=os.getppid)  # process id of torchrun, if that started this process

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_gather_object(self, value: Any) -> list[Any]:
        """The JSON value of every rank, in order."""
        return self.peers.all_gather_object(value) if self.peers else [value]

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's JSON value."""
        return self.all_gather_object(value)[0]


def print0(rt: Runtime, text: str) -> None:
    if rt.is_main:
        print(text)


def place(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()}"


def listed(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"])


def place_in_group() -> tuple[int, int, int]:
    """Rank, local rank and world size, from the environment that torchrun or another launcher sets.

    Without WORLD_SIZE, or if it is 1, this is a single process, whatever other variables are left over.

    Raises:
        UserError: the variables are incomplete or contradictory.
    """
    number = {name: os.environ.get(name, "").strip() for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    if number["WORLD_SIZE"] in ("", "1"):
        return 0, 0, 1
    number["LOCAL_RANK"] = number["LOCAL_RANK"] or "0"  # one process a node needs none
    for name, text in number.items():
        whole = text.isascii() and text.isdecimal()
        if not whole or (int(text) == 0 if name == "WORLD_SIZE" else int(text) >= int(number["WORLD_SIZE"])):
            raise UserError(
                f"{name} is {text!r} in the environment, with WORLD_SIZE {number['WORLD_SIZE']}: start several "
                f"processes with torchrun, or unset WORLD_SIZE for one"
            )
    return int(number["RANK"]), int(number["LOCAL_RANK"]), int(number["WORLD_SIZE"])


def recorded(main: Callable[[], None]) -> Callable[[], None]:
    """main, with its exceptions reported to torchrun, whose summary then shows the cause."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(main)


@contextmanager
def process_group(device: str = "auto", timeout: float = 600) -> Iterator[Runtime]:
    """This process's device and rank; under torchrun, inside a process group (NCCL, or Gloo on CPUs).

    Args:
        timeout: seconds after which a collective gives up waiting for the other processes.

    Raises:
        UserError: another process is gone, does not answer, or runs on another device, torch or program version.
    """
    rank, local_rank, world_size = place_in_group()
    rt = Runtime(torch.device("cpu"), rank, local_rank, world_size)
    try:
        if world_size > 1:
            rt = replace(rt, peers=meet(rank, world_size, timeout, rt.launcher))
        with all_ranks_or_none(rt):
            rt = replace(rt, device=pick_device(device, local_rank))
        if rt.device.type == "cuda":
            torch.cuda.set_device(rt.device)
            torch.set_float32_matmul_precision("high")  # TF32 for float32 products outside autocast
        if rt.device.type == "cpu":
            keep_freed_memory()
        if rt.peers:
            same_everywhere(rt, {"device": rt.device.type, "torch": torch.__version__, "program": program_version()})
            backend = "nccl" if rt.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                store=rt.peers.store,
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
                device_id=rt.device if backend == "nccl" else None,  # connect now, and know the device of a barrier
            )
        yield rt
        leave_group(rt)
    except SharedError:
        leave_group(rt)
        raise
    except UserError as error:
        raise UserError(f"{error} ({place(rank)})" if rt.peers else str(error)) from error
    except RuntimeError as error:
        if not rt.peers or not (isinstance(error, dist.DistError) or LOST.search(str(error))):
            raise
        advice = "see what the others said, and start again"
        if rt.peers.training:
            advice = "torchrun --max-restarts=N restarts it from its newest checkpoint, else add --resume"
        raise UserError(f"{place(rank)} lost the others, one ended or hangs ({first_line(error)}); {advice}") from error


def meet(rank: int, world_size: int, timeout: float, launcher: int) -> Peers:
    """Raises UserError: the other processes cannot be reached."""
    try:
        if host := os.environ.get("MASTER_ADDR"):
            socket.getaddrinfo(host, None)  # torch would try to for as long as the timeout, with a C++ stack each time
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=timeout)))
    except (RuntimeError, ValueError, OSError) as error:
        at = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}:{os.environ.get('MASTER_PORT', 'MASTER_PORT')}"
        raise UserError(
            f"{place(rank)} cannot meet the others at {at} ({first_line(error)}); check that address and port, and "
            f"that {world_size} processes are started"
        ) from error
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store across restarts, with the addresses of processes that are gone. With several nodes
        # restart counts may differ; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each restart a new store.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    return Peers(store, rank, world_size, timeout, launcher)


def leave_group(rt: Runtime) -> None:
    """Tear the group down together: its threads can abort an interpreter that is already exiting."""
    if not rt.peers:
        return
    with suppress(SharedError):
        rt.peers.all_gather_object(None)  # closing connections early would break the others' shutdown
    rt.peers.end()
    if dist.is_initialized():
        dist.destroy_process_group()


def first_line(error: Exception) -> str:
    """The first sentence of a library's message, without its source location."""
    lines = re.sub(r"^\[\S*\] ", "", str(error).strip()).splitlines()
    return lines[0].partition(". ")[0].rstrip(".") if lines else type(error).__name__


def program_version() -> str:
    """A hash of this program's source."""
    root = Path(__file__).parent.parent
    sources = sorted([*root.glob("*.py"), *root.glob("gpt2_scratch/**/*.py"), *root.glob("gpt2_scratch/**/*.c")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


@contextmanager
def all_ranks_or_none(rt: Runtime) -> Iterator[None]:
    """Run the block on every rank; if it raises on any, all exit with one message. A bug also keeps its traceback."""
    error, text = None, None
    try:
        yield
    except SharedError:
        raise
    except Exception as caught:
        if not rt.peers:
            raise
        error, text = caught, str(caught)
        if not isinstance(error, UserError) and getattr(error, "errno", None) not in MACHINE_ERRORS:
            text = f"{type(error).__name__}: {first_line(error)}"
    if not rt.peers:
        return
    try:
        rt.peers.all_gather_object(None, text)
    except SharedError as shared:
        if error and text != str(error):
            leave_group(rt)
            raise error from None
        raise shared from None


def same_everywhere(rt: Runtime, facts: dict[str, Any]) -> None:
    """Raises SharedError: the ranks differ in one of these (JSON) facts; the message says who has which value."""
    ranks = rt.all_gather_object([place(rt.rank), facts])
    common = [name for name in ranks[0][1] if all(name in theirs for _, theirs in ranks)]
    names = [name for name in common if any(theirs[name] != facts[name] for _, theirs in ranks)]
    if not names:
        return
    differences = []
    for name in names:
        holders: dict[str, list[str]] = {}
        for where, theirs in ranks:
            holders.setdefault(json.dumps(theirs[name]), []).append(where)
        differences.append(f"{name} is " + " and ".join(f"{value} at {listed(at)}" for value, at in holders.items()))
    raise SharedError(f"the processes do not agree: {'; '.join(differences)}; start all of them with the same")


def all_gather(values: Tensor, rt: Runtime) -> Tensor:
    """The values (n,) of all ranks as (world_size, n), on every device. Does not synchronize with the host."""
    if rt.world_size == 1:
        return values[None]
    ranks = [torch.empty_like(values) for _ in range(rt.world_size)]
    dist.all_gather(ranks, values)
    return torch.stack(ranks)


def weight_checksums(model: nn.Module) -> Tensor:
    """A checksum of each parameter that is not sharded, int64 (n,): the sum of its bits, read as integers."""
    replicated = [p.detach() for p in model.parameters() if not hasattr(p, "to_local")]
    return (
        torch.stack([p.view(torch.int32).sum(dtype=torch.int64) for p in replicated]) if replicated else torch.zeros(0)
    )


def diverged_ranks(model: nn.Module, rt: Runtime) -> list[int]:
    """The ranks whose replica of the model differs from rank 0's, after a bit flip or a step that only some made."""
    if rt.world_size == 1 or not len(checksums := weight_checksums(model)):
        return []
    ranks = all_gather(checksums, rt)  # (world_size, n)
    return (ranks != ranks[0]).any(dim=1).nonzero().flatten().tolist()


def send_files(rt: Runtime, files: list[Path], owner: int, into: Path | None) -> None:
    """Copy files from one rank's node to others, for nodes without a shared file system. A collective.

    Args:
        owner: the rank that has the files.
        into: the folder this process writes them to; None: it writes nothing.
    """
    sizes = rt.all_gather_object([path.stat().st_size for path in files] if rt.rank == owner else None)[owner]
    for path, size in zip(files, sizes):
        with (
            path.open("rb") if rt.rank == owner else nullcontext() as source,
            (into / path.name).open("wb") if into else nullcontext() as sink,
        ):
            for begin in range(0, size, CHUNK):
                part = torch.empty(min(CHUNK, size - begin), dtype=torch.uint8)
                if source:
                    source.readinto(part.numpy().data)
                part = part.to(rt.device)
                dist.broadcast(part, owner)
                if sink:
                    sink.write(part.cpu().numpy().data)
