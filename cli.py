"""What every script does at its command line: name the nearest word, end with one sentence."""

import argparse
import contextlib
import difflib
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO


class UserError(ValueError):
    """What the user can mend: bad input, a file that is missing or damaged, a node that is gone.

    It ends a script with one line and exit code 1; any other exception is a bug and keeps its traceback.
    """


# OSErrors of the machine's state, not of the code: these end in one line as well.
MACHINE_ERRORS = {
    getattr(errno, name, None)
    for name in ("EACCES", "EDQUOT", "EFBIG", "EIO", "EMFILE", "ENFILE", "ENOSPC", "EPERM", "EROFS", "ESTALE")
}


def nearest(word: str, known: list[str]) -> str:
    """ "; did you mean X?" where one of the known words is close, else nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def count(text: str, least: int = 1, most: int = 10**9) -> int:
    """The type of an argument: a whole number from `least` to `most`."""
    if not text.isascii() or not text.isdecimal() or int(text[:30]) < least:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number {'above 0' if least else 'of 0 or more'}")
    if len(text) > 30 or int(text) > most:
        raise argparse.ArgumentTypeError(f"{text} is more than {most:,}")
    return int(text)


class SturdyStream:
    """A standard stream whose failures are nobody's business: a closed terminal or a full disk ends the output only."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            return self._give_up(len(text))

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._give_up(0)

    def _give_up(self, n: int) -> int:
        self.stream = open(os.devnull, "w")
        return n

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def prepare_streams(sturdy: bool) -> None:
    """Give the process three standard streams that take any text.

    One that is closed becomes os.devnull (or a file opened next would get its number, and what is printed).
    Characters that the encoding lacks are written as escapes.

    Args:
        sturdy: whether the output is a commentary, whose loss must not end the program.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                number = -1  # taken by another file meanwhile
            if number >= 0:
                opened = os.open(os.devnull, os.O_RDWR)
                if opened != number:
                    os.dup2(opened, number)
                    os.close(opened)
            stream = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper) and name != "stdin":
            stream.reconfigure(errors="backslashreplace")
        if sturdy and name != "stdin":
            setattr(sys, name, SturdyStream(stream))


def run_script(main: Callable[[], None], sturdy: bool = False) -> None:
    """Run a script's main function; bad input ends it with one sentence and exit code 1.

    Args:
        sturdy: see `prepare_streams`.
    """
    prepare_streams(sturdy)
    try:
        main()
        return sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads any more: `head` has seen enough. What is still to be written is dropped.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        end: str | int = 141  # as SIGPIPE would end it
    except UserError as error:
        end = f"error: {error}"
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        end = f"error: {error}"
    except KeyboardInterrupt:
        end = 130
    sys.exit(end)  # outside `except`, so the traceback no longer keeps resources alive
