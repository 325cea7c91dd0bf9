"""Serving: many requests on one running decode state, and the server in front of it."""
