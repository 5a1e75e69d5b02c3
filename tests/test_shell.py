"The shell command: exit codes, output, files, interrupts, bad input, the user's own code."
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import (
    BASELINES,
    ENV,
    SCHEMA,
    Outcome,
    call_cli,
    command,
    one_line,
    shell,
    side_by_side,
    snapshot,
    walk,
    write,
    write_binance,
    write_sources,
)

# --- tables of cases; {} is the folder of inputs --------------------------------------------------------------------------

FAULTS = {  # name -> (command, words that its error message must hold)
    "missing directory": ("run --data {}/nowhere", "nowhere no such directory"),
    "a file in place of a directory": ("run --data {}/good/file.csv", "file.csv no such directory"),
    "directory without files": ("run --data {}/nothing", "nothing .csv"),
    "empty file": ("run --data {}/empty", "empty/file.csv empty"),
    "header only": ("prepare --data {}/header", "header/file.csv no rows"),
    "unknown format": ("run --data {}/unknown", "unknown/file.csv row 1 unknown format Kraken"),
    "not text": ("audit --data {}/binary", "binary/file.csv"),
    "rows out of order": ("run --data {}/disordered", "disordered/file.csv row 53 value_time sort"),
    "without bars": ("prepare --data {}/daily_only", "daily_only bars"),
    "too little history": ("run --data {}/good --n-cuts 1", "too little history"),
    "too little history for the horizon": ("run --data {}/short --n-cuts 1", "90D history"),
    "horizon longer than the data": ("evaluate --data {}/good --horizon 900D", "900D history"),
    "nothing before the first test": ("evaluate --data {}/good --config {}/short.toml --first-test 2017-01-05", "first_test"),
    "a gap before every origin": ("evaluate --data {}/hole --config {}/short.toml --first-test 2017-06-19 --step 200D",
                                   "price known 90D bars"),
    "a gap before the newest hour": ("forecast --data {}/hole --config {}/short.toml", "no bars 2017-06-10 2017-09-10 90D"),
    "unknown config key": ("run --config {}/key.toml", "key.toml nonsense unknown key horizon"),
    "unknown key of a table": ("train --config {}/deep.toml", "deep.toml model.d_modle unknown key d_model"),
    "value out of bounds": ("train --config {}/high.toml", "high.toml train.lr 7.0 number from 0.0 to 1.0"),
    "sizes that do not fit": ("evaluate --config {}/unfit.toml", "unfit.toml model headdim 7"),
    "flag out of bounds": ("train --train.batch 0", "flags train.batch number from 1 to 4096"),
    "no such device": ("train --data {}/good --config {}/short.toml --train.device cuda", "device 'cuda' no GPU"),
    "no such backend": ("train --data {}/good --config {}/short.toml --model.backend mamba_ssm", "backend 'mamba_ssm'"),
    "no such backend in evaluate": ("evaluate --data {}/good --config {}/short.toml --models mamba2 --model.backend mamba_ssm",
                                  "backend 'mamba_ssm'"),
    "not a duration": ("train --config {}/embargo.toml", "embargo.toml embargo 'soon' duration"),
    "not a truncation": ("train --train.bptt span:0", "flags train bptt 'span:K'"),
    "dry run on too little": ("train --data {}/short --dry-run", "history"),
    "not TOML": ("run --config {}/broken.toml", "broken.toml TOML line 1"),
    "bad value": ("run --config {}/value.toml", "value.toml horizon soon"),
    "unknown model in the file": ("forecast --config {}/list.toml", "list.toml models nope"),
    "missing config": ("evaluate --config {}/none.toml", "none.toml --config"),
    "unknown model": ("run --models nope", "models nope climatology"),
    "the same model twice": ("run --models ewma ewma", "models twice"),
    "negative seed": ("run --seed -1", "seed"),
    "no years": ("prepare --years 0", "--years 0"),
    "not a time": ("evaluate --data {}/good --config {}/short.toml --first-test never", "first_test never"),
    "step backwards": ("evaluate --data {}/good --config {}/short.toml --step -5D", "step -5D"),
    "repair without files": ("prepare --repair sort", "--repair --data"),
    "unknown repair": ("prepare --data {}/good --repair magic", "magic drop_duplicates"),
    "forecast on too little": ("forecast --data {}/short", "history"),
    "function file missing": ("audit --data {}/good --fn none.py:f", "none.py"),
    "function missing": ("audit --data {}/good --fn {}/code.py:g", "code.py 'g'"),
    "function that gives no table": ("audit --data {}/good --fn {}/code.py:number", "int frame"),
    "function that raises": ("audit --data {}/good --fn {}/code.py:raises", "price_usd"),
    "function file with an error": ("audit --data {}/good --fn {}/syntax.py:f", "syntax.py"),
    "function file with a missing import": ("audit --data {}/good --fn {}/imports.py:f", "module_that_is_not_there"),
    "truth for another horizon": ("evaluate --models climatology truth --horizon 30D", "truth 90D"),
    "runs in a missing folder": ("runs nowhere", "nowhere folder"),
    "not implemented: fetch": ("fetch", "fetch not implemented yet"),
    "not implemented: plan": ("plan", "plan not implemented yet"),
}
SMALL = "--data {}/good --config {}/short.toml"
REFUSED = {  # what differs from the existing run -> (flags, the setting that the message names)
    "another seed": (f"{SMALL} --seed 1", "seed"),
    "another horizon": (f"{SMALL} --horizon 6D", "horizon"),
    "another model": (f"{SMALL} --models climatology", "models"),
    "another first test": (f"{SMALL} --first-test 2017-05-02", "first_test"),
    "another step": (f"{SMALL} --step 31D", "step"),
    "other data": (SMALL.replace("good", "other"), "data_sha256"),
    "another number of resamples": (SMALL.replace("short", "resamples"), "n_boot"),
}
INTO = {"run": f"{SMALL} --n-cuts 1", "evaluate": SMALL, "train": SMALL, "prepare": "--data {}/good"}
OCCUPIED = {f"{verb} into {what}": f"{verb} --out out {INTO[verb]}" for what in ("a file", "unrelated files") for verb in INTO}
DAMAGED = {f"{name} {fault}": name for name in ("fold-00-ewma-0.parquet", "run.json") for fault in ("cut short", "replaced")}
MISSPELT = {"no such key": "train --model.d-modle 3", "derived from data": "train --model.n-features 3", "no command": "",
            "no such command": "nonsense", "no such flag": "run --bogus 1", "no number": "run --years eight"}
