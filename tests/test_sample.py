"""The command line that writes text, with a model whose texts and probabilities are known by hand."""

import gzip
import io
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_scratch.cli import UserError
from gpt2_scratch.tokenizer import Tokenizer, load_tokenizer
from model import GPT, GPTConfig
from sample import Sampler, Text, parse_args, sample

SCRIPT = Path(__file__).parent.parent / "sample.py"
EOT = 256
CHARACTERS = ["a", "é", "漢", "🙂"]  # one to four bytes, none of which they share
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8", "TERM": "dumb"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model of bytes that knows only the byte before.

    After a whole character comes one of CHARACTERS or <|endoftext|>, each with probability 1/5; b and c are
    always followed by b.
    """
    begin = [*(c.encode()[0] for c in CHARACTERS), EOT]
    follows = {EOT: begin, ord("b"): [ord("b")], ord("c"): [ord("b")]}
    for encoded in map(str.encode, CHARACTERS):
        follows |= {a: [b] for a, b in pairwise(encoded)} | {encoded[-1]: begin}
    config = GPTConfig(
        block_size=64, vocab_size=257, n_layer=1, n_head=1, n_embd=257, tie_word_embeddings=False, eos_token_id=EOT
    )
    gpt = GPT(config)
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if name != "ln_f.weight":
                p.zero_()
        gpt.wte.weight[range(257), range(257)] = 1.0
        for before, after in follows.items():
            gpt.lm_head.weight[after, before] = 2.0  # the last LayerNorm makes 16 of the 1: logits of 32 and about 0
    folder = tmp_path_factory.mktemp("model")
    gpt.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the command line in this process."""

    def run(*flags: object) -> None:
        monkeypatch.setattr(sys, "argv", ["sample.py", "--model", model, *map(str, flags)])
        sample(parse_args())

    return run


@pytest.fixture
def sampler(model: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sampler]:
    def make(*flags: object) -> Sampler:
        monkeypatch.setattr(sys, "argv", ["sample.py", "--model", model, *map(str, flags)])
        return Sampler(parse_args())

    return make


def script(model: str, *flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--model", model, *map(str, flags)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=ENVIRONMENT, timeout=300)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n")]


# Tokens to text


class Pieces(Tokenizer):
    """A tokenizer whose tokens are pieces of a given text, in order; the last id ends it."""

    def __init__(self, pieces: list[bytes]):
        self.pieces, self.eot = [*pieces, b"<|endoftext|>"], len(pieces)

    def _token_bytes(self, token: int) -> bytes:
        return self.pieces[token]


def cut(pieces: list[bytes], stops: list[str]) -> tuple[str, str]:
    """The text before the first stop string to be complete after some token, and why it ends."""
    for n in range(len(pieces) + 1):
        text = b"".join(pieces[:n]).decode("utf-8", errors="ignore")  # without the half character at its end
        if found := [text.index(stop) for stop in stops if stop in text]:
            return text[: min(found)], "stop"
    return b"".join(pieces).decode(), "length"


@st.composite
def written(draw: st.DrawFn) -> tuple[list[bytes], list[str]]:
    """A text in tokens of a few bytes each, and stop strings, most of which occur in it, whole or nearly."""
    alphabet = draw(st.sampled_from([st.sampled_from("aab"), st.sampled_from("aé漢🙂"), st.characters(codec="utf-8")]))
    text = draw(st.text(alphabet, max_size=30))
    encoded = text.encode()
    sizes = draw(st.lists(st.integers(1, 6), min_size=len(encoded), max_size=len(encoded)) | st.just([1] * 200))
    pieces = []
    while encoded:
        size = sizes.pop()
        pieces.append(encoded[:size])
        encoded = encoded[size:]
    part = st.tuples(st.integers(0, 30), st.integers(1, 8)).map(lambda where: text[where[0] : sum(where)])
    stop = part | st.tuples(part, st.text(alphabet, max_size=1)).map("".join) | st.text(alphabet, max_size=3)
    return pieces, draw(st.lists(stop.filter(bool), max_size=3))


