"""How far baselines stay behind the truth in simulated worlds of coins: python benchmarks/learning.py [OUT.json].

Worlds differ in the seed. Each model is fitted on the first years of a world and forecasts the volatility of the year that
follows, for Bitcoin, which has all these years, and for a young coin, which has 400 days of them. It learns from that coin and
up to 14 others. `gap` is its RMSE of log sigma minus that of the true conditional mean, `gap_qlike` the same for QLIKE. Takes
about ten minutes on one core.
"""
import json
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from cryptopredict.baselines import LogHAR, origins
from cryptopredict.har import DailyHAR, ExponentialHAR
from cryptopredict.labels import make_labels
from cryptopredict.leakage import asset_fold, stack_assets, walk_forward
from cryptopredict.pooled import HAREnsemble, PooledRidge
from cryptopredict.scores import sigma_losses
from cryptopredict.simulate import simulate_market
from cryptopredict.storage import code_commit, write_atomic

ROOT = Path(__file__).resolve().parents[1]
YEARS, COINS, SEEDS = (2, 4, 6), (1, 3, 7, 15), 10
YOUNG = 400  # days of history of the young coin
ALONE = {"log_har": LogHAR, "har_exp": ExponentialHAR, "har_daily": DailyHAR}
POOLED = {"pooled_ridge": PooledRidge, "har_ensemble": HAREnsemble}


def losses(sigma: pd.Series, realised: pd.Series) -> tuple[float, float]:
    "RMSE of log sigma and mean QLIKE."
    found = sigma_losses(sigma.to_numpy(), realised.to_numpy())
    return float(np.sqrt(found["se_log_sigma"].mean())), float(found["qlike"].mean())


def world(seed: int, years: int) -> list[dict]:
    "One record per model, forecast coin and number of coins."
    panels, truths = simulate_market(24 * 365 * (years + 1), seed, assets=max(COINS))
    first = panels["BTC"].index[0] + pd.Timedelta(days=365 * years)
    begin = first - pd.Timedelta(days=YOUNG)
    young = next(name for name, panel in panels.items() if name != "BTC" and panel.index[0] <= begin)
    panels[young] = panels[young].loc[begin:]
    labels = {name: make_labels(panel["close"]) for name, panel in panels.items()}
    rows = []
    for target, count in product(("BTC", young), COINS):
        names = [target, *(name for name in panels if name != target)][:count]
        panel, y = (stack_assets({name: frames[name] for name in names}) for frames in (panels, labels))
        ends = y[["label_end", "sigma_end"]]
        fold = walk_forward(panel.index, ends, first_test=first, step="2YS", validation="180D")[0]
        fold_alone, alone = asset_fold(fold, panel.index, target), panels[target]
        at = origins(alone.index, fold_alone.test)  # the target comes first, so these are also positions in `panel`
        at = at[labels[target]["sigma"].iloc[at].notna()]
        realised = labels[target]["sigma"].iloc[at]
        best = losses(truths[target]["sigma"].reindex(realised.index), realised)
        own_labels = labels[target]
        made = {name: make().fit(alone, None, own_labels, fold_alone).predict(alone, None, at) for name, make in ALONE.items()}
        made |= {name: make().fit(panel, None, y, fold).predict(panel, None, at) for name, make in POOLED.items()}
        for name, forecast in made.items():
            rmse, qlike = losses(forecast["sigma"], realised)
            rows.append(dict(seed=seed, years=years, asset="young coin" if target == young else "Bitcoin", coins=count,
                             model=name, gap=rmse - best[0], gap_qlike=qlike - best[1]))
    return rows


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "results" / "learning.json"
    begin, rows = time.time(), []
    for years in YEARS:
        for seed in range(SEEDS): rows += world(seed, years)
        print(f"{years} years: {time.time() - begin:.0f} s", flush=True)
    rows = [{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    write_atomic(out, json.dumps(dict(commit=code_commit(), seeds=SEEDS, rows=rows)) + "\n")
