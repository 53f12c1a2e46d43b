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
from gpt2_scratch.device import keep_freed_memory, launcher_is_gone, pick_device

# What Gloo, NCCL and the store say when another process is gone or does not answer.
LOST = re.compile(
    r"gloo/transport|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|failed to recv", re.IGNORECASE
)
CHUNK = 2**26  # bytes of a file that travel at a time


class SharedError(UserError):
    """A UserError that every process raises; the first one of each node prints it."""

    def __init__(self, message: str):
        super().__init__(message)
        self.silent = place_in_group()[1] > 0


class Peers:
    """What the processes of a group tell each other through torch's key-value store, on the host.

    For what comes before and after training: it needs no device, and it waits for as long as the other process lives,
    however long its work takes. Collectives give up after `timeout` seconds.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float, launcher: int):
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.launcher = launcher
        self.training = False  # whether there is something to resume
        self.numbers = itertools.count()
        self.ended = Event()
        self.heart = Thread(target=self._beat, daemon=True)
        self.heart.start()

    def all_gather(self, value: Any, error: str | None = None) -> list[Any]:
        """Every process's value (of JSON), in the order of their ranks.

        Raises:
            SharedError: a process gave an `error` instead, here or where it stood by then.
        """
        number = next(self.numbers)
        mine = {"place": place(self.rank), "value": value, "error": error}
        try:
            self.store.set(f"{number}/{self.rank}", json.dumps(mine))
            told = [json.loads(self._wait(f"{number}/{rank}", rank)) for rank in range(self.world_size)]
        except RuntimeError:
            if not launcher_is_gone(self.launcher):
                raise
            told = [None] * self.world_size  # torchrun kept the store; the processes still have each other
            dist.all_gather_object(told, mine)
        places: dict[str, list[str]] = {}
        for one in told:
            if one["error"] is not None:
                places.setdefault(one["error"], []).append(one["place"])
        if places:
            everywhere = len(places) == 1 and len(next(iter(places.values()))) == self.world_size
            sentences = [text if everywhere else f"{text} ({listed(at)})" for text, at in places.items()]
            raise SharedError("; ".join(sentences))
        return [one["value"] for one in told]

    def end(self) -> None:
        """Every process calls this last. The first one, whose launcher may keep the store, ends after the others."""
        with suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "")
            for rank in range(1, self.world_size if self.rank == 0 else 0):
                self._wait(f"left/{rank}", rank)
        self.ended.set()
        self.heart.join()

    def _wait(self, key: str, rank: int) -> bytes:
        """What the process of a rank puts under a key, for as long as it gives signs of life."""
        heard, beats, pause = time.monotonic(), b"", 0.001
        while not self.store.check([key]):
            alive = f"alive/{rank}"
            newest = self.store.get(alive) if self.store.check([alive]) else b""
            if newest != beats:
                heard, beats = time.monotonic(), newest
            elif time.monotonic() - heard > self.timeout:
                raise RuntimeError(f"timed out, no sign of life from process {rank}")
            time.sleep(pause)
            pause = min(0.05, 1.5 * pause)
        return self.store.get(key)

    def _beat(self) -> None:
        for beats in itertools.count():
            try:
                self.store.set(f"alive/{self.rank}", str(beats))
            except RuntimeError:
                return  # the store has gone; who needs it will say so
            if self.ended.wait(min(5, self.timeout / 4)):
                return


@dataclass(frozen=True)
class Runtime:
    """One process's place in the run."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    peers: Peers | None = None
    launcher: int = field(default_factory=os.getppid)  # the process number of torchrun, where that started this one

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_gather(self, value: Any) -> list[Any]:
        """Every process's value (of JSON)."""
        return self.peers.all_gather(value) if self.peers else [value]


def place(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()}"


