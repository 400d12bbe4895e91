"""Which image of a data set goes to which split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmce_ops.data.seeds import derive_seed
from fmce_ops.errors import DataError, ParamsError

IntArray = NDArray[np.int64]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Part:
    """The images ``indices`` (n,) of the data set's own split ``source``."""

    source: str
    indices: IntArray


def plan_splits(
    labels: Mapping[str, IntArray],
    classes: Sequence[str],
    *,
    validation: float,
    test: float,
    per_class: int | None,
    seed: int,
) -> dict[str, Part]:
    """Choose the images of train, val and test, class by class.

    A split that the data set brings along is used as it is. One that it lacks is held out of
    its training images: of each class the given fraction, rounded, at least one image.
    ``per_class`` keeps that many training images of each class and thins the other splits of the
    class by the same factor, rounded, to at least one image. The order within a split is drawn
    from ``seed``, so that any slice of it is a fair sample.

    Parameters
    ----------
    labels
        Labels (n,) of each split that the data set has; ``train`` is always among them.

    Raises
    ------
    ParamsError
        A fraction is not between 0 and 1, or ``per_class`` is below 1.
    DataError
        A class has no image in one of the splits.
    """
    missing = {"val": validation, "test": test}
    held_out = {name: share for name, share in missing.items() if name not in labels}
    _check(held_out, per_class)
    chosen: dict[str, list[IntArray]] = {name: [] for name in SPLITS}
    for number, name in enumerate(classes):
        of_class = _hold_out(_shuffled_class(labels, number, seed), held_out)
        for split, indices in _thin(of_class, per_class).items():
            if not len(indices):
                raise DataError(
                    f"Class {name!r} has no image in the split {split!r}: "
                    "add images of it, or hold out a smaller fraction."
                )
            chosen[split].append(indices)
    return {
        split: Part(
            "train" if split in held_out else split,
            _random(seed, SPLITS.index(split)).permutation(np.concatenate(indices)),
        )
        for split, indices in chosen.items()
    }


def _check(held_out: Mapping[str, float], per_class: int | None) -> None:
    for name, share in held_out.items():
        if not 0 < share < 1:
            raise ParamsError(
                f"The fraction of training images held out as {name!r} is {share}: "
                "give a number between 0 and 1."
            )
    if per_class is not None and per_class < 1:
        raise ParamsError(f"per_class is {per_class}: give 1 or more, or leave it empty for all.")


def _shuffled_class(labels: Mapping[str, IntArray], number: int, seed: int) -> dict[str, IntArray]:
    return {
        split: _random(seed, SPLITS.index(split), number).permutation(
            np.flatnonzero(values == number)
        )
        for split, values in labels.items()
    }


def _hold_out(
    of_class: Mapping[str, IntArray], held_out: Mapping[str, float]
) -> dict[str, IntArray]:
    """Move the first images of train to each split of ``held_out``."""
    result = dict(of_class)
    total = len(of_class["train"])
    for split, share in held_out.items():
        count = max(1, round(total * share))
        result[split], result["train"] = np.split(result["train"], [count])
    return result


def _thin(of_class: Mapping[str, IntArray], per_class: int | None) -> dict[str, IntArray]:
    total = len(of_class["train"])
    if per_class is None or total <= per_class:
        return dict(of_class)
    return {
        split: indices[: max(1, round(len(indices) * per_class / total))]
        for split, indices in of_class.items()
    }


def _random(*parts: int) -> Any:
    # RandomState: NumPy promises that its stream never changes; that of default_rng may.
    return np.random.RandomState(derive_seed(*parts) % 2**32)
