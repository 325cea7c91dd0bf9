"""Weights in files: checkpoints of runs, finished models, pretrained models of Hugging Face directories and GGUF files, adapters."""
