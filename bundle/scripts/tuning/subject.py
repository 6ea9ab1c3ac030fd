"""What is tuned: a label target or instances, by which score, from which defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from volumen.inference.postprocess.instance_output import head_kinds, resolve_request
from volumen.inference.rules import resolve_rules
from volumen.inference.windows.heads import PROBABILITIES
from volumen.metrics.score_names import (
    INSTANCES,
    checked_names,
    family_of,
    measures,
    names_of,
    score_of,
    smaller_is_better,
)
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.inference.predictor import Predictor
    from volumen.inference.request import PredictRequest
    from volumen.inference.rules import InstanceRules
    from volumen.tuning.grid import Settings

OVERLAP = ("dice", "iou")


@dataclass(frozen=True)
class Subject:
    """What is tuned.

    Args:
        target: name of the target that is scored.
        truth: the labelled target that its truth comes from.
        score: name of the score.
        smaller: whether smaller scores are better.
        heads: outputs of the network that are stored.
        default: the settings that a prediction takes without tuning.
        rules: how instances are made, resolved; None for a label target.
        softmax: the label is the class of highest probability.
        keep_largest: components of each class that stay; None for all.
        unfilled: predicted target with classes, beside which holes cannot be filled; "" for none.
    """

    target: str
    truth: str
    score: str
    smaller: bool
    heads: tuple[str, ...]
    default: Settings
    rules: InstanceRules | None = None
    softmax: bool = False
    keep_largest: int | None = None
    unfilled: str = ""

    @property
    def key(self) -> str:
        """Name of the score as an evaluation has it."""
        return f"{self.target}/{self.score}"

    def as_config(self, settings: Mapping[str, float]) -> dict[str, Any]:
        """Return the entries of `inference_config` that have a prediction take the settings."""
        typed = {name: v if name.endswith("threshold") else int(v) for name, v in settings.items()}
        if self.rules is not None:
            rules = {**self.rules.plain(), **typed}
            return {"instances": {name: value for name, value in rules.items() if value is not None}}
        return {"dtype": "labels", **typed} if self.softmax else typed


def find_subject(
    predictor: Predictor,
    request: PredictRequest,
    score: str,
    target: str | None,
    rules: InstanceRules | None,
    truth: str | None = None,
) -> Subject:
    """Return what is tuned.

    Args:
        predictor: the network.
        request: a prediction with the settings of the checkpoint.
        score: name of the score.
        target: name of the target; None: the instances, else the only labelled target of probabilities.
        rules: how instances are made where they were asked for.
        truth: the labelled target that numbers the instances; None: the one that their heads were trained on.

    Raises:
        VolumenError: an unknown score or target, a score of another kind, or one that no setting changes.
    """
    name = checked_names([score], "--score")[0]
    known = rules or request.instances
    wanted = rules is not None or (target is None and measures(name, INSTANCES))
    if known is not None and (wanted or target is not None):
        resolved = resolve_request(replace(request, targets=None, instances=known), predictor).instances
        assert resolved is not None
        if rules is not None and target not in (None, resolved.name):
            raise VolumenError("--target", expected=f"{resolved.name}, which --instances makes", found=target)
        if target in (None, resolved.name):
            return _of_instances(predictor, name, resolved, truth)
    if truth is not None:
        raise VolumenError("--truth", "belongs to instances", remedy="leave it out, or add --instances")
    return _of_labels(predictor, request, name, _label_target(predictor, target))


def _of_instances(predictor: Predictor, score: str, rules: InstanceRules, truth: str | None) -> Subject:
    own = _source(predictor, rules.sources[0])
    return Subject(
        rules.name,
        truth or own,
        score,
        _direction(rules.name, score, "instances"),
        rules.sources,
        {
            "threshold": rules.threshold,
            "merge_threshold": rules.merge_threshold,
            "min_size": float(rules.min_size),
        },
        rules,
    )


def _of_labels(predictor: Predictor, request: PredictRequest, score: str, target: str) -> Subject:
    (head,) = predictor.heads([target])
    if request.instances is not None:
        tasks = predictor.config.get("auxiliary_tasks") or {}
        resolved = resolve_rules(request.instances, tasks, head_kinds(predictor))
        if target in resolved.sources:
            raise VolumenError(
                "--target",
                f"the checkpoint makes instances from {target}, so a prediction stores its probabilities",
                remedy=f"tune {resolved.name}, or take a checkpoint without instances",
            )
    smaller = _direction(target, score, head.kind)
    softmax = head.activation == "softmax"
    others = [other.name for other in predictor.heads(request.targets) if other.has_classes]
    sizes = {"fill_holes": float(request.fill_holes), "min_size": float(request.min_size)}
    default: Settings = (
        {"min_size": sizes["min_size"]} if softmax else {"threshold": request.threshold or 0.5, **sizes}
    )
    return Subject(
        target,
        _source(predictor, target),
        score,
        smaller,
        (target,),
        default,
        softmax=softmax,
        keep_largest=request.keep_largest,
        unfilled=others[0] if others else "",
    )


def _label_target(predictor: Predictor, target: str | None) -> str:
    """Return the name of a target of probabilities."""
    usable = [head.name for head in predictor.heads() if head.kind in PROBABILITIES]
    derived = predictor.config.get("auxiliary_tasks") or {}
    if target is None:
        labelled = [name for name in usable if name not in derived]
        if len(labelled) == 1:
            return labelled[0]
    elif target in usable:
        return target
    raise VolumenError(
        "--target",
        expected=f"a target of probabilities: {', '.join(usable) or 'the network has none'}",
        found=target or "no --target",
    )


def _source(predictor: Predictor, head: str) -> str:
    tasks = predictor.config.get("auxiliary_tasks") or {}
    return str(tasks.get(head, {}).get("source_target", head))


def _direction(target: str, score: str, kind: str) -> bool:
    """Return whether smaller is better, after checking that the score can choose settings of such a target."""
    family = family_of(kind)
    if not measures(score, family):
        usable = [name for name in names_of(family, default=False) if _can_choose(name)]
        raise VolumenError(
            "--score", expected=f"a score of {target} ({family}): {', '.join(usable)}", found=score
        )
    if not _can_choose(score):
        found = score_of(score)
        if found is not None and found.smaller is not None:
            raise VolumenError(
                "--score", f"{score} follows from the probabilities, whatever the settings",
                remedy="give a score of labels, such as dice",
            )  # fmt: skip
    return smaller_is_better(f"{target}/{score}")


def _can_choose(name: str) -> bool:
    """Whether a score depends on the settings, and one way is better."""
    score = score_of(name)
    return score is not None and score.smaller is not None and (not score.pieces or name in OVERLAP)
