"""Run the dense model once and keep every FFN's input and output.

Reads:  the dense model, stages/tokens
Writes: stages/capture/layer_K.zarr and stages/capture/ffn_K.safetensors for each of model.layers
Cost:   one forward pass over the tokens; `tokens x layers x 2 x d_model x 2` bytes / 1.45 on disk,
        half of that with capture.store=input; `python -m pipeline plan` says how much
Run:    python -m pipeline.stages.capture [key=value ...]
        python -m pipeline.stages.capture capture.codec=fast capture.batch_size=4
"""

from pathlib import Path

from pipeline import command, lineage, progress, runtime, workdir
from pipeline.config import CAPTURED_SPLITS, SPLITS, Config, Dtype, select
from pipeline.stages import CAPTURE, DENSE, TOKENS

PARAMS = (
    "capture",
    "model.id",
    "model.dtype",
    "model.device_map",
    "model.trust_remote_code",
    "model.layers",
)


def run(cfg: Config) -> None:
    inputs = {"dense": workdir.digest(DENSE), "tokens": workdir.digest(TOKENS)}
    lineage.check(cfg, [DENSE, TOKENS])
    lineage.check_inputs(inputs, {"tokens": TOKENS})

    def compute(folder: Path) -> None:
        from pipeline import capture, corpus, dense, record

        source, revision = record.source(cfg.model, DENSE)
        model = dense.load_model(
            source,
            revision=revision,
            dtype=cfg.model.dtype.name,
            device=runtime.pick_device(cfg.runtime),
            device_map=cfg.model.device_map,
            trust_remote_code=cfg.model.trust_remote_code,
        )
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
                progress=report,
            )

    workdir.produce(
        CAPTURE,
        module="pipeline.stages.capture",
        settings=select(cfg, PARAMS),
        inputs=inputs,
        compute=compute,
        lock_wait_s=cfg.runtime.lock_wait_s,
    )


if __name__ == "__main__":
    command.stage(run, __doc__)
