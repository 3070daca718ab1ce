"""Fails when upstream changes what this project reaches for beyond its public interface.

A failure names what changed, who uses it here and what to look at. After the look, put what the message calls "now"
into `TABLE`, and into the table for readers in the Markdown file of the project.
"""

import ast
import hashlib
import importlib
import inspect
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from processes import PROJECT
from torch.distributed.pipelining import schedules
from torchtitan.components.metrics import _get_metrics_rank
from torchtitan.distributed.pipeline_parallel import _get_pp_rank_to_stage_indices_mapping
from torchtitan.trainer import Trainer

from nitp_titan.config.constraints import CONSTRAINTS
from nitp_titan.machine import cpu
from nitp_titan.models import build_model_spec
from nitp_titan.models.settings import ModelConfig


class Part(NamedTuple):
    """Names that serve one purpose here."""

    job: str
    """Of the module that uses them."""

    use: str
    todo: str
    """At the next release."""

    names: dict[str, str]
    """Upstream name -> what it is now: see `state`. ``module: text`` is a text in a module's source."""

    word: str = ""
    """What finds the users of names that are repeated here and not spelled out."""


TABLE = [
    Part(
        job="decoder mixin",
        use="NITPDecoder.forward repeats Decoder.forward with the capture, also for MTPDecoder without MTP layers",
        todo="Carry a change over to NITPDecoder.forward; its third argument is upstream's second.",
        names={
            "torchtitan.models.common.decoder.Decoder.forward": "body 58c16714d1cc",
            "torchtitan.models.deepseek_v3.mtp.MTPDecoder.forward": "body ee76a82c117b",
            "torchtitan.models.common.decoder.Decoder._skip_lm_head": "= False",
        },
        word="MTPDecoder",
    ),
    Part(
        job="variants of model classes",
        use="a subclass of each family's class, whose config fills in the sharding of the NITP module",
        todo="See whether the module is still built last and its sharding still set before the model is built.",
        names={
            "torchtitan.models.common.decoder.Decoder.__init__": "body 56888bdc3a18",
            "torchtitan.models.common.decoder.Decoder.Config.update_from_config": "body 9f0c1f9db177",
        },
    ),
    Part(
        job="variants of model classes, experts on a CPU, MTP of the benchmark",
        use="finds the class that a config builds",
        todo="Find the new way from a config to its class; all three users need the same.",
        names={
            "torchtitan.models.common.decoder.Decoder.Config._owner": "= torchtitan.models.common.decoder.Decoder",
            "torchtitan.models.common.moe.GroupedExperts.Config._owner": (
                "= torchtitan.models.common.moe.GroupedExperts"
            ),
            "torchtitan.config.configurable.Configurable.__init_subclass__": "body e38ac1d5d9ef",
        },
        word="_owner",
    ),
    Part(
        job="chunked loss",
        use="AuxiliaryLoss adds its own loop after upstream's, and repeats its order of FSDP flags around the chunks",
        todo="Compare the flags, the reshard at the end and the bridge to the decoder's backward pass with ours.",
        names={
            "torchtitan.components.loss.ChunkedLossWrapper.__init__": "body 5063c1237aad",
            "torchtitan.components.loss.ChunkedLossWrapper.__call__": "body 51b85d8af304",
            "torchtitan.components.loss.ChunkedLossWrapper._gradient_backprop": "body fe0b44d5b9fd",
            "torchtitan.components.loss._DecoderOutputGradientBackProp": "body 03a5c7ef29f6",
            "torchtitan.components.loss.BaseLoss._maybe_compile": "body b8e28ab520df",
        },
        word="ChunkedLossWrapper",
    ),
    Part(
        job="chunked loss",
        use="keeps the projector gathered over the chunks, and FSDP's order of prefetching over their backward passes",
        todo="Count gathers and reductions of a step (tests/overhead) and see whether the flags still do that.",
        names={
            "torch.distributed.fsdp._fully_shard._fully_shard.FSDPModule.set_is_last_backward": "body 66074358c0ac",
            "torch.distributed.fsdp._fully_shard._fully_shard.FSDPModule.set_requires_gradient_sync": (
                "body 9d7f3b25e9fb"
            ),
            "torch.distributed.fsdp._fully_shard._fully_shard.FSDPModule.set_reshard_after_forward": (
                "body 956f2df0dd43"
            ),
            "torch.distributed.fsdp._fully_shard._fully_shard.FSDPModule.set_reshard_after_backward": (
                "body 0dc284f1d233"
            ),
            "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._root_post_backward_final_callback": (
                "body 91b0972972ec"
            ),
            "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup.post_backward": "body 1d778f789473",
        },
        word="set_is_last_backward",
    ),
    Part(
        job="decoder mixin, chunked loss",
        use="gathers the first states of neighbouring ranks, sums over context-parallel ranks",
        todo="Take the new home of the functional collectives.",
        names={
            "torch.distributed._functional_collectives.all_gather_tensor": "(self, gather_dim, group, tag='')",
            "torch.distributed._functional_collectives.all_reduce": "(self, reduceOp, group, tag='')",
        },
    ),
    Part(
        job="trainer",
        use="NITPTrainer wraps these: micro-batches are counted ahead, bad steps are found, ranks agree on a stop",
        todo="Read each beside our override: what is called how often and when, and what the object holds by then.",
        names={
            "torchtitan.trainer.Trainer.__init__": "body 44f0c9968254",
            "torchtitan.trainer.Trainer.init_distributed": "body df7994a678b0",
            "torchtitan.trainer.Trainer.post_dataloading_process": "body 1a918f42b2aa",
            "torchtitan.trainer.Trainer.forward_backward_step": "body b1f815b9a27e",
            "torchtitan.trainer.Trainer.train_step": "body a31b4caeb25d",
            "torchtitan.trainer.Trainer.train": "body 1007394b8f1a",
            "torchtitan.trainer.Trainer.should_continue_training": "body 0980337f9626",
            "torchtitan.trainer.Trainer.state_dict": "body e31390a53101",
            "torchtitan.trainer.Trainer.load_state_dict": "body ecc20b0980c7",
            "torchtitan.trainer.Trainer.Config.__post_init__": "body b1964e813004",
            "torchtitan.train.main": "body bfea2d44a1fc",
        },
        word="train.main",
    ),
    Part(
        job="trainer, full-size count of the benchmark",
        use="put in place of fwd_bwd_fn for a step whose geometry is measured, outside of the CUDA graph",
        todo="See that a measured step still runs without the graph: a swap that nothing reads measures nothing.",
        names={
            "torchtitan.trainer.Trainer._forward_backward_body": "body 034d9f2223e5",
            "torchtitan.distributed.cudagraph.wrap_with_cuda_graph": "body 75feaf2bcb6d",
        },
        word="fwd_bwd_fn",
    ),
    Part(
        job="pipelining of the variants, checks of a layout",
        use="splits the layers as upstream does, with the projector on the last stage; names the keys in its errors",
        todo="Compare with_nitp_pipelining with pipeline_vlm, and the weights' names in the errors of the split.",
        names={
            "torchtitan.distributed.pipeline_parallel._generate_llm_fqn_per_model_part": (
                "(num_stages, num_layers, input_weight=1, output_weight=1)"
            ),
            "torchtitan.distributed.pipeline_parallel._get_pipeline_metadata": (
                "(parallel_dims, parallelism, model_config)"
            ),
            "torchtitan.distributed.pipeline_parallel.pipeline_vlm": "body 8db302a3bd9b",
            "torchtitan.distributed.pipeline_parallel._build_pipeline_schedule": "body eed48ca78eab",
        },
        word="_get_pipeline_metadata",
    ),
    Part(
        job="checks of a layout",
        use="validation is refused under V-shaped schedules, which assert without a backward pass",
        todo="Validate with ZBVZeroBubble on two ranks; take the refusal out if that works.",
        names={
            "torch.distributed.pipelining.schedules._PipelineSchedule.eval": "body 0dc0e3bd5ed3",
            "torch.distributed.pipelining.schedules._PipelineScheduleRuntime._step_microbatches": "body ef7220d1aa11",
        },
        word="ZBVZeroBubble",
    ),
    Part(
        job="metrics",
        use="wraps MetricsProcessor: our files, TensorBoard in one folder, console; the rank that writes is upstream's",
        todo="Read each beside our override; see that all keys of _RECORD are still logged.",
        names={
            "torchtitan.components.metrics._get_metrics_rank": "body 842417331fe7",
            "torchtitan.components.metrics.MetricsProcessor.__init__": "body e95ed9d3aab1",
            "torchtitan.components.metrics.MetricsProcessor._build_metric_logger": "body 32ed27f71bba",
            "torchtitan.components.metrics.MetricsProcessor.should_log": "body 7a699ad8ece3",
            "torchtitan.components.metrics.MetricsProcessor.log": "body 30cbec6ef693",
            "torchtitan.components.metrics.BaseLogger.log": "(self, metrics, step)",
            "torchtitan.components.metrics.BaseLogger.close": "(self)",
            "torchtitan.components.metrics: WANDB_RUN_NAME": "in the source",
            "torchtitan.components.metrics: WANDB_RUN_GROUP": "in the source",
            "torchtitan.components.metrics: WANDB_RUN_ID": "in the source",
        },
    ),
    Part(
        job="checkpoint manager",
        use="whole checkpoints or none: wraps loading, saving and purging, and replaces the thread that purges",
        todo="Read each beside our override; a purge thread must still be started in __init__ and take a function.",
        names={
            "torchtitan.components.checkpointer.dcp.CheckpointManager.__init__": "body ee2e4ead2d91",
            "torchtitan.components.checkpointer.dcp.CheckpointManager._load": "body 0506577d386a",
            "torchtitan.components.checkpointer.dcp.CheckpointManager._save": "body f23e6eacee03",
            "torchtitan.components.checkpointer.dcp.CheckpointManager._should_save": "body fa74ae562502",
            "torchtitan.components.checkpointer.dcp.CheckpointManager._should_purge": "body 99f5095bf6d1",
            "torchtitan.components.checkpointer.dcp.CheckpointManager._purge_stale_checkpoints": "body 1fbb5622cf81",
            "torchtitan.components.checkpointer.dcp.CheckpointManager._wait_for_saving": "body 3b1e4fd11cb0",
            "torchtitan.components.checkpointer.dcp.CheckpointManager._find_load_step": "body 76c8ff54043e",
            "torchtitan.components.checkpointer.dcp.CheckpointManager._create_checkpoint_id": "(self, step, folder='')",
            "torchtitan.components.checkpointer.dcp.CheckpointManager.dcp_save": "body e6f74d3fc8d1",
            "torchtitan.components.checkpointer.dcp.CheckpointManager.dcp_load": "body 5b7dc61daf87",
            "torchtitan.components.checkpointer.dcp.CheckpointManager.Config.__post_init__": "body e7df3201dd6c",
            "torchtitan.components.checkpointer.base.BaseCheckpointManager.load": "body 547c0f5d1960",
            "torchtitan.components.checkpointer.base.BaseCheckpointManager.save": "body ca3507fd2a20",
            "torchtitan.components.checkpointer.base.BaseCheckpointManager.maybe_wait_for_saving": "body 860bf8486ce0",
            "torchtitan.components.checkpointer.base.purge_thread": "body c9cb1f84f318",
        },
        word="CheckpointManager",
    ),
    Part(
        job="checkpoints read as plain data",
        use="the reader and planner of torch, with metadata and entries that may hold records and tensors only",
        todo="Add new record types to the unpickler's list; see whether torch itself reads without pickle by now.",
        names={
            "torch.distributed.checkpoint._fsspec_filesystem.FsspecReader": "(path, **kwargs)",
            "torch.distributed.checkpoint._nested_dict.set_element": "(root_dict, path, value)",
            "torch.distributed.checkpoint.filesystem._StorageInfo": (
                "(relative_path, offset, length, transform_descriptors=None)"
            ),
            "torch.distributed.checkpoint.metadata.Metadata": (
                "(state_dict_metadata, planner_data=None, storage_data=None, storage_meta=None, version=None)"
            ),
            "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": (
                "= TORCH_CONTIGUOUS_FORMAT, TORCH_CHANNELS_LAST, TORCH_PRESERVE_FORMAT"
            ),
            "torch.serialization._get_layout": "(name)",
            "torch.distributed.checkpoint.filesystem.FileSystemReader._get_metadata_path": "(self, rank=None)",
            "torch.distributed.checkpoint.filesystem.FileSystemReader._slice_file": "body a6a39ea45b0a",
            "torch.distributed.checkpoint.filesystem.FileSystemReader.read_metadata": "body 9ec482c28049",
            "torch.distributed.checkpoint.filesystem.FileSystemReader.read_data": "body f397dc00713f",
            "torch.distributed.checkpoint.default_planner.DefaultLoadPlanner.load_bytes": "body 9340ac227df3",
        },
        word="_StorageInfo",
    ),
    Part(
        job="tokenizer",
        use="a text is only text: no truncation, no padding, special tokens as characters; BOS and EOS are told apart",
        todo="See whether upstream tells BOS from EOS by now, and where the tokenizer is built.",
        names={
            "torchtitan.components.tokenizer.HuggingFaceTokenizer.__init__": "body 4bdd60345bab",
            "torchtitan.components.tokenizer.HuggingFaceTokenizer.encode": "body 51edf033965b",
            "torchtitan.components.tokenizer.HuggingFaceTokenizer._load_tokenizer_from_path": "body 4a44d6c298b4",
            "torchtitan.components.tokenizer.HuggingFaceTokenizer._infer_should_add_bos_eos": "body 4ea9030dccc0",
            "torchtitan.config.configurable.Configurable.Config.build": "body 72588e95975b",
        },
    ),
    Part(
        job="validator",
        use="the same sequences on any number of ranks; ends on all ranks alike, measures geometry",
        todo="See that validate still builds its loader from dl_config and stops at StopIteration and at steps.",
        names={
            "torchtitan.components.validate.Validator.__init__": "body f709ccbe93e3",
            "torchtitan.components.validate.Validator.validate": "body 7c5651f00151",
            "torchtitan.components.validate.Validator.post_dataloading_process": "body 909d3baf5a06",
            "torchtitan.components.validate.Validator.Config.__post_init__": "body bac9447b29fd",
            "torchtitan.components.validate.BaseValidator.should_validate": "body 9d048d8d2352",
        },
    ),
    Part(
        job="data loader",
        use="a state of our own that any number of ranks can load; a worker is started anew after it",
        todo="See whether the loader still makes its iterator when it has none, and takes the same arguments.",
        names={
            "torchtitan.components.dataloader.ParallelAwareDataloader.__init__": "body 835a2eb9df46",
            "torchtitan.components.dataloader.ParallelAwareDataloader.state_dict": "body a7a5e4bb7be0",
            "torchtitan.components.dataloader.ParallelAwareDataloader.load_state_dict": "body aa5966b7d18a",
            "torchdata.stateful_dataloader.stateful_dataloader.StatefulDataLoader.__iter__": "body 173f9960c598",
            "torchdata.stateful_dataloader.stateful_dataloader.StatefulDataLoader._iterator": "set on self",
        },
    ),
    Part(
        job="data sources",
        use="tables without a fingerprint of their own; files of a streamed source by part; no counting of downloads",
        todo="Resume an older run of streamed data: its state is in the checkpoint as `datasets` wrote it.",
        names={
            "datasets.arrow_dataset.Dataset.__init__": (
                "(self, arrow_table, info=None, split=None, indices_table=None, fingerprint=None)"
            ),
            "datasets.iterable_dataset.IterableDataset.shard": "(self, num_shards, index, contiguous=True)",
            "datasets.table.MemoryMappedTable.from_file": "(filename, replays=None)",
            "datasets.config.HF_UPDATE_DOWNLOAD_COUNTS": "a bool",
            "datasets.load: config.HF_UPDATE_DOWNLOAD_COUNTS": "in the source",
        },
        word="datasets",
    ),
    Part(
        job="learning rate",
        use="takes the factor of upstream's linear decay out of the scheduler that its config builds",
        todo="See that schedulers[0].lr_lambdas[0] still falls from 1 to 0 in the decay.",
        names={"torchtitan.components.optimizer.lr_scheduler.LRSchedulersContainer.Config.build": "body 71b3a0947f89"},
    ),
    Part(
        job="bad steps",
        use="norms of all gradients in one call; counts of routed tokens are taken back after a step that is left out",
        todo="See which buffers load balancing fills in a forward pass and empties at the optimizer's step.",
        names={
            "torch._foreach_norm": "a builtin_function_or_method",
            "torchtitan.components.optimizer.optimizer: moe.tokens_per_expert_E.zero_()": "in the source",
            "torchtitan.models.common.moe.MoE.__init__": "body 7de7dcff6a45",
        },
        word="tokens_per_expert_E",
    ),
    Part(
        job="model families: debug flavors",
        use="layers of a debug flavor are built as those of the released models",
        todo="Compare the arguments with those of upstream's own debug flavors.",
        names={
            "torchtitan.models.qwen3._build_qwen3_layers": (
                "(*, n_layers, dim, n_heads, n_kv_heads, head_dim, hidden_dim, fuse_qkv=True, attn_backend, rope)"
            ),
            "torchtitan.models.qwen3._build_qwen3_moe_layers": (
                "(*, n_layers, dim, n_heads, n_kv_heads, head_dim, moe_hidden_dim, num_experts, top_k, fuse_qkv=True,"
                " attn_backend, moe_comm_backend, non_blocking_capacity_factor=None, rope)"
            ),
            "torchtitan.models.deepseek_v3._build_dsv3_layers": "(**kwargs)",
            "torchtitan.models.gpt_oss._build_gptoss_layers": (
                "(*, dim, n_layers, hidden_dim, num_experts, top_k, load_balance_coeff, attn_backend='varlen', "
                "fuse_qkv=True, moe_comm_backend, non_blocking_capacity_factor=None, rope)"
            ),
            "torchtitan.models.gpt_oss._make_gptoss_attn_config": (
                "(*, dim, layer_id, attn_backend='varlen', n_heads=64, n_kv_heads=8, head_dim=64, "
                "sliding_window_size=None, fuse_qkv=True, rope)"
            ),
        },
    ),
    Part(
        job="model families: names in transformers",
        use="upstream's adapters, for ERNIE's names, unquantized GPT-OSS, and without the projector",
        todo="Run tests/export; drop the GPT-OSS names once upstream's own fit its experts.",
        names={
            "torchtitan.protocols.state_dict_adapter.BaseStateDictAdapter.to_hf": "(self, state_dict)",
            "torchtitan.protocols.state_dict_adapter.StateDictAdapter._validate_hf_rope_config": "body 651710f77cf9",
            "torchtitan.models.qwen3.state_dict_adapter.Qwen3StateDictAdapter.__init__": "body 57ec65892ddf",
            "torchtitan.models.qwen3.state_dict_adapter.Qwen3StateDictAdapter.to_hf": "body ea6c1e5be118",
            "torchtitan.models.qwen3.state_dict_adapter.Qwen3StateDictAdapter.from_hf": "body c30c7a3d811f",
            "torchtitan.models.gpt_oss.state_dict_adapter.GptOssStateDictAdapter.__init__": "body bc442c794ef7",
            "torchtitan.models.gpt_oss.state_dict_adapter.GptOssStateDictAdapter.to_hf": "body 916c054654d0",
            "torchtitan.models.gpt_oss.state_dict_adapter.GptOssStateDictAdapter.from_hf": "body e60ac6895341",
        },
    ),
    Part(
        job="overrides of modules",
        use="names the registered override that is nearest to a mistyped one",
        todo="Take the new home of the registry.",
        names={"torchtitan.config.override._REGISTRY": "a dict"},
    ),
    Part(
        job="CPU",
        use="dense attention, float32 experts, uneven all-to-all: what upstream or gloo lacks on a CPU",
        todo="Compare the arguments and the typecheck of the output; look for bfloat16 that is not `.bfloat16()`.",
        names={
            "torchtitan.models.common.attention.FlexAttention.forward": "body 47b8ebc2b4b1",
            "torchtitan.models.common.attention.FlexAttention.compiled_flex_attn": "body ababce1453b7",
            "torchtitan.models.common.moe.GroupedExperts.forward": "body 733829aec1e2",
            "torchtitan.models.gpt_oss.moe.GptOssGroupedExperts.forward": "body 25042bc94818",
            "spmd_types._dist.set_dist": "body 581707be5bab",
        },
        word="GroupedExperts",
    ),
    Part(
        job="structured log of a start",
        use="records are kept until the run folder is this run's, then written by upstream's own handler",
        todo="See that main still begins the log before it builds the trainer, with the same options.",
        names={
            "torchtitan.observability.structured_logger.structured_logging._structured_logger": "a Logger",
            "torchtitan.observability.structured_logger.structured_logging._DEFAULT_HANDLER_FACTORY": (
                "= 'torchtitan.observability.structured_logger.jsonl_handler.register_jsonl_handler'"
            ),
            "torchtitan.observability.structured_logger.structured_logging.init_structured_logger": "body 528e694bce0d",
            "torchtitan.observability.structured_logger.structured_logging: TITAN_STRUCT_LOGGER_HANDLERS": (
                "in the source"
            ),
            "torchtitan.observability.structured_logger.jsonl_handler.register_jsonl_handler": (
                "(*, structured_logger, rank, source, output_dir, **kw)"
            ),
        },
        word="structured_logging",
    ),
    Part(
        job="command line of training",
        use="replaced, so that a wrong flag is one line and None is written `none`",
        todo="See that the registry of tyro's rules is still the manager's and a mistake still exits with 2.",
        names={"torchtitan.config.manager.ConfigManager.parse_args": "body 7947fe36e742"},
    ),
    Part(
        job="names of settings",
        use="asks for the backends of torch.compile",
        todo="Take the new home of the list.",
        names={"torch._dynamo.list_backends": "(exclude_tags=('debug', 'experimental'))"},
    ),
    Part(
        job="restarts and errors under torchrun",
        use="ranks that are started again meet at a store of their own; the error file holds one line",
        todo="Kill a rank under --max-restarts on two nodes and on one; see whether torch makes the store anew.",
        names={
            "torch.distributed.rendezvous._create_c10d_store": "body d825c6a36a1c",
            "torch.distributed.rendezvous._torchelastic_use_agent_store": "body 85387366f36a",
            "torch.distributed.rendezvous: TORCHELASTIC_USE_AGENT_STORE": "in the source",
            "torch.distributed.elastic.agent.server.local_elastic_agent: TORCHELASTIC_RESTART_COUNT": "in the source",
            "torch.distributed.elastic.agent.server.local_elastic_agent: TORCHELASTIC_RUN_ID": "in the source",
            "torch.distributed.elastic.multiprocessing.errors.error_handler: TORCHELASTIC_ERROR_FILE": "in the source",
            "torch.distributed.elastic.multiprocessing.errors.error_handler.ErrorHandler.record_exception": (
                "body 98277e1504e2"
            ),
        },
        word="TORCHELASTIC_USE_AGENT_STORE",
    ),
    Part(
        job="recipes under the stock entry point, scripts",
        use="puts a hook into sys.excepthook: an error is one line; torch wraps it when the process group is made",
        todo="See that the hook that was there is still called, and that nobody else sets one.",
        names={"torch.distributed.distributed_c10d: old_hook(exc_type, exc_value, exc_traceback)": "in the source"},
        word="excepthook",
    ),
    Part(
        job="fake worlds: check of a recipe, full-size count of the benchmark",
        use="a process group of many ranks in one process",
        todo="See how the fake backend is told its number of ranks.",
        names={"torchtitan.distributed.utils: NGPU": "in the source"},
    ),
    Part(
        job="language-model benchmarks",
        use="groups and tags become tasks; whole texts begin with one BOS; cut prompts are noticed by their warning",
        todo="Run tests/evaluation; the harness is pinned, since its tasks are the meaning of the results.",
        names={
            "lm_eval.tasks._index.Kind": "= TASK, PY_TASK, GROUP, TAG, UNKNOWN",
            "lm_eval.tasks._index.Entry": "(name, kind, yaml_path, cfg=None, tags=<factory>)",
            "lm_eval.models.huggingface.HFLM.__init__": "body 98ea8f230f7b",
            "lm_eval.models.huggingface.HFLM.tok_encode": "body 5b92aa79112e",
            "lm_eval.models.huggingface.HFLM.loglikelihood_rolling": "body 08e6042063df",
            "lm_eval.models.huggingface.HFLM._loglikelihood_tokens": "body a85a73855a40",
            "lm_eval.models.huggingface: truncating to last": "in the source",
            "lm_eval.models.huggingface: Truncating {": "in the source",
            "lm_eval.evaluator_utils: n-shot": "in the source",
        },
        word="lm_eval",
    ),
    Part(
        job="embedding benchmarks",
        use="Encoder implements MTEB's protocol for a frozen model",
        todo="Compare the arguments; the pin is wide.",
        names={
            "mteb.models.model_meta.ModelMeta.create_empty": "(overwrites=None)",
            "mteb.models.models_protocols.EncoderProtocol.encode": (
                "(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs)"
            ),
            "mteb.models.models_protocols.EncoderProtocol.similarity": "(self, embeddings1, embeddings2)",
            "mteb.models.models_protocols.EncoderProtocol.similarity_pairwise": "(self, embeddings1, embeddings2)",
            "mteb.models.models_protocols.EncoderProtocol.mteb_model_meta": "a property",
        },
        word="EncoderProtocol",
    ),
    Part(
        job="benchmark: operators of a step",
        use="counts FLOPs, memory and communication by operator, on fake tensors too",
        todo="Run tests/overhead.",
        names={
            "torch._guards.active_fake_mode": "()",
            "torch._subclasses.FakeTensorMode": (
                "(*, allow_fallback_kernels=True, allow_non_fake_inputs=False, shape_env=None, static_shapes=None, "
                "export=False)"
            ),
            "torch.utils._python_dispatch.TorchDispatchMode": "(_dispatch_key=None)",
            "torch.utils._pytree.tree_leaves": "(tree, is_leaf=None)",
            "torch.distributed._tools.fake_collectives.collective_ops": "a set",
            "torch.distributed._tools.fake_collectives.sync_ops": "a set",
            "torch.distributed._tools.fake_collectives.CollectiveOp.get_process_group": "(func, args)",
            "torch._ops.OpOverload._overloadpacket": "set on self",
            "torch._ops.OpOverload._opname": "a cached_property",
            "torch._ops.OpOverloadPacket": "(qualified_op_name, op_name, op, overload_names)",
            "torch.ops.aten._grouped_mm": "= self, mat2, offs, bias, out_dtype",
            "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": (
                "= query, key, value, dropout_p, is_causal, attn_mask, scale"
            ),
            "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": (
                "= grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask, scale"
            ),
            "torch.ops._c10d_functional.wait_tensor": "= tensor",
            "torchtitan.distributed.activation_checkpoint.SelectiveAC.get_save_ops": "body f6e2b2e298ee",
        },
    ),
    Part(
        job="benchmark: MTP on any decoder, full-size count",
        use="repeats what DeepSeek-V3's model, config and sharding do for MTP layers, and how tied weights are tied",
        todo="Carry the change over; use upstream's own once it serves other families.",
        names={
            "torchtitan.models.deepseek_v3.mtp.MTPDecoder.Config.update_from_config": "body 192df7fab981",
            "torchtitan.models.deepseek_v3.sharding.set_deepseek_v3_sharding_config": "body 9691c569edc9",
            "torchtitan.models.common.decoder.Decoder.init_states": "body eb8c3bba6add",
        },
        word="MTPDecoder",
    ),
]

