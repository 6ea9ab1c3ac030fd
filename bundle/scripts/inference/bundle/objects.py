"""The objects that `inference.yaml` and `evaluate.yaml` declare: volumes as MONAI samples, transforms, the evaluator.

One iteration of the evaluator predicts one volume, streamed from file to file, since a volume need not fit in memory.
MONAI's steps for whole tensors (transforms before, a network call, transforms after) therefore run window by window.
The same objects define them: the preprocessing returns lazy volumes, the inferer defines the windows, the
postprocessing defines what is stored. Given a path instead of an opened volume, these objects process whole tensors,
as MONAI Label and the Deploy SDK use them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.config import KeysCollection
from monai.data import Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.transforms import Compose, MapTransform
from torch import Tensor

from volumen.inference.bundle.in_memory import monai_order, to_stored_grid
from volumen.inference.jobs import make_job, open_mask
from volumen.inference.output.stored import OutputSpec
from volumen.inference.postprocess.components import clean_array
from volumen.inference.postprocess.instance_output import resolve_request
from volumen.inference.predict import output_names, predict_volume
from volumen.inference.predictor import Predictor
from volumen.inference.request import PredictReport, PredictRequest, log_report
from volumen.inference.rules import CleaningRules
from volumen.inference.settings import request_fields
from volumen.inference.volume_plan import cleaning_rules, output_spec
from volumen.inference.windows.sliding import SlidingWindow
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.transforms.normalize import Normalizer

logger = logging.getLogger(__name__)

DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class NormalizedVolume:
    """A volume on disk whose regions are read normalised: the input of the network, lazily.

    Args:
        volume: the raw volume.
        normalizer: maps its values.
    """

    volume: Volume
    normalizer: Normalizer

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape."""
        return tuple(self.volume.shape)

    def read(self, region: tuple[slice, ...]) -> np.ndarray:
        """Return a region as float32 (C, *region)."""
        return self.normalizer(self.volume.read(region))


class VolumeDataset(Dataset):
    """The images of a prediction as MONAI samples: opened without reading their voxels, then preprocessed.

    Args:
        data: samples with the path of an `image` and, if it has one, of its `mask`.
        transform: the `preprocessing`, which leaves opened volumes on disk.
        axes: letters of the images' axes, for images whose metadata do not state them.
        level: resolution level of OME-Zarr images.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Callable[[dict[str, Any]], Any],
        axes: str | None = None,
        level: int = 0,
    ) -> None:
        super().__init__(data, transform)
        self.axes, self.level = axes, level

    def _transform(self, index: int) -> Any:
        return self.transform(self.open(self.data[index]))

    def open(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the paths `image` and `mask` of a sample by opened volumes.

        Raises:
            VolumenError: a file is unreadable, or the shapes differ.
        """
        from volumen.data.formats.opening import open_volume

        image = open_volume(sample["image"], axes=self.axes, level=self.level)
        opened = {"mask": open_mask(sample["mask"], image)} if "mask" in sample else {}
        return {**sample, "image": image, **opened}


