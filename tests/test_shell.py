"The shell command as a user meets it: processes, exit codes, files, interrupts, bad input."
import json
import os
import pty
import shutil
import signal
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import ENV, SMALL, Outcome, command, one_line, shell, side_by_side, snapshot, walk, write_binance, write_sources

BASELINES = ["climatology", "climatology_4y", "persistence", "ewma", "log_har"]
SCHEMA = ["time", "fold", "seed", "model", "p_down", "p_flat", "p_up", "p10", "p90", "sigma"]
WALK_FLAGS = ["--data", "--years", "--seed", "--repair", "--out", "--config", "--seeds", "--models", "--first-test", "--step", "--horizon"]


# --- processes of small tests, started side by side ----------------------------------------------------------------------


def _data(folder: Path) -> None:
    "Folders and files with one fault each."
    (folder / "nothing").mkdir()
    for name, text in (("empty", ""), ("header", "ts,open,high,low,close,volume\n"), ("unknown", "a,b,c\n1,2,3\n"), ("binary", "\x00\x01\x02,\x00\n")):
        (folder / name).mkdir()
        (folder / name / "file.csv").write_text(text)
    write_binance(folder / "good" / "file.csv", bars := walk(24 * 300))
    write_binance(folder / "hole" / "file.csv", bars[(bars.index < "2017-06-10") | (bars.index >= "2017-09-10")])
    write_binance(folder / "disordered" / "file.csv", bars.iloc[[*range(50), 51, 50, *range(52, 200)]])
    write_binance(folder / "short" / "file.csv", bars.iloc[:24 * 20])
    (folder / "daily_only").mkdir()
    (folder / "daily_only" / "DGS10.csv").write_text("observation_date,DGS10\n2017-01-03,2.4\n")
    short = 'horizon = "5D"\nvol_window = "2D"\nvalidation = "60D"\nstep = "30D"\nfirst_test = "2017-05-01"\n'
    (folder / "code.py").write_text('def number(panel): return 3\n\n\ndef raises(panel): return panel["price_usd"]\n')
    (folder / "syntax.py").write_text("def f(panel) return panel\n")
    (folder / "imports.py").write_text("import module_that_is_not_there\n")
    for name, text in (("key", "nonsense = 3\n"), ("broken", "horizon = \n"), ("value", 'horizon = "soon"\n'), ("list", 'models = ["nope"]\n'), ("short", short)):
        (folder / f"{name}.toml").write_text(text)


