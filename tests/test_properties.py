"Properties of joins, folds, features, labels and baselines for any input, compared with plain, slow loops."
import itertools

import numpy as np
import pandas as pd
import pytest
from helpers import check_message
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from cryptopredict import protocol
from cryptopredict.baselines import BASELINES, Climatology
from cryptopredict.features import ALL, Column, Feature, Lag, build_features
from cryptopredict.labels import make_labels
from cryptopredict.leakage import Fold, audit_folds, live_fold, point_in_time, walk_forward
from cryptopredict.protocol import EvaluateConfig
from cryptopredict.simulate import simulate_market
from cryptopredict.walkforward import walk_forward_run

ZERO, HOUR = pd.Timestamp("2020-02-27", tz="UTC"), pd.Timedelta("1h")
NEVER = 10**9  # an hour later than all others


def _times(hours) -> pd.DatetimeIndex:
    "Hours since `ZERO` as times."
    return pd.DatetimeIndex([ZERO + int(h) * HOUR for h in hours], tz="UTC")


def _hours(times) -> np.ndarray:
    "Times as hours since `ZERO`, `NEVER` where there is none."
    return pd.Series((pd.DatetimeIndex(times) - ZERO) / HOUR).fillna(NEVER).to_numpy(int)


# --- point-in-time join ---------------------------------------------------------------------------------------------------


@st.composite
def _rows(draw):
    "Rows (value_time, available_at, x, y) in hours, with many vintages, ties and missing values."
    number = st.one_of(st.just(np.nan), st.integers(-3, 3).map(float))
    value_time = st.integers(0, 5).map(lambda d: 24 * d)
    row = st.tuples(value_time, st.integers(0, 4), number, number).map(lambda r: (r[0], r[0] + 17 * r[1], *r[2:]))
    return draw(st.lists(row, max_size=14))


def _table(rows, names) -> pd.DataFrame:
    times = {n: _times([r[k] for r in rows]) for k, n in enumerate(("value_time", "available_at"))}
    return pd.DataFrame(times | {n: np.array([r[2 + k] for r in rows], dtype=float) for k, n in enumerate(names)})


def _newest(rows, t, column, max_age):
    "Value and row known at hour t: of the latest period its latest vintage, then the later row; nan and -1 if too old."
    known = [(v, a, i) for i, (v, a, *x) in enumerate(rows) if a <= t and not np.isnan(x[column])]
    if not known: return np.nan, -1
    value_time, _, i = max(known)
    return (np.nan, -1) if max_age is not None and t - value_time > max_age else (rows[i][2 + column], i)


GRID = st.lists(st.integers(-5, 200), min_size=1, max_size=40, unique=True)


@settings(max_examples=120)
@given(_rows(), _rows(), GRID, st.sampled_from([None, 1, 24, 41, 72]))
@example([(0, 5, 1., 1.), (24, 29, 2., 2.), (0, 40, 9., 9.)], [], [4, 5, 30, 41], None)  # a late revision of the older day
@example([(0, 5, 1., 1.), (0, 5, 2., 2.)], [], [4, 5, 6], 5)  # a tie; an age of exactly the limit
def test_the_join_equals_what_was_known_at_each_hour(first, second, hours, max_age):
    grid, columns = sorted(hours), ("a", "b", "c", "d")
    age = None if max_age is None else {"a": max_age * HOUR, "b": max_age * HOUR, "d": None}  # c has the default, 7 days
    index = _times(grid)
    panel, rows = point_in_time(index, _table(first, columns[:2]), _table(second, columns[2:]), max_age=age, provenance=True)
    for k, (name, source) in enumerate(zip(columns, (first, first, second, second))):
        limit = None if name == "d" or max_age is None else 168 if name == "c" else max_age
        expected = [_newest(source, h, k % 2, limit) for h in grid]
        assert np.array_equal(panel[name], [e[0] for e in expected], equal_nan=True), name
        assert rows[name].tolist() == [e[1] for e in expected], name


