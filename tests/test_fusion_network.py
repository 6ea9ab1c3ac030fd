"""A label read from several heads: in the network, its views, its exports, and over windows and augmentations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from volumen.inference.predictor import WindowNetwork, load_predictor, predict_array
from volumen.networks.multihead import ConcatenatedHeads, MultiHeadDynUNet, NamedHeads
from volumen.sharing.export import export
from volumen.utils.errors import VolumenError

RULE = {"ink": {"bias": 0.3, "weights": {"ink": [0.7], "dist": [-0.4], "aff": [0.1, 0.0, 0.5]}}}
HEADS = {
    "aff": {"out_channels": 3, "separate_decoder": True},
    "ink": {"out_channels": 1, "separate_decoder": True},
    "dist": {"out_channels": 1, "separate_decoder": True},
}


def _network(fusion=None, heads=None) -> MultiHeadDynUNet:
    torch.manual_seed(0)
    network = MultiHeadDynUNet(3, 1, heads or HEADS, [4, 8], [1, 2], n_blocks_per_stage=1, fusion=fusion)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def _by_hand(outputs: dict[str, torch.Tensor]) -> np.ndarray:
    ink, dist, aff = (outputs[name].detach().numpy().astype(np.float64) for name in ("ink", "dist", "aff"))
    return 0.3 + 0.7 * ink - 0.4 * dist + 0.1 * aff[:, 0:1] + 0.5 * aff[:, 2:3]


IMAGE = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shared", [False, True])
def test_evaluation_gives_the_weighted_sum_whatever_targets_are_asked_for(shared):
    heads = {name: {**head, "separate_decoder": not shared} for name, head in HEADS.items()}
    plain, fused = _network(heads=heads), _network(RULE, heads)
    expected = _by_hand(plain(IMAGE))
    for targets in (None, ("ink",), ("dist", "ink")):
        found = fused(IMAGE, targets=targets)
        assert list(found) == list(targets or HEADS)
        np.testing.assert_allclose(found["ink"].detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(fused(IMAGE)["dist"], plain(IMAGE)["dist"])
    assert torch.equal(fused.train()(IMAGE)["ink"], plain.train()(IMAGE)["ink"])


def test_only_the_decoders_that_a_label_is_read_from_run():
    network = _network({"ink": {"bias": 0.0, "weights": {"dist": [-1.0]}}})
    ran = []
    for name, decoder in network.decoders.items():
        decoder.register_forward_hook(lambda *_, name=name: ran.append(name))
    network(IMAGE, targets=("ink",))
    assert sorted(ran) == ["for_dist", "for_ink"]
    ran.clear()
    network(IMAGE, targets=("aff",))
    assert ran == ["for_aff"]


def test_the_views_and_the_final_config_contain_the_fusion():
    fused = _network(RULE)
    expected = fused(IMAGE)
    torch.testing.assert_close(ConcatenatedHeads(fused).eval()(IMAGE), torch.cat(list(expected.values()), 1))
    torch.testing.assert_close(NamedHeads(fused, ["ink"]).eval()(IMAGE)["ink"], expected["ink"])
    again = MultiHeadDynUNet.from_config(json.loads(json.dumps(fused.final_config))).eval()
    again.load_state_dict(fused.state_dict())
    assert torch.equal(again(IMAGE)["ink"], expected["ink"])
    again.fuse(None)
    assert torch.equal(again(IMAGE)["ink"], _network()(IMAGE)["ink"])


def _checkpoint(path: Path, fusion=RULE) -> Path:
    network = _network(fusion)
    tasks = {
        "dist": {"type": "distance_transform", "source_target": "ink"},
        "aff": {"type": "affinities", "source_target": "ink"},
    }
    config = {
        "tr_config": {"patch_size": [8, 8, 8]},
        "dataset_config": {
            "normalization_scheme": "unit",
            "targets": {"ink": {"activation": "sigmoid", "kind": "binary"}},
        },
        "auxiliary_tasks": tasks,
    }
    state = {
        "model": network.state_dict(),
        "model_config": network.final_config,
        "config": config,
        "epoch": 1,
    }
    torch.save(state, path)
    return path


def test_blending_fused_windows_equals_fusing_blended_heads(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (1, 14, 13, 12), dtype=np.uint8)
    fused = predict_array(load_predictor(_checkpoint(tmp_path / "fused.pth")), image)
    plain = predict_array(load_predictor(_checkpoint(tmp_path / "plain.pth", None)), image)
    p, d, a = plain["ink"].astype(np.float64), plain["dist"], plain["aff"].astype(np.float64)
    logit = 0.3 + 0.7 * np.log(p / (1 - p)) - 0.4 * d
    for channel, weight in ((0, 0.1), (2, 0.5)):
        logit += weight * np.log(a[channel] / (1 - a[channel]))
    np.testing.assert_allclose(fused["ink"], 1 / (1 + np.exp(-logit)), atol=2e-5)
    np.testing.assert_array_equal(fused["dist"], plain["dist"])
    alone = predict_array(load_predictor(_checkpoint(tmp_path / "fused.pth")), image, targets=["ink"])
    np.testing.assert_allclose(alone["ink"], fused["ink"], atol=1e-6)
    unfused = predict_array(load_predictor(_checkpoint(tmp_path / "fused.pth"), fuse=False), image)
    np.testing.assert_array_equal(unfused["ink"], plain["ink"])


def test_augmentation_averages_fused_logits(tmp_path):
    predictor = load_predictor(_checkpoint(tmp_path / "fused.pth"))
    window = IMAGE[:1].numpy()
    run = WindowNetwork(predictor, predictor.heads(["ink"]), (8, 8, 8), tta="mirror")
    flips = [[axis for axis in range(3) if n >> axis & 1] for n in range(8)]
    with torch.no_grad():
        outputs = [
            predictor.network(torch.flip(IMAGE[:1], [2 + a for a in axes]))["ink"].flip([2 + a for a in axes])
            for axes in flips
        ]
    weights = WindowNetwork(predictor, predictor.heads(["ink"]), (8, 8, 8))._weights.numpy()
    expected = torch.stack(outputs).mean(0).numpy() * weights
    np.testing.assert_allclose(run(window), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("to", ["torchscript", "pt2", "onnx"])
def test_exported_files_contain_the_fusion(tmp_path, to):
    from volumen.sharing.exchange_formats import OPENERS

    path = tmp_path / f"model.{to}"
    export(_checkpoint(tmp_path / "fused.pth"), path, to)
    found = OPENERS[to](path)(IMAGE)
    np.testing.assert_allclose(
        np.asarray(found["ink"].detach()), _by_hand(_network()(IMAGE)), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"ink": {"bias": 0, "weights": {"nose": [1.0]}}}, "no head 'nose'"),
        ({"ink": {"bias": 0, "weights": {"aff": [1.0]}}}, "'aff' needs 3 weights, got 1"),
        ({"aff": {"bias": 0, "weights": {"ink": [1.0]}}}, "'aff' must be a head of one channel"),
        ({"ink": {"bias": float("nan"), "weights": {"ink": [1.0]}}}, "must be finite"),
    ],
)
def test_rules_that_do_not_fit_the_heads_are_refused(rule, message):
    config = {**_network().final_config, "fusion": rule}
    with pytest.raises(VolumenError, match=message):
        MultiHeadDynUNet.from_config(config)
