"""Divides volumes into a training and a validation part that share no voxel.

Of several volumes, whole volumes are held out. Of a single one (or a single labelled one), a slab with labels is
held out that is at least one patch wide.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from volumen.data.caching.fingerprints import fingerprint_of
from volumen.data.caching.records import Records
from volumen.data.index.label_counts import CountRequest, LabelReader, SliceCounter, count_case
from volumen.utils.boxes import Box, whole_box
from volumen.utils.errors import VolumenError
from volumen.utils.terminal.progress import grow, hidden

logger = logging.getLogger(__name__)

Profiles = Mapping[str, Mapping[str, Sequence[np.ndarray]]]
"""By case and target: per axis, the number of labelled voxels in each slice across it. With classes, those of class 2
have the key "target=2". See `labelled_profiles`."""

MIN_REGION = 8
"""Least width of a training or validation region, in voxels along the split axis (or the patch, if smaller)."""

_DRAWS = 64


@dataclass(frozen=True)
class Split:
    """The regions of the volumes for training and for validation.

    Args:
        train, val: boxes by case name; every case is in at least one of them.
        fraction: requested share for training.
        seed: seed of the choice.
        rule: what chose the parts in place of fraction and seed alone, such as "fold 0/5"; empty for those.
    """

    train: dict[str, list[Box]]
    val: dict[str, list[Box]]
    fraction: float
    seed: int
    rule: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON or YAML."""

        def plain(part: Mapping[str, Sequence[Box]]) -> dict[str, list]:
            return {name: [[list(span) for span in box] for box in boxes] for name, boxes in part.items()}

        return {
            "train": plain(self.train),
            "val": plain(self.val),
            "fraction": self.fraction,
            "seed": self.seed,
            **({"rule": self.rule} if self.rule else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Split:
        """Return the split that `to_dict` described."""

        def boxes(part: Mapping[str, Sequence]) -> dict[str, list[Box]]:
            return {
                str(name): [tuple((int(a), int(b)) for a, b in box) for box in regions]
                for name, regions in part.items()
            }

        return cls(
            boxes(data["train"]),
            boxes(data["val"]),
            float(data["fraction"]),
            int(data["seed"]),
            str(data.get("rule", "")),
        )


def make_split(
    shapes: Mapping[str, Sequence[int]],
    patch_size: Sequence[int],
    train_fraction: float,
    seed: int,
    labelled: Profiles | None = None,
) -> Split:
    """Split volumes into training and validation regions; the same arguments always give the same split.

    Args:
        shapes: spatial shape by case name.
        patch_size: voxels per axis.
        train_fraction: share for training, above 0 and at most 1; 1 means no validation.
        seed: chooses among equally good splits.
        labelled: places of labels; without it, labels are assumed everywhere. A case without an entry, or with counts
            of zero, has no labels and is never held out.

    Returns:
        With two or more labelled volumes, whole volumes: round(n * (1 - train_fraction)) for validation, at least one
            and at most all but one, chosen so that the validation part's share of the labels is close to the requested
        one. With one labelled volume, a slab of it for validation and the rest for training (two boxes if the slab lies
        inside), along the axis with most patches unless the labels fit another axis better. If the volume is narrower
        than two patches, one of the regions or both are narrower than a patch and are padded when they are read (logged
        as a warning).

    Raises:
        VolumenError: there is no volume, or it is too small to be divided.
        ValueError: train_fraction is out of range.
    """
    if not 0 < train_fraction <= 1:
        raise ValueError(f"train_fraction must be above 0 and at most 1, got {train_fraction}")
    if not shapes:
        raise VolumenError(
            "dataset_config.data_path", "no volume to split", remedy="check images/ and labels/"
        )
    every = {name: [whole_box(shape)] for name, shape in shapes.items()}
    if train_fraction == 1:
        return Split(every, {}, train_fraction, seed)
    weights = {name: label_weights(shape, labelled, name) for name, shape in shapes.items()}
    candidates = [name for name in sorted(shapes) if any(weights[name].values())]
    if len(candidates) >= 2:
        held_out = _whole_volumes(candidates, weights, 1 - train_fraction, seed)
        train = {name: boxes for name, boxes in every.items() if name not in held_out}
        val = {name: every[name] for name in sorted(held_out)}
        return Split(train, val, train_fraction, seed)
    name = candidates[0] if candidates else max(sorted(shapes), key=lambda n: math.prod(shapes[n]))
    profiles = (labelled or {}).get(name, {})
    train_boxes, val_box = _slab(
        name, tuple(shapes[name]), tuple(patch_size), 1 - train_fraction, profiles, seed
    )
    return Split({**every, name: train_boxes}, {name: [val_box]}, train_fraction, seed)


def split_by_name(
    shapes: Mapping[str, Sequence[int]],
    held_out: Sequence[str],
    train_fraction: float,
    seed: int,
    rule: str = "",
) -> Split:
    """Return the split with the named volumes as validation part and all others as training part.

    Args:
        shapes: spatial shape by case name.
        held_out: names of the validation cases; none: no validation.
        train_fraction: value of the setting, which is recorded in the split.
        seed: value of the setting, which is recorded likewise.
        rule: what named the volumes, which is recorded too.

    Raises:
        VolumenError: no case is left for training.
    """
    whole = {name: [whole_box(shape)] for name, shape in shapes.items()}
    train = {name: boxes for name, boxes in whole.items() if name not in held_out}
    if not train:
        raise VolumenError(
            rule or "train#dataset#data",
            "no image is left for training",
            remedy="name fewer, or add some" if rule else "add some",
        )
    val = {name: boxes for name, boxes in whole.items() if name in held_out}
    return Split(train, val, train_fraction, seed, rule)


def labelled_profiles(
    cases: Sequence[Any],
    targets: Sequence[str],
    *,
    ignore_labels: Mapping[str, int | None] | None = None,
    classes: Mapping[str, Sequence[int]] | None = None,
    objects_only: bool = False,
    num_threads: int = 1,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> dict[str, dict[str, list[np.ndarray]]]:
    """Count labelled voxels in every slice across every axis, reading each stored label chunk once.

    Args:
        cases: opened cases.
        targets: names of the label targets.
        ignore_labels: label value that means unknown, by target.
        classes: label values (at most 63) by target that are counted one by one too.
        objects_only: as for `find_valid_patches`.
        num_threads: threads that read.
        cache_dir: folder that caches the counts until a label or mask changes, or None.
        progress: show a progress bar.

    Returns:
        By case name and target (those that the case has): one int64 array per axis, as long as that axis. The key of
            value 2 is "target=2".
    """
    from tqdm import tqdm

    ignore = ignore_labels or {}
    profiles: dict[str, dict[str, list[np.ndarray]]] = {}
    labels = [volume for case in cases for volume in case.labels.values()]
    with (
        Records.of(cache_dir, "labelled profiles", labels) as records,
        tqdm(total=0, desc="labelled share", unit="block", disable=hidden(progress), leave=False) as bar,
    ):
        for case in cases:
            labelled = [target for target in targets if target in case.labels]
            requests = {
                target: CountRequest(
                    ignore=ignore.get(target),
                    objects_only=objects_only,
                    classes=tuple((classes or {}).get(target, ())),
                )
                for target in labelled
            }
            keys = {t: _profile_key(case, t, requests[t]) if records.enabled else {} for t in labelled}
            found = {target: _cached_profile(keys[target], records) for target in labelled}
            counters = {
                target: SliceCounter(
                    LabelReader(case.labels[target], case.masks.get(target), requests[target])
                )
                for target in labelled
                if found[target] is None
            }
            count_case(counters, num_threads, partial(grow, bar), bar.update)
            for target, counter in counters.items():
                found[target] = counter.all_profiles
                records.put(
                    keys[target],
                    {
                        f"axis{axis}{key}": counts
                        for key, axes in counter.all_profiles.items()
                        for axis, counts in enumerate(axes)
                    },
                )
            profiles[case.name] = {
                f"{target}{key}": axes
                for target, of_key in found.items()
                for key, axes in (of_key or {}).items()
            }
    return profiles


def _profile_key(case: Any, target: str, request: CountRequest) -> dict[str, Any]:
    mask = case.masks.get(target)
    return {
        "labelled profile of": fingerprint_of(case.labels[target]),
        "mask": None if mask is None else fingerprint_of(mask),
        "ignore": request.ignore,
        "objects_only": request.objects_only,
        **({"classes": list(request.classes)} if request.classes else {}),
    }


def _cached_profile(key: Mapping[str, Any], records: Records) -> dict[str, list[np.ndarray]] | None:
    known = records.get(key)
    if known is None:
        return None
    classes = ["", *(f"={value}" for value in key.get("classes", ()))]
    ndim = len(known) // len(classes)
    return {of: [known[f"axis{axis}{of}"] for axis in range(ndim)] for of in classes}


def label_weights(shape: Sequence[int], labelled: Profiles | None, name: str) -> dict[str, float]:
    """Return the number of labelled voxels of each target in a volume, or its size if nothing is known."""
    if labelled is None:
        return {"": float(math.prod(shape))}
    return {target: float(np.sum(axes[0])) for target, axes in labelled.get(name, {}).items()}


def _whole_volumes(
    names: Sequence[str], weights: Mapping[str, Mapping[str, float]], share: float, seed: int
) -> set[str]:
    count = min(max(1, round(len(names) * share)), len(names) - 1)
    targets = sorted({target for name in names for target in weights[name]})
    totals = {t: sum(weights[name].get(t, 0.0) for name in names) for t in targets}
    rng = np.random.default_rng(seed)
    best: tuple[float, set[str]] | None = None
    for _ in range(_DRAWS):
        drawn = {names[i] for i in rng.permutation(len(names))[:count]}
        shares = [sum(weights[n].get(t, 0.0) for n in drawn) / totals[t] for t in targets if totals[t]]
        score = _distance(shares, share)
        if best is None or score < best[0] - 1e-12:
            best = (score, drawn)
    assert best is not None
    return best[1]


def _distance(shares: Sequence[float], requested: float) -> float:
    """Return the distance of the targets' validation shares from the requested one; a part without labels is worst."""
    return max(abs(s - requested) + (1.0 if s <= 0 or s >= 1 else 0.0) for s in shares)


def _slab(
    name: str,
    shape: tuple[int, ...],
    patch_size: tuple[int, ...],
    share: float,
    profiles: Mapping[str, Sequence[np.ndarray]],
    seed: int,
) -> tuple[list[Box], Box]:
    """Cut a validation slab from one volume; return the training boxes and the validation box."""
    axes = sorted(range(len(shape)), key=lambda a: (-shape[a] / patch_size[a], a))
    widths = {axis: _widths(shape[axis], patch_size[axis], share) for axis in axes}
    usable = [axis for axis in axes if widths[axis] is not None]
    if not usable:
        raise VolumenError(
            name,
            f"too small to be divided into training and validation (shape {shape}, patch {patch_size})",
            remedy="set tr_setup.tr_val_split to 1 (no validation), use smaller patches, or add a volume",
        )
    whole = [axis for axis in usable if shape[axis] >= 2 * patch_size[axis]]
    if not whole:
        logger.warning(
            "%s: shape %s is narrower than two patches of %s, so regions narrower than a patch are reflected",
            name, shape, patch_size,
        )  # fmt: skip
    flip = bool(np.random.default_rng(seed).integers(2))
    ranked: list[tuple[float, int, int, int, int]] = []
    for rank, axis in enumerate(whole or usable[:1]):
        width = widths[axis]
        assert width is not None
        for start, is_end in _positions(shape[axis], width, patch_size[axis], flip):
            totals = {t: float(np.sum(axes[axis])) for t, axes in profiles.items()}
            shares = [
                float(np.sum(axes[axis][start : start + width])) / totals[t]
                for t, axes in profiles.items()
                if totals[t]
            ]
            if not shares:
                shares = [width / shape[axis]]
            # An inner slab leaves two training boxes, and another axis has fewer patches: use these only for a better
            # split of the labels.
            score = _distance(shares, share) + (0.0 if is_end else 0.1) + 0.02 * rank
            ranked.append((score, len(ranked), axis, start, width))
    score, _, axis, start, width = min(ranked)
    if score >= 1:
        logger.warning("%s: no validation slab leaves labels on both sides; one part may hold no label", name)
    spans = [(0, start), (start + width, shape[axis])]
    box = whole_box(shape)

    def with_span(span: tuple[int, int]) -> Box:
        return (*box[:axis], span, *box[axis + 1 :])

    train = [with_span(span) for span in spans if span[1] - span[0] > 0]
    return train, with_span((start, start + width))


def _widths(extent: int, patch: int, share: float) -> int | None:
    """Return the widths of the validation slab along an axis, or None if the axis is too short."""
    least = min(MIN_REGION, patch)
    if extent < 2 * least:
        return None
    requested = round(extent * share)
    if extent >= 2 * patch:
        return min(max(requested, patch), extent - patch)
    # Too narrow for two patches: training gets a whole patch if at least a quarter patch is left for validation.
    rest = extent - patch
    if rest >= max(least, patch // 4):
        return rest
    return min(max(requested, least), extent - least)


def _positions(extent: int, width: int, patch: int, flip: bool) -> list[tuple[int, bool]]:
    """Return the candidate slabs as (start, whether it lies at an end), those at the ends first."""
    ends = [(extent - width, True), (0, True)]
    if flip:
        ends.reverse()
    inner = range(patch, extent - width - patch + 1, max(1, patch // 4))
    return ends + [(start, False) for start in inner]
