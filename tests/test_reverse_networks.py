"""Reverse steps through the head and the last stage of torchvision's families."""

import pytest
import torch
from fmce_ops.reverse import Reversal, Status

from reverse_networks import FREE, NETWORKS, study

QUICK = 250  # iterations in which some stages reach what they can make; the others take thousands
SLOW = {"resnet18", "resnext50_32x4d", "wide_resnet50_2", "inception_v3", "regnet_y_400mf"}
SLOW |= {"swin_v2_t", "squeezenet1_1", "maxvit_t"}
# stages that end in a ReLU, with as many inputs as outputs or more
RECTIFIED = {"resnet18", "resnext50_32x4d", "wide_resnet50_2", "regnet_y_400mf"}
RECTIFIED |= {"inception_v3", "squeezenet1_1"}
TRAINED = ["mobilenet_v3_small", "shufflenet_v2_x0_5"]


def check(answers: dict[str, Reversal]) -> None:
    """Every answer is bounded and has its status."""
    for boundary, found in answers.items():
        for column in vars(found).values():
            assert column.isfinite().all(), boundary
        assert (found.residual <= 1).all()
        assert (found.change <= 10).all()
        reached = found.status == Status.REACHED
        assert torch.equal(reached, (found.residual <= 1e-3) & (found.status != Status.UNCHANGED))
        stuck = set(found.status[found.residual == 1].tolist())
        assert stuck <= {Status.KEPT, Status.NEAREST}  # a head of zeros knows no better input


def check_asked(name: str, answers: dict[str, Reversal]) -> None:
    """What most heads ask for, no input of the stage makes."""
    asked, size = answers["head"].x.flatten(1), answers["stage"].x[0].numel()
    if name in RECTIFIED:
        assert (asked.amin(1) < -0.01 * asked.square().mean(1).sqrt()).all()
    else:
        assert (size < asked.shape[1]) == (name not in FREE)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_gets_a_bounded_answer_with_its_status(name):
    _, answers = study(name, steps=0, heads=4, few=4, many=8 if name in SLOW else QUICK)
    check(answers)
    reached = answers["stage, reachable"].status == Status.REACHED
    assert reached.all() or name in SLOW
    check_asked(name, answers)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_networks_too(name):
    accuracy, answers = study(name, steps=60, heads=100, few=4, many=QUICK)
    assert accuracy > 0.2  # twice chance
    check(answers)
    for boundary in ("head", "stage, reachable"):
        assert (answers[boundary].status == Status.REACHED).all(), boundary
