"""GGUF files as a source of models: container, blocks, names, hyperparameters and tokenizer. The exporter and its oracle do not use it."""
