"""Corpora: labelled token sequences from text, batches, and corpus directories. Does not use JAX."""
