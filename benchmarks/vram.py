"""GPU memory and speed of both presets by tbptt_len, and their training on one fold of real data.

Two steps, since features need TA-Lib and the readers but the network does not:

    python benchmarks/vram.py prepare --data ../shared/data --out .gpu/fold.safetensors     where everything is installed
    python benchmarks/vram.py run --fold .gpu/fold.safetensors --out results/vram.json      where the GPU is

`run` needs only torch, numpy, pandas, einops, safetensors, pydantic, psutil, filelock and tomli-w. `--device cpu --quick` takes
seconds and no GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed where the GPU is

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from cryptopredict.multitask import Targets  # noqa: E402
from cryptopredict.ssd import choose_backend  # noqa: E402
from cryptopredict.streams import Chunk, FoldData, Scaler, fold_data, plan_streams  # noqa: E402
from cryptopredict.tbptt_trainer import (  # noqa: E402
    Run,
    TrainConfig,
    best_epoch,
    steps_per_epoch,
    train,
    train_preset,
    train_step,
)

BEGAN = time.monotonic()
PRESETS, LENGTHS = ("baseline", "mhsa"), (256, 512, 1024, 2048)
TINY = dict(d_model=32, n_layers=3, d_state=16, headdim=16, mlp=32, n_heads=2, kv_window=32, chunk=16)  # sizes of --quick
HOW = dict(
    memory="bytes; peaks are counted from before the model is built and include weights, gradients and AdamW moments; "
           "`reserved` is the memory of the caching allocator, `device_used` all memory in use on the device after "
           "the last step, the context included",
    sweep="eager train_step with carried, detached state; stream j of the batch begins j / batch into the "
          "training hours and wraps around at their end, so that every length has the full batch; time from "
          "synchronised host clocks around a step, with the copy of the inputs to the device but without the "
          "indexing of rows; tokens_per_s over the steps after warm-up",
    training="train() at the preset's batch and tbptt_len as far as the plan allows; tokens_per_s between the ends "
             "of consecutive steps of an epoch, the whole loop included; `epochs` are the timings of the trainer, "
             "which count the time of the burn-in chunk but not its tokens; wall_s includes validation and "
             "checkpoints; a run stopped at the budget ends in the middle of its schedule")


class BudgetSpent(Exception):
    """The time for a record is used up."""


# -- prepare ---------------------------------------------------------------------------------------


def one_fold(index, labels, first_test: str):
    """The fold tested from `first_test` on, with a year of validation before it."""
    from cryptopredict.leakage import walk_forward
    return walk_forward(index, labels[["label_end", "sigma_end"]], first_test=first_test, step="YS", validation="365D")[0]


def cut(data: FoldData) -> FoldData:
    """Drop the hours after the last validation label, which nothing here reads."""
    last = int(torch.nonzero(torch.isfinite(data.valid.low))[-1]) + 1
    shorter = lambda targets: Targets(*(v[:last].clone() for v in targets))
    return data._replace(x=data.x[:last].clone(), fit=shorter(data.fit), valid=shorter(data.valid))


def save_fold(path: Path, data: FoldData, **about: str) -> None:
    """Write a fold to one safetensors file: x and targets in float32, positions and scaler in the metadata."""
    tensors = {"x": data.x.contiguous()}
    for part in ("fit", "valid"): tensors |= {f"{part}.{n}": v.contiguous() for n, v in getattr(data, part)._asdict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, dict(start=str(data.start), stop=str(data.stop), scaler=json.dumps(vars(data.scaler)), **about))
    os.replace(temporary, path)


def load_fold(path: Path) -> tuple[FoldData, dict[str, str]]:
    """Read a fold written by `save_fold`; also returns the other metadata of the file."""
    if not path.is_file(): raise ValueError(f"--fold {path}: no such file; write it with `prepare`")
    with safe_open(path, "pt") as file:
        tensors, about = {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata())
    part = lambda name: Targets(**{n: tensors[f"{name}.{n}"] for n in Targets._fields})
    scaler = Scaler(**{k: tuple(v) for k, v in json.loads(about.pop("scaler")).items()})
    return FoldData(tensors["x"], part("fit"), part("valid"), scaler, int(about.pop("start")), int(about.pop("stop"))), about


def check_imports() -> None:
    """Check that `run --help` works in a process that cannot import the packages that only `prepare` needs."""
    absent = ("talib", "pandera", "tyro", "plotly", "rich", "scoringrules", "httpx", "fastcore", "execnb", "nbdev")
    code = ("import runpy, sys\n"
            f"sys.modules.update(dict.fromkeys({absent!r}))\n"
            f"sys.argv = ['vram.py', 'run', '--help']\nrunpy.run_path({str(Path(__file__))!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"`run` does not start without {', '.join(absent)}:\n{done.stderr}")


def prepare(args: argparse.Namespace) -> int:
    """Turn the real files into the tensors of one fold."""
    from cryptopredict.features import build_features
    from cryptopredict.labels import make_labels
    from cryptopredict.sources import load_panel
    panel = load_panel(args.data)
    features, labels = build_features(panel), make_labels(panel["close"])
    fold = one_fold(panel.index, labels, args.first_test)
    data = fold_data(features, labels, fold.train, fold.valid)
    first, last, fit_last = (f"{panel.index[i]:%Y-%m-%d %H:%M}" for i in (0, len(cut(data).x) - 1, data.stop - 1))
    save_fold(args.out, cut(data), first=first, last=last, fit_last=fit_last, first_test=args.first_test, fold=repr(fold))
    again, about = load_fold(args.out)
    same = torch.equal(again.x, cut(data).x) and again[3:] == data[3:]  # scaler, start, stop
    if not same: raise RuntimeError(f"{args.out} does not read back as written: check the disk")
    print(f"{args.out}: {again.x.shape[0]} hours x {again.x.shape[1]} channels, float32, {args.out.stat().st_size / 1e6:.1f} MB")
    print("\n".join(f"  {k}: {v}" for k, v in about.items()))
    for name in PRESETS:
        plan = plan_streams(again.stop - again.start, *(getattr(train_preset(name), k) for k in ("batch", "tbptt_len")))
        sizes = f"batch {plan.batch}, tbptt_len {plan.tbptt_len}, {plan.note or 'not reduced'}"
        print(f"  {name}: {plan.chunks - 1} updates per epoch ({sizes})")
    check_imports()
    print("  `run` starts without TA-Lib, pandera, tyro and plotly")
    return 0


# -- run: device and versions --------------------------------------------------------------------------


def describe_device(device: str) -> dict:
    """Name, memory and compute capability of the device."""
    if device == "cpu": return dict(type="cpu", name=platform.machine(), threads=torch.get_num_threads())
    p = torch.cuda.get_device_properties(0)
    return dict(type="cuda", name=p.name, total_memory=p.total_memory, capability=f"{p.major}.{p.minor}",
                multiprocessors=p.multi_processor_count)


def driver_version() -> str | None:
    """Version of NVIDIA's driver, None without one."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError): return None


