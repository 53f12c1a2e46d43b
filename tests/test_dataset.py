"""Token shards, and the order in which training and evaluation read them."""

import hashlib
import itertools
import json
import os
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_scratch.cli import UserError
from gpt2_scratch.dataset import (
    ShardWriter,
    TokenDataset,
    evaluation_batches,
    open_shard,
    permute,
    to_device,
    training_batches,
    write_shards,
)

QUICK = settings(max_examples=50)


def llm_c_shard(ids: list[int], wide: bool = False) -> bytes:
    """A shard as llm.c's data_common.py lays it out."""
    magic, version, kind = (20240801, 7, "I") if wide else (20240520, 1, "H")
    return struct.pack("<256i", magic, version, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}{kind}", *ids)


def write_folder(folder: Path, vocab_size: int = 65536, **splits: list[list[int]]) -> Path:
    """A data folder of these shards, written without dataset.py."""
    meta: dict[str, Any] = {"tokenizer": "bytes", "vocab_size": vocab_size, "shards": {}}
    for split in ("train", "val"):
        meta["shards"][split] = []
        for i, ids in enumerate(splits.get(split, [])):
            content, name = llm_c_shard(ids), f"{split}_{i:06d}.bin"
            (folder / name).write_bytes(content)
            entry = {"file": name, "tokens": len(ids), "sha256": hashlib.sha256(content).hexdigest()}
            meta["shards"][split].append(entry)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[int], int], TokenDataset]:
    """A dataset of shards of the given lengths whose ids count on from shard to shard, so that an id is a place."""

    def make(lengths: list[int], block_size: int) -> TokenDataset:
        ends = list(itertools.accumulate(lengths, initial=0))
        shards = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
        return TokenDataset(write_folder(tmp_path_factory.mktemp("data"), train=shards), "train", block_size)

    return make


LENGTHS = st.lists(st.integers(0, 60), max_size=3).flatmap(
    lambda short: st.permutations([*short, 40]).map(list)  # one shard at least holds a window
)
BLOCK_SIZES = st.integers(1, 9)


# Shards on disk


@pytest.mark.parametrize(("wide", "ids"), [(False, [0, 50256, 65535, 7]), (True, [0, 65536, 128_000, 2**32 - 1])])
def test_open_shard_reads_a_shard_of_llm_c(tmp_path: Path, wide: bool, ids: list[int]) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(llm_c_shard(ids, wide))
    assert open_shard(path).tolist() == ids
    assert open_shard(path, tokens=4, sha256=hashlib.sha256(path.read_bytes()).hexdigest()).tolist() == ids


@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=30), max_size=8),
    shard_tokens=st.integers(1, 40),
    vocab_size=st.sampled_from([65536, 65537]),
)
@QUICK
def test_write_shards_writes_the_layout_of_llm_c(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int, vocab_size: int
) -> None:
    """Documents follow each other without a gap and run over the end of a shard."""
    folder = tmp_path_factory.mktemp("data")
    arrays = (np.array(document, dtype=np.int64) for document in documents)
    entries = write_shards(folder, "val", arrays, vocab_size, shard_tokens)
    ids = [i for document in documents for i in document]
    wanted = [llm_c_shard(ids[a : a + shard_tokens], vocab_size > 65536) for a in range(0, len(ids), shard_tokens)]
    assert sorted(path.name for path in folder.iterdir()) == [f"val_{i:06d}.bin" for i in range(len(wanted))]
    assert [(folder / entry["file"]).read_bytes() for entry in entries] == wanted
    assert [entry["sha256"] for entry in entries] == [hashlib.sha256(content).hexdigest() for content in wanted]
    assert [entry["tokens"] for entry in entries] == [
        len(ids[a : a + shard_tokens]) for a in range(0, len(ids), shard_tokens)
    ]


