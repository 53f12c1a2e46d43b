"""Devices: their peaks, and their names to NCCL."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gpt2_scratch import distributed
from gpt2_scratch.device import peak_flops, peak_flops_of


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA A40", 149.7),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("Tesla T4", 65),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
    ],
)
def test_peak_is_that_of_this_very_card(name: str, tera: float | None) -> None:
    """A card that is not in the table has no MFU, which is better than a wrong one."""
    assert peak_flops_of(name) == (tera and tera * 1e12)


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_nccl_learns_each_process_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it connects late, and every barrier warns that it does not know which device to use."""
    peers = SimpleNamespace(
        store=None, training=False, end=lambda: None, all_gather_object=lambda value, error=None: [value, value]
    )
    seen: dict[str, Any] = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "1")
    monkeypatch.setattr(distributed, "meet", lambda *_: peers)
    monkeypatch.setattr(distributed, "pick_device", lambda *_: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: seen.update(options, backend=backend))
    with distributed.process_group():
        pass
    assert seen["backend"] == "nccl" and seen["device_id"] == torch.device("cuda", 1)
