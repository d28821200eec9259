"""The embedded default: a tokenizer and a Llama of a few million parameters, trained here.

Only the `train` documents are learned from, and `validation` decides when to stop, so the splits
that everything else is measured on stay unseen. The training is continued from its last checkpoint.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline import corpus, preflight, resume, shuffle
from pipeline.config import EmbeddedModelConfig
from pipeline.documents import Document
from pipeline.errors import ArtifactError
from pipeline.loggers import Log, no_log
from pipeline.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"


@dataclass
class Run:
    """Everything that a checkpoint restores."""

    model: "LlamaForCausalLM"
    optimizer: torch.optim.AdamW
    best: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf


def train(
    cfg: EmbeddedModelConfig,
    splits: Mapping[str, Iterable[Document]],
    folder: Path,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = silent,
    log: Log = no_log,
) -> None:
    """Write the model and its tokenizer to `folder`, as `save_pretrained` does.

    Args:
        splits: `train` and `validation` are read.
        dtype: of the matrix products; the weights are kept and saved in float32.
        log: gets loss, validation loss and learning rate at each validation.
    """
    folder.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(splits["train"], cfg.vocab_size)
    tokens, validation = (
        torch.from_numpy(corpus.pack(tokenizer, splits[name], cfg.sequence_length, name=name))
        for name in ("train", "validation")
    )
    torch.manual_seed(seed)
    model = build(cfg, tokenizer)
    model.to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True
    )
    run = Run(model, optimizer)
    learning = sum(p.numel() for p in model.parameters())
    lever = "a smaller model.embedded takes less in proportion"
    preflight.check_checkpoints("the dense model", folder, learning, lever)
    path = folder / resume.CHECKPOINT
    if path.is_file():
        _restore(run, path)
    batch_size = max(1, cfg.batch_tokens // cfg.sequence_length)
    patience = cfg.patience * cfg.evaluate_every
    while run.step < cfg.max_steps and run.step - run.best_step < patience:
        batch = _batch(tokens, batch_size, seed, run.step)
        loss = _step(run, batch.to(device), cfg, dtype)
        if run.step % cfg.evaluate_every == 0 or run.step == cfg.max_steps:
            row = {"loss": loss, "validation_loss": _validate(run, validation, batch_size, dtype)}
            log({"step": run.step, **row, "learning_rate": run.optimizer.param_groups[0]["lr"]})
        if run.step % cfg.checkpoint_every == 0:
            _save(run, path)
        progress(run.step, cfg.max_steps, f"loss {loss:.3f}, validation {run.best_loss:.3f}")
    if not run.best:
        raise ArtifactError(
            "The training of the embedded model diverged.",
            value=f"no validation loss was finite in {run.step} steps",
            rule="the validation loss falls from its start",
            remedy=f"lower model.embedded.learning_rate={cfg.learning_rate}",
        )
    progress(cfg.max_steps, cfg.max_steps, f"stopped at {run.step}, best {run.best_step}")
    model.load_state_dict(run.best)
    assert model.generation_config
    model.generation_config.pad_token_id = model.config.eos_token_id  # type: ignore
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path.unlink(missing_ok=True)


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer: it has an id for every text, and decodes to the same text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = (document.text for document in documents)
    bpe.train_from_iterator(texts, vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, pad_token=END
    )


def build(cfg: EmbeddedModelConfig, tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """The untrained model, with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    config = LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_ff,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        max_position_embeddings=max(2048, cfg.sequence_length),
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=None,  # it would have no embedding, and it begins every document
    )
    # At these sizes a training step's fused attention takes 4 times as long on a CPU.
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def _batch(tokens: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
    """The sequences of `step`: every epoch cuts the stream elsewhere and mixes the cuts anew."""
    stream, length = tokens.flatten(), tokens.shape[1]
    n = max(1, len(tokens) - 1)
    spare = stream.numel() - n * length  # one block; none where there is only one
    epoch, i = divmod(step * batch_size, n)
    offset = int(shuffle.permutation(max(1, spare), seed, epoch, "train", "offset")[0])
    order = shuffle.permutation(n, seed, epoch, "train", "sequences")[i : i + batch_size]
    return stream[offset : offset + n * length].view(n, length)[order].long()


def _loss(model: "LlamaForCausalLM", batch: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=batch, use_cache=False).logits
    following = F.pad(batch[:, 1:], (0, 1), value=-100)  # cutting the logits would copy them
    return F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())


def rate(step: int, cfg: EmbeddedModelConfig) -> float:
    """Share of the peak learning rate at `step`, counted from 0: a cosine to a tenth."""
    warm = min(1.0, (step + 1) / max(1, cfg.warmup_steps))
    return warm * (0.55 + 0.45 * math.cos(math.pi * step / cfg.max_steps))


def _step(run: Run, batch: Tensor, cfg: EmbeddedModelConfig, dtype: torch.dtype) -> float:
    for group in run.optimizer.param_groups:
        group["lr"] = cfg.learning_rate * rate(run.step, cfg)
    run.model.train()
    loss = _loss(run.model, batch, dtype)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.step += 1
    return float(loss.detach())


@torch.no_grad()
def _validate(run: Run, blocks: Tensor, batch_size: int, dtype: torch.dtype) -> float:
    run.model.eval()
    device = run.model.device
    total = sum(
        float(_loss(run.model, batch.long().to(device), dtype)) * len(batch)
        for batch in blocks.split(batch_size)
    )
    loss = total / len(blocks)
    if loss < run.best_loss:
        state = run.model.state_dict()
        run.best = {name: t.detach().cpu().clone() for name, t in state.items()}
        run.best_loss, run.best_step = loss, run.step
    return loss


def _save(run: Run, path: Path) -> None:
    kept = {"step": run.step, "best_step": run.best_step, "best_loss": run.best_loss}
    resume.save(path, {"model": run.model.state_dict(), "best": run.best}, run.optimizer, kept)


def _restore(run: Run, path: Path) -> None:
    states, kept = resume.restore(path, run.optimizer)
    run.model.load_state_dict(states["model"])
    run.best = states.get("best", {})
    run.step, run.best_step, run.best_loss = kept["step"], kept["best_step"], kept["best_loss"]
