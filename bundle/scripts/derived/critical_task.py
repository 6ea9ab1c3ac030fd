"""The derived field of critical voxels, those whose label decides the topology."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from volumen.derived.registry import DerivedTask, register_task
from volumen.utils.errors import VolumenError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from volumen.derived.batch_fields import BatchFields
    from volumen.derived.source_fields import SourceFields


@register_task
class Critical(DerivedTask):
    """Voxels whose flip merges, splits, opens or fills something, widened, see `arrays.critical.critical`.

    Key: `radius`, the voxels per axis by which they are widened (a cube). Valid where the voxels within the radius, and
    their neighbours, are known.
    """

    type_name = "critical"
    kind = "binary"
    turns = ("scalars",)
    defaults: ClassVar[Mapping[str, Any]] = {"radius": 1}

    def check(self, name: str, params: Mapping[str, Any]) -> None:
        radius = params["radius"]
        if type(radius) is not int or not 0 <= radius <= 16:
            raise VolumenError(f"{name}.radius", expected="a whole number from 0 to 16", found=repr(radius))

    def margin(self, params: Mapping[str, Any], spacing: Sequence[float]) -> tuple[int, ...]:
        return (params["radius"] + 1,) * len(spacing)

    def derive(self, source: SourceFields, params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np
        from scipy.ndimage import maximum_filter

        from volumen.derived.arrays.critical import critical

        margin = self.margin(params, source.spacing)
        known = source.known(margin)
        found = critical(source.foreground(params["classes"], margin), known, source.inside(margin))
        if params["radius"]:
            found = maximum_filter(found, 2 * params["radius"] + 1, mode="constant")
        valid = source.erode(known, margin, margin)
        values = found[source.inner(margin)] & valid
        return values[None].astype(np.float32), valid[None]

    def derive_batch(self, source: BatchFields, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        from torch.nn.functional import max_pool2d, max_pool3d

        from volumen.derived.batches.critical import critical

        margin = self.margin(params, source.spacing)
        known, radius = source.known(margin), params["radius"]
        found = critical(source.foreground(params["classes"], margin), known, source.inside(margin))
        if radius:
            pool = max_pool2d if source.ndim == 2 else max_pool3d
            found = pool(found[:, None].float(), 2 * radius + 1, stride=1, padding=radius)[:, 0] > 0
        valid = source.erode(known, margin, margin)
        values = found[(slice(None), *source.inner(margin))] & valid
        return values[:, None].float(), valid[:, None]
