"""Train a GPT: `python train.py [CONFIG.toml] [--key value ...]`, under torchrun for several processes.

From top to bottom: `train` sets a run up, `training_loop` goes from step to step, `train_step` is one update of the
weights; then what they use. Model, optimizer and data are made in gpt2_scratch/state.py.
"""

import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from signal import Signals

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gpt2_scratch.checkpoint import CheckpointWriter
from gpt2_scratch.cli import UserError, run_script
from gpt2_scratch.config import TrainConfig, parse_config
from gpt2_scratch.dataset import evaluation_batches, to_device, training_batches
from gpt2_scratch.device import AsyncReader, attention_of_varying_shapes, describe, peak_flops
from gpt2_scratch.distributed import (
    Runtime,
    all_gather,
    all_ranks_or_none,
    print0,
    process_group,
    recorded,
    same_everywhere,
)
from gpt2_scratch.interrupt import Interrupt, StepInterrupted, interrupt_within, signal_of_any
from gpt2_scratch.metrics import MetricsLog, Speed
from gpt2_scratch.optim import learning_rate_at, memory_of
from gpt2_scratch.parallel import LossFunction, full_state, unsharded, wrap
from gpt2_scratch.precision import dtype_name
from gpt2_scratch.run import check_replicas, end_for_nonfinite_steps, open_run, start_writing
from gpt2_scratch.scoring import judge_all, summarize
from gpt2_scratch.signals import StopSignals
from gpt2_scratch.state import TrainState, load_train_state
from gpt2_scratch.tokenizer import Tokenizer
from model import GPT

Batches = Generator[tuple[Tensor, Tensor]]  # inputs and targets, int64 (B, T) each


# ---- One run


def train(cfg: TrainConfig) -> None:
    """One training run, in this process or in a group of them."""
    with process_group(cfg.device, cfg.timeout) as rt, ExitStack() as locks:
        run = Path("out") / cfg.run_name
        same_everywhere(rt, cfg.decisive())
        checkpoint = open_run(run, cfg, rt, locks)
        if cfg.resume and not checkpoint:
            print0(rt, f"{run} has no checkpoint yet: beginning at step 0")
        prepare_default_corpus(cfg, rt)
        with all_ranks_or_none(rt):
            state = load_train_state(cfg, run, checkpoint, rt)
        log: MetricsLog | None = None
        writer: CheckpointWriter | None = None
        with all_ranks_or_none(rt):
            if rt.is_main:
                at = state.progress
                log, writer = start_writing(
                    run, cfg, checkpoint, state.tokenizer, at.step, at.evaluation_due, stack=locks
                )
        if checkpoint:
            print0(rt, "; ".join([f"resuming from {checkpoint}", *state.changes]))
        processes = "1 process" if rt.world_size == 1 else f"{rt.world_size} processes ({cfg.parallel})"
        kind = dtype_name(state.dtype, state.dtype_reason)
        print0(
            rt,
            f"training {state.model.num_params():,} parameters on {describe(rt.device)} in {kind}, {processes}, "
            f"{state.plan.sequences} sequences of {state.model.config.block_size} tokens a step "
            f"({state.plan.accumulation_steps} x {state.plan.batch_size} per process), {cfg.max_steps} steps",
        )
        weights, moments = (n / 2**30 for n in memory_of(state.optimizer))
        print0(
            rt,
            f"{state.tokens_per_step:,} tokens a step; each process holds {weights:.2f} GiB of weights, the same again "
            f"for gradients, {moments:.2f} GiB of optimizer state, and the activations of a micro-step",
        )
        signum = training_loop(cfg, state, run, log, writer, rt)
        if writer and signum:
            step = state.progress.step
            print(f"stopped by {Signals(signum).name} after step {step}; --resume goes on from {writer.newest}")
        elif not signum:
            with unsharded(state.model, cfg.parallel):
                if writer:
                    print(f"saved {writer.newest}; a passage it writes:\n")
                    print(write_passage(state.model, state.tokenizer))
                    print(f"\n{next_commands(run, cfg.data)}")
    if signum:
        sys.exit(128 + signum)


