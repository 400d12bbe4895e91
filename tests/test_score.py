"""What a user does to score networks: the command, the monitor, Lightning."""

import json
import os
import pickle
import shutil
import threading
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from fmce_ops.errors import DataError, FmceError
from fmce_ops.maturity import score
from fmce_ops.models import save_weights
from fmce_ops.stages.score import Asked, score_network, watch_folder
from fmce_ops.tracking.monitor import MaturityMonitor, lightning_callback
from mlflow import MlflowClient
from PIL import Image
from torch import nn
from torchvision import models

from tests.project import fmce_ops

NETWORK = "shufflenet_v2_x0_5"
MODULES = ["conv1", "stage2", "stage3", "stage4", "conv5"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twenty pictures of several forms in folders of several depths."""
    generator = np.random.default_rng(0)
    for k in range(20):
        folder = tmp_path / "pictures" / ("deep" if k % 2 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (40 + k, 50, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).convert("L" if k % 3 else "RGB")
        picture.save(folder / f"{k}.{'jpg' if k % 5 else 'png'}")
    return tmp_path / "pictures"


def scored(folder: Path, *words: str) -> dict[str, object]:
    done = fmce_ops(folder, "score", *words, "--json")
    found: dict[str, object] = json.loads(done.stdout)
    return found


def client(folder: Path) -> MlflowClient:
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    return MlflowClient()


def test_a_logged_classifier_is_scored_on_the_images_of_the_project(project: Path) -> None:
    store = client(project)
    experiment = store.get_experiment_by_name("fmce-ops").experiment_id
    (run,) = store.search_runs([experiment], "tags.`fmce.stage` = 'markers'")
    uri = f"runs:/{run.info.run_id}/phase-03"
    found = scored(project, "--model-uri", uri, "--images", "40")
    assert list(found["modules"]) == [f"backbone.{name}" for name in MODULES]
    assert found["images"] == 40
    assert found["next"] in found["modules"]
    shown = fmce_ops(project, "score", "--model-uri", uri).stdout
    assert "train next" in shown and "backbone.stage3" in shown
    run = store.search_runs([experiment], "tags.`fmce.stage` = 'score'")[-1]
    assert set(run.data.metrics) == {f"maturity/backbone.{name}" for name in MODULES}
    assert any(f.path.endswith(".png") for f in store.list_artifacts(run.info.run_id, "figures"))


@pytest.mark.parametrize("form", ["pt", "wrapped", "parallel", "safetensors"])
def test_any_network_is_scored_from_its_weights_and_a_folder_of_pictures(
    tmp_path: Path, pictures: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = models.get_model(NETWORK, weights=None, num_classes=7)
    weights = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pt'}"
    if form == "safetensors":
        save_weights(weights, network.state_dict(), {})
    else:
        state = network.state_dict()
        behind = {f"module._orig_mod.{name}": value for name, value in state.items()}
        forms = {"pt": state, "wrapped": {"state_dict": state}}
        torch.save(forms.get(form, {"model_state_dict": behind}), weights)
    asked = Asked(network=NETWORK, classes=7, weights=weights, data=pictures, size=32)
    found = score_network(asked, Path("params.yaml"))
    assert list(found.modules) == MODULES and found.images == 20
    assert found.untrained == MODULES
    one = score_network(replace(asked, modules=("stage3",)), Path("params.yaml"))
    (only,) = one.modules.items()
    assert only[0] == "stage3"
    assert only[1].value == pytest.approx(found.modules["stage3"].value, rel=1e-4)


def test_checkpoints_are_scored_as_they_appear_in_one_run(tmp_path: Path, pictures: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    network = models.get_model(NETWORK, weights=None)
    torch.save(network.state_dict(), folder / "first.pt")

    def later() -> None:
        time.sleep(8)
        (folder / "second.part").write_bytes(b"half")
        torch.save(network.state_dict(), folder / "second.part")
        (folder / "second.part").rename(folder / "second.pt")

    writing = threading.Thread(target=later)
    writing.start()
    words = ["--network", NETWORK, "--data", str(pictures), "--size", "32"]
    words += ["--watch", str(folder), "--count", "2", "--json"]
    done = fmce_ops(tmp_path, "score", *words)
    writing.join()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(line["network"]).name for line in lines] == ["first.pt", "second.pt"]
    store = client(tmp_path)
    experiment = store.get_experiment_by_name("fmce-ops").experiment_id
    (run,) = store.search_runs([experiment])
    history = store.get_metric_history(run.info.run_id, "maturity/conv5")
    assert [metric.step for metric in history] == [1, 2]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"network": "resnet81", "data": "pictures"}, "resnet18"),
        ({"network": NETWORK, "data": "empty"}, "holds no pictures"),
        ({"network": NETWORK, "data": "broken"}, "cannot be read as a picture"),
        ({"network": NETWORK, "data": "pictures", "weights": "evil.pt"}, "plain weights"),
        ({"network": NETWORK, "data": "pictures", "weights": "other.pt"}, "does not fit"),
        ({"network": NETWORK, "data": "pictures", "weights": "none.pt"}, "cannot be opened"),
        ({"network": NETWORK, "data": "pictures", "modules": ("conv9",)}, "no submodule"),
        ({"model_uri": "models:/nobody@champion"}, "no model at"),
        ({"network": NETWORK}, "images.h5"),
        ({}, "params.yaml"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    tmp_path: Path,
    pictures: Path,
    asked: dict[str, Any],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(pictures, tmp_path / "broken")
    (tmp_path / "broken" / "x.png").write_bytes(b"no picture")

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, ("open('ran', 'w')",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    files = {key: Path(asked[key]) for key in ("data", "weights") if key in asked}
    with pytest.raises(FmceError) as raised:
        score_network(Asked(**{"size": 32, **asked, **files}), Path("params.yaml"))
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_watching_passes_over_what_is_no_checkpoint(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    network = models.get_model(NETWORK, weights=None)
    torch.save({"lr": 0.1}, folder / "a-optimizer.pt")
    (folder / "b-text.pt").write_text("hello world")
    (folder / "c-nowhere.pt").symlink_to("nowhere")
    broken = {name: value.clone() for name, value in network.state_dict().items()}
    broken["conv1.0.weight"].fill_(torch.nan)
    torch.save(broken, folder / "d-nan.pt")
    torch.save(network.state_dict(), folder / "e-good.pt")
    for file in folder.iterdir():
        if file.exists():
            os.utime(file, (1e9, 1e9))
    told: list[str] = []
    asked = Asked(network=NETWORK, data=pictures, size=32)
    (found,) = watch_folder(asked, folder, 1, Path("params.yaml"), told.append)
    assert Path(found.network).name == "e-good.pt"
    names = [Path(line.partition(" is passed over: ")[0]).name for line in told]
    assert names == ["a-optimizer.pt", "b-text.pt", "d-nan.pt"]


@pytest.mark.parametrize(
    "words",
    [
        ["--model-uri", "models:/x@champion", "--size", "64"],
        ["--network", NETWORK, "--watch", ".", "--weights", "net.pt"],
    ],
)
def test_options_that_exclude_each_other_are_refused(tmp_path: Path, words: list[str]) -> None:
    assert "leave" in fmce_ops(tmp_path, "score", *words, code=2).stderr


def test_a_folder_that_is_not_there_cannot_be_watched(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        next(watch_folder(Asked(), tmp_path / "nowhere", 1, Path("params.yaml"), print))


def test_the_monitor_logs_to_the_run_that_is_active(tmp_path: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_experiment("my own")
    network = models.get_model(NETWORK, weights=None)
    images = torch.rand(16, 3, 32, 32)
    monitor = MaturityMonitor(images, ["stage2", "conv5"])
    outside = monitor.update(network, 0)
    with mlflow.start_run() as run:
        for epoch in range(3):
            found = monitor.update(network, epoch)
    assert found == outside == score(network, images, ["stage2", "conv5"])
    history = MlflowClient().get_metric_history(run.info.run_id, "maturity/stage2")
    assert [metric.step for metric in history] == [0, 1, 2]


def test_the_monitor_warns_and_lets_the_training_go_on(tmp_path: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_experiment("odd names")
    network = nn.Sequential(OrderedDict({"conv(1)": nn.Conv2d(3, 4, 3), "relu": nn.ReLU()}))
    monitor = MaturityMonitor(torch.rand(16, 3, 8, 8, dtype=torch.float64))
    with mlflow.start_run() as run:
        assert list(monitor.update(network.to(torch.bfloat16), 0)) == ["conv(1)"]
        with torch.no_grad():
            network[0].weight.fill_(torch.nan)
        with pytest.warns(UserWarning, match="no maturity at step 1: .* not finite"):
            assert monitor.update(network, 1) == {}
    assert len(MlflowClient().get_metric_history(run.info.run_id, "maturity/conv_1_")) == 1


def test_lightning_logs_maturity_at_the_end_of_each_epoch(tmp_path: Path) -> None:
    import pytorch_lightning as lightning
    from pytorch_lightning.loggers import CSVLogger

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = models.get_model(NETWORK, weights=None, num_classes=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x)

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.TensorDataset(torch.rand(16, 3, 32, 32), torch.arange(16) % 2)
    logger = CSVLogger(tmp_path)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=logger,
        callbacks=[lightning_callback(MaturityMonitor(data.tensors[0]))],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    task = Task()
    trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=8))
    table = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "maturity/network.conv5" in table
    assert len(table.splitlines()) == 3
