"""What truncation costs: cosine between truncated and exact gradient by tbptt_len and group of parameters, on real data.

    python benchmarks/truncation.py --data ../shared/data --out results/truncation.json       ten minutes on two cores

The exact gradient is that of the mean loss over the training hours of one fold, as one stream with the state carried from the
first hour. The truncated gradient is that of the same loss at the same weights, with the state detached every tbptt_len hours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from vram import climatology, describe_device, one_fold, versions, write_atomic  # noqa: E402

from cryptopredict.bptt import span_backward  # noqa: E402
from cryptopredict.multitask import Targets, multitask_loss, task_losses  # noqa: E402
from cryptopredict.streams import Chunk, FoldData, fold_data  # noqa: E402
from cryptopredict.tbptt_trainer import Run, train, train_preset  # noqa: E402

HOW = dict(
    weights="preset tiny, and the same with attention over 168 hours in its second layer, trained on the fold for `epochs` "
            "epochs at the preset's settings; gradients are taken without dropout",
    cosine="between the gradients of one group of parameters as vectors; norm: of the truncated relative to the exact gradient")
MODELS = dict(mamba2={}, attention=dict(attention_every=2, kv_window=168))
GROUPS = {  # a parameter belongs to the first group with a part in its name
    "decay and step size": ("A_log", "dt_bias"), "attention": (".attention.", ".gate"), "convolution": ("conv1d",),
    "projections of the mixer": ("in_proj", "out_proj", ".D"), "MLP": (".mlp.",), "embedding": ("embed",), "norms": ("norm",),
    "heads": ("heads", "log_var")}
LENGTHS = tuple(2**n for n in range(5, 15))


def group_of(name: str) -> str:
    """The group of a parameter."""
    return next(group for group, parts in GROUPS.items() if any(part in name for part in parts))


def real_fold(path: Path, first_test: str) -> FoldData:
    """Tensors of the training span before `first_test`."""
    from cryptopredict.features import build_features
    from cryptopredict.labels import make_labels
    from cryptopredict.sources import load_panel
    panel = load_panel(path)
    features, labels = build_features(panel), make_labels(panel["close"])
    fold = one_fold(panel.index, labels, first_test)
    return fold_data(features, labels, fold.train, None)


def stretch(data: FoldData, longest: int) -> FoldData:
    """The end of the training span: a multiple of `longest` hours, all labelled."""
    hours = (data.stop - data.start) // longest * longest
    part = data._replace(start=data.stop - hours)
    known = torch.stack([torch.isfinite(v[part.start:part.stop]) for v in part.fit]).all()
    if not known: raise ValueError(f"hours {part.start} to {part.stop} are not all labelled: choose a later --first-test")
    return part


def gradient(run: Run, data: FoldData, length: int, exact: bool) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss by group, truncated or exact, with chunks of `length` hours."""
    model, hours = run.model.eval(), data.stop - data.start
    cut = lambda v: v[data.start:data.stop].split(length)
    parts = zip(cut(data.x), *map(cut, data.fit))
    chunks = [Chunk(x[None], Targets(*(v[None] for v in targets)), False) for x, *targets in parts]

    def loss(forecast, chunk):
        return multitask_loss(task_losses(forecast, chunk.targets), model.log_var_cls, model.log_var_reg) * length / hours

    model.zero_grad(set_to_none=True)
    state = None
    for span in [chunks] if exact else [[chunk] for chunk in chunks]:
        state = span_backward(lambda chunk, state: model(chunk.x, state), loss, span, state)
    groups: dict[str, list[torch.Tensor]] = {}
    for name, p in model.named_parameters(): groups.setdefault(group_of(name), []).append(p.grad.flatten().double())
    every = {"all": torch.cat([v for parts in groups.values() for v in parts])}
    return {name: torch.cat(parts) for name, parts in groups.items()} | every


def compare(run: Run, data: FoldData) -> dict:
    """Cosines and relative norms for all lengths."""
    due = gradient(run, data, 1024, True)
    made = {length: gradient(run, data, length, False) for length in LENGTHS}
    again = gradient(run, data, 4096, True)
    spread = max(((again[g] - due[g]).norm() / due[g].norm()).item() for g in due)
    cosine = lambda a, b: torch.nn.functional.cosine_similarity(a, b, 0).item()
    return dict(exact_by_other_chunks=spread, norms={g: due[g].norm().item() for g in due},
                cosine={g: [cosine(made[n][g], due[g]) for n in LENGTHS] for g in due},
                norm={g: [(made[n][g].norm() / due[g].norm()).item() for n in LENGTHS] for g in due})


def trained(name: str, data: FoldData, epochs: int, seed: int, folder: Path) -> Run:
    """A model trained for `epochs` epochs."""
    config = train_preset("tiny", data.x.shape[1], epochs=4, seed=seed, **MODELS[name])
    return train(config, data, folder / f"{name}-{seed}", climatology(data.fit), until=epochs)


def main() -> int:
    """Train, compare gradients, and write the report."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="folder with source files")
    p.add_argument("--out", type=Path, required=True, help="JSON report, written after each model")
    p.add_argument("--commit", default="", help="version of the code, for the report")
    p.add_argument("--first-test", default="2023-01-01", help="first test time; gradients are of the training span before it")
    p.add_argument("--epochs", type=int, nargs="+", default=[1, 4], help="take gradients after these epochs, of 4")
    p.add_argument("--seeds", type=int, default=3, help="models of each kind")
    p.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS), help="kinds of models")
    args = p.parse_args()
    torch.set_num_threads(2)
    whole = real_fold(args.data, args.first_test)
    data = stretch(whole, LENGTHS[-1])
    report = dict(device=describe_device("cpu"), versions=versions(), commit=args.commit,
                  date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", how=HOW, lengths=LENGTHS,
                  hours=data.stop - data.start, first_test=args.first_test, groups=GROUPS, results=[])
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            for seed in range(args.seeds):
                for epochs in sorted(args.epochs):
                    record = compare(trained(name, whole, epochs, seed, Path(folder)), data)
                    report["results"].append(dict(model=name, seed=seed, epochs=epochs, **record))
                    write_atomic(args.out, report)
                    rounded = {g: [round(c, 3) for c in v] for g, v in record["cosine"].items()}
                    print(name, seed, epochs, json.dumps(rounded), flush=True)
    return 0


if __name__ == "__main__": sys.exit(main())
