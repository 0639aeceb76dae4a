"""What commands share that measure trained networks: choice, datasets, stored results, files."""
