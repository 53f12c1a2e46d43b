"""from_pretrained and save_pretrained: transformers' folders, old names, damaged files, the hub's cache."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn as nn
from huggingface_hub import errors as hub_errors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_model import KINDS, TINY, assert_same_function, batch, configs, double_model, shake
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    pipeline,
)

import model as model_module
from gpt2_scratch.tokenizer import load_tokenizer
from model import GPT, GPTConfig, config_from_hf, config_to_hf

Edit = Callable[[dict[str, Any]], Any]


def hf_model(config: GPTConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """transformers' network for a configuration, built without our code, with random weights."""
    common = {
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    torch.manual_seed(seed)
    if config.post_norm:
        afn = "gelu" if config.activation == "gelu_new" else config.activation
        theirs: nn.Module = OpenAIGPTLMHeadModel(OpenAIGPTConfig(afn=afn, **common))
    else:
        own = {
            "activation_function": config.activation,
            "n_inner": config.n_inner,
            "scale_attn_weights": config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        }
        theirs = GPT2LMHeadModel(GPT2Config(**own, **common))
    theirs = theirs.double()
    shake(theirs, seed)
    return theirs.to(dtype).eval()


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        k: (t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).numpy().tobytes()) for k, t in tensors.items()
    }


# To and from transformers


