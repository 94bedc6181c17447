"""A whole copy of a model whose weights are sharded over processes: what sampling needs."""

import torch
import torch.distributed as dist

from xushi.model import Deepseek
from xushi.train import TrainingState


class WholeCopy:
    """A second model in each process, filled from the shards of all of them."""

    def __init__(self, state: TrainingState) -> None:
        self.model = Deepseek(state.model.config).to(state.layout.device)
        self.model.compute_dtype = state.model.compute_dtype
        self.model.requires_grad_(False)

    @torch.no_grad()
    def refresh(self, state: TrainingState) -> Deepseek:
        """The copy with the weights that the processes now hold; all of them call this together.

        What the processes save for a checkpoint is each tensor exactly once, so the sum of their
        parts, each at its place and zero elsewhere, is the whole tensor, signs of zeros aside.
        """
        saved, boxes = state.saved["model"], state.boxes
        group = state.layout.group("data")
        for name, tensor in self.model.state_dict().items():
            tensor.zero_()
            if name in saved:
                place = boxes[name].slices if name in boxes else ...
                tensor[place] = saved[name]
            dist.all_reduce(tensor, group=group)
        return self.model
