"""Hooks that give each layer's FFN input and output while a model runs."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


@contextmanager
def record_ffn(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Hook `modules` (layer -> its FFN); yields layer -> (ffn_input, ffn_output).

    Both are (tokens, d_model), detached, on the model's device, in the order of the batch's tokens,
    and replaced at each forward pass. The hooks are gone when the context ends, however it ends.
    """
    recorded: dict[int, tuple[Tensor, Tensor]] = {}

    def hook(layer: int):
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, y = inputs[0].detach(), output.detach()
            recorded[layer] = (x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))

        return keep

    with ExitStack() as stack:
        for layer, module in modules.items():
            handle = module.register_forward_hook(hook(layer))
            stack.callback(handle.remove)
        yield recorded