@pytest.mark.parametrize(("activation", "post_norm"), KINDS)
@settings(max_examples=15)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_a_folder_of_transformers_loads_as_the_same_function(
    activation: str, post_norm: bool, data: st.DataObject, seed: int
) -> None:
    config = data.draw(configs(activation, post_norm))
    theirs = hf_model(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = GPT.from_pretrained(folder, vocab_multiple=config.vocab_multiple)
    assert not ours.training
    assert replace(ours.config, eos_token_id=None) == config
    assert_same_function(ours, theirs, seed)


@pytest.mark.parametrize(("activation", "post_norm"), KINDS)
@settings(max_examples=15)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_a_folder_of_ours_loads_in_transformers_as_the_same_function(
    activation: str, post_norm: bool, data: st.DataObject, seed: int
) -> None:
    config = data.draw(configs(activation, post_norm))
    ours = double_model(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert type(theirs) is (OpenAIGPTLMHeadModel if config.post_norm else GPT2LMHeadModel)
    assert_same_function(ours, theirs, seed)


@pytest.mark.parametrize(("activation", "post_norm"), KINDS)
@settings(max_examples=15)
@given(
    data=st.data(),
    dropout=st.sampled_from([0.0, 0.1]),
    eos=st.none() | st.just(0),
    std=st.sampled_from([0.02, 0.5]),
)
def test_config_json_round_trips(
    activation: str, post_norm: bool, data: st.DataObject, dropout: float, eos: int | None, std: float
) -> None:
    config = replace(
        data.draw(configs(activation, post_norm)), dropout=dropout, eos_token_id=eos, initializer_range=std
    )
    hf = json.loads(json.dumps(config_to_hf(config, torch.float32)))
    # Dropout and padding are chosen when training, not by the file.
    assert config_from_hf(hf) == replace(config, dropout=0.0, vocab_multiple=GPTConfig.vocab_multiple)


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    assert config_from_hf({"model_type": "gpt2"}) == config_from_hf(GPT2Config().to_dict())
    assert config_from_hf({"model_type": "gpt2"}) == GPTConfig(eos_token_id=50256)


def test_absent_keys_of_gpt1_have_the_defaults_of_transformers() -> None:
    config = config_from_hf({"model_type": "openai-gpt"})
    theirs = OpenAIGPTConfig()
    assert (config.vocab_size, config.block_size) == (theirs.vocab_size, theirs.n_positions) == (40478, 512)
    assert (config.n_layer, config.n_head, config.n_embd) == (theirs.n_layer, theirs.n_head, theirs.n_embd)
    assert config.post_norm
    assert config.activation == "gelu_new"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("post_norm", [False, True])
def test_load_save_load_keeps_every_bit(dtype: torch.dtype, post_norm: bool, tmp_path: Path) -> None:
    theirs = hf_model(replace(TINY, post_norm=post_norm), dtype=dtype)
    with torch.no_grad():
        next(theirs.parameters())[0, :3] = torch.tensor([-0.0, 6e-8, 1e-3], dtype=dtype)  # 6e-8: a float16 subnormal
    theirs.save_pretrained(tmp_path / "theirs")
    first = GPT.from_pretrained(tmp_path / "theirs")
    first.save_pretrained(tmp_path / "ours")
    second = GPT.from_pretrained(tmp_path / "ours")
    assert {p.dtype for p in first.parameters()} == {dtype}
    assert bits(first.state_dict()) == bits(second.state_dict())
    stored = bits(load_file(tmp_path / "theirs" / "model.safetensors"))
    assert bits(load_file(tmp_path / "ours" / "model.safetensors")) == stored
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model_type"] == ("openai-gpt" if post_norm else "gpt2")
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").dtype == dtype


def test_a_saved_file_has_no_padding_and_no_second_copy(tmp_path: Path) -> None:
    model = GPT(TINY)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert model.wte.weight.shape == (64, 8)
    assert tensors["transformer.wte.weight"].shape == (37, 8)
    assert "lm_head.weight" not in tensors
    assert sum(t.numel() for t in tensors.values()) == model.num_params()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


def test_saving_leaves_the_model_unchanged_and_overwrites(tmp_path: Path) -> None:
    model = double_model(TINY).train()
    before = bits(model.state_dict())
    model.save_pretrained(tmp_path / "new" / "folder")
    assert bits(model.state_dict()) == before
    assert model.training
    with torch.no_grad():
        model.wpe.weight += 1
    model.save_pretrained(tmp_path / "new" / "folder")
    assert bits(GPT.from_pretrained(tmp_path / "new" / "folder").state_dict()) == bits(model.state_dict()) != before


def test_a_loaded_model_trains_with_its_tie(tmp_path: Path) -> None:
    double_model(TINY).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.wte.weight
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert len(list(model.parameters())) == len(list(GPT(TINY).parameters()))


# Files


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote: two layers of GPT-2 in float32. Tests copy from it."""
    folder = tmp_path_factory.mktemp("published")
    hf_model(TINY, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def state(published: Path) -> dict[str, Tensor]:
    return load_file(published / "model.safetensors")


def lay_out(folder: Path, published: Path, state: dict[str, Tensor] | None, edit: Edit = dict) -> Path:
    """A folder with config.json as `edit` left it and, if given, these tensors in model.safetensors."""
    folder.mkdir(exist_ok=True)
    config = json.loads((published / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    if state is not None:
        save_file({k: t.clone() for k, t in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def same_weights(folder: Path, published: Path) -> bool:
    return bits(GPT.from_pretrained(folder).state_dict()) == bits(GPT.from_pretrained(published).state_dict())


def test_sharded_safetensors(tmp_path: Path, published: Path) -> None:
    hf_model(TINY, dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert same_weights(tmp_path, published)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"lacks the tensor .* missing\)"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("with_head", [True, False])
def test_pytorch_bin(zipped: bool, with_head: bool, tmp_path: Path, published: Path, state: dict[str, Tensor]) -> None:
    """As written by `torch.save(model.state_dict())`, usually with the tied head as a separate entry."""
    if with_head:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    lay_out(tmp_path, published, None)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert (tmp_path / "pytorch_model.bin").read_bytes().startswith(b"PK") == zipped
    assert same_weights(tmp_path, published)


def test_pytorch_bin_of_parameters(tmp_path: Path, published: Path) -> None:
    parameters = dict(hf_model(TINY, dtype=torch.float32).named_parameters())
    lay_out(tmp_path, published, None)
    torch.save(parameters, tmp_path / "pytorch_model.bin")
    assert same_weights(tmp_path, published)
    assert all(p.is_leaf for p in GPT.from_pretrained(tmp_path).parameters())


@pytest.mark.parametrize("zipped", [True, False])
def test_sharded_pytorch_bin(zipped: bool, tmp_path: Path, published: Path, state: dict[str, Tensor]) -> None:
    state["lm_head.weight"] = state["transformer.wte.weight"]
    lay_out(tmp_path, published, None)
    weight_map = {name: f"pytorch_model-0000{i % 3 + 1}-of-00003.bin" for i, name in enumerate(state)}
    for shard in set(weight_map.values()):
        part = {name: tensor for name, tensor in state.items() if weight_map[name] == shard}
        torch.save(part, tmp_path / shard, _use_new_zipfile_serialization=zipped)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same_weights(tmp_path, published)


def test_safetensors_come_before_a_pickle(tmp_path: Path, published: Path, state: dict[str, Tensor]) -> None:
    lay_out(tmp_path, published, state)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    assert same_weights(tmp_path, published)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("old_norms", [True, False])
def test_old_spellings_and_stored_masks(
    file: str,
    prefix: str,
    old_norms: bool,
    tmp_path: Path,
    published: Path,
    state: dict[str, Tensor],
    capsys: pytest.CaptureFixture,
) -> None:
    """The hub's gpt2 has neither prefix nor head but masks; conversions from TensorFlow say gamma and beta."""
    old = {}
    for name, tensor in state.items():
        name = name.replace("transformer.", prefix)
        if old_norms and ".ln_" in f".{name}":
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        old[name] = tensor
    for layer in range(TINY.n_layer):
        old[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril().to(torch.uint8)
        old[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    assert len(old) == len(state) + 4
    lay_out(tmp_path, published, old if file == "model.safetensors" else None)
    if file == "pytorch_model.bin":
        torch.save(old, tmp_path / file)
    assert same_weights(tmp_path, published)
    assert "left out" not in capsys.readouterr().err


def test_stored_position_ids_of_gpt1_are_ignored(tmp_path: Path) -> None:
    """Older versions of transformers saved this buffer with GPT-1."""
    hf_model(replace(TINY, post_norm=True)).save_pretrained(tmp_path)
    expected = bits(GPT.from_pretrained(tmp_path).state_dict())
    state = load_file(tmp_path / "model.safetensors") | {"transformer.position_ids": torch.arange(16)}
    save_file(state, tmp_path / "model.safetensors")
    assert bits(GPT.from_pretrained(tmp_path).state_dict()) == expected


# Options of loading


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_the_stored_one_unless_given(stored: torch.dtype, tmp_path: Path) -> None:
    hf_model(TINY, dtype=stored).save_pretrained(tmp_path)
    kept = GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in kept.parameters()} == {stored}
    for wanted in (torch.float32, torch.bfloat16):
        cast = GPT.from_pretrained(tmp_path, dtype=wanted)
        assert {p.dtype for p in cast.parameters()} == {wanted}
        assert bits(cast.state_dict()) == bits(kept.to(wanted).state_dict())
        kept = GPT.from_pretrained(tmp_path)


def test_block_size_keeps_the_first_positions(tmp_path: Path) -> None:
    theirs = hf_model(TINY)
    theirs.save_pretrained(tmp_path)
    short = GPT.from_pretrained(tmp_path, block_size=5)
    assert short.config == replace(GPT.from_pretrained(tmp_path).config, block_size=5)
    idx, _ = batch(TINY, length=5)
    torch.testing.assert_close(short(idx)[0], theirs(idx).logits, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="block_size of 5"):
        short(torch.zeros(1, 6, dtype=torch.int64))
    short.save_pretrained(tmp_path / "short")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "short").config.n_positions == 5
    assert GPT.from_pretrained(tmp_path, block_size=16).config.block_size == 16


@pytest.mark.parametrize("block_size", [17, 0, -1])
def test_an_invalid_block_size_is_refused(block_size: int, published: Path) -> None:
    with pytest.raises(ValueError, match=f"block_size (is )?{block_size}"):
        GPT.from_pretrained(published, block_size=block_size)


def test_dropout_is_0_unless_given(published: Path) -> None:
    stored = json.loads((published / "config.json").read_text())
    assert stored["embd_pdrop"] == stored["attn_pdrop"] == stored["resid_pdrop"] == 0.1
    idx, _ = batch(TINY)
    plain = GPT.from_pretrained(published)
    assert plain.config.dropout == 0
    assert torch.equal(plain.train()(idx)[0], plain.eval()(idx)[0])
    noisy = GPT.from_pretrained(published, dropout=0.3)
    assert noisy.config.dropout == 0.3
    assert torch.equal(noisy(idx)[0], plain(idx)[0])
    assert not torch.equal(noisy.train()(idx)[0], plain(idx)[0])


def test_saving_records_the_dropout(tmp_path: Path) -> None:
    GPT(replace(TINY, dropout=0.2)).save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert config.embd_pdrop == config.attn_pdrop == config.resid_pdrop == 0.2


# Errors


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("transformer.h.1.mlp.c_fc.bias"), r"lacks the tensor h\.1\.mlp\.c_fc\.bias \(1 missing\)"),
        (lambda s: s.pop("transformer.wte.weight"), r"lacks the tensor wte\.weight"),
        (lambda s: [s.pop(k) for k in list(s) if ".h.1." in k], r"lacks the tensor h\.1\..* \(12 missing\)"),
        (lambda s: s.update({"lm_head.bias": torch.zeros(37)}), r"has the tensor lm_head\.bias.*\(1 left over\)"),
        (lambda s: s.update({"transformer.score.weight": torch.zeros(2, 8)}), r"has the tensor score\.weight"),
        (lambda s: s.update({"transformer.h.2.ln_1.bias": torch.zeros(8)}), r"has the tensor h\.2\.ln_1\.bias"),
        (lambda s: s.update({"h.2.ln_1.bias": torch.zeros(8)}), r"has the tensor h\.2\.ln_1\.bias"),
        (lambda s: s.update({"transformer.h.1.crossattention.q_attn.bias": torch.zeros(8)}), r"the tensor h\.1\.cross"),
        (lambda s: s.update({"transformer.h.1.attn.c_attn.lora_A.weight": torch.zeros(8, 2)}), r"attn\.lora_A\.weight"),
        (lambda s: s.update({"transformer.h.1.ln_1.gamma": torch.zeros(8)}), r"h\.1\.ln_1\.weight differs"),
        (lambda s: s.update({"transformer.ln_f.weight": torch.zeros(9)}), r"ln_f\.weight has shape \(9,\).*\(8,\)"),
        (lambda s: s.update({"transformer.ln_f.weight": torch.tensor(1.0)}), r"ln_f\.weight has shape \(\).*\(8,\)"),
        (lambda s: s.update({"transformer.wte.weight": torch.zeros(64, 8)}), r"wte\.weight has shape \(64, 8\)"),
        (lambda s: s.update({"transformer.wpe.weight": torch.zeros(15, 8)}), r"wpe\.weight has shape \(15, 8\)"),
        # GPT-2's files store linear layers as (in, out); shapes are reported as stored.
        (
            lambda s: s.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(32, 8)}),
            r"h\.0\.mlp\.c_fc\.weight has shape \(32, 8\).*\(8, 32\)",
        ),
        (
            lambda s: s.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(1, 8, 24)}),
            r"h\.0\.attn\.c_attn\.weight has shape \(1, 8, 24\).*\(8, 24\)",
        ),
        (
            lambda s: s.update({"transformer.h.0.ln_1.bias": torch.zeros(8, dtype=torch.int64)}),
            r"h\.0\.ln_1\.bias has dtype torch\.int64",
        ),
        (
            lambda s: s.update({"transformer.h.0.attn.c_proj.weight": torch.zeros(8, 8, dtype=torch.uint8)}),
            r"c_proj\.weight has dtype torch\.uint8",
        ),
        (lambda s: s.update({"lm_head.weight": s["transformer.wte.weight"] + 1}), r"lm_head\.weight differs"),
        (lambda s: s.update({"lm_head.weight": torch.zeros(64, 8)}), r"lm_head\.weight has shape \(64, 8\)"),
        (lambda s: s.update({"lm_head.weight": torch.ones(37, 8, dtype=torch.float16)}), r"lm_head\.weight differs"),
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_wrong_tensor_is_named(
    damage: Edit, message: str, file: str, tmp_path: Path, published: Path, state: dict[str, Tensor]
) -> None:
    damage(state)
    lay_out(tmp_path, published, state if file == "model.safetensors" else None)
    if file == "pytorch_model.bin":
        torch.save(state, tmp_path / file)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "sharded"])
