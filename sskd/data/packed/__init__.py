"""Images that do not fit into memory: packed into one file, decoded by worker processes."""
