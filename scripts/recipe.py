"""Look at recipes, and try them at full size without a GPU.

python scripts/recipe.py list
python scripts/recipe.py show moe/nitp_9b_a1b [h100x64_ep]
python scripts/recipe.py diff moe/nitp_3b_a0.5b ablations/loss_mse
python scripts/recipe.py check [moe/nitp_9b_a1b [h100x64_ep]]
python scripts/recipe.py table

Recipes and train configs are named by path or as `list` shows them. `check` without a train config
takes those that are meant for the recipe, without a recipe all of them. `table` writes recipes/README.md.
"""

import argparse
import dataclasses
import json
import sys

import _checkout  # noqa: F401
import tomli_w

from nitp_titan.cli import catalog
from nitp_titan.config import recipe
from nitp_titan.machine import exits


def list_recipes(arguments: argparse.Namespace) -> None:
    entries = [catalog.entry(name) for name in recipe.available("recipes")]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2))
        return
    rows = [(e.name, e.model, e.objective, catalog.billions(e.tokens), f"{e.steps:,}", e.source) for e in entries]
    print(catalog.aligned([("recipe", "model", "objective", "tokens", "steps", "source"), *rows]))


def show(arguments: argparse.Namespace) -> None:
    path = recipe.find(arguments.recipe, "recipes")
    if arguments.train_config is None:
        tables = recipe.read_recipe(path).tables
        tables = {**tables.pop("", {}), **tables}
    else:
        from nitp_titan.config.build import tables_of
        from nitp_titan.training.trainer import load_config

        tables = tables_of(load_config(path, recipe.find(arguments.train_config, "train_configs")))
    print(json.dumps(tables, indent=2) if arguments.json else tomli_w.dumps(tables), end="")


def diff(arguments: argparse.Namespace) -> None:
    sides = [recipe.read_any(recipe.find(name, "recipes")).tables for name in (arguments.left, arguments.right)]
    differing = catalog.difference(*sides)
    if arguments.json:
        print(json.dumps(differing, indent=2))
        return
    rows = [(key, *("-" if value is None else str(value) for value in values)) for key, values in differing.items()]
    print(catalog.aligned([("setting", arguments.left, arguments.right), *rows]) if rows else "no difference")


def check(arguments: argparse.Namespace) -> None:
    pairs = catalog.pairs(arguments.recipe, arguments.train_config)
    from nitp_titan.sizing import meta_check

    results = []
    for result in meta_check.check(pairs):
        results.append(result)
        if not arguments.json:
            print(catalog.report(result), flush=True)
    failed = sum("error" in result for result in results)
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        print(f"{len(results) - failed} of {len(results)} checks passed")
    sys.exit(1 if failed else 0)


def table(arguments: argparse.Namespace) -> None:
    from nitp_titan.sizing import meta_check

    path = recipe.PROJECT / "recipes/README.md"
    path.write_text(catalog.readme(path.read_text(encoding="utf-8"), meta_check.counts_of), encoding="utf-8")
    print(json.dumps({"written": str(path)}) if arguments.json else f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    added = {}
    for run, text in (
        (list_recipes, "all recipes with model, objective, tokens and source"),
        (show, "a recipe with its base merged in; with a train config, every setting of the run"),
        (diff, "only what differs between two recipes"),
        (check, "build and parallelize at full size on a fake world, and count"),
        (table, "write the table of recipes/README.md"),
    ):
        name = run.__name__.removesuffix("_recipes")
        added[name] = command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
    added["show"].add_argument("recipe")
    added["show"].add_argument("train_config", nargs="?")
    added["diff"].add_argument("left")
    added["diff"].add_argument("right")
    added["check"].add_argument("recipe", nargs="?")
    added["check"].add_argument("train_config", nargs="?")
    added["check"].add_argument("--all", action="store_true", help="every recipe (also without a recipe)")
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    exits.run(main, kept="nothing was written.")
