"""The documentation as a site: what pages link to outside ``docs/`` goes along, as files of the site.

The pages under ``docs/`` are read in the repository too, where ``../results/x.json`` leads to a file. In the site the
same link leads to a copy under ``repository/``. A link to a folder leads to its README, or is text where it has none.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)]*)?\)")
PAGES = {"changelog.md": ROOT / "CHANGELOG.md"}


def on_files(files, config):
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=source.read_text(encoding="utf-8")))
    for page in list(files.documentation_pages()):
        for _, target, _ in LINK.findall(page.content_string):
            source = _source(page.src_uri, target)
            if source is not None and files.get_file_from_path(_copy(source)) is None:
                files.append(File.generated(config, _copy(source), content=source.read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    def replace(match):
        label, target, _ = match.groups()
        source = _source(page.file.src_uri, target)
        if source is None:
            return label
        return f"[{label}]({posixpath.relpath(_copy(source), posixpath.dirname(page.file.src_uri) or '.')})"

    return LINK.sub(replace, markdown)


def _source(page: str, target: str) -> Path | None:
    """The file of the repository that ``target`` on ``page`` is, or ``None`` for a folder without README."""
    path = (ROOT / "docs" / page).parent.joinpath(target).resolve()
    if not path.is_relative_to(ROOT) or not path.exists():
        raise PluginError(f"docs/{page} links to {target}, which is not there")
    if path.is_dir():
        path = path / "README.md"
    return path if path.is_file() else None


def _copy(source: Path) -> str:
    # Of other kinds than a browser shows, and pages of their own, as plain text.
    shown = source.suffix in (".json", ".jsonl", ".png", ".html", ".pdf", ".txt", ".npz")
    return f"repository/{source.relative_to(ROOT).as_posix()}{'' if shown else '.txt'}"
