"""What the pictures show, the page that embeds them, and errors for bad input."""

import base64
import csv
import io
import itertools
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

import visualize as visualize_module
from gpt2_scratch.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from visualize import (
    MADE_HERE,
    attention_weights,
    drawable,
    label,
    lines_of,
    overtakings,
    parameter_rows,
    parse_args,
    predictions,
    published_loss,
    read_curves,
    undertrained_tokens,
    visualize,
)

SCRIPT = Path(__file__).parent.parent / "visualize.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8", "COLUMNS": "60"}
LINES = [
    {"step": 1, "tokens": 100, "train_loss": 5.0, "lr": 0.1, "grad_norm": 1.0, "bad_steps": 0, "tokens_per_sec": 10},
    {"step": 2, "tokens": 200, "train_loss": None, "lr": 0.2, "grad_norm": None, "bad_steps": 1, "tokens_per_sec": 50},
    {"step": 2, "tokens": 200, "val_loss": 4.0},
    {"step": 3, "tokens": 300, "train_loss": 3.0, "lr": 0.1, "grad_norm": 0.5, "bad_steps": 1, "tokens_per_sec": 25},
]


def small(folder: Path, tokenizer: str | None = "bytes", **shape: Any) -> GPT:
    """Save a model with random weights to a folder."""
    sizes = {"block_size": 24, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 16, "eos_token_id": 256}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**sizes, **shape}))
    model.save_pretrained(folder)
    if tokenizer:
        load_tokenizer(tokenizer).save_pretrained(folder)
    return model.eval()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a run `out/run` in the working directory, whose metrics.jsonl has a torn last line."""
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "out/run/checkpoints/step_00000003"
    small(checkpoint)
    (checkpoint / "SHA256SUMS").write_text("")
    text = "".join(json.dumps(line) + "\n" for line in LINES) + '{"step": 4, "tok'
    (tmp_path / "out/run/metrics.jsonl").write_text(text)
    return checkpoint


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run visualize.py in this process."""

    def run(*flags: object) -> None:
        monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, flags)])
        visualize(parse_args())

    return run


# What is computed


def random_transformers(kind: str) -> torch.nn.Module:
    torch.manual_seed(1)
    shape = {"vocab_size": 50, "n_positions": 16, "n_embd": 24, "n_layer": 3, "n_head": 4}
    shape |= {"bos_token_id": None, "eos_token_id": None, "attn_implementation": "eager", "initializer_range": 0.5}
    if kind == "gpt1":
        return OpenAIGPTLMHeadModel(OpenAIGPTConfig(**shape))
    return GPT2LMHeadModel(GPT2Config(**shape, scale_attn_by_inverse_layer_idx=kind == "inverse"))


@pytest.mark.parametrize("kind", ["gpt2", "inverse", "gpt1"])
def test_attention_weights_match_transformers(kind: str, tmp_path: Path) -> None:
    theirs = random_transformers(kind).double().eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path, dtype=torch.float64)
    idx = torch.randint(50, (2, 16))
    weights = attention_weights(ours, idx)
    with torch.no_grad():
        expected = theirs(idx, output_attentions=True).attentions
    assert len(weights) == len(expected) == 3
    for layer, wanted in zip(weights, expected):
        assert layer.dtype == torch.float64
        torch.testing.assert_close(layer, wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.sum(dim=-1), torch.ones(2, 4, 16, dtype=torch.float64))
    assert not any(block.attn.c_attn._forward_hooks for block in ours.h)


def test_attention_beyond_the_context_raises_and_removes_its_hooks(tmp_path: Path) -> None:
    model = small(tmp_path)
    with pytest.raises(ValueError, match="25 tokens do not fit"):
        attention_weights(model, torch.zeros(1, 25, dtype=torch.int64))
    assert not any(block.attn.c_attn._forward_hooks for block in model.h)


