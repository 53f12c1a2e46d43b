"""The commands of README.md and docs/training.md, run as written in a fresh copy of the repository."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from gpt2_scratch.dataset import open_shard, write_shards

ROOT = Path(__file__).parent.parent
DOCUMENTS = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/training.md")]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the commands are written for a Unix shell")

GPU, HUB = "a step of 524,288 tokens takes a GPU", "needs the Hugging Face hub"
NOT_RUN = {  # and commands of docs/training.md that end in "# not run: " and the reason
    "pip install -r requirements-dev.txt && jupyter execute --inplace docs/tour.ipynb": "tests/test_tour.py runs it",
    "pip install -r requirements-dev.txt && python -m pytest": "runs this test",
    "python train.py [CONFIG.toml] [--key value ...]": "the same as the first command without the optional part",
    "python prepare_data.py fineweb-edu": HUB,
    "python train.py configs/gpt2_124m.toml": GPU,
    "torchrun --standalone --nproc_per_node=8 train.py configs/gpt2_124m.toml": GPU,
    "python train.py configs/gpt2_124m.toml --data data/shakespeare-gpt2 --run_name try --batch_size 2 "
    "--total_batch_size 4096": "compiles for minutes on a CPU, and a step takes half a minute",
    "python train.py configs/finetune_shakespeare.toml": HUB,
    'python sample.py --model gpt2 --prompt "Hello, I\'m a language model,"': HUB,
    "python eval.py gpt2 --tasks wikitext2 wikitext103 lambada hellaswag hellaswag_harness": HUB,
    "python prepare_data.py SOURCE": "stands for the sources in its table",
    "python train.py configs/finetune_shakespeare.toml --data data/mine --run_name mine": HUB,
    "python3 -m venv .venv && source .venv/bin/activate": "makes another environment than this test's",
    "#!/bin/bash": "needs Slurm",
    "python bench.py data": "tokenizes 120 MB four times, which takes minutes",
    "python bench.py sample": "times the 124M model, which takes minutes",
}


def commands() -> list[str]:
    """Every command once, in order: lines of indented blocks (scripts and Python snippets whole) and `python ...`."""
    found = []
    for document in DOCUMENTS:
        for block, inline in re.findall(r"((?:^    .*\n|^\n(?=    ))+)|`(python [^`]+)`", document, re.MULTILINE):
            text = inline or re.sub(r"^    ", "", block, flags=re.MULTILINE).strip()
            if re.match(r"#!|from |import ", text):
                found.append(text)
            elif not text[0].isupper():  # otherwise it is a model's output
                found += filter(None, text.splitlines())
    return list(dict.fromkeys(found))


def is_run(command: str) -> bool:
    return command.partition("\n")[0] not in NOT_RUN and "  # not run: " not in command


RUN = [command for command in commands() if is_run(command)]


def shrink_validation_data(clone: Path) -> None:
    """Scoring all 540,000 held-out bytes would take half a minute."""
    folder = clone / "data" / "shakespeare"
    meta = json.loads((folder / "meta.json").read_text())
    (entry,) = meta["shards"]["val"]
    ids = np.array(open_shard(folder / entry["file"], entry["tokens"], entry["sha256"])[:10_000])
    meta["shards"]["val"] = write_shards(folder, "val", [ids], meta["vocab_size"])
    (folder / "meta.json").write_text(json.dumps(meta))


def copy_runs(clone: Path) -> None:
    for name in "abc":
        shutil.copytree(clone / "out" / "shakespeare", clone / "out" / name)


BEFORE: dict[str, Callable[[Path], None]] = {
    "python eval.py --tasks loss --data data/shakespeare": shrink_validation_data,
    "python visualize.py out/a --out figures/ --compare out/b out/c": copy_runs,
}
# What a command must print (a regular expression) and the files it must leave.
EXPECTED: dict[str, tuple[str, str]] = {
    "pip install -r requirements.txt && python train.py": (r"--resume goes on from out/shakespeare/checkpoints/", ""),
    'python sample.py --prompt "ROMEO:" --seed 1': (r"out/shakespeare/checkpoints/step_\d+ on .*\nROMEO:", ""),
    "python prepare_data.py hf edu/sample/10BT --name fineweb-edu": (
        "200 documents",
        "data/fineweb-edu/val_000000.bin",
    ),
    "python train.py --help": (r"(?s)--learning_rate.*default: 0.0006.*--max_bad_steps", ""),
    "python prepare_data.py shakespeare --tokenizer gpt2": ("train tokens", "data/shakespeare-gpt2/train_000000.bin"),
    "python prepare_data.py text book.txt essays/ --name mine": ("3 documents", "data/mine/val_000000.bin"),
    "python sample.py --interactive": (r"> JULIET:", ""),
    "python sample.py --prompts_file prompts.txt --num_samples 4 --output texts.jsonl": ("8/8", "texts.jsonl"),
    "python eval.py --tasks loss --data data/shakespeare": (r"(?s)loss.*perplexity.*bits_per_byte", ""),
    "python visualize.py out/a --out figures/ --compare out/b out/c": (r"holds \d+ pictures", "figures/*.png"),
    'python visualize.py --text "How is this cut into tokens?"': ("7 tokens of gpt2", ""),
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a fresh clone, the texts that the README mentions, and bin/ with this Python as `python`."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository, so its files are unknown")
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "essays").mkdir()
    (folder / "edu" / "sample" / "10BT").mkdir(parents=True)
    table = pyarrow.table({"text": [f"Document {number} of the corpus. " * 500 for number in range(200)]})
    pyarrow.parquet.write_table(table, folder / "edu" / "sample" / "10BT" / "000_00000.parquet")
    for name in ("book.txt", "essays/1.txt", "essays/2.md"):
        (folder / name).write_text(f"This is {name}, and it goes on. " * 1000)
    (folder / "prompts.txt").write_text("ROMEO:\nJULIET:\n")
    (folder / "bin").mkdir()
    # The packages are installed already; .ci/run tests the installation.
    programs = {"python": f'exec "{sys.executable}" "$@"', "pip": "exit 0"}
    programs["torchrun"] = f'exec "{sys.executable}" -m torch.distributed.run "$@"'
    for name, line in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    return folder


def run(command: str, clone: Path) -> tuple[int, str]:
    """Return exit code and output. Training is interrupted, as by Ctrl-C, once it has logged a loss."""
    path = f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=clone,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # its own process group, so that Ctrl-C reaches the shell and its children
    )
    output = ""
    if trains(command):
        while not output.endswith(", loss ") and (character := process.stdout.read(1)):
            output += character
        os.killpg(process.pid, signal.SIGINT)
    output += process.communicate("JULIET:\n" if "--interactive" in command else "", timeout=240)[0]
    return process.returncode, output


def trains(command: str) -> bool:
    return "train.py" in command and "--help" not in command


@pytest.mark.parametrize("command", RUN, ids=[command.splitlines()[-1] for command in RUN])
def test_command(command: str, clone: Path) -> None:
    """In the documents' order: a command may use the files of those before it."""
    BEFORE.get(command, lambda clone: None)(clone)
    shown, files = EXPECTED.get(command, ("", ""))
    line = re.sub(r" \[.*?\]", "", command)  # drop optional parts
    if command.startswith("from "):  # typed into Python; training was interrupted, so its checkpoint is of another step
        (saved,) = (clone / "out" / "shakespeare" / "checkpoints").glob("step_*")
        line = f"python -i <<'END'\n{re.sub('step_[0-9]+', saved.name, command)}\nEND"
        shown = "'generated_text': .ROMEO:"
    code, output = run(line, clone)
    # Ctrl-C reaches torchrun and its processes; it exits with 1, whatever their codes.
    assert code == ((1 if "torchrun" in command else 130) if trains(command) else 0), output
    assert re.search(shown, output), output
    assert not files or list(clone.glob(files)), output


def test_every_exception_and_expectation_names_a_documented_command() -> None:
    first_lines = [command.partition("\n")[0] for command in commands()]
    stale = {*NOT_RUN, *BEFORE, *EXPECTED} - {*first_lines}
    assert not stale, stale
    assert len(RUN) > 10
