"""`volumen predict`: flags in, `PredictRequest` out."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from volumen.cli.flags import Once
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    from volumen.inference.request import PredictRequest

logger = logging.getLogger(__name__)

# Keys of `inference_config` that `PredictRequest` calls differently.


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `volumen predict` to a parser."""
    files = parser.add_argument_group("what")
    files.add_argument(
        "-i",
        "--input",
        action=Once,
        metavar="IMAGES",
        help="image, or folder of images (its images/ folder if it has one)",
    )
    files.add_argument(
        "-m",
        "--checkpoint",
        action=Once,
        metavar="MODEL.pth",
        help="trained network: a .pth file, or a bundle's model.pt",
    )
    files.add_argument(
        "-o",
        "--output",
        action=Once,
        metavar="OUT",
        required=True,
        help="NAME.zarr for one image, else a folder that gets IMAGE.zarr each",
    )
    files.add_argument(
        "--like",
        action=Once,
        metavar="OLD.zarr",
        help="repeat this prediction: its image, network and settings",
    )
    files.add_argument(
        "--config-path",
        metavar="YAML",
        help="experiment file; its inference_config goes before the checkpoint's",
    )
    files.add_argument("--targets", metavar="NAMES", help="targets to predict, by commas (default: all)")
    files.add_argument(
        "--mask",
        action=Once,
        metavar="VOLUME",
        help="volume, or folder with one per image: predict where it is above 0",
    )
    files.add_argument(
        "--region",
        metavar="Z:Z,Y:Y,X:X",
        help="start:stop per axis in voxels, such as 0:64,100:300,: (default: all)",
    )
    files.add_argument(
        "--axes",
        metavar="LETTERS",
        help="axes of the image, such as czyx (default: by its metadata and shape)",
    )
    files.add_argument(
        "--level", metavar="N", type=int, help="resolution level of an OME-Zarr image (default: 0)"
    )

    how = parser.add_argument_group("how")
    how.add_argument(
        "--overlap", metavar="SHARE", type=float, help="share of a window that the next covers (default: 0.5)"
    )
    how.add_argument(
        "--patch-size",
        metavar="Z,Y,X",
        help="window in voxels, such as 64,192,192 (default: the training patch)",
    )
    how.add_argument("--batch-size", metavar="N", type=int, help="windows per forward pass (default: 1)")
    how.add_argument(
        "--tta",
        nargs="?",
        const="mirror",
        choices=("none", "mirror", "rotate"),
        help="average over flips (mirror), or flips and 90-degree rotations (rotate) (default: none)",
    )
    how.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    how.add_argument(
        "--amp", choices=("auto", "off", "bfloat16", "float16"), help="mixed precision (default: auto)"
    )
    how.add_argument(
        "--workers", metavar="N", type=int, help="threads that read, and as many that write (default: 2)"
    )
    how.add_argument(
        "--no-skip-empty", dest="skip_empty", action="store_false", default=None,
        help="predict windows without contrast too (default: left at 0)",
    )  # fmt: skip
    how.add_argument(
        "--on-corrupt",
        choices=("stop", "skip"),
        help="what to do at a chunk that cannot be read (default: stop)",
    )
    how.add_argument(
        "--nonfinite",
        choices=("zero", "refuse"),
        help="NaN or infinity in the image (default: as in training)",
    )

    several = parser.add_argument_group("several processes or machines (needs volumen[dask])")
    several.add_argument(
        "--nworkers",
        type=int,
        metavar="N",
        help="worker processes on this machine, one per GPU; with --scheduler: workers to wait for (default: 1)",
    )
    several.add_argument(
        "--scheduler", metavar="ADDRESS", help="Dask scheduler whose workers predict, such as tcp://node:8786"
    )

    result = parser.add_argument_group("result")
    result.add_argument(
        "--dtype",
        choices=("uint8", "float16", "float32", "labels"),
        help="probabilities as uint8 (255 is 1), float16 or float32, or labels (default: uint8)",
    )
    result.add_argument(
        "--threshold",
        metavar="P",
        type=float,
        help="write labels, 1 from this probability on (default: probabilities)",
    )
    result.add_argument(
        "--min-size", type=int, metavar="VOXELS", help="remove smaller components of labels (default: 0)"
    )
    result.add_argument(
        "--keep-largest",
        type=int,
        metavar="N",
        help="keep the N largest components of each class (default: all)",
    )
    result.add_argument(
        "--fill-holes",
        type=int,
        metavar="VOXELS",
        help="fill holes of up to this size in labels (default: 0)",
    )
    result.add_argument(
        "--instances",
        metavar="HEADS",
        help="also write TARGET_instances: from a wall such as membrane, from foreground=cell,boundary=membrane, "
        "or from affinities (default: none)",
    )
    result.add_argument(
        "--format", choices=("zarr", "tif", "nifti"), help="format of the output (default: by its name)"
    )
    result.add_argument(
        "--compress", choices=("zstd", "lz4", "gzip", "none"), help="compression of chunks (default: zstd)"
    )
    result.add_argument(
        "--no-pyramid", dest="pyramid", action="store_false", default=None, help="full resolution only"
    )
    result.add_argument(
        "--overwrite", action="store_true", default=None, help="remove an earlier prediction in the output"
    )


