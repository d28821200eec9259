"""How long stages took on this machine, for `plan`: beside the work, and in no artefact.

`.scratch/measured/<unit>.json` holds the seconds of the last run of a unit that began anew here,
and the configuration that it ran with.
"""

import contextlib
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from pipeline import artifacts, compose, durable, workdir
from pipeline.config import Config
from pipeline.errors import PipelineError

FOLDER = "measured"


def note(cfg: Config) -> None:
    """Keep how long this process took for what it computed from beginning to end."""
    plain = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
    folder = workdir.scratch_root() / FOLDER
    for unit, seconds in workdir.computed.items():
        content = {"seconds": seconds, "configuration": plain}
        with contextlib.suppress(OSError):  # the stage is done, whether or not this is kept
            folder.mkdir(parents=True, exist_ok=True)
            durable.write_json(folder / f"{unit}.json", content)


def read(root: Path) -> dict[str, tuple[float, Config]]:
    """Unit -> seconds and configuration; what an older version wrote otherwise is left out."""
    found = {}
    for path in sorted((root / FOLDER).glob("*.json")):
        try:
            kept = artifacts.read_json(path)
            cfg = compose.checked(DictConfig(kept["configuration"]))
            found[path.stem] = float(kept["seconds"]), cfg
        except (PipelineError, KeyError, TypeError):
            continue
    return found