AUDITED = {"honest": None, "centred": "smooth", "scaled": "z", "filled": "load"}  # function -> its leaky column
WALK = "--data --years --seed --repair --config --seeds --models --first-test --step --horizon --model.mlp --train.bptt"
HELP = {"run": f"{WALK} --out --n-cuts", "audit": f"{WALK} --n-cuts --fn --out", "evaluate": f"{WALK} --out",
        "forecast": f"{WALK} --out", "train": f"{WALK} --preset --epochs --out --dry-run", "fetch": "", "plan": "",
        "runs": "[PATH]", "prepare": "--data --years --seed --repair --out"}
# Cases that run in a process of their own; the others run in this process, ten times faster.
SEPARATE = {"missing directory", "empty file", "unknown format", "unknown config key", "too little history",
            "a gap before every origin", "function that raises", "another seed", "other data", "run into unrelated files",
            "prepare into a file", "run.json cut short", "honest", "centred", *MISSPELT, *HELP}
OWN_CODE = """import pandas as pd
COLUMNS = "p_down p_flat p_up p10 p90 sigma".split()
NUMBER = 3
class MyForecaster:
    def fit(self, panel, X, y, fold, seed):
        self.band = y["r90"].iloc[fold.refit].quantile([.1, .9]).tolist()
        return self
    def predict(self, panel, X, rows):
        return pd.DataFrame([[.3, .2, .5, *self.band, .6]], panel.index[rows], COLUMNS)
class Leaky(MyForecaster):
    def predict(self, panel, X, rows):
        later = panel["close"].pct_change(24).shift(-24).fillna(0).iloc[rows]
        return super().predict(panel, X, rows).assign(sigma=.6 + later.abs())
class OtherRows(MyForecaster):
    def predict(self, panel, X, rows): return super().predict(panel, X, rows[1:])
class OtherSignature(MyForecaster):
    def fit(self, panel): return self
class FitOnly:
    def fit(self, panel, X, y, fold, seed): return self
def speed(panel): return panel["close"].pct_change(6).to_frame("speed_6h")
def tomorrow(panel): return panel["close"].pct_change().shift(-24).to_frame("tomorrow")
def other_signature(panel, hours): return panel["close"].pct_change(hours).to_frame("speed")
"""
OWN_FAULTS = {  # name -> (flags, words of the message: the fault and the remedy)
    "model file missing": ("--models ewma none.py:MyForecaster", "none.py:MyForecaster no file FILE.py:NAME"),
    "model without a file": ("--models ewma MyForecaster", "'MyForecaster' climatology my.py:Name"),
    "model missing in the file": ("--models ewma my.py:Nope", "my.py:Nope my.py 'Nope'"),
    "model without predict": ("--models ewma my.py:FitOnly", "my.py:FitOnly 'predict' predict(panel, X, rows)"),
    "model with another signature": ("--models ewma my.py:OtherSignature", "my.py:OtherSignature fit(panel, X, y, fold, seed)"),
    "model that forecasts other rows": ("--models ewma my.py:OtherRows", "my.py:OtherRows panel.index[rows]"),
    "feature file missing": ("--features none.py:speed", "none.py:speed no file FILE.py:NAME"),
    "feature without a name": ("--features my.py", "my.py name FILE.py:NAME"),
    "feature missing in the file": ("--features my.py:nope", "my.py:nope my.py 'nope'"),
    "feature that is no function": ("--features my.py:NUMBER", "my.py:NUMBER int function of the panel"),
    "feature with another signature": ("--features my.py:other_signature", "my.py:other_signature panel"),
}
MINE = """import numpy as np
def returns(p): return np.log(p['close']).diff()
def honest(p): return returns(p).ewm(halflife=24).std().to_frame('vol').assign(trend=returns(p).rolling(48).mean())
def centred(p): return honest(p).assign(smooth=p['close'].rolling(25, center=True).mean())
def scaled(p): return honest(p).assign(z=(p['close'] - p['close'].mean()) / p['close'].std())
def filled(p): return honest(p).assign(load=p['volume'].where(p.index.hour == 12).bfill())
"""


