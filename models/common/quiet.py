"""Silences transformers' load report and progress bars during a call, for which decoct prints its own lines."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


def say_on_stderr(line: str) -> None:
    """Print a line about work that takes a while; not to stdout, which may be JSON."""
    print(f"decoct: {line}", file=sys.stderr, flush=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside the block transformers logs only errors and shows no bars; afterwards the user's settings are restored."""
    from transformers.utils import logging

    # process-wide settings, so they are restored also after an error
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
