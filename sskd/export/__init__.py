"""Trained networks as files that run without the suite: ``python -m sskd.export``."""
