"""What every format contains: one module with its normalisation, the classes and the facts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sskd.errors import UserError, one_line, shortened

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
# Entries of the record of calls that hold paths of this machine.
_TRACES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node")


class Classifier(nn.Module):
    """A network that takes images as they are and returns logits.

    Args:
        network: returns ``Features``.
        mean: of each channel, in [0, 1]; so is ``std``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, classes] of RGB ``images`` [N, 3, H, W] in [0, 1]."""
        logits: Tensor = self.network((images - self.mean) / self.std).logits
        return logits

    @property
    def batch_norms(self) -> int:
        """The number of BatchNorms that are not folded."""
        kinds = nn.BatchNorm1d | nn.BatchNorm2d
        return sum(isinstance(module, kinds) for module in self.modules())


@dataclass(frozen=True)
class Contents:
    """What is exported.

    Attributes:
        classifier: in eval mode, on the CPU.
        original: the network under the names of its tensors in the suite.
        entry: the name under which torch.hub loads it, an identifier.
        size: pixels of a side of its images.
        facts: what the card's head says, as plain values.
    """

    classifier: Classifier
    original: nn.Module
    entry: str
    size: int
    facts: dict[str, Any]

    @property
    def example(self) -> Tensor:
        """Two black images: exporters treat a batch of one as a constant."""
        return torch.zeros(2, 3, self.size, self.size)

    @property
    def metadata(self) -> dict[str, str]:
        """The entries that a file has beside the network, as JSON."""
        return {"classes": json.dumps(self.facts["classes"]), "card": json.dumps(self.facts)}

    @cached_property
    def program(self) -> ExportedProgram:
        """The network as torch.export records it, for batches of any size, without paths.

        Raises:
            UserError: it cannot be recorded.
        """
        shapes = {INPUT: {0: Dim(BATCH)}}
        with refusing_failures("torch.export"), torch.no_grad():
            program = torch.export.export(self.classifier, (self.example,), dynamic_shapes=shapes)
        for node in program.graph.nodes:
            for key in _TRACES:
                node.meta.pop(key, None)
        return program


@contextmanager
def refusing_failures(exporter: str) -> Iterator[None]:
    """Raise UserError if the ``exporter`` in a ``with`` block fails, and silence its warnings."""
    try:
        with warnings.catch_warnings():
            # torch.jit is deprecated, and traces warn; each file is compared with its network.
            warnings.simplefilter("ignore")
            yield
    except (UserError, OSError):
        raise
    except Exception as error:  # of the forward of any network, or of its exporter
        reason = shortened(one_line(error), 200)
        raise UserError(
            f"{exporter} cannot export this network ({type(error).__name__}: {reason}); choose "
            "another format with --to, or a forward that does not depend on pixel values"
        ) from error
