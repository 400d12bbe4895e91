"""The reverse step: nearest logits, any module, bounds, errors, whole networks."""

from collections import deque
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fmce_ops.errors import ReverseError
from fmce_ops.reverse import Status, descent, nearest_logits, propagate, reverse
from fmce_ops.reverse.problem import Problem, Search
from fmce_ops.reverse.products import Linearised, frozen, has_products
from fmce_ops.reverse.quasi_newton import lbfgs
from fmce_ops.reverse.relus import Raised
from fmce_ops.reverse.waking import wake
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torchvision import models, ops
from torchvision.models.googlenet import Inception

from reverse_small import Residual, Whole

DEFORMED = torch.ones(2, 2, 1, 1)
pytestmark = pytest.mark.usefixtures("one_thread")


class Bad(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.forward = forward


def test_nearest_logits_by_hand():
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [0.0, 5.0, 0.0]])
    nearest = nearest_logits(logits, torch.tensor([0, 2, 1]))
    assert nearest.tolist() == [[2.0, 2.0, 2.0], [1.0, 2.0, 3.0], [0.0, 5.0, 0.0]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), margin=st.floats(0, 3))
def test_nearest_logits_equal_a_general_optimiser(seed, classes, margin):
    draw = np.random.default_rng(seed)
    logits, label = draw.normal(size=classes), int(draw.integers(classes))
    others = [j for j in range(classes) if j != label]
    rows = np.eye(classes)[label] - np.eye(classes)[others]
    constraint = {"type": "ineq", "fun": lambda z: rows @ z - margin, "jac": lambda z: rows}
    start = logits + (np.arange(classes) == label) * 10
    found = minimize(
        lambda z: ((z - logits) ** 2).sum(), start, jac=lambda z: 2 * (z - logits),
        constraints=[constraint], method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    nearest = nearest_logits(torch.tensor(logits)[None], torch.tensor([label]), margin)[0].numpy()
    assert (rows @ nearest >= margin - 1e-12).all()
    np.testing.assert_allclose(nearest, found.x, atol=1e-4)


@pytest.mark.parametrize(
    ("logits", "labels", "margin", "says"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), 0.0, "run from 0 to 3"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), 0.0, "run from -1"),
        (torch.zeros(2, 3), torch.tensor([0]), 0.0, "one integer for each"),
        (torch.zeros(3), torch.tensor([0]), 0.0, "give \\(N, K\\)"),
        (torch.zeros(1, 2), [0], 0.0, "labels list: give dense tensors"),
        (torch.zeros(1, 2), torch.tensor([0j]), 0.0, "one integer for each"),
        (torch.zeros(1, 2), torch.tensor([True]), 0.0, "of torch.bool: give one integer"),
        (torch.zeros(1, 2), torch.tensor([0]), "1", "margin is '1'"),
        (torch.zeros(1, 2), torch.tensor([0]), True, "margin is True"),
        (torch.full((1, 2), torch.nan), torch.tensor([0]), 0.0, "NaN or Inf"),
        (torch.zeros(1, 2), torch.tensor([0]), -1.0, "margin"),
        (torch.zeros(1, 2), torch.tensor([0]), 1e300, "overflow"),
    ],
)
def test_nearest_logits_refuse(logits, labels, margin, says):
    with pytest.raises(ReverseError, match=says):
        nearest_logits(logits, labels, margin)


class Attention(nn.Module):
    """Fused attention has no second derivative; the engine has to get around that."""

    def __init__(self):
        super().__init__()
        self.heads = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.heads(x)[:, None].chunk(3, dim=-1)
        return x + nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]


def blocks():
    torch.manual_seed(5)
    return {
        "residual": (models.resnet.BasicBlock(8, 8), (8, 6, 6)),
        "inverted": (models.mobilenetv2.InvertedResidual(8, 8, 1, 4), (8, 6, 6)),
        "attention": (Attention(), (5, 8)),
        "encoder": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8)),
        "perceptron": (nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 5)), (12,)),
        "tanh": (nn.Sequential(nn.Linear(8, 4), nn.Tanh()), (8,)),
    }


@pytest.mark.parametrize("name", blocks())
def test_any_module_reaches_what_it_can_reach(name):
    module, shape = blocks()[name]
    module.eval()
    x0 = torch.randn(3, *shape)
    target = module(x0 + 0.2 * torch.randn_like(x0)).detach()
    result = reverse(module, target, x0, max_iterations=300)
    residual = (module(result.x) - target).flatten(1).norm(dim=1)
    residual = residual / (module(x0) - target).flatten(1).norm(dim=1)
    assert torch.allclose(residual, result.residual, atol=1e-4)
    assert result.residual.max() <= 1e-3 and (result.status == Status.REACHED).all()
    moved = 0.2 * torch.ones(()) * 1.5  # the change that is known to do is about 0.2
    assert result.change.max() < moved


def test_the_change_is_the_smallest_that_a_general_optimiser_finds():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2)).double()
    x0 = torch.randn(1, 6).double()
    target = module(x0 + 0.3 * torch.randn(1, 6)).detach()

    def gap(x):
        return (module(torch.tensor(x)[None]) - target)[0].detach().numpy()

    found = minimize(
        lambda x: ((x - x0[0].numpy()) ** 2).sum(), x0[0].numpy(), method="SLSQP",
        constraints={"type": "eq", "fun": gap}, options={"ftol": 1e-12, "maxiter": 300},
    )  # fmt: skip
    result = reverse(module, target, x0, tolerance=1e-6, max_iterations=100)
    ours, theirs = (result.x - x0).norm().item(), np.linalg.norm(found.x - x0[0].numpy())
    assert theirs * 0.999 <= ours <= theirs * 1.05


