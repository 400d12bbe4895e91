"""Linear maps backwards: against dense least squares on the explicit matrix."""

import copy

import numpy as np
import pytest
import torch
from fmce_ops.reverse import Status, reverse
from scipy.sparse.linalg import lsmr
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")

GOAL = {torch.float32: 1e-5, torch.float64: 1e-10}
LINEAR = {
    "wide": (nn.Linear(20, 10), (20,)),
    "tall": (nn.Linear(10, 20), (10,)),
    "positions": (nn.Linear(6, 4), (3, 6)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 7)),
    "wide convolution": (nn.Conv2d(6, 4, 3, padding=1), (6, 7, 7)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 9, 9)),
    "dilated": (nn.Conv2d(4, 4, 3, dilation=2), (4, 9, 9)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 7, 7)),
    "depthwise": (nn.Conv2d(5, 10, 3, groups=5, padding=1), (5, 15, 15)),
    "wide groups": (nn.Conv2d(12, 6, 3, groups=3, padding=1), (12, 13, 13)),
    "circular": (nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), (4, 5, 5)),
    "1x1": (nn.Conv2d(6, 4, 1, stride=2, groups=2), (6, 7, 7)),
    "one dimension": (nn.Conv1d(4, 3, 3, padding="same"), (4, 9)),
    "transposed": (nn.ConvTranspose2d(4, 3, 3, stride=2), (4, 5, 5)),
    "batch norm": (nn.BatchNorm2d(4), (4, 5, 5)),
    "average": (nn.AvgPool2d(2), (3, 6, 6)),
    "overlapping average": (nn.AvgPool2d(3, 2, 1), (3, 7, 7)),
    "adaptive average": (nn.AdaptiveAvgPool2d((2, 3)), (3, 7, 7)),
    "folded": (nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)), (6, 6, 6)),
    "head": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)), (6, 4, 4)),
}


def prepared(module, dtype):
    """With weights that depend on no other test, and running statistics that are not 0 and 1."""
    torch.manual_seed(1)
    module = copy.deepcopy(module).to(dtype).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            part.weight.data.uniform_(0.5, 2)
    return module


@torch.no_grad()
def dense(module, x0, target):
    """The matrix of the module, what is missing to the target, and NumPy's answer, all float64."""
    wide, start = copy.deepcopy(module).double(), x0.double()
    units = torch.eye(x0[0].numel(), dtype=torch.float64).view(-1, *x0.shape[1:])
    matrix = (wide(units) - wide(torch.zeros_like(units))).flatten(1).T.numpy()
    missing = (target.double() - wide(start)).flatten(1).numpy().T
    return matrix, missing, np.linalg.lstsq(matrix, missing, rcond=None)[0]


def deviation(module, x0, target, result):
    """Largest relative error of the distance from x0 and of the residual."""
    matrix, missing, answer = dense(module, x0, target)
    step = (result.x - x0).double().flatten(1).numpy().T
    norm, size = np.linalg.norm(answer, axis=0), np.linalg.norm(missing, axis=0)
    residuals = [np.linalg.norm(matrix @ d - missing, axis=0) for d in (step, answer)]
    errors = (np.linalg.norm(step, axis=0) - norm) / norm, (residuals[0] - residuals[1]) / size
    return max(abs(error).max() for error in errors)


@pytest.mark.parametrize("dtype", GOAL)
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("reachable", [True, False])
def test_linear_maps_equal_dense_least_squares(name, dtype, reachable):
    module, shape = prepared(LINEAR[name][0], dtype), LINEAR[name][1]
    x0 = torch.randn(2, *shape, dtype=dtype)
    with torch.no_grad():
        output = module(x0)
        target = module(x0 + torch.randn_like(x0)) if reachable else output + output.roll(1, -1)
    result = reverse(module, target, x0)
    assert deviation(module, x0, target, result) < GOAL[dtype]
    if reachable:
        assert (result.status == Status.REACHED).all()


def test_a_badly_conditioned_depthwise_convolution_is_factored_group_by_group():
    torch.manual_seed(1)
    module = nn.Conv2d(6, 6, 3, groups=6, padding=1).double()
    x0 = torch.randn(2, 6, 16, 16, dtype=torch.float64)
    target = module(x0 + torch.randn_like(x0)).detach()
    result = reverse(module, target, x0)
    assert result.residual.max() < 1e-12 and result.iterations.max() == 0
    assert deviation(module, x0, target, result) < 1e-8


@pytest.mark.parametrize("dtype", GOAL)
def test_a_dead_channel_stays_as_it_is(dtype):
    module = prepared(nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)), dtype)
    module[0].weight.data[1] = 0
    module[1].weight.data[2] = 0
    x0 = torch.randn(2, 4, 6, 6, dtype=dtype)
    target = module(x0).detach() + 1
    result = reverse(module, target, x0)
    assert result.x.isfinite().all() and (result.status == Status.NEAREST).all()
    assert deviation(module, x0, target, result) < GOAL[dtype]
    norm = module[1]
    x0 = torch.randn(2, 3, 4, 4, dtype=dtype)
    alone = reverse(norm, norm(x0).detach() + 1, x0)
    assert torch.equal(alone.x[:, 2], x0[:, 2]) and (alone.x[:, :2] != x0[:, :2]).all()


