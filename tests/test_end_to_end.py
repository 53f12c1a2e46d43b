"""The scripts as users run them, on a corpus small enough for seconds."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, write_corpus
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, pipeline

import bench
import eval as evaluation
import visualize
from gpt2_scratch.batch_size import BatchPlan, largest_batch, plan_batch
from gpt2_scratch.checkpoint import checkpoints, load_state
from gpt2_scratch.cli import UserError, run_script
from gpt2_scratch.config import parse_config
from gpt2_scratch.distributed import place_in_group
from model import GPT, GPTConfig
from sample import parse_args, sample
from train import train


def metrics(run: str) -> list[dict]:
    return [json.loads(line) for line in (Path("out") / run / "metrics.jsonl").read_text().splitlines()]


def curve(run: str, key: str = "train_loss") -> list[float]:
    return [line[key] for line in metrics(run) if key in line]


def script(
    *args: object, check: bool = True, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, env=env, timeout=240, cwd=cwd
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture
def run_sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[str, str]]:
    """sample.py in this process; what it prints, and what it says to standard error."""

    def run(*flags: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        capsys.readouterr()
        sample(parse_args())
        return capsys.readouterr()

    return run


def run_tiny(*flags: str) -> None:
    train(parse_config([*TINY, *flags]))


def test_train_then_sample(
    workplace: Path, run_sample: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = script(ROOT / "train.py", *TINY)
    assert "on cpu" in done.stdout and "in float32" in done.stdout
    assert "tok/s" in done.stderr and "loss" in done.stderr, "the progress line shows speed and loss"
    lines = metrics("tiny")
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "val_loss" in line] == [6, 12]
    assert all(line["tokens"] == 512 * line["step"] for line in lines)
    assert curve("tiny")[0] == pytest.approx(math.log(257), abs=0.2)
    assert curve("tiny", "val_loss")[-1] < curve("tiny")[0] - 1

    parsers = {"sample": parse_args, "visualize": visualize.parse_args, "eval": evaluation.parse_args}
    for program, parse in parsers.items():
        (command,) = re.findall(rf"python ({program}\.py .*)", done.stdout)
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        assert parse().model == "out/tiny"

    flags = ["--prompt", "to be", "--max_new_tokens", 40, "--seed", 7]
    first, again = script(ROOT / "sample.py", *flags), run_sample(*flags)[0]
    assert first.stdout.startswith("to be") and len(first.stdout) > 20
    assert first.stdout == again
    assert "step_00000012" in first.stderr, "without --model the newest run is used, and named"


def test_validation_loss_is_that_of_every_held_out_token(workplace: Path) -> None:
    run_tiny("--max_steps", "2")
    model = GPT.from_pretrained(checkpoints(Path("out/tiny"))[-1], dtype=torch.float64)
    ids = torch.frombuffer(
        bytearray(Path("data/shakespeare/val_000000.bin").read_bytes()[1024:]), dtype=torch.uint16
    ).long()
    total, block_size = 0.0, model.config.block_size
    for begin in range(0, len(ids) - 1, block_size):
        window = ids[begin : begin + block_size + 1]
        logits = model(window[None, :-1])[0][0]
        total -= logits.log_softmax(-1).gather(1, window[1:, None]).sum().item()
    assert curve("tiny", "val_loss")[-1] == pytest.approx(total / (len(ids) - 1), abs=1e-5)


def test_existing_run_is_never_overwritten(workplace: Path) -> None:
    run_tiny("--max_steps", "2", "--warmup_steps", "1")
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    done = script(ROOT / "train.py", *TINY, check=False)
    assert done.returncode == 1 and "--resume" in done.stderr and "--run_name" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


def test_resume_without_a_checkpoint_says_where_it_begins(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    run_tiny("--max_steps", "2", "--resume")
    assert capsys.readouterr().out.startswith("out/tiny has no checkpoint yet: beginning at step 0\n")


@pytest.mark.parametrize("lost", ["each", "folder"])
def test_resume_never_begins_again_where_checkpoints_are_lost(workplace: Path, lost: str) -> None:
    run_tiny("--max_steps", "8")
    for path in checkpoints(Path("out/tiny")) if lost == "each" else [Path("out/tiny/checkpoints")]:
        shutil.rmtree(path)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"out/tiny had come to step_00000008, but no valid checkpoint of it is left"):
        run_tiny("--max_steps", "8", "--resume")
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


def test_two_first_runs_at_once_share_one_preparation(tmp_path: Path) -> None:
    """With variables that another launcher left behind, too: a process without torchrun is rank 0 of 1."""
    flags = [*TINY[1:], "--max_steps", "2", "--warmup_steps", "1", "--eval_tokens", "512"]
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--run_name"]
    strays = {"a": {"RANK": "1", "LOCAL_RANK": "3"}, "b": {"WORLD_SIZE": "", "RANK": ""}}
    runs = [
        subprocess.Popen([*command, name], cwd=tmp_path, env=os.environ | stray, stderr=subprocess.PIPE, text=True)
        for name, stray in strays.items()
    ]
    errors = [run.communicate(timeout=240)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    assert len(list((tmp_path / "out").glob("*/checkpoints/step_00000002/model.safetensors"))) == 2


@pytest.mark.parametrize(
    "environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "0"}]
)
def test_half_a_launcher_is_told_what_is_wrong(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"in the environment, with WORLD_SIZE .*torchrun"):
        place_in_group()


def test_a_bug_keeps_its_traceback(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that who hacks the network sees where it broke."""

    def forward(self: GPT, *args: object) -> None:
        _, _ = 1, 2, 3

    monkeypatch.setattr(GPT, "forward", forward)
    with pytest.raises(ValueError, match="too many values to unpack"):
        run_script(lambda: run_tiny(), sturdy=True)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_continues_exactly(workplace: Path, optimizer: str) -> None:
    """Bit for bit on one CPU process, dropout included."""
    flags = ["--dropout", "0.2", "--optimizer", optimizer]
    run_tiny(*flags, "--run_name", "whole")
    run_tiny(*flags, "--run_name", "parts")
    for path in checkpoints(Path("out/parts"))[1:]:  # as if killed after step 4 and before step 8
        for file in path.iterdir():
            file.unlink()
    run_tiny(*flags, "--run_name", "parts", "--resume")
    timing = ("tokens_per_sec", "mfu")
    assert [{k: v for k, v in line.items() if k not in timing} for line in metrics("whole")] == [
        {k: v for k, v in line.items() if k not in timing} for line in metrics("parts")
    ]
    whole, parts = (checkpoints(Path("out") / run)[-1] for run in ("whole", "parts"))
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    ours, theirs = load_state(whole)["optimizer"]["state"], load_state(parts)["optimizer"]["state"]
    assert all(torch.equal(ours[i][key], theirs[i][key]) for i in ours for key in ours[i])