@pytest.mark.parametrize(
    "rectify", [nn.ReLU(), torch.relu, torch.Tensor.relu, lambda x: (x * 1).relu_()]
)
def test_a_unit_at_rest_is_woken_however_the_relu_is_written(rectify):
    module = Bad(rectify) if not isinstance(rectify, nn.Module) else rectify
    found = reverse(module, torch.tensor([[1.0, 1.5]]), torch.tensor([[-0.1, 1.0]]))
    assert found.residual.item() < 1e-3


@pytest.mark.parametrize(
    ("seed", "status"),
    [
        (0, [Status.NEAREST, Status.NEAREST]),
        (1, [Status.KEPT, Status.NEAREST]),  # what would wake the first lies beyond the bound
    ],
)
def test_a_unit_out_of_reach_is_no_search_that_ran_out(seed, status):
    torch.manual_seed(seed)
    dead = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        dead[0].bias.fill_(-100)
    x0 = torch.randn(2, 3)
    found = reverse(dead, torch.randn(2, 2), x0)
    assert torch.equal(found.x, x0) and found.status.tolist() == status


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, w: F.conv2d(x, w),
        lambda x, w: F.conv2d(x, w, None, 2),
        lambda x, w: F.conv2d(x, w, None, 2, 1, 1, 1),
        lambda x, w: F.conv2d(x, w, stride=(1, 2), padding=[1]),
        lambda x, w: F.conv2d(x, weight=w, padding="same"),
    ],
)
def test_a_convolution_is_reversed_however_it_is_called(forward):
    torch.manual_seed(0)
    weight, x0 = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 6, 6)
    module = Bad(lambda x: forward(x, weight))
    target = module(x0 + 0.1 * torch.randn_like(x0))
    assert (reverse(module, target, x0, max_iterations=200).status == Status.REACHED).all()


def test_a_dead_unit_is_woken():
    module = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    module[0].bias.data.fill_(-3)
    x0 = torch.randn(2, 4) * 0.1
    result = reverse(module, torch.ones(2, 2), x0, max_change=1000)
    assert (module(x0) == 0).all() and (result.status == Status.REACHED).all()


def test_units_that_rest_inside_are_woken():
    """With the true derivatives the search ends in local minima at 0.017 and 0.039."""
    torch.manual_seed(3)
    module, x0 = Inception(16, 4, 4, 8, 2, 4, 4), torch.randn(2, 16, 3, 3).relu()
    with torch.no_grad():
        module.train()(x0)
        target = module.eval()(x0 + 0.1 * torch.randn_like(x0))
    result = reverse(module, target, x0, max_iterations=200)
    assert result.residual.max() < 0.005 and result.iterations.max() <= 200


class Narrow(nn.Module):
    """Smooth, and so badly conditioned that Gauss-Newton alone does not reach its targets."""

    def __init__(self):
        super().__init__()
        first, second = torch.randn(2, 40, 40, dtype=torch.float64).unbind()
        scales = torch.logspace(0, -4, 40, dtype=torch.float64)
        self.first = nn.Parameter(first * scales / 6)
        self.second = nn.Parameter(second * scales / 6)

    def forward(self, x):
        return torch.tanh(torch.tanh(x @ self.first.T) @ self.second.T)


def narrow():
    torch.manual_seed(2)
    module, x0 = Narrow(), torch.randn(3, 40, dtype=torch.float64)
    return module, module(x0 + torch.randn_like(x0)).detach(), x0


def searched(module, target, x0, method, limit):
    gap = (module(x0) - target).norm(dim=1)
    none = torch.zeros_like(gap)
    problem = Problem(module, target, x0, none, gap * 1e-3, none + torch.inf)
    search = Search(x0.clone(), gap.clone(), none.long(), none.bool())
    with torch.no_grad(), frozen(module):
        method(problem, search, none.long() + limit)
    return search, gap


def test_lbfgs_lowers_the_distance_for_every_sample_by_itself():
    module, target, x0 = narrow()
    together, gap = searched(module, target, x0, lbfgs, 40)
    assert torch.allclose(together.distance, (module(together.x) - target).norm(dim=1))
    assert (together.distance < 0.02 * gap).all() and (together.iterations <= 40).all()
    for i in range(3):
        alone, _ = searched(module, target[i : i + 1], x0[i : i + 1], lbfgs, 40)
        assert torch.allclose(alone.x[0], together.x[i], rtol=1e-6)


def test_lbfgs_stays_within_the_bound_and_keeps_to_the_damping():
    module, target, x0 = narrow()
    bound = torch.full((3,), 0.05, dtype=torch.float64)
    damping = torch.full((3,), 0.5, dtype=torch.float64)
    gap = (module(x0) - target).norm(dim=1)
    for weight, within in ((damping * 0, bound), (damping, bound * torch.inf)):
        problem = Problem(module, target, x0, weight, gap * 1e-3, within)
        search = Search(x0.clone(), gap.clone(), gap.long() * 0, gap < 0)
        lbfgs(problem, search, gap.long() * 0 + 300)
        change = (search.x - x0).norm(dim=1)
        assert (change <= within).all() and (search.distance < gap).all()
        if weight.any():
            slope = torch.func.vjp(module, search.x)[1](target - module(search.x))[0]
            slope = slope - weight[:, None].square() * (search.x - x0)
            assert slope.norm() < 1e-3 * gap.norm()


def test_where_gauss_newton_ends_lbfgs_goes_on(monkeypatch):
    module, target, x0 = narrow()
    monkeypatch.setattr(descent, "_STARTS", 0)
    both = reverse(module, target, x0, max_iterations=600)
    monkeypatch.setattr(descent, "lbfgs", lambda *_: None)
    alone = reverse(module, target, x0, max_iterations=600)
    assert (both.status == Status.REACHED).all() and both.iterations.max() <= 600
    for few in (1, 7, 150):
        assert reverse(module, target, x0, max_iterations=few).iterations.max() <= few
    assert (alone.status != Status.REACHED).any()


