"""``params.yaml``: what is wrong in it is said in one sentence that names the key."""

import math
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from fmce_ops.errors import ParamsError
from fmce_ops.stages.params import Params, load_params, section_values

ROOT = Path(__file__).parents[1]
SHIPPED = [ROOT / "params.yaml", *sorted((ROOT / "params").glob("*.yaml"))]


def load(folder, text):
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return load_params(path)


def complaint(folder, text):
    """The sentence, less the path in front."""
    with pytest.raises(ParamsError) as error:
        load(folder, text)
    message = str(error.value)
    assert message.startswith(f"{folder / 'params.yaml'}")
    assert "\n" not in message
    return message.removeprefix(f"{folder / 'params.yaml'}").removeprefix(": ")


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("trian: {epochs: 3}", "trian", "train"),
        ("train: {epoch: 3}", "train.epoch", "train.epochs"),
        ("markers: {windows: 3}", "markers.windows", "markers.window"),
        ("train: {augment: {pads: 1}}", "train.augment.pads", "train.augment.pad"),
        ("train: {augment: {flipp: true}}", "train.augment.flipp", "train.augment.flip"),
        ("fmce: {batchsize: 3}", "fmce.batchsize", "fmce.batch_size"),
    ],
)
def test_an_unknown_key_anywhere_names_the_nearest_right_one(tmp_path, text, key, nearest):
    assert complaint(tmp_path, text) == f"unknown key {key}; did you mean {nearest}?"


def test_where_nothing_is_near_the_known_keys_are_listed(tmp_path):
    expected = "unknown key train.augment.zzz; the keys here are pad, flip."
    assert complaint(tmp_path, "train: {augment: {zzz: 3}}") == expected
    sections = (
        "data, model, train, markers, features, fmce, posttrain, pathways, study, maturity, report"
    )
    assert sections in complaint(tmp_path, "zzz: 3")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "image_size", 3),
        ("data", "per_class", 0),
        ("data", "validation", 1),
        ("data", "test", -0.1),
        ("data", "seed", -1),
        ("train", "epochs", 0),
        ("train", "points_per_epoch", 0),
        ("train", "batch_size", -1),
        ("posttrain", "batch_size", 2**31),
        ("train", "lr", 0),
        ("train", "lr", math.inf),
        ("train", "lr", math.nan),
        ("train", "weight_decay", -1e-9),
        ("train", "weight_decay", math.inf),
        ("train", "seed", 2**64),
        ("train", "augment", {"pad": -1}),
        ("markers", "phases", 1),
        ("markers", "mu", 0),
        ("markers", "mu", math.inf),
        ("markers", "alpha", 1),
        ("markers", "window", 0),
        ("features", "images_per_shard", 0),
        ("fmce", "test", 0),
        ("fmce", "validation", 1),
        ("fmce", "seed", -1),
        ("study", "images", 15),
        ("posttrain", "margin", -1),
        ("posttrain", "margin", 1e7),
        ("posttrain", "margin", math.nan),
        ("posttrain", "folds", 1),
        ("posttrain", "folds", 11),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(tmp_path, section, key, value):
    message = complaint(tmp_path, yaml.safe_dump({section: {key: value}}))
    assert message.startswith(f"{section}.{key}")
    shown = value["pad"] if isinstance(value, dict) else value
    assert f" is {shown!r}: " in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("data: {dataset: svhn}", "data.dataset"),
        ("model: {backbone: 3}", "model.backbone"),
        ("model: {stem: tiny}", "model.stem"),
        ("posttrain: {alphas: [0.1, 1.0, 0.10000001]}", "posttrain.alphas"),
        ("pathways: {ratios: [0.5, 0.5]}", "pathways.ratios"),
        ("train: {epochs: many}", "train.epochs"),
        ("train: {epochs: 30.5}", "train.epochs"),
        ("train: {epochs: [30]}", "train.epochs"),
        ("train: {lr: fast}", "train.lr"),
        ("train: {optimizer: lion}", "train.optimizer"),
        ("train: {augment: yes}", "train.augment"),
        ("train: {augment: {flip: perhaps}}", "train.augment.flip"),
        ("train: {precision: 8-bit}", "train.precision"),
        ("train: 3", "train"),
        ("train:", "train"),
        ("markers: {unconverged: ignore}", "markers.unconverged"),
        ("features: {compression: gzip}", "features.compression"),
        ("fmce: {split: random}", "fmce.split"),
        ("posttrain: {mode: hard}", "posttrain.mode"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(tmp_path, text, key):
    assert complaint(tmp_path, text).startswith(f"{key} is ")


def test_a_module_by_itself_is_a_list_of_one(tmp_path):
    assert load(tmp_path, "posttrain: {modules: conv5}").posttrain.modules == ("conv5",)


def test_a_number_that_yaml_takes_for_text_is_a_number(tmp_path):
    # YAML 1.1 wants a dot in a number with an exponent; the papers write 1e-4.
    assert load(tmp_path, "markers: {mu: 1e-4}").markers.mu == 0.0001


@pytest.mark.parametrize(("epochs", "points", "phases"), [(4, 1, 5), (2, 2, 5), (9, 1, 10)])
def test_more_phases_than_points_are_refused(tmp_path, epochs, points, phases):
    train = f"train: {{epochs: {epochs}, points_per_epoch: {points}}}"
    message = complaint(tmp_path, f"{train}\nmarkers: {{phases: {phases}}}")
    assert message.startswith(f"markers.phases is {phases} but ")
    assert f"records {epochs * points} points" in message


def test_as_many_phases_as_points_are_allowed(tmp_path):
    text = "train: {epochs: 3, points_per_epoch: 2}\nmarkers: {phases: 6}"
    assert load(tmp_path, text).markers.phases == 6


def test_a_missing_file_tells_how_to_make_one(tmp_path):
    with pytest.raises(ParamsError, match=r"params.yaml does not exist: .*'fmce-ops init'"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["a: b: c", "data: [", "\tdata: {}", "data: {dataset: 'digits}"])
def test_what_is_no_yaml_is_named_with_its_line(tmp_path, text):
    message = complaint(tmp_path, text)
    assert message.startswith(" is not readable YAML (")
    assert "line 1" in message


@pytest.mark.parametrize(
    "text", ["train: {seed: 0x_}", "title: 2024-02-30", "[" * 5000, "{[1]: 2}"]
)
def test_what_yaml_cannot_build_is_no_yaml(tmp_path, text):
    assert complaint(tmp_path, text).startswith(" is not readable YAML (")


def test_a_folder_is_no_yaml(tmp_path):
    with pytest.raises(ParamsError, match="is not readable YAML"):
        load_params(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["train: {epochs: 10}\ntrain: {lr: 0.1}", "train:\n  epochs: 10\n  train: 1\n  epochs: 2"],
)
def test_a_key_that_is_given_twice_is_named_with_its_line(tmp_path, text):
    message = complaint(tmp_path, text)
    assert "is given twice" in message and "line" in message


@pytest.mark.parametrize(
    "text",
    [
        *("train: {epochs: true}", "train: {lr: yes}", "train: {seed: off}"),
        *("data: {per_class: true}", "posttrain: {alphas: [0.5, true]}", "posttrain: {folds: no}"),
    ],
)
def test_yes_is_no_number(tmp_path, text):
    assert "give a number" in complaint(tmp_path, text)


def test_what_is_no_text_is_no_yaml(tmp_path):
    (tmp_path / "params.yaml").write_bytes(b"data: \xff\xfe")
    with pytest.raises(ParamsError, match="is not readable YAML"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["[1, 2]", "5", "digits"])
def test_a_file_without_sections_is_refused(tmp_path, text):
    assert "is no section" in complaint(tmp_path, text)


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}"])
def test_an_empty_file_means_the_defaults(tmp_path, text):
    assert load(tmp_path, text) == Params()


