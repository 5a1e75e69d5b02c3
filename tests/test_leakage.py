"The leak audit: bounded work, random leaks are found, random honest code passes; folds and splits."
import tracemalloc

import numpy as np
import pandas as pd
import pytest

from cryptopredict.audits import audit_labels, audit_pipeline
from cryptopredict.leakage import FoldSplit, audit, audit_folds, walk_forward

HOURS = pd.date_range("2012-01-01", periods=100_000, freq="h", tz="UTC")


@pytest.fixture(scope="module")
def walks() -> pd.DataFrame:
    "Eight random walks over a hundred thousand hours."
    return pd.DataFrame(np.random.default_rng(0).normal(size=(len(HOURS), 8)).cumsum(0) + 1000, HOURS, list("abcdefgh"))


def sixty_four_features(frame: pd.DataFrame) -> pd.DataFrame:
    "64 cheap features made with pandas."
    rolled = {(c, w): frame[c].rolling(w) for c in frame for w in (6, 24, 168, 720)}
    made = {f"{c} {w}": (r.mean(), r.std()) for (c, w), r in rolled.items()}
    return pd.DataFrame({f"{name} {k}": x for name, pair in made.items() for k, x in enumerate(pair)})


def test_the_work_of_an_audit_of_64_features_on_100k_rows_is_bounded(walks):
    report = audit(sixty_four_features, walks).raise_if_leaky()
    assert report.tested["cuts"] >= 32 and report.tested["runs"] < 300, report
    assert 0 < report.tested["of the whole frame"] <= 8 and "columns never compared" not in report.tested


def test_only_the_leaky_one_of_64_columns_is_named(walks):
    peeks = lambda f: sixty_four_features(f).assign(peek=f.a.rolling(24).mean().where(f.b < f.b.cummax(), f.a.shift(-1)))
    assert set(audit(peeks, walks).findings.column) == {"peek"}


def test_an_audit_needs_less_memory_than_three_copies_of_the_frame(walks):
    frame = pd.concat([walks.add_suffix(str(k)) for k in range(4)], axis=1)
    tracemalloc.start()
    try:
        audit(lambda f: f["a0"].diff(), frame, n_cuts=8)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 3 * frame.memory_usage().sum(), peak / frame.memory_usage().sum()


# --- random leaks and random honest code ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(k, marks=pytest.mark.slow) for k in range(5, 12))])
def test_look_ahead_at_any_distance_on_any_share_of_rows_is_found(walks, seed):
    rng, short = np.random.default_rng(seed), walks.iloc[20_000:26_000]
    ahead, share = int(rng.integers(1, 400)), 10 ** rng.uniform(-2.3, 0)
    rows = pd.Series(rng.random(len(walks)) < share, walks.index)  # known to the function alone
    fn = lambda f: f.a.diff(3).where(~rows.reindex(f.index), f.a.shift(-ahead))
    assert not audit(fn, short, seed=seed).ok, (ahead, share)


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(k, marks=pytest.mark.slow) for k in range(5, 12))])
def test_random_causal_code_raises_no_alarm(walks, seed):
    rng, short = np.random.default_rng(seed), walks.iloc[:5_000]
    window, lag, offset = int(rng.integers(2, 300)), int(rng.integers(0, 50)), 10.0 ** rng.integers(0, 8)
    steps = [lambda x: x.rolling(window).mean(), lambda x: x.ewm(span=window).std(), lambda x: x.diff(lag + 1),
             lambda x: x.rolling(window).rank(), lambda x: x.expanding().quantile(.3), lambda x: np.sign(x.diff()),
             lambda x: x.astype("float32"), lambda x: x.cumsum() - x.cumsum().shift(window), lambda x: x.round(1)]
    chosen = rng.choice(len(steps), 3)

    def fn(frame):
        x = frame.a + offset
        for k in chosen: x = steps[k](x.shift(lag))
        return x
    audit(fn, short, n_cuts=16, seed=seed).raise_if_leaky()


@pytest.mark.parametrize("gap", [0, 1, 88, 89, 90, 120])
def test_the_purge_is_checked_to_the_day(gap):
    days = pd.date_range("2019-01-01", periods=600, freq="D", tz="UTC")
    ends, rows = pd.Series(days + pd.Timedelta("90D"), days), np.arange(600)
    assert audit_folds([(rows[:400 - gap], rows[400:500])], ends).ok == (gap >= 89)


