"""The study behind the judge of maturity: runs left out in nine ways, beside what others use.

python benchmarks/maturity.py FOLDER --raw DATA            # train, describe and judge all runs
python benchmarks/maturity.py FOLDER --raw DATA --write    # and keep the tables and the judge

A fine run ends where the loss of its weights on all its training images comes down to .01: maturity
is the share of a run's own fall, and where runs end half-way the same maps would have to be called
finished in one run and begun in another.

FOLDER holds all state: a call that was stopped goes on where it was, and several calls with
--share 1/2 and 2/2 train and describe side by side. DATA holds MNIST and Fashion-MNIST as
torchvision leaves them and cifar10/{train,test}/<class>/*. Weightwatcher's alpha is read where that
package is installed.
"""

import argparse
import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fmce_ops.data import Augment, Images, TrainBatches, prepare, to_input
from fmce_ops.figures import save_figure
from fmce_ops.maturity import (
    COUNT,
    READ,
    SIZES,
    VIEWED,
    VIEWS_OF_ONE,
    Judge,
    Score,
    find_modules,
    module_maps,
    untrained,
)
from fmce_ops.maturity.judge import SHIPPED
from fmce_ops.maturity_figures import left_out_figure
from fmce_ops.models import Classifier, FmceNet, build, functional_modules, load_into, save_weights
from fmce_ops.training.classifier import Plan, Validation, point_file, train_classifier
from fmce_ops.training.devices import launch
from fmce_ops.training.maturity import (
    JudgePlan,
    LeftOut,
    StudiedRun,
    certain_judge,
    judged,
    summary,
)
from fmce_ops.training.reporter import Reporters
from fmce_ops.training.study import Checkpoint, choose_points, describe_run, read_run
from scipy.stats import spearmanr
from sklearn.isotonic import IsotonicRegression
from torch import Tensor, nn
from torchvision.models.densenet import _DenseBlock, _Transition
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops.misc import Conv2dNormActivation

DATA = {
    "digits": "digits",
    "mnist": "mnist",
    "fashion": "fashion-mnist",
    "cifar": "image-folder",
}
PER_CLASS, FEW = 50, 20  # training images; FEW for runs that overfit
EPOCHS = {"digits": 16, "mnist": 16, "fashion": 28, "cifar": 36}
POINTS = {"digits": 4, "mnist": 4, "fashion": 2, "cifar": 2}  # of an epoch
MANY = 60  # epochs of runs that overfit
CONVERGED = 0.01  # loss at which a run is mature
CLASSES = 10  # of every data set
TOO_HIGH, TOO_LOW = 0.1, 1e-5  # learning rates
NETWORKS = {
    "s05": ("shufflenet_v2_x0_5", "small", None),
    "s10": ("shufflenet_v2_x1_0", "small", None),
    "r20": ("fmce_ops.models.cifar:resnet20", "standard", "layer3"),
    "cnn": ("maturity:cnn", "standard", "block3"),
    "mob": ("maturity:mobile", "standard", "last"),
    "cnnhalf": ("maturity:half_cnn", "standard", "block3"),
    "mobhalf": ("maturity:half_mobile", "standard", "last"),
    "r20x2": ("fmce_ops.models.cifar:wide_resnet20", "standard", "layer3"),
    "cnnx2": ("maturity:wide_cnn", "standard", "block3"),
    "mobx2": ("maturity:wide_mobile", "standard", "last"),
    "s15": ("shufflenet_v2_x1_5", "small", None),
    "rbot": ("maturity:bottlenecks", "standard", "layer3"),
    "moblast": ("maturity:late_mobile", "standard", "last"),
    "den": ("maturity:dense", "standard", "block3"),
    "denx2": ("maturity:wide_dense", "standard", "block3"),
}
ONE_SEED = ("r20x2", "cnnx2", "mobx2", "cnnhalf", "mobhalf")
ONE_SEED += ("s15", "rbot", "moblast", "den", "denx2")
MODULES = {
    "s05": ("stage2", "stage3", "stage4", "conv5"),
    "r20": ("layer1", "layer2", "layer3"),
    "cnn": ("block1", "block2", "block3"),
    "mob": ("block1", "block2", "block3", "last"),
}
SIZE, IMAGES, CHECKPOINTS, PHASES = 16, 256, 12, 10
PLAN, FOLDS = JudgePlan(steps=900), 3
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "maturity.png"


