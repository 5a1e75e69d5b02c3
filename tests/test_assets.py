"A walk-forward over several coins: what is trained on, what is forecast, what is refused or reported by name."
import importlib.util
import json
import warnings

import numpy as np
import pandas as pd
import pytest
from helpers import call_cli

import cryptopredict as cp
from cryptopredict.leakage import audit_folds
from cryptopredict.ledger import read_ledger
from cryptopredict.protocol import EvaluateConfig, RunData, UserCode, model_settings
from cryptopredict.run_audits import audit_pooled, audit_user_code

SETTINGS = dict(horizon="20D", vol_window="7D", first_test="2017-09-01", step="120D", validation="60D", n_boot=100)
MODELS = ["climatology_4y", "log_har", "pooled_ridge", "har_ensemble"]


@pytest.fixture(scope="module")
def coins():
    "Four coins of the simulated world, 900 days; COIN02 begins inside the first test span, COIN03 ends before it."
    panels, _ = cp.simulate_market(24 * 900, seed=0, assets=4)
    panels["COIN02"] = panels["COIN02"].loc["2017-10-15":]
    panels["COIN03"] = panels["COIN03"].loc[:"2017-08-01"]
    return panels


@pytest.fixture(scope="module")
def run(coins, tmp_path_factory):
    return cp.evaluate(coins["BTC"], MODELS, tmp_path_factory.mktemp("coins") / "run", assets=coins, targets=["all"], **SETTINGS)


@pytest.fixture(scope="module")
def data(coins):
    return RunData(EvaluateConfig(**SETTINGS, models=tuple(MODELS), targets=("all",)), coins)


def test_no_row_enters_a_fold_before_its_own_label_has_ended(coins, data):
    panel, labels = data.stacked
    for fold, own in zip(data.pooled_folds, data.folds, strict=True):
        begin = coins["BTC"].index[own.test[0]]
        for column in ("label_end", "sigma_end"):
            refit = fold.of(column).refit
            assert (labels[column].iloc[refit] <= begin).all() and len(refit)
            left_out = np.setdiff1d(np.arange(len(panel)), refit)
            assert not (labels[column].iloc[left_out] <= begin).any()
    report = audit_folds(data.pooled_folds, labels[["label_end", "sigma_end"]])
    assert report.ok and not len(report.findings)


def test_bitcoin_has_the_same_folds_with_and_without_other_coins(coins, data):
    alone = RunData(data.config.model_copy(update=dict(targets=("BTC",))), {"BTC": coins["BTC"]})
    for k in range(len(data.folds)):
        for part in ("train", "valid", "refit"):
            assert np.array_equal(getattr(alone.folds[k], part), getattr(data.fold_of(k, "BTC"), part))
            assert np.array_equal(getattr(alone.pooled_folds[k], part), getattr(alone.folds[k], part))


def test_predictions_name_their_asset_and_those_of_single_models_ignore_others(coins, run, tmp_path):
    made = run.predictions
    assert made.columns[-1] == "asset" and set(made["asset"]) == {"BTC", "COIN01"}
    alone = cp.evaluate(coins["BTC"], MODELS, tmp_path / "alone", **SETTINGS).predictions
    for model in ("climatology_4y", "log_har"):
        one, other = (m[(m["model"] == model) & (m["asset"] == "BTC")].reset_index(drop=True) for m in (made, alone))
        pd.testing.assert_frame_equal(one, other)
    one, other = (m[(m["model"] == "pooled_ridge") & (m["asset"] == "BTC")]["sigma"].to_numpy() for m in (made, alone))
    assert not np.allclose(one, other)
    asked = cp.evaluate(coins["BTC"], MODELS, tmp_path / "asked", assets=coins, targets=["COIN01"], **SETTINGS)
    assert asked.asset == "COIN01" and set(asked.predictions["asset"]) == {"COIN01"}
    keys = ["time", "model"]
    both = asked.predictions.merge(made[made["asset"] == "COIN01"], on=keys, suffixes=("", "_all"), validate="1:1")
    assert len(both) == len(asked.predictions) and (both["sigma"] == both["sigma_all"]).all()


