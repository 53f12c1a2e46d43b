"""Measure the speed of training, generation, data or a GPU: `python bench.py train`, `sample`, `data` or `gpu`."""

import argparse
import contextlib
import dataclasses
import gzip
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tiktoken_ext.openai_public import r50k_pat_str
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2_scratch.cli import UserError, check_new_file, count, run_script
from gpt2_scratch.config import TrainConfig, parse_config
from gpt2_scratch.cpu.decode import can_pack, prepare
from gpt2_scratch.dataset import TokenDataset, read_meta, training_batches, write_shards
from gpt2_scratch.device import describe, peak_flops, pick_device
from gpt2_scratch.generation import Generation
from gpt2_scratch.metrics import MetricsLog
from gpt2_scratch.precision import dtype_name, pick_dtype
from gpt2_scratch.rivals import RIVALS
from gpt2_scratch.sources import plays
from gpt2_scratch.tokenizer import load_tokenizer
from model import GPT, GPTConfig

ROUNDS = 5  # intervals per setting; the median is reported
SIZES = {"124m": (12, 12, 768), "350m": (24, 16, 1024), "774m": (36, 20, 1280), "1558m": (48, 25, 1600)}


def parse_args() -> argparse.Namespace:
    few, many = partial(count, most=4096), partial(count, most=10**6)
    parser = argparse.ArgumentParser(description="Measure speed. Every number printed is measured in this run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    train = commands.add_parser("train", help="train.py's loop, data included, in tokens per second")
    train.set_defaults(run=bench_train)
    train.add_argument("config", nargs="?", default="configs/gpt2_124m.toml", metavar="CONFIG.toml")
    settings = "settings of train.py; times every combination of values: batch_size=4,8 optimizer=adamw,muon"
    train.add_argument("--set", "-s", nargs="+", default=[], metavar="KEY=VALUE,VALUE", help=settings)
    train.add_argument("--steps", type=many, default=10, help="steps to time, after a fifth as warm-up (default: 10)")
    train.add_argument("--profile", type=Path, metavar="FILE", help="write a Perfetto trace of the first combination")
    for name in OTHERS:
        clone = f"also time {name} from this clone, with the sizes of the first combination"
        train.add_argument(f"--{name}", type=Path, metavar="FOLDER", help=clone)
    sample = commands.add_parser("sample", help="generation in tokens per second, compared with transformers")
    sample.set_defaults(run=bench_sample)
    sample.add_argument("--model", choices=SIZES, default="124m", help="size, with random weights (default: 124m)")
    sample.add_argument("--batch_sizes", type=few, nargs="+", default=[1, 8, 64], help="(default: 1 8 64)")
    sample.add_argument("--prompt_tokens", type=few, default=32, help="(default: 32)")
    new_tokens = partial(count, least=3, most=4096)  # transformers' first two count as start-up
    sample.add_argument("--new_tokens", type=new_tokens, default=128, help="per round (default: 128)")
    sample.add_argument("--rounds", type=many, default=3, help="the median is reported (default: 3)")
    dtypes = ["auto", "float32", "bfloat16", "float16", "int8"]
    sample.add_argument("--dtypes", nargs="+", choices=dtypes, default=["auto"], help="of our model (default: auto)")
    sample.add_argument("--device", default="auto")
    sample.add_argument("--compile", action="store_true", help="compile our decoding step")
    beside = "also time these, where installed: pip install ctranslate2; pip install xllamacpp gguf"
    sample.add_argument("--with", dest="others", nargs="+", choices=RIVALS, default=[], help=beside)
    gpu = commands.add_parser("gpu", help="both of these on a CUDA device, as a report in Markdown")
    gpu.set_defaults(run=bench_gpu)
    gpu.add_argument("--output", type=Path, default="report.md", metavar="FILE.md", help="(default: report.md)")
    gpu.add_argument("--minutes", type=few, default=15, help="what has not ended by then is left out (default: 15)")
    gpu.add_argument("--sizes", choices=SIZES, nargs="+", default=list(SIZES), help="of GPT-2 (default: all)")
    for name in OTHERS:
        gpu.add_argument(f"--{name}", type=Path, metavar="FOLDER", help=f"also time {name} from this clone")
    data = commands.add_parser("data", help="tokenizing, compared with tiktoken, and reading, in tokens per second")
    data.set_defaults(run=bench_data)
    data.add_argument("--megabytes", type=few, default=120, help="text to tokenize (default: 120)")
    data.add_argument("--workers", type=partial(count, most=256), nargs="+", default=[1, 2], help="(default: 1 2)")
    data.add_argument("--shards", type=few, default=100, help="shards of 100M tokens to read (default: 100)")
    args = parser.parse_args()
    if args.command == "sample" and args.prompt_tokens + args.new_tokens > GPTConfig.block_size:
        parser.error(f"--prompt_tokens and --new_tokens must add up to at most {GPTConfig.block_size:,}")
    return args


def seconds(function: Callable[[], object], device: torch.device | None = None) -> float:
    on_cuda = device is not None and device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    function()
    if on_cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def peak_memory() -> float:
    """This process's peak resident memory in bytes, NaN on Windows."""
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Measured(Exception):
    """Training has logged every interval that we time."""


def combinations_of(settings: list[str]) -> list[tuple[str, ...]]:
    """Flags of train.py, for each combination of the values of KEY=VALUE,VALUE."""
    pairs = [setting.partition("=")[::2] for setting in settings]
    return list(itertools.product(*([f"--{name}={value}" for value in values.split(",")] for name, values in pairs)))


def bench_train(args: argparse.Namespace) -> None:
    combinations = combinations_of(args.set)
    interval = max(1, args.steps // ROUNDS)
    fixed = {"run_name": "bench", "max_steps": interval * (ROUNDS + 1), "log_interval": interval, "eval_interval": 0}
    fixed |= {"warmup_steps": 1, "checkpoint_interval": 0, "verify_data": False, "resume": False, "wandb_project": ""}
    configs = [dataclasses.replace(parse_config([args.config, *flags]), **fixed) for flags in combinations]
    first = configs[0]
    clones = {name: clone for name in OTHERS if (clone := getattr(args, name))}
    if clones and first.batch_size == "auto":
        raise UserError("other programs cannot use batch_size=auto; set a number")
    rates: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        # Random tokens of GPT-2's vocabulary where the recipe's data is missing; their values do not affect the speed.
        ids = np.random.default_rng(0).integers(50257, size=2**22, dtype=np.uint16)
        shards = {split: write_shards(folder / "data", split, [ids], 50257) for split in ("train", "val")}
        write_meta(folder / "data", shards)
        device = describe(pick_device(first.device))
        print(f"{args.config} on {device}, torch {torch.__version__}; medians of {ROUNDS} x {interval} training steps")
        given = any(setting.startswith("data=") for setting in args.set)
        missing = not given and not Path(first.data).exists()
        if missing:
            print(f"{first.data} does not exist: random tokens of GPT-2's vocabulary instead")
        print("| settings | tokens/s | slowest | MFU | of matmul | peak GiB | start s |\n|" + "---|" * 7)
        for flags, cfg in zip(combinations, configs):
            trace = args.profile.resolve() if args.profile and not rates else None
            data = str(folder / "data" if missing else Path(cfg.data).resolve())
            settings = " ".join(flag.removeprefix("--") for flag in flags) or "unchanged"
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # for its own peak memory
                try:
                    row = pool.submit(time_training, dataclasses.replace(cfg, data=data), folder, trace).result()
                except BrokenProcessPool:
                    raise UserError(
                        f"training ({settings}) was killed, most likely for want of memory; try --set batch_size=1"
                    ) from None
            rates.append((settings, row["rate"]))
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
            speed = f"{row['rate']:,.0f} | {row['slowest']:,.0f} | {mfu} | {row['of_matmul']:.1%}"
            print(f"| {settings} | {speed} | {row['memory']:.1f} | {row['start']:.1f} |", flush=True)
        others = [(name, partial(OTHERS[name], clone)) for name, clone in clones.items()]
        if args.nanogpt and pick_device(first.device).type == "cpu" and can_pack():
            others.append(("nanogpt in bfloat16", partial(time_nanogpt, args.nanogpt, autocast=True)))
        for name, measure in others:
            rates.append((name, measure(folder / name.replace(" ", "-"), ids, first)))
            print(f"| {name}, batch_size={first.batch_size} | {rates[-1][1]:,.0f} |", flush=True)
    for settings, rate in rates[1:]:
        print(f"{rates[0][0]}: {rates[0][1] / rate:.2f} times as fast as {settings}")


def write_meta(folder: Path, shards: dict[str, list[dict]]) -> None:
    meta = {"tokenizer": "gpt2", "vocab_size": 50257, "shards": shards}
    (folder / "meta.json").write_text(json.dumps(meta))


def time_training(cfg: TrainConfig, folder: Path, trace: Path | None) -> dict[str, Any]:
    """Run train.py's loop and measure every logged interval but the first."""
    import train  # slow to import, and needed only in the process that measures

    os.chdir(folder)
    shutil.rmtree("out", ignore_errors=True)
    gpt, device = shape(cfg, read_meta(cfg.data)["vocab_size"]), pick_device(cfg.device)
    dtype, _ = pick_dtype(cfg.dtype, device, gpt, cfg.batch_size)
    cfg = dataclasses.replace(cfg, dtype=dtype_name(dtype))
    lines: list[tuple[float, dict]] = []
    profiler = torch.profiler.profile() if trace else None
    write = MetricsLog.write

    def write_timed(log: MetricsLog, metrics: dict[str, float | int]) -> None:
        write(log, metrics)
        lines.append((time.perf_counter(), metrics))
        if profiler and len(lines) == 1:
            profiler.start()
        if profiler and len(lines) == 2:
            profiler.stop()
            profiler.export_chrome_trace(str(trace))
        if len(lines) == ROUNDS + 1:
            raise Measured

    MetricsLog.write = write_timed  # type: ignore[method-assign, assignment]  # in this process only
    begin = time.perf_counter()
    with contextlib.suppress(Measured), contextlib.redirect_stdout(sys.stderr):
        train.train(cfg)
    rates = [metrics["tokens_per_sec"] for _, metrics in lines[1:]]
    rate = statistics.median(rates)
    with torch.device("meta"):
        flops = GPT(gpt).flops_per_token()
    peak = peak_flops(device)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    return {
        "rate": rate,
        "slowest": min(rates),
        "mfu": peak and rate * flops / peak,
        "of_matmul": rate * flops / matmul_flops(device, dtype),
        "memory": memory / 2**30,
        "start": lines[0][0] - begin - cfg.log_interval * cfg.total_batch_size / rate,
    }


def shape(cfg: TrainConfig, vocab_size: int = 50257) -> GPTConfig:
    """The shape that train.py builds from scratch; settings of 0 keep GPT-2 124M's."""
    sizes = {name: getattr(cfg, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    return GPTConfig(vocab_size=vocab_size, **{name: value for name, value in sizes.items() if value})


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / min(seconds(lambda: a @ a, device) for _ in range(10))


def time_nanogpt(clone: Path, folder: Path, ids: np.ndarray, cfg: TrainConfig, autocast: bool = False) -> float:
    """Tokens per second of nanoGPT's train.py with its own settings, except sizes, batch and device.

    Args:
        autocast: to bfloat16, which it leaves out on a CPU.
    """
    shutil.copytree(clone, folder, ignore=shutil.ignore_patterns(".git"))
    if autocast:
        source = (folder / "train.py").read_text(encoding="utf-8")
        changed = source.replace("nullcontext() if device_type == 'cpu' else ", "")
        if changed == source:
            raise UserError(f"{clone}/train.py does not choose its autocast as nanoGPT's does; pass a clone of nanoGPT")
        (folder / "train.py").write_text(changed, encoding="utf-8")
    (folder / "data" / "bench").mkdir(parents=True)
    for split in ("train", "val"):
        ids.tofile(folder / "data" / "bench" / f"{split}.bin")
    gpt, device = shape(cfg), pick_device(cfg.device)
    accumulation = cfg.total_batch_size // (int(cfg.batch_size) * gpt.block_size)
    flags = {"dataset": "bench", "device": device.type, "compile": device.type == "cuda", "max_iters": cfg.max_steps}
    flags |= {"n_layer": gpt.n_layer, "n_head": gpt.n_head, "n_embd": gpt.n_embd, "block_size": gpt.block_size}
    flags |= {"batch_size": cfg.batch_size, "gradient_accumulation_steps": accumulation}
    flags |= {"eval_interval": 10**9, "eval_iters": 1, "log_interval": 1} | ({"dtype": "bfloat16"} if autocast else {})
    command = ["train.py", *(f"--{name}={value}" for name, value in flags.items())]
    ms = median_printed(r"^iter \d+: .* time ([\d.]+)ms", command, folder, cfg)
    return accumulation * int(cfg.batch_size) * gpt.block_size / (ms / 1e3)


def time_build_nanogpt(clone: Path, folder: Path, ids: np.ndarray, cfg: TrainConfig) -> float:
    """Tokens per second of build-nanogpt's train_gpt2.py, compiled, with HellaSwag and its downloads stubbed out."""
    shutil.copytree(clone, folder, ignore=shutil.ignore_patterns(".git"))
    (folder / "edu_fineweb10B").mkdir()
    for split in ("train", "val"):
        np.save(folder / "edu_fineweb10B" / f"{split}.npy", ids)
    (folder / "tiktoken.py").write_text("def get_encoding(name): pass\n")  # created but not used
    (folder / "hellaswag.py").write_text("render_example = iterate_examples = None\n")
    gpt = shape(cfg)
    sizes = f"block_size={gpt.block_size}, n_layer={gpt.n_layer}, n_head={gpt.n_head}, n_embd={gpt.n_embd}"
    values = {"total_batch_size": cfg.total_batch_size, "B": cfg.batch_size, "T": gpt.block_size, "use_compile": True}
    values |= {"max_steps": cfg.max_steps, "model": f"GPT(GPTConfig(vocab_size=50304, {sizes}))"}
    source = (folder / "train_gpt2.py").read_text(encoding="utf-8")
    for name, value in values.items():
        source, n = re.subn(rf"^{name} = .*", f"{name} = {value}", source, flags=re.MULTILINE)
        if n != 1:
            raise UserError(f"{clone}/train_gpt2.py sets {name} {n} times, not once; pass a clone of build-nanogpt")
    (folder / "train_gpt2.py").write_text(source, encoding="utf-8")
    return median_printed(r"tok/sec: ([\d.]+)", ["train_gpt2.py"], folder, cfg)


OTHERS = {"nanogpt": time_nanogpt, "build_nanogpt": time_build_nanogpt}


def median_printed(pattern: str, command: list[str], folder: Path, cfg: TrainConfig) -> float:
    """Run a program and return the median of the numbers it prints, one per step, after the warm-up."""
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    printed = [float(number) for number in re.findall(pattern, done.stdout, re.MULTILINE)]
    if done.returncode or len(printed) <= cfg.log_interval:
        raise UserError(f"{command[0]} of {folder.name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return statistics.median(printed[cfg.log_interval :])


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over 1 GiB reads, best of ten."""
    block = torch.ones(2**28, device=device)
    return block.nbytes / min(seconds(block.sum, device) for _ in range(10))


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that decoding a token reads: those of every matrix product, once."""
    modules = [module for name, module in model.named_modules() if not name.endswith(".prefill")]
    weights = [getattr(m, "weight", None) for m in modules if not isinstance(m, torch.nn.Embedding)]
    return sum(weight.nbytes for weight in weights if weight is not None)


def ours(model: GPT, new_tokens: int, compile: bool, prompt: torch.Tensor) -> tuple[float, float]:
    """Seconds of start-up (cache, prefill, first token, compilation), and per later token."""
    started: list[Generation] = []

    def start() -> None:
        started.append(Generation(model, prompt.tolist(), new_tokens, temperature=0, compile=compile))
        started[0].step()[0].tolist()

    def finish() -> None:
        for _ in range(new_tokens - 1):
            started[0].step()[0].tolist()  # copied to the host, as for a reader

    return seconds(start, prompt.device), seconds(finish, prompt.device) / (new_tokens - 1)


def theirs(generate: Callable[[torch.Tensor, int], Any], new_tokens: int, prompt: torch.Tensor) -> tuple[float, float]:
    """The same for another program's `generate(prompt, n)`: seconds of the first two tokens, and per later token."""
    start = seconds(lambda: generate(prompt, 2), prompt.device)
    return start, (seconds(lambda: generate(prompt, new_tokens), prompt.device) - start) / (new_tokens - 2)


class Contender(NamedTuple):
    program: str
    dtype: str
    time: Callable[[torch.Tensor], tuple[float, float]]  # seconds of start-up and per later token, after a prompt
    weight_bytes: int  # that a token reads
    most_rows: int | None = None  # at a time


def contenders(args: argparse.Namespace, device: torch.device, folder: Path) -> Iterator[Contender]:
    """Our models and those of others. Files of converted weights go into `folder`."""
    from transformers import GPT2Config, GPT2LMHeadModel  # slow to import, and worker processes import this file

    sizes: dict[str, Any] = dict(zip(("n_layer", "n_head", "n_embd"), SIZES[args.model]))
    config = GPTConfig(**sizes)
    auto = pick_dtype("auto", device, config)[0]
    for name in args.dtypes:
        int8 = name == "int8"
        dtype = auto if name == "auto" else pick_dtype(name, device, config)[0]
        model = prepare(GPT(config).eval().to(device, dtype), int8, args.compile)
        kind = "int8" if int8 else dtype_name(dtype)
        yield Contender("gpt2-scratch", kind, partial(ours, model, args.new_tokens, args.compile), weight_bytes(model))
    supported = device.type != "cpu" or can_pack()  # else PyTorch's bfloat16 takes many times as long as float32
    for dtype in dict.fromkeys([torch.float32, *([auto] if supported else [])]):
        other = GPT2LMHeadModel(GPT2Config(**sizes)).eval().to(device, dtype)

        def generate(prompt: torch.Tensor, n: int, other: Any = other) -> None:
            other.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)

        time = partial(theirs, generate, args.new_tokens)
        yield Contender("transformers", dtype_name(dtype), time, weight_bytes(other))
    for program in args.others:
        try:
            for rival in RIVALS[program](GPT(config).eval(), folder):
                time = partial(theirs, rival.generate, args.new_tokens)
                yield Contender(program, rival.dtype, time, rival.weight_bytes, rival.most_rows)
        except ImportError as error:
            raise UserError(
                f"{program} cannot be imported ({error}); `bench.py sample --help` names its packages"
            ) from error


def bench_sample(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    if args.others and device.type != "cpu":
        raise UserError("--with times programs on the CPU; add --device cpu")
    print(
        f"GPT-2 {args.model}, {args.prompt_tokens} + {args.new_tokens} tokens, greedy, torch {torch.__version__}, "
        f"{describe(device)}; medians of {args.rounds} interleaved rounds"
    )
    print("| batch | program | dtype | start s | tokens/s | per row | weights GB/s | of bandwidth |\n|" + "---|" * 8)
    with tempfile.TemporaryDirectory() as folder:
        field = list(contenders(args, device, Path(folder)))
        for batch_size in args.batch_sizes:
            prompt = torch.randint(GPTConfig.vocab_size, (batch_size, args.prompt_tokens), device=device)
            entered = [one for one in field if batch_size <= (one.most_rows or batch_size)]
            times: list[list[tuple[float, float]]] = [[] for _ in entered]
            bandwidths = []
            for _ in range(args.rounds):
                bandwidths.append(read_bandwidth(device))
                for one, measured in zip(entered, times):
                    measured.append(one.time(prompt))
            bandwidth = statistics.median(bandwidths)
            best: dict[str, float] = {}  # seconds per token of each program, in its fastest dtype
            for one, measured in zip(entered, times):
                start, token = (statistics.median(column) for column in zip(*measured))
                best[one.program] = min(token, best.get(one.program, token))
                print(
                    f"| {batch_size} | {one.program} | {one.dtype} | {start:.2f} | {batch_size / token:.1f} | "
                    f"{1 / token:.1f} | {one.weight_bytes / token / 1e9:.1f} | "
                    f"{one.weight_bytes / token / bandwidth:.0%} |"
                )
            fastest = best.pop("gpt2-scratch")
            ratios = ", ".join(f"{token / fastest:.2f} times {program}" for program, token in best.items())
            print(f"batch {batch_size}: {ratios}, each in its fastest dtype; a sum reads {bandwidth / 1e9:.1f} GB/s")
            sys.stdout.flush()


# What to train each size with, a process each, the most telling first.
GPU_TRAINING = {
    "124m": ["batch_size=64", "batch_size=32 compile=true,false optimizer=muon,adamw"],
    "350m": ["batch_size=16", "batch_size=32"],
    "774m": ["batch_size=8", "batch_size=16"],
    "1558m": ["batch_size=4", "batch_size=8 activation_checkpointing=false"],
}
GPU_TOKENS = {"124m": 262144, "350m": 131072, "774m": 65536, "1558m": 65536}  # a step; fewer than in the recipes


def bench_gpu(args: argparse.Namespace) -> None:
    """Run the other commands on a CUDA device, one process each, and write down every line as it comes."""
    check_new_file(args.output)
    device, end = pick_device("cuda"), time.monotonic() + 60 * args.minutes
    with args.output.open("x", encoding="utf-8") as file:

        def report(line: str) -> None:
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        report(f"# {torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
        for line in device_table(device):
            report(line)
        torch.cuda.empty_cache()
        for command in gpu_commands(args):
            report(f"\n    python bench.py {' '.join(command)}\n")
            if problem := reported(command, report, end - time.monotonic()):
                report(problem)


def gpu_commands(args: argparse.Namespace) -> list[list[str]]:
    """The arguments of each run, in order."""
    training = [
        [
            *("train", f"configs/gpt2_{size}.toml", "--steps", "5"),
            *("--set", *settings.split(), f"total_batch_size={GPU_TOKENS[size]}"),
        ]
        for turn in range(2)
        for size in args.sizes
        for settings in GPU_TRAINING[size][turn : turn + 1]
    ]
    for name in OTHERS:
        if clone := getattr(args, name):
            training[0] += [f"--{name}", str(clone)]
    writing = [["sample", "--model", size, "--new_tokens", "64", "--rounds", "2"] for size in args.sizes]
    n = len(args.sizes)
    return training[:n] + writing + training[n:] + [[*command, "--compile"] for command in writing]


def reported(command: list[str], report: Callable[[str], None], seconds_left: float) -> str:
    """Run this script with other arguments and report what it prints. Returns why there is no more of it, or ""."""
    if seconds_left <= 0:
        return "Not measured: the time was up."
    run = [sys.executable, __file__, *command]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        timer = threading.Timer(seconds_left, lambda: os.killpg(process.pid, signal.SIGKILL))  # its workers as well
        timer.start()
        for line in process.stdout or ():
            report(line.rstrip("\n"))
        status = process.wait()
        timer.cancel()
    if status == -signal.SIGKILL:
        return "The time was up."
    return "" if status == 0 else "It failed, perhaps out of memory; the terminal shows why."


def device_table(device: torch.device) -> Iterator[str]:
    """What the device can do at best: products, reading, and attention of a micro-batch of GPT-2 124M."""
    dtype, peak = pick_dtype("auto", device, GPTConfig())[0], peak_flops(device)
    yield "| | measured |\n|---|---|"
    for kind in (torch.float32, dtype):
        yield f"| product of 8192 x 8192 matrices, {kind} | {matmul_flops(device, kind) / 1e12:.1f} TFLOP/s |"
    yield f"| peak that MFU is of | {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'unknown, so there is no MFU'} |"
    yield f"| reading 1 GiB | {read_bandwidth(device) / 1e9:.0f} GB/s |"
    shape = B, n_head, T, head_dim = 16, 12, 1024, 64
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    flops = 7 * B * n_head * T * T * head_dim  # two products forward and five backward, half of each masked
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):

        def step(backend: str = backend) -> None:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

        try:
            rate = f"{flops / min(seconds(step, device) for _ in range(10)) / 1e12:.1f} TFLOP/s"
        except RuntimeError as error:
            rate = f"does not run: {str(error).splitlines()[0]}"
        yield f"| {backend}, {' x '.join(map(str, shape))}, forward and backward | {rate} |"


@cache
def plain_tiktoken() -> tiktoken.Encoding:
    ranks = load_tokenizer("gpt2").encoding._mergeable_ranks
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


def count_tokens(texts: list[str]) -> int:
    return sum(len(plain_tiktoken().encode_ordinary(text)) for text in texts)


def bench_data(args: argparse.Namespace) -> None:
    plays_text = "".join(piece.text for piece in plays())
    texts, size = list[str](), 0
    while size < args.megabytes * 10**6:  # distinct documents of about 4 kB
        begin = len(texts) * 4000 % (len(plays_text) - 4000)
        texts.append(f"{len(texts)} {plays_text[begin : begin + 4000]}")
        size += len(texts[-1].encode())
    with tempfile.TemporaryDirectory() as folder:
        with gzip.open(Path(folder) / "texts.jsonl.gz", "wt", compresslevel=1) as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        batches = [texts[i : i + 256] for i in range(0, len(texts), 256)]
        for workers in args.workers:
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                pool.map(count_tokens, [["warm up"]] * workers * 4)
                begin_time = time.perf_counter()
                tokens = sum(pool.imap(count_tokens, batches))
                plain = time.perf_counter() - begin_time
            script = [sys.executable, Path(__file__).with_name("prepare_data.py"), "text", "texts.jsonl.gz"]
            command = [*script, "--workers", str(workers), "--name", f"with-{workers}"]
            whole = seconds(partial(subprocess.run, command, cwd=folder, check=True, capture_output=True))
            print(
                f"{workers} processes, {size / 1e6:.0f} MB as .jsonl.gz: {tokens / whole:,.0f} tokens/s with start-up; "
                f"tiktoken alone, from memory: {tokens / plain:,.0f}; ratio {plain / whole:.2f}",
                flush=True,
            )
        bench_reading(Path(folder), args.shards)


def bench_reading(folder: Path, n_shards: int, shard_tokens: int = 10**8) -> None:
    """Time opening and reading sparse shards of zeros."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, shard_tokens
    entries = [dict[str, Any](file=f"train_{i:06d}.bin", tokens=shard_tokens, sha256="") for i in range(n_shards)]
    for entry in entries:
        with (folder / entry["file"]).open("wb") as file:
            file.write(header.tobytes())
            file.truncate(1024 + 2 * shard_tokens)
    write_meta(folder, {"train": entries, "val": entries[:1]})
    begin = time.perf_counter()
    dataset = TokenDataset(folder, "train", 1024, verify=False)
    opened = time.perf_counter() - begin
    options = {"seed": 1, "consumed": 0, "sequences_per_step": 512, "batch_size": 32, "rank": 0, "world_size": 1}
    batches = training_batches(dataset, **options)
    first = seconds(partial(next, batches))
    before = peak_memory()
    begin, n = time.process_time(), 2000
    for _ in range(n):
        next(batches)
    rate = n / (time.process_time() - begin)
    grown = (peak_memory() - before) / 2**20
    print(
        f"{n_shards} shards, {n_shards * shard_tokens:,} tokens: opened in {opened * 1e3:.0f} ms, first batch after "
        f"{first * 1e3:.0f} ms; {rate:,.0f} batches of 32 x 1,024 and {rate * 32 * 1024:,.0f} tokens per second of "
        f"CPU time; memory grew by {grown:.1f} MiB over {n:,} batches"
    )


def main() -> None:
    args = parse_args()
    args.run(args)


if __name__ == "__main__":
    run_script(main)
