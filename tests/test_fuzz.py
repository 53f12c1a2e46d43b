"""Random and mutated bytes in place of each file that a run reads: a clear error or the right run, never another."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import model as model_module
import train as train_module
from gpt2_scratch.checkpoint import (
    STATE_FILE,
    STATE_KEYS,
    SUMS_FILE,
    CheckpointWriter,
    checkpoint_problem,
    checkpoints,
    load_state,
)
from gpt2_scratch.config import TrainConfig, parse_config
from gpt2_scratch.dataset import TokenDataset, open_shard, write_shards
from gpt2_scratch.distributed import Runtime
from gpt2_scratch.metrics import MetricsLog
from gpt2_scratch.optim import learning_rate_at
from gpt2_scratch.state import TrainState, load_train_state
from gpt2_scratch.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from train import train

# Hypothesis must neither time the examples (other work shares the cores) nor mind that some draws are large.
FUZZ = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
SECONDS = 90  # for a whole test; the slowest takes a tenth of that

CONFIG = """
run_name = "fuzz"
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
batch_size = 4
total_batch_size = 64
max_steps = 6
learning_rate = 1e-2
warmup_steps = 1
dropout = 0.1
eval_interval = 3
eval_tokens = 64
checkpoint_interval = 2
keep_checkpoints = 9
log_interval = 1
device = "cpu"
dtype = "float32"
compile = false
"""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """End a test that hangs. Its error is no Exception, so that no code under test takes it for one of its own."""

    def give_up(*_: Any) -> None:
        pytest.fail(f"no end within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def no_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    """End a test that begins to build a network without end, before it takes the machine's memory."""
    build = model_module.Block

    def limited(config: GPTConfig, layer: int) -> torch.nn.Module:
        if layer >= 1000:
            pytest.fail(f"builds {config.n_layer} layers, on the word of a file or flag alone")
        return build(config, layer)

    monkeypatch.setattr(model_module, "Block", limited)


# Mutations

# In place of a value of JSON or TOML: other types, numbers beyond every limit, text that no path and no UTF-8 can hold.
LITERALS = [
    *(b"null", b"true", b"0", b"1", b"-1", b"1.5", b"1e400", b"-1e400", b"NaN", b"nan", b"inf", b"9" * 7, b"9" * 400),
    *(b'""', b'"."', b'"a"', b'"a\\nb"', b'"a\\u0000b"', b'"\\ud800"', b'"\xff"', b'"\xe2\x80\xa8"', b'"../x"'),
    *(b'"/etc/passwd"', b'"%s"' % (b"a" * 5000), b"[]", b"{}", b"[1]", b'{"a": 1, "a": 2}', b"{a = 1}", b"1979-05-27"),
    *(b"%d" % 2**62, b"9" * 19, b"9" * 5000, b""),
    *(b"[" * 400 + b"]" * 400, b"[" * 100_000, b'{"a":' * 20_000, b"{a=" * 20_000),
]
VALUES = [rb'"[^"\n]*"', rb"[-+.\w]+", rb"\[[^\[\]\n]*\]", rb"\{[^{}\n]*\}", rb"\[[^\n]*\]", rb"\{[^\n]*\}", rb"[^\n]+"]
PAIR = rb'(?m)("\w+"|^\w+)( = |: )("[^"\n]*"|[-+.\w]+)'


