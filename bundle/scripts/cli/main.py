"""The command `volumen`: parses arguments only. Slow imports happen when a command runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from volumen.cli.flags import Once
from volumen.version import __version__

_DESCRIPTION = "Train one network on many targets of a volume. Options: volumen COMMAND --help"
_EPILOG = """\
exit codes: 0 done, 1 defect, 2 input to mend; 130 and 143: stopped and saved"""


_COMMANDS = (
    ("new", "volumen.cli.new", "write a commented experiment file for a data folder"),
    (
        "pretrain",
        "volumen.cli.pretrain",
        "train the encoder on images without labels",
    ),
    ("predict", "volumen.cli.predict", "predict volumes of any size with a trained model"),
    ("instances", "volumen.cli.instances", "find instances again where a prediction was edited"),
    ("evaluate", "volumen.cli.evaluate", "score predictions against labels"),
    ("view", "volumen.cli.view", "show images, predictions and errors in napari or Neuroglancer"),
    ("mesh", "volumen.cli.mesh", "write meshes of objects or of a surface"),
    ("tune", "volumen.cli.tune", "choose threshold, cleaning and epoch by a score"),
    ("select", "volumen.cli.select", "choose among runs, ensembles and augmentation by a score"),
    (
        "suggest",
        "volumen.cli.suggest",
        "suggest boxes to label next, and take painted ones back",
    ),
    (
        "export",
        "volumen.cli.share",
        "write a network as ONNX, pt2 or another format",
    ),
    ("package", "volumen.cli.share", "write a trained model as a MONAI bundle that runs elsewhere"),
    ("info", "volumen.cli.info", "print versions, devices and extras, for a report of a problem"),
    ("completion", "volumen.cli.completion", "print a script by which bash, zsh or fish completes commands"),
)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help formatter of the list of commands: space for the longest, and no line above it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        # argparse ignores the indentation of the longest command.
        self._action_max_length = 14

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return self._join_parts(map(self._format_action, self._iter_indented_subactions(action)))
        return super()._format_action(action)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every command."""
    parser = argparse.ArgumentParser(
        prog="volumen",
        usage="volumen [-h] [--version] COMMAND ...",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=_Help,
        add_help=False,
    )
    # The usage names these two, so that the list of commands fits a screen.
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument(
        "--version", action="version", version=f"volumen {__version__}", help=argparse.SUPPRESS
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True, prog="volumen"
    )
    _add_train(commands)
    _add_inspect(commands)
    for name, module, text in _COMMANDS:
        _add_command(commands, name, module, text)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    Args:
        arguments: the words after `volumen`; None: those of the command line.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell requests completions
        from volumen.cli.completion import complete

        complete(parser)
    options = parser.parse_args(words)
    options.words = words
    from volumen.cli.running.execution import run_guarded

    return run_guarded(options.run, options)


def _add_common(parser: argparse.ArgumentParser) -> None:
    common = parser.add_argument_group("messages")
    common.add_argument("--verbose", action="store_true", help="more messages; a traceback with an error")
    common.add_argument("--quiet", action="store_true", help="warnings and errors only, no progress bar")


