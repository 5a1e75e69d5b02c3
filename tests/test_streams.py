"From features to streams: scaling on training rows, labels at their own rows, contiguous chunks, windows, warmed forecasts."

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

from cryptopredict.multitask import MultitaskModel, preset
from cryptopredict.streams import (
    LabelRows,
    Scaler,
    check_labelled,
    check_not_infinite,
    fit_scaler,
    fold_data,
    label_targets,
    plan_streams,
    stream_chunks,
    warm_forecast,
    windows,
)

HOURS, ROWS = 3000, np.arange(1500)


@pytest.fixture(scope="module")
def features() -> pd.DataFrame:
    "Four features, the last of which is missing in the first 2000 hours."
    values = np.random.default_rng(0).normal(size=(HOURS, 4)) * [1, 100, .01, 1] + [0, 50, 0, 0]
    index = pd.date_range("2020-01-01", periods=HOURS, freq="h", tz="UTC")
    frame = pd.DataFrame(values.astype("float32"), index=index, columns=list("abcd"))
    frame.loc[frame.index[:2000], "d"] = np.nan
    return frame


@pytest.fixture(scope="module")
def labels(features) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    return pd.DataFrame(dict(r90=rng.normal(size=HOURS), direction=pd.array(rng.integers(0, 3, HOURS), dtype="Int8"),
                             sigma=1., p10_path=-1., p90_path=1.), index=features.index)


@pytest.fixture(scope="module")
def data(features, labels):
    "A fold whose anchor is known from hour 100 on."
    return fold_data(features, labels, ROWS, np.arange(2000, 2200), np.where(np.arange(HOURS) < 100, np.nan, -.5))


@pytest.fixture(scope="module")
def numbered(data):
    "The same fold with the number of the hour as its only input."
    return data._replace(x=torch.arange(float(HOURS))[:, None])


# --- scaling --------------------------------------------------------------------------------------------------------------


def test_missing_features_are_allowed(features):
    assert check_not_infinite(features) is features


def test_an_infinite_feature_is_named_with_its_time(features):
    spoilt = features.assign(b=features.b.where(np.arange(HOURS) != 50, -np.inf))
    with pytest.raises(ValueError, match="feature 'b' is -inf at 2020-01-03 02:00:00.00:00: make it missing"):
        check_not_infinite(spoilt)
    with pytest.raises(ValueError, match="feature 'a' is inf at 2020-01-01"): fit_scaler(features.assign(a=np.inf), ROWS)
    scaler = fit_scaler(features, ROWS)
    with pytest.raises(ValueError, match="feature 'c' is inf at 2020-01-01"): scaler(features.assign(c=np.inf))


def test_a_scaler_centres_and_scales_its_training_rows(features):
    scaler = fit_scaler(features, ROWS)
    x = scaler(features)
    assert (scaler.columns, scaler.dropped) == (("a", "b", "c"), ("d",))
    assert abs(np.median(x[:1500], 0)).max() < 1e-6 and (abs(x[:1500].std(0) - 1) < .1).all() and np.isfinite(x).all()


def test_a_constant_feature_has_spread_one(features):
    assert fit_scaler(features.assign(a=3.), ROWS).spread[0] == 1


def test_a_scaler_survives_json(features):
    scaler = fit_scaler(features, ROWS)
    assert Scaler(**{k: tuple(v) for k, v in json.loads(json.dumps(asdict(scaler))).items()}) == scaler


def test_a_scaler_needs_rows(features):
    with pytest.raises(ValueError, match="rows is empty: a scaler needs training rows"): fit_scaler(features, ROWS[:0])


# --- a fold's tensors -----------------------------------------------------------------------------------------------------


def test_path_targets_are_the_quantiles_of_the_path(labels):
    targets = label_targets(labels, LabelRows(np.array([3, 7]), np.array([3, 7])), "path")
    assert all(torch.isfinite(v).nonzero().flatten().tolist() == [3, 7] for v in targets)
    assert (targets.low[3], targets.high[7]) == (-1, 1)


def test_each_label_is_kept_at_its_own_rows(labels):
    targets = label_targets(labels, LabelRows(r90=np.array([3]), sigma=np.array([3, 7])), "terminal")
    known = {name: torch.isfinite(v).nonzero().flatten().tolist() for name, v in targets._asdict().items()}
    assert known == dict(direction=[3], low=[3], high=[3], sigma=[3, 7])


def test_rows_without_any_label_are_named(labels):
    check_labelled(labels, fit=ROWS, valid=None)
    with pytest.raises(ValueError, match="fit holds no labelled row"): check_labelled(labels, fit=ROWS[:0])
    with pytest.raises(ValueError, match="valid holds no labelled row"): check_labelled(labels.assign(r90=np.nan), valid=ROWS)


