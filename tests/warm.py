"""A `python` for the shell that has done its heavy imports: each call is a fork of one that has.

`bin/python` hands its arguments, folder, environment and files to a server, which forks; the fork
runs the module or the code as `python` would, with none of this project imported before. What it
does not know (`-I`, a script) it gives to a new interpreter. The embedded text is a part of the
standard library's (`faults/shrinking.py`).
"""

import contextlib
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

IMPORTED = (
    *("torch", "zarr", "datasets", "tokenizers", "accelerate", "hydra", "matplotlib.pyplot"),
    *("transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral"),
    *("matplotlib.backends.backend_svg", "jinja2", "rich.progress", "safetensors.torch"),
)
CLIENT = """#!{python} -IS
import array, json, os, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
call = {{"argv": sys.argv[1:], "cwd": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(link, [json.dumps(call).encode() + b"\\n"], [0, 1, 2])
code = link.makefile().read()
sys.exit(int(code) if code else 137)
"""


SHRINKING = Path(__file__).parent / "faults"


@contextlib.contextmanager
def python(folder: Path) -> Iterator[Path]:
    """The path of such a `python`, in `folder`, while this lasts."""
    folder.mkdir(parents=True)
    address, client = Path(tempfile.mkdtemp()) / "link", folder / "python"
    command = [sys.executable, __file__, str(address), str(folder / "library")]
    # torch counts its threads when it is imported, and bf16 products depend on how many there are.
    server = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not address.exists():
        assert server.poll() is None
        time.sleep(0.05)
    client.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)
    try:
        yield client
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(address.parent)


def serve(address: str, library: str) -> None:
    sys.path.insert(0, str(SHRINKING))
    from shrinking import shrink, small_library

    shrink(small_library(Path(library)))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    for name in IMPORTED:
        importlib.import_module(name)
    warnings.simplefilter("ignore", DeprecationWarning)  # fork beside idle threads
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address + ".new")
    listening.listen()
    Path(address + ".new").rename(address)
    while True:
        link, _ = listening.accept()
        if not os.fork():
            listening.close()
            _answer(link)
        link.close()


def _answer(link: socket.socket) -> None:
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        text, files, _, _ = socket.recv_fds(link, 65536, 3)
        while not text.endswith(b"\n"):
            text += link.recv(65536)
        call = json.loads(text)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(call["cwd"])
        os.environ.clear()
        os.environ.update(call["environment"], TOKENIZERS_PARALLELISM="false")
        code = _run(call["argv"])
        threading._shutdown()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        link.sendall(str(code).encode())
        os._exit(0)


def _run(argv: list[str]) -> int:
    try:
        sys.path.remove(str(SHRINKING))
        sys.path[0] = str(Path.cwd())
        if argv[:1] == ["-m"]:
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif argv[:1] == ["-c"]:
            sys.argv = ["-c", *argv[2:]]
            exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
        elif argv[:1] == ["-"] or not argv:
            sys.argv = argv
            exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
        else:
            return subprocess.run([sys.executable, *argv]).returncode
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        print(left.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    serve(*sys.argv[1:])
