"""Links of pages to files outside docs/ (code, results): to the repository where it is known, else plain text."""

import re
from posixpath import normpath

OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]*)[^)]*\)")


def on_page_markdown(markdown, page, config, files):
    """Called by mkdocs for every page, before links are checked."""

    def instead(match):
        text, path = match[1], normpath(f"docs/{match[2]}")
        if not config.repo_url:
            return f"{text} (`{path}`)" if path not in text else text
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"

    return OUTSIDE.sub(instead, markdown)
