"""Labels and masks that are not stored as what they mean: recognised in every format and command, or refused."""

from __future__ import annotations

import logging
import pickle

import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from volumen.cli.main import main as volumen
from volumen.cli.train import shipped_sections
from volumen.config.manager import ConfigManager
from volumen.data.formats.opening import open_volume
from volumen.data.formats.volumes import ArrayVolume
from volumen.data.formats.zarr_arrays.stored_chunks import stored_blocks
from volumen.data.labels.instance_labels import components_per_value
from volumen.data.labels.label_channels import LabelRule, open_label, open_mask_file
from volumen.evaluation.request import EvaluateRequest
from volumen.evaluation.score import evaluate
from volumen.inference.jobs import open_mask
from volumen.utils.errors import VolumenError

FORMATS = ("png", "tif", "zarr", "nii.gz")
RULE = LabelRule("targets.cell")


def mask_2d(shape=(48, 40)):
    mask = np.zeros(shape, np.uint8)
    mask[8:30, 10:25] = 255
    return mask


def write(path, array, photometric=None):
    """Write (Y, X), (Y, X, C), (Z, Y, X) or, not as PNG, (Z, Y, X, C); what is TIFF is declared as `photometric`."""
    name = path.name
    if name.endswith(".png"):
        Image.fromarray(array).save(path)
    elif name.endswith(".tif"):
        if photometric is None:
            photometric = "rgb" if array.ndim > 2 and array.shape[-1] in (3, 4) else "minisblack"
        extra = {"extrasamples": ["unassalpha"]} if array.ndim > 2 and array.shape[-1] in (2, 4) else {}
        tifffile.imwrite(path, array, photometric=photometric, **extra)
    elif name.endswith(".zarr"):
        zarr.save_array(str(path), array)
    else:
        # NIfTI has the axes (X, Y, Z, channels).
        channels = array.shape[-1:] if array.ndim > 2 and array.shape[-1] in (3, 4) else ()
        space = array.shape[: array.ndim - len(channels)]
        volume = array.reshape((1,) * (3 - len(space)) + space + channels)
        turned = volume.transpose(2, 1, 0, *range(3, volume.ndim))
        nibabel.save(nibabel.Nifti1Image(turned, np.eye(4)), path)
    return path


def whole(volume):
    return volume.read(tuple(slice(0, size) for size in volume.shape))


@pytest.mark.parametrize("alpha", [None, 255, 0, 128])
@pytest.mark.parametrize("form", FORMATS)
def test_grey_saved_as_rgb_is_one_label_in_every_format(tmp_path, form, alpha):
    if alpha is not None and (form in ("zarr", "nii.gz")) and alpha != 255:
        pytest.skip("a channel without a name is transparency only where it is opaque")
    mask = mask_2d()
    stored = np.repeat(mask[..., None], 3, -1)
    if alpha is not None:
        stored = np.concatenate([stored, np.full((*mask.shape, 1), alpha, np.uint8)], -1)
    path = write(tmp_path / f"a.{form}", stored)
    label = open_label(path, ndim=2, rule=RULE)
    assert (label.channels, label.shape) == (1, mask.shape)
    np.testing.assert_array_equal(whole(label)[0], mask)
    assert "3 equal channels are read as one label (targets.cell.kind: multilabel keeps them" in label.remark
    assert ("constant alpha channel is left out" in label.remark) == (alpha is not None)
    kept = open_label(path, ndim=2, rule=LabelRule("targets.cell", separate=True))
    assert kept.channels == stored.shape[-1]
    again = pickle.loads(pickle.dumps(label))
    np.testing.assert_array_equal(whole(again), whole(label))
    assert label.fingerprint() != kept.fingerprint()
    # The same for the masks of every command.
    for opened in (open_mask(path, ArrayVolume(mask)), open_mask_file(path, ndim=2)):
        np.testing.assert_array_equal(whole(opened)[0] != 0, mask > 0)


