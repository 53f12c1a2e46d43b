"""Evaluation tasks: perplexities and multiple choice.

An example is some rows of tokens and a judge, which turns the rows' likelihoods into a (sum, count) for each metric. A
score is the sum of sums over the sum of counts. So one loop runs every task, whatever the row lengths and world size.
"""

import io
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

from gpt2_scratch import sources
from gpt2_scratch.checkpoint import load_model
from gpt2_scratch.cli import UserError
from gpt2_scratch.device import attention_of_varying_shapes
from gpt2_scratch.distributed import Runtime
from gpt2_scratch.sources import hub_errors, require_datasets, split_name
from gpt2_scratch.tokenizer import Tokenizer
from model import GPT

HELLASWAG = {"endings": list, "label": (str, int)}
# The tasks' test sets on the Hugging Face hub: dataset, configuration, split, and the fields used.
HUB: dict[str, tuple[str, str | None, str, dict[str, Any]]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", {"text": str}),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "test", {"text": str}),
    "lambada": ("EleutherAI/lambada_openai", "default", "test", {"text": str}),
    "hellaswag": ("Rowan/hellaswag", None, "validation", {"ctx": str, **HELLASWAG}),
    "hellaswag_harness": (
        *("Rowan/hellaswag", None, "validation"),
        {"activity_label": str, "ctx_a": str, "ctx_b": str, **HELLASWAG},
    ),
}
POSITIONS = 2048  # logits computed at a time: 412 MB in float32 with GPT-2's vocabulary


class Row(NamedTuple):
    """Token ids, of which the last `scored` are predicted from those before them."""

    ids: Sequence[int] | np.ndarray
    scored: int


class Likelihood(NamedTuple):
    """How likely a row's scored tokens are."""

    logprob: float  # summed, in nats
    greedy: bool  # whether each is the argmax


Verdict = dict[str, tuple[float, float]]  # metric: (sum, count)


@dataclass(frozen=True)
class Example:
    rows: list[Row]
    judge: Callable[[list[Likelihood]], Verdict]


class Score(NamedTuple):
    value: float
    stderr: float  # NaN for a single example
    examples: int


@torch.no_grad()
def likelihoods(model: GPT, rows: list[Row], autocast: AbstractContextManager) -> list[Likelihood]:
    """Likelihoods of rows of any length in one forward pass, of a model in eval mode."""
    device = model.wte.weight.device
    longest = max(len(row.ids) for row in rows) - 1
    idx = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):  # right-padded: causal attention never sees the padding
        idx[i, : len(row.ids) - 1] = torch.as_tensor(np.asarray(row.ids[:-1], np.int64))
    counts = torch.tensor([row.scored for row in rows])
    # For each of the N scored tokens: its row, the position that predicts it, and its id; (N,) each.
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
    """The name of a parameter with NaN or infinite values, or None."""
    return next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)


def not_finite(source: str | Path, kind: str) -> UserError:
    """Explain non-finite logits in dtype `kind`. Rereads the weights: checking them up front would slow every start."""
    if name := nonfinite_tensor(load_model(source)):
        return UserError(f"{source} has values in {name} that are not finite; use another checkpoint")
    advice = "" if kind == "float32" else "; try --dtype float32"
    return UserError(f"{source} has finite weights, but logits that are not finite in {kind}{advice}")


@attention_of_varying_shapes()
def judge_all(
    model: GPT,
    examples: list[Example],
    batch_size: int,
    autocast: AbstractContextManager,
    rt: Runtime,
    progress: Callable[[list[Verdict]], bool] = lambda verdicts: True,
) -> list[Verdict]:
    """The judges' verdicts on all examples, in order, on every rank; the ranks share the work.

    Args:
        batch_size: rows per forward pass, at least.
        progress: called with this rank's new verdicts after each pass; if it returns False, stop with what there is.
    """
    block_size = model.config.block_size
    order = sorted(range(len(examples)), key=lambda i: -max(len(row.ids) for row in examples[i].rows))
    mine = order[rt.rank :: rt.world_size]
    verdicts: dict[int, Verdict] = {}
    while len(verdicts) < len(mine):
        batch: list[int] = []
        rows: list[Row] = []
        for i in mine[len(verdicts) :]:
            batch.append(i)
            # Truncate long contexts on the left, as lm-evaluation-harness does.
            rows += [Row(row.ids[-(block_size + 1) :], row.scored) for row in examples[i].rows]
            if len(rows) >= batch_size:
                break
        found = iter(likelihoods(model, rows, autocast))
        verdicts |= {i: _judged(examples[i], [next(found) for _ in examples[i].rows]) for i in batch}
        if not progress([verdicts[i] for i in batch]):
            break
    by_rank = [verdicts]
    if rt.world_size > 1:
        by_rank = [{} for _ in range(rt.world_size)]
        dist.all_gather_object(by_rank, verdicts)
    gathered = {i: verdict for of_rank in by_rank for i, verdict in of_rank.items()}
    return [gathered[i] for i in sorted(gathered)]


