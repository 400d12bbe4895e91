"""The pictures: the four panels of the paper's figure 3, Grad-CAM across phases, confusion."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from fmce_ops.convergence import Losses, Markers, Method, cqi, smooth
from fmce_ops.files import atomic
from fmce_ops.models import Classifier
from fmce_ops.training.comparison import Interval

LARGEST = 40.0  # inches
_RAW, _SMOOTH, _MARK = "#9aa7b5", "#1f5fa8", "#c8401e"


def plain(names: Sequence[str]) -> list[str]:
    """Class names as matplotlib draws them; a dollar would begin a formula."""
    return [name.replace("$", r"\$") for name in names]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, the same bytes for the same picture."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def curve_figure(
    losses: Losses, markers: Markers, *, alpha: float, window: int, method: Method
) -> Figure:
    """Loss, CQI, markers on the loss, markers on the log loss (arXiv 2405.04041, figure 3)."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    points = np.arange(1, len(losses) + 1)
    smoothed = smooth(losses, alpha, method)
    _loss_panel(axes[0, 0], points, losses, smoothed)
    _cqi_panel(axes[0, 1], points, cqi(losses, alpha, window, method), markers)
    _marker_panel(axes[1, 0], points, smoothed, markers, "Epoch markers on the loss", "S")
    _marker_panel(
        axes[1, 1], points, np.log(smoothed), markers, "Epoch markers on the log loss", "log S"
    )
    for axis in axes.flat:
        axis.set_xlabel("point")
        axis.grid(alpha=0.25)
    if not markers.converged:
        figure.suptitle("not converged by mu: the last point serves as the last marker")
    return figure


def _loss_panel(
    axis: Axes, points: NDArray[np.int64], losses: Losses, smoothed: NDArray[np.float64]
) -> None:
    axis.set_title("Training loss")
    axis.plot(points, losses, color=_RAW, label="raw L")
    axis.plot(points, smoothed, color=_SMOOTH, label="smoothed S")
    axis.legend()


def _cqi_panel(
    axis: Axes, points: NDArray[np.int64], indicator: NDArray[np.float64], markers: Markers
) -> None:
    axis.set_title("Convergence quantification indicator")
    axis.semilogy(points, indicator, color=_SMOOTH, label="CQI")
    axis.axhline(markers.mu, color=_MARK, linestyle="--", label=f"mu = {markers.mu:.3g}")
    if markers.converged:
        axis.axvline(markers.points[-1], color=_MARK, linewidth=0.8)
    axis.legend()


def _marker_panel(
    axis: Axes,
    points: NDArray[np.int64],
    curve: NDArray[np.float64],
    markers: Markers,
    title: str,
    label: str,
) -> None:
    axis.set_title(title)
    axis.plot(points, curve, color=_SMOOTH, label=label)
    marked = np.array(markers.points)
    axis.plot(marked, curve[marked - 1], "o", color=_MARK, markersize=5)
    axis.hlines(curve[marked - 1], 0, marked, color=_MARK, linewidth=0.5, alpha=0.5)
    for phase, point in enumerate(markers.points, start=1):
        axis.annotate(
            str(phase), (point, curve[point - 1]), (4, 4), textcoords="offset points", fontsize=8
        )
    axis.legend()


def confusion_figure(matrix: NDArray[np.int64], title: str, names: Sequence[str]) -> Figure:
    """(K, K) counts: row truth, column prediction, shaded by the share of the row."""
    names, side = plain(names), min(LARGEST, max(4.5, 0.55 * len(matrix) + 1.5))
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axis, label="share of the true class", shrink=0.8)
    if len(matrix) <= 20:
        for (i, j), count in np.ndenumerate(matrix):
            if count:
                shade = "white" if shares[i, j] > 0.5 else "black"
                axis.text(j, i, str(count), ha="center", va="center", color=shade, fontsize=8)
        axis.set_xticks(
            range(len(names)), names, rotation=45 if len(max(names, key=len)) > 3 else 0
        )
        axis.set_yticks(range(len(names)), names)
    axis.set(title=title, xlabel="predicted", ylabel="true")
    return figure


def gradcam(classifier: Classifier, inputs: Tensor, labels: Tensor) -> NDArray[np.float32]:
    """Grad-CAM of the feature map for the given classes, scaled to 0..1 for each image.

    Parameters
    ----------
    inputs : (n, 3, H, W) as the network takes them.
    labels : (n,) the classes that are explained.

    Returns
    -------
    (n, H, W) float32; zero where nothing speaks for the class.
    """
    from captum.attr import LayerAttribution, LayerGradCam

    classifier.eval()
    explain = LayerGradCam(classifier, classifier.backbone)
    maps = explain.attribute(inputs, target=labels, relu_attributions=True)
    maps = LayerAttribution.interpolate(maps, inputs.shape[-2:], "bilinear").detach()[:, 0]
    highest = maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(highest > 0, maps / highest.clamp_min(1e-12), 0 * maps).numpy()


