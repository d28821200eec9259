"""What may be loaded from a model's folder or the hub, and its tokenizer.

Apart from `pipeline/dense.py` because a tokenizer needs none of transformers' models, whose import
takes seconds. That of a converted model of our own type wants `modeling.register()` first, which
`dense` calls, or transformers does not know the type.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from pipeline import preflight
from pipeline.errors import ConfigError, InputError, PipelineError

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"


def load_tokenizer(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; `InputError` when there is none."""
    check_source(source, revision, trust_remote_code)
    with explained(
        source,
        what="The dense model's tokenizer",
        remedy="put its files (tokenizer.json, tokenizer_config.json) beside the model; "
        "HF_HUB_OFFLINE=1 finds only what is cached",
    ):
        return AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )


def check_source(source: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse what may not be loaded.

    Raises:
        ConfigError: remote code without a pinned revision.
        InputError: an adapter, or weights that lie outside the model's folder.
    """
    if trust_remote_code and revision is None and not Path(source).is_dir():
        raise ConfigError(
            "Remote code is asked for without saying which.",
            value=f"{source}, revision null",
            rule="code of the hub runs only from a pinned commit",
            remedy="set model.revision to a commit, or model.trust_remote_code=false",
        )
    folder, local = Path(source), Path(source).is_dir()
    if local and (folder / ADAPTER).exists():
        raise InputError(
            "The model is an adapter of another one.",
            value=(folder / ADAPTER).absolute(),
            rule="a whole model: what an adapter names would be loaded in its place",
            remedy="merge the adapter into its model and save that",
        )
    names = {p.name for p in folder.glob("*.safetensors")} if local else set()
    index = folder / INDEX if local else _of_the_hub(source, INDEX, revision)
    if index is not None and index.is_file():
        names |= _indexed(index)
    for name in sorted(names):
        outside = local and not _is_inside(folder / name, folder)
        if Path(name).name != name or outside:
            raise InputError(
                "The model's weights lie outside its folder.",
                value=f"{name} -> {(folder / name).resolve()}",
                rule="weight files are plain names of files in the model's folder",
                remedy="copy the file into the folder, or do not use this model",
            )


def _of_the_hub(source: str, name: str, revision: str | None) -> Path | None:
    """A small file of a hub model, fetched where it is not cached; None where it has none."""
    quiet = {
        f"_raise_exceptions_for_{what}": False
        for what in ("gated_repo", "missing_entries", "connection_errors")
    }
    try:
        found = cached_file(source, name, revision=revision, **quiet)
    except (OSError, ValueError):  # what is wrong is told when the model is asked for
        return None
    return Path(found) if found else None


def _indexed(index: Path) -> set[str]:
    """The weight files that an index names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        names, why = {None}, f"{type(error).__name__}: {error}"
    else:
        why = "a file's name is no text"
    if not all(isinstance(name, str) for name in names):
        raise InputError(
            "The index of the model's weights cannot be read.",
            value=f"{index.absolute()}: {why}",
            rule='{"weight_map": {<tensor>: <file>}} in JSON',
            remedy="fetch the model again",
        )
    return names  # pyright: ignore[reportReturnType]


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file is in the folder, or, of a folder of the hub's cache, among its blobs."""
    real, own = path.resolve(), folder.resolve()
    cached = own.parent.name == "snapshots" and own.parent.parent / "blobs" == real.parent
    return real.parent == own or cached


@contextlib.contextmanager
def explained(
    source: str,
    what: str = "The dense model",
    remedy: str = "check the name; a gated model needs `hf auth login` or HF_TOKEN; "
    "HF_HUB_OFFLINE=1 finds only what is cached",
) -> Iterator[None]:
    """transformers' many ways to fail on a missing, gated or malformed model, as one `InputError`.

    Whatever it raises: a configuration that is not what its class expects ends in any exception.
    """
    try:
        yield
    except (PipelineError, MemoryError):
        raise
    except Exception as error:
        if preflight.refusal(error, "") is not None:  # the machine's fault and not the model's
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise InputError(
            f"{what} cannot be loaded.",
            value=f"{source}: {type(error).__name__}: {first.strip()[:300]}",
            rule="a hub id, or a folder with config.json, safetensors and a tokenizer",
            remedy=remedy,
        ) from None
