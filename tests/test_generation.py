"""KV caches, Generation and the weight layouts for decoding, against plain forward passes."""

import copy
import functools
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_scratch import generation
from gpt2_scratch.cli import UserError
from gpt2_scratch.cpu import decode
from gpt2_scratch.cpu.decode import (
    Int8Linear,
    KernelBlock,
    KernelLinear,
    PackedLinear,
    can_pack,
    compiled,
    kernels,
    prepare,
    prompts_are_faster_in_onednn,
    round_to_int8,
)
from gpt2_scratch.generation import IDLE_CACHES, Generation, RaggedCache, compiled_decode, recorded
from model import GPT, CacheView, GPTConfig, KVCache, sample_token

SMALL = GPTConfig(block_size=12, vocab_size=41, n_layer=2, n_head=2, n_embd=8, initializer_range=0.5)


@st.composite
def networks(draw: st.DrawFn) -> GPT:
    """Small float64 GPT-1 and GPT-2 networks with nonzero biases."""
    n_head = draw(st.integers(1, 3))
    gpt1 = draw(st.booleans())
    config = GPTConfig(
        block_size=draw(st.integers(1, 12)),
        vocab_size=draw(st.sampled_from([2, 41, 65])),
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_embd=n_head * draw(st.integers(1, 4)),
        post_norm=gpt1,
        tie_word_embeddings=draw(st.booleans()),
        scale_attn_weights=gpt1 or draw(st.booleans()),
        scale_attn_by_inverse_layer_idx=not gpt1 and draw(st.booleans()),
        initializer_range=0.5,
    )
    return network(config, draw(st.integers(0, 2**31)))


def network(config: GPTConfig, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith(("wte", "lm_head")):  # whose padding stays 0
                p += 0.3 * torch.randn_like(p)
    return model


@st.composite
def samplings(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "temperature": draw(st.sampled_from([0.0, 0.7, 1.0, 1.5])),
        "top_k": draw(st.sampled_from([None, 5, 50])),
        "top_p": draw(st.sampled_from([None, 0.6, 0.95])),
    }


@st.composite
def texts(draw: st.DrawFn, model: GPT, longest: int) -> list[int]:
    return draw(st.lists(st.integers(0, model.config.vocab_size - 1), min_size=1, max_size=longest))


def write(generation: Generation, steps: int) -> list[list[int]]:
    """The tokens of all rows, for a number of steps."""
    return torch.stack([generation.step()[0] for _ in range(steps)], dim=1).tolist()


# Cache


@settings(max_examples=30)
@given(data=st.data(), model=networks(), static=st.booleans())
@torch.no_grad()
def test_cached_logits_equal_those_of_a_full_pass(data: st.DataObject, model: GPT, static: bool) -> None:
    """Over several passes, in each of which every row has its own number of tokens, padded on the right."""
    config = model.config
    rows = data.draw(st.integers(1, 3))
    ids = torch.randint(config.vocab_size, (rows, config.block_size))
    full, _ = model(ids)
    max_len = data.draw(st.integers(config.block_size, config.block_size + 3))
    cache = RaggedCache(config, rows, max_len, torch.float64, static=static)
    seen, room = [0] * rows, config.block_size
    while room:
        T = data.draw(st.integers(1, room))
        room -= T
        counts = data.draw(st.lists(st.integers(0, T), min_size=rows, max_size=rows) | st.just([T] * rows))
        chunk = torch.randint(config.vocab_size, (rows, T))  # the rest of this is padding
        for row in range(rows):
            chunk[row, : counts[row]] = ids[row, seen[row] : seen[row] + counts[row]]
        logits, _ = model(chunk, cache=cache)
        assert cache.length.tolist() == [n + T for n in seen]
        for row in range(rows):
            expected = full[row, seen[row] : seen[row] + counts[row]]
            torch.testing.assert_close(logits[row, : counts[row]], expected, rtol=1e-9, atol=1e-9)
            seen[row] += counts[row]
        cache.set_length(seen)


@torch.no_grad()
def test_cache_of_a_smaller_dtype_only_rounds() -> None:
    model = network(SMALL).float()
    idx = torch.arange(10)[None]
    cache = KVCache(SMALL, 1, 10, dtype=torch.bfloat16)
    logits = torch.cat([model(part, cache=cache)[0] for part in idx.split([4, 1, 5], dim=1)], dim=1)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(idx)[0], rtol=0, atol=0.2)


