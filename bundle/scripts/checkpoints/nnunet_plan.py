"""Reads what a folder of nnU-Net v2's results says of its network: `plans.json`, `dataset.json`, and the folds.

Such a folder is `nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION`, with `fold_0/checkpoint_final.pth` and so on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volumen.checkpoints.file import read_file
from volumen.checkpoints.nnunet import SECOND_NAMES, WEIGHTS_KEY, safe_globals
from volumen.checkpoints.weights import plain_name
from volumen.networks.nnunet import check_arguments, dimensions, short_name
from volumen.utils.errors import VolumenError

PLANS, DESCRIPTION, FINAL = "plans.json", "dataset.json", "checkpoint_final.pth"
SCHEMES = {
    "ZScoreNormalization": "zscore",
    "CTNormalization": "ct",
    "RescaleTo01Normalization": "rescale",
    "RGBTo01Normalization": "rgb",
    "NoNormalization": "none",
}
RESAMPLING = "resample_data_or_seg_to_shape"
FLAT_READER = "NaturalImage2DIO"
MOST_LABELS = 255
_IGNORE = "ignore"
_REMEDY = "predict with nnUNetv2_predict"


@dataclass(frozen=True)
class ChannelRule:
    """How a channel is normalised.

    Args:
        scheme: zscore, ct, rescale, rgb or none.
        in_mask: whether zscore is over the nonzero region alone, outside of which values stay.
        properties: mean, std, percentile_00_5 and percentile_99_5 of the training's foreground, for ct.
    """

    scheme: str
    in_mask: bool = False
    properties: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ResamplingRule:
    """How arrays are resampled.

    Args:
        order: of the interpolation: 0 nearest, 1 linear, 3 cubic.
        order_z: the same along an axis that is resampled by itself; only 0.
        separate: whether the coarsest axis is resampled by itself; None: if it is 3 times coarser than the finest.
    """

    order: int
    separate: bool | None = None


@dataclass(frozen=True)
class NnunetPlan:
    """What nnU-Net planned for a network and its images.

    Args:
        configuration: such as 3d_fullres.
        kind: class of the network.
        arguments: its arguments, as JSON (so that plans can be compared).
        patch_size: of the network, 2 or 3 axes.
        spacing: voxel size of the network's images, per axis of the network.
        transpose: axis `a` of the network's images is axis `transpose[a]` of the file's.
        channels: how each channel is normalised.
        data: how images are resampled.
        logits: how the network's outputs are resampled back.
        names: of the classes, background first, or of the regions.
        region_values: label value of each region, in the order of the network's outputs; empty for classes.
        reader: nnU-Net's class that read the images.
    """

    configuration: str
    kind: str
    arguments: str
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...]
    transpose: tuple[int, ...]
    channels: tuple[ChannelRule, ...]
    data: ResamplingRule
    logits: ResamplingRule
    names: tuple[str, ...]
    region_values: tuple[int, ...]
    reader: str

    @property
    def network_arguments(self) -> dict[str, Any]:
        """The network's arguments as a mapping."""
        return json.loads(self.arguments)

    @property
    def is_flat(self) -> bool:
        """Whether its images are 2D files; a 2D network of other images predicts volumes slice by slice."""
        return self.reader == FLAT_READER


def results_folder(path: str | Path) -> Path | None:
    """Return the folder with the plans that a path belongs to: itself, one of its folds, or a checkpoint of one."""
    path = Path(path)
    candidates = (path, path.parent, path.parent.parent) if path.suffix == ".pth" else (path, path.parent)
    for folder in candidates:
        if (folder / PLANS).is_file() and (folder / DESCRIPTION).is_file():
            return folder
    return None


