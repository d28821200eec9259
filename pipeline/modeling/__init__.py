"""The modelling file of the host `custom`, which is saved with every checkpoint of it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pipeline.modeling.modeling_sparse_distilled import (
    SparseDistilledConfig,
    SparseDistilledForCausalLM,
    SparseDistilledModel,
)


def register() -> None:
    """Open such checkpoints with the classes of this package, whatever file lies beside them.

    It also lets `save_pretrained` put the file beside the weights.
    """
    AutoConfig.register(SparseDistilledConfig.model_type, SparseDistilledConfig, exist_ok=True)
    AutoModel.register(SparseDistilledConfig, SparseDistilledModel, exist_ok=True)
    AutoModelForCausalLM.register(SparseDistilledConfig, SparseDistilledForCausalLM, exist_ok=True)
    SparseDistilledConfig.register_for_auto_class()
    SparseDistilledModel.register_for_auto_class("AutoModel")
    SparseDistilledForCausalLM.register_for_auto_class("AutoModelForCausalLM")
