"""A checkpoint as a Hugging Face model: safetensors, configuration, tokenizer and model card.

Shard by shard: at any time the memory holds one shard and the tensor that is being converted.
"""

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory, StateDictSplit
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter
from torchtitan.trainer import Trainer

from nitp_titan.checkpoint.stored import Checkpoint
from nitp_titan.config.trained import overridden
from nitp_titan.data.tokenizer import TextTokenizer
from nitp_titan.errors import UserError
from nitp_titan.export.card import model_card
from nitp_titan.export.dtypes import DTYPES
from nitp_titan.models import hf_config, meta_tensors
from nitp_titan.models.hf_common import require_exact
from nitp_titan.objectives.export import TRAINING_PREFIX, without_training_weights

MAX_SHARD_SIZE = "5GB"

# transformers holds these in float32 in a model of any type; a step of the expert bias is lost in bfloat16.
_FLOAT32 = ("mlp.gate.weight", "e_score_correction_bias")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_OTHER_TOKENIZER_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Exported:
    """A written export."""

    folder: Path
    architecture: str
    parameters: int
    """Of the exported model; tied weights count once."""
    num_bytes: int
    """Of its weights."""
    files: list[str]
    left_out: list[str]
    """Names of the projector's tensors."""


class Export:
    """The plan of an export; everything that can be refused is refused when it is made.

    Args:
        checkpoint: of a run.
        config: the ``NITPTrainer.Config`` of the run.
        dtype: key of `DTYPES`.
        tokenizer: its folder; None takes the recipe's ``hf_assets_path``.
        max_shard_size: in bytes, or as ``"5GB"``.

    Raises:
        UserError: if the model has no exact home in transformers, the checkpoint is not of its run's model, or the
            tokenizer is missing, each with the reason; if ``max_shard_size`` is not a size.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Trainer.Config,
        *,
        dtype: str = "float32",
        tokenizer: Path | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ):
        self.checkpoint, self.dtype, self.config = checkpoint, DTYPES[dtype], config
        spec = self.config.model_spec
        self.settings = hf_config(self.config.model, spec)
        self.architecture = self.settings["architectures"][0]
        self.adapter = without_training_weights(spec.state_dict_adapter)(spec.model, None)
        model = meta_tensors(overridden(self.config, spec))
        checkpoint.check_model(model)
        self.sources = {name: _named(self.adapter, name, tensor) for name, tensor in model.items()}
        """Tensors of the model -> their tensors in transformers, on the meta device."""
        self._check_left_out()
        self.tokenizer_folder = tokenizer or Path(self.config.hf_assets_path)
        self.tokenizer = _tokenizer(self.tokenizer_folder, spec.model.vocab_size)
        self.shards = self._sharded(max_shard_size)

    def notes(self) -> list[str]:
        """Notes for a user of the exported model on properties that its files do not show."""
        tokenizer = self.tokenizer
        if tokenizer.bos_id is None or tokenizer.hf_adds_bos:
            return []
        return [f"training put {tokenizer.bos_token} before every document, which this tokenizer does not do by itself"]

    def _stored(self, name: str, tensor: Tensor) -> Tensor:
        """A contiguous copy in the type of the export; the copies of views share no memory."""
        is_narrowed = tensor.is_floating_point() and not name.endswith(_FLOAT32)
        return tensor.to(self.dtype if is_narrowed else tensor.dtype, copy=True).contiguous()

    def _sharded(self, max_shard_size: int | str) -> StateDictSplit:
        stored = {name: self._stored(name, view) for views in self.sources.values() for name, view in views.items()}
        try:
            return split_state_dict_into_shards_factory(
                stored,
                get_storage_size=lambda tensor: tensor.nbytes,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=max_shard_size,
            )
        except (ValueError, OverflowError):
            raise UserError(
                f"--max-shard-size = '{max_shard_size}', but it must be a size such as 500MB or 5GB."
            ) from None

    def _check_left_out(self) -> None:
        """Only zeros may be left out."""
        orphans = _without_counterpart(self.sources, self.settings)
        moved = [name for name, tensor in self.checkpoint.load(orphans).items() if tensor.count_nonzero()]
        if moved:
            reason = "; load balancing has moved it" if moved[0].endswith("expert_bias_E") else ""
            raise UserError(
                f"this model has no exact home in {self.architecture}: '{moved[0]}' has no counterpart there and is "
                f"not zero{reason} ({len(moved)} such tensors)."
            )

    def write(self, out: Path, log: Callable[[str], None] = lambda line: None) -> Exported:
        """Write the model into a new folder, which appears once it is complete.

        Args:
            out: must not exist yet, be empty, or hold this very export.
            log: takes a line for every shard.

        Raises:
            UserError: if the folder is in the way or its disk too small.
        """
        draft = self._draft(out)
        try:
            self._write_rest(draft)
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                if not self._is_there(draft, out):
                    raise UserError(f"--out {out} exists already; choose another folder or remove it.")
                # A command that was killed at its very end is given again.
                log("this export is there already")
                return self._exported(out)
            for number, (file, tensors) in enumerate(self._filled_shards(), 1):
                save_file(tensors, draft / file, metadata={"format": "pt"})
                # safetensors writes for the owner alone.
                shutil.copymode(draft / "config.json", draft / file)
                log(f"{number} of {len(self.shards.filename_to_tensors)}: {file}, {len(tensors)} tensors")
                # Otherwise it would be held until the next shard is full.
                tensors.clear()
            if out.exists():
                out.rmdir()
            os.replace(draft, out)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--out {out} cannot be written: {error}.") from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return self._exported(out)

    def _is_there(self, draft: Path, out: Path) -> bool:
        """Whether a folder, which appears once it is complete, holds this export; the draft has all but the weights."""
        wanted = {path.name for path in draft.iterdir()} | {*self.shards.filename_to_tensors}
        if not out.is_dir() or {path.name for path in out.iterdir()} != wanted:
            return False
        return all(filecmp.cmp(path, out / path.name, shallow=False) for path in draft.iterdir())

    def _exported(self, out: Path) -> Exported:
        tensors = [tensor for named in self.sources.values() for tensor in named.values()]
        return Exported(
            folder=out,
            architecture=self.architecture,
            parameters=sum(tensor.numel() for tensor in tensors),
            num_bytes=self.shards.metadata["total_size"],
            files=sorted(path.name for path in out.iterdir()),
            left_out=[name for name in self.checkpoint.tensors if name.startswith(TRAINING_PREFIX)],
        )

    def _draft(self, out: Path) -> Path:
        # A name of its own, so that what a killed export left is found and replaced by the next.
        draft = out.parent / f".{out.name}.incomplete"
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}.") from None
        needed, free = self.shards.metadata["total_size"], shutil.disk_usage(draft).free
        if needed > free:
            draft.rmdir()
            raise UserError(f"--out {out}: the model takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.")
        return draft

    def _filled_shards(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """File name and tensors of one shard after the other."""
        file_of, files = self.shards.tensor_to_filename, self.shards.filename_to_tensors
        # More than one is open only around a tensor that is larger than a shard and gets one of its own.
        filling: dict[str, dict[str, Tensor]] = {}
        for name in [name for name, views in self.sources.items() if views]:
            for hf_name, view in _named(self.adapter, name, self.checkpoint.load([name])[name]).items():
                file = file_of[hf_name]
                filling.setdefault(file, {})[hf_name] = self._stored(hf_name, view)
                if len(filling[file]) == len(files[file]):
                    yield file, filling.pop(file)
        assert not filling

    def _write_rest(self, draft: Path) -> None:
        if self.shards.is_sharded:
            index = {"metadata": self.shards.metadata, "weight_map": self.shards.tensor_to_filename}
            _write_json(draft / "model.safetensors.index.json", index)
        tokens = {"bos_token_id": self.tokenizer.bos_id, "eos_token_id": self.tokenizer.eos_id, "pad_token_id": None}
        _write_json(draft / "config.json", self._config_json() | tokens)
        _write_json(draft / "generation_config.json", {**tokens, "do_sample": False})
        for file in (*_TOKENIZER_FILES, *_OTHER_TOKENIZER_FILES):
            if (self.tokenizer_folder / file).is_file():
                shutil.copyfile(self.tokenizer_folder / file, draft / file)
        card = model_card(self.checkpoint, self.config, self.architecture)
        (draft / "README.md").write_text(card, encoding="utf-8")

    def _config_json(self) -> dict[str, Any]:
        return {
            **self.settings,
            # The length that the model was trained on, not one that its rotary embeddings allow.
            "max_position_embeddings": self.config.training.seq_len,
            # transformers reads the older name as well.
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "use_cache": True,
        }


def check_last_save(config, spec: ModelSpec, tensors: dict[str, Tensor]) -> None:
    """Raise UserError unless every tensor of a model can be saved by ``last_save_in_hf`` at the end of its training.

    Args:
        config: a ``Trainer.Config``.
        spec: the model to be trained, its projector included.
        tensors: of the model, as `meta_tensors` gives them.
    """
    if not (config.checkpoint.enable and config.checkpoint.last_save_in_hf):
        return
    try:
        settings = hf_config(config.model, spec)
        adapter = spec.state_dict_adapter(spec.model, None)
        sources = {name: _named(adapter, name, tensor) for name, tensor in tensors.items()}
        orphans = [n for n in _without_counterpart(sources, settings) if not n.startswith(TRAINING_PREFIX)]
        architecture = settings["architectures"][0]
        require_exact(not orphans, architecture, f"'{next(iter(orphans), '')}' has no counterpart there")
    except UserError as error:
        reason = f"[checkpoint] last_save_in_hf = true, but {error}"
        raise UserError(reason, table="checkpoint", key="last_save_in_hf") from None


def _named(adapter: BaseStateDictAdapter, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of a model, or views of it, under the names in transformers; none without a counterpart."""
    try:
        return adapter.to_hf({name: tensor})
    except KeyError:
        return {}


def _without_counterpart(sources: dict[str, dict[str, Tensor]], settings: dict[str, Any]) -> list[str]:
    """Tensors that would be left out, but a tied unembedding, which the embedding stands for."""
    tied = ["lm_head.weight"] if settings["tie_word_embeddings"] else []
    return [name for name, tensors in sources.items() if not tensors and name not in tied]


def _tokenizer(folder: Path, vocab_size: int) -> TextTokenizer:
    """The tokenizer as training sees it; UserError if it is missing or larger than the model's vocabulary."""
    missing = [file for file in _TOKENIZER_FILES if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{folder} holds no {missing[0]}. It is the tokenizer of the recipe (hf_assets_path): start from the "
            "folder that training was started in, or name it with --tokenizer."
        )
    tokenizer = TextTokenizer(tokenizer_path=str(folder))
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"{folder} has {tokenizer.get_vocab_size()} tokens, more than the model's vocabulary of {vocab_size}."
        )
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
