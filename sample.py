"""Write text with a trained or published model: `python sample.py --prompt "ROMEO:"`."""

import argparse
import codecs
import math
import sys
from pathlib import Path

import torch

from checkpoint import newest_checkpoint
from model import GPT
from runtime import describe, pick_device, pick_dtype, run_script
from tokenizer import load_tokenizer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write text with a trained or published model.")
    parser.add_argument("--prompt", default="", help="text to continue (default: a document's beginning)")
    parser.add_argument("--model", help="checkpoint folder or Hugging Face name (default: the newest run under out/)")
    parser.add_argument("--num_samples", type=above_zero, default=1, metavar="N", help="texts to write (default: 1)")
    parser.add_argument(
        "--max_new_tokens", type=above_zero, default=500, metavar="N", help="of each text (default: 500)"
    )
    parser.add_argument(
        "--temperature",
        type=zero_or_more,
        default=0.8,
        metavar="T",
        help="below 1 likelier, above 1 more surprising, 0 always the likeliest token (default: 0.8)",
    )
    parser.add_argument(
        "--top_k", type=above_zero, metavar="K", help="choose among the K likeliest tokens (default: all)"
    )
    parser.add_argument(
        "--top_p",
        type=share,
        default=0.95,
        metavar="P",
        help="choose among the likeliest tokens that hold this share of the probability (default: 0.95)",
    )
    parser.add_argument(
        "--seed", type=int, help="same seed, same text on the same machine (default: another each time)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    return parser.parse_args()


def above_zero(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def zero_or_more(text: str) -> float:
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return float(text)


def share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return float(text)


def sample(args: argparse.Namespace) -> None:
    """Print the texts, each token as soon as it is drawn."""
    source = args.model or newest_checkpoint(Path("out"))
    if source is None:
        raise ValueError("there is no trained model under out/; run python train.py, or name one with --model")
    picked = pick_device(args.device)
    dtype = pick_dtype("auto", picked)
    gpt = GPT.from_pretrained(source, dtype=dtype, device=picked)
    tokenizer = load_tokenizer(source)
    print(f"{source} on {describe(picked)}", file=sys.stderr)

    ids = tokenizer.encode(args.prompt, allow_eot=True) or [tokenizer.eot]
    if len(ids) > gpt.config.block_size:
        ids = ids[-gpt.config.block_size :]
        print(f"the prompt is longer than the context; its last {len(ids)} tokens are used", file=sys.stderr)
    generator = torch.Generator(picked)
    generator.manual_seed(args.seed) if args.seed is not None else generator.seed()
    for number in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- {number + 1} of {args.num_samples} ---")
        # An id can end within a character; the decoder holds its bytes back until the rest has come.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        print(args.prompt, end="", flush=True)
        stream = gpt.stream(
            torch.tensor([ids], device=picked), args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator
        )
        for token in stream:
            if token.item() == tokenizer.eot:
                break
            print(decoder.decode(tokenizer.decode_bytes(token.tolist())), end="", flush=True)
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    arguments = parse_args()
    run_script(lambda: sample(arguments))
