"The committed measurements are within the bounds that README and notebooks promise."
import json
from itertools import product
from statistics import median

from helpers import read_result


def test_memory_of_the_exact_gradient_is_flat_in_history():
    gpu, cpu = read_result("exact"), read_result("exact_cpu")
    assert {(s["preset"], s["backend"]) for s in gpu["sweeps"]} == set(product(("baseline", "mhsa"), ("mamba_ssm", "torch")))
    for sweep in gpu["sweeps"]:
        peaks = [r["peak_allocated"] for r in sweep["records"]]
        assert sweep["records"][-1]["steps"] == 2**18 and max(peaks) <= 1.002 * min(peaks)
    ratios = [r["ratio"]["median"] for report in (gpu, cpu) for s in report["sweeps"] for r in s["records"] if "ratio" in r]
    assert len(ratios) >= 4 and max(ratios) <= 1.6, "time per token compared with truncated"


def test_speed_and_memory_on_two_cores():
    speed = read_result("speed")
    assert speed["scan"]["ratio"]["median"] >= 20, "compared with a loop over time"
    assert speed["training"]["tokens_per_s"]["median"] >= 25_000 and speed["training"]["parameters"] >= 100_000
    assert min(v["ratio"]["median"] for v in speed["plain"].values() if isinstance(v, dict)) >= 1.4, "compared with a plain scan"
    assert all(speed["step"]["baseline"][f"threads_{n}"]["after_history"]["median"] < 10 for n in (1, 2)), "milliseconds"
    peaks = list(speed["memory"].values())
    assert len(peaks) >= 4 and max(peaks) < 1.02 * min(peaks)


def test_truncation_costs_little_beyond_the_decay_rates():
    cost = read_result("truncation")
    rows = [r for r in cost["results"] if r["model"] == "mamba2" and r["epochs"] == 4]
    at = cost["lengths"].index(256)
    assert len(rows) >= 3 and all(r["cosine"]["all"][at] > .99 for r in rows)
    assert .8 < median(r["cosine"]["decay and step size"][at] for r in rows) < .95


def test_a_checkpoint_costs_little_at_the_preset_setting():
    usual = next(r for r in read_result("checkpoints")["tiny"] if r["save_every"] == 500)
    assert usual["share"]["median"] < .02 and usual["bytes"] < 2e6


def test_leaks_score_better_than_honest_features():
    paid = read_result("leaks")
    loss = {r["name"]: r["log_loss"] for r in paid["leaks"] if r["target"] == "direction"}
    assert paid["honest"]["log_loss"] > paid["honest"]["climatology_log_loss"] and len(paid["leaks"]) >= 28
    assert max(loss["shuffled split"], loss["calibrated on the test"]) < .7
    assert .7 < loss["Fourier low-pass"] < paid["honest"]["log_loss"]


def test_gpu_figures_name_device_versions_and_commit():
    for name in ("vram", "exact", "checkpoints_gpu", "kills_gpu"):
        text = json.dumps(read_result(name))
        assert all(word in text for word in ("H100", "torch", "commit")), name


def test_the_ensemble_is_three_percent_below_log_har():
    coins = read_result("coins")
    for part in ("reproduction", "alone"):
        ensemble = next(row for row in coins[part] if row["model"] == "har_ensemble")
        assert max(ensemble[score]["relative"] for score in ("rmse_log_sigma", "qlike")) < -.03, part
        assert ensemble["rmse_log_sigma"]["hi"] < 0 and ensemble["n_origins"] == 2465
    log_har = coins["reproduction"][0]
    assert round(log_har["rmse_log_sigma"], 3) == .337 and round(log_har["qlike"], 3) == .255
    others = [r for r in coins["by_asset"] if r["model"] == "har_ensemble" and r["asset"] != "BTC"]
    better = {s: sum(r["relative"] < 0 for r in others if r["score"] == s) for s in ("rmse_log_sigma", "qlike")}
    assert len({r["asset"] for r in others}) == 20 and better["rmse_log_sigma"] >= 15 and better["qlike"] >= 17


def test_baselines_of_many_coins_take_less_than_three_minutes():
    seconds = read_result("coins")["seconds"]["all_models"]
    assert seconds["whole run"] < 180 and seconds["pooled_ridge"] < 60


def test_pooling_halves_the_distance_to_the_truth_of_a_young_coin():
    rows = read_result("learning")["rows"]
    gap = lambda **wanted: median(r["gap"] for r in rows if all(r[k] == v for k, v in wanted.items()))
    young = dict(model="pooled_ridge", asset="young coin", years=6)
    assert gap(**young, coins=15) < .65 * gap(**young | dict(model="log_har"), coins=15)
    assert gap(model="log_har", asset="Bitcoin", years=6, coins=1) < gap(model="log_har", asset="Bitcoin", years=2, coins=1)