@torch.no_grad()
def test_more_than_the_cache_holds_is_refused_and_changes_nothing() -> None:
    model = network(SMALL)
    ids = torch.arange(5)[None]
    cache = KVCache(SMALL, 1, 5, dtype=torch.float64)
    model(ids[:, :3], cache=cache)
    with pytest.raises(ValueError, match="3 tokens after 3 do not fit a cache of 5"):
        model(ids[:, :3], cache=cache)
    logits, _ = model(ids[:, 3:], cache=cache)
    torch.testing.assert_close(logits, model(ids)[0][:, 3:])
    with pytest.raises(ValueError, match="do not fit a cache of 5"):
        model(ids[:, :1], cache=cache)


@pytest.mark.parametrize("static", [False, True])
def test_more_tokens_at_once_than_the_cache_or_the_context_holds_are_refused(static: bool) -> None:
    model = network(SMALL)
    with pytest.raises(ValueError, match=r"6 tokens .* cache of 5"):
        model(torch.zeros(1, 6, dtype=torch.int64), cache=RaggedCache(SMALL, 1, 5, torch.float64, static=static))
    with pytest.raises(ValueError, match=r"13 tokens .* block_size of 12"):
        model(torch.zeros(1, 13, dtype=torch.int64), cache=RaggedCache(SMALL, 1, 99, torch.float64, static=static))


def test_more_tokens_than_positions_are_refused_though_the_cache_has_room() -> None:
    model = network(SMALL)
    cache = KVCache(SMALL, 1, 99, dtype=torch.float64)
    model(torch.zeros(1, 10, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match=r"13 tokens .* block_size of 12"):
        model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)


# Generation


