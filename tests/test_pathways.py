"""Gates on filters: they change nothing while open, and a path run alone gives the same answers."""

import pytest
import torch
from fmce_ops.errors import ModelError
from fmce_ops.models import build
from fmce_ops.pathways import (
    PathLoss,
    Weights,
    attach,
    compact,
    detach,
    fixed,
    forced,
    gated_layers,
    held,
    measure_costs,
    path_codes,
    recorded,
    split_code,
)
from fmce_ops.pathways.gates import Controller, Layer
from torch import Tensor, nn
from torchvision import models

SIDE = 32
FAMILIES = {
    "resnet18": lambda: models.resnet18(num_classes=5),
    "resnet50": lambda: models.resnet50(num_classes=5),
    "resnext50": lambda: models.resnext50_32x4d(num_classes=5),
    "vgg11": lambda: build("vgg11", 5, in_size=SIDE),
    "vgg11_bn": lambda: build("vgg11_bn", 5, in_size=SIDE),
    "shufflenet": lambda: build("shufflenet_v2_x0_5", 5, stem="small", in_size=SIDE),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A network whose batch norm has statistics of its own."""
    torch.manual_seed(0)
    network = FAMILIES[request.param]()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.uniform_(-0.5, 0.5)
    network.train()(images(16))
    return network.eval()


def images(n: int) -> Tensor:
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def varied(model: nn.Module) -> nn.Module:
    """Gates that are open for some images and closed for others."""
    network = attach(model)
    draw = torch.Generator().manual_seed(2)
    for gated in gated_layers(network).values():
        score = gated.controller.score
        hidden = gated.controller.reduce.out_features
        score.weight.data = torch.randn(score.weight.shape, generator=draw) * 4 / hidden**0.5
        score.bias.data = torch.randn(score.bias.shape, generator=draw) * 0.5 + 0.2
    return network.eval()


def test_open_gates_change_nothing(model: nn.Module) -> None:
    network = attach(model)
    x = images(4)
    assert path_codes(network, x).all()
    with torch.no_grad():
        expected = model(x)
        assert (network(x) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_detaching_gives_the_architecture_back(model: nn.Module) -> None:
    plain = detach(attach(model))
    assert list(plain.state_dict()) == list(model.state_dict())
    x = images(2)
    with torch.no_grad():
        assert torch.equal(plain(x), model(x))


def test_gates_are_at_every_convolution_but_those_on_a_shortcut() -> None:
    model = models.resnet18(num_classes=5)
    wanted = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv2d) and "downsample" not in name
    ]
    assert list(gated_layers(attach(model))) == wanted


def test_a_closed_filter_answers_zero_behind_its_norm(model: nn.Module) -> None:
    network = varied(model)
    seen: dict[str, Tensor] = {}
    for name, gated in gated_layers(network).items():
        gated.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.clone()}))
    codes = path_codes(network, images(3))
    assert 0.05 < codes.float().mean() < 0.95
    for name, part in split_code(network, codes).items():
        assert not seen[name][~part].any()
        assert seen[name][part].any()


@torch.no_grad()
def test_a_path_run_with_only_its_filters_gives_the_same_answers(model: nn.Module) -> None:
    network = varied(model)
    narrow = compact(network)
    x = images(5)
    expected = network(x)
    alone = torch.cat([narrow(image[None]) for image in x])
    for found in (alone, narrow(x)):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
    ],
)
def test_every_padding_gives_the_same_answers(options: dict) -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(3, 8, 3, **options), nn.ReLU(), nn.Conv2d(8, 6, 3, **options))
    network = varied(chain)
    x = images(4)
    expected = network(x)
    assert torch.allclose(compact(network)(x), expected, atol=1e-5)
    code = path_codes(network, x[:1])[0]
    assert torch.allclose(fixed(network, code)(x[:1]), expected[:1], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gates_have_the_type_of_their_convolution(dtype: torch.dtype) -> None:
    model = models.resnet18(num_classes=5).to(dtype).eval()
    x = images(2).to(dtype)
    network = attach(model)
    assert torch.equal(network(x), model(x))
    code = path_codes(network, x)[0]
    assert held(network, code)(x).dtype == dtype


class Twice(nn.Module):
    """A convolution and a norm that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4).eval()
        self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.norm(self.shared(self.shared(x)))


