"""Training on a viewer's layers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from data_folders import image_of, shells
from ignite.engine import Events

from volumen.napari_plugin.viewer import train_from_viewer
from volumen.utils.errors import VolumenError

SETTINGS = {
    "tr_config": {
        "patch_size": [16, 16, 16],
        "batch_size": 1,
        "max_epoch": 1,
        "max_steps_per_epoch": 1,
        "max_val_steps_per_epoch": 1,
        "num_dataloader_workers": 0,
        "amp": "off",
    },
    "model_config": {"features_per_stage": [4, 8]},
}


class Image(SimpleNamespace):
    """Stands for napari.layers.Image."""


class Labels(SimpleNamespace):
    """Stands for napari.layers.Labels."""


@pytest.fixture
def viewer():
    label = shells((24, 24, 64))
    common = {"scale": (1.0, 1.0, 1.0), "metadata": {}, "rgb": False, "multiscale": False}
    return SimpleNamespace(
        layers=[
            Image(name="scroll", data=image_of(label), **common),
            Labels(name="scroll_surface", data=label, **common),
        ]
    )


def test_layers_of_a_viewer_train_a_model(viewer, tmp_path):
    before = [layer.data.copy() for layer in viewer.layers]
    run = train_from_viewer(viewer, tmp_path / "out", SETTINGS, device="cpu")
    assert (run / "model_1.pth").is_file()
    assert all((layer.data == data).all() for layer, data in zip(viewer.layers, before))


def test_a_viewer_without_labels_is_refused(viewer, tmp_path):
    viewer.layers = viewer.layers[:1]
    with pytest.raises(VolumenError, match="label"):
        train_from_viewer(viewer, tmp_path / "out", SETTINGS, device="cpu")
    assert not (tmp_path / "out").exists()


def test_settings_are_data(viewer, tmp_path):
    with pytest.raises(VolumenError, match="not evaluated"):
        train_from_viewer(viewer, tmp_path / "out", {"tr_config": {"optimizer": "$print(1)"}})


def test_a_mistake_is_ours_whatever_it_came_through(viewer, tmp_path):
    settings = {**SETTINGS, "tr_config": {**SETTINGS["tr_config"], "optimizer": "AdamQ"}}
    with pytest.raises(VolumenError, match=r"tr_config.optimizer: .*found 'AdamQ'; did you mean Adam"):
        train_from_viewer(viewer, tmp_path / "out", settings, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_coarser_search_is_left_out_for_layers(viewer, tmp_path):
    settings = {**SETTINGS, "dataset_config": {"valid_patch_find_resolution": 1}}
    run = train_from_viewer(viewer, tmp_path / "out", settings, device="cpu")
    assert (run / "model_1.pth").is_file()


def test_the_viewer_gets_its_memory_back_however_the_training_ends(viewer, tmp_path):
    from volumen.utils import memory

    class Failing:
        def attach(self, engine):
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.fail)

        def fail(self, engine):
            kept.append(memory._retained.holders)
            raise RuntimeError("mine")

    kept: list[int] = []
    before = memory._retained.holders
    with pytest.raises(RuntimeError, match="trainer"):
        train_from_viewer(viewer, tmp_path / "a", SETTINGS, device="cpu", handlers=[Failing()])
    assert memory._retained.holders == before
    assert kept == [before + 1] or memory._glibc() is None
    train_from_viewer(viewer, tmp_path / "b", SETTINGS, device="cpu")
    assert memory._retained.holders == before
