"""The names of the files in a run's folder; its status's is in ``sskd.runs.status``."""

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LAST = "last.pt"
PREVIOUS = "previous.pt"
DAMAGED = "damaged.pt"
BEST = "best.pt"
WEIGHTS = "model.safetensors"
RESULT = "result.json"
OUTPUTS = "outputs.bin"  # a teacher's, precomputed
NAME = "run"  # under which a checkpoint names its run: what decides the run's result

# Bytes and lines that these may have, since they may be a stranger's: a hundred times what a run
# writes, and little enough to be read in a moment.
MOST_CONFIG = 2**16
MOST_RESULT = 2**20
MOST_METRICS = 2**28
MOST_EPOCHS = 10**6
MOST_CHECKPOINT = 2**33
