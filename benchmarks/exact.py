"""Exact backpropagation through the whole history compared with truncated: memory and time by length of history.

    python benchmarks/exact.py --device cuda --out results/exact.json         both presets and backends, bf16, 14 minutes
    python benchmarks/exact.py --device cpu --out results/exact_cpu.json      preset tiny, two threads, three minutes

On random inputs. One update with `bptt="exact"` reads the same chunks as the truncated updates; both take turns. Needs the
packages of `vram.py run`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

import torch  # noqa: E402
from vram import clear, describe_device, peaks, quantiles, synchronize, versions, write_atomic  # noqa: E402

from cryptopredict.multitask import PRESETS, Targets  # noqa: E402
from cryptopredict.ssd import BACKENDS, choose_backend  # noqa: E402
from cryptopredict.states import map_state  # noqa: E402
from cryptopredict.streams import Chunk  # noqa: E402
from cryptopredict.tbptt_trainer import Run, train_preset, train_step  # noqa: E402

HOW = dict(
    exact="one update: `train_step` on all chunks of the history, gradients through all of them",
    truncated="as many updates as there are chunks: `train_step` on one chunk after another, with the state carried",
    time="seconds from synchronised host clocks; tokens are steps times streams; the ratio is exact to truncated time per token, "
         "the two in turn, after a warm-up of both",
    memory="bytes; peak_allocated is the peak on the GPU during the last exact update, weights, moments and gradients included, "
           "truncated_peak that of the truncated updates after it; boundary_states and inputs are in pinned host memory "
           "(on a CPU: in memory)")


def chunks_of(steps: int, batch: int, length: int, features: int, pin: bool) -> list[Chunk]:
    """Chunks of a history of random inputs and labels; `pin` puts the inputs into pinned memory."""
    hold = (lambda v: v.pin_memory()) if pin else (lambda v: v)
    draw = lambda: Targets(torch.randint(0, 3, (batch, length)).float(), *(torch.randn(batch, length) for _ in range(2)),
                           torch.rand(batch, length) + .1)
    return [Chunk(hold(torch.randn(batch, length, features)), draw(), False) for _ in range(steps // length)]


def now() -> str:
    """The time in UTC."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def state_bytes(run: Run, batch: int) -> int:
    """Bytes of the state at one chunk boundary."""
    total = []
    map_state(lambda v: total.append(v.numel() * v.element_size()), run.model.init_state(batch))
    return sum(total)


def timed(run: Run, chunks: list[Chunk], exact: bool) -> tuple[float, list[float]]:
    """Seconds to train through the history once, and the losses."""
    synchronize(run.config.device)
    began, state, losses = time.perf_counter(), None, []
    for span in [chunks] if exact else [[chunk] for chunk in chunks]:
        state, record = train_step(run, span, state, 10**6)
        losses.append(record["loss"])
    synchronize(run.config.device)
    return time.perf_counter() - began, [v.item() for v in losses]


def measure(args: argparse.Namespace, run: Run, steps: int, repeats: int, both: bool) -> dict:
    """Record of one length of history: exact, and truncated if `both`."""
    c = run.config
    chunks = chunks_of(steps, c.batch, c.tbptt_len, c.model.n_features, args.device == "cuda")
    clear(args.device)
    pairs, losses = [], []
    for _ in range(repeats):
        seconds, one = timed(run, chunks, True)
        memory = peaks(args.device)
        losses += one
        if args.device == "cuda": torch.cuda.reset_peak_memory_stats()
        pairs.append((seconds, timed(run, chunks, False)[0] if both else None))
        truncated = peaks(args.device)["peak_allocated"]
        if both: clear(args.device)
    tokens, inputs = steps * c.batch, sum(chunk.x.numel() * chunk.x.element_size() for chunk in chunks)
    record = dict(steps=steps, chunks=len(chunks), peak_allocated=memory["peak_allocated"], peak_reserved=memory["peak_reserved"],
                  commit=args.commit, date=now(), boundary_states=(len(chunks) - 1) * state_bytes(run, c.batch), inputs=inputs,
                  exact_tokens_per_s=quantiles([tokens / a for a, _ in pairs]), losses_finite=all(map(math.isfinite, losses)))
    if not both: return record
    record |= dict(truncated_peak=truncated, truncated_tokens_per_s=quantiles([tokens / b for _, b in pairs]),
                   ratio=quantiles([a / b for a, b in pairs]))
    return record


def earlier_sweeps(path: Path | None, report: dict) -> list[dict]:
    """Sweeps of an existing report, which must be of the same device and versions and is extended."""
    if path is None or not path.is_file(): return []
    try: before = json.loads(path.read_text())
    except ValueError as broken: raise SystemExit(f"{path} cannot be read ({broken}): give another --out") from broken
    for key in ("device", "versions"):
        old = before.get(key) if isinstance(before, dict) else None
        if old != report[key]: raise SystemExit(f"{path} is of another {key} ({old}): give another --out")
    return before["sweeps"]


