"""Decoupling: which filters of a network does an image take? (arXiv 1906.01166)"""

from fmce_ops.pathways.costs import Costs, measure_costs
from fmce_ops.pathways.execution import compact, fixed
from fmce_ops.pathways.gates import (
    Controller,
    attach,
    detach,
    forced,
    gated_layers,
    held,
    most_open,
    path_codes,
    recorded,
    split_code,
)
from fmce_ops.pathways.interpret import nearest_classes, needed_filters, profiles, similarity
from fmce_ops.pathways.loss import PARTS, PathLoss, Weights
from fmce_ops.pathways.magnitude import magnitude_code
from fmce_ops.pathways.network import PathAnswer, PathNetwork

__all__ = [
    "PARTS",
    "Controller",
    "Costs",
    "PathAnswer",
    "PathLoss",
    "PathNetwork",
    "Weights",
    "attach",
    "compact",
    "detach",
    "fixed",
    "forced",
    "gated_layers",
    "held",
    "magnitude_code",
    "measure_costs",
    "most_open",
    "nearest_classes",
    "needed_filters",
    "path_codes",
    "profiles",
    "recorded",
    "similarity",
    "split_code",
]