@settings(max_examples=200)
@given(case=written())
@example(case=([b"a", b"a", b"b", b"c"], ["abc", "aabd"]))  # the longer one is held back, the shorter one comes
@example(case=(["漢".encode()[:1], "漢".encode()[1:] + b"x"], ["漢x"]))
@example(case=([b"ab\nUs", b"er:", b" hi"], ["\nUser:"]))
def test_pieces_are_the_text_before_the_first_stop(case: tuple[list[bytes], list[str]]) -> None:
    pieces, stops = case
    expected, finish = cut(pieces, stops)
    row = Text(Pieces(pieces), [], stops, ignore_eot=False)
    shown, longest = "", max(map(len, stops), default=1)
    for n in range(1, len(pieces) + 1):
        shown += row.add(n - 1)
        assert expected.startswith(shown), "what is shown is certain: no half character, no half stop string"
        if row.finish == "stop":
            break
        whole = b"".join(pieces[:n]).decode("utf-8", errors="ignore")
        assert len(whole) - len(shown) < longest, "no more is held back than could still become a stop string"
    shown += row.close()
    assert (shown, row.text, row.finish) == (expected, expected, finish)
    assert row.close() == ""


@settings(max_examples=50)
@given(st.lists(st.binary(min_size=1, max_size=4) | st.sampled_from([b"\xf0\x9f", b"\xc3", b"\xa9", b"\x99\x82"])))
def test_bytes_that_are_no_text_are_shown_as_a_whole_decoder_shows_them(pieces: list[bytes]) -> None:
    row = Text(Pieces(pieces), [], [], ignore_eot=False)
    shown = "".join(row.add(i) for i in range(len(pieces))) + row.close()
    assert shown == row.text == b"".join(pieces).decode("utf-8", errors="replace")


def test_end_of_text_shows_what_was_held_back() -> None:
    row = Text(Pieces([b"x", b"en"]), [], ["end"], ignore_eot=False)
    assert [row.add(0), row.add(1), row.finish] == ["x", "", "length"]
    assert [row.add(2), row.finish, row.text] == ["en", "eot", "xen"]


def test_end_of_text_is_text_where_it_is_ignored() -> None:
    row = Text(Pieces([b"x"]), [], ["text|"], ignore_eot=True)
    assert row.add(0) + row.add(1) + row.close() == "x<|endof"
    assert row.finish == "stop"


# Streams and batches


def test_streams_and_batches_write_the_same(sampler: Callable[..., Sampler]) -> None:
    made = sampler("--seed", 5, "--max_new_tokens", 90, "--stop", "🙂a", "--stop", "漢")
    prompts = [made.encode(prompt) for prompt in ("a", "漢漢é", "", "a" * 80, "c", "a", "é")]
    results = made.batch(prompts, list(range(10, 17)))
    assert [result["text"] for result in results] == ["".join(made.stream(p, 10 + i)) for i, p in enumerate(prompts)]
    assert {result["finish"] for result in results} == {"eot", "stop", "length"}
    assert results[0]["text"] != results[5]["text"], "row numbers tell texts of one prompt apart"
    backwards = made.batch(prompts[::-1], list(range(16, 9, -1)))
    assert backwards[::-1] == results


def test_streamed_output_is_whole_characters_at_every_moment(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[bytes] = []

    class Terminal(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:
            arrived.append(bytes(data))
            return len(data)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Terminal()), encoding="utf-8"))
    run("--prompt", "é", "--ignore_eot", "--seed", 1, "--max_new_tokens", 120)
    sys.stdout.flush()
    text = "".join(part.decode("utf-8", errors="strict") for part in arrived)
    assert len(arrived) > 30, "it comes piece by piece"
    assert text.startswith("é") and text.endswith("\n")
    # 120 bytes can end within a character, which is then shown as what it is.
    assert re.fullmatch(r"(a|é|漢|🙂|<\|endoftext\|>)+\ufffd?\n", text) and set("é漢🙂") <= set(text)


# Command line


