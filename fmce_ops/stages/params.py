"""``params.yaml`` as typed models: every key is known, every value is in range."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from yaml.constructor import ConstructorError

from fmce_ops.errors import ParamsError


def _listed(value: object) -> object:
    """A name by itself is a list of one."""
    return [value] if isinstance(value, str) else value


def _distinct(values: tuple[float, ...]) -> tuple[float, ...]:
    """Each value names what is made with it, by six digits."""
    if len({f"{value:g}" for value in values}) < len(values):
        raise ValueError("two of them are the same to six digits, give each once")
    return values


Precision = Literal["32-true", "bf16-mixed", "16-mixed"]

Count = Annotated[int, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Margin = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Modules = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_listed)]
Alphas = Annotated[tuple[Positive, ...], Field(min_length=1), AfterValidator(_distinct)]
Ratios = Annotated[tuple[Fraction, ...], Field(min_length=1), AfterValidator(_distinct)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Folds = Literal[0, 2, 3, 4, 5, 6, 7, 8, 9, 10]  # one fold would leave nothing to learn from
RunName = Annotated[str, Field(pattern="^[A-Za-z0-9_]+$")]  # part of the name of a stage
DatasetName = Literal["digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "image-folder"]


RUN_SECTIONS = ("data", "model", "train", "markers")  # that a run of maturity.runs may change


def _is_of_numbers(kind: object) -> bool:
    known = kind in (int, float) or isinstance(kind, int)  # the latter in a Literal
    return known or any(_is_of_numbers(part) for part in get_args(kind))


class Section(BaseModel):
    """A section of ``params.yaml``; unknown keys are refused, and yes or no for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: object, info: ValidationInfo) -> object:
        values = value if isinstance(value, list | tuple) else [value]
        kind = cls.model_fields[str(info.field_name)].annotation
        if any(isinstance(one, bool) for one in values) and _is_of_numbers(kind):
            raise ValueError("give a number")
        return value


class DataParams(Section):
    """Which images, and how they are split."""

    dataset: DatasetName = "digits"
    root: str = "data/raw"  # where the original files are, or are downloaded to
    image_size: Annotated[int, Field(ge=4)] = 32  # px, the side that the network sees
    per_class: Count | None = None  # at most so many training images of a class
    validation: Fraction = 0.1  # of the training images
    test: Fraction = 0.2  # of all images, where the data set has no test split
    seed: Seed = 0


class ModelParams(Section):
    """Which network, and where its feature map is taken."""

    backbone: str = "shufflenet_v2_x0_5"  # a torchvision name or package.module:factory
    stem: Literal["standard", "small"] = "small"  # small: stride 1, no pooling, for small images
    cut: str | None = None  # the submodule whose output is the feature map


class AugmentParams(Section):
    """Augmentation of the training images."""

    pad: Annotated[int, Field(ge=0)] = 0  # px of padding for random crops
    flip: bool = False  # horizontal flips


class TrainParams(Section):
    """The original task."""

    epochs: Count = 30
    points_per_epoch: Count = 1  # losses and weights are recorded so often
    batch_size: Count = 128
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Positive = 1e-3
    weight_decay: Weight = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    augment: AugmentParams = AugmentParams()
    precision: Precision = "32-true"
    seed: Seed = 0


class MarkersParams(Section):
    """CQI and epoch markers (arXiv 2405.04041)."""

    phases: Annotated[int, Field(ge=2)] = 10
    mu: Positive = 1e-4
    relative: bool = False  # mu times the largest smoothed loss
    alpha: Fraction = 0.85
    window: Count = 10
    method: Literal["paper", "ema"] = "paper"
    unconverged: Literal["last", "error"] = "last"


class FeaturesParams(Section):
    """The FMCS shards."""

    dtype: Literal["float16", "float32"] = "float16"
    compression: Literal["zstd"] | None = None
    images_per_shard: Count = 4096
    batch_size: Count = 256


class FmceParams(Section):
    """FMCE-Net."""

    epochs: Count = 5
    batch_size: Count = 256
    lr: Positive = 1e-3
    split: Literal["image", "paper"] = "image"
    test: Annotated[float, Field(gt=0, lt=1)] = 0.25  # of the images; the paper's 3:1
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of all images; chooses the epoch
    precision: Precision = "32-true"
    seed: Seed = 0


class PosttrainParams(Section):
    """Post-training of single modules (arXiv 2506.07188)."""

    modules: Modules | None = None  # names or first..last; null: what suits the mode
    mode: Literal["mixed", "local", "soft"] = "soft"  # local, soft: the targets alone
    margin: Margin = 1.0  # of the corrected logits
    pull: Fraction = 0.5  # of the corrected logits towards the mean of their class
    folds: Folds = 2  # networks whose logits of unseen images join the checkpoint's
    alphas: Alphas = (0.1, 1.0)  # weights of targets
    epochs: Count = 10
    batch_size: Count = 256
    lr: Positive = 1e-3
    schedule: Literal["one-cycle", "constant"] = "one-cycle"
    weight_decay: Weight = 1e-2
    seeds: Count = 3
    images_per_shard: Count = 4096


