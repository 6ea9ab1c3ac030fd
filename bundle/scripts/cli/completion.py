"""`volumen completion`: a script by which a shell completes commands, options and their values."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

SHELLS = ("bash", "zsh", "fish")

# Options with a file or folder for a value, by what the parser calls them.
_PATHS = {
    "checkpoint", "config_file", "config_path", "data_license", "finetune", "input", "labels", "like", "mask",
    "masks", "output", "predictions", "resume", "sheet",
}  # fmt: skip

_DEVICES = ("auto", "cpu", "cuda")

_HOW = """
bash:  volumen completion bash > ~/.local/share/bash-completion/completions/volumen
zsh:   volumen completion zsh > "${fpath[1]}/_volumen"
fish:  volumen completion fish > ~/.config/fish/completions/volumen.fish

For this shell alone: source <(volumen completion bash)
"""


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Args:
        names: such as ("-i", "--input").
        help: what it does, in one line.
        values: the values known; empty for a free one.
        takes: "nothing", "path", "known" (one of `values`) or "text".
        may_be_bare: whether the value can be left out.
        repeats: whether it may be given again, or takes several values.
    """

    names: tuple[str, ...]
    help: str
    values: tuple[str, ...] = ()
    takes: str = "text"
    may_be_bare: bool = False
    repeats: bool = False


@dataclass(frozen=True)
class Command:
    """A command with its options.

    Args:
        name: after `volumen`.
        help: what it does, in one line.
        options: in the order of its help.
        argument: what it takes without an option's name: an `Option` without names, or None.
    """

    name: str
    help: str
    options: tuple[Option, ...]
    argument: Option | None = None


def add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `volumen completion` to a parser."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to complete")
    parser.epilog = _HOW
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run_completion(options: argparse.Namespace) -> int:
    """Write the script to standard output; return the exit status."""
    from volumen.cli.main import build_parser

    sys.stdout.write(completion_script(build_parser(), options.shell))
    return 0


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for a shell.

    Args:
        parser: the program's parser, with a sub-parser for every command.
        shell: "bash", "zsh" or "fish".

    Raises:
        ValueError: for another shell.
    """
    writers: dict[str, Callable[[list[Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    if shell not in writers:
        raise ValueError(f"shell must be one of {SHELLS}, got {shell!r}")
    return writers[shell](commands_of(parser))


def commands_of(parser: argparse.ArgumentParser) -> list[Command]:
    """Return the commands of a parser, in its order."""
    (choice,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    told = {action.dest: action.help or "" for action in choice._choices_actions}
    return [_command(name, told.get(name, ""), sub) for name, sub in choice.choices.items()]


def _command(name: str, text: str, parser: argparse.ArgumentParser) -> Command:
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    named = tuple(_option(action) for action in actions if action.option_strings)
    bare = [_option(action) for action in actions if not action.option_strings]
    return Command(name, text, named, bare[0] if bare else None)


def _option(action: argparse.Action) -> Option:
    values = tuple(map(str, action.choices or _known_values(action.dest)))
    if action.nargs == 0:
        takes = "nothing"
    elif action.dest in _PATHS:
        takes = "path"
    else:
        takes = "known" if values else "text"
    text = " ".join((action.help or "").split()).replace("%%", "%")
    repeats = action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)
    return Option(tuple(action.option_strings), text, values, takes, action.nargs == "?", repeats)


def _known_values(name: str) -> Iterable[str]:
    if name == "device":
        return _DEVICES
    if name == "loss":
        from volumen.losses.registry import loss_names

        return loss_names()
    if name == "set":
        return setting_names()
    return ()


def setting_names() -> list[str]:
    """Return `section.key=` for every key of every section."""
    from volumen.config import sections

    classes = {
        "tr_setup": sections.TrainingSetup,
        "tr_config": sections.TrainingConfig,
        "model_config": sections.ModelConfig,
        "dataset_config": sections.DatasetConfig,
        "inference_config": sections.InferenceConfig,
    }
    return [f"{name}.{field.name}=" for name, section in classes.items() for field in fields(section)]


def _bash(commands: list[Command]) -> str:
    cases = "\n".join(_bash_case(command) for command in commands)
    names = " ".join(command.name for command in commands)
    # Where COMPREPLY stays empty, `-o default` makes readline complete file names.
    return f"""# bash completion of volumen, written by `volumen completion bash`.
