"""Random predictions and targets of every kind, and every loss with the kinds it takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from volumen.losses.base import VALUE_KINDS
from volumen.losses.registry import accepted_extras, build_loss, loss_class, loss_names

# Losses of other libraries that are tested through the wrapper: name, kwargs, kinds.
FOREIGN: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("torch.nn.L1Loss", {}, ("distance", "axis")),
    ("torch.nn.HuberLoss", {"delta": 0.5}, ("distance", "tensor")),
    ("torch.nn.BCEWithLogitsLoss", {"pos_weight": [2.0]}, ("binary",)),
    ("torch.nn.CrossEntropyLoss", {"weight": [1.0, 2.0, 3.0]}, ("multiclass",)),
    ("monai.losses.DiceLoss", {}, ("binary", "multiclass", "multilabel")),
    ("monai.losses.DiceCELoss", {}, ("binary", "multiclass")),
    ("monai.losses.FocalLoss", {}, ("binary", "multiclass")),
    ("GeneralizedDiceLoss", {}, ("multilabel", "multiclass")),
    ("monai.losses.TverskyLoss", {"alpha": 0.3}, ("binary",)),
    ("monai.losses.DiceFocalLoss", {}, ("multiclass",)),
]


def loss_cases() -> list[tuple[str, dict[str, Any], str]]:
    """Return (name, kwargs, kind) for every loss, so that a newly registered loss is tested automatically."""
    own = [(name, {}, kind) for name in loss_names() for kind in sorted(loss_class(name).kinds)]
    extra = [
        ("SignedDistanceLoss", {"eikonal": True, "eikonal_weight": 1.0}, "distance"),
        ("SoftDiceLoss", {"batch": True}, "multiclass"),
        ("SoftDiceLoss", {"squared": True}, "multilabel"),
        ("CrossEntropyLoss", {"weight": [1.0, 2.0, 3.0], "label_smoothing": 0.1}, "multiclass"),
        ("BCEWithLogitsLoss", {"pos_weight": 3.0, "label_smoothing": 0.1}, "binary"),
        ("TverskyLoss", {"gamma": 0.75}, "multiclass"),
        ("FocalLoss", {"alpha": 0.25, "gamma": 1.5}, "multiclass"),
        ("NormalSmoothnessLoss", {"q": 1.0}, "vector"),
        ("EigenvalueLoss", {"power": 1}, "tensor"),
        ("SkeletonRecallLoss", {"precomputed": True}, "binary"),
    ]
    foreign = [(name, kwargs, kind) for name, kwargs, kinds in FOREIGN for kind in kinds]
    return own + extra + foreign


def channels(kind: str, dims: int) -> int:
    """Return the channels of a prediction of this kind."""
    if kind == "tensor":
        return dims * (dims + 1) // 2
    return {"multiclass": 3, "multilabel": 2, "vector": dims, "axis": dims, "field": 2}.get(kind, 1)


def make_target(kind: str, shape: tuple[int, ...], generator: torch.Generator, dtype=torch.float32) -> Tensor:
    """Return a target (B, Ct, *spatial); distances are true distances, labels are blobs and not noise."""
    batch, *spatial = shape
    noise = torch.randn(batch, 1, *spatial, generator=generator, dtype=torch.float64)
    if kind in ("binary", "multilabel", "multiclass"):
        count = 2 if kind == "multilabel" else 1
        fields = torch.randn(batch, count, *spatial, generator=generator)
        level = torch.linspace(-1, 1, spatial[0]).view(1, 1, -1, *[1] * (len(spatial) - 1))
        label = (fields * 0.3 + level > 0).to(torch.uint8)
        return label + (level > 0.6).to(torch.uint8) if kind == "multiclass" else label
    if kind == "distance":
        axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in spatial], indexing="ij")
        away = torch.stack([a - n / 3 for a, n in zip(axes, spatial, strict=True)]).norm(dim=0) - 1.7
        return (away + 0.0 * noise).to(dtype)
    field = torch.randn(
        batch, channels(kind, len(spatial)), *spatial, generator=generator, dtype=torch.float64
    )
    return (F.normalize(field, dim=1) if kind in ("vector", "axis") else field).to(dtype)


class Case:
    """One loss with suitable data: `value(pred)` calls it with all extra arguments that it declares."""

    def __init__(
        self, name: str, kwargs: dict, kind: str, *, shape=(2, 5, 4, 6), seed=0, dtype=torch.float64
    ):
        generator = torch.Generator().manual_seed(seed)
        spacing = (1.0,) * (len(shape) - 1)
        self.loss = build_loss(name, kwargs, kind=kind, source_kind="binary", spacing=spacing).to(dtype)
        self.kind = kind
        size = (shape[0], channels(kind, len(shape) - 1), *shape[1:])
        self.pred = torch.randn(size, generator=generator, dtype=dtype)
        self.target = make_target(kind, shape, generator, dtype)
        self.mask = torch.rand(shape[0], 1, *shape[1:], generator=generator) > 0.2
        self.source = torch.randn(shape[0], 1, *shape[1:], generator=generator, dtype=dtype)
        self.extras = accepted_extras(self.loss)

    def value(self, pred=None, target=None, mask=None, source=None) -> Tensor:
        """Return the loss; arguments that are None are taken from the case."""
        extras = (
            {"source_pred": self.source if source is None else source} if "source_pred" in self.extras else {}
        )
        return self.loss(
            self.pred if pred is None else pred,
            self.target if target is None else target,
            mask=self.mask if mask is None else mask,
            **extras,
        )


__all__ = ["VALUE_KINDS", "Case", "channels", "loss_cases", "make_target"]
