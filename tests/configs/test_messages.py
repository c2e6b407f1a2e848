"""A broken recipe gets one message that names the key, the line and the remedy; nothing broken is accepted."""

from collections.abc import Callable

import jsonschema
import pytest
import yaml

from decoct.configs import recipe_from_dict
from decoct.configs.json_schema import recipe_schema
from decoct.models.common.errors import UserError

HEAD = """\
teacher: {path: a/teacher}
student: {keep: {layers: 4}}
data: {files: [a.txt], seq_length: 256}
"""
NO_TEACHER = "student: {path: a/student}\ndata: {builtin: python-stdlib}\n"
STAGES = "stages:\n  - distill: {tokens: 1M}\n"
STAGE_KEYS = (
    "name, tokens, steps, learning_rate, warmup, schedule, final_learning_rate, weight_decay, betas, loss, teacher, "
    "checkpoint_every, result, early_stopping, samples, callbacks"
)
TOP_KEYS = "name, seed, import, teacher, student, data, stages, trainer, logger"
KINDS = "pretrain, distill, prune, qat, quantize, export, evaluate"

BROKEN = {
    "mistyped key in a section": (
        HEAD.replace("seq_length", "seq_lenght") + STAGES,
        "my.yaml:3: data.seq_lenght: unknown key, did you mean 'seq_length'? valid here: builtin, files, hub, hub_config, hub_split, "
        "hub_shards, generate, source, kind, mask_prompts, text_field, special_tokens, max_documents, blend, seq_length, packing, "
        "eval_tokens, held_out",
    ),
    "mistyped key at the top": (
        HEAD + STAGES + "trianer: {precision: 32}\n",
        f"my.yaml:6: trianer: unknown key, did you mean 'trainer'? valid here: {TOP_KEYS}",
    ),
    "mistyped section that is required": (
        HEAD.replace("student:", "studnet:") + STAGES,
        f"my.yaml:2: studnet: unknown key, did you mean 'student'? valid here: {TOP_KEYS}",
    ),
    "mistyped key that is required": (
        HEAD + "stages:\n  - prune:\n      magnitude: {kep: 0.7}\n",
        "my.yaml:6: stages.0.prune.magnitude.kep: unknown key, did you mean 'keep'? valid here: keep, pattern, scope, update_every, heal",
    ),
    "mistyped key that alone is missing": (
        HEAD.replace("keep:", "kep:") + STAGES,
        "my.yaml:2: student.kep: unknown key, did you mean 'keep'? valid here: path, adapter, keep, config, revision",
    ),
    "mistyped key of a stage": (
        HEAD + "stages:\n  - distill:\n      tokens: 1M\n      wramup: 0.1\n",
        f"my.yaml:7: stages.0.distill.wramup: unknown key, did you mean 'warmup'? valid here: {STAGE_KEYS}",
    ),
    "key in the wrong section": (
        HEAD + STAGES + "precision: 32\n",
        f"my.yaml:6: precision: unknown key, it belongs at trainer.precision; valid here: {TOP_KEYS}",
    ),
    "stage key in the trainer": (
        HEAD + STAGES + "trainer: {betas: [0.9, 0.99]}\n",
        "my.yaml:6: trainer.betas: unknown key, it belongs to a stage that trains; valid here: devices, strategy, "
        "activation_checkpointing, compile, optimizer, precision, global_batch_tokens, micro_batch, gradient_clip, "
        "num_workers, save_dtype, deterministic, evaluate_every",
    ),
    "duplicate key": (
        HEAD + STAGES + "trainer:\n  precision: 32\n  devices: 1\n  precision: bf16-mixed\n",
        "my.yaml:9: trainer.precision: given twice, on lines 7 and 9; keep one",
    ),
    "duplicate section": (HEAD + "data: {builtin: python-stdlib}\n" + STAGES, "my.yaml:4: data: given twice, on lines 3 and 4; keep one"),
    "unknown stage kind": (
        HEAD + "stages:\n  - distil: {tokens: 1M}\n",
        f"my.yaml:5: stages.0: unknown stage kind 'distil', did you mean 'distill'? kinds: {KINDS}",
    ),
    "stage settings not indented": (
        HEAD + "stages:\n  - distill:\n    tokens: 1M\n",
        "my.yaml:5: stages.0: a stage is one key, its kind, with its settings below it; got the keys distill, tokens: "
        "indent tokens below 'distill:'",
    ),
    "no stages": (HEAD, "my.yaml:1: needs the key 'stages': what to do, such as stages: [{distill: {tokens: 10M}}]"),
    "empty stages": (HEAD + "stages: []\n", f"my.yaml:4: stages: is empty; name at least one of {KINDS}"),
    "stages as a mapping": (
        HEAD + "stages:\n  distill: {tokens: 1M}\n",
        "my.yaml:4: stages: must be a list of stages ('- distill: {tokens: 10M}' and so on, in order); got a section of keys",
    ),
    "unsafe stage name": (
        HEAD + "stages:\n  - distill: {tokens: 1M, name: ../x}\n",
        "my.yaml:5: stages.0.distill.name: '../x' cannot name a stage; use letters, digits, '.', '_' and '-', at most 100, "
        "a letter or digit first: it names a folder",
    ),
    "stage name that is a number": (
        HEAD + "stages:\n  - distill: {tokens: 1M, name: 2}\n",
        "my.yaml:5: stages.0.distill.name: '2' would be taken for a position in overrides; begin with a letter",
    ),
    "stage name given twice": (
        HEAD + "stages:\n  - distill: {tokens: 1M, name: again}\n  - distill: {tokens: 1M, name: again}\n",
        "my.yaml:6: stages.1.distill.name: 'again' is already the name of stages.0 (my.yaml:5); names are unique",
    ),
    "wrong suffix": (
        HEAD + "stages:\n  - distill: {tokens: 1m}\n",
        "my.yaml:5: stages.0.distill.tokens: must be a whole number (64, 500k, 2M); got '1m'; suffixes are k, M and B (powers of 1000)",
    ),
    "half a step": (
        HEAD + "stages:\n  - distill: {steps: 1.5}\n",
        "my.yaml:5: stages.0.distill.steps: must be a whole number (64, 500k, 2M); got '1.5'",
    ),
    "percentage of tokens": (
        HEAD + "stages:\n  - distill: {tokens: 500%}\n",
        "my.yaml:5: stages.0.distill.tokens: must be a whole number (64, 500k, 2M); got '500%'",
    ),
    "boolean for a number": (
        HEAD + STAGES + "trainer: {devices: true}\n",
        "my.yaml:6: trainer.devices: must be a whole number (64, 500k, 2M) or 'auto'; got 'true'",
    ),
    "number for a boolean": (
        HEAD + STAGES + "trainer: {deterministic: 1}\n",
        "my.yaml:6: trainer.deterministic: must be true or false; got '1'",
    ),
    "unknown choice": (
        HEAD + "stages:\n  - distill: {tokens: 1M, schedule: cosin}\n",
        "my.yaml:5: stages.0.distill.schedule: must be 'cosine', 'linear' or 'constant'; got 'cosin', did you mean 'cosine'?",
    ),
    "value where a section belongs": (
        HEAD + "stages:\n  - distill: {tokens: 1M, loss: forward_kl}\n",
        "my.yaml:5: stages.0.distill.loss: must be a section with keys divergence, temperature, t_squared, beta, alpha, balance, "
        "head_mass, hard_weight, features; got 'forward_kl'",
    ),
    "short list": (
        HEAD + "stages:\n  - distill: {tokens: 1M, betas: [0.9]}\n",
        "my.yaml:5: stages.0.distill.betas: must be a list of 2 numbers; got a list of 1",
    ),
    "missing key": (
        HEAD + "stages:\n  - prune:\n      structured: {}\n",
        "my.yaml:6: stages.0.prune.structured: structured pruning needs at least one of ffn, heads, kv_heads, hidden, layers: the "
        "number that is kept; or a 'budget'",
    ),
    "a shape and a budget": (
        HEAD + "stages:\n  - prune:\n      structured: {budget: 80M, heads: 2}\n",
        "my.yaml:6: stages.0.prune.structured.budget: budget=80000000.0 searches the shape, and 'heads' gives it; leave one of them out",
    ),
    "a search of nothing": (
        HEAD + "stages:\n  - prune:\n      structured: {heads: 2, search: {measured: 4}}\n",
        "my.yaml:6: stages.0.prune.structured: 'search' finds the shape of a budget, and there is none; give 'budget', such as budget: 0.6",
    ),
    "rounds without tokens": (
        HEAD + "stages:\n  - prune: {structured: {heads: 2, rounds: 0.3}}\n",
        "my.yaml:5: stages.0.prune: 'structured.rounds' distils after each cut; give 'tokens' or 'steps', such as tokens: 30M",
    ),
    "rounds to a shape that is not known": (
        HEAD + "stages:\n  - prune: {structured: {budget: 0.5, rounds: 0.3}, tokens: 30M}\n",
        "my.yaml:5: stages.0.prune.structured.rounds: rounds=0.3 go to a given shape, and 'budget' searches one; give the shape that a "
        "search has found",
    ),
    "a cut of the shape with tokens": (
        HEAD + "stages:\n  - prune: {structured: {heads: 2}, tokens: 30M}\n",
        "my.yaml:5: stages.0.prune: structured pruning is one shot and takes no 'tokens' or 'steps'; add a distill stage after it, or cut "
        "in rounds with distillation (structured.rounds: 0.3)",
    ),
    "rounds that grow": (
        HEAD + "stages:\n  - prune:\n      structured: {budget: 0.6, search: {tokens: 1M, halving: [4, 16]}}\n",
        "my.yaml:6: stages.0.prune.structured.search.halving: halving=[4, 16] must fall from round to round, such as [16, 4]",
    ),
    "an unknown axis": (
        HEAD + "stages:\n  - prune:\n      structured: {kv_head: 2}\n",
        "my.yaml:6: stages.0.prune.structured.kv_head: unknown key, did you mean 'kv_heads'? valid here: ffn, heads, kv_heads, "
        "hidden, layers, budget, search, score, depth_score, repair, rounds",
    ),
    "an unknown score": (
        HEAD + "stages:\n  - prune:\n      structured: {heads: 2, score: tailor}\n",
        "my.yaml:6: stages.0.prune.structured.score: must be 'weight_activation', 'activation', 'magnitude' or 'taylor'; got 'tailor', did "
        "you mean 'taylor'?",
    ),
    "a score without channels": (
        HEAD + "stages:\n  - prune:\n      structured: {layers: 2, score: taylor}\n",
        "my.yaml:6: stages.0.prune.structured: 'score' ranks channels and heads, and none are removed; give one of ffn, heads, kv_heads, "
        "hidden, or 'depth_score'",
    ),
    "a depth score without layers": (
        HEAD + "stages:\n  - prune:\n      structured: {ffn: 2, depth_score: contiguous}\n",
        "my.yaml:6: stages.0.prune.structured: 'depth_score' ranks layers, and none are removed; give 'layers'",
    ),
    "a number out of its bounds": (
        HEAD + "stages:\n  - qat:\n      tokens: 1M\n      weights:\n        bits: 9\n",
        "my.yaml:8: stages.0.qat.weights.bits: 9 is out of range; it must be at least 2 and at most 8; 4 and 8 are what serving "
        "stacks read",
    ),
    "two sources of text": (
        HEAD.replace("seq_length: 256", "builtin: python-stdlib") + STAGES,
        "my.yaml:3: data: data needs exactly one of 'builtin', 'files', 'hub', 'generate', 'source' and 'blend'; given: "
        "['builtin', 'files']",
    ),
    "percent sign forgotten": (
        HEAD + "stages:\n  - distill: {tokens: 1M, warmup: 5}\n",
        "my.yaml:5: stages.0.distill.warmup: 5 is out of range; it must be at least 0 and less than 1; it is a share of the steps",
    ),
    "both tokens and steps": (
        HEAD + "stages:\n  - distill: {tokens: 1M, steps: 3}\n",
        "my.yaml:5: stages.0.distill: give 'tokens' or 'steps', not both",
    ),
    "neither tokens nor steps": (
        HEAD + "stages:\n  - qat\n",
        "my.yaml:5: stages.0.qat: trains, and needs 'tokens' or 'steps', such as tokens: 10M",
    ),
    "distill without a teacher": (
        NO_TEACHER + STAGES,
        "my.yaml:4: stages.0.distill: learns from a teacher, but the recipe has none; add one (teacher: {path: ...}), or train on the text "
        "alone with loss: {hard_weight: 1.0}",
    ),
    "a cache for a divergence that needs everything": (
        HEAD.replace("teacher: {path: a/teacher}", "teacher: {path: a/teacher, cache: {mode: top_k}}")
        + "stages:\n  - distill: {tokens: 1M, loss: {divergence: jsd}}\n",
        "my.yaml:5: stages.0.distill.loss.divergence: jsd needs the teacher's whole distribution, and teacher.cache keeps a part of it; "
        "use forward_kl, teacher.cache.mode: hidden, or remove teacher.cache",
    ),
    "a cache that nobody reads": (
        HEAD.replace("teacher: {path: a/teacher}", "teacher: {path: a/teacher, cache: top_k}") + "stages: [quantize]\n",
        "my.yaml:1: teacher.cache: is not used: no stage learns from the recipe's teacher; remove it",
    ),
    "teacher: recipe without one": (
        NO_TEACHER + "stages:\n  - qat: {tokens: 1M, teacher: recipe}\n",
        "my.yaml:4: stages.0.qat.teacher: is 'recipe', but the recipe has no teacher; add one, or set teacher: input",
    ),
    "student cut from no teacher": (
        "student: {keep: {layers: 4}}\ndata: {builtin: python-stdlib}\nstages: [quantize]\n",
        "my.yaml:1: student.keep: cuts the student from the teacher, but the recipe has no teacher; add one, or give student.path",
    ),
    "gate without a teacher": (
        NO_TEACHER + "stages:\n  - evaluate: {max_perplexity_increase: 5%}\n",
        "my.yaml:4: stages.0.evaluate.max_perplexity_increase: compares with the teacher, but the recipe has no "
        "teacher; add one, or remove the gate",
    ),
    "a password in the address of a served teacher": (
        HEAD.replace("path: a/teacher", "path: a/teacher, served: {url: 'https://me:canary@host/v1', model: big}") + STAGES,
        "my.yaml:1: teacher.served.url: contains an address with a name or password (://...@); give the address without it",
    ),
    "a key in the address of a served teacher": (
        HEAD.replace("path: a/teacher", "path: a/teacher, served: {url: 'https://host/v1?key=canary', model: big}") + STAGES,
        "my.yaml:1: teacher.served.url: url= holds a name, password or query; addresses are printed and written into files, so put the key "
        "into the environment variable OPENAI_API_KEY (teacher.served.key_variable) and give the bare address, such as http://host:8000/v1",
    ),
    "a password in any address": (
        HEAD.replace("a/teacher", "https://me:canary@host/m") + STAGES,
        "my.yaml:1: teacher.path: contains an address with a name or password (://...@); give the address without it",
    ),
    "setting that pretrain ignores": (
        HEAD + "stages:\n  - pretrain: {tokens: 1M, loss: {temperature: 2}}\n",
        "my.yaml:5: stages.0.pretrain.loss: is not used: pretrain always trains on cross-entropy; use a distill stage, or remove the key",
    ),
    "batch of broken windows": (
        HEAD + STAGES + "trainer: {global_batch_tokens: 1000}\n",
        "my.yaml:6: trainer.global_batch_tokens: 1,000 tokens are not a whole number of windows of data.seq_length=256; use 768 or 1,024",
    ),
    "micro-batch that does not divide": (
        HEAD + STAGES + "trainer: {global_batch_tokens: 2048, micro_batch: 3}\n",
        "my.yaml:6: trainer.micro_batch: 3 does not divide the 8 windows of an optimizer step "
        "(global_batch_tokens=2,048 / seq_length=256); use 2 or 4",
    ),
    "more layers than a known teacher has": (
        HEAD.replace("a/teacher", "HuggingFaceTB/SmolLM2-1.7B").replace("layers: 4", "layers: 30") + STAGES,
        "my.yaml:2: student.keep.layers: 30 layers cannot be kept of a teacher that has 24; give 2 to 24",
    ),
    "a layer that a known teacher does not have": (
        HEAD.replace("a/teacher", "HuggingFaceTB/SmolLM2-1.7B").replace("layers: 4", "layers: [0, 11, 24]") + STAGES,
        "my.yaml:2: student.keep.layers: layer 24 does not exist in a teacher of 24 layers; they are 0 to 23",
    ),
    "layers in another order": (
        HEAD.replace("layers: 4", "layers: [5, 0, 3]") + STAGES,
        "my.yaml:2: student.keep.layers: layers=[5, 0, 3] is not in ascending order; give each layer once, in the teacher's order: "
        "[0, 3, 5]",
    ),
    "no layer": (
        HEAD.replace("layers: 4", "layers: []") + STAGES,
        "my.yaml:2: student.keep.layers: layers=[] keeps no layer; give a number such as 12, or layers such as [0, 2, 5]",
    ),
    "one layer of a teacher of two": (
        HEAD.replace("path: a/teacher", "scratch: {layers: 2}").replace("layers: 4", "layers: 1") + STAGES,
        "my.yaml:2: student.keep.layers: 1 layer cannot be kept of a teacher that has 2; give 2, which keeps all",
    ),
    "group size that divides neither width": (
        HEAD.replace("path: a/teacher", "scratch: {}") + "stages:\n  - qat: {tokens: 1M, weights: {group_size: 33}}\n",
        "my.yaml:5: stages.0.qat.weights.group_size: 33 does not divide the student's hidden size (192) and FFN channels (512) at this "
        "stage; use 64 or 32 or 16, or skip these modules",
    ),
    "more channels than a scratch teacher has": (
        HEAD.replace("path: a/teacher", "scratch: {ffn: 256}") + "stages:\n  - prune: {structured: {ffn: 384}}\n",
        "my.yaml:5: stages.0.prune.structured.ffn: keeps 384 FFN channels of a student that has 256 here",
    ),
    "more heads than a scratch teacher has": (
        HEAD.replace("path: a/teacher", "scratch: {heads: 3}") + "stages:\n  - prune: {structured: {heads: 4}}\n",
        "my.yaml:5: stages.0.prune.structured.heads: keeps 4 query heads of a student that has 3 here",
    ),
    "more layers than an earlier stage has left": (
        HEAD.replace("path: a/teacher", "scratch: {layers: 6}")
        + "stages:\n  - prune: {structured: {layers: 3}}\n  - prune: {name: again, structured: {layers: 4}}\n",
        "my.yaml:6: stages.1.prune.structured.layers: keeps 4 layers of a student that has 3 here",
    ),
    "repair without a width": (
        HEAD + "stages:\n  - prune:\n      structured: {layers: 2, repair: true}\n",
        "my.yaml:6: stages.0.prune.structured: 'repair' works on the widths, and none are cut; give one of ffn, heads, kv_heads, hidden, "
        "or leave 'repair' out",
    ),
    "group size that does not divide what pruning left": (
        HEAD.replace("path: a/teacher", "scratch: {}") + "stages:\n  - prune: {structured: {ffn: 352}}\n"
        "  - qat: {tokens: 1M, weights: {group_size: 64}}\n",
        "my.yaml:6: stages.1.qat.weights.group_size: 64 does not divide the student's FFN channels (352) at this stage; use 32 or 16, or "
        "skip these modules",
    ),
    "heads that do not divide": (
        HEAD.replace("path: a/teacher", "scratch: {heads: 5}") + STAGES,
        "my.yaml:1: teacher.scratch.heads: 5 does not divide hidden=192; change one of them",
    ),
    "export of nothing quantized": (
        HEAD + STAGES + "  - export\n",
        "my.yaml:6: stages.1.export: packs the codes that a 'qat' or 'quantize' stage writes, and never rounds; the last stage before it, "
        "stages.0 (distill), writes none; put one of the two before it",
    ),
    "export after training undid the codes": (
        HEAD + "stages:\n  - quantize\n  - distill: {tokens: 1M}\n  - export\n",
        "my.yaml:7: stages.2.export: packs the codes that a 'qat' or 'quantize' stage writes, and never rounds; the last stage before it, "
        "stages.1 (distill), writes none; put one of the two before it",
    ),
    "unknown export format": (
        HEAD + "stages:\n  - quantize\n  - export: {formats: [guff]}\n",
        "my.yaml:6: stages.1.export.formats.0: must be 'compressed-tensors', 'gguf', 'gguf-q2_0', 'gguf-tq1_0', 'gptq', 'gptq_v2', "
        "'awq', 'bitsandbytes', 'safetensors' or 'safetensors-f32'; got 'guff', did you mean 'gguf'?",
    ),
    "no text left to train on": (
        HEAD.replace("seq_length: 256", "eval_tokens: all") + STAGES,
        "my.yaml:3: data.eval_tokens: is 'all', which leaves no text for the stages that need some; give a number, such as 32k",
    ),
    "unknown logger": (
        HEAD + STAGES + "logger: wanbd\n",
        "my.yaml:6: logger.kind: must be 'wandb', 'tensorboard', 'mlflow', 'csv' or 'none'; got 'wanbd', did you mean 'wandb'?",
    ),
    "unknown logger of several": (
        HEAD + STAGES + "logger: [wandb, tensorbord]\n",
        "my.yaml:6: logger.kind.1: must be 'wandb', 'tensorboard', 'mlflow', 'csv' or 'none'; got 'tensorbord', did you mean "
        "'tensorboard'?",
    ),
    "a logger twice": (
        HEAD + STAGES + "logger: [csv, csv]\n",
        "my.yaml:6: logger: names csv twice; leave one out",
    ),
    "options in a list of loggers": (
        HEAD + STAGES + "logger: [{kind: wandb, project: a, tags: [b]}, csv]\n",
        "my.yaml:6: logger: a list has words alone, and options go with them: logger: {kind: [wandb, csv], project: a, tags: ...}",
    ),
    "an option of another logger": (
        HEAD + STAGES + "logger:\n  kind: [csv, tensorboard]\n  project: x\n",
        "my.yaml:8: logger.project: project=x has no effect: it belongs to wandb and mlflow, and kind is csv, tensorboard; leave it out",
    ),
    "an option of no logger": (
        HEAD + STAGES + "logger: {tags: [a]}\n",
        "my.yaml:6: logger.tags: tags=['a'] has no effect: it belongs to wandb, and kind is none; leave it out",
    ),
    "no logger beside one": (
        HEAD + STAGES + "logger:\n  kind: [none, csv]\n",
        "my.yaml:6: logger: names none beside others; leave none out",
    ),
    "no logger at all": (
        HEAD + STAGES + "logger: []\n",
        "my.yaml:6: logger: names no logger; name one or more, or none",
    ),
    "the best weights without evaluations": (
        HEAD + "stages:\n  - distill: {tokens: 1M, result: best}\ntrainer: {evaluate_every: 0}\n",
        "my.yaml:5: stages.0.distill.result: needs evaluations during the stage, and trainer.evaluate_every is 0; set it to auto or a "
        "number of steps, or remove the key",
    ),
    "an early end of a stage without steps": (
        HEAD + "stages:\n  - prune: {structured: {ffn: 64}, early_stopping: {patience: 2}}\n",
        "my.yaml:5: stages.0.prune.early_stopping: has no effect on a stage that takes no steps; give tokens or steps, or remove the key",
    ),
    "a pattern the wrong way round": (
        HEAD + "stages:\n  - prune: {magnitude: {pattern: '4:2'}}\n",
        "my.yaml:5: stages.0.prune.magnitude.pattern: pattern='4:2' keeps 4 of 2 weights; the first number is what stays: write 2:4",
    ),
    "a pattern of three numbers": (
        HEAD + "stages:\n  - prune: {wanda: {pattern: '2:3:4'}}\n",
        "my.yaml:5: stages.0.prune.wanda.pattern: pattern='2:3:4' must be two whole numbers N:M, such as 2:4 (of each 4 consecutive "
        "inputs, 2 weights stay)",
    ),
    "a share that contradicts the pattern": (
        HEAD + "stages:\n  - prune: {sparsegpt: {keep: 0.3, pattern: '2:4'}}\n",
        "my.yaml:5: stages.0.prune.sparsegpt.keep: keep=0.3 contradicts pattern=2:4, which keeps 0.5; leave keep out",
    ),
    "a share beyond the whole": (
        HEAD + "stages:\n  - prune: {wanda: {keep: 1.5}}\n",
        "my.yaml:5: stages.0.prune.wanda.keep: 1.5 is out of range; it must be greater than 0 and less than 1; it is the share of the "
        "weights that stays",
    ),
    "neither a share nor a pattern": (
        HEAD + "stages:\n  - prune: {wanda: {}}\n",
        "my.yaml:5: stages.0.prune.wanda: needs 'keep', the share of the weights that stays, or 'pattern', such as 2:4",
    ),
    "two methods of pruning": (
        HEAD + "stages:\n  - prune: {wanda: {keep: 0.5}, sparsegpt: {keep: 0.5}}\n",
        "my.yaml:5: stages.0.prune: a prune stage needs exactly one of 'structured', 'magnitude', 'wanda', 'sparsegpt' and 'movement'; "
        "given: ['wanda', 'sparsegpt']",
    ),
    "one shot with tokens": (
        HEAD + "stages:\n  - prune: {wanda: {keep: 0.5}, tokens: 1M}\n",
        "my.yaml:5: stages.0.prune: wanda pruning is one shot and takes no 'tokens' or 'steps'; add a distill stage after it, which keeps "
        "the zeros",
    ),
    "movement without steps": (
        HEAD + "stages:\n  - prune: {movement: {keep: 0.5}}\n",
        "my.yaml:5: stages.0.prune: movement pruning scores weights by how training moves them; give 'tokens' or 'steps', such as "
        "tokens: 10M",
    ),
    "movement without a gradient": (
        NO_TEACHER + "stages:\n  - prune: {movement: {keep: 0.5}, steps: 9}\n",
        "my.yaml:4: stages.0.prune.movement: movement scores weights by their gradients, and a student that learns from its own input "
        "alone has none before its first weight is pruned; give the recipe a teacher, or loss: {hard_weight: 0.5}",
    ),
    "a pattern over the whole model": (
        HEAD + "stages:\n  - prune: {magnitude: {pattern: '2:4', scope: global}}\n",
        "my.yaml:5: stages.0.prune.magnitude.scope: scope=global has no effect with pattern, which chooses inside each group; leave it out",
    ),
    "patience of another tool": (
        HEAD + "stages:\n  - distill: {tokens: 1M, early_stopping_patience: 3}\n",
        "my.yaml:5: stages.0.distill.early_stopping_patience: unknown key: it is 'early_stopping' of a stage that trains: {patience: 3, "
        f"min_change: 1%}}, patience in evaluations; valid here: {STAGE_KEYS}",
    ),
    "unsafe name of the run": (
        "name: runs/x\n" + HEAD + STAGES,
        "my.yaml:1: name: 'runs/x' cannot name a run; use letters, digits, '.', '_' and '-', at most 100, "
        "a letter or digit first: it names a folder",
    ),
    "a list instead of a recipe": ("- distill\n", f"my.yaml:1: a recipe is a set of keys ({TOP_KEYS}); got a list of 1"),
}


