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
import threading
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
ROWS = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"]
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
    if kind in (".jsonl", ".ndjson"):
        return "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()
    if kind == ".json":
        return json.dumps([{"id": i, column: text} for i, text in enumerate(texts)], indent=2).encode()
    if kind in (".csv", ".tsv"):
        table = io.StringIO(newline="")
        writer = csv.writer(table, delimiter="," if kind == ".csv" else "\t")
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


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_and_crlf_lines_do_no_harm(tmp_path: Path, kind: str) -> None:
    content = in_format(kind, ["one", "two"]).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    assert read(write(tmp_path / f"mine{kind}", b"\xef\xbb\xbf" + content)) == ["one", "two"]
    first = {".csv": b"text\r\none\r\n", ".jsonl": b'{"text": "one"}', ".json": b'["one"]'}[kind]
    bom_first = b"\xef\xbb\xbf" + first
    assert read(write(tmp_path / f"first{kind}", bom_first)) == ["one"]


def test_fields_of_csv_hold_line_ends_quotes_and_long_texts(tmp_path: Path) -> None:
    texts = ["a\nb\r\nc\n", 'say ""', ",", "x" * 2_000_000, "\n", "é" * 600_000]
    assert read(write(tmp_path / "mine.csv", in_format(".csv", texts))) == texts
    assert read(write(tmp_path / "open.csv", b"text,id\nno end of line,1")) == ["no end of line"]


def test_blank_lines_of_jsonl_are_passed_over(tmp_path: Path) -> None:
    assert read(write(tmp_path / "mine.jsonl", b'\n{"text": "one"}\n \n\n{"text": "two"}')) == ["one", "two"]


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_lone_surrogates_become_replacement_characters(tmp_path: Path, kind: str) -> None:
    rows = [
        b'{"text": "half \\ud800"}',
        b'{"text": "\\ud83d\\ude42 \\uDE42!"}',
        b'{"text": "\\\\ud800", "\\udc00": ["\\udc00"]}',
    ]
    path = write(tmp_path / f"mine{kind}", b"\n".join(rows) if kind == ".jsonl" else b"[" + b",".join(rows) + b"]")
    assert read(path) == ["half \ufffd", "🙂 \ufffd!", "\\ud800"]
    assert sources.read_rows(path)[2] == {"text": "\\ud800", "\ufffd": ["\ufffd"]}


def test_nul_bytes_are_read(tmp_path: Path) -> None:
    assert read(write(tmp_path / "mine.jsonl", b'{"text": "a\\u0000b"}\n')) == ["a\0b"]
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
        (b'{"text": 7}', "no text in 'text'; choose one with --text_column: text"),
        (b'{"text": {"x": "y"}, "id": 1}', "no text in 'text'; choose one with --text_column: text, id"),
        (b'["text"]', 'not a JSON object but ["text"]'),
        (b"null", "not a JSON object but null"),
        (b"[" * 100_000, "not a JSON object in UTF-8 ("),
    ],
)
def test_a_bad_line_of_jsonl_is_refused_with_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    for number, before in ((1, b""), (4, b'{"text": "a"}\n\n{"text": "b"}\n')):
        path = write(tmp_path / "mine.jsonl", before + line + b"\n")
        assert refused(path).startswith(f"{path}, line {number}: {message}")


