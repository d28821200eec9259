"""The closed form of one layer of Llama-3.2-3B's size: too long for the table of all.

python -m benchmarks closed [--quick]     five turns of minutes each, or one
"""

from collections.abc import Iterator

from benchmarks import fitting
from benchmarks.measure import Row

D_MODEL, D_FF, TOKENS = 3072, 8192, 16384


def rows(quick: bool) -> Iterator[Row]:
    yield fitting.closed(D_MODEL, D_FF, TOKENS)