class Kinked(nn.Module):
    """Three layers with ReLUs between, which are no Sequential that could be walked backwards."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 24)
        self.layers = nn.Sequential(*layers).double()

    def forward(self, x):
        return self.layers(x)


def kinked(seed):
    torch.manual_seed(seed)
    module, x0 = Kinked(), torch.randn(8, 24, dtype=torch.float64)
    return module, module(x0 + 0.5 * torch.randn_like(x0)).detach(), x0


def test_local_minima_are_left_by_starts_beside(monkeypatch):
    reached = {}
    for starts in (0, 20):
        monkeypatch.setattr(descent, "_STARTS", starts)
        found = [reverse(*kinked(seed), max_iterations=2000) for seed in range(3)]
        assert max(result.iterations.max() for result in found) <= 2000
        reached[starts] = sum(int((r.status == Status.REACHED).sum()) for r in found)
    assert reached[20] > reached[0] + 1


def test_starts_beside_are_the_same_every_time():
    once, again = (reverse(*kinked(0), max_iterations=1500) for _ in range(2))
    assert once.iterations.max() > 500
    assert torch.equal(once.x, again.x) and torch.equal(once.iterations, again.iterations)


def test_what_residual_blocks_hide_from_one_another_is_found_block_by_block():
    torch.manual_seed(0)
    blocks = nn.Sequential(Residual(64), Residual(64)).eval()
    x0 = 0.3 * torch.randn(8, 64)
    target = blocks(x0).detach() + 0.5 * torch.randn(8, 64)
    found = reverse(blocks, target, x0, max_iterations=501)
    assert (found.status == Status.REACHED).all()
    gap = (target - blocks(x0)).norm(dim=1)
    assert ((blocks(found.x) - target).norm(dim=1) <= 1e-3 * gap).all()
    as_one = reverse(Whole(*blocks), target, x0, max_iterations=501)
    assert not (as_one.status == Status.REACHED).any()


def test_a_search_that_ended_goes_on_from_where_the_parts_lead():
    torch.manual_seed(40)
    hidden, size = (int(torch.randint(2, most, (1,))) for most in (6, 5))
    layers = nn.Linear(size, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2)
    with torch.no_grad():
        layers[0].bias -= 1.5  # most units rest
    module = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    x0 = torch.randn(4, size)
    target = module(x0).detach() + 0.3 * torch.randn(4, 2)
    alone = reverse(Whole(*module), target, x0, max_iterations=50)
    assert alone.status[2] == Status.NEAREST and alone.residual[2] > 0.8
    assert reverse(module, target, x0, max_iterations=50).status[2] == Status.REACHED


def positive(x):
    if (x <= 0).any():
        raise ValueError("not positive")
    return x.log().tanh()


@pytest.mark.parametrize(
    "parts",
    [
        (lambda x: (x, x), lambda pair: pair[0].tanh()),
        (lambda x: 1 + x.square(), positive),
        (lambda x: x.T, lambda x: x.T.tanh()),
        (lambda x: x.tanh(), lambda x: x.atanh().tanh()),
    ],
    ids=["a pair between", "refuses what is tried", "ties samples together", "no number at first"],
)
def test_parts_that_cannot_be_reversed_by_themselves_are_no_harm(parts):
    torch.manual_seed(0)
    modules, x0 = [Bad(part) for part in parts], torch.randn(3, 3)
    target = torch.tensor([[0.3, -0.2, 3.0]]).repeat(3, 1)  # the last is out of reach
    found = reverse(nn.Sequential(*modules), target, x0, max_iterations=501)
    as_one = reverse(Whole(*modules), target, x0, max_iterations=501)
    assert (found.residual <= as_one.residual + 1e-6).all() and (found.residual < 1).all()


class Resting(nn.Module):
    """Two inputs to two outputs by way of a ReLU each, the second one shifted by .02."""

    def forward(self, x):
        return torch.relu(x - torch.tensor([0.0, 0.02], dtype=x.dtype)) * torch.tensor([2.0, 1.0])


class Pair(nn.Module):
    """Two inputs to a ReLU each, beside one that is never at rest."""

    def forward(self, x):
        return torch.relu(torch.cat([x - 0.02, torch.ones_like(x[:, :1])], 1))


def woken(x0, target, bound=torch.inf, module=None, share=0.5):
    module, x0, target = module or Resting(), torch.tensor(x0), torch.tensor(target)
    gap = (module(x0) - target).norm(dim=1).double()
    none = torch.zeros_like(gap)
    problem = Problem(module, target, x0, none, gap * 1e-3, none + bound)
    search = Search(x0.clone(), gap.clone(), none.long(), none.bool())
    with torch.no_grad(), frozen(module):
        return wake(problem, search, none.long() + 50, none + share).tolist(), search


def test_a_unit_that_rests_near_its_kink_is_woken_if_it_should_be_larger():
    moved, search = woken([[1.0, 0.0]], [[2.0, 1.0]])
    assert moved == [True] and search.iterations.item() > 0
    assert 0.02 < search.x[0, 1] < 0.1
    assert torch.equal(search.x[:, 0], torch.ones(1))  # of the other one nothing is asked
    x0 = torch.tensor([[1.0, 0.0]])
    result = reverse(Resting(), torch.tensor([[2.0, 1.0]]), x0, max_iterations=2000)
    assert result.status.item() == Status.REACHED


@pytest.mark.parametrize(("share", "both"), [(0.5, False), (0.0, True)])
def test_the_unit_that_is_wanted_most_is_woken_first(share, both):
    x0, wanted = [[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.2, 1.0], [0.2, 1.0, 1.0]]
    moved, search = woken(x0, wanted, module=Pair(), share=share)
    assert moved == [True, True]
    assert (search.x > 0.02).tolist() == [[True, both], [both, True]]


@pytest.mark.parametrize(
    ("x0", "target", "bound", "module"),
    [
        ([[1.0, 0.0]], [[2.0, -1.0]], torch.inf, None),  # it should not be larger
        ([[1.0, -5.0]], [[2.0, 1.0]], torch.inf, None),  # it rests too far below
        ([[1.0, 0.0]], [[2.0, 1.0]], 0.01, None),  # the step is longer than allowed
        ([[1.0, 0.0]], [[2.0, 1.0]], torch.inf, nn.Tanh()),  # nothing can rest
    ],
)
def test_what_is_not_to_be_woken_stays(x0, target, bound, module):
    moved, search = woken(x0, target, bound, module)
    assert moved == [False] and search.x.tolist() == x0


def test_samples_are_woken_each_by_itself():
    x0, target = [[1.0, 0.0], [1.0, -5.0], [1.0, 0.01]], [[2.0, 1.0], [2.0, 1.0], [3.0, 0.5]]
    moved, together = woken(x0, target)
    assert moved == [True, False, True]
    for row, alone in enumerate(woken([x], [t])[1] for x, t in zip(x0, target, strict=True)):
        assert torch.allclose(alone.x[0], together.x[row], atol=1e-6)


class Settled(nn.Module):
    """The output settles each input, but for a unit that rests and would change it more."""

    def forward(self, x):
        return torch.cat([x, torch.relu(x - 1.02)], dim=1)


def test_a_unit_stays_at_rest_where_the_output_settles_what_goes_in():
    moved, search = woken([[1.0, 3.0]], [[1.0, 3.0, 1.0, 1.98]], module=Settled())
    assert moved == [True]  # a little
    assert search.x[0, 0] < 1.01 and search.distance.item() > 0.9


def test_what_units_lack_is_told_by_sample_where_the_batch_is_folded():
    rows, folded = torch.tensor([2, 0]), torch.tensor([4, 5, 0, 1])
    entries = torch.randn(6, 4), torch.randn(3, 2), torch.randn(4, 5)
    masks = [torch.rand_like(entry) > 0.5 for entry in entries[:2]]
    masks += [torch.zeros(4, 5, dtype=torch.bool)]  # no whole number of rows: none is wanted
    value = torch.randn(3, 7)

    def told(relus, entries, value):
        for number, entry in enumerate(entries):
            assert torch.equal(relus.rectify(entry, number), entry.relu())
        return relus.equations(value, None, value)

    whole = Raised(masks, 3)
    for _ in range(2):  # a second run begins anew
        values, lacks = told(whole, entries, value)
    assert values.shape == lacks.shape == (3, 7 + 8 + 2)
    part = whole.take(rows), [entries[0][folded], entries[1][rows], entries[2]], value[rows]
    assert torch.allclose(torch.stack(told(*part)), torch.stack([values, lacks])[:, rows])
    assert torch.equal(lacks[:, :7], torch.zeros(3, 7))  # the output stays
    own = lacks[:, 7:15].reshape(6, 4)
    assert torch.equal(own != 0, masks[0])


def test_samples_that_need_nothing_are_not_solved_for():
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x.sin() + x

    x0 = torch.randn(10, 3)
    target = Watched()(x0)
    target[4] += 0.3
    seen.clear()
    result = reverse(Watched(), target, x0, max_iterations=20)
    assert seen[0] == 10 and set(seen[1:]) == {1}
    assert result.status.tolist() == [0] * 4 + [Status.REACHED] + [0] * 5
    others = result.status == Status.UNCHANGED
    assert torch.equal(result.x[others], x0[others]) and not result.residual[others].any()


def test_the_module_comes_back_as_it_was():
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Tanh())
    module[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x0 = torch.randn(2, 2, 5, 5)
    kept = x0.clone()
    reverse(module, torch.rand(2, 3, 3, 3), x0)
    assert [part.training for part in module] == [True, False, True, True]
    assert module[2].inplace and all(p.requires_grad for p in module.parameters())
    assert all(p.grad is None for p in module.parameters()) and torch.equal(x0, kept)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_slices_change_nothing(monkeypatch):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    x0, target = torch.randn(7, 4).double(), torch.rand(7, 3).double()
    whole = reverse(module, target, x0)
    monkeypatch.setattr("fmce_ops.reverse.engine._SLICE", 14)
    assert torch.allclose(reverse(module, target, x0).x, whole.x, atol=1e-5)


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda x: (x, x), "returned a tuple"),
        (lambda x: x[:1], "made 1 samples of [23]"),
        (lambda x: x[:, :1], "returned \\([23], 1\\)"),
        (lambda x: x.detach() * 2, "no gradient"),
        (lambda x: x.round().long(), "returned torch.int64"),
        (lambda x: x > 0, "returned torch.bool"),
    ],
)
def test_modules_that_cannot_be_reversed_are_named(forward, says):
    with pytest.raises(ReverseError, match=f"Bad.*{says}"):
        reverse(Bad(forward), torch.ones(3, 2) * 9, torch.ones(3, 2))
    network = nn.Sequential(nn.Identity(), nn.Sequential(nn.Sigmoid(), Bad(forward)), nn.Identity())
    inner = r"Bad \(part 1\.1 of Sequential\)" if "[23], 1" not in says else "Sequential"
    with pytest.raises(ReverseError, match=rf"^{inner} .*{says}"):
        reverse(network, torch.ones(3, 2) * 9, torch.ones(3, 2))
    with pytest.raises(ReverseError, match=rf"^module 2 of 2: {inner} .*{says}"):
        propagate([nn.Identity(), network], torch.ones(3, 2) * 9, [torch.ones(3, 2)] * 2)


def test_the_part_of_a_sequential_that_cannot_take_its_input_is_named():
    network = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ReverseError) as error:
        reverse(network, torch.ones(3, 2), torch.ones(3, 2))
    says = "Linear (part 2 of Sequential) cannot take an input (3, 5) of torch.float32: "
    assert str(error.value).startswith(says)


class Fixed(nn.Module):
    """Knows a batch of four alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("own", torch.linspace(-1, 1, 8).view(4, 2))

    def forward(self, x):
        return torch.tanh(x + self.own)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.TransformerEncoderLayer(8, 2, 16), (4, 3, 8)),  # takes the first for the sequence
        (nn.Softmax(0), (4, 3)),
        (Bad(lambda x: x - x.mean(0)), (4, 3)),
        (Bad(lambda x: (2 * x).squeeze()), (4, 1, 3)),
        (Fixed(), (4, 2)),
        (nn.LayerNorm([4, 3]), (4, 3)),
        (Bad(lambda x: x.view(4, -1).tanh()), (4, 3)),
        (Bad(lambda x: x.cumsum(0)), (4, 3)),  # the first by itself is as in the batch
    ],
)
def test_modules_that_tie_samples_together_are_named(module, shape):
    torch.manual_seed(0)
    x0 = torch.randn(shape)
    with torch.no_grad():
        target = module.eval()(x0) * 1.1
    with pytest.raises(ReverseError, match=f"^{type(module).__name__} .* by itself"):
        reverse(module, target, x0)


