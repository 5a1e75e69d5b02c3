"""Trackers beside trainings that are killed, go back, follow each other; what they wrote is read back with their own readers."""

import gc
import json
import logging
import os
import random
import signal
import socket
import sqlite3
import sys
import warnings
import weakref
from contextlib import chdir, closing
from pathlib import Path

import pytest
from helpers import in_child
from test_resume import config, data, outcome
from test_trouble import spoil  # noqa: F401

from cryptopredict import tbptt_trainer, track
from cryptopredict.tbptt_trainer import Run, steps_per_epoch, train
from cryptopredict.track import NAMES, LiveLoss, MLflow, TensorBoard, Tracker, together

pytest.importorskip("tensorboard")
pytest.importorskip("mlflow")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
from mlflow.tracking import MlflowClient  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")
TRACKERS = ("TensorBoard", "MLflow")


def lines(out: Path, name: str) -> list[dict]:
    """A history, empty where there is none."""
    path = out / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def due(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Each curve a tracker has to hold of a training, as the training's own histories tell it."""
    curves = {}
    for r in lines(out, "metrics"):
        for key in NAMES.keys() & r.keys(): curves.setdefault(NAMES[key], []).append((r["step"], float(r[key])))
    for r in lines(out, "validation"):
        for key in r.keys() - {"epoch", "step"}: curves.setdefault(f"validation/{key}", []).append((r["step"], r[key]))
    return curves


def from_tensorboard(root: Path, out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def mlflow_run(root: Path, out: Path):
    """The one MLflow run of a folder."""
    client = MlflowClient(f"sqlite:///{root}/runs.db")
    experiment = client.get_experiment_by_name("cryptopredict").experiment_id
    run, = client.search_runs([experiment], f"tags.`cryptopredict.folder` = '{out.resolve()}'")
    return client, run


def from_mlflow(root: Path, out: Path) -> dict[str, list[tuple[int, float]]]:
    """What MLflow's client finds; its latest metrics must be the last of each."""
    client, run = mlflow_run(root, out)
    curves = {k: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, k)) for k in run.data.metrics}
    assert {key: curve[-1][1] for key, curve in curves.items()} == run.data.metrics
    return curves


def make(kind: str, root: Path) -> Tracker:
    """A tracker of a kind."""
    return TensorBoard() if kind == "TensorBoard" else MLflow(root / "runs.db")


def check(kind: str, root: Path, out: Path) -> None:
    """Every step once, in order, with the value in the histories: to float32 in TensorBoard, to the bit in MLflow."""
    held, want = (from_tensorboard if kind == "TensorBoard" else from_mlflow)(root, out), due(out)
    assert {name for name in held if name.partition("/")[0] not in ("speed", "memory")} == want.keys()
    for name, curve in want.items():
        assert [step for step, _ in held[name]] == [step for step, _ in curve], name
        error = 2**-24 if kind == "TensorBoard" else 0
        assert all(abs(a - b) <= error * abs(b) for (_, a), (_, b) in zip(held[name], curve)), name
    for name in held.keys() - want.keys():
        steps = [step for step, _ in held[name]]
        assert len(set(steps)) == len(steps), name


def die(*_) -> None: os.kill(os.getpid(), signal.SIGKILL)


