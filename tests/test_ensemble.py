"""An ensemble is the mean of its members' blended outputs, to the last bit, and streams like one network."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
import zarr
from prediction import make_predictor, save_checkpoint

import volumen
from volumen.cli.main import main
from volumen.data.formats.volumes import ArrayVolume
from volumen.inference.blocks import block_maker
from volumen.inference.ensemble import find_members, join, load_model
from volumen.inference.jobs import Job
from volumen.inference.placing import Placing, fits
from volumen.inference.predict import predict_volume
from volumen.inference.predictor import WindowNetwork, predict_array
from volumen.inference.record.reproduce import provenance_of
from volumen.inference.request import PredictRequest
from volumen.inference.windows.joining import BlockJoiner
from volumen.inference.windows.plan import PredictPlan
from volumen.inference.windows.stream import count_needed, interleaved
from volumen.utils.errors import VolumenError

PROBABILITIES = {"ink": (1, "sigmoid", "binary"), "tissue": (3, "softmax", "multiclass")}


def request_for(output, **settings):
    plain = {"input": "", "checkpoint": "", "output": str(output), "dtype": "float32", "amp": "off"}
    return PredictRequest(**{**plain, **settings})


def run(predictor, image, folder, **settings):
    """Predict a raw image (C, *space) streamed; return the stored arrays by target."""
    volume = ArrayVolume(image, axes="c" + "zyx"[-(image.ndim - 1) :])
    predict_volume(predictor, Job(volume, folder), request_for(folder, **settings))
    return {n: zarr.open_array(folder / n / "0", mode="r")[...] for n in predictor.targets}


def members(patches, heads, in_channels=1):
    ndim = len(patches[0])
    return [
        replace(
            make_predictor(ndim, patch, heads, in_channels, seed=number),
            checksum=str(number),
            path=f"member_{number}.pth",
        )
        for number, patch in enumerate(patches)
    ]


def image_of(shape, channels=1):
    return np.random.default_rng(0).integers(0, 256, (channels, *shape), dtype=np.uint8)


CASES = [
    ((20, 23, 31), [(8, 8, 8)] * 3, {}),
    ((20, 23, 31), [(8, 8, 8), (16, 8, 4), (4, 12, 16)], {"batch_size": 3}),
    ((5, 40, 9), [(8, 16, 8), (4, 8, 8)], {"overlap": 0.3}),
    ((37, 41), [(16, 8), (8, 8)], {"overlap": 0.7, "tta": "mirror"}),
    ((21, 19, 18), [(8, 8, 8), (12, 8, 8)], {"region": ((3, 17), (None, None), (5, 12))}),
]


@pytest.mark.parametrize(("shape", "patches", "settings"), CASES)
def test_the_mean_of_the_members_logits_to_the_last_bit(shape, patches, settings, tmp_path):
    image = image_of(shape)
    scalars = make_predictor(len(shape), patches[0], PROBABILITIES).targets
    raw = [replace(m, targets={n: replace(scalars[n], activation="none", kind="distance") for n in scalars})
           for m in members(patches, PROBABILITIES)]  # fmt: skip
    alone = [run(m, image, tmp_path / f"member_{k}.zarr", **settings) for k, m in enumerate(raw)]
    together = run(join(raw), image, tmp_path / "logits.zarr", **settings)
    probabilities = run(join(members(patches, PROBABILITIES)), image, tmp_path / "ensemble.zarr", **settings)
    for name in scalars:
        mean = np.stack([found[name] for found in alone]).mean(axis=0, dtype=np.float32)
        assert together[name].tobytes() == mean.tobytes()
        decoded = scalars[name].decode(torch.from_numpy(mean)).numpy()
        # The activation is computed block by block, whose last bit depends on the vector length.
        np.testing.assert_allclose(probabilities[name], decoded, rtol=0, atol=2e-7)
    assert provenance_of(tmp_path / "ensemble.zarr")["model"]["members"][1]["patch_size"] == list(patches[1])


def test_predict_array_is_the_streamed_prediction(tmp_path):
    image = image_of((18, 21, 16), 2)
    ensemble = join(members([(8, 8, 8), (8, 8, 16)], PROBABILITIES, in_channels=2))
    streamed = run(ensemble, image, tmp_path / "out.zarr")
    for name, values in predict_array(ensemble, image).items():
        np.testing.assert_allclose(values.reshape(streamed[name].shape), streamed[name], atol=1e-5)


class Fixed(torch.nn.Module):
    """Gives the same values everywhere, whatever it sees."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.ParameterDict(
            {n: torch.tensor(v, dtype=torch.float32) for n, v in values.items()}
        )

    def forward(self, x, targets=None):
        shape = x.shape[2:]
        return {
            n: self.values[n].reshape(1, -1, *[1] * len(shape)).expand(len(x), -1, *shape) for n in targets
        }


