"""YAML 1.2 with PyYAML, which implements YAML 1.1."""

import re
from typing import Any

import yaml

from pruneofa.errors import first_line, short

MAX_DEPTH = 50  # of mappings and lists within one another
MAX_VALUES = 100_000  # with every use of an alias counted: a few lines of aliases can stand for billions


class Loader(yaml.SafeLoader):
    """A YAML 1.2 loader. In YAML 1.1, which PyYAML implements, 2:4 is the number 124, 1e-4 a string and no is false.

    A key that is given twice is an error, which PyYAML would resolve to the last one.
    """

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:  # noqa: N803 - PyYAML's name
        """Begin a `[` or `{`. The time that PyYAML takes grows with the square of the depth."""
        if self.flow_level > MAX_DEPTH:
            raise yaml.YAMLError("nested too deeply")
        super().fetch_flow_collection_start(TokenClass)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        keys: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in keys:
                    mark = key.start_mark
                    raise yaml.YAMLError(
                        f"the key {short(key.value)} is given twice; keep one of them, in line {mark.line + 1}, "
                        f"column {mark.column + 1}"
                    )
                keys.add(key.value)
        return super().construct_mapping(node, deep)


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


def _integer(_: Loader, node: yaml.ScalarNode) -> int:
    """A decimal number: YAML 1.1 would read 012 as octal."""
    if len(node.value) > 100:
        raise yaml.YAMLError(f"a number of {len(node.value)} digits, wanted at most 100")
    return int(node.value)


Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class Dumper(yaml.SafeDumper):
    """A YAML 1.2 dumper: quotes only strings that `Loader` would read as another type."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def parse(text: str) -> Any:
    """Parse a YAML document into plain values. Raises yaml.YAMLError, also for what is nested or large beyond use."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # of PyYAML's constructors
        raise yaml.YAMLError(first_line(error)) from None


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], level: int = 0) -> tuple[int, int]:
    """Number of values of a node, aliases expanded, and levels below it. Raises yaml.YAMLError beyond the limits."""
    if level > MAX_DEPTH:
        raise yaml.YAMLError("nested too deeply")
    if id(node) not in known:
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        measured = [_measure(part, known, level + 1) for part in parts]
        count = 1 + sum(count for count, _ in measured)
        if count > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES} values, aliases expanded")
        known[id(node)] = count, max((1 + below for _, below in measured), default=0)
    if level + known[id(node)][1] > MAX_DEPTH:
        raise yaml.YAMLError("nested too deeply")
    return known[id(node)]


def to_yaml(values: dict[str, Any]) -> str:
    """Write plain values as YAML, from which `parse` reads equal values."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)
