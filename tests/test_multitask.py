"The multitask model: settings, pooling, heads that are valid for any weights, causality, and the loss."

import math
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cryptopredict.audits import audit_model
from cryptopredict.config import ConfigError
from cryptopredict.mamba2_block import Mamba2Config
from cryptopredict.mhsa import KERNELS
from cryptopredict.multitask import (
    MAX_LOG_VAR,
    Forecast,
    Heads,
    MeanState,
    ModelConfig,
    ModelState,
    MultitaskModel,
    Pooling,
    Targets,
    inverse_softplus,
    masked_mean,
    multitask_loss,
    preset,
    running_mean,
    task_losses,
)
from cryptopredict.ssd import BACKENDS
from cryptopredict.states import move_state

SMALL = dict(n_features=6, d_model=16, d_state=8, headdim=8, mlp=16, chunk=8, n_heads=2, kv_window=11, pool_window=5)
POOLINGS = get_args(get_type_hints(ModelConfig)["pooling"])
VARIANTS = pytest.mark.parametrize("more", [
    dict(pooling="last"), dict(pooling="mean"), dict(pooling="attention"), dict(attention_every=2, anchored=True),
    dict(n_layers=3, attention_every=3, pooling="mean")], ids=lambda more: "-".join(map(str, more.values())))


@pytest.fixture(autouse=True)
def one_thread_and_a_fixed_seed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def relative_error(got: Tensor, due: Tensor) -> float:
    return ((got - due).norm() / due.norm().clamp_min(1e-30)).item()


def randomised(**sizes) -> MultitaskModel:
    "A float64 model with random head weights: they start at zero, which would hide errors of the backbone."
    model = MultitaskModel(preset("tiny", **SMALL | sizes)).double().eval()
    with torch.no_grad():
        for p in model.heads.parameters(): p.normal_(0, .3)
    return model


def inputs(batch: int = 2, hours: int = 40) -> Tensor:
    return torch.randn(batch, hours, 6, dtype=torch.float64)


# --- settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes, message", [
    (dict(pooling="max"), "'pooling' is 'max'"), (dict(dropout=1.), "'dropout' is 1.0"), (dict(headdim=7), "headdim 7"),
    (dict(mlp=True), "'mlp' is True"), (dict(d_modle=3), "unknown key"),
    (dict(n_features=1, anchored=True), "n_features is 1: give at least 2")], ids=str)
def test_a_wrong_size_is_named(sizes, message):
    with pytest.raises(ConfigError, match=message): ModelConfig(**sizes)


def test_the_mixer_gets_its_sizes_from_the_model():
    assert ModelConfig(d_state=24, ngroups=2).mixer == Mamba2Config(64, 24, 2, 32, 2, 4, 64)


def test_kernels_and_backends_are_those_of_the_modules():
    hints = get_type_hints(ModelConfig)
    assert (get_args(hints["kernel"]), get_args(hints["backend"])) == (KERNELS, BACKENDS)


def test_a_preset_takes_overrides():
    assert preset("baseline").d_model == 256 and preset("mhsa", n_features=7, mlp=99).mlp == 99


def test_an_unknown_preset_or_key_is_named():
    with pytest.raises(ValueError, match="unknown preset 'huge'; known are baseline, mhsa, tiny"): preset("huge")
    with pytest.raises(ValueError, match="unknown key 'depth'"): preset("tiny", depth=3)


# --- pooling --------------------------------------------------------------------------------------------------------------


def empty_mean(batch: int, width: int) -> MeanState:
    return MeanState(torch.zeros(batch, width).double(), torch.zeros(batch, 1).double())


def test_a_running_mean_restarts_at_each_reset():
    u, reset = torch.randn(2, 10, 3), torch.zeros(2, 10, dtype=torch.bool)
    reset[0, 0] = reset[1, 4] = reset[1, 5] = True
    mean, before = running_mean(u, empty_mean(2, 3), None)
    assert relative_error(mean[:, -1], u.mean(1)) < 1e-6
    mean, state = running_mean(u, before, reset)
    assert relative_error(mean[0], running_mean(u, empty_mean(2, 3), None)[0][0]) < 1e-6
    assert relative_error(mean[1, 3], (u[1].sum(0) + u[1, :4].sum(0)) / 14) < 1e-6
    assert relative_error(mean[1, 4], u[1, 4]) < 1e-6 and relative_error(mean[1, 9], u[1, 5:].mean(0)) < 1e-6
    assert state.n.flatten().tolist() == [10, 5]


def test_a_running_mean_of_a_series_that_begins_late_keeps_its_digits():
    u, reset = 3 + torch.randn(1, 4096, 3), torch.zeros(1, 4096, dtype=torch.bool)
    reset[0, 4094] = True
    assert relative_error(running_mean(u, empty_mean(1, 3), reset)[0][0, -1], u[0, -2:].mean(0)) < 1e-6