def edit_meta(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    for key, value in changes.items():
        (meta if key in meta else meta["shards"]["val"][0])[key] = value
    (folder / "meta.json").write_text(json.dumps(meta))


def overwrite(position: int, new: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / "val_000000.bin").read_bytes())
        content[position : position + len(new)] = new
        (folder / "val_000000.bin").write_bytes(content)

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / "val_000000.bin").unlink(), "is missing"),
    "a folder": (lambda f: [(f / "val_000000.bin").unlink(), (f / "val_000000.bin").mkdir()], "is missing"),
    "empty": (lambda folder: (folder / "val_000000.bin").write_bytes(b""), "not a token shard"),
    "shorter than a header": (
        lambda f: (f / "val_000000.bin").write_bytes(llm_c_shard([])[:1023]),
        "not a token shard",
    ),
    "text": (lambda folder: (folder / "val_000000.bin").write_bytes(b"To be, or not to be" * 100), "not a token shard"),
    "foreign magic": (overwrite(0, struct.pack("<i", 20240521)), "not a token shard"),
    "foreign version": (overwrite(4, struct.pack("<i", 7)), "not a token shard"),
    "big-endian": (overwrite(0, struct.pack(">3i", 20240520, 1, 40)), "not a token shard"),
    "truncated": (lambda f: (f / "val_000000.bin").write_bytes(llm_c_shard(list(range(40)))[:-1]), "truncated"),
    "too long": (lambda f: (f / "val_000000.bin").write_bytes(llm_c_shard(list(range(40))) + b"\0"), "too long"),
    "negative count": (overwrite(8, struct.pack("<i", -40)), "truncated or too long"),
    "wrong count": (lambda folder: edit_meta(folder, tokens=41), "holds 40 tokens, meta.json says 41"),
    "altered id": (overwrite(1024 + 20, b"\x01"), "altered"),
    "altered padding": (overwrite(1000, b"\x01"), "altered"),
    "outside the vocabulary": (lambda folder: edit_meta(folder, vocab_size=39), "id 39, outside the vocabulary of 39"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_shard_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path, train=[list(range(40))], val=[list(range(40))])
    damage, message = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        TokenDataset(tmp_path, "val", block_size=8)
    assert str(tmp_path / "val_000000.bin") in str(caught.value)


def test_verify_false_reads_the_shards_unchecked(tmp_path: Path) -> None:
    write_folder(tmp_path, val=[list(range(40))])
    overwrite(1024, b"\x05")(tmp_path)
    dataset = TokenDataset(tmp_path, "val", block_size=8, verify=False)
    assert dataset.sequences(np.array([0])).tolist() == [[5, *range(1, 9)]]


@pytest.mark.parametrize(("tokens", "enough"), [(0, False), (1, False), (8, False), (9, True)])
def test_a_split_shorter_than_a_window_is_refused(tmp_path: Path, tokens: int, enough: bool) -> None:
    write_folder(tmp_path, train=[list(range(40))], val=[list(range(tokens))])
    if enough:
        assert len(TokenDataset(tmp_path, "val", block_size=8)) == 1
    else:
        with pytest.raises(ValueError, match=rf"the val split of .* has {tokens} tokens.*block_size \+ 1 = 9"):
            TokenDataset(tmp_path, "val", block_size=8)


