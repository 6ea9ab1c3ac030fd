"""`volumen info`: prints what a report of a problem needs: versions, extras, devices, the cache, a checkpoint."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from volumen.utils.terminal.text import by
from volumen.version import __version__

_NAME = re.compile(r"[A-Za-z0-9][-._A-Za-z0-9]*")
_EXTRA = re.compile(r"extra\s*==\s*[\"']([^\"']+)[\"']")
#: Extras of people who change the program; a report does not need them.
_OF_DEVELOPERS = ("test", "test-s3", "docs", "benchmark")


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `volumen info` to a parser."""
    parser.add_argument("-m", "--model", metavar="FILE", help="also describe a checkpoint")
    parser.add_argument("--paths", action="store_true", help="also print paths of this machine")


def run_info(options: argparse.Namespace) -> int:
    """Print the report as plain lines, which can be pasted anywhere; return 0.

    Raises:
        VolumenError: the checkpoint cannot be read.
    """
    # The checkpoint first: an error must not follow half a report.
    model = list(_of_checkpoint(options.model, options.paths)) if options.model else []
    sections = [
        ("versions", _versions(options.paths)),
        ("extras", _extras()),
        ("machine", _machine()),
        ("cache", _cache(options.paths)),
        ("checkpoint", iter(model)),
    ]
    for title, lines in sections:
        found = list(lines)
        if found:
            width = max(len(name) for name, _ in found)
            sys.stdout.write(f"{title}\n" + "".join(f"  {name:<{width}}  {value}\n" for name, value in found))
    return 0


def _versions(paths: bool) -> Iterator[tuple[str, str]]:
    yield "volumen", __version__
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    for name in _required(""):
        yield name, _version(name)
    if paths:
        yield "program", str(Path(__file__).resolve().parents[1])
        yield "interpreter", sys.executable


def _extras() -> Iterator[tuple[str, str]]:
    """Name each extra with its packages and what is missing of them."""
    extras = metadata.metadata("volumen").get_all("Provides-Extra") or []
    for extra in sorted(set(extras) - set(_OF_DEVELOPERS)):
        found = {name: _version(name) for name in _required(extra) if name != "volumen"}
        yield extra, ", ".join(f"{name} {version}" for name, version in found.items())


def _required(extra: str) -> list[str]:
    """Return the packages that an extra requires, or without one the package itself."""
    names = []
    for line in metadata.requires("volumen") or []:
        requirement, _, marker = line.partition(";")
        of_extra = _EXTRA.search(marker)
        if (of_extra.group(1) if of_extra else "") == extra and (name := _NAME.match(requirement.strip())):
            names.append(name.group())
    return names


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from volumen.utils.threads import cores

    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "processor cores", f"{os.cpu_count()}, {cores()} of them for this process"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield "memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    yield "CUDA of torch", torch.version.cuda or "none: torch's build for CPUs"
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        yield f"cuda:{number}", f"{found.name}, {found.total_memory / 2**30:.1f} GiB"


def _cache(paths: bool) -> Iterator[tuple[str, str]]:
    from volumen.data.caching.index_cache import default_cache_dir

    folder = default_cache_dir()
    if folder is None:
        yield "folder", "none"
        return
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    yield "files", f"{len(sizes)}, {sum(sizes) / 1e6:.1f} MB"
    if paths:
        yield "folder", str(folder)


def _of_checkpoint(path: str, paths: bool) -> Iterator[tuple[str, str]]:
    """Describe a checkpoint.

    Raises:
        VolumenError: it cannot be read.
    """
    from volumen.checkpoints.file import load_checkpoint

    content = load_checkpoint(path)
    network = content.get("model_config", {})
    yield "file", path if paths else f"{Path(path).stat().st_size / 1e6:.1f} MB"
    for name, version in content.get("versions", {}).items():
        yield f"written by {name}", str(version)
    yield "epoch", f"{content.get('epoch', '?')} of {content.get('max_epochs', '?')}"
    yield (
        "dimensions",
        f"{network.get('spatial_dims', '?')}, input channels: {network.get('in_channels', '?')}",
    )
    yield from _of_config(content.get("config", {}))
    yield "features", ", ".join(map(str, network.get("features_per_stage", [])))
    yield "heads", ", ".join(f"{name} {_channels(head)}" for name, head in network.get("heads", {}).items())
    weights = content.get("model", {}).values()
    yield "weights", f"{sum(getattr(value, 'numel', lambda: 0)() for value in weights) / 1e6:.2f} M"


def _of_config(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    settings = config.get("tr_config", {})
    if patch := settings.get("patch_size"):
        yield "patch", f"{by(patch)} voxels, batches of {settings.get('batch_size', '?')}"


def _channels(head: dict[str, Any]) -> str:
    own = "a decoder of its own" if head.get("separate_decoder") else "the shared decoder"
    count = head.get("out_channels", "?")
    return f"({count} channel{'s' * (count != 1)}, {own})"
