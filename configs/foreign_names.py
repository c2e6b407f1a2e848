"""Names of settings in other tools, with the key that recipes have instead, or the reason why they have none.

Sources: trainer arguments of transformers and TRL, Lightning's Trainer, llm-compressor, and GPTQ packages.
"""

_EPOCHS = "there are no epochs: the length of a stage is its 'tokens' (or 'steps'), and N epochs of a text are N times its tokens"
_RATE = "the peak learning rate is 'learning_rate' of a stage that trains (stages.0.learning_rate=1e-4)"
_BATCH = (
    "a batch is given in tokens: trainer.global_batch_tokens per optimizer step; trainer.micro_batch is the number of windows per forward "
    "pass"
)
_ACCUMULATION = "it follows from trainer.global_batch_tokens, trainer.micro_batch and the number of devices"
_STEPS = "optimizer steps are 'steps' of a stage that trains (stages.0.steps=100), instead of its 'tokens'"
_TOKENS = "training tokens are 'tokens' of a stage that trains (stages.0.tokens=10M)"
_OUT = "the run folder is an option of the command line: --out FOLDER"
_PRECISION = "it is trainer.precision: 32, or bf16-mixed"
_FP16 = "it is trainer.precision: 32, or bf16-mixed; training in fp16 is not supported, because it needs loss scaling"
_SEED = "it is 'seed' at the top of the recipe"
_LENGTH = "tokens per window are data.seq_length"
_WARMUP = "it is 'warmup' of a stage that trains: the share of its steps over which the rate rises (stages.0.warmup=10%)"
_SCHEDULE = "it is 'schedule' of a stage that trains: cosine, linear or constant"
_CLIP = "it is trainer.gradient_clip"
_OPTIMIZER = "it is trainer.optimizer: adamw, adamw-8bit or paged-adamw-8bit"
_BETAS = "it is 'betas' of a stage that trains (stages.0.betas=[0.9,0.99])"
_SAVES = "it is 'checkpoint_every' of a stage that trains, in optimizer steps"
_EVALUATIONS = "it is trainer.evaluate_every, in optimizer steps (0 = never)"
_RESUME = "no setting is needed: run the same command again to resume from the newest valid checkpoint"
_OVERWRITE = "nothing is overwritten: a stage whose settings changed runs again, and its old folder is kept; --out names another run folder"
_BEST = "it is 'result: best' of a stage that trains: its model folder is then made of the weights of the best evaluation"
_STOPPING = "it is 'early_stopping' of a stage that trains: {patience: 3, min_change: 1%}, patience in evaluations"
_KEPT = "two checkpoints are kept while a stage trains (and the best one with 'result: best'), and none when it is done"
_LOGGER = "it is 'logger' at the top of the recipe: wandb, tensorboard, mlflow, csv or none, or a list of several"
_LOGGING = "every optimizer step is written to metrics.jsonl, so there is no interval"
_NAME = "the name of the run is 'name' at the top of the recipe"
_DEVICES = "processes on this machine are trainer.devices"
_STRATEGY = "it is trainer.strategy: auto, ddp, fsdp2 or hsdp"
_RECOMPUTE = "it is trainer.activation_checkpointing"
_FILES = "local text is data.files (txt, jsonl, parquet, globs)"
_HUB = "a hub dataset is data.hub, with data.hub_config and data.hub_split"
_STUDENT = "the model to work on is student.path"
_TEACHER = "the model to learn from is teacher.path"
_BITS = "it is weights.bits of a qat or quantize stage"
_GROUP = "it is weights.group_size of a qat or quantize stage: a number of inputs, or channel"
_CALIBRATION = "it is 'calibration_tokens' of the stage"
_METHOD = "it is 'method' of a quantize stage: rtn, mse or gptq"
_KEEP = "recipes give the share that is kept: magnitude.keep of a prune stage (0.7 keeps 70 %), or wanda.keep or sparsegpt.keep"
_PATTERN = "it is magnitude.pattern of a prune stage (2:4), or wanda.pattern or sparsegpt.pattern"
_LORA = "it is 'lora' of a qat stage: the rank of the adapter"
_SOFT = "it is loss.temperature of a stage that trains"
_HARD = "it is loss.hard_weight of a stage that trains: the weight of the hard labels (the text itself) in the loss"
_WORKERS = "it is trainer.num_workers"
_DRY = "`decoct plan RECIPE` shows what a run would do without training; `decoct launch --print` shows the command or file of a job"
_NODES = "it is an option of the command line: decoct launch RECIPE --nodes N"