@pytest.mark.parametrize("stored", ["head", "table", "both"])
def test_a_tied_table_is_found_under_either_name(stored: str, file: str, post_norm: bool, tmp_path: Path) -> None:
    theirs = hf_model(replace(TINY, post_norm=post_norm), dtype=torch.float32)
    theirs.save_pretrained(tmp_path, max_shard_size="1KB" if file == "sharded" else "1GB")
    table = "transformer.tokens_embed.weight" if post_norm else "transformer.wte.weight"
    path = tmp_path / "model.safetensors"
    if file == "sharded":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        path = tmp_path / index["weight_map"][table]
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors[table].clone()
    if stored != "both":
        del tensors[table if stored == "head" else "lm_head.weight"]
    if file == "pytorch_model.bin":
        path.unlink()
        torch.save(tensors, tmp_path / file)
    else:
        save_file(tensors, path, {"format": "pt"})
    assert_same_function(GPT.from_pretrained(tmp_path, dtype=torch.float64), theirs.double(), 0)


@pytest.mark.parametrize("head", ["value", "choices", "classes"])
def test_a_head_beside_the_language_model_is_left_out_and_named(
    head: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What trl's value heads, GPT2DoubleHeadsModel and GPT2ForSequenceClassification leave in a folder."""
    theirs = hf_model(TINY)
    kind = {"choices": GPT2DoubleHeadsModel, "classes": GPT2ForSequenceClassification}.get(head, GPT2LMHeadModel)
    larger = kind(theirs.config).double()
    larger.transformer.load_state_dict(theirs.transformer.state_dict())
    larger.save_pretrained(tmp_path)
    if head == "value":
        tensors = load_file(tmp_path / "model.safetensors")
        summary = {"v_head.summary.weight": torch.ones(1, TINY.n_embd), "v_head.summary.bias": torch.ones(1)}
        save_file(tensors | summary, tmp_path / "model.safetensors", {"format": "pt"})
    names = {
        "value": "v_head.summary.bias, v_head.summary.weight",
        "choices": "multiple_choice_head.summary.bias, multiple_choice_head.summary.weight",
        "classes": "score.weight",
    }
    assert_same_function(GPT.from_pretrained(tmp_path), theirs, 0)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{tmp_path}: left out what is not the language model: {names[head]}"
    )


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.update(hidden_size=c.pop("n_embd"), num_attention_heads=c.pop("n_head")),
        lambda c: c.update(num_hidden_layers=c.pop("n_layer"), max_position_embeddings=c.pop("n_positions")),
        lambda c: c.update(hidden_size=c["n_embd"], n_embd=99, num_hidden_layers=c["n_layer"], n_layer=9),
        lambda c: c.update(n_ctx=3),
        lambda c: c.update(eos_token_id=[7, 8]),
        lambda c: c.update(eos_token_id=[]),
    ],
)
def test_a_config_in_other_words_loads_as_in_transformers(edit: Edit, post_norm: bool, tmp_path: Path) -> None:
    hf_model(replace(TINY, post_norm=post_norm)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ours = GPT.from_pretrained(tmp_path)
    assert_same_function(ours, theirs, 0)
    ends = theirs.config.eos_token_id
    assert ours.config.eos_token_id == (next(iter(ends), None) if isinstance(ends, list) else ends)


def test_config_json_has_llama_cpps_name_for_the_context(tmp_path: Path) -> None:
    GPT(TINY).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["n_ctx"] == TINY.block_size


def test_a_missing_untied_head_is_named(tmp_path: Path, published: Path, state: dict[str, Tensor]) -> None:
    lay_out(tmp_path, published, state, lambda c: c.update(tie_word_embeddings=False))
    with pytest.raises(ValueError, match=r"lacks the tensor lm_head\.weight"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(model_type="llama"), "model_type 'llama'"),
        (lambda c: c.pop("model_type"), "model_type None"),
        (lambda c: c.update(model_type=["gpt2"]), "model_type"),
        (lambda c: c.update(activation_function="quick_gelu"), "activation 'quick_gelu' is not one of gelu_new"),
        (lambda c: c.update(activation_function=["gelu"]), "activation"),
        (lambda c: c.update(activation_function=None), "activation"),
        (
            lambda c: c.update(model_type="openai-gpt", afn="quick_gelu"),
            "activation 'quick_gelu' is not one of gelu_new",
        ),
        (lambda c: c.update(n_layer="2"), "n_layer"),
        (lambda c: c.update(n_layer=2.5), "n_layer"),
        (lambda c: c.update(n_layer=0), "n_layer"),
        (lambda c: c.update(n_layer=None), "n_layer"),
        (lambda c: c.update(n_embd=[8]), "n_embd"),
        (lambda c: c.update(n_head=3), "n_head"),
        (lambda c: c.update(n_inner="32"), "n_inner"),
        (lambda c: c.update(layer_norm_epsilon="1e-5"), "layer_norm_epsilon"),
        (lambda c: c.update(tie_word_embeddings="false"), "tie_word_embeddings"),
        (lambda c: c.update(scale_attn_weights="yes"), "scale_attn_weights"),
        (lambda c: c.update(n_embd=16), r"has shape .* config\.json implies"),
        (lambda c: c.update(n_layer=3), r"lacks the tensor h\.2\."),
        (lambda c: c.update(n_layer=1), r"has the tensor h\.1\."),
        (lambda c: c.update(vocab_size=38), r"wte\.weight has shape \(37, 8\).*\(38, 8\)"),
        (lambda c: c.update(n_inner=30), r"mlp\.\w+\.\w+ has shape"),
    ],
)
def test_a_wrong_config_is_refused(
    edit: Edit, message: str, tmp_path: Path, published: Path, state: dict[str, Tensor]
) -> None:
    lay_out(tmp_path, published, state, edit)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_harmless_values_of_unsupported_fields_are_accepted(
    tmp_path: Path, published: Path, state: dict[str, Tensor]
) -> None:
    lay_out(
        tmp_path,
        published,
        state,
        lambda c: c.update(
            add_cross_attention=True, quantization_config=None, pruned_heads={}, n_ctx=16, new_field="?"
        ),
    )
    assert same_weights(tmp_path, published)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"gpt2"', "\x80"])
