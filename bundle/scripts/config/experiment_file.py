"""Reads, checks and merges experiment files: plain values in sections, never code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from volumen.config.sections import file_keys
from volumen.utils.bundle_root import configs_dir
from volumen.utils.errors import VolumenError
from volumen.utils.suggest import closest

SECTION_NAMES = (
    "tr_setup",
    "tr_config",
    "model_config",
    "dataset_config",
    "inference_config",
    "auxiliary_tasks",
)
# A snapshot contains these for its reader; they configure nothing.
INFORMATIVE = ("provenance",)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a repeated key is an error; PyYAML would use the last value."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else repr(key))
        return super().construct_mapping(node, deep)


def read_experiment(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read a user's experiment file.

    Args:
        path: a YAML (or JSON) file with any part of the sections, or the name of a recipe of the bundle, such as
            nuclei, where there is no such file.

    Returns:
        The sections in the file, plain values only.

    Raises:
        VolumenError: the file is missing or malformed, has an unknown section, or contains code: an expression
            (`$...`), a reference or macro (`@...`, `%...`) or a `_target_`.
    """
    path = _recipe(path) or Path(path)
    try:
        # -sig, since editors on Windows write a byte order mark at the start of a file.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise VolumenError(
            path,
            f"cannot be read ({error.strerror})",
            remedy=f"check --config-path, or name a recipe: {', '.join(recipes())}",
        ) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise VolumenError(
            path, expected="UTF-8 text", found=f"other bytes in line {line}", remedy="save it as UTF-8"
        ) from None
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader) or {}
    except yaml.YAMLError as error:
        raise _malformed(path, error) from None
    if not isinstance(content, Mapping):
        raise VolumenError(path, expected="sections such as tr_config:", found=type(content).__name__)
    check_section_names(content, str(path))
    refuse_code(content, str(path))
    return {name: dict(content[name] or {}) for name in SECTION_NAMES if name in content}


def recipes() -> dict[str, Path]:
    """Return the experiment files of the bundle by their name."""
    return {path.stem: path for path in sorted((configs_dir() / "recipes").glob("*.yaml"))}


def _recipe(path: str | Path) -> Path | None:
    """Return the file of a recipe; None where a file of that name exists, which counts, and for other names."""
    return None if Path(path).exists() else recipes().get(str(path))


def _malformed(path: Path, error: yaml.YAMLError) -> VolumenError:
    """Return an error that states the line and the reason, without the parser's excerpt of the file."""
    mark = getattr(error, "problem_mark", None)
    where = f"{path}, line {mark.line + 1}" if mark else str(path)
    problem = _problem(error)
    if "'\\t'" in problem:
        return VolumenError(
            where, expected="spaces at the beginning of a line", found="a tab", remedy="use spaces"
        )
    if isinstance(error, yaml.composer.ComposerError) and "another document" in problem:
        return VolumenError(where, "a second document begins", remedy="keep one, without the line ---")
    if "could not determine a constructor" in problem:
        return VolumenError(where, "a YAML tag (!...) is code, not data", remedy="write the value itself")
    remedy = "" if "is given twice" in problem else "check brackets, quotes, colons and indentation there"
    return VolumenError(where, f"is not valid YAML: {problem}", remedy=remedy)


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error)


def check_section_names(content: Mapping[str, Any], origin: str) -> None:
    """Refuse a section that does not exist, or that is not a mapping.

    Raises:
        VolumenError: naming the section and the closest known one.
    """
    for name, section in content.items():
        if name not in SECTION_NAMES and name not in INFORMATIVE:
            remedy = closest(str(name), SECTION_NAMES) or f"known sections: {', '.join(SECTION_NAMES)}"
            raise VolumenError(f"{origin}: {name}", "unknown section", remedy=remedy)
        if section is not None and not isinstance(section, Mapping):
            raise VolumenError(
                f"{origin}: {name}", expected="a mapping of keys to values", found=repr(section)
            )


def refuse_code(content: Any, origin: str, path: str = "") -> None:
    """Refuse everything that MONAI's parser would evaluate, except values that name files.

    Raises:
        VolumenError: naming the key.
    """
    if isinstance(content, Mapping):
        for key, value in content.items():
            inner = f"{path}.{key}" if path else str(key)
            if str(key).startswith("_") and str(key).endswith("_"):
                raise VolumenError(
                    f"{origin}: {inner}",
                    "an experiment file is data, not code",
                    remedy="declare objects in a bundle config given with --config-file",
                )
            refuse_code(value, origin, inner)
    elif isinstance(content, list | tuple):
        for position, value in enumerate(content):
            refuse_code(value, origin, f"{path}[{position}]")
    elif isinstance(content, str) and content.lstrip()[:1] in ("$", "@", "%") and not _names_a_file(path):
        raise VolumenError(
            f"{origin}: {path}",
            f"expressions and references are not evaluated in an experiment file ({content!r})",
            remedy="write the value itself",
        )


def _names_a_file(path: str) -> bool:
    """Whether the value of a key names a file or folder; such a name may begin with any character."""
    section, _, key = path.partition("[")[0].partition(".")
    return key in file_keys(section)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated with the values of `over`, section by section and key by key.

    A value that is itself a mapping, such as a target's entry, is replaced as a whole: a mixture of two entries would
    be a target that nobody configured.
    """
    merged = {name: dict(section) for name, section in base.items()}
    for name, section in over.items():
        merged[name] = {**merged.get(name, {}), **section}
    return merged


def parse_assignment(text: str) -> tuple[list[str], Any]:
    """Split `section.key=value` and read the value as YAML.

    Args:
        text: for example `tr_config.batch_size=4`.

    Returns:
        The path of keys and the value.

    Raises:
        VolumenError: there is no `=` or no section.
    """
    path, separator, value = text.partition("=")
    keys = path.strip().replace("#", ".").replace("::", ".").split(".")
    if not separator or len(keys) < 2 or not all(keys):
        raise VolumenError(f"--set {text}", expected="section.key=value", found=repr(text))
    if keys[0] not in SECTION_NAMES:
        remedy = closest(keys[0], SECTION_NAMES) or f"known sections: {', '.join(SECTION_NAMES)}"
        raise VolumenError(f"--set {text}", f"unknown section {keys[0]}", remedy=remedy)
    try:
        parsed = yaml.load(value, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise VolumenError(
            f"--set {text}",
            f"the value is not valid YAML: {_problem(error)}",
            remedy="check brackets and quotes",
        ) from None
    nested = parsed
    for key in reversed(keys):
        nested = {key: nested}
    refuse_code(nested, "--set")
    return keys, parsed


def assign(sections: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set a value at a path of keys; missing mappings on the path are created.

    Raises:
        VolumenError: a part of the path is not a mapping.
    """
    place = sections
    for key in keys[:-1]:
        inner = place.get(key)
        if inner is None:
            inner = {}
        if not isinstance(inner, Mapping):
            raise VolumenError(f"--set {'.'.join(keys)}", f"{key} is not a mapping", found=repr(inner))
        # A copy, so that the caller's nested mappings do not change.
        place[key] = dict(inner)
        place = place[key]
    place[keys[-1]] = value


def shipped_sections() -> dict[str, dict[str, Any]]:
    """Return the sections of the bundle's own `train.yaml`."""
    content = yaml.safe_load((configs_dir() / "train.yaml").read_text(encoding="utf-8"))
    return {name: dict(content[name] or {}) for name in SECTION_NAMES}
