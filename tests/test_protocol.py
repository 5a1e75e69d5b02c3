"The configuration of an evaluation, its folds, and how the user's own code is found and checked."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cryptopredict.config import ConfigError
from cryptopredict.labels import make_labels
from cryptopredict.protocol import (
    EvaluateConfig,
    Truth,
    default_first_test,
    load_config,
    load_object,
    load_user_code,
    make_folds,
)
from cryptopredict.simulate import simulate_market


@pytest.fixture
def config_file(tmp_path):
    "Writes a configuration file and returns its path."
    def write(text, **how):
        (tmp_path / "config.toml").write_text(text, **how)
        return tmp_path / "config.toml"
    return write


# --- the configuration ---------------------------------------------------------------------------------------------------


def test_tables_are_completed_from_the_preset_and_the_plain_form_makes_an_equal_configuration():
    config = EvaluateConfig(models=("ewma",), preset="baseline", model=dict(mlp=100), train=dict(bptt="span:2"))
    assert (config.model.d_model, config.model.mlp, config.train.tbptt_len, config.train.bptt) == (256, 100, 1024, "span:2")
    assert EvaluateConfig(**config.plain()) == config


def test_arguments_take_precedence_over_the_file_and_none_means_not_given(config_file):
    config = load_config(config_file('horizon = "60D"\nmodels = ["climatology", "log_har"]\n'), seed=3, step=None)
    assert (config.horizon, config.models, config.seed, config.step) == ("60D", ("climatology", "log_har"), 3, "YS")


def test_a_date_of_toml_behind_a_byte_order_mark_is_read(config_file):
    assert load_config(config_file("first_test = 2020-01-01\n", encoding="utf-8-sig")).first_test == "2020-01-01"


@pytest.mark.parametrize("text, message", [
    ("horizn = '60D'", "key 'horizn': unknown key; known are horizon"),
    ("horizon = 'long'", "key 'horizon' is 'long': must be a positive duration"),
    ("horizon = '12h'", "key 'horizon' is '12h': must be at least 1D"),
    ("models = []", "name at least one model"),
    ("models = ['ewma', 'ewma']", "key 'models' .*appears twice"),
    ("features = ['a.py:f', 'a.py:f']", "key 'features' .*appears twice"),
    ("preset = 'huge'", "key 'preset' is 'huge': unknown preset 'huge'"),
    ("preset = 3", "key 'preset' is 3"),
    ("[model]\nd_modle = 3", "key 'model.d_modle': unknown key; known are n_features, d_model,"),
    ("[train]\nlr = 2.0", "key 'train.lr' is 2.0: must be a number from 0.0 to 1.0"),
    ("model = 3", "key 'model'"),
    ("n_boot = 1", "key 'n_boot' is 1"),
    ("[train]\nbatch = '16'", "key 'train.batch' is '16': must be a whole number from 1 to 4096"),
    ("[train]\nbptt = 'all'", "'train.bptt' is 'all'"),
    ("[model]\nheaddim = 7", "headdim 7 does not divide"),
    ("[train]\namp = 'int8'", "key 'train.amp' is 'int8': must be one of auto"),
    ("[model]\nn_features = 7", "model.n_features follows from the data"),
    ("step = 'soon'", "'step' is 'soon': must be a length"),
    ("first_test = 'now'", "'first_test' is 'now': must be a time"),
    ("embargo = '-4D'", "'embargo' is '-4D': must be a duration"),
    ("[train]\ndeterministic = 1", "key 'train.deterministic'"),
    ("seed = 2147483647\nseeds = 3", "seed . seeds is above"),
    ("seeds = ", "is not TOML"),
    ("a = " + "[" * 3000, ""),
    ("a = " + "9" * 5000, ""),
], ids=lambda value: value[:24])
def test_a_fault_in_a_file_names_file_and_key(text, message, config_file):
    with pytest.raises(ConfigError, match="config.toml: .*" + message): load_config(config_file(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.toml: cannot be read"): load_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("arguments, message", [
    (dict(seeds=0), "^argument 'seeds' is 0: must be a whole number from 1 to 100$"),
    (dict(model=dict(d_modle=3)), "^argument 'model.d_modle': unknown key"),
    (dict(models=("truth",), horizon="30D"), "'truth' is known for horizon 90D"),
])
def test_a_fault_in_the_arguments_names_the_key(arguments, message):
    with pytest.raises(ConfigError, match=message): load_config(**arguments)


