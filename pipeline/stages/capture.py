"""Run the dense model once and keep every FFN's input and output.

Reads:  the dense model, stages/tokens
Writes: stages/capture/layer_K.zarr and stages/capture/ffn_K.safetensors for each of model.layers
Cost:   one forward pass over the tokens; `tokens x layers x 2 x d_model x 2` bytes / 1.45 on disk,
        half of that with capture.store=input; `python -m pipeline plan` says how much
Run:    python -m pipeline.stages.capture [key=value ...]
        python -m pipeline.stages.capture capture.codec=fast capture.batch_size=4
"""

from pathlib import Path

from pipeline import artifacts, command, lineage, progress, runtime, workdir
from pipeline.config import CAPTURED_SPLITS, SPLITS, Config, Dtype, select
from pipeline.locks import Part
from pipeline.stages import CAPTURE, DENSE, TOKENS

PARAMS = (
    "capture.dtype",
    "capture.store",
    "capture.codec",
    "capture.shard_mb",
    "capture.chunk_mb",
    "capture.batch_size",
    "capture.heldout_tokens",
    "model.id",
    "model.dtype",
    "model.device_map",
    "model.trust_remote_code",
    "model.layers",
)


def run(cfg: Config, part: Part | None = None, published: bool = True) -> Path:
    """The stage, or a part of it into the work folder alone; returns where the result lies."""
    assert part is None or not published, "a part is no result"
    inputs = {"dense": artifacts.digest(DENSE), "tokens": artifacts.digest(TOKENS)}
    lineage.check(cfg, [DENSE, TOKENS])
    lineage.check_inputs(inputs, {"tokens": TOKENS})

    layers, url = cfg.model.layers, cfg.capture.store_url

    def compute(folder: Path) -> None:
        from pipeline import capture

        if not capture.is_written(folder, layers, part, url):
            _capture(cfg, folder, inputs, part)
            return
        print("every shard is there: no model is loaded", flush=True)
        if part is None:
            capture.check_stores(folder, layers, url)

    def is_whole(folder: Path) -> bool:
        from pipeline import capture

        if not capture.is_written(folder, layers, store_url=url):
            return False
        capture.check_stores(folder, layers, url)
        return True

    def check_objects(folder: Path) -> None:
        from pipeline import store

        store.verify_apart(folder, url)

    module, settings = "pipeline.stages.capture", select(cfg, PARAMS)
    made_of = inputs | ({} if url is None else {"shards": "apart"})  # wherever: no address
    wait_s = cfg.runtime.lock_wait_s
    if part is None:
        return workdir.produce(
            CAPTURE,
            module=module,
            settings=settings,
            inputs=made_of,
            compute=compute,
            lock_wait_s=wait_s,
            published=published,
            mends=True,
            elsewhere=None if url is None else check_objects,
        )
    return workdir.produce_part(
        CAPTURE,
        part,
        module=module,
        settings=settings,
        inputs=made_of,
        compute=compute,
        is_whole=is_whole,
        lock_wait_s=wait_s,
    )


def _capture(cfg: Config, folder: Path, inputs: dict[str, str], part: Part | None) -> None:
    from pipeline import capture, corpus, dense

    model = dense.load_recorded(cfg.model, DENSE, runtime.pick_device(cfg.runtime))
    rows = int(model.get_input_embeddings().num_embeddings)  # pyright: ignore
    for split in SPLITS:  # `shifted` too: `evaluate` would find out only after the training
        corpus.check_token_ids(corpus.read_blocks(TOKENS, split), rows)
    blocks = {split: corpus.read_blocks(TOKENS, split) for split in CAPTURED_SPLITS}
    kept = max(1, cfg.capture.heldout_tokens // blocks["heldout"].shape[1])
    blocks["heldout"] = blocks["heldout"][:kept]
    dtype = capture.stored_dtype(cfg.capture.dtype, model.dtype)
    auto = f"auto, of a model in {str(model.dtype).removeprefix('torch.')}"
    reason = auto if cfg.capture.dtype is Dtype.auto else "configured"
    runtime.tell("stored dtype", str(dtype).removeprefix("torch."), reason)
    with progress.shown("capture", "tokens") as report:
        capture.capture_activations(
            model,
            blocks,
            folder,
            layers=cfg.model.layers,
            cfg=cfg.capture,
            dtype=dtype,
            attributes=inputs,
            part=part,
            store_url=cfg.capture.store_url,
            progress=report,
        )


if __name__ == "__main__":
    command.stage(run, __doc__)
