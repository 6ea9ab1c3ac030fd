"""Shell completion, as argcomplete's code in a shell asks for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from volumen.cli.completion import SHELLS, offer_settings


def offered(line: str, folder: str = ".") -> set[str]:
    """What the program answers for a command line with the cursor at its end."""
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_STDOUT_FILENAME": os.path.join(folder, "answer"),  # noqa: PTH118
    }
    subprocess.run(
        [sys.executable, "-m", "volumen"], env=environment, check=False, capture_output=True, timeout=120
    )
    with open(environment["_ARGCOMPLETE_STDOUT_FILENAME"]) as answer:  # noqa: PTH123
        return {word.strip() for word in answer.read().split("\n") if word.strip()}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("volumen tr", {"train"}),
        ("volumen train --patch", {"--patch-size"}),
        ("volumen train --format n", {"nifti", "napari", "nrrd", "n5"}),
        ("volumen train --set tr_config.initial", {"tr_config.initial_lr="}),
        ("volumen train --loss SoftCl", {"SoftClDiceLoss"}),
        ("volumen train -i data --device cu", {"cuda"}),
        ("volumen predict --tta m", {"mirror"}),
        ("volumen completion z", {"zsh"}),
    ],
)
def test_what_a_shell_offers(tmp_path, line, expected):
    assert offered(line, str(tmp_path)) == expected


def test_every_command_is_offered(tmp_path):
    commands = {"train", "inspect", "predict", "evaluate", "tune", "export", "package", "completion"}
    assert commands <= offered("volumen ", str(tmp_path))


@pytest.mark.parametrize("shell", SHELLS)
def test_the_code_for_a_shell_is_valid(tmp_path, shell, capsys):
    from volumen.cli.main import main

    assert main(["completion", shell]) == 0
    code = capsys.readouterr().out
    assert "volumen" in code
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    script = tmp_path / "script"
    script.write_text(code)
    subprocess.run([shell, "-n", str(script)], check=True)


def test_settings_offered_are_settings():
    from volumen.config.experiment_file import shipped_sections

    shipped = {f"{section}.{key}=" for section, keys in shipped_sections().items() for key in keys}
    assert shipped - {name for name in shipped if name.startswith("auxiliary_tasks")} <= set(offer_settings())


def test_another_shell_is_refused(capsys):
    from volumen.cli.main import main

    with pytest.raises(SystemExit):
        main(["completion", "powershell"])
    assert "invalid choice" in capsys.readouterr().err
