"""Scores against brute force, transformers and lm-evaluation-harness; the command line of eval.py."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_end_to_end import ROOT, metrics, run_tiny
from test_sources import in_format, write
from transformers import GPT2LMHeadModel

import eval as script
import train
from gpt2_scratch import scoring
from gpt2_scratch.checkpoint import checkpoints
from gpt2_scratch.cli import run_script
from gpt2_scratch.distributed import Runtime
from gpt2_scratch.scoring import (
    Example,
    Likelihood,
    Row,
    build,
    detokenized,
    judge_all,
    likelihoods,
    sliding,
    summarize,
)
from gpt2_scratch.tokenizer import load_tokenizer
from model import GPT, GPTConfig

WORDS = """the a cat Dog man's walks over under house tree [header] [title] then she it's does n't river , . and costs
12 café (with) "quotes" - ; élan""".split()
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


def words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def hellaswag_row(rng: random.Random) -> dict:
    a, b = words(rng, rng.randint(3, 12)), words(rng, rng.randint(0, 3))
    endings = [words(rng, rng.randint(2, 8)) for _ in range(4)]
    row = {"activity_label": "Removing  ice", "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}".strip(), "endings": endings}
    return row | {"label": str(rng.randrange(4)), "source_id": "s", "split": "val", "split_type": "zeroshot", "ind": 1}


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def hellaswag_rows() -> list[dict]:
    rng = random.Random(1)
    return [hellaswag_row(rng) for _ in range(24)]


@pytest.fixture(scope="module")
def lambada_rows() -> list[dict]:
    rng = random.Random(2)
    return [{"text": words(rng, rng.randint(5, 30))} for _ in range(20)] + [{"text": "the  the"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small GPT-2 of random weights that differ enough for its choices to differ."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    GPT(GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=16, initializer_range=0.4)).save_pretrained(path)
    load_tokenizer("gpt2").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(folder: str) -> GPT:
    return GPT.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def reference(folder: str) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()


def scores_of(model: GPT, examples: list[Example], batch_size: int = 5) -> list[dict]:
    return judge_all(model, examples, batch_size, NO_AUTOCAST, Runtime(torch.device("cpu")))


# The loop.


@settings(max_examples=20)
@given(
    lengths=st.lists(st.tuples(st.integers(2, 33), st.integers(1, 40)), min_size=1, max_size=6), seed=st.integers(0, 99)
)
def test_likelihoods_are_those_of_each_row_alone(lengths: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(32, 50, 2, 2, 8, initializer_range=0.5)).double().eval()
    rows = [Row(torch.randint(50, (n,)).tolist(), min(scored, n - 1)) for n, scored in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "POSITIONS", 7)
        found = likelihoods(model, rows, NO_AUTOCAST)
    for row, (logprob, greedy) in zip(rows, found):
        logits = model(torch.tensor([row.ids]))[0][0].log_softmax(dim=-1) if len(row.ids) <= 32 else None
        if logits is None:
            logits = model(torch.tensor([row.ids[:-1]]))[0][0].log_softmax(dim=-1)
        targets = range(len(row.ids) - row.scored, len(row.ids))
        assert logprob == pytest.approx(sum(logits[at - 1, row.ids[at]].item() for at in targets), abs=1e-9)
        assert greedy == all(logits[at - 1].argmax().item() == row.ids[at] for at in targets)


def test_context_that_is_too_long_loses_its_beginning(model: GPT) -> None:
    ids = torch.randint(50257, (300,)).tolist()
    examples = [Example([Row(ids[-n:], 9)], lambda found: {"x": (found[0].logprob, 1)}) for n in (300, 129, 128)]
    long, fits, shorter = (verdict["x"][0] for verdict in scores_of(model, examples))
    assert long == pytest.approx(fits, abs=1e-9) and fits != shorter
    with pytest.raises(ValueError, match="example 1 has 129 tokens to predict, and the context is 128"):
        scoring.check_fit([Example([Row(ids, 129)], lambda found: {})], 128)


def test_ratio_and_its_error() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    score = summarize([{"acc": (value, 1)} for value in values])["acc"]
    assert score == pytest.approx((0.6, np.std(values, ddof=1) / math.sqrt(5), 5))
    nats, tokens = np.random.default_rng(0).uniform(1, 3, (2, 400))
    verdicts = [{"perplexity": (a, b), "bits_per_byte": (a, 2 * b)} for a, b in zip(nats, tokens)]
    found = summarize(verdicts)
    assert found["perplexity"].value == pytest.approx(math.exp(nats.sum() / tokens.sum()))
    assert found["bits_per_byte"].value == pytest.approx(nats.sum() / tokens.sum() / 2 / math.log(2))
    rng = np.random.default_rng(1)
    again = [rng.integers(400, size=400) for _ in range(2000)]
    bootstrap = np.std([math.exp(nats[i].sum() / tokens[i].sum()) for i in again])
    assert found["perplexity"].stderr == pytest.approx(bootstrap, rel=0.1)
    assert math.isnan(summarize([{"acc": (1, 1)}])["acc"].stderr)


@given(n=st.integers(0, 200), block_size=st.integers(1, 40), data=st.data())
def test_windows_score_each_token_once(n: int, block_size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, block_size))
    examples = sliding(range(n), block_size + 1, stride, {"loss": None})
    rows = [example.rows[0] for example in examples]
    assert [token for row in rows for token in row.ids[-row.scored :]] == list(range(1, n))
    assert all(len(row.ids) <= block_size + 1 for row in rows)
    counted = [example.judge([Likelihood(-1, False)])["loss"][1] for example in examples]
    assert sum(counted) == max(0, n - 1)


# The tasks.


def test_hellaswag_is_that_of_a_loop_over_endings(
    model: GPT, reference: GPT2LMHeadModel, hellaswag_rows: list[dict]
) -> None:
    tokenizer = load_tokenizer("gpt2")
    rows = [*hellaswag_rows, *(row | {"ctx": ""} for row in hellaswag_rows)]
    verdicts = scores_of(model, build("hellaswag", rows, tokenizer, 128, 128))
    for row, verdict in zip(rows, verdicts):
        sums, means = [], []
        for ending in row["endings"]:
            context, end = tokenizer.encode(row["ctx"]) or [tokenizer.eot], tokenizer.encode(" " + ending)
            ids = torch.tensor([context + end])
            labels = ids.clone()
            labels[:, : len(context)] = -100
            with torch.no_grad():
                means.append(reference(ids, labels=labels).loss.item())
            sums.append(means[-1] * len(end))
        label = int(row["label"])
        assert verdict == {
            "acc": (sums.index(min(sums)) == label, 1),
            "acc_norm": (means.index(min(means)) == label, 1),
        }
    assert 0 < summarize(verdicts)["acc"].value < 1


@pytest.mark.parametrize("stride", [128, 64, 50])
def test_token_perplexity_is_that_of_hugging_faces_guide(model: GPT, reference: GPT2LMHeadModel, stride: int) -> None:
    rng = random.Random(3)
    rows = [{"text": f" {words(rng, 40)} \n" if i % 2 else ""} for i in range(20)]
    tokenizer = load_tokenizer("gpt2")
    examples = build("wikitext2", rows, tokenizer, 128, stride)
    score = summarize(scores_of(model, examples))["token_perplexity"].value
    ids = torch.tensor([tokenizer.encode("\n\n".join(row["text"] for row in rows))])
    nats, n_tokens, previous = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + 128, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : previous - end] = -100
        n = (labels[:, 1:] != -100).sum().item()
        with torch.no_grad():
            nats += reference(ids[:, begin:end], labels=labels).loss.item() * n
        n_tokens, previous = n_tokens + n, end
        if end == ids.shape[1]:
            break
    assert score == pytest.approx(math.exp(nats / n_tokens), rel=1e-6)  # its loss is in float32


def test_word_perplexity_counts_words_and_line_ends_of_the_benchmark(model: GPT) -> None:
    rows = [{"text": " = Valkyria = \n"}, {"text": ""}, {"text": " It cost 1 @,@ 200 @-@ odd yen , he said . \n"}]
    tokenizer = load_tokenizer("gpt2")
    plain = "= Valkyria =\n\nIt cost 1,200-odd yen, he said.\n"
    ids = [50256, *tokenizer.encode(plain)]
    nats = -model(torch.tensor([ids]))[0][0].log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum().item()
    verdicts = scores_of(model, build("wikitext2", rows, tokenizer, 128, 128))
    assert summarize(verdicts)["word_perplexity"].value == pytest.approx(math.exp(nats / (3 + 12 + 3)))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (" the game 's dogs ' tails do n't wag \n", "the game's dogs' tails don't wag\n"),
        (' he said , " I am " and left ; then : " no ! " \n', 'he said, "I am" and left; then: "no!"\n'),
        (" ( 10 @.@ 5 % ) in [ 1 ] , $ 3 @,@ 000 \n", "(10.5 %) in [1], $3,000\n"),
        (" = = = Heading = = = \n", "=== Heading ===\n"),
    ],
)
def test_detokenized(words: str, text: str) -> None:
    assert detokenized(words) == text


@pytest.mark.slow
def test_scores_are_those_of_lm_evaluation_harness(
    folder: str, hellaswag_rows: list[dict], lambada_rows: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own tasks with our files for the hub's; needs `pip install lm_eval[hf]`."""
    lm_eval = pytest.importorskip("lm_eval")
    import yaml
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = {"hellaswag_harness": hellaswag_rows, "lambada": lambada_rows}
    theirs = []
    for ours, name in (("hellaswag_harness", "hellaswag/hellaswag"), ("lambada", "lambada/lambada_openai")):
        text = (Path(lm_eval.__file__).parent / "tasks" / f"{name}.yaml").read_text().replace("!function utils.", "")
        task = yaml.safe_load(text)
        split = task.get("validation_split") or task["test_split"]
        file = write_jsonl(tmp_path / f"{ours}.jsonl", rows[ours])
        task |= {"task": ours, "dataset_path": "json", "dataset_name": None, "training_split": None}
        task |= {"dataset_kwargs": {"data_files": {split: str(file)}}}
        theirs.append(task | ({"process_docs": process_docs} if ours == "hellaswag_harness" else {}))
    lm = HFLM(pretrained=folder, dtype="float64", device="cpu", batch_size=4)
    results = lm_eval.simple_evaluate(lm, tasks=theirs, bootstrap_iters=0, log_samples=True)
    model, tokenizer = GPT.from_pretrained(folder, dtype=torch.float64).eval(), load_tokenizer(folder)
    for task in rows:
        examples = build(task, rows[task], tokenizer, 128, 128)
        scores = summarize(scores_of(model, examples))
        for metric, score in scores.items():
            assert score.value == pytest.approx(results["results"][task][f"{metric},none"], rel=1e-6), (task, metric)
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        for example, sample in zip(examples, samples, strict=True):
            found = likelihoods(model, example.rows, NO_AUTOCAST)
            for (logprob, greedy), (theirs_logprob, theirs_greedy) in zip(found, (r[0] for r in sample["resps"])):
                assert logprob == pytest.approx(float(theirs_logprob), abs=1e-4)  # it sums in float32
                assert greedy == (str(theirs_greedy) == "True")


