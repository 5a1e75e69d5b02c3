"Attention over a window: mask, rotary positions, kernels, cache, arguments, and the hybrid block (any chunking: test_state)."
import re

import pytest
import torch
from tensors import normal, relative_error

from cryptopredict.mamba2_block import Mamba2Config, Mamba2State
from cryptopredict.mhsa import (
    MHSA,
    HybridBlock,
    KVCache,
    MHSAConfig,
    attend_block,
    attend_flex,
    attend_reference,
    attend_sdpa,
    rotate,
    window_mask,
)

# --- mask and positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t, window, seen, series, rows", [
    (4, 3, 0, None, ["0001000", "0001100", "0001110", "0001111"]), (4, 3, 2, None, ["0111000", "0111100", "0011110", "0001111"]),
    (4, 3, 3, None, ["1111000", "0111100", "0011110", "0001111"]), (3, 0, 0, None, ["100", "010", "001"]),
    (4, 3, 3, [0, 0, 0, 0, 1, 1, 2], ["1111000", "0000100", "0000110", "0000001"])],
    ids=["empty cache", "two slots filled", "full cache", "no window", "series begin inside"])
def test_a_query_sees_its_window_of_filled_slots_of_its_series(t, window, seen, series, rows):
    mask = window_mask(t, window, torch.tensor([seen]), None if series is None else torch.tensor([series]))[0, 0]
    assert ["".join(map(str, row)) for row in mask.int().tolist()] == rows


def test_rotated_products_depend_on_differences_of_positions():
    q, k, at = normal(1, 1, 9, 8), normal(1, 1, 9, 8, seed=1), torch.arange(9)
    product = lambda shift: rotate(q, at + shift) @ rotate(k, at + shift).transpose(-1, -2)
    assert relative_error(product(1000), product(0)) < 1e-12
    assert relative_error(rotate(q, at), q) > .1 and relative_error(rotate(q, at).norm(dim=-1), q.norm(dim=-1)) < 1e-12


# --- kernels --------------------------------------------------------------------------------------------------------------

Q, K, V, FILLED = normal(2, 3, 5, 4), normal(2, 3, 11, 4, seed=1), normal(2, 3, 11, 4, seed=2), torch.tensor([2, 6])
SERIES = torch.tensor([[0] * 7 + [1] * 4, [0] * 11])


@pytest.mark.parametrize("series", [None, SERIES], ids=["one series", "two series"])
def test_fused_attention_equals_the_softmax_written_out(series):
    assert relative_error(attend_sdpa(Q, K, V, 6, FILLED, series), attend_reference(Q, K, V, 6, FILLED, series)) < 1e-12


def test_the_first_query_of_a_series_sees_itself_alone():
    assert relative_error(attend_reference(Q, K, V, 6, FILLED, SERIES)[0, 0, 1], V[0, 0, 7]) < 1e-12


def test_flex_attention_needs_a_gpu():
    with pytest.raises(ValueError, match="kernel 'flex' needs a GPU and the input is on cpu"):
        attend_flex(Q, K, V, 6, FILLED, None)


def test_empty_slots_are_not_attended():
    one, empty = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 3, 2)
    cache = KVCache(empty, empty, torch.zeros(1, dtype=torch.int64))
    cfg, values = MHSAConfig(d_model=2, n_heads=1, kv_window=3), one * torch.tensor([[2.], [4.]])
    y, cache = attend_block(cfg, one, one, values, cache, None)
    assert y[0, 0, 0].tolist() == [2., 2.]
    assert cache.seen.tolist() == [2] and cache.v[0, 0, :, 0].tolist() == [0., 2., 4.]


# --- the module -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    (dict(n_heads=3), "n_heads 3 does not divide"), (dict(kv_window=-1), "kv_window is -1: give a whole number, at least 0"),
    (dict(block=0), "block is 0"), (dict(base=0), "base is 0: give a number above 1"), (dict(base=float("nan")), "base is nan"),
    (dict(base="x"), "base is 'x'"), (dict(n_heads=True), "n_heads is True"),
    (dict(kernel="fast"), "kernel is 'fast'; known are sdpa, flex, reference")], ids=str)
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message): MHSAConfig(**change)


SMALL = MHSAConfig(d_model=16, n_heads=2, kv_window=5)
CACHE = MHSA(SMALL).init_state(2)
U = torch.zeros(2, 4, 16)


