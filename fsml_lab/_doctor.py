"""What `fsml doctor` prints: what this machine has, and what follows from it for the steps of the loop."""
from __future__ import annotations
import importlib.metadata, importlib.util, os, platform, shutil, socket, sqlite3, subprocess, sys, textwrap
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from fsml_lab.core import FsmlError, Settings, html_table, load_settings

_VNNI = ("avx512_vnni", "avx_vnni", "asimddp")  # instructions that multiply and add int8 in one go (x86, x86, ARM)


@dataclass(frozen=True)
class Check:
    "One thing looked for: whether it is there, what it is, and what follows."
    name: str
    found: bool
    detail: str        # what was seen
    follows: str = ""  # what that means for your work


class Checks(list[Check]):
    "What was found; a table in the terminal and in a notebook."
    def __str__(self) -> str:
        width = min(120, shutil.get_terminal_size((100, 24)).columns)
        pad = max(len(c.name) for c in self) + 2
        lines = []
        for c in self:
            for i, text in enumerate(t for t in (c.detail, c.follows) if t):
                head = f"{'yes' if c.found else 'no':<5}{c.name:<{pad}}" if i == 0 else " " * (pad + 5)
                lines += textwrap.wrap(text, width, initial_indent=head + ("" if i == 0 else "-> "), subsequent_indent=" " * (pad + 5 + 3 * i))
        return "\n".join(lines)
    def __repr__(self) -> str: return str(self)
    def _repr_html_(self) -> str:
        return html_table(([c.name, "yes" if c.found else "no", c.detail, c.follows] for c in self), ["", "found", "what", "what follows"])


def _installed(dist: str) -> str | None:
    try: return importlib.metadata.version(dist)
    except importlib.metadata.PackageNotFoundError: return None


def _first_line(*command: str) -> str:
    "The first line that a command prints, or '' when it fails or takes longer than ten seconds."
    try: r = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired): return ""
    return r.stdout.strip().split("\n")[0] if r.returncode == 0 else ""


def _python() -> Check:
    return Check("Python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.system()} {platform.machine()}, fsml_lab {_installed('fsml_lab') or 'not installed'}",
                 "" if sys.version_info >= (3, 11) else "fsml_lab needs Python 3.11 or later.")


def _cpu() -> Check:
    info, model, flags = Path("/proc/cpuinfo"), platform.processor() or platform.machine(), set()
    if info.is_file():
        for line in info.read_text().splitlines():
            k, _, v = line.partition(":")
            if k.strip() == "model name": model = v.strip()
            if k.strip() in ("flags", "Features"): flags |= set(v.split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    vnni = [f for f in _VNNI if f in flags]
    vector = next((f for f in ("avx512f", "avx2", "asimd") if f in flags), "vector instructions unknown")
    if vnni: follows = "INT8 models can run faster than float here; whether one does is measured before it is chosen."
    elif flags: follows = "No VNNI: int8 products are summed in 16 bits, which may saturate. An INT8 model is chosen only by its measured speed and accuracy."
    else: follows = "Whether an INT8 model is faster here shows only when measured."
    return Check("CPU", True, f"{model}, {cores} core{'s' * (cores > 1)} to use, {', '.join([vector, *vnni])}", follows)


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError): return Check("memory", False, "its size could not be read")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's share
    if limit.is_file() and (t := limit.read_text().strip()).isdigit(): total = min(total, int(t))
    gb = total/2**30
    return Check("memory", True, f"{gb:.0f} GiB", "" if gb >= 7 else "Below 8 GiB: train with small batches, and close other kernels.")


def _disk(home: Path) -> Check:
    at = next(d for d in (home, *home.parents) if d.exists())
    free = shutil.disk_usage(at).free/1e9
    ok = os.access(at, os.W_OK)
    follows = "" if ok else "Choose a home you may write to: home in settings.ini, or FSML_HOME."
    if ok and free < 5: follows = "Little room: a write that does not fit is refused, and nothing is left half-written."
    return Check("disk", ok, f"{free:.0f} GB free for the lab at {home}" + ("" if ok else f", but {at} cannot be written to"), follows)


def _settings() -> tuple[Check, Settings]:
    try: s = load_settings()
    except FsmlError as e: return Check("settings", False, f"{e.what} ({e.where})", e.remedy), Settings()
    return Check("settings", True, f"from {s.file}" if s.file else "defaults: there is no settings.ini with an [fsml] section here or above"), s


def _gpu() -> Check:
    without = "Models train and run on the CPU; engines are built, not executed, and models per GPU cannot be measured (waive that line by name)."
    driver = _first_line("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader") if shutil.which("nvidia-smi") else ""
    if importlib.util.find_spec("torch") is None: return Check("GPU", bool(driver), driver or "no NVIDIA driver", "torch is not installed: nothing can be trained." )
    import torch
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        n = torch.cuda.device_count()
        return Check("GPU", True, f"{n} x {p.name}, {p.total_memory/2**30:.0f} GiB, compute capability {p.major}.{p.minor}, torch {torch.__version__}", "device = auto trains on it.")
    if torch.backends.mps.is_available(): return Check("GPU", True, f"Apple GPU, torch {torch.__version__}", "device = auto trains on it; TensorRT needs an NVIDIA GPU.")
    if driver: return Check("GPU", False, f"{driver}, but torch {torch.__version__} cannot use it", "Install a driver that fits torch's CUDA. " + without)
    return Check("GPU", False, f"no NVIDIA driver; torch {torch.__version__} sees no GPU", without)


