"""Measure speed: `python bench.py sample` of writing text, beside transformers; `python bench.py data` of data."""

import argparse
import functools
import gzip
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cli import run_script
from dataset import TokenDataset, training_batches
from inference import prepare
from model import GPT, Generation, GPTConfig
from runtime import describe, pick_device, pick_dtype
from sources import plays
from tokenizer import load_tokenizer

SIZES = {"124m": (12, 12, 768), "350m": (24, 16, 1024), "774m": (36, 20, 1280), "1558m": (48, 25, 1600)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure speed; nothing is printed that this run did not measure.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    sample = commands.add_parser("sample", help="tokens per second of writing text, beside transformers' generate")
    sample.add_argument("--model", choices=SIZES, default="124m", help="size, with random weights (default: 124m)")
    sample.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 64], help="(default: 1 8 64)")
    sample.add_argument("--prompt_tokens", type=int, default=32, help="(default: 32)")
    sample.add_argument("--new_tokens", type=int, default=128, help="a round (default: 128)")
    sample.add_argument("--rounds", type=int, default=3, help="medians of so many (default: 3)")
    sample.add_argument("--dtypes", nargs="+", default=["auto"], help="ours: auto, float32, bfloat16, float16, int8")
    sample.add_argument("--device", default="auto")
    sample.add_argument("--compile", action="store_true", help="ours: compiled steps")
    sample.set_defaults(run=bench_sample)
    data = commands.add_parser("data", help="tokens per second of preparing data, beside tiktoken, and of reading it")
    data.add_argument("--megabytes", type=int, default=120, help="text to prepare (default: 120)")
    data.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    data.add_argument("--shards", type=int, default=100, help="to read, of 100M tokens each (default: 100)")
    data.set_defaults(run=bench_data)
    return parser.parse_args()


def seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over 1 GiB reads, the best of ten."""
    block = torch.ones(2**28, device=device)
    return block.nbytes / min(seconds(block.sum, device) for _ in range(10))


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes that one token reads: the weights of all products, each once."""
    total = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and not isinstance(module, torch.nn.Embedding):
            total += weight.numel() * weight.element_size()
    return total


def ours(model: GPT, prompt: list[list[int]], new_tokens: int, compile: bool, device: torch.device) -> tuple:
    """Seconds of start-up (cache, prefill and the first token; compilation) and of each later token."""
    made: list[Generation] = []

    def begin() -> None:
        made.append(Generation(model, prompt, new_tokens, temperature=0, compile=compile))
        made[0].step()[0].tolist()

    def go_on() -> None:
        for _ in range(new_tokens - 1):
            made[0].step()[0].tolist()  # to the host, as a reader of the text would have it

    return seconds(begin, device), seconds(go_on, device) / (new_tokens - 1)


def theirs(model: GPT2LMHeadModel, prompt: torch.Tensor, new_tokens: int, device: torch.device) -> tuple:
    """The same of transformers' generate: the time of two tokens, and of each one beyond."""

    def generate(n: int) -> None:
        model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)

    few = seconds(lambda: generate(2), device)
    return few, (seconds(lambda: generate(new_tokens), device) - few) / (new_tokens - 2)


