"""What `inference.yaml` and `evaluate.yaml` declare: volumes as MONAI samples, and the objects that run.

One iteration of the evaluator is one volume, streamed from file to file: volumes need not fit in memory, so what MONAI
does with whole tensors (transforms before, a network call, transforms after) happens here window by window, by the
same objects: the preprocessing gives lazy volumes, the inferer says the windows, the postprocessing what is stored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from torch import Tensor

from volumen.inference.jobs import make_job, open_mask
from volumen.inference.postprocess.components import clean_array
from volumen.inference.postprocess.instance_output import settle_request
from volumen.inference.predict import cleaning_rules, output_names, predict_volume, stored_as
from volumen.inference.predictor import Predictor
from volumen.inference.request import PredictReport, PredictRequest, log_report
from volumen.inference.rules import CleaningRules
from volumen.inference.settings import request_fields
from volumen.inference.windows.sliding import SlidingWindow

if TYPE_CHECKING:
    from volumen.data.formats.volumes import Volume
    from volumen.transforms.normalize import Normalizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NormalizedVolume:
    """A volume on disk whose regions are read normalised: the input of the network, lazily.

    Args:
        volume: the raw volume.
        normalizer: what maps its values.
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


class OpenVolumed:
    """Open the image of a sample, and its mask if it has one, without reading their voxels.

    Args:
        axes: letters of the images' axes where their metadata leave them open.
        level: resolution level of OME-Zarr images.
    """

    def __init__(self, axes: str | None = None, level: int = 0) -> None:
        self.axes, self.level = axes, level

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the paths `image` and `mask` by volumes.

        Raises:
            VolumenError: unreadable, or shapes that differ.
        """
        from volumen.data.formats.volumes import open_volume

        image = open_volume(data["image"], axes=self.axes, level=self.level)
        opened = {"mask": open_mask(data["mask"], image)} if "mask" in data else {}
        return {**data, "image": image, **opened}


class NormalizeVolumed:
    """Wrap the opened image of a sample so that it is read as the network was trained on it.

    Args:
        normalizer: of the checkpoint; where it goes by each volume's own statistics, they are sampled here.
    """

    def __init__(self, normalizer: Normalizer) -> None:
        self.normalizer = normalizer

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the volume `image` by a `NormalizedVolume`."""
        volume = data["image"]
        return {**data, "image": NormalizedVolume(volume, self.normalizer.for_volume(volume))}


class StoreTargets:
    """What becomes of the network's outputs: activation, type, threshold, cleaning.

    `StreamVolume` does it block by block while it writes. Called with a sample, it does the same to outputs in memory,
    for programs that take the network and the inferer of this bundle by themselves. (Prediction makes vectors unit in
    every window before it averages them, this only afterwards.)

    Args:
        predictor: knows the targets.
        dtype: uint8, float16, float32 or labels.
        threshold: labels from this probability on.
        min_size: label components of fewer voxels are removed.
        keep_largest: label components kept of each class.
        fill_holes: holes of up to this many voxels are filled.

    Raises:
        VolumenError: an unknown type, an impossible threshold, or rules for what is not stored as labels.
    """

    def __init__(
        self,
        predictor: Predictor,
        dtype: str = "uint8",
        threshold: float | None = None,
        min_size: int = 0,
        keep_largest: int | None = None,
        fill_holes: int = 0,
    ) -> None:
        self.predictor = predictor
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
        return [stored_as(head, self._request) for head in self.predictor.heads(names)]

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the data with `pred` finished.

        Args:
            data: `pred` maps each target to its blended output (C, *space), no activation, as of `SlidingWindow`.

        Returns:
            `pred` maps each target to the array that prediction would write, (channels, *space).
        """
        outputs: Mapping[str, Tensor] = data["pred"]
        finished = {}
        for stored in self._stored(list(outputs)):
            head = stored.head
            encoded = head.encode(outputs[head.name][None])[0]
            result = stored.convert(head.decode(encoded).cpu().numpy())
            if stored.is_labels and not self.rules.does_nothing:
                result = np.stack([clean_array(channel, self.rules) for channel in result])
            finished[head.name] = result
        return {**data, "pred": finished}


class StreamVolume:
    """One iteration of the evaluator: predicts one volume from file to file (its `iteration_update`).

    The network, the windows (patch, overlap, batch size, targets) and the volume are the evaluator's `network`,
    `inferer` and batch. `engine.state.output` holds `image` (its path), `pred` (path of the prediction) and `report`.

    Args:
        predictor: what the checkpoint says beside the network.
        postprocessing: what is stored of the outputs.
        output_dir: where predictions go.
        settings: more fields of `PredictRequest`, under its names or those of `inference_config`; what the inferer and
            the postprocessing say goes before them.
    """

    def __init__(
        self,
        predictor: Predictor,
        postprocessing: StoreTargets,
        output_dir: str,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.predictor = predictor
        self.postprocessing = postprocessing
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
        """Predict the volume of a sample; see the class for what is returned.

        Raises:
            VolumenError: for whatever a user can set right.
        """
        image: NormalizedVolume = batch["image"]
        inferer: Any = engine.inferer
        request = self.request(image.volume.path, inferer, engine.state.device)
        predictor = replace(self.predictor, network=engine.network, normalizer=image.normalizer)
        request = settle_request(request, predictor)
        names = output_names(predictor, request)
        job = make_job(image.volume, batch.get("mask"), request.output, names, request.format)
        report = predict_volume(predictor, job, request)
        output = {"image": image.volume.path, "pred": report.output, "report": report}
        engine.state.output = output
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return output


class TellVolumes:
    """Log a line per predicted volume, and the score at the end where there are labels."""

    def attach(self, engine: Engine) -> None:
        """Follow the evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._tell)
        engine.add_event_handler(Events.COMPLETED, self._tell_score)

    def _tell(self, engine: Engine) -> None:
        output: Any = engine.state.output
        log_report(PredictReport((output["report"],)))

    def _tell_score(self, engine: Engine) -> None:
        for name, value in engine.state.metrics.items():
            logger.info("%s of the predictions that have labels: %.4f", name, value)
