"""Rendering of templates, and removal of this machine's paths from recipes."""

import re
from pathlib import Path
from typing import Any

from pruneofa.recipe import to_yaml
from pruneofa.report.table import cell, code, code_block, megabytes

# A path that begins with /, ~ or ~name, a drive, a share, . or .., or has .. in the middle. A regular expression that
# begins with a backslash, as in prune.skip, does not match.
_LOCAL_PATH = re.compile(r"^((file:)?/|~\w*([/\\]|$)|[A-Za-z]:[/\\]|\\\\|\.\.?([/\\]|$))|[/\\]\.\.([/\\]|$)")


def render(template: str, **values: Any) -> str:
    """Fill a template of this package, values escaped for HTML, which Markdown may contain.

    A missing name is an error, not an empty string.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pruneofa.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "cell": lambda value: Markup(cell(value)),
        "code": lambda value: Markup(code(value)),
        "code_block": lambda value, language: Markup(code_block(value, language)),
        "megabytes": megabytes,
        "word": lambda value: re.sub(r"[^\w.-]", "_", str(value)),
    }
    return environment.get_template(template).render(**values)


def portable(value: Any) -> Any:
    """`value` with every path that is absolute, upward or in a home folder shortened to its last part."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and _LOCAL_PATH.search(value):
        last = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
        return last if re.search(r"\w", last) and not last.startswith("~") else "."
    return value


def pruned_at_once(recipe: dict[str, Any]) -> bool:
    """Whether all weights were pruned before the first step; where one_shot is null, its score says so."""
    prune = recipe.get("prune") or {}
    given = prune.get("one_shot")
    return prune.get("score") == "hessian" if given is None else bool(given)


def recipe_yaml(recipe: dict[str, Any]) -> str:
    """The recipe as YAML that can be loaded again, without paths of this machine and without empty default values."""

    def stated(value: Any) -> Any:
        return {k: stated(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    return to_yaml(stated(portable(recipe))).strip()
