"""Scores of a model: how likely it finds texts, and which of several endings.

An example is a few rows of tokens and a judge, which turns their likelihoods into sums and counts; a score is the
ratio of both over all examples. So one loop scores every task, over rows of any length and several processes.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from gpt2_scratch.checkpoint import load_model
from gpt2_scratch.cli import UserError
from gpt2_scratch.distributed import Runtime
from gpt2_scratch.sources import require_datasets
from gpt2_scratch.tokenizer import Tokenizer
from model import GPT

HELLASWAG = {"endings": list, "label": (str, int)}
# Where the tasks' data lies on the Hugging Face hub: dataset, configuration, split, and the fields that are read.
HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", {"text": str}),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "test", {"text": str}),
    "lambada": ("EleutherAI/lambada_openai", "default", "test", {"text": str}),
    "hellaswag": ("Rowan/hellaswag", None, "validation", {"ctx": str, **HELLASWAG}),
    "hellaswag_harness": (
        *("Rowan/hellaswag", None, "validation"),
        {"activity_label": str, "ctx_a": str, "ctx_b": str, **HELLASWAG},
    ),
}
POSITIONS = 2048  # whose logits are in memory at a time: 412 MB in float32 with GPT-2's vocabulary


class Row(NamedTuple):
    """Token ids; the last `scored` of them are to be predicted, each from all before it."""

    ids: Sequence[int] | np.ndarray
    scored: int


class Likelihood(NamedTuple):
    """Of the scored tokens of a row."""

    logprob: float  # their sum, nats
    greedy: bool  # each is the likeliest one


@dataclass(frozen=True)
class Example:
    rows: list[Row]
    judge: Callable[[list[Likelihood]], dict[str, tuple[float, float]]]  # metric: (sum, count)


class Score(NamedTuple):
    value: float
    stderr: float  # NaN for a single example
    examples: int


@torch.no_grad()
def likelihoods(model: GPT, rows: list[Row], autocast: AbstractContextManager) -> list[Likelihood]:
    """Of rows of any length, in one pass. The model is in evaluation mode."""
    device = model.wte.weight.device
    longest = max(len(row.ids) for row in rows) - 1
    idx = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):  # padded on the right, where nothing before it sees it
        idx[i, : len(row.ids) - 1] = torch.as_tensor(np.asarray(row.ids[:-1], np.int64))
    counts = torch.tensor([row.scored for row in rows])
    # The row and position of each scored token, and its id: (N,) each.
    of_row = torch.arange(len(rows)).repeat_interleave(counts)
    position = torch.cat([torch.arange(len(row.ids) - 1 - row.scored, len(row.ids) - 1) for row in rows])
    targets = torch.cat([torch.as_tensor(np.asarray(row.ids[-row.scored :], np.int64)) for row in rows])
    with autocast:
        x = model.ln_f(model.hidden(idx.to(device)))[of_row.to(device), position.to(device)]  # (N, n_embd)
    logprobs, greedy = [], []
    for part, wanted in zip(x.split(POSITIONS), targets.to(device).split(POSITIONS)):
        with autocast:
            logits = model.lm_head(part)[:, : model.config.vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs.append(-F.cross_entropy(logits, wanted, reduction="none").cpu().double())
        greedy.append((logits.argmax(dim=-1) == wanted).cpu())
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, of_row, torch.cat(logprobs))
    right = torch.zeros(len(rows), dtype=torch.int64).index_add_(0, of_row, torch.cat(greedy).long())
    return [Likelihood(*values) for values in zip(sums.tolist(), (right == counts).tolist())]


def nonfinite_tensor(model: GPT) -> str | None:
    """The name of a parameter that holds a NaN or an infinity, or None."""
    return next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)


def not_finite(source: str | Path, kind: str) -> UserError:
    """Why a model's logits are not finite, found by reading its weights again: checking them all slows every start.

    Args:
        kind: the dtype that it ran in.
    """
    if name := nonfinite_tensor(load_model(source)):
        return UserError(f"{source} has values in {name} that are not finite; use another checkpoint")
    advice = "" if kind == "float32" else "; try --dtype float32"
    return UserError(f"{source} has finite weights, but makes logits that are not finite in {kind}{advice}")


def judge_all(
    model: GPT,
    examples: list[Example],
    batch_size: int,
    autocast: AbstractContextManager,
    rt: Runtime,
    progress: Callable[[list[dict]], bool] = lambda verdicts: True,
) -> list[dict[str, tuple[float, float]]]:
    """The judges' verdicts, in the order of the examples. Each process takes its share; all get all.

    Args:
        batch_size: rows of a pass, at least.
        progress: called with the new verdicts of this process after each pass; False breaks off. Then the result
            is incomplete.
    """
    block_size = model.config.block_size
    order = sorted(range(len(examples)), key=lambda i: -max(len(row.ids) for row in examples[i].rows))
    mine = order[rt.rank :: rt.world_size]
    verdicts: dict[int, dict] = {}
    while len(verdicts) < len(mine):
        batch: list[int] = []
        rows: list[Row] = []
        for i in mine[len(verdicts) :]:
            batch.append(i)
            # Of a context that is too long the beginning is left out, as lm-evaluation-harness does it.
            rows += [Row(row.ids[-(block_size + 1) :], row.scored) for row in examples[i].rows]
            if len(rows) >= batch_size:
                break
        found = iter(likelihoods(model, rows, autocast))
        verdicts |= {i: _judged(examples[i], [next(found) for _ in examples[i].rows]) for i in batch}
        if not progress([verdicts[i] for i in batch]):
            break
    shares = [verdicts]
    if rt.world_size > 1:
        shares = [{} for _ in range(rt.world_size)]
        dist.all_gather_object(shares, verdicts)
    everyones = {i: verdict for share in shares for i, verdict in share.items()}
    return [everyones[i] for i in sorted(everyones)]


def _judged(example: Example, found: list[Likelihood]) -> dict[str, tuple[float, float]]:
    verdict = example.judge(found)
    if all(math.isfinite(likelihood.logprob) for likelihood in found):
        return verdict
    return {metric: (math.nan, n) for metric, (_, n) in verdict.items()}  # a choice among NaNs would look like any


def check_fit(examples: list[Example], block_size: int) -> list[Example]:
    """The examples. Raises UserError: one has more tokens to predict than the model's context."""
    for number, example in enumerate(examples, start=1):
        if (scored := max(row.scored for row in example.rows)) > block_size:
            raise UserError(f"example {number} has {scored} tokens to predict, and the context is {block_size} tokens")
    return examples


