"""Kill training processes at random moments, go on from what they left, and compare with runs left in peace.

    python tests/soak_kill.py --kills 200 [--processes 2] [--parallel fsdp] [--seed 1]

It is the default recipe, `python train.py`, with fewer steps and more checkpoints and evaluations. The weights and the
metrics must be the same bit for bit. With several processes one of them is killed, and torchrun brings the group back.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVAL_INTERVAL = 4
FLAGS = f"--max_steps 150 --eval_interval {EVAL_INTERVAL} --eval_tokens 2048 --checkpoint_interval 3 --log_interval 1"


def soak(folder: Path, kills: int, processes: int = 1, seed: int = 0, parallel: str = "ddp") -> Counter:
    """Kill that often, in as many runs as it takes. Returns how often it was in what.

    Raises:
        AssertionError: a run ended badly, or differs from the one left in peace.
    """
    rng = random.Random(seed)
    disturb(folder, "peace", 0, processes, rng, parallel)
    counted: Counter = Counter()
    for n in range(kills):
        if counted.total() < kills:
            counted += disturb(folder, f"run_{n}", kills - counted.total(), processes, rng, parallel)
            assert weights(folder, f"run_{n}") == weights(folder, "peace"), f"the weights of run_{n} differ"
            assert metrics(folder, f"run_{n}") == metrics(folder, "peace"), f"the metrics of run_{n} differ"
            print(f"run_{n}: as the one left in peace; killed so far: {dict(counted)}", flush=True)
    return counted


def disturb(folder: Path, run: str, kills: int, processes: int, rng: random.Random, parallel: str) -> Counter:
    """Make one run, from the first process that starts it to the one that ends it."""
    counted: Counter = Counter()
    log = folder / f"{run}.log"
    process, lives = None, 0
    while True:
        if process is None:
            process = subprocess.Popen(
                command(run, processes, parallel),
                cwd=folder,
                stdout=log.open("a"),
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        begun = wait_for(
            lambda n=lives, p=process: p.poll() is not None or log.read_text().count(" parameters on ") > n
        )
        assert begun, f"no training within two minutes; see {log}:\n{log.read_text()[-2000:]}"
        lives += 1
        if counted.total() < kills:
            time.sleep(rng.uniform(0, 1.5))
            victims = children(process.pid) if processes > 1 else [process.pid]
            if process.poll() is None and victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
                counted[activity(folder / "out" / run)] += 1
                if processes == 1:
                    process.wait()
                    process = None
                continue
        assert process.wait(timeout=300) == 0, f"{run} ended badly:\n{log.read_text()[-2000:]}"
        return counted


def command(run: str, processes: int, parallel: str) -> list[object]:
    script = [ROOT / "train.py", *FLAGS.split(), "--run_name", run]
    if processes == 1:
        return [sys.executable, *script, "--resume"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1000"]
    return [*torchrun, f"--nproc_per_node={processes}", *script, "--parallel", parallel]


def wait_for(condition: object, seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


def activity(run: Path) -> str:
    """What a run was at, as far as its folder tells."""
    if list(run.glob("checkpoints/.step_*")):
        return "writing a checkpoint"
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    last = json.loads(lines[-1]) if lines and lines[-1].endswith("}") else {}
    return "evaluation" if last.get("step", 1) % EVAL_INTERVAL == 0 and "val_loss" not in last else "steps"


def weights(folder: Path, run: str) -> bytes:
    return (max((folder / "out" / run / "checkpoints").glob("step_*")) / "model.safetensors").read_bytes()


def metrics(folder: Path, run: str) -> list[dict]:
    lines = (folder / "out" / run / "metrics.jsonl").read_text().splitlines()
    return [{key: v for key, v in json.loads(line).items() if key != "tokens_per_sec"} for line in lines]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--parallel", default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        soak(Path(directory), args.kills, args.processes, args.seed, args.parallel)