class Once(torch.autograd.Function):
    """2 x, whose derivative has none, and no forward mode."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad


class Torn(torch.autograd.Function):
    """sin x, whose derivative is taken for constant in its argument, and has no forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad.detach() * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda x: torch.from_numpy(x.numpy()), "no derivative to search by .*numpy"),
        (lambda x: {}["missing"], "cannot take an input"),
        (lambda x: x.round() + 0 * x, "takes its derivative for 0"),
        (lambda x: x.sign() + 0 * x, "takes its derivative for 0"),
        (lambda x: checkpoint(torch.sinh, x, use_reentrant=True), "incompatible with .grad"),
        (lambda x: 2 * x.detach() + 0 * x, "takes its derivative for 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_modules_without_usable_derivatives_are_refused(forward, says):
    with pytest.raises(ReverseError, match=f"Bad .*{says}"):
        reverse(Bad(forward), torch.rand(3, 2, 2), torch.rand(3, 2, 2))


def deformed(x):
    return ops.deform_conv2d(x, torch.tanh(x[:, :1]).expand(-1, 2, -1, -1), DEFORMED)


class Strict(torch.autograd.Function):
    """3 x, whose derivative asks not to be differentiated, in a way of its own."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise ValueError
        return 3 * grad


def strict(x):
    return Strict.apply(x / 6).tanh()


def pooled(x):
    return ops.roi_align(x, [torch.tensor([[0.0, 0.0, 3.0, 3.0]])] * len(x), 2)


@pytest.mark.parametrize(
    "forward",
    [
        Once.apply,
        lambda x: 0.1 * x + Torn.apply(x),
        deformed,
        lambda x: x + deformed(x),
        pooled,
        strict,
    ],
)
def test_modules_that_can_be_differentiated_only_once_are_answered(forward):
    torch.manual_seed(0)
    module, x0 = Bad(forward), torch.randn(3, 2, 4, 4)
    assert not has_products(module, x0)
    target = module(x0 + 0.1 * torch.randn_like(x0))
    found = reverse(module, target, x0, max_iterations=200)
    missing = (module(found.x) - target).flatten(1).norm(dim=1)
    assert (found.status == Status.REACHED).all()
    assert (missing <= 1.001e-3 * (module(x0) - target).flatten(1).norm(dim=1)).all()


def test_a_linear_map_of_one_derivative_is_answered_by_the_least_change():
    torch.manual_seed(0)
    half = torch.randn(3, 8, dtype=torch.float64)
    module, x0 = Bad(lambda x: Once.apply(x) @ half.T), torch.randn(4, 8, dtype=torch.float64)
    target = torch.randn(4, 3, dtype=torch.float64)
    found = reverse(module, target, x0, max_iterations=200, tolerance=1e-12)
    least = torch.linalg.lstsq(2 * half, (target - 2 * x0 @ half.T).T).solution.T
    assert torch.allclose(found.x - x0, least, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 5)],
        [nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 2, 1)],
        [nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)],
    ],
)
def test_checkpoints_change_nothing_but_the_memory(layers, hooked):
    torch.manual_seed(0)
    plain, x0 = nn.Sequential(*layers).eval(), torch.randn(4, 3, 6)
    module = Bad(lambda x: checkpoint(plain, x, use_reentrant=False))
    target = plain(x0 + 0.1 * torch.randn_like(x0)).detach()
    with saved_tensors_hooks(lambda x: x, lambda x: x) if hooked else nullcontext():
        found = reverse(module, target, x0, max_iterations=300)
    assert (found.status == Status.REACHED).all()
    u, jacobian = torch.randn_like(target), Linearised(module, x0)
    expected = torch.autograd.functional.vjp(plain, x0, u)[1]
    assert torch.allclose(jacobian.pull(u), expected, atol=1e-5)


def test_hooks_on_the_way_back_are_left_out_and_kept():
    torch.manual_seed(0)
    conv, x0 = nn.Conv2d(8, 4, 3, stride=2), torch.randn(2, 8, 9, 9)
    target = torch.randn(2, 4, 4, 4)
    plain = reverse(conv, target, x0)
    seen = []
    conv.register_full_backward_hook(lambda module, into, out: seen.append(0) or (into[0] * 2,))
    conv.register_full_backward_pre_hook(lambda module, out: (-out[0],))
    assert torch.equal(reverse(conv, target, x0).x, plain.x) and not seen
    conv(x0.requires_grad_()).sum().backward()
    assert seen


def test_a_module_that_draws_is_refused_alone_too():
    module = Bad(lambda x: F.dropout(x.tanh(), 0.5, True))
    with pytest.raises(ReverseError, match="always alike"):
        reverse(module, torch.ones(1, 32), torch.rand(1, 32))


def test_a_module_without_its_base_is_refused():
    class Hollow(nn.Module):
        def __init__(self):
            pass

    with pytest.raises(ReverseError, match="Hollow was made without its base"):
        reverse(Hollow(), torch.ones(1, 3), torch.ones(1, 3))


def test_propagate_takes_what_can_be_listed():
    torch.manual_seed(0)
    layers, x0 = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(2, 4)
    between, target = layers[0](x0).detach(), torch.randn(2, 2)
    expected = propagate(list(layers), target, [x0, between])
    found = propagate(layers, target, deque([x0, between]))
    assert torch.equal(found.targets[0], expected.targets[0])
    with pytest.raises(ReverseError, match="input of Linear is int"):
        propagate(layers, target, {0: x0, 1: between})
    with pytest.raises(ReverseError, match=r"^damping is -1"):
        propagate(layers, target, [x0, between], damping=-1)


class Outer(TorchFunctionMode):
    """Knows whether cuDNN was on when a recurrent layer ran."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.lstm, torch.gru):
            self.seen.add(torch.backends.cudnn.enabled)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_differentiated_without_cudnn(kind):
    torch.manual_seed(0)
    layer, x0 = kind(3, 8, batch_first=True), torch.randn(2, 5, 3)
    module = Bad(lambda x: layer(x)[0])
    target = module(x0 + 0.1 * torch.randn_like(x0)).detach()
    with Outer() as outer:
        assert has_products(module, x0)
    assert outer.seen == {False} and torch.backends.cudnn.enabled
    found = reverse(module, target, x0, max_iterations=300)
    assert (found.status == Status.REACHED).all()


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_modules_are_refused(dtype, samples):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    module = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, dtype=dtype)
    x0 = torch.randn(samples, 8)
    with pytest.raises(ReverseError, match=r"^Sequential "):
        reverse(module, module(x0) + 1, x0)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: 0 * x + 1,
        lambda x: (x - 9).relu(),
        lambda x: F.hardtanh(x + 9),
        lambda x: F.hardtanh(x + 9) if (x.abs() < 3).all() else {}["far"],
        lambda x: torch.sigmoid(-1e4 * x.square() - 200),
    ],
)
def test_what_is_flat_around_the_input_alone_is_no_step(forward):
    x0 = torch.rand(3, 4) + 0.1
    module = Bad(forward)
    found = reverse(module, module(x0) + 1, x0)
    assert set(found.status.tolist()) == {Status.NEAREST} and torch.equal(found.x, x0)


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (
            lambda x: F.binary_cross_entropy(x, torch.full_like(x, 0.5), reduction="none"),
            "between 0 and 1",
        ),
        (lambda x: torch.linalg.cholesky(torch.diag_embed(x)).sum(1), "positive-definite"),
        (lambda x: x + x.sin() if (x.abs() < 2).all() else {}["far"], "KeyError 'far'"),
    ],
)
def test_what_a_module_refuses_on_the_way_is_told_in_a_sentence(forward, says):
    torch.manual_seed(0)
    with pytest.raises(ReverseError, match=f"^Bad took x0, and failed .*{says}.*: give a smaller"):
        reverse(Bad(forward), torch.randn(3, 4) * 9, torch.rand(3, 4) * 0.8 + 0.1)


