"""Linear transfer: a linear classifier on the features of a frozen network, on another dataset."""