def test_a_config_that_is_not_a_json_object_is_refused(
    text: str, tmp_path: Path, published: Path, state: dict[str, Tensor]
) -> None:
    lay_out(tmp_path, published, state)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json cannot be used: ."):
        GPT.from_pretrained(tmp_path)


def test_a_folder_without_files_is_refused(tmp_path: Path, published: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path.name} has no weights"):
        GPT.from_pretrained(tmp_path)
    lay_out(tmp_path, published, state)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path.name}: config\.json cannot be used: .*No such file"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "pretrained_model."])
def test_a_wrapped_model_is_refused(
    prefix: str, tmp_path: Path, published: Path, state: dict[str, Tensor], capsys: pytest.CaptureFixture
) -> None:
    """Under such names transformers finds no weights, and goes on with random ones."""
    lay_out(tmp_path, published, {prefix + name: tensor for name, tensor in state.items()})
    with pytest.raises(ValueError, match=r"lacks the tensor wte\.weight \(28 missing\)"):
        GPT.from_pretrained(tmp_path)
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("entry", [torch.zeros(37, 8, device="meta"), torch.zeros(37, 8).to_sparse()])
def test_a_tensor_without_plain_data_is_refused(
    entry: Tensor, tmp_path: Path, published: Path, state: dict[str, Tensor]
) -> None:
    lay_out(tmp_path, published, None)
    torch.save(state | {"transformer.wte.weight": entry}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged|wte\.weight"):
        GPT.from_pretrained(tmp_path)


class Evil:
    """Creates a file when unpickled without restrictions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["entry", "key", "whole"])
def test_a_pickle_that_would_run_code_does_not(
    zipped: bool, place: str, tmp_path: Path, published: Path, state: dict[str, Tensor]
) -> None:
    mark = tmp_path / "code_ran"
    content: Any = {"entry": state | {"extra": Evil(mark)}, "key": {Evil(mark): 1}, "whole": Evil(mark)}[place]
    lay_out(tmp_path, published, None)
    file = tmp_path / "pytorch_model.bin"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*could run code"):
        GPT.from_pretrained(tmp_path)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists(), "this file was harmless, so the test proved nothing"


def test_a_bare_pickle_that_would_run_code_does_not(tmp_path: Path, published: Path) -> None:
    mark = tmp_path / "code_ran"
    lay_out(tmp_path, published, None)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark), protocol=2))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        GPT.from_pretrained(tmp_path)
    assert not mark.exists()
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    assert mark.exists(), "this file was harmless, so the test proved nothing"


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), {"wte.weight": 3}, {"model": {}}])
def test_a_bin_that_is_not_a_dictionary_of_tensors_is_refused(content: Any, tmp_path: Path, published: Path) -> None:
    lay_out(tmp_path, published, None)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged, or has more than tensors"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "legacy"])
def test_a_truncated_file_is_refused(
    kind: str, keep: float, tmp_path: Path, published: Path, state: dict[str, Tensor]
) -> None:
    lay_out(tmp_path, published, state if kind == "model.safetensors" else None)
    file = tmp_path / ("pytorch_model.bin" if kind == "legacy" else kind)
    if kind != "model.safetensors":
        torch.save(state, file, _use_new_zipfile_serialization=kind != "legacy")
    whole = file.read_bytes()
    assert same_weights(tmp_path, published)
    file.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match=rf"{file.name} .*is damaged"):
        GPT.from_pretrained(tmp_path)


# The hub


LOAD_FROM_CACHE = """
import json, sys
from model import GPT

def outcome(name, revision):
    try:
        model = GPT.from_pretrained(name, revision=revision)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return model.wpe.weight[0, 0].item()

print(json.dumps([outcome(*case) for case in json.loads(sys.argv[1])]))
"""
OLD, NEW = "a" * 40, "b" * 40
CASES: dict[str, tuple[str, str | None]] = {
    "default branch": ("someone/model", None),
    "branch": ("someone/model", "older"),
    "commit": ("someone/model", OLD),
    "pickle": ("pickled", None),
    "shards": ("someone/shards", None),
    "shards of a branch": ("someone/shards", "older"),
    "unknown revision": ("someone/model", "missing"),
    "no weights": ("someone/empty", None),
    "unknown model": ("someone/else", None),
    "unknown folder": ("out/run/checkpoints/step_00000001", None),
    "not a name": ("./no/such folder", None),
    "empty": ("", None),
}


@pytest.fixture(scope="module")
def from_cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of each of CASES, offline, from a cache in huggingface_hub's layout.

    Each commit's position table begins with another number, which tells what was loaded.
    """
    cache = tmp_path_factory.mktemp("cache")

    def store(repo: str, commit: str, branch: str, mark: float, **save: Any) -> Path:
        refs = cache / repo / "refs"
        refs.mkdir(parents=True, exist_ok=True)
        (refs / branch).write_text(commit)
        theirs = hf_model(TINY, dtype=torch.float32)
        with torch.no_grad():
            theirs.transformer.wpe.weight[0, 0] = mark
        theirs.save_pretrained(cache / repo / "snapshots" / commit, **save)
        return cache / repo / "snapshots" / commit

    store("models--someone--model", OLD, "older", 1.0)
    store("models--someone--model", NEW, "main", 2.0)
    pickled = store("models--pickled", NEW, "main", 3.0)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    store("models--someone--shards", NEW, "main", 4.0, max_shard_size="2KB")
    store("models--someone--shards", OLD, "older", 5.0, max_shard_size="2KB")
    (store("models--someone--empty", NEW, "main", 6.0) / "model.safetensors").unlink()

    root = Path(model_module.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", LOAD_FROM_CACHE, json.dumps(list(CASES.values()))],
        env=os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)},
        cwd=cache,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1])))


