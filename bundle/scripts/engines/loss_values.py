"""The losses of a step, which stay on the device until somebody reads them: reading makes the host wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class LossValues(Mapping[str, float]):
    """The total and every component of a loss by name: a mapping to floats, fetched in one transfer when it is read.

    A target without a valid voxel has no components, because a loss of 0 would look like a perfect one.

    Args:
        names: the names.
        values: float32 (K,), their values.
        counted: bool (K,), whether the name is in the mapping.
    """

    def __init__(self, names: tuple[str, ...], values: Tensor, counted: Tensor) -> None:
        self.names, self.values_on_device, self.counted = names, values, counted
        self._read: dict[str, float] | None = None

    @property
    def is_cheap(self) -> bool:
        """Whether reading does not wait for a device."""
        return self._read is not None or self.values_on_device.device.type == "cpu"

    def _floats(self) -> dict[str, float]:
        if self._read is None:
            values, counted = torch.stack([self.values_on_device, self.counted.float()]).tolist()
            self._read = {name: value for name, value, here in zip(self.names, values, counted) if here}
        return self._read

    def __getitem__(self, name: str) -> float:
        return self._floats()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._floats())

    def __len__(self) -> int:
        return len(self._floats())

    def __repr__(self) -> str:
        return repr(self._floats())


UNLABELLED_LOSS = "unlabelled"
"""Name of what a network learns from unlabelled patches; no target may have it then."""


def loss_values(total: Tensor, loss_function: Any, unlabelled: Tensor | None = None) -> LossValues:
    """Return the values of a loss that was just computed.

    Args:
        total: scalar.
        loss_function: may have `components`, name to scalar, and `present`, target to bool scalar.
        unlabelled: the part of the total that unlabelled patches have, if there are any.
    """
    components: dict[str, Tensor] = dict(getattr(loss_function, "components", None) or {})
    if unlabelled is not None:
        components[UNLABELLED_LOSS] = unlabelled
    present: dict[str, Tensor] = dict(getattr(loss_function, "present", None) or {})
    total = total.detach()
    values = torch.stack([_scalar(value, total) for value in (total, *components.values())])
    always = torch.ones((), dtype=torch.bool, device=total.device)
    counted = [present.get(name.split("/")[0], always) for name in components]
    there = torch.stack([always, *(_scalar(value, total) > 0 for value in counted)])
    return LossValues(("loss", *components), values, there)


def _scalar(value: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(value, device=like.device).detach().float().reshape(())
