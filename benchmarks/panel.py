"""Time and memory to read a folder of source files into a panel: `python benchmarks/panel.py --data DIR`.

Each reading runs in a process of its own and is timed after the imports. Prints median, smallest and largest time. Take more
readings on a busy machine."""
from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


def one(data: str) -> dict:
    "Seconds and peak memory (MiB) of one reading in this process, and the hours of the panel."
    from cryptopredict import sources
    begin = time.perf_counter()
    panel, _, inventory = sources.build_panel(sources.read_folder(data))
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return dict(seconds=seconds, hours=len(panel), files=len(inventory) - 1, peak_mib=peak)


def main() -> None:
    "Measure, print, and write the report."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with source files")
    parser.add_argument("--readings", type=int, default=9, help="number of readings")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print(json.dumps(one(args.data)))
    command = [sys.executable, __file__, "--data", args.data, "--one"]
    made = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(args.readings)]
    seconds = sorted(m["seconds"] for m in made)
    figures = dict(files=made[0]["files"], hours=made[0]["hours"], readings=len(made),
                   seconds_median=round(statistics.median(seconds), 3), seconds_least=round(seconds[0], 3),
                   seconds_most=round(seconds[-1], 3),
                   peak_mib=round(max(m["peak_mib"] for m in made)), python=platform.python_version())
    print(json.dumps(figures, indent=1))
    if args.out: args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__": main()
