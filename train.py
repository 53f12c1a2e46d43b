"""Train a GPT: `python train.py [CONFIG.toml] [--key value ...]`, under torchrun for several processes."""

import importlib.util
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from signal import Signals

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from gpt2_scratch.checkpoint import (
    SUMS_FILE,
    CheckpointWriter,
    begun_by_this_launch,
    checkpoints,
    damage,
    holds_run,
    latest_written,
    load_model,
    load_state,
    lock_run,
    mark_launch,
    newest_sound_checkpoint,
    step_of,
)
from gpt2_scratch.cli import UserError, run_script
from gpt2_scratch.config import TrainConfig, parse_config
from gpt2_scratch.dataset import TokenDataset, evaluation_batches, file_sha256, fingerprint, read_meta, training_batches
from gpt2_scratch.device import LateReader, StopSignals, describe, peak_flops, pick_dtype, to_device
from gpt2_scratch.distributed import (
    Runtime,
    all_ranks_or_none,
    drifted,
    from_main,
    gather,
    place,
    process_group,
    recorded,
    same_everywhere,
    send_files,
    weight_sums,
)
from gpt2_scratch.loss import Loss, lean_cross_entropy
from gpt2_scratch.metrics import MetricsLog
from gpt2_scratch.optim import learning_rate_at, load_optimizer, make_optimizer, own_share
from gpt2_scratch.parallel import distribute, gathered, rehearse, replicate, shard, synchronised_if, whole_weights
from gpt2_scratch.scoring import Example, build, check_fit, judge_all, nonfinite_tensor, read_rows, subset, summarise
from gpt2_scratch.tokenizer import Tokenizer, load_tokenizer
from model import GPT, Generation, GPTConfig, ModelError


@dataclass
class Progress:
    """Where a run is. Dropout and the order of data are functions of it and the seed; no random state is kept."""

    step: int = 0
    windows: int = 0  # of training data consumed
    best_val_loss: float = math.inf
    evaluation_due: bool = False  # the evaluation at `step` is yet to be made: a signal came in between
    bad_steps: int = 0  # left out so far
    bad_streak: int = 0  # the last of them in a row


@dataclass
class Parts:
    """What a run is made of, new or as a checkpoint has it."""

    tokenizer: Tokenizer
    train_data: TokenDataset
    val_data: TokenDataset
    data_fingerprint: str
    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype
    progress: Progress
    hellaswag: list[Example]  # scored at each evaluation
    step_windows: int  # over all processes
    batch_size: int  # windows of one process in a micro-step
    accumulation_steps: int
    notes: list[str]  # which settings a resumed run changes


def train(cfg: TrainConfig) -> None:
    """One training run, in this process or in a group of processes."""
    with process_group(cfg.device, cfg.timeout) as rt, ExitStack() as stack:
        stop = train_in_group(cfg, rt, stack)
    if stop:
        sys.exit(128 + stop)


