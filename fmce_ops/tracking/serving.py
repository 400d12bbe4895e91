"""The model folder: weights and a description, no pickle and no code to run; and how it answers.

A folder holds ``network.json`` (what to build) and ``weights.safetensors``. MLflow loads it through
``_load_pyfunc`` below, with the copy of this package that the logged model carries.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from numpy.typing import NDArray
from torch import nn

from fmce_ops.data import to_input
from fmce_ops.errors import ModelError
from fmce_ops.files import write_json
from fmce_ops.maturity import (
    DESCRIPTORS,
    FEW,
    Judge,
    Score,
    bags,
    describe,
    describe_each,
    mean_score,
    reading,
)
from fmce_ops.models import FmceNet, build, load_into, save_weights
from fmce_ops.pathways import PathNetwork

Kind = Literal["fmce-net", "classifier", "pathways", "maturity"]
NETWORK, WEIGHTS = "network.json", "weights.safetensors"
_SCORE = ("score", "low", "high")
MATURITY_OPTIONS = {"depth": 1.0, "input": "maps"}  # of a request to a judge of maturity


@dataclass(frozen=True)
class Network:
    """What a model folder describes.

    ``spec`` says what to build, ``made_from`` what it was trained on: the digests of its data and
    the settings of its split.
    """

    kind: Kind
    spec: dict[str, Any]
    made_from: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Network":
        """The description in a model folder; nothing is built yet."""
        with _described(folder):
            raw = json.loads((folder / NETWORK).read_text(encoding="utf-8"))
            if raw["kind"] not in get_args(Kind):
                raise ValueError(f"unknown kind {raw['kind']!r}")
            return cls(raw["kind"], dict(raw["spec"]), dict(raw["made_from"]))

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one input: a feature map, or an image with values 0 to 255; -1 for any."""
        if self.kind == "maturity":
            return -1, -1, -1
        if self.kind == "fmce-net":
            channels, height, width = self.spec["shape"]
            return channels, height, width
        return self.spec["channels"], self.spec["side"], self.spec["side"]

    @property
    def answers(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what an input gets; the probabilities are of phases or classes."""
        if self.kind == "maturity":
            return {f"{of}{name}": () for of in ("", "together_") for name in _SCORE}
        of_image = {"open_gates": (), "adversarial": ()} if self.kind == "pathways" else {}
        count = self.spec["phases"] if self.kind == "fmce-net" else len(self.spec["classes"])
        return {"probabilities": (count,), **of_image}

    def build(self) -> nn.Module:
        """The network that the description names, with random weights."""
        if self.kind == "fmce-net":
            return FmceNet(self.input_shape, self.spec["phases"])
        if self.kind == "maturity":
            return Judge(self.spec["width"], self.spec["members"])
        classes = len(self.spec["classes"])
        classifier = build(
            self.spec["backbone"],
            classes,
            stem=self.spec["stem"],
            cut=self.spec["cut"],
            in_size=self.spec["image_size"],
        )
        if self.kind == "classifier":
            return classifier
        return PathNetwork(classifier, classes, self.spec["modules"])

    def prepare(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the network itself takes, from what a user sends."""
        if self.kind in ("fmce-net", "maturity"):
            return inputs
        mean, std = self.spec["mean"], self.spec["std"]
        return to_input(inputs, size=self.spec["image_size"], mean=mean, std=std)


def save_network(folder: Path, network: Network, state: dict[str, torch.Tensor]) -> None:
    """Write a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / WEIGHTS, state, {})
    write_json(folder / NETWORK, network.__dict__)


def load_network(folder: Path) -> tuple[Network, nn.Module]:
    """Read a model folder; nothing in it is executed.

    Raises
    ------
    ModelError
        The folder is not one of this project's models, or is damaged.
    """
    network = Network.read(folder)
    with _described(folder):
        module = network.build()
    load_into(module, folder / WEIGHTS)
    return network, module.eval()


@contextmanager
def _described(folder: Path) -> Iterator[None]:
    """Say in one sentence that a description makes no sense."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ModelError(
            f"{folder} does not hold a model of fmce-ops ({type(error).__name__}: {error}): "
            "give the URI of a model that one of its stages logged."
        ) from error