@pytest.mark.parametrize("form", ["tif", "zarr", "nii.gz"])
def test_grey_saved_as_rgb_is_one_label_in_3d(tmp_path, form):
    mask = np.zeros((6, 20, 24), np.uint8)
    mask[2:5, 4:9, 6:20] = 7
    path = write(tmp_path / f"a.{form}", np.repeat(mask[..., None], 3, -1))
    label = open_label(path, axes="zyxc" if form == "zarr" else None, ndim=3, rule=RULE)
    np.testing.assert_array_equal(whole(label), mask[None])


def test_slices_of_rgb_are_one_label(tmp_path):
    mask = np.stack([mask_2d(), mask_2d() * 0])
    for number, plane in enumerate(mask):
        write(tmp_path / f"s{number}.png", np.repeat(plane[..., None], 3, -1))
    np.testing.assert_array_equal(whole(open_label(tmp_path, rule=RULE)), mask[None])


def test_slices_with_a_palette_are_one_label_and_one_prediction(tmp_path):
    mask = np.stack([mask_2d(), mask_2d()[::-1]]) // 255
    for part in ("found", "truth"):
        (tmp_path / part).mkdir()
        for number, plane in enumerate(mask):
            image = Image.fromarray(plane, "P")
            image.putpalette([0, 0, 0, 255, 0, 0])
            image.save(tmp_path / part / f"s{number}.png")
    np.testing.assert_array_equal(whole(open_label(tmp_path / "truth", rule=RULE)), mask[None])
    request = EvaluateRequest(str(tmp_path / "found"), str(tmp_path / "truth"), str(tmp_path / "out"))
    evaluation = evaluate(request)
    assert [case.prediction.shape for case in evaluation.scored] == [mask.shape]
    assert evaluation.mean["mean_dice"] == 1


@pytest.mark.parametrize("form", ["png", "tif"])
def test_grey_with_alpha_is_one_label(tmp_path, form):
    mask = mask_2d()
    stored = np.stack([mask, np.full_like(mask, 255)], -1)
    photometric = "minisblack"
    label = open_label(write(tmp_path / f"a.{form}", stored, photometric), ndim=2, rule=RULE)
    np.testing.assert_array_equal(whole(label), mask[None])


@pytest.mark.parametrize("form", ["png", "tif"])
def test_a_label_that_lies_in_the_alpha_channel_is_read_there(tmp_path, form):
    mask = mask_2d()
    stored = np.concatenate([np.full((*mask.shape, 3), 255, np.uint8), mask[..., None]], -1)
    label = open_label(write(tmp_path / f"a.{form}", stored), ndim=2, rule=RULE)
    assert "alpha channel is read as the label" in label.remark
    np.testing.assert_array_equal(whole(label), mask[None])