def test_a_file_of_prompts_to_json_lines(
    model: str, run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("a\n\né漢\nc\n", encoding="utf-8")
    output = tmp_path / "out.jsonl"
    flags = ["--prompts_file", tmp_path / "prompts.txt", "--num_samples", 3, "--max_new_tokens", 12, "--seed", 3]
    flags += ["--top_k", 0, "--top_p", 1, "--stop", "🙂"]
    done = script(model, *flags, "--output", output, "--batch_size", 5, "--logprobs")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    results = lines(output)
    assert [(line["prompt"], line["sample"]) for line in results] == [
        (prompt, i) for prompt in ("a", "", "é漢", "c") for i in range(3)
    ]
    assert {line["finish"] for line in results} == {"eot", "stop", "length"}
    for line in results:
        tokens, text = line["tokens"], line["text"]
        assert len(tokens) == len(line["logprobs"])
        content = bytes(token for token in tokens if token != EOT).decode("utf-8", errors="replace")
        assert (tokens[-1] == EOT) == (line["finish"] == "eot") and EOT not in tokens[:-1]
        assert content == text + ("🙂" if line["finish"] == "stop" else "")
        assert len(tokens) == 12 or line["finish"] != "length"
        previous = [*line["prompt"].encode()[-1:], *tokens[:-1]] or [EOT]
        previous = previous if len(previous) == len(tokens) else [EOT, *previous]
        for before, token, logprob in zip(previous, tokens, line["logprobs"]):
            chosen = before in [EOT, *(c.encode()[-1] for c in CHARACTERS)]
            assert logprob == pytest.approx(math.log(1 / 5) if chosen else 0.0, abs=0.02), (before, token)

    before = output.read_bytes()
    with pytest.raises(UserError, match=f"{re.escape(str(output))} already exists"):
        run(*flags, "--output", output)
    assert output.read_bytes() == before
    with pytest.raises(UserError, match=r"new/x.jsonl cannot be written: .*/new does not exist"):
        run(*flags, "--output", tmp_path / "new" / "x.jsonl")

    capsys.readouterr()
    run(*flags)
    expected = "".join(f"--- {i + 1} of 12 ---\n{line['prompt']}{line['text']}\n" for i, line in enumerate(results))
    assert capsys.readouterr().out == expected, "printed and filed texts of a seed are the same"


def test_batches_of_any_size_write_the_same_file(run: Callable[..., None], tmp_path: Path) -> None:
    for batch_size in (1, 3, 8):
        flags = ["--num_samples", 8, "--seed", 3, "--max_new_tokens", 30, "--batch_size", batch_size]
        run(*flags, "--prompt", "é", "--output", tmp_path / f"{batch_size}.jsonl")
    contents = {path.read_text() for path in tmp_path.glob("*.jsonl")}
    assert len(contents) == 1
    assert "tokens" not in contents.pop(), "without --logprobs"


def test_seeds(run: Callable[..., None], capsys: pytest.CaptureFixture) -> None:
    texts = []
    for flags in (["--seed", 1], ["--seed", 1], ["--seed", 2], [], []):
        run("--ignore_eot", "--max_new_tokens", 60, *flags)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(set(texts)) == 4


def test_stop_ends_before_the_first_of_them(run: Callable[..., None], capsys: pytest.CaptureFixture) -> None:
    flags = ["--ignore_eot", "--seed", 1, "--max_new_tokens", 300]
    run(*flags)
    full = capsys.readouterr().out.removesuffix("\n")
    run(*flags, "--stop", "a🙂", "--stop", "漢漢", "--stop", "not in it")
    end = min(full.index("a🙂"), full.index("漢漢"))
    assert end > 5 and capsys.readouterr().out == full[:end] + "\n"


def test_end_of_text_ends_unless_ignored(run: Callable[..., None], capsys: pytest.CaptureFixture) -> None:
    flags = ["--prompt", "é", "--seed", 1, "--max_new_tokens", 200]
    run(*flags, "--ignore_eot")
    full = capsys.readouterr().out
    assert full.count("<|endoftext|>") > 1
    run(*flags)
    assert capsys.readouterr().out == full[: full.index("<|endoftext|>")] + "\n"


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_dtypes_write_this_models_text_alike(
    dtype: str, run: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    """Its probabilities are exact in each of them."""
    flags = ["--prompt", "é", "--seed", 4, "--max_new_tokens", 100, "--ignore_eot"]
    run(*flags, "--dtype", "float32")
    expected = capsys.readouterr()
    run(*flags, "--dtype", dtype)
    seen = capsys.readouterr()
    assert expected.err.endswith("in float32\n") and seen.err.endswith(f"in {dtype}\n")
    assert seen.out == expected.out and len(set(seen.out)) > 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("flags", [[], ["--temperature", 0], ["--top_k", 0], ["--dtype", "bfloat16"], ["--output"]])
def test_weights_that_are_no_numbers(
    value: float, flags: list[object], model: str, run: Callable[..., None], tmp_path: Path
) -> None:
    bad = GPT.from_pretrained(model)
    with torch.no_grad():
        bad.h[0].mlp.c_fc.bias[3] = value
    bad.save_pretrained(tmp_path / "bad")
    load_tokenizer("bytes").save_pretrained(tmp_path / "bad")
    flags = [*flags, tmp_path / "out.jsonl"] if flags == ["--output"] else flags
    with pytest.raises(UserError, match=r"bad has values in h\.0\.mlp\.c_fc\.bias that are not finite"):
        run("--model", tmp_path / "bad", "--prompt", "a", *flags)


def test_weights_too_large_for_the_dtype(model: str, run: Callable[..., None], tmp_path: Path) -> None:
    large = GPT.from_pretrained(model)
    with torch.no_grad():
        large.lm_head.weight *= 1e5
    large.save_pretrained(tmp_path)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"finite weights, but .* not finite in float16; try --dtype float32"):
        run("--model", tmp_path, "--prompt", "a", "--dtype", "float16")


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("shard", ["../x", "/tmp/x", "a/../../x", r"..\x", "C:x"])
def test_shards_outside_the_folder(kind: str, shard: str, model: str, run: Callable[..., None], tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "x")
    index = {"weight_map": {"wte.weight": shard}}
    (tmp_path / "model" / f"{kind}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model has no weights"):
        run("--model", tmp_path / "model")


@pytest.mark.parametrize("content", [None, b"caf\xe9\n", b""])
def test_no_prompts(content: bytes | None, run: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"prompts\.txt"):
        run("--prompts_file", path, "--output", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("\ufeffa\r\né\r\n", ["a", "é"]),
        ("\ufeffa\n\r\né", ["a", "", "é"]),
        ("a\rb\u2028c\n\n", ["a\rb\u2028c", ""]),
    ],
)
@pytest.mark.parametrize("name", ["prompts.txt", "prompts.txt.gz", "-"])
def test_each_line_of_a_file_is_a_prompt_without_its_end(
    content: str,
    prompts: list[str],
    name: str,
    run: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode()), "ascii"))
    Path("prompts.txt").write_bytes(content.encode())
    Path("prompts.txt.gz").write_bytes(gzip.compress(content.encode()))
    run("--prompts_file", name, "--output", "out.jsonl", "--max_new_tokens", 1)
    assert [line["prompt"] for line in lines(Path("out.jsonl"))] == prompts


