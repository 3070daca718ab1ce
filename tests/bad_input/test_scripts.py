"""Wrong arguments of every script: one line, and nothing written."""

import os
import runpy
import sys

import pytest
from outcome import is_one_line, tree

from nitp_titan.config.recipe import PROJECT

# Script and arguments, and what its one line says.
SCRIPTS = [
    ("recipe.py", "show", "debug/nitp_debgu", "recipes/debug/nitp_debug.toml'?"),
    ("recipe.py", "show", "/dev/zero.toml", "/dev/zero.toml does not exist"),
    ("recipe.py", "show", "pipe.toml", "pipe.toml is a pipe, socket or device"),
    ("recipe.py", "show", "debug/nitp_debug", "cup", "cup.toml does not exist. Did you mean"),
    ("recipe.py", "show", "bad.toml", "bad.toml: [model] family is missing. Did you mean 'model' by 'modle'?"),
    ("recipe.py", "diff", "debug/nitp_debug", "bad.toml", "bad.toml: [model] family is missing"),
    ("recipe.py", "check", "debug/nitp_debgu", "Did you mean"),
    ("recipe.py", "check", "debug/nitp_debug", "no_such_config", "no_such_config.toml does not exist"),
    ("export_hf.py", "--checkpoint", "nowhere", "--out", "hf", "nowhere is not a folder"),
    ("export_hf.py", "--checkpoint", "bad.toml", "--out", "hf", "bad.toml is not a folder"),
    ("export_hf.py", "--checkpoint", "empty", "--out", "hf", "empty holds no complete checkpoint"),
    ("evaluate.py", "--model", "empty", "--suite", "paper", "empty holds no config.json"),
    ("evaluate.py", "--model", "empty", "--text", "nowhere.jsonl", "empty"),
    ("evaluate.py", "--model", "empty", "--text", "nowhere.jsonl", "--dtype", "float31", "Did you mean 'float32'"),
    ("evaluate.py", "--model", "empty", "--text", "nowhere.jsonl", "--device", "gpu9", "--device gpu9"),
    ("geometry.py", "--model", "empty", "--text", "nowhere.jsonl", "--out", "out", "empty"),
    ("geometry.py", "--model", "empty", "--text", "bad.toml", "--seq-len", "0", "--out", "out", ""),
    ("compare.py", "nowhere", "--out", "out", "nowhere"),
    ("compare.py", "empty", "--out", "out", "empty"),
    ("compare.py", "empty", "--out", "bad.toml/x", ""),
    ("study", "--recipe", "nipt", "Did you mean 'nitp'?"),
    ("study", "--report", "--out", "nowhere", "nowhere"),
    ("study", "--parallel", "0", "--parallel 0: 1 to"),
    ("prepare_local_suite.py", "--text", "nowhere.jsonl", "nowhere.jsonl"),
    ("download_assets.py", "qwne2", "Did you mean 'qwen2'?"),
]


@pytest.mark.parametrize("case", SCRIPTS, ids=lambda case: " ".join(case[:-1]))
def test_a_script_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys, case):
    script, *arguments, message = case
    (tmp_path / "bad.toml").write_text('[modle]\nfamily = "llama3"\n')
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(PROJECT / "scripts" / script), run_name="__main__")
    written = capsys.readouterr()
    assert "Traceback" not in written.out + written.err
    assert is_one_line(end.value.code) and message in end.value.code, end.value.code
    assert tree(tmp_path) == before