def train_in_group(cfg: TrainConfig, rt: Runtime, stack: ExitStack) -> int:
    """One training run, from the data to a passage written by the trained model; returns the signal that stopped it.

    Args:
        stack: what it holds of the run's folder is let go when the stack is left.
    """
    say = print if rt.is_main else lambda *_: None
    run = Path("out") / cfg.run_name
    same_everywhere(rt, {**cfg.decisive(), "dtype as resolved": str(pick_dtype(cfg.dtype, rt.device))})
    checkpoint = open_run(run, cfg, rt, stack)
    if cfg.resume and not checkpoint:
        say(f"{run} has no checkpoint yet: beginning at step 0")
    prepare_default_corpus(cfg, rt)
    with all_ranks_or_none(rt):
        parts = load(cfg, run, checkpoint, rt)
    model, optimizer, scaler, progress = parts.model, parts.optimizer, parts.scaler, parts.progress
    log = writer = None
    with all_ranks_or_none(rt):
        if rt.is_main:
            log, writer = begin(run, cfg, checkpoint, parts, stack)
    if checkpoint:
        say("; ".join([f"resuming from {checkpoint}", *parts.notes]))
    sharing = "1 process" if rt.world_size == 1 else f"{rt.world_size} processes ({cfg.parallel})"
    say(
        f"training {model.num_params():,} parameters on {describe(rt.device)} in "
        f"{str(parts.dtype).removeprefix('torch.')}, {sharing}, "
        f"{parts.step_windows} windows of {model.config.block_size} tokens a step "
        f"({parts.accumulation_steps} x {parts.batch_size} per process), {cfg.max_steps} steps"
    )

    autocast = torch.autocast(rt.device.type, parts.dtype, enabled=parts.dtype != torch.float32)
    forward, replicas = ready(cfg, model, parts.batch_size, autocast, rt)
    batches = to_device(
        training_batches(
            parts.train_data,
            seed=cfg.seed,
            consumed=progress.windows,
            step_windows=parts.step_windows,
            batch_size=parts.batch_size,
            rank=rt.rank,
            world_size=rt.world_size,
        ),
        rt.device,
    )
    step, step_tokens = progress.step, parts.step_windows * model.config.block_size
    bad_steps, bad_streak = (
        torch.tensor(float(n), device=rt.device) for n in (progress.bad_steps, progress.bad_streak)
    )
    late_reader = LateReader()
    bar = tqdm(
        total=cfg.max_steps * step_tokens,
        initial=step * step_tokens,
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        disable=not rt.is_main,
    )
    flops_per_token, peak = model.flops_per_token(), peak_flops(rt.device)
    clock, clock_step = time.perf_counter(), step
    evaluation_due, checkpoint_due, stop = progress.evaluation_due, False, 0

    model.train()
    if rt.peers:
        rt.peers.training = True
    common_steps = min(rt.all_gather(parts.accumulation_steps))  # micro-steps that all processes make
    ask_others = True  # between micro-steps, whether they got a signal; after the first step only where these are slow
    with StopSignals(rt.launcher) as signals, closing(batches), bar, writer or nullcontext():
        if rt.world_size == 1 and forward.__class__ is Loss:  # not compiled
            interruptible(model, signals)
        while True:
            paused = time.perf_counter()
            if evaluation_due or checkpoint_due or stop:
                end_if_drifted(run, writer, model, step, rt)
            if evaluation_due and not stop:
                with whole_weights(model, cfg.parallel):
                    val_loss, val_tokens, stop = evaluate(forward, parts, cfg.eval_tokens, autocast, signals, rt)
                    hellaswag = {}
                    if parts.hellaswag and not stop:
                        hellaswag, stop = score_hellaswag(model, parts, autocast, signals, rt)
                evaluation_due = bool(stop)
                if log and not stop:
                    progress.best_val_loss = min(val_loss, progress.best_val_loss)
                    log.write({"step": step, "tokens": step * step_tokens, "val_loss": val_loss, **hellaswag})
                    bar.write(
                        f"step {step}: validation loss {val_loss:.4f} nats per token over {val_tokens:,} tokens "
                        f"(best: {progress.best_val_loss:.4f})"
                        + "".join(f", {name} {value:.4f}" for name, value in hellaswag.items())
                    )
            last = stop or step == cfg.max_steps
            if checkpoint_due or last:
                progress.step, progress.windows = step, step * parts.step_windows
                progress.evaluation_due = evaluation_due
                progress.bad_steps, progress.bad_streak = int(bad_steps), int(bad_streak)
                if last or not progress.bad_streak:  # else the one before the bad steps is the one to go back to
                    state = {"progress": asdict(progress), "settings": cfg.plain(), "data": parts.data_fingerprint}
                    state |= {"optimizer": gathered(optimizer.state_dict(), rt.is_main), "scaler": scaler.state_dict()}
                    weights = gathered(model.state_dict(), rt.is_main)
                    if writer:
                        writer.save(step, model.config, weights, state, wait=last)
            if last:
                break
            clock += time.perf_counter() - paused  # tokens_per_sec is that of training alone

            # Dropout is a function of the seed, the step and the process, so a resumed run draws the same.
            torch.manual_seed(((cfg.seed * 1_000_003 + step) * 65_537 + rt.rank) % 2**63)
            learning_rate = learning_rate_at(
                step,
                schedule=cfg.schedule,
                max_steps=cfg.max_steps,
                warmup_steps=cfg.warmup_steps,
                learning_rate=cfg.learning_rate,
                min_learning_rate=cfg.min_learning_rate,
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            loss, step_began = torch.zeros((), device=rt.device), time.perf_counter()
            try:
                for micro_step in range(parts.accumulation_steps):
                    if (ask_others and micro_step < common_steps) or rt.world_size == 1:
                        stop = received_by_any(signals, rt)
                    if stop:
                        break
                    inputs, targets = next(batches)
                    with synchronised_if(micro_step == parts.accumulation_steps - 1, model, cfg.parallel, replicas):
                        with autocast:
                            micro_loss = (replicas or forward)(inputs, targets) / parts.accumulation_steps
                        scaler.scale(micro_loss).backward()
                    loss += micro_loss.detach()
            except StepInterrupted:
                stop = signals.signum
            if stop:  # what is done of this step is dropped; a resumed run repeats it
                continue
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float("inf"))
            grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
            seconds = time.perf_counter() - step_began
            # Filled on the device: a copy from the host would wait for it.
            mine = torch.stack([loss, torch.full_like(loss, signals.signum), torch.full_like(loss, seconds)])
            everyones = gather(mine, rt)  # (world_size, 3)
            loss = everyones[:, 0].mean()
            bad = (~torch.isfinite(loss + grad_norm)).float()
            optimizer.found_inf = bad  # the device leaves the update out: the host need not know, and does not wait
            if rt.device.type != "mps" or not bad:
                optimizer.step()
            scaler.update()
            optimizer.zero_grad(set_to_none=not replicas)  # DDP's are where it sends them from

            step += 1
            bad_steps, bad_streak = bad_steps + bad, (bad_streak + 1) * bad
            bar.update(step_tokens)
            log_due = due(step, cfg.log_interval, cfg)
            figures = torch.stack([loss, grad_norm, bad_steps, bad_streak, *everyones[:, 1:].max(dim=0).values])
            at, (train_loss, norm, n_bad, n_streak, signum, seconds) = late_reader.read(step, figures, now=log_due)
            stop, ask_others = int(signum), seconds > common_steps
            if log and log_due:
                tokens_per_sec = (step - clock_step) * step_tokens / (time.perf_counter() - clock)
                line = {"step": step, "tokens": step * step_tokens, "train_loss": train_loss, "lr": learning_rate}
                line |= {"grad_norm": norm, "bad_steps": int(n_bad), "tokens_per_sec": tokens_per_sec}
                if peak:
                    line["mfu"] = tokens_per_sec * flops_per_token / (peak * rt.world_size)
                log.write(line)
                bar.set_postfix_str(f"step {step}, loss {train_loss:.3f}")
                clock, clock_step = time.perf_counter(), step
            if n_streak >= cfg.max_bad_steps:
                end_for_bad_numbers(run, writer, at - int(n_streak) + 1, at, rt)
            evaluation_due = due(step, cfg.eval_interval, cfg)
            checkpoint_due = due(step, cfg.checkpoint_interval, cfg)
        with all_ranks_or_none(rt):
            if rt.is_main:
                writer.close()
                log.close()
    if stop:
        if rt.is_main:
            print(f"stopped by {Signals(stop).name} after step {step}; --resume goes on from {writer.newest}")
        return stop
    with whole_weights(model, cfg.parallel):
        if rt.is_main:
            print(f"saved {writer.newest}; a passage it writes:\n")
            write_passage(model, parts.tokenizer)
            print(f'\nmore of it: python sample.py --prompt "..." --model {writer.newest}')
    return 0