def cnn(num_classes: int, first: int = 32) -> nn.Module:
    """Three blocks of two convolutions, ``first`` to four times as many channels."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for number, width in enumerate((first, 2 * first, 4 * first), start=1):
        parts: list[nn.Module] = []
        for before in (channels, width):
            conv = nn.Conv2d(before, width, 3, padding=1, bias=False)
            parts += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        layers[f"block{number}"] = nn.Sequential(*parts, nn.MaxPool2d(2))
        channels = width
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten(1)
    layers["fc"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)


def half_cnn(num_classes: int) -> nn.Module:
    """The same with half the channels."""
    return cnn(num_classes, first=16)


def wide_cnn(num_classes: int) -> nn.Module:
    """The same with twice the channels."""
    return cnn(num_classes, first=64)


def mobile(num_classes: int, first: int = 32, last: int = 256) -> nn.Module:
    """Inverted residuals in blocks of 1 to 3 times ``first`` channels, as in MobileNet V2."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = Conv2dNormActivation(3, 24, activation_layer=nn.ReLU6)
    channels = 24
    for number, width in enumerate((first, 2 * first, 3 * first), start=1):
        enter = InvertedResidual(channels, width, stride=1 if number == 1 else 2, expand_ratio=3)
        stay = InvertedResidual(width, width, stride=1, expand_ratio=3)
        layers[f"block{number}"] = nn.Sequential(enter, stay)
        channels = width
    layers["last"] = Conv2dNormActivation(channels, last, 1, activation_layer=nn.ReLU6)
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten(1)
    layers["fc"] = nn.Linear(last, num_classes)
    return nn.Sequential(layers)


def half_mobile(num_classes: int) -> nn.Module:
    """The same with half the channels within its blocks."""
    return mobile(num_classes, first=16)


def wide_mobile(num_classes: int) -> nn.Module:
    """The same with twice the channels within its blocks."""
    return mobile(num_classes, first=64)


def late_mobile(num_classes: int) -> nn.Module:
    """The same with four times the channels at its end."""
    return mobile(num_classes, last=1024)


def bottlenecks(num_classes: int) -> nn.Module:
    """Three stages of two bottlenecks, 64 to 256 channels, with the stem of CIFAR networks."""
    made = ResNet(Bottleneck, [2, 2, 2, 2])
    made.inplanes = 16
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Sequential(*stem))
    for number, width in enumerate((16, 32, 64), start=1):
        stride = 1 if number == 1 else 2
        layers[f"layer{number}"] = made._make_layer(Bottleneck, width, 2, stride=stride)
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten(1)
    layers["fc"] = nn.Linear(256, num_classes)
    return nn.Sequential(layers)


