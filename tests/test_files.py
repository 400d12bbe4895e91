"""Files appear whole or not at all."""

import errno
import hashlib
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from fmce_ops.errors import DiskError, FmceError
from fmce_ops.files import (
    atomic,
    disk_reason,
    file_digest,
    is_disk_failure,
    remove_leftovers,
    write_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def python(code, *arguments):
    """Run ``code`` in a process of its own and return its last line of output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_a_file_is_written_and_nothing_else(tmp_path):
    write_text(tmp_path / "new" / "folder" / "note.txt", "größer\n")
    assert (tmp_path / "new" / "folder" / "note.txt").read_bytes() == "größer\n".encode()
    assert names(tmp_path / "new" / "folder") == ["note.txt"]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "old")
    with atomic(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        temporary.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, OSError, SystemExit])
def test_a_failure_leaves_everything_as_it_was(tmp_path, failure):
    path = tmp_path / "note.txt"
    for before in ([], ["note.txt"]):
        with pytest.raises(failure), atomic(path) as temporary:
            temporary.write_text("half")
            raise failure("in the middle")
        assert names(tmp_path) == before
        write_text(path, "old")
    assert path.read_text() == "old"


def test_a_file_that_was_never_written_does_not_appear(tmp_path):
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "note.txt"):
        pass
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    kept = ["out[1].h5", ".out[1].h5.tmp", ".other.h5.1.tmp", ".out1.h5.1.tmp"]
    for name in [*kept, ".out[1].h5.12.tmp", ".out[1].h5.12.tmp-journal"]:
        (tmp_path / name).write_text("x")
    (tmp_path / ".out[1].h5.9.tmp" / "within").mkdir(parents=True)
    remove_leftovers(tmp_path / "out[1].h5")
    remove_leftovers(tmp_path / "no folder" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor):
        order.append(("fsync", stat.S_ISDIR(os.fstat(descriptor).st_mode)))
        fsync(descriptor)

    def renamed(path, target):
        order.append(("rename", None))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_text(tmp_path / "note.txt", "text")
    assert order == [("fsync", False), ("rename", None), ("fsync", True)]


FULL = """
import resource, sys
from pathlib import Path
from fmce_ops.errors import DiskError
from fmce_ops.files import write_text

path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_text(path, "x" * 1_000_000)
except DiskError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_told_in_one_sentence(tmp_path):
    write_text(tmp_path / "note.txt", "old")
    message = python(FULL, tmp_path / "note.txt")
    assert message == (
        f"{tmp_path / 'note.txt'} could not be written (file too large): "
        "free some space or choose another folder, then run the same command again."
    )
    assert names(tmp_path) == ["note.txt"]
    assert (tmp_path / "note.txt").read_text() == "old"


FOREIGN = """
import os, sys
from pathlib import Path
from fmce_ops.errors import DiskError
from fmce_ops.files import write_text

if os.geteuid() == 0:
    os.setuid(65534)
try:
    write_text(Path(sys.argv[1]), "text")
except DiskError as error:
    print(error)
"""


@pytest.mark.parametrize("place", ["note.txt", "new/folder/note.txt"])
def test_a_folder_that_may_not_be_written_is_told_in_one_sentence(tmp_path, place):
    tmp_path.chmod(0o555)
    try:
        message = python(FOREIGN, tmp_path / place)
    finally:
        tmp_path.chmod(0o755)
    assert message.startswith(f"{tmp_path / place} could not be written (permission denied): ")
    assert names(tmp_path) == []


def test_an_error_of_the_disk_is_one_the_user_can_cause():
    assert issubclass(DiskError, FmceError)


@pytest.mark.parametrize(
    ("error", "failure", "words"),
    [
        (OSError(errno.ENOSPC, "write"), True, os.strerror(errno.ENOSPC).lower()),
        (OSError(errno.EDQUOT, "write"), True, os.strerror(errno.EDQUOT).lower()),
        (OSError("h5py: No space left on device"), True, "no space left on device"),
        (OSError(errno.ENOENT, "open"), False, os.strerror(errno.ENOENT).lower()),
    ],
)
def test_failures_of_the_disk_are_told_from_others(error, failure, words):
    assert is_disk_failure(error) is failure
    assert disk_reason(error) == words


def test_json_is_sorted_indented_and_ends_its_line(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2.5], "a": None})
    text = (tmp_path / "a.json").read_text()
    assert text == '{\n  "a": null,\n  "b": [\n    1,\n    2.5\n  ]\n}\n'
    assert json.loads(text) == {"a": None, "b": [1, 2.5]}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_json_knows_no_number_that_is_not_finite(tmp_path, bad):
    write_json(tmp_path / "a.json", {"loss": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": [1, {"deep": bad}]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1}
    assert names(tmp_path) == ["a.json"]


def test_digests_are_those_of_the_bytes(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(b"abc")
    # The published test vectors of both algorithms.
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(path, "md5") == "900150983cd24fb0d6963f7d28e17f72"
    path.write_bytes(bytes(range(256)) * 10_000)
    assert file_digest(path) == hashlib.sha256(bytes(range(256)) * 10_000).hexdigest()


@pytest.mark.parametrize("name", ["", ".", "folder", "x" * 300])
def test_a_place_that_no_file_can_have_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DiskError):
        write_text(Path(name), "text")
    assert names(tmp_path) == ["folder"]