def test_greedy_text_equals_that_of_transformers(tmp_path: Path) -> None:
    """900 tokens of a context of 1024, from prompts of different lengths, alone and together."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=500,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.block_size == 1024 and ours.wte.weight.dtype == torch.float32

    lengths = (1, 37, 100)
    prompts = [torch.randint(500, (n,)).tolist() for n in lengths]
    padded = torch.tensor([[0] * (100 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (100 - n) + [1] * n for n in lengths])
    theirs_text = theirs.generate(
        padded, attention_mask=mask, max_new_tokens=900, do_sample=False, pad_token_id=0, eos_token_id=None
    )[:, 100:].tolist()
    assert all(len(set(text)) > 50 for text in theirs_text), "a text that repeats itself would prove little"

    assert write(Generation(ours, prompts, 900, temperature=0), 900) == theirs_text
    alone = ours.generate(torch.tensor(prompts[1:2]), 900, temperature=0)
    assert alone.tolist() == [prompts[1] + theirs_text[1]]


@settings(max_examples=25)
@given(data=st.data(), model=networks(), sampling=samplings(), seed=st.integers(0, 2**62), steps=st.integers(1, 30))
def test_a_row_does_not_depend_on_the_others(
    data: st.DataObject, model: GPT, sampling: dict[str, Any], seed: int, steps: int
) -> None:
    """Whenever the others end, within the context and past it."""
    prompts = data.draw(st.lists(texts(model, longest=14), min_size=1, max_size=4))
    numbers = data.draw(st.lists(st.integers(0, 1000), min_size=len(prompts), max_size=len(prompts), unique=True))
    ends = data.draw(st.lists(st.integers(1, steps), min_size=len(prompts), max_size=len(prompts)))

    alone = [
        write(Generation(model, [prompt], steps, **sampling, seed=seed, row_numbers=[number]), steps)[0]
        for prompt, number in zip(prompts, numbers)
    ]
    generation = Generation(model, prompts, steps, **sampling, seed=seed, row_numbers=numbers)
    together: list[list[int]] = [[] for _ in prompts]
    for step in range(1, steps + 1):
        tokens, logprobs = generation.step()
        assert len(tokens) == len(logprobs) == len(generation.live)
        for row, token in zip(generation.live, tokens.tolist()):
            together[row].append(token)
        generation.end({row for row, end in enumerate(ends) if end <= step})  # some ended earlier
        assert generation.live == [row for row, end in enumerate(ends) if end > step]
        if not generation.live:
            break
    assert together == [text[:end] for text, end in zip(alone, ends)]


@settings(max_examples=25)
@given(data=st.data(), model=networks(), sampling=samplings(), seed=st.integers(0, 2**62))
@torch.no_grad()
def test_text_equals_that_of_a_loop_without_a_cache(
    data: st.DataObject, model: GPT, sampling: dict[str, Any], seed: int
) -> None:
    """Log-probabilities included, and past the context, where a row continues from its newer half."""
    prompts = data.draw(st.lists(texts(model, longest=14), min_size=1, max_size=3))
    block_size, steps = model.config.block_size, 30
    generation = Generation(model, prompts, steps, **sampling, seed=seed)
    draws = generation.draws.t().clone()  # (rows, steps)
    written = [generation.step() for _ in range(steps)]
    for row, prompt in enumerate(prompts):
        context = prompt[-block_size:]
        for step in range(steps):
            if len(context) - 1 == block_size:  # the cache is full, and the newest token not yet in it
                context = context[len(context) - 1 - block_size // 2 :]
            logits = model(torch.tensor([context]), last_only=True)[0][:, 0].float()
            token = sample_token(logits, draws[row, step : step + 1], **sampling).item()
            assert written[step][0][row].item() == token
            logprob = logits.double().log_softmax(-1)[0, token].item()
            assert written[step][1][row].item() == pytest.approx(logprob, abs=1e-5)
            context = [*context, token]


@settings(max_examples=25)
@given(data=st.data(), model=networks(), sampling=samplings(), seed=st.integers(0, 2**62), steps=st.integers(1, 30))
def test_generate_and_generation_write_the_same(
    data: st.DataObject, model: GPT, sampling: dict[str, Any], seed: int, steps: int
) -> None:
    """The plain loop and the fast one, greedy or with the same seed, within the context and past it."""
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 14)))
    prompts = torch.randint(model.config.vocab_size, shape)
    written = write(Generation(model, prompts.tolist(), steps, **sampling, seed=seed), steps)
    text = model.generate(prompts, steps, **sampling, seed=seed)
    assert torch.equal(text, torch.cat([prompts, torch.tensor(written)], dim=1))


def test_generated_ids_can_be_trained_on() -> None:
    """They must not be inference tensors, which autograd refuses."""
    model = network(SMALL)
    idx = model.generate(torch.zeros(1, 1, dtype=torch.int64), 5)
    model(idx[:, :-1], idx[:, 1:])[1].backward()


def test_seeds_and_row_numbers() -> None:
    model = network(SMALL)
    prompts = [[1, 2], [1, 2]]

    def text(**arguments: Any) -> list[list[int]]:
        return write(Generation(model, prompts, 30, temperature=1.5, **arguments), 30)

    first = text(seed=1)
    assert first == text(seed=1) == text(seed=1, row_numbers=[0, 1])
    assert first[0] != first[1], "two samples of one prompt must differ"
    assert text(seed=1, row_numbers=[1, 0]) == first[::-1]
    others = [*text(seed=2), *text(seed=1, row_numbers=[2, 3]), *text(), *text()]
    assert len({tuple(row) for row in first + others}) == 10


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Generation(network(SMALL), [[1], []], 5)


def test_compiled_steps_write_the_same() -> None:
    """Ragged rows, one of which ends early, past the context."""
    model = network(replace(SMALL, n_layer=1))  # compiling takes seconds per layer
    sampling = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 3}
    seen = []
    for compile in (False, True):
        generation = Generation(model, [[1, 2, 3, 4, 5], [6], [7, 8]], 40, **sampling, compile=compile)
        before = [generation.step() for _ in range(20)]
        generation.end({1})
        after = [generation.step() for _ in range(20)]
        assert generation.live == [0, 2] and all(len(tokens) == 2 for tokens, _ in after)
        seen.append([torch.cat([values[i] for values in before + after]) for i in (0, 1)])
    assert torch.equal(seen[0][0], seen[1][0])
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compile", [False, True])
def test_a_text_that_nobody_reads_any_more_frees_its_memory(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Python's collector of cycles, which comes by only after many batches of gigabytes each."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    generation = Generation(network(SMALL), [[1, 2], [3]], 3, compile=compile)
    generation.step()
    seen = weakref.ref(generation), weakref.ref(generation.ids), weakref.ref(generation.model)
    gc.disable()
    try:
        del generation
        assert [ref() for ref in seen] == [None] * 3
    finally:
        gc.enable()


def test_compiled_texts_share_one_cache_and_few_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty batches of three texts, each of other lengths, and one text: as uncompiled, by code compiled thrice."""
    model = network(replace(SMALL, block_size=64, n_layer=1))
    compilations, addresses = [], set()

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Any:
        compilations.append(graph)
        return graph.forward

    compile = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, **options))
    compiled_decode.cache_clear()
    torch._dynamo.reset()
    for n in range(21):
        prompts = [[(n * i + 7) % 41 for i in range(n + 1 + 2 * row)] for row in range(3 if n < 20 else 1)]
        written = write(Generation(model, prompts, 5 + n, seed=n, compile=True), 5 + n)
        assert written == write(Generation(model, prompts, 5 + n, seed=n), 5 + n)
        addresses.add(IDLE_CACHES[model].k.data_ptr())
    compiled_decode.cache_clear()
    assert len(compilations) == 3 and len(addresses) <= 3 and IDLE_CACHES[model].k.shape[1:4] == (4, 2, 64)
    one = Generation(model, [[1]], 3, compile=True)
    assert one.cache.k.data_ptr() in addresses
    assert Generation(model, [[1]], 3, compile=True).cache is not one.cache, "which is in use"