BROKEN |= {
    "text by a scratch teacher": (
        HEAD.replace("path: a/teacher", "scratch: {}").replace("files: [a.txt]", "generate: {tokens: 1M}") + STAGES,
        "my.yaml:3: data.generate.model: writes the text, and a scratch teacher is trained on it; give teacher.path, or data.files",
    ),
    "text that is all held out": (
        HEAD.replace("files: [a.txt]", "generate: {tokens: 32k}, eval_tokens: 32k") + STAGES,
        "my.yaml:3: data.generate.tokens: 32,000 leaves no text to train on beside data.eval_tokens=32,000; write more, or hold out less",
    ),
    "text by a student that is yet to be made": (
        HEAD.replace("files: [a.txt]", "generate: {tokens: 1M, model: student}") + STAGES,
        "my.yaml:3: data.generate.model: is 'student', which is made from the teacher; give student.path, or let the teacher write "
        "(model: teacher)",
    ),
    "text by no teacher": (
        NO_TEACHER.replace("builtin: python-stdlib", "generate: {tokens: 1M}") + "stages:\n  - quantize\n",
        "my.yaml:2: data.generate.model: is 'teacher', and the recipe has none; add one (teacher: {path: ...}), or set model: student",
    ),
    "conversations from the beginning of a document": (
        HEAD.replace("files: [a.txt]", "kind: chat, generate: {tokens: 1M, start: text}") + STAGES,
        "my.yaml:3: data.kind: kind=chat needs conversations, and generate.start is 'text'; leave one of the two out",
    ),
    "the rate's short name": (
        HEAD + "stages:\n  - distill: {tokens: 1M, lr: 1e-4}\n",
        "my.yaml:5: stages.0.distill.lr: unknown key: the peak learning rate is 'learning_rate' of a stage that trains "
        f"(stages.0.learning_rate=1e-4); valid here: {STAGE_KEYS}",
    ),
    "epochs": (
        HEAD + "stages:\n  - distill: {tokens: 1M, epochs: 3}\n",
        "my.yaml:5: stages.0.distill.epochs: unknown key: there are no epochs: the length of a stage is its 'tokens' (or 'steps'), and "
        f"N epochs of a text are N times its tokens; valid here: {STAGE_KEYS}",
    ),
    "more steps than can be counted": (
        HEAD + "stages:\n  - distill: {steps: 1e30}\n",
        "my.yaml:5: stages.0.distill.steps: must be a whole number (64, 500k, 2M); got '1e30'; the largest whole number is "
        "9,223,372,036,854,775,807",
    ),
    "a seed in the wrong place": (
        HEAD + "stages:\n  - distill: {tokens: 1M, seed: 3}\n",
        f"my.yaml:5: stages.0.distill.seed: unknown key: it is 'seed' at the top of the recipe; valid here: {STAGE_KEYS}",
    ),
}


