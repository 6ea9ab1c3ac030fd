"""What a run is about to do, told in the log before it begins."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scripts.config import ConfigManager

logger = logging.getLogger(__name__)


def log_experiment(config: ConfigManager) -> None:
    """Log data, targets, split and the network's plan.

    Args:
        config: the run's configuration; asking it opens the data.
    """
    cases = config.cases
    shapes = sorted({"x".join(map(str, case.image.shape)) for case in cases})
    logger.info(
        "data: %d %s volume%s of %s in %s, %dD, %d channel%s, %s, spacing %s",
        len(cases),
        config.layout.format,
        "s" * (len(cases) != 1),
        ", ".join(shapes[:3]) + (", ..." if len(shapes) > 3 else ""),
        config.layout.root,
        config.spatial_dims,
        config.in_channels,
        "s" * (config.in_channels != 1),
        cases[0].image.dtype,
        " ".join(f"{value:g}" for value in config.spacing),
    )
    for target in config.targets.values():
        losses = " + ".join(f"{loss.weight:g} {loss.name}" for loss in target.losses)
        origin = f"{target.task_type} of {target.source_target}" if target.auxiliary_task else "labelled"
        logger.info(
            "target %s: %s, %s, %d channel%s, weight %g, %s",
            target.name,
            origin,
            target.kind,
            target.out_channels,
            "s" * (target.out_channels != 1),
            target.weight,
            losses,
        )
    train, val = config.split.train, config.split.val
    logger.info("split: train on %s; validate on %s", _regions(train), _regions(val) or "nothing")
    logger.info("network plan:\n%s", config.plan.table())


def _regions(part: dict) -> str:
    if len(part) > 4:
        return f"{len(part)} volumes"
    return "; ".join(
        f"{name} " + " and ".join("[" + ", ".join(f"{a}:{b}" for a, b in box) + "]" for box in boxes)
        for name, boxes in part.items()
    )
