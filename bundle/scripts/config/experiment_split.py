"""Divides the data of an experiment into a training and a validation part."""

from __future__ import annotations

import logging
from collections import Counter
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volumen.config.experiment_network import ExperimentNetwork
from volumen.data.case_names import known_name
from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

if TYPE_CHECKING:
    from volumen.config.dataset import Profiles
    from volumen.config.targets import Target
    from volumen.data.datalist import CaseItems
    from volumen.data.pairing import Case
    from volumen.data.sampling.split import Split

logger = logging.getLogger(__name__)


class ExperimentSplit(ExperimentNetwork):
    """An experiment whose training and validation parts follow from its sections, its data and its labels."""

    @cached_property
    def split(self) -> Split:
        """The training and the validation regions; a resumed run always uses its recorded split."""
        from volumen.data.sampling.split_file import load_split

        if self.given_split is not None:
            return self.given_split
        recorded = self.resumed_file("split.json")
        if recorded is not None:
            split = load_split(recorded, self._shapes)
            if (split.fraction, split.seed, split.rule) != (*self._recorded, self._rule):
                logger.warning(
                    "%s: the split of the resumed run stays, whatever the settings of the split are now",
                    recorded,
                )
            return split
        return self._new_split()

    def _new_split(self) -> Split:
        """Return the split that the settings define."""
        from volumen.data.sampling.folds import held_out_groups, make_folds, read_fold
        from volumen.data.sampling.split import make_split, split_by_name
        from volumen.data.sampling.split_file import given_split

        data, recorded = self.dataset_config, self._recorded
        if self.data.validation_names is not None:
            return split_by_name(self._shapes, self.data.validation_names, *recorded, self._rule)
        if data.val_volumes is not None:
            return split_by_name(self._shapes, self._named_volumes(data.val_volumes), *recorded, self._rule)
        fold = read_fold(data.fold) if data.fold else None
        if self._has_listed_folds and data.split_path is None:
            return self._listed_fold(*(fold or (0, None)))
        if data.split_path is not None:
            return given_split(Path(data.split_path), self._shapes, *recorded, fold)
        if fold is not None:
            number, count = fold
            return make_folds(self._shapes, count, *recorded, self.class_profiles, self._groups)[number]
        if self._groups is not None:
            return held_out_groups(self._shapes, *recorded, self._groups, self.class_profiles)
        return make_split(self._shapes, self.patch_size, *recorded, self.labelled_profiles)

    def folds(self, count: int) -> list[Split]:
        """Return the splits of all folds.

        Args:
            count: number of folds.

        Raises:
            VolumenError: fewer groups than folds, volumes too small to be cut, or settings that name what validates.
        """
        from volumen.data.sampling.folds import make_folds
        from volumen.data.sampling.split_file import given_split

        data = self.dataset_config
        for key in ("val_volumes", "val_path"):
            if getattr(data, key) is not None:
                raise VolumenError(
                    f"{self.origin}: dataset_config.{key}",
                    "names what validates, which every fold does in its turn",
                    remedy="leave it out, or train without --folds",
                )
        if data.split_path is not None:
            path = Path(data.split_path)
            return [
                given_split(path, self._shapes, *self._recorded, (number, count)) for number in range(count)
            ]
        if self._has_listed_folds:
            return [self._listed_fold(number, count) for number in range(count)]
        return make_folds(self._shapes, count, *self._recorded, self.class_profiles, self._groups)

    def _listed_fold(self, number: int, count: int | None = None) -> Split:
        """Return the split in which a fold validates that a list of images states.

        Args:
            number: the fold.
            count: number of folds, which must be that of the list; None: not checked.

        Raises:
            VolumenError: the list has another number of folds.
        """
        from volumen.data.sampling.split import split_by_name

        folds = {name: fold for name, fold in self.layout.folds.items() if name in self._shapes}
        listed = max(self.layout.folds.values()) + 1
        if count not in (None, listed):
            raise VolumenError(
                self.layout.root,
                expected=f"{count} folds, as --fold or --folds says",
                found=f"{listed} in its list",
                remedy=f"give {listed}, or take the folds out of the list",
            )
        logger.info("fold %d of the %d that %s lists validates", number, listed, self.layout.root)
        held_out = [name for name, fold in folds.items() if fold == number]
        return split_by_name(self._shapes, held_out, *self._recorded, f"fold {number}/{listed}")

    @property
    def _has_listed_folds(self) -> bool:
        """Whether a list of images states folds, and no setting chooses otherwise."""
        data = self.dataset_config
        validates = data.fold is not None or self.tr_setup.tr_val_split < 1
        return bool(self.layout.folds) and data.group_by is None and validates

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {case.name: case.image.shape for case in self.cases}

    @property
    def _recorded(self) -> tuple[float, int]:
        return self.tr_setup.tr_val_split, self.tr_setup.seed

    @property
    def _rule(self) -> str:
        """The rule that chose the parts, as the split file records it; empty if share and seed did."""
        data = self.dataset_config
        if data.val_path:
            return f"val_path {Path(data.val_path).name}"
        if data.val_volumes is not None:
            return f"val_volumes {', '.join(data.val_volumes)}"
        if data.split_path is not None:
            fold = f", fold {data.fold}" if data.fold else ""
            return f"split {Path(data.split_path).name}{fold}"
        if data.fold or self._has_listed_folds:
            return f"fold {data.fold or f'0/{max(self.layout.folds.values()) + 1}'}"
        return "groups" if data.group_by is not None else ""

    @cached_property
    def _groups(self) -> dict[str, str] | None:
        from volumen.data.sampling.groups import find_groups

        rule = self.dataset_config.group_by
        return None if rule is None else find_groups(list(self._shapes), rule)

    def _named_volumes(self, patterns: list[str]) -> list[str]:
        """Return the names of the images that match the setting's entries, which may contain * and ?."""
        names, where = list(self._shapes), f"{self.origin}: dataset_config.val_volumes"
        found: list[str] = []
        for text in patterns:
            text = known_name(text, names)
            matches = [text] if text in names else [name for name in names if fnmatchcase(name, text)]
            if not matches:
                raise VolumenError(
                    where,
                    expected="names of images in the data",
                    found=repr(text),
                    remedy=closest(text, names) or f"known: {', '.join(names[:10])}",
                )
            found += matches
        for name, times in Counter(found).items():
            if times > 1:
                raise VolumenError(where, f"names the image {name!r} twice", remedy="name it once")
        return found

    @property
    def class_profiles(self) -> Profiles:
        """Numbers of labelled voxels in every slice along every axis, by case, and by target or class of a target."""
        from volumen.data.index.label_counts import MAX_CLASSES

        classes = {
            name: tuple(range(1, min(target.out_channels, MAX_CLASSES + 1)))
            for name, target in self.primary_targets.items()
            if target.kind == "multiclass"
        }
        return self.data.class_profiles(self.tr_setup.compute_loss_on_labeled_only, classes)

    @property
    def loss_sections(self) -> dict[str, dict[str, Any]]:
        """Arguments of `MultiTaskLoss` by target, with the weights of classes in the losses that take them."""
        from volumen.losses.class_weights import weighed_losses

        sections = super().loss_sections
        for name, weights in self.class_weights.items():
            if name in sections:
                exclusive = sections[name]["kind"] == "multiclass"
                losses = weighed_losses(sections[name]["losses"], weights, exclusive=exclusive)
                if not any({"weight", "pos_weight"} & set(entry["kwargs"]) for entry in losses):
                    raise VolumenError(
                        f"{self.origin}: targets.{name}.class_weights",
                        expected="a loss with weights of classes, such as "
                        + ("CrossEntropyLoss" if exclusive else "BCEWithLogitsLoss"),
                        found=", ".join(entry["name"] for entry in losses),
                        remedy="add one to its losses, or leave class_weights out",
                    )
                sections[name]["losses"] = losses
        return sections

    @cached_property
    def class_weights(self) -> dict[str, list[float]]:
        """Weight of each class by target, for targets whose entry states `class_weights`.

        Raises:
            VolumenError: a target without classes, or none of whose voxels is known.
        """
        found = {}
        for name, target in self.primary_targets.items():
            if target.class_weights is None:
                continue
            if target.kind not in ("binary", "multiclass", "multilabel") or target.instances is not None:
                raise VolumenError(
                    f"{self.origin}: targets.{name}.class_weights",
                    expected="a target of classes",
                    found=f"the kind {target.kind}" if target.instances is None else "instances",
                    remedy="leave it out",
                )
            given = target.class_weights
            found[name] = self._automatic_weights(target) if isinstance(given, str) else list(given)
        return found

    def _automatic_weights(self, target: Target) -> list[float]:
        """Return the weights of a target's classes by their share of the training part, and log them."""
        from volumen.config.dataset import cache_folder
        from volumen.data.index.class_counts import class_counts
        from volumen.losses.class_weights import automatic_weights
        from volumen.metrics.target_metrics import class_names

        exclusive = target.kind == "multiclass"
        voxels, known = class_counts(
            self.cases,
            self.split.train,
            target.name,
            target.out_channels,
            exclusive=exclusive,
            ignore=self.ignore_labels.get(target.name),
            cache_dir=cache_folder(self.dataset_config),
        )
        if not known.any():
            raise VolumenError(
                f"{self.origin}: targets.{target.name}.class_weights",
                expected="labelled voxels in the training part",
                found="none",
                remedy="give the weights as a list, or leave class_weights out",
            )
        shares = [float(value) for value in voxels / known.clip(1)]
        weights = automatic_weights(shares, exclusive=exclusive)
        section = {"out_channels": target.out_channels, "classes": target.classes}
        labels = class_names(target.name, target.kind, section)
        names = ["background", *labels] if exclusive else [label or "foreground" for label in labels]
        logger.info(
            "target %s: class weights %s",
            target.name,
            ", ".join(
                f"{name} {weight:g} ({100 * share:.3g} %)"
                for name, weight, share in zip(names, weights, shares, strict=True)
            ),
        )
        return weights

    def split_text(self) -> str:
        """Return the text of the run's split file."""
        from volumen.data.sampling.split_file import split_text

        return split_text(self.split, self.fingerprint)

    def items(self, part: str) -> CaseItems:
        """Return the images of a part with their labels as a MONAI data list, which is filled at first use.

        Args:
            part: `train` or `val`; an image that the split divides is in both.
        """
        from volumen.data.datalist import CaseItems

        def find() -> tuple[list[Case], list[str]]:
            boxes = self.split.train if part == "train" else self.split.val
            return [case for case in self.layout.cases if case.name in boxes], list(self.label_readings)

        return CaseItems(find)

    @property
    def validates(self) -> bool:
        """Whether there is a validation part."""
        return bool(self.split.val)
