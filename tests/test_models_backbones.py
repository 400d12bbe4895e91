"""Classifiers cut at their feature map: shapes by hand, parameters kept, what is refused."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from fmce_ops.errors import ModelError
from fmce_ops.models import Classifier, build, feature_shape
from fmce_ops.models.cifar import resnet20, resnet56, wide_resnet20
from torch import Tensor, nn


def test_a_classifier_is_its_head_after_its_backbone() -> None:
    classifier = build("shufflenet_v2_x0_5", 7, stem="small", in_size=32).eval()
    images = torch.rand(2, 3, 32, 32)
    linear = classifier.head[-1]
    pooled = classifier.features(images).mean(dim=(2, 3))
    expected = pooled @ linear.weight.T + linear.bias
    torch.testing.assert_close(classifier(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("resnet18", 64, (512, 2, 2)),  # /32
        ("resnext50_32x4d", 64, (2048, 2, 2)),
        ("wide_resnet50_2", 64, (2048, 2, 2)),
        ("shufflenet_v2_x1_0", 64, (1024, 2, 2)),
        ("vgg11", 64, (512, 2, 2)),
        ("alexnet", 64, (256, 1, 1)),  # 64 -> 15 -> 7 -> 3 -> 1
        ("densenet121", 64, (1024, 2, 2)),
        ("mobilenet_v2", 64, (1280, 2, 2)),
        ("mobilenet_v3_small", 64, (576, 2, 2)),
        ("efficientnet_b0", 64, (1280, 2, 2)),
        ("mnasnet0_5", 64, (1280, 2, 2)),
        ("regnet_y_400mf", 64, (440, 2, 2)),
        ("convnext_tiny", 64, (768, 2, 2)),
        ("googlenet", 64, (1024, 2, 2)),
        ("inception_v3", 107, (2048, 2, 2)),  # 53 51 51 25 25 23 11 | 5 | 2
        ("squeezenet1_0", 64, (512, 3, 3)),  # 29 14 7 3, poolings that round up
    ],
)
def test_the_families_have_a_default_cut(name: str, size: int, shape: tuple[int, int, int]) -> None:
    classifier = build(name, 10, in_size=size)
    assert feature_shape(classifier, size) == shape
    assert isinstance(classifier.backbone, nn.Sequential)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "densenet121", "mobilenet_v2"])
def test_a_cut_network_computes_what_the_whole_network_does(name: str) -> None:
    torch.manual_seed(3)
    classifier = build(name, 10, in_size=64).eval()
    whole = torchvision.models.get_model(name, num_classes=10).eval()
    taken = whole.load_state_dict(classifier.backbone.state_dict(), strict=False)
    assert not taken.unexpected_keys
    last = [module for module in whole.modules() if isinstance(module, nn.Linear)][-1]
    last.load_state_dict(classifier.head[-1].state_dict())
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(classifier(images), whole(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "channels"), [("resnet18", 512), ("resnet50", 2048), ("shufflenet_v2_x0_5", 1024)]
)
@pytest.mark.parametrize(("size", "side"), [(32, 4), (56, 7)])
def test_the_small_stem_leaves_an_eighth(name: str, channels: int, size: int, side: int) -> None:
    classifier = build(name, 10, stem="small", in_size=size)
    assert feature_shape(classifier, size) == (channels, side, side)


def test_the_small_resnet_has_the_parameters_known_for_cifar() -> None:
    classifier = build("resnet18", 10, stem="small", in_size=32)
    assert sum(p.numel() for p in classifier.parameters()) == 11_173_962


@pytest.mark.parametrize(
    ("make", "millions"), [(resnet20, 0.27), (resnet56, 0.85), (wide_resnet20, 1.1)]
)
def test_the_resnets_of_cifar_have_the_parameters_that_are_stated(
    make: Callable[[int], nn.Module], millions: float
) -> None:
    network = make(10)
    count = sum(weights.numel() for weights in network.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.03)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_nothing_behind_the_cut_is_kept() -> None:
    classifier = build("resnet18", 10, cut="layer2", in_size=64)
    assert feature_shape(classifier, 64) == (128, 8, 8)
    names = {name.split(".")[1] for name in classifier.backbone.state_dict() if "layer" in name}
    tops = {name.split(".")[0] for name in classifier.backbone.state_dict()}
    assert tops == {"conv1", "bn1", "layer1", "layer2"} and names == {"0", "1"}
    inner = build("vgg11", 10, cut="features.7", in_size=32)
    assert list(inner.backbone.state_dict()) == [
        f"features.{layer}.{kind}" for layer in (0, 3, 6) for kind in ("weight", "bias")
    ]


def test_the_same_seed_draws_the_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(11)
        states.append(build("shufflenet_v2_x0_5", 10, stem="small", in_size=32).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_classifier_comes_untouched_and_ready_to_train() -> None:
    classifier = build("resnet18", 10, stem="small", in_size=32)
    feature_shape(classifier, 32)
    assert all(module.training for module in classifier.modules())
    assert int(classifier.backbone.bn1.num_batches_tracked) == 0
    assert float(classifier.backbone.bn1.running_mean.abs().sum()) == 0
    assert not any(module._forward_hooks for module in classifier.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet81"}, r"no backbone 'resnet81'.*resnet18"),
        ({"backbone": "resnet18", "stem": "tiny"}, r"no stem 'tiny'"),
        ({"backbone": "vgg11", "stem": "small"}, r"'vgg11' has no small stem"),
        ({"backbone": "resnet18", "cut": "layer9"}, r"no submodule 'layer9'.*layer1, layer2"),
        ({"backbone": "resnet18", "cut": "fc"}, r"'fc' of 'resnet18' gives \(N, 10\).*layer4"),
        ({"backbone": "swin_t"}, r"'swin_t' has no cut of its own.*permute"),
        (
            {"backbone": "swin_t", "cut": "norm"},
            r"'norm' of 'swin_t' gives \(N, 2, 2, 768\).*permute",
        ),
        ({"backbone": "alexnet", "in_size": 16}, r"'alexnet' .*'features' that runs on .* 16 px"),
        (
            {"backbone": "no_such_module:net"},
            r"could not be found \(ModuleNotFoundError: No module",
        ),
        ({"backbone": "torchvision.models:no_such_net"}, r"could not be found"),
        ({"backbone": "math:sqrt"}, r"could not be made.*num_classes"),
        ({"backbone": "builtins:dict"}, r"made a dict: return a torch\.nn\.Module"),
        ({"backbone": "torchvision.models:vit_b_32", "in_size": 224}, r"no cut.*conv_proj"),
    ],
)
def test_what_cannot_be_built_is_explained(arguments: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(**({"classes": 10, "in_size": 64} | arguments))


FACTORY = '''
import torch
import torch.nn.functional as F
from torch import nn

class Residual(nn.Module):
    """Joins its layers by functions, so that they are not a chain."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = self.norm(x + self.body(x))
        return self.fc(x.mean(dim=(2, 3)))

