"""Progress of a training stage: a rich bar on a terminal, otherwise a plain line every few seconds."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

RATE_WINDOW_SECONDS = 30.0
"""Speed is averaged over this time, so that one slow step does not make the time left jump."""


def print_line(console: "Console", text: str, style: str = "") -> None:
    """Print one line of a run's output, without rich markup (names may contain brackets) and without wrapping in logs."""
    console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)


class Progress(Protocol):
    """Receiver of the training loop's progress."""

    def start(self, label: str, total: int, done: int) -> None:
        """Begin a stage of ``total`` optimizer steps, of which earlier starts have taken ``done``."""
        ...

    def update(self, step: int, loss: float | None, tokens: int) -> None:
        """Report optimizer step ``step`` with its input tokens. The loss is None when the step had no token to predict."""
        ...

    def stop(self) -> None:
        """End the stage, after success or failure. May be called twice."""
        ...


class NoProgress:
    """Shows nothing: for ranks other than 0, and for tests."""

    def start(self, label: str, total: int, done: int) -> None:
        """Nothing to show."""

    def update(self, step: int, loss: float | None, tokens: int) -> None:
        """Nothing to show."""

    def stop(self) -> None:
        """Nothing to show."""


class SpeedMeter:
    """Steps and tokens per second over the last half minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int, int]] = deque()  # (time, step, tokens so far)

    def start(self, step: int) -> None:
        """Start measuring now, at ``step``."""
        self._marks = deque([(self._clock(), step, 0)])

    def add(self, step: int, tokens: int) -> None:
        """Record a finished step and its tokens."""
        now = self._clock()
        self._marks.append((now, step, self._marks[-1][2] + tokens))
        # keep two marks even when one step takes longer than the window: a rate needs both
        while len(self._marks) > 2 and now - self._marks[0][0] > RATE_WINDOW_SECONDS:
            self._marks.popleft()

    def rates(self) -> tuple[float, float]:
        """(steps, tokens) per second; (0.0, 0.0) before the first step."""
        first, last = self._marks[0], self._marks[-1]
        seconds = last[0] - first[0]
        return ((last[1] - first[1]) / seconds, (last[2] - first[2]) / seconds) if seconds > 0 else (0.0, 0.0)


class LineProgress:
    """Plain lines for logs: the first step, then one every ``interval`` seconds, then the last step."""

    def __init__(self, console: "Console", *, interval: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._interval = interval
        self._clock = clock
        self._meter = SpeedMeter(clock)
        self._label, self._total, self._last = "", 0, float("-inf")

    def start(self, label: str, total: int, done: int) -> None:
        """Start a stage. Nothing is printed before its first step."""
        # minus infinity: the first step is always printed
        self._label, self._total, self._last = label, total, float("-inf")
        self._meter.start(done)

    def update(self, step: int, loss: float | None, tokens: int) -> None:
        """Print a line if the interval has passed or the step is the last."""
        self._meter.add(step, tokens)
        now = self._clock()
        if step < self._total and now - self._last < self._interval:
            return
        self._last = now
        steps_rate, tokens_rate = self._meter.rates()
        left = format_seconds((self._total - step) / steps_rate) if steps_rate else "?"
        # rounded down: 100 % only after the last step
        share = 100 * step // self._total
        text = f"{self._label}  step {step}/{self._total} ({share}%)  loss {_loss(loss)}  {tokens_rate:,.0f} tokens/s  {left} left"
        print_line(self._console, text)

    def stop(self) -> None:
        """End the stage; lines need no clean-up."""


class BarProgress:
    """Live bar with tokens/s, loss and remaining time."""

    def __init__(self, console: "Console", *, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._meter = SpeedMeter(clock)
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left"),
            console=console,
        )
        self._total = 0
        # invisible until start(), so that the console shows no empty bar
        self._task = self._bar.add_task("", visible=False, loss="-", rate="-", left="?")

    def start(self, label: str, total: int, done: int) -> None:
        """Show the bar."""
        self._meter.start(done)
        self._total = total
        # a resumed stage begins at the steps that earlier starts have taken
        self._bar.reset(self._task, total=total, completed=done, description=label, visible=True, loss="-", rate="-", left="?")
        self._bar.start()

    def update(self, step: int, loss: float | None, tokens: int) -> None:
        """Move the bar."""
        self._meter.add(step, tokens)
        steps_rate, tokens_rate = self._meter.rates()
        left = format_seconds((self._total - step) / steps_rate) if steps_rate else "?"
        self._bar.update(self._task, completed=step, loss=_loss(loss), rate=f"{tokens_rate:,.0f}", left=left)

    def stop(self) -> None:
        """Stop updating and leave the bar on the screen."""
        self._bar.stop()


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def make_progress(console: "Console | None", *, interval: float = 5.0) -> Progress:
    """Bar on a terminal, lines elsewhere, nothing when ``console`` is None."""
    if console is None:
        return NoProgress()
    return BarProgress(console) if console.is_terminal else LineProgress(console, interval=interval)


@contextmanager
def token_progress(console: "Console", label: str, total: int, unit: str = "tokens") -> Iterator[Callable[[int], None]]:
    """Progress of work that is counted in tokens and has no loss: a bar on a terminal, a line every 5 s in logs.

    Args:
        console: Console of the run.
        label: Name of the work.
        total: Number of tokens in all.
        unit: Name of the unit, if it is not tokens.

    Yields:
        A function that takes the number of tokens finished since the last call.
    """
    meter, done, told = SpeedMeter(), 0, time.monotonic()
    meter.start(0)
    with _token_bar(console, label, total, unit) as show:

        def advance(tokens: int) -> None:
            nonlocal done, told
            done += tokens
            meter.add(done, tokens)
            _, rate = meter.rates()
            left = format_seconds(max(0, total - done) / rate) if rate else "?"
            if console.is_terminal:
                show(done, f"{rate:,.0f}", left)
            # the last call always prints, so that a log ends with the total
            elif time.monotonic() - told >= 5.0 or done >= total:
                told = time.monotonic()
                text = f"{label}  {done:,}/{total:,} {unit}  {rate:,.0f} {unit}/s  {left} left"
                print_line(console, text)

        yield advance


@contextmanager
def _token_bar(console: "Console", label: str, total: int, unit: str) -> Iterator[Callable[[int, str, str], None]]:
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = [TextColumn(text) for text in (f"{{task.fields[rate]}} {unit}/s", "{task.fields[left]} left")]
    bar = RichProgress(
        TextColumn("{task.description}", markup=False), BarColumn(), *columns, console=console, disable=not console.is_terminal
    )
    with bar:
        task = bar.add_task(label, total=total, rate="-", left="?")
        yield lambda done, rate, left: bar.update(task, completed=done, rate=rate, left=left)


def part_lines(
    console: "Console", label: str, unit: str, *, interval: float = 5.0, clock: Callable[[], float] = time.monotonic
) -> Callable[[int, int], None]:
    """Lines about work that usually takes seconds: one every ``interval`` seconds, none for work that is done before.

    Returns:
        A function that takes the number of finished parts and of all.
    """
    told = clock()

    def show(done: int, total: int) -> None:
        nonlocal told
        if clock() - told >= interval and done < total:
            told = clock()
            print_line(console, f"{label}  {done:,}/{total:,} {unit}")

    return show


def format_seconds(seconds: float) -> str:
    """``0:07``, ``12:30`` or ``3:05:00``."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
