"""The table of parallelism in tests/README.md is what the suite holds."""

import re
import subprocess
import sys

from processes import PROJECT


def test_the_table_of_the_readme_is_generated_from_the_collected_tests():
    done = subprocess.run(
        [sys.executable, "tests/distributed/table.py", "--check"], capture_output=True, text=True, cwd=PROJECT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_entry_of_the_table_links_to_a_test():
    text = (PROJECT / "tests/README.md").read_text()
    section = text.partition("<!-- parallelism")[2].partition("<!-- end")[0]
    links = re.findall(r"\]\(([^)]+test_[^)]+)\)", section)
    assert len(links) > 30
    assert all((PROJECT / "tests" / link).is_file() for link in links)