def dense(num_classes: int, growth: int = 12) -> nn.Module:
    """Three blocks of four layers, each of which adds ``growth`` channels (arXiv 1608.06993)."""
    channels = 2 * growth
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = nn.Conv2d(3, channels, 3, padding=1, bias=False)
    for number in (1, 2, 3):
        block = _DenseBlock(4, channels, bn_size=4, growth_rate=growth, drop_rate=0.0)
        channels += 4 * growth
        if number < 3:
            end: list[nn.Module] = [_Transition(channels, channels // 2)]
            channels //= 2
        else:
            end = [nn.BatchNorm2d(channels), nn.ReLU()]
        layers[f"block{number}"] = nn.Sequential(block, *end)
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten(1)
    layers["fc"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)


def wide_dense(num_classes: int) -> nn.Module:
    """The same with twice the growth."""
    return dense(num_classes, growth=24)


@dataclass(frozen=True)
class Spec:
    """A run of the study; what makes it other than fine comes after the seed."""

    data: str
    network: str
    seed: int
    frozen: str = ""
    shuffled: bool = False
    lr: float = 0.0
    few: bool = False

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [self.data, self.network, str(self.seed)]
        parts += [f"frozen{self.frozen}"] if self.frozen else []
        parts += ["shuffled1"] if self.shuffled else []
        parts += [f"lr{self.lr}"] if self.lr else []
        return "-".join([*parts, "few"] if self.few else parts)

    @property
    def start(self) -> tuple[str, int]:
        """Runs with the same start from the same random weights, whatever their data."""
        return self.network, self.seed

    @property
    def fine(self) -> bool:
        """Whether nothing is wrong with it."""
        return not (self.frozen or self.shuffled or self.lr or self.few)

    @property
    def teaches(self) -> bool:
        """Whether a judge may learn from it: fine, or hardly away from its start.

        The start itself has batch norms that know no image, which a run of fine ones never has.
        """
        return self.fine or self.lr == TOO_LOW

    @property
    def epochs(self) -> int:
        """Of training."""
        return MANY if self.few else EPOCHS[self.data]


def specs() -> list[Spec]:
    """All runs: fine ones, and those that are not."""
    found = [Spec(d, n, s) for s, d, n in product((0, 1, 2), DATA, [*MODULES, "s10"])]
    found += [Spec(d, n, 0) for n, d in product(ONE_SEED, DATA)]
    frozen = ["cifar r20", "fashion s05", "digits cnn", "mnist r20", "digits s05", "fashion cnn"]
    for data, network in map(str.split, frozen):
        found += [Spec(data, network, 5, frozen=module) for module in MODULES[network]]
    for data, network in (("fashion", "s05"), ("cifar", "r20")):
        base = Spec(data, network, 6)
        found += [replace(base, shuffled=True), replace(base, lr=TOO_HIGH)]
        found += [replace(base, lr=TOO_LOW)]
        found += [replace(base, few=True)]
    return [*found, Spec("mnist", "cnn", 6, shuffled=True), Spec("digits", "s05", 6, lr=TOO_LOW)]


def images_of(folder: Path, raw: Path, data: str, per_class: int = PER_CLASS) -> Images:
    """The prepared data set."""
    path = folder / f"{data}-{SIZE}-{per_class}.h5"
    if not path.exists():
        root = raw / "cifar10" if data == "cifar" else raw
        options = {"per_class": per_class, "validation": 0.05, "test": 0.2, "seed": 0}
        prepare(DATA[data], path, root=root, image_size=SIZE, **options)
    return Images.open(path)


def inputs_of(spec: Spec, folder: Path, raw: Path) -> tuple[Tensor, Tensor, int]:
    """The images that are described, as a network takes them, their labels, and the classes."""
    images = images_of(folder, raw, spec.data)
    pixels, labels = images.load("train")
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(1))[:IMAGES]
    inputs = to_input(pixels[chosen], size=SIZE, mean=images.mean, std=images.std)
    return inputs, labels[chosen], len(images.classes)


def build_network(spec: Spec, classes: int) -> Classifier:
    """With the random weights of the run's seed."""
    backbone, stem, cut = NETWORKS[spec.network]
    torch.manual_seed(spec.seed)
    return build(backbone, classes, stem=stem, cut=cut, in_size=SIZE)


def train(spec: Spec, folder: Path, raw: Path) -> list[float]:
    """Loss of all its training images at every point, where its weights lie in its folder too.

    The mean over the epoch before would lag behind the weights, the more the faster a run is.
    """
    done = folder / "runs16" / spec.name / "done.json"
    if done.exists():
        return list(json.loads(done.read_text())["train"])
    images = images_of(folder, raw, spec.data, FEW if spec.few else PER_CLASS)
    network = build_network(spec, len(images.classes))
    done.parent.mkdir(parents=True, exist_ok=True)
    save_weights(point_file(done.parent, 0), network.state_dict(), {})
    if spec.frozen:
        functional_modules(network)[spec.frozen].requires_grad_(False)
    pixels, labels = images.load("train")
    if spec.shuffled:
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(7))]
    batches = TrainBatches(
        pixels,
        labels,
        batch_size=32,
        size=SIZE,
        mean=images.mean,
        std=images.std,
        augment=Augment(),
        seed=spec.seed,
    )
    all_of_them = Validation(pixels, labels, SIZE, images.mean, images.std)
    lr = spec.lr or (2e-3 if spec.network[0] == "s" else 1e-3)
    plan = Plan(spec.epochs, POINTS[spec.data], "adam", lr, 0.0, "cosine", spec.seed)
    found = train_classifier(
        launch(), network, batches, all_of_them, plan, done.parent, Reporters()
    )
    losses = [point.val_loss for point in found]
    done.write_text(json.dumps({"train": losses}))
    print(spec.name, f"trained to {losses[-1]:.4f}", flush=True)
    return losses


