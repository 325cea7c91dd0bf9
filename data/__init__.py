"""Corpora: text to labelled token sequences, batches and dataset directories. Knows nothing of JAX."""
