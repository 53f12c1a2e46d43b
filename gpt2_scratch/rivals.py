"""GPT-2 in other programs, from our weights, for bench.py to time beside ours on a CPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import GPT


class Rival(NamedTuple):
    dtype: str
    generate: Callable[[Tensor, int], Any]  # writes so many greedy tokens after each row of a prompt (B, T)
    weight_bytes: int  # that a token reads
    most_rows: int | None  # at a time


def ctranslate2(model: GPT, folder: Path) -> Iterator[Rival]:
    """CTranslate2 in float32 and in int8."""
    import ctranslate2
    from ctranslate2.specs import TransformerDecoderModelSpec
    from ctranslate2.specs.common_spec import Activation

    c = model.config
    spec = TransformerDecoderModelSpec.from_config(c.n_layer, c.n_head, activation=Activation.GELUTanh)
    decoder, vocabulary = spec.decoder, [str(i) for i in range(c.vocab_size)]
    decoder.scale_embeddings = False
    table = numpy(model.wte.weight)[: c.vocab_size]
    decoder.embeddings.weight = decoder.projection.weight = table
    decoder.position_encodings.encodings = numpy(model.wpe.weight)
    norms: list[Any] = [(decoder.layer_norm, model.ln_f)]
    linears: list[Any] = []
    for layer, block in zip(decoder.layer, model.h):
        norms += [(layer.self_attention.layer_norm, block.ln_1), (layer.ffn.layer_norm, block.ln_2)]
        linears += zip(layer.self_attention.linear, (block.attn.c_attn, block.attn.c_proj))
        linears += zip((layer.ffn.linear_0, layer.ffn.linear_1), (block.mlp.c_fc, block.mlp.c_proj))
    for theirs, ours in norms:
        theirs.gamma, theirs.beta = numpy(ours.weight), numpy(ours.bias)
    for theirs, ours in linears:
        theirs.weight, theirs.bias = numpy(ours.weight), numpy(ours.bias)
    spec.register_vocabulary(vocabulary)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = vocabulary[-1]
    spec.validate()
    spec.optimize()
    spec.save(str(folder))
    for dtype, size in (("float32", 4), ("int8", 1)):
        generator = ctranslate2.Generator(str(folder), compute_type=dtype, intra_threads=torch.get_num_threads())

        def generate(prompt: Tensor, n: int, generator: Any = generator) -> list[list[int]]:
            rows = [[str(token) for token in row] for row in prompt.tolist()]
            options = {"max_length": n, "min_length": n, "sampling_topk": 1, "include_prompt_in_result": False}
            return [result.sequences_ids[0] for result in generator.generate_batch(rows, **options)]

        yield Rival(dtype, generate, size * products(model), None)


def llamacpp(model: GPT, folder: Path) -> Iterator[Rival]:
    """llama.cpp through xllamacpp, one row at a time, in bfloat16, float16 and q8_0 (blocks of 32 in int8)."""
    import gguf
    import xllamacpp
    from gguf.quants import quantize

    c = model.config
    tensors = {name: numpy(p) for name, p in model.named_parameters()}
    tensors["wte.weight"] = tensors["wte.weight"][: c.vocab_size]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, c.n_layer)
    for kind, size in (("BF16", 2), ("F16", 2), ("Q8_0", 34 / 32)):
        path = folder / f"{kind}.gguf"
        writer = gguf.GGUFWriter(path, "gpt2")
        writer.add_context_length(c.block_size)
        writer.add_embedding_length(c.n_embd)
        writer.add_feed_forward_length(c.n_inner or 4 * c.n_embd)
        writer.add_block_count(c.n_layer)
        writer.add_head_count(c.n_head)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([str(i) for i in range(c.vocab_size)])
        writer.add_token_merges(["1 0"])  # it asks for one
        writer.add_eos_token_id(c.vocab_size - 1)
        for name, tensor in tensors.items():
            matrix = tensor.ndim == 2 and name != "wpe.weight"
            dtype = gguf.GGMLQuantizationType[kind if matrix else "F32"]
            writer.add_tensor(str(names.get_name(name, (".weight", ".bias"))), quantize(tensor, dtype), raw_dtype=dtype)
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), c.block_size, 1
        params.cpuparams.n_threads, params.verbosity = torch.get_num_threads(), -1
        server = xllamacpp.Server(params)

        def generate(prompt: Tensor, n: int, server: Any = server) -> Any:
            fixed = {"temperature": 0, "samplers": ["temperature"], "ignore_eos": True, "cache_prompt": False}
            return server.handle_completions({"prompt": prompt[0].tolist(), "n_predict": n, **fixed})

        yield Rival({"BF16": "bfloat16", "F16": "float16"}.get(kind, "q8_0"), generate, int(size * products(model)), 1)


RIVALS = {"ctranslate2": ctranslate2, "llamacpp": llamacpp}


def products(model: GPT) -> int:
    """The number of weights in matrix products that decoding a token reads."""
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return sum(linear.weight.numel() for linear in linears)


def numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()
