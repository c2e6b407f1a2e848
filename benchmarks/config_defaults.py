"""Record the config classes of the families that a plan reads without transformers: fields, defaults, types and reserved names.

python benchmarks/config_defaults.py            # print the record
python benchmarks/config_defaults.py --write    # models/config_defaults.json, after an upgrade of transformers
"""

import argparse
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

from decoct.models.common.light_configs import import_configs_alone, transformers_version

RECORD = Path(__file__).resolve().parent.parent / "models" / "config_defaults.json"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LEFT_OUT = ("dtype", "id2label", "label2id", "problem_type")
"""Fields that a plan does not read, and that transformers turns into something else."""


def record() -> dict[str, Any]:
    """The content of models/config_defaults.json for the installed transformers."""
    import_configs_alone()
    from transformers import CONFIG_MAPPING, GenerationConfig

    found: dict[str, Any] = {"transformers": ".".join(transformers_version().split(".")[:2]), "families": {}}
    reserved = {*LEFT_OUT, *GenerationConfig._get_default_generation_params()}
    for family in FAMILIES:
        kind: Any = CONFIG_MAPPING[family]
        assert not kind.attribute_map and not kind.sub_configs, family
        found["families"][family] = {
            field.name: {"default": field.default, "types": types(field.type)}
            for field in fields(kind)
            if field.default is not MISSING and field.name not in LEFT_OUT
        }
        reserved |= {name for name in dir(kind) if name not in found["families"][family]}
    return {**found, "reserved": sorted(name for name in reserved if not name.startswith("_"))}


def types(annotation: Any) -> list[str]:
    """Names of the types of a field: ['int', 'NoneType']."""
    if isinstance(annotation, str):
        return [part.strip().replace("None", "NoneType") for part in annotation.split("|")]
    parts = get_args(annotation) if " | " in str(annotation) else (annotation,)
    return [part.__name__ if isinstance(part, type) and not get_args(part) else str(part) for part in parts]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    text = json.dumps(record(), indent=1) + "\n"
    if parser.parse_args().write:
        RECORD.write_text(text)
    else:
        print(text, end="")
