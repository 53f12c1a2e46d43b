"""The settings of a training run: one flat dataclass, read from a TOML file and the command line."""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cli import UserError, nearest

DEFAULT_CONFIG = Path(__file__).with_name("configs") / "shakespeare.toml"


@dataclass(frozen=True)
class TrainConfig:
    """Settings; without a config file or flag each has the default shown, that of GPT-2 124M."""

    data: str = "data/shakespeare"
    """Folder of token shards, made by prepare_data.py."""
    run_name: str = "run"
    """The run is written to out/<run_name>/."""
    init_from: str = "scratch"
    """"scratch", or a Hugging Face name ("gpt2") or local folder whose weights to start from."""
    resume: bool = False
    """Continue the run from its newest checkpoint."""
    seed: NonNegativeInt = 1337
    """Of initial weights, dropout and the order of the data."""

    n_layer: NonNegativeInt = 0
    """Blocks; 0: 12, or as loaded."""
    n_head: NonNegativeInt = 0
    """Attention heads; 0: 12, or as loaded."""
    n_embd: NonNegativeInt = 0
    """Width, channels; 0: 768, or as loaded."""
    block_size: NonNegativeInt = 0
    """Context, tokens; 0: 1024, or as loaded. Loaded weights can be cut shorter."""
    dropout: ClosedUnitInterval = 0.0
    """Share of activations dropped in training."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of fresh weights; GPT-2's 0.02 suits widths of 768 and more."""

    batch_size: PositiveInt | Literal["auto"] = 16
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
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """How it falls after that; wsd: level, then linear over the last fifth of the run."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, AdamW for the rest."""
    weight_decay: NonNegativeFloat = 0.1
    """Of matrices, embeddings among them."""
    beta1: ClosedUnitInterval = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: ClosedUnitInterval = 0.95
    """AdamW's decay of the mean of squared gradients."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest gradient norm; 0: no clipping."""

    eval_interval: NonNegativeInt = 250
    """Steps between evaluations; 0: only at the end."""
    eval_tokens: NonNegativeInt = 0
    """Validation tokens per evaluation, always the same ones; 0: all."""
    eval_hellaswag: NonNegativeInt = 0
    """HellaSwag examples scored at each evaluation, evenly spread; 10042: all; 0: none."""
    hellaswag_data: str = ""
    """File of HellaSwag's validation set (.jsonl or .parquet); empty: from the Hugging Face hub."""
    checkpoint_interval: NonNegativeInt = 1000
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept, the newest ones."""
    log_interval: NonNegativeInt = 10
    """Steps between lines of metrics; 0: only at the end."""
    wandb_project: str = ""
    """Weights & Biases project to send metrics to; empty: none."""

    device: str = "auto"
    """"auto" (CUDA, MPS or CPU, the first there is), "cpu", "cuda", "cuda:1" or "mps"."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of matrix products; auto: the fastest that trains well on the device."""
    compile: bool = True
    """Compile the model with torch.compile; where no compiler works, a warning and eager."""
    activation_checkpointing: bool = False
    """Keep each block's input only and compute the rest again in the backward pass: less memory, a third more work."""
    parallel: Literal["ddp", "zero2", "fsdp"] = "ddp"
    """What several processes share of the model; zero2: optimizer state and gradients; fsdp: weights too."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of gradients on their way between processes; bfloat16 halves the traffic and rounds them, with zero2 and fsdp at
    every micro-step."""
    verify_data: bool = True
    """Check the SHA-256 of every shard at the start; sizes are checked always."""
    timeout: PositiveInt = 600
    """Seconds that a process waits for the others before it gives up."""
    max_bad_steps: PositiveInt = 20
    """Steps in a row with a non-finite loss or gradient, each left out, after which the run ends."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name} must be a finite number, not {value}")
        if huge := [
            name for name, value in dataclasses.asdict(self).items() if isinstance(value, int) and value > 2**53
        ]:
            raise UserError(f"{' and '.join(huge)} must be at most 2**53")
        if self.dropout == 1 or self.beta1 == 1 or self.beta2 == 1:
            raise UserError("dropout, beta1 and beta2 must be below 1")
        if Path(self.run_name).name != self.run_name or self.run_name in ("", ".", ".."):
            raise UserError(f"run_name {self.run_name!r} must be a plain folder name")
        if self.warmup_steps > self.max_steps:
            raise UserError(f"warmup_steps {self.warmup_steps} is more than max_steps {self.max_steps}")
        if self.min_learning_rate > self.learning_rate:
            raise UserError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")

    def plain(self) -> dict[str, Any]:
        """The settings as plain values; jsonargparse gives its own kinds of number."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def check_resumable(self, before: dict[str, Any], run: Path) -> list[str]:
        """What a resumed run changes of its settings, a sentence each.

        Args:
            before: the settings that it had.

        Raises:
            ValueError: a change would make it another run.
        """
        now = self.plain()
        changed = [name for name in now if name in before and before[name] != now[name]]
        if fixed := [name for name in changed if name not in CHANGEABLE]:
            was, is_now = (", ".join(f"{name} {values[name]!r}" for name in fixed) for values in (before, now))
            raise UserError(
                f"{run} was made with {was}; now it is {is_now}, which would be another run: resume with what it had "
                f"({run / 'config.toml'}), or begin one with --run_name NAME"
            )
        notes = [f"{name} was {before[name]!r}, is now {now[name]!r}" for name in changed if name != "resume"]
        if "max_steps" in changed:
            notes.append(f"the {self.schedule} schedule now ends at step {self.max_steps}")
        return notes

    def save(self, path: Path, notes: list[str]) -> None:
        """Write every setting as a config file that train.py reads, under notes as comments."""
        comments = "".join(f"# {note}\n" for note in notes)
        # Plain JSON values are TOML values, but for surrogate escapes and a bare DEL.
        pairs = [(name, json.dumps(value, ensure_ascii=False)) for name, value in dataclasses.asdict(self).items()]
        values = "".join(f"{name} = {value}\n" for name, value in pairs).replace("\x7f", "\\u007f")
        partial = path.with_name(f".{path.name}")
        partial.write_text(comments + values, encoding="utf-8")
        os.replace(partial, path)


