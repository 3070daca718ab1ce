"""Train a recipe: the command line, on top of TorchTitan's own.

The same command resumes a run that was stopped. Exit status 75: the run was told to stop (SIGTERM, Ctrl-C), has
saved, and the same command resumes it. Imports nothing heavy before the arguments are right.
"""

import argparse
import ast
import contextlib
import gc
import inspect
import io
import os
import re
import sys
import textwrap
from functools import wraps

from nitp_titan.config import recipe
from nitp_titan.config.recipe import RECIPE_KEYS
from nitp_titan.errors import UserError
from nitp_titan.machine import exits, quiet
from nitp_titan.machine.exits import KEPT_OF_TRAINING
from nitp_titan.objectives.settings import NITPConfig

_OPTIMIZER_KEYS = RECIPE_KEYS["optimizer"] - {"param_groups"}
# [optimizer] lr of a recipe is this flag of TorchTitan.
_OPTIMIZER_FLAG = re.compile(r"--optimizer\.([\w-]+)(?=$|=)")
_TITAN_FLAG = "--optimizer.param-groups.0.optimizer-kwargs."

_USAGE = "torchrun --nproc_per_node N -m nitp_titan.train --recipe R [--train-config C] [flags]"
_DESCRIPTION = """Train a recipe (what is trained) on a machine that a train config describes (where and how).

  torchrun --nproc_per_node 1 -m nitp_titan.train --recipe debug/nitp_debug
  torchrun --nproc_per_node 8 -m nitp_titan.train --recipe recipes/my.toml --train-config h100x8 --nitp.weight 0.8

The same command resumes a run that was stopped. Ctrl-C or SIGTERM: the step is finished and saved; exit status 75.
"""
# Flag, its value in the help, and what it does.
_COMMON = [
    ("--training.steps", "N", "optimizer steps (default: the recipe's)"),
    ("--optimizer.lr", "X", "learning rate; also weight_decay, betas, eps (default: the recipe's)"),
    ("--dump_folder", "DIR", "run folder (default: the train config's, outputs/{recipe})"),
    ("--checkpoint.interval", "N", "steps between checkpoints (default: the train config's)"),
    ("--metrics.log_freq", "N", "steps between lines of the log (default: the train config's)"),
    ("--resume", "", "resume although recipe or data have changed since (default: refused)"),
    ("--overwrite", "", "set the run that is in the folder aside and start anew (default: resume it)"),
]


def help_text() -> str:
    """The first screen of --help: what there is, and how to see the rest."""
    parser = argparse.ArgumentParser(
        prog="nitp_titan.train",
        usage=_USAGE,
        description=_DESCRIPTION,
        add_help=False,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=120),
        epilog="All settings of TorchTitan are flags too, with their values in this run: --help-all.",
    )
    start = parser.add_argument_group("what is started")
    start.add_argument("--recipe", metavar="R", help="name (`python scripts/recipe.py list`) or path; needed")
    start.add_argument("--train-config", metavar="C", help="name or path (default: gpu where there is one, else cpu)")
    nitp = parser.add_argument_group("[nitp]: the objective (default: the recipe's; here those of NITP itself)")
    for name, (value, text) in _documented(NITPConfig).items():
        if value == "True":
            nitp.add_argument(f"--nitp.no-{name}", action="store_true", help=f"do not: {text}")
        else:
            nitp.add_argument(f"--nitp.{name}", metavar=value, help=text)
    common = parser.add_argument_group("often changed")
    for flag, value, text in _COMMON:
        common.add_argument(flag, **({"metavar": value} if value else {"action": "store_true"}), help=text)
    return parser.format_help()


def _documented(section: type) -> dict[str, tuple[str, str]]:
    """Settings of a section -> default and first sentence of the docstring below it."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    found = {}
    for field, text in zip(definition.body, definition.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            # "(Eq. 4)" does not end a sentence.
            sentence = re.split(r"[.;]\s(?=[A-Za-z])", " ".join(text.value.value.split()))[0].rstrip(".")
            found[field.target.id] = str(ast.literal_eval(field.value)), sentence
    return found


def titan_arguments(argv: list[str]) -> list[str]:
    """Our arguments as those of TorchTitan's entry point: ``--module nitp_titan --config R@C ...``.

    Raises:
        UserError: without --recipe, or outside torchrun.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    parser.add_argument("--train-config", "--train_config")
    try:
        known, flags = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}.") from None
    helping = "--help-all" in flags
    flags = ["--help" if flag == "--help-all" else _OPTIMIZER_FLAG.sub(_titan_flag, flag) for flag in flags]
    if known.recipe is None:
        if not helping:
            raise UserError("--recipe is missing; `python scripts/recipe.py list` shows the project's own.")
        known.recipe = "debug/nitp_debug"
    if "RANK" not in os.environ and not helping:
        raise UserError(
            "training starts under torchrun: torchrun --nproc_per_node 1 -m nitp_titan.train " + " ".join(argv)
        )
    name = f"{known.recipe}@{known.train_config}" if known.train_config else known.recipe
    return ["--module", "nitp_titan", "--config", name, *flags]


