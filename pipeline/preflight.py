"""What the machine has left, and the refusal that names what it lacks; before the work if it can.

Imports neither torch nor transformers: `plan` asks here, and so does every stage.
"""

import errno
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from pipeline import cgroups
from pipeline.errors import ResourceError

ERRNOS = {
    code: (rule, remedy)
    for codes, rule, remedy in (
        (
            (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
            "room on the disk, in the quota and below the limit of a file's size",
            "free space (`python -m pipeline plan` says how much is needed), then run the same "
            "command again: it goes on where it was",
        ),
        (
            (errno.EACCES, errno.EPERM, errno.EROFS),
            "a folder that can be read and written",
            "fix the permission or the mount, then run the same command again",
        ),
        (
            (errno.EMFILE, errno.ENFILE),
            "file handles for every open file",
            "raise `ulimit -n`, then run the same command again",
        ),
    )
    for code in codes
}
"""What to say of an operating system's refusal."""

LOST_ALLOCATIONS = (
    "can't allocate memory",  # torch on a CPU
    "not enough memory",
    "out of memory",  # CUDA
    "Cannot allocate memory",  # ENOMEM, also of a thread
    "Unable to allocate",  # numpy
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN, which tells no more
    "during blosc compression",
    "can't start new thread",  # for whose stack there is no room
    "excessive memory usage",  # joblib, of a worker that was killed
)
MEMORY_REMEDY = (
    "lower capture.batch_size, train.batch_size, heal.batch_size or evaluate.batch_size of this "
    "stage, set train.stream=true, or give the machine more; `python -m pipeline plan` says how "
    "much each stage takes"
)


def free_disk(path: Path) -> int:
    """Bytes that may be written where `path` lies, or will lie."""
    return shutil.disk_usage(_existing(path)).free


def free_files(path: Path) -> int | None:
    """Files that may be made there; null where the file system has no such limit."""
    found = os.statvfs(_existing(path))
    return found.f_favail if found.f_files else None


def free_memory() -> int | None:
    """Bytes that can be used without swapping, within a container's limit; null = not known."""
    known = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = dict(line.split(":") for line in lines)
        known.append(1024 * int(sizes["MemAvailable"].split()[0]))
    except (OSError, KeyError):  # another system
        pass
    limited = cgroups.free_memory()
    return min(known if limited is None else [*known, limited], default=None)


def free_gpu_memory() -> int | None:
    """Bytes on the GPU with the most, as `nvidia-smi` says; null where there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True)
        return max((int(line) for line in done.stdout.split()), default=0) * 2**20 or None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def check_disk(what: str, path: Path, need: int, levers: Sequence[str]) -> None:
    """Refuse to begin what cannot be written.

    Args:
        what: is to be written, in words.
        need: bytes.
        levers: what would make it smaller, each with its number.

    Raises:
        ResourceError: there is less room.
    """
    free = free_disk(path)
    if need > free:
        raise ResourceError(
            f"There is no room for {what}.",
            value=f"{size(need)} needed, {size(free)} free at {path.absolute()}",
            rule="what is written fits the disk, told before it is",
            remedy="free space, or make it smaller: " + "; ".join(levers),
        )


def check_checkpoints(what: str, folder: Path, parameters: int, lever: str) -> None:
    """Refuse to begin a training whose checkpoints do not fit the disk.

    One holds weights, the best ones and two moments in float32; the next is written before it goes,
    and what comes of the training is written while the last one lies there.

    Args:
        parameters: that learn.
        lever: what needs none of this, or less.

    Raises:
        ResourceError: there is less room.
    """
    there = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    need = max(0, 2 * 16 * parameters - there) + 4 * parameters
    check_disk(f"the checkpoints of {what}", folder, need, [lever])


def let_through(error: Exception) -> None:
    """Raise it again where the machine is at fault, and not the file that is read."""
    if refusal(error, "") is not None:
        raise error


def refusal(error: BaseException, what: str) -> ResourceError | None:
    """The refusal that stands for another library's error; null where it is no lack of anything.

    Args:
        what: could not be done, in words.
    """
    text = " ".join(str(error).split())
    if _is_memory(error, text):
        return ResourceError(
            f"Out of memory: {what}.",
            value=text[:300] or type(error).__name__,
            rule="what is worked on at a time fits the memory that is free",
            remedy=MEMORY_REMEDY,
        )
    code = _errno(error, text)
    if code not in ERRNOS:
        return None
    rule, remedy = ERRNOS[code]
    path = getattr(error, "filename", None)
    value = f"[Errno {code}] {os.strerror(code)}" + (f": {Path(path).absolute()}" if path else "")
    return ResourceError(f"The machine refused: {what}.", value=value, rule=rule, remedy=remedy)


def _is_memory(error: BaseException, text: str) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and any(t in text for t in LOST_ALLOCATIONS)


def _errno(error: BaseException, text: str) -> int | None:
    """Of an OSError, or of what a library written in Rust says of one in words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    return next((code for code in ERRNOS if f"(os error {code})" in text), None)


def size(n: float) -> str:
    """`1.5 GB`, to three figures."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}" if unit != "bytes" else f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())
