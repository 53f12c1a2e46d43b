"""Generate text with a trained or published model: `python sample.py --prompt "ROMEO:"`."""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gpt2_scratch.checkpoint import find_model, load_model_and_tokenizer
from gpt2_scratch.cli import UserError, as_text, check_new_file, count, number, run_script
from gpt2_scratch.cpu.decode import kernels, prepare
from gpt2_scratch.device import describe, pick_device
from gpt2_scratch.generation import Generation
from gpt2_scratch.precision import dtype_name, pick_dtype
from gpt2_scratch.scoring import not_finite
from gpt2_scratch.sources import read_text
from gpt2_scratch.tokenizer import Tokenizer
from model import GPTConfig

# Compiling takes about half a minute. On CUDA it pays off for long texts; on a CPU it gains nothing.
COMPILE_FROM_TOKENS = {"cuda": 2000, "cpu": math.inf, "mps": math.inf}
MAX_BATCH_TOKENS = 10**8  # about 2 GB on top of the model and its cache


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate text with a trained or published model.")
    what = parser.add_argument_group("text")
    what.add_argument("--model", help="model folder, run or Hugging Face name (default: the newest run)")
    what.add_argument("--prompt", type=as_text, default="", help="text to continue (default: start a document)")
    what.add_argument("--prompts_file", type=Path, metavar="FILE", help="continue each line of a file")
    what.add_argument("--interactive", action="store_true", help="ask for prompts; Ctrl-C stops a text, Ctrl-D exits")
    what.add_argument("--num_samples", type=count, default=1, metavar="N", help="texts per prompt (default: 1)")
    tokens = partial(count, most=10**6)
    what.add_argument("--max_new_tokens", type=tokens, default=500, metavar="N", help="per text (default: 500)")
    stop = "stop before this text; repeatable"
    what.add_argument("--stop", type=as_text, action="append", default=[], metavar="TEXT", help=stop)
    what.add_argument("--ignore_eot", action="store_true", help="continue past <|endoftext|>")

    how = parser.add_argument_group("sampling")
    temperature = partial(number, valid=lambda x: 0 <= x < math.inf, expected="a number of 0 or more")
    top_k = partial(count, least=0)
    top_p = partial(number, valid=lambda x: 0 < x <= 1, expected="above 0 and at most 1")
    seed = partial(count, least=0, most=2**63 - 1)
    greedy = "divides the logits; 0 is greedy (default: 0.8)"
    how.add_argument("--temperature", type=temperature, default=0.8, metavar="T", help=greedy)
    likeliest = "sample from the K likeliest tokens; 0: from all (default: 200)"
    how.add_argument("--top_k", type=top_k, default=200, metavar="K", help=likeliest)
    nucleus = "sample from the fewest tokens with total probability P (default: 0.95)"
    how.add_argument("--top_p", type=top_p, default=0.95, metavar="P", help=nucleus)
    how.add_argument("--seed", type=seed, help="same text on the same machine with the same dtype (default: random)")

    to = parser.add_argument_group("output")
    to.add_argument("--output", type=Path, metavar="FILE.jsonl", help="write one JSON object per text to a new file")
    to.add_argument("--logprobs", action="store_true", help="with --output: add tokens and their log-probabilities")
    rows = partial(count, most=4096)
    to.add_argument("--batch_size", type=rows, default=8, metavar="N", help="texts at a time (default: 8)")

    on = parser.add_argument_group("hardware")
    on.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    dtypes = ["auto", "float32", "bfloat16", "float16", "int8"]
    weights = "of the weights; int8 is quantized per channel (default: auto, the fastest without quantization)"
    on.add_argument("--dtype", default="auto", choices=dtypes, help=weights)
    on.add_argument("--compile", action=argparse.BooleanOptionalAction, help="(default: if it pays off)")
    args = parser.parse_args()
    if args.logprobs and not args.output:
        parser.error("--logprobs needs --output")
    if args.interactive and (args.prompts_file or args.output):
        parser.error("--interactive takes neither --prompts_file nor --output")
    if "" in args.stop:
        parser.error("--stop must not be empty")
    if args.batch_size * args.max_new_tokens > MAX_BATCH_TOKENS:
        parser.error(f"--batch_size times --max_new_tokens must be at most {MAX_BATCH_TOKENS:,}")
    return args


