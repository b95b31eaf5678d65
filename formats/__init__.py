"""Bytes on disk: GGUF files, model configs, tokenizers and chat templates."""
