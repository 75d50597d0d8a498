"""Where a reward's weights are: a folder, or the hub; a missing one says how to place it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..trainer.extras import require


class Weights(NamedTuple):
    """A model that a reward needs."""

    reward: str  # its name, and the option that says where the model is
    option: str
    model: str  # a folder, or an id of the hub
    files: Sequence[str]  # patterns, of each of which the folder has a file
    published: str  # the id of the hub that the reward is published with
    also: Sequence[str] = ()  # patterns of files that it may have

    @property
    def local(self) -> bool:
        return Path(self.model).expanduser().is_dir()

    def check(self) -> Weights:
        """Look at a local folder; the hub is not asked.

        Raises:
            ValueError: it is no folder and no id, or lacks files.
        """
        path = Path(self.model).expanduser()
        if not self.local and (
            path.is_absolute() or self.model.startswith((".", "~")) or self.model.count("/") != 1
        ):
            raise ValueError(
                f"`{self.option}` of the reward {self.reward} is {self.model!r}, which is no "
                f"folder; it needs one with {self.published}, or an id of the hub. {self._remedy}"
            )
        if self.local:
            self._complete(path)
        return self

    def fetch(self) -> Path:
        """The folder, downloaded if it is one of the hub.

        Raises:
            ValueError: it cannot be had, or lacks files.
        """
        self.check()
        path = Path(self.model).expanduser()
        if not self.local:
            hub = require("huggingface_hub", "rewards")
            try:
                patterns = [*self.files, *self.also]
                path = Path(hub.snapshot_download(self.model, allow_patterns=patterns))
            except Exception as error:  # every kind of a network's failure
                raise ValueError(
                    f"the reward {self.reward} needs {self.model}, which the hub does not give: "
                    f"{error}. {self._remedy}"
                ) from error
        self._complete(path)
        return path

    def _complete(self, path: Path) -> None:
        for pattern in self.files:
            if not any(path.glob(pattern)):
                raise ValueError(
                    f"`{self.option}` of the reward {self.reward} is {self.model!r}, which has no "
                    f"{pattern}; it needs what {self.published} has. {self._remedy}"
                )

    @property
    def _remedy(self) -> str:
        return (
            f"Where there is a network, `hf download {self.published} --local-dir DIR`; copy DIR "
            f"here and give reward_options=[{self.reward}.{self.option}=DIR]"
        )
