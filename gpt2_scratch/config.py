"""The settings of a training run: one flat dataclass, read from a TOML file and command-line flags."""

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


def count_or(word: str, least: int, wanted: str) -> Rule:
    return Rule(wanted, lambda n: n == word or (type(n) is int and least <= n <= 2**53))


def is_one_line(text: str) -> bool:
    """No control characters, line breaks or lone surrogates, which paths, messages or UTF-8 cannot hold."""
    return not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, text))


LARGEST = at_most(2**53)  # exact as a float too
FINITE = Rule("finite", lambda x: abs(x) <= sys.float_info.max)
PositiveInt = Annotated[int, Rule("a whole number above 0", lambda n: n > 0), LARGEST]
NonNegativeInt = Annotated[int, Rule("a whole number, 0 or more", lambda n: n >= 0), LARGEST]
PositiveFloat = Annotated[float, Rule("a number above 0", lambda x: x > 0), FINITE]
NonNegativeFloat = Annotated[float, Rule("a number, 0 or more", lambda x: x >= 0), FINITE]
Fraction = Annotated[float, Rule("a number from 0 to 1 (below 1)", lambda x: 0 <= x < 1)]
Share = Annotated[float, Rule("a number above 0, at most 1", lambda x: 0 < x <= 1)]
Text = Annotated[str, Rule("text in quotes", lambda _: True), Rule("one line of plain text", is_one_line)]
Bool = Annotated[bool, Rule("true or false", lambda _: True)]
Passages = Annotated[int | str, count_or("eval", 0, 'a whole number, 0 or more, or "eval"')]
Batch = Annotated[int | str, count_or("auto", 1, 'a whole number above 0 or "auto"')]