@pytest.mark.skipif(not Path("/dev/stdin").exists(), reason="needs /dev/stdin")
@pytest.mark.parametrize("flags", [["--interactive"], ["--prompts_file", "/dev/stdin"]])
def test_prompts_through_a_pipe_have_no_byte_order_mark(model: str, flags: list[str]) -> None:
    command = [sys.executable, SCRIPT, "--model", model, *flags, "--max_new_tokens", "1", "--seed", "1"]
    outputs = [
        subprocess.run(command, input=text, capture_output=True, env=ENVIRONMENT | {"LC_ALL": locale}, timeout=300)
        for text in ("é\nc\n".encode(), "\ufeffé\r\nc\r\n".encode())
        for locale in ("C.UTF-8", "POSIX")
    ]
    assert all(done.returncode == 0 for done in outputs), outputs
    plain = outputs[0].stdout.decode()
    assert {done.stdout.decode() for done in outputs} == {plain} and "é" in plain and "cb" in plain


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.csv.gz"])
def test_rows_are_no_prompts(name: str, run: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"text\n")
    with pytest.raises(UserError, match=f"{re.escape(name)} has rows; give a file of plain text"):
        run("--prompts_file", tmp_path / name)


def test_a_missing_prompts_file_is_one_sentence(run: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^there is no file {re.escape(str(tmp_path / 'none.txt'))}$"):
        run("--prompts_file", tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--logprobs"], "--logprobs"),
        (["--interactive", "--output", "x"], "--interactive"),
        (["--interactive", "--prompts_file", "x"], "--interactive"),
        (["--stop", ""], "--stop"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--top_p", "1.1"], "--top_p"),
        (["--top_k", "-1"], "--top_k"),
        (["--num_samples", "0"], "--num_samples"),
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--max_new_tokens", "ten"], "--max_new_tokens"),
        (["--batch_size", "0"], "--batch_size"),
        (["--seed", "-1"], "--seed"),
        (["--dtype", "int4"], "--dtype"),
    ],
)
def test_bad_flags_are_named(
    flags: list[str], named: str, run: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


# Interactive


class Session:
    """The program on a terminal of its own."""

    def __init__(self, *command: object):
        pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
        self.terminal, theirs = pty.openpty()
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=ENVIRONMENT,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def read(self, until: str, seconds: float = 300) -> str:
        """What is shown from now on, up to and with `until`; "" waits for the end of the program."""
        shown, deadline = b"", time.monotonic() + seconds
        while not (until and until in shown.decode("utf-8", errors="ignore")):
            if not select.select([self.terminal], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(shown[-500:])
            try:
                # A byte at a time, so that nothing after `until` is taken.
                part = os.read(self.terminal, 1)
            except OSError:  # the other side is closed
                part = b""
            if not part:
                assert not until, shown[-500:]
                break
            shown += part
        return shown.decode("utf-8").replace("\r\n", "\n")


@pytest.fixture
def session(model: str) -> Iterator[Session]:
    session = Session(
        sys.executable, SCRIPT, "--model", model, "--interactive", "--seed", 1, "--max_new_tokens", 100_000
    )
    yield session
    session.process.kill()
    session.process.wait()
    os.close(session.terminal)


def test_interactive(session: Session, sampler: Callable[..., Sampler]) -> None:
    made = sampler("--seed", 1, "--max_new_tokens", 100_000)
    answers = ["".join(made.stream(made.encode("é"), number)) for number in (0, 2)]
    assert len(answers[0]) > 1 and answers[0] != answers[1]

    session.read("\n> ")
    session.type("é\n")
    assert session.read("\n> ") == f"é\né{answers[0]}\n> ", "a prompt is answered and the next one asked for"
    session.type("c\n")
    session.read("b" * 50)
    session.type("\x03")
    rest = session.read("\n> ")
    assert set(rest.replace("^C", "")) <= set("b\n> "), "Ctrl-C stops the text and nothing else"
    session.type("é\n")
    assert session.read("\n> ") == f"é\né{answers[1]}\n> "
    session.type("half a line")
    session.read("half a line")
    for seconds in (1, 1, 1, 300):
        session.type("\x03")
        with suppress(TimeoutError):  # Python's input() can miss a Ctrl-C in the midst of other keys
            session.read("\n> ", seconds)
            break
    session.type("\x04")
    session.read("")
    assert session.process.wait(timeout=300) == 0, "Ctrl-D ends"


def test_ctrl_c_ends_what_is_not_interactive(model: str) -> None:
    session = Session(sys.executable, SCRIPT, "--model", model, "--prompt", "c", "--max_new_tokens", 100_000)
    session.read("b" * 50)
    session.process.send_signal(signal.SIGINT)
    rest = session.read("")
    assert session.process.wait(timeout=300) == 130 and "Traceback" not in rest
    os.close(session.terminal)


def test_a_reader_who_has_seen_enough_ends_it_without_a_word(model: str) -> None:
    command = [sys.executable, SCRIPT, "--model", model, "--prompt", "c", "--max_new_tokens", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout.read(5) == b"cbbbb"
    process.stdout.close()
    assert process.wait(timeout=300) == 141
    assert b"rror" not in process.stderr.read() and not process.stderr.close()