def test_coins_that_begin_or_end_inside_the_span_are_reported(run):
    table = pd.DataFrame(run.record["assets"]).set_index("asset")
    folds = len(run.record["folds"])
    assert table.loc["BTC", ["folds_trained", "folds_forecast"]].tolist() == [folds, folds]
    assert table.loc["COIN02", "folds_forecast"] == 0 and 0 < table.loc["COIN02", "folds_trained"] < folds
    assert table.loc["COIN03", "folds_forecast"] == 0 and table.loc["COIN03", "folds_trained"] == folds


def test_scores_of_every_asset_are_those_of_its_own_labels(coins, run):
    table = run.by_asset
    assert set(table["score"]) == {"log_loss", "pinball10", "pinball90", "rmse_log_sigma", "qlike"}
    y = cp.make_labels(coins["COIN01"]["close"], "20D", "7D")
    made = run.predictions.query("asset == 'COIN01' and model == 'har_ensemble'").set_index("time")["sigma"]
    realised = y["sigma"].reindex(made.index).dropna()
    error = np.sqrt((np.log(realised / made.loc[realised.index]) ** 2).mean())
    row = table.query("asset == 'COIN01' and model == 'har_ensemble' and score == 'rmse_log_sigma'").iloc[0]
    assert row["mean"] == pytest.approx(error, rel=1e-9) and row["reference"] == "log_har"
    other = table.query("asset == 'COIN01' and model == 'log_har' and score == 'rmse_log_sigma'").iloc[0]
    assert row["relative"] == pytest.approx(row["mean"] / other["mean"] - 1, rel=1e-6)


def test_claims_are_tested_on_the_reported_asset(run):
    claims = run.claims
    assert len(claims) == 5 and set(claims["default"]) == {"har_ensemble"} and claims["p_holm"].ge(claims["p"] - 1e-12).all()
    text = " ".join(run.findings())
    assert "Of 5 claims, har_ensemble" in text and "On other coins har_ensemble" in text
    assert "Claims" in (page := run.report().read_text()) and "COIN01" in page


def test_the_newest_forecast_covers_the_targets_that_have_bars(run):
    newest = run.newest
    assert set(newest["asset"]) == {"BTC", "COIN01"} and (newest["fold"] == -1).all() and newest["time"].nunique() == 1


def test_a_run_with_other_coins_is_another_run(coins, run):
    fewer = {name: panel for name, panel in coins.items() if name != "COIN03"}
    with pytest.raises(ValueError, match="assets"):
        cp.evaluate(coins["BTC"], MODELS, run.out, assets=fewer, targets=["all"], **SETTINGS)
    before = run.folder.scores.read_bytes()
    cp.evaluate(coins["BTC"], MODELS, run.out, assets=coins, targets=["all"], **SETTINGS)
    assert run.folder.scores.read_bytes() == before


@pytest.mark.parametrize("change, message", [
    (dict(targets=["ETH"]), "there is no asset 'ETH' .known: BTC, COIN01"),
    (dict(targets=["all", "BTC"]), "give all, or names"),
    (dict(assets={"BTC": 1.01}), "BTC with other prices than panel"),
    (dict(assets={"ETH": 1.}), "ETH: its closes are those of Bitcoin"),
    (dict(assets={"": 1.01}), "is not the name of an asset"),
    (dict(assets={"COIN01": None, "coin01": None}), "but for its case"),
    (dict(assets={"COIN01": None, "COIN09": None}), "COIN09: its panel is that of COIN01"),
    (dict(targets="COIN01"), "key 'targets' is str: must be a list"),
    (dict(assets=[1]), "give a dict of panels")])
def test_wrong_assets_are_refused_by_name(coins, tmp_path, change, message):
    panel = coins["BTC"]
    given = change.pop("assets", {"COIN01": None})
    prices = ["open", "high", "low", "close"]
    if isinstance(given, dict):
        given = {name: coins["COIN01"] if factor is None else panel.assign(**{c: factor * panel[c] for c in prices})
                 for name, factor in given.items()}
    with pytest.raises(ValueError, match=message):
        cp.evaluate(panel, ["log_har"], tmp_path / "run", assets=given, **SETTINGS | change)
    assert not (tmp_path / "run").exists()


def test_a_coin_of_one_row_is_reported_and_changes_nothing(coins, tmp_path):
    two = {"COIN01": coins["COIN01"]}
    one = {**two, "SHORT": coins["COIN01"].iloc[-1:]}
    made = [cp.evaluate(coins["BTC"], ["pooled_ridge"], tmp_path / str(k), assets=assets, **SETTINGS)
            for k, assets in enumerate((two, one))]
    pd.testing.assert_frame_equal(made[0].predictions, made[1].predictions)
    assert {r["asset"]: r["folds_trained"] for r in made[1].record["assets"]}["SHORT"] == 0


