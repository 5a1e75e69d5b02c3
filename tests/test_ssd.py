"The scan: its parts, its gradients, strong decays, its arguments and its backends (any chunking equals one pass: test_state)."
import logging
import math
import re
import sys
import warnings
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from tensors import relative_error

from cryptopredict import ssd
from cryptopredict.ssd import (
    IntraChunkOutput,
    ScaledInputs,
    choose_backend,
    chunk_decays,
    decay_matrix,
    running_sum,
    scan_chunks,
    scan_torch,
    ssd_reference,
    ssd_scan,
    triangular_sum,
)
from cryptopredict.states import debug

pytestmark = pytest.mark.usefixtures("one_thread")


def _inputs(b=2, t=37, h=4, p=3, g=2, n=5, dtype=torch.float64, seed=0) -> list[torch.Tensor]:
    "x, dt, A, B, C, D and an initial state."
    r = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=r, dtype=torch.float64).to(dtype)
    x, dt, A, B, C = draw(b, t, h, p), F.softplus(draw(b, t, h)), -torch.exp(draw(h)), draw(b, t, g, n), draw(b, t, g, n)
    return [x, dt, A, B, C, draw(h), draw(b, h, p, n)]


def _with_gradients(scan, args: list[torch.Tensor], **options) -> list[torch.Tensor]:
    "Outputs, final state and the gradients of all arguments."
    args = [a.clone().requires_grad_() for a in args]
    y, state = scan(*args, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, state, *torch.autograd.grad((y * weights).sum() + state.sin().sum(), args)]


def _largest(one, two) -> float:
    return max(relative_error(a, b) for a, b in zip(one, two, strict=True))


# --- parts ----------------------------------------------------------------------------------------------------------------


def test_running_sums_by_products_are_cumulative_sums():
    v = torch.randn(3, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert relative_error(triangular_sum(v, 1, 16), running_sum(v, 1)) < 1e-14


def test_decays_of_a_chunk():
    d = chunk_decays(torch.tensor([-1., -2., -400.]).reshape(1, 1, 1, 3))
    due = torch.tensor([math.exp(-1), math.exp(-3), 0, 0, 0, 1])
    assert torch.allclose(torch.cat([d.from_start, d.to_end]).flatten(), due)


def test_any_decay_gives_finite_factors():
    assert torch.isfinite(chunk_decays(torch.full((1, 1, 1, 9), -1e38)).L).all()


@pytest.mark.parametrize("function, shapes", [
    (lambda x, products, dA: IntraChunkOutput.apply(x, products, *chunk_decays(-dA.abs())[:2]),
     ((1, 2, 4, 5, 2), (1, 2, 2, 5, 5), (1, 2, 4, 5))),
    (ScaledInputs.apply, ((1, 2, 3, 4, 2), (1, 2, 3, 4), (1, 2, 3, 4)))], ids=["intra-chunk output", "scaled inputs"])
def test_written_gradients_are_those_of_finite_differences(function, shapes):
    r = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*s, generator=r, dtype=torch.float64).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("scan, chunk", [(scan_chunks, 4), *((scan_torch, q) for q in (1, 5, 12, 64))])
def test_chunks_give_the_outputs_of_the_loop(scan, chunk, resets):
    x, dt, A, B, C, _, start = _inputs(t=12)
    reset = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) < .3 if resets else None
    assert _largest(scan(x, dt, A, B, C, start, reset, chunk), ssd_reference(x, dt, A, B, C, None, start, reset)) < 1e-13


# --- the whole scan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("t", [1, 7, 16, 37, 64])
def test_outputs_and_gradients_are_those_of_the_loop(t, dtype, tolerance):
    args = _inputs(t=t, dtype=dtype)
    assert _largest(_with_gradients(ssd_scan, args, chunk=16), _with_gradients(ssd_reference, args)) < tolerance


@pytest.mark.parametrize("rate", [-80., -300., -1e4, -1e30])
def test_strong_decays_leave_outputs_and_gradients_finite(rate):
    args = _inputs(t=40, dtype=torch.float32)
    args[1], args[2] = args[1] / args[1].amax(), torch.full_like(args[2], rate)
    assert all(torch.isfinite(v).all() for v in _with_gradients(ssd_scan, args, chunk=16))


def _mixed_decays(dtype: torch.dtype) -> list[torch.Tensor]:
    "Decays of a thousandth per step, and every tenth step forgets everything."
    args = _inputs(t=256, g=1, seed=1)
    args[1] = torch.full_like(args[1], .01).masked_fill(torch.arange(256)[:, None] % 10 == 0, 800.)
    args[2] = torch.full_like(args[2], -.1)
    return [a.to(dtype) for a in args]


def test_weak_decays_keep_their_digits_next_to_strong_ones():
    exact = _with_gradients(ssd_reference, _mixed_decays(torch.float64))
    assert _largest(_with_gradients(ssd_scan, _mixed_decays(torch.float32), chunk=64), exact) < 1e-5


