"""Where a long evaluation stands, on standard error: a live line on a terminal, a plain line now and then elsewhere."""

import sys
import time

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Context manager. ``what`` names what is done, ``text`` for one."""

    def __init__(self, what: str):
        self.what, self._live, self._share = what, None, 0.0

    def __enter__(self):
        self._began = self._told = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Live

            self._live = Live(
                BarColumn(20), TextColumn("{task.description}"), console=Console(stderr=True), transient=True
            )
            self._task = self._live.add_task(self.what, total=1.0)
            self._live.start()
        return self

    def __exit__(self, *_):
        if self._live is not None:
            self._live.stop()

    def show(self, share: float, done: int, unit: str) -> None:
        """``share`` of the whole is done, which is ``done`` of ``unit`` ("tokens"). Less than before: of a new one."""
        now, share = time.monotonic(), min(share, 1.0)
        if share < self._share:
            self._began = now
        self._share, seconds = share, max(1e-9, now - self._began)
        left = f"{_clock(seconds * (1 / share - 1))} left" if share > 0 else "…"
        line = f"{self.what}: {share:.1%}, {done:,} {unit}, {done / seconds:,.0f} {unit}/s, {left}"
        if self._live is not None:
            self._live.update(self._task, completed=share, description=line)
        elif now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
