"State across chunks: any chunking equals one pass, gradients flow through chunks, wrong arguments and damaged files are refused."
import json
import math
import re
import struct
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import check_message
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cryptopredict.bptt import bptt_chunks, span_backward
from cryptopredict.mamba2_block import Mamba2, Mamba2Config, Mamba2State
from cryptopredict.mhsa import MHSA, HybridState, KVCache, MHSAConfig
from cryptopredict.multitask import MeanState, ModelConfig, ModelState, MultitaskModel
from cryptopredict.ssd import ssd_reference, ssd_scan
from cryptopredict.states import detach, load_state, map_state, save_state

SEED = st.integers(0, 10**6)
EXACT = 1e-10  # largest relative error of a tensor in float64


def _examples(n: int) -> settings:
    "Settings for `n` examples, the same in every run."
    return settings(max_examples=n, derandomize=True, deadline=None, database=None)


pytestmark = pytest.mark.usefixtures("one_thread")


# --- what the tests share -------------------------------------------------------------------------------------------------


@st.composite
def _cuts(draw, length: int) -> list[int]:
    "Lengths of the parts of a series: single steps, the whole, or anything between."
    if draw(st.integers(0, 4)) == 0: return [1] * length
    ends = sorted({*draw(st.sets(st.integers(1, length), max_size=8)), length})
    return [b - a for a, b in zip([0, *ends], ends)]


@st.composite
def _resets(draw, batch: int, length: int, some: bool = False) -> Tensor | None:
    "A reset mask (b, t) of random density, or None (never with `some`)."
    share, seed = draw(st.sampled_from([.3, .1, .5, 1.] if some else [None, 0., .05, .3, 1.])), draw(SEED)
    return None if share is None else torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share


def _tensors(state) -> list[Tensor]:
    "The tensors of a state or of any nesting of tuples and lists."
    if isinstance(state, Tensor): return [state]
    return [v for part in state for v in _tensors(part)]


def _floats(state) -> list[Tensor]:
    return [v for v in _tensors(state) if v.is_floating_point()]


def _relative_error(got: Tensor | None, due: Tensor | None, least: float = 0.) -> float:
    "Norm of the difference over that of `due`, at least `least`. None is a gradient of zero; any error of zero is infinite."
    if got is None or due is None: return 0. if got is due else math.inf * bool((due if got is None else got).any())
    if got.shape != due.shape or got.dtype != due.dtype: return math.inf
    apart, size = (got.double() - due.double()).norm().item(), max(due.double().norm().item(), least)
    if not math.isfinite(apart): return math.inf
    return 0. if not apart else apart / size if size else math.inf


def _same(got: dict, due: dict, tolerance: float = EXACT, **least: float) -> None:
    "Check that the tensors of two dicts agree; `least` gives, by name, the smallest norm that errors are relative to."
    assert got.keys() == due.keys()
    for name, value in due.items():
        off = _relative_error(got[name], value, least.get(name, 0.))
        assert off <= tolerance, f"{name} is off by {off:.1e}"


def _named(name: str, values) -> dict[str, Tensor]:
    return {f"{name}[{k}]": v for k, v in enumerate(_tensors(values))}


def _weighted(values: list[Tensor], seed: int) -> Tensor:
    "A scalar that depends on every float: a sum with random weights."
    g = torch.Generator().manual_seed(seed)
    return sum((v * torch.randn(v.shape, generator=g, dtype=torch.float64).to(v.dtype)).sum() for v in values)


def _grads(scalar: Tensor, leaves: dict[str, Tensor], keep: bool = False) -> dict[str, Tensor]:
    "Gradients by name, None for unused leaves."
    grads = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True, retain_graph=keep)
    return dict(zip((f"gradient of {n}" for n in leaves), grads))


def _perturbed(module: nn.Module, seed: int, size: float = .3) -> nn.Module:
    "The module in float64 with noise on every parameter, since zeros and ones hide errors."
    g = torch.Generator().manual_seed(seed)
    for p in module.double().parameters(): p.data += size * torch.randn(p.shape, generator=g, dtype=torch.float64)
    return module


def _in_parts(forward, u: Tensor, lengths: list[int], state, reset: Tensor | None) -> tuple[list, object]:
    "Outputs of each part and the last state; the state is not detached between parts."
    resets, outputs = [None] * len(lengths) if reset is None else reset.split(lengths, 1), []
    for part, r in zip(u.split(lengths, 1), resets):
        y, state = forward(part, state, r)
        outputs.append(y)
    return outputs, state


def _joined(outputs: list):
    "Outputs of parts as one along time: tensors, or tuples of them."
    if isinstance(outputs[0], Tensor): return torch.cat(outputs, 1)
    return type(outputs[0])(*(torch.cat(v, 1) for v in zip(*outputs)))


def _module_run(module: nn.Module, u: Tensor, lengths: list[int], state, reset: Tensor | None) -> dict[str, Tensor]:
    "Outputs, last state and all gradients (input, first state, parameters) of a pass in parts."
    u = u.clone().requires_grad_()
    state = None if state is None else map_state(lambda v: v.clone().requires_grad_(v.is_floating_point()), state)
    outputs, last = _in_parts(module, u, lengths, state, reset)
    y = _joined(outputs)
    leaves = dict(u=u, **dict(module.named_parameters()))
    if state is not None: leaves |= {f"state[{k}]": v for k, v in enumerate(_floats(state))}
    scalar = _weighted([*_floats(y), *_floats(last)], 7)
    return {**_named("output", y), **_named("last state", last), **_grads(scalar, leaves)}


