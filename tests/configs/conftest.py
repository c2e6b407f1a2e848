"""A recipe from text: written to my.yaml in an empty working directory, so that messages can be compared whole."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from decoct.configs import Recipe, load_recipe
from decoct.models.common.errors import UserError


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """load(text, overrides) -> Recipe."""
    monkeypatch.chdir(tmp_path)

    def _load(text: str | bytes, overrides: Sequence[str] = ()) -> Recipe:
        Path("my.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return load_recipe("my.yaml", overrides)

    return _load


@pytest.fixture
def message(load: Callable[..., Recipe]) -> Callable[..., str]:
    """message(text, overrides) -> what the user is told about a recipe that is refused."""

    def _message(text: str | bytes, overrides: Sequence[str] = ()) -> str:
        with pytest.raises(UserError) as caught:
            load(text, overrides)
        assert caught.value.exit_code == 2
        return str(caught.value)

    return _message