@dataclass(frozen=True)
class TrainConfig:
    """The settings. The defaults are those of GPT-2 124M."""

    data: Text = "data/shakespeare"
    """Folder of token shards, made by prepare_data.py."""
    run_name: Text = "run"
    """The run is written to out/<run_name>/."""
    init_from: Text = "scratch"
    """"scratch", or a Hugging Face name ("gpt2") or local folder whose weights to start from."""
    resume: Bool = False
    """Continue the run from its newest checkpoint."""
    seed: NonNegativeInt = 1337
    """Seed of the initial weights, dropout and the data order."""

    n_layer: Annotated[NonNegativeInt, at_most(10_000)] = 0
    """Blocks; 0: 12, or those of the loaded weights."""
    n_head: NonNegativeInt = 0
    """Attention heads; 0: 12, or those of the loaded weights."""
    n_embd: NonNegativeInt = 0
    """Width of the residual stream; 0: 768, or that of the loaded weights."""
    block_size: NonNegativeInt = 0
    """Context length, tokens; 0: 1024, or that of the loaded weights, which may be cropped."""
    dropout: Fraction = 0.0
    """Dropout probability."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of initial weights; GPT-2's 0.02 suits widths of 768 and more."""

    batch_size: Batch = 16
    """Sequences per process and micro-step, at most; "auto": as many as fit the GPU's memory."""
    total_batch_size: PositiveInt = 524288
    """Tokens per step over all processes; determines the gradient accumulation steps."""
    max_steps: PositiveInt = 19073
    """Optimizer steps of the whole run."""
    learning_rate: PositiveFloat = 6e-4
    """Peak learning rate, after the warm-up."""
    min_learning_rate: NonNegativeFloat = 6e-5
    """Learning rate at max_steps."""
    warmup_steps: NonNegativeInt = 715
    """Steps over which the learning rate rises to its peak."""
    schedule: Annotated[str, one_of("cosine", "linear", "wsd")] = "cosine"
    """How the learning rate decays after the warm-up; wsd: constant, then linear over decay_share of the run."""
    decay_share: Share = 0.2
    """With wsd, the share of the run over which the learning rate decays."""
    optimizer: Annotated[str, one_of("adamw", "muon")] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of matrices and embeddings."""
    beta1: Fraction = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: Fraction = 0.95
    """AdamW's decay rate of the second moment."""
    momentum: Fraction = 0.95
    """Muon's decay rate of the averaged gradient."""
    embedding_lr_scale: PositiveFloat = 1.0
    """With muon, the learning rate of token and position embeddings, as a multiple of the matrices'."""
    split_qkv: Bool = False
    """With muon, orthogonalize the query, key and value matrices separately, not as one."""
    grad_clip: NonNegativeFloat = 1.0
    """Clip the gradient to this norm; 0: no clipping."""

    eval_interval: NonNegativeInt = 250
    """Steps between evaluations; 0: only at the end."""
    eval_tokens: NonNegativeInt = 0
    """Validation tokens per evaluation, always the same ones; 0: all."""
    sample_interval: Passages = "eval"
    """Steps between short passages that the model writes while training; "eval": at evaluations; 0: none."""
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
    """Of matrix products; auto: the fastest that trains well on the device, measured on a CPU; a run keeps it."""
    compile: Bool = True
    """Compile the model with torch.compile; where no compiler works, a warning and eager."""
    activation_checkpointing: Bool = False
    """Keep each block's input only and compute the rest again in the backward pass: less memory, a third more work."""
    parallel: Annotated[str, one_of("ddp", "zero2", "fsdp")] = "ddp"
    """What is sharded over processes; ddp: nothing; zero2: optimizer state and gradients; fsdp: weights as well."""
    reduce_dtype: Annotated[str, one_of("float32", "bfloat16")] = "float32"
    """Dtype of gradients on the wire; bfloat16 halves the traffic and rounds them, with zero2 and fsdp at every
    micro-step."""
    verify_data: Bool = True
    """Check the SHA-256 of every shard at the start; sizes are always checked."""
    timeout: Annotated[PositiveInt, at_most(10**9)] = 600
    """Seconds that a process waits for the others before giving up."""
    max_bad_steps: PositiveInt = 20
    """End the run after this many consecutive steps with a non-finite loss or gradient, each of them skipped."""

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
        """The settings as a dict of plain values, for JSON, TOML and checkpoints."""
        return dataclasses.asdict(self)

    def decisive(self) -> dict[str, Any]:
        """The settings that must be equal on all ranks."""
        own = MAY_DIFFER - ({"batch_size"} if self.parallel != "ddp" else set())  # sharded ranks step together
        return {name: value for name, value in self.plain().items() if name not in own}

    def check_resumable(self, before: dict[str, Any], run: Path) -> list[str]:
        """The settings that a resumed run changes, one sentence each.

        Args:
            before: its settings so far.

        Raises:
            UserError: a change would make it another run.
        """
        now = self.plain()
        before = {name: field.default for name, field in FIELDS.items()} | before  # an old run lacks newer settings
        if self.dtype == "auto":  # keeps the run's
            now["dtype"] = before["dtype"]
        changed = [name for name in now if before[name] != now[name]]
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
        """Write every setting to a config file for train.py, below notes as comments."""
        comments = "".join(f"# {note}\n" for note in notes)
        # For such values JSON and TOML are the same.
        values = "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in self.plain().items())
        partial = path.with_name(f".{path.name}")
        partial.write_text(comments + values, encoding="utf-8")
        os.replace(partial, path)


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
# May differ between ranks: data and weights are compared by content.
MAY_DIFFER = {"data", "init_from", "hellaswag_data", "batch_size", "device", "verify_data"}
# May change on --resume: these affect only rounding, if anything, except max_steps, which moves the schedule.
CHANGEABLE = {
    *("data", "run_name", "resume", "batch_size", "max_steps", "device", "dtype", "compile", "parallel", "verify_data"),
    *("timeout", "max_bad_steps", "eval_interval", "eval_tokens", "checkpoint_interval", "keep_checkpoints"),
    *(
        "log_interval",
        "sample_interval",
        "wandb_project",
        "eval_hellaswag",
        "hellaswag_data",
        "activation_checkpointing",
    ),
}


