"The real files: every reader on its file, the panel, no look-ahead, and the committed results recomputed."
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import BASELINES, ROOT, read_result

import cryptopredict as cp
from cryptopredict import leakage, scores, sources
from cryptopredict.features import ALL, build_features, registry
from cryptopredict.files import list_files
from cryptopredict.labels import FORECAST_COLUMNS, make_labels
from cryptopredict.protocol import EvaluateConfig
from cryptopredict.storage import flatten_keys
from cryptopredict.walkforward import score_run

RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def panel(data_dir):
    return sources.load_panel(data_dir)


@pytest.fixture(scope="module")
def run(real_run):
    "The run on the real files and its scores."
    assert real_run.rc == 0, real_run.stderr
    return real_run, json.loads((real_run.out / "scores.json").read_text())


# --- files ----------------------------------------------------------------------------------------------------------------

FILES = [  # path, format, rows, first and last period, from the README of the data
    ("market/kraken_XBTUSD_60.csv.gz", "kraken", 70253, "2013-10-06 21:00", "2023-01-07 09:00"),
    ("market/binance_BTCUSDT_1h.csv.gz", "binance", 52549, "2019-01-01 00:00", "2024-12-31 23:00"),
    ("market/BTCUSDT-1h-2024-11.csv", "binance", 720, "2024-11-01 00:00", "2024-11-30 23:00"),
    ("market/BTCUSDT-1h-2024-12.csv", "binance", 744, "2024-12-01 00:00", "2024-12-31 23:00"),
    ("onchain/coinmetrics_btc.csv.gz", "coinmetrics", 5842, "2009-01-03", "2024-12-31"),
    ("onchain/coinmetrics_btc_vintage_2019-10.csv.gz", "coinmetrics", 3943, "2009-01-03", "2019-10-20"),
    ("onchain/blockchaincom_utxo-count_to2018.csv", "blockchaincom", 1511, "2013-01-25", "2018-01-24"),
    ("macro/DGS10.csv", "fred", 5217, "2005-01-03", "2024-12-31"),
    ("macro/DGS2.csv", "fred", 5217, "2005-01-03", "2024-12-31"),
    ("macro/DTWEXBGS.csv", "fred", 4957, "2006-01-02", "2024-12-31"),
    ("macro/DX-Y.NYB.csv", "yahoo", 2767, "2014-01-02", "2024-12-31"),
]
HOLES, FLAT = 59, 4  # hours of outage and bars without volume in the long Binance file


@pytest.mark.parametrize("path, kind, rows, begin, end", FILES, ids=[Path(f[0]).name for f in FILES])
def test_a_file_is_read_whole_with_its_format(data_dir, path, kind, rows, begin, end):
    table = sources.read(data_dir / path)
    assert (table.attrs["format"], len(table), table.attrs["repairs"]) == (kind, rows, {})
    assert list(table.columns[:2]) == ["value_time", "available_at"] and (table.dtypes.iloc[2:] == "float64").all()
    first, last = table["value_time"].iloc[[0, -1]]
    assert (first.floor("D" if kind == "blockchaincom" else "h"), last.floor("D" if kind == "blockchaincom" else "h")) == (
        pd.Timestamp(begin, tz="UTC"), pd.Timestamp(end, tz="UTC"))
    assert str(table["value_time"].dt.tz) == str(table["available_at"].dt.tz) == "UTC"
    assert table["value_time"].is_monotonic_increasing and table["value_time"].is_unique
    assert (table["available_at"] > table["value_time"]).all(), "nothing is known before its period begins"


def test_these_are_all_the_files(data_dir):
    there = {p.relative_to(data_dir).as_posix() for p in list_files(data_dir).files}
    assert there == {f[0] for f in FILES}


def test_hours_without_trades_are_those_in_the_readme_of_the_data(data_dir):
    kraken, binance = (sources.read(data_dir / f[0]) for f in FILES[:2])
    grid = pd.date_range(kraken["value_time"].iloc[0], kraken["value_time"].iloc[-1], freq="h")
    lost = grid.difference(pd.DatetimeIndex(kraken["value_time"]))
    assert lost.year.value_counts().reindex(range(2013, 2017)).tolist() == [825, 5438, 4348, 182]
    # The longest gap: 57 hours between two bars.
    assert round(100 * len(lost) / len(grid), 1) == 13.4 and kraken["value_time"].diff().max() == pd.Timedelta("57h")
    hours = pd.date_range("2019-01-01", "2024-12-31 23:00", freq="h", tz="UTC")
    assert len(hours.difference(pd.DatetimeIndex(binance["value_time"]))) == len(hours) - len(binance) == HOLES
    assert ((binance["volume"] == 0) & (binance["high"] == binance["low"])).sum() == FLAT


