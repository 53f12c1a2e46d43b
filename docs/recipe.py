"""Run the trials behind the recipes in configs/ again, print their tables and draw them: `python docs/recipe.py`.

The networks are 64 to 384 wide and see each byte of Linux's documentation at most once; docs/performance.md says
how to prepare it. A run is a train.py process of one thread, `--jobs` of them at a time. Runs that have ended are kept
in out/, so this may be stopped and started again. All take some 140 minutes on two idle cores of an AMD EPYC.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
# width: layers, initializer_range; heads are 32 wide
SHAPE = {64: (2, 0.07), 128: (4, 0.05), 256: (8, 0.035), 384: (12, 0.029)}
SLOWER = "--warmup_steps 100 --beta2 0.99"
TUNED = {  # AdamW's best settings, found at width 128 with the trials in ADAMW; first weights go with width^-0.5
    width: f"{SLOWER} --initializer_range {spread} --schedule wsd --decay_share 0.4"
    for width, spread in ((128, 0.08), (256, 0.057), (384, 0.046))
}
RATES = {
    ("muon", 64): (8e-3, 16e-3, 32e-3),
    ("muon", 128): (5.66e-3, 11.3e-3, 22.6e-3),
    ("muon", 256): (2.83e-3, 5.66e-3, 11.3e-3),
    ("adamw", 64): (2e-3, 4e-3, 8e-3, 16e-3),
    ("adamw", 128): (2.83e-3, 5.66e-3, 11.3e-3),
    ("tuned adamw", 128): (2e-3, 2.83e-3, 4e-3, 5.66e-3),
    ("tuned adamw", 256): (1.41e-3, 2e-3, 2.83e-3),
}
PARTS = {  # what is changed in the run of Muon at PARTS_RATE and width 64
    "nothing": "",
    "momentum 0.9": "--momentum 0.9",
    "momentum 0.8": "--momentum 0.8",
    "momentum 0.9 and embeddings at twice the rate": "--momentum 0.9 --embedding_lr_scale 2",
    "embeddings at twice the rate": "--embedding_lr_scale 2",
    "embeddings at 4 times the rate": "--embedding_lr_scale 4",
    "embeddings at half the rate": "--embedding_lr_scale 0.5",
    "decay over the last 70 %": "--schedule wsd --decay_share 0.7",
    "decay over the last 40 %": "--schedule wsd --decay_share 0.4",
    "decay over the last 20 %": "--schedule wsd --decay_share 0.2",
    "no weight decay": "--weight_decay 0",
    "weight decay 0.05": "--weight_decay 0.05",
    "weight decay 0.28": "--weight_decay 0.28",
    "query, key and value apart": "--split_qkv true",
    "beta1 of the embeddings 0.8": "--beta1 0.8",
    "beta2 of the embeddings 0.9": "--beta2 0.9",
    "beta2 of the embeddings 0.99": "--beta2 0.99",
    "no warm-up": "--warmup_steps 0",
    "no clipping": "--grad_clip 0",
}
PARTS_RATE = 16e-3
ADAMW = {  # rate and what is changed in the run of AdamW at width 128
    "half the rate": (1.4e-3, ""),
    "half the rate, warm-up of 100 steps": (1.4e-3, "--warmup_steps 100"),
    "warm-up of 100 steps": (2.83e-3, "--warmup_steps 100"),
    "the same, initializer_range 0.02": (2.83e-3, "--warmup_steps 100 --initializer_range 0.02"),
    "1.4 times the rate, beta2 0.99": (4e-3, "--beta2 0.99"),
    "warm-up of 100 steps, beta2 0.99": (2.83e-3, SLOWER),
    "the same, no weight decay": (2.83e-3, f"{SLOWER} --weight_decay 0"),
    "the same, initializer_range 0.08": (2.83e-3, f"{SLOWER} --initializer_range 0.08"),
    "the same, decay over the last 40 %": (2.83e-3, f"{SLOWER} --schedule wsd --decay_share 0.4"),
    "both": (2.83e-3, TUNED[128]),
    "both, 0.12 and 1.4 times the rate": (4e-3, f"{SLOWER} --initializer_range 0.12 --schedule wsd --decay_share 0.4"),
}
RECIPE = "--momentum 0.9 --embedding_lr_scale 2"  # of Muon
BEST = {  # width: rates of the tuned AdamW and of the recipe, and seeds; those at 384 continue the trend
    128: (2.83e-3, 11.3e-3, (1, 2, 3)),
    256: (2e-3, 5.66e-3, (1, 2, 3)),
    384: (1.41e-3, 4.1e-3, (1,)),
}
NOISE = 0.02  # standard deviation of a loss between seeds, nats per byte
EXTRAPOLATE = (768, 1024, 1280, 1600)


class Trials:
    """Trains what has not been trained before, `jobs` processes at a time, and remembers the losses."""

    def __init__(self, data: str, jobs: int):
        self.data, self.pool = data, ThreadPoolExecutor(jobs)
        self.runs: dict[str, Future[float]] = {}

    def start(
        self, optimizer: str, width: int, rate: float, seed: int = 1, steps: int = 600, change: str = ""
    ) -> Future[float]:
        """The loss after `steps` of 1,024 bytes each, in nats per byte; flags in `change` override those above them."""
        name = "-".join([f"recipe-{optimizer}-{width}-{rate:g}-{seed}-{steps}", *change.replace("--", "").split()])
        layers, spread = SHAPE[width]
        flags = (
            f"--n_layer {layers} --n_head {width // 32} --n_embd {width} --initializer_range {spread} "
            f"--block_size 128 --batch_size 8 --total_batch_size 1024 --max_steps {steps} "
            f"--warmup_steps {steps // 25} --schedule linear --optimizer {optimizer} --learning_rate {rate} "
            f"--min_learning_rate 0 --weight_decay 0.1 --beta2 0.95 --momentum 0.95 --embedding_lr_scale 1 "
            f"--seed {seed} --eval_interval 0 --eval_tokens 131072 --checkpoint_interval 0 --compile false "
            f"--split_qkv false --data {self.data} --run_name {name} {change}"
        )
        if name not in self.runs:
            self.runs[name] = self.pool.submit(train, ROOT / "out" / name, flags.split())
        return self.runs[name]


def train(run: Path, flags: list[str]) -> float:
    log = run / "metrics.jsonl"
    if not log.exists() or "val_loss" not in log.read_text():
        shutil.rmtree(run, ignore_errors=True)  # it was interrupted
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "train.py", "configs/shakespeare.toml", *flags]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return json.loads(log.read_text().splitlines()[-1])["val_loss"]


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The minimum of a parabola through the losses over log(rate), kept within the rates tried."""
    a, b, _ = np.polyfit(np.log(rates), losses, 2)
    if a <= 0:
        return rates[int(np.argmin(losses))]
    return float(np.exp(np.clip(-b / (2 * a), np.log(rates[0]), np.log(rates[-1]))))