def test_vectors_tensors_and_directions_are_averaged_by_their_kinds(tmp_path):
    heads = {
        "normals": (3, "none", "vector"),
        "direction": (3, "none", "axis"),
        "tensor": (6, "none", "tensor"),
    }
    values = [
        {"normals": [1.0, 0, 0], "direction": [0.6, 0.8, 0], "tensor": [1.0, 2, 3, 4, 5, 6]},
        # A direction has no sign: the opposite one is the same, and must not cancel the first.
        {"normals": [0, 5.0, 0], "direction": [-0.6, -0.8, 0], "tensor": [3.0, 2, 1, 0, -1, -2]},
    ]
    both = [replace(m, network=Fixed(v)) for m, v in zip(members([(8, 8, 8)] * 2, heads), values)]
    found = run(join(both), image_of((9, 10, 11)), tmp_path / "out.zarr")
    here = (slice(None), 4, 4, 4)
    np.testing.assert_allclose(found["normals"][here], [np.sqrt(0.5), np.sqrt(0.5), 0], atol=1e-6)
    np.testing.assert_allclose(found["direction"][here], [0.6, 0.8, 0], atol=1e-5)
    np.testing.assert_allclose(found["tensor"][here], [2.0] * 6, atol=1e-6)


def test_an_interrupted_ensemble_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    image = image_of((24, 24, 40))
    make = lambda: join(members([(8, 8, 8), (16, 8, 8)], PROBABILITIES))  # noqa: E731
    whole = run(make(), image, tmp_path / "whole.zarr")
    calls, real = [], WindowNetwork.__call__

    def dies(self, windows):
        calls.append(1)
        if len(calls) == 90:
            raise KeyboardInterrupt
        return real(self, windows)

    with monkeypatch.context() as patched:
        patched.setattr(WindowNetwork, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            run(make(), image, tmp_path / "part.zarr")
    done = len(calls)
    again = run(make(), image, tmp_path / "part.zarr")
    assert done == 90
    for name, values in whole.items():
        assert again[name].tobytes() == values.tobytes()


def test_blocks_that_wait_go_to_a_file_and_are_the_same(tmp_path, monkeypatch):
    image = image_of((40, 24, 24))
    patches = [(8, 8, 8), (20, 24, 12)]
    whole = run(join(members(patches, PROBABILITIES)), image, tmp_path / "whole.zarr")
    spilled = []
    real = BlockJoiner.close

    def close(self):
        spilled.append(self._spill is not None)
        real(self)

    monkeypatch.setattr(block_maker, "PARTIAL_SUMS_BYTES", 1)
    monkeypatch.setattr(BlockJoiner, "close", close)
    small = run(join(members(patches, PROBABILITIES)), image, tmp_path / "small.zarr")
    assert spilled == [True]
    for name, values in whole.items():
        assert small[name].tobytes() == values.tobytes()


@pytest.mark.parametrize("run_length", [1, 5])
def test_members_advance_alike_and_each_in_its_own_order(run_length):
    block = (8, 8)
    plans = [
        PredictPlan((64, 64), (16, 16), 0.5, block_shape=block),
        PredictPlan((64, 64), (32, 8), 0.5, block_shape=block, batch_size=4),
    ]
    done = np.zeros(plans[0].blocks, bool)
    done[:3] = True
    jobs = list(interleaved(plans, done, run_length))
    totals = [count_needed(plan, done) for plan in plans]
    settled = [0, 0]
    for lane, batch in jobs:
        settled[lane] += len(batch)
        shares = [s / t for s, t in zip(settled, totals)]
        assert abs(shares[0] - shares[1]) <= run_length * 4 / min(totals) + 1e-9
    assert settled == totals
    for lane in range(2):
        own = [batch.start for number, batch in jobs if number == lane]
        assert own == sorted(own)


def test_a_skipped_window_of_one_member_is_empty(tmp_path):
    image = image_of((16, 16, 48))
    image[..., 16:] = 7
    both = members([(8, 8, 8), (8, 8, 16)], PROBABILITIES)
    found = run(join(both), image, tmp_path / "out.zarr")
    alone = run(both[0], image, tmp_path / "alone.zarr")
    assert (found["ink"][..., 24:] == 0).all()
    assert (alone["ink"][..., 24:] == 0).all()
    assert (found["ink"][..., :16] > 0).all()


def test_weights_are_held_or_moved_in_turn(tmp_path, monkeypatch):
    both = members([(8, 8, 8)] * 2, PROBABILITIES)
    device = torch.device("cpu")
    assert fits(both, device)
    assert Placing(both, device).run == 1
    moves = []
    real = torch.nn.Module.to

    def to(self, *where, **kw):
        moves.append(str(where[0]) if where else "")
        return real(self, *where, **kw)

    image = image_of((16, 16, 24))
    held = run(join(both), image, tmp_path / "held.zarr")
    monkeypatch.setattr(
        block_maker, "Placing", lambda networks, device: Placing(networks, device, held=False)
    )
    monkeypatch.setattr(torch.nn.Module, "to", to)
    moved = run(join(both), image, tmp_path / "moved.zarr")
    windows = len(PredictPlan((16, 16, 24), (8, 8, 8), 0.5))
    assert 3 <= len(moves) <= 2 * 2 * (windows // 32 + 1)
    for name, values in held.items():
        assert moved[name].tobytes() == values.tobytes()
    # What a GPU has room for decides.
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    assert not fits(both, gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 2 * 10**9))
    assert fits(both, gpu)


# ---------------------------------------------------------------------------------------------- members and folders


def test_members_that_do_not_fit_together():
    one = members([(8, 8, 8)] * 2, PROBABILITIES)
    cases = [
        (members([(8, 8)], PROBABILITIES)[0], "expected 3 dimensions, as member_0.pth has, found 2"),
        (members([(8, 8, 8)], PROBABILITIES, in_channels=2)[0], "expected 1 image channels"),
        (
            make_predictor(3, (8, 8, 8), {"ink": (1, "sigmoid", "binary")}),
            "the targets ink, tissue.*found ink",
        ),
        (
            make_predictor(3, (8, 8, 8), {**PROBABILITIES, "tissue": (4, "softmax", "multiclass")}),
            "target tissue: multiclass, 3 channels, softmax",
        ),
    ]
    for other, said in cases:
        with pytest.raises(VolumenError, match=said):
            join([one[0], other])
    with pytest.raises(VolumenError, match=r"member_0.pth is given twice"):
        join([one[0], one[0]])


def test_folders_stand_for_their_checkpoints(tmp_path):
    folder = tmp_path / "model"
    for number in range(3):
        fold = folder / f"fold_{number}"
        fold.mkdir(parents=True)
        for epoch in (9, 10):
            (fold / f"fold_{number}_{epoch}.pth").write_bytes(b"")
    (folder / "fold_1" / "fold_1_best.pth").write_bytes(b"")
    (folder / "ensemble.json").write_text(json.dumps({"members": ["fold_0", "fold_1", "fold_2"]}))
    names = ["fold_0_10.pth", "fold_1_best.pth", "fold_2_10.pth"]
    assert [path.name for path, _ in find_members(folder)] == names
    assert [path.name for path, _ in find_members(folder / "ensemble.json")] == names
    assert [path.name for path, _ in find_members(folder / "fold_1")] == ["fold_1_best.pth"]
    chosen = {"members": ["fold_2/fold_2_9.pth", "fold_0"], "inference_config": {"tta": "mirror"}}
    (folder / "selection.json").write_text(json.dumps(chosen))
    assert [(p.name, s) for p, s in find_members(folder)] == [
        ("fold_2_9.pth", {"tta": "mirror"}),
        ("fold_0_10.pth", {"tta": "mirror"}),
    ]
    (folder / "selection.json").unlink()
    for path in (folder / "fold_2").iterdir():
        path.unlink()
    with pytest.raises(
        VolumenError, match=r"expected 3 trained networks, found none at .*fold_2; give the same"
    ):
        find_members(folder)
    with pytest.raises(VolumenError, match="holds no checkpoint"):
        find_members(tmp_path)
    (folder / "ensemble.json").write_text("{}")
    with pytest.raises(VolumenError, match="expected a list of members"):
        find_members(folder)


def test_the_command_averages_several_models_and_repeats_itself(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tifffile.imwrite(tmp_path / "a.tif", image_of((12, 14, 16))[0])
    paths = []
    for k in range(2):
        (tmp_path / f"m{k}").mkdir()
        paths.append(save_checkpoint(tmp_path / f"m{k}" / f"m{k}_1.pth", seed=k))
    words = [
        "predict",
        "-i",
        str(tmp_path / "a.tif"),
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--amp",
        "off",
    ]
    assert (
        main([*words, "-m", str(tmp_path / "m0"), "-m", str(paths[1]), "-o", str(tmp_path / "out.zarr")]) == 0
    )
    found = zarr.open_array(tmp_path / "out.zarr" / "ink" / "0", mode="r")[...]
    model = volumen.load([tmp_path / "m0", paths[1]])
    direct = volumen.predict_array(model, tifffile.imread(tmp_path / "a.tif"))["ink"]
    np.testing.assert_allclose(found, direct[0], atol=1e-5)
    again = ["predict", "--like", str(tmp_path / "out.zarr"), "-o", str(tmp_path / "again.zarr")]
    assert main(again) == 0
    repeated = zarr.open_array(tmp_path / "again.zarr" / "ink" / "0", mode="r")[...]
    assert repeated.tobytes() == found.tobytes()


def test_a_choice_of_settings_goes_with_its_members(tmp_path):
    save_checkpoint(tmp_path / "m_1.pth")
    (tmp_path / "selection.json").write_text(
        json.dumps({"members": ["m_1.pth"], "inference_config": {"tta": "mirror", "min_size": 7}})
    )
    model = load_model(tmp_path)
    assert model.config["inference_config"]["min_size"] == 7
