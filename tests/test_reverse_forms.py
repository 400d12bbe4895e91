"""Closed forms: equal to the search without shortcuts, and nearest where nothing reaches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fmce_ops.reverse import Reversal, Status, reverse
from fmce_ops.reverse.engine import Settings, reverse_with
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = {
    "relu": (nn.ReLU(inplace=True), (5,)),
    "relu6": (nn.ReLU6(), (5,)),
    "leaky": (nn.LeakyReLU(0.1), (5,)),
    "gelu": (nn.GELU(), (5,)),
    "gelu tanh": (nn.GELU("tanh"), (5,)),
    "silu": (nn.SiLU(), (5,)),
    "sigmoid": (nn.Sigmoid(), (5,)),
    "softmax": (nn.Softmax(-1), (5,)),
    "softmax over channels": (nn.Softmax(1), (4, 3)),
    "max pooling": (nn.MaxPool2d(2), (2, 4, 4)),
    "flatten": (nn.Flatten(), (2, 3)),
    "identity": (nn.Identity(), (4,)),
    "dropout": (nn.Dropout(), (4,)),
    "linear": (nn.Linear(6, 4), (6,)),
    "convolution": (nn.Conv2d(3, 2, 3, padding=1), (3, 4, 4)),
    "convolution of 1x1": (nn.Conv2d(4, 3, 1), (4, 3, 3)),
    "batch norm": (nn.BatchNorm1d(4), (4,)),
    "average": (nn.AvgPool2d(2), (2, 4, 4)),
    "linear maps": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), (3, 5, 5)),
}
OVERLAPPING = [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1), nn.AdaptiveMaxPool2d((2, 3))]
SEARCH = Settings(0.0, 400, 1e-5, 10.0, shortcuts=False)


@pytest.mark.parametrize("name", FORMS)
def test_closed_forms_equal_the_search(name):
    torch.manual_seed(3)
    module, x0 = FORMS[name][0].double(), torch.randn(4, *FORMS[name][1]).double()
    target = module.eval()(x0 + 0.2 * torch.randn_like(x0)).detach()
    form, search = reverse(module, target, x0), reverse_with(SEARCH, module, target, x0)
    assert form.residual.max() < 1e-3 and search.residual.max() < 1e-3
    assert (form.change <= search.change * 1.001).all()  # the search follows a curved way
    assert apart(form, search, x0) <= 1e-4


def apart(form: Reversal, search: Reversal, x0: Tensor) -> float:
    """How far two answers lie apart at most, beside what the first changed."""
    between, change = ((x - form.x).flatten(1).norm(dim=1) for x in (search.x, x0))
    return float((between / change).max())


@pytest.mark.parametrize("module", OVERLAPPING)
def test_overlapping_pools_equal_the_search_where_the_largest_stay_the_largest(module):
    torch.manual_seed(3)
    x0 = torch.rand(4, 98).argsort(1).reshape(4, 2, 7, 7).double()
    target = module(x0 + 0.9 * (torch.rand_like(x0) - 0.5))
    form = reverse(module, target, x0)
    search = reverse_with(replace(SEARCH, tolerance=1e-9), module, target, x0)
    assert search.residual.max() < 1e-8 and apart(form, search, x0) < 1e-8


@pytest.mark.parametrize("step", [1e-2, 1e-3, 1e-4])
def test_layer_norm_equals_the_search_up_to_the_bend_of_its_way(step):
    torch.manual_seed(3)
    module = nn.LayerNorm(48, eps=1e-14).double()  # so that the scale of an input is free
    nn.init.uniform_(module.weight, 0.5, 2)
    x0 = torch.randn(4, 2, 48, dtype=torch.float64)
    target = module(x0 + step * torch.randn_like(x0)).detach()
    form = reverse(module, target, x0)
    search = reverse_with(replace(SEARCH, tolerance=1e-9), module, target, x0)
    assert form.residual.max() < 1e-9 and search.residual.max() < 1e-8
    assert apart(form, search, x0) < 2 * step


def test_of_the_inputs_that_layer_norm_maps_to_the_target_the_nearest_is_taken():
    torch.manual_seed(3)
    module = nn.LayerNorm(6, eps=1e-14).double()
    nn.init.uniform_(module.weight, 0.5, 2)
    x0 = torch.randn(1, 6, dtype=torch.float64)
    target = module(x0 + 0.5 * torch.randn_like(x0)).detach()
    normal = ((target - module.bias) / module.weight).detach().numpy()[0]
    made_by = np.stack([normal, np.ones(6)], axis=1)  # any scale, any mean
    scale, mean = np.linalg.lstsq(made_by, x0.numpy()[0])[0]
    assert scale > 0
    found = reverse(module, target, x0).x[0].numpy()
    assert np.allclose(found, scale * normal + mean, rtol=0, atol=1e-9)


def test_relu_lowers_no_unit_that_rests():
    x0 = torch.tensor([[-2.0, -1.0, 3.0, 2.0]])
    result = reverse(nn.ReLU(), torch.tensor([[1.0, -1.0, -1.0, 4.0]]), x0)
    assert result.x.tolist() == [[1.0, -1.0, 0.0, 4.0]]
    assert result.status.tolist() == [Status.NEAREST]


@pytest.mark.parametrize("module", [nn.GELU(), nn.SiLU()])
def test_of_two_preimages_the_nearer_one_is_taken(module):
    x0 = torch.tensor([[-3.0, -0.1]], dtype=torch.float64)
    target = torch.full_like(x0, -0.1)
    x = reverse(module, target, x0).x
    assert torch.allclose(module(x), target)
    assert x[0, 0] < -1 < x[0, 1]


def test_targets_below_the_valley_end_at_its_bottom():
    x = reverse(nn.GELU(), torch.tensor([[-1.0]]), torch.tensor([[0.5]])).x
    assert x.item() == pytest.approx(-0.7517915, abs=1e-5)


@pytest.mark.parametrize("value", [-0.5, 0.0, 1.0, 1.5])
def test_sigmoid_stays_finite_beyond_its_range(value):
    x0 = torch.zeros(1, 3)
    result = reverse(nn.Sigmoid(), torch.full((1, 3), value), x0, max_change=100)
    assert result.x.isfinite().all()
    limit = torch.tensor(min(max(value, 0.0), 1.0))
    assert torch.allclose(torch.sigmoid(result.x), limit, atol=1e-6)


def test_softmax_meets_a_target_off_the_simplex_at_its_projection():
    target = torch.tensor([[0.9, 0.5, 0.2]], dtype=torch.float64)
    x = reverse(nn.Softmax(1), target, torch.zeros_like(target), max_change=100).x
    expected = torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64)  # target - 0.2, cut at 0
    assert torch.allclose(x.softmax(1)[0], expected, atol=1e-6)


@pytest.mark.parametrize("module", OVERLAPPING)
def test_overlapping_pools_reach_what_pooling_made(module):
    torch.manual_seed(0)
    x0 = torch.randn(6, 2, 7, 7)
    target = module(x0 + 0.5 * torch.randn_like(x0))
    result = reverse(module, target, x0)
    assert (result.status == Status.REACHED).all()
    assert torch.equal(module(result.x), target)


def test_targets_of_overlapping_windows_that_contradict_are_met_as_nearly_as_the_search_can():
    found = reverse(nn.MaxPool1d(3, 1, 1), torch.tensor([[[3.0, 1.0]]]), torch.full((1, 1, 2), 0.5))
    assert found.x[0, 0].tolist() == [2.0, 0.5]


def test_settings_of_a_pool_may_be_lists():
    x0 = torch.randn(2, 1, 4, 4)
    pool = nn.MaxPool2d([2, 2], dilation=[2, 1])
    assert (reverse(pool, pool(x0 + 0.3), x0).status == Status.REACHED).all()


@pytest.mark.parametrize("size", [0.0, 0.003, 0.1, 1.0])
def test_layer_norm_of_small_inputs_reaches_what_it_can_make(size):
    torch.manual_seed(0)
    module = nn.LayerNorm(8).double()
    nn.init.uniform_(module.weight, -1, 2)
    x0 = size * torch.randn(16, 8, dtype=torch.float64)
    target = module(x0 + 0.01 * torch.randn_like(x0)).detach()
    found = reverse(module, target, x0, max_change=1e3)
    assert found.residual.max() < 2e-4


def test_layer_norm_with_weights_of_zero_reaches_what_it_can_make():
    torch.manual_seed(0)
    module, x0 = nn.LayerNorm(8), torch.randn(4, 8)
    with torch.no_grad():
        module.weight[:2] = 0
    target = module(x0 + 0.1 * torch.randn_like(x0)).detach()
    assert (reverse(module, target, x0).status == Status.REACHED).all()


def test_pooling_lowers_what_exceeds_and_raises_the_largest():
    x0 = torch.tensor([[[1.0, 5.0, 2.0, 3.0]]])
    x = reverse(nn.MaxPool1d(2), torch.tensor([[[3.0, 4.0]]]), x0).x
    assert x.tolist() == [[[1.0, 3.0, 2.0, 4.0]]]


@pytest.mark.parametrize("form", [nn.ReLU(), nn.Sigmoid(), nn.Softmax(1)])
def test_a_sequential_of_one_part_is_that_part(form):
    x0 = torch.randn(3, 5)
    target = form(2 * torch.randn(3, 5))
    alone = reverse(form, target, x0)
    for chain in ([form], [nn.Identity(), form, nn.Dropout()], [nn.Sequential(form)]):
        found = reverse(nn.Sequential(*chain).eval(), target, x0)
        assert torch.equal(found.x, alone.x) and torch.equal(found.status, alone.status)
