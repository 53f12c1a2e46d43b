"""Where text comes from: pieces of long documents, files of every format and compression, and what is wrong in them."""

import csv
import gzip
import io
import json
import lzma
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gpt2_scratch import sources
from gpt2_scratch.sources import Piece, files, find_files, pieces, split_name
from gpt2_scratch.tokenizer import Tokenizer, load_tokenizer

ATOMS = ["a", "word", "Zürich", "7", "1984", ".", "!?", "'s", "'ll", " ", "  ", " " * 7, "\n", "\n\n", "\t", "\r\n"]
ATOMS += ["\x1c", "\x85", "\xa0", "\u3000", "é", "e\u0301", "你好", "🙂", "👩\u200d🚀", "<|endoftext|>", "\0"]
texts_of_atoms = st.lists(st.sampled_from(ATOMS) | st.text(max_size=3), max_size=60).map("".join)

TEXTS = [
    'A "quoted", text;\nof two lines',
    "naïve 你好 🙂",
    " spaces around \n\n",
    "<|endoftext|>",
    "a\r\nb",
    "last\\n",
]
ROWS = [".jsonl", ".csv", ".parquet"]
COMPRESSIONS = ["", ".gz", ".zst", ".xz"]


def compressed(content: bytes, compression: str) -> bytes:
    if compression == ".gz":
        return gzip.compress(content)
    if compression == ".xz":
        return lzma.compress(content, preset=0)
    return content


def write(path: Path, content: bytes) -> Path:
    """A file, compressed as its name says."""
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(compressed(content, path.suffix))
    return path


def in_format(kind: str, texts: list[Any], column: str = "text") -> bytes:
    """The rows of a file, beside a column of numbers."""
    if kind == ".jsonl":
        return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()
    if kind == ".csv":
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerows([["id", column], *enumerate(texts)])
        return table.getvalue().encode()
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": range(len(texts)), column: texts}), buffer, row_group_size=2)
    return buffer.getvalue()


def read(path: Path | str, column: str = "text") -> list[str]:
    """The documents of a file, their pieces joined."""
    found: list[str] = []
    for piece in files([str(path)], column):
        if piece.begins:
            found.append("")
        found[-1] += piece.text
    return found


def refused(path: Path | str, column: str = "text") -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(ValueError) as caught:
        read(path, column)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Pieces


@pytest.fixture(scope="module", params=["bytes", "gpt2", "cl100k_base"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    try:
        return load_tokenizer(request.param)
    except ValueError:
        pytest.skip(f"{request.param} cannot be downloaded here")


@settings(max_examples=200)
@given(text=texts_of_atoms, piece_chars=st.integers(5, 50), data=st.data())
def test_pieces_are_the_document_and_their_tokens_those_of_the_whole(
    tokenizer: Tokenizer, text: str, piece_chars: int, data: st.DataObject
) -> None:
    points = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    parts = [text[i:j] for i, j in zip([0, *points], [*points, len(text)])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_CHARS", piece_chars)
        found = list(pieces(parts, 0.5))
    assert "".join(piece.text for piece in found) == text
    assert [piece.begins for piece in found] == [True] + [False] * (len(found) - 1)
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]
    assert all(len(piece.text) <= piece_chars and piece.read == 0.5 for piece in found)
    # Where the cut is not before a space that follows no whitespace, there was no such place. The whole is then made
    # of what lies between such cuts, to compare the tokens of the rest.
    runs = [""]
    for before, after in zip([Piece(""), *found], found):
        if runs[-1] and after.text[0] == " " and not before.text[-1].isspace():
            runs.append("")
        elif runs[-1]:
            assert len(before.text) == piece_chars
            assert not any(b == " " and not a.isspace() for a, b in zip(before.text, before.text[1:]))
        runs[-1] += after.text
    whole = tokenizer.encoding.encode_ordinary(text)
    assert [i for run in runs for i in tokenizer.encode_to_numpy(run).tolist()] == whole
    if len(runs) == len(found):
        assert [i for piece in found for i in tokenizer.encode_to_numpy(piece.text).tolist()] == whole


def test_a_document_without_a_space_is_cut_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_CHARS", 10)
    assert [piece.text for piece in pieces(["x" * 25])] == ["x" * 10, "x" * 10, "x" * 5]
    assert [piece.text for piece in pieces([" " * 25])] == [" " * 10, " " * 10, " " * 5]
    assert [piece.text for piece in pieces(["x" * 10])] == ["x" * 10]
    assert list(pieces([])) == list(pieces([""])) == [Piece("")]


def test_the_documents_of_rows_are_cut_into_pieces_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_CHARS", 10)
    path = write(tmp_path / "a.jsonl", in_format(".jsonl", ["one two three four", "five"]))
    found = [(piece.text, piece.begins, piece.ends) for piece in files([str(path)], "text")]
    assert found == [("one two", True, False), (" three", False, False), (" four", False, True), ("five", True, True)]


# Formats


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", ROWS)
def test_every_format_and_compression_gives_the_same_documents(tmp_path: Path, kind: str, compression: str) -> None:
    path = write(tmp_path / f"mine{kind}{compression}", in_format(kind, TEXTS))
    assert read(path) == TEXTS
    other = write(tmp_path / f"other{kind}{compression}", in_format(kind, TEXTS, "body"))
    assert read(other, "body") == TEXTS


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".txt", ".md", "", ".py"])
def test_a_file_of_plain_text_is_one_document(tmp_path: Path, kind: str, compression: str) -> None:
    text = "\n".join(TEXTS) * 1000
    path = write(tmp_path / f"mine{kind}{compression}", b"\xef\xbb\xbf" + text.encode())
    assert read(path) == [text]  # without the byte order mark, with CRLF
    assert read(write(tmp_path / f"other{kind}{compression}", text.encode())) == [text]


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_a_byte_order_mark_and_crlf_lines_do_no_harm(tmp_path: Path, kind: str) -> None:
    content = in_format(kind, ["one", "two"]).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    assert read(write(tmp_path / f"mine{kind}", b"\xef\xbb\xbf" + content)) == ["one", "two"]
    bom_first = b"\xef\xbb\xbf" + (b"text\r\none\r\n" if kind == ".csv" else b'{"text": "one"}')
    assert read(write(tmp_path / f"first{kind}", bom_first)) == ["one"]


