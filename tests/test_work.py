"""Work folders outlive a kill, serve one process at a time, and go when DVC has the outputs."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from fmce_ops.errors import DiskError, ModelError, ParamsError
from fmce_ops.files import file_digest
from fmce_ops.stages.work import digest, open_work, publish, recorded_digests, vouched

KEY = {"params": {"lr": 0.1}, "inputs": {"images.h5": "ab12"}}


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def leave(project, stage="train", key=KEY, *, outputs=None):
    """Open a work folder, put something into it, finish it if there are ``outputs``, and leave."""
    with open_work(project, stage, key) as work:
        (work.path / "state").write_text("half")
        if outputs is not None:
            work.finish(outputs)
    return work.path


def record(outputs):
    """Write ``dvc.lock`` as DVC does once a stage has ended."""
    entries = [
        {"path": path, "hash": "md5", "md5": md5, "size": 1} for path, md5 in outputs.items()
    ]
    stage = {"cmd": "fmce-ops train", "outs": entries}
    lock = {"schema": "2.0", "stages": {"train": stage, "none": {"cmd": "true"}}}
    Path("dvc.lock").write_text(yaml.safe_dump(lock), encoding="utf-8")


def test_the_same_key_finds_its_folder_again(project):
    path = leave(project)
    with open_work(project, "train", dict(reversed(KEY.items()))) as work:
        assert work.path == path
        assert (path / "state").read_text() == "half"
        assert json.loads((path / "key.json").read_text()) == KEY


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\x00"])
@pytest.mark.parametrize("name", ["run-key.json", "finished.json"])
def test_damage_in_a_work_folder_says_what_to_remove(project, name, text):
    path = leave(project)
    (path / name).write_text(text)
    with (
        pytest.raises(DiskError, match=rf"{name} is damaged .*: remove .*train-"),
        open_work(project, "train", KEY) as work,
    ):
        assert work.run_key()


def test_the_key_of_the_run_of_a_work_folder_is_remembered(project):
    with open_work(project, "train", KEY) as work:
        key = work.run_key()
    with open_work(project, "train", KEY) as work:
        assert work.run_key() == key
    with open_work(project, "train", {**KEY, "version": "other"}) as work:
        assert work.run_key() != key


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("fmce", KEY),
        ("train", {**KEY, "params": {"lr": 0.2}}),
        ("train", {**KEY, "inputs": {"images.h5": "cd34"}}),
        ("train", {**KEY, "more": None}),
    ],
)
def test_another_stage_or_key_never_sees_it(project, stage, key):
    path = leave(project)
    with open_work(project, stage, key) as work:
        assert work.path != path
        assert sorted(file.name for file in work.path.iterdir()) == ["key.json"]
    assert (path / "state").exists()  # unfinished: somebody may come back to it


def test_work_lies_in_the_project_out_of_the_way(project):
    assert leave(project).parent == project / ".fmce"


def test_the_folder_is_kept_when_the_stage_fails(project):
    with pytest.raises(KeyboardInterrupt), open_work(project, "train", KEY) as work:
        (work.path / "state").write_text("half")
        raise KeyboardInterrupt
    with open_work(project, "train", KEY) as again:
        assert (again.path / "state").read_text() == "half"


def test_finished_work_of_other_stages_goes_when_the_next_starts(project):
    finished = leave(project, outputs={"results/losses.csv": "ab"})
    unfinished = leave(project, "features")
    assert not finished.exists()
    assert not finished.with_suffix(".lock").exists()
    leave(project, "fmce")
    assert unfinished.exists()


def test_finished_work_stays_until_dvc_has_recorded_the_outputs(project):
    made = {"results/losses.csv": "ab", "results/train.json": "cd"}
    path = leave(project, outputs=made)
    # Killed before DVC wrote its record, or DVC recorded an earlier run or a part.
    for recorded in (None, {"results/losses.csv": "ab"}, {**made, "results/train.json": "old"}):
        if recorded is not None:
            record(recorded)
        with open_work(project, "train", KEY) as work:
            assert (work.path / "state").read_text() == "half"
    record({**made, "data/images.h5": "ef"})
    with open_work(project, "train", KEY) as work:
        assert work.path == path
        assert sorted(file.name for file in path.iterdir()) == ["key.json"]


def test_processes_beside_the_first_share_the_folder_and_touch_nothing(project):
    with (
        open_work(project, "train", KEY) as first,
        open_work(project, "train", KEY, first=False) as second,
    ):
        assert second.path == first.path
    finished = leave(project, "fmce", outputs={})
    with open_work(project, "features", KEY, first=False) as other:
        assert not other.path.exists()
    assert finished.exists()


HOLD = """
import sys, time
from pathlib import Path
from fmce_ops.stages.work import open_work

project, seconds = Path(sys.argv[1]), float(sys.argv[2])
with open_work(project, "train", {"params": {"lr": 0.1}, "inputs": {"images.h5": "ab12"}}) as work:
    (work.path / "entered").write_text(str(time.time()))
    print("holds", flush=True)
    time.sleep(seconds)
    (work.path / "left").write_text(str(time.time()))
