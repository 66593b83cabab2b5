import io

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from dmoe.metrics import TensorBoardWriter
from dmoe.metrics.tensorboard import load_image

ALL = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}


def read(log_dir):
    events = EventAccumulator(str(log_dir), size_guidance=ALL)
    events.Reload()
    return events


@pytest.fixture
def writer(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    yield writer
    writer.close()


def test_scalars_are_read_back(writer, tmp_path):
    writer.scalars(3, {"train/loss": 2.5, "perf/tok_s": 100.0})
    writer.flush()
    events = read(tmp_path)
    assert sorted(events.Tags()["scalars"]) == ["perf/tok_s", "train/loss"]
    (event,) = events.Scalars("train/loss")
    assert (event.step, event.value) == (3, 2.5)


def test_heatmap_is_a_picture_with_a_cell_an_expert(writer, tmp_path):
    counts = np.array([[4, 4, 4], [12, 0, 0]])
    writer.heatmap(7, "moe/load", counts)
    writer.flush()
    (event,) = read(tmp_path).Images("moe/load")
    image = np.array(Image.open(io.BytesIO(event.encoded_image_string)))
    assert event.step == 7
    assert np.array_equal(image, load_image(counts))


def test_load_colours():
    image = load_image([[1, 1], [2, 0]])
    rows, columns, _ = image.shape
    assert (rows, columns) == (16, 16)
    balanced, crowded, dead = image[0, 0], image[8, 0], image[8, 8]
    assert balanced.tolist() == [250, 250, 250]
    assert crowded[0] > crowded[2]
    assert dead.tolist() == [0, 0, 0]


def test_histogram_and_text(writer, tmp_path):
    writer.histogram(1, "moe/counts", [[1, 2], [3, 10]])
    writer.text("config", "a: 1\n# **not bold**")
    writer.flush()
    events = read(tmp_path)
    (event,) = events.Histograms("moe/counts")
    assert (event.histogram_value.num, event.histogram_value.max) == (4, 10)
    (event,) = events.Tensors("config/text_summary")
    assert event.tensor_proto.string_val[0].decode() == "    a: 1\n    # **not bold**"


def test_hparams_are_in_the_run_itself(writer, tmp_path):
    writer.hparams({"optim.lr": 3e-4, "eval.k": [1, 2], "x": None}, {"eval/loss": 2.0})
    writer.flush()
    assert len(list(tmp_path.iterdir())) == 1
    assert read(tmp_path).PluginTagToContent("hparams").keys() == {
        "_hparams_/experiment",
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }


def test_custom_scalars_layout(writer, tmp_path):
    writer.flush()
    (event,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for c in layout.category for chart in c.chart}
    assert charts["loss"] == ["train/loss", "eval/loss.*"]
    assert charts["load_cv"] == ["moe/load_cv_mean", "moe/load_cv_max"]


def test_a_resumed_run_has_no_back_jump(tmp_path):
    first = TensorBoardWriter(tmp_path)
    for step in (1, 2, 3):
        first.scalars(step, {"train/loss": float(step)})
    first.close()
    second = TensorBoardWriter(tmp_path, purge_step=3)
    second.scalars(3, {"train/loss": 30.0})
    second.close()
    values = [(event.step, event.value) for event in read(tmp_path).Scalars("train/loss")]
    assert values == [(1, 1.0), (2, 2.0), (3, 30.0)]
