"Audits of models, fitted pipelines and labels: their parts one by one, what they report, and what they leave untouched."
import copy
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from cryptopredict.audits import (
    Probe,
    audit_gradient,
    audit_label,
    audit_labels,
    audit_memory,
    audit_model,
    audit_pipeline,
    audit_structure,
    certificate,
    check_features,
    check_sequence,
    dependence,
    differences,
    first_names,
    fitted_parts,
    fresh_model,
    lagged_correlation,
    make_futures,
    make_probe,
    moved_outputs,
    named_tensors,
    replace_future,
    replaced_inputs,
    required_arguments,
    returns_state,
    shifted_copies,
    steps_to_cut,
    unit_ranks,
    windows_apart,
)
from cryptopredict.leakage import AuditError, Fold, LeakageError, make_report, stack_assets, walk_forward


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def x() -> torch.Tensor:
    "Two streams of 30 steps with one extreme input, at step 17."
    values = torch.randn(2, 30, 3).clamp(-2, 2)
    values[1, 17, 2] = -9
    return values


def as_given(model, **more) -> Probe: return Probe(model, "as given", 0, **more)


def kinds(findings) -> set[str]: return {f["kind"] for f in findings}


# --- models: reading outputs ---------------------------------------------------------------------------------------------


OUTPUT, STATE = torch.zeros(2, 5, 3), torch.zeros(1, 2, 3)


@pytest.mark.parametrize("result, names", [
    (OUTPUT, ["output"]),
    ((OUTPUT, OUTPUT), ["output[0]", "output[1]"]),
    (STATE, []),
    (dict(p10=OUTPUT[..., 0], more=(OUTPUT, STATE), size=3), ["p10", "more[0]"]),
])
def test_outputs_dense_over_time_are_named_by_path(result, names):
    assert list(named_tensors(result, (2, 5))) == names


@pytest.mark.parametrize("result, expected", [
    ((OUTPUT, (STATE, STATE)), True), ((OUTPUT, STATE), True), ((OUTPUT, ()), True),
    ((OUTPUT, OUTPUT), False), ((OUTPUT, None), False), (OUTPUT, False),
], ids=["LSTM", "GRU", "empty state", "two outputs", "no second part", "one output"])
def test_the_second_part_of_a_pair_is_a_state_unless_dense_over_time(result, expected):
    assert returns_state(result, (2, 5)) == expected


def test_calls_with_one_seed_are_equal_and_leave_model_and_random_state_unchanged():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(6), nn.Dropout(.5)), torch.randn(2, 6, 3)
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    train = Probe(model, "train", 0)
    one, two, other = (train.run(x, **more)["output"] for more in ({}, {}, dict(seed=1)))
    assert (one == two).all() and (one != other).any() and (one == 0).any()
    assert Probe(model, "eval", 0).run(x)["output"].all()
    assert all((before[k] == v).all() for k, v in model.state_dict().items())
    assert (drawn == torch.get_rng_state()).all()


def test_a_model_that_cannot_be_copied_is_named():
    with pytest.raises(ValueError, match="cannot be copied .*detach tensors"):
        fresh_model(dict(h=nn.Linear(1, 1).weight * 2), "as given")


@pytest.mark.parametrize("model, stateful", [(nn.GRU(3, 4, batch_first=True), True), (nn.Linear(3, 4), False)])
def test_a_state_is_recognised(model, stateful, x):
    assert make_probe(model, "eval", x, 0).stateful == stateful


@pytest.mark.parametrize("model", [lambda x: x[:, -1], lambda x: (x.sum(), x[:, -1])])
def test_outputs_of_the_last_step_alone_are_refused(model, x):
    with pytest.raises(ValueError, match="no output begins with .batch, time. = .2, 30., but"):
        make_probe(model, "as given", x, 0)


# --- models: comparing two runs ------------------------------------------------------------------------------------------


BASE, MOVED = (dict(p10=np.array([[1., -4.], [np.nan, last]])) for last in (2., 3.))


def moved(other, *limits): return moved_outputs(Probe(None, "train", 0), BASE, other, "k", "d", *limits)


def test_a_moved_output_is_a_finding_relative_to_the_largest_value():
    assert moved(MOVED) == [dict(column="p10", kind="k", time=1, magnitude=.25, detail="train: d")]


