"""Weights in files: training checkpoints, finished models, pretrained models of Hugging Face directories and GGUF files, adapters."""
