"""What the site needs beyond mkdocs.yml: the changelog and the notebooks as pages, and nobody else's machine.

MkDocs calls the functions whose names begin with `on_`. With `--strict` a warning ends the build.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any

_log = logging.getLogger("mkdocs.hooks.vptq")
_ASSETS = re.compile(r'<(?:link|script|img|iframe|source)\b[^>]*?\s(?:href|src)="((?:https?:)?//[^"]+)"')


def on_config(config: Any) -> Any:
    """Gives the notebooks, if there are any, a place in the navigation."""
    if notebooks := sorted(Path(config.docs_dir, "notebooks").glob("*.ipynb")):
        config.nav.append({"Notebooks": [f"notebooks/{path.stem}.md" for path in notebooks]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds CHANGELOG.md, which stays where people look for it, and a page for each notebook."""
    from mkdocs.structure.files import File

    changelog = Path(config.config_file_path).with_name("CHANGELOG.md")
    pages = {"changelog.md": changelog.read_text(encoding="utf-8")}
    pages |= {
        str(PurePosixPath(file.src_uri).with_suffix(".md")): notebook_page(file.content_string)
        for file in files
        if file.src_uri.endswith(".ipynb")
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warns of what a reader's browser would fetch from elsewhere. Links to follow are no such thing."""
    for address in _ASSETS.findall(output):
        _log.warning("%s would make a browser fetch %s", page.file.src_uri, address)
    return output


def notebook_page(notebook: str) -> str:
    """A notebook in Markdown. Ours are stored without outputs, which running them gives."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook)["cells"]]
    return "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells)
