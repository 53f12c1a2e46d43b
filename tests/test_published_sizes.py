"""The four GPT-2 sizes and GPT-1 at full size. Takes minutes and 20 GiB: `pytest -m slow -n 0 -s`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

SIZES = {
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
    "openai-gpt": (12, 12, 768, 116_534_784),
}

# In its own process, because peak memory is counted over a process's whole life.
LOAD = """
import json, sys, torch
from model import GPT
def status(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024
before = status("VmRSS")
model = GPT.from_pretrained(sys.argv[1])
peak = status("VmHWM") - before
idx = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    torch.save(model(idx)[0].clone(), sys.argv[3])
print(json.dumps({"parameters": model.num_params(), "peak": peak}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_published_size_loads_exactly_and_in_little_memory(name: str, tmp_path: Path) -> None:
    n_layer, n_head, n_embd, parameters = SIZES[name]
    torch.manual_seed(0)
    if name == "openai-gpt":
        theirs = OpenAIGPTLMHeadModel(OpenAIGPTConfig()).eval()
    else:
        theirs = GPT2LMHeadModel(GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)).eval()
    idx = torch.randint(40000, (2, 24))
    with torch.no_grad():
        expected = theirs(idx).logits
    theirs.save_pretrained(tmp_path / "model")
    del theirs
    root = Path(__file__).parent.parent
    arguments = [str(tmp_path / "model"), json.dumps(idx.tolist()), str(tmp_path / "logits.pt")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], cwd=root, capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout)
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    difference = (torch.load(tmp_path / "logits.pt", weights_only=True) - expected).abs().max().item()
    print(
        f"\n{name}: largest difference {difference:.1e}, peak {measured['peak'] / size:.3f} times {size / 1e9:.2f} GB"
    )
    assert measured["parameters"] == parameters
    assert difference < 1e-4
    assert measured["peak"] < 1.2 * size