ROWS = {name: part for part in TABLE for name in part.names}

# What upstream says now, in the words of the table.


def resolve(name: str) -> Any:
    """The object of a dotted name; ImportError or AttributeError if there is none."""
    first, *rest = name.split(".")
    found, path = importlib.import_module(first), first
    for part in rest:
        path = f"{path}.{part}"
        if isinstance(found, ModuleType):
            # A function of a package may hide its module of the same name.
            try:
                found = importlib.import_module(path)
                continue
            except ModuleNotFoundError:
                pass
        if isinstance(found, type):
            # Without its descriptors: a property stays one.
            static = inspect.getattr_static(found, part)
            found = static if isinstance(static, property | cached_property) else getattr(found, part)
        else:
            found = getattr(found, part)
    return found


def state(name: str, kept: str) -> str:
    """What a row of the table says of a name now, in the way of ``kept``.

    =================  =================================================================
    ``body <hash>``    definition of a function or class, without docstrings
    ``(a, b=1)``       signature, without annotations
    ``= <value>``      value, members of an enum, arguments of an operator
    ``a <type>``       type
    ``set on self``    the source of the class sets it
    ``in the source``  the source of the module holds the text
    =================  =================================================================
    """
    module, _, text = name.partition(": ")
    try:
        if text:
            return "in the source" if text in inspect.getsource(importlib.import_module(module)) else "gone"
        if kept == "set on self":
            owner, _, attribute = name.rpartition(".")
            return kept if attribute in set_on_self(resolve(owner)) else "gone"
        found = resolve(name)
    except (ImportError, AttributeError):
        return "gone"
    if kept.startswith("body"):
        return f"body {digest(inspect.getsource(found))}"
    if kept.startswith("("):
        return signature(found)
    return value(found) if kept.startswith("=") else f"a {type(found).__name__}"


