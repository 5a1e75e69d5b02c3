"The walk-forward: what is fitted on what, what is refused, what a folder of a run holds and how it is resumed."
import json
import warnings

import numpy as np
import pandas as pd
import pytest

from cryptopredict.baselines import origins
from cryptopredict.labels import make_labels
from cryptopredict.leakage import Fold
from cryptopredict.protocol import EvaluateConfig, RunData, UserCode, load_config, make_folds
from cryptopredict.scores import loss_table
from cryptopredict.simulate import simulate_market
from cryptopredict.storage import RunFolder
from cryptopredict.walkforward import (
    Evaluation,
    check_config,
    evaluate,
    expected_trainings,
    fit_predict,
    kept_certificate,
    newest_forecast,
    note_code,
    open_run,
    panel_hash,
    predict_folds,
    provenance_of,
    run_steps,
    score_run,
    train_newest,
    walk_forward_run,
    write_config,
)

CONFIG = EvaluateConfig(models=("climatology", "log_har", "truth"), first_test="2018-06-19", step="450D", n_boot=200)
FILES = ".lock certificate.json config.toml forecast.parquet origins.parquet parts predictions.parquet run.json scores.json"


class Own:
    "A forecaster that forecasts the same always, but for what it is given."

    def __init__(self, without=(), **values): self.without, self.values = without, values
    def fit(self, panel, X, y, fold, seed=0): return self

    def predict(self, panel, X, rows):
        law = dict(p_down=.3, p_flat=.3, p_up=.4, p10=-.2, p90=.2, sigma=.5) | self.values
        return pd.DataFrame(law, index=panel.index[rows]).drop(columns=list(self.without))


@pytest.fixture(scope="module")
def panel():
    return simulate_market(24 * 365 * 5, seed=1)[0]


@pytest.fixture(scope="module")
def y(panel):
    return make_labels(panel["close"])


@pytest.fixture(scope="module")
def folds(y):
    return make_folds(CONFIG, y)


@pytest.fixture(scope="module")
def run(panel, tmp_path_factory):
    return walk_forward_run(CONFIG, panel, tmp_path_factory.mktemp("run") / "a", "built-in market, seed 1")


@pytest.fixture(scope="module")
def made_by(panel):
    return provenance_of(panel, "built-in market, seed 1")


# --- one part -----------------------------------------------------------------------------------------------------------


def test_forecasts_are_made_at_the_daily_origins_of_the_test_span(panel, y, folds):
    made = fit_predict("climatology", panel, None, y, folds[0], CONFIG, 0)
    assert made["time"].tolist() == panel.index[origins(panel.index, folds[0].test)].tolist()


def test_a_test_span_without_a_daily_origin_is_refused(panel, y, folds):
    fold = Fold(folds[0].train, folds[0].valid, folds[0].test[1:20], folds[0].refit)
    with pytest.raises(ValueError, match="holds no 00:00 UTC"): fit_predict("climatology", panel, None, y, fold, CONFIG, 0)


@pytest.mark.parametrize("model, words", [
    (Own(p_up=.6), "normalise them to sum to 1"),
    (Own(sigma=0.), "volatility above 0"),
    (Own(p10=.3), "keep p10 <= p90"),
    (Own(p90="x"), "column p90 is (object|str): return real numbers"),
    (Own(sigma=1j), "column sigma is complex128: return real numbers"),
    (Own(without=["sigma"]), "predict returned no column 'sigma'"),
])
def test_what_is_wrong_with_a_forecast_is_named(panel, y, folds, model, words):
    with pytest.raises(ValueError, match=words):
        fit_predict("Own", panel, None, y, folds[0], CONFIG, 0, UserCode({"Own": model}, {}))


def test_labels_that_had_not_matured_do_not_move_a_forecast(panel, y, folds):
    altered = y.copy()
    for name, end in (("r90", "label_end"), ("sigma", "sigma_end")):  # each label matures at its own end
        altered.loc[altered.index[folds[0].of(end).refit[-1] + 1:], name] = 99.
    one, two = (fit_predict("log_har", panel, None, labels, folds[0], CONFIG, 0) for labels in (y, altered))
    pd.testing.assert_frame_equal(one, two, check_exact=True)


# --- all parts ----------------------------------------------------------------------------------------------------------


def test_parts_are_announced_with_their_work_and_made_once(panel, y, folds, run, tmp_path):
    steps, place = [], RunFolder(tmp_path)
    place.parts.mkdir()
    made = predict_folds(RunData(CONFIG, {"BTC": panel}), place.path, on_part=lambda done, total, what: steps.append(what))
    first = steps[0]
    assert (str(first), first.work, len(first.rest)) == ("fold 1 of 2, climatology, seed 0", len(folds[0].refit), 5)
    assert len(steps) == 7 and steps[-1] == "predictions done"
    pd.testing.assert_frame_equal(made, run.predictions)
    stamps = [path.stat().st_mtime_ns for path in sorted(place.parts.iterdir())]
    predict_folds(RunData(CONFIG, {"BTC": panel}), place.path)
    assert [path.stat().st_mtime_ns for path in sorted(place.parts.iterdir())] == stamps