_volumen() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" command="" i
    if [[ $cur == "=" ]]; then
        cur=""
    elif [[ $prev == "=" ]]; then
        prev="${{COMP_WORDS[COMP_CWORD-2]}}"
    fi
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ ${{COMP_WORDS[i]}} != -* ]]; then
            command="${{COMP_WORDS[i]}}"
            break
        fi
    done
    case "$command" in
    "")
        COMPREPLY=($(compgen -W "{names} --help --version" -- "$cur"))
        ;;
{cases}
    esac
}}
complete -o default -F _volumen volumen
"""


def _bash_case(command: Command) -> str:
    lines = [f"    {command.name})", '        case "$prev" in']
    known = [option for option in command.options if option.values]
    for option in known:
        lines += [
            f"        {'|'.join(option.names)})",
            f'            COMPREPLY=($(compgen -W "{" ".join(option.values)}" -- "$cur"))',
            *(["            compopt -o nospace 2>/dev/null"] if option.values[0].endswith("=") else []),
            "            return",
            "            ;;",
        ]
    # A value of which nothing is known, or a path; an option that can be bare may be followed by another.
    free = [o for o in command.options if o.takes in ("path", "text") and not o.may_be_bare]
    if free:
        names = "|".join(name for option in free for name in option.names)
        lines += [f"        {names})", "            return", "            ;;"]
    words = " ".join(name for option in command.options for name in option.names if name.startswith("--"))
    lines += [
        "        esac",
        "        if [[ $cur == -* ]]; then",
        f'            COMPREPLY=($(compgen -W "{words}" -- "$cur"))',
    ]
    if command.argument is not None and command.argument.values:
        lines += [
            "        else",
            f'            COMPREPLY=($(compgen -W "{" ".join(command.argument.values)}" -- "$cur"))',
        ]
    return "\n".join([*lines, "        fi", "        ;;"])


def _zsh(commands: list[Command]) -> str:
    described = "\n".join(f"            {_quoted(f'{c.name}:{_plain(c.help)}')}" for c in commands)
    cases = "\n".join(_zsh_case(command) for command in commands)
    return f"""#compdef volumen
# zsh completion of volumen, written by `volumen completion zsh`.
_volumen() {{
    local context state line
    typeset -A opt_args
    _arguments -C '(- *)'{{-h,--help}}'[show the help]' '(- *)--version[show the version]' \\
        '1:command:->command' '*::argument:->argument'
    case $state in
    command)
        local -a commands
        commands=(
{described}
        )
        _describe command commands
        ;;
    argument)
        case $words[1] in
{cases}
        esac
        ;;
    esac
}}
if [[ $funcstack[1] == _volumen ]]; then
    _volumen "$@"
else
    compdef _volumen volumen
fi
"""


def _zsh_case(command: Command) -> str:
    specs = [spec for option in command.options for spec in _zsh_option(option)]
    if command.argument is not None:
        specs.append(_quoted(f"1:argument:{_zsh_values(command.argument)}"))
    joined = " \\\n                ".join(specs)
    return f"        {command.name})\n            _arguments \\\n                {joined}\n            ;;"


def _zsh_option(option: Option) -> list[str]:
    text = _plain(option.help).replace("[", "\\[").replace("]", "\\]")
    value = ""
    if option.takes != "nothing":
        value = f"{'::' if option.may_be_bare else ':'}value:{_zsh_values(option)}"
    others = "*" if option.repeats else f"({' '.join(option.names)})"
    return [_quoted(f"{others}{name}[{text}]{value}") for name in option.names]


def _zsh_values(option: Option) -> str:
    if option.values and option.values[0].endswith("="):
        return f"{{compadd -S '' -- {' '.join(option.values)}}}"
    if option.values:
        return f"({' '.join(option.values)})"
    return "_files" if option.takes == "path" else " "


def _fish(commands: list[Command]) -> str:
    lines = [
        "# fish completion of volumen, written by `volumen completion fish`.",
        "complete -c volumen -f",
        "complete -c volumen -n __fish_use_subcommand -s h -l help -d 'show the help'",
        "complete -c volumen -n __fish_use_subcommand -l version -d 'show the version'",
    ]
    for command in commands:
        lines.append(
            f"complete -c volumen -n __fish_use_subcommand -a {command.name} -d {_fish_quoted(command.help)}"
        )
    for command in commands:
        seen = f"complete -c volumen -n '__fish_seen_subcommand_from {command.name}'"
        if command.argument is not None:
            lines.append(f"{seen} {_fish_values(command.argument)}")
        for option in command.options:
            flags = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names
            )
            bare = option.takes == "nothing" or (option.may_be_bare and not option.values)
            required = "" if bare else " -r"
            values = "" if option.takes == "nothing" else f" {_fish_values(option)}"
            lines.append(f"{seen} {flags}{required}{values} -d {_fish_quoted(option.help)}")
    return "\n".join(lines) + "\n"


def _fish_values(option: Option) -> str:
    if option.values:
        return f"-f -a {_fish_quoted(' '.join(option.values))}"
    return "-F" if option.takes == "path" else "-f"


def _plain(text: str) -> str:
    return text.replace(":", "\\:")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