def _judged(example: Example, found: list[Likelihood]) -> Verdict:
    verdict = example.judge(found)
    if all(math.isfinite(likelihood.logprob) for likelihood in found):
        return verdict
    return {metric: (math.nan, n) for metric, (_, n) in verdict.items()}  # argmax over NaNs would pass for a choice


def check_fit(examples: list[Example], block_size: int) -> list[Example]:
    """Return the examples; raise UserError if one has more tokens to predict than the context holds."""
    for number, example in enumerate(examples, start=1):
        if (scored := max(row.scored for row in example.rows)) > block_size:
            raise UserError(f"example {number} has {scored} tokens to predict, and the context is {block_size} tokens")
    return examples


def summarize(verdicts: list[Verdict]) -> dict[str, Score]:
    """Each metric over all examples: sum of sums / sum of counts, with the standard error of that ratio.

    With counts of 1 these are the mean and its standard error. Perplexity is exp(ratio), bits are ratio / ln 2, with
    errors by the delta method.
    """
    scores = {}
    for metric in dict.fromkeys(metric for verdict in verdicts for metric in verdict):
        sums, counts = np.array([verdict[metric] for verdict in verdicts if metric in verdict]).T
        n, value = len(sums), sums.sum() / counts.sum()
        squares = ((sums - value * counts) ** 2).sum()
        error = math.sqrt(squares * n / (n - 1)) / counts.sum() if n > 1 else math.nan
        if metric.endswith("perplexity"):
            value = np.exp(value)
            error *= value
        elif metric.startswith("bits"):
            value, error = value / math.log(2), error / math.log(2)
        scores[metric] = Score(float(value), float(error), n)
    return scores


