"""Two nodes without a common file system: they do the same, or say at once, on both, in what they differ."""

import hashlib
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, TINY

from gpt2_scratch.checkpoint import checkpoint_problem, checkpoints, step_of
from gpt2_scratch.dataset import write_shards
from gpt2_scratch.tokenizer import load_tokenizer

# Runs every case in one process a node, so that torch is imported once; `patch` is code for this node alone.
DRIVER = """
import contextlib, io, json, os, sys, time
root, folder, rank = sys.argv[1:]
sys.path.insert(0, root)
import train
from gpt2_scratch import checkpoint, device, distributed
from gpt2_scratch.cli import UserError
from gpt2_scratch.config import parse_config
os.chdir(folder)
save = checkpoint.CheckpointWriter.save  # waits here, or one is left out while the one before is being written
checkpoint.CheckpointWriter.save = lambda *args, wait=True: save(*args, wait=True)
os.environ |= {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
for case in json.load(open("cases.json")):
    os.environ["MASTER_PORT"] = str(case["port"])
    kept = {module: dict(vars(module)) for module in (checkpoint, device, distributed, train)}
    exec(case["patch"])
    out, began, end = io.StringIO(), time.monotonic(), ""
    with contextlib.redirect_stdout(out):
        try:
            train.train(parse_config(case["flags"]))
        except UserError as error:
            end = str(error)
    for module, names in kept.items():
        vars(module).update(names)
    with open("results.jsonl", "a") as file:
        said = out.getvalue().splitlines()
        result = {"name": case["name"], "end": end, "seconds": time.monotonic() - began, "said": said}
        print(json.dumps(result), file=file)
"""
FLAGS = [*TINY, "--batch_size", "4", "--timeout", "20", "--eval_interval", "4"]
OTHERS = {
    "learning_rate": "0.1", "seed": "7", "optimizer": "adamw", "dtype": "bfloat16", "grad_clip": "2", "n_embd": "16",
    "total_batch_size": "1024", "max_steps": "11", "eval_interval": "5", "checkpoint_interval": "3", "parallel": "fsdp",
    "reduce_dtype": "bfloat16",
}  # fmt: skip
DRIFT = """
step = train.learning_rate_at
def bent(n, **settings):
    if n == 6:
        import gc
        model = next(o for o in gc.get_objects() if type(o) is train.GPT and o.wte.weight.device.type == "cpu")
        model.h[0].mlp.c_fc.weight.data[0, 0] += 1e-3
    return step(n, **settings)
train.learning_rate_at = bent
"""
SLOW = """
write, passage = checkpoint.CheckpointWriter._write, train.write_passage
def slowly(*args):
    time.sleep(8)
    return write(*args)
checkpoint.CheckpointWriter._write = slowly
train.write_passage = lambda *args: (time.sleep(8), passage(*args))
"""


def prepare(folder: Path, seed: int) -> None:
    tokenizer, rng = load_tokenizer("bytes"), np.random.default_rng(seed)
    folder.mkdir(parents=True)
    text = " ".join(rng.choice(["to", "be", "or", "not", "that", "is"], 4000))
    ids = np.array([256, *tokenizer.encode(text)])
    parts = {"train": ids, "val": ids[:5000]}
    shards = {split: write_shards(folder, split, [part], 257) for split, part in parts.items()}
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 257, "shards": shards}))