class StepInterrupted(Exception):
    """A signal came in the middle of a step."""


def interruptible(model: GPT, signals: StopSignals) -> None:
    """Have a signal end a step at the next block, forward or backward: on a CPU a large batch can take minutes."""

    def check(*_: object) -> None:
        if signals.signum and model.training:
            raise StepInterrupted

    for module in (*model.h, model.lm_head):
        module.register_forward_pre_hook(check)
        module.register_full_backward_pre_hook(check)


def received_by_any(signals: StopSignals, rt: Runtime) -> int:
    """The signal that any process has received, 0 if none has. Several processes wait for each other."""
    if rt.world_size == 1:
        return signals.signum  # without a tensor: reading one would wait for a GPU
    return int(gather(torch.tensor([float(signals.signum)], device=rt.device), rt).max())


def due(step: int, interval: int, cfg: TrainConfig) -> bool:
    return step == cfg.max_steps or (interval > 0 and step % interval == 0)


def open_run(run: Path, cfg: TrainConfig, rt: Runtime, stack: ExitStack) -> Path | None:
    """The checkpoint to continue from, the same on every node; None for a new run.

    A run that exists is locked before it is looked at. The newest valid checkpoint that any node has is handed to the
    nodes that lack it, which is all but one where each has a disk of its own.

    Raises:
        UserError: the run exists and is not to be continued or cannot be, or what logs it is not installed.
    """
    name = sums = lost = None
    with all_ranks_or_none(rt):
        if cfg.wandb_project and rt.is_main and not importlib.util.find_spec("wandb"):
            raise UserError("wandb_project is set, but wandb is not installed; pip install wandb")
        if rt.local_rank == 0:
            refuse_unasked(run, cfg)
            if rt.is_main and run.exists():
                stack.callback(lock_run(run).release)
            try:
                found, written = newest_sound_checkpoint(run), latest_written(run)
            except UserError as error:  # all are damaged here; another node may have a valid one
                found, written, lost = None, None, str(error)
            if written and not found:
                lost = (
                    f"{run} had come to {written}, but no valid checkpoint of it is left; put one back to go on, or "
                    f"begin another run with --run_name NAME"
                )
            name, sums = (found.name, file_sha256(found / SUMS_FILE)) if found else (None, None)
    nodes = {rank: node for rank, node in enumerate(rt.all_gather([name, sums, lost, rt.local_rank])) if node[3] == 0}
    newest = max((node[0] for node in nodes.values() if node[0]), key=lambda name: int(name[5:]), default=None)
    with all_ranks_or_none(rt):
        if not newest and (lost := next((node[2] for node in nodes.values() if node[2]), None)):
            raise UserError(lost)
    if not newest:
        return None
    owner = next(rank for rank, node in nodes.items() if node[0] == newest)
    checkpoint = run / "checkpoints" / newest
    same_everywhere(rt, {f"{checkpoint / SUMS_FILE}": sums if name == newest else nodes[owner][1]})
    lacking = [rank for rank, node in nodes.items() if node[0] != newest]
    if lacking:
        receive_checkpoint(checkpoint, owner, rt.rank in lacking, rt)
        if 0 in lacking:  # the process that writes the metrics goes on with those that there are
            metrics = run / "metrics.jsonl"
            send_files(rt, [metrics], owner, run if rt.is_main else None)
    return checkpoint