def test_the_ledger_counts_real_configurations_once(coins, tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    monkeypatch.setenv("CRYPTOPREDICT_LEDGER", str(path))
    cp.evaluate(coins["BTC"], ["log_har"], tmp_path / "simulated", **SETTINGS)
    assert not path.exists()
    real = coins["BTC"].drop(columns="supply")
    run = cp.evaluate(real, MODELS, tmp_path / "a", assets={"COIN01": coins["COIN01"]}, **SETTINGS)
    assert len(read_ledger(path)) == 4 and run.record["in_ledger"]
    assert any("4 configurations have been scored on real test spans" in sentence for sentence in run.findings())
    cp.evaluate(real, MODELS, tmp_path / "b", assets={"COIN01": coins["COIN01"]}, **SETTINGS)
    assert len(read_ledger(path)) == 4
    cp.evaluate(real, ["log_har", "har_ensemble"], tmp_path / "c", **SETTINGS)  # without COIN01 only the ensemble is another
    table = read_ledger(path)
    assert table["model"].tolist() == [*MODELS, "har_ensemble"] and table["scores"].map(len).min() == 9


def test_a_ledger_that_cannot_be_used_is_reported_before_anything_is_computed(coins, tmp_path, monkeypatch):
    real, path = coins["BTC"].drop(columns="supply"), tmp_path / "ledger.jsonl"
    monkeypatch.setenv("CRYPTOPREDICT_LEDGER", str(path))
    path.write_text('{"configuration": "x"')
    with pytest.raises(ValueError, match="line 1 is damaged"): cp.evaluate(real, ["log_har"], tmp_path / "a", **SETTINGS)
    assert not (tmp_path / "a").exists()
    path.unlink()

    def damage(done, total, what):  # while the run is going on
        path.write_text("{")
    with pytest.warns(UserWarning, match="start the same run again"):
        made = cp.evaluate(real, ["log_har"], tmp_path / "b", on_part=damage, **SETTINGS)
    assert len(made.scores)
    path.unlink()
    cp.evaluate(real, ["log_har"], tmp_path / "b", **SETTINGS)
    assert len(read_ledger(path)) == 1


def test_a_target_that_ended_is_scored_and_has_no_newest_forecast(coins, tmp_path):
    ended = {"COIN01": coins["COIN01"].iloc[:-24 * 40]}
    made = cp.evaluate(coins["BTC"], MODELS, tmp_path / "run", assets=ended, targets=["COIN01"], **SETTINGS)
    assert made.asset == "COIN01" and len(made.scores) and made.newest.empty
    assert "there is no bar of COIN01 at the last hour of Bitcoin" in (page := made.report().read_text())
    assert "Forecasts of COIN01" in page
    with pytest.raises(ValueError, match="no newest forecast of COIN01"): made.plot_newest()


def test_a_coin_without_ranges_is_named(coins, tmp_path):
    bare = {"COIN01": coins["COIN01"].drop(columns="high")}
    with pytest.raises(ValueError, match="COIN01: panel has no column 'high', or it is empty"):
        cp.evaluate(coins["BTC"], ["har_ensemble"], tmp_path / "run", assets=bare, **SETTINGS)


def test_features_that_a_coin_lacks_are_named_before_the_run(coins, tmp_path):
    bars = coins["COIN01"][["open", "high", "low", "close", "volume"]]
    with pytest.raises(ValueError, match="COIN01: panel has no"):
        cp.evaluate(coins["BTC"], ["linear"], tmp_path / "run", assets={"COIN01": bars}, targets=["all"], **SETTINGS)
    assert not (tmp_path / "run").exists()


def test_the_settings_of_a_model_hold_what_decides_its_result(data):
    single, pooled = (model_settings(name, data) for name in ("log_har", "har_ensemble"))
    assert "assets" not in single and pooled["assets"] == sorted(data.panels)
    assert single["horizon"] == "20D" and "seed" not in single and "n_boot" not in single


class Borrowed:
    "A user's pooled forecaster: the mean sigma of all coins, of matured rows, or of all rows if it cheats."
    pooled = True

    def __init__(self, cheats=False): self.cheats, self.name = cheats, "borrowed"

    def fit(self, panel, X, y, fold, seed=0):
        assert isinstance(panel.index, pd.MultiIndex) and X.index.equals(panel.index) and y.index.equals(panel.index)
        rows = slice(None) if self.cheats else fold.of("sigma_end").refit
        self.sigma = float(y["sigma"].iloc[rows].mean())
        return self

    def predict(self, panel, X, rows):
        forecast = dict(p_down=.3, p_flat=.3, p_up=.4, p10=-.3, p90=.3, sigma=self.sigma)
        return pd.DataFrame(forecast, index=panel.index[rows])


def test_a_users_pooled_forecaster_gets_all_coins_and_is_audited(coins, tmp_path):
    made = cp.evaluate(coins["BTC"], ["log_har", Borrowed()], tmp_path / "run", assets=coins, **SETTINGS)
    assert set(made.predictions["model"]) == {"log_har", "borrowed"} and made.record["audits"]["borrowed"]["ok"]
    with pytest.raises(cp.LeakageError, match="borrowed"):
        cp.evaluate(coins["BTC"], ["log_har", Borrowed(cheats=True)], tmp_path / "leaky", assets=coins, **SETTINGS)
    config = EvaluateConfig(**SETTINGS, models=("borrowed",))
    report = audit_user_code(coins["BTC"], config, UserCode({"borrowed": Borrowed(cheats=True)}, {}), assets=coins)["borrowed"]
    assert not report.ok and report.leaks["column"].str.contains("sigma").any()


def test_the_default_forecaster_passes_its_audit(coins):
    report = audit_pooled(coins["BTC"], EvaluateConfig(), {"COIN01": coins["COIN01"]})
    assert report.ok and report.tested["fitted parts"] > 20


def test_a_missing_package_leaves_out_its_models_with_one_line(coins, tmp_path, monkeypatch):
    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "arch" else usual(name, *a))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = cp.evaluate(coins["BTC"], ["log_har", "garch", "gjr_garch"], tmp_path / "run", **SETTINGS)
    lines = [str(w.message) for w in caught if "left out" in str(w.message)]
    assert lines == ["left out, because their packages are not installed: garch (arch), gjr_garch (arch); "
                     "pip install cryptopredict[baselines]"]
    assert made.models == ["log_har"] and made.record["left_out"] == dict(garch="arch", gjr_garch="arch")


