"""The report of a loss that is not finite: the loss, and the patches of the batch that caused it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from volumen.engines.guard import NonFiniteGuard, describe_patches
from volumen.utils.errors import VolumenError

ENGINE = SimpleNamespace(state=SimpleNamespace(epoch=2, iteration=7))
NAN, INF = float("nan"), float("inf")


def batch() -> dict:
    start = torch.tensor([[0, 8], [16, 24], [32, 40]])
    return {"image": torch.zeros(3, 1, 4, 4), "volume_name": ["a", "b", "c"], "start": start}


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"loss": NAN, "ink": NAN, "ink/BCE": NAN, "ink/Dice": 0.1}, "BCE of target 'ink' is nan ("),
        ({"loss": INF, "ink": INF, "depth": 1.0}, "the loss of target 'ink' is inf ("),
        ({"loss": -INF, "ink": 1.0}, "the loss is -inf ("),
    ],
)
def test_the_most_specific_loss_is_named(losses, message, caplog):
    guard = NonFiniteGuard(1)
    guard.report_loss(ENGINE, batch(), losses, {})
    assert f"epoch 2, iteration 7: {message}" in caplog.text
    assert "skipped (1 of at most 1)" in caplog.text
    assert caplog.text.count(" is ") == 2  # the loss, and the step that is skipped
    with pytest.raises(VolumenError, match="after 1 skipped steps"):
        guard.report_loss(ENGINE, batch(), losses, {})


def spoilt(sample: int) -> torch.Tensor:
    values = torch.ones(3, 1, 4, 4)
    values[sample, 0, 2, 1] = NAN
    return values


@pytest.mark.parametrize(
    "predictions",
    [
        spoilt(1),
        {"ink": torch.ones(3, 1, 4, 4), "depth": spoilt(1)},
        {"ink": [torch.ones(3, 1, 4, 4), spoilt(1)]},
    ],
    ids=["tensor", "heads", "levels"],
)
def test_the_patch_whose_prediction_is_not_finite_is_named(predictions):
    assert describe_patches(batch(), predictions) == "volume 'b' at (16, 24)"


def test_patches_are_named_by_their_image_and_all_where_none_is_to_blame():
    assert describe_patches({**batch(), "image": spoilt(2)}, None) == "volume 'c' at (32, 40)"
    assert describe_patches(batch(), {}).count("volume") == 3
    assert describe_patches({"image": spoilt(0)}, None) == "patch unknown"
    assert describe_patches({"image": spoilt(0), "volume_name": ["a", "b", "c"]}, None) == "volume 'a'"