def _titan_flag(flag: re.Match) -> str:
    name = flag[1].replace("-", "_")
    return f"{_TITAN_FLAG}{name}" if name in _OPTIMIZER_KEYS else flag[0]


def _located(error: UserError, arguments: list[str]) -> UserError:
    """The error with the file of its setting, which is not known where the setting is checked; a flag has none."""
    flags = [flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in arguments[4:]]
    section = error.table or error.key
    if section is None or any(flag == section or flag.startswith(f"{section}.") for flag in flags):
        return error
    settings = recipe.read_settings(*recipe.locate(arguments[3]))
    return UserError(settings.location(error.table, error.key) + str(error))


def check_groups(argv: list[str], name: str) -> None:
    """Raise UserError where a flag sets the optimizer and the recipe's has several groups of parameters."""
    flags = [flag for flag in argv if (found := _OPTIMIZER_FLAG.match(flag)) and _titan_flag(found) != found[0]]
    if not flags:
        return
    groups = recipe.read_settings(*recipe.locate(name)).tables.get("optimizer", {}).get("param_groups", [])
    if isinstance(groups, list) and len(groups) > 1:
        flag = flags[0].partition("=")[0]
        first = _OPTIMIZER_FLAG.sub(_titan_flag, flag)
        last = first.replace(".0.", f".{len(groups) - 1}.")
        raise UserError(
            f"{flag}: the recipe's optimizer has {len(groups)} groups of parameters with settings of their own; name "
            f"the group: {first} to {last}."
        )


def import_torchtitan():
    """TorchTitan's entry point, imported without looking for garbage: a second less on the CPU.

    Python's collector would go through the same growing million of objects again and again, all of which stay.
    """
    gc.disable()
    from torchtitan import train

    gc.freeze()
    gc.enable()
    return train


def _read_flags_in_one_line() -> None:
    """Let TorchTitan say in one line, and not in a box, what is wrong with a flag.

    Values are called as in TOML and in messages: ``none``; one name or several, each a word.
    """
    import tyro
    from torchtitan.config import manager

    parse_args = manager.ConfigManager.parse_args
    if hasattr(parse_args, "__wrapped__"):
        return

    @wraps(parse_args)
    def parse(self, args: list[str] | None = None):
        manager.custom_registry.primitive_rule(_none_rule)
        manager.custom_registry.primitive_rule(_names_rule)
        written = io.StringIO()
        try:
            with contextlib.redirect_stderr(written):
                config = parse_args(self, args)
        except SystemExit as end:
            if end.code != 2:
                raise
            raise UserError(_without_box(written.getvalue())) from None
        sys.stderr.write(written.getvalue())
        return config

    def _none_rule(type_info):
        if type_info.type is not type(None):
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="none",
            instance_from_str=lambda values: None,
            is_instance=lambda value: value is None,
            str_from_instance=lambda value: ["none"],
            choices=("none", "None"),
        )

    def _names_rule(type_info):
        if type_info.type != str | list[str]:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="NAME [NAME ...]",
            instance_from_str=lambda values: values[0] if len(values) == 1 else values,
            is_instance=lambda value: isinstance(value, (str, list)),
            str_from_instance=lambda value: [value] if isinstance(value, str) else value,
        )

    manager.ConfigManager.parse_args = parse


def _without_box(text: str) -> str:
    """An error of tyro's as one line, with the nearest flag, without its box and its list of all flags."""
    lines = [re.sub("[│╭╮╰╯─]", " ", line).strip() for line in text.splitlines()]
    parts = [[]]
    for line in lines:
        if line and not line.strip("-"):
            parts.append([])
        else:
            parts[-1] += [line] if line else []
    # A title, the mistake, then what may help.
    mistake = " ".join(parts[1] if len(parts) > 1 else parts[0]).rstrip(".")
    near = [line for part in parts if part[:1] == ["Perhaps you meant:"] for line in part]
    flags = [line.split()[0] for line in near if line.startswith("--")]
    return f"{mistake}." + (f" Did you mean '{flags[0]}'?" if flags else "")


def main() -> None:
    if {"-h", "--help"} & {*sys.argv[1:]}:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            exits.run(lambda: print(help_text(), end=""), kept="nothing was begun.")
        return
    exits.run(_train, kept=KEPT_OF_TRAINING)


def _train() -> None:
    arguments: list[str] = []
    try:
        arguments = titan_arguments(sys.argv[1:])
        path = recipe.find(arguments[3].partition("@")[0], "recipes")
        recipe.read_toml(path)
        check_groups(sys.argv[1:], arguments[3])
        sys.argv[1:] = arguments
        quiet.install()
        train = import_torchtitan()
        _read_flags_in_one_line()
        train.main()
    except UserError as error:
        raise _located(error, arguments) from None


if __name__ == "__main__":
    main()