@pytest.mark.parametrize("form", ["png", "tif"])
def test_one_colour_on_black_is_foreground(tmp_path, form):
    mask = mask_2d()
    stored = np.stack([mask, mask // 2, 0 * mask], -1)
    label = open_label(write(tmp_path / f"a.{form}", stored), ndim=2, rule=RULE)
    assert "drawn in one colour, (255, 127, 0), which is read as foreground" in label.remark
    np.testing.assert_array_equal(whole(label)[0] > 0, mask > 0)


def coloured():
    colours = np.zeros((48, 40, 3), np.uint8)
    colours[8:30, 10:25] = (255, 0, 0)
    colours[35:, 30:] = (255, 255, 0)
    return colours


@pytest.mark.parametrize("form", ["png", "tif"])
def test_colours_of_classes_are_refused_with_both_ways_out(tmp_path, form):
    path = write(tmp_path / f"a.{form}", coloured())
    message = (
        r"expected a label in grey, found 3 colours: \(0, 0, 0\), \(255, 0, 0\), \(255, 255, 0\); save class numbers "
        r".* or set targets\.cell\.kind: multilabel if each channel"
    )
    with pytest.raises(VolumenError, match=message) as error:
        open_label(path, ndim=2, rule=RULE)
    assert str(path) in str(error.value)
    assert open_label(path, ndim=2, rule=LabelRule("targets.cell", separate=True)).channels == 3
    assert open_label(path, ndim=2, rule=LabelRule("targets.cell", channels=3)).channels == 3
    with pytest.raises(VolumenError, match="expected a mask of 1 channel"):
        open_mask_file(path, ndim=2)


@pytest.mark.parametrize("form", ["zarr", "nii.gz"])
def test_colours_without_a_name_are_refused_or_said(tmp_path, form):
    shaded = coloured()
    shaded[40:, :5] = (128, 10, 0)
    with pytest.raises(VolumenError, match="expected a label in grey, found 4 colours"):
        open_label(write(tmp_path / f"a.{form}", shaded), ndim=2, rule=RULE)
    label = open_label(write(tmp_path / f"b.{form}", coloured()), ndim=2, rule=RULE)
    assert label.channels == 3
    assert "its 3 channels are read as overlapping targets; save class numbers" in label.remark
    quiet = open_label(write(tmp_path / f"c.{form}", coloured() // 255), ndim=2, rule=RULE)
    assert quiet.channels == 3
    assert not getattr(quiet, "remark", "")


def test_an_alpha_channel_that_says_more_is_refused(tmp_path):
    stored = np.concatenate([coloured(), mask_2d()[..., None]], -1)
    with pytest.raises(VolumenError, match="found an alpha channel that is not constant"):
        open_label(write(tmp_path / "a.png", stored), ndim=2, rule=RULE)


@pytest.mark.parametrize("form", ["zarr", "tif"])
def test_what_no_look_has_met_is_refused_by_the_read(tmp_path, form, monkeypatch):
    """Only a part of a large label is looked at before; the rest is checked as it is read."""
    import volumen.data.labels.label_channels as module

    stored = np.repeat(mask_2d()[..., None], 3, -1)
    stored[40, 30] = (255, 0, 0)
    path = write(tmp_path / f"a.{form}", stored)
    monkeypatch.setattr(
        "volumen.data.index.label_values.stored_regions", lambda _: ([(slice(0, 32), slice(0, 40))], set())
    )
    monkeypatch.setattr(module, "_BLOCKS", 1)
    label = open_label(path, ndim=2, rule=RULE)
    np.testing.assert_array_equal(label.read((slice(0, 32), slice(0, 40)))[0], mask_2d()[:32])
    with pytest.raises(VolumenError, match=r"found the colour \(255, 0, 0\); save class numbers"):
        label.read((slice(32, 48), slice(0, 40)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_numbers_of_a_palette_are_label_values(tmp_path, bits):
    numbers = np.random.default_rng(bits).integers(0, 2**bits if bits < 8 else 40, (20, 30)).astype(np.uint8)
    image = Image.fromarray(numbers, "P")
    image.putpalette([value for k in range(256) for value in (k, 255 - k, 7)][: 3 * 2**bits])
    image.save(tmp_path / "a.png", bits=bits)
    label = open_label(tmp_path / "a.png", ndim=2, rule=RULE)
    np.testing.assert_array_equal(whole(label), numbers[None])
    assert "the numbers of its palette are read as label values: 0 for (0, 255, 7)" in label.remark
    with pytest.raises(VolumenError, match="found a PNG with a palette"):
        open_volume(tmp_path / "a.png")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_counts_from_0(tmp_path, bits):
    imagecodecs = pytest.importorskip("imagecodecs")
    assert imagecodecs
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (9, 21)).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(png_of(numbers, bits))
    np.testing.assert_array_equal(whole(open_label(tmp_path / "a.png", ndim=2, rule=RULE)), numbers[None])


def png_of(numbers, bits):
    """Write a grey PNG of few bits by hand, as the standard describes it."""
    import struct
    import zlib

    rows = []
    for row in numbers:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows.append(b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8)))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = numbers.shape
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_palettes_of_tiff_are_said(tmp_path):
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4)
    table = np.random.default_rng(0).integers(0, 65535, (3, 256)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", numbers, photometric="palette", colormap=table)
    label = open_label(tmp_path / "a.tif", ndim=2, rule=RULE)
    assert "numbers of its palette" in label.remark
    np.testing.assert_array_equal(whole(label), numbers[None])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16])
def test_min_is_white_is_said_and_turned_by_a_setting(tmp_path, dtype):
    mask = mask_2d().astype(bool).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", mask, photometric="miniswhite")
    label = open_label(tmp_path / "a.tif", ndim=2, rule=RULE)
    np.testing.assert_array_equal(whole(label)[0], mask)
    assert "stored as min-is-white" in label.remark
    assert "targets.cell.invert: true reads it as foreground" in label.remark
    turned = open_label(tmp_path / "a.tif", ndim=2, rule=LabelRule("targets.cell", invert=True))
    np.testing.assert_array_equal(whole(turned)[0], ~mask.astype(bool))
    assert "min-is-white" not in turned.remark
    assert turned.fingerprint() != label.fingerprint()


def test_inverted_labels_keep_what_is_unknown_and_what_is_not_stored_is_foreground(tmp_path):
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=(8, 8), chunks=(4, 4), dtype="u1", fill_value=0)
    array[:4, :4] = np.array([[0, 1, 255, 0]] * 4)
    label = open_label(tmp_path / "a.zarr", ndim=2, rule=LabelRule("t", invert=True, unknown=255))
    found = whole(label)[0]
    np.testing.assert_array_equal(found[0, :4], [1, 0, 255, 1])
    assert (found[4:] == 1).all()
    assert stored_blocks(label) is None


