"README's commands, examples and figures agree with the checkout."
import json
import re
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REAL = json.loads((ROOT / "results" / "real.json").read_text(encoding="utf-8"))
COLUMNS = ("log_loss", "pinball10", "pinball90", "coverage", "rmse_log_sigma", "qlike")


def test_findings_table_is_the_committed_result():
    means = {(r["model"], r["score"]): r["mean"] for r in REAL["summary"]}
    rows = re.findall(r"^\| (\w+) \| ([\d. |]+) \|$", README, re.M)
    assert [name for name, _ in rows] == REAL["config"]["models"]
    for name, cells in rows:
        for score, cell in zip(COLUMNS, cells.split(" | "), strict=True):
            digits = len(cell.split(".")[1])
            assert abs(float(cell) - means[name, score]) <= 0.51 * 10**-digits, (name, score, cell, means[name, score])


def test_findings_are_what_the_comparison_allows():
    better = {(r["model"], r["score"]) for r in REAL["comparison"] if r["verdict"] == "better"}
    assert ("log_har", "rmse_log_sigma") in better
    assert all(score.startswith(("rmse", "qlike")) for _, score in better), "README says: none better on direction or band"
    assert not any(model == "mamba2" and score.startswith("qlike") for model, score in better)
    folds = {r["fold"]: r["heads"] for r in REAL["training"] if r["fold"] != "newest"}
    assert {fold: heads for fold, heads in folds.items() if heads} == {"fold-00": ["direction"], "fold-05": ["direction"]}
    spans = {r["fold"]: len(r["spans"]) for r in REAL["training"] if r["training"].startswith("choice")}
    assert spans["fold-00"] == 1 and set(spans.values()) <= {1, 2, 3}
    windows = {r["n_windows"] for r in REAL["summary"] if r["score"] == "log_loss"}
    assert windows == {27} and "27 windows" in README
    spans = REAL["origins_by_label"]
    assert [spans[k]["end"][:10] for k in ("r90", "sigma")] == ["2024-10-03", "2024-12-02"]
    assert all(span["begin"].startswith("2018-01-01") for span in spans.values())
    half = [(r["hi"] - r["lo"]) / 2 for r in REAL["summary"] if r["score"] == "log_loss"]
    assert all(0.08 < h < 0.14 for h in half), "README says: log-loss intervals are about +-0.1"


def test_forest_figures_are_those_of_the_labels_notebook():
    text = (ROOT / "nbs" / "02_labels.ipynb").read_text(encoding="utf-8")
    shown = re.search(r'"text": \[\s*"(\d+)%",\s*"(\d+)%",\s*"(\d+)%"', text)
    assert shown and "real data" in text
    shuffled, purged, up = shown.groups()
    assert f"{shuffled} % on the direction" in README and f"and {purged} % when the split is purged" in README
    assert f'"up" scores {up} %' in README


def test_gpu_memory_is_what_was_measured():
    vram = json.loads((ROOT / "results" / "vram.json").read_text(encoding="utf-8"))
    peak = {(r["preset"], r["tbptt_len"]): r["peak_allocated"] / 1e9 for r in vram["sweep"]}
    text = " ".join(README.split())
    assert f"{peak['baseline', 1024]:.1f} GB (baseline, chunks of 1024 hours) and {peak['mhsa', 512]:.1f} GB (mhsa, 512)" in text
    assert vram["backend"].startswith("mamba_ssm") and "`mamba_ssm`'s kernels, the original" in text


def test_speed_is_what_was_measured():
    speed = json.loads((ROOT / "results" / "speed.json").read_text(encoding="utf-8"))
    ratio, tokens = speed["scan"]["ratio"]["median"], speed["training"]["tokens_per_s"]["median"]
    assert ratio >= 20 and tokens >= 25_000 and speed["training"]["parameters"] >= 100_000
    text = " ".join(README.split())
    assert f"is {ratio:.0f} times as fast" in text and f"{round(tokens, -3):,.0f} hours of streams" in text
    plain = [v["ratio"]["median"] for v in speed["plain"].values() if isinstance(v, dict)]
    assert min(plain) >= 1.4 and f"{min(plain):.1f} to {max(plain):.1f} times as fast as a plain chunked one" in text
    steps = {k: v["ratio"]["median"] for k, v in speed["plain_training"].items()}
    assert f"{steps['scan']:.2f} times as fast as with that plain scan" in text
    assert f"and {steps['mixer']:.2f} times as with a plain mixer" in text
    assert all(speed["step"]["baseline"][f"threads_{n}"]["after_history"]["median"] < 10 for n in (1, 2))  # milliseconds
    peaks = list(speed["memory"].values())
    assert len(peaks) >= 4 and max(peaks) < 1.02 * min(peaks)


def test_leak_figures_are_those_measured():
    paid = json.loads((ROOT / "results" / "leaks.json").read_text(encoding="utf-8"))
    loss = {r["name"]: r["log_loss"] for r in paid["leaks"] if r["target"] == "direction"}
    assert paid["honest"]["log_loss"] > paid["honest"]["climatology_log_loss"] and f"{len(paid['leaks'])} leaks" in README
    figures = [paid["honest"]["log_loss"], loss["shuffled split"], loss["Fourier low-pass"], loss["calibrated on the test"]]
    text = " ".join(README.split())
    for figure, words in zip(figures, ("falls from {:.2f}", "to {:.2f} when the split is shuffled", "to {:.2f} by a low-pass",
                                    "to {:.2f} by a calibrator"), strict=True):
        assert words.format(figure) in text, (words, figure)


