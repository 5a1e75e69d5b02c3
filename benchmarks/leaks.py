"""How much false skill does each kind of leak give on real data, compared with the same pipeline without it?

  python benchmarks/leaks.py --data DIR --out results/leaks.json        one thread, under four minutes; needs scikit-learn

The learner is always a random forest whose trees see a tenth of the training rows each, since labels of neighbouring days
overlap. Each leak has an honest twin (the trailing mean for the centred one, the choice on validation rows for the choice on test
rows). Both are scored on the same origins, 00:00 UTC of every day since --first-test. Where the twin is worse than the plain
pipeline, the gain of the leak is overstated, so its gain over the plain pipeline is reported too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # numpy reads this when it is imported

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from scipy.optimize import minimize_scalar  # noqa: E402
from scipy.signal import find_peaks, savgol_coeffs, savgol_filter  # noqa: E402
from sklearn.decomposition import PCA  # noqa: E402
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.model_selection import KFold  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

from cryptopredict.features import ALL, build_features, registry  # noqa: E402
from cryptopredict.labels import make_labels  # noqa: E402
from cryptopredict.leakage import Fold, walk_forward  # noqa: E402
from cryptopredict.scores import block_bootstrap, effective_windows  # noqa: E402
from cryptopredict.sources import join_panel, load_tables  # noqa: E402
from cryptopredict.storage import code_commit, write_atomic  # noqa: E402
from cryptopredict.walkforward import panel_hash  # noqa: E402

TREES, OVERLAP = 100, dict(direction=90, sigma=30)  # days that neighbouring labels share
UNUSED = ["hour_sin", "hour_cos", "utxo_90d"]  # constant at 00:00, or from a source that ends in 2018
HOW = dict(
    learner="random forest, 100 trees, at least 5 rows per leaf, max_samples as given; probabilities smoothed with one vote per "
            "class; every score is the mean over the seeds, or over the numbers of columns or components tried",
    direction="90-day direction, 3 classes; accuracy and log loss (nats) of daily origins",
    sigma="log of the next 30 days' volatility; r2 = 1 - mean squared error / variance of the tested rows",
    honest="expanding folds of a year; fitted on the rows whose 90-day label matured before the year began",
    gain="leak minus honest twin, positive is better; with a 90 % block-bootstrap interval, blocks of two label lengths, which "
         "does not include the randomness of the forest: see control",
    gain_plain="leak minus the honest pipeline without the twin; other columns change the random draws, so that differences of "
               "about 0.02 in accuracy or log loss mean nothing")


# -- data and learner -----------------------------------------------------------------------------


def midnights(frame: pd.DataFrame | pd.Series) -> pd.DataFrame | pd.Series:
    """The rows at 00:00 UTC."""
    return frame[frame.index.hour == 0]


def features_of(panel: pd.DataFrame) -> pd.DataFrame:
    """The registered features at 00:00 UTC, 0 where missing."""
    return midnights(build_features(panel)).drop(columns=UNUSED).fillna(0)


@dataclass
class Data:
    """Panel and tables, features of all midnights, labels of those that have one, and folds of the labelled midnights."""
    panel: pd.DataFrame
    tables: tuple
    features: pd.DataFrame
    labels: pd.DataFrame
    folds: list[Fold]
    max_samples: float  # share of the training rows that a tree sees
    seeds: int

    @cached_property
    def x(self) -> np.ndarray: return self.features.loc[self.labels.index].to_numpy()
    @cached_property
    def tested(self) -> np.ndarray: return np.concatenate([f.test for f in self.folds])
    @cached_property
    def parts(self) -> list[tuple]: return [(f.refit, f.test) for f in self.folds]
    @cached_property
    def direction(self) -> np.ndarray: return self.labels["direction"].to_numpy("int64")
    @cached_property
    def sigma(self) -> np.ndarray: return np.log(self.labels["sigma"].to_numpy())
    @cached_property
    def honest(self) -> dict: return {target: walk(self, self.x, self.parts, target) for target in OVERLAP}


def read_data(args: argparse.Namespace) -> Data:
    """Read everything that the leaks need from the source files."""
    tables = load_tables(args.data)
    panel, _ = join_panel(*tables)
    labels = midnights(make_labels(panel["close"])).dropna()
    folds = walk_forward(labels.index, labels["label_end"], first_test=args.first_test)
    return Data(panel, tables, features_of(panel), labels, folds, args.max_samples, args.seeds)


def fit(d: Data, x, rows, target: str = "direction", seed: int = 0, leaf: int = 5):
    """A forest fitted on `rows`."""
    make = RandomForestClassifier if target == "direction" else RandomForestRegressor
    how = dict(max_features="sqrt", min_samples_leaf=leaf, max_samples=d.max_samples if d.max_samples < 1 else None)
    return make(TREES, random_state=seed, n_jobs=1, **how).fit(x[rows], getattr(d, target)[rows])


def predict(model, x) -> np.ndarray:
    """Smoothed probabilities of the three classes, or log sigma."""
    if not hasattr(model, "predict_proba"): return model.predict(x)
    votes = np.ones((len(x), 3))
    votes[:, model.classes_] += TREES * model.predict_proba(x)
    return votes / votes.sum(axis=1, keepdims=True)


def in_order(d: Data, parts: list[tuple], forecasts: list[np.ndarray]) -> np.ndarray:
    """Forecasts of several parts in the order of the tested origins."""
    rows, values = np.concatenate([test for _, test in parts]), np.concatenate(forecasts)
    assert np.array_equal(np.sort(rows), d.tested)  # the same origins, whatever the split
    return values[np.argsort(rows)]


def walk(d: Data, x, parts: list[tuple], target: str = "direction", seeds: int | None = None) -> np.ndarray:
    """Forecasts of the tested origins, (seeds, origins, ...); `x` is one array for all parts, or a list with one per part."""
    xs = x if isinstance(x, list) else [x] * len(parts)
    one = lambda seed: [predict(fit(d, x, train, target, seed), x[test]) for x, (train, test) in zip(xs, parts)]
    return np.stack([in_order(d, parts, one(seed)) for seed in range(seeds or d.seeds)])


# -- leaks: splits --------------------------------------------------------------------------------


def shuffled(d: Data) -> list[tuple]:
    """Split at random into five parts."""
    parts = KFold(5, shuffle=True, random_state=0).split(d.x)
    return [(train, np.intersect1d(test, d.tested)) for train, test in parts]


def unpurged(d: Data) -> list[tuple]:
    """Train on all rows before the test, without a purge."""
    return [(np.arange(f.test[0]), f.test) for f in d.folds]


def purged_by_sigma(d: Data) -> list[tuple]:
    """Train on rows whose 30-day label has matured."""
    begin, end = d.labels.index, d.labels["sigma_end"]
    return [(np.flatnonzero(end <= begin[f.test[0]]), f.test) for f in d.folds]


def in_sample(d: Data) -> list[tuple]:
    """Train on all rows, the tested ones included."""
    return [(np.arange(len(d.x)), f.test) for f in d.folds]


# -- leaks: columns of the panel ------------------------------------------------------------------


def log_close(panel: pd.DataFrame) -> pd.Series:
    """Log of the close at 00:00 UTC."""
    return np.log(midnights(panel["close"]))


def day_bar(panel: pd.DataFrame, leaky: bool) -> pd.DataFrame:
    """High, low and close of a day relative to its open, stamped with the begin or the end of the day."""
    days = panel.resample("1D", closed="right", label="left" if leaky else "right")
    bars = np.log(days.agg(dict(open="first", high="max", low="min", close="last")))
    return bars[["high", "low", "close"]].sub(bars["open"], axis=0).reindex(midnights(panel).index)


def centred_mean(panel: pd.DataFrame, leaky: bool) -> pd.Series:
    """31-day mean of the log price, centred or trailing, relative to the price."""
    price = log_close(panel)
    return price.rolling(31, center=leaky, min_periods=16).mean() - price


def weekly(panel: pd.DataFrame, leaky: bool) -> pd.Series:
    """Mean price of a week, filled backward or forward, relative to the price."""
    price = log_close(panel)
    week = price.resample("W", closed="right", label="right").mean()
    return week.reindex(price.index, method="bfill" if leaky else "ffill") - price


def monthly(panel: pd.DataFrame, leaky: bool) -> pd.Series:
    """MVRV of the first of each month, interpolated or carried forward, relative to today's."""
    mvrv = np.log(midnights(panel["mvrv"]).ffill())
    first = mvrv.where(mvrv.index.day == 1)
    return (first.interpolate() if leaky else first.ffill()) - mvrv