def die_at(step: int):
    """A watcher that kills its process."""
    return lambda run, record: die() if run.step == step else None


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A training nobody follows."""
    out = tmp_path_factory.mktemp("alone")
    train(config(), data(), out)
    return out


@pytest.mark.parametrize("kind", TRACKERS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 8))])
def test_killed_at_random_and_gone_on_with(alone, tmp_path, kind, seed):
    draw, steps, statuses = random.Random(seed), Run.load(alone).step, []
    for end in [*sorted(draw.sample(range(1, steps), 4)), 0]:
        def work(end=end):
            with make(kind, tmp_path) as tracker:
                # Killed before its tracker hears of an update, or after.
                both = (die_at(end), tracker) if end % 2 else (tracker, die_at(end))
                train(config(), data(), tmp_path / "out", progress=together(*both))
        statuses.append(in_child(work))
    assert statuses == [-signal.SIGKILL] * 4 + [0]
    check(kind, tmp_path, tmp_path / "out")
    assert outcome(tmp_path / "out") == outcome(alone), "a tracker does not change a training"


@pytest.mark.parametrize("kind", TRACKERS)
def test_killed_inside_a_write(tmp_path, kind):
    """Half a record in an event file; numbers that are in the database and not in the histories the training goes on from."""
    def work():
        plain = RecordWriter.write

        def half(self, record, left=[9]):  # noqa: B006
            left[0] -= 1
            if left[0]: return plain(self, record)
            self._writer.write(b"\x40\0\0\0\0\0\0\0half")
            self._writer.flush()
            die()
        RecordWriter.write, MLflow.updates = half, 1
        with make(kind, tmp_path) as tracker: train(config(), data(), tmp_path / "out", progress=together(tracker, die_at(8)))
    assert in_child(work) == -signal.SIGKILL
    with make(kind, tmp_path) as tracker: train(config(), data(), tmp_path / "out", progress=tracker)
    check(kind, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("kind", TRACKERS)
@pytest.mark.parametrize("past_validation", [False, True])
def test_gone_back_then_killed(spoil, tmp_path, kind, past_validation):  # noqa: F811
    """Back by some updates, or from the first of an epoch into the one before, its validation with it."""
    c, fold, seen = config(epochs=6), data(), []
    at = 4 * steps_per_epoch(c, fold) + 1 + 4 * (not past_validation)
    spoil({at - 1}, 1e5, 1)

    def work():
        MLflow.updates = 1  # all that is taken back was written
        kill = lambda run, record: die() if run.guard["rewinds"] and run.step == at - 1 else None
        with make(kind, tmp_path) as tracker: train(c, fold, tmp_path / "out", progress=together(tracker, kill))
    assert in_child(work) == -signal.SIGKILL
    event, = lines(tmp_path / "out", "events")
    assert (event["event"], event["at"]) == ("rewind", at) and event["step"] < at - 1
    assert (event["epoch"] < 4) == past_validation
    with make(kind, tmp_path) as tracker:
        train(c, fold, tmp_path / "out", progress=together(tracker, lambda run, _: seen.append(run.step)))
    check(kind, tmp_path, tmp_path / "out")
    held = due(tmp_path / "out")["loss/total"]
    assert max(value for _, value in held) < 1e3 and seen[0] < at and held[-1][0] == seen[-1]


def test_several_trainings_in_a_row_leave_nothing_beside(tmp_path, monkeypatch):
    """All trackers at once, from one training to the next; no connection, no folder in the current directory."""
    def refuse(*args): raise AssertionError("a connection")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "here").mkdir()
    outs = [Path(f"fold-0{k}") / "seed-0" for k in range(2)]
    with chdir(tmp_path / "here"):
        with together(*(make(kind, tmp_path) for kind in TRACKERS), TensorBoard("board"), LiveLoss()) as watch:
            for k, out in enumerate(outs): train(config(seed=k), data(), out, progress=watch)
        for kind in TRACKERS:
            for out in outs: check(kind, tmp_path, out.resolve())
        assert sorted(p.name for p in Path().iterdir()) == ["board", "fold-00", "fold-01"]
        kept = EventAccumulator("board/fold-01/seed-0", size_guidance={"scalars": 0}).Reload().Scalars("loss/total")
        live = watch.watchers[-1]
        assert live.figure.layout.title.text == "Losses of fold-01/seed-0"
        assert [e.step for e in kept] == list(live.figure.data[0].x) == [r["step"] for r in lines(outs[1], "metrics")]
    client, run = mlflow_run(tmp_path, tmp_path / "here" / outs[0])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "here/fold-00/seed-0")
    assert (run.data.params["seed"], run.data.params["model.d_model"]) == ("0", "16")


def test_a_tracker_that_came_late_holds_everything(tmp_path):
    train(config(), data(), tmp_path / "out", until=1)
    with together(*(make(kind, tmp_path) for kind in TRACKERS)) as watch:
        train(config(), data(), tmp_path / "out", progress=watch)
    for kind in TRACKERS: check(kind, tmp_path, tmp_path / "out")


def test_an_error_marks_the_run_and_going_on_unmarks_it(tmp_path):
    def fail(run, record):
        if run.step == 5: raise RuntimeError
    with pytest.raises(RuntimeError), together(MLflow(tmp_path / "runs.db"), fail) as watch:
        train(config(), data(), tmp_path / "out", progress=watch)
    before = mlflow_run(tmp_path, tmp_path / "out")[1].info
    with MLflow(tmp_path / "runs.db") as watch: train(config(), data(), tmp_path / "out", progress=watch)
    after = mlflow_run(tmp_path, tmp_path / "out")[1].info
    assert (before.status, after.status) == ("FAILED", "FINISHED") and before.run_id == after.run_id


def trained(tmp_path: Path, tracker) -> list[str]:
    """Train to the end with a tracker that fails, and give the warnings."""
    with warnings.catch_warnings(record=True) as heard, tracker:
        warnings.simplefilter("always")
        train(config(), data(), tmp_path / "out", progress=tracker)
    return [str(w.message) for w in heard if "follows no further" in str(w.message)]


def test_a_full_disk_ends_the_tracker_and_not_the_training(alone, tmp_path, monkeypatch):
    if not Path("/dev/full").exists(): pytest.skip("no /dev/full")
    monkeypatch.setattr(track, "_event_file", lambda place, step: RecordWriter(open("/dev/full", "wb")))
    heard = trained(tmp_path, TensorBoard())
    assert len(heard) == 1 and heard[0].startswith("TensorBoard failed") and "No space left" in heard[0]
    assert outcome(tmp_path / "out") == outcome(alone)


def test_a_locked_database_ends_the_tracker_and_not_the_training(alone, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(MLflow, "patience", .2)
    tracker = MLflow(tmp_path / "runs.db")
    with closing(sqlite3.connect(tmp_path / "runs.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        heard = trained(tmp_path, tracker)
    assert len(heard) == 1 and heard[0].startswith("MLflow failed") and heard[0].endswith("database is locked")
    assert capfd.readouterr() == ("", "")
    assert outcome(tmp_path / "out") == outcome(alone)


def test_a_package_that_is_not_there(monkeypatch, tmp_path):
    for module, work in (("tensorboard", TensorBoard), ("mlflow.tracking", lambda: MLflow(tmp_path / "runs.db"))):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, module, None)
            with pytest.raises(ValueError, match=r"needs the package .*: pip install 'cryptopredict\[track\]'"): work()
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_done_with_does_not_stay(tmp_path):
    tracker = LiveLoss()
    run = weakref.ref(train(config(epochs=1), data(), tmp_path / "out", progress=tracker))
    gc.collect()
    assert run() is None and tracker.out is not None


CELL = """from pathlib import Path
from test_resume import config, data
from cryptopredict.track import LiveLoss
from cryptopredict.tbptt_trainer import train
try:
    with LiveLoss(every=0) as live:
        train(config(), data(), {out!r}, progress=lambda run, record: (live(run, record), 1 / (run.step - 12)))