def _stage(case: str, cwd: Path, run: Path) -> str:
    "Prepare the folder of a case; the command to run in it."
    if case in REFUSED or case in DAMAGED: shutil.copytree(run, cwd / "out")
    if case in REFUSED: return f"evaluate --out out {REFUSED[case][0]}"
    if case in DAMAGED:
        file = next((cwd / "out").rglob(DAMAGED[case]))
        file.write_bytes(file.read_bytes()[:60] if case.endswith("short") else b"{}")
        return f"evaluate --out out {SMALL}"
    if case.endswith("into a file"): write(cwd / "out", "mine")
    if case.endswith("unrelated files"): write(cwd / "out" / "deep" / "thesis.tex", "mine")
    if case in AUDITED:
        write(cwd / "mine.py", MINE)
        own = f"--fn mine.py:{case}" if case == "scaled" else f"mine.py:{case}" if case == "filled" else f"mine:{case}"
        return f"audit {own} --data {{}}/good --n-cuts 8"
    return f"{case} --help" if case in HELP else FAULTS[case][0] if case in FAULTS else (OCCUPIED | MISSPELT)[case]


@pytest.fixture(scope="module")
def outcome(request, inputs, small_run, tmp_path_factory):
    "A function from case to outcome; processes of the selected cases are started together, two at a time."
    before = snapshot(inputs)
    params = [i.callspec.params for i in request.session.items if i.path == request.path and hasattr(i, "callspec")]

    def start(case: str) -> Outcome:
        cwd = tmp_path_factory.mktemp("case")
        words = _stage(case, cwd, small_run).replace("{}", str(inputs)).split()
        run, before = shell if case in SEPARATE else call_cli, snapshot(cwd)
        return Outcome(run(*words, cwd=cwd), cwd, before)
    own = {p["case"] for p in params if "case" in p} & SEPARATE
    with side_by_side(sorted(own), start) as get: yield lambda case: get(case) if case in own else start(case)
    assert snapshot(inputs) == before, "a command changed its input"


# --- run on the built-in market -------------------------------------------------------------------------------------------


def test_the_default_run_is_within_its_memory_and_passes_every_audit(default_run):
    assert default_run.rc == 0, default_run.stderr
    assert default_run.peak < 2 * 2**30, default_run.peak
    scores = json.loads((default_run.out / "scores.json").read_text())
    assert scores["provenance"]["rows"] >= 6 * 365 * 24 and len(scores["folds"]) >= 3
    assert set(BASELINES) < {r["model"] for r in scores["summary"]}
    assert set(scores["audits"]) == {"features", "labels", "disguise", "folds", "pipeline", "model"}
    assert all(a["ok"] for a in scores["audits"].values())


def test_the_default_run_prints_the_report_path_and_progress_only(default_run):
    progress = re.compile(r"\d+ of \d+, .+: update \d+ of \d+ .+ tokens/s .+ MiB")
    from cryptopredict.console import training_line
    line = training_line(dict.fromkeys(("loss", "cls", "p10", "p90", "vol", "lr", "tokens_per_s", "peak_rss"), 1.))
    assert progress.fullmatch(f"3 of 9, fold 1 of 2, mamba2, seed 0, 4 min left: update 7 of 9  {line}"), line
    lines = default_run.stderr.splitlines()
    without = [line for line in lines if line.startswith("cryptopredict: warning: left out, because their packages")]
    assert len(without) <= 1, "one line names the models whose packages are missing"
    assert all(progress.fullmatch(line) for line in lines if line not in without), "without a terminal, one line per minute"
    assert [p.name for p in default_run.cwd.iterdir()] == ["runs"] and len(list(default_run.cwd.glob("runs/*"))) == 1
    assert f"report: {default_run.out.relative_to(default_run.cwd)}/report.html" in default_run.stdout
    assert all(f"audit of {what}" in default_run.stdout for what in ("features", "labels", "folds"))
    assert all(model in default_run.stdout for model in BASELINES)


def test_the_run_folder_holds_every_file(default_run):
    tables = {f"{n}.parquet" for n in ("forecast", "origins", "predictions")}
    others = {".lock", "certificate.json", "config.toml", "inventory.json", "parts", "report.html", "run.json", "scores.json"}
    assert {p.name for p in default_run.out.iterdir()} - {"network"} == tables | others
    scores, certificate = (json.loads((default_run.out / f"{name}.json").read_text()) for name in ("scores", "certificate"))
    assert certificate["ok"] and all(certificate[key] == scores[key] for key in ("audits", "provenance"))
    assert any(t.startswith("availability: not audited") for t in certificate["untested"])
    parts = {f"fold-{k:02d}-{m}-0.parquet" for k in range(len(scores["folds"])) for m in scores["config"]["models"]}
    assert {p.name for p in (default_run.out / "parts").iterdir()} == parts


def test_predictions_have_the_documented_schema(default_run):
    made = pd.read_parquet(default_run.out / "predictions.parquet")
    assert made.columns.tolist() == [*SCHEMA, "asset"] and not made.isna().any(axis=None)
    assert not made.duplicated(["time", "model", "seed"]).any()
    assert str(made["time"].dt.tz) == "UTC" and (made["time"].dt.floor("D") == made["time"]).all(), "origins are 00:00 UTC"
    assert np.allclose(made[["p_down", "p_flat", "p_up"]].sum(axis=1), 1)
    assert (made[["p_down", "p_flat", "p_up", "sigma"]] > 0).all(axis=None) and (made["p10"] <= made["p90"]).all()
    assert len({tuple(part["time"]) for _, part in made.groupby("model")}) == 1, "every model forecasts at the same origins"