def test_lambada_is_that_of_greedy_decoding(model: GPT, lambada_rows: list[dict]) -> None:
    tokenizer = load_tokenizer("gpt2")
    for row, verdict in zip(lambada_rows, scores_of(model, build("lambada", lambada_rows, tokenizer, 128, 128))):
        context, ids = tokenizer.encode(row["text"].rpartition(" ")[0].rstrip()), tokenizer.encode(row["text"])
        logits = model(torch.tensor([ids]))[0][0].log_softmax(dim=-1)
        targets = range(len(context), len(ids))
        assert verdict["perplexity"][0] == pytest.approx(-sum(logits[at - 1, ids[at]].item() for at in targets))
        written = model.generate(torch.tensor([context]), len(ids) - len(context), temperature=0)[0].tolist()
        assert verdict["acc"][0] == (written == ids)


# The command line.


def run(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    args = script.parse_args()
    run_script(lambda: script.main(args))


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda *flags: run(monkeypatch, *flags, "--device", "cpu", "--dtype", "float32")


def test_scores_are_written_and_shown_beside_the_published(
    folder: str,
    hellaswag_rows: list[dict],
    tmp_path: Path,
    score: Callable,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, output = write_jsonl(tmp_path / "val.jsonl", hellaswag_rows), tmp_path / "scores.json"
    score(folder, "--tasks", "hellaswag", "--data", file, "--output", output, "--batch_size", 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:2] == ["hellaswag", "acc_norm"] and "0.2955" in lines[2] and "0.4893" in lines[2]
    written = json.loads(output.read_text())["scores"]["hellaswag"]["acc_norm"]
    assert written["examples"] == 24 and f"{written['value']:.4f}" == lines[2].split()[2]
    monkeypatch.setattr(script, "score", lambda *_: pytest.fail("scored before it was known where to write"))
    with pytest.raises(SystemExit, match=r"scores.json already exists"):
        score(folder, "--tasks", "hellaswag", "--data", file, "--output", output)
    with pytest.raises(SystemExit, match=r"new/scores.json cannot be written: .*/new does not exist"):
        score(folder, "--tasks", "hellaswag", "--data", file, "--output", tmp_path / "new" / "scores.json")


def test_scores_of_a_single_example_are_valid_json(
    folder: str, hellaswag_rows: list[dict], tmp_path: Path, score: Callable
) -> None:
    file, output = write_jsonl(tmp_path / "val.jsonl", hellaswag_rows[:1]), tmp_path / "scores.json"
    score(folder, "--tasks", "hellaswag", "--data", file, "--output", output)
    written = json.loads(output.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    acc = written["scores"]["hellaswag"]["acc"]
    assert acc["value"] in (0, 1) and acc["stderr"] is None and acc["examples"] == 1


def test_limit_is_spread_over_the_set() -> None:
    assert scoring.subset(list(range(10)), 4) == [0, 2, 5, 7]
    assert scoring.subset([1, 2], 5) == [1, 2] == scoring.subset([1, 2], None)


def test_data_comes_from_the_hub_as_from_a_file(
    hellaswag_rows: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call of datasets, on a folder in the hub's layout."""
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "set" / "data").mkdir(parents=True)
    file = tmp_path / "set" / "data" / "validation-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(hellaswag_rows), file)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(scoring.HUB, "hellaswag", (str(tmp_path / "set"), *scoring.HUB["hellaswag"][1:]))
    assert scoring.read_rows("hellaswag") == hellaswag_rows == scoring.read_rows("hellaswag", str(file))
    monkeypatch.setitem(scoring.HUB, "lambada", (str(tmp_path / "none"), *scoring.HUB["lambada"][1:]))
    with pytest.raises(ValueError, match=r"none could not be loaded from the hub: .*; give a file of it"):
        scoring.read_rows("lambada")
    (tmp_path / "set" / "set.py").write_text("import datasets\n")
    with pytest.raises(ValueError, match=r"set could not be loaded from the hub: Dataset scripts are no longer"):
        scoring.read_rows("hellaswag")


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson.gz", ".json", ".csv.zst", ".tsv", ".parquet.xz"])
def test_rows_are_read_as_prepare_data_reads_them(lambada_rows: list[dict], tmp_path: Path, kind: str) -> None:
    """With a byte order mark, and characters that Python's splitlines takes for ends of lines."""
    texts = [row["text"] for row in lambada_rows] + ["a\u2028b\x85c d"]
    content = in_format(Path(kind).stem if kind.count(".") > 1 else kind, texts)
    content = content if "parquet" in kind else b"\xef\xbb\xbf" + content.replace(b"\\u2028", "\u2028".encode())
    rows = scoring.read_rows("lambada", str(write(tmp_path / f"test{kind}", content)))
    assert [row["text"] for row in rows] == texts


def test_the_text_of_wikitext_keeps_its_line_ends(tmp_path: Path) -> None:
    text = " \n = Title = \n \n one\u2028two\x85 \r\nthree\x0cfour"
    path = write(tmp_path / "wiki.test.raw.gz", b"\xef\xbb\xbf" + text.encode())
    texts = [row["text"] for row in scoring.read_rows("wikitext2", str(path))]
    assert texts == ["", " = Title = \n", "", " one\u2028two\x85 \r\n", "three\x0cfour"]


def test_loss_is_that_of_the_text_however_it_is_stored(folder: str, tmp_path: Path, score: Callable) -> None:
    text = "to be or not\r\nto be, that is the question: é\n" * 5
    bom = b"\xef\xbb\xbf"
    files = {
        "plain.txt": text.encode(),
        "bom.txt": bom + text.encode(),
        "packed.txt.gz": bom + text.encode(),
        "rows.jsonl": bom + in_format(".jsonl", [text, None, ""]),
        "lf.txt": text.replace("\r", "").encode(),
        "two.jsonl": in_format(".jsonl", [text, text]),
    }
    found = {}
    for name, content in files.items():
        score(
            folder, "--tasks", "loss", "--data", write(tmp_path / name, content), "--output", tmp_path / f"{name}.out"
        )
        found[name] = json.loads((tmp_path / f"{name}.out").read_text())["scores"]["loss"]
    assert found["plain.txt"] == found["bom.txt"] == found["packed.txt.gz"] == found["rows.jsonl"]
    assert found["lf.txt"]["loss"]["value"] != found["plain.txt"]["loss"]["value"]
    eot, ids = 50256, load_tokenizer("gpt2").encode(text)
    model = GPT.from_pretrained(folder).eval()
    for name, row in (("plain.txt", [eot, *ids]), ("two.jsonl", [eot, *ids, eot, *ids])):
        idx = torch.tensor([row[:129]])
        expected = torch.nn.functional.cross_entropy(model(idx[:, :-1], idx[:, 1:])[0][0], idx[0, 1:]).item()
        if len(row) <= 129:
            assert found[name]["loss"]["value"] == pytest.approx(expected, abs=1e-4)
        assert found[name]["loss"]["examples"] == -(-(len(row) - 1) // 128)


@pytest.mark.skipif(not Path("/dev/stdin").exists(), reason="needs /dev/stdin")
@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_data_comes_through_a_pipe_to_one_process(folder: str, tmp_path: Path, score: Callable, name: str) -> None:
    text = b"\xef\xbb\xbfto be or not to be"
    score(folder, "--tasks", "loss", "--data", write(tmp_path / "a.txt", text), "--output", tmp_path / "file.json")
    flags = [folder, "--tasks", "loss", "--data", name, "--device", "cpu", "--dtype", "float32", "--output"]
    command = [sys.executable, ROOT / "eval.py", *flags, tmp_path / "pipe.json"]
    done = subprocess.run(list(map(str, command)), input=text, capture_output=True)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"{kind}.json").read_text())["scores"] for kind in ("file", "pipe"))
    assert one == two
    if name == "-":  # each of two processes would get a part
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            list(map(str, [*torchrun, *command[1:-1], tmp_path / "x"])), input=text, capture_output=True
        )
        assert (
            done.returncode and b"error: - can be read only once, and there are 2 processes; give a file" in done.stderr
        )


