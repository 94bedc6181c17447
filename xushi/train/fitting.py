"""Which layouts fit a model and a number of processes, and how layers and experts are cut.

Not here: the processes themselves (layout, joining).
"""

from xushi.base.errors import BadInput
from xushi.model import ModelConfig
from xushi.train.config import LayoutConfig

FARTHEST = 1000  # a number of processes farther from the one that was started is not proposed


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
    """Raise `BadInput` with the nearest changes that work if this layout does not fit.

    `rows` are those of a whole batch. They must divide, or some processes would wait for others at
    each step; `layout.fewest` allows that.
    """
    if problem := _problem(config, model, processes, rows):
        raise BadInput(problem, _remedy(config, model, processes, rows))


def _problem(config: LayoutConfig, model: ModelConfig, processes: int, rows: int) -> str:
    """Why a layout does not fit, "" if it does."""
    if processes < (config.fewest or 1):
        return f"layout.fewest={config.fewest} and {processes} processes were started"
    stages = config.pipeline
    depth = model.num_hidden_layers
    if stages > depth:
        return f"layout.pipeline={stages} has more stages than the model's {depth} layers"
    if config.data is not None and config.data * stages != processes:
        return (
            f"layout.data={config.data} times layout.pipeline={stages} is {config.data * stages}, "
            f"and {processes} processes were started"
        )
    if processes % stages:
        return (
            f"layout.pipeline={stages} does not divide the {processes} processes that were started"
        )
    data = processes // stages
    if problem := _problem_of_experts(config.expert, model, data):
        return problem
    if rows % data and config.fewest is None:
        return f"a batch of {rows} rows does not divide among layout.data={data} processes"
    return ""


def _problem_of_experts(groups: int, model: ModelConfig, data: int) -> str:
    """Why `data` processes cannot hold the experts, "" if they can: groups of `groups` processes
    share them out, and those that hold the same ones shard them.
    """
    if data % groups:
        return f"layout.expert={groups} does not divide the {data} processes that share a batch"
    if not any(map(model.is_moe, range(model.num_hidden_layers + model.num_nextn_predict_layers))):
        return f"layout.expert={groups} and the model has no experts" if groups > 1 else ""
    experts, replica = model.n_routed_experts, data // groups
    if experts % groups:
        return f"layout.expert={groups} does not divide the model's {experts} experts"
    # FSDP2 cuts axes other than the first only evenly.
    widths = (2 * model.moe_intermediate_size, model.hidden_size)
    if (experts // groups) % replica and any(width % replica for width in widths):
        return (
            f"{replica} processes hold the same {experts // groups} experts (layout.data={data}, "
            f"layout.expert={groups}) and can cut neither their number nor both their widths "
            f"{widths[0]} and {widths[1]} evenly"
        )
    return ""


def _remedy(config: LayoutConfig, model: ModelConfig, processes: int, rows: int) -> str:
    """What to change so that the layout fits: each alternative does by itself."""
    found = []
    if keys := _nearest_keys(config, model, processes, rows):
        found.append(f"set {' and '.join(f'layout.{key}={n}' for key, n in keys.items())}")
    if count := _nearest_count(config, model, processes, rows):
        found.append(f"start {count} processes")
    if not _problem(config, model, processes, 0):  # the rows alone are at fault
        data = processes // config.pipeline
        found.append(f"take {-(-rows // data) * data} rows (pretrain.batch_tokens)")
        found.append(f"set layout.fewest={processes}, which allows unequal shares")
    return ", or ".join(found) or "leave the table [layout] out and start one process"


def _nearest_keys(
    config: LayoutConfig, model: ModelConfig, processes: int, rows: int
) -> dict[str, int]:
    """The fewest keys of [layout] whose change makes it fit, and the nearest values for them."""
    own = config.model_dump()
    fitting = []
    for stages in _divisors(processes, model.num_hidden_layers):
        data = processes // stages
        for experts in _divisors(data, model.n_routed_experts):
            keys = {"pipeline": stages, "expert": experts}
            if config.data is not None:
                keys["data"] = data
            if config.fewest is not None:
                keys["fewest"] = processes if config.data else min(config.fewest, processes)
            changed = {key: n for key, n in keys.items() if n != own[key]}
            if not _problem(config.model_copy(update=keys), model, processes, rows):
                fitting.append(
                    (len(changed), sum(abs(n - own[k]) for k, n in changed.items()), changed)
                )
    return min(fitting, key=lambda each: each[:2])[2] if fitting else {}


def _nearest_count(config: LayoutConfig, model: ModelConfig, processes: int, rows: int) -> int:
    """The number of processes nearest to `processes` that this layout fits; 0 if there is none."""
    wanted = config.data * config.pipeline if config.data else max(processes, config.fewest or 1)
    counts = range(max(1, wanted - FARTHEST), wanted + FARTHEST)
    fitting = [n for n in counts if not _problem(config, model, n, rows)]
    return min(fitting, key=lambda n: (abs(n - wanted), n), default=0)


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]
