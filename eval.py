"""Score a model: `python eval.py [MODEL] --tasks loss wikitext2 wikitext103 lambada hellaswag hellaswag_harness`.

torchrun splits the examples among the processes.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gpt2_scratch.checkpoint import find_model, load_model_and_tokenizer
from gpt2_scratch.cli import UserError, check_new_file, count, run_script
from gpt2_scratch.dataset import open_shard, read_meta
from gpt2_scratch.device import autocast_to, describe
from gpt2_scratch.distributed import Runtime, all_ranks_or_none, process_group, recorded
from gpt2_scratch.metrics import for_json
from gpt2_scratch.precision import dtype_name, pick_dtype
from gpt2_scratch.scoring import (
    HUB,
    Example,
    Score,
    Verdict,
    build,
    check_fit,
    judge_all,
    not_finite,
    read_rows,
    sliding,
    subset,
    summarize,
)
from gpt2_scratch.sources import documents, is_stream
from gpt2_scratch.tokenizer import Tokenizer, check_vocabulary
from model import GPT

SIZES = ("124M", "350M", "774M", "1558M")
# Published scores of OpenAI's weights at these sizes. "paper": GPT-2's paper, table 3. "measured": HellaSwag by llm.c
# (dev/data/hellaswag.py) and build-nanogpt (play.ipynb), LAMBADA by lm-evaluation-harness, WikiText-2 by Hugging Face's
# guide on perplexity.
PUBLISHED: dict[tuple[str, str, str], tuple[float | None, ...]] = {
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
        help="model folder, run or Hugging Face name (default: the newest run)",
    )
    tasks = ["loss", *HUB]
    parser.add_argument("--tasks", nargs="+", choices=tasks, required=True, metavar="TASK", help=", ".join(tasks))
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="a file of rows (.jsonl, .parquet, ...) like the task's test set on the hub; for loss, token shards or a "
        "file of text",
    )
    parser.add_argument("--limit", type=count, metavar="N", help="score N evenly spaced examples (default: all)")
    parser.add_argument(
        "--stride", type=count, metavar="TOKENS", help="of the sliding window of loss and wikitext (default: context)"
    )
    parser.add_argument("--batch_size", type=partial(count, most=1024), default=16, help="rows per pass (default: 16)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the scores as JSON")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or mps (default: the best available)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="of matrix products")
    args = parser.parse_args()
    if args.data and len(args.tasks) > 1:
        parser.error("--data is for a single task; give one with --tasks")
    if "loss" in args.tasks and not args.data:
        parser.error("the task loss needs --data, a folder of token shards or a file of text")
    return args


def loss(path: Path, source: str | Path, tokenizer: Tokenizer, block_size: int, stride: int) -> list[Example]:
    """Loss (nats per token), token perplexity and bits per byte of a text; each token is scored once.

    Bits per byte are comparable across vocabularies, on the same text.

    Args:
        path: a folder of token shards, of which the validation split is scored, or a file that prepare_data.py reads.
    """
    if path.is_dir():
        meta = read_meta(path)
        check_vocabulary(tokenizer, source, path, meta)
        entries = meta["shards"]["val"]
        ids: Any = np.concatenate([open_shard(path / e["file"], e["tokens"], e["sha256"]) for e in entries])
        if ids.max(initial=0) >= tokenizer.n_vocab:
            raise UserError(f"{path} contains id {ids.max()}, outside the vocabulary of {tokenizer.n_vocab}")
        n_bytes = tokenizer.count_bytes(ids)
    else:
        ids, n_bytes = [], 0
        for text in filter(None, documents(path)):
            ids += [] if tokenizer.eot is None else [tokenizer.eot]
            ids += tokenizer.encode(text)
            n_bytes += len(text.encode())
    if len(ids) < 2:
        raise UserError(f"{path} contains no text")
    return sliding(ids, block_size + 1, stride, {"loss": None, "perplexity": None, "bits_per_byte": n_bytes})


def load(args: argparse.Namespace, source: Path | str, device: torch.device) -> tuple[GPT, dict[str, list[Example]]]:
    """The model and the examples of each task."""
    if args.output:
        check_new_file(args.output)
    rows = {task: read_rows(task, args.data) for task in args.tasks if task != "loss"}  # fail before loading the model
    model, tokenizer = load_model_and_tokenizer(source, dtype=torch.float32, device=device)
    block_size = model.config.block_size
    stride = args.stride or block_size
    if stride > block_size:
        raise UserError(f"--stride {stride} exceeds the model's context of {block_size} tokens")
    examples = {}
    for task in args.tasks:
        if task == "loss":
            found = loss(Path(args.data), source, tokenizer, block_size, stride)
        else:
            found = build(task, rows[task], tokenizer, block_size, stride)
        examples[task] = subset(check_fit(found, block_size), args.limit)
    return model, examples


def score(
    model: GPT, task: str, examples: list[Example], batch_size: int, dtype: torch.dtype, rt: Runtime
) -> dict[str, Score]:
    """Score a task, showing the running scores of this rank's examples."""
    sums: Verdict = {}
    interval = 0.5 if sys.stderr.isatty() else 10
    with tqdm(total=len(examples), desc=task, dynamic_ncols=True, mininterval=interval, disable=not rt.is_main) as bar:

        def show(verdicts: list[Verdict]) -> bool:
            for verdict in verdicts:
                metric, (value, n) = next(iter(verdict.items()))
                before = sums.get(metric, (0.0, 0.0))
                sums[metric] = before[0] + value, before[1] + n
            running = ", ".join(f"{metric} {score.value:.4f}" for metric, score in summarize([sums]).items())
            bar.set_postfix_str(running, refresh=False)
            bar.update(min(len(verdicts) * rt.world_size, bar.total - bar.n))
            return True

        return summarize(judge_all(model, examples, batch_size, autocast_to(dtype, rt.device), rt, show))


