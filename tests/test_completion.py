"""Shell completion, by the shells themselves."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from volumen.cli.completion import SHELLS, commands_of, completion_script, setting_names
from volumen.cli.main import build_parser


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        (folder / shell).write_text(completion_script(build_parser(), shell))
    return folder


def bash(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    command = (
        f"source {shlex.quote(str(script))}\n"
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))\n'
        '"$(complete -p volumen | sed "s/.*-F \\([^ ]*\\).*/\\1/")"\n'
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    # No compopt outside of a real completion: it complains, on standard error only.
    run = subprocess.run(
        ["bash", "--norc", "-c", command, "bash", *words], capture_output=True, text=True, check=True
    )
    return run.stdout.split()


def fish(script: Path, *words: str) -> list[str]:
    line = shlex.quote(" ".join(words))
    run = subprocess.run(
        ["fish", "--no-config", "-c", f"source {script}; complete -C {line}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [offered.split("\t")[0] for offered in run.stdout.splitlines()]


@pytest.mark.parametrize("complete", [
    pytest.param(bash, marks=pytest.mark.skipif(not shutil.which("bash"), reason="no bash")),
    pytest.param(fish, marks=pytest.mark.skipif(not shutil.which("fish"), reason="no fish")),
], ids=lambda function: function.__name__)  # fmt: skip
@pytest.mark.parametrize(("words", "offered"), [
    (["tr"], {"train"}),
    (["train", "--patch"], {"--patch-size"}),
    (["train", "--format", "n"], {"nifti", "napari"}),
    (["train", "--set", "tr_config.initial"], {"tr_config.initial_lr="}),
    (["train", "--loss", "Soft"], {"SoftDiceLoss", "SoftClDiceLoss"}),
    (["train", "-i", "data", "--device", "cu"], {"cuda"}),
    (["predict", "--tta", "m"], {"mirror"}),
    (["export", "--to", "on"], {"onnx"}),
    (["completion", "z"], {"zsh"}),
    (["train", "--resume", "--quie"], {"--quiet"}),
])  # fmt: skip
def test_what_a_shell_offers(scripts, complete, words, offered):
    assert set(complete(scripts / complete.__name__, "volumen", *words)) == offered


def test_bash_offers_every_command_and_leaves_paths_to_itself(scripts):
    script = scripts / "bash"
    names = {command.name for command in commands_of(build_parser())}
    assert names < set(bash(script, "volumen", ""))
    for option in ("-i", "--input", "--config-path", "--seed"):
        assert bash(script, "volumen", "train", option, "") == []
    assert "complete -o default" in script.read_text()


def test_bash_completes_after_an_equals_sign(scripts):
    """Readline gives the sign as a word of its own."""
    assert bash(scripts / "bash", "volumen", "train", "--format", "=", "zar") == ["zarr"]
    assert "zarr" in bash(scripts / "bash", "volumen", "train", "--format", "=")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_scripts_are_valid(scripts, shell):
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    subprocess.run([shell, "-n", str(scripts / shell)], check=True)


def test_every_option_is_known_to_every_shell(scripts):
    for command in commands_of(build_parser()):
        for option in command.options:
            for name in option.names:
                assert name in (scripts / "zsh").read_text(), name
                flag = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                assert flag in (scripts / "fish").read_text(), name
            long = [name for name in option.names if name.startswith("--")]
            assert all(name in (scripts / "bash").read_text() for name in long)


def test_settings_offered_are_settings():
    from volumen.config.experiment_file import shipped_sections

    shipped = {f"{section}.{key}=" for section, keys in shipped_sections().items() for key in keys}
    assert shipped - {name for name in shipped if name.startswith("auxiliary_tasks")} <= set(setting_names())


def test_another_shell_is_refused():
    with pytest.raises(ValueError, match="shell must be one of"):
        completion_script(build_parser(), "tcsh")