@given(_rows(), st.randoms(use_true_random=False))
def test_the_order_of_rows_without_ties_does_not_matter(rows, random):
    rows = list({(v, a): (v, a, x, y) for v, a, x, y in rows}.values())
    mixed = random.sample(rows, len(rows))
    grid = pd.date_range(ZERO, periods=200, freq="h")
    one, other = (point_in_time(grid, _table(r, ("a", "b"))) for r in (rows, mixed))
    pd.testing.assert_frame_equal(one, other)


# --- folds ----------------------------------------------------------------------------------------------------------------


@st.composite
def _history(draw):
    "Times with gaps, ends of two kinds of labels (some missing), and the settings of a split."
    hours = draw(st.lists(st.integers(0, 400), min_size=60, max_size=200, unique=True))
    index = _times(sorted(hours))
    lengths, rng = draw(st.tuples(st.integers(1, 40), st.integers(1, 40))), np.random.default_rng(draw(st.integers(0, 99)))
    ends = pd.DataFrame({name: index + h * HOUR for name, h in zip(("label_end", "sigma_end"), lengths)}, index=index)
    ends = ends.where((ends <= index[-1]) & (rng.random(ends.shape) > draw(st.sampled_from([0., .1, .5]))))
    first = index[0] + draw(st.integers(60, 380)) * HOUR
    step, validation, embargo = (draw(st.integers(*bounds)) * HOUR for bounds in ((5, 200), (5, 120), (0, 30)))
    return index, ends, dict(first_test=first, step=step, validation=validation, embargo=embargo)


def _folds(index, ends, how) -> list[Fold]:
    try: return walk_forward(index, ends, **how)
    except ValueError: return []


@given(_history())
def test_folds_pass_the_audit_of_folds(history):
    index, ends, how = history
    folds = _folds(index, ends, how)
    assume(folds)
    audit_folds(folds, ends, how["embargo"]).raise_if_leaky()


@given(_history())
def test_folds_drop_no_usable_row(history):
    index, ends, how = history
    folds = _folds(index, ends, how)
    assume(folds)
    at, end = _hours(index), np.maximum(_hours(ends["label_end"]), _hours(ends["sigma_end"]))  # both labels count
    first, validation, embargo = _hours([how["first_test"]])[0], how["validation"] // HOUR, how["embargo"] // HOUR
    tested = [i for f in folds for i in f.test]
    assert tested == [i for i, t in enumerate(at) if t >= first][:len(tested)], "test spans tile the time from first_test on"
    assert max(i for i, e in enumerate(end) if e < NEVER) in tested, "up to the last label"

    def ready(low, high): return [i for i, t in enumerate(at) if low <= t < high and end[i] <= high - embargo]
    for f in folds:
        start = at[f.test[0]]
        assert f.refit.tolist() == ready(-NEVER, start)
        assert f.train.tolist() == ready(-NEVER, start - validation) and f.valid.tolist() == ready(start - validation, start)


@given(_history(), st.integers(0, 10_000))
def test_one_row_that_should_be_purged_is_found(history, pick):
    index, ends, how = history
    folds = _folds(index, ends, how)
    assume(folds)
    fold = folds[pick % len(folds)]
    spare = np.setdiff1d(np.arange(fold.test[0]), fold.refit)
    assume(len(spare))
    wrong = Fold(fold.train, fold.valid, fold.test, np.union1d(fold.refit, [spare[pick % len(spare)]]))
    found = audit_folds([wrong], ends, how["embargo"]).findings
    assert set(found["column"]) == {"refit"} and set(found["kind"]) <= {"label overlap", "unlabelled", "embargo"}


@given(_history())
def test_the_live_fold_uses_every_matured_row(history):
    index, ends, how = history
    try: fold = live_fold(index, ends, validation=how["validation"], embargo=how["embargo"])
    except ValueError: assume(False)
    matured = (ends <= index[-1] - how["embargo"]).all(axis=1) & (index < index[-1])
    assert fold.test.tolist() == [len(index) - 1] and fold.refit.tolist() == np.flatnonzero(matured).tolist()


