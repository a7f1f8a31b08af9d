"""The built-in data: docstrings of Python's standard library and of installed packages.

Real English prose that is already on every machine that can run polyrank. The label of a text is
the package it documents. A text keeps only its prose up to the first section or example, and any
text that names a package, one of its well-known parts or its import alias is dropped, so that no
text gives its label away. Nothing is imported or run: the sources are parsed. Files are visited in
the order of a hash of their path, so the choice is the same on every machine with the same versions.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from polyrank.data.texts import Corpus, Texts

PACKAGES = ("python", "matplotlib", "networkx", "numpy", "pandas", "sympy", "torch", "transformers")
TEXTS_PER_PACKAGE = 400
TEST_SHARE = 0.15

_SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "idlelib", "lib2to3", "__pycache__"}
_SECTION = re.compile(
    r"\n\s*(?:Parameters|Args|Arguments|Params|Returns?|Raises|Yields|Attributes|Examples?|Notes?"
    r"|See Also|References|Usage|Warnings?)\b|\n\s*(?:>>>|\.\. |:param|:return|\*\*?kwargs|```|===|---)"
)
_GIVEAWAY = re.compile(
    r"python|cpython|stdlib|pep\s?\d|matplotlib|mpl|pyplot|plt\b|axes|artist|figure|networkx|\bnx\b|nbunch"
    r"|numpy|\bnp\b|ndarray|ufunc|pandas|\bpd\b|dataframe|\bseries\b|sympy|symbolic|torch|aten|cuda"
    r"|transformers|hugging|pretrained|tokenizer",
    re.IGNORECASE,
)
_MIN_WORDS, _MAX_WORDS = 8, 48


def load_docstrings() -> Corpus:
    """At most 400 texts of each of eight packages, about 15 % of them for testing.

    Texts that occur in two packages are left out; the split is by a hash of the text.
    """
    found = {package: list(_texts_of(package)) for package in PACKAGES}
    seen_in = Counter(text.lower() for texts in found.values() for text in texts)
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for label, texts in enumerate(found.values()):
        unique = [(text, label) for text in texts if seen_in[text.lower()] == 1]
        for row in unique[:TEXTS_PER_PACKAGE]:
            (test if _hash(row[0]) < TEST_SHARE else train).append(row)
    train.sort(key=lambda row: _hash("order " + row[0]))
    test.sort(key=lambda row: _hash("order " + row[0]))
    return Corpus(_as_texts(train), _as_texts(test), PACKAGES)


def _as_texts(rows: list[tuple[str, int]]) -> Texts:
    texts, labels = zip(*rows, strict=True)
    return Texts(list(texts), None, list(labels))


def _texts_of(package: str) -> Iterator[str]:
    """Distinct prose texts of one package, somewhat more than are needed."""
    seen: set[str] = set()
    root = _root_of(package)
    files = [path for path in root.rglob("*.py") if not _skipped(path.relative_to(root))]
    for path in sorted(files, key=lambda path: _hash(path.relative_to(root).as_posix())):
        for docstring in _docstrings_in(path):
            text = _prose(docstring)
            if text is not None and text.lower() not in seen:
                seen.add(text.lower())
                yield text
        if len(seen) >= TEXTS_PER_PACKAGE * 1.15:
            return


def _root_of(package: str) -> Path:
    if package == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is a dependency of polyrank"
    assert spec.origin is not None
    return Path(spec.origin).parent


def _skipped(path: Path) -> bool:
    return not _SKIPPED_FOLDERS.isdisjoint(path.parts)


def _docstrings_in(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and (docstring := ast.get_docstring(node, clean=False)):
            yield docstring


def _prose(docstring: str) -> str | None:
    """The text before the first section, on one line; None when it is unfit or names its label."""
    first, _, rest = docstring.expandtabs().partition("\n")
    text = _SECTION.split(f"{first.strip()}\n{textwrap.dedent(rest)}")[0]
    text = " ".join(text.split())
    if not _MIN_WORDS <= len(text.split()) <= _MAX_WORDS or _GIVEAWAY.search(text):
        return None
    letters = sum(character.isalpha() or character == " " for character in text)
    return text if letters >= 0.8 * len(text) else None


def _hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48
