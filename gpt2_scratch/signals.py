"""SIGTERM, SIGINT and SIGUSR1 end training after saving, at a step's end or, where steps are slow, within one."""

import os
import signal
import socket
import time
from contextlib import AbstractContextManager
from threading import Thread
from typing import Any


def launcher_is_gone(launcher: int) -> bool:
    """Whether the torchrun that started this process (with that process id) is gone."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != launcher


class StopSignals(AbstractContextManager):
    """Within the block SIGTERM, SIGINT and SIGUSR1 request a stop: `signum` is the first one's number, 0 until then.

    A second signal ends the process at once, from a thread, because the main thread may be blocked in a library.
    Schedulers signal a process both directly and through its launcher, so signals within a second count as one. A
    torchrun that is gone can't forward signals any more; that counts as SIGTERM.

    Args:
        launcher: torchrun's process id when this process started.
    """

    # Windows has no SIGUSR1.
    KINDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, launcher: int):
        self.launcher = launcher

    def __enter__(self) -> "StopSignals":
        self.signum = 0
        self.inlet, self.outlet = socket.socketpair()  # Windows can't use a pipe here
        self.outlet.setblocking(False)
        self.old_handlers = {kind: signal.signal(kind, lambda *_: None) for kind in self.KINDS}
        self.old_outlet = signal.set_wakeup_fd(self.outlet.fileno(), warn_on_full_buffer=False)
        Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        signal.set_wakeup_fd(self.old_outlet)
        for kind, handler in self.old_handlers.items():
            signal.signal(kind, handler)
        self.outlet.close()

    def _watch(self) -> None:
        self.inlet.settimeout(1)
        while True:
            try:
                received = self.inlet.recv(1)
            except TimeoutError:
                # torchrun stops its processes before it exits, unless it was killed: then nothing else would.
                if launcher_is_gone(self.launcher) and not self.signum:
                    self.signum, first = signal.SIGTERM, time.monotonic()
                continue
            if not received:
                break
            if received[0] not in self.KINDS:
                continue
            if not self.signum:
                self.signum, first = received[0], time.monotonic()
            elif time.monotonic() - first > 1:
                os._exit(128 + received[0])
        self.inlet.close()
