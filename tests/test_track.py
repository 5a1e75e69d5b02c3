"""Trackers of trainings that are killed, rewound or run in a row, read back with TensorBoard and MLflow."""

import gc
import json
import logging
import os
import random
import signal
import socket
import sqlite3
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import chdir, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
from helpers import call_cli, in_child, one_line, shell, write
from trainings import config, data, die, die_at, history, outcome

from cryptopredict.tbptt_trainer import Run, steps_per_epoch, train
from cryptopredict.track import CURVES, CallbackList, LiveLoss, MLflow, TensorBoard, Tracker

pytest.importorskip("tensorboard")
pytest.importorskip("mlflow")
os.environ |= dict(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_ALLOW_FILE_STORE="true")
from mlflow.entities import Metric, Param, RunTag  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from mlflow.utils.proto_json_utils import message_to_json  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*fork")
TRACKERS = ("TensorBoard", "MLflow")


def expected_curves(out: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that a tracker must hold, from the histories of the training."""
    curves = {}
    for r in history(out, "metrics"):
        for key in CURVES.keys() & r.keys(): curves.setdefault(CURVES[key], []).append((r["step"], float(r[key])))
    for r in history(out, "validation"):
        for key in r.keys() - {"epoch", "step"}: curves.setdefault(f"validation/{key}", []).append((r["step"], r[key]))
    return curves


def from_tensorboard(root: Path, out: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that TensorBoard reads."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def mlflow_runs(uri: str, out: Path) -> tuple[MlflowClient, list]:
    """A client, and the MLflow runs of a training by the number of rewinds before each."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("cryptopredict").experiment_id
    runs = client.search_runs([experiment], f"tags.`cryptopredict.folder` = '{out.resolve()}'")
    runs = sorted(runs, key=lambda r: int(r.data.tags["cryptopredict.rewinds"]))
    assert [r.data.tags["cryptopredict.rewinds"] for r in runs] == [str(k) for k in range(len(runs))], "one run per rewind"
    parents = [r.data.tags.get("mlflow.parentRunId") for r in runs]
    assert parents == [None, *(r.info.run_id for r in runs[:-1])], "each run is the child of the run before its rewind"
    assert all(r.info.status == "KILLED" for r in runs[:-1])
    return client, runs


def curves_of(client: MlflowClient, run) -> dict[str, list[tuple[int, float]]]:
    """The curves of an MLflow run, whose latest metrics must be the last points."""
    curves = {k: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, k)) for k in run.data.metrics}
    assert {key: curve[-1][1] for key, curve in curves.items()} == run.data.metrics
    return curves


def from_mlflow(root: Path, out: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of a training after its last rewind that MLflow's client finds in the database."""
    client, runs = mlflow_runs(f"sqlite:///{root}/runs.db", out)
    return curves_of(client, runs[-1])


def make(kind: str, root: Path) -> Tracker:
    """A new tracker of the named kind."""
    return TensorBoard() if kind == "TensorBoard" else MLflow(root / "runs.db")


def check_curves(held: dict, out: Path, error: float = 0.) -> None:
    """Check that curves hold every step once, in order, with the values of the histories up to a relative error."""
    want = expected_curves(out)
    assert {name for name in held if name.partition("/")[0] not in ("speed", "memory")} == want.keys()
    for name, curve in want.items():
        assert [step for step, _ in held[name]] == [step for step, _ in curve], name
        assert all(abs(a - b) <= error * abs(b) for (_, a), (_, b) in zip(held[name], curve)), name
    for name in held.keys() - want.keys():
        steps = [step for step, _ in held[name]]
        assert len(set(steps)) == len(steps), name


def check(kind: str, root: Path, out: Path) -> None:
    """Check the curves of a tracker: TensorBoard rounds them to float32, MLflow keeps them exactly."""
    if kind == "TensorBoard": check_curves(from_tensorboard(root, out), out, 2**-24)
    else: check_curves(from_mlflow(root, out), out)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory) -> Path:
    """A database with MLflow's empty tables, which take seconds to create."""
    database = tmp_path_factory.mktemp("empty") / "runs.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture
def prepared(empty_database, tmp_path) -> None:
    """An empty database in the test's folder: `runs.db`, and `served.db` for a server."""
    with closing(sqlite3.connect(empty_database)) as source:
        for name in ("runs.db", "served.db"):
            with closing(sqlite3.connect(tmp_path / name)) as copy: source.backup(copy)