def test_a_csv_file_without_the_column_or_with_a_bad_row_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", b"id,body\n1,a\n")
    assert refused(path) == f"{path}, line 2: no text in 'text'; choose one with --text_column: id, body"
    path = write(tmp_path / "long.csv", b'id,text\n1,"a\nb"\n2,Well, then\n')
    assert refused(path) == (
        f"{path}, line 4: 3 fields under 2 columns; put quotes around fields that hold a delimiter"
    )
    path = write(tmp_path / "twice.csv", b"text,text\na,b\n")
    assert refused(path) == f"{path}: more than one column is named 'text'; rename the others"
    assert read(write(tmp_path / "ends.csv", b"id,text\n1,a,\n2,b,,\n")) == ["a", "b"]
    path = write(tmp_path / "coding.csv", b"id,text\n1,a\n2,caf\xe9\n")
    assert refused(path) == f"{path}, line 3: byte 0xe9 is not UTF-8; convert the file"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('id,text\n1,a\n2,"no end\n3,c\n4,d\n', 3),
        ('id,text\n1,a\n2,"no end\n3,"c"\n4,d\n', 3),
        ('id,text\n1,a\n\n2,"no end\n3,c, "d"\n', 4),
        ('text,id\n"a\n\nb","no end\nc,1\n', 4),
        ('text,id\n"a ""x"", b\n""c"", d","no end\nc,1\n', 3),
        ('text,id,more\n"a\nb","c\nd",5\n"e\n"f\n', 5),
        ('"text,id\na,1\n', 1),
        ('text,id\na,1\n"', 3),
    ],
)
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_quote_that_is_never_closed_is_refused_with_its_line(
    tmp_path: Path, content: str, line: int, delimiter: str
) -> None:
    kind = ".csv" if delimiter == "," else ".tsv"
    path = write(tmp_path / f"mine{kind}", content.replace(",", delimiter).encode())
    message = refused(path)
    assert message.startswith(f"{path}, line {line}: ") and "is a quote that opens here never closed?" in message


def test_a_quote_that_is_never_closed_does_not_take_the_rest_of_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_FIELD", 10_000)
    path = write(tmp_path / "mine.csv", b'text\na\n"b\n' + b"word word\n" * 10_000)
    assert refused(path).startswith(f"{path}, line 3: field larger than field limit (10000)")


@pytest.mark.parametrize("kind", ROWS)
def test_null_and_missing_texts_are_empty_documents(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"mine{kind}", in_format(kind, ["a", None, "", "b"]))
    assert read(path) == ["a", "", "", "b"]
    first = write(tmp_path / f"first{kind}", in_format(kind, [None, "a"]))
    assert read(first) == ["", "a"]