def test_no_cache_is_an_empty_cache():
    m, u = MHSA(SMALL), normal(2, 4, 16).float()
    assert torch.equal(m(u, m.init_state(2))[0], m(u)[0])


@pytest.mark.parametrize("u, cache, reset, message", [
    (U, CACHE._replace(k=CACHE.k.half()), None, "cache.k is torch.float16; expected torch.float32"),
    (U, MHSA(MHSAConfig(d_model=16, n_heads=2, kv_window=6)).init_state(2), None,
     "cache.k has shape (2, 2, 6, 8); for u (2, 4, 16) expected (2, 2, 5, 8)"),
    (U[:1], CACHE, None, "cache.k has shape (2, 2, 5, 8); for u (1, 4, 16) expected (1, 2, 5, 8)"),
    (U, Mamba2State(*CACHE[:2]), None, "cache is Mamba2State; expected KVCache"),
    (U[:, :0], None, None, "u has shape (2, 0, 16)"), (U[0], None, None, "u has shape (4, 16)"),
    (U[..., :3], None, None, "u has shape (2, 4, 3)"),
    (U.double(), None, None, "u is torch.float64 on cpu; expected torch.float32 on cpu"),
    (U, None, torch.zeros(2, 3, dtype=torch.bool), "reset has shape (2, 3); with u (2, 4, 16)")],
    ids=["dtype", "window", "batch", "class", "no time", "axes", "channels", "precision", "reset"])
def test_an_argument_that_does_not_fit_is_named(u, cache, reset, message):
    with pytest.raises(ValueError, match=re.escape(message)): MHSA(SMALL)(u, cache, reset)


def test_the_cache_is_bounded_in_shape_and_in_memory():
    m = MHSA(MHSAConfig(d_model=16, n_heads=2, kv_window=100)).double()
    k = m(normal(2, 360, 16))[1].k
    assert k.shape == (2, 2, 100, 8) and k.untyped_storage().nbytes() == 2 * 2 * 100 * 8 * 8


def test_attention_is_causal():
    m, u = MHSA(MHSAConfig(d_model=16, n_heads=2, kv_window=100)).double(), normal(2, 40, 16)
    changed = torch.cat([u[:, :25], u[:, 25:] + 1], 1)
    assert relative_error(m(changed)[0][:, :25], m(u)[0][:, :25]) < 1e-13


# --- the hybrid block -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block() -> HybridBlock:
    torch.manual_seed(0)
    return HybridBlock(Mamba2Config(d_model=16, d_state=8, headdim=8, chunk=8), 32, MHSAConfig(16, 2, kv_window=9)).double()


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("lengths", [[1, 12, 3, 24], [1] * 40], ids=["chunks", "steps"])
def test_a_hybrid_block_in_parts_equals_one_pass(block, lengths, resets):
    u, state, ys = normal(2, 40, 16), None, []
    reset = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < .1 if resets else torch.zeros(2, 40, dtype=torch.bool)
    for part, r in zip(u.split(lengths, 1), reset.split(lengths, 1)):
        y, state = block(part, state, r)
        ys.append(y)
    assert relative_error(torch.cat(ys, 1), block(u, None, reset if resets else None)[0]) < 1e-12


def test_the_attention_branch_begins_near_zero_and_can_open(block):
    u = normal(2, 40, 16)
    whole, _ = block(u)
    assert relative_error(whole, block.base(u)[0]) < .02
    assert torch.autograd.grad(whole.square().sum(), block.gate)[0].abs().min() > 0


def test_branches_of_different_widths_are_refused():
    with pytest.raises(ValueError, match="attention has d_model 8, the mixer 16"):
        HybridBlock(Mamba2Config(d_model=16, d_state=8, headdim=8), 32, MHSAConfig(8, 2))


def test_a_state_of_another_module_is_refused(block):
    u, state = normal(2, 40, 16), block.init_state(2)
    with pytest.raises(ValueError, match="state is Mamba2State; expected HybridState"): block(u, state.mixer)
    incomplete = state._replace(attention=None)
    with pytest.raises(ValueError, match="state.attention is NoneType; expected KVCache"): block(u, incomplete)


def test_a_block_refuses_a_single_channel(block):
    for module in (block, block.base):
        with pytest.raises(ValueError, match=r"u has shape \(2, 40, 1\); expected \(batch, time, 16\)"): module(normal(2, 40, 1))
