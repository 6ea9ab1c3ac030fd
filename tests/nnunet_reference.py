# ruff: noqa: E402
"""Make small models of nnU-Net v2, images, and nnU-Net's own logits of them; runs where nnU-Net is installed.

    python benchmarks/nnunet_environment.py /tmp/nnunet        # prints the interpreter
    INTERPRETER tests/nnunet_reference.py tests/data/nnunet fixture
    INTERPRETER tests/nnunet_reference.py FOLDER all

Each model gets a folder `MODEL/` with plans, description and checkpoints written by nnU-Net's own trainer (random
weights), `images/`, and for each image `expected/CASE.npz`: `logits`, float32 (K, Z, Y, X) on the image's voxels, NaN
outside the nonzero box, and `segmentation`. nnU-Net sums windows in half precision; here its sums are in single
precision, and `half` has the logits as nnU-Net sums them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(nnUNet_compile="false", nnUNet_def_n_proc="1", nnUNet_n_proc_DA="1")
for _name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ.setdefault(_name, tempfile.mkdtemp())

import nibabel
import numpy as np
import torch
from PIL import Image

PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESIDUAL = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
BACKGROUND = {"background": 0}
CLASSES = {**BACKGROUND, "liver": 1, "tumour": 2}
REGIONS = {**BACKGROUND, "whole": [1, 2], "core": [2]}

MODELS: dict[str, dict] = {
    # Anisotropic: slices are resampled one by one; axes in another order; a mask; CT; two folds.
    "anisotropic": {
        "network": PLAIN, "patch": [8, 24, 24], "spacing": [3.0, 1.0, 1.2], "transpose": [1, 0, 2],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "schemes": ["CTNormalization", "ZScoreNormalization"], "masked": [False, True], "labels": CLASSES,
        "folds": [0, 1], "size": [30, 12, 26], "voxel": [0.8, 3.5, 1.0], "border": 3,
    },
    # Cubic in all axes, regions, an image smaller than the patch along one axis.
    "residual": {
        "network": RESIDUAL, "patch": [16, 16, 24], "spacing": [1.0, 1.0, 1.0], "transpose": [0, 1, 2],
        "strides": [[1, 1, 1], [2, 2, 2], [1, 2, 2]], "kernels": [[3, 3, 3]] * 3,
        "schemes": ["ZScoreNormalization"], "masked": [False], "labels": REGIONS, "order": [1, 2],
        "folds": [0], "size": [15, 20, 18], "voxel": [1.3, 0.9, 1.1], "border": 0,
    },
    "slices": {
        "network": PLAIN, "patch": [16, 24], "spacing": [1.0, 1.0], "transpose": [0, 1, 2],
        "strides": [[1, 1], [2, 2], [2, 2]], "kernels": [[3, 3]] * 3, "schemes": ["RescaleTo01Normalization"],
        "masked": [False], "labels": CLASSES, "folds": ["all"], "size": [5, 30, 26], "voxel": [4.0, 0.9, 1.0],
        "border": 1,
    },
    "photographs": {
        "network": RESIDUAL, "patch": [32, 24], "spacing": [1.0, 1.0], "transpose": [0, 1, 2],
        "strides": [[1, 1], [2, 2], [2, 2]], "kernels": [[3, 3]] * 3, "schemes": ["RGBTo01Normalization"] * 3,
        "masked": [False] * 3, "labels": CLASSES, "folds": [0], "size": [40, 55], "voxel": None, "border": 0,
    },
    "same_size": {
        "network": PLAIN, "patch": [16, 16, 16], "spacing": [1.0, 1.0, 1.0], "transpose": [0, 1, 2],
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "kernels": [[3, 3, 3]] * 3, "schemes": ["NoNormalization"],
        "masked": [False], "labels": CLASSES, "folds": [0], "size": [17, 33, 16], "voxel": [1.0, 1.0, 1.0], "border": 0,
    },
}  # fmt: skip
FIXTURE = ("anisotropic", "residual")


def main() -> None:
    """Make the models of a set."""
    folder, names = Path(sys.argv[1]), FIXTURE if sys.argv[2] == "fixture" else tuple(MODELS)
    for number, name in enumerate(names):
        make_model(folder / name, MODELS[name], number)
        make_images(folder / name / "images", MODELS[name], number)
        write_expected(folder / name, MODELS[name], half=sys.argv[2] != "fixture")


def make_model(folder: Path, rules: dict, seed: int) -> None:
    """Write a folder of results with random weights by nnU-Net's trainer."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    ndim = len(rules["patch"])
    name = "2d" if ndim == 2 else "3d_fullres"
    blocks = "n_conv_per_stage" if rules["network"] == PLAIN else "n_blocks_per_stage"
    arguments = {
        "n_stages": 3, "features_per_stage": [4, 6, 8], "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
        "kernel_sizes": rules["kernels"], "strides": rules["strides"], blocks: [1, 2, 2],
        "n_conv_per_stage_decoder": [1, 2], "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    resampling = "resample_data_or_seg_to_shape"
    options = {"order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"nnUNetPlans_{name}", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": rules["patch"], "spacing": rules["spacing"], "normalization_schemes": rules["schemes"],
        "use_mask_for_norm": rules["masked"],
        "resampling_fn_data": resampling, "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **options},
        "resampling_fn_seg": resampling, "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **options},
        "resampling_fn_probabilities": resampling,
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **options}, "batch_dice": False,
        "architecture": {"network_class_name": rules["network"], "arch_kwargs": arguments,
                         "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]},
    }  # fmt: skip
    properties = {"mean": 40.0, "std": 25.0, "percentile_00_5": -30.0, "percentile_99_5": 110.0}
    count = len(rules["schemes"])
    plans = {
        "dataset_name": "Dataset001_Small", "plans_name": "nnUNetPlans",
        "transpose_forward": rules["transpose"], "transpose_backward": np.argsort(rules["transpose"]).tolist(),
        "image_reader_writer": "NaturalImage2DIO" if rules["voxel"] is None else "SimpleITKIO",
        "configurations": {name: configuration}, "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(n): properties for n in range(count)},
    }  # fmt: skip
    description = {
        "channel_names": {str(n): f"channel{n}" for n in range(count)},
        "labels": rules["labels"],
        "file_ending": ".png" if rules["voxel"] is None else ".nii.gz",
        **({"regions_class_order": rules["order"]} if "order" in rules else {}),
    }
    preprocessed = Path(os.environ["nnUNet_preprocessed"]) / "Dataset001_Small" / f"nnUNetPlans_{name}"  # noqa: SIM112
    preprocessed.mkdir(parents=True, exist_ok=True)
    (preprocessed / "case.b2nd").touch()
    for fold in rules["folds"]:
        torch.manual_seed(100 * seed + (fold if isinstance(fold, int) else 9))
        trainer = nnUNetTrainer(
            {**plans, "continue_training": False}, name, fold, description, torch.device("cpu")
        )
        trainer.initialize()
        with torch.no_grad():
            for weight in trainer.network.parameters():
                weight.copy_(0.3 * torch.randn(weight.shape) + (weight.ndim == 1) * 0.5)
        axes = range(ndim) if ndim == 2 or rules["transpose"] == [0, 1, 2] else (1, 2)
        trainer.inference_allowed_mirroring_axes = tuple(axes)
        trainer.logger.log("mean_fg_dice", np.float64(0.5), 0)
        target = folder / f"fold_{fold}"
        target.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(str(target / "checkpoint_final.pth"))
    (folder / "plans.json").write_text(json.dumps(plans, indent=1))
    (folder / "dataset.json").write_text(json.dumps(description, indent=1))


def make_images(folder: Path, rules: dict, seed: int) -> None:
    """Write an image per model: smooth blobs and noise, 0 in a border."""
    from scipy import ndimage

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    shape, border = rules["size"], rules["border"]
    for channel in range(1 if rules["voxel"] is None else len(rules["schemes"])):
        values = (
            ndimage.gaussian_filter(random.normal(size=shape), 2) * 300 + random.normal(size=shape) * 10 + 40
        )
        if rules["voxel"] is None:
            colours = np.stack([values, values[::-1], values[:, ::-1]], axis=-1)
            Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8)).save(folder / "case_0000.png")
            return
        if border:
            values[(slice(None), *[slice(border, -border)] * (len(shape) - 1))] += 1000
            values = np.where(values > 500, values - 1000, 0)
            values[1:3, border + 1 : border + 3, border + 2 : border + 5] = 0  # a hole, which is inside
            values[:1] = 0
        affine = np.diag([*rules["voxel"][::-1], 1.0])
        image = nibabel.Nifti1Image(np.rint(values).astype(np.int16).T, affine)
        nibabel.save(image, folder / f"case_{channel:04d}.nii.gz")


