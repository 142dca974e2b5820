"""What mkdocs does beside building docs/: files of the repository that a page links to come along."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")  # a link from docs/ to a file beside it
FOLDER = "repository"  # of the site, where these files are


def on_files(files, config):
    """Add each file outside docs/ that a page links to. A page shows it where it is Markdown."""
    pages = [ROOT / "docs" / file.src_uri for file in files if file.src_uri.endswith(".md")]
    for path in sorted({link for page in pages for link in OUTSIDE.findall(page.read_text(encoding="utf-8"))}):
        content = (ROOT / path).read_bytes()
        files.append(File.generated(config, f"{FOLDER}/{path}", content=content))
    return files


def on_page_markdown(markdown, page, **_):
    """Links to such files lead to where they are in the site."""
    return OUTSIDE.sub(rf"]({FOLDER}/\1", markdown) if "/" not in page.file.src_uri else markdown
