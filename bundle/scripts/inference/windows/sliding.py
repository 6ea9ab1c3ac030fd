"""Sliding-window prediction of a tensor in memory: for validation during training and for small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor

from volumen.data.space.reflection import reflected_positions
from volumen.inference.windows.blending import axis_weight_sums, gaussian_window
from volumen.inference.windows.plan import PredictPlan, fit_window
from volumen.utils.memory import limit_kept_memory


class SlidingWindow(Inferer):
    """A MONAI inferer that runs a network over windows and blends them, for networks with named outputs or with one.

    Args:
        patch_size: shape of a window.
        overlap: share of a window that the next one covers, in [0, 1).
        batch_size: windows per forward pass.
        targets: outputs to compute, so that only their decoders run; None: all. A network that concatenates its
            outputs always computes all.
        divisor: numbers by which a window's sides must be divisible, so that windows can shrink for small images;
            None: the `divisor` of the network. If it has none, windows do not shrink.

    Raises:
        ValueError: a batch size below 1 or an overlap outside [0, 1).
    """

    def __init__(
        self,
        patch_size: Sequence[int],
        overlap: float = 0.5,
        batch_size: int = 1,
        targets: Sequence[str] | None = None,
        divisor: Sequence[int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
        self.patch_size = tuple(int(p) for p in patch_size)
        self.overlap = overlap
        self.batch_size = batch_size
        self.targets = None if targets is None else tuple(targets)
        self.divisor = None if divisor is None else tuple(int(step) for step in divisor)

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the blended outputs of every target.

        Args:
            inputs: normalised image, shape (B, C, *space). The window shrinks for smaller images, see `fit_window`;
                beyond their borders they are reflected.
            network: returns a dict of tensors (B, K, *patch) for windows (B, C, *patch), or one such tensor.
            args: passed to the network.
            kwargs: passed to the network.

        Returns:
            Per target a float32 tensor of shape (B, K, *space) on the device of the inputs: logits or values, without
            activation. For a network that returns one tensor: one tensor.
        """
        if self.targets is not None and not getattr(network, "joined", False):
            kwargs = {"targets": self.targets, **kwargs}
        window = self.window(inputs.shape[2:], network)
        outputs = self._outputs(as_tensor(inputs), window, _Named(network), *args, **kwargs)
        return outputs.get(UNNAMED, outputs)

    def _outputs(
        self, inputs: Tensor, window: tuple[int, ...], network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        if tuple(inputs.shape[2:]) == window:
            return {name: output.float() for name, output in network(inputs, *args, **kwargs).items()}
        images = [self._image(image, window, network, *args, **kwargs) for image in inputs]
        return {name: torch.stack([image[name] for image in images]) for name in images[0]}

    def window(self, shape: Sequence[int], network: Any = None) -> tuple[int, ...]:
        """Return the window for an image of a spatial shape: no larger than the image needs.

        Args:
            shape: voxels per spatial axis.
            network: its `divisor` is used if this inferer has none.
        """
        divisor = self.divisor or getattr(network, "divisor", None)
        return self.patch_size if divisor is None else fit_window(self.patch_size, shape, divisor)

    def _image(
        self,
        image: Tensor,
        patch_size: tuple[int, ...],
        network: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        plan = PredictPlan(tuple(image.shape[1:]), patch_size, self.overlap, batch_size=self.batch_size)
        weights = torch.from_numpy(gaussian_window(patch_size)).to(image.device)
        sums: dict[str, Tensor] = {}
        for batch in plan.batches():
            starts = [plan.start(position) for position in batch]
            windows = torch.stack([cut_window(image, start, patch_size) for start in starts])
            for name, output in network(windows, *args, **kwargs).items():
                if name not in sums:
                    sums[name] = output.new_zeros((output.shape[1], *plan.shape), dtype=torch.float32)
                for start, window in zip(starts, output.float() * weights, strict=True):
                    add_window(sums[name], window, start)
            limit_kept_memory()
        for axis, total in enumerate(axis_weight_sums(plan)):
            shape = [1] * image.ndim
            shape[axis + 1] = -1
            divisor = torch.from_numpy(total).to(image.device).reshape(shape)
            for values in sums.values():
                values /= divisor
        return sums


UNNAMED = ""
"""Stands for the target of a network that gives one tensor."""


class _Named:
    """A network whose single tensor, if it gives one, has a name."""

    def __init__(self, network: Callable[..., Any]) -> None:
        self.network = network

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.network(*args, **kwargs)
        return {UNNAMED: outputs} if isinstance(outputs, Tensor) else outputs


def as_tensor(images: Tensor) -> Tensor:
    """Return images as a plain tensor: a `MetaTensor` costs ten times as much per operation."""
    return images.as_tensor() if isinstance(images, MetaTensor) else images


def cut_window(image: Tensor, start: tuple[int, ...], patch_size: tuple[int, ...]) -> Tensor:
    """Return the window (C, *patch) at a start, reflected where it sticks out of the image (C, *space)."""
    for axis, (first, count) in enumerate(zip(start, patch_size, strict=True), start=1):
        size = image.shape[axis]
        if first >= 0 and first + count <= size:
            image = image.narrow(axis, first, count)
        else:
            positions = torch.from_numpy(reflected_positions(first, count, size))
            image = image.index_select(axis, positions.to(image.device))
    return image


def add_window(total: Tensor, window: Tensor, start: tuple[int, ...]) -> None:
    """Add a window (K, *patch) to the sums (K, *space) at its place, cut at the border."""
    inside = tuple(
        slice(max(s, 0), min(s + p, n))
        for s, p, n in zip(start, window.shape[1:], total.shape[1:], strict=True)
    )
    local = tuple(slice(i.start - s, i.stop - s) for i, s in zip(inside, start))
    total[(slice(None), *inside)] += window[(slice(None), *local)]
