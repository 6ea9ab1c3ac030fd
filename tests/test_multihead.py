"""The network with many heads: outputs, options, weights, exports."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch

from volumen.networks.blocks import Head
from volumen.networks.multihead import ConcatenatedHeads, MultiHeadDynUNet, NamedHeads, resolve_out_channels
from volumen.networks.operations import GatedUnit, InstanceNorm, activation_name, norm_name
from volumen.networks.planning import plan_network
from volumen.utils.errors import VolumenError

HEADS = {
    "membrane": {"out_channels": 1},
    "train.set": {"out_channels": 2, "separate_decoder": False},
    "keys": {"out_channels": 3, "separate_decoder": False},
}


def small(spatial_dims=3, heads=HEADS, **options):
    torch.manual_seed(0)
    options = {"n_blocks_per_stage": [1, 1, 2], **options}
    return MultiHeadDynUNet(spatial_dims, 2, heads, [8, 12, 12], [1, 2, 2], **options)


def image(spatial_dims=3, batch=2):
    size = (8, 16, 24)[:spatial_dims]
    return torch.rand(batch, 2, *size, generator=torch.Generator().manual_seed(0))


def randomise(network):
    """Give every weight a random value: a new block's last normalisation is zero and would hide errors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return network


def test_the_default_network_has_the_reference_number_of_parameters():
    plan = plan_network((64, 64, 64), (1, 1, 1))
    with torch.device("meta"):
        network = MultiHeadDynUNet(
            3,
            1,
            {"surface": {"out_channels": 1}},
            plan.features_per_stage,
            plan.strides,
            plan.kernel_sizes,
            plan.blocks_per_stage,
        )
    assert round(sum(weight.numel() for weight in network.parameters()) / 1e6, 1) == 62.8
    assert round(sum(weight.numel() for weight in network.encoder.parameters()) / 1e6, 1) == 57.1


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_outputs_have_the_channels_and_sizes_of_their_targets(spatial_dims):
    x = image(spatial_dims)
    outputs = small(spatial_dims).eval()(x)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "membrane": (2, 1, *x.shape[2:]),
        "train.set": (2, 2, *x.shape[2:]),
        "keys": (2, 3, *x.shape[2:]),
    }


def test_deep_supervision_gives_all_levels_in_training_and_one_in_evaluation():
    network, x = small(deep_supervision=True), image()
    levels = network(x)["keys"]
    assert [tuple(level.shape[2:]) for level in levels] == [(8, 16, 24), (4, 8, 12)]
    network.eval()
    assert isinstance(network(x)["keys"], torch.Tensor)


def test_every_weight_gets_a_gradient_from_the_sum_of_all_outputs():
    for deep_supervision in (True, False):
        network = randomise(small(deep_supervision=deep_supervision))
        outputs = network(image())
        sum(
            level.square().mean()
            for value in outputs.values()
            for level in (value if deep_supervision else [value])
        ).backward()
        assert not [name for name, weight in network.named_parameters() if weight.grad is None]


def test_only_the_decoders_of_the_targets_asked_for_run():
    network, x = small().eval(), image()
    ran = []
    for key, decoder in network.decoders.items():
        decoder.register_forward_hook(lambda *_, key=key: ran.append(key))
    everything = network(x)
    assert sorted(ran) == ["for_membrane", "shared"]
    ran.clear()
    only = network(x, ["keys", "train.set"])
    assert ran == ["shared"]
    assert list(only) == ["keys", "train.set"]
    assert torch.equal(only["keys"], everything["keys"])


def test_separate_decoders_share_no_weight_and_shared_heads_share_all_but_the_head():
    network = small()
    decoder_weights = {
        name for name, _ in network.named_parameters() if name.startswith("decoders.for_membrane")
    }
    loss = network(image())["keys"].sum()
    loss.backward()
    touched = {name for name, weight in network.named_parameters() if weight.grad is not None}
    assert not decoder_weights & touched
    assert any(name.startswith("decoders.shared") for name in touched)
    assert "heads.for_train_set.finest.weight" not in touched


def test_the_state_dict_holds_each_weight_once():
    network = small(deep_supervision=True)
    pointers = [tensor.data_ptr() for tensor in network.state_dict().values()]
    assert len(pointers) == len(set(pointers)) == len(list(network.parameters()))


