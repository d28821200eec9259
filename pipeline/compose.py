"""From `conf/` or `params.yaml` to one checked `Config`.

Three rules decide what a command reads, so that `dvc repro`, `dvc exp run -S` and a call by hand
agree:

1. under DVC (`DVC_STAGE` is set): `params.yaml`; overrides are refused;
2. by hand with overrides: `conf/` composed with them, as `dvc exp run -S` would;
3. by hand without: `params.yaml` as it stands.

DVC composes `conf/` without importing this package, so `conf/` stays plain YAML and meets its
schema here.
"""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from pipeline import durable, refusals
from pipeline.config import Config, ConvertConfig, RuntimeConfig, leaves
from pipeline.errors import ConfigError
from pipeline.rules import check_numbers, validate

CONF, PARAMS = Path("conf"), Path("params.yaml")
RESOLVED = re.compile(r"\$\{.*:", re.DOTALL)
"""An interpolation that calls a resolver, whose name may be put together: `${oc.env:X}`."""
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
    if overrides:
        return checked(compose(overrides), f"of {CONF.absolute()} and the command line")
    return checked(read_params(), f"in {PARAMS.absolute()}")


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
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise _no_yaml(error, PARAMS) from None
    if not isinstance(read, DictConfig):
        raise _no_yaml(TypeError("it is no mapping of settings"), PARAMS)
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
    refusals.check_overrides(overrides, CONF)
    try:
        with initialize_config_dir(str(CONF.absolute()), version_base="1.3"):
            composed = hydra_compose(config_name, overrides)
            _refuse_code_and_secrets(OmegaConf.to_container(composed, resolve=False))
            OmegaConf.resolve(composed)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise _no_yaml(error, CONF) from None
    except (HydraException, OmegaConfBaseException, TypeError, ValueError) as error:
        raise _explain(error, overrides) from None
    return composed


def checked(composed: DictConfig, where: str = "here") -> Config:
    """Merge into the schema and check every rule; raises `ConfigError`.

    Args:
        where: what was read, for the message.
    """
    plain = OmegaConf.to_container(composed, resolve=False)
    _refuse_code_and_secrets(plain)
    if error := refusals.unfit(plain, where):
        raise error
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), composed)
        missing = sorted(OmegaConf.missing_keys(merged) | OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(
                "A setting has no value.",
                value=f"{', '.join(missing)} ({where})",
                rule="every setting stands in conf/ with its default",
                remedy=f"give it a value in conf/ and run `{COMPOSE}`, or {missing[0]}=... here",
            )
        cfg = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _explain(error, [where]) from None
    assert isinstance(cfg, Config)
    validate(cfg)
    return cfg


def standalone(overrides: list[str]) -> tuple[ConvertConfig, RuntimeConfig]:
    """`convert.*` and `runtime.*` from the command line alone, with no `conf/` at hand."""
    schema = OmegaConf.structured({"convert": ConvertConfig, "runtime": RuntimeConfig})
    known = [k for k in refusals.kinds() if k.startswith(("convert.", "runtime."))]
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            near = refusals.nearest(key.lstrip("+~"), known)
            raise ConfigError(
                f"A conversion on its own has no setting named {key}.",
                value=text,
                rule=f"{', '.join(known)}; each as key=value",
                remedy=f"did you mean {near}=...?" if near else "leave it out",
            )
        _refuse_code_and_secrets(value, key)
        as_written = str in refusals.kinds()[key] and value[:1] not in ("", "'", '"')
        try:
            if as_written and value.lower() not in ("null", "~"):  # `2024_12_01` is no number
                OmegaConf.update(schema, key, value)
            else:
                schema.merge_with_dotlist([text])
        except (OmegaConfBaseException, yaml.YAMLError):
            raise refusals.wrong_value(key, value, "on the command line") from None
    try:
        convert, runtime = (OmegaConf.to_object(schema[name]) for name in ("convert", "runtime"))
    except OmegaConfBaseException as error:
        raise _explain(error, overrides) from None
    assert isinstance(convert, ConvertConfig) and isinstance(runtime, RuntimeConfig)
    check_numbers(leaves(convert, "convert") | leaves(runtime, "runtime"))
    return convert, runtime


def write(overrides: list[str], to_stdout: bool) -> None:
    """`params.yaml` from `conf/`, or the composed text to stdout; raises `ConfigError`."""
    composed = compose(overrides)
    checked(composed, f"of {CONF.absolute()} and the command line")
    if to_stdout:
        print(to_yaml(composed), end="")
    elif overrides:
        raise ConfigError(
            "params.yaml is written without overrides.",
            value=" ".join(overrides),
            rule="params.yaml is what conf/ alone composes to",
            remedy="make the choice in conf/, use `dvc exp run -S`, or add --print",
        )
    else:
        durable.write_bytes(PARAMS, to_yaml(composed).encode())
        print(f"wrote {PARAMS}")


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
    elif isinstance(node, str) and RESOLVED.search(node):
        raise ConfigError(
            "The configuration reads the environment, or computes a value.",
            value=f"{path}={node}",
            rule="only ${another.key} is filled in; a value of the environment would be written "
            "into artefacts, secrets included",
            remedy=f"write the value of {path} out",
        )


def _no_yaml(error: Exception, path: Path) -> ConfigError:
    return ConfigError(
        f"{path}{'/' * (path == CONF)} is not YAML of settings.",
        value=f"{path.absolute()}: {' '.join(str(error).split())[:300]}",
        rule="conf/ is YAML in UTF-8, each key once; params.yaml is what it composes to",
        remedy="correct that line" if path == CONF else f"run `{COMPOSE}`",
    )


def _explain(error: Exception, said: list[str]) -> ConfigError:
    """What else Hydra or OmegaConf refuses: a file of `conf/` that is not there, interpolations."""
    key = getattr(error, "full_key", None) or ""
    if isinstance(error, InterpolationResolutionError):
        remedy = "write the value out"
    else:
        remedy = refusals.SHOW
    return ConfigError(
        f"The configuration is refused{f' at {key}' if key else ''}.",
        value=str(error).splitlines()[0] if str(error) else type(error).__name__,
        rule=f"conf/ composes to a value for every setting ({' '.join(said) or 'no overrides'})",
        remedy=remedy,
    )


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