def polynomial_slope(panel: pd.DataFrame, leaky: bool) -> pd.Series:
    """Slope of a cubic through 181 days (Savitzky-Golay), at their middle or their end."""
    price = log_close(panel)
    if leaky: return pd.Series(savgol_filter(price, 181, 3, deriv=1), price.index)
    weights = savgol_coeffs(181, 3, deriv=1, pos=180, use="dot")
    return pd.Series(np.convolve(price, weights[::-1])[:len(price)], price.index).where(np.arange(len(price)) >= 180)


def low_pass(x: np.ndarray) -> np.ndarray:
    """`x` without its periods below 180 days, by FFT about the line from its first to its last value."""
    line = np.linspace(x[0], x[-1], len(x))
    spectrum = np.fft.rfft(x - line)
    spectrum[np.fft.rfftfreq(len(x)) > 1 / 180] = 0
    return np.fft.irfft(spectrum, len(x)) + line


def fourier_slope(panel: pd.DataFrame, leaky: bool) -> pd.Series:
    """Latest step of the low-passed price: filtered once over the whole series, or each day over the past."""
    price = log_close(panel)
    if leaky: return pd.Series(np.diff(low_pass(price.to_numpy()), prepend=np.nan), price.index)
    past = (price.to_numpy()[:n] for n in range(1, len(price) + 1))
    return pd.Series([np.diff(low_pass(x)[-2:])[0] if len(x) > 360 else np.nan for x in past], price.index)


