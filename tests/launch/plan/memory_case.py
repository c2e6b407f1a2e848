"""Real training stages, each in a fresh process, beside what the plan says of their memory: prints both as JSON, a line a stage.

``python memory_case.py KIND[+checkpointing][+features][+cuda] ...``; KIND is distill or qat. On a CPU the rise of anonymous memory over
the state after imports, on a GPU the allocator's peak.
"""

import json
import os
import re
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoct.launch.plan.memory import training_memory
from decoct.launch.plan.memory_case import FeatureCase, StageMemoryCase
from decoct.launch.plan.shapes import shape_of
from decoct.losses.settings import LossSettings
from decoct.losses.settings_features import FeatureSettings, HiddenSettings, RelationSettings
from decoct.models.teachers import LocalTeacher
from decoct.qat.layers.quantized_model import prepare
from decoct.qat.scheme import QuantScheme
from decoct.qat.spec import QuantSpec
from decoct.trainer.loop.features import Features, Wanted
from decoct.trainer.loop.fit import fit
from decoct.trainer.loop.metrics import MetricsSink
from decoct.trainer.loop.objective import Objective
from decoct.trainer.plan import BatchPlan, TrainingPlan

SEQ, WINDOWS, VOCAB = 256, 4, 8192


def config(layers: int) -> LlamaConfig:
    """A Llama of 768 channels."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
    )


def anonymous() -> int:
    """Bytes of memory that no file stands behind."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024


class Peak(threading.Thread):
    """Samples ``anonymous`` until it is asked."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base = self.most = anonymous()
        self.start()

    def run(self) -> None:
        """Sample."""
        while True:
            self.most = max(self.most, anonymous())
            time.sleep(0.005)


def main() -> None:
    """Measure each case in a process of its own, which has imported all that it needs."""
    for case in sys.argv[1:]:
        if not os.fork():
            return measure(case)
        if os.wait()[1]:
            raise SystemExit(f"{case} has failed")


def measure(name: str) -> None:
    """Train two steps and print prediction and measurement."""
    kind, *options = name.split("+")
    on_gpu = "cuda" in options
    torch.set_num_threads(1)
    plan = TrainingPlan(
        total_steps=2,
        batch=BatchPlan(global_windows=WINDOWS, micro_batch=WINDOWS, accumulation=1),
        learning_rate=1e-4,
        checkpoint_every=10**6,
        activation_checkpointing="checkpointing" in options,
        precision="bf16-mixed" if on_gpu else "32",
    )
    spec = QuantSpec(bits=4, group_size=64) if kind == "qat" else None
    featured = FeatureCase(pairs=6, teacher_layers=6, relations=1, vectors="qkv", heads=12) if "features" in options else None
    case = StageMemoryCase(
        plan=plan,
        seq_length=SEQ,
        ranks=1,
        on_gpu=on_gpu,
        load_in="fp32",
        scheme=None if spec is None else QuantScheme(weights=spec),
        features=featured,
    )
    student_config, teacher_config = config(6), config(10)
    roles = training_memory(shape_of(student_config, ""), shape_of(teacher_config, ""), case)
    rows = torch.randint(0, VOCAB, (16, SEQ))
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
    peak = Peak()
    teacher = LocalTeacher(LlamaForCausalLM(teacher_config), v_eff=VOCAB)
    student = LlamaForCausalLM(student_config)
    if spec is not None:
        prepare(student, spec)
    with tempfile.TemporaryDirectory() as folder:
        features = None
        if featured is not None:
            both = FeatureSettings(hidden=HiddenSettings(weight=1.0), relations=RelationSettings(weight=1.0))
            wanted = Wanted(settings=both, hidden=[(index, index + 4) for index in range(6)], relations=[(5, 9)])
            features = Features(wanted, student, teacher, seed=0)
        objective = Objective(teacher, LossSettings(), v_eff=VOCAB, features=features)
        fit(student, objective, data, plan, work=Path(folder), stage=kind, metrics=MetricsSink(None))
        measured = torch.cuda.max_memory_allocated() if on_gpu else peak.most - peak.base
    print(json.dumps({"case": name, "measured": measured, "predicted": roles.total, "roles": asdict(roles)}))


if __name__ == "__main__":
    main()
