"""Checkpoints: a process that dies during a save, damaged files, a full disk."""

import builtins
import json
import os
import random
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers import in_child

from cryptopredict import checkpoint, storage
from cryptopredict.checkpoint import (
    CheckpointError,
    NewerVersion,
    checkpoints,
    flatten,
    is_whole,
    load,
    load_latest,
    manifest_of,
    prune,
    read_bounded,
    save,
    verify,
    verify_unchanged,
)
from cryptopredict.storage import remove_orphans

pytestmark = pytest.mark.filterwarnings("ignore:skipped", "ignore:.*fork")
OPERATIONS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def content(step):
    return {"step": step, "model": {"w": torch.full((40,), float(step)), "b": torch.arange(3)}, "rng": [torch.zeros(2), step]}


class _TornFile:
    """A file that writes in two halves, with a point to die before, between and after them."""

    def __init__(self, file, maybe_die): self.file, self.maybe_die = file, maybe_die
    def __enter__(self): return self
    def __exit__(self, *_): self.file.close()
    def fileno(self): return self.file.fileno()
    def flush(self): self.file.flush()

    def write(self, data):
        self.maybe_die()
        self.file.write(data[:len(data) // 2])
        self.file.flush()
        self.maybe_die()
        self.file.write(data[len(data) // 2:])
        self.file.flush()
        self.maybe_die()


def _die_at(place):
    """Make this process exit at the `place`-th point before or after an operation on the disk."""
    remaining = [place]

    def maybe_die():
        if not remaining[0]: os._exit(9)
        remaining[0] -= 1

    def around(call):
        def wrapped(*args, **kwargs):
            maybe_die()
            result = call(*args, **kwargs)
            maybe_die()
            return result
        return wrapped

    for name in OPERATIONS: setattr(os, name, around(getattr(os, name)))
    plain = builtins.open
    storage.open = lambda *args: _TornFile(plain(*args), maybe_die)  # found before the builtin


def crash_points(tmp_path, prepare, work):
    """Yield, for each point at which a process can die within `work`, the folder it leaves behind."""
    for place in range(1000):
        folder = tmp_path / f"at-{place}"
        prepare(folder)
        status = in_child(lambda place=place, folder=folder: (_die_at(place), work(folder)))
        assert status in (0, 9), status
        if not status: return
        yield folder
    raise AssertionError("the work has not finished after 1000 points")


def save_two(folder):
    for step in (1, 2): save(folder / f"step-{step}", content(step))


@pytest.mark.parametrize("step, before", [(1, 0), (3, 2), (2, 2)], ids=["first", "next", "again"])
def test_a_save_that_dies_leaves_the_previous_or_the_new_checkpoint(tmp_path, step, before):
    points, ours = 0, 0
    for folder in crash_points(tmp_path, save_two if before else lambda folder: None,
                               lambda folder: save(folder / f"step-{step}", content(step) | dict(new=True))):
        points += 1
        found = load_latest(folder)
        if not before and found is None: continue
        kept, path = found
        assert kept["step"] in (before, step) and torch.equal(kept["model"]["w"], content(kept["step"])["model"]["w"])
        ours += "new" in kept
        assert all(load(p) for p in checkpoints(folder)), "a folder named step-N is whole"
        remove_orphans(folder)
        assert all(p.name.startswith("step-") for p in folder.iterdir()), "no half-written file is left"
        again = save(folder / f"step-{step}", content(step))
        assert load_latest(folder)[1] == again, "saving works again"
    assert points >= 20 and ours >= 1


def test_a_pruning_that_dies_leaves_only_whole_checkpoints(tmp_path):
    points = 0

    def five(folder):
        for step in range(5): save(folder / f"step-{step}", content(step))

    for folder in crash_points(tmp_path, five, lambda folder: prune(folder, 2, also=[0])):
        points += 1
        steps = [load(p)["step"] for p in checkpoints(folder)]
        assert steps[:2] == [4, 3] and steps[-1] == 0
        remove_orphans(folder)
        assert not list(folder.glob(".*"))
    assert points >= 12


@pytest.mark.parametrize("kind", ["cut short", "one bit"])
def test_a_damaged_checkpoint_is_never_loaded(tmp_path, kind):
    save_two(tmp_path)
    files, draw = sorted((tmp_path / "step-2").iterdir()), random.Random(kind)
    for k in range(200):
        file = files[k % len(files)]
        whole = file.read_bytes()
        at = draw.randrange(len(whole))
        damaged = whole[:at] if kind == "cut short" else whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1:]
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="step-2"): load(tmp_path / "step-2")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert load_latest(tmp_path)[0]["step"] == 1, "step 2 is neither loaded nor taken for a newer version"
        assert len(caught) == 1 and str(caught[0].message).startswith("skipped step-2: ")
        file.write_bytes(whole)
    assert load_latest(tmp_path)[0]["step"] == 2


def _signed(path, files=None, **changes):
    """Replace the manifest by one with other content and a valid sha256."""
    body = {"version": 1, "files": files or json.loads((path / "manifest.json").read_bytes())["files"]} | changes
    digest = checkpoint.hashlib.sha256(json.dumps(body).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(body | {"sha256": digest}))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "tensors.safetensors/../../secret", ""])
