"Reports, times, joins and folds; the work of an audit; random leaks are found and random honest code passes; faults."
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cryptopredict import leakage
from cryptopredict.audits import audit_labels, audit_pipeline
from cryptopredict.leakage import (
    AuditError,
    Fold,
    FoldSplit,
    LeakageError,
    LeakReport,
    audit,
    audit_availability,
    audit_folds,
    check_times,
    live_fold,
    point_in_time,
    walk_forward,
)

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
    rows = pd.Series(rng.random(len(walks)) < share, walks.index)  # rows that only the function knows
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
def test_nullable_and_arrow_floats_are_audited(bars, kind):
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


# --- reports --------------------------------------------------------------------------------------------------------------

T = lambda text: pd.Timestamp(text, tz="UTC")
kinds = lambda report: set(report.findings.kind)
FINDING = dict(column="x", kind="truncation", time=T("2020-01-01"), magnitude=1.0, detail="moved")


def test_a_report_without_findings_is_ok():
    clean = leakage.make_report([], {"cuts": 3})
    assert clean.ok and clean.raise_if_leaky() is clean


def test_a_report_that_tested_too_little_is_not_ok():
    short = LeakReport(leakage.make_report([], {}).findings, {"cuts": 3, "cuts without output": 2})
    assert not short.ok
    with pytest.raises(LeakageError, match="only 1 of 3 cuts could be tested"): short.raise_if_leaky()


def test_only_leaks_fail_a_report():
    assert leakage.make_report([FINDING | dict(severity="suspect")], {"cuts": 3}).ok
    leaky = leakage.make_report([FINDING], {"cuts": 3})
    assert not leaky.ok
    with pytest.raises(LeakageError, match="column 'x', truncation"): leaky.raise_if_leaky()


def test_findings_are_merged_to_the_earliest_per_column_and_kind():
    early = FINDING | dict(time=T("2019-01-01"), magnitude=.5, detail="early")
    merged = leakage.merge_findings([FINDING, early])
    assert merged == [FINDING | dict(time=T("2019-01-01"), detail="early (in 2 comparisons)", times=2)]


# --- times and the point-in-time join -------------------------------------------------------------------------------------

SIX = pd.date_range("2024-01-01", periods=6, freq="h", tz="UTC")


@pytest.mark.parametrize("times, message", [
    (SIX.tz_localize(None), "naive"), (SIX.tz_convert("Europe/Berlin"), "not UTC"), (SIX[::-1], "row 1 .* comes after row 0"),
    (SIX[[0, 1, 1, 2]], "row 2 .* repeats row 1"), (pd.DatetimeIndex([SIX[0], pd.NaT, SIX[1]]), "row 1 has no time"),
    (pd.RangeIndex(3), "holds RangeIndex"),
])
def test_bad_times_are_named(times, message):
    with pytest.raises(ValueError, match=message): check_times(times)


@pytest.mark.parametrize("grid, value_time, available_at, rows", [
    ([0, 10, 30, 60], [0, 24, 0], [10, 30, 50], [-1, 0, 1, 1]),  # a late revision of day 0
    ([10, 50], [0, 0], [10, 50], [0, 1]),  # a revision of the newest day counts
    ([5], [], [], [-1]),
])
def test_the_newest_period_wins_then_its_newest_vintage(grid, value_time, available_at, rows):
    assert leakage.newest_row(*(np.array(x, int) for x in (grid, value_time, available_at))).tolist() == rows


def test_values_that_are_not_numbers_are_named():
    mixed = pd.DataFrame(dict(x=pd.Series([1.5, None, 2], dtype=object)))
    assert leakage.numeric_column(mixed, "x")[[0, 2]].tolist() == [1.5, 2.]
    with pytest.raises(ValueError, match="column 'x', row 1 is 'abc'"):
        leakage.numeric_column(pd.DataFrame(dict(x=["1.5", "abc"])), "x")


@pytest.mark.parametrize("max_age, limit", [("2D", "2D"), ({"x": "3D"}, "3D"), ({"y": "3D"}, "7D"), ({"x": None}, None),
                                            (None, None)])
def test_a_column_without_an_age_limit_of_its_own_gets_seven_days(max_age, limit):
    assert leakage.age_limit(max_age, "x") == (None if limit is None else pd.Timedelta(limit))


@pytest.fixture(scope="module")
def joined():
    "A table of two days, both revised, and its join."
    table = pd.DataFrame(dict(
        value_time=[T("2024-01-01"), T("2024-01-02"), T("2024-01-01"), T("2024-01-02")],
        available_at=[T("2024-01-02 12:00"), T("2024-01-03 12:00"), T("2024-01-05 12:00"), T("2024-01-06 12:00")],
        x=[1.0, 2.0, 1.5, 2.5]))
    grid = pd.date_range("2024-01-01", "2024-01-14", freq="6h", tz="UTC")
    panel, rows = point_in_time(grid, table, max_age="7D", provenance=True)
    return SimpleNamespace(table=table, grid=grid, panel=panel, rows=rows)


