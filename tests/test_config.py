"""The settings of a run: file, flags, their checks, and the one sentence that a mistake gets."""

import ast
import dataclasses
import inspect
import itertools
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_scratch.cli import UserError
from gpt2_scratch.config import TrainConfig, parse_config

ROOT = Path(__file__).resolve().parent.parent
FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "recipe.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return str(path)


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that bad usage gets; it must be all there is, on one line of stderr, with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        parse_config(argv)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


def test_a_file_sets_and_a_flag_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "n_layer = 3\nlearning_rate = 1\nschedule = 'wsd'\nresume = true\n")
    config = parse_config([path, "--n_layer", "5", "--data=data/my=own", "--run_name", "123"])
    assert config == TrainConfig(
        n_layer=5, learning_rate=1.0, schedule="wsd", resume=True, data="data/my=own", run_name="123"
    )
    assert type(config.learning_rate) is float


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert parse_config([write(tmp_path, "")]) == TrainConfig()


def test_without_a_file_the_default_recipe_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder, and under the flags."""
    monkeypatch.chdir(tmp_path)
    recipe = parse_config([str(ROOT / "configs" / "shakespeare.toml")])
    assert recipe != TrainConfig()
    assert parse_config([]) == recipe
    assert parse_config(["--seed", "7"]) == dataclasses.replace(recipe, seed=7)


@pytest.mark.parametrize(
    ("flags", "resume"),
    [
        (["--resume"], True),
        (["--resume", "--seed", "7"], True),
        (["--seed", "7", "--resume"], True),
        (["--resume", "true"], True),
        (["--resume=false"], False),
        (["--resume", "false", "--seed", "7"], False),
    ],
)
def test_a_switch_needs_no_value(tmp_path: Path, flags: list[str], resume: bool) -> None:
    config = parse_config([write(tmp_path, ""), *flags])
    assert (config.resume, config.seed) == (resume, 7 if "--seed" in flags else 1337)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("lerning_rate = 1", ["lerning_rate", "did you mean learning_rate?"]),
        ("zzz = 1", ["no setting zzz"]),
        ("[model]\nn_layer = 3", ["model.n_layer", "did you mean n_layer?"]),
        ("a.b = {c.d = 1}", ["no setting a.b.c.d"]),
        ("config = 'other.toml'", ["no setting config", "first"]),
        ("max_steps = 'abc'", ["max_steps must be a whole number", "abc"]),
        ("max_steps = '20'", ["max_steps must be a whole number above 0, not '20'"]),
        ("compile = ''", ["compile must be true or false, not ''"]),
        ("max_steps = 10000000000000000", ["max_steps must be at most 9,007,199,254,740,992, not 1000"]),
        ("n_layer = 10001", ["n_layer must be at most 10,000, not 10001"]),
        (f"seed = 0x{'f' * 9999}", ["seed must be at most 9,0"]),
        (f"dropout = {'9' * 400}", ["dropout must be a number from 0 to 1"]),
        (f"learning_rate = {'9' * 400}", ["learning_rate must be finite, not 999"]),
        (f"seed = {'[' * 60_000}", ["recipe.toml is not valid TOML"]),
        (f"seed = {'9' * 5000}", ["recipe.toml is not valid TOML"]),
        (f"seed{'.a' * 2_000} = 1", ["seed must be a whole number"]),
        ("a = 1" + "#" * 2**16, ["recipe.toml is too long"]),
        ("max_steps = 0", ["max_steps must be a whole number above 0", "0"]),
        ("max_steps = 1.5", ["max_steps must be a whole number", "1.5"]),
        ("max_steps = true", ["max_steps must be a whole number", "True"]),
        ("seed = -1", ["seed must be a whole number, 0 or more", "-1"]),
        ("data = 5", ["data must be text", "5"]),
        ("resume = 1", ["resume must be true or false", "1"]),
        ("n_layer = {a = 1}", ["n_layer must be a whole number"]),
        ("seed = [1]", ["seed must be a whole number, 0 or more, not [1]"]),
        ("run_name = 1979-05-27", ["run_name must be text in quotes, not datetime.date(1979, 5, 27)"]),
        ('data = "a\\u0000"', ["data must be one line of plain text"]),
        ('wandb_project = "a\\nb"', ["wandb_project must be one line"]),
        ("schedule = 'cosinus'", ["schedule must be one of", "wsd", "cosinus"]),
        ("dropout = 1.5", ["dropout must be a number from 0 to 1", "1.5"]),
        ("learning_rate = -1", ["learning_rate must be a number above 0", "-1"]),
        ("dropout = 1", ["dropout", "below 1"]),
        ("beta2 = 1.0", ["beta2", "below 1"]),
        ("min_learning_rate = 0.5", ["min_learning_rate 0.5 is above learning_rate 0.0006"]),
        ("run_name = 'a/b'", ["run_name 'a/b'"]),
        ("run_name = '..'", ["run_name '..'"]),
        ("run_name = ''", ["run_name ''"]),
        ("n_layer 3", ["recipe.toml", "not valid TOML", "line 1"]),
        ("seed = 1\nseed = 2", ["recipe.toml", "not valid TOML"]),
        (b"run_name = 'a\xff'", ["recipe.toml", "UTF-8"]),
    ],
)
def test_a_bad_file_gets_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, wanted: list[str]
) -> None:
    message = refusal([write(tmp_path, content)], capsys)
    assert [part for part in wanted if part not in message] == [], message


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--lerning_rate", "1"], ["lerning_rate", "did you mean learning_rate?"]),
        (["--max_step", "1"], ["max_step", "did you mean max_steps?"]),
        (["--batch-size", "1"], ["batch-size", "did you mean batch_size?"]),
        (["--max_steps", "abc"], ["max_steps must be a whole number", "abc"]),
        (["--max_steps=-3"], ["max_steps must be a whole number above 0", "-3"]),
        (["--max_steps"], ["max_steps"]),
        (["--batch_size", "0"], ['batch_size must be a whole number above 0 or "auto", not 0']),
        (["--batch_size", "aut"], ['batch_size must be a whole number above 0 or "auto", not aut']),
        (["--compile", "perhaps"], ["compile must be true or false", "perhaps"]),
        (["--schedule", "linea"], ["schedule must be one of", "linea"]),
        (["--learning_rate", "fast"], ["learning_rate must be a number", "fast"]),
        (["--max_steps", "-3"], ["max_steps must be a whole number above 0, not -3"]),
        (["--max_steps", "20.0"], ["max_steps must be a whole number above 0, not 20.0"]),
        (["--learning_rate", "-1e-3"], ["--learning_rate"]),
        (["--learning_rate", "nan"], ["learning_rate must be a number above 0, not nan"]),
        (["--grad_clip", "inf"], ["grad_clip must be finite, not inf"]),
        (["--data", "-x"], ["--data"]),
        (["--resume", "0"], ["resume must be true or false, not 0"]),
        (["--resume", "--"], ["--"]),
        (["--run_name", "x" * 300 + "/"], ["run_name"]),
        (["--beta1", "1"], ["beta1", "below 1"]),
        (["stray"], ["stray"]),
        (["--config", str(ROOT / "configs" / "gpt2_124m.toml")], ["no setting config", "first"]),
        ([f"--config={ROOT / 'configs' / 'gpt2_124m.toml'}"], ["no setting config", "first"]),
    ],
)
def test_a_bad_flag_gets_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], wanted: list[str]
) -> None:
    message = refusal([write(tmp_path, ""), *flags], capsys)
    assert [part for part in wanted if part not in message] == [], message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 0}, "max_steps must be a whole number above 0, not 0"),
        ({"max_steps": True}, "max_steps must be a whole number above 0, not True"),
        ({"learning_rate": np.float64(1e-3)}, "learning_rate must be a number above 0, not np.float64(0.001)"),
        ({"schedule": "linea"}, "schedule must be one of cosine, linear, wsd, not linea"),
        ({"data": "a\udcff"}, "data must be one line of plain text, not a\udcff"),
        ({"warmup_steps": 20, "max_steps": 10}, "warmup_steps 20 is more than max_steps 10"),
    ],
)
def test_settings_made_in_python_are_checked_too(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig(**values)
    assert str(caught.value) == message


def test_a_warmup_longer_than_the_run_is_shortened_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "configs" / "gpt2_124m.toml")
    config = parse_config([recipe, "--max_steps", "20"])
    assert (config.max_steps, config.warmup_steps) == (20, 2)
    said = "warmup_steps 190 is longer than the run of 20 steps; shortened to 2\n"
    assert capsys.readouterr() == (said, "")
    assert parse_config([recipe, "--max_steps", "800"]).warmup_steps == 190
    assert capsys.readouterr() == ("", "")


def test_a_run_older_than_a_setting_resumes_under_the_default_only(tmp_path: Path) -> None:
    before = {name: value for name, value in TrainConfig(schedule="wsd").plain().items() if name != "decay_share"}
    assert TrainConfig(schedule="wsd").check_resumable(before, tmp_path) == []
    with pytest.raises(UserError, match=r"decay_share 0.2; now it is decay_share 0.7, .*--decay_share 0.2"):
        TrainConfig(schedule="wsd", decay_share=0.7).check_resumable(before, tmp_path)


def test_resuming_after_a_shortened_warmup_says_which_flag_goes_on(tmp_path: Path) -> None:
    """The same command line is the same run; a longer one would warm up for longer, so its warm-up must be given."""
    before = parse_config(["--max_steps", "20"])
    assert parse_config(["--max_steps", "20", "--resume"]).check_resumable(before.plain(), tmp_path) == []
    longer = ["--max_steps", "1000", "--resume"]
    with pytest.raises(UserError, match=r"warmup_steps 2; now it is warmup_steps 50, .*--warmup_steps 2"):
        parse_config(longer).check_resumable(before.plain(), tmp_path)
    notes = parse_config([*longer, "--warmup_steps", "2"]).check_resumable(before.plain(), tmp_path)
    assert notes[0] == "max_steps was 20, is now 1000"


@pytest.mark.parametrize(
    ("rank", "world_size", "spoken"),
    [("0", "2", True), ("1", "2", False), ("1", None, True), ("1", "1", True), ("", "", True), ("x", "2", True)],
)
def test_one_process_of_a_group_speaks(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str,
    world_size: str | None,
    spoken: bool,
) -> None:
    """RANK may also be another launcher's, or empty: then there is no group, and this process speaks."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    parse_config(["--max_steps", "20"])
    with pytest.raises(SystemExit):
        parse_config(["--max_steps", "0"])
    out, err = capsys.readouterr()
    assert (bool(out), bool(err)) == (spoken, spoken)


