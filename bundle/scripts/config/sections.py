"""The experiment's sections, frozen dataclasses of `volumen.config.parts`, and rules for all of their keys.

The table of keys in the documentation is generated from the descriptions of the fields. `volumen.config.validation`
refuses unknown keys and names the closest known one; then pydantic checks types and ranges.
"""

from __future__ import annotations

from functools import cache
from typing import Any, get_type_hints

from volumen.config.parts.common import FILE_NAME
from volumen.config.parts.dataset import FOLD, DatasetConfig
from volumen.config.parts.network import ModelConfig
from volumen.config.parts.setup import TrainingSetup
from volumen.config.parts.training import DURATION, TrainingConfig
from volumen.config.prediction import InferenceConfig
from volumen.config.value_types import NAMES_FILE
from volumen.metrics.score_names import VALIDATION_PATTERN, VALIDATION_SCORES

# Errors show these instead of the patterns.
PATTERN_MEANINGS = {
    FOLD: "a fold such as 0/5, the first of five",
    DURATION: "a time such as 35m, 12h or 1h30m",
    FILE_NAME: "a name of letters, digits, '.', '_' and '-' that begins with a letter or digit",
    VALIDATION_PATTERN: f"a score of labels ({', '.join(VALIDATION_SCORES)}; X is a number)",
}


SECTIONS: dict[str, type] = {
    "tr_setup": TrainingSetup,
    "tr_config": TrainingConfig,
    "model_config": ModelConfig,
    "dataset_config": DatasetConfig,
    "inference_config": InferenceConfig,
}

# Values of keys that are null by default, used if nothing else decides them. Null tells an unset key from one to which
# the user gave the same value.
UNSET: dict[str, dict[str, Any]] = {
    "tr_config": {"batch_size": 2, "initial_lr": 1e-3, "augment_strength": 1.0},
    "model_config": {"separate_decoders": True, "base_features": 32},
    "dataset_config": {"min_labeled_ratio": 0.10},
}


@cache
def file_keys(section: str) -> frozenset[str]:
    """Return the keys of a section whose values name files or folders; none for a section without such keys."""
    if section not in SECTIONS:
        return frozenset()
    hints = get_type_hints(SECTIONS[section], include_extras=True)
    return frozenset(key for key, hint in hints.items() if NAMES_FILE in getattr(hint, "__metadata__", ()))


# Other names of keys, which files of other tools use: section -> name -> key.
ALIASES: dict[str, dict[str, str]] = {
    "tr_config": {"amp_dtype": "amp"},
    "model_config": {"squeeze_excitation_rd_ratio": "squeeze_excitation_reduction_ratio"},
}

# Keys of older files that have no effect here, with their replacement: section -> key -> advice.
RETIRED: dict[str, dict[str, str]] = {}