def versions() -> dict:
    """Versions of the software that the measurements depend on."""
    try: triton = version("triton")
    except PackageNotFoundError: triton = None
    return dict(python=platform.python_version(), torch=str(torch.__version__), cuda=torch.version.cuda, triton=triton,
                cudnn=torch.backends.cudnn.version(), driver=driver_version(),
                float32_matmul_precision=torch.get_float32_matmul_precision(),
                allocator=os.environ.get("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_ALLOC_CONF", "")))


def write_atomic(path: Path, content: dict) -> None:
    """Write JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally: temporary.unlink(missing_ok=True)


# -- run: clocks and memory ------------------------------------------------------------------------


def synchronize(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda": torch.cuda.synchronize()


def clear(device: str) -> None:
    """Free all cached memory and reset the peaks."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks(device: str) -> dict[str, int | None]:
    """Peak allocated and reserved bytes since `clear`; None on the CPU, where they are not counted."""
    if device == "cpu": return dict(peak_allocated=None, peak_reserved=None, device_used=None)
    free, total = torch.cuda.mem_get_info()
    return dict(peak_allocated=torch.cuda.max_memory_allocated(), peak_reserved=torch.cuda.max_memory_reserved(),
                device_used=total - free)


def quantiles(values: list[float]) -> dict[str, float]:
    """Minimum, quartiles and maximum."""
    if not values: return {}
    at = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0, .25, .5, .75, 1], dtype=torch.float64)).tolist()
    return dict(zip(("min", "q25", "median", "q75", "max"), at))


