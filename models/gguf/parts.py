"""The files of a GGUF model in parts, by the names that llama-gguf-split gives: NAME-00001-of-00003.gguf. The first stands for all.

Source: llama.cpp ``src/llama.cpp`` (llama_split_path) and ``tools/gguf-split``: the keys split.no, split.count and split.tensors.count.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ..common.errors import UserError

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def part_files(file: Path) -> list[Path]:
    """All files of the model that ``file`` belongs to by its name, in order; ``[file]`` for any other name.

    Raises:
        UserError: the file is not the first part, or a part is missing; the message names it.
    """
    if (found := _NAME.fullmatch(file.name)) is None:
        return [file]
    number, count = int(found[2]), int(found[3])
    # the suffix as it is written there, since some file systems tell .GGUF from .gguf
    files = [file.with_name(f"{found[1]}-{index:05d}-of-{found[3]}{file.suffix}") for index in range(1, count + 1)]
    if not 1 <= number <= count:
        raise UserError(f"{file}: there is no part {number} of {count}; the file was renamed")
    if number > 1:
        raise UserError(f"{file} is part {number} of {count} of a model; give the first one, {files[0]}, beside which the others are found")
    if missing := [part.name for part in files if not part.is_file()]:
        shown = ", ".join(missing[:3]) + (f", and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(
            f"{file} is one of {count} parts of a model, of which {shown} is missing; fetch the missing files into {file.parent}"
        )
    return files


def only_model(files: Sequence[Path]) -> Path | None:
    """The first part, if ``files`` are parts of one model; else None."""
    names = [_NAME.fullmatch(file.name) for file in files]
    kinds = {(name[1], name[3]) for name in names if name}
    firsts = [file for file, name in zip(files, names) if name and int(name[2]) == 1]
    return firsts[0] if len(kinds) == 1 and all(names) and firsts else None
