"""The model inside whatever was put around it."""

from peft import PeftModel
from transformers import PreTrainedModel


def innermost(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