def bench_sample(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    n_layer, n_head, n_embd = SIZES[args.model]
    bandwidth = read_bandwidth(device)
    print(
        f"GPT-2 {args.model}, {args.prompt_tokens} + {args.new_tokens} tokens, greedy, torch {torch.__version__}, "
        f"{describe(device)}, reads {bandwidth / 1e9:.1f} GB/s; medians of {args.rounds} rounds in turn"
    )
    print("| batch | program | dtype | start s | tokens/s | per row | weights GB/s | of bandwidth |\n|" + "---|" * 8)
    config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    half = pick_dtype("auto", device, training=False)
    contenders: dict[tuple[str, str], Callable] = {}
    sizes: dict[tuple[str, str], int] = {}

    for name in args.dtypes:
        int8 = name == "int8"
        dtype = pick_dtype("auto" if int8 else name, device, training=False)
        model = prepare(GPT(config).eval().to(device, dtype), int8, args.compile)
        key = ("gpt2-scratch", "int8" if int8 else str(dtype).removeprefix("torch."))
        contenders[key] = lambda prompt, model=model: ours(
            model, prompt.tolist(), args.new_tokens, args.compile, device
        )
        sizes[key] = weight_bytes(model)
    for dtype in dict.fromkeys([torch.float32, half]):
        hf = GPT2LMHeadModel(GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)).eval().to(device, dtype)
        key = ("transformers", str(dtype).removeprefix("torch."))
        contenders[key] = lambda prompt, hf=hf: theirs(hf, prompt, args.new_tokens, device)
        sizes[key] = weight_bytes(hf)

    for batch_size in args.batch_sizes:
        prompt = torch.randint(config.vocab_size, (batch_size, args.prompt_tokens), device=device)
        rounds: dict[tuple[str, str], list[tuple]] = {key: [] for key in contenders}
        for _ in range(args.rounds):
            for key, run in contenders.items():
                rounds[key].append(run(prompt))
        per_token = {key: statistics.median(token for _, token in times) for key, times in rounds.items()}
        for key, times in rounds.items():
            start, token = statistics.median(start for start, _ in times), per_token[key]
            rate = sizes[key] / token
            print(
                f"| {batch_size} | {key[0]} | {key[1]} | {start:.2f} | {batch_size / token:.1f} | {1 / token:.1f} | "
                f"{rate / 1e9:.1f} | {rate / bandwidth:.0%} |"
            )
        best_hf = min(token for key, token in per_token.items() if key[0] == "transformers")
        first = next(iter(contenders))
        print(f"batch {batch_size}: {best_hf / per_token[first]:.2f} times transformers' better dtype", flush=True)


cached_tokenizer = functools.cache(load_tokenizer)


def count_tokens(texts: list[str]) -> int:
    """What plain tiktoken does to them."""
    encoding = cached_tokenizer("gpt2").encoding
    return sum(len(encoding.encode_ordinary(text)) for text in texts)


def bench_data(args: argparse.Namespace) -> None:
    plays_text = "".join(piece.text for piece in plays())
    texts, size = [], 0
    while size < args.megabytes * 10**6:  # documents of about 4 kB, no two alike
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
            begin_time = time.perf_counter()
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            whole = time.perf_counter() - begin_time
            print(
                f"{workers} processes, {size / 1e6:.0f} MB as .jsonl.gz: {tokens / whole:,.0f} tokens/s with start-up; "
                f"tiktoken alone, from memory: {tokens / plain:,.0f}; ratio {plain / whole:.2f}",
                flush=True,
            )
        bench_reading(Path(folder), args.shards)


def bench_reading(folder: Path, n_shards: int, shard_tokens: int = 10**8) -> None:
    """Open and read shards of zeros, which take no room: what it costs to find and read the windows."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, shard_tokens
    entries = [{"file": f"train_{i:06d}.bin", "tokens": shard_tokens, "sha256": ""} for i in range(n_shards)]
    for entry in entries:
        with (folder / entry["file"]).open("wb") as file:
            file.write(header.tobytes())
            file.truncate(1024 + 2 * shard_tokens)
    meta = {"tokenizer": "gpt2", "vocab_size": 50257, "shards": {"train": entries, "val": entries[:1]}}
    (folder / "meta.json").write_text(json.dumps(meta))
    begin = time.perf_counter()
    dataset = TokenDataset(folder, "train", 1024, verify=False)
    opened = time.perf_counter() - begin
    options = {"seed": 1, "consumed": 0, "step_windows": 512, "batch_size": 32, "rank": 0, "world_size": 1}
    batches = training_batches(dataset, **options)
    begin = time.perf_counter()
    next(batches)
    first = time.perf_counter() - begin
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, n = time.process_time(), 2000
    for _ in range(n):
        next(batches)
    rate = n / (time.process_time() - begin)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{n_shards} shards, {n_shards * shard_tokens:,} tokens: opened in {opened * 1e3:.0f} ms, first batch after "
        f"{first * 1e3:.0f} ms; {rate:,.0f} batches of 32 x 1,024 and {rate * 32 * 1024:,.0f} tokens a second of one "
        f"core; memory grew by {grown:.1f} MiB over {n:,} batches"
    )


if __name__ == "__main__":
    arguments = parse_args()
    run_script(lambda: arguments.run(arguments))
