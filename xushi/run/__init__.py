"""A recipe's stages in order, each resumable and skipped when its inputs have not changed."""

from xushi.run.benchmark import benchmark_training, named_shape, sentences
from xushi.run.estimate import describe, plan_sentence
from xushi.run.launch import launch_on_ray, write_slurm_job
from xushi.run.metrics_out import export_metrics
from xushi.run.replay import replay, replay_sentences
from xushi.run.runner import run

__all__ = [
    "benchmark_training",
    "describe",
    "export_metrics",
    "launch_on_ray",
    "named_shape",
    "plan_sentence",
    "replay",
    "replay_sentences",
    "run",
    "sentences",
    "write_slurm_job",
]
