"The commands, examples and figures of README agree with the code and the committed results."
import re

import numpy as np
import torch
from helpers import ROOT, read_result

from cryptopredict.ledger import tried as count_tried

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT = " ".join(README.split())
REAL = read_result("real")
MEAN = {(r["model"], r["score"]): r["mean"] for r in REAL["summary"]}


def blocks(language: str) -> list[str]: return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_readme_is_short(): assert len(README.splitlines()) <= 165


def test_quoted_scores_are_those_of_the_committed_run():
    network, short = re.search(r"direction is (\d\.\d+); that of a climatology of the last four years is (\d.\d+)", TEXT).groups()
    har, climatology = re.search(r"error of log volatility is (\d\.\d+), climatology's (\d\.\d+)", TEXT).groups()
    quoted = {("mamba2", "log_loss"): network, ("climatology_4y", "log_loss"): short,
              ("log_har", "rmse_log_sigma"): har, ("climatology", "rmse_log_sigma"): climatology}
    assert {key: f"{MEAN[key]:.3f}" for key in quoted} == quoted


def test_quoted_claims_are_those_of_the_committed_run():
    claims = {row["score"]: row for row in REAL["claims"]}
    pattern = (r"is (\S+) % better than log-HAR in it \(90 % interval (\S+) to (\S+)\) and (\S+) % in QLIKE \((\S+) to (\S+)\)\. "
               r"It was chosen on this span, on which (\d+) configurations have been scored")
    *quoted, tried = re.search(pattern, TEXT).groups()
    keys = [(score, key) for score in ("rmse_log_sigma", "qlike") for key in ("relative", "rel_hi", "rel_lo")]
    figures = [f"{-100 * claims[score][key]:.1f}" for score, key in keys]
    assert quoted == figures and int(tried) == count_tried(ROOT / "results" / "ledger.jsonl")


def test_stated_findings_follow_from_the_comparison():
    better = {(r["model"], r["score"]) for r in REAL["comparison"] if r["verdict"] == "better"}
    assert ("log_har", "rmse_log_sigma") in better
    assert all(score.startswith(("rmse", "qlike")) for _, score in better), "README: no model is better on direction or band"
    folds = {r["fold"]: r["heads"] for r in REAL["training"] if r["fold"] != "newest"}
    assert all(set(heads) <= {"direction"} for heads in folds.values()), "README: the band is a climatology, volatility log-HAR's"
    windows = {r["n_windows"] for r in REAL["summary"] if r["score"] == "log_loss"}
    assert windows == {27} and "27 windows" in TEXT
    simple = ("climatology", "climatology_4y", "log_har", "har_ensemble", "mamba2")
    half = [(r["hi"] - r["lo"]) / 2 for r in REAL["summary"] if r["score"] == "log_loss" and r["model"] in simple]
    assert all(0.08 < h < 0.14 for h in half), "README: intervals of the log loss are about +-0.1"
    origins = next(r["n_origins"] for r in REAL["summary"] if (r["model"], r["score"]) == ("mamba2", "coverage"))
    assert f"{origins:,} days from 2018 to 2024" in TEXT


def test_forest_figures_are_those_of_the_labels_notebook():
    text = (ROOT / "nbs" / "02_labels.ipynb").read_text(encoding="utf-8")
    shown = re.search(r'"text": \[\s*"(\d+)%",\s*"(\d+)%",\s*"(\d+)%",\s*"(\d+)%"', text)
    assert shown and "real data" in text
    shuffled, past, purged, up = shown.groups()
    assert f"{shuffled} % of cases when rows are split at random, in {past} % when it learns from the past alone" in TEXT
    assert f"in {purged} % when the past is also purged" in TEXT
    assert f'"up" is right in {up} %' in TEXT


def test_quoted_gpu_memory_is_that_measured():
    peak = {(r["preset"], r["tbptt_len"]): r["peak_allocated"] / 1e9 for r in read_result("vram")["sweep"]}
    assert f"train in {peak['baseline', 1024]:.1f} GB and {peak['mhsa', 512]:.1f} GB" in TEXT


def test_picture_and_links_exist():
    assert all((ROOT / target).exists() for target in re.findall(r"\]\(([^)h][^)]*)\)", README))
    assert (ROOT / "results" / "forecasts.png").stat().st_size < 200_000
    spine = [f"0{k}_" for k in range(7)]
    linked = re.findall(r"\]\(nbs/(\w+)\.ipynb\)", README.split("## The chapters")[1])
    assert [name[:3] for name in linked] == spine


def test_commands_exist():
    from cryptopredict.cli import COMMANDS
    named = set(re.findall(r"(?<!import )(?<!from )cryptopredict ([a-z]+)", README)) | {"fetch", "plan"}
    assert named == set(COMMANDS)


def test_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines, _, own, _ = blocks("python")
    made, brief = {}, "run = cp.evaluate(panel, n_boot=100, "
    lines = lines.replace('cp.load_panel("data")', "cp.simulate_market(24 * 365 * 5, seed=0)[0]")
    exec(lines.replace("run = cp.evaluate(panel, ", brief), made)
    assert {"climatology_4y", "log_har"} == set(made["run"].scores["model"]) == set(made["run"].predictions["model"])
    assert "Climatology" in (tmp_path / "runs" / "a" / "report.html").read_text(encoding="utf-8").title()
    exec(own.replace("run = cp.evaluate(panel, ", brief), made)
    assert set(made["run"].scores["model"]) == {"climatology_4y", "LastYear"}
    forecasts = made["run"].predictions.query("model == 'LastYear'")
    assert (forecasts[["p_down", "p_flat", "p_up"]].sum(axis=1) - 1).abs().max() < 1e-12
    assert forecasts["p10"].le(forecasts["p90"]).all()


def test_the_inventory_example_runs(inputs):
    import cryptopredict as cp
    made = {"cp": cp}
    exec(blocks("python")[1].replace('"data"', repr(str(inputs / "good"))).replace("cp.inventory", "table = cp.inventory"), made)
    assert len(made["table"]) >= 1


def test_the_layer_example_runs():
    stream = [torch.randn(1, n, 256) for n in (3, 5)]
    made = {"stream": stream, "loss": lambda y: y.square().mean()}
    exec(blocks("python")[3], made)
    assert made["layer"].in_proj.weight.grad.abs().sum() > 0
    with torch.no_grad(): whole = made["layer"](torch.cat(stream, 1))[1]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(made["state"], whole))


def test_the_climatology_of_the_picture_is_a_step_function_of_the_year():
    import pandas as pd
    made = pd.read_parquet(ROOT / "results" / "real.parquet").query("model == 'har_ensemble'")
    band = made.groupby(["fold", "time"])[["p10", "p90"]].mean()
    spread = band.groupby("fold").agg(lambda v: np.ptp(v.to_numpy()))
    assert spread.max(axis=None) < 1e-12, "README: the default's band is that of a climatology"
