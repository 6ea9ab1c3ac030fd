"""Which heads the label of a target may be read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from volumen.derived.evidence import label_evidence
from volumen.utils.errors import VolumenError


def fusible_heads(
    target: str,
    fuse: str | Sequence[str],
    *,
    kind: str,
    instances: str | None,
    tasks: Mapping[str, Mapping[str, Any]],
    ndim: int,
    where: str,
) -> dict[str, tuple[int, ...]]:
    """Return the heads that a label is read from, its own first, with the sign of each of their channels.

    Args:
        target: the labelled target.
        fuse: "auto", or heads.
        kind: kind of the target.
        instances: what the target makes of labels that number instances, or None.
        tasks: the derived targets: type, source_target and further parameters by name.
        ndim: 2 or 3.
        where: the key of `fuse`, for errors.

    Returns:
        Head to signs, see `label_evidence`; the target's own head alone if no other one says anything.

    Raises:
        VolumenError: the target is not binary, or a listed head is none or says nothing about this target.
    """
    if kind != "binary":
        raise VolumenError(
            where,
            expected="none, because only a binary target can be read from several heads",
            found=f"{fuse if isinstance(fuse, str) else ', '.join(fuse)} for kind {kind}",
            remedy="remove fuse, or make one binary target per class",
        )
    # A boundary or an interior of instances is another set of voxels than what the tasks are derived from.
    of_label = instances in (None, "foreground")
    speaking = {
        name: signs
        for name, task in tasks.items()
        if of_label
        and task.get("source_target") == target
        and not task.get("classes")
        and (signs := label_evidence(task, ndim)) is not None
    }
    chosen = list(speaking) if fuse == "auto" else list(fuse)
    for name in chosen:
        if name not in speaking and name != target:
            raise VolumenError(
                where,
                expected=f"heads that speak for {target}: {', '.join(speaking) or 'there are none'}",
                found=name if name in tasks else f"{name}, which is no derived head",
                remedy="list distances, affinities, skeletons or boundaries of one side derived from this target",
            )
    return {target: (1,), **{name: signs for name, signs in speaking.items() if name in chosen}}
