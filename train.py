"""Train a GPT: `python train.py [CONFIG.toml] [--key value ...]`, under torchrun for several processes."""

import importlib.util
import platform
import subprocess
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import checkpoints, load_state, save_checkpoint
from config import TrainConfig, parse_config
from dataset import TokenDataset, evaluation_batches, read_meta, to_device, training_batches
from metrics import MetricsLog
from model import GPT, Generation, GPTConfig
from optim import learning_rate_at, make_optimizer
from runtime import Runtime, describe, peak_flops, pick_dtype, run_script, start
from tokenizer import Tokenizer, load_tokenizer


def train(cfg: TrainConfig) -> None:
    """One training run, from the data to a passage written by the trained model."""
    rt = start(cfg.device)
    say = print if rt.is_main else lambda *_: None
    run = Path("out") / cfg.run_name
    checkpoint = open_run(run, cfg, rt)

    prepare_default_corpus(cfg, rt)
    meta = read_meta(cfg.data)
    tokenizer = load_tokenizer(meta["tokenizer"])
    model = build_model(cfg, meta["vocab_size"], tokenizer.eot, checkpoint, rt)
    block_size = model.config.block_size
    verify = cfg.verify_data and rt.local_rank == 0
    train_data = TokenDataset(cfg.data, "train", block_size, verify)
    val_data = TokenDataset(cfg.data, "val", block_size, verify)
    step_windows, batch_size, accumulation_steps = split_batch(cfg, block_size, rt.world_size)

    dtype = pick_dtype(cfg.dtype, rt.device)
    autocast = torch.autocast(rt.device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(rt.device.type, enabled=dtype == torch.float16)
    optimizer = make_optimizer(model, cfg.optimizer, cfg.learning_rate, cfg.weight_decay, cfg.beta1, cfg.beta2)
    step = 0
    if checkpoint:
        state = load_state(checkpoint)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step = state["step"]
        say(f"resuming from {checkpoint}")
    say(
        f"training {model.num_params():,} parameters on {describe(rt.device)} in {str(dtype).removeprefix('torch.')}, "
        f"{rt.world_size} process{'es' * (rt.world_size > 1)}, {step_windows} windows of {block_size} tokens a step "
        f"({accumulation_steps} x {batch_size} per process), {cfg.max_steps} steps"
    )
    if rt.is_main and not checkpoint:
        run.mkdir(parents=True, exist_ok=True)
        cfg.save(run / "config.toml", versions())
    log = MetricsLog(run, vars(cfg), step, cfg.wandb_project) if rt.is_main else None

    forward = compiled(model, batch_size, autocast) if cfg.compile else model
    parallel = DistributedDataParallel(forward) if rt.world_size > 1 else None
    batches = to_device(
        training_batches(
            train_data,
            seed=cfg.seed,
            consumed=step * step_windows,
            step_windows=step_windows,
            batch_size=batch_size,
            rank=rt.rank,
            world_size=rt.world_size,
        ),
        rt.device,
    )
    step_tokens = step_windows * block_size
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

    model.train()
    while step < cfg.max_steps:
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

        loss = torch.zeros((), device=rt.device)
        for micro_step in range(accumulation_steps):
            inputs, targets = next(batches)
            with synchronised_if(parallel, micro_step == accumulation_steps - 1):
                with autocast:
                    micro_loss = (parallel or forward)(inputs, targets)[1] / accumulation_steps
                scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        step += 1
        tokens = step * step_tokens
        bar.update(step_tokens)
        if due(step, cfg.log_interval, cfg):
            train_loss = mean_over_processes(loss, rt)
            seconds = time.perf_counter() - clock
            tokens_per_sec = (step - clock_step) * step_tokens / seconds
            figures = {
                "step": step,
                "tokens": tokens,
                "train_loss": train_loss,
                "lr": learning_rate,
                "grad_norm": grad_norm.item(),
                "tokens_per_sec": tokens_per_sec,
            }
            if peak:
                figures["mfu"] = tokens_per_sec * flops_per_token / (peak * rt.world_size)
            if log:
                log.write(figures)
            bar.set_postfix_str(f"step {step}, loss {train_loss:.3f}")
            clock, clock_step = time.perf_counter(), step
        paused = time.perf_counter()
        if due(step, cfg.eval_interval, cfg):
            val_loss, val_tokens = evaluate(forward, val_data, batch_size, cfg.eval_tokens, autocast, rt)
            if log:
                log.write({"step": step, "tokens": tokens, "val_loss": val_loss})
                bar.write(f"step {step}: validation loss {val_loss:.4f} nats per token over {val_tokens:,} tokens")
        if due(step, cfg.checkpoint_interval, cfg) and rt.is_main:
            state = {"step": step, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            save_checkpoint(run, step, model, tokenizer, state, cfg.keep_checkpoints)
        clock += time.perf_counter() - paused  # tokens_per_sec is that of training alone
    bar.close()
    batches.close()
    if log:
        log.close()
        say(f"saved {checkpoints(run)[-1]}; a passage it writes:\n")
        write_passage(model, tokenizer)
        say(f'\nmore of it: python sample.py --prompt "..." --model {checkpoints(run)[-1]}')


def due(step: int, interval: int, cfg: TrainConfig) -> bool:
    return step == cfg.max_steps or (interval > 0 and step % interval == 0)


def open_run(run: Path, cfg: TrainConfig, rt: Runtime) -> Path | None:
    """The checkpoint to continue from, or None for a new run.

    Raises:
        ValueError: the run exists and is not to be continued, or what logs it is not installed.
    """
    found = checkpoints(run)
    if cfg.wandb_project and not importlib.util.find_spec("wandb"):
        raise ValueError("wandb_project is set, but wandb is not installed; pip install wandb")
    if run.exists() and any(run.iterdir()) and not cfg.resume:
        raise ValueError(f"{run} holds a run already; add --resume to continue it, or --run_name NAME for another")
    return found[-1] if found else None


def prepare_default_corpus(cfg: TrainConfig, rt: Runtime) -> None:
    """Make the data of the default setting where it is missing; whatever else is missing is an error."""
    if cfg.data == TrainConfig.data and not Path(cfg.data).exists() and rt.local_rank == 0:
        script = Path(__file__).with_name("prepare_data.py")
        if subprocess.run([sys.executable, script, "shakespeare"]).returncode:
            sys.exit(1)
    if rt.world_size > 1:
        dist.barrier()


def build_model(cfg: TrainConfig, vocab_size: int, eot: int, checkpoint: Path | None, rt: Runtime) -> GPT:
    """The model of a checkpoint, of loaded weights, or a fresh one.

    Raises:
        ValueError: loaded weights of another shape or vocabulary than the settings and the data.
    """
    sizes = {"n_layer": cfg.n_layer, "n_head": cfg.n_head, "n_embd": cfg.n_embd, "block_size": cfg.block_size}
    sizes = {name: value for name, value in sizes.items() if value}
    if cfg.init_from == "scratch" and not checkpoint:
        torch.manual_seed(cfg.seed)
        fresh = {"dropout": cfg.dropout, "initializer_range": cfg.initializer_range, "eos_token_id": eot}
        return GPT(GPTConfig(vocab_size=vocab_size, **fresh, **sizes)).to(rt.device)
    source = checkpoint or cfg.init_from
    # A shorter block_size cuts the position table; a checkpoint's was cut when its run began.
    model = GPT.from_pretrained(
        source, dtype=torch.float32, device=rt.device, dropout=cfg.dropout, block_size=sizes.get("block_size")
    )
    for name, value in {**sizes, "vocab_size": vocab_size}.items():
        loaded = getattr(model.config, name)
        if loaded != value:
            where = f"the data at {cfg.data}" if name == "vocab_size" else "the settings"
            raise ValueError(f"{source} has {name} {loaded}, {where} {value}; they must be equal")
    return model


def split_batch(cfg: TrainConfig, block_size: int, world_size: int) -> tuple[int, int, int]:
    """Windows a step over all processes, windows a micro-step of one process, and its micro-steps.

    Raises:
        ValueError: total_batch_size does not divide into them.
    """
    step_windows, rest = divmod(cfg.total_batch_size, block_size)
    share, rest_windows = divmod(step_windows, world_size)
    batch_size = min(cfg.batch_size, share)
    if rest or rest_windows or not share or share % batch_size:
        unit = block_size * world_size * min(cfg.batch_size, max(1, share))
        nearest_fit = max(1, round(cfg.total_batch_size / unit)) * unit
        raise ValueError(
            f"total_batch_size {cfg.total_batch_size} does not divide into batch_size {cfg.batch_size} windows of "
            f"{block_size} tokens on {world_size} process{'es' * (world_size > 1)}; {nearest_fit} would"
        )
    return step_windows, batch_size, share // batch_size


def compiled(model: GPT, batch_size: int, autocast: AbstractContextManager) -> nn.Module:
    """The model behind torch.compile, or as it is, with a warning, where no compiler works."""
    module = torch.compile(model)
    idx = torch.zeros(batch_size, model.config.block_size, dtype=torch.int64, device=model.wte.weight.device)
    try:
        with autocast:
            module(idx, idx)
        return module
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # inductor, Triton and the C++ compiler each raise their own
        reason = str(error).strip().splitlines()[0][:200]
        warnings.warn(
            f"torch.compile does not work here, going on without ({type(error).__name__}: {reason})", stacklevel=2
        )
        torch._dynamo.reset()
        return model


def synchronised_if(parallel: DistributedDataParallel | None, last: bool) -> AbstractContextManager:
    """Gradients are reduced over the processes in the last micro-step only."""
    return parallel.no_sync() if parallel and not last else nullcontext()


def mean_over_processes(value: Tensor, rt: Runtime) -> float:
    if rt.world_size > 1:
        dist.all_reduce(value)
    return value.item() / rt.world_size


@torch.no_grad()
def evaluate(
    forward: nn.Module,
    data: TokenDataset,
    batch_size: int,
    max_tokens: int,
    autocast: AbstractContextManager,
    rt: Runtime,
) -> tuple[float, int]:
    """The mean loss over the validation windows, nats per token, and over how many tokens."""
    forward.eval()
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, tokens
    batches = evaluation_batches(
        data, batch_size=batch_size, max_tokens=max_tokens, rank=rt.rank, world_size=rt.world_size
    )
    sums: list[Tensor] = []
    for inputs, targets in to_device(batches, rt.device):
        with autocast:
            loss = forward(inputs, targets)[1]
        count = (targets >= 0).sum()
        sums.append(torch.stack([loss * count, count]))
    if sums:
        total += torch.stack(sums).cpu().double().sum(dim=0)
    if rt.world_size > 1:
        total = total.float().to(rt.device) if rt.device.type == "mps" else total.to(rt.device)
        dist.all_reduce(total)
    forward.train()
    return (total[0] / total[1]).item(), int(total[1])


def write_passage(model: GPT, tokenizer: Tokenizer, max_new_tokens: int = 400) -> None:
    """Print the beginning of a document as the model writes it."""
    model.eval()
    writing = Generation(model, [[tokenizer.eot]], max_new_tokens, temperature=0.8, top_k=200, top_p=0.95)
    ids = [writing.step()[0].item() for _ in range(max_new_tokens)]
    print(tokenizer.decode(ids[: ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids).strip())


def versions() -> list[str]:
    """What the run was made with, for the head of its config.toml."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return [f"Python {platform.python_version()}, torch {torch.__version__}, commit {commit}"]


if __name__ == "__main__":
    config = parse_config(sys.argv[1:])
    run_script(lambda: train(config))
