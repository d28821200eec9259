"""Fit layers ahead of `dvc repro`, many at a time, on this machine or on a cluster.

Each job computes one layer into `.scratch` under its fingerprint and publishes nothing; the next
`dvc repro`, or `dvc exp run -S` with the same overrides, finds it done and only publishes it.
Hydra's launchers start the jobs: nothing of ours schedules, queues or retries, and no job calls
`dvc`. The capture must lie there, made with the same settings.
"""

import os
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from pipeline import compose, runtime, workdir
from pipeline.config import Config, select
from pipeline.errors import ArtifactError, ConfigError
from pipeline.stages import CAPTURE, DENSE, TOKENS, budget, capture, dense, tokens, train


def main(arguments: list[str]) -> None:
    """Run Hydra on `conf/prefill.yaml`; raises what a job raised, when all of them have ended."""
    import hydra

    _check(arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # a refusal comes through as it is
    sys.argv = ["python -m pipeline prefill", *arguments]
    conf = str(compose.CONF.absolute())
    hydra.main(version_base="1.3", config_path=conf, config_name="prefill")(fit)()


def _check(arguments: list[str]) -> None:
    """Refuse what no job could use, before Hydra starts any."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = [a for a in arguments if not a.startswith("-")]
    if not any(o.startswith("layer=") for o in overrides):
        raise ConfigError(
            "It is not said which layers to fit.",
            value=" ".join(arguments) or "no arguments",
            rule="layer=K, or -m layer=K,L,... for several",
            remedy="add -m layer=0,1,2,3 hydra/launcher=joblib",
        )
    parsed = OverridesParser.create().parse_overrides(overrides)
    single = [o.input_line for o in parsed if o.input_line and not o.is_sweep_override()]
    kept = [line for line in single if not line.lstrip("+~").startswith(("layer=", "hydra"))]
    compose.checked(compose.compose(kept))


def fit(composed: DictConfig) -> None:
    """One job: fit `layer` by the rest of the configuration."""
    rest = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "layer"])
    cfg = compose.checked(rest)
    _check_capture(cfg)
    runtime.configure(cfg.runtime)
    work: Path = train.run(cfg, composed.layer, budget.run(cfg, published=False), published=False)
    print(f"layer {composed.layer}: complete in {work}", flush=True)


def _check_capture(cfg: Config) -> None:
    """A layer fitted to other activations would never be adopted."""
    for made, by in ((DENSE, dense), (TOKENS, tokens), (CAPTURE, capture)):
        found = workdir.read_json(made / workdir.MANIFEST)["settings"]
        wanted = select(cfg, by.PARAMS)
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            raise ArtifactError(
                f"{made} was made with other settings.",
                value="; ".join(f"{k}: {found.get(k)} there, {wanted[k]} here" for k in differing),
                rule="layers are fitted to activations of their own configuration",
                remedy="run `dvc repro capture` with this configuration first",
            )
