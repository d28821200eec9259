"""The sizes of one sparse layer, the rules they obey, and what follows from them.

Imports neither torch nor transformers: the configuration is checked and a run is planned from
these numbers alone. Active figures are per token.
"""

from dataclasses import dataclass

from pipeline.errors import ConfigError

MIN_WIDTH = 8
"""Smallest `moe.d_ff_expert` written as neurons, so that no integer can be meant as a fraction."""


WIDTH_STEP = 8
"""Dynamic experts grow and shrink by whole multiples of this, so that bf16 kernels take them."""


@dataclass(frozen=True)
class MoEShape:
    """One SparseMoE and the dense FFN that it takes the place of; JSON by `dataclasses.asdict`."""

    d_model: int
    d_ff: int  # neurons of the dense FFN
    d_ff_expert: int  # neurons of each expert
    n_experts: int
    top_k: int  # experts run per token
    activation: str  # a name in ffn.ACTIVATIONS
    gated: bool  # act(gate_proj x) * up_proj x, not act(up_proj x)
    bias: bool  # the dense FFN has a bias on any projection; every expert projection then has one
    router_function: str  # a name in router.ROUTER_FUNCTIONS
    routing: str = "token_choice"  # or expert_choice
    capacity_factor: float | None = None  # expert choice: experts per token, on average
    router_width: int = 0  # units of an MLP router's hidden layer; 0 = a linear router
    balance_bias: bool = False  # the router has a bias that selects and never weighs
    expert_widths: tuple[int, ...] | None = None  # where they differ; d_ff_expert is the widest
    d_ff_shared: int = 0  # neurons of the shared expert, which every token runs

    def __post_init__(self) -> None:
        if self.expert_widths is not None:  # JSON gives a list
            object.__setattr__(self, "expert_widths", tuple(self.expert_widths))

    @property
    def widths(self) -> tuple[int, ...]:
        """True neurons of each expert."""
        return self.expert_widths or (self.d_ff_expert,) * self.n_experts

    @property
    def experts_per_token(self) -> float:
        """On average, where the experts choose."""
        return self.top_k if self.capacity_factor is None else self.capacity_factor

    @property
    def d_ff_routed(self) -> int:
        """Dense neurons that are left for the experts that are chosen."""
        return self.d_ff - self.d_ff_shared

    @property
    def groups(self) -> int:
        """Groups of those neurons that the experts hold; 1 = each holds them all."""
        return max(1, self.d_ff_routed // self.d_ff_expert)

    @property
    def replicas(self) -> int:
        """Experts that start from one group."""
        return self.n_experts // self.groups

    @property
    def n_specialists(self) -> int:
        """Experts with tokens of their own, or teams of them, always chosen together."""
        return self.n_experts // (self.top_k if self.capacity_factor is None else 1)

    @property
    def d_ff_specialist(self) -> int:
        """Neurons of all the experts of one team."""
        return self.n_experts // self.n_specialists * self.d_ff_expert

    @property
    def weighs(self) -> bool:
        """Whether the output depends on the router's logits beyond who is chosen.

        The share of a single expert in itself is 1.
        """
        alone = self.top_k == 1 and self.routing == "token_choice"
        return not alone or self.router_function == "softmax"

    @property
    def expert_parameters(self) -> float:
        """Of one expert; their mean where widths differ."""
        return sum(map(self._ffn_parameters, self.widths)) / self.n_experts

    @property
    def shared_parameters(self) -> int:
        """Of the shared expert, whose output bias stands in the others."""
        output_bias = self.d_model if self.bias else 0
        return self._ffn_parameters(self.d_ff_shared) - output_bias

    @property
    def router_parameters(self) -> int:
        linear = self.n_experts * self.d_model
        hidden = self.router_width * (self.d_model + self.n_experts)
        return linear + hidden + self.balance_bias * self.n_experts

    @property
    def dense_parameters(self) -> int:
        """Of the dense FFN, counting a bias on every projection where it has any."""
        return self._ffn_parameters(self.d_ff)

    @property
    def total_parameters(self) -> int:
        experts = sum(map(self._ffn_parameters, self.widths))
        return experts + self.shared_parameters + self.router_parameters

    @property
    def active_parameters(self) -> int:
        """Per token; with the experts' mean where widths or the number of experts vary."""
        chosen = round(self.experts_per_token * self.expert_parameters)
        return chosen + self.shared_parameters + self.router_parameters

    @property
    def active_ffn_fraction(self) -> float:
        """Neurons run per token over the dense FFN's, the router left out; at an even load."""
        chosen = self.experts_per_token * sum(self.widths) / self.n_experts
        return (self.d_ff_shared + chosen) / self.d_ff

    @property
    def active_flops_fraction(self) -> float:
        """FLOPs of the matrix products run per token over the dense FFN's, the router included."""
        projections = 3 if self.gated else 2
        router = self.n_experts + self.router_width * (1 + self.n_experts / self.d_model)
        return self.active_ffn_fraction + router / (projections * self.d_ff)

    def _ffn_parameters(self, width: int) -> int:
        inner = 2 if self.gated else 1
        biases = inner * width + self.d_model if self.bias else 0
        return (inner + 1) * width * self.d_model + biases


def resolve_shared_expert(value: int | float, d_ff: int) -> int:
    """Neurons of the shared expert for the setting `moe.shared_expert`.

    0 is none, a float in (0, 1) that fraction of the dense width, an integer of at least 8 that
    many neurons. Raises `ConfigError` on anything else, and on a fraction of no whole width.
    """
    if value == 0:
        return 0
    exact = value * d_ff if isinstance(value, float) else value
    width = round(exact)
    if abs(exact - width) > 1e-9 * d_ff or not MIN_WIDTH <= width < d_ff:
        below = max(MIN_WIDTH, min(int(exact), d_ff - MIN_WIDTH))
        raise ConfigError(
            "moe.shared_expert gives no width of a shared expert.",
            value=f"{value!r} of a dense width of {d_ff}",
            rule="0 (none), a float in (0, 1) that gives whole neurons, or an integer of at least "
            f"{MIN_WIDTH}; below the dense width",
            remedy=f"for example moe.shared_expert={below}",
        )
    return width


def resolve_d_ff_expert(value: int | float | None, d_ff: int) -> int:
    """Neurons per expert for the setting `moe.d_ff_expert`.

    null is the dense width, a float in (0, 1] that fraction of it, an integer of at least 8 that
    many neurons. Raises `ConfigError` on anything else, and on a fraction of no whole width.
    """
    if value is None:
        return d_ff
    if isinstance(value, int) and not isinstance(value, bool) and value >= MIN_WIDTH:
        return value
    if isinstance(value, float) and 0 < value <= 1:
        exact = value * d_ff
        width = round(exact)
        if width >= 1 and abs(exact - width) <= 1e-9 * d_ff:
            return width
        below = int(exact)
        near = [width for width in (below, below + 1) if width >= MIN_WIDTH] or [MIN_WIDTH]
        raise _width_error(value, f"{value:g} x {d_ff} = {exact:g} is not a whole width", near)
    near = [max(MIN_WIDTH, round(value))] if value > 0 else [MIN_WIDTH, d_ff]
    raise _width_error(value, f"{value!r} is neither a fraction nor a width", near)


def _width_error(value: object, why: str, near: list[int]) -> ConfigError:
    return ConfigError(
        f"moe.d_ff_expert gives no expert width: {why}.",
        value=value,
        rule="null (the dense width), a float in (0, 1] that gives whole neurons, "
        f"or an integer of at least {MIN_WIDTH}",
        remedy=f"the nearest valid: {' or '.join(f'moe.d_ff_expert={width}' for width in near)}",
    )


def resolve_init(init: str, init_from_dense: bool, d_ff_routed: int, d_ff_expert: int) -> str:
    """A start's name, never `auto`, for the settings `moe.init` and `moe.init_from_dense`."""
    if not init_from_dense:
        return "random"
    if init != "auto":
        return init
    return "copy" if d_ff_expert == d_ff_routed else "slice"


def check_start(shape: MoEShape, init: str) -> None:
    """Raise `ConfigError` where these sizes cannot start by `init` (see `experts.py`)."""
    routed = f"{shape.d_ff_routed} dense neurons"
    if shape.d_ff_shared:
        routed += f" beside a shared expert of {shape.d_ff_shared}"
    if init == "copy" and shape.d_ff_expert != shape.d_ff_routed:
        width = shape.d_ff_routed if shape.d_ff_shared else "null"
        raise ConfigError(
            "A copy of the dense FFN needs experts of its width.",
            value=f"width {shape.d_ff_expert} of moe.d_ff_expert, {routed}",
            rule="moe.init=copy needs equal widths",
            remedy=f"set moe.d_ff_expert={width}, or moe.init=slice",
        )
    if init == "specialist" and shape.capacity_factor is None and shape.n_experts % shape.top_k:
        near = shape.n_experts // shape.top_k * shape.top_k
        raise ConfigError(
            "The experts do not form whole specialists.",
            value=f"moe.n_experts={shape.n_experts}, moe.top_k={shape.top_k}",
            rule="moe.init=specialist takes moe.top_k experts together as one specialist",
            remedy=f"the nearest valid: moe.n_experts={near} or "
            f"moe.n_experts={near + shape.top_k}; moe.top_k=1 takes any",
        )
    if init not in ("slice", "cluster"):
        return
    d_ff = shape.d_ff_routed
    if shape.d_ff_expert < d_ff and d_ff % shape.d_ff_expert:
        divisors = [width for width in range(1, d_ff + 1) if d_ff % width == 0]
        below = max(width for width in divisors if width < shape.d_ff_expert)
        above = min(width for width in divisors if width > shape.d_ff_expert)
        raise ConfigError(
            "The dense FFN does not divide into experts of this width.",
            value=f"width {shape.d_ff_expert} of moe.d_ff_expert, {routed}",
            rule=f"moe.init={init} needs a width that divides them",
            remedy="the nearest valid: "
            + " or ".join(f"moe.d_ff_expert={w}" for w in (below, above) if w >= MIN_WIDTH)
            + "; moe.init=random takes any",
        )
    if shape.n_experts % shape.groups:
        below = shape.n_experts // shape.groups * shape.groups
        near = [n for n in (below, below + shape.groups) if n >= shape.top_k and n > 0]
        raise ConfigError(
            "The groups of dense neurons do not share out evenly among the experts.",
            value=f"moe.n_experts={shape.n_experts}, {shape.groups} groups "
            f"({d_ff} / {shape.d_ff_expert} neurons)",
            rule=f"moe.init={init} needs moe.n_experts to be a multiple of the number of groups",
            remedy=f"the nearest valid: {' or '.join(f'moe.n_experts={n}' for n in near)}",
        )


def check_virtual_groups(shape: MoEShape, init: str, router_init: str) -> None:
    """Raise `ConfigError` where no top-k could take whole replicas of the dense FFN."""
    wrong = ["moe.init=slice"] if init in ("random", "specialist") else []
    wrong += [f"moe.top_k={shape.groups}"] if shape.top_k % shape.groups else []
    if wrong:
        raise ConfigError(
            "Virtual groups need whole replicas of the dense FFN to choose from.",
            value=f"moe.init={init}, moe.top_k={shape.top_k}, {shape.groups} groups",
            rule="moe.virtual_groups=true needs moe.init=copy, slice or cluster, and moe.top_k "
            "a multiple of the number of groups ((d_ff - shared) / d_ff_expert)",
            remedy=f"set {' and '.join(wrong)}, or moe.virtual_groups=false",
        )
    if router_init == "zero" and shape.replicas > 1:
        raise ConfigError(
            "Virtual groups cannot start from a router that prefers nothing.",
            value=f"moe.router_init=zero, {shape.replicas} replicas",
            rule="with several replicas their router rows must differ",
            remedy="set moe.router_init=random or ridge",
        )


def check_dynamic(shape: MoEShape, min_d_ff: int, max_d_ff: int) -> None:
    """Raise `ConfigError` where experts cannot grow and shrink from this width."""
    width = shape.d_ff_expert
    if not min_d_ff <= width <= max_d_ff or width % WIDTH_STEP:
        nearest = min(max(width, min_d_ff), max_d_ff) // WIDTH_STEP * WIDTH_STEP
        raise ConfigError(
            "Dynamic experts cannot start at this width.",
            value=f"width {width} of moe.d_ff_expert",
            rule=f"a multiple of {WIDTH_STEP} between moe.dynamic.min_d_ff={min_d_ff} and "
            f"moe.dynamic.max_d_ff={max_d_ff}",
            remedy=f"set moe.d_ff_expert={max(nearest, WIDTH_STEP)}, or widen the bounds",
        )
