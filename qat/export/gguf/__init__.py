"""The format "gguf": one file with weights, tokenizer and settings, read by llama.cpp, Ollama and LM Studio."""