@pytest.mark.parametrize("kind", TRACKERS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(1, 8))])
def test_curves_are_complete_after_kills_at_random_steps(finished_training, tmp_path, kind, seed):
    draw, steps, statuses = random.Random(seed), Run.load(finished_training).step, []
    for end in [*sorted(draw.sample(range(1, steps), 4)), 0]:
        def work(end=end):
            with make(kind, tmp_path) as tracker:
                # Killed before the tracker gets the update, or after.
                both = (die_at(end), tracker) if end % 2 else (tracker, die_at(end))
                train(config(), data(), tmp_path / "out", on_update=CallbackList(*both))
        statuses.append(in_child(work))
    assert statuses == [-signal.SIGKILL] * 4 + [0]
    check(kind, tmp_path, tmp_path / "out")
    assert outcome(tmp_path / "out") == outcome(finished_training), "a tracker does not change a training"


@pytest.mark.parametrize("kind", TRACKERS)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("records", [9, 16])
def test_curves_are_complete_after_a_kill_inside_a_write(prepared, tmp_path, kind, late, records):
    """The kill leaves half a record in an event file, and points in the database past the newest checkpoint. A late tracker
    is killed while it copies the history of the training so far."""
    def work():
        plain = RecordWriter.write

        def half(self, record, left=[records]):  # noqa: B006
            left[0] -= 1
            if left[0]: return plain(self, record)
            self._writer.write(b"\x40\0\0\0\0\0\0\0half")
            self._writer.flush()
            die()
        RecordWriter.write, MLflow.updates = half, 1
        with make(kind, tmp_path) as tracker:
            train(config(), data(), tmp_path / "out", on_update=CallbackList(tracker, die_at(8)))
    if late: train(config(), data(), tmp_path / "out", until=1)
    assert in_child(work) == -signal.SIGKILL
    with make(kind, tmp_path) as tracker: train(config(), data(), tmp_path / "out", on_update=tracker)
    check(kind, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("kind", TRACKERS)
@pytest.mark.parametrize("past_validation", [False, True])
def test_curves_are_complete_after_a_rewind_and_a_kill(prepared, spoil, tmp_path, kind, past_validation):
    """A rewind of some updates, or from the first update of an epoch back across a validation."""
    c, fold, seen = config(epochs=6), data(), []
    at = 4 * steps_per_epoch(c, fold) + 1 + 4 * (not past_validation)
    spoil({at - 1}, 1e5, 1)

    def work():
        MLflow.updates = 1  # sends every update, also those rewound later
        kill = lambda run, record: die() if run.guard.rewinds and run.step == at - 1 else None
        with make(kind, tmp_path) as tracker: train(c, fold, tmp_path / "out", on_update=CallbackList(tracker, kill))
    assert in_child(work) == -signal.SIGKILL
    event, = history(tmp_path / "out", "events")
    assert (event["event"], event["at"]) == ("rewind", at) and event["step"] < at - 1
    assert (event["epoch"] < 4) == past_validation
    with make(kind, tmp_path) as tracker:
        train(c, fold, tmp_path / "out", on_update=CallbackList(tracker, lambda run, _: seen.append(run.step)))
    check(kind, tmp_path, tmp_path / "out")
    held = expected_curves(tmp_path / "out")["loss/total"]
    assert max(value for _, value in held) < 1e3 and seen[0] < at and held[-1][0] == seen[-1]


def test_trackers_of_several_trainings_write_only_into_their_folders(tmp_path, monkeypatch):
    """All trackers at once, over two trainings: no network, and no other folder in the current directory."""
    def refuse(*args): raise AssertionError("a connection")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "here").mkdir()
    outs = [Path(f"fold-0{k}") / "seed-0" for k in range(2)]
    with chdir(tmp_path / "here"):
        with CallbackList(*(make(kind, tmp_path) for kind in TRACKERS), TensorBoard("board"), LiveLoss()) as watch:
            for k, out in enumerate(outs): train(config(seed=k), data(), out, on_update=watch)
        for kind in TRACKERS:
            for out in outs: check(kind, tmp_path, out.resolve())
        assert sorted(p.name for p in Path().iterdir()) == ["board", "fold-00", "fold-01"]
        kept = EventAccumulator("board/fold-01/seed-0", size_guidance={"scalars": 0}).Reload().Scalars("loss/total")
        live = watch.callbacks[-1]
        assert live.figure.layout.title.text == "Losses of fold-01/seed-0"
        assert [e.step for e in kept] == list(live.figure.data[0].x) == [r["step"] for r in history(outs[1], "metrics")]
    _, (run,) = mlflow_runs(f"sqlite:///{tmp_path}/runs.db", tmp_path / "here" / outs[0])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "here/fold-00/seed-0")
    assert (run.data.params["seed"], run.data.params["model.d_model"]) == ("0", "16")


