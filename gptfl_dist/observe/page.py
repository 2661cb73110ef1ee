"""A page for people that needs nothing but itself.

No script, no font and no picture from elsewhere: figures are inside the page as data, and its content security policy
forbids everything else. What these functions are given is HTML already, unless it is said otherwise.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from gptfl_dist.observe.style import STYLE

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, kicker: str, headline: str, facts: str, parts: Iterable[str]) -> str:
    """The whole page; `title` and `headline` are plain text, empty parts are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<p class="kicker">{kicker}</p>\n<h1>{escape(headline)}</h1>\n'
        f'<p class="facts">{facts}</p>\n</header>\n' + "\n".join(part for part in parts if part) + "\n"
        "</main>\n</body>\n</html>\n"
    )


def section(name: str, title: str, *content: str) -> str:
    return f'<section id="{name}">\n<h2>{title}</h2>\n' + "\n".join(content) + "\n</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; the first column is the rows' heading."""
    heading = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    whole = f'<table class="{kind}"><thead><tr>{heading}</tr></thead>\n<tbody>{body}</tbody></table>'
    return f'<div class="scroll">{whole}</div>'


def figure(mime: str, data: bytes, alt: str, caption: str) -> str:
    source = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img src="{source}" alt="{escape(alt)}"><figcaption>{caption}</figcaption></figure>'
