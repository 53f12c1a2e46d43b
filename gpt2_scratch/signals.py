"""SIGTERM, SIGINT and SIGUSR1 end training after saving, at a step's end or, where steps are slow, within one."""

import os
import signal
import socket
import time
from contextlib import AbstractContextManager
from threading import Thread
from typing import Any


def launcher_is_gone(launcher: int) -> bool:
    """Whether the torchrun that started this process, of that process number, has ended before it."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != launcher


class StopSignals(AbstractContextManager):
    """Within it SIGTERM, SIGINT and SIGUSR1 ask for an end: `signum` is the number of the first, 0 before.

    A second one ends the process at once; a thread sees to that, as the main one may be waiting in a library.
    Schedulers signal a process directly and through its launcher, so signals within a second count as one. A torchrun
    that is gone, which would have passed signals on, counts as SIGTERM.

    Args:
        launcher: the process number that torchrun had when this process started.
    """

    # Windows has no SIGUSR1.
    KINDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, launcher: int):
        self.launcher = launcher

    def __enter__(self) -> "StopSignals":
        self.signum = 0
        self.inlet, self.outlet = socket.socketpair()  # a pipe would not do on Windows
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
                # torchrun ends its processes before itself, unless it was killed: then nobody else would end these.
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