# -- run: memory and speed by tbptt_len -------------------------------------------------------


def config_for(args: argparse.Namespace, name: str, data: FoldData, **overrides) -> TrainConfig:
    """Configuration of a preset, tiny with --quick."""
    common = dict(epochs=args.epochs, amp=args.amp, device=args.device, seed=args.seed)
    return train_preset(name, data.x.shape[1], **common, **(TINY if args.quick else {}), **overrides)


def wrapped_chunks(data: FoldData, batch: int, length: int, count: int) -> Iterator[Chunk]:
    """Consecutive chunks of `batch` streams that wrap around at the end of the training hours."""
    hours = data.stop - data.start
    first = torch.arange(batch) * hours // batch
    for k in range(count):
        rows = data.start + (first[:, None] + torch.arange(k * length, (k + 1) * length)) % hours  # (batch, time)
        yield Chunk(data.x[rows], Targets(*(v[rows] for v in data.fit)), k == 0)


def timed_steps(run: Run, chunks: list[Chunk]) -> Iterator[tuple[float, float]]:
    """Seconds and loss of each update with carried, detached state; the first chunk has a loss like the others."""
    device, state = run.config.device, None
    for chunk in chunks:
        synchronize(device)
        began = time.perf_counter()
        state, record = train_step(run, [chunk._replace(fresh=False)], state, len(chunks))
        synchronize(device)
        seconds, loss = time.perf_counter() - began, record["loss"].item()
        del record
        if run.micro_batcher.rows or run.micro_batcher.pieces > 1: raise torch.OutOfMemoryError("the batch fits only in parts")
        yield seconds, loss


def measure(args: argparse.Namespace, name: str, data: FoldData, length: int, deadline: float) -> dict:
    """Peak memory and tokens/s of one preset at one length."""
    config = config_for(args, name, data, batch=args.batch, tbptt_len=length)
    peak_by_step, seconds, losses, chunks = [], [], [], list(wrapped_chunks(data, args.batch, length, args.warmup + args.steps))
    with tempfile.TemporaryDirectory() as folder:  # of events
        run = Run(config, folder)
        for took, loss in timed_steps(run, chunks):
            seconds.append(took)
            losses.append(loss)
            peak_by_step.append(peaks(args.device)["peak_allocated"])
            if time.monotonic() > deadline: break
    tokens, whole = args.batch * length, len(seconds) == args.warmup + args.steps
    return dict(status="ok" if whole else "stopped at the budget", parameters=sum(p.numel() for p in run.model.parameters()),
                **peaks(args.device), peak_allocated_by_step=peak_by_step, tokens_per_step=tokens, step_s=seconds,
                tokens_per_s=quantiles([tokens / s for s in seconds[args.warmup:]]), losses=losses,
                losses_finite=all(map(math.isfinite, losses)))


# -- run: training on one fold ---------------------------------------------------------------------


