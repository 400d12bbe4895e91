"""The pictures of maturity: judges beside the truth, and the modules of a network."""

from collections.abc import Collection, Mapping, Sequence

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from fmce_ops.maturity import Score

_LINE, _BAND, _NEXT = "#1f5fa8", "#9aa7b5", "#c8401e"


def left_out_figure(runs: Mapping[str, Sequence[tuple[float, Score]]], title: str) -> Figure:
    """For each run left out, the score of its last module against the truth, with its interval."""
    columns = min(len(runs), 4)
    rows = -(-len(runs) // columns)
    size = (3.2 * columns, 3.2 * rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    for axis in axes.flat[len(runs) :]:
        axis.set_axis_off()
    for axis, (name, found) in zip(axes.flat, runs.items(), strict=False):
        truth = np.array([true for true, _ in found])
        values = np.array([[s.value, s.low, s.high] for _, s in found])
        order = truth.argsort(kind="stable")
        truth, values = truth[order], values[order]
        axis.plot([0, 1], [0, 1], color=_BAND, linewidth=1)
        axis.fill_between(truth, values[:, 1], values[:, 2], color=_LINE, alpha=0.15)
        axis.plot(truth, values[:, 0], "o-", color=_LINE, markersize=3)
        axis.set(title=name, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axis.grid(alpha=0.25)
    figure.supxlabel("maturity of the run")
    figure.supylabel("score by a judge that never saw it")
    figure.suptitle(title)
    return figure


def scores_figure(
    scores: Mapping[str, Score], untrained: Collection[str], chosen: str, title: str
) -> Figure:
    """A bar for each module with its interval; the module to train next stands out."""
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.35 * len(scores)), layout="constrained")
    names = list(scores)
    values = np.array([[s.value, s.low, s.high] for s in scores.values()])
    places = np.arange(len(names))
    colours = [_NEXT if name == chosen else _LINE for name in names]
    axis.barh(places, values[:, 0], color=colours, height=0.6)
    reach = np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]).clip(0)
    axis.errorbar(values[:, 0], places, xerr=reach, fmt="none", ecolor="#333333", capsize=3)
    labels = [f"{name}\nat its random start" if name in untrained else name for name in names]
    axis.set_yticks(places, labels)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="maturity", title=title)
    axis.grid(alpha=0.25, axis="x")
    return figure
