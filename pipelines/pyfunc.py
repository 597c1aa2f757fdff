"""The registered model as MLflow loads it: this file is stored with the version and run from there.

    model = mlflow.pyfunc.load_model("models:/nafnet-deblur@champion")
    restored = model.predict(rgb_hwc_u8)

It needs `nafnet_core` only, which is stored beside it. Nothing is pickled.
"""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
from numpy.typing import NDArray

from nafnet_core import load_model
from nafnet_core.tiling import MAX_TILE_PX, TileOptions, restore_images


class DeblurModel(mlflow.pyfunc.PythonModel):
    """uint8 (H, W, 3) RGB in, the same out; fp32, tiles of up to 1024 px.

    On one machine with as many threads these are the pixels of `nafnet restore --precision fp32`, whose tiles
    are of 1024 px too where memory allows.
    """

    def load_context(self, context: Any) -> None:
        """Load the weights that lie beside this file."""
        self._model, metadata = load_model(context.artifacts["weights"])
        self._train_patch_px = metadata.get("train_patch_px")

    # No type hint on `model_input`: MLflow would take it for its own input validation.
    def predict(self, context: Any, model_input, params: dict[str, Any] | None = None) -> NDArray[np.uint8]:  # noqa: ANN001
        """Restore one image."""
        image = np.asarray(model_input, dtype=np.uint8)
        # Pinned, so that the answer does not depend on what else the machine does.
        options = TileOptions(train_patch_px=self._train_patch_px, tile_px=MAX_TILE_PX, guard=True)
        (result,) = restore_images(self._model, [image], options)
        return result.restored  # type: ignore[return-value]


# MLflow's contract for models stored as code.
mlflow.models.set_model(DeblurModel())
