"""The `fsml` command: `fsml --help` says what there is."""
from __future__ import annotations
import os, sys
from pathlib import Path
from typing import Annotated, Literal
import tyro
from fsml_lab import __version__
from fsml_lab.core import FsmlError, Lab, find_id, trace

Home = Annotated[Path | None, tyro.conf.arg(help="The lab's folder. By default as settings.ini or FSML_HOME say, else ./lab.")]


def tour(home: Home = None, samples: Annotated[Path | None, tyro.conf.arg(help="Folder with the sample images; by default the repository's data_samples.")] = None) -> None:
    """Walk once round the whole loop on real handwriting: label, freeze, train, evaluate, correct, retrain, export, gate.

    Takes a minute or two on two CPU cores. Leaves a lab with a report to look at (tour/report.html) and figures (tour/summary.json).
    """
    from fsml_lab._tour import run_tour
    home = home or Lab().home
    run_tour(home, samples)
    print(f"\nLook at {home/'tour'/'report.html'}; then open the same story as a notebook: fsml lab")


def lab(notebook: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="Notebook to open.")] = "01_tour.ipynb", port: int = 8888, browser: bool = True) -> None:
    """Open JupyterLab on the notebooks; saving one cleans it and exports its module."""
    from fsml_lab._notebooks import jupyter_options
    from fsml_lab._tour import find_notebooks
    nbs = find_notebooks()
    if not (nbs/notebook).is_file(): raise FsmlError(f"There is no notebook {notebook!r}.", str(nbs), "Name one of its files, for example 00_core.ipynb.")
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # in a container one often is; the server listens on loopback and asks for a token
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", f"--notebook-dir={nbs.parent}", f"--port={port}", f"--LabApp.default_url=/lab/tree/nbs/{notebook}", *jupyter_options(), *root, *([] if browser else ["--no-browser"])])


def doctor() -> None:
    """Say what this machine has (GPU, TensorRT, browser, database, broker …) and what follows from it."""
    from fsml_lab._doctor import doctor as look
    print(look())


def trace_(kind: Annotated[Literal["version", "run", "model", "predictions", "report", "onnx"], tyro.conf.Positional], id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="Its id, or the first characters of it.")], home: Home = None,
           down: Annotated[bool, tyro.conf.arg(help="Show what was made from it instead.")] = False) -> None:
    """Show what an object of the lab came from, or what was made from it."""
    lab = Lab(home)
    print(trace(lab, kind, find_id(lab, kind, id), down))


def main() -> None:
    "Entry point: errors that a person can put right are shown without a traceback, with exit status 2."
    app = tyro.extras.SubcommandApp()
    for name, f in {"tour": tour, "lab": lab, "doctor": doctor, "trace": trace_}.items(): app.command(name=name)(f)
    if sys.argv[1:] in (["--version"], ["-V"]): return print(f"fsml_lab {__version__}")
    try: app.cli(prog="fsml", args=sys.argv[1:] or ["--help"], description="fsml_lab: the whole loop of a machine-learning product, in notebooks and from scripts. New here? Start with: fsml tour", sort_subcommands=False)
    except FsmlError as e: sys.exit(_fail(f"fsml: {e}", 2))
    except KeyboardInterrupt: sys.exit(_fail("fsml: interrupted", 130))


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__": main()