def test_predictions_match_the_loss(tmp_path: Path) -> None:
    model = small(tmp_path)
    ids = [5, 200, 7, 7]
    bits = -predictions(model, ids, 256)[range(4), ids]
    loss = model(torch.tensor([[256, *ids[:-1]]]), torch.tensor([ids]))[1]
    assert bits.mean().item() * math.log(2) == pytest.approx(loss.item(), rel=1e-5)
    without = -predictions(model, ids, None)[range(4), ids]
    loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[1]
    assert without[0].isnan()  # it has no context
    assert without[1:].mean().item() * math.log(2) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_table_of_known_values(tied: bool) -> None:
    model = GPT(GPTConfig(block_size=4, vocab_size=3, n_layer=1, n_head=1, n_embd=2, tie_word_embeddings=tied))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(2.0)
        model.wte.weight[:3] = torch.tensor([[-1.0, 0.0], [1.0, 2.0], [3.0, 7.0]])
        model.wte.weight[3:] = 1e9  # padding must not show
        model.lm_head.weight[3:] = 1e9
    rows = {row[0]: row[1:] for row in parameter_rows(model)}
    assert rows["wte.weight"] == ("3 x 2", 6, 2.0, pytest.approx(np.std([-1, 0, 1, 2, 3, 7])), -1.0, 7.0)
    assert rows["h.0.attn.c_attn.weight"] == ("6 x 2", 12, 2.0, 0.0, 2.0, 2.0)
    assert rows["h.0.ln_1.bias"] == ("2", 2, 2.0, 0.0, 2.0, 2.0)
    assert ("lm_head.weight" in rows) == (not tied)
    assert sum(row[1] for row in rows.values()) == model.num_params()


def test_undertrained_tokens_are_found_and_a_fresh_table_has_none() -> None:
    source = torch.Generator().manual_seed(0)
    table = torch.randn(3000, 64, generator=source) + 0.3
    assert undertrained_tokens(table)[0] == []
    planted = sorted(torch.randperm(3000, generator=source)[:40].tolist())
    table[planted] = 0.35 + 0.05 * torch.randn(40, 64, generator=source)  # near the mean row, as in GPT-2
    ids, distances, radius = undertrained_tokens(table)
    assert sorted(ids) == planted
    assert distances[ids].max() < radius < distances[[i for i in range(3000) if i not in planted]].min()
    far = torch.randn(300, 64, generator=source)
    far[:200] = 4 + 0.05 * torch.randn(200, 64, generator=source)  # most of the vocabulary, as in a byte-level model
    assert sorted(undertrained_tokens(far)[0]) == list(range(200))


def test_labels_are_one_line_without_invisible_characters() -> None:
    tokenizer = load_tokenizer("bytes")
    assert [label(tokenizer, token) for token in (10, 32, 27, 0xC3, 36, 256)] == [
        "\\n", "␣", "\\x1b", "\\xc3", "$", "<|endoftext|>",
    ]  # fmt: skip
    assert drawable("漢a") == "\\u6f22a"  # not in the font
    assert drawable("x" * 50) == "x" * 17 + "…"
    gpt2 = load_tokenizer("gpt2")
    assert all(drawable(label(gpt2, token)).isprintable() for token in range(gpt2.n_vocab))


def test_lines_are_filled_without_losing_a_cell() -> None:
    assert list(lines_of([3, 3, 3, 99, 1], 7)) == [[0, 1], [2], [3], [4]]
    assert list(lines_of([], 7)) == []


# Runs


def test_overtaking_names_tokens_and_time() -> None:
    def val(*losses: float) -> tuple[dict, dict]:
        n = len(losses)
        return {}, {
            "val_loss": np.array(losses),
            "tokens": 1e6 * np.arange(1, n + 1),
            "hours": np.arange(1, n + 1) / 60,
        }

    runs = {Path("a"): val(3.0, np.nan, 1.9, 1.7), Path("b"): val(3.5, 2.5, 2.0), Path("c"): val()}
    assert overtakings(runs) == [
        "a passes the final validation loss of b, 2.0000, by 3.00M tokens and 3.0 minutes; b took 3.00M tokens and "
        "3.0 minutes."
    ]


def test_curves_of_a_run(made: Path) -> None:
    train, val = read_curves(Path("out/run"))
    np.testing.assert_array_equal(train["tokens"], [100, 200, 300])
    np.testing.assert_array_equal(train["train_loss"], [5, np.nan, 3])
    np.testing.assert_allclose(train["hours"] * 3600, [10, 12, 16])
    np.testing.assert_array_equal(val["val_loss"], [4])
    np.testing.assert_allclose(val["hours"] * 3600, [12])


@pytest.mark.parametrize(
    ("data", "tokenizer", "shape", "loss"),
    [
        ("data/fineweb-edu", "gpt2", (12, 768), 3.2924),
        ("data/openwebtext", "gpt2", (24, 1024), 2.84),
        ("data/fineweb-edu", "gpt2", (24, 1024), None),
        ("data/fineweb-edu", "bytes", (12, 768), None),
        ("data/shakespeare-gpt2", "gpt2", (12, 768), None),
        ("data/fineweb-edu-mine", "gpt2", (12, 768), None),
        ("data/fineweb-edu", None, (12, 768), None),
    ],
)
def test_published_loss_only_where_it_applies(
    data: str, tokenizer: str | None, shape: tuple[int, int], loss: float | None, made: Path
) -> None:
    Path("out/run/config.toml").write_text(f'data = "{data}"\n')
    (made / "config.json").write_text(json.dumps({"n_layer": shape[0], "n_embd": shape[1]}))
    (made / "tokenizer_config.json").unlink()
    if tokenizer:
        load_tokenizer(tokenizer).save_pretrained(made)
    assert published_loss(Path("out/run")) == loss


