"""Draw a model, a text as tokens, and training runs: `python visualize.py MODEL --out figures/`."""

import argparse
import base64
import csv
import html
import io
import json
import math
import os
import shutil
import sys
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from gpt2_scratch.checkpoint import checkpoints, find_model, load_model_and_tokenizer
from gpt2_scratch.cli import UserError, as_text, count, run_script
from gpt2_scratch.metrics import parsed_line
from gpt2_scratch.scoring import nonfinite_tensor
from gpt2_scratch.tokenizer import Tokenizer, load_tokenizer
from model import GPT

TEXT = "ROMEO:\nBut, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun."
TOKENS = (" the", " king", " love", " one", " London", " run", "e", "t", "A", "\n", ".", "?")  # first six in the vocab
MAX_TOKENS = 256  # of the text
MAX_IDS = 4096  # for --ids; matplotlib's images are limited to 2**16 pixels a side
MARKED = 6  # surprising tokens to label
LAYERS = 4  # attention maps side by side
PASTELS = {153: "#afd7ff", 193: "#d7ffaf", 223: "#ffd7af", 225: "#ffd7ff", 229: "#ffffaf"}  # by xterm colour number
BLUE, RED = "#6699cc", "#cc3333"
GIF_DPI = 100
MADE_HERE = '<meta name="generator" content="visualize.py">'  # a folder whose index.html has it may be overwritten
MONO: dict[str, Any] = {"family": "DejaVu Sans Mono"}  # ships with matplotlib, as does DejaVu Sans
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.dpi": 150,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # tokens may contain "$"
}