def test_underflow_is_not_taken_for_a_step():
    x0 = torch.tensor([[-300.0] * 5 + [-110.0], [0.0] * 6])
    found = reverse(Bad(torch.exp), torch.full((2, 6), 0.4), x0)
    assert found.status.tolist() == [Status.NEAREST, Status.REACHED]


def test_an_answer_at_the_bound_is_called_damped():
    torch.manual_seed(5)
    layers = [nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)]
    module, x0 = nn.Sequential(*layers), torch.rand(8, 32)
    target = module(x0).detach() + torch.randn(8, 8)
    found = reverse(module, target, x0, max_iterations=500)
    bound = found.change > 9.99
    assert bound.any() and (found.status[bound] != Status.NEAREST).all()


def test_tiny_weights_are_not_taken_for_a_derivative_that_is_missing():
    x0 = torch.randn(3, 4)
    found = reverse(Bad(lambda x: torch.tanh(x * 1e-25)), torch.rand(3, 4), x0)
    assert found.x.isfinite().all() and (found.status != Status.UNCHANGED).all()


def test_a_forward_of_its_own_is_not_taken_for_the_plain_module():
    torch.manual_seed(1)  # not so badly conditioned that 9 iterations are too few
    module, x0 = nn.Linear(4, 4), torch.randn(3, 4)
    plain = module.forward
    module.forward = lambda x: plain(x) * 2 + 1
    assert (reverse(module, module(x0 + 0.1).detach(), x0).residual < 1e-3).all()


