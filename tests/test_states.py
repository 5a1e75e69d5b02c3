"Functions on states: precision when moved, and the messages of the argument checks (files and whole models: test_state)."
import math
import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from cryptopredict.states import (
    check_finite,
    check_like,
    check_reset,
    check_state,
    check_step,
    check_tensors,
    concat_states,
    debug,
    detach,
    load_state,
    map_state,
    move_state,
    register_state,
    save_state,
    where_state,
)


@register_state(ssm=torch.float32)
class Memory(NamedTuple):
    conv: Tensor
    ssm: Tensor


class Layer(nn.Module):
    "The smallest module with a state."

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 4)

    def init_state(self, batch: int) -> Memory:
        return Memory(torch.zeros(batch, 4, 1), torch.zeros(batch, 1, 4))


U = torch.zeros(2, 12, 4)
STATE = (Memory(torch.zeros(2, 3, 3), torch.ones(2, 4, 8)), ())


def _refused(message: str, call, *args, **kwargs) -> None:
    with pytest.raises(ValueError, match=re.escape(message)): call(*args, **kwargs)


def test_map_keeps_the_structure_and_takes_several_states():
    total = map_state(lambda a, b: a + b, STATE, STATE)
    assert type(total[0]) is Memory and total[0].ssm.max() == 2 and total[1] == ()


def test_a_detached_state_needs_no_gradient():
    state = (torch.ones(2, requires_grad=True) * 2,)
    assert state[0].requires_grad and not detach(state)[0].requires_grad


def test_one_state_is_concatenated_without_a_copy():
    assert concat_states([STATE]) is STATE and concat_states([STATE, STATE])[0].ssm.shape == (4, 4, 8)


@pytest.mark.parametrize("condition, expected", [(True, 1.), (False, 2.)])
def test_where_chooses_one_of_two_states(condition, expected):
    other = map_state(lambda v: v + 1, STATE)
    assert where_state(torch.tensor(condition), STATE, other)[0].ssm.max() == expected


def test_a_registered_field_keeps_its_precision_when_moved():
    assert [v.dtype for v in move_state(STATE, dtype=torch.bfloat16)[0]] == [torch.bfloat16, torch.float32]
    assert [v.dtype for v in move_state(STATE, dtype=torch.float64)[0]] == [torch.float64, torch.float64]


def test_integers_stay_integers_when_moved():
    assert move_state((torch.ones(1, dtype=torch.int64),), dtype=torch.float64)[0].dtype == torch.int64


def test_moving_to_an_integer_type_is_refused():
    _refused("dtype is torch.int64", move_state, STATE, dtype=torch.int64)


@pytest.mark.parametrize("metadata, message", [
    (None, "cannot be read as a state: it has no sha256: give a file written by save_state"),
    ({"sha256": "0"}, "its content does not match its sha256: restore it from a backup")], ids=["none", "another"])
def test_a_file_without_its_hash_is_refused(tmp_path, metadata, message):
    from safetensors.torch import save_file
    save_state(STATE, tmp_path / "state.safetensors")
    assert torch.equal(load_state(tmp_path / "state.safetensors", STATE)[0].ssm, STATE[0].ssm)
    save_file({"[0].conv": STATE[0].conv, "[0].ssm": STATE[0].ssm}, tmp_path / "other.safetensors", metadata)
    _refused(message, load_state, tmp_path / "other.safetensors", STATE)


def test_numbers_are_checked_under_debug_only():
    bad = torch.zeros(2, 3)
    bad[1, 2] = math.nan
    check_finite("u", bad)
    with debug():
        check_finite("seen", torch.ones(2, dtype=torch.int64))
        _refused("u of shape (2, 3) is nan at (1, 2)", check_finite, "u", bad)
        with debug(False): check_finite("u", bad)
    check_finite("u", bad)


def test_the_first_argument_that_is_no_tensor_is_named():
    check_tensors(a=U, b=U)
    _refused("b is float; expected a torch.Tensor", check_tensors, a=U, b=1., c=None)


@pytest.mark.parametrize("reset, message", [
    (torch.zeros(12), "reset has shape (12,); with x (2, 12, 4) expected (2, 12)"),
    (torch.zeros(2, 12), "reset is torch.float32 on cpu; expected torch.bool on cpu like x"),
    (torch.zeros(2, 12, dtype=torch.bool, device="meta"), "reset is torch.bool on meta; expected torch.bool on cpu"),
    ([], "reset is list; expected a torch.Tensor")], ids=["shape", "dtype", "device", "type"])
def test_a_reset_that_does_not_fit_is_named(reset, message):
    _refused(message, check_reset, reset, U, "x")


FRESH = Layer().init_state(2)


@pytest.mark.parametrize("state, message", [
    (FRESH._replace(ssm=FRESH.ssm.double()), "state.ssm is torch.float64; expected torch.float32"),
    (Layer().init_state(1), "state.conv has shape (1, 4, 1); for u (2, 12, 4) expected (2, 4, 1)"),
    (map_state(lambda v: v.to("meta"), FRESH), "state.conv is on meta, the model on cpu: move it with move_state"),
    (tuple(FRESH), "state is tuple; expected Memory")], ids=["dtype", "batch", "device", "class"])
def test_a_state_that_does_not_fit_is_named(state, message):
    _refused(message, check_state, Layer(), U, state)


def test_a_state_with_too_few_parts_is_refused():
    _refused("state has 1 parts; expected 2", check_like, STATE[:1], STATE, "state", U)


def test_a_part_of_a_nested_state_is_named_by_its_path():
    first = map_state(lambda v: v[:1], STATE)
    _refused("state[0].conv has shape (1, 3, 3)", check_like, first, STATE, "state", U)


def test_a_state_that_is_not_finite_is_refused_under_debug():
    infinite = FRESH._replace(ssm=FRESH.ssm + math.inf)
    with debug(): _refused("state.ssm of shape (2, 1, 4) is inf", check_state, Layer(), U, infinite)


def test_without_a_state_a_layer_starts_from_its_initial_state():
    assert type(check_state(Layer(), U, None)) is Memory


@pytest.mark.parametrize("u, message", [
    (U[..., :3], "u has shape (2, 12, 3); expected (batch, time, 4)"),
    (U.double(), "u is torch.float64 on cpu; expected torch.float32 on cpu")], ids=["channels", "dtype"])
def test_an_input_that_does_not_fit_is_named(u, message):
    _refused(message, check_state, Layer(), u, None)


def test_a_step_has_no_time_axis():
    assert check_step(U[:, 0], 4).shape == (2, 1, 4)
    _refused("u_t has shape (2, 12, 4); expected (batch, 4)", check_step, U, 4)