@pytest.mark.parametrize("other", [BASE, dict(p10=BASE["p10"][:, :1])], ids=["equal", "shorter"])
def test_equal_steps_are_no_finding(other):
    assert moved(other) == []


@pytest.mark.parametrize("limits", [(slice(0, 1),), (slice(None), 1), (slice(None), None, .3)],
                         ids=["another stream", "a later step", "within the tolerance"])
def test_limits_of_the_comparison(limits):
    assert moved(MOVED, *limits) == []


@pytest.mark.parametrize("other", [{}, dict(p10=np.ones((2, 2)))], ids=["missing", "no longer NaN"])
def test_an_output_that_cannot_be_compared_is_infinitely_far(other):
    assert moved(other)[0]["magnitude"] == np.inf


# --- models: replaced inputs ---------------------------------------------------------------------------------------------


def test_cuts_include_both_ends_and_an_extreme_input(x):
    cuts = steps_to_cut(x, 8, np.random.default_rng(0))
    assert len(cuts) == 8 and {0, 17, 28} <= set(cuts) and max(cuts) == 28


@pytest.mark.parametrize("steps, scale, n_cuts, made", [(30, 1, 2, 2), (30, 1, 99, 29), (4, 0, 8, 3)])
def test_there_are_as_many_cuts_as_fit(x, steps, scale, n_cuts, made):
    assert len(steps_to_cut(x[:, :steps] * scale, n_cuts, np.random.default_rng(0))) == made


def futures_of(model, x):
    probe, notes = as_given(model), {}
    return make_futures(probe, x, probe.run(x), np.random.default_rng(0), notes), notes


def test_three_futures_replace_nearly_all_inputs(x):
    futures, notes = futures_of(lambda x: dict(now=x, none=x * 0), x)
    assert list(futures) == ["noise", "resample", "zeros"] and notes == {"ignoring x": "none"}
    assert all(v.shape == x.shape and (v != x).any(2).float().mean() > .9 for v in futures.values())


def test_a_future_that_the_model_refuses_is_noted(x):
    def looked_up(x): return torch.eye(12)[(x.long() + 9)[..., 0]].cumsum(1)  # knows some numbers only
    futures, notes = futures_of(looked_up, x)
    assert list(futures) == ["resample", "zeros"] and "IndexError" in notes["noise"]


def test_a_model_that_ignores_its_input_is_refused(x):
    with pytest.raises(ValueError, match="outputs output ignore x, nothing was tested"): futures_of(lambda y: x * 0, x)


def test_a_model_that_fails_on_other_inputs_is_refused(x):
    with pytest.raises(ValueError, match="fails on inputs other than x.*ZeroDivision"):
        futures_of(lambda y: y if y.equal(x) else 1 / 0, x)


def test_replaced_inputs_keep_what_an_output_may_see(x):
    futures, _ = futures_of(lambda x: x, x)
    made = list(replaced_inputs(x, [0, 7], futures))
    assert len(made) == 12
    for kind, _, changed, streams, until in made:
        assert (changed != x).any() and (changed[streams, :until] == x[streams, :until]).all()
        if kind == "perturbation": assert (changed[:, until:] != x[:, until:]).any(2).float().mean() > .9
        else: assert until is None


def adds_last_sum():
    sums = [0]

    def model(y):
        sums.append(y.sum())
        return y + sums[-2]
    return model


def counts_other_inputs(x):
    others = []

    def model(y):
        others.extend([1] * (not y.equal(x)))
        return y + len(others)
    return model


@pytest.mark.parametrize("model, detail", [(lambda x: adds_last_sum(), "twice"), (counts_other_inputs, "in between")])
def test_state_kept_between_calls_is_found(model, detail, x):
    (found,) = audit_memory(as_given(model(x)), x, dict(output=x.double().numpy()), -x)
    assert found["kind"] == "state kept between calls" and detail in found["detail"]


def test_a_model_without_state_between_calls_passes(x):
    assert audit_memory(as_given(lambda x: x), x, dict(output=x.double().numpy()), -x) == []