def test_damping_is_tikhonovs():
    module = prepared(nn.Linear(5, 8), torch.float64)
    x0 = torch.randn(3, 5, dtype=torch.float64)
    target = torch.randn(3, 8, dtype=torch.float64)
    matrix, missing, _ = dense(module, x0, target)
    expected = np.linalg.solve(matrix.T @ matrix + 0.49 * np.eye(5), matrix.T @ missing).T
    step = reverse(module, target, x0, damping=0.7).x - x0
    np.testing.assert_allclose(step, expected, rtol=1e-9)


def test_an_answer_beyond_the_bound_is_damped():
    module = nn.Linear(2, 2, bias=False).double()
    module.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1e-6]]).double()
    x0 = torch.ones(1, 2, dtype=torch.float64)
    result = reverse(module, module(x0).detach() + 1, x0)
    assert result.status.tolist() == [Status.DAMPED]
    assert result.change.item() <= 10 and result.residual.item() < 1
    assert torch.allclose(result.x[0, 1], x0[0, 1], atol=1e-3)


SINGULAR = {
    "square": (nn.Conv2d(4, 4, 3, padding=1), (4, 8, 8)),
    "larger output": (nn.Conv2d(4, 4, 4, padding=2), (4, 7, 7)),
    "larger output of fewer channels": (nn.Conv2d(4, 3, 5, padding=4), (4, 5, 5)),
    "padded 1x1": (nn.Conv2d(8, 8, 1, padding=1), (8, 6, 6)),
    "depthwise": (nn.Conv2d(4, 4, 5, padding=2, groups=4), (4, 8, 8)),
    "strided": (nn.Conv2d(4, 8, 3, stride=2, padding=1), (4, 8, 8)),
}


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("dtype", GOAL)
@pytest.mark.parametrize("name", SINGULAR)
def test_maps_far_from_their_twins_equal_lsmr(name, dtype, factored, monkeypatch):
    """Square ones, whose padding makes them ill-conditioned, and ones with too many outputs."""
    if not factored:
        monkeypatch.setattr("fmce_ops.reverse.dense._LEAST", 0)
        monkeypatch.setattr("fmce_ops.reverse.dense._MOST", 0)
    module, shape = prepared(SINGULAR[name][0], dtype), SINGULAR[name][1]
    x0 = torch.randn(2, *shape, dtype=dtype)
    with torch.no_grad():
        target = module(x0)
        target = target + 0.3 * torch.randn_like(target)
    result = reverse(module, target, x0, max_change=1e6)
    matrix, missing, answer = dense(module, x0, target)
    general = lsmr(matrix, missing[:, 0], atol=1e-15, btol=1e-15, conlim=0, maxiter=20_000)[0]
    np.testing.assert_allclose(general, answer[:, 0], rtol=1e-4, atol=1e-4 * abs(answer).max())
    step = (result.x - x0).double().flatten(1).numpy().T
    left = [np.linalg.norm(matrix @ d - missing, axis=0) for d in (step, answer)]
    gap = np.linalg.norm(missing, axis=0)
    assert ((left[0] - left[1]) / gap < GOAL[dtype]).all()
    sizes = np.linalg.norm(step, axis=0), np.linalg.norm(answer, axis=0)
    np.testing.assert_allclose(*sizes, rtol=1e-3 if dtype == torch.float32 else 1e-6)
    assert set(result.status.tolist()) <= {Status.REACHED, Status.NEAREST}


@pytest.mark.parametrize("dtype", GOAL)
def test_a_linear_map_of_hundreds_of_features_is_factored(dtype):
    module, x0 = prepared(nn.Linear(600, 600), dtype), torch.randn(2, 600, dtype=dtype)
    target = module(x0 + torch.randn_like(x0)).detach()
    result = reverse(module, target, x0)
    assert result.iterations.tolist() == [0, 0]
    assert deviation(module, x0, target, result) < 10 * GOAL[dtype]


def test_a_bias_drowns_no_weight():
    module = nn.Conv2d(4, 3, 3)
    x0 = torch.randn(2, 4, 6, 6)
    module.weight.data *= 1e-12
    target = module.double()(x0.double() + 1).detach()
    result = reverse(module, target, x0.double())
    assert deviation(module, x0.double(), target, result) < 1e-2  # target - output has 4 digits


def test_iterations_that_run_out_are_not_called_the_nearest(monkeypatch):
    monkeypatch.setattr("fmce_ops.reverse.dense._MOST", 0)
    monkeypatch.setattr("fmce_ops.reverse.linear._ITERATIONS", 10)
    monkeypatch.setattr("fmce_ops.reverse.linear._PATIENCE", 20)
    module = prepared(nn.Conv2d(4, 4, 3, padding=1), torch.float32)
    x0 = torch.randn(2, 4, 8, 8)
    result = reverse(module, module(x0).detach() + torch.randn(2, 4, 8, 8), x0)
    assert (result.status == Status.UNFINISHED).all() and (result.residual < 1).all()


@pytest.mark.parametrize("size", [16, 40])
@pytest.mark.parametrize("scale", [1e20, 1e38])
def test_weights_whose_squares_overflow_give_a_bounded_answer(scale, size):
    for module, side in [(nn.Conv2d(3, 2, 3, padding=1), size), (nn.Conv2d(3, 3, 3), size)]:
        module.weight.data *= scale
        x0 = torch.randn(2, 3, side, side)
        shape = module(x0).shape
        result = reverse(module, torch.randn(shape), x0)
        assert result.x.isfinite().all() and result.change.max() <= 10
        assert result.residual.max() <= 1
