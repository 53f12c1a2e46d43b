"""What the scripts do with whatever standard streams, numbers and errors they are given."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, TINY

import bench
import eval as eval_script
import sample
import visualize
from gpt2_scratch.cli import as_text, run_script
from gpt2_scratch.tokenizer import load_tokenizer
from model import GPT, GPTConfig

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}  # buffers fail late, at exit too
needs_sh = pytest.mark.skipif(sys.platform == "win32", reason="takes a POSIX shell")


def shell(*command: object, redirect: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run Python with its standard streams redirected as a shell does it."""
    return subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {redirect}', sys.executable, *map(str, command)],
        capture_output=True,
        env={**ENVIRONMENT, **environment},
    )


def program(body: str, sturdy: bool = False) -> str:
    """A script of which `body` is the main function."""
    lines = "\n    ".join(body.splitlines())
    imports = "import os, sys\nfrom gpt2_scratch import cli\nfrom pathlib import Path\n"
    return f"{imports}def main():\n    {lines}\ncli.run_script(main, {sturdy})\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    GPT(GPTConfig(32, 257, n_layer=1, n_head=1, n_embd=16, eos_token_id=256)).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    def parse(script: ModuleType, *flags: object) -> object:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        return script.parse_args()

    return parse


# Standard streams


@needs_sh
@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(redirect: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    body = f"""
print("a line")
print("a warning", file=sys.stderr)
file = open({str(path)!r}, "w")
os.write(1, b"by number\\n")
os.system("echo by a child")
print("more", flush=True)
file.write("content")
"""
    done = shell("-c", program(body), redirect=redirect)
    assert done.returncode == 0 and path.read_text() == "content", "no file gets the number of a closed stream"
    assert done.stderr == (b"" if "2>" in redirect else b"a warning\n")
    if redirect in ("<&-", "2>&-"):
        assert sorted(done.stdout.splitlines()) == [b"a line", b"by a child", b"by number", b"more"]


@needs_sh
def test_wrong_usage_with_closed_streams() -> None:
    body = "import argparse\nargparse.ArgumentParser().parse_args(['--x'])"
    assert shell("-c", program(body), redirect=">&- 2>&-").returncode == 2


@needs_sh
@pytest.mark.parametrize("read", ["input()", "sys.stdin.buffer.read(9)", "for line in sys.stdin: pass"])
def test_closed_input_is_one_sentence(read: str) -> None:
    done = shell("-c", program(read), redirect="<&-")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"error: standard input is closed\n")


def test_streams_of_another_encoding_take_any_text() -> None:
    body = r"print('é \udcff', input()); print('漢', file=sys.stderr)"
    command = [sys.executable, "-c", program(body)]
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, input=b"a\xff\n", capture_output=True, env=environment)
    assert (done.returncode, done.stdout.split(), done.stderr.split()) == (
        0,
        [b"\\xe9", b"\\udcff", b"a\\ufffd"],
        [b"\\u6f22"],
    )
    done = subprocess.run(command, input=b"a\n", capture_output=True, env=environment | {"PYTHONIOENCODING": "utf-8"})
    assert done.stdout.split() == ["é".encode(), b"\\udcff", b"a"]