def test_a_fold_holds_labels_at_its_rows_only(features, labels, data):
    assert (tuple(data.x.shape), data.start, data.stop) == ((HOURS, 4), 100, 1500)
    assert torch.isfinite(data.x).all() and torch.isfinite(data.fit.low[:1500]).all() and torch.isnan(data.fit.low[1500:]).all()
    assert torch.isfinite(data.valid.direction).nonzero().flatten()[[0, -1]].tolist() == [2000, 2199]
    assert (fold_data(features, labels, ROWS, target="path").fit.low[:1500] == -1).all()


@pytest.mark.parametrize("change, message", [
    (lambda f, l: (f, l.assign(r90=np.nan), ROWS), "fit holds no labelled row"),
    (lambda f, l: (f, l, ROWS, ROWS[:0]), "valid holds no labelled row"),
    (lambda f, l: (f, l[1:], ROWS), "labels has 2999 rows, features 3000"),
    (lambda f, l: (f[::-1], l, ROWS), "differ in their hours or the order of hours"),
    (lambda f, l: (f, l, ROWS, None, None, "mean"), "target is 'mean'"),
    (lambda f, l: (f, l.assign(p10_path=np.nan), ROWS, None, None, "path"), "fit holds no labelled row"),
    (lambda f, l: (f * np.nan, l, ROWS), "every feature is missing"),
    (lambda f, l: (f, l, ROWS, None, np.full(HOURS, np.nan)), "anchor is not known at any row of fit"),
], ids=["no label", "no validation row", "other length", "other order", "target", "no path", "no feature", "no anchor"])
def test_a_wrong_argument_of_a_fold_is_named(features, labels, change, message):
    with pytest.raises(ValueError, match=message): fold_data(*change(features, labels))


# --- streams and windows --------------------------------------------------------------------------------------------------


def test_a_short_history_gets_fewer_streams():
    plan = plan_streams(9_000, 16, 1024)
    assert plan.chunks >= 4 and plan.note == "batch 16 -> 1: a stream must hold four chunks"


def test_a_history_too_short_for_four_chunks_is_refused():
    with pytest.raises(ValueError, match="too few"): plan_streams(30, 4, 256)


def test_the_first_chunk_only_has_no_label(numbered):
    plan = plan_streams(numbered.stop - numbered.start, 4, 32)
    chunks = list(stream_chunks(numbered, plan, 0, 0))
    assert (len(chunks), tuple(chunks[0].x.shape)) == (plan.chunks, (4, 32, 1))
    assert [c.fresh for c in chunks] == [True] + [False] * (plan.chunks - 1)
    assert all(torch.isnan(v).all() for v in chunks[0].targets) and not torch.isnan(chunks[1].targets.direction).any()


def test_each_epoch_has_another_offset_and_a_seed_repeats_it(numbered):
    plan = plan_streams(numbered.stop - numbered.start, 4, 32)
    first, again, other = (next(stream_chunks(numbered, plan, 0, epoch)).x[0, 0, 0] for epoch in (0, 0, 1))
    assert first == again != other


def test_windows_are_contiguous_distinct_and_labelled_at_their_last_step(numbered):
    batches = list(windows(numbered, 8, 48, 0, 0))
    assert tuple(batches[0].x.shape) == (8, 48, 1)
    for b in batches:
        assert (b.x.diff(dim=1) == 1).all()
        assert torch.isnan(b.targets.low[:, :-1]).all() and torch.isfinite(b.targets.low[:, -1]).all()
    assert torch.cat([b.x[:, -1, 0] for b in batches]).unique().numel() == sum(len(b.x) for b in batches)


def test_a_window_longer_than_the_history_is_refused(numbered):
    with pytest.raises(ValueError, match="no labelled hour has 5000 hours before it"): next(windows(numbered, 8, 5000, 0, 0))


# --- forecasts with a warmed state ----------------------------------------------------------------------------------------


@pytest.fixture
def model() -> MultitaskModel:
    torch.manual_seed(0)
    model = MultitaskModel(preset("tiny", n_features=4, anchored=True))
    with torch.no_grad(): model.heads.regressor.weight.normal_(0, .1)
    return model


def test_a_warm_forecast_covers_every_hour_and_leaves_the_mode(model, data):
    assert tuple(warm_forecast(model, data.x, data.start).logits.shape) == (2900, 3) and model.training


def test_passes_that_do_not_fit_into_memory_are_halved(model, data, monkeypatch):
    due, plain = warm_forecast(model, data.x, data.start, chunk=700).sigma, MultitaskModel.forward

    def little_memory(self, x, *state):
        if x.shape[1] > most: raise torch.OutOfMemoryError("out of memory")
        return plain(self, x, *state)
    monkeypatch.setattr(MultitaskModel, "forward", little_memory)
    most = 700
    assert torch.equal(warm_forecast(model, data.x, data.start, chunk=2800).sigma, due)
    most = 0
    with pytest.raises(torch.OutOfMemoryError): warm_forecast(model, data.x, data.start)
    assert model.training