def test_decays_are_more_exact_than_differences_of_float32_sums():
    _, dt, A, *_ = _mixed_decays(torch.float32)
    dA = (dt * A)[:1, :64, :1].transpose(1, 2)[None]  # (1, 1, 1, 64)
    d, sums, due = chunk_decays(dA), dA.cumsum(-1), decay_matrix(dA.double().cumsum(-1), None).tril()
    largest = lambda got: ((got.double() - due).abs() / due)[due > .1].max().item()
    assert largest(d.L * d.row_residual[..., None] * d.col_residual[..., None, :]) < 2e-7
    assert largest((sums[..., None] - sums[..., None, :]).exp().tril()) > 1e-5


# --- arguments ------------------------------------------------------------------------------------------------------------

ARGS = dict(zip(("x", "dt", "A", "B", "C", "D", "initial_state"), _inputs(t=12)))


@pytest.mark.parametrize("change, message", [
    (dict(x=ARGS["x"][0]), "x is torch.float64 of shape (12, 4, 3)"), (dict(x=ARGS["x"].int()), "x is torch.int32"),
    (dict(x=ARGS["x"][:, :0]), "x is torch.float64 of shape (2, 0,"),
    (dict(dt=ARGS["dt"][:, :5]), "dt has shape (2, 5, 4); with x (2, 12, 4, 3) expected (2, 12, 4)"),
    (dict(dt=ARGS["dt"].to(torch.complex128)), "dt is torch.complex128; expected floats"),
    (dict(A=ARGS["A"].int()), "A is torch.int32; expected floats, as x is torch.float64"),
    (dict(B=None), "B is NoneType"), (dict(B=ARGS["B"][:, :, :, 0]), "B has shape"),
    (dict(B=torch.zeros(2, 12, 3, 5).double(), C=torch.zeros(2, 12, 3, 5).double()), "groups that divide the 4 heads"),
    (dict(B=ARGS["B"].to("meta")), "B is on meta, x on cpu"), (dict(D=1.), "D is float"),
    (dict(initial_state=ARGS["initial_state"][:1]), "initial_state has shape (1, 4,"),
    (dict(initial_state=ARGS["initial_state"].float()), "initial_state is torch.float32; with x torch.float64 expected"),
    (dict(reset=torch.ones(2, 3)), "reset has shape"), (dict(chunk=0), "chunk is 0; give a whole number"),
    (dict(chunk=8.), "chunk is 8.0"), (dict(backend="magic"), "backend is 'magic'; known are 'auto', 'torch', 'mamba_ssm'")],
    ids=lambda v: None if isinstance(v, dict) else v[:24])
def test_an_argument_that_does_not_fit_is_named(change, message):
    ssd_scan(**ARGS)
    with pytest.raises(ValueError, match=re.escape(message)): ssd_scan(**(ARGS | change))


def test_numbers_that_are_not_finite_are_named_under_debug():
    with debug(), pytest.raises(ValueError, match=r"dt of shape \(2, 12, 4\) is inf at \(0, 0, 0\)"):
        ssd_scan(**(ARGS | dict(dt=ARGS["dt"] / 0)))


# --- backends -------------------------------------------------------------------------------------------------------------

KERNELS = "ops/triton/ssd_combined.py"
NO_EXTENSION = {"__init__.py": "import selective_scan_cuda", "ops/__init__.py": "", "ops/triton/__init__.py": ""}


@pytest.fixture
def install(tmp_path, monkeypatch):
    "Installs a `mamba_ssm` of given files; returns what the search for its scan gives, and the warnings of three searches."
    if find_spec("mamba_ssm"): pytest.skip("the real mamba_ssm is installed")

    def search(files: dict[str, str]):
        for name, text in files.items():
            path = tmp_path / "mamba_ssm" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        ssd.mamba_ssm_scan.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [ssd.mamba_ssm_scan() for _ in range(3)]
        return found[0], [str(w.message) for w in caught]
    yield search
    for name in [m for m in sys.modules if m.split(".")[0] == "mamba_ssm"]: del sys.modules[name]
    ssd.mamba_ssm_scan.cache_clear()


def test_kernels_are_found_past_an_init_that_lacks_its_extension(install):
    (scan, _), caught = install({**NO_EXTENSION, KERNELS: "mamba_chunk_scan_combined = max"})
    assert scan is max and len(caught) == 1 and "No module named 'selective_scan_cuda'" in caught[0]


def test_kernels_that_do_not_import_are_one_warning_and_a_reason(install):
    (scan, why), caught = install({**NO_EXTENSION, KERNELS: "raise OSError('undefined symbol')"})
    assert scan is None and why == "mamba_ssm's kernels do not import (OSError: undefined symbol)" and len(caught) == 1


def test_without_mamba_ssm_nothing_is_warned(install):
    assert install({}) == ((None, "mamba_ssm is not installed"), [])


def test_a_backend_that_cannot_be_used_is_refused():
    with pytest.raises(ValueError, match="backend 'mamba_ssm' cannot be used: mamba_ssm"): choose_backend("mamba_ssm", ARGS["x"])


def test_the_choice_of_a_backend_is_logged_once_per_process(caplog):
    ssd.log_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="cryptopredict.ssd"):
        for _ in range(3): ssd_scan(**ARGS)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("ssd_scan uses the torch backend: mamba_ssm")
