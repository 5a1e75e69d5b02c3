"""Coverage of the intervals, size of the test, bias of `n_eff`: `python benchmarks/inference.py --out FILE`, two minutes.

Series whose values share a window, as daily losses of a 90-day label do: moving sums of normal noise, and what a loss makes
of them (squares, an exponential, coverage of a band, the pinball loss, the log loss of three classes). For each number of
origins the share of 90 % intervals that contain the mean, the share of tests at 5 % that reject a true null, and the median of
`n_eff` beside the number of windows."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from cryptopredict.checkpoint import code_commit, write_atomic
from cryptopredict.scores import _block_length, _block_se, _interval, _null, _overlapping_noise, block_bootstrap, dm_test

SIZES = [(365, 90), (365, 30), (1000, 90), (2465, 90), (2525, 30)]  # daily origins, days that they share


def log_loss(x: np.ndarray) -> np.ndarray:
    "Log loss of constant probabilities .3, .2, .5 on the thirds that they are right about."
    return -np.log(np.array([.3, .2, .5]))[np.digitize(x, [-.5244, 0.])]


LOSSES = {"normal": lambda x: x, "squares": lambda x: x**2, "exponential": lambda x: np.exp(.8 * x),
          "coverage": lambda x: 1. * (np.abs(x) < 1.2816), "pinball": lambda x: np.where(x > 1.2816, .9, -.1) * (x - 1.2816),
          "log loss": log_loss}


def one(n: int, overlap: int, name: str, series: int, seed: int) -> dict:
    "Coverage, size and effective sample size for one kind of loss."
    x = _overlapping_noise(n, overlap, series, seed) / np.sqrt(overlap)
    truth = LOSSES[name](np.random.default_rng(0).standard_normal(4_000_000)).mean()
    losses, block = LOSSES[name](x) - truth, _block_length(n, overlap)
    inside = []
    for k, v in enumerate(losses):
        low, high = _interval(block_bootstrap(v, block, 300, seed=k), v.mean(), n, overlap, .9)
        inside.append(low <= 0 <= high)
    p = np.array([dm_test(v, overlap)[1] for v in losses])
    n_eff = np.minimum(n, losses.var(axis=1) / _block_se(losses, block) ** 2 / _null(n, overlap, block).n_eff_bias)
    return dict(origins=n, overlap=overlap, losses=name, coverage_of_90=round(float(np.mean(inside)), 3),
                size_of_5=round(float(np.mean(p < .05)), 3), n_eff_median=round(float(np.median(n_eff)), 1),
                windows=round(n / overlap, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", type=int, default=2000, help="series of each kind")
    parser.add_argument("--seed", type=int, default=7)
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
