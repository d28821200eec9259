"""To the hub: a checkpoint and its card, as one commit."""

import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from pipeline import artifacts, workdir
from pipeline.errors import ResourceError


def push(checkpoint: Path, card: Path, repository: str) -> None:
    """Upload the files of `checkpoint`, with `card` in the place of its README.md.

    A repository that is not there yet is made, private. The token is the one that huggingface_hub
    finds (`hf auth login` or HF_TOKEN); it is neither read nor written here.

    Raises:
        ArtifactError: the checkpoint is damaged.
        ResourceError: the hub cannot be reached, or refuses.
    """
    artifacts.verify(checkpoint)
    root = workdir.scratch_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="push-", dir=root) as staged:
        for path in sorted(p for p in checkpoint.iterdir() if p.name != card.name):
            _link(path, Path(staged, path.name))
        shutil.copyfile(card, Path(staged, card.name))
        try:
            api = HfApi()
            api.create_repo(repository, private=True, exist_ok=True)
            done = api.upload_folder(
                repo_id=repository,
                folder_path=staged,
                commit_message="Sparse checkpoint",
            )
        except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
            first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            raise ResourceError(
                "The checkpoint could not be pushed to the hub; it lies complete on this machine.",
                value=f"{repository}: {first.strip()[:300]}",
                rule="evaluate.push_to_hub needs a network and a token that may write there",
                remedy="run `hf auth login` or set HF_TOKEN, unset HF_HUB_OFFLINE, then run "
                "`python -m pipeline.stages.evaluate` again: only the push is repeated",
            ) from None
    print(f"pushed to {done.commit_url}", flush=True)


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)