def request_from(arguments: argparse.Namespace, settings: Mapping[str, Any] | None = None) -> PredictRequest:
    """Return the request that flags ask for; what is not given is as in `settings`, else the default.

    Args:
        arguments: the parsed flags.
        settings: fields of `PredictRequest` from an experiment file or a checkpoint.

    Raises:
        VolumenError: a flag's value cannot be, or the input or the checkpoint is missing.
    """
    from volumen.inference.request import PredictRequest

    given: dict[str, Any] = dict(settings or {})
    if getattr(arguments, "like", None) is not None:
        from volumen.inference.reproduce import recipe_of, settings_like

        given.update(settings_like(recipe_of(Path(arguments.like))))
    for name in PredictRequest.__dataclass_fields__:
        value = getattr(arguments, name, None)
        if value is not None:
            given[name] = value
    for name in ("input", "checkpoint"):
        if name not in given:
            flag = {"input": "-i", "checkpoint": "-m"}[name]
            raise VolumenError(flag, "missing", remedy=f"give the {name}, or --like an earlier prediction")
    if isinstance(given.get("targets"), str):
        given["targets"] = tuple(name for name in given["targets"].replace(",", " ").split())
    if isinstance(given.get("patch_size"), str):
        given["patch_size"] = _numbers("--patch-size", given["patch_size"])
    if isinstance(given.get("instances"), (str, Mapping)):
        from volumen.inference.rules import read_rules

        given["instances"] = read_rules(given["instances"])
    if isinstance(given.get("region"), str):
        given["region"] = _region(given["region"])
    return PredictRequest(**given)


def file_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that the experiment file of `--config-path` sets; none without one.

    Raises:
        VolumenError: for a wrong file, key or value.
    """
    from volumen.inference.settings import request_fields

    return request_fields(_inference_section(arguments))


def _inference_section(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return `inference_config` as the experiment file gives it."""
    if getattr(arguments, "config_path", None) is None:
        return {}
    from volumen.config.experiment_file import read_experiment
    from volumen.config.sections import InferenceConfig
    from volumen.config.validation import check_section

    section = read_experiment(arguments.config_path).get("inference_config", {})
    check_section(InferenceConfig, section, f"{arguments.config_path}: inference_config")
    return section


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise VolumenError(flag, expected="whole numbers by commas", found=repr(text)) from None


def _region(text: str) -> tuple[tuple[int | None, int | None], ...]:
    """Return bounds per axis; None where a bound is left out."""
    bounds = []
    for part in text.split(","):
        start, colon, stop = part.partition(":")
        try:
            if not colon:
                raise ValueError
            bounds.append((int(start) if start else None, int(stop) if stop else None))
        except ValueError:
            raise VolumenError(
                "--region", expected="start:stop per axis, by commas", found=repr(text)
            ) from None
    return tuple(bounds)


def run_predict(arguments: argparse.Namespace) -> int:
    """Run `volumen predict`; return the exit status.

    Raises:
        VolumenError: for whatever a user can set right.
    """
    from volumen.cli.progress_bar import ProgressBar
    from volumen.inference.predict import predict
    from volumen.inference.predictor import load_predictor
    from volumen.inference.request import log_report
    from volumen.inference.settings import request_fields
    from volumen.utils.device import choose_device

    section = _inference_section(arguments)
    settings = request_fields(section)
    asked = request_from(arguments, settings)
    predictor = load_predictor(
        asked.checkpoint,
        choose_device("cpu" if asked.is_shared else asked.device),
        strict=section.get("load_strict"),
    )
    trained = request_fields(predictor.config.get("inference_config", {}))
    request = request_from(arguments, {**trained, **settings, "checkpoint": asked.checkpoint})
    if request.like is not None:
        use_threads_of(request)
    with ProgressBar() as bar:
        report = predict(request, progress=bar, predictor=predictor)
    log_report(report)
    return 0


def use_threads_of(request: PredictRequest) -> None:
    """Compute with as many threads as the prediction that is repeated: on a CPU the last bits depend on them."""
    import torch

    from volumen.inference.reproduce import recipe_of

    threads = recipe_of(Path(str(request.like))).get("machine", {}).get("threads")
    if isinstance(threads, int) and threads > 0 and not request.is_shared:
        torch.set_num_threads(threads)
