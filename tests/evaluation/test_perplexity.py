"""Perplexity of a text, packed as in training."""

import json
import math
from pathlib import Path

import pytest
import torch
from hf_models import load, MAX_POSITIONS, nats_by_document, save_llama, write_text
from torch.testing import assert_close

from nitp_titan.errors import UserError
from nitp_titan.evaluation import perplexity
from nitp_titan.evaluation.pretrained import read_models
from nitp_titan.evaluation.scores import difference

TEXTS = ["def one():\n    return 1\n" * 8, "Grüße, 世界 🙂!", "", "import os\nimport sys\n" * 20, "x"]
SEQ_LEN = 48


@pytest.fixture(scope="module")
def folder(assets, tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "llama", assets, seed=0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", TEXTS)


@pytest.fixture(scope="module")
def without_bos(folder, tmp_path_factory):
    """The same model with a tokenizer that has no BOS, such as Qwen2's."""
    copy = tmp_path_factory.mktemp("models") / "no_bos"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((copy / "tokenizer.json").read_text()) | {"post_processor": None}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"eos_token": "<|eos|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="module")
def scores(folder, text):
    return perplexity.measure(text, "text", SEQ_LEN, load(folder))


def _documents(loaded, *, bos: bool) -> list[list[int]]:
    encode = loaded.tokenizer.backend_tokenizer.encode
    return [[*([0] if bos else []), *encode(text, add_special_tokens=False).ids, 1] for text in TEXTS]


def test_cross_entropy_is_that_of_documents_forwarded_alone(folder, scores):
    loaded = load(folder)
    documents = _documents(loaded, bos=True)
    # Some documents are cut by a sequence's end, and the last sequence is not full.
    assert any(len(tokens) > SEQ_LEN for tokens in documents)
    count = sum(len(tokens) - 1 for tokens in documents)
    assert count % SEQ_LEN
    nats = sum(nats_by_document(loaded.model, documents, SEQ_LEN))
    assert_close(scores["cross_entropy"].value, nats / count, rtol=1e-5, atol=0)
    assert_close(scores["perplexity"].value, math.exp(nats / count), rtol=1e-4, atol=0)
    size = sum(len(text.encode()) for text in TEXTS)
    assert_close(scores["bits_per_byte"].value, nats / math.log(2) / size, rtol=1e-5, atol=0)


def test_standard_errors_are_over_documents(folder, scores):
    loaded = load(folder)
    documents = _documents(loaded, bos=True)
    nats = torch.tensor(nats_by_document(loaded.model, documents, SEQ_LEN))
    tokens = torch.tensor([len(document) - 1.0 for document in documents])
    rest = nats - nats.sum() / tokens.sum() * tokens
    expected = (rest.std() * math.sqrt(len(nats)) / tokens.sum()).item()
    assert_close(scores["cross_entropy"].stderr, expected, rtol=1e-4, atol=0)
    assert scores["cross_entropy"].size == len(TEXTS)


def test_batches_do_not_change_the_figures(folder, text, scores):
    alone = perplexity.measure(text, "text", SEQ_LEN, load(folder, batch_size=1))
    assert_close(alone["cross_entropy"].value, scores["cross_entropy"].value, rtol=1e-6, atol=0)


def test_it_is_the_packed_forward_with_restarting_positions(folder):
    model = load(folder).model
    tokens_BL = torch.randint(2, 4096, (2, 16), generator=torch.Generator().manual_seed(0))
    positions_BL = torch.tensor([[*range(5), *range(11)], [*range(16)]])
    labels_BL = torch.randint(4096, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits_BLV = model(input_ids=tokens_BL, position_ids=positions_BL, use_cache=False).logits
        nats = perplexity._nats(model, {"input": tokens_BL, "positions": positions_BL}, labels_BL)
    expected = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), reduction="none")
    assert_close(nats.float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "ernie4_5_moe", "gpt_oss"])
