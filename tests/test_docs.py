"""The documentation says what the program does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from conftest import ROOT
from data_folders import ball, image_of, write_tiff_folder

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("stories/*.md")])
GENERATORS = sorted(DOCS.glob("make_*.py"))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.stem}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start, language = None, ""
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if start is None:
            start, language = number, line.removeprefix("```").strip()
        else:
            yield Block(page, start, language, "\n".join(lines[start : number - 1]))
            start = None
    assert start is None, f"{page}: a block begins at line {start} and does not end"


def every_block(language: str) -> list[Block]:
    return [
        block for page in [*PAGES, ROOT / "README.md"] for block in blocks(page) if block.language == language
    ]


@pytest.mark.parametrize("script", GENERATORS, ids=lambda path: path.stem)
def test_generated_pages_are_up_to_date(script):
    command = [sys.executable, str(script), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, f"run python docs/{script.name}"


def test_every_dependency_has_a_reason():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in project["dependencies"]:
        name = requirement.split(">")[0].split("<")[0].split("=")[0].strip()
        assert f"| {name} |" in reasons, name


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        # Stories run whole, in test_stories.py.
        if page.parent == DOCS and any(block.language == "python" for block in blocks(page))
    ],
    ids=lambda p: p.stem,
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page run one after the other, in a folder of their own that holds a data folder DATA."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(DOCS / "examples"))
    write_tiff_folder(Path("DATA"), {"a": {"surface": ball((24, 24, 48))}})
    space: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks(page):
        if block.language == "python":
            # Blank lines before it, so that a traceback names the page's own line.
            source = "\n" * block.line + block.text
            exec(compile(source, str(page), "exec"), space)


@pytest.mark.parametrize("block", every_block("yaml"), ids=str)
def test_yaml_blocks_load(block, tmp_path):
    content = yaml.safe_load(block.text)
    assert isinstance(content, Mapping)
    if "_target_" in block.text:
        check_overlay(content)
        check_places(content)
    else:
        check_experiment(block.text, tmp_path)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bundle" / "configs" / "recipes").glob("*.yaml")), ids=lambda p: p.stem
)
def test_recipes_load(path, tmp_path):
    """Recipes are data, and their optimizer, schedule and losses can be made."""
    import torch

    from volumen.config.experiment_file import read_experiment
    from volumen.config.manager import ConfigManager
    from volumen.engines.optimizers import build_optimizer
    from volumen.engines.schedules import build_scheduler

    check_experiment(path.read_text(), tmp_path)
    training = ConfigManager(**read_experiment(path)).tr_config
    optimizer = build_optimizer(
        training.optimizer,
        torch.nn.Linear(2, 2),
        lr=training.initial_lr,
        weight_decay=training.weight_decay,
        options=training.optimizer_kwargs,
    )
    build_scheduler(training.scheduler, optimizer, training.max_epoch, warmup=training.warmup_epochs)


def test_the_recipe_of_nnunet_is_its_own():
    import torch

    from volumen.config.experiment_file import read_experiment
    from volumen.engines.schedules import build_scheduler

    training = read_experiment(ROOT / "bundle" / "configs" / "recipes" / "nnunet.yaml")["tr_config"]
    assert (training["max_epoch"], training["max_steps_per_epoch"], training["weight_decay"]) == (
        1000,
        250,
        3e-5,
    )
    assert training["optimizer_kwargs"] == {"momentum": 0.99, "nesterov": True}
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=training["initial_lr"])
    schedule = build_scheduler(training["scheduler"], optimizer, training["max_epoch"])
    # nnunetv2.training.lr_scheduler.polylr: initial_lr * (1 - step / max_steps) ** 0.9
    for epoch in (0, 1, 500, 999):
        assert training["initial_lr"] * schedule.factor(epoch) == pytest.approx(
            0.01 * (1 - epoch / 1000) ** 0.9
        )


def check_overlay(content: Any) -> None:
    """A bundle config: what its `_target_`s name exists."""
    if isinstance(content, Mapping):
        if "_target_" in content:
            path = str(content["_target_"])
            module, _, name = path.rpartition(".")
            if module.startswith("volumen"):
                assert callable(getattr(import_module(module), name)), path
            elif module:
                assert (DOCS / "examples" / f"{module}.py").is_file() or import_module(
                    module.partition(".")[0]
                )
        for value in content.values():
            check_overlay(value)
    elif isinstance(content, list):
        for value in content:
            check_overlay(value)


def check_places(overlay: Mapping[str, Any]) -> None:
    """A key of several parts leads to something that the bundle's own config has."""
    from monai.bundle import ConfigParser

    from volumen.utils.bundle_root import configs_dir

    parser = ConfigParser()
    parser.read_config(str(configs_dir() / "train.yaml"))
    for key in overlay:
        place = key.removeprefix("+") if key.startswith("+") else key.rpartition("#")[0]
        assert not place or place in parser, key
    parser.update(
        {key: value for key, value in overlay.items() if not key.startswith("+")}
    )  # as MONAI puts them into the config
    for declared in declarations(parser.get()):
        check_arguments(declared)


