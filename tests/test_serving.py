"""The served model and the UI: real server processes on the loopback, stopped by their id."""

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from tests.project import environment, free_port

SHAPE = (1024, 2, 2)


@contextmanager
def server(folder: Path, *words: str, ready: str) -> Iterator[str]:
    """Start a server on a free port, wait until it answers, stop it."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    variables = {**environment(), "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    process = subprocess.Popen(
        [*words, "-p", str(port)],
        cwd=folder,
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while status(address + ready) != 200:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):  # a worker of MLflow's may not hear it
            process.wait(timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def status(address: str) -> int:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return int(answer.status)
    except OSError:
        return 0


@pytest.fixture(scope="module")
def served(project: Path) -> Iterator[str]:
    words = ["mlflow", "models", "serve", "-m", "models:/fmce-net@champion"]
    with server(project, *words, "--env-manager", "local", ready="/ping") as address:
        yield address + "/invocations"


def ask(address: str, body: str) -> tuple[int, Any]:
    request = urllib.request.Request(
        address, body.encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, strict_json(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, strict_json(error.read())


def strict_json(text: bytes) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def inputs(array: np.ndarray) -> str:
    return json.dumps({"inputs": array.tolist()})


@pytest.mark.parametrize("count", [1, 2, 100])
def test_each_map_gets_k_probabilities(served: str, count: int) -> None:
    maps = np.random.default_rng(0).random((count, *SHAPE)).astype(np.float32)
    code, answer = ask(served, inputs(maps))
    predictions = np.array(answer["predictions"])
    assert code == 200
    assert predictions.shape == (count, 3)
    np.testing.assert_allclose(predictions.sum(1), 1)


def test_answers_are_those_of_the_network(project: Path, served: str) -> None:
    import torch
    from fmce_ops.shards import ShardStore
    from fmce_ops.tracking.registry import load_network

    mlflow.set_tracking_uri(f"sqlite:///{project / 'mlflow.db'}")
    local = mlflow.artifacts.download_artifacts("models:/fmce-net@champion")
    (description,) = Path(local).rglob("network.json")
    _, network = load_network(description.parent)
    with ShardStore.open(project / "data/fmcs") as store:
        maps = store.batch([1, 2, 3], [0, 1, 2]).astype(np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(maps)).double().softmax(1).numpy()
    _, answer = ask(served, inputs(maps))
    np.testing.assert_allclose(answer["predictions"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        inputs(np.zeros((1, 7, 2, 2))),
        inputs(np.zeros(SHAPE)),
        inputs(np.full((1, *SHAPE), np.nan)),
        inputs(np.full((1, *SHAPE), np.inf)),
        inputs(np.full((1, *SHAPE), 3e38)),
        '{"inputs": []}',
        '{"inputs": null}',
        '{"inputs": [[1, 2], [3]]}',
        '{"inputs": "maps"}',
        '{"maps": 1}',
        "[1, 2]",
        "not json",
        "",
    ],
)
def test_bad_input_is_refused_with_a_sentence_and_the_server_goes_on(
    served: str, body: str
) -> None:
    code, answer = ask(served, body)
    assert 400 <= code < 500
    assert answer["message"]
    good = ask(served, inputs(np.zeros((1, *SHAPE))))
    assert good[0] == 200


def test_the_posttrained_network_takes_images_and_answers_with_classes(project: Path) -> None:
    from fmce_ops.data import Images

    with Images.open(project / "data/images.h5") as store:
        images, labels = store.load("test")
    words = ["mlflow", "models", "serve", "-m", "models:/fmce-posttrained@champion"]
    with server(project, *words, "--env-manager", "local", ready="/ping") as address:
        code, answer = ask(address + "/invocations", inputs(images.numpy()))
    predictions = np.array(answer["predictions"])
    assert code == 200
    np.testing.assert_allclose(predictions.sum(1), 1)
    facts = json.loads((project / "results/posttrain.json").read_text())
    right = (predictions.argmax(1) == labels.numpy()).mean()
    assert right == pytest.approx(facts["test_accuracy"])


def test_gated_networks_answer_with_classes_open_gates_and_an_alarm(project: Path) -> None:
    words = ["mlflow", "models", "serve", "-m", "models:/fmce-pathways@champion"]
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8)).astype(np.float32)
    with server(project, *words, "--env-manager", "local", ready="/ping") as address:
        code, answer = ask(address + "/invocations", inputs(images))
        refused, _ = ask(address + "/invocations", inputs(images[:, :, :5]))
    assert (code, refused) == (200, 400)
    found = {name: np.array(values) for name, values in answer["predictions"].items()}
    assert set(found) == {"probabilities", "open_gates", "adversarial"}
    np.testing.assert_allclose(found["probabilities"].sum(1), 1)
    for name in ("open_gates", "adversarial"):
        assert found[name].shape == (3,)
        assert ((found[name] >= 0) & (found[name] <= 1)).all()


def test_a_judge_of_maturity_scores_maps_of_any_shape(project: Path) -> None:
    words = ["mlflow", "models", "serve", "-m", "models:/fmce-maturity@champion"]
    maps = np.random.default_rng(0).random((3, 6, 5, 5)).astype(np.float32)
    with server(project, *words, "--env-manager", "local", ready="/ping") as address:
        address += "/invocations"
        code, answer = ask(address, inputs(maps))
        other = ask(address, inputs(np.zeros((1, 50, 2, 2))))
        many = ask(address, inputs(np.random.default_rng(1).random((5000, 2, 1, 1))))
        few = ask(address, inputs(np.random.default_rng(2).random((8, 6, 5, 5))))
        early = ask(address, json.dumps({"inputs": maps.tolist(), "params": {"depth": 0.0}}))
        described = json.dumps({"inputs": read(maps), "params": {"input": "descriptors"}})
        same = ask(address, described)
        bad = [
            ask(address, inputs(maps[0])),
            ask(address, inputs(np.full((1, 2, 3, 3), np.nan))),
            ask(address, inputs(np.zeros((0, 2, 3, 3)))),
            ask(address, json.dumps({"inputs": maps.tolist(), "params": {"depth": 2.0}})),
            ask(address, json.dumps({"inputs": maps.tolist(), "params": {"input": "x"}})),
            ask(address, json.dumps({"inputs": maps.tolist(), "params": {"input": "descriptors"}})),
        ]
        good = ask(address, inputs(maps))
    assert [code, *(found[0] for found in (other, many, few, early, same, good))] == [200] * 7
    assert [len(many[1]["predictions"][name]) for name in ("score", "together_score")] == [5000, 1]
    alone, together = (few[1]["predictions"][name] for name in ("score", "together_score"))
    assert together == [pytest.approx(np.mean(alone))]
    assert all(400 <= found[0] < 500 and found[1]["message"] for found in bad)
    found = {name: np.array(values) for name, values in answer["predictions"].items()}
    assert {name: len(values) for name, values in found.items()} == {
        **dict.fromkeys(("score", "low", "high"), 3),
        **{f"together_{name}": 1 for name in ("score", "low", "high")},
    }
    assert ((found["low"] <= found["score"]) & (found["score"] <= found["high"])).all()
    np.testing.assert_allclose(same[1]["predictions"]["score"], found["score"], atol=1e-4)


def read(maps: np.ndarray) -> list[list[list[list[float]]]]:
    import torch
    from fmce_ops.maturity import describe_each

    rows: list[list[list[list[float]]]] = describe_each(torch.from_numpy(maps))[
        :, :, None, None
    ].tolist()
    return rows


def test_bare_mlflow_ui_shows_the_runs(project: Path) -> None:
    with server(project, "mlflow", "ui", ready="/health") as address:
        body = json.dumps({"max_results": 10}).encode()
        request = urllib.request.Request(
            address + "/api/2.0/mlflow/experiments/search",
            body,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            found = [e["name"] for e in json.load(answer)["experiments"]]
    assert "fmce-ops" in found
