"""Windows and macOS: nothing that only Linux or POSIX has is needed to import, train, resume and sample."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT, TINY

# What other systems lack is taken away once the libraries, which know their platform, have been imported.
DRIVER = """
import importlib, os, pathlib, select, signal, sys
import datasets, filelock, matplotlib.pyplot, numpy, safetensors.torch, tiktoken, tokenizers, torch, tqdm, transformers
import torch._dynamo, torch.distributed.tensor
for name in ("fcntl", "grp", "pty", "pwd", "readline", "resource", "termios", "tty"):
    sys.modules[name] = None
taken = [(os, name) for name in ("O_DIRECT", "getuid", "nice", "sched_getaffinity", "set_blocking")]
taken += [(select, "poll"), (select, "epoll"), (signal, "SIGHUP"), (signal, "SIGUSR1"), (signal, "SIGUSR2")]
for module, name in taken:
    if hasattr(module, name):
        delattr(module, name)
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path: not str(path).startswith("/proc") and exists(path)
sys.platform = "another"

root, *flags = sys.argv[1:]
sys.path.insert(0, root)
paths = [*pathlib.Path(root).glob("*.py"), *pathlib.Path(root, "gpt2_scratch").rglob("*.py")]
names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
modules = {name: importlib.import_module(name) for name in names}
write = modules["gpt2_scratch.metrics"].MetricsLog.write
def write_then_signal(log, line):
    write(log, line)
    if line["step"] == 5:
        signal.raise_signal(signal.SIGINT)
modules["gpt2_scratch.metrics"].MetricsLog.write = write_then_signal
try:
    modules["train"].train(modules["gpt2_scratch.config"].parse_config(flags))
    raise AssertionError("not stopped")
except SystemExit as end:
    assert end.code == 130, end.code
modules["gpt2_scratch.metrics"].MetricsLog.write = write
modules["train"].train(modules["gpt2_scratch.config"].parse_config([*flags, "--resume"]))
sys.argv[1:] = ["--prompt", "to be", "--max_new_tokens", "9"]
modules["sample"].sample(modules["sample"].parse_args())
print(sorted(modules))
"""


def test_every_module_imports_and_the_main_path_runs_without_posix(workplace: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(ROOT), *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(f"'{name}'" in done.stdout for name in ("train", "gpt2_scratch.metrics", "gpt2_scratch.cpu.decode"))
    assert "resuming from" in done.stdout
