"""What to measure first on a GPU that is lent for half an hour (``__main__``)."""