def test_a_tracker_that_starts_late_holds_the_whole_history(prepared, tmp_path):
    train(config(), data(), tmp_path / "out", until=1)
    with CallbackList(*(make(kind, tmp_path) for kind in TRACKERS)) as watch:
        train(config(), data(), tmp_path / "out", on_update=watch)
    for kind in TRACKERS: check(kind, tmp_path, tmp_path / "out")


def test_an_error_fails_the_mlflow_run_and_a_resume_finishes_it(prepared, tmp_path):
    def fail(run, record):
        if run.step == 5: raise RuntimeError
    with pytest.raises(RuntimeError), CallbackList(MLflow(tmp_path / "runs.db"), fail) as watch:
        train(config(), data(), tmp_path / "out", on_update=watch)
    uri = f"sqlite:///{tmp_path}/runs.db"
    before = mlflow_runs(uri, tmp_path / "out")[1][0].info
    with MLflow(tmp_path / "runs.db") as watch: train(config(), data(), tmp_path / "out", on_update=watch)
    after = mlflow_runs(uri, tmp_path / "out")[1][0].info
    assert (before.status, after.status) == ("FAILED", "FINISHED") and before.run_id == after.run_id


def warnings_of_training(tmp_path: Path, tracker) -> list[str]:
    """Train to the end with a tracker that fails; its warnings."""
    with warnings.catch_warnings(record=True) as caught, tracker:
        warnings.simplefilter("always")
        train(config(), data(), tmp_path / "out", on_update=tracker)
    return [str(w.message) for w in caught if "is disabled" in str(w.message)]


def test_a_full_disk_ends_the_tracker_and_not_the_training(finished_training, tmp_path, monkeypatch, capfd):
    if not Path("/dev/full").exists(): pytest.skip("no /dev/full")
    plain, tracebacks = RecordWriter.__init__, []
    monkeypatch.setattr(RecordWriter, "__init__", lambda self, writer: plain(self, open("/dev/full", "wb", buffering=0)))
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)  # by default printed to stderr
    found = warnings_of_training(tmp_path, TensorBoard())
    assert len(found) == 1 and found[0].startswith("TensorBoard failed") and "No space left" in found[0]
    assert outcome(tmp_path / "out") == outcome(finished_training)
    assert capfd.readouterr() == ("", "") and not tracebacks, "one warning, and nothing else is printed"


