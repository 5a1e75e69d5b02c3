"""When should the network's head be enabled? Rules compared on built-in markets with signal and without.

  python benchmarks/anchoring.py --out results/anchoring.json        12 seeds x 2 markets x 2 folds, about a quarter of an hour

A rule chooses the validation spans (the newest, or three), the forecast (the network's, or its mean with the baseline's), and the
level of the two-sided test. Its score is the loss on the test year minus the baseline's, 0 where the head is not enabled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core; numpy reads this when it is imported

import pandas as pd  # noqa: E402
import torch  # noqa: E402

from cryptopredict.baselines import origins  # noqa: E402
from cryptopredict.features import build_features  # noqa: E402
from cryptopredict.labels import HEADS, make_labels  # noqa: E402
from cryptopredict.network import Network, choice_folds, choose_climatologies, combine, head_evidence  # noqa: E402
from cryptopredict.protocol import EvaluateConfig, make_folds  # noqa: E402
from cryptopredict.simulate import simulate_market  # noqa: E402
from cryptopredict.storage import code_commit, write_atomic  # noqa: E402
from cryptopredict.tbptt_trainer import best_epoch, train  # noqa: E402

SHARES, LEVELS = (.5, 1.), (.1, .2)
OVERLAPS = dict(direction=90, band=90, volatility=30)


def forecasts(model, run, inputs, panel, features, rows) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Forecasts of the network and of its baselines at `rows`."""
    return model.network_forecast(run.model, inputs, panel, features, rows), inputs.baselines.forecast(panel, rows)


def evidence(pairs, labels, share: float) -> dict:
    """`head_evidence` for the combined forecasts of all pairs (network, baseline)."""
    mixed = pd.concat([combine(baseline, ours, list(HEADS), share) for ours, baseline in pairs])
    return head_evidence(mixed, pd.concat([baseline for _, baseline in pairs]), labels, OVERLAPS)


def one_fold(model, panel, features, labels, fold, folder: Path) -> dict:
    """Evidence from the validation spans and the test year of one fold, by share of the network."""
    folds = choice_folds(labels, fold, 3)
    years = {head: chosen["years"] for head, chosen in choose_climatologies(panel, labels, folds).items()}
    trials = [model.trial(panel, features, labels, f, years, 0, folder / f"choice-{k}") for k, f in enumerate(folds)]
    best, pairs = best_epoch(*(run.out for run, _ in trials)), []
    if not best: return dict(best_epoch=0)
    for f, (run, inputs) in zip(folds, trials):
        run.at_epoch(best)
        pairs.append(forecasts(model, run, inputs, panel, features, origins(panel.index, f.valid)))
    inputs = model.with_climatologies(panel, labels, fold, "refit", years, *model.tensors(panel, features, labels, fold, "refit"))
    refit = train(model.train_config(inputs.data, 0), inputs.data, folder / "refit", inputs.start, until=best)
    test = [forecasts(model, refit, inputs, panel, features, origins(panel.index, fold.test))]
    parts = dict(newest=pairs[-1:], all=pairs, test=test)
    seen = {f"{name} {share}": evidence(pairs, labels, share) for (name, pairs), share in product(parts.items(), SHARES)}
    return dict(best_epoch=best, **seen)


def one_market(job: tuple[bool, int]) -> list[dict]:
    """Records of the third and sixth fold of one market of eleven years."""
    null, seed = job
    torch.set_num_threads(1)
    panel, _ = simulate_market(24 * 365 * 11, seed, null=null)
    features, labels = build_features(panel), make_labels(panel["close"])
    folds, records = make_folds(EvaluateConfig(models=("mamba2",)), labels), []
    for k in (2, 5):
        with tempfile.TemporaryDirectory() as folder:
            record = one_fold(Network(folder=folder), panel, features, labels, folds[k], Path(folder))
        records.append(dict(null=null, seed=seed, fold=k, **record))
    return records


def evaluate_rule(records: list[dict], spans: str, share: float, level: float, head: str) -> dict:
    """How often a rule enables a head (`left`), and how that changes the test loss: mean and worst over all folds."""
    gains, left = [], 0
    for r in records:
        seen = r.get(f"{spans} {share}", {}).get(head, dict(difference=0., p=1.))
        enabled = seen["difference"] < 0 and seen["p"] < level
        left += enabled
        gains.append(r[f"test {share}"][head]["difference"] if enabled else 0.)
    return dict(spans=spans, share=share, level=level, head=head, folds=len(records), left=left,
                mean=sum(gains) / len(gains), worst=max(gains))


def main() -> int:
    """Simulate and train the markets in parallel, then evaluate every rule."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="JSON report")
    p.add_argument("--seeds", type=int, default=12, help="number of markets of each kind, with and without signal")
    p.add_argument("--workers", type=int, default=2, help="number of processes")
    args = p.parse_args()
    with ProcessPoolExecutor(args.workers) as pool:
        made = list(pool.map(one_market, [(null, seed) for seed in range(args.seeds) for null in (False, True)]))
    records = [r for market in made for r in market]
    rules = [dict(market="no signal" if null else "signal", **evaluate_rule([r for r in records if r["null"] == null], *rule))
             for null in (False, True) for rule in product(("newest", "all"), SHARES, LEVELS, HEADS)]
    report = dict(seeds=args.seeds, commit=code_commit(), date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
                  torch=str(torch.__version__), rules=rules, records=records)
    write_atomic(args.out, json.dumps(report, indent=1))
    print(pd.DataFrame(rules).pivot(index=["spans", "share", "level"], columns=["head", "market"],
                                    values=["left", "mean", "worst"]).round(4).to_string())
    return 0


if __name__ == "__main__": sys.exit(main())