def min_max(panel: pd.DataFrame, leaky: bool) -> pd.Series:
    """Price relative to minimum and maximum of 456 days, which end 90 days ahead or today."""
    price = log_close(panel)
    window = price.rolling(456, min_periods=180)
    low, high = (x.shift(-90 if leaky else 0) for x in (window.min(), window.max()))
    return (price - low) / (high - low)


def extremes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of peaks and troughs of at least 0.2, and -1 after a peak, 1 after a trough."""
    found = [find_peaks(sign * x, prominence=.2)[0] for sign in (1, -1)]
    order = np.argsort(np.concatenate(found))
    return np.concatenate(found)[order], np.repeat([-1, 1], [len(f) for f in found])[order]


def zigzag(panel: pd.DataFrame, leaky: bool) -> pd.Series:
    """1 where the price rises between extremes, else -1: towards the next extreme of the series, or since the last known one."""
    price = log_close(panel)
    x, out = price.to_numpy(), np.zeros(len(price))
    if leaky:
        at, sign = extremes(x)
        after = np.searchsorted(at, np.arange(len(x)), side="right")
        return pd.Series(-np.append(sign, 0)[after], price.index)  # towards a peak it rises
    for n in range(3, len(x) + 1):
        sign = extremes(x[max(n - 1000, 0):n])[1]
        if len(sign): out[n - 1] = sign[-1]
    return pd.Series(out, price.index)


def chikou(panel: pd.DataFrame, leaky: bool) -> pd.Series:
    """Ichimoku's lagging span relative to the price: the close 26 days ahead, drawn back to today, or that of 26 days ago."""
    price = log_close(panel)
    return price.shift(-26 if leaky else 26) - price


def disguised(panel: pd.DataFrame, leaky: bool) -> pd.Series:
    """The return of the next or of the last 90 days, with noise of about its size."""
    price = log_close(panel)
    move = price.shift(-90) - price if leaky else price - price.shift(90)
    return move + .4 * np.random.default_rng(0).standard_normal(len(price))


