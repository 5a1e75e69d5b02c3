"The ledger of configurations: what counts as new, two writers at once, damaged lines, paths, the ledger of the repository."
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryptopredict.ledger import COLUMNS, LedgerEntry, canonical_json, ledger_path, read_ledger, read_lines, record, tried

ROOT = Path(__file__).parents[1]
ENTRY = LedgerEntry("ridge", dict(alpha=10, assets=["BTC", "ETH"]), dict(log_loss=1.04, qlike=.28), data="d", code="c",
                    begin="2018-01-01", end="2024-09-30", date="2025-01-31")


@pytest.fixture
def path(tmp_path) -> Path:
    "A ledger with one entry."
    record(tmp_path / "ledger.jsonl", [ENTRY])
    return tmp_path / "ledger.jsonl"


@pytest.mark.parametrize("change", [
    {}, dict(code="other"), dict(date="2026-01-01"), dict(settings=dict(assets=("BTC", "ETH"), alpha=np.int64(10))),
    dict(scores=dict(log_loss=1.04 * (1 + 1e-12), qlike=.28)), dict(scores=dict(log_loss=1.04, qlike=.28, brier=.6)),
], ids=["nothing", "code", "date", "order and types of settings", "rounding", "another score"])
def test_a_repeated_run_adds_nothing(path, change):
    before = path.read_bytes()
    assert record(path, [replace(ENTRY, **change)]) == 0 and path.read_bytes() == before


@pytest.mark.parametrize("change", [
    dict(scores=dict(log_loss=1.04 * (1 + 1e-8), qlike=.28)), dict(scores=dict(log_loss=1.04, qlike=np.inf)), dict(data="e"),
    dict(settings=dict(alpha=20, assets=["BTC", "ETH"])), dict(settings=dict(alpha=10, assets=["ETH", "BTC"])),
    dict(model="lasso"), dict(scores=dict(brier=.6)),
], ids=["a score", "an infinite score", "data", "a setting", "order of assets", "model", "no score in common"])
def test_new_settings_data_or_scores_are_added(path, change):
    before = path.read_bytes()
    assert record(path, [replace(ENTRY, **change)]) == 1 and tried(path) == 2
    assert path.read_bytes().startswith(before), "earlier lines are not touched"


def test_equal_entries_of_one_call_are_added_once(tmp_path):
    unscored = replace(ENTRY, scores=dict(log_loss=np.nan, qlike=np.inf))
    assert record(tmp_path / "ledger.jsonl", [ENTRY, ENTRY, unscored, unscored]) == 2
    assert read_lines(tmp_path / "ledger.jsonl")[1]["scores"] == dict(log_loss=None, qlike=None)


def test_an_entry_names_configuration_code_and_days(path):
    row = read_ledger(path).iloc[0]
    assert list(row.index) == COLUMNS and len(row.configuration) == 64 and row.settings == ENTRY.settings
    entry = replace(ENTRY, begin=pd.Timestamp("2018-01-01", tz="UTC"), end=pd.Timestamp("2024-09-30", tz="UTC"))
    assert entry.to_dict() == ENTRY.to_dict() and (row.begin, row.end) == ("2018-01-01", "2024-09-30")
    fresh = LedgerEntry("m", {}, {}, data="d", begin="2018-01-01", end="2018-01-02")
    assert len(fresh.code) == 64 and pd.Timestamp(fresh.date, tz="UTC") <= pd.Timestamp.now("UTC") and fresh.count == 1


@pytest.mark.parametrize("settings", [dict(alpha=np.nan), dict(model=object())], ids=["NaN", "object"])
def test_settings_that_are_not_json_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match="settings of model ridge cannot be written as JSON .*: use finite numbers"):
        record(tmp_path / "ledger.jsonl", [ENTRY, replace(ENTRY, settings=settings)])
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_missing_folder_is_created_and_no_ledger_counts_zero(tmp_path):
    path = tmp_path / "runs" / "of" / "mine" / "ledger.jsonl"
    assert tried(path) == 0 and list(read_ledger(path).columns) == COLUMNS and not path.parent.exists()
    assert record(path, [ENTRY]) == 1 and tried(path) == 1