def truth(losses: Sequence[float], spec: Spec) -> tuple[list[float], int]:
    """Maturity at every point, and the last point that counts.

    The share of the fall in log loss, 0 at the loss of a guess, 1 at CONVERGED, where a fine run
    ends.
    """
    curve = np.asarray(losses)
    shares = np.log(CLASSES) / np.minimum(curve, np.log(CLASSES))
    shares = np.minimum(np.log(shares) / np.log(np.log(CLASSES) / CONVERGED), 1)
    reached = np.flatnonzero(curve <= CONVERGED) if spec.fine else []
    return shares.tolist(), int(reached[0]) + 1 if len(reached) else len(curve)


def described(spec: Spec, folder: Path) -> bool:
    """Whether :func:`describe` is done with the run."""
    return (folder / "stores" / f"{spec.name}.json").exists()


def describe(spec: Spec, folder: Path, raw: Path) -> None:
    """Write the run's descriptors, and what others read of the same checkpoints."""
    store, others = folder / "stores" / spec.name, folder / "stores" / f"{spec.name}.json"
    if described(spec, folder):
        return
    losses = train(spec, folder, raw)
    curve, end = truth(losses, spec)
    evenly = np.linspace(1, end, CHECKPOINTS).round().astype(int).tolist()
    points = choose_points(curve[:end], CHECKPOINTS) if spec.fine else evenly
    weights = folder / "runs16" / spec.name
    start = Checkpoint(point_file(weights, 0), 0, 0.0)
    checkpoints = [start, *(Checkpoint(point_file(weights, p), p, curve[p - 1]) for p in points)]
    inputs, labels, classes = inputs_of(spec, folder, raw)
    network = build_network(spec, classes)
    manifest = describe_run(
        launch(), network, checkpoints, inputs, store, Reporters(), {"run": asdict(spec)}
    )
    manifest.save(store)
    read = baselines(network, checkpoints, inputs, labels)
    read["loss"] = [losses[max(c.point, 1) - 1] for c in checkpoints]
    others.write_text(json.dumps(read))
    print(spec.name, "described", flush=True)


# What others read of the last feature map, averaged over positions, or of the weights.


@torch.no_grad()
def baselines(
    network: Classifier, checkpoints: Sequence[Checkpoint], inputs: Tensor, labels: Tensor
) -> dict[str, list[float]]:
    """A value of each for every checkpoint."""
    vectors, alphas = [], []
    for checkpoint in checkpoints:
        load_into(network, checkpoint.file)
        modules = find_modules(network, inputs)
        vectors.append(module_maps(network, inputs, modules[-1:])[0].mean((2, 3)))
        alphas.append(alpha(network))
    found = {
        "effective rank": [effective_rank(v) for v in vectors],
        "NC1": [collapse(v, labels) for v in vectors],
        "CKA to the end": [cka(v, vectors[-1]) for v in vectors],
        "LogME": [logme(v.double(), labels) for v in vectors],
    }
    return found if None in alphas else {**found, "alpha": [a for a in alphas if a is not None]}