# --- models: gradients and structure -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, found, note", [
    (lambda x: x.cumsum(1), set(), "tested"),
    (lambda x: x.cumsum(1) + 1e-4 * x.mean(1, keepdim=True), {"gradient"}, "tested"),
    (lambda x: x + x.roll(-1, 1).softmax(2), {"gradient"}, "tested"),
    (lambda x: x + x.mean(0), {"other streams"}, "tested"),
    (lambda x: dict(a=x, rank=x.argsort(1)), set(), "untested (rank)"),
    (lambda x: (100 * x).exp(), set(), "untested (NaN in output)"),
    (lambda x: (100 * x).exp().cumsum(1).flip(1), {"gradient"}, "untested (NaN in output)"),
    (lambda x: x if x.numpy().any() else -x, set(), "untested (RuntimeError"),
], ids=["causal", "small dependence", "softmax of the next step", "mean over streams", "no gradient", "overflow",
        "overflow and a leak", "numpy refuses"])
def test_gradients_to_later_steps_and_other_streams(model, found, note, x):
    notes = {}
    assert kinds(audit_gradient(as_given(model), x, [0, 7, 17, 28], np.random.default_rng(0), notes)) == found
    assert notes["gradient"].startswith(note)


class RunningSum(nn.Module):
    "A running sum; `keep=0` loses the state in single steps, `hand_on=0` between chunks."

    def __init__(self, keep=1, hand_on=1):
        super().__init__()
        self.keep, self.hand_on = keep, hand_on

    def forward(self, x, state=None):
        y = x.cumsum(1) + (0 if state is None else state[:, None])
        return y, y[:, -1] * self.hand_on

    def step(self, x_t, state):
        y = x_t + self.keep * (0 if state is None else state)
        return y, y


def structure(model, x, stateful=True, random=False):
    probe, notes = as_given(model, stateful=stateful), {}
    return kinds(audit_structure(probe, x, probe.run(x), [0, 7, 11, 17, 20, 28], random, notes)), notes


@pytest.mark.parametrize("model, found", [(RunningSum(), set()), (RunningSum(keep=0), {"step"}),
                                          (RunningSum(hand_on=0), {"chunking"})])
def test_a_lost_state_is_found_in_chunks_and_steps(model, found, x):
    assert structure(model, x) == (found, dict(truncation="tested", chunking="tested", step="tested"))


def test_random_outputs_are_not_compared_across_lengths(x):
    untested = dict.fromkeys(("truncation", "chunking", "step"), "untested (random)")
    assert structure(RunningSum(keep=0), x, random=True) == (set(), untested)


def test_outputs_that_depend_on_the_length_are_found(x):
    notes = dict(truncation="tested", chunking="not applicable (no state)", step="not applicable (no method step)")
    def by_length(x): return x + torch.arange(x.shape[1])[:, None] / x.shape[1]
    assert structure(by_length, x, False) == ({"truncation"}, notes)


def test_structure_that_cannot_be_tested_is_noted(x):
    chunking = structure(lambda x: (x, 1), x)[1]["chunking"]  # a function that accepts no state
    assert "TypeError" in chunking and "takes 1 positional argument" in chunking
    always_30 = lambda y: nn.functional.pad(y, (0, 0, 0, 30 - y.shape[1]))
    assert "KeyError" in structure(always_30, x, False)[1]["truncation"]


# --- models: the audit ---------------------------------------------------------------------------------------------------


def with_a_nan(x):
    x[1, 7, 2] = torch.nan
    return x


@pytest.mark.parametrize("wrong, message", [
    (lambda x: x > 0, "x is torch.bool: give a tensor"), (lambda x: x.numpy(), "x is float32: give a tensor of"),
    (lambda x: None, "x is NoneType"), (lambda x: x[0], "x has shape .30, 3."), (lambda x: x[:, :3], "at least 4 steps"),
    (lambda x: x[:0], "x has shape .0"), (with_a_nan, "x.1, 7, 2. .batch, time, channel. is nan"), (lambda x: x / 0, "is -?inf"),
])
def test_a_wrong_input_is_named(wrong, message, x):
    with pytest.raises(ValueError, match=message): check_sequence(wrong(x))


