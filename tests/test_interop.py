"""Our checkpoints in the clients that people run them in: each in an environment of its own, made by the test.

    GPT2_SCRATCH_ENVS=~/envs python -m pytest -m slow tests/test_interop.py -n 0 -s

keeps the environments in that folder for the next time, and shows the versions.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2_scratch.device import autocast_to
from gpt2_scratch.scoring import Row, _continued, likelihoods
from gpt2_scratch.tokenizer import Tokenizer, load_tokenizer, train_bpe
from model import GPT, GPTConfig

pytestmark = pytest.mark.slow
CLIENTS = {
    "transformers": ["transformers"],
    "transformers4": ["transformers==4.57.*"],
    "ctranslate2": ["ctranslate2", "transformers<5"],
    "onnx": ["optimum-onnx[onnxruntime]"],
    "lm_eval": ["lm_eval[hf]"],
    "xllamacpp": ["xllamacpp", "gguf", "safetensors"],
}
TEXTS = ["Hello, I'm a language model,", "naïve café — 日本語 🙂", " two  spaces\n\nand lines\tand 1234!"]
NEW_TOKENS = 12


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The interpreter of a client's environment."""
    place = Path(os.environ.get("GPT2_SCRATCH_ENVS") or tmp_path_factory.mktemp("envs")).expanduser()

    @functools.cache  # failures too: without a network pip takes long to give up
    def problem(client: str) -> str | None:
        """Make the environment, or say why that is impossible."""
        pip = [place / client / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        make = [sys.executable, "-m", "venv", place / client]
        for command in (make, [*pip, "torch==2.13.0"], [*pip, *CLIENTS[client]]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                return (done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        return None

    def interpreter(client: str) -> Path:
        if reason := problem(client):
            pytest.skip(f"{client} cannot be installed here: {reason}")
        return place / client / "bin" / "python"

    return interpreter


@pytest.fixture
def ask(python: Callable[[str], Path]) -> Callable[..., Any]:
    """What a script prints in a client's environment, as JSON in its last line."""

    def ask(client: str, script: str, *args: object) -> Any:
        command = [python(client), "-c", script, *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        answer = json.loads(done.stdout.splitlines()[-1])
        print(f"{client}: {answer['version']}")
        return answer

    return ask


@pytest.fixture(scope="module", params=["gpt2", "bytes", "trained"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights and a tokenizer of each kind that we write."""
    return save_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def save_checkpoint(kind: str, folder: Path) -> Path:
    text = "the theatre of the world, naïve cafés, and 1234 language models\n" * 9
    tokenizer = train_bpe(iter([text]), 300) if kind == "trained" else load_tokenizer(kind)
    sizes = {"block_size": 128, "vocab_size": tokenizer.n_vocab, "n_layer": 2, "n_head": 2, "n_embd": 64}
    torch.manual_seed(0)
    GPT(GPTConfig(**sizes, eos_token_id=tokenizer.eot, initializer_range=0.2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ours(folder: Path) -> tuple[GPT, Tokenizer]:
    return GPT.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)


def greedy(model: GPT, ids: list[int]) -> list[int]:
    """The likeliest continuation, up to <|endoftext|>: there the clients end."""
    new = model.generate(torch.tensor([ids]), NEW_TOKENS, temperature=0)[0, len(ids) :].tolist()
    return new[: new.index(model.config.eos_token_id)] if model.config.eos_token_id in new else new


def check(folder: Path, answers: list[dict]) -> None:
    """Compare ids, logits after the last token, loss and greedy continuation with ours, as far as a client gives them.

    Some clients return the <|endoftext|> that ends a continuation, others do not.
    """
    model, tokenizer = ours(folder)
    for text, theirs in zip(TEXTS, answers, strict=True):
        ids = tokenizer.encode(text)
        assert theirs["ids"] == ids
        if "logits" in theirs:
            logits, loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
            assert theirs["loss"] == pytest.approx(loss.item(), abs=1e-4)
            logits, _ = model(torch.tensor([ids]))
            torch.testing.assert_close(torch.tensor(theirs["logits"]), logits[0, -1], rtol=1e-4, atol=1e-4)
        assert [i for i in theirs["greedy"] if i != tokenizer.eot] == greedy(model, ids) != []


TRANSFORMERS = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, texts, n = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
answers = []
for text in texts:
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():  # all that the tokenizer returns goes in, as in everybody's code
        out = model(**inputs, labels=inputs["input_ids"])
        ids = model.generate(**inputs, max_new_tokens=n, do_sample=False)[0].tolist()
    given = inputs["input_ids"][0].tolist()
    answers.append({"ids": given, "loss": out.loss.item(), "logits": out.logits[0, -1].tolist(),
                    "greedy": ids[len(given):]})
text = pipeline("text-generation", model=folder)(texts[0], max_new_tokens=n, do_sample=False)[0]["generated_text"]
print(json.dumps({"version": transformers.__version__, "answers": answers, "text": text}))
"""


@pytest.mark.parametrize("client", ["transformers", "transformers4"])
def test_transformers(client: str, checkpoint: Path, ask: Callable) -> None:
    answer = ask(client, TRANSFORMERS, checkpoint, json.dumps(TEXTS), NEW_TOKENS)
    check(checkpoint, answer["answers"])
    model, tokenizer = ours(checkpoint)
    assert answer["text"] == TEXTS[0] + tokenizer.decode(greedy(model, tokenizer.encode(TEXTS[0])))


CTRANSLATE2 = """
import ctranslate2, json, sys
from transformers import AutoTokenizer
folder, texts, n, out = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
ctranslate2.converters.TransformersConverter(folder).convert(out)
tokenizer, generator = AutoTokenizer.from_pretrained(folder), ctranslate2.Generator(out, compute_type="float32")
answers = []
for text in texts:
    ids = tokenizer(text)["input_ids"]
    [result] = generator.generate_batch([tokenizer.convert_ids_to_tokens(ids)], max_length=n, sampling_topk=1,
                                        include_prompt_in_result=False)
    answers.append({"ids": ids, "greedy": result.sequences_ids[0]})
print(json.dumps({"version": ctranslate2.__version__, "answers": answers}))
"""


def test_ctranslate2(checkpoint: Path, ask: Callable, tmp_path: Path) -> None:
    answer = ask("ctranslate2", CTRANSLATE2, checkpoint, json.dumps(TEXTS), NEW_TOKENS, tmp_path / "converted")
    check(checkpoint, answer["answers"])


ONNX = """
import json, sys, onnxruntime, torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
folder, texts, n = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer, model = AutoTokenizer.from_pretrained(folder), ORTModelForCausalLM.from_pretrained(folder, export=True)
answers = []
for text in texts:
    inputs = tokenizer(text, return_tensors="pt")
    logits, given = model(**inputs).logits, inputs["input_ids"]
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], given[0, 1:])
    ids = model.generate(**inputs, max_new_tokens=n, do_sample=False)[0].tolist()
    answers.append({"ids": given[0].tolist(), "loss": loss.item(), "logits": logits[0, -1].tolist(),
                    "greedy": ids[given.shape[1]:]})
print(json.dumps({"version": onnxruntime.__version__, "answers": answers}))
"""


def test_onnx_runtime(checkpoint: Path, ask: Callable) -> None:
    answer = ask("onnx", ONNX, checkpoint, json.dumps(TEXTS), NEW_TOKENS)
    check(checkpoint, answer["answers"])


LM_EVAL = """
import importlib.metadata, json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
folder, pairs, texts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
ask = lambda kind, all: [Instance(kind, {}, tuple(arguments), i) for i, arguments in enumerate(all)]
answers = model.loglikelihood(ask("loglikelihood", pairs))
rolling = model.loglikelihood_rolling(ask("loglikelihood_rolling", [[text] for text in texts]))
print(json.dumps({"version": importlib.metadata.version("lm_eval"), "answers": answers, "rolling": rolling}))
"""


def test_lm_eval(checkpoint: Path, ask: Callable) -> None:
    pairs = [("The theatre of the", " world"), ("naïve", " cafés and more"), ("", "1234"), ("a b ", "c")]
    answer = ask("lm_eval", LM_EVAL, checkpoint, json.dumps(pairs), json.dumps(TEXTS))
    model, tokenizer = ours(checkpoint)
    rows = [_continued(context, ending, tokenizer) for context, ending in pairs]
    rows += [Row([tokenizer.eot, *ids], len(ids)) for ids in map(tokenizer.encode, TEXTS)]
    found = likelihoods(model, rows, autocast_to(torch.float32, torch.device("cpu")))
    theirs = [*answer["answers"], *((value, None) for value in answer["rolling"])]
    for row, (logprob, is_greedy) in zip(found, theirs, strict=True):
        assert logprob == pytest.approx(row.logprob, abs=1e-3)
        assert is_greedy in (row.greedy, None)


LLAMA_CPP = """
import gguf, importlib.metadata, json, numpy, sys, xllamacpp
from safetensors.numpy import load_file
folder, texts, n, out = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config, saved = (json.load(open(f"{folder}/{name}.json")) for name in ("config", "tokenizer"))
writer = gguf.GGUFWriter(out, "gpt2")
writer.add_context_length(config["n_ctx"])
writer.add_embedding_length(config["n_embd"])
writer.add_feed_forward_length(4 * config["n_embd"])
writer.add_block_count(config["n_layer"])
writer.add_head_count(config["n_head"])
writer.add_layer_norm_eps(config["layer_norm_epsilon"])
writer.add_file_type(gguf.LlamaFileType.ALL_F32)
vocab = saved["model"]["vocab"] | {token["content"]: token["id"] for token in saved["added_tokens"]}
tokens = sorted(vocab, key=vocab.get)
control = {token["content"] for token in saved["added_tokens"]}
kinds = [gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL for token in tokens]
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("gpt-2")
writer.add_token_list(tokens)
writer.add_token_types(kinds)
writer.add_token_merges([" ".join(merge) for merge in saved["model"]["merges"]])
writer.add_bos_token_id(config["bos_token_id"])
writer.add_eos_token_id(config["eos_token_id"])
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
for name, tensor in load_file(f"{folder}/model.safetensors").items():
    name = name.removeprefix("transformer.")
    if name.startswith("h.") and tensor.ndim == 2:
        tensor = tensor.T  # of Conv1D
    writer.add_tensor(names.get_name(name, (".weight", ".bias")), numpy.ascontiguousarray(tensor))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = out, config["n_ctx"], 1, False
server = xllamacpp.Server(params)
greedy = {"n_predict": n, "temperature": 0, "samplers": ["temperature"]}
answers = [server.handle_completions({"prompt": text, **greedy}) for text in texts]
answers = [json.loads(answer) if isinstance(answer, str) else answer for answer in answers]
version = importlib.metadata.version("xllamacpp") + ", gguf " + importlib.metadata.version("gguf")
print()
print(json.dumps({"version": version, "answers": answers}))
"""


@pytest.mark.parametrize("checkpoint", ["gpt2", "trained"], indirect=True)  # it loads no vocabulary without merges
def test_llama_cpp(checkpoint: Path, ask: Callable, tmp_path: Path) -> None:
    """By the rules of llama.cpp's own converter, which refuses pre-tokenizers other than GPT-2's."""
    answer = ask("xllamacpp", LLAMA_CPP, checkpoint, json.dumps(TEXTS), NEW_TOKENS, tmp_path / "model.gguf")
    model, tokenizer = ours(checkpoint)
    for text, theirs in zip(TEXTS, answer["answers"], strict=True):
        ids = tokenizer.encode(text)
        assert theirs["usage"]["prompt_tokens"] == len(ids)
        assert theirs["choices"][0]["text"] == tokenizer.decode(greedy(model, ids))
