"Tables, figures, sentences and the report of a run follow from its numbers."
import re

import numpy as np
import pandas as pd
import pytest
from helpers import read_result
from jinja2 import Environment

from cryptopredict import results
from cryptopredict.labels import HEADS
from cryptopredict.protocol import EvaluateConfig
from cryptopredict.run_audits import audit_inputs
from cryptopredict.simulate import simulate_market
from cryptopredict.walkforward import Evaluation, walk_forward_run

MODELS = ("climatology", "persistence", "log_har", "truth")
SUSPECT = dict(ok=True, tested={}, findings=[dict(severity="suspect", column="mvrv")])
TRAINED = {"training": [dict(fold="fold-00", heads=["band"]), dict(fold="fold-01", heads=[]), dict(fold="newest", heads=[])]}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Evaluation:
    "A short run of baselines and the truth on the simulated market."
    panel, _ = simulate_market(24 * 365 * 5, seed=1)
    config = EvaluateConfig(models=MODELS, first_test="2018-06-01", step="450D", n_boot=200)
    audits = audit_inputs(panel, config, n_cuts=6)
    return walk_forward_run(config, panel, tmp_path_factory.mktemp("report") / "run", "simulated market, seed 1", audits)


@pytest.fixture(scope="module")
def real() -> dict: return read_result("real")


def mean_of(scores: dict, model: str, score: str) -> float:
    return next(r["mean"] for r in scores["summary"] if (r["model"], r["score"]) == (model, score))


def test_a_cell_of_the_score_table_is_mean_and_interval(run):
    assert results.cell_text(pd.Series(dict(mean=.25, lo=.2, hi=.3))) == "0.250 [0.200, 0.300]"
    assert results.cell_text(pd.Series(dict(mean=.0625, lo=np.nan, hi=np.nan))) == "0.0625"
    table = results.table_of_scores(run.record)
    assert table.index.tolist() == [*MODELS, "independent windows"] and len(table.columns) == 9
    assert table.loc["truth", "log loss"].startswith(f"{mean_of(run.record, 'truth', 'log_loss'):.3f} [")


def test_the_table_of_comparisons_holds_every_one(run):
    assert results.percent_text(pd.Series(dict(relative=-.1, rel_lo=-.25, rel_hi=.05))) == "-10.0% [-25.0%, +5.0%]"
    texts = [results.percent_text(pd.Series(dict(relative=r, rel_lo=np.nan))) for r in (.02, np.nan)]
    assert texts == ["+2.0%", "-"]
    table = results.comparison_table(run.record)
    assert set(table["claim"]) <= {"better", "worse", "no difference shown", "identical", "not testable"}
    assert len(table) == 3 * 8 and results.comparison_table({"comparison": []}).empty


def test_the_skill_figure_draws_the_relative_differences(run):
    figure = results.figure_skill(run.record)
    qlike = next(r for r in run.record["comparison"] if (r["model"], r["score"]) == ("truth", "qlike"))
    assert [t.name for t in figure.data] == ["persistence", "log_har", "truth"] * 2  # a panel for volatility
    assert figure.data[-1].x[-1] == round(100 * qlike["relative"], 2)


def test_reliability_is_drawn_for_the_chosen_models(run):
    figure = results.figure_reliability(run.record, ("truth",))
    assert [t.name for t in figure.data if t.name and t.visible is True] == ["truth"] * 3
    with pytest.raises(ValueError, match="no model 'nope': name one of climatology"): run.plot_reliability(["nope"])


def test_a_figure_of_an_unknown_model_is_refused(run):
    with pytest.raises(ValueError, match="there is no model 'nope'"): run.plot_fan("nope")


def test_the_last_bar_of_coverage_is_that_of_all_years(run):
    last = results.figure_coverage(run.record).data[-1]
    assert (last.name, last.y[-1]) == ("truth", round(mean_of(run.record, "truth", "coverage"), 3))


def test_a_band_on_the_price_is_relative_to_the_price_at_its_origin(run):
    figure, k = results.figure_fan(run.predictions, run.realised, "truth"), 50
    made = run.predictions[run.predictions["model"] == "truth"].iloc[3 * k]
    start = run.realised.set_index("time")["close"][made["time"]]
    assert figure.data[0].x[k] == made["time"] + pd.Timedelta("90D")
    assert abs(figure.data[0].y[k] - start * np.exp(made["p90"])) < .01


def test_the_newest_bands_are_relative_to_the_newest_price(run):
    figure = results.figure_newest(run.newest, run.realised, list(MODELS))
    assert [t.name for t in figure.data] == ["price", *MODELS] and all(t.y[0] < t.y[1] for t in figure.data[1:])
    assert figure.data[1].y[0] == round(run.realised["close"].iloc[-1] * np.exp(run.newest["p10"].iloc[0]), 2)


