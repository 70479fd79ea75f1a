"""What chat templates are given: the jinja2 environment of transformers (5.24, utils/chat_template_utils.py).

Imported in rendering.py's process alone, and late: jinja2 is an extra.
"""
from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..errors import InputError


def environment() -> ImmutableSandboxedEnvironment:
    """Return a new environment."""
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    found.filters["tojson"] = to_json
    found.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=Dicts(),
                         namespace=PublicNamespace)
    return found


def to_json(value: object, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Return the value as JSON; jinja2's own filter escapes what HTML would."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: object) -> None:
    """Refuse the messages, as a template asks for it."""
    raise InputError(f"found messages that the chat template refuses ({str(message)[:300]}), expected others")


def strftime_now(format: str) -> str:
    """Return the time of now."""
    return datetime.now().strftime(format)


class Generation(Extension):
    """The tag {% generation %} marks what the model has said, for those who train; its body is as any other."""
    tags = {"generation"}

    def parse(self, parser: Any) -> Node:
        line = next(parser.stream).lineno
        content = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("body"), [], [], content).set_lineno(line)

    def body(self, caller: Any) -> str:
        """Return what the tag encloses."""
        return caller()


class Dicts:
    """The dict of templates: the type itself would be a way into Python."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        """Return dict.fromkeys()."""
        return dict.fromkeys(*args, **kwargs)


class PublicNamespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):                # a name may be `self`
        values = dict(*args[1:], **kwargs)
        for name in values:
            require_public(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        require_public(name)
        super().__setitem__(name, value)


def require_public(name: object) -> None:
    """Raise SecurityError for a name that begins with an underscore, as those of Python's inside do."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r}")
