"""Trainings that are killed, interrupted or out of disk space: a resumed run is bit-identical to an uninterrupted one."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import in_child, snapshot
from trainings import SETTINGS, config, data, die, die_at, die_at_operation, differences, outcome

from cryptopredict import checkpoint, tbptt_trainer
from cryptopredict.bptt import rng_state
from cryptopredict.checkpoint import CheckpointError, checkpoints, load_latest
from cryptopredict.tbptt_trainer import Run, train

pytestmark = pytest.mark.filterwarnings("ignore:skipped", "ignore:.*fork")


@pytest.fixture(autouse=True)
def _interruptible():
    """Let SIGINT interrupt even if the tests run in the background of a shell, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def killed(out: Path, seed: int, steps: int) -> list[int]:
    """Train to the end, killed up to six times at a random step or disk operation; the exit statuses."""
    draw, statuses = random.Random(seed), []
    while not statuses or statuses[-1]:
        def work():
            if draw.random() < .5: return train(config(), data(), out, on_update=die_at(draw.randrange(1, steps + 1)))
            die_at_operation(draw.randrange(1, 50), "fsync", "rename", "replace", "unlink")
            train(config(), data(), out)
        statuses.append(in_child(work) if len(statuses) < 6 else in_child(lambda: train(config(), data(), out)))
        draw.random()  # draws in a child do not advance the generator here
        assert statuses[-1] in (0, -signal.SIGKILL), statuses
    return statuses


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(k, marks=pytest.mark.slow) for k in range(4, 24))])
def test_resume_after_kills_is_bit_identical(finished_training, tmp_path, seed):
    statuses = killed(tmp_path / "out", seed, Run.load(finished_training).step)
    assert not differences(tmp_path / "out", outcome(finished_training))
    assert not list((tmp_path / "out").rglob("*.tmp")), statuses
    print(f"{len(statuses) - 1} kills")


def test_forecasts_of_a_resumed_run_are_bit_identical(finished_training, tmp_path):
    assert in_child(lambda: train(config(), data(), tmp_path / "out", on_update=die_at(7))) == -signal.SIGKILL
    x = torch.randn(2, 30, 6)
    one, other = (run.model.eval()(x)[0] for run in (Run.load(finished_training), train(config(), data(), tmp_path / "out")))
    assert all(torch.equal(a, b) for a, b in zip(one, other))