def test_a_missing_file_is_named_with_the_nearest_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal([str(tmp_path / "gpt2_142m.toml")], capsys)
    assert "no config file" in message and "gpt2_142m.toml" in message and "did you mean gpt2_124m.toml?" in message
    assert str(tmp_path) in refusal([str(tmp_path)], capsys)


def test_the_command_line_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, ROOT / "train.py", "--lerning_rate", "1"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1 and "did you mean learning_rate?" in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_read_as_written(path: Path) -> None:
    """As plain values: any other type would go into optimizer state, which checkpoints refuse to load again."""
    defaults = {name: getattr(TrainConfig, name) for name in FIELDS}
    config = parse_config([str(path)])
    flagged = parse_config([str(path), *(f"--{name}={value}" for name, value in defaults.items())])
    assert flagged == TrainConfig()
    for values in (config.plain(), flagged.plain()):
        assert [type(value) for value in values.values()] == [type(value) for value in defaults.values()]
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    assert {name: getattr(config, name) for name in written} == written


def test_help_shows_every_setting_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    shown = "".join(capsys.readouterr().out.split())  # argparse breaks lines, at hyphens too
    body = ast.parse(inspect.getsource(TrainConfig)).body[0].body
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text, ast.Expr), f"{field.target.id} has no text"
            assert f"--{field.target.id}" in shown
            assert "".join(text.value.value.split()) in shown
    assert [field.target.id for field in body if isinstance(field, ast.AnnAssign)] == FIELDS


TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12)


@st.composite
def configs(draw: st.DrawFn) -> TrainConfig:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        if isinstance(field.default, bool):
            values[field.name] = draw(st.booleans())
        elif isinstance(field.default, int):
            values[field.name] = draw(st.integers(1, 10**9))
        elif isinstance(field.default, float):
            values[field.name] = draw(st.floats(0, 1, exclude_min=True, exclude_max=True))
    values["warmup_steps"] = draw(st.integers(0, values["max_steps"]))
    values["min_learning_rate"] = values["learning_rate"] * draw(st.floats(0, 1))
    values["schedule"] = draw(st.sampled_from(["cosine", "linear", "wsd"]))
    values["dtype"] = draw(st.sampled_from(["auto", "float32", "bfloat16", "float16"]))
    values |= {name: draw(TEXT) for name in ("data", "init_from", "wandb_project")}
    values |= {"n_layer": draw(st.integers(0, 10_000)), "batch_size": draw(st.integers(1, 2**53) | st.just("auto"))}
    values["run_name"] = draw(TEXT.filter(lambda name: name == Path(name).name and name not in ("", "..")))
    return TrainConfig(**values)


@given(config=configs())
@example(TrainConfig())
@example(TrainConfig(data='C:\\data\\"mine"', run_name="läuft \U0001f680", init_from="a\xa0b\u3000c\ufeff"))
@example(TrainConfig(learning_rate=1e22, min_learning_rate=1e-300, grad_clip=5e-324))
@settings(max_examples=50)
def test_saved_settings_are_read_back_the_same(tmp_path_factory: pytest.TempPathFactory, config: TrainConfig) -> None:
    path = tmp_path_factory.mktemp("run") / "config.toml"
    config.save(path, ["Python 3, torch 2", "commit unknown"])
    assert parse_config([str(path)]) == config
    saved = path.read_text(encoding="utf-8")
    assert saved.startswith("# Python 3, torch 2\n# commit unknown\n")
    assert set(tomllib.loads(saved)) == set(FIELDS)


@pytest.mark.parametrize("name", [name for name in FIELDS if isinstance(getattr(TrainConfig, name), float)])
def test_no_setting_may_be_infinite(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert name in refusal([write(tmp_path, f"{name} = inf")], capsys)
    assert name in refusal([write(tmp_path, f"{name} = nan")], capsys)
