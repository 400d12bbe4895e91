"""Reverse steps through the head and the last stage of torchvision's families."""

import runpy
from pathlib import Path

import pytest
import torch
from fmce_ops.reverse import Status

BENCHMARK = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "reverse_networks.py"))
NETWORKS = [name for name in BENCHMARK["NETWORKS"] if name != "maxvit_t"]  # wants 224 px


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_gets_a_bounded_answer_with_its_status(name):
    _, answers = BENCHMARK["study"](name, steps=0, heads=4, few=4, many=8)
    for boundary, found in answers.items():
        for column in vars(found).values():
            assert column.isfinite().all(), boundary
        assert (found.residual <= 1).all()
        assert (found.change <= 10).all()
        reached = found.status == Status.REACHED
        assert torch.equal(reached, (found.residual <= 1e-3) & (found.status != Status.UNCHANGED))
        stuck = set(found.status[found.residual == 1].tolist())
        assert stuck <= {Status.KEPT, Status.NEAREST}  # a head of zeros knows no better input