def test_a_field_that_some_rows_lack_is_empty_there(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", b'{"text": "a"}\n{"id": 1}\n{}\n{"text": "b"}\n')
    assert read(path) == ["a", "", "", "b"]
    assert read(write(tmp_path / "mine.csv", b"id,text\n1\n2,b\n3\n")) == ["", "b", ""]
    path = write(tmp_path / "none.jsonl", b'\n{"id": 1, "body": "x"}\n{"text": "b"}\n')
    assert refused(path) == f"{path}, line 2: no text in 'text'; choose one with --text_column: id, body"
    # Each file anew: one without the column would be left out whole.
    with pytest.raises(ValueError, match=r"none\.jsonl, line 2: no text"):
        list(files([str(tmp_path / "mine.jsonl"), str(path)], "text"))


def test_json_holds_an_array_of_rows_or_of_texts_or_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [
        b' [ {"text": "one"} ,\n {"text": "[two, ]", "more": [{"text": "x"}, {}]}\n,{"text":"three"}]\n ',
        b'["one", "[two, ]", "three"]',
        b'{"text": "one"}\n{"text": "[two, ]"}\n{"text": "three"}\n',
    ]
    for content in contents:
        assert read(write(tmp_path / "mine.json", content)) == ["one", "[two, ]", "three"]
        assert read(write(tmp_path / "mine.json.gz", content)) == ["one", "[two, ]", "three"]
    for content in (b"[]", b" [ ] ", b""):
        assert read(write(tmp_path / "mine.json", content)) == []
    texts = [f"{i} é\n" * (i % 7 * 1000) for i in range(300)] + ["x" * 5_000_000, "end"]
    assert read(write(tmp_path / "large.json", in_format(".json", texts))) == texts
    lines = write(tmp_path / "other.json", b'["one", "two"]')
    assert read(lines, "body") == ["one", "two"]
    monkeypatch.setattr(sources, "MAX_FIELD", 10**6)
    open_end = write(tmp_path / "open.json", b'["' + b"x" * 5_000_000)
    assert refused(open_end) == f"{open_end}, row 1: not a JSON object, or not all of it"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n  "text": "a"\n}\n', ", line 1: not a JSON object in UTF-8 (Expecting property name"),
        (b'{"data": [{"text": "a"}]}', ", line 1: no text in 'text'; choose one with --text_column: data"),
        (b"[1, 2]", ", row 1: not a JSON object but 1"),
        (b'[{"text": "a"}, ["b"]]', ', row 2: not a JSON object but ["b"]'),
        (b'[{"text": "a"}, {"text": "b"', ", row 2: not a JSON object, or not all of it"),
        (b'[{"text": "a"}', ", row 2: not a JSON object, or not all of it"),
        (b'[{"text": "a"} nonsense]', ", row 2: not a JSON object, or not all of it"),
        (b'[{"text": "a"}]\n[{"text": "b"}]', ": more follows its array of rows; give one object a line instead"),
        (b'"text"', ', line 1: not a JSON object but "text"'),
        (b'[{"text": "a"},\n{"text": "caf\xe9"}]', ", line 2: byte 0xe9 is not UTF-8; convert the file"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path / "mine.json", content)
    assert refused(path).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "is packed as .tar") for name in ("a.tar", "a.tar.gz", "a.TAR.zst", "a.tar.xz")),
        *((f"a{kind}", f"is packed as {kind}; unpack it") for kind in (".tgz", ".zip", ".7z", ".bz2", ".rar")),
        *((f"a{kind}", f"is not plain text but {kind}; conv") for kind in (".pdf", ".docx", ".epub", ".html", ".rtf")),
    ],
)
def test_formats_that_are_not_read_are_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    path = write(tmp_path / name, b"text")
    readers = [sources.read_text, sources.read_rows, lambda path: list(sources.documents(path))]
    for reader in [*readers, lambda path: find_files([str(write(tmp_path / "b.txt", b"text")), str(path)])]:
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path} {message}')}"):
            reader(path)


@pytest.mark.parametrize("name", ["README", "thesis.tex", "code.py", "notes.2024", "packed.gz"])
def test_a_name_that_says_nothing_is_plain_text_unless_a_nul_byte_says_otherwise(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "naïve\r\ntext".encode())
    assert find_files([str(path)]) == [str(path)] and read(path) == ["naïve\r\ntext"]
    binary = write(tmp_path / name, b"a\n" * 600_000 + b"b\nc\0d\n")
    assert refused(binary) == (f"{binary}, line 600002: a NUL byte, so this is not plain text; convert the file")


def test_every_reader_of_text_reads_alike(tmp_path: Path) -> None:
    text = "one\r\ntwo\rthree\n\u2028four\x85"
    for name in ("a.txt", "a.txt.gz", "a.md.zst", "a.xz", "a"):
        path = write(tmp_path / name, b"\xef\xbb\xbf" + text.encode())
        assert sources.read_text(path) == text and list(sources.documents(path)) == read(path) == [text]
        bad = write(tmp_path / name, b"one\n\xe9")
        with pytest.raises(ValueError, match=f"^{re.escape(str(bad))}, line 2: byte 0xe9 is not UTF-8; convert the"):
            sources.read_text(bad)
    rows = write(tmp_path / "rows.jsonl.gz", in_format(".jsonl", ["one", None, "two"]))
    assert list(sources.documents(rows)) == ["one", "", "two"]
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz has rows; give a file of plain text"):
        sources.read_text(rows)
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"^there is no file "):
            sources.read_text(place)


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_read_whole(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"mine{kind}.gz", in_format(kind, ["a\u2028b", "c"]))
    ids = ["0", "1"] if kind in (".csv", ".tsv") else [0, 1]
    assert sources.read_rows(path) == [{"id": ids[0], "text": "a\u2028b"}, {"id": ids[1], "text": "c"}]


