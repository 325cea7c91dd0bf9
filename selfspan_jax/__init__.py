"""selfspan: a language model that chooses its own attention span, and decodes faster for it."""