def test_a_locked_database_ends_the_tracker_and_not_the_training(finished_training, tmp_path, capfd):
    tracker = MLflow(tmp_path / "runs.db")
    with closing(sqlite3.connect(tmp_path / "runs.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        found = warnings_of_training(tmp_path, tracker)
    assert len(found) == 1 and found[0].startswith("MLflow failed") and found[0].endswith("database is locked")
    assert capfd.readouterr() == ("", "")
    assert outcome(tmp_path / "out") == outcome(finished_training)


class MLflowStub(BaseHTTPRequestHandler):
    """The part of MLflow's REST API that its client needs here, answered from a database by MLflow's own client."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None: pass

    def answer(self) -> None:
        if self.server.stopped:  # close connections that were kept open, too
            self.close_connection = True
            return
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = json.loads(body) if body else dict(parse_qsl(url.query))
        method = getattr(self, url.path.removeprefix("/api/2.0/mlflow/").replace("/", "_").replace("-", "_"), None)
        found = method(self.server.client, **request) if method else None
        content = dict(error_code="RESOURCE_DOES_NOT_EXIST", message=url.path) if found is None else found
        self.server.paths.append(url.path)
        self.send_response(404 if found is None else 200)
        data = json.dumps(content).encode()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = answer

    @staticmethod
    def plain(entity) -> dict: return json.loads(message_to_json(entity.to_proto()))

    def experiments_get_by_name(self, client, experiment_name):
        found = client.get_experiment_by_name(experiment_name)
        return None if found is None else dict(experiment=self.plain(found))

    def experiments_create(self, client, name, artifact_location=None, **_):
        return dict(experiment_id=client.create_experiment(name, artifact_location))

    def runs_create(self, client, experiment_id, start_time=None, tags=(), run_name=None, **_):
        tags = {tag["key"]: tag["value"] for tag in tags}
        return dict(run=self.plain(client.create_run(experiment_id, start_time, tags, run_name)))

    def runs_get(self, client, run_id, **_): return dict(run=self.plain(client.get_run(run_id)))

    def runs_update(self, client, run_id, status=None, end_time=None, run_name=None, **_):
        if end_time is None: client.update_run(run_id, status, run_name)
        else: client.set_terminated(run_id, status, int(end_time))
        return dict(run_info=json.loads(message_to_json(client.get_run(run_id).info.to_proto())))

    def runs_search(self, client, experiment_ids, filter="", order_by=None, **_):
        return dict(runs=[self.plain(run) for run in client.search_runs(experiment_ids, filter, order_by=order_by)])

    def runs_log_batch(self, client, run_id, metrics=(), params=(), tags=()):
        metrics = [Metric(m["key"], m["value"], int(m["timestamp"]), int(m["step"])) for m in metrics]
        client.log_batch(run_id, metrics, [Param(**p) for p in params], [RunTag(**t) for t in tags])
        return {}

    def metrics_get_history(self, client, run_id, metric_key, **_):
        return dict(metrics=[self.plain(m) for m in client.get_metric_history(run_id, metric_key)])


@contextmanager
def mlflow_server(database: Path) -> Iterator[ThreadingHTTPServer]:
    """A server of `MLflowStub` on a free port, with its address as `uri` and the requested paths as `paths`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), MLflowStub) as server:
        server.client, server.paths, server.stopped = MlflowClient(f"sqlite:///{database}"), [], False
        server.uri = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=[.05])
        thread.start()
        try: yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(params=["file", "sqlite", "http"])
def uri(request, tmp_path, monkeypatch) -> Iterator[str]:
    """A tracking URI of each kind."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if request.param == "http":
        request.getfixturevalue("prepared")
        with mlflow_server(tmp_path / "served.db") as server: yield server.uri
    else: yield (tmp_path / "mlruns").as_uri() if request.param == "file" else f"sqlite:///{tmp_path}/runs.db"


def test_mlflow_holds_every_curve_at_every_kind_of_uri(finished_training, uri, tmp_path, capfd):
    (tmp_path / "here").mkdir()
    with chdir(tmp_path / "here"):
        with MLflow(uri) as tracker: train(config(), data(), tmp_path / "out", on_update=tracker)
        assert not list(Path().iterdir()), "nothing in the current directory"
    assert capfd.readouterr() == ("", "")
    client, (run,) = mlflow_runs(uri, tmp_path / "out")
    check_curves(curves_of(client, run), tmp_path / "out")
    assert (run.info.status, run.data.params["model.d_model"]) == ("FINISHED", "16")
    assert outcome(tmp_path / "out") == outcome(finished_training), "a tracker does not change a training"


def test_a_rewind_starts_a_child_run(prepared, spoil, uri, tmp_path):
    spoil({28}, 1e5, 1)
    with MLflow(uri) as tracker: train(config(epochs=6), data(), tmp_path / "out", on_update=tracker)
    event, = history(tmp_path / "out", "events")
    client, (parent, child) = mlflow_runs(uri, tmp_path / "out")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, child.info.status) == ("KILLED", "FINISHED")
    check_curves(curves_of(client, child), tmp_path / "out")
    before = curves_of(client, parent)["loss/total"]
    assert [step for step, _ in before] == list(range(1, event["at"] + 1)) and before[-1][1] > 1e3, "the parent is kept as it was"


def test_the_command_takes_the_address_of_a_server(prepared, inputs, tmp_path, monkeypatch):
    """`--mlflow http://...` is not taken for the name of a folder."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sizes = ["d_model = 16", "headdim = 8", "mlp = 24", "n_layers = 1"]
    write(tmp_path / "c.toml", 'horizon = "5D"', 'vol_window = "2D"', 'validation = "60D"', 'first_test = "2017-08-01"',
          "epochs = 1", "validation_spans = 1", "[model]", *sizes, "[train]", "batch = 2", "tbptt_len = 128")
    (tmp_path / "here").mkdir()
    with mlflow_server(tmp_path / "served.db") as server:
        words = ["train", "--data", inputs / "good", "--config", tmp_path / "c.toml", "--out", "out", "--mlflow", server.uri]
        done = call_cli(*words, cwd=tmp_path / "here")
        assert done.returncode == 0, done.stderr
        assert "http:" not in done.stdout, "the client prints no links"
        assert [p.name for p in (tmp_path / "here").iterdir()] == ["out"]
        outs = sorted(p.parent for p in (tmp_path / "here" / "out").glob("*/metrics.jsonl"))
        assert outs
        for out in outs:
            client, (run,) = mlflow_runs(server.uri, out)
            check_curves(curves_of(client, run), out)
    assert any(path.endswith("/runs/log-batch") for path in server.paths)