class NormalizeVolumed(MapTransform):
    """Normalise images as in training.

    A `MetaTensor` (C, *space) of the stored type becomes float32, NaN and infinity 0. An opened volume becomes a
    `NormalizedVolume`, which is normalised as it is read.

    Args:
        normalizer: from the checkpoint; if it needs each volume's statistics, they are sampled here.
        keys: keys of the images in a sample.
        allow_missing_keys: whether samples may lack an image.
    """

    def __init__(
        self, normalizer: Normalizer, keys: KeysCollection = "image", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.normalizer = normalizer

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Normalise the images of a sample."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            image = sample[key]
            if not isinstance(image, Tensor):
                sample[key] = NormalizedVolume(image, self.normalizer.for_volume(image))
                continue
            raw = image.detach().cpu().numpy()
            normalised = self.normalizer.for_array(raw)(raw)
            np.nan_to_num(normalised, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
            values = torch.from_numpy(normalised)
            sample[key] = MetaTensor(values, meta=image.meta) if isinstance(image, MetaTensor) else values
        return sample


class StoreTargets(MapTransform):
    """Converts the network's outputs to stored values: activation, type, threshold, cleaning.

    `StreamVolume` does this block by block while it writes. Called with a sample, this transform converts outputs in
    memory, for programs that use only the network and the inferer of this bundle, see
    `volumen.inference.bundle.in_memory`.
    (A streamed prediction normalises vectors to length 1 in every window before it averages them; this transform
    normalises only the averages.)

    Args:
        predictor: defines the targets.
        dtype: uint8, float16, float32 or labels.
        threshold: smallest probability of label 1.
        min_size: label components of fewer voxels are removed.
        keep_largest: number of largest label components of each class that remain.
        fill_holes: holes of up to this many voxels are filled.
        keys: keys of the outputs in a sample.
        image_key: key of the image from which they were predicted.
        allow_missing_keys: whether samples may lack outputs.

    Raises:
        VolumenError: an unknown type, an impossible threshold, or cleaning rules although no labels are stored.
    """

    def __init__(
        self,
        predictor: Predictor,
        dtype: str = "uint8",
        threshold: float | None = None,
        min_size: int = 0,
        keep_largest: int | None = None,
        fill_holes: int = 0,
        keys: KeysCollection = "pred",
        image_key: str = "image",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.predictor = predictor
        self.image_key = image_key
        self.fields: dict[str, Any] = {
            "dtype": dtype,
            "threshold": threshold,
            "min_size": min_size,
            "keep_largest": keep_largest,
            "fill_holes": fill_holes,
        }
        self.rules: CleaningRules = cleaning_rules(self._request, self._stored(None))

    @property
    def _request(self) -> PredictRequest:
        return PredictRequest("", "", "", **self.fields)

    def _stored(self, names: Sequence[str] | None) -> list:
        return [output_spec(head, self._request) for head in self.predictor.heads(names)]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a sample with finished outputs.

        Args:
            data: `pred` holds blended outputs without activation, as `SlidingWindow` returns them for one image: the
                targets' tensors (C, *space) by name, or one tensor with all of them concatenated on channels
                (`network_def`).

        Returns:
            The sample with each target under its own name, as prediction would write it, (channels, *space). `pred`
            is the label map (1, *space) of the first target with labels: 0 is background; without such a target,
            it is the first target. Axes are in the order of the image, see `monai_order`.
        """
        sample = dict(data)
        for key in self.key_iterator(sample):
            outputs = self._by_target(sample[key])
            image = sample.get(self.image_key)
            finished = {
                stored.head.name: self._finish(stored, outputs[stored.head.name], image)
                for stored in self._stored(list(outputs))
            }
            for name, result in finished.items():
                # A target with the key of the image or of all outputs must not overwrite them.
                free = name if name not in (key, self.image_key) else f"{name}_target"
                sample[free] = monai_order(result, image)
            labelled = [head for head in self.predictor.heads(list(outputs)) if head.is_probability]
            first = next(iter(finished.values()))
            if labelled:
                shown = OutputSpec(labelled[0], "labels", self.fields["threshold"] or DEFAULT_THRESHOLD)
                first = self._finish(shown, outputs[labelled[0].name], image)
            sample[key] = monai_order(first, image)
        return sample

    def _by_target(self, outputs: Mapping[str, Tensor] | Tensor) -> Mapping[str, Tensor]:
        if not isinstance(outputs, Tensor):
            return outputs
        heads = self.predictor.heads()
        parts = torch.as_tensor(outputs).split([head.channels for head in heads], dim=0)
        return {head.name: part for head, part in zip(heads, parts, strict=True)}

    def _finish(self, stored: OutputSpec, output: Tensor, image: Any) -> np.ndarray:
        head = stored.head
        plain = output.as_tensor() if isinstance(output, MetaTensor) else output
        blend = to_stored_grid(head.encode(plain[None])[0], head, image)
        result = stored.of_blend(blend.cpu())
        if stored.is_labels and not self.rules.does_nothing:
            result = np.stack([clean_array(channel, self.rules) for channel in result])
        return result


def storing(postprocessing: Any) -> StoreTargets:
    """Return the `StoreTargets` of a `postprocessing`, whose settings a streamed prediction uses.

    Raises:
        VolumenError: there is none, or there are other transforms, which work only on outputs in memory.
    """
    transforms = getattr(postprocessing, "transforms", (postprocessing,))
    found = [transform for transform in transforms if hasattr(transform, "fields")]
    others = [type(transform).__name__ for transform in transforms if not hasattr(transform, "fields")]
    if len(found) != 1 or others:
        raise VolumenError(
            "postprocessing",
            expected="StoreTargets alone, since volumes are written block by block",
            found=", ".join(others) or f"{len(found)} of them",
            remedy="transform the written prediction instead",
        )
    return found[0]


class StreamVolume:
    """The evaluator's `iteration_update`: predicts one volume from file to file.

    The network, the windows (patch, overlap, batch size, targets) and the volume are the evaluator's `network`,
    `inferer` and batch. `engine.state.output` holds `image` (its path), `pred` (path of the prediction) and `report`.

    Args:
        predictor: information of the checkpoint besides the network.
        postprocessing: a `StoreTargets`, which defines how outputs are stored, or a MONAI `Compose` of it.
        output_dir: folder of the predictions.
        settings: more fields of `PredictRequest`, under its names or those of `inference_config`; the settings of the
            inferer and the postprocessing take precedence.
    """

    def __init__(
        self,
        predictor: Predictor,
        postprocessing: StoreTargets | Compose,
        output_dir: str,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.predictor = predictor
        self.postprocessing = storing(postprocessing)
        self.output_dir = str(output_dir)
        self.settings = request_fields(settings or {})

    def request(self, image: str, inferer: SlidingWindow, device: Any = "cpu") -> PredictRequest:
        """Return the request for one image."""
        fields = {
            **self.settings,
            **self.postprocessing.fields,
            "input": image,
            "checkpoint": self.predictor.path,
            "output": self.output_dir,
            "device": str(device),
            "patch_size": inferer.patch_size,
            "overlap": inferer.overlap,
            "batch_size": inferer.batch_size,
            "targets": inferer.targets,
        }
        return PredictRequest(**fields)

    def __call__(self, engine: SupervisedEvaluator, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Predict the volume of a sample; the class describes the returned values.

        Raises:
            VolumenError: an error that the user can correct.
        """
        image: NormalizedVolume = batch["image"]
        inferer: Any = engine.inferer
        request = self.request(image.volume.path, inferer, engine.state.device)
        predictor = replace(self.predictor, network=engine.network, normalizer=image.normalizer)
        request = resolve_request(request, predictor)
        names = output_names(predictor, request)
        job = make_job(image.volume, batch.get("mask"), request.output, names, request.format)
        report = predict_volume(predictor, job, request)
        output = {"image": image.volume.path, "pred": report.output, "report": report}
        engine.state.output = output
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return output


class TellVolumes:
    """Logs a line per predicted volume, and at the end the score if there are labels."""

    def attach(self, engine: Engine) -> None:
        """Add the handlers to the evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._log_volume)
        engine.add_event_handler(Events.COMPLETED, self._log_score)

    def _log_volume(self, engine: Engine) -> None:
        output: Any = engine.state.output
        log_report(PredictReport((output["report"],)))

    def _log_score(self, engine: Engine) -> None:
        for name, value in engine.state.metrics.items():
            logger.info("%s of the predictions that have labels: %.4f", name, value)