@pytest.mark.parametrize("time, value", [
    ("2024-01-02 06:00", None), ("2024-01-02 12:00", 1.0),  # published at 12:00
    ("2024-01-05 18:00", 2.0), ("2024-01-06 12:00", 2.5),  # a late revision of day 1, then one of the newest day
    ("2024-01-09 00:00", 2.5), ("2024-01-09 06:00", None),  # seven days old, then older
])
def test_the_join_shows_what_was_known(joined, time, value):
    x = joined.panel.x.loc[T(time)]
    assert np.isnan(x) if value is None else x == value


@pytest.mark.parametrize("fault, message", [
    (lambda t: (t, t), "two tables"), (lambda t: (t.drop(columns="available_at"),), "available_at"),
    (lambda t: (t.assign(value_time=t.value_time.dt.tz_localize(None)),), "not UTC"),
    (lambda t: (pd.concat([t, t.x], axis=1),), "a column name twice"),
])
def test_bad_tables_are_named(joined, fault, message):
    with pytest.raises(ValueError, match=message): point_in_time(joined.grid, *fault(joined.table))


def test_an_empty_table_gives_an_empty_column(joined):
    assert point_in_time(joined.grid, joined.table.iloc[:0]).x.isna().all()


# --- audit of availability ------------------------------------------------------------------------------------------------


def test_a_join_passes_its_own_audit(joined):
    assert audit_availability([joined.table], joined.panel, joined.rows, "7D").ok


@pytest.mark.parametrize("change, kind", [
    (lambda j: (*point_in_time(j.grid, j.table.assign(available_at=j.table.value_time), provenance=True), None),
     "used before available"),
    (lambda j: (*point_in_time(j.grid, j.table, max_age=None, provenance=True), "7D"), "too old"),
    (lambda j: (j.panel + 1, j.rows, None), "not what its source says"),
    (lambda j: (j.panel * np.nan, j.rows, None), "not what its source says"),
    (lambda j: (j.panel.fillna(0), j.rows, None), "no source row"),
])
def test_a_wrong_cell_is_found(joined, change, kind):
    assert kinds(audit_availability([joined.table], *change(joined))) == {kind}


@pytest.mark.parametrize("inputs, message", [
    (lambda j: ([j.table, j.table], j.panel, j.rows), "'x' is in two tables"),
    (lambda j: ([], j.panel, j.rows), "is in no table"),
    (lambda j: ([j.table], j.panel, j.rows + 9), "does not hold rows -1 to 3"),
    (lambda j: ([j.table], j.panel[[]], j.rows), "not in the panel"),
    (lambda j: ([j.table], j.panel[1:], j.rows), "give both of one join"),
])
def test_tables_panel_and_provenance_must_belong_together(joined, inputs, message):
    with pytest.raises(ValueError, match=message): audit_availability(*inputs(joined))


# --- folds ----------------------------------------------------------------------------------------------------------------

INDEX = pd.date_range("2020-01-01", "2023-07-01", freq="h", tz="UTC")
ENDS = pd.Series(INDEX + pd.Timedelta("90D"), index=INDEX).where(INDEX + pd.Timedelta("90D") <= INDEX[-1])
END = pd.Series(SIX + pd.Timedelta("2h"), index=SIX)


def test_the_longest_label_ends_last():
    both = leakage.ends_by_label(pd.DataFrame(dict(a=END, b=END + pd.Timedelta("1h"))), SIX)
    assert [both[name][0] for name in ("a", "b", "")] == SIX[[2, 3, 3]].tolist()
    assert leakage.ends_by_label(pd.Series(pd.NaT, index=SIX), SIX)[""].isna().all()
    assert leakage.ends_by_label(END, SIX.as_unit("s"))[""][0] == END.iloc[0]


@pytest.mark.parametrize("ends, index, message", [
    (END - pd.Timedelta("9h"), SIX, "before the time of its row"), (END[:5], SIX, "5 rows, index 6"),
    (END[:0], SIX[:0], "index is empty"),
    (END, SIX + pd.Timedelta("1h"), "different times"),
])
def test_bad_label_ends_are_named(ends, index, message):
    with pytest.raises(ValueError, match=message): leakage.ends_by_label(ends, index)


def test_rows_mature_when_their_label_ends():
    rows = leakage.MaturedRows(pd.DatetimeIndex(END))  # labels of two hours
    assert list(rows(0, 6, until=SIX[4])) == [0, 1, 2] and list(rows(1, 2, until=SIX[4])) == [1]
    in_no_order = leakage.MaturedRows(pd.DatetimeIndex(END)[[3, 0, 5, 1, 2, 4]])
    assert list(in_no_order(0, 6, until=SIX[4])) == [1, 3, 4]


def test_bounds_follow_durations_and_the_calendar():
    bounds = leakage.span_bounds
    assert bounds(T("2018-01-01"), T("2019-06-01"), "YS") == [T("2018-01-01"), T("2019-01-01"), T("2020-01-01")]
    assert bounds(T("2018-03-01"), T("2018-03-02"), "90D") == [T("2018-03-01"), T("2018-05-30")]


