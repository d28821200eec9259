"""What a checkpoint computes, run as a script of its own: it imports nothing of this package.

It imports transformers, and then waits for its job, one JSON object on standard input:

{"checkpoint": ..., "ids": [[...]], "new_tokens": ..., "output": ...}    computes, to safetensors
{"checkpoint": ...}    opens it by the headers of its files: of the weights nothing is read
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel


@torch.inference_mode()
def compute(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> dict[str, torch.Tensor]:
    """`logits` (sequences, tokens, vocab_size) and `generated` ids, greedy, on the CPU.

    Of an encoder `logits` are the last hidden state, and nothing is generated.
    """
    ids = ids.to(model.device)
    mask = torch.ones_like(ids)
    model(input_ids=ids[:1, :1])  # first calls of MKL, too small for two threads (`settle_kernels`)
    if not model.can_generate():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return {"logits": hidden.float().cpu(), "generated": ids[:, :0].cpu().contiguous()}
    greedy = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    generated = model.generate(ids, attention_mask=mask, **greedy)  # type: ignore[operator]
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    return {"logits": logits.cpu(), "generated": generated[:, ids.shape[1] :].cpu().contiguous()}


def opened(checkpoint: Path, **how: Any) -> PreTrainedModel:
    """The model; ends the process where a tensor is missing, left over or of another shape.

    Args:
        how: `dtype`, or `device_map="meta"` for a model that holds no weights.
    """
    recorded = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    encoder = recorded["architectures"] == ["SparseDistilledModel"]
    auto: Any = AutoModel if encoder else AutoModelForCausalLM
    own = {"trust_remote_code": recorded["model_type"] == "sparse_distilled"}
    how |= {"output_loading_info": True}
    how |= {"ignore_mismatched_sizes": True}  # they are in the info too, and refused below by name
    if how.get("device_map") == "meta":
        config = AutoConfig.from_pretrained(checkpoint, **own)
        with torch.device("meta"):
            model_class = type(auto.from_config(config, **own))
        found = described(checkpoint)
        model, info = model_class.from_pretrained(None, config=config, state_dict=found, **how)
    else:
        model, info = auto.from_pretrained(checkpoint, **own, **how)
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        sys.exit(f"tensors: {wrong}")
    return model.eval()


def described(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors that its files hold, on the meta device, as their headers have them."""
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        names = {"model.safetensors"}
    found = {}
    for name in sorted(names):
        with safe_open(checkpoint / name, framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118
                shape = file.get_slice(tensor).get_shape()
                found[tensor] = torch.empty(shape, device="meta")
    return found


def main() -> None:
    asked = sys.stdin.read()
    if not asked:  # whoever started it is gone
        return
    job = json.loads(asked)
    checkpoint = Path(job["checkpoint"])
    if "ids" not in job:
        opened(checkpoint, device_map="meta")
        return
    model = opened(checkpoint, dtype=torch.float32)
    save_file(compute(model, torch.tensor(job["ids"]), job["new_tokens"]), job["output"])


if __name__ == "__main__":
    main()
