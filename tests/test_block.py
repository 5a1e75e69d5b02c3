"The Mamba2 layer: minimal dependencies, a broken mamba_ssm, weights, parts and gradients (test_state covers chunking)."
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ENV, check_message
from tensors import normal, relative_error

from cryptopredict import ssd
from cryptopredict.mamba2_block import (
    DepthwiseConv,
    FusedRMSNorm,
    Mamba2,
    Mamba2Block,
    Mamba2Config,
    RMSNorm,
    causal_conv,
    causal_conv_silu,
    initial_dt_bias,
)
from cryptopredict.ssd import ssd_reference
from cryptopredict.states import debug, detach

ABSENT = ("pandas", "pyarrow", "safetensors", "pydantic", "tyro", "pandera", "rich", "plotly", "talib", "scoringrules",
          "fastcore", "filelock", "tomli_w", "jinja2", "psutil", "httpx", "nbdev", "IPython", "scipy", "sklearn")
SCRIPT = """
import sys
sys.modules.update(dict.fromkeys({absent!r}))  # importing one of these is an ImportError
import torch
from cryptopredict.mamba2_block import Mamba2, Mamba2Config
from cryptopredict.states import detach
torch.manual_seed(0)
layer = Mamba2(Mamba2Config(d_model=16, d_state=4, headdim=8, backend={backend!r}))
state, total = None, 0.
for _ in range(3):
    y, state = layer(torch.randn(2, 5, 16), state)
    y.square().sum().backward()
    state, total = detach(state), total + y.sum().item()
print(f"{{total:.5f}}")
"""
BROKEN = {
    "an extension is missing": {"__init__.py": "import selective_scan_cuda"},
    "a symbol is missing": {"__init__.py": "raise OSError('undefined symbol: _ZN3c105Error')"},
    "an empty folder": {},
    "kernels without the function": {"__init__.py": "", "ops/__init__.py": "", "ops/triton/__init__.py": "",
                                     "ops/triton/ssd_combined.py": ""},
    "it exits the interpreter": {"__init__.py": "raise SystemExit(3)"},
}


def _train_in_new_process(folder: Path, backend: str = "auto", **files: str) -> subprocess.CompletedProcess:
    "Train the layer for three steps in a fresh interpreter that finds a `mamba_ssm` made of these files."
    for name, text in files.items():
        path = folder / "mamba_ssm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n" + SCRIPT.format(absent=ABSENT, backend=backend)
    return subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    "Output of the training without mamba_ssm."
    done = _train_in_new_process(tmp_path_factory.mktemp("none"))
    assert done.returncode == 0, done.stderr
    assert "mamba_ssm" not in done.stderr, "no warning: a missing package is not a broken one"
    return done.stdout


def test_torch_and_einops_are_enough(plain):
    assert plain.strip(), "the layer ran without the project's other dependencies"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_mamba_ssm_gives_one_warning_and_the_pytorch_backend(name, tmp_path, plain):
    (tmp_path / "mamba_ssm").mkdir()
    done = _train_in_new_process(tmp_path, **BROKEN[name])
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain, "the PyTorch backend was used instead"
    assert done.stderr.count("RuntimeWarning: mamba_ssm does not import") == done.stderr.count("Warning:") == 1, done.stderr


def test_a_requested_backend_that_cannot_be_used_is_an_error(tmp_path):
    done = _train_in_new_process(tmp_path, "mamba_ssm", **BROKEN["an extension is missing"])
    assert done.returncode == 1 and "ValueError: backend 'mamba_ssm' cannot be used" in done.stderr


# --- sizes from weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [
    Mamba2Config(), Mamba2Config(d_model=12, d_state=5, expand=3, headdim=6, ngroups=2, d_conv=7),
    Mamba2Config(d_model=4, d_state=1, expand=1, headdim=1, ngroups=4, d_conv=1)], ids=["default", "odd", "smallest"])
def test_from_weights_recovers_the_config(config):
    block = Mamba2Block(config, mlp=8)
    assert Mamba2Config.from_weights(block.mixer.state_dict(), config.ngroups) == config
    weights = {name.removeprefix("mixer."): v for name, v in block.state_dict().items() if name.startswith("mixer.")}
    assert Mamba2Config.from_weights(weights, config.ngroups) == config
    other = Mamba2(Mamba2Config.from_weights(weights, config.ngroups))
    other.load_state_dict(weights)
    u = torch.randn(2, 5, config.d_model)
    assert torch.equal(other(u)[0], block.mixer(u)[0])


SMALL = Mamba2Config(d_model=8, d_state=4, headdim=4, ngroups=2)


