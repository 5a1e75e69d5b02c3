"Shared helpers: processes, the shell command, snapshots of folders, error messages, small source files."
import contextlib
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"  # the real source files, next to the checkout, not part of it
PLOTLY = "application/vnd.plotly.v1+json"  # the type of a figure among the outputs of a notebook
ENV = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}  # a filter of the caller would change what is printed
ENV |= {"COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}
BASELINES = ["climatology", "climatology_4y", "persistence", "ewma", "log_har"]
SCHEMA = ["time", "fold", "seed", "model", "p_down", "p_flat", "p_up", "p10", "p90", "sigma"]
MEASURE = """import json, resource, subprocess, sys, time
begin = time.monotonic()
rc = subprocess.call(sys.argv[2:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
json.dump(dict(rc=rc, seconds=time.monotonic() - begin, peak=peak), open(sys.argv[1], "w"))"""


def in_child(work: Callable[[], object], timeout: float = 240) -> int:
    "Run `work` in a fork; its exit status: 0, 70 after an exception, negative after a signal."
    pid = os.fork()
    if not pid:
        status = 70
        try:
            work()
            status = 0
        finally: os._exit(status)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended: return os.waitstatus_to_exitcode(status)
        time.sleep(.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"still running after {timeout} s")


def command() -> str:
    "The installed console script of the environment the tests run in."
    script = Path(sysconfig.get_path("scripts")) / "cryptopredict"
    assert script.exists(), f"{script} is missing: pip install -e '.[dev]'"
    return str(script)


def shell(*words: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess:
    "Run the shell command in a process of its own."
    return subprocess.run([command(), *map(str, words)], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=timeout)


def call_cli(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    "Run the same command in this process, which is faster; enough to check exit code, output and files."
    from cryptopredict.cli import main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: code = main(list(map(str, words)))
        except SystemExit as stop: code = stop.code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@dataclass
class Measured:
    "A finished process."
    cwd: Path
    out: Path  # the run folder it wrote
    rc: int
    stdout: str
    stderr: str
    seconds: float  # wall time, for information: no test compares it
    peak: int  # largest resident set, bytes


def measure(folder: Path, *words, timeout: float = 600) -> None:
    """Run a command in an empty folder and store what `load_measured` reads.

    A bare interpreter starts it, since a child inherits the peak memory of its parent.
    """
    cwd = folder / "cwd"
    cwd.mkdir(parents=True)
    argv = [sys.executable, "-S", "-c", MEASURE, folder / "measured.json", *words]
    done = subprocess.run(list(map(str, argv)), cwd=cwd, env=ENV, capture_output=True, text=True, timeout=timeout)
    (folder / "output.json").write_text(json.dumps(dict(stdout=done.stdout, stderr=done.stderr)))


def load_measured(folder: Path) -> Measured:
    "The command that `measure` has run in this folder."
    runs = sorted((folder / "cwd").glob("runs/*")) or [folder / "cwd" / "runs"]
    notes = {k: v for name in ("measured", "output") for k, v in json.loads((folder / f"{name}.json").read_text()).items()}
    return Measured(cwd=folder / "cwd", out=runs[0], **notes)


def snapshot(folder: Path, times: bool = True) -> dict:
    "Path -> (hash of the content, time of the last change) for everything below a folder; all times are 0 unless `times`."
    def entry(path):
        content = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        return content, path.stat().st_mtime_ns if times else 0
    return {str(p.relative_to(folder)): entry(p) for p in sorted(folder.rglob("*")) if "__pycache__" not in p.parts}


@dataclass
class Outcome:
    "A finished process, the folder it ran in, and a snapshot of that folder before."
    done: subprocess.CompletedProcess
    cwd: Path
    before: dict

    def untouched(self) -> bool:
        "Whether contents and times in the folder are as before."
        return snapshot(self.cwd) == self.before


@contextlib.contextmanager
def side_by_side(names: list[str], start: Callable[[str], Outcome]) -> Iterator[Callable[[str], Outcome]]:
    "Start one process per name, two at a time; yields a function that waits for the outcome of a name."
    with ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(start, name) for name in names}
        try: yield lambda name: running[name].result()
        finally: pool.shutdown(cancel_futures=True)


def one_line(stderr: str) -> str:
    "The error message on stderr; fails unless it is one line."
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("cryptopredict: error: "), stderr
    return lines[0]


def check_message(error: pytest.ExceptionInfo, *words: str) -> None:
    "Check that the message of an exception is one line that holds all the words."
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def read_result(name: str) -> dict:
    "The committed measurements in `results/NAME.json`."
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


# --- source files --------------------------------------------------------------------------------------------------------


def walk(hours: int, seed: int = 0, start: str = "2017-01-01") -> pd.DataFrame:
    "Hourly bars of a random walk by opening time: open high low close volume."
    rng = np.random.default_rng(seed)
    close = np.round(1e4 * np.exp(np.cumsum(rng.normal(0, .006, hours))), 2)
    opened, volume = np.r_[1e4, close[:-1]], np.round(rng.exponential(50, hours) + 1, 3)
    bars = dict(open=opened, high=np.maximum(opened, close) + 1, low=np.minimum(opened, close) - 1, close=close, volume=volume)
    return pd.DataFrame(bars, index=pd.date_range(start, periods=hours, freq="h", tz="UTC"))


def write(path: Path, *lines: str) -> Path:
    "Write lines to a text file, creating its folders as needed."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_binance(path: Path, bars: pd.DataFrame) -> Path:
    "Write bars as `ts,open,high,low,close,volume` with ISO times."
    rows = (f"{t:%Y-%m-%dT%H:%M:%S}+00:00," + ",".join(map(str, r)) for t, r in zip(bars.index, bars.to_numpy().tolist()))
    return write(path, "ts,open,high,low,close,volume", *rows)


def write_kraken(path: Path, bars: pd.DataFrame) -> Path:
    "Write bars as a gzipped Kraken dump: unix seconds first, number of trades last, no header."
    seconds = (bars.index - pd.Timestamp(0, tz="UTC")) // pd.Timedelta("1s")
    rows = [f"{s}," + ",".join(map(str, r)) + ",7" for s, r in zip(seconds, bars.to_numpy().tolist())]
    path.write_bytes(gzip.compress(("\n".join(rows) + "\n").encode(), mtime=0))
    return path


def write_inputs(folder: Path) -> Path:
    "Write a valid folder of bars, folders with one fault each, and configurations."
    bars = walk(24 * 300)
    write_binance(folder / "good" / "file.csv", bars)
    write_binance(folder / "other" / "file.csv", walk(24 * 300, seed=1))
    write_binance(folder / "hole" / "file.csv", bars[(bars.index < "2017-06-10") | (bars.index >= "2017-09-10")])
    write_binance(folder / "disordered" / "file.csv", bars.iloc[[*range(50), 51, 50, *range(52, 200)]])
    write_binance(folder / "short" / "file.csv", bars.iloc[:24 * 20])
    write(folder / "daily_only" / "DGS10.csv", "observation_date,DGS10", "2017-01-03,2.4")
    write(folder / "header" / "file.csv", "ts,open,high,low,close,volume")
    write(folder / "unknown" / "file.csv", "a,b,c", "1,2,3")
    write(folder / "binary" / "file.csv", "\x00\x01\x02,\x00")
    write(folder / "empty" / "file.csv")
    (folder / "nothing").mkdir()
    short = ['horizon = "5D"', 'vol_window = "2D"', 'validation = "60D"', 'step = "30D"', 'first_test = "2017-05-01"',
             'models = ["climatology", "ewma"]']
    write(folder / "short.toml", *short, "n_boot = 100")
    write(folder / "resamples.toml", *short, "n_boot = 200")
    for name, line in dict(key="nonsense = 3", broken="horizon = ", value='horizon = "soon"', list='models = ["nope"]',
                           deep="[model]\nd_modle = 3", high="[train]\nlr = 7.0", unfit="[model]\nheaddim = 7",
                           embargo='embargo = "soon"').items():
        write(folder / f"{name}.toml", line)
    write(folder / "code.py", "def number(panel): return 3", "def raises(panel): return panel['price_usd']")
    write(folder / "syntax.py", "def f(panel) return panel")
    write(folder / "imports.py", "import module_that_is_not_there")
    return folder


def write_sources(folder: Path, begin: str = "2017-01-01", end: str = "2019-12-31") -> Path:
    "Write a file of every format: two venues that meet at 2019, and daily series in which no two values are equal."
    days, splice = pd.date_range(begin, end, freq="D"), pd.Timestamp("2019-01-01", tz="UTC")
    bars = walk(24 * len(days), start=begin)
    write_binance(folder / "market" / "binance.csv", bars[bars.index >= splice])
    # A thin book: an hour without trades has no line.
    kraken = bars[bars.index < splice]
    write_kraken(folder / "market" / "kraken.csv.gz", kraken[np.arange(len(kraken)) % 10 != 7])
    metrics = ["AdrActCnt", "BlkCnt", "CapMVRVCur", "DiffMean", "FeeTotNtv", "SplyCur", "TxCnt", "TxTfrCnt"]
    rows = (f"{d:%Y-%m-%d}," + ",".join(f"{1000. * (k + 1) + i:.1f}" for k in range(len(metrics))) for i, d in enumerate(days))
    write(folder / "coinmetrics.csv", "time," + ",".join(metrics), *rows)
    write(folder / "utxo-count.csv", *(f"{d:%Y-%m-%d %H:%M:%S},{5e7 + i:.1f}" for i, d in enumerate(days)))
    work = [d for d in days if d.day_of_week < 5]
    for name in ("DGS10", "DGS2", "DTWEXBGS"):  # a holiday is an empty field
        value = [f"{2 + i / 1000}" if f"{d:%Y-%m-%d}" != "2018-01-15" else "" for i, d in enumerate(work)]
        write(folder / f"{name}.csv", f"observation_date,{name}", *(f"{d:%Y-%m-%d},{v}" for d, v in zip(work, value)))
    quotes = (f"{d:%Y-%m-%d},{90 + i / 100},{91 + i / 100},{89 + i / 100},{90 + i / 100},0" for i, d in enumerate(work))
    write(folder / "DX-Y.NYB.csv", "Date,Close,High,Low,Open,Volume", *quotes)
    return folder
