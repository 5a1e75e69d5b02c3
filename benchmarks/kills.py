"""`cryptopredict train`, killed with SIGKILL several times and resumed, compared file by file with an uninterrupted training.

    python benchmarks/kills.py --data ../shared/data --out results/kills_gpu.json --device cuda

Both use deterministic algorithms and save after each update. Kills come up to half a second after random updates. The exit code
is 1 if a file other than `timings.jsonl` differs, if a kill came too late, or if a process did not resume where the one before
stopped. The time and memory expected by `--dry-run` are reported next to those of the uninterrupted training.
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
    """The command of the training, without its folder."""
    return [*CLI, "train", "--data", str(args.data), "--preset", args.preset, "--epochs", str(args.epochs), "--seeds", "1",
            "--train.device", args.device, "--train.deterministic", "True", "--train.save-every", "1"]


def updates(folder: Path) -> int:
    """Number of logged updates: lines of all metrics.jsonl."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/metrics.jsonl"))


def tree(folder: Path) -> dict[str, str]:
    """Path -> sha256 of every file."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def environment() -> dict[str, str]:
    """Environment of the processes, in which the package need not be installed."""
    return os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))


def finished(what: list[str]) -> tuple[float, str]:
    """Seconds and output of a process; exits if it fails."""
    began = time.perf_counter()
    done = subprocess.run(what, env=environment(), capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{' '.join(what)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - began, done.stdout


def killed(what: list[str], folder: Path, after: int | None, delay: float = 0.) -> dict:
    """Run the training, kill it `delay` seconds after `after` updates (None: let it finish); a record of what happened."""
    found = now = least = updates(folder)
    due = float("inf") if after is None else max(after, found + 1)  # at least one update must be new
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
    """Updates, time and memory that a dry run expects of all trainings."""
    found = re.search(r"in all ([\d,]+) updates?, about (.+?) of training and ([\d,]+) MiB", output)
    if not found: raise SystemExit(f"the dry run printed neither time nor memory:\n{output}")
    return dict(updates=int(found[1].replace(",", "")), time=found[2], mib=int(found[3].replace(",", "")))


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Run an uninterrupted training and one that is killed and resumed, and compare their files."""
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


def is_bit_identical(made: dict) -> bool:
    """Whether every kill hit a running process, each process resumed at most one update earlier, and no file differs."""
    resumed = all(run["least"] >= run["found"] - 1 for run in (*made["kills"], made["last"]))
    hit = made["kills"] and all(kill["ended"] == -signal.SIGKILL for kill in made["kills"])
    return bool(hit and resumed and made["last"]["ended"] == 0 and not made["differ"])


def main() -> int:
    """Measure and write the report; exit code 1 if resuming was not bit-identical."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of data files")
    parser.add_argument("--out", type=Path, help="JSON report; default: print only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--preset", default="baseline", help="model")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of training")
    parser.add_argument("--kills", type=int, default=4, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    parser.add_argument("--commit", default=None, help="version of the code, for the report")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder: made = measure(args, Path(folder))
    about = dict(device=describe_device(args.device), versions=versions(), commit=args.commit or code_commit(),
                 date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", preset=args.preset, epochs=args.epochs, seed=args.seed)
    if args.out: write_atomic(args.out, about | made)
    hits = sum(kill["ended"] == -signal.SIGKILL for kill in made["kills"])
    print(f"{hits} of {len(made['kills'])} killed, {made['files']} files, {len(made['differ'])} differ {made['differ']}, "
          f"besides {len(made['only_timings'])} timings.jsonl; {made['seconds']:.0f} s, expected {made['dry_run']}")
    return int(not is_bit_identical(made))


if __name__ == "__main__": sys.exit(main())
