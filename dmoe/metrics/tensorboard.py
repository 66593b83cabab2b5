"""A run in TensorBoard: scalars, the heat map of expert load, histograms, texts, hyperparameters.

Written by rank 0 beside metrics.jsonl.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dmoe.metrics.moe_stats import relative_load
from dmoe.metrics.names import CUSTOM_SCALARS

# Load over mean -> red, green, blue. Dead is black, starved blue, balanced white, crowded red.
_COLOURS = np.array(
    [
        (0.0, 0, 0, 0),
        (0.01, 33, 60, 140),
        (0.5, 130, 170, 220),
        (1.0, 250, 250, 250),
        (2.0, 240, 140, 90),
        (4.0, 160, 10, 30),
    ]
)
_CELL_PIXELS = 8


class TensorBoardWriter:
    """Writes the event files of one run.

    Args:
        log_dir: Folder of the event files; made if it is not there.
        purge_step: On resume, the first step that is written anew: TensorBoard hides what an
            earlier process wrote from there on, so that curves do not jump back.
    """

    def __init__(self, log_dir: str | Path, purge_step: int | None = None) -> None:
        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step)
        self._writer.add_custom_scalars(CUSTOM_SCALARS)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars under their TensorBoard names; see `names.tensorboard_scalars`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def heatmap(self, step: int, name: str, counts_LE: ArrayLike) -> None:
        """Write the load of experts as an image: a row a layer, a column an expert."""
        self._writer.add_image(name, load_image(counts_LE), step, dataformats="HWC")

    def histogram(self, step: int, name: str, values: ArrayLike) -> None:
        """Write the distribution of values of any shape."""
        self._writer.add_histogram(name, np.asarray(values), step)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Write a text to be shown as it is."""
        # TensorBoard renders Markdown; indented lines are taken literally.
        literal = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.add_text(name, literal, step)

    def hparams(self, config: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """Write the config and the final results for the hyperparameter page.

        Args:
            config: Dotted keys and their values.
            results: TensorBoard names of scalars and their last values.
        """
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in config.items()
        }
        # SummaryWriter.add_hparams would put them into a run folder of their own.
        for summary in hparams(plain, dict(results)):
            self._writer._get_file_writer().add_summary(summary)

    def flush(self) -> None:
        """Hand all that was written to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()


def load_image(counts_LE: ArrayLike) -> NDArray[np.uint8]:
    """Return counts as a picture (pixel rows, pixel columns, 3), coloured by load over mean."""
    load_LE = relative_load(counts_LE)
    channels = [np.interp(load_LE, _COLOURS[:, 0], colour) for colour in _COLOURS[:, 1:].T]
    image = np.stack(channels, axis=-1).astype(np.uint8)
    return image.repeat(_CELL_PIXELS, axis=0).repeat(_CELL_PIXELS, axis=1)
