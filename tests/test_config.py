"""Configuration: names load, mistakes are told, defaults agree, detection follows the data."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from data_folders import ball, image_of, shells, write_tiff_folder

from volumen.config.experiment_file import assign, merge, parse_assignment, read_experiment, recipes
from volumen.config.manager import ConfigManager
from volumen.config.parts.network import ModelConfig
from volumen.config.parts.targets import TargetConfig
from volumen.config.parts.training import TrainingConfig
from volumen.config.sections import SECTIONS
from volumen.config.targets import make_target
from volumen.data.sampling.split import Split
from volumen.losses.multitask import MultiTaskLoss
from volumen.utils.bundle_root import configs_dir
from volumen.utils.errors import VolumenError

# Keys of people's five-section files; every one of them must load.
KNOWN_KEYS = {
    "tr_setup": {
        "model_name": "m",
        "autoconfigure": True,
        "tr_val_split": 0.9,
        "compute_loss_on_labeled_only": False,
        "ckpt_out_base": "out",
        "checkpoint_path": None,
        "load_weights_only": False,
    },
    "tr_config": {
        "patch_size": [32, 32, 32],
        "batch_size": 2,
        "initial_lr": 0.01,
        "weight_decay": 0.0001,
        "optimizer": "SGD",
        "scheduler": "poly",
        "max_epoch": 3,
        "max_steps_per_epoch": 2,
        "max_val_steps_per_epoch": 2,
        "num_dataloader_workers": 0,
        "gradient_accumulation": 1,
        "gradient_clip": 12.0,
        "enable_deep_supervision": True,
        "amp_dtype": "bfloat16",
        "augment_on_device": False,
        "val_every_n": 1,
        "early_stopping_patience": 5,
    },
    "model_config": {
        "in_channels": None,
        "targets": {},
        "separate_decoders": True,
        "features_per_stage": [8, 16, 32],
        "n_blocks_per_stage": [1, 2, 2],
        "n_conv_per_stage_decoder": [1, 1],
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [1, 2, 2],
        "pool_op_kernel_sizes": None,
        "norm_op": "nn.InstanceNorm3d",
        "nonlin": "LeakyReLU",
        "dropout_op": None,
        "conv_bias": True,
        "do_stem": True,
        "stem_channels": 8,
        "stochastic_depth_p": 0.1,
        "squeeze_excitation": True,
        "squeeze_excitation_reduction_ratio": 0.0625,
        "pool_type": "conv",
    },
    "dataset_config": {
        "data_path": "data",
        "targets": {
            "ink": {
                "out_channels": 1,
                "activation": "sigmoid",
                "losses": [
                    {
                        "name": "SoftDiceLoss",
                        "weight": 1.0,
                        "kwargs": {},
                        "start_epoch": 0,
                        "skip_deep_supervision": True,
                    }
                ],
                "weight": 1.0,
                "ignore_index": 2,
                "ds_interpolation": "nearest",
                "separate_decoder": True,
            }
        },
        "volumes": None,
        "min_labeled_ratio": 0.1,
        "min_bbox_percent": 0.1,
        "skip_patch_validation": False,
        "cache_valid_patches": True,
        "valid_patch_find_resolution": 1,
        "ome_zarr_resolution": 0,
        "allow_unlabeled_data": False,
        "bg_sampling_enabled": True,
        "bg_to_fg_ratio": 0.5,
        "normalization_scheme": "zscore",
        "intensity_properties": {},
        "no_spatial": False,
        "rotation_axes": ["z"],
    },
    "inference_config": {
        "checkpoint_path": None,
        "patch_size": [32, 32, 32],
        "batch_size": 1,
        "output_targets": ["ink"],
        "overlap": 0.5,
        "load_strict": True,
        "num_dataloader_workers": 2,
    },
}


def test_every_known_key_loads_and_keeps_its_value():
    config = ConfigManager(**KNOWN_KEYS)
    assert config.tr_config.amp == "bfloat16"
    assert config.target_configs["ink"].ignore_label == 2
    for section, values in KNOWN_KEYS.items():
        loaded = asdict(getattr(config, section))
        for key, value in values.items():
            if key in loaded and key != "targets":
                assert loaded[key] == value, (section, key)


def test_shipped_sections_are_the_dataclasses_defaults():
    shipped = yaml.safe_load((configs_dir() / "train.yaml").read_text())
    for name, cls in SECTIONS.items():
        assert shipped[name] == asdict(cls()), name


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        # An unknown key: the file, the key, the closest known one.
        ({"tr_config": {"batchsize": 2}}, ["my.yaml: tr_config.batchsize", "did you mean batch_size?"]),
        ({"tr_config": {"batch_size": "many"}}, ["tr_config.batch_size", "'many'"]),
        ({"tr_config": {"batch_size": 0}}, ["tr_config.batch_size", "found 0"]),
        ({"tr_setup": {"tr_val_split": 0.0}}, ["tr_setup.tr_val_split", "above 0", "found 0.0"]),
        ({"tr_setup": {"model_name": "../evil"}}, ["tr_setup.model_name"]),
        (
            {"dataset_config": {"targets": {"ink": {"out_chanels": 1}}}},
            ["targets.ink.out_chanels", "out_channels"],
        ),
        ({"dataset_config": {"targets": {"ink": {"losses": [{"nam": "x"}]}}}}, ["targets.ink.losses"]),
        ({"dataset_config": {"targets": {"ink": {"ignore_label": 1, "ignore_index": 2}}}}, ["contradict"]),
        ({"dataset_config": {"axes": "$__import__('os')"}}, ["not evaluated"]),
        ({"auxiliary_tasks": {"x": {"_target_": "os.system"}}}, ["data, not code"]),
        ({"model_config": {"strides": [1, 2], "pool_op_kernel_sizes": [1, 1]}}, ["contradicts strides"]),
    ],
)
def test_a_mistake_is_one_line_that_names_key_and_remedy(sections, words):
    with pytest.raises(VolumenError) as caught:
        ConfigManager(**sections, origin="my.yaml")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_an_experiment_file_is_data(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("tr_config:\n  optimizer: $print(1)\n")
    with pytest.raises(VolumenError, match="not evaluated"):
        read_experiment(path)
    path.write_text("tr_config:\n  a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(VolumenError, match=r"line 2: a YAML tag .* is code"):
        read_experiment(path)
    path.write_text("tr_config:\n  batch_size: 1\n  batch_size: 2\n")
    with pytest.raises(VolumenError, match="given twice"):
        read_experiment(path)
    path.write_text("tr_confg:\n  batch_size: 1\n")
    with pytest.raises(VolumenError, match="did you mean tr_config"):
        read_experiment(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("tr_config:\n\tbatch_size: 2\n", "line 2: expected spaces at the beginning of a line, found a tab"),
        ("tr_config:\n  batch_size: [2\n  x: 1\n", "line 3: is not valid YAML: expected ',' or ']'"),
        ("tr_config:\n batch_size: 2\n  max_epoch: 1\n", "line 3: is not valid YAML: mapping values"),
        ("tr_config:\n  a: 1\n---\ntr_config:\n", "line 3: a second document begins"),
        ("tr_config:\n  a: 1\n  a: 2\n", "line 3: is not valid YAML: key 'a' is given twice"),
        ("# f\u00fcr\n".encode("latin1"), "expected UTF-8 text, found other bytes in line 1"),
        ("tr_config:\n".encode("utf-16"), "expected UTF-8 text, found other bytes in line 1"),
    ],
)
def test_what_is_no_experiment_file_is_told_by_its_line(tmp_path, content, said):
    path = tmp_path / "my.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(VolumenError) as caught:
        read_experiment(path)
    assert f"{path}" in str(caught.value)
    assert said in str(caught.value)
    assert "unicode string" not in str(caught.value)
    assert "^" not in str(caught.value)


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_of_other_editors_are_read(tmp_path, start, end):
    path = tmp_path / "my.yaml"
    path.write_bytes(f"{start}tr_config:{end}  batch_size: 3{end}".encode())
    assert read_experiment(path) == {"tr_config": {"batch_size": 3}}


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("tr_config", {"batch_size": True}, "tr_config.batch_size: expected a number, found true"),
        ("tr_config", {"batch_size": "two"}, "tr_config.batch_size: expected a whole number, found 'two'"),
        ("tr_config", {"batch_size": 0}, "tr_config.batch_size: expected a number of at least 1, found 0"),
        ("tr_config", {"patch_size": 64}, "tr_config.patch_size: expected a list, found 64"),
        ("tr_config", {"patch_size": [64, 0]}, "patch_size[1]: expected a number of at least 1, found 0"),
        ("tr_config", {"initial_lr": float("inf")}, "initial_lr: expected a finite number, found inf"),
        ("tr_config", {"time_budget": 35}, "expected a time such as 35m, 12h or 1h30m, found '35'"),
        ("tr_config", {"amp": "bf16"}, "one of auto, off, float16 or bfloat16, found 'bf16'; did you mean bfloat16?"),
        ("tr_config", {"derive_on_device": 3}, "derive_on_device: expected true or false or auto, found 3"),
        ("tr_setup", {"model_name": 12}, 'expected text, found 12; put it in quotes: "12"'),
        ("tr_setup", {"model_name": "a/b"}, "expected a name of letters, digits, '.', '_' and '-'"),
        ("model_config", {"n_conv_per_stage_decoder": [1, 0]}, "n_conv_per_stage_decoder[1]: expected a number of"),
        ("model_config", {"n_conv_per_stage_decoder": "one"}, "expected a whole number or a list, found 'one'"),
        ("dataset_config", {"rotation_axes": ["q"]}, "rotation_axes[0]: expected one of x, y or z, found 'q'"),
        ("dataset_config", {"targets": {"a": {"losses": ["L"]}}}, "targets.a.losses[0]: expected a mapping"),
        ("dataset_config", {"targets": {"a": {"losses": [{}]}}}, "targets.a.losses[0].name: is missing"),
        ("dataset_config", {"targets": {"a": {"losses": [{"name": "L", "wight": 1}]}}}, "did you mean weight?"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_in_words_of_yaml(section, values, said):
    with pytest.raises(VolumenError) as caught:
        ConfigManager(**{section: values}, origin="my.yaml")
    assert str(caught.value).startswith(f"my.yaml: {section if 'targets' not in values else 'targets'}")
    assert said in str(caught.value)


def test_merging_keeps_what_is_not_said_and_assignments_reach_inside():
    merged = merge({"tr_config": {"a": 1, "b": 2}}, {"tr_config": {"b": 3}})
    assert merged == {"tr_config": {"a": 1, "b": 3}}
    sections = {"dataset_config": {"targets": {"ink": {"weight": 1.0}}}}
    keys, value = parse_assignment("dataset_config.targets.ink.weight=0.5")
    assign(sections, keys, value)
    assert sections["dataset_config"]["targets"]["ink"]["weight"] == 0.5
    with pytest.raises(VolumenError, match="unknown section"):
        parse_assignment("tr_confg.batch_size=2")


@pytest.mark.parametrize("text", [
    "tr_config._target_=builtins.dict",
    "auxiliary_tasks.x={_target_: builtins.dict}",
    "tr_config.optimizer=$print(1)",
])  # fmt: skip
def test_an_assignment_is_data(text):
    with pytest.raises(VolumenError, match=r"--set: (tr_config|auxiliary_tasks).*(not code|not evaluated)"):
        parse_assignment(text)


def test_targets_are_detected_from_the_labels(tmp_path):
    label = ball((24, 24, 24))
    classes = label + shells((24, 24, 24)) * label
    write_tiff_folder(tmp_path, {"a": {"ink": label * 255, "organ": classes}})
    config = ConfigManager(dataset_dir=str(tmp_path), output_dir=str(tmp_path / "out"))
    assert config.spatial_dims == 3
    assert config.in_channels == 1
    ink, organ = config.targets["ink"], config.targets["organ"]
    assert (ink.kind, ink.out_channels, ink.activation) == ("binary", 1, "sigmoid")
    assert (organ.kind, organ.out_channels, organ.activation) == ("multiclass", 3, "softmax")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
@pytest.mark.parametrize(
    ("entry", "times"),
    [
        ({}, 1),
        ({"kind": "multiclass"}, 1),
        ({"out_channels": 3}, 1),  # read by the check alone, as nothing has to be detected
        ({"kind": "binary"}, None),  # any value above 0 is foreground, and only a signed type has others
        ({"instances": "foreground"}, 0),
    ],
)
def test_labels_are_read_once_at_most_where_nothing_is_kept(tmp_path, monkeypatch, entry, times, dtype):
    label = ball((24, 24, 24)) + shells((24, 24, 24)) * ball((24, 24, 24))
    write_tiff_folder(tmp_path, {"a": {"ink": label.astype(dtype)}})
    monkeypatch.setenv("VOLUMEN_CACHE", "off")
    config = ConfigManager(dataset_config={"targets": {"ink": entry}}, dataset_dir=str(tmp_path))
    volume = type(config.cases[0].labels["ink"])
    inner, voxels = volume.read, []

    def read(self, region):
        voxels.append(np.prod([part.stop - part.start for part in region]))
        return inner(self, region)

    monkeypatch.setattr(volume, "read", read)
    assert config.label_readings
    assert sum(voxels) == label.size * (int(dtype is np.int16) if times is None else times)


def test_instances_are_not_taken_for_classes(tmp_path):
    label = (np.arange(20 * 20) // 3).reshape(20, 20).astype(np.uint8)
    write_tiff_folder(tmp_path, {"a": {"cells": label}}, images={"a": image_of(label > 70)})
    config = ConfigManager(dataset_dir=str(tmp_path))
    with pytest.raises(VolumenError, match="more than 64 values"):
        _ = config.targets


TASK = {"type": "distance_transform", "source_target": "ball", "losses": [{"name": "SmoothL1Loss"}]}


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ({"d": {"type": "distance_transfrm", "source_target": "ink", "losses": [{"name": "MaskedMSELoss"}]}}, ["distance_transform"]),
        ({"d": {"type": "distance_transform", "source_target": "inc", "losses": [{"name": "MaskedMSELoss"}]}}, ["did you mean ink?"]),
        ({"d": {"type": "distance_transform", "source_target": "ink"}}, ["no loss"]),
        ({"ink": {"type": "distance_transform", "source_target": "ink", "losses": [{"name": "MaskedMSELoss"}]}}, ["labelled target's"]),
        ({"d": "distance_transform"}, ["auxiliary_tasks.d", "expected a mapping with type and source_target"]),
        ({"n": {"type": "surface_normals", "source_target": "ink", "out_channels": 2, "losses": [{"name": "MaskedMSELoss"}]}}, ["3 for surface_normals"]),
        ({"d": {**TASK, "source_target": ["ink"]}}, ["auxiliary_tasks.d.source_target", "found ['ink']"]),
        ({"d": {**TASK, "source_target": "ink", "losses": [{"name": "MaskedMSELoss", "wieght": 1}]}}, ["auxiliary_tasks.d.losses[0].wieght", "did you mean weight?"]),
        ({"d": {**TASK, "source_target": "ink", "loss_weight": -1}}, ["auxiliary_tasks.d.loss_weight", "a number of at least 0"]),
        ({"d": {**TASK, "source_target": "ink", "loss_wieght": 1}}, ["auxiliary_tasks.d.loss_wieght", "did you mean loss_weight?"]),
        ({"d": {**TASK, "source_target": "ink", "loss_weight": 1, "weight": 2}}, ["loss_weight and weight contradict each other"]),
        ({"d": {**TASK, "source_target": "ink", "channels": 1, "out_channels": 2}}, ["auxiliary_tasks.d"]),
        ({"d": {**TASK, "source_target": "ink", "separate_decoder": "maybe"}}, ["auxiliary_tasks.d.separate_decoder", "true or false"]),
    ],
)  # fmt: skip
def test_a_derived_target_that_cannot_train_is_refused(tmp_path, tasks, words):
    write_tiff_folder(tmp_path, {"a": {"ink": ball((16, 16, 16))}})
    config = ConfigManager(dataset_dir=str(tmp_path), auxiliary_tasks=tasks)
    with pytest.raises(VolumenError) as caught:
        _ = config.targets
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("settings", "asked", "words"), [
    ({"volumes": []}, "layout", r"dataset_config.volumes: names no image"),
    ({"volumes": ["b"]}, "layout", r"dataset_config.volumes: .*found 'b'"),
    ({"valid_patch_find_resolution": 1}, "search_cases", r"valid_patch_find_resolution: .*single res.*; set it to 0"),
])  # fmt: skip
def test_a_setting_that_the_data_cannot_follow_is_told(tmp_path, settings, asked, words):
    write_tiff_folder(tmp_path, {"a": {"ink": ball((16, 16))}})
    config = ConfigManager(dataset_dir=str(tmp_path), dataset_config=settings)
    with pytest.raises(VolumenError, match=words):
        getattr(config, asked)


def test_a_patch_of_other_dimensions_is_told_once(tmp_path):
    write_tiff_folder(tmp_path, {"a": {"ink": ball((16, 16))}})
    config = ConfigManager(dataset_dir=str(tmp_path), tr_config={"patch_size": [8, 8, 8]}, origin="my.yaml")
    with pytest.raises(VolumenError, match=r"^my.yaml: tr_config.patch_size: expected 2 numbers"):
        _ = config.plan


def test_a_snapshot_configures_the_same_experiment_again(tmp_path):
    write_tiff_folder(tmp_path, {"a": {"ink": shells((40, 40, 40))}})
    tasks = {
        "n": {"type": "surface_normals", "source_target": "ink", "losses": [{"name": "CosineSimilarityLoss"}]}
    }
    first = ConfigManager(
        dataset_dir=str(tmp_path),
        output_dir="out",
        tr_config={"patch_size": [20, 20, 20]},
        model_config={"features_per_stage": [4, 8, 16]},
        auxiliary_tasks=tasks,
    )
    snapshot = yaml.safe_load(yaml.safe_dump(first.snapshot()))
    second = ConfigManager(**snapshot)
    assert second.snapshot() == snapshot
    assert second.network_config == first.network_config
    assert second.patch_size == first.patch_size == (20, 20, 20)
    assert second.targets == first.targets


def test_a_snapshot_holds_the_voxel_size_that_was_told_and_not_one_that_is_assumed(tmp_path):
    untold = write_tiff_folder(tmp_path / "a", {"scroll": {"surface": shells((24, 24, 64))}})

    def sizes(**dataset) -> tuple:
        config = ConfigManager(
            tr_config={"patch_size": [16, 16, 16]}, dataset_config=dataset, dataset_dir=str(untold)
        )
        section = config.snapshot()["dataset_config"]
        return section["spacing"], section["trained_spacing"]

    assert sizes() == (None, None)
    assert sizes(spacing=[3, 1, 1]) == ([3, 1, 1], [3, 1, 1])
    for file in (untold / "images").iterdir():
        space = {"axes": "ZYX", "spacing": 3.0, "unit": "um"}
        tifffile.imwrite(file, tifffile.imread(file), imagej=True, resolution=(2.0, 2.0), metadata=space)
    assert sizes() == (None, [3, 0.5, 0.5])


def test_a_snapshot_names_the_checkpoint_that_weights_came_from_and_no_other(tmp_path):
    write_tiff_folder(tmp_path, {"a": {"ink": shells((40, 40, 40))}})

    def snapshot(**setup) -> dict:
        sections = {"tr_setup": setup, "tr_config": {"patch_size": [16, 16, 16]}}
        return ConfigManager(**sections, dataset_dir=str(tmp_path), output_dir="out").snapshot()["tr_setup"]

    # A resumed run is the uninterrupted one; a fine-tuned one needs the weights that it began with.
    assert snapshot(checkpoint_path="old/m_1.pth")["checkpoint_path"] is None
    assert snapshot(checkpoint_path="old/m_1.pth", load_weights_only=True)["checkpoint_path"] == "old/m_1.pth"


def test_a_resumed_run_keeps_its_split(tmp_path, caplog):
    write_tiff_folder(tmp_path / "data", {name: {"ink": shells((16, 16, 16))} for name in "abcdef"})
    run = tmp_path / "out" / "model"
    run.mkdir(parents=True)

    def config(output: str, **setup) -> ConfigManager:
        data = str(tmp_path / "data")
        return ConfigManager(tr_setup=setup, dataset_dir=data, output_dir=str(tmp_path / output))

    first = config("out")
    (run / "model_split.json").write_text(first.split_text())
    assert config("out", resume=True).split == first.split
    assert "stays" not in caplog.text
    assert config("out", resume=True, tr_val_split=0.5, seed=3).split == first.split
    assert "the split of the resumed run stays" in caplog.text
    # Also where the checkpoint of another folder is resumed: what validated there must not train here.
    other = config("new", checkpoint_path=str(run / "model_1.pth"), tr_val_split=0.5, seed=3)
    assert other.split == first.split
    assert config("new", tr_val_split=0.5, seed=3).split != first.split


CHANGES = {
    "tr_setup": {
        "seed": 3,
        "tr_val_split": 0.5,
        "compute_loss_on_labeled_only": True,
        "autoconfigure": False,
    },
    "tr_config": {"patch_size": [8, 16, 16], "num_dataloader_workers": 7, "enable_deep_supervision": False},
    "model_config": {"features_per_stage": [4, 8], "separate_decoders": False, "max_features": 64},
    "dataset_config": {"normalization_scheme": "zscore", "skip_patch_validation": True},
}
# What is opened and what is in it, which a variant takes over, and what the file cannot change.
OF_THE_DATA = {
    "device",
    "has_device",
    "layout",
    "cases",
    "spatial_dims",
    "in_channels",
    "spacing",
    "fingerprints",
    "label_readings",
}


@pytest.mark.parametrize("changed", [[name] for name in CHANGES] + [list(CHANGES)])
def test_a_variant_answers_like_a_configuration_of_its_own_and_reads_the_labels_once(
    tmp_path, changed, monkeypatch
):
    labels = {"a": {"ball": ball((24, 32, 32)).astype("uint8")}, "b": {"ball": ball((16, 32, 40))}}
    folder = write_tiff_folder(tmp_path / "data", labels)
    patch = {"tr_config": {"patch_size": [16, 16, 16]}}

    def asked(sections) -> ConfigManager:
        return ConfigManager(
            dataset_dir=str(folder),
            output_dir=str(tmp_path / "out"),
            device="cpu",
            auxiliary_tasks={"distance": TASK},
            **sections,
        )

    answers = {
        name
        for part in ConfigManager.__mro__
        for name, value in vars(part).items()
        if isinstance(value, cached_property | property) and not name.startswith("__")
    } - OF_THE_DATA
    assert {
        "plan",
        "split",
        "targets",
        "network_config",
        "_sampled_intensities",
        "labelled_profiles",
    } <= answers
    config = asked(patch)
    for name in answers:
        getattr(config, name)
    sections = {name: {**patch.get(name, {}), **CHANGES[name]} for name in changed}
    fresh = asked({**patch, **sections})
    expected = {name: getattr(fresh, name) for name in answers}
    monkeypatch.setattr(
        "volumen.config.detection.detect_label_kind", lambda *_, **__: pytest.fail("read twice")
    )
    variant = config.variant(
        **{name: replace(getattr(config, name), **values) for name, values in sections.items()}
    )
    for name in answers:
        np.testing.assert_equal(_comparable(getattr(variant, name)), _comparable(expected[name]), name)


def test_a_configuration_never_changes_and_its_variants_share_the_opened_data(tmp_path):
    write_tiff_folder(tmp_path, {"a": {"ink": ball((16, 16, 16))}})
    config = ConfigManager(dataset_dir=str(tmp_path), device="cpu")
    for name in ("tr_config", "split", "cases", "device", "a_new_name"):
        with pytest.raises(FrozenInstanceError, match=name):
            setattr(config, name, None)
    variant = config.variant(tr_config=replace(config.tr_config, patch_size=[8, 8, 8]))
    assert (config.patch_size, variant.patch_size) == ((16, 16, 16), (8, 8, 8))
    assert variant.cases is config.cases
    assert variant.label_readings is config.label_readings
    assert variant.run_device is config.run_device
    split = Split({"a": [((0, 8),) * 3]}, {}, 1.0, 0)
    assert config.variant(split=split).variant(tr_config=config.tr_config).split is split
    assert config.split is not split


def test_a_section_may_be_its_dataclass():
    settings = TrainingConfig(batch_size=4)
    config = ConfigManager(tr_config=settings, model_config=ModelConfig())
    plain = ConfigManager(tr_config={"batch_size": 4})
    assert config.tr_config == plain.tr_config
    assert config.tr_config.initial_lr == 1e-3
    assert config.given == plain.given
    assert config.given["tr_config"] == {"batch_size"}
    settled = ConfigManager(tr_config=replace(config.tr_config, batch_size=8), given=config.given)
    assert settled.given == config.given
    with pytest.raises(VolumenError, match="tr_setup: expected a mapping of keys to values"):
        ConfigManager(tr_setup=settings)


def _comparable(value):
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def test_a_bare_off_means_off_although_yaml_reads_false():
    assert ConfigManager(tr_config=yaml.safe_load("amp: off")).tr_config.amp == "off"
    with pytest.raises(VolumenError, match="amp"):
        ConfigManager(tr_config={"amp": True})


def test_distances_may_have_a_channel_for_each_class(tmp_path):
    label = ball((16, 16, 16))
    write_tiff_folder(tmp_path, {"a": {"organ": label + shells((16, 16, 16)) * label}})
    task = {
        "type": "distance_transform",
        "source_target": "organ",
        "classes": [1, 2],
        "losses": [{"name": "L1Loss"}],
    }
    for channels in (1, 2):
        config = ConfigManager(
            dataset_dir=str(tmp_path), auxiliary_tasks={"d": {**task, "out_channels": channels}}
        )
        assert config.targets["d"].out_channels == channels
        assert config.derived_tasks["d"]["out_channels"] == channels
    config = ConfigManager(dataset_dir=str(tmp_path), auxiliary_tasks={"d": {**task, "out_channels": 3}})
    with pytest.raises(VolumenError, match="out_channels"):
        _ = config.targets


@pytest.mark.parametrize(
    ("kind", "activation", "losses"),
    [
        ("multiclass", None, ["CrossEntropyLoss", "SoftDiceLoss"]),
        ("multiclass", "softmax", ["CrossEntropyLoss", "SoftDiceLoss"]),
        ("multiclass", "sigmoid", ["BCEWithLogitsLoss", "SoftDiceLoss"]),
        ("binary", None, ["BCEWithLogitsLoss", "SoftDiceLoss"]),
    ],
)
def test_the_activation_decides_which_cross_entropy_trains(kind, activation, losses):
    config = TargetConfig(activation=activation)
    target = make_target(config, "cells", kind=kind, out_channels=1 if kind == "binary" else 3, separate=True)
    section = target.loss_section()
    assert [loss["name"] for loss in section["losses"]] == losses
    assert section["activation"] == target.activation
    MultiTaskLoss({"cells": section})


def test_rotation_axes_of_a_flat_image(tmp_path):
    write_tiff_folder(
        tmp_path, {"a": {"ink": (np.arange(40 * 40).reshape(40, 40) % 40 > 20).astype(np.uint8)}}
    )
    for axes in (None, [], ["z"]):
        config = ConfigManager(dataset_dir=str(tmp_path), dataset_config={"rotation_axes": axes})
        assert config.rotation_axes == axes
    config = ConfigManager(dataset_dir=str(tmp_path), dataset_config={"rotation_axes": ["z", "x"]})
    with pytest.raises(
        VolumenError, match=r"rotation_axes: expected \[z\] or \[\] for 2D images, found \[z, x\]"
    ):
        _ = config.rotation_axes


def test_a_value_that_the_user_gave_is_known_from_the_default(tmp_path):
    write_tiff_folder(tmp_path, {"a": {"ink": shells((24, 24, 24))}})
    for given in (None, 0.10):
        section = {} if given is None else {"min_labeled_ratio": given}
        config = ConfigManager(
            tr_config={"patch_size": [8, 8, 8]},
            dataset_config=section,
            dataset_dir=str(tmp_path),
            device="cpu",
        )
        assert config.dataset_config.min_labeled_ratio == 0.10
        assert config.relaxes_labeled_ratio is (given is None)
        # The snapshot trains the same model again, so it must give way there too.
        again = ConfigManager(**config.snapshot(), device="cpu")
        assert again.relaxes_labeled_ratio is (given is None)


def test_a_time_budget_leaves_what_the_user_gave(tmp_path):
    from volumen.time_budget.candidates import candidates

    write_tiff_folder(tmp_path, {"a": {"ink": shells((24, 24, 24)), "gold": shells((24, 24, 24))}})
    data = {"tr_config": {"patch_size": [8, 8, 8]}, "dataset_dir": str(tmp_path), "device": "cpu"}
    chosen = candidates(ConfigManager(**data))
    assert len({(choice.batch_size, choice.learning_rate) for choice in chosen}) > 1
    assert not all(choice.separate_decoders for choice in chosen)
    given = {"batch_size": 2, "initial_lr": 0.001}  # the values that null stands for without a budget
    data["tr_config"] = {**data["tr_config"], **given}
    fixed = candidates(ConfigManager(**data, model_config={"separate_decoders": True}))
    assert {(choice.batch_size, choice.learning_rate) for choice in fixed} == {(2, 0.001)}
    assert all(choice.separate_decoders for choice in fixed)


def test_a_recipe_is_read_by_its_name_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"nuclei", "neurons", "nnunet"} <= set(recipes())
    assert read_experiment("nuclei") == read_experiment(recipes()["nuclei"])
    Path("nuclei").write_text("tr_config: {max_epoch: 3}")
    assert read_experiment("nuclei") == {"tr_config": {"max_epoch": 3}}
    with pytest.raises(VolumenError, match=r"nucl\b.*or name a recipe: .*nuclei"):
        read_experiment("nucl")