def test_a_single_stream_gets_a_second_one(x):
    two = check_sequence(x[:1].requires_grad_())
    assert two.shape == x.shape and (two[0] != two[1]).any() and not two.requires_grad
    assert check_sequence(x).equal(x)
    assert audit_model(lambda x: x.cumsum(1), x[:1]).ok
    assert set(audit_model(lambda x: x.cumsum(1) + x.mean(0), x[:1]).findings.kind) == {"other streams"}


@pytest.mark.parametrize("model, more, message", [(3, {}, "model is int"),
                                                  (lambda x: x, dict(n_cuts=1), "n_cuts is 1: give at least 2")])
def test_wrong_arguments_of_the_model_audit_are_named(model, more, message, x):
    with pytest.raises(ValueError, match=message): audit_model(model, x, **more)


def test_a_model_that_is_not_deterministic_is_reported(x):
    generator = np.random.default_rng()
    assert set(audit_model(lambda x: x * generator.normal(), x).findings.kind) == {"not deterministic"}


def test_a_model_that_writes_into_its_input_is_audited_on_copies(x):
    kept = x.clone()
    assert audit_model(lambda x: x.tanh_().cumsum(1), x).ok and kept.equal(x)


@pytest.mark.parametrize("names, line", [(["a", "b", "c"], "a, b, c"), (list("abcd"), "4 columns, first: a, b, c")])
def test_a_long_list_of_names_is_shortened(names, line):
    assert first_names(names, "columns") == line


def test_weights_that_are_all_zero_are_reported_as_untested(x):
    class Gated(nn.Linear):
        def forward(self, x): return x + super().forward(x.flip(1))
    closed = Gated(3, 3)
    nn.init.zeros_(closed.weight)
    assert audit_model(closed, x).tested["layers behind all-zero weights"] == "untested (weights: weight)"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floating_types_are_audited(dtype, x):
    assert audit_model(lambda x: x.cumsum(1), x.to(dtype)).ok


