"""What MONAI Label and the MONAI Deploy App SDK do with a bundle's folder, in their order and by their keys.

Written after their public code (MONAI Label: `tasks/infer/bundle.py`, `tasks/infer/basic_infer.py`,
`tasks/train/bundle.py`, `transform/post.py`, `transform/writer.py`; Deploy SDK:
`operators/monai_bundle_inference_operator.py`), since neither can be installed beside the tests. Nothing here imports
this project.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import monai.bundle
import numpy as np
import torch
from monai.bundle import ConfigItem, ConfigParser
from monai.data import MetaTensor, decollate_batch, partition_dataset
from monai.transforms import Compose, MapTransform, Resize, SaveImaged
from monai.utils.misc import ensure_tuple, first


def _unload(name: str) -> None:
    """MONAI Label loads the code of a bundle anew at every step."""
    for module in [m for m in sorted(sys.modules) if m == name or m.startswith(f"{name}.")]:
        del sys.modules[module]


class LabelInference:
    """`BundleInferTask` with the network of `models/model.pt`."""

    def __init__(self, path: str) -> None:
        self.path = path
        config = next(
            name for name in ("inference.json", "inference.yaml") if Path(path, "configs", name).is_file()
        )
        self.parser = ConfigParser()
        self.parser.read_config(str(Path(path, "configs", config)))
        self.parser.config.update({"bundle_root": path})
        self.parser.config["use_click"] = False
        self.network = self._get("network_def")
        metadata = json.loads(Path(path, "configs", "metadata.json").read_text())
        formats = metadata["network_data_format"]
        self.image, image = next(iter(formats["inputs"].items()))
        self.pred, pred = next(iter(formats["outputs"].items()))
        self.labels = {v.lower(): int(k) for k, v in pred["channel_def"].items() if v.lower() != "background"}
        self.dimension = len(image["spatial_shape"])

    def _get(self, name: str, device: str | None = None):
        sys.path.insert(0, self.path)
        _unload("scripts")
        if device:
            self.parser.config.update({"device": device})
            if self.parser.ref_resolver.items.get("device"):
                self.parser.ref_resolver.items["device"] = ConfigItem(config=device, id="device")
        found = self.parser.get_parsed_content(name, instantiate=True)
        sys.path.remove(self.path)
        return found

    def __call__(self, request: dict) -> dict:
        data = {"device": "cpu", **request}
        if isinstance(data["image"], str):
            data = copy.deepcopy(data)
            data["image_path"] = data["image"]
        device = data["device"]
        compose = self._get("preprocessing", device)
        for transform in list(compose.transforms) if isinstance(compose, Compose) else compose:
            data = transform(data)
        inferer = self._get("inferer", device)
        network = copy.deepcopy(self.network).to(torch.device(device))
        checkpoint = torch.load(Path(self.path, "models", "model.pt"), map_location=torch.device(device))
        network.load_state_dict(checkpoint.get("model", checkpoint), strict=False)
        network.eval()
        inputs = data["image"]
        inputs = inputs if torch.is_tensor(inputs) else torch.from_numpy(inputs)
        with torch.no_grad():
            outputs = inferer(inputs[None].to(torch.device(device)), network)
        data["pred"] = decollate_batch(outputs)[0] if isinstance(outputs, dict) else outputs[0]
        compose = self._get("postprocessing", device)
        for transform in [t for t in compose.transforms if not isinstance(t, SaveImaged)]:
            data = transform(data)
        return self._written(self._restored(data))

    def _restored(self, data: dict) -> dict:
        """`Restored(keys=key_pred, ref_image=key_image)`."""
        reference = data[self.image]
        meta = (
            reference.meta if isinstance(reference, MetaTensor) else data.get(f"{self.image}_meta_dict", {})
        )
        result = data[self.pred]
        size = result.shape[1:]
        wanted = meta.get("spatial_shape", size)[-len(size) :]
        if np.any(np.not_equal(size, wanted)):
            result = Resize(spatial_size=wanted, mode="nearest")(result, mode="nearest")
        data[self.pred] = result if result.ndim <= 3 else result[0] if result.shape[0] == 1 else result
        data.setdefault(f"{self.pred}_meta_dict", {})["affine"] = meta.get("original_affine")
        return data

    def _written(self, data: dict) -> dict:
        """`Writer(label="pred")`: the array, in the order X, Y, Z, and the affine of the file."""
        label = data["pred"]
        affine = (data.get("pred_meta_dict") or {}).get("affine")
        if affine is None and isinstance(label, MetaTensor):
            affine = label.affine
        array = label.array if isinstance(label, MetaTensor) else np.asarray(label)
        return {"label": array, "affine": np.asarray(affine), "data": data}


class LabelTraining:
    """`BundleTrainTask` on one device."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = next(
            str(Path(path, "configs", name))
            for name in ("train.json", "train.yaml")
            if Path(path, "configs", name).is_file()
        )
        self.parser = ConfigParser()
        self.parser.read_config(self.file)
        self.parser.config.update({"bundle_root": path})

    def __call__(self, datalist: list[dict], request: dict, **more) -> None:
        share = request.get("val_split", 0.2)
        train, val = datalist, None if share < 0 else []
        if share > 0:
            train, val = partition_dataset(datalist, ratios=[1 - share, share], shuffle=False)
        handlers = self.parser.get("train#handlers", [])
        weights = Path(self.path, "models", "model.pt")
        if request.get("pretrained", True) and weights.is_file():
            handlers.insert(
                0,
                {
                    "_target_": "CheckpointLoader",
                    "load_path": str(weights),
                    "load_dict": {"model": "$@network"},
                    "strict": False,
                },
            )
        overrides = {
            "bundle_root": self.path,
            "train#trainer#max_epochs": request.get("max_epochs", 50),
            "train#dataset#data": train,
            "device": request.get("device", "cpu"),
            "train#handlers": handlers,
        }
        if val is not None:
            overrides["validate#dataset#data"] = val
        sys.path.insert(0, self.path)
        _unload("scripts")
        monai.bundle.run(
            run_id="run",
            init_id=None,
            final_id=None,
            meta_file=str(Path(self.path, "configs", "metadata.json")),
            config_file=self.file,
            **overrides,
            **more,
        )
        sys.path.remove(self.path)


