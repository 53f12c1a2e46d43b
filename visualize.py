"""Pictures of a model, of a text in its tokens and of runs: `python visualize.py MODEL --out figures/`."""

import argparse
import base64
import csv
import html
import json
import os
import shutil
import sys
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from gpt2_scratch.checkpoint import checkpoints, find_model, load_model
from gpt2_scratch.cli import UserError, as_text, count, run_script
from gpt2_scratch.metrics import parsed_line
from gpt2_scratch.scoring import nonfinite_tensor
from gpt2_scratch.tokenizer import Tokenizer, load_tokenizer
from model import GPT

TEXT = "ROMEO:\nBut, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun."
TOKENS = (" the", " king", " love", " one", " London", " run", "e", "t", "A", "\n", ".", "?")  # six that exist
MAX_TOKENS = 256  # of a text in a picture
MOST_IDS, MOST_CHOSEN = 4096, 100  # that --ids and --tokens can name: matplotlib's pictures are below 2**16 pixels
MARKED = 6  # surprising tokens that are named
LAYERS = 4  # of attention in a picture
PASTELS = {153: "#afd7ff", 193: "#d7ffaf", 223: "#ffd7af", 225: "#ffd7ff", 229: "#ffffaf"}  # by a terminal's number
MADE_HERE = '<meta name="generator" content="visualize.py">'  # a folder with such an index.html is ours to replace
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a "$" in a token is no formula
}

# Validation loss of the published weights, nats per token, by the data's name, n_layer and n_embd: on OpenWebText
# from nanoGPT's README, on FineWeb-Edu from build-nanogpt's play.ipynb.
PUBLISHED = {
    ("fineweb-edu", 12, 768): 3.2924,
    ("openwebtext", 12, 768): 3.12,
    ("openwebtext", 24, 1024): 2.84,
    ("openwebtext", 36, 1280): 2.67,
    ("openwebtext", 48, 1600): 2.54,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw a model, a text in its tokens, and runs.")
    parser.add_argument("model", nargs="?", help="folder of a model or run, or Hugging Face name (default: newest run)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for pictures and index.html (default: figures)")
    parser.add_argument(
        "--text",
        type=as_text,
        help="what to draw tokens, probabilities and attention of; without --out it is only shown as tokens on the "
        "terminal, of MODEL or GPT-2's vocabulary",
    )
    parser.add_argument("--tokens", nargs="+", type=as_text, metavar="TOKEN", help="whose nearest neighbours to show")
    parser.add_argument("--ids", nargs="+", type=id_range, default=[], metavar="FIRST-LAST", help="to show as tokens")
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="whose weights, and first whose attention")
    parser.add_argument("--head", type=head_number, default=0, metavar="N", help="of attention, or all (default: 0)")
    parser.add_argument(
        "--compare", nargs="+", type=Path, default=[], metavar="RUN", help="runs to draw in one picture"
    )
    return parser.parse_args()


def id_range(argument: str) -> range:
    first, _, last = argument.partition("-")
    return range(count(first, least=0), count(last or first, least=0) + 1)


def head_number(argument: str) -> int | None:
    return None if argument == "all" else int(argument)


@dataclass(frozen=True)
class Subject:
    """What the pictures are of."""

    model: GPT
    tokenizer: Tokenizer
    name: str  # stands in every title
    run: Path | None  # that the model belongs to
    ids: list[int]  # of the text, at most MAX_TOKENS
    chosen: list[int]  # tokens whose neighbours are shown
    args: argparse.Namespace

    @property
    def wte(self) -> Tensor:
        """The token embedding without its padding, (vocab_size, n_embd)."""
        return self.model.wte.weight.detach()[: self.model.config.vocab_size]

    def label(self, token: int) -> str:
        return drawable(label(self.tokenizer, token))


@dataclass(frozen=True)
class Section:
    """A part of index.html: an explanation with a picture or a table, or both."""

    title: str
    text: str
    file: str = ""  # of the picture
    table: str = ""  # HTML


