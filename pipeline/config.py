"""Every setting: one definition each, with its unit.

The values stand in `conf/`; this is their schema. `pipeline.compose` merges the one into the
other, so an unknown key, a wrong type or a value outside an enum is refused by name.
Imports neither torch nor transformers: a mistake must be told in a second, not after an import.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

MISSING: Any = "???"  # OmegaConf's own, which is not asked for it: a layer trains without

SPLITS = ("train", "validation", "heldout", "shifted")
"""Parts of the text: what is chosen is chosen on the second, only `evaluate` reads the last two."""

CAPTURED_SPLITS = ("train", "validation", "heldout")


class Dtype(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(Enum):
    auto = "auto"  # a GPU where there is one
    cpu = "cpu"
    cuda = "cuda"


class DataSource(Enum):
    embedded = "embedded"  # the docstrings of the running CPython's standard library
    hub = "hub"  # a dataset of the Hugging Face hub
    files = "files"  # local txt, jsonl or parquet files


class Codec(Enum):
    compact = "compact"  # zstd, about 0.69 of the raw bf16 bytes
    fast = "fast"  # lz4, about 0.75, 2.5 times the encoding speed
    none = "none"  # as they are


class Store(Enum):
    both = "both"  # what every FFN was given and what it gave
    input = "input"  # what it was given: half the bytes; its output is computed again when read


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
    auto = "auto"  # padded in bf16 on a CPU with AMX, else grouped where it is there, else padded
    padded = "padded"  # four experts in one product, each padded to the largest load of them
    grouped = "grouped"  # torch's grouped_mm, no padding
    loop = "loop"  # one expert after the other: the reference


class Logger(Enum):
    none = "none"  # only the lines on the console and in .scratch/logs
    tensorboard = "tensorboard"
    wandb = "wandb"  # offline unless WANDB_MODE says otherwise
    mlflow = "mlflow"  # to a local file unless MLFLOW_TRACKING_URI says otherwise
    dvclive = "dvclive"


class Schedule(Enum):
    constant = "constant"  # after the warm-up, the seed's
    cosine = "cosine"  # down to nearly zero at the last step


@dataclass
class EmbeddedModelConfig:
    """The dense model that is trained here when none is named."""

    vocab_size: int = MISSING  # of the byte-level BPE tokenizer [tokens]
    d_model: int = MISSING  # width of the residual stream
    d_ff: int = MISSING  # width of every dense FFN [neurons]
    n_layers: int = MISSING  # transformer layers
    n_heads: int = MISSING  # attention heads; d_model is n_heads times an even number
    n_kv_heads: int = MISSING  # heads of keys and values; they divide n_heads
    sequence_length: int = MISSING  # of a training sequence [tokens]
    batch_tokens: int = MISSING  # of one step [tokens]
    max_steps: int = MISSING  # steps at most; patience may end it before
    learning_rate: float = MISSING  # peak, of AdamW
    weight_decay: float = MISSING  # of AdamW
    warmup_steps: int = MISSING  # until the peak is reached [steps]
    evaluate_every: int = MISSING  # between validations [steps]
    patience: int = MISSING  # validations without a better one before it stops
    checkpoint_every: int = MISSING  # between checkpoints to go on from [steps]


@dataclass
class ModelConfig:
    """The dense model to convert."""

    name: str = MISSING  # for people: a word, in the report and the model card
    # hub id, folder, or `package:<name>/<folder>` of an installed package; null = the embedded
    # model
    id: str | None = None
    # commit of the hub; null = the newest, recorded; required with trust_remote_code
    revision: str | None = None
    dtype: Dtype = MISSING  # of the loaded weights; auto = as they are stored
    # as transformers takes it, for a model that several devices hold together; where it leaves an
    # FFN that is converted on the CPU or the disk for want of room, the run is refused
    device_map: str | None = None
    trust_remote_code: bool = MISSING  # run the model's own Python code
    layers: list[int] = MISSING  # layers to convert, indices from 0; the others stay dense
    embedded: EmbeddedModelConfig | None = None


@dataclass
class TokensConfig:
    """Token budgets, one per split. A corpus may hold fewer; the report says how many were used."""

    train: int = MISSING  # the layers are fitted to them [tokens]
    validation: int = MISSING  # what is chosen is chosen on them [tokens]
    heldout: int = MISSING  # only `evaluate` reads them: the same domain [tokens]
    shifted: int = MISSING  # only `evaluate` reads them: another domain [tokens]


@dataclass
class DataConfig:
    """The text that the dense model reads while its activations are captured."""

    source: DataSource = MISSING  # where the text comes from
    dataset: str | None = None  # source=hub: its id
    subset: str | None = None  # source=hub: the dataset's configuration
    revision: str | None = None  # source=hub: commit; null = the newest
    split: str = MISSING  # source=hub: which of its splits is read; ours are cut from it
    streaming: bool = MISSING  # source=hub: read no further than the token budget
    files: list[str] = MISSING  # source=files: paths or globs of txt, jsonl and parquet files
    # text of another domain; empty = the standard library's source
    shifted_files: list[str] = MISSING
    text_column: str = MISSING  # the field of a row that holds its text
    max_samples: int | None = None  # documents read of the source at most; null = all
    sequence_length: int = MISSING  # of a packed block [tokens]
    tokens: TokensConfig = field(default_factory=TokensConfig)


@dataclass
class CaptureConfig:
    """The activation store."""

    dtype: Dtype = MISSING  # of the stored rows; auto = bfloat16 unless the model is float16
    store: Store = MISSING  # which of each FFN's two sides are kept on disk
    codec: Codec = MISSING  # how chunks are compressed
    shard_mb: float = MISSING  # raw size of a shard of each array; one file each [MB]
    chunk_mb: float = MISSING  # raw size of a chunk: what is decoded at once [MB]
    batch_size: int = MISSING  # of a forward pass [sequences]
    # stored of the heldout blocks: per-layer metrics need few [tokens]
    heldout_tokens: int = MISSING
    # s3://bucket/prefix, gs://bucket/prefix or file:///folder that takes the shards, in no
    # fingerprint; null = they stay in the folder of the store
    store_url: str | None = None


@dataclass
class LayerMoEConfig:
    """What some layers have otherwise; null = as `moe` says."""

    layers: list[int] = MISSING  # of model.layers
    n_experts: int | None = None  # as moe.n_experts
    top_k: int | None = None  # as moe.top_k
    d_ff_expert: int | float | None = None  # as moe.d_ff_expert
    shared_expert: int | float | None = None  # as moe.shared_expert


@dataclass
class DynamicConfig:
    """Experts that grow and shrink while they are trained; widths in neurons, multiples of 8."""

    enabled: bool = MISSING  # experts exchange neurons in training; their sum stays
    reallocate_every_n_steps: int = MISSING  # between reallocations [steps]
    n_reallocated: int = MISSING  # experts that grow at a time, and as many that shrink
    growth_factor: float = MISSING  # of the width of the experts of highest loss
    shrink_factor: float = MISSING  # of the width of the experts of lowest loss
    min_d_ff: int = MISSING  # no expert gets narrower; a multiple of 8 [neurons]
    max_d_ff: int = MISSING  # no expert gets wider; a multiple of 8 [neurons]
    growth: Growth = MISSING  # how an expert gets wider


@dataclass
class BudgetConfig:
    """How much each layer gets of what `moe` gives them all together."""

    by: BudgetBy = MISSING  # how the layers' sizes are chosen
    vary: BudgetVary = MISSING  # by=kl: the setting of moe in which layers may differ
    candidates: list[int | float] = MISSING  # by=kl: its values, beside the configured one
    tokens: int = MISSING  # by=kl: of validation, read for each layer and candidate [tokens]


@dataclass
class MoEConfig:
    """The sparse layer that takes the place of each dense FFN."""

    n_experts: int = MISSING  # routed experts per layer
    top_k: int = MISSING  # routing=token_choice: experts run per token
    routing: Routing = MISSING  # who chooses
    capacity_factor: float = MISSING  # routing=expert_choice: experts per token, on average
    # width of an expert: null = d_ff; a number in (0, 1] = that fraction of it; an integer of 8 or
    # more = neurons
    d_ff_expert: int | float | None = MISSING
    # width of an expert that runs for every token: as d_ff_expert, below 1; 0 = none
    shared_expert: int | float = MISSING
    init_from_dense: bool = MISSING  # start from the dense FFN; false = init: random
    init: Init = MISSING  # how experts start
    init_noise: float = MISSING  # on replicated experts, in standard deviations of each weight
    virtual_groups: bool = MISSING  # the slices of one replica share their router row
    router: Router = MISSING  # its form
    router_width: int = MISSING  # router=mlp: units of its hidden layer
    router_init: RouterInit = MISSING  # how the router starts; init=specialist brings its own
    # least squares of every down_proj under the start's routing, unless the start is exact
    refit: bool = MISSING
    mean_compensation: bool = MISSING  # an output bias per expert, fitted; needs host=custom
    balance_bias: bool = MISSING  # a bias per expert that selects and never weighs
    host: Host = MISSING  # architecture to export to; it fixes the router function
    per_layer: list[LayerMoEConfig] = MISSING  # what some layers have otherwise
    dynamic: DynamicConfig = field(default_factory=DynamicConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)


@dataclass
class TrainConfig:
    """How one layer is fitted to its own store."""

    epochs: int = MISSING  # passes over the layer's rows; 0 = the start as it is, no training
    batch_size: int = MISSING  # of one step [tokens]
    learning_rate: float = MISSING  # peak, of the experts, by AdamW
    router_learning_rate: float | None = None  # peak, of the router; null = learning_rate
    weight_decay: float = MISSING  # of AdamW
    warmup_steps: int = MISSING  # until the peak is reached [steps]
    schedule: Schedule = MISSING  # of the rate after the warm-up
    grad_clip: float = MISSING  # largest global gradient norm; 0 = no clipping
    # divide by the variance of the target; false = the seed's formula
    normalize_mse: bool = MISSING
    use_cosine_loss: bool = MISSING  # add cosine_loss_weight x (1 - cosine) to the squared error
    cosine_loss_weight: float = MISSING  # of that term
    load_balance_coef: float = MISSING  # weight of the loss that evens out the experts' loads
    router_z_coef: float = MISSING  # weight of the loss that keeps router logits small
    balance_bias_rate: float = MISSING  # moe.balance_bias: change of a bias per step
    static_control: bool = MISSING  # fit plain pruning to the same active width beside the layer
    # layers fitted at a time behind the sparse ones, by `prefill`; null = each alone
    window: int | None = None
    data_free: bool = MISSING  # random inputs of the captured mean and covariance
    evaluate_every: int = MISSING  # between validations [steps]
    patience: int = MISSING  # validations without a better one before it stops; 0 = never
    checkpoint_every: int = MISSING  # between checkpoints to go on from [steps]
    stream: bool = MISSING  # read shuffled chunks instead of holding the split in memory
    dtype: Dtype = MISSING  # of the matrix products, not of weights; auto = what is fast here
    kernel: Kernel = MISSING  # how experts are computed


@dataclass
class HealConfig:
    """All layers trained together, in the dense model's place, on its logits."""

    # of the train blocks, read again where it is more; 0 = no healing [tokens]
    tokens: int = MISSING
    batch_size: int = MISSING  # of one step [sequences]
    learning_rate: float = MISSING  # peak, of experts and norms; falls to nearly zero
    router_learning_rate: float | None = None  # peak, of the routers; null = learning_rate
    train_norms: bool = MISSING  # train the model's norms too; attention and embeddings never
    weight_decay: float = MISSING  # of AdamW; not of norms
    warmup_steps: int = MISSING  # until the peak is reached [steps]
    grad_clip: float = MISSING  # largest global gradient norm; 0 = no clipping
    load_balance_coef: float = MISSING  # as train.load_balance_coef, of the sum over layers
    router_z_coef: float = MISSING  # as train.router_z_coef, of the sum over layers
    evaluate_every: int = MISSING  # between validations [steps]
    checkpoint_every: int = MISSING  # between checkpoints to go on from [steps]
    dtype: Dtype = MISSING  # of the matrix products, not of weights; auto = what is fast here


