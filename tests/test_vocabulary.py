"""Model, tokenizer and data agree in every script, or it says so."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from test_end_to_end import run_tiny
from test_tokenizer import shaped_like
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import eval
import prepare_data
import sample
import visualize
from gpt2_scratch.checkpoint import checkpoints
from gpt2_scratch.cli import UserError
from gpt2_scratch.dataset import open_shard
from gpt2_scratch.tokenizer import EOT, Tokenizer, load_tokenizer

PROSE = [f"document {i}: the theatre of the world, and all the men in it" for i in range(300)]
RESIZE = "has 338 ids, the model 257; resize its embedding"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a script's command line in this process."""

    def run(script: str, *flags: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        if script == "eval":
            eval.main(eval.parse_args())
        elif script == "sample":
            sample.sample(sample.parse_args())
        elif script == "visualize":
            visualize.visualize(visualize.parse_args())
        else:
            prepare_data.main(prepare_data.parse_arguments())

    return run


def save_model(folder: Path, vocab_size: int, eot: int) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=eot, eos_token_id=eot)).save_pretrained(folder)
    return folder


@pytest.fixture
def reordered(tmp_path: Path) -> Path:
    """A model of bytes whose ids are in another order than those of "bytes"."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator([], trainers.BpeTrainer(vocab_size=257, initial_alphabet=alphabet, special_tokens=[EOT]))
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=EOT).save_pretrained(tmp_path / "reordered")
    return save_model(tmp_path / "reordered", 257, 0)


@pytest.fixture
def not_resized(tmp_path: Path) -> Path:
    """A model of bytes whose tokenizer got 81 tokens for which its embedding has no rows."""
    folder = save_model(tmp_path / "not_resized", 257, 256)
    load_tokenizer("bytes").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{i}|>" for i in range(81)]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def metaspace(tmp_path: Path) -> Path:
    """A model whose tokenizer is not byte-level."""
    theirs = shaped_like("Metaspace", tmp_path / "metaspace")
    return save_model(tmp_path / "metaspace", len(theirs), theirs.eos_token_id)


def test_as_many_ids_in_another_order_are_not_trained_on_or_scored(
    reordered: Path, workplace: Path, run: Callable
) -> None:
    message = f"data/shakespeare and {reordered} have different vocabularies, of 257 and 257 ids"
    with pytest.raises(UserError, match=message):
        run("eval", reordered, "--tasks", "loss", "--data", "data/shakespeare")
    with pytest.raises(UserError, match=message):
        run_tiny("--init_from", str(reordered), "--n_layer", "0", "--n_head", "0", "--n_embd", "0")


def test_data_whose_tokenizer_was_replaced_is_not_trained_on(workplace: Path, run: Callable) -> None:
    Path("mine.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE))
    run("prepare_data", "text", "mine.jsonl", "--train_tokenizer", "300", "--name", "mine")
    run("prepare_data", "text", "mine.jsonl", "--train_tokenizer", "300", "--name", "other", "--val_share", "0.5")
    shutil.copy("data/other/tokenizer.json", "data/mine/tokenizer.json")
    with pytest.raises(UserError, match="the tokenizer of data/mine was replaced"):
        run_tiny("--data", "data/mine")


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_every_script(
    not_resized: Path, tmp_path: Path, run: Callable
) -> None:
    (tmp_path / "text.txt").write_text("some text")
    for command in (
        ["sample", "--model", not_resized, "--prompt", "<|7|>"],
        ["eval", not_resized, "--tasks", "loss", "--data", tmp_path / "text.txt"],
        ["visualize", not_resized, "--out", tmp_path / "figures"],
    ):
        with pytest.raises(UserError, match=RESIZE):
            run(*command)


def test_a_model_without_a_tokenizer_is_said_to_be_taken_on_trust(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = save_model(tmp_path / "bare", 257, 256)
    sizes = ["--n_layer", "0", "--n_head", "0", "--n_embd", "0"]
    run_tiny("--init_from", str(source), *sizes, "--max_steps", "1", "--dropout", "0")
    assert "bare holds no tokenizer" in (err := capsys.readouterr().err)
    assert "its vocabulary is taken to be that of data/shakespeare" in err


def test_text_of_a_tokenizer_that_is_not_byte_level(
    metaspace: Path, tmp_path: Path, run: Callable, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(metaspace)
    flags = ["--model", metaspace, "--max_new_tokens", 30, "--seed", 1, "--dtype", "float32", "--ignore_eot"]
    prompt = "hello world"
    run("sample", *flags, "--prompt", prompt)
    shown = capsys.readouterr().out.removesuffix("\n")
    run("sample", *flags, "--prompt", prompt, "--output", tmp_path / "texts.jsonl", "--logprobs")
    written = json.loads((tmp_path / "texts.jsonl").read_text())
    assert shown == prompt + written["text"] == tokenizer.decode(tokenizer(prompt)["input_ids"] + written["tokens"])
    assert " " in written["text"].strip(), "the seed writes several words"
    run("sample", *flags, "--prompt", prompt, "--stop", " ")
    assert capsys.readouterr().out.removesuffix("\n") == prompt + written["text"].partition(" ")[0]


def test_bits_per_byte_are_of_the_text_not_of_the_vocabularys_spelling(
    metaspace: Path, tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From shards as from the text itself; the shards' own copy of the tokenizer is enough."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("hello world, this is a test " * 40)
    run("prepare_data", "text", "text.txt", "--tokenizer", metaspace, "--name", "mine")
    meta = json.loads(Path("data/mine/meta.json").read_text())
    tokenizer = load_tokenizer("data/mine")
    assert meta["vocabulary_sha256"] == tokenizer.fingerprint() == load_tokenizer(metaspace).fingerprint()
    # No document is held out of one, so the last tokens are: their text is known by decoding.
    held_out = np.concatenate([open_shard(Path("data/mine") / entry["file"]) for entry in meta["shards"]["val"]])
    Path("val.txt").write_text(tokenizer.decode(held_out[1:].tolist()))
    for data in ("data/mine", "val.txt"):
        run("eval", metaspace, "--tasks", "loss", "--data", data, "--output", f"{data[:3]}.json", "--dtype", "float32")
    scores = [json.loads(Path(f"{name}.json").read_text())["scores"]["loss"] for name in ("dat", "val")]
    assert scores[0] == scores[1]
    nats, n_bytes = scores[0]["loss"]["value"] * (len(held_out) - 1), len(Path("val.txt").read_bytes())
    assert scores[0]["bits_per_byte"]["value"] == pytest.approx(nats / n_bytes / torch.tensor(2.0).log().item())


def test_from_text_to_a_model_with_a_vocabulary_of_its_own(
    workplace: Path, run: Callable, capsys: pytest.CaptureFixture
) -> None:
    Path("mine.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE))
    run("prepare_data", "text", "mine.jsonl", "--train_tokenizer", "300")
    assert "trained a vocabulary of 300 ids on" in capsys.readouterr().out
    data = Path("data/text-bpe300")
    meta = json.loads((data / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["tokenizer_sample"]["share"]) == ("tokenizer.json", 300, 1)
    run_tiny("--data", str(data), "--run_name", "own")
    run_tiny("--data", str(data), "--run_name", "own", "--max_steps", "14", "--resume")
    newest = checkpoints(Path("out/own"))[-1]
    assert (newest / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
    assert newest.name == "step_00000014"
    run("eval", newest, "--tasks", "loss", "--data", data)
    capsys.readouterr()
    run("sample", "--model", newest, "--prompt", "document", "--max_new_tokens", 5)
    assert capsys.readouterr().out.startswith("document")


def test_a_trained_tokenizer_is_not_trained_on_what_is_held_out(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("".join(json.dumps({"text": f"{i} {'xyz' * 9}"}) + "\n" for i in range(50)))
    seen: list[str] = []
    original = prepare_data.train_bpe
    monkeypatch.setattr(prepare_data, "train_bpe", lambda texts, n: (seen.extend(texts), original(iter(seen), n))[1])
    run("prepare_data", "text", "mine.jsonl", "--train_tokenizer", "300", "--val_share", "0.4", "--name", "mine")
    meta = json.loads(Path("data/mine/meta.json").read_text())
    tokenizer = load_tokenizer("data/mine")
    held_out = open_shard(Path("data/mine/val_000000.bin")).tolist()
    texts = tokenizer.decode(held_out).split(EOT)[1:]
    assert 5 < len(texts) < 45 and len(seen) + len(texts) == meta["documents"] == 50
    assert not set(seen) & set(texts)


@pytest.mark.parametrize("sample", [10**9, 100])
def test_a_trained_tokenizer_has_seen_the_first_document(
    sample: int, tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It is never held out, whatever its hash, and a single file may be all there is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "TOKENIZER_SAMPLE", sample)
    text = "a rose is a rose is a rose " * 40
    Path("rose.txt").write_text(text)
    run("prepare_data", "text", "rose.txt", "--train_tokenizer", "260", "--val_share", "0.99", "--name", "rose")
    assert f"trained a vocabulary of 260 ids on {len(text):,} characters" in capsys.readouterr().out


def test_a_tokenizer_trained_on_the_plays_has_seen_all_that_are_not_held_out(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []
    original = prepare_data.train_bpe
    monkeypatch.setattr(prepare_data, "train_bpe", lambda texts, n: (seen.extend(texts), original(iter(["a"]), n))[1])
    run("prepare_data", "shakespeare", "--train_tokenizer", "257", "--name", "plays")
    documents = load_tokenizer("data/plays").decode(open_shard(Path("data/plays/train_000000.bin")).tolist())
    assert seen == documents.split(EOT)[1:] and len(seen) == 34


def test_a_text_that_the_tokenizer_cannot_encode_is_named(
    tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The regular expressions of tiktoken overflow their stack on long white space, here without GPT-2's cure."""
    monkeypatch.chdir(tmp_path)
    ranks = {bytes([b]): b for b in range(256)}
    other = tiktoken.Encoding("other", pat_str=r"\S+|\s+(?!\S)|\s", mergeable_ranks=ranks, special_tokens={EOT: 256})
    Path("other").mkdir()
    Tokenizer(other).save_pretrained("other")
    rows = ["fine", "one" + " " * 1_000_000 + "two"]
    Path("mine.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    with pytest.raises(UserError, match=r"mine\.jsonl, line 2: other cannot encode this text"):
        run("prepare_data", "text", "mine.jsonl", "--tokenizer", "other", "--name", "mine")
    run("prepare_data", "text", "mine.jsonl", "--tokenizer", "gpt2", "--name", "mine")


def test_data_that_another_process_made_with_another_vocabulary_is_not_taken(
    reordered: Path, metaspace: Path, tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both vocabularies are from folders, and recorded under one name."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("hello world, this is a test " * 40)
    command = ["prepare_data", "text", "text.txt", "--name", "mine", "--tokenizer"]
    original = prepare_data.FileLock

    class Held(original):
        """Another process holds the lock, and has made the data by the time it gives it up."""

        def acquire(self, timeout: float | None = None, **_: object) -> object:
            if timeout == 0:
                raise prepare_data.Timeout(str(self.lock_file))
            with monkeypatch.context() as patch:
                patch.setattr(prepare_data, "FileLock", original)
                run(*command, metaspace)
            return super().acquire()

    monkeypatch.setattr(prepare_data, "FileLock", Held)
    run(*command, metaspace)  # the same vocabulary: taken as it is
    shutil.rmtree("data/mine")
    with pytest.raises(UserError, match="data/mine already exists"):
        run(*command, reordered)


def test_standard_input_cannot_train_a_tokenizer(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--train_tokenizer reads the text twice"):
        run("prepare_data", "text", "-", "--train_tokenizer", "300")
    with pytest.raises(SystemExit) as ended:
        run("prepare_data", "text", "x.txt", "--train_tokenizer", "256")
    assert ended.value.code == 2
