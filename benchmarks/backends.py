"""Backends of the scan and the attention on one GPU: errors relative to float64, and time.

    python benchmarks/backends.py --out results/backends.json

On random inputs, compares `mamba_ssm` (and `causal_conv1d` where installed) with the plain PyTorch scan, in outputs, states and
gradients of all arguments, and flex attention with PyTorch's fused attention. Needs the packages of `vram.py run` and
those it compares.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from vram import describe_device, quantiles, versions, write_atomic  # noqa: E402

from cryptopredict.mamba2_block import Mamba2, Mamba2Config, causal_conv1d_kernel  # noqa: E402
from cryptopredict.mhsa import MHSA, MHSAConfig  # noqa: E402
from cryptopredict.ssd import choose_backend, mamba_ssm_scan, ssd_scan  # noqa: E402

HOW = dict(
    errors="norm of the difference to a float64 run of the PyTorch backend on the same (rounded) inputs, relative to its norm, "
           "per tensor; scan: batch 2, length 300, 8 heads of 64, 1 group, 128 states, an initial state, resets",
    time="forward and backward captured in a CUDA graph and replayed, milliseconds; scan: batch 16, length 1024, sizes as above; "
         "mixer: width 256 at the same sizes under bfloat16 autocast; attention: batch 16, length 512, 4 heads of 64, window 512")
TOLERANCES = {"torch float32": 1e-5, "torch bfloat16": .02, "mamba_ssm float32": 5e-3, "mamba_ssm bfloat16": .02}


def scan_inputs(b: int, t: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, dt, A, B, C, D and initial state with the sizes of preset baseline; dt and A are about as initialised."""
    r = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=r)
    dt, A = F.softplus(draw(b, t, 8) - 4), -torch.exp(draw(8).abs())
    x, B, C, D, state = draw(b, t, 8, 64), draw(b, t, 1, 128), draw(b, t, 1, 128), draw(8), draw(b, 8, 64, 128)
    acc_dtype = torch.promote_types(dtype, torch.float32)
    dtypes = dtype, acc_dtype, acc_dtype, dtype, dtype, acc_dtype, acc_dtype
    return [v.to("cuda", one) for v, one in zip((x, dt, A, B, C, D, state), dtypes)]


