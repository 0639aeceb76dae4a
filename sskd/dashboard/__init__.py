"""A Weights & Biases workspace and report for all runs of a project, built in code.

``python -m sskd.dashboard`` builds them. Their panels show what ``sskd.tracking.tracker`` logs
during training and what ``python -m sskd.report --wandb`` logs afterwards.
"""