def test_the_shell_learns_from_a_folder_of_coins(coins, tmp_path):
    folder = tmp_path / "coins"
    folder.mkdir()
    for name in ("BTC", "COIN01"):
        bars = coins[name][["open", "high", "low", "close", "volume"]].assign(ts=coins[name].index - pd.Timedelta("1h"))
        scale = 8000 / coins["BTC"]["close"].iloc[-1] if name == "BTC" else 1.
        bars[["open", "high", "low", "close"]] *= scale
        bars["volume"] = 10.
        bars[["ts", "open", "high", "low", "close", "volume"]].to_csv(folder / f"{name}_1h.csv", index=False)
    flags = [w for k, v in SETTINGS.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    words = ("--assets", "coins", "--models", *MODELS, "--targets", "all", *flags, "--out", "run")
    done = call_cli("evaluate", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "other coins, of coins:" in done.stdout and "pooled models learned from 2 coins" in done.stdout
    assert {r["asset"] for r in json.loads((tmp_path / "run" / "scores.json").read_text())["assets"]} == {"BTC", "COIN01"}
    (folder / "BTC_1h.csv").unlink()
    refused = call_cli("evaluate", "--assets", "coins", *flags, "--out", "other", cwd=tmp_path)
    assert refused.returncode == 2 and "holds no hourly bars of Bitcoin" in refused.stderr
    assert "must be a folder, or a number" in call_cli("evaluate", "--assets", "200", "--years", "3", cwd=tmp_path).stderr


@pytest.mark.parametrize("words", [("prepare",), ("train",), ("audit", "helpers:command")])
def test_commands_that_know_bitcoin_alone_refuse_other_assets(words, tmp_path):
    refused = call_cli(*words, "--assets", "3", "--years", "2", cwd=tmp_path)
    assert refused.returncode == 2 and "--assets" in refused.stderr and not any(tmp_path.iterdir())
