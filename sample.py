"""Write text with a trained or published model: `python sample.py --prompt "ROMEO:"`."""

import argparse
import codecs
import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from gpt2_scratch.checkpoint import find_model, load_model
from gpt2_scratch.cli import UserError, as_text, count, run_script
from gpt2_scratch.cpu.decode import kernels, prepare
from gpt2_scratch.device import describe, pick_device, pick_dtype
from gpt2_scratch.generation import Generation
from gpt2_scratch.scoring import not_finite
from gpt2_scratch.tokenizer import Tokenizer, load_tokenizer

# Compiling takes about half a minute: on CUDA long texts repay it, on a CPU none does (it gained nothing there).
COMPILE_FROM_TOKENS = {"cuda": 2000, "cpu": math.inf, "mps": math.inf}
MOST_TOKENS = 10**8  # of a batch: about 2 GB beside the model and its cache


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write text with a trained or published model.")
    what = parser.add_argument_group("what to write")
    what.add_argument("--model", help="folder of a model or run, or Hugging Face name (default: the newest run)")
    what.add_argument("--prompt", type=as_text, default="", help="text to continue (default: a document's beginning)")
    what.add_argument("--prompts_file", type=Path, metavar="FILE", help="continue each line of a file")
    what.add_argument("--interactive", action="store_true", help="ask for prompts; Ctrl-C stops a text, Ctrl-D ends")
    what.add_argument("--num_samples", type=count, default=1, metavar="N", help="texts a prompt (default: 1)")
    tokens = partial(count, most=10**6)
    what.add_argument("--max_new_tokens", type=tokens, default=500, metavar="N", help="of a text (default: 500)")
    what.add_argument(
        "--stop",
        type=as_text,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable",
    )
    what.add_argument("--ignore_eot", action="store_true", help="write on after <|endoftext|>")
    how = parser.add_argument_group("how to choose")
    how.add_argument(
        "--temperature",
        type=zero_or_more,
        default=0.8,
        metavar="T",
        help="below 1 likelier, above 1 more surprising, 0 always the likeliest token (default: 0.8)",
    )
    how.add_argument(
        "--top_k",
        type=partial(count, least=0),
        default=200,
        metavar="K",
        help="choose among the K likeliest tokens; 0: among all (default: 200)",
    )
    how.add_argument(
        "--top_p",
        type=share,
        default=0.95,
        metavar="P",
        help="choose among the likeliest tokens that hold this share of the probability (default: 0.95)",
    )
    seed = partial(count, least=0, most=2**63 - 1)
    how.add_argument("--seed", type=seed, help="same seed, same text on the same machine and dtype (default: any)")
    to = parser.add_argument_group("where to")
    to.add_argument("--output", type=Path, metavar="FILE.jsonl", help="write a JSON object a text to this new file")
    to.add_argument("--logprobs", action="store_true", help="with --output: each token and its log-probability")
    rows = partial(count, most=4096)
    to.add_argument("--batch_size", type=rows, default=8, metavar="N", help="texts at a time (default: 8)")
    on = parser.add_argument_group("on what")
    on.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    on.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16", "int8"],
        help="of the weights; int8: rounded, one scale a channel (default: auto, the fastest exact one)",
    )
    on.add_argument("--compile", action=argparse.BooleanOptionalAction, help="(default: where it repays)")
    args = parser.parse_args()
    if args.logprobs and not args.output:
        parser.error("--logprobs needs --output")
    if args.interactive and (args.prompts_file or args.output):
        parser.error("--interactive takes neither --prompts_file nor --output")
    if "" in args.stop:
        parser.error("--stop must not be empty")
    if args.batch_size * args.max_new_tokens > MOST_TOKENS:
        parser.error(f"--batch_size times --max_new_tokens must be at most {MOST_TOKENS:,}")
    return args


def number(argument: str) -> float:
    try:
        return float(argument)
    except ValueError:
        return math.nan


def zero_or_more(argument: str) -> float:
    if not 0 <= number(argument) < math.inf:
        raise argparse.ArgumentTypeError(f"{argument} is not a number of 0 or more")
    return number(argument)


def share(argument: str) -> float:
    if not 0 < number(argument) <= 1:
        raise argparse.ArgumentTypeError(f"{argument} is not a number above 0 and at most 1")
    return number(argument)


