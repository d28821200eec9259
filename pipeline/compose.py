"""From `conf/` or `params.yaml` to one checked `Config`.

Three rules decide what a command reads, so that `dvc repro`, `dvc exp run -S` and a call by hand
agree:

1. under DVC (`DVC_STAGE` is set): `params.yaml`; overrides are refused;
2. by hand with overrides: `conf/` composed with them, as `dvc exp run -S` would;
3. by hand without: `params.yaml` as it stands.

DVC composes `conf/` without importing this package, so `conf/` stays plain YAML and meets its
schema here.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from pipeline.config import Config, ConvertConfig, RuntimeConfig, leaves
from pipeline.errors import ConfigError
from pipeline.rules import validate

CONF, PARAMS = Path("conf"), Path("params.yaml")
COMPOSE = "python -m pipeline compose"


def load(overrides: list[str]) -> Config:
    """The configuration of this call, by the three rules above; raises `ConfigError`."""
    under_dvc = "DVC_STAGE" in os.environ
    if under_dvc and overrides:
        raise ConfigError(
            "A DVC stage takes no overrides.",
            value=" ".join(overrides),
            rule="under DVC the configuration is params.yaml",
            remedy="change conf/ and run `python -m pipeline compose`, or use `dvc exp run -S`",
        )
    return checked(compose(overrides) if overrides else read_params())


def read_params() -> DictConfig:
    """`params.yaml` as it stands."""
    try:
        read = OmegaConf.load(PARAMS)
    except FileNotFoundError:
        raise ConfigError(
            "There is no params.yaml here.",
            value=PARAMS.absolute(),
            rule="commands run in the project's root",
            remedy=f"change to the project's folder, or run `{COMPOSE}` there",
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            "params.yaml is not YAML.",
            value=str(error).replace("\n", " "),
            rule="params.yaml is what conf/ composes to",
            remedy=f"run `{COMPOSE}`",
        ) from None
    assert isinstance(read, DictConfig)
    return read


def compose(overrides: list[str], config_name: str = "config") -> DictConfig:
    """What `conf/` composes to, interpolations resolved; raises `ConfigError`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException

    if not (CONF / f"{config_name}.yaml").is_file():
        raise ConfigError(
            "There is no conf/ here to compose.",
            value=CONF.absolute(),
            rule="overrides are composed with conf/",
            remedy="change to the project's folder",
        )
    try:
        with initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
            composed = hydra_compose(config_name, overrides)
            _refuse_code_and_secrets(OmegaConf.to_container(composed, resolve=False))
            OmegaConf.resolve(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, overrides) from None
    return composed


def checked(composed: DictConfig) -> Config:
    """Merge into the schema and check every rule; raises `ConfigError`."""
    plain = OmegaConf.to_container(composed, resolve=False)
    _refuse_code_and_secrets(plain)
    for key in sorted(_flat_keys(plain) - leaves(_everything()).keys() - _sections()):
        raise _unknown_key(key)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), composed)
        missing = sorted(OmegaConf.missing_keys(merged) | OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(
                "A setting has no value.",
                value=", ".join(missing),
                rule="every setting stands in conf/ with its default",
                remedy=f"give it a value in conf/ and run `{COMPOSE}`, or {missing[0]}=... here",
            )
        cfg = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _explain(error, []) from None
    assert isinstance(cfg, Config)
    validate(cfg)
    return cfg


def standalone(overrides: list[str]) -> tuple[ConvertConfig, RuntimeConfig]:
    """`convert.*` and `runtime.*` from the command line alone, with no `conf/` at hand."""
    schema = OmegaConf.structured({"convert": ConvertConfig, "runtime": RuntimeConfig})
    try:
        merged = OmegaConf.merge(schema, OmegaConf.from_dotlist(overrides))
        return OmegaConf.to_object(merged.convert), OmegaConf.to_object(merged.runtime)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise _explain(error, overrides) from None


def to_yaml(composed: DictConfig) -> str:
    """The text that DVC itself writes to `params.yaml` for this composition."""
    return OmegaConf.to_yaml(composed)


def _refuse_code_and_secrets(node: Any, path: str = "") -> None:
    """No configuration may name code to run or bake the environment into an artefact."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                raise ConfigError(
                    "The configuration names code to run.",
                    value=f"{path}._target_={value}",
                    rule="configuration is data: `_target_` is not allowed",
                    remedy=f"remove {path}._target_",
                )
            _refuse_code_and_secrets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for item in node:
            _refuse_code_and_secrets(item, path)
    elif isinstance(node, str) and "${oc.env" in node:
        raise ConfigError(
            "The configuration reads the environment.",
            value=f"{path}={node}",
            rule="a value of the environment would be written into artefacts, secrets included",
            remedy=f"write the value of {path} out",
        )


def _explain(error: Exception, overrides: list[str]) -> ConfigError:
    """A refusal of Hydra's or OmegaConf's in our form, with the nearest key or the choices."""
    from hydra.errors import MissingConfigException

    first = str(error).splitlines()[0]
    key = getattr(error, "full_key", None) or ""
    if isinstance(error, MissingConfigException) and error.options:
        return ConfigError(
            f"No such choice: {error.missing_cfg_file}.",
            value=" ".join(overrides) or None,
            rule=f"one of {', '.join(sorted(error.options))}",
            remedy="choose one of these; any other dense model is "
            "model=pretrained model.id=<hub id or folder> model.layers=[...]",
        )
    absent = re.match(r"Could not override '(.+?)'", first)
    if isinstance(error, ConfigKeyError) or absent:
        return _unknown_key(absent[1] if absent else key or first)
    if isinstance(error, InterpolationResolutionError):
        remedy = "write the value out"
    else:
        remedy = "`python -m pipeline compose --print` shows every setting with its value"
    return ConfigError(
        f"The configuration is refused{f' at {key}' if key else ''}.",
        value=first,
        rule="the types and choices stand in pipeline/config.py",
        remedy=remedy,
    )


def _unknown_key(key: str) -> ConfigError:
    known = list(leaves(_everything()))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    section = key.rpartition(".")[0]
    beside = [k for k in known if k.rpartition(".")[0] == section]
    return ConfigError(
        f"There is no setting named {key}.",
        value=key,
        rule=f"in section {section!r}: {', '.join(k.rpartition('.')[2] for k in beside)}"
        if beside
        else "`python -m pipeline compose --print` shows every setting",
        remedy=f"did you mean {near[0]}?",
    )


def _everything() -> Config:
    from pipeline.config import EmbeddedModelConfig

    cfg = Config()
    cfg.model.embedded = EmbeddedModelConfig()
    return cfg


def _flat_keys(node: Any, path: str = "") -> set[str]:
    if not isinstance(node, dict) or not node:
        return {path}
    return {k for key, below in node.items() for k in _flat_keys(below, f"{path}.{key}".strip("."))}


def _sections() -> set[str]:
    """Keys that hold others, which may be null as a whole (`model.embedded`)."""
    keys = leaves(_everything())
    return {key[:i] for key in keys for i, letter in enumerate(key) if letter == "."}


def differences(composed: Any, present: Any, path: str = "") -> list[str]:
    """Where two plain configurations differ, one line per key."""
    if isinstance(composed, dict) and isinstance(present, dict):
        keys = list(composed) + [key for key in present if key not in composed]
        found = []
        for key in keys:
            below = f"{path}.{key}" if path else str(key)
            found += differences(composed.get(key, "nothing"), present.get(key, "nothing"), below)
        return found
    same = composed == present and type(composed) is type(present)
    return [] if same else [f"{path}: conf/ says {composed}, params.yaml {present}"]