"""


def hold(project, seconds):
    command = [sys.executable, "-c", HOLD, str(project), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_second_process_says_that_it_waits_and_waits(project):
    first = hold(project, 3)
    assert first.stdout.readline() == "holds\n"
    second = hold(project, 0)
    _, words = second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "another process runs the same stage" in words
    path = leave(project)
    # The first left before the second entered, and each wrote over the other's file.
    entered = float((path / "entered").read_text())
    assert entered <= float((path / "left").read_text())


def test_the_second_enters_only_when_the_first_has_left(project):
    first = hold(project, 2)
    assert first.stdout.readline() == "holds\n"
    with open_work(project, "train", KEY) as work:
        assert (work.path / "left").exists()
    first.communicate(timeout=60)


def test_a_killed_process_holds_nothing(project):
    first = hold(project, 600)
    assert first.stdout.readline() == "holds\n"
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    started = time.monotonic()
    with open_work(project, "train", KEY) as work:
        assert (work.path / "entered").exists()
    assert time.monotonic() - started < 30


def test_other_work_does_not_wait(project):
    with open_work(project, "train", KEY), open_work(project, "fmce", KEY) as other:
        assert other.path.is_dir()


# Published folders.


@pytest.fixture
def folder(project):
    files = {}
    for name, text in {"b.txt": "second", "a.txt": "first"}.items():
        files[name] = project / f"source-{name}"
        files[name].write_text(text)
    publish(files, project / "data" / "out")
    return project / "data" / "out"


def test_a_published_folder_is_whole_and_vouched_for(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b.txt", "manifest.json"]
    assert vouched(folder) == [folder / "a.txt", folder / "b.txt"]
    assert [path.read_text() for path in vouched(folder)] == ["first", "second"]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_the_hundredth_phase_comes_last(project):
    (project / "weights").write_text("the same")
    names = [f"phase-{phase:02d}.safetensors" for phase in (9, 10, 99, 100, 101)]
    publish(dict.fromkeys(reversed(names), project / "weights"), project / "out")
    assert [path.name for path in vouched(project / "out")] == names


def test_publishing_replaces_what_was_there(folder, project):
    (folder / "stray.txt").write_text("stray")
    (project / "new").write_text("third")
    publish({"c.txt": project / "new"}, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["c.txt", "manifest.json"]


def test_a_manifest_of_its_own_is_kept(project):
    (project / "own.json").write_text("{}")
    publish({"manifest.json": project / "own.json"}, project / "out")
    assert (project / "out" / "manifest.json").read_text() == "{}"


def test_files_are_linked_where_the_disk_can(folder, project):
    assert (folder / "a.txt").samefile(project / "source-a.txt")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second disk")
def test_files_are_copied_where_it_cannot(project):
    with TemporaryDirectory(dir="/dev/shm") as elsewhere:
        source = Path(elsewhere) / "a.txt"
        source.write_text("far away")
        publish({"a.txt": source}, project / "out")
    assert vouched(project / "out")[0].read_text() == "far away"


def test_a_failure_keeps_the_old_folder_and_leaves_nothing(folder, project):
    before = digest(folder)
    with pytest.raises(OSError):
        publish({"a.txt": project / "new-a", "b.txt": project / "missing"}, folder)
    assert digest(folder) == before
    assert vouched(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_changed_byte_is_found(folder):
    path = folder / "b.txt"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ModelError, match=r"b\.txt was changed after it was made: .*'dvc checkout'"):
        vouched(folder)


def test_a_missing_file_is_found(folder):
    (folder / "a.txt").unlink()
    with pytest.raises(ModelError, match=r"not complete .*a\.txt.*'dvc pull'"):
        vouched(folder)


@pytest.mark.parametrize(
    "text", [None, "", "{", "{}", "[]", '{"sha256": ["a.txt"]}', '{"sha256": {}}', "\x00"]
)
def test_a_folder_without_a_good_manifest_is_not_trusted(folder, text):
    (folder / "manifest.json").unlink()
    if text is not None:
        (folder / "manifest.json").write_text(text)
    with pytest.raises(ModelError, match="is not complete"):
        vouched(folder)


def test_a_missing_folder_is_not_complete(project):
    with pytest.raises(ModelError, match="is not complete"):
        vouched(project / "nowhere")


def test_the_digest_of_a_folder_follows_every_file(folder, project):
    assert digest(folder / "a.txt") == file_digest(folder / "a.txt", "md5")
    before = digest(folder)
    (project / "source-a.txt").unlink()
    (project / "source-a.txt").write_text("First")
    sources = {name: project / f"source-{name}" for name in ("a.txt", "b.txt")}
    publish(sources, folder)
    assert digest(folder) != before


def test_what_dvc_recorded_is_read_from_its_file(project):
    assert recorded_digests(project / "dvc.lock") == {}
    record({"a": "12", "data/out": "34.dir"})
    assert recorded_digests(project / "dvc.lock") == {"a": "12", "data/out": "34.dir"}
    shutil.copyfile("dvc.lock", "other.lock")
    (project / "dvc.lock").write_text("schema: '2.0'\n")
    assert recorded_digests(project / "dvc.lock") == {}


@pytest.mark.parametrize(
    "text", ["<<<<<<< a\nstages: {}", "stages: {a: null}", "stages: [1]", "[1]"]
)
def test_what_dvc_did_not_write_is_refused(project, text):
    (project / "dvc.lock").write_text(text)
    with pytest.raises(ParamsError, match=r"dvc\.lock is not as DVC writes it"):
        recorded_digests(project / "dvc.lock")


def test_a_file_in_the_place_of_the_work_folder_is_named(project):
    (project / ".fmce").write_text("")
    with (
        pytest.raises(DiskError, match=r"\.fmce cannot be made"),
        open_work(project, "train", KEY),
    ):
        pass