def test_fields_of_csv_hold_line_ends_quotes_and_long_texts(tmp_path: Path) -> None:
    texts = ["a\nb\r\nc\n", 'say ""', ",", "x" * 2_000_000, "\n", "é" * 600_000]
    assert read(write(tmp_path / "mine.csv", in_format(".csv", texts))) == texts
    assert read(write(tmp_path / "open.csv", b"text,id\nno end of line,1")) == ["no end of line"]


def test_blank_lines_of_jsonl_are_passed_over(tmp_path: Path) -> None:
    assert read(write(tmp_path / "mine.jsonl", b'\n{"text": "one"}\n \n\n{"text": "two"}')) == ["one", "two"]


def test_nul_bytes_and_half_surrogate_pairs_are_read(tmp_path: Path) -> None:
    lines = b'{"text": "a\\u0000b"}\n{"text": "c\\ud800d"}\n{"text": "\\ud83d\\ude42"}\n'
    assert read(write(tmp_path / "mine.jsonl", lines)) == ["a\0b", "c\ud800d", "🙂"]
    assert read(write(tmp_path / "mine.txt", b"a\0b")) == ["a\0b"]
    assert read(write(tmp_path / "mine.csv", b"text\na\0b\n")) == ["a\0b"]
    assert read(write(tmp_path / "mine.parquet", in_format(".parquet", ["a\0b"]))) == ["a\0b"]


