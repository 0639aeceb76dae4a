"""The results of many runs, laid out beside the published figures.

Nothing here needs PyTorch, so the report starts at once on any machine that has the run folders.
"""
