"""Loads models that transformers saved, from a folder or the Hub. Runs no code of theirs."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from focal_hf import FocalBackbone, FocalForImageClassification, FocalPreTrainedModel
from messages import ConversionError
from original import check_bounds


def read_config(name: str) -> PreTrainedConfig:
    """Reads the config of a model.

    Raises:
        ConversionError: if `name` is not a folder of a model or a model on the Hub.
    """
    if special := [entry for entry in Path(name).glob("*") if not entry.is_file() and not entry.is_dir()]:
        raise ConversionError(
            f"--model {name} holds {special[0].name}, which is neither a file nor a folder. Remove {special[0].name}."
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises exceptions of almost any type for a damaged or missing model
        raise _loading_error(name, error) from None


def local_files(name: str) -> tuple[Path, ...]:
    """The config of a model in a folder, or nothing for a model on the Hub: inputs for `check_output_folder`."""
    config_file = Path(name) / "config.json"
    return (config_file,) if config_file.exists() else ()


def load_whole_model(name: str, model_class: type[PreTrainedModel], expected: str) -> PreTrainedModel:
    """Loads a model with all its weights. They must be in the format of safetensors.

    Args:
        expected: What `name` must be, for a message.

    Raises:
        ConversionError: if the model cannot be loaded, or if weights are missing, left over or of a wrong shape.
    """
    try:
        model, report = model_class.from_pretrained(name, use_safetensors=True, output_loading_info=True)
    except Exception as error:
        raise _loading_error(name, error) from None
    if problems := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"], *report["unexpected_keys"]])):
        raise ConversionError(
            f"--model {name} must be {expected} with all its weights. Weights that are missing, unexpected or of a "
            f"wrong shape: {', '.join(problems[:4])}."
        )
    return model


def load_focal(name: str) -> FocalPreTrainedModel:
    """Loads a Focal Transformer: a `FocalBackbone`, or otherwise an image classifier.

    Raises:
        ConversionError: if it is another model, is too large, or cannot be loaded with all its weights.
    """
    config = read_config(name)
    if config.model_type != "focal":
        raise ConversionError(f"--model {name} is a {config.model_type} model. Give a Focal Transformer.")
    check_bounds(config)
    is_backbone = config.architectures == [FocalBackbone.__name__]
    model_class = FocalBackbone if is_backbone else FocalForImageClassification
    return load_whole_model(name, model_class, "an image classifier or a backbone")


def _loading_error(name: str, error: Exception) -> ConversionError:
    return ConversionError(
        f"--model {name} cannot be loaded. Give a folder that holds a model, or the name of a model on the Hub. "
        f"{error or type(error).__name__}"
    )