def test_predictions_lie_in_their_test_spans(default_run):
    made = pd.read_parquet(default_run.out / "predictions.parquet")
    for k, fold in enumerate(json.loads((default_run.out / "scores.json").read_text())["folds"]):
        begin, end, fitted = (pd.Timestamp(t) for t in (fold["test"]["begin"], fold["test"]["end"], fold["refit"]["end"]))
        assert fitted + pd.Timedelta("90D") <= begin, "the labels of the fit have matured"
        assert made.loc[made["fold"] == k, "time"].between(begin, end).all()


class _Page(HTMLParser):
    "Headings, text outside scripts, and every address that an attribute would fetch."
    addresses = ("src", "href", "srcset", "data", "poster", "action")

    def __init__(self, text: str):
        super().__init__()
        self.heads, self.text, self.fetched, self._open = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._open = tag
        if tag in ("link", "iframe", "base", "object", "embed"): self.fetched.append(tag)
        self.fetched += [v for k, v in attrs if k in self.addresses and v and not v.startswith(("#", "data:"))]

    def handle_data(self, data):
        if self._open == "h2": self.heads.append(data)
        if self._open not in ("script", "style"): self.text.append(data)

    def handle_endtag(self, tag): self._open = None


def test_report_works_offline(default_run):
    text = (default_run.out / "report.html").read_text(encoding="utf-8")
    assert _Page(text).fetched == [], "one file: nothing is fetched"
    style = text.split("<style>", 1)[1].split("</style>", 1)[0]
    assert "url(" not in style and "@import" not in style


def test_report_has_its_sections(default_run):
    text = (default_run.out / "report.html").read_text(encoding="utf-8")
    page, scores = _Page(text), json.loads((default_run.out / "scores.json").read_text())
    heads, body = " | ".join(page.heads).lower(), " ".join(page.text)
    sections = ("score", "calibration", "price", "newest forecast", "certificate", "folds", "provenance")
    assert all(word in heads for word in sections), page.heads
    drawn = text[text.index("</head>"):]
    assert text.count("Plotly.newPlot(") >= 5 and all(word in drawn for word in ("Reliability", "by year", "80 % band"))
    provenance = {k: v for k, v in scores["provenance"].items() if v != "absent"}
    assert {"data_sha256", "commit", "source", "pandas", "numpy"} <= set(provenance)
    assert all(str(v) in body for v in provenance.values()) and "config: seed" in body and "no leak found" in body
    assert all(model in body for model in scores["config"]["models"])


# --- resuming a run -------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_recomputed(small, small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    again = shell("run", "--out", "out", "--n-cuts", "4", *small, cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")
    after = snapshot(tmp_path / "out")
    parts = [p for p in before if p.startswith("parts/")]
    assert len(parts) == 12 and all(before[p] == after[p] for p in parts), "finished parts are kept, not recomputed"
    # The report's figures carry random element ids; everything else is the same to the byte.
    assert set(before) == set(after) and {p for p in before if before[p][0] != after[p][0]} <= {"report.html"}


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_in_the_same_folder_is_refused(outcome, case):
    got = outcome(case)
    assert got.done.returncode == 2 and got.untouched(), "nothing is overwritten"
    message = one_line(got.done.stderr)
    assert REFUSED[case][1] in message and "--out" in message


@pytest.mark.parametrize("case", OCCUPIED)
def test_an_out_folder_that_holds_no_run_is_refused(outcome, case):
    got = outcome(case)
    assert got.done.returncode == 2 and "out" in one_line(got.done.stderr) and got.untouched()


@pytest.fixture(scope="module")
def many_parts(small) -> list[str]:
    "Words of a walk-forward that takes seconds and has more than a hundred parts."
    return ["evaluate", "--out", "out", *small, "--step", "2D"]


@pytest.fixture(scope="module")
def uninterrupted(many_parts, tmp_path_factory) -> Path:
    "The folder of that walk-forward, uninterrupted."
    folder = tmp_path_factory.mktemp("whole")
    assert shell(*many_parts, cwd=folder).returncode == 0
    return folder / "out"


