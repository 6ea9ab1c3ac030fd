"""Loads a trained network with all information of its checkpoint that prediction needs, and runs it on windows."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from volumen.checkpoints.file import CHECKSUM, read_file, verify_checksum
from volumen.checkpoints.nnunet_plan import results_folder
from volumen.data.space.geometry import AxisTurn, Geometry
from volumen.derived.channel_layout import ChannelLayout, make_layout
from volumen.inference.resampling import TrainedGrid
from volumen.inference.windows.blending import gaussian_window
from volumen.inference.windows.compiled import CompiledNetwork
from volumen.inference.windows.heads import PROBABILITIES, Head, encode_all, split_channels
from volumen.inference.windows.plan import fit_window
from volumen.inference.windows.sliding import SlidingWindow
from volumen.inference.windows.tta import AxisTransform, check_layouts, transforms
from volumen.inference.windows.window_rules import NNUNET, OURS, WindowRules
from volumen.utils.device import sent
from volumen.utils.errors import VolumenError
from volumen.utils.memory import limit_kept_memory
from volumen.utils.precision import autocast
from volumen.utils.sample_keys import PRETRAINED

if TYPE_CHECKING:
    from volumen.data.formats.volumes import ArrayVolume
    from volumen.inference.nnunet.preparation import Preparation
    from volumen.transforms.normalize import Normalizer

logger = logging.getLogger(__name__)

TIMED_BATCHES = 4


@dataclass(frozen=True)
class Predictor:
    """A network ready to predict.

    Args:
        network: returns a dict of logits (B, K, *patch) for windows (B, C, *patch) and accepts `targets=`.
        config: the experiment's snapshot, by section.
        targets: the network's outputs by name.
        normalizer: as in training; `for_volume` returns the function from a volume's raw values to float32.
        patch_size: the window with which the network was trained.
        spacing: voxel size of the training volumes, or None.
        unit: unit of the spacing, or None.
        resamples: whether images of another voxel size are resampled to `spacing`, as in training.
        assumed_spacing: voxel size of images that state none and are resampled, as the training's settings gave it.
        orientation: where the axes of its volumes ran to, such as "SAR", or None.
        in_channels: image channels that it takes.
        divisor: what a window's sides must be divisible by.
        path: the checkpoint.
        checksum: SHA-256 of the checkpoint, or "" for a network that comes from none.
        epoch: training epochs behind it, or None.
        strict: whether it had to hold every weight of the network, and no other.
        fused: targets whose label is read from several heads, with these heads.
        members: the networks of an ensemble, whose outputs are averaged; the other fields are those of the first one,
            but for path and checksum. Empty for a single network.
        home: device on which it predicts where its weights are not always there; None for where they are.
        preparation: prepares images for a network of another program, instead of `normalizer` and `spacing`.
        mirror_axes: the only axes along which test-time mirroring flips; None: all.
    """

    network: nn.Module
    config: Mapping[str, Any]
    targets: Mapping[str, Head]
    normalizer: Normalizer
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...] | None = None
    unit: str | None = None
    resamples: bool = False
    assumed_spacing: tuple[float, ...] | None = None
    orientation: str | None = None
    in_channels: int = 1
    divisor: tuple[int, ...] = ()
    path: str = ""
    checksum: str = ""
    epoch: int | None = None
    strict: bool = True
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    members: tuple[Predictor, ...] = ()
    home: torch.device | None = None
    preparation: Preparation | None = None
    mirror_axes: tuple[int, ...] | None = None

    @property
    def window_rules(self) -> WindowRules:
        """Where windows lie and how they are weighted."""
        return OURS if self.preparation is None else NNUNET

    @property
    def networks(self) -> tuple[Predictor, ...]:
        """The members of an ensemble, else this network alone."""
        return self.members or (self,)

    @property
    def device(self) -> torch.device:
        if self.home is not None:
            return self.home
        parameter = next(self.network.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def trained_grid(self) -> TrainedGrid | None:
        """The voxel size to which images are resampled; None where they are predicted as stored."""
        if not self.resamples or self.spacing is None:
            return None
        return TrainedGrid(Geometry(self.spacing, self.unit), self.assumed_spacing)

    def unfused(self) -> Predictor:
        """Return the predictor after its networks were set to read each label from its own head alone."""
        for member in self.networks:
            if member.fused:
                network: Any = member.network
                network.fuse(None)
        return replace(self, fused={}, members=tuple(replace(one, fused={}) for one in self.members))

    def heads(self, names: Sequence[str] | None = None) -> tuple[Head, ...]:
        """Return the heads of the named targets, or all.

        Raises:
            VolumenError: the network has no such target.
        """
        for name in names or ():
            if name not in self.targets:
                raise VolumenError(
                    self.path or "network",
                    expected=f"a target among {', '.join(self.targets)}",
                    found=repr(name),
                    remedy="choose --targets among them",
                )
        return tuple(self.targets[name] for name in (names or self.targets))

    def fit_patch(self, patch_size: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
        """Return the window for an image of a spatial shape, no larger than the image needs; see `fit_window`."""
        shrinks = self.divisor and self.window_rules.shrinks
        return fit_window(patch_size, shape, self.divisor) if shrinks else tuple(patch_size)

    def check_patch(self, patch_size: Sequence[int]) -> tuple[int, ...]:
        """Check that the network can process a window size, and return it.

        Raises:
            VolumenError: wrong number of axes, or a side that the network's strides do not divide.
        """
        patch = tuple(int(p) for p in patch_size)
        if len(patch) != len(self.patch_size):
            raise VolumenError("--patch-size", expected=f"{len(self.patch_size)} axes", found=f"{patch}")
        divisor = self.divisor or (1,) * len(patch)
        if any(p < 1 or p % d for p, d in zip(patch, divisor, strict=True)):
            raise VolumenError("--patch-size", expected=f"sides divisible by {divisor}", found=f"{patch}")
        return patch


def load_predictor(
    checkpoint_path: str | Path,
    device: str | torch.device = "cpu",
    network: nn.Module | None = None,
    *,
    strict: bool | None = None,
    fuse: bool | None = None,
) -> Predictor:
    """Load a checkpoint for prediction; no other file is needed.

    Args:
        checkpoint_path: a file with the keys `model`, `model_config` and `config`.
        device: device of the network.
        network: receives the weights; None: built from the checkpoint's `model_config`.
        strict: refuse a checkpoint that lacks or adds weights; False: warn of them; None: as its own setting
            `inference_config.load_strict` states.
        fuse: whether labels are read from several heads where the checkpoint states how; None: as its own setting
            `inference_config.fuse` states.

    Raises:
        VolumenError: no such file, not a checkpoint, a missing key, or weights that do not fit.
    """
    from volumen.checkpoints.finetune import inference_weights
    from volumen.networks.multihead import MultiHeadDynUNet
    from volumen.transforms.normalize import Normalizer

    path = Path(checkpoint_path)
    state = read_checkpoint(path)
    final_config = state["model_config"]
    config = state.get("config") or {}
    if network is None:
        network = MultiHeadDynUNet.from_config(final_config)
    if strict is None:
        strict = bool(config.get("inference_config", {}).get("load_strict", True))
    try:
        unmatched = network.load_state_dict(inference_weights(state), strict=strict)
    except RuntimeError as error:
        raise VolumenError(
            path, f"weights do not fit the network: {str(error).splitlines()[-1].strip()}"
        ) from None
    for names, what in (
        (unmatched.missing_keys, "are not in it and stay random"),
        (unmatched.unexpected_keys, "of it are left out"),
    ):
        if names:
            logger.warning("%s: %d weights %s: %s, ...", path, len(names), what, ", ".join(names[:3]))
    # The network may have been built by someone else, from a description that knows nothing of a fusion.
    fused = final_config.get("fusion") or {}
    if fused and isinstance(network, MultiHeadDynUNet):
        network.fuse(fused)
    network.to(device).eval()
    dataset = config.get("dataset_config", {})
    resamples = dataset.get("target_spacing") is not None
    given = None if resamples else dataset.get("spacing")
    spacing = given or dataset.get("trained_spacing")
    ndim = int(final_config["spatial_dims"])
    if fuse is None:
        fuse = bool(config.get("inference_config", {}).get("fuse", True))
    predictor = Predictor(
        network=network,
        config=config,
        targets=read_heads(final_config["heads"], config, ndim),
        normalizer=Normalizer.from_config(
            dataset.get("normalization_scheme", "unit"), dataset.get("intensity_properties") or None
        ),
        patch_size=_patch_size(path, config, ndim),
        spacing=None if spacing is None else tuple(float(s) for s in spacing),
        unit=None if given else dataset.get("trained_unit"),
        resamples=resamples,
        assumed_spacing=tuple(map(float, dataset["spacing"]))
        if resamples and dataset.get("spacing")
        else None,
        orientation=dataset.get("trained_orientation"),
        in_channels=int(final_config["in_channels"]),
        divisor=tuple(int(d) for d in getattr(network, "divisor", (1,) * ndim)),
        path=str(path),
        checksum=file_checksum(path),
        epoch=state.get("epoch"),
        strict=strict,
        fused={name: tuple(rule["weights"]) for name, rule in fused.items()},
    )
    return predictor if fuse else predictor.unfused()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content on the CPU, read without executing code (`weights_only`).

    Raises:
        VolumenError: no such file, unreadable, or without the keys that prediction needs.
    """
    if not path.is_file():
        raise VolumenError(path, "no such checkpoint", remedy="give the .pth file of a trained model")
    if results_folder(path) is not None:
        raise VolumenError(
            path, "a checkpoint of nnU-Net can only predict", remedy="give it to volumen predict -m"
        )
    state = read_file(path)
    if isinstance(state, dict) and CHECKSUM in state:
        state = verify_checksum(state, path)
    description = path.with_suffix(".json")
    if isinstance(state, dict) and "model" not in state and description.is_file():
        # A released model: one file with the weights alone, as MONAI reads them, and a JSON file with the rest.
        state = {**_read_description(description), "model": state}
    missing = [key for key in ("model", "model_config") if not isinstance(state, dict) or key not in state]
    if missing:
        weights_alone = isinstance(state, dict) and state and all(torch.is_tensor(v) for v in state.values())
        raise VolumenError(
            path,
            expected="a checkpoint of volumen train",
            found="weights alone" if weights_alone else f"none of its keys {missing}",
            remedy=f"put the model's {description.name} beside it" if weights_alone else "use another file",
        )
    if PRETRAINED in state["model_config"]:
        raise VolumenError(
            path, "an encoder pretrained without labels predicts no target",
            remedy="start a training from it with volumen train --finetune, and predict with that",
        )  # fmt: skip
    return state