def _some_state(module: nn.Module, u: Tensor, seed: int):
    "A non-zero state of the module: that after three steps of noise."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad(): return module(torch.randn(u.shape[0], 3, u.shape[2], generator=g, dtype=u.dtype))[1]


# --- the scan -------------------------------------------------------------------------------------------------------------


class Scan(NamedTuple):
    "Arguments of a scan and how to cut it."
    values: dict[str, Tensor]
    reset: Tensor | None
    chunk: int
    lengths: list[int]


@st.composite
def _scans(draw) -> Scan:
    "A scan of any shape: step sizes up to 10, decay rates down to -1000."
    b, t, g, r = (draw(st.integers(*bounds)) for bounds in ((1, 3), (1, 40), (1, 3), (1, 3)))
    p, n, chunk = (draw(st.integers(*bounds)) for bounds in ((1, 5), (1, 6), (1, 17)))
    rng, h = torch.Generator().manual_seed(draw(SEED)), g * r
    normal = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)
    spread = lambda low, high, *shape: 10 ** (low + (high - low) * torch.rand(shape, generator=rng, dtype=torch.float64))
    dt, A = draw(st.sampled_from([((-3, -1), (-1, 1)), ((-3, 1), (-2, 3)), ((0, 1), (2, 3)), ((-3, 0), (-4, -1))]))
    values = dict(x=normal(b, t, h, p), dt=spread(*dt, b, t, h), A=-spread(*A, h), B=normal(b, t, g, n), C=normal(b, t, g, n))
    if draw(st.booleans()): values["D"] = normal(h)
    if draw(st.booleans()): values["initial_state"] = normal(b, h, p, n)
    return Scan(values, draw(_resets(b, t)), chunk, draw(_cuts(t)))