def test_the_final_config_survives_json_and_builds_the_same_network():
    network = randomise(
        small(squeeze_excitation=True, nonlin="SwiGLU", dropout_op="nn.Dropout3d", deep_supervision=True)
    ).eval()
    again = MultiHeadDynUNet.from_config(json.loads(json.dumps(network.final_config))).eval()
    assert again.final_config == network.final_config
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(image())["keys"], network(image())["keys"])


def test_the_final_config_has_every_argument_of_the_constructor():
    arguments = set(inspect.signature(MultiHeadDynUNet).parameters)
    assert set(small().final_config) == arguments


OPTIONS = [
    {"norm_op": "nn.BatchNorm3d"},
    {"norm_op": "group", "norm_op_kwargs": {"num_groups": 4}},
    {"norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-3}},
    {"norm_op": "layer"},
    {"norm_op": None},
    {"nonlin": "ReLU"},
    {"nonlin": "SwiGLU"},
    {"nonlin": "GLU"},
    {"nonlin": "nn.GELU"},
    {"nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"negative_slope": 0.2}},
    {"dropout_op": 0.3},
    {"dropout_op": "nn.Dropout3d", "dropout_op_kwargs": {"p": 0.2}},
    {"dropout_op": "nn.Dropout"},
    {"conv_bias": False},
    {"do_stem": False},
    {"stem_channels": 4},
    {"stochastic_depth_p": 0.2},
    {"squeeze_excitation": True, "squeeze_excitation_reduction_ratio": 0.25},
    {"pool_type": "avg"},
    {"pool_type": "max"},
    {"n_conv_per_stage_decoder": 2},
    {"n_conv_per_stage_decoder": [1, 3]},
    {"kernel_sizes": [[1, 3, 3], 3, 5]},
    {"kernel_sizes": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_builds_a_network_that_trains(options):
    network = small(**options)
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    # Two steps are needed, since a block's last normalisation starts at zero and blocks the gradient of the first.
    for _ in range(2):
        optimizer.zero_grad()
        sum((value - 1).square().mean() for value in network(image()).values()).backward()
        optimizer.step()
    moved = sum(not torch.equal(before[name], weight) for name, weight in network.named_parameters())
    assert moved > 0.7 * len(before)
    again = MultiHeadDynUNet.from_config(json.loads(json.dumps(network.final_config)))
    again.load_state_dict(network.state_dict())


def test_the_options_leave_their_mark():
    def kinds(**options):
        return [type(module).__name__ for module in small(**options).modules()]

    assert "InstanceNorm" in kinds()
    assert "LeakyReLU" in kinds()
    assert "InstanceNorm" not in kinds(norm_op="batch")
    assert "Dropout3d" in kinds(dropout_op="dropout")
    assert "Dropout" in kinds(dropout_op="nn.Dropout")
    assert "ChannelSELayer" in kinds(squeeze_excitation=True)
    assert "DropPath" in kinds(stochastic_depth_p=0.1)
    assert "MaxPool3d" in kinds(pool_type="max")
    assert all(
        m.bias is None
        for m in small(conv_bias=False).encoder.modules()
        if hasattr(m, "kernel_size") and hasattr(m, "bias")
    )
    norm = next(m for m in small().modules() if isinstance(m, InstanceNorm))
    assert (norm.eps, norm.affine) == (1e-5, True)


def test_instance_normalisation_is_exact_far_from_zero_in_any_memory_format():
    x = 300 + torch.randn(2, 8, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = torch.nn.functional.instance_norm(x.double()).float()
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        assert torch.allclose(InstanceNorm(8)(x.to(memory_format=layout)), exact, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 6, 4, 5, 3), (2, 6, 7, 5)])
def test_instance_normalisation_is_pytorchs(shape):
    ours, theirs = (
        InstanceNorm(6),
        (torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d)[len(shape) - 4](6, affine=True),
    )
    with torch.no_grad():
        for weight in (ours.weight, ours.bias):
            weight.normal_()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    assert torch.allclose(ours(x), theirs(y), atol=1e-5)
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-4)
    assert torch.allclose(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_head_in_training_is_the_convolution_with_its_gradients(spatial_dims, layout):
    torch.manual_seed(0)
    head = Head(spatial_dims, [6], 4).double().train()
    features = torch.randn(2, 6, *(5, 4, 3)[:spatial_dims], dtype=torch.float64)
    if layout == "channels last":
        order = torch.channels_last if spatial_dims == 2 else torch.channels_last_3d
        features = features.to(memory_format=order)
    features.requires_grad_()
    inputs = (features, head.finest.weight, head.finest.bias)
    convolution = torch.nn.functional.conv2d if spatial_dims == 2 else torch.nn.functional.conv3d
    expected, found = convolution(*inputs), head([features])
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction)
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_a_new_residual_block_passes_its_input_on():
    network = small()
    block = network.encoder.stages[2][1]
    x = torch.rand(1, 12, 4, 4, 4)
    assert torch.allclose(block(x), x)


def test_an_anisotropic_plan_runs():
    plan = plan_network((4, 32, 32), (10, 1, 1), base_features=4)
    network = MultiHeadDynUNet(
        3,
        1,
        {"a": {"out_channels": 1}},
        plan.features_per_stage,
        plan.strides,
        plan.kernel_sizes,
        plan.blocks_per_stage,
    )
    assert network(torch.rand(1, 1, *plan.patch_size))["a"].shape == (1, 1, 4, 32, 32)


def test_a_network_of_one_stage_runs():
    network = MultiHeadDynUNet(2, 1, {"a": {"out_channels": 2}}, [8], [1], deep_supervision=True)
    assert [tuple(level.shape) for level in network(torch.rand(1, 1, 5, 7))["a"]] == [(1, 2, 5, 7)]


def test_channels_last_gives_the_same_values():
    network = randomise(small()).eval()
    expected = network(image())["keys"]
    again = network.to(memory_format=torch.channels_last_3d)
    assert torch.allclose(
        again(image().to(memory_format=torch.channels_last_3d))["keys"], expected, atol=1e-5
    )


def test_the_view_concatenates_the_heads_and_has_the_same_weights():
    network, x = randomise(small(deep_supervision=True)).eval(), image()
    view = ConcatenatedHeads(network).eval()
    assert list(view.state_dict()) == list(network.state_dict())
    assert torch.equal(view(x), torch.cat(list(network(x).values()), dim=1))
    assert torch.equal(
        ConcatenatedHeads(network, ["keys", "membrane"])(x),
        torch.cat([network(x)["keys"], network(x)["membrane"]], dim=1),
    )
    other = ConcatenatedHeads.from_config(network.final_config)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), view(x))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_view_passes_torchscript(spatial_dims):
    view, x = ConcatenatedHeads(randomise(small(spatial_dims))).eval(), image(spatial_dims)
    expected = view(x)
    assert torch.allclose(torch.jit.script(view)(x), expected, atol=1e-5)
    assert torch.allclose(torch.jit.trace(view, x)(x), expected, atol=1e-5)


