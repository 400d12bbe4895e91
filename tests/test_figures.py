"""The pictures, of names and numbers of classes that would break them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fmce_ops.figures import confusion_figure, gradcam_figure, save_figure, targets_figure
from fmce_ops.path_figures import needs_figure, path_figure, profiles_figure, similarity_figure
from fmce_ops.training.pathways import Need
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

Draw = Callable[[list[str]], Figure]


def profiles(names: list[str]) -> Figure:
    shares = {f"layer{n}": torch.linspace(0, 1, 5 * len(names)).view(-1, 5) for n in range(6)}
    return profiles_figure(shares, names)


def needs(names: list[str]) -> Figure:
    lost = (0.9, 0.8, 0.7), (0.9, 0.9, 0.8)
    return needs_figure([Need(label, 2, *lost) for label in range(len(names))], names)


def path(names: list[str]) -> Figure:
    near, sure = torch.linspace(0, 1, len(names)), torch.full((len(names),), 1 / len(names))
    return path_figure(np.zeros((8, 8, 3), np.uint8), {"layer": 0.5}, near, sure, names)


def gradcams(names: list[str]) -> Figure:
    pictures = torch.zeros(len(names), 3, 8, 8, dtype=torch.uint8)
    return gradcam_figure(pictures, names, np.zeros((2, len(names), 8, 8), np.float32), [3, 5])


def targets(names: list[str]) -> Figure:
    pictures = torch.zeros(len(names), 3, 8, 8, dtype=torch.uint8)
    maps = np.arange(len(names) * 12, dtype=np.float32).reshape(-1, 3, 2, 2)
    heat = np.zeros((len(names), 8, 8), np.float32)
    return targets_figure(pictures, names, maps, maps + 1, heat, heat)


OF_CLASSES: list[Draw] = [
    lambda names: confusion_figure(np.eye(len(names), dtype=np.int64), "title", names),
    lambda names: similarity_figure(torch.eye(len(names)), names),
    profiles,
    needs,
    path,
]


def drawn(figure: Figure, file: Path) -> set[str]:
    save_figure(figure, file)
    with Image.open(file) as picture:
        assert max(picture.size) <= 5000
        assert any(low != high for low, high in picture.convert("RGB").getextrema())
    return {text.get_text() for text in figure.findobj(Text)}


@pytest.mark.parametrize("draw", [*OF_CLASSES, gradcams, targets])
def test_a_dollar_in_a_class_name_is_a_dollar(tmp_path: Path, draw: Draw) -> None:
    words = " ".join(drawn(draw(["$5", r"a_{$x$", "cat", "$x^"]), tmp_path / "figure.png"))
    assert r"\$5" in words and "cat" in words


@pytest.mark.parametrize("draw", OF_CLASSES)
def test_a_thousand_classes_are_drawn(tmp_path: Path, draw: Draw) -> None:
    drawn(draw([f"n{number:08}" for number in range(1000)]), tmp_path / "figure.png")
