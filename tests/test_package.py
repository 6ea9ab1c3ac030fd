"""A packaged model runs where only the zip file is, by MONAI's own commands."""

from __future__ import annotations

import argparse
import base64
import http.server
import json
import os
import subprocess
import sys
import sysconfig
import threading
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
import zarr
from conftest import ROOT
from data_folders import shells, write_tiff_folder
from meta_schema import SCHEMA
from prediction import save_checkpoint

from volumen.cli.main import main
from volumen.cli.running.execution import run_guarded
from volumen.cli.share import add_package_arguments, run_package
from volumen.sharing.config_text import ConfigText
from volumen.sharing.metadata import without_paths
from volumen.sharing.package import PackageRequest, package
from volumen.utils.errors import VolumenError

EXPERIMENT = {
    "tr_setup": {"model_name": "sheets"},
    "tr_config": {
        "patch_size": [16, 16, 16],
        "max_epoch": 1,
        "max_steps_per_epoch": 2,
        "max_val_steps_per_epoch": 1,
        "num_dataloader_workers": 0,
        "amp": "off",
    },
    "model_config": {"features_per_stage": [4, 8], "separate_decoders": False},
    "inference_config": {"overlap": 0.25, "dtype": "float16"},
    "auxiliary_tasks": {
        "normals": {
            "type": "surface_normals",
            "source_target": "surface",
            "losses": [{"name": "CosineSimilarityLoss"}],
        }
    },
}
# What a stranger does with the bundle, in one process that is started from another folder.
STRANGER = """
import json, sys
from pathlib import Path
import torch
from monai.bundle import ckpt_export, load, verify_metadata, verify_net_in_out
from monai.data import load_net_with_metadata

root, schema = Path(sys.argv[1]), sys.argv[2]
metadata = str(root / "configs" / "metadata.json")
verify_metadata(meta_file=metadata, filepath=schema)
for config in ("inference.json", "inference.yaml"):
    verify_net_in_out("network_def", meta_file=metadata, config_file=str(root / "configs" / config), device="cpu",
                      bundle_root=str(root))
images = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
joined = load(root.name, bundle_dir=root.parent, workflow_type="inference", device="cpu").eval()
named = load(root.name, bundle_dir=root.parent, device="cpu").eval()
with torch.inference_mode():
    assert torch.equal(joined(images), torch.cat(list(named(images).values()), dim=1))
exported = sys.argv[3] + ".ts"
ckpt_export(net_id="network_def", filepath=exported, ckpt_file=str(root / "models" / "model.pt"), meta_file=metadata,
            config_file=str(root / "configs" / "inference.json"), bundle_root=str(root))
module, told, _ = load_net_with_metadata(exported)
assert told["name"] == root.name
with torch.inference_mode():
    assert torch.allclose(module(images), joined(images), atol=1e-5)
import volumen
assert volumen.__path__ == [str(root / "scripts")], volumen.__file__
torch.save(joined(images), sys.argv[3])
"""