def test_every_model_forecasts_at_the_same_origins_inside_each_test_span(panel, folds, run):
    made = run.predictions
    assert made.groupby(["fold", "model"]).size().unstack().nunique(axis=1).eq(1).all()
    for k, fold in enumerate(folds):
        assert made[made["fold"] == k]["time"].between(panel.index[fold.test[0]], panel.index[fold.test[-1]]).all()


def test_a_part_that_exists_is_no_work_and_a_first_seed_also_makes_the_choices(y, folds):
    config = CONFIG.model_copy(update=dict(models=("climatology", "mamba2"), seeds=2))
    steps = run_steps(config, y, folds[:1], ["fold"], UserCode({}, {}), lambda fold, model, seed: model == "climatology")
    assert [(s.model, s.seed, s.kind) for s in steps] == [
        ("climatology", 0, "climatology"), ("mamba2", 0, "mamba2, first seed"), ("mamba2", 1, "mamba2")]
    assert steps[0].work == 0 and steps[1].work > steps[2].work == len(folds[0].refit)


# --- scores -------------------------------------------------------------------------------------------------------------


def test_each_score_counts_the_origins_whose_label_has_matured(y, run):
    scores = score_run(CONFIG, run.predictions, y)
    counts = {name: label["origins"] for name, label in scores["origins_by_label"].items()}
    assert counts["sigma"] - counts["r90"] == 60
    losses = loss_table(run.predictions, y)
    mean = next(r["mean"] for r in scores["summary"] if (r["model"], r["score"]) == ("climatology", "log_loss"))
    assert np.isclose(mean, losses[losses["model"] == "climatology"]["log_loss"].mean(), rtol=0, atol=1e-9)


def test_forecasts_without_a_matured_label_cannot_be_scored(y, run):
    with pytest.raises(ValueError, match="nothing can be scored"):
        score_run(CONFIG, run.predictions, y.assign(label_end=pd.NaT, sigma_end=pd.NaT))


# --- the folder of a run ------------------------------------------------------------------------------------------------


def test_a_panel_is_known_by_every_value(panel):
    moved = panel["close"].where(panel.index != panel.index[7], panel["close"] + 1e-9)
    assert panel_hash(panel.assign(close=moved)) != panel_hash(panel) == panel_hash(panel.copy())


def test_a_folder_of_another_run_is_refused(made_by, tmp_path):
    run = open_run(tmp_path / "run", CONFIG, made_by)
    assert open_run(run.path, CONFIG, made_by).path == run.path
    with pytest.raises(ValueError, match=r"holds another run \(step: 450D in the folder, 90D in this call\)"):
        open_run(run.path, CONFIG.model_copy(update=dict(step="90D")), made_by)
    with pytest.raises(ValueError, match="data_sha256"): open_run(run.path, CONFIG, {**made_by, "data_sha256": "0"})
    with pytest.raises(ValueError, match="own.Own: None in the folder"):
        open_run(run.path, CONFIG, made_by, UserCode({"Own": Own()}, {}))