# Runs one after another in the same processes: importing takes them longer than training. One that is resumed is a copy
# of the run before it that has lost all checkpoints but its first.
DRIVER = """
import json, os, shutil
from pathlib import Path
from gpt2_scratch.checkpoint import checkpoints
from gpt2_scratch.batch_size import BatchPlan, largest_batch, plan_batch
from gpt2_scratch.config import parse_config
from train import train

for number, (name, *flags) in enumerate(json.loads(Path("runs.json").read_text())):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # each meets in a part of its own of torchrun's store
    if "--resume" in flags and os.environ["RANK"] == "0":
        shutil.copytree(f"out/{name.removesuffix('-resumed')}", f"out/{name}")
        for path in checkpoints(Path("out", name))[1:]:
            shutil.rmtree(path)
    train(parse_config([*flags, "--run_name", name]))
"""
FLAGS = [*TINY, "--learning_rate", "3e-3", "--total_batch_size", "768", "--max_steps", "8", "--eval_interval", "4"]
SHARES = {"fsdp": "muon", "zero2": "adamw"}


@pytest.fixture(scope="module")
def three_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of three processes, so that no matrix divides evenly, two micro-steps each."""
    folder = tmp_path_factory.mktemp("three")
    write_corpus(folder)
    flags = [*FLAGS, "--batch_size", "4", "--optimizer"]
    runs = [[optimizer, *flags, optimizer] for optimizer in ("adamw", "muon")]
    for parallel, optimizer in SHARES.items():
        run = [*flags, optimizer, "--parallel", parallel, "--activation_checkpointing"]
        runs += [[parallel, *run], [f"{parallel}-resumed", *run, "--resume"]]
    for parallel in ("ddp", "fsdp"):
        runs.append([f"{parallel}-rounded", *flags, "adamw", "--parallel", parallel, "--reduce_dtype", "bfloat16"])
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "driver.py").write_text(DRIVER)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    done = script(*launcher, "driver.py", PYTHONPATH=str(ROOT), cwd=folder)
    assert done.stdout.count("a passage it writes") == len(runs) and "Warning" not in done.stderr
    return folder


@pytest.fixture
def three(three_processes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(three_processes)


def same_curve(run: str, other: str) -> None:
    assert curve(run) == pytest.approx(curve(other), abs=1e-5)
    assert curve(run, "val_loss") == pytest.approx(curve(other, "val_loss"), abs=1e-5)
    assert curve(run, "grad_norm") == pytest.approx(curve(other, "grad_norm"), rel=1e-4)


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_processes_and_accumulation_give_one_curve(optimizer: str) -> None:
    for name, batch_size in (("one", "24"), ("accumulated", "2")):
        flags = ["--run_name", f"{name}-{optimizer}", "--optimizer", optimizer, "--batch_size", batch_size]
        train(parse_config([*FLAGS, *flags]))
    same_curve(f"accumulated-{optimizer}", f"one-{optimizer}")
    same_curve(optimizer, f"one-{optimizer}")


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(("parallel", "optimizer"), SHARES.items())
def test_a_model_in_shares_learns_as_a_whole_one(parallel: str, optimizer: str) -> None:
    """Such a run goes on bit for bit, and in one process."""
    same_curve(parallel, optimizer)
    untimed = r'"(tokens_per_sec|mfu)": [^,}]*'
    whole, resumed = (Path("out", run, "metrics.jsonl") for run in (parallel, f"{parallel}-resumed"))
    assert re.sub(untimed, "", resumed.read_text()) == re.sub(untimed, "", whole.read_text())
    single = f"{parallel}-single"
    shutil.copytree(Path("out", parallel), Path("out", single))
    for path in checkpoints(Path("out", single))[1:]:
        shutil.rmtree(path)
    flags = ["--run_name", single, "--optimizer", optimizer, "--batch_size", "4", "--resume"]
    train(parse_config([*FLAGS, *flags, "--parallel", parallel, "--activation_checkpointing"]))
    same_curve(single, optimizer)


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_reduced_in_bfloat16_differ_in_rounding_only(parallel: str) -> None:
    rounded, exact = (curve(run, "grad_norm")[:4] for run in (f"{parallel}-rounded", "adamw"))
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert rounded != pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
def test_published_recipes_split_over_any_number_of_gpus(world_size: int) -> None:
    for path in sorted((ROOT / "configs").glob("gpt2_*.toml")):
        config = parse_config([str(path)])
        plan = plan_batch(config.total_batch_size, config.batch_size, 1024, world_size)
        assert plan.sequences == plan.batch_size * plan.accumulation_steps * world_size == 512


@given(share=st.integers(1, 600), one=st.integers(1, 100), each=st.integers(1, 100), room=st.integers(0, 9999))
def test_auto_batch_size_is_the_largest_divisor_that_fits(share: int, one: int, each: int, room: int) -> None:
    found = largest_batch(share, one, one + each, one + 3 * each, room)
    fitting = [n for n in range(1, share + 1) if share % n == 0 and one + (n - 1) * each <= room]
    assert found == (fitting[-1] if fitting else 0)
    assert largest_batch(share, one, math.inf, math.inf, room) == (one <= room), "two did not fit"
    assert largest_batch(share, math.inf, math.inf, math.inf, room) == 0


def test_tokens_that_are_no_whole_sequences_are_refused(workplace: Path) -> None:
    with pytest.raises(UserError, match="500 does not divide into sequences of 32 tokens; 512 does"):
        run_tiny("--total_batch_size", "500")
    assert not Path("out/tiny").exists()


def test_batch_size_is_the_most_that_divides_a_share() -> None:
    """So that a resumed run needs no other total_batch_size on another number of processes."""
    assert [plan_batch(384, 2, 32, n) for n in (1, 2, 3, 4, 6)] == [  # 12 sequences
        BatchPlan(12, 2, 6),
        BatchPlan(12, 2, 3),
        BatchPlan(12, 2, 2),
        BatchPlan(12, 1, 3),
        BatchPlan(12, 2, 1),
    ]
    assert plan_batch(512, 7, 32, 1) == BatchPlan(16, 4, 4)
    with pytest.raises(UserError, match=r"12 sequences of 32 tokens, .* 5 processes; 4 or 6 processes can share them"):
        plan_batch(384, 2, 32, 5)


def test_weights_that_are_no_numbers_are_named_before_training(workplace: Path) -> None:
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=2, n_embd=8))
    model.h[0].mlp.c_fc.weight.data[0, 0] = math.nan
    model.save_pretrained("broken")
    flags = ["--n_layer", "0", "--n_head", "0", "--n_embd", "0"]
    with pytest.raises(UserError, match=r"broken has values in h\.0\.mlp\.c_fc\.weight that are not finite"):
        run_tiny(*flags, "--init_from", "broken")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data", "data/none"], "there is no data at data/none"),
        (["--block_size", "100000"], "fewer than one sequence"),
        (["--device", "tpu"], "is not one of auto"),
        (["--batch_size", "auto"], 'batch_size "auto" measures the memory of a CUDA device; on cpu give a number'),
        (["--init_from", "nowhere"], "nowhere has no weights"),
        (["--wandb_project", "x"], "wandb is not installed"),
        (["--n_head", "3"], "n_embd 32 is not a multiple of n_head 3"),
    ],
)
def test_bad_input_is_one_sentence(workplace: Path, flags: list[str], expected: str) -> None:
    Path("nowhere").mkdir()
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        run_tiny(*flags)
    assert "\n" not in str(error.value) and not Path("out").exists()


def test_bad_input_ends_the_script_with_one_line(workplace: Path) -> None:
    done = script(ROOT / "train.py", *TINY, "--data", "data/none", check=False)
    assert done.returncode == 1 and re.fullmatch(r"error: there is no data at data/none.*\n", done.stderr)
    assert not Path("out").exists()


def test_damaged_shard_is_refused_before_training(workplace: Path) -> None:
    shard = Path("data/shakespeare/train_000000.bin")
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"train_000000.bin was altered"):
        run_tiny()
    assert not Path("out").exists()


def test_start_from_loaded_weights(workplace: Path) -> None:
    run_tiny("--max_steps", "2")
    source = str(checkpoints(Path("out/tiny"))[-1])
    Path("fine.toml").write_text(f'init_from = "{source}"\nrun_name = "fine"\n')
    common = ["--total_batch_size", "512", "--max_steps", "2", "--warmup_steps", "0", "--compile", "false"]
    train(
        parse_config(
            ["fine.toml", *common, "--block_size", "16", "--learning_rate", "1e-9", "--min_learning_rate", "0"]
        )
    )
    assert curve("fine", "val_loss")[-1] == pytest.approx(curve("tiny", "val_loss")[-1], abs=0.3)
    with pytest.raises(ValueError, match="n_layer 2, the settings 3"):
        train(parse_config(["fine.toml", *common, "--run_name", "other", "--n_layer", "3"]))


def test_every_id_decodes_at_the_end_of_a_long_prompt(
    workplace: Path, run_sample: Callable[..., tuple[str, str]]
) -> None:
    run_tiny("--max_steps", "2")
    text, said = run_sample("--prompt", "é" * 100, "--max_new_tokens", 8)
    assert "longer than the context; its last 32 tokens are used" in said
    assert text.startswith("é" * 100)


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--top_p", "0"], 2),
        (["--temperature", "-1"], 2),
        (["--model", "nowhere"], "error: nowhere is not a folder"),
        ([], "error: there is no trained model under out/; make one with python train.py"),
    ],
)
def test_sample_bad_input(
    workplace: Path, run_sample: Callable[..., tuple[str, str]], flags: list[str], code: int | str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: run_sample(*flags))
    assert ended.value.code == code or (isinstance(code, str) and ended.value.code.startswith(code))


def test_bench_times_training(workplace: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = "n_layer=1 n_head=1 n_embd=8 block_size=16 batch_size=2,4 total_batch_size=64 device=cpu compile=false"
    command = ["train", TINY[0], "--set", *sizes.split(), "--steps", "5", "--profile", "t.json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench.py", *command])
        bench.main()
    lines = capsys.readouterr().out.splitlines()
    rates = [float(line.split("|")[2].replace(",", "")) for line in lines if "batch_size=" in line and "|" in line]
    assert len(rates) == 2 and min(rates) > 0
    ratio = float(lines[-1].partition(": ")[2].split()[0])
    assert ratio == pytest.approx(rates[0] / rates[1], abs=0.02)
    assert json.loads(Path("t.json").read_text())["traceEvents"] and not Path("out").exists()


def test_report_keeps_what_was_printed_before_the_time_was_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, lines = tmp_path / "program.py", []
    monkeypatch.setattr(bench, "__file__", str(program))
    program.write_text("import sys, time; print('| 1 |', flush=True); time.sleep(float(sys.argv[1]))")
    assert bench.reported(["60"], lines.append, 2) == "The time was up."
    assert bench.reported(["0"], lines.append, 60) == ""
    assert bench.reported(["none"], lines.append, 60).startswith("It failed")
    assert bench.reported(["0"], lines.append, -1).startswith("Not measured")
    assert lines == ["| 1 |"] * 3


def test_report_runs_commands_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", "bench.py gpu --nanogpt clone".split())
    commands = bench.gpu_commands(bench.parse_args())
    assert len(commands) == 16 and commands[0][-2:] == ["--nanogpt", "clone"]
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["bench.py", *command])
        args = bench.parse_args()
        for flags in bench.combinations_of(args.set) if args.command == "train" else []:
            cfg = parse_config([str(ROOT / args.config), *flags])
            assert plan_batch(cfg.total_batch_size, cfg.batch_size, 1024, 1).batch_size == cfg.batch_size


def test_weights_of_another_vocabulary_than_the_data_are_refused(workplace: Path) -> None:
    """Checked against the published layout, as fine-tuning loads it; tests/test_recipes.py trains it."""
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_layer=1, n_head=2, n_embd=32)).save_pretrained("other")
    with pytest.raises(UserError, match="vocab_size 300, the data at data/shakespeare 257"):
        run_tiny("--init_from", "other", "--n_layer", "1", "--n_head", "2")


def test_a_checkpoint_answers_in_transformers_pipeline(
    workplace: Path, run_sample: Callable[..., tuple[str, str]]
) -> None:
    run_tiny()
    saved = str(checkpoints(Path("out/tiny"))[-1])
    theirs = pipeline("text-generation", model=saved)("to be", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    flags = ["--prompt", "to be", "--temperature", 0, "--max_new_tokens", 20, "--dtype", "float32"]
    assert run_sample(*flags)[0] == theirs + "\n"
