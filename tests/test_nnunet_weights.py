"""Weights from nnU-Net and from networks of another shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from volumen.checkpoints.nnunet import load_nnunet, safe_globals
from volumen.checkpoints.weights import load_partial
from volumen.networks.multihead import ConcatenatedHeads, MultiHeadDynUNet

FEATURES, STRIDES, BLOCKS = [8, 12, 16, 16], [1, 2, 2, 2], [1, 2, 2, 1]


def ours(heads=None, **options):
    heads = heads or {"surface": {"out_channels": 2}, "normals": {"out_channels": 3}}
    options = {"n_blocks_per_stage": BLOCKS, "n_conv_per_stage_decoder": 2, **options}
    return MultiHeadDynUNet(3, 1, heads, FEATURES, STRIDES, **options)


@pytest.fixture(scope="module")
def theirs():
    """Return nnU-Net's network with random weights."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    torch.manual_seed(3)
    network = unet.ResidualEncoderUNet(
        input_channels=1,
        n_stages=4,
        features_per_stage=FEATURES,
        conv_op=torch.nn.Conv3d,
        kernel_sizes=3,
        strides=STRIDES,
        n_blocks_per_stage=BLOCKS,
        num_classes=2,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=False,
    )
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape))
    return network.eval()


def test_an_nnunet_checkpoint_loads_into_the_encoder(theirs, tmp_path):
    log = {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "epochs": [np.int64(3)]}
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": theirs.state_dict(), "logging": log, "current_epoch": 10}, path)
    with torch.serialization.safe_globals(safe_globals()):
        checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["logging"] == log
    network = ours()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    report = load_nnunet(network, checkpoint)
    assert set(report.loaded) == {name for name in before if name.startswith("encoder.")}
    assert not report.unexpected
    assert not report.mismatched
    x = torch.rand(1, 1, 16, 16, 24)
    for found, expected in zip(network.eval().encoder(x), theirs.encoder(x)):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    for name in report.missing:
        assert torch.equal(network.state_dict()[name], before[name])


@pytest.mark.parametrize("separate", [True, False])
def test_the_decoder_loads_on_request_and_the_network_computes_the_same(theirs, separate):
    network = ours({"surface": {"out_channels": 2, "separate_decoder": separate}}).eval()
    report = load_nnunet(network, theirs.state_dict(), decoder_for="surface")
    assert report.missing == ("heads.for_surface.finest.weight", "heads.for_surface.finest.bias")
    network.heads["for_surface"].finest.load_state_dict(theirs.decoder.seg_layers[-1].state_dict())
    x = torch.rand(1, 1, 16, 16, 24)
    assert torch.allclose(network(x)["surface"], theirs(x), rtol=1e-4, atol=1e-4)


def test_prefixes_of_wrappers_do_not_matter(theirs):
    state = {f"module._orig_mod.{name}": weight for name, weight in theirs.state_dict().items()}
    assert load_nnunet(ours(), state).loaded == load_nnunet(ours(), theirs.state_dict()).loaded


def test_another_shape_is_listed_and_the_rest_loads(theirs):
    network = MultiHeadDynUNet(3, 2, {"a": {"out_channels": 1}}, FEATURES, STRIDES, n_blocks_per_stage=BLOCKS)
    report = load_nnunet(network, theirs.state_dict())
    assert report.mismatched == (("encoder.stem.0.conv.weight", (8, 2, 3, 3, 3), (8, 1, 3, 3, 3)),)
    assert "1 of another shape (encoder.stem.0.conv.weight" in report.summary()


def test_a_checkpoint_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="residual-encoder U-Net"):
        load_nnunet(ours(), {"network_weights": {"encoder.stages.0.0.convs.0.conv.weight": torch.zeros(1)}})


def test_a_target_without_a_head_is_refused(theirs):
    with pytest.raises(ValueError, match="target 'ink' has no head"):
        load_nnunet(ours(), theirs.state_dict(), decoder_for="ink")


def test_partial_loading_takes_what_fits_and_reports_the_rest():
    source = ours({"surface": {"out_channels": 2}, "ink": {"out_channels": 1}})
    network = ours({"surface": {"out_channels": 4}, "normals": {"out_channels": 3}})
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    report = load_partial(network, source.state_dict())
    state = network.state_dict()
    for name in report.loaded:
        assert torch.equal(state[name], source.state_dict()[name])
    for name in report.missing:
        assert torch.equal(state[name], before[name])
    assert {name for name, _, _ in report.mismatched} == {
        "heads.for_surface.finest.weight",
        "heads.for_surface.finest.bias",
    }
    assert all("normals" in name for name in report.missing)
    assert all("ink" in name for name in report.unexpected)
    counted = len(report.loaded) + len(report.missing) + len(report.mismatched)
    assert counted == len(state)


def test_partial_loading_of_the_same_network_is_complete():
    source, network = ours(), ours()
    report = load_partial(network, ConcatenatedHeads(source).state_dict())
    assert report.summary() == f"loaded {len(source.state_dict())} weights"