def test_a_step_is_recorded_again_only_for_other_settings_or_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph reads the addresses it was recorded with. Recording itself: tests/test_gpu.py."""
    monkeypatch.setattr(generation, "RecordedDecode", lambda step, rows, device: (step, rows))
    model = network(SMALL)
    cache = RaggedCache(SMALL, 2, 8, torch.float64, static=True)
    greedy = functools.partial(generation.decode, model, cache, temperature=0)
    first = recorded(greedy, cache)
    assert recorded(functools.partial(generation.decode, model, cache, temperature=0), cache) is first
    assert first == (greedy, 2) and cache.length.tolist() == [0, 0]
    warmer = functools.partial(generation.decode, model, cache, temperature=1)
    assert recorded(warmer, cache) == (warmer, 2)
    second = recorded(warmer, cache)
    model.wpe.weight.data = model.wpe.weight.data.clone()
    assert recorded(warmer, cache) is not second


def test_sampling_leaves_out_the_attention_that_plans_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    hidden = GPT.hidden
    watched = lambda *args: (seen.append(torch.backends.cuda.cudnn_sdp_enabled()), hidden(*args))[1]  # noqa: E731
    monkeypatch.setattr(GPT, "hidden", watched)
    write(Generation(network(SMALL), [[1, 2, 3]], 12), 12)
    assert len(seen) == 14 and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()


# Weight layouts

MIDDLE = GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=4, n_embd=64, initializer_range=0.1)

needs_packing = pytest.mark.skipif(not can_pack(), reason="needs a CPU with bfloat16 support in oneDNN")
needs_kernels = pytest.mark.skipif(compiled(False) is None, reason="needs Linux, AVX2 and a C compiler")
REGISTER = compiled(False).tile_outputs // 2 if compiled(False) else 16  # floats


@pytest.fixture(autouse=True)
def exact_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every input of a product in float32, whatever is fastest on this CPU."""
    monkeypatch.setattr(decode, "kernels", lambda: compiled(False))
    monkeypatch.setattr(decode, "prompts_are_faster_in_onednn", lambda: False)


@pytest.fixture(params=["exact", "rounding", "onednn"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, exact_kernels: None) -> str:
    """Each way to multiply in turn, as if it had been measured to be the fastest."""
    if request.param == "rounding":
        monkeypatch.setattr(decode, "kernels", lambda: compiled(True))
    elif request.param == "onednn":
        try:
            PackedLinear(nn.Linear(2, 2).bfloat16())
        except (AttributeError, RuntimeError) as error:
            pytest.skip(f"this build of PyTorch cannot pack: {error}")
        monkeypatch.setattr(decode, "prompts_are_faster_in_onednn", lambda: True)
    return request.param


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch, exact_kernels: None) -> None:
    """As on a machine that cannot compile them."""
    monkeypatch.setattr(decode, "kernels", lambda: None)


@needs_kernels
def test_compiler_may_have_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "env cc -g")
    assert compiled.__wrapped__(False) is not None


