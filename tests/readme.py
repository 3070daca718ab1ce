"""Commands of the Markdown files: each fenced one is run by a test, or its comment names what no test has."""

import re
import shlex
from dataclasses import dataclass

from processes import PROJECT

DOCUMENTS = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("*/README.md"), PROJECT / "recipes/LOG.md"])
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NEEDS = re.compile(r"#.*\bneeds (a GPU|\d+ GPUs|the network)\b")


@dataclass(frozen=True)
class Command:
    document: str
    words: tuple[str, ...]
    needs: str | None
    """What the comment says that it needs and the machine of the tests may lack."""

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a Markdown text in a language."""
    return [content for name, content in _BLOCK.findall(text) if name == language]


def commands(document: str) -> list[Command]:
    """Fenced commands of a document of the project, in their order."""
    found = []
    for block in blocks((PROJECT / document).read_text(encoding="utf-8"), "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                needs = _NEEDS.search(line)
                found.append(Command(document, tuple(words), needs and needs[1]))
    return found


def every_command() -> list[Command]:
    return [command for path in DOCUMENTS for command in commands(str(path.relative_to(PROJECT)))]


def documented(start: str) -> list[str]:
    """Arguments of Python of the one command of the Markdown files that begins so, for the test that runs it."""
    (command,) = [command for command in every_command() if str(command).startswith(f"python {start}")]
    return list(command.words[1:])


def run_elsewhere() -> set[str]:
    """Beginnings of the commands that other tests take from `documented`."""
    tests = [path for path in (PROJECT / "tests").rglob("test_*.py")]
    return {f"python {start}" for path in tests for start in re.findall(r'\bdocumented\("(.+?)"\)', path.read_text())}
