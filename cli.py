"""What every script does at its command line: name the nearest word, end with one sentence."""

import argparse
import difflib
import os
import select
import sys
from collections.abc import Callable


def nearest(word: str, known: list[str]) -> str:
    """ "; did you mean X?" where one of the known words is close, else nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def above_zero(text: str) -> int:
    """The type of an argument."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone; if so what is still to be written is dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; bad input ends it with one sentence and exit code 1.

    `python -X dev SCRIPT` shows the traceback instead.
    """
    try:
        main()
        return sys.stdout.flush()
    except (ValueError, OSError) as error:
        end: str | int = f"error: {error}"
        if isinstance(error, BrokenPipeError) and nobody_reads():
            end = 141  # as SIGPIPE would end it: `head` has seen enough
        elif sys.flags.dev_mode:
            raise
    except KeyboardInterrupt:
        end = 130
    sys.exit(end)  # out here, where nothing holds what the error left half-way: it is cleaned up before Python ends