FAULTS = {  # what is asked -> words the one line must hold
    "missing directory": ("run --data {}/nowhere", "nowhere no such directory"),
    "a file for a directory": ("run --data {}/good/file.csv", "file.csv no such directory"),
    "directory without files": ("run --data {}/nothing", "nothing .csv"),
    "empty file": ("run --data {}/empty", "empty/file.csv empty"),
    "header only": ("run --data {}/header", "header/file.csv no rows"),
    "unknown format": ("run --data {}/unknown", "unknown/file.csv row 1 unknown format Kraken"),
    "no text": ("run --data {}/binary", "binary/file.csv"),
    "rows out of order": ("run --data {}/disordered", "disordered/file.csv row 53 value_time sort"),
    "no bars": ("run --data {}/daily_only", "daily_only bars"),
    "too little history": ("run --years 1", "too little history"),
    "too little history on files": ("run --data {}/short --config {}/short.toml", "first_test"),
    "horizon longer than the data": ("evaluate --years 2 --horizon 900D", "900D history"),
    "nothing before the first test": ("evaluate --data {}/good --config {}/short.toml --first-test 2017-01-05", "first_test"),
    "no label in a fold": ("run --data {}/hole --config {}/short.toml --n-cuts 2", "no label in the fold 2017-06-30"),
    "no label in a fold, evaluate": ("evaluate --data {}/hole --config {}/short.toml", "no label in the fold 2017-06-30"),
    "unknown config key": ("run --config {}/key.toml", "key.toml nonsense unknown key horizon"),
    "no TOML": ("run --config {}/broken.toml", "broken.toml TOML line 1"),
    "bad value": ("run --config {}/value.toml", "value.toml horizon soon"),
    "unknown model in the file": ("forecast --config {}/list.toml", "list.toml models nope"),
    "missing config": ("evaluate --config {}/none.toml", "none.toml --config"),
    "unknown model": ("run --models nope", "models nope climatology"),
    "a model twice": ("run --models ewma ewma", "models twice"),
    "negative seed": ("run --seed -1", "seed"),
    "no years": ("prepare --years 0", "--years 0"),
    "no time": ("evaluate --years 5 --first-test never", "first_test never"),
    "step backwards": ("evaluate --years 5 --first-test 2020-01-01 --step -5D", "step -5D"),
    "repair of nothing": ("prepare --repair sort", "--repair --data"),
    "unknown repair": ("prepare --data {}/good --repair magic", "magic drop_duplicates"),
    "forecast on too little": ("forecast --data {}/short", "history"),
    "function file missing": ("audit --years 1 --fn none.py:f", "none.py"),
    "function missing": ("audit --years 1 --fn {}/code.py:g", "code.py 'g'"),
    "function that gives no table": ("audit --years 1 --fn {}/code.py:number", "int frame"),
    "function that raises": ("audit --years 1 --fn {}/code.py:raises", "code.py price_usd"),
    "function file with an error": ("audit --years 1 --fn {}/syntax.py:f", "syntax.py"),
    "function file with a missing import": ("audit --years 1 --fn {}/imports.py:f", "imports.py"),
    "not there yet: train": ("train", "train not there yet"),
    "not there yet: fetch": ("fetch", "fetch not there yet"),
    "not there yet: plan": ("plan", "plan not there yet"),
}

REFUSED = {  # the flag that differs -> what the refusal may name
    "another seed": ("--seed 1", "seed data_sha256"), "another horizon": ("--horizon 60D", "horizon"), "another model": ("--models climatology", "models"),
    "another first test": ("--first-test 2020-02-01", "first_test"), "another step": ("--step QS", "step"), "other data": ("--years 6", "data_sha256"),
    "another number of resamples": ("--config c.toml", "n_boot")}
OCCUPIED = {f"{verb} into {what}": f"{verb} --out out {flags}" for what in ("a file", "a folder of others") for verb, flags in
            (("run", "--years 5 --first-test 2020-01-01 --n-cuts 1"), ("evaluate", "--years 5 --first-test 2020-01-01"), ("prepare", "--years 1"))}
MISSPELT = {"no command": "", "no such command": "nonsense", "no such flag": "run --bogus 1", "no number": "run --years eight"}
AUDITED = {"honest": None, "centred": "smooth", "scaled": "z", "filled": "fees"}  # function -> its leaky column
MINE = """import numpy as np
def returns(p): return np.log(p['close']).diff()
def honest(p): return returns(p).ewm(halflife=24).std().to_frame('vol').assign(trend=returns(p).rolling(48).mean())
def centred(p): return honest(p).assign(smooth=p['close'].rolling(25, center=True).mean())
def scaled(p): return honest(p).assign(z=(p['close'] - p['close'].mean()) / p['close'].std())
def filled(p): return honest(p).assign(fees=p['fees'].where(p.index.hour == 12).bfill())
"""
HELP = {"run": [*WALK_FLAGS, "--n-cuts"], "audit": [*WALK_FLAGS, "--n-cuts", "--fn"], "evaluate": WALK_FLAGS, "forecast": WALK_FLAGS,
        "prepare": ["--data", "--years", "--seed", "--repair", "--out"], "train": [], "fetch": [], "plan": []}


