"""The notebooks in JupyterLab, in a real browser: every cell runs, nothing is red, and the console has no error of ours."""
from __future__ import annotations
import json, os, re, secrets, shutil, socket, subprocess, sys, time, urllib.error, urllib.request
from pathlib import Path
import pytest
from fsml_lab._doctor import find_browser
from fsml_lab._notebooks import cleaned, jupyter_options

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = find_browser()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
# the smallest room, and the story of the whole loop
NOTEBOOKS = ["00_core", "01_tour"]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a copy of the project: its address (with {} for the notebook) and the copy's folder."
    base = tmp_path_factory.mktemp("jupyter")
    copy = base/"project"
    shutil.copytree(ROOT, copy, ignore=lambda d, names: [n for n in names if n.startswith(".") or n in ("lab", "tests", "data_samples", "__pycache__", "benchmarks", "build", "dist") or n.endswith(".egg-info")])
    (copy/"data_samples").symlink_to(ROOT/"data_samples")
    with (copy/"fsml_lab/core.py").open("a") as f: f.write("# not in the notebook\n")  # saving 00_core must write this module anew
    token, port = secrets.token_hex(16), _free_port()
    keep = {k: v for k, v in os.environ.items() if k != "IN_TEST" and not k.startswith(("FSML_", "JUPYTER"))}
    env = keep | {  # nothing of this machine's Jupyter; the lab lies in the copy, as its settings.ini says
                  "PYTHONPATH": str(copy), "JUPYTER_CONFIG_DIR": str(base/"config"), "JUPYTER_DATA_DIR": str(base/"data"),
                  "JUPYTER_RUNTIME_DIR": str(base/"runtime"), "IPYTHONDIR": str(base/"ipython"), "JUPYTERLAB_SETTINGS_DIR": str(base/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(base/"workspaces")}
    log = (base/"server.log").open("w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
                               f"--ServerApp.root_dir={copy}", "--allow-root", "--expose-app-in-browser", *jupyter_options()], cwd=copy, env=env, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        for _ in range(240):
            assert server.poll() is None, (base/"server.log").read_text()
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=5).close()
            except (urllib.error.URLError, OSError): time.sleep(.5)
            else: break
        else: pytest.fail("JupyterLab did not start in two minutes: " + (base/"server.log").read_text()[-3000:])
        yield f"http://127.0.0.1:{port}/lab/tree/nbs/{{}}.ipynb?token={token}&reset", copy
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        # a fresh profile; no request of the browser's own
        ctx = p.chromium.launch_persistent_context(str(tmp_path_factory.mktemp("profile")), executable_path=CHROMIUM, viewport={"width": 1400, "height": 1000},
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"])
        yield ctx
        ctx.close()


# the outputs of the open notebook, as JupyterLab's own model has them
_STATE = """() => { const nb = window.jupyterapp.shell.currentWidget.content, cells = [...nb.model.cells];
  return cells.filter(c => c.type === 'code').map(c => ({source: c.sharedModel.source, count: c.executionCount, outputs: c.outputs.toJSON()})); }"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_in_jupyterlab(lab, browser, name, tmp_path):
    url, copy = lab
    page = browser.new_page()
    console, outside = [], []
    page.on("console", lambda m: console.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: console.append(str(e)))
    page.on("request", lambda r: outside.append(r.url) if not re.match(r"(http|ws)://127\.0\.0\.1:|data:|blob:|about:", r.url) else None)
    page.goto(url.format(name), wait_until="domcontentloaded")
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.context?.isReady && window.jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.status === 'idle'", timeout=120_000)
    page.evaluate("() => { window.ran = window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.done = true }); }")  # not awaited: it takes minutes
    page.wait_for_function("window.done === true", timeout=600_000)
    state = page.evaluate(_STATE)
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    for where, at in (("top", 0), ("middle", len(state)//2), ("end", len(state) - 1)):  # a person looks at these pictures
        page.evaluate("i => { const nb = window.jupyterapp.shell.currentWidget.content; const codes = nb.widgets.map((w, k) => [w, k]).filter(([w]) => w.model.type === 'code'); nb.activeCellIndex = codes[i][1]; nb.scrollToItem(codes[i][1], 'start'); }", at)
        page.wait_for_timeout(1500)
        page.screenshot(path=tmp_path/f"{name}-{where}.png")
    page.close()

    (tmp_path/"state.json").write_text(json.dumps(state))
    errors = [(c["source"][:200], o["ename"], o["evalue"]) for c in state for o in c["outputs"] if o["output_type"] == "error"]
    assert errors == []
    assert [c["source"][:80] for c in state if c["source"].strip() and c["count"] is None] == [], "cells that did not run"
    assert console == []
    assert outside == [], "the page asked for something from outside"
    saved = copy/"nbs"/f"{name}.ipynb"
    assert cleaned(saved) == saved.read_text(encoding="utf-8")  # the save hooks ran, on the real server
    if name == "00_core": assert (copy/"fsml_lab/core.py").read_text() == (ROOT/"fsml_lab/core.py").read_text()