def test_autocast_around_the_call_changes_nothing():
    module, target, x0 = nn.Linear(64, 32), torch.randn(3, 32), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = reverse(module, target, x0)
    assert torch.equal(found.x, reverse(module, target, x0).x)
    assert (found.status == Status.REACHED).all()


def test_more_iterations_never_cost_an_answer_within_the_bound():
    for seed in range(4):
        torch.manual_seed(seed)
        module, x0 = Kinked(), torch.randn(8, 24, dtype=torch.float64)
        target = module(x0).detach() + 3 * torch.randn(8, 24, dtype=torch.float64)
        few, many = (
            reverse(module, target, x0, max_iterations=most, max_change=0.5) for most in (500, 1500)
        )
        kept = few.status != Status.DAMPED
        assert (many.residual[kept] <= few.residual[kept] * (1 + 1e-6)).all()


def test_inputs_that_do_not_fit_are_refused_before_anything_runs():
    module, x = nn.Linear(2, 2), torch.ones(3, 2)
    for target, x0 in [(x[:2], x), (x.double(), x), (x * torch.nan, x), (x, x / 0), (x, x.half())]:
        with pytest.raises(ReverseError, match="Linear"):
            reverse(module, target, x0)
    with pytest.raises(ReverseError, match="statistics of the batch"):
        reverse(nn.BatchNorm1d(2, track_running_stats=False), x, x)
    with pytest.raises(ReverseError, match="not a module"):
        reverse(torch.relu, x, x)
    assert len(reverse(module, x[:0], x[:0]).x) == 0
    with pytest.raises(ReverseError, match="cannot take an input"):
        reverse(module, x[:0], torch.ones(0, 5))
    with pytest.raises(ReverseError, match=r"returned .* and the target is"):
        reverse(module, torch.ones(0, 5), x[:0])
    with pytest.raises(ReverseError, match=r"input of Linear is \(3, 0\), samples of nothing"):
        reverse(module, x, x[:, :0])
    for odd in (x.to_sparse(), x.to("meta")):
        with pytest.raises(ReverseError, match="give a dense tensor"):
            reverse(module, odd, x)


