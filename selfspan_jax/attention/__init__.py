"""Attention: policies, and attention over whole sequences."""
