"The network finds the signal of the built-in market, and finds none in a market without signal."
import json

import numpy as np
import pytest
import torch

from cryptopredict.features import build_features
from cryptopredict.labels import make_labels
from cryptopredict.simulate import simulate_market
from cryptopredict.streams import fold_data
from cryptopredict.tbptt_trainer import train, train_preset

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
