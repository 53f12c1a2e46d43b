"""What a training run holds in memory: new, or as a checkpoint left it."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt2_scratch.batch_size import BatchPlan, fitting_batch_size, plan_batch
from gpt2_scratch.checkpoint import load_model, load_state, step_of, warn
from gpt2_scratch.cli import UserError
from gpt2_scratch.config import TrainConfig
from gpt2_scratch.dataset import TokenDataset, fingerprint, read_meta
from gpt2_scratch.distributed import Runtime, same_everywhere, weight_checksums
from gpt2_scratch.optim import load_optimizer, make_optimizer
from gpt2_scratch.parallel import shard, shard_optimizer_state
from gpt2_scratch.precision import pick_dtype
from gpt2_scratch.scoring import Example, build, check_fit, nonfinite_tensor, read_rows, subset
from gpt2_scratch.tokenizer import Tokenizer, check_vocabulary, load_data_tokenizer, load_tokenizer
from model import GPT, GPTConfig, ModelError


@dataclass
class Progress:
    """Where a run stands. Dropout and data order are functions of it and the seed, so no random state is saved."""

    step: int = 0
    sequences: int = 0  # of training data consumed
    best_val_loss: float = math.inf
    evaluation_due: bool = False  # a signal came before the evaluation at `step`
    bad_steps: int = 0  # skipped so far, because their loss or gradient was not finite
    bad_streak: int = 0  # skipped in a row, up to `step`


@dataclass
class TrainState:
    """Everything a run holds in memory, new or from a checkpoint."""

    progress: Progress
    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # enabled for float16 only
    dtype: torch.dtype
    dtype_reason: str  # why "auto" chose it
    plan: BatchPlan
    tokenizer: Tokenizer
    train_data: TokenDataset
    val_data: TokenDataset
    data_fingerprint: str
    hellaswag: list[Example]  # scored at each evaluation
    changes: list[str]  # settings that a resumed run changes

    @property
    def tokens_per_step(self) -> int:
        return self.plan.sequences * self.model.config.block_size


def load_train_state(cfg: TrainConfig, run: Path, checkpoint: Path | None, rt: Runtime) -> TrainState:
    """Everything a run needs, checked.

    Raises:
        UserError: bad data, or settings that contradict the data, the machine or the checkpoint.
    """
    meta = read_meta(cfg.data)
    tokenizer = load_data_tokenizer(cfg.data, meta)
    if tokenizer.n_vocab != meta["vocab_size"]:
        raise UserError(
            f"meta.json of {cfg.data} has vocab_size {meta['vocab_size']}, its tokenizer {meta['tokenizer']} "
            f"{tokenizer.n_vocab}; make the data again with prepare_data.py"
        )
    vocabulary = tokenizer.fingerprint()
    if meta.setdefault("vocabulary_sha256", vocabulary) != vocabulary:  # older preparations lack it
        raise UserError(f"the tokenizer of {cfg.data} was replaced; make the data again with prepare_data.py")
    data_fingerprint = fingerprint(meta)
    saved: dict[str, Any] = {}
    progress, changes = Progress(), list[str]()
    if checkpoint:
        saved = load_state(checkpoint)
        progress, changes = check_resumable(cfg, run, checkpoint, saved, data_fingerprint)
    model = build_model(cfg, meta["vocab_size"], tokenizer.eot, checkpoint, rt)
    if checkpoint or cfg.init_from != "scratch":
        check_model_vocabulary(checkpoint or cfg.init_from, cfg.data, meta, rt)
    for block in model.h:
        block.recompute = cfg.activation_checkpointing
    block_size = model.config.block_size
    verify = cfg.verify_data and rt.local_rank == 0
    train_data, val_data = (TokenDataset(cfg.data, split, block_size, verify) for split in ("train", "val"))
    hellaswag: list[Example] = []
    if cfg.eval_hellaswag:
        rows = subset(read_rows("hellaswag", cfg.hellaswag_data or None), cfg.eval_hellaswag)
        hellaswag = check_fit(build("hellaswag", rows, tokenizer, block_size, block_size), block_size)
    # From here on ranks call collectives, so whatever can fail on one alone must have failed by now.
    name = saved["settings"]["dtype"] if saved and cfg.dtype == "auto" else cfg.dtype
    dtype, dtype_reason = pick_dtype(name, rt.device, model.config, cfg.batch_size, rt)
    if rt.peers:
        facts = {"fingerprint of the data": data_fingerprint[:12], "dtype as resolved": str(dtype)}
        same_everywhere(rt, facts | {"sum of the weights": weight_checksums(model).sum().item()})
    if rt.world_size > 1 and cfg.parallel != "ddp":
        shard(model, cfg.parallel, getattr(torch, cfg.reduce_dtype))
    optimizer = make_optimizer(
        model,
        cfg.optimizer,
        cfg.learning_rate,
        cfg.weight_decay,
        cfg.beta1,
        cfg.beta2,
        cfg.momentum,
        cfg.embedding_lr_scale,
        cfg.split_qkv,
    )
    scaler = torch.amp.GradScaler(rt.device.type, enabled=dtype == torch.float16)
    if checkpoint:
        if not load_optimizer(optimizer, saved["optimizer"]) and progress.step:
            raise UserError(f"{checkpoint} holds the optimizer of another model; {go_back(checkpoint)}")
        shard_optimizer_state(optimizer)
        if saved["scaler"]:  # the run was in float16
            scaler.load_state_dict(saved["scaler"])
    if cfg.batch_size == "auto":
        cfg = replace(cfg, batch_size=fitting_batch_size(cfg, model, optimizer, dtype, rt))
    return TrainState(
        progress=progress,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        dtype=dtype,
        dtype_reason=dtype_reason,
        plan=plan_batch(cfg.total_batch_size, int(cfg.batch_size), block_size, rt.world_size),
        tokenizer=tokenizer,
        train_data=train_data,
        val_data=val_data,
        data_fingerprint=data_fingerprint,
        hellaswag=hellaswag,
        changes=changes,
    )


def check_model_vocabulary(source: str | Path, data: str, meta: dict[str, Any], rt: Runtime) -> None:
    """Compare the vocabulary of the model to begin from with that of the data.

    Raises:
        UserError: they differ.
    """
    try:
        tokenizer = load_tokenizer(source)
    except UserError as error:
        if rt.is_main:
            warn(f"{error}; its vocabulary is taken to be that of {data}")
        return
    check_vocabulary(tokenizer, source, data, meta)


def check_resumable(
    cfg: TrainConfig, run: Path, checkpoint: Path, saved: dict, data_fingerprint: str
) -> tuple[Progress, list[str]]:
    """Where the checkpoint of a run stands, and the settings that a resumed run changes.

    Raises:
        UserError: resuming would make it another run.
    """
    changes = cfg.check_resumable(saved["settings"], run)
    if saved["data"] != data_fingerprint:
        raise UserError(
            f"{run} was made with the tokens of {saved['settings']['data']}; {cfg.data} now holds others: resume "
            f"with those, or begin another run with --run_name NAME"
        )
    values = dict(saved["progress"])
    if "windows" in values:  # its name until November 2026
        values["sequences"] = values.pop("windows")
    try:
        progress = Progress(**values)
    except TypeError as error:
        raise UserError(f"{checkpoint} was made by another version of this program: {error}") from error
    if progress.step != step_of(checkpoint):
        raise UserError(f"{checkpoint} holds the state of step {progress.step}; {go_back(checkpoint)}")
    if progress.step > cfg.max_steps:
        raise UserError(f"{run} is at step {progress.step} already, beyond max_steps {cfg.max_steps}")
    return progress, changes


def go_back(checkpoint: Path) -> str:
    return f"move {checkpoint} elsewhere to resume from the one before"


def build_model(cfg: TrainConfig, vocab_size: int, eot: int, checkpoint: Path | None, rt: Runtime) -> GPT:
    """The model of a checkpoint, of published weights, or a fresh one.

    Raises:
        UserError: the weights' shape or vocabulary differs from that of the settings and the data.
    """
    sizes = dict[str, Any](n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, block_size=cfg.block_size)
    sizes = {name: value for name, value in sizes.items() if value}
    if cfg.init_from == "scratch" and not checkpoint:
        torch.manual_seed(cfg.seed)
        fresh = dict[str, Any](dropout=cfg.dropout, initializer_range=cfg.initializer_range, eos_token_id=eot)
        try:
            return GPT(GPTConfig(vocab_size=vocab_size, **fresh, **sizes)).to(rt.device)
        except ModelError as error:
            raise UserError(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            raise UserError(f"a model of these sizes does not fit the memory: {str(error).splitlines()[0]}") from error
    source = checkpoint or cfg.init_from
    # A smaller block_size crops the position table; a checkpoint's was cropped when its run began.
    model = load_model(
        source, dtype=torch.float32, device=rt.device, dropout=cfg.dropout, block_size=sizes.get("block_size")
    )
    if not checkpoint and (name := nonfinite_tensor(model)):  # non-finite steps are skipped, so checkpoints are finite
        raise UserError(f"{source} has values in {name} that are not finite; begin with other weights")
    for name, value in {**sizes, "vocab_size": vocab_size}.items():
        loaded = getattr(model.config, name)
        if loaded != value:
            where = f"the data at {cfg.data}" if name == "vocab_size" else "the settings"
            raise UserError(f"{source} has {name} {loaded}, {where} {value}; they must be equal")
    return model.train()