def _tensorrt(gpu: bool) -> Check:
    v = next((v for d in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12") if (v := _installed(d))), None)
    if v is None: return Check("TensorRT", False, "not installed", "No engine for production GPUs is built here. On a machine with a GPU: pip install 'fsml_lab[trt]'.")
    return Check("TensorRT", True, v, "Engines are built for this GPU and run on it." if gpu else "Without a GPU no engine can be built with it.")


def _referee(gpu: bool) -> Check:
    v = _installed("tensorrt-rtx-cu13") or _installed("tensorrt_rtx_cu13")
    absent = "An exported graph's legality for TensorRT stays unproven. On Linux x86-64 or Windows: pip install 'fsml_lab[referee]'."
    if v is None: return Check("referee", False, "tensorrt-rtx is not installed", absent)
    try: import tensorrt_rtx  # noqa: F401  (that it is installed does not say that its libraries load)
    except (ImportError, OSError) as e: return Check("referee", False, f"tensorrt-rtx {v} does not load: {e}", absent)
    return Check("referee", True, f"tensorrt-rtx {v}", "Engines are built by it from the exported graph, which proves the graph legal" +
                 (", and run." if gpu else "; without a GPU they are not executed, and onnxruntime runs the model."))


def _onnxruntime() -> Check:
    if importlib.util.find_spec("onnxruntime") is None: return Check("onnxruntime", False, "not installed", "Exported models cannot be run or measured.")
    import onnxruntime as ort
    return Check("onnxruntime", True, f"{ort.__version__} with {', '.join(p.removesuffix('ExecutionProvider') for p in ort.get_available_providers())}", "")


def find_browser() -> str | None:
    "Path of a Chromium or Chrome on this machine, or None."
    return next((p for n in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome") if (p := shutil.which(n))), None)


def _browser() -> Check:
    if (b := find_browser()) is None: return Check("browser", False, "neither Chromium nor Chrome", "The tests of the widgets and notebooks in a browser are skipped. Debian: apt-get install chromium. JupyterLab itself works in any browser.")
    return Check("browser", True, _first_line(b, "--version") or b)


def _jupyter() -> Check:
    v, nbdev = _installed("jupyterlab"), _installed("nbdev")
    if v is None: return Check("Jupyter", False, "JupyterLab is not installed", "The library can be imported; there are no notebooks and no widgets.")
    return Check("Jupyter", True, f"JupyterLab {v}, " + (f"nbdev {nbdev}" if nbdev else "no nbdev"), "" if nbdev else "Saving a notebook does not write its module.")


def _hidden(url: str) -> str:
    "`url` without its password."
    u = urlsplit(url)
    return url.replace(f":{u.password}@", ":***@") if u.password else url


def _answers(url: str, default_port: int) -> str:
    "'' when something accepts connections at the URL's host and port, else why not."
    try:
        u = urlsplit(url)
        socket.create_connection((u.hostname or "localhost", u.port or default_port), timeout=3).close()
    except (OSError, ValueError) as e: return str(e)
    return ""


def _database(s: Settings) -> Check:
    if not s.database or s.database.startswith("sqlite"):
        return Check("database", True, f"SQLite {sqlite3.sqlite_version}, " + (_hidden(s.database) if s.database else "a file in the lab's home"), "Enough for several processes on one machine. For several machines, set database to a PostgreSQL URL.")
    import sqlalchemy as sa
    try:
        url = sa.make_url(s.database)
        kw = {"connect_timeout": 3} if url.get_backend_name() == "postgresql" else {}
        engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=kw)
        with engine.connect() as c: version = ".".join(map(str, c.dialect.server_version_info or ()))
    except (sa.exc.SQLAlchemyError, ImportError, ValueError) as e:
        why = str(getattr(e, "orig", None) or e).strip().split("\n")[0]
        return Check("database", False, f"{_hidden(s.database)} does not answer: {why}", "Nothing can be stored until it does. Start the server, or leave database empty to use SQLite.")
    return Check("database", True, f"{url.get_backend_name()} {version} at {_hidden(s.database)}", "Several machines can share this lab.")


def _broker(s: Settings) -> Check:
    if not s.queue: return Check("broker", True, "the lab's database", "Jobs need no other server. For many workers on several machines, set queue to a redis:// or amqp:// URL.")
    ports = {"redis": 6379, "rediss": 6379, "amqp": 5672, "amqps": 5671}
    scheme = urlsplit(s.queue).scheme
    if scheme not in ports: return Check("broker", False, f"{_hidden(s.queue)} is not a URL of a broker", "Write redis://host:6379/0 or amqp://user:password@host:5672, or leave queue empty.")
    if why := _answers(s.queue, ports[scheme]): return Check("broker", False, f"{_hidden(s.queue)} does not answer: {why}", "No job can be sent until it does. Start the server, or leave queue empty to use the lab's database.")
    return Check("broker", True, f"{_hidden(s.queue)} accepts connections", "Workers on several machines can share its jobs.")


def doctor() -> Checks:
    "What this machine has, and what follows from it. Changes nothing, and raises nothing for what is missing."
    settings_check, s = _settings()
    gpu = _gpu()
    cuda = gpu.found and "Apple" not in gpu.detail
    return Checks([_python(), _cpu(), _memory(), settings_check, _disk(s.home), gpu, _tensorrt(cuda), _referee(cuda), _onnxruntime(), _database(s), _broker(s), _jupyter(), _browser()])