def fold_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints of the folds in a folder of results, those that nnU-Net would average.

    Args:
        path: the folder, or that of one fold.

    Raises:
        VolumenError: there is no final checkpoint.
    """
    if (path / FINAL).is_file():
        return [path / FINAL]
    folds = [folder / FINAL for folder in sorted(path.glob("fold_*")) if (folder / FINAL).is_file()]
    # nnU-Net averages the folds of the cross-validation; the network trained on all cases counts only without them.
    chosen = [file for file in folds if file.parent.name != "fold_all"] or folds
    if not chosen:
        raise VolumenError(
            path,
            expected=f"fold_0/{FINAL} or the like",
            found="none",
            remedy="finish nnU-Net's training, or give one of its checkpoints",
        )
    return chosen


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return an nnU-Net checkpoint, read without running code from it.

    Returns:
        `weights` by name, `configuration`, `trainer`, and `mirror_axes` (axes of the network along which its training
        mirrored; empty for none).

    Raises:
        VolumenError: the file is damaged or none of nnU-Net v2.
    """
    content = read_file(path, allowed=safe_globals())
    if not isinstance(content, Mapping) or WEIGHTS_KEY not in content or "init_args" not in content:
        raise VolumenError(path, expected="a checkpoint of nnU-Net v2", found="none of its keys")
    weights = {plain_name(name): tensor for name, tensor in content[WEIGHTS_KEY].items()}
    return {
        "weights": {name: tensor for name, tensor in weights.items() if not SECOND_NAMES.search(name)},
        "configuration": content["init_args"]["configuration"],
        "trainer": content.get("trainer_name") or "",
        "epoch": content.get("current_epoch"),
        "mirror_axes": tuple(content.get("inference_allowed_mirroring_axes") or ()),
    }


def read_plan(folder: Path, configuration: str) -> NnunetPlan:
    """Return the plan of a configuration.

    Args:
        folder: with `plans.json` and `dataset.json`.
        configuration: such as 2d or 3d_fullres.

    Raises:
        VolumenError: the plan is damaged, or has something that is not supported here; the message names it.
    """
    plans, description = _read(folder / PLANS), _read(folder / DESCRIPTION)
    where = f"{folder / PLANS}: {configuration}"
    try:
        return _plan(where, plans, description, _configuration(plans, configuration), configuration)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise VolumenError(where, f"lacks {error} of nnU-Net v2's plans", remedy=_REMEDY) from None
    except ValueError as error:
        raise VolumenError(where, f"not supported: {error}", remedy=_REMEDY) from None


