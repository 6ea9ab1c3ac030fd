"""`volumen inspect`: tables and the contact sheet."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
import yaml
from data_folders import ball, image_of, shells, write_tiff_folder
from PIL import Image, ImageFont
from test_instance_distance import voronoi

from volumen.cli.contact_sheet import _shorten, draw_view, target_colours, views, write_sheet
from volumen.cli.main import main
from volumen.config.manager import ConfigManager


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VOLUMEN_CACHE", str(tmp_path / "cache"))


def test_tables_and_sheet_of_a_folder(tmp_path, capsys):
    root = write_tiff_folder(
        tmp_path / "data", {"a": {"ink": shells((24, 40, 48))}, "b": {"ink": shells((24, 40, 32))}}
    )
    # What a run of one's own settings would continue or start from does not concern the data.
    settings = {"tr_setup": {"resume": True, "checkpoint_path": "nowhere.pth"}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    sheet = tmp_path / "sheet.png"
    words = ["inspect", str(root), "--config-path", str(tmp_path / "my.yaml"), "--sheet", str(sheet)]
    assert main([*words, "--patch-size", "16,16,16", "--set", "model_config.base_features=4"]) == 0
    said = capsys.readouterr().out
    for word in ("24x40x48", "uint8", "ink", "binary", "train", "val", "valid ones", "GiB", "(assumed)"):
        assert word in said
    with Image.open(sheet) as picture:
        assert picture.width > 600
    assert list(tmp_path.glob("**/*.pth")) == []


def test_labelled_is_what_has_a_label_and_foreground_what_is_not_0(tmp_path, capsys):
    """Without a mask every voxel is labelled, and 0 is background; with one, what the mask covers."""
    label = np.zeros((16, 32, 40), np.uint8)
    label[:, :8] = 1  # a quarter
    mask = np.zeros_like(label)
    mask[:, :, :20] = 1  # half of it
    for name, masks, shares in (
        ("plain", None, ("100.00%", "25.00%")),
        ("masked", {"a": {"ink": mask}}, ("50.00%",)),
    ):
        root = write_tiff_folder(tmp_path / name, {"a": {"ink": label}}, masks=masks)
        assert (
            main(["inspect", str(root), "--patch-size", "8,8,8", "--set", "model_config.base_features=4"])
            == 0
        )
        said = capsys.readouterr().out
        row = next(line for line in said.splitlines() if line.startswith("ink"))
        assert all(share in row for share in shares), row
        words = "at least 10% labelled" if masks else "at least 10% foreground"
        assert words in said
    root = write_tiff_folder(tmp_path / "ignored", {"a": {"ink": label}})
    ignoring = "dataset_config.targets={ink: {ignore_label: 2}}"
    assert main(["inspect", str(root), "--patch-size", "8,8,8", "--set", ignoring]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ink"))
    assert "all but 2" in row


def config_of(tmp_path, label, mask=None, **dataset):
    masks = None if mask is None else {"a": {"ink": mask}}
    root = write_tiff_folder(tmp_path, {"a": {"ink": label}}, masks=masks)
    return ConfigManager(dataset_dir=str(root), dataset_config=dataset)


def drawn(config, view, size=64):
    targets = config.primary_targets
    return draw_view(config.cases[0], view, targets, target_colours(targets), size)


def test_views_show_where_the_labels_are_in_the_proportions_of_the_spacing(tmp_path):
    label = np.zeros((12, 40, 60), np.uint8)
    label[7, 10:20, 30:50] = 1
    config = config_of(tmp_path, label, spacing=[4.0, 1.0, 1.0])
    first, second = views(config.cases[0], config.labelled_profiles["a"])
    assert first.region == (slice(7, 8), slice(0, 40), slice(0, 60))
    assert second.region[1].start in range(10, 20)
    assert drawn(config, first, 60).shape == (40, 60, 3)
    assert drawn(config, second, 60).shape == (48, 60, 3)
    colour = target_colours(config.primary_targets)["ink"][0]
    np.testing.assert_array_equal(drawn(config, first, 60)[10, 30:50], np.tile(colour, (20, 1)))


def test_a_wide_plane_is_shown_where_it_is_labelled(tmp_path):
    label = np.zeros((3000, 2500), np.uint8)
    label[2500:2600, 100:200] = 1
    config = config_of(tmp_path, label)
    (view,) = views(config.cases[0], config.labelled_profiles["a"])
    rows, columns = view.region
    assert rows.stop - rows.start == columns.stop - columns.start == 1024
    assert rows.start <= 2500
    assert rows.stop >= 2600
    assert columns.start <= 100
    assert columns.stop >= 200


def test_a_few_thin_slices_are_no_line(tmp_path):
    label = np.zeros((6, 50, 400), np.uint8)
    label[:, 20:30, 300:310] = 1
    config = config_of(tmp_path, label, spacing=[2.0, 1.0, 1.0])
    _, view = views(config.cases[0], config.labelled_profiles["a"])
    assert view.region[0] == slice(0, 6)
    columns = view.region[2]
    assert columns.stop - columns.start == 48  # four times the height of 6 slices of 2
    assert columns.start <= 300 < 310 <= columns.stop
    assert view.caption.endswith(f"x {columns.start}-{columns.stop - 1}")
    assert drawn(config, view, 96).shape == (24, 96, 3)


def test_borders_stay_thin_where_voxels_are_enlarged(tmp_path):
    label = np.zeros((8, 8), np.uint8)
    label[2:6, 2:6] = 1
    config = config_of(tmp_path, label)
    (view,) = views(config.cases[0], config.labelled_profiles["a"])
    picture = drawn(config, view, 80)
    colour = target_colours(config.primary_targets)["ink"][0]
    outline = (picture == colour).all(axis=-1)
    assert outline[20:60, 20].all()
    assert outline[59, 20:60].all()
    assert not outline[22:58, 22:58].any()
    assert not outline[:19].any()


def test_a_long_caption_keeps_both_ends():
    font = ImageFont.load_default(14)
    short = _shorten("a_very_long_name_of_a_volume_that_goes_on_and_on_17  xy at z 13", 200, font)
    assert font.getlength(short) <= 200
    assert short.startswith("a_very")
    assert short.endswith("xy at z 13")


def test_what_no_mask_covers_is_dimmed(tmp_path):
    label = np.zeros((32, 32), np.uint8)
    label[10:14, 10:14] = 1
    mask = np.zeros_like(label)
    mask[:, :16] = 1
    config = config_of(tmp_path, label, mask)
    picture = drawn(config, views(config.cases[0], config.labelled_profiles["a"])[0], 32)
    assert picture[20:, 16:].mean() < 0.7 * picture[20:, :16].mean()


def test_the_share_of_objects_is_told_beside_that_of_the_mask(tmp_path, capsys):
    label = np.zeros((32, 64), np.uint8)
    label[:16, :16] = 1
    mask = np.zeros_like(label)
    mask[:, :32] = 1
    root = write_tiff_folder(tmp_path, {"a": {"ink": label}}, masks={"a": {"ink": mask}})
    assert main(["inspect", str(root), "--patch-size", "16,16", "--set", "model_config.base_features=4"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "ink 12.5% (mask 50.0%)" in said
    assert "50.00% 12.50%" in said


@pytest.mark.parametrize(("volumes", "pictures"), [(6, 12), (7, 7)])
def test_few_images_are_shown_without_their_labels_too(tmp_path, volumes, pictures):
    label = np.zeros((16, 16), np.uint8)
    label[4:12, 4:12] = 1
    names = [f"v{number}" for number in range(volumes)]
    root = write_tiff_folder(
        tmp_path, {name: {"ink": label} for name in names}, images=dict.fromkeys(names, 255 * label)
    )
    config = ConfigManager(dataset_dir=str(root))
    with Image.open(write_sheet(config, tmp_path / "sheet.png", tile=16)) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    colour = target_colours(config.primary_targets)["ink"][0]
    bordered = (pixels == colour).all(axis=-1)
    white = (pixels == 255).all(axis=-1)
    # The legend has the colour too; of the images only those without labels are white.
    assert white.any() == (volumes < pictures)
    assert bordered.any()


def test_classes_and_instances_have_colours_of_their_own(tmp_path):
    classes = ball((32, 32), 0.4) + ball((32, 32), 0.2)
    config = config_of(tmp_path / "classes", classes)
    view = views(config.cases[0], config.labelled_profiles["a"])[0]
    colours = target_colours(config.primary_targets)["ink"]
    picture = drawn(config, view, 32)
    assert len(colours) == 2
    for colour in colours:
        assert (picture == colour).all(axis=-1).any()
    cells = voronoi((32, 32), 12).astype(np.uint64)
    config = config_of(tmp_path / "cells", cells, targets={"ink": {"instances": "boundary"}})
    picture = drawn(config, view, 32)
    seen = [
        colour
        for colour in target_colours(config.primary_targets)["ink"]
        if (picture == colour).all(axis=-1).any()
    ]
    assert len(seen) >= 3


def test_colour_images_and_channels_can_be_drawn(tmp_path):
    root = write_tiff_folder(tmp_path, {"a": {"ink": ball((32, 40))}})
    tifffile.imwrite(
        root / "images" / "a.tif", np.stack([image_of(ball((32, 40)))] * 3, -1), photometric="rgb"
    )
    config = ConfigManager(dataset_dir=str(root))
    with Image.open(write_sheet(config, tmp_path / "sheet.png")) as picture:
        assert picture.size[0] >= 320
