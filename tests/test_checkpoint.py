"""A process that ends in the middle of a save, damaged files, and a full disk."""

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
from cryptopredict.checkpoint import CheckpointError, checkpoints, load, load_latest, prune, save
from cryptopredict.storage import remove_orphans

pytestmark = pytest.mark.filterwarnings("ignore:passed over", "ignore:.*fork")
OPERATIONS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def content(step):
    return {"step": step, "model": {"w": torch.full((40,), float(step)), "b": torch.arange(3)}, "rng": [torch.zeros(2), step]}


class _TornFile:
    """A file whose writes reach the disk in two halves, with a point to die between them."""

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
    """Let this process end at the `place`-th point before or after an operation on the disk."""
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
    """For each point at which a process can end within `work`: the folder it leaves, freshly prepared before."""
    for place in range(1000):
        folder = tmp_path / f"at-{place}"
        prepare(folder)

        status = in_child(lambda place=place, folder=folder: (_die_at(place), work(folder)))
        assert status in (0, 9), status
        if not status: return
        yield folder
    raise AssertionError("the work has not ended after 1000 places")


def two(folder):
    for step in (1, 2): save(folder / f"step-{step}", content(step))


@pytest.mark.parametrize("step, before", [(1, 0), (3, 2), (2, 2)], ids=["first", "next", "again"])
def test_a_save_that_dies_leaves_the_last_one_or_its_own(tmp_path, step, before):
    points, ours = 0, 0
    for folder in crash_points(tmp_path, two if before else lambda folder: None,
                               lambda folder: save(folder / f"step-{step}", content(step) | dict(new=True))):
        points += 1
        found = load_latest(folder)
        if not before and found is None: continue
        kept, path = found
        assert kept["step"] in (before, step) and torch.equal(kept["model"]["w"], content(kept["step"])["model"]["w"])
        ours += "new" in kept
        assert all(load(p) for p in checkpoints(folder)), "a folder named step-N is whole"
        remove_orphans(folder)
        assert all(p.name.startswith("step-") for p in folder.iterdir()), "nothing half written is left"
        again = save(folder / f"step-{step}", content(step))
        assert load_latest(folder)[1] == again, "saving works again"
    assert points >= 20 and ours >= 1


def test_a_removal_that_dies_leaves_whole_checkpoints(tmp_path):
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
    two(tmp_path)
    files, draw = sorted((tmp_path / "step-2").iterdir()), random.Random(kind)
    for k in range(200):
        file = files[k % len(files)]
        whole = file.read_bytes()
        at = draw.randrange(len(whole))
        damaged = whole[:at] if kind == "cut short" else whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1:]
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="step-2"): load(tmp_path / "step-2")
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            assert load_latest(tmp_path)[0]["step"] == 1, "the damaged one is neither loaded nor mistaken for a newer version"
        assert len(heard) == 1 and "step-2" in str(heard[0].message)
        file.write_bytes(whole)
    assert load_latest(tmp_path)[0]["step"] == 2


def _signed(path, files=None, **changes):
    """Replace the manifest by another one whose own sha256 is right."""
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
def test_a_manifest_that_is_not_one_is_refused(tmp_path, text):
    path = save(tmp_path / "step-1", content(1))
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="step-1"): load(path)


@pytest.mark.parametrize("header", [2**63, 2**40, 10**8 + 1, 0, 7], ids=str)
def test_a_header_of_wrong_length_is_refused(tmp_path, header):
    path = save(tmp_path / "step-1", content(1))
    file = path / "tensors.safetensors"
    file.write_bytes(header.to_bytes(8, "little") + file.read_bytes()[8:])
    _signed(path, json.loads((path / "manifest.json").read_bytes())["files"]
            | {file.name: dict(size=file.stat().st_size, sha256=checkpoint.hashlib.sha256(file.read_bytes()).hexdigest())})
    with pytest.raises(CheckpointError, match="holds no checkpoint"): load(path)


def test_sizes_are_checked_before_a_file_is_read(tmp_path, monkeypatch):
    path = save(tmp_path / "step-1", content(1))
    with open(path / "metadata.json", "ab") as file: file.truncate(2**28 + 1)  # sparse: it has no blocks
    read = []
    monkeypatch.setattr(Path, "read_bytes", lambda self, plain=Path.read_bytes: read.append(self.name) or plain(self))
    with pytest.raises(CheckpointError, match="metadata.json has 268,435,457 bytes, above"): load(path)
    assert "metadata.json" not in read
    read.clear()
    with open(path / "tensors.safetensors", "ab") as file: file.truncate(2**34)  # within the bound, not what was written
    with pytest.raises(CheckpointError, match="tensors.safetensors has 17,179,869,184 bytes, above"): load(path)
    assert "tensors.safetensors" not in read
    shutil.rmtree(path)
    path = save(tmp_path / "step-1", content(1))
    (path / "metadata.json").rename(tmp_path / "elsewhere")
    (path / "metadata.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is no plain file"): load(path)


def test_loading_runs_no_pickle(tmp_path, monkeypatch):
    import pickle

    for name in ("load", "loads", "Unpickler"): monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    assert load(save(tmp_path / "step-1", content(1)))["step"] == 1


@pytest.mark.parametrize("room", [0, 100, 300])
def test_a_full_disk_reports_the_bytes_needed_and_keeps_earlier_checkpoints(tmp_path, room):
    two(tmp_path)
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
