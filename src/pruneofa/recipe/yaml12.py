"""YAML 1.2 with PyYAML, which implements YAML 1.1."""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """A YAML 1.2 loader. In YAML 1.1, which PyYAML implements, 2:4 is the number 124, 1e-4 a string and no is false."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.endswith((":null", ":merge"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$"),
    list("-+.0123456789"),
)
Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))  # 1.1 would read 012 as octal


class Dumper(yaml.SafeDumper):
    """A YAML 1.2 dumper: quotes only strings that `Loader` would read as another type."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def parse(text: str) -> Any:
    """Parse a YAML document into plain values. Raises yaml.YAMLError."""
    return yaml.load(text, Loader)


def to_yaml(values: dict[str, Any]) -> str:
    """Write plain values as YAML, from which `parse` reads equal values."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)