def test_buffers_that_cannot_be_compared_are_left_alone():
    module, x = nn.Linear(2, 2), torch.ones(3, 2)
    module.register_buffer("mask", torch.eye(2).to_sparse())
    module.register_buffer("scale", torch.ones(2).to(torch.float8_e4m3fn))
    assert (reverse(module, x, x).status != Status.UNCHANGED).all()


@pytest.mark.parametrize("given", [{"modules": nn.Linear(2, 2)}, {"activations": None}])
def test_what_is_no_list_of_modules_or_activations_is_named(given):
    x = torch.ones(3, 2)
    (what,) = given
    with pytest.raises(ReverseError, match=f"^the {what} are a .*: give a list of them"):
        propagate(**{"modules": [nn.Linear(2, 2)], "target": x, "activations": [x], **given})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.LazyConv2d(4, 3), "weight without a shape: run the module on an input first"),
        (lambda: nn.Conv2d(3, 4, 3).to("meta"), "weight on the meta device.*: load its weights"),
        (torch.inference_mode()(lambda: nn.Conv2d(3, 4, 3)), "made in inference mode.*outside"),
    ],
)
def test_modules_that_have_no_weights_to_compute_with_are_named(make, says):
    with pytest.raises(ReverseError, match=f"Conv2d holds .*{says}"):
        reverse(make(), torch.rand(2, 4, 6, 6), torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ELU(inplace=True)])
def test_a_module_in_torchscript_is_reversed_like_its_source(activation, frozen):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), activation, nn.Conv2d(4, 4, 3)).eval()
    target, x0 = torch.rand(2, 4, 4, 4), torch.rand(2, 3, 8, 8)
    expected = reverse(Bad(module.forward), target, x0)
    scripted = torch.jit.script(module)
    found = reverse(torch.jit.freeze(scripted) if frozen else scripted, target, x0)
    assert torch.allclose(found.x, expected.x, atol=1e-4)
    assert found.residual.max() < 1 and all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("tolerance", value) for value in (0, 1, "a", None, True)),
        *(("damping", value) for value in (-1, float("nan"), "a", 10**400)),
        *(("max_iterations", value) for value in (0, 2.5, True, "12")),
        *(("max_change", value) for value in (0, float("inf"), None)),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, value):
    x = torch.ones(3, 2)
    with pytest.raises(ReverseError, match=f"{name} is .*: give "):
        reverse(nn.Linear(2, 2), x, x, **{name: value})


