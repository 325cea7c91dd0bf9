"""Decoding: the engine, its state, the KV cache and sampling."""
