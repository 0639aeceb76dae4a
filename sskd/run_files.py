"""The names of the files in a run's folder; its status's is in ``sskd.status``."""

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LAST = "last.pt"
PREVIOUS = "previous.pt"
DAMAGED = "damaged.pt"
BEST = "best.pt"
WEIGHTS = "model.safetensors"
RESULT = "result.json"
OUTPUTS = "outputs.bin"  # a teacher's, precomputed