PARTS = {"model", "optimiser", "histories", "guard", "micro_batcher", "step", "epoch", "cursor", "carried", "data", "rng"}


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A training with fp16 and micro-batches, killed within its second epoch, and its outcome without the kill."""
    changes = dict(amp="fp16", lr=1e-3)
    out, whole = tmp_path_factory.mktemp("half"), tmp_path_factory.mktemp("fp16")

    def on_update(run, record, at=None):
        if run.step == 1: run.micro_batcher.rows = 2  # as after an out-of-memory error; draws other dropout
        if run.step == at: die()
    at = train(config(**changes), data(), whole, on_update=on_update).step - 1
    work = lambda: train(config(**changes), data(), out, on_update=lambda run, record: on_update(run, record, at))
    assert in_child(work) == -signal.SIGKILL
    found = load_latest(out / "checkpoints")[0]
    assert found["epoch"] == 1 and found["cursor"] > 0 and PARTS < set(found), "killed in the middle of an epoch"
    return changes, out, outcome(whole)


@pytest.mark.parametrize("part", ["", "scaler", *sorted(PARTS)])
def test_every_part_of_a_checkpoint_is_needed(halves, tmp_path, part, monkeypatch):
    """Negative controls: if any one part is not restored, the outcome differs."""
    changes, out, expected = halves
    plain = Run.load_state_dict

    def load_state_dict(run, content):
        new, rng = Run(run.config, run.out), rng_state("cpu")
        content = dict(content)
        if part == "scaler": content["optimiser"] = dict(content["optimiser"], scaler=new.optimiser.scaler.state_dict())
        elif part == "optimiser": content[part] = dict(content[part], adamw=new.optimiser.adamw.state_dict())
        elif part in Run.PARTS: content[part] = getattr(new, part).state_dict()
        elif part == "rng": content[part] = rng
        elif part == "carried": content[part] = run.model.init_state(SETTINGS["batch"])  # before the first hour
        elif part == "data": content[part] = dict(content[part], scaler=None)
        elif part: content[part] = getattr(new, part)
        plain(run, content)

    monkeypatch.setattr(Run, "load_state_dict", load_state_dict)
    shutil.copytree(out, tmp_path / "out")
    train(config(**changes), data(), tmp_path / "out")
    differ = differences(tmp_path / "out", expected)
    assert bool(differ) == bool(part), differ


SCRIPT = """import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
print("ready", flush=True)
from cryptopredict.tbptt_trainer import train
from trainings import config, data
def on_update(run, record): print(run.step, flush=True)
train(config(), data(), sys.argv[1], on_update=on_update)
print("done", flush=True)
"""


def signalled(out: Path, how: int, wait: float) -> tuple[int, list[str]]:
    """Exit status and output of a training that gets a signal some time after its first update."""
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", script, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    seen = []
    for line in process.stdout:
        seen.append(line.strip())
        if line.strip() == "1": break
    time.sleep(wait)
    process.send_signal(how)
    rest, _ = process.communicate(timeout=120)
    return process.returncode, seen + rest.split()


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("wait", [0., pytest.param(.05), *(pytest.param(k / 40, marks=pytest.mark.slow) for k in range(1, 11))])
def test_a_signal_ends_a_training_after_a_save(finished_training, tmp_path, how, wait):
    out, number = tmp_path / "out", getattr(signal, how)
    status, seen = signalled(out, number, wait)
    if "done" not in seen:
        assert status == -number, "killed by the signal: a shell reports 128 + its number"
        assert load_latest(out / "checkpoints")[0]["step"] == int(seen[-1]), "no update is lost"
    assert in_child(lambda: train(config(), data(), out)) == 0
    path, other = load_latest(out / "checkpoints")[1], load_latest(finished_training / "checkpoints")[1]
    assert all((path / n).read_bytes() == (other / n).read_bytes() for n in checkpoint.FILES)
    assert (out / "metrics.jsonl").read_bytes() == (finished_training / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("number", range(1, 6))  # flushes of tensors, metadata, manifest, folder, name
def test_a_signal_during_a_save_takes_effect_after_the_save(finished_training, tmp_path, monkeypatch, number):
    """The signal comes at the n-th flush of the save at update 3, which is completed first."""
    flushes, plain, saving, plain_save = [], os.fsync, [], tbptt_trainer.save

    def fsync(handle):
        flushes.extend(saving)
        if saving and len(flushes) == number: signal.raise_signal(signal.SIGINT)
        plain(handle)

    def save(path, content):
        if content["step"] == 3: saving.append(1)
        made = plain_save(path, content)
        saving.clear()
        return made

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(tbptt_trainer, "save", save)
    with pytest.raises(KeyboardInterrupt): train(config(), data(), tmp_path)
    assert load_latest(tmp_path / "checkpoints")[0]["step"] == 3 and not list(tmp_path.rglob("*.tmp"))
    train(config(), data(), tmp_path)
    assert len(flushes) == 5 and not differences(tmp_path, outcome(finished_training))


def test_a_second_signal_takes_effect_at_once(tmp_path):
    """Two signals in one update: the first is deferred, the second acts as outside a training."""
    deferred = []

    def on_update(run, record):
        if run.step != 2: return
        signal.raise_signal(signal.SIGINT)
        deferred.append(True)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt): train(config(), data(), tmp_path, on_update=on_update)
    assert deferred == [True] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert load_latest(tmp_path / "checkpoints")[0]["step"] == 0, "it did not save first"


def test_a_folder_in_use_is_refused_and_unchanged(tmp_path):
    out = tmp_path / "out"

    def train_again(run, record):
        if run.step != 2: return
        before = snapshot(out, times=False)
        with pytest.raises(ValueError, match="out is in use by another process"): train(config(), data(), out)
        assert snapshot(out, times=False) == before
        raise InterruptedError

    with pytest.raises(InterruptedError): train(config(), data(), out, on_update=train_again)
    train(config(), data(), out)


@pytest.mark.parametrize("changes, message", [(dict(lr=.5), "lr: 0.003 in the folder, 0.5 in this call"), (dict(), "data: "),
                                           (dict(d_model=32), "model.d_model: 16 in the folder, 32 in this call")])
def test_a_run_with_other_settings_or_data_is_refused_and_changes_nothing(finished_training, changes, message):
    before = snapshot(finished_training)
    fold = data() if changes else data()._replace(stop=999)
    with pytest.raises(ValueError, match=message): train(config(**changes), fold, finished_training)
    assert snapshot(finished_training) == before


def test_a_folder_with_damaged_checkpoints_only_is_refused(tmp_path):
    with pytest.raises(InterruptedError):
        def stop(run, record): raise InterruptedError
        train(config(), data(), tmp_path, on_update=stop)
    for path in checkpoints(tmp_path / "checkpoints"): (path / "metadata.json").write_text("{}")
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds no valid checkpoint"): train(config(), data(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_a_full_disk_stops_the_training_and_keeps_the_last_checkpoint(tmp_path):
    out, message = tmp_path / "out", tmp_path / "message"
    report = os.open(message, os.O_WRONLY | os.O_CREAT)

    def fill():
        def on_update(run, record):  # room for a line of metrics but not for a checkpoint
            if run.step == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try: train(config(), data(), out, on_update=on_update)
        except CheckpointError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            os.write(report, str(error).encode())
    assert in_child(fill) == 0
    os.close(report)
    assert "step-00000006 cannot be written" in message.read_text() and "it needs" in message.read_text()
    assert load_latest(out / "checkpoints")[0]["step"] == 3 and not list(out.rglob("*.tmp"))
    assert train(config(), data(), out).step > 6


def test_old_checkpoints_are_pruned_and_the_best_is_kept(tmp_path):
    run = train(replace(config(epochs=6, save_every=2), keep=1), data(), tmp_path)
    left = [int(p.name[5:].split(".")[0]) for p in checkpoints(tmp_path / "checkpoints")]
    records = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    best = min(records, key=lambda r: r["total"])["step"]
    assert best in left and records[-1]["step"] in left and len(left) <= 4 and left[0] == run.step
    assert Run.load(tmp_path).at_epoch(6).epoch == 6


def test_a_signal_at_the_end_of_the_last_epoch_takes_effect(tmp_path, monkeypatch):
    plain = Run.end_epoch

    def end_epoch(run, fold):
        plain(run, fold)
        if run.epoch == 2: signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(Run, "end_epoch", end_epoch)
    with pytest.raises(KeyboardInterrupt): train(config(), data(), tmp_path)


@pytest.mark.parametrize("keep", [0, 2])
def test_checkpoints_of_epochs_are_kept_without_validation_too(tmp_path, keep):
    run = train(config(epochs=5, keep=keep, save_every=0), data()._replace(valid=None), tmp_path)
    assert len(checkpoints(tmp_path / "checkpoints")) == (2 if keep else 6), "step 0 counts"
    assert run.at_epoch(4).epoch == 4
    if keep:
        with pytest.raises(ValueError, match="no checkpoint of epoch 1 .keep is 2"): run.at_epoch(1)
    else: assert run.at_epoch(1).epoch == 1
    with pytest.raises(ValueError, match="no validation losses"): tbptt_trainer.best_epoch(tmp_path)


def test_a_training_that_cannot_begin_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="training hours"): train(config(), data()._replace(stop=20), tmp_path / "out")
    with pytest.raises(ValueError, match="until is 3"): train(config(), data(), tmp_path / "out", until=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lost, message", [("checkpoints", "without its checkpoints"), ("metrics.jsonl", "is shorter than")])
def test_a_folder_with_missing_files_is_refused(finished_training, tmp_path, lost, message):
    shutil.copytree(finished_training, tmp_path / "out")
    path = tmp_path / "out" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = snapshot(tmp_path / "out", times=False)
    with pytest.raises(ValueError, match=message): train(config(), data(), tmp_path / "out")
    assert snapshot(tmp_path / "out", times=False) == before


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    checkpoint.save(tmp_path / "checkpoints" / "step-1", {"a": 1})
    with pytest.raises(ValueError, match="not of a training run"): train(config(), data(), tmp_path)
    with pytest.raises(ValueError, match="not a checkpoint of a training run"): Run.load(tmp_path)


@pytest.fixture(scope="module", params=[1, 2])
def walk_forward(request, tmp_path_factory):
    """A function that runs a walk-forward with the network (one seed, or two), and the folder of an uninterrupted run."""
    from cryptopredict.protocol import EvaluateConfig
    from cryptopredict.simulate import simulate_market
    from cryptopredict.walkforward import walk_forward_run

    sizes = dict(d_model=16, headdim=8, mlp=24, n_layers=1)
    c = EvaluateConfig(models=("climatology", "log_har", "mamba2"), horizon="10D", vol_window="5D", validation="60D", step="60D",
                       first_test="2016-12-01", epochs=2, seeds=request.param, n_boot=100, model=sizes,
                       train=dict(batch=4, tbptt_len=64, save_every=3, lr=1e-2))
    panel, _ = simulate_market(24 * 460, seed=2)
    def call(out, on_update=lambda run, record: None): return walk_forward_run(c, panel, out, on_update=on_update).out
    return call, call(tmp_path_factory.mktemp("walk") / "whole")


def reproducible(out: Path) -> dict[str, object]:
    """Everything that a walk-forward writes, except times and memory."""
    scores = json.loads((out / "scores.json").read_text())
    for record in scores["training"]: record.update(tokens_per_s=None, peak_rss=None)
    left_out = {"timings.jsonl", "scores.json", "manifest.json"}
    kept = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and p.name not in left_out}
    return dict(kept, scores=scores)


def test_a_walk_forward_killed_inside_trainings_resumes_bit_identical(walk_forward, tmp_path):
    """Killed five times, inside trainings of different folds and seeds."""
    call, whole = walk_forward
    out, places = tmp_path / "out", []
    for updates in (4, 40, 25, 60, 9):
        def work(updates=updates):
            remaining = [updates]

            def count_down(run, record):
                remaining[0] -= 1
                if not remaining[0]: die()
            call(out, count_down)
        assert in_child(work) == -signal.SIGKILL
        at = max(out.rglob("metrics.jsonl"), key=lambda p: p.stat().st_mtime_ns)
        places.append((str(at.relative_to(out)), len(at.read_text().splitlines())))
    assert len({place for place, _ in places}) > 2 and all(lines > 1 for _, lines in places), places
    assert in_child(lambda: call(out)) == 0
    one, other = reproducible(whole), reproducible(out)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


MAIN = """import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from cryptopredict.cli import main
print("begun", flush=True)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("wait", [.3, 1.1, *(pytest.param(k / 4, marks=pytest.mark.slow) for k in range(1, 11))])
def test_a_signal_during_imports_ends_the_command(tmp_path, how, wait):
    """Exit code and message are the same while torch, pandas and others are still being imported."""
    words = [sys.executable, "-c", MAIN, "train", "--years", "3", "--horizon", "30D", "--out", "out"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    time.sleep(wait)
    process.send_signal(getattr(signal, how))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == dict(SIGINT=130, SIGTERM=143)[how], stderr
    assert stderr == "cryptopredict: interrupted; the same --out resumes where it stopped\n"
    assert not list(tmp_path.rglob("*.tmp"))


def _rewrite(out: Path, change) -> None:
    """Change the content of the newest checkpoint and sign it again."""
    content, path = load_latest(out / "checkpoints")
    shutil.rmtree(path)
    change(content)
    checkpoint.save(path, content)


def _newer(out: Path) -> None:
    """Make the newest checkpoint one of a later version of the package."""
    manifest = checkpoints(out / "checkpoints")[0] / "manifest.json"
    body = dict(json.loads(manifest.read_text()), version=checkpoint.VERSION + 1)
    body.pop("sha256")
    manifest.write_text(json.dumps(dict(body, sha256=hashlib.sha256(json.dumps(body).encode()).hexdigest())))


def _renamed(fold):
    """The same tensors, the last feature renamed."""
    return fold._replace(scaler=replace(fold.scaler, columns=("a", "b", "c", "d", "e", "x")))


UNFIT = {  # name -> (change to a finished run, data to train on, message of the error)
    "newer version": (_newer, data, "has version 2, which this cryptopredict does not know: "
                      "load it with the version that wrote it"),
    "missing key": (lambda out: _rewrite(out, lambda c: c.pop("guard")), data,
                    "it lacks guard.: resume it with the version that wrote"),
    "missing key below": (lambda out: _rewrite(out, lambda c: c["guard"].pop("recent")), data, "it lacks guard.recent.: resume"),
    "missing rows": (lambda out: _rewrite(out, lambda c: c["micro_batcher"].pop("rows")), data, "it lacks micro_batcher.rows."),
    "missing scaler": (lambda out: _rewrite(out, lambda c: c["optimiser"].pop("scaler")), data, "it lacks optimiser.scaler."),
    "another kind": (lambda out: _rewrite(out, lambda c: c.update(cursor="1")), data, "cursor is '1'"),
    "no generator": (lambda out: _rewrite(out, lambda c: c["rng"].pop("cpu")), data, "it lacks rng.cpu"),
    "another state": (lambda out: _rewrite(out, lambda c: c.update(carried=[1, 2])), data, "does not fit"),
    "odd history": (lambda out: (out / "timings.jsonl").write_text("[]\n"), data, "timings.jsonl is damaged"),
    "missing weight": (lambda out: _rewrite(out, lambda c: c["model"].popitem()), data, "does not fit"),
    "other features": (lambda out: None, lambda: _renamed(data()), "features: f only in the folder, x only in this call"),
    "other data": (lambda out: None, lambda: data()._replace(stop=990), "data: "),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_run_that_cannot_be_resumed_is_left_unchanged(finished_training, tmp_path, case):
    harm, fold, message = UNFIT[case]
    shutil.copytree(finished_training, tmp_path / "out")
    harm(tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=message) as error: train(config(), fold(), tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1 and str(tmp_path / "out") in str(error.value)
    assert snapshot(tmp_path) == before


def unprivileged(work) -> int:
    """Run `work` as a user other than root; skip where such a user may not read the package. Returns its exit status."""
    package = Path(checkpoint.__file__).resolve()
    if os.geteuid() == 0 and not all(p.stat().st_mode & (0o001 if p.is_dir() else 0o004) for p in (package, *package.parents)):
        pytest.skip(f"other users may not read {package}: clone where they may")
    def bound():
        if os.geteuid() == 0: os.setuid(65534)
        work()
    return in_child(bound)


@pytest.fixture(params=[1, 2])
def common(request):
    """A run that every user may read: after its first epoch, and finished."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    train(config(), data(), folder / "out", until=request.param)
    for path in folder.rglob("*"): path.chmod(0o755 if path.is_dir() else 0o644)
    yield folder / "out"
    for path in folder.rglob("*"): path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("common", [2], indirect=True)
def test_a_finished_run_that_may_only_be_read_can_be_loaded(common):
    for path in (common, *common.rglob("*")): path.chmod(0o555 if path.is_dir() else 0o444)
    assert unprivileged(lambda: train(config(), data(), common)) == 0


@pytest.mark.parametrize("common", [1], indirect=True)
@pytest.mark.parametrize("closed", ["", "checkpoints", "checkpoints/step-*/metadata.json", "metrics.jsonl"])
@pytest.mark.parametrize("writable", [False, True])
def test_files_without_permission_are_named_and_left_unchanged(common, closed, writable):
    """An unreadable file does not count as missing: no new training begins in its place, even where the rest is writable."""
    if writable:
        for path in (common, *common.rglob("*")): path.chmod(0o777 if path.is_dir() else 0o666)
    before = snapshot(common, times=False)
    for path in common.glob(closed) if closed else [common]: path.chmod(0)

    def work():
        with pytest.raises((CheckpointError, PermissionError)) as error: train(config(), data(), common)
        assert not isinstance(error.value, CheckpointError) or "no permission to read" in str(error.value)
    assert unprivileged(work) == 0
    common.chmod(0o755)
    for path in common.rglob("*"): path.chmod(0o755)
    assert snapshot(common, times=False) == before


def test_a_missing_history_leaves_the_others_unchanged(tmp_path):
    """After a kill past the last checkpoint, histories are truncated only if none is missing."""
    assert in_child(lambda: train(config(), data(), tmp_path / "out", on_update=die_at(8))) == -signal.SIGKILL
    (tmp_path / "out" / "validation.jsonl").unlink()
    before = snapshot(tmp_path / "out", times=False)
    with pytest.raises(ValueError, match="validation.jsonl is shorter"): train(config(), data(), tmp_path / "out")
    assert snapshot(tmp_path / "out", times=False) == before


def test_a_walk_forward_killed_while_its_folder_is_created_can_be_resumed(walk_forward, tmp_path):
    """Killed at each rename and new folder before its first training; the same call resumes it."""
    call, whole = walk_forward
    for number in range(1, 9):
        def work(number=number):
            die_at_operation(number, "mkdir", "replace", "rename")
            call(tmp_path / str(number), die_at(1))
        assert in_child(work) == -signal.SIGKILL
        assert in_child(lambda number=number: call(tmp_path / str(number), die_at(2))) == -signal.SIGKILL, number
    assert in_child(lambda: call(tmp_path / "3")) == 0
    one, other = reproducible(whole), reproducible(tmp_path / "3")
    assert one.keys() == other.keys() and [name for name in one if one[name] != other[name]] == []


def test_a_walk_forward_in_use_is_refused(walk_forward, tmp_path):
    call, _ = walk_forward

    def run_again(run, record):
        with pytest.raises(ValueError, match="out is in use by another process"): call(tmp_path / "out")
        raise InterruptedError
    with pytest.raises(InterruptedError): call(tmp_path / "out", run_again)