@pytest.mark.parametrize("form", ["tif", "zarr", "nii.gz"])
def test_nan_in_a_label_is_unknown_by_a_setting_and_refused_without(tmp_path, form):
    values = (mask_2d() > 0).astype(np.float32)
    values[0, :3] = np.nan
    path = write(tmp_path / f"a.{form}", values)
    with pytest.raises(
        VolumenError, match=r"found nan at voxel \(0, 0\); set targets\.cell\.ignore_label: -1"
    ):
        whole(open_label(path, ndim=2, rule=RULE))
    label = open_label(path, ndim=2, rule=LabelRule("targets.cell", unknown=-1))
    np.testing.assert_array_equal(whole(label)[0], np.nan_to_num(values, nan=-1))
    for mask in (open_mask(path, ArrayVolume(values)), open_mask_file(path, ndim=2)):
        with pytest.raises(VolumenError, match="found NaN; replace it by 0 or 1"):
            whole(mask)


def dataset(root, labels, form="png", images=None):
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for number, label in enumerate(labels):
        shape = label.shape[:2]
        image = np.random.default_rng(number).integers(0, 99, shape).astype(np.uint8)
        write(root / "images" / f"a{number}.{form}", image)
        write(root / "labels" / f"a{number}_cell.{form}", label)
    return root


def config_of(root, **target):
    sections = shipped_sections()
    sections["dataset_config"] |= {"targets": {"cell": target}, "cache_valid_patches": False}
    return ConfigManager(**sections, dataset_dir=str(root), device="cpu")


def test_training_and_inspection_read_one_label_and_say_it_once(tmp_path, caplog, capsys):
    stored = np.repeat(mask_2d((64, 64))[..., None], 3, -1)
    root = dataset(tmp_path / "data", [stored, stored, stored])
    with caplog.at_level(logging.WARNING):
        target = config_of(root).targets["cell"]
    assert (target.kind, target.out_channels) == ("binary", 1)
    said = [record.getMessage() for record in caplog.records if "grey saved as RGB" in record.getMessage()]
    assert len(said) == 1
    assert "a0_cell.png (and 2 more files): grey saved as RGB" in said[0]
    assert config_of(root, kind="multilabel").targets["cell"].out_channels == 3
    assert volumen(["inspect", str(root), "--device", "cpu"]) == 0
    assert "multilabel" not in capsys.readouterr().out


def test_evaluation_reads_labels_masks_and_predictions_alike(tmp_path):
    """Each of the three as plain grey and as RGB(A): all combinations have the score of plain files."""
    truth, found = mask_2d(), np.roll(mask_2d(), 3, 1)
    where = np.zeros_like(truth)
    where[5:40, 5:30] = 255
    scores = set()
    for number in range(8):
        root = tmp_path / str(number)
        root.mkdir()
        arrays = {"truth_ink.png": truth, "a_ink.png": found, "mask.png": where}
        for bit, (name, array) in enumerate(arrays.items()):
            rgba = np.concatenate(
                [np.repeat(array[..., None], 3, -1), np.full((*array.shape, 1), 255, np.uint8)], -1
            )
            write(root / name, rgba if number >> bit & 1 else array)
        request = EvaluateRequest(
            str(root / "a_ink.png"),
            str(root / "truth_ink.png"),
            str(root / "out"),
            masks=str(root / "mask.png"),
        )
        scores.add(round(evaluate(request).mean["ink/dice"], 12))
    t, f = truth[5:40, 5:30] > 0, found[5:40, 5:30] > 0
    assert scores == {round(2 * (t & f).sum() / (t.sum() + f.sum()), 12)}