def training_loop(
    cfg: TrainConfig, state: TrainState, run: Path, log: MetricsLog | None, writer: CheckpointWriter | None, rt: Runtime
) -> int:
    """Train to `max_steps`, or until a process is signalled; returns the signal's number, or 0.

    Args:
        log, writer: of rank 0.
    """
    model, progress, plan = state.model, state.progress, state.plan
    loss_fn = wrap(model, cfg, plan.batch_size, state.dtype, rt)
    batches = batches_of(state, cfg, rt)
    bad_steps, bad_streak = (
        torch.tensor(float(n), device=rt.device) for n in (progress.bad_steps, progress.bad_streak)
    )
    reader, bar = AsyncReader(), progress_bar(cfg, state, rt)
    evaluation_due, checkpoint_due, passage_due, signum = progress.evaluation_due, False, False, 0
    model.train()
    if rt.peers:
        rt.peers.training = True
    with StopSignals(rt.launcher) as signals, closing(batches), bar, writer or nullcontext():
        interrupt = Interrupt(signals, min(rt.all_gather_object(plan.accumulation_steps)), rt)
        if rt.world_size == 1 and not loss_fn.compiled:
            interrupt_within(model, signals)
        if progress.step == 0 and not evaluation_due:
            print_initial_loss(loss_fn, state, signals, rt, bar)
        peak = peak_flops(rt.device)
        speed = Speed(progress.step, state.tokens_per_step, model.flops_per_token(), peak and peak * rt.world_size)
        while True:
            with speed.paused():
                if evaluation_due or checkpoint_due or signum:
                    check_replicas(run, writer, model, progress.step, rt)
                if evaluation_due and not signum:
                    signum = evaluate_and_log(loss_fn, state, cfg, signals, rt, log, bar)
                    evaluation_due = bool(signum)
                if passage_due and not signum:
                    with unsharded(model, cfg.parallel):
                        if rt.is_main:
                            bar.write(f"step {progress.step}: {write_passage(model, state.tokenizer, 100)}\n")
                last = bool(signum) or progress.step == cfg.max_steps
                if checkpoint_due or last:
                    progress.sequences = progress.step * plan.sequences
                    progress.evaluation_due = evaluation_due
                    progress.bad_steps, progress.bad_streak = int(bad_steps), int(bad_streak)
                    # Keep the checkpoint from before a streak of bad steps: it is the one to go back to.
                    if last or not progress.bad_streak:
                        save(cfg, state, writer, wait=last)
            if last:
                break
            try:
                loss, grad_norm, bad = train_step(cfg, state, loss_fn, batches, interrupt, rt)
            except StepInterrupted as stop:  # what was done of the step is dropped; a resumed run repeats it
                signum = stop.signum
                continue
            progress.step += 1
            bar.update(state.tokens_per_step)
            bad_steps, bad_streak = bad_steps + bad, (bad_streak + 1) * bad
            log_due = due(progress.step, cfg.log_interval, cfg)
            metrics = torch.stack([loss, grad_norm, bad_steps, bad_streak, *interrupt.status(loss)])
            step, (*values, streak, signal, seconds) = reader.read(progress.step, metrics, now=log_due)
            signum = interrupt.after_step(signal, seconds)
            if log and log_due:
                log_step(log, bar, cfg, state, values, speed)
            if streak >= cfg.max_bad_steps:
                end_for_nonfinite_steps(run, writer, step - int(streak) + 1, step, rt)
            evaluation_due = due(progress.step, cfg.eval_interval, cfg)
            checkpoint_due = due(progress.step, cfg.checkpoint_interval, cfg)
            sample_interval = cfg.eval_interval if cfg.sample_interval == "eval" else int(cfg.sample_interval)
            # A longer one is written at the end.
            passage_due = progress.step < cfg.max_steps and due(progress.step, sample_interval, cfg)
        with all_ranks_or_none(rt):
            if writer and log:
                writer.close()
                log.close()
    return signum


# ---- One step