def subset(examples: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` examples, evenly spaced: many test sets are sorted by source."""
    n = len(examples)
    return examples if limit is None or limit >= n else [examples[i * n // limit] for i in range(limit)]


def read_rows(task: str, file: str | None = None) -> list[dict[str, Any]]:
    """The rows of a task's test set, from the Hugging Face hub or a file with the same fields.

    Args:
        file: of rows, in any format that prepare_data.py reads, or for WikiText its text.
    """
    dataset, config, split, fields = HUB[task]
    if file is None:
        require_datasets()
        from datasets import load_dataset  # optional

        with hub_errors(f"{dataset} could not be loaded from the hub", "; give a file of it"):
            rows = list(load_dataset(dataset, config, split=split))
    elif task.startswith("wikitext") and split_name(Path(file))[0] not in sources.ROWS:
        lines = io.StringIO(sources.read_text(Path(file)), newline="\n")
        rows = [{"text": line if line.strip() else ""} for line in lines]  # like the hub's rows
    else:
        rows = sources.read_rows(Path(file))
    for number, row in enumerate(rows, start=1):
        for name, kind in fields.items():
            value = row.get(name)
            if not isinstance(value, kind) or (kind is list and not all(isinstance(item, str) for item in value)):
                raise UserError(f"{file or dataset}, row {number}: no valid {name!r}; is it the test set of {task}?")
    if not rows:
        raise UserError(f"{file or dataset} is empty")
    return rows


def build(task: str, rows: list[dict[str, Any]], tokenizer: Tokenizer, block_size: int, stride: int) -> list[Example]:
    """The examples of a task in HUB."""
    if task.startswith("wikitext"):
        return wikitext(rows, tokenizer, block_size, stride)
    make = {"lambada": lambada, "hellaswag": hellaswag, "hellaswag_harness": hellaswag_harness}[task]
    return [make(row, tokenizer) for row in rows]


def hellaswag(row: dict[str, Any], tokenizer: Tokenizer) -> Example:
    """Zellers et al. (2019), scored as in build-nanogpt and llm.c: pick the likeliest of four endings.

    acc compares summed log-probabilities, acc_norm their means per token. Context and ending are tokenized separately.
    """
    context = tokenizer.encode(row["ctx"]) or _beginning(tokenizer)
    endings = [tokenizer.encode(" " + ending) for ending in row["endings"]]
    rows = [Row(context + ending, len(ending)) for ending in endings]
    return Example(rows, partial(_choice, _label(row), [len(ending) for ending in endings]))


def hellaswag_harness(row: dict[str, Any], tokenizer: Tokenizer) -> Example:
    """HellaSwag as in lm-evaluation-harness: text cleaned up and tokenized jointly; acc_norm is per character."""

    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))  # WikiHow's markup
        return text.replace("  ", " ")

    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    endings = [clean(ending) for ending in row["endings"]]
    rows = [_continued(context, " " + ending, tokenizer) for ending in endings]
    return Example(rows, partial(_choice, _label(row), [len(ending) for ending in endings]))


def _label(row: dict[str, Any]) -> int:
    label = str(row["label"])
    if not label.isdecimal() or int(label) >= len(row["endings"]):
        raise UserError(f"HellaSwag's label is {label!r}, not the index of an ending as in the validation split")
    return int(label)


def _choice(label: int, lengths: list[int], found: list[Likelihood]) -> Verdict:
    logprobs = np.array([likelihood.logprob for likelihood in found])
    normed = logprobs / np.maximum(lengths, 1)
    return {"acc": (float(logprobs.argmax() == label), 1), "acc_norm": (float(normed.argmax() == label), 1)}


def lambada(row: dict[str, Any], tokenizer: Tokenizer) -> Example:
    """Paperno et al. (2016), OpenAI's version, scored as in lm-evaluation-harness: predict a passage's last word.

    acc: whether greedy decoding writes the word. perplexity: per word, not per token.
    """
    context, _, word = row["text"].rpartition(" ")

    def judge(found: list[Likelihood]) -> Verdict:
        return {"acc": (float(found[0].greedy), 1), "perplexity": (-found[0].logprob, 1)}

    return Example([_continued(context, " " + word, tokenizer)], judge)


def _continued(context: str, ending: str, tokenizer: Tokenizer) -> Row:
    """Tokenize context and ending jointly; whitespace between them belongs to the ending."""
    bare = context.rstrip()
    whole, before = tokenizer.encode(context + ending), tokenizer.encode(bare)
    if not before:
        before = _beginning(tokenizer)
        whole = before + whole
    return Row(whole, max(1, len(whole) - len(before)))


def _beginning(tokenizer: Tokenizer) -> list[int]:
    """What a text without context is predicted from."""
    if tokenizer.eot is None:
        raise UserError("a text has no context, and this model has no <|endoftext|> to begin a document")
    return [tokenizer.eot]


def wikitext(rows: list[dict[str, Any]], tokenizer: Tokenizer, block_size: int, stride: int) -> list[Example]:
    """Merity et al. (2016), scored in two ways.

    token_perplexity: of the raw text, as in Hugging Face's guide on perplexity: lines joined by blank lines, a sliding
    window of block_size tokens whose first token is never scored.
    word_perplexity: of the detokenized text (GPT-2's paper, section 3.1), per word and line end of the benchmark.
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
    """Undo WikiText's tokenization into words."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)  # inside words and numbers
    text = re.sub(r" ([.,:;!?)\]}]|'s\b|'(?=[ \n])|n't\b)", r"\1", text)
    text = re.sub(r"([(\[{£$]) ", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) ?"', r'"\1"', text)
    text = re.sub(r"(?<==) (?==)", "", text)  # = = Heading = =
    return re.sub(r"(?m)^ | $", "", text)


def sliding(ids: Sequence[int] | np.ndarray, size: int, stride: int, counts: dict[str, float | None]) -> list[Example]:
    """Windows of `size` tokens, `stride` apart; each scores the tokens not scored yet, but never its first.

    Args:
        counts: what to divide each metric's total nats by, such as the number of bytes; None: scored tokens.
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

    def judge(scored: int, found: list[Likelihood]) -> Verdict:
        nats = -found[0].logprob
        return {name: (nats, scored if count is None else count * scored / total) for name, count in counts.items()}

    return [Example([row], partial(judge, row.scored)) for row in rows]
