"""Maturity that transfers: scores for the modules of any network, also one never seen."""

from fmce_ops.maturity.descriptors import (
    ALONE,
    DESCRIPTORS,
    describe,
    describe_bags,
    describe_each,
)
from fmce_ops.maturity.judge import (
    COVERAGE,
    DEPTHS,
    FEWEST,
    READ,
    SIZES,
    Judge,
    Score,
    alone,
    beside,
    cells,
    depths,
    half_width,
    load_judge,
)
from fmce_ops.maturity.modules import FunctionalModule, find_modules, module_maps
from fmce_ops.maturity.scoring import next_to_train, score
from fmce_ops.maturity.start import untrained

__all__ = [
    "ALONE",
    "COVERAGE",
    "DEPTHS",
    "DESCRIPTORS",
    "FEWEST",
    "READ",
    "SIZES",
    "FunctionalModule",
    "Judge",
    "Score",
    "alone",
    "beside",
    "cells",
    "depths",
    "describe",
    "describe_bags",
    "describe_each",
    "find_modules",
    "half_width",
    "load_judge",
    "module_maps",
    "next_to_train",
    "score",
    "untrained",
]
