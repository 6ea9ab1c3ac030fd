"""Packages a trained model as a MONAI bundle: one zip file that runs with MONAI and the listed packages."""

from __future__ import annotations

import logging
import re
import shutil
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from volumen.inference.predictor import Predictor, file_checksum, load_predictor, read_checkpoint
from volumen.sharing.export import check_output, publish, scratch_folder
from volumen.sharing.metadata import build_metadata, find_preview, read_metrics, to_json, training_summary
from volumen.sharing.model_card import model_card
from volumen.sharing.packaged_configs import write_configs
from volumen.sharing.released import WEIGHTS, write_released
from volumen.sharing.request import PackageRequest
from volumen.utils.bundle_root import bundle_root, license_text
from volumen.utils.errors import VolumenError

logger = logging.getLogger(__name__)

_DATA_LICENSE = """The licence of the training data is not stated. Ask whoever made this model before you use it
for more than looking at it.
"""
_EPOCH_OF_ZIP = (1980, 1, 1, 0, 0, 0)
_MAX_BYTES = 25_000_000


@dataclass(frozen=True)
class PackageReport:
    """Result of the packaging.

    Args:
        path: the zip file.
        files: number of files in the zip.
        size: size of the zip in bytes.
        url: address to which it was pushed, or "".
    """

    path: Path
    files: int
    size: int
    url: str = ""


def package(request: PackageRequest) -> PackageReport:
    """Write a trained model as a bundle, and push it if requested. The zip is either complete or absent.

    Raises:
        VolumenError: for every error that the user can correct.
    """
    output = Path(request.output)
    name = _name(output)
    check_output(output, request.overwrite)
    license_text = _read_license(request.data_license)
    _check_repository(request.hf)
    predictor = load_predictor(request.checkpoint)
    with scratch_folder(output) as scratch:
        folder = scratch / name
        write_bundle(predictor, folder, request, license_text)
        zipped = scratch / output.name
        files = zip_folder(folder, zipped)
        size = zipped.stat().st_size
        publish(zipped, output)
        url = _push(request, name, scratch, output) if request.hf else ""
    return PackageReport(output, files, size, url)


def write_bundle(predictor: Predictor, folder: Path, request: PackageRequest, data_license: str) -> None:
    """Write the bundle's folder.

    Args:
        predictor: the trained network.
        folder: the bundle's root, named like the model; it does not exist yet.
        request: texts for the model card.
        data_license: text of `docs/data_license.txt`.
    """
    for part in ("configs", "docs", "models"):
        (folder / part).mkdir(parents=True)
    run_folder = Path(request.checkpoint).resolve().parent
    versions = read_checkpoint(Path(request.checkpoint)).get("versions") or {}
    metadata = build_metadata(
        predictor,
        name=folder.name,
        description=request.description,
        authors=request.authors,
        metrics=read_metrics(run_folder, predictor.epoch),
        training={**training_summary(predictor, run_folder), "versions": dict(versions)},
    )
    network: Any = predictor.network
    write_released(predictor, folder / "models", versions=versions)
    _note_large_file(folder, request.weights_url)
    write_configs(
        bundle_root() / "configs",
        folder / "configs",
        network=network.final_config,
        experiment=predictor.config,
    )
    (folder / "configs" / "metadata.json").write_text(to_json(metadata), encoding="utf-8")
    parameters = sum(weight.numel() for weight in network.parameters())
    card = model_card(
        predictor, metadata, picture=_copy_picture(run_folder, predictor, folder), parameters=parameters
    )
    (folder / "docs" / "README.md").write_text(card, encoding="utf-8")
    (folder / "docs" / "data_license.txt").write_text(data_license, encoding="utf-8")
    (folder / "LICENSE").write_text(license_text(), encoding="utf-8")
    code = Path(__file__).resolve().parents[1]
    # In a wheel the bundle's files and the package's first module are inside the package; in a checkout they are not.
    shutil.copytree(
        code,
        folder / "scripts",
        ignore=lambda here, names: {
            name
            for name in names
            if name in ("__pycache__", "_bundle") or (name == "__init__.py" and Path(here) == code)
        },
    )
    (folder / "volumen").mkdir()
    shutil.copyfile(str(sys.modules["volumen"].__file__), folder / "volumen" / "__init__.py")


def zip_folder(folder: Path, path: Path) -> int:
    """Zip a folder under its name, with equal bytes for equal content; return the number of files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            entry = zipfile.ZipInfo(file.relative_to(folder.parent).as_posix(), _EPOCH_OF_ZIP)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            with file.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return len(files)


def _note_large_file(folder: Path, url: str | None) -> None:
    """Write `large_files.yml`, which MONAI uses to fetch weights that are not in a repository."""
    weights = folder / "models" / WEIGHTS
    if url is None:
        if weights.stat().st_size > _MAX_BYTES:
            logger.info(
                "MONAI's model zoo takes no file over 25 MB: to submit the bundle there, put %s where it can be "
                "fetched and give --weights-url",
                WEIGHTS,
            )
        return
    entry = {
        "path": f"models/{WEIGHTS}",
        "url": url,
        "hash_val": file_checksum(weights),
        "hash_type": "sha256",
    }
    text = yaml.safe_dump({"large_files": [entry]}, sort_keys=False, width=1000)
    (folder / "large_files.yml").write_text(text, encoding="utf-8")


def _copy_picture(run_folder: Path, predictor: Predictor, folder: Path) -> str | None:
    """Copy the run's preview beside the model card; return its file name, or None."""
    picture = find_preview(run_folder, predictor)
    if picture is None:
        return None
    name = f"preview{picture.suffix}"
    shutil.copyfile(picture, folder / "docs" / name)
    return name


def _name(output: Path) -> str:
    if output.suffix != ".zip":
        raise VolumenError("-o/--output", expected="a name that ends in .zip", found=output.name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", output.stem):
        raise VolumenError(
            "-o/--output", expected="a name of letters, digits, '_', '-' and '.'", found=repr(output.stem)
        )
    return output.stem


def _read_license(path: str | None) -> str:
    if path is None:
        return _DATA_LICENSE
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VolumenError(
            path, f"not readable as text ({type(error).__name__})", remedy="check --data-license"
        ) from error


def _check_repository(repository: str | None) -> None:
    if repository is None:
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise VolumenError("--hf", expected="USER/NAME", found=repr(repository))
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise VolumenError(
            "--hf", "needs the package huggingface_hub", remedy="pip install huggingface_hub"
        ) from None


def _push(request: PackageRequest, name: str, folder: Path, output: Path) -> str:
    """Push the bundle's folder to the Hub; return its address."""
    from monai import bundle

    from volumen.version import __version__

    assert request.hf is not None
    try:
        address = bundle.push_to_hf_hub(
            repo=request.hf,
            name=name,
            bundle_dir=str(folder),
            private=not request.public,
            version=__version__,
        )
    except Exception as error:  # errors of the client, of HTTP, and of the network
        raise VolumenError(
            f"--hf {request.hf}",
            f"was not pushed ({type(error).__name__}: {str(error)[:200]})",
            remedy=f"{output} is complete; check the token (hf auth login) and the name, then try again",
        ) from error
    return str(address)
