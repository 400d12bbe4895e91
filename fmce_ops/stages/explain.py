"""The path of one image through a network that the stage ``pathways`` made."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fmce_ops.data import read_picture
from fmce_ops.errors import ModelError
from fmce_ops.figures import save_figure
from fmce_ops.path_figures import path_figure
from fmce_ops.pathways import PathNetwork, nearest_classes, split_code
from fmce_ops.stages.evaluate import refuse_unknown_code
from fmce_ops.tracking.registry import load_network, model_folder


@dataclass(frozen=True)
class Explanation:
    """What one image does.

    Attributes
    ----------
    open : layer -> (open filters, filters).
    classes : name -> (share of gates in which an image of the class agrees, probability), the
        nearest first.
    adversarial : score of the detector, 0 to 1.
    figure : the picture that was written.
    """

    image: Path
    open: dict[str, tuple[int, int]]
    classes: dict[str, tuple[float, float]]
    adversarial: float
    figure: Path


def explain(image: Path, model_uri: str, figure: Path, params_file: Path) -> Explanation:
    """Run an image through a gated network and draw its path.

    Raises
    ------
    DataError
        The file is no picture.
    ModelError
        There is no such model, or it has no gates.
    """
    folder = model_folder(model_uri)
    refuse_unknown_code(folder, params_file)
    network, module = load_network(folder)
    if not isinstance(module, PathNetwork):
        raise ModelError(
            f"{model_uri} is a {network.kind} and has no gates: give a model that the stage "
            "pathways made, such as models:/fmce-pathways@champion."
        )
    channels, side, _ = network.input_shape
    pixels = read_picture(image, side, channels)
    with torch.inference_mode():
        answer = module.answer(network.prepare(pixels[None]))
    code, names = answer.codes[0], list(network.spec["classes"])
    agreement, probabilities = nearest_classes(code, module.profiles), answer.logits[0].softmax(0)
    layers = split_code(module.gated, code)
    shares = {name: float(part.float().mean()) for name, part in layers.items()}
    shown = pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()
    save_figure(path_figure(shown, shares, agreement, probabilities, names), figure)
    order = agreement.argsort(descending=True, stable=True).tolist()
    return Explanation(
        image,
        {name: (int(part.sum()), len(part)) for name, part in layers.items()},
        {names[k]: (float(agreement[k]), float(probabilities[k])) for k in order},
        float(answer.adversarial[0]),
        figure,
    )
