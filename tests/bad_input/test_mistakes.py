"""Every shipped recipe and train config with every kind of mistake: one line, and nothing written."""

import fnmatch
import time
from collections import Counter
from pathlib import Path

import mistakes
import pytest
from mistakes import Mistake
from outcome import remove, tree

from nitp_titan.config import recipe

PROJECT = recipe.PROJECT
FILES = [f"{folder}/{name}.toml" for folder in ("recipes", "train_configs") for name in recipe.available(folder)]
RECIPES = recipe.available("recipes")
MISTAKES = mistakes.mistakes(PROJECT, FILES)
KINDS = sorted({mistake.kind for mistake in MISTAKES})


def partner(file: str) -> tuple[str, str, int]:
    """Recipe and train config of a run with a file, and the number of its ranks."""
    folder, _, name = file.removesuffix(".toml").partition("/")
    for train_config in recipe.available("train_configs"):
        machine = recipe.read_toml(PROJECT / f"train_configs/{train_config}.toml")["machine"]
        fitting = [name for pattern in machine["intended_recipes"] for name in fnmatch.filter(RECIPES, pattern)]
        if folder == "train_configs" and name == train_config:
            return f"recipes/{fitting[0]}.toml", file, machine["num_ranks"]
        if folder == "recipes" and name in fitting:
            return file, f"train_configs/{train_config}.toml", machine["num_ranks"]
    raise AssertionError(f"{file} is meant for nothing")


def _complaint(mistake: Mistake, project: Path, entry) -> str | None:
    """What is wrong with how a mistake is refused; None if nothing is."""
    path, kept = project / mistake.file, project.parent / "kept.toml"
    path.rename(kept)
    try:
        mistake.write(path)
        recipe_file, train_config, num_ranks = partner(mistake.file)
        before, start = tree(project), time.monotonic()
        # Whole paths: what is missing here would be taken from the project.
        arguments = ["--recipe", str(project / recipe_file), "--train-config", str(project / train_config)]
        end, written = entry(*arguments, num_ranks=num_ranks)
        seconds, after = time.monotonic() - start, tree(project)
    except Exception as error:
        return f"{mistake.name}: {type(error).__name__}: {error}"
    finally:
        remove(path)
        kept.rename(path)
    wrong = [f"does not say {word!r}" for word in mistake.says if word not in str(end)]
    if mistake.names_file and mistake.file not in str(end):
        wrong.append("does not name the file")
    if not isinstance(end, str) or not end.startswith("error: ") or len(end.splitlines()) != 1 or len(end) > 2000:
        wrong.append("is not one line")
    if "Traceback" in written or "error: " in written:
        wrong.append(f"wrote {written}")
    if seconds > 10:
        wrong.append(f"took {seconds:.1f} s")
    if before != after:
        wrong.append(f"changed {sorted(before.items() ^ after.items())}")
    return f"{mistake.name}: {', '.join(wrong)}: {end}" if wrong else None


def test_there_are_many_mistakes_and_of_every_file_every_kind():
    names = [mistake.name for mistake in MISTAKES]
    assert len(set(names)) == len(names) >= 500
    kinds = Counter(mistake.kind for mistake in MISTAKES)
    assert all(number >= len(FILES) - 10 for number in kinds.values()), kinds
    assert {mistake.file for mistake in MISTAKES} == set(FILES)
    row = next(line for line in (PROJECT / "tests/README.md").read_text().splitlines() if "wrong input: every" in line)
    assert f"in {len(kinds)} ways" in row and row.endswith(f"| {len(names):,} | {len(names):,} |")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_ends_with_one_line_that_names_it_and_nothing_written(project, entry, kind):
    complaints = [_complaint(mistake, project, entry) for mistake in MISTAKES if mistake.kind == kind]
    found = [complaint for complaint in complaints if complaint]
    assert not found, f"{len(found)} of {len(complaints)}:\n" + "\n".join(found)


def test_every_train_config_itself_is_accepted(project, entry):
    for file in (name for name in FILES if name.startswith("train_configs/")):
        recipe_file, train_config, num_ranks = partner(file)
        end, _ = entry("--recipe", recipe_file, "--train-config", train_config, num_ranks=num_ranks)
        assert end == "accepted", f"{file}: {end}"
