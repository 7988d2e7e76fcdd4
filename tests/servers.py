"""Real servers for tests: each is started on a free port of the loopback interface, in a temporary folder, when its program is installed.

`postgresql.database()` is the URL of a new, empty database. The first call starts the server, the end of the process stops it.
Where the program is missing the test is skipped, and the reason says what to install. A further server is a subclass of `Server`.
"""
from __future__ import annotations

import atexit, os, shutil, signal, socket, subprocess, tempfile, time
from itertools import count
from pathlib import Path

import pytest


def free_port() -> int:
    "A port of the loopback interface on which nobody listens now."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    "A server of our own, a child of this process: started on first use, stopped when this process ends."
    name = ""                # for folders and messages
    package = ""             # the Debian package that brings it
    programs: tuple = ()     # what must be installed
    user = ""                # whom it runs as when we are root; empty: as we do
    stop_signal = signal.SIGTERM

    def __init__(self): self.child: subprocess.Popen | None = None

    def find(self, program: str) -> str | None: return shutil.which(program)
    def prepare(self, home: Path): "Make what the server needs before its first start."
    def command(self, home: Path, port: int) -> list[str]: raise NotImplementedError
    def ready(self, port: int) -> bool: raise NotImplementedError

    def _as_user(self) -> dict:
        root = bool(self.user) and hasattr(os, "geteuid") and os.geteuid() == 0
        return dict(user=self.user, group=self.user, extra_groups=[]) if root else {}

    def run(self, *command: str) -> subprocess.CompletedProcess:
        "Run a command as the server's user."
        return subprocess.run(command, cwd=self.home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, **self._as_user())

    def start(self) -> int:
        "The server's port; it answers when this returns. Skips the test where the server is not installed."
        if missing := [p for p in self.programs if not self.find(p)]: pytest.skip(f"{missing[0]} is not installed: apt-get install {self.package}")
        if self.child and self.child.poll() is None: return self.port
        self.pid, switch = os.getpid(), self._as_user()
        self.home = Path(tempfile.mkdtemp(prefix=f"fsml_{self.name}_", dir="/tmp" if switch else None))  # another user reaches /tmp, perhaps not TMPDIR
        atexit.register(self.stop)
        if switch: shutil.chown(self.home, self.user, self.user)
        self.prepare(self.home)
        for _ in range(3):  # somebody may take the port between our look and the start
            if self._boot(free_port()): return self.port
        raise RuntimeError(f"{self.name} does not start:\n{(self.home/'log').read_text()[-2000:]}")

    def _boot(self, port: int, patience_s: float = 60.) -> bool:
        self.port, end = port, time.monotonic() + patience_s
        with open(self.home/"log", "ab") as log:
            self.child = subprocess.Popen(self.command(self.home, port), cwd=self.home, env={**os.environ, "HOME": str(self.home)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                          start_new_session=True, **self._as_user())  # a session of its own: Ctrl-C is for the tests
        while self.child.poll() is None and time.monotonic() < end:
            if self.ready(port): return True
            time.sleep(.05)
        self._halt()
        return False

    def _halt(self):
        if self.child.poll() is None: self.child.send_signal(self.stop_signal)
        try: self.child.wait(30)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()

    def stop(self):
        "Stop the server and remove its folder. A forked child leaves its parent's server alone."
        if self.child is None or os.getpid() != self.pid: return
        self._halt()
        self.child = None
        shutil.rmtree(self.home, ignore_errors=True)


class PostgreSQL(Server):
    name, package, programs = "postgresql", "postgresql", ("initdb", "postgres", "pg_isready")
    user = "postgres"             # it refuses to run as root
    stop_signal = signal.SIGINT   # fast: it does not wait for clients

    def __init__(self):
        super().__init__()
        self._n = count(1)

    def find(self, program):
        homes = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name), reverse=True)  # Debian keeps them off the PATH
        return next((str(h/program) for h in homes if (h/program).exists()), shutil.which(program))

    def prepare(self, home):
        p = self.run(self.find("initdb"), "-D", str(home/"data"), "-U", "fsml", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
        if p.returncode: raise RuntimeError(f"initdb failed:\n{p.stdout}")

    def command(self, home, port):
        return [self.find("postgres"), "-D", str(home/"data"), "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={home}"]

    def ready(self, port): return self.run(self.find("pg_isready"), "-h", "127.0.0.1", "-p", str(port)).returncode == 0

    def database(self) -> str:
        "URL of a new, empty database. Skips the test where PostgreSQL or its driver is missing."
        psycopg = pytest.importorskip("psycopg", reason="PostgreSQL's driver is not installed: pip install 'fsml_lab[postgres]'")
        port, name = self.start(), f"lab{next(self._n)}"
        with psycopg.connect(f"postgresql://fsml@127.0.0.1:{port}/postgres", autocommit=True) as c: c.execute(f"CREATE DATABASE {name}")
        return f"postgresql://fsml@127.0.0.1:{port}/{name}"


postgresql = PostgreSQL()
