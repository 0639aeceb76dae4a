"""The command ``python -m sskd.evaluate``: what a trained network reaches, and what it costs."""