def train_step(
    cfg: TrainConfig,
    state: TrainState,
    loss_fn: LossFunction,
    batches: Batches,
    interrupt: Callable[[int], None],
    rt: Runtime,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update: forward and backward over the micro-batches of this rank, clip, step.

    Returns:
        Float32 scalars on the device, the same on every rank: the loss, the norm of its gradient before clipping, and
        whether the update was skipped because one of them is not finite (1 or 0). The host does not wait for them.

    Raises:
        StepInterrupted: a process was signalled; weights and optimizer are as before.
    """
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    step, n_micro = state.progress.step, state.plan.accumulation_steps
    # Dropout is a function of the seed, the step and the rank, so a resumed run draws the same masks.
    torch.manual_seed(((cfg.seed * 1_000_003 + step) * 65_537 + rt.rank) % 2**63)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg) * group["lr_scale"]

    loss = torch.zeros((), device=rt.device)
    for micro_step in range(n_micro):
        interrupt(micro_step)
        inputs, targets = next(batches)
        # backward() adds gradients up. The loss is a mean, so each micro-batch counts 1 / n_micro. Ranks exchange
        # gradients in the last micro-step only.
        micro_loss = loss_fn(inputs, targets, sync=micro_step == n_micro - 1) / n_micro
        scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    loss = all_gather(loss[None], rt).mean()

    scaler.unscale_(optimizer)  # clip the gradient itself, not its multiple
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
    bad = (~torch.isfinite(loss + grad_norm)).float()
    # Fused optimizers skip the step on the device when it is 1: no host sync.
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    if rt.device.type != "mps" or not bad:  # MPS's do not
        optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=loss_fn.ddp is None)  # with DDP they are views into its buckets
    return loss, grad_norm, bad


def batches_of(state: TrainState, cfg: TrainConfig, rt: Runtime) -> Batches:
    """This rank's micro-batches, from where the run stands."""
    plan = state.plan
    batches = training_batches(
        state.train_data,
        seed=cfg.seed,
        consumed=state.progress.sequences,
        sequences_per_step=plan.sequences,
        batch_size=plan.batch_size,
        rank=rt.rank,
        world_size=rt.world_size,
    )
    return to_device(batches, rt.device)


def learning_rate(step: int, cfg: TrainConfig) -> float:
    return learning_rate_at(
        step,
        schedule=cfg.schedule,
        max_steps=cfg.max_steps,
        warmup_steps=cfg.warmup_steps,
        learning_rate=cfg.learning_rate,
        min_learning_rate=cfg.min_learning_rate,
        decay_share=cfg.decay_share,
    )


def due(step: int, interval: int, cfg: TrainConfig) -> bool:
    return step == cfg.max_steps or (interval > 0 and step % interval == 0)


# ---- What is logged


def progress_bar(cfg: TrainConfig, state: TrainState, rt: Runtime) -> tqdm:
    return tqdm(
        total=cfg.max_steps * state.tokens_per_step,
        initial=state.progress.step * state.tokens_per_step,
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        disable=not rt.is_main,
    )


def log_step(
    log: MetricsLog, bar: tqdm, cfg: TrainConfig, state: TrainState, values: list[float], speed: Speed
) -> None:
    """Log a step's loss, gradient norm and number of skipped steps so far, with its learning rate and speed."""
    step, (loss, grad_norm, bad_steps) = state.progress.step, values
    line = {"step": step, "tokens": step * state.tokens_per_step, "train_loss": loss}
    line |= {"lr": learning_rate(step - 1, cfg), "grad_norm": grad_norm, "bad_steps": int(bad_steps)}
    measured = speed.measure(step)
    log.write(line | measured)
    if speed.intervals == 2 and step < cfg.max_steps:  # the first steps are slower
        bar.write(speed.forecast(measured, cfg.max_steps - step))
    bar.set_postfix_str(f"step {step}, loss {loss:.3f}")


def save(cfg: TrainConfig, state: TrainState, writer: CheckpointWriter | None, wait: bool) -> None:
    """Write a checkpoint, in the background unless `wait`. A collective."""
    keep = writer is not None
    settings = cfg.plain() | {"dtype": dtype_name(state.dtype)}  # a resumed run keeps what "auto" chose
    contents = {"progress": asdict(state.progress), "settings": settings, "data": state.data_fingerprint}
    contents["optimizer"] = full_state(state.optimizer.state_dict(), keep)
    contents["scaler"] = state.scaler.state_dict()
    weights = full_state(state.model.state_dict(), keep)
    if writer:
        writer.save(state.progress.step, state.model.config, weights, contents, wait=wait)


# ---- Evaluation


def evaluate_and_log(
    loss_fn: LossFunction,
    state: TrainState,
    cfg: TrainConfig,
    signals: StopSignals,
    rt: Runtime,
    log: MetricsLog | None,
    bar: tqdm,
) -> int:
    """Validation loss and HellaSwag, if wanted. Returns 0, or the signal that cut it short."""
    progress, hellaswag = state.progress, dict[str, float]()
    with unsharded(state.model, cfg.parallel):
        val_loss, val_tokens, signum = evaluate(loss_fn, state, cfg.eval_tokens, signals, rt)
        if state.hellaswag and not signum:
            hellaswag, signum = score_hellaswag(loss_fn, state, signals, rt)
    if log and not signum:
        progress.best_val_loss = min(val_loss, progress.best_val_loss)
        tokens = progress.step * state.tokens_per_step
        log.write({"step": progress.step, "tokens": tokens, "val_loss": val_loss, **hellaswag})
        bar.write(
            f"step {progress.step}: validation loss {val_loss:.4f} nats per token over {val_tokens:,} tokens "
            f"(best: {progress.best_val_loss:.4f})"
            + "".join(f", {name} {value:.4f}" for name, value in hellaswag.items())
        )
    return signum


@torch.no_grad()
def evaluate(
    loss_fn: LossFunction, state: TrainState, max_tokens: int, signals: StopSignals, rt: Runtime
) -> tuple[float, int, int]:
    """The mean loss over the validation split, nats per token; over how many tokens; and 0.

    A signal to any rank cuts it short: then the last is its number, and the others are meaningless.
    """
    loss_fn.forward.eval()
    batches = evaluation_batches(
        state.val_data,
        batch_size=state.plan.batch_size,
        max_tokens=max_tokens,
        rank=rt.rank,
        world_size=rt.world_size,
    )
    sums = [torch.zeros(2, device=rt.device)]  # summed loss, tokens
    with closing(to_device(batches, rt.device)) as pairs:
        for inputs, targets in pairs:
            if signals.signum:
                break
            count = (targets >= 0).sum()
            sums.append(torch.stack([loss_fn(inputs, targets) * count, count]))
    loss_fn.forward.train()
    total = torch.stack(sums).cpu().double().sum(dim=0)
    own = torch.tensor([*total.tolist(), signals.signum], dtype=torch.float64)
    ranks = all_gather(own if rt.world_size == 1 else own.to(rt.device), rt).cpu()  # (world_size, 3)
    loss, count = ranks[:, :2].sum(dim=0).tolist()
    return loss / max(count, 1), int(count), int(ranks[:, 2].max())


def print_initial_loss(loss_fn: LossFunction, state: TrainState, signals: StopSignals, rt: Runtime, bar: tqdm) -> None:
    """The loss of one batch before the first step. A fresh model guesses, which costs ln(vocab_size) nats per token."""
    tokens = state.plan.batch_size * state.model.config.block_size * rt.world_size
    with unsharded(state.model, loss_fn.parallel):
        loss, _, signum = evaluate(loss_fn, state, tokens, signals, rt)
    if rt.is_main and not signum:
        vocab_size = state.model.config.vocab_size
        bar.write(f"loss before the first step: {loss:.4f}; ln({vocab_size}) = {math.log(vocab_size):.4f}")


def score_hellaswag(
    loss_fn: LossFunction, state: TrainState, signals: StopSignals, rt: Runtime
) -> tuple[dict[str, float], int]:
    """hellaswag_acc and hellaswag_acc_norm, and 0 or the number of a signal that cut it short.

    Uncompiled, because examples differ in length and each length would be compiled anew.
    """
    model = state.model.eval()
    verdicts = judge_all(
        model, state.hellaswag, state.plan.batch_size, loss_fn.autocast, rt, lambda _: not signals.signum
    )
    model.train()
    signum = signal_of_any(signals, rt)
    return {} if signum else {f"hellaswag_{name}": s.value for name, s in summarize(verdicts).items()}, signum


def next_commands(run: Path, data: str) -> str:
    name, data = shlex.quote(str(run)), shlex.quote(data)
    return (
        f'more of it:  python sample.py --model {name} --prompt "..."\n'
        f"in pictures: python visualize.py {name}\n"
        f"scored:      python eval.py {name} --tasks loss --data {data}"
    )


def write_passage(model: GPT, tokenizer: Tokenizer, max_new_tokens: int = 400) -> str:
    """The beginning of a document, as the model writes it."""
    training = model.training
    model.eval()
    begin = torch.tensor([[tokenizer.eot]], device=model.wte.weight.device)
    with attention_of_varying_shapes():
        ids = model.generate(begin, max_new_tokens, temperature=0.8, top_k=200, top_p=0.95)[0, 1:].tolist()
    model.train(training)
    return tokenizer.decode(ids[: ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids).strip()


def prepare_default_corpus(cfg: TrainConfig, rt: Runtime) -> None:
    """Prepare the default recipe's data if it is missing; any other missing data is an error.

    Rank 0 goes first, then one rank of each node that still lacks it: nodes may share a folder.
    """
    for turn in (rt.is_main, rt.local_rank == 0):
        with all_ranks_or_none(rt):
            if turn and cfg.data == TrainConfig.data and not Path(cfg.data).exists():
                script = Path(__file__).with_name("prepare_data.py")
                done = subprocess.run([sys.executable, script, "shakespeare"])
                if done.returncode and not Path(cfg.data).exists():  # it exists if another process was faster
                    raise UserError(f"{cfg.data} could not be prepared; see above")


if __name__ == "__main__":
    run_script(recorded(lambda: train(parse_config(sys.argv[1:]))), sturdy=True)
