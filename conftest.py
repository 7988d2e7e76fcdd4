"""How the tests run: one thread, no home of yours touched, and notebooks cell by cell (nbval) as their directives say."""
import os, re, shutil, tempfile
from pathlib import Path
import hypothesis, pytest

# before anything imports numpy or torch: two threads give other sums than one, and fight over a shared machine
os.environ.update({k: "1" for k in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "IN_TEST")})
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # a warning of the kernel's debugger, in every notebook

# property tests draw the same examples every time, and a busy machine is no failure
hypothesis.settings.register_profile("fsml", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fsml")

_DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$", re.M)
_scratch = Path(tempfile.mkdtemp(prefix="fsml-tests-"))


def _has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None: return False  # spares a machine without a GPU the import of torch
    import torch
    return torch.cuda.is_available()


def _is_cell(item) -> bool: return type(item).__name__ == "IPyNbCell"


def pytest_collection_modifyitems(config, items):
    "Mark cells by nbdev's directives: `eval: false` and `notest` are no tests, `slow` is soak, `gpu` needs one."
    drop = []
    for item in items:
        if not _is_cell(item): continue
        flags = dict(_DIRECTIVE.findall(item.cell.source))
        if "notest" in flags or flags.get("eval", "").lower() == "false": drop.append(item)
        if "slow" in flags: item.add_marker("soak")
        if "gpu" in flags: item.add_marker("gpu")
        # a clean notebook has no counts, and nbval compares no output of a cell that has none
        if item.cell.execution_count is None and item.cell.outputs: item.cell.execution_count = 1
    if drop:
        config.hook.pytest_deselected(items=drop)
        items[:] = [i for i in items if i not in drop]
    if any(i.get_closest_marker("gpu") for i in items) and not _has_gpu():
        for i in items:
            if i.get_closest_marker("gpu"): i.add_marker(pytest.mark.skip(reason="GPU: this machine has none"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    "A notebook's kernel, which starts with its first cell, gets a lab of its own; 00_core does not, for it shows where a lab is looked for."
    if _is_cell(item) and item.path.stem != "00_core": os.environ["FSML_HOME"] = str(_scratch/item.path.stem/"lab")
    else: os.environ.pop("FSML_HOME", None)


def pytest_sessionfinish(session): shutil.rmtree(_scratch, ignore_errors=True)
