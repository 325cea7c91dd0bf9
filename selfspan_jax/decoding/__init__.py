"""Decoding: one state, one pure step, and the engine that drives it."""