def summarise(verdicts: list[dict[str, tuple[float, float]]]) -> dict[str, Score]:
    """Each metric over all examples: sum of sums by sum of counts, with the standard error of that ratio.

    With counts of 1 it is the mean and its standard error. Perplexities are e to the ratio, bits are nats by ln 2,
    their errors to first order (the delta method).
    """
    scores = {}
    for metric in dict.fromkeys(metric for verdict in verdicts for metric in verdict):
        sums, counts = np.array([verdict[metric] for verdict in verdicts if metric in verdict]).T
        n, value = len(sums), sums.sum() / counts.sum()
        spread = ((sums - value * counts) ** 2).sum()
        error = math.sqrt(spread * n / (n - 1)) / counts.sum() if n > 1 else math.nan
        if metric.endswith("perplexity"):
            value = np.exp(value)
            error *= value
        elif metric.startswith("bits"):
            value, error = value / math.log(2), error / math.log(2)
        scores[metric] = Score(float(value), float(error), n)
    return scores


def sample(examples: list[Any], limit: int | None) -> list[Any]:
    """So many of them, evenly spread: many test sets are sorted by source."""
    n = len(examples)
    return examples if limit is None or limit >= n else [examples[i * n // limit] for i in range(limit)]


def read_rows(task: str, file: str | None = None) -> list[dict[str, Any]]:
    """The rows of a task's test set: from the Hugging Face hub, or a file of the same fields.

    Args:
        file: JSON lines, Parquet, or for WikiText its text.

    Raises:
        UserError: it cannot be had, or is not in the task's format.
    """
    dataset, config, split, fields = HUB[task]
    if file is None:
        require_datasets()
        from datasets import load_dataset  # training does without it
        from datasets.exceptions import DatasetsError

        try:
            rows = list(load_dataset(dataset, config, split=split))
        except (DatasetsError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{dataset} cannot be had from the hub ({reason}); name a file of it") from error
    else:
        rows = _read_file(Path(file), as_text=task.startswith("wikitext"))
    for number, row in enumerate(rows, start=1):
        for name, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                raise UserError(
                    f"{file or dataset}, row {number}: no {name!r} such as {task} has; is it that test set?"
                )
    if not rows:
        raise UserError(f"{file or dataset} is empty")
    return rows


def read_text(path: Path) -> str:
    """Raises UserError: there is no such file, or it is not UTF-8."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; convert it") from error


def _read_file(path: Path, as_text: bool) -> list[Any]:
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow
        from pyarrow import parquet

        try:
            return parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}") from error
    lines = read_text(path).splitlines(keepends=True)
    if path.suffix not in (".json", ".jsonl"):
        if not as_text:
            raise UserError(f"{path} is neither .jsonl nor .parquet")
        return [{"text": line if line.strip() else ""} for line in lines]  # as the hub has its lines
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not a JSON object") from error
    return rows


def build(task: str, rows: list[dict[str, Any]], tokenizer: Tokenizer, block_size: int, stride: int) -> list[Example]:
    """The examples of one of the tasks of HUB."""
    if task.startswith("wikitext"):
        return wikitext(rows, tokenizer, block_size, stride)
    make = {"lambada": lambada, "hellaswag": hellaswag, "hellaswag_harness": hellaswag_harness}[task]
    return [make(row, tokenizer) for row in rows]


def hellaswag(row: dict[str, Any], tokenizer: Tokenizer) -> Example:
    """Zellers et al. (2019), as build-nanogpt and llm.c count it: of four endings the likeliest is chosen.

    acc by the sum of log-probabilities, acc_norm by their mean. Context and ending are tokenised apart.
    """
    context = tokenizer.encode(row["ctx"])
    endings = [tokenizer.encode(" " + ending) for ending in row["endings"]]
    rows = [Row(context + ending, len(ending)) for ending in endings]
    return Example(rows, partial(_choice, _label(row), [len(ending) for ending in endings]))


def hellaswag_harness(row: dict[str, Any], tokenizer: Tokenizer) -> Example:
    """The same as lm-evaluation-harness counts it: its text clean-up, tokenised as one; acc_norm by characters."""

    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))  # WikiHow's marks
        return text.replace("  ", " ")

    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    endings = [clean(ending) for ending in row["endings"]]
    rows = [_continued(context, " " + ending, tokenizer) for ending in endings]
    return Example(rows, partial(_choice, _label(row), [len(ending) for ending in endings]))


def _label(row: dict[str, Any]) -> int:
    label = str(row["label"])
    if not label.isdecimal() or int(label) >= len(row["endings"]):
        raise UserError(f"HellaSwag's label is {label!r}; the validation split has numbers of the endings, 0 to 3")
    return int(label)


def _choice(label: int, lengths: list[int], found: list[Likelihood]) -> dict[str, tuple[float, float]]:
    logprobs = np.array([likelihood.logprob for likelihood in found])
    normed = logprobs / np.maximum(lengths, 1)
    return {"acc": (float(logprobs.argmax() == label), 1), "acc_norm": (float(normed.argmax() == label), 1)}


def lambada(row: dict[str, Any], tokenizer: Tokenizer) -> Example:
    """Paperno et al. (2016) in OpenAI's version, as lm-evaluation-harness counts it: the last word of a passage.

    acc: greedy decoding would write it. perplexity: of the word, not of its tokens.
    """
    context, _, word = row["text"].rpartition(" ")

    def judge(found: list[Likelihood]) -> dict[str, tuple[float, float]]:
        return {"acc": (float(found[0].greedy), 1), "perplexity": (-found[0].logprob, 1)}

    return Example([_continued(context, " " + word, tokenizer)], judge)


def _continued(context: str, ending: str, tokenizer: Tokenizer) -> Row:
    """Context and ending tokenised as one text, spaces between them counted as the ending's."""
    bare = context.rstrip()
    whole, before = tokenizer.encode(context + ending), tokenizer.encode(bare)
    if not before:
        before, whole = [_beginning(tokenizer)], [_beginning(tokenizer), *whole]
    return Row(whole, max(1, len(whole) - len(before)))


def _beginning(tokenizer: Tokenizer) -> int:
    if tokenizer.eot is None:
        raise UserError("a text has no context, and this model knows no beginning of a document")
    return tokenizer.eot


def wikitext(rows: list[dict[str, Any]], tokenizer: Tokenizer, block_size: int, stride: int) -> list[Example]:
    """Merity et al. (2016) in two counts.

    token_perplexity: of the raw text, as Hugging Face's guide on perplexity has it: lines joined by two line ends,
    windows of block_size tokens, the first token of a window never scored.
    word_perplexity: of the text as it was before it was cut into words (GPT-2's paper, section 3.1), over the words
    and line ends that the benchmark counts.
    """
    raw = tokenizer.encode("\n\n".join(row["text"] for row in rows))
    text = "".join(row["text"] or "\n" for row in rows)
    before = [] if tokenizer.eot is None else [tokenizer.eot]
    plain = [*before, *tokenizer.encode(detokenized(text))]
    words = len(text.split()) + text.count("\n")
    return [
        *sliding(raw, block_size, stride, {"token_perplexity": None}),
        *sliding(plain, block_size + 1, stride, {"word_perplexity": words}),
    ]


def detokenized(text: str) -> str:
    """WikiText's words put together again to the text that they were cut from."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)  # inside words and numbers
    text = re.sub(r" ([.,:;!?)\]}]|'s\b|'(?=[ \n])|n't\b)", r"\1", text)
    text = re.sub(r"([(\[{£$]) ", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) ?"', r'"\1"', text)
    text = re.sub(r"(?<==) (?==)", "", text)  # = = Heading = =
    return re.sub(r"(?m)^ | $", "", text)


def sliding(ids: Sequence[int] | np.ndarray, size: int, stride: int, counts: dict[str, float | None]) -> list[Example]:
    """Windows of `size` tokens, `stride` apart; each scores the tokens that none before it has, but never its first.

    Args:
        counts: for each metric what the summed nats are divided by, such as bytes; None: scored tokens.
    """
    rows, end = [], 0
    for begin in range(0, len(ids), stride):
        last = min(begin + size, len(ids))
        if (scored := min(last - end, last - begin - 1)) > 0:
            rows.append(Row(ids[begin:last], scored))
        end = last
        if last == len(ids):
            break
    total = sum(row.scored for row in rows)

    def judge(scored: int, found: list[Likelihood]) -> dict[str, tuple[float, float]]:
        nats = -found[0].logprob
        return {name: (nats, scored if count is None else count * scored / total) for name, count in counts.items()}

    return [Example([row], partial(judge, row.scored)) for row in rows]