class Untraceable(Residual):
    def forward(self, x):
        if x.mean() > 100:
            x = x / 2
        return super().forward(x)

class Twice(Residual):
    def forward(self, x):
        x = self.stem(x)
        return self.fc(self.body(self.body(x)).mean(dim=(2, 3)))

class Headed(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3)
        self.body = nn.Conv2d(8, 8, 3)

class Failing(Residual):
    def forward(self, x):
        return self.body(self.stem(x).missing())

def residual(num_classes):
    return Residual(num_classes)

def untraceable(num_classes):
    return Untraceable(num_classes)
'''


class TestOwnNetworks:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Path, monkeypatch) -> None:
        (tmp_path / "own_networks.py").write_text(FACTORY)
        monkeypatch.syspath_prepend(str(tmp_path))
        sys.modules.pop("own_networks", None)

    def by_hand(self, classifier: Classifier, images: Tensor) -> Tensor:
        weights = classifier.backbone.network
        x = torch.relu(weights.stem(images))
        return weights.norm(x + weights.body(x))

    def test_layers_that_are_no_chain_are_traced(self) -> None:
        classifier = build("own_networks:residual", 5, cut="norm", in_size=16)
        images = torch.rand(2, 3, 16, 16)
        for mode in (True, False):
            classifier.train(mode)
            torch.testing.assert_close(
                classifier.features(images), self.by_hand(classifier, images)
            )
        assert classifier(images).shape == (2, 5)
        assert not any("fc" in name for name in classifier.backbone.state_dict())

    def test_a_network_that_cannot_be_traced_is_refused(self) -> None:
        with pytest.raises(ModelError, match=r"cannot be cut at 'norm', for its layers"):
            build("own_networks:untraceable", 5, cut="norm", in_size=16)

    @pytest.mark.parametrize(
        ("network", "cut", "message"),
        [
            ("Twice", "body", r"'body' of '.*' runs 2 times .* one of stem\.$"),
            ("Headed", "body", r"has a module 'head' before its cut"),
            (
                "Failing",
                "norm",
                r"'norm' that runs .* px \(AttributeError: .*missing.*one of stem\.$",
            ),
        ],
    )
    def test_what_its_code_does_is_met_at_the_door(self, network, cut, message) -> None:
        with pytest.raises(ModelError, match=message):
            build(f"own_networks:{network}", 5, cut=cut, in_size=16)

    def test_a_module_that_does_not_import_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "own_networks.py").write_text("1 / 0")
        with pytest.raises(ModelError, match=r"could not be found \(ZeroDivisionError"):
            build("own_networks:residual", 5, cut="norm", in_size=16)

    def test_without_a_cut_the_candidates_are_listed(self) -> None:
        with pytest.raises(ModelError, match=r"set the cut to one of stem, body, norm\."):
            build("own_networks:residual", 5, in_size=16)
