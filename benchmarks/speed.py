"""Speed on the CPU: the scan beside a loop over time, training of the tiny preset, and memory against the number of chunks.

  python benchmarks/speed.py --out results/speed.json        two threads, about a minute; on random inputs

Times that are compared are taken in turn in one process. Needs torch, numpy, pandas, einops and safetensors only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

# Threads that wait by spinning starve each other on a busy machine; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

import torch  # noqa: E402
from vram import describe_device, quantiles, timed_steps, versions, wrapped_chunks, write_atomic  # noqa: E402

from cryptopredict.mamba2_block import ssd_reference, ssd_scan  # noqa: E402
from cryptopredict.multitask import Targets  # noqa: E402
from cryptopredict.streams import FoldData, plan_streams  # noqa: E402
from cryptopredict.tbptt_trainer import Run, peak_bytes, train_epoch, train_preset  # noqa: E402

HOW = dict(
    scan="forward and gradient of all inputs, float32, batch 2, length 1024, 8 heads of 64 channels, 128 state numbers a "
         "channel, chunk 64; the two in turn; seconds",
    training="train_step of preset tiny, batch 16, tbptt_len 256, 60 channels, carried and detached state, after 3 warm-up "
             "steps; tokens are hours times streams",
    memory="a process of its own for each number of chunks a stream holds: one epoch of preset tiny, batch 4, tbptt_len 64, with "
           "the same tensors in memory; largest resident size of the process, bytes")


def scan_inputs() -> list[torch.Tensor]:
    """x, dt, A, B, C of a scan at the baseline preset's sizes."""
    shapes = dict(x=(2, 1024, 8, 64), dt=(2, 1024, 8), A=(8,), B=(2, 1024, 1, 128), C=(2, 1024, 1, 128))
    x, dt, A, B, C = (torch.randn(*s) for s in shapes.values())
    return [v.requires_grad_() for v in (x, torch.nn.functional.softplus(dt - 2), -A.exp(), B, C)]


def seconds(scan, inputs: list[torch.Tensor]) -> float:
    """One forward and backward."""
    inputs = [v.detach().requires_grad_() for v in inputs]
    began = time.perf_counter()
    torch.autograd.grad(scan(*inputs)[0].sum(), inputs)
    return time.perf_counter() - began


def scan(repeats: int) -> dict:
    """The chunked scan and the loop, in turn."""
    inputs = scan_inputs()
    seconds(ssd_scan, inputs)
    pairs = [(seconds(ssd_reference, inputs), seconds(ssd_scan, inputs)) for _ in range(repeats)]
    loop, chunked = zip(*pairs)
    return dict(loop_s=quantiles(loop), scan_s=quantiles(chunked), ratio=quantiles([a / b for a, b in pairs]))


def random_fold(hours: int) -> FoldData:
    """Random inputs and labels."""
    targets = Targets(torch.randint(0, 3, (hours,)).float(), *(torch.randn(hours) for _ in range(2)), torch.rand(hours) + .1)
    return FoldData(torch.randn(hours, 60), targets, None, None, 0, hours)


def training(steps: int, folder: Path) -> dict:
    """Tokens per second of the tiny preset."""
    config = train_preset("tiny", 60)
    run = Run(config, folder)
    took = list(timed_steps(run, list(wrapped_chunks(random_fold(60_000), config.batch, config.tbptt_len, steps + 3))))[3:]
    tokens = config.batch * config.tbptt_len
    return dict(batch=config.batch, tbptt_len=config.tbptt_len, tokens_per_s=quantiles([tokens / s for s, _ in took]),
                parameters=sum(p.numel() for p in run.model.parameters()))


def peak_of_chunks(chunks: int, folder: Path) -> int:
    """Largest resident size of a process that trains through so many chunks."""
    config, data = train_preset("tiny", 60, batch=4, tbptt_len=64), random_fold(60_000)
    data = data._replace(stop=64 + 4 * 64 * (chunks + 1))
    assert plan_streams(data.stop, config.batch, config.tbptt_len).chunks == chunks + 1
    train_epoch(Run(config, folder), data, chunks, lambda run, record: None)
    return peak_bytes("cpu")["peak_rss"]


def memory(counts: tuple[int, ...], threads: int) -> dict:
    """Peak memory by number of chunks, each in a process of its own."""
    ask = lambda n: subprocess.run([sys.executable, __file__, "--chunks", str(n), "--threads", str(threads)], check=True,
                                   capture_output=True, text=True).stdout
    return {str(n): int(ask(n)) for n in counts}


def report(args: argparse.Namespace) -> dict:
    """All measurements."""
    with tempfile.TemporaryDirectory() as folder:
        measured = dict(scan=scan(args.repeats), training=training(args.steps, Path(folder)))
    measured["memory"] = memory(tuple(args.counts), args.threads)
    return dict(device=describe_device("cpu"), versions=versions(), commit=args.commit,
                date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", how=HOW, **measured)


def main() -> int:
    """Measure and write."""
    style = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    p.add_argument("--out", type=Path, help="JSON report; none: printed only")
    p.add_argument("--commit", default="", help="version of the code, for the report")
    p.add_argument("--threads", type=int, default=2, help="of torch")
    p.add_argument("--repeats", type=int, default=5, help="pairs of scan and loop")
    p.add_argument("--steps", type=int, default=40, help="timed training steps")
    p.add_argument("--counts", type=int, nargs="+", default=[4, 16, 64, 200], help="chunks a stream, for the memory")
    p.add_argument("--chunks", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.chunks:
        with tempfile.TemporaryDirectory() as folder: print(peak_of_chunks(args.chunks, Path(folder)))
        return 0
    made = report(args)
    if args.out: write_atomic(args.out, made)
    print(json.dumps({k: made[k] for k in ("scan", "training", "memory")}, indent=1))
    return 0


if __name__ == "__main__": sys.exit(main())
