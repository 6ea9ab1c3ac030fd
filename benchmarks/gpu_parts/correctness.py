"""Part a: results on the device against the CPU's, and a training that resumes exactly."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from gpu_parts.common import Run, blobs, phantom, relative_error, training_settings

CHANNELS = {"binary": 1, "multiclass": 3, "multilabel": 2, "distance": 1, "vector": 3, "axis": 3, "tensor": 6}
CHANNELS["field"] = 2


def run_part(run: Run) -> None:
    """Compare every piece."""
    precise = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if run.device.type == "cuda":
        # TensorFloat-32 would hide errors of our own below 1e-3.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for name, dtype in precise.items():
        run.attempt(f"network, {name}", lambda dtype=dtype: network(run, dtype))
    run.attempt("losses", lambda: losses(run))
    run.attempt("derived tasks", lambda: derived(run))
    run.attempt("augmentation", lambda: augmentation(run))
    run.attempt("prediction with blending", lambda: prediction(run))
    run.attempt("two processes", lambda: two_processes(run), 15)
    run.attempt("20 steps resume exactly", lambda: resume(run), 15)


def toy_network(run: Run) -> torch.nn.Module:
    from volumen.networks.multihead import MultiHeadDynUNet

    torch.manual_seed(0)
    heads = {name: {"out_channels": n, "separate_decoder": False} for name, n in (("a", 1), ("b", 3))}
    features = run.features[:4]
    return MultiHeadDynUNet(3, 1, heads, list(features), [1] + [2] * (len(features) - 1))


def network(run: Run, dtype: torch.dtype) -> dict[str, Any]:
    """Return relative errors of outputs and gradients; of bfloat16 against float32 on the CPU."""
    image = torch.rand(2, 1, *[16 if run.tiny else 48] * 3)
    found = {}
    for device, kind in (("cpu", torch.float32), (run.device, dtype)):
        net = toy_network(run).to(device)
        with torch.autocast(torch.device(device).type, dtype=kind, enabled=kind is not torch.float32):
            outputs = net(image.to(device))
        outputs = {name: value if torch.is_tensor(value) else value[0] for name, value in outputs.items()}
        sum(value.float().square().mean() for value in outputs.values()).backward()
        gradients = torch.cat([p.grad.flatten().float().cpu() for p in net.parameters()])
        found[str(device), kind] = torch.cat([v.float().flatten().cpu() for v in outputs.values()]), gradients
    (reference, reference_gradient), (ours, gradient) = (
        found.values() if len(found) > 1 else [*found.values()] * 2
    )
    cosine = torch.nn.functional.cosine_similarity(gradient, reference_gradient, dim=0)
    return {"outputs": relative_error(ours, reference), "gradient_cosine": float(cosine)}


def losses(run: Run) -> dict[str, Any]:
    """Return the largest relative error of value and gradient over all losses and kinds, and how many were run."""
    from volumen.losses.registry import accepted_extras, build_loss, loss_names
    from volumen.losses.trial import tiny_target
    from volumen.utils.errors import VolumenError

    worst, count, by = 0.0, 0, ""
    size = (11, 13, 17)
    for kind, channels in CHANNELS.items():
        for name in loss_names():
            random = torch.Generator().manual_seed(0)
            try:
                loss = build_loss(
                    name, kind=kind, source_kind="binary", spacing=(1.0,) * 3, channels=channels
                )
            except VolumenError:
                continue  # the loss is not for this kind
            pred = torch.randn(2, channels, *size, generator=random)
            mask = torch.rand(2, 1, *size, generator=random) > 0.2
            given: dict[str, Any] = {
                "mask": mask,
                "confidence": mask.float(),
                "certain": mask,
                "source_pred": torch.randn(2, 1, *size, generator=random),
                "source_mask": mask,
                "field": (torch.rand(2, 1, *size, generator=random) > 0.9).float(),
                "scale": (1.0,) * 3,
            }
            given = {key: value for key, value in given.items() if key in accepted_extras(loss)}
            target = tiny_target(kind, channels, size, random)
            results = []
            for device in ("cpu", run.device):
                there = pred.detach().to(device).requires_grad_()
                extras = {k: v.to(device) if torch.is_tensor(v) else v for k, v in given.items()}
                value = loss.to(device)(there, target.to(device), **extras)
                (gradient,) = torch.autograd.grad(value, there)
                results.append(torch.cat([value.detach().reshape(1).cpu(), gradient.flatten().cpu()]))
            error = relative_error(results[1], results[0])
            count += 1
            if error > worst:
                worst, by = error, f"{name} of {kind}"
    return {"losses": count, "largest_error": worst, "by": by}


def derived(run: Run) -> dict[str, Any]:
    """Return, over all tasks of the device, the largest share of voxels that differ from the workers' values."""
    from volumen.derived.registry import get_task, task_types
    from volumen.transforms.derive import DeriveTargetsd
    from volumen.transforms.derive_batch import DeriveBatch, PackSourcesd

    side = 20 if run.tiny else 64
    worst, by, count = 0.0, "", 0
    samples = [
        {"label": blobs((side,) * 3, seed, 4)[None], "in_volume": None, "spacing": (1.0,) * 3}
        for seed in (0, 1)
    ]
    for sample in samples:
        sample["label_mask"] = np.ones((1, *(side,) * 3), bool)
    for name in task_types():
        if not get_task(name).on_device:
            continue
        tasks = {name: {"type": name, "source_target": "label"}}
        if "reach" in get_task(name).defaults:
            tasks[name]["reach"] = 4.0
        derive = DeriveBatch(tasks, 4, unit="voxel")
        packed = [PackSourcesd(derive.sources)(sample) for sample in samples]
        keys = [key for key in packed[0] if key.startswith("wide/")]
        batch = {key: torch.stack([torch.as_tensor(one[key]) for one in packed]) for key in keys}
        found = derive({key: value.to(run.device) for key, value in batch.items()}, derive.host_facts(batch))
        expected = [DeriveTargetsd(tasks, 4, unit="voxel")(sample) for sample in samples]
        theirs = torch.stack([torch.as_tensor(one[name]) for one in expected])
        valid = torch.stack([torch.as_tensor(one[f"{name}_mask"]) for one in expected])
        ours = found[name].cpu()
        if name == "inplane_direction":
            ours = ours * torch.where((ours * theirs).sum(1, keepdim=True) < 0, -1.0, 1.0)
        wrong = ((ours - theirs).abs() > 2e-3).any(1, keepdim=True) & valid & found[f"{name}_mask"].cpu()
        share = float((wrong | (valid != found[f"{name}_mask"].cpu())).float().mean())
        count += 1
        if share > worst:
            worst, by = share, name
    return {"tasks": count, "largest_share": worst, "by": by}


