"01_features opens in JupyterLab, runs, and shows its figure."
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest
from helpers import ENV, ROOT

CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WAIT = 300  # seconds to wait for a step before the test fails


class Browser:
    "A headless Chromium, driven over the DevTools protocol."

    def __init__(self, folder):
        websocket = pytest.importorskip("websocket")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1440,1000"]
        flags += ["--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={folder}"]
        self.log = open(folder / "log.txt", "w")
        self.process = subprocess.Popen([CHROME, *flags, "about:blank"], stdout=self.log, stderr=self.log)
        port = wait_for(lambda: re.search(r"ws://[\d.]+:(\d+)/", (folder / "log.txt").read_text()), "Chromium to start").group(1)
        pages = lambda: [t for t in json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json")) if t["type"] == "page"]
        address = wait_for(pages, "a page")[0]["webSocketDebuggerUrl"]
        self.socket, self.number = websocket.create_connection(address, timeout=60), itertools.count(1)

    def call(self, method: str, **params) -> dict:
        "The result of a DevTools method."
        number = next(self.number)
        self.socket.send(json.dumps(dict(id=number, method=method, params=params)))
        while (answer := json.loads(self.socket.recv())).get("id") != number: pass
        return answer["result"]

    def value(self, expression: str):
        "The value of a JavaScript expression, None where it has none."
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)["result"].get("value")

    def close(self) -> None:
        "End the browser."
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


def wait_for(work, what: str):
    "Call `work` until it returns something true, and return that."
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        try:
            if found := work(): return found
        except OSError: pass
        time.sleep(.3)
    raise AssertionError(f"waited {WAIT} s for {what}")


@pytest.fixture
def lab(tmp_path):
    "Port and token of a JupyterLab that serves a copy of the notebook without outputs."
    pytest.importorskip("jupyterlab")
    notebook = json.loads((ROOT / "nbs" / "01_features.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]: cell |= {"outputs": []} if cell["cell_type"] == "code" else {}
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "01_features.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    shutil.copytree(ROOT / "results", tmp_path / "results")
    env = ENV | {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR")}
    env |= {"JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"), "JUPYTER_DATA_DIR": str(tmp_path / "data")}
    argv = [sys.executable, "-m", "jupyterlab", "--no-browser", "--expose-app-in-browser", "--port=0"]
    argv += ["--allow-root"] if os.geteuid() == 0 else []
    with open(tmp_path / "lab.txt", "w") as log:
        process = subprocess.Popen(argv, cwd=tmp_path / "nbs", env=env, stdout=log, stderr=log)
    pattern = re.compile(r"http://(?:localhost|127\.0\.0\.1):(\d+)/lab\?token=(\w+)")
    address = wait_for(lambda: pattern.search((tmp_path / "lab.txt").read_text()), "JupyterLab to start")
    yield address.groups()
    process.terminate()
    process.wait(60)


@pytest.mark.skipif(CHROME is None, reason="no Chromium here")
def test_a_notebook_runs_in_jupyterlab_and_shows_its_figure(lab, tmp_path):
    port, token = lab
    (tmp_path / "chrome").mkdir()
    browser = Browser(tmp_path / "chrome")
    try:
        browser.call("Page.navigate", url=f"http://127.0.0.1:{port}/lab/tree/01_features.ipynb?token={token}&reset")
        cell = "document.querySelector('.jp-Notebook .jp-CodeCell')"
        wait_for(lambda: browser.value(f"!!(window.jupyterapp && {cell})"), "the notebook to open")
        kernel = "[...jupyterapp.shell.widgets('main')].map(w => w.sessionContext?.session?.kernel?.status)[0]"
        wait_for(lambda: browser.value(kernel) == "idle", "the kernel")
        figure = "document.querySelector('.jp-Notebook .js-plotly-plot .main-svg')"
        assert not browser.value(f"!!{figure}")
        run = "jupyterapp.commands.execute('notebook:run-all-cells')"
        browser.value(f"{run}.then(ok => {{ window.outcome = ok ? 'ran' : 'failed' }}); 0")
        assert wait_for(lambda: browser.value("window.outcome"), "all cells to run") == "ran"
        browser.value("document.querySelector('.jp-Notebook .jp-WindowedPanel-outer, .jp-Notebook')?.scrollTo(0, 0)")
        size = wait_for(lambda: browser.value(f"{figure} && {figure}.getBoundingClientRect().width"), "the figure")
        lines = browser.value("document.querySelectorAll('.jp-Notebook .js-plotly-plot .scatterlayer path').length")
        assert size > 300 and lines >= 1
    finally: browser.close()
