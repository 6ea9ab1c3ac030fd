"""Loads the weights of a checkpoint that match a network, and reports which did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoadReport:
    """The result of loading, for every weight.

    Args:
        loaded: names that module and state have with the same shape.
        missing: names that only the module has; their values do not change.
        unexpected: names that only the state has.
        mismatched: names that both have, with the module's shape and the state's.
        is_encoder: whether the state is a pretrained encoder, of which all was loaded.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    is_encoder: bool = False

    def summary(self, names: int = 5) -> str:
        """Return one line with the counts and the first few names of what was not loaded."""
        parts = [f"loaded {len(self.loaded)} weights"]
        differing = tuple(f"{name} {theirs} for {ours}" for name, ours, theirs in self.mismatched)
        for what, given in (
            ("of another shape", differing),
            ("missing in the file", self.missing),
            ("not in the network", self.unexpected),
        ):
            if given:
                more = f" and {len(given) - names} more" if len(given) > names else ""
                parts.append(f"{len(given)} {what} ({', '.join(given[:names])}{more})")
        return "; ".join(parts)


def load_partial(module: nn.Module, state_dict: Mapping[str, Tensor]) -> LoadReport:
    """Copy into a module every tensor of the same name and shape; the module's other values do not change.

    Args:
        module: the network, changed in place.
        state_dict: name to tensor, on any device; `module.` and `_orig_mod.` prefixes, which
            DistributedDataParallel and `torch.compile` leave, are dropped.

    Returns:
        What was loaded and what was not.
    """
    given = {plain_name(name): tensor for name, tensor in state_dict.items()}
    own = module.state_dict()
    shared = [name for name in own if name in given]
    loaded = tuple(name for name in shared if own[name].shape == given[name].shape)
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(given[name])
    return LoadReport(
        loaded=loaded,
        missing=tuple(name for name in own if name not in given),
        unexpected=tuple(name for name in given if name not in own),
        mismatched=tuple(
            (name, tuple(own[name].shape), tuple(given[name].shape)) for name in shared if name not in loaded
        ),
    )


def plain_name(name: str) -> str:
    """Return a weight's name without the prefixes of wrappers."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", 1)[1]
    return name