@pytest.mark.parametrize("change, ngroups, words", [
    (lambda w: w.pop("dt_bias"), 2, "'dt_bias'"), (lambda w: w.update(norm1=w["D"]), 2, "'norm1'"),
    (lambda w: w.update(D=w["D"][:-1]), 2, "D has shape"),
    (lambda w: w.update({"out_proj.weight": torch.zeros(8, 9)}), 2, "out_proj.weight has shape"),
    (lambda w: w.update({"conv1d.weight": w["conv1d.weight"][:, 0]}), 2, "conv1d.weight has shape"),
    (lambda w: None, 3, "3 groups"), (lambda w: None, 0, "ngroups")])
def test_from_weights_names_the_weight_or_size_at_fault(change, ngroups, words):
    weights = Mamba2(SMALL).state_dict()
    change(weights)
    with pytest.raises(ValueError) as refused: Mamba2Config.from_weights(weights, ngroups)
    check_message(refused, words)


# --- parts of the layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    (dict(headdim=48), "headdim 48 does not divide"), (dict(ngroups=3), "ngroups 3 does not divide the 8 heads"),
    (dict(d_conv=0), "d_conv is 0: give a whole number"), (dict(d_state=True), "d_state is True"),
    (dict(chunk=64.), "chunk is 64.0"), (dict(backend="cuda"), "backend is 'cuda'; known are auto")])
def test_an_invalid_size_is_named(change, message):
    with pytest.raises(ValueError, match=message): Mamba2Config(**change)


def test_parameters_are_named_and_shaped_as_in_mamba_ssm():
    mixer = Mamba2(Mamba2Config(d_model=16, d_state=8, headdim=8, ngroups=2))
    assert {n: tuple(p.shape) for n, p in mixer.named_parameters()} == {
        "dt_bias": (4,), "A_log": (4,), "D": (4,), "in_proj.weight": (32 + 32 + 2 * 16 + 4, 16), "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,), "norm.weight": (32,), "out_proj.weight": (16, 32)}


def test_initial_step_sizes_and_decay_rates_are_those_of_the_paper():
    torch.manual_seed(0)
    dt, rates = F.softplus(initial_dt_bias(10_000)), Mamba2(Mamba2Config()).A_log.exp()
    assert .00099 < dt.min() and dt.max() < .1001 and abs(dt.log().mean() - math.log(.01)) < .05
    assert rates.min() >= 1 and rates.max() <= 16


def test_norms_biases_decays_and_skip_weights_are_exempt_from_weight_decay():
    block = Mamba2Block(SMALL, mlp=8)
    exempt = {n for n, p in block.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert exempt == {"norm1.weight", "norm2.weight", "mixer.norm.weight", "mixer.dt_bias", "mixer.A_log", "mixer.D",
                      "mixer.conv1d.bias"}


@pytest.mark.parametrize("function, shapes, more", [
    (FusedRMSNorm, ((2, 3, 2, 5), (2, 5)), (1e-5,)), (DepthwiseConv, ((2, 7, 3), (3, 1, 4), (3,)), ())],
    ids=["norm", "convolution"])
def test_hand_written_gradients_match_finite_differences(function, shapes, more):
    inputs = [normal(*shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function.apply, (*inputs, *more))
    assert torch.autograd.gradgradcheck(function.apply, (*inputs, *more))


@pytest.mark.parametrize("size, steepness", [(1e15, 1.), (1e3, 1e36)], ids=["large inputs", "large gradients"])
def test_the_norm_neither_overflows_nor_loses_precision_in_float32(size, steepness):
    inputs, grads = [normal(2, 3, 2, 5) * size, normal(2, 5, seed=1)], []
    for dtype in (torch.float32, torch.float64):
        leaves = [v.to(dtype).requires_grad_() for v in inputs]
        grads.append(torch.autograd.grad(FusedRMSNorm.apply(*leaves, 1e-5).sum() * steepness, leaves))
    assert all(relative_error(got, due) < 1e-5 for got, due in zip(*grads))


def test_the_norm_is_gated_grouped_and_float32_under_autocast():
    x = normal(2, 5, 8).float()
    plain = RMSNorm(8)(x)
    assert torch.allclose(RMSNorm(8)(3 * x).square().mean(-1), torch.ones(2, 5), atol=1e-3)
    assert torch.allclose(RMSNorm(8)(x, torch.full_like(x, 40.)), plain, atol=1e-4), "an open gate"
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(RMSNorm(8)(x), plain)
    halves = torch.cat([RMSNorm(4)(part) for part in x.split(4, -1)], -1)
    assert torch.allclose(RMSNorm(8, groups=2)(x), halves, atol=1e-6)


CONV = dict(x=torch.zeros(2, 5, 6), weight=torch.zeros(6, 1, 4), bias=torch.zeros(6), past=torch.zeros(2, 6, 3))


@pytest.mark.parametrize("change, message", [
    (dict(past=torch.zeros(2, 6, 5)), "past has shape (2, 6, 5); with x (2, 5, 6) expected (2, 6, 3)"),
    (dict(bias=torch.zeros(1)), "bias has shape (1,)"), (dict(weight=torch.zeros(1, 1, 4)), "weight has shape (1, 1, 4)"),
    (dict(x=torch.zeros(5, 6)), "need three axes"), (dict(past=[]), "past is list; expected a torch.Tensor")],
    ids=["past", "bias", "weight", "axes", "type"])
def test_a_wrong_argument_of_the_convolution_is_named(change, message):
    causal_conv(**CONV)
    with pytest.raises(ValueError, match=re.escape(message)): causal_conv(**(CONV | change))


def _conv_case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    "Inputs in `dtype`, weights and an empty past in float32."
    return normal(2, 11, 6).to(dtype), normal(6, 1, 4, seed=1).float(), normal(6, seed=2).float(), torch.zeros(2, 6, 3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)], ids=str)
def test_the_convolution_matches_pytorch(dtype, tolerance):
    x, w, bias, past = _conv_case(dtype)
    one, two = x.clone().requires_grad_(), x.double().requires_grad_()
    got = causal_conv(one, w, bias, past)[0]
    due = F.conv1d(F.pad(two.transpose(1, 2), (3, 0)), w.double(), bias.double(), groups=6).transpose(1, 2)
    assert got.dtype == dtype and relative_error(got, due) < tolerance
    grads = [torch.autograd.grad(v.square().sum(), u)[0] for v, u in ((got.float(), one), (due, two))]
    assert relative_error(*grads) < 2 * tolerance


def test_the_convolution_in_two_chunks_equals_one_pass():
    x, w, bias, none = _conv_case()
    whole, end = causal_conv(x, w, bias, none)
    first, between = causal_conv(x[:, :2], w, bias, none)
    second, last = causal_conv(x[:, 2:], w, bias, between)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-6) and torch.equal(last, end)