# --- the user's own features ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bars() -> pd.DataFrame:
    "A panel of a hundred days."
    return simulate_market(24 * 100, seed=0)[0]


def spread(panel): return panel["high"] - panel["low"]
def moves(panel): return pd.DataFrame({f"move_{k}": panel["close"].diff(k) for k in (1, 2)})


def test_own_features_are_added_as_columns(bars):
    plain = build_features(bars, "market")
    made = build_features(bars, "market", extra=[spread, moves, Feature("close_3h_ago", "market", Lag(Column("close"), 3))])
    assert list(made) == [*plain, "close_3h_ago", "spread", "move_1", "move_2"] and set(made.dtypes) == {np.dtype("float32")}
    pd.testing.assert_frame_equal(made[list(plain)], plain)
    expected = {"close_3h_ago": bars["close"].shift(3), "spread": bars["high"] - bars["low"], "move_2": bars["close"].diff(2)}
    for name, column in expected.items(): assert np.array_equal(made[name], column.astype("float32"), equal_nan=True), name


@pytest.mark.parametrize("fn, words", [
    (lambda panel: panel["nothing"], "KeyError nothing"), (lambda panel: 3, "int series"),
    (lambda panel: panel["close"].astype(str).rename("text"), "text return numbers"),
    (lambda panel: panel["close"].rename("ret_1h"), "ret_1h twice another name")])
def test_an_unusable_own_feature_is_refused_in_one_line(bars, fn, words):
    with pytest.raises(ValueError) as refused: build_features(bars, "market", extra=[fn])
    check_message(refused, *words.split())


def test_a_feature_of_an_unknown_group_is_refused_in_one_line():
    with pytest.raises(ValueError) as refused: Feature("goals", "sport", Column("close"))
    check_message(refused, "'goals'", "'sport'", *ALL)
    with pytest.raises(ValueError, match="'sport'.*market"): build_features(pd.DataFrame(), "sport")


# --- labels ---------------------------------------------------------------------------------------------------------------


def _labels(close, h, w, threshold):
    "The labels of one series, row by row, from their definitions."
    log, n = np.log(close), len(close)
    rows = []
    for t in range(n):
        r90 = log[t + h] - log[t] if t + h < n else np.nan
        steps = np.diff(log[t:t + w + 1])
        sigma = np.sqrt(365 * 24 / w * np.sum(steps**2)) if t + w < n else np.nan
        path = log[t + 1:t + h + 1] - log[t]
        known = np.isfinite(r90) and np.isfinite(path).all()
        p90, p10 = np.quantile(path, [.9, .1]) if known else (np.nan, np.nan)
        direction = np.nan if np.isnan(r90) else 2. if r90 > threshold else 0. if r90 < -threshold else 1.
        rows.append((r90, direction, sigma, p90, p10))
    return np.array(rows)


PRICE = st.one_of(st.just(np.nan), st.floats(1., 1e5), st.sampled_from([100., 105.2]))


@settings(max_examples=120)
@given(st.lists(PRICE, min_size=2, max_size=50), st.integers(1, 12), st.integers(1, 12), st.sampled_from([0., .05, .7]))
def test_labels_equal_their_definitions_row_by_row(close, h, w, threshold):
    index = pd.date_range(ZERO, periods=len(close), freq="h")
    made = make_labels(pd.Series(close, index=index), h * HOUR, w * HOUR, threshold)
    expected = _labels(np.array(close), h, w, threshold)
    got = made[["r90", "direction", "sigma", "p90_path", "p10_path"]].astype(float).to_numpy()
    # A running sum of squares drops a large move only up to rounding; its root is compared as a square.
    for k, tolerance in ((0, 0.), (1, 0.), (3, 1e-9), (4, 1e-9)):
        assert np.allclose(got[:, k], expected[:, k], rtol=0, atol=tolerance, equal_nan=True), k
    assert np.allclose(got[:, 2]**2, expected[:, 2]**2, rtol=1e-9, atol=1e-8 * 365 * 24 / w, equal_nan=True)
    later = lambda known, hours: [t + hours * HOUR if k else pd.NaT for t, k in zip(index, known)]
    assert all(a is b or a == b for a, b in zip(made["label_end"], later(np.isfinite(expected[:, 0]), max(h, w))))
    assert all(a is b or a == b for a, b in zip(made["sigma_end"], later(np.isfinite(expected[:, 2]), w)))


