"""The images that unfinished jobs start from, as files: a folder for each job that has one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from PIL import Image

from engine.files.atomic import new_folder, remove_leftovers, sync

_JOB_ID = re.compile(r"video_[0-9a-f]{32}")
_FILE_NAME = "input.png"


class InputImages:
    """The input images of jobs. Every method blocks on the disk."""

    def __init__(self, folder: Path) -> None:
        """Touches no disk."""
        self._folder = folder

    def open(self, kept: Collection[str]) -> None:
        """Make the folder, and remove the images of all jobs but those in `kept`.

        Left over are images of jobs that were never committed, or that ended as the process died.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        sync(self._folder.parent)
        remove_leftovers(self._folder)
        for path in self._folder.glob("video_*"):
            if _JOB_ID.fullmatch(path.name) and path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def save(self, job_id: str, image: Image.Image) -> None:
        """Write the image of a new job; it is on disk when this returns."""
        with new_folder(self._folder / job_id, mode=0o700) as folder:
            # Lossless at any level; higher ones take seconds.
            image.save(folder / _FILE_NAME, compress_level=1)

    def load(self, job_id: str) -> Image.Image:
        """Read the image of a job."""
        with Image.open(self._folder / job_id / _FILE_NAME) as image:
            image.load()
            return image

    def remove(self, job_id: str) -> None:
        """Remove the image of a job, if there is one."""
        shutil.rmtree(self._folder / job_id, ignore_errors=True)