def write_expected(folder: Path, rules: dict, *, half: bool) -> None:
    """Write nnU-Net's own logits on the image's voxels, and its segmentation."""
    import nnunetv2.inference.predict_from_raw_data as module
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    predictor = module.nnUNetPredictor(use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), tuple(rules["folds"]))
    preprocessor = predictor.configuration_manager.preprocessor_class()
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    files = [str(path) for path in sorted((folder / "images").iterdir())]
    data, _, properties = preprocessor.run_case(files, None, plans, configuration, predictor.dataset_json)
    data = torch.from_numpy(data)
    found = {"half": predictor.predict_logits_from_preprocessed_data(data).float()} if half else {}

    def in_single(tile_size, **options):
        return compute_gaussian(tile_size, **{**options, "dtype": torch.float32})

    stored = module.torch.half
    module.torch.half, module.compute_gaussian = torch.float32, in_single
    try:
        found["logits"] = predictor.predict_logits_from_preprocessed_data(data)
    finally:
        module.torch.half, module.compute_gaussian = stored, compute_gaussian
    segmentation = module.convert_predicted_logits_to_segmentation_with_correct_shape(
        found["logits"].clone(), plans, configuration, predictor.label_manager, properties
    )
    (folder / "expected").mkdir(exist_ok=True)
    arrays = {name: on_image(v, predictor, properties) for name, v in found.items()}
    np.savez_compressed(folder / "expected" / "case.npz", segmentation=segmentation, **arrays)


def on_image(logits: torch.Tensor, predictor, properties: dict) -> np.ndarray:
    """Return logits on the voxels of the image, NaN outside the nonzero box, by the steps of nnU-Net's export."""
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    shape = properties["shape_after_cropping_and_before_resampling"]
    current = (
        configuration.spacing if len(configuration.spacing) == 3 else [spacing[0], *configuration.spacing]
    )
    values = np.asarray(configuration.resampling_fn_probabilities(logits, shape, current, spacing))
    whole = np.full((len(values), *properties["shape_before_cropping"]), np.nan, np.float32)
    whole[(slice(None), *(slice(*span) for span in properties["bbox_used_for_cropping"]))] = values
    return whole.transpose([0, *(axis + 1 for axis in plans.transpose_backward)])


if __name__ == "__main__":
    main()
