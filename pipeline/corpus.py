"""Documents to splits that share no text, and to packed token blocks.

On CPython 3.11 the embedded text gives 1.57 MB to train, 0.10 MB to validation and 0.13 MB to
heldout, of whose tokens 0.1 % lie in runs of 16 that train also has (7 % without `_novel`).
"""

import math
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import preflight
from pipeline.artifacts import how_to_redo
from pipeline.config import SPLITS, DataConfig, DataSource
from pipeline.documents import Document, digest, read_documents, shifted_documents
from pipeline.durable import write_json
from pipeline.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARES = {"train": 0.8, "validation": 0.1, "heldout": 0.1}
UNIT = re.compile(r"\w+|[^\w\s]")
RUN = 8  # units: a word or a punctuation mark each; shorter than any run of 16 tokens we saw
SHARED = 0.05  # of a document's runs; 0 would cost a quarter of heldout for 0.1 % of its tokens
CHARACTERS_PER_TOKEN = 6  # English has 4 to 5; the rest is for what deduplication takes
RECORD = "tokens.json"


def write_blocks(cfg: DataConfig, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write `<split>.safetensors` for every split, and `tokens.json` with their sizes.

    `documents` there is how many were read of the source, before any was left out.

    Raises:
        InputError: the data cannot be read, or a split holds less than one block.
    """
    documents, chosen = read_splits(cfg)
    splits: dict[str, Iterable[Document]] = {**chosen, "shifted": shifted_documents(cfg)}
    record = {}
    for name in SPLITS:
        budget = getattr(cfg.tokens, name)
        blocks = pack(tokenizer, splits[name], cfg.sequence_length, budget, name)
        save_file({"tokens": torch.from_numpy(blocks)}, folder / f"{name}.safetensors")
        text = tokenizer.decode(blocks.reshape(-1).tolist(), skip_special_tokens=True)
        assert isinstance(text, str)
        record[name] = {
            "blocks": len(blocks),
            "tokens": blocks.size,
            "bytes": len(text.encode()),
            "budget": budget,
        }
    sizes = {"sequence_length": cfg.sequence_length, "documents": documents}
    write_json(folder / RECORD, {**sizes, "splits": record})


def read_blocks(folder: Path, split: str) -> torch.Tensor:
    """(blocks, sequence_length) token ids, int64, of one split.

    Raises:
        ArtifactError: the file is missing, damaged or another's.
    """
    path = folder / f"{split}.safetensors"
    try:
        return load_file(path)["tokens"].long()
    except (OSError, SafetensorError, KeyError) as error:
        preflight.let_through(error)
        raise ArtifactError(
            "The tokens of a split cannot be read.",
            value=f"{path.absolute()}: {error}",
            rule="a safetensors file, as `tokens` wrote it",
            remedy=how_to_redo(path),
        ) from None


def check_token_ids(blocks: torch.Tensor, embedding_rows: int) -> None:
    """Raise `InputError` when a token has no row in the model's embedding."""
    largest = int(blocks.max())
    if largest >= embedding_rows:
        raise InputError(
            "The tokenizer and the model do not belong together.",
            value=f"token id {largest}, {embedding_rows} embedding rows",
            rule="every token id is below the number of embedding rows",
            remedy="use the tokenizer that was trained with the model",
        )


def _limited(documents: Iterable[Document], tokens: float | None) -> Iterator[Document]:
    """The first documents that should hold so many tokens, so that a stream ends."""
    left = math.inf if tokens is None else tokens * CHARACTERS_PER_TOKEN
    for document in documents:
        yield document
        left -= len(document.text)
        if left <= 0:
            return


# Splits


def read_splits(cfg: DataConfig) -> tuple[int, dict[str, list[Document]]]:
    """How many documents were read, and the splits of those; `data.max_samples` bounds them.

    The embedded text is split as a whole and cut then, so that the dense model, which was trained
    on its whole `train`, has seen none of what is `heldout` here: 5 to 12 % of a cut text's
    `heldout` would quote what was cut off.
    """
    documents = read_documents(cfg)
    if cfg.source is not DataSource.embedded:
        tokens = max(getattr(cfg.tokens, name) / share for name, share in SHARES.items())
        read = list(islice(_limited(documents, tokens), cfg.max_samples))
        return len(read), split(read)
    whole = list(documents)
    read = whole[: cfg.max_samples]
    kept = set(read)
    cut = {name: [d for d in part if d in kept] for name, part in split(whole).items()}
    return len(read), cut


def split(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Deduplicated documents of `train`, `validation` and `heldout`.

    Each goes where a hash of its source sends it. Texts that differ only in case and white space
    are kept once. A document of `validation` or `heldout` is dropped when more than `SHARED` of
    its runs of `RUN` units stand in a split before it, since files quote each other.

    Within a split sources are in order of their hash: the first N tokens are a fair sample.
    """
    splits: dict[str, list[Document]] = {name: [] for name in SHARES}
    seen = set()
    for document in sorted(documents, key=lambda d: digest(d.source)):
        normal = digest(" ".join(_units(document.text)))
        if document.text and normal not in seen:
            seen.add(normal)
            splits[_assign(document.source)].append(document)
    known = np.empty(0, dtype=np.uint64)
    for name, candidates in splits.items():
        runs = [_runs(document.text) for document in candidates]
        if name != "train":
            new = [_novel(own, known) for own in runs]
            splits[name] = [d for d, keep in zip(candidates, new, strict=True) if keep]
            runs = [own for own, keep in zip(runs, new, strict=True) if keep]
        known = np.unique(np.concatenate([known, *runs]))
    return splits


def _assign(source: str) -> str:
    position = int.from_bytes(digest(source)[:8]) / 2**64
    for name, share in SHARES.items():
        position -= share
        if position < 0:
            return name
    return "heldout"


def _units(text: str) -> list[str]:
    return UNIT.findall(text.lower())


def _runs(text: str) -> np.ndarray:
    """Hashes of every run of `RUN` units; of all of a shorter text."""
    units = np.array([zlib.crc32(unit.encode()) for unit in _units(text)], dtype=np.uint64)
    n = max(1, len(units) - RUN + 1)
    hashes = np.zeros(n, dtype=np.uint64)
    for offset in range(min(RUN, len(units))):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + units[offset : offset + n]
    return np.unique(hashes)


def _novel(runs: np.ndarray, known: np.ndarray) -> bool:
    at = np.searchsorted(known, runs).clip(max=max(0, len(known) - 1))
    return not len(known) or float(np.mean(known[at] == runs)) <= SHARED


# Blocks


def pack(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[Document],
    sequence_length: int,
    max_tokens: int | None = None,
    name: str = "text",
) -> np.ndarray:
    """(blocks, sequence_length) int32: the documents end to end, each followed by the eos token.

    The bos token stands in where there is no eos. A tokenizer that frames its texts, as an
    encoder's does, frames each block: the cls token, text, the sep token. What does not fill the
    last block is left out; `documents` is read no further than `max_tokens` need.

    Raises:
        InputError: there is less than one block.
    """
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = tokenizer("a")["input_ids"]  # a causal model's may know both, and put neither
    frame = 2 if None not in (cls, sep) and (ids[0], ids[-1]) == (cls, sep) else 0
    ends = [i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None]
    separator = [] if frame else ends[:1]
    stream: list[int] = []
    remaining = iter(documents)
    body = sequence_length - frame
    while max_tokens is None or len(stream) < max_tokens:
        missing = None if max_tokens is None else max_tokens - len(stream)
        texts = [document.text for document in islice(_limited(remaining, missing), 256)]
        if not texts:
            break
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*ids, *separator]
    n_blocks = len(stream) // body
    if max_tokens is not None:
        n_blocks = min(n_blocks, max_tokens // sequence_length)
    if not n_blocks:
        raise InputError(
            f"There is too little text for one block of {name}.",
            value=f"{len(stream)} tokens, data.tokens budget {max_tokens}",
            rule=f"at least data.sequence_length={sequence_length} tokens in every split",
            remedy="give more text (data.max_samples) or a larger budget, or lower "
            "data.sequence_length",
        )
    blocks = np.array(stream[: n_blocks * body], dtype=np.int32).reshape(n_blocks, body)
    if not frame:
        return blocks
    first, last = (np.full((n_blocks, 1), i, dtype=np.int32) for i in (cls, sep))
    return np.concatenate([first, blocks, last], axis=1)