def augmentation(run: Run) -> dict[str, Any]:
    """Return how the batches of a training differ that are augmented by workers and by the device."""
    from volumen.config.experiment_file import merge, shipped_sections
    from volumen.config.manager import ConfigManager
    from volumen.time_budget.measure import training_objects
    from volumen.transforms.deferred import collate_patches

    patch = 16 if run.tiny else 64
    data = phantom(run, 48 if run.tiny else 128)
    batches = []
    for on_device in (False, True):
        changes = {"augment_on_device": on_device, "num_dataloader_workers": 0, "derive_on_device": on_device}
        sections = merge(shipped_sections(), training_settings(run, patch, **changes))
        device = run.device if on_device else "cpu"
        config = ConfigManager(
            **sections, dataset_dir=str(data), output_dir=str(run.folder / "a"), device=str(device)
        )
        parser = training_objects(config)
        dataset = parser.get_parsed_content("train#dataset")
        samples = [dataset[(0, number)] for number in range(8)]
        batch = collate_patches(samples)
        image, targets = parser.get_parsed_content("prepare_batch")(batch, torch.device(device))
        batches.append({"image": image.cpu(), **{key: value.cpu() for key, value in targets.items()}})
    theirs, ours = batches
    shares = {
        key: float(((ours[key].float() - value.float()).abs() > 2e-3).float().mean())
        for key, value in theirs.items()
        if key not in ("image", "start")
    }
    by = max(shares, key=lambda key: shares[key])
    return {
        "image_error": float((ours["image"] - theirs["image"]).abs().max()),
        "largest_share": shares[by],
        "by": by,
    }