def effective_rank(vectors: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values (Roy, Vetterli, 2007)."""
    values = torch.linalg.svdvals(vectors)
    shares = values / values.sum().clamp_min(1e-12)
    return torch.special.entr(shares).sum().exp().item()


def collapse(vectors: Tensor, labels: Tensor) -> float:
    """NC1, log trace of within-class over between-class scatter (arXiv 2008.08186)."""
    means = torch.stack([vectors[labels == k].mean(0) for k in labels.unique()])
    within = (vectors - means[torch.searchsorted(labels.unique(), labels)]).double()
    between = (means - vectors.mean(0)).double()
    scatter = within.T @ within / len(vectors)
    apart = torch.linalg.pinv(between.T @ between / len(means), hermitian=True, rtol=1e-6)
    return float((scatter @ apart).trace().div(len(means)).clamp_min(1e-12).log())


def cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment (arXiv 1905.00414)."""
    one, other = one - one.mean(0), other - other.mean(0)
    cross = (other.T @ one).norm() ** 2
    return float(cross / ((one.T @ one).norm() * (other.T @ other).norm()).clamp_min(1e-12))


def logme(vectors: Tensor, labels: Tensor) -> float:
    """Mean log maximum evidence of linear models of the labels (arXiv 2102.11005)."""
    u, s, _ = torch.linalg.svd(vectors, full_matrices=False)
    count, width = vectors.shape
    energies, total = s.square(), 0.0
    for k in labels.unique():
        y = (labels == k).double()
        projected = (u.T @ y).square()
        outside = (y.square().sum() - projected.sum()).clamp_min(0)
        a, b = 1.0, 1.0  # precisions of the weights and of the noise
        for _ in range(20):
            gamma = float((b * energies / (a + b * energies)).sum())
            weight = float((projected * energies * b**2 / (a + b * energies).square()).sum())
            error = float((projected * a**2 / (a + b * energies).square()).sum() + outside)
            a, b = gamma / max(weight, 1e-12), (count - gamma) / max(error, 1e-12)
        evidence = width * np.log(a) + count * np.log(b) - b * error - a * weight
        evidence -= float((a + b * energies).log().sum()) + (width - len(s)) * np.log(a)
        total += float(evidence - count * np.log(2 * np.pi)) / 2 / count
    return total / len(labels.unique())


def alpha(network: nn.Module) -> float | None:
    """Mean exponent of the layers' spectra (WeightWatcher); None without that package."""
    try:
        import weightwatcher
    except ImportError:
        return None
    import logging

    logging.getLogger("weightwatcher").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        details = weightwatcher.WeightWatcher(model=network).analyze(min_evals=10)
    return float(details["alpha"].mean())


# Runs left out.


@dataclass(frozen=True)
class Read:
    """A run as the judge reads it, and as others do."""

    spec: Spec
    run: StudiedRun
    others: dict[str, list[float]]


def read(spec: Spec, folder: Path) -> Read:
    """What :func:`describe` wrote. The truth of a frozen module is 0 throughout."""
    store = folder / "stores" / spec.name
    run = read_run(store, spec.name)
    if spec.frozen:
        known = run.maturity.clone()
        known[:, place(run, spec)] = 0.0
        run = replace(run, maturity=known)
    return Read(spec, run, json.loads(Path(f"{store}.json").read_text()))


def without_lone_maps(run: StudiedRun) -> StudiedRun:
    """Where a network is at hand, an image is read by its views; a map alone is for the served."""
    told = run.start[:, 0]
    kept = (told[:, VIEWED] > 0) | (told[:, COUNT] > 0)
    return replace(run, descriptors=run.descriptors[:, kept], start=run.start[kept])


def place(run: StudiedRun, spec: Spec) -> int:
    """Which module is the frozen one."""
    return next(i for i, name in enumerate(run.modules) if name.endswith(f".{spec.frozen}"))


Split = tuple[str, Callable[[Spec, Spec], bool], Callable[[Spec], bool]]
SPLITS: list[Split] = [
    # what is left out with a run; the runs that are judged
    (
        "unseen seed",
        lambda a, b: a.start == b.start,
        lambda s: s.fine and s.network not in ONE_SEED,
    ),
    ("unseen width", lambda a, b: a.network == b.network, lambda s: s.fine),
    ("unseen family", lambda a, b: a.network[0] == b.network[0], lambda s: s.fine),
    ("unseen data set", lambda a, b: a.data == b.data, lambda s: s.fine),
    ("labels shuffled", lambda a, b: a.start == b.start, lambda s: s.shuffled),
    ("learning rate too high", lambda a, b: a.start == b.start, lambda s: s.lr == TOO_HIGH),
    ("learning rate too low", lambda a, b: a == b, lambda s: s.lr == TOO_LOW),
    ("overfitted", lambda a, b: a.start == b.start, lambda s: s.few),
    ("one module frozen", lambda a, b: a.start == b.start, lambda s: bool(s.frozen)),
]


def judge_split(split: Split, runs: Sequence[Read], folder: Path) -> dict[str, LeftOut]:
    """Each run of the split by a judge that saw none of what is left out with it."""
    found = {}
    for read_ in [r for r in runs if split[2](r.spec)]:
        found[read_.run.name] = judged(judge_of(learned(split, read_, runs), folder), read_.run)
    return found


def learned(split: Split, judged_: Read, runs: Sequence[Read]) -> list[StudiedRun]:
    """The runs that the judge of a run may learn from."""
    return [
        r.run
        for r in runs
        if r.spec.teaches and r.spec != judged_.spec and not split[1](judged_.spec, r.spec)
    ]


def judge_of(runs: Sequence[StudiedRun], folder: Path) -> Judge:
    """A judge that learned from these runs, made once and kept."""
    path = judge_file(runs, folder)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        save_weights(path, certain_judge(runs, PLAN, FOLDS).state_dict(), {})
    judge = Judge(PLAN.width, PLAN.members)
    load_into(judge, path)
    return judge.eval()


def judge_file(runs: Sequence[StudiedRun], folder: Path) -> Path:
    """Where a judge of these runs is kept."""
    key = repr([run.name for run in runs]) + repr(PLAN) + repr((FOLDS, READ))
    return folder / "judges" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def baseline_figures(name: str, split: Split, runs: Sequence[Read]) -> tuple[float, float] | None:
    """Spearman and mean absolute error; its scale is learned from the runs that a judge may see."""
    _, apart, chosen = split
    figures = []
    for read_ in [r for r in runs if chosen(r.spec)]:
        known = [r for r in runs if r.spec.fine and not apart(read_.spec, r.spec)]
        known = [r for r in known if r.spec != read_.spec]
        if name not in read_.others:
            return None
        x = np.concatenate([r.others[name] for r in known])
        y = np.concatenate([r.run.maturity[:, -1].numpy() for r in known])
        scale = IsotonicRegression(increasing="auto", out_of_bounds="clip").fit(x, y)
        true = read_.run.maturity[:, -1].numpy()
        values = np.asarray(read_.others[name])
        order = spearmanr(values, true).statistic if len(set(true)) > 1 < len(set(values)) else 0.0
        sign = 1 if scale.increasing_ else -1
        figures.append(
            (sign * float(np.nan_to_num(order)), np.abs(scale.predict(values) - true).mean())
        )
    return float(np.mean([f[0] for f in figures])), float(np.mean([f[1] for f in figures]))


FMCE_NET = "s05"  # the architecture whose runs it learns from and judges
PAIRS = {  # a run that it learns from, one that it judges
    "unseen seed": [(Spec(d, FMCE_NET, s), Spec(d, FMCE_NET, 1 - s)) for d in DATA for s in (0, 1)],
    "unseen data set": [
        (Spec(a, FMCE_NET, 0), Spec(b, FMCE_NET, 0)) for a, b in pairwise([*DATA, *DATA][:5])
    ],
}


def fmce_net(split: str, folder: Path, raw: Path, runs: Sequence[Read]) -> dict[str, LeftOut]:
    """The published network, learned from one run, on another of the same architecture."""
    found = {}
    for known, new in PAIRS[split]:
        torch.manual_seed(0)
        x, truth_known = last_maps(known, folder, raw, runs)
        y, truth_new = last_maps(new, folder, raw, runs)
        network = FmceNet(tuple(x.shape[2:]), len(x))
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        flat, phase = x.flatten(0, 1), torch.arange(len(x)).repeat_interleave(x.shape[1])
        epochs = torch.stack([torch.randperm(len(flat)) for _ in range(4)])
        for chosen in epochs.flatten().split(64):
            loss = F.cross_entropy(network(flat[chosen]), phase[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            shares = network.eval()(y.flatten(0, 1)).softmax(1)
        each = (shares @ truth_known).view(y.shape[:2])
        value = torch.cat([each, each.mean(1, keepdim=True)], dim=1)
        size = torch.tensor([VIEWS_OF_ONE] * y.shape[1] + [len(SIZES)]).expand(value.shape)
        true = truth_new[:, None].expand(value.shape).flatten()
        said, size = value.flatten(), size.flatten()
        found[new.name] = LeftOut(said, said, said, true, size, torch.ones_like(said))
    return found


def last_maps(spec: Spec, folder: Path, raw: Path, runs: Sequence[Read]) -> tuple[Tensor, Tensor]:
    """Of the last module at the checkpoints of a run: (checkpoints, IMAGES, C, h, w), maturity."""
    inputs, _, classes = inputs_of(spec, folder, raw)
    network = build_network(spec, classes)
    run = next(r.run for r in runs if r.spec == spec)
    manifest = json.loads((folder / "stores" / spec.name / "manifest.json").read_text())
    maps = []
    for point in manifest["provenance"]["points"]:
        load_into(network, point_file(folder / "runs16" / spec.name, point))
        with torch.no_grad():
            maps.append(network.eval().features(inputs))
    return torch.stack(maps), run.maturity[:, -1]


def named_frozen(found: dict[str, LeftOut], runs: Sequence[Read]) -> tuple[int, int]:
    """In how many runs the module of least maturity, at the end, is the one that was frozen."""
    hits = []
    for r in runs:
        if r.spec.frozen:
            last = found[r.run.name].value.view(r.run.descriptors.shape[:3])[-1, -1]
            hits.append(int(last.argmin()) == place(r.run, r.spec))
    return sum(hits), len(hits)


def named_by_weights(folder: Path, raw: Path, specs: Sequence[Spec]) -> str:
    """What the weights say at the end of each run, beside those of a fresh network."""
    hits, frozen, wrong, others = 0, 0, 0, 0
    for spec in specs:
        inputs, _, classes = inputs_of(spec, folder, raw)
        network = build_network(spec, classes)
        manifest = json.loads((folder / "stores" / spec.name / "manifest.json").read_text())
        points = manifest["provenance"]["points"]
        load_into(network, point_file(folder / "runs16" / spec.name, points[-1]))
        fresh = build_network(replace(spec, seed=10**6), classes)
        modules = find_modules(network.eval(), inputs)
        found = untrained(network, fresh, modules)
        if spec.frozen:
            frozen += 1
            hits += [name.split(".")[-1] for name in found] == [spec.frozen]
        else:
            others += 1
            wrong += bool(found)
    return f"""By its weights, beside those of a fresh network (`fmce_ops.maturity.untrained`), \
the frozen module and no other is at its random start in {hits} of {frozen} runs; in {wrong} of \
the {others} runs without a frozen module some module is said to be."""


def draw(folder: Path, runs: Sequence[Read]) -> None:
    """The last modules of the runs of one seed, each by a judge that never saw that seed."""
    chosen = [r for r in runs if r.spec.fine and r.spec.seed == 1]
    panels = {}
    for r in chosen:
        said = judged(judge_of(learned(SPLITS[0], r, runs), folder), r.run)
        shape = r.run.descriptors.shape[:3]
        last = [part.view(shape)[:, -1, -1].tolist() for part in (said.value, said.low, said.high)]
        scores = map(Score, *last)
        panels[r.run.name] = list(zip(r.run.maturity[:, -1].tolist(), scores, strict=True))
    save_figure(left_out_figure(panels, "Unseen seed, last module, 256 images"), PICTURE)


def report(folder: Path, raw: Path, runs: Sequence[Read]) -> str:
    """The tables."""
    rows, named, against = [], "", []
    for split in SPLITS:
        found = judge_split(split, runs, folder)
        if split[0].startswith("unseen"):
            against.append(f"| {split[0]} | {beside_cka(found, runs)} |")
        one, many = summary(list(found.values()), VIEWS_OF_ONE), summary(list(found.values()))
        rows.append(row(split[0], "judge", len(found), one, many))
        if split[0] == "one module frozen":
            named = "{} of {}".format(*named_frozen(found, runs))
        if split[0] in PAIRS:
            found = fmce_net(split[0], folder, raw, runs)
            one, many = summary(list(found.values()), VIEWS_OF_ONE), summary(list(found.values()))
            for figures in (one, many):
                figures["coverage"] = float("nan")
            rows.append(row(split[0], "FMCE-Net (ShuffleNet V2 x0.5)", len(found), one, many))
        for name in ("effective rank", "NC1", "CKA to the end", "LogME", "alpha", "loss"):
            figures_ = baseline_figures(name, split, runs)
            if figures_ is not None:
                order, error = figures_
                rows.append(
                    f"| {split[0]} | {name} | | | | | {order:.4f} | {error * PHASES:.2f} | |"
                )
    table, orders = "\n".join(rows), "\n".join(against)
    fine = sum(r.spec.fine for r in runs)
    by_weights = named_by_weights(folder, raw, [r.spec for r in runs])
    return f"""# Maturity of runs left out

`python benchmarks/maturity.py FOLDER --raw DATA --write`; {len(runs)} runs, {fine} of them fine, \
{SIZE} px, {IMAGES} images, torch {torch.__version__}. Last module. Spearman and error are means \
over the judged runs; the error is in phases, tenths of the maturity; coverage is that of the 90 % \
interval. A run is never judged by a judge that has seen it; what is unseen names what else was \
left out. What others read gets its scale by isotonic regression from the same fine runs; LogME, \
NC1 and the loss need labels, CKA the final weights.

| unseen or wrong | who | runs | {headings("image")} | {headings("batch")} |
|---|---|---|---|---|---|---|---|---|
{table}

Spearman of the judge (256 images) less that of CKA on the same run, whose last checkpoint CKA \
compares with itself:

| unseen | mean | standard error | runs better | worse |
|---|---|---|---|---|
{orders}

By its score alone the module that was frozen at its random start is the least mature of its \
network, at the end of training, in {named} runs. {by_weights}
"""


def beside_cka(found: dict[str, LeftOut], runs: Sequence[Read]) -> str:
    """How much better the judge orders the checkpoints of a run: cells of the table."""
    gains = []
    for r in [r for r in runs if r.run.name in found]:
        other = spearmanr(r.others["CKA to the end"], r.run.maturity[:, -1]).statistic
        gains.append(summary([found[r.run.name]])["spearman"] - other)
    spread = np.std(gains, ddof=1) / len(gains) ** 0.5
    better, worse = (sum(sign * gain > 1e-9 for gain in gains) for sign in (1, -1))
    return f"{np.mean(gains):+.4f} | {spread:.4f} | {better} | {worse}"


def headings(of: str) -> str:
    """Of three columns."""
    return " | ".join(f"{figure}, {of}" for figure in ("Spearman", "error", "coverage"))


def row(split: str, who: str, runs: int, one: dict[str, float], many: dict[str, float]) -> str:
    """Of the table."""

    def cells(figures: dict[str, float], digits: int) -> str:
        coverage = figures["coverage"]
        shown = "" if np.isnan(coverage) else f"{coverage:.2f}"
        return f"{figures['spearman']:.{digits}f} | {figures['error'] * PHASES:.2f} | {shown}"

    return f"| {split} | {who} | {runs} | {cells(one, 3)} | {cells(many, 4)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--share", default="1/1", help="describe every so many-th run alone")
    parser.add_argument("--write", action="store_true", help="keep the tables and the judge")
    options = parser.parse_args()
    mine, of = map(int, options.share.split("/"))
    everything = specs()
    for spec in everything[mine - 1 :: of]:
        describe(spec, options.folder, options.raw)
    if of > 1 and not all(described(spec, options.folder) for spec in everything):
        return  # the other shares are still at work
    whole = [read(spec, options.folder) for spec in everything]
    runs = [replace(r, run=without_lone_maps(r.run)) for r in whole]
    needed = [learned(split, r, runs) for split in SPLITS for r in runs if split[2](r.spec)]
    distinct = {judge_file(chosen, options.folder): chosen for chosen in needed}
    for chosen in list(distinct.values())[mine - 1 :: of]:
        judge_of(chosen, options.folder)
    if of > 1:
        return
    text = report(options.folder, options.raw, runs)
    print(text)
    if options.write:
        everyone = [r.run for r in whole if r.spec.teaches]
        save_weights(SHIPPED, certain_judge(everyone, PLAN).state_dict(), {})
        Path(__file__).with_suffix(".md").write_text(text)
        draw(options.folder, runs)


if __name__ == "__main__":
    main()
