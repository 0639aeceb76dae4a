"""The typed configuration, and the checks of what Hydra composed.

An unknown key, a wrong type or a value out of range is refused before anything is loaded.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from sskd.data import SOURCES, DatasetSettings
from sskd.errors import UserError, did_you_mean, one_line, shortened
from sskd.files import expanded
from sskd.invocation import resolvers as resolvers  # registers them
from sskd.invocation.extensions import VARIABLE
from sskd.invocation.names import command_name
from sskd.methods import METHODS, Method
from sskd.models import ARCHITECTURES
from sskd.optimizers import OPTIMIZERS
from sskd.overrides import about_unknown, flatten
from sskd.schedule import Gamma, Milestones
from sskd.settings import (
    Count,
    Epochs,
    LearningRate,
    NonEmpty,
    NonNegative,
    Positive,
    Seed,
    Settings,
    ShareBelowAll,
    ShareOfAny,
)

# ``auto`` is resolved when the run starts (``sskd.precision.resolve_precision``), so that a command
# names the same run on every machine.
Precision = Literal["auto", "fp32", "tf32", "bf16"]


class ArchSettings(Settings):
    """A network: its architecture, and its learning rates in the published tables."""

    name: str
    base_lr: LearningRate
    paraphraser_lr: LearningRate | None = None

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.name not in ARCHITECTURES:
            raise ValueError(
                f"no architecture '{self.name}'{did_you_mean(self.name, ARCHITECTURES)} "
                f"(there are: {', '.join(ARCHITECTURES)}; {VARIABLE}=FILE.py adds one)"
            )
        return self


ALONE = "vanilla"  # the method of a network alone, unless another one is chosen


class TeacherSettings(ArchSettings):
    """The teacher of a student: one of the suite's own runs, or a checkpoint from elsewhere."""

    seed: Seed
    epoch: Literal["best", "last"]
    checkpoint: NonEmpty | None
    train: bool
    precompute: bool
    epochs: Epochs | None
    precision: Precision | None
    fraction: ShareOfAny
    label_noise: ShareBelowAll
    method: NonEmpty = ALONE
    batch_size: Count | None = None
    milestones: Milestones | None = None

    @field_validator("method")
    @classmethod
    def _trains_alone(cls, method: str) -> str:
        alone = [name for name, kind in METHODS.items() if not kind.needs_teacher]
        if method not in alone:
            raise ValueError(
                f"'{method}' does not train a network alone{did_you_mean(method, alone)} "
                f"(these do: {', '.join(alone)})"
            )
        return method


class ScheduleSettings(Settings):
    """A stepwise schedule: ``lr`` is multiplied by ``gamma`` after each milestone."""

    epochs: Epochs
    milestones: Milestones
    gamma: Gamma


class WeightingSettings(Settings):
    """The weights of CE and KD in the methods that add another term to both."""

    ce: NonNegative
    kd: NonNegative


class _Weighting(Settings):
    weighting: WeightingSettings


class WandbSettings(Settings):
    """Whether the run is logged to Weights & Biases, and where."""

    mode: Literal["auto", "online", "offline", "disabled"]
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]{1,128}$")]
    entity: NonEmpty | None
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]]


class Config(Settings):
    """The configuration of one run; ``teacher`` is None for a network alone.

    ``method`` and ``optimizer`` have the settings of the chosen class (``config_model``).
    """

    student: ArchSettings
    teacher: TeacherSettings | None
    method: Any
    dataset: DatasetSettings
    optimizer: Any
    schedule: ScheduleSettings
    wandb: WandbSettings
    seed: Seed
    batch_size: Count
    precision: Precision
    compile: Literal["auto", "off", "default"]
    graph: Literal["auto", "on", "off"]
    device: str
    augmentation: Literal["weak", "weak_and_strong"] = "weak"
    sync_batch_norm: bool = False
    gather_batch: bool = False
    runs: NonEmpty
    force: bool
    checkpoint_minutes: Positive
    checkpoint_seconds: NonNegative

    @field_validator("compile", "graph", mode="before")
    @classmethod
    def _on_and_off_are_words(cls, value: Any) -> Any:
        # YAML and Hydra read them as true and false.
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @property
    def strong_copies(self) -> bool:
        """Whether an epoch has a strong copy of each image."""
        return self.augmentation == "weak_and_strong"

    @field_validator("runs")
    @classmethod
    def _expanded(cls, runs: str) -> str:
        return str(expanded(runs))


def method_settings(name: str) -> type[BaseModel]:
    """Return the model of a method's settings: the keyword arguments of its constructor.

    The keyword arguments of its base classes, to which ``**shared`` passes, are included.
    """
    return _settings_of(METHODS[name])


@cache  # pydantic takes 10 ms for a model, and each job of a sweep needs one
def _settings_of(method: type[Method]) -> type[BaseModel]:
    own: dict[str, Any] = {}
    for kind in reversed(method.__mro__):
        if issubclass(kind, Method):
            own |= _keyword_arguments(kind.__init__)
    terms: dict[str, Any] = dict.fromkeys(method.terms, (NonNegative, ...))
    weights = create_model(f"{method.__name__}Weights", __base__=Settings, **terms)
    fields: dict[str, Any] = {**own, "name": (str, ...), "weights": (weights, ...)}
    return create_model(f"{method.__name__}Settings", __base__=Settings, **fields)


