"""Measure how fast text is written: `python bench.py sample --model 124m`, beside transformers in the same run."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cli import run_script
from inference import prepare
from model import GPT, Generation, GPTConfig
from runtime import describe, pick_device, pick_dtype

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


if __name__ == "__main__":
    arguments = parse_args()
    run_script(lambda: bench_sample(arguments))