def test_pieces_say_where_they_are_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_CHARS", 10)
    found = {}
    for kind in (".txt", *ROWS):
        content = b"one two three" if kind == ".txt" else in_format(kind, ["one\nand two", "b"])
        path = write(tmp_path / f"mine{kind}", content)
        found[kind] = [piece.where.removeprefix(str(tmp_path / "mine")) for piece in files([str(path)], "text")]
    assert found.pop(".txt") == [".txt", ".txt"]
    assert found.pop(".csv") == [".csv, line 2"] * 2 + [".csv, line 4"]
    assert found.pop(".tsv") == [".tsv, line 2"] * 2 + [".tsv, line 4"]
    for kind, where in found.items():
        unit = "line" if kind in (".jsonl", ".ndjson") else "row"
        assert where == [f"{kind}, {unit} 1"] * 2 + [f"{kind}, {unit} 2"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a")))
    assert [piece.where for piece in files(["-"], "text")] == ["standard input"]
    assert {piece.where for piece in sources.plays()} >= {"hamlet.md", "the-tempest.md"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["", ".txt", *ROWS, ".txt.gz", ".jsonl.zst", ".parquet.xz"])
def test_pipes_are_read_as_files_are(tmp_path: Path, kind: str) -> None:
    base = kind.removesuffix(".gz").removesuffix(".zst").removesuffix(".xz")
    content = b"\xef\xbb\xbfone\r\n" if base in ("", ".txt") else in_format(base, ["one", "two"])
    whole = write(tmp_path / f"file{kind}", content)
    other = write(tmp_path / "other.txt", b"other")
    pipe = tmp_path / f"pipe{kind}"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(whole.read_bytes()), daemon=True)
    writer.start()
    assert sources.is_stream(str(pipe)) and not sources.is_stream(str(whole)) and not sources.is_stream(str(tmp_path))
    found = list(files(find_files([str(other), str(pipe)]), "text"))
    writer.join()
    assert [piece.text for piece in found[1:]] == read(whole)
    assert [piece.read for piece in found] == [1.0] * len(found)


def test_what_folders_hold_in_other_formats_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("a.txt", "b/c.txt", "x.pdf", "y.PDF", "b/z.pdf", "1.docx", "b/t.tar.gz", "README", ".hidden", "d/f"):
        write(tmp_path / "in" / name, b"x")
    os.symlink(tmp_path / "in" / "nowhere", tmp_path / "in" / "dead.txt")
    os.symlink(tmp_path / "in" / "b", tmp_path / "in" / "linked.dir")
    found = find_files([str(tmp_path / "in"), str(tmp_path / "in" / "README")])
    assert [Path(name).name for name in found] == ["a.txt", "c.txt", "README"]
    assert capsys.readouterr().err == (
        "left out: 3 .pdf, 2 without suffix, 1 .dir, 1 .docx, 1 .tar.gz, 1 .txt (unsupported formats)\n"
    )
    find_files([str(tmp_path / "in" / "d" / ".." / "a.txt"), str(tmp_path / "in" / "b" / "c.txt")])
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x")
    write(tmp_path / "closed" / "b.txt", b"x")
    (tmp_path / "closed").chmod(0)
    with pytest.raises(PermissionError, match="closed"):
        find_files([str(tmp_path)])
    (tmp_path / "closed").chmod(0o700)


def test_a_parquet_file_without_the_column_or_of_other_values_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.parquet", in_format(".parquet", ["a"], "body"))
    assert refused(path) == f"{path} has no column 'text'; choose one with --text_column: id, body"
    assert refused(path, "id") == f"{path}, row 1: no text in 'id'; choose one with --text_column: id, body"


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
