"""Speed on the CPU: the scan against a loop and against a plain chunked scan, training, single steps, and memory by length.

  python benchmarks/speed.py --out results/speed.json        two threads, about a minute and a half; on random inputs

`scan`: `ssd_scan` against a loop over time. `plain`: against `plain_ssd`, the textbook's chunked scan, at several sizes, after a
check that both agree. `plain_training`: training of preset tiny with either scan. `tail`: lengths that are not multiples of the
chunk. `step`: single hours through presets baseline and mhsa. `training`, `memory`: of preset tiny. Times that are compared are
measured in turn in one process. Needs the packages of `vram.py run`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

# Threads that spin while waiting starve each other on a busy machine; torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from einops import rearrange  # noqa: E402
from torch import Tensor  # noqa: E402
from vram import describe_device, quantiles, timed_steps, versions, wrapped_chunks, write_atomic  # noqa: E402

from cryptopredict.multitask import MultitaskModel, Targets, preset  # noqa: E402
from cryptopredict.ssd import ssd_reference, ssd_scan  # noqa: E402
from cryptopredict.streams import FoldData, plan_streams  # noqa: E402
from cryptopredict.tbptt_trainer import Run, peak_bytes, train_epoch, train_preset  # noqa: E402

BASELINE = dict(batch=2, length=1024, heads=8, headdim=64, groups=1, d_state=128)  # sizes of a scan in preset baseline
SIZES = {"baseline": BASELINE, "tiny": dict(batch=16, length=256, heads=4, headdim=32, groups=1, d_state=16),
         "4 groups": BASELINE | dict(groups=4), **{f"length {n}": BASELINE | dict(length=n) for n in (1000, 65)}}
TAILS = (1024, 1025, 1056, 1087)  # 1024 is a multiple of the chunk
HOW = dict(
    scan="forward and gradient of all inputs, float32, batch 2, length 1024, 8 heads of 64 channels, 128 states per "
         "channel, chunk 64; both in turn; seconds",
    plain="as scan, against plain_ssd: B and C repeated for every head, decays from segment sums over expanded matrices, four "
          "einsums, input padded to whole chunks; `sizes` are those of the inputs; in turn; ratio is plain / ours of each pair; "
          "`difference` is the largest in outputs and final state, with D and an initial state, relative to the largest value; "
          "without opt_einsum an einsum contracts from left to right",
    plain_training="as training, ours and the same model with plain_ssd in its mixers (`scan`), or with plain_ssd, PyTorch's "
                   "depthwise convolution and a norm of single operations (`mixer`), same weights, chunks and dropout, "
                   "steps in turn; ratio is plain / ours; `loss_difference` is the largest relative one over all steps",
    tail="as scan, chunk 64, the lengths in turn; seconds per token relative to length 1024 in the same round",
    step="MultitaskModel.step, 60 channels, batch 1, no gradient, evaluation mode, carried state, after 20 steps of warm-up; "
         "`fresh` starts from no history, `after_history` from `history` hours read in chunks, a step of each in turn; "
         "milliseconds",
    training="train_step of preset tiny, batch 16, tbptt_len 256, 60 channels, carried and detached state, after 3 warm-up "
             "steps; tokens are hours times streams",
    memory="one process for each number of chunks per stream: one epoch of preset tiny, batch 4, tbptt_len 64, with "
           "the same tensors in memory; largest resident size of the process, bytes")


def scan_inputs(batch: int, length: int, heads: int, headdim: int, groups: int, d_state: int) -> list[Tensor]:
    """x, dt, A, B and C of a scan, random."""
    shapes = ((batch, length, heads, headdim), (batch, length, heads), (heads,), *[(batch, length, groups, d_state)] * 2)
    x, dt, A, B, C = (torch.randn(*s) for s in shapes)
    return [v.requires_grad_() for v in (x, F.softplus(dt - 2), -A.exp(), B, C)]


def seconds(scan: Callable, inputs: list[Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    inputs = [v.detach().requires_grad_() for v in inputs]
    began = time.perf_counter()
    torch.autograd.grad(scan(*inputs)[0].sum(), inputs)
    return time.perf_counter() - began


def scan(repeats: int) -> dict:
    """Time the chunked scan and the loop, in turn."""
    inputs = scan_inputs(**BASELINE)
    seconds(ssd_scan, inputs)
    pairs = [(seconds(ssd_reference, inputs), seconds(ssd_scan, inputs)) for _ in range(repeats)]
    loop, chunked = zip(*pairs)
    return dict(loop_s=quantiles(loop), scan_s=quantiles(chunked), ratio=quantiles([a / b for a, b in pairs]))


# -- against the textbook's chunked scan -------------------------------------------------------------


def segment_sums(v: Tensor) -> Tensor:
    """Sums of v[j + 1 .. i] at (i, j) of the last two axes, -inf for j > i, by cumulative sums without subtraction."""
    ones = torch.ones(v.shape[-1], v.shape[-1], dtype=torch.bool, device=v.device)
    spread = v[..., None].expand(*v.shape, v.shape[-1])  # v[i] at (i, j)
    return spread.masked_fill(~ones.tril(-1), 0).cumsum(-2).masked_fill(~ones.tril(), -torch.inf)


def plain_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
              initial_state: Tensor | None = None, chunk: int = 64, backend: str = "torch",
              reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The chunked scan of the textbook, with the arguments of `ssd_scan`; ignores `backend`."""
    if reset is not None: raise ValueError("plain_ssd has no resets: leave out `reset`")
    (b, t, h, p), n = x.shape, B.shape[3]
    B, C = (m.repeat_interleave(h // m.shape[2], 2) for m in (B, C))
    padded = (F.pad(v, (0, 0) * (v.dim() - 2) + (0, -t % chunk)) for v in (x * dt[..., None], dt * A, B, C))
    X, dA, B, C = (rearrange(v, "b (c q) ... -> b c q ...", q=chunk) for v in padded)
    dA = rearrange(dA, "b c q h -> b h c q")
    total = dA.cumsum(-1)
    intra = torch.einsum("bcihn,bcjhn,bhcij,bcjhp->bcihp", C, B, segment_sums(dA).exp(), X)
    added = torch.einsum("bcjhn,bhcj,bcjhp->bchpn", B, (total[..., -1:] - total).exp(), X)
    start = x.new_zeros(b, h, p, n) if initial_state is None else initial_state
    across = segment_sums(F.pad(total[..., -1], (1, 0))).exp()  # (b, h, c + 1, c + 1)
    states = torch.einsum("bhij,bjhpn->bihpn", across, torch.cat([start[:, None], added], 1))
    read = torch.einsum("bcihn,bchpn,bhci->bcihp", C, states[:, :-1], total.exp())
    y = (intra + read).flatten(1, 2)[:, :t]
    return (y if D is None else y + D[:, None] * x), states[:, -1]


@torch.no_grad()
def difference(inputs: list[Tensor]) -> float:
    """Largest difference of the two scans relative to the largest value; an error above 1e-5."""
    b, _, h, p = inputs[0].shape
    more = torch.randn(h), torch.randn(b, h, p, inputs[3].shape[3])
    off = max(((one - two).abs().max() / two.abs().max()).item()
              for one, two in zip(plain_ssd(*inputs, *more), ssd_scan(*inputs, *more)))
    if not off < 1e-5: raise ValueError(f"plain_ssd is {off:.2g} off ssd_scan at x {tuple(inputs[0].shape)}: nothing to time")
    return off


def plain_at(sizes: dict[str, int], pairs: int) -> dict:
    """Time both scans at one size, in turn."""
    inputs = scan_inputs(**sizes)
    off = difference(inputs)
    for run in (plain_ssd, ssd_scan): seconds(run, inputs)
    plain, ours = zip(*((seconds(plain_ssd, inputs), seconds(ssd_scan, inputs)) for _ in range(pairs)))
    return dict(sizes=sizes, difference=off, plain_s=quantiles(plain), ours_s=quantiles(ours),
                ratio=quantiles([a / b for a, b in zip(plain, ours)]))


def plain(pairs: int) -> dict:
    """Time both scans at all sizes."""
    return dict(opt_einsum=torch.backends.opt_einsum.is_available(), **{name: plain_at(s, pairs) for name, s in SIZES.items()})


def tail(rounds: int) -> dict:
    """Seconds per token at lengths that are not multiples of the chunk, relative to one that is."""
    inputs = {n: scan_inputs(**BASELINE | dict(length=n)) for n in TAILS}
    took = [{n: seconds(ssd_scan, v) / n for n, v in inputs.items()} for _ in range(rounds + 1)][1:]
    return {str(n): quantiles([one[n] / one[TAILS[0]] for one in took]) for n in TAILS}


# -- the presets -------------------------------------------------------------------------------------


def random_fold(hours: int) -> FoldData:
    """A fold of random inputs and labels."""
    targets = Targets(torch.randint(0, 3, (hours,)).float(), *(torch.randn(hours) for _ in range(2)), torch.rand(hours) + .1)
    return FoldData(torch.randn(hours, 60), targets, None, None, 0, hours)


def training(steps: int, folder: Path) -> dict:
    """Tokens per second in training preset tiny."""
    config = train_preset("tiny", 60)
    run = Run(config, folder)
    took = list(timed_steps(run, list(wrapped_chunks(random_fold(60_000), config.batch, config.tbptt_len, steps + 3))))[3:]
    tokens = config.batch * config.tbptt_len
    return dict(batch=config.batch, tbptt_len=config.tbptt_len, tokens_per_s=quantiles([tokens / s for s, _ in took]),
                parameters=sum(p.numel() for p in run.model.parameters()))


def plain_conv(x, weight, bias, past, reset=None):
    """The causal convolution by `torch.nn.functional.conv1d`."""
    joined = torch.cat([past.to(x.dtype), x.transpose(1, 2)], -1)
    y = torch.nn.functional.conv1d(joined, weight, bias, groups=weight.shape[0]).transpose(1, 2)
    return y, joined[..., x.shape[1]:].clone()


class PlainNorm:
    """The RMS norm of mixer and blocks in single operations."""

    @staticmethod
    def apply(x, weight, eps): return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


PLAIN = dict(scan=dict(ssd_scan=plain_ssd), mixer=dict(ssd_scan=plain_ssd, causal_conv=plain_conv, FusedRMSNorm=PlainNorm))


def plain_training(steps: int, folder: Path, plain: dict) -> dict:
    """Seconds of a training step, ours and with functions of the mixer replaced by plain ones, in turn."""
    config, pairs = train_preset("tiny", 60), []
    chunks = list(wrapped_chunks(random_fold(60_000), config.batch, config.tbptt_len, steps + 3))
    ours, other = (timed_steps(Run(config, folder), chunks) for _ in range(2))
    for k in range(len(chunks)):
        torch.manual_seed(k)  # for dropout
        mine = next(ours)
        torch.manual_seed(k)
        with mock.patch.multiple("cryptopredict.mamba2_block", **plain): pairs.append((next(other), mine))
    off = max(abs(a / b - 1) for (_, a), (_, b) in pairs)
    if not off < 1e-2: raise ValueError(f"losses of both trainings differ by {off:.2g}: plain_ssd is not equivalent")
    plain, ours = zip(*((a, b) for (a, _), (b, _) in pairs[3:]))
    at = dict(plain_s=quantiles(plain), ours_s=quantiles(ours), ratio=quantiles([a / b for a, b in zip(plain, ours)]))
    return dict(**at, ratio_of_medians=at["plain_s"]["median"] / at["ours_s"]["median"], loss_difference=off)


@torch.no_grad()
def one_step(model: MultitaskModel, state) -> tuple[float, tuple]:
    """Milliseconds of one hour, and the state after it."""
    x = torch.randn(1, 60)
    began = time.perf_counter()
    _, state = model.step(x, state)
    return 1000 * (time.perf_counter() - began), state


def steps_in_turn(model: MultitaskModel, states: list, count: int) -> list[dict]:
    """Milliseconds of a step from each state, in turn."""
    took = [[] for _ in states]
    for _ in range(count):
        for k, state in enumerate(states):
            ms, states[k] = one_step(model, state)
            took[k].append(ms)
    return [dict(median=q["median"], q90=torch.tensor(v).quantile(.9).item()) for v in took if (q := quantiles(v))]


@torch.no_grad()
def step_of(name: str, count: int, history: int) -> dict:
    """Milliseconds of steps of one preset, with one thread and with two."""
    model, threads, made = MultitaskModel(preset(name, 60)).eval(), torch.get_num_threads(), {}
    fresh = long = model.init_state(1)
    for x in torch.randn(1, history, 60).split(1000, 1): _, long = model(x, long)
    for n in (1, 2):
        torch.set_num_threads(n)
        states = [fresh, long]
        steps_in_turn(model, states, 20)
        made[f"threads_{n}"] = dict(zip(("fresh", "after_history"), steps_in_turn(model, states, count)))
    torch.set_num_threads(threads)
    return dict(parameters=sum(p.numel() for p in model.parameters()), history=history, **made)


def peak_of_chunks(chunks: int, folder: Path) -> int:
    """Peak resident memory of this process after training through `chunks` chunks per stream."""
    config, data = train_preset("tiny", 60, batch=4, tbptt_len=64), random_fold(60_000)
    data = data._replace(stop=64 + 4 * 64 * (chunks + 1))
    assert plan_streams(data.stop, config.batch, config.tbptt_len).chunks == chunks + 1
    train_epoch(Run(config, folder), data, chunks, lambda run, record: None)
    return peak_bytes("cpu")["peak_rss"]


def memory(counts: tuple[int, ...], threads: int) -> dict:
    """Peak memory by number of chunks per stream, each measured in a new process."""
    ask = lambda n: subprocess.run([sys.executable, __file__, "--chunks", str(n), "--threads", str(threads)], check=True,
                                   capture_output=True, text=True).stdout
    return {str(n): int(ask(n)) for n in counts}


def report(args: argparse.Namespace) -> dict:
    """Make all measurements."""
    with tempfile.TemporaryDirectory() as folder:
        measured = dict(scan=scan(args.repeats), plain=plain(args.pairs), tail=tail(args.pairs),
                        training=training(args.steps, Path(folder)))
        measured["plain_training"] = {name: plain_training(args.steps, Path(folder), plain) for name, plain in PLAIN.items()}
    measured["step"] = {name: step_of(name, args.hours, args.history) for name in ("baseline", "mhsa")}
    measured["memory"] = memory(tuple(args.counts), args.threads)
    return dict(device=describe_device("cpu"), versions=versions(), commit=args.commit,
                date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", how=HOW, **measured)


def table(made: dict) -> str:
    """The measurements as text: medians, some with quartiles."""
    span = lambda q, form: f"{q['median']:{form}} ({q['q25']:{form}} to {q['q75']:{form}})"
    of = lambda r: f"{span(r['ratio'], '.2f')}   {1000 * r['ours_s']['median']:.1f} ms to {1000 * r['plain_s']['median']:.1f} ms"
    rows = [("loop / scan", span(made["scan"]["ratio"], ".1f"))]
    rows += [(f"plain / scan, {name}", of(made["plain"][name])) for name in SIZES]
    rows += [(f"plain {name} / ours, training of tiny", of(measured)) for name, measured in made["plain_training"].items()]
    rows += [("tokens/s, training of tiny", span(made["training"]["tokens_per_s"], ",.0f"))]
    rows += [(f"time per token, length {n} / {TAILS[0]}", span(q, ".2f")) for n, q in made["tail"].items()]
    for name, measured in made["step"].items():
        for n in (1, 2):
            at = {kind.replace("_", " "): q for kind, q in measured[f"threads_{n}"].items()}
            steps = ", ".join(f"{q['median']:.2f} (90 %: {q['q90']:.2f}) {kind}" for kind, q in at.items())
            rows.append((f"step of {name}, ms, {n} thread{'s' * (n > 1)}", steps))
    rows.append(("peak MB, by chunks per stream", ", ".join(f"{n}: {v / 1e6:.0f}" for n, v in made["memory"].items())))
    return "\n".join(f"{name:34}{value}" for name, value in rows)


def main() -> int:
    """Measure, print the table, and write the report."""
    style = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    p.add_argument("--out", type=Path, help="JSON report; default: print the table only")
    p.add_argument("--commit", default="", help="version of the code, for the report")
    p.add_argument("--threads", type=int, default=2, help="threads of torch")
    p.add_argument("--repeats", type=int, default=5, help="pairs of scan and loop")
    p.add_argument("--pairs", type=int, default=9, help="pairs of scan and plain scan, and rounds over the lengths")
    p.add_argument("--steps", type=int, default=40, help="timed training steps")
    p.add_argument("--hours", type=int, default=100, help="timed hours, each with and without a history")
    p.add_argument("--history", type=int, default=10_000, help="hours of that history")
    p.add_argument("--counts", type=int, nargs="+", default=[4, 16, 64, 200], help="chunks per stream, for the memory")
    p.add_argument("--chunks", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.chunks:
        with tempfile.TemporaryDirectory() as folder: print(peak_of_chunks(args.chunks, Path(folder)))
        return 0
    made = report(args)
    if args.out: write_atomic(args.out, made)
    print(table(made))
    return 0


if __name__ == "__main__": sys.exit(main())