SEVERAL_KEYS = {
    "a layer that a known teacher does not have", "layers in another order", "no layer",
    "text that is all held out",
    "a logger twice", "an option of another logger", "an option of no logger",
    "no logger beside one", "no logger at all", "the best weights without evaluations",
    "an early end of a stage without steps",
    "duplicate key", "duplicate section", "stage name given twice", "both tokens and steps",
    "neither tokens nor steps", "distill without a teacher", "a cache for a divergence that needs everything", "a cache that nobody reads",
    "teacher: recipe without one", "student cut from no teacher", "gate without a teacher", "setting that pretrain ignores",
    "batch of broken windows", "micro-batch that does not divide", "more layers than a known teacher has",
    "more channels than a scratch teacher has", "more heads than a scratch teacher has", "more layers than an earlier stage has left",
    "a score without channels", "a depth score without layers", "repair without a width",
    "group size that does not divide what pruning left", "heads that do not divide",
    "one layer of a teacher of two", "group size that divides neither width", "more steps than can be counted",
    "export of nothing quantized", "export after training undid the codes", "no text left to train on",
    "a key in the address of a served teacher", "text by a scratch teacher", "text by a student that is yet to be made",
    "text by no teacher", "conversations from the beginning of a document",
    "a pattern the wrong way round", "a pattern of three numbers", "a share that contradicts the pattern", "neither a share nor a pattern",
    "one shot with tokens", "movement without steps", "movement without a gradient", "a pattern over the whole model",
    "a shape and a budget", "a search of nothing", "rounds that grow",
    "rounds without tokens", "rounds to a shape that is not known", "a cut of the shape with tokens",
}  # fmt: skip
"""What the JSON Schema does not find: most faults between keys, those of YAML itself, and of an address's parts."""


