"""What the site needs beyond mkdocs.yml: the changelog as a page, and nobody else's machine.

MkDocs calls these functions by their names. With `--strict` a warning ends the build.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

_log = logging.getLogger("mkdocs.hooks.vptq")
_ASSETS = re.compile(r'<(?:link|script|img|iframe|source)\b[^>]*?\s(?:href|src)="((?:https?:)?//[^"]+)"')


def on_files(files: Any, config: Any) -> Any:
    """Adds CHANGELOG.md, which stays where people look for it."""
    from mkdocs.structure.files import File

    changelog = Path(config.config_file_path).with_name("CHANGELOG.md")
    files.append(File.generated(config, "changelog.md", content=changelog.read_text(encoding="utf-8")))
    return files


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warns of what a reader's browser would fetch from elsewhere. Links to follow are no such thing."""
    for address in _ASSETS.findall(output):
        _log.warning("%s would make a browser fetch %s", page.file.src_uri, address)
    return output
