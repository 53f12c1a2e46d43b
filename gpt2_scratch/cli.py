"""The command line, for every script: one sentence for bad input, standard streams that cannot fail."""

import argparse
import contextlib
import difflib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO


class UserError(ValueError):
    """Something the user can fix: bad input, a missing or damaged file, a lost node.

    Ends a script with one line and exit code 1; any other exception is a bug and keeps its traceback.
    """

    silent = False  # whether another process prints it


# OSErrors that tell of the machine's state, not of a bug: these end in one line as well.
MACHINE_ERRORS = {
    getattr(errno, name, None)
    for name in ("EACCES", "EDQUOT", "EFBIG", "EIO", "EMFILE", "ENFILE", "ENOSPC", "EPERM", "EROFS", "ESTALE")
}


def nearest(word: str, known: list[str]) -> str:
    """ "; did you mean X?" if one of the known words is close, else ""."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def count(text: str, least: int = 1, most: int = 10**9) -> int:
    """An argument's type: a whole number from `least` to `most`."""
    if not text.isascii() or not text.isdecimal() or int(text[:30]) < least:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of {least} or more")
    if len(text) > 30 or int(text) > most:
        raise argparse.ArgumentTypeError(f"{text} is more than {most:,}")
    return int(text)


def number(text: str, valid: Callable[[float], bool], expected: str) -> float:
    """Argument type: a number that `valid` accepts; `expected` ends the message "... is not"."""
    with contextlib.suppress(ValueError):
        if valid(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not {expected}")


def check_new_file(path: Path) -> None:
    """Raises UserError: a file cannot be made there, or there is one already. To be called before the work."""
    if path.exists():
        raise UserError(f"{path} already exists; remove it or choose another file")
    if not os.access(path.parent, os.W_OK):
        problem = "is not a folder to write to" if path.parent.exists() else "does not exist"
        raise UserError(f"{path} cannot be written: {path.parent} {problem}; choose another file")


def as_text(argument: str) -> str:
    """An argument's type: text, with bytes that are not UTF-8 replaced by U+FFFD."""
    return argument.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Output:
    """Standard output or standard error. After a failed write the rest is discarded.

    Args:
        stream: the stream to wrap.
        sturdy: ignore the failure; else it ends the program.
    """

    def __init__(self, stream: TextIO, sturdy: bool):
        self.stream, self.sturdy = stream, sturdy

    def write(self, text: str) -> int:
        with self._guard():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._guard():
            self.stream.flush()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # At the file descriptor, so that the interpreter's own flush at exit does not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.sturdy:
                return
            if error.errno in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
                sys.exit(141)  # as SIGPIPE would: the reader, say `head`, is gone
            raise UserError(f"standard output cannot be written: {error}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class ClosedInput(io.RawIOBase):
    """Standard input of a process that was started without one."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raise UserError("standard input is closed")


def prepare_streams(sturdy: bool) -> None:
    """Make the three standard streams usable for any text, however the process was started.

    Characters missing from an encoding are written as escapes; undecodable bytes are read as U+FFFD.

    Args:
        sturdy: standard output is only commentary, whose loss must not end the program. Standard error always is.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: occupy its descriptor, or the next file opened would receive what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        stream = getattr(sys, name)
        if stream is None and name == "stdin":
            stream = io.TextIOWrapper(io.BufferedReader(ClosedInput()))
        elif stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if name == "stdin" else "backslashreplace")
        setattr(sys, name, stream if name == "stdin" else Output(stream, sturdy or name == "stderr"))


def run_script(main: Callable[[], None], sturdy: bool = False) -> None:
    """Run a script's main function; bad input ends it with one sentence and exit code 1.

    Args:
        sturdy: see `prepare_streams`.
    """
    prepare_streams(sturdy)
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # while a failure can still be reported
        return
    except UserError as error:
        end: str | int = 1 if error.silent else f"error: {error}"
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and error.errno not in MACHINE_ERRORS:
            raise
        end = f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        # torch raises OutOfMemoryError, a RuntimeError, for GPUs and a plain RuntimeError for the CPU.
        reason = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and "allocate" not in reason:
            raise
        end = f"error: out of memory ({reason}); a smaller batch or model takes less"
    except KeyboardInterrupt:
        end = 130
    sys.exit(end)  # outside `except`, so the traceback no longer keeps resources alive