def test_klines_agree_with_the_long_binance_file(data_dir):
    iso = sources.read(data_dir / FILES[1][0]).set_index("value_time")
    for name in (FILES[2][0], FILES[3][0]):
        klines = sources.read(data_dir / name).set_index("value_time")
        both = klines.index.intersection(iso.index)
        assert len(both) == len(klines)
        assert np.allclose(klines.loc[both, sources.BAR_COLUMNS], iso.loc[both, sources.BAR_COLUMNS], rtol=1e-6)


def test_both_vintages_of_coin_metrics_agree(data_dir):
    new, old = (sources.read(data_dir / f[0]).set_index("value_time") for f in FILES[4:6])
    assert "HashRate" in old, "derived from DiffMean, which only the old vintage has"
    both = old.index[old.index >= "2012-01-01"].intersection(new.index)
    for column in ("TxCnt", "AdrActCnt", "SplyCur", "HashRate"):
        gap = (new.loc[both, column] / old.loc[both, column] - 1).abs().dropna()
        assert len(gap) > 2500 and gap.quantile(.99) < 1e-3, (column, gap.quantile(.99))


def test_availability_of_coin_metrics_rows(data_dir):
    table = sources.read(data_dir / "onchain/coinmetrics_btc.csv.gz")
    lag = (table["available_at"] - table["value_time"].dt.floor("D") - pd.Timedelta("1D")) / pd.Timedelta("1h")
    real = table["value_time"] >= "2021-02-26"
    assert (lag[~real] == 24).mean() > .99, "a back-filled row has no publication date: 24 hours are assumed"
    assert 3 <= lag[real].median() <= 5 and lag.min() >= 0 and round(lag[real].max()) == 118
    assert table["value_time"][lag[real].idxmax()] == pd.Timestamp("2024-08-14", tz="UTC")


# --- panel ----------------------------------------------------------------------------------------------------------------


def test_the_panel_has_its_documented_columns(panel):
    assert panel.index.name == "time" and str(panel.index.tz) == "UTC" and len(panel) == 98499
    assert (np.diff(panel.index.asi8) == np.diff(panel.index.asi8)[0]).all(), "hourly without gaps"
    names = "open high low close volume tx_count transfer_count active_addresses fees hash_rate difficulty supply mvrv utxo_count"
    assert panel.columns.tolist() == [*names.split(), "dxy", "dtwexbgs", "dgs10", "dgs2", "is_filled", "is_splice"]
    assert panel.dtypes.astype(str).tolist() == ["float64"] * 18 + ["bool"] * 2
    assert panel.index[panel["is_splice"]].tolist() == [pd.Timestamp("2019-01-01 01:00", tz="UTC")]
    filled = panel["is_filled"]
    assert not panel["close"].isna().any() and (panel["volume"][filled] == 0).all() and (panel["volume"][~filled] > 0).all()
    assert filled["2014-01-01 01:00":"2015-01-01 00:00"].sum() == 5438 and filled["2019-01-01 01:00":].sum() == HOLES + FLAT


def test_known_prices_and_yields(panel):
    # A row is the close of the bar that opened an hour earlier: shift back to have calendar days.
    days = panel.set_axis(panel.index - pd.Timedelta("1h")).groupby(lambda t: str(t.date()))
    high, low = days["high"].max(), days["low"].min()
    for day, price in (("2013-11-29", 1199), ("2017-12-17", 19660), ("2021-11-10", 69000), ("2024-03-14", 73777)):
        assert abs(high[day] - price) < 1, (day, high[day])
    assert abs(low["2020-03-13"] - 3782) < 1
    # Thursday's yield is known on Friday at 16:15 New York (20:15 UTC), not earlier.
    known = panel.loc["2023-10-20 19:00":"2023-10-20 22:00", "dgs10"]
    assert known.tolist()[:2] == [4.91, 4.91] and known.tolist()[2:] == [4.98, 4.98], known


def test_no_value_is_used_early_or_stale(data_dir):
    bars, tables = sources.load_tables(data_dir)
    panel, provenance = sources.join_panel(bars, tables)
    report = leakage.audit_availability(tables, panel, provenance, sources.MAX_AGE).raise_if_leaky()
    assert report.tested["columns"] == 13 and report.tested["cells"] > 1_000_000
    shifted = [t.assign(available_at=t["available_at"] + pd.Timedelta("30min")) for t in tables]
    assert not leakage.audit_availability(shifted, panel, provenance, sources.MAX_AGE).ok, "a value half an hour early is found"
    assert panel.loc["2018-03-01":, "utxo_count"].isna().all(), "a chart that ends in January 2018 is not extended"


