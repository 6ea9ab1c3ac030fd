"""Runs a network that `torch.compile` has compiled, and compares its first outputs with those of the network itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from volumen.utils.compilation import compile_arguments, compiling
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

SETTING = "inference_config.compile"
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""Largest difference by precision; between the two, rounding differs after each layer."""


class CompiledNetwork:
    """A compiled network for windows of one shape, which checks itself at the first windows.

    Args:
        network: the network; called with images and `targets`, it returns outputs by target.
        device: where it runs.
        precision: of its products: "float32", "bfloat16" or "float16".

    Raises:
        VolumenError: there is no compiler.
    """

    def __init__(self, network: nn.Module, device: torch.device, precision: str) -> None:
        self.network = network
        self.precision = precision
        with compiling(SETTING, device):
            self._compiled: Any = torch.compile(network, **compile_arguments(True))
        self._device = device
        self._compared = False

    def __call__(self, images: Tensor, targets: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the outputs (B, K, *patch) by target, as the network does.

        Raises:
            VolumenError: the first outputs differ from those of the network, or the compiler fails.
        """
        if self._compared:
            outputs: Mapping[str, Tensor] = self._compiled(images, targets=targets)
            return outputs
        with compiling(SETTING, self._device):
            outputs = self._compiled(images.clone(), targets=targets)
        self._compare(self.network(images, targets=targets), outputs)
        self._compared = True
        return outputs

    def _compare(self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        """Log the largest difference of each target, as a share of its largest value (or of 1)."""
        differences = {
            name: float((found[name].float() - value.float()).abs().max() / value.abs().max().clamp_min(1.0))
            for name, value in expected.items()
        }
        text = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
        logger.info("the compiled network differs from the network by %s (share of the largest value)", text)
        for name, difference in differences.items():
            # This form of the comparison also refuses NaN.
            if not difference <= TOLERANCE[self.precision]:
                raise VolumenError(
                    SETTING,
                    f"target {name!r} of the compiled network differs from the network's",
                    expected=f"at most {TOLERANCE[self.precision]:g} of the largest value",
                    found=f"{difference:.3g}",
                    remedy="set it to false",
                )
