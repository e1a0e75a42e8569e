"""Finished prompts of a calibration run on disk, so that a run that was cut off can go on."""

from __future__ import annotations

import os
import zipfile
from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.errors import ConfigError
from hetero_sglang.profiler.observation import PromptObservation

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Checkpoint"]


class Checkpoint:
    """A file of observed prompts; NumPy's archive format, never pickled."""

    def __init__(self, path: Path, key: str) -> None:
        """Names the file; nothing is read or written yet.

        Args:
            path: The file.
            key: Names the run: model, prompts and settings. Only the same run may go on from it.
        """
        self._path = path
        self._key = key

    def load(self) -> dict[str, PromptObservation]:
        """Prompts finished so far by name; none if there is no file.

        Raises:
            ConfigError: The file is of another run, or damaged.
        """
        remedy = "delete it to start anew"
        try:
            with open(self._path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                if str(archive["key"]) != self._key:
                    raise ConfigError(
                        f"checkpoint {self._path} is of a run with another model, other texts or "
                        f"other settings; repeat that run's, or {remedy}"
                    )
                names = [str(name) for name in archive["names"]]
                return {
                    name: PromptObservation(
                        name, archive[f"overlaps{index}"], archive[f"similarity{index}"]
                    )
                    for index, name in enumerate(names)
                }
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(
                f"checkpoint {self._path} cannot be read ({error}); {remedy}"
            ) from error

    def store(self, finished: Mapping[str, PromptObservation]) -> None:
        """Replaces the file; readers see the old one or the new one, never a part.

        Args:
            finished: All prompts finished so far.
        """
        arrays: dict[str, np.ndarray] = {
            "key": np.array(self._key),
            "names": np.array(list(finished)),
        }
        for index, prompt in enumerate(finished.values()):
            arrays[f"overlaps{index}"] = prompt.overlaps
            arrays[f"similarity{index}"] = prompt.similarity
        self._path.parent.mkdir(parents=True, exist_ok=True)
        staging = self._path.with_name(f".{self._path.name}.new")
        with open(staging, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes ** for allow_pickle
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, self._path)