def parse_config(argv: list[str]) -> TrainConfig:
    """The settings of `train.py [CONFIG.toml] [--key value ...]`; a flag overrides the file.

    Bad usage prints one sentence, in the first process, and exits with code 2.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="train.py",
        usage="%(prog)s [CONFIG.toml] [--key value ...]",
        description=f"Train a GPT. Without CONFIG.toml: configs/{DEFAULT_CONFIG.name}.",
        parser_mode="toml",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help=argparse.SUPPRESS)
    parser.add_class_arguments(TrainConfig)
    file, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (str(DEFAULT_CONFIG), argv)
    for i, flag in enumerate(flags):  # --resume alone means --resume true
        if flag in SWITCHES and (i + 1 == len(flags) or flags[i + 1].startswith("-")):
            flags = [*flags[:i], f"{flag}=true", *flags[i + 1 :]]
    try:
        if not Path(file).is_file():
            recipes = [path.name for path in DEFAULT_CONFIG.parent.glob("*.toml")]
            raise UserError(f"there is no config file {file}{nearest(Path(file).name, recipes)}")
        if Path(file).stat().st_size > 2**16:
            raise UserError(f"{file} is too long for a config file")
        try:
            in_file = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{file} is not valid TOML: {error}") from error
        if "config" in in_file or any(flag.partition("=")[0] == "--config" for flag in flags):
            raise UserError("there is no setting config; name the config file first, without a flag")
        if any(len(str(value)) > 4096 for value in [*flags, *in_file.values()]):
            raise UserError("a value of more than 4096 characters is no setting")  # brackets could crash the parser
        values = parser.parse_args(["--config", file, *flags])
        del values["config"]
        return TrainConfig(**values)
    except UnicodeDecodeError:
        message = f"{file} is not UTF-8"
    except (OverflowError, RecursionError):
        message = f"{file} or a flag holds a number too large or brackets too deep"
    except (ValueError, OSError, argparse.ArgumentError) as error:
        message = _one_sentence(str(error))
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


# A resumed run may change these: they say where and how often, not what is computed.
CHANGEABLE = {
    *("data", "run_name", "resume", "batch_size", "max_steps", "device", "compile", "parallel", "verify_data"),
    *("timeout", "max_bad_steps", "eval_interval", "eval_tokens", "checkpoint_interval", "keep_checkpoints"),
    *("log_interval", "wandb_project", "eval_hellaswag", "hellaswag_data", "activation_checkpointing"),
}
FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]
SWITCHES = [f"--{field.name}" for field in dataclasses.fields(TrainConfig) if field.type is bool]
KINDS = {
    "PositiveInt": "a whole number above 0",
    "Union": 'a whole number above 0 or "auto"',
    "NonNegativeInt": "a whole number, 0 or more",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number, 0 or more",
    "ClosedUnitInterval": "a number from 0 to 1",
    "<class 'str'>": "text in quotes",
    "<class 'bool'>": "true or false",
}


def _one_sentence(message: str) -> str:
    """The parser's message as one line: the setting, what it must be, the nearest name for an unknown one."""
    message = " ".join(message.split())
    # Of a union the parser says what the value is not of each kind.
    union = r"Does not validate against any of the Union .* Given value: "
    message = re.sub(union, "Not of type Union: Got value: ", message)
    if match := re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: -*([^\s=]+)", message):
        key = match[1] or match[2]
        return f"there is no setting {key}{nearest(key, FIELDS)} (train.py --help lists them)"
    if match := re.match(r'Parser key "(\w+)": (?:Not of type|Expected an?) (.+?)(?:[:.] (.*)|$)', message):
        setting, kind, rest = match.groups(default="")
        kind = KINDS.get(kind, kind.replace("typing.Literal", "one of "))
        got = re.search(r"Got value: (.*)|base 10: (.*)|to float: (.*)|^(\S+) (?:does not conform|not an? )", rest)
        return (
            f"{setting} must be {kind}, not {next(filter(None, got.groups()))}" if got else f"{setting} must be {kind}"
        )
    return message