def test_real_features_are_no_labels_in_disguise(data_dir):
    from cryptopredict.features import build_features
    from cryptopredict.labels import make_labels
    from cryptopredict.sources import load_panel
    panel = load_panel(data_dir)
    features, labels = build_features(panel), make_labels(panel["close"])
    ends = labels[["label_end", "label_end", "sigma_end"]].set_axis(["r90", "direction", "sigma"], axis=1)
    audit_labels(features, labels[list(ends)].astype(float), ends).raise_if_leaky()
    late, blurred = np.sqrt(labels["sigma"].shift(-100)), labels["r90"].shift(-12)
    leaky = features.assign(copy=labels["r90"].rank(), late=late, blurred=blurred)
    found = audit_labels(leaky, labels[["r90", "sigma"]], ends[["r90", "sigma"]]).findings
    assert set(found.column) == {"copy", "late", "blurred"}


# --- rare look-ahead, and columns that cannot be tested -------------------------------------------------------------------


@pytest.fixture(scope="module")
def bars() -> pd.DataFrame:
    "Three thousand hourly bars."
    rng, index = np.random.default_rng(11), pd.date_range("2021-01-01", periods=3000, freq="h", tz="UTC")
    return pd.DataFrame(dict(close=100 * np.exp(rng.normal(0, .01, 3000).cumsum()), volume=rng.lognormal(4, 1, 3000)), index)


@pytest.mark.parametrize("volume", [100, 300, 500])
def test_rare_look_ahead_in_a_return_is_found(bars, volume):
    def peeks(frame):
        r = frame.close.pct_change()
        return r.where(~(frame.volume > volume), r.shift(-1))
    assert (bars.volume > volume).sum() > 30 or volume > 100
    found = [not audit(peeks, bars, seed=seed).ok for seed in range(4)]
    assert sum(found) >= 3, found


def test_a_leak_into_the_first_row_is_found(bars):
    assert not audit(lambda f: f.close.diff().bfill(), bars, n_cuts=8).ok


def test_a_column_computed_before_the_audit_is_reported_as_untested(bars):
    ahead = bars.close.shift(-1)
    report = audit(lambda f: f.assign(ahead=ahead.loc[f.index]), bars, n_cuts=8)
    assert report.tested["columns that ignore the frame's values"] == "untested: ahead"


@pytest.mark.parametrize("kind", ["Float64", "double[pyarrow]"])
def test_nullable_and_arrow_floats_are_audited_alike(bars, kind):
    typed = bars.astype(kind)
    assert audit(lambda f: f.close.diff(), typed, n_cuts=8).ok and not audit(lambda f: f.close.shift(-1), typed, n_cuts=8).ok


@pytest.mark.filterwarnings("ignore")  # of scikit-learn, for fits on missing values
@pytest.mark.parametrize("model", ["boosting", "forest", "grid"])
def test_a_pipeline_fitted_on_all_rows_is_found(bars, model):
    from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV

    make = {"boosting": lambda: GradientBoostingRegressor(n_estimators=5, random_state=0),
            "forest": lambda: RandomForestRegressor(5, max_depth=3, random_state=0),
            "grid": lambda: GridSearchCV(Ridge(), dict(alpha=[1., 10.]), cv=3)}[model]
    frame = pd.DataFrame({k: bars.close.pct_change(k).fillna(0) for k in (1, 2, 5)}, bars.index).rename(columns=str)
    frame["y"], rows = bars.close.pct_change().shift(-24).fillna(0), np.arange(len(bars))
    X, fold = ["1", "2", "5"], (rows[:2000], rows[2100:2300])
    honest = lambda given, fold: make().fit(given[X].iloc[fold.refit], given.y.iloc[fold.refit])
    leaky = lambda given, fold: make().fit(given[X], given.y)
    predict = lambda fitted, given, rows: fitted.predict(given[X].iloc[rows])
    assert audit_pipeline(honest, predict, frame, [fold], labels=["y"]).ok
    assert not audit_pipeline(leaky, predict, frame, [fold], labels=["y"]).ok


# --- severities, and cuts without output ----------------------------------------------------------------------------------


def test_a_column_that_needs_a_minimum_of_rows_is_no_leak(bars):
    """A rolling component appears from 200 rows on, next to columns that are always there."""
    def components(frame):
        moves = pd.DataFrame({str(k): frame.close.diff(k) for k in range(1, 6)})
        return moves.assign(first=moves.rolling(100).mean().sum(axis=1, min_count=5)) if len(frame) >= 200 else moves
    report = audit(components, bars).raise_if_leaky()
    assert report.ok and "columns never compared" not in report.tested
    def centred(frame):
        made = components(frame)
        return made.assign(first=frame.close.rolling(100, center=True).mean()) if len(frame) >= 200 else made
    leaky = audit(centred, bars)
    assert set(leaky.leaks.column) == {"first"}


