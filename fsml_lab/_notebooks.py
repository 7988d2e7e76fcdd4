"""Keeps the notebooks clean, renders README.md from one of them, and exports a module whenever JupyterLab saves its notebook.

    python -m fsml_lab._notebooks             clean every notebook in nbs/
    python -m fsml_lab._notebooks NB...       clean these
    python -m fsml_lab._notebooks --readme    write README.md from nbs/index.ipynb
"""
from __future__ import annotations
import argparse, functools, hashlib, posixpath, re, sys, tempfile
from pathlib import Path
from typing import Any, cast

_WIDGET = "application/vnd.jupyter.widget-view+json"
_SKIP = re.compile(r"^\s*#\s*\|\s*(hide|include:\s*false)\s*$", re.M)         # cells that README.md leaves out
_HIDE_INPUT = re.compile(r"^\s*#\s*\|\s*(echo:\s*false|hide_input)\s*$", re.M)  # cells of which it shows the output only
_DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.M)
# one state of a progress bar: " 40%|####      | 4/10 [00:01<00:02, 3.1it/s]", or "7it [00:00, 9.9it/s]" without a total
_BAR = re.compile(r"(\d+%\|[^\n]*\||\d+(\.\d+)?\w*(it|B)?) ?[^\n]*\[\d+:\d\d[^\n]*\]")

# -- cleaning ----------------------------------------------------------------------------------------------------------

def _root(path: Path) -> Path | None:
    "The folder of the nearest pyproject.toml above `path` with a [tool.nbdev] table."
    import tomllib
    for d in path.resolve().parents:
        f = d/"pyproject.toml"
        if f.is_file() and "nbdev" in tomllib.loads(f.read_text(encoding="utf-8")).get("tool", {}): return d
    return None

@functools.lru_cache
def _machine_paths(root: Path | None) -> list[tuple[re.Pattern, str]]:
    "What in an output tells where it was made: this checkout, temporary folders, the home folder."
    tmp = re.escape(tempfile.gettempdir().rstrip("/"))
    res = [(re.compile(tmp + r"/ipykernel_\d+/\d+\.py"), "ipykernel.py"),
           (re.compile(tmp + r"/tmp[a-z0-9_]{8}"), "…")]
    for p, by in ((root, ""), (Path.home(), "~/")):
        if p and len(p.parts) > 1: res.append((re.compile(rf"(?<![\w.~]){re.escape(str(p))}/"), by))
    return res

def _text(s: str, root: Path | None) -> str:
    "`s` without progress bars and machine paths."
    if _BAR.search(s):
        parts = re.split(r"(?<=[\r\n])", s)
        s = "".join(p for p in parts if not _BAR.search(p))
        s = "" if not s.strip("\r\n ") else s
    for pat, by in _machine_paths(root): s = pat.sub(by, s)
    return s

def _keep_output(o: dict, root: Path | None) -> bool:
    "Strip output `o` of what changes from run to run; False when nothing is left of it."
    if o.get("output_type") == "stream":
        o["text"] = _text(o["text"], root)
        return bool(o["text"])
    data = o.get("data")
    if data is None: return True
    widget = data.pop(_WIDGET, None) is not None
    if widget and set(data) <= {"text/plain"}: return False  # the repr of a widget says nothing without its view
    for k, v in data.items():
        if isinstance(v, str) and k.startswith("text/"): data[k] = _text(v, root)
    return True

def _fix_ids(nb: dict) -> None:
    "Give cells without an id, or with one already used, an id made from their place and source."
    seen: set[str] = set()
    for i, c in enumerate(nb["cells"]):
        cid = c.get("id") or ""
        if not re.fullmatch(r"[\w-]{1,64}", cid) or cid in seen:
            cid = hashlib.sha256(f"{i}:{c['source']}".encode()).hexdigest()[:8]
        c["id"] = cid
        seen.add(cid)

def clean_outputs(
    nb: dict,                  # nbformat 4, multi-line text joined; changed in place
    root: Path | None = None,  # the project's folder: paths in outputs become relative to it
) -> None:
    "Strip what changes from run to run from the outputs: progress bars, views and states of widgets, machine paths."
    for c in nb["cells"]:
        if c["cell_type"] == "code": c["outputs"] = [o for o in c.get("outputs", []) if _keep_output(o, root)]
    nb["metadata"].pop("widgets", None)

def clean_notebook(
    nb: dict,                  # nbformat 4, multi-line text joined; changed in place
    root: Path | None = None,  # the project's folder: paths in outputs become relative to it
) -> None:
    "Strip what differs between two runs or two machines: metadata, counts, widget states, progress bars, paths."
    from nbdev.clean import clean_nb
    _fix_ids(nb)
    clean_outputs(nb, root)
    clean_nb(nb, allowed_cell_metadata_keys=["tags"])
    nb["metadata"] = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
                      **{k: v for k, v in nb["metadata"].items() if k == "nbdev"}}
    nb["nbformat"], nb["nbformat_minor"] = 4, 5

def cleaned(
    path: str | Path, # a notebook
) -> str:
    "The text of the notebook as it is when clean."
    import nbformat
    path = Path(path)
    nb = nbformat.reader.reads(path.read_text(encoding="utf-8"))
    nb = nbformat.convert(nb, 4)
    nbformat.v4.rwbase.rejoin_lines(nb)
    clean_notebook(nb, _root(path))
    return nbformat.v4.nbjson.writes(nb) + "\n"

