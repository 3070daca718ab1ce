"""The probe of whole models: texts, tables, files, mistakes."""

import json
import shutil
import subprocess
import sys

import pytest
from geometry_of_models import (
    DIM,
    DOCUMENTS,
    LAYERS,
    make,
    SIZES,
)
from matplotlib.image import imread
from processes import warm_python
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from nitp_titan.data.text_files import documents_of
from nitp_titan.errors import UserError
from nitp_titan.evaluation.geometry import (
    check,
    GeometrySettings,
    measure_models,
    tokenized,
)
from nitp_titan.evaluation.pretrained import read_models
from nitp_titan.files import check_writable
from nitp_titan.report.pretrained_geometry import as_json, tables, write


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory, assets):
    """Folders of two models with the tokenizer of the assets, by family."""
    folders = {}
    for family in ("llama, tied", "gpt2"):
        folders[family] = tmp_path_factory.mktemp("model") / family.partition(",")[0]
        make(family).save_pretrained(folders[family])
        AutoTokenizer.from_pretrained(assets).save_pretrained(folders[family])
    return folders


def test_the_first_tokens_of_documents_are_measured_until_there_are_enough(saved, text):
    tokenizer = AutoTokenizer.from_pretrained(saved["gpt2"])
    whole = [tokenizer(document)["input_ids"] for document in DOCUMENTS]
    assert len(whole[2]) > 12
    cut = [ids[:12] for ids in whole]
    documents = list(documents_of(text, "text"))
    assert [ids.tolist() for ids in tokenized(documents, tokenizer, 12)] == cut
    enough = sum(map(len, cut[:3]))
    assert [ids.tolist() for ids in tokenized(documents, tokenizer, 12, enough)] == cut[:3]
    assert [ids.tolist() for ids in tokenized(documents, tokenizer, 12, enough - 1)] == cut[:2]


def test_blank_lines_part_the_documents_of_a_text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\none\nand its second line\n\n  \ntwo\n")
    assert list(documents_of(path, "text")) == ["one\nand its second line\n", "two\n"]


def test_the_script_compares_two_models_offline(saved, text, tmp_path):
    out, (llama, gpt2) = tmp_path / "new/probe", saved.values()
    command = [sys.executable, "scripts/geometry.py", "--model", str(llama), f"second={gpt2}"]
    command += ["--text", str(text), "--seq-len", "16", "--num-pairs", "32", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    models = read_models([str(llama), f"second={gpt2}"])
    result = measure_models(models, GeometrySettings(text=text, seq_len=16, num_pairs=32))
    assert json.loads((out / "geometry.json").read_text()) == json.loads(as_json(result))
    files = {
        f"{name}.{kind}" for name in ("layers_effective_rank", "layers_cosine", "spectrum") for kind in ("png", "svg")
    }
    assert {path.name for path in out.iterdir()} == files | {"geometry.json", "geometry.md", "geometry.png"}
    assert imread(out / "geometry.png").std() > 0.01
    assert done.stdout.startswith(tables(result)) and str(out / "geometry.md") in done.stdout
    assert tables(result) in (out / "geometry.md").read_text()
    tokens = result["models"][0]["tokens"]
    assert f"second: {tokens:,} of {tokens:,} tokens" in done.stderr and "tokens/s" in done.stderr


def test_the_table_has_both_models_and_their_difference(saved, text):
    result = measure_models(read_models([*map(str, saved.values())]), GeometrySettings(text=text, seq_len=16))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables(result).splitlines()]
    assert rows[0] == ["last hidden state", "llama", "gpt2", "gpt2 - llama"]
    ranks = [model["states"]["hidden"]["effective_rank"] for model in result["models"]]
    row = next(row for row in rows if row[0] == "effective rank / dim")
    assert row[1:] == [f"{ranks[0] / DIM:.4f}", f"{ranks[1] / DIM:.4f}", f"{(ranks[1] - ranks[0]) / DIM:+.4f}"]
    assert f"layer_{LAYERS}" in [row[0] for row in rows]


def test_models_of_different_context_are_cut_and_named(saved, text, tmp_path):
    short = tmp_path / "short"
    LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": 8})).save_pretrained(short)
    AutoTokenizer.from_pretrained(saved["gpt2"]).save_pretrained(short)
    result = measure_models(read_models([str(saved["gpt2"]), str(short)]), GeometrySettings(text=text, seq_len=16))
    tokens = [model["tokens"] for model in result["models"]]
    assert tokens[1] < tokens[0]
    assert "short: --seq-len 16 is beyond its max_position_embeddings; 8 is taken." in result["warnings"]
    assert any("cuts both alike" in line and "--seq-len 8" in line for line in result["warnings"])
    assert f"short: {tokens[1]} tokens at dim {DIM}: no rank is above {tokens[1] - 1}." in result["warnings"]


