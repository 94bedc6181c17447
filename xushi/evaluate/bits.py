"""Bits per byte: what the model would need to encode the held-out text, per byte of it.

Every target token of the stream is predicted once, in windows that do not overlap, document ends
included. The bytes are those of the raw text, without any separators.

Axes: N target tokens of a batch, D documents.
"""

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from xushi.base.errors import BadInput
from xushi.base.files import write_atomic
from xushi.data import HeldoutText
from xushi.model import Batch, Deepseek, Hidden
from xushi.ops import token_log_probabilities


@torch.no_grad()
def total_bits(
    model: Deepseek,
    batches: Iterable[Batch],
    run: Callable[[Tensor, Tensor, Tensor], Hidden] | None = None,
) -> float:
    """-log2 p of all target tokens of `batches`, summed in float64 over the batches.

    `run` takes the place of `model.hidden` where the model is spread over a pipeline; only the last
    stage has the sum.
    """
    nats = 0.0
    for batch in batches:
        log_p_N = _log_probabilities(model, batch, run)
        if log_p_N is not None:
            nats += _nats(log_p_N, batch)
    return nats / math.log(2)


@dataclass(frozen=True)
class DocumentBits:
    """What a model needs for each held-out document.

    Per document, in path order: `uids`, `bytes_D` (int64) of its text, `bits_D` (float64). `total`:
    what `total_bits` gives for the same batches, whose sums within a batch are float32.
    """

    uids: list[bytes]
    bytes_D: npt.NDArray[np.int64]
    bits_D: npt.NDArray[np.float64]
    total: float

    def write(self, path: Path) -> None:
        """Write a Parquet file with the columns uid, bytes and bits: a row for each document."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {
            "uid": pa.array(self.uids, pa.binary(16)),
            "bytes": pa.array(self.bytes_D),
            "bits": pa.array(self.bits_D),
        }
        written = io.BytesIO()
        metadata = {"total_bits": repr(self.total)}
        pq.write_table(pa.table(columns, metadata=metadata), written, compression="zstd")
        write_atomic(path, written.getvalue())

    @classmethod
    def read(cls, path: Path) -> "DocumentBits":
        """Read what `write` wrote; a missing or damaged file is a `XushiError`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
            return cls(
                table.column("uid").to_pylist(),
                table.column("bytes").to_numpy(),
                table.column("bits").to_numpy(),
                float(table.schema.metadata[b"total_bits"]),
            )
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise BadInput(
                f"{path} cannot be read: {' '.join(str(error).split())}",
                "run the evaluate stage again",
            ) from None


def bits_by_document(
    model: Deepseek,
    tokens: Path,
    batch_size: int,
    done: Callable[[int], None] = lambda _: None,
) -> DocumentBits:
    """`bits_of_documents` of the held-out text in the directory `tokens`."""
    return bits_of_documents(model, HeldoutText.open(tokens), batch_size, done)


@torch.no_grad()
def bits_of_documents(
    model: Deepseek,
    heldout: HeldoutText,
    batch_size: int,
    done: Callable[[int], None] = lambda _: None,
) -> DocumentBits:
    """What `model` needs for each document, in one pass.

    Every target token belongs to the document it is from, eos included, so two models (or two
    tokenizers) on the same corpus can be compared in pairs of documents. `done` is called after
    each batch with the number of sequences so far.
    """
    nats_D = np.zeros(len(heldout.uids))
    nats = 0.0
    rows = 0
    for batch, documents_BT in heldout.batches(batch_size):
        log_p_N = _log_probabilities(model, batch)
        assert log_p_N is not None, "a model that evaluation has loaded is whole"
        nats += _nats(log_p_N, batch)
        is_target_N = documents_BT.flatten() >= 0
        nats_D += np.bincount(
            documents_BT.flatten()[is_target_N],
            weights=-log_p_N.cpu().numpy()[is_target_N],
            minlength=len(nats_D),
        )
        rows += batch.rows
        done(rows)
    return DocumentBits(heldout.uids, heldout.bytes_D, nats_D / math.log(2), nats / math.log(2))


def _log_probabilities(
    model: Deepseek,
    batch: Batch,
    run: Callable[[Tensor, Tensor, Tensor], Hidden] | None = None,
) -> Tensor | None:
    """log p of each target [N]; None on a stage of a pipeline that is not the last."""
    here = batch.to(model.device)
    hidden_BTD = (run or model.hidden)(here.tokens, here.positions, here.segments).hidden_BTD
    if not model.ends:
        return None
    dtype = model.compute_dtype or hidden_BTD.dtype
    return token_log_probabilities(
        hidden_BTD.flatten(0, 1).to(dtype), model.head_VD, here.targets.flatten()
    )


def _nats(log_p_N: Tensor, batch: Batch) -> float:
    """-log p of a batch's targets, summed in the dtype of `log_p_N`."""
    weights_N = batch.loss_mask.flatten().to(log_p_N.device, torch.float32)
    return float(-(log_p_N * weights_N).sum())