def digest(source: str) -> str:
    """Hash of a definition, which comments, docstrings and layout do not change."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def signature(function: Callable) -> str:
    found = inspect.signature(function)
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in found.parameters.values()]
    return str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def value(found: Any) -> str:
    if isinstance(found, torch._ops.OpOverloadPacket):
        return f"= {', '.join(argument.name for argument in found.default._schema.arguments)}"
    if isinstance(found, type):
        members = getattr(found, "__members__", None)
        return f"= {', '.join(members)}" if members else f"= {found.__module__}.{found.__qualname__}"
    return f"= {found!r}"


@cache
def set_on_self(cls: type) -> frozenset[str]:
    """Private attributes that the source of a class sets on ``self``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return frozenset()
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and _is_self(node)
        and _private(node.attr)
    )


# What the source of this project reaches for.

_HERE = sorted({*PROJECT.glob("nitp_titan/**/*.py"), *PROJECT.glob("scripts/**/*.py")})
_NO_UPSTREAM = {
    "nitp_titan",
    "scripts",
    *sys.stdlib_module_names,
    *(path.stem for path in PROJECT.glob("scripts/**/*")),
}
# Classes whose methods are there to be overridden.
_OPEN = ("torch.nn.", "torch.autograd.", "torch.overrides.", "torch.utils.")
_VARIABLE = re.compile(r"(TORCHELASTIC|TORCH|TITAN|WANDB_RUN)_[A-Z_]+|NGPU")