@given(st.integers(0, 99), st.integers(1, 10), st.integers(1, 10), st.integers(2, 38))
def test_a_label_uses_no_price_after_its_end(seed, h, w, cut):
    rng, index = np.random.default_rng(seed), pd.date_range(ZERO, periods=40, freq="h")
    close = pd.Series(100 * np.exp(np.cumsum(rng.normal(0, .1, 40))), index=index)
    other = close.where(index < index[cut], close * rng.uniform(.5, 2, 40))
    one, two = (make_labels(c, h * HOUR, w * HOUR) for c in (close, other))
    settled, still = one["label_end"] < index[cut], one["sigma_end"] < index[cut]
    columns = ["r90", "direction", "p90_path", "p10_path"]
    pd.testing.assert_frame_equal(one.loc[settled, columns], two.loc[settled, columns])
    assert np.allclose(one.loc[still, "sigma"], two.loc[still, "sigma"], rtol=1e-9)
    moved = (one["r90"] != two["r90"]) & one["r90"].notna()
    spans = (index < index[cut]) & (index + h * HOUR >= index[cut])
    assert moved[spans & one["r90"].notna().to_numpy()].all(), "a label does use the prices up to its end"


# --- baselines and the rows they may use ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def market():
    "Five and a half years of a random walk with changing volatility, its labels, and a fold that tests the last months."
    index = pd.date_range("2015-01-01 01:00", periods=24 * 2000, freq="h", tz="UTC", name="time")
    rng, t = np.random.default_rng(5), np.arange(len(index))
    close = pd.Series(1e4 * np.exp(np.cumsum(rng.normal(0, .006, len(t)) * np.exp(.5 * np.sin(t / 3000)))), index=index)
    panel, labels = close.to_frame("close"), make_labels(close, "20D", "10D")
    fold = walk_forward(index, labels[["label_end", "sigma_end"]], first_test="2020-03-01", step="YS", validation="300D")[-1]
    return panel, labels, fold


def _forecast(model, panel, labels, fold):
    rows = fold.test[:200:24]
    return BASELINES[model](horizon="20D").fit(panel, None, labels, fold, seed=0).predict(panel, None, rows)


@pytest.mark.parametrize("model", BASELINES)
def test_a_baseline_uses_no_label_outside_refit(market, model):
    panel, labels, fold = market
    rng, garbage = np.random.default_rng(0), labels.copy()
    out = {end: np.setdiff1d(np.arange(len(panel)), fold.of(end).refit) for end in ("label_end", "sigma_end")}
    assert len(out["label_end"]) - len(out["sigma_end"]) == 24 * 10, "each label is purged by the end of its own window"
    n = len(out["label_end"])
    garbage.iloc[out["label_end"], garbage.columns.get_loc("r90")] = rng.normal(0, 5, n)
    garbage.iloc[out["label_end"], garbage.columns.get_loc("direction")] = rng.integers(0, 3, n)
    garbage.iloc[out["sigma_end"], garbage.columns.get_loc("sigma")] = rng.lognormal(2, 1, len(out["sigma_end"]))
    pd.testing.assert_frame_equal(_forecast(model, panel, labels, fold), _forecast(model, panel, garbage, fold), rtol=0, atol=0)