def centred_volatility(panel: pd.DataFrame, leaky: bool) -> pd.Series:
    """Log volatility of the 31 days around today or up to today."""
    squares = np.log(panel["close"]).diff() ** 2
    return midnights(np.log(squares.rolling(31 * 24, center=leaky, min_periods=24).mean().clip(lower=1e-8)) / 2)


# -- leaks: joins ---------------------------------------------------------------------------------


def quarterly(panel: pd.DataFrame, direction: str) -> pd.Series:
    """MVRV on the first day of each quarter, joined to each day in one direction, relative to today's."""
    mvrv = np.log(midnights(panel["mvrv"]).ffill().rename("now")).rename_axis("time").reset_index()
    first = mvrv[(mvrv["time"].dt.month % 3 == 1) & (mvrv["time"].dt.day == 1)].rename(columns=dict(now="quarter"))
    joined = pd.merge_asof(mvrv, first, on="time", direction=direction).set_index("time")
    return joined["quarter"] - joined["now"]


def join_forward(panel: pd.DataFrame, leaky: bool) -> pd.Series:
    """The value of the next quarter, or of the last one."""
    return quarterly(panel, "forward" if leaky else "backward")


def join_nearest(panel: pd.DataFrame, leaky: bool) -> pd.Series:
    """The value of the nearest quarter, or of the last one."""
    return quarterly(panel, "nearest" if leaky else "backward")


def stamped(d: Data, leaky: bool) -> np.ndarray:
    """Forecasts with features that use each daily row from its date on, or from its publication on."""
    if not leaky: return d.honest["direction"]
    bars, tables = d.tables
    panel, _ = join_panel(bars, [t.assign(available_at=t["value_time"]) for t in tables])
    return walk(d, features_of(panel).loc[d.labels.index].to_numpy(), d.parts)


# -- leaks: what is fitted or chosen --------------------------------------------------------------


def encoded(group: Callable) -> Callable:
    """Forecasts with the mean return of a row's group as a feature, over all or training rows."""
    def forecast(d: Data, leaky: bool) -> np.ndarray:
        r90, key, xs = d.labels["r90"], group(d.labels.index), []
        for train, _ in d.parts:
            known = slice(None) if leaky else train
            means = r90.iloc[known].groupby(key[known]).mean()
            xs.append(np.c_[d.x, means.reindex(key).fillna(r90.iloc[known].mean())])
        return walk(d, xs, d.parts)
    return forecast


def selected(d: Data, leaky: bool) -> np.ndarray:
    """Forecasts from 10, 20 or 40 of 228 columns (features, lags) most correlated with the return on all or training rows."""
    lags = [d.features.shift(days).loc[d.labels.index].fillna(0).to_numpy() for days in (0, 30, 60, 90)]
    pool, r90 = np.concatenate(lags, axis=1), d.labels["r90"].to_numpy()
    def best(known) -> np.ndarray:
        z = StandardScaler().fit_transform(pool[known])
        return pool[:, np.argsort(-np.abs(z.T @ (r90[known] - r90[known].mean())))]
    ranked = [best(slice(None) if leaky else train) for train, _ in d.parts]
    return np.concatenate([walk(d, [x[:, :k] for x in ranked], d.parts, seeds=1) for k in (10, 20, 40)])


def components(d: Data, leaky: bool) -> np.ndarray:
    """Forecasts from 5, 10, 20 or 40 principal components of the standardised features, fitted on all or training rows."""
    made = lambda rows: make_pipeline(StandardScaler(), PCA(40, svd_solver="full")).fit(d.x[rows]).transform(d.x)
    xs = [made(slice(None) if leaky else train) for train, _ in d.parts]
    return np.concatenate([walk(d, [x[:, :k] for x in xs], d.parts, seeds=1) for k in (5, 10, 20, 40)])


def candidates(d: Data) -> list[tuple[np.ndarray, int]]:
    """30 configurations: columns of each set of feature groups, times two sizes of leaf."""
    group = np.array([registry[name].group for name in d.features])
    sets = [s for k in range(1, 5) for s in combinations([g for g in ALL if g != "time"], k)]
    return [(np.flatnonzero(np.isin(group, s)), leaf) for s, leaf in product(sets, (5, 20))]


