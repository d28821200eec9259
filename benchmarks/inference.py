"""The sparse model beside the dense one, both in stock transformers at the same precision.

Random weights: a Llama, and the Mixtrals that a conversion to four experts, one per token, makes
of it: experts of half the width (50 % active) and of a quarter (25 %). Prefill is one forward pass
over prompts; decode is greedy generation behind them, prefill left out.
"""

from collections.abc import Callable, Iterator

import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers import PreTrainedModel as Model

from benchmarks import measure
from benchmarks.measure import Row
from benchmarks.models import VOCAB, described, llama

PROMPT, NEW, LAYERS = 128, 8, 4
SIZES = {1024: (torch.float32, torch.bfloat16), 2048: (torch.bfloat16,)}  # d_model: dtypes
EMULATED = {1024: (torch.float32,), 1536: (torch.float32,)}  # where bf16 has no units
TINY = {64: (torch.float32,)}
BATCHES = (1, 16)
ACTIVE = {"50 %": 2, "25 %": 4}  # the dense width over an expert's


def rows(quick: bool) -> Iterator[Row]:
    sizes = SIZES if torch.bfloat16 in measure.precisions() else EMULATED
    for d_model, dtypes in (TINY if quick else sizes).items():
        for dtype in dtypes:
            models = {"dense": llama(d_model, LAYERS, dtype)}
            for active, parts in ACTIVE.items():
                models[active] = _sparse(d_model, 4 * d_model // parts).to(dtype).eval()
            for batch in BATCHES:
                yield from _rows(models, d_model, dtype, batch)


def _rows(models: dict[str, Model], d_model: int, dtype: torch.dtype, batch: int) -> Iterator[Row]:
    prompt = torch.randint(VOCAB, (batch, PROMPT))
    prefills = measure.turns({name: _prefill(m, prompt) for name, m in models.items()})
    decodes = measure.turns({name: _decode(m, prompt) for name, m in models.items()})
    precision = str(dtype).removeprefix("torch.")
    for active in ACTIVE:
        for name, seconds, work in (
            ("prefill", prefills, batch * PROMPT),
            ("decode", decodes, batch * NEW),
        ):
            asked = name == "prefill" and batch == 16 and active == "25 %" and d_model >= 1024
            yield measure.compare(
                f"{name}, {active} active, batch {batch}, {precision} / the dense model",
                seconds[active],
                seconds["dense"],
                size=f"{LAYERS} layers, d {d_model}, d_ff {4 * d_model}",
                unit="tokens/s",
                work=work,
                reach=">= 1.15" if asked else "",
            )


def _sparse(d_model: int, width: int) -> Model:
    torch.manual_seed(0)
    config = MixtralConfig(
        **described(d_model, LAYERS),
        intermediate_size=width,
        num_local_experts=4,
        num_experts_per_tok=1,
        sliding_window=None,
    )
    return MixtralForCausalLM(config)


def _prefill(model: Model, prompt: torch.Tensor) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        model(input_ids=prompt, use_cache=True, logits_to_keep=1)

    return run


def _decode(model: Model, prompt: torch.Tensor) -> Callable[[], None]:
    """Greedy steps behind a prompt that was read before."""
    with torch.inference_mode():
        read = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    first = read.logits[:, -1].argmax(-1, keepdim=True)
    cache = read.past_key_values

    @torch.inference_mode()
    def run() -> None:
        if cache.get_seq_length() > PROMPT:
            cache.crop(PROMPT - cache.get_seq_length())
        token = first
        for _ in range(NEW):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1].argmax(-1, keepdim=True)

    return run