def test_a_column_selected_by_the_future_is_a_leak(bars):
    report = audit(lambda f: f.assign(rising=f.close.diff()) if f.close.iloc[-1] > f.close.iloc[0] else f, bars)
    assert not report.ok and "rising" in set(report.leaks.column)


def test_code_that_mostly_returns_nothing_is_not_ok(bars):
    report = audit(lambda f: f.close.rolling(5).mean() if len(f) > 2700 else f.close * np.nan, bars)
    assert report.findings.empty and not report.ok and "could be tested" in report.verdict
    assert report.tested["cuts without output"] > report.tested["cuts"] / 2


MARKETS = [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 3)) for seed in range(20)]


@pytest.mark.parametrize("seed", MARKETS)
def test_honest_features_of_built_in_markets_pass(seed):
    """Markets of 4 to 8 years; features may be suspects, but none is a leak."""
    from cryptopredict.features import build_features
    from cryptopredict.labels import make_labels
    from cryptopredict.simulate import simulate_market
    panel, _ = simulate_market(24 * 365 * (4 + seed % 5), seed)
    labels = make_labels(panel["close"])
    ends = labels[["label_end", "sigma_end"]].set_axis(["r90", "sigma"], axis=1)
    audit_labels(build_features(panel), labels[["r90", "sigma"]], ends, n_perm=99).raise_if_leaky()


@pytest.mark.parametrize("blocks", [[(200, 300)], [(100, 150), (400, 450)]])
@pytest.mark.parametrize("embargo", [0, 5])
def test_purge_and_embargo_are_checked_on_both_sides_of_a_test_block(blocks, embargo):
    days = pd.date_range("2019-01-01", periods=600, freq="D", tz="UTC")
    ends = pd.DataFrame(dict(long=days + pd.Timedelta("90D"), short=days + pd.Timedelta("30D")), days)
    test = np.concatenate([np.arange(*b) for b in blocks])

    def split(gap):
        keep = np.ones(600, bool)
        for a, b in blocks: keep[max(a - gap, 0):b + gap] = False
        return [(np.flatnonzero(keep), test)]
    due = 89 + embargo
    right, short = (audit_folds(split(gap), ends, f"{embargo}D") for gap in (due, due - 1))
    assert right.ok and set(right.findings.kind) == {"interleaved"}
    assert not short.ok and set(short.leaks.kind) == {"embargo" if embargo else "label overlap"}


# --- folds in scikit-learn ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled() -> tuple[pd.DataFrame, pd.Series, list]:
    "Two features of 700 days, a label of the next 30 days (missing at the end), and its walk-forward folds."
    days, rng = pd.date_range("2019-01-01", periods=700, freq="D", tz="UTC"), np.random.default_rng(0)
    X = pd.DataFrame(rng.normal(size=(700, 2)), days, ["a", "b"])
    y = (X.a + rng.normal(size=700)).where(np.arange(700) < 670)
    ends = pd.Series(days + pd.Timedelta("30D"), days).where(y.notna())
    return X, y, walk_forward(days, ends, first_test="2020-01-01", step="90D", validation="60D")


def test_fold_split_yields_the_rows_of_the_folds(labelled):
    X, y, folds = labelled
    split = FoldSplit(folds)
    assert split.get_n_splits() == split.get_n_splits(X, y) == len(folds) > 2
    for (train, test), fold in zip(split.split(), folds, strict=True):
        assert np.array_equal(train, fold.refit) and np.array_equal(test, fold.test)
    for (train, test), fold in zip(split.split(X, y), folds, strict=True):
        assert np.array_equal(train, fold.refit) and test.tolist() == [row for row in fold.test if y.notna().iloc[row]]
    ends = pd.Series(X.index + pd.Timedelta("30D"), X.index).where(y.notna())
    audit_folds(list(split.split(X, y)), ends).raise_if_leaky()


def test_cross_val_score_takes_a_fold_split(labelled):
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score
    from sklearn.model_selection import GridSearchCV, cross_val_score
    X, y, folds = labelled
    scores = cross_val_score(Ridge(), X, y, cv=FoldSplit(folds), error_score="raise")
    pairs = [(f.refit, f.test[y.notna().to_numpy()[f.test]]) for f in folds]
    alone = [r2_score(y.iloc[test], Ridge().fit(X.iloc[train], y.iloc[train]).predict(X.iloc[test])) for train, test in pairs]
    assert np.array_equal(scores, alone) and len(scores) == len(folds)
    search = GridSearchCV(Ridge(), dict(alpha=[1., 1e6]), cv=FoldSplit(folds), refit=False).fit(X, y)
    assert search.best_params_ == dict(alpha=1.)
