"""What pooling and averaging bring, on Bitcoin and on every other coin: python benchmarks/coins.py [DATA COINS OUT.json].

Evaluates the baselines of volatility on Bitcoin and all coins (one walk-forward, every coin forecast), then the pooled models on
Bitcoin alone. Writes `results/coins.json`: `by_asset` as in `scores.json`; `reproduction`, each model against log-HAR on daily
origins 2018-01-01 to 2024-09-30; `alone`, the same without other coins; `seconds` by model. Needs the source files (default
`../shared/data` and `../shared/coins`). Configurations that are new are added to the ledger.
"""
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

import cryptopredict as cp
from cryptopredict.scores import compare, loss_table
from cryptopredict.storage import code_commit, write_atomic

ROOT = Path(__file__).resolve().parents[1]
MODELS = ["climatology", "climatology_4y", "persistence", "ewma", "log_har", "har_exp", "har_daily", "climatology_pooled",
          "pooled_ridge", "har_ensemble", "garch", "gjr_garch", "linear", "lightgbm"]
SIGMA_MODELS = ["climatology_4y", "log_har", "har_exp", "har_daily", "climatology_pooled", "pooled_ridge", "har_ensemble"]
END = pd.Timestamp("2024-09-30", tz="UTC")


def evaluate(out: Path, panel: pd.DataFrame, models: list[str], **more) -> tuple[cp.Evaluation, dict[str, float]]:
    "A finished walk-forward, and the seconds that each model took in its folds."
    seconds: dict[str, float] = {}
    last = [time.perf_counter(), ""]

    def on_part(done, total, what):
        now = time.perf_counter()
        if last[1]: seconds[last[1]] = seconds.get(last[1], 0.) + now - last[0]
        last[:] = [now, getattr(what, "model", "")]
    begin = time.perf_counter()
    run = cp.evaluate(panel, models, out, first_test="2018-01-01", on_part=on_part, **more)
    return run, {**{k: round(v, 1) for k, v in seconds.items()}, "whole run": round(time.perf_counter() - begin, 1)}


def against_log_har(run: cp.Evaluation) -> list[dict]:
    "Each model against log-HAR up to `END`: relative differences with intervals, and the number of years in which it is better."
    made = run.predictions[(run.predictions["asset"] == "BTC") & (run.predictions["time"] <= END)]
    labels = run.realised[run.realised["asset"] == "BTC"].set_index("time")
    losses = loss_table(made, labels)
    table = compare(losses, "log_har", ["se_log_sigma", "qlike"])
    rows = []
    for model, part in table.groupby("model", sort=False):
        row: dict = dict(model=model, n_origins=int(part["n_origins"].iloc[0]), n_windows=int(part["n_windows"].iloc[0]))
        for r in part.itertuples():
            loss = "se_log_sigma" if r.score == "rmse_log_sigma" else r.score
            yearly = losses.groupby([losses["time"].dt.year, "model"])[loss].mean().unstack()
            row[r.score] = dict(relative=round(r.relative, 5), lo=round(r.rel_lo, 5), hi=round(r.rel_hi, 5),
                                years_better=int((yearly[model] < yearly["log_har"]).sum()), years=len(yearly))
        rows.append(row)
    mean = losses[losses["model"] == "log_har"][["se_log_sigma", "qlike"]].mean()
    rmse, qlike = np.sqrt(mean["se_log_sigma"]), mean["qlike"]
    return [dict(model="log_har", rmse_log_sigma=round(float(rmse), 5), qlike=round(float(qlike), 5)), *rows]


if __name__ == "__main__":
    usual = ROOT.parent / "shared" / "data", ROOT.parent / "shared" / "coins", ROOT / "results" / "coins.json"
    data, coins, out = map(Path, (*sys.argv[1:4], *usual[len(sys.argv) - 1:]))
    panel, assets = cp.load_panel(data), cp.load_panels(coins)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        together, seconds = evaluate(place / "together", panel, MODELS, assets=assets)
        every, seconds_every = evaluate(place / "every", panel, SIGMA_MODELS, assets=assets, targets=["all"])
        alone, seconds_alone = evaluate(place / "alone", panel, SIGMA_MODELS)
        result = dict(commit=code_commit(), data_sha256=together.record["provenance"]["data_sha256"],
                      assets=every.record["assets"], by_asset=every.record["by_asset"],
                      reproduction=against_log_har(together), alone=against_log_har(alone),
                      seconds=dict(all_models=seconds, every_coin=seconds_every, alone=seconds_alone))
        rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.6g}"))
        write_atomic(out, json.dumps(rounded, indent=1) + "\n")
