"""A module at its random start is known by its weights, and only such a module."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fmce_ops.errors import ModelError
from fmce_ops.maturity import Score, find_modules, next_to_train, restarted, untrained
from fmce_ops.models import build
from torch import nn
from torchvision import models


def images(n: int = 8) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(seed: int, name: str = "shufflenet_v2_x0_5") -> nn.Module:
    torch.manual_seed(seed)
    return build(name, 4, stem="small", in_size=32)


def trained(model: nn.Module, steps: int, lr: float) -> nn.Module:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    labels = torch.arange(8) % 4
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), labels).backward()
        optimizer.step()
    return model.eval()


def found(model: nn.Module, fresh: nn.Module) -> list[str]:
    return untrained(model, fresh, find_modules(model, images(1)))


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "resnet18"])
def test_a_fresh_network_is_all_at_its_start_whatever_the_seed(name: str) -> None:
    model, other = network(0, name), network(1, name)
    assert found(model, other) == [module.name for module in find_modules(model, images(1))]


def test_one_step_is_enough_to_leave_the_start() -> None:
    assert found(trained(network(0), 1, 1e-5), network(1)) == []


@pytest.mark.parametrize("frozen", ["conv1", "stage3", "conv5"])
def test_the_frozen_module_and_no_other_is_named(frozen: str) -> None:
    model = network(0)
    model.backbone.get_submodule(frozen).requires_grad_(False)
    names = found(trained(model, 2, 1e-3), network(1))
    assert names == [f"backbone.{frozen}"]


def plain(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))


def test_without_norms_the_distribution_of_the_weights_tells() -> None:
    model = plain(0)
    model[0].requires_grad_(False)
    assert found(trained(model, 60, 1e-2), plain(1)) == ["0"]


def test_without_norms_weights_beyond_the_bounds_of_the_start_tell_after_a_few_steps() -> None:
    assert found(trained(plain(0), 20, 1e-3), plain(1)) == []


@pytest.mark.parametrize("draw", [nn.init.kaiming_normal_, nn.init.trunc_normal_])
def test_what_is_drawn_from_one_distribution_is_seldom_told_apart(
    draw: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    def drawn(seed: int) -> nn.Module:
        model = plain(seed)
        for layer in (model[0], model[2]):
            draw(layer.weight)
        return model

    assert sum(len(found(drawn(2 * k), drawn(2 * k + 1))) for k in range(100)) >= 199
    wider = drawn(0)
    with torch.no_grad():
        wider[2].weight *= 1.2
    assert found(wider, drawn(1)) == ["0"]
    assert found(drawn(1), wider) == ["0"]


def test_what_lies_between_a_module_and_its_end_counts() -> None:
    model = models.resnet18(num_classes=4).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bn1.bias[3] = 0.1  # behind conv1, and of its functional module
    assert "conv1" not in found(other, model)
    assert "layer1" in found(other, model)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ModelError, match="the same architecture"):
        found(network(0), network(0, "resnet18"))


def test_an_untrained_module_is_the_next_to_train() -> None:
    scores = {"a": Score(0.2, 0, 1), "b": Score(0.9, 0, 1), "c": Score(0.8, 0, 1)}
    assert next_to_train(scores) == "a"
    assert next_to_train(scores, ["b", "c"]) == "c"


def test_a_network_is_restarted_for_a_while_always_alike_and_then_itself_again() -> None:
    model = trained(network(3), 2, 1e-2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(3, generator=torch.Generator().manual_seed(seed))
        with pytest.raises(ValueError, match="within"), restarted(model) as possible:
            assert possible
            drawn.append({name: value.clone() for name, value in model.state_dict().items()})
            raise ValueError("within")
        assert torch.equal(torch.rand(3), expected)  # the random numbers go on as they would have
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(drawn[0][name], drawn[1][name])
    assert set(found(network(4), model)) == set()
    with restarted(model):
        assert set(found(model, network(4))) >= {"backbone.stage4"}


class Choosy(nn.Conv2d):
    def reset_parameters(self, how: str | None = None) -> None:
        super().reset_parameters()
        if how is None and hasattr(self, "ready"):
            raise TypeError("say how")


def test_statistics_of_norms_without_weights_start_anew_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    own = model[1].running_mean.add_(3).clone()
    with restarted(model) as possible:
        assert possible and not model[1].running_mean.any()
    assert torch.equal(model[1].running_mean, own)


def test_weights_that_drawing_replaced_are_put_back() -> None:
    class Replacing(nn.Linear):
        def reset_parameters(self) -> None:
            self.weight = nn.Parameter(torch.rand(self.out_features, self.in_features))

    model = nn.Sequential(Replacing(3, 2, bias=False))
    own, values = model[0].weight, model[0].weight.detach().clone()
    with restarted(model) as possible:
        assert possible and not torch.equal(model[0].weight, values)
    assert model[0].weight is own and torch.equal(own, values)


def test_a_frozen_module_is_named_though_its_activation_is_shared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()
            self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
            self.fc = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.relu(self.second(self.relu(self.first(x)))).mean((2, 3)))

    torch.manual_seed(0)
    model, fresh = Shared(), Shared()
    assert found(model, fresh) == ["first", "second"]
    model.first.requires_grad_(False)
    assert found(trained(model, 20, 1e-2), fresh) == ["first"]


def test_a_network_that_cannot_draw_its_weights_stays_as_it_is() -> None:
    convolution = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    with pytest.warns(FutureWarning, match="weight_norm"):
        of_old = torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU())
    bare.register_parameter("free", nn.Parameter(torch.ones(2)))
    choosy = nn.Sequential(nn.Conv2d(3, 4, 3), Choosy(4, 4, 3))
    choosy[1].ready = True
    with torch.inference_mode():
        inferring = nn.Conv2d(3, 4, 3)
    for model in (nn.Sequential(convolution), nn.Sequential(of_old), bare, choosy, inferring):
        before = [p.clone() for p in model.parameters()]
        with restarted(model) as possible:
            assert not possible
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
