"""Score a model: `python eval.py [MODEL] --tasks loss wikitext2 wikitext103 lambada hellaswag hellaswag_harness`.

Under torchrun the examples are shared among the processes.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gpt2_scratch.checkpoint import find_model, load_model
from gpt2_scratch.cli import UserError, count, run_script
from gpt2_scratch.dataset import open_shard, read_meta
from gpt2_scratch.device import describe, pick_dtype
from gpt2_scratch.distributed import Runtime, all_ranks_or_none, process_group, recorded
from gpt2_scratch.scoring import (
    HUB,
    Example,
    Score,
    build,
    check_fit,
    judge_all,
    not_finite,
    read_rows,
    read_text,
    sample,
    sliding,
    summarise,
)
from gpt2_scratch.tokenizer import Tokenizer, load_tokenizer
from model import GPT

SIZES = ("124M", "350M", "774M", "1558M")
# What is known of OpenAI's weights at these sizes. OpenAI's own: GPT-2's paper, table 3. The others were measured
# on its published weights: HellaSwag in llm.c's dev/data/hellaswag.py and build-nanogpt's play.ipynb, LAMBADA with
# lm-evaluation-harness, WikiText-2 as Hugging Face's guide on perplexity does it.
PUBLISHED = {
    ("wikitext2", "word_perplexity", "paper"): (29.41, 22.76, 19.93, 18.34),
    ("wikitext103", "word_perplexity", "paper"): (37.50, 26.37, 22.05, 17.48),
    ("wikitext2", "token_perplexity", "measured"): (29.94, None, 19.44, None),
    ("lambada", "acc", "paper"): (0.4599, 0.5548, 0.6012, 0.6324),
    ("lambada", "perplexity", "paper"): (35.13, 15.60, 10.87, 8.63),
    ("lambada", "acc", "measured"): (0.3256, None, None, None),
    ("lambada", "perplexity", "measured"): (40.06, None, None, None),
    ("hellaswag", "acc", "measured"): (0.2859, None, None, 0.3842),
    ("hellaswag", "acc_norm", "measured"): (0.2955, 0.3752, 0.4320, 0.4893),
    ("hellaswag_harness", "acc", "measured"): (0.2892, None, None, 0.4004),
    ("hellaswag_harness", "acc_norm", "measured"): (0.3114, None, None, 0.5089),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score a model.")
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder of a model or run, or Hugging Face name (default: the newest run)",
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=["loss", *HUB], required=True, metavar="TASK", help=", ".join(HUB)
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="score this instead of the set on the hub, in its format (.jsonl, .parquet); for loss, shards or a text",
    )
    parser.add_argument("--limit", type=count, metavar="N", help="score N examples, evenly spread (default: all)")
    parser.add_argument(
        "--stride",
        type=count,
        metavar="TOKENS",
        help="between windows, of loss and wikitext (default: context)",
    )
    parser.add_argument("--batch_size", type=partial(count, most=1024), default=16, help="rows of a pass (default: 16)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of matrix products"
    )
    args = parser.parse_args()
    if args.data and len(args.tasks) > 1:
        parser.error("--data is the data of one task; name one with --tasks")
    if "loss" in args.tasks and not args.data:
        parser.error("the task loss needs --data, a folder of token shards or a text file")
    return args


def loss(path: Path, tokenizer: Tokenizer, block_size: int, stride: int) -> list[Example]:
    """Loss (nats per token), perplexity (of tokens) and bits per byte of a text, each token scored once.

    Bits per byte compare models of different vocabularies: on the same text, that is a file, or shards of it.

    Args:
        path: a folder of token shards, whose validation split is taken, or a text file.
    """
    if path.is_dir():
        meta = read_meta(path)
        if meta["tokenizer"] != tokenizer.name and meta["vocab_size"] != tokenizer.n_vocab:
            raise UserError(
                f"{path} holds tokens of {meta['tokenizer']}, this model reads {tokenizer.name}; name a text file"
            )
        entries = meta["shards"]["val"]
        ids = np.concatenate([open_shard(path / e["file"], e["tokens"], e["sha256"]) for e in entries])
        if ids.max(initial=0) >= tokenizer.n_vocab:
            raise UserError(f"{path} holds the id {ids.max()}, outside the vocabulary of {tokenizer.n_vocab}")
        lengths = [0 if i == tokenizer.eot else len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)]
        n_bytes = int(np.array(lengths)[ids].sum())
    else:
        text = read_text(path)
        ids = [] if tokenizer.eot is None else [tokenizer.eot]
        ids, n_bytes = ids + tokenizer.encode(text), len(text.encode())
    if len(ids) < 2:
        raise UserError(f"{path} holds no text")
    return sliding(ids, block_size + 1, stride, {"loss": None, "perplexity": None, "bits_per_byte": n_bytes})


def evaluate(args: argparse.Namespace, rt: Runtime) -> None:
    source = find_model(args.model)

    def load() -> tuple[GPT, dict[str, list[Example]]]:
        if args.output and args.output.exists():
            raise UserError(f"{args.output} exists already; remove it or name another file")
        rows = {task: read_rows(task, args.data) for task in args.tasks if task != "loss"}
        model = load_model(source, dtype=torch.float32, device=rt.device).eval()
        tokenizer = load_tokenizer(source)
        if tokenizer.n_vocab > model.config.vocab_size:
            raise UserError(f"{source} has {model.config.vocab_size} tokens, its tokenizer {tokenizer.n_vocab}")
        block_size = model.config.block_size
        stride = args.stride or block_size
        if stride > block_size:
            raise UserError(f"--stride {stride} is beyond the model's context of {block_size} tokens")
        examples = {}
        for task in args.tasks:
            if task == "loss":
                examples[task] = loss(Path(args.data), tokenizer, block_size, stride)
            else:
                examples[task] = build(task, rows[task], tokenizer, block_size, stride)
        return model, {task: sample(check_fit(found, block_size), args.limit) for task, found in examples.items()}

    with all_ranks_or_none(rt):
        model, examples = load()
    dtype = pick_dtype(args.dtype, rt.device)
    if rt.is_main:
        print(f"{source} on {describe(rt.device)} in {str(dtype).removeprefix('torch.')}", file=sys.stderr)
    autocast = torch.autocast(rt.device.type, dtype, enabled=dtype != torch.float32)
    scores = {}
    for task, found in examples.items():
        with tqdm(
            total=len(found),
            desc=task,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            disable=not rt.is_main,
        ) as bar:
            sums: dict[str, tuple[float, float]] = {}

            def show(verdicts: list[dict], bar: tqdm = bar, sums: dict = sums) -> bool:
                for verdict in verdicts:
                    metric, new = next(iter(verdict.items()))
                    sums[metric] = tuple(map(sum, zip(sums.get(metric, (0, 0)), new)))
                bar.set_postfix_str(
                    ", ".join(f"{m} {s.value:.4f}" for m, s in summarise([sums]).items()), refresh=False
                )
                bar.update(min(len(verdicts) * rt.world_size, bar.total - bar.n))
                return True

            scores[task] = summarise(judge_all(model, found, args.batch_size, autocast, rt, show))
        if any(math.isnan(score.value) for score in scores[task].values()):
            with all_ranks_or_none(rt):
                raise not_finite(source, str(dtype).removeprefix("torch."))
    if rt.is_main:
        if args.output:  # before anything is printed, which can fail
            figures = {task: {name: score._asdict() for name, score in found.items()} for task, found in scores.items()}
            about = {"model": str(source), "limit": args.limit, "stride": args.stride, "dtype": str(dtype)}
            args.output.write_text(json.dumps(about | {"scores": figures}, indent=2) + "\n", encoding="utf-8")
        print(table(scores))


def table(scores: dict[str, dict[str, Score]]) -> str:
    """The scores as lines, what is known of GPT-2's published weights beside them."""
    lines = [["task", "metric", "score", "± error", "examples", *(f"GPT-2 {size}" for size in SIZES), "from"]]
    for task, found in scores.items():
        for metric, score in found.items():
            digits = 2 if metric.endswith("perplexity") else 4
            known = [(of[2], values) for of, values in PUBLISHED.items() if of[:2] == (task, metric)]
            for row, (origin, values) in enumerate(known or [("", (None,) * len(SIZES))]):
                mine = [
                    task,
                    metric,
                    f"{score.value:.{digits}f}",
                    f"{score.stderr:.{digits}f}",
                    f"{score.examples:,}",
                ]
                theirs = ["" if value is None else f"{value:.{digits}f}" for value in values]
                lines.append([*(mine if row == 0 else [""] * 5), *theirs, origin])
    lines = list(zip(*(column for column in zip(*lines) if any(column[1:]))))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def main(args: argparse.Namespace) -> None:
    with process_group(args.device) as rt:
        evaluate(args, rt)


if __name__ == "__main__":
    run_script(recorded(lambda: main(parse_args())))
