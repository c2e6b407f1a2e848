"""The parts of a blend as a run opens them: their text together, and messages that name the part."""

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ...models.common.errors import UserError
from ...models.common.files import sha256_json
from ...trainer.data.documents import Documents
from ...trainer.settings import DataSettings

# keys of a text that each part has of its own; those of all parts together keep their place
_OWN_KEYS = re.compile(
    r"\bdata\.(builtin|files|hub|hub_config|hub_split|generate|source|kind|mask_prompts|text_field|special_tokens|eval_tokens)\b"
)


@contextmanager
def naming_part(data: DataSettings, name: str) -> Iterator[None]:
    """Name the part of a blend, and its keys, in an error inside; ``name`` is a key of ``data.texts``."""
    try:
        yield
    except UserError as error:
        if not data.blend:
            raise
        at = f"data.blend.{list(data.texts).index(name)}"
        raise UserError(f"{at} ({name}): {_OWN_KEYS.sub(lambda key: f'{at}.{key[1]}', str(error)).removeprefix('data: ')}") from error


def whole_text(data: DataSettings, texts: Mapping[str, Documents]) -> Documents:
    """The documents of all parts, one part after the other."""
    if not data.blend:
        return texts[""]
    # the weights too: they decide what a scratch teacher learns
    shares = [[part.weight, part.tokens] for part in data.blend]
    return Documents(
        "; ".join(f"{name}: {text.description}" for name, text in texts.items()),
        sha256_json({"blend": [text.fingerprint for text in texts.values()], "shares": shares}),
        lambda: itertools.chain.from_iterable(texts.values()),
    )