def test_a_folder_without_data_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no data at .*nowhere.*prepare_data\.py"):
        TokenDataset(tmp_path / "nowhere", "train", block_size=8)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.sampled_from(["", "..", "/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value: object) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@given(data=st.data())
@settings(max_examples=150)
def test_a_malformed_meta_json_is_a_value_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = write_folder(tmp_path_factory.mktemp("data"), train=[list(range(40))], val=[list(range(20))])
    meta = json.loads((folder / "meta.json").read_text())
    how = data.draw(st.sampled_from(["replace", "delete", "cut", "bytes"]))
    if how in ("replace", "delete"):
        container, key = data.draw(st.sampled_from(places(meta)))
        if how == "replace":
            container[key] = data.draw(JSON)
        else:
            del container[key]
    content = json.dumps(meta).encode()
    if how == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    if how == "bytes":
        at = data.draw(st.integers(0, len(content) - 1))
        content = content[:at] + data.draw(st.binary(max_size=3)) + content[at + 1 :]
    (folder / "meta.json").write_bytes(content)
    try:
        dataset = TokenDataset(folder, "train", block_size=8)
    except ValueError as error:
        assert str(folder) in str(error)
    else:
        assert len(dataset) == 4  # a harmless change


# Windows and their order


@given(lengths=LENGTHS, block_size=BLOCK_SIZES)
@QUICK
def test_windows_share_one_token_with_the_next(
    make: Callable[[list[int], int], TokenDataset], lengths: list[int], block_size: int
) -> None:
    """The target of a window's last token is the first input of the next; no window runs over a shard's end."""
    dataset = make(lengths, block_size)
    wanted, begin = [], 0
    for length in lengths:
        shard = list(range(begin, begin + length))
        begin += length
        at = 0
        while at + block_size < length:
            wanted.append(shard[at : at + block_size + 1])
            at += block_size
    assert len(dataset) == len(wanted)
    assert dataset.sequences(np.arange(len(dataset))).tolist() == wanted
    assert dataset.sequences(np.arange(len(dataset))[::-1]).tolist() == wanted[::-1]


SEEDS = st.integers(0, 2**63)
EPOCHS = st.integers(0, 10**6)


@given(n=st.integers(1, 3000), seed=SEEDS, epoch=EPOCHS)
@QUICK
def test_permute_is_a_bijection_wherever_it_starts(n: int, seed: int, epoch: int) -> None:
    everything = permute(np.arange(n), n, seed, epoch)
    assert sorted(everything.tolist()) == list(range(n))
    middle = np.arange(n // 3, n - n // 3)
    assert permute(middle, n, seed, epoch).tolist() == everything[middle].tolist()


@given(n=st.integers(100, 10**12), seed=SEEDS, epoch=EPOCHS)
@QUICK
def test_permute_differs_between_epochs_and_seeds(n: int, seed: int, epoch: int) -> None:
    first = np.arange(100)
    orders = {tuple(permute(first, n, *at).tolist()) for at in [(seed, epoch), (seed, epoch + 1), (seed + 1, epoch)]}
    assert len(orders) == 3
    assert all(0 <= number < n for order in orders for number in order)


def test_permute_shuffles_well() -> None:
    n = 10_000
    order = permute(np.arange(n), n, seed=1337, epoch=0)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.05  # standard deviation 0.01
    for lag in [2**i for i in range(13)]:  # near or far, windows side by side must not stay so
        assert abs(np.corrcoef(order[lag:], order[:-lag])[0, 1]) < 0.05
    tenths = np.bincount(order[: n // 10] // (n // 10), minlength=10)
    assert tenths.min() > 60 and tenths.max() < 140  # a hundred are expected, give or take ten


def take(dataset: TokenDataset, steps: int, **where: int) -> list[list[list[int]]]:
    """The first steps of one process, each a list of windows."""
    batches = training_batches(dataset, **where)
    micro_steps = where["sequences_per_step"] // where["world_size"] // where["batch_size"]
    taken = []
    for _ in range(steps):
        micro = [next(batches) for _ in range(micro_steps)]
        assert {batch.shape for batch in micro} == {(where["batch_size"], dataset.block_size + 1)}
        taken.append(np.concatenate(micro).tolist())
    return taken


@given(lengths=LENGTHS, block_size=BLOCK_SIZES, seed=SEEDS, sequences_per_step=st.integers(1, 7))
@QUICK
def test_an_epoch_sees_each_window_once(
    make: Callable[[list[int], int], TokenDataset],
    lengths: list[int],
    block_size: int,
    seed: int,
    sequences_per_step: int,
) -> None:
    dataset = make(lengths, block_size)
    n = len(dataset)
    batches = training_batches(
        dataset,
        seed=seed,
        consumed=0,
        sequences_per_step=sequences_per_step,
        batch_size=sequences_per_step,
        rank=0,
        world_size=1,
    )
    seen = [
        tuple(window)
        for batch in itertools.islice(batches, -(-3 * n // sequences_per_step))
        for window in batch.tolist()
    ]
    every = Counter(map(tuple, dataset.sequences(np.arange(n)).tolist()))
    for epoch in range(3):
        assert Counter(seen[epoch * n : (epoch + 1) * n]) == every


def test_epochs_and_seeds_have_orders_of_their_own(make: Callable[[list[int], int], TokenDataset]) -> None:
    dataset = make([401], 4)
    where = {"consumed": 0, "sequences_per_step": 100, "batch_size": 100, "rank": 0, "world_size": 1}
    orders = [*take(dataset, 2, seed=1, **where), *take(dataset, 1, seed=2, **where)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


@given(
    lengths=LENGTHS,
    block_size=BLOCK_SIZES,
    consumed=st.integers(0, 500),
    world_size=st.sampled_from([1, 2, 3, 4]),
    batch_size=st.sampled_from([1, 2, 3]),
    micro_steps=st.sampled_from([1, 2, 3]),
)
@QUICK
def test_the_order_does_not_depend_on_processes_batch_size_or_start(
    make: Callable[[list[int], int], TokenDataset],
    lengths: list[int],
    block_size: int,
    consumed: int,
    world_size: int,
    batch_size: int,
    micro_steps: int,
) -> None:
    dataset = make(lengths, block_size)
    sequences_per_step = world_size * batch_size * micro_steps
    whole = take(
        dataset,
        consumed + 2 * sequences_per_step,
        seed=5,
        consumed=0,
        sequences_per_step=1,
        batch_size=1,
        rank=0,
        world_size=1,
    )
    wanted = [window for step in whole for window in step][consumed:]
    where = {"seed": 5, "consumed": consumed, "sequences_per_step": sequences_per_step, "batch_size": batch_size}
    ranks = [take(dataset, 2, rank=rank, world_size=world_size, **where) for rank in range(world_size)]
    assert [window for step in range(2) for rank in ranks for window in rank[step]] == wanted


# Evaluation


def predicted(dataset: TokenDataset, batch_size: int, max_tokens: int, world_size: int) -> list[int]:
    """The targets of all processes; each must follow its input, and filler must be -1 to the right."""
    targets: list[int] = []
    for rank in range(world_size):
        for batch in evaluation_batches(
            dataset, batch_size=batch_size, max_tokens=max_tokens, rank=rank, world_size=world_size
        ):
            assert batch.shape == (batch_size, dataset.block_size + 1)
            real = batch[:, 1:] >= 0
            assert (batch[:, 1:][~real] == -1).all()
            assert (batch[:, 1:][real] == batch[:, :-1][real] + 1).all()  # ids count on
            targets += batch[:, 1:][real].tolist()
    return targets


@given(lengths=LENGTHS, block_size=BLOCK_SIZES, batch_size=st.integers(1, 5), world_size=st.integers(1, 4))
@QUICK
def test_evaluation_predicts_every_token_once(
    make: Callable[[list[int], int], TokenDataset],
    lengths: list[int],
    block_size: int,
    batch_size: int,
    world_size: int,
) -> None:
    """All but the first of each shard, which follows nothing."""
    dataset = make(lengths, block_size)
    begins = list(itertools.accumulate(lengths, initial=0))
    firsts = {begin for begin, length in zip(begins, lengths) if length}
    wanted = [i for i in range(sum(lengths)) if i not in firsts]
    assert sorted(predicted(dataset, batch_size, 0, world_size)) == wanted


@given(
    lengths=LENGTHS,
    block_size=BLOCK_SIZES,
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
    max_tokens=st.integers(1, 150),
)
@QUICK
def test_evaluation_stops_at_max_tokens_on_the_same_ones(
    make: Callable[[list[int], int], TokenDataset],
    lengths: list[int],
    block_size: int,
    batch_size: int,
    world_size: int,
    max_tokens: int,
) -> None:
    dataset = make(lengths, block_size)
    windows = min(len(dataset), -(-max_tokens // block_size))
    wanted = dataset.sequences(np.arange(windows))[:, 1:].ravel().tolist()
    assert sorted(predicted(dataset, batch_size, max_tokens, world_size)) == wanted


# To the device


def test_to_device_yields_inputs_and_targets() -> None:
    batches = [np.array([[3, 4, 5, 6], [7, 8, -1, -1]]), np.array([[9, 8, 7, 6], [-1, -1, -1, -1]])]
    (inputs, targets), (_, last) = to_device(iter(batches), torch.device("cpu"))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist()[0] == [3, 4, 5] and inputs.tolist()[1][:2] == [7, 8]
    assert inputs.min() >= 0  # filler must be an id that an embedding can look up
    assert targets.tolist() == [[4, 5, 6], [8, -1, -1]]
    assert last.tolist() == [[8, 7, 6], [-1, -1, -1]]


def test_to_device_hands_on_an_error_of_its_thread() -> None:
    def batches() -> Iterator[np.ndarray]:
        yield np.array([[1, 2]])
        raise OSError("the disk is gone")

    coming = to_device(batches(), torch.device("cpu"))
    assert next(coming)[1].tolist() == [[2]]
    with pytest.raises(OSError, match="the disk is gone"):
        next(coming)


def test_to_device_ends_its_thread_when_closed() -> None:
    coming = to_device(itertools.repeat(np.array([[1, 2]])), torch.device("cpu"))
    next(coming)
    assert any(thread.name.startswith("batches") for thread in threading.enumerate())
    coming.close()
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("ids", "expected"), [([0, 1, 2], "has become shorter"), ([0, 1, 2, 999, 4], "holds the id 999")]
)
def test_a_shard_that_changes_under_a_run_is_noticed(tmp_path: Path, ids: list[int], expected: str) -> None:
    folder = write_folder(tmp_path, vocab_size=257, train=[[0, 1, 2, 3, 4]])
    dataset = TokenDataset(folder, "train", 4)
    (folder / "train_000000.bin").write_bytes(llm_c_shard(ids))
    with pytest.raises(UserError, match=expected):
        dataset.sequences(np.array([0]))


def test_shards_are_on_the_disk_before_they_are_called_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []

    def fsync(descriptor: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, os.fstat(descriptor).st_size))
        real(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("open files have no names here")
    real = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)
    writer = ShardWriter(tmp_path, "train", 257, shard_tokens=4)
    writer.add(np.arange(6))
    assert synced == [("train_000000.bin", 1024 + 8)], "a full shard"
    writer.sync()
    assert synced[1:] == [("train_000001.bin", 1024 + 4)]
    writer.finish()
    assert {name for name, _ in synced[2:]} == {"train_000000.bin", "train_000001.bin"}, "with their headers"