@pytest.mark.parametrize("config", [None, "not = toml =", "", 'data = "data/fineweb-edu"'])
def test_no_published_loss_for_an_unknown_run(config: str | None, made: Path) -> None:
    shutil.rmtree(made)
    if config is not None:
        Path("out/run/config.toml").write_text(config)
    assert published_loss(Path("out/run")) is None


# The page


class Page(HTMLParser):
    """A parsed page; fails on unclosed or crossed tags."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):  # void elements
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check_page(folder: Path) -> Page:
    """index.html embeds every picture in its folder unchanged, and loads nothing."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) == len(page.all("h2")) == len(page.all("a")) > 0
    inside = []
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name == "href":
                assert value[0] == "#" and value[1:] in ids
            elif name == "src":
                inside.append(base64.b64decode(re.fullmatch(r"data:image/(?:png|gif);base64,(.*)", value)[1]))
            assert name != "srcset" and not name.startswith("on")
    assert sorted(inside) == sorted(path.read_bytes() for path in folder.iterdir() if path.suffix in (".png", ".gif"))
    assert all(len(attributes["alt"]) > 5 for attributes in page.all("img"))
    assert not page.all("script") and not page.all("link") and "url(" not in text and "@import" not in text
    for picture in inside:
        assert min(Image.open(io.BytesIO(picture)).size) > 100
    return page


