"""The micro-batch: what the loaders yield and a model reads. Shape letters: B batch, S sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmoe.data.packing import IGNORED_LABEL, PADDING_DOCUMENT, Sample


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """B windows; all tensors int64."""

    index: int
    """Number of the micro-batch in its optimizer step (or evaluation), over all ranks."""
    sample_ids_B: Tensor
    """Number of each sample in the run's order, or window of the split; -1 where all is padding."""
    tokens_BS: Tensor
    """Ids; 0 in padding."""
    labels_BS: Tensor
    """The id to predict, or -100."""
    positions_BS: Tensor
    """Position in the document, from 0; less than S."""
    document_ids_BS: Tensor
    """Document in the window, from 0; -1 in padding. Attention stays within equal ids."""

    @property
    def valid_BS(self) -> Tensor:
        """True where there is a token, false in padding."""
        return self.document_ids_BS != PADDING_DOCUMENT

    @property
    def num_targets(self) -> int:
        """Positions that are predicted: the loss is a mean over them."""
        return int((self.labels_BS != IGNORED_LABEL).sum())

    def to(self, device: torch.device | str) -> "MicroBatch":
        """Return the batch on a device; the sample ids stay on the host."""
        return MicroBatch(
            self.index,
            self.sample_ids_B,
            *(
                tensor.to(device, non_blocking=True)
                for tensor in (
                    self.tokens_BS,
                    self.labels_BS,
                    self.positions_BS,
                    self.document_ids_BS,
                )
            ),
        )


def padding_sample(seq_len: int) -> Sample:
    """Return a window without a token."""
    zeros = np.zeros(seq_len, np.int64)
    return Sample(zeros, zeros + IGNORED_LABEL, zeros, zeros + PADDING_DOCUMENT)


def collate(index: int, sample_ids: Sequence[int], samples: Sequence[Sample]) -> MicroBatch:
    """Stack samples into a micro-batch."""

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(sample, name) for sample in samples]))

    return MicroBatch(
        index=index,
        sample_ids_B=torch.tensor(sample_ids),
        tokens_BS=stack("tokens"),
        labels_BS=stack("labels"),
        positions_BS=stack("positions"),
        document_ids_BS=stack("document_ids"),
    )