class Text:
    """Decodes the tokens that continue a prompt as they arrive, and finds the text's end.

    Attributes:
        text: the text so far, except for what may turn out to be a stop string.
        finish: "eot", "stop", or "length" while nothing else has ended it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: list[str], ignore_eot: bool):
        self.eot, self.stops, self.ignore_eot = tokenizer.eot, stops, ignore_eot
        self.stream = tokenizer.stream([token for token in prompt if token != tokenizer.eot])
        self.text, self.held, self.finish = "", "", "length"

    def add(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        if token == self.eot and not self.ignore_eot:
            self.finish = "eot"
            return self.close()
        self.held += self.stream.add(token)
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.finish = "stop"
            return self._release(min(found))
        # Hold back the longest suffix that a stop string starts with.
        waiting = (n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n]))
        return self._release(len(self.held) - max(waiting, default=0))

    def close(self) -> str:
        """Return the rest of the text; call when no more tokens follow."""
        self.held += self.stream.close()
        return self._release(len(self.held)) if self.finish != "stop" else ""

    def _release(self, n: int) -> str:
        certain, self.held = self.held[:n], self.held[n:]
        self.text += certain
        return certain


class Sampler:
    """A loaded model with its tokenizer and the command line's settings."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.source = find_model(args.model)
        self.device = pick_device(args.device)
        int8 = args.dtype == "int8"
        self.compile = args.compile
        if self.compile is None:
            self.compile = args.max_new_tokens >= COMPILE_FROM_TOKENS[self.device.type]
        reason = ""

        def dtype_of(config: GPTConfig) -> torch.dtype:
            nonlocal reason
            dtype, reason = pick_dtype(args.dtype, self.device, config)
            if self.device.type == "cpu" and not self.compile and (int8 or dtype == torch.bfloat16):
                pool.submit(kernels)  # compile them while the weights load
            return dtype

        with ThreadPoolExecutor(1) as pool:
            model, self.tokenizer = load_model_and_tokenizer(self.source, dtype=dtype_of, device=self.device)
        self.kind = "int8" if int8 else dtype_name(model.wte.weight.dtype)
        self.model = prepare(model, int8, self.compile)
        print(f"{self.source} on {describe(self.device)} in {self.kind}{reason and f' ({reason})'}", file=sys.stderr)
        self.seed = int(torch.randint(2**62, ())) if args.seed is None else args.seed

    def encode(self, prompt: str) -> list[int]:
        ids = self.tokenizer.encode(prompt, allow_eot=True)
        if not ids and self.tokenizer.eot is None:
            raise UserError("this model has no <|endoftext|> to start a document with; give a prompt")
        ids = ids or [self.tokenizer.eot]
        block_size = self.model.config.block_size
        if len(ids) > block_size:
            print(f"the prompt is longer than the context; its last {block_size} tokens are used", file=sys.stderr)
        return ids

    def start(self, prompts: list[list[int]], row_numbers: list[int]) -> tuple[Generation, list[Text]]:
        args = self.args
        generation = Generation(
            self.model,
            prompts,
            args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k or None,
            top_p=args.top_p,
            seed=self.seed,
            row_numbers=row_numbers,
            compile=self.compile,
        )
        return generation, [Text(self.tokenizer, prompt, args.stop, args.ignore_eot) for prompt in prompts]

    def stream(self, ids: list[int], row_number: int) -> Iterator[str]:
        """Continue one prompt, yielding text as it becomes certain."""
        generation, (text,) = self.start([ids], [row_number])
        for _ in range(self.args.max_new_tokens):
            tokens, logprobs = generation.step()
            token = int(torch.where(logprobs.isfinite(), tokens, -1))  # one device sync instead of two
            if token < 0:
                raise not_finite(self.source, self.kind)
            yield text.add(token)
            if text.finish != "length":
                return
        yield text.close()

    def batch(self, prompts: list[list[int]], row_numbers: list[int]) -> list[dict]:
        """Continue several prompts at once: `text`, `finish`, and the ids and log-probabilities of the tokens."""
        generation, texts = self.start(prompts, row_numbers)
        tokens: list[list[int]] = [[] for _ in texts]
        logprobs: list[list[float]] = [[] for _ in texts]
        for _ in range(self.args.max_new_tokens):
            live = list(generation.live)
            for row, token, logprob in zip(live, *(values.tolist() for values in generation.step())):
                if not math.isfinite(logprob):
                    raise not_finite(self.source, self.kind)
                tokens[row].append(token)
                logprobs[row].append(logprob)
                texts[row].add(token)
            if ended := {row for row in live if texts[row].finish != "length"}:
                generation.end(ended)
            if not generation.live:
                break
        for text in texts:
            text.close()
        return [
            {"text": text.text, "finish": text.finish, "tokens": tokens[row], "logprobs": logprobs[row]}
            for row, text in enumerate(texts)
        ]