# Validation loss of the published weights in nats per token, by dataset, n_layer and n_embd. OpenWebText: nanoGPT's
# README; FineWeb-Edu: build-nanogpt's play.ipynb.
PUBLISHED = {
    ("fineweb-edu", 12, 768): 3.2924,
    ("openwebtext", 12, 768): 3.12,
    ("openwebtext", 24, 1024): 2.84,
    ("openwebtext", 36, 1280): 2.67,
    ("openwebtext", 48, 1600): 2.54,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw a model, a text as tokens, and training runs.")
    add = parser.add_argument
    add("model", nargs="?", help="model or run folder, or Hugging Face name (default: the newest run)")
    add("--out", type=Path, metavar="FOLDER", help="where to write pictures and index.html (default: figures)")
    text = "text to draw; without --out, only print its tokens (in GPT-2's vocabulary unless MODEL is given)"
    add("--text", type=as_text, help=text)
    add("--tokens", nargs="+", type=as_text, metavar="TOKEN", help="tokens whose nearest neighbours to draw")
    add("--ids", nargs="+", type=id_range, default=[], metavar="FIRST-LAST", help="ranges of token ids to decode")
    layer = "layer of the weight matrix, and the first whose attention is drawn (default: 0)"
    add("--layer", type=int, default=0, metavar="N", help=layer)
    add("--head", type=head_number, default=0, metavar="N", help="attention head, or all (default: 0)")
    add("--compare", nargs="+", type=Path, default=[], metavar="RUN", help="more runs to draw in the training picture")
    return parser.parse_args()


def id_range(argument: str) -> range:
    first, _, last = argument.partition("-")
    return range(count(first, least=0), count(last or first, least=0) + 1)


def head_number(argument: str) -> int | None:
    return None if argument == "all" else int(argument)


Columns = dict[str, np.ndarray]  # metrics by name; NaN where null or missing


@dataclass(frozen=True)
class Subject:
    """What to draw."""

    model: GPT
    tokenizer: Tokenizer
    name: str  # shown in every title
    ids: list[int]  # the text, at most MAX_TOKENS
    chosen: list[int]  # tokens whose neighbours to draw
    runs: dict[Path, tuple[Columns, Columns]]  # training and validation curves
    args: argparse.Namespace

    @property
    def wte(self) -> Tensor:
        """The token embedding without padding, (vocab_size, n_embd)."""
        return self.model.wte.weight.detach()[: self.model.config.vocab_size]

    def label(self, token: int) -> str:
        return drawable(label(self.tokenizer, token))


@dataclass(frozen=True)
class Section:
    """A picture in index.html with its explanation."""

    title: str
    text: str
    file: str
    table: str = ""  # HTML


# Tokens as text


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token on one line: spaces as ␣, control characters and invalid UTF-8 as escapes."""
    return "".join("␣" if c == " " else c if c.isprintable() else escaped(c) for c in tokenizer.label(token))


def escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


@cache
def glyphs() -> frozenset[int]:
    return frozenset(FT2Font(findfont(MONO["family"])).get_charmap())


def drawable(text: str) -> str:
    """Escape characters that the font lacks, and truncate."""
    text = "".join(c if ord(c) in glyphs() else escaped(c) for c in text)
    return text if len(text) <= 18 else text[:17] + "…"


def lines_of(widths: Sequence[float], columns: float) -> Iterator[list[int]]:
    """Wrap cells of these widths into lines; yields the indices on each line."""
    line: list[int] = []
    room = columns
    for i, width in enumerate(widths):
        if width > room and line:
            yield line
            line, room = [], columns
        line.append(i)
        room -= width
    if line:
        yield line


def print_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> None:
    """Print tokens with their ids below, in colour on a terminal unless NO_COLOR is set."""
    labels = [label(tokenizer, token) for token in ids]
    shown = [sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text) for text in labels]  # terminal columns
    widths = [max(n, len(str(token))) for n, token in zip(shown, ids)]
    colours = list(PASTELS)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for line in lines_of([width + 1 for width in widths], shutil.get_terminal_size().columns):
        cells = [labels[i] + " " * (widths[i] - shown[i]) for i in line]
        if coloured:
            cells = [f"\x1b[30;48;5;{colours[i % len(colours)]}m{cell}\x1b[0m" for i, cell in zip(line, cells)]
        print(" ".join(cells).rstrip())
        print(" ".join(str(ids[i]).ljust(widths[i]) for i in line).rstrip())
    print(f"{len(ids)} tokens of {tokenizer.name}", file=sys.stderr)


# What is computed


@torch.no_grad()
def outputs(model: GPT, modules: Sequence[nn.Module], idx: Tensor) -> list[Tensor]:
    """What these modules return when the model reads idx (B, T)."""
    found: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda *args: found.append(args[2])) for module in modules]
    try:
        model(idx, last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def causal_mask(T: int) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def attention_weights(model: GPT, idx: Tensor) -> list[Tensor]:
    """Recompute each layer's attention weights (B, n_head, query, key) for idx (B, T): fused attention keeps none."""
    B, T = idx.shape
    weights = []
    for block, qkv in zip(model.h, outputs(model, [block.attn.c_attn for block in model.h], idx)):
        q, k, _ = qkv.view(B, T, 3, block.attn.n_head, -1).unbind(2)  # (B, T, n_head, head_dim) each
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * block.attn.scale  # (B, n_head, T, T)
        weights.append(scores.masked_fill(causal_mask(T), -torch.inf).softmax(dim=-1))
    return weights


@torch.no_grad()
def predictions(model: GPT, ids: list[int], eot: int | None) -> Tensor:
    """Log2-probabilities (T, vocab_size) of the token at each position given those before it.

    The first position is predicted from `<|endoftext|>`; its row is NaN if the vocabulary has none.
    """
    context = ids if eot is None else [eot, *ids[:-1]]
    logprobs = model(torch.tensor([context]))[0][0].log_softmax(dim=-1) / math.log(2)  # (T, vocab_size)
    if eot is None:  # shift: row t predicted token t + 1
        logprobs = torch.cat([torch.full_like(logprobs[:1], torch.nan), logprobs[:-1]])
    return logprobs


def statistics(values: Tensor) -> list[float]:
    """Mean, population standard deviation, minimum, maximum."""
    values = values.double()
    return [s.item() for s in (values.mean(), values.std(correction=0), values.min(), values.max())]


def undertrained_tokens(table: Tensor) -> tuple[list[int], Tensor, float]:
    """Find tokens that were rare or absent in training: their embeddings all moved alike and form a cluster.

    In GPT-2's published weights it is near the mean row (Rumbelow and Watkins, "SolidGoldMagikarp", 2023). Its centre
    is found by iterating from there: the mean of the nearest max(8, vocab_size / 1000) rows, until these stay the same.

    Returns:
        ids by distance from the centre, none if fewer than the rows averaged; the distance of each row of the table
        (vocab_size,); and the cluster's radius, half the 95th percentile of the distances.
    """
    n = min(max(8, len(table) // 1000), len(table))
    centre = table.mean(dim=0)
    nearest: set[int] = set()
    for _ in range(50):  # converged in 2 to 4 rounds on every model tried
        distances = (table - centre).norm(dim=1)
        before, nearest = nearest, set(distances.topk(n, largest=False).indices.tolist())
        if nearest == before:
            break
        centre = table[sorted(nearest)].mean(dim=0)
    radius = 0.5 * float(np.quantile(distances, 0.95))
    ids = [token for token in distances.argsort().tolist() if distances[token] < radius]
    return (ids if len(ids) >= n else []), distances, radius


def read_curves(run: Path) -> tuple[Columns, Columns]:
    """Training and validation metrics from a run's metrics.jsonl, skipping torn lines."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} has no metrics.jsonl; pass a run folder such as out/shakespeare")
    lines = [line for line in map(parsed_line, path.open("rb")) if line]

    def columns(kind: str) -> Columns:
        names = ("tokens", "lr", "grad_norm", "tokens_per_sec", kind)
        values = [[line.get(name) for name in names] for line in lines if kind in line]
        table = np.array(values, dtype=float).reshape(-1, len(names))  # None becomes NaN
        return dict(zip(names, table.T))

    train, val = columns("train_loss"), columns("val_loss")
    if not len(train["tokens"]):
        raise UserError(f"{path} has no training metrics yet")
    seconds = np.diff(train["tokens"], prepend=0) / train["tokens_per_sec"]
    train["hours"] = np.nan_to_num(seconds, posinf=0).cumsum() / 3600
    val["hours"] = np.interp(val["tokens"], train["tokens"], train["hours"])
    return train, val


def published_loss(run: Path) -> float | None:
    """Loss of GPT-2's published weights on the run's data, if known for its size and it uses GPT-2's vocabulary."""
    try:
        data = Path(tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["data"]).name
        newest = checkpoints(run)[-1]
        config = json.loads((newest / "config.json").read_text(encoding="utf-8"))
        loss = PUBLISHED.get((data, config["n_layer"], config["n_embd"]))
        return loss if load_tokenizer(newest).name == "gpt2" else None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None  # no checkpoint yet, or not our files


def overtakings(runs: dict[Path, tuple[Columns, Columns]]) -> list[str]:
    """For each run that passes the final validation loss of another, by how many tokens and how much time it does."""

    def cost(val: Columns, i: int) -> str:
        hours = val["hours"][i]
        time = f"{hours:.1f} hours" if hours > 2 else f"{60 * hours:.1f} minutes"
        return f"{EngFormatter(places=2, sep='')(val['tokens'][i])} tokens and {time}"

    sentences = []
    for (run, (_, val)), (other, (_, its)) in permutations(runs.items(), 2):
        if len(its["val_loss"]) and (below := np.flatnonzero(val["val_loss"] < its["val_loss"][-1])).size:
            sentences.append(
                f"{run.name} passes the final validation loss of {other.name}, {its['val_loss'][-1]:.4f}, by "
                f"{cost(val, below[0])}; {other.name} took {cost(its, -1)}."
            )
    return sentences


# Drawing


def new_figure(title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no windows, no global state
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def panels(title: str, n: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of n panels, at most three in a row, each of this size in inches."""
    columns = min(3, n)
    rows = -(-n // columns)
    figure = new_figure(title, max(6, width * columns), height * rows + 0.7)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(n)]


def pixels(figure: Figure) -> Image.Image:
    """What `figure.savefig` writes, without its extra drawing pass for the layout."""
    canvas: Any = figure.canvas
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def save(subject: Subject, figure: Figure, file: str) -> str:
    """Write a figure, with the subject's name in its title."""
    figure.suptitle(f"{figure.get_suptitle()}\n{subject.name}")
    pixels(figure).save(subject.args.out / file, dpi=(figure.dpi, figure.dpi))
    return file


def heatmap(
    axes: Axes, values: Tensor, limit: float = 0, rows: Sequence[str] = (), scale: str = "value", **names: str
) -> None:
    """An image of values (rows, columns), white at 0, whose colours saturate at `limit` or the 99.5th percentile."""
    limit = limit or float(np.quantile(values.abs().numpy(), 0.995)) or 1.0
    colours: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", **colours)
    extend = "both" if values.abs().max() > 1.0001 * limit else "neither"
    axes.figure.colorbar(image, ax=axes, label=scale, extend=extend)
    axes.set(**names)
    if rows:
        axes.set_yticks(range(len(rows)), rows, **MONO)


def bars(axes: Axes, labels: list[str], values: Sequence[float], text: str = "{:.3f}", **names: str) -> None:
    """Horizontal bars with their values, the first at the top."""
    container = axes.barh(range(len(labels)), values, color=BLUE)
    axes.bar_label(container, [text.format(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, **MONO)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.locator_params(axis="x", nbins=5)
    axes.set(**names)


def plot_tokens(
    title: str, tokenizer: Tokenizer, ids: Sequence[int], notes: Sequence[object] = (), colours: Sequence = ()
) -> Figure:
    """Tokens in coloured boxes, with a note (default: the id) below each."""
    columns, line_height = 130, 0.42  # characters, inches
    below, colours = [str(note) for note in notes or ids], colours or list(PASTELS.values())
    labels = [drawable(label(tokenizer, token)) for token in ids]
    widths = [max(len(text), 0.8 * len(note)) + 1 for text, note in zip(labels, below)]
    lines = list(lines_of(widths, columns))
    height = line_height * len(lines)
    figure = new_figure(title, 11, height + 0.7)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.01, 0, 0.98, height / (height + 0.7)), xlim=(0, columns), ylim=(len(lines), 0))
    axes.axis("off")
    for row, line in enumerate(lines):
        x = 0.0
        for i in line:
            axes.add_patch(Rectangle((x, row), widths[i] - 0.3, 0.9, color=colours[i % len(colours)], linewidth=0))
            middle, style = x + widths[i] / 2 - 0.15, MONO | {"ha": "center", "va": "center"}
            axes.text(middle, row + 0.3, labels[i], fontsize=9, **style)
            axes.text(middle, row + 0.7, below[i], fontsize=7, color="#333333", **style)
            x += widths[i]
    return figure


def plot_runs(runs: dict[Path, tuple[Columns, Columns]]) -> Figure:
    """The training and validation curves of runs, by folder."""
    figure = new_figure(f"Training, {len(runs)} runs" if len(runs) > 1 else "Training", 13, 7)
    by_tokens, by_time, rate, norm, speed = figure.subplot_mosaic("AAABBB;CCDDEE").values()
    unit, per_hour = ("hours", 1) if max(train["hours"][-1] for train, _ in runs.values()) > 2 else ("minutes", 60)
    small = {rate: "lr", norm: "grad_norm", speed: "tokens_per_sec"}
    for number, (run, (train, val)) in enumerate(runs.items()):
        # Markers, so that points between NaNs show.
        style: dict[str, Any] = {"color": f"C{number}", "linewidth": 0.8, "marker": ".", "markersize": 2}
        last = f": {val['val_loss'][-1]:.3f}" if len(val["val_loss"]) else ""
        for axes, x, scale in ((by_tokens, "tokens", 1), (by_time, "hours", per_hour)):
            axes.plot(train[x] * scale, train["train_loss"], alpha=0.5, **style)
            large = style | {"marker": "o", "markersize": 4}
            axes.plot(val[x] * scale, val["val_loss"], label=run.name + last, **large)
        for axes, y in small.items():
            axes.plot(train["tokens"], train[y], **style)
    for axes in (by_tokens, by_time):
        for loss in filter(None, {published_loss(run) for run in runs}):
            axes.axhline(loss, color="gray", linestyle="--", label=f"published GPT-2: {loss}")
        axes.legend(title="final validation loss")
        axes.set(title="loss (thin: training, dots: validation)", ylabel="nats per token", xlabel=f"{unit} of training")
    for axes, title in zip(small, ("learning rate", "gradient norm before clipping", "tokens per second")):
        axes.set(title=title, ylim=(0, None))
    for axes in (by_tokens, *small):
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def plot_attention(
    title: str, weights: Sequence[Tensor], layers: Sequence[int], heads: Sequence[int], labels: Sequence[str] = ()
) -> Figure:
    """Maps of the attention weights (1, n_head, T, T) of each layer of a model, one row per head.

    Args:
        labels: of the T tokens; on the axes if there are few.
    """
    T = weights[0].shape[-1]
    figure = new_figure(title, max(6, 3 * len(layers) + 1), 3 * len(heads) + 1.2)
    grid = figure.subplots(len(heads), len(layers), squeeze=False)
    for (row, column), axes in np.ndenumerate(grid):
        layer, head = layers[column], heads[row]
        shown = weights[layer][0, head].masked_fill(causal_mask(T), torch.nan)  # (T, T)
        image = axes.imshow(shown.numpy(), cmap="viridis", norm=PowerNorm(0.4, 0, 1), interpolation="nearest")
        axes.set(title=f"layer {layer}, head {head}", xlabel="to position", ylabel="from position")
        axes.label_outer()
        if labels and T <= 32 and len(heads) == 1:
            axes.set_xticks(range(T), [text[:10] for text in labels], rotation=90, fontsize=7, **MONO)
            axes.set_yticks(range(T), [text[:10] for text in labels], fontsize=7, **MONO)
    bar: dict[str, Any] = {"label": "attention weight", "ticks": [0, 0.01, 0.1, 0.3, 1], "format": "{x:g}"}
    figure.colorbar(image, ax=grid, aspect=20 * len(heads), **bar)
    figure.supxlabel(" ")  # room for the animation's caption
    return figure


def animate(figure: Figure, labels: Sequence[str], path: Path) -> None:
    """Write a GIF that reveals the maps (T, T) of `plot_attention` row by row, with the latest labels below."""
    maps = [image for axes in figure.axes for image in axes.images]
    full = pixels(figure)
    figure.set_layout_engine("none")  # keep the layout without the maps
    for shown in maps:
        shown.set_visible(False)
    frame = pixels(figure)
    scale = figure.dpi / 100
    font = ImageFont.truetype(findfont(MONO["family"]), 13 * scale)
    colours = np.concatenate([colormaps["viridis"](np.linspace(0, 1, 240)), colormaps["gray"](np.linspace(0, 1, 16))])
    palette = Image.new("P", (1, 1))
    palette.putpalette((255 * colours[:, :3]).round().astype(np.uint8).tobytes())
    draw, frames = ImageDraw.Draw(frame), []
    for t in range(len(labels)):
        for shown in maps:
            box = shown.axes.get_window_extent()  # pixels, y upwards
            top, height = full.height - box.y1, box.height
            above, below = (round(top + height * row / len(labels)) for row in (t, t + 1))
            strip = (round(box.x0) + 1, above, round(box.x1), below)
            frame.paste(full.crop(strip), strip[:2])
        draw.rectangle((0, full.height - 24 * scale, full.width, full.height), "white")
        room = int(full.width / scale) // 8 - 14
        draw.text((8, full.height - 21 * scale), f"{t + 1:4}  {''.join(labels[: t + 1])[-room:]}", "black", font)
        frames.append(frame.quantize(palette=palette, dither=Image.Dither.NONE))
    durations = [80] * (len(frames) - 1) + [3000]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def plot_lookup(one_hot: Tensor, product: Tensor, looked_up: Tensor, labels: Sequence[str]) -> Figure:
    """One-hot rows (T, vocab_size), their product with a table, and the table's rows (T, n_embd)."""
    difference = (looked_up - product).abs().max().item()
    title = f"Lookup and one-hot product: largest difference {difference:g}"
    figure, (hot_axes, *others) = panels(title, 3, 13 / 3, 3.3)
    used = one_hot.any(dim=0).nonzero()[:, 0]
    title = f"one-hot rows, {len(used)} of {one_hot.shape[1]:,} columns"
    heatmap(hot_axes, one_hot[:, used], 1.0, labels, title=title, xlabel="id")
    hot_axes.set_xticks(range(len(used)), map(str, used.tolist()), rotation=90)
    for axes, values, title in zip(others, (product, looked_up), ("one-hot rows @ table", "rows of the table")):
        heatmap(axes, values, rows=labels, title=title, xlabel="channel")
    return figure


def plot_hidden(tokens: Tensor, positions: Tensor, hidden: Tensor, labels: Sequence[str]) -> Figure:
    """Token and position embeddings and the first hidden state, (T, n_embd) each."""
    difference = (tokens + positions - hidden).abs().max().item()
    title = f"Token + position = first hidden state: largest difference {difference:g}"
    figure, all_axes = panels(title, 3, 13 / 3, 3.3)
    parts = {"token": tokens, "position": positions, "sum, from the model": hidden}
    for axes, (title, values) in zip(all_axes, parts.items()):
        heatmap(axes, values, hidden.abs().max().item(), labels, title=title, xlabel="channel")
    return figure


def plot_embeddings(wte: Tensor) -> Figure:
    """The first 300 rows of a token embedding (vocab_size, n_embd)."""
    rows = wte[:300]
    figure, (axes,) = panels(f"Token embeddings of the first {len(rows)} of {len(wte):,} tokens", 1, 11, 4.3)
    heatmap(axes, rows, xlabel="channel", ylabel="token id")
    return figure


def plot_undertrained(ids: Sequence[int], distances: Tensor, radius: float) -> Figure:
    """What `undertrained_tokens` finds."""
    found = f"{len(ids):,} of {len(distances):,} tokens stand out" if ids else "no tokens stand out"
    figure, (axes,) = panels(f"Under-trained tokens: {found}", 1, 9, 3.3)
    axes.hist(distances.numpy(), bins=100, color=BLUE)
    axes.axvline(radius, color=RED, linestyle="--", label=f"radius: {radius:.3g}")
    axes.set(yscale="log", xlabel="distance from the cluster's centre", ylabel="tokens")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    return figure


def plot_positions(wpe: Tensor) -> Figure:
    """A position embedding (block_size, n_embd): all of it, three channels, cosines between positions."""
    title = f"Position embeddings, {len(wpe)} positions x {wpe.shape[1]} channels"
    figure, (image, curves, similarity) = panels(title, 3, 13 / 3, 3.6)
    heatmap(image, wpe, title="all positions", xlabel="channel", ylabel="position")
    for channel in wpe.std(dim=0, correction=0).topk(min(3, wpe.shape[1])).indices.tolist():
        curves.plot(wpe[:, channel].numpy(), label=f"channel {channel}", linewidth=1)
    curves.set(title="the three channels that vary most", xlabel="position", ylabel="value")
    curves.margins(y=0.15)
    curves.legend(loc="upper center", ncols=3, fontsize=7, handlelength=1, columnspacing=1)
    unit = F.normalize(wpe, dim=1)
    names = {"xlabel": "position", "ylabel": "position", "title": "cosine similarity between positions"}
    heatmap(similarity, unit @ unit.T, 1.0, scale="cosine", **names)
    similarity.set_aspect("equal")
    return figure


def plot_weights(name: str, trained: Tensor, fresh: Tensor) -> Figure:
    """The first 300 x 300 of a matrix (out, in) beside its initialization, on one colour scale."""
    trained, fresh = trained[:300, :300], fresh[:300, :300]
    limit = float(np.quantile(torch.cat([trained, fresh]).abs().numpy(), 0.995)) or 1.0
    figure, all_axes = panels(f"{name}, first {trained.shape[0]} x {trained.shape[1]}", 2, 5.5, 4.3)
    for axes, values, title in zip(all_axes, (trained, fresh), ("trained", "fresh")):
        title += f", std {statistics(values)[1]:.4f}"
        heatmap(axes, values, limit, title=title, xlabel="input channel", ylabel="output channel")
    return figure


def html_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


# The pictures


def draw_runs(subject: Subject) -> Iterator[Section]:
    if not subject.runs:
        return
    yield Section(
        "Training",
        "From metrics.jsonl. Gaps are steps with a non-finite loss or gradient. Time is derived from tokens_per_sec "
        "and excludes evaluation. Add other runs with --compare. " + " ".join(overtakings(subject.runs)),
        save(subject, plot_runs(subject.runs), "training.png"),
    )


def draw_text(subject: Subject) -> Iterator[Section]:
    title = f"Text as {len(subject.ids)} tokens of {subject.tokenizer.name}"
    text = "Each box is a token with its id below. ␣ is a space; characters without a glyph are escapes such as \\n."
    yield Section("Text to tokens", text, save(subject, plot_tokens(title, subject.tokenizer, subject.ids), "text.png"))
    n = subject.tokenizer.n_vocab
    default = [range(n)] if n <= 300 else [range(96), range(n // 2, n // 2 + 96), range(n - 96, n)]
    ranges = subject.args.ids or default
    title = "Ids to tokens: " + ", ".join(f"{part[0]} to {part[-1]}" for part in ranges)
    text = "What ids decode to; bytes that are not valid UTF-8 alone are \\x escapes. Choose others with --ids."
    ids = [token for part in ranges for token in part]
    yield Section("Ids to tokens", text, save(subject, plot_tokens(title, subject.tokenizer, ids), "ids.png"))


def draw_surprise(subject: Subject) -> Iterator[Section]:
    ids = subject.ids
    logprobs = predictions(subject.model, ids, subject.tokenizer.eot)  # (T, vocab_size)
    bits = -logprobs[range(len(ids)), ids]
    known = bits.nan_to_num(nan=-1.0)
    marked = sorted(i for i in known.topk(min(MARKED, len(ids))).indices.tolist() if known[i] >= 0)
    title = f"Surprise along a text: {bits.nanmean().item():.2f} bits per token on average"
    figure, (axes,) = panels(title, 1, 11, 3.3)
    axes.bar(range(len(ids)), bits.numpy(), color=[RED if i in marked else BLUE for i in range(len(ids))])
    place = MONO | {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom", "rotation": 90}
    for i in marked:
        axes.annotate(subject.label(ids[i]), (i, bits[i]), **place)
    axes.set(xlabel="position in the text, tokens", ylabel="surprise, bits")
    axes.margins(x=0.01, y=0.25)
    yield Section(
        "Surprise along a text",
        "How unlikely the model found each token given those before it: minus log2 of its probability. "
        f"The {MARKED} most surprising tokens are labelled.",
        save(subject, figure, "surprise.png"),
    )
    shades = list(colormaps["Reds"](np.clip(known.numpy() / 30, 0, 0.5)))
    notes = ["?" if math.isnan(value) else f"{value:.1f}" for value in bits.tolist()]
    figure = plot_tokens("Bits of surprise of each token", subject.tokenizer, ids, notes, shades)
    text = "The same, in bits below each token; the redder, the less expected."
    yield Section("Surprise of each token", text, save(subject, figure, "surprise_tokens.png"))
    if not marked:
        return
    figure, all_axes = panels("What the model expected instead", len(marked), 4, 2.1)
    for axes, i in zip(all_axes, marked):
        best = logprobs[i].topk(min(5, logprobs.shape[1])).indices.tolist()
        shown = best if ids[i] in best else [*best, ids[i]]
        labels = [("» " if token == ids[i] else "") + subject.label(token) for token in shown]
        before = "".join(subject.label(token) for token in ids[max(0, i - 12) : i])[-24:]
        names = {"xlabel": "probability, %", "title": f"{i}: after {before or 'nothing'}"}
        bars(axes, labels, (100 * logprobs[i, shown].exp2()).tolist(), "{:.3g} %", **names)
    text = "The most likely tokens where the model was most surprised. » marks the actual token."
    yield Section("What the model expected instead", text, save(subject, figure, "alternatives.png"))


def draw_attention(subject: Subject) -> Iterator[Section]:
    model, args = subject.model, subject.args
    eot = subject.tokenizer.eot
    ids, title = subject.ids, "Attention over {} tokens"
    if args.text is None and eot is not None:
        n = min(MAX_TOKENS, model.config.block_size)
        ids = model.generate(torch.tensor([[eot]]), n - 1, temperature=0.8, top_k=200, top_p=0.95, seed=0)[0].tolist()
        title += " that the model generates"
    heads = range(model.config.n_head) if args.head is None else [args.head]
    layers = range(args.layer, min(args.layer + LAYERS, model.config.n_layer))
    weights, labels = attention_weights(model, torch.tensor([ids])), [subject.label(token) for token in ids]
    figure = plot_attention(title.format(len(ids)), weights, layers, heads, labels)
    yield Section(
        "Attention",
        "Each row is a token; the colours show how much it attends to itself and to each token before it. A row sums "
        "to 1; later tokens are masked. The colour scale is stretched near 0. Layers and heads are counted from 0; "
        "choose others with --layer and --head.",
        save(subject, figure, "attention.png"),
    )
    figure.set_dpi(GIF_DPI)
    animate(figure, labels, args.out / "attention.gif")
    text = "The same as the text grows, with the latest tokens below."
    yield Section("Attention, token by token", text, "attention.gif")


@torch.no_grad()
def draw_lookup(subject: Subject) -> Iterator[Section]:
    model, wte, ids = subject.model, subject.wte, torch.tensor(subject.ids[:8])
    labels = [subject.label(token) for token in ids.tolist()]
    one_hot = F.one_hot(ids, len(wte)).to(wte.dtype)  # (T, vocab_size)
    looked_up = wte[ids]  # (T, n_embd)
    yield Section(
        "The embedding is a lookup",
        "Multiplying one-hot rows by the embedding table selects rows of the table. The one-hot picture shows only the "
        "columns of ids in the text.",
        save(subject, plot_lookup(one_hot, one_hot @ wte, looked_up, labels), "lookup.png"),
    )
    hidden = outputs(model, [model.drop], ids[None])[0][0]  # (T, n_embd)
    yield Section(
        "The first hidden state",
        "The first block's input is the token embedding plus the position embedding. The sum shown is taken from the "
        "running model.",
        save(subject, plot_hidden(looked_up, model.wpe.weight[: len(ids)], hidden, labels), "hidden.png"),
    )


def draw_embeddings(subject: Subject) -> Iterator[Section]:
    wte = subject.wte
    text = "One row per token. Columns that stand out are channels whose mean is far from 0."
    yield Section("Token embeddings", text, save(subject, plot_embeddings(wte), "embeddings.png"))
    norms = wte.norm(dim=1)
    order = norms.argsort().tolist()
    figure, (least, histogram, greatest) = panels("Norms of the token embeddings", 3, 13 / 3, 3.6)
    for axes, ids, title in ((least, order[:12], "smallest"), (greatest, order[-12:][::-1], "largest")):
        labels = [f"{subject.label(token)} {token}" for token in ids]
        bars(axes, labels, norms[ids].tolist(), title=title, xlabel="norm", ylabel="token and id")
    histogram.hist(norms.numpy(), bins=60, color=BLUE)
    histogram.set(title=f"all {len(wte):,}", xlabel="norm", ylabel="tokens")
    text = "The tokens whose embeddings have the smallest and largest norms, with their ids, and all norms."
    yield Section("Norms of the token embeddings", text, save(subject, figure, "norms.png"))


def draw_neighbours(subject: Subject) -> Iterator[Section]:
    unit = F.normalize(subject.wte, dim=1)
    title = "Nearest neighbours among the token embeddings"
    figure, all_axes = panels(title, len(subject.chosen), 4, 2.4)
    for axes, token in zip(all_axes, subject.chosen):
        cosines = unit @ unit[token]
        cosines[token] = -torch.inf
        values, ids = cosines.topk(min(8, len(unit) - 1))
        labels = [subject.label(neighbour) for neighbour in ids.tolist()]
        bars(axes, labels, values.tolist(), title=f"nearest to {subject.label(token)}", xlabel="cosine similarity")
    text = "Tokens whose embeddings have the highest cosine similarity. Choose others with --tokens."
    yield Section("Nearest neighbours", text, save(subject, figure, "neighbours.png"))


def draw_undertrained(subject: Subject) -> Iterator[Section]:
    ids, distances, radius = undertrained_tokens(subject.wte)
    names = ", ".join(f"{label(subject.tokenizer, token)} ({token})" for token in ids[:100])
    more = f" and {len(ids) - 100:,} more" if len(ids) > 100 else ""
    yield Section(
        "Under-trained tokens",
        "The embeddings of tokens that are rare or absent in training all move alike and end up in a cluster; in "
        "GPT-2's published weights, that of ␣SolidGoldMagikarp and its like is near the mean row. Its centre is the "
        "mean of the nearest 8 rows (or 0.1 % of all, if more), found by iterating from the mean row; a token belongs "
        "to the cluster if its distance from the centre is less than half the 95th percentile. "
        f"Here {f'these do: {names}{more}' if ids else 'none does'}.",
        save(subject, plot_undertrained(ids, distances, radius), "undertrained.png"),
    )


def draw_positions(subject: Subject) -> Iterator[Section]:
    wpe = subject.model.wpe.weight.detach()  # (block_size, n_embd)
    yield Section(
        "Position embeddings",
        "Each position has a learned vector that is added to the token's. After enough training, neighbouring "
        "positions are similar and many channels are slow waves; untrained positions stay noise. For comparison, "
        "GPT-2's published 124M table has mean -0.0007, std 0.1227, min -4.5381, max 4.0653.",
        save(subject, plot_positions(wpe), "positions.png"),
        html_table(("mean", "std", "min", "max"), [[f"{value:.4f}" for value in statistics(wpe)]]),
    )


def draw_weights(subject: Subject) -> Iterator[Section]:
    std = subject.model.config.initializer_range
    name = f"h.{subject.args.layer}.attn.c_attn.weight"
    weight = subject.model.get_parameter(name).detach()
    fresh = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * std
    yield Section(
        "A weight matrix and its initialization",
        "The matrix that makes queries, keys and values; its first rows make queries. The fresh one is drawn with the "
        f"standard deviation in config.json (initializer_range, {std}). Both have the same colour scale.",
        save(subject, plot_weights(name, weight, fresh), "weights.png"),
    )


def kind_of(parameter: str) -> str:
    """The part of the network that a parameter belongs to."""
    kinds = {"wte": "token embedding", "wpe": "position embedding", "attn": "attention", "mlp": "feed-forward"}
    kinds |= {"lm_head": "head", "ln_1": "LayerNorm", "ln_2": "LayerNorm", "ln_f": "LayerNorm"}
    return next(kinds[part] for part in parameter.split(".") if part in kinds)


def parameter_rows(model: GPT) -> list[tuple]:
    """Name, shape, count, mean, standard deviation, minimum and maximum of every parameter, without padding."""
    rows = []
    for name, p in model.named_parameters():  # yields a tied head once, as the token embedding
        values = p.detach()[: model.config.vocab_size] if name in ("wte.weight", "lm_head.weight") else p.detach()
        rows.append((name, " x ".join(map(str, values.shape)), values.numel(), *statistics(values)))
    return rows


def draw_parameters(subject: Subject) -> Iterator[Section]:
    rows = parameter_rows(subject.model)
    head = ("name", "shape", "count", "mean", "std", "min", "max")
    with (subject.args.out / "parameters.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    counts: dict[str, int] = {}
    for row in rows:
        counts[kind_of(row[0])] = counts.get(kind_of(row[0]), 0) + row[2]
    total = sum(counts.values())
    figure, (axes,) = panels(f"{total:,} parameters by kind", 1, 8, 2.5)
    bars(axes, list(counts), list(counts.values()), "{:,.0f}", xlabel="parameters")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    tied = "The head shares the token embedding's weights, which are counted once. " if "head" not in counts else ""
    shares = [(kind, f"{n:,}", f"{n / total:.1%}") for kind, n in counts.items()]
    details = [(*row[:2], f"{row[2]:,}", *(f"{value:.4f}" for value in row[3:])) for row in rows]
    yield Section(
        "Parameters",
        f"The model has {total:,} parameters. {tied}Matrices are listed as (outputs x inputs). The same table is in "
        "parameters.csv.",
        save(subject, figure, "parameters.png"),
        html_table(("kind", "count", "share"), shares) + html_table(head, details),
    )


PICTURES: list[Callable[[Subject], Iterator[Section]]] = [
    draw_runs,
    draw_text,
    draw_surprise,
    draw_attention,
    draw_lookup,
    draw_embeddings,
    draw_neighbours,
    draw_undertrained,
    draw_positions,
    draw_weights,
    draw_parameters,
]


# The page

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">{made_here}
<meta name="viewport" content="width=device-width">
<title>{name}</title>
<style>
:root {{ color-scheme: light dark; scroll-padding-top: 4rem; }}
body {{ max-width: 70rem; margin: 0 auto; padding: 0 1rem; font: 1rem/1.5 sans-serif; }}
h1, h2, p {{ overflow-wrap: anywhere; }}
nav {{ position: sticky; top: 0; z-index: 1; padding: 0.6rem 0; background: Canvas; scrollbar-width: thin; }}
nav, figure, table {{ overflow-x: auto; white-space: nowrap; }}
nav a {{ margin-right: 1rem; }}
figure {{ margin: 1rem 0; }}
img {{ max-width: 100%; vertical-align: top; border-radius: 0.3rem; }}
table {{ display: block; border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0; }}
th, td {{ padding: 0.15rem 0.7rem; text-align: right; border-bottom: 1px solid #8888; }}
th:first-child, td:first-child {{ text-align: left; }}
@media (min-width: 90rem) {{
  body {{ margin-left: max(18rem, 50% - 35rem); }}
  nav {{ position: fixed; top: 2rem; width: 14rem; margin-left: -16rem; max-height: 90vh; }}
  nav a {{ display: block; }}
}}
@media (prefers-color-scheme: dark) {{ img {{ filter: brightness(0.85); }} }}
</style></head>
<body><h1>{name}</h1>
<nav>
{contents}
</nav>
{body}
</body></html>
"""


def write_page(subject: Subject, sections: list[Section]) -> None:
    """Write index.html with the pictures embedded; it loads nothing else."""
    contents, body = [], []
    for number, section in enumerate(sections):
        title, alt = html.escape(section.title), html.escape(f"{section.title}: {subject.name}")
        picture = (subject.args.out / section.file).read_bytes()
        data, width = base64.b64encode(picture).decode(), Image.open(io.BytesIO(picture)).width
        # On a narrow screen pictures scroll sideways: smaller than this, their labels would be unreadable.
        inches = width / (GIF_DPI if section.file.endswith(".gif") else STYLE["figure.dpi"])
        contents.append(f'<a href="#s{number}">{title}</a>')
        body.append(f'<h2 id="s{number}">{title}</h2>\n<p>{html.escape(section.text)}</p>')
        source = f'src="data:image/{section.file[-3:]};base64,{data}" style="min-width: {80 * inches:.0f}px"'
        body.append(f'<figure><img {source} alt="{alt}"></figure>\n{section.table}')
    parts = {"contents": "\n".join(contents), "body": "\n".join(body), "name": html.escape(subject.name)}
    page = PAGE.format(made_here=MADE_HERE, **parts)
    (subject.args.out / "index.html").write_text(page, encoding="utf-8", errors="replace")


def check_folder(out: Path) -> None:
    """Refuse to write pictures among the user's files."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; pass a folder as --out")
    index = out / "index.html"
    ours = index.is_file() and MADE_HERE in index.read_text(encoding="utf-8", errors="replace")
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise UserError(f"{out} contains files that visualize.py did not write; choose another folder with --out")


def load(args: argparse.Namespace) -> Subject:
    """Load the model and check that it has everything the options ask for."""
    source = find_model(args.model)
    model, tokenizer = load_model_and_tokenizer(source, dtype=torch.float32)
    config = model.config
    if bad := nonfinite_tensor(model):
        raise UserError(f"{source} has non-finite values in {bad}; choose another checkpoint")
    for kind, number, n in (("layer", args.layer, config.n_layer), ("head", args.head or 0, config.n_head)):
        if not 0 <= number < n:
            raise UserError(f"there is no {kind} {number}; {source} has {kind}s 0 to {n - 1}")
    for part in args.ids:
        if not part or part[-1] >= tokenizer.n_vocab:
            raise UserError(f"--ids {part.start}-{part.stop - 1} is not a range of ids 0 to {tokenizer.n_vocab - 1}")
    if (n := sum(map(len, args.ids))) > MAX_IDS:
        raise UserError(f"--ids names {n:,} ids; {MAX_IDS:,} fit in a picture")
    ids = tokenizer.encode(TEXT if args.text is None else args.text)
    if not ids:
        raise UserError("--text has no tokens; give it at least a character")
    limit = min(MAX_TOKENS, config.block_size)
    if len(ids) > limit and args.text is not None:
        print(f"the text is longer than {limit} tokens; showing the last {limit}", file=sys.stderr)
    ids = ids[-limit:]
    if args.tokens:
        encoded = {text: tokenizer.encode(text, allow_eot=True) for text in args.tokens}
        for text, found in encoded.items():
            if len(found) != 1:
                raise UserError(f"--tokens {text!r} is {len(found)} tokens of {tokenizer.name}, not one; spaces count")
        chosen = [token for (token,) in encoded.values()]
    else:
        chosen = [found[0] for text in TOKENS if len(found := tokenizer.encode(text)) == 1][:6] or ids[:1]
    folder = Path(source).resolve()
    name, runs = folder.name if folder.is_dir() else str(source), list(args.compare)
    if folder.is_dir() and folder.parent.name == "checkpoints":
        run = folder.parents[1]
        name = f"{run.name}, {name}"
        if (run / "metrics.jsonl").is_file():
            runs.insert(0, run)
    curves = {run.resolve(): read_curves(run) for run in runs}
    name += f" ({model.num_params() / 1e6:,.1f}M parameters)"
    return Subject(model, tokenizer, name, ids, chosen, curves, args)


def visualize(args: argparse.Namespace) -> None:
    if args.text is not None and args.out is None:
        tokenizer = load_tokenizer(find_model(args.model) if args.model else "gpt2")
        print_tokens(tokenizer, tokenizer.encode(args.text))
        return
    args.out = args.out or Path("figures")
    check_folder(args.out)
    subject = load(args)
    args.out.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = []
    write_page(subject, sections)  # marks the folder as ours, in case drawing is interrupted
    with rc_context(STYLE):
        for draw in tqdm(PICTURES, unit="picture"):
            sections += draw(subject)
    write_page(subject, sections)
    for sentence in overtakings(subject.runs):
        print(sentence)
    print(f"{args.out / 'index.html'} holds {len(sections)} pictures")


if __name__ == "__main__":
    run_script(lambda: visualize(parse_args()))