class File:
    """One file of this project: its syntax tree and what its names stand for."""

    def __init__(self, path: Path):
        self.path, self.text = str(path.relative_to(PROJECT)), path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.module = ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")
        self.names: dict[str, str] = {}
        self.imports: list[tuple[str, int]] = []
        self.classes: dict[str, ast.ClassDef] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    root = alias.name.partition(".")[0]
                    self.names[alias.asname or root] = alias.name if alias.asname else root
                    self.imports.append((alias.name, node.lineno))
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    self.imports.append((f"{node.module}.{alias.name}", node.lineno))
        for node in ast.walk(self.tree):
            # Of a function that makes a class, ``base: type[Decoder]``.
            if isinstance(node, ast.arg) and ast.unparse(node.annotation or node).startswith("type["):
                self.names[node.arg] = self.dotted(node.annotation.slice) or ""
        self._find_classes(self.tree, self.module)

    def _find_classes(self, node: ast.AST, place: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = f"{place}.{child.name}" if isinstance(child, ast.ClassDef) else place
            if isinstance(child, ast.ClassDef):
                self.classes[name] = child
                if place == self.module:
                    self.names.setdefault(child.name, name)
            self._find_classes(child, name)

    def dotted(self, node: ast.AST) -> str | None:
        """Full name of an expression that begins with a name of this file; None of any other."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute) and (before := self.dotted(node.value)):
            return f"{before}.{node.attr}"
        return None


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _upstream(name: str) -> bool:
    return name.partition(".")[0] not in _NO_UPSTREAM


@cache
def files() -> list[File]:
    return [File(path) for path in _HERE]


@cache
def uses() -> dict[str, list[str]]:
    """What is reached for -> where. ``.name`` is an attribute of an unknown object, ``: TEXT`` a variable's name."""
    found: dict[str, list[str]] = defaultdict(list)
    own = {name for file in files() for name in _own_names(file.tree)}
    for file in files():
        for name, line in _names_used(file, own):
            found[name].append(f"{file.path}:{line}")
        for name, place in _overrides(file):
            found[name].append(place)
    return dict(found)


def _own_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node):
            yield node.attr


