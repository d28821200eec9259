"""Every setting: one definition each, with its unit.

The values stand in `conf/`; this is their schema. `pipeline.compose` merges the one into the
other, so an unknown key, a wrong type or a value outside an enum is refused by name.
Imports neither torch nor transformers: a mistake must be told in a second, not after an import.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

SPLITS = ("train", "validation", "heldout", "shifted")
"""Parts of the text: what is chosen is chosen on the second, only `evaluate` reads the last two."""

CAPTURED_SPLITS = ("train", "validation", "heldout")


class Dtype(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DataSource(Enum):
    embedded = "embedded"  # the docstrings of the running CPython's standard library
    hub = "hub"  # a dataset of the Hugging Face hub
    files = "files"  # local txt, jsonl or parquet files


class Codec(Enum):
    compact = "compact"  # zstd, about 0.69 of the raw bf16 bytes
    fast = "fast"  # lz4, about 0.75, 2.5 times the encoding speed
    none = "none"


class Init(Enum):
    auto = "auto"  # copy where the widths match, slice otherwise
    copy = "copy"  # every expert is the whole dense FFN
    slice = "slice"  # partition the neurons in groups, replicate the groups
    cluster = "cluster"  # slice, but a group is of neurons that act together
    specialist = "specialist"  # partition the tokens, prune and refit the dense FFN for each part
    random = "random"


class RouterInit(Enum):
    zero = "zero"
    random = "random"  # normal, standard deviation 0.02
    ridge = "ridge"  # ridge regression of each expert's true contribution on the input


class Routing(Enum):
    token_choice = "token_choice"  # each token takes its top_k experts
    expert_choice = "expert_choice"  # each expert takes its share of the tokens


class Router(Enum):
    linear = "linear"  # what every native host has
    mlp = "mlp"  # the linear one plus a small network of one hidden layer


class Growth(Enum):
    split = "split"  # neurons are doubled and their outputs shared: nothing changes at once
    interpolate = "interpolate"  # the seed's: bilinear along d_ff, and a rescale


class Host(Enum):
    auto = "auto"  # the first that can hold the result, native ones first
    mixtral = "mixtral"
    granitemoe = "granitemoe"
    granitemoeshared = "granitemoeshared"
    qwen3_moe = "qwen3_moe"
    flex_olmo = "flex_olmo"
    qwen2_moe = "qwen2_moe"
    glm4_moe = "glm4_moe"
    dots1 = "dots1"
    custom = "custom"  # our own modelling file, saved with the checkpoint


class BudgetBy(Enum):
    uniform = "uniform"  # every layer as `moe` says
    kl = "kl"  # what costs the whole model least, at the uniform cost


class BudgetVary(Enum):
    d_ff_expert = "d_ff_expert"  # the budget is then of neurons run per token
    shared_expert = "shared_expert"  # the same
    n_experts = "n_experts"  # the budget is then of parameters


class Kernel(Enum):
    auto = "auto"
    padded = "padded"  # one batched product, every expert padded to the largest load
    grouped = "grouped"  # torch's grouped_mm, no padding
    loop = "loop"  # one expert after the other: the reference


class Schedule(Enum):
    constant = "constant"  # after the warm-up, the seed's
    cosine = "cosine"  # down to nearly zero at the last step


@dataclass
class EmbeddedModelConfig:
    """The dense model that is trained here when none is named."""

    vocab_size: int = MISSING  # tokens of the byte-level BPE tokenizer
    d_model: int = MISSING
    d_ff: int = MISSING
    n_layers: int = MISSING
    n_heads: int = MISSING
    n_kv_heads: int = MISSING
    sequence_length: int = MISSING  # tokens per training sequence
    batch_tokens: int = MISSING  # tokens per step
    max_steps: int = MISSING
    learning_rate: float = MISSING  # peak, AdamW
    weight_decay: float = MISSING
    warmup_steps: int = MISSING
    evaluate_every: int = MISSING  # steps between validations
    patience: int = MISSING  # validations without a better one before stopping
    checkpoint_every: int = MISSING  # steps


@dataclass
class ModelConfig:
    """The dense model to convert."""

    name: str = MISSING  # for people; a word
    id: str | None = None  # hub id, folder or package:<name>/<folder>; null = the embedded model
    revision: str | None = None  # hub commit; required with trust_remote_code
    dtype: Dtype = MISSING  # of the loaded weights; auto = as stored
    device_map: str | None = None  # as transformers takes it
    trust_remote_code: bool = MISSING
    layers: list[int] = MISSING  # layers to convert, indices from 0
    embedded: EmbeddedModelConfig | None = None


@dataclass
class TokensConfig:
    """Token budgets, one per split. A corpus may hold fewer; the report says how many were used."""

    train: int = MISSING
    validation: int = MISSING
    heldout: int = MISSING
    shifted: int = MISSING


@dataclass
class DataConfig:
    """The text that the dense model reads while its activations are captured."""

    source: DataSource = MISSING
    dataset: str | None = None  # source=hub: its id
    subset: str | None = None  # source=hub: the dataset's configuration
    revision: str | None = None  # source=hub: commit
    split: str = MISSING  # source=hub: which of its splits is read
    streaming: bool = MISSING  # source=hub: read no further than the token budget
    files: list[str] = MISSING  # source=files: paths or globs
    shifted_files: list[str] = MISSING  # another domain; empty = the standard library's source
    text_column: str = MISSING
    max_samples: int | None = None  # documents read of the source at most; null = all
    sequence_length: int = MISSING  # tokens per packed block
    tokens: TokensConfig = field(default_factory=TokensConfig)


@dataclass
class CaptureConfig:
    """The activation store."""

    dtype: Dtype = MISSING  # as stored; auto = bfloat16 unless the model is float16
    codec: Codec = MISSING
    shard_mb: float = MISSING  # raw megabytes per shard and array
    chunk_mb: float = MISSING  # raw megabytes per chunk
    batch_size: int = MISSING  # sequences per forward pass
    heldout_tokens: int = MISSING  # the per-layer metrics need fewer than perplexity


@dataclass
class LayerMoEConfig:
    """What some layers have otherwise; null = as `moe` says."""

    layers: list[int] = MISSING  # of model.layers
    n_experts: int | None = None
    top_k: int | None = None
    d_ff_expert: int | float | None = None
    shared_expert: int | float | None = None


@dataclass
class DynamicConfig:
    """Experts that grow and shrink while they are trained; widths in neurons, multiples of 8."""

    enabled: bool = MISSING
    reallocate_every_n_steps: int = MISSING
    n_reallocated: int = MISSING  # experts that grow at a time, and as many that shrink
    growth_factor: float = MISSING  # of the width of the experts of highest loss
    shrink_factor: float = MISSING  # of the width of the experts of lowest loss
    min_d_ff: int = MISSING
    max_d_ff: int = MISSING
    growth: Growth = MISSING


@dataclass
class BudgetConfig:
    """How much each layer gets of what `moe` gives them all together."""

    by: BudgetBy = MISSING
    vary: BudgetVary = MISSING  # by=kl: the setting of moe in which layers may differ
    candidates: list[int | float] = MISSING  # by=kl: its values, beside the configured one
    tokens: int = MISSING  # by=kl: of validation, read for each layer and candidate


@dataclass
class MoEConfig:
    """The sparse layer that takes the place of each dense FFN."""

    n_experts: int = MISSING
    top_k: int = MISSING  # experts run per token; routing=token_choice
    routing: Routing = MISSING
    capacity_factor: float = MISSING  # routing=expert_choice: experts per token, on average
    d_ff_expert: int | float | None = (
        MISSING  # null = d_ff; float in (0, 1] = fraction of it; int >= 8 = neurons
    )
    shared_expert: int | float = MISSING  # always on: as d_ff_expert, below 1; 0 = none
    init_from_dense: bool = MISSING  # false = init: random
    init: Init = MISSING
    init_noise: float = MISSING  # of each weight's standard deviation, on replicated experts
    virtual_groups: bool = MISSING  # the slices of one replica share their router row
    router: Router = MISSING
    router_width: int = MISSING  # router=mlp: units of its hidden layer
    router_init: RouterInit = MISSING  # init=specialist brings its own router
    refit: bool = (
        MISSING  # least squares of every down_proj under the start's routing; not if exact
    )
    mean_compensation: bool = MISSING  # an output bias per expert, fitted; host: custom
    balance_bias: bool = MISSING  # a bias per expert that selects and never weighs
    host: Host = MISSING  # architecture to export to; fixes the router function
    per_layer: list[LayerMoEConfig] = MISSING
    dynamic: DynamicConfig = field(default_factory=DynamicConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)


@dataclass
class TrainConfig:
    """How one layer is fitted to its own store."""

    epochs: int = MISSING
    batch_size: int = MISSING  # tokens per step
    learning_rate: float = MISSING  # experts
    router_learning_rate: float | None = None  # null = learning_rate
    weight_decay: float = MISSING
    warmup_steps: int = MISSING
    schedule: Schedule = MISSING
    grad_clip: float = MISSING  # largest global gradient norm; 0 = no clipping
    normalize_mse: bool = (
        MISSING  # divide by the variance of the target; false = the seed's formula
    )
    use_cosine_loss: bool = MISSING
    cosine_loss_weight: float = MISSING
    load_balance_coef: float = MISSING
    router_z_coef: float = MISSING
    balance_bias_rate: float = MISSING  # per step, with moe.balance_bias
    static_control: bool = MISSING  # fit plain pruning to the same active width beside the layer
    window: int | None = None  # layers fitted at a time behind the sparse ones; null = each alone
    data_free: bool = MISSING  # random inputs of the captured mean and covariance
    evaluate_every: int = MISSING  # steps between validations
    patience: int = MISSING  # validations without a better one before stopping; 0 = never
    checkpoint_every: int = MISSING  # steps between checkpoints to continue from
    stream: bool = MISSING  # read shuffled chunks instead of holding the split in memory
    dtype: Dtype = MISSING  # of the matrix products; weights and optimizer are float32
    kernel: Kernel = MISSING


@dataclass
class HealConfig:
    """All layers trained together, in the dense model's place, on its logits."""

    tokens: int = MISSING  # of the train blocks, read again where it is more; 0 = no healing
    batch_size: int = MISSING  # sequences per step
    learning_rate: float = MISSING  # peak, of experts and norms; falls to nearly zero
    router_learning_rate: float | None = None  # null = learning_rate
    train_norms: bool = MISSING  # the model's norms too; attention and embeddings never
    weight_decay: float = MISSING  # not of norms
    warmup_steps: int = MISSING
    grad_clip: float = MISSING  # largest global gradient norm; 0 = no clipping
    load_balance_coef: float = MISSING  # of the sum over layers
    router_z_coef: float = MISSING  # of the sum over layers
    evaluate_every: int = MISSING  # steps between validations
    checkpoint_every: int = MISSING  # steps between checkpoints to continue from
    dtype: Dtype = MISSING  # of the matrix products; weights and optimizer are float32


