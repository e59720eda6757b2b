"""The source text in NVIDIA's snapshots, compared with what was published and never run.

A file of a changed copy of their code carries the changed text. What is compared is a hash of a definition's tokens, so
that comments and spaces do not count.
"""

from __future__ import annotations

import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator
from keyword import iskeyword

SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
LONGEST = 2**20
"""Characters of a source text; the published ones have 36,000."""
FSTRING_START, FSTRING_END = (getattr(tokenize, name, -1) for name in ("FSTRING_START", "FSTRING_END"))
"""Python 3.12 and later split an f-string into tokens; here it stays one, as before."""

IMPORTS = "imports"
INITIAL = "weight_init"
"""The function that gives weights their first values, which the file replaces."""

PUBLISHED: tuple[dict[str, tuple[str, ...]], ...] = (
    {  # NVlabs/edm, training/networks.py, both versions
        IMPORTS: ("404eb084fa464cd4",),
        "Linear": ("1f44148a4b896a58",),
        "Conv2d": ("406c33027766cca3", "b44f195f0e54a14b"),
        "GroupNorm": ("6af6a42a0f7e28b0",),
        "AttentionOp": ("565b18b8b2b5a01c",),
        "UNetBlock": ("e3419d15071ee55c",),
        "PositionalEmbedding": ("0c2f73e34f2fea80",),
        "FourierEmbedding": ("49d60543c6cc2be3",),
        "SongUNet": ("277c8d2cb4b1827c",),
        "DhariwalUNet": ("5a4a4511bdca4ba8",),
        "VPPrecond": ("64540b8204e021af",),
        "VEPrecond": ("b0a1208a3f4cd86f",),
        "iDDPMPrecond": ("713a46907e682b7c",),
        "EDMPrecond": ("c6e8b8a571e073ba",),
    },
    {  # NVlabs/edm2, training/networks_edm2.py
        IMPORTS: ("db108e07dc059357",),
        "normalize": ("2aafbe1667f50fe3",),
        "resample": ("df7510b2914d465f",),
        "mp_silu": ("e8de65d586608a42",),
        "mp_sum": ("9c5e4d72f11b9b0e",),
        "mp_cat": ("183a3dfbebf1b013",),
        "MPFourier": ("fe479a347d301ac5",),
        "MPConv": ("e9383ecd14808fd4",),
        "Block": ("f83eb094b2ed6018",),
        "UNet": ("e9b714971f028644",),
        "Precond": ("cee6d7e36726f79c",),
    },
    {  # NVlabs/edm2, training/encoders.py
        "Encoder": ("4e330ce2e54cc2bb",),
        "StandardRGBEncoder": ("9a3fb10a2b7f1510",),
        "StabilityVAEEncoder": ("ffc917bef864b93b",),
    },
)
"""Token hashes by name, of each published file."""


Line = list[str]
"""Tokens of a line of code, however many lines of text it takes."""


def changed(text: str, classes: Iterable[str]) -> list[str]:
    """What of a source text differs from what was published: names that `classes` use, themselves included, and
    "imports". Empty where nothing does, or the text has neither a class nor an import.
    """
    try:
        found = list(statements(text[:LONGEST]))
    except (SyntaxError, ValueError, tokenize.TokenError):
        return ["a source text that cannot be read"]
    imports = [token for lines in found if lines[0][0] in ("import", "from") for line in lines for token in line]
    if not imports and not any(lines[0][0] == "class" for lines in found):
        return []
    defined: dict[str, list[list[Line]]] = {}
    for lines in found:
        for name in bound(lines) if lines[0][0] not in ("import", "from") else ():
            defined.setdefault(name, []).append(lines)
    used = dict.fromkeys(classes)
    table = next((file for file in PUBLISHED if used.keys() & file.keys()), {})
    queue = list(used)
    for name in queue:
        asked = {each for lines in defined.get(name, ()) for line in lines for each in names(line)}
        queue += sorted(asked & defined.keys() - {*queue, INITIAL})
    wrong = [name for name in queue if not {*map(token_hash, defined.get(name, [[]]))} <= {*table.get(name, ())}]
    return wrong + [IMPORTS] * (IMPORTS in table and token_hash([imports]) not in table[IMPORTS])


def names(line: Line) -> set[str]:
    """Words of a line that are not attributes."""
    words = (each for before, each in zip(["", *line], line, strict=False) if each.isidentifier() and before != ".")
    return {word for word in words if not iskeyword(word)}


def bound(lines: list[Line]) -> set[str]:
    """Names that a statement gives a value, or a part of one: torch, in torch.nn.functional.silu = relu."""
    if lines[0][0] in ("class", "def"):
        return {lines[0][1]}
    made: set[str] = set()
    for line in lines:
        if line[0] in ("class", "def"):
            made.add(line[1])
        elif "import" in line:
            made |= names(line[line.index("import") + 1 :])
        elif "=" in line:
            made |= names(line[: len(line) - 1 - line[::-1].index("=")])
    return made


def token_hash(lines: list[Line]) -> str:
    """Of the tokens of a statement: 16 hexadecimal digits."""
    return hashlib.sha256(" ".join(token for line in lines for token in line).encode()).hexdigest()[:16]


def statements(text: str) -> Iterator[list[Line]]:
    """The statements at the top level without their decorators, each with the lines inside it."""
    depth, line, lines = 0, list[str](), list[Line]()
    for kind, string in tokens(text):
        depth += (kind == tokenize.INDENT) - (kind == tokenize.DEDENT)
        if kind == tokenize.NEWLINE:
            if depth == 0 and lines:
                yield lines
                lines = []
            lines += [line] if line[:1] != ["@"] or depth else []
            line = []
        elif kind not in SKIPPED:
            line.append(string)
    if lines:
        yield lines


def tokens(text: str) -> Iterator[tuple[int, str]]:
    """The kind and the text of each token."""
    rows = text.splitlines(keepends=True)
    begun: list[tuple[int, int]] = []  # of f-strings that are open
    for kind, string, start, (last, stop), _ in tokenize.generate_tokens(io.StringIO(text).readline):
        if kind == FSTRING_START:
            begun.append(start)
        elif kind == FSTRING_END:
            row, column = begun.pop()
            if not begun:
                yield tokenize.STRING, "".join([*rows[row - 1 : last - 1], rows[last - 1][:stop]])[column:]
        elif not begun:
            yield kind, string
