"""Experiment trackers through Lightning's loggers: W&B, TensorBoard, MLflow, CSV. ``metrics.jsonl`` is the record; they are views of it."""
