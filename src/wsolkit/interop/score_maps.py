"""Score maps in files, one `.npy` for each image id, as in the benchmark of Choe et al. and its successors.

A map is [H, W], floating point, in [0, 1]. It counts as a localization map, so it is not scaled to [0, 1] again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsolkit.errors import ConfigError, DataError
from wsolkit.localization.protocol import Protocol
from wsolkit.system.drafts import draft
from wsolkit.system.names import file_name


class ScoreMaps:
    """A folder of score maps.

    Args:
        folder: holds `<image id>.npy`, see `wsolkit.system.names.file_name`. Ids may name subfolders.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def check(self, protocols: Mapping[str, Protocol]) -> None:
        """Check that the folder exists, and that maps of one size fit all of some protocols.

        Raises:
            ConfigError: the folder does not exist, or the maps do not fit.
        """
        if not self.folder.is_dir():
            raise ConfigError(
                f"score_maps: there is no folder '{self.folder}'; it should hold a .npy file for each image"
            )
        for setting in ("input", "resolution"):
            values = {name: getattr(rules, setting) for name, rules in protocols.items()}
            if len(set(values.values())) > 1:
                raise ConfigError(
                    f"the maps in '{self.folder}' have one {setting}, but these protocols differ in it: "
                    f"{', '.join(f'{name} ({value})' for name, value in values.items())}. Evaluate them one by one"
                )

    def path(self, name: str) -> Path:
        """Return the file of an image.

        Raises:
            DataError: the id leads out of the folder.
        """
        path = self.folder / file_name(name, ".npy")
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise DataError(f"image id '{name}' leads out of the folder of score maps '{self.folder}'")
        return path

    def write(self, name: str, score_map: npt.NDArray[np.float32]) -> None:
        """Write an image's map [H, W] in [0, 1]."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft(path, "wb", sync=False) as file:
            np.save(file, score_map)

    def read(self, name: str, sizes: Collection[tuple[int, int]]) -> npt.NDArray[np.floating]:
        """Read an image's map [H, W] in [0, 1].

        Args:
            name: the image's id.
            sizes: the heights and widths that it may have.

        Raises:
            DataError: the file is missing or damaged, or holds something else.
        """
        path = self.path(name)
        try:
            score_map = np.load(path, allow_pickle=False)
        except FileNotFoundError as error:
            raise DataError(f"score map '{path}' is missing: expected one .npy file for each image id") from error
        except Exception as error:  # numpy raises anything, from ValueError to BadZipFile, on a damaged file.
            raise DataError(f"score map '{path}' cannot be read as a .npy array ({error})") from error
        known = isinstance(score_map, np.ndarray) and score_map.dtype.kind == "f" and score_map.dtype.itemsize <= 8
        if not known:
            kind = getattr(score_map, "dtype", type(score_map).__name__)
            raise DataError(f"score map '{path}' is of type {kind}: expected floating point in [0, 1]")
        if score_map.shape not in sizes:
            expected = " or ".join("×".join(map(str, size)) for size in sorted(sizes))
            shape = "×".join(map(str, score_map.shape))
            raise DataError(f"score map '{path}' is {shape or 'a single number'}: expected {expected} (height×width)")
        if np.isnan(score_map).any():
            raise DataError(f"score map '{path}' holds NaN: expected values in [0, 1]")
        low, high = score_map.min(), score_map.max()
        if low < 0 or high > 1:
            raise DataError(
                f"score map '{path}' has values from {low:g} to {high:g}: expected [0, 1], min-max it first"
            )
        native: npt.NDArray[np.floating] = score_map.astype(score_map.dtype.newbyteorder("="), copy=False)
        return native
