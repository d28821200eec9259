"""A part of the standard library's text, which is read in a tenth of the time.

`sysconfig` names another folder: nothing of ours is changed. Imports nothing heavy, since every
command that the tests start imports it.
"""

import shutil
import sysconfig
from pathlib import Path

TEXT = ("difflib", "ipaddress", "statistics", "textwrap", "threading", "typing")  # to train
TEXT += ("os", "pkgutil", "platform", "shutil", "functools", "locale")  # validation, heldout
TOPICS = 8


def small_library(folder: Path) -> Path:
    """Some modules of the standard library, in a folder of their own."""
    there = Path(sysconfig.get_path("stdlib"))
    for name in TEXT:
        path = (folder / name).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy((there / name).with_suffix(".py"), path)
    return folder


def shrink(library: Path) -> None:
    """Let this process take `library` for the standard library, for what it reads as text."""
    import pydoc_data.topics

    real = sysconfig.get_path
    sysconfig.get_path = lambda name, *a, **k: (
        str(library) if name == "stdlib" else real(name, *a, **k)
    )
    pydoc_data.topics.topics = dict(sorted(pydoc_data.topics.topics.items())[:TOPICS])
