"""The ONNX file in int8: weights and activations quantised after training, by ONNX Runtime.

Scales are those of *static* quantisation (Jacob et al., CVPR 2018): of each channel of the weights,
and of the activations on training images.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sskd.data import LabelledImages
from sskd.export.agreement import to_unit_range
from sskd.export.contents import INPUT, refusing_failures
from sskd.export.formats import INT8

IMAGES = 500  # from which the ranges of the activations are taken
_BATCH = 50


def write_int8(source: Path, train: LabelledImages) -> Path:
    """Write the ONNX file ``source`` in int8 beside it and return the path of the new file.

    The ranges of its activations are those of ``IMAGES`` images of ``train``, drawn with seed 0.

    Raises:
        UserError: ONNX Runtime cannot quantise it.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    target, prepared = source.with_name(INT8), source.with_name("prepared.onnx")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    with _quiet(), refusing_failures("ONNX Runtime's quantisation"):
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            _reader(train.take(order[:IMAGES]).images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        quantised = onnx.load(target)
        entries = {each.key: each.value for each in onnx.load(source).metadata_props}
        onnx.helper.set_model_props(quantised, entries)
        onnx.save(quantised, target)
    prepared.unlink()
    return target


def _reader(images: Tensor) -> Any:
    """Return an object from which the calibration takes the batches of ``images``."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = _batches(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

    return Reader()


def _batches(images: Tensor) -> Iterator[dict[str, np.ndarray]]:
    for batch in images.split(_BATCH):
        yield {INPUT: to_unit_range(batch).numpy()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop the log lines of the quantisation, which advise what has been done already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
