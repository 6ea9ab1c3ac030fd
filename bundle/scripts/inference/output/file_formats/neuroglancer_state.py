"""States of Neuroglancer: the layers that show an image, what was predicted of it, and instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from volumen.data.space.units import factor

BASE = "http://127.0.0.1:8000"
"""Address that a state file names; replace it by that of the server with the folder's files."""

_GREY = "#uicontrol invlerp normalized\nvoid main() {\n  emitGrayscale(normalized());\n}\n"
_COLOURS = (
    "#uicontrol invlerp red(channel=[0])\n#uicontrol invlerp green(channel=[1])\n#uicontrol invlerp blue(channel=[2])\n"
    "void main() {\n  emitRGB(vec3(red(), green(), blue()));\n}\n"
)
_PROBABILITY = (
    '#uicontrol vec3 tint color(default="#ff5a00")\n#uicontrol invlerp normalized(range=[%s, %s])\n'
    "void main() {\n  emitRGBA(vec4(tint, normalized()));\n}\n"
)
_DISTANCE = (
    "#uicontrol float reach slider(min=0.5, max=64, default=16)\n"
    "void main() {\n  float v = clamp(float(getDataValue()) / reach, -1.0, 1.0);\n"
    "  vec3 side = v < 0.0 ? vec3(0.1, 0.3, 0.8) : vec3(0.8, 0.2, 0.1);\n"
    "  emitRGB(mix(vec3(1.0), side, abs(v)));\n}\n"
)
_VECTOR = "void main() {\n  emitRGB(vec3(%s));\n}\n"  # the size of each component as red, green and blue


@dataclass(frozen=True)
class LayerContent:
    """What a layer shows.

    Args:
        kind: "image", or the kind of a head (`windows.heads.KINDS`), or "labels".
        channels: number of channels.
        largest: value that is 1 of a probability (255 if stored in 8 bits).
    """

    kind: str
    channels: int = 1
    largest: float = 1.0


def layer(name: str, source: str, content: LayerContent) -> dict[str, Any]:
    """Return the entry of a layer: vectors as colours, distances diverging around 0, probabilities as a tint.

    Args:
        name: name of the layer.
        source: URL of the data with the name of its format, such as "precomputed://http://...".
        content: what it shows.
    """
    if content.kind in ("labels", "instances"):
        return {"type": "segmentation", "name": name, "source": source}
    return {
        "type": "image",
        "name": name,
        "source": source,
        "shader": _shader(content),
        "opacity": 1.0 if content.kind == "image" else 0.5,
    }


def _shader(content: LayerContent) -> str:
    if content.kind == "image":
        return _COLOURS if content.channels == 3 else _GREY
    if content.kind == "distance" and content.channels == 1:
        return _DISTANCE
    if content.kind in ("vector", "axis") and content.channels in (2, 3):
        parts = [f"abs(float(getDataValue({channel})))" for channel in range(content.channels)]
        return _VECTOR % ", ".join([*parts, "0.0"][:3])
    if content.kind in ("binary", "multiclass", "multilabel"):
        return _PROBABILITY % (0, f"{content.largest:g}")
    return _GREY


def viewer_state(
    layers: Sequence[Mapping[str, Any]],
    spacing: Sequence[float],
    unit: str | None,
    centre: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return the state of a viewer.

    Args:
        layers: entries of `layer`, the lowest first.
        spacing: voxel size of the coordinates, in the order of the array's axes.
        unit: unit of the spacing; None counts as nanometers, as in the precomputed format.
        centre: position, in voxels, in the order of the array's axes; None: chosen by Neuroglancer.
    """
    metres = factor(unit, "meter") if unit is not None else None
    sizes = [size * (metres or 1e-9) for size in spacing]
    sizes = [*[sizes[0]] * (3 - len(sizes)), *sizes]
    state: dict[str, Any] = {
        "dimensions": {axis: [size, "m"] for axis, size in zip("xyz", sizes[::-1], strict=True)},
        "layers": list(layers),
        "layout": "4panel" if len(spacing) == 3 else "xy",
        "selectedLayer": {"visible": True, "layer": layers[-1]["name"]} if layers else {},
    }
    if centre is not None:
        state["position"] = [*centre[::-1], *[0.5] * (3 - len(centre))]
    return state
