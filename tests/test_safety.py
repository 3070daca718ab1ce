"""The project runs no code from outside and uses no network, unless the name of something on the hub is given."""

import os
import subprocess
import sys

import pytest
from processes import free_port, PROJECT
from safety_rules import offences


@pytest.mark.parametrize("folder", ["nitp_titan", "scripts"])
def test_no_code_of_the_project_could_run_code_from_outside(folder):
    """Pickles, eval, remote code of models, shells; every checkpoint is read by `safe_dcp`."""
    files = sorted((PROJECT / folder).rglob("*.py"))
    assert len(files) > 5
    found = {str(file.relative_to(PROJECT)): lines for file in files if (lines := offences(file))}
    assert not found


@pytest.mark.parametrize(
    "code, what",
    {
        "torch.load(file)": "torch.load without weights_only=True",
        "torch.load(file, weights_only=safe)": "torch.load without weights_only=True",
        "torch.jit.load(file)": "torch.jit.load without weights_only=True",
        "import pickle": "import of pickle",
        "from pickle import loads": "import of pickle",
        "import joblib.numpy_pickle": "import of joblib.numpy_pickle",
        "pickle.load(file)": "pickle.load",
        "eval(text)": "eval",
        "exec(text)": "exec",
        "os.system(command)": "os.system",
        "subprocess.run(command, shell=True)": "shell",
        "numpy.load(file, allow_pickle=True)": "allow_pickle",
        "AutoConfig.from_pretrained(name, trust_remote_code=True)": "trust_remote_code",
        "AutoConfig.from_pretrained(name, trust_remote_code=trust)": "trust_remote_code",
        "options = {'trust_remote_code': True}": "trust_remote_code",
        "AutoModelForCausalLM.from_pretrained(name)": "without use_safetensors=True",
        "yaml.load(file)": "yaml.load",
        "dcp.load(state, checkpoint_id=path)": "dcp.load",
        "dcp.FileSystemReader(path)": "dcp.FileSystemReader",
    }.items(),
)
def test_each_rule_finds_what_it_forbids(tmp_path, code, what):
    (tmp_path / "code.py").write_text(f"# A line.\n{code}\n")
    (found,) = offences(tmp_path / "code.py")
    assert found.startswith("2: ") and what in found


def test_the_rules_leave_the_usual_alone(tmp_path):
    code = (
        'model.eval()\ntorch.load(file, weights_only=True)\nrun(command, shell=False)\nre.compile("a")\njson.load(file)'
    )
    (tmp_path / "code.py").write_text(code)
    assert not offences(tmp_path / "code.py")


def test_even_the_reader_of_pickles_has_two_names_of_the_module_only(tmp_path):
    (tmp_path / "safe_dcp.py").write_text("import pickle\npickle.Unpickler\npickle.loads(data)\n")
    assert offences(tmp_path / "safe_dcp.py") == ["3: pickle.loads"]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A session on a machine without network: its folder, its process, and what it tried to reach in its two parts."""
    folder = tmp_path_factory.mktemp("session")
    # conftest keeps all other tests off the hub; here a real attempt has to show.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    environment |= {
        "PYTHONPATH": str(PROJECT / "tests/no_network"),
        "NETWORK_ATTEMPTS": str(folder / "attempts"),
        "HF_HOME": str(folder / "cache"),
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "tests/offline.py", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=PROJECT)
    attempts = [folder / "attempts", folder / "attempts_for_the_hub"]
    return folder, done, *[path.read_text().splitlines() if path.is_file() else [] for path in attempts]


def test_commands_on_local_files_try_no_network(session):
    """List, check, make assets, train both variants, resume, compare, export, evaluate, probe."""
    folder, done, attempts, _ = session
    assert not attempts
    for made in ("report/report.md", "hf/model.safetensors", "evaluation/results.json", "geometry/geometry.json"):
        assert (folder / made).is_file(), done.stdout[-2000:] + done.stderr[-4000:]
    assert (folder / "runs/nitp/validation.jsonl").is_file()
    assert '"step": 3' in (folder / "runs/nitp/metrics.jsonl").read_text().splitlines()[-1]


def test_a_dataset_of_the_hub_is_looked_for_there_and_its_absence_is_one_line(session):
    """Or the test above could not fail: the same guard sees this attempt."""
    _, done, _, attempts = session
    assert attempts and all("huggingface.co" in attempt for attempt in attempts), attempts
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: nobody/nothing: it does not answer (")
    assert "Traceback" not in done.stderr