# Tokens as text


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token on one line: a blank as ␣; control characters, and bytes that are no UTF-8, as escapes."""
    text = tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
    return "".join("␣" if c == " " else c if c.isprintable() else escaped(c) for c in text)


def escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


@cache
def glyphs() -> frozenset[int]:
    return frozenset(FT2Font(findfont("DejaVu Sans Mono")).get_charmap())


def drawable(text: str, longest: int = 18) -> str:
    """A label with what the font lacks as escapes, and cut where it is long."""
    text = "".join(c if ord(c) in glyphs() else escaped(c) for c in text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def lines_of(widths: Sequence[float], columns: float) -> Iterator[list[int]]:
    """The positions of cells of these widths, line by line."""
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
    """Tokens with their ids beneath, coloured on a terminal unless NO_COLOR is set."""
    labels = [label(tokenizer, token) for token in ids]
    shown = [sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text) for text in labels]  # columns it takes
    widths = [max(n, len(str(token))) for n, token in zip(shown, ids)]
    colours = list(PASTELS)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for line in lines_of([width + 1 for width in widths], shutil.get_terminal_size().columns):
        above = ""
        for i in line:
            cell = labels[i] + " " * (widths[i] - shown[i])
            colour = colours[i % len(colours)]
            above += f"\x1b[30;48;5;{colour}m{cell}\x1b[0m " if coloured else f"{cell} "
        print(above.rstrip())
        print(" ".join(str(ids[i]).ljust(widths[i]) for i in line).rstrip())
    print(f"{len(ids)} tokens of {tokenizer.name}", file=sys.stderr)


# What is computed


@torch.no_grad()
def attention_weights(model: GPT, idx: Tensor) -> list[Tensor]:
    """How much each position attends to each, recomputed, as the fused attention of the model keeps no weights.

    Args:
        idx: token ids, int64 (B, T).

    Returns:
        for each layer (B, n_head, T, T) in the model's dtype: from (rows) to (columns), rows sum to 1.
    """
    projected: list[Tensor] = []
    hooks = [block.attn.c_attn.register_forward_hook(lambda *args: projected.append(args[2])) for block in model.h]
    try:
        model.hidden(idx)
    finally:
        for hook in hooks:
            hook.remove()
    B, T = idx.shape
    future = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
    weights = []
    for block, qkv in zip(model.h, projected):
        q, k, _ = qkv.view(B, T, 3, block.attn.n_head, -1).unbind(2)  # (B, T, n_head, head_dim) each
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * block.attn.scale  # (B, n_head, T, T)
        weights.append(scores.masked_fill(future, -torch.inf).softmax(dim=-1))
    return weights


@torch.no_grad()
def predictions(model: GPT, ids: list[int], eot: int | None) -> Tensor:
    """Log2-probabilities (T, vocab_size) of what stands at each position of a text, given what comes before.

    The first token is given `<|endoftext|>` alone; its row is NaN where the vocabulary has none.
    """
    given = ids if eot is None else [eot, *ids[:-1]]
    logprobs = model(torch.tensor([given]))[0][0].log_softmax(dim=-1) / np.log(2)  # (T, vocab_size)
    if eot is None:  # one row predicts beyond the text, and none its first token
        logprobs = torch.cat([torch.full_like(logprobs[:1], torch.nan), logprobs[:-1]])
    return logprobs


def statistics(values: Tensor) -> list[float]:
    """Mean, standard deviation (of the whole population), minimum, maximum."""
    values = values.double()
    return [f(values).item() for f in (torch.mean, lambda v: v.std(correction=0), torch.min, torch.max)]


def hardly_trained(table: Tensor) -> tuple[list[int], Tensor, float]:
    """The tokens whose rows lie together in a clump, as those do that training hardly ever or never showed.

    Such rows all moved alike, so they crowd around one point, in GPT-2's published weights near the mean row
    (Rumbelow and Watkins, "SolidGoldMagikarp", 2023). That point is found from the mean row on: the mean of the
    nearest max(8, vocab_size / 1000) rows, again and again until these stay the same. A row belongs to the clump
    when it is nearer than half the distance that 95 % of all rows keep.

    Args:
        table: token embedding (vocab_size, n_embd).

    Returns:
        ids, nearest first, none if they are fewer than the rows averaged; the distances of all rows from the
        point (vocab_size,); and the distance below which a row belongs to the clump.
    """
    n = min(max(8, len(table) // 1000), len(table))
    point = table.mean(dim=0)
    nearest: set[int] = set()
    for _ in range(50):  # 2 to 4 rounds were enough wherever it was tried
        distances = (table - point).norm(dim=1)
        before, nearest = nearest, set(distances.topk(n, largest=False).indices.tolist())
        if nearest == before:
            break
        point = table[sorted(nearest)].mean(dim=0)
    limit = 0.5 * float(np.quantile(distances, 0.95))
    ids = [token for token in distances.argsort().tolist() if distances[token] < limit]
    return (ids if len(ids) >= n else []), distances, limit


@dataclass(frozen=True)
class Curves:
    """The figures of a run; what is null or missing is NaN. Hours are reckoned from `tokens_per_sec`."""

    name: str
    train: dict[str, np.ndarray]
    val: dict[str, np.ndarray]


def read_curves(run: Path) -> Curves:
    """A run's metrics.jsonl. Lines that are torn are passed over.

    Raises:
        UserError: there is none, or it holds no figures.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} has no metrics.jsonl; name a run's folder, such as out/shakespeare")
    lines = [line for line in map(parsed_line, path.open("rb")) if line]

    def columns(kind: str) -> dict[str, np.ndarray]:
        names = ("tokens", "lr", "grad_norm", "tokens_per_sec", kind)
        values = [[line.get(name) for name in names] for line in lines if kind in line]
        table = [[float(v) if isinstance(v, int | float) else np.nan for v in row] for row in values]
        return dict(zip(names, np.array(table).reshape(-1, len(names)).T))

    train, val = columns("train_loss"), columns("val_loss")
    if not len(train["tokens"]):
        raise UserError(f"{path} holds no figures of training yet")
    seconds = np.diff(train["tokens"], prepend=0) / train["tokens_per_sec"]
    train["hours"] = np.nan_to_num(seconds, posinf=0).cumsum() / 3600
    val["hours"] = np.interp(val["tokens"], train["tokens"], train["hours"])
    return Curves(run.resolve().name, train, val)


