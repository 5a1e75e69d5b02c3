"Trackers on their own: names of curves, the live figure, where TensorBoard and MLflow write, places that cannot be used."
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cryptopredict import tbptt_trainer
from cryptopredict.labels import TASKS
from cryptopredict.multitask import Targets
from cryptopredict.storage import TrainingFolder
from cryptopredict.streams import FoldData
from cryptopredict.tbptt_trainer import Run, train, train_preset
from cryptopredict.track import (
    LiveLoss,
    MLflow,
    TensorBoard,
    Tracker,
    Training,
    in_notebook,
    loss_figure,
    scalars,
    tracking_uri,
    validation_scalars,
)

IPython = pytest.importorskip("IPython")
pytest.importorskip("tensorboard")
pytest.importorskip("mlflow")
CONFIG = train_preset("tiny", 6, batch=4, tbptt_len=64, epochs=2, save_every=3)
UPDATE = dict(loss=3., cls=1., p10=.1, p90=.1, vol=.2, lr=1e-3)


def toy() -> FoldData:
    "Two thousand hours of invented numbers, the last hundred for validation."
    hours, draw = torch.arange(2000.), torch.Generator().manual_seed(0)
    valid = Targets(torch.where(hours > 1900, 1., torch.nan), *[torch.where(hours > 1900, .5, torch.nan)] * 3)
    return FoldData(torch.randn(2000, 6, generator=draw), Targets(*[hours % 3] * 4), valid, None, 0, 1800)


def lines(out: Path, name: str) -> list[dict]:
    "A history of a training."
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


class Memory(Tracker):
    "Keeps every number by step and name; a number that is sent twice fails."
    def __init__(self):
        super().__init__()
        self.kept, self.calls = {}, []

    def open(self, training):
        self.at = self.kept.setdefault(training.folder.path.name, {})
        for key in [key for key in self.at if key[0] >= training.step]: del self.at[key]
        self.calls.append(training.step)
        return {s for s, key in self.at if key == "loss/total"}, {s for s, key in self.at if key == "validation/total"}

    def put(self, step, values):
        for name, value in values.items():
            if (step, name) in self.at: raise AssertionError("twice")
            self.at[step, name] = value

    def end(self): self.calls.append("end")


def holds_all(kept: dict, out: Path) -> bool:
    "Nothing is missing, nothing but speed and memory is there besides, and values are equal."
    due = [(r["step"], scalars(r)) for r in lines(out, "metrics")]
    due += [(r["step"], validation_scalars(r)) for r in lines(out, "validation")]
    expected = {(step, name): value for step, values in due for name, value in values.items()}
    more = {name.partition("/")[0] for _, name in kept.keys() - expected.keys()}
    return expected.items() <= kept.items() and more <= {"speed", "memory"}


def test_numbers_have_the_names_of_their_curves():
    record = dict(loss=torch.tensor(1.5), skipped=torch.tensor(False), lr=1e-3, steps=9, step=3)
    assert scalars(record) == {"loss/total": 1.5, "skipped": 0., "lr": 1e-3}
    assert validation_scalars(dict(epoch=0, step=3, total=1.5)) == {"validation/total": 1.5}


class Stopped(Exception):
    "Ends a training in the middle."


def test_a_tracker_follows_from_one_training_to_a_resumed_one(tmp_path):
    memory = Memory()

    def stop(run, record):
        memory(run, record)
        if run.step == 9: raise Stopped
    train(CONFIG, toy(), tmp_path / "one", on_update=memory)
    with pytest.raises(Stopped): train(CONFIG, toy(), tmp_path / "two", on_update=stop)
    for key in [key for key in memory.kept["two"] if key[0] > 5]: del memory.kept["two"][key]  # not yet written when it stopped
    train(CONFIG, toy(), tmp_path / "two", on_update=memory)
    memory.close()
    assert holds_all(memory.kept["one"], tmp_path / "one") and holds_all(memory.kept["two"], tmp_path / "two")
    assert memory.calls == [1, "end", 1, "end", 7, "end"]