def _names_used(file: File, own: set[str]) -> Iterator[tuple[str, int]]:
    for name, line in file.imports:
        if _upstream(name) and any(map(_private, name.split("."))):
            yield name, line
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute):
            name = file.dotted(node)
            # Whatever is replaced upstream counts as private.
            if name and _upstream(name) and (_private(node.attr) or isinstance(node.ctx, ast.Store)):
                yield name, node.lineno
            elif not name and _private(node.attr) and node.attr not in own:
                yield f".{node.attr}", node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and _private(name) and name not in own:
                yield f".{name}", node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _VARIABLE.fullmatch(node.value):
            yield f": {node.value}", node.lineno
        elif isinstance(node, ast.keyword) and node.arg and _VARIABLE.fullmatch(node.arg):
            yield f": {node.arg}", node.value.lineno


def _overrides(file: File) -> Iterator[tuple[str, str]]:
    """Upstream's methods that classes of a file override, and its private attributes that they use as their own."""
    for name in file.classes:
        ours, theirs = _family(name)
        for path, definition in ours if theirs else []:
            names = {node.name: node.lineno for node in definition.body if isinstance(node, ast.FunctionDef)}
            for node in ast.walk(definition):
                if isinstance(node, ast.Attribute) and _private(node.attr) and _is_self(node):
                    names.setdefault(node.attr, node.lineno)
            for attribute, line in names.items():
                for cls in theirs:
                    if attribute in vars(cls) or attribute in set_on_self(cls):
                        full = f"{cls.__module__}.{cls.__qualname__}.{attribute}"
                        if not full.startswith(_OPEN):
                            yield full, f"{path}:{line}"
                        break


