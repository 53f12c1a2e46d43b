"""The settings of a training run: one flat dataclass, read from a TOML file and the command line."""

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import os
import reprlib
import sys
import tomllib
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

from gpt2_scratch.cli import UserError, nearest

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "shakespeare.toml"


class Rule(NamedTuple):
    """A condition on a setting's value. The first rule of a setting also describes its type."""

    wanted: str  # completes "max_steps must be ..."
    holds: Callable[[Any], bool]


def at_most(most: int) -> Rule:
    return Rule(f"at most {most:,}", lambda n: n <= most)


def one_of(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda text: text in choices)


def is_one_line(text: str) -> bool:
    """No control characters, line breaks or lone surrogates, which a path, a message or UTF-8 could not hold."""
    return not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, text))


LARGEST = at_most(2**53)  # exact as a float too
FINITE = Rule("finite", lambda x: abs(x) <= sys.float_info.max)
PositiveInt = Annotated[int, Rule("a whole number above 0", lambda n: n > 0), LARGEST]
NonNegativeInt = Annotated[int, Rule("a whole number, 0 or more", lambda n: n >= 0), LARGEST]
PositiveFloat = Annotated[float, Rule("a number above 0", lambda x: x > 0), FINITE]
NonNegativeFloat = Annotated[float, Rule("a number, 0 or more", lambda x: x >= 0), FINITE]
Fraction = Annotated[float, Rule("a number from 0 to 1 (below 1)", lambda x: 0 <= x < 1)]
Text = Annotated[str, Rule("text in quotes", lambda _: True), Rule("one line of plain text", is_one_line)]
Bool = Annotated[bool, Rule("true or false", lambda _: True)]
Batch = Annotated[
    int | str, Rule('a whole number above 0 or "auto"', lambda n: n == "auto" or (type(n) is int and 0 < n <= 2**53))
]


