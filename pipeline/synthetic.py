"""Rows to fit a layer to that were never captured: `train.data_free`.

Of the captured training inputs only the mean and the covariance are kept. Inputs are drawn from the
normal distribution that has both, and the dense FFN says what each one gives. Validation and
heldout rows stay the captured ones: what is chosen and told is chosen and told on real inputs.

Shapes: T tokens, D d_model.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.ffn import DenseFFN
from pipeline.shuffle import Pair, generator

if TYPE_CHECKING:
    from pipeline.store import LayerReader

SUM_ROWS = 16384  # captured rows that are summed at a time
READ_ROWS = 1024  # rows that `read` draws together, so that it need not draw those before


class SyntheticRows:
    """Stands in for a layer's `LayerReader`; its `train` rows are drawn and new in every epoch.

    They are made on the device of the FFN's weights: batches lie there, what `read` gives on the
    CPU. A batch depends on (seed, epoch, its index, batch_size) and on no batch before it.
    """

    def __init__(self, reader: "LayerReader", ffn: DenseFFN, *, seed: int) -> None:
        self.path, self.rows = reader.path, reader.rows
        self.d_model, self.dtype = reader.d_model, reader.dtype
        self.sequence_length = reader.sequence_length
        self._reader, self._seed = reader, seed
        self._device = ffn.up_proj.device
        self._ffn = ffn.to(self._device, torch.float32)
        mean_D, covariance_DD = _statistics(reader, self._device)
        self._mean_D, self._root_DD = mean_D.float(), _root(covariance_DD).float()

    def read(self, split: str, start: int = 0, stop: int | None = None) -> Pair:
        """Rows [start, stop) in order: (input, output), each (rows, d_model), on the CPU.

        Those of `train` are drawn: the same at every call, and in no batch.
        """
        if split != "train":
            return self._reader.read(split, start, stop)
        start, stop, _ = slice(start, stop).indices(self.rows[split])
        if start >= stop:
            return self._reader.read(split, 0, 0)
        first = start // READ_ROWS
        blocks = [
            [side.cpu() for side in self._draw(READ_ROWS, self._seed, "read", block)]
            for block in range(first, -(-stop // READ_ROWS))
        ]
        rows = slice(start - first * READ_ROWS, stop - first * READ_ROWS)
        x, y = (torch.cat(side)[rows] for side in zip(*blocks, strict=True))
        return x, y

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        skip: int = 0,
        in_memory: bool = True,
    ) -> Iterator[Pair]:
        """As many (input, output) batches as the reader has, each (batch_size, d_model).

        `skip` batches of `train` are left out without being drawn; `in_memory` matters to the
        other splits alone.
        """
        if split != "train":
            order = {"seed": seed, "epoch": epoch, "skip": skip, "in_memory": in_memory}
            yield from self._reader.batches(split, batch_size, **order)
            return
        for index in range(skip, self.rows[split] // batch_size):
            yield self._draw(batch_size, seed, epoch, index)

    def _draw(self, rows: int, *purpose: object) -> Pair:
        normal = generator("normal", *purpose)
        z_TD = torch.from_numpy(normal.standard_normal((rows, self.d_model), dtype=np.float32))
        z_TD = z_TD.to(self._device)
        x_TD = (self._mean_D + z_TD @ self._root_DD).to(self.dtype)
        return x_TD, self._ffn(x_TD.float()).to(self.dtype)


def _statistics(reader: "LayerReader", device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of the captured training inputs, float64, on the device."""
    rows = reader.rows["train"]
    f64 = {"dtype": torch.float64, "device": device}
    sum_D = torch.zeros(reader.d_model, **f64)
    gram_DD = torch.zeros(reader.d_model, reader.d_model, **f64)
    for start in range(0, rows, SUM_ROWS):
        x_TD = reader.read("train", start, start + SUM_ROWS)[0].to(**f64)
        sum_D += x_TD.sum(dim=0)
        gram_DD.addmm_(x_TD.T, x_TD)
    mean_D = sum_D / rows
    return mean_D, gram_DD / rows - torch.outer(mean_D, mean_D)


def _root(covariance_DD: Tensor) -> Tensor:
    """(D, D): the symmetric root, which times itself is the covariance.

    By eigenvalues and not by Cholesky, which fails where fewer rows than channels or a dead
    channel leave the covariance singular; what rounding makes of those eigenvalues, of either sign,
    is taken as zero. Of all the roots the symmetric one is unique, whatever eigenvectors LAPACK
    chooses.
    """
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    rounding = len(values_D) * torch.finfo(values_D.dtype).eps * values_D.max()
    roots_D = values_D.where(values_D > rounding, 0).sqrt()
    return (vectors_DD * roots_D) @ vectors_DD.T