def test_missing_kernels_print_nothing(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    for compiler in ("there-is-no-such-compiler", "false"):  # `false` is a program that fails
        monkeypatch.setenv("CC", compiler)
        assert compiled.__wrapped__(False) is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(KernelLinear, marks=needs_kernels), pytest.param(PackedLinear, marks=needs_packing)],
)
@torch.no_grad()
def test_prepared_weights_give_the_same_logits(kind: type, request: pytest.FixtureRequest) -> None:
    """Up to the rounding of bfloat16: every path is as close to exact arithmetic as the plain one."""
    if kind is PackedLinear:
        request.getfixturevalue("no_kernels")
    exact = network(MIDDLE).bfloat16().double()
    plain, packed = network(MIDDLE).bfloat16(), network(MIDDLE).bfloat16()
    prepare(packed)
    assert type(packed.get_submodule("h.0.block.mlp.c_fc" if kind is KernelLinear else "h.0.mlp.c_fc")) is kind
    assert type(packed.lm_head) is kind
    for shape in ((1, 1), (3, 1), (2, 32), (7, 31)):
        idx = torch.randint(300, shape)
        logits, _ = exact(idx)
        errors = [(model(idx)[0] - logits).square().mean().sqrt() / logits.std() for model in (plain, packed)]
        assert errors[1] < 1.5 * errors[0] < 0.05
        if kind is KernelLinear:
            assert errors[1] < 1e-5  # only the weights are in bfloat16