def test_the_past_of_the_convolution_keeps_no_inputs_alive():
    assert causal_conv(*_conv_case())[1].untyped_storage().nbytes() == 2 * 6 * 3 * 4


def test_a_reset_restarts_the_convolution():
    x, w, bias, none = _conv_case()
    past, reset = normal(2, 6, 3, seed=3).float(), torch.zeros(2, 11, dtype=torch.bool)
    reset[0, 4] = reset[1, 0] = reset[1, 9] = True
    y, end = causal_conv(x, w, bias, past, reset)
    alone = lambda stream, first, last: causal_conv(x[stream:stream + 1, first:last], w, bias, none[:1])
    for stream, first, last in ((0, 4, 11), (1, 0, 9), (1, 9, 11)):
        assert torch.allclose(y[stream, first:last], alone(stream, first, last)[0][0], atol=1e-6)
    assert torch.equal(end[1], alone(1, 9, 11)[1][0])
    assert torch.equal(y[:1, :4], causal_conv(x, w, bias, past)[0][:1, :4]), "before the reset, the past counts"


def test_the_fused_convolution_falls_back_to_the_plain_one():
    x, w, bias, past = _conv_case()
    assert torch.equal(causal_conv_silu(x, w, bias, past, None, "auto")[0], F.silu(causal_conv(x, w, bias, past)[0]))


# --- the whole layer ------------------------------------------------------------------------------------------------------


