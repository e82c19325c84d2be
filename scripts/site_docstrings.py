"""The docstrings of depthmix, which use some of Sphinx's marks, as Markdown for the API reference."""

import itertools
import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([^`]+)`")
INLINE = re.compile(r":math:`([^`]+)`")
TABLE = re.compile(
    r"(?m)^( *)={3,}(?: +={3,})+\n(?:.*\n)*?\1={3,}(?: +={3,})+\n(?:(?:\1(?! *$).*\n)*\1={3,}(?: +={3,})+(?:\n|$))?"
)
BLOCK = re.compile(r"(?m)^( *)\.\. math:: *(.*)\n((?:\1 +.*\n|\s*\n(?=\1 +\S))*)")
LITERAL = re.compile(r"(?m)::\n(\s*\n)")


class Marks(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    text = ROLE.sub(lambda m: f"`{m[2].rpartition('.')[2] if m[1] else m[2]}`", text)
    text = TABLE.sub(lambda m: "\n" + _table(m[0], m[1]) + "\n", text + "\n")
    text = BLOCK.sub(
        lambda m: f"\n{m[1]}$$\n{m[1]}{' '.join([m[2], *m[3].split()]).strip()}\n{m[1]}$$\n\n", text
    )
    text = INLINE.sub(r"\\(\1\\)", text)
    text = LITERAL.sub(r":\n\1", text)
    return text.replace("``", "`").strip("\n")


def _table(text: str, indent: str) -> str:
    """A simple table of reStructuredText as one of Markdown; a line whose first cell is empty goes on with a row."""
    lines = [line[len(indent) :] for line in text.rstrip().splitlines()]
    edges = [m.span() for m in re.finditer("=+", lines[0])]
    starts = [start for start, _ in edges] + [None]
    groups: list[list[list[str]]] = [[]]
    for line in lines[1:]:
        if line.startswith("==="):
            groups.append([])
            continue
        cells = [line[a:b].strip().replace("|", "\\|") for a, b in itertools.pairwise(starts)]
        rows = groups[-1]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
    head, body = (groups[0], groups[1]) if groups[1] else ([[""] * len(edges)], groups[0])
    rule = ["---"] * len(edges)
    return "\n".join(f"{indent}| {' | '.join(row)} |" for row in [*head, rule, *body]) + "\n"
