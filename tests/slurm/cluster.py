"""A real Slurm of three virtual nodes on this machine, in a folder of its own.

    with Cluster() as cluster:
        subprocess.run([..., "hydra/launcher=submitit_slurm"], env=os.environ | cluster.environment)

Runs as root without systemd. Configuration, key, sockets, logs and state lie in a temporary folder;
the ports are free ones of loopback. All nodes share this machine's file system and processors; each
says that it has one GPU, with no device behind it: jobs that ask for one run one at a time there.

What was started is stopped by its pid, and so are the jobs that are left: processes that carry this
cluster's own configuration in their environment.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm import packages, settings
from slurm.daemons import Daemons, kill, with_variables

CANCEL_S = 10.0


class Cluster:
    """Three nodes `n1`, `n2`, `n3`, with accounting or without.

    Args:
        node_timeout_s: seconds after which a node that does not answer is down, and its jobs are
            put into the queue again.
    """

    NODES = ("n1", "n2", "n3")

    def __init__(self, accounting: bool = False, node_timeout_s: int = 300) -> None:
        packages.install(accounting)
        self.accounting, self.node_timeout_s = accounting, node_timeout_s

    def __enter__(self) -> "Cluster":
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)  # munge's clients must reach its socket
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons = Daemons(self.folder, self.environment)
        try:
            self._configure()
            self._start_munge()
            if self.accounting:
                self._start_accounting()
            self.daemons.start("controller", "slurmctld", "-D")
            for node in self.NODES:
                self.start_node(node)
            idle = dict.fromkeys(self.NODES, "idle")
            self.daemons.until(lambda: self.states() == idle, "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root")
            until = time.monotonic() + CANCEL_S
            while self.processes() and time.monotonic() < until:
                time.sleep(0.1)
        kill(self.processes())
        self.daemons.stop()
        kill(self.processes())  # what a node started meanwhile
        shutil.rmtree(self.folder, ignore_errors=True)

    # What a test does to it

    def run(self, command: str, *arguments: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            [packages.program(command), *arguments],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        if done.returncode:
            raise subprocess.SubprocessError(f"{command} {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def states(self) -> dict[str, str]:
        """Node -> its state, as `sinfo` names it; empty while the controller does not answer."""
        try:
            lines = self.run("sinfo", "-h", "-N", "-o", "%N %t").splitlines()
        except subprocess.SubprocessError:
            return {}
        return dict(line.split() for line in lines)

    def jobs(self) -> dict[str, str]:
        """Job, `3_1` of an array, -> its state; those that ended too."""
        lines = self.run("squeue", "-h", "-t", "all", "-r", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def node_of(self, task: int) -> str:
        """Where that task of the only array runs."""
        lines = self.run("squeue", "-h", "-t", "running", "-r", "-o", "%K %N").splitlines()
        return dict(line.split() for line in lines)[str(task)]

    def start_node(self, node: str) -> None:
        self.daemons.start(node, "slurmd", "-D", "-N", node)

    def kill_daemon(self, node: str) -> None:
        """The node's daemon; what runs on the node goes on."""
        self.daemons.kill(node)

    def lose_node(self, node: str) -> None:
        """As a machine whose power fails: its daemon and all that runs there."""
        self.kill_daemon(node)
        kill(self.processes(node))

    def processes(self, node: str = "") -> list[int]:
        """Pids of the jobs of this cluster, or of one node, and of the steps that watch them."""
        conf = f"SLURM_CONF={self.environment['SLURM_CONF']}"
        return with_variables(conf.encode(), f"SLURMD_NODENAME={node}".encode(), b"SLURM_JOB_ID=")

    # How it begins

    def _configure(self) -> None:
        controller, *nodes, accounting, self.database = _free_ports(6)
        self.password = secrets.token_hex(8)
        own = {
            "folder": self.folder,
            "host": socket.gethostname().split(".")[0],
            "controller": controller,
            "nodes": ",".join(map(str, nodes)),
            "node_timeout_s": self.node_timeout_s,
            "port": accounting,
            "database": self.database,
            "password": self.password,
        }
        text = settings.SLURM + (settings.ACCOUNTING if self.accounting else "")
        self._write("slurm.conf", text.format(**own))
        self._write("slurmdbd.conf", settings.SLURMDBD.format(**own))
        self._write("gres.conf", settings.GRES.format(**own))
        self._write("nvidia0", "")
        self._write("munge.key", secrets.token_hex(64))
        (self.folder / "state").mkdir()
        for node in self.NODES:
            (self.folder / "spool" / node).mkdir(parents=True)

    def _write(self, name: str, text: str) -> Path:
        """For its owner only, as the daemons demand."""
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text)
        return path

    def _start_munge(self) -> None:
        link = self.folder / "munge.socket"
        files = {"key": "munge.key", "log": "munged.log", "pid": "munged.pid", "seed": "munge.seed"}
        options = [f"--{kind}-file={self.folder / name}" for kind, name in files.items()]
        self.daemons.start("munged", "munged", "--foreground", f"--socket={link}", *options)
        self.daemons.until(link.exists, "munged")

    def _start_accounting(self) -> None:
        where = ("--no-defaults", f"--datadir={self.folder / 'data'}", "--user=root")
        plain = ("--skip-test-db", "--auth-root-authentication-method=normal")
        install = [packages.program("mariadb-install-db"), *where, *plain]
        subprocess.run(install, check=True, capture_output=True)
        setup = self._write("setup.sql", settings.DATABASE.format(password=self.password))
        links = (f"--socket={self.folder / 'data.socket'}", f"--port={self.database}")
        others = ("--bind-address=127.0.0.1", "--skip-name-resolve", f"--init-file={setup}")
        self.daemons.start("database", "mariadbd", *where, *links, *others)
        self.daemons.until(lambda: _answers(self.database), "mariadbd")
        self.daemons.start("accounting", "slurmdbd", "-D")
        self.daemons.until(self._is_registered, "slurmdbd")

    def _is_registered(self) -> bool:
        try:
            self.run("sacctmgr", "--immediate", "add", "cluster", settings.NAME)
        except subprocess.SubprocessError as error:
            return "already exists" in str(error)
        return True


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        links = [held.enter_context(socket.socket()) for _ in range(count)]
        for link in links:
            link.bind(("127.0.0.1", 0))
        return [link.getsockname()[1] for link in links]


def _answers(port: int) -> bool:
    with socket.socket() as link:
        return link.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def or_skip() -> Iterator[Cluster]:
    """A cluster without accounting; where there can be none the test is skipped, and says why."""
    try:
        made = Cluster()
    except packages.NoSlurmError as error:
        pytest.skip(f"no Slurm: {error}")
    with made as cluster:
        yield cluster