def test_pooling_refuses_a_state_or_an_input_that_does_not_fit():
    pool, u = Pooling(preset("tiny", pooling="mean")), torch.randn(2, 10, 64)
    with pytest.raises(ValueError, match="state.pool.total has shape .1, 64.; for u .2, 10, 64. expected .2, 64."):
        pool(u, pool.init_state(u[:1]))  # the sums of one stream would be broadcast to both
    with pytest.raises(ValueError, match="state.pool is tuple; expected MeanState"): pool(u, ())
    with pytest.raises(ValueError, match="u has shape .2, 10, 1.; expected .batch, time, 64."):
        pool(u[..., :1], pool.init_state(u))


# --- heads ----------------------------------------------------------------------------------------------------------------


def test_inverse_softplus_inverts_softplus():
    x = torch.tensor([1e-3, .3, 50.])
    assert torch.allclose(F.softplus(inverse_softplus(x)), x, rtol=1e-6, atol=1e-6)


def test_heads_forecast_the_climatology_in_mixed_precision_too():
    heads = Heads(8)
    heads.set_climatology(torch.tensor([.3, .1, .6]), torch.tensor([-.4, .05, .7]), .8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16): f = heads(torch.randn(2, 5, 8).bfloat16(), None)
    assert torch.allclose(f.logits.softmax(-1)[0, 0], torch.tensor([.3, .1, .6]), atol=1e-6)
    assert torch.allclose(torch.stack([f.p10[0, 0], f.p90[0, 0], f.sigma[0, 0]]), torch.tensor([-.4, .7, .8]), atol=1e-5)


def test_forecasts_are_valid_for_extreme_weights():
    heads = Heads(8)
    with torch.no_grad():
        for p in heads.parameters(): p.normal_(0, 30)
    f = heads(torch.randn(50, 50, 8) * 10, None)
    assert (f.p10 <= f.p90).all() and (f.sigma > 0).all() and all(torch.isfinite(v).all() for v in f)


# --- the model ------------------------------------------------------------------------------------------------------------


def with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[1, 7, 3] = torch.nan
    return x


@pytest.mark.parametrize("change, message", [
    (lambda x: x[..., :5], "x has shape .2, 9, 5.; expected .batch, time, 6."), (lambda x: x[:, :0], "x has shape .2, 0, 6."),
    (with_nan, "x.1, 7, 3. .batch, time, feature. is nan"), (lambda x: x / 0, "is -?inf"),
    (Tensor.double, "x is torch.float64"), (lambda x: x > 0, "x is torch.bool on cpu; expected torch.float32 on cpu"),
    (lambda x: x.to("meta"), "x is torch.float32 on meta; expected torch.float32 on cpu")],
    ids=["features", "no time", "nan", "inf", "float64", "bool", "meta"])
def test_a_wrong_input_is_described(change, message):
    model, x = MultitaskModel(preset("tiny", n_features=6)), torch.randn(2, 9, 6)
    with pytest.raises(ValueError, match=message): model(change(x))


@pytest.mark.parametrize("change, message", [
    (lambda s: s.blocks, "state is tuple; expected ModelState"),
    (lambda s: s._replace(blocks=s.blocks[:1]), "state.blocks has 1 parts; expected 2"),
    (lambda s: ModelState((None, s.blocks[1]), ()), "state.blocks.0. is NoneType; expected Mamba2State"),
    (lambda s: s._replace(pool=3), "state.pool is int; expected tuple")], ids=["tuple", "fewer blocks", "none", "pool"])
def test_a_wrong_state_is_described(change, message):
    model = MultitaskModel(preset("tiny", n_features=6))
    with pytest.raises(ValueError, match=message): model(torch.randn(2, 9, 6), change(model.init_state(2)))


def test_a_wrong_reset_is_described():
    model = MultitaskModel(preset("tiny", n_features=6))
    with pytest.raises(ValueError, match="reset has shape .2, 8.; with x .2, 9, 6."):
        model(torch.randn(2, 9, 6), None, torch.zeros(2, 8, dtype=torch.bool))


def test_a_state_of_another_batch_is_refused_by_name():
    model, x = randomised(), inputs()
    with pytest.raises(ValueError, match="state.blocks.0..conv has shape .2"): model(x[:1], model(x)[1])


@VARIANTS
def test_a_state_of_another_batch_or_dtype_is_refused(more):
    model, x = randomised(**more), inputs()
    for state, message in ((model.init_state(1), "has shape"), (model.float().init_state(2), "is torch.float32")):
        with pytest.raises(ValueError, match=message): model.double()(x, state)


@VARIANTS
def test_forecasts_do_not_depend_on_later_inputs(more):
    model, x = randomised(**more), inputs()
    later = x.clone()
    later[:, 25:] -= 1
    assert all(relative_error(a[:, :25], b[:, :25]) < 1e-13 for a, b in zip(model(later)[0], model(x)[0]))


@VARIANTS
def test_one_stream_of_one_step_is_the_first_step_of_many(more):
    model, x = randomised(**more), inputs()
    assert all(relative_error(a, b[:1, :1]) < 1e-12 for a, b in zip(model(x[:1, :1])[0], model(x)[0]))