def _family(name: str) -> tuple[list[tuple[str, ast.ClassDef]], list[type]]:
    """One of our classes and those of ours that it extends, each with its file, and upstream's classes behind them."""
    file = next((file for file in files() if name in file.classes), None)
    if file is None:
        found = resolve(name) if name and _upstream(name) else object
        classes = found.__mro__ if isinstance(found, type) else ()
        return [], [cls for cls in classes if _upstream(cls.__module__)]
    ours, theirs = [(file.path, file.classes[name])], []
    for base in file.classes[name].bases:
        more, classes = _family(file.dotted(base) or "")
        ours, theirs = ours + more, theirs + classes
    return ours, theirs


def covers(row: str, use: str) -> bool:
    return row == use or row.startswith(f"{use}.") or (use[0] in ".:" and row.endswith(use))


def users(row: str) -> list[str]:
    """Where this project uses a row of the table."""
    found = {place for use, places in uses().items() if covers(row, use) for place in places}
    word = ROWS[row].word or re.escape(row.rpartition(".")[2])
    return sorted(found) or [file.path for file in files() if re.search(rf"\b({word})\b", file.text)]


@pytest.mark.parametrize("name", ROWS)
def test_what_is_private_upstream_is_what_it_was(name):
    part = ROWS[name]
    places, now = users(name), state(name, part.names[name])
    if not places:
        pytest.fail(f"{name}: nothing here uses it any more. Take it out of the table.", pytrace=False)
    if now != part.names[name]:
        where = f"Used here for the {part.job} ({', '.join(places)}): {part.use}. {part.todo}"
        pytest.fail(f"{name} has changed upstream.\nwas: {part.names[name]}\nnow: {now}\n{where}", pytrace=False)