@pytest.mark.parametrize("model", BASELINES)
def test_a_baseline_uses_no_price_after_the_forecast(market, model):
    panel, labels, fold = market
    last = fold.test[192]
    future = panel["close"] * np.where(np.arange(len(panel)) > last, np.random.default_rng(1).uniform(.2, 5, len(panel)), 1)
    one, other = _forecast(model, panel, labels, fold), _forecast(model, future.to_frame("close"), labels, fold)
    pd.testing.assert_frame_equal(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("model", BASELINES)
def test_a_baseline_uses_every_row_of_refit(market, model):
    panel, labels, fold = market
    begin = panel.index[fold.test[0]] - pd.DateOffset(years=4)
    # The regression needs 90 days before a row, the others 30 or fewer; the short climatology uses four years.
    able = fold.refit[(fold.refit >= 24 * 91) & ((panel.index[fold.refit] >= begin) | (model != "climatology_4y"))]
    before = _forecast(model, panel, labels, fold)
    for row in (able[0], *np.random.default_rng(2).choice(able, 6, replace=False), able[-1]):
        changed = labels.copy()
        wild = dict(r90=-np.sign(labels["r90"].iloc[row]) * 9, sigma=labels["sigma"].iloc[row] * 50)
        wild["direction"] = 2 if wild["r90"] > 0 else 0
        assert wild["direction"] != labels["direction"].iloc[row]
        for name, value in wild.items(): changed.iloc[row, changed.columns.get_loc(name)] = value
        moved = (_forecast(model, panel, changed, fold) - before).abs().max().max()
        assert moved > 0, f"row {row} of refit has no weight"


def test_the_short_climatology_ignores_labels_older_than_four_years(market):
    panel, labels, fold = market
    begin = panel.index[fold.test[0]] - pd.DateOffset(years=4)
    old = labels.assign(**{c: labels[c].where(panel.index >= begin, v) for c, v in (("r90", 9.), ("direction", 2))})
    assert (panel.index[fold.refit] < begin).sum() > 1000
    pd.testing.assert_frame_equal(*(_forecast("climatology_4y", panel, x, fold) for x in (labels, old)))
    assert not _forecast("climatology", panel, labels, fold).equals(_forecast("climatology", panel, old, fold))


class _Spy(Climatology):
    "A climatology that records its arguments."
    seen: list = []

    def fit(self, panel, X, y, fold, seed=0):
        self.fold = fold
        return super().fit(panel, X, y, fold, seed)

    def predict(self, panel, X, rows):
        self.seen.append((self.fold, rows))
        return super().predict(panel, X, rows)


def test_a_walk_forward_gives_every_model_the_same_rows(market, monkeypatch, tmp_path):
    panel, labels, _ = market
    _Spy.seen.clear()
    for known in (protocol.FORECASTERS, BASELINES):  # baselines are run without features: this panel has closes only
        for name in ("one", "two"): monkeypatch.setitem(known, name, _Spy)
    spans = dict(horizon="20D", vol_window="10D", first_test="2018-06-01", step="QS")
    config = EvaluateConfig(models=("one", "two"), n_boot=100, **spans)
    walk_forward_run(config, panel, tmp_path / "out")
    ends = labels[["label_end", "sigma_end"]]
    starts = [fold.test[0] for fold, _ in _Spy.seen]
    assert len(_Spy.seen) == 2 * len(set(starts)) > 10, "two models, each once per fold and once for the newest hour"
    by_start = itertools.groupby(sorted(_Spy.seen, key=lambda s: s[0].test[0]), key=lambda s: s[0].test[0])
    for start, pair in ((k, list(v)) for k, v in by_start):
        matured = np.flatnonzero((ends <= panel.index[start]).all(axis=1) & (panel.index < panel.index[start]))
        assert all(fold.refit.tolist() == matured.tolist() for fold, _ in pair)
        assert len({tuple(rows) for _, rows in pair}) == 1 and len({tuple(fold.valid) for fold, _ in pair}) == 1
        rows = pair[0][1]
        assert set(rows) <= set(pair[0][0].test) and (len(panel) - 1 in rows or (panel.index[rows].hour == 0).all())