class RowText:
    """The text of one row as its tokens come in.

    Attributes:
        text: all of it so far, without what may still be the beginning of a stop string.
        finish: "eot", "stop" or, while nothing has ended it, "length".
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str], ignore_eot: bool):
        self.tokenizer, self.stops, self.ignore_eot = tokenizer, stops, ignore_eot
        # A token can end within a character; the decoder holds its bytes back until the rest has come.
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.held, self.finish = "", "", "length"

    def add(self, token: int) -> str:
        """Take a token; return the text that is now certain."""
        if token == self.tokenizer.eot and not self.ignore_eot:
            self.finish = "eot"
            return self.close()
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.finish = "stop"
            return self._release(min(found))
        # Hold back the longest end that a stop string could begin with.
        waiting = (n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n]))
        return self._release(len(self.held) - max(waiting, default=0))

    def close(self) -> str:
        """The rest of the text, once no more tokens come."""
        self.held += self.decoder.decode(b"", final=True)
        return self._release(len(self.held)) if self.finish != "stop" else ""

    def _release(self, n: int) -> str:
        certain, self.held = self.held[:n], self.held[n:]
        self.text += certain
        return certain


class Writer:
    """A model, its tokenizer and the settings of the command line."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.source = source = find_model(args.model)
        self.device = pick_device(args.device)
        int8 = args.dtype == "int8"
        dtype = pick_dtype("auto" if int8 else args.dtype, self.device, training=False)
        self.compile = args.compile
        if self.compile is None:
            self.compile = args.max_new_tokens >= COMPILE_FROM_TOKENS[self.device.type]
        with ThreadPoolExecutor(1) as pool:
            if self.device.type == "cpu" and not self.compile and (int8 or dtype == torch.bfloat16):
                pool.submit(kernels)  # compiled while the weights are read
            model = load_model(source, dtype=dtype, device=self.device)
        self.model = prepare(model, int8, self.compile)
        self.tokenizer = load_tokenizer(source)
        self.kind = "int8" if int8 else str(dtype).removeprefix("torch.")
        print(f"{source} on {describe(self.device)} in {self.kind}", file=sys.stderr)
        self.seed = int(torch.randint(2**62, ())) if args.seed is None else args.seed

    def encode(self, prompt: str) -> list[int]:
        ids = self.tokenizer.encode(prompt, allow_eot=True)
        if not ids and self.tokenizer.eot is None:
            raise UserError("this model knows no beginning of a document; give a prompt")
        ids = ids or [self.tokenizer.eot]
        block_size = self.model.config.block_size
        if len(ids) > block_size:
            print(f"the prompt is longer than the context; its last {block_size} tokens are used", file=sys.stderr)
        return ids

    def begin(self, prompts: list[list[int]], row_numbers: list[int]) -> tuple[Generation, list[RowText]]:
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
        return generation, [RowText(self.tokenizer, args.stop, args.ignore_eot) for _ in prompts]

    def stream(self, ids: list[int], row_number: int) -> Iterator[str]:
        """The continuation of one prompt, piece by piece."""
        generation, (row,) = self.begin([ids], [row_number])
        for _ in range(self.args.max_new_tokens):
            tokens, logprobs = generation.step()
            token = torch.where(logprobs.isfinite(), tokens, -1).item()  # both in one wait for the device
            if token < 0:
                raise not_finite(self.source, self.kind)
            yield row.add(token)
            if row.finish != "length":
                return
        yield row.close()

    def batch(self, prompts: list[list[int]], row_numbers: list[int]) -> list[dict]:
        """The continuations of several prompts: `text`, `finish`, and each token's id and log-probability."""
        generation, rows = self.begin(prompts, row_numbers)
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        for _ in range(self.args.max_new_tokens):
            live = list(generation.live)
            for row, token, logprob in zip(live, *(values.tolist() for values in generation.step())):
                if not math.isfinite(logprob):
                    raise not_finite(self.source, self.kind)
                tokens[row].append(token)
                logprobs[row].append(logprob)
                rows[row].add(token)
            if ended := {row for row in live if rows[row].finish != "length"}:
                generation.end(ended)
            if not generation.live:
                break
        for row in rows:
            row.close()
        return [
            {"text": row.text, "finish": row.finish, "tokens": tokens[i], "logprobs": logprobs[i]}
            for i, row in enumerate(rows)
        ]


def write_stream(writer: Writer, prompts: list[str]) -> None:
    """Print each text, every token as soon as it is drawn."""
    args = writer.args
    for number in range(len(prompts) * args.num_samples):
        prompt = prompts[number // args.num_samples]
        if len(prompts) * args.num_samples > 1:
            print(f"--- {number + 1} of {len(prompts) * args.num_samples} ---")
        print(prompt, end="", flush=True)
        for piece in writer.stream(writer.encode(prompt), number):
            print(piece, end="", flush=True)
        print()


def write_file(writer: Writer, prompts: list[str]) -> None:
    """Write a JSON object a text to the output file, several texts at a time."""
    args = writer.args
    encoded = [writer.encode(prompt) for prompt in prompts]
    numbers = range(len(prompts) * args.num_samples)
    with args.output.open("x", encoding="utf-8") as file, tqdm(total=len(numbers), unit="text") as bar:
        for first in range(0, len(numbers), args.batch_size):
            rows = list(numbers[first : first + args.batch_size])
            for number, result in zip(rows, writer.batch([encoded[n // args.num_samples] for n in rows], rows)):
                prompt, sample = divmod(number, args.num_samples)
                line = {"prompt": prompts[prompt], "sample": sample, "text": result["text"], "finish": result["finish"]}
                if args.logprobs:
                    line |= {"tokens": result["tokens"], "logprobs": result["logprobs"]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                bar.update()


def interact(writer: Writer) -> None:
    """A prompt loop. Ctrl-C stops the text, Ctrl-D ends."""
    try:
        import readline  # noqa: F401  (line editing and history of input())
    except ImportError:
        pass  # Windows edits lines in the terminal itself
    number = 0
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            print(prompt, end="", flush=True)
            for piece in writer.stream(writer.encode(prompt), number):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        print()
        number += 1


def sample(args: argparse.Namespace) -> None:
    if args.output and args.output.exists():
        raise UserError(f"{args.output} exists already; remove it or name another file")
    prompts = [args.prompt]
    if args.prompts_file:
        if not args.prompts_file.is_file():
            raise UserError(f"there is no file {args.prompts_file}")
        try:
            prompts = args.prompts_file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{args.prompts_file} is not UTF-8; convert it") from error
        if prompts == [""]:
            raise UserError(f"{args.prompts_file} has no line")
    writer = Writer(args)
    if args.interactive:
        interact(writer)
    elif args.output:
        write_file(writer, prompts)
    else:
        write_stream(writer, prompts)


if __name__ == "__main__":
    run_script(lambda: sample(parse_args()))