@pytest.mark.parametrize(
    ("module", "shape", "dtype", "says"),
    [
        (nn.Linear(5, 4), (3, 4), torch.float32, "Linear cannot take an input \\(3, 4\\)"),
        (nn.Linear(4, 4), (3, 4), torch.float64, "Linear cannot take .*float64"),
        (nn.Conv2d(3, 4, 3), (4, 5, 6, 6), torch.float32, "Conv2d cannot take an input"),
        (nn.Conv2d(4, 4, 3, padding=1), (4, 6, 6), torch.float32, "3 dimensions and not 4"),
        (nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU()), (4, 6), torch.float32, "Conv1d .*not 3"),
    ],
)
def test_inputs_that_the_module_cannot_take_are_named(module, shape, dtype, says):
    with pytest.raises(ReverseError, match=says):
        reverse(module, torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_and_statistics_that_are_not_finite_are_named(value):
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[1].running_var[0] = value
    with pytest.raises(ReverseError, match=r"NaN or Inf in 1\.running_var"):
        reverse(module, torch.ones(3, 2), torch.ones(3, 2))
    module[0].bias.data[1] = value
    with pytest.raises(ReverseError, match=r"NaN or Inf in 0\.bias"):
        reverse(module, torch.ones(3, 2), torch.ones(3, 2))


def test_a_chain_that_does_not_fit_is_refused_before_anything_is_solved(monkeypatch):
    monkeypatch.setattr("fmce_ops.reverse.engine.reverse_with", None)
    head, x = nn.Linear(2, 3), torch.ones(4, 2)
    wrong = [
        (nn.Linear(5, 2), x, "Linear cannot take"),
        (nn.Linear(2, 6), x, "returned \\(2, 6\\) and the next activation is \\(2, 2\\)"),
        (nn.Linear(2, 2), x[:3], "3 inputs"),
        (Bad(lambda x: (x, x)), x, "returned a tuple"),
    ]
    for module, first, says in wrong:
        with pytest.raises(ReverseError, match=says):
            propagate([module, head], torch.zeros(4, 3), [first, x])
    with pytest.raises(ReverseError, match="the target is"):
        propagate([nn.Linear(2, 2), head], torch.zeros(4, 2), [x, x])


def test_a_module_that_overflows_keeps_its_input():
    x0 = torch.tensor([[100.0], [1.0]])
    result = reverse(Bad(torch.exp), torch.full((2, 1), 3.0), x0)
    assert result.status.tolist() == [Status.KEPT, Status.REACHED]
    assert result.x[0].item() == 100 and result.residual[0] == 1 and result.x.isfinite().all()


def test_targets_of_a_network_are_propagated_to_its_input():
    torch.manual_seed(0)
    network = models.resnet18(num_classes=10).eval()
    head = nn.Sequential(network.avgpool, nn.Flatten(), network.fc)
    modules = [network.layer3, network.layer4, head]
    activations, labels = [torch.randn(4, 128, 4, 4).relu()], torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        for module in modules:
            activations.append(module(activations[-1]))
    labels[:2] = activations[-1].argmax(1)[:2]
    target = nearest_logits(activations[-1], labels)
    found = propagate(modules, target, activations[:-1])
    assert len(found.targets) == 4 and torch.equal(found.targets[3], target)
    for own, aim, result in zip(activations, found.targets, found.results, strict=False):
        assert torch.equal(own[:2], aim[:2]) and (result.status[:2] == Status.UNCHANGED).all()
        assert torch.equal(result.x, aim) and aim.isfinite().all()
    assert (found.results[-1].status[2:] == Status.REACHED).all()
    assert all((result.residual <= 1).all() for result in found.results)
    with pytest.raises(ReverseError, match="2 activations"):
        propagate(modules, target, activations[:2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_answers_the_same():
    module, x0 = nn.Sequential(nn.Conv2d(4, 3, 3), nn.GELU()), torch.randn(3, 4, 6, 6)
    target = module(x0 + 0.1).detach()
    here, there = reverse(module, target, x0), reverse(module.cuda(), target.cuda(), x0.cuda())
    assert torch.allclose(here.change, there.change.cpu(), rtol=1e-2)


def test_no_pass_is_made_that_no_iteration_reads(monkeypatch):
    counts = {"push": 0, "pull": 0}
    for name in counts:
        product = getattr(Linearised, name)

        def counted(self, v, name=name, product=product):
            counts[name] += len(v) == 3
            return product(self, v)

        monkeypatch.setattr(Linearised, name, counted)
    torch.manual_seed(0)
    stage, x0 = models.resnet18().layer4.eval(), torch.randn(3, 256, 4, 4).relu()
    with torch.no_grad():
        target = stage(x0) + torch.randn(3, 512, 2, 2)
    result = reverse(stage, target, x0)
    assert result.iterations.tolist() == [9] * 3
    # Steps of six and three iterations: each begins with a gradient, its last makes none.
    assert counts == {"push": 9, "pull": 9}


class Normalised(nn.Module):
    """A convolution and batch norm; what is done to what went in and came out goes between."""

    def __init__(self, between, beside=False, inwards=lambda x: x, **settings):
        super().__init__()
        self.inwards = inwards
        self.convolution, self.norm = nn.Conv2d(4, 4, 3, **settings), nn.BatchNorm2d(4)
        self.between, self.beside = between, beside
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            nn.init.normal_(tensor)

    def forward(self, x):
        x = x * 2
        y = self.convolution(x)
        self.inwards(x)
        return self.behind(y)

    def reference(self, x):
        return self.behind(self.convolution(x * 2))

    def behind(self, y):
        z = self.between(y)
        return self.norm(z) + y.sin() if self.beside else self.norm(z)


@pytest.mark.parametrize(
    "module",
    [
        Normalised(lambda y: y, padding=1),
        Normalised(lambda y: y, padding=3),
        Normalised(lambda y: y, stride=2),
        Normalised(lambda y: y, dilation=2, padding=1),
        Normalised(lambda y: y, groups=2, bias=False),
        Normalised(lambda y: y, beside=True),
        Normalised(lambda y: y, inwards=lambda x: x.mul_(x.detach().cos())),
        Normalised(lambda y: y * y),
        Normalised(lambda y: y.mul_(y.detach().cos())),
        Normalised(lambda y: y.view_as(y)),
    ],
)
def test_batch_norm_behind_a_convolution_has_its_own_derivatives(module):
    module = module.double().requires_grad_(False).eval()
    _check_products(module)
    x, v = torch.randn(2, 2, 4, 7, 7, dtype=torch.float64)
    forward, linearised = torch.func.jvp(module.reference, (x,), (v,))[1], Linearised(module, x)
    assert torch.allclose(linearised._forward_mode(v), forward, rtol=1e-10)


def _check_products(module):
    x, v = torch.randn(2, 2, 4, 7, 7, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(getattr(module, "reference", module), x)
    u = torch.randn_like(module(x))
    forward = torch.tensordot(jacobian, v, x.ndim)
    backward = torch.tensordot(u, jacobian, u.ndim)
    linearised = Linearised(module, x)
    assert torch.allclose(linearised.output.value, module(x), rtol=1e-12)
    assert torch.allclose(linearised.push(v), forward, rtol=1e-10)
    assert torch.allclose(linearised.pull(u), backward, rtol=1e-10)


def _without_gradient(y):
    with torch.no_grad():
        return y * 1


CONVOLUTION = nn.Conv2d(4, 4, 3, padding=1).double().requires_grad_(False)
NORM = nn.BatchNorm2d(4).double().requires_grad_(False).eval()


def _convolved_without_gradient(x):
    with torch.no_grad():
        return CONVOLUTION(x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: F.conv2d(x, CONVOLUTION.weight * x.mean()),
        lambda x: NORM(F.conv2d(x, CONVOLUTION.weight, x.mean((0, 2, 3)))),
        lambda x: F.batch_norm(
            CONVOLUTION(x), NORM.running_mean, NORM.running_var, x.mean((0, 2, 3)), NORM.bias
        ),
        lambda x: F.batch_norm(
            CONVOLUTION(x), NORM.running_mean, NORM.running_var, NORM.weight, x.mean((0, 2, 3))
        ),
        lambda x: NORM(_without_gradient(CONVOLUTION(x))) * x,
        lambda x: NORM(_convolved_without_gradient(x)) * x,
        lambda x: NORM(CONVOLUTION(x).detach_()) * x,
        lambda x: F.conv2d(x.to(torch.complex128), (1 + 2j) * CONVOLUTION.weight).real,
        lambda x: NORM(NORM(CONVOLUTION(x))),
        lambda x: NORM(CONVOLUTION(CONVOLUTION(x))),
    ],
)
def test_what_depends_on_the_input_or_has_no_gradient_keeps_its_derivative(forward):
    _check_products(Bad(forward))
