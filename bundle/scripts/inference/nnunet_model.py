"""Loads a network of nnU-Net v2 for prediction."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from volumen.checkpoints.nnunet_plan import NnunetPlan, read_checkpoint, read_plan, results_folder
from volumen.data.datalist import LABEL
from volumen.derived.channel_layout import make_layout
from volumen.inference.nnunet.preparation import Preparation
from volumen.inference.predictor import Predictor, file_checksum
from volumen.inference.windows.heads import Head
from volumen.networks.nnunet import NnunetNetwork
from volumen.transforms.normalize import Normalizer
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

_USUAL_TRAINER = re.compile(r"nnUNetTrainer(_\d+epochs?|NoMirroring)?")


class NamedOutput(nn.Module):
    """A network with one output, as those of volumen have several: returns a mapping with it.

    Args:
        network: images (B, C, *patch) to logits (B, K, *patch).
        name: of the output.
        slices: whether a 2D network gets windows of one slice of a volume, (B, C, 1, Y, X).
    """

    def __init__(self, network: nn.Module, name: str, *, slices: bool = False) -> None:
        super().__init__()
        self.network, self.name, self.slices = network, name, slices

    def forward(self, images: Tensor, targets: object = None) -> dict[str, Tensor]:
        if not self.slices:
            return {self.name: self.network(images)}
        return {self.name: self.network(images.squeeze(2)).unsqueeze(2)}


def load_nnunet_predictor(
    path: str | Path, device: str | torch.device = "cpu", *, predicts_on: torch.device | None = None
) -> Predictor:
    """Load one fold of a network that nnU-Net v2 trained.

    Args:
        path: checkpoint of the fold, in a folder with nnU-Net's `plans.json` and `dataset.json`.
        device: device of the network.
        predicts_on: device of the prediction, if the network is moved there later.

    Raises:
        VolumenError: the plan is not supported, or the checkpoint does not fit it.
    """
    path = Path(path)
    folder = results_folder(path)
    if folder is None:
        raise VolumenError(path, expected="plans.json and dataset.json two folders above it", found="none")
    state = read_checkpoint(path)
    plan = read_plan(folder, state["configuration"])
    if state["trainer"] and not _USUAL_TRAINER.fullmatch(state["trainer"]):
        logger.warning(
            "%s: trained by %s; if that changes the network beyond its weights, the prediction differs from its own",
            path,
            state["trainer"],
        )
    head = _head(plan)
    network = NnunetNetwork(plan.kind, plan.network_arguments, len(plan.channels), head.channels)
    _load_weights(network, state["weights"], path)
    flat, mirror = len(plan.patch_size) == 2 and not plan.is_flat, state["mirror_axes"]
    ahead = (1,) if flat else ()
    named = NamedOutput(network, head.name, slices=flat)
    named.to(device).eval()
    return Predictor(
        network=named,
        config=_config(plan, head, predicts_on or torch.device(device), bool(mirror)),
        targets={head.name: head},
        normalizer=Normalizer("none"),
        patch_size=(*ahead, *plan.patch_size),
        in_channels=len(plan.channels),
        divisor=(*ahead, *network.divisor),
        path=str(path),
        checksum=file_checksum(path),
        epoch=state["epoch"],
        preparation=Preparation(plan),
        mirror_axes=tuple(axis + len(ahead) for axis in mirror),
    )


def _head(plan: NnunetPlan) -> Head:
    """Return the network's output: classes that exclude each other, or regions that may overlap."""
    ndim = 2 if plan.is_flat else 3
    layout = make_layout(["scalars"], ndim, len(plan.names))
    if plan.region_values:
        return Head(LABEL, len(plan.names), "sigmoid", "multilabel", layout, plan.region_values)
    return Head(LABEL, len(plan.names), "softmax", "multiclass", layout)


def _config(plan: NnunetPlan, head: Head, device: torch.device, mirrors: bool) -> dict[str, object]:
    """Return the snapshot that a training of volumen would have left, with the defaults of nnUNetv2_predict."""
    entry = {"kind": head.kind, "out_channels": head.channels, "activation": head.activation}
    names = (
        {"region_values": list(plan.region_values)} if plan.region_values else {"classes": list(plan.names)}
    )
    inference = {
        "tta": "mirror" if mirrors else "none",
        "skip_empty": False,
        "amp": "off" if device.type == "cpu" else "auto",
    }
    return {
        "dataset_config": {"targets": {head.name: {**entry, **names}}, "normalization_scheme": "none"},
        "inference_config": inference,
        "nnunet": {"configuration": plan.configuration, "network": plan.kind, "spacing": list(plan.spacing)},
    }


def _load_weights(network: NnunetNetwork, weights: dict[str, Tensor], path: Path) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise VolumenError(
            path,
            f"weights do not fit the network of the plans: {str(error).splitlines()[-1].strip()}",
            remedy="predict with nnUNetv2_predict: its trainer may have changed the network",
        ) from None