def test_what_is_reached_for_is_in_the_table():
    lost = {use: places for use, places in uses().items() if not any(covers(row, use) for row in ROWS)}
    if lost:
        lines = "\n".join(f"{use} ({', '.join(places)})" for use, places in sorted(lost.items()))
        pytest.fail(f"Private names of upstream that TABLE does not guard:\n{lines}", pytrace=False)


def test_readers_find_the_table_in_contributing():
    text = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [_row(part) for part in TABLE]
    if missing := [row for row in rows if row not in text]:
        pytest.fail("\n".join(["CONTRIBUTING.md lacks these rows:", *missing]), pytrace=False)
    assert text.count("<br>") == sum(row.count("<br>") for row in rows), "CONTRIBUTING.md has names that are not here"


def _row(part: Part) -> str:
    names = "<br>".join(f"`{name}`" for name in part.names)
    return f"| {names} | {part.job} | {part.use[0].upper()}{part.use[1:]}. | {part.todo} |\n"


# Pipeline schedules.


class Schedule(NamedTuple):
    splits: bool
    """Gradients of inputs and of weights are computed apart."""

    v_shaped: bool
    """The first rank holds the first and the last stage."""


@cache
def known_schedules() -> dict[str, Schedule | None]:
    """What torch's schedules do with two ranks, by name; None for a base class, which has no order of its own."""
    with pytest.raises(ValueError, match="valid options") as refused:
        schedules.get_schedule_class("nonsense")
    names = ast.literal_eval(str(refused.value).partition("options are ")[2])
    return {name: _schedule(schedules.get_schedule_class(name)) for name in names}


def _schedule(cls: type) -> Schedule | None:
    if inspect.isabstract(cls):
        return None
    if issubclass(cls, schedules.PipelineScheduleSingle):
        made = cls(_stage(0, num_stages=2), 4)
        order, ranks = made._get_pipeline_order(), {0: 0, 1: 1}
    else:
        made = cls([_stage(0, num_stages=4), _stage(2, num_stages=4)], 4)
        order, ranks = made.pipeline_order, made.stage_index_to_group_rank
    actions = [one for actions in order.values() for action in actions if action is not None for one in _parts(action)]
    if not actions:
        return None
    splits = any(action.computation_type == schedules.BACKWARD_WEIGHT for action in actions)
    return Schedule(splits, v_shaped=ranks[0] == ranks[max(ranks)])


def _stage(index: int, num_stages: int) -> SimpleNamespace:
    return SimpleNamespace(
        stage_index=index,
        num_stages=num_stages,
        group_rank=0,
        group_size=2,
        is_first=index == 0,
        is_last=False,
        has_backward=True,
        submod=None,
    )


def _parts(action) -> list:
    return [part for sub in action.sub_actions for part in _parts(sub)] if action.sub_actions else [action]


def test_lists_of_schedules_are_those_of_torch():
    known = known_schedules()
    groups = {
        "all schedules": {name for name, schedule in known.items() if schedule},
        "those that split the backward pass": {
            name for name, schedule in known.items() if schedule and schedule.splits
        },
        "V-shaped ones": {name for name, schedule in known.items() if schedule and schedule.v_shaped},
        # TorchTitan takes torch's runtime too, for a schedule from a CSV file.
        "base classes": {name for name, schedule in known.items() if not schedule} | {"_PipelineScheduleRuntime"},
    }
    lists = {
        f"{file.path}:{node.lineno}": names
        for file in files()
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Tuple | ast.List | ast.Set) and (names := _texts(node)) & {*known}
    }
    wrong = [f"{place} lists {sorted(names)}" for place, names in lists.items() if names not in groups.values()]
    wrong += [f"nothing here lists the {group}" for group, names in groups.items() if names not in lists.values()]
    if wrong:
        of_torch = "; ".join(f"{group}: {sorted(names)}" for group, names in groups.items())
        where = (
            "A split backward pass needs reshard_lm_head = False, and validation is refused under V-shaped schedules"
        )
        pytest.fail(f"{'; '.join(wrong)}.\nIn torch they are {of_torch}.\n{where}.", pytrace=False)


def _texts(node: ast.Tuple | ast.List | ast.Set) -> set[str]:
    return {one.value for one in node.elts if isinstance(one, ast.Constant) and isinstance(one.value, str)}