def _stopped(words: list[str], cwd: Path, how: int, sign: str = "out/parts/*.parquet") -> tuple[int, str]:
    "Send a signal to a command as soon as a file exists; its exit code and stderr."
    # A shell that runs tests in the background may have SIGINT ignored, which a child would inherit.
    process = subprocess.Popen(
        [command(), *words], cwd=cwd, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    deadline = time.monotonic() + 120
    while not list(cwd.glob(sign)):
        assert process.poll() is None and time.monotonic() < deadline, f"no {sign} was written"
        time.sleep(.002)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@pytest.mark.parametrize("how, code", [("SIGKILL", -9), ("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_walk_forward_resumes_bit_identical(many_parts, uninterrupted, tmp_path, how, code):
    ended, stderr = _stopped(many_parts, tmp_path, getattr(signal, how))
    out = tmp_path / "out"
    kept = {p.name: p.read_bytes() for p in (out / "parts").glob("*.parquet")}
    assert ended == code and 0 < len(kept) < len(list((uninterrupted / "parts").iterdir())), "stopped in the middle"
    assert all((uninterrupted / "parts" / name).read_bytes() == data for name, data in kept.items()), "finished parts are whole"
    assert not (out / "predictions.parquet").exists() and not (out / "scores.json").exists()
    if how != "SIGKILL": assert len(stderr.splitlines()) == 1 and not list(tmp_path.rglob("*.tmp")), stderr
    again = shell(*many_parts, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    differ = {p for p, entry in snapshot(uninterrupted, times=False).items() if snapshot(out, times=False).get(p) != entry}
    assert not differ, f"other than in an uninterrupted run: {differ}"


@pytest.mark.parametrize("how, code", [("SIGKILL", -9), ("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_training_resumes_bit_identical(tmp_path, trained, how, code):
    words, whole = trained
    ended, stderr = _stopped(words, tmp_path, getattr(signal, how), "out/choice-0/metrics.jsonl")
    assert ended == code and not (tmp_path / "out" / "choice.json").exists(), "stopped in the middle"
    if how != "SIGKILL": assert len(stderr.splitlines()) == 1 and not list(tmp_path.rglob("*.tmp")), stderr
    listed = shell("runs", "out", cwd=tmp_path).stdout
    assert "training" in listed and "the same command with --out out" in listed
    assert shell(*words, cwd=tmp_path).returncode == 0
    for name in ("metrics.jsonl", "validation.jsonl", "*/*.safetensors", "choice.json"):
        files = sorted(whole.glob(f"**/{name}"))
        assert files and all(f.read_bytes() == (tmp_path / "out" / f.relative_to(whole)).read_bytes() for f in files), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[list[str], Path]:
    "The words of a training, and its folder, uninterrupted."
    folder, words = tmp_path_factory.mktemp("trained"), "train --years 4 --epochs 3 --horizon 30D --out out".split()
    assert shell(*words, cwd=folder).returncode == 0
    return words, folder / "out"


def test_lost_parts_are_recomputed(small, small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "out")
    before = snapshot(tmp_path / "out", times=False)
    for lost in ("parts/fold-00-ewma-0.parquet", "parts/fold-03-climatology-0.parquet", "predictions.parquet", "report.html"):
        (tmp_path / "out" / lost).unlink()
    assert call_cli("evaluate", "--out", "out", *small, cwd=tmp_path).returncode == 0
    after = snapshot(tmp_path / "out", times=False)
    assert {p for p in before if before[p] != after.get(p)} == {"report.html"}, "evaluate: no report, the same certificate"


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_of_a_run_is_named(outcome, case):
    got = outcome(case)
    assert got.done.returncode == 2 and DAMAGED[case] in one_line(got.done.stderr)
    assert not list(got.cwd.rglob("*.tmp"))


def test_progress_bar_on_a_terminal(small, tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([command(), "evaluate", "--out", "out", *small], cwd=tmp_path, env={**ENV, "TERM": "xterm"},
                               stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try: chunk = os.read(ours, 4096)
        except OSError: break  # Linux raises it when the other side is closed
        if not chunk: break
        seen += chunk
    os.close(ours)
    # It is redrawn ten times a second: a short step may never show.
    assert process.wait(60) == 0 and (b" of 6, " in seen or b"newest forecast" in seen)


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAULTS)
def test_bad_input_gets_one_line_and_exit_code_2(outcome, case):
    got = outcome(case)
    assert "Traceback" not in got.done.stderr + got.done.stdout, got.done.stderr
    assert got.done.returncode == 2, (got.done.returncode, got.done.stderr)
    message = one_line(got.done.stderr)
    assert all(word in message for word in FAULTS[case][1].split()), message
    assert got.untouched(), "nothing is written"


@pytest.mark.parametrize("case", MISSPELT)
def test_a_misspelt_command_line_exits_with_2(outcome, case):
    got = outcome(case)
    assert got.done.returncode == 2 and got.done.stderr and "Traceback" not in got.done.stderr and got.untouched()


@pytest.mark.parametrize("step", ["6h", "1h"])
def test_only_origins_at_midnight_are_scored(small, tmp_path, step):
    # Folds this short hold no 00:00 UTC: refused before anything is written, or left out of the scores.
    done = call_cli("evaluate", *small, "--first-test", "2017-10-22", "--step", step, "--out", "out", cwd=tmp_path)
    if done.returncode == 2: assert "step" in one_line(done.stderr) and not (tmp_path / "out").exists()
    else: assert set(pd.read_parquet(tmp_path / "out" / "predictions.parquet")["time"].dt.hour) == {0}


# --- configuration --------------------------------------------------------------------------------------------------------


def test_flags_override_the_file_and_the_file_overrides_defaults(inputs, tmp_path):
    lines = (inputs / "short.toml").read_text().replace("n_boot = 100", "n_boot = 150\nseed = 7")
    write(tmp_path / "c.toml", lines)
    done = call_cli("evaluate", "--data", f"{inputs}/good", "--config", "c.toml", "--horizon", "6D", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "scores.json").read_text())["config"]
    assert (config["n_boot"], config["vol_window"], config["horizon"], config["embargo"]) == (150, "2D", "6D", "0D")
    assert config["seed"] == 7, "the default of a flag does not override the file"


def test_network_flags_override_the_file_and_the_file_overrides_the_preset(inputs, tmp_path):
    write(tmp_path / "c.toml", (inputs / "short.toml").read_text(), 'preset = "mhsa"', "[model]", "mlp = 64", "n_layers = 2",
          "[train]", "tbptt_len = 128", "lr = 0.01")
    flags = ["--config", "c.toml", "--model.d-model", "32", "--model.headdim", "16", "--train.lr", "0.02"]
    done = call_cli("evaluate", "--data", f"{inputs}/good", *flags, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = tomllib.loads((tmp_path / "out" / "config.toml").read_text())
    scored_config = json.loads((tmp_path / "out" / "scores.json").read_text())["config"]
    assert config == {k: v for k, v in scored_config.items() if v is not None}
    model, train = config["model"], config["train"]
    assert (model["d_model"], model["mlp"], model["attention_every"], model["d_state"]) == (32, 64, 3, 128)
    assert (train["lr"], train["tbptt_len"], train["weight_decay"], train["batch"]) == (.02, 128, .03, 16)
    refused = call_cli("evaluate", "--data", f"{inputs}/good", *flags, "--train.lr", "0.03", "--out", "out", cwd=tmp_path)
    assert refused.returncode == 2 and "train.lr: 0.02 in the folder, 0.03 in this call" in one_line(refused.stderr)


def test_the_written_configuration_resumes_the_run(inputs, small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "out")
    before = snapshot(tmp_path / "out" / "parts")
    done = call_cli("evaluate", "--data", f"{inputs}/good", "--config", "out/config.toml", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0 and snapshot(tmp_path / "out" / "parts") == before, done.stderr


# --- the other commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", AUDITED)
def test_audit_distinguishes_leaky_from_honest(outcome, case):
    got, leaky = outcome(case), AUDITED[case]
    assert got.done.returncode == (1 if leaky else 0) and got.done.stderr == "" and "Traceback" not in got.done.stdout
    # Findings begin with the name of the column; honest columns next to the leaky one are not named.
    named = {line.split()[0] for line in got.done.stdout.splitlines() if line.strip()} & {"vol", "trend", "smooth", "z", "load"}
    assert named == ({leaky} if leaky else set()) and got.untouched(), got.done.stdout


def test_the_built_in_features_pass_the_audit_command(small, tmp_path):
    done = call_cli("audit", *small, "--n-cuts", "3", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and list(tmp_path.iterdir()) == []
    audits = ("features", "labels", "disguise", "folds")
    assert all(f"audit of {what}: LeakReport: no leak found" in done.stdout for what in audits)


@pytest.mark.parametrize("verb", ["run", "audit"])
def test_a_leak_stops_the_run(small, tmp_path, monkeypatch, capsys, verb):
    from cryptopredict import cli, run_audits
    honest = run_audits.build_features

    def leaky(panel, extra=()):
        return honest(panel, ["time"]).assign(tomorrow=panel["close"].pct_change().shift(-24).astype("float32"))
    monkeypatch.setattr(run_audits, "build_features", leaky)
    monkeypatch.chdir(tmp_path)
    code = cli.main([verb, *small, *(["--out", "out"] if verb == "run" else []), "--n-cuts", "2"])
    assert code == 1 and "tomorrow" in capsys.readouterr().out and list(tmp_path.iterdir()) == [], "no walk-forward after a leak"


def test_prepare_writes_three_tables_and_overwrites_none(tmp_path):
    from cryptopredict.features import build_features
    from cryptopredict.labels import make_labels
    done = shell("prepare", "--years", "1", "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and [p.name for p in tmp_path.iterdir()] == ["out"]
    made = {"panel.parquet", "features.parquet", "labels.parquet", "inventory.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == made
    panel, features, labels = (pd.read_parquet(tmp_path / "out" / f"{n}.parquet") for n in ("panel", "features", "labels"))
    assert len(panel) == 365 * 24 and panel.index.name == "time" and str(panel.index.tz) == "UTC"
    pd.testing.assert_frame_equal(features, build_features(panel), check_freq=False)
    pd.testing.assert_frame_equal(labels, make_labels(panel["close"]), check_freq=False)
    before = snapshot(tmp_path)
    again = shell("prepare", "--years", "1", "--out", "out", cwd=tmp_path)
    assert again.returncode == 2 and "out" in one_line(again.stderr) and snapshot(tmp_path) == before


def test_forecast_prints_every_model(tmp_path):
    done = shell("forecast", "--years", "5", "--models", *BASELINES, "truth", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == [], "without --out nothing is written"
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert all(len(lines[m].split()) == 7 for m in [*BASELINES, "truth"]), done.stdout
    assert "2020-12-30 00:00 UTC" in done.stdout
    probabilities = [[float(x) for x in lines[m].split()[1:4]] for m in BASELINES]
    assert np.allclose(np.sum(probabilities, axis=1), 1, atol=.011)


def test_forecast_writes_what_it_prints_and_overwrites_nothing(small, tmp_path):
    done = call_cli("forecast", *small, "--out", "new/f.json", cwd=tmp_path)
    made = json.loads((tmp_path / "new" / "f.json").read_text())
    rows = made["forecasts"]
    assert done.returncode == 0 and [r["model"] for r in rows] == ["climatology", "ewma"] and set(rows[0]) == {*SCHEMA, "asset"}
    assert all(f"{r['p_up']:.2f}" in done.stdout and f"{r['p10']:+.3f}" in done.stdout for r in rows)
    assert made["horizon"] == "5D" and f"close {made['close']:.2f}" in done.stdout and made["ages"] == {"bars": 1.0}
    assert "age of the newest value of each input, from the start of its bar or day: bars 1 h" in " ".join(done.stdout.split())
    before = snapshot(tmp_path)
    again = call_cli("forecast", *small, "--out", "new/f.json", cwd=tmp_path)
    assert again.returncode == 2 and "f.json" in one_line(again.stderr) and snapshot(tmp_path) == before


def test_forecast_prints_the_configured_spans(small, tmp_path):
    done = call_cli("forecast", *small, cwd=tmp_path)
    assert done.returncode == 0 and "90-day" not in done.stdout and "30-day" not in done.stdout, "the spans are 5 and 2 days"


def test_evaluate_writes_scores(small, tmp_path):
    done = shell("evaluate", *small, "--out", "a/b/out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "climatology" in done.stdout
    scores = json.loads((tmp_path / "a" / "b" / "out" / "scores.json").read_text())
    assert {"provenance", "config", "folds", "audits", "summary", "by_year", "comparison", "reliability"} <= set(scores)
    names = "log_loss brier pinball10 pinball90 interval_score coverage rmse_sigma rmse_log_sigma qlike".split()
    assert {(r["model"], r["score"]) for r in scores["summary"]} == {(m, s) for m in ("climatology", "ewma") for s in names}
    assert all(r["n_windows"] < r["n_origins"] and r["lo"] < r["mean"] < r["hi"] for r in scores["summary"])
    assert not (tmp_path / "a" / "b" / "out" / "report.html").exists()


def test_help_names_every_command(tmp_path):
    done = shell("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and all(verb in done.stdout for verb in HELP)


@pytest.mark.parametrize("case", HELP)
def test_help_names_every_flag(outcome, case):
    got = outcome(case)
    assert (got.done.returncode, got.done.stderr) == (0, "") and got.untouched() and len(got.done.stdout.splitlines()) > 3
    assert all(f"{flag} " in got.done.stdout for flag in HELP[case].split()), got.done.stdout
    if not HELP[case]: assert "not implemented yet" in got.done.stdout.lower()


# --- run on files ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    "A folder with a small file of every format, its panel (`prepared`) and a run on it (`out`)."
    folder = tmp_path_factory.mktemp("files")
    write_sources(folder / "data")
    write(folder / "c.toml", 'horizon = "20D"', 'vol_window = "10D"', 'validation = "120D"', 'first_test = "2018-07-01"',
          'step = "QS"', "n_boot = 100", f"models = {json.dumps(BASELINES)}")
    run = "run --data data --config c.toml --out out --n-cuts 4"
    for words in ("prepare --data data --out prepared", run):
        done = shell(*words.split(), cwd=folder)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


def test_run_on_files_of_every_format(files):
    scores = json.loads((files / "out" / "scores.json").read_text())
    assert set(scores["audits"]) == {"features", "labels", "disguise", "folds", "availability"}
    assert all(a["ok"] for a in scores["audits"].values()) and scores["audits"]["availability"]["tested"]["columns"] == 13
    assert all(p.name in scores["provenance"]["source"] for p in (files / "data").rglob("*") if p.is_file())
    assert scores["config"]["models"] == BASELINES and len(scores["folds"]) == 6 and (files / "out" / "report.html").exists()


def test_each_hour_of_the_panel_holds_what_was_known(files):
    panel = pd.read_parquet(files / "prepared" / "panel.parquet")
    def first(column, value): return str(panel.index[np.isclose(panel[column], value, rtol=1e-9)][0])
    def day(date): return (pd.Timestamp(date) - pd.Timestamp("2017-01-01")).days
    def work(date): return int(np.busday_count("2017-01-01", date))
    # Monday 15 January 2018 was a holiday: Friday's yield and last week's index came on Tuesday, 16:15 New York.
    assert first("dgs10", 2 + work("2018-01-12") / 1000) == "2018-01-16 22:00:00+00:00"
    assert first("dtwexbgs", 2 + work("2018-01-12") / 1000) == "2018-01-16 22:00:00+00:00"
    assert first("dxy", 90 + work("2018-07-03") / 100) == "2018-07-03 22:00:00+00:00"  # 17:15 in summer
    assert first("tx_count", 7000 + day("2018-05-05")) == "2018-05-07 00:00:00+00:00"
    assert first("utxo_count", 5e7 + day("2018-05-05")) == "2018-05-07 00:00:00+00:00"


def test_hours_without_trades_are_filled_and_the_splice_is_marked(files):
    panel = pd.read_parquet(files / "prepared" / "panel.parquet")
    assert panel.index[panel["is_splice"]].tolist() == [pd.Timestamp("2019-01-01 01:00", tz="UTC")]
    before = panel.index <= "2019-01-01"
    lost = panel["is_filled"].to_numpy()
    assert lost.sum() == sum(k % 10 == 7 for k in range(before.sum())) and not lost[~before].any()
    assert (panel["volume"][lost] == 0).all() and (panel["close"].diff()[lost] == 0).all() and (panel["volume"][~lost] > 0).all()


def test_files_are_repaired_only_on_request(tmp_path):
    bars = walk(24 * 30)
    write_binance(tmp_path / "data" / "file.csv", bars.iloc[[*range(100), 101, 100, *range(102, len(bars))]])
    refused = call_cli("prepare", "--data", "data", "--out", "out", cwd=tmp_path)
    assert refused.returncode == 2 and "sort" in one_line(refused.stderr) and not (tmp_path / "out").exists()
    repaired = call_cli("prepare", "--data", "data", "--out", "out", "--repair", "sort", cwd=tmp_path)
    assert repaired.returncode == 0, repaired.stderr
    close = pd.read_parquet(tmp_path / "out" / "panel.parquet")["close"]
    assert np.array_equal(close.to_numpy(), bars["close"].to_numpy())


# --- the user's own forecasters and features ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brief(inputs, tmp_path_factory) -> Path:
    "A folder with my.py, 230 days of bars and a configuration of three folds: the least that the audit of a forecaster needs."
    folder = tmp_path_factory.mktemp("brief")
    write(folder / "my.py", OWN_CODE)
    write_binance(folder / "data" / "file.csv", walk(24 * 230))
    write(folder / "c.toml", (inputs / "short.toml").read_text())
    return folder


def _run_own_code(verb: str, flags: str, folder: Path, out: str = "out") -> subprocess.CompletedProcess:
    "Run a walk-forward with code from my.py, with few cuts if the command audits everything."
    words = f"{verb} --data data --config c.toml --out {out} {flags}" + " --n-cuts 1" * (verb == "run")
    return call_cli(*words.split(), cwd=folder)


def test_own_forecaster_and_feature_become_part_of_the_run(brief):
    done = _run_own_code("run", "--models climatology_4y my.py:MyForecaster --features my.py:speed", brief, "whole")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    out, models = brief / "whole", {"climatology_4y", "my.py:MyForecaster"}
    scores, made = json.loads((out / "scores.json").read_text()), pd.read_parquet(out / "predictions.parquet")
    assert {r["model"] for r in scores["summary"]} == set(made["model"]) == models
    assert {r["model"] for r in scores["comparison"]} == {"my.py:MyForecaster"}
    assert (made.loc[made["model"] == "my.py:MyForecaster", "sigma"] == .6).all()
    assert scores["config"]["features"] == ["my.py:speed"]
    assert set(scores["provenance"]["own_sha256"]) == {"my.py:MyForecaster", "my.py:speed"}
    assert all(scores["audits"][name]["ok"] for name in ("my.py:MyForecaster", "my.py:speed")), "audited before the walk-forward"


def test_evaluate_scores_an_own_forecaster_and_resumes_it_only_unchanged(brief, tmp_path):
    shutil.copytree(brief, tmp_path / "copy")
    flags, folder = "--models climatology_4y my.py:MyForecaster", tmp_path / "copy"
    first = _run_own_code("evaluate", flags, folder)
    assert first.returncode == 0 and "my.py:MyForecaster" in first.stdout, first.stderr
    before = snapshot(folder / "out" / "parts")
    assert _run_own_code("evaluate", flags, folder).returncode == 0 and snapshot(folder / "out" / "parts") == before
    write(folder / "my.py", OWN_CODE.replace(".6]", ".7]"))
    changed = _run_own_code("evaluate", flags, folder)
    assert changed.returncode == 2 and snapshot(folder / "out" / "parts") == before
    assert all(word in one_line(changed.stderr) for word in ("my.py:MyForecaster", "--out"))


@pytest.mark.parametrize("verb, flags, found", [
    ("run", "--models climatology_4y my.py:Leaky", "sigma"),
    ("run", "--features my.py:speed my.py:tomorrow", "tomorrow"),
    ("evaluate", "--features my.py:tomorrow", "tomorrow"),
])
def test_own_code_that_sees_the_future_is_refused(brief, verb, flags, found):
    done = _run_own_code(verb, flags, brief)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (brief / "out").exists(), done.stderr
    assert len((done.stderr or done.stdout.splitlines()[-1]).splitlines()) == 1 and "leak" in done.stderr + done.stdout
    assert flags.split()[-1] in done.stdout + done.stderr and found in done.stdout + done.stderr


@pytest.mark.parametrize("case", OWN_FAULTS)
def test_unusable_own_code_gets_one_line_with_the_remedy(brief, case):
    flags, words = OWN_FAULTS[case]
    done = _run_own_code("evaluate", flags, brief, "refused")
    shutil.rmtree(brief / "refused", ignore_errors=True)
    assert done.returncode == 2 and all(word in one_line(done.stderr) for word in words.split()), done.stderr


# --- output that cannot be written, and bugs ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["latin-1", "full", *(pytest.param(how, marks=pytest.mark.slow) for how in ("ascii", "closed"))])
def test_the_report_is_written_even_if_stdout_fails(small, tmp_path, how):
    if how == "full" and not Path("/dev/full").exists(): pytest.skip("no /dev/full")
    words = [command(), "run", *map(str, small), "--out", "out"]
    env = {**ENV, "PYTHONIOENCODING": how} if how in ("latin-1", "ascii") else ENV
    line = shlex.join(words) + {"full": " > /dev/full", "closed": " >&-"}.get(how, "")
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, timeout=240)
    assert (tmp_path / "out" / "report.html").exists(), done.stderr
    assert done.returncode == (2 if how == "full" else 0), done.stderr
    assert done.stderr.decode().count("\n") == (how == "full") and b"Traceback" not in done.stderr
    if how in ("latin-1", "ascii"): assert b"log sigma" in done.stdout and b"report: out/report.html" in done.stdout


def test_a_bug_exits_with_3_and_a_mistake_with_2(tmp_path):
    fault = "import sys, unittest.mock as m; from cryptopredict.cli import main; {patch} sys.exit(main({words!r}))"
    def outcome(*words, patch=""):
        code = fault.format(patch=patch, words=list(words))
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)
    broken = "m.patch('cryptopredict.simulate.simulate_market', side_effect=KeyError('x')).start();"
    bug = outcome("prepare", "--years", "1", patch=broken)
    assert bug.returncode == 3 and "Traceback" in bug.stderr and "not in your call or files" in bug.stderr.splitlines()[-1]
    mistake, verbose = outcome("run", "--years", "0"), outcome("run", "--years", "0", "--verbose")
    assert (mistake.returncode, verbose.returncode) == (2, 2) and "--years 0" in one_line(mistake.stderr)
    assert "Traceback" in verbose.stderr and verbose.stderr.splitlines()[-1] == one_line(mistake.stderr)
