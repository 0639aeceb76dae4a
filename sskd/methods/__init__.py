"""The distillation methods, one file each, by their names on the command line (``method=``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sskd.data import Images
from sskd.methods.ab import AB
from sskd.methods.at import AT
from sskd.methods.base import (
    LossOutput,
    Method,
    Phase,
    fault_of_phases,
    load_state_without_teacher,
    state_without_teacher,
)
from sskd.methods.cat_kd import CATKD
from sskd.methods.cc import CC
from sskd.methods.crd import CRD
from sskd.methods.crld import CRLD
from sskd.methods.ctkd import CTKD
from sskd.methods.dist import DIST
from sskd.methods.dkd import DKD
from sskd.methods.fitnet import FitNet
from sskd.methods.fsp import FSP
from sskd.methods.ft import FT
from sskd.methods.hsakd import HSAKD
from sskd.methods.hsakd_teacher import HSAKDTeacher
from sskd.methods.kd import KD, Outputs
from sskd.methods.luminet import LumiNet
from sskd.methods.mlld import MLLD
from sskd.methods.networks import Networks
from sskd.methods.nst import NST
from sskd.methods.ofd import OFD
from sskd.methods.pkt import PKT
from sskd.methods.reviewkd import ReviewKD
from sskd.methods.rkd import RKD
from sskd.methods.simkd import SimKD
from sskd.methods.skd import SKD
from sskd.methods.sp import SP
from sskd.methods.srrl import SRRL
from sskd.methods.sskd import SSKD
from sskd.methods.ttm import TTM, WTTM
from sskd.methods.vanilla import Vanilla
from sskd.methods.vid import VID

METHODS: dict[str, type[Method]] = {
    "vanilla": Vanilla,
    "kd": KD,
    "fitnet": FitNet,
    "at": AT,
    "sp": SP,
    "vid": VID,
    "rkd": RKD,
    "pkt": PKT,
    "ab": AB,
    "ft": FT,
    "crd": CRD,
    "sskd": SSKD,
    "cc": CC,
    "nst": NST,
    "fsp": FSP,
    "dkd": DKD,
    "ls": KD,
    "dist": DIST,
    "ttm": TTM,
    "wttm": WTTM,
    "ctkd": CTKD,
    "hsakd": HSAKD,
    "hsakd_teacher": HSAKDTeacher,
    "luminet": LumiNet,
    "reviewkd": ReviewKD,
    "ofd": OFD,
    "simkd": SimKD,
    "srrl": SRRL,
    "cat_kd": CATKD,
    "mlld": MLLD,
    "crld": CRLD,
    "skd": SKD,
}


def build_method(
    settings: Any,
    student: nn.Module,
    teacher: nn.Module | None,
    data: Images,
    *,
    heads: Mapping[str, Tensor] | None = None,
) -> Method:
    """Return the method with ``settings``, an instance of ``sskd.config.method_settings``.

    ``heads`` is the state of the modules that the teacher was trained with, if it has some.

    Raises:
        UserError: the method cannot be used with these networks or data.
    """
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    weights = values.pop("weights").model_dump()
    method = METHODS[values.pop("name")]
    return method(Networks(student, teacher, data, heads), weights=weights, **values)


__all__ = [
    "METHODS",
    "LossOutput",
    "Method",
    "Networks",
    "Outputs",
    "Phase",
    "build_method",
    "fault_of_phases",
    "load_state_without_teacher",
    "state_without_teacher",
]