def prediction(run: Run) -> dict[str, Any]:
    """Return the relative error of a blended prediction."""
    from volumen.inference.windows.sliding import SlidingWindow

    side, window = (24, 16) if run.tiny else (96, 64)
    image = torch.rand(1, 1, side, side, side - 7)
    net = toy_network(run).eval()
    found = []
    with torch.inference_mode():
        for device in ("cpu", run.device):
            inferer = SlidingWindow((window,) * 3, 0.5, 2)
            found.append(inferer(image.to(device), net.to(device))["a"])
    return {"error": relative_error(found[1], found[0])}


def two_processes(run: Run) -> dict[str, Any]:
    """Return how gradients of two processes, a sample each, differ from those of both samples in one process."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _one_process, (folder, str(run.device), run.features[:2]), nprocs=2, join=True
        )
        found = torch.load(Path(folder, "gradient.pt"), weights_only=True)
    return {"backend": found["backend"], "error": relative_error(found["two"], found["one"])}


def _one_process(rank: int, folder: str, device_name: str, features: tuple[int, ...]) -> None:
    # NCCL refuses two processes on one GPU; gloo exchanges its tensors through the host.
    several = device_name.startswith("cuda") and torch.cuda.device_count() > 1
    backend = "nccl" if several else "gloo"
    device = torch.device("cuda", rank) if several else torch.device(device_name)
    if several:
        # Otherwise the barrier, which has no tensor, would meet on GPU 0 in both processes.
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv3d(1, features[0], 3, padding=1),
        torch.nn.InstanceNorm3d(features[0], affine=True),
        torch.nn.LeakyReLU(),
        torch.nn.Conv3d(features[0], 1, 1),
    ).to(device)
    samples = torch.rand(2, 1, 12, 12, 12).to(device)
    plain = torch.autograd.grad(net(samples).square().mean(), list(net.parameters()))
    wrapped = torch.nn.parallel.DistributedDataParallel(net)
    wrapped(samples[rank : rank + 1]).square().mean().backward()
    if rank == 0:
        two = torch.cat([p.grad.flatten().cpu() for p in net.parameters()])
        one = torch.cat([g.flatten().cpu() for g in plain])
        torch.save({"one": one, "two": two, "backend": backend}, Path(folder, "gradient.pt"))
    dist.barrier()
    dist.destroy_process_group()


def resume(run: Run) -> dict[str, Any]:
    """Return whether a training of two epochs ends with the same weights if its second epoch is repeated."""
    from volumen.run import train_on_folder

    data, steps = phantom(run, 48 if run.tiny else 128), 2 if run.tiny else 10
    settings = training_settings(
        run, 16 if run.tiny else 48, max_epoch=2, max_steps_per_epoch=steps, num_dataloader_workers=0
    )
    settings["tr_setup"] = {"deterministic": True}
    whole = train_on_folder(data, run.folder / "whole", settings, device=str(run.device))
    stopped = run.folder / "stopped" / whole.name
    shutil.copytree(whole, stopped)
    for name in ("model_2.pth", "model_final.pth", "model_best.pth"):
        (stopped / name).unlink(missing_ok=True)
    settings["tr_setup"] = {"deterministic": True, "resume": True}
    train_on_folder(data, run.folder / "stopped", settings, device=str(run.device))
    one, two = (torch.load(f / "model_2.pth", weights_only=True)["model"] for f in (whole, stopped))
    return {"steps": 2 * steps, "equal": all(torch.equal(one[name].cpu(), two[name].cpu()) for name in one)}