def climatology(fit: Targets) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Start of the heads: class frequencies, quantiles of r90 and the geometric mean of sigma over the training rows."""
    known = [v[torch.isfinite(v)] for v in (fit.direction, fit.low, fit.sigma)]
    frequencies = torch.bincount(known[0].long(), minlength=3) / len(known[0])
    return frequencies, known[1].quantile(torch.tensor([.1, .5, .9])), known[2].clamp_min(1e-3).log().mean().exp().item()


def read_lines(path: Path) -> list[dict]:
    """The records of a .jsonl file; none if it is missing."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def history(out: Path, every: int) -> dict:
    """Loss curve (each `every`-th step; 0: about 200 points), validation losses and timings in a run folder."""
    curve, validation = read_lines(out / "metrics.jsonl"), read_lines(out / "validation.jsonl")
    every = every or max(1, len(curve) // 200)
    kept = curve[every - 1::every]
    return dict(updates=len(curve), every=every, curve=kept, validation=validation, epochs=read_lines(out / "timings.jsonl"),
                best_epoch=best_epoch(out) if validation else None, losses_finite=all(math.isfinite(r["loss"]) for r in curve))


def fit_fold(args: argparse.Namespace, name: str, data: FoldData, deadline: float) -> dict:
    """Train one preset on the fold until its last epoch or the deadline."""
    own = dict(batch=args.batch, tbptt_len=args.lengths[-1]) if args.quick else {}
    config, ends, status = config_for(args, name, data, **own), [], "ok"
    plan = plan_streams(data.stop - data.start, config.batch, config.tbptt_len)

    def on_update(run: Run, record: dict) -> None:
        ends.append((run.epoch, time.perf_counter()))
        if time.monotonic() > deadline: raise BudgetSpent

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        try: train(config, data, folder, climatology(data.fit), on_update=on_update)
        except BudgetSpent: status = "stopped at the budget"
        synchronize(args.device)
        wall, made = time.perf_counter() - began, history(Path(folder), args.every)
    tokens = plan.batch * plan.tbptt_len
    speed = quantiles([tokens / (b - a) for (e, a), (f, b) in zip(ends, ends[1:]) if e == f])
    return dict(status=status, epochs_planned=config.epochs, updates_planned=config.epochs * steps_per_epoch(config, data),
                lr=config.lr, plan=plan._asdict(), **peaks(args.device), tokens_per_step=tokens, tokens_per_s=speed,
                wall_s=wall, **made)


# -- run: all jobs --------------------------------------------------------------------------------


def attempt(work: Callable[..., dict], *args) -> dict:
    """The result of `work`; out of memory and failures become records, so that later jobs still run."""
    began, device = time.monotonic(), args[0].device
    clear(device)
    before = torch.cuda.memory_allocated() if device == "cuda" else None  # left by earlier jobs: workspaces of libraries
    try: made = work(*args)
    except torch.OutOfMemoryError as error:
        made = dict(status="out of memory", error=str(error).splitlines()[0], **peaks(device))
    except (RuntimeError, ValueError, AssertionError) as error:
        made = dict(status="failed", error=f"{type(error).__name__}: {error}")
    return {**made, "allocated_before": before, "took_s": time.monotonic() - began}


def print_record(text: str, record: dict) -> None:
    """Print a record in one line."""
    gib = "".join(f", {k} {record[f'peak_{k}'] / 2**30:.2f} GiB" for k in ("allocated", "reserved") if record.get(f"peak_{k}"))
    speed = record.get("tokens_per_s", {}).get("median")
    pace = f", {speed:,.0f} tokens/s" if speed else ""
    print(f"{text}: {record['status']}{gib}{pace} {record.get('error', '')}".rstrip(), flush=True)


def jobs(args: argparse.Namespace, data: FoldData) -> Iterator[tuple[str, dict, Callable[[float], dict]]]:
    """Yield for each job the section of the report, the key of its record, and the work as a function of the deadline."""
    for name in args.presets if "sweep" in args.parts else ():
        for n in args.lengths:
            yield "sweep", dict(preset=name, tbptt_len=n, batch=args.batch), partial(attempt, measure, args, name, data, n)
    for name in args.presets if "train" in args.parts else ():
        yield "training", dict(preset=name), partial(attempt, fit_fold, args, name, data)


def deadline(args: argparse.Namespace, section: str, left: int) -> float:
    """When a job must end: the sweep may use half of the budget, trainings share the rest."""
    now, end = time.monotonic(), BEGAN + args.budget - 10
    if section == "sweep": return end - args.budget / 2 if "train" in args.parts else end
    return now + (end - now) / left


def run_all(args: argparse.Namespace, report: dict, data: FoldData) -> None:
    """Run the jobs that the budget allows; writes the report after each."""
    todo, longest = list(jobs(args, data)), 5.
    for i, (section, key, work) in enumerate(todo):
        until = deadline(args, section, len(todo) - i)
        record = work(until) if time.monotonic() + longest < until else dict(status="skipped: time budget")
        if section == "sweep": longest = max(longest, record.get("took_s", 0.))
        report[section].append({**key, **record})
        done = report["sweep"] + report["training"]
        report["complete"] = len(done) == len(todo) and all(r["status"] in ("ok", "out of memory") for r in done)
        report["wall_s"] = time.monotonic() - BEGAN
        write_atomic(args.out, report)
        print_record(" ".join([section, *(f"{k} {v}" for k, v in key.items())]), record)


def quick(args: argparse.Namespace, data: FoldData) -> FoldData:
    """Set tiny sizes in `args`; returns the last hours of the training data."""
    args.lengths, args.batch, args.steps, args.warmup = [16, 32], 2, 3, 1
    last = data.stop + int(torch.nonzero(torch.isfinite(data.valid.low[data.stop:]))[0]) + 500
    shorter = lambda targets: Targets(*(v[:last] for v in targets))
    return data._replace(x=data.x[:last], fit=shorter(data.fit), valid=shorter(data.valid), start=data.stop - 600)


def start_report(args: argparse.Namespace, data: FoldData, about: dict[str, str]) -> dict:
    """The report before the first record: device, versions, arguments (file names without folders) and fold."""
    arguments = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k != "work"}
    fold = dict(**about, hours=data.x.shape[0], channels=data.x.shape[1], start=data.start, stop=data.stop)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp, torch.float32)
    backend = " because ".join(choose_backend("auto", torch.zeros(1, dtype=kind, device=args.device)))
    return dict(device=describe_device(args.device), versions=versions(), commit=args.commit, backend=backend,
                date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", arguments=arguments, fold=fold, how=HOW, complete=False,
                wall_s=0., sweep=[], training=[])