# --- features -------------------------------------------------------------------------------------------------------------


def test_features_cover_the_panel_and_are_finite(panel):
    made = build_features(panel.iloc[:100_000])
    assert made.shape == (len(panel.iloc[:100_000]), len(registry)) and (made.dtypes == "float32").all()
    assert not np.isinf(made.to_numpy()).any()


def test_features_pass_the_audit_on_the_real_panel(panel):
    report = leakage.audit(build_features, panel).raise_if_leaky()
    assert report.tested["cuts"] >= 32 and report.tested["runs that raised"] == 0
    assert report.tested["of the whole frame"] <= 8 and report.tested["runs"] < 300, "work is bounded"


def _another_future(panel: pd.DataFrame, cut: int) -> pd.DataFrame:
    "The panel with all values from row `cut` on resampled and scaled, some of them missing."
    rng, rows = np.random.default_rng(cut), len(panel) - cut
    other = panel.copy()
    for name in panel.columns[:-2]:
        values = rng.choice(panel[name].dropna().to_numpy(), rows) * rng.lognormal(0, .2, rows)
        other.iloc[cut:, other.columns.get_loc(name)] = np.where(rng.random(rows) < .02, np.nan, values)
    for name, share in (("is_filled", .3), ("is_splice", .0001)):
        other.iloc[cut:, other.columns.get_loc(name)] = rng.random(rows) < share
    return other


def test_features_do_not_change_when_only_the_future_does(panel):
    base, moved = build_features(panel), pd.Series(False, index=list(registry))
    splice = int(np.flatnonzero(panel["is_splice"])[0])
    for cut in (20_000, splice, splice + 1, 90_000):
        made = build_features(_another_future(panel, cut))
        differs = ~((made == base) | (made.isna() & base.isna()))
        early = differs.iloc[:cut].any()
        assert not early.any(), f"cut {panel.index[cut]}: {early.index[early].tolist()} changed before it"
        moved |= (differs & made.notna() & base.notna()).iloc[cut:].any()
    clock = {name for name, f in registry.items() if f.group == "time"}
    assert set(moved.index[~moved]) == clock, "every feature except those of the clock depends on the panel"


def test_every_feature_has_values(panel):
    made = build_features(panel)
    assert {f.group for f in registry.values()} == set(ALL) and len(registry) >= 55
    assert made.notna().any().all(), made.columns[~made.notna().any()].tolist()
    late = made.loc["2019-06-01":].notna().mean()
    rare = {n for n in late.index[late < .95] if "utxo_count" not in registry[n].inputs}
    assert not rare, f"missing in over 5 % of the rows since 2019: {rare}"


# --- the run --------------------------------------------------------------------------------------------------------------


def test_the_run_is_within_its_memory_and_passes_every_audit(run):
    made, got = run
    assert made.peak < 2 * 2**30, made.peak
    assert made.stderr == "" and set(got["audits"]) == {"features", "labels", "disguise", "folds", "availability"}
    assert all(a["ok"] for a in got["audits"].values()) and (made.out / "report.html").exists()


def _same_means(ours: dict, theirs: dict, models: list[str]):
    "Compare means, origins and windows of two `scores.json` for some models."
    for table, keys in (("summary", ("model", "score")), ("by_year", ("model", "year", "score"))):
        one, other = ({tuple(r[k] for k in keys): r for r in x[table] if r["model"] in models} for x in (ours, theirs))
        assert set(one) == set(other) and len(one) >= 9 * len(models)
        for key, r in other.items():
            assert np.isclose(one[key]["mean"], r["mean"], rtol=1e-6), (table, key)
            assert (one[key]["n_origins"], one[key]["n_windows"]) == (r["n_origins"], r["n_windows"]), (table, key)


def _same_differences(ours: dict, theirs: dict, models: list[str]):
    "Compare differences to the reference, and p-values before Holm's adjustment, which depends on all models of a run."
    tables = ([r for r in x["comparison"] if r["model"] in models] for x in (ours, theirs))
    one, other = ({(r["model"], r["score"]): (r["diff"], r["p"]) for r in rows} for rows in tables)
    assert set(one) == set(other) and len(one) == 8 * (len(models) - 1)
    for key, pair in other.items(): assert np.allclose(one[key], pair, rtol=1e-6, atol=1e-9), key


