"""What a stage's record and the report say of the texts of a blend."""

from pathlib import Path

from ..data.order import blend_of
from ..data.windows import Windows
from ..loop.held_out import FIGURES
from ..loop.metrics import read_row

EPOCHS = "data_epochs"


def text_facts(metrics: Path | None, stage: str, windows: Windows) -> dict[str, dict[str, float]] | None:
    """Held-out figures of each text at a stage's last evaluation, and how often it was read, from its lines of ``metrics.jsonl``.

    Args:
        metrics: The file; None on ranks other than 0.
        stage: Name of the stage.
        windows: Its training windows.

    Returns:
        Name of each text -> ``held_out_kl`` (with a teacher), ``held_out_perplexity`` and ``data_epochs``; None if the windows are those of
        one text, or without the file.
    """
    blend = blend_of(windows)
    if blend is None or metrics is None or not metrics.is_file():
        return None
    read = (read_row(line) for line in metrics.read_text(encoding="utf-8", errors="replace").split("\n"))
    found: dict[str, dict[str, float]] = {name: {} for name in blend.names}
    for row in read:
        if row is None or row["stage"] != stage:
            continue
        for name in blend.names:
            # later lines replace earlier ones
            found[name] |= {figure: value for figure in (*FIGURES, EPOCHS) if (value := row.get(f"{figure}.{name}")) is not None}
    return found