def test_two_processes_score_as_one(folder: str, lambada_rows: list[dict], tmp_path: Path, score: Callable) -> None:
    file = write_jsonl(tmp_path / "test.jsonl", lambada_rows)
    flags = [folder, "--tasks", "lambada", "--data", file, "--device", "cpu", "--dtype", "float32", "--output"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        list(map(str, [*torchrun, ROOT / "eval.py", *flags, tmp_path / "two.json"])), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("perplexity") == 1, done.stderr
    score(*flags, tmp_path / "one.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["scores"]["lambada"] for name in ("one", "two"))
    for metric in ("acc", "perplexity"):
        assert list(one[metric].values()) == pytest.approx(list(two[metric].values()), rel=1e-5)


def test_loss_and_hellaswag_are_those_of_training(
    workplace: Path, hellaswag_rows: list[dict], score: Callable, capsys: pytest.CaptureFixture
) -> None:
    rows = [{**row, "ctx": row["ctx"][:20], "endings": [e[:20] for e in row["endings"]]} for row in hellaswag_rows]
    file = write_jsonl(workplace / "val.jsonl", rows)
    run_tiny("--eval_hellaswag", "10", "--hellaswag_data", str(file))
    last = metrics("tiny")[-1]
    score("out/tiny", "--tasks", "hellaswag", "--data", file, "--limit", 10, "--output", "h.json")
    found = json.loads(Path("h.json").read_text())["scores"]["hellaswag"]
    assert {name: last[f"hellaswag_{name}"] for name in found} == {name: s["value"] for name, s in found.items()}

    score("--tasks", "loss", "--data", "data/shakespeare", "--output", "shards.json")
    shards = json.loads(Path("shards.json").read_text())["scores"]["loss"]
    assert shards["loss"]["value"] == pytest.approx(last["val_loss"], abs=1e-6)
    assert shards["bits_per_byte"]["value"] == pytest.approx(last["val_loss"] / math.log(2), abs=1e-5)
    text = load_tokenizer("bytes").decode(np.fromfile("data/shakespeare/val_000000.bin", "<u2", offset=1026).tolist())
    Path("val.txt").write_text(text)
    for stride, name in ((32, "same"), (8, "more")):
        score("--tasks", "loss", "--data", "val.txt", "--stride", stride, "--output", f"{name}.json")
    same, more = (json.loads(Path(f"{name}.json").read_text())["scores"]["loss"] for name in ("same", "more"))
    assert all(list(same[name].values()) == pytest.approx(list(shards[name].values())) for name in shards)
    assert same["loss"]["value"] != more["loss"]["value"]


def test_signal_breaks_off_hellaswag_and_the_run_goes_on(
    workplace: Path, hellaswag_rows: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "ctx": row["ctx"][:20], "endings": [e[:20] for e in row["endings"]]} for row in hellaswag_rows]
    flags = ["--eval_hellaswag", "24", "--hellaswag_data", str(write_jsonl(workplace / "val.jsonl", rows))]
    run_tiny(*flags, "--run_name", "whole")
    whole = train.judge_all

    def interrupted(*args: object) -> list:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        return whole(*args)

    monkeypatch.setattr(train, "judge_all", interrupted)
    with pytest.raises(SystemExit):
        run_tiny(*flags)
    assert metrics("tiny")[-1]["step"] == 6 and "val_loss" not in metrics("tiny")[-1]
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    run_tiny(*flags, "--resume")
    for one, other in zip(metrics("tiny"), metrics("whole"), strict=True):
        assert {**one, "tokens_per_sec": 0} == {**other, "tokens_per_sec": 0}
    assert len(checkpoints(Path("out/tiny"))) > 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--tasks", "winogrande"], "invalid choice: 'winogrande'"),
        (["--tasks", "lambada", "hellaswag", "--data", "x"], "--data is for a single task"),
        (["--tasks", "loss"], "the task loss needs --data"),
        (["--tasks", "lambada", "--limit", "0"], "0 is not a whole number of 1 or more"),
    ],
)
def test_wrong_usage(flags: list[str], expected: str, score: Callable, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        score("gpt2", *flags)
    assert end.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize("task", ["loss", "hellaswag", "lambada"])
def test_weights_that_are_no_numbers(
    task: str, folder: str, hellaswag_rows: list[dict], lambada_rows: list[dict], tmp_path: Path, score: Callable
) -> None:
    bad = GPT.from_pretrained(folder)
    with torch.no_grad():
        bad.h[1].ln_2.weight[3] = math.nan
    bad.save_pretrained(tmp_path / "bad")
    load_tokenizer("gpt2").save_pretrained(tmp_path / "bad")
    file = write_jsonl(tmp_path / "rows.jsonl", hellaswag_rows if task == "hellaswag" else lambada_rows)
    with pytest.raises(SystemExit, match=r"bad has values in h\.1\.ln_2\.weight that are not finite"):
        score(tmp_path / "bad", "--tasks", task, "--data", file, "--limit", 3, "--output", tmp_path / "scores.json")
    assert not (tmp_path / "scores.json").exists()


ROW = {"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}


@pytest.mark.parametrize(
    ("task", "content", "expected"),
    [
        ("lambada", None, "there is no file .*test.jsonl"),
        ("lambada", "", "test.jsonl is empty"),
        ("lambada", "not json\n", "test.jsonl, line 1: not a JSON object"),
        ("lambada", '{"text": 3}\n', "test.jsonl, row 1: no valid 'text'; is it the test set of lambada?"),
        ("lambada", "[1]\n", r"test.jsonl, line 1: not a JSON object but \[1\]"),
        ("hellaswag", '{"text": "x"}\n', "row 1: no valid 'ctx'; is it the test set of hellaswag"),
        ("hellaswag", json.dumps(ROW | {"endings": ["b", None, "d", "e"]}) + "\n", "row 1: no valid 'endings'"),
        ("hellaswag", json.dumps(ROW | {"label": ""}) + "\n", "label is '', not the index of an ending"),
        ("hellaswag", json.dumps(ROW | {"label": 4}) + "\n", "label is '4'"),
        ("lambada", json.dumps({"text": "a " + "long" * 400}) + "\n", "example 1 has .* tokens to predict, and the co"),
        ("loss", '{"text": "a"}\n{"text": "\xff"}'.encode("latin-1"), "test.jsonl, line 2: not a JSON object in UTF-8"),
        ("loss", "", "test.jsonl contains no text"),
    ],
)
def test_bad_data_is_named(
    task: str, content: str | bytes | None, expected: str, folder: str, tmp_path: Path, score: Callable
) -> None:
    file = tmp_path / "test.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match=expected):
        score(folder, "--tasks", task, "--data", file)


@pytest.mark.parametrize(
    ("task", "name", "expected"),
    [
        ("loss", "a.txt", r"a\.txt, line 2: byte 0xff is not UTF-8; convert the file"),
        ("wikitext2", "a.raw", r"a\.raw, line 2: byte 0xff is not UTF-8; convert the file"),
        ("lambada", "a.txt", r"a\.txt has no rows; give \.jsonl, .*\.parquet, plain or \.gz, \.zst, \.xz"),
        ("lambada", "a.tar.gz", r"a\.tar\.gz is packed as \.tar\.gz; unpack it"),
        ("loss", "a.zip", r"a\.zip is packed as \.zip; unpack it"),
    ],
)
def test_files_of_other_formats_are_refused(
    task: str, name: str, expected: str, folder: str, tmp_path: Path, score: Callable
) -> None:
    with pytest.raises(SystemExit, match=expected):
        score(folder, "--tasks", task, "--data", write(tmp_path / name, b"a\n\xff"))


def test_what_does_not_fit_is_named(folder: str, workplace: Path, score: Callable, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--stride 500 exceeds the model's context of 128 tokens"):
        score(folder, "--tasks", "loss", "--data", "data/shakespeare/meta.json", "--stride", 500)
    with pytest.raises(SystemExit, match=r"data/shakespeare and .* have different vocabularies, of 257 and 50,257 ids"):
        score(folder, "--tasks", "loss", "--data", "data/shakespeare")
    bare = tmp_path / "bare"
    GPT(GPTConfig(8, 50, 1, 1, 8)).save_pretrained(bare)
    with pytest.raises(SystemExit, match="bare holds no tokenizer"):
        score(bare, "--tasks", "loss", "--data", "data/shakespeare/meta.json")
    load_tokenizer("bytes").save_pretrained(bare)
    with pytest.raises(SystemExit, match=r"the tokenizer of .*bare has 257 ids, the model 50; resize its embedding"):
        score(bare, "--tasks", "loss", "--data", "data/shakespeare/meta.json")