@needs_sh
@pytest.mark.parametrize("sturdy", [False, True])
def test_a_full_disk_under_the_output(sturdy: bool, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    path = tmp_path / "end"
    done = shell("-c", program(f"print('x')\nPath({str(path)!r}).touch()", sturdy), redirect=">/dev/full")
    if sturdy:
        assert (done.returncode, done.stderr) == (0, b"") and path.exists()
    else:
        assert done.returncode == 1
        assert re.fullmatch(rb"error: standard output cannot be written: .*No space[^\n]*\n", done.stderr)
    done = shell("-c", program("print('é', file=sys.stderr)\nprint('x')"), redirect="2>/dev/full")
    assert (done.returncode, done.stdout) == (0, b"x\n"), "warnings and progress are not the product"


@pytest.mark.parametrize("sturdy", [False, True])
def test_a_reader_who_has_seen_enough(sturdy: bool, tmp_path: Path) -> None:
    body = f"""
from tqdm import tqdm
with tqdm(range(3), mininterval=0, miniters=1) as bar:
    print("first", flush=True)
    sys.stdin.readline()
    for _ in bar:
        bar.write("é" * 100_000)
        print("漢", flush=True)
Path({str(tmp_path / "end")!r}).touch()
"""
    for stderr in (subprocess.PIPE, subprocess.STDOUT):
        process = subprocess.Popen(
            [sys.executable, "-c", program(body, sturdy)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        )
        while b"first" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        process.stdout.close()
        process.stdin.write(b"go on\n")
        process.stdin.close()
        said = process.stderr.read() if process.stderr else b""
        assert process.wait() == (0 if sturdy else 141)
        assert b"rror" not in said and b"xception" not in said
        assert (tmp_path / "end").exists() == sturdy
        if process.stderr:
            process.stderr.close()


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("raise cli.UserError('é')", 1, "error: é\n"),
        ("raise BrokenPipeError('a connection')", 1, "error: a connection\n"),
        ("raise OSError(28, 'No space', 'x')", 1, "error: [Errno 28] No space: 'x'\n"),
        ("raise MemoryError('8 TiB')", 1, "error: out of memory (8 TiB); a smaller batch or model takes less\n"),
        (
            "import torch\ntorch.empty(10**16)",
            1,
            r"error: out of memory \([^\n]*allocate[^\n]*\); a smaller batch or model takes less\n",
        ),
        ("raise KeyboardInterrupt", 130, ""),
        ("sys.exit(143)", 143, ""),
        ("raise FileNotFoundError('a bug')", 1, r"Traceback .*FileNotFoundError: a bug\n"),
        ("raise RuntimeError('a bug')", 1, r"Traceback .*RuntimeError: a bug\n"),
    ],
)
def test_how_scripts_end(body: str, code: int, said: str) -> None:
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", program(body)], capture_output=True, encoding="utf-8", env=environment)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == said or re.fullmatch(said, done.stderr, re.DOTALL), done.stderr


@needs_sh
def test_scripts_with_closed_streams(model: Path, tmp_path: Path) -> None:
    flags = ["--model", model, "--max_new_tokens", 5]
    done = shell(ROOT / "sample.py", *flags, "--prompt", "x", redirect="<&- 2>&-")
    assert done.returncode == 0 and done.stdout.startswith(b"x")
    (tmp_path / "t.txt").write_text("a text " * 20)
    flags = [model, "--tasks", "loss", "--data", tmp_path / "t.txt", "--device", "cpu"]
    done = shell(ROOT / "eval.py", *flags, "--output", tmp_path / "scores.json", redirect=">&-")
    assert done.returncode == 0 and json.loads((tmp_path / "scores.json").read_text())["scores"]["loss"]


@needs_sh
def test_training_needs_no_reader(workplace: Path) -> None:
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, ROOT / "train.py", *TINY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"},  # which lacks characters of the passage
    )
    assert process.stdout.readline().startswith(b"training")
    process.stdout.close()
    with process.stderr:
        said = process.stderr.read()
    assert process.wait() == 0 and b"xception" not in said and b"rror" not in said
    assert Path("out/tiny/checkpoints/step_00000012").is_dir()


def test_no_colour(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, model: Path) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for no_colour, coloured in (("1", False), ("", True)):
        monkeypatch.setenv("NO_COLOR", no_colour)
        visualize.print_tokens(load_tokenizer("bytes"), [65, 66])
        assert ("\x1b" in capsys.readouterr().out) == coloured


# Arguments


def test_bytes_that_are_no_text(model: Path, tmp_path: Path, parse: Callable, capsys: pytest.CaptureFixture) -> None:
    assert as_text(os.fsdecode(b"H\xff")) == "H\ufffd" and as_text("é🙂\ud800") == "é🙂\ufffd"
    flags = ["--model", model, "--prompt", os.fsdecode(b"H\xff"), "--max_new_tokens", 3]
    sample.sample(parse(sample, *flags))
    assert capsys.readouterr().out.startswith("H\ufffd")
    sample.sample(parse(sample, *flags, "--output", tmp_path / "o.jsonl"))
    assert json.loads((tmp_path / "o.jsonl").read_text(encoding="utf-8"))["prompt"] == "H\ufffd"