def test_documents_are_apart_in_every_architecture(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    experts = {
        "qwen3": {},
        "ernie4_5_moe": dict(moe_intermediate_size=16, moe_num_experts=4, moe_k=2),
        # Its sliding layers see the last three tokens.
        "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=3),
    }[family]
    torch.manual_seed(0)
    tokens = dict(vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    config = AutoConfig.for_model(
        family, **sizes, **experts, **tokens, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens_BL, labels_BL = torch.randint(64, (2, 1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        nats = perplexity._nats(
            model, {"input": tokens_BL, "positions": torch.tensor([[*range(7), *range(5)]])}, labels_BL
        )
        alone = torch.cat([model(input_ids=part).logits[0] for part in tokens_BL.split([7, 5], dim=1)])
    expected = torch.nn.functional.cross_entropy(alone, labels_BL[0], reduction="none")
    assert_close(nats.float(), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_a_group_fit_the_batch():
    lengths = [5, 100, 7, 6, 30, 1, 40]
    groups = list(perplexity._groups(lengths, budget=64))
    assert sorted(index for group in groups for index in group) == list(range(7))
    assert groups[0] == [1] and all(max(lengths[i] for i in group) * len(group) <= 64 for group in groups[1:])


def test_without_bos_the_first_token_is_not_paid_for(without_bos, text):
    loaded = load(without_bos)
    documents = _documents(loaded, bos=False)
    nats = sum(nats_by_document(loaded.model, documents, SEQ_LEN))
    found = perplexity.measure(text, "text", SEQ_LEN, loaded)
    assert_close(found["cross_entropy"].value, nats / sum(len(tokens) - 1 for tokens in documents), rtol=1e-5, atol=0)
    # The bytes of the first tokens: "def", "G", nothing, "import", "x".
    first = [loaded.tokenizer.decode(tokens[0]) for tokens in documents if len(tokens) > 1]
    assert first == ["def", "G", "import", "x"]
    size = sum(len(text.encode()) for text in TEXTS) - len("".join(first))
    assert_close(found["bits_per_byte"].value, nats / math.log(2) / size, rtol=1e-5, atol=0)


def test_a_first_token_can_be_a_part_of_a_character(without_bos):
    documents = perplexity.RecordingTokenizer(str(without_bos))
    tokens = documents.encode("🙂 x", add_bos=True, add_eos=True)
    (first,) = [len(documents.id_to_token(token)) for token in tokens[:1]]
    assert first < len("🙂".encode())
    assert documents.num_bytes == [len("🙂 x".encode()) - first]


def test_nats_of_different_tokens_have_no_difference(without_bos, text, scores):
    other = perplexity.measure(text, "text", SEQ_LEN, load(without_bos))
    assert difference(other["cross_entropy"], scores["cross_entropy"]) is None
    assert difference(other["perplexity"], scores["perplexity"]) is None
    found = difference(other["bits_per_byte"], scores["bits_per_byte"])
    assert found.pairs and found.value == other["bits_per_byte"].value - scores["bits_per_byte"].value


def test_what_is_left_over_at_the_end_of_a_text_is_measured_too(folder, text):
    tokenizer = perplexity.RecordingTokenizer(str(folder))
    loader = perplexity.TextDataLoader(
        perplexity._source(text, "text"),
        dp_world_size=1,
        dp_rank=0,
        tokenizer=tokenizer,
        seq_len=SEQ_LEN,
        local_batch_size=1,
    )
    tokens, labels, positions = (
        torch.cat(parts).flatten()
        for parts in zip(*((inputs["input"], labels, inputs["positions"]) for inputs, labels in loader))
    )
    everything = [token for tokens in _documents(load(folder), bos=True) for token in tokens[:-1]]
    end = len(everything)
    assert tokens[:end].tolist() == everything and labels[end - 1] == 1 and end < len(tokens) < end + SEQ_LEN
    # The last sequence begins within a document, whose positions begin again; "x" is the last: BOS and one token.
    assert positions[-SEQ_LEN] == 0 and positions[end - 2 : end + 1].tolist() == [0, 1, 0]
    assert (labels[:end] != -100).all() and (labels[end:] == -100).all()


def test_the_sequence_is_as_long_as_every_model_allows(folder, text, tmp_path):
    models = read_models([str(folder)])
    plan = perplexity.plan(text, "text", None, models)
    assert plan.tasks[0].settings["seq_len"] == MAX_POSITIONS
    assert f"sequences of {MAX_POSITIONS} tokens (the smallest max_position_embeddings" in plan.notes[0]
    assert perplexity.plan(text, "text", 64, models).tasks[0].settings["seq_len"] == 64
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 131072}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    assert perplexity.plan(text, "text", None, read_models([str(tmp_path)])).tasks[0].settings["seq_len"] == 8192
    # Another name of it, and none at all: the default of the class.
    for config, longest in (({"model_type": "gpt2", "n_positions": 64}, 64), ({"model_type": "llama"}, 2048)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        plan = perplexity.plan(text, "text", None, read_models([str(tmp_path)]))
        assert plan.tasks[0].settings["seq_len"] == longest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seq_len=1), "--seq-len 1: at least 2."),
        (dict(seq_len=513), "--seq-len 513: at most 512, the max_position_embeddings of llama."),
        (dict(field="txt"), r"--text-field 'txt': .*, line 1: there is no field 'txt'. Did you mean 'text'"),
        (dict(text="missing.jsonl"), "--text missing.jsonl is not a file."),
        (dict(text="assets"), "--text assets is not a file."),
        (dict(text="README.md"), r"--text: README.md, line 1: no JSON object but '# "),
    ],
)
def test_mistakes_are_named(changes, message, folder, text):
    settings = {"text": text, "field": "text", "seq_len": None} | changes
    models = read_models([str(folder)])
    with pytest.raises(UserError, match=message):
        perplexity.plan(Path(settings["text"]), settings["field"], settings["seq_len"], models)


def test_a_later_document_without_the_field_is_named_before_a_model_is_loaded(folder, tmp_path):
    path = write_text(tmp_path / "text.jsonl", ["a"])
    path.write_text(path.read_text() + json.dumps({"text": None}) + "\n")
    with pytest.raises(UserError, match="--text: .*text.jsonl, line 2: 'text' is null and not a text."):
        perplexity.plan(path, "text", SEQ_LEN, read_models([str(folder)]))


def test_a_text_without_text_is_refused(folder, tmp_path):
    loaded = load(folder)
    with pytest.raises(UserError, match="holds no text"):
        perplexity.measure(write_text(tmp_path / "empty.jsonl", [""]), "text", SEQ_LEN, loaded)
