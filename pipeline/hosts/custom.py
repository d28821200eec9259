"""Our own host: the modelling file in `pipeline/modeling/`, which is saved with the checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.hosts.interface import NOT_KEPT, Host, Record, Shapes, Tensors
from pipeline.shape import MoEShape


@dataclass(frozen=True, kw_only=True)
class Custom(Host):
    """Whatever transformers builds, with a sparse FFN at each path that its configuration names."""

    @property
    def model_type(self) -> str:
        return "sparse_distilled"

    def refusal(self, record: Record, shapes: Shapes) -> str | None:
        if record["config"].get("auto_map"):
            return "transformers builds the dense part of it, and this model has code of its own"
        if record["config"].get("is_encoder_decoder") or record.get("vocab_size", 0) is None:
            return "it holds language models and text encoders"
        if not record.get("causal", True) and (heads := _heads(record["config"])):
            return (
                f"the head of {' and '.join(heads)} would be left out; to convert the model below "
                "it, save that alone, with AutoModel"
            )
        return None

    def stored(self, shapes: Shapes) -> dict[int, MoEShape]:
        return dict(shapes)

    def config(self, record: Record, shapes: Shapes) -> dict[str, Any]:
        return _own_config(record, shapes)

    def pieces(self, record: Record, name: str) -> dict[str, tuple[int, int] | None]:
        return {f"dense.{name}": None}

    def layer(self, record: Record, layer: int, tensors: Tensors) -> Tensors:
        path = next(ffn["path"] for ffn in record["layers"] if ffn["index"] == layer)
        return {f"dense.{path}.{name}": tensor for name, tensor in tensors.items()}


def _heads(config: Mapping[str, Any]) -> list[str]:
    """Of the architectures that the configuration names: those with a head that AutoModel drops.

    That of an encoder's pretraining is no loss.
    """
    named = [name for name in config.get("architectures") or () if "For" in name]
    return [name for name in named if not name.endswith(("ForMaskedLM", "ForPreTraining"))]


def _own_config(record: Record, shapes: Shapes) -> dict[str, Any]:
    ffns = {ffn["index"]: ffn for ffn in record["layers"]}
    gone = NOT_KEPT - {"architectures"}  # some model types have several
    kept = {k: v for k, v in record["config"].items() if k not in gone}
    return {
        "dense_config": {**kept, "model_type": record["family"]},
        "sparse_layers": {
            ffns[k]["path"]: asdict(shape) | {n: ffns[k][n] for n in ("bypassed",) if n in ffns[k]}
            for k, shape in shapes.items()
        },
    }


CUSTOM = Custom(name="custom", remote_code=True, float32=("router.",))
