"A small training shared by several test files: its settings, its data, what must be reproducible, and how to kill it."
import json
import os
import signal
from pathlib import Path

import torch

from cryptopredict import checkpoint
from cryptopredict.checkpoint import load_latest
from cryptopredict.multitask import Targets
from cryptopredict.storage import TrainingFolder
from cryptopredict.streams import FoldData, Scaler
from cryptopredict.tbptt_trainer import TrainConfig, train_preset

SETTINGS = dict(batch=3, tbptt_len=40, epochs=2, d_model=16, headdim=8, mlp=24, dropout=.2, attention_every=2, n_heads=2,
             kv_window=50, pooling="mean", lr=3e-3, save_every=3)


def config(**changes) -> TrainConfig:
    "A model with every kind of state (convolution, scan, attention cache, running mean) and dropout."
    return train_preset("tiny", 6, **{**SETTINGS, **changes})


def data() -> FoldData:
    "1,100 hours, 30 % of the targets missing; the last 100 hours are for validation."
    r = torch.Generator().manual_seed(5)
    hours = torch.arange(1100.)
    inside = lambda v, where: torch.where(where & (torch.rand(1100, generator=r) < .7), v, torch.nan)
    draw = lambda where: Targets(inside(hours % 3, where), *(inside(torch.randn(1100, generator=r), where) for _ in range(2)),
                                 inside(torch.rand(1100, generator=r) + .1, where))
    scaler = Scaler(tuple("abcdef"), (0.,) * 6, (1.,) * 6, ())
    return FoldData(torch.randn(1100, 6, generator=r), draw(hours < 1000), draw(hours > 1000), scaler, 0, 1000)


def outcome(out: Path) -> dict[str, bytes]:
    "Everything that must be bit-identical: the histories, and all files of the newest checkpoint."
    path = load_latest(out / "checkpoints")[1]
    kept = {name: (path / name).read_bytes() for name in checkpoint.FILES}
    names = [*TrainingFolder.HISTORIES, "config.toml"]
    return kept | {name: (out / name).read_bytes() if (out / name).exists() else b"" for name in names}


def differences(out: Path, other: dict[str, bytes]) -> list[str]:
    "Names of the files in a training's folder that differ from the `outcome` of another training."
    mine = outcome(out)
    return [name for name in other if mine[name] != other[name]]


def history(out: Path, name: str) -> list[dict]:
    "The records of one of a training's histories; none if the file is missing."
    path = out / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def die(*_) -> None:
    "Kill this process with SIGKILL; usable as a callback."
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(step: int):
    "A callback that kills its process after the given update."
    return lambda run, record: die() if run.step == step else None


def die_at_operation(number: int, *names: str) -> None:
    "Make this process die at its n-th call of these functions of `os`, before the call."
    remaining = [number]
    for name in names:
        def deadly(*args, plain=getattr(os, name), **kwargs):
            remaining[0] -= 1
            if not remaining[0]: die()
            return plain(*args, **kwargs)
        setattr(os, name, deadly)