@dataclass(frozen=True)
class TrainConfig:
    """Settings; without a config file or flag each has the default shown, that of GPT-2 124M."""

    data: Text = "data/shakespeare"
    """Folder of token shards, made by prepare_data.py."""
    run_name: Text = "run"
    """The run is written to out/<run_name>/."""
    init_from: Text = "scratch"
    """"scratch", or a Hugging Face name ("gpt2") or local folder whose weights to start from."""
    resume: Bool = False
    """Continue the run from its newest checkpoint."""
    seed: NonNegativeInt = 1337
    """Of initial weights, dropout and the order of the data."""

    n_layer: Annotated[NonNegativeInt, at_most(10_000)] = 0
    """Blocks; 0: 12, or as loaded."""
    n_head: NonNegativeInt = 0
    """Attention heads; 0: 12, or as loaded."""
    n_embd: NonNegativeInt = 0
    """Width, channels; 0: 768, or as loaded."""
    block_size: NonNegativeInt = 0
    """Context, tokens; 0: 1024, or as loaded. Loaded weights can be cut shorter."""
    dropout: Fraction = 0.0
    """Share of activations dropped in training."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of fresh weights; GPT-2's 0.02 suits widths of 768 and more."""

    batch_size: Batch = 16
    """Windows of block_size tokens per process and micro-step, at most; "auto": what fits the GPU's memory."""
    total_batch_size: PositiveInt = 524288
    """Tokens per step over all processes; the accumulation steps follow from it."""
    max_steps: PositiveInt = 19073
    """Optimizer steps of the whole run."""
    learning_rate: PositiveFloat = 6e-4
    """Peak learning rate, after the warm-up."""
    min_learning_rate: NonNegativeFloat = 6e-5
    """Learning rate at the end."""
    warmup_steps: NonNegativeInt = 715
    """Steps over which the learning rate rises to its peak."""
    schedule: Annotated[str, one_of("cosine", "linear", "wsd")] = "cosine"
    """How it falls after that; wsd: level, then linear over the last fifth of the run."""
    optimizer: Annotated[str, one_of("adamw", "muon")] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest."""
    weight_decay: NonNegativeFloat = 0.1
    """Of matrices, embeddings among them."""
    beta1: Fraction = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: Fraction = 0.95
    """AdamW's decay of the mean of squared gradients."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest gradient norm; 0: no clipping."""

    eval_interval: NonNegativeInt = 250
    """Steps between evaluations; 0: only at the end."""
    eval_tokens: NonNegativeInt = 0
    """Validation tokens per evaluation, always the same ones; 0: all."""
    eval_hellaswag: NonNegativeInt = 0
    """HellaSwag examples scored at each evaluation, evenly spread; 10042: all; 0: none."""
    hellaswag_data: Text = ""
    """File of HellaSwag's validation set (.jsonl or .parquet); empty: from the Hugging Face hub."""
    checkpoint_interval: NonNegativeInt = 1000
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept, the newest ones."""
    log_interval: NonNegativeInt = 10
    """Steps between lines of metrics; 0: only at the end."""
    wandb_project: Text = ""
    """Weights & Biases project to send metrics to; empty: none."""

    device: Text = "auto"
    """"auto" (CUDA, MPS or CPU, the first there is), "cpu", "cuda", "cuda:1" or "mps"."""
    dtype: Annotated[str, one_of("auto", "float32", "bfloat16", "float16")] = "auto"
    """Of matrix products; auto: the fastest that trains well on the device."""
    compile: Bool = True
    """Compile the model with torch.compile; where no compiler works, a warning and eager."""
    activation_checkpointing: Bool = False
    """Keep each block's input only and compute the rest again in the backward pass: less memory, a third more work."""
    parallel: Annotated[str, one_of("ddp", "zero2", "fsdp")] = "ddp"
    """What several processes share of the model; zero2: optimizer state and gradients; fsdp: weights too."""
    reduce_dtype: Annotated[str, one_of("float32", "bfloat16")] = "float32"
    """Of gradients on their way between processes; bfloat16 halves the traffic and rounds them, with zero2 and fsdp at
    every micro-step."""
    verify_data: Bool = True
    """Check the SHA-256 of every shard at the start; sizes are checked always."""
    timeout: Annotated[PositiveInt, at_most(10**9)] = 600
    """Seconds that a process waits for the others before it gives up."""
    max_bad_steps: PositiveInt = 20
    """Steps in a row with a non-finite loss or gradient, each left out, after which the run ends."""

    def __post_init__(self) -> None:
        for name, field in FIELDS.items():
            object.__setattr__(self, name, checked(field, getattr(self, name)))
        if Path(self.run_name).name != self.run_name or self.run_name in ("", ".", ".."):
            raise UserError(f"run_name {self.run_name!r} must be a plain folder name")
        if self.warmup_steps > self.max_steps:
            raise UserError(f"warmup_steps {self.warmup_steps} is more than max_steps {self.max_steps}")
        if self.min_learning_rate > self.learning_rate:
            raise UserError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")

    def plain(self) -> dict[str, Any]:
        """The settings by name, as JSON, TOML and checkpoints hold them."""
        return dataclasses.asdict(self)

    def decisive(self) -> dict[str, Any]:
        """The settings that must be the same in all processes of a group."""
        own = MAY_DIFFER - ({"batch_size"} if self.parallel != "ddp" else set())  # in shares, micro-steps are common
        return {name: value for name, value in self.plain().items() if name not in own}

    def check_resumable(self, before: dict[str, Any], run: Path) -> list[str]:
        """What a resumed run changes of its settings, a sentence each.

        Args:
            before: the settings that it had.

        Raises:
            UserError: a change would make it another run.
        """
        now = self.plain()
        changed = [name for name in now if name in before and before[name] != now[name]]
        if fixed := [name for name in changed if name not in CHANGEABLE]:
            was, is_now = (", ".join(f"{name} {values[name]!r}" for name in fixed) for values in (before, now))
            flag = f"--{fixed[0]} {json.dumps(before[fixed[0]])}"
            raise UserError(
                f"{run} was made with {was}; now it is {is_now}, which would be another run: resume with what it had "
                f"({flag if len(fixed) == 1 else run / 'config.toml'}), or begin one with --run_name NAME"
            )
        notes = [f"{name} was {before[name]!r}, is now {now[name]!r}" for name in changed if name != "resume"]
        if "max_steps" in changed:
            notes.append(f"the {self.schedule} schedule now ends at step {self.max_steps}")
        return notes

    def save(self, path: Path, notes: list[str]) -> None:
        """Write every setting as a config file that train.py reads, under notes as comments."""
        comments = "".join(f"# {note}\n" for note in notes)
        # JSON writes such values as TOML does.
        values = "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in self.plain().items())
        partial = path.with_name(f".{path.name}")
        partial.write_text(comments + values, encoding="utf-8")
        os.replace(partial, path)


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
# Processes may have these each of their own: data and weights are compared by what they hold.
MAY_DIFFER = {"data", "init_from", "hellaswag_data", "batch_size", "device", "verify_data"}
# A resumed run may change these: they say where and how often, not what is computed.
CHANGEABLE = {
    *("data", "run_name", "resume", "batch_size", "max_steps", "device", "compile", "parallel", "verify_data"),
    *("timeout", "max_bad_steps", "eval_interval", "eval_tokens", "checkpoint_interval", "keep_checkpoints"),
    *("log_interval", "wandb_project", "eval_hellaswag", "hellaswag_data", "activation_checkpointing"),
}


