"""Several processes, started by torchrun, that train one run together; each is a *rank*."""