except ZeroDivisionError: pass"""


def test_in_a_notebook_one_figure_stands_and_is_replaced(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.format(out=str(tmp_path / "out")))])
    place = {"metadata": {"path": Path(__file__).parent}}
    heard = []
    client = nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3", resources=place)
    plain, client.process_message = client.process_message, None

    def process(message, cell, index):
        heard.append(message["header"]["msg_type"])
        return plain(message, cell, index)
    client.process_message = process
    client.execute()
    shown, = [o["data"] for o in notebook.cells[0].outputs if o["output_type"] == "display_data"]
    assert heard.count("display_data") == 1 and heard.count("update_display_data") >= 1
    figure = next(v for k, v in shown.items() if "plotly" in k or k == "text/html")
    figure = figure if isinstance(figure, str) else json.dumps(figure)
    assert '"x": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]' in figure.replace(",", ", ").replace(",  ", ", ").replace('":[', '": [')


def test_without_a_notebook_nothing_is_drawn(tmp_path, capfd):
    with LiveLoss(every=0) as live: train(config(epochs=1), data(), tmp_path / "out", progress=live)
    assert capfd.readouterr() == ("", "")
    assert list(live.figure.data[0].x) == [r["step"] for r in lines(tmp_path / "out", "metrics")]
    assert tbptt_trainer.HISTORIES and live.handle is None