def receive_checkpoint(checkpoint: Path, owner: int, receives: bool, rt: Runtime) -> None:
    """Hand a checkpoint of one rank's node to the nodes that lack it, or have it damaged. Every process calls."""
    with all_ranks_or_none(rt):
        partial = checkpoint.with_name(f".{checkpoint.name}.{rt.rank}")
        if receives:
            print(f"{place(rt.rank)} gets {checkpoint} from rank {owner}", flush=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    names = rt.all_gather(sorted(path.name for path in checkpoint.iterdir()) if rt.rank == owner else None)[owner]
    send_files(rt, [checkpoint / name for name in names], owner, partial if receives else None)
    with all_ranks_or_none(rt):
        if receives:
            if problem := damage(partial):
                raise UserError(f"{checkpoint} did not arrive whole: {problem}")
            if checkpoint.exists():  # damaged, or it would not have been sent
                os.replace(checkpoint, checkpoint.with_name(f"{checkpoint.name}.damaged"))
            os.replace(partial, checkpoint)


def refuse_unasked(run: Path, cfg: TrainConfig) -> None:
    """Raises UserError: the folder holds a run, and nobody asked to continue it."""
    if holds_run(run) and not (cfg.resume or begun_by_this_launch(run)):
        raise UserError(f"{run} holds a run already; add --resume to continue it, or --run_name NAME for another")


def prepare_default_corpus(cfg: TrainConfig, rt: Runtime) -> None:
    """Make the data of the default setting where it is missing; whatever else is missing is an error.

    The first process goes first, then one of each node that still lacks the data: nodes may share a folder.
    """
    for turn in (rt.is_main, rt.local_rank == 0):
        with all_ranks_or_none(rt):
            if turn and cfg.data == TrainConfig.data and not Path(cfg.data).exists():
                script = Path(__file__).with_name("prepare_data.py")
                done = subprocess.run([sys.executable, script, "shakespeare"])
                if done.returncode and not Path(cfg.data).exists():  # it does where another process was faster
                    raise UserError(f"{cfg.data} could not be prepared; see above")


def load(cfg: TrainConfig, run: Path, checkpoint: Path | None, rt: Runtime) -> Parts:
    """Everything a run needs, checked.

    Raises:
        UserError: bad data, or settings that do not fit it, the machine or the checkpoint.
    """
    meta = read_meta(cfg.data)
    tokenizer = load_tokenizer(meta["tokenizer"])
    if tokenizer.n_vocab != meta["vocab_size"]:
        raise UserError(
            f"meta.json of {cfg.data} has vocab_size {meta['vocab_size']}, its tokenizer {meta['tokenizer']} "
            f"{tokenizer.n_vocab}; make the data again with prepare_data.py"
        )
    progress, notes, state, data_fingerprint = Progress(), [], {}, fingerprint(meta)
    go_back = f"move {checkpoint} elsewhere to resume from the one before"
    if checkpoint:
        state = load_state(checkpoint)
        notes = cfg.check_resumable(state["settings"], run)
        if state["data"] != data_fingerprint:
            raise UserError(
                f"{run} was made with the tokens of {state['settings']['data']}; {cfg.data} now holds others: resume "
                f"with those, or begin another run with --run_name NAME"
            )
        try:
            progress = Progress(**state["progress"])
        except TypeError as error:
            raise UserError(f"{checkpoint} was made by another version of this program: {error}") from error
        if progress.step != step_of(checkpoint):
            raise UserError(f"{checkpoint} holds the state of step {progress.step}; {go_back}")
        if progress.step > cfg.max_steps:
            raise UserError(f"{run} is at step {progress.step} already, beyond max_steps {cfg.max_steps}")
    model = build_model(cfg, meta["vocab_size"], tokenizer.eot, checkpoint, rt)
    for block in model.h:
        block.recompute = cfg.activation_checkpointing
    block_size = model.config.block_size
    verify = cfg.verify_data and rt.local_rank == 0
    train_data, val_data = (TokenDataset(cfg.data, split, block_size, verify) for split in ("train", "val"))
    hellaswag: list[Example] = []
    if cfg.eval_hellaswag:
        rows = subset(read_rows("hellaswag", cfg.hellaswag_data or None), cfg.eval_hellaswag)
        hellaswag = check_fit(build("hellaswag", rows, tokenizer, block_size, block_size), block_size)
    # From here on the processes work together, so what fails in one alone must have failed by now.
    if rt.peers:
        weights = weight_sums(model).sum().item()
        same_everywhere(rt, {"fingerprint of the data": data_fingerprint[:12], "sum of the weights": weights})
    if rt.world_size > 1 and cfg.parallel != "ddp":
        shard(model, cfg.parallel, getattr(torch, cfg.reduce_dtype))
    dtype = pick_dtype(cfg.dtype, rt.device)
    optimizer = make_optimizer(model, cfg.optimizer, cfg.learning_rate, cfg.weight_decay, cfg.beta1, cfg.beta2)
    scaler = torch.amp.GradScaler(rt.device.type, enabled=dtype == torch.float16)
    if checkpoint:
        if not load_optimizer(optimizer, state["optimizer"]) and progress.step:
            raise UserError(f"{checkpoint} holds the optimizer of another model; {go_back}")
        distribute(optimizer)
        scaler.load_state_dict(state["scaler"])
    if cfg.batch_size == "auto":
        cfg = replace(cfg, batch_size=fitting_batch_size(cfg, model, optimizer, dtype, rt))
    return Parts(
        tokenizer,
        train_data,
        val_data,
        data_fingerprint,
        model,
        optimizer,
        scaler,
        dtype,
        progress,
        hellaswag,
        *split_batch(cfg, block_size, rt.world_size),
        notes,
    )


def begin(
    run: Path, cfg: TrainConfig, checkpoint: Path | None, parts: Parts, stack: ExitStack
) -> tuple[MetricsLog, CheckpointWriter]:
    """Take possession of the run's folder, and bring what it holds to where the run is.

    Raises:
        UserError: another process writes the run, or its metrics.jsonl is damaged.
    """
    stack.callback(lock_run(run).release)
    refuse_unasked(run, cfg)
    if checkpoints(run) and not checkpoint:
        raise UserError(f"another process has trained {run} meanwhile; add --resume to continue it")
    mark_launch(run)
    progress, settings = parts.progress, run / "config.toml"
    writer = CheckpointWriter(run, parts.tokenizer, cfg.keep_checkpoints, checkpoint)
    log = MetricsLog(run, vars(cfg), progress.step, progress.evaluation_due, cfg.wandb_project)
    writer.before = log.sync  # a checkpoint is good only with the metrics up to it
    lines = (
        settings.read_text(encoding="utf-8", errors="replace").splitlines() if checkpoint and settings.exists() else []
    )
    earlier = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    cfg.save(settings, [*earlier, f"step {progress.step}: {versions()}"])
    return log, writer


def end_for_bad_numbers(run: Path, writer: CheckpointWriter | None, since: int, step: int, rt: Runtime) -> None:
    """Raises UserError: it says since when, and which checkpoint is good."""
    with all_ranks_or_none(rt):
        good = checkpoint_before(run, writer, since, rt)
        advice = (
            f"{good} is good: begin a run from it with --init_from, --run_name NAME and a lower learning_rate"
            if good
            else "there is no checkpoint from before; begin again with a lower learning_rate"
        )
        raise UserError(f"the loss or its gradient was not finite in all steps from {since} to {step}; {advice}")


def end_if_drifted(run: Path, writer: CheckpointWriter | None, model: GPT, step: int, rt: Runtime) -> None:
    """Raises UserError: the copies of the model are no longer the same in all processes."""
    if ranks := drifted(model, rt):
        with all_ranks_or_none(rt):
            good = checkpoint_before(run, writer, step, rt)
            raise UserError(
                f"after step {step} the weights of rank {', '.join(map(str, ranks))} are not those of rank 0; the "
                f"newest checkpoint from before is {good}: look for a faulty device, then add --resume"
            )


def checkpoint_before(run: Path, writer: CheckpointWriter | None, step: int, rt: Runtime) -> str | None:
    """The newest valid checkpoint of a step before this one. Every process calls."""
    if writer:
        writer.wait()
    good = newest_sound_checkpoint(run, before=step) if writer else None
    return from_main(rt, good and str(good))


def build_model(cfg: TrainConfig, vocab_size: int, eot: int, checkpoint: Path | None, rt: Runtime) -> GPT:
    """The model of a checkpoint, of loaded weights, or a fresh one.

    Raises:
        UserError: loaded weights of another shape or vocabulary than the settings and the data.
    """
    sizes = {"n_layer": cfg.n_layer, "n_head": cfg.n_head, "n_embd": cfg.n_embd, "block_size": cfg.block_size}
    sizes = {name: value for name, value in sizes.items() if value}
    if cfg.init_from == "scratch" and not checkpoint:
        torch.manual_seed(cfg.seed)
        fresh = {"dropout": cfg.dropout, "initializer_range": cfg.initializer_range, "eos_token_id": eot}
        try:
            return GPT(GPTConfig(vocab_size=vocab_size, **fresh, **sizes)).to(rt.device)
        except ModelError as error:
            raise UserError(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            raise UserError(f"a model of these sizes does not fit the memory: {str(error).splitlines()[0]}") from error
    source = checkpoint or cfg.init_from
    # A shorter block_size cuts the position table; a checkpoint's was cut when its run began.
    model = load_model(
        source, dtype=torch.float32, device=rt.device, dropout=cfg.dropout, block_size=sizes.get("block_size")
    )
    if not checkpoint and (name := nonfinite_tensor(model)):  # a step that is not finite never gets into a checkpoint
        raise UserError(f"{source} has values in {name} that are not finite; begin with other weights")
    for name, value in {**sizes, "vocab_size": vocab_size}.items():
        loaded = getattr(model.config, name)
        if loaded != value:
            where = f"the data at {cfg.data}" if name == "vocab_size" else "the settings"
            raise UserError(f"{source} has {name} {loaded}, {where} {value}; they must be equal")
    return model.train()


def fitting_batch_size(
    cfg: TrainConfig, model: GPT, optimizer: torch.optim.Optimizer, dtype: torch.dtype, rt: Runtime
) -> int:
    """The most windows that fit the memory of every process's GPU and divide its share of a step.

    What one and two windows take, uncompiled, tells what more take. A tenth of the memory is left alone: the
    allocator cannot use it all.

    Raises:
        UserError: not a GPU, or not even one window fits.
    """
    if rt.device.type != "cuda":
        raise UserError(f'batch_size "auto" measures the memory of a CUDA device; on {rt.device.type} give a number')
    autocast = torch.autocast("cuda", dtype, enabled=dtype != torch.float32)
    share = max(1, cfg.total_batch_size // (model.config.block_size * rt.world_size))
    taken = [math.inf, math.inf]
    for i, batch_size in enumerate((1, 2)):
        with suppress(torch.OutOfMemoryError):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)  # as there is from the second micro-step on
            torch.cuda.reset_peak_memory_stats(rt.device)
            rehearse(Loss(model), model, batch_size, autocast).backward()
            taken[i] = torch.cuda.max_memory_allocated(rt.device)
        model.zero_grad(set_to_none=True)
    moments = 0 if optimizer.state else sum(2 * own_share(p).nbytes for p in model.parameters())
    # Where the model is shared out, whole gradients are kept between micro-steps.
    whole = rt.world_size > 1 and cfg.parallel != "ddp"
    copies = 4 * sum(p.numel() for p in model.parameters()) if whole else 0
    room = 0.9 * (torch.cuda.mem_get_info(rt.device)[0] + torch.cuda.memory_reserved(rt.device)) - moments - copies
    everyones = gather(torch.tensor([largest_batch(share, *taken, room)], device=rt.device), rt)
    if not everyones.min():
        raise UserError(
            f"not even one window of {model.config.block_size} tokens fits the memory of {rt.device}; try "
            f"activation_checkpointing, or several processes with parallel fsdp"
        )
    return int(everyones.min())


def largest_batch(share: int, one: float, two: float, room: float) -> int:
    """The largest divisor of a share of windows that fits `room` bytes, 0 if none does.

    Args:
        one, two: bytes that so many windows take.
    """
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    return max([n for n in divisors if (one if n == 1 else one + (n - 1) * (two - one)) <= room], default=0)


def split_batch(cfg: TrainConfig, block_size: int, world_size: int) -> tuple[int, int, int]:
    """Windows a step over all processes, windows a micro-step of one process (at most batch_size), and its micro-steps.

    Raises:
        UserError: total_batch_size does not divide into windows, or these among the processes.
    """
    step_windows, rest = divmod(cfg.total_batch_size, block_size)
    if rest or not step_windows:
        unit = block_size * world_size
        raise UserError(
            f"total_batch_size {cfg.total_batch_size} does not divide into windows of {block_size} tokens; "
            f"{max(1, round(cfg.total_batch_size / unit)) * unit} does"
        )
    share, rest = divmod(step_windows, world_size)
    if rest:
        fitting = [n for n in range(1, step_windows + 1) if step_windows % n == 0]
        near = [max(n for n in fitting if n < world_size), *[n for n in fitting if n > world_size][:1]]
        raise UserError(
            f"total_batch_size {cfg.total_batch_size} is {step_windows} windows of {block_size} tokens, which do not "
            f"divide among {world_size} processes; {' or '.join(map(str, near))} processes can share them"
        )
    batch_size = max(n for n in range(1, min(cfg.batch_size, share) + 1) if share % n == 0)
    return step_windows, batch_size, share // batch_size


def ready(
    cfg: TrainConfig, model: GPT, batch_size: int, autocast: AbstractContextManager, rt: Runtime
) -> tuple[nn.Module, DistributedDataParallel | None]:
    """The model's loss, compiled if that is wanted and a compiler works, and the same behind DDP where that is used.

    It is compiled within DDP, which then cuts the graph so that gradients travel during the backward pass, and in
    every process or in none.
    """

    def behind_ddp(forward: nn.Module) -> DistributedDataParallel | None:
        ddp = rt.world_size > 1 and cfg.parallel == "ddp"
        return replicate(forward, getattr(torch, cfg.reduce_dtype)) if ddp else None

    problem, replicas, loss = "", None, None
    if cfg.compile:
        forward = torch.compile(Loss(model))
        try:
            replicas = behind_ddp(forward)
            loss = rehearse(replicas or forward, model, batch_size, autocast)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # inductor, Triton and the C++ compiler each raise their own
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            warnings.warn(f"torch.compile does not work here, going on without ({problem})", stacklevel=2)
            torch._dynamo.reset()
    if not cfg.compile or gather(torch.tensor([float(bool(problem))], device=rt.device), rt).any():
        replicas = loss = None  # a second one beside the first would add up the gradients twice
        if rt.device.type == "cpu":
            model.cross_entropy = lean_cross_entropy
        forward = Loss(model)
        replicas = behind_ddp(forward)
        loss = replicas and rehearse(replicas, model, batch_size, autocast)
    if replicas:  # the backward pass that `replicate` asks for
        loss.backward()
        model.zero_grad(set_to_none=False)
    return forward, replicas


@torch.no_grad()
def evaluate(
    forward: nn.Module,
    parts: Parts,
    max_tokens: int,
    autocast: AbstractContextManager,
    signals: StopSignals,
    rt: Runtime,
) -> tuple[float, int, int]:
    """The mean loss over the validation windows, nats per token, over how many tokens, and 0.

    A signal to any process breaks it off: then the last is its number, and the others mean nothing.
    """
    forward.eval()
    batches = evaluation_batches(
        parts.val_data, batch_size=parts.batch_size, max_tokens=max_tokens, rank=rt.rank, world_size=rt.world_size
    )
    sums = [torch.zeros(2, device=rt.device)]  # summed loss, tokens
    with closing(to_device(batches, rt.device)) as pairs:
        for inputs, targets in pairs:
            if signals.signum:
                break
            with autocast:
                loss = forward(inputs, targets)
            count = (targets >= 0).sum()
            sums.append(torch.stack([loss * count, count]))
    forward.train()
    total = torch.stack(sums).cpu().double().sum(dim=0)
    mine = torch.tensor([*total.tolist(), signals.signum], dtype=torch.float64)
    everyones = gather(mine if rt.world_size == 1 else mine.to(rt.device), rt).cpu()  # (world_size, 3)
    loss, count = everyones[:, :2].sum(dim=0).tolist()
    return loss / max(count, 1), int(count), int(everyones[:, 2].max())


def score_hellaswag(
    model: GPT, parts: Parts, autocast: AbstractContextManager, signals: StopSignals, rt: Runtime
) -> tuple[dict[str, float], int]:
    """hellaswag_acc and hellaswag_acc_norm, and 0, or the number of a signal that broke it off.

    The uncompiled model scores: each of the rows' many lengths would be compiled anew.
    """
    model.eval()
    verdicts = judge_all(model, parts.hellaswag, parts.batch_size, autocast, rt, lambda _: not signals.signum)
    model.train()
    stop = received_by_any(signals, rt)
    return {} if stop else {f"hellaswag_{name}": s.value for name, s in summarise(verdicts).items()}, stop


def write_passage(model: GPT, tokenizer: Tokenizer, max_new_tokens: int = 400) -> None:
    """Print the beginning of a document as the model writes it."""
    model.eval()
    writing = Generation(model, [[tokenizer.eot]], max_new_tokens, temperature=0.8, top_k=200, top_p=0.95)
    ids = [writing.step()[0].item() for _ in range(max_new_tokens)]
    print(tokenizer.decode(ids[: ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids).strip())


def versions() -> str:
    """What a run is made with, for the head of its config.toml."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return f"Python {platform.python_version()}, torch {torch.__version__}, commit {commit}"


if __name__ == "__main__":
    run_script(recorded(lambda: train(parse_config(sys.argv[1:]))), sturdy=True)
