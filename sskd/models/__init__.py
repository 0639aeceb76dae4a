"""The networks: built by name, with weights from a file if needed."""

from sskd.models.architectures import ARCHITECTURES, build_model, takes_image_size
from sskd.models.checkpoints import (
    Checkpoint,
    find_checkpoint,
    load_weights,
    read_checkpoint,
    save_weights,
    weights_digest,
)
from sskd.models.features import VECTOR_FIELDS, Features, partial_features
from sskd.models.folding import fold_batch_norms
from sskd.models.fusing import fuse_layers
from sskd.models.recognition import recognise

__all__ = [
    "ARCHITECTURES",
    "VECTOR_FIELDS",
    "Checkpoint",
    "Features",
    "build_model",
    "find_checkpoint",
    "fold_batch_norms",
    "fuse_layers",
    "load_weights",
    "partial_features",
    "read_checkpoint",
    "recognise",
    "save_weights",
    "takes_image_size",
    "weights_digest",
]