def test_a_manifest_that_names_other_files_is_refused(tmp_path, name):
    path = save(tmp_path / "step-1", content(1))
    (tmp_path / "secret").write_text("{}")
    files = json.loads((path / "manifest.json").read_bytes())["files"]
    entry = files["metadata.json"]
    for changed in ({**files, name: entry}, {name: entry, "metadata.json": entry}):
        _signed(path, changed)
        with pytest.raises(CheckpointError, match="names other files"): load(path)


@pytest.mark.parametrize("text", ["[]", "{}", "null", "1", '{"sha256": 1}', "[" * 10_000, "\\", '{"version": 1e400}'])
def test_an_invalid_manifest_is_refused(tmp_path, text):
    path = save(tmp_path / "step-1", content(1))
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="step-1"): load(path)


@pytest.mark.parametrize("header", [2**63, 2**40, 10**8 + 1, 0, 7], ids=str)
def test_a_header_with_a_wrong_length_is_refused(tmp_path, header):
    path = save(tmp_path / "step-1", content(1))
    file = path / "tensors.safetensors"
    file.write_bytes(header.to_bytes(8, "little") + file.read_bytes()[8:])
    _signed(path, json.loads((path / "manifest.json").read_bytes())["files"]
            | {file.name: dict(size=file.stat().st_size, sha256=checkpoint.hashlib.sha256(file.read_bytes()).hexdigest())})
    with pytest.raises(CheckpointError, match="holds no checkpoint"): load(path)


def test_sizes_are_checked_before_a_file_is_read(tmp_path, monkeypatch):
    path = save(tmp_path / "step-1", content(1))
    with open(path / "metadata.json", "ab") as file: file.truncate(2**28 + 1)  # sparse: takes no space on the disk
    read = []
    monkeypatch.setattr(Path, "read_bytes", lambda self, plain=Path.read_bytes: read.append(self.name) or plain(self))
    with pytest.raises(CheckpointError, match="metadata.json has 268,435,457 bytes, expected at most"): load(path)
    assert "metadata.json" not in read
    read.clear()
    with open(path / "tensors.safetensors", "ab") as file: file.truncate(2**34)  # within the bound, but not as saved
    with pytest.raises(CheckpointError, match="tensors.safetensors has 17,179,869,184 bytes, expected at most"): load(path)
    assert "tensors.safetensors" not in read
    shutil.rmtree(path)
    path = save(tmp_path / "step-1", content(1))
    (path / "metadata.json").rename(tmp_path / "elsewhere")
    (path / "metadata.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is not a regular file"): load(path)


def test_loading_uses_no_pickle(tmp_path, no_pickle):
    assert load(save(tmp_path / "step-1", content(1)))["step"] == 1


@pytest.mark.parametrize("room", [0, 100, 300])
def test_a_full_disk_reports_the_bytes_needed_and_keeps_earlier_checkpoints(tmp_path, room):
    save_two(tmp_path)
    report = tmp_path / "report"
    handle = os.open(report, os.O_WRONLY | os.O_CREAT)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try: save(tmp_path / "step-3", content(3))
        except CheckpointError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            os.write(handle, str(error).encode())
    assert in_child(fill) == 0
    os.close(handle)
    assert "step-3 cannot be written (File too large): it needs " in report.read_text() and " bytes" in report.read_text()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-2", "step-1"] and not list(tmp_path.glob(".*"))
    assert load_latest(tmp_path)[0]["step"] == 2


# --- parts of the module --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, name", [({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}, "a/b"),
                                         ({1: torch.ones(1), "1": torch.ones(1)}, "1")], ids=["slash", "number and text"])
def test_two_tensors_of_one_name_are_refused(value, name):
    with pytest.raises(ValueError, match=f"two tensors would be named '{name}': rename a key"): flatten(value)


def test_tensors_that_share_memory_are_saved(tmp_path):
    shared = torch.ones(3)
    path = save(tmp_path / "step-2", {"k": shared, "v": [shared]})
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "metadata.json", "tensors.safetensors"]
    assert load(path)["v"][0].tolist() == [1, 1, 1]