def _scan_run(scan, case: Scan, lengths: list[int], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    "Outputs, final state and gradients of every argument of a scan in parts."
    leaves = {name: v.to(dtype).requires_grad_() for name, v in case.values.items()}
    A, D, state = leaves["A"], leaves.get("D"), leaves.get("initial_state")
    sequences = [leaves[name].split(lengths, 1) for name in ("x", "dt", "B", "C")]
    resets, ys = [None] * len(lengths) if case.reset is None else case.reset.split(lengths, 1), []
    for x, dt, B, C, r in zip(*sequences, resets):
        y, state = scan(x, dt, A, B, C, D, state, reset=r)
        ys.append(y)
    y = torch.cat(ys, 1)
    return dict(y=y, state=state, **_grads(_weighted([y, state], 3), leaves))


def _least(case: Scan, due: dict[str, Tensor]) -> dict[str, float]:
    """The norm that errors of A's gradient are relative to, from the gradient of dt: both act through dt * A.

    Where the state decays to zero within a step, the gradient of A is only rounding, about 1e-15.
    """
    moved = (due["gradient of dt"] * case.values["dt"]).norm() / case.values["A"].norm()
    return {"gradient of A": moved.item()}


def _chunked(case: Scan):
    "`ssd_scan` with the chunk length of the case."
    return lambda *args, **named: ssd_scan(*args, chunk=case.chunk, backend="torch", **named)


@_examples(150)
@given(_scans())
def test_a_scan_in_parts_equals_one_scan_and_the_recurrence(case):
    due = _scan_run(ssd_reference, case, [sum(case.lengths)])
    assert all(torch.isfinite(v).all() for v in due.values() if v is not None)
    one, parts = (_scan_run(_chunked(case), case, n) for n in ([sum(case.lengths)], case.lengths))
    _same(one, due, **_least(case, due))
    _same(parts, due, **_least(case, due))
    _same(parts, one, **_least(case, due))


@_examples(100)
@given(_scans())
def test_a_scan_in_parts_equals_one_scan_in_float32(case):
    one, parts = (_scan_run(_chunked(case), case, n, torch.float32) for n in ([sum(case.lengths)], case.lengths))
    assert all(torch.isfinite(v).all() for v in one.values() if v is not None)
    _same(parts, one, 1e-5, **_least(case, one))


# --- the mixer ------------------------------------------------------------------------------------------------------------

SIZES = ("d_model", "d_state", "expand", "headdim", "ngroups", "d_conv", "chunk")


@_examples(80)
@given(st.sampled_from(SIZES), st.sampled_from([0, -1, 1.5, True, "4", None]))
def test_a_mixer_refuses_invalid_sizes(name, value):
    with pytest.raises(ValueError, match=name): Mamba2Config(**{name: value})


@_examples(200)
@given(st.fixed_dictionaries({n: st.integers(1, 6) for n in SIZES}))
def test_sizes_that_a_mixer_accepts_run(sizes):
    inner = sizes["expand"] * sizes["d_model"]
    good = inner % sizes["headdim"] == 0 and inner // sizes["headdim"] % sizes["ngroups"] == 0
    if not good:
        with pytest.raises(ValueError, match="headdim|ngroups"): Mamba2Config(**sizes)
        return
    mixer = Mamba2(Mamba2Config(**sizes, backend="torch"))
    y, state = mixer(torch.randn(2, 5, sizes["d_model"]))
    assert y.shape == (2, 5, sizes["d_model"]) and torch.isfinite(y).all()
    assert state.conv.shape == (2, inner + 2 * sizes["ngroups"] * sizes["d_state"], sizes["d_conv"] - 1)


@st.composite
def _mixers(draw, some: bool = False) -> tuple[Mamba2, Tensor, list[int], Tensor | None, Mamba2State | None]:
    "A mixer of any valid sizes, inputs, how to cut them, resets, and a state to start from."
    headdim, groups, per_group = (draw(st.integers(1, high)) for high in (5, 3, 3))
    inner = headdim * groups * per_group
    expand = draw(st.sampled_from([k for k in range(1, inner + 1) if inner % k == 0]))
    d_state, d_conv, chunk, t = (draw(st.integers(1, high)) for high in (5, 9, 9, 24))
    config, seed = Mamba2Config(inner // expand, d_state, expand, headdim, groups, d_conv, chunk, "torch"), draw(SEED)
    mixer = _perturbed(Mamba2(config), seed)
    if draw(st.booleans()): mixer.dt_bias.data += 3  # strong decays
    b = draw(st.integers(1, 3))
    u = torch.randn(b, t, config.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    state = _some_state(mixer, u, seed) if draw(st.booleans()) else None
    return mixer, u, draw(_cuts(t)), draw(_resets(b, t, some)), state


@_examples(80)
@given(_mixers())
def test_a_mixer_in_parts_equals_one_pass(case):
    mixer, u, lengths, reset, state = case
    _same(_module_run(mixer, u, lengths, state, reset), _module_run(mixer, u, [u.shape[1]], state, reset))


@_examples(30)
@given(_mixers())
def test_a_mixer_step_by_step_equals_one_pass(case):
    mixer, u, _, _, start = case
    y, last = mixer(u, start)
    state, ys = start or mixer.init_state(u.shape[0]), []
    for u_t in u.unbind(1):
        y_t, state = mixer.step(u_t, state)
        ys.append(y_t)
    _same(dict(y=torch.stack(ys, 1), **_named("state", state)), dict(y=y, **_named("state", last)))


@_examples(30)
@given(_mixers(some=True))
def test_a_reset_restarts_a_mixer(case):
    mixer, u, _, reset, state = case
    _check_resets(mixer, u, reset, state)


# --- resets as separate runs ----------------------------------------------------------------------------------------------


def _pieces(reset: Tensor) -> list[tuple[int, int]]:
    "Begin and end of the series in one stream, from its resets (t,); the first may be empty."
    begins = [0, *torch.nonzero(reset)[:, 0].tolist()]
    return list(zip(begins, [*begins[1:], len(reset)]))


def _check_resets(module: nn.Module, u: Tensor, reset: Tensor, state) -> None:
    "Check that a pass with resets equals separate runs of the pieces: the first from the given state, later ones from none."
    leaves = dict(u=u.requires_grad_(), **dict(module.named_parameters()))
    due, last = module(u, state, reset)
    stream = lambda values, k: map_state(lambda v: v[k:k + 1], values)
    for k in range(u.shape[0]):
        piece_state, ys = None if state is None else stream(state, k), []
        for n, (begin, end) in enumerate(_pieces(reset[k])):
            if n: piece_state = None
            if begin == end: continue
            y, piece_state = module(u[k:k + 1, begin:end], piece_state)
            ys.append(y)
        one, alone = (stream(due, k), stream(last, k)), (_joined(ys), piece_state)
        _same(_named("part", alone), _named("part", one))
        _same(*(_grads(_weighted(_floats(v), 9), leaves, keep=True) for v in (alone, one)))


# --- attention ------------------------------------------------------------------------------------------------------------


def _turn(x: Tensor, at: Tensor, base: float) -> Tensor:
    "Rotary embedding as complex multiplication: x (t, d), pairs (i, i + d/2)."
    half = x.shape[-1] // 2
    z = torch.complex(x[:, :half], x[:, half:])
    z = z * torch.exp(1j * at.double()[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half))
    return torch.cat([z.real, z.imag], 1)


def _plain_attention(m: MHSA, u: Tensor, reset: Tensor | None) -> tuple[Tensor, KVCache]:
    "Attention query by query, over the steps of its series within the window; and the cache after the last step."
    c, (b, t, width), heads = m.cfg, u.shape, []
    d, w = width // c.n_heads, c.kv_window
    k_left, v_left = (u.new_zeros(b, c.n_heads, w, d) for _ in range(2))
    begins = torch.zeros(b, t + 1, dtype=torch.int64)  # of the series of each step
    for s in range(b):
        for i in range(t): begins[s, i + 1] = i if reset is not None and reset[s, i] else begins[s, i]
    seen = torch.minimum(torch.tensor(w), t - begins[:, -1])
    for s in range(b):
        for h in range(c.n_heads):
            q, k, v = (u[s] @ m.qkv.weight[j * width + h * d:j * width + (h + 1) * d].T for j in range(3))
            at, rows = torch.arange(t), []
            turned_q, turned_k = _turn(q, at, c.base), _turn(k, at, c.base)
            for i in range(t):
                low = max(int(begins[s, i + 1]), i - w)
                rows.append(torch.softmax(turned_k[low:i + 1] @ turned_q[i] / d ** .5, 0) @ v[low:i + 1])
            heads.append(torch.stack(rows))
            n = int(seen[s])
            k_left[s, h, w - n:], v_left[s, h, w - n:] = k[t - n:].detach(), v[t - n:].detach()
    y = torch.stack(heads).unflatten(0, (b, c.n_heads)).permute(0, 2, 1, 3).flatten(2)
    return y @ m.out_proj.weight.T, KVCache(k_left, v_left, seen)


@st.composite
def _attentions(draw, longest: int = 30, some: bool = False):
    "Attention with any window and block, inputs, how to cut them, and resets."
    heads, half, b, t = (draw(st.integers(1, high)) for high in (3, 3, 3, longest))
    window, block, seed = draw(st.integers(0, 20)), draw(st.integers(1, 9)), draw(SEED)
    kernel = draw(st.sampled_from(["sdpa", "reference"]))
    m = _perturbed(MHSA(MHSAConfig(2 * half * heads, heads, window, block, draw(st.sampled_from([10., 1e4])), kernel)), seed)
    u = torch.randn(b, t, m.cfg.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return m, u, draw(_cuts(t)), draw(_resets(b, t, some))


@_examples(40)
@given(_attentions(longest=20))
def test_attention_equals_plain_attention_within_the_window(case):
    m, u, lengths, reset = case
    inputs = u.clone().requires_grad_()
    y, cache = _plain_attention(m, inputs, reset)
    leaves = dict(u=inputs, **dict(m.named_parameters()))
    due = dict(y=y, **_named("cache", cache), **_grads(_weighted([y], 5), leaves))
    outputs, cache = _in_parts(m, inputs, lengths, None, reset)
    y = _joined(outputs)
    _same(dict(y=y, **_named("cache", cache), **_grads(_weighted([y], 5), leaves)), due)


@_examples(80)
@given(_attentions(), st.booleans())
def test_attention_in_parts_equals_one_pass(case, begun):
    m, u, lengths, reset = case
    state = _some_state(m, u, 1) if begun else None
    _same(_module_run(m, u, lengths, state, reset), _module_run(m, u, [u.shape[1]], state, reset))


@_examples(30)
@given(_attentions(some=True), st.booleans())
def test_a_reset_restarts_attention(case, begun):
    m, u, _, reset = case
    _check_resets(m, u, reset, _some_state(m, u, 1) if begun else None)


# --- the whole model ------------------------------------------------------------------------------------------------------


# Every kind of model is a case of its own: hypothesis would draw some kinds rarely.
EVERY_KIND = pytest.mark.parametrize("kind", [(p, e) for p in ("last", "mean", "attention") for e in (0, 1, 2)],
                                     ids=lambda k: f"{k[0]}-{k[1]}")


@st.composite
def _configs(draw, kind: tuple[str, int], dropout=st.just(0.)) -> ModelConfig:
    "A tiny model; `kind` is its pooling and `attention_every`."
    anchored, heads = draw(st.booleans()), draw(st.sampled_from([1, 2]))
    return ModelConfig(
        n_features=draw(st.integers(1, 3)) + anchored, d_model=4, n_layers=draw(st.integers(max(1, kind[1]), 3)), expand=2, mlp=3,
        d_state=draw(st.integers(1, 4)), headdim=draw(st.sampled_from([1, 2, 4])), ngroups=draw(st.sampled_from([1, 2])),
        d_conv=draw(st.integers(1, 5)), chunk=draw(st.integers(1, 9)), n_heads=heads, kv_window=draw(st.integers(0, 6)),
        attention_every=kind[1], pooling=kind[0],
        pool_window=draw(st.integers(0, 6)), anchored=anchored, dropout=draw(dropout), backend="torch")


def _model(config: ModelConfig, seed: int = 0) -> MultitaskModel:
    torch.manual_seed(seed)
    return _perturbed(MultitaskModel(config), seed).eval()


def _features(model: MultitaskModel, b: int, t: int, seed: int) -> Tensor:
    g, like = torch.Generator().manual_seed(seed), model.embed.weight
    return torch.randn(b, t, model.cfg.n_features, generator=g, dtype=torch.float64).to(like.dtype)


@st.composite
def _models(draw, kind: tuple[str, int], some: bool = False):
    "A tiny model, features, how to cut them, resets, and a state to start from."
    model, (b, t) = _model(draw(_configs(kind)), draw(SEED)), (draw(st.integers(1, 3)), draw(st.integers(1, 16)))
    x = _features(model, b, t, draw(SEED))
    return model, x, draw(_cuts(t)), draw(_resets(b, t, some)), _some_state(model, x, 1) if draw(st.booleans()) else None


@EVERY_KIND
@_examples(14)
@given(data=st.data())
def test_a_model_in_parts_equals_one_pass(kind, data):
    model, x, lengths, reset, state = data.draw(_models(kind))
    _same(_module_run(model, x, lengths, state, reset), _module_run(model, x, [x.shape[1]], state, reset))


@EVERY_KIND
@_examples(6)
@given(data=st.data())
def test_a_model_step_by_step_equals_one_pass(kind, data):
    model, x, _, _, start = data.draw(_models(kind))
    due, last = model(x, start)
    state, steps = start or model.init_state(x.shape[0]), []
    for x_t in x.unbind(1):
        forecast, state = model.step(x_t, state)
        steps.append(map_state(lambda v: v[:, None], forecast))
    _same({**_named("y", _joined(steps)), **_named("state", state)}, {**_named("y", due), **_named("state", last)})


@EVERY_KIND
@_examples(8)
@given(data=st.data())
def test_a_reset_restarts_a_model(kind, data):
    model, x, _, reset, state = data.draw(_models(kind, some=True))
    _check_resets(model, x, reset, state)


@EVERY_KIND
@_examples(6)
@given(data=st.data(), single=st.booleans())
def test_a_pass_from_a_saved_state_is_bit_identical(tmp_path_factory, kind, data, single):
    model, x, lengths, reset, state = data.draw(_models(kind))
    if single: model, x, state = model.float(), x.float(), state and _narrow(model, state)
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    resets, other = [None] * len(lengths) if reset is None else reset.split(lengths, 1), state
    for part, r in zip(x.split(lengths, 1), resets):
        (one, state), (two, other) = model(part, state, r), model(part, other, r)
        save_state(other, path)
        other = load_state(path, model.init_state(1))
        assert _structure(other) == _structure(state)
        pairs = zip(_tensors((one, state)), _tensors((two, other)))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
        assert not any(v.requires_grad for v in _tensors(other))


def _narrow(model: MultitaskModel, state: ModelState) -> ModelState:
    "A state with the dtypes that the model uses."
    types = iter([v.dtype for v in _tensors(model.init_state(1))])
    return map_state(lambda v: v.to(next(types)), state)


def _structure(state):
    "Nesting, shapes and types of a state."
    if isinstance(state, Tensor): return tuple(state.shape), state.dtype
    return type(state), tuple(_structure(s) for s in state)


@EVERY_KIND
@_examples(6)
@given(data=st.data())
def test_detach_leaves_values_and_cuts_the_graph(kind, data):
    model, x, lengths, reset, start = data.draw(_models(kind))
    _, state = model(x, start, reset)
    cut = detach(state)
    assert _structure(cut) == _structure(state)
    assert all(torch.equal(a, b) and not a.requires_grad and a.grad_fn is None for a, b in zip(_tensors(cut), _tensors(state)))
    numbers = map_state(lambda v: torch.tensor(v.tolist(), dtype=v.dtype).reshape(v.shape), state)
    runs = []
    for begin in (cut, numbers):
        y, last = model(x, begin)
        runs.append(_grads(_weighted([*_floats(y), *_floats(last)], 2), dict(model.named_parameters())))
    _same(*runs)


# --- gradients through all chunks -----------------------------------------------------------------------------------------


class Part(NamedTuple):
    "A chunk of features and the seed of its loss; None: it has no loss."
    x: Tensor
    seed: int | None


@st.composite
def _trainings(draw, kind: tuple[str, int]):
    "A model in training mode, its chunks, the seed of dropout, and a state to start from."
    dropout = st.sampled_from([0., .1, .5])
    model, b = _model(draw(_configs(kind, dropout)), draw(SEED)), draw(st.integers(1, 2))
    x, lengths = _features(model, b, draw(st.integers(1, 14)), draw(SEED)), None
    lengths = draw(_cuts(x.shape[1]))
    seeds = draw(st.lists(st.one_of(st.none(), SEED, SEED), min_size=len(lengths), max_size=len(lengths)))
    state = _some_state(model, x, 1) if draw(st.booleans()) else None
    return model.train(), [Part(*p) for p in zip(x.split(lengths, 1), seeds)], draw(SEED), state


def _loss(forecast, part: Part) -> Tensor | None:
    return None if part.seed is None else _weighted(list(forecast), part.seed)


def _gradients(model: nn.Module, run, seed: int) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    "Gradients of the parameters after `run`, the state it returns, and the state of the random generator."
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    state = run()
    return {n: p.grad for n, p in model.named_parameters()}, _named("state", state), torch.get_rng_state()


def _full(model: nn.Module, parts: list[Part], state, through: int):
    "Backpropagate through the graph of `through` chunks, then of the next ones."
    for k in range(0, len(parts), through):
        total, state = 0., None if state is None else detach(state)
        for part in parts[k:k + through]:
            forecast, state = model(part.x, state)
            if part.seed is not None: total = total + _loss(forecast, part)
        if isinstance(total, Tensor): total.backward()
    return detach(state)


def _exact(model: nn.Module, parts: list[Part], state, through: int):
    "Call `span_backward` on groups of `through` chunks, each from the last state of the group before."
    for k in range(0, len(parts), through):
        state = span_backward(lambda part, state: model(part.x, state), _loss, parts[k:k + through], state)
        assert not any(v.requires_grad for v in _tensors(state))
    return state


@EVERY_KIND
@_examples(14)
@given(data=st.data(), through=st.one_of(st.none(), st.integers(1, 5)))
def test_span_backward_is_the_gradient_of_the_full_graph(kind, data, through):
    model, parts, seed, state = data.draw(_trainings(kind))
    before = None if state is None else map_state(lambda v: v.clone().requires_grad_(v.is_floating_point()), state)
    through = through or len(parts)
    got = _gradients(model, lambda: _exact(model, parts, before, through), seed)
    due = _gradients(model, lambda: _full(model, parts, state, through), seed)
    _same(got[0], due[0])
    _same(got[1], due[1])
    assert torch.equal(got[2], due[2]), "the random generator is in the same state as without `span_backward`"
    if before is not None: assert all(v.grad is None for v in _tensors(before)), "no gradient flows into the first state"


@_examples(150)
@given(st.one_of(st.text("spanexctrud:0123456789 -+._²٣", max_size=9), st.integers(-9, 10**8).map("span:{}".format),
                 st.sampled_from(["exact", "truncated", "span", "span:", "span:01", "span:1:2", "", None, 3])))
def test_bptt_accepts_three_forms(text):
    due = {"exact": None, "truncated": 1}
    if isinstance(text, str) and re.fullmatch("span:[0-9]+", text) and 1 <= int(text[5:]) <= 10**6: due[text] = int(text[5:])
    if text in due: assert bptt_chunks(text) == due[text]
    else:
        with pytest.raises(ValueError, match="bptt"): bptt_chunks(text)


# --- wrong arguments ------------------------------------------------------------------------------------------------------

WRONG = dict(  # changes to a tensor with axes (batch, ...)
    flat=lambda v: v[0], deeper=lambda v: v[None], more_channels=lambda v: torch.cat([v, v[..., :1]], -1),
    fewer_channels=lambda v: v[..., :-1], more_streams=lambda v: torch.cat([v, v[:1]]), no_stream=lambda v: v[:0],
    no_time=lambda v: v[:, :0], meta=lambda v: v.to("meta"), double=Tensor.double, half=Tensor.half, integer=Tensor.long,
    boolean=Tensor.bool, complex=lambda v: v.to(torch.complex64))
DTYPES = ("double", "half", "integer", "boolean", "complex")
INPUT = [k for k in WRONG if k != "more_streams"]
STATE = [k for k in WRONG if k != "no_time"]


def _refused(name: str, call) -> None:
    "Check that `call` raises a `ValueError` that names the argument (or one of several, as a pattern)."
    with pytest.raises(ValueError) as refused: call()
    assert re.search(rf"\b({name})\b", str(refused.value)), f"{name} is not named: {refused.value}"


def _scan_values() -> dict[str, Tensor]:
    b, t, h, p, n = 2, 5, 2, 3, 4
    shapes = dict(x=(b, t, h, p), dt=(b, t, h), A=(h,), B=(b, t, 1, n), C=(b, t, 1, n), D=(h,), initial_state=(b, h, p, n))
    return {k: torch.rand(s) * (-1 if k == "A" else 1) for k, s in shapes.items()}


SCANNED = list(_scan_values())


@_examples(150)
@given(st.sampled_from(SCANNED), st.sampled_from([k for k in WRONG if k not in DTYPES]))
def test_a_scan_refuses_wrong_shapes_and_devices(name, wrong):
    if name in ("A", "D") and wrong == "no_time": return
    if name == "x" and wrong in ("more_streams", "more_channels", "fewer_channels"): return  # sets the sizes
    values, named = _scan_values(), name
    values[name] = WRONG[wrong](values[name])
    if name == "B" and wrong in ("more_channels", "fewer_channels"): named = "C"  # d_state is taken from B
    _refused(named, lambda: ssd_scan(**values, backend="torch"))


@_examples(60)
@given(st.sampled_from(SCANNED), st.sampled_from(DTYPES))
def test_a_scan_refuses_wrong_dtypes(name, wrong):
    "Other float dtypes are accepted except for the state, since autocast produces them."
    if wrong in ("double", "half") and name != "initial_state": return
    values = _scan_values()
    values[name] = WRONG[wrong](values[name])
    _refused(name, lambda: ssd_scan(**values, backend="torch"))


RESETS = dict(shorter=lambda r: r[:, :-1], flat=lambda r: r[0], deeper=lambda r: r[..., None], other_streams=lambda r: r[:1],
              turned=lambda r: r.T, integer=Tensor.long, floats=Tensor.float, bytes=lambda r: r.to(torch.uint8),
              meta=lambda r: r.to("meta"), no_time=lambda r: r[:, :0])


def _tiny(pooling: str, every: int, d_conv: int, kv_window: int = 5, pool_window: int = 5) -> ModelConfig:
    "A model of two blocks, four channels wide."
    return ModelConfig(n_features=3, d_model=4, n_layers=2, expand=2, d_state=3, headdim=2, ngroups=2, d_conv=d_conv, chunk=4,
                       mlp=4, dropout=0., attention_every=every, n_heads=2, kv_window=kv_window, backend="torch",
                       pooling=pooling, pool_window=pool_window)


def _callables() -> dict:
    "Name -> (module, name of its input, name of its state, a valid input)."
    torch.manual_seed(0)
    mixer = Mamba2(Mamba2Config(4, 3, 2, 2, 2, 3, 4, "torch"))
    attention = MHSA(MHSAConfig(4, 2, 5, 3))
    made = dict(mixer=(mixer, "u", "state", 4), attention=(attention, "u", "cache", 4))
    for pooling, every in (("last", 0), ("mean", 2), ("attention", 1)):
        made[f"model_{pooling}"] = (MultitaskModel(_tiny(pooling, every, d_conv=3, pool_window=4)).eval(), "x", "state", 3)
    return {k: (m, name, held, torch.randn(2, 6, n)) for k, (m, name, held, n) in made.items()}


CALLABLES = _callables()


@_examples(100)
@given(st.sampled_from(list(CALLABLES)), st.sampled_from(INPUT), st.booleans())
def test_a_module_refuses_wrong_inputs(kind, wrong, begun):
    module, name, _, good = CALLABLES[kind]
    state = _some_state(module, good, 0) if begun else None
    _refused(name, lambda: module(WRONG[wrong](good), state))


@_examples(80)
@given(st.sampled_from(["scan", *CALLABLES]), st.sampled_from(list(RESETS)))
def test_a_module_refuses_wrong_resets(kind, wrong):
    reset = RESETS[wrong](torch.zeros(2, 6, dtype=torch.bool))
    if kind == "scan":
        x, dt, A, B = torch.randn(2, 6, 2, 3), torch.rand(2, 6, 2), -torch.rand(2), torch.randn(2, 6, 1, 4)
        _refused("reset", lambda: ssd_scan(x, dt, A, B, B, reset=reset, backend="torch"))
    else:
        module, _, _, good = CALLABLES[kind]
        _refused("reset", lambda: module(good, None, reset))


def _spoilt(state, place: int, change):
    "The state with one of its tensors changed."
    count = iter(range(len(_tensors(state))))
    def spoil(part):
        if isinstance(part, Tensor): return change(part) if next(count) == place else part
        parts = [spoil(p) for p in part]
        return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
    return spoil(state)


@_examples(200)
@given(st.sampled_from(list(CALLABLES)), st.sampled_from([*STATE, "nothing"]), st.integers(0, 99))
def test_a_module_refuses_a_wrong_part_of_a_state(kind, wrong, place):
    module, _, _, good = CALLABLES[kind]
    state = _some_state(module, good, 0)
    place %= len(_tensors(state))
    part = _tensors(state)[place]
    if wrong == "double" and part.dtype == torch.float64 or wrong == "integer" and part.dtype == torch.int64: wrong = "half"
    change = (lambda v: None) if wrong == "nothing" else WRONG[wrong]
    _refused("state|cache", lambda: module(good, _spoilt(state, place, change)))


@_examples(30)
@given(st.sampled_from(list(CALLABLES)), st.integers(0, 99))
def test_a_module_names_its_own_argument(kind, place):
    "The message names the argument of the call, not a cache inside the state."
    module, _, held, good = CALLABLES[kind]
    state = _some_state(module, good, 0)
    _refused(held, lambda: module(good, _spoilt(state, place % len(_tensors(state)), WRONG["more_streams"])))


@_examples(100)
@given(st.sampled_from(list(CALLABLES)), st.sampled_from(list(CALLABLES)), st.integers(0, 3))
def test_a_module_refuses_the_state_of_another(kind, other, how):
    module, _, held, good = CALLABLES[kind]
    state = _some_state(CALLABLES[other][0], CALLABLES[other][3], 0)
    if how == 1 and isinstance(state, ModelState): state = ModelState(state.blocks[:1], state.pool)
    elif how == 2: state = tuple(state)
    elif how == 3: state = list(state)
    elif kind == other: return
    _refused(f"{held}|cache", lambda: module(good, state))


FOREIGN = dict(none=None, empty=(), number=3, mixer=CALLABLES["mixer"][0].init_state(2), hybrid=HybridState(None, None),
               cache=CALLABLES["attention"][0].init_state(2), mean=MeanState(torch.zeros(2, 4).double(), torch.ones(2, 1)))


def _refuses_foreign(kind: str, place: int, foreign: str) -> None:
    "Check that a model refuses a state whose block, or pooling (place 2), is something else."
    module, _, _, good = CALLABLES[kind]
    parts = [*(state := _some_state(module, good, 0)).blocks, state.pool]
    if type(FOREIGN[foreign]) is type(parts[place]): return
    parts[place] = FOREIGN[foreign]
    _refused("state|cache", lambda: module(good, ModelState(tuple(parts[:2]), parts[2])))


MODELS = [k for k in CALLABLES if k.startswith("model")]


@_examples(60)
@given(st.sampled_from(MODELS), st.integers(0, 1), st.sampled_from([k for k in FOREIGN if k != "none"]))
def test_a_model_refuses_a_foreign_block(kind, place, foreign):
    _refuses_foreign(kind, place, foreign)


@_examples(60)
@given(st.sampled_from(MODELS), st.sampled_from([k for k in FOREIGN if k != "none"]))
def test_a_model_refuses_a_foreign_pool(kind, foreign):
    _refuses_foreign(kind, 2, foreign)


@_examples(20)
@given(st.sampled_from(MODELS), st.integers(0, 2))
def test_a_model_refuses_a_state_with_a_missing_part(kind, place):
    "None in place of a part is refused: silently starting that part afresh would go unnoticed."
    _refuses_foreign(kind, place, "none")


# --- files ----------------------------------------------------------------------------------------------------------------


class Saved(NamedTuple):
    "A state, another of the same structure, its file, and the bytes of the file."
    state: ModelState
    like: ModelState
    path: Path
    data: bytes


@pytest.fixture(scope="module", params=["last 0 5 3", "mean 1 5 3", "attention 2 5 3", "attention 1 0 1"])
def saved(request, tmp_path_factory) -> Saved:
    "A model's state in a file; the last one has tensors without elements."
    pooling, (every, window, d_conv) = request.param.split()[0], map(int, request.param.split()[1:])
    config = _tiny(pooling, every, d_conv, kv_window=window, pool_window=window)
    model, path = MultitaskModel(config), tmp_path_factory.mktemp("damage") / "state.safetensors"
    state = _some_state(model, torch.zeros(2, 1, 3), 0)
    save_state(state, path)
    return Saved(state, model.init_state(1), path, path.read_bytes())


def _refused_file(path: Path, like, *words: str) -> None:
    "Check that loading raises a one-line `ValueError` that names the file and holds the words."
    with pytest.raises(ValueError) as refused: load_state(path, like)
    check_message(refused, str(path), *words)


def _refused_bytes(saved: Saved, data: bytes) -> None:
    path = saved.path.with_name("damaged.safetensors")
    path.write_bytes(data)
    _refused_file(path, saved.like)


def _equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_tensors(one), _tensors(other)))


def test_a_saved_state_is_loaded_bit_for_bit(saved):
    found = load_state(saved.path, saved.like)
    assert _structure(found) == _structure(saved.state) and _equal(found, saved.state)
    assert not list(saved.path.parent.glob("*.tmp"))


def test_a_state_of_another_model_or_a_missing_file_is_refused(saved, tmp_path):
    _refused_file(tmp_path / "none.safetensors", saved.like, "no such file")
    _refused_file(tmp_path, saved.like)
    wider = map_state(lambda v: torch.cat([v, v[..., :1]], -1) if v.shape[-1] else torch.ones(*v.shape[:-1], 1), saved.like)
    _refused_file(saved.path, wider, "has shape", "expected (batch, ")
    _refused_file(saved.path, ModelState(saved.like.blocks[:1], saved.like.pool), "holds another state", ".blocks[1]")
    with pytest.raises(ValueError, match="none/state.safetensors cannot be written"):
        save_state(saved.state, tmp_path / "none" / "state.safetensors")


def test_a_file_cut_short_is_refused(saved):
    for k in range(60): _refused_bytes(saved, saved.data[:k * len(saved.data) // 60])
    _refused_bytes(saved, saved.data + b"\0")


def _flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]


@_examples(60)
@given(st.integers(0, 59), st.integers(0, 7), st.integers(0, 10**6))
def test_a_flipped_bit_is_refused(saved, place, bit, within):
    size = len(saved.data)
    at = min(size - 1, place * size // 60 + within % (size // 60))
    _refused_bytes(saved, _flipped(saved.data, at, bit))


def test_bits_flipped_all_over_the_file_are_refused(saved):
    for k in range(60): _refused_bytes(saved, _flipped(saved.data, k * len(saved.data) // 60, k % 8))


def test_every_flipped_digit_of_the_header_is_refused(saved):
    "Flipping its lowest bit turns 1 into 0: one tensor takes the name of another."
    header = 8 + struct.unpack("<Q", saved.data[:8])[0]
    for at in range(8, header):
        if chr(saved.data[at]).isdigit(): _refused_bytes(saved, _flipped(saved.data, at, 0))


JUNK = st.recursive(st.one_of(st.none(), st.integers(-2, 2), st.sampled_from(["", "a", "tuple", "ModelState", "KVCache"])),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=2)),
                    max_leaves=8)


@_examples(60)
@given(st.one_of(JUNK.map(json.dumps), st.text(max_size=6)), st.sampled_from(["sha256", "state", ""]))
def test_a_safetensors_file_that_holds_no_state_is_refused(saved, text, key):
    from safetensors.torch import save
    names = [f".blocks[{k}].{field}" for k in range(2) for field in Mamba2State._fields]
    _refused_bytes(saved, save({name: torch.zeros(2) for name in names}, {key: text}))


def test_a_whole_file_of_other_tensors_is_refused(saved):
    path = saved.path.with_name("other.safetensors")
    save_state({"a": torch.zeros(2)}, path)
    _refused_file(path, saved.like, "holds another state", "['a']")


# --- a saved model --------------------------------------------------------------------------------------------------------


def _pretrained(pooling: str = "mean") -> MultitaskModel:
    "A model whose weights are all random."
    return _perturbed(MultitaskModel(_tiny(pooling, every=1, d_conv=3)), 0).float().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pooling", ["last", "mean", "attention"])
def test_a_saved_model_gives_bit_equal_outputs(tmp_path, no_pickle, pooling, dtype):
    model, x = _pretrained(pooling).to(dtype), torch.randn(2, 9, 3, dtype=dtype)
    model.save(tmp_path / "deep" / "model")
    assert sorted(p.name for p in (tmp_path / "deep" / "model").iterdir()) == ["config.toml", "model.safetensors"]
    other = MultitaskModel.from_pretrained(tmp_path / "deep" / "model")
    assert other.cfg == model.cfg and not other.training
    loaded = other.state_dict()
    assert all(torch.equal(v, loaded[name]) and v.dtype == loaded[name].dtype for name, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(_tensors(model(x)), _tensors(other(x))))
    model.save(tmp_path / "deep" / "model")  # over an earlier one
    MultitaskModel.from_pretrained(tmp_path / "deep" / "model")


def _toml(old: str, new: str):
    "A change of the text of `config.toml`."
    def change(folder): (folder / "config.toml").write_text((folder / "config.toml").read_text().replace(old, new))
    return change


def _bytes(name: str, data):
    "A change of the bytes of a file."
    def change(folder): (folder / name).write_bytes(data((folder / name).read_bytes()))
    return change


CONFIG, WEIGHTS = "config.toml", "model.safetensors"
FAULTS = {  # name -> (change to the folder of a saved model, exactly the files that the message must name)
    "no config": (lambda folder: (folder / CONFIG).unlink(), [CONFIG]),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), [WEIGHTS]),
    "not TOML": (_toml("d_model = 4", "d_model ="), [CONFIG]),
    "not text": (_bytes(CONFIG, lambda data: b"\xff" + data), [CONFIG]),
    "an unknown key": (_toml("d_model", "d_modle"), [CONFIG]),
    "a size out of bounds": (_toml("n_layers = 2", "n_layers = 0"), [CONFIG]),
    "weights cut short": (_bytes(WEIGHTS, lambda data: data[:-3]), [WEIGHTS]),
    "empty weights": (_bytes(WEIGHTS, lambda data: b""), [WEIGHTS]),
    "a pickle": (lambda folder: torch.save(_pretrained().state_dict(), folder / WEIGHTS), [WEIGHTS]),
    "another size": (_toml("d_model = 4", "d_model = 8"), [CONFIG, WEIGHTS]),
    "more layers": (_toml("n_layers = 2", "n_layers = 3"), [CONFIG, WEIGHTS]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_model_folder_is_refused_in_one_line_that_names_the_file(tmp_path, fault):
    change, names = FAULTS[fault]
    _pretrained().save(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError) as refused: MultitaskModel.from_pretrained(tmp_path)
    check_message(refused, str(tmp_path))
    assert [name for name in (CONFIG, WEIGHTS) if name in str(refused.value)] == names, refused.value
