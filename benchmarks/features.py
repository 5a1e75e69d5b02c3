"""What features and their audit cost: `python benchmarks/features.py --out results/features.json`, one thread, about a minute.

Builds all features on simulated panels of two lengths, in turn; updates a `FeatureState` with single bars after years of history;
and audits `build_features` on 100,000 rows."""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ.setdefault(name, "1")

import pandas as pd  # noqa: E402

from cryptopredict.features import FeatureState, build_features  # noqa: E402
from cryptopredict.leakage import audit  # noqa: E402
from cryptopredict.simulate import simulate_market  # noqa: E402
from cryptopredict.storage import code_commit, write_atomic  # noqa: E402

ROWS = (100_000, 200_000)


def summary(values: list[float], digits: int) -> dict:
    "Median, smallest and largest value."
    values = sorted(values)
    return dict(median=round(statistics.median(values), digits), least=round(values[0], digits), most=round(values[-1], digits))


def clock(work, *args) -> float:
    "Seconds that `work(*args)` takes."
    begin = time.perf_counter()
    work(*args)
    return time.perf_counter() - begin


def main() -> None:
    "Measure, print, and write the report."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="builds of each panel")
    parser.add_argument("--bars", type=int, default=300, help="updates with a single bar")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    whole, _ = simulate_market(max(ROWS), seed=0)
    panels = {rows: whole.iloc[:rows] for rows in ROWS}
    build_features(whole.iloc[:5000])  # load libraries
    rounds = [{rows: clock(build_features, panel) for rows, panel in panels.items()} for _ in range(args.rounds)]
    state, took = FeatureState.from_panel(panels[ROWS[0]].iloc[:3 * 8760]), []
    for bar in panels[ROWS[0]].iloc[:args.bars].reset_index().to_dict("records"):
        bar["time"] = state.time + pd.Timedelta("1h")
        took.append(1000 * clock(state.update, bar))
    begin = time.perf_counter()
    report = audit(build_features, panels[ROWS[0]]).raise_if_leaky()
    figures = dict(
        build_seconds={str(rows): summary([r[rows] for r in rounds], 3) for rows in ROWS},
        twice_the_rows=summary([r[ROWS[1]] / r[ROWS[0]] for r in rounds], 2),
        bar_milliseconds=summary(took, 2),
        audit=dict(rows=ROWS[0], cuts=report.tested["cuts"], runs=report.tested["runs"],
                   seconds=round(time.perf_counter() - begin, 1)),
        rounds=args.rounds, bars=args.bars, machine=platform.machine(), python=platform.python_version(), pandas=pd.__version__,
        commit=code_commit())
    print(json.dumps(figures, indent=1))
    if args.out: write_atomic(args.out, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__": main()