@pytest.mark.usefixtures("no_kernels")
@torch.no_grad()
def test_bfloat16_is_computed_in_float32_where_nothing_supports_it(
    no_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its products take many times as long there."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("bf16 path needs the cpu support avx_ne_convert or avx512bw, avx512vl and avx512dq")

    for op in ("_reorder_linear_weight", "_linear_pointwise"):
        monkeypatch.setattr(torch.ops.mkldnn, op, refuse)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model, idx = network(MIDDLE).bfloat16(), torch.randint(300, (2, 32))
    expected, _ = copy.deepcopy(model).float()(idx)
    assert torch.equal(prepare(model)(idx)[0], expected) and expected.dtype == torch.float32
    assert prepare(network(MIDDLE).bfloat16(), compile=True).wte.weight.dtype == torch.bfloat16


@needs_kernels
@settings(max_examples=60)
@given(
    rows=st.integers(1, 20),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    int8=st.booleans(),
    bias=st.booleans(),
    rounding=st.booleans(),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_kernel_linear_equals_linear(
    rows: int, sizes: tuple[int, int], int8: bool, bias: bool, rounding: bool, seed: int
) -> None:
    """For any number of rows, for strided inputs, and each row bit for bit as it is alone."""
    torch.manual_seed(seed)
    linear = nn.Linear(*sizes, bias=bias).bfloat16()
    kernel = KernelLinear(linear, int8, library=compiled(rounding))
    x = torch.randn(rows, 2, sizes[0])[:, 1:]
    y = kernel(x)
    if rounding:
        assert torch.equal(y, kernel(x.bfloat16()))
        x = x.bfloat16()
    weight = linear.weight.double()
    if int8:
        whole, scale = round_to_int8(linear.weight)
        weight = whole * scale.double()[:, None]
    expected = x.double() @ weight.t() + (linear.bias.double() if bias else 0)
    summands = x.double().abs() @ weight.abs().t() + (linear.bias.double().abs() if bias else 0)
    assert y.dtype == torch.float32 and y.shape == (rows, 1, sizes[1])
    assert ((y.double() - expected).abs() <= 1e-6 * summands).all()
    assert torch.equal(torch.stack([kernel(row) for row in x]), y)


@needs_kernels
@pytest.mark.parametrize(("seconds", "rounds"), [((1, 2), True), ((0.95, 1), False), ((2, 1), False)])
def test_inputs_are_rounded_where_that_is_clearly_faster(
    seconds: tuple[float, float], rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where one instruction multiplies rounded ones."""
    pretended = iter(seconds)
    monkeypatch.setattr(decode, "shortest", lambda run: (run(), next(pretended))[1])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert kernels.__wrapped__() is compiled(rounds)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert kernels.__wrapped__() is compiled(False)


@needs_kernels
@torch.no_grad()
def test_prompts_use_onednn_where_it_is_faster(products: str) -> None:
    """And a row has the same bits among any others: oneDNN's own results depend on their number."""
    torch.manual_seed(0)
    linear = nn.Linear(3072, 768).bfloat16()
    kernel = KernelLinear(linear, onednn_prompts=decode.prompts_are_faster_in_onednn())
    x = torch.randn(10, 30, 3072)
    y = kernel(x)
    assert (kernel.prefill is not None) == (products == "onednn")
    if kernel.prefill:
        torch.testing.assert_close(y, PackedLinear(linear)(x.bfloat16()).float(), rtol=2**-7, atol=2**-7)
        assert not torch.equal(y[:, :1], kernel(x[:, :1]))  # one new token per row: inputs are not rounded
    for rows, length in ((5, 2), (1, 30), (2, 7)):
        assert torch.equal(kernel(x[:rows, :length]), y[:rows, :length])


@needs_kernels
@pytest.mark.parametrize(("seconds", "chosen"), [((1, 2), True), ((0.95, 1), False), ((2, 1), False)])
def test_onednn_takes_prompts_where_it_is_clearly_faster(
    seconds: tuple[float, float], chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = iter(seconds)
    monkeypatch.setattr(decode, "shortest", lambda run: next(pretended))
    monkeypatch.setattr(decode, "PackedLinear", lambda linear: linear)
    monkeypatch.setattr(decode, "can_pack", lambda: True)
    assert prompts_are_faster_in_onednn.__wrapped__() == chosen
    monkeypatch.setattr(decode, "can_pack", lambda: False)
    assert not prompts_are_faster_in_onednn.__wrapped__()


@needs_kernels
@settings(max_examples=40)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 200),
    kind=st.sampled_from(["normal", "wide", "any", "half zeros", "equal"]),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_packing_changes_no_weight(rows: int, columns: int, kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=False).bfloat16()
    weight = torch.randn(rows, columns)
    if kind == "wide":
        weight *= torch.exp2(torch.randint(-30, 30, weight.shape))
    elif kind == "any":
        weight = torch.randint(-(2**15), 2**15, weight.shape, dtype=torch.int16).view(torch.bfloat16).nan_to_num()
    elif kind == "half zeros":
        weight *= torch.randint(2, weight.shape)
    elif kind == "equal":
        weight = torch.full_like(weight, -0.25)
    linear.weight.copy_(weight)
    one_by_one = torch.eye(columns)[:, None]  # (columns, 1, columns): a prompt may go through AMX
    assert torch.equal(KernelLinear(linear)(one_by_one)[:, 0], linear.weight.float().t())


@needs_kernels
@torch.no_grad()
def test_weights_of_a_network_take_about_12_bits() -> None:
    """If normally distributed, with channels of different scales, or half of them zero."""
    linear = nn.Linear(512, 256).bfloat16()
    for change in (torch.ones(()), torch.logspace(-1, 1, 256)[:, None], torch.randint(2, (256, 512))):
        linear.weight.copy_(torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02 * change)
        assert 12 <= KernelLinear(linear).weight.numel() * 8 / linear.weight.numel() < 12.6


@needs_kernels
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=10),
    T=st.just(1) | st.integers(1, 70),
    heads=st.sampled_from([(64 // REGISTER, REGISTER), (2, 16), (1, 64), (2, 80), (1, 96)]),
    inner=st.sampled_from([None, 32, 96]),
    gpt1=st.booleans(),
    int8=st.booleans(),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_kernel_block_equals_block(
    lengths: list[int],
    T: int,
    heads: tuple[int, int],
    inner: int | None,
    gpt1: bool,
    int8: bool,
    spread: float,
    seed: int,
) -> None:
    """Against float64, for new tokens and prompts after rows of different lengths, and heads of whole registers."""
    n_head, head_dim = heads
    B, C = len(lengths), n_head * head_dim
    config = GPTConfig(
        block_size=150,
        vocab_size=2,
        n_layer=2,
        n_head=n_head,
        n_embd=C,
        n_inner=None if gpt1 else inner,
        post_norm=gpt1,
        layer_norm_epsilon=1e-3,
        scale_attn_by_inverse_layer_idx=not gpt1,
        initializer_range=spread / C**0.5,
    )
    model = network(config, seed).bfloat16()
    exact = copy.deepcopy(model.h[1]).double()
    if int8:
        for linear in (exact.attn.c_attn, exact.attn.c_proj, exact.mlp.c_fc, exact.mlp.c_proj):
            whole, scale = round_to_int8(linear.weight)
            linear.weight.copy_(whole * scale[:, None])
    block = prepare(model, int8).h[1]
    assert isinstance(block, KernelBlock)
    cache = RaggedCache(config, B, 141, torch.bfloat16)
    cache.k.normal_()
    cache.v.normal_()
    cache.set_length(lengths)
    before_k, before_v = cache.k.clone(), cache.v.clone()
    x = torch.randn(B, T, C)
    y = block(x, cache.view(T))

    class Reference(CacheView):
        """Checks what the kernel stored, then attends to it in float64."""

        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            for stored, new, before in ((self.k, k, before_k), (self.v, v, before_v)):
                for row, n in enumerate(lengths):
                    written = stored[1, row, :, n : n + T]
                    torch.testing.assert_close(written.double(), new[row], rtol=2**-7, atol=1e-3)
                    before[1, row, :, n : n + T] = written
                assert torch.equal(stored, before), "nothing else is written to"
            y = []
            for row, n in enumerate(lengths):
                keys, values = (stored[1, row, :, : n + T].double() for stored in (self.k, self.v))
                later = torch.ones(T, n + T, dtype=torch.bool).triu(n + 1)
                scores = (q[row] @ keys.transpose(1, 2) * scale).masked_fill(later, -torch.inf)
                y.append(scores.softmax(-1) @ values)
            return torch.stack(y)

    expected = exact(x.double(), Reference(**vars(cache.view(T))))
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
    assert torch.equal(block(x, cache.view(T)), y)
    for row, n in enumerate(lengths):
        k, v = (t[:, row : row + 1].contiguous() for t in (cache.k, cache.v))
        for length in {T, min(T, T // 2 + 1)}:  # prompts may be padded to the length of the longest
            alone = CacheView(k, v, n + torch.arange(length)[None], 141, None)
            assert torch.equal(block(x[row : row + 1, :length], alone)[0], y[row, :length])


@needs_kernels
@torch.no_grad()
def test_kernel_gelu_is_the_tanh_form_to_float32_precision() -> None:
    """With weights of 0 and 1, a block turns an input of 0 into the activation of ln_2's bias."""
    config = replace(MIDDLE, n_embd=512, n_inner=512)
    model = network(config).bfloat16()
    block, inputs = model.h[0], torch.linspace(-12, 12, 512).bfloat16()
    for p in block.parameters():
        p.zero_()
    block.ln_2.bias.copy_(inputs)
    block.mlp.c_fc.weight.copy_(torch.eye(512))
    block.mlp.c_proj.weight.copy_(torch.eye(512))
    y = prepare(model).h[0](torch.zeros(1, 1, 512), KVCache(config, 1, 12, dtype=torch.bfloat16).view(1))
    expected = nn.functional.gelu(inputs.double(), approximate="tanh")
    torch.testing.assert_close(y[0, 0].double(), expected, rtol=2e-6, atol=1e-9)


@needs_kernels
@torch.no_grad()
def test_kernels_propagate_nan() -> None:
    assert KernelLinear(nn.Linear(8, 16))(torch.full((1, 8), torch.nan)).isnan().all()
    model = prepare(network(MIDDLE).bfloat16())
    x = torch.zeros(2, 1, 64)
    x[0, 0, 5] = torch.nan
    y = model.h[0](x, KVCache(MIDDLE, 2, 12, dtype=torch.bfloat16).view(1))
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize(
    "change",
    [{}, {"post_norm": True}, {"n_inner": 128}, {"n_inner": 100}, {"n_embd": 36}, {"activation": "relu"}],
    ids=str,
)
@torch.no_grad()
def test_prepared_networks_agree_with_exact_arithmetic(change: dict[str, Any], products: str) -> None:
    """With and without a kernel for their blocks, for rows of different lengths, past the context."""
    config = replace(MIDDLE, **change)
    exact = network(config).bfloat16().double()
    model = prepare(network(config).bfloat16())
    prompts = [[5, 6, 7], [8], list(range(20)), *[[9]] * 6]
    generation = Generation(model, prompts, 28, seed=0)
    written = [generation.step() for _ in range(28)]
    for row, prompt in enumerate(prompts[:3]):
        context = list(prompt)
        for tokens, logprobs in written:
            if len(context) - 1 == config.block_size:
                context = context[len(context) - 1 - config.block_size // 2 :]
            expected = exact(torch.tensor([context]), last_only=True)[0][0, 0].log_softmax(-1)[tokens[row]]
            assert logprobs[row].item() == pytest.approx(expected.item(), abs=0.1)
            context.append(int(tokens[row]))


@needs_kernels
@pytest.mark.parametrize("int8", [False, True])
def test_kernels_write_each_row_as_alone(int8: bool, products: str) -> None:
    """Ragged rows, one of which ends early, past the context."""
    model = prepare(network(MIDDLE).bfloat16(), int8)
    prompts = [[5, 6, 7], [8], list(range(30)), [9, 4]]
    sampling = {"temperature": 0.9, "top_k": 50, "seed": 3}
    together = Generation(model, prompts, 60, **sampling)
    assert isinstance(model.h[0], KernelBlock)
    texts: list[list[int]] = [[] for _ in prompts]
    for step in range(60):
        if step == 20:
            together.end({1})
        for row, token in zip(list(together.live), together.step()[0].tolist()):
            texts[row].append(token)
    for row, prompt in enumerate(prompts):
        alone = Generation(model, [prompt], 60, **sampling, row_numbers=[row])
        assert write(alone, 60)[0][: len(texts[row])] == texts[row]
    assert [len(text) for text in texts] == [60, 20, 60, 60]


@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear_equals_linear(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias).bfloat16()
    try:
        packed = PackedLinear(linear)
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"this build of PyTorch cannot pack: {error}")
    for shape in ((1, 1), (2, 5)):
        x = torch.randn(*shape, 96).bfloat16()
        with torch.no_grad():
            torch.testing.assert_close(packed(x).double(), linear.double()(x.double()), rtol=2**-7, atol=2**-9)
        linear.bfloat16()


def dequantised(weight: Tensor) -> Tensor:
    """By definition: 255 levels from -max to max in every row."""
    scale = weight.double().abs().amax(1, keepdim=True) / 127
    return (weight.double() / scale).round().nan_to_num() * scale


@pytest.mark.parametrize("width", [96, 40, 7])  # CPU kernels read 16 or 32 at a time
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@torch.no_grad()
def test_int8_linear_multiplies_by_rounded_weights(
    width: int, bias: bool, dtype: torch.dtype, precision: float
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(width, 40, bias=bias)
    linear.weight *= torch.logspace(-3, 1, 40)[:, None]  # a different scale for each output channel
    linear.weight[7] = 0
    linear.to(dtype)
    rounded = Int8Linear(linear)
    assert rounded.weight.dtype == torch.int8
    for shape in ((1, 1), (2, 5), (3, 2, 5)):
        x = torch.randn(*shape, width).to(dtype)
        y = rounded(x)
        weight = dequantised(linear.weight)
        expected = x.double() @ weight.t() + (linear.bias.double() if bias else 0)
        summands = x.double().abs() @ weight.abs().t() + (linear.bias.double().abs() if bias else 0)
        assert y.dtype == dtype
        assert ((y.double() - expected).abs() <= precision * summands).all()
        assert torch.equal(y[..., 7], (linear.bias[7] if bias else torch.zeros((), dtype=dtype)).expand(shape))


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_int8_logits_are_close_to_exact_ones(tied: bool) -> None:
    config = replace(MIDDLE, tie_word_embeddings=tied)
    idx = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
    exact, _ = network(config).float()(idx)
    model = prepare(network(config).float(), int8=True)
    assert sum(isinstance(module, Int8Linear | KernelLinear) for module in model.modules()) == 4 * 2 + 1
    rounded, _ = model(idx)
    # A weight is off by up to 1/254 of its row's largest one, about a hundredth of a typical one.
    assert 1e-3 < (rounded - exact).std() / exact.std() < 0.05

    cache = KVCache(config, 2, 32, torch.float32)
    cached = torch.cat(
        [model(idx[:, :20], cache=cache)[0], *(model(idx[:, t : t + 1], cache=cache)[0] for t in range(20, 32))], 1
    )
    torch.testing.assert_close(cached, rounded, rtol=1e-4, atol=1e-4)


def test_int8_is_refused_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """There each weight would be unpacked for each token, which is slower than bfloat16."""
    model = network(SMALL)
    monkeypatch.setattr(Tensor, "device", torch.device("cuda"))
    with pytest.raises(UserError, match="int8 is for CPUs"):
        prepare(model, int8=True)
    assert prepare(model) is model


@torch.no_grad()
def test_preparing_float32_changes_nothing() -> None:
    idx = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
    plain = network(MIDDLE).float()
    assert torch.equal(prepare(network(MIDDLE).float())(idx)[0], plain(idx)[0])