def tuned(d: Data, leaky: bool) -> np.ndarray:
    """Forecasts of the configuration, of 30, with the best log loss on the tested year, or on the validation year before it."""
    def forecast(train, rows, columns, leaf): return predict(fit(d, d.x[:, columns], train, leaf=leaf), d.x[rows][:, columns])
    loss = lambda p, rows: -np.log(p[np.arange(len(rows)), d.direction[rows]]).mean()
    best = []
    for f in d.folds:
        train, judged = (f.refit, f.test) if leaky else (f.train, f.valid)
        chosen = min(candidates(d), key=lambda c: loss(forecast(train, judged, *c), judged))
        best.append(forecast(f.refit, f.test, *chosen))
    return np.stack([in_order(d, d.parts, best)])


def sharpened(p: np.ndarray, power: float) -> np.ndarray:
    """Probabilities to a power, scaled to sum 1."""
    return p ** power / (p ** power).sum(axis=1, keepdims=True)


def temperature(p: np.ndarray, y: np.ndarray) -> Callable:
    """A calibrator that raises probabilities to the power that fits best."""
    loss = lambda power: -np.log(sharpened(p, power)[np.arange(len(y)), y]).mean()
    power = minimize_scalar(loss, bounds=(0, 5), method="bounded").x
    return lambda q: sharpened(q, power)


def logistic(p: np.ndarray, y: np.ndarray) -> Callable:
    """A calibrator by logistic regression on log probabilities, which may change the order of classes."""
    model = LogisticRegression(max_iter=1000).fit(np.log(p), y)
    return lambda q: predict(model, np.log(q))


def calibrated(calibrator: Callable) -> Callable:
    """Probabilities calibrated on the tested year, or not calibrated, since one year before it is too little to fit on."""
    def forecast(d: Data, leaky: bool) -> np.ndarray:
        plain = d.honest["direction"]
        if not leaky: return plain
        y, year = d.direction[d.tested], np.repeat(np.arange(len(d.folds)), [len(f.test) for f in d.folds])
        one = lambda p: np.concatenate([calibrator(p[year == k], y[year == k])(p[year == k]) for k in range(len(d.folds))])
        return np.stack([one(p) for p in plain])
    return forecast


# -- the list -------------------------------------------------------------------------------------


class Leak(NamedTuple):
    """A leak: what is wrong, which audit should find it, and the forecasts with and without it."""
    name: str
    what: str
    audit: str  # of `cryptopredict.leakage`
    forecast: Callable[[Data, bool], np.ndarray]
    target: str = "direction"


def split(fn: Callable, target: str = "direction") -> tuple:
    """Forecasts with a leaky split, or with the honest one."""
    return (lambda d, leaky: walk(d, d.x, fn(d), target) if leaky else d.honest[target]), target


def column(fn: Callable, target: str = "direction") -> tuple:
    """Forecasts with an additional leaky column, or with its honest twin."""
    def forecast(d: Data, leaky: bool) -> np.ndarray:
        return walk(d, np.c_[d.x, fn(d.panel, leaky).reindex(d.labels.index).fillna(0)], d.parts, target)
    return forecast, target


def noise(pair: int) -> Callable:
    """A column of noise; the leaky one is another draw."""
    def draw(panel: pd.DataFrame, leaky: bool) -> pd.Series:
        index = midnights(panel).index
        return pd.Series(np.random.default_rng([pair, leaky]).standard_normal(len(index)), index)
    return draw


