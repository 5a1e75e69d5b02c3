"What a run leaves on disk: atomic writes, orphans, histories, TOML, locks, signals, and the refusal of another run."
import json
import os
import re
import signal
import tomllib
import warnings

import pytest

from cryptopredict.storage import (
    DeferredSignals,
    FitFolder,
    RunFolder,
    Terminated,
    TrainingFolder,
    append_jsonl,
    code_commit,
    code_hash,
    exclusive_lock,
    flatten_keys,
    is_locked,
    new_folder,
    read_jsonl,
    remove_orphans,
    require_same_run,
    sigterm_raises,
    to_toml,
    warn_code_changed,
    write_atomic,
    write_flushed,
)

DEAD = 999999999  # no system has a process with this id


def test_a_written_file_is_described_by_its_size_and_sha256(tmp_path):
    written = write_flushed(tmp_path / "abc", b"abc")
    assert written["size"] == 3 and written["sha256"].startswith("ba7816bf8f01cfea"), "the example of FIPS 180"


def test_an_atomic_write_replaces_the_file_and_leaves_no_other(tmp_path):
    for content in ("one", b"two"): write_atomic(tmp_path / "a.txt", content)
    assert (tmp_path / "a.txt").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_atomic_write_keeps_the_old_content(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a.txt", "old")
    def fail(*_): raise OSError("No space left on device")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"): write_atomic(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_only_temporary_files_of_dead_writers_are_removed(tmp_path):
    kept = [f"a.toml.{os.getppid()}.1.tmp", "mine.tmp", f"notes.{DEAD}.tmp"]
    for name in (*kept, f"a.toml.{DEAD}.1.tmp"): (tmp_path / name).touch()
    (tmp_path / f".step-7.{DEAD}.tmp").mkdir()
    assert sorted(p.name for p in remove_orphans(tmp_path)) == [f".step-7.{DEAD}.tmp", f"a.toml.{DEAD}.1.tmp"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_a_history_is_read_without_a_line_that_was_cut_short(tmp_path):
    history = tmp_path / "metrics.jsonl"
    assert read_jsonl(history) == []
    for step in (1, 2): append_jsonl(history, dict(step=step, loss=1 / step))
    history.write_text(history.read_text() + '{"step": 3, "lo')
    assert read_jsonl(history) == [dict(step=1, loss=1.), dict(step=2, loss=.5)]


def test_toml_reads_back_as_what_was_written():
    values = dict(lr=1e-4, names=["a", "ü\n"], none=None, off=[True, float("inf")], model=dict(width=64, deep={"x y": "z"}))
    assert tomllib.loads(to_toml(values)) == {k: v for k, v in values.items() if v is not None}
    with pytest.raises(ValueError, match="use numbers, text, or lists"): to_toml(dict(a=[None]))


def test_a_folder_is_locked_by_one_process_only(tmp_path):
    with exclusive_lock(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(ValueError, match="in use by another process"), exclusive_lock(tmp_path): pass
    assert not is_locked(tmp_path) and not is_locked(tmp_path / "none") and not (tmp_path / "none").exists()


def test_a_new_folder_never_exists_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        names.append(new_folder("run"))
        names[-1].mkdir(parents=True)
    assert len(set(names)) == 3 and all(name.parts[0] == "runs" and name.name.startswith("run-") for name in names)


def test_a_deferred_signal_acts_when_it_is_raised_again():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with DeferredSignals() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert (signals.pending, heard) == (signal.SIGTERM, []), "recorded, not acted on"
            signals.raise_pending()
            assert (signals.pending, heard) == (None, [signal.SIGTERM])
            signal.raise_signal(signal.SIGTERM)
            assert heard == [signal.SIGTERM] * 2, "a second one acts at once"
    finally: signal.signal(signal.SIGTERM, before)


def test_sigterm_raises_and_its_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), sigterm_raises(): signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_paths_of_a_run():
    run = RunFolder("runs/a")
    assert run.part(3, "ewma", 0).as_posix() == "runs/a/parts/fold-03-ewma-0.parquet"
    assert run.part(3, "my.py:Mine", 0) != run.part(3, "my.py-Mine", 0), "two names do not share a file"
    assert run.fit(0).choice.as_posix() == "runs/a/network/fold-00/choice.json"
    assert TrainingFolder(run.fit(None).seed(1)).metrics.as_posix() == "runs/a/network/newest/seed-1/metrics.jsonl"


def test_trainings_of_a_fold_are_listed_by_number(tmp_path):
    for name in ("seed-10", "seed-2", "choice-0", "other-1"): (tmp_path / name).mkdir()
    (tmp_path / "seed-3").touch()
    trainings = FitFolder(tmp_path).trainings()
    assert [(t.path.name, t.is_choice) for t in trainings] == [("choice-0", True), ("seed-2", False), ("seed-10", False)]
    assert not FitFolder(tmp_path).is_foreign()


@pytest.mark.parametrize("names, foreign", [([], False), (["thesis.tex"], True), (["run.json.12.34.tmp"], False)])
def test_a_folder_of_others_is_recognised(tmp_path, names, foreign):
    for name in names: (tmp_path / name).touch()
    assert RunFolder(tmp_path).is_foreign() == foreign


def test_nested_settings_become_paths():
    assert flatten_keys(dict(a=1, b=dict(c=[2], d=dict(e=3)))) == {"a": 1, "b.c": [2], "b.d.e": 3}


@pytest.mark.parametrize("stored, current, words", [
    (dict(lr=.1), dict(lr=.2), "lr: 0.1 in the folder, 0.2 in this call"),
    (dict(names=["x", "y"]), dict(names=["y", "z"]), "names: x only in the folder, z only in this call"),
    (dict(names=["x", "y"]), dict(names=["x"]), "names: y only in the folder"),
    (dict(names=["x", "y"]), dict(names=["y", "x"]), "names: in another order"),
    (dict(), dict(lr=.2), "lr: None in the folder, 0.2 in this call"),
])
def test_the_first_difference_of_two_runs_is_named(stored, current, words):
    with pytest.raises(ValueError, match=re.escape(f"out holds another run ({words}): choose another output folder")):
        require_same_run("out", stored, current)


def test_the_same_run_is_not_refused():
    require_same_run("out", dict(lr=.1), dict(lr=.1))


def test_code_is_known_by_commit_and_hash():
    assert re.fullmatch(r"none|[0-9a-f]{12}(\+changes)?", code_commit()) and re.fullmatch(r"[0-9a-f]{64}", code_hash())


def test_changed_code_is_a_warning():
    with pytest.warns(RuntimeWarning, match=r"out was written by other code \(commit abc"):
        assert warn_code_changed("out", dict(commit="abc", code="other"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not warn_code_changed("out", dict(commit="abc", code=code_hash()))


def test_values_of_a_history_may_be_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    append_jsonl(tmp_path / "a.jsonl", dict(loss=torch.tensor(.5)))
    assert json.loads((tmp_path / "a.jsonl").read_text()) == dict(loss=.5)