def benchmark(args: argparse.Namespace) -> int:
    """Run sweep and training and write --out; exit code 1 if a record failed or a loss is not finite."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device; try --device cpu --quick")
    data, about = load_fold(args.fold)
    if args.quick: data = quick(args, data)
    report = start_report(args, data, about)
    run_all(args, report, data)
    bad = [r for r in report["sweep"] + report["training"] if r["status"] == "failed" or not r.get("losses_finite", True)]
    state = "complete" if report["complete"] else "incomplete"
    print(f"{args.out.name}: {args.out.stat().st_size / 1e3:.0f} kB, {report['wall_s']:.0f} s, {state}")
    return 1 if bad else 0


def add_prepare(p: argparse.ArgumentParser) -> None:
    """Add the flags of `prepare`."""
    p.add_argument("--data", type=Path, required=True, help="folder with source files")
    p.add_argument("--out", type=Path, required=True, help="safetensors file to write; it holds data rows: never commit it")
    p.add_argument("--first-test", default="2023-01-01", help="first test time; validation is the year before")
    p.set_defaults(work=prepare)


def add_run(p: argparse.ArgumentParser) -> None:
    """Add the flags of `run`."""
    p.add_argument("--fold", type=Path, required=True, help="file written by prepare")
    p.add_argument("--out", type=Path, required=True, help="JSON report, rewritten after each record")
    p.add_argument("--commit", default="", help="version of the code, for the report")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to run")
    p.add_argument("--quick", action="store_true", help="tiny models, lengths and data, to check that everything runs")
    p.add_argument("--parts", nargs="+", choices=("sweep", "train"), default=["sweep", "train"], help="what to do")
    p.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help="models")
    p.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="values of tbptt_len in the sweep, hours")
    p.add_argument("--batch", type=int, default=16, help="streams of the sweep; the training uses the preset's")
    p.add_argument("--steps", type=int, default=12, help="timed updates of the sweep")
    p.add_argument("--warmup", type=int, default=4, help="untimed updates before those")
    p.add_argument("--epochs", type=int, default=2, help="epochs of training, spanned by the learning-rate schedule")
    p.add_argument("--every", type=int, default=0, help="keep each n-th update in the loss curve; 0: about 200 points")
    p.add_argument("--amp", choices=("off", "bf16", "fp16"), default="bf16", help="mixed precision")
    p.add_argument("--seed", type=int, default=0, help="seed of weights, dropout and offsets")
    p.add_argument("--budget", type=float, default=540., help="seconds after which no new job starts")
    p.set_defaults(work=benchmark)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts, style = top.add_subparsers(required=True, metavar="prepare | run"), argparse.ArgumentDefaultsHelpFormatter
    for add, what in ((add_prepare, "turn the real files into the tensors of one fold"), (add_run, "measure and train")):
        add(parts.add_parser(add.__name__.removeprefix("add_"), help=what, description=what, formatter_class=style))
    return top


def main() -> int:
    """Run the command; a user's mistake gets one line and exit code 2."""
    args = parser().parse_args()
    try: return args.work(args)
    except ValueError as error:
        print(f"vram.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__": sys.exit(main())