CONTROLS = [Leak(f"control {k}", "No leak: one column of noise against another.", "", *column(noise(k))) for k in (1, 2, 3)]
LEAKS = [
    Leak("shuffled split", "Test days are drawn at random: their neighbours, whose labels overlap theirs, are trained on.",
         "audit_folds", *split(shuffled)),
    Leak("shuffled split, volatility", "The same for the 30-day volatility.", "audit_folds", *split(shuffled, "sigma")),
    Leak("no purge", "Training goes up to the day before the test, with labels that end up to 90 days inside it.", "audit_folds",
         *split(unpurged)),
    Leak("no purge, volatility", "Training goes up to the day before the test, with labels that end up to 30 days inside it.",
         "audit_folds", *split(unpurged, "sigma")),
    Leak("purge of another label", "The purge uses the end of the 30-day label while the 90-day label is trained.",
         "audit_folds", *split(purged_by_sigma)),
    Leak("fitted on the test", "The back-test runs over rows that the model was fitted on.", "audit_folds", *split(in_sample)),
    Leak("bar stamped with its open", "A day's high, low and close are used at its 00:00, when it begins.",
         "audit", *column(day_bar)),
    Leak("bar stamped with its open, volatility", "The same for the 30-day volatility.", "audit", *column(day_bar, "sigma")),
    Leak("centred mean", "A moving average of 31 days is centred on the day that uses it.", "audit", *column(centred_mean)),
    Leak("centred volatility", "Realised volatility of 31 days is centred on the day that uses it.", "audit",
         *column(centred_volatility, "sigma")),
    Leak("back-filled week", "A weekly mean price fills the days of its own week.", "audit", *column(weekly)),
    Leak("interpolated month", "A monthly MVRV is interpolated to days, towards a value not yet known.",
         "audit", *column(monthly)),
    Leak("Savitzky-Golay slope", "The price is smoothed over the whole series before its slope is taken.", "audit",
         *column(polynomial_slope)),
    Leak("Fourier low-pass", "The whole price series is filtered by one FFT before its slope is taken.", "audit",
         *column(fourier_slope)),
    Leak("min-max over the horizon", "The price is scaled by the minimum and maximum of look-back and horizon together.", "audit",
         *column(min_max)),
    Leak("zigzag", "Peaks and troughs are found in the whole series; the feature holds which comes next.",
         "audit", *column(zigzag)),
    Leak("chikou span", "The lagging span is read where it is drawn: the close of 26 days later.", "audit", *column(chikou)),
    Leak("label in disguise", "A column holds the 90-day return to come, under noise of about its own size.",
         "audit", *column(disguised)),
    Leak("join forward", "A quarterly on-chain value is joined to the days before it, up to 92 days early.", "audit_availability",
         *column(join_forward)),
    Leak("join nearest", "A quarterly on-chain value is joined to the nearest days, up to 46 days early.", "audit_availability",
         *column(join_nearest)),
    Leak("date taken for availability", "Daily on-chain and macro rows are used from their date on, before the day is over.",
         "audit_availability", stamped),
    Leak("target encoding by month", "Each row holds its month's mean return, its own label included.", "audit_pipeline",
         encoded(lambda index: index.year * 12 + index.month)),
    Leak("target encoding by season", "Each row holds the mean return of its calendar month over all years, test years included.",
         "audit_pipeline", encoded(lambda index: index.month)),
    Leak("features chosen on all rows", "The 10, 20 or 40 of 228 columns most correlated with the return are chosen with the "
         "test rows.", "audit_pipeline", selected),
    Leak("components of all rows", "Scaling and 5, 10, 20 or 40 principal components are fitted with the test rows (no labels).",
         "audit_pipeline", components),
    Leak("best of 30 on the test", "The configuration of each year is the one that scores best on that year.",
         "audit_pipeline", tuned),
    Leak("temperature of the test", "Probabilities are sharpened or flattened by one number, fitted on the test's labels.",
         "audit_pipeline", calibrated(temperature)),
    Leak("calibrated on the test", "A logistic regression on the probabilities is fitted on the test's labels.",
         "audit_pipeline", calibrated(logistic))]


# -- scores ---------------------------------------------------------------------------------------


def losses(d: Data, forecast: np.ndarray, target: str) -> dict:
    """Score of each origin, mean over the seeds; larger is better."""
    truth = getattr(d, target)[d.tested]
    if target == "sigma": return dict(r2=1 - ((forecast - truth) ** 2).mean(axis=0) / truth.var())
    own = np.take_along_axis(forecast, truth[None, :, None], axis=2)[..., 0]
    return dict(accuracy=(forecast.argmax(axis=2) == truth).mean(axis=0), log_loss=np.log(own).mean(axis=0))