def environment(root: Path | None = None, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1", **({"PYTHONPATH": str(root)} if root else {}), **more}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A virtual environment that has the packages of this one, but not this program, however that is installed."""
    folder = tmp_path_factory.mktemp("stranger")
    venv.create(folder, symlinks=True)
    paths = {name: sysconfig.get_path(name, vars={"base": str(folder)}) for name in ("scripts", "purelib")}
    # The .pth files in a folder that a .pth file names are not read: an editable installation stays unseen.
    Path(paths["purelib"], "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return str(Path(paths["scripts"], "python"))


def run(python: str, *words: str, cwd: Path, root: Path | None = None, **more: str) -> str:
    command = [python, *words]
    done = subprocess.run(
        command, cwd=cwd, env=environment(root, **more), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the real training, with a preview, and its data."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_tiff_folder(folder / "data", {"scroll": {"surface": shells((24, 24, 64))}})
    experiment = folder / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(EXPERIMENT))
    words = ["train", "-i", str(data), "-o", str(folder / "out"), "--config-path", str(experiment)]
    assert main([*words, "--device", "cpu", "--quiet"]) == 0
    run_folder = folder / "out" / "sheets"
    preview = run_folder / "sheets_debug.gif"
    if not preview.is_file():
        preview.write_bytes(b"GIF89a, in place of a preview")
    return folder, run_folder / "sheets_best.pth"


@pytest.fixture(scope="module")
def bundle(trained, tmp_path_factory):
    """The run, packaged and unzipped elsewhere."""
    folder = tmp_path_factory.mktemp("elsewhere")
    report = package(PackageRequest(str(trained[1]), str(folder / "rolled.zip")))
    with zipfile.ZipFile(report.path) as archive:
        assert len(archive.namelist()) == report.files
        assert archive.testzip() is None
        archive.extractall(folder)
    return folder / "rolled"


def test_the_bundle_s_files_are_complete(bundle, trained):
    for name in (
        "LICENSE",
        "docs/README.md",
        "docs/data_license.txt",
        "models/model.pt",
        "configs/logging.conf",
    ):
        assert (bundle / name).is_file(), name
    for name in ("train", "inference", "evaluate", "multi_gpu_train", "multi_gpu_evaluate"):
        config = yaml.safe_load((bundle / "configs" / f"{name}.yaml").read_text())
        assert json.loads((bundle / "configs" / f"{name}.json").read_text()) == config
    weights = torch.load(bundle / "models" / "model.pt", weights_only=True)
    original = torch.load(trained[1], weights_only=True)["model"]
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name]) for name in weights)
    assert (bundle / "docs" / "preview.gif").read_bytes() == (
        trained[1].parent / "sheets_debug.gif"
    ).read_bytes()
    assert "(preview.gif)" in (bundle / "docs" / "README.md").read_text()
    assert not list(bundle.rglob("__pycache__"))
    code = ROOT / "bundle" / "scripts"
    files = {file.relative_to(code) for file in code.rglob("*") if file.is_file()}
    shipped = {file for file in files if "__pycache__" not in file.parts}
    assert Path("evaluation/html/templates/report.html") in shipped
    packaged = bundle / "scripts"
    assert {file.relative_to(packaged) for file in packaged.rglob("*") if file.is_file()} == shipped


def test_the_metadata_tell_of_the_run_and_nothing_of_the_machine(bundle, trained):
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata["network_data_format"]["inputs"]["image"]["value_range"] == [0, 1]
    assert list(metadata["network_data_format"]["outputs"]) == ["pred"]
    assert list(metadata["targets"]) == ["surface", "normals"]
    assert 0 <= metadata["eval_metrics"]["surface/dice"] <= 1
    training = metadata["training"]
    assert training["patch_size"] == [16, 16, 16]
    assert training["train"]["volumes"] == ["scroll"]
    assert training["train"]["voxels"] + training["val"]["voxels"] <= 24 * 24 * 64
    assert training["versions"]["torch"].startswith("2")
    for file in bundle.rglob("*"):
        if file.is_file() and file.suffix != ".py":
            assert str(trained[0]).encode() not in file.read_bytes(), file


def test_there_is_no_volumen_for_a_stranger(stranger, tmp_path):
    code = """
import importlib.util, torch
try:
    print(importlib.util.find_spec("volumen.cli.main"))
except ModuleNotFoundError:
    print(None)
"""
    assert run(stranger, "-c", code, cwd=tmp_path).strip() == "None"