def test_a_manifest_holds_version_files_and_a_hash_of_them():
    manifest = json.loads(manifest_of({"a": {"size": 1}}))
    assert (manifest["version"], manifest["files"], len(manifest["sha256"])) == (1, {"a": {"size": 1}}, 64)
    assert manifest["sha256"] != json.loads(manifest_of({"a": {"size": 2}}))["sha256"]


def test_a_step_saved_again_gets_the_next_number(tmp_path):
    assert [save(tmp_path / "step-2", {"k": k}).name for k in range(3)] == ["step-2", "step-2.1", "step-2.2"]
    shutil.rmtree(tmp_path / "step-2")
    assert save(tmp_path / "step-02", {}).name == "step-02.3", "never a number below one that is there"
    assert load_latest(tmp_path)[1].name == "step-02.3"


def test_a_content_that_cannot_be_saved_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"): save(tmp_path / "step-3", {"a": {1, 2}})
    with pytest.raises(CheckpointError, match="name a checkpoint step-<number>"): save(tmp_path / "last", {})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_holds_no_checkpoint(tmp_path):
    assert load_latest(tmp_path / "nothing") is None and checkpoints(tmp_path / "nothing") == []
    with pytest.raises(CheckpointError, match="step-9 is not a complete checkpoint"): verify(tmp_path / "step-9")


def test_a_bounded_read_refuses_large_and_irregular_files(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert read_bounded(tmp_path / "abc", 3) == b"abc"
    with pytest.raises(CheckpointError, match="abc has 3 bytes, expected at most 2"): read_bounded(tmp_path / "abc", 2)
    with pytest.raises(CheckpointError, match="is not a regular file"): read_bounded(tmp_path, 2**20)


@pytest.mark.parametrize("name", ["manifest.json", "metadata.json", "tensors.safetensors"])
def test_a_checkpoint_without_one_of_its_files_is_refused(tmp_path, name):
    path = save(tmp_path / "step-1", content(1))
    (path / name).unlink()
    with pytest.raises(CheckpointError, match="step-1 is not a complete checkpoint"): load(path)


def test_a_newer_version_is_an_error_and_not_skipped(tmp_path):
    save_two(tmp_path)
    _signed(tmp_path / "step-2", version=2)
    with pytest.raises(NewerVersion, match="has version 2, which this cryptopredict does not know"): load_latest(tmp_path)


def test_the_warning_on_a_skipped_checkpoint_names_the_file_without_a_remedy(tmp_path):
    save_two(tmp_path)
    (tmp_path / "step-2" / "metadata.json").write_text("{")
    with pytest.warns(RuntimeWarning) as heard: assert load_latest(tmp_path)[0]["step"] == 1
    file = tmp_path / "step-2" / "metadata.json"
    assert [str(w.message) for w in heard] == [f"skipped step-2: {file} is damaged (sha256 differs)"]


def test_pruning_counts_no_damaged_checkpoint_and_removes_earlier_saves_of_a_step(tmp_path):
    for k in (0, 1, 2, 3, 4, 5): save(tmp_path / f"step-{k}", {"k": k})
    save(tmp_path / "step-5", {"k": 5.5})
    (tmp_path / "step-4" / "metadata.json").write_text("{")
    assert [p.name for p in prune(tmp_path, 2, also=[0])] == ["step-5", "step-2", "step-1"]
    assert sorted(os.listdir(tmp_path)) == ["step-0", "step-3", "step-4", "step-5.1"]
    assert load(tmp_path / "step-5.1") == {"k": 5.5}
    with pytest.raises(ValueError, match="keep is 0"): prune(tmp_path, 0)


def test_a_verified_checkpoint_is_read_again_only_after_a_change(tmp_path):
    "A change that keeps size and date of a file counts too."
    file = save(tmp_path / "step-1", {"k": torch.ones(9)}) / "tensors.safetensors"
    reads, before = verify_unchanged.cache_info().misses, os.stat(file)
    assert [is_whole(file.parent) for _ in range(3)] == [True] * 3
    assert verify_unchanged.cache_info().misses == reads + 1
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(file).st_mtime_ns == before.st_mtime_ns and not is_whole(file.parent)


def test_a_disk_that_cannot_be_read_for_a_moment_is_asked_again(tmp_path, monkeypatch):
    path = save(tmp_path / "step-2", {"k": torch.ones(9)})

    def refuse(*_): raise OSError("once")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_bounded", refuse)
        assert not is_whole(path)
    assert is_whole(path)