WRITER = """
import sys
from dataclasses import replace
from cryptopredict.ledger import LedgerEntry, record
path, name, number = sys.argv[1:]
for k in range(int(number)):
    record(path, [LedgerEntry(name, dict(k=k), dict(log_loss=1.), data="d", code="c", begin="2018-01-01", end="2018-01-02")])
"""


def test_two_processes_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "ledger.jsonl"
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, name, "40"], env=env) for name in ("one", "two")]
    assert [w.wait(timeout=120) for w in writers] == [0, 0]
    lines = pd.DataFrame(read_lines(path))
    assert lines.groupby("model").size().to_dict() == dict(one=40, two=40)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["ledger.jsonl"]


def test_a_lock_that_is_not_released_is_named(path):
    from filelock import FileLock
    with FileLock(path.with_name("ledger.jsonl.lock")):
        with pytest.raises(ValueError, match="ledger .* has been locked by another process for 0.1 s: try again, or set the env"):
            record(path, [replace(ENTRY, data="e")], timeout=.1)
    assert record(path, [replace(ENTRY, data="e")]) == 1


@pytest.mark.parametrize("line", [
    "{", "<<<<<<< HEAD", "[]", "3", '{"count": 1}', b"\xff", '{"configuration": "a", "data": "d", "scores": {}}',
    '{"configuration": "a", "data": "d", "scores": {}, "count": 0}', '{"data": "d", "scores": {}, "count": 1}',
    '{"configuration": "a", "data": "d", "scores": null, "count": 1}',
])
def test_a_damaged_line_is_named_and_nothing_written(path, line):
    good = path.read_bytes()
    path.write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    before = path.read_bytes()
    for act in (lambda: record(path, [replace(ENTRY, data="e")]), lambda: tried(path), lambda: read_ledger(path)):
        with pytest.raises(ValueError, match=r"ledger.jsonl, line 2 is damaged: correct that line, or restore"): act()
    assert path.read_bytes() == before


@pytest.mark.parametrize("end", [b"", b"\n\n", b"\r\n"])
def test_a_last_line_without_newline_is_read(path, end):
    path.write_bytes(path.read_bytes().rstrip(b"\n") + end)
    assert record(path, [replace(ENTRY, data="e")]) == 1 and tried(path) == 2


def test_a_failed_write_keeps_the_ledger(path, monkeypatch):
    before = path.read_bytes()
    def fail(*_): raise OSError("No space left on device")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ValueError, match="No space left on device"): record(path, [replace(ENTRY, data="e")])
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_written_names_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "ledger.jsonl", tmp_path / "folder"):
        with pytest.raises(ValueError, match="ledger .* cannot be written .*: set the environment variable CRYPTOPREDICT_L"):
            record(path, [ENTRY])


def test_a_link_keeps_pointing_to_the_ledger(path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.jsonl"
    link.symlink_to(path)
    assert record(link, [ENTRY, replace(ENTRY, data="e")]) == 1
    assert link.is_symlink() and tried(path) == 2


def test_the_path_is_that_of_the_environment_then_results_then_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CRYPTOPREDICT_LEDGER", raising=False)
    (tmp_path / "results").mkdir()
    assert ledger_path() == Path("runs/ledger.jsonl"), "a folder without a ledger does not count"
    record("results/ledger.jsonl", [ENTRY])
    assert ledger_path() == Path("results/ledger.jsonl") and tried() == 1 and len(read_ledger()) == 1
    monkeypatch.setenv("CRYPTOPREDICT_LEDGER", "")
    assert ledger_path() == Path("results/ledger.jsonl"), "an empty variable is not set"
    monkeypatch.setenv("CRYPTOPREDICT_LEDGER", str(tmp_path / "team.jsonl"))
    assert ledger_path() == tmp_path / "team.jsonl" and tried() == 0


def test_canonical_json_does_not_depend_on_order():
    assert canonical_json(dict(b=[1, 2.5, None], a="ö")) == canonical_json(dict(a="ö", b=(1, np.float64(2.5), None)))
    assert canonical_json(dict(b=1, a=2)) == '{"a":2,"b":1}'


def test_the_ledger_of_the_repository_begins_with_271_configurations():
    first = read_lines(ROOT / "results" / "ledger.jsonl")[0]
    assert first["count"] == 271 and first["configuration"] is first["code"] is first["data"] is None
    assert (first["begin"], first["end"]) == ("2018-01-01", "2024-09-30")
    assert "156 of volatility, 115 of the band" in first["note"]
