"""Every file in configs/, as it is shipped and made small by flags alone: trained, stopped, resumed and used."""

import functools
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import eval
import sample
import visualize
from gpt2_scratch import tokenizer as tokenizers
from gpt2_scratch.checkpoint import checkpoints, load_state
from gpt2_scratch.config import parse_config
from gpt2_scratch.dataset import write_shards
from gpt2_scratch.metrics import MetricsLog
from gpt2_scratch.tokenizer import load_tokenizer
from train import train

RECIPES = sorted((ROOT / "configs").glob("*.toml"))
STEPS, STOP = 9, 5
# Sizes, steps and where to run, nothing else. Compiling would take half a minute a recipe.
SMALL = f"--block_size 32 --total_batch_size 256 --batch_size 4 --max_steps {STEPS} --device cpu --compile false "
SMALL += "--eval_interval 4 --eval_tokens 512 --checkpoint_interval 3 --log_interval 1 --keep_checkpoints 9"
NETWORK = "--n_layer 2 --n_head 2 --n_embd 32"
# Once they are as small these give the pictures of finetune_shakespeare, with its vocabulary: ten seconds each.
DRAWN_ALIKE = ("gpt2_124m", "gpt2_124m_adamw", "gpt2_350m", "gpt2_774m", "gpt2_1558m")
GPT2_ENCODING = functools.cache(tokenizers._gpt2_encoding)  # else half a second for each of sixty uses
TEXT = "ROMEO:\nTo be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data that the recipes name, and a model in the place of the published one."""
    place = tmp_path_factory.mktemp("recipes")
    for name, kind in (("shakespeare", "bytes"), ("shakespeare-gpt2", "gpt2"), ("fineweb-edu", "gpt2")):
        folder, tokenizer = place / "data" / name, load_tokenizer(kind)
        folder.mkdir(parents=True)
        ids = {
            "train": [tokenizer.eot, *tokenizer.encode(TEXT * 50)],
            "val": [tokenizer.eot, *tokenizer.encode(TEXT * 9)],
        }
        shards = {split: write_shards(folder, split, [np.array(ids[split])], tokenizer.n_vocab) for split in ids}
        (folder / "meta.json").write_text(
            json.dumps({"tokenizer": kind, "vocab_size": tokenizer.n_vocab, "shards": shards})
        )
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_positions=64, n_layer=2, n_head=2, n_embd=32)).save_pretrained(place / "published")
    return place


def lines(run: str) -> list[dict]:
    found = [json.loads(line) for line in (Path("out") / run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_sec"} for line in found]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_stops_resumes_and_its_model_is_of_use(
    recipe: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(tokenizers, "_gpt2_encoding", GPT2_ENCODING)
    name = recipe.stem
    sizes = ["--init_from", "published"] if name.startswith("finetune") else NETWORK.split()
    flags = [str(recipe), *sizes, *SMALL.split()]

    train(parse_config([*flags, "--run_name", f"{name}-whole"]))
    said = capsys.readouterr().out
    if parse_config([str(recipe)]).warmup_steps > STEPS:
        assert f"longer than the run of {STEPS} steps; shortened to " in said

    def write_then_signal(log: MetricsLog, line: dict) -> None:
        write(log, line)
        if line["step"] == STOP and "train_loss" in line:
            os.kill(os.getpid(), signal.SIGINT)

    write = MetricsLog.write
    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "write", write_then_signal)
        with pytest.raises(SystemExit) as end:
            train(parse_config([*flags, "--run_name", name]))
    assert end.value.code == 128 + signal.SIGINT and STOP <= lines(name)[-1]["step"] < STEPS
    train(parse_config([*flags, "--run_name", name, "--resume"]))
    assert lines(name) == lines(f"{name}-whole")
    model, whole = (checkpoints(Path("out") / run)[-1] for run in (name, f"{name}-whole"))
    assert (model / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    ours, theirs = (load_state(path)["optimizer"]["state"] for path in (model, whole))
    assert ours and all(torch.equal(ours[i][key], theirs[i][key]) for i in ours for key in ours[i])

    def script(line: str) -> None:
        monkeypatch.setattr(sys, "argv", line.split())

    capsys.readouterr()
    script(f"sample.py --model {model} --prompt ROMEO: --max_new_tokens 8 --temperature 0 --dtype float32")
    sample.sample(sample.parse_args())
    text = capsys.readouterr().out.removesuffix("\n")
    script(f"eval.py {model} --tasks loss --data {parse_config(flags).data} --output {name}.json --device cpu")
    eval.main(eval.parse_args())
    loss = json.loads(Path(f"{name}.json").read_text())["scores"]["loss"]["loss"]["value"]
    assert 0 < loss < np.log(51_000)
    if name not in DRAWN_ALIKE:
        script(f"visualize.py out/{name} --out {name}-figures --text ROMEO")
        visualize.visualize(visualize.parse_args())
        assert len(list(Path(f"{name}-figures").glob("*.png"))) > 9 and Path(f"{name}-figures", "index.html").is_file()

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("ROMEO:", return_tensors="pt").input_ids
    theirs = AutoModelForCausalLM.from_pretrained(model).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert tokenizer.decode(theirs[0]) == text