def test_a_folder_that_holds_no_run_is_refused(made_by, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"): open_run(tmp_path, CONFIG, made_by)
    with pytest.raises(ValueError, match="is a file"): open_run(tmp_path / "thesis.tex", CONFIG, made_by)


def test_a_damaged_identity_is_named(made_by, tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged .*choose another output"): open_run(tmp_path, CONFIG, made_by)


def test_a_run_resumed_with_other_code_warns_and_records_it(made_by, tmp_path):
    run = open_run(tmp_path / "run", CONFIG, made_by)
    assert note_code(run, made_by) == {}
    run.run.write_text(run.run.read_text().replace(made_by["code_sha256"], "earlier"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(note_code(run, made_by)["commits"]) == 2
    assert "was written by other code" in str(caught[0].message) and len(json.loads(run.run.read_text())["made_by"]) == 2


@pytest.mark.parametrize("source", ["nothing", "a\nseed = 7 # \udcff.csv"])
def test_written_settings_read_back_whatever_the_source_is_called(tmp_path, source):
    config = EvaluateConfig(models=("ewma",), train=dict(lr=.5), seed=4)
    write_config(tmp_path / "kept", config, source)
    assert load_config(tmp_path / "kept" / "config.toml") == config
    with pytest.raises(ValueError, match=r"kept holds another run \(train.lr: 0.5 in the folder, 0.001 in this call\)"):
        write_config(tmp_path / "kept", EvaluateConfig(models=("ewma",), seed=4), source)


def test_the_source_is_named_in_the_settings(tmp_path):
    write_config(tmp_path, CONFIG, "files a.csv")
    assert (tmp_path / "config.toml").read_text().splitlines()[0].endswith("on files a.csv")


def test_damaged_settings_are_named(tmp_path):
    (tmp_path / "config.toml").write_text("seed = ")
    with pytest.raises(ValueError, match="config.toml: is not TOML .*a run wrote this file: choose another output folder"):
        check_config(tmp_path, CONFIG)


# --- the newest forecast ------------------------------------------------------------------------------------------------


def test_the_newest_forecast_is_made_at_the_last_hour(panel):
    made = newest_forecast(CONFIG, panel)
    assert (made["time"].unique().tolist(), made["model"].tolist()) == ([panel.index[-1]], list(CONFIG.models))
    one = CONFIG.model_copy(update=dict(models=("log_har",)))
    assert newest_forecast(one, panel.iloc[:-1])["time"].tolist() == [panel.index[-2]]


def test_expected_trainings_learn_from_all_matured_labels(panel):
    made = expected_trainings(EvaluateConfig(epochs=1, validation_spans=2, seeds=2), panel)
    assert made["training"].tolist() == ["choice-0", "choice-1", "seed-0", "seed-1"]
    assert made["trained_on"].iloc[-1].endswith(f"{panel.index[-1] - pd.Timedelta('90D'):%Y-%m-%d}")
    assert (made["seconds"] > 0).all() and made["length"].is_monotonic_increasing


TRAINED = dict(models=("climatology",), horizon="30D", epochs=1, validation_spans=1)


@pytest.fixture(scope="module")
def trained(panel, tmp_path_factory):
    "The end of the panel, and a folder of trainings on it."
    end, out = panel.iloc[-24 * 700:], tmp_path_factory.mktemp("trained") / "newest"
    made = train_newest(EvaluateConfig(**TRAINED), end, out, "the end")
    assert (made["model"].tolist(), list(made.attrs["heads"]["mamba2"])) == (["mamba2"], ["direction", "band", "volatility"])
    return end, out


def test_a_training_keeps_its_settings_and_refuses_others(trained):
    end, out = trained
    assert (out / "config.toml").read_text().splitlines()[0].endswith("on the end")
    with pytest.raises(ValueError, match="train.lr: 0.001 in the folder"):
        train_newest(EvaluateConfig(**TRAINED, train=dict(lr=.5)), end, out)


def test_a_backend_that_is_missing_is_named_and_leaves_no_folder(trained, tmp_path):
    end, out = trained
    config = EvaluateConfig(**TRAINED, model=dict(backend="mamba_ssm"), train=dict(device="cpu"))
    with pytest.raises(ValueError, match="backend"): train_newest(config, end, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_trainings_that_lost_their_settings_still_refuse_others(trained):
    end, out = trained
    kept = (out / "config.toml").read_text()
    (out / "config.toml").unlink()
    try:
        with pytest.raises(ValueError, match="train.lr: 0.001 in the folder"):
            train_newest(EvaluateConfig(**TRAINED, train=dict(lr=.5)), end, out)
        assert not (out / "config.toml").exists(), "wrong settings are not written"
    finally: (out / "config.toml").write_text(kept)


def test_a_folder_of_others_is_not_trained_in(panel, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no training run"):
        train_newest(EvaluateConfig(**TRAINED), panel.iloc[-24 * 700:], tmp_path)


# --- the whole run ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_repeating_it_changes_none(panel, run):
    assert sorted(path.name for path in run.out.iterdir()) == FILES.split() and load_config(run.folder.config) == CONFIG
    before = run.folder.scores.read_bytes()
    walk_forward_run(CONFIG, panel, run.out, "built-in market, seed 1")
    assert run.folder.scores.read_bytes() == before


def test_a_run_that_cannot_start_leaves_no_folder(panel, tmp_path):
    with pytest.raises(ValueError, match="shorter than the horizon"):
        walk_forward_run(CONFIG, panel.iloc[:2000], tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_an_unfinished_run_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"holds no finished run \(scores.json is missing\)"): Evaluation.load(tmp_path)


def test_a_damaged_certificate_is_named(tmp_path):
    assert kept_certificate(RunFolder(tmp_path)) is None
    (tmp_path / "certificate.json").write_text("{")
    with pytest.raises(ValueError, match="certificate.json is damaged .*: remove it"): kept_certificate(RunFolder(tmp_path))


def test_a_forecaster_given_as_a_class_is_evaluated(panel, tmp_path):
    made = evaluate(panel, ["climatology_4y", Own], tmp_path / "a", first_test="2018-06-19", step="450D", n_boot=100)
    assert made.models == ["climatology_4y", "Own"] and {*made.scores["model"]} == {*made.models}
