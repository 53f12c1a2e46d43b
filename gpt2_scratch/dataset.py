"""Token shards on disk, and the way of a batch from there to the device: shuffled sequences, prefetch, shift by one.

A shard has the layout of llm.c (dev/data/data_common.py there): a header of 256 little-endian int32 (magic, version,
number of tokens, zeros), then the ids, uint16 or uint32 depending on the magic.
"""

import hashlib
import json
import os
import re
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2_scratch.cli import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEADER_INTS = 256
# By magic number: version and type of the ids.
FORMATS: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
SHARD_TOKENS = 100_000_000
TOKENIZER_FILE = "tokenizer.json"  # as the tokenizer in meta.json: it is saved beside the shards


class ShardWriter:
    """Writes the tokens of a split, document after document, to `<split>_000000.bin`, `<split>_000001.bin`, ...

    Args:
        vocab_size: determines the width of the ids.
        shard_tokens: tokens of each shard but the last.
        n_tokens: keep this many tokens that the folder holds already, and continue after them.

    Raises:
        UserError: the folder holds fewer.
    """

    def __init__(
        self, directory: Path, split: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS, n_tokens: int = 0
    ):
        self.directory, self.split, self.shard_tokens = directory, split, shard_tokens
        self.magic = 20240520 if vocab_size <= 2**16 else 20240801
        self.dtype = FORMATS[self.magic][1]
        self.n_tokens = n_tokens
        for first in range(0, n_tokens, shard_tokens):
            path, n_needed = self._path(first // shard_tokens), min(shard_tokens, n_tokens - first)
            if not path.is_file() or path.stat().st_size < self._bytes(n_needed):
                raise UserError(f"{path} does not hold the {n_needed} tokens that it should")
        for path in directory.glob(f"{split}_*.bin"):
            if path >= self._path(-(-n_tokens // shard_tokens)):
                path.unlink()
        if n_tokens % shard_tokens:
            os.truncate(self._path(n_tokens // shard_tokens), self._bytes(n_tokens % shard_tokens))

    def add(self, ids: np.ndarray) -> None:
        """Append ids, across shard boundaries where necessary."""
        ids = ids.astype(self.dtype, copy=False)
        while len(ids):
            number, used = divmod(self.n_tokens, self.shard_tokens)
            now, ids = np.split(ids, [self.shard_tokens - used])
            with self._path(number).open("r+b" if used else "wb") as file:
                file.seek(self._bytes(used) if used else 0)
                file.write((b"" if used else bytes(4 * HEADER_INTS)) + now.tobytes())
                if used + len(now) == self.shard_tokens:
                    file.flush()
                    os.fsync(file.fileno())
            self.n_tokens += len(now)

    def cut(self, n_tokens: int) -> np.ndarray:
        """Remove the last tokens and return them."""
        kept, parts = self.n_tokens - n_tokens, []
        while self.n_tokens > kept:
            number = (self.n_tokens - 1) // self.shard_tokens
            begin = max(kept, number * self.shard_tokens)
            offset = self._bytes(begin - number * self.shard_tokens)
            parts.append(np.fromfile(self._path(number), self.dtype, self.n_tokens - begin, offset=offset))
            os.truncate(self._path(number), offset)
            self.n_tokens = begin
            if begin % self.shard_tokens == 0:
                self._path(number).unlink()
        return np.concatenate([*reversed(parts), np.zeros(0, self.dtype)])

    def sync(self) -> None:
        """Flush to disk what was added."""
        if self.n_tokens % self.shard_tokens:
            with self._path(self.n_tokens // self.shard_tokens).open("r+b") as file:
                os.fsync(file.fileno())

    def finish(self) -> list[dict]:
        """Write the headers. Returns each shard's `file`, number of `tokens` and `sha256`, for meta.json."""
        entries = []
        for first in range(0, self.n_tokens, self.shard_tokens):
            path, n_tokens = self._path(first // self.shard_tokens), min(self.shard_tokens, self.n_tokens - first)
            header = np.zeros(HEADER_INTS, dtype="<i4")
            header[:3] = self.magic, FORMATS[self.magic][0], n_tokens
            with path.open("r+b") as file:
                file.write(header.tobytes())
                file.flush()
                os.fsync(file.fileno())
            entries.append({"file": path.name, "tokens": n_tokens, "sha256": file_sha256(path)})
        return entries

    def _path(self, number: int) -> Path:
        return self.directory / f"{self.split}_{number:06d}.bin"

    def _bytes(self, n_tokens: int) -> int:
        return 4 * HEADER_INTS + n_tokens * self.dtype.itemsize


def write_shards(
    directory: Path, split: str, documents: Iterable[np.ndarray], vocab_size: int, shard_tokens: int = SHARD_TOKENS
) -> list[dict]:
    """Write a split's documents, arrays of ids that each begin with `<|endoftext|>`.

    Returns:
        Each shard's `file`, number of `tokens` and `sha256`, for meta.json.
    """
    writer = ShardWriter(directory, split, vocab_size, shard_tokens)
    for ids in documents:
        writer.add(ids)
    return writer.finish()


def read_meta(directory: str | Path) -> dict:
    """The meta.json of a data folder.

    Raises:
        UserError: the folder or the file is missing or is not one of ours.
    """
    path = Path(directory) / "meta.json"
    if not path.is_file():
        raise UserError(f"there is no data at {directory} ({path.name} is missing); make it with prepare_data.py")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        entries = [*meta["shards"]["train"], *meta["shards"]["val"]]
        sound = all(
            [isinstance(meta["tokenizer"], str), type(meta["vocab_size"]) is int]
            + [isinstance(meta.get("vocabulary_sha256", None if meta["tokenizer"] == TOKENIZER_FILE else ""), str)]
            + [re.fullmatch(r"\w[\w.-]*", entry["file"]) is not None for entry in entries]
            + [type(entry["tokens"]) is int and isinstance(entry["sha256"], str) for entry in entries]
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise UserError(f"{path} is not a description of token shards; make the data again with prepare_data.py")
    return meta


def fingerprint(meta: dict) -> str:
    """A hash that is equal for data folders with the same tokens in the same shards."""
    known = {name: meta[name] for name in ("tokenizer", "vocab_size", "shards")}
    if meta["tokenizer"] == TOKENIZER_FILE:
        known["tokenizer"] = meta["vocabulary_sha256"]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_shard(path: Path, tokens: int | None = None, sha256: str | None = None) -> np.ndarray:
    """The ids of a shard, memory-mapped.

    Args:
        tokens: the number there must be, if known.
        sha256: the hash the file must have; None: not checked.

    Raises:
        UserError: the file is missing, truncated, altered or not a token shard.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; make the data again with prepare_data.py")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or FORMATS.get(int(header[0]), (None,))[0] != header[1]:
        raise UserError(f"{path} is not a token shard (its header is not that of llm.c's layout)")
    dtype, n_tokens = FORMATS[int(header[0])][1], int(header[2])
    size = path.stat().st_size
    if size != 4 * HEADER_INTS + n_tokens * dtype.itemsize:
        raise UserError(f"{path} is truncated or too long: {size} bytes, with {n_tokens} tokens in its header")
    if tokens is not None and n_tokens != tokens:
        raise UserError(f"{path} holds {n_tokens} tokens, meta.json says {tokens}; make the data again")
    if sha256 is not None:
        if file_sha256(path) != sha256:
            raise UserError(f"{path} was altered since it was made (its SHA-256 is not that of meta.json)")
    if n_tokens == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=4 * HEADER_INTS, shape=(n_tokens,))


class TokenDataset:
    """The sequences of one split: consecutive stretches of `block_size` tokens and the token after.

    No sequence crosses a shard boundary. The tokens left over at a shard's end, fewer than a sequence, are not trained
    on; `tails` gives them to evaluation.

    Raises:
        UserError: a bad shard, an id outside the vocabulary, or fewer tokens than one sequence.
    """

    def __init__(self, directory: str | Path, split: str, block_size: int, verify: bool = True):
        meta = read_meta(directory)
        self.block_size, self.vocab_size = block_size, meta["vocab_size"]
        self.paths = [Path(directory) / entry["file"] for entry in meta["shards"][split]]
        self.lengths, self.dtypes = [], []
        for path, entry in zip(self.paths, meta["shards"][split]):
            shard = open_shard(path, entry["tokens"], entry["sha256"] if verify else None)
            if verify:
                self._check_ids(path, shard)
            self.lengths.append(len(shard))
            self.dtypes.append(shard.dtype)
        # The number of each shard's first sequence, and at the end the number of sequences.
        counts = [max(0, (length - 1) // block_size) for length in self.lengths]
        self.starts = np.cumsum([0, *counts])
        if len(self) == 0:
            raise UserError(
                f"the {split} split of {directory} has {sum(self.lengths)} tokens, fewer than one sequence of "
                f"block_size + 1 = {block_size + 1}; use a smaller block_size or more text"
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def sequences(self, numbers: np.ndarray) -> np.ndarray:
        """The sequences with these numbers, int64 (len(numbers), block_size + 1)."""
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        begins = (numbers - self.starts[shards]) * self.block_size
        return np.stack([self._read(s, b, self.block_size + 1) for s, b in zip(shards.tolist(), begins.tolist())])

    def tails(self) -> list[np.ndarray]:
        """The tokens after each shard's last whole sequence, unless there is nothing to predict in them."""
        begins = np.diff(self.starts) * self.block_size
        lengths = np.array(self.lengths) - begins
        return [self._read(s, b, n) for s, (b, n) in enumerate(zip(begins.tolist(), lengths.tolist())) if n > 1]

    def _read(self, s: int, begin: int, n_tokens: int) -> np.ndarray:
        # Read, not memory-mapped: mapped pages count as this process's memory, and a map keeps its file open.
        dtype = self.dtypes[s]
        with open(self.paths[s], "rb", buffering=0) as file:
            file.seek(4 * HEADER_INTS + begin * dtype.itemsize)
            ids = np.frombuffer(file.read(n_tokens * dtype.itemsize), dtype).astype(np.int64)
        self._check_ids(self.paths[s], ids)  # CUDA would fail on a bad id without saying where
        if len(ids) < n_tokens:
            raise UserError(f"{self.paths[s]} has become shorter since the start")
        return ids

    def _check_ids(self, path: Path, ids: np.ndarray) -> None:
        if len(ids) and ids.max() >= self.vocab_size:
            raise UserError(f"{path} holds the id {ids.max()}, outside the vocabulary of {self.vocab_size}")


def permute(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """A pseudo-random permutation of range(n), evaluated at these positions in O(1) memory.

    A Feistel network over the smallest even number of bits that can represent n - 1, applied again until the result is
    below n (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 4).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    out = positions.astype(np.uint64)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # round function: a multiplicative hash
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        out[todo] = (left << half) | right
        todo = out >= n
    return out.astype(np.int64)


def training_batches(
    dataset: TokenDataset,
    *,
    seed: int,
    consumed: int,
    sequences_per_step: int,
    batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[np.ndarray]:
    """One rank's micro-batches, endlessly: int64 (batch_size, block_size + 1).

    A run sees numbers `consumed`, `consumed + 1`, ... of an endless stream of shuffled epochs, `sequences_per_step` of
    them a step, of which each rank takes its contiguous share. So the order depends neither on the number of ranks nor
    on `batch_size`, and the integer `consumed` alone says where a run stands.
    """
    share = sequences_per_step // world_size
    while True:
        for first in range(consumed + rank * share, consumed + (rank + 1) * share, batch_size):
            epochs, positions = np.divmod(np.arange(first, first + batch_size), len(dataset))
            numbers = np.empty_like(positions)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                numbers[here] = permute(positions[here], len(dataset), seed, int(epoch))
            yield dataset.sequences(numbers)
        consumed += sequences_per_step


def evaluation_batches(
    dataset: TokenDataset, *, batch_size: int, max_tokens: int, rank: int, world_size: int
) -> Iterator[np.ndarray]:
    """One rank's share of a split, in order, every token predicted once: int64 (batch_size, block_size + 1).

    The last sequence of a shard and the last batch are filled with -1, so that all batches have one shape.

    Args:
        max_tokens: stop after this many tokens, rounded up to whole sequences; 0: the whole split.
    """
    n = len(dataset)
    tails = dataset.tails()
    if max_tokens:
        n, tails = min(n, -(-max_tokens // dataset.block_size)), []
    mine = range(rank, n + len(tails), world_size)
    for i in range(0, len(mine), batch_size):
        numbers = np.array(mine[i : i + batch_size])
        batch = np.full((batch_size, dataset.block_size + 1), -1)
        whole = numbers[numbers < n]
        if len(whole):
            batch[: len(whole)] = dataset.sequences(whole)
        for row, number in enumerate(numbers[len(whole) :], start=len(whole)):
            tail = tails[number - n]
            batch[row, : len(tail)] = tail
        yield batch


def to_device(batches: Iterator[np.ndarray], device: "torch.device") -> Generator[tuple["Tensor", "Tensor"]]:
    """Inputs and targets, int64 (B, T) each, on the device. A thread reads the next batch while this one is in use."""
    import torch  # here: preparing data does without it

    def read() -> "Tensor | None":
        batch = next(batches, None)
        if batch is None:
            return None
        tensor = torch.from_numpy(batch)  # (B, T + 1)
        return tensor.pin_memory() if device.type == "cuda" else tensor  # only pinned memory is copied asynchronously

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        upcoming = pool.submit(read)
        while (batch := upcoming.result()) is not None:
            upcoming = pool.submit(read)
            batch = batch.to(device, non_blocking=True)
            # The shift by one: at each position the target is the token that follows. Filler (-1) is ignored as a
            # target; as an input, where any id will do, it becomes 0.
            yield batch[:, :-1].clamp(min=0), batch[:, 1:]