def joined(sweeps: list[dict], made: dict) -> list[dict]:
    """`sweeps` with `made` added; an earlier sweep of the same settings keeps the lengths that `made` lacks."""
    about = lambda sweep: {k: v for k, v in sweep.items() if k != "records"}
    measured = {r["steps"] for r in made["records"]}
    old = [r for s in sweeps if about(s) == about(made) for r in s["records"] if r["steps"] not in measured]
    made = made | dict(records=sorted(old + made["records"], key=lambda r: r["steps"]))
    key = lambda sweep: (sweep["preset"], sweep.get("backend"))
    return [*(s for s in sweeps if key(s) != key(made)), made]


def sweep(args: argparse.Namespace, name: str, backend: str) -> Iterator[dict]:
    """Measure one preset and backend; yields the sweep so far after each length, so that it can be saved."""
    gpu = args.device == "cuda"
    sizes = dict(batch=args.batch or train_preset(name).batch, amp="bf16" if gpu else "off", device=args.device)
    with tempfile.TemporaryDirectory() as folder:
        config = train_preset(name, 60, **sizes)
        run = Run(replace(config, model=replace(config.model, backend=backend)), folder)
        warm = chunks_of(4 * run.config.tbptt_len, run.config.batch, run.config.tbptt_len, 60, gpu)
        for exact in (True, False): timed(run, warm, exact)
        made = dict(preset=name, backend=backend, batch=run.config.batch, tbptt_len=run.config.tbptt_len, amp=run.config.amp,
                    state_bytes=state_bytes(run, run.config.batch), records=[])
        for steps in args.steps:
            r = measure(args, run, steps, args.repeats if steps <= args.compare else 1, steps <= args.compare)
            made["records"].append(r)
            gib = f"{r['peak_allocated'] / 2**30:.3f} GiB on the device, " if gpu else ""
            ratio = f", {r['ratio']['median']:.2f}x truncated" if "ratio" in r else ""
            print(f"{name}, {backend} {steps:>7} steps: {gib}{r['boundary_states'] / 2**20:.0f} MiB of states, "
                  f"{r['exact_tokens_per_s']['median']:,.0f} tokens/s{ratio}", flush=True)
            yield made


def whole(text: str) -> int:
    """Parse a positive integer."""
    if (number := int(text)) < 1: raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main() -> int:
    """Measure and write the report."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", type=Path, help="JSON report, written after each length; an existing one is extended")
    p.add_argument("--commit", default="", help="version of the code, for the report")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to run")
    p.add_argument("--threads", type=whole, default=2, help="threads of torch on a CPU")
    p.add_argument("--presets", nargs="+", choices=PRESETS, help="models; default: baseline and mhsa on a GPU, tiny on a CPU")
    p.add_argument("--backends", nargs="+", choices=BACKENDS,
                   help="backends of the scan; default: mamba_ssm and torch on a GPU, torch on a CPU")
    p.add_argument("--batch", type=whole, help="streams; default: the preset's")
    p.add_argument("--steps", type=whole, nargs="+",
                   help="lengths of history, multiples of tbptt_len; default: 8k to 256k on a GPU, 1k to 8k on a CPU")
    p.add_argument("--compare", type=int, default=32768, help="longest history that is also trained truncated")
    p.add_argument("--repeats", type=whole, default=9, help="repetitions where both are timed in turn")
    args = p.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available(): p.error("--device cuda: there is no GPU; give --device cpu")
    gpu = args.device == "cuda"
    if not gpu: torch.set_num_threads(args.threads)
    args.presets = args.presets or (["baseline", "mhsa"] if gpu else ["tiny"])
    args.backends = args.backends or (["mamba_ssm", "torch"] if gpu else ["torch"])
    try:
        for name in args.backends: choose_backend(name, torch.zeros(1, device=args.device))
    except ValueError as unfit: p.error(f"--backends: {unfit}")
    args.steps = args.steps or ([2**n for n in range(13, 19)] if gpu else [1024, 2048, 4096, 8192])
    for name, steps in itertools.product(args.presets, args.steps):
        length = train_preset(name).tbptt_len
        if steps % length: p.error(f"--steps: {steps} is not a multiple of {length}, the tbptt_len of {name}")
    report = dict(device=describe_device(args.device), versions=versions(), commit=args.commit, date=now(), how=HOW,
                  sweeps=[])
    report["sweeps"] = earlier_sweeps(args.out, report)
    try:
        if args.out: write_atomic(args.out, report)  # an unwritable path is reported before anything is measured
    except OSError as error: p.error(f"--out: {args.out} cannot be written ({error})")
    for name, backend in itertools.product(args.presets, args.backends):
        for made in sweep(args, name, backend):
            report["sweeps"] = joined(report["sweeps"], made)
            if args.out: write_atomic(args.out, report)
    if not args.out: print(json.dumps(report["sweeps"], indent=1))
    return 0 if all(r["losses_finite"] for s in report["sweeps"] for r in s["records"]) else 1


if __name__ == "__main__": sys.exit(main())