@pytest.mark.parametrize("step, message", [("-1D", "does not move forward"), (None, "does not move forward"),
                                           ("soon", "'soon' is not a duration or calendar offset: give a positive one")])
def test_a_step_that_does_not_move_forward_is_refused(step, message):
    with pytest.raises(ValueError, match=message): leakage.span_bounds(T("2018-03-01"), T("2018-03-02"), step)


def test_test_spans_touch_and_never_overlap():
    folds = walk_forward(INDEX, ENDS, first_test="2022-01-01", step="180D", embargo="2D")
    assert np.array_equal(np.concatenate([f.test for f in folds]), np.arange(folds[0].test[0], folds[-1].test[-1] + 1))
    assert all(len(f.refit) == f.refit[-1] + 1 for f in folds)


@pytest.mark.parametrize("how, message", [
    (dict(first_test="2020-03-01"), "no matured label in 'valid'"), (dict(first_test="2024-01-01"), "no label ends"),
    (dict(first_test="2019-01-01"), "nothing to train"), (dict(first_test="2022-01-01", embargo="-1D"), "negative"),
])
def test_too_little_history_is_named(how, message):
    with pytest.raises(ValueError, match=message): walk_forward(INDEX, ENDS, **how)


def test_a_negative_embargo_of_a_live_fold_is_refused():
    with pytest.raises(ValueError, match="must not be negative"): live_fold(INDEX, ENDS, embargo="-10D")


def test_spans_without_labels_are_refused_or_skipped():
    holed = ENDS.where(~((INDEX >= "2022-06-30") & (INDEX < "2023-01-01")))
    with pytest.raises(ValueError, match="no label in the fold tested from 2022-06-30"):
        walk_forward(INDEX, holed, first_test="2022-01-01", step="180D")
    folds = walk_forward(INDEX, holed, first_test="2022-01-01", step="180D", skip_unlabelled=True)
    assert [INDEX[f.test[0]] for f in folds] == [T("2022-01-01"), T("2022-12-27")]


def test_parts_in_any_order_are_stored_as_given():
    assert Fold([0, 1], [5, 3, 4], [6], [0, 1]).valid.tolist() == [5, 3, 4]


def test_a_pair_of_positions_is_a_fold_without_validation():
    pair = leakage.as_fold((np.arange(3), np.arange(3, 5)), 0)
    assert (pair.train.tolist(), pair.refit.tolist(), len(pair.valid)) == ([0, 1, 2], [0, 1, 2], 0)


@pytest.mark.parametrize("fold, message", [((SIX, SIX, SIX), "has 3 parts"), (([], [1]), "'train' is empty"),
                                           (3, "fold 7 is int")])
def test_what_is_no_fold_is_named(fold, message):
    with pytest.raises(ValueError, match=message): leakage.as_fold(fold, 7)


@pytest.mark.parametrize("rows", [[6], [-1], [True, False], [.5]])
def test_positions_must_be_positions(rows):
    assert leakage.check_positions([0, 5], 6, "fold 0: 'train'").tolist() == [0, 5]
    with pytest.raises(ValueError, match="'train' does not hold positions from 0 to 5"):
        leakage.check_positions(rows, 6, "fold 0: 'train'")


# --- audit of folds -------------------------------------------------------------------------------------------------------


def test_a_label_that_ends_an_hour_late_is_found():
    folds = walk_forward(INDEX, ENDS, first_test="2022-01-01")
    assert audit_folds(folds, ENDS).ok
    assert kinds(audit_folds(folds, ENDS + pd.Timedelta("1h"))) == {"label overlap"}


def test_a_random_split_is_found_three_ways():
    mixed = np.random.default_rng(0).permutation(20_000)
    split = Fold(mixed[:12_000], mixed[12_000:15_000], mixed[15_000:], mixed[:15_000])
    assert {"shuffled", "interleaved", "label overlap"} <= kinds(audit_folds([split], ENDS))


def test_a_k_fold_purged_on_both_sides_still_needs_its_embargo():
    days, rows = pd.date_range("2024-01-01", periods=40, tz="UTC"), np.arange(40)
    split = [(np.delete(rows, rows[max(a - 2, 0):a + 12]), rows[a:a + 10]) for a in (0, 10, 20, 30)]
    ends = pd.Series(days + pd.Timedelta("3D"), days)
    assert kinds(audit_folds(split, ends)) == {"interleaved"}
    assert kinds(audit_folds(split, ends, "1D")) == {"embargo", "interleaved"}


def test_audit_folds_names_what_it_cannot_judge():
    with pytest.raises(ValueError, match="folds is empty"): audit_folds([], ENDS)
    with pytest.raises(ValueError, match="embargo is 24: give a duration"):
        audit_folds(walk_forward(INDEX, ENDS, first_test="2022-01-01"), ENDS, 24)


# --- the parts of the audit of code ---------------------------------------------------------------------------------------

X = pd.Series([1., 2., np.nan], index=SIX[:3])


