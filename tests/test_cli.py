"The commands called in this process: their flags, what they refuse, what they list. Processes are tested in test_shell.py."
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest

from cryptopredict import cli
from cryptopredict.cli import (
    AuditCommand,
    RunsCommand,
    SourceArgs,
    TrackingArgs,
    TrainCommand,
    WalkForwardArgs,
    default_settings,
    describe_trainings,
    is_users_mistake,
    judge_reports,
    main,
)
from cryptopredict.leakage import make_report
from cryptopredict.protocol import load_config
from cryptopredict.storage import exclusive_lock

SMALL = dict(models=("climatology", "log_har"), first_test="2017-10-01", step="200D")
CODE = """
def month(panel): return panel["close"].pct_change(24 * 30)
def tomorrow(panel): return panel["close"].pct_change(24).shift(-24)
def leaves(panel): raise SystemExit(0)
def raises(panel): return panel["no such column"]
number = 3
"""


def call(*words) -> tuple[int, str, str]:
    "Exit code, stdout and stderr of a command."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: code = main(list(map(str, words)))
        except SystemExit as stop: code = stop.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def code_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(CODE)
    return path


# --- flags --------------------------------------------------------------------------------------------------------------


def test_the_simulated_market_is_as_long_as_asked():
    loaded = SourceArgs(years=1).load(seed=3)
    assert (len(loaded.panel), loaded.name) == (24 * 365, "simulated market, 1 year, seed 3")
    with pytest.raises(ValueError, match="--years 51: must be between 1 and 50"): SourceArgs(years=51).load(0)


def test_a_folder_of_files_is_loaded_and_named(tmp_path, capsys):
    bars = (f"{1388534400 + 3600 * h},760,790,750,{close},5,9\n" for h, close in enumerate((760, 770, 780)))
    (tmp_path / "XBTUSD_60.csv").write_text("".join(bars))
    (tmp_path / "DGS10.txt").write_text("observation_date,DGS10\n2014-01-02,3.0\n")
    loaded = SourceArgs(data=tmp_path).load(0)
    assert (loaded.panel["close"].tolist(), loaded.tables, loaded.name) == ([760, 770, 780], [], "files XBTUSD_60.csv")
    assert "XBTUSD_60.csv" in (printed := capsys.readouterr().out) and "panel: 3 hours" in printed


def test_a_file_wins_over_the_preset(tmp_path):
    (tmp_path / "seeded.toml").write_text("seed = 3\n[train]\nlr = 0.5\n")
    config, named = default_settings(["--config", f"{tmp_path}/seeded.toml", "--preset", "mhsa", "--step", "YS"])
    assert (config.seed, config.train.lr, config.train.tbptt_len, named) == (3, .5, 512, False)


@pytest.mark.parametrize("words", [["--models", "ewma"], ["--models=ewma"]])
def test_models_named_by_flags_are_noticed(words):
    assert default_settings(words)[1]


@pytest.mark.parametrize("args, settings, known", [
    ({}, {}, True), (dict(data=Path(".")), {}, False), (dict(models_given=True), {}, False), ({}, dict(horizon="30D"), False)])
def test_the_truth_is_compared_on_the_simulated_market_with_the_usual_labels_only(args, settings, known):
    config = WalkForwardArgs(**args, settings=load_config(**settings)).configured()
    assert ("truth" in config.models) == known


def test_trackers_are_those_asked_for(tmp_path):
    assert TrackingArgs().trackers().callbacks == ()
    pytest.importorskip("tensorboard")
    pytest.importorskip("mlflow")
    both = TrackingArgs(tensorboard=True, mlflow=str(tmp_path / "mlflow.db")).trackers().callbacks
    assert [type(tracker).__name__ for tracker in both] == ["TensorBoard", "MLflow"]