def clean(
    path: str | Path, # a notebook
) -> bool:
    "Clean the notebook where it lies; True when that changed it."
    from fsml_lab.core import atomic_write
    path, new = Path(path), cleaned(path)
    if path.read_text(encoding="utf-8") == new: return False
    atomic_write(path, new.encode())
    return True

# -- README.md ---------------------------------------------------------------------------------------------------------

def _relink(md: str, folder: str) -> str:
    "`md` with links relative to `folder` turned into links relative to the folder above it."
    def to(m):
        a, target, z = m.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:|[#/]", target): return m[0]
        return a + posixpath.normpath(posixpath.join(folder, target)) + z
    link = r"""(\]\(|(?:src|href)=["'])([^)\s"']+)([)\s"'])"""
    return "".join(p if i % 2 else re.sub(link, to, p) for i, p in enumerate(re.split(r"(```.*?```|`[^`\n]*`)", md, flags=re.S)))

def readme(
    index: str | Path, # the notebook, in a folder below README.md's
) -> tuple[str, dict[str, bytes]]:
    "The text of README.md and the pictures it shows: path (relative to README.md) -> bytes."
    import nbformat
    from nbconvert import MarkdownExporter
    index = Path(index)
    folder = index.parent.name
    nb = nbformat.read(index, as_version=4)
    cells = []
    for c in nb.cells:
        if _SKIP.search(c.source): continue
        if c.cell_type == "markdown": c.source = _relink(c.source, folder)
        if c.cell_type == "code":
            shown = "" if _HIDE_INPUT.search(c.source) else _DIRECTIVE.sub("", c.source).strip("\n")
            c.outputs = [o for o in c.outputs if o.get("name") != "stderr"]
            for o in c.outputs:
                for k in {"text/html", "text/markdown"} & set(o.get("data", {})): o.data[k] = _relink(o.data[k], folder)
            c.source = shown
            if not shown and not c.outputs: continue
        cells.append(c)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}  # the language of the code blocks
    text, res = MarkdownExporter().from_notebook_node(nb, resources={"unique_key": index.stem, "output_files_dir": f"{folder}/{index.stem}_files"})
    text = re.sub(r"<style\b.*?</style>\s*", "", text, flags=re.S)
    text = re.sub(r"^```python\s*```$", "", text, flags=re.M)
    text = re.sub(r"^[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    note = f"<!-- Rendered from {folder}/{index.name}: edit the notebook, then run `make export`. -->\n\n"
    return note + text, res["outputs"]

def write_readme(root: Path) -> None:
    "Write README.md and its pictures; pictures it no longer shows go."
    from fsml_lab.core import atomic_write
    text, pictures = readme(root/"nbs/index.ipynb")
    atomic_write(root/"README.md", text.encode())
    for k, v in pictures.items(): atomic_write(root/k, v)
    for old in (root/"nbs/index_files").glob("*"):
        if old.relative_to(root).as_posix() not in pictures: old.unlink()

# -- JupyterLab --------------------------------------------------------------------------------------------------------

def pre_save_hook(model: dict, path: str, contents_manager: Any, **_) -> None:
    "Clean a notebook of this kind of project before JupyterLab writes it; other notebooks are left alone."
    if model.get("type") != "notebook" or model["content"].get("nbformat") != 4: return
    root = _root(Path(contents_manager.root_dir)/path.strip("/"))
    if root is None: return
    try: clean_notebook(model["content"], root)
    except ImportError: contents_manager.log.warning("nbdev is not installed: %s is saved as it is, not cleaned.", path)

def post_save_hook(model: dict, os_path: str, contents_manager: Any, **_) -> None:
    "Write the module of a notebook that JupyterLab has just saved; a notebook that does not parse is reported, and its module stays as it was."
    path = Path(os_path)
    if model.get("type") != "notebook" or (root := _root(path)) is None or root/"nbs" not in path.resolve().parents: return
    try:
        from nbdev.doclinks import nbdev_export
        cast(Any, nbdev_export)(path=os_path)  # a decorator hides its signature
    except ImportError: contents_manager.log.warning("nbdev is not installed: no module was written from %s.", path.name)
    except Exception as e: contents_manager.log.error("No module was written from %s: %s: %s", path.name, type(e).__name__, e)

def jupyter_options() -> list[str]:
    "Options of JupyterLab: our save hooks, no request to servers outside, and no question about news."
    return ["--ContentsManager.pre_save_hook=fsml_lab._notebooks.pre_save_hook",
            "--FileContentsManager.post_save_hook=fsml_lab._notebooks.post_save_hook",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None",
            "--LabApp.extension_manager=readonly",
            f"--LabApp.app_settings_dir={Path(__file__).parent/'static'}"]  # overrides.json: JupyterLab's settings

def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m fsml_lab._notebooks", description="Clean notebooks, or render README.md.")
    p.add_argument("notebooks", nargs="*", type=Path, help="notebooks to clean; all of nbs/ when none is named")
    p.add_argument("--readme", action="store_true", help="write README.md from nbs/index.ipynb")
    a = p.parse_args(argv)
    if a.readme:
        root = _root(Path.cwd()/"x")
        if root is None or not (root/"nbs/index.ipynb").is_file():
            print("There is no nbs/index.ipynb here; run this inside the project's folder.", file=sys.stderr)
            return 2
        write_readme(root)
    for nb in a.notebooks or ([] if a.readme else sorted(Path("nbs").glob("*.ipynb"))):
        if not nb.is_file():
            print(f"There is no notebook {nb}.", file=sys.stderr)
            return 2
        if clean(nb): print(f"cleaned {nb}")
    return 0

if __name__ == "__main__": sys.exit(main())