def _keyword_arguments(function: Callable[..., Any]) -> dict[str, Any]:
    hints = get_type_hints(function, include_extras=True)
    return {
        parameter.name: (hints[parameter.name], _default(parameter))
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def _default(parameter: inspect.Parameter) -> Any:
    return ... if parameter.default is inspect.Parameter.empty else parameter.default


def config_model(values: Mapping[str, Any]) -> type[Config]:
    """Return ``Config`` with the settings of the method and the optimizer that ``values`` name."""
    method = method_settings(_choice(values, "method", METHODS))
    return _config_of(method, OPTIMIZERS[_choice(values, "optimizer", OPTIMIZERS)].settings)


@cache
def _config_of(method: type[BaseModel], optimizer: type[BaseModel]) -> type[Config]:
    fields: dict[str, Any] = {"method": (method, ...), "optimizer": (optimizer, ...)}
    return create_model("Config", __base__=Config, **fields)


def read_config(composed: DictConfig) -> Config:
    """Check a composed configuration and return it typed.

    Raises:
        UserError: an unknown key, a missing one, a wrong type or a value out of range.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from None
    assert isinstance(values, dict)
    plain = {str(key): value for key, value in values.items()}
    if plain.pop("arch", None) is not None and "teacher" in plain:
        raise UserError(
            f"arch and teacher cannot be combined: use {command_name('teacher')} arch=NAME, or "
            f"{command_name('student')} arch@teacher=NAME arch@student=NAME"
        )
    if "teacher" in plain:
        # The weights of the methods that read it already have its values.
        _validated(_Weighting, {"weighting": plain.pop("weighting", None)})
    config = parse_config({"teacher": None, **plain})
    if not METHODS[config.method.name].needs_teacher:
        return config.model_copy(update={"teacher": None})
    if config.teacher is None:
        raise UserError(
            f"method={config.method.name} needs a teacher: use {command_name('student')}, "
            f"not {command_name('teacher')}, which trains a network alone"
        )
    return config


M = TypeVar("M", bound=BaseModel)


def _validated(model: type[M], values: Mapping[str, Any]) -> M:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_explain(problem, model, values) for problem in error.errors()]
        raise UserError("; ".join(problems)) from None


def parse_config(values: Mapping[str, Any]) -> Config:
    """Return the typed configuration of plain ``values``; raise UserError if they are wrong."""
    source = _choice(values, "dataset", SOURCES, "source")
    config = _validated(config_model(values), values)
    if config.dataset.crop not in (crops := SOURCES[source].crops):
        raise UserError(
            f"dataset.crop={config.dataset.crop}: dataset={source} has {' or '.join(crops)} crops; "
            f"use dataset.crop={crops[0]}"
        )
    if config.dataset.name != source and config.dataset.name in SOURCES:
        raise UserError(
            f"dataset.name={config.dataset.name}: is the name of another dataset, and this one is "
            f"{source}; choose another name"
        )
    return config


def _choice(
    values: Mapping[str, Any], group: str, known: Mapping[str, Any], key: str = "name"
) -> str:
    chosen = values.get(group)
    name = chosen.get(key) if isinstance(chosen, Mapping) else None
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"{group}.{key}: no {group} '{name}'{did_you_mean(str(name), known)} "
            f"(there are: {', '.join(known)}; {VARIABLE}=FILE.py adds one)"
        )
    return name


_WORDS_OF_PYDANTIC = re.compile("^(Value error, |Input |String |List )| after validation")


def _explain(problem: Any, model: type[BaseModel], values: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return about_unknown(path, fields_of(model))
    if problem["type"] == "missing":
        return f"{path}: missing; give it as {path}=VALUE"
    if problem["type"] == "string_unicode":
        return (
            f"{path}: is not valid UTF-8, which a run's files need; rename the file or folder, or "
            "give a symbolic link to it"
        )
    message = _WORDS_OF_PYDANTIC.sub("", problem["msg"])
    if problem["type"] == "list_type":
        message = "should be a list in brackets: [VALUE,VALUE]"
    given = _given(problem, values)
    value = "" if isinstance(given, Mapping) else f" (got {shortened(given)})"
    return f"{path}: {message}{value}"


def _given(problem: Any, values: Any) -> Any:
    """Return the value that a problem is about, as the user gave it, before conversion."""
    try:
        for part in problem["loc"]:
            values = values[part]
    except (LookupError, TypeError):
        return problem["input"]
    return values


def fields_of(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Return the fields of ``model`` and of the models in it, by their dotted names."""
    found = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if inspect.isclass(candidate) and issubclass(candidate, BaseModel):
                found |= fields_of(candidate, f"{prefix}{name}.")
    return found


def declared_defaults(model: type[BaseModel]) -> dict[str, Any]:
    """Return the defaults of the settings in ``model`` in Python, by dotted name.

    A configuration without a setting, such as one of an earlier version, means its default.
    """
    defaults: dict[str, Any] = {}
    for name, field in fields_of(model).items():
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            plain = value.model_dump() if isinstance(value, BaseModel) else value
            defaults = flatten({name: plain}) | defaults
    return defaults