def _read_description(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise VolumenError(path, f"not readable ({error})", remedy="get the released model again") from None


def read_heads(
    heads: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], ndim: int
) -> dict[str, Head]:
    """Return the outputs of a network by name, in its order.

    Args:
        heads: `final_config["heads"]`.
        config: the snapshot; without it, one channel is interpreted as a sigmoid, several as a softmax.
        ndim: spatial axes of the network.
    """
    labelled = config.get("dataset_config", {}).get("targets", {})
    tasks = config.get("auxiliary_tasks", {})
    result = {}
    for name, entry in heads.items():
        channels = int(entry["out_channels"])
        if name in tasks:
            kind = _task_kind(tasks[name])
            activation = tasks[name].get("activation") or ("sigmoid" if kind in PROBABILITIES else "none")
            result[name] = Head(
                name, channels, activation, kind, _task_layout(tasks[name], kind, ndim, channels)
            )
            continue
        target = labelled.get(name, {})
        activation = target.get("activation") or ("sigmoid" if channels == 1 else "softmax")
        kind = target.get("kind") or {"softmax": "multiclass", "none": "field"}.get(
            activation, "binary" if channels == 1 else "multilabel"
        )
        # Values of a label are scalars: a turn of the image moves them but does not change them.
        layout = make_layout(["scalars"], ndim, channels)
        result[name] = Head(
            name, channels, activation, kind, layout, tuple(target.get("region_values") or ())
        )
        if not target:
            logger.warning("the checkpoint says nothing of target %r: read as %s", name, activation)
    return result


