"""What is no number is told where it arises; an average would hide it, or carry it everywhere."""

from torch import Tensor

from pipeline.errors import ArtifactError


def check(tensor: Tensor, what: str, where: str) -> None:
    """Refuse NaN and infinity.

    Args:
        what: gives the tensor, as the message begins.
        where: in what text, store or file, and in which batch.

    Raises:
        ArtifactError: names the value and its place.
    """
    low, high = tensor.aminmax()
    if low.isfinite() and high.isfinite():
        return
    place = (~tensor.isfinite()).nonzero()[0].tolist()
    raise ArtifactError(
        f"{what} gives what is no number.",
        value=f"{tensor[tuple(place)].item()} at {place} of {tuple(tensor.shape)}, {where}",
        rule="what is judged is finite",
        remedy="`python -m pipeline verify` says whether a file is damaged; if none is, train with "
        "a lower train.learning_rate or heal.learning_rate",
    )
