"""The keys of a training sample: a target's values have its name as key; related entries have keys derived from it.

Every module that reads or writes a sample takes its keys from here, and `check_names` refuses names of targets that
would overwrite each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from volumen.utils.errors import VolumenError

RESERVED = frozenset(
    {
        "case",
        "deferred",
        "image",
        "in_volume",
        "location",
        "loss",
        "seed",
        "spacing",
        "spatial",
        "start",
        "volume_name",
    }
)
"""Keys that a sample, or the output of an engine, uses for other things than a target."""
DEFERRED = "deferred"
"""Key of the stored voxels of patches that the training device augments, see `volumen.transforms.deferred`."""
PACKED = "wide/"
"""Prefix of entries that are transferred to the training device to derive targets there."""
UNLABELLED = "unlabelled/"
"""Prefix of the entries of a batch that are no labelled patches: two views of each unlabelled one, see below."""
WEAK, STRONG = f"{UNLABELLED}weak", f"{UNLABELLED}strong"
"""Keys of the views of unlabelled patches for a teacher and for its student, (U, C, *patch) on the same grid."""
RAW_VIEWS = f"{UNLABELLED}raw"
"""Key of unlabelled patches whose views the training device makes, see `volumen.transforms.deferred`."""
RECONSTRUCTION, HIDDEN = "reconstruction", "hidden"
"""Keys of pretraining: the reconstructed image, and the blocks that the encoder does not see."""
PRETRAINED = "pretraining"
"""Key in a checkpoint's `model_config` that names how its encoder was trained without labels."""
_MASK, _LABELLED = "_mask", "_labelled"
_UPPER, _CONFIDENCE, _FREE = "_upper", "_confidence", "_free"
_ENDINGS = {
    _MASK: "mask",
    _LABELLED: "labels",
    _UPPER: "upper bound",
    _CONFIDENCE: "confidence",
    _FREE: "free direction",
}


def mask_key(target: str) -> str:
    """Return the key of a target's loss mask: bool (1, *patch), True where the loss counts."""
    return f"{target}{_MASK}"


def labelled_key(target: str) -> str:
    """Return the key of the labels from which a target was computed, if its values are not these labels any more."""
    return f"{target}{_LABELLED}"


def upper_key(target: str) -> str:
    """Return the key of a derived distance's upper bound, see `volumen.derived.informed.Informed`."""
    return f"{target}{_UPPER}"


def confidence_key(target: str) -> str:
    """Return the key of a derived target's confidence: float32 (1, *patch), the weight in losses that take one."""
    return f"{target}{_CONFIDENCE}"


def free_key(target: str) -> str:
    """Return the key of the direction along which a derived target is not known."""
    return f"{target}{_FREE}"


def informed_keys(target: str) -> tuple[str, str, str]:
    """Return the keys of confidence, upper bound and free direction; a sample holds those that the target has."""
    return confidence_key(target), upper_key(target), free_key(target)


def counted_voxels(batch: Mapping[str, Any], target: str) -> Any:
    """Return the voxels of a target that count in losses: those with a confidence, else those of its mask, or None."""
    confidence = batch.get(confidence_key(target))
    return batch.get(mask_key(target)) if confidence is None else confidence > 0


def check_names(names: Iterable[str], where: str) -> None:
    """Refuse names of targets that a sample cannot hold together.

    Args:
        names: names of all targets, labelled and derived.
        where: the file that declares them, for the error.

    Raises:
        VolumenError: a name is reserved, or equals the key of another target's mask or labels.
    """
    targets = set(names)
    for name in sorted(targets):
        if name in RESERVED or name.startswith(PACKED):
            raise VolumenError(
                f"{where}: target {name!r}",
                "the name is reserved for something else in a sample",
                remedy="rename the target",
            )
        for ending, meaning in _ENDINGS.items():
            owner = name.removesuffix(ending)
            if owner != name and owner in targets:
                raise VolumenError(
                    f"{where}: target {name!r}",
                    f"the name is that of the {meaning} of the target {owner!r}",
                    remedy="rename one of them",
                )
