"The network finds the signal of the built-in market and none in a market without signal; the forecaster and its choice."
import json
import os

import numpy as np
import pandas as pd
import pytest
import torch

from cryptopredict.features import build_features
from cryptopredict.labels import HEADS, make_labels
from cryptopredict.leakage import walk_forward
from cryptopredict.multitask import ModelConfig
from cryptopredict.network import Network, check_network, choice_folds, combine, read_choice
from cryptopredict.simulate import simulate_market
from cryptopredict.streams import fold_data
from cryptopredict.tbptt_trainer import TrainSettings, train, train_preset

YEAR, PURGE = 24 * 365, 24 * 91


def losses_before_and_after(seed: int, null: bool, out) -> tuple[dict, dict]:
    "Losses on three purged years: of the climatology that the heads start from, and after three epochs on seven years."
    panel, _ = simulate_market(10 * YEAR, seed=seed, null=null)
    features, labels = build_features(panel), make_labels(panel.close)
    fit, later = np.arange(24 * 90, 7 * YEAR), np.arange(7 * YEAR + PURGE, 10 * YEAR - PURGE)
    data, seen = fold_data(features, labels, fit, later), labels.iloc[fit]
    frequencies = torch.tensor(np.bincount(seen.direction.astype(int), minlength=3) / len(seen)).float()
    quantiles = torch.tensor(seen.r90.quantile([0.1, 0.5, 0.9]).to_numpy()).float()
    config = train_preset("tiny", data.x.shape[1], epochs=3)
    train(config, data, out, (frequencies, quantiles, float(seen.sigma.median())))
    lines = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    return lines[0], lines[-1]


@pytest.mark.parametrize("null", [False, True], ids=["built-in market", "market without signal"])
def test_the_network_learns_only_where_there_is_signal(null, tmp_path):
    torch.set_num_threads(1)
    pairs = [losses_before_and_after(seed, null, tmp_path / str(seed)) for seed in range(3)]
    direction = np.mean([after["cls"] - before["cls"] for before, after in pairs])
    volatility = np.mean([after["vol"] / before["vol"] for before, after in pairs])
    if null:
        assert direction > -0.03, f"log loss fell by {-direction:.3f} where nothing can be known"
    else:
        assert direction < -0.05 and volatility < 0.85, (direction, volatility)


# --- the forecaster ------------------------------------------------------------------------------------------------------

CLIMATOLOGIES = dict.fromkeys(("direction", "band"), dict(years=4))
CHOICE = dict(epochs=1, heads=["band"], climatologies=CLIMATOLOGIES)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "3", '{"epochs": 1}'])
def test_a_file_that_is_no_choice_is_damaged(tmp_path, text):
    (tmp_path / "choice.json").write_text(text)
    with pytest.raises(ValueError, match="choice.json is damaged"): read_choice(tmp_path / "choice.json", {})


@pytest.mark.parametrize("change", [
    dict(epochs=1.5), dict(epochs=-1), dict(epochs=True), dict(heads=["nope"]), dict(heads=3), dict(heads={}),
    dict(identity=3), dict(identity=None), dict(climatologies=dict(band=dict(years=4)))], ids=str)
def test_a_choice_with_an_impossible_value_is_damaged(tmp_path, change):
    (tmp_path / "choice.json").write_text(json.dumps(CHOICE | change))
    with pytest.raises(ValueError, match="choice.json is damaged"): read_choice(tmp_path / "choice.json", {})


def test_a_choice_of_another_training_is_refused(tmp_path):
    (tmp_path / "choice.json").write_text(json.dumps(dict(CHOICE, epochs=0, heads=[], identity=dict(horizon="20D"))))
    assert read_choice(tmp_path / "choice.json", dict(horizon="20D"))["heads"] == []
    with pytest.raises(ValueError, match="holds another run .horizon: 20D in the folder, 8D in this call."):
        read_choice(tmp_path / "choice.json", dict(horizon="8D"))


def test_a_combination_with_share_one_is_the_network():
    one = pd.DataFrame(dict(p_down=[.2], p_flat=.3, p_up=.5, p10=-.4, p90=.6, sigma=.4))
    two = pd.DataFrame(dict(p_down=[.4], p_flat=.3, p_up=.3, p10=-.2, p90=.2, sigma=.9))
    pd.testing.assert_frame_equal(combine(one, two, list(HEADS), 1.), two)


@pytest.fixture(scope="module")
def market():
    "Panel, features and labels of a built-in market."
    panel, _ = simulate_market(5 * YEAR, seed=1)
    return panel, build_features(panel), make_labels(panel.close)


def test_no_validation_pair_reaches_into_the_next_span(market):
    "No training label ends within the embargo before the validation span, no validation label after the test begins."
    panel, _, labels = market
    ends = labels[["label_end", "sigma_end"]]
    fold = walk_forward(panel.index, ends, first_test="2020-10-01", step="90D", validation="180D", embargo="5D")[0]
    pairs = choice_folds(labels, fold, 3)
    assert len(pairs) == 3 and pairs[-1] is fold
    for pair in pairs:
        assert labels.label_end.iloc[pair.train].max() <= panel.index[pair.valid[0]] - pd.Timedelta("5D")
        assert labels.label_end.iloc[pair.valid].max() <= panel.index[fold.test[0]]


def test_forecasts_use_no_feature_after_their_row(market, tmp_path):
    panel, features, labels = market
    torch.set_num_threads(1)
    fold = walk_forward(panel.index, labels[["label_end", "sigma_end"]], first_test="2019-01-01", step="365D")[0]
    network = Network(epochs=1, validation_spans=1, folder=tmp_path).fit(panel, features, labels, fold, seed=0)
    rows, torn = fold.test[:24 * 90], features.copy()
    torn.iloc[rows[-1] + 1:] = 3.
    network.heads = list(HEADS)  # whatever was chosen: the forecasts of the network itself are compared
    pd.testing.assert_frame_equal(network.predict(panel, torn, rows), network.predict(panel, features, rows))


def test_determinism_is_prepared_before_the_gpu_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    check_network(ModelConfig(), TrainSettings(deterministic=True))
    assert "CUBLAS_WORKSPACE_CONFIG" in os.environ