def declarations(content: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every object that a config declares."""
    if isinstance(content, Mapping) and "_target_" in content:
        yield content
    if isinstance(content, Mapping | list):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from declarations(value)


def check_arguments(declared: Mapping[str, Any]) -> None:
    """What an object is declared with are arguments that it takes."""
    import inspect
    import pydoc

    path = str(declared["_target_"])
    target = pydoc.locate(path) if "." in path else None
    if target is None or "sample_saver" in path:
        return  # MONAI's own, by their short names
    given = {key: None for key in declared if not (key.startswith("_") and key.endswith("_"))}
    inspect.signature(target).bind_partial(**given)


def check_experiment(text: str, folder: Path) -> None:
    """An experiment file: every key, value, task and loss is accepted for a data folder with its targets."""
    from volumen.config.experiment_file import read_experiment
    from volumen.config.manager import ConfigManager
    from volumen.config.targets import check_fields, inject_auxiliary_tasks, make_target
    from volumen.losses.multitask import MultiTaskLoss

    path = folder / "experiment.yaml"
    path.write_text(text)
    sections = read_experiment(path)
    config = ConfigManager(**sections)
    tasks = config.auxiliary_tasks
    names = [*config.target_configs, *(task.get("source_target") for task in tasks.values())]
    primary = {}
    for name in dict.fromkeys(names or ["surface"]):
        from volumen.config.parts.targets import TargetConfig

        entry = config.target_configs.get(name) or TargetConfig()
        channels = entry.out_channels or 1
        kind = entry.kind or ("binary" if channels == 1 else "multiclass")
        primary[name] = make_target(
            entry, name, kind=kind, out_channels=channels, separate=True, losses=config.tr_config.losses
        )
    targets = inject_auxiliary_tasks(primary, tasks, spatial_dims=3, separate=True, origin=str(path))
    check_fields(targets, str(path))
    MultiTaskLoss(
        {name: target.loss_section() for name, target in targets.items() if target.head},
        balancing=config.tr_config.loss_balancing,
        balancing_kwargs=config.tr_config.loss_balancing_kwargs,
        spacing=(1.0, 1.0, 1.0),
    )


@pytest.mark.parametrize("block", every_block("bash"), ids=str)
def test_commands_parse(block):
    """Every `volumen` command line is one that the parser takes, so no page names an option that does not exist."""
    from volumen.cli.main import build_parser

    parser = build_parser()
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and "=" in words[0]:
            words = words[1:]
        if words[:1] == ["volumen"] and "--help" not in words:
            if ">" in words:
                words = words[: words.index(">")]
            parser.parse_args(
                [word for word in words[1:] if not word.startswith("[") and not word.endswith("]")]
            )


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        # The demonstration makes its pictures itself.
        if "://" in target or target.endswith(".gif"):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name) if name else page
        assert other.exists(), target
        if anchor and other.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), flags=re.MULTILINE)
            known = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in known, target


def label_errors() -> dict[str, Any]:
    """By the excerpt of a message: a data folder (labels, image, settings) that causes it."""
    label = ball((16, 16, 16))
    gap = label.copy()
    gap[0] = 5
    numbers = (np.arange(16**3) // 32).reshape(16, 16, 16).astype(np.uint8)
    return {
        "names no target": ({"a": label}, {}),
        "differs from image 'a'": ({"A_ink": label}, {}),
        "found labels of no target": ({"b_ink": label}, {}),
        "resample it to the image's grid": ({"a_ink": label[:, :, 1:]}, {}),
        "expected classes 0, 1, 2": ({"a_ink": gap}, {}),
        "hold negative values": ({"a_ink": label.astype(np.int8) - 2}, {}),
        "more than 64 values": ({"a_ink": numbers}, {}),
        "expected a label with whole numbers": ({"a_ink": label / np.float32(2)}, {}),
        "expected a label of target 'inc'": ({"a_ink": label}, {"dataset_config": {"targets": {"inc": {}}}}),
        "did you mean batch_size?": ({"a_ink": label}, {"tr_config": {"batchsize": 2}}),
    }


@pytest.mark.parametrize("excerpt", label_errors())
def test_the_messages_of_the_data_page_are_real(excerpt, tmp_path):
    from volumen.config.manager import ConfigManager
    from volumen.utils.errors import VolumenError

    table = (DOCS / "data.md").read_text(encoding="utf-8").partition("<!-- errors")[2]
    (said,) = [row.split("`")[1] for row in table.splitlines() if row.startswith("| `") and excerpt in row]
    labels, settings = label_errors()[excerpt]
    images = ["a", "b"] if "b_ink" in labels else ["a"]
    for name in images:
        write_tiff_folder(tmp_path, {}, images={})
        tifffile.imwrite(tmp_path / "images" / f"{name}.tif", image_of(ball((16, 16, 16))))
    for name, array in labels.items():
        tifffile.imwrite(tmp_path / "labels" / f"{name}.tif", array)
    with pytest.raises(VolumenError) as told:
        _ = ConfigManager(**settings, dataset_dir=str(tmp_path)).targets
    assert said in str(told.value)


def checks_named() -> list[str]:
    """Return the tests that the page of checks names, as "file: words of the name"."""
    page = (ROOT / "docs" / "checks.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|")[1:] for line in page.splitlines() if line.startswith("|")]
    cells = [part.strip() for row in rows for cell in row for part in cell.split(";")]
    return sorted({cell for cell in cells if ": " in cell})


def test_the_page_of_the_architecture_names_every_folder():
    """A newcomer looks there for a folder's sentence; its parts are named in the row of the folder."""
    code = ROOT / "bundle" / "scripts"
    table = (ROOT / "docs" / "architecture.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    missing = []
    for folder in sorted(path for path in code.glob("*/") if path.name != "__pycache__"):
        row = next((row for row in rows if f"`{folder.name}/`" in row.split("|")[1]), None)
        parts = [
            part.name for part in folder.glob("*/") if part.name != "__pycache__" and any(part.glob("*.py"))
        ]
        missing += (
            [folder.name] if row is None else [f"{folder.name}/{p}" for p in parts if f"{p}/`" not in row]
        )
    assert missing == []


def test_every_test_on_the_page_of_checks_exists():
    named = checks_named()
    assert len(named) > 60
    missing = []
    for entry in named:
        file, words = (part.strip().replace(" ", "_") for part in entry.split(":"))
        path = ROOT / "tests" / f"test_{file}.py"
        if not path.is_file() or f"\ndef test_{words}(" not in path.read_text(encoding="utf-8"):
            missing.append(entry)
    assert not missing