@st.composite
def mutations(draw: st.DrawFn, content: bytes, text: bool = False) -> bytes:
    """Random bytes, or the content damaged in one or two places; `text`: as JSON and TOML in particular are."""
    kinds = ["cut", "flip", "insert", "delete", "repeat", "zero", "swap"]
    kinds += ["literal", "literal", "key twice", "recode"] if text else []
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=2000))
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        end = min(len(content), at + draw(st.integers(1, 8) | st.integers(1, max(1, len(content)))))
        before, slice_, after = content[:at], content[at:end], content[end:]
        match draw(st.sampled_from(kinds)):
            case "cut":
                content = before
            case "flip" if content:
                flipped = bytearray(content)
                for bit in draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=4)):
                    flipped[bit // 8] ^= 1 << bit % 8
                content = bytes(flipped)
            case "insert":
                content = before + draw(st.binary(min_size=1, max_size=20)) + slice_ + after
            case "delete":
                content = before + after
            case "repeat":
                content = before + slice_ * draw(st.integers(2, 3)) + after
            case "zero":
                content = before + bytes(len(slice_)) + after
            case "swap":
                content = before + after[: len(slice_)] + slice_ + after[len(slice_) :]
            case "literal":
                spans = [match.span() for value in VALUES for match in re.finditer(value, content)]
                begin, end = draw(st.sampled_from(spans or [(0, 0)]))
                content = content[:begin] + draw(st.sampled_from(LITERALS)) + content[end:]
            case "key twice":
                if pairs := list(re.finditer(PAIR, content)):
                    pair = draw(st.sampled_from(pairs))
                    separator = b", " if pair[2] == b": " else b"\n"
                    again = separator + pair[1] + pair[2] + draw(st.sampled_from(LITERALS))
                    content = content[: pair.end()] + again + content[pair.end() :]
            case "recode":
                encoding = draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-32-be"]))
                content = content.decode("utf-8", errors="replace").encode(encoding)
    return content


def replacements(content: bytes) -> Iterator[bytes]:
    """The content with each value after a key replaced by each of the literals."""
    for pair in re.finditer(PAIR, content):
        for literal in LITERALS:
            signal.alarm(10)  # for each one: see no_hang
            yield content[: pair.start(3)] + literal + content[pair.end(3) :]


def assert_clear(error: Exception, *named: object) -> None:
    """The text is what follows "error: " on the terminal: one line, which names what is wrong."""
    text = str(error)
    assert text.strip() and "\n" not in text
    assert not named or any(str(name) in text for name in named), text


# Shards

VOCAB_SIZES = {20240520: 257, 20240801: 70_000}  # by the magic that their shards have
FORMATS = {(20240520, 1): "H", (20240801, 7): "I"}


@functools.cache
def shard(magic: int, tokens: int = 100) -> bytes:
    (version, kind), vocab_size = next((v, k) for (m, v), k in FORMATS.items() if m == magic), VOCAB_SIZES[magic]
    ids = np.random.default_rng(0).integers(vocab_size, size=tokens).tolist()
    return struct.pack("<256i", magic, version, tokens, *[0] * 253) + struct.pack(f"<{tokens}{kind}", *ids)


def write_data(folder: Path, content: bytes, vocab_size: int, tokens: int, sha256: str) -> Path:
    """A data folder of one shard; returns the shard's path."""
    path = folder / "train_000000.bin"
    path.unlink(missing_ok=True)  # what is mapped by an earlier example stays as it was
    path.write_bytes(content)
    entry = {"file": path.name, "tokens": tokens, "sha256": sha256}
    meta = {"tokenizer": "bytes", "vocab_size": vocab_size, "shards": {"train": [entry], "val": []}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the examples of a test, one after the other."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("magic", VOCAB_SIZES)
@given(data=st.data())
@settings(FUZZ, max_examples=80)
def test_a_mutated_shard_is_refused_by_name_where_shards_are_verified(
    folder: Path, magic: int, data: st.DataObject
) -> None:
    content = shard(magic)
    mutated = data.draw(mutations(content))
    digest = hashlib.sha256(content).hexdigest()
    path = write_data(folder, mutated, VOCAB_SIZES[magic], 100, digest)
    for read in (lambda: open_shard(path, 100, digest), lambda: TokenDataset(folder, "train", 8, verify=True)):
        try:
            read()
        except (ValueError, OSError) as error:
            assert_clear(error, path)
        else:
            assert mutated == content


@pytest.mark.parametrize("magic", VOCAB_SIZES)
@given(data=st.data())
@settings(FUZZ, max_examples=120)
def test_no_id_outside_the_vocabulary_is_handed_out_of_an_unverified_shard(
    folder: Path, magic: int, data: st.DataObject
) -> None:
    content = shard(magic)
    mutated = data.draw(mutations(content) | mutations(content[1024:]).map(lambda ids: content[:1024] + ids))
    path = write_data(folder, mutated, VOCAB_SIZES[magic], 100, "")
    try:
        dataset = TokenDataset(folder, "train", 8, verify=False)
        handed_out = [*dataset.sequences(np.arange(len(dataset))), *dataset.tails()]
    except (ValueError, OSError) as error:
        assert_clear(error, path)
    else:
        assert len(mutated) == len(content)
        assert all(0 <= ids.min() and ids.max() < VOCAB_SIZES[magic] for ids in handed_out)


@st.composite
def odd_shards(draw: st.DrawFn) -> tuple[bytes, int]:
    """A shard whose header is odd, and the count in it; often its size is the one that the header asks for."""
    magic = draw(st.sampled_from([*VOCAB_SIZES, 20240521, 0, -1]))
    version = draw(st.sampled_from([1, 7, 0, -1, 2**31 - 1]))
    count = draw(st.sampled_from([0, 1, 8, 9, 20, -1, -20, -512, -1024, 2**31 - 1, -(2**31)]))
    order = draw(st.sampled_from("<<<>"))
    width = draw(st.sampled_from([2, 4]))
    size = draw(st.sampled_from([count * width, abs(count) * width, 0, 1, 40, 41]).filter(lambda n: 0 <= n < 5000))
    ids = draw(st.binary(min_size=size, max_size=size) | st.just(bytes(size)))
    return struct.pack(f"{order}3i1012x", magic, version, count) + ids, count


@pytest.mark.parametrize("verify", [True, False])
@given(case=odd_shards())
@settings(FUZZ, max_examples=150)
@example(case=(struct.pack("<3i1012x", 20240520, 1, 0), 0))
@example(case=(struct.pack("<3i1012x", 20240520, 1, 1) + b"\0\0", 1))
@example(case=(struct.pack("<3i1012x", 20240801, 7, 9) + bytes(36), 9))
@example(case=(struct.pack("<3i1012x", 20240520, 7, 20) + bytes(40), 20))
@example(case=(struct.pack(">3i1012x", 20240520, 1, 20) + bytes(40), 20))
@example(case=(struct.pack("<3i1012x", 20240520, 1, -512), -512))
def test_an_odd_header_is_refused_even_with_the_right_sum_or_read_as_it_says(
    folder: Path, verify: bool, case: tuple[bytes, int]
) -> None:
    content, count = case
    path = write_data(folder, content, 70_000, count, hashlib.sha256(content).hexdigest())
    kind = FORMATS.get(struct.unpack_from("<2i", content))
    try:
        dataset = TokenDataset(folder, "train", 8, verify=verify)
        windows = dataset.sequences(np.arange(len(dataset)))
    except (ValueError, OSError) as error:
        assert_clear(error, path, f"the train split of {folder} has {count} tokens")
    else:
        assert kind and count >= 9 and len(content) == 1024 + count * struct.calcsize(kind)
        ids = struct.unpack_from(f"<{count}{kind}", content, 1024)
        assert windows.tolist() == [list(ids[8 * i : 8 * i + 9]) for i in range((count - 1) // 8)]
        assert windows.max() < 70_000


# meta.json


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in, with data of bytes at data/ and a config at fuzz.toml."""
    place = tmp_path_factory.mktemp("corpus")
    (place / "data").mkdir()
    ids = np.random.default_rng(0).integers(32, 127, size=900)
    shards = {
        "train": write_shards(place / "data", "train", [ids[:700]], 257, shard_tokens=400),
        "val": write_shards(place / "data", "val", [ids[700:]], 257),
    }
    meta = {"tokenizer": "bytes", "vocab_size": 257, "shards": shards}
    (place / "data" / "meta.json").write_text(json.dumps(meta))
    (place / "fuzz.toml").write_text(CONFIG + f"data = {json.dumps(str(place / 'data'))}\n")
    return place


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Of a run on a copy of the corpus, whose meta.json is there to be damaged."""
    copy = shutil.copytree(corpus / "data", tmp_path_factory.mktemp("copy") / "data")
    return parse_config([str(corpus / "fuzz.toml"), "--data", str(copy)])


def load_with(meta: bytes, config: TrainConfig) -> TrainState:
    (Path(config.data) / "meta.json").write_bytes(meta)
    return load_train_state(config, Path("out/fuzz"), None, Runtime(torch.device("cpu")))


def assert_clear_or_the_same_shards(mutated: bytes, corpus: Path, config: TrainConfig) -> None:
    try:
        state = load_with(mutated, config)
    except (ValueError, OSError) as error:
        assert_clear(error)
    else:
        assert state.tokenizer.n_vocab == state.model.config.vocab_size == 257
        for split, dataset in (("train", state.train_data), ("val", state.val_data)):
            own = [path.read_bytes()[1024:] for path in (corpus / "data").glob(f"{split}_*.bin")]
            assert dataset.vocab_size == 257
            assert all(path.read_bytes()[1024:] in own for path in dataset.paths)


@given(data=st.data())
@settings(FUZZ, max_examples=100)
def test_a_mutated_meta_json_is_a_clear_error_or_describes_the_same_shards(
    corpus: Path, config: TrainConfig, data: st.DataObject
) -> None:
    mutated = data.draw(mutations((corpus / "data" / "meta.json").read_bytes(), text=True))
    assert_clear_or_the_same_shards(mutated, corpus, config)


def test_no_value_in_meta_json_goes_unchecked(corpus: Path, config: TrainConfig) -> None:
    for mutated in replacements((corpus / "data" / "meta.json").read_bytes()):
        assert_clear_or_the_same_shards(mutated, corpus, config)


@pytest.mark.parametrize("vocab_size", [256, 258, 0, 1, -1, -257, 50257, 2**16, 2**31, 2**64, 10**400])
def test_a_changed_vocab_size_is_refused(corpus: Path, config: TrainConfig, vocab_size: int) -> None:
    meta = json.loads((corpus / "data" / "meta.json").read_text())
    with pytest.raises(ValueError, match="vocab_size") as caught:
        load_with(json.dumps(meta | {"vocab_size": vocab_size}).encode(), config)
    assert_clear(caught.value, config.data)


@pytest.mark.parametrize(
    "name",
    ["../x.bin", "{outside}/x.bin", "inner/x.bin", "./x.bin", "x.bin/", "x.bin/.", "..", ".", "", "/", "x.bin\0"],
)
def test_no_file_outside_the_data_folder_is_taken_for_a_shard(tmp_path: Path, name: str) -> None:
    """Each name leads to a sound shard of the right sum, or to a folder."""
    content = shard(20240520)
    inner = tmp_path / "data" / "inner"
    inner.mkdir(parents=True)
    write_data(inner.parent, content, 257, 100, hashlib.sha256(content).hexdigest())
    for place in (tmp_path, inner.parent, inner):
        (place / "x.bin").write_bytes(content)
    meta = json.loads((inner.parent / "meta.json").read_text())
    meta["shards"]["train"][0]["file"] = name.replace("{outside}", str(tmp_path))
    (inner.parent / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError) as caught:
        TokenDataset(inner.parent, "train", 8)
    assert_clear(caught.value, inner.parent)


# metrics.jsonl


@functools.cache
def metrics_lines() -> bytes:
    figures = [{"step": step, "tokens": 64 * step, "train_loss": 5.5 - step / 9, "lr": 1e-3} for step in range(1, 13)]
    figures[5:5] = [{"step": 5, "tokens": 320, "val_loss": 5.1}]
    return b"".join(json.dumps(line).encode() + b"\n" for line in figures)


@given(mutated=mutations(metrics_lines(), text=True), step=st.integers(0, 13))
@settings(FUZZ, max_examples=100)
@example(mutated=metrics_lines() * 2, step=12)
@example(mutated=b'{"step": 1}\n{"step": 3}\n{"step": 2}\n', step=12)
@example(mutated=b'{"step": 1}\n{"step": true}\n', step=12)
@example(mutated=b'{"step": 1}\n{"step": -1}\n', step=12)
@example(mutated=b'{"step": 1}\r{"step": 2}\n', step=12)
@example(mutated=b'{"step": 1}\n\n\n', step=12)
@example(mutated=b'{"step": 1, "step": 99}\n{"step": 99, "step": 1}\n', step=12)
def test_mutated_metrics_are_refused_as_they_are_or_cut_to_lines_in_order(
    folder: Path, mutated: bytes, step: int
) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(mutated)
    try:
        log = MetricsLog(folder, {}, step)
    except (ValueError, OSError) as error:
        assert_clear(error, path)
        assert path.read_bytes() == mutated
        return
    log.close()
    kept = path.read_bytes()
    assert mutated.startswith(kept) and kept[-1:] in (b"", b"\n")
    # In UTF-8 like the lines that are to follow, and so not what json.loads takes bytes for by itself.
    lines = [json.loads(line) for line in kept.decode().split("\n")[:-1]]
    steps = [line["step"] for line in lines]
    assert all(type(number) is int and number <= step for number in steps)
    assert steps == sorted(steps)


# Configs and flags


def assert_config_or_sentence(argv: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            config = parse_config(argv)
    except SystemExit as ended:
        assert ended.code == 2
        assert re.fullmatch(r"error: [^\n]+\n", err.getvalue()) and "Traceback" not in err.getvalue(), err.getvalue()
    else:
        assert type(config) is TrainConfig and err.getvalue() == ""
        # What the checks of each setting promise to the rest of the program.
        assert config == TrainConfig(**json.loads(json.dumps(config.plain())))
    assert re.fullmatch(r"(warmup_steps \d+ is longer than [^\n]+\n)?", out.getvalue())


@given(mutated=mutations(CONFIG.encode(), text=True))
@settings(FUZZ, max_examples=50)
@example(mutated=b"learning_rate = " + b"9" * 400)
@example(mutated=b"seed = " + b"[" * 400)
@example(mutated=b"seed = " + b"{a=" * 1000)
@example(mutated=b"seed" + b".a" * 400 + b" = 1")
@example(mutated=b"[" + b"a." * 400 + b"a]\nb = 1")
@example(mutated=b"seed" + b".a" * 2_000 + b" = 1")
@example(mutated=b"seed = 0x" + b"f" * 20_000)
def test_a_mutated_config_gives_settings_or_one_sentence(folder: Path, mutated: bytes) -> None:
    path = folder / "fuzz.toml"
    path.write_bytes(mutated)
    assert_config_or_sentence([str(path)])


@pytest.mark.parametrize("number", [2**53, 2**63, 10**25, 10**400], ids=["2**53", "2**63", "10**25", "10**400"])
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainConfig) if type(f.default) is int])
def test_an_absurd_number_is_a_clear_error_or_can_be_used(corpus: Path, no_flood: None, name: str, number: int) -> None:
    signal.alarm(10)
    out = io.StringIO()
    try:
        with contextlib.redirect_stderr(out):
            cfg = parse_config([str(corpus / "fuzz.toml"), f"--{name}", str(number)])
        state = load_train_state(cfg, Path("out/fuzz"), None, Runtime(torch.device("cpu")))
        names = ("schedule", "max_steps", "warmup_steps", "learning_rate", "min_learning_rate")
        learning_rate_at(1, **{name: getattr(cfg, name) for name in names})
    except SystemExit as ended:
        assert ended.code == 2 and re.fullmatch(r"error: [^\n]+\n", out.getvalue())
        assert name in out.getvalue()
    except (ValueError, OSError) as error:
        assert_clear(error, {"eval_hellaswag": "hellaswag"}.get(name, name))
    else:
        assert state.model.num_params() > 0


ARGUMENT = st.text(st.characters(exclude_characters="\0"), max_size=12) | st.sampled_from(
    [literal.decode(errors="surrogateescape") for literal in LITERALS]  # as the interpreter decodes arguments
)
NAME = st.sampled_from([field.name for field in dataclasses.fields(TrainConfig)]) | ARGUMENT
ARGUMENTS = st.lists(
    st.one_of(
        st.tuples(NAME, ARGUMENT).map(lambda pair: [f"--{pair[0]}", pair[1]]),
        st.tuples(NAME, ARGUMENT).map(lambda pair: [f"--{pair[0]}={pair[1]}"]),
        NAME.map(lambda name: [f"--{name}"]),
        ARGUMENT.map(lambda argument: [argument]),
    ),
    max_size=4,
).map(lambda parts: [argument for part in parts for argument in part])


@given(arguments=ARGUMENTS, after_a_file=st.booleans())
@settings(FUZZ, max_examples=100)
@example(arguments=["x" * 5000], after_a_file=False)
@example(arguments=["--learning_rate", "9" * 400], after_a_file=False)
@example(arguments=["--seed", "9" * 5000], after_a_file=True)
@example(arguments=["--resume", "--"], after_a_file=True)
@example(arguments=["--data.x", "1"], after_a_file=True)
def test_random_arguments_give_settings_or_one_sentence(corpus: Path, arguments: list[str], after_a_file: bool) -> None:
    assume(not any(argument.startswith(("-h", "--help")) for argument in arguments))
    assert_config_or_sentence([str(corpus / "fuzz.toml"), *arguments] if after_a_file else arguments)


# Checkpoints


@pytest.fixture(scope="module")
def finished(corpus: Path) -> Iterator[Path]:
    """The corpus with a whole run in out/fuzz: checkpoints of the steps 2, 4 and 6, the last."""
    patch = pytest.MonkeyPatch()
    patch.setattr(train_module, "write_passage", lambda *_: None)  # it would take most of the time
    save = CheckpointWriter.save
    patch.setattr(CheckpointWriter, "save", lambda *where, wait: save(*where, wait=True))  # leave none out
    patch.chdir(corpus)
    train(parse_config(["fuzz.toml"]))
    assert [path.name[-1] for path in checkpoints(Path("out/fuzz"))] == ["2", "4", "6"]
    yield corpus
    patch.undo()


@pytest.fixture(scope="module")
def newest(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a checkpoint, to damage and mend."""
    return Path(shutil.copytree(finished / "out/fuzz/checkpoints/step_00000004", tmp_path_factory.mktemp("run") / "c"))


FILES = [
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *(STATE_FILE, SUMS_FILE),
]


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """The file with another content for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


@given(data=st.data(), name=st.sampled_from(FILES))
@settings(FUZZ, max_examples=150)
def test_damage_to_any_file_of_a_checkpoint_is_found(newest: Path, data: st.DataObject, name: str) -> None:
    content = (newest / name).read_bytes()
    mutated = data.draw(mutations(content))
    assert sorted(FILES) == sorted(path.name for path in newest.iterdir()) and checkpoint_problem(newest) is None
    with replaced(newest / name, mutated):
        problem = checkpoint_problem(newest)
    if problem is not None:
        assert_clear(ValueError(problem), name, SUMS_FILE, *[newest] * (name == SUMS_FILE))
    elif name == SUMS_FILE:  # fewer sums, or the same ones in another order
        assert set(mutated.splitlines()) <= set(content.splitlines())
    else:
        assert mutated == content


@contextlib.contextmanager
def copied_run(finished: Path, damaged: dict[str, bytes]) -> Iterator[Path]:
    """The run as it was at step 4, but for these files of its folder."""
    copy = finished / "copy"
    shutil.copytree(finished / "out" / "fuzz", copy / "out" / "fuzz")
    shutil.rmtree(copy / "out" / "fuzz" / "checkpoints" / "step_00000006")
    for name, content in damaged.items():
        (copy / "out" / "fuzz" / name).write_bytes(content)
    try:
        with contextlib.chdir(copy):
            yield Path("out/fuzz")
    finally:
        shutil.rmtree(copy)


def resume() -> str:
    """Train on to the end; returns what was said on stderr."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        train(parse_config(["../fuzz.toml", "--resume"]))
    return err.getvalue()


WEIGHTS = "checkpoints/step_00000006/model.safetensors"


@given(data=st.data(), name=st.sampled_from(FILES))
@settings(FUZZ, max_examples=8)
def test_a_resumed_run_passes_over_a_damaged_checkpoint_and_ends_the_same(
    finished: Path, data: st.DataObject, name: str
) -> None:
    file = f"checkpoints/step_00000004/{name}"
    mutated = data.draw(mutations((finished / "out/fuzz" / file).read_bytes()))
    with copied_run(finished, {file: mutated}) as run:
        harmless = checkpoint_problem(run / "checkpoints/step_00000004") is None
        said = resume()
        assert (f"warning: {run / 'checkpoints/step_00000004'} is damaged" in said) != harmless
        assert (run / WEIGHTS).read_bytes() == (finished / "out/fuzz" / WEIGHTS).read_bytes()
        assert all(checkpoint_problem(path) is None for path in checkpoints(run)), "the damaged one was written anew"
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 3, 4, 5, 6, 6]


@given(data=st.data(), names=st.lists(st.sampled_from(FILES), min_size=2, max_size=2))
@settings(FUZZ, max_examples=20)
def test_with_every_checkpoint_damaged_a_run_is_refused_and_left_as_it_is(
    finished: Path, data: st.DataObject, names: list[str]
) -> None:
    files = [f"checkpoints/step_0000000{step}/{name}" for step, name in zip("24", names)]
    contents = {file: (finished / "out/fuzz" / file).read_bytes() for file in files}
    mutated = {file: data.draw(mutations(content)) for file, content in contents.items()}
    with copied_run(finished, mutated) as run:
        assume(all(checkpoint_problem(path) is not None for path in checkpoints(run)))
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match="every checkpoint of out/fuzz is damaged") as caught:
            resume()
        assert_clear(caught.value)
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def sum_again(checkpoint: Path) -> None:
    """Make the sums those of the files, as whoever plants a file would."""
    sums = ((hashlib.sha256((checkpoint / name).read_bytes()).hexdigest(), name) for name in FILES if name != SUMS_FILE)
    (checkpoint / SUMS_FILE).write_text("".join(f"{digest}  {name}\n" for digest, name in sums))


def assert_clear_or_loaded(newest: Path, name: str, mutated: bytes) -> None:
    readers = {"config.json": GPT.from_pretrained, "model.safetensors": GPT.from_pretrained, STATE_FILE: load_state}
    with replaced(newest / name, mutated):
        try:
            readers.get(name, load_tokenizer)(newest)
        except (ValueError, OSError) as error:
            assert_clear(error)


@given(data=st.data(), name=st.sampled_from([name for name in FILES if name != SUMS_FILE]))
@settings(FUZZ, max_examples=120, suppress_health_check=list(HealthCheck))  # one guard serves all examples
def test_a_mutated_file_of_unknown_sum_is_a_clear_error_or_loads(
    newest: Path, no_flood: None, data: st.DataObject, name: str
) -> None:
    """sample.py and --init_from read folders without sums; and memory can flip bits before the sums are made."""
    mutated = data.draw(mutations((newest / name).read_bytes(), text=name.endswith(".json")))
    assert_clear_or_loaded(newest, name, mutated)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_no_value_in_a_model_folder_goes_unchecked(newest: Path, no_flood: None, name: str) -> None:
    for mutated in replacements((newest / name).read_bytes()):
        assert_clear_or_loaded(newest, name, mutated)


class Exploit:
    """A pickle of it makes a file, if it is loaded as pickles are."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(STATE_KEYS)) | st.text(), inner),
    max_leaves=5,
)


def saved(value: Any, zipped: bool) -> bytes:
    content = io.BytesIO()
    torch.save(value, content, _use_new_zipfile_serialization=zipped)
    return content.getvalue()


@given(value=PLAIN, how=st.sampled_from(["pickle", "zip", "legacy"]), protocol=st.integers(0, 5))
@settings(FUZZ, max_examples=100)
def test_a_state_of_other_things_with_the_right_sum_is_a_clear_error(
    newest: Path, value: Any, how: str, protocol: int
) -> None:
    content = pickle.dumps(value, protocol) if how == "pickle" else saved(value, zipped=how == "zip")
    assume(not (isinstance(value, dict) and value.keys() >= STATE_KEYS))
    with replaced(newest / STATE_FILE, content), replaced(newest / SUMS_FILE, b""):
        sum_again(newest)
        assert checkpoint_problem(newest) is None
        with pytest.raises(ValueError) as caught:
            load_state(newest)
        assert_clear(caught.value, newest / STATE_FILE)


@pytest.mark.parametrize("how", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize("place", ["whole", "value", "key", "tensor's neighbour"])
def test_a_state_that_would_run_code_with_the_right_sum_runs_none(
    newest: Path, finished: Path, tmp_path: Path, how: str, place: str
) -> None:
    exploit = Exploit(tmp_path / "marker")
    value: Any = {
        "whole": exploit,
        "value": dict.fromkeys(sorted(STATE_KEYS), exploit),
        "key": {**dict.fromkeys(sorted(STATE_KEYS)), "more": (exploit,)},
        "tensor's neighbour": [torch.zeros(3), exploit],
    }[place]
    content = pickle.dumps(value) if how == "pickle" else saved(value, zipped=how == "zip")
    with replaced(newest / STATE_FILE, content), replaced(newest / SUMS_FILE, b""):
        sum_again(newest)
        with pytest.raises(ValueError) as caught:
            load_state(newest)
        sums = (newest / SUMS_FILE).read_bytes()
    assert_clear(caught.value, newest / STATE_FILE)
    forged = {f"checkpoints/step_00000004/{name}": new for name, new in ((STATE_FILE, content), (SUMS_FILE, sums))}
    with copied_run(finished, forged), pytest.raises(ValueError, match=STATE_FILE):
        resume()
    assert not exploit.marker.exists()
    pickle.loads(pickle.dumps(exploit))
    assert exploit.marker.exists(), "the exploit is one"


@pytest.mark.parametrize("value", [None, [], {}, "x", 3], ids=repr)
@pytest.mark.parametrize("key", ["progress", "settings", "data", "optimizer"])
def test_a_state_with_a_part_of_another_kind_is_a_clear_error(finished: Path, key: str, value: Any) -> None:
    name = f"checkpoints/step_00000004/{STATE_FILE}"
    state = torch.load(finished / "out/fuzz" / name, weights_only=True) | {key: value}
    with copied_run(finished, {name: saved(state, zipped=True)}) as run:
        sum_again(run / "checkpoints/step_00000004")
        with pytest.raises(ValueError) as caught:
            resume()
    assert_clear(caught.value, "out/fuzz")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: kept.update({name: torch.zeros(3) for name in kept if name != "step"}),
        lambda kept: kept.update({name: "x" for name in kept}),
        lambda kept: kept.update(step=None),
        lambda kept: kept.popitem(),
        lambda kept: kept.clear(),
    ],
    ids=["shapes", "kinds", "step", "one missing", "all missing"],
)
@pytest.mark.parametrize("which", [0, -1])
def test_a_state_with_another_optimizer_is_a_clear_error(
    finished: Path, spoil: Callable[[dict[str, Any]], None], which: int
) -> None:
    name = f"checkpoints/step_00000004/{STATE_FILE}"
    state = torch.load(finished / "out/fuzz" / name, weights_only=True)
    spoil(list(state["optimizer"]["state"].values())[which])
    with copied_run(finished, {name: saved(state, zipped=True)}) as run:
        sum_again(run / "checkpoints/step_00000004")
        with pytest.raises(ValueError) as caught:
            resume()
    assert_clear(caught.value, "out/fuzz")


@pytest.mark.parametrize("content", [b"# \xff", b"\xff\xfe# a\n", bytes(100), b"#", b"[" * 1000], ids=repr)
def test_a_damaged_config_of_the_run_itself_is_named_or_written_anew(finished: Path, content: bytes) -> None:
    """Resuming reads the comments of config.toml alone."""
    with copied_run(finished, {"config.toml": content}) as run:
        try:
            resume()
        except (ValueError, OSError) as error:
            assert_clear(error, run / "config.toml")
        else:
            assert parse_config([str(run / "config.toml")]).run_name == "fuzz"
            assert (run / WEIGHTS).read_bytes() == (finished / "out/fuzz" / WEIGHTS).read_bytes()