def trends(losses: dict[int, list[float]], optimizer: str, draws: int = 2000) -> np.ndarray:
    """(draws, 2): exponent and log of the factor of best rate = factor x width^exponent, for losses as measured plus
    the noise between seeds."""
    rng, lines = np.random.default_rng(0), []
    widths = sorted(losses)
    for _ in range(draws):
        best = [
            best_rate(RATES[optimizer, width], losses[width] + rng.normal(0, NOISE, len(losses[width])))
            for width in widths
        ]
        lines.append(np.polyfit(np.log(widths), np.log(best), 1))
    return np.array(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/kernel-docs", help="folder of byte shards (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: %(default)s)")
    args = parser.parse_args()
    trials, began = Trials(str(Path(args.data).resolve()), args.jobs), time.monotonic()

    grid = {}
    for (name, width), rates in RATES.items():
        change = TUNED[width] if name == "tuned adamw" else ""
        grid[name, width] = [trials.start(name.split()[-1], width, rate, change=change) for rate in rates]
    parts = {name: trials.start("muon", 64, PARTS_RATE, change=change) for name, change in PARTS.items()}
    tuning = {name: trials.start("adamw", 128, rate, change=change) for name, (rate, change) in ADAMW.items()}
    pairs = {
        (width, seed): [
            trials.start("adamw", width, adamw, seed, change=TUNED[width]),
            trials.start("muon", width, muon, seed, 360, RECIPE),
        ]
        for width, (adamw, muon, seeds) in BEST.items()
        for seed in seeds
    }

    print("| optimizer | width | rate: loss | best rate |\n|---|---|---|---|")
    losses = {key: [run.result() for run in runs] for key, runs in grid.items()}
    for (optimizer, width), found in losses.items():
        rates = RATES[optimizer, width]
        pairs_of = ", ".join(f"{rate:.3g}: {loss:.3f}" for rate, loss in zip(rates, found))
        print(f"| {optimizer} | {width} | {pairs_of} | {best_rate(rates, found):.2g} |")
    for optimizer in ("muon", "tuned adamw"):
        lines = trends({width: losses[name, width] for name, width in losses if name == optimizer}, optimizer)
        low, middle, high = np.quantile(lines[:, 0], (0.05, 0.5, 0.95))
        print(f"\n{optimizer}: best rate ~ width^{middle:.2f} (90 % of draws within {low:.2f} to {high:.2f})")
        for width in EXTRAPOLATE:
            low, middle, high = np.exp(np.quantile(lines @ (np.log(width), 1), (0.05, 0.5, 0.95)))
            print(f"  width {width}: {middle:.1e} ({low:.1e} to {high:.1e})")

    print("\n| changed | loss | gained |\n|---|---|---|")
    base = parts["nothing"].result()
    for name, run in parts.items():
        print(f"| {name} | {run.result():.3f} | {base - run.result():+.3f} |")

    print("\n| AdamW at width 128 | loss |\n|---|---|")
    for name, run in tuning.items():
        print(f"| {name} | {run.result():.3f} |")

    print("\n| width | seed | tuned AdamW, 600 steps | the recipe, 360 steps |\n|---|---|---|---|")
    for (width, seed), (adamw, recipe) in pairs.items():
        print(f"| {width} | {seed} | {adamw.result():.3f} | {recipe.result():.3f} |")
    draw(losses)
    print(f"\n{(time.monotonic() - began) / 60:.0f} minutes")


def draw(losses: dict[tuple[str, int], list[float]]) -> None:
    """Loss against learning rate at each width, with the parabola whose minimum counts as the best rate."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, optimizer in zip(axes, ("muon", "adamw")):
        for name, width in sorted(key for key in losses if key[0].endswith(optimizer)):
            rates, found = RATES[name, width], losses[name, width]
            label, style = (f"{width}, tuned", "--") if name.startswith("tuned") else (f"width {width}", "-")
            color = f"C{list(SHAPE).index(width)}"
            ax.semilogx(rates, found, "o", color=color, label=label, fillstyle="none" if style == "--" else "full")
            finer = np.geomspace(rates[0], rates[-1])
            fit = np.polyval(np.polyfit(np.log(rates), found, 2), np.log(finer))
            ax.plot(finer, fit, style, color=color)
        ticks = RATES[optimizer, 64] if optimizer == "adamw" else (4e-3, *RATES["muon", 64])
        ax.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        ax.set_xticks([], minor=True)
        ax.set(title={"muon": "Muon", "adamw": "AdamW"}[optimizer], xlabel="learning rate")
        ax.legend()
    axes[0].set_ylabel("validation loss, nats per byte")
    figure.savefig(Path(__file__).with_name("learning_rates.png"), dpi=100)


if __name__ == "__main__":
    main()