class DeployOperator:
    """`MonaiBundleInferenceOperator` with a bundle in a folder."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if path not in sys.path:
            sys.path.insert(0, path)
        self.parser = ConfigParser()
        self.parser.read_meta(f=json.loads((self.path / "configs" / "metadata.json").read_text()))
        config = next(
            self.path / "configs" / f"inference{suffix}"
            for suffix in (".json", ".yaml")
            if (self.path / "configs" / f"inference{suffix}").is_file()
        )
        self.parser.read_config([config])
        self.parser.parse()
        self.device = self.parser.get_parsed_content("device")
        self.inferer = self.parser.get_parsed_content("inferer")
        formats = self.parser["_meta_"]["network_data_format"]
        self.inputs, self.outputs = formats["inputs"], formats["outputs"]
        self.preprocessing = self._compose("preprocessing")
        self.postprocessing = self._compose("postprocessing")
        self.network = self._network()

    def _compose(self, name: str) -> Compose:
        compose = self.parser.get_parsed_content(name)
        names = [type(transform).__name__ for transform in compose.transforms]
        compose.transforms = tuple(
            transform
            for transform, own in zip(compose.transforms, names)
            if "LoadImage" not in own and "SaveImage" not in own
        )
        return compose

    def _network(self) -> torch.nn.Module:
        network = (
            self.parser.get_parsed_content("network") if self.parser.get("network") is not None else None
        )
        if network is None:
            network = self.parser.get_parsed_content("network_def").to(self.device)
        checkpoint = torch.load(str(self.path / "models" / "model.pt"), map_location=self.device)
        state = checkpoint
        for key in ("state_dict", "model"):
            if isinstance(checkpoint.get(key), dict):
                state = checkpoint[key]
                break
        network.load_state_dict(state, strict=True)
        return network.eval()

    def __call__(self, image: np.ndarray, affine: np.ndarray) -> dict[str, np.ndarray]:
        """Run on a DICOM series.

        Args:
            image: (D, H, W), as the SDK keeps it.
            affine: of the axes W, H, D.
        """
        array = np.swapaxes(image, 0, 2)
        meta = {
            "original_affine": affine,
            "affine": affine.copy(),
            "spatial_shape": np.asarray(array.shape),
            "original_channel_dim": "no_channel",
        }
        name = first(self.inputs)
        with torch.no_grad():
            inputs = {name: MetaTensor.ensure_torch_and_prune_meta(torch.from_numpy(array.copy()), meta)}
            inputs = self._pre_process(inputs)
            kept = inputs[name]
            outputs = self.inferer(inputs=inputs.pop(name)[None].to(self.device), network=self.network)
            inputs[name] = kept
            outputs = self._post_process(ensure_tuple(outputs)[0], inputs)
        return {output: self._sent(outputs[output]) for output in self.outputs}

    def _pre_process(self, data: dict) -> dict:
        if isinstance(first(self.preprocessing.transforms), MapTransform):
            return self.preprocessing(data)
        return {key: self.preprocessing(value) for key, value in data.items()}

    def _post_process(self, data, inputs: dict) -> dict:
        if isinstance(first(self.postprocessing.transforms), MapTransform):
            outputs = data if isinstance(data, dict) else {first(self.outputs): data}
            outputs.update(inputs)
            return self.postprocessing(outputs)
        return {first(self.outputs): self.postprocessing(data)}

    @staticmethod
    def _sent(value) -> np.ndarray:
        array = value.cpu().numpy() if isinstance(value, torch.Tensor) else value
        return np.swapaxes(np.squeeze(array, 0), 0, 2).astype(np.uint8)
