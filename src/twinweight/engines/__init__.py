"""Engines: what runs a whole model. `hf` is the embedded default (transformers, one process)."""
