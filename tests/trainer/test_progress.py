import io

from rich.console import Console

from decoct.trainer.progress import BarProgress, LineProgress, NoProgress, SpeedMeter, format_seconds, make_progress, part_lines


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _lines(interval: float, steps: int, seconds_per_step: float, done: int = 0) -> list[str]:
    out, clock = io.StringIO(), _Clock()
    progress = LineProgress(Console(file=out, width=40), interval=interval, clock=clock)
    progress.start("distill", steps, done)
    for step in range(done + 1, steps + 1):
        clock.now += seconds_per_step
        progress.update(step, 2.0 / step, 1000)
    progress.stop()
    return out.getvalue().splitlines()


def test_lines_come_at_the_interval_and_at_both_ends() -> None:
    lines = _lines(interval=5.0, steps=20, seconds_per_step=1.0)
    assert [line.split("step ")[1].split("/")[0] for line in lines] == ["1", "6", "11", "16", "20"]


def test_a_line_tells_loss_speed_and_time_left_unbroken() -> None:
    line = _lines(interval=5.0, steps=20, seconds_per_step=0.5)[1]
    assert line == "distill  step 11/20 (55%)  loss 0.1818  2,000 tokens/s  0:04 left"


def test_speed_counts_only_what_this_start_did() -> None:
    line = _lines(interval=5.0, steps=20, seconds_per_step=0.5, done=10)[0]
    assert "step 11/20" in line
    assert "2,000 tokens/s" in line


def test_speed_forgets_what_is_long_ago() -> None:
    clock = _Clock()
    meter = SpeedMeter(clock)
    meter.start(0)
    for step in range(1, 101):
        clock.now += 10.0 if step <= 50 else 1.0
        meter.add(step, 100)
    assert meter.rates() == (1.0, 100.0)


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines() -> None:
    assert isinstance(make_progress(Console(file=io.StringIO(), force_terminal=True)), BarProgress)
    assert isinstance(make_progress(Console(file=io.StringIO())), LineProgress)
    assert isinstance(make_progress(None), NoProgress)


def test_the_bar_shows_loss_speed_and_count_for_one_stage_after_another() -> None:
    out, clock = io.StringIO(), _Clock()
    bar = BarProgress(Console(file=out, force_terminal=True, width=120), clock=clock)
    for label in ("01-distill", "02-qat"):
        bar.start(label, 4, 1)
        for step in (2, 3, 4):
            clock.now += 1.0
            bar.update(step, 1.5, 512)
        bar.stop()
        bar.stop()
    text = out.getvalue()
    assert "01-distill" in text
    assert "02-qat" in text
    assert "4/4" in text
    assert "1.5000" in text
    assert "512 tokens/s" in text


def test_seconds_read_as_a_clock() -> None:
    assert [format_seconds(s) for s in (6.6, 750, 11_100)] == ["0:07", "12:30", "3:05:00"]


def test_work_of_seconds_is_silent_and_longer_work_is_not() -> None:
    out, clock = io.StringIO(), _Clock()
    show = part_lines(Console(file=out, width=40), "measuring a model with a long name", "held-out windows", clock=clock)
    for done in range(8, 41, 8):
        clock.now += 4.0
        show(done, 40)
    name = "measuring a model with a long name"
    assert out.getvalue().splitlines() == [f"{name}  16/40 held-out windows", f"{name}  32/40 held-out windows"]