def test_the_pictures_of_a_run(made: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    other = Path("out/other $x$ & <b>")
    other.mkdir()
    shutil.copy("out/run/metrics.jsonl", other)
    run("--out", "figures", "--compare", other, "--head", "all")
    page = check_page(Path("figures"))
    assert capsys.readouterr().out == "figures/index.html holds 17 pictures\n"
    assert {path.name for path in Path("figures").iterdir()} >= {"training.png", "attention.gif"}
    with Path("figures/parameters.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["count"]) for row in rows) == GPT.from_pretrained(made).num_params()
    assert len(page.all("tr")) > len(rows)
    gif = Image.open("figures/attention.gif")
    assert gif.n_frames == 24  # the context is shorter than 256 tokens


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LOOK = """(() => {
    const nav = document.querySelector("nav"), images = [...document.images];
    scrollTo(0, document.body.scrollHeight);
    const end = nav.getBoundingClientRect();
    [...nav.querySelectorAll("a")].at(-1).click();
    return {
        sideways: document.documentElement.scrollWidth - innerWidth,
        loaded: images.map(image => image.complete && image.naturalWidth > 0),
        scale: images.filter(image => image.src.includes("png")).map(image => image.width / image.naturalWidth),
        contents: end.top >= 0 && end.bottom <= innerHeight,
        heading: [...document.querySelectorAll("h2")].at(-1).getBoundingClientRect().top,
        strip: end.width > innerWidth / 2 ? end.bottom : 0,
        colours: [getComputedStyle(document.body).color, getComputedStyle(nav).backgroundColor],
    };
})()"""


class Browser:
    """Chromium without a window. Commands and answers are JSON that ends in a null byte, on its descriptors 3 and 4."""

    def __init__(self) -> None:
        (commands, self.to), (self.answers, answers) = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        begin = f'exec "$@" 3<&{commands} 4>&{answers}'
        program = ["bash", "-c", begin, "bash", str(CHROMIUM), *flags]
        self.process = subprocess.Popen(program, pass_fds=(commands, answers), stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self.number, self.session, self.unread = 0, {}, b""
        self.events: list[dict[str, Any]] = []  # all messages so far
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def do(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        return self.wait(lambda event: event.get("id") == self.number)["result"]

    def wait(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while not self.events or not wanted(self.events[-1]):
            while b"\0" not in self.unread:
                part = os.read(self.answers, 2**20)
                assert part, "the browser has ended"
                self.unread += part
            text, _, self.unread = self.unread.partition(b"\0")
            self.events.append(json.loads(text))
        return self.events[-1]

    def look(self, width: int, scheme: str) -> dict[str, Any]:
        """What LOOK finds in a window of this width with a "light" or "dark" colour scheme."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.do("Emulation.setDeviceMetricsOverride", **size)
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        return self.do("Runtime.evaluate", expression=LOOK, returnByValue=True)["result"]["value"]

    def close(self) -> None:
        self.do("Browser.close")
        self.process.wait(20)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_in_a_browser(made: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """No error, nothing from the network; readable on any screen, light or dark, with the contents in sight."""
    drawn = ("draw_runs", "draw_text", "draw_attention", "draw_positions", "draw_parameters")  # seven pictures
    monkeypatch.setattr(visualize_module, "PICTURES", [getattr(visualize_module, name) for name in drawn])
    run("--out", "figures")
    with closing(Browser()) as browser:
        for domain in ("Page", "Network", "Runtime", "Log"):
            browser.do(f"{domain}.enable")
        browser.do("Page.navigate", url=Path("figures/index.html").resolve().as_uri())
        browser.wait(lambda event: event.get("method") == "Page.loadEventFired")
        for width, scheme in itertools.product((400, 1100, 1600), ("light", "dark")):
            look = browser.look(width, scheme)
            assert look["sideways"] <= 0 and look["contents"], (width, look)
            assert look["loaded"] == [True] * 7
            assert min(look["scale"]) * 150 / 72 * 9 >= 9.9, "labels of 9 points are at least 10 pixels high"
            assert look["strip"] <= look["heading"] < 800, (width, look)
            text, page = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in look["colours"])
            assert (text - page if scheme == "dark" else page - text) > 500, look["colours"]
    methods = {event.get("method") for event in browser.events}
    assert not methods & {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}, browser.events
    requests = [event["params"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    assert [request["request"]["url"].partition(":")[0] for request in requests] == ["file"] + 7 * ["data"]


@pytest.fixture
def attention_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visualize_module, "PICTURES", [visualize_module.draw_attention])


@pytest.mark.usefixtures("attention_only")
def test_the_animation_grows_by_one_row_per_token(made: Path, run: Callable[..., None]) -> None:
    run(made, "--out", "figures", "--text", "abcdefgh")
    gif = Image.open("figures/attention.gif")
    assert gif.n_frames == 8
    coloured = []
    for number in range(8):
        gif.seek(number)
        rgb = np.asarray(gif.convert("RGB"), dtype=int)[60:-40, : gif.width * 4 // 5]  # no title, scale, caption
        coloured.append(int((rgb.max(axis=-1) - rgb.min(axis=-1) > 40).sum()))
    growth = np.diff([0, *coloured])
    assert (growth > 0).all()
    np.testing.assert_allclose(growth / growth[0], range(1, 9), rtol=0.1)  # row t has t cells


def test_the_smallest_model_with_an_untied_head(tmp_path: Path, run: Callable[..., None]) -> None:
    small(tmp_path / "model", n_layer=1, n_head=1, n_embd=2, block_size=1, tie_word_embeddings=False)
    run(tmp_path / "model", "--out", tmp_path / "figures", "--text", "$", "--ids", "0-2", "250", "--tokens", "$")
    assert len(check_page(tmp_path / "figures").all("img")) == 16  # no run, so one fewer
    assert "head" in (tmp_path / "figures/index.html").read_text()


@pytest.mark.usefixtures("attention_only")
def test_attention_begins_at_the_given_layer(
    tmp_path: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path / "model", n_layer=6)
    titles = []
    monkeypatch.setattr(Axes, "set", lambda axes, **names: titles.append(names["title"]))
    run(tmp_path / "model", "--out", tmp_path / "figures", "--layer", 3, "--head", 1, "--text", "$\x00é漢\n")
    assert titles == [f"layer {layer}, head 1" for layer in (3, 4, 5)]


def test_gpt1_without_an_end_of_text(tmp_path: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = random_transformers("gpt1")
    theirs.save_pretrained(tmp_path / "model")
    vocabulary = {chr(97 + i) + end: 2 * i + bool(end) for i in range(24) for end in ("", "</w>")}
    (tmp_path / "model/vocab.json").write_text(json.dumps({**vocabulary, "<unk>": 49}))
    (tmp_path / "model/merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "model/tokenizer_config.json").write_text('{"tokenizer_class": "OpenAIGPTTokenizer"}')
    drawn = [visualize_module.draw_surprise, visualize_module.draw_attention, visualize_module.draw_lookup]
    monkeypatch.setattr(visualize_module, "PICTURES", drawn)
    run(tmp_path / "model", "--out", tmp_path / "figures", "--layer", 2, "--tokens", "a")
    assert len(check_page(tmp_path / "figures").all("img")) == 7


# The terminal


def test_text_on_a_terminal_is_coloured() -> None:
    master, slave = pty.openpty()
    command = [sys.executable, SCRIPT, "--text", "Hello, wörld\n"]
    done = subprocess.run(command, stdout=slave, stderr=subprocess.PIPE, env=ENVIRONMENT)
    os.close(slave)
    shown = os.read(master, 10_000).decode()
    assert done.returncode == 0
    assert "\x1b[30;48;5;" in shown
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown).split()
    ids = load_tokenizer("gpt2").encode("Hello, wörld\n")
    assert plain == ["Hello", ",", "␣w", "ör", "ld", "\\n", *map(str, ids)]


def test_text_in_a_pipe_is_plain_and_wrapped(
    made: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = "\x1b[31mto be or not to be 漢字" * 5
    run("out/run", "--text", text)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 40
    assert [int(n) for line in shown.splitlines()[1::2] for n in line.split()] == list(text.encode())
    assert not Path("figures").exists()


# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer", 2], r"there is no layer 2; out/run/checkpoints/step_00000003 has layers 0 to 1"),
        (["--layer", -1], r"there is no layer -1"),
        (["--head", 2], r"there is no head 2; .* has heads 0 to 1"),
        (["--tokens", "e", "ab"], r"--tokens 'ab' is 2 tokens of bytes, not one"),
        (["--tokens", ""], r"--tokens '' is 0 tokens"),
        (["--ids", "250-257"], r"--ids 250-257 is not a range of ids 0 to 256"),
        (["--ids", "9-3"], r"--ids 9-3 is not a range"),
        (["--text", ""], r"--text has no tokens"),
        (["--compare", "out/nothing"], r"out/nothing has no metrics.jsonl; pass a run folder"),
        (["--out", "out"], r"out contains files that visualize.py did not write; choose another folder"),
        (["--out", "out/run/metrics.jsonl"], r"out/run/metrics.jsonl is a file"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(flags: list, message: str, made: Path, run: Callable[..., None]) -> None:
    before = sorted(Path(".").rglob("*"))
    with pytest.raises(ValueError, match=message):
        run("--out", "figures", *flags)
    assert sorted(Path(".").rglob("*")) == before


def test_a_run_without_metrics_is_named(made: Path, run: Callable[..., None]) -> None:
    empty = Path("out/empty")
    empty.mkdir()
    (empty / "metrics.jsonl").write_text('{"step": 1, "tok')
    with pytest.raises(ValueError, match=r"out/empty/metrics.jsonl has no training metrics yet"):
        run("--out", "figures", "--compare", empty)


def test_a_model_without_tokenizer_with_a_larger_one_or_non_finite(tmp_path: Path, run: Callable[..., None]) -> None:
    small(tmp_path / "bare", tokenizer=None)
    with pytest.raises(ValueError, match=r"bare holds no tokenizer that can be read"):
        run(tmp_path / "bare", "--out", tmp_path / "figures")
    small(tmp_path / "narrow", vocab_size=100)
    with pytest.raises(ValueError, match=r"narrow has 257 ids, the model 100"):
        run(tmp_path / "narrow", "--out", tmp_path / "figures")
    model = small(tmp_path / "broken")
    model.wpe.weight.data[3, 3] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"broken has non-finite values in wpe.weight"):
        run(tmp_path / "broken", "--out", tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


@pytest.mark.usefixtures("attention_only")
def test_a_long_text_is_cut_to_its_end_with_a_message(
    made: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run("--out", "figures", "--text", "x" * 25)
    assert "the text is longer than 24 tokens; showing the last 24" in capsys.readouterr().err
    assert Image.open("figures/attention.gif").n_frames == 24


@pytest.mark.usefixtures("attention_only")
def test_only_our_own_folder_is_overwritten(made: Path, run: Callable[..., None]) -> None:
    Path("figures").mkdir()
    Path("figures/index.html").write_text("<p>someone else's</p>")
    with pytest.raises(ValueError, match=r"contains files that visualize\.py did not write"):
        run("--out", "figures")
    Path("figures/index.html").write_text(f"<html>{MADE_HERE}</html>")  # as left by an interrupted run
    Path("figures/notes.txt").write_text("mine")
    run("--out", "figures")
    check_page(Path("figures"))
    assert Path("figures/notes.txt").read_text() == "mine"


def test_bad_input_exits_with_one_line_and_code_1(made: Path) -> None:
    command = [sys.executable, SCRIPT, "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1
    assert re.fullmatch(r"error: out contains files that visualize.py did not write; [^\n]*\n", done.stderr)


@pytest.mark.parametrize("flags", [["--ids", "many"], ["--head", "first"], ["--compare"], ["--paint"]])
def test_wrong_usage_exits_with_code_2(
    flags: list[str], run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*flags)
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err