@pytest.mark.parametrize("case", BROKEN)
def test_the_json_schema_finds_every_fault_of_one_key(case: str) -> None:
    fits = jsonschema.Draft202012Validator(recipe_schema()).is_valid(yaml.safe_load(BROKEN[case][0]))
    assert fits == (case in SEVERAL_KEYS)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_recipe_is_refused_with_place_key_and_remedy(case: str, message: Callable[..., str]) -> None:
    text, expected = BROKEN[case]
    assert message(text) == expected


def test_all_problems_of_a_file_are_told_at_once(message: Callable[..., str]) -> None:
    text = HEAD.replace("seq_length: 256", "seq_lenght: 256") + (
        "stages:\n  - distill: {tokens: 1m, warmup: 5, learning_rate: fast}\n  - qat: {weights: {bits: 9}}\n  - expotr\n"
        "trainer: {devices: yes, precision: 16}\nlogger: tensorbord\n"
    )
    lines = message(text).splitlines()
    assert lines[0] == "my.yaml has 9 problems:"
    places = [line.strip().split(": ")[:2] for line in lines[1:]]
    assert places == [
        ["my.yaml:3", "data.seq_lenght"],
        ["my.yaml:8", "trainer.devices"],
        ["my.yaml:8", "trainer.precision"],
        ["my.yaml:9", "logger.kind"],
        ["my.yaml:5", "stages.0.distill.tokens"],
        ["my.yaml:5", "stages.0.distill.warmup"],
        ["my.yaml:5", "stages.0.distill.learning_rate"],
        ["my.yaml:6", "stages.1.qat.weights.bits"],
        ["my.yaml:7", "stages.2"],
    ]


