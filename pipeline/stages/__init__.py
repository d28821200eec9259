"""The stages of the DAG, one thin module each; what each writes lies in the folder named here."""

from pathlib import Path

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