def test_a_rerun_gives_the_committed_scores(run):
    got, there = run[1], read_result("real")
    assert all(got[k] == there[k] for k in ("origins", "begin", "end", "folds"))
    ours, theirs = flatten_keys(got["config"]), flatten_keys(there["config"])
    shared = (ours.keys() & theirs.keys()) - {"models", "seeds"}
    assert all(ours[k] == theirs[k] for k in shared) and len(shared) > 40, "both have the same settings"
    _same_means(got, there, BASELINES)
    _same_differences(got, there, BASELINES)


def test_a_rerun_gives_the_committed_predictions(run):
    got, there = pd.read_parquet(run[0].out / "predictions.parquet"), pd.read_parquet(RESULTS / "real.parquet")
    order = ["fold", "model", "seed", "time"]
    there = there[there["model"].isin(BASELINES)].sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(got.sort_values(order, ignore_index=True), there, rtol=1e-9, atol=1e-12, check_dtype=False)


def test_committed_scores_are_those_of_the_committed_predictions(panel):
    # Of all models, also of those that take long to train.
    there, made = read_result("real"), pd.read_parquet(RESULTS / "real.parquet")
    known = {k: v for k, v in there["config"].items() if k not in ("model", "train")}  # the network's settings change no score
    scored = score_run(EvaluateConfig(**known), made, make_labels(panel["close"]))
    assert set(made["model"]) == set(known["models"]) >= set(BASELINES) and scored["origins"] == there["origins"]
    _same_means(scored, there, list(known["models"]))
    _same_differences(scored, there, list(known["models"]))
    verdicts = [{(r["model"], r["score"]): r["verdict"] for r in x["comparison"]} for x in (scored, there)]
    assert verdicts[0] == verdicts[1]


YARDSTICKS = {  # computed by an independent script on the same task, origins to 2024-09-30
    "climatology": dict(log_loss=1.002, pinball10=.0675, pinball90=.0769, coverage=.83),
    "climatology_4y": dict(log_loss=.989, pinball10=.0648, pinball90=.0765),
    "persistence": dict(rmse_sigma=.283, rmse_log_sigma=.377, qlike=.410),
    "ewma": dict(rmse_sigma=.273, rmse_log_sigma=.364, qlike=.391),
    "log_har": dict(rmse_sigma=.238, rmse_log_sigma=.336, qlike=.254),
}


@pytest.fixture(scope="module")
def until_september(run, panel):
    "Mean scores of the run's predictions over the yardsticks' origins."
    made = pd.read_parquet(run[0].out / "predictions.parquet")
    made = made[(made["time"] >= "2018-01-01") & (made["time"] <= "2024-09-30")]
    table = scores.summarise(scores.loss_table(made, make_labels(panel["close"])), n_boot=100)
    assert set(table.loc[table["score"] == "log_loss", "n_origins"]) == {2465}
    return table.set_index(["model", "score"])["mean"]


@pytest.mark.parametrize("model", YARDSTICKS)
def test_yardsticks_within_two_percent(until_september, model):
    for score, value in YARDSTICKS[model].items():
        assert abs(until_september[model, score] / value - 1) < .02, (model, score, until_september[model, score], value)


def test_committed_results_are_of_these_files(panel):
    there = read_result("real")
    assert there["config"]["models"][:len(BASELINES)] == BASELINES and there["provenance"]["rows"] == len(panel)
    assert all(Path(f[0]).name in there["provenance"]["source"] for f in FILES)
    assert re.fullmatch(r"[0-9a-f]{12}", there["provenance"]["commit"]), "the results come from committed code"


def test_the_ensemble_of_the_committed_run_is_recomputed(panel, data_dir, tmp_path):
    coins = data_dir.parent / "coins"
    if not coins.is_dir(): pytest.skip("no other coins: put their files into ../shared/coins, next to the checkout")
    models = ["log_har", "har_exp", "har_daily", "har_ensemble"]
    made = cp.evaluate(panel, models, tmp_path / "run", assets=cp.load_panels(coins), first_test="2024-01-01").predictions
    known = pd.read_parquet(RESULTS / "real.parquet")
    known = known[(known["time"] >= pd.Timestamp("2024-01-01", tz="UTC")) & known["model"].isin(models)]
    both = known.merge(made, on=["time", "model"], suffixes=("", "_made"), validate="1:1")
    assert len(both) == len(known) == len(made)
    for column in FORECAST_COLUMNS: np.testing.assert_allclose(both[f"{column}_made"], both[column], rtol=1e-9)
