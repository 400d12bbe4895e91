"""Linear maps backwards: against dense least squares on the explicit matrix."""

import copy
import threading

import numpy as np
import pytest
import torch
from fmce_ops.reverse import Status, reverse
from scipy.sparse.linalg import lsmr
from torch import nn

from reverse_linear import FAR, LINEAR, dense, deviation, prepared, target

pytestmark = pytest.mark.usefixtures("one_thread")

GOAL = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(params=["factored", "by products"])
def both_ways(request, monkeypatch):
    """Maps that are small enough are factored; or none is."""
    if request.param == "by products":
        monkeypatch.setattr("fmce_ops.reverse.dense._LEAST", 0)
        monkeypatch.setattr("fmce_ops.reverse.dense._MOST", 0)


@pytest.mark.parametrize("dtype", GOAL)
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("reachable", [True, False])
@pytest.mark.usefixtures("both_ways")
def test_linear_maps_equal_dense_least_squares(name, dtype, reachable):
    module, shape = prepared(LINEAR[name][0], dtype), LINEAR[name][1]
    x0 = torch.randn(2, *shape, dtype=dtype)
    wanted = target(module, x0, reachable=reachable)
    result = reverse(module, wanted, x0)
    assert deviation(module, x0, wanted, result) < GOAL[dtype]
    if reachable:
        assert (result.status == Status.REACHED).all()


@pytest.mark.parametrize("dtype", GOAL)
@pytest.mark.parametrize("seed", [0, 1, 3])  # conditions of 7e4, 1e7 and 2e7
def test_a_badly_conditioned_depthwise_convolution_is_factored_group_by_group(seed, dtype):
    torch.manual_seed(seed)
    module = nn.Conv2d(6, 6, 3, groups=6, padding=1).to(dtype)
    x0 = torch.randn(2, 6, 16, 16, dtype=dtype)
    wanted = target(module, x0, reachable=True)
    result = reverse(module, wanted, x0)
    assert result.iterations.max() == 0 and (result.status == Status.REACHED).all()
    assert result.residual.max() < {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    assert deviation(module, x0, wanted, result) < GOAL[dtype]


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


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("dtype", GOAL)
@pytest.mark.parametrize("name", FAR)
def test_maps_far_from_their_twins_equal_lsmr(name, dtype):
    module, shape = prepared(FAR[name][0], dtype), FAR[name][1]
    x0 = torch.randn(2, *shape, dtype=dtype)
    wanted = target(module, x0, reachable=False)
    result = reverse(module, wanted, x0, max_change=1e6)
    matrix, missing, answer = dense(module, x0, wanted)
    general = lsmr(matrix, missing[:, 0], atol=1e-15, btol=1e-15, conlim=0, maxiter=20_000)[0]
    assert np.linalg.norm(general - answer[:, 0]) < 1e-8 * np.linalg.norm(answer[:, 0])
    assert deviation(module, x0, wanted, result) < GOAL[dtype]
    assert set(result.status.tolist()) <= {Status.REACHED, Status.NEAREST}


@pytest.mark.parametrize("dtype", GOAL)
def test_a_linear_map_of_hundreds_of_features_is_factored(dtype):
    module, x0 = prepared(nn.Linear(600, 600), dtype), torch.randn(2, 600, dtype=dtype)
    wanted = target(module, x0, reachable=True)
    result = reverse(module, wanted, x0)
    assert result.iterations.tolist() == [0, 0]
    assert deviation(module, x0, wanted, result) < GOAL[dtype]


@pytest.mark.parametrize("size", [8, 40])  # factored, and by products
def test_a_module_that_cannot_be_copied_is_solved_all_the_same(size):
    torch.manual_seed(0)
    module = nn.Conv2d(4, 3, 3)
    module.lock = threading.Lock()
    weight = module.weight * 2  # made by another network, say
    del module.weight
    module.weight = weight
    x0 = torch.randn(2, 4, size, size)
    wanted = target(module, x0, reachable=True)
    result = reverse(module, wanted, x0)
    assert (result.status == Status.REACHED).all() and result.residual.max() < 1e-5
    assert module.weight is weight and module.bias.dtype == torch.float32


def test_hooks_on_the_state_do_not_keep_the_bias_in_the_matrix():
    module = prepared(nn.Conv2d(3, 4, 3, padding=1), torch.float32)
    before = copy.deepcopy(module.state_dict())

    def copied(module, state, prefix, metadata):
        state.update({name: value.clone() for name, value in state.items()})

    module.register_state_dict_post_hook(copied)
    x0 = torch.randn(2, 3, 6, 6)
    wanted = target(module, x0, reachable=True)
    assert deviation(module, x0, wanted, reverse(module, wanted, x0)) < GOAL[torch.float32]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


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