@dataclass
class ConvertConfig:
    """The assembly; the three paths are for running it alone."""

    dense: str | None = None  # hub id or folder; null = the DAG's dense model
    revision: str | None = None  # commit of the hub, for `dense`
    layers: str | None = None  # folder that holds layer_K/; null = stages/train
    output: str | None = None  # folder of the sparse checkpoint; null = stages/convert
    max_shard_size: str = "2GB"  # of each safetensors file, with its unit
    # largest difference of a logit after reloading, relative to the largest logit
    tolerance: float = 0.001


@dataclass
class EvaluateConfig:
    """What the finished model is judged on."""

    batch_size: int = MISSING  # of a forward pass [sequences]
    max_batches: int | None = None  # of each text; null = all of it
    prompt: str = MISSING  # the sample generations continue it
    new_tokens: int = MISSING  # length of a sample generation; 0 = none [tokens]
    measure_speed: bool = MISSING  # time both models; these figures differ from run to run
    push_to_hub: str | None = None  # hub repository (owner/name) that gets the checkpoint and card


@dataclass
class RuntimeConfig:
    """How, not what: none of these belongs to a fingerprint."""

    device: Device = Device.auto  # where the models run
    threads: int | None = None  # of torch on the CPU; null = every core that it may use
    lock_wait_s: float = 600.0  # for another run on the same output, then exit code 4 [s]
    logger: Logger = Logger.none  # where the figures of dense, train and heal also go


@dataclass
class PrefillConfig:
    """How `prefill` places its jobs and waits for them: none of these belongs to a fingerprint."""

    timeout_s: float | None = None  # of one call, then exit code 4; null = no bound [s]
    # for Slurm to begin a lost job again, or one that waits behind a launcher that ended [s]
    lost_wait_s: float = 60.0
    # workers that share a GPU; null = as many as fit its memory by the estimate of `plan`
    layers_per_gpu: int | None = 1


@dataclass
class Config:
    seed: int = 0  # of every random choice
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    heal: HealConfig = field(default_factory=HealConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    prefill: PrefillConfig = field(default_factory=PrefillConfig)


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