def test_every_schedule_of_torch_may_be_named():
    allowed = CONSTRAINTS["parallelism"]["pipeline_parallel_schedule"]
    assert [name for name in known_schedules() if not allowed.holds(name)] == []


def test_torchtitan_places_the_stages_as_torch_does():
    several = {name: schedule for name, schedule in known_schedules().items() if schedule}
    for name, schedule in several.items():
        if not issubclass(schedules.get_schedule_class(name), schedules.PipelineScheduleSingle):
            placed = _get_pp_rank_to_stage_indices_mapping(0, 2, name, 4)
            assert (3 in placed) == schedule.v_shaped, f"{name}: TorchTitan gives rank 0 the stages {placed}"


def test_a_schedule_has_another_name_for_the_metrics_just_where_torchtitan_does_not_know_it():
    """The rank that writes has the last stage. Once upstream knows DualPipeV, the name that we give it should go."""
    ranks = SimpleNamespace(pp_enabled=True, world_size=4, pp=2)
    v_shaped = {name for name, schedule in known_schedules().items() if schedule and schedule.v_shaped}
    unknown = {name for name in v_shaped if _get_metrics_rank(parallel_dims=ranks, pp_schedule=name) != 0}
    renamed = {
        text
        for file in files()
        if any(name.endswith("._get_metrics_rank") for name, _ in file.imports)
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Compare)
        for text in _texts(ast.Tuple([node.left, *node.comparators])) & v_shaped
    }
    assert renamed == unknown


# Other behaviour.


def test_a_step_runs_whatever_fwd_bwd_fn_is():
    """A measured step puts the body there, which must take the same arguments."""
    assert hasattr(Trainer, "_forward_backward_body"), "a step has another body; the trainer's swap does nothing"
    trainer = object.__new__(Trainer)
    trainer.parallel_dims, trainer.model_parts = SimpleNamespace(pp_enabled=False), [None]
    trainer.post_dataloading_process = lambda inputs, labels: (inputs, labels, {})
    trainer.fwd_bwd_fn = lambda *arguments: inspect.signature(trainer._forward_backward_body).bind(*arguments).args
    inputs, labels = {}, torch.zeros(1)
    given = trainer.forward_backward_step(input_dict=inputs, labels=labels, global_valid_tokens=None)
    assert given[0] is inputs and given[1] is labels and given[2:] == (None, {})
    assert "self.fwd_bwd_fn = self._forward_backward_body" in inspect.getsource(Trainer.__init__)


def test_norms_in_one_call_are_float32():
    norms = torch._foreach_norm([torch.tensor([3.0, 4.0], dtype=torch.bfloat16), torch.zeros(1)], 2, torch.float32)
    assert torch.stack(norms).tolist() == [5, 0] and {norm.dtype for norm in norms} == {torch.float32}


def test_load_balancing_counts_in_the_buffer_that_bad_steps_empty():
    spec = build_model_spec(ModelConfig(family="qwen3", flavor="debug_moe"))
    with torch.device("meta"):
        model = spec.model.build()
    counts = [name for name, _ in model.named_buffers() if name.endswith("tokens_per_expert_E")]
    assert len(counts) == sum(getattr(layer, "moe", None) is not None for layer in model.layers.values()) > 0


def test_the_device_is_read_only_where_it_can_be_rebound():
    """`cpu.install` rebinds two names after the imports: neither another name nor a default may hold the old device."""
    names, held = {"device_type", "device_module"}, set()
    for path, tree in _of_torchtitan("device_(type|module)"):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                held |= {path for one in node.names if one.name in names and one.asname}
            elif isinstance(node, ast.FunctionDef):
                # What is left are decorators, defaults and the module itself.
                node.body = []
        held |= {path for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in names}
    # Where they are made, and the default device of the memory's monitor, which the CPU's module does not look at.
    assert held == {"tools/utils.py", "components/metrics.py"}


def test_a_cpu_answers_whatever_torchtitan_asks_of_the_device():
    asked = {
        node.attr
        for _, tree in _of_torchtitan("device_module")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("device_module", "utils.device_module")
    }
    # Memory snapshots of a profile are a GPU's.
    assert {name for name in asked if not hasattr(cpu._CPUModule(), name)} == {"memory"}


def _of_torchtitan(text: str) -> Iterator[tuple[str, ast.Module]]:
    """Files of TorchTitan that hold a text, without its experiments."""
    root = Path(inspect.getfile(Trainer)).parent
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if place.parts[0] != "experiments" and re.search(text, source := path.read_text(encoding="utf-8")):
            yield str(place), ast.parse(source)


def test_torchtitan_sets_no_excepthook():
    assert [path for path, _ in _of_torchtitan("excepthook")] == []


def test_modules_of_torchtitan_that_are_named_in_texts_exist():
    named = {
        node.value: file.path
        for file in files()
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Constant) and re.fullmatch(r"torchtitan(\.\w+)+", str(node.value))
    }
    assert len(named) > 5 and {name: path for name, path in named.items() if find_spec(name) is None} == {}


def test_the_state_of_streamed_data_is_written_as_in_older_checkpoints():
    """A checkpoint holds it. When this fails, raise the pin of `datasets` only with a way to read the old one."""
    rows = Dataset.from_dict({"text": ["a", "b", "c", "d"]}).to_iterable_dataset(num_shards=2)
    next(iter(rows))
    place = {"shard_idx": 0, "shard_example_idx": 2, "type": "ArrowExamplesIterable"}
    assert rows.state_dict() == {
        "epoch": 0,
        "examples_iterable": {
            "examples_iterable": place,
            "previous_state": {**place, "shard_example_idx": 0},
            "batch_idx": 1,
            "num_chunks_since_previous_state": 1,
            "cropped_chunk_length": 0,
            "type": "RebatchedArrowExamplesIterable",
        },
    }