def parse_config(argv: list[str]) -> TrainConfig:
    """The settings of `train.py [CONFIG.toml] [--key value ...]`; flags override the file.

    A warm-up longer than the run is shortened to a tenth of it, so that `--max_steps 20` tries out any recipe. Bad
    usage prints one sentence on rank 0 and exits with code 2.
    """
    file, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (str(DEFAULT_CONFIG), argv)
    try:
        from_flags = read_flags(flags)
        given = read_file(Path(file)) | from_flags
        values: dict[str, Any] = {
            name: checked(field, given.get(name, field.default)) for name, field in FIELDS.items()
        }
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
    """The settings given by flags, unchecked."""
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
        rules = rules_of(field)
        text = f"{texts[name]} [{rules[0].wanted}; default: {json.dumps(field.default)}]".replace("%", "%%")
        # --resume means --resume true
        bare: dict[str, Any] = {"nargs": "?", "const": "true"} if types_of(field) == (bool,) else {}
        parser.add_argument(f"--{name}", help=text, metavar="VALUE", **bare)
    try:
        known, unknown = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if unknown:
        raise no_setting(unknown[0].removeprefix("--").partition("=")[0] or unknown[0])
    return {name: from_text(FIELDS[name], text) for name, text in vars(known).items()}


def read_file(path: Path) -> dict[str, Any]:
    """The settings given by a config file, unchecked."""
    if not os.path.isfile(path):
        recipes = [path.name for path in DEFAULT_CONFIG.parent.glob("*.toml")]
        raise UserError(f"there is no config file {path}{nearest(path.name, recipes)}")
    if path.stat().st_size > 2**16:
        raise UserError(f"{path} is too long for a config file")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8") from error
    except (ValueError, RecursionError) as error:  # also for huge numbers and deep nesting
        raise UserError(f"{path} is not valid TOML: {error}") from error
    for name, value in given.items():
        if name not in FIELDS:
            while isinstance(value, dict) and value:  # a setting in a [table]: name it whole
                key, value = next(iter(value.items()))
                name = f"{name}.{key}"
            raise no_setting(name)
    return given


def help_texts() -> dict[str, str]:
    """The docstring of each setting of TrainConfig."""
    definition: Any = ast.parse(inspect.getsource(TrainConfig)).body[0]
    pairs: Any = itertools.pairwise(definition.body)
    return {field.target.id: text.value.value for field, text in pairs if hasattr(field, "annotation")}


def types_of(field: dataclasses.Field) -> tuple[type, ...]:
    """The types that a setting accepts."""
    kind = get_args(field.type)[0]
    return (int, float) if kind is float else get_args(kind) or (kind,)


def rules_of(field: dataclasses.Field) -> tuple["Rule", ...]:
    return get_args(field.type)[1:]


def from_text(field: dataclasses.Field, text: str) -> Any:
    """A flag's text, converted to the first of the setting's types that accepts it."""
    readers: dict[type, Callable[[str], Any]] = {bool: lambda text: {"true": True, "false": False}[text.lower()]}
    for kind in types_of(field):
        with suppress(ValueError, KeyError):
            return readers.get(kind, kind)(text)
    return text


def checked(field: dataclasses.Field, value: Any) -> int | float | str | bool:
    """A setting's value, converted to float if it must be one.

    Raises:
        UserError: it has the wrong type or breaks a rule.
    """
    fits = type(value) in types_of(field)
    for rule in rules_of(field):
        if not fits or not rule.holds(value):
            raise UserError(f"{field.name} must be {rule.wanted}, not {shown(field, value)}")
    return float(value) if float in types_of(field) else value


def shown(field: dataclasses.Field, value: Any) -> str:
    """A rejected value, shortened; quoted only if the quotes are the mistake: max_steps = "20"."""
    if value and isinstance(value, str) and from_text(field, value) == value:
        return value if len(value) <= 60 else f"{value[:57]}..."
    if isinstance(value, int) and value.bit_length() > 10_000:
        return "a number of thousands of digits"  # Python refuses to print it
    return reprlib.repr(value)


def no_setting(name: str) -> UserError:
    hint = "; name the config file first, without a flag" if name == "config" else nearest(name, list(FIELDS))
    return UserError(f"there is no setting {name[:60]}{hint} (train.py --help lists them)")


def is_first_process() -> bool:
    """Whether this is rank 0. A RANK without a WORLD_SIZE was left over by another launcher."""
    try:
        return int(os.environ["WORLD_SIZE"]) <= 1 or int(os.environ["RANK"]) <= 0
    except (KeyError, ValueError):
        return True
