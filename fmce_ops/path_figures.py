"""The pictures of decoupling: what paths cost and keep, how alike they are, what they detect."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from fmce_ops.figures import LARGEST, plain
from fmce_ops.training.adversarial import Detection
from fmce_ops.training.pathways import Need

_NAMED = 100  # classes whose names have room
_COLOURS = {"paths": "#1f5fa8", "shared": "#2a9d6f", "pruned": "#c8401e", "dense": "#333333"}
_WORDS = {
    "paths": "a path for each image",
    "shared": "filters that most images open",
    "pruned": "filters of largest magnitude",
}
_DETECTORS = {
    "path": ("path", "#1f5fa8"),
    "confidence": ("largest probability", "#9aa7b5"),
    "features": ("Mahalanobis distance", "#c8401e"),
}


def tradeoff_figure(summary: Mapping[str, Any], speed: Mapping[str, Any]) -> Figure:
    """Test accuracy against multiply-adds, and against milliseconds of one image.

    Parameters
    ----------
    summary, speed : what the stage writes to ``pathways.json`` and ``speed.json``.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    dense = summary["dense"]
    for kind, word in _WORDS.items():
        rows = [row[kind] for row in summary["ratios"]]
        accuracy = [100 * row["test_accuracy"] for row in rows]
        share = [row["multiply_adds"] / dense["multiply_adds"] for row in rows]
        times = [times[kind]["alone"] for times in speed["ratios"]]
        _line(left, share, accuracy, kind, word)
        _line(right, times, accuracy, kind, word)
    for axis, place in ((left, 1.0), (right, speed["dense"]["alone"])):
        axis.plot(
            place, 100 * dense["test_accuracy"], "*", color=_COLOURS["dense"], markersize=13,
            label="dense network",
        )  # fmt: skip
        axis.grid(alpha=0.25)
    left.set(
        xlabel="multiply-adds of an image, share of dense",
        ylabel="test accuracy, %",
        title="Accuracy against work",
    )
    right.set(xlabel="milliseconds of one image", title="Accuracy against time")
    left.legend(fontsize=8)
    return figure


def _line(axis: Axes, x: Sequence[float], y: Sequence[float], kind: str, word: str) -> None:
    order = np.argsort(x)
    axis.plot(
        np.asarray(x)[order], np.asarray(y)[order], "o-", color=_COLOURS[kind], label=word,
        markersize=5, linewidth=1,
    )  # fmt: skip


def similarity_figure(alike: Tensor, names: Sequence[str]) -> Figure:
    """Mean agreement of the paths of two images, by their classes (K, K)."""
    side = min(LARGEST, max(4.5, 0.5 * len(names) + 1.5))
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    values = 100 * alike.numpy()
    picture = axis.imshow(values, cmap="viridis")
    figure.colorbar(picture, ax=axis, label="gates in which two images agree, %", shrink=0.8)
    if len(names) <= 20 and not np.isnan(values).all():
        middle = np.nanmean([np.nanmin(values), np.nanmax(values)])
        for (i, j), value in np.ndenumerate(values):
            colour = "black" if value > middle else "white"
            axis.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)
    _class_ticks(axis, names, both=True)
    axis.set_title("How alike are paths")
    return figure


def profiles_figure(profiles: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    """How often each class opens each filter: one strip (K, filters) a layer.

    Filters are sorted by how often they are open.

    Layers whose filters are open for every image are left out.
    """
    layers = [name for name, found in profiles.items() if found.min() < 1] or list(profiles)[-1:]
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    height = min(LARGEST, rows * (0.09 * len(names) + 0.55) + 0.6)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, height), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(layers) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, layers, strict=False):
        found = profiles[name]
        found = found[:, found.mean(0).argsort(descending=True, stable=True)]
        picture = axis.imshow(found.numpy(), aspect="auto", cmap="magma", vmin=0, vmax=1)
        axis.set_title(f"{name}: {found.mean():.0%} open", fontsize=7)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[:, 0]:
        if len(names) <= _NAMED:
            axis.set_yticks(range(len(names)), plain(names), fontsize=5)
    figure.colorbar(picture, ax=axes, label="share of the class's images", shrink=0.6, aspect=40)
    figure.suptitle("Filters (columns) that each class (rows) opens, where some are ever closed")
    return figure


