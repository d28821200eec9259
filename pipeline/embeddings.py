"""How near a sparse encoder's sentence embeddings are to the dense one's, and to each other.

An encoder has no next token to judge. What it is used for is an embedding per text: the mean over
its tokens of the last hidden state, brought to length 1. Two figures: the cosine between the dense
and the sparse embedding of the same text; and whether a text's nearest neighbours among all the
others stay the same, which is what a search sees.

Shapes: N texts, S tokens of each, D d_model.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pipeline import finite
from pipeline.discovery import input_device
from pipeline.progress import Progress, silent

NEIGHBOURS = 10
"""Nearest texts that are compared beside the very nearest."""


class EmbeddingMatch(NamedTuple):
    """A dense and a sparse encoder on one text."""

    cosine_N: Tensor  # between their embeddings of each block
    neighbour_agreement: float  # share of blocks with the same nearest neighbour
    neighbour_overlap: float  # mean share of the `NEIGHBOURS` nearest that both have
    tokens: int


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether it gives hidden states and no text."""
    return not model.can_generate()


@torch.inference_mode()
def embed(model: nn.Module, blocks: Tensor, batch_size: int, progress: Progress = silent) -> Tensor:
    """(N, S) token ids -> (N, D) float32 on the CPU, each of length 1."""
    device, parts, done = input_device(model), [], 0
    for batch in blocks.split(batch_size):
        hidden_NSD = model(input_ids=batch.to(device)).last_hidden_state
        finite.check(hidden_NSD, "An encoder", f"hidden states of batch {len(parts)}")
        parts.append(F.normalize(hidden_NSD.float().mean(dim=1), dim=-1).cpu())
        done += batch.numel()
        progress(done, blocks.numel(), "")
    return torch.cat(parts)


def compare_embeddings(
    dense: nn.Module,
    sparse: nn.Module,
    blocks: Tensor,
    *,
    batch_size: int,
    max_batches: int | None = None,
    progress: Progress = silent,
) -> EmbeddingMatch:
    """Both encoders on (N, S) token ids; a block is one text.

    Args:
        max_batches: forward passes, from the first block on; null = all blocks.
    """
    if max_batches is not None:
        blocks = blocks[: max_batches * batch_size]
    one_ND, two_ND = (embed(model, blocks, batch_size, progress) for model in (dense, sparse))
    k = min(NEIGHBOURS, len(blocks) - 1)
    if k < 1:
        return EmbeddingMatch((one_ND * two_ND).sum(dim=1), 1.0, 1.0, blocks.numel())
    one_Nk, two_Nk = (_neighbours(side, k) for side in (one_ND, two_ND))
    shared_N = (one_Nk[:, :, None] == two_Nk[:, None, :]).any(dim=2).double().mean(dim=1)
    return EmbeddingMatch(
        cosine_N=(one_ND * two_ND).sum(dim=1),
        neighbour_agreement=float((one_Nk[:, 0] == two_Nk[:, 0]).double().mean()),
        neighbour_overlap=float(shared_N.mean()),
        tokens=blocks.numel(),
    )


def _neighbours(embedding_ND: Tensor, k: int) -> Tensor:
    """(N, k): the others of largest cosine, nearest first."""
    cosine_NN = embedding_ND @ embedding_ND.T
    cosine_NN.fill_diagonal_(-torch.inf)
    return cosine_NN.topk(k, dim=1).indices


def figures(texts: dict[str, EmbeddingMatch]) -> dict[str, dict[str, float]]:
    """`embedding_cosine`, its 5th percentile, and the neighbours', by the name of the text."""
    return {
        "embedding_cosine": {n: float(t.cosine_N.mean()) for n, t in texts.items()},
        "embedding_cosine_p5": {
            n: float(np.quantile(t.cosine_N.double(), 0.05)) for n, t in texts.items()
        },
        "neighbour_agreement": {n: t.neighbour_agreement for n, t in texts.items()},
        "neighbour_overlap": {n: t.neighbour_overlap for n, t in texts.items()},
    }