def test_a_stranger_verifies_and_loads_it(stranger, bundle, trained, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    script = tmp_path / "stranger.py"
    script.write_text(STRANGER)
    said = run(
        stranger, str(script), str(bundle), str(schema), str(tmp_path / "out.pt"), cwd=tmp_path, root=bundle
    )
    assert said.count("verified with no error") == 3
    from volumen.inference.predictor import load_predictor

    images = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = torch.cat(list(load_predictor(trained[1]).network(images).values()), dim=1)
    torch.testing.assert_close(
        torch.load(tmp_path / "out.pt", weights_only=True), expected, rtol=0, atol=1e-5
    )


def test_it_predicts_by_monai_s_run_what_the_checkpoint_predicts(stranger, bundle, trained, tmp_path):
    run(
        stranger, "-m", "monai.bundle", "run", "--config_file", "configs/inference.yaml",
        "--dataset_dir", str(trained[0] / "data"), "--output_dir", str(tmp_path / "monai"),
        "--inference_config#amp", "off",
        cwd=bundle,
    )  # fmt: skip
    words = ["predict", "-i", str(trained[0] / "data"), "-m", str(trained[1]), "-o", str(tmp_path / "ours")]
    assert main([*words, "--quiet", "--amp", "off", "--device", "cpu"]) == 0
    found, expected = (
        zarr.open_group(tmp_path / name / "scroll.zarr", mode="r") for name in ("monai", "ours")
    )
    for target in ("surface", "normals"):
        assert expected[f"{target}/0"][:].any()
        assert found[f"{target}/0"].dtype == np.float16  # as the run's own inference_config says
        np.testing.assert_array_equal(found[f"{target}/0"][:], expected[f"{target}/0"][:])
    assert {path.name for path in (bundle / "models").iterdir()} == {"model.pt", "model.json"}


@pytest.mark.slow
def test_it_trains_on(stranger, bundle, trained, tmp_path):
    run(
        stranger, "-m", "monai.bundle", "run", "training", "--config_file", "configs/train.yaml",
        "--dataset_dir", str(trained[0] / "data"), "--output_dir", str(tmp_path / "out"), "--device_name", "cpu",
        cwd=bundle,
    )  # fmt: skip
    again = torch.load(tmp_path / "out" / "sheets" / "sheets_1.pth", weights_only=True)["model"]
    first = torch.load(trained[1].with_name("sheets_1.pth"), weights_only=True)["model"]
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.slow
def test_an_environment_of_the_listed_packages_alone_runs_it(bundle, trained, tmp_path):
    """What `metadata.json` lists is enough: installed by pip into a fresh environment, nothing else."""
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    pins = {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
        **metadata["required_packages_version"],
    }
    assert not [name for name, version in pins.items() if version == "any"]
    venv.create(tmp_path / "fresh", with_pip=True, symlinks=True)
    python = str(tmp_path / "fresh" / "bin" / "python")
    words = [python, "-m", "pip", "install", "--quiet", *(f"{name}=={pin}" for name, pin in pins.items())]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the packages cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    schema, script = tmp_path / "schema.json", tmp_path / "stranger.py"
    schema.write_text(json.dumps(SCHEMA))
    script.write_text(STRANGER)
    said = run(
        python, str(script), str(bundle), str(schema), str(tmp_path / "out.pt"), cwd=tmp_path, root=bundle
    )
    assert said.count("verified with no error") == 3
    run(
        python, "-m", "monai.bundle", "run", "--config_file", "configs/inference.yaml",
        "--dataset_dir", str(trained[0] / "data"), "--output_dir", str(tmp_path / "found"), cwd=bundle,
    )  # fmt: skip
    assert zarr.open_group(tmp_path / "found" / "scroll.zarr", mode="r")["surface/0"][:].any()
    run(
        python, "-m", "monai.bundle", "run", "training", "--config_file", "configs/train.yaml",
        "--dataset_dir", str(trained[0] / "data"), "--output_dir", str(tmp_path / "out"), "--device_name", "cpu",
        cwd=bundle,
    )  # fmt: skip
    assert (tmp_path / "out" / "sheets" / "sheets_1.pth").is_file()


def test_monai_fetches_weights_that_lie_elsewhere(tmp_path):
    from monai.bundle import download_large_files

    checkpoint = str(save_checkpoint(tmp_path / "m.pth"))
    elsewhere = tmp_path / "store" / "model.pt"
    package(PackageRequest(checkpoint, str(tmp_path / "far.zip"), weights_url=elsewhere.as_uri()))
    with zipfile.ZipFile(tmp_path / "far.zip") as archive:
        archive.extractall(tmp_path)
    weights = tmp_path / "far" / "models" / "model.pt"
    content = weights.read_bytes()
    elsewhere.parent.mkdir()
    weights.rename(elsewhere)
    download_large_files(bundle_path=str(tmp_path / "far"))
    assert weights.read_bytes() == content


def test_equal_runs_give_equal_files(trained, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        package(PackageRequest(str(trained[1]), str(tmp_path / name / "rolled.zip")))
    assert (tmp_path / "one" / "rolled.zip").read_bytes() == (tmp_path / "two" / "rolled.zip").read_bytes()


def test_what_is_there_is_kept_unless_told_otherwise(tmp_path):
    checkpoint = str(save_checkpoint(tmp_path / "m.pth"))
    path = tmp_path / "a.zip"
    path.write_text("precious")
    with pytest.raises(VolumenError, match="exists already; give --overwrite"):
        package(PackageRequest(checkpoint, str(path)))
    assert path.read_text() == "precious"
    package(PackageRequest(checkpoint, str(path), overwrite=True))
    assert zipfile.is_zipfile(path)


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    checkpoint = str(save_checkpoint(tmp_path / "m.pth"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("volumen.sharing.package.zip_folder", full)
    with pytest.raises(VolumenError, match=r"the disk is full, a\.zip was not written"):
        package(PackageRequest(checkpoint, str(tmp_path / "a.zip")))
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"output": "a.tar"}, "-o/--output: expected a name that ends in .zip, found a.tar"),
        ({"output": "a b.zip"}, "-o/--output: expected a name of letters, digits"),
        ({"checkpoint": "absent.pth"}, "absent.pth: no such checkpoint"),
        (
            {"data_license": "absent.txt"},
            "absent.txt: not readable as text (FileNotFoundError); check --data-license",
        ),
        ({"hf": "no-slash"}, "--hf: expected USER/NAME, found 'no-slash'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, fields, line):
    monkeypatch.chdir(tmp_path)
    given = {"checkpoint": str(save_checkpoint(tmp_path / "m.pth")), "output": "a.zip", **fields}
    with pytest.raises(VolumenError) as caught:
        package(PackageRequest(**given))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pth"]


class FakeHub:
    """Stands for the Hub's client, so that MONAI's own function runs."""

    calls: list = []  # noqa: RUF012

    def __init__(self, token=None):
        self.calls.clear()

    def create_repo(self, repo_id, private, exist_ok):
        if repo_id == "me/denied":
            raise ConnectionError("401 Client Error")
        self.calls.append(("create", repo_id, private))

    def upload_folder(self, repo_id, folder_path):
        held = sorted(p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*.*"))
        self.calls.append(("upload", held, (Path(folder_path) / "README.md").read_text()))
        return f"https://hub.example/{repo_id}"

    def create_tag(self, repo_id, tag, exist_ok):
        self.calls.append(("tag", tag))


def test_it_is_pushed_by_monai_s_function(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    checkpoint = str(save_checkpoint(tmp_path / "m.pth"))
    report = package(PackageRequest(checkpoint, str(tmp_path / "a.zip"), hf="me/a", authors="Ada"))
    assert report.url == "https://hub.example/me/a"
    (_, repository, private), (_, held, card), (_, tag) = FakeHub.calls
    assert (repository, private, tag) == ("me/a", True, "0.1.0")
    assert {"configs/metadata.json", "configs/inference.json", "models/model.pt", "README.md"} <= set(held)
    assert card.startswith("---\ntags:\n- monai")
    with zipfile.ZipFile(report.path) as archive:
        assert "a/README.md" not in archive.namelist()
    with pytest.raises(
        VolumenError, match=r"--hf me/denied: was not pushed \(ConnectionError: 401.*is complete"
    ):
        package(PackageRequest(checkpoint, str(tmp_path / "b.zip"), hf="me/denied"))
    assert zipfile.is_zipfile(tmp_path / "b.zip")


class LoopbackHub(http.server.BaseHTTPRequestHandler):
    """Answers the few requests of a push as the Hub does, and keeps what it was sent."""

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.received.append((self.path, body))
        here = f"http://127.0.0.1:{self.server.server_port}/me/a"
        said = {"url": here, "commitUrl": f"{here}/commit/1", "commitOid": "1", "success": True}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            said["files"] = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
        text = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_hub_on_loopback_receives_the_whole_bundle(tmp_path):
    pytest.importorskip("huggingface_hub")
    checkpoint = save_checkpoint(tmp_path / "m.pth")
    with http.server.HTTPServer(("127.0.0.1", 0), LoopbackHub) as server:
        server.received = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script = (
            "from volumen.sharing.package import PackageRequest, package;"
            f"print(package(PackageRequest({str(checkpoint)!r}, 'a.zip', hf='me/a')).url)"
        )
        said = run(
            sys.executable, "-c", script, cwd=tmp_path, root=ROOT / "bundle", HF_TOKEN="none",
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "hub"),
        )  # fmt: skip
        server.shutdown()
    assert "/me/a/commit/1" in said
    commits = [body for path, body in server.received if "/commit/" in path]
    entries = [json.loads(line) for body in commits for line in body.splitlines()]
    sent = {entry["value"]["path"]: entry["value"]["content"] for entry in entries if entry["key"] == "file"}
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        held = {name.removeprefix("a/"): archive.read(name) for name in archive.namelist()}
    assert set(sent) == {*held, "README.md"}
    assert all(base64.b64decode(sent[name]) == content for name, content in held.items() if content)


def test_the_command(tmp_path, caplog):
    parser = argparse.ArgumentParser()
    add_package_arguments(parser)
    checkpoint = save_checkpoint(tmp_path / "m.pth", 2, (8, 8), in_channels=3)
    options = parser.parse_args(["-m", str(checkpoint), "-o", str(tmp_path / "retina.zip")])
    caplog.set_level("INFO", logger="volumen")
    assert run_package(options) == 0
    assert "retina.zip: " in caplog.text
    with zipfile.ZipFile(tmp_path / "retina.zip") as archive:
        metadata = json.loads(archive.read("retina/configs/metadata.json"))
    assert metadata["network_data_format"]["inputs"]["image"]["spatial_shape"] == ["2*(n+1)", "2*(n+1)"]
    assert metadata["network_data_format"]["inputs"]["image"]["num_channels"] == 3
    options.verbose = options.quiet = False
    assert run_guarded(run_package, options) == 2


def test_paths_are_removed_at_any_depth():
    value = {"a": ["/home/me/x", "zyx", {"b": "C:\\data", "c": "~/data", "d": 3}], "e": None}
    assert without_paths(value) == {"a": [None, "zyx", {"b": None, "c": None, "d": 3}], "e": None}
    relative = {"tr_setup": {"checkpoint_path": "runs/old.pth", "model_name": "new"}, "mask": None}
    assert without_paths(relative) == {
        "tr_setup": {"checkpoint_path": None, "model_name": "new"},
        "mask": None,
    }


CONFIG = '# head\na: 1\n\nb:           # of b\n  c: null    # why\n\n  d: "$x"\n\n# about e\ne: {f: 4}\n'


def test_a_changed_config_keeps_its_comments_and_lines():
    config = ConfigText(CONFIG)
    assert config.text() == CONFIG
    config.update("b", {"c": [1, 2]})
    assert config.text() == CONFIG.replace("null    # why", "[1, 2]  # why")
    config.insert("g", {"h": [[1], [2]]}, before="b")
    assert config.text().index("g:") < config.text().index("b:")
    assert all(comment in config.text() for comment in ("# head", "# of b", "# why", "# about e"))
    config.update("b", {"z": 1}, only_known=True)
    assert yaml.safe_load(config.text()) == {
        "a": 1, "b": {"c": [1, 2], "d": "$x"}, "e": {"f": 4}, "g": {"h": [[1], [2]]},
    }  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [1e-5, 1e22, -0.1, 3, True, None, "off", "1e-4", "1.5", "yes", "null", "@a", "$b", "%c", "a: b", "", " x", "#1",
     [1.0e-7, "on"], {"k": [{"x": 1e-9}], "e": {}, "l": []}, "Grüße"],
)  # fmt: skip
def test_a_changed_config_is_read_as_the_same_values(value):
    config = ConfigText(CONFIG)
    config.update("b", {"c": value})
    assert yaml.safe_load(config.text())["b"]["c"] == value


def test_weights_without_their_description_are_refused(tmp_path):
    from volumen.inference.predictor import load_predictor

    weights = torch.load(save_checkpoint(tmp_path / "m.pth"), weights_only=True)["model"]
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(VolumenError, match=r"found weights alone; put the model's model\.json beside it"):
        load_predictor(tmp_path / "model.pt")
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(VolumenError, match=r"model\.json: not readable .*; get the released model again"):
        load_predictor(tmp_path / "model.pt")