@torch.no_grad()
def test_what_is_used_twice_stays_as_it_is() -> None:
    model, x = Twice().eval(), images(2)
    network = attach(model)
    assert list(gated_layers(network)) == ["first"]
    assert torch.equal(network(x), model(x))
    assert torch.allclose(compact(network)(x), model(x), atol=1e-6)
    with pytest.raises(ModelError, match="'shared' is used more than once"):
        attach(model, ["shared"])


@torch.no_grad()
def test_a_convolution_with_two_names_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model.other = model[0]
    assert list(gated_layers(attach(model))) == ["2"]


def test_a_network_that_cannot_run_alone_is_refused() -> None:
    chain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ModelError, match="norm behind 0"):
        compact(attach(chain))
    network = attach(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(ModelError, match="use fixed"):
        compact(held(network, torch.ones(4)))


def test_codes_of_another_network_are_refused() -> None:
    network = attach(nn.Sequential(nn.Conv2d(3, 4, 1)))
    for run in (fixed, held):
        with pytest.raises(ModelError, match="do not fit a network of 4 gates"):
            run(network, torch.ones(5, dtype=torch.bool))


def test_a_network_without_gates_has_no_paths() -> None:
    with pytest.raises(ModelError, match="has no gates"):
        path_codes(models.resnet18(), images(1))
    with pytest.raises(ModelError, match="no convolution is named"):
        attach(models.resnet18(), [])


@torch.no_grad()
def test_a_fixed_path_is_a_plain_network_with_the_same_answers(model: nn.Module) -> None:
    network = attach(model)
    x = images(3)
    code = torch.rand(path_codes(network, x).shape[1], generator=torch.Generator().manual_seed(3))
    plain = fixed(network, code > 0.4)
    with forced(network, code > 0.4):
        expected = network.eval()(x)
    assert (plain(x) - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1)
    assert not gated_layers(plain)
    dense, narrow = (sum(p.numel() for p in n.parameters()) for n in (model, plain))
    assert narrow < dense


@torch.no_grad()
def test_a_network_whose_gates_all_close_in_a_layer_still_answers(model: nn.Module) -> None:
    network = attach(model).eval()
    for gated in list(gated_layers(network).values())[1:3]:
        gated.controller.score.bias.fill_(-1)
    x = images(2)
    expected = network(x)
    assert expected.isfinite().all()
    code = path_codes(network, x)[0]
    for found in (compact(network)(x), compact(network)(x[:1]), fixed(network, code)(x)):
        assert torch.allclose(found, expected[: len(found)], rtol=1e-4, atol=1e-4)


def test_multiply_adds_of_a_chain_are_those_counted_by_hand() -> None:
    chain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),  # 6 x 6 positions
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 1, bias=False),  # 3 x 3 positions
        nn.Conv2d(6, 6, 3, groups=6),  # 1 position
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    network = attach(chain)
    costs = measure_costs(network, torch.zeros(1, 3, 6, 6))
    first, second, third, head = 36 * 9 * 3 * 8, 9 * 8 * 6, 9 * 6, 6 * 4
    assert costs.dense == first + second + third + head
    code = torch.tensor([[1] * 2 + [0] * 6 + [1] * 3 + [0] * 3 + [1] + [0] * 5]).bool()
    path = 36 * 9 * 3 * 2 + 9 * 2 * 3 + 9 * 1 + head
    # a hidden layer of a quarter of the input channels, at least one
    controllers = (3 * 1 + 1 * 8) + (8 * 2 + 2 * 6) + (6 * 1 + 1 * 6)
    assert costs.multiply_adds(code).tolist() == [path + controllers]
    assert costs.multiply_adds(code, controllers=False).tolist() == [path]


def test_dense_multiply_adds_are_those_that_torchvision_states() -> None:
    costs = measure_costs(attach(models.resnet18()), torch.zeros(1, 3, 224, 224))
    stated = models.ResNet18_Weights.IMAGENET1K_V1.meta["_ops"]  # 1e9 multiply-adds
    assert costs.dense / 1e9 == pytest.approx(stated, abs=0.001)


def test_the_four_parts_of_the_loss_are_those_worked_out_by_hand() -> None:
    loss = PathLoss([3], 2, Weights(information=0.5, alignment=2.0, sparsity=0.25, ratio=0.5))
    loss.requires_grad_(False)
    reading = loss.readings[0]
    assert isinstance(reading, nn.Linear)
    reading.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    gates = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    outputs = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    logits, labels = torch.zeros(2, 2), torch.tensor([0, 1])
    parts = loss(logits, labels, {"only": Layer(gates, outputs)})
    e = torch.e
    information = -(torch.tensor(e / (e + 1)).log() + torch.tensor(0.5).log()) / 2
    # equal softmaxes in both samples: nothing to align; 2.5 open on average where 1.5 are wanted
    expected = torch.stack([torch.tensor(2.0).log(), information, torch.tensor(0.0)])
    assert torch.allclose(parts, torch.cat([expected, torch.ones(1)]), atol=1e-6)
    assert loss.total(parts) == pytest.approx(
        float(expected[0] + 0.5 * expected[1] + 0.25), abs=1e-6
    )


