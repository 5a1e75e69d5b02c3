"What several test files share: the shell command as a process, folders compared by content, source files written out."
import gzip
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

ENV = {**os.environ, "COLUMNS": "160", "TERM": "dumb", "NO_COLOR": "1"}
SMALL = ("--years", "5", "--first-test", "2020-01-01", "--models", "climatology", "ewma")  # one fold, two models: seconds
MEASURE = """import json, resource, subprocess, sys, time
begin = time.monotonic()
rc = subprocess.call(sys.argv[2:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
json.dump(dict(rc=rc, seconds=time.monotonic() - begin, peak=peak), open(sys.argv[1], "w"))"""


def command() -> str:
    "The installed console script of the environment the tests run in."
    script = Path(sysconfig.get_path("scripts")) / "cryptopredict"
    assert script.exists(), f"{script} is missing: pip install -e '.[dev]'"
    return str(script)


def shell(*words: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess:
    "The shell command run to its end."
    return subprocess.run([command(), *map(str, words)], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=timeout)


@dataclass
class Measured:
    "A finished process."
    cwd: Path
    out: Path  # the run folder it made
    rc: int
    stdout: str
    stderr: str
    seconds: float  # wall time
    peak: int  # largest resident set, bytes


def measured(*words: str, cwd: Path, timeout: float = 400) -> Measured:
    "The shell command with wall time and peak memory, the children's of a bare parent (a child starts with its parent's peak)."
    note = cwd.parent / f"{cwd.name}.json"
    argv = [sys.executable, "-S", "-c", MEASURE, note, command(), *words]
    done = subprocess.run(list(map(str, argv)), cwd=cwd, env=ENV, capture_output=True, text=True, timeout=timeout)
    runs = sorted(cwd.glob("runs/*")) or [cwd / "runs"]
    return Measured(cwd=cwd, out=runs[0], stdout=done.stdout, stderr=done.stderr, **json.loads(note.read_text()))


def snapshot(folder: Path, times: bool = True) -> dict:
    "Every path below a folder with its content's hash and, unless told otherwise, its time of change."
    def entry(p): return ("folder" if p.is_dir() else hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns if times else 0)
    return {str(p.relative_to(folder)): entry(p) for p in sorted(folder.rglob("*"))}


def one_line(stderr: str) -> str:
    "The single line of an error message; anything else fails."
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("cryptopredict: error: "), stderr
    return lines[0]


def walk(hours: int, seed: int = 0, start: str = "2017-01-01") -> pd.DataFrame:
    "Bars of a random walk by opening time: open high low close volume."
    rng = np.random.default_rng(seed)
    close = np.round(1e4 * np.exp(np.cumsum(rng.normal(0, .006, hours))), 2)
    opened = np.r_[1e4, close[:-1]]
    bars = dict(open=opened, high=np.maximum(opened, close) + 1, low=np.minimum(opened, close) - 1, close=close, volume=np.round(rng.exponential(50, hours) + 1, 3))
    return pd.DataFrame(bars, index=pd.date_range(start, periods=hours, freq="h", tz="UTC"))


def write_binance(path: Path, bars: pd.DataFrame) -> Path:
    "Bars as `ts,open,high,low,close,volume` with ISO times."
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{t:%Y-%m-%dT%H:%M:%S}+00:00," + ",".join(map(str, r)) for t, r in zip(bars.index, bars.to_numpy().tolist())]
    path.write_text("\n".join(["ts,open,high,low,close,volume", *rows]) + "\n")
    return path


def write_kraken(path: Path, bars: pd.DataFrame) -> Path:
    "Bars as a gzipped Kraken dump: unix seconds first, trades last, no header."
    seconds = (bars.index - pd.Timestamp(0, tz="UTC")) // pd.Timedelta("1s")
    rows = [f"{s}," + ",".join(map(str, r)) + ",7" for s, r in zip(seconds, bars.to_numpy().tolist())]
    path.write_bytes(gzip.compress(("\n".join(rows) + "\n").encode(), mtime=0))
    return path


def write_sources(folder: Path, begin: str = "2017-01-01", end: str = "2019-12-31") -> Path:
    "A folder with a small file of every format: two venues that meet at 2019, and daily series whose every value is another."
    splice = pd.Timestamp("2019-01-01", tz="UTC")
    days = pd.date_range(begin, end, freq="D")
    bars = walk(24 * len(days), start=begin)
    write_binance(folder / "market" / "binance.csv", bars[bars.index >= splice])
    # A thin book: an hour without trades has no line.
    kraken = bars[bars.index < splice]
    write_kraken(folder / "market" / "kraken.csv.gz", kraken[np.arange(len(kraken)) % 10 != 7])
    n, work = np.arange(len(days)), [d for d in days if d.day_of_week < 5]
    metrics = ["AdrActCnt", "BlkCnt", "CapMVRVCur", "DiffMean", "FeeTotNtv", "SplyCur", "TxCnt", "TxTfrCnt"]
    lines = [f"{d:%Y-%m-%d}," + ",".join(f"{1000. * (k + 1) + i:.1f}" for k in range(len(metrics))) for i, d in zip(n, days)]
    (folder / "coinmetrics.csv").write_text("\n".join(["time," + ",".join(metrics), *lines]) + "\n")
    holiday = lambda d, value: "" if f"{d:%Y-%m-%d}" == "2018-01-15" else value
    (folder / "utxo-count.csv").write_text("".join(f"{d:%Y-%m-%d %H:%M:%S},{5e7 + i:.1f}\n" for i, d in zip(n, days)))
    for name in ("DGS10", "DGS2", "DTWEXBGS"):
        (folder / f"{name}.csv").write_text("\n".join([f"observation_date,{name}", *(f"{d:%Y-%m-%d},{holiday(d, 2 + i / 1000)}" for i, d in enumerate(work))]) + "\n")
    quotes = [f"{d:%Y-%m-%d},{90 + i / 100},{91 + i / 100},{89 + i / 100},{90 + i / 100},0" for i, d in enumerate(work)]
    (folder / "DX-Y.NYB.csv").write_text("\n".join(["Date,Close,High,Low,Open,Volume", *quotes]) + "\n")
    return folder


@dataclass
class Outcome:
    "A process that has ended, the folder it ran in, and what that folder held before."
    done: subprocess.CompletedProcess
    cwd: Path
    before: dict

    def untouched(self) -> bool:
        "No byte and no date of the folder changed."
        return snapshot(self.cwd) == self.before


@contextmanager
def side_by_side(names: list[str], start: Callable[[str], Outcome]) -> Iterator[Callable[[str], Outcome]]:
    "Processes of many small tests, two at a time; gives a function from name to outcome."
    with ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(start, name) for name in names}
        try: yield lambda name: running[name].result()
        finally: pool.shutdown(cancel_futures=True)