def test_folds_in_which_the_network_repeats_its_baselines_are_counted():
    sentence = results.network_sentence(TRAINED)
    assert "Of 2 folds the network enables the direction head in 0, the band head in 1, the volatility head in 0" in sentence
    assert "in 1 it repeats its baselines" in sentence and results.network_sentence({"training": []}) == ""
    assert [results.repeats_baseline(TRAINED, head) for head in HEADS] == [["mamba2"], [], ["mamba2"]]
    row = dict(model="mamba2", score="qlike", verdict="better")
    assert "mamba2" not in results.better_models([row], ["qlike"], ("truth", "mamba2"))
    heads = dict(direction=dict(baseline="climatology of all years", network=False),
                 volatility=dict(baseline="log_har", network=True))
    assert results.head_sentences(dict(mamba2=heads)) == [
        "mamba2: enabled are volatility (with log_har); direction repeats climatology of all years."]


def test_trainings_are_drawn_and_listed(real):
    point = dict(step=1, lr=1e-3, log_var_cls=0., log_var_reg=0., cls=1., vol=.1, p10=.1, p90=.1)
    chosen = dict(fold="fold-00", training="choice-1", best_epoch=2, epochs=0, heads=[], tokens_per_s=31_000., peak_rss=2**29)
    two = {"training": [dict(chosen, evidence={"band": dict(difference=-.01, p=.3)}, curve=[point, dict(point, step=2)]),
                        dict(chosen, training="seed-0", tokens_per_s=None, peak_rss=None, curve=[])]}
    assert [(t.x, t.line.dash) for t in results.figure_training(two).data] == [((1., 2.), "dot")] * 7
    assert (len(results.figure_training({}).data), len(results.training_table({}))) == (0, 0)
    table = results.training_table(two)
    assert table.loc[0, "band: loss - baseline (p)"] == "-0.0100 (0.300)"
    columns = ["epochs", "tokens/s", "peak memory, process (MiB)"]
    assert table[columns].to_numpy().tolist() == [[2, "31,000", "512"], [0, "-", "-"]]
    assert len(results.training_table(real)) == len(real["training"])


def test_seeds_are_listed_only_where_there_are_several(run, real):
    assert results.seed_table(run.record).empty
    assert results.seed_table(real).index.tolist() == ["mamba2, 3 seeds"]


def test_the_sentence_on_audits_names_suspects_and_untested_parts():
    assert results.leak_sentence({}) == "No leak audit was made."
    found = results.leak_sentence(dict(disguise=SUSPECT))
    assert found.endswith("Worth a look, as an honest feature can look the same: mvrv (disguise).")
    assert results.leak_sentence(dict(own=dict(ok=False, tested={}, findings=[]))) == "Too little could be tested in: own."


def test_findings_follow_from_audits_and_comparison(run):
    made = results.finding_sentences(run.record)
    assert made[0] == "The audits of features, labels, disguise, folds found no leak."
    assert made[-1].startswith("The test span holds") and len(made) == 7 and "the true distribution improves on" in made[4]
    leaky = results.finding_sentences({**run.record, "audits": {"features": {"ok": False}}})
    assert leaky[0] == "Leaks were found in: features."
    won = [dict(model=m, score=s, verdict="better") for m in ("ewma", "truth") for s in ("brier", "qlike", "log_loss")]
    assert results.better_models(won, HEADS["direction"].scores) == "ewma (Brier, log loss)"


def test_dates_and_provenance_are_those_of_the_run(run):
    tests = results.fold_dates(run.record["folds"])["test begin"].tolist()
    assert tests == [f["test"]["begin"][:10] for f in run.record["folds"]]
    rows = results.facts(run.record)["value"][["cryptopredict", "config: step"]].tolist()
    assert rows == [run.record["provenance"]["cryptopredict"], "450D"]


def test_the_report_has_its_sections_and_fetches_nothing(run):
    page = results.write_report(run).read_text(encoding="utf-8")
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert re.findall(r"(?:src|href)\s*=\s*[\"']?(https?:)?//", outside) == [] and page.count("plotly-graph-div") == 5
    titles = ("What it shows", "Scores", "Calibration", "Newest forecast", "Leak certificate", "Folds", "Provenance")
    shown = (*titles, run.record["provenance"]["data_sha256"], "no leak found", "Not tested", "pipeline: not audited")
    assert [text for text in shown if text not in outside] == []


def test_the_report_escapes_html_in_names():
    sections = [("<b>", [("audits", results.audit_rows({"<script>": SUSPECT}))])]
    page = Environment(autoescape=True).from_string(results.TEMPLATE).render(sections=sections)
    assert "<script>" not in page.split("</head>")[1] and "1 worth a look" in page and "&lt;b&gt;" in page


def test_an_unfinished_run_has_no_report(tmp_path):
    with pytest.raises(ValueError, match="no finished run"): results.write_report(tmp_path)


def test_a_run_of_one_model_can_be_drawn(run, real):
    alone = {**run.record, "comparison": [], "config": {**run.record["config"], "models": ["climatology"]}}
    assert len(results.figure_skill(alone).data) == 0 and results.comparison_table(alone).empty
    assert len(results.finding_sentences(alone)) == 5
    for figure in (results.figure_skill(real), results.figure_coverage(real)):  # the template's default is width 0
        assert all(shape.line.width > 0 for shape in figure.layout.shapes) and len(figure.layout.shapes) >= 1