def test_a_server_that_does_not_answer_is_an_error_before_the_training(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, so that no other process takes the port, but nobody listens
        # In a process of its own, since pytest captures what libraries log.
        done = shell("train", "--data", inputs / "good", "--out", "out", "--mlflow", uri, cwd=tmp_path)
    assert done.returncode == 2 and uri in one_line(done.stderr) and "tracking URI: choose another" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_server_that_stops_ends_the_tracker_and_not_the_training(prepared, finished_training, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(MLflow, "updates", 1)
    with mlflow_server(tmp_path / "served.db") as server:
        tracker = MLflow(server.uri)

        def stop(run, record):
            if run.step == 5:
                server.stopped = True
                server.shutdown()
                server.server_close()
            if run.step == 10: wait(tracker.sending, return_when=FIRST_EXCEPTION)
        found = warnings_of_training(tmp_path, CallbackList(tracker, stop))
    assert len(found) == 1 and found[0].startswith("MLflow failed")
    assert sum(not sending.done() for sending in tracker.sending) < 2, "the rest is not sent, so that the process can end"
    assert outcome(tmp_path / "out") == outcome(finished_training)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    for module, work in (("tensorboard", TensorBoard), ("mlflow.tracking", lambda: MLflow(tmp_path / "runs.db"))):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, module, None)
            with pytest.raises(ValueError, match=r"needs the package .*: pip install 'cryptopredict\[track\]'"): work()
    assert not list(tmp_path.iterdir())


def test_a_tracker_keeps_no_model_in_memory(tmp_path):
    tracker = LiveLoss()
    run = weakref.ref(train(config(epochs=1), data(), tmp_path / "out", on_update=tracker))
    gc.collect()
    assert run() is None and tracker.out is not None


CELL = """from pathlib import Path
from trainings import config, data
from cryptopredict.track import LiveLoss
from cryptopredict.tbptt_trainer import train
try:
    with LiveLoss(every=0) as live:
        train(config(), data(), {out!r}, on_update=lambda run, record: (live(run, record), 1 / (run.step - 12)))
except ZeroDivisionError: pass"""


def test_a_notebook_shows_one_figure_and_replaces_it(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.format(out=str(tmp_path / "out")))])
    place = {"metadata": {"path": Path(__file__).parent}}
    messages = []
    client = nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3", resources=place)
    plain, client.process_message = client.process_message, None

    def process(message, cell, index):
        messages.append(message["header"]["msg_type"])
        return plain(message, cell, index)
    client.process_message = process
    client.execute()
    shown, = [o["data"] for o in notebook.cells[0].outputs if o["output_type"] == "display_data"]
    assert messages.count("display_data") == 1 and messages.count("update_display_data") >= 1
    figure = next(v for k, v in shown.items() if "plotly" in k or k == "text/html")
    figure = figure if isinstance(figure, str) else json.dumps(figure)
    assert '"x": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]' in figure.replace(",", ", ").replace(",  ", ", ").replace('":[', '": [')


def test_outside_a_notebook_nothing_is_displayed(tmp_path, capfd):
    with LiveLoss(every=0) as live: train(config(epochs=1), data(), tmp_path / "out", on_update=live)
    assert capfd.readouterr() == ("", "")
    assert list(live.figure.data[0].x) == [r["step"] for r in history(tmp_path / "out", "metrics")]
    assert live.handle is None