def _prepare(case: str, cwd: Path, faults: Path, small_run: Path) -> list[str]:
    "What stands in the folder before the command, and the command."
    if case in REFUSED:
        shutil.copytree(small_run, cwd / "out")
        (cwd / "c.toml").write_text("n_boot = 200\n")
        return _refusal(case)
    if case.endswith("into a file"): (cwd / "out").write_text("mine")
    if case.endswith("of others"): (cwd / "out" / "deep").mkdir(parents=True); (cwd / "out" / "deep" / "thesis.tex").write_text("mine")
    if case in AUDITED:
        (cwd / "mine.py").write_text(MINE)
        return ["audit", "--years", "1", "--n-cuts", "8", "--fn", f"mine.py:{case}"]
    if case in HELP: return [case, "--help"]
    return (FAULTS[case][0] if case in FAULTS else (OCCUPIED | MISSPELT)[case]).replace("{}", str(faults)).split()


@pytest.fixture(scope="module")
def outcome(request, small_run, tmp_path_factory):
    "What became of a case's process; those of all selected cases are started together, two at a time."
    faults = tmp_path_factory.mktemp("faults")
    _data(faults)
    before = snapshot(faults)
    params = [i.callspec.params for i in request.session.items if i.path == request.path and hasattr(i, "callspec")]

    def start(case: str) -> Outcome:
        cwd = tmp_path_factory.mktemp("case")
        words = _prepare(case, cwd, faults, small_run)
        stood = snapshot(cwd)
        return Outcome(shell(*words, cwd=cwd), cwd, stood)
    with side_by_side([p["case"] for p in params if "case" in p], start) as get: yield get
    assert {k: v for k, v in snapshot(faults).items() if "__pycache__" not in k} == before, "a command changed its input"


# --- run on the built-in market ------------------------------------------------------------------------------------------


def test_default_run_meets_its_bounds(default_run):
    assert default_run.rc == 0, default_run.stderr
    assert default_run.seconds < 120 and default_run.peak < 2 * 2**30, (default_run.seconds, default_run.peak)
    scores = json.loads((default_run.out / "scores.json").read_text())
    assert scores["provenance"]["rows"] >= 6 * 365 * 24 and len(scores["folds"]) >= 3
    assert set(BASELINES) < {r["model"] for r in scores["summary"]}
    assert {"features", "labels", "folds"} <= set(scores["audits"]) and all(a["ok"] for a in scores["audits"].values())


def test_default_run_says_where_and_nothing_else(default_run):
    assert default_run.stderr == "", "no progress bar where there is no terminal, and no warnings"
    assert [p.name for p in default_run.cwd.iterdir()] == ["runs"] and len(list(default_run.cwd.glob("runs/*"))) == 1
    assert f"report: {default_run.out.relative_to(default_run.cwd)}/report.html" in default_run.stdout
    assert all(f"audit of {what}" in default_run.stdout for what in ("features", "labels", "folds"))
    assert all(model in default_run.stdout for model in BASELINES)


def test_run_folder_is_whole(default_run):
    files = {"config.toml", "forecast.parquet", "origins.parquet", "parts", "predictions.parquet", "report.html", "run.json", "scores.json"}
    assert {p.name for p in default_run.out.iterdir()} == files
    scores = json.loads((default_run.out / "scores.json").read_text())
    parts = {f"fold-{k:02d}-{m}-0.parquet" for k in range(len(scores["folds"])) for m in scores["config"]["models"]}
    assert {p.name for p in (default_run.out / "parts").iterdir()} == parts