def _task_kind(task: Mapping[str, Any]) -> str:
    from volumen.derived.registry import task_kind

    return task.get("kind") or task_kind(task["type"])


def _task_layout(task: Mapping[str, Any], kind: str, ndim: int, channels: int) -> ChannelLayout | None:
    from volumen.derived.registry import task_layout, task_types

    if task.get("kind") and task.get("type") not in task_types():
        return None
    params = {key: value for key, value in task.items() if key != "kind"}
    return task_layout(task["type"], ndim, {"out_channels": channels, **params})


def _patch_size(path: Path, config: Mapping[str, Any], ndim: int) -> tuple[int, ...]:
    for section in ("inference_config", "tr_config"):
        patch = config.get(section, {}).get("patch_size")
        if patch:
            return tuple(int(p) for p in patch)
    raise VolumenError(path, "holds no patch size", remedy=f"give --patch-size with {ndim} numbers")


def file_checksum(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _turned_back(turn: AxisTransform, head: Head, output: Tensor) -> Tensor:
    """Turn a head's output (B, C, *patch) for a turned window back; also its components if their layout is stated."""
    return turn.undo(output) if head.layout is None else turn.undo_components(output, head.layout)


class WindowNetwork:
    """Runs a batch of windows through the network and returns the weighted values to accumulate.

    Args:
        predictor: the network and its outputs.
        heads: the outputs to compute; only their decoders run.
        patch_size: shape of a window.
        tta: test-time augmentation, see `volumen.inference.windows.tta.transforms`.
        precision: "float32", "bfloat16" or "float16".
        compare: whether to append the outputs without augmentation as further channels.
        turn: how windows are turned before they enter the network; the outputs are turned back. None: not turned.
        stays: return tensors on the device, so that windows are blended there.
        compile: compile the network, see `CompiledNetwork`.
    """

    def __init__(
        self,
        predictor: Predictor,
        heads: Sequence[Head],
        patch_size: Sequence[int],
        *,
        tta: str = "none",
        precision: str = "float32",
        compare: bool = False,
        turn: AxisTurn | None = None,
        stays: bool = False,
        compile: bool = False,
    ) -> None:
        self.stays = stays
        self.predictor = predictor
        self.heads = tuple(heads)
        self.names = [head.name for head in self.heads]
        self.compare = compare
        self.channels = sum(head.blended_channels for head in self.heads) * (2 if compare else 1)
        self.timed = 0
        self.seconds = (0.0, 0.0)
        """Time of the first batches in the unaugmented pass and in all passes; 0 without augmentation."""
        check_layouts(self.heads, tta)
        self.base = None if turn is None else AxisTransform(turn.order, turn.flips)
        seen = tuple(patch_size) if turn is None else turn.of_axes(tuple(patch_size))
        self.turns: tuple[AxisTransform, ...] = transforms(
            tta, seen, predictor.spacing, predictor.mirror_axes
        )
        self.precision = precision
        self.device = predictor.device
        self._network: Any = (
            CompiledNetwork(predictor.network, self.device, precision) if compile else predictor.network
        )
        later = predictor.window_rules.later_centre
        weights = gaussian_window(tuple(patch_size), later_centre=later)
        self._weights = torch.from_numpy(weights).to(self.device)
        self._mean_weights = self._weights
        if len(self.turns) > 1:
            self._mean_weights = self._weights / self._counts(tuple(patch_size)).to(self.device)

    @torch.inference_mode()
    def __call__(self, windows: np.ndarray) -> Any:
        """Return weighted, encoded outputs.

        Args:
            windows: normalised images, float32, shape (B, C, *patch).

        Returns:
            Mean over the augmentations of the encoded outputs, times the blending weights: float32, shape
            (B, blended channels, *patch), an array, or with `stays` a tensor; with `compare` twice the channels.
        """
        began = first = self._clock()
        images = sent(windows, self.device)
        if self.base is not None:
            images = self.base.apply(images)
        total: Tensor | None = None
        plain: Tensor | None = None
        for turn in self.turns:
            with autocast(self.precision, self.device):
                outputs = self._network(turn.apply(images).contiguous(), targets=self.names)
            turned = {head.name: outputs[head.name].float() for head in self.heads}
            for step in (turn, *((self.base,) if self.base else ())):
                turned = {head.name: _turned_back(step, head, turned[head.name]) for head in self.heads}
            encoded = encode_all(self.heads, turned)
            if total is None:
                total, plain = encoded, encoded * self._weights if self.compare else None
                first = self._clock()
            else:
                total.add_(encoded)
        assert total is not None
        total *= self._mean_weights
        self._time(began, first)
        limit_kept_memory()
        weighted = total if plain is None else torch.cat([total, plain], dim=1)
        return weighted if self.stays else weighted.cpu().numpy()

    def _counts(self, patch_size: tuple[int, ...]) -> Tensor:
        """Return how many turned windows have a value: one number, or (blended channels, *patch)."""
        if all(part.kind != "offsets" for head in self.heads for part in head.layout or ()):
            return torch.tensor(float(len(self.turns)))
        counts = torch.zeros(sum(head.blended_channels for head in self.heads), *patch_size)
        parts = torch.split(counts, [head.blended_channels for head in self.heads])
        for turn in self.turns:
            for head, part in zip(self.heads, parts, strict=True):
                known = turn.known(head.layout or (), patch_size)
                part += 1 if known is None else known
        return counts

    def _clock(self) -> float:
        """Return the time after the device has finished its work; 0 if no time is measured."""
        if len(self.turns) == 1 or self.timed > TIMED_BATCHES:
            return 0.0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _time(self, began: float, first: float) -> None:
        if len(self.turns) == 1 or self.timed > TIMED_BATCHES:
            return
        if self.timed == 1:
            self.seconds = (0.0, 0.0)  # the first batch is a warm-up
        self.seconds = (self.seconds[0] + first - began, self.seconds[1] + self._clock() - began)
        self.timed += 1


def predict_array(
    predictor: Predictor,
    image: np.ndarray,
    *,
    targets: Sequence[str] | None = None,
    patch_size: Sequence[int] | None = None,
    overlap: float = 0.5,
    batch_size: int = 1,
    precision: str = "float32",
    spacing: Sequence[float] | None = None,
) -> dict[str, np.ndarray]:
    """Predict an image in memory.

    Args:
        predictor: the network.
        image: raw image, shape (C, *space).
        targets: targets to predict; None for all.
        patch_size: window; None: as in training. It shrinks for smaller images.
        overlap: share of a window that the next one covers.
        batch_size: windows per forward pass.
        precision: "float32", "bfloat16" or "float16".
        spacing: voxel size of the image per axis, in the unit of the training; of use where the network was trained
            at one voxel size (`target_spacing`), to which the image is resampled.

    Returns:
        Per target a float32 array (K, *space): probabilities, unit vectors, distances or tensors.

    Raises:
        VolumenError: a patch size, target or spacing that does not fit.
    """
    from volumen.data.formats.volumes import ArrayVolume
    from volumen.inference.intensity_check import check_intensities

    heads = predictor.heads(targets)
    if spacing is not None and len(spacing) != image.ndim - 1:
        raise VolumenError("spacing", expected=f"{image.ndim - 1} values", found=str(list(spacing)))
    volume = ArrayVolume(
        image,
        axes="c" + "zyx"[-(image.ndim - 1) :],
        spacing=None if spacing is None else tuple(float(size) for size in spacing),
        unit=predictor.unit,
        path="image",
    )
    check_intensities(predictor.config, predictor.normalizer, volume)
    settings = (heads, patch_size, overlap, batch_size, precision)
    with torch.inference_mode():
        blended = _blended(predictor.networks[0], volume, *settings)
        for member in predictor.networks[1:]:
            blended += _blended(member, volume, *settings)
        blended /= len(predictor.networks)
        parts = split_channels(heads, blended)
        return {head.name: head.decode(parts[head.name]).cpu().numpy() for head in heads}


def _blended(
    predictor: Predictor,
    volume: ArrayVolume,
    heads: Sequence[Head],
    patch_size: Sequence[int] | None,
    overlap: float,
    batch_size: int,
    precision: str,
) -> Tensor:
    """Return the blended outputs of one network for an image, see `predict_array`: (blended channels, *space)."""
    from volumen.data.resampled import ResampledVolume
    from volumen.inference.resampling import (
        check_resampled,
        length_factor,
        on_stored_grid,
        resampling_to_training,
    )
    from volumen.transforms.normalize import NormalizerOfType

    patch = predictor.check_patch(patch_size or predictor.patch_size)
    grid = resampling_to_training(predictor.trained_grid, volume)
    image: np.ndarray = volume.array
    normalize: Any = predictor.normalizer.for_array(image)
    if grid is not None:
        check_resampled(volume, heads)
        normalize = NormalizerOfType(normalize, image.dtype)
        image = ResampledVolume(volume, grid).read(tuple(slice(0, size) for size in grid.resampled_shape))
    normalised = torch.from_numpy(normalize(image)).to(predictor.device)

    def encoded(windows: Tensor) -> dict[str, Tensor]:
        with autocast(precision, predictor.device):
            outputs = predictor.network(windows, targets=[head.name for head in heads])
        return {"all": encode_all(heads, outputs)}

    inferer = SlidingWindow(patch, overlap, batch_size, divisor=predictor.divisor or None)
    blended = inferer(normalised[None], encoded)["all"][0]
    if grid is None:
        return blended
    found = on_stored_grid(blended.cpu().numpy(), grid, tuple(slice(0, size) for size in grid.shape))
    values = split_channels(heads, torch.from_numpy(found))
    assert predictor.trained_grid is not None
    factor = length_factor(grid, predictor.trained_grid.spacing_of(volume) or ())
    return torch.cat([values[h.name] * (factor if h.kind == "distance" else 1.0) for h in heads])
