"""`cryptopredict train` killed with SIGKILL again and again and resumed, file by file beside one left alone.

    python benchmarks/kills.py --data ../shared/data --out results/kills_gpu.json --device cuda

Both train with deterministic algorithms and a checkpoint after each update; kills come up to half a second after updates that
are drawn at random. Exit code 1 where a file differs, `timings.jsonl` excepted, where a kill came too late, or where a process
did not resume where the one before stopped. Also compared: the time and the memory that `--dry-run` expects with those of
the training left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from vram import describe_device, versions, write_atomic  # noqa: E402

from cryptopredict.storage import code_commit  # noqa: E402

CLI = [sys.executable, "-c", "from cryptopredict.cli import main; raise SystemExit(main())"]


def command(args: argparse.Namespace) -> list[str]:
    """The training, but for its folder."""
    return [*CLI, "train", "--data", str(args.data), "--preset", args.preset, "--epochs", str(args.epochs), "--seeds", "1",
            "--train.device", args.device, "--train.deterministic", "True", "--train.save-every", "1"]


def updates(folder: Path) -> int:
    """Lines of all metrics.jsonl."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/metrics.jsonl"))


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file by its path."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def environment() -> dict[str, str]:
    """Of the processes: the package need not be installed."""
    return os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))


def finished(what: list[str]) -> tuple[float, str]:
    """Seconds and output of a process that must end well."""
    began = time.perf_counter()
    done = subprocess.run(what, env=environment(), capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{' '.join(what)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - began, done.stdout


def killed(what: list[str], folder: Path, after: int | None, delay: float = 0.) -> dict:
    """A process that resumes what is there, killed some time after so many updates; None: not at all."""
    found = now = least = updates(folder)
    due = float("inf") if after is None else max(after, found + 1)  # it must have done something
    process = subprocess.Popen(what, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and now < due:
            time.sleep(.001)
            now = updates(folder)
            least = min(least, now)
        time.sleep(delay)
    finally:
        if process.poll() is None: process.send_signal(signal.SIGKILL)
        process.wait()
    half = sorted(p.name for p in folder.rglob("*.tmp"))
    return dict(after=after, delay=delay, ended=process.returncode, found=found, least=least, updates=updates(folder),
                half_written=half)


def expected(output: str) -> dict:
    """What a dry run prints of all trainings."""
    found = re.search(r"in all ([\d,]+) updates?, about (.+?) of training and ([\d,]+) MiB", output)
    if not found: raise SystemExit(f"the dry run printed neither time nor memory:\n{output}")
    return dict(updates=int(found[1].replace(",", "")), time=found[2], mib=int(found[3].replace(",", "")))


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """One training left alone, one killed and resumed."""
    what, (whole, other), draw = command(args), (folder / "whole", folder / "killed"), random.Random(args.seed)
    dry = expected(finished([*what, "--dry-run", "--out", str(folder / "dry")])[1])
    seconds, _ = finished([*what, "--out", str(whole)])
    count = updates(whole)
    kills = []
    for after in sorted(draw.sample(range(1, count), args.kills)):
        kills.append(killed([*what, "--out", str(other)], other, after, draw.random() / 2))
        print(kills[-1], flush=True)
    last = killed([*what, "--out", str(other)], other, None)
    print(last, flush=True)
    one, two = tree(whole), tree(other)
    apart = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    aside = [name for name in apart if Path(name).name == "timings.jsonl" and name in one.keys() & two.keys()]
    return dict(files=len(one), differ=[name for name in apart if name not in aside], only_timings=aside, updates=count,
                kills=kills, last=last, dry_run=dry, seconds=seconds)


def is_shown(made: dict) -> bool:
    """Whether each process was killed at work, the next resumed where it was, but for one update, and no file differs."""
    resumed = all(run["least"] >= run["found"] - 1 for run in (*made["kills"], made["last"]))
    hit = made["kills"] and all(kill["ended"] == -signal.SIGKILL for kill in made["kills"])
    return bool(hit and resumed and made["last"]["ended"] == 0 and not made["differ"])


def main() -> int:
    """Measure and write; 1 where it does not show what it is for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of data files")
    parser.add_argument("--out", type=Path, help="JSON report; none: only printed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--preset", default="baseline")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--commit", default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder: made = measure(args, Path(folder))
    about = dict(device=describe_device(args.device), versions=versions(), commit=args.commit or code_commit(),
                 date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", preset=args.preset, epochs=args.epochs, seed=args.seed)
    if args.out: write_atomic(args.out, about | made)
    hits = sum(kill["ended"] == -signal.SIGKILL for kill in made["kills"])
    print(f"{hits} of {len(made['kills'])} killed, {made['files']} files, {len(made['differ'])} differ {made['differ']}, "
          f"{len(made['only_timings'])} timings.jsonl aside; {made['seconds']:.0f} s, expected {made['dry_run']}")
    return int(not is_shown(made))


if __name__ == "__main__": sys.exit(main())