def test_predictions_keep_the_schema(default_run):
    made = pd.read_parquet(default_run.out / "predictions.parquet")
    scores = json.loads((default_run.out / "scores.json").read_text())
    assert made.columns.tolist() == SCHEMA and not made.isna().any(axis=None) and not made.duplicated(["time", "model", "seed"]).any()
    assert str(made["time"].dt.tz) == "UTC" and (made["time"].dt.floor("D") == made["time"]).all(), "official origins are 00:00 UTC"
    assert np.allclose(made[["p_down", "p_flat", "p_up"]].sum(axis=1), 1) and (made[["p_down", "p_flat", "p_up", "sigma"]] > 0).all(axis=None)
    assert (made["p10"] <= made["p90"]).all()
    per_model = [tuple(part["time"]) for _, part in made.groupby("model")]
    assert len(per_model) == len(scores["config"]["models"]) and len(set(per_model)) == 1, "every model forecasts at the same origins"
    for k, fold in enumerate(scores["folds"]):
        times = made.loc[made["fold"] == k, "time"]
        assert pd.Timestamp(fold["refit"]["end"]) + pd.Timedelta("90D") <= pd.Timestamp(fold["test"]["begin"]), "labels of the fit had matured"
        assert pd.Timestamp(fold["test"]["begin"]) <= times.min() and times.max() <= pd.Timestamp(fold["test"]["end"])


class _Page(HTMLParser):
    "Headings, text outside scripts, and every address an attribute would fetch."
    def __init__(self, text: str):
        super().__init__()
        self.heads, self.text, self.fetched, self.links, self._open = [], [], [], 0, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._open = tag
        self.links += tag in ("link", "iframe", "base", "object", "embed")
        self.fetched += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "poster", "action") and v and not v.startswith(("#", "data:"))]

    def handle_data(self, data):
        if self._open == "h2": self.heads.append(data)
        if self._open not in ("script", "style"): self.text.append(data)

    def handle_endtag(self, tag): self._open = None


def test_report_works_offline(default_run):
    page = _Page((default_run.out / "report.html").read_text(encoding="utf-8"))
    assert page.fetched == [] and page.links == 0, "one file: nothing is fetched"
    style = (default_run.out / "report.html").read_text(encoding="utf-8").split("<style>", 1)[1].split("</style>", 1)[0]
    assert "url(" not in style and "@import" not in style


def test_report_has_its_sections(default_run):
    text = (default_run.out / "report.html").read_text(encoding="utf-8")
    page, scores = _Page(text), json.loads((default_run.out / "scores.json").read_text())
    heads, body = " | ".join(page.heads).lower(), " ".join(page.text)
    assert all(word in heads for word in ("score", "calibration", "price", "newest forecast", "audit", "folds", "provenance")), page.heads
    assert text.count("Plotly.newPlot(") >= 5
    drawn = text[text.index("</head>"):]
    assert "Reliability" in drawn and "by year" in drawn and "band" in drawn and "no leak found" in body
    provenance = {k: v for k, v in scores["provenance"].items() if v != "absent"}
    assert {"data_sha256", "commit", "source", "pandas", "numpy"} <= set(provenance)
    assert all(str(v) in body for v in provenance.values()) and "config: seed" in body
    assert all(model in body for model in scores["config"]["models"])


# --- going on with a run -------------------------------------------------------------------------------------------------


