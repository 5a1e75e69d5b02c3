"""Coverage of intervals, size of the test, bias of `n_eff`: `python benchmarks/inference.py --out FILE`, two minutes.

Simulates series with overlapping windows, as daily losses of a 90-day label have: moving sums of normal noise, and losses of them
(squares, an exponential, coverage of a band, pinball and log loss, interval score, differences of two equally good forecasts).
Reports for each number of origins: the share of 90 % intervals that contain the mean (None if no interval is given), the share of
tests at 5 % that reject a true null hypothesis, and the median of `n_eff` next to the number of separate windows."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from scipy import optimize

from cryptopredict.scores import (
    LEAST_WINDOWS,
    block_bootstrap,
    block_length,
    block_standard_error,
    dm_test,
    null_distribution,
    overlapping_noise,
    stretched_interval,
)
from cryptopredict.storage import code_commit, write_atomic

SIZES = [(365, 90), (365, 30), (1000, 90), (2465, 90), (2525, 30)]  # daily origins, days in a window


def log_loss(x: np.ndarray) -> np.ndarray:
    "Log loss of the constant probabilities .3, .2, .5, which are the true ones."
    return -np.log(np.array([.3, .2, .5]))[np.digitize(x, [-.5244, 0.])]


def pinball(x: np.ndarray, quantile: float) -> np.ndarray:
    "Pinball loss of a forecast of the 0.1 quantile."
    return (x - quantile) * (.1 - (x < quantile))


def interval_score(x: np.ndarray, half: float) -> np.ndarray:
    "Interval score of the 80 % band [-half, half]."
    return 2 * half + 10 * np.maximum(np.abs(x) - half, 0)


def as_good(loss, one: float, low: float, high: float) -> float:
    "The forecast between `low` and `high` whose expected loss on normal noise equals that of `one`."
    x = np.random.default_rng(1).standard_normal(2_000_000)
    return optimize.brentq(lambda v: float((loss(x, v) - loss(x, one)).mean()), low, high, xtol=1e-4)


OTHER = {"pinball": as_good(pinball, -1.6, -1.25, -.7), "interval": as_good(interval_score, 1.0, 1.3, 2.2)}
LOSSES = {"normal": lambda x: x, "squares": lambda x: x**2, "exponential": lambda x: np.exp(.8 * x),
          "coverage": lambda x: 1. * (np.abs(x) < 1.2816), "pinball": lambda x: np.where(x > 1.2816, .9, -.1) * (x - 1.2816),
          "log loss": log_loss, "interval score": lambda x: interval_score(x, 1.2816),
          "difference of pinball": lambda x: pinball(x, -1.6) - pinball(x, OTHER["pinball"]),
          "difference of interval scores": lambda x: interval_score(x, 1.0) - interval_score(x, OTHER["interval"])}


def one(n: int, overlap: int, name: str, series: int, seed: int) -> dict:
    "Coverage, size and effective sample size for one loss."
    x = overlapping_noise(n, overlap, series, seed) / np.sqrt(overlap)
    truth = LOSSES[name](np.random.default_rng(0).standard_normal(4_000_000)).mean()
    losses, block = LOSSES[name](x) - truth, block_length(n, overlap)
    inside = []
    for k, v in enumerate(losses if n >= LEAST_WINDOWS * overlap else ()):
        low, high = stretched_interval(block_bootstrap(v, block, 300, seed=k), v.mean(), n, overlap, .9)
        inside.append(low <= 0 <= high)
    p = np.array([dm_test(v, overlap)[1] for v in losses])
    se, some = block_standard_error(losses, block), losses.std(axis=1) > 0  # a short series may be constant
    n_eff = np.minimum(n, losses.var(axis=1)[some] / se[some] ** 2 / null_distribution(n, overlap, block).n_eff_bias)
    return dict(origins=n, overlap=overlap, losses=name, coverage_of_90=round(float(np.mean(inside)), 3) if inside else None,
                size_of_5=round(float(np.mean(p < .05)), 3), n_eff_median=round(float(np.median(n_eff)), 1),
                windows=round(n / overlap, 1))


def main() -> None:
    "Simulate, print, and write the report."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", type=int, default=2000, help="series per loss and size")
    parser.add_argument("--seed", type=int, default=7, help="seed of the noise")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    rows = []
    for n, overlap in SIZES:
        for name in LOSSES:
            rows.append(one(n, overlap, name, args.series, args.seed))
            print(rows[-1], flush=True)
    figures = dict(rows=rows, series=args.series, seed=args.seed, commit=code_commit())
    if args.out: write_atomic(args.out, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__": main()
