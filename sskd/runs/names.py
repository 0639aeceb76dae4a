"""The names of the files in a run's folder, except status.json (``sskd.runs.status``)."""

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LAST = "last.pt"
PREVIOUS = "previous.pt"
DAMAGED = "damaged.pt"
BEST = "best.pt"
WEIGHTS = "model.safetensors"
HEADS = "heads.safetensors"  # what a teacher was trained with, for its students
RESULT = "result.json"
OUTPUTS = "outputs.bin"  # the precomputed outputs of a teacher
NAME = "run"  # the key under which a checkpoint or a result names its run, by its identity

# Limits in bytes, and in lines, because the files may be untrusted: a hundred times what a run
# writes, but quick to read.
MOST_CONFIG = 2**16
MOST_RESULT = 2**20
MOST_METRICS = 2**28
MOST_EPOCHS = 10**6
MOST_CHECKPOINT = 2**33