def subject_of(fn, frame, **how) -> leakage.AuditedFunction:
    "A function under audit."
    return leakage.AuditedFunction(fn, frame, np.random.default_rng(0), **how)


@pytest.fixture(scope="module")
def mixed() -> pd.DataFrame:
    "Four thousand hours of every kind of column."
    n = 4000
    return pd.DataFrame(dict(
        low=np.arange(1., n + 1), high=np.arange(2., n + 2), f32=np.ones(n, "float32"),
        count=np.arange(n), flag=np.arange(n) % 2 == 0, text=["a", "b"] * (n // 2),
        label=pd.Categorical(["a", "b"] * (n // 2)), maybe=pd.array([1, None] * (n // 2), dtype="Int64")),
        index=pd.date_range("2020-01-01", periods=n, freq="h", tz="UTC"))


def test_every_kind_of_column_is_audited(mixed):
    assert audit(lambda f: f, mixed).ok


def test_an_array_becomes_a_frame_on_the_times_of_the_input():
    frame = leakage.as_frame(np.ones((3, 2)), X.to_frame())
    assert frame.index.equals(X.index) and list(frame) == ["0", "1"]


def test_rows_in_another_order_are_sorted():
    assert leakage.as_frame(X[::-1], X.to_frame()).index.tolist() == SIX[:3].tolist()


@pytest.mark.parametrize("out, message", [
    (X.shift(freq="-1h"), "does not have"), (X.reset_index(drop=True), "does not have"),
    (pd.concat([X, X], axis=1, keys=["x", "x"]), "column 'x' twice"), (1.5, "returned float: return a frame"),
])
def test_output_that_is_not_on_the_times_of_the_frame_is_named(out, message):
    with pytest.raises(ValueError, match=message): leakage.as_frame(out, X.to_frame())


def test_each_call_gets_a_fresh_object():
    class Remembers:
        mean = None
        def scaled(self, x):
            if self.mean is None: self.mean = x
            return x - self.mean
        __call__ = scaled
    thing = Remembers()
    assert [leakage.fresh_copy(f)(5.) for f in (thing, thing.scaled, abs)] + [thing.mean] == [0., 0., 5., None]


def test_calls_that_raise_are_counted_unless_they_must_not():
    frame = pd.DataFrame(dict(x=[1., 2.]), index=SIX[:2])
    subject = subject_of(lambda f: f.x / (len(f) - 1), frame)
    assert (subject.call(frame).x.tolist(), subject.call(frame.x), subject.runs, subject.raised) == ([1., 2.], None, 2, 1)
    with pytest.raises(AuditError, match="fn raised AttributeError.* on a frame of 2 rows: correct fn"):
        subject.call(frame[[]], must=True)


@pytest.mark.parametrize("base, other, gap", [
    (X, X.fillna(-3), [0, 0, np.inf]), (pd.cut(X, [0, 1.5, 9]), pd.cut(X, [0, 1.5, 8]), [0, np.inf, 0]),  # other categories
    (pd.Series(["x", None]), pd.Series(["x", "y"]), [0, np.inf]),
    (pd.Series([[np.nan, 1], np.zeros(2)]), pd.Series([[np.nan, 1], np.ones(2)]), [0, np.inf]),
])
def test_columns_of_any_kind_are_compared(base, other, gap):
    assert leakage.column_gap(base, other)[0].tolist() == gap


def test_the_size_of_a_difference_is_that_of_the_larger_value():
    assert leakage.column_gap(X, -2 * X)[1][:2].tolist() == [2., 4.]


@pytest.mark.parametrize("values, scale", [([1., -2, np.inf], 2.), ([1e-3, 1e-3, 1e9], 1.), (list("ab"), 0.), ([np.nan], 0.)])
def test_an_outlier_does_not_set_the_scale(values, scale):
    assert leakage.column_scale(pd.Series(values)) == scale


def test_flags_have_no_tolerance():
    frame = pd.DataFrame(dict(x=1e6 + np.random.default_rng(0).normal(size=4000)))
    flags = lambda f: f.x > 0
    assert leakage.tolerances(subject_of(flags, frame), flags(frame).to_frame("value"))["value"] == (0., 0.)


@pytest.mark.parametrize("other, found", [
    (X + 1e-12, []), (X + [0, .5, 0], [("x", SIX[1], .5)]), (X[:2], []),  # the missing row was empty
    (X[1:], [("(rows)", SIX[0], 1.)]),
])
def test_a_difference_is_found_at_its_row(other, found):
    findings = leakage.compare_outputs(X.to_frame("x"), other.to_frame("x"), SIX[2], "truncation", dict(x=(1e-9, 1e-9)), "")
    assert [(f["column"], f["time"], f["magnitude"]) for f in findings] == found


@pytest.mark.parametrize("mode", leakage.MODES)
def test_a_replaced_future_is_plausible(mixed, mode):
    future = leakage.replace_rows(mixed, np.arange(1000, len(mixed)), mode, np.random.default_rng(0))
    assert future.dtypes.tolist() == mixed.dtypes.tolist() and future[:1000].equals(mixed[:1000])
    assert not (future.low[1000:] == mixed.low[1000:]).any() and not (future.low <= 0).any()
    if mode == "resample": assert (future.high > future.low).all()


def test_removed_values_are_few_and_reach_the_cut(mixed):
    removed = leakage.with_missing(mixed, ["low"], 500, np.random.default_rng(0))
    assert .02 < removed.low.isna().mean() < .04 and removed.drop(columns="low").equals(mixed.drop(columns="low"))
    assert np.isnan(removed.low.iloc[499]) and mixed.low.notna().all()


@pytest.mark.parametrize("values, rows", [
    ([0., 0, 0, 0, 0, 1, 1, 1, 1, 1], [5]), ([np.nan] * 9 + [1.] + [np.nan] * 9, [9, 10]),  # a sparse column steps at its value
    ([1., 2, 3, 4, 9, 8, 7, 0, 1], [4, 7]),
])
def test_events_are_steps_and_extremes(values, rows):
    assert leakage.event_rows(pd.Series(values)).tolist() == rows


def test_the_calendar_has_holidays_and_gaps():
    year = pd.date_range("2020-12-24", "2021-01-05", freq="6h", tz="UTC").delete(9)
    days, weeks, months, quarters, years, holidays, gaps = leakage.calendar_rows(year)
    assert (len(days), year[weeks].day_name().unique().tolist(), year[months].tolist()) == (12, ["Monday"], [T("2021-01-01")])
    assert (gaps.tolist(), sorted({str(t.date()) for t in year[holidays]})) == ([9], ["2020-12-25", "2021-01-01"])


def candidates(fn, frame) -> list[np.ndarray]:
    "Rows of a function that a later row moves, by column and kind of change."
    subject = subject_of(fn, frame)
    base = subject.call(frame)
    return leakage.candidate_rows(subject, base, {c: (1e-6, 1e-9) for c in base})


def test_rows_of_a_rare_leak_are_candidates(mixed):
    rare = np.random.default_rng(3).random(len(mixed)) < .002  # known to the function only
    peek = lambda f: f.low.where(~rare[:len(f)], f.low.shift(-1))
    for found in candidates(peek, mixed[["low"]]): assert rare[found - 1].all() and len(found) >= 2
    assert rare[candidates(lambda f: peek(f).diff(), mixed[["low"]])[0] - 1].any()  # behind a difference too


def test_rows_of_a_leak_at_new_highs_are_candidates(mixed):
    drift = pd.DataFrame(dict(x=np.random.default_rng(5).normal(size=len(mixed)).cumsum() + 500), index=mixed.index)
    highs = lambda f: f.x.rolling(9).mean().where(f.x < f.x.cummax(), f.x.shift(-1))  # large changes would undo the highs
    assert (drift.x == drift.x.cummax()).iloc[candidates(highs, drift)[0] - 1].sum() >= 2


def test_no_row_is_a_candidate_where_every_row_moves(mixed):
    assert candidates(lambda f: f.low.expanding().mean(), mixed[["low"]]) == []


def test_cuts_meet_both_ends_candidates_and_midnights(mixed):
    low = mixed[["low"]]
    cuts = leakage.choose_cuts(low, low, [np.array([77, 78])], 32, np.random.default_rng(0))
    assert {1, 2, 3, len(low) - 2, len(low) - 1} <= set(cuts) and len(cuts) == 32 and {77, 78} & set(cuts)
    assert low.index[cuts].hour.isin([0, 1]).sum() >= 5


LONG = pd.DataFrame(dict(x=np.arange(20_000.)), index=pd.date_range("2020-01-01", periods=20_000, freq="h", tz="UTC"))


@pytest.mark.parametrize("window, back", [(24, 2000), (2001, 4500), (3501, 20_000)])
def test_local_runs_are_twice_as_long_as_the_warm_up(window, back):
    assert leakage.rows_back(LONG, LONG.rolling(window).mean()) == back


def test_moved_columns_are_named_once():
    one = pd.DataFrame(dict(x=[1., 2.], y=[1., 2.]))
    assert leakage.moved_columns(one, one.assign(x=0.), set()) == leakage.moved_columns(one, one[:1], {"y"}) == {"x"}


def at_cut(fn, back, **how):
    "Kinds of findings at one cut, and the function under audit."
    subject = subject_of(fn, LONG, incomplete=["x"])
    return {f["kind"] for f in leakage.audit_cut(subject, 9000, back, dict(x=(1e-9, 1e-9)), **how)}, subject


@pytest.mark.parametrize("back", [2000, 20_000])
def test_local_and_whole_cuts_find_the_same(back):
    assert at_cut(lambda f: f.shift(-1), back)[0] == {"truncation", "perturbation"}
    assert at_cut(lambda f: f.shift(1), back)[0] == set()


def test_a_back_fill_is_found_where_values_are_missing():
    assert [at_cut(lambda f: f.bfill(), 2000, holes=h)[0] for h in (False, True)] == [set(), {"truncation"}]


def test_missing_output_for_missing_input_is_no_leak():
    wiped = lambda f: f * 0 + np.convolve(f.x, np.ones(3))[:len(f), None] + f.x.sum() * 0  # causal, but one NaN wipes all
    assert at_cut(wiped, 2000)[0] == set()


def test_code_that_needs_the_whole_frame_is_judged_by_other_futures():
    def needs_much(f):
        if len(f) < 15_000: raise RuntimeError("too short")
        return f.shift(-1)
    found, subject = at_cut(needs_much, 2000)
    assert (found, subject.raised) == ({"perturbation"}, 2)


def test_what_could_not_be_tested_is_listed():
    frame = pd.DataFrame(dict(x=[1., 2.], y=1.), index=SIX[:2])
    subject = subject_of(len, frame, runs=3, raised=2, compared={"x"}, tests_run={"perturbation"})
    assert leakage.summarise_tests(subject, frame) == {
        "runs": 3, "runs that raised": 2, "truncation": "untested: 2 runs raised", "columns never compared": "untested: y",
        "columns that ignore the frame's values": "untested: x, y"}


# --- faults of a function or a frame, by their message --------------------------------------------------------------------


def test_random_output_is_not_deterministic(bars):
    generator = np.random.default_rng()
    assert kinds(audit(lambda f: f.close + generator.normal(size=len(f)), bars)) == {"not deterministic"}


def test_a_function_that_writes_into_its_input_spoils_nothing(bars):
    def writes(f):
        f["close"] = 0.
        return f.volume
    kept = bars.copy()
    assert audit(writes, bars).tested["note"] == "fn writes into its input" and bars.equals(kept)


@pytest.mark.parametrize("fn, message", [
    (lambda f: f.close.shift(freq="1h"), "^fn returned rows at times that the frame does not have: return rows on"),
    (lambda f: np.zeros(5), "^fn returned shape .5,. for 3000 rows"),
    (lambda f: f["nothing"], "fn raised KeyError.'nothing'. on a frame of 3000 rows"),
    (lambda f: f.close * np.nan, "nothing could be compared: fn returned no value before any cut: give a longer frame"),
])
def test_a_function_that_cannot_be_audited_is_named(bars, fn, message):
    with pytest.raises(AuditError, match=message): audit(fn, bars)


def test_a_function_that_accepts_one_frame_only_cannot_be_audited(bars):
    def refuses(f):
        if not f.equals(bars): raise RuntimeError("needs the whole history")
        return f.close
    with pytest.raises(AuditError, match="nothing could be compared: fn raised RuntimeError.*needs the whole"):
        audit(refuses, bars)


@pytest.mark.parametrize("change, error, message", [
    (lambda f: f.iloc[:7], AuditError, "frame has 7 rows"), (lambda f: f.close, AuditError, "frame is a Series"),
    (lambda f: f.reset_index(drop=True), ValueError, "frame.index holds RangeIndex"),
    (lambda f: f[::-1], ValueError, "row 1 .* comes after row 0"),
    (lambda f: f.iloc[[0, *range(2999)]], ValueError, "row 1 .* repeats row 0"),
])
def test_a_frame_that_cannot_be_audited_is_named(bars, change, error, message):
    with pytest.raises(error, match=message): audit(lambda f: f, change(bars))


def test_an_audit_needs_cuts(bars):
    with pytest.raises(AuditError, match="n_cuts is 0: an audit needs"): audit(lambda f: f.close, bars, n_cuts=0)


# --- several assets -------------------------------------------------------------------------------------------------------

DAYS = pd.date_range("2020-01-01", periods=900, tz="UTC")


def coin_ends(days: pd.DatetimeIndex, first: int = 30, second: int = 10) -> pd.DataFrame:
    "Ends of two labels of so many days."
    ends = {name: pd.Series(days + pd.Timedelta(days=k), days) for name, k in (("label_end", first), ("sigma_end", second))}
    return pd.DataFrame({name: end.where(end <= DAYS[-1]) for name, end in ends.items()})


COINS = leakage.stack_assets({"BTC": coin_ends(DAYS), "ADA": coin_ends(DAYS[200:]), "OLD": coin_ends(DAYS[:250]),
                              "ETH": coin_ends(DAYS[700:])})
SPANS = dict(first_test="2021-06-01", step="90D", validation="120D", embargo="3D")


def by_definition(ends: pd.Series, start, until, validation, embargo) -> dict:
    "The parts of one asset's fold, row by row."
    times, cut = ends.index, start - validation
    ended = lambda t: (ends <= t - embargo).to_numpy()
    parts = dict(train=(times < cut) & ended(cut), valid=(times >= cut) & (times < start) & ended(start),
                 test=(times >= start) & (times < until), refit=(times < start) & ended(start))
    return {name: np.flatnonzero(mask).tolist() for name, mask in parts.items()}


def test_each_asset_of_a_fold_has_exactly_the_rows_whose_own_labels_ended():
    folds, alone = walk_forward(COINS.index, COINS, **SPANS), walk_forward(DAYS, COINS.loc["BTC"], **SPANS)
    assert len(folds) == len(alone) >= 4
    for fold, bitcoin in zip(folds, alone):
        asset, start = COINS.index[fold.test[0]]
        assert (asset, start) == ("BTC", DAYS[bitcoin.test[0]])
        for name in ("BTC", "ADA", "OLD", "ETH"):
            for label in ("label_end", "sigma_end"):
                own = leakage.asset_fold(fold, COINS.index, name).of(label)
                until = start + pd.Timedelta("90D")
                expected = by_definition(COINS.loc[name][label], start, until, pd.Timedelta("120D"), pd.Timedelta("3D"))
                assert {part: getattr(own, part).tolist() for part in Fold.PARTS} == expected, (name, label)
        for part in Fold.PARTS:  # the calendar's rows are those of its own walk-forward, at the same positions
            held = getattr(fold, part)
            assert np.array_equal(held[held < len(DAYS)], getattr(bitcoin, part)) and (np.diff(held) > 0).all()
    first = leakage.asset_fold(folds[0], COINS.index, "ETH")
    assert [len(getattr(first, part)) for part in Fold.PARTS] == [0, 0, 0, 0]


def test_the_test_begins_with_the_calendar_even_where_another_asset_has_earlier_rows():
    holed = coin_ends(DAYS[(DAYS < "2021-05-25") | (DAYS > "2021-06-10")])
    stacked = leakage.stack_assets({"BTC": holed, "ETH": coin_ends(DAYS)})
    fold = walk_forward(stacked.index, stacked, **SPANS)[0]
    asset, start = stacked.index[fold.test[0]]
    assert (asset, start) == ("BTC", T("2021-06-11")) and stacked.index[fold.test].get_level_values("time").min() == start


def test_the_live_fold_of_several_assets_is_tested_at_one_time():
    fold = live_fold(COINS.index, COINS, validation="120D")
    assert COINS.index[fold.test].tolist() == [(name, DAYS[-1]) for name in ("BTC", "ADA", "ETH")]
    assert COINS.label_end.iloc[fold.refit].max() == DAYS[-1]
    past = leakage.stack_assets({"BTC": coin_ends(DAYS[:-50]), "ADA": coin_ends(DAYS)})  # rows after the calendar's last one
    fold = live_fold(past.index, past, validation="120D")
    assert past.index[fold.test].tolist() == [("BTC", DAYS[-51]), ("ADA", DAYS[-51])]


def test_a_fold_of_labels_with_gaps_is_the_same_by_asset():
    holed = COINS.copy()
    holed.loc[np.random.default_rng(0).random(len(COINS)) < .4, "label_end"] = pd.NaT
    fold = walk_forward(holed.index, holed, **SPANS)[1]
    joined = {part: np.concatenate([getattr(leakage.asset_fold(fold, holed.index, name), part) + rows.start
                                    for name, rows in leakage.asset_rows(holed.index).items()]) for part in Fold.PARTS}
    assert all(np.array_equal(joined[part], getattr(fold, part)) for part in Fold.PARTS)


@pytest.mark.parametrize("frames, message", [
    ({}, "frames is empty"), ({"BTC": COINS.loc["BTC"][::-1]}, "index of BTC: row 1"),
    ({"BTC": COINS.loc["BTC"].iloc[:0]}, "BTC has no row"),
    ({"BTC": COINS.loc["BTC"].tz_localize(None)}, "index of BTC has naive times"),
])
def test_assets_that_cannot_be_stacked_are_named(frames, message):
    with pytest.raises(ValueError, match=message): leakage.stack_assets(frames)


def test_bad_rows_of_several_assets_are_named():
    mixed = COINS.sort_index(level="time", sort_remaining=False)
    with pytest.raises(ValueError, match="not together"): walk_forward(mixed.index, mixed, **SPANS)
    with pytest.raises(ValueError, match="index of ETH: row 1"):
        backwards = COINS.iloc[[*range(len(COINS) - 200), *range(len(COINS) - 1, len(COINS) - 201, -1)]]
        walk_forward(backwards.index, backwards, **SPANS)
    with pytest.raises(ValueError, match="different times"):
        walk_forward(COINS.index, COINS.set_index(COINS.index[::-1]), **SPANS)
    with pytest.raises(ValueError, match="'DOGE' is not an asset of the index: it has BTC, ADA, OLD, ETH"):
        leakage.asset_fold(walk_forward(COINS.index, COINS, **SPANS)[0], COINS.index, "DOGE")
    with pytest.raises(ValueError, match="no matured label in 'train'"):  # another asset's history does not help the calendar
        late = leakage.stack_assets({"ETH": COINS.loc["ETH"], "BTC": COINS.loc["BTC"]})
        walk_forward(late.index, late, first_test="2022-02-01", validation="60D")


def test_labels_of_another_coin_across_the_purge_are_found():
    folds = walk_forward(COINS.index, COINS, **SPANS)
    assert audit_folds(folds, COINS, "3D").ok and audit_folds(folds, COINS, "3D").findings.empty
    fold, coin = folds[0], leakage.asset_rows(COINS.index)["ADA"]
    start = COINS.index[fold.test[0]][1]
    spare = [i for i in coin if COINS.index[i][1] < start and COINS.label_end.iloc[i] > start]
    bitcoin = fold.test[fold.test < len(DAYS)]  # no row of ADA is tested
    wrong = Fold(fold.train, fold.valid, bitcoin, np.union1d(fold.refit, spare[:1]))
    report = audit_folds([wrong], COINS)
    assert kinds(report) == {"label overlap"} and report.findings.column.tolist() == ["refit"]
    assert audit_folds([Fold(fold.train, fold.valid, bitcoin, fold.refit)], COINS).findings.empty


# --- audit of code on several assets --------------------------------------------------------------------------------------


def coin_bars(days: pd.DatetimeIndex, seed: int) -> pd.DataFrame:
    "Bars of a coin, with a column of each type."
    rng, n = np.random.default_rng(seed), len(days)
    close = 100 * np.exp(rng.normal(0, .03, n).cumsum())
    return pd.DataFrame(dict(close=close, filled=rng.random(n) < .1, trades=rng.integers(1, 99, n)), days)


BARS = leakage.stack_assets({"BTC": coin_bars(DAYS, 1), "ADA": coin_bars(DAYS[150:], 2), "ETH": coin_bars(DAYS[450:800], 3)})


def by_coin(values): return values.groupby("asset", group_keys=False)


def changes(frame): return by_coin(np.log(frame.close)).diff()


def of_bitcoin(values: pd.Series) -> pd.Series: return pd.concat({"BTC": values.rename("x")}, names=["asset", "time"])


def audit_of_coins(fn): return audit(fn, BARS, n_cuts=8)


def test_trailing_features_by_coin_pass():
    def features(frame):
        vol = by_coin(changes(frame)).transform(lambda x: x.rolling(20).std())
        level = vol / by_coin(vol).transform(lambda x: x.rolling(365, min_periods=60).mean())
        relative = level - level.groupby("time").transform("mean")
        return pd.DataFrame(dict(level=level, relative=relative, filled=frame.filled, trades=frame.trades))

    seen = []
    report = audit(lambda frame: (seen.append(frame), features(frame))[1], BARS)
    assert report.ok and report.findings.empty and not report.tested["runs that raised"]
    assert report.tested["assets"] == 3 and not [k for k in report.tested if k.startswith("columns")], report.tested
    for frame in seen:  # only rows that exist, of the types given, and no trace of assets that do not exist yet
        assert frame.index.isin(BARS.index).all() and (frame.dtypes == BARS.dtypes).all()
        assert set(frame.index.levels[0]) == set(frame.index.get_level_values(0))
    assert {tuple(frame.index.levels[0]) for frame in seen} >= {("BTC",), ("BTC", "ADA"), ("BTC", "ADA", "ETH")}


def test_a_coin_mean_over_the_whole_sample_is_found():
    report = audit_of_coins(lambda frame: changes(frame) - by_coin(changes(frame)).transform("mean"))
    assert set(report.findings.column) == {"BTC close", "ADA close", "ETH close"}


def test_another_coins_future_is_found():
    def fn(frame):
        wide = changes(frame).unstack("asset")
        return of_bitcoin(wide["ETH"].rolling(3).sum().shift(-3) if "ETH" in wide else wide["BTC"] * np.nan)
    report = audit_of_coins(fn)
    assert set(report.findings.column) == {"BTC x"} and report.tested["assets without output"] == "ADA, ETH"


def test_scaling_over_all_coins_and_times_is_found():
    assert not audit_of_coins(lambda frame: (changes(frame) - changes(frame).mean()) / changes(frame).std()).ok


def test_prices_filled_back_before_a_coin_began_are_found():
    wide = lambda frame: frame.close.unstack("asset").bfill()
    assert set(audit_of_coins(lambda frame: of_bitcoin(wide(frame).mean(axis=1))).findings.column) == {"BTC x"}
    report = audit_of_coins(lambda frame: wide(frame).stack().swaplevel().rename("close"))  # rows that do not exist
    early = report.findings[report.findings.kind == "asset before its first row"]
    assert early.column.tolist() == ["ADA close", "ETH close"] and early.magnitude.tolist() == [150, 450]


def test_rows_borrowed_from_bitcoin_before_a_coin_began_are_found():
    def fn(frame):
        wide = changes(frame).unstack("asset")
        return of_bitcoin(wide.apply(lambda x: x.fillna(wide["BTC"])).mean(axis=1))
    assert kinds(audit_of_coins(fn)) == {"truncation", "perturbation"}


def test_a_function_of_coins_may_return_one_series_of_times():
    assert audit_of_coins(lambda frame: changes(frame).groupby("time").mean()).ok
    assert not audit_of_coins(lambda frame: changes(frame).groupby("time").mean().shift(-1)).ok


def test_output_rows_of_an_unknown_coin_are_named():
    with pytest.raises(AuditError, match="rows of 'DOGE', an asset that the frame does not have"):
        audit_of_coins(lambda frame: pd.concat({"DOGE": frame.close.loc["BTC"]}, names=["asset", "time"]))
