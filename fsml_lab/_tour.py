"""`fsml tour`: run the story of nbs/01_tour.ipynb from the terminal, a line a step.

The notebook is the program: its cells run in a kernel of their own, its second-level headings are the steps, its outputs
become the report. So what a newcomer reads and what `make tour` does cannot drift apart.
"""
from __future__ import annotations
import contextlib, json, os, re, shutil, sys, time
from pathlib import Path
from fsml_lab.core import FsmlError, Lab, atomic_write

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def find_notebooks(start: str | Path | None = None) -> Path:
    "The folder with 01_tour.ipynb: nbs of the working directory or above it, else of the checkout that this package lies in."
    here = Path(start or ".").resolve()
    for d in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (d/"nbs"/"01_tour.ipynb").is_file(): return d/"nbs"
    raise FsmlError("The tour's notebook was not found.", str(here), "Run it in a clone of the repository: the tour needs its nbs and data_samples.")


def run_tour(home: Path, samples: Path | None = None) -> dict:
    "Run the story in the lab at `home`; its summary. Raises `FsmlError` for what a person can put right."
    notebook = find_notebooks()/"01_tour.ipynb"
    samples = (samples or notebook.parent.parent/"data_samples").resolve()
    if not (samples/"digits"/"labels.csv").is_file(): raise FsmlError("There are no sample images here.", str(samples), "Give the repository's data_samples folder by --samples.")
    lab = Lab(home)  # refuses a home that cannot be used before any work is done
    os.environ |= {"FSML_HOME": str(lab.home), "TOUR_SAMPLES": str(samples), "OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    (lab.home/"tour").mkdir(exist_ok=True)
    with open(lab.home/"tour"/"kernel.log", "wb") as log: nb, took = _execute(notebook, log)
    _report(nb, lab.home/"tour")
    summary = json.loads((lab.home/"tour"/"summary.json").read_text())
    _closing(summary, took)
    return summary


def _execute(notebook: Path, log):
    "The executed notebook and its wall seconds; a line on standard output for each step."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(notebook, as_version=4)
    for c in nb.cells:
        if c.cell_type == "code": c.outputs = []
    steps = [_heading(c) for c in nb.cells if _heading(c)]
    client = NotebookClient(nb, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}})
    start, at, begun = time.perf_counter(), 0, None
    with _kernel(client, log):
        for i, cell in enumerate(nb.cells):
            if name := _heading(cell):
                begun = _line(begun)
                at, begun = at + 1, time.perf_counter()
                print(f"[{at:2d}/{len(steps)}] {name} ", end="", flush=True)
            if cell.cell_type == "code": _cell(client, cell, i)
    _line(begun)
    return nb, time.perf_counter() - start


def _heading(cell) -> str:
    m = re.match(r"## (.+)", cell.source) if cell.cell_type == "markdown" else None
    return m[1].strip() if m else ""


def _line(begun: float | None):
    if begun is not None: print(f"{'.' * 3} {time.perf_counter() - begun:5.1f} s", flush=True)


@contextlib.contextmanager
def _kernel(client, log):
    "A kernel for the notebook, its own messages in `log`; an interrupt is passed on to it, so that it can leave the lab in order."
    with client.setup_kernel(stdout=log, stderr=log):
        try: yield
        except KeyboardInterrupt:
            from jupyter_core.utils import run_sync
            print("\nInterrupted: the run under way is recorded as stopped; `fsml tour` goes on from here.", file=sys.stderr)
            run_sync(client.km.interrupt_kernel)()
            time.sleep(1)
            raise


def _cell(client, cell, index: int):
    from nbclient.exceptions import CellExecutionError
    try: client.execute_cell(cell, index)
    except CellExecutionError as e:
        print(flush=True)
        message = _ANSI.sub("", str(e.evalue))
        if e.ename == "FsmlError":
            what, where, remedy = ([*re.split(r"\n  (?:where|remedy): +", message), "", ""])[:3]
            raise FsmlError(what, where, remedy) from None
        raise FsmlError(f"The tour stopped with {e.ename}: {message}", f"cell {index + 1} of 01_tour.ipynb", "Open the notebook (make lab) and run it to that cell to see more; this is a defect worth reporting.") from None


def _report(nb, folder: Path):
    "One HTML file with the story's prose and pictures; nothing in it is fetched from elsewhere."
    from nbconvert import HTMLExporter
    from fsml_lab._notebooks import clean_outputs
    clean_outputs(nb)
    exporter = HTMLExporter(template_name="classic", exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True, mathjax_url="", require_js_url="", jquery_url="")
    html, _ = exporter.from_notebook_node(nb)
    atomic_write(folder/"report.html", html.replace("</head>", f"<style>{_WIDE}</style></head>", 1).encode())


_WIDE = "#notebook-container{width:auto;max-width:1100px} div.output_subarea{max-width:100%;overflow-x:auto} div.prompt{display:none}"  # tables need room


def _closing(summary: dict, took: float):
    "The closing table: step, seconds, what came out, where it lies."
    width = shutil.get_terminal_size((120, 24)).columns
    rows = [(s["name"], f"{s['seconds']:.1f}", "  ".join(f"{k} {_short(v)}" for k, v in s["figures"].items()), s.get("where", "")) for s in summary["steps"]]
    w = [max(len(r[i]) for r in [("step", "s", "what came out", ""), *rows]) for i in range(2)]
    print(f"\n{'step':{w[0]}}  {'s':>{w[1]}}  what came out, and where it lies")
    for name, s, out, where in rows:
        print(f"{name:{w[0]}}  {s:>{w[1]}}  {out}"[:width])
        if where: print(f"{'':{w[0]}}  {'':{w[1]}}  -> {where}")
    print(f"\n{took:.0f} s in all. Gate: {summary['gate']}. Ran on: {summary['backend']}.")


def _short(v) -> str: return f"{v:.4g}" if isinstance(v, float) else str(v)