def test_a_flood_of_problems_is_cut(message: Callable[..., str]) -> None:
    lines = message("".join(f"key{n}: 1\n" for n in range(100))).splitlines()
    assert lines[0] == "my.yaml has 103 problems:"
    assert len(lines) == 42
    assert lines[-1] == "  and 63 more"


def test_data_without_a_file_is_told_by_key_path() -> None:
    with pytest.raises(UserError) as caught:
        recipe_from_dict({"student": {"path": "x"}, "data": {"builtin": "python-stdlib"}, "stages": [{"qat": {"tokens": "1x"}}]})
    assert str(caught.value).splitlines() == [
        "the recipe has 2 problems:",
        "  needs the key 'name': the name of the run and its folder",
        "  stages.0.qat.tokens: must be a whole number (64, 500k, 2M); got '1x'; suffixes are k, M and B (powers of 1000)",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, 1.5, {"a": 1}, [1]])
def test_data_of_the_wrong_type_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"stages\.0\.qat\.tokens: must be a whole number"):
        recipe_from_dict(
            {"name": "x", "student": {"path": "x"}, "data": {"builtin": "python-stdlib"}, "stages": [{"qat": {"tokens": value}}]}
        )


def test_data_that_is_no_plain_value_is_refused() -> None:
    with pytest.raises(UserError, match=r"recipe value data\.files\.0 is a object"):
        recipe_from_dict({"name": "x", "data": {"files": [object()]}})


@pytest.mark.parametrize("key", [1, "a\ud800", "a\x1b"])
def test_data_with_a_key_that_is_no_plain_text_is_refused(key: object) -> None:
    with pytest.raises(UserError, match="is not plain text; keys are printable strings"):
        recipe_from_dict({"name": "x", "student": {"config": {key: 1}}})
