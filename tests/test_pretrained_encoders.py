"""Encoders from a pretraining: taken whole or refused in one line, from this program and from nnssl."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from volumen.checkpoints.file import save_checkpoint
from volumen.checkpoints.finetune import encoder_lines, load_weights
from volumen.checkpoints.pretrained import encoder_settings, pretraining_of
from volumen.networks.masked_autoencoder import MaskedAutoencoder
from volumen.networks.multihead import MultiHeadDynUNet
from volumen.networks.nnunet import RESIDUAL, NnunetNetwork
from volumen.utils.errors import VolumenError

FEATURES, STRIDES, BLOCKS = [8, 12, 16], [[1, 1, 1], [2, 2, 2], [2, 2, 2]], [1, 2, 2]
SETTINGS = {
    "spatial_dims": 3,
    "in_channels": 1,
    "features_per_stage": FEATURES,
    "strides": STRIDES,
    "n_blocks_per_stage": BLOCKS,
}
HEADS = {"surface": {"out_channels": 2}}


def new(**changes) -> MultiHeadDynUNet:
    torch.manual_seed(9)
    return MultiHeadDynUNet(**{**SETTINGS, **changes}, heads=HEADS)


@pytest.fixture
def ours(tmp_path):
    """Write a checkpoint as `volumen pretrain` does; return it with its weights."""
    torch.manual_seed(1)
    network = MaskedAutoencoder(SETTINGS)
    path = tmp_path / "pretrained.pth"
    save_checkpoint({"model": network.state_dict(), "model_config": network.final_config}, path)
    return path, network.state_dict()


def arch_kwargs():
    """Return the arguments of a network in the words of dynamic-network-architectures."""
    return {
        "n_stages": 3, "features_per_stage": FEATURES, "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 3, "strides": STRIDES, "n_blocks_per_stage": BLOCKS,
        "n_conv_per_stage_decoder": [1, 1], "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip


def nnssl_content(network, *, spark=False, plan=True, prefix="") -> dict:
    """Return a checkpoint with nnssl's keys: weights under all their names, and what else its trainers save.

    Its SparK trainers run the layers called `all_modules`; those called `conv` and `norm` are never trained.
    """
    weights = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    for name, value in list(weights.items()):
        for layer, number in ((".conv.", 0), (".norm.", 1)):
            if layer in name:
                weights[name.replace(layer, f".all_modules.{number}.")] = value
                if spark:
                    weights[name] = torch.randn(value.shape)
    for name, value in list(weights.items()):
        if name.startswith(f"{prefix}encoder."):
            weights[name.replace("encoder.", "decoder.encoder.", 1)] = value
    content = {
        "network_weights": weights,
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01, "params": [0]}]},
        "grad_scaler_state": None,
        "logging": {"train_losses": [0.5, 0.25], "epoch_end_timestamps": [1.0, 2.0]},
        "_best_ema": 0.3,
        "current_epoch": 2,
        "init_args": {"configuration_name": "onemmiso", "fold": "all", "pretrain_json": {}, "plan": {}},
        "trainer_name": "SparkMAETrainer" if spark else "BaseMAETrainer",
    }
    if plan:
        content["nnssl_adaptation_plan"] = {
            "architecture_plans": {"arch_class_name": "ResidualEncoderUNet", "arch_kwargs": arch_kwargs()},
            "pretrain_num_input_channels": 1,
            "recommended_downstream_patchsize": [160, 160, 160],
            "key_to_encoder": "encoder.stages",
        }
    if spark:
        content["spark_weights"] = {
            **{f"architecture.{name}": value for name, value in weights.items()},
            "mask_tokens.0": torch.zeros(1, 8, 1, 1, 1),
            "densify_projs.1.weight": torch.zeros(1),
        }
    return content


@pytest.fixture(scope="module")
def theirs():
    """Return a residual-encoder U-Net with the names of dynamic-network-architectures and random weights."""
    torch.manual_seed(3)
    network = NnunetNetwork(RESIDUAL, arch_kwargs(), 1, 1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape))
    return network.eval()


def test_the_whole_encoder_is_taken_and_nothing_else(ours):
    path, weights = ours
    network = new()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = load_weights(network, path)
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name] if name.startswith("encoder.") else before[name]), name
    assert {name.split(".")[0] for name in report.loaded} == {"encoder"}
    assert {name.split(".")[0] for name in report.unexpected} == {"tokens", "projections", "decoder", "head"}
    taken, left, started = encoder_lines(report)
    assert taken.startswith("took the whole encoder, ")
    assert "encoder.stem 4, encoder.stages" in taken
    assert left == "not taken, since it completes images: tokens 3, projections 6, decoder 12, head 2"
    assert started.startswith("new, left as initialised: decoders.for_surface")


@pytest.mark.parametrize(
    "options", [{}, {"spark": True}, {"plan": False}, {"prefix": "module."}, {"prefix": "_orig_mod."}]
)
def test_a_checkpoint_of_nnssl_gives_the_features_of_its_encoder(theirs, tmp_path, options):
    path = tmp_path / "checkpoint_final.pth"
    torch.save(nnssl_content(theirs, **options), path)
    network = new().eval()
    report = load_weights(network, path)
    assert len(report.loaded) == sum(name.startswith("encoder.") for name in network.state_dict())
    assert report.unexpected
    assert not any("encoder" in name for name in report.unexpected)
    if options.get("spark"):
        assert "mask_tokens.0" in report.unexpected
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        for ours, reference in zip(network.encoder(image), theirs.encoder(image), strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_settings_of_an_nnssl_encoder_follow_from_plan_and_weights(theirs, tmp_path):
    content = nnssl_content(theirs)
    assert pretraining_of(content) == "nnssl"
    found = encoder_settings(content, tmp_path)
    expected = {**SETTINGS, "kernel_sizes": [[3, 3, 3]] * 3, "conv_bias": True, "do_stem": True}
    assert {key: found[key] for key in expected} == expected
    # Without arguments the plan names a preset, here of another depth, so strides are not known.
    content["nnssl_adaptation_plan"]["architecture_plans"] = {
        "arch_class_name": "ResEncL",
        "arch_kwargs": None,
    }
    assert "strides" not in encoder_settings(content, tmp_path)


def test_the_strides_of_nnssls_preset_are_known(tmp_path):
    deep = {
        **arch_kwargs(), "n_stages": 6, "features_per_stage": [4, 4, 4, 4, 4, 4], "kernel_sizes": [[3, 3, 3]] * 6,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5, "n_blocks_per_stage": [1] * 6, "n_conv_per_stage_decoder": [1] * 5,
    }  # fmt: skip
    content = nnssl_content(NnunetNetwork(RESIDUAL, deep, 1, 1))
    content["nnssl_adaptation_plan"]["architecture_plans"] = {
        "arch_class_name": "ResEncL",
        "arch_kwargs": None,
    }
    assert encoder_settings(content, tmp_path)["strides"] == [[1, 1, 1]] + [[2, 2, 2]] * 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 2}, r"channels of the images, expected 1, found 2; pretrain on images of this kind"),
        ({"strides": [1, 2, 1]}, r"model_config.strides, expected .*, found .*; leave the setting out"),
        (
            {"features_per_stage": [8, 12, 24]},
            r"model_config.features_per_stage, expected \[8, 12, 16\], found \[8, 12, 24\]",
        ),
        (
            {"n_blocks_per_stage": [1, 2, 1]},
            r"model_config.n_blocks_per_stage, expected \[1, 2, 2\], found \[1, 2, 1\]",
        ),
    ],
    ids=["channels", "strides", "widths", "depth"],
)
@pytest.mark.parametrize("program", ["volumen", "nnssl"])
def test_another_encoder_is_refused_in_one_line(program, ours, theirs, tmp_path, changes, message):
    path = ours[0] if program == "volumen" else tmp_path / "checkpoint_best.pth"
    if program == "nnssl":
        torch.save(nnssl_content(theirs), path)
    network = new(**changes)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(VolumenError, match=f"the pretrained encoder is another one: {message}") as error:
        load_weights(network, path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_other_settings_of_the_encoder_are_refused(ours):
    with pytest.raises(VolumenError, match=r"model_config.norm_op, expected instance, found group"):
        load_weights(new(norm_op="group"), ours[0])


def test_a_checkpoint_without_part_of_the_encoder_is_refused(theirs, tmp_path):
    content = nnssl_content(theirs)
    for name in ("norm", "all_modules.1"):
        del content["network_weights"][f"encoder.stages.1.blocks.1.conv2.{name}.bias"]
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(
        VolumenError, match=r"weight encoder.stages.1.1.conv2.adn.N.bias, expected \(12,\), found none"
    ):
        load_weights(new(), tmp_path / "a.pth")


def test_transformers_of_nnssl_are_refused(tmp_path):
    content = {
        "network_weights": {"eva.blocks.0.norm1.weight": torch.zeros(3)},
        "nnssl_adaptation_plan": {"architecture_plans": {"arch_class_name": "PrimusM"}},
    }
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(
        VolumenError, match=r"expected nnssl's residual encoder .*only its convolutional networks"
    ):
        load_weights(new(), tmp_path / "a.pth")


def test_other_checkpoints_are_no_pretraining(theirs):
    plain = {"network_weights": theirs.state_dict(), "init_args": {"plans": {}, "dataset_json": {}}}
    assert pretraining_of(plain) is None
    assert pretraining_of({"model": {}, "model_config": {"heads": {}}}) is None
    assert pretraining_of([1]) is None


def test_a_file_that_would_run_code_is_refused(theirs, tmp_path):
    content = nnssl_content(theirs)
    content["init_args"]["plan"] = np.random.default_rng
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(VolumenError, match="damaged or of another kind"):
        load_weights(new(), tmp_path / "a.pth")