class PathwaysParams(Section):
    """Gates on the filters (arXiv 1906.01166)."""

    modules: Modules | None = None  # convolutions; null: all but those on shortcuts
    ratios: Ratios = (0.5,)  # R, of open gates
    information: Weight = 0.01
    alignment: Weight = 1.0
    sparsity: Weight = 3e-3
    epochs: Count = 10
    batch_size: Count = 128
    optimizer: Literal["sgd", "adam"] = "adam"
    lr: Positive = 1e-3
    gate_lr: Positive = 1e-2
    weight_decay: Weight = 1e-4
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    augment: AugmentParams = AugmentParams()
    tolerance: Fraction = 0.005  # of validation accuracy may be lost by the network to register
    attacked: Count = 1000  # images of training and of test that are attacked
    known_attack: Literal["fgsm", "pgd"] = "pgd"  # the one that the detector learns from
    known_strength: Positive = 8.0  # of 255
    seed: Seed = 0


class StudyParams(Section):
    """What is described of each run of ``maturity.runs``."""

    images: Annotated[int, Field(ge=16)] = 256  # of training; fewer are no example of many
    checkpoints: Annotated[int, Field(ge=2)] = 12  # of a run at most
    seed: Seed = 0  # draws the images


class MaturityParams(Section):
    """A judge that has seen several runs, for runs that it has not seen."""

    runs: dict[RunName, dict[str, Any]] = {}  # name: what differs from data, model, train, markers
    steps: Count = 500  # of the judge's training
    seed: Seed = 0


class ReportParams(Section):
    """The report."""

    title: str = "Feature map convergence"


class Params(Section):
    """All of ``params.yaml``, one section for each concern."""

    data: DataParams = DataParams()
    model: ModelParams = ModelParams()
    train: TrainParams = TrainParams()
    markers: MarkersParams = MarkersParams()
    features: FeaturesParams = FeaturesParams()
    fmce: FmceParams = FmceParams()
    posttrain: PosttrainParams = PosttrainParams()
    pathways: PathwaysParams = PathwaysParams()
    study: StudyParams = StudyParams()
    maturity: MaturityParams = MaturityParams()
    report: ReportParams = ReportParams()

    @model_validator(mode="after")
    def _phases_fit(self) -> "Params":
        points = self.train.epochs * self.train.points_per_epoch
        if self.markers.phases > points:
            raise ValueError(
                f"markers.phases is {self.markers.phases} but train.epochs x "
                f"train.points_per_epoch records {points} points: record more or ask for fewer"
            )
        return self

    @model_validator(mode="after")
    def _runs_make_sense(self) -> "Params":
        for name in self.maturity.runs:
            try:
                self.of_run(name)
            except ValidationError as error:
                sentence = _sentence(error).rstrip(".")
                raise ValueError(f"maturity.runs.{name}: {sentence}") from None
        return self

    def of_run(self, name: str) -> "Params":
        """The parameters of a run of ``maturity.runs``: these, with what it says laid over them."""
        changes = self.maturity.runs[name]
        strange = [section for section in changes if section not in RUN_SECTIONS]
        if strange:
            raise ValueError(f"a run changes {', '.join(RUN_SECTIONS)}, not {strange[0]}")
        kept = self.model_dump(include={*RUN_SECTIONS, "study"})
        return Params.model_validate(_laid_over(kept, changes))


def _laid_over(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: _laid_over(below.get(key), value) for key, value in above.items()}}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice: the second would silently take the place of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_params(path: Path) -> Params:
    """Read ``params.yaml``.

    Raises
    ------
    ParamsError
        The file is missing or no YAML, a key is given twice or unknown (the nearest right key is
        named), or a value is out of range.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ParamsError(
            f"{path} does not exist: run this in the project folder, or make one with "
            "'fmce-ops init'."
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ParamsError(f"{path} is not readable YAML ({reason}): mend that line.") from None
    try:
        return Params.model_validate(raw if raw is not None else {})
    except ValidationError as error:
        raise ParamsError(f"{path}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    location = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {location}{_nearest(first['loc'])}"
    if first["type"] == "model_type":
        return f"{location or 'the file'} is no section: give it keys, or leave it out."
    message = first["msg"].removeprefix("Value error, ")
    given = "" if not location else f"{location} is {first['input']!r}: "
    return f"{given}{message[0].lower() + message[1:]}."


def _nearest(location: tuple[int | str, ...]) -> str:
    section: type[BaseModel] = Params
    for part in location[:-1]:
        section = cast(type[BaseModel], section.model_fields[str(part)].annotation)
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    if not close:
        return f"; the keys here are {', '.join(known)}."
    return f"; did you mean {'.'.join([*map(str, location[:-1]), close[0]])}?"


def section_values(params: Params, *names: str) -> dict[str, Any]:
    """The named sections as plain values, for the key of a stage and the record of a run."""
    return params.model_dump(mode="json", include=set(names))
