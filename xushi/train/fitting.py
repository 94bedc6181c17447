"""Which layouts fit a model and a number of processes, and how layers and experts are cut.

Not here: the processes themselves (layout, joining).
"""

from collections.abc import Iterable

from xushi.base.errors import BadInput
from xushi.model import ModelConfig
from xushi.train.config import LayoutConfig


def stage_layers(model: ModelConfig, stages: int) -> list[tuple[int, int]]:
    """(first, end) of each pipeline stage's layers of the trunk.

    As even as possible, where the head and each MTP layer count as one layer of the last stage;
    every stage has at least one layer.
    """
    depth = model.num_hidden_layers
    behind = model.num_nextn_predict_layers + 1
    ends = []
    for stage in range(1, stages + 1):
        even = round((depth + behind) * stage / stages)
        ends.append(min(max(even, stage), depth - (stages - stage)))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def needs_embedding_twice(model: ModelConfig) -> bool:
    """Whether the last stage of a pipeline needs the embedding too, for MTP layers or as the
    head.
    """
    return model.num_nextn_predict_layers > 0 or model.tie_word_embeddings


def expert_axis(experts: int, replica: int) -> int:
    """The axis along which replicas shard stacked experts.

    0, whole experts, where their number divides; else 1, the rows of each.
    """
    return 0 if experts % replica == 0 else 1


def check_layout(config: LayoutConfig, model: ModelConfig, processes: int, rows: int = 0) -> None:
    """Raise `BadInput` with the nearest layout that works if this one does not fit.

    `rows` are those of a whole batch. They must divide, or some processes would wait for others at
    each step; `layout.fewest` allows that.
    """
    if processes < (config.fewest or 1):
        raise BadInput(
            f"layout.fewest={config.fewest} and {processes} processes were started",
            f"start {config.fewest}, or set layout.fewest={processes}",
        )
    _check_pipeline(config, model, processes)
    data = _checked_data(config, processes)
    if rows % data and config.fewest is None:
        divisor = _nearest((n for n in range(1, rows + 1) if rows % n == 0), data)
        raise BadInput(
            f"a batch of {rows} rows does not divide among layout.data={data} processes",
            f"start {divisor * config.pipeline} processes, take {-(-rows // data) * data} rows "
            "(pretrain.batch_tokens), or set layout.fewest, which allows unequal shares",
        )
    _check_experts(config, model, data)


def _nearest(numbers: Iterable[int], wanted: int) -> int:
    """The number nearest to `wanted`, the smaller of two."""
    return min(numbers, key=lambda n: (abs(n - wanted), n))


def _check_pipeline(config: LayoutConfig, model: ModelConfig, processes: int) -> None:
    """There are as many stages as layers at most, and they divide the processes."""
    stages = config.pipeline
    depth = model.num_hidden_layers
    if stages > depth:
        raise BadInput(
            f"layout.pipeline={stages} has more stages than the model's {depth} layers",
            f"set layout.pipeline={depth} or less",
        )
    if processes % stages:
        possible = (n for n in range(1, min(depth, processes) + 1) if processes % n == 0)
        raise BadInput(
            f"layout.pipeline={stages} does not divide the {processes} processes that were started",
            f"set layout.pipeline={_nearest(possible, stages)}, or start a multiple of {stages}",
        )


def _checked_data(config: LayoutConfig, processes: int) -> int:
    """How many processes share each batch: all of a stage's."""
    stages = config.pipeline
    data = config.data or processes // stages
    if data * stages != processes:
        raise BadInput(
            f"layout.data={data} times layout.pipeline={stages} is {data * stages}, and "
            f"{processes} processes were started",
            f"start {data * stages} (torchrun --nproc-per-node {data * stages}), or set "
            f"layout.data={processes // stages}",
        )
    return data


def _check_experts(config: LayoutConfig, model: ModelConfig, data: int) -> None:
    """The experts divide among `config.expert` processes, and those among the data processes."""
    mixture = any(map(model.is_moe, range(model.num_hidden_layers)))
    experts = model.n_routed_experts if mixture else 1
    fitting = [
        n
        for n in range(1, data + 1)
        if data % n == 0 and experts % n == 0 and _divides(model, experts // n, data // n)
    ]
    if config.expert in fitting:
        return
    remedy = "start a number of processes that divides the experts or their width"
    if fitting:
        remedy = f"set layout.expert={_nearest(fitting, config.expert)}"
    raise BadInput(
        f"layout.expert={config.expert} does not work with layout.data={data} and {experts} "
        f"experts of width {model.moe_intermediate_size}",
        remedy,
    )


def _divides(model: ModelConfig, experts: int, replica: int) -> bool:
    """Whether a process's experts can be sharded over so many replicas.

    FSDP2 cuts axes other than the first only evenly.
    """
    widths = (2 * model.moe_intermediate_size, model.hidden_size)
    return experts % replica == 0 or not any(width % replica for width in widths)