@dataclass
class ConvertConfig:
    """The assembly; the three paths are for running it alone."""

    dense: str | None = None  # hub id or folder; null = the DAG's dense model
    revision: str | None = None
    layers: str | None = None  # folder that holds layer_K/; null = stages/train
    output: str | None = None  # folder of the sparse checkpoint; null = stages/convert
    max_shard_size: str = "2GB"  # of each safetensors file
    tolerance: float = 1e-3  # largest logit difference, relative to the largest logit


@dataclass
class EvaluateConfig:
    batch_size: int = MISSING  # sequences per forward pass
    max_batches: int | None = None  # of each text; null = all of it
    prompt: str = MISSING  # the sample generations continue it
    new_tokens: int = MISSING  # length of a sample generation


@dataclass
class RuntimeConfig:
    """How, not what: none of these belongs to a fingerprint."""

    device: Device = Device.auto
    threads: int | None = None  # of torch on the CPU; null = every core that it may use
    lock_wait_s: float = 600.0  # seconds to wait for another run on the same output


@dataclass
class Config:
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    heal: HealConfig = field(default_factory=HealConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a configuration dataclass by its dotted key; lists are leaves."""
    if not is_dataclass(value):
        return {path: value}
    found: dict[str, Any] = {}
    for f in fields(value):
        found |= leaves(getattr(value, f.name), f"{path}.{f.name}" if path else f.name)
    return found


def select(cfg: Config, keys: Iterable[str]) -> dict[str, Any]:
    """The leaves at or below `keys` as plain JSON values: what a fingerprint covers."""
    wanted = tuple(keys)
    chosen = {}
    for key, value in leaves(cfg).items():
        if any(key == k or key.startswith(f"{k}.") for k in wanted):
            chosen[key] = _plain(value)
    return chosen


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return [asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for v in value]
    return value