def write_stdout(sampler: Sampler, prompts: list[str]) -> None:
    """Print each text token by token."""
    num_samples = sampler.args.num_samples
    total = len(prompts) * num_samples
    for index in range(total):
        if total > 1:
            print(f"--- {index + 1} of {total} ---")
        print_text(sampler, prompts[index // num_samples], index)
        print()


def print_text(sampler: Sampler, prompt: str, row_number: int) -> None:
    print(prompt, end="", flush=True)
    for piece in sampler.stream(sampler.encode(prompt), row_number):
        print(piece, end="", flush=True)


def write_file(sampler: Sampler, prompts: list[str]) -> None:
    """Write one JSON object per text to the output file, sampling in batches."""
    args = sampler.args
    encoded = [sampler.encode(prompt) for prompt in prompts]
    total = len(prompts) * args.num_samples
    with args.output.open("x", encoding="utf-8") as file, tqdm(total=total, unit="text") as bar:
        for first in range(0, total, args.batch_size):
            rows = list(range(first, min(first + args.batch_size, total)))
            for index, result in zip(rows, sampler.batch([encoded[i // args.num_samples] for i in rows], rows)):
                prompt, number = divmod(index, args.num_samples)
                line = {"prompt": prompts[prompt], "sample": number} | result
                if not args.logprobs:
                    del line["tokens"], line["logprobs"]
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                bar.update()


def interact(sampler: Sampler) -> None:
    """Ask for prompts until Ctrl-D; Ctrl-C stops the current text."""
    try:
        import readline  # noqa: F401  (line editing and history for input())
    except ImportError:
        pass  # on Windows the terminal does it
    stdin: Any = sys.stdin
    if not stdin.isatty():
        stdin.reconfigure(encoding="utf-8-sig")  # as files are read
    row_number = 0
    while True:
        try:
            prompt = input("> ").removesuffix("\r")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        with suppress(KeyboardInterrupt):
            print_text(sampler, prompt, row_number)
        print()
        row_number += 1


def sample(args: argparse.Namespace) -> None:
    if args.output:
        check_new_file(args.output)
    prompts = [args.prompt]
    if args.prompts_file:
        prompts = re.split(r"\r?\n", re.sub(r"\r?\n\Z", "", read_text(args.prompts_file)))
        if prompts == [""]:
            raise UserError(f"{args.prompts_file} has no lines")
    sampler = Sampler(args)
    if args.interactive:
        interact(sampler)
    elif args.output:
        write_file(sampler, prompts)
    else:
        write_stdout(sampler, prompts)


if __name__ == "__main__":
    run_script(lambda: sample(parse_args()))