@pytest.mark.parametrize("flag", [dict(tensorboard=True), dict(mlflow="other.db")])
def test_a_missing_tracking_package_is_named_with_its_remedy(flag, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("tensorboard", "mlflow", "mlflow.tracking"): monkeypatch.setitem(sys.modules, name, None)
    assert TrackingArgs().trackers().callbacks == ()
    with pytest.raises(ValueError, match=r"needs the package .*pip install 'cryptopredict.track.'"):
        TrackingArgs(**flag).trackers()


# --- audits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, code", [("month", 0), ("tomorrow", 1)])
def test_an_audit_exits_with_1_for_a_leak(code_file, name, code):
    ended, out, _ = call("audit", f"{code_file}:{name}", "--years", 1, "--n-cuts", 3)
    assert ended == code and ("no leak found" not in out) == bool(code)


@pytest.mark.parametrize("name, words", [("leaves", "fn raised SystemExit"), ("number", "is int: must be a function"),
                                         ("raises", "fn raised KeyError('no such column') on a frame of 8760 rows")])
def test_a_function_that_cannot_be_audited_is_named(code_file, name, words):
    code, _, err = call("audit", "--fn", f"{code_file}:{name}", "--years", 1)
    assert code == 2 and f"mine.py:{name}" in err and words in err and len(err.splitlines()) == 1


def test_a_certificate_is_kept_and_never_overwritten(code_file, tmp_path):
    out = tmp_path / "new" / "certificate.json"
    audit = AuditCommand(years=1, settings=load_config(**SMALL), what=f"{code_file}:month", n_cuts=3, out=out)
    assert audit() == 0
    kept = json.loads(out.read_text())
    assert kept["ok"] and list(kept["audits"]) == [f"{code_file}:month"]
    assert len(kept["provenance"]["function_file_sha256"]) == 64
    with pytest.raises(ValueError, match="certificate.json exists: choose another --out"): audit()


def test_reports_are_judged():
    leak = make_report([dict(column="a", kind="truncation")], dict(cuts=4))
    fine, untested = make_report([], dict(cuts=4)), make_report([], {"cuts": 4, "cuts without output": 3})
    assert judge_reports(dict(a=fine)) == 0 and judge_reports(dict(a=fine, b=leak, c=untested)) == 1
    with pytest.raises(ValueError, match="audit of b: .*use more data"): judge_reports(dict(a=fine, b=untested))


# --- trainings and runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    "A folder that holds a finished run and a finished training."
    folder = tmp_path_factory.mktemp("runs")
    settings = ['models = ["climatology", "log_har"]', 'first_test = "2017-10-01"', 'step = "200D"', "n_boot = 100"]
    (folder / "small.toml").write_text("\n".join(settings))
    code, _, err = call("evaluate", "--years", 3, "--config", folder / "small.toml", "--out", folder / "run")
    assert code == 0, err
    tracked = ["--tensorboard", "--mlflow", folder / "mlflow.db"] if _trackers_installed() else []
    code, out, err = call("train", "--years", 3, "--epochs", 1, "--horizon", "30D", "--out", folder / "train", *tracked)
    assert code == 0 and re.search(r"volatility (repeats|\(with) log_har", out.replace("\n    ", " ")), err
    return folder


def _trackers_installed() -> bool:
    try:
        import mlflow  # noqa: F401
        import tensorboard  # noqa: F401
    except ImportError: return False
    return True


def _listed(place: Path) -> str:
    code, out, err = call("runs", place)
    assert code == 0, err
    return out


def test_scores_are_printed_as_they_are_written(runs):
    code, out, _ = call("evaluate", "--years", 3, "--config", runs / "small.toml", "--out", runs / "run")
    scores = json.loads((runs / "run" / "scores.json").read_text())
    mean = next(r["mean"] for r in scores["summary"] if (r["model"], r["score"]) == ("log_har", "qlike"))
    assert code == 0 and f"{mean:.3f}" in out and f"{scores['origins']} daily origins, 2017-10-01 to" in out


def test_a_training_keeps_its_settings(runs):
    first = (runs / "train" / "config.toml").read_text().splitlines()[0]
    assert first.startswith("# cryptopredict") and "simulated market, 3 years, seed 0" in first
    assert load_config(runs / "train" / "config.toml").epochs == 1 and (runs / "train" / "choice.json").exists()


@pytest.mark.skipif(not _trackers_installed(), reason="needs the extra 'track'")
def test_a_training_is_followed_by_tensorboard(runs):
    trainings = [path.parent for path in (runs / "train").glob("*/metrics.jsonl")]
    assert trainings and all(list((place / "tensorboard").glob("events.*")) for place in trainings)


def test_a_dry_run_prints_what_to_expect_and_writes_nothing(runs, tmp_path, capsys):
    config = load_config(runs / "train" / "config.toml")
    assert TrainCommand(years=3, settings=config, out=tmp_path / "dry", dry_run=True)() == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "dry").exists() and "choice-0" in out and "seed-0" in out
    assert re.search(r"in all \d+ updates, about .* of training and \d+ MiB", out)


def test_runs_and_trainings_are_listed(runs):
    rows = _listed(runs).splitlines()
    assert len(rows) == 3 and "walk-forward finished log loss" in " ".join(rows[1].split())
    assert re.search(r"training finished, \d+ training runs?, \d+ updates? validation loss", " ".join(rows[2].split()))