def test_same_run_again_makes_nothing_new(small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    again = shell("run", "--out", "out", "--n-cuts", "4", *SMALL, cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    after = snapshot(tmp_path / "out")
    parts = [p for p in before if p.startswith("parts/")]
    assert len(parts) == 2 and all(before[p] == after[p] for p in parts), "finished parts are kept, not made again"
    # The report's figures carry random element ids; everything else is the same to the byte.
    assert {p for p in before if before[p][0] != after.get(p, ("gone",))[0]} <= {"report.html"} and set(before) == set(after)


def _refusal(case: str) -> list[str]:
    "The flags of `SMALL` with one changed."
    flag, *values = REFUSED[case][0].split()
    asked = {"--years": ["5"], "--first-test": ["2020-01-01"], "--models": ["climatology", "ewma"]} | {flag: values}
    return ["evaluate", "--out", "out", *(w for k, v in asked.items() for w in (k, *v))]


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_in_the_same_folder_is_refused(outcome, case):
    got = outcome(case)
    assert got.done.returncode == 2 and got.untouched(), "nothing is written over: no byte, no date"
    said = one_line(got.done.stderr)
    assert any(key in said for key in REFUSED[case][1].split()) and "--out" in said


@pytest.mark.parametrize("case", OCCUPIED)
def test_a_place_that_is_no_run_is_refused(outcome, case):
    got = outcome(case)
    assert got.done.returncode == 2 and "out" in one_line(got.done.stderr) and got.untouched()


def _stopped(cwd: Path, how: int) -> tuple[int, str]:
    "Send a signal to the default walk-forward as soon as its first part stands; exit code and stderr."
    # A shell that runs tests in the background may have SIGINT ignored, which a child would inherit.
    process = subprocess.Popen([command(), "evaluate", "--out", "out"], cwd=cwd, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    deadline = time.monotonic() + 120
    while not list(cwd.glob("out/parts/*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline, "no part was written"
        time.sleep(.002)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@pytest.mark.parametrize("how, codes", [(signal.SIGKILL, (-9,)), (signal.SIGINT, (130,)), (signal.SIGTERM, (143, -15))], ids=["kill", "int", "term"])
def test_stopped_half_way_and_started_again(default_run, tmp_path, how, codes):
    code, stderr = _stopped(tmp_path, how)
    assert code in codes and "Traceback" not in stderr
    whole = {p.name for p in (default_run.out / "parts").iterdir()}
    kept = {p.name: p.read_bytes() for p in (tmp_path / "out" / "parts").glob("*.parquet")}
    assert 0 < len(kept) < len(whole) and set(kept) < whole, "stopped in the middle"
    assert not (tmp_path / "out" / "predictions.parquet").exists() and not (tmp_path / "out" / "scores.json").exists()
    assert all((default_run.out / "parts" / name).read_bytes() == data for name, data in kept.items()), "what stands is whole"
    if how == signal.SIGINT: assert len(stderr.splitlines()) == 1 and not list(tmp_path.rglob("*.tmp")), stderr
    again = shell("evaluate", "--out", "out", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    for name in ("predictions.parquet", "forecast.parquet", "origins.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (default_run.out / name).read_bytes(), f"{name} differs from an uninterrupted run's"
    ours, theirs = (json.loads((p / "scores.json").read_text()) for p in (tmp_path / "out", default_run.out))
    assert all(ours[k] == theirs[k] for k in ours if k not in ("audits", "provenance"))


def test_lost_parts_are_made_again(small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "out")
    before = snapshot(tmp_path / "out", times=False)
    for lost in ("parts/fold-00-ewma-0.parquet", "predictions.parquet", "scores.json", "report.html"): (tmp_path / "out" / lost).unlink()
    assert shell("evaluate", "--out", "out", *SMALL, cwd=tmp_path).returncode == 0
    after = snapshot(tmp_path / "out", times=False)
    assert {p for p in before if before[p] != after.get(p)} == {"report.html", "scores.json"}, "evaluate makes no report and no audit"


@pytest.mark.parametrize("name", ["parts/fold-00-ewma-0.parquet", "run.json"])
@pytest.mark.parametrize("fault", ["cut short", "another content"])
def test_a_damaged_run_folder_is_named(small_run, tmp_path, name, fault):
    shutil.copytree(small_run, tmp_path / "out")
    damaged = tmp_path / "out" / name
    damaged.write_bytes(damaged.read_bytes()[:60] if fault == "cut short" else b"{}")
    refused = shell("evaluate", "--out", "out", *SMALL, cwd=tmp_path)
    assert refused.returncode == 2 and Path(name).name in one_line(refused.stderr)
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_progress_bar_on_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([command(), "evaluate", "--out", "out", *SMALL], cwd=tmp_path, env={**ENV, "TERM": "xterm"},
                               stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try: chunk = os.read(ours, 4096)
        except OSError: break  # Linux says so when the other side is closed
        if not chunk: break
        seen += chunk
    os.close(ours)
    # Redrawn ten times a second, so that a short step may never show.
    assert process.wait(60) == 0 and (b"fold 1 of 1" in seen or b"newest forecast" in seen) and b"/2" in seen


# --- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAULTS)
def test_bad_input_gets_one_line_and_exit_2(outcome, case):
    got = outcome(case)
    assert "Traceback" not in got.done.stderr + got.done.stdout, got.done.stderr
    assert got.done.returncode == 2, (got.done.returncode, got.done.stderr)
    said = one_line(got.done.stderr)
    assert all(word in said for word in FAULTS[case][1].split()), said
    assert list(got.cwd.iterdir()) == [], "nothing is written"


@pytest.mark.parametrize("case", MISSPELT)
def test_a_misspelt_command_line_exits_2(outcome, case):
    got = outcome(case)
    assert got.done.returncode == 2 and "Traceback" not in got.done.stderr and got.done.stderr and list(got.cwd.iterdir()) == []


def test_only_official_origins_are_scored(tmp_path):
    # A step of six hours has folds without any 00:00 UTC: refused, or left out of the scores.
    done = shell("evaluate", "--years", "5", "--first-test", "2020-09-25", "--step", "6h", "--models", "climatology", "ewma", "--out", "out", cwd=tmp_path)
    if done.returncode == 2: assert "step" in one_line(done.stderr) and not (tmp_path / "out").exists()
    else: assert (pd.read_parquet(tmp_path / "out" / "predictions.parquet")["time"].dt.hour == 0).all()


# --- configuration -------------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    (tmp_path / "c.toml").write_text('n_boot = 150\nfirst_test = "2019-06-01"\nseed = 7\nmodels = ["ewma", "climatology"]\n')
    done = shell("evaluate", "--years", "5", "--config", "c.toml", "--first-test", "2020-01-01", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "scores.json").read_text())["config"]
    assert (config["n_boot"], config["first_test"], config["models"]) == (150, "2020-01-01", ["ewma", "climatology"])
    assert config["seed"] == 7, "a flag that was not given does not win over the file"


def test_written_configuration_is_the_same_run(small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "out")
    done = shell("evaluate", "--years", "5", "--config", "out/config.toml", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_truth_is_only_offered_for_what_it_is_the_truth_of(tmp_path):
    # The built-in market's law is that of r90 with classes cut at 0.05; for another horizon it is some other forecast.
    done = shell("evaluate", "--years", "5", "--first-test", "2020-01-01", "--horizon", "30D", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "truth" not in json.loads((tmp_path / "out" / "scores.json").read_text())["config"]["models"]


# --- the other commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", AUDITED)
def test_audit_tells_leaky_from_honest(outcome, case):
    got, leaky = outcome(case), AUDITED[case]
    assert got.done.returncode == (1 if leaky else 0) and got.done.stderr == "" and "Traceback" not in got.done.stdout
    # Findings are rows that begin with the column's name; the honest columns beside a leaky one are not named.
    named = {line.split()[0] for line in got.done.stdout.splitlines() if line.split()[:1] and line.split()[0] in ("vol", "trend", "smooth", "z", "fees")}
    assert named == ({leaky} if leaky else set()), got.done.stdout
    assert {p.name for p in got.cwd.iterdir()} <= {"mine.py", "__pycache__"}


def test_audit_of_the_project_itself(tmp_path):
    done = shell("audit", "--years", "5", "--first-test", "2020-01-01", "--n-cuts", "3", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and list(tmp_path.iterdir()) == []
    assert all(f"audit of {what}: LeakReport: no leak found" in done.stdout for what in ("features", "labels", "folds"))


@pytest.mark.parametrize("verb", ["run", "audit"])
def test_a_leak_stops_the_run(tmp_path, monkeypatch, capsys, verb):
    from cryptopredict import cli, evaluate
    honest = evaluate.build_features

    def leaky(panel): return honest(panel, ["time", "macro"]).assign(tomorrow=panel["close"].pct_change().shift(-24).astype("float32"))
    monkeypatch.setattr(evaluate, "build_features", leaky)
    monkeypatch.chdir(tmp_path)
    code = cli.main([verb, *SMALL, *(["--out", "out"] if verb == "run" else []), "--n-cuts", "2"])
    said = capsys.readouterr().out
    assert code == 1 and "tomorrow" in said and list(tmp_path.iterdir()) == [], "no walk-forward on leaky features"


def test_prepare_writes_three_tables_and_never_over(tmp_path):
    from cryptopredict.features import build_features
    from cryptopredict.labels import make_labels
    done = shell("prepare", "--years", "2", "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"panel.parquet", "features.parquet", "labels.parquet"}
    panel, features, labels = (pd.read_parquet(tmp_path / "out" / f"{n}.parquet") for n in ("panel", "features", "labels"))
    assert len(panel) == 2 * 365 * 24 and panel.index.name == "time" and str(panel.index.tz) == "UTC"
    pd.testing.assert_frame_equal(features, build_features(panel), check_freq=False)
    pd.testing.assert_frame_equal(labels, make_labels(panel["close"]), check_freq=False)
    before = snapshot(tmp_path)
    again = shell("prepare", "--years", "2", "--out", "out", cwd=tmp_path)
    assert again.returncode == 2 and "out" in one_line(again.stderr) and snapshot(tmp_path) == before


def test_forecast_prints_every_model(tmp_path):
    done = shell("forecast", "--years", "5", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and list(tmp_path.iterdir()) == [], "without --out nothing is written"
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert all(len(lines[m].split()) == 7 for m in [*BASELINES, "truth"]), done.stdout
    assert "2020-12-30 00:00 UTC" in done.stdout
    probabilities = [[float(x) for x in lines[m].split()[1:4]] for m in BASELINES]
    assert np.allclose(np.sum(probabilities, axis=1), 1, atol=.011)


def test_forecast_writes_what_it_prints_and_never_over(tmp_path):
    done = shell("forecast", *SMALL, "--out", "new/f.json", cwd=tmp_path)
    made = json.loads((tmp_path / "new" / "f.json").read_text())
    assert done.returncode == 0 and [r["model"] for r in made] == ["climatology", "ewma"] and set(made[0]) == set(SCHEMA)
    assert all(f"{r['p_up']:.2f}" in done.stdout and f"{r['p10']:+.3f}" in done.stdout for r in made)
    before = snapshot(tmp_path)
    again = shell("forecast", *SMALL, "--out", "new/f.json", cwd=tmp_path)
    assert again.returncode == 2 and "f.json" in one_line(again.stderr) and snapshot(tmp_path) == before


def test_forecast_says_the_spans_it_forecasts(tmp_path):
    done = shell("forecast", *SMALL, "--horizon", "30D", cwd=tmp_path)
    assert done.returncode == 0 and "90-day" not in done.stdout, "a 30-day forecast is not called a 90-day one"


def test_evaluate_writes_scores(tmp_path):
    done = shell("evaluate", *SMALL, "--out", "a/b/out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "climatology" in done.stdout
    out = tmp_path / "a" / "b" / "out"
    scores = json.loads((out / "scores.json").read_text())
    assert {"provenance", "config", "folds", "audits", "summary", "by_year", "comparison", "reliability", "origins"} <= set(scores)
    assert {r["model"] for r in scores["summary"]} == {"climatology", "ewma"} and not (out / "report.html").exists()
    assert {r["score"] for r in scores["summary"]} == {"log_loss", "brier", "pinball10", "pinball90", "interval_score", "coverage",
                                                        "rmse_sigma", "rmse_log_sigma", "qlike"}
    assert all(r["n_windows"] < r["n_origins"] for r in scores["summary"])


def test_help_names_every_command(tmp_path):
    done = shell("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and all(verb in done.stdout for verb in HELP)


@pytest.mark.parametrize("case", HELP)
def test_help_names_every_flag(outcome, case):
    done = outcome(case).done
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) > 3 and list(outcome(case).cwd.iterdir()) == []
    assert all(f"{flag} " in done.stdout for flag in HELP[case]), done.stdout
    if not HELP[case]: assert "not there yet" in done.stdout.lower()


# --- run on files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    "A folder with a small file of every format, its panel (`prepared`) and a run on it (`out`)."
    folder = tmp_path_factory.mktemp("files")
    write_sources(folder / "data")
    (folder / "c.toml").write_text('horizon = "20D"\nvol_window = "10D"\nvalidation = "120D"\nfirst_test = "2018-07-01"\nstep = "QS"\nn_boot = 100\n')
    for words in (["prepare", "--data", "data", "--out", "prepared"], ["run", "--data", "data", "--config", "c.toml", "--out", "out", "--n-cuts", "4"]):
        done = shell(*words, cwd=folder)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


def test_run_on_files_of_every_format(files):
    scores = json.loads((files / "out" / "scores.json").read_text())
    assert set(scores["audits"]) == {"features", "labels", "folds", "availability"} and all(a["ok"] for a in scores["audits"].values())
    assert all(p.name in scores["provenance"]["source"] for p in (files / "data").rglob("*") if p.is_file())
    assert scores["config"]["models"] == BASELINES and len(scores["folds"]) == 6 and (files / "out" / "report.html").exists()


def test_panel_of_files_is_as_known_at_each_hour(files):
    panel = pd.read_parquet(files / "prepared" / "panel.parquet")
    first = lambda column, value: str(panel.index[np.isclose(panel[column], value).argmax()])
    day = lambda d: (pd.Timestamp(d) - pd.Timestamp("2017-01-01")).days
    work = lambda d: int(np.busday_count("2017-01-01", d))  # 1 January 2017 was a Sunday
    # Monday 15 January 2018 was a holiday: Friday's yield and last week's index came on Tuesday, 16:15 New York.
    assert first("dgs10", 2 + work("2018-01-12") / 1000) == "2018-01-16 22:00:00+00:00"
    assert first("dtwexbgs", 2 + work("2018-01-12") / 1000) == "2018-01-16 22:00:00+00:00"
    assert first("dxy", 90 + work("2018-07-03") / 100) == "2018-07-03 22:00:00+00:00"  # 17:15 in summer
    assert first("tx_count", 7000 + day("2018-05-05")) == "2018-05-07 00:00:00+00:00"
    assert first("utxo_count", 5e7 + day("2018-05-05")) == "2018-05-07 00:00:00+00:00"
    assert panel.index[panel["is_splice"]].tolist() == [pd.Timestamp("2019-01-01 01:00", tz="UTC")]
    lost = panel["is_filled"] & (panel.index < "2019-01-01")
    assert .095 < lost[panel.index < "2019-01-01"].mean() < .105 and not panel.loc["2019-01-02":, "is_filled"].any()
    assert (panel.loc[lost, "volume"] == 0).all() and (panel["close"].diff()[lost] == 0).all()


def test_a_repair_is_asked_for_and_said(files, tmp_path):
    bars = walk(24 * 30)
    write_binance(tmp_path / "data" / "file.csv", bars.iloc[[*range(100), 101, 100, *range(102, len(bars))]])
    refused = shell("prepare", "--data", "data", "--out", "out", cwd=tmp_path)
    assert refused.returncode == 2 and "sort" in one_line(refused.stderr) and not (tmp_path / "out").exists()
    repaired = shell("prepare", "--data", "data", "--out", "out", "--repair", "sort", cwd=tmp_path)
    assert repaired.returncode == 0, repaired.stderr
    close = pd.read_parquet(tmp_path / "out" / "panel.parquet")["close"]
    assert np.array_equal(close.to_numpy(), bars["close"].to_numpy())
