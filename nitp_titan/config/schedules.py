"""Pipeline schedules of torch 2.14, which TorchTitan takes by name. A test compares them with torch's own classes.

Imports no torch.
"""

SCHEDULES = ("1F1B", "Interleaved1F1B", "GPipe", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Keys of torch's ``get_schedule_class``, without its base classes."""

BASE_SCHEDULES = ("PipelineScheduleSingle", "PipelineScheduleMulti", "_PipelineScheduleRuntime")
"""Base classes, for a schedule that a CSV file spells out."""

V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
"""First and last stage are on one rank."""

SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Gradients of inputs and of weights are computed apart."""


def splits_backward(parallelism) -> bool:
    """Whether a ``ParallelismConfig`` computes, or may compute, gradients of inputs and of weights apart."""
    schedule, csv = parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_schedule_csv
    return parallelism.pipeline_parallel_degree > 1 and (schedule in SPLIT_BACKWARD or bool(csv))