@pytest.fixture
def run(runs):
    "The finished run, with its scores as they were at the end of the test."
    scores = runs / "run" / "scores.json"
    before = scores.read_bytes()
    yield runs / "run"
    scores.write_bytes(before)


def test_a_stopped_run_is_listed_with_how_to_resume_it(run):
    (run / "scores.json").unlink()
    assert "stopped, 6 parts" in (listed := _listed(run)) and f"the same command with --out {run}" in listed


def test_a_run_in_use_is_listed_as_running(run):
    (run / "scores.json").unlink()
    with exclusive_lock(run): assert "running, 6 parts" in _listed(run)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null"])
def test_a_damaged_run_costs_its_own_row_only(runs, run, content):
    (run / "scores.json").write_text(content)
    assert "damaged" in _listed(run)
    rows = _listed(runs).splitlines()
    assert len(rows) == 3 and "damaged" in rows[1] and "finished" in rows[2]


def test_a_training_without_its_choice_is_not_finished(runs):
    chosen = runs / "train" / "choice.json"
    chosen.rename(runs / "choice.json")
    try: assert re.fullmatch(r"\d+ training runs?, \d+ updates?", describe_trainings(runs / "train")[0])
    finally: (runs / "choice.json").rename(chosen)


def test_a_folder_without_runs_says_so(runs):
    assert _listed(runs / "run" / "parts").endswith(" holds no run\n")


def test_a_loop_of_links_costs_its_own_row_only(runs):
    (runs / "loop").symlink_to("loop")
    try: assert _listed(runs).count("finished") == 2
    finally: (runs / "loop").unlink()


def test_a_run_that_may_not_be_read_is_named(runs, monkeypatch):
    def refuse(place): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(cli, "describe_run", refuse)
    assert "cannot be read (Permission denied)" in _listed(runs / "run")


def test_runs_of_a_missing_folder_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"): RunsCommand(tmp_path / "nowhere")()


# --- mistakes and bugs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, message", [
    ("run --preset huge", "unknown preset 'huge'; known are baseline, mhsa, tiny"),
    ("train --seeds 0", "flags: key 'seeds' is 0: must be a whole number from 1 to 100"),
    ("nonsense", "unknown command 'nonsense' (known: run"),
    ("forecast --repair sort", "needs --data"),
])
def test_a_mistake_costs_one_line_and_exit_code_2(words, message):
    code, _, err = call(*words.split())
    assert code == 2 and len(err.strip().splitlines()) == 1 and message in err


@pytest.mark.parametrize("command, audits", [
    ("run", "audit_all"), ("evaluate", "user_code_audits"), ("train", "user_code_audits")])
@pytest.mark.parametrize("occupied", ["a file", "a folder of others"])
def test_an_output_folder_that_cannot_be_used_is_refused_before_the_audits(command, audits, occupied, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, audits, lambda *_: pytest.fail("audited first"))
    out = tmp_path / "out"
    if occupied == "a file": out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    code, _, err = call(command, "--years", 1, "--out", out)
    assert code == 2 and "choose another output folder (out=..., --out)" in err and len(err.strip().splitlines()) == 1


def test_nothing_is_printed_before_a_missing_data_folder_is_refused(tmp_path):
    code, out, err = call("run", "--data", tmp_path / "nowhere")
    assert code == 2 and out == "" and "nowhere" in err


@pytest.mark.parametrize("fault", [ValueError("odd"), KeyError("odd")])
def test_an_error_that_no_check_of_this_package_raised_is_a_bug(fault, monkeypatch, tmp_path):
    def broken(*args): exec("raise fault", dict(__name__="numpy", fault=fault))  # raised below this package
    monkeypatch.setattr("cryptopredict.simulate.simulate_market", broken)
    code, _, err = call("prepare", "--years", 1, "--out", tmp_path / "never")
    assert code == 3 and "Traceback" in err and "this is a bug in cryptopredict" in err.splitlines()[-1]


def test_verbose_adds_the_traceback_of_a_mistake():
    code, _, err = call("run", "--years", 0, "--verbose")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("cryptopredict: error: --years 0")


def test_errors_of_parsers_and_of_the_system_are_mistakes_of_the_user():
    def raised(function, *args):
        try: function(*args)
        except Exception as error: return error
    assert is_users_mistake(raised(json.loads, "{")) and is_users_mistake(raised(open, os.devnull + "/x"))
    assert not is_users_mistake(raised(int, "x")) and not is_users_mistake(raised(len, 3))