@VARIANTS
def test_streams_do_not_depend_on_each_other(more):
    model, x = randomised(**more), inputs()
    changed, state, made = torch.stack([x[0], -x[1]]), None, []
    for part in changed.split([13, 20, 7], 1):
        f, state = model(part, state)
        made.append(f)
    for a, b in zip((torch.cat(v, 1) for v in zip(*made)), model(x)[0]):
        assert relative_error(a[:1], b[:1]) < 1e-13 and relative_error(a[1:], b[1:]) > 1e-3


@pytest.mark.parametrize("name", ["baseline", "mhsa"])
def test_a_full_size_preset_in_chunks_equals_one_pass_in_float32(name):
    model, x = MultitaskModel(preset(name, n_features=6, kv_window=40)).eval(), torch.randn(1, 150, 6)
    state, made = None, []
    with torch.no_grad():
        for p in model.heads.parameters(): p.normal_(0, .1)
        for part in x.split([1, 70, 3, 76], 1):
            f, state = model(part, state)
            made.append(f)
        assert all(relative_error(torch.cat(a, 1), b) < 1e-5 for a, b in zip(zip(*made), model(x)[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_state_follows_its_model_to_another_precision(dtype):
    model, x = randomised(attention_every=2, pooling="mean").float(), inputs().float()
    _, state = model(x[:, :23])
    forecast, _ = model.to(dtype)(x[:, 23:].to(dtype), move_state(state, dtype=dtype))
    assert all(torch.isfinite(v).all() for v in forecast)


def test_autocast_accepts_no_float64():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="x is torch.float64 on cpu; expected"):
        randomised().float()(inputs())


def test_a_model_is_not_saved_among_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="holds notes.txt, which is not part of a saved model: choose another folder"):
        randomised().save(tmp_path)


@pytest.mark.parametrize("more", [dict(), dict(attention_every=2), dict(attention_every=1, anchored=True)], ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_audit_finds_no_leak_in_any_variant(pooling, more):
    report = audit_model(randomised(**more, pooling=pooling), inputs(hours=24), n_cuts=5).raise_if_leaky()
    assert {report.tested[k] for k in ("truncation", "chunking", "step")} == {"tested in eval; untested (random) in train"}
    assert report.tested["gradient"] == "tested" and "ignoring x" not in report.tested


def test_the_audit_finds_a_volatility_averaged_over_the_chunk():
    class Hindsight(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, state=None):
            f, state = self.model(x, state)
            return f._replace(sigma=f.sigma.mean(1, keepdim=True).expand_as(f.sigma)), state

    leaks = audit_model(Hindsight(randomised()), inputs(hours=24), n_cuts=5).findings
    assert set(leaks.column) == {"sigma"} and set(leaks.kind) == {"perturbation", "gradient", "truncation", "chunking"}


def test_the_audit_refuses_an_untrained_model():
    with pytest.raises(ValueError, match="outputs logits, p10, p90, sigma ignore x"):
        audit_model(MultitaskModel(preset("tiny", n_features=6)).double(), inputs(hours=24))


# --- the loss -------------------------------------------------------------------------------------------------------------


def test_a_masked_mean_keeps_nan_out_of_the_graph():
    y, w = torch.tensor([1., torch.nan, 3.]), torch.ones(3, requires_grad=True)
    value = masked_mean(lambda y: (y - w) ** 2, y)
    assert value.item() == 2 and torch.autograd.grad(value, w)[0].tolist() == [0, 0, -2]


def test_a_masked_mean_of_unknown_labels_is_zero():
    assert masked_mean(lambda y: y, torch.full((3,), torch.nan)).item() == 0


def constant(*values: float) -> list[Tensor]:
    return [torch.full((1, 1), v) for v in values]


def test_path_targets_are_learned_by_squared_error():
    forecast, targets = Forecast(torch.zeros(1, 1, 3), *constant(-.2, .4, .5)), Targets(*constant(2., .1, .1, 1.))
    losses = task_losses(forecast, targets, "path")
    assert [round(losses[k].item(), 6) for k in ("p10", "p90")] == [.09, .09]


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="target is 'mean'"):
        task_losses(Forecast(torch.zeros(1, 1, 3), *constant(0., 0., 1.)), Targets(*constant(0., 0., 0., 1.)), "mean")


def test_the_direction_loss_is_the_cross_entropy_of_the_labelled_steps():
    f, direction = randomised()(inputs())[0], torch.randint(0, 3, (2, 40)).double()
    known = torch.arange(40) < 10
    targets = Targets(torch.where(known, direction, torch.nan), *[torch.full((2, 40), torch.nan)] * 3)
    due = F.cross_entropy(f.logits[:, :10].flatten(0, 1), direction[:, :10].flatten().long())
    assert math.isclose(task_losses(f, targets)["cls"].item(), due.item(), rel_tol=1e-9)


def test_task_weights_are_bounded():
    s, losses = torch.tensor(500.), {k: torch.ones(()) for k in ("cls", "p10", "p90", "vol")}
    value = multitask_loss(losses, s, -s)
    assert torch.isfinite(value) and value < 21 * 100 + 10
    assert torch.exp(-MAX_LOG_VAR * torch.tanh(s / MAX_LOG_VAR)) >= .0099
