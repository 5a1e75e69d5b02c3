"`cp.evaluate` with the user's own forecasters and features, which can change neither what others see nor what is scored."
import threading

import numpy as np
import pandas as pd
import pytest
from helpers import check_message

import cryptopredict as cp
from cryptopredict.protocol import source_hash

SETTINGS = dict(horizon="10D", vol_window="5D", first_test="2016-05-30", step="60D", validation="30D", n_boot=100)


class Constant:
    "Always forecasts the same."

    def __init__(self, p_down=.3): self.p_down = p_down
    def fit(self, panel, X, y, fold, seed=0): return self

    def predict(self, panel, X, rows):
        law = dict(p_down=self.p_down, p_flat=.1, p_up=.9 - self.p_down, p10=-.1, p90=.1, sigma=.5)
        return pd.DataFrame(law, index=panel.index[rows])


class Overwriter(Constant):
    "Overwrites every frame it is given."

    def fit(self, panel, X, y, fold, seed=0):
        y["r90"], y["direction"], X["target"] = 0., 1., y["r90"]
        panel["close"] = 1.
        return self


class Exits(Constant):
    def fit(self, panel, X, y, fold, seed=0): raise SystemExit(0)


@pytest.fixture(scope="module")
def panel():
    return cp.simulate_market(24 * 260, seed=0)[0]


def test_a_forecaster_cannot_change_the_data_of_others(panel, tmp_path):
    before = panel.copy()
    alone = cp.evaluate(panel, ["climatology", Constant()], tmp_path / "alone", **SETTINGS)
    together = cp.evaluate(panel, ["climatology", Overwriter(), Constant()], tmp_path / "together", **SETTINGS)
    pd.testing.assert_frame_equal(panel, before)
    for model in ("climatology", "Constant"):
        one, two = (scores[scores["model"] == model].reset_index(drop=True) for scores in (alone.scores, together.scores))
        pd.testing.assert_frame_equal(one, two)


def test_a_run_is_not_resumed_with_changed_forecasters_or_features(panel, tmp_path):
    first = cp.evaluate(panel, ["climatology", Constant(.3)], tmp_path / "a", **SETTINGS)
    assert set(first.predictions.query("model == 'Constant'")["p_down"]) == {.3}
    with pytest.raises(ValueError, match="another run"):
        cp.evaluate(panel, ["climatology", Constant(.8)], tmp_path / "a", **SETTINGS)

    def over(days):
        def change(frame): return frame["close"].pct_change(24 * days).rename("change")
        return change
    cp.evaluate(panel, ["climatology"], tmp_path / "b", features=[over(3)], **SETTINGS)
    with pytest.raises(ValueError, match="another run"):
        cp.evaluate(panel, ["climatology"], tmp_path / "b", features=[over(5)], **SETTINGS)


NOTEBOOK = """import pandas as pd
span = 3
def scale(): return 1.
def change(panel): return scale() * panel["close"].pct_change(24 * span)
class Mine:
    def fit(self, panel, X, y, fold, seed=0): return self
    def predict(self, panel, X, rows): return scale() * span
"""


@pytest.mark.parametrize("name", ["change", "Mine"])
@pytest.mark.parametrize("old, new, same", [("span = 3", "span = 4", False), ("return 1.", "return 2.", False),
                                            ("import pandas", "other = 1\nimport pandas", True)])
def test_the_hash_of_notebook_code_covers_what_the_code_uses(name, old, new, same):
    def define(source):  # in a notebook: code without a file
        cell = {"__name__": "cell"}
        exec(source, cell)
        return cell[name]
    one, two = (source_hash(define(source)) for source in (NOTEBOOK, NOTEBOOK.replace(old, new)))
    assert (one == two) == same


def test_a_feature_that_looks_up_the_label_is_refused(panel, tmp_path):
    ahead = np.log(panel["close"].shift(-240) / panel["close"])
    def remembered(frame): return ahead.reindex(frame.index).rename("remembered")
    with pytest.raises(cp.LeakageError, match="remembered"):
        cp.evaluate(panel, ["climatology"], tmp_path / "a", features=[remembered], **SETTINGS)
    assert not (tmp_path / "a").exists()


def test_too_little_data_for_the_audit_of_a_forecaster_is_an_error(panel, tmp_path):
    short = SETTINGS | dict(first_test="2016-07-15")
    with pytest.raises(ValueError, match="Constant: .*this audit needs"):
        cp.evaluate(panel.iloc[-24 * 190:], ["climatology", Constant()], tmp_path / "a", **short)


def _with_lock():
    made = Constant()
    made.lock = threading.Lock()
    return made


def _named(name):
    made = Constant()
    made.name = name
    return made


def _duplicate(frame): return frame["close"].pct_change().rename("ret_1h")


@pytest.mark.parametrize("models, more, words", [
    (["climatology", Exits()], {}, "Exits SystemExit"),
    (["climatology", _named("ewma")], {}, "ewma package name"),
    (["climatology", _with_lock()], {}, "Constant lock"),
    (Constant(), {}, "models Constant list"),
    ("climatology", {}, "models str list"),
    (["climatology"], dict(features=len), "features list"),
    (["climatology"], dict(features=[_duplicate]), "ret_1h twice"),
])
def test_unusable_models_and_features_are_refused_before_a_folder_is_made(panel, tmp_path, models, more, words):
    with pytest.raises(ValueError) as error: cp.evaluate(panel, models, tmp_path / "a", **more, **SETTINGS)
    check_message(error, *words.split())
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("change, words", [
    (lambda p: p.drop(columns="close"), "close"),
    (lambda p: p.iloc[:0], "rows"),
    (lambda p: p.reset_index(drop=True), "times"),
    (lambda p: p.rename(columns={"volume": 7}), "text"),
    (lambda p: p.assign(close=p["close"].astype(str)), "close numbers"),
    (lambda p: [1, 2], "DataFrame"),
])
def test_an_invalid_panel_is_refused_in_one_line(panel, tmp_path, change, words):
    with pytest.raises(ValueError) as error: cp.evaluate(change(panel), ["climatology"], tmp_path / "a", **SETTINGS)
    check_message(error, *words.split())


def test_model_names_that_differ_in_one_character_do_not_share_a_file(panel, tmp_path):
    made = cp.evaluate(panel, [_named("a b"), _named("a-b")], tmp_path / "a", **SETTINGS)
    assert set(made.predictions["model"]) == {"a b", "a-b"} == set(made.scores["model"])


def test_a_model_is_not_saved_over_a_run(panel, tmp_path):
    run = cp.evaluate(panel, ["climatology"], tmp_path / "a", **SETTINGS)
    before = (tmp_path / "a" / "config.toml").read_bytes()
    with pytest.raises(ValueError, match="choose another folder"):
        cp.MultitaskModel(cp.ModelConfig(n_features=8, d_model=32, headdim=16)).save(run.out)
    assert (tmp_path / "a" / "config.toml").read_bytes() == before