def test_models_of_different_tokenizers_read_the_same_documents(saved, text, tmp_path):
    letters = tmp_path / "letters"
    make("gpt2").save_pretrained(letters)
    AutoTokenizer.from_pretrained(saved["gpt2"]).save_pretrained(letters)
    tokenizer = json.loads((letters / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (letters / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = measure_models(
        read_models([str(saved["gpt2"]), str(letters)]), GeometrySettings(text=text, seq_len=64, tokens=30)
    )
    first, second = result["models"]
    assert first["tokens"] <= 30 < second["tokens"] and first["sequences"] == second["sequences"]
    assert any(line.startswith("letters: ") and "their tokenizers differ" in line for line in result["warnings"])


def test_an_unfinished_write_leaves_nothing_new(saved, text, tmp_path, monkeypatch):
    result = measure_models(read_models([str(saved["gpt2"])]), GeometrySettings(text=text))
    out = tmp_path / "out"
    write(result, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nitp_titan.report.folder.write_overview", full)
    with pytest.raises(UserError, match="--out .* cannot be written: No space left"):
        write(result | {"warnings": ["another"]}, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_model_without_a_figure_is_written_too(tmp_path):
    models = [{"name": "a|b", "model": "a", "tokens": 9, "sequences": 2, "dim": 4, "num_layers": 2, "states": {}}]
    result = {"models": models, "settings": {}, "versions": {}, "warnings": ["a|b: hidden: not finite; left out."]}
    assert {path.name for path in write(result, tmp_path)} == {"geometry.json", "geometry.md"}
    assert "not finite" in (tmp_path / "geometry.md").read_text()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq_len": 0}, "--seq-len 0: it must be at least 1"),
        ({"num_pairs": 0}, "--num-pairs 0: it must be at least 1"),
        ({"dtype": "bfloat"}, "--dtype bfloat: .*Did you mean 'bfloat16'"),
        ({"device": "gpu"}, "--device gpu: it must be auto, cpu, cuda or cuda:N"),
        ({"device": "mps"}, "--device mps: it must be"),
        ({"device": "cuda:99"}, "--device cuda:99: this machine has . GPUs"),
    ],
)
def test_a_setting_out_of_range_is_named(changes, message, text):
    with pytest.raises(UserError, match=message):
        GeometrySettings(text=text, **changes)


BAD_TEXTS = {
    "a.jsonl": ('{"txet": "a"}\n', "--text-field 'text': .*line 1: there is no field 'text'. Did you mean 'txet'"),
    "b.jsonl": ('{"text": "a"}\nplain\n', "--text: .*line 2: no JSON object but 'plain' .* needs the ending .txt"),
    "c.jsonl": ('["text"]\n', "line 1: a list \\['text'\\] and not an object with the field 'text'"),
    "d.jsonl": ('{"text": 7}\n', "line 1: 'text' is 7 and not a text"),
    "e.jsonl": ("", "holds no documents; at least 2"),
    "f.txt": ("one\ndocument\n", "holds 1 document; at least 2 .* blank lines"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_bad_text_is_named_with_its_line(name, tmp_path):
    content, message = BAD_TEXTS[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        check(GeometrySettings(text=tmp_path / name))


def test_missing_files_are_named_with_the_nearest(saved, text):
    with pytest.raises(UserError, match="--text .*texts.jsonl is not a file.*Did you mean '.*text.jsonl'"):
        check(GeometrySettings(text=text.with_name("texts.jsonl")))
    text.with_suffix(".gz").write_bytes(b"\x1f\x8b\xff")
    with pytest.raises(UserError, match="text.gz, line 1 or later: "):
        check(GeometrySettings(text=text.with_suffix(".gz")))
    with pytest.raises(UserError, match="neither a folder nor"):
        read_models([str(saved["gpt2"]) + "x"])
    with pytest.raises(UserError, match="two models are called .*; give names: --model NTP=DIR NITP=DIR"):
        read_models([str(saved["gpt2"])] * 2)
    with pytest.raises(UserError, match="--out .*text.jsonl/a/b cannot be written: .*text.jsonl: Not a directory"):
        check_writable(text / "a/b", f"--out {text}/a/b")


def test_blank_documents_count_and_a_missing_bos_is_warned_of(saved, tmp_path):
    path = tmp_path / "blank.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in (*DOCUMENTS[:3], "", " ")))
    assert list(documents_of(path, "text"))[3:] == ["", " "]
    settings = GeometrySettings(text=path, seq_len=16)
    result = measure_models(read_models([str(saved["gpt2"])]), settings)
    assert result["models"][0]["sequences"] == 5
    assert not any("do not begin with" in line for line in result["warnings"])
    bare = shutil.copytree(saved["gpt2"], tmp_path / "bare")
    tokenizer = json.loads((bare / "tokenizer.json").read_text()) | {"post_processor": None}
    (bare / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = measure_models(read_models([str(bare)]), settings)
    assert result["models"][0]["sequences"] == 5
    assert "bare: sequences do not begin with <|bos|>, as documents do in training." in result["warnings"]


def test_too_few_tokens_for_two_documents_are_refused(saved, text):
    with pytest.raises(UserError, match="--tokens 4: fewer than 2 documents .* 32 are always enough"):
        measure_models(read_models([str(saved["gpt2"])]), GeometrySettings(text=text, tokens=4, seq_len=16))


def test_a_tokenizer_that_does_not_fit_is_refused(saved, text, tmp_path):
    small = tmp_path / "small"
    LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 300})).save_pretrained(small)
    AutoTokenizer.from_pretrained(saved["gpt2"]).save_pretrained(small)
    with pytest.raises(UserError, match="its tokenizer made token [0-9]+, but its embedding has 300 rows"):
        measure_models(read_models([str(small)]), GeometrySettings(text=text))


def test_the_script_says_a_mistake_in_one_line_and_writes_nothing(saved, text, tmp_path):
    command = ["scripts/geometry.py", "--model", str(saved["gpt2"]), "--text", str(text)]
    command += ["--text-field", "texd", "--out", str(tmp_path / "out")]
    done = warm_python(*command, preload=("transformers",))
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