def needs_figure(needs: Sequence[Need], names: Sequence[str]) -> Figure:
    """Accuracy of every class and of the others before and after filters are switched off."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharey=True)
    words = ["all filters", "without those the class needs", "without as many of all it opens"]
    colours = [_COLOURS["dense"], _COLOURS["pruned"], _COLOURS["paths"]]
    places = np.arange(len(needs))
    for axis, part, title in ((left, "own", "The class"), (right, "others", "The other classes")):
        for number, word in enumerate(words):
            values = [100 * getattr(need, part)[number] for need in needs]
            axis.bar(places + 0.27 * (number - 1), values, 0.27, label=word, color=colours[number])
        axis.set(title=title)
        axis.grid(axis="y", alpha=0.25)
        _class_ticks(axis, names)
    left.set_ylabel("test accuracy, %")
    right.legend(fontsize=7, loc="lower right")
    return figure


def detection_figure(detection: Detection) -> Figure:
    """ROC curves of every attack and detector."""
    attacks = list(detection.curves)
    columns = min(4, len(attacks))
    rows = -(-len(attacks) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 3.1 * rows), squeeze=False, layout="constrained"
    )
    for axis, attack in zip(axes.flat, attacks, strict=False):
        for name, curve in detection.curves[attack].items():
            word, colour = _DETECTORS[name]
            axis.plot(
                curve.false_alarms, curve.found, color=colour, label=f"{word} {curve.auc:.3f}"
            )
        axis.plot([0, 1], [0, 1], color="#cccccc", linewidth=0.8)
        axis.set_title(f"{attack}: accuracy {detection.accuracy[attack]:.0%}", fontsize=9)
        axis.legend(fontsize=7, loc="lower right", title="area", title_fontsize=7)
    figure.supxlabel("clean images that raise an alarm", fontsize=9)
    figure.supylabel("attacked images that are found", fontsize=9)
    return figure


def path_figure(
    picture: NDArray[np.uint8],
    open_shares: Mapping[str, float],
    agreement: Tensor,
    probabilities: Tensor,
    names: Sequence[str],
) -> Figure:
    """One image, how many filters it opens in each layer, and the classes whose paths are near.

    Parameters
    ----------
    picture : (s, s, 3).
    agreement, probabilities : (K,).
    """
    figure, (image, layers, classes) = plt.subplots(
        1, 3, figsize=(12, max(3.2, 0.16 * len(open_shares) + 1)), layout="constrained",
        width_ratios=[1, 2, 1.4],
    )  # fmt: skip
    image.imshow(picture)
    image.set_axis_off()
    places = np.arange(len(open_shares))
    layers.barh(places, [100 * share for share in open_shares.values()], color=_COLOURS["paths"])
    layers.set_yticks(places, list(open_shares), fontsize=6)
    layers.invert_yaxis()
    layers.set(xlabel="open filters, %", xlim=(0, 100), title="Its path")
    order = agreement.argsort(descending=True)[:10]
    classes.barh(np.arange(len(order)), 100 * agreement[order], color=_COLOURS["shared"])
    words = plain(names)
    labels = [f"{words[i]} (p {float(probabilities[i]):.2f})" for i in order.tolist()]
    classes.set_yticks(np.arange(len(order)), labels, fontsize=8)
    classes.invert_yaxis()
    low = 100 * float(torch.amin(agreement[order]))
    classes.set(xlabel="gates that agree, %", title="Nearest classes", xlim=(max(0, low - 5), 100))
    return figure


def _class_ticks(axis: Axes, names: Sequence[str], both: bool = False) -> None:
    if len(names) > _NAMED:
        return
    words, turned = plain(names), 45 if max(map(len, names)) > 3 else 0
    axis.set_xticks(range(len(names)), words, rotation=turned, fontsize=8)
    if both:
        axis.set_yticks(range(len(names)), words, fontsize=8)
