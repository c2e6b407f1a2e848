"""decoct: distil, prune, quantize, export and report large language models. Its parts are its sub-packages; importing it costs nothing."""

__version__ = "0.1.0"