def measure(d: Data, leak: Leak) -> dict:
    """The record of a leak: scores with and without it, and the gain."""
    began = time.perf_counter()
    with_, without = (losses(d, leak.forecast(d, leaky), leak.target) for leaky in (True, False))
    plain = losses(d, d.honest[leak.target], leak.target)
    record = dict(name=leak.name, what=leak.what, audit=leak.audit, target=leak.target)
    for name, scores in with_.items():
        sign = -1 if name == "log_loss" else 1
        gap = scores - without[name]
        interval = np.quantile(block_bootstrap(gap, 2 * OVERLAP[leak.target]), [.05, .95])
        record |= {name: sign * scores.mean(), f"honest_{name}": sign * without[name].mean(), f"gain_{name}": gap.mean(),
                   f"gain_{name}_90": interval.tolist(), f"gain_plain_{name}": scores.mean() - plain[name].mean()}
    return record | dict(seconds=time.perf_counter() - began)


def baseline(d: Data) -> dict:
    """Scores of the honest pipeline and of forecasts without skill, and the number of origins and windows."""
    truth, times = d.direction[d.tested], d.labels.index[d.tested]
    share = lambda rows: (np.bincount(d.direction[rows], minlength=3) + 1) / (len(rows) + 3)
    climate = np.concatenate([np.tile(share(f.refit), (len(f.test), 1)) for f in d.folds])
    persistence = losses(d, d.features["rvol_30d"].loc[times].to_numpy()[None], "sigma")["r2"].mean()
    by_seed = [np.mean(losses(d, forecast[None], "direction")["accuracy"]) for forecast in d.honest["direction"]]
    scores = {k: v.mean() for target in OVERLAP for k, v in losses(d, d.honest[target], target).items()}
    return dict(accuracy=scores["accuracy"], log_loss=-scores["log_loss"], r2=scores["r2"], accuracy_by_seed=by_seed,
                always_up=np.mean(truth == 2), climatology_log_loss=-np.log(climate[np.arange(len(truth)), truth]).mean(),
                persistence_r2=persistence, rows=len(times), windows=effective_windows(times, "90D"), first=str(times[0]),
                last=str(times[-1]), folds=len(d.folds), features=d.x.shape[1])


def rounded(value):
    """`value` with all floats rounded to four decimals."""
    if isinstance(value, dict): return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple): return [rounded(v) for v in value]
    return round(float(value), 4) if isinstance(value, float | np.floating) else value


def report(args: argparse.Namespace) -> dict:
    """Measure all leaks; the report."""
    d, records = read_data(args), []
    honest = baseline(d)
    for leak in CONTROLS + LEAKS:
        records.append(measure(d, leak))
        print(pd.Series(rounded(records[-1])).drop(["what", "target"]).to_dict(), flush=True)
    versions = dict(python=platform.python_version(), **{p: version(p) for p in ("numpy", "pandas", "scikit-learn", "scipy")})
    about = dict(device=dict(type="cpu", name=platform.machine(), threads=1), versions=versions,
                 commit=args.commit or code_commit(),
                 date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", data_sha256=panel_hash(d.panel), how=HOW,
                 max_samples=args.max_samples, seeds=args.seeds)
    return rounded(dict(**about, honest=honest, control=records[:len(CONTROLS)],
                        leaks=records[len(CONTROLS):]))


def main() -> int:
    """Measure and write the report."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder with the source files")
    p.add_argument("--out", type=Path, required=True, help="JSON report")
    p.add_argument("--commit", default="", help="version of the code, for the report; default: that of the checkout")
    p.add_argument("--first-test", default="2018-01-01", help="first test day, UTC")
    p.add_argument("--max-samples", type=float, default=.1, help="share of the training rows that a tree sees")
    p.add_argument("--seeds", type=int, default=4, help="forests per score")
    args = p.parse_args()
    write_atomic(args.out, json.dumps(report(args), indent=1) + "\n")
    return 0


if __name__ == "__main__": sys.exit(main())
