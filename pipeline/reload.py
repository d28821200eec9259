"""What a checkpoint computes, run as a script of its own: it imports nothing of this package.

python -I reload.py <checkpoint> <token ids as JSON> <new tokens> <output.safetensors>
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel


@torch.inference_mode()
def compute(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> dict[str, torch.Tensor]:
    """`logits` (sequences, tokens, vocab_size) and `generated` ids, greedy, on the CPU."""
    ids = ids.to(model.device)
    mask = torch.ones_like(ids)
    greedy = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    generated = model.generate(ids, attention_mask=mask, **greedy)  # type: ignore[operator]
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    return {"logits": logits.cpu(), "generated": generated[:, ids.shape[1] :].cpu().contiguous()}


def main(checkpoint: str, ids: str, new_tokens: str, output: str) -> None:
    recorded = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        trust_remote_code=recorded["model_type"] == "sparse_distilled",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the info too, and refused below by name
    )
    model, info = loaded  # type: ignore[misc]
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        sys.exit(f"tensors: {wrong}")
    save_file(compute(model.eval(), torch.tensor(json.loads(ids)), int(new_tokens)), output)


if __name__ == "__main__":
    main(*sys.argv[1:])