def published_level(run: Path) -> float | None:
    """The loss of GPT-2's published weights of a run's size on its data, nats per token.

    None unless the run's config.toml names data on which it is known, and its vocabulary is GPT-2's.
    """
    try:
        data = Path(tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["data"]).name
        newest = checkpoints(run)[-1]
        shape = json.loads((newest / "config.json").read_text(encoding="utf-8"))
        level = PUBLISHED.get((data, shape["n_layer"], shape["n_embd"]))
        return level if load_tokenizer(newest).name == "gpt2" else None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None  # no checkpoint yet, or files that are not ours


# Drawing


def new_figure(subject: Subject, title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")  # not pyplot's: no window, no global state
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{subject.name}")
    return figure


def panels(subject: Subject, title: str, n: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of n equal panels, three in a row, each so many inches high."""
    columns = min(3, n)
    rows = -(-n // columns)
    figure = new_figure(subject, title, max(6, 4 * columns), height * rows + 0.7)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(n)]


def save(subject: Subject, figure: Figure, file: str) -> str:
    pixels(figure).save(subject.args.out / file, dpi=(figure.dpi, figure.dpi))
    return file


def pixels(figure: Figure) -> Image.Image:
    """What `figure.savefig` would write, which draws twice: the first time for the layout alone."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def heatmap(axes: Axes, values: Tensor, limit: float = 0, rows: Sequence[str] = (), **names: str) -> None:
    """An image of values (rows, columns), white at 0. From `limit` on, else the 99.5th percentile, all are as dark."""
    limit = limit or float(np.quantile(values.abs().numpy(), 0.995)) or 1.0
    norm = Normalize(-limit, limit)
    image = axes.imshow(values.numpy(), cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="value", extend="both" if values.abs().max() > limit else "neither")
    axes.set(**names)
    if rows:
        axes.set_yticks(range(len(rows)), rows, family="DejaVu Sans Mono")


def bars(axes: Axes, labels: list[str], values: Sequence[float], text: str = "{:.3f}", **names: str) -> None:
    """Horizontal bars, the first at the top, with their values."""
    container = axes.barh(range(len(labels)), values, color="#6699cc")
    axes.bar_label(container, [text.format(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, family="DejaVu Sans Mono")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.locator_params(axis="x", nbins=5)
    axes.set(**names)


def draw_tokens(subject: Subject, title: str, file: str, ids: Sequence[int], notes: list[str], colours: list) -> str:
    """Tokens in coloured boxes, line by line, with a note beneath each."""
    columns, line_height = 130, 0.42  # characters, inches
    labels = [subject.label(token) for token in ids]
    widths = [max(len(text), 0.8 * len(note)) + 1 for text, note in zip(labels, notes)]
    lines = list(lines_of(widths, columns))
    height = line_height * len(lines)
    figure = new_figure(subject, title, 11, height + 0.7)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.01, 0, 0.98, height / (height + 0.7)), xlim=(0, columns), ylim=(len(lines), 0))
    axes.axis("off")
    for row, line in enumerate(lines):
        x = 0.0
        for i in line:
            axes.add_patch(Rectangle((x, row), widths[i] - 0.3, 0.9, color=colours[i % len(colours)], linewidth=0))
            middle = x + widths[i] / 2 - 0.15
            style = {"family": "DejaVu Sans Mono", "ha": "center", "va": "center"}
            axes.text(middle, row + 0.3, labels[i], fontsize=9, **style)
            axes.text(middle, row + 0.7, notes[i], fontsize=7, color="#333333", **style)
            x += widths[i]
    return save(subject, figure, file)


def html_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


# The pictures


def kind_of(parameter: str) -> str:
    """The part of the network that a parameter belongs to."""
    kinds = {"wte": "token embedding", "wpe": "position embedding", "attn": "attention", "mlp": "feed-forward"}
    kinds |= {"lm_head": "head", "ln_1": "LayerNorm", "ln_2": "LayerNorm", "ln_f": "LayerNorm"}
    return next(kinds[part] for part in parameter.split(".") if part in kinds)


def parameter_rows(model: GPT) -> list[tuple]:
    """Name, shape, count, mean, standard deviation, minimum and maximum of every parameter, without padding."""
    rows = []
    for name, p in model.named_parameters():  # a tied head is the token embedding and comes once
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
    figure = new_figure(subject, f"{total:,} parameters by kind", 8, 3.2)
    axes = figure.subplots()
    bars(axes, list(counts), list(counts.values()), "{:,.0f}", xlabel="parameters")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    tied = "The head shares the token embedding's weights and is counted once. " if "head" not in counts else ""
    table = html_table(
        ("kind", "count", "share"), [(kind, f"{n:,}", f"{n / total:.1%}") for kind, n in counts.items()]
    ) + html_table(head, [(*row[:2], f"{row[2]:,}", *(f"{value:.4f}" for value in row[3:])) for row in rows])
    yield Section(
        "Parameters",
        f"{total:,} numbers make up the model. {tied}Matrices are shown as (outputs x inputs). The same table is in "
        "parameters.csv.",
        save(subject, figure, "parameters.png"),
        table,
    )


def draw_positions(subject: Subject) -> Iterator[Section]:
    wpe = subject.model.wpe.weight.detach()  # (block_size, n_embd)
    mean, std, low, high = statistics(wpe)
    figure = new_figure(subject, f"Position embeddings, {len(wpe)} positions x {wpe.shape[1]} channels", 13, 4.3)
    image, curves, similarity = figure.subplots(1, 3)
    heatmap(image, wpe, title="all of them", xlabel="channel", ylabel="position")
    for channel in wpe.std(dim=0, correction=0).topk(min(3, wpe.shape[1])).indices.tolist():
        curves.plot(wpe[:, channel].numpy(), label=f"channel {channel}", linewidth=1)
    curves.set(title="the three channels that vary most", xlabel="position", ylabel="value")
    curves.margins(y=0.15)
    curves.legend(loc="upper center", ncols=3, fontsize=7, handlelength=1, columnspacing=1)
    unit = F.normalize(wpe, dim=1)
    shown = similarity.imshow((unit @ unit.T).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    figure.colorbar(shown, ax=similarity, label="cosine")
    similarity.set(title="cosine similarity between positions", xlabel="position", ylabel="position")
    yield Section(
        "Position embeddings",
        "A vector is learnt for each position and added to the token's. Trained long enough, neighbours are alike and "
        "many channels are slow waves; positions that training never reached stay noise. For comparison, GPT-2's "
        "published 124M table has mean -0.0007, std 0.1227, min -4.5381, max 4.0653.",
        save(subject, figure, "positions.png"),
        html_table(("mean", "std", "min", "max"), [[f"{value:.4f}" for value in (mean, std, low, high)]]),
    )


def draw_embeddings(subject: Subject) -> Iterator[Section]:
    wte = subject.wte
    rows = wte[:300]
    figure = new_figure(subject, f"Token embeddings of the first {len(rows)} of {len(wte):,} tokens", 11, 5)
    heatmap(figure.subplots(), rows, xlabel="channel", ylabel="token id")
    yield Section(
        "Token embeddings",
        "A row for each token of the vocabulary. Columns that stand out are channels with a mean far from 0.",
        save(subject, figure, "embeddings.png"),
    )
    norms = wte.norm(dim=1)
    order = norms.argsort().tolist()
    figure = new_figure(subject, "Norms of the token embeddings", 13, 4.3)
    least, histogram, greatest = figure.subplots(1, 3)
    for axes, ids, title in ((least, order[:12], "the least"), (greatest, order[-12:][::-1], "the greatest")):
        labels = [f"{subject.label(token)} {token}" for token in ids]
        bars(axes, labels, norms[ids].tolist(), title=title, xlabel="norm", ylabel="token and id")
    histogram.hist(norms.numpy(), bins=60, color="#6699cc")
    histogram.set(title=f"all {len(wte):,}", xlabel="norm", ylabel="tokens")
    yield Section(
        "Norms of the token embeddings",
        "The rows of least and greatest length, with the tokens they stand for and their ids.",
        save(subject, figure, "norms.png"),
    )


def draw_neighbours(subject: Subject) -> Iterator[Section]:
    unit = F.normalize(subject.wte, dim=1)
    figure, all_axes = panels(subject, "Nearest neighbours among the token embeddings", len(subject.chosen), 2.4)
    for axes, token in zip(all_axes, subject.chosen):
        cosines = unit @ unit[token]
        cosines[token] = -torch.inf
        values, ids = cosines.topk(min(8, len(unit) - 1))
        labels = [subject.label(neighbour) for neighbour in ids.tolist()]
        bars(axes, labels, values.tolist(), title=f"nearest to {subject.label(token)}", xlabel="cosine similarity")
    yield Section(
        "Nearest neighbours",
        "Tokens whose embeddings point in the most similar directions. Choose others with --tokens.",
        save(subject, figure, "neighbours.png"),
    )


def draw_hardly_trained(subject: Subject) -> Iterator[Section]:
    ids, distances, limit = hardly_trained(subject.wte)
    found = f"{len(ids):,} of {len(distances):,} tokens stand out" if ids else "None stand out"
    figure = new_figure(subject, f"Hardly trained tokens: {found[0].lower()}{found[1:]}", 9, 4)
    axes = figure.subplots()
    axes.hist(distances.numpy(), bins=100, color="#6699cc")
    axes.axvline(limit, color="#cc3333", linestyle="--", label=f"limit: {limit:.3g}")
    axes.set(yscale="log", xlabel="distance from the clump's middle", ylabel="tokens")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    names = ", ".join(f"{label(subject.tokenizer, token)} ({token})" for token in ids[:100])
    yield Section(
        "Hardly trained tokens",
        "Rows of tokens that training hardly ever showed move all alike and end in a clump; in GPT-2's published "
        "weights that of ␣SolidGoldMagikarp and its like lies near the mean row. The clump's middle is the mean of the "
        "8 nearest rows (or a thousandth of all), searched from the mean row on; a token belongs to it if nearer than "
        f"half of what 95 % of all rows keep. {found}{': ' if ids else '.'}{names}"
        + (f" and {len(ids) - 100:,} more." if len(ids) > 100 else "." * bool(ids)),
        save(subject, figure, "hardly_trained.png"),
    )


def draw_weights(subject: Subject) -> Iterator[Section]:
    std = subject.model.config.initializer_range
    name = f"h.{subject.args.layer}.attn.c_attn.weight"
    whole = subject.model.get_parameter(name).detach()
    block = whole[:300, :300]
    fresh = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))[:300, :300] * std
    limit = float(np.quantile(torch.cat([block, fresh]).abs().numpy(), 0.995)) or 1.0
    figure = new_figure(subject, f"{name}, the first {block.shape[0]} x {block.shape[1]}", 11, 5)
    trained_axes, fresh_axes = figure.subplots(1, 2)
    names = {"xlabel": "input channel", "ylabel": "output channel"}
    heatmap(trained_axes, block, limit, title=f"as it is, std {statistics(block)[1]:.4f}", **names)
    heatmap(fresh_axes, fresh, limit, title=f"a fresh draw, std {statistics(fresh)[1]:.4f}", **names)
    yield Section(
        "A weight matrix beside its initialisation",
        f"The matrix that makes queries, keys and values; its first rows make queries. The fresh draw has the standard "
        f"deviation {std} that config.json names (initializer_range). Both have one colour scale.",
        save(subject, figure, "weights.png"),
    )


def draw_text(subject: Subject) -> Iterator[Section]:
    ids, colours = subject.ids, list(PASTELS.values())
    title = f"A text as {len(ids)} tokens of {subject.tokenizer.name}"
    text = "Each box is a token, with its id beneath. ␣ is a blank; escapes such as \\n stand for what has no glyph."
    yield Section("Text to tokens", text, draw_tokens(subject, title, "text.png", ids, list(map(str, ids)), colours))
    n = subject.tokenizer.n_vocab
    usual = [range(n)] if n <= 300 else [range(96), range(n // 2, n // 2 + 96), range(n - 96, n)]
    ranges = subject.args.ids or usual
    ids = [token for part in ranges for token in part]
    title = "Ids back to tokens: " + ", ".join(f"{part[0]} to {part[-1]}" for part in ranges)
    yield Section(
        "Ids to tokens",
        "What ids stand for. Bytes that are no UTF-8 by themselves are shown as \\x escapes. Choose others with --ids.",
        draw_tokens(subject, title, "ids.png", ids, list(map(str, ids)), colours),
    )


@torch.no_grad()
def draw_lookup(subject: Subject) -> Iterator[Section]:
    wte, ids = subject.wte, torch.tensor(subject.ids[:8])
    labels = [subject.label(token) for token in ids.tolist()]
    one_hot = F.one_hot(ids, len(wte)).to(wte.dtype)  # (T, vocab_size)
    looked_up, product = wte[ids], one_hot @ wte  # (T, n_embd) both
    difference = (looked_up - product).abs().max().item()
    figure = new_figure(subject, f"Lookup and one-hot product: largest difference {difference:g}", 13, 4)
    hot_axes, *others = figure.subplots(1, 3)
    occurring = ids.unique()
    title = f"one-hot rows, {len(occurring)} of {len(wte):,} columns"
    heatmap(hot_axes, one_hot[:, occurring], 1.0, labels, title=title, xlabel="id")
    hot_axes.set_xticks(range(len(occurring)), map(str, occurring.tolist()), rotation=90)
    for axes, values, title in zip(others, (product, looked_up), ("one-hot rows @ table", "rows of the table")):
        heatmap(axes, values, rows=labels, title=title, xlabel="channel")
    yield Section(
        "The embedding is a lookup",
        "One-hot rows times the embedding's table are rows of the table. Measured with the whole table, the largest "
        f"absolute difference is {difference:g}. Of the one-hot rows only the columns of ids that occur are shown.",
        save(subject, figure, "lookup.png"),
    )
    entered: list[Tensor] = []
    hook = subject.model.drop.register_forward_hook(lambda *args: entered.append(args[2][0]))
    try:
        subject.model.hidden(ids[None])
    finally:
        hook.remove()
    positions = subject.model.wpe.weight[: len(ids)]
    difference = (looked_up + positions - entered[0]).abs().max().item()
    limit = entered[0].abs().max().item()
    figure = new_figure(subject, f"Token + position = first hidden state: largest difference {difference:g}", 13, 4)
    parts = {"token": looked_up, "position": positions, "sum, as the model has it": entered[0]}
    for axes, (title, values) in zip(figure.subplots(1, 3), parts.items()):
        heatmap(axes, values, limit, labels, title=title, xlabel="channel")
    yield Section(
        "The first hidden state",
        "What enters the first block is the token's embedding plus the position's. The sum is what the running model "
        f"has there; its largest absolute difference from the two parts added is {difference:g}.",
        save(subject, figure, "hidden.png"),
    )


def draw_surprise(subject: Subject) -> Iterator[Section]:
    ids, eot = subject.ids, subject.tokenizer.eot
    logprobs = predictions(subject.model, ids, eot)  # (T, vocab_size)
    bits = -logprobs[range(len(ids)), ids]
    known = bits.nan_to_num(nan=-1.0)
    marked = sorted(token for token in known.topk(min(MARKED, len(ids))).indices.tolist() if known[token] >= 0)
    mean = bits.nanmean().item()
    figure = new_figure(subject, f"Surprise along a text: {mean:.2f} bits a token on average", 11, 4)
    axes = figure.subplots()
    axes.bar(range(len(ids)), bits.numpy(), color=["#cc3333" if i in marked else "#6699cc" for i in range(len(ids))])
    for i in marked:
        place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom", "rotation": 90}
        axes.annotate(subject.label(ids[i]), (i, bits[i]), family="DejaVu Sans Mono", **place)
    axes.set(xlabel="position in the text, tokens", ylabel="surprise, bits")
    axes.margins(x=0.01, y=0.25)
    yield Section(
        "Surprise along a text",
        "How unlikely each token was to the model, given those before it: minus the base-2 logarithm of its "
        f"probability. The {MARKED} most surprising tokens are marked.",
        save(subject, figure, "surprise.png"),
    )
    shades = colormaps["Reds"](np.clip(known.numpy() / 30, 0, 0.5))
    notes = [f"{value:.1f}" if value == value else "?" for value in bits.tolist()]
    file = draw_tokens(subject, "Bits of surprise of each token", "surprise_tokens.png", ids, notes, list(shades))
    yield Section(
        "Surprise of each token", "The same, in bits beneath the tokens; the redder, the less expected.", file
    )
    if not marked:
        return
    figure, all_axes = panels(subject, "What the model expected instead", len(marked), 2.1)
    for axes, i in zip(all_axes, marked):
        values, alternatives = logprobs[i].topk(min(5, logprobs.shape[1]))
        shown = list(zip(alternatives.tolist(), (100 * values.exp2()).tolist()))
        if ids[i] not in alternatives:
            shown.append((ids[i], 100 * logprobs[i, ids[i]].exp2().item()))
        labels = [("» " if token == ids[i] else "") + subject.label(token) for token, _ in shown]
        before = "".join(subject.label(token) for token in ids[max(0, i - 12) : i])[-24:]
        bars(
            axes,
            labels,
            [p for _, p in shown],
            "{:.3g} %",
            xlabel="probability, %",
            title=f"{i}: after {before or 'nothing'}",
        )
    yield Section(
        "What the model expected instead",
        "The likeliest tokens where it was most surprised. » marks the token that came.",
        save(subject, figure, "alternatives.png"),
    )


def draw_attention(subject: Subject) -> Iterator[Section]:
    model, args = subject.model, subject.args
    eot = subject.tokenizer.eot
    ids, written = subject.ids, ""
    if args.text is None and eot is not None:
        n = min(MAX_TOKENS, model.config.block_size)
        ids = model.generate(torch.tensor([[eot]]), n - 1, temperature=0.8, top_k=200, top_p=0.95, seed=0)[0].tolist()
        written = " that it writes"
    T = len(ids)
    heads = range(model.config.n_head) if args.head is None else [args.head]
    layers = range(args.layer, min(args.layer + LAYERS, model.config.n_layer))
    weights = attention_weights(model, torch.tensor([ids]))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    title = f"Attention over {T} tokens{written}"
    figure = new_figure(subject, title, max(6, 3.3 * len(layers) + 1), 3.3 * len(heads) + 1.2)
    grid = figure.subplots(len(heads), len(layers), squeeze=False)
    maps = []
    for head, row in zip(heads, grid):
        for layer, axes in zip(layers, row):
            shown = weights[layer][0, head].masked_fill(future, torch.nan)  # (T, T)
            norm = PowerNorm(0.4, 0, 1)
            maps.append(axes.imshow(shown.numpy(), cmap="viridis", norm=norm, interpolation="nearest"))
            axes.set(title=f"layer {layer}, head {head}", xlabel="to position", ylabel="from position")
            axes.label_outer()
            if T <= 32 and len(heads) == 1:
                labels = [subject.label(token)[:10] for token in ids]
                axes.set_xticks(range(T), labels, rotation=90, family="DejaVu Sans Mono", fontsize=7)
                axes.set_yticks(range(T), labels, family="DejaVu Sans Mono", fontsize=7)
    bar = {"label": "attention weight", "ticks": [0, 0.01, 0.1, 0.3, 1], "format": "{x:g}"}
    figure.colorbar(maps[0], ax=grid, aspect=20 * len(heads), **bar)
    figure.supxlabel(" ")  # room for the caption of the animation
    explanation = (
        "Each row is a token, and the colours say how much it attends to each one before it; a row sums to 1, and what "
        "comes later is hidden from it. The colour scale is stretched where weights are small. Layers and heads are "
        "counted from 0; choose others with --layer and --head."
    )
    yield Section("Attention", explanation, save(subject, figure, "attention.png"))
    figure.set_dpi(100)
    animate(figure, maps, [subject.label(token) for token in ids], args.out / "attention.gif")
    yield Section(
        "Attention, token by token", "The same as the text grows; the newest tokens stand below.", "attention.gif"
    )


def animate(figure: Figure, maps: list[AxesImage], labels: list[str], path: Path) -> None:
    """Write a GIF in which the maps (T, T) of a figure appear row by row, with the newest labels below."""
    full = pixels(figure)
    figure.set_layout_engine("none")  # both frames alike
    for shown in maps:
        shown.set_visible(False)
    frame = pixels(figure)
    font = ImageFont.truetype(findfont("DejaVu Sans Mono"), 13)
    colours = np.concatenate([colormaps["viridis"](np.linspace(0, 1, 240)), colormaps["gray"](np.linspace(0, 1, 16))])
    palette = Image.new("P", (1, 1))
    palette.putpalette((255 * colours[:, :3]).round().astype(np.uint8).tobytes())
    draw, frames = ImageDraw.Draw(frame), []
    for t in range(len(labels)):
        for shown in maps:
            box = shown.axes.get_window_extent()  # in pixels, from the bottom
            top, height = full.height - box.y1, box.height
            above, below = (round(top + height * row / len(labels)) for row in (t, t + 1))
            rows = (round(box.x0) + 1, above, round(box.x1), below)
            frame.paste(full.crop(rows), rows[:2])
        draw.rectangle((0, full.height - 24, full.width, full.height), "white")
        room = full.width // 8 - 14
        draw.text((8, full.height - 21), f"{t + 1:4}  {''.join(labels[: t + 1])[-room:]}", "black", font)
        frames.append(frame.quantize(palette=palette, dither=Image.Dither.NONE))
    durations = [80] * (len(frames) - 1) + [3000]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def draw_runs(subject: Subject) -> Iterator[Section]:
    folders = {run.resolve(): run for run in filter(None, [subject.run, *subject.args.compare])}.values()
    runs = [read_curves(run) for run in folders]
    if not runs:
        return
    figure = new_figure(subject, "Training" + f", {len(runs)} runs" * (len(runs) > 1), 15, 7.5)
    by_tokens, by_time, rate, norm, speed = figure.subplot_mosaic("AAABBB;CCDDEE").values()
    unit, per_hour = ("hours", 1) if max(run.train["hours"][-1] for run in runs) > 2 else ("minutes", 60)
    for number, run in enumerate(runs):
        style = {"color": f"C{number}", "linewidth": 0.8, "marker": ".", "markersize": 2}  # lone points stay seen
        for axes, x, scale in ((by_tokens, "tokens", 1), (by_time, "hours", per_hour)):
            last = f": {run.val['val_loss'][-1]:.3f}" if len(run.val["val_loss"]) else ""
            axes.plot(run.train[x] * scale, run.train["train_loss"], alpha=0.5, **style)
            axes.plot(
                run.val[x] * scale,
                run.val["val_loss"],
                label=run.name + last,
                **{**style, "marker": "o", "markersize": 4},
            )
        for axes, y in ((rate, "lr"), (norm, "grad_norm"), (speed, "tokens_per_sec")):
            axes.plot(run.train["tokens"], run.train[y], **style)
    for axes in (by_tokens, by_time):
        for level in {published_level(run) for run in folders} - {None}:
            axes.axhline(level, color="gray", linestyle="--", label=f"GPT-2 as published: {level}")
        axes.legend(title="validation loss at the end")
        axes.set(
            title="loss; thin: training, large dots: validation", ylabel="nats a token", xlabel=f"{unit} of training"
        )
    for axes in (by_tokens, rate, norm, speed):
        axes.set_xlabel("tokens seen")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    rate.set(title="learning rate", ylabel="size of a step", ylim=(0, None))
    norm.set(title="gradient norm, before clipping", ylabel="norm", ylim=(0, None))
    speed.set(title="speed", ylabel="tokens a second", ylim=(0, None))
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    yield Section(
        "Training",
        "From metrics.jsonl. Gaps are steps whose loss or gradient was not finite. Time is reckoned from "
        "tokens_per_sec, evaluations left out. Draw other runs beside this one with --compare.",
        save(subject, figure, "training.png"),
    )


PICTURES: list[Callable[[Subject], Iterator[Section]]] = [
    draw_runs,
    draw_text,
    draw_surprise,
    draw_attention,
    draw_lookup,
    draw_embeddings,
    draw_neighbours,
    draw_hardly_trained,
    draw_positions,
    draw_weights,
    draw_parameters,
]

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{made_here}
<title>{name}</title>
<style>
body {{ font-family: sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5; color: #222;
  overflow-wrap: anywhere; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0; }}
th, td {{ padding: 0.15rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
</style>
</head>
<body>
<h1>{name}</h1>
<ul>
{contents}
</ul>
{body}
</body>
</html>
"""


def write_page(subject: Subject, sections: list[Section]) -> None:
    """index.html with the pictures inside; nothing is loaded from elsewhere."""
    contents, body = [], []
    for number, section in enumerate(sections):
        contents.append(f'<li><a href="#s{number}">{html.escape(section.title)}</a></li>')
        body.append(f'<h2 id="s{number}">{html.escape(section.title)}</h2>\n<p>{html.escape(section.text)}</p>')
        if section.file:
            data = base64.b64encode((subject.args.out / section.file).read_bytes()).decode()
            kind, alt = Path(section.file).suffix[1:], html.escape(f"{section.title}: {subject.name}")
            body.append(f'<p><img src="data:image/{kind};base64,{data}" alt="{alt}"></p>')
        body.append(section.table)
    page = PAGE.format(
        made_here=MADE_HERE, name=html.escape(subject.name), contents="\n".join(contents), body="\n".join(body)
    )
    (subject.args.out / "index.html").write_text(page, encoding="utf-8", errors="replace")


def check_folder(out: Path) -> None:
    """Raises UserError where pictures would be written among files that are not ours."""
    index = out / "index.html"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder with --out")
    ours = index.is_file() and MADE_HERE in index.read_text(encoding="utf-8", errors="replace")
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise UserError(f"{out} holds files that are not of visualize.py; name another folder with --out")


def load(args: argparse.Namespace) -> Subject:
    """The model and its text.

    Raises:
        UserError: no such model, a layer or head that it lacks, or a text that it cannot read.
    """
    source = find_model(args.model)
    model = load_model(source, dtype=torch.float32)
    tokenizer = load_tokenizer(source)
    config = model.config
    if bad := nonfinite_tensor(model):
        raise UserError(f"{source} has values in {bad} that are not finite; there is nothing to draw")
    if not 0 <= args.layer < config.n_layer:
        raise UserError(f"there is no layer {args.layer}; {source} has layers 0 to {config.n_layer - 1}")
    if args.head is not None and not 0 <= args.head < config.n_head:
        raise UserError(f"there is no head {args.head}; {source} has heads 0 to {config.n_head - 1}")
    for part in args.ids:
        if not part or part[-1] >= tokenizer.n_vocab:
            raise UserError(f"--ids {part.start}-{part.stop - 1} is no range of the ids 0 to {tokenizer.n_vocab - 1}")
    if (n := sum(map(len, args.ids))) > MOST_IDS:
        raise UserError(f"--ids names {n:,} ids; {MOST_IDS:,} fit a picture")
    ids = encode(tokenizer, TEXT if args.text is None else args.text)
    limit = min(MAX_TOKENS, config.block_size)
    if len(ids) > limit:
        if args.text is not None:
            print(f"the text is longer than {limit} tokens; its last {limit} are shown", file=sys.stderr)
        ids = ids[-limit:]
    chosen = [found[0] for text in TOKENS if len(found := tokenizer.encode(text)) == 1][:6] or ids[:1]
    if len(args.tokens or ()) > MOST_CHOSEN:
        raise UserError(f"--tokens names {len(args.tokens)} tokens; {MOST_CHOSEN} fit a picture")
    if args.tokens:
        found = [tokenizer.encode(text, allow_eot=True) for text in args.tokens]
        for text, made in zip(args.tokens, found):
            if len(made) != 1:
                raise UserError(f"--tokens {text!r} is {len(made)} tokens of {tokenizer.name}, not one; blanks count")
        chosen = [token for (token,) in found]
    largest = max([*ids, *chosen, tokenizer.eot or 0])
    if largest >= config.vocab_size:
        raise UserError(f"the tokenizer of {source} has id {largest}, the model only {config.vocab_size} tokens")
    name, run, folder = str(source), None, Path(source).resolve()
    if folder.is_dir():
        name = folder.name
        if folder.parent.name == "checkpoints":
            name = f"{folder.parents[1].name}, {folder.name}"
            run = folder.parents[1] if (folder.parents[1] / "metrics.jsonl").is_file() else None
    return Subject(model, tokenizer, f"{name} ({model.num_params() / 1e6:,.1f}M parameters)", run, ids, chosen, args)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    if not text:
        raise UserError("the text is empty; give --text at least a character")
    return tokenizer.encode(text)


def visualize(args: argparse.Namespace) -> None:
    if args.text is not None and args.out is None:
        tokenizer = load_tokenizer(find_model(args.model) if args.model else "gpt2")
        print_tokens(tokenizer, encode(tokenizer, args.text))
        return
    args.out = args.out or Path("figures")
    check_folder(args.out)
    subject = load(args)
    for run in filter(None, [subject.run, *args.compare]):
        read_curves(run)  # what is wrong with one is said before anything is drawn
    args.out.mkdir(parents=True, exist_ok=True)
    sections: list[Section] = []
    write_page(subject, sections)  # so that the folder is known as ours, should this one not end
    with rc_context(STYLE):
        for draw in tqdm(PICTURES, unit="picture"):
            sections += draw(subject)
    write_page(subject, sections)
    print(f"{args.out / 'index.html'} holds {sum(bool(section.file) for section in sections)} pictures")


if __name__ == "__main__":
    run_script(lambda: visualize(parse_args()))
