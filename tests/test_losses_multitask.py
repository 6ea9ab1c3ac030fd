"""The sum over targets, losses and levels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from loss_cases import channels, make_target

from volumen.losses.cross_entropy import BCEWithLogitsLoss
from volumen.losses.deep_supervision import downsample
from volumen.losses.dice import SoftDiceLoss
from volumen.losses.distance import SignedDistanceLoss
from volumen.losses.multitask import MultiTaskLoss
from volumen.losses.regression import MSELoss
from volumen.losses.vectors import CosineSimilarityLoss, NormalSmoothnessLoss
from volumen.utils.errors import VolumenError

SIZES = [(8, 8, 8), (4, 4, 4), (2, 2, 2)]
TARGETS = {
    "membrane": {
        "kind": "binary",
        "out_channels": 1,
        "losses": [{"name": "SoftDiceLoss", "weight": 0.7}, {"name": "BCEWithLogitsLoss"}],
    },
    "sdt": {
        "kind": "distance",
        "out_channels": 1,
        "weight": 0.1,
        "source_target": "membrane",
        "losses": [{"name": "SignedDistanceLoss", "kwargs": {"rho": 6, "beta": 1, "eikonal": True}}],
    },
    "normals": {
        "kind": "vector",
        "out_channels": 3,
        "weight": 0.3,
        "source_target": "membrane",
        "ds_interpolation": "linear",
        "losses": [
            {"name": "CosineSimilarityLoss", "kwargs": {"dim": 1}},
            {"name": "NormalSmoothnessLoss", "weight": 0.5, "kwargs": {"sigma": 2.0, "q": 2.0}},
        ],
    },
}


def _batch(seed: int = 0, size: int = 2) -> tuple[dict[str, list[torch.Tensor]], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    outputs, batch = {}, {}
    for name, target in TARGETS.items():
        c = channels(target["kind"], 3)
        outputs[name] = [torch.randn(size, c, *s, generator=generator).requires_grad_() for s in SIZES]
        batch[name] = make_target(target["kind"], (size, *SIZES[0]), generator)
        batch[f"{name}_mask"] = torch.rand(size, 1, *SIZES[0], generator=generator) > 0.01
    return outputs, batch


def test_total_is_the_weighted_sum_computed_independently():
    outputs, batch = _batch()
    loss = MultiTaskLoss(TARGETS)
    total = loss(outputs, batch)
    parts: dict[str, float] = {}
    for level, weight in enumerate([4 / 7, 2 / 7, 1 / 7]):
        at = {n: o[level] for n, o in outputs.items()}
        truth = {
            n: downsample(
                batch[n],
                batch[f"{n}_mask"],
                SIZES[level],
                kind=t["kind"],
                interpolation="nearest" if n == "membrane" else "linear",
            )
            for n, t in TARGETS.items()
        }
        scale = (float(2**level),) * 3
        values = {
            "membrane/SoftDiceLoss": SoftDiceLoss(kind="binary")(at["membrane"], *truth["membrane"]),
            "membrane/BCEWithLogitsLoss": BCEWithLogitsLoss(kind="binary")(
                at["membrane"], *truth["membrane"]
            ),
            "sdt/SignedDistanceLoss": SignedDistanceLoss(rho=6, eikonal=True)(
                at["sdt"], *truth["sdt"], scale=scale
            ),
            "normals/CosineSimilarityLoss": CosineSimilarityLoss()(at["normals"], *truth["normals"]),
            "normals/NormalSmoothnessLoss": NormalSmoothnessLoss()(
                at["normals"],
                *truth["normals"],
                source_pred=at["membrane"],
                source_mask=truth["membrane"][1],
                scale=scale,
            ),
        }
        for name, value in values.items():
            parts[name] = parts.get(name, 0.0) + weight * value.item()
    for name, value in parts.items():
        assert loss.components[name].item() == pytest.approx(value, rel=1e-5), name
        assert not loss.components[name].requires_grad
    membrane = 0.7 * parts["membrane/SoftDiceLoss"] + parts["membrane/BCEWithLogitsLoss"]
    normals = parts["normals/CosineSimilarityLoss"] + 0.5 * parts["normals/NormalSmoothnessLoss"]
    assert loss.components["membrane"].item() == pytest.approx(membrane, rel=1e-5)
    expected = membrane + 0.1 * parts["sdt/SignedDistanceLoss"] + 0.3 * normals
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert total.dtype == torch.float32
    total.backward()
    assert all(torch.any(x.grad != 0) for o in outputs.values() for x in o)


def test_a_loss_that_can_read_a_source_does_without_one():
    outputs, batch = _batch()
    targets = {"normals": {"kind": "vector", "losses": ["NormalSmoothnessLoss"]}}
    single = outputs["normals"][0]
    expected = NormalSmoothnessLoss()(single, mask=batch["normals_mask"])
    assert MultiTaskLoss(targets)({"normals": single}, batch) == expected


def test_plain_tensors_without_deep_supervision():
    outputs, batch = _batch()
    single = {name: levels[0] for name, levels in outputs.items()}
    loss = MultiTaskLoss(TARGETS)
    assert loss(single, batch) == loss({name: [x] for name, x in single.items()}, batch)


def test_skip_deep_supervision_reads_the_full_resolution_with_weight_one():
    targets = {
        "membrane": {"kind": "binary", "losses": [{"name": "SoftDiceLoss", "skip_deep_supervision": True}]}
    }
    outputs, batch = _batch()
    value = MultiTaskLoss(targets)(outputs, batch)
    expected = SoftDiceLoss(kind="binary")(outputs["membrane"][0], batch["membrane"], batch["membrane_mask"])
    torch.testing.assert_close(value, expected)


def test_start_epoch_counts_from_zero_and_keeps_the_head_on_the_graph():
    targets = copy.deepcopy(TARGETS)
    targets["sdt"]["losses"][0]["start_epoch"] = 3
    outputs, batch = _batch()
    loss = MultiTaskLoss(targets)
    loss.set_epoch(2)
    loss(outputs, batch).backward()
    assert "sdt/SignedDistanceLoss" not in loss.components
    assert torch.all(outputs["sdt"][0].grad == 0)
    loss.set_epoch(3)
    loss(outputs, batch)
    assert loss.components["sdt/SignedDistanceLoss"] > 0


@pytest.mark.parametrize("balancing", ["fixed", "uncertainty"])
def test_a_target_without_any_valid_voxel_is_as_if_absent(balancing):
    outputs, batch = _batch()
    batch["sdt_mask"][:] = False
    batch["sdt"][:] = torch.nan
    loss = MultiTaskLoss(TARGETS, balancing=balancing)
    total = loss(outputs, batch)
    total.backward()
    rest = {n: t for n, t in TARGETS.items() if n != "sdt"}
    torch.testing.assert_close(total, MultiTaskLoss(rest, balancing=balancing)(outputs, batch))
    assert all(torch.all(x.grad == 0) for x in outputs["sdt"])
    if balancing == "uncertainty":
        assert loss.balancing.log_variances[1].grad == 0
        assert loss.balancing.log_variances[0].grad != 0


def test_two_entries_of_one_name_are_logged_apart():
    targets = {
        "a": {"kind": "field", "losses": [{"name": "MSELoss"}, {"name": "MSELoss"}, "torch.nn.L1Loss"]}
    }
    loss = MultiTaskLoss(targets)
    loss({"a": torch.randn(1, 1, 4, 4)}, {"a": torch.randn(1, 1, 4, 4)})
    assert set(loss.components) == {"a", "a/MSELoss", "a/MSELoss#2", "a/L1Loss"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": []}, "targets.ink.losses: expected at least one loss"),
        ({"kind": "blob"}, "targets.ink.kind: expected one of"),
        ({"source_target": "nobody"}, "targets.ink.source_target: expected one of ink, found nobody"),
        ({"losses": [{"name": "SoftDieLoss"}]}, "did you mean SoftDiceLoss"),
        ({"losses": [{"name": "SoftDiceLoss", "kwargs": {"smoth": 1}}]}, "did you mean smooth"),
        ({"losses": [{"name": "SoftDiceLoss", "wait": 1}]}, "expected the keys name, weight"),
        ({"losses": [{"name": "SoftDiceLoss", "weight": -1}]}, "expected a number of at least 0, found -1"),
        (
            {"losses": [{"name": "CrossEntropyLoss"}]},
            "expected a target of kind multiclass, found kind binary",
        ),
        ({"losses": [{"name": "MSELoss"}]}, "expected a target of kind axis, distance"),
        ({"losses": [{"name": "torch.nn.TripletMarginLoss"}]}, "a loss that takes a prediction and a target"),
        ({"losses": [{"name": "TverskyLoss", "kwargs": {"gamma": 0}}]}, "TverskyLoss refuses its kwargs"),
        (
            {"losses": [{"name": "DiceFocalLoss", "kwargs": {"lambda_dice": -1}}]},
            "DiceFocalLoss refuses its kwargs",
        ),
        ({"ds_interpolation": "cubic"}, "expected one of nearest, linear, found cubic"),
    ],
)
def test_mistakes_are_refused_at_construction_in_one_line(change, message):
    target = {"kind": "binary", "losses": [{"name": "SoftDiceLoss"}]} | change
    with pytest.raises(VolumenError) as error:
        MultiTaskLoss({"ink": target})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("targets.ink")


def test_cross_entropy_on_a_distance_and_linear_class_indices_are_refused():
    with pytest.raises(VolumenError, match="kind distance"):
        MultiTaskLoss({"d": {"kind": "distance", "losses": [{"name": "CrossEntropyLoss"}]}})
    with pytest.raises(VolumenError, match="nearest for class indices"):
        MultiTaskLoss(
            {"s": {"kind": "multiclass", "losses": [{"name": "DiceCELoss"}], "ds_interpolation": "linear"}}
        )


def test_missing_outputs_and_targets_are_named():
    outputs, batch = _batch()
    loss = MultiTaskLoss(TARGETS)
    with pytest.raises(VolumenError, match="sdt"):
        loss({n: o for n, o in outputs.items() if n != "sdt"}, batch)
    with pytest.raises(VolumenError, match="sdt"):
        loss(outputs, {n: t for n, t in batch.items() if n != "sdt"})


def test_source_prediction_is_resized_where_the_source_has_no_such_level():
    targets = {n: t for n, t in TARGETS.items() if n != "sdt"}
    outputs, batch = _batch()
    outputs["membrane"] = outputs["membrane"][:1]
    value = MultiTaskLoss(targets)(outputs, batch)
    assert torch.isfinite(value)


def test_a_user_s_loss_is_registered_by_name():
    from volumen.losses.registry import _registered, register_loss

    @register_loss("TripleMSELoss")
    class TripleMSELoss(MSELoss):
        def voxelwise(self, pred, target):
            return 3 * super().voxelwise(pred, target)

    try:
        loss = MultiTaskLoss({"f": {"kind": "field", "losses": [{"name": "TripleMSELoss"}]}})
        pred, target = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
        torch.testing.assert_close(loss({"f": pred}, {"f": target}), 3 * F.mse_loss(pred, target))
    finally:
        _registered.pop("TripleMSELoss")


@pytest.mark.parametrize("balancing", ["fixed", "uncertainty"])
def test_the_sum_runs_on_another_device_without_waiting_for_it(balancing):
    outputs, batch = _batch()
    loss = MultiTaskLoss(TARGETS, balancing=balancing, device="meta")
    elsewhere = {n: [x.detach().to("meta").requires_grad_() for x in levels] for n, levels in outputs.items()}
    total = loss(elsewhere, {n: x.to("meta") for n, x in batch.items()})
    assert total.device.type == "meta"
    total.backward()
    assert all(x.grad is not None for x in loss.parameters())


@pytest.mark.parametrize(
    ("kind", "channels", "value"), [("multiclass", 3, 3), ("binary", 1, 255), ("binary", 1, -1)]
)
def test_labels_beyond_the_classes_are_refused_where_they_count(kind, channels, value):
    target = {"kind": kind, "out_channels": channels, "losses": [{"name": "DiceCELoss"}]}
    loss = MultiTaskLoss({"ink": target})
    label = torch.zeros(1, 1, 4, 4, dtype=torch.int16)
    label[..., 0, 0] = value
    pred, mask = {"ink": torch.randn(1, channels, 4, 4)}, torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(VolumenError, match=rf"labels of ink: expected values 0 to .*found {value};"):
        loss(pred, {"ink": label, "ink_mask": mask})
    mask[..., 0, 0] = False
    assert torch.isfinite(loss(pred, {"ink": label, "ink_mask": mask}))


@pytest.mark.parametrize("levels", [1, 2])
def test_a_sigmoid_on_exclusive_classes_trains_a_yes_or_no_per_class(levels):
    """The value and gradient equal those of the one-hot maps as independent labels, also under deep supervision."""
    torch.manual_seed(0)
    losses = [{"name": "BCEWithLogitsLoss"}, {"name": "SoftDiceLoss"}]
    section = {"losses": losses, "out_channels": 3}
    exclusive = MultiTaskLoss({"t": {**section, "kind": "multiclass", "activation": "sigmoid"}})
    independent = MultiTaskLoss({"t": {**section, "kind": "multilabel"}})
    index = torch.randint(0, 3, (2, 1, 8, 8))
    mask = torch.rand(2, 1, 8, 8) > 0.2
    maps = torch.nn.functional.one_hot(index[:, 0], 3).movedim(-1, 1)
    outputs = [torch.randn(2, 3, 8 >> i, 8 >> i, requires_grad=True) for i in range(levels)]
    first = exclusive({"t": outputs}, {"t": index, "t_mask": mask})
    second = independent({"t": outputs}, {"t": maps, "t_mask": mask})
    torch.testing.assert_close(first, second)
    for one, other in zip(torch.autograd.grad(first, outputs), torch.autograd.grad(second, outputs)):
        torch.testing.assert_close(one, other)


def test_a_sigmoid_on_exclusive_classes_is_binary_cross_entropy():
    loss = MultiTaskLoss(
        {
            "t": {
                "kind": "multiclass",
                "activation": "sigmoid",
                "out_channels": 3,
                "losses": ["BCEWithLogitsLoss"],
            }
        }
    )
    logits, index = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 1, 4, 4))
    maps = torch.nn.functional.one_hot(index[:, 0], 3).movedim(-1, 1).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, maps)
    torch.testing.assert_close(loss({"t": logits}, {"t": index}), expected)


def test_cross_entropy_under_a_sigmoid_is_refused():
    target = {
        "kind": "multiclass",
        "activation": "sigmoid",
        "out_channels": 3,
        "losses": ["CrossEntropyLoss"],
    }
    with pytest.raises(VolumenError, match="multiclass"):
        MultiTaskLoss({"t": target})