def _add_completers(parser: argparse.ArgumentParser) -> None:
    """Define the completions of options that accept any text."""
    from volumen.cli import completion

    offers = {
        "device": completion.offer_devices,
        "loss": completion.offer_losses,
        "set": completion.offer_settings,
    }
    for action in parser._actions:
        if action.dest in offers:
            # argcomplete's way to attach a completer.
            action.completer = offers[action.dest]  # type: ignore[attr-defined]


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model on a folder of volumes",
        description="Train a model on a folder with images/, labels/<image>_<target> and, optionally, masks/.",
    )
    add_train_arguments(parser)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `volumen train`. A missing option has the experiment file's value, else the default."""
    data = parser.add_argument_group("data and output")
    data.add_argument(
        "-i",
        "--input",
        action="append",
        metavar="DATA",
        help="folder with images/, labels/ and, optionally, masks/ (repeatable; NAME=DATA names one)",
    )
    data.add_argument(
        "-o", "--output", action=Once, metavar="OUT", help="output folder; the run goes to OUT/<model name>"
    )
    data.add_argument(
        "--format",
        choices=(
            "zarr",
            "tif",
            "nifti",
            "png",
            "hdf5",
            "mrc",
            "nrrd",
            "precomputed",
            "n5",
            "metaimage",
            "dicom",
            "webknossos",
            "napari",
        ),
        help="data format (default: by content)",
    )
    data.add_argument(
        "--config-path",
        metavar="YAML",
        help="experiment file: any part of the sections, data only; or a recipe of the bundle: nuclei, neurons, nnunet",
    )
    data.add_argument(
        "--config-file",
        metavar="YAML",
        action="append",
        default=[],
        help="bundle config on top of train.yaml; it is code: declares MONAI objects (repeatable)",
    )
    data.add_argument(
        "--tracking",
        metavar="WHAT",
        help="log to an experiment tracker too: mlflow (a local store in OUT), or a file of MONAI's tracking settings",
    )
    data.add_argument(
        "--loss-on-label-only",
        action="store_true",
        default=None,
        help="count the loss only where the label is not 0",
    )

    split = _add_split_arguments(parser)
    split.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="train a network per fold into OUT/<model name>; the same command goes on after a stop",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model-name", metavar="NAME", help="name of the run's folder and files (default: model)"
    )
    model.add_argument(
        "--patch-size",
        metavar="Z,Y,X",
        help="patch in voxels, e.g. 192,192,192, or in lengths, e.g. 20um,5um,5um or 20um (default: from the data)",
    )
    _add_preset(model)
    model.add_argument(
        "--loss",
        nargs="+",
        metavar="LOSS",
        help="losses of the labelled targets, as list or commas (default: cross-entropy and Dice)",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--batch-size", type=int, metavar="N", help="patches per step (default: 2, or what fits a GPU)"
    )
    training.add_argument("--max-epochs", type=int, metavar="N", help="epochs (default: 1000)")
    training.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="self-training: each round also learns from what the one before is sure of; the same command goes on",
    )
    training.add_argument(
        "--time-budget",
        metavar="TIME",
        help="train for this long, e.g. 35m or 12h: network, patch and steps are chosen to fit (default: no limit)",
    )
    training.add_argument("--steps-per-epoch", type=int, metavar="N", help="steps per epoch (default: 250)")
    training.add_argument(
        "--val-steps", type=int, metavar="N", help="batches of windows per validation (default: 50)"
    )
    training.add_argument(
        "--seed", type=int, metavar="N", help="seed of split, weights and sampling (default: 0)"
    )
    training.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on from the newest checkpoint of the run, or from FILE",
    )
    training.add_argument(
        "--finetune",
        metavar="FILE",
        help="start from the weights of a checkpoint, or from a pretrained encoder",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    machine.add_argument(
        "--amp", choices=("auto", "off", "float16", "bfloat16"), help="mixed precision (default: auto)"
    )
    machine.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that prepare patches (default: cores less 1, at most 8)",
    )

    machine.add_argument(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine, one per GPU (default: 1)",
    )

    parser.add_argument_group("any setting").add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any key of any section, e.g. tr_config.initial_lr=0.0003 (repeatable)",
    )
    _add_common(parser)
    _add_completers(parser)
    parser.set_defaults(run=_run_train)


def _add_preset(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--preset",
        choices=("small", "medium", "large", "xlarge"),
        help="choose patch, batch and network for 8, 12, 24 or 40 GB of a GPU, or 2, 4, 8 or 16 GB on a CPU"
        " (default: for the free memory)",
    )


def _add_split_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options that choose what validates; return their group."""
    split = parser.add_argument_group("training and validation part")
    split.add_argument(
        "--train-split", type=float, metavar="SHARE", help="share that trains, 0 to 1 (default: 0.8)"
    )
    split.add_argument(
        "--val-volumes",
        type=lambda text: [name for name in text.split(",") if name],
        metavar="NAMES",
        help="images that validate, e.g. b,c or 'late_*'; all others train",
    )
    split.add_argument("--val-input", metavar="DATA", help="data folder whose images all validate")
    split.add_argument(
        "--split", metavar="FILE", help="what trains and validates: the _split.json of a run, or one like it"
    )
    split.add_argument("--fold", metavar="I/K", help="part I of K validates, e.g. 0/5 to 4/5")
    split.add_argument(
        "--group-by",
        metavar="RULE",
        help="keep images of one group on one side: a regular expression, e.g. '^(p[0-9]+)_', or a .csv file",
    )
    return split


def _add_command(commands: argparse._SubParsersAction, name: str, module: str, text: str) -> None:
    """Add a command whose module has `add_<name>_arguments` and `run_<name>`, and no slow imports."""
    code = import_module(module)
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    getattr(code, f"add_{name}_arguments")(parser)
    _add_common(parser)
    _add_completers(parser)
    parser.set_defaults(run=getattr(code, f"run_{name}"))


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inspect", help="show what a data folder holds and the network planned for it"
    )
    parser.add_argument(
        "input",
        metavar="DATA",
        nargs="+",
        help="folder with images/, labels/ and, optionally, masks/ (several: NAME=DATA names one)",
    )
    parser.add_argument("--config-path", metavar="YAML", help="experiment file")
    parser.add_argument(
        "--patch-size", metavar="Z,Y,X", help="patch in voxels or lengths (default: from the data)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="first read all images, labels and masks, and list what is damaged",
    )
    _add_preset(parser)
    parser.add_argument("--sheet", metavar="PNG", help="also write a contact sheet of labels over images")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    _add_split_arguments(parser)
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="any key (repeatable)"
    )
    _add_common(parser)
    _add_completers(parser)
    parser.set_defaults(run=_run_inspect)


def _run_train(options: argparse.Namespace) -> int:
    from volumen.cli.train import run_train

    return run_train(options)


def _run_inspect(options: argparse.Namespace) -> int:
    from volumen.cli.inspect import run_inspect

    return run_inspect(options)


if __name__ == "__main__":
    from volumen.cli.running.execution import leave

    leave(main())