def alter(path: Path) -> None:
    """A checkpoint of the same step from elsewhere: whole, and other weights."""
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    sums = (path / "SHA256SUMS").read_text().splitlines()
    new = hashlib.sha256(content).hexdigest()
    (path / "SHA256SUMS").write_text("".join(f"{new if 'model' in line else line[:64]}{line[64:]}\n" for line in sums))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two nodes, once all cases have run there; results.jsonl says how."""
    place = tmp_path_factory.mktemp("nodes")
    folders = [place / "node0", place / "node1"]
    for folder in folders:
        prepare(folder / "data" / "shakespeare", 0)
    prepare(folders[1] / "data" / "other", 1)
    first: list[dict] = []
    second: list[dict] = []

    def case(
        cases: list[dict], name: str, *own: str, both: tuple[str, ...] = (), patch: tuple[str, str] = ("", "")
    ) -> None:
        flags = [*FLAGS, "--run_name", name, *both]
        cases.append({"name": name, "flags": [flags, [*flags, *own]], "patch": patch, "port": free_port()})

    case(first, "same")
    case(first, "micro_batches", "--batch_size", "2")
    for setting, value in OTHERS.items():
        case(first, f"other_{setting}", f"--{setting}", value)
    case(first, "other_data", "--data", "data/other")
    case(first, "no_data", "--data", "data/none")
    case(first, "other_program", patch=("", "distributed.program_version = lambda: 'another'"))
    case(first, "drift", patch=("", DRIFT))
    case(first, "slow", both=("--timeout", "6", "--max_steps", "4"), patch=(SLOW, ""))
    for name in (
        "first_only",
        "second_only",
        "second_only_without_metrics",
        "second_lags",
        "second_damaged",
        "second_all_damaged",
        "same_step_from_elsewhere",
        "lost",
        "new",
    ):
        case(second, name, both=("--resume",))
    case(second, "fsdp_damaged", both=("--resume", "--parallel", "fsdp"))
    for cases in (first, second):
        if cases is second:
            lay_out_checkpoints(*(folder / "out" for folder in folders))
        running = []
        for rank, folder in enumerate(folders):
            own = [case | {key: case[key][rank] for key in ("flags", "patch")} for case in cases]
            (folder / "cases.json").write_text(json.dumps(own))
            command = [sys.executable, "-c", DRIVER, str(ROOT), str(folder), str(rank)]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        errors = [process.communicate(timeout=300)[1] for process in running]
        assert [process.returncode for process in running] == [0, 0], errors
    return folders


def lay_out_checkpoints(*out: Path) -> None:
    """Runs that ended after step 8, as two nodes may find them."""
    on_both = ("second_lags", "second_damaged", "second_all_damaged", "same_step_from_elsewhere", "fsdp_damaged")
    for name in ("first_only", "lost", *on_both):
        shutil.copytree(out[0] / "same", out[0] / name)
        shutil.rmtree(out[0] / name / "checkpoints" / "step_00000012")
    for name in ("second_only", "second_only_without_metrics"):
        shutil.copytree(out[0] / "first_only", out[1] / name)
    (out[1] / "second_only_without_metrics" / "metrics.jsonl").unlink()
    for name in on_both:
        shutil.copytree(out[0] / name, out[1] / name)
    shutil.rmtree(out[1] / "second_lags" / "checkpoints" / "step_00000008")
    for name in ("second_damaged", "fsdp_damaged"):
        (out[1] / name / "checkpoints" / "step_00000008" / "model.safetensors").write_bytes(b"")
    for path in (out[1] / "second_all_damaged" / "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"")
    alter(out[1] / "same_step_from_elsewhere" / "checkpoints" / "step_00000008")
    shutil.rmtree(out[0] / "lost" / "checkpoints")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def results(nodes: list[Path], name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for node in nodes for line in (node / "results.jsonl").read_text().splitlines()]
    return [line for line in lines if line["name"] == name]


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "step_00000012" / "model.safetensors").read_bytes()


def curve(node: Path, run: str) -> list[float]:
    lines = map(json.loads, (node / "out" / run / "metrics.jsonl").read_text().splitlines())
    return [line["train_loss"] for line in lines if "train_loss" in line]


def refusal(nodes: list[Path], name: str) -> str:
    """The one sentence that both nodes say."""
    first, second = results(nodes, name)
    assert first["end"] == second["end"] != "" and "\n" not in first["end"], (first, second)
    assert "lost the others" not in first["end"] and "delete" not in first["end"]
    return first["end"]


def test_nodes_that_agree_train_as_one_process(nodes: list[Path]) -> None:
    for name in ("same", "micro_batches"):
        assert [result["end"] for result in results(nodes, name)] == ["", ""]
    assert curve(nodes[0], "micro_batches") == pytest.approx(curve(nodes[0], "same"), abs=1e-5)


@pytest.mark.parametrize("setting", OTHERS)
def test_another_setting_on_one_node_is_named_with_both_values(nodes: list[Path], setting: str) -> None:
    said = refusal(nodes, f"other_{setting}")
    assert f"{setting} is " in said and OTHERS[setting] in said and "rank 0 on " in said and "rank 1 on " in said
    assert not any((node / "out" / f"other_{setting}").exists() for node in nodes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("other_data", ["fingerprint of the data", "rank 0 on", "rank 1 on"]),
        ("no_data", ["there is no data at data/none", "rank 1 on"]),
        ("other_program", ["program is ", '"another" at rank 1 on', "rank 0 on"]),
    ],
)
def test_what_one_node_lacks_or_has_otherwise_is_named_on_both(
    nodes: list[Path], name: str, expected: list[str]
) -> None:
    said = refusal(nodes, name)
    assert all(part in said for part in expected), said
    assert "rank 0" in said if name != "no_data" else "rank 0" not in said
    assert not any((node / "out" / name).exists() for node in nodes)


@pytest.mark.parametrize("name", ["first_only", "second_only", "second_lags", "second_damaged", "second_all_damaged"])
def test_the_newest_valid_checkpoint_of_any_node_is_gone_on_with(nodes: list[Path], name: str) -> None:
    assert [result["end"] for result in results(nodes, name)] == ["", ""]
    assert any(line.startswith("resuming from") and "step_00000008" in line for line in results(nodes, name)[0]["said"])
    assert weights(nodes[0] / "out" / name) == weights(nodes[0] / "out" / "same")
    assert curve(nodes[0], name) == curve(nodes[0], "same"), "the lines of metrics come along"
    newest = [path for node in nodes for path in checkpoints(node / "out" / name) if step_of(path) >= 8]
    assert len(newest) >= 3 and all(checkpoint_problem(path) is None for path in newest), (
        "what was handed over is whole"
    )


def test_metrics_come_with_a_checkpoint(nodes: list[Path]) -> None:
    """Node 1 may have to go on without node 0, or be rank 0 next time."""
    assert curve(nodes[1], "first_only") == curve(nodes[0], "same")[: len(curve(nodes[1], "first_only"))] != []


def test_missing_metrics_do_not_keep_a_run_from_going_on(nodes: list[Path]) -> None:
    name = "second_only_without_metrics"
    first, second = results(nodes, name)
    assert first["end"] == second["end"] == "" and any("the metrics begin anew" in line for line in first["said"])
    assert weights(nodes[0] / "out" / name) == weights(nodes[0] / "out" / "same")
    assert curve(nodes[0], name) == curve(nodes[0], "same")[-len(curve(nodes[0], name)) :]


def test_weights_that_are_damaged_on_one_node_are_not_mixed_in(nodes: list[Path]) -> None:
    assert [result["end"] for result in results(nodes, "fsdp_damaged")] == ["", ""]
    assert curve(nodes[0], "fsdp_damaged") == pytest.approx(curve(nodes[0], "same"), abs=1e-4)


def test_another_checkpoint_of_the_same_step_is_refused(nodes: list[Path]) -> None:
    said = refusal(nodes, "same_step_from_elsewhere")
    assert "step_00000008/SHA256SUMS" in said and "rank 0 on " in said and "rank 1 on " in said


def test_a_run_without_checkpoints_begins_only_where_none_was_lost(nodes: list[Path]) -> None:
    assert "had come to step_00000012, but no valid checkpoint of it is left" in refusal(nodes, "lost")
    first, second = results(nodes, "new")
    assert first["end"] == second["end"] == "" and "beginning at step 0" in first["said"][0]


def test_copies_of_the_model_that_drift_apart_end_the_run(nodes: list[Path]) -> None:
    said = refusal(nodes, "drift")
    assert "after step 8 the weights of rank 1 are not those of rank 0" in said and "step_00000004" in said
    assert [path.name for path in checkpoints(nodes[0] / "out" / "drift")] == ["step_00000004"]


def test_work_of_the_first_process_alone_does_not_count_against_the_timeout(nodes: list[Path]) -> None:
    """Writing the last checkpoint and the passage: eight seconds each here, with a timeout of six."""
    assert [result["end"] for result in results(nodes, "slow")] == ["", ""]
