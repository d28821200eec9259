"""The dense model and another one side by side: what both make of the same text.

Shapes: T tokens, V vocab_size.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import finite
from pipeline.assembly import set_norms
from pipeline.discovery import find_ffns, input_device
from pipeline.embeddings import EmbeddingMatch
from pipeline.progress import Progress, silent


@dataclass(frozen=True)
class TextLoss:
    """Both models on the same blocks."""

    perplexity: tuple[float, float]  # dense, sparse
    byte_perplexity: tuple[float, float]
    kl: Tensor  # (T,) KL(dense || sparse) of each predicted token, nats
    top1_agreement: float  # share of tokens for which both prefer the same one
    tokens: int  # of the blocks that were read


SIDES = ("dense", "other")

Texts = Mapping[str, TextLoss] | Mapping[str, EmbeddingMatch]
"""By the name of the text, how the dense and another model compare on it."""


@torch.inference_mode()
def compare_on_text(
    dense: nn.Module,
    sparse: nn.Module,
    blocks: Tensor,
    text_bytes: int,
    *,
    batch_size: int,
    max_batches: int | None = None,
    progress: Progress = silent,
    name: str = "the text",
) -> TextLoss:
    """Both models' next-token losses on (sequences, sequence_length) token ids.

    Args:
        text_bytes: UTF-8 bytes of the text in `blocks`; the share of the predicted tokens counts.
        batch_size: sequences per forward pass.
        max_batches: forward passes, from the first block on; null = all blocks.
        name: of the text, for a refusal.

    Raises:
        ArtifactError: a model gives logits that are no numbers, or a loss beyond any perplexity.
    """
    bytes_per_token = text_bytes / blocks.numel()
    if max_batches is not None:
        blocks = blocks[: max_batches * batch_size]
    loss = torch.zeros(2, dtype=torch.float64)
    agreed, done, kls = 0, 0, []
    for i, batch in enumerate(blocks.split(batch_size)):
        logits = [_logits(model, batch) for model in (dense, sparse)]
        for side, given in zip(SIDES, logits, strict=True):
            finite.check(given, f"The {side} model", f"logits of batch {i} of {name}")
        for tokens, *pair in zip(batch, *logits, strict=True):
            device = pair[0].device
            dense_TV, sparse_TV = (
                side[:-1].to(device, torch.float32).log_softmax(dim=-1) for side in pair
            )
            following = tokens[1:, None].to(device)
            for side, log_p in enumerate((dense_TV, sparse_TV)):
                loss[side] -= log_p.gather(1, following).double().sum().cpu()
            kls.append((dense_TV.exp() * (dense_TV - sparse_TV)).sum(dim=-1).cpu())
            agreed += int((dense_TV.argmax(-1) == sparse_TV.argmax(-1)).sum())
        done += batch.numel()
        progress(done, blocks.numel(), "")
    predicted = len(blocks) * (blocks.shape[1] - 1)
    for side, given in zip(SIDES, (loss / predicted).exp(), strict=True):
        finite.check(given[None], f"The {side} model", f"perplexity of {name}")
    d, s = (float(value) for value in (loss / predicted).exp())
    db, sb = (float(value) for value in (loss / (predicted * bytes_per_token)).exp())
    return TextLoss((d, s), (db, sb), torch.cat(kls), agreed / predicted, blocks.numel())


def replaced(
    model: PreTrainedModel,
    modules: Mapping[int, nn.Module],
    norms: Mapping[str, Tensor] | None = None,
) -> PreTrainedModel:
    """The model with other modules in its FFNs' places; its other weights are not copied.

    Each module is copied to the device and the dtype of the FFN that it replaces.

    Args:
        norms: healed ones, in the place of the model's own.

    Raises:
        ResourceError: `device_map` left the weights of such an FFN on no device.
    """
    healed = norms or {}
    kept = [p for name, p in model.named_parameters() if name not in healed]
    shared = {id(t): t for t in (*kept, *model.buffers())}
    copied = copy.deepcopy(model, shared)  # pyright: ignore[reportArgumentType]
    slots = find_ffns(copied)
    for k, module in modules.items():
        like = slots[k].weights().up_proj
        slots[k].replace(copy.deepcopy(module).to(like.device, like.dtype))
    set_norms(copied, healed)
    return copied


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch.to(input_device(model)), use_cache=False).logits


@torch.inference_mode()
def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int
) -> str:
    """The prompt and what the model says next, always its first choice.

    An empty prompt is the beginning of a document: the token that ends the one before it.
    """
    if not new_tokens:
        return prompt
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    input_ids = torch.tensor([ids], device=input_device(model))
    greedy = {"max_new_tokens": new_tokens, "do_sample": False}
    seen = torch.ones_like(input_ids)
    out = model.generate(input_ids=input_ids, attention_mask=seen, **greedy)  # type: ignore[operator]
    return str(tokenizer.decode(out[0], skip_special_tokens=True))
