"""Refuse to go on when `params.yaml` is not what `conf/` composes to.

`dvc repro` never composes: without this an edited `conf/` would be ignored in silence. Inside an
experiment (`DVC_EXP_NAME` is set) DVC has just composed `params.yaml` itself, with its `-S`.

Reads:  conf/, params.yaml
Writes: stages/config/checked.txt, always the same bytes, so that a change reruns only who reads it
Cost:   a second
Run:    python -m pipeline.stages.config
"""

import os

from omegaconf import OmegaConf

from pipeline import command, compose, durable
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.stages import CONFIG


def run(cfg: Config) -> None:
    if "DVC_EXP_NAME" not in os.environ:
        composed = OmegaConf.to_container(compose.compose([]))
        present = OmegaConf.to_container(compose.read_params())
        differing = compose.differences(composed, present)
        if differing:
            raise ConfigError(
                "params.yaml is not what conf/ composes to.",
                value="; ".join(differing),
                rule="dvc repro reads params.yaml, which must follow conf/",
                remedy="make the choice in conf/ and run `python -m pipeline compose`",
            )
    CONFIG.mkdir(parents=True, exist_ok=True)
    durable.write_bytes(CONFIG / "checked.txt", b"params.yaml is what conf/ composes to\n")


if __name__ == "__main__":
    command.stage(run, __doc__)
