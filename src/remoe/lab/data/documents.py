"""Documents, and the checks that every row passes on its way to becoming one."""

from dataclasses import dataclass

from remoe.errors import DataError

TOTAL = "all"  # in tables and files, the row of all domains together


@dataclass(frozen=True, slots=True)
class Document:
    """One text with its domain; `group` names the source item that must stay on one side of the split.

    A document without a group is an item of its own, together with exact copies of its text.
    """

    text: str
    domain: str
    group: str | None = None

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return utf8_length(self.text)


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns to read; a `domain` column is optional under its default name only."""

    text: str = "text"
    domain: str = "domain"
    group: str | None = None

    @property
    def domain_required(self) -> bool:
        """Whether the user asked for this domain column by name."""
        return self.domain != "domain"


def utf8_length(text: str) -> int:
    """Length of `text` in UTF-8 bytes.

    Raises UnicodeEncodeError for lone surrogates, which no UTF-8 text can hold.
    """
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def is_blank(text: str) -> bool:
    """Whether there is nothing to learn from `text`: it is empty or all white space."""
    return not text or text.isspace()


def make_document(text: object, domain: object, group: object, place: str) -> Document | None:
    """Check one row and make it a document, or None if its text is blank.

    `place` names the row in errors. Raises DataError for a value that is not text, or not Unicode.
    """
    if not isinstance(text, str):
        raise DataError(f"{place}: the text is {_describe(text)}, not a string")
    if not isinstance(domain, str) or not domain:
        raise DataError(f"{place}: the domain is {_describe(domain)}, not a name")
    if domain == TOTAL:
        raise DataError(f"{place}: {TOTAL!r} cannot be a domain's name: it stands for all of them; rename it")
    if is_blank(text):
        return None
    group = None if group is None else str(group)
    for what, value in (("text", text), ("domain", domain), ("group", group or "")):
        try:
            utf8_length(value)
        except UnicodeEncodeError:
            raise DataError(f"{place}: the {what} holds a lone surrogate, so it is not valid Unicode") from None
    return Document(text, domain, group)


def _describe(value: object) -> str:
    if value is None:
        return "missing (null)"
    return "empty" if value == "" else f"of type {type(value).__name__}"
