"""Layers that depend on each other, with `train.window`: fitted one window after the other.

Nothing is published; `dvc repro` adopts what it finds. See `windows.py`.
"""

import contextlib
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pipeline import artifacts, lineage, progress, runtime, workdir
from pipeline.config import Config, select
from pipeline.stages import CAPTURE, DENSE, TOKENS, budget, train


def fit_windows(cfg: Config) -> None:
    """Fit every layer, each window behind the ones before it."""
    assert cfg.train.window is not None
    lineage.check(cfg, (DENSE, TOKENS, CAPTURE))
    runtime.configure(cfg.runtime)
    plans, layers = budget.run(cfg, published=False), sorted(cfg.model.layers)
    done: dict[int, Path] = {}
    # What the rows depend on, and who else may read them: a rerun goes on from its shards.
    made_of = {"capture": artifacts.file_digest(CAPTURE / artifacts.MANIFEST)}
    made_of |= {f"shape_{k}": artifacts.file_digest(plans / f"layer_{k}.json") for k in layers}
    made_of |= {"settings": select(cfg, (*train.PARAMS, "model"))}
    rows = workdir.scratch_root() / "windows" / artifacts.json_digest(made_of)[:16]
    for first in range(0, len(layers), cfg.train.window):
        window, earlier = layers[first : first + cfg.train.window], dict(done)
        for k in window:
            behind = partial(_capture_behind, cfg, earlier, window, k, rows)
            done[k] = train.run(cfg, k, plans, published=False, behind=behind)
            print(f"layer {k}: complete in {done[k]}", flush=True)
    shutil.rmtree(rows, ignore_errors=True)
    with contextlib.suppress(OSError):  # others' rows lie there
        rows.parent.rmdir()


def _capture_behind(
    cfg: Config,
    earlier: Mapping[int, Path],
    window: list[int],
    layer: int,
    rows: Path,
    static: bool,
) -> tuple[Path, dict[str, str]]:
    """The store of `layer`, below `rows`, behind the earlier layers or their static controls."""
    from pipeline import capture, corpus, dense, windows
    from pipeline.controls import STATIC
    from pipeline.layers import load_layer
    from pipeline.record import WEIGHTS

    folders = dict(earlier)
    if static:  # a layer that runs as much as its dense FFN has no control, and stands for itself
        folders |= {k: path / STATIC for k, path in earlier.items() if (path / STATIC).is_dir()}
    digests = {str(k): artifacts.file_digest(path / WEIGHTS) for k, path in folders.items()}
    model = dense.load_recorded(cfg.model, DENSE, runtime.pick_device(cfg.runtime))
    folder = rows / f"layer_{window[0]}-{artifacts.json_digest(digests)[:16]}"
    blocks = {split: corpus.read_blocks(TOKENS, split) for split in ("train", "validation")}
    sparse = {k: load_layer(path)[0] for k, path in folders.items()}
    with progress.shown(f"capture layers {window}", "tokens") as report:
        capture.capture_activations(
            model,
            blocks,
            folder,
            cfg=cfg.capture,
            layers=window,
            dtype=capture.stored_dtype(cfg.capture.dtype, model.dtype),
            attributes=digests,
            forward=windows.forward_behind(model, sparse, blocks["train"][:1]),
            progress=report,
        )
    return folder / f"layer_{layer}.zarr", digests