def test_built_in_figures_are_those_of_the_default_run(default_run):
    scores = json.loads((default_run.out / "scores.json").read_text())
    mean = {r["model"]: r["mean"] for r in scores["summary"] if r["score"] == "log_loss"}
    quoted = re.search(r"log loss of ([\d.]+) \(climatology\)\s+to ([\d.]+); the\s+truth's is ([\d.]+)", README).groups()
    for name, figure in zip(("climatology", "mamba2", "truth"), quoted, strict=True):
        assert abs(mean[name] - float(figure)) < 0.006, (name, mean[name])  # training differs in the last digits between machines


def test_every_notebook_has_its_line():
    there = {p.stem for p in (ROOT / "nbs").glob("*.ipynb")}
    listed = set(re.findall(r"^\| \**(\d\d[a-z]?_\w+?)\** \| (?!to come)", README, re.M))
    assert listed == there


def test_commands_and_flags_exist():
    from cryptopredict.cli import COMMANDS

    named = set(re.findall(r"(?<!import )(?<!from )cryptopredict ([a-z]+)", README)) | {"fetch", "plan"}
    assert named == set(COMMANDS)
    assert (ROOT / "results" / "report.png").stat().st_size < 200_000


def test_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines, own = re.search(r"## In Python.*?```python\n(.*?)```.*?```python\n(.*?)```", README, re.S).groups()
    made, brief = {}, "n_boot=100, "
    exec(lines.replace("365 * 8", "365 * 5").replace("run = cp.evaluate(panel, ", f"run = cp.evaluate(panel, {brief}"), made)
    assert {"climatology_4y", "log_har"} == set(made["run"].scores["model"]) == set(made["run"].predictions["model"])
    assert "Climatology" in (tmp_path / "runs" / "a" / "report.html").read_text(encoding="utf-8").title()
    exec(own.replace("run = cp.evaluate(panel, ", f"run = cp.evaluate(panel, {brief}"), made)
    assert set(made["run"].scores["model"]) == {"climatology_4y", "LastYear"}
    known = made["run"].predictions.query("model == 'LastYear'")
    assert (known[["p_down", "p_flat", "p_up"]].sum(axis=1) - 1).abs().max() < 1e-12 and known["p10"].le(known["p90"]).all()


def test_the_layer_example_runs(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(from cryptopredict import Mamba2.*?)```", README, re.S).group(1)
    stream = [torch.randn(1, n, 256) for n in (3, 5)]
    made = {"stream": stream, "loss": lambda y: y.square().mean()}
    exec(code, made)
    assert made["layer"].in_proj.weight.grad.abs().sum() > 0 and (tmp_path / "stream.safetensors").exists()
    with torch.no_grad(): whole = made["layer"](torch.cat(stream, 1))[1]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(made["state"], whole))


def test_exact_gradient_is_what_was_measured():
    gpu, cpu = (json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in ("exact", "exact_cpu"))
    text = " ".join(README.split())
    for sweep in gpu["sweeps"]:
        peaks = [r["peak_allocated"] / 1e9 for r in sweep["records"]]
        assert max(peaks) <= 1.05 * min(peaks) and sweep["records"][-1]["steps"] == 2**18
        after = {"mamba_ssm": ",", "torch": ")"}[sweep["backend"]]
        assert f"{max(peaks):.1f} GB ({sweep['preset']}{after}" in text, (sweep["preset"], sweep["backend"], max(peaks))
        assert max(peaks) <= 1.002 * min(peaks), "README says: flat within 0.2 %"
    assert {(s["preset"], s["backend"]) for s in gpu["sweeps"]} == set(product(("baseline", "mhsa"), ("mamba_ssm", "torch")))
    states = [f"{s['records'][-1]['boundary_states'] / 1e9:.1f}" for s in gpu["sweeps"] if s["backend"] == "torch"]
    assert f"{' and '.join(states)} GB at the longest" in text, states
    for report, words in ((gpu, "times truncated on the H100"), (cpu, "on two CPU cores")):
        ratios = [r["ratio"]["median"] for s in report["sweeps"] for r in s["records"] if "ratio" in r]
        assert max(ratios) <= 1.6 and f"{min(ratios):.2f} to {max(ratios):.2f} {words}" in text, (words, min(ratios), max(ratios))


def test_cost_of_truncation_is_what_was_measured():
    from statistics import median

    cost = json.loads((ROOT / "results" / "truncation.json").read_text(encoding="utf-8"))
    rows = {n: [r for r in cost["results"] if r["model"] == "mamba2" and r["epochs"] == n] for n in (1, 4)}
    at = {n: k for k, n in enumerate(cost["lengths"])}
    cosine = lambda epochs, n: median(r["cosine"]["decay and step size"][at[n]] for r in rows[epochs])
    due = [f"{cosine(epochs, n):.2f}" for epochs in (4, 1) for n in (256, 2048)]
    quoted = (r"cosine of ([\d.]+) with the exact one at chunks of 256 hours and ([\d.]+) at 2,048 after .*?, "
              r"([\d.]+) and ([\d.]+) after one")
    assert list(re.search(quoted, " ".join(README.split())).groups()) == due
    assert all(r["cosine"]["all"][at[256]] > .99 for r in rows[4])


def test_cost_of_checkpoints_is_what_was_measured():
    cost = json.loads((ROOT / "results" / "checkpoints.json").read_text(encoding="utf-8"))
    rows = {r["save_every"]: r for r in cost["tiny"]}
    quoted = r"is ([\d.]+) MB and takes (\d+) ms .*?: ([\d.]+) % of a training .*?, (\d+) % with"
    usual, each = rows[500], rows[1]
    due = usual["bytes"] / 1e6, 1e3 * usual["one_save"], 100 * usual["share"]["median"], 100 * each["share"]["median"]
    figures = re.search(quoted, " ".join(README.split())).groups()
    assert figures == tuple(f"{value:.{digits}f}" for value, digits in zip(due, (1, 0, 1, 0)))
