"""Debian's packages of a Slurm, installed when they are missing and we are root.

No service is started by that: what a test needs it starts itself.

    python tests/slurm/packages.py [--accounting]
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CONTROL = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}
"""Program -> the package that has it."""
ACCOUNTING = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}
POLICY = Path("/usr/sbin/policy-rc.d")
"""What Debian asks before it starts a service on installation."""
SYSTEM = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


class NoSlurmError(Exception):
    """The packages are missing and cannot be had; says why."""


def program(name: str) -> str:
    """Its path; `NoSlurmError` when it is not installed."""
    found = shutil.which(name, path=SYSTEM)
    if found is None:
        raise NoSlurmError(f"{name} is not installed")
    return found


def install(accounting: bool = False) -> None:
    """Until all of them are there; raises `NoSlurmError`."""
    if os.getuid() != 0:
        raise NoSlurmError("only root may install it and start its daemons")
    wanted = CONTROL | (ACCOUNTING if accounting else {})
    with _one_at_a_time():
        missing = [pack for name, pack in wanted.items() if not shutil.which(name, path=SYSTEM)]
        if not missing:
            return
        if shutil.which("apt-get") is None:
            raise NoSlurmError(f"{', '.join(missing)} not installed, and there is no apt-get")
        with _no_service_started():
            for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
                done = subprocess.run(
                    ["apt-get", "--quiet", "-o", "DPkg::Lock::Timeout=300", *command],
                    env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                if done.returncode:
                    raise NoSlurmError(f"apt-get {' '.join(command)}:\n{done.stdout[-2000:]}")


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    with Path(f"/tmp/slurm-packages-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _no_service_started() -> Iterator[None]:
    if POLICY.exists():  # a container's own says the same
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


if __name__ == "__main__":
    try:
        install(accounting="--accounting" in sys.argv)
    except NoSlurmError as error:
        sys.exit(f"no Slurm: {error}")