def evaluate(args: argparse.Namespace, rt: Runtime) -> None:
    source = find_model(args.model)
    with all_ranks_or_none(rt):
        if rt.world_size > 1 and args.data and is_stream(args.data):
            raise UserError(f"{args.data} can be read only once, and there are {rt.world_size} processes; give a file")
        model, examples = load(args, source, rt.device)
    dtype, reason = pick_dtype(args.dtype, rt.device, model.config, args.batch_size, rt)
    kind = dtype_name(dtype)
    if rt.is_main:
        print(f"{source} on {describe(rt.device)} in {dtype_name(dtype, reason)}", file=sys.stderr)
    scores = {}
    for task, found in examples.items():
        scores[task] = score(model, task, found, args.batch_size, dtype, rt)
        if any(math.isnan(metric.value) for metric in scores[task].values()):
            with all_ranks_or_none(rt):
                raise not_finite(source, kind)
    if rt.is_main:
        if args.output:  # first, because printing can fail
            results = {
                task: {name: for_json(s._asdict()) for name, s in found.items()} for task, found in scores.items()
            }
            about = {"model": str(source), "limit": args.limit, "stride": args.stride, "dtype": str(dtype)}
            args.output.write_text(json.dumps(about | {"scores": results}, indent=2) + "\n", encoding="utf-8")
        print(table(scores))


def table(scores: dict[str, dict[str, Score]]) -> str:
    """Format the scores beside the published ones of GPT-2."""
    lines = [["task", "metric", "score", "± error", "examples", *(f"GPT-2 {size}" for size in SIZES), "from"]]
    for task, found in scores.items():
        for metric, score in found.items():
            digits = 2 if metric.endswith("perplexity") else 4
            ours = [task, metric, f"{score.value:.{digits}f}", f"{score.stderr:.{digits}f}", f"{score.examples:,}"]
            published = [(key[2], values) for key, values in PUBLISHED.items() if key[:2] == (task, metric)]
            for origin, values in published or [("", (None,) * len(SIZES))]:
                theirs = ["" if value is None else f"{value:.{digits}f}" for value in values]
                lines.append([*ours, *theirs, origin])
                ours = [""] * 5
    columns = [column for column in zip(*lines) if any(column[1:])]
    padded = []
    for i, column in enumerate(columns):
        width = max(map(len, column))
        padded.append([cell.ljust(width) if i < 2 else cell.rjust(width) for cell in column])
    return "\n".join(map("  ".join, zip(*padded)))


def main(args: argparse.Namespace) -> None:
    with process_group(args.device) as rt:
        evaluate(args, rt)


if __name__ == "__main__":
    run_script(recorded(lambda: main(parse_args())))