@dataclass(frozen=True)
class Predictor:
    """What MLflow serves: inputs in, probabilities out."""

    network: Network
    module: nn.Module

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """(n, C, H, W) finite numbers -> (n, K) float64 probabilities.

        A network with gates answers by name: ``probabilities``, ``open_gates`` (n,) the share of
        filters that an image took, ``adversarial`` (n,) the detector's score, 0 to 1. A judge of
        maturity answers with ``score``, ``low`` and ``high`` (n,) of each feature map, and the
        same of all ``together_`` (1,); ``params`` say at which ``depth`` of its network the module
        lies, 0 the first to 1 the last, and whether the ``input`` is maps or (n, D, 1, 1) of their
        descriptors.
        """
        inputs = torch.from_numpy(self._checked(model_input))
        if isinstance(self.module, Judge):
            return _judged(self.module, inputs, **{**MATURITY_OPTIONS, **(params or {})})
        parts = [self._answer(part) for part in inputs.split(256)]
        answers = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return answers if len(answers) > 1 else answers["probabilities"]

    def _checked(self, model_input: Any) -> NDArray[np.float32]:
        expected = ("n", *("any" if n == -1 else n for n in self.network.input_shape))
        try:
            inputs = np.asarray(model_input, dtype=np.float32)
        except (TypeError, ValueError):
            raise _refusal(f"the input is not an array of numbers of shape {expected}.") from None
        wanted = self.network.input_shape
        if inputs.ndim != 4 or any(
            w not in (-1, n) for w, n in zip(wanted, inputs.shape[1:], strict=True)
        ):
            raise _refusal(f"the input has shape {inputs.shape}: send shape {expected}.")
        if not len(inputs):
            raise _refusal("the input is empty: send at least one.")
        if not np.isfinite(inputs).all():
            raise _refusal("the input has a number that is not finite: send finite numbers.")
        return np.ascontiguousarray(inputs)

    @torch.inference_mode()
    def _answer(self, inputs: torch.Tensor) -> dict[str, NDArray[np.float64]]:
        prepared = self.network.prepare(inputs)
        if not isinstance(self.module, PathNetwork):
            return {"probabilities": _probabilities(self.module(prepared))}
        found = self.module.answer(prepared)
        return {
            "probabilities": _probabilities(found.logits),
            "open_gates": found.codes.double().mean(1).numpy(),
            "adversarial": found.adversarial.double().numpy(),
        }


@torch.inference_mode()
def _judged(
    judge: Judge, inputs: torch.Tensor, depth: float, input: str
) -> dict[str, NDArray[np.float64]]:
    if not 0 <= depth <= 1:
        raise _refusal(f"the depth is {depth}: send 0 for the first module to 1 for the last.")
    try:
        each, together = _read(inputs, input)
    except ModelError as error:
        raise _refusal(str(error)) from None
    found: dict[str, NDArray[np.float64]] = {}
    own, shared = (
        judge.scores(reading(rows), torch.full((len(rows),), float(depth)))
        for rows in (each, together)
    )
    for of, scores in {"": own, "together_": [mean_score(shared)]}.items():
        found |= {f"{of}{n}": np.array(v) for n, v in zip(_SCORE, _columns(scores), strict=True)}
    return found


def _read(inputs: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Descriptors of each map, and of bags of them."""
    if kind == "maps":
        each = describe_each(inputs)
        if len(inputs) < FEW:
            return each, each  # so few tell no more than each by itself
        return each, torch.stack([describe(bag) for bag in bags(inputs)])
    if kind != "descriptors":
        raise _refusal(f"the input is said to be {kind!r}: say 'maps' or 'descriptors'.")
    if inputs.shape[1:] != (DESCRIPTORS, 1, 1):
        raise _refusal(
            f"the descriptors have shape {tuple(inputs.shape)}: send (n, {DESCRIPTORS}, 1, 1)."
        )
    rows = inputs[:, :, 0, 0]
    return rows, rows.mean(0, keepdim=True)


def _columns(scores: list[Score]) -> tuple[list[float], list[float], list[float]]:
    return [s.value for s in scores], [s.low for s in scores], [s.high for s in scores]


def _probabilities(logits: torch.Tensor) -> NDArray[np.float64]:
    if not torch.isfinite(logits).all():
        raise _refusal("the input is so large that the network overflows: scale it down.")
    return logits.double().softmax(dim=1).numpy()


def _refusal(sentence: str) -> MlflowException:
    return MlflowException(sentence, error_code=INVALID_PARAMETER_VALUE)


def _load_pyfunc(data_path: str) -> Predictor:
    """The name that MLflow looks for."""
    return Predictor(*load_network(Path(data_path)))
