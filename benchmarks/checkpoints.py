"""What checkpoints cost on the real data: their size, and their share of the training time for each `save_every`.

    python benchmarks/checkpoints.py --data ../shared/data --out results/checkpoints.json     four minutes on two cores
    python benchmarks/checkpoints.py --data ../shared/data --out results/checkpoints_gpu.json --device cuda

`share` is the time in `Run.save` (content, hashes, writes, flushes, pruning) over the time of the training, validation included.
Trainings with different `save_every` take turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from vram import describe_device, one_fold, versions, write_atomic  # noqa: E402

from cryptopredict.checkpoint import checkpoints  # noqa: E402
from cryptopredict.features import build_features  # noqa: E402
from cryptopredict.labels import make_labels  # noqa: E402
from cryptopredict.sources import load_panel  # noqa: E402
from cryptopredict.storage import TrainingFolder, code_commit  # noqa: E402
from cryptopredict.streams import FoldData, fold_data  # noqa: E402
from cryptopredict.tbptt_trainer import Run, TrainConfig, train, train_preset  # noqa: E402

HOW = dict(share="seconds inside Run.save / seconds of the training, median of the repeats",
           derived="share at save_every 500, from the seconds of one save and one update: this preset is too slow to train here")


def timed(config: TrainConfig, data: FoldData, stop: int | None = None) -> dict:
    """Seconds of a training and of its checkpoints, and their size; stops after `stop` updates if given."""
    spent, plain = [], Run.save

    def timed_save(run):
        began = time.perf_counter()
        try: return plain(run)
        finally: spent.append(time.perf_counter() - began)

    def on_update(run, record):
        if run.step == stop: raise InterruptedError

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as out, mock.patch.object(Run, "save", timed_save):
        began = time.perf_counter()
        try: updates = train(config, data, out, on_update=on_update).step
        except InterruptedError: updates = stop
        seconds = time.perf_counter() - began
        newest = checkpoints(TrainingFolder(out).checkpoints)[0]
        size = sum(p.stat().st_size for p in newest.iterdir())
    return dict(seconds=seconds, updates=updates, saves=len(spent), in_saves=sum(spent), one_save=median(spent), bytes=size)


def shares(config: TrainConfig, data: FoldData, every: list[int], repeats: int) -> list[dict]:
    """Share of the checkpoints in the training time, for each `save_every` in `every`."""
    made = {n: [] for n in every}
    for _ in range(repeats):
        for n in every: made[n].append(timed(replace(config, save_every=n), data))
    records = []
    for n, runs in made.items():
        share = sorted(r["in_saves"] / r["seconds"] for r in runs)
        records.append(dict(save_every=n, updates=runs[0]["updates"], saves=runs[0]["saves"], bytes=runs[0]["bytes"],
                            one_save=median(r["one_save"] for r in runs), seconds=median(r["seconds"] for r in runs),
                            share=dict(median=median(share), low=share[0], high=share[-1])))
        print(records[-1], flush=True)
    return records


def large(data: FoldData, updates: int) -> dict:
    """Seconds of one save and one update of preset baseline, and the share of checkpoints at save_every 500 that follows."""
    config = train_preset("baseline", data.x.shape[1], epochs=1, batch=2, save_every=1)
    run = timed(config, data._replace(valid=None), stop=updates)
    update = (run["seconds"] - run["in_saves"]) / updates
    return dict(preset="baseline", batch=2, updates=updates, one_save=run["one_save"], one_update=update, bytes=run["bytes"],
                derived_share=run["one_save"] / (500 * update + run["one_save"]))


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with source files")
    parser.add_argument("--out", type=Path, required=True, help="JSON report")
    parser.add_argument("--repeats", type=int, default=3, help="trainings per setting")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--commit", default=None, help="version of the code, for the report")
    args = parser.parse_args()
    torch.set_num_threads(2)
    panel = load_panel(args.data)
    features, labels = build_features(panel), make_labels(panel["close"])
    fold = one_fold(panel.index, labels, "2023-01-01")
    data = fold_data(features, labels, fold.train, fold.valid)
    report = dict(device=describe_device(args.device), versions=versions(), commit=args.commit or code_commit(),
                  date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", how=HOW, hours=data.stop - data.start)
    often, preset = [0, 500, 50, 10, 1], partial(train_preset, n_features=data.x.shape[1], epochs=4, device=args.device)
    if args.device == "cuda":  # warm up: kernels are loaded and tuned at first use
        for warm in (preset("tiny"), preset("baseline", amp="bf16")): shares(warm, data, [0], 1)
    report["tiny"] = shares(preset("tiny"), data, often, args.repeats)
    mixed = preset("baseline", amp="bf16")
    report["baseline"] = shares(mixed, data, [0, 10, 1], args.repeats) if args.device == "cuda" else large(data, 4)
    write_atomic(args.out, report)


if __name__ == "__main__": main()