def nuclei(count, shape=(96, 96), step=12):
    """Discs with the numbers 1, 2, ..."""
    label, number = np.zeros(shape, np.uint8), 0
    y, x = np.indices(shape)
    for cy in range(step // 2, shape[0], step):
        for cx in range(step // 2, shape[1], step):
            if number < count:
                number += 1
                label[(y - cy) ** 2 + (x - cx) ** 2 < 16] = number
    return label


def tissue(classes, shape=(96, 96)):
    """Every class in many places."""
    cells = np.random.default_rng(0).integers(0, classes, (shape[0] // 4, shape[1] // 4))
    return np.kron(cells, np.ones((4, 4))).astype(np.uint8)


@pytest.mark.parametrize("form", ["png", "tif", "zarr"])
def test_numbered_objects_are_no_classes(tmp_path, caplog, form):
    root = dataset(tmp_path / "data", [nuclei(54), nuclei(31)], form)
    with caplog.at_level(logging.WARNING):
        target = config_of(root).targets["cell"]
    assert (target.kind, target.out_channels, target.instances) == ("binary", 1, "foreground")
    assert (
        "each of the 54 label values is one connected piece, so they are taken for instances" in caplog.text
    )
    assert "kind: multiclass if they are classes" in caplog.text
    named = config_of(root, kind="multiclass").targets["cell"]
    assert (named.kind, named.out_channels, named.instances) == ("multiclass", 55, None)
    assert config_of(root, out_channels=55).targets["cell"].kind == "multiclass"


def test_classes_stay_classes(tmp_path, caplog):
    many = dataset(tmp_path / "many", [tissue(20), tissue(20)])
    organs = dataset(tmp_path / "organs", [nuclei(13), nuclei(13)[::-1]])
    few = dataset(tmp_path / "few", [nuclei(5), nuclei(4)])
    two = dataset(tmp_path / "two", [nuclei(2), nuclei(2)])
    with caplog.at_level(logging.WARNING):
        assert config_of(many).targets["cell"].out_channels == 20
        assert config_of(two).targets["cell"].out_channels == 3
    assert "connected piece" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert config_of(organs).targets["cell"].out_channels == 14
        assert config_of(few).targets["cell"].out_channels == 6
    for count in (13, 5):
        assert (
            f"each of the {count} label values is one connected piece and is learned as a class"
            in caplog.text
        )


def test_pieces_are_those_of_a_plain_count():
    from scipy import ndimage

    for label in (nuclei(20), tissue(6)):
        counts = [ndimage.label(label == k, np.ones((3, 3)))[1] for k in np.unique(label[label > 0])]
        assert components_per_value(ArrayVolume(label)) == pytest.approx(np.mean(counts))
    assert components_per_value(ArrayVolume(nuclei(1))) is None
    without_background = tissue(6) + 1
    counts = [ndimage.label(without_background == k, np.ones((3, 3)))[1] for k in range(1, 7)]
    assert components_per_value(ArrayVolume(without_background)) == pytest.approx(np.mean(counts))


def test_numbered_objects_without_a_record_are_scored_as_instances(tmp_path, caplog):
    for part, label in (("labels", nuclei(54)), ("found", nuclei(54)[:, ::-1].copy())):
        (tmp_path / part).mkdir()
        write(tmp_path / part / "a_cell.png", label)
    evaluation = evaluate(
        EvaluateRequest(str(tmp_path / "found"), str(tmp_path / "labels"), str(tmp_path / "out"))
    )
    assert {case.kind for case in evaluation.scored} == {"instances"}
    assert "scored as instances" in caplog.text