def test_parquet_columns_of_other_string_types_are_read(tmp_path: Path) -> None:
    for number, kind in enumerate((pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.table({"text": pyarrow.array(["one", "two", "one"]).cast(kind)}), path)
        assert read(path) == ["one", "two", "one"]


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_compressed_files_written_one_after_the_other_are_read_whole(tmp_path: Path, compression: str) -> None:
    """As `cat a.gz b.gz` makes them, and pzstd, pigz and web crawls."""
    parts = [write(tmp_path / f"{i}.txt{compression}", f"part {i}\n".encode() * 1000).read_bytes() for i in range(3)]
    path = tmp_path / f"all.txt{compression}"
    path.write_bytes(b"".join(parts))
    assert read(path) == ["".join(f"part {i}\n" * 1000 for i in range(3))]


def test_the_share_that_is_read_grows_to_one(tmp_path: Path) -> None:
    names = []
    for i, kind in enumerate((".txt", ".jsonl", ".csv", ".parquet", ".jsonl.gz", ".txt.zst")):
        content = b"text" if ".txt" in kind else in_format(kind.removesuffix(".gz"), ["one", "two"])
        names.append(str(write(tmp_path / f"{i}{kind}", content)))
    shares = [piece.read for piece in files(names, "text")]
    assert shares == sorted(shares) and 0 <= shares[0] and 0.9 < shares[-1] <= 1


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\r\nb".encode()), "ascii"))
    assert find_files(["-"]) == ["-"]
    assert read("-") == ["é\r\nb"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xff"), "ascii"))
    assert refused("-") == "standard input, line 2: byte 0xff is not UTF-8; convert the file"


@pytest.mark.skipif(not hasattr(os, "posix_spawn"), reason="needs a shell that closes and opens streams by number")
@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ("<&-", "standard input is closed"),
        ("0>here.txt", "standard input could not be read to its end: .+"),
    ],
)
def test_a_standard_input_that_is_closed_or_cannot_be_read_is_said(tmp_path: Path, stream: str, message: str) -> None:
    script = Path(sources.__file__).parent.parent / "prepare_data.py"
    command = f'exec "{sys.executable}" "{script}" text - --tokenizer bytes {stream}'
    ended = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert re.fullmatch(f"error: {message}", ended.stderr.splitlines()[-1])


# Finding files


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        *(("a.txt", (".txt", "")), ("a.JSONL.GZ", (".jsonl", ".gz")), ("a.b.csv.xz", (".csv", ".xz")), ("a", ("", ""))),
        *(("a.zst", ("", ".zst")), ("a.tar.gz", (".tar", ".gz")), (".txt", ("", ""))),
    ],
)
def test_a_name_says_format_and_compression(name: str, parts: tuple[str, str]) -> None:
    assert split_name(Path(name)) == parts


def test_folders_give_their_files_sorted_at_any_depth_and_each_once(tmp_path: Path) -> None:
    names = ["b.txt", "a.md", "c/z.jsonl.gz", "c/d/e.csv", "c/a.parquet.zst", "x.TXT", "B.txt.xz"]
    for name in [*names, "c/picture.png", "c/data.tar.gz", "notes.txt.bak", "no_format"]:
        write(tmp_path / "in" / name, b"x")
    found = find_files([str(tmp_path / "in")])
    assert found == sorted(found) == sorted(str(tmp_path / "in" / name) for name in names)
    os.symlink(tmp_path / "in" / "b.txt", tmp_path / "in" / "link.txt")
    given = [tmp_path / "in" / "no_format", tmp_path / "in" / "b.txt", tmp_path / "in" / "c", tmp_path / "in"]
    more = find_files([str(path) for path in given] + [str(tmp_path / "in" / "c" / ".." / "b.txt")])
    assert more[:2] == [str(path) for path in given[:2]]
    assert len(more) == len(names) + 1 == len({Path(name).resolve() for name in more})


def test_what_is_not_there_or_holds_no_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^there is no file or folder .*nowhere\.txt$"):
        find_files([str(tmp_path / "nowhere.txt")])
    write(tmp_path / "picture.png", b"x")
    with pytest.raises(ValueError, match=r"^.* has no \.txt, .* files, plain or \.gz, \.zst, \.xz$"):
        find_files([str(tmp_path)])


# What is wrong in a file


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("line", [1, 2, 3, 100_000, 300_000])
def test_invalid_utf8_is_refused_with_its_line_however_far_in(tmp_path: Path, line: int, compression: str) -> None:
    before = "".join(f"{i} é\n" for i in range(1, line))
    path = write(tmp_path / f"mine.txt{compression}", before.encode() + b"caf\xe9 or so\nmore\n")
    assert (line > 100_000) == (len(before.encode()) > 2**20)
    assert refused(path) == f"{path}, line {line}: byte 0xe9 is not UTF-8; convert the file"