def test_parameters_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Params().train.epochs = 3


def test_sections_become_plain_values_for_keys_and_records():
    values = section_values(Params(), "markers", "features")
    assert set(values) == {"markers", "features"}
    assert values["markers"]["mu"] == 0.0001
    assert yaml.safe_load(yaml.safe_dump(values)) == values


def keys(values):
    """The dotted names of all leaves."""
    if not isinstance(values, dict):
        return {()}
    return {(key, *rest) for key, value in values.items() for rest in keys(value)}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_file_loads_and_says_everything(path):
    params = load_params(path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    expected = Params().model_dump()
    expected["maturity"]["runs"] = written["maturity"]["runs"]  # names of the user's own
    assert keys(written) == keys(expected)
    for section, values in params.model_dump(mode="json").items():
        for key, value in values.items():
            given = written[section][key]
            assert (float(given) if isinstance(value, float) else given) == value


def test_the_template_of_a_new_project_is_the_shipped_file():
    template = files("fmce_ops") / "templates" / "params.yaml"
    assert template.read_text(encoding="utf-8") == SHIPPED[0].read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ({"b": {"train": {"sed": 1}}}, "maturity.runs.b: unknown key train.sed; did you mean"),
        ({"b": {"fmce": {}}}, "a run changes data, model, train, markers, not fmce"),
        ({"b": {"train": {"epochs": 2}}}, "maturity.runs.b: markers.phases is 10"),
        ({"b-c": {}}, "maturity.runs.b-c"),
        ({"b": 4}, "maturity.runs.b is 4"),
    ],
)
def test_a_run_of_the_study_is_checked_at_the_door(
    tmp_path: Path, runs: object, sentence: str
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"maturity": {"runs": runs}}))
    with pytest.raises(ParamsError) as raised:
        load_params(path)
    assert sentence in str(raised.value)
    assert str(raised.value).count("\n") == 0


def test_a_run_of_the_study_is_laid_over_the_parameters() -> None:
    runs = {"b": {"train": {"augment": {"pad": 2}}, "model": {"backbone": "resnet18"}}}
    params = Params.model_validate({"train": {"lr": 0.5}, "maturity": {"runs": runs}})
    own = params.of_run("b")
    assert (own.train.lr, own.train.augment.pad, own.train.augment.flip) == (0.5, 2, False)
    assert own.model.backbone == "resnet18" and own.maturity.runs == {}
