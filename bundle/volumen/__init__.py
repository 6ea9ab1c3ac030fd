"""Train one network on many targets of a 2D or 3D image, predict volumes of any size, and score the predictions.

The public names below are loaded on first use, so that `import volumen` costs nothing. Everything else may change
between versions.

The code lies in `bundle/scripts`, where MONAI's bundles have it, and its import name is `volumen`. In a checkout and in
an unzipped bundle this package therefore looks for its modules in the folder `scripts` beside it; a wheel has them in
this very folder. `scripts` has no `__init__.py`, so it never hides another project's package of that name.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volumen import losses, transforms
    from volumen.api import derive, evaluate, load, predict, predict_array, train
    from volumen.config.manager import ConfigManager
    from volumen.evaluation.cases import Evaluation
    from volumen.evaluation.request import EvaluateRequest
    from volumen.inference.predictor import Predictor
    from volumen.inference.request import PredictReport, PredictRequest
    from volumen.networks.multihead import MultiHeadDynUNet
    from volumen.utils.errors import VolumenError
    from volumen.version import __version__

_HERE = Path(__file__).resolve().parent
if not (_HERE / "version.py").is_file():
    __path__ = [str(_HERE.parent / "scripts")]

# Where each public name lies; "" for a subpackage.
_HOMES = {
    "ConfigManager": "config.manager",
    "EvaluateRequest": "evaluation.score",
    "Evaluation": "evaluation.score",
    "MultiHeadDynUNet": "networks.multihead",
    "PredictReport": "inference.predict",
    "PredictRequest": "inference.predict",
    "Predictor": "inference.predictor",
    "VolumenError": "utils.errors",
    "__version__": "version",
    "derive": "api",
    "evaluate": "api",
    "load": "api",
    "losses": "",
    "predict": "api",
    "predict_array": "api",
    "train": "api",
    "transforms": "",
}

__all__ = [
    "ConfigManager",
    "EvaluateRequest",
    "Evaluation",
    "MultiHeadDynUNet",
    "PredictReport",
    "PredictRequest",
    "Predictor",
    "VolumenError",
    "__version__",
    "derive",
    "evaluate",
    "load",
    "losses",
    "predict",
    "predict_array",
    "train",
    "transforms",
]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'volumen' has no attribute {name!r}")
    home = _HOMES[name]
    value = getattr(import_module(f"volumen.{home}"), name) if home else import_module(f"volumen.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
