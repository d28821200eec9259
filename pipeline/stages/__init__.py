"""The stages of the DAG, one thin module each; what each writes lies in the folder named here."""

from collections.abc import Iterable
from pathlib import Path

from pipeline import artifacts

CONFIG = Path("stages/config")
DENSE = Path("stages/dense")
TOKENS = Path("stages/tokens")
CAPTURE = Path("stages/capture")
BUDGET = Path("stages/budget")
TRAIN = Path("stages/train")
HEAL = Path("stages/heal")
CONVERT = Path("stages/convert")
EVALUATE = Path("stages/evaluate")
REPORTS = Path("reports")


def final_layers(layers: Iterable[int]) -> dict[int, Path]:
    """Where each layer's last state lies: in `heal` where it was healed, in `train` otherwise."""
    artifacts.verify(HEAL, "healed.json")
    healed = artifacts.read_json(HEAL / "healed.json")["layers"]
    return {k: (HEAL if k in healed else TRAIN) / f"layer_{k}" for k in layers}
