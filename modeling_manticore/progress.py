"""Progress bars with rate and remaining time; whole lines now and then where nobody watches a terminal."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


QUIET_SECONDS = 20.0  # between two lines where there is no terminal; nothing is said of what takes less


def nobody_watches() -> bool:
    """Whether standard error is neither a terminal nor a notebook."""
    return not (sys.stderr.isatty() or any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__))


def progress_bar(iterable: Iterable | None = None, *, show: bool = True, **options: Any) -> tqdm:
    """
    A tqdm bar. Where standard error is neither a terminal nor a notebook it writes no control characters but a line
    every twenty seconds.

    Args:
        show: False for none. options: as of tqdm.
    """
    if not show or not nobody_watches():
        return tqdm(iterable, disable=not show, **options)
    return _Lines(iterable, **(options | {"mininterval": QUIET_SECONDS, "delay": QUIET_SECONDS, "leave": False}))


class _Lines(tqdm):
    """A bar as lines of text."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write one line; the total may have become known meanwhile."""
        counted = "{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"
        plain = "{desc}: {n_fmt} {unit}, {rate_fmt}, {elapsed} elapsed{postfix}"
        self.bar_format = plain if self.total is None else counted
        text = str(self) if msg is None else msg
        if text:
            print(text, file=sys.stderr, flush=True)
        return True

    def close(self) -> None:
        """End without a last line."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)