def _plan(
    where: str, plans: Mapping[str, Any], description: Mapping[str, Any], chosen: Mapping[str, Any], name: str
) -> NnunetPlan:
    if chosen.get("previous_stage"):
        raise ValueError(f"a cascade, which reads the labels of {chosen['previous_stage']}")
    for key, known in (("label_manager", "LabelManager"), ("preprocessor_name", "DefaultPreprocessor")):
        found = {**plans, **chosen}.get(key, known)
        if found != known:
            raise ValueError(f"{key}: {found}")
    kind, arguments = _architecture(chosen)
    check_arguments(kind, arguments)
    names, values = _labels(description)
    if max(len(names) - 1, *values, 0) > MOST_LABELS:
        raise ValueError(f"labels above {MOST_LABELS}, since label maps have 8 bits")
    patch = tuple(int(size) for size in chosen["patch_size"])
    transpose = tuple(int(axis) for axis in plans["transpose_forward"])
    reader = short_name(str(plans.get("image_reader_writer", "SimpleITKIO")))
    if sorted(transpose) != [0, 1, 2] or (reader == FLAT_READER and transpose[0] != 0):
        raise ValueError(f"transpose_forward: {list(transpose)}")
    if dimensions(arguments) != len(patch):
        raise ValueError(f"a patch of {len(patch)} axes for {dimensions(arguments)}D convolutions")
    return NnunetPlan(
        configuration=name,
        kind=kind,
        arguments=json.dumps(arguments, sort_keys=True),
        patch_size=patch,
        spacing=tuple(float(size) for size in chosen["spacing"]),
        transpose=transpose,
        channels=_channels(plans, description, chosen),
        data=_resampling(chosen, "data"),
        logits=_resampling(chosen, "probabilities"),
        names=names,
        region_values=values,
        reader=reader,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise VolumenError(
            path, f"cannot be read ({error})", remedy="copy it from nnU-Net's results again"
        ) from None


def _configuration(plans: Mapping[str, Any], name: str, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a configuration with what it inherits."""
    if name in heirs or name not in plans["configurations"]:
        known = ", ".join(plans["configurations"])
        raise ValueError(f"the configuration {name}; the plans have {known}")
    own = dict(plans["configurations"][name])
    parent = own.get("inherits_from")
    return own if parent is None else {**_configuration(plans, parent, (*heirs, name)), **own}


def _architecture(chosen: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the class of the network and its arguments, also of plans before version 2.3."""
    if "architecture" in chosen:
        stated = chosen["architecture"]
        return short_name(stated["network_class_name"]), dict(stated["arch_kwargs"])
    kind, ndim = chosen["UNet_class_name"], len(chosen["patch_size"])
    counts = chosen["n_conv_per_stage_encoder"]
    features = [
        min(chosen["UNet_base_num_features"] * 2**stage, chosen["unet_max_num_features"])
        for stage in range(len(counts))
    ]
    return kind, {
        "n_stages": len(counts),
        "features_per_stage": features,
        "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
        "kernel_sizes": chosen["conv_kernel_sizes"],
        "strides": chosen["pool_op_kernel_sizes"],
        "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage": counts,
        "n_conv_per_stage_decoder": chosen["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def _labels(description: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the names of the network's outputs, and the label values of regions."""
    labels = {name: value for name, value in description["labels"].items() if name != _IGNORE}
    if any(isinstance(value, list | tuple) and len(value) > 1 for value in labels.values()):
        regions = [name for name, value in labels.items() if value not in (0, [0])]
        order = tuple(int(value) for value in description["regions_class_order"])
        if len(order) != len(regions):
            raise ValueError(f"{len(order)} values in regions_class_order for {len(regions)} regions")
        return tuple(regions), order
    by_value = {int(v[0] if isinstance(v, list | tuple) else v): name for name, v in labels.items()}
    if sorted(by_value) != list(range(len(by_value))):
        raise ValueError(f"labels with gaps: {', '.join(map(str, sorted(by_value)))}")
    return tuple(by_value[value] for value in sorted(by_value)), ()


def _channels(
    plans: Mapping[str, Any], description: Mapping[str, Any], chosen: Mapping[str, Any]
) -> tuple[ChannelRule, ...]:
    properties = plans.get("foreground_intensity_properties_per_channel") or plans.get(
        "foreground_intensity_properties_by_modality", {}
    )
    count = len(description.get("channel_names") or description["modality"])
    schemes, masks = chosen["normalization_schemes"], chosen["use_mask_for_norm"]
    if not len(schemes) == len(masks) == count:
        raise ValueError(f"{len(schemes)} normalization schemes for {count} channels")
    rules = []
    for number, (scheme, masked) in enumerate(zip(schemes, masks, strict=True)):
        if scheme not in SCHEMES:
            raise ValueError(f"the normalization {scheme}")
        stated = properties[str(number)] if SCHEMES[scheme] == "ct" else {}
        keys = ("mean", "std", "percentile_00_5", "percentile_99_5") if stated else ()
        rules.append(
            ChannelRule(
                SCHEMES[scheme],
                bool(masked) and SCHEMES[scheme] == "zscore",
                tuple((key, float(stated[key])) for key in keys),
            )
        )
    return tuple(rules)


def _resampling(chosen: Mapping[str, Any], what: str) -> ResamplingRule:
    name = chosen.get(f"resampling_fn_{what}", RESAMPLING)
    options = chosen.get(f"resampling_fn_{what}_kwargs") or {}
    if name != RESAMPLING:
        raise ValueError(f"resampling by {name}")
    rule = ResamplingRule(int(options.get("order", 3)), options.get("force_separate_z", False))
    orders = (0, 1) if what == "probabilities" else (0, 1, 3)
    if rule.order not in orders or options.get("order_z", 0) != 0 or options.get("is_seg"):
        raise ValueError(f"resampling_fn_{what}_kwargs: {dict(options)}")
    return rule
