"""Every script: its own checkout's code, outside of the environment, into a pipe, with Ctrl-C."""

import argparse
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
from processes import PROJECT

SCRIPTS = sorted(path.name for path in (PROJECT / "scripts").glob("[a-z]*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_takes_its_checkout_and_ends_as_a_command(script):
    text = (PROJECT / "scripts" / script).read_text()
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    (checkout,) = [index for index, line in enumerate(imports) if line.startswith("import _checkout")]
    before = {line.split()[1].partition(".")[0] for line in imports[:checkout]}
    assert before <= sys.stdlib_module_names
    assert text.rstrip().splitlines()[-2:][0] == 'if __name__ == "__main__":' and "exits.run(main, kept=" in text
    assert "exit_with" not in text and "except UserError" not in text


def test_a_script_of_a_second_checkout_uses_the_code_beside_it_and_so_do_its_processes(tmp_path):
    shutil.copytree(PROJECT / "nitp_titan", tmp_path / "nitp_titan", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "scripts").mkdir()
    shutil.copy(PROJECT / "scripts/_checkout.py", tmp_path / "scripts")
    (tmp_path / "scripts/where.py").write_text(
        "import subprocess, sys\nimport _checkout\nimport nitp_titan\nprint(nitp_titan.__file__, flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import nitp_titan; print(nitp_titan.__file__)'])\n"
    )
    # As where an environment has this checkout installed.
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, str(tmp_path / "scripts/where.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert done.stdout.splitlines() == [str(tmp_path / "nitp_titan/__init__.py")] * 2


@pytest.mark.parametrize("command", [["scripts/recipe.py", "list"], ["scripts/study"], ["-m", "nitp_titan.train"]])
def test_outside_of_the_environment_one_line_says_how_to_enter_it(command):
    # -S leaves out what is installed.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", *command], capture_output=True, text=True, env=environment, cwd=PROJECT
    )
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "source .venv/bin/activate" in done.stderr


def test_on_another_system_one_line_says_so():
    code = "import sys; sys.platform = 'darwin'; import nitp_titan"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: nitp-titan runs on Linux only") and done.stderr.endswith("this is darwin.\n")


def test_a_list_of_recipes_survives_a_reader_that_has_enough():
    command = [sys.executable, "scripts/recipe.py", "list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT)
    # Before it writes.
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_ctrl_c_in_the_quickstart_lets_its_run_save_and_says_how_to_resume(assets, tmp_path):
    command = [sys.executable, "scripts/quickstart.py", "--steps", "200", "--out", str(tmp_path)]
    one_rank = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in one_rank}
    with (tmp_path / "said.txt").open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=PROJECT, env=environment)
        try:
            while "ntp: step 1/200" not in (tmp_path / "said.txt").read_text():
                assert process.poll() is None, (tmp_path / "said.txt").read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=200) == 130
        finally:
            process.kill()
    said = (tmp_path / "said.txt").read_text()
    assert said.splitlines()[-1] == "interrupted: runs keep what they have saved; the same command resumes."
    assert "Traceback" not in said and "Stopped by Ctrl-C after step" in (tmp_path / "ntp/log.txt").read_text()
    assert list((tmp_path / "ntp/checkpoint").glob("step-*/.metadata")) and not (tmp_path / "nitp").exists()
    assert json.loads((tmp_path / "ntp/run.json").read_text())["finished"] is False


def test_the_tests_for_a_gpu_do_not_pass_without_one():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=PROJECT)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "-m gpu: these tests need a GPU, and torch finds none here." in done.stdout + done.stderr


def test_git_is_not_shown_what_the_commands_of_the_readme_make():
    ignored = (PROJECT / ".gitignore").read_text().split()
    assert {"/.venv/", "/assets/", "/outputs/", "/tokens/", "/my_data/"} <= set(ignored)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_a_script_says_what_happens_without_a_flag(monkeypatch, script):
    class Read(Exception):
        pass

    parsers = []

    def parse_args(self, args=None, namespace=None):
        parsers.append(self)
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    with pytest.raises(Read):
        runpy.run_path(str(PROJECT / "scripts" / script))["main"]()
    (parser,) = parsers
    assert parser.description and f"python scripts/{script}" in parser.description
    for action in parser._actions:
        given = action.default not in (None, False, True, [], argparse.SUPPRESS)
        text = action.help and parser._get_formatter()._expand_help(action)
        assert text or isinstance(action, argparse._SubParsersAction), action.dest
        assert not given or str(action.default) in text or "default" in text, f"{action.dest}: {text}"