@pytest.mark.parametrize(
    ("case", "mark"),
    [
        ("default branch", 2.0),
        ("branch", 1.0),
        ("commit", 1.0),
        ("pickle", 3.0),
        ("shards", 4.0),
        ("shards of a branch", 5.0),
    ],
)
def test_a_hub_name_and_revision_are_resolved(from_cache: dict[str, Any], case: str, mark: float) -> None:
    assert from_cache[case] == mark


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown revision", "someone/model"),
        ("no weights", "someone/empty has no weights"),
        ("unknown model", "someone/else is not a folder and cannot be loaded from the hub: Cannot find"),
        ("unknown folder", "out/run/checkpoints/step_00000001 is not a folder"),
        ("not a name", "./no/such folder is not a folder"),
        ("empty", "folder"),
    ],
)
def test_what_is_not_in_the_cache_is_a_clear_error(from_cache: dict[str, Any], case: str, message: str) -> None:
    kind, text = from_cache[case]
    assert kind == "ModelError"
    assert message in text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.HFValidationError("no such name"), "is not a folder .* no such name"),
        (hub_errors.LocalEntryNotFoundError("connection refused"), "from the hub: connection refused"),
        (OSError("No space left on device"), "No space left on device"),
    ],
)
def test_what_the_hub_refuses_is_a_clear_error(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*args: Any, **kwargs: Any) -> str:
        asked.append((args, kwargs))
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=message) as caught:
        GPT.from_pretrained("someone/model", revision="v1")
    assert "someone/model" in str(caught.value)
    files = ["config.json", "model.safetensors", "model-?????-of-?????.safetensors"]
    assert asked == [(("someone/model",), {"revision": "v1", "allow_patterns": files})]