def test_a_table_given_as_an_argument_changes_only_its_own_keys(config_file):
    file = config_file("preset = 'mhsa'\n[train]\nlr = 0.5\nbatch = 8\n")
    assert load_config(file, train=dict(lr=.1)).train == replace(load_config(file).train, lr=.1)


def test_another_preset_conflicts_with_tables_written_for_the_preset_of_the_file(config_file):
    file = config_file("preset = 'mhsa'\n[train]\nlr = 0.5\nbatch = 8\n")
    with pytest.raises(ConfigError, match="preset 'tiny' conflicts with the table 'train' of .*config.toml"):
        load_config(file, preset="tiny")


def test_a_table_without_a_preset_in_the_file_takes_precedence_over_any_preset(config_file):
    train = load_config(config_file("[train]\nlr = 0.5\n"), preset="mhsa").train
    assert (train.lr, train.tbptt_len) == (.5, 512)


# --- folds ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def market():
    panel, _ = simulate_market(24 * 365 * 3, seed=1)
    return panel, make_labels(panel["close"])


@pytest.mark.parametrize("begin, year", [("2013-10-06 22:00", 2018), ("2016-01-01 00:00", 2020), ("2016-01-01 01:00", 2021)])
def test_the_first_test_is_a_first_of_january_at_least_four_years_into_the_data(begin, year):
    assert default_first_test(pd.DatetimeIndex([begin], tz="UTC")).year == year


@pytest.mark.parametrize("rows, changes, message", [
    (slice(-2000, None), {}, "no label: the data .* are shorter than the horizon"),
    (slice(24 * 400), dict(first_test=None), "too little history"),
    (slice(None), dict(step="1h"), "step is 1h: must be at least a day"),
])
def test_folds_that_cannot_be_made_are_explained(rows, changes, message, market):
    config = EvaluateConfig(first_test="2018-06-01", step="450D").model_copy(update=changes)
    with pytest.raises(ValueError, match=message): make_folds(config, market[1].iloc[rows])


def test_truth_is_known_at_midnight_only(market):
    with pytest.raises(ValueError, match="only at 00:00 UTC of the simulated market"):
        Truth().predict(market[0], None, np.array([2001]))


# --- the user's code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, message", [
    ("mine.py:Half", "has no method 'predict'"), ("mine.py:Mine", "does not fit"), ("mine.py:Absent", "has no 'Absent'"),
    ("gone.py:X", "there is no file"), ("no.such:X", "does not run"), (":X", "name the object too"),
    ("oracle", "unknown model 'oracle'; known are climatology"),
])
def test_a_forecaster_that_cannot_be_used_is_named(name, message, tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    def fit(self): pass\n"
                                      "class Half:\n    def fit(self, panel, X, y, fold, seed=0): pass\n")
    where = f"{tmp_path}/{name}" if ".py" in name else name
    with pytest.raises(ConfigError, match=message): load_user_code(EvaluateConfig(models=(where,)))


def test_a_feature_that_is_no_function_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("number = 3\n")
    config = EvaluateConfig(features=(f"{tmp_path}/mine.py:number",))
    with pytest.raises(ConfigError, match="is int: give a function"): load_user_code(config)


def test_a_file_that_does_not_run_is_named_with_its_error(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")
    with pytest.raises(ConfigError, match="broken.py does not run .ModuleNotFoundError"): load_object(f"{tmp_path}/broken.py:x")