def test_the_audit_leaves_the_model_unchanged_and_is_repeatable():
    class OverChannels(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
        def forward(self, x): return self.layer(x.mT).mT

    x, model = torch.randn(2, 32, 4), nn.Sequential(OverChannels(nn.BatchNorm1d(4)), nn.Dropout(.5))
    model(x).sum().backward()
    model[1].eval()
    before, grad, drawn = copy.deepcopy(model.state_dict()), model[0].layer.weight.grad.clone(), torch.get_rng_state()
    report = audit_model(model, x)
    assert all((before[k] == v).all() for k, v in model.state_dict().items())
    assert (model[0].layer.weight.grad == grad).all() and all(p.requires_grad for p in model.parameters())
    assert [m.training for m in model] == [True, False] and (drawn == torch.get_rng_state()).all()
    assert repr(audit_model(model, x)) == repr(report)
    with pytest.raises(LeakageError, match="column 'output', .*, at 0: train: "): report.raise_if_leaky()


# --- fitted pipelines ----------------------------------------------------------------------------------------------------


def test_fitted_parts_are_found_by_path():
    class Fitted:
        def __init__(self):
            self.mean, self.kept, self.inner = np.arange(2.), ["a"], dict(s=pd.Series([3.]), n=None, f=len)
    parts = {k: np.asarray(v).tolist() for k, v in fitted_parts(Fitted()).items()}
    assert parts == {"fitted.mean": [0., 1.], "fitted.kept.0": "a", "fitted.inner.s": [3.]}


def test_equal_parts_have_no_differences():
    one, two = (dict(a=np.array([1., np.nan]), b="x") for _ in range(2))
    assert differences(one, two) == []


def test_differences_are_sized_and_missing_parts_are_infinite():
    one, two = dict(a=np.ones(2), b="x"), dict(a=np.array([1., 3.]), b="y", c=1)
    assert differences(one, two) == [("a", 2.), ("b", np.inf), ("c", np.inf)]


@pytest.mark.parametrize("fn, count", [(lambda a: a, 1), (lambda a, b, c=1: a, 2), (lambda a, b, c: a, 3), (lambda *a: a, 3)])
def test_required_arguments_are_counted(fn, count):
    assert required_arguments(fn) == count


def test_labels_are_replaced_earlier_than_features():
    frame = pd.DataFrame(dict(x=np.arange(1., 7), y=np.arange(1., 7)))
    changed = replace_future(frame, np.array([4, 5]), dict(y=np.array([2, 3])), "noise", np.random.default_rng(0)) != frame
    assert changed.x.tolist() == [False] * 4 + [True] * 2 and changed.y.tolist() == [False] * 2 + [True] * 4


FEATURES = list("abcdef")


@pytest.fixture(scope="module")
def market():
    "Hourly features without any link to the label, the sum of the next 48 hours' noise; the labels' ends; one fold."
    rng, index = np.random.default_rng(0), pd.date_range("2021-01-01", periods=24 * 200, freq="h", tz="UTC")
    frame = pd.DataFrame(rng.normal(size=(len(index), 6)), index=index, columns=FEATURES)
    frame["y"] = pd.Series(rng.normal(size=len(index)), index=index).rolling(48).sum().shift(-48)
    ends = pd.Series(index + pd.Timedelta("48h"), index=index).where(frame.y.notna())
    (fold,) = walk_forward(index, ends, first_test="2021-05-01", step="100D", validation="30D")
    return frame, ends, fold


def fit_ridge(frame, fold):
    rows = frame.iloc[fold.refit]
    mean, std = rows[FEATURES].mean(), rows[FEATURES].std()
    x = ((rows[FEATURES] - mean) / std).to_numpy()
    return dict(mean=mean, std=std, weights=np.linalg.solve(x.T @ x + np.eye(6), x.T @ rows.y.to_numpy()))


def predict_ridge(fitted, frame, rows):
    x = (frame[FEATURES].iloc[rows] - fitted["mean"]) / fitted["std"]
    return pd.Series(x.to_numpy() @ fitted["weights"], frame.index[rows])


def fit_with_all_rows(frame, fold): return fit_ridge(frame, fold) | dict(mean=frame[FEATURES].mean())


@pytest.mark.parametrize("fit, found", [(fit_ridge, []), (fit_with_all_rows, ["fitted.mean", "forecast.value"])])
def test_a_scaler_of_all_rows_is_found(fit, found, market):
    frame, ends, fold = market
    report = audit_pipeline(fit, predict_ridge, frame, [fold], labels=["y"], label_end=ends)
    assert report.findings.column.tolist() == found and set(report.findings.kind) <= {"fit sees the future"}


@pytest.mark.parametrize("changes, message", [
    (lambda fold: dict(folds=[]), "folds is empty"),
    (lambda fold: dict(labels=["z"]), "labels names .'z'."),
    (lambda fold: dict(folds=[Fold(fold.train, fold.valid, fold.test[:0], fold.refit)]), "fold 0: 'test' is empty"),
    (lambda fold: dict(fit=lambda frame, fold: frame.nothing), "fold 0 raised AttributeError"),
    (lambda fold: dict(predict=lambda fitted, frame, rows: 3.), "fold 0 raised"),
    (lambda fold: dict(fit=lambda *given: None, predict=lambda *given: np.full(len(given[2]), np.nan)),
     "nothing could be compared: fit returns nothing"),
])
def test_a_pipeline_that_cannot_be_audited_is_named(changes, message, market):
    frame, _, fold = market
    given = dict(fit=fit_ridge, predict=predict_ridge, frame=frame, folds=[fold]) | changes(fold)
    with pytest.raises(ValueError, match=message): audit_pipeline(**given)


def test_a_pipeline_that_raises_on_all_changed_data_is_refused_with_its_first_error(market):
    frame, _, fold = market
    fold = Fold(fold.train, fold.valid, fold.test[:-100], fold.refit)  # there are rows after the test

    def refuse(given):
        if not given.equals(frame): raise RuntimeError("changed")

    def fit(given, fold):
        refuse(given)
        return fit_ridge(given, fold)

    def predict(fitted, given, rows):
        refuse(given)
        return predict_ridge(fitted, given, rows)
    with pytest.raises(AuditError, match="compared: [0-9]+ runs on changed data raised, the first RuntimeError: changed"):
        audit_pipeline(fit, predict, frame, [fold])


@pytest.mark.parametrize("fit", [fit_ridge, fit_with_all_rows])
def test_a_fit_that_keeps_its_state_in_its_object_is_audited(fit, market):
    class Keeps:
        def fit(self, frame, fold): self.kept = fit(frame, fold)
        def predict(self, nothing, frame, rows): return predict_ridge(self.kept, frame, rows)
    (frame, ends, fold), pipeline = market, Keeps()
    report = audit_pipeline(pipeline.fit, pipeline.predict, frame, [fold], labels=["y"], label_end=ends)
    assert report.ok == (fit is fit_ridge)


def test_a_part_that_differs_between_identical_fits_is_reported_as_untested(market):
    frame, _, fold = market
    count = itertools.count()

    class Stamped:
        def __init__(self, fitted): self.fitted, self.at = fitted, next(count)
    report = audit_pipeline(lambda frame, fold: Stamped(fit_ridge(frame, fold)),
                            lambda stamped, frame, rows: predict_ridge(stamped.fitted, frame, rows), frame, [fold])
    assert report.ok and report.tested["parts"] == "untested: fitted.at"


def test_a_fit_that_raises_on_changed_data_is_reported_as_untested(market):
    frame, _, fold = market

    def refuses(given, fold):
        if not given.equals(frame): raise RuntimeError
        return fit_ridge(given, fold)
    report = audit_pipeline(refuses, predict_ridge, frame, [(fold.refit, fold.test)])
    assert report.tested["fit"] == "untested: 3 runs on changed data raised"


# --- labels in disguise --------------------------------------------------------------------------------------------------


def test_windows_are_one_label_length_apart():
    assert windows_apart(np.arange(10.)[:, None], 4, 2)[..., 0].tolist() == [[0., 4.], [3., 7.]]


def test_ranks_are_centred_and_of_unit_length():
    ranks = unit_ranks(np.array([[[3.], [1.], [2.]]]))[0, :, 0]
    np.testing.assert_allclose(ranks * np.sqrt(2), [1., -1., 0.], atol=1e-9)


def test_a_monotone_function_has_full_rank_correlation_and_xi():
    draw = np.random.default_rng(0).normal(size=(20, 40, 3))
    square, xi = dependence(draw, draw[..., 0] ** 3)
    assert square[0] > .999 and xi[0] > .999 and square[1:].max() < .1 and np.abs(xi[1:]).max() < .3


@pytest.mark.parametrize("of_feature", [True, False])
def test_xi_sees_a_function_that_is_not_monotone_in_either_direction(of_feature):
    draw = np.random.default_rng(0).normal(size=(20, 40, 3))
    square, xi = dependence(draw, np.abs(draw[..., 1])) if of_feature else dependence(np.abs(draw), draw[..., 1])
    assert square[1] < .1 and xi[1] > .85


def test_lagged_correlation_equals_pandas():
    walk = np.random.default_rng(1).normal(size=500).cumsum()
    known, lags = np.where(np.arange(500) % 7 == 0, np.nan, walk), [-20, 0, 35]
    expected = [pd.Series(known).corr(pd.Series(walk).shift(-k)) for k in lags]
    np.testing.assert_allclose(lagged_correlation(known, walk, np.array(lags)), expected, atol=1e-9)


def test_a_nearly_constant_feature_correlates_with_nothing():
    walk = np.random.default_rng(1).normal(size=500).cumsum()
    rarely = np.where(np.arange(500) < 3, 1., 0.)  # constant on most pairs of a long lag
    assert np.abs(lagged_correlation(rarely, walk, np.arange(-480, 0))).max() < .5


@pytest.fixture(scope="module")
def windows():
    "A label, the sum of the next 90 rows, and features made of the same noise."
    noise = pd.Series(np.random.default_rng(2).normal(size=6000))
    label, matured = noise.rolling(90).sum().shift(-90), noise.rolling(90).sum()
    features = {"matured": matured, "one row early": matured.shift(-1), "ten early": matured.shift(-10), "next": label.shift(-30),
                "longer": noise.rolling(100).sum(), "shorter": noise.rolling(80).sum(), "noise": noise}
    return pd.DataFrame(features), label


def test_only_labels_that_had_not_matured_are_shifted_copies(windows):
    copies = shifted_copies(*windows, 90)
    ratio = copies.unexplained / copies.unexplained_by_matured
    assert ratio[["one row early", "ten early", "next"]].max() < .01
    assert ratio[["matured", "longer", "shorter", "noise"]].min() > .4


def test_a_feature_with_too_few_values_is_listed_as_not_compared(windows):
    features, label = windows
    some = features.assign(short=features.noise.where(features.index < 90))
    found, unseen = audit_label(some, label, 90, .01, 99, np.random.default_rng(0))
    assert {f["column"] for f in found} == {"one row early", "ten early", "next"} and unseen == ["short"]


@pytest.mark.parametrize("features, n_perm, message", [
    (pd.DataFrame(dict(t=["a"])), 99, "feature 't' is (str|object)"),
    (pd.DataFrame(dict(a=[1.])), 9, "n_perm 9 cannot reach level 0.01: give at least 99"),
    (pd.DataFrame(index=[0]), 99, "features has no column"),
])
def test_features_that_cannot_be_audited_are_named(features, n_perm, message):
    with pytest.raises(AuditError, match=message): check_features(features, .01, n_perm)


def test_labels_that_cannot_be_compared_are_named():
    hours, week = pd.date_range("2019-01-01", periods=24 * 60, freq="h", tz="UTC"), 24 * 7
    price = pd.Series(np.random.default_rng(0).normal(size=len(hours)).cumsum(), hours)
    features, label = pd.DataFrame(dict(change=price.diff(week))), price.shift(-week) - price
    end = pd.Series(hours + pd.Timedelta("7D"), hours).where(label.notna())
    with pytest.raises(AuditError, match="different times"): audit_labels(features.iloc[1:], label, end)
    with pytest.raises(AuditError, match="no feature could be compared"):
        audit_labels(features[:300], label[:300], end[:300])


# --- the certificate -----------------------------------------------------------------------------------------------------


def test_a_certificate_without_audits_lists_all_of_them():
    empty = certificate({}, {})
    assert empty["ok"] is None and len(empty["untested"]) == 8


def test_the_audit_of_a_function_lists_no_audits_of_a_run():
    assert len(certificate({"my.py:fn": make_report([], {})}, {})["untested"]) == 1


# --- pipelines of several coins -------------------------------------------------------------------------------------------

ABC = ["a", "b", "c"]


def make_coin(begin: int, seed: int) -> pd.DataFrame:
    "Three features of noise, labels of 30 and 10 days, and their ends."
    rng, days = np.random.default_rng(seed), pd.date_range("2020-01-01", periods=800, tz="UTC")[begin:]
    coin = pd.DataFrame(rng.normal(size=(len(days), 3)), days, ABC)
    for name, length in (("y", 30), ("s", 10)):
        coin[name] = pd.Series(rng.normal(size=len(days)), days).rolling(length).sum().shift(-length) + seed
        coin[f"{name}_end"] = pd.Series(days + pd.Timedelta(days=length), days).where(coin[name].notna())
    return coin


@pytest.fixture(scope="module")
def coins():
    "Stacked features and labels of three coins, the ends of the labels, and folds."
    stacked = stack_assets({"BTC": make_coin(0, 1), "ADA": make_coin(150, 2), "ETH": make_coin(400, 3)})
    ends = stacked[["y_end", "s_end"]].set_axis(["y", "s"], axis=1)
    how = dict(first_test="2021-07-01", step="120D", validation="90D", embargo="2D")
    return stacked[[*ABC, "y", "s"]], ends, walk_forward(stacked.index, ends, **how)


def fit_pooled(frame, fold, rows=lambda frame, fold: fold.refit):
    "A ridge for all coins on features and labels less their means by coin, each label on the rows where it has matured."
    fitted = {}
    for name in ("y", "s"):
        known = frame[[*ABC, name]].iloc[rows(frame, fold.of(name))]
        mean = known.groupby("asset").mean()
        z = (known - mean.reindex(known.index.get_level_values("asset")).to_numpy()).to_numpy()
        x = z[:, :3]
        fitted[name] = dict(mean=mean, weights=np.linalg.solve(x.T @ x + np.eye(3), x.T @ z[:, 3]))
    return fitted


def predict_pooled(fitted, frame, rows):
    x, made = frame[ABC].iloc[rows], {}
    for name, one in fitted.items():
        mean = one["mean"].reindex(x.index.get_level_values("asset"))
        made[name] = (x - mean[ABC].to_numpy()).to_numpy() @ one["weights"] + mean[name].to_numpy()
    return pd.DataFrame(made, x.index)


def audit_coins(coins, fit=fit_pooled, predict=predict_pooled):
    frame, ends, folds = coins
    return audit_pipeline(fit, predict, frame, folds, labels=["y", "s"], label_end=ends)


def test_a_pooled_ridge_demeaned_by_coin_passes(coins):
    report = audit_coins(coins)
    assert report.ok and report.findings.empty and report.tested["folds"] == 3 and not report.tested["runs that raised"]
    assert all(len(fold.of("s").refit) > len(fold.refit) for fold in coins[2])


def test_a_forecast_less_the_mean_over_coins_of_the_same_time_passes(coins):
    def predict(fitted, frame, rows):
        made = predict_pooled(fitted, frame, rows)
        return made - made.groupby("time").transform("mean")
    assert audit_coins(coins, predict=predict).findings.empty


def test_coin_means_over_the_whole_sample_are_found_in_a_fit(coins):
    def fit(frame, fold):
        fitted = fit_pooled(frame, fold)
        return fitted | dict(y=fitted["y"] | dict(mean=frame.groupby("asset").mean()))
    assert {"fitted.y.mean", "forecast.ETH y"} <= set(audit_coins(coins, fit).findings.column)


def test_a_scaler_over_all_coins_and_times_is_found(coins):
    fit = lambda frame, fold: fit_pooled(frame, fold) | dict(y=fit_pooled(frame, fold)["y"] | dict(scale=frame[ABC].std()))
    assert audit_coins(coins, fit).findings.column.tolist() == ["fitted.y.scale"]


@pytest.mark.parametrize("name, end", [("y", 30), ("s", 10)])
def test_labels_of_another_coin_across_the_purge_are_found_in_a_fit(coins, name, end):
    def late(frame, fold):  # one row of ETH whose label ends one day after the test begins
        begin = frame.index[fold.test[0]][1]
        return np.append(fold.refit, frame.index.get_loc(("ETH", begin - pd.Timedelta(days=end - 1))))

    def fit(frame, fold): return fit_pooled(frame, fold) | {name: fit_pooled(frame, fold, late)[name]}
    found = audit_coins(coins, fit).findings
    assert set(found.kind) == {"fit sees the future"} and f"fitted.{name}.weights" in set(found.column)


def test_a_coins_rows_filled_back_before_it_began_are_found_in_a_fit(coins):
    def fit(frame, fold):
        begin = frame.index[fold.test[0]][1]
        filled = frame.a.unstack("asset").bfill().loc[:begin - pd.Timedelta("1D")]
        return fit_pooled(frame, fold) | dict(y=fit_pooled(frame, fold)["y"] | dict(filled=filled.mean()))
    frame, ends, _ = coins
    early = walk_forward(frame.index, ends, first_test="2020-12-01", step="60D", validation="90D")[:1]  # ETH begins in 2021
    assert audit_coins((frame, ends, early)).findings.empty
    assert audit_coins((frame, ends, early), fit).findings.column.tolist() == ["fitted.y.filled"]


def test_a_forecast_from_another_coins_next_day_is_found(coins):
    def predict(fitted, frame, rows):
        later = frame.a.unstack("asset")["ETH"].shift(-1).fillna(0).reindex(frame.index[rows].get_level_values("time"))
        return predict_pooled(fitted, frame, rows).add(later.to_numpy(), axis=0)
    found = audit_coins(coins, predict=predict).findings
    assert {"BTC y", "ADA y"} <= set(found.column) and all("forecast sees the future" in kind for kind in found.kind)


def test_a_truncated_run_sees_rows_up_to_one_time_of_all_coins(coins):
    seen = []

    def predict(fitted, frame, rows):
        seen.append((frame.index, frame.index[rows]))
        return predict_pooled(fitted, frame, rows)
    frame, _, folds = coins
    audit_coins(coins, predict=predict)
    cut = [(index, rows) for index, rows in seen if len(index) < len(frame)]
    assert cut
    for index, rows in cut:
        until = rows.get_level_values("time").max()
        assert index.equals(frame.index[frame.index.get_level_values("time") <= until]) and index.levels[1].max() == until
        start = frame.index[folds[0].test[0]][1]
        assert rows.get_level_values("time").min() >= start and rows[0][0] == "BTC"
