"""Gives package indexes a README whose links work there: they show it without the files beside it."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

HOME = "github.com/sidelight-attribution/sidelight"
RELATIVE = re.compile(r"(?P<image>!?)\[(?P<text>.*?)\]\((?P<path>(?!https?:|#).+?)\)")


class AbsoluteLinks(MetadataHookInterface):
    """Takes README.md as the description, with its relative links leading to the files of the release's tag."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the field `readme`."""
        tag = f"v{metadata['version']}"
        places = {
            "!": f"https://raw.{HOME.replace('github', 'githubusercontent')}/{tag}",
            "": f"https://{HOME}/blob/{tag}",
        }
        text = RELATIVE.sub(
            lambda link: f"{link['image']}[{link['text']}]({places[link['image']]}/{link['path']})",
            (Path(self.root) / "README.md").read_text(encoding="utf-8"),
        )
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
