"""A Weights & Biases workspace and report for all runs of a project, built in code.

``python -m sskd.dashboard`` builds them. What their panels show is logged by
``sskd.tracking.tracker`` while runs train, and by ``python -m sskd.report --wandb`` afterwards.
"""