def test_alignment_is_the_divergence_of_path_from_output() -> None:
    loss = PathLoss([2], 2, Weights(0, 1, 0, 0)).requires_grad_(False)
    gates, outputs = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p, q = outputs.softmax(1), gates.softmax(1)
    parts = loss(torch.zeros(1, 2), torch.tensor([0]), {"only": Layer(gates, outputs)})
    assert parts[2] == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)


def test_gates_in_training_are_soft_or_hard_and_always_have_the_soft_gradient() -> None:
    torch.manual_seed(0)
    controller = Controller(8, 16)
    controller.score.bias.data.zero_()
    x = torch.randn(200, 8, 2, 2)
    gates = controller(x)
    hard = (gates == 0) | (gates == 1)
    assert 0.5 < hard.float().mean() < 0.75  # half of them, and those that are soft at an end
    assert 0.4 < gates.mean() < 0.6
    controller.zero_grad()
    (gates * hard).sum().backward()
    assert controller.score.bias.grad is not None
    assert controller.score.bias.grad.abs().min() > 0


def test_recording_ends_with_its_block() -> None:
    network = attach(nn.Sequential(nn.Conv2d(3, 4, 1))).eval()
    with recorded(network) as layers:
        network(torch.zeros(2, 3, 2, 2))
    assert layers["0"].gates.shape == layers["0"].outputs.shape == (2, 4)
    assert not gated_layers(network)["0"].mask._forward_hooks


def test_a_network_without_convolutions_is_refused() -> None:
    with pytest.raises(ModelError, match="has no convolution"):
        attach(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


def test_an_unknown_convolution_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ModelError, match=r"layer1\.0\.conv3.*layer1\.0\.conv"):
        attach(models.resnet18(), ["layer1.0.conv3"])


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="Branching cannot be traced"):
        attach(Branching())


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 3, 1, 1), (3, 8, 8)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    network = attach(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)))
    with pytest.raises(ModelError, match="do not fit the network"):
        path_codes(network, torch.zeros(shape))
    with pytest.raises(ModelError, match="do not fit the network"):
        path_codes(attach(models.resnet18()), torch.zeros(3, 32, 32))


class Preactivated(nn.Module):
    """A block that defines its shortcut last and runs it first, behind two other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(6, 6, 1)
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 6, 1)
        self.beside = nn.Conv2d(3, 6, 1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        beside = self.beside(x)
        return self.last(self.norm(self.second(self.first(x).relu())) + beside).mean((2, 3))


def test_gates_follow_one_another_as_the_layers_run() -> None:
    torch.manual_seed(0)
    network = varied(Preactivated().eval())
    assert list(gated_layers(network)) == ["beside", "first", "second", "last"]
    x = images(8)
    with torch.no_grad(), recorded(network) as record:
        expected = network(x)
    assert list(record) == list(gated_layers(network))
    codes = torch.cat([layer.gates > 0 for layer in record.values()], dim=1)
    assert torch.equal(path_codes(network, x), codes)
    with torch.no_grad():
        torch.testing.assert_close(compact(network)(x), expected)


def test_every_module_keeps_its_mode() -> None:
    model = models.resnet18(num_classes=5).train()
    model.bn1.eval()
    network = attach(model)
    path_codes(network, images(2))
    measure_costs(network, images(1))
    norms = {name: part for name, part in network.named_modules() if name.endswith("norm")}
    assert [name for name, part in norms.items() if not part.training] == ["conv1.norm"]
    assert network.training and network.conv1.controller.training


def test_a_branch_of_the_training_alone_gets_no_gates() -> None:
    model = models.googlenet(num_classes=5, aux_logits=True, init_weights=False).train()
    network = attach(model)
    assert not any(name.startswith("aux") for name in gated_layers(network))
    assert path_codes(network, images(2)).all()


def test_weights_made_of_others_get_no_gates() -> None:
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    network = attach(nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval())
    assert list(gated_layers(network)) == ["2"]
    x = images(2)
    with torch.no_grad():
        torch.testing.assert_close(compact(network)(x), network(x))