def test_a_mixer_loads_weights_laid_out_as_in_mamba_ssm():
    "Compared with the formulas of that class, at odd sizes."
    d, n, inner, h, groups, width, r = 24, 10, 48, 6, 2, 3, torch.Generator().manual_seed(3)
    draw = lambda *s: torch.randn(*s, generator=r, dtype=torch.float64)
    channels = inner + 2 * groups * n
    w = {"dt_bias": draw(h), "A_log": draw(h), "D": draw(h), "in_proj.weight": draw(inner + channels + h, d),
         "conv1d.weight": draw(channels, 1, width), "conv1d.bias": draw(channels), "norm.weight": draw(inner),
         "out_proj.weight": draw(d, inner)}
    u = draw(2, 33, d)
    z, xbc, dt = (u @ w["in_proj.weight"].T).split([inner, channels, h], -1)
    xbc = F.conv1d(xbc.transpose(1, 2), w["conv1d.weight"], w["conv1d.bias"], padding=width - 1, groups=channels)
    x, B, C = F.silu(xbc[..., :33].transpose(1, 2)).split([inner, groups * n, groups * n], -1)
    x, B, C = x.unflatten(-1, (h, -1)), B.unflatten(-1, (groups, n)), C.unflatten(-1, (groups, n))
    y = ssd_reference(x, F.softplus(dt + w["dt_bias"]), -w["A_log"].exp(), B, C, w["D"])[0].flatten(2)
    y = (y * F.silu(z)).unflatten(-1, (groups, -1))  # the gate, then one norm per group: norm_before_gate is False
    y = (y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2) * w["norm.weight"]
    mixer = Mamba2(Mamba2Config.from_weights(w, ngroups=groups)).double()
    mixer.load_state_dict(w)
    assert relative_error(mixer(u)[0], y @ w["out_proj.weight"].T) < 1e-12


def _truncated(m: Mamba2, u: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    "Loss and gradients with the state detached between chunks."
    state, loss = None, 0.
    for part in u.split(lengths, 1):
        y, state = m(part, state)
        loss, state = loss + y.square().sum(), detach(state)
    return [loss, *torch.autograd.grad(loss, list(m.parameters()))]


def _truncated_by_hand(m: Mamba2, u: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    "The same from the formulas, step by step; only values, no graph, cross a chunk boundary."
    h, window, loss, at = torch.zeros(2, 4, 8, 8).double(), torch.zeros(2, 3, 64).double(), 0., 0
    for length in lengths:
        h, window = (torch.tensor(v.tolist(), dtype=torch.float64) for v in (h, window))
        for i in range(at, at + length):
            z, xbc, dt = m.in_proj(u[:, i]).split([32, 64, 4], -1)
            window = torch.cat([window, xbc[:, None]], 1)  # (b, 4, channels)
            x, B, C = F.silu((window * m.conv1d.weight[:, 0].T).sum(1) + m.conv1d.bias).split([32, 16, 16], -1)
            window, dt = window[:, 1:], F.softplus(dt + m.dt_bias)
            x, B, C = x.unflatten(-1, (4, 8)), *(v.unflatten(-1, (2, 8)).repeat_interleave(2, 1) for v in (B, C))
            h = h * torch.exp(-dt * m.A_log.exp())[..., None, None] + (dt[..., None] * x)[..., None] * B[:, :, None]
            y = ((h * C[:, :, None]).sum(-1) + m.D[:, None] * x).flatten(1) * F.silu(z)
            y = y.unflatten(-1, (2, 16))
            y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * m.norm.weight
            loss = loss + m.out_proj(y).square().sum()
        at += length
    return [loss, *torch.autograd.grad(loss, list(m.parameters()))]


@pytest.mark.parametrize("lengths", [[7, 1, 20, 17], [45]], ids=["chunks", "one chunk"])
def test_detached_chunks_give_the_gradient_of_a_graph_cut_by_hand(lengths):
    torch.manual_seed(0)
    mixer = Mamba2(Mamba2Config(d_model=16, d_state=8, headdim=8, ngroups=2, chunk=8)).double()
    u = normal(2, 45, 16)
    got, due = _truncated(mixer, u, lengths), _truncated_by_hand(mixer, u, lengths)
    assert all(relative_error(*pair) < 1e-12 for pair in zip(got, due))


def test_decays_stay_in_float32_under_autocast(monkeypatch):
    plain, seen = ssd.chunk_decays, {}
    def recorded(dA, reset=None):
        made = plain(dA, reset)
        seen.update(dA=dA.dtype, **{n: v.dtype for n, v in made._asdict().items()})
        return made
    monkeypatch.setattr(ssd, "chunk_decays", recorded)
    with torch.autocast("cpu", dtype=torch.bfloat16): Mamba2(SMALL)(torch.zeros(2, 9, 8))
    assert len(seen) == 7 and set(seen.values()) == {torch.float32}


def test_inputs_that_are_not_finite_are_named_under_debug():
    with debug(), pytest.raises(ValueError, match=r"u of shape \(2, 5, 8\) is -?inf"):
        Mamba2(SMALL)(normal(2, 5, 8).float() / 0)


def test_a_block_refuses_a_single_channel():
    with pytest.raises(ValueError, match=r"u has shape \(2, 5, 1\); expected \(batch, time, 8\)"):
        Mamba2Block(SMALL, mlp=8)(torch.zeros(2, 5, 1))
