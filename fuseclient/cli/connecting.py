"""The options of every command that connects to a metaserver, in one place: what is shown to it, and believed of it.

They add to the URL, or the address, that is the command's first argument: see :mod:`fuseclient.credentials`.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import quote

import typer

from fuseclient.errors import UserError

_T = TypeVar("_T")

_FILES: Final = {
    "tls_ca": ("ca", "whose certificate the metaserver has (PEM); default: of those that the system believes"),
    "tls_cert": ("cert", "a certificate to show (PEM)"),
    "tls_key": ("key", "its key (PEM), mode 0600"),
    "token_file": ("token", "a file with a token to show, mode 0600"),
}
_INSECURE: Final = "insecure"


def connecting(command: Callable[..., _T]) -> Callable[..., _T]:
    """Give a command the options, of which its first argument is told in its query."""
    signature = inspect.signature(command, eval_str=True)
    first = next(iter(signature.parameters))

    @functools.wraps(command)
    def wrapper(**given: Any) -> _T:
        files = {_FILES[name][0]: given.pop(name) for name in _FILES}
        given[first] = _with(given[first], files, given.pop(_INSECURE))
        return command(**given)

    more = [
        _parameter(name, str | None, None, f"--{name.replace('_', '-')}", text, "FILE")
        for name, (_, text) in _FILES.items()
    ]
    more.append(_parameter(_INSECURE, bool, False, "--insecure", "use plaintext to another machine", None))
    parameters = [*signature.parameters.values(), *more]
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
    del wrapper.__wrapped__
    return wrapper


def _parameter(name: str, kind: Any, default: Any, flag: str, text: str, metavar: str | None) -> inspect.Parameter:
    annotation = Annotated[kind, typer.Option(flag, help=text, metavar=metavar, rich_help_panel="Connection")]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _with(url: str, files: dict[str, str | None], insecure: bool) -> str:
    added = [f"{name}={quote(os.path.abspath(path))}" for name, path in files.items() if path is not None]
    added += [_INSECURE] * insecure
    if not added:
        return url
    if url.startswith("file:"):
        raise UserError("an embedded volume has a unix socket of its own: it takes no certificate and no token", 2)
    return f"{url}{'&' if '?' in url else '?'}{'&'.join(added)}"