def listed(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"])


def place_in_group() -> tuple[int, int, int]:
    """Rank, rank on this node and number of processes, as torchrun or another launcher says in the environment.

    Without WORLD_SIZE, or with 1, this is a process of its own, whatever else a launcher left in the environment.

    Raises:
        UserError: the environment is that of a group, and incomplete or contradictory.
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
    """The same, under torchrun with its exception handed to torchrun, whose summary then names the cause."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(main)


@contextmanager
def process_group(device: str = "auto", timeout: float = 600) -> Iterator[Runtime]:
    """This process's device and place; under torchrun within a process group (NCCL, Gloo on CPU).

    Args:
        timeout: seconds after which a process that waits for the others in training gives up.

    Raises:
        UserError: another process is gone, does not answer, or has another device, torch or program.
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
            limit = timedelta(seconds=timeout)
            dist.init_process_group(backend, store=rt.peers.store, rank=rank, world_size=world_size, timeout=limit)
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
    """Raises UserError: the others are not to be found."""
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
        # torchrun keeps its store over a restart, and with it the addresses of processes that are gone. On
        # several nodes the count may differ; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 renews the store.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    return Peers(store, rank, world_size, timeout, launcher)


def leave_group(rt: Runtime) -> None:
    """Every process calls this at its end. What a group still runs then can abort a Python that ends."""
    if not rt.peers:
        return
    with suppress(SharedError):
        rt.peers.all_gather(None)  # one that closes its connections early would break the others' ending
    rt.peers.end()
    if dist.is_initialized():
        dist.destroy_process_group()


def first_line(error: Exception) -> str:
    """The first sentence of what a library says, without its marks of place."""
    lines = re.sub(r"^\[\S*\] ", "", str(error).strip()).splitlines()
    return lines[0].partition(". ")[0].rstrip(".") if lines else type(error).__name__


def program_version() -> str:
    """A sum over this program's source."""
    root = Path(__file__).parent.parent
    sources = sorted([*root.glob("*.py"), *root.glob("gpt2_scratch/**/*.py"), *root.glob("gpt2_scratch/**/*.c")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


@contextmanager
def all_ranks_or_none(rt: Runtime) -> Iterator[None]:
    """Run a block on every rank; if it raises on any, all exit with one sentence. A bug keeps its traceback as well."""
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
        rt.peers.all_gather(None, text)
    except SharedError as shared:
        if error and text != str(error):
            leave_group(rt)
            raise error from None
        raise shared from None


def same_everywhere(rt: Runtime, facts: dict[str, Any]) -> None:
    """Raises SharedError: the processes differ in one of these facts (of JSON); it says who has what."""
    told = rt.all_gather([place(rt.rank), facts])
    common = [name for name in told[0][1] if all(name in theirs for _, theirs in told)]
    names = [name for name in common if any(theirs[name] != facts[name] for _, theirs in told)]
    if not names:
        return
    differences = []
    for name in names:
        holders: dict[str, list[str]] = {}
        for where, theirs in told:
            holders.setdefault(json.dumps(theirs[name]), []).append(where)
        differences.append(f"{name} is " + " and ".join(f"{value} at {listed(at)}" for value, at in holders.items()))
    raise SharedError(f"the processes do not agree: {'; '.join(differences)}; start all of them with the same")


def from_main(rt: Runtime, value: Any) -> Any:
    """The first process's value (of JSON), in every process."""
    return rt.all_gather(value)[0]


def gather(values: Tensor, rt: Runtime) -> Tensor:
    """The values (n,) of all processes, (world_size, n), on every device. The host does not wait."""
    if rt.world_size == 1:
        return values[None]
    gathered = [torch.empty_like(values) for _ in range(rt.world_size)]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)


def weight_sums(model: nn.Module) -> Tensor:
    """A checksum of each parameter that every process has whole, int64 (n,): the sum of its bits as integers."""
    whole = [p.detach() for p in model.parameters() if not hasattr(p, "to_local")]
    return torch.stack([p.view(torch.int32).sum(dtype=torch.int64) for p in whole]) if whole else torch.zeros(0)


def drifted(model: nn.Module, rt: Runtime) -> list[int]:
    """The ranks whose copy of the model is another than that of rank 0: bit flips, or a step that only some made."""
    if rt.world_size == 1 or not len(sums := weight_sums(model)):
        return []
    everyones = gather(sums, rt)  # (world_size, n)
    return (everyones != everyones[0]).any(dim=1).nonzero().flatten().tolist()


def send_files(rt: Runtime, files: list[Path], owner: int, into: Path | None) -> None:
    """Copy files of one rank's node to others', for nodes without a common file system. Every process calls.

    Args:
        owner: the rank that has the files.
        into: the folder to copy to in this process; None: nothing is kept here.
    """
    sizes = rt.all_gather([path.stat().st_size for path in files] if rt.rank == owner else None)[owner]
    for path, size in zip(files, sizes):
        with (
            path.open("rb") if rt.rank == owner else nullcontext() as source,
            (into / path.name).open("wb") if into else nullcontext() as sink,
        ):
            for begin in range(0, size, CHUNK):
                part = torch.empty(min(CHUNK, size - begin), dtype=torch.uint8)
                if source:
                    source.readinto(part.numpy())
                part = part.to(rt.device)
                dist.broadcast(part, owner)
                if sink:
                    sink.write(part.cpu().numpy())