def parse_config(argv: list[str]) -> TrainConfig:
    """The settings of `train.py [CONFIG.toml] [--key value ...]`; a flag overrides the file.

    A warm-up longer than the run is shortened to a tenth of it, so that `--max_steps 20` tries any recipe. Bad usage
    prints one sentence, in the first process, and exits with code 2.
    """
    file, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (str(DEFAULT_CONFIG), argv)
    try:
        from_flags = read_flags(flags)
        given = read_file(Path(file)) | from_flags
        values = {name: checked(field, given.get(name, field.default)) for name, field in FIELDS.items()}
        warmup, steps = values["warmup_steps"], values["max_steps"]
        values["warmup_steps"] = warmup if warmup <= steps else steps // 10
        config = TrainConfig(**values)
    except (UserError, OSError) as error:
        if is_first_process():
            print("error:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
    if warmup > steps and is_first_process():
        print(
            f"warmup_steps {warmup} is longer than the run of {steps} steps; shortened to {config.warmup_steps}",
            flush=True,
        )
    return config


def read_flags(flags: list[str]) -> dict[str, Any]:
    """The settings that flags give, unchecked."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="%(prog)s [CONFIG.toml] [--key value ...]",
        description=f"Train a GPT. Without CONFIG.toml: configs/{DEFAULT_CONFIG.name}.",
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
        allow_abbrev=False,
    )
    texts = help_texts()
    for name, field in FIELDS.items():
        rules = field.type.__metadata__
        text = f"{texts[name]} [{rules[0].wanted}; default: {json.dumps(field.default)}]".replace("%", "%%")
        bare = {"nargs": "?", "const": "true"} if types_of(field) == (bool,) else {}  # --resume means --resume true
        parser.add_argument(f"--{name}", help=text, metavar="VALUE", **bare)
    try:
        known, unknown = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if unknown:
        raise no_setting(unknown[0].removeprefix("--").partition("=")[0] or unknown[0])
    return {name: from_text(FIELDS[name], text) for name, text in vars(known).items()}


def read_file(path: Path) -> dict[str, Any]:
    """The settings that a config file gives, unchecked."""
    if not os.path.isfile(path):
        recipes = [path.name for path in DEFAULT_CONFIG.parent.glob("*.toml")]
        raise UserError(f"there is no config file {path}{nearest(path.name, recipes)}")
    if path.stat().st_size > 2**16:
        raise UserError(f"{path} is too long for a config file")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8") from error
    except (ValueError, RecursionError) as error:  # of bad TOML, a number of 5,000 digits, brackets as deep
        raise UserError(f"{path} is not valid TOML: {error}") from error
    for name, value in given.items():
        if name not in FIELDS:
            while isinstance(value, dict) and value:  # a setting in a [table]: name it whole
                key, value = next(iter(value.items()))
                name = f"{name}.{key}"
            raise no_setting(name)
    return given


def help_texts() -> dict[str, str]:
    """The text under each setting of TrainConfig."""
    body = ast.parse(inspect.getsource(TrainConfig)).body[0].body
    pairs = itertools.pairwise(body)
    return {field.target.id: text.value.value for field, text in pairs if isinstance(field, ast.AnnAssign)}


def types_of(field: dataclasses.Field) -> tuple[type, ...]:
    """The types of values that a setting takes."""
    kind = field.type.__origin__
    return (int, float) if kind is float else get_args(kind) or (kind,)


def from_text(field: dataclasses.Field, text: str) -> Any:
    """A flag's text as the first of the setting's types that it can be, else as it is."""
    readers = {bool: lambda text: {"true": True, "false": False}[text.lower()]}
    for kind in types_of(field):
        with suppress(ValueError, KeyError):
            return readers.get(kind, kind)(text)
    return text


def checked(field: dataclasses.Field, value: Any) -> int | float | str | bool:
    """A setting's value, as a float where it must be one.

    Raises:
        UserError: it is of another type or breaks a rule.
    """
    fits = type(value) in types_of(field)
    for rule in field.type.__metadata__:
        if not fits or not rule.holds(value):
            raise UserError(f"{field.name} must be {rule.wanted}, not {shown(field, value)}")
    return float(value) if field.type.__origin__ is float else value


def shown(field: dataclasses.Field, value: Any) -> str:
    """A refused value, cut short; text in quotes only where these are what is wrong: max_steps = "20"."""
    if value and isinstance(value, str) and from_text(field, value) == value:
        return value if len(value) <= 60 else f"{value[:57]}..."
    if isinstance(value, int) and value.bit_length() > 10_000:
        return "a number of thousands of digits"  # which Python would not print
    return reprlib.repr(value)


def no_setting(name: str) -> UserError:
    hint = "; name the config file first, without a flag" if name == "config" else nearest(name, list(FIELDS))
    return UserError(f"there is no setting {name[:60]}{hint} (train.py --help lists them)")


def is_first_process() -> bool:
    """Whether this process speaks for all. A RANK without a group of processes is another launcher's."""
    try:
        return int(os.environ["WORLD_SIZE"]) <= 1 or int(os.environ["RANK"]) <= 0
    except (KeyError, ValueError):
        return True