def gradcam_figure(
    images: Tensor, names: Sequence[str], heat: NDArray[np.float32], points: Sequence[int]
) -> Figure:
    """Rows of images, columns of phases (arXiv 2405.04041, figures 4 to 6).

    Parameters
    ----------
    images : (n, c, s, s) uint8.
    heat : (K, n, H, W) Grad-CAM of every phase, 0..1.
    points : the point of each phase.
    """
    names, rows, columns = plain(names), len(images), len(points) + 1
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1.15 * columns, 1.25 * rows + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for i, image in enumerate(images):
        picture = image.permute(1, 2, 0).expand(-1, -1, 3).numpy()
        _picture(axes[i, 0], picture, names[i] if i else f"image\n{names[i]}")
        for k, point in enumerate(points):
            _picture(axes[i, k + 1], picture, "" if i else f"phase {k + 1}\npoint {point}")
            extent = (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)
            axes[i, k + 1].imshow(heat[k, i], cmap="jet", alpha=0.5, extent=extent, vmin=0, vmax=1)
    return figure


def _picture(axis: Axes, picture: NDArray[np.uint8], title: str) -> None:
    axis.imshow(picture)
    axis.set_title(title, fontsize=7)
    axis.set_axis_off()


def arms_figure(
    accuracies: Mapping[str, Sequence[float]], gains: Mapping[str, Mapping[str, Interval]]
) -> Figure:
    """Test accuracy of every arm and seed, and what the targets gain over each control.

    Parameters
    ----------
    accuracies : arm -> one value for each seed.
    gains : control -> split (test and val) -> paired difference to it.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    names = list(accuracies)
    for place, name in enumerate(names):
        values = 100 * np.asarray(accuracies[name])
        left.plot(np.full(len(values), place), values, "o", color=_RAW, markersize=6)
        left.plot(place, values.mean(), "_", color=_MARK, markersize=26)
    left.set_xticks(range(len(names)), names)
    left.set(title="Test accuracy of each seed, and the mean", ylabel="%")
    left.margins(x=0.2)
    for split, color, shift in (("test", _SMOOTH, 0.12), ("val", _RAW, -0.12)):
        for place, splits in enumerate(gains.values()):
            interval, label = splits[split], None if place else split
            right.plot(100 * interval.mean, place + shift, "o", color=color, label=label)
            if interval.low is not None and interval.high is not None:
                ends = 100 * interval.low, 100 * interval.high
                right.hlines(place + shift, *ends, color=color)
    right.legend()
    right.axvline(0, color=_MARK, linestyle="--", linewidth=0.8)
    right.set_yticks(range(len(gains)), [f"over {name}" for name in gains])
    right.set(title="Gain of frp, 95 % interval", xlabel="percentage points of accuracy")
    right.margins(y=0.3)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return figure


def targets_figure(
    images: Tensor,
    names: Sequence[str],
    made: NDArray[np.float32],
    target: NDArray[np.float32],
    before: NDArray[np.float32],
    after: NDArray[np.float32],
) -> Figure:
    """What a module made of images, what it should have made, and Grad-CAM before and after.

    Parameters
    ----------
    images : (n, c, s, s) uint8.
    made, target : (n, C, h, w) or (n, C) outputs of the module.
    before, after : (n, H, W) Grad-CAM of the incoming and of the post-trained network, 0..1.
    """
    figure, axes = plt.subplots(
        len(images), 7, figsize=(14, 1.9 * len(images) + 0.5), squeeze=False, layout="constrained"
    )
    titles = [
        "image",
        "made",
        "target",
        "target - made",
        "change of each channel",
        "before",
        "after",
    ]
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=9)
    for i, image in enumerate(images):
        picture = image.permute(1, 2, 0).expand(-1, -1, 3).numpy()
        _output_panels(list(axes[i, 1:4]), made[i], target[i])
        change = (target[i] - made[i]).reshape(len(made[i]), -1).mean(1)
        axes[i, 4].fill_between(range(len(change)), change, step="mid", color=_SMOOTH)
        axes[i, 4].tick_params(labelsize=6)
        for axis, heat in zip(axes[i, [0, 5, 6]], [None, before[i], after[i]], strict=True):
            axis.imshow(picture)
            axis.set_axis_off()
            if heat is not None:
                side = picture.shape[0] - 0.5
                extent = (-0.5, side, side, -0.5)
                axis.imshow(heat, cmap="jet", alpha=0.5, extent=extent, vmin=0, vmax=1)
        name, place = plain(names)[i], axes[i, 0].transAxes
        axes[i, 0].text(-0.1, 0.5, name, transform=place, ha="right", fontsize=9)
    return figure


def _output_panels(
    axes: Sequence[Axes], made: NDArray[np.float32], target: NDArray[np.float32]
) -> None:
    """What was made, the target and the difference: maps as their mean, vectors as a strip."""
    aspect: Literal["equal", "auto"] = "equal"
    if made.ndim == 1:
        made, target, aspect = made[None, None], target[None, None], "auto"
    own, wanted, change = made.mean(0), target.mean(0), (target - made).mean(0)
    low, high = min(own.min(), wanted.min()), max(own.max(), wanted.max())
    most = max(float(np.abs(change).max()), 1e-12)
    axes[0].imshow(own, cmap="viridis", vmin=low, vmax=high, aspect=aspect)
    axes[1].imshow(wanted, cmap="viridis", vmin=low, vmax=high, aspect=aspect)
    axes[2].imshow(change, cmap="coolwarm", vmin=-most, vmax=most, aspect=aspect)
    for axis in axes:
        axis.set_axis_off()
