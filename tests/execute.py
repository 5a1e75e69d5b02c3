"""Run nbdev_test and keep the outputs of every cell: python tests/execute.py FOLDER [path for nbdev_test].

Writes one JSON file per notebook, a list with the outputs of each code cell. One execution thus answers two questions: do the
checks in the notebooks pass, and are the committed outputs those of the code (test_notebooks.py)?
"""
import json
import os
import sys
from pathlib import Path

import nbdev.test
import pandas as pd
from execnb.shell import CaptureShell

folder, root = Path(sys.argv[1]).resolve(), Path(__file__).resolve().parents[1]
folder.mkdir(parents=True, exist_ok=True)
plain_init, plain_run_all = CaptureShell.__init__, CaptureShell.run_all


def init(self, path=None, *args, **kwargs):
    pd.reset_option("^display")  # a worker executes several notebooks
    self.notebook = Path(path).stem if path else None
    plain_init(self, path, *args, **kwargs)


def run_all(self, nb, *args, **kwargs):
    plain_run_all(self, nb, *args, **kwargs)
    outputs = [cell.get("outputs") or [] for cell in nb.cells if cell.cell_type == "code"]
    if self.notebook: (folder / f"{self.notebook}.json").write_text(json.dumps(outputs))


CaptureShell.__init__, CaptureShell.run_all = init, run_all
os.chdir(root)
nbdev.test.nbdev_test.__wrapped__(path=sys.argv[2] if len(sys.argv) > 2 else None, n_workers=2, timing=True)
