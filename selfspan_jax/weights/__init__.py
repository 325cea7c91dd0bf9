"""Weights in files: finished models, pretrained models of Hugging Face directories and GGUF files, adapters."""