def test_pickled_weights_are_downloaded_only_without_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = ["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "model.fp16.safetensors"]
    asked: list[list[str]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append([file for file in hub if any(fnmatch(file, pattern) for pattern in allow_patterns)])
        for file in asked[-1]:
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for lacking, expected in (
        ("", [["config.json", "model.safetensors"]]),
        ("model.safetensors", [["config.json"], ["config.json", "pytorch_model.bin"]]),
    ):
        hub, asked = [file for file in hub if file != lacking], []
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=r"config\.json cannot be used"):
            GPT.from_pretrained("someone/model")
        assert asked == expected


# With the tokenizer, through transformers


def test_a_pipeline_writes_our_greedy_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    torch.manual_seed(0)
    config = GPTConfig(64, tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=32, eos_token_id=tokenizer.eot)
    ours = GPT(replace(config, initializer_range=0.3)).eval()
    with torch.no_grad():
        ours.wte.weight[128:] = 0  # logits 0: less likely than the best of 128 random ones, so the answer is ASCII
    ours.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    prompt = "To be, or not to be"
    ids = tokenizer.encode(prompt)
    with torch.no_grad():
        answer = ours.generate(torch.tensor([ids]), 24, temperature=0)[0].tolist()
    assert len(set(answer[len(ids) :])) > 5, "a text that repeats itself would prove little"
    generator = pipeline("text-generation", model=str(tmp_path))
    assert generator.model.dtype == torch.float32
    assert generator.model.generation_config.eos_token_id == tokenizer.eot
    greedy = {"do_sample": False, "max_new_tokens": 24}
    assert generator(prompt, **greedy)[0]["generated_text"] == tokenizer.decode(answer)
    assert generator(prompt, return_tensors=True, **greedy)[0]["generated_token_ids"] == answer


# Memory

MEASURE = """
import os, sys
from pathlib import Path
from model import GPT

def peak_bytes():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

GPT.from_pretrained(sys.argv[1])  # a small one first, for one-time imports and allocations
for folder in sys.argv[2:]:
    if not (child := os.fork()):  # its peak starts at its current usage
        before = peak_bytes()
        model = GPT.from_pretrained(folder)
        print(peak_bytes() - before, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
def test_peak_memory_of_loading(tmp_path: Path, published: Path) -> None:
    config = GPTConfig(block_size=512, vocab_size=8000, n_layer=3, n_head=12, n_embd=768)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)
    model.save_pretrained(tmp_path / "safetensors")
    tensors = load_file(tmp_path / "safetensors" / "model.safetensors")
    for kind in ("zip", "legacy"):
        (tmp_path / kind).mkdir()
        shutil.copy(tmp_path / "safetensors" / "config.json", tmp_path / kind)
        torch.save(tensors, tmp_path / kind / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")
    size = (tmp_path / "safetensors" / "model.safetensors").stat().st_size
    assert size > 100e6
    folders = [str(tmp_path / kind) for kind in ("safetensors", "zip", "legacy")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(published), *folders],
        env=os.environ | {"PYTHONPATH": str(Path(model_module.__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    for folder in folders:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    peaks = [int(line) / size for line in done.stdout.split()]
    # Pages of a mapped pickle count until the last tensor is read; they can be evicted, unlike the old format's copy.
    limits = {"safetensors": 1.2, "zip": 2.3, "legacy": 1.6}
    assert all(0.9 < peak < limit for peak, limit in zip(peaks, limits.values(), strict=True)), (limits, peaks)
