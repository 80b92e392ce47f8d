"""YAML 1.2 by PyYAML, which by itself reads and writes YAML 1.1."""

import re
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, where 2:4 is the number 124, 1e-4 is text and no is false; these are the rules of 1.2."""


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
    """Quotes exactly the text that `Loader` would read as something else."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def parse(text: str) -> Any:
    """The plain values that a YAML document stands for. Raises yaml.YAMLError."""
    return yaml.load(text, Loader)


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML that `parse` reads back as they are."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)
