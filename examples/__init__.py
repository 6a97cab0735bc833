"""Runnable examples: the clients of lowp, and an application of each kind."""
