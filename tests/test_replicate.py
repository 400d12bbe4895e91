"""Cells of the paper's tables: in slices and in parts, with nothing but the lower floors."""

import importlib.util
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from fmce_ops.errors import ShardError
from PIL import Image
from sklearn.datasets import load_digits

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "replicate.py"
CELL = "cifar10-shufflenet"
PHASES = 4  # of ten, two may fall on one point of so short a training
ABSENT = (
    *("mlflow", "dvc", "typer", "pydantic", "yaml", "sklearn", "captum", "pandas", "matplotlib"),
    *("scipy", "torchmetrics", "safetensors", "hdf5plugin"),
)
SMALL = {"mu": 1e-6, "points_per_epoch": 1, "size": 16, "images": 200, "fmce_epochs": 2, "lr": 2e-3}
BACKBONE = "shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, laid out as the images of CIFAR-10."""
    root = tmp_path_factory.mktemp("data")
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "test" if number % 4 == 0 else "train"
        folder = root / "cifar10" / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with a cell that takes seconds."""
    spec = importlib.util.spec_from_file_location("replicate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "replicate", module)  # where dataclasses look it up
    spec.loader.exec_module(module)
    module.RESULTS = tmp_path / "results"
    module.PHASES = PHASES
    module.SCALES["cpu"] = module.replace(module.SCALES["cpu"], **SMALL)
    module.CELLS[CELL] = module.replace(module.CELLS[CELL], backbone=BACKBONE)
    return module


def replicate(script: ModuleType, state: Path, data: Path, *options: str) -> bool:
    """Give the command once; whether it ended."""
    try:
        script.main([CELL, str(state), "--data", str(data), "--no-compile", *options])
    except SystemExit as end:
        assert end.code == script.NOT_YET
        return False
    return True


def found(script: ModuleType, asked: str = "") -> dict:
    """The result, less what is of the clock."""
    path = script.RESULTS / f"{CELL}-cpu-0{asked}.json"
    whole = json.loads(path.read_text())
    path.unlink()
    assert set(whole.pop("seconds")) >= {"prepare", "train", "features", "fmce, split by image"}
    assert whole.pop("finished")
    return whole


def test_what_is_asked_for_beside_the_scale_names_another_result(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(*options: str) -> str:
        return script.name_of(script.parsed([CELL, "state", *options]))

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert name() == name("--points", "1") == f"{CELL}-cpu-0"  # as the scale has it
    assert name("--seed", "3", "--points", "4") == f"{CELL}-cpu-3-points4"
    assert name("--compile", "--disk", "2") == f"{CELL}-cpu-0-compile"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert name() == f"{CELL}-cpu-0-compile"
    assert name("--no-compile") == f"{CELL}-cpu-0"


@pytest.mark.parametrize(("minutes", "most"), [("0.02", 60), ("0.000001", 24 + PHASES + 2 * 2)])
def test_slices_end_as_one_piece(
    tmp_path: Path, script: ModuleType, data: Path, minutes: str, most: int
) -> None:
    assert replicate(script, tmp_path / "whole", data)
    assert list((tmp_path / "whole").iterdir()) == []
    whole = found(script)
    assert np.sum(whole["fmce"]["image"]["confusion"]) == 50 * PHASES  # a quarter of 200 images
    slices = 0
    while not replicate(script, tmp_path / "sliced", data, "--minutes", minutes):
        slices += 1
        assert slices <= most  # at least one step each: points, shards, epochs of FMCE-Net
    assert slices >= 2
    assert found(script) == whole


def test_maps_larger_than_the_disk_are_judged_in_parts(
    tmp_path: Path, script: ModuleType, data: Path
) -> None:
    all_maps = 200 * PHASES * 2 * 1024 / 1e9
    assert replicate(script, tmp_path / "state", data, "--disk", str(all_maps / 1.5))
    result = found(script, "-parts2")
    assert result["parts"] == 2
    for split in ("image", "paper"):
        confusion = np.array(result["fmce"][split]["confusion"])
        assert (confusion.sum(1) == confusion.sum(1)[0]).all()  # equal counts for each score
        assert confusion.sum() == pytest.approx(50 * PHASES, abs=20)


def complaint(script: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says on standard error before it exits with 2."""
    with pytest.raises(SystemExit) as end:
        script.main([str(argument) for argument in arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_state_that_is_damaged_is_named_with_what_to_do(
    tmp_path: Path, script: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not replicate(script, tmp_path, data, "--minutes", "0.000001")
    folder = tmp_path / f"{CELL}-cpu-0"
    in_cell = folder, "start the cell again"
    for name, (removed, again) in {
        "seconds.json": in_cell,
        "parts.json": in_cell,
        "origin.json": in_cell,
        "train/state.pt": (folder / "train", "run the same command again"),
        "trained.json": in_cell,
    }.items():
        path = folder / name
        whole = path.read_bytes() if path.exists() else b'{"history": []}\n'
        cuts = [b"", whole[: len(whole) // 2], whole[:-1]]
        if name == "train/state.pt":
            cuts.append(whole[:5000])  # torch seeks a place before the start
        for cut in cuts:
            path.write_bytes(cut)
            said = complaint(script, capsys, CELL, tmp_path, "--data", data)
            assert said == f"error: {path} is damaged: remove the folder {removed} and {again}.\n"
        path.write_bytes(whole)


ROW = {"point": 1, "epoch": 1.0, "train_loss": 2.0, "train_accuracy": 0.5, "val_loss": 2.0}
ROW |= {"val_accuracy": 0.5, "lr": 1e-3}
OF_ANOTHER_SHAPE = {
    "seconds.json": ([1, 2], {"train": "x"}, {"train": None}, {"train": float("nan")}),
    "parts.json": ("a", 0, -3, {}, True, 1.5, 67, 10**400),  # a 67th part would have two images
    "origin.json": ([], {}, {"settings": 1, "on": []}, {"settings": {}, "on": [["x"]]}),
    "trained.json": (
        *({}, [], None, {"history": [], "top1": 0.5}, {"history": [[1]] * 24, "top1": 0.5}),
        {"history": [ROW] * 23, "top1": 0.5},
        {"history": [ROW] * 24, "top1": "x"},
        {"history": [{**ROW, "train_loss": "x"}] * 24, "top1": 0.5},
        {"history": [{**ROW, "loss": 1.0}] * 24, "top1": 0.5},
    ),
}
ONES = np.ones((PHASES, PHASES), int)
JUDGED_OF_ANOTHER_SHAPE = {
    "fmce-image/confusion-0.json": (
        *("x", {}, [[1, 2], [3]], ONES[1:].tolist(), (ONES / 2).tolist()),
        *((0 * ONES).tolist(), (ONES - 2 * np.eye(PHASES, dtype=int)).tolist(), [[10**400]]),
    ),
    "fmce-paper/part-0/done.json": ([], "x", {}, {"epoch": 1, "val_accuracy": 0.5}),
}


def refuses_shapes(
    script: ModuleType,
    state: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    shapes: dict[str, tuple],
) -> None:
    """Each file with each of its contents is named, with what to do; it is then as it was."""
    folder = state / f"{CELL}-cpu-0"
    again = f"remove the folder {folder} and start the cell again"
    for name, contents in shapes.items():
        path = folder / name
        before = path.read_text() if path.exists() else None
        for content in contents:
            path.write_text(json.dumps(content) + "\n")
            said = complaint(script, capsys, CELL, state, "--data", data)
            assert said == f"error: {path} is damaged: {again}.\n"
        path.unlink() if before is None else path.write_text(before)


def test_json_of_another_shape_is_named_with_what_to_do(
    tmp_path: Path, script: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not replicate(script, tmp_path, data, "--minutes", "0.000001")
    refuses_shapes(script, tmp_path, data, capsys, OF_ANOTHER_SHAPE)


def test_a_damaged_file_of_any_step_says_to_start_the_cell_again(
    tmp_path: Path,
    script: ModuleType,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kept(*_: object) -> None:
        raise script.SliceOverError

    monkeypatch.setattr(script, "result", kept)  # all is done, and nothing is removed yet
    script.SCALES["cpu"] = script.replace(script.SCALES["cpu"], fmce_epochs=1)
    assert not replicate(script, tmp_path, data)
    refuses_shapes(script, tmp_path, data, capsys, JUDGED_OF_ANOTHER_SHAPE)

    folder = tmp_path / f"{CELL}-cpu-0"

    def refuses(path: Path) -> None:
        said = complaint(script, capsys, CELL, tmp_path, "--data", data)
        assert str(path) in said
        assert said.endswith(f": remove the folder {folder} and start the cell again.\n")
        assert said.count("\n") == said.count(": remove") == 1
        assert " again: " not in said  # no advice of the library's is left

    (folder / "fmce-image" / "confusion-0.json").unlink()  # maps are opened to be judged again
    maps = folder / "maps-0"
    best = folder / "fmce-image" / "part-0" / "best.safetensors"
    shard = maps / "phase-01-part-0000.h5"
    for path in (folder / "images.h5", best, shard, maps / "manifest.json"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        refuses(path)
        path.write_bytes(whole)
    shard.unlink()
    refuses(shard)
    shutil.rmtree(maps)
    checkpoint = min(folder.glob("train/point-*"))
    checkpoint.unlink()
    refuses(checkpoint)


def test_an_error_that_is_not_of_the_folder_keeps_its_advice(
    tmp_path: Path, script: ModuleType
) -> None:
    said = "Phase 1, image 3: the feature map is not finite: lower the learning rate."
    with pytest.raises(ShardError) as error, script.restartable(tmp_path):
        raise ShardError(said)
    assert str(error.value) == said


def test_a_cell_goes_on_with_its_own_settings_alone(
    tmp_path: Path, script: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not replicate(script, tmp_path, data, "--minutes", "0.000001")
    script.SCALES["cpu"] = script.replace(script.SCALES["cpu"], lr=1e-3)
    said = complaint(script, capsys, CELL, tmp_path, "--data", data)
    assert "was begun with other settings: give those again, or another folder" in said


def test_too_many_points_are_refused_and_cost_nothing(
    tmp_path: Path, script: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main([CELL, str(tmp_path), "--data", str(data), "--points", "100"])
    assert "error: --points is 100, but an epoch of" in capsys.readouterr().err
    replicate(script, tmp_path, data, "--minutes", "0.0001")  # is not another setting


def test_markers_that_meet_are_told_apart_by_more_points(
    tmp_path: Path,
    script: ModuleType,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(script, "PHASES", 6)  # of a fall that is over in as many points
    changed = {"epochs": 6, "batch_size": 16}
    script.SCALES["cpu"] = script.replace(script.SCALES["cpu"], **changed)
    said = complaint(script, capsys, CELL, tmp_path, "--data", data)
    assert "fall on the same point" in said
    assert said.endswith("and start the cell again with --points 2 or more.\n")
    shutil.rmtree(tmp_path / f"{CELL}-cpu-0")
    assert replicate(script, tmp_path, data, "--points", "6")
    assert found(script, "-points6")["setting"]["points_per_epoch"] == 6


def test_the_result_names_every_machine_and_commit(
    tmp_path: Path, script: ModuleType, data: Path
) -> None:
    assert not replicate(script, tmp_path, data, "--minutes", "0.000001")
    origin = tmp_path / f"{CELL}-cpu-0" / "origin.json"
    before = json.loads(origin.read_text())
    origin.write_text(json.dumps({**before, "on": [["another machine", "abc"]]}) + "\n")
    assert replicate(script, tmp_path, data)
    result = found(script)
    assert result["hardware"] == f"another machine; {before['on'][0][0]}"
    assert result["commit"] == f"abc; {before['on'][0][1]}"


def test_what_cannot_be_rendered_is_named(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    script.RESULTS = tmp_path / "benchmarks" / "results"
    page = tmp_path / "docs" / "results.md"
    broken = script.RESULTS / "x.json"
    for folder in (page.parent, script.RESULTS):
        folder.mkdir(parents=True)
    for text, content, wrong in (
        ("no marks", "{}", page),
        (f"{script.BEGIN}\n", "{}", page),
        (f"{script.BEGIN}\n{script.END}", "{", broken),
        (f"{script.BEGIN}\n{script.END}", '{"cell": "unknown"}', broken),
    ):
        page.write_text(text)
        broken.write_text(content)
        assert complaint(script, capsys, "--render").startswith(f"error: {wrong} ")
        assert page.read_text() == text


def test_two_processes_do_not_share_a_cell(
    tmp_path: Path, script: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / f"{CELL}-cpu-0"
    processes = multiprocessing.get_context("fork")  # which need not import torch again
    holding = processes.Event()

    def hold() -> None:
        with script.held(folder):
            holding.set()
            time.sleep(60)

    first = processes.Process(target=hold)
    first.start()
    try:
        assert holding.wait(30)
        said = complaint(script, capsys, CELL, tmp_path, "--data", data)
        assert said == (
            f"error: {folder} is in use by another process: "
            "wait until that has ended, or choose another folder for the state.\n"
        )
    finally:
        first.kill()
        first.join()
    with script.held(folder):  # the killed process left nothing that keeps others out
        pass


def test_an_interrupt_is_one_line_and_keeps_the_state(
    tmp_path: Path,
    script: ModuleType,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(script.Slice, "row", interrupted)
        script.main([CELL, str(tmp_path), "--data", str(data)])
    assert end.value.code == 130
    assert capsys.readouterr().err == (
        "stopped; what was done is kept: give the same command again\n"
    )
    assert not replicate(script, tmp_path, data, "--minutes", "0.000001")
    train = tmp_path / f"{CELL}-cpu-0" / "train"
    assert len(list(train.glob("point-*"))) == 2  # one before the interrupt, one after it


@pytest.mark.parametrize(
    ("cell", "missing"),
    [
        ("mnist-shufflenet", "MNIST/raw"),
        ("cifar10-resnet50", "cifar-10-batches-py"),
        ("mini-imagenet-resnet50", "mini-imagenet/train"),
    ],
)
def test_mistyped_data_are_named_and_leave_nothing_behind(
    tmp_path: Path,
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    cell: str,
    missing: str,
) -> None:
    data = tmp_path / "no-data"
    said = complaint(script, capsys, cell, tmp_path / "state", "--data", data)
    assert said == (
        f"error: {data / missing} does not exist: give with --data the folder that holds "
        "MNIST/raw, cifar-10-batches-py or cifar10/{train,test}, and mini-imagenet/{train,val}.\n"
    )
    assert list(tmp_path.iterdir()) == []
    (data / missing).mkdir(parents=True)
    assert script.source(script.CELLS[cell].dataset, data)[1] in (data, data / "mini-imagenet")


def test_what_a_user_can_cause_is_one_sentence(
    tmp_path: Path, script: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    said = complaint(script, capsys, CELL, tmp_path / "file", "--data", data)
    folder = tmp_path / "file" / f"{CELL}-cpu-0"
    assert said == (
        f"error: {folder} cannot be made a folder (not a directory): "
        "choose another folder for the state.\n"
    )
    empty = tmp_path / "empty"
    said = complaint(script, capsys, "mini-imagenet-resnet50", tmp_path, "--data", empty)
    assert said.startswith(f"error: {empty / 'mini-imagenet' / 'train'} does not exist: ")
    one_image = PHASES * 2 * 1024 / 1e9
    for images in (0.5, 2.5):
        said = complaint(
            script, capsys, CELL, tmp_path, "--data", data, "--disk", images * one_image
        )
        assert "a part with fewer than 3 images: give more with --disk." in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--minutes", value) for value in ("nan", "0", "-1", "soon")),
        *(("--disk", value) for value in ("nan", "0", "-1", "inf")),
        *(("--seed", value) for value in ("-1", "0.5", str(2**32))),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(
    tmp_path: Path,
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
) -> None:
    said = complaint(script, capsys, CELL, tmp_path / "state", f"{option}={value}")
    assert f"error: argument {option}: " in said
    assert not (tmp_path / "state").exists()


def test_the_page_shows_published_figures_beside_ours(tmp_path: Path, script: ModuleType) -> None:
    figures = dict.fromkeys(("accuracy", "precision", "recall", "f1", "within_one"), 0.95)
    figures["confusion"] = [[8, 2, 0], [0, 7, 3], [0, 3, 7]]  # six of eight between the last two
    result = {
        "cell": CELL,
        "scale": "cpu",
        "setting": {"seed": 3, "size": 64, "points_per_epoch": 4},
        "compile": True,
        "epochs": 24,
        "markers": {"points": list(range(1, 11)), "mu": 0.01, "converged": False},
        "top1": 0.5,
        "fmce": {"image": figures, "paper": figures},
        "seconds": {"train": 60.0},
        "images": {"train": 2000, "test": 351},
        "map": [1024, 2, 2],
        "parts": 1,
        "hardware": "a machine",
        "commit": "abc",
    }
    lines = script.tables([result]).splitlines()
    of_cell = [line for line in lines if line.startswith(f"| {CELL} ")]
    assert [line.split(" | ")[1] for line in of_cell] == [
        *("published", "cpu, 3"),  # table I
        *("published", "cpu, 3", "cpu, 3"),  # table II, by image and by map
        "cpu, 3",
    ]
    assert script.label(result | {"parts": 2}).endswith(", 2 parts")
    assert "(0.01)" in of_cell[1]  # not converged
    assert "10], 4 points an epoch | 0.5000" in of_cell[1]  # the scale has another number
    assert of_cell[-1].endswith("| a machine, torch.compile | abc |")
    assert of_cell[3].endswith("| +0.0300 | 0.75 |")  # .95 over the published .92


BARE = f"""
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys({ABSENT}))
folder, results, threads, *arguments = sys.argv[1:]
sys.path.insert(0, folder)
import replicate
replicate.torch.set_num_threads(int(threads))
replicate.RESULTS, replicate.PHASES = Path(results), {PHASES}
replicate.SCALES["cpu"] = replicate.replace(replicate.SCALES["cpu"], **{SMALL})
replicate.CELLS["{CELL}"] = replicate.replace(replicate.CELLS["{CELL}"], backbone="{BACKBONE}")
replicate.main(["{CELL}", *arguments])
"""


def test_a_bare_machine_is_enough(tmp_path: Path, script: ModuleType, data: Path) -> None:
    settings = [SCRIPT.parent, script.RESULTS, script.torch.get_num_threads()]
    arguments = map(str, [*settings, tmp_path / "bare", "--data", data, "--no-compile"])
    command = [sys.executable, "-c", BARE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    bare = found(script)
    assert replicate(script, tmp_path / "here", data)
    assert bare == found(script)
