"""A kernel in a box: bubblewrap around ipykernel, spoken to through sockets in a folder instead of the network.

Inside there is no network, no file but the interpreter, its packages and the system's libraries, all to read, and one
folder to write. Where the grader is root, the kernel runs as `nobody`; elsewhere as the grader's own user in a user
namespace, to whom the file system of the box is all there is. Limits: address space, processes, size of a file; the
number of seconds is for whoever runs the cells.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

NOBODY = 65534
PACKAGE = "/opt/book/qft_utils"  # where the box shows the book's package
ROOT = Path(__file__).resolve().parents[2]
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/etc/fonts")
MISSING = (
    "{why}. Student code runs only inside it: install Debian's package `bubblewrap` (sudo apt-get install bubblewrap),"
    " or, for answers that you trust as much as your own code, say --no-sandbox (make grade SANDBOX=no)."
)


class NoSandbox(RuntimeError):
    """bubblewrap is absent, or may not make namespaces here."""


@dataclass(frozen=True)
class Limits:
    """What the code in one box may use. Bytes, but for `processes`, which counts threads too."""

    memory: int = 6 << 30
    processes: int = 200
    file_size: int = 200 << 20


@dataclass(frozen=True)
class Box:
    """One notebook's box: `work` is all that it can write, and holds the sockets too."""

    work: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = Limits()

    def command(self, inner: list[str]) -> list[str]:
        """The command that runs `inner` in the box."""
        limits = [f"--as={self.limits.memory}", f"--nproc={self.limits.processes}", f"--fsize={self.limits.file_size}"]
        walls = ["bwrap", *self._mounts(), *self._variables(), "--chdir", str(self.work), *_namespaces()]
        return [*walls, "--", *_as_nobody(), "prlimit", *limits, "--core=0", *inner]

    def _mounts(self) -> list[str]:
        seen = [path for path in SYSTEM if os.path.exists(path)]
        interpreters = {Path(sys.prefix), Path(sys.base_prefix), Path(os.path.realpath(sys.executable)).parent.parent}
        seen += [str(path) for path in sorted(interpreters) if not path.is_relative_to("/usr")]
        bound = [(path, path, "--ro-bind") for path in seen] + [(str(ROOT / "qft_utils"), PACKAGE, "--ro-bind")]
        bound.append((str(self.work), str(self.work), "--bind"))
        above = sorted({str(parent) for _, inside, _ in bound for parent in Path(inside).parents} - {"/", "/tmp"})
        # Folders on the way to a mount would be root's alone.
        mounts = ["--tmpfs", "/tmp", *(part for path in above for part in ("--perms", "0755", "--dir", path))]
        mounts += [part for outside, inside, how in bound for part in (how, outside, inside)]
        return [*mounts, "--proc", "/proc", "--dev", "/dev"]

    def _variables(self) -> list[str]:
        usual = {
            "PATH": f"{sys.prefix}/bin:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "MPLBACKEND": "agg",
            "PYTHONPATH": str(Path(PACKAGE).parent), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        given = [part for name, value in (usual | dict(self.environment)).items() for part in ("--setenv", name, value)]
        return ["--clearenv", *given]

    def prepare(self) -> None:
        """Makes the folder, and gives it to the user of the box."""
        self.work.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            os.chown(self.work, NOBODY, NOBODY)


def _namespaces() -> list[str]:
    """Root needs none of its own for users: it becomes `nobody` inside, once the walls stand."""
    own = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    rest = ["--die-with-parent", "--new-session"]
    return [*own, *rest] if os.geteuid() == 0 else [*own, "--unshare-user", "--cap-drop", "ALL", *rest]


def _as_nobody() -> list[str]:
    if os.geteuid() != 0:
        return []
    groups = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return ["setpriv", *groups, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]


def check() -> None:
    """Raises NoSandbox where no box can be made; its message says what to install."""
    if shutil.which("bwrap") is None:
        raise NoSandbox(MISSING.format(why="There is no `bwrap` on the path"))
    walls = ["bwrap", "--ro-bind", "/", "/", *_namespaces(), "--", *_as_nobody(), "true"]
    tried = subprocess.run(walls, capture_output=True, text=True)
    if tried.returncode:
        raise NoSandbox(MISSING.format(why=f"bubblewrap can make no box here ({tried.stderr.strip()})"))


def kernel_manager(box: Box, boxed: bool = True) -> type[AsyncKernelManager]:
    """A kernel manager whose kernel runs in the box, or, by name, without one."""
    inner = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]

    class Boxed(AsyncKernelManager):
        """Speaks over sockets in the box's folder, and interrupts by message: no signal crosses the wall."""

        def __init__(self, **given: object) -> None:
            super().__init__(**given)
            self.transport, self.ip = "ipc", str(box.work / "kernel")
            self.connection_file = str(box.work / "connection.json")

        @property
        def kernel_spec(self) -> KernelSpec:
            argv = box.command(inner) if boxed else ["env", "-C", str(box.work), *_plain(box), *inner]
            return KernelSpec(argv=argv, display_name="boxed", language="python", interrupt_mode="message")

        def write_connection_file(self, **given: object) -> None:
            super().write_connection_file(**given)
            if boxed and os.geteuid() == 0:
                os.chown(self.connection_file, NOBODY, NOBODY)

    return Boxed


def _plain(box: Box) -> list[str]:
    return [f"PYTHONPATH={ROOT}", "MPLBACKEND=agg", *(f"{name}={value}" for name, value in box.environment.items())]
