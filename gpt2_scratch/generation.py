"""Text generation for many rows at once: prompts of different lengths, a seed per row, compiled or recorded steps.

`GPT.generate` is the same in twenty lines, for rows of equal length; tests/test_generation.py holds the two equal.
"""

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor

from gpt2_scratch.device import attention_of_varying_shapes
from model import GPT, CacheView, GPTConfig, KVCache, sample_token, uniform_draws

# One static cache for each model, for the next texts: compiled code is tied to its shape, a CUDA graph to its address.
IDLE_CACHES: WeakKeyDictionary[GPT, "RaggedCache"] = WeakKeyDictionary()


class RaggedCache(KVCache):
    """A KVCache whose rows may differ in length: pad idx on the right, then give the true lengths to `set_length`.

    Entries beyond a row's length are never attended to, and the next pass overwrites them.

    Args:
        static: always attend over the whole buffer, masked, so that every step has the same shapes and can be
            compiled, or recorded as a CUDA graph. Otherwise attend only over the part in use.

    Attributes:
        length: tokens in each row, int64 (B,), on the device.
        kv_len: tokens in the longest row, known without a device sync; stays 0 if static.
        even: whether all rows have the same length.
        recorded: the newest `RecordedDecode` over this cache, and what it was recorded with.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        static: bool = False,
    ):
        super().__init__(config, batch_size, max_len, dtype, device)
        self.length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.even = True
        self.static = static
        self.recorded: tuple[tuple, RecordedDecode] | None = None

    def view(self, T: int) -> CacheView:
        if self.even and not self.static:
            return super().view(T)
        max_len, device = self.k.shape[3], self.k.device
        if self.kv_len + T > max_len:
            raise ValueError(f"{T} tokens after {self.kv_len} do not fit a cache of {max_len}")
        kv_len = max_len if self.static else self.kv_len + T
        positions = self.length[:, None] + torch.arange(T, device=device)  # (B, T)
        mask = (torch.arange(kv_len, device=device) <= positions[..., None])[:, None]  # (B, 1, T, kv_len)
        return RaggedView(self.k, self.v, positions, kv_len, mask)

    def advance(self, T: int) -> None:
        self.length += T
        if not self.static:
            self.kv_len += T

    def set_length(self, lengths: list[int]) -> None:
        """Set the number of tokens in each row; anything beyond it counts as padding."""
        self.length.copy_(torch.tensor(lengths))
        if not self.static:
            self.kv_len, self.even = max(lengths), len(set(lengths)) == 1


class RaggedView(CacheView):
    """The cache during a pass whose rows write at different positions."""

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        rows = torch.arange(len(k), device=k.device)[:, None]  # (B, 1)
        layers = torch.full_like(rows, layer)  # as a tensor: with an int, torch.compile copies the whole cache
        for stored, new in ((self.k, k), (self.v, v)):
            stored[layers, rows, :, self.positions] = new.transpose(1, 2).to(stored.dtype)  # (B, T, n_head, head_dim)


def decode(
    model: GPT,
    cache: RaggedCache,
    tokens: Tensor,
    draw: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One step's work on the device: the tokens after `tokens` (B,) and their log-probabilities, (B,) each."""
    logits, _ = model(tokens[:, None], last_only=True, cache=cache)
    logits = logits[:, 0].float()  # (B, vocab_size)
    tokens = sample_token(logits, draw, temperature, top_k, top_p)
    return tokens, logits.log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]


@functools.cache
def compiled_decode() -> Callable[..., tuple[Tensor, Tensor]]:
    """`decode` compiled; once for each size of cache."""
    return torch.compile(decode, dynamic=False)