def with_gradients(inputs: list[torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """Outputs, final state, and the gradient of every argument."""
    inputs = [v.clone().requires_grad_() for v in inputs]
    y, state = ssd_scan(*inputs, **options)
    weights = torch.linspace(-1, 1, y.numel(), device="cuda", dtype=torch.float64).view_as(y)
    total = (y.double() * weights).sum() + state.double().square().sum()
    grads = torch.autograd.grad(total, inputs)
    return dict(y=y, state=state, **dict(zip(("dx", "ddt", "dA", "dB", "dC", "dD", "dstate"), grads)))


def scan_errors(found: dict[str, str]) -> list[dict]:
    """Errors of each backend in two precisions, with and without resets."""
    rows, reset = [], torch.rand(2, 300, generator=torch.Generator().manual_seed(1)).cuda() < .02
    for backend in found:
        for dtype in (torch.float32, torch.bfloat16):
            for mask in (None, reset):
                inputs = scan_inputs(2, 300, dtype)
                made = with_gradients(inputs, backend=backend, reset=mask)
                due = with_gradients([v.double() for v in inputs], backend="torch", reset=mask)
                errors = {k: ((made[k].double() - due[k]).norm() / due[k].norm()).item() for k in due}
                name = f"{backend} {str(dtype).removeprefix('torch.')}"
                rows.append(dict(backend=backend, dtype=name.split()[1], reset=mask is not None, errors=errors,
                                 tolerance=TOLERANCES[name], ok=max(errors.values()) <= TOLERANCES[name]))
                print(name, "reset" if mask is not None else "", " ".join(f"{k} {v:.0e}" for k, v in errors.items()), flush=True)
    return rows


def chunked_errors(found: dict[str, str]) -> list[dict]:
    """Errors of a mixer under bfloat16 autocast, in one pass and in uneven chunks, relative to one pass in float64."""
    torch.manual_seed(0)
    rows, u = [], torch.randn(2, 300, 256, device="cuda")
    relative = lambda a, b: ((a.double() - b).norm() / b.norm()).item()
    for backend in found:
        m = Mamba2(Mamba2Config(backend=backend)).cuda()
        exact = Mamba2(Mamba2Config(backend="torch")).cuda().double()
        exact.load_state_dict(m.state_dict())
        whole = exact(u.double())[0]
        due = torch.autograd.grad(whole.square().sum(), list(exact.parameters()), retain_graph=True)
        for lengths in ([300], [100, 1, 7, 64, 128]):
            state, ys = None, []
            with torch.autocast("cuda", dtype=torch.bfloat16):
                for part in u.split(lengths, 1):
                    y, state = m(part, state)
                    ys.append(y)
            loss = torch.cat(ys, 1).double().square().sum()
            grads = torch.autograd.grad(loss, list(m.parameters()))
            worst, y = max(relative(a, b) for a, b in zip(grads, due)), relative(torch.cat(ys, 1), whole)
            rows.append(dict(backend=backend, lengths=lengths, y=y, worst_gradient=worst, tolerance=.05, ok=max(worst, y) <= .05))
            print("mixer", backend, lengths, f"y {rows[-1]['y']:.0e} gradients {worst:.0e}", flush=True)
    return rows


def replayed(work: Callable[[], None], repeats: int = 20) -> dict[str, float]:
    """Milliseconds of `work`, captured in a CUDA graph and replayed."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3): work()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph): work()
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return quantiles(times[3:])


def scan_time(backend: str) -> dict[str, float]:
    """Milliseconds of the scan in bfloat16, forward and backward."""
    inputs = [v.requires_grad_() for v in scan_inputs(16, 1024, torch.bfloat16)]
    def work():
        y, state = ssd_scan(*inputs, backend=backend)
        torch.autograd.grad((y, state), inputs, (torch.ones_like(y), torch.ones_like(state)))
    return replayed(work)


def mixer_time(backend: str) -> dict[str, float]:
    """Milliseconds of a mixer that starts from a state, forward and backward."""
    m, u = Mamba2(Mamba2Config(backend=backend)).cuda(), torch.randn(16, 1024, 256, device="cuda")
    state = m.init_state(16)
    def work():
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False): y, _ = m(u, state)
        torch.autograd.grad(y, list(m.parameters()), torch.ones_like(y))
    return replayed(work)


def attention_time(kernel: str) -> dict[str, float]:
    """Milliseconds of the attention with a full cache, forward and backward."""
    m, u = MHSA(MHSAConfig(kernel=kernel)).cuda(), torch.randn(16, 512, 256, device="cuda")
    cache = m.init_state(16)
    cache = cache._replace(seen=torch.full_like(cache.seen, 512))
    def work():
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False): y, _ = m(u, cache)
        torch.autograd.grad(y, list(m.parameters()), torch.ones_like(y))
    return replayed(work)


def attempt(work: Callable[[str], dict], what: str) -> dict:
    """The result of `work`, or its error."""
    try: made = work(what)
    except Exception as error: made = dict(failed=f"{type(error).__name__}: {error}"[:300])
    print(work.__name__, what, made.get("median", made), flush=True)
    torch.cuda.synchronize()
    return made


def installed(package: str) -> str | None:
    """Version of a package, None if it is not installed."""
    try: return version(package)
    except PackageNotFoundError: return None


def main() -> int:
    """Measure and write the report; exit code 1 if an error is above its tolerance."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="JSON report")
    p.add_argument("--commit", default="", help="version of the code, for the report")
    args = p.parse_args()
    if not torch.cuda.is_available(): p.error("this machine has no GPU: nothing to compare")
    kernels, why = mamba_ssm_scan()
    found = {"torch": "plain PyTorch"} | ({"mamba_ssm": why} if kernels is not None else {})
    packages = {name: installed(name) for name in ("mamba-ssm", "causal-conv1d")}
    conv = causal_conv1d_kernel() is not None
    auto = choose_backend("auto", torch.zeros(1, device="cuda").bfloat16())
    print(found, packages, "causal_conv1d's kernel:", conv, "auto:", auto)
    report = dict(device=describe_device("cuda"), versions=versions(), packages=packages, conv_kernel=conv, why=why,
                  commit=args.commit, date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", how=HOW)
    report |= dict(scan_errors=scan_errors(found), mixer_errors=chunked_errors(found),
                   scan_ms={b: attempt(scan_time, b) for b in found}, mixer_ms={b: attempt(mixer_time, b) for b in found},
                   attention_ms={k: attempt(attention_time, k) for k in ("sdpa", "flex", "reference")})
    write_atomic(args.out, report)
    return 0 if kernels is not None and all(r["ok"] for r in report["scan_errors"] + report["mixer_errors"]) else 1


if __name__ == "__main__": sys.exit(main())
