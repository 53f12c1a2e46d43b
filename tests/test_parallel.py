"""A model in shares: what each process holds, and what comes together again."""

import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from gpt2_scratch import optim
from gpt2_scratch.optim import make_optimizer
from gpt2_scratch.parallel import full_state, shard, shard_optimizer_state, unsharded
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=16, vocab_size=37, n_layer=2, n_head=2, n_embd=18)  # 18 rows: not a multiple of 4
IDX = torch.arange(34).view(2, 17) % 37


def fresh() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def step(model: GPT, optimizer: torch.optim.Optimizer) -> None:
    model(IDX[:, :-1], IDX[:, 1:])[1].backward()
    optimizer.step()
    optimizer.zero_grad()


def held(module: nn.Module) -> int:
    return sum(p.to_local().numel() for p in module.parameters())


def in_each_process(rank: int, world_size: int, port: int, folder: Path) -> None:
    model, replica, alone = fresh(), fresh(), fresh()
    optimizer_alone = make_optimizer(alone, "muon", 1e-2, 0.1, 0.9, 0.95, split_qkv=True)
    step(alone, optimizer_alone)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    zero2 = fresh()
    shard(zero2, "zero2", torch.float32)
    step(zero2, make_optimizer(zero2, "muon", 1e-2, 0.1, 0.9, 0.95, split_qkv=True))
    weights = full_state(zero2.state_dict(), rank == 0)
    if rank == 0:
        torch.testing.assert_close(weights, dict(alone.state_dict()), atol=1e-5, rtol=1e-5)
    shard(model, "fsdp", torch.float32)
    optimizer, optimizer_of_replica = (
        make_optimizer(m, "muon", 1e-2, 0.1, 0.9, 0.95, split_qkv=True) for m in (model, replica)
    )
    orthogonalized: list[int] = []
    whole = optim.orthogonalize
    optim.orthogonalize = lambda x, parts: (orthogonalized.append(len(x)), whole(x, parts))[1]
    step(model, optimizer)
    step(replica, optimizer_of_replica)
    assert max(orthogonalized) == 1, "two layers in four processes: no rank orthogonalizes both matrices of a shape"
    torch.testing.assert_close(replica.state_dict(), alone.state_dict(), atol=1e-5, rtol=1e-5)
    own = held(model)
    moments = sum(
        value.to_local().numel() for state in optimizer.state.values() for value in state.values() if value.dim()
    )

    with unsharded(model, "fsdp"):
        if rank == 0:  # alone: without the others it could gather nothing
            logits = model(IDX[:, :-1])[0]
            torch.testing.assert_close(logits, alone(IDX[:, :-1])[0], atol=1e-5, rtol=1e-5)
    assert held(model) == own, "the shares are back"

    weights, state = full_state(model.state_dict(), rank == 0), full_state(optimizer.state_dict(), rank == 0)
    if rank == 0:
        torch.testing.assert_close(weights, dict(alone.state_dict()), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state, optimizer_alone.state_dict(), atol=1e-5, rtol=1e-5)
    else:
        assert not any(isinstance(value, torch.Tensor) for value in weights.values())
    states = [state]
    dist.broadcast_object_list(states)
    again = make_optimizer(model, "muon", 1e-2, 0.1, 0.9, 0.95, split_qkv=True)
    again.load_state_dict(states[0])
    shard_optimizer_state(again)
    for p, values in optimizer.state.items():
        for key, value in values.items():
            loaded = again.state[p][key]
            assert torch.equal(*(v.to_local() if v.dim() else v for v in (value, loaded)))
    torch.save({"weights": own, "moments": moments}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_each_process_holds_its_share(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    method = "spawn"
    if "forkserver" in torch.multiprocessing.get_all_start_methods():
        method = "forkserver"  # imports once rather than in each process
        torch.multiprocessing.set_forkserver_preload(
            ["gpt2_scratch.parallel", "torch.distributed.fsdp", "torch._dynamo"]
        )
    torch.multiprocessing.start_processes(in_each_process, (4, port, tmp_path), nprocs=4, start_method=method)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    n_params = sum(p.numel() for p in GPT(CONFIG).parameters())
    n_matrices = sum(p.numel() for name, p in GPT(CONFIG).named_parameters() if name.startswith("h.") and p.dim() == 2)
    assert sum(share["weights"] for share in shares) == n_params
    assert sum(share["moments"] for share in shares) == 2 * n_params - n_matrices, "Muon's matrices have one moment"
    assert max(share["weights"] for share in shares) < 0.32 * n_params