_MEANT: dict[str, tuple[str, ...]] = {
    _EPOCHS: ("epochs", "epoch", "num_epochs", "num_train_epochs", "n_epochs", "max_epochs", "train_epochs"),
    _RATE: ("lr", "max_lr", "peak_lr", "base_lr", "learningrate"),
    _BATCH: (
        "batch_size", "batch", "bs", "train_batch_size", "per_device_train_batch_size", "per_gpu_train_batch_size", "micro_batch_size",
        "global_batch_size", "per_device_batch_size", "per_device_eval_batch_size", "eval_batch_size", "total_batch_size",
    ),
    _ACCUMULATION: (
        "gradient_accumulation_steps", "gradient_accumulation", "grad_accumulation_steps", "accumulate_grad_batches", "grad_accum",
    ),
    _STEPS: ("max_steps", "num_steps", "train_steps", "num_train_steps", "total_steps", "training_steps", "iterations", "max_iters"),
    _TOKENS: ("max_tokens", "num_tokens", "train_tokens", "total_tokens", "token_budget"),
    _OUT: ("output_dir", "out_dir", "output", "output_path", "save_path", "save_dir", "run_dir", "default_root_dir"),
    _PRECISION: ("bf16", "dtype", "torch_dtype", "mixed_precision", "amp"),
    _FP16: ("fp16", "half"),
    _SEED: ("seed", "random_seed", "manual_seed", "data_seed"),
    _LENGTH: (
        "max_seq_length", "max_length", "max_seq_len", "seq_len", "sequence_length", "block_size", "cutoff_len", "context_length", "seqlen",
        "sequence_len",
    ),
    _WARMUP: ("warmup_ratio", "warmup_steps", "num_warmup_steps", "lr_warmup", "lr_warmup_steps"),
    _SCHEDULE: ("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule"),
    _CLIP: ("max_grad_norm", "grad_clip", "clip_grad", "clip_grad_norm", "gradient_clip_val", "gradient_clipping", "max_norm"),
    _OPTIMIZER: ("optim", "use_8bit_adam"),
    _BETAS: ("adam_beta1", "adam_beta2", "beta1", "beta2", "adam_betas"),
    _SAVES: ("save_steps", "save_every", "save_strategy", "save_interval", "checkpoint_steps", "every_n_train_steps"),
    _EVALUATIONS: ("eval_steps", "eval_every", "eval_interval", "val_check_interval", "evaluation_strategy", "eval_strategy", "do_eval"),
    _RESUME: ("resume", "resume_from", "resume_from_checkpoint", "ckpt_path"),
    _OVERWRITE: ("overwrite_output_dir", "overwrite", "force"),
    _BEST: ("load_best_model_at_end", "metric_for_best_model", "save_best_only", "save_best", "keep_best", "best_model"),
    _STOPPING: ("patience", "early_stopping_patience", "early_stopping_threshold", "early_stop", "min_delta"),
    _KEPT: ("save_total_limit", "save_top_k", "keep_last", "max_checkpoints", "keep_checkpoints"),
    _LOGGER: ("report_to", "wandb", "use_wandb", "tensorboard", "mlflow", "loggers", "log_with", "tracker"),
    _LOGGING: ("logging_steps", "log_every", "log_every_n_steps", "log_interval", "logging_strategy"),
    _NAME: ("run_name", "experiment_name", "wandb_run_name"),
    _DEVICES: ("gpus", "num_gpus", "n_gpus", "ngpus", "num_processes", "nproc_per_node", "world_size", "device"),
    _NODES: ("num_nodes", "nnodes", "nodes"),
    _STRATEGY: ("fsdp", "fsdp_config", "deepspeed", "ddp", "accelerator", "distributed"),
    _RECOMPUTE: ("gradient_checkpointing", "use_gradient_checkpointing"),
    _FILES: ("dataset", "datasets", "dataset_path", "train_file", "train_files", "data_path", "train_data", "corpus", "text_file"),
    _HUB: ("dataset_name", "dataset_id", "dataset_config_name", "dataset_split"),
    _STUDENT: (
        "model", "model_name", "model_id", "model_path", "model_name_or_path", "base_model", "pretrained_model_name_or_path",
        "student_model",
    ),
    _TEACHER: ("teacher_model", "teacher_path", "teacher_name", "teacher_model_name_or_path", "teacher_id"),
    _BITS: ("bits", "wbits", "w_bit", "w_bits", "n_bits", "num_bits", "weight_bits", "nbits"),
    _GROUP: ("group_size", "groupsize", "q_group_size", "w_group_size"),
    _CALIBRATION: ("nsamples", "num_samples", "num_calibration_samples", "calibration_samples", "n_samples", "calib_size"),
    _METHOD: ("quant_method", "algorithm", "quantization_method", "scheme"),
    _KEEP: ("sparsity", "target_sparsity", "sparsity_ratio", "pruning_ratio", "prune_ratio", "amount"),
    _PATTERN: ("mask_structure", "sparsity_type", "prune_pattern", "nm_pattern"),
    _LORA: ("lora_r", "lora_rank", "r", "rank", "lora_alpha", "use_peft"),
    _SOFT: ("temperature", "temp", "kd_temperature"),
    _HARD: ("alpha_ce", "ce_weight", "kd_ratio", "kd_weight", "hard_label_weight", "lambda_ce"),
    _WORKERS: ("dataloader_num_workers", "workers", "n_workers"),
    _DRY: ("dry_run", "dryrun", "n_dry_run", "plan_only"),
}  # fmt: skip
_BY_NAME = {name: sentence for sentence, names in _MEANT.items() for name in names}


def meant_by(name: str) -> str | None:
    """Return what a setting of another tool is called here, or why there is no such key, as the end of a sentence; None if unknown."""
    return _BY_NAME.get(name.strip().lower().lstrip("-").replace("-", "_"))