class RecordedDecode:
    """A step over a static cache as a CUDA graph, which the host launches whole instead of 200 kernels one by one.

    A graph holds addresses, so the weights and the cache must stay where they are.

    Args:
        step: `decode` or `compiled_decode()`, with its model, cache and sampling settings. It runs once on an empty
            cache, so that nothing is compiled or loaded while recording; set the cache's lengths afterwards.
        batch_size: rows of the cache.
    """

    def __init__(self, step: Callable[..., tuple[Tensor, Tensor]], batch_size: int, device: torch.device):
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.draw = torch.zeros(batch_size, dtype=torch.float64, device=device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()  # memory of the warm-up belongs to a stream of its own, as CUDA asks
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(self.tokens, self.draw)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph):
                self.outputs = step(self.tokens, self.draw)

    def __call__(self, tokens: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """As `decode`; the next call overwrites what this one returns."""
        self.tokens.copy_(tokens)
        self.draw.copy_(draw)
        self.graph.replay()
        return self.outputs


def recorded(step: functools.partial[tuple[Tensor, Tensor]], cache: RaggedCache) -> RecordedDecode:
    """`step` recorded over `cache`: the cache's recording if it is of the same step and weights, else a new one."""
    key = (step.func, *step.keywords.items(), *(weight.data_ptr() for weight in step.args[0].parameters()))
    if cache.recorded is None or cache.recorded[0] != key:
        cache.recorded = None  # frees its memory first
        rows = cache.k.shape[1]
        cache.set_length([0] * rows)
        cache.recorded = key, RecordedDecode(step, rows, cache.k.device)
    return cache.recorded[1]


def take_static_cache(model: GPT, batch_size: int, max_len: int, owner: object) -> RaggedCache:
    """A static cache of at least this size; the model's idle one if that is large enough.

    Sizes are few, so that texts of any length share compiled code and recordings: a power of two of rows, and a
    quarter, half or all of the context. A larger cache replaces a smaller one.

    Args:
        owner: when it goes, the cache is kept for the next.
    """
    block_size, weight = model.config.block_size, model.wte.weight
    idle = IDLE_CACHES.pop(model, None)
    rows, positions = 0, 0
    if idle is not None and idle.k.dtype == weight.dtype and idle.k.device == weight.device:
        rows, positions = idle.k.shape[1], idle.k.shape[3]
    if idle is None or batch_size > rows or max_len > positions:
        del idle  # before its successor is allocated
        rows = max(rows, 1 << (batch_size - 1).bit_length())
        lengths = (-(-block_size // 4), -(-block_size // 2), block_size)
        positions = max(positions, next(length for length in lengths if length >= max_len))
        idle = RaggedCache(model.config, rows, positions, weight.dtype, weight.device, static=True)
    finalize(owner, IDLE_CACHES.__setitem__, model, idle).atexit = False
    return idle


class Generation:
    """Rows of text being generated: `step` returns the next token of each live row, `end` removes rows.

    A row's text depends on its prompt, the settings and its seed, never on the other rows. When a row has filled the
    context, its cache is refilled from its newest block_size // 2 tokens. Steps over a static cache (compiled, or on
    CUDA) may carry more rows than there are prompts; these hold nothing that anyone reads.

    Args:
        model: with weights in the dtype to compute in.
        prompts: each row's ids, at least one; only the last block_size are used.
        max_new_tokens: how often `step` may be called.
        temperature, top_k, top_p: see `sample_token`.
        seed: together with `row_numbers` it fixes the rows' random numbers; None: different each time.
        row_numbers: distinguish rows of one seed; None: 0, 1, ...
        compile: run the steps through torch.compile.

    Attributes:
        live: the rows that `step` returns tokens for, as indices into `prompts`.
    """

    @torch.inference_mode()
    @attention_of_varying_shapes()
    def __init__(
        self,
        model: GPT,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        row_numbers: list[int] | None = None,
        compile: bool = False,
    ):
        if not prompts or not all(prompts):
            raise ValueError("every row needs a prompt of at least one token, such as <|endoftext|>")
        self.model = model
        self.device = model.wte.weight.device
        self.live = list(range(len(prompts)))
        self.slots = list(self.live)  # indices of the live rows in the tensors below

        block_size = model.config.block_size
        prompts = [prompt[-block_size:] for prompt in prompts]
        longest = max(len(prompt) for prompt in prompts)
        max_len = min(longest + max_new_tokens, block_size)
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        if compile or self.device.type == "cuda":
            self.cache = take_static_cache(model, len(prompts), max_len, owner=self)
        else:
            self.cache = RaggedCache(model.config, len(prompts), max_len, model.wte.weight.dtype, self.device)
        step = functools.partial(compiled_decode() if compile else decode, model, self.cache, **sampling)
        self.decode = recorded(step, self.cache) if self.device.type == "cuda" else step
        numbers = list(self.live if row_numbers is None else row_numbers)
        spare = self.cache.k.shape[1] - len(prompts)
        prompts, numbers = prompts + [[0]] * spare, numbers + [0] * spare
        self.draws = uniform_draws(seed, numbers, max_new_tokens, self.device).t().contiguous()  # (max_new_tokens, B)
        self.steps = 0
        self.totals = [len(prompt) for prompt in prompts]  # tokens in each row
        ids = torch.zeros(len(prompts), longest + max_new_tokens, dtype=torch.int64)
        for row, prompt in zip(ids, prompts):
            row[: len(prompt)] = torch.tensor(prompt)
        self.ids = ids.to(self.device)  # (B, longest + max_new_tokens)
        self.rows = torch.arange(len(prompts), device=self.device)
        self.column = torch.tensor(self.totals, device=self.device)  # of `ids`, for each row's next token

        # Prefill: all but a prompt's last token go into the cache; the last one is the first step's input.
        self.cached = [0] * len(prompts)  # tokens of each row in the cache
        self._fill(self.slots, [self.totals[slot] - 1 for slot in self.slots])
        self.pending = self._next(self.ids[self.rows, self.column - 1])  # what the next `step` returns

    @torch.inference_mode()
    @attention_of_varying_shapes()
    def step(self) -> tuple[Tensor, Tensor]:
        """The next token of each live row, int64 (live,), and its log-probability under the model, float32 (live,)."""
        tokens, logprobs = self.pending
        if self.steps < len(self.draws):
            self.pending = self._next(tokens)  # one step ahead, so that the device works while the caller reads tokens
        if len(self.slots) == len(tokens):
            return tokens, logprobs
        return tokens[self.slots], logprobs[self.slots]

    @torch.inference_mode()
    def end(self, rows: set[int]) -> None:
        """Remove rows. They cost nothing from here on, except over a static cache, where shapes are fixed."""
        staying = [i for i, row in enumerate(self.live) if row not in rows]
        self.live = [self.live[i] for i in staying]
        self.slots = [self.slots[i] for i in staying]
        if not self.live or self.cache.static:
            return
        cache, slots = self.cache, torch.tensor(self.slots, device=self.device)
        cache.k, cache.v, cache.length = cache.k[:, slots], cache.v[:, slots], cache.length[: len(slots)]
        self.ids, self.draws = self.ids[slots], self.draws[:, slots]
        self.rows, self.column = self.rows[: len(slots)], self.column[slots]
        self.pending = (self.pending[0][slots], self.pending[1][slots])
        self.totals = [self.totals[i] for i in self.slots]
        self.cached = [self.cached[i] for i in self.slots]
        cache.set_length(self.cached)
        self.slots = list(range(len(self.live)))

    def _next(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Append to each row the token after `tokens`, its newest: that token and its log-probability, (B,) each."""
        block_size = self.model.config.block_size
        if full := [i for i, cached in enumerate(self.cached) if cached == block_size]:
            self._fill(full, [block_size // 2] * len(full))
        tokens, logprobs = self.decode(tokens, self.draws[self.steps])
        if self.device.type == "cuda":  # the next replay overwrites its outputs
            tokens, logprobs = tokens.clone(), logprobs.clone()
        self.steps += 1
        self.cached = [cached + 1 for cached in self.cached]
        self.ids[self.rows, self.column] = tokens
        self.column += 1
        self.totals = [total + 1 for total in self.totals]
        return tokens, logprobs

    def _fill(self, slots: list[int], counts: list[int]) -> None:
        """Refill the cache of `slots` with their newest tokens, `counts` each, less the very last: the next input."""
        # At least two, so that every prompt, however short, takes the path for prompts and not that of one new token.
        T = max(counts) and max(2, *counts)
        fresh = KVCache(self.model.config, len(slots), T, self.cache.k.dtype, self.device)
        if T:
            idx = torch.zeros(len(slots), T, dtype=torch.int64, device=self.device)
            for row, slot, count in zip(idx, slots, counts):
                end = self.totals[slot] - 1
                row[:count] = self.ids[slot, end - count : end]
            self.model.hidden(idx, fresh)
        self.cache.k[:, slots, :, :T] = fresh.k
        self.cache.v[:, slots, :, :T] = fresh.v
        for slot, count in zip(slots, counts):
            self.cached[slot] = count
        self.cache.set_length(self.cached)