HUGE = 10**30


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        *[
            (sample, [f"--{name}", value])
            for name in ("num_samples", "max_new_tokens", "top_k", "batch_size", "seed")
            for value in (HUGE, "9" * 5000, "x", "-1", "1.5", "", "²")
        ],
        *[(sample, ["--max_new_tokens", value]) for value in (10**12, 10**7)],
        (sample, ["--batch_size", 10**9]),
        (sample, ["--batch_size", 4000, "--max_new_tokens", 10**6]),
        *[(sample, ["--temperature", value]) for value in ("-1", "nan", "inf", "x", "1e999")],
        *[(sample, ["--top_p", value]) for value in ("0", "nan", "2", "x", "1e-999")],
        *[
            (eval_script, ["--tasks", "lambada", f"--{name}", value])
            for name in ("limit", "stride", "batch_size")
            for value in (HUGE, "x", "-1", 0)
        ],
        (eval_script, ["--tasks", "lambada", "--batch_size", 10**9]),
        *[(visualize, ["--ids", value]) for value in ("0-99999999999", f"{HUGE}-{HUGE}", "x", "1-x", "-")],
        *[(visualize, [f"--{name}", value]) for name in ("layer", "head") for value in ("9" * 5000, "x")],
        *[(bench, ["sample", f"--{name}", HUGE]) for name in ("batch_sizes", "prompt_tokens", "new_tokens", "rounds")],
        *[(bench, ["data", f"--{name}", 10**9]) for name in ("megabytes", "workers", "shards")],
        (bench, ["sample", "--new_tokens", 2]),
        (bench, ["sample", "--prompt_tokens", 1000]),
        (bench, ["sample", "--dtypes", "int4"]),
        (bench, ["train", "--steps", HUGE]),
    ],
)
def test_numbers_out_of_bounds(
    script: ModuleType, flags: list[object], parse: Callable, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(script, *flags)
    assert end.value.code == 2
    assert re.search(r"error: .*(--\w+)", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "1e300", "--top_k", 10**9],
        ["--temperature", "1e-300", "--seed", 2**63 - 1],
        ["--top_p", "1e-300", "--top_k", 0, "--batch_size", 4096],
        ["--max_new_tokens", 10**6],
    ],
)
def test_numbers_at_their_bounds_write(
    flags: list[object], model: Path, parse: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A billion texts, of which the first begins at once."""

    class Enough(Exception):
        pass

    def write(text: str) -> None:
        shown.append(text)
        if len(shown) > 5:
            raise Enough

    shown: list[str] = []
    monkeypatch.setattr(sys.stdout, "write", write)
    with pytest.raises(Enough):
        sample.sample(parse(sample, "--model", model, "--prompt", "x", "--num_samples", 10**9, *flags))
    assert shown[0] == "--- 1 of 1000000000 ---"


def test_pictures_of_too_many(model: Path, parse: Callable, tmp_path: Path) -> None:
    flags = [model, "--out", tmp_path / "figures"]
    for more, message in (
        (["--ids", *["0-256"] * 16], "--ids names 4,112 ids; 4,096 fit in a picture"),
        (["--ids", "0-999999999"], "--ids 0-999999999 is not a range of ids 0 to 256"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_script(lambda more=more: visualize.visualize(parse(visualize, *flags, *more)))
    assert not (tmp_path / "figures").exists()


class Parsed(Exception):
    """Instead of parsing the command line."""


@pytest.mark.parametrize(
    ("script", "parse"),
    [
        ("bench", "parse_args"),
        ("eval", "parse_args"),
        ("prepare_data", "parse_arguments"),
        ("sample", "parse_args"),
        ("visualize", "parse_args"),
    ],
)
def test_every_flag_of_the_scripts_occurs_in_a_test(script: str, parse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag cannot come without its test. (tests/test_settings.py says the same of train.py's settings.)"""
    parsers: list[argparse.ArgumentParser] = []

    def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
        parsers.append(parser)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        getattr(importlib.import_module(script), parse)()
    for parser in parsers:  # with those of the commands, as they are found
        commands = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        parsers.extend(command for choices in commands for command in choices.values())
    flags = {flag for parser in parsers for flag in parser._option_string_actions if flag.startswith("--")}
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    names = {flag.replace("--no-", "--") for flag in flags - {"--help"}}
    untested = sorted(flag for flag in names if not re.search(rf"{flag}\b", tests))
    assert not untested
    assert len(flags) > 5
