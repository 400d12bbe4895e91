"""Weights on disk: the same bytes every time, and damage is noticed."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from fmce_ops.errors import ModelError
from fmce_ops.files import file_digest
from fmce_ops.models import build, library, load_into, load_weights, plain, save_weights, weights
from fmce_ops.models.weights import load_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

WORDS = {"epoch": "3", "phase": "1", "dataset": "digits", "note": '\u00e9\n"'}


@pytest.fixture(params=[library, plain], ids=["library", "plain"], autouse=True)
def means(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library, and as on a machine that has none."""
    monkeypatch.setattr(weights, "read", request.param.read)
    monkeypatch.setattr(weights, "write", request.param.write)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_weights(tmp_path / "net.safetensors", nn.Linear(4, 3).state_dict(), WORDS)
    return tmp_path / "net.safetensors"


def test_a_classifier_comes_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    first, second = (build("shufflenet_v2_x0_5", 10, stem="small", in_size=32) for _ in range(2))
    first = first.to(memory_format=torch.channels_last)
    first(torch.rand(4, 3, 32, 32))  # moves the batch norm statistics
    save_weights(path, first.state_dict(), WORDS)
    assert load_into(second, path) == WORDS
    state, words = load_weights(path)
    assert words == WORDS
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
        assert torch.equal(value, state[name]) and value.dtype == state[name].dtype


def test_tied_weights_are_stored_under_both_names(tmp_path: Path) -> None:
    weight = torch.rand(3)
    save_weights(tmp_path / "tied.safetensors", {"a": weight, "b": weight}, {})
    state, _ = load_weights(tmp_path / "tied.safetensors")
    assert torch.equal(state["a"], weight) and torch.equal(state["b"], weight)


def test_the_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    call = (
        "import sys, torch; from pathlib import Path; from fmce_ops.models import save_weights; "
        "save_weights(Path(sys.argv[1]), {'b': torch.ones(2), 'a': torch.zeros(3)}, "
        "{k: k for k in 'hgfedcba'})"
    )
    subprocess.run([sys.executable, "-c", call, str(tmp_path / "there")], check=True)
    state = {"a": torch.zeros(3), "b": torch.ones(2)}
    save_weights(tmp_path / "here", state, {key: key for key in "abcdefgh"})
    assert file_digest(tmp_path / "here") == file_digest(tmp_path / "there")


def test_a_file_is_the_same_by_the_library_and_without_it(tmp_path: Path) -> None:
    names = ("int64", "float64", "float32", "int32", "bfloat16", "float16", "int16", "int8")
    tensors = {
        f"{shape} of {name}": torch.randint(0, 100, shape).to(getattr(torch, name))
        for name in (*names, "uint8", "bool")
        for shape in [(3, 2), (), (0,), (2, 0, 3)]
    }
    words = {"metadata": '{"\u00e9": "\u2028\x01\x7f/\\\\\\""}'}
    written = library.write(tensors, words)
    assert plain.write(tensors, words) == written
    (tmp_path / "file").write_bytes(written)
    for means in (library, plain):
        state, found = means.read(tmp_path / "file")
        assert found == words
        assert state.keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(state[name], value) and state[name].dtype == value.dtype


def test_a_type_that_cannot_be_written_is_not_left_out() -> None:
    with pytest.raises(ValueError, match="complex64"):
        plain.write({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex64)}, {})


@settings(deadline=None)
@given(st.data())
def test_whatever_the_bytes_are_a_file_is_read_or_refused(data: st.DataObject) -> None:
    content = bytearray(plain.write({"a": torch.ones(2), "b": torch.ones(3, 2)}, {}))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    with TemporaryDirectory() as folder, suppress(ValueError):
        path = Path(folder) / "file"
        path.write_bytes(content)
        plain.read(path)


EIGHT = '{"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}'
HEADERS = {
    "no JSON": "{",
    "no dictionary": "[]",
    "nested without end": "[" * 100_000,
    "no entry": '{"a": 1}',
    "no place": '{"a": {"dtype": "U8", "shape": [8]}}',
    "unknown type": '{"a": {"dtype": "X", "shape": [8], "data_offsets": [0, 8]}}',
    "another size": '{"a": {"dtype": "U8", "shape": [7], "data_offsets": [0, 8]}}',
    "less than nothing": '{"a": {"dtype": "U8", "shape": [-2, -4], "data_offsets": [0, 8]}}',
    "a gap": '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}',
    "beyond the end": '{"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}',
    "not to the end": '{"a": {"dtype": "U8", "shape": [7], "data_offsets": [0, 7]}}',
    "words that are a number": '{"__metadata__": 5, "a": ' + EIGHT + "}",
    "a word that is a number": '{"__metadata__": {"metadata": 5}, "a": ' + EIGHT + "}",
    "beyond all numbers": '{"a": {"dtype": "U8", "data_offsets": [0, 0], "shape": [0, 1'
    + "0" * 400
    + ']}, "b": '
    + EIGHT
    + "}",
    "no numbers": '{"a": {"dtype": "U8", "shape": ["8"], "data_offsets": [0, 8]}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_does_not_tell_of_the_bytes_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(ModelError, match=r"odd\.safetensors is missing or is not a whole"):
        load_weights(path)


@pytest.mark.parametrize("length", [0, 4, 60, -1])
def test_a_truncated_file_is_refused(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"net\.safetensors is missing or is not a whole"):
        load_weights(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent is missing"):
        load_into(nn.Linear(1, 1), tmp_path / "absent")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(4, 2), r"2 of its weights differ \('weight' is 3x4 in the file and 2x4 in the"),
        (
            nn.Linear(4, 3, bias=False),
            r"1 of its weights differ \('bias' is 3 in the file and absent",
        ),
        (nn.Sequential(nn.Linear(4, 3)), r"4 of its weights differ"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    path: Path, module: nn.Module, message: str
) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        load_into(module, path)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("name", ["embedding", "module.embedding"])
def test_one_tensor_of_another_name_is_refused(tmp_path: Path, name: str) -> None:
    torch.save({name: torch.zeros(3)}, tmp_path / "one.pt")
    with pytest.raises(ModelError):
        load_checkpoint(nn.Sequential(nn.Linear(2, 2)), tmp_path / "one.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.to_sparse(),
        lambda weight: weight.to("meta"),
        lambda weight: weight.tolist(),
    ],
)
def test_weights_that_are_no_plain_numbers_are_refused(tmp_path: Path, change) -> None:
    state = {"0.weight": change(torch.ones(2, 2)), "0.bias": torch.ones(2)}
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ModelError, match=r"odd\.pt .*save the network's state_dict"):
        load_checkpoint(nn.Sequential(nn.Linear(2, 2)), tmp_path / "odd.pt")