@pytest.mark.parametrize("n", [2**20 - 2, 2**20 - 1, 2**20, 2**20 + 1])
def test_a_character_over_the_end_of_what_is_read_at_a_time_is_no_mistake(tmp_path: Path, n: int) -> None:
    text = "\n" * n + "🙂\né"
    assert read(write(tmp_path / "mine.txt", text.encode())) == [text]
    cut = write(tmp_path / "cut.txt", ("\n" * n + "🙂").encode()[:-1])
    assert refused(cut) == f"{cut}, line {n + 1}: byte 0xf0 is not UTF-8; convert the file"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', "not a JSON object in UTF-8 ("),
        (b"not JSON", "not a JSON object in UTF-8 ("),
        (b'{"text": "no end', "not a JSON object in UTF-8 ("),
        (b'{"body": "x"}', "no text in 'text'; choose its field with --text_column"),
        (b'{"text": null}', "no text in 'text'; choose its field with --text_column"),
        (b'{"text": 7}', "no text in 'text'; choose its field with --text_column"),
        (b'["text"]', "no text in 'text'; choose its field with --text_column"),
        (b"null", "no text in 'text'; choose its field with --text_column"),
    ],
)
def test_a_bad_line_of_jsonl_is_refused_with_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    for number, before in ((1, b""), (4, b'{"text": "a"}\n\n{"text": "b"}\n')):
        path = write(tmp_path / "mine.jsonl", before + line + b"\n")
        assert refused(path).startswith(f"{path}, line {number}: {message}")


def test_a_csv_file_without_the_column_or_with_a_bad_row_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", b"id,body\n1,a\n")
    assert refused(path) == f"{path}, line 2: no text in 'text'; choose its column with --text_column"
    path = write(tmp_path / "short.csv", b'id,text\n1,"a\nb"\n2\n')
    assert refused(path) == f"{path}, line 4: no text in 'text'; choose its column with --text_column"
    path = write(tmp_path / "coding.csv", b"id,text\n1,a\n2,caf\xe9\n")
    assert refused(path) == f"{path}, line 3: byte 0xe9 is not UTF-8; convert the file"


def test_a_parquet_file_without_the_column_or_with_nulls_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.parquet", in_format(".parquet", ["a"], "body"))
    assert refused(path) == f"{path} has no column 'text'; choose one with --text_column: id, body"
    path = write(tmp_path / "null.parquet", in_format(".parquet", ["a", "b", None, "c"]))
    assert refused(path) == f"{path}, row 3: no text in 'text'"
    assert refused(path, "id") == f"{path}, row 1: no text in 'id'"


# Several blocks, as it does not compress well.
NOISE = json.dumps({"text": random.Random(0).randbytes(100_000).hex()}).encode() + b"\n"


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_a_truncated_compressed_file_is_refused_by_name(
    tmp_path: Path, kind: str, compression: str, kept: float
) -> None:
    content = NOISE * 3 if kind in (".txt", ".jsonl") else in_format(kind, [NOISE.decode()] * 3)
    path = write(tmp_path / f"mine{kind}{compression}", content)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert str(path) in refused_however(path)


@pytest.mark.parametrize("compression", [".gz", ".xz"])  # .zst files need not hold a sum
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_a_damaged_compressed_file_is_refused_by_name(tmp_path: Path, kind: str, compression: str) -> None:
    content = NOISE * 3 if kind != ".parquet" else in_format(kind, [NOISE.decode()] * 3)
    path = write(tmp_path / f"mine{kind}{compression}", content)
    whole = bytearray(path.read_bytes())
    # At 10 the first block of a .gz file begins. Frames of zstd need have no sum: text within one may be altered.
    for place in (0, 10, len(whole) // 2) if compression != ".zst" else (0,):
        damaged = bytearray(whole)
        damaged[place : place + 200] = b"\xff" * 200
        path.write_bytes(damaged)
        assert str(path) in refused_however(path)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_what_is_not_compressed_as_its_name_says_is_refused_by_name(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"mine.txt{compression}"
    path.write_bytes(b"plain text\n" * 100)
    assert str(path) in refused_however(path)


def refused_however(path: Path) -> str:
    """The sentence of an error that a script ends with, whichever of those that run_script takes."""
    with pytest.raises((ValueError, OSError)) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_truncated_or_damaged_parquet_file_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.parquet", in_format(".parquet", [NOISE.decode() + str(i) for i in range(5)]))
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[:-1], whole[: len(whole) // 2], whole[len(whole) // 2 :], b"text\n" * 100):
        path.write_bytes(content)
        assert str(path) in refused(path)
    path.write_bytes(whole[:1000] + b"\xff" * 2000 + whole[3000:])  # in the data, not in the footer
    assert str(path) in refused_however(path)


def test_an_empty_file_is_an_empty_document_or_none(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", b"")) == [""]
    assert read(write(tmp_path / "a.jsonl", b"")) == read(write(tmp_path / "a.csv", b"")) == []
    assert read(write(tmp_path / "a.parquet", in_format(".parquet", []))) == []


def test_a_dataset_needs_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^datasets is not installed; pip install -r"):
        next(sources.hub("anything", "text"))