def test_rewound_updates_are_removed(tmp_path, monkeypatch):
    plain, left, memory = tbptt_trainer.train_step, [1], Memory()

    def spoiled(run, *args):
        state, record = plain(run, *args)
        if run.step == 27 and left: record["loss"] = record["loss"] * 0 + 1e4 * left.pop()
        return state, record
    monkeypatch.setattr(tbptt_trainer, "train_step", spoiled)
    train(replace(CONFIG, epochs=8), toy(), tmp_path / "spike", on_update=memory)
    memory.close()
    event = lines(tmp_path / "spike", "events")[0]
    assert (event["event"], event["at"], memory.calls) == ("rewind", 27, [1, "end", event["step"] + 1, "end"])
    assert holds_all(memory.kept["spike"], tmp_path / "spike")
    assert max(v for (_, name), v in memory.kept["spike"].items() if name == "loss/total") < 1e3


def test_the_figure_draws_each_loss_their_sum_and_the_learning_rate():
    fig = loss_figure([(1, scalars(UPDATE))], [(0, {f"validation/{task}": 1. for task in (*TASKS, "total")})], "title")
    assert [t.y for t in fig.data] == [(1.,), (1.,), (.1,), (1.,), (.1,), (1.,), (.2,), (1.,), (3.,), (3.2,), (1.,), (.001,)]


def test_the_figure_of_a_long_training_is_thinned_and_ends_with_the_last_update():
    fig = loss_figure([(k, scalars(UPDATE)) for k in range(10_000)], [], "")
    assert len(fig.data[0].x) == 501 and fig.data[0].x[-1] == 9999


@pytest.mark.parametrize("ipython, due", [(None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=1), True)],
                         ids=["plain python", "terminal", "notebook"])
def test_only_a_kernel_counts_as_a_notebook(monkeypatch, ipython, due):
    monkeypatch.setattr(IPython, "get_ipython", lambda: ipython)
    assert in_notebook() == due


def test_the_figure_is_redrawn_at_most_once_per_interval(monkeypatch, tmp_path):
    import IPython.display
    calls, clock = [], [0.]
    handle = SimpleNamespace(update=lambda bundle, raw: calls.append("update"))
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw, display_id: calls.append("display") or handle)
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=1))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    live, run = LiveLoss(every=10.), Run(CONFIG, tmp_path / "nothing")
    for second in range(25):
        run.step, clock[0] = run.step + 1, 100. + second
        live(run, UPDATE)
    assert calls == ["display", "update", "update"], "after 0, 10 and 20 seconds"
    live.close()
    assert (calls[3:], len(live.figure.data[0].x)) == (["update"], 25)


def test_an_impossible_interval_is_an_error():
    with pytest.raises(ValueError, match="every is -1: must be seconds"): LiveLoss(every=-1)


def test_the_figure_before_any_update_says_so():
    assert LiveLoss().figure.layout.title.text == "No update yet"


def test_event_files_go_to_one_folder_per_training(tmp_path):
    base = tmp_path.resolve()
    assert TensorBoard().place(base / "a") == base / "a" / "tensorboard"
    assert TensorBoard(base / "board").place(base / "a" / "seed-0") == base / "board" / "a" / "seed-0"


@pytest.mark.parametrize("place, uri", [("http://host:5000", "http://host:5000"), ("sqlite:////a/b.db", "sqlite:////a/b.db")])
def test_a_tracking_uri_is_unchanged(place, uri):
    assert tracking_uri(place) == uri


def test_a_file_is_a_database_and_a_folder_a_store():
    assert tracking_uri("runs.db").startswith("sqlite:////") and tracking_uri("mlruns").startswith("file:///")


def test_a_training_is_identified_by_its_configuration(tmp_path):
    one, other = (Training(TrainingFolder(tmp_path / "one"), 0, 0, asdict(c), None) for c in (CONFIG, replace(CONFIG, seed=1)))
    tracker = MLflow(tmp_path / "never.db")
    assert tracker.identity(one) == tracker.identity(one) != tracker.identity(other)


@pytest.mark.parametrize("place", ["text.db", "text.db/runs.db"], ids=["no database", "below a file"])
def test_a_place_that_cannot_hold_a_database_is_an_error(tmp_path, place):
    (tmp_path / "text.db").write_text("no database " * 100)
    with pytest.raises(ValueError, match=f"{place} cannot be used as MLflow's tracking URI: choose another"):
        MLflow(tmp_path / place)


def test_a_server_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="http://127.0.0.1:9 cannot be used as MLflow's tracking URI"): MLflow("http://127.0.0.1:9")
    assert not list(tmp_path.iterdir()), "the address is no name of a folder"


def test_a_database_without_its_package_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "alembic", None)
    with pytest.raises(ValueError, match="MLflow needs the package alembic"): MLflow(tmp_path / "other.db")
