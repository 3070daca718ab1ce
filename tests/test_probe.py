"""Geometry of pretrained models against transformers and numpy on the states themselves."""

import json
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from numpy.testing import assert_allclose
from test_geometry import Largest, numpy_figures
from transformers import (
    AutoTokenizer,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from nitp_titan import meter
from nitp_titan.config import UserError
from nitp_titan.documents import read_documents
from nitp_titan.hidden_states import Collector, decoder_layers, draw_pairs, HIDDEN, measure
from nitp_titan.pretrained import read_models
from nitp_titan.probe import check, probe, Settings, tokenized
from nitp_titan.report.probe import as_json, check_writable, tables, write

DIM, LAYERS, VOCABULARY = 32, 3, 4160
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": DIM, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
EXPERTS = {"moe_intermediate_size": 16, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
FAMILIES = {
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "ernie4_5_moe": lambda: Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**SIZES, **EXPERTS, use_bias=False)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, bos_token_id=0, eos_token_id=1)),
}
DOCUMENTS = [
    "import os",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "A document that is longer than the others, so that all of them are padded up to its length.",
    "x",
    "class Path:\n    pass",
]


def make(family: str):
    """A seeded model whose norms are no identities and whose biases are not zero."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name or "ln_" in name), std=0.3)
    return model


def tokens_of(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (n,), generator=generator, dtype=torch.int32) for n in lengths]


def states_of(model, sequences: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    """States of all tokens, sequence by sequence without padding; the last block's raw output is the norm's input."""
    norm = next(module for name, module in model.named_modules() if name in ("model.norm", "transformer.ln_f"))
    raw: list[torch.Tensor] = []
    hook = norm.register_forward_pre_hook(lambda module, args: raw.append(args[0]))
    with torch.no_grad():
        passes = [model(ids[None].long(), output_hidden_states=True).hidden_states for ids in sequences]
        hook.remove()
        assert all(torch.equal(norm(x), states[-1]) for x, states in zip(raw, passes))
    columns = zip(*([*states[:-1], x, states[-1]] for x, states in zip(raw, passes)))
    names = [*(f"layer_{number}" for number in range(LAYERS + 1)), HIDDEN]
    return {name: torch.cat(column, dim=1)[0].numpy() for name, column in zip(names, columns, strict=True)}


def assert_same_figures(found: dict, expected: dict, rtol: float):
    assert found.keys() == expected.keys()
    for state, figures in expected.items():
        for figure in figures.keys() - {"spectrum"}:
            assert_allclose(found[state][figure], figures[figure], rtol=rtol, atol=1e-8, err_msg=f"{state} {figure}")


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_of_every_state_equal_numpy_on_the_states(family):
    model, sequences = make(family), tokens_of(7, 21, 3, 40, 1)
    found, left_out = measure(model, sequences, batch_size=2, num_pairs=64)
    expected = states_of(model, sequences)
    assert left_out == [] and list(found) == [HIDDEN, *(f"layer_{n}" for n in range(LAYERS + 1))]
    for state, x in expected.items():
        assert found[state]["tokens"] == len(x) == 72
        for figure, value in numpy_figures(x).items():
            assert_allclose(found[state][figure], value, rtol=1e-5, atol=1e-7, err_msg=f"{state} {figure}")


def test_the_sampled_cosine_is_that_of_the_drawn_pairs():
    model, sequences = make("llama, tied"), tokens_of(5, 9, 2)
    found, _ = measure(model, sequences, batch_size=2, num_pairs=50, seed=3)
    numbers, positions = draw_pairs(torch.tensor([5, 9, 2]), 50, 3)
    at = (torch.tensor([0, 5, 14])[numbers] + positions).numpy()
    for state, x in states_of(model, sequences).items():
        units = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
        expected = (units[at[:50]] * units[at[50:]]).sum(1).mean()
        assert_allclose(found[state]["cosine_sampled"], expected, rtol=1e-5, atol=1e-7, err_msg=state)


def test_names_of_states_are_those_of_training():
    found, _ = measure(make("qwen3"), tokens_of(3, 3), batch_size=2, num_pairs=1)
    assert list(found) == [meter.HIDDEN, *(meter.layer_state(n) for n in range(LAYERS + 1))]


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_batch_size_nor_padding_changes_a_figure(family):
    model, sequences = make(family), tokens_of(7, 21, 3, 40, 1)
    alone, _ = measure(model, sequences, batch_size=1, num_pairs=64)
    for batch_size in (2, 5, 64):
        assert_same_figures(measure(model, sequences, batch_size=batch_size, num_pairs=64)[0], alone, 1e-5)


def test_a_document_without_tokens_changes_nothing():
    model, sequences = make("gpt2"), tokens_of(7, 3)
    expected, _ = measure(model, sequences, batch_size=1, num_pairs=8)
    for batch_size in (1, 3):
        found, _ = measure(model, [sequences[0], *tokens_of(0), sequences[1]], batch_size=batch_size, num_pairs=8)
        assert_same_figures(found, expected, 1e-5)


def test_pairs_are_tokens_of_different_sequences_all_alike():
    lengths = torch.tensor([1, 0, 4, 2])
    sequences, positions = draw_pairs(lengths, 40_000, 0)
    assert (positions >= 0).all() and (positions < lengths[sequences]).all()
    first, second = (torch.tensor([0, 1, 1, 5])[sequences] + positions).chunk(2)
    assert (sequences[:40_000] != sequences[40_000:]).all()
    # 7 * 6 ordered pairs, without 4 * 3 and 2 * 1 of the same sequence.
    counts = torch.bincount(first * 7 + second, minlength=49)
    assert (counts > 0).sum() == 28
    assert_allclose(counts[counts > 0], 40_000 / 28, rtol=0.15)


def test_a_cone_is_told_from_a_ball():
    model, sequences = make("llama, tied"), tokens_of(60, 60, 60)
    ball, _ = measure(model, sequences, batch_size=2, num_pairs=256)
    with torch.no_grad():
        model.get_input_embeddings().weight += 1.0
    cone, _ = measure(model, sequences, batch_size=2, num_pairs=256)
    assert abs(ball["layer_0"]["cosine"]) < 0.02 and abs(ball["layer_0"]["cosine_sampled"]) < 0.05
    assert cone["layer_0"]["cosine"] > 0.99 and cone["layer_0"]["cosine_sampled"] > 0.99
    # A constant moves the mean only, which the covariance is free of.
    assert_allclose(cone["layer_0"]["effective_rank"], ball["layer_0"]["effective_rank"], rtol=1e-3)
    assert ball["layer_0"]["rankme"] > 25 > 10 > cone["layer_0"]["rankme"]


def test_fewer_directions_have_a_lower_rank():
    model, sequences = make("llama, tied"), tokens_of(60, 60, 60)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 4:] = 0
    found, _ = measure(model, sequences, batch_size=2, num_pairs=16)
    assert 3 < found["layer_0"]["effective_rank"] <= 4


def test_memory_does_not_grow_with_the_text_and_no_logits_are_made():
    model, largest = make("llama, tied"), []
    for number in (4, 40):
        with Largest() as seen:
            measure(model, tokens_of(*[50] * number), batch_size=4, num_pairs=8)
        largest.append(seen.bytes)
    assert largest[0] == largest[1] < 50 * VOCABULARY * 4
    collectors = []
    for number in (2, 60):
        collector = Collector(draw_pairs(torch.full((number,), 5), 8, 0))
        for start in range(0, number, 2):
            collector.expect(start, torch.ones(2, 5, dtype=torch.bool))
            collector.see("hidden", torch.ones(2, 5, DIM))
        tensors = [*collector.moments["hidden"].tensors(), collector.pair_states["hidden"]]
        collectors.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    assert collectors[0] == collectors[1]


def test_states_that_are_not_finite_are_named_and_the_others_measured():
    model = make("llama, tied")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    found, left_out = measure(model, tokens_of(9, 9), batch_size=2, num_pairs=4)
    assert list(found) == ["layer_0", "layer_1"]
    assert left_out == [f"{state}: not finite; left out." for state in ("hidden", "layer_2", "layer_3")]


def test_without_a_list_of_layers_the_last_hidden_state_is_measured_alone():
    model, sequences = make("llama, tied"), tokens_of(9, 9)
    expected, _ = measure(model, sequences, batch_size=2, num_pairs=4)
    model.config.num_hidden_layers = LAYERS + 5
    found, left_out = measure(model, sequences, batch_size=2, num_pairs=4)
    assert found == {HIDDEN: expected[HIDDEN]}
    assert left_out == ["its layers are not in a list of num_hidden_layers modules; left out."]


class TwoLists(torch.nn.Module):
    """A decoder whose layers hold lists of as many modules as there are layers."""

    def __init__(self):
        super().__init__()
        self.config = PretrainedConfig(num_hidden_layers=2)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])})
            for _ in range(2)
        )


def test_the_outermost_list_is_the_layers():
    decoder = TwoLists()
    assert decoder_layers(decoder) is decoder.layers


def test_a_state_that_was_not_seen_at_every_token_has_no_figures():
    collector = Collector(draw_pairs(torch.tensor([3, 3]), 4, 0))
    collector.expect(0, torch.ones(2, 3, dtype=torch.bool))
    collector.see("layer_1", torch.ones(2, 3, 8))
    collector.see("layer_2", torch.ones(6, 8))
    with pytest.raises(ValueError, match="seen at 6 tokens, not 12"):
        collector.figures("layer_1", 12)
    with pytest.raises(ValueError, match="does not show it"):
        collector.figures("layer_2", 6)


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
    documents = list(read_documents(text, "text"))
    assert [ids.tolist() for ids in tokenized(documents, tokenizer, 12)] == cut
    enough = sum(map(len, cut[:3]))
    assert [ids.tolist() for ids in tokenized(documents, tokenizer, 12, enough)] == cut[:3]
    assert [ids.tolist() for ids in tokenized(documents, tokenizer, 12, enough - 1)] == cut[:2]


def test_blank_lines_part_the_documents_of_a_text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\none\nand its second line\n\n  \ntwo\n")
    assert list(read_documents(path, "text")) == ["one\nand its second line\n", "two\n"]


def test_the_script_compares_two_models_offline(saved, text, tmp_path):
    out, (llama, gpt2) = tmp_path / "new/probe", saved.values()
    command = [sys.executable, "scripts/probe_geometry.py", "--model", str(llama), f"second={gpt2}"]
    command += ["--text", str(text), "--seq-len", "16", "--num-pairs", "32", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    models = read_models([str(llama), f"second={gpt2}"])
    result = probe(models, Settings(text=text, seq_len=16, num_pairs=32))
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
    result = probe(read_models([*map(str, saved.values())]), Settings(text=text, seq_len=16))
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
    result = probe(read_models([str(saved["gpt2"]), str(short)]), Settings(text=text, seq_len=16))
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
    result = probe(read_models([str(saved["gpt2"]), str(letters)]), Settings(text=text, seq_len=64, tokens=30))
    first, second = result["models"]
    assert first["tokens"] <= 30 < second["tokens"] and first["sequences"] == second["sequences"]
    assert any(line.startswith("letters: ") and "their tokenizers differ" in line for line in result["warnings"])


def test_an_unfinished_write_leaves_nothing_new(saved, text, tmp_path, monkeypatch):
    result = probe(read_models([str(saved["gpt2"])]), Settings(text=text))
    out = tmp_path / "out"
    write(result, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nitp_titan.report.probe.as_json", full)
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
        Settings(text=text, **changes)


BAD_TEXTS = {
    "a.jsonl": ('{"txet": "a"}\n', "line 1: there is no --text-field 'text'. Did you mean 'txet'"),
    "b.jsonl": ('{"text": "a"}\nplain\n', "line 2: no JSON .*plain text needs the ending .txt"),
    "c.jsonl": ('["text"]\n', "line 1: an object with the field 'text'"),
    "d.jsonl": ('{"text": 7}\n', "line 1: 'text' is no text but 7"),
    "e.jsonl": ("", "holds no documents; at least 2"),
    "f.txt": ("one\ndocument\n", "holds 1 document; at least 2 .* blank lines"),
    "g.jsonl": ('{"text": " "}\n\n{"text": "a"}\n', "holds 1 document;"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_bad_text_is_named_with_its_line(name, tmp_path):
    content, message = BAD_TEXTS[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        check(Settings(text=tmp_path / name))


def test_missing_files_are_named_with_the_nearest(saved, text):
    with pytest.raises(UserError, match="texts.jsonl cannot be read: No such file.*Did you mean '.*text.jsonl'"):
        check(Settings(text=text.with_name("texts.jsonl")))
    text.with_suffix(".gz").write_bytes(b"\x1f\x8b\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        check(Settings(text=text.with_suffix(".gz")))
    with pytest.raises(UserError, match="neither a folder nor"):
        read_models([str(saved["gpt2"]) + "x"])
    with pytest.raises(UserError, match="two models are called .*; give names: --model NTP=DIR NITP=DIR"):
        read_models([str(saved["gpt2"])] * 2)
    with pytest.raises(UserError, match="--out .*text.jsonl/a/b cannot be written: .*text.jsonl is no folder"):
        check_writable(text / "a/b")


def test_too_few_tokens_for_two_documents_are_refused(saved, text):
    with pytest.raises(UserError, match="--tokens 4: fewer than 2 documents .* 32 are always enough"):
        probe(read_models([str(saved["gpt2"])]), Settings(text=text, tokens=4, seq_len=16))


def test_a_tokenizer_that_does_not_fit_is_refused(saved, text, tmp_path):
    small = tmp_path / "small"
    LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 300})).save_pretrained(small)
    AutoTokenizer.from_pretrained(saved["gpt2"]).save_pretrained(small)
    with pytest.raises(UserError, match="its tokenizer made token [0-9]+, but its embedding has 300 rows"):
        probe(read_models([str(small)]), Settings(text=text))


def test_the_script_says_a_mistake_in_one_line_and_writes_nothing(saved, text, tmp_path):
    command = [sys.executable, "scripts/probe_geometry.py", "--model", str(saved["gpt2"]), "--text", str(text)]
    command += ["--text-field", "texd", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