def test_the_named_view_passes_torchscript_and_keeps_names_and_order():
    network, x = randomise(small()).eval(), image()
    order = list(reversed(network.targets))
    found = torch.jit.script(NamedHeads(network, order).eval())(x)
    assert list(found) == order
    for name, expected in network(x).items():
        assert torch.allclose(found[name], expected, atol=1e-5)


def test_the_view_and_the_network_pass_torch_export_with_any_size():
    network = randomise(small()).eval()
    axes = {2 + axis: 4 * torch.export.Dim(f"size{axis}", min=2, max=64) for axis in range(3)}
    axes[0] = torch.export.Dim("batch", min=1, max=16)
    other = image(batch=1)[..., :12]
    view = ConcatenatedHeads(network)
    program = torch.export.export(view, (image(),), dynamic_shapes=(axes,))
    assert torch.allclose(program.module()(other), view(other), atol=1e-5)
    program = torch.export.export(network, (image(),), dynamic_shapes=(axes,))
    assert torch.allclose(program.module()(other)["keys"], network(other)["keys"], atol=1e-5)


def test_the_view_passes_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    view, x = ConcatenatedHeads(randomise(small(2))).eval(), image(2)
    torch.onnx.export(view, (x,), tmp_path / "view.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "view.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.allclose(found, view(x).detach().numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("target", "channels"),
    [
        ({}, 3),  # follows the input
        ({"channels": 1}, 1),
        ({"out_channels": 5}, 5),
        ({"channels": 2, "out_channels": 2}, 2),
        ({"out_channels": None, "activation": "none"}, 3),
    ],
)
def test_output_channels_are_the_targets_or_the_inputs(target, channels):
    assert resolve_out_channels(target, in_channels=3) == channels


@pytest.mark.parametrize("target", [{"channels": 0}, {"channels": "two"}, {"channels": 1, "out_channels": 2}])
def test_impossible_output_channels_are_refused(target):
    with pytest.raises(ValueError, match="channels"):
        resolve_out_channels(target, in_channels=1)


@pytest.mark.parametrize(
    ("name", "known"),
    [("nn.InstanceNorm3d", "instance"), ("InstanceNorm2d", "instance"), ("batch", "batch"), ("None", None)],
)
def test_norms_are_known_under_the_names_people_write(name, known):
    assert norm_name(name) == known


def test_activations_are_known_under_the_names_people_write():
    assert activation_name("nn.LeakyReLU") == activation_name("leaky_relu") == "leakyrelu"
    assert activation_name("SwiGLU") == "swiglu"


@pytest.mark.parametrize("dims", [2, 3])
def test_gated_units_are_torch_s(dims):
    x = torch.randn(2, 3, *(5,) * dims)
    unit = GatedUnit(3, dims, "glu")
    torch.testing.assert_close(unit(x), torch.nn.functional.glu(unit.expand(x), dim=1))
    unit.swish = GatedUnit(3, dims, "swiglu").swish
    value, gate = unit.expand(x)[:, :3], unit.expand(x)[:, 3:]
    torch.testing.assert_close(unit(x), value * gate * gate.sigmoid())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_op": "instnce"}, "did you mean instance"),
        ({"nonlin": "Leaky"}, "did you mean leakyrelu"),
        ({"dropout_op": "drop"}, "dropout_op must be"),
        ({"pool_type": "mean"}, "pool_type must be one of conv, avg, max, got 'mean'"),
        ({"kernel_sizes": 2}, "kernel_sizes must be odd"),
        ({"kernel_sizes": [3, 3]}, "kernel_sizes must have 3 stages"),
        ({"n_blocks_per_stage": [1, 1]}, "n_blocks_per_stage must have 3"),
        ({"n_conv_per_stage_decoder": [1]}, "n_conv_per_stage_decoder must have 2"),
        ({"stochastic_depth_p": 1.0}, "stochastic_depth_p"),
        ({"heads": {}}, "heads must name at least one target"),
        ({"heads": {"a": {"channels": 1}}}, "heads\\['a'\\] must have out_channels"),
        ({"heads": {"a.b": {"out_channels": 1}, "a_b": {"out_channels": 1}}}, "heads must differ"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_bad_setting_of_an_experiment_is_one_line():
    config = {**small().final_config, "norm_op": "instnce"}
    with pytest.raises(VolumenError, match=r"^model_config: norm_op must be one of .*; correct the setting$"):
        MultiHeadDynUNet.from_config(config)


def test_strides_must_start_at_full_resolution():
    with pytest.raises(ValueError, match="strides must start with 1"):
        MultiHeadDynUNet(2, 1, HEADS, [8, 8], [2, 2])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 8, 16, 18), "must be divisible by \\(4, 4, 4\\)"),
        ((1, 1, 8, 16, 16), "input must be \\(batch, 2, 3 spatial axes\\)"),
        ((1, 2, 16, 16), "input must be"),
        ((1, 2, 4, 4, 4), "must be larger than"),
    ],
)
def test_bad_inputs_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.zeros(shape))


def test_an_unknown_head_is_refused():
    with pytest.raises(
        ValueError, match=r"target 'ink' has no head; the network has membrane, train.set, keys"
    ):
        small()(image(), ["ink"])
    with pytest.raises(ValueError, match="targets must be of"):
        ConcatenatedHeads(small(), ["ink"])
